r"""Several networks into one by the mean of their weights; ways from one network to another; means along a run.

========================  =============================================  ===========================================
name                      what it does                                   source
========================  =============================================  ===========================================
``average``               the mean of weights                            –
``interpolate``           a point of the line between two networks       –
``slerp``                 one of the arc between them                    Shoemake 1985, SIGGRAPH
``slerp_by_tensor``       the same, an arc for each tensor
``uniform_soup``          the mean of networks tuned differently         Wortsman et al. 2022, arXiv:2203.05482
``greedy_soup``           the mean of those that improve it              Wortsman et al. 2022
``SWA``                   the mean of a run's weights                    Izmailov et al. 2018, arXiv:1803.05407
``EMA``                   their moving average                           Polyak & Juditsky 1992, SIAM J. Control
                                                                         Optim. 30 (the plain mean)
``following``             the recipe after whose steps these move
``refresh_batch_norm``    statistics that fit the merged weights         Izmailov et al. 2018
========================  =============================================  ===========================================

All but the last two return a new network and leave those that they are given alone. Floating-point buffers (batch
norm's running statistics) are averaged as weights are; those of integers are the first network's. The mean of two
networks' statistics is not the statistics of their mean: ``refresh_batch_norm`` afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split, batches
from course_lib.lab.models import thaw
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Recipe
from course_lib.merging.states import (
    at_least_float32,
    batch_norms,
    check_alike,
    check_share,
    combined,
    flat,
    home,
    parameters_of,
    shares,
    state_of,
    with_state,
)

# --- Means and ways ---------------------------------------------------------------------------------------------------


def average(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    r"""Return the network with the weights :math:`\sum_m \lambda_m\theta_m`, a copy of the first in all else.

    ``weights`` are the :math:`\lambda_m`, equal ones by default. Half-precision numbers are summed in float32.

    Raises
    ------
    ValueError : there are no networks, they are of different shapes, or the weights do not fit or do not sum to 1.
    """
    found = check_alike(models)
    return with_state(found[0], combined([state_of(model) for model in found], shares(len(found), weights)))


def interpolate(a: nn.Module, b: nn.Module, t: float) -> nn.Module:
    r"""Return the network :math:`(1-t)\,\theta_a+t\,\theta_b`; errors as ``average``, and where t is not in [0, 1]."""
    check_share(t=t)
    check_alike([a, b], ["a", "b"])
    return average([a, b], [1 - t, t])


def slerp_vectors(a: Tensor, b: Tensor, t: float) -> Tensor:
    r"""Return the point at ``t`` on the arc from a to b, :math:`\Omega` being the angle between them.

    .. math:: \frac{\sin((1-t)\,\Omega)}{\sin\Omega}\,a+\frac{\sin(t\,\Omega)}{\sin\Omega}\,b

    Of vectors of one length it keeps the length, which their mean loses. Where they point the same way, opposite ways,
    or one is zero, there is no arc, and the way is straight.
    """
    unit_a, unit_b = (v / v.norm().clamp_min(torch.finfo(v.dtype).tiny) for v in (a, b))
    # by both chords: the arc cosine of a number near 1 has lost half its digits
    angle = 2 * torch.atan2((unit_a - unit_b).norm(), (unit_a + unit_b).norm())
    sine = angle.sin()
    if not a.any() or not b.any() or sine < 10 * torch.finfo(a.dtype).eps:
        return (1 - t) * a + t * b
    return ((1 - t) * angle).sin() / sine * a + (t * angle).sin() / sine * b


def slerp(a: nn.Module, b: nn.Module, t: float) -> nn.Module:
    """Return the network at ``t`` on the arc between two, all their parameters taken as one vector.

    Buffers go straight. Errors as ``interpolate``.
    """
    straight = interpolate(a, b, t)
    first, second = parameters_of(a), parameters_of(b)
    wide = at_least_float32(home(a).dtype)
    arc = slerp_vectors(flat(first).to(wide), flat(second).to(flat(first).device, wide), t)
    pieces = arc.split([value.numel() for value in first.values()])
    return with_state(straight, {name: p.view_as(v) for p, (name, v) in zip(pieces, first.items(), strict=True)})


def slerp_by_tensor(a: nn.Module, b: nn.Module, t: float) -> nn.Module:
    """Return the network each of whose parameters lies at ``t`` on an arc of its own. Errors as ``interpolate``."""
    straight = interpolate(a, b, t)
    other = parameters_of(b)
    arcs = {}
    for name, value in parameters_of(a).items():
        wide = at_least_float32(value.dtype)
        arcs[name] = slerp_vectors(value.flatten().to(wide), other[name].flatten().to(value.device, wide), t).view_as(
            value
        )
    return with_state(straight, arcs)


# --- Soups ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Soup:
    """What a greedy soup is: the ``network``, the numbers of its ``ingredients`` as they went in, and its ``score``."""

    network: nn.Module
    ingredients: tuple[int, ...]
    score: float


def uniform_soup(models: Sequence[nn.Module]) -> nn.Module:
    """Return the mean of networks that were tuned from the same start with different settings; see ``average``."""
    return average(models)


def greedy_soup(models: Sequence[nn.Module], score: Callable[[nn.Module], float]) -> Soup:
    """Return the mean of those networks that do not make it worse, tried from the best to the worst.

    ``score`` is what counts, the larger the better: ``lambda model: evaluate(model, data.val).accuracy``. So the soup
    is never worse than the best network, on the data that it was chosen on. Of equal networks the first is tried first.

    Raises
    ------
    ValueError : as ``average``.
    """
    found = check_alike(models)
    alone = [float(score(model)) for model in found]
    order = sorted(range(len(found)), key=lambda place: -alone[place])
    chosen, best = [order[0]], alone[order[0]]
    soup = average([found[order[0]]])
    for place in order[1:]:
        tried = average([found[each] for each in (*chosen, place)])
        if (reached := float(score(tried))) >= best:
            soup, best = tried, reached
            chosen.append(place)
    return Soup(soup, tuple(chosen), best)


# --- Along a run ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def swa_update(average: Sequence[Tensor], weights: Sequence[Tensor], n: int) -> None:
    r"""Move the mean of n in place to that of n + 1.

    .. math:: \bar\theta\leftarrow\bar\theta+\frac{\theta-\bar\theta}{n+1}

    Source: Izmailov et al. 2018, arXiv:1803.05407, algorithm 1.
    """
    torch._foreach_lerp_([*average], [*weights], 1 / (n + 1))


@torch.no_grad()
def ema_update(average: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    r"""Move the average in place, :math:`\beta` being the decay.

    .. math:: \bar\theta\leftarrow\beta\,\bar\theta+(1-\beta)\,\theta
    """
    torch._foreach_lerp_([*average], [*weights], 1 - decay)


class RunningAverage(nn.Module):
    """A network and the average of its weights, which answers in evaluation as soon as there is one: SWA or EMA."""

    n_averaged: Tensor

    def __init__(self, network: nn.Module, use_buffers: bool) -> None:
        super().__init__()
        self.network, self.average = network, copy.deepcopy(network).requires_grad_(False)
        self.use_buffers = use_buffers
        self.register_buffer("n_averaged", torch.tensor(0))
        self.train(network.training)

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to logits ``[N, K]``: the network's in training, the average's in evaluation."""
        return self.network(x) if self.training or not self.n_averaged else self.average(x)

    def move(self, average: list[Tensor], weights: list[Tensor], n: int) -> None:
        """Let the average of ``n`` take in further weights, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self) -> None:
        """Let the average take in the weights as they are now; the first time it becomes them."""
        averaged = state_of(self.network) if self.use_buffers else parameters_of(self.network)
        mine, n = state_of(self.average), int(self.n_averaged)
        if n:
            self.move([mine[name] for name in averaged], [*averaged.values()], n)
        there, now = (parameters_of(each) | dict(each.named_buffers()) for each in (self.average, self.network))
        for name in now if n == 0 else now.keys() - averaged.keys():
            there[name].copy_(now[name])
        self.n_averaged += 1


class SWA(RunningAverage):
    """A network with the plain mean of its weights at the moments of ``update``: torch's ``AveragedModel``.

    ``fit(model, data, following(recipe, model, start=..., every=...))`` trains the network and moves the mean; what
    is left is ``model.average``, after ``refresh_batch_norm`` where there is batch norm. With ``use_buffers`` batch
    norm's statistics are averaged too, and not the newest. The mean belongs to the state: a checkpoint holds it.
    """

    def __init__(self, network: nn.Module, use_buffers: bool = False) -> None:
        super().__init__(network, use_buffers)

    def move(self, average: list[Tensor], weights: list[Tensor], n: int) -> None:
        """Let the mean of ``n`` take in further weights, in place."""
        swa_update(average, weights, n)


class EMA(RunningAverage):
    """A network with the moving average of its weights, otherwise as ``SWA``.

    As in torch the first ``update`` copies. ``Recipe(ema=decay)`` counts the weights before the first step, too: so
    does this after one ``model.update()`` before the run.

    Raises
    ------
    ValueError : ``decay`` is no number from 0 to below 1.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999, use_buffers: bool = False) -> None:
        super().__init__(network, use_buffers)
        require("decay", decay, lambda d: is_number(d) and 0 <= d < 1, "a number from 0 to below 1")
        self.decay = decay

    def move(self, average: list[Tensor], weights: list[Tensor], n: int) -> None:
        """Move the average towards the weights, in place."""
        ema_update(average, weights, self.decay)


