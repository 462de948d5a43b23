r"""Penalties on the weights, as objectives: each adds a term to the objective that it wraps.

=======================  ==============================================================  ===============================
name                     what it adds                                                    source
=======================  ==============================================================  ===============================
``l2``                   half the squared norm                                           Krogh & Hertz, NIPS 1991
``l1``                   the sum of magnitudes                                           Tibshirani 1996, JRSSB 58(1)
``elastic_net``          both                                                            Zou & Hastie 2005, JRSSB 67(2)
``group_lasso``          the norms of output units                                       Yuan & Lin 2006, JRSSB 68(1);
                                                                                         Scardapane et al. 2016,
                                                                                         arXiv:1607.00485
``soft_orthogonality``   the squared distance of the Gram matrix from the identity       Bansal et al. 2018,
                                                                                         arXiv:1810.09102
``srip``                 the largest singular value of that distance                     Bansal et al. 2018
``spectral_penalty``     half the squared spectral norm                                  Yoshida & Miyato 2017,
                                                                                         arXiv:1705.10941
``decay_only_weights``   decay by the optimizer, for the same parameters
=======================  ==============================================================  ===============================

An objective is ``(model, x, y) -> loss``: ``Recipe(objective=partial(l1, strength=1e-4))``, and two at once are
``partial(l1, strength=1e-4, objective=partial(l2, weight_decay=1e-3))``. The penalised parameters are those of
``weights_of``. The gradient of ``l1`` and ``group_lasso`` jumps at 0, so steps along it jump over 0 and no weight
stays there: exact zeros come from ``proximal``. A convolution's weight counts as a matrix with one row an output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least
from course_lib.lab.training import Inputs, Objective, cross_entropy
from course_lib.regularization.drawing import check_chance, check_not_negative
from course_lib.regularization.passes import flat_filters, weights_of

# --- Sizes of weights -------------------------------------------------------------------------------------------------


def half_squared_norm(weights: Iterable[Tensor]) -> Tensor:
    r"""Return :math:`\tfrac12\sum_i w_i^2`."""
    return 0.5 * torch.stack([w.square().sum() for w in weights]).sum()


def l1_norm(weights: Iterable[Tensor]) -> Tensor:
    r"""Return :math:`\sum_i |w_i|`; its gradient is the sign, 0 at 0."""
    return torch.stack([w.abs().sum() for w in weights]).sum()


def group_norm_sum(weights: Iterable[Tensor]) -> Tensor:
    r"""Return :math:`\sum_g \sqrt{|g|}\,\|w_g\|_2`, a group for each output unit: its ``|g|`` incoming weights.

    The root makes groups of different sizes alike: with weights of one size each counts by their number.
    """
    rows = [flat_filters(w) for w in weights]
    # not the root of a sum of squares, whose gradient is NaN at 0: vector_norm gives 0 there, a subgradient
    return torch.stack([math.sqrt(r.shape[1]) * torch.linalg.vector_norm(r, dim=1).sum() for r in rows]).sum()


# --- Objectives -------------------------------------------------------------------------------------------------------


def l2(model: nn.Module, x: Inputs, y: Tensor, *, weight_decay: float, objective: Objective = cross_entropy) -> Tensor:
    r"""Add :math:`\tfrac{\lambda}{2}\|w\|^2`, :math:`\lambda` being ``weight_decay``.

    With SGD this is what ``weight_decay`` of the optimizer does, and what shrinking all weights by
    :math:`1-\eta\lambda` before the step does. With Adam it is not: there the penalty's gradient is divided by the
    recent size of the gradient like all the rest, and a weight with large gradients hardly decays (Loshchilov & Hutter
    2017, arXiv:1711.05101); ``AdamW`` shrinks. Biases: ``decay_only_weights``.

    Raises
    ------
    ValueError : ``weight_decay`` is no number of at least 0, or the model has no weights.
    """
    check_not_negative(weight_decay=weight_decay)
    return objective(model, x, y) + weight_decay * half_squared_norm(_weights(model))


def l1(model: nn.Module, x: Inputs, y: Tensor, *, strength: float, objective: Objective = cross_entropy) -> Tensor:
    r"""Add :math:`\lambda\|w\|_1`, :math:`\lambda` being ``strength``: descent follows the subgradient.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0, or the model has no weights.
    """
    check_not_negative(strength=strength)
    return objective(model, x, y) + strength * l1_norm(_weights(model))


def elastic_net(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    alpha: float,
    l1_ratio: float = 0.5,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Add :math:`\alpha\rho\|w\|_1 + \tfrac12\alpha(1-\rho)\|w\|^2`, :math:`\rho` being ``l1_ratio``.

    Names and scale are those of scikit-learn's ``ElasticNet``, whose loss is half the mean squared error.

    Raises
    ------
    ValueError : ``alpha`` is no number of at least 0, ``l1_ratio`` none from 0 to 1, or the model has no weights.
    """
    check_not_negative(alpha=alpha)
    check_chance(l1_ratio=l1_ratio)
    weights = _weights(model)
    penalty = l1_ratio * l1_norm(weights) + (1 - l1_ratio) * half_squared_norm(weights)
    return objective(model, x, y) + alpha * penalty


