r"""What a network learned as a direction in weight space: added, taken away, and cleaned before it is added to others.

==================  =======================================================  ==========================================
name                what it gives                                            source
==================  =======================================================  ==========================================
``task_vector``     the way from a network to what it became                 Ilharco et al. 2022, arXiv:2212.04089
``add``             the network moved along such vectors                     Ilharco et al. 2022
``negate``          the way back, and beyond: to forget                      Ilharco et al. 2022
``similarities``    the cosines between vectors                              Ilharco et al. 2022
``trim``            a vector's largest entries alone                         Yadav et al. 2023, arXiv:2306.01708
``elect``           for each weight the sign that outweighs the other        Yadav et al. 2023
``disjoint_mean``   the mean of those that agree with it                     Yadav et al. 2023
``ties``            the three in turn: one vector of several                 Yadav et al. 2023
``dare``            a vector with most entries dropped, the rest larger      Yu et al. 2023, arXiv:2311.03099
==================  =======================================================  ==========================================

A task vector holds the parameters, by name; buffers are no part of it. After ``add`` batch norm's statistics are still
those of the network from which the way began: ``refresh_batch_norm``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import is_number, require
from course_lib.merging.states import State, check_alike, combined, flat, parameters_of, with_state

# --- Arithmetic -------------------------------------------------------------------------------------------------------


def task_vector(base: nn.Module, tuned: nn.Module) -> State:
    r"""Return :math:`\tau=\theta_\text{tuned}-\theta_\text{base}`, by the parameter's name.

    Raises
    ------
    ValueError : the networks are of different shapes.
    """
    check_alike([base, tuned], ["base", "tuned"])
    return combined([parameters_of(tuned), parameters_of(base)], [1.0, -1.0])


def add(base: nn.Module, vectors: Sequence[Mapping[str, Tensor]], scale: float = 1.0) -> nn.Module:
    r"""Return the network with :math:`\theta_\text{base}+\lambda\sum_t\tau_t`, where :math:`\lambda` is ``scale``.

    "a is to b as c is to d": ``add(base, [c, b, negate(a)])``.

    Raises
    ------
    ValueError : there are no vectors, one does not fit the network, or ``scale`` is no number.
    """
    require("scale", scale, is_number, "a number")
    found, weights = check_vectors(vectors), parameters_of(base)
    for name, value in weights.items():
        if name not in found[0] or found[0][name].shape != value.shape:
            raise ValueError(f"vectors[0] does not fit {name!r} {list(value.shape)} of the network base")
    moved = [{name: vector[name].to(value.device) for name, value in weights.items()} for vector in found]
    return with_state(base, combined([weights, *moved], [1.0] + [scale] * len(moved)))


def negate(vector: Mapping[str, Tensor]) -> State:
    r"""Return :math:`-\tau`: added, it takes away what the tuning gave."""
    return {name: -value for name, value in vector.items()}


def similarities(vectors: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return the cosines between task vectors, ``[T, T]``: near 0 where the tasks leave each other alone."""
    rows = torch.stack([flat(vector) for vector in check_vectors(vectors)])
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return rows @ rows.mT


# --- TIES -------------------------------------------------------------------------------------------------------------


def trim(vector: Mapping[str, Tensor], keep: float = 0.2) -> State:
    """Return the vector with its largest entries, the share ``keep`` of all; the others are 0.

    At least one is kept, and entries as large as the smallest of them all.

    Raises
    ------
    ValueError : ``keep`` does not lie above 0 and not above 1.
    """
    require("keep", keep, lambda k: is_number(k) and 0 < k <= 1, "a number above 0 and not above 1")
    sizes = flat(vector).abs()
    count = max(1, round(keep * len(sizes)))
    least = sizes.kthvalue(len(sizes) - count + 1).values
    return {name: torch.where(value.abs() >= least, value, 0) for name, value in vector.items()}


def elect(vectors: Sequence[Mapping[str, Tensor]]) -> State:
    r"""Return :math:`\gamma=\text{sgn}\big(\sum_t\tau_t\big)` for each weight: -1, 0 or 1."""
    return {name: value.sign() for name, value in combined(vectors, [1.0] * len(vectors)).items()}


def disjoint_mean(vectors: Sequence[Mapping[str, Tensor]], signs: Mapping[str, Tensor]) -> State:
    """Return for each weight the mean of the entries that have its sign; 0 where there is none, or the sign is 0."""
    merged = {}
    for name, sign in signs.items():
        entries = torch.stack([vector[name] for vector in vectors])
        agree = entries.sign() == sign
        merged[name] = torch.where(agree, entries, 0).sum(0) / agree.sum(0).clamp_min(1)
    return merged


def ties(vectors: Sequence[Mapping[str, Tensor]], keep: float = 0.2) -> State:
    """Return one vector of several: trimmed, their signs elected, the mean of those that agree.

    What few vectors changed is not diluted by the many that left it alone, and opposite changes do not cancel.
    ``add(base, [ties(vectors)], scale)``.

    Raises
    ------
    ValueError : there are no vectors, they do not fit together, or ``keep`` does not lie above 0 and not above 1.
    """
    trimmed = [trim(vector, keep) for vector in check_vectors(vectors)]
    return disjoint_mean(trimmed, elect(trimmed))


# --- DARE -------------------------------------------------------------------------------------------------------------


def dare(vector: Mapping[str, Tensor], drop: float, *, generator: torch.Generator) -> State:
    r"""Return the vector with each entry dropped with chance p (``drop``), those that stay divided by :math:`1-p`.

    Its expectation is the vector itself; its variance :math:`\tau^2\,p/(1-p)`. A CPU ``generator`` draws, the same on
    every device.

    Raises
    ------
    ValueError : ``drop`` is no number from 0 to below 1.
    """
    require("drop", drop, lambda p: is_number(p) and 0 <= p < 1, "a number from 0 to below 1")
    found = {}
    for name, value in vector.items():
        stays = torch.rand(value.shape, generator=generator, dtype=torch.float64) >= drop
        found[name] = torch.where(stays.to(value.device), value / (1 - drop), 0)
    return found


def check_vectors(vectors: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """Return the task vectors as a list, if there is one and all have entries of the same names and shapes.

    Raises
    ------
    ValueError : there is none, or one does not fit the first.
    """
    if isinstance(vectors, Mapping):
        raise ValueError("vectors is one task vector: must be a list of them, [vector]")
    found = list(vectors)
    require("vectors", found, bool, "at least one task vector")
    shapes = {name: value.shape for name, value in found[0].items()}
    for place, vector in enumerate(found):
        if {name: value.shape for name, value in vector.items()} != shapes:
            raise ValueError(f"vectors[{place}] does not fit vectors[0]: must be of networks of one architecture")
    return found