def following(recipe: Recipe, model: SWA | EMA, *, start: int = 0, every: int = 1) -> Recipe:
    """Return the recipe, after whose steps ``start + every``, ``start + 2 every``, … the model's average moves.

    Raises
    ------
    ValueError : the model is neither ``SWA`` nor ``EMA``, ``start`` is below 0 or ``every`` below 1.
    """
    if not isinstance(model, RunningAverage):
        raise ValueError(f"model={type(model).__name__}: must be SWA(network) or EMA(network)")
    at_least(0, start=start)
    at_least(1, every=every)

    def follow(optimizer: Optimizer, step: int) -> None:
        if step > start and (step - start) % every == 0:
            model.update()

    return after_each_step(recipe, follow)


# --- Batch norm -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def refresh_batch_norm(model: nn.Module, split: Split, *, batch_size: int = 256) -> nn.Module:
    """Set batch norm's running statistics to those of a split under the weights as they are, in place. Returns it.

    Each layer's are the mean over the batches, all seen in training mode, as torch's ``update_bn`` has it. A network
    without batch norm stays as it is; one that is frozen gets its new statistics, too.

    Raises
    ------
    ValueError : ``batch_size`` is below 1, or the split is empty.
    """
    at_least(1, batch_size=batch_size)
    require("split", split, lambda s: len(s) > 0, "a split with examples")
    if not batch_norms(model):
        return model
    work = thaw(copy.deepcopy(model)).train()  # a copy: whatever fails, the network is as it was
    norms = batch_norms(work)
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    where = home(work)
    for x, _ in batches(split.to(where.device), batch_size, dtype=where.dtype):
        work(x)
    for name, norm in batch_norms(model).items():
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            getattr(norm, buffer).copy_(getattr(norms[name], buffer))
    return model