def group_lasso(
    model: nn.Module, x: Inputs, y: Tensor, *, strength: float, objective: Objective = cross_entropy
) -> Tensor:
    r"""Add :math:`\lambda\sum_g\sqrt{|g|}\,\|w_g\|_2` over output units: a unit is kept or left as a whole.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0, or the model has no weights.
    """
    check_not_negative(strength=strength)
    return objective(model, x, y) + strength * group_norm_sum(_weights(model))


# --- Orthogonality and spectral norm ----------------------------------------------------------------------------------


def gram_residual(weight: Tensor) -> Tensor:
    r"""Return :math:`W^\top W - I`, or :math:`WW^\top - I` where that is the smaller matrix.

    Of a matrix with fewer rows than columns only the rows can be orthonormal, so the larger Gram matrix can never be
    the identity.
    """
    w = flat_filters(weight)
    gram = w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w
    return gram - torch.eye(len(gram), dtype=w.dtype, device=w.device)


def soft_orthogonality(
    model: nn.Module, x: Inputs, y: Tensor, *, strength: float, objective: Objective = cross_entropy
) -> Tensor:
    r"""Add :math:`\lambda\sum_l\|W_l^\top W_l - I\|_F^2` (``gram_residual``): no direction is stretched or forgotten.

    Source: Bansal et al. 2018, arXiv:1810.09102, their "SO".

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0, or the model has no weights.
    """
    check_not_negative(strength=strength)
    penalty = torch.stack([gram_residual(w).square().sum() for w in _weights(model)]).sum()
    return objective(model, x, y) + strength * penalty


def srip(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    strength: float,
    steps: int = 2,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Add :math:`\lambda\sum_l\sigma(W_l^\top W_l - I)`, the spectral norm: only the worst direction is mended.

    Spectral restricted isometry (Bansal et al. 2018, arXiv:1810.09102), by ``steps`` of power iteration.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0, ``steps`` is below 1, or the model has no weights.
    """
    check_not_negative(strength=strength)
    at_least(1, steps=steps)
    penalty = torch.stack([largest_singular_value(gram_residual(w), steps) for w in _weights(model)]).sum()
    return objective(model, x, y) + strength * penalty


def spectral_penalty(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    strength: float,
    steps: int = 10,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Add :math:`\tfrac{\lambda}{2}\sum_l\sigma(W_l)^2`: a bound on how much each layer can stretch its input.

    Source: Yoshida & Miyato 2017, arXiv:1705.10941, who keep a vector from step to step and take one step of power
    iteration; here each call starts anew and takes ``steps``, so that the objective has no memory.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0, ``steps`` is below 1, or the model has no weights.
    """
    check_not_negative(strength=strength)
    at_least(1, steps=steps)
    norms = [largest_singular_value(flat_filters(w), steps) for w in _weights(model)]
    return objective(model, x, y) + 0.5 * strength * torch.stack(norms).square().sum()


def largest_singular_value(matrix: Tensor, steps: int) -> Tensor:
    r"""Return :math:`\sigma=u^\top W v` after ``steps`` of power iteration, u and v being kept at norm 1.

    .. math:: u\leftarrow Wv/\|Wv\|,\qquad v\leftarrow W^\top u/\|W^\top u\|

    It starts at the longest row, which is never orthogonal to all right singular vectors that matter. u and v are
    constants to the gradient, which therefore is :math:`uv^\top`, as that of the spectral norm.
    """
    with torch.no_grad():
        rows = matrix.detach()
        v = nn.functional.normalize(rows[rows.square().sum(1).argmax()], dim=0)
        for _ in range(steps):
            u = nn.functional.normalize(rows @ v, dim=0)
            v = nn.functional.normalize(rows.mT @ u, dim=0)
    return torch.dot(u, matrix @ v)


# --- Decay by the optimizer -------------------------------------------------------------------------------------------


def decay_only_weights(
    parameters: Iterator[tuple[str, nn.Parameter]],
    *,
    make: Callable[[Any], Optimizer],
    weight_decay: float,
) -> Optimizer:
    """Make an optimizer that decays what ``weights_of`` names, and leaves biases and normalisation alone.

    ``Recipe(optimizer=partial(decay_only_weights, make=partial(torch.optim.AdamW, lr=1e-3), weight_decay=0.1))``. What
    the number means is the optimizer's affair: a penalty in ``SGD`` and ``Adam``, a shrinkage in ``AdamW``.

    Raises
    ------
    ValueError : ``weight_decay`` is no number of at least 0.
    """
    check_not_negative(weight_decay=weight_decay)
    everything = [p for _, p in parameters]
    decayed = {id(p) for p in weights_of(everything)}
    groups = [
        {"params": [p for p in everything if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in everything if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return make([group for group in groups if group["params"]])


def _weights(model: nn.Module) -> list[nn.Parameter]:
    found = weights_of(model.parameters())
    if not found:
        raise ValueError(f"model={type(model).__name__}: must have weights of two dimensions or more that train")
    return found
