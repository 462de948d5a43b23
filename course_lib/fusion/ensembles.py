r"""Networks that answer together: trained apart, along one run, or as one network that answers several times.

=========================  =================================================  ==========================================
name                       where its members come from                        source
=========================  =================================================  ==========================================
``Members``                networks that are there already
``deep_ensemble``          other first weights, other batches                 Lakshminarayanan et al. 2016,
                                                                              arXiv:1612.01474
``deep_ensemble_at_once``  the same, trained in one run of stacked tensors
``snapshots``              the end of each cycle of one run                   Huang et al. 2017, arXiv:1704.00109
``fast_geometric``         short cycles around a trained network              Garipov et al. 2018, arXiv:1802.10026
``MonteCarloDropout``      dropout that goes on in evaluation                 Gal & Ghahramani 2015, arXiv:1506.02142
``trained``                whatever several plans say
=========================  =================================================  ==========================================

``BatchEnsemble`` and ``MIMO``, several members within one network, are in ``shared``. All of them are called like a
network and give log-probabilities ``[N, K]``, so ``evaluate`` and ``logits_of`` take them; ``each(x)`` gives the logits
``[M, N, K]`` of the members.

``Members`` is chapter 9's ``Ensemble`` of teachers with any fusion in place of two, and teaches like it; the cosine
with restarts of ``snapshots`` is chapter 3's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from course_lib.distillation.teachers import Ensemble
from course_lib.fusion.together import train_together
from course_lib.fusion.voting import Fuse, mean_probability
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset
from course_lib.lab.models import as_in_training, thaw
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.schedules.shapes import cosine_restarts, schedule

Factory = Callable[[], nn.Module]
SEEDS_APART = 100  # ``fit`` takes seeds up to 4294: 40 members and more have room
"""Members take seeds this far apart, so that the ensembles of seeds 0, 1, 2, … have no member in common."""


class Members(Ensemble):
    """Networks that answer together: ``forward`` fuses their logits, ``each`` gives them one by one.

    ``fuse`` takes ``[M, N, K]`` to ``[N, K]``: ``mean_probability`` (the default), ``geometric_mean``,
    ``partial(mean_probability, weights=fit_weights(...))``. ``len(members)`` is M; ``members[:3]`` are the first three.

    Raises
    ------
    ValueError : there are no networks.
    """

    def __init__(self, networks: Iterable[nn.Module], fuse: Fuse = mean_probability) -> None:
        super().__init__(networks)
        self.fuse = fuse

    @property
    def networks(self) -> nn.ModuleList:
        """The networks."""
        return self.teachers

    def __len__(self) -> int:
        return len(self.teachers)

    def __getitem__(self, which: slice) -> Members:
        return Members(self.teachers[which], self.fuse)

    def each(self, x: Any) -> Tensor:
        """``[N, …]`` to the members' logits ``[M, N, K]``."""
        return torch.stack([network(x) for network in self.teachers])

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to what they say together ``[N, K]``."""
        return self.fuse(self.each(x))


# --- Trained apart ----------------------------------------------------------------------------------------------------


def member_seeds(members: int, seed: int) -> list[int]:
    """Return the seeds of an ensemble's members: ``seed``, ``seed + 100``, …"""
    at_least(1, members=members)
    return [seed + SEEDS_APART * place for place in range(members)]


def deep_ensemble(network: Factory, data: Dataset, recipe: Recipe, *, members: int, seed: int) -> Members:
    """Return networks that differ by their first weights and the order of their batches, each trained by ``fit``.

    The first is what ``fit`` makes with ``seed`` alone. The paper trains on adversarial examples as well, which is an
    objective of chapter 5.

    Raises
    ------
    ValueError : ``members`` is below 1.
    """
    trained = []
    for own in member_seeds(members, seed):
        model = fresh(network, recipe, seed=own)
        fit(model, data, recipe, seed=own, progress=False)
        trained.append(model.eval())
    return Members(trained)


def deep_ensemble_at_once(network: Factory, data: Dataset, recipe: Recipe, *, members: int, seed: int) -> Members:
    """Return the members of ``deep_ensemble``, up to rounding, trained in one run by ``train_together``.

    Raises
    ------
    ValueError : ``members`` is below 1; and as ``train_together``.
    """
    seeds = member_seeds(members, seed)
    models = [fresh(network, recipe, seed=own) for own in seeds]
    train_together(models, data, recipe, seeds=seeds)
    return Members([model.eval() for model in models])


# --- Along one run ----------------------------------------------------------------------------------------------------


