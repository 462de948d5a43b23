r"""Back through many layers with room for few: each kept input is used again and again, by the best schedule there is.

================  ==================================================================  ==============================
name              what it gives                                                       source
================  ==================================================================  ==============================
``extra_steps``   the fewest steps to compute again, in closed form                   Griewank & Walther 2000
                                                                                      ("Revolve"), ACM TOMS 26(1)
``least_steps``   the same, by trying where the next snapshot is best                 the recursion that it solves
``revolve``       the schedule that takes so many: advance, keep, restore, reverse    Griewank & Walther 2000
``revolved``      a network that is trained by that schedule                          the same
================  ==================================================================  ==============================

Checkpointing in segments recomputes each layer once and holds :math:`2\sqrt n` activations. With s snapshots and r runs
of a layer at most, :math:`\binom{s + r}{s}` layers can be gone through: memory and time both grow with the logarithm of
the depth. Here a *step* is a layer, and beside the snapshots what one layer keeps for backward is held, never more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from course_lib.efficiency.checkpointing import Chained, Circumstances, gradients, statistics_left_alone
from course_lib.lab.arguments import at_least

# --- How few ----------------------------------------------------------------------------------------------------------


def extra_steps(steps: int, snapshots: int) -> int:
    r"""Return the fewest steps that have to be computed again to go back through
    ``steps`` with room for so many snapshots.

    .. math:: r\,n - \binom{s + r}{s + 1}, \qquad
        \binom{s + r - 1}{s} < n \le \binom{s + r}{s}

    for n steps and s snapshots, the input among them; r is how often a step is run
    forward at most before the run that backward uses.

    Source: Griewank & Walther 2000, ACM TOMS 26(1).
    """
    at_least(1, steps=steps, snapshots=snapshots)
    repeats = 0
    while math.comb(snapshots + repeats, snapshots) < steps:
        repeats += 1
    return repeats * steps - math.comb(snapshots + repeats, snapshots + 1)


def least_steps(steps: int, snapshots: int) -> int:
    r"""Return what ``extra_steps`` does, by dynamic programming.

    .. math:: E(n, s) = \min_{0 < m < n} \big( m + E(n - m, s - 1) + E(m, s) \big)

    the first m steps are run, the state behind them is kept, the rest is gone back
    through with the snapshots that are left, then those m with all of them.
    :math:`E(1, s) = 0`, and :math:`E(n, 1) = n (n - 1) / 2`: each time from the input.
    """
    at_least(1, steps=steps, snapshots=snapshots)
    return _least(steps, snapshots)


@cache
def _least(n: int, s: int) -> int:
    if s == 1 or n == 1:
        return n * (n - 1) // 2
    return min(m + _least(n - m, s - 1) + _least(m, s) for m in range(1, n))


# --- The schedule -----------------------------------------------------------------------------------------------------


class Action(NamedTuple):
    """One action of a schedule: run layers ``layer`` … ``to - 1`` without a graph ("advance"); keep the input of a
    layer ("keep") or go back to the one that was kept ("restore"), for the last time ("take"); run a layer with a graph
    and go back through it ("reverse").
    """

    do: Literal["advance", "keep", "restore", "take", "reverse"]
    layer: int
    to: int = 0


def revolve(steps: int, snapshots: int) -> list[Action]:
    """Return the schedule that goes back through ``steps`` layers with as few
    recomputed as ``snapshots`` allow.

    The input of the first layer takes one of the snapshots. ``extra_steps`` is how many
    layers "advance" runs in all: beyond the one run of each that has a graph.
    """
    at_least(1, steps=steps, snapshots=snapshots)
    return [Action("keep", 0), *_back_through(0, steps, snapshots)]


def _back_through(first: int, end: int, snapshots: int) -> Iterator[Action]:
    """Reverse layers ``first`` … ``end - 1``; the input of the first is kept, and is
    the state. So many snapshots, that one among them.
    """
    if end - first == 1:
        yield Action("take", first)
        yield Action("reverse", first)
        return
    middle = first + _advance(end - first, snapshots)
    yield Action("advance", first, middle)
    if snapshots > 1:
        yield Action("keep", middle)
        yield from _back_through(middle, end, snapshots - 1)
    else:  # no room: the last layer alone, then again from the first
        yield Action("reverse", middle)
    yield Action("restore", first)
    yield from _back_through(first, middle, snapshots)


def _advance(steps: int, snapshots: int) -> int:
    """Where the next snapshot is best: so many steps ahead."""
    if snapshots == 1:
        return steps - 1

    def cost(ahead: int) -> int:
        behind = extra_steps(steps - ahead, snapshots - 1)
        return ahead + behind + extra_steps(ahead, snapshots)

    return min(range(1, steps), key=cost)


# --- Followed ---------------------------------------------------------------------------------------------------------


def revolved(model: nn.Module, snapshots: int) -> Chained:
    """Return a network that is trained by the schedule ``revolve``: the same gradients, with so many inputs kept.

    For each layer its random state is kept too, 5 kB. Layers must not write into their inputs.

    Parameters
    ----------
    model : an ``nn.Sequential`` or a network of the laboratory; residual and encoder blocks are one step each.
    snapshots : how many inputs are kept at most, that of the first layer among them.

    Raises
    ------
    ValueError : there is no room for a snapshot, or the network is no chain.
    """
    at_least(1, snapshots=snapshots)
    return Chained(model, partial(_follow, snapshots=snapshots))


def _follow(layers: list[nn.Module], x: Tensor, *, snapshots: int) -> Tensor:
    chained = nn.Sequential(*layers)
    return _Revolved.apply(layers, snapshots, x, *chained.parameters()) if torch.is_grad_enabled() else chained(x)


class _Revolved(torch.autograd.Function):
    """Forward follows the schedule to its first "reverse", backward follows the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        layers: list[nn.Module],
        snapshots: int,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.weights = weights
        ctx.way = Way(layers, x, revolve(len(layers), snapshots))
        ctx.last = ctx.way.to_next_reverse()
        assert ctx.last is not None
        return ctx.last[-1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums: dict[Tensor, Tensor] = {}
        reversed_, ctx.last = ctx.last, None
        if reversed_ is None:
            raise RuntimeError("revolved has gone back already: its graph serves one backward pass; run forward again")
        while reversed_:
            layer, x, y = reversed_
            weights = list(layer.parameters())
            grad, *found = gradients(y, (x, *weights), grad)  # type: ignore[assignment]
            for weight, own in zip(weights, found, strict=True):
                if own is not None:
                    sums[weight] = sums[weight] + own if weight in sums else own
            del reversed_, x, y  # their graph goes before the next is built
            reversed_ = ctx.way.to_next_reverse()
        return None, None, grad, *(sums.get(weight) for weight in ctx.weights)


class Way:
    """How far a schedule has been followed.

    Attributes
    ----------
    kept : the snapshots, by the layer whose input they are.
    runs : how often each layer has run so far.
    """

    def __init__(self, layers: Sequence[nn.Module], x: Tensor, schedule: Sequence[Action]) -> None:
        self.layers, self.left, self.state = layers, iter(schedule), x.detach()
        self.kept: dict[int, Tensor] = {}
        self.runs = [0] * len(layers)
        self._first: list[Circumstances] = []  # of each layer's first run
        self._wants_x = x.requires_grad

    def to_next_reverse(self) -> tuple[nn.Module, Tensor, Tensor] | None:
        """Act until a layer has run with a graph; return it, its input and its output,
        or None at the end.
        """
        for do, layer, to in self.left:
            match do:
                case "keep":
                    self.kept[layer] = self.state
                case "restore":
                    self.state = self.kept[layer]
                case "take":
                    self.state = self.kept.pop(layer)
                case "advance":
                    for number in range(layer, to):
                        self.state = self._run(number, self.state, graph=False)
                case "reverse":
                    wanted = layer > 0 or self._wants_x
                    x = self.state.detach().requires_grad_(wanted)
                    del self.state
                    return self.layers[layer], x, self._run(layer, x, graph=True)
        return None

    def _run(self, number: int, x: Tensor, *, graph: bool) -> Tensor:
        """The first time as ever; then with the random state of that time, and
        statistics left alone.
        """
        layer, again = self.layers[number], self.runs[number] > 0
        self.runs[number] += 1
        if not again:
            self._first.append(Circumstances.of(x))
        as_then = self._first[number].again() if again else nullcontext()
        alone = statistics_left_alone(layer) if again else nullcontext()
        with as_then, alone, torch.set_grad_enabled(graph):
            return layer(x)
