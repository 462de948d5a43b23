"""Schedules: when to prune, and from which weights to train on.

====================  =================================================  ==========================================
name                  when                                               source
====================  =================================================  ==========================================
``one_shot``          once; train before, after, or both
``iterative``         a little, train on, and again                      Han et al. 2015, arXiv:1506.02626
``gradual``           during training, in small steps, ever smaller      Zhu & Gupta 2017, arXiv:1710.01878
``lottery_ticket``    after training; then go back to the first weights  Frankle & Carbin 2018, arXiv:1803.03635;
                      or to those of an early epoch (rewinding)          Frankle et al. 2019, arXiv:1912.05671
``rigl``              before training; then move weights to better       Evci et al. 2019, arXiv:1911.11134
                      places, their number staying the same
====================  =================================================  ==========================================

``gradual`` and ``rigl`` take a recipe and give back one whose optimizer also prunes: train with it as with any other.
What belongs beside them: ``geometric_sparsity`` and ``cubic_sparsity`` say how much is pruned when,
``uniform`` and ``erdos_renyi_kernel`` how sparse each layer is, and ``shuffled`` makes the control experiment for any
mask: as many weights in every layer, but elsewhere (Su et al. 2020, arXiv:2009.11094).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least
from course_lib.lab.data import Dataset
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.pruning.criteria import Criterion, magnitude, random_scores
from course_lib.pruning.masks import (
    Masks,
    apply_masks,
    get_masks,
    masked_parts,
    prunable_layers,
    weight_of,
)
from course_lib.pruning.masks import sparsity as sparsity_of
from course_lib.pruning.patterns import Scores, checked_sparsity, global_unstructured, layer_unstructured

Pattern = Callable[[Scores, float], Masks]
"""``(scores, sparsity) -> masks``; give other settings with ``functools.partial``."""

# --- One shot ---------------------------------------------------------------------------------------------------------


def one_shot(
    model: nn.Module,
    data: Any,
    *,
    sparsity: float,
    criterion: Criterion = magnitude,
    pattern: Pattern = global_unstructured,
) -> Masks:
    """Score, choose, prune: ``model`` changes in place. Returns the masks.

    ``sparsity`` counts all weights that the criterion scores, those pruned earlier included; those stay pruned, as
    long as ``sparsity`` is not less than it was and the pattern compares single weights.
    """
    masks = pattern(_keep_pruned(criterion(model, data), get_masks(model)), sparsity)
    apply_masks(model, masks)
    return masks


def _keep_pruned(scores: Scores, masks: Masks) -> Scores:
    """Put the weights that are gone at the end of the ranking, so that they are chosen before all others."""
    return {n: s.masked_fill(~masks[n], -torch.inf) if n in masks else s for n, s in scores.items()}


# --- Iterative --------------------------------------------------------------------------------------------------------


def geometric_sparsity(round: int, *, rounds: int, final: float) -> float:
    r"""Return the sparsity after some rounds that each prune the same fraction of what is left.

    .. math:: s_r = 1 - (1 - s_{final})^{r / R}
    """
    return 1 - (1 - checked_sparsity(final)) ** (round / rounds)


def iterative(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    sparsity: float,
    rounds: int,
    criterion: Criterion = magnitude,
    pattern: Pattern = global_unstructured,
) -> pd.DataFrame:
    """Prune ``model`` in place in ``rounds`` equal fractions, and train it by ``recipe`` after each.

    Criteria that need data get the training split. Each round sees the batches in the same order.

    Returns
    -------
    One row a round: ``sparsity``, and the validation accuracy right after pruning (``pruned``) and after training
    (``trained``).
    """
    at_least(1, rounds=rounds)
    rows = []
    for r in range(1, rounds + 1):
        target = geometric_sparsity(r, rounds=rounds, final=sparsity)
        one_shot(model, data.train, sparsity=target, criterion=criterion, pattern=pattern)
        pruned = evaluate(model, data.val).accuracy
        fit(model, data, recipe, seed=seed)
        trained = evaluate(model, data.val).accuracy
        rows.append({"round": r, "sparsity": sparsity_of(model), "pruned": pruned, "trained": trained})
    return pd.DataFrame(rows).set_index("round")


# --- Gradual ----------------------------------------------------------------------------------------------------------


def cubic_sparsity(step: int, *, begin: int, end: int, final: float, initial: float = 0.0) -> float:
    r"""Return the sparsity at a step: it rises fast while weights are plenty, and slowly when few are left.

    .. math:: s_t = s_f + (s_i - s_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    from step ``begin`` (:math:`t_0`) to ``end`` (:math:`t_1`); constant before and after.
    """
    if not 0 <= begin < end:
        raise ValueError(f"begin={begin}, end={end}: must satisfy 0 <= begin < end")
    progress = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


def gradual(
    model: nn.Module,
    recipe: Recipe,
    *,
    sparsity: float,
    begin: int,
    end: int,
    every: int = 1,
    data: Any = None,
    criterion: Criterion = magnitude,
    pattern: Pattern = global_unstructured,
) -> Recipe:
    """Return a recipe that prunes ``model`` while it trains it: ``fit(model, data, gradual(model, recipe, ...))``.

    Parameters
    ----------
    begin, end : the steps of the optimizer between which the sparsity rises from 0 to ``sparsity``.
    every : prune after each so many steps in between, and after step ``end``.
    data : what the criterion looks at, if it looks at data.
    """
    checked_sparsity(sparsity)
    cubic_sparsity(0, begin=begin, end=end, final=sparsity)
    at_least(1, every=every)
    _start_dense(model, list(criterion(model, data)))

    def prune(optimizer: Optimizer, step: int) -> None:
        if begin <= step <= end and ((step - begin) % every == 0 or step == end):
            target = cubic_sparsity(step, begin=begin, end=end, final=sparsity)
            one_shot(model, data, sparsity=target, criterion=criterion, pattern=pattern)

    return after_each_step(recipe, prune)


def _start_dense(model: nn.Module, layers: list[str]) -> None:
    """Give layers that have no mask one of ones, so that the set of buffers stays the same during training."""
    found = prunable_layers(model, layers)
    dense = {n: torch.ones_like(weight_of(layer), dtype=torch.bool) for n, layer in found.items()}
    apply_masks(model, dense | {name: mask for name, mask in get_masks(model).items() if name in dense})


# --- Lottery tickets --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ticket:
    """What ``lottery_ticket`` found.

    Attributes
    ----------
    start : the network with the weights to which each round went back; not pruned.
    masks : the masks of each round, from round 0 (nothing pruned).
    frame : one row a round: ``sparsity`` and the validation ``accuracy`` of the ticket of that round, trained alone.
    """

    start: nn.Module
    masks: tuple[Masks, ...]
    frame: pd.DataFrame

    def network(self, round: int = -1) -> nn.Module:
        """Return the ticket of a round (default: the last), ready to be trained: first weights, pruned."""
        return apply_masks(copy.deepcopy(self.start), self.masks[round])


def lottery_ticket(
    make_model: Callable[[], nn.Module],
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    rounds: int,
    fraction: float = 0.2,
    rewind_epochs: int = 0,
    pattern: Pattern = global_unstructured,
) -> Ticket:
    """Look for a sparse network that trains as well as the dense one, from the dense one's first weights.

    Train; prune this fraction of the weights left, the smallest; set the others back to what they were at first (or
    after ``rewind_epochs``); repeat. A ticket shows that it won beside two controls: its masks on other first weights,
    ``apply_masks(fresh(make_model, recipe, seed=other), ticket.masks[-1])``, and ``shuffled`` masks on its own.

    Parameters
    ----------
    make_model : makes a new network; its first weights are those of ``seed``, and so are the batches of each round.
    fraction : pruned in each round; after r rounds the sparsity is ``1 - (1 - fraction) ** r``.
    rewind_epochs : go back to the weights after so many epochs; each round trains for the rest of ``recipe.epochs``.
    """
    if not 0 < fraction < 1 or rounds < 1:
        raise ValueError(f"fraction={fraction}, rounds={rounds}: must satisfy 0 < fraction < 1 and rounds >= 1")
    if not 0 <= rewind_epochs < recipe.epochs:
        raise ValueError(f"rewind_epochs={rewind_epochs}: must be at least 0 and less than epochs={recipe.epochs}")
    start = fresh(make_model, recipe, seed=seed)
    if rewind_epochs:
        fit(start, data, replace(recipe, epochs=rewind_epochs), seed=seed)
    _start_dense(start, list(prunable_layers(start)))
    model, masks, rows = copy.deepcopy(start), [get_masks(start)], []
    for r in range(rounds + 1):
        fit(model, data, replace(recipe, epochs=recipe.epochs - rewind_epochs), seed=seed)
        rows.append({"round": r, "sparsity": sparsity_of(model), "accuracy": evaluate(model, data.val).accuracy})
        if r < rounds:
            scores = _keep_pruned(magnitude(model), masks[-1])
            masks.append(pattern(scores, 1 - (1 - fraction) ** (r + 1)))
            model = apply_masks(copy.deepcopy(start), masks[-1])
    return Ticket(start, tuple(masks), pd.DataFrame(rows).set_index("round"))


def shuffled(masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Return masks that keep as many weights in every layer, at places drawn by chance."""

    def shuffle(mask: Tensor) -> Tensor:
        order = torch.randperm(mask.numel(), generator=generator, device=generator.device).to(mask.device)
        return mask.flatten()[order].view(mask.shape)

    return {name: shuffle(mask) for name, mask in masks.items()}


# --- Dynamic sparse training ------------------------------------------------------------------------------------------


def uniform(model: nn.Module, sparsity: float) -> dict[str, float]:
    """Return the same sparsity for every layer, by name."""
    return dict.fromkeys(prunable_layers(model), checked_sparsity(sparsity))


def erdos_renyi_kernel(model: nn.Module, sparsity: float) -> dict[str, float]:
    r"""Return a sparsity for every layer, by name: large layers are sparser, and all together are as sparse as said.

    A layer's density is in proportion to the sum of its weight's dimensions over their product, for a convolution
    :math:`(n_{in} + n_{out} + h + w) / (n_{in} n_{out} h w)`; layers for which that would be more than 1 stay dense.
    Source: Evci et al. 2019, arXiv:1911.11134, after Mocanu et al. 2018, Nature
    Communications 9.
    """
    shapes = {name: tuple(weight_of(layer).shape) for name, layer in prunable_layers(model).items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    share = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    to_keep = (1 - checked_sparsity(sparsity)) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        others = [name for name in shapes if name not in dense]
        left = to_keep - sum(sizes[name] for name in dense)
        scale = left / sum(share[name] * sizes[name] for name in others) if others else 0.0
        too_many = {name for name in others if scale * share[name] > 1}
        if not too_many:
            return {name: 0.0 if name in dense else 1 - scale * share[name] for name in shapes}
        dense.add(max(too_many, key=lambda name: share[name]))


def drop_fraction(step: int, *, end: int, initial: float) -> float:
    r"""Return the fraction of a layer's weights that move at a step, :math:`\frac{\alpha}{2}(1 + \cos(\pi t / T))`."""
    return initial / 2 * (1 + math.cos(math.pi * min(step / end, 1.0)))


def drop_and_grow(weight: Tensor, gradient: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Return the next mask of a layer: without this fraction of its weights, the smallest, but with as many others.

    Those that grow have the largest gradients of all that are not kept (one that was dropped just now may be among
    them). All tensors have the weight's shape.
    """
    count = int(mask.sum())
    moving = min(int(fraction * count), mask.numel() - count)
    largest = weight.abs().masked_fill(~mask, -1).flatten().topk(count - moving).indices
    kept = torch.zeros_like(mask).flatten().index_fill(0, largest, True)
    grown = gradient.abs().flatten().masked_fill(kept, -1).topk(moving).indices
    return kept.index_fill(0, grown, True).view(mask.shape)


def rigl(
    model: nn.Module,
    recipe: Recipe,
    *,
    sparsity: float | Mapping[str, float],
    every: int,
    end: int,
    generator: torch.Generator,
    fraction: float = 0.3,
) -> Recipe:
    """Prune ``model`` at random, and return a recipe that lets it look for better places while it trains.

    After each ``every`` steps, before step ``end``, each layer drops its smallest weights and grows as many where the
    gradient is largest (``drop_and_grow``); those start at zero. The number of weights never changes.

    Parameters
    ----------
    sparsity : for each layer by name (``uniform``, ``erdos_renyi_kernel``); a number stands for the latter's.
    every, end : steps; the paper takes 100, and three quarters of all.
    fraction : of the weights that move at first; it falls to zero at ``end`` (``drop_fraction``).
    """
    at_least(1, every=every, end=end)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r}: must be more than 0 and at most 1")
    each = sparsity if isinstance(sparsity, Mapping) else erdos_renyi_kernel(model, sparsity)
    apply_masks(model, layer_unstructured(random_scores(model, generator=generator, layers=each), each))
    parts = {name: masked_parts(layer) for name, layer in prunable_layers(model, each).items()}

    def listen(step: int) -> None:
        for _, part in parts.values():
            part.gradient, part.keep_gradient = None, step < end and step % every == 0

    def move(optimizer: Optimizer, step: int) -> None:
        if step < end and step % every == 0:
            moving = drop_fraction(step, end=end, initial=fraction)
            for name, (weight, part) in parts.items():
                if part.gradient is not None:
                    _replace_mask(optimizer, model, name, drop_and_grow(weight, part.gradient, part.mask, moving))
        listen(step + 1)  # the backward pass of the step before the next move is of use, no other

    listen(every)  # a run that goes on from a checkpoint may begin with a step that moves
    return after_each_step(recipe, move)


def _replace_mask(optimizer: Optimizer, model: nn.Module, name: str, mask: Tensor) -> None:
    """Put a new mask in force; weights that are new start at zero and without momentum."""
    weight, part = masked_parts(model.get_submodule(name))
    new = mask & ~part.mask
    apply_masks(model, {name: mask})
    for state in optimizer.state[weight].values():
        if isinstance(state, Tensor) and state.shape == weight.shape:
            state[new] = 0