def snapshots(network: Factory, data: Dataset, recipe: Recipe, *, cycles: int, seed: int) -> Members:
    r"""Train one network, its rate falling from its height to 0 in each of M ``cycles``; return it at the end of each.

    With T steps in all the rate at step t, counted from 1, is

    .. math:: \frac{\alpha_0}2\Big(\cos\frac{\pi\,\mathrm{mod}(t-1,\,T/M)}{T/M}+1\Big)

    and each jump back up throws the network out of the valley that it has settled in. Where they are equally good, the
    last few members are often better than all: the first has had the shortest training.

    Raises
    ------
    ValueError : ``cycles`` is below 1 or does not divide the number of steps, or the recipe has a schedule of its own.
    """
    at_least(1, cycles=cycles)
    total = sum(recipe.steps(len(data.train)))
    require("cycles", cycles, lambda c: total % c == 0, f"a divisor of {total}, the number of steps")
    model = fresh(network, recipe, seed=seed)
    falling = schedule(cosine_restarts, first=total // cycles)
    return Members(_taken(model, data, recipe, falling, lambda step: step % (total // cycles) == 0, seed))


def triangle_rate(step: int, *, cycle: int, low: float) -> float:
    r"""Return the factor of the rate of ``fast_geometric`` at a step, counted from 0: from 1 down to ``low`` and back.

    .. math:: t=\frac{\mathrm{mod}(i-1,c)+1}c,\qquad
        \alpha(i)=\begin{cases}(1-2t)+2t\,\alpha_2&t\le\tfrac12\\(2-2t)\,\alpha_2+(2t-1)&t>\tfrac12\end{cases}

    with i = step + 1, c the ``cycle``, :math:`\alpha_2` the factor ``low``, and the higher rate the optimizer's own.
    """
    t = (step % cycle + 1) / cycle
    return (1 - 2 * t) + 2 * t * low if t <= 0.5 else (2 - 2 * t) * low + (2 * t - 1)


def fast_geometric(
    model: nn.Module, data: Dataset, recipe: Recipe, *, cycle: int, low: float = 0.1, seed: int
) -> Members:
    """Train a copy of a trained network on, its rate going down and up in ``cycle`` steps; return it at each low point.

    Good networks are connected by paths of low loss, and so close together that a few epochs lead from one to another.
    ``low`` is the lowest rate as a fraction of the optimizer's. The network itself stays as it is and is no member.

    Raises
    ------
    ValueError : ``cycle`` is no even number of at least 2 that divides the number of steps, ``low`` is no number from 0
        to 1, or the recipe has a schedule of its own.
    """
    total = sum(recipe.steps(len(data.train)))
    at_least(2, cycle=cycle)
    allowed = f"an even number that divides {total}, the number of steps"
    require("cycle", cycle, lambda c: c % 2 == 0 and total % c == 0, allowed)
    require("low", low, lambda a: is_number(a) and 0 <= a <= 1, "a number from 0 to 1")
    zigzag = partial(_by_factor, factor=partial(triangle_rate, cycle=cycle, low=low))
    copied = thaw(copy.deepcopy(model))
    return Members(_taken(copied, data, recipe, zigzag, lambda step: step % cycle == cycle // 2, seed))


def _by_factor(optimizer: Optimizer, steps: int, factor: Callable[[int], float]) -> LRScheduler:
    return LambdaLR(optimizer, factor)


def _taken(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    rates: Callable[[Optimizer, int], LRScheduler],
    when: Callable[[int], bool],
    seed: int,
) -> list[nn.Module]:
    """Train the network; return its copies after those steps, counted from 1, that ``when`` asks for."""
    require("recipe.schedule", recipe.schedule, lambda found: found is None, "None: the method has one of its own")
    taken: list[nn.Module] = []

    def take(optimizer: Optimizer, step: int) -> None:
        if when(step):
            taken.append(copy.deepcopy(model).eval())

    fit(model, data, after_each_step(replace(recipe, schedule=rates), take), seed=seed, progress=False)
    return taken


# --- One network, asked several times ---------------------------------------------------------------------------------


class MonteCarloDropout(nn.Module):
    """A network whose dropout goes on in evaluation: ``samples`` passes, each with other units dropped.

    All else is in evaluation mode: batch norm uses its running statistics. In training it is the plain network. The
    masks are drawn from the layers' own generators, or from torch's global one: with ``seed_everything`` before the
    call the same ones come again.

    Raises
    ------
    ValueError : ``samples`` is below 1, or the network has no dropout.
    """

    def __init__(self, model: nn.Module, samples: int = 10, fuse: Fuse = mean_probability) -> None:
        super().__init__()
        at_least(1, samples=samples)
        self.model, self.samples, self.fuse = model, samples, fuse
        require("model", type(model).__name__, lambda _: bool(dropouts(model)), "a network with dropout")
        self.train(model.training)

    def each(self, x: Any) -> Tensor:
        """``[N, …]`` to logits ``[samples, N, K]``."""
        with _dropping(self.model):
            return torch.stack([self.model(x) for _ in range(self.samples)])

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to ``[N, K]``: the network's logits in training, the samples' fused ones in evaluation."""
        return self.model(x) if self.training else self.fuse(self.each(x))


def dropouts(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a network that drop at random: torch's, and those of chapter 5 (by their chance ``p``)."""
    return [
        part for part in model.modules() if "Drop" in type(part).__name__ and is_number(getattr(part, "p", math.nan))
    ]


@contextmanager
def _dropping(model: nn.Module) -> Iterator[None]:
    """Evaluation mode but for dropout, and afterwards each part in the mode that it was in."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with as_in_training(dropouts(model)):
            yield
    finally:
        for part, mode in modes:
            part.training = mode


# --- Members that differ by more than their seed ----------------------------------------------------------------------


def trained(plans: Sequence[tuple[Factory, Dataset, Recipe, int]]) -> Members:
    """Return the members of several plans ``(network, data, recipe, seed)``: other data, architectures, augmentations.

    Raises
    ------
    ValueError : there are no plans.
    """
    require("plans", [*plans], bool, "at least one (network, data, recipe, seed)")
    found = []
    for network, data, recipe, seed in plans:
        model = fresh(network, recipe, seed=seed)
        fit(model, data, recipe, seed=seed, progress=False)
        found.append(model.eval())
    return Members(found)
