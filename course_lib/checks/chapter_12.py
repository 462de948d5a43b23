"""Checks of chapter 12, merging: four methods to write, a figure to read, a bug to find, a merge to design.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from course_lib.checks.designs import normal
from course_lib.lab.data import Dataset, Split, load
from course_lib.lab.experiments import one_thread
from course_lib.lab.judging import Case, Design, Method, Mistake, OpenProject, Reading, Rule, Wrong, call, expect_close
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh

State = dict[str, Tensor]


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Exercise 1: the mean of several networks


def _mean_of(
    states: Sequence[State], shares: Sequence[float], *,
    counts: Callable[[Sequence[float]], Sequence[float]] = list,
    value: Callable[[State, str, State], Tensor] = lambda state, name, first: state[name],
) -> State:  # fmt: skip
    """For each name the sum over the states of ``value(state, name, first state)``, each times its ``counts``."""
    weights = list(zip(counts(shares), states, strict=True))
    return {name: sum((c * value(s, name, states[0]) for c, s in weights), 0 * states[0][name]) for name in states[0]}


def _by_place(state: State, name: str, first: State) -> Tensor:
    return list(state.values())[list(first).index(name)]


def _named(rule: Rule, states: Sequence[State], shares: Sequence[float]) -> tuple[Any, ...]:
    """The tensors that a rule gives, in the order of their names."""
    names = sorted(states[0])
    found = rule(states, shares)
    if not isinstance(found, Mapping):
        raise Wrong(f"expected a dict of names and tensors, and this is of type {type(found).__name__}", _ONE_BY_ONE)
    if set(found) != set(names):
        raise Wrong("the mean does not have the names that the states have",
                    "Each state has the same names: take them.")  # fmt: skip
    return tuple(found[name] for name in names)


def _name_by_name(found: Sequence[Any], right: Sequence[Tensor], states: Sequence[State], *case: Any) -> None:
    for name, new, wanted in zip(sorted(states[0]), found, right, strict=True):
        expect_close(new, wanted, what=f"the mean of {name!r}", hint=[*_ALL_OF_THEM, *_TOTAL])


def _layer(seed: int, dtype: torch.dtype = torch.float64) -> State:
    shapes: dict[str, tuple[int, ...]] = {"weight": (3, 4), "bias": (3,), "scale": ()}
    return {name: normal(seed + k, *shape).to(dtype) for k, (name, shape) in enumerate(shapes.items())}


def _two_norms() -> list[State]:
    """The same names in another order, and shapes that would let this pass."""
    first, second = ({name: normal(seed + k, 5) for k, name in enumerate(("weight", "bias"))} for seed in (1211, 1221))
    return [first, {name: second[name] for name in ("bias", "weight")}]


_ONE_BY_ONE = "One tensor for each name: {name: … for name in states[0]}."
_TOTAL = ["Let all states be alike. What is their mean, and what is yours?", "The shares add up to 1 already."]
_ALL_OF_THEM = ["Print which states and which shares your loop sees, and what each adds.", _ONE_BY_ONE]
_WHOSE = "Let one share be 1 and the others 0. Whose weights should come out?"

exercise_1 = Method(
    "The mean of several networks",
    right=_mean_of,
    ask=_named,
    explain=_name_by_name,
    hint=_ALL_OF_THEM,
    unchanged=["Whose tensor does your sum start with? merged = states[0] is no copy, and dict(states[0]) has the same "
               "tensors.", "total += … changes the tensor; total = total + … makes a new one."],
    cases={
        "three states": ([_layer(1201), _layer(1204), _layer(1207)], [0.2, 0.3, 0.5]),
        "two states whose names stand in another order": (_two_norms(), [0.7, 0.3]),
        "four states, of which one has a share of 0": ([_layer(1230 + 3 * k) for k in range(4)], [0.4, 0.0, 0.5, 0.1]),
        "two states in float32": ([_layer(1251, torch.float32), _layer(1254, torch.float32)], [0.25, 0.75]),
        "a single state": ([_layer(1257)], [1.0]),
    },
    mistakes=[
        Mistake(partial(_mean_of, counts=lambda shares: [1 / len(shares)] * len(shares)),
                "this is the plain mean: the shares make no difference", _WHOSE),
        Mistake(partial(_mean_of, counts=lambda shares: [1.0] * len(shares)),
                "this is the sum: the shares make no difference", _TOTAL),
        Mistake(partial(_mean_of, counts=lambda shares: [share / len(shares) for share in shares]),
                "the mean is divided by the number of states once more", _TOTAL),
        Mistake(partial(_mean_of, counts=lambda shares: [1.0, *shares[1:]]),
                "the first state counts in full, whatever its share", [_WHOSE, *_TOTAL]),
        Mistake(partial(_mean_of, counts=lambda shares: [*shares[:-1], 0.0]), "the last state is left out",
                _ALL_OF_THEM),
        Mistake(partial(_mean_of, counts=lambda shares: [0.0] * (len(shares) - 1) + [shares[-1]]),
                "only the last state is there: each takes the place of the one before", _ALL_OF_THEM),
        Mistake(partial(_mean_of, counts=lambda shares: shares[::-1]),
                "the shares are given out from the other end", _WHOSE),
        # Right as long as all have their names in one order
        Mistake(partial(_mean_of, value=_by_place),
                "tensors are paired by their place in the dict: a weight is averaged with a bias",
                "A tensor belongs to its name. Which order the names have is another matter."),
    ],
)  # fmt: skip


# Exercise 2: one more state in the mean


def _swa_next(
    mean: Tensor, weights: Tensor, n: int, *, share: Callable[[int], float] = lambda n: 1 / (n + 1)
) -> Tensor:
    """The mean moved towards the weights by a ``share`` of the way."""
    return mean + share(n) * (weights - mean)


_COUNT = [
    "Take a mean of 4 over n = 3 states, and a fourth of 8. What is the mean of all four?",
    "n states add up to n times their mean. Add the new one: how many are there now?",
]
_EQUAL = "Each of the n + 1 states should count alike. How much does the newest count, at n = 1 and at n = 100?"

exercise_2 = Method(
    "One more state in the mean",
    right=_swa_next,
    what="the new mean",
    hint=_COUNT,
    unchanged="mean += … and mean.lerp_(…) change the caller's mean; mean + … makes a new one.",
    cases={
        "a matrix, n = 3": (normal(1261, 3, 4), normal(1262, 3, 4), 3),
        "a vector, n = 1": (normal(1263, 5), normal(1264, 5), 1),
        "a vector, n = 50": (normal(1265, 6), normal(1266, 6), 50),
        "float32, n = 2": (normal(1267, 2, 2).float(), normal(1268, 2, 2).float(), 2),
        "the first state, n = 0": (torch.zeros(4, dtype=torch.float64), normal(1269, 4), 0),
    },
    mistakes=[
        Mistake(partial(_swa_next, share=lambda n: 1 / n),
                "the new state counts 1/n: n is taken as if it counted the new one already", _COUNT),
        Mistake(partial(_swa_next, share=lambda n: -1 / (n + 1)),
                "the mean moves away from the new state: the sign is wrong",
                "If the new weight is larger than the mean, should the mean rise or fall?"),
        Mistake(partial(_swa_next, share=lambda n: n / (n + 1)),
                "the two are exchanged: the new state counts n times, the mean of n states once", _EQUAL),
        Mistake(partial(_swa_next, share=lambda n: 0.5),
                "old mean and new state count alike: after ten states the first has a share of 1/512",
                [_EQUAL, *_COUNT]),
        *[Mistake(partial(_swa_next, share=lambda n, decay=decay: 1 - decay),  # type: ignore[misc]
                  f"this is an EMA with a decay of {decay}: the newest has a fixed share, and the oldest fade", _EQUAL)
          for decay in (0.9, 0.99, 0.999)],
        Mistake(lambda mean, weights, n: mean + weights / (n + 1),
                "the new state is added and nothing is taken away: the mean grows without end",
                "Let mean and weights be alike. What should come out?"),
        Mistake(lambda mean, weights, n: (mean + weights) / (n + 1),
                "the mean is counted as one state, and it stands for n", _COUNT),
        Mistake(lambda mean, weights, n: weights.clone(), "this is the newest state alone", _EQUAL),
    ],
)  # fmt: skip


# Exercise 3: the barrier


def _times(losses: Tensor) -> Tensor:
    return torch.linspace(0, 1, len(losses), dtype=losses.dtype)


def _straight(losses: Tensor, t: Callable[[Tensor], Tensor] = _times) -> Tensor:
    """The line between the ends."""
    return (1 - t(losses)) * losses[0] + t(losses) * losses[-1]


def _barrier_of(
    losses: Tensor, *,
    ground: Callable[[Tensor], Tensor] = _straight,
    pick: Callable[[Tensor, Tensor], Tensor] = lambda rise, losses: rise.max(),
) -> Tensor:  # fmt: skip
    """What is picked of how far the losses rise above the ``ground``."""
    return pick(losses - ground(losses), losses)


def _both_ways(rule: Rule, losses: Tensor) -> tuple[Any, Any]:
    """The barrier from a to b and that from b to a: which end is the worse one tells some mistakes from others."""
    return rule(losses), rule(losses.flip(0))


def _one_step_short(losses: Tensor) -> Tensor:
    return torch.arange(len(losses), dtype=losses.dtype) / len(losses)


_LINE = [
    "Take the losses 0, 1, 2: they lie on the straight line between the ends. How high is the barrier?",
    "What is the line's height at each t? At t = 0 it is the first loss, at t = 1 the last.",
]
_ANYWHERE = "The rise is largest somewhere: at any t, and not always where the loss is largest."
_DIP = "Take the losses 3, 1, 3: nothing rises above the line. How high is the barrier?"

exercise_3 = Method(
    "The barrier",
    right=_barrier_of,
    ask=_both_ways,
    what=("the barrier", "the barrier of the way back"),
    hint=[*_LINE, _ANYWHERE, _DIP],
    cases={
        "seven points, ends of different height": (_numbers(1.5, 1.75, 1.6, 1.2, 0.1, 0.6, 0.3),),
        "six points": (_numbers(0.4, 2.2, 2.3, 1.9, 2.4, 2.1),),
        "a dip deeper than the rise": (_numbers(1.0, 0.2, 0.4, 1.3, 1.2),),
        "nothing above the line": (_numbers(0.5, 0.55, 0.6, 0.8, 1.4),),
        "losses on a straight line": (_numbers(0.25, 0.5, 0.75, 1.0),),
        "float32": (_numbers(0.2, 1.0, 0.6, 0.4).float(),),
        "both ends alone": (_numbers(0.7, 0.2),),
    },
    mistakes=[
        Mistake(partial(_barrier_of, ground=lambda losses: (losses[0] + losses[-1]) / 2),
                "this is the rise above the mean of both ends: with ends of different height even a straight line has "
                "one", _LINE),
        Mistake(partial(_barrier_of, ground=lambda losses: torch.maximum(losses[0], losses[-1])),
                "this is the rise above the worse end",
                ["Take the losses 0, 1.5, 2: in the middle the straight line is at 1. How high is the barrier?",
                 _LINE[1]]),
        Mistake(partial(_barrier_of, ground=lambda losses: torch.minimum(losses[0], losses[-1])),
                "this is the rise above the better end", _LINE),
        Mistake(partial(_barrier_of, ground=lambda losses: losses[0]), "this is the rise above the first end", _LINE),
        Mistake(partial(_barrier_of, ground=lambda losses: losses.min()), "this is the rise above the lowest loss",
                _LINE),
        Mistake(partial(_barrier_of, ground=torch.zeros_like), "this is the largest loss, not a rise", _LINE),
        Mistake(partial(_barrier_of, ground=partial(_straight, t=lambda losses: 1 - _times(losses))),
                "your line is the wrong way round: at t = 0 it has the height of the last loss", _LINE),
        Mistake(partial(_barrier_of, ground=partial(_straight, t=_one_step_short)),
                "your t goes in steps of 1/P and never reaches 1", "P points have P - 1 steps between them."),
        Mistake(partial(_barrier_of, pick=lambda rise, losses: rise[len(rise) // 2]),
                "this is the rise in the middle alone", _ANYWHERE),
        Mistake(partial(_barrier_of, pick=lambda rise, losses: rise[losses.argmax()]),
                "this is the rise where the loss is largest: on a slope that is another place", _ANYWHERE),
        Mistake(partial(_barrier_of, pick=lambda rise, losses: rise.mean()), "this is the mean rise",
                "The barrier is the highest point of the way."),
        Mistake(partial(_barrier_of, pick=lambda rise, losses: _times(losses)[rise.argmax()]),
                "this says where the barrier is, not how high", "argmax gives a place, max a height."),
        # Right as long as there is a barrier, and no deeper dip
        Mistake(partial(_barrier_of, pick=lambda rise, losses: rise.abs().max()),
                "a dip below the line is taken for a barrier", _DIP),
        Mistake(partial(_barrier_of, pick=lambda rise, losses: rise[1:-1].max()),
                "the barrier is negative where nothing rises above the line", [_DIP, "The ends belong to the way."]),
    ],
)  # fmt: skip


# Four panels: the loss along the line between two networks, as trained, aligned, and with batch norm refreshed too.
# Ada's three ways lie on each other and have no barrier. Ben's has one, which alignment halves, and only the batch
# norm's statistics take the rest. Cleo's ends differ by 1.0; as trained there is a barrier, and aligned the loss sags
# below the straight line. Dan's ends differ by 1.2; aligned, the loss never exceeds the worse end and still bulges by
# 0.28 above the line, with fresh statistics too. So reason a holds for Ben, Cleo and Dan, b for Ada, Cleo and Dan, d
# for Ada, Ben and Cleo, and c for Cleo alone.
exercise_4 = Reading(
    "Kept apart by order alone? A figure to read",
    right=("Cleo", "c"),
    choices={
        "Ada": "Ada's two were never apart: as trained there is no barrier between them, and nothing to align",
        "Ben": "Ben's barrier is halved by the order; the rest goes only with batch norm's statistics",
        "Cleo": "",
        "Dan": "Dan's aligned way is nowhere worse than his worse network, but in the middle it lies well above the "
        "straight line between the two: there is still a barrier",
    },
    reasons={
        "a": "that holds for Ben and Dan too: that they are apart does not say what keeps them so",
        "b": "that holds for Dan too, and it is no measure of a barrier: between ends of different height the loss can "
        "bulge and stay below the worse one",
        "c": "",
        "d": "that holds for Ben too, whose networks lacked more than an order",
    },
    hint=["Draw the straight line between both ends into each panel. Which of the three ways rise above it?",
          "The order alone: what alignment mends, and all of what was to be mended."],
    reason_hint="Try each reason on the three other panels. Which of them is true of none?",
)  # fmt: skip


# Exercise 5: hidden units in another order


def _permuted(
    W1: Tensor, b1: Tensor, W2: Tensor, order: Tensor, *,
    rows: Callable[[Tensor, Tensor], Tensor] = lambda W, order: W[order],
    biases: Callable[[Tensor, Tensor], Tensor] = lambda b, order: b[order],
    columns: Callable[[Tensor, Tensor], Tensor] = lambda W, order: W[:, order],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A two-layer network with new ``rows`` of W1, ``biases``, and ``columns`` of W2."""
    return rows(W1, order), biases(b1, order), columns(W2, order)


def _as_it_was(values: Tensor, order: Tensor) -> Tensor:
    return values.clone()


def _back(W1: Tensor, b1: Tensor, W2: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _permuted(W1, b1, W2, order.argsort())


def _two_layers(seed: int, inputs: int, hidden: int, outputs: int, *order: int) -> Case:
    W1, b1, W2 = normal(seed, hidden, inputs), normal(seed + 1, hidden), normal(seed + 2, outputs, hidden)
    return W1, b1, W2, torch.tensor(order)


_FOLLOW = [
    "Follow one unit: new unit 0 is old unit order[0]. Where are its incoming weights, its bias, its outgoing ones?",
    "Put an input through both networks, in an order such as 1, 2, 0: the outputs should be the same.",
]
_OWN_INVERSE = "Swapping two units is its own way back: try 1, 2, 0. What is its argsort?"

exercise_5 = Method(
    "Find the bug: hidden units in another order",
    right=_permuted,
    what=("the new W1", "the new b1", "the new W2"),
    hint=[*_FOLLOW, _OWN_INVERSE],
    unchanged="W1[:] = … writes into the caller's weights; W1[order] is a new tensor.",
    cases={
        "five inputs, units and outputs": _two_layers(1271, 5, 5, 5, 2, 0, 3, 1, 4),
        "six units in a ring": _two_layers(1274, 3, 6, 2, 1, 2, 3, 4, 5, 0),
        "two units exchanged": _two_layers(1277, 4, 4, 3, 0, 3, 2, 1),
        "units in the order that they have": _two_layers(1280, 2, 3, 1, 0, 1, 2),
        "a single unit": _two_layers(1283, 2, 1, 2, 0),
    },
    mistakes=[
        Mistake(partial(_permuted, columns=lambda W, order: W[:, order.argsort()]),
                "the columns of W2 are put in the inverse order: each output listens to the wrong units",
                [*_FOLLOW, _OWN_INVERSE]),
        Mistake(_back, "all three are put in the inverse order: the network computes the same, but its unit i is not "
                "unit order[i] of the old one", [_FOLLOW[0], _OWN_INVERSE]),
        Mistake(partial(_permuted, biases=lambda b, order: b[order.argsort()]),
                "the biases are put in the inverse order", [_FOLLOW[0], _OWN_INVERSE]),
        Mistake(partial(_permuted, biases=_as_it_was), "the biases stay where they were", _FOLLOW),
        Mistake(partial(_permuted, columns=_as_it_was), "W2 stays as it was: the outputs listen to the wrong units",
                _FOLLOW),
        Mistake(partial(_permuted, rows=_as_it_was), "W1 stays as it was", _FOLLOW),
        Mistake(partial(_permuted, columns=lambda W, order: W[order]),
                "the rows of W2 are moved: those are the outputs", ["W2 is [outputs, hidden].", *_FOLLOW]),
        Mistake(partial(_permuted, rows=lambda W, order: W[:, order]),
                "the columns of W1 are moved: those are the inputs", ["W1 is [hidden, inputs].", *_FOLLOW]),
        Mistake(partial(_permuted, rows=_as_it_was, biases=_as_it_was, columns=_as_it_was), "nothing is moved",
                _FOLLOW),
    ],
)  # fmt: skip


# Exercise 6: TIES


def _largest(sizes: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of each row: [T, n] -> bool [T, n]."""
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, sizes.topk(count, 1).indices, True)


def _of_all_rows(sizes: Tensor, count: int) -> Tensor:
    return _largest(sizes.reshape(1, -1), count * len(sizes)).view_as(sizes)


def _sum_of_signs(trimmed: Tensor, vectors: Tensor) -> Tensor:
    return trimmed.sign().sum(0).sign()


def _sign_of_the_largest(trimmed: Tensor, vectors: Tensor) -> Tensor:
    return trimmed.gather(0, trimmed.abs().argmax(0, keepdim=True))[0].sign()


def _those_that_agree(trimmed: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the entries with the elected sign, and their number: two [n]."""
    agree = (trimmed.sign() == signs) & (trimmed != 0)
    return torch.where(agree, trimmed, 0).sum(0), agree.sum(0)


def _disjoint_mean(trimmed: Tensor, signs: Tensor) -> Tensor:
    total, count = _those_that_agree(trimmed, signs)
    return total / count.clamp_min(1)


def _unelected(trimmed: Tensor, signs: Tensor) -> Tensor:
    return trimmed.sum(0) / (trimmed != 0).sum(0).clamp_min(1)


def _over_all_that_are_left(trimmed: Tensor, signs: Tensor) -> Tensor:
    return _those_that_agree(trimmed, signs)[0] / (trimmed != 0).sum(0).clamp_min(1)


def _no_guard(trimmed: Tensor, signs: Tensor) -> Tensor:
    total, count = _those_that_agree(trimmed, signs)
    return total / count


def _ties_of(
    vectors: Tensor, keep: float, *,
    count: Callable[[float, int], int] = lambda keep, n: max(1, round(keep * n)),
    size: Callable[[Tensor], Tensor] = torch.abs,
    stay: Callable[[Tensor, int], Tensor] = _largest,
    elect: Callable[[Tensor, Tensor], Tensor] = lambda trimmed, vectors: trimmed.sum(0).sign(),
    merge: Callable[[Tensor, Tensor], Tensor] = _disjoint_mean,
) -> Tensor:  # fmt: skip
    """``merge(trimmed, elect(trimmed, vectors))``, trimmed to the ``count(keep, n)`` that ``stay``: [T, n] -> [n]."""
    trimmed = torch.where(stay(size(vectors), count(keep, vectors.shape[1])), vectors, 0)
    return merge(trimmed, elect(trimmed, vectors))


_TRIM = [
    "Print how many entries of each row are left. It should be round(keep · n), of the largest size.",
    "Each task keeps its own largest entries: those of a row, without their signs.",
]
_ELECT = [
    "Take the entries 5, -1, -1 of one weight. Which sign weighs more, and what is yours?",
    "The sign is that of the sum over the tasks, after trimming.",
]
_DISJOINT = [
    "Take 4, 2, 0 and -1 of one weight, after trimming: plus is elected. The mean of which of them is wanted?",
    "Only those count that have the elected sign: in the sum, and in what it is divided by.",
]
_NOBODY = "Where no task kept the weight there is nothing to take a mean of, and the weight should stay: 0."

exercise_6 = Method(
    "TIES: trim, elect, merge",
    right=_ties_of,
    what="the merged vector",
    hint=["Take keep = 1 first: then there is nothing to trim.", *_ELECT, *_DISJOINT, *_TRIM],
    unchanged="vectors[…] = 0 writes into the caller's vectors; torch.where makes a new tensor.",
    cases={
        "4 tasks of 10 weights, keep = 0.36": (normal(1291, 4, 10), 0.36),
        "5 tasks of 12 weights, keep = 0.5": (normal(1292, 5, 12) * _numbers(1, 3, 0.5, 1, 2)[:, None], 0.5),
        "3 tasks of 6 weights, keep = 1": (normal(1293, 3, 6), 1.0),
        "6 tasks of 30 weights, keep = 0.2": (normal(1294, 6, 30), 0.2),
        "a single task, keep = 0.4": (normal(1295, 1, 10), 0.4),
        "2 tasks in float32": (normal(1296, 2, 9).float(), 0.7),
        "3 tasks of 10 weights, keep = 0.02": (normal(1297, 3, 10), 0.02),
    },
    mistakes=[
        Mistake(partial(_ties_of, count=lambda keep, n: n), "nothing is trimmed", _TRIM),
        Mistake(partial(_ties_of, count=lambda keep, n: n - round(keep * n)),
                "the share that is kept is trimmed, and the rest is kept", _TRIM),
        Mistake(partial(_ties_of, stay=lambda sizes, count: _largest(-sizes, count)),
                "the smallest entries are kept", _TRIM),
        Mistake(partial(_ties_of, size=lambda vectors: vectors),
                "the largest values are kept, not the largest sizes: what is far below zero goes", _TRIM),
        Mistake(partial(_ties_of, stay=_of_all_rows),
                "all tasks are trimmed together: one with large entries crowds out the others", _TRIM),
        Mistake(partial(_ties_of, count=lambda keep, n: int(keep * n)), "the number to keep is cut off, not rounded",
                _TRIM),
        Mistake(partial(_ties_of, elect=_sum_of_signs),
                "the sign is elected by counting heads: two small entries outvote a large one", _ELECT),
        Mistake(partial(_ties_of, elect=_sign_of_the_largest), "the largest entry alone elects the sign",
                ["Take the entries 5, -3, -3 of one weight. Which sign weighs more in all, and what is yours?",
                 _ELECT[1]]),
        Mistake(partial(_ties_of, elect=lambda trimmed, vectors: vectors.sum(0).sign()),
                "the signs are elected before trimming: entries that are gone still vote", _ELECT[1]),
        Mistake(partial(_ties_of, merge=lambda trimmed, signs: trimmed.mean(0)),
                "this is the plain mean of the trimmed vectors: no sign is elected", _DISJOINT),
        Mistake(partial(_ties_of, merge=_unelected),
                "entries of both signs are averaged: the elected sign makes no difference", _DISJOINT),
        Mistake(partial(_ties_of, merge=lambda trimmed, signs: _those_that_agree(trimmed, signs)[0] / len(trimmed)),
                "the sum is divided by the number of tasks, those that do not agree included", _DISJOINT),
        Mistake(partial(_ties_of, merge=_over_all_that_are_left),
                "the sum is divided by the number of entries that are left, those of the other sign included",
                _DISJOINT),
        Mistake(partial(_ties_of, merge=lambda trimmed, signs: _those_that_agree(trimmed, signs)[0]),
                "the entries that agree are added up, and their mean is wanted", _DISJOINT),
        Mistake(partial(_ties_of, merge=_no_guard), "0 / 0 is NaN where no task has kept the weight", _NOBODY),
        # Right as long as there is one to keep
        Mistake(partial(_ties_of, count=lambda keep, n: round(keep * n)),
                "where round(keep · n) is 0, nothing is left: at least one entry of each task stays",
                "max(1, …) of what is to be kept."),
    ],
)  # fmt: skip


# Exercise 7: a merge of two networks that were never near each other

HIDDEN, LEAST = (964, 966, 974), 0.69
"""Means over these three seeds: both networks reach 0.63 by themselves, their plain mean 0.51, repaired 0.67. Weighted
by Fisher information or by regression the mean reaches 0.70 to 0.72, and once the units are aligned, by weights or by
activations, the plain mean 0.73, repaired 0.74. The ensemble reaches 0.79."""

TRAINING = Recipe(epochs=8, batch_size=100, optimizer=partial(torch.optim.Adam, lr=3e-3), precision="float64",
                  validate_every=8)  # fmt: skip
UNLABELLED = 500
"""Images without labels, for whoever needs some to merge by."""


def _network(seed: int) -> nn.Module:
    return fresh(partial(mlp, (1, 16, 16), 10, width=128), TRAINING, seed=seed)


def _without_labels(split: Split) -> Split:
    return replace(split, labels=torch.zeros_like(split.labels))


@functools.cache  # so that a second try costs nothing
def _hidden_pair(seed: int) -> tuple[nn.Module, nn.Module, Split, Split]:
    """Two networks, images without labels, and the test split: of the digits 0 to 4 the first saw nine in ten."""
    data: Dataset = load("glyphs", classes="digits", size=16, difficulty=0.5, count=5100, train_size=2000, val_size=100,
                         test_size=3000, seed=seed)  # fmt: skip
    chance = torch.where(data.train.labels < 5, 0.9, 0.1)
    first = torch.rand(len(chance), generator=torch.Generator().manual_seed(seed)) < chance
    networks = []
    for own_seed, part in ((seed, first), (seed + 100, ~first)):
        networks.append(_network(own_seed))
        with one_thread():  # several would wait for each other where the machine has other work: batches are small
            fit(networks[-1], replace(data, train=data.train.subset(part)), TRAINING, seed=own_seed, progress=False)
    unlabelled = _without_labels(data.train.subset(torch.arange(UNLABELLED)))
    return networks[0], networks[1], unlabelled, data.test


def _merged(merge: Any, a: nn.Module, b: nn.Module, train: Split) -> nn.Module:
    """The network that ``merge`` makes of copies of the two; only its weights are taken over."""
    trains = Wrong("your merge trains: an optimizer took a step in it",
                   "A merge computes weights from weights, and from what both networks say of the images.")  # fmt: skip
    steps: list[Any] = []

    def refuse(*step: Any) -> None:
        steps.append(step)
        raise trains

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        found = call(merge, a, b, train)
    except Wrong as wrong:
        raise trains if steps else wrong from None
    finally:
        hook.remove()
    if not isinstance(found, nn.Module):
        raise Wrong(f"expected a network, and this is of type {type(found).__name__}",
                    "For instance: return merging.average([a, b])")  # fmt: skip
    theirs, ours = ({n: getattr(v, "shape", None) for n, v in m.state_dict().items()} for m in (found, a))
    if theirs != ours:
        raise Wrong("the merged network does not have the layers of the two, or not in their sizes",
                    "Both networks side by side would be an ensemble: twice the size, twice the time.")  # fmt: skip
    made = copy.deepcopy(a)
    made.load_state_dict(found.state_dict())
    return made


def _keeps_the_rules(answer: Any) -> None:
    """A rehearsal with two networks that have learned nothing: a merge that breaks a rule is told so at once."""
    data = load("glyphs", classes="digits", size=16, count=60, train_size=40, val_size=10, test_size=10, seed=1)
    _merged(answer, _network(1), _network(2), _without_labels(data.train))


def _merged_accuracy(answer: Any, seed: int) -> float:
    a, b, train, test = _hidden_pair(seed)
    torch.default_generator.manual_seed(seed)  # a merge that draws draws the same, whether the pair is new or not
    return evaluate(_merged(answer, a, b, train), test).accuracy


exercise_7 = Design(
    "Merge two networks that were never near each other",
    admit=_keeps_the_rules,
    score=_merged_accuracy,
    seeds=HIDDEN,
    least=LEAST,
    hint=["The two started apart. Is unit 7 of the one the like of unit 7 of the other?",
          "Which function of the chapter puts the units of b in the order of a's? Average afterwards.",
          "The mean of two units varies less than either. Which function gives that back?"],
)  # fmt: skip

exercise_8 = OpenProject(
    "An open project: merge networks of your own",
    rubric=["what is merged", "the rivals", "the cost", "what is measured", "honesty"],
)
