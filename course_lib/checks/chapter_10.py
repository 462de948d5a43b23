"""Checks of chapter 10, model partitioning: pipelines, a bug, a cut, a figure, experts' slots, a schedule, a project.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on what the chapter's module computes nor on what the learner imports. Only time is told by the module: `timeline` says
how long a schedule takes, the learner's as well as ours, and the step in the figure.
"""

import copy
import functools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.checks.designs import normal
from course_lib.checks.patience import PATIENCE, endless, within
from course_lib.lab.judging import (
    Case,
    Method,
    Mistake,
    OfThisAnswer,
    OpenProject,
    Reading,
    Rule,
    Wrong,
    call,
    close,
    expect_close,
)
from course_lib.partitioning.schedules import Costs, Kind, Schedule, Task, Timeline, in_flight, one_f_one_b, timeline

# Exercise 1: unequal stages


def _gpipe(
    stages: Sequence[tuple[float, float]], m: int, *,
    ramp: Callable[[Sequence[float]], float] = sum,
    pace: Callable[[Sequence[float]], float] = max,
    times: Callable[[int], int] = lambda m: m - 1,
) -> float:  # fmt: skip
    """Of each direction the ``ramp``, and so many ``times`` the ``pace``."""
    return sum(ramp(seconds) + times(m) * pace(seconds) for seconds in zip(*stages, strict=True))


def _both_at_once(stages: Sequence[tuple[float, float]], m: int) -> float:
    """As if a stage's two passes were one piece of work, and a micro-batch turned round at once."""
    return _gpipe([(f + b, 0.0) for f, b in stages], m)


def _mean(seconds: Sequence[float]) -> float:
    return sum(seconds) / len(seconds)


def _one_direction(which: int) -> Rule:
    return lambda stages, m: _gpipe([(stage[which], 0.0) for stage in stages], m)


_RAMP = [
    "One micro-batch alone: how long is it on its way through all stages, the quick ones too?",
    "The first micro-batch takes the sum of all stages. Only what comes after it waits for the slowest.",
]
_PACE = [
    "One stage takes 5 seconds, all others 1. How often does a micro-batch come out at the end?",
    "Behind the first micro-batch one comes out whenever the slowest stage has done another, wherever that stands.",
]
_COUNT = [
    "With m = 1 nobody waits for a pace. What does your formula give then?",
    "The first micro-batch is in the ramp already. How many come after it?",
]
_FLUSH = [
    "When does the last stage begin its first backward pass, and has it any forward pass left then?",
    "Forward and backward are two pipelines, one after the other. Each has its own ramp and its own slowest stage.",
]

exercise_1 = Method(
    "How long a step of GPipe takes when stages differ",
    right=_gpipe,
    what="the time",
    hint=[*_FLUSH, *_RAMP, *_PACE],
    cases={
        "3 stages, 7 micro-batches": ([(1.0, 2.5), (3.25, 2.0), (0.5, 4.125)], 7),
        "4 stages, 12 micro-batches": ([(0.75, 1.5), (1.0, 2.0), (1.25, 3.5), (2.5, 0.5)], 12),
        "a single micro-batch": ([(1.0, 2.0), (4.0, 5.0)], 1),
        "a single stage": ([(1.5, 3.0)], 6),
        "5 equal stages": ([(1.0, 2.0)] * 5, 8),
    },
    mistakes=[
        Mistake(lambda stages, m: (m + len(stages) - 1) * sum(max(seconds) for seconds in zip(*stages, strict=True)),
                "the ramps are made of the slowest stage alone, as if all were as slow", _RAMP),
        Mistake(lambda stages, m: (m + len(stages) - 1) * max(map(sum, stages)),
                "all stages are taken to be as slow as the one whose two passes together take longest",
                [*_RAMP, *_FLUSH]),
        Mistake(partial(_gpipe, pace=_mean), "the pace is the mean of the stages, not the slowest of them", _PACE),
        Mistake(partial(_gpipe, pace=lambda seconds: seconds[-1]), "the pace is that of the last stage", _PACE),
        Mistake(lambda stages, m: sum(map(sum, stages)) + (m - 1) * (stages[-1][0] + stages[0][1]),
                "the pace is that of the stage at which micro-batches come out", _PACE),
        Mistake(partial(_gpipe, times=lambda m: 0), "this is the time of a single micro-batch", _PACE),
        Mistake(partial(_gpipe, times=lambda m: 1), "the slowest stage counts once, whatever m is", _PACE),
        Mistake(partial(_gpipe, times=lambda m: m), "one micro-batch too many: the first one counts twice", _COUNT),
        Mistake(lambda stages, m: m * sum(map(sum, stages)),
                "one micro-batch goes after the other: nothing overlaps", _PACE),
        Mistake(partial(_gpipe, ramp=max), "the ramps are missing: m times the slowest stage", _RAMP),
        Mistake(lambda stages, m: m * max(map(sum, stages)),
                "this is how long the busiest stage works, without its waiting", [*_RAMP, *_FLUSH]),
        Mistake(_both_at_once, "forward and backward passes overlap: this is the pace of stages that do both in turns",
                _FLUSH),
        Mistake(lambda stages, m: sum(map(sum, stages)) + (m - 1) * max(map(max, stages)),
                "only the slower direction has a pace: forward and backward passes overlap", _FLUSH),
        Mistake(_one_direction(0), "only the forward passes are there", _FLUSH),
        Mistake(_one_direction(1), "only the backward passes are there", _FLUSH),
        Mistake(partial(_gpipe, ramp=max, pace=sum), "sum and slowest are in each other's place", [*_RAMP, *_PACE]),
    ],
)  # fmt: skip


# Exercise 2: write a schedule


def _in_turns(
    rank: int, ranks: int, m: int, *,
    ahead: Callable[[int, int, int], int] = lambda rank, ranks, m: min(ranks - rank - 1, m),
    last: Callable[[int, int], int] = lambda ahead, m: m,
) -> list[str]:  # fmt: skip
    """So many forward passes ``ahead``, then one and a backward pass in turns, up to the ``last`` backward pass."""
    first = ahead(rank, ranks, m)
    tasks = [f"F{b}" for b in range(first)]
    for b in range(last(first, m)):
        tasks += [f"F{b + first}"] * (b + first < m) + [f"B{b}"]
    return tasks


def _backward_first(rank: int, ranks: int, m: int) -> list[str]:
    ahead = min(ranks - rank - 1, m)
    tasks = [f"F{b}" for b in range(ahead)]
    for b in range(m):
        tasks += [f"B{b}"] + [f"F{b + ahead}"] * (b + ahead < m)
    return tasks


def _last_first(tasks: list[str], m: int) -> list[str]:
    """The backward passes in the opposite order, in the same places."""
    return [f"B{m - 1 - int(task[1:])}" if task[0] == "B" else task for task in tasks]


def _from_one(tasks: list[str]) -> list[str]:
    return [f"{task[0]}{int(task[1:]) + 1}" for task in tasks]


def _all_forward(m: int) -> list[str]:
    return [f"{kind}{b}" for kind in "FB" for b in range(m)]


_FOR_INSTANCE = 'For instance: ["F0", "B0", "F1", "B1"]'


def _codes(found: Any, rank: int) -> Tensor:
    """A rank's tasks as numbers: twice the micro-batch, and one more for a backward pass."""
    if not isinstance(found, (list, tuple)):
        raise Wrong(f"your function should return a list of strings, and this is of type {type(found).__name__}",
                    _FOR_INSTANCE)  # fmt: skip
    for task in found:
        if not isinstance(task, str):
            raise Wrong(f"the tasks should be strings, and one is of type {type(task).__name__}", _FOR_INSTANCE)
        if not re.fullmatch(r"[FB]\d{1,9}", task):
            raise Wrong(f"rank {rank} is to do {task!r}, and that is no task", _FOR_INSTANCE)
    return torch.tensor([2 * int(task[1:]) + (task[0] == "B") for task in found], dtype=torch.int64)


def _tables(rule: Rule, ranks: int, m: int) -> tuple[Tensor, ...]:
    return tuple(_codes(rule(rank, ranks, m), rank) for rank in range(ranks))


def _named(code: int) -> str:
    return f"{'FB'[code % 2]}{code // 2}"


_AHEAD = [
    "A micro-batch goes down to the last rank and comes back. How many has rank r begun until its first is back?",
    "The last rank has none ahead: it does F0 and B0 at once. The one before it is one ahead.",
]
_CAP = "There are only m micro-batches. How many can a rank be ahead, then?"
_COUNTS = "The first is micro-batch 0, and the last m - 1."
_EACH_ONCE = ["Each of the m micro-batches has one F and one B on each rank.", "Count the F and the B of your list."]
_FIRST_BACK = "Which micro-batch was the first to go in? It is the first to come back, too."


def _first_wrong_task(found: Sequence[Tensor], right: Sequence[Tensor], ranks: int, m: int) -> None:
    for rank, (mine, wanted) in enumerate(zip(found, right, strict=True)):
        if torch.equal(mine, wanted):
            continue
        tasks = mine.tolist()
        if beyond := [code for code in tasks if code // 2 >= m]:
            raise Wrong(f"rank {rank} is to do {_named(beyond[0])}, and the micro-batches are 0 to {m - 1}",
                        [_CAP, _COUNTS])  # fmt: skip
        if twice := [code for code, times in Counter(tasks).items() if times > 1]:
            raise Wrong(f"rank {rank} does {_named(twice[0])} {tasks.count(twice[0])} times", _EACH_ONCE)
        if missing := [code for code in range(2 * m) if code not in tasks]:
            raise Wrong(f"rank {rank} never does {_named(missing[0])}", _EACH_ONCE)
        for b in range(m):
            if tasks.index(2 * b + 1) < tasks.index(2 * b):
                raise Wrong(f"rank {rank} does B{b} before F{b}", "What does a backward pass need of the forward pass?")
        place = int((mine != wanted).nonzero()[0])
        raise Wrong(f"rank {rank} does {_named(tasks[place])} as its task number {place + 1}, too early for 1F1B or "
                    "too late", _AHEAD)  # fmt: skip


exercise_2 = Method(
    "The tasks of a rank under 1F1B",
    right=_in_turns,
    ask=_tables,
    explain=_first_wrong_task,
    cases={
        "4 ranks, 8 micro-batches": (4, 8),
        "3 ranks, 3 micro-batches": (3, 3),
        "6 ranks, 3 micro-batches": (6, 3),
        "5 ranks, a single micro-batch": (5, 1),
        "a single rank": (1, 3),
    },
    mistakes=[
        Mistake(lambda rank, ranks, m: _all_forward(m),
                "this is GPipe's order: the rank holds all m micro-batches at once",
                ["When is the first micro-batch back? From then on a rank need not go further ahead.", *_AHEAD]),
        Mistake(lambda rank, ranks, m: _last_first(_all_forward(m), m),
                "this is GPipe's order, with the last micro-batch back first", [_FIRST_BACK, *_AHEAD]),
        Mistake(partial(_in_turns, ahead=lambda rank, ranks, m: min(ranks - rank, m)),
                "one forward pass too many comes before the turns: the rank holds one micro-batch more than it must",
                _AHEAD),
        Mistake(partial(_in_turns, ahead=lambda rank, ranks, m: min(max(ranks - rank - 2, 0), m)),
                "one forward pass too few comes before the turns: the rank waits where it could work", _AHEAD),
        Mistake(partial(_in_turns, ahead=lambda rank, ranks, m: min(rank, m)),
                "the ranks are counted from the wrong end: rank 0 is the farthest ahead", _AHEAD),
        Mistake(partial(_in_turns, ahead=lambda rank, ranks, m: min(ranks - 1, m)),
                "all ranks are as far ahead as the first", _AHEAD),
        Mistake(partial(_in_turns, ahead=lambda rank, ranks, m: min(2 * (ranks - rank - 1), m)),
                "the rank is twice as far ahead as it must be", _AHEAD),
        Mistake(partial(_in_turns, ahead=lambda rank, ranks, m: 0),
                "no rank is ahead: each waits until its only micro-batch is back", _AHEAD),
        Mistake(_backward_first, "a backward pass comes first in the turns, one micro-batch too early",
                ["The last rank has none ahead. What does your list begin with there?",
                 "One F and one B in turns: the F first."]),
        Mistake(lambda *case: _last_first(_in_turns(*case), case[2]), "the backward passes come in the opposite order",
                _FIRST_BACK),
        Mistake(partial(_in_turns, last=lambda ahead, m: m - ahead),
                "the backward passes that are left at the end are missing", _EACH_ONCE),
        Mistake(lambda *case: _from_one(_in_turns(*case)), "the micro-batches are counted from 1", _COUNTS),
        # Right as long as there are enough micro-batches
        Mistake(partial(_in_turns, ahead=lambda rank, ranks, m: ranks - rank - 1),
                "the rank begins micro-batches that are not there", _CAP),
    ],
)  # fmt: skip


# Exercise 3: a row-parallel layer


def _row_parallel(
    x: Tensor, linear: nn.Linear, rank: int, ranks: int, all_reduce: Callable[[Tensor], Tensor], *,
    brings: Callable[[Tensor, Tensor, int, int], Tensor] = lambda own, bias, rank, ranks: own,
    returns: Callable[[Tensor, Tensor, int, int], Tensor] = lambda total, bias, rank, ranks: total + bias,
) -> Tensor:  # fmt: skip
    """What a rank ``brings`` of its own product, and what it ``returns`` of the sum."""
    columns = linear.weight.chunk(ranks, dim=1)[rank]
    bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
    own = F.linear(x.chunk(ranks, dim=-1)[rank], columns)
    return returns(all_reduce(brings(own, bias, rank, ranks)), bias, rank, ranks)


def _not_used(x: Tensor, linear: nn.Linear, rank: int, ranks: int, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
    own = _own_alone(x, linear, rank, ranks, all_reduce)
    all_reduce(own)
    return own


def _own_alone(x: Tensor, linear: nn.Linear, rank: int, ranks: int, all_reduce: Any) -> Tensor:
    return _row_parallel(x, linear, rank, ranks, lambda own: own)


def _rows(x: Tensor, linear: nn.Linear, rank: int, ranks: int, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
    bias = None if linear.bias is None else linear.bias.chunk(ranks)[rank]
    return all_reduce(F.linear(x, linear.weight.chunk(ranks, dim=0)[rank], bias))


_NO_BIAS = "F.linear takes None for a bias, and + does not: what is linear.bias here?"
_LAYER = "Which of your lines writes into linear, its weight or its bias? The caller still needs them as they were."
_TOGETHER = "A sum over ranks needs all of them, with tensors of one shape. Print what each brings."


def _on_all_ranks(rule: Rule, x: Tensor, linear: nn.Linear, ranks: int) -> tuple[tuple[Any, ...], bool]:
    """What each rank returns, and whether they need one another: whether what they bring to a sum differs.

    The ranks come one after the other, and again for each sum: what it is, is known once all have brought their part.
    """
    sums: list[Tensor] = []
    differ = ranks == 1
    while True:
        calls = [_on_a_rank(rule, x, linear, rank, ranks, sums) for rank in range(ranks)]
        brought = [parts for _, parts in calls]
        for rank, parts in enumerate(brought):
            if len(parts) != len(brought[0]):
                raise Wrong(f"not all ranks call all_reduce as often: rank 0 {len(brought[0])}×, rank {rank} "
                            f"{len(parts)}×; as processes they would wait for ever", _TOGETHER)  # fmt: skip
        if len(sums) == len(brought[0]):
            return tuple(result for result, _ in calls), differ
        parts = [parts[len(sums)] for parts in brought]
        if not all(isinstance(part, Tensor) and part.shape == parts[0].shape for part in parts):
            raise Wrong("the ranks bring to all_reduce what cannot be added up", _TOGETHER)
        differ |= not all(torch.equal(part, parts[0]) for part in parts)
        sums.append(torch.stack(parts).sum(0))


def _on_a_rank(
    rule: Rule, x: Tensor, linear: nn.Linear, rank: int, ranks: int, sums: Sequence[Tensor]
) -> tuple[Any, list[Any]]:
    """What the rank returns if these are the ``sums``, and what it brings to each of them and to those to come."""
    brought: list[Any] = []

    def all_reduce(part: Any) -> Any:
        brought.append(part.detach().clone() if isinstance(part, Tensor) else part)
        return sums[len(brought) - 1].clone() if len(brought) <= len(sums) else copy.deepcopy(brought[-1])

    layer = copy.deepcopy(linear)
    try:
        result = rule(x.clone(), layer, rank, ranks, all_reduce)
    except Wrong as wrong:
        raise Wrong(wrong.message, wrong.hints or (_NO_BIAS if linear.bias is None else ())) from None
    now, before = layer.state_dict(), linear.state_dict()
    if now.keys() != before.keys() or any(not torch.equal(now[name], before[name]) for name in now):
        raise Wrong("your function changes the layer that it was handed", _LAYER)
    return result, brought


def _rank_by_rank(found: Any, right: tuple[tuple[Tensor, ...], bool], *case: Any) -> None:
    for rank, (mine, wanted) in enumerate(zip(found[0], right[0], strict=True)):
        expect_close(mine, wanted, what=f"what rank {rank} returns", hint=_BIAS_ONCE)
    raise Wrong("the ranks do not need one another: each brings the same, or nothing, and the work is not shared out",
                _SHARED)  # fmt: skip


def _layer_of(seed: int, outputs: int, inputs: int, *, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(normal(seed, outputs, inputs))
        if bias:
            layer.bias.copy_(normal(seed + 1, outputs) + 3)
    return layer


_BIAS_ONCE = [
    "Two ranks, a bias of 1, an input of zeros: what comes out, and what should?",
    "Whatever all ranks bring is added up, the bias too. Where can it be added once?",
]
_ALL_RANKS = "Every rank goes on with the result. Is what it returns the same on all of them?"
_SHARED = [
    "Each rank is to multiply its own columns only. Which part of the input do they belong to?",
    "The products of the ranks' columns add up to that of the whole weight.",
]

exercise_3 = Method(
    "Find the bug: a row-parallel layer",
    right=_row_parallel,
    ask=_on_all_ranks,
    explain=_rank_by_rank,
    cases={
        "3 ranks": (normal(1001, 4, 9), _layer_of(1002, 6, 9), 3),
        "4 ranks, and a batch of sequences": (normal(1004, 2, 3, 8), _layer_of(1005, 4, 8), 4),
        "a single rank": (normal(1007, 3, 5), _layer_of(1008, 2, 5), 1),
        "2 ranks, and a layer without a bias": (normal(1010, 3, 6), _layer_of(1011, 4, 6, bias=False), 2),
    },
    mistakes=[
        Mistake(partial(_row_parallel, brings=lambda own, bias, rank, ranks: own + bias,
                        returns=lambda total, bias, rank, ranks: total),
                "each rank brings the bias, and the sum has it as many times as there are ranks", _BIAS_ONCE),
        Mistake(partial(_row_parallel, returns=lambda total, bias, rank, ranks: total),
                "the bias is not there at all", _BIAS_ONCE),
        Mistake(partial(_row_parallel, brings=lambda own, bias, rank, ranks: own + bias),
                "the bias is in what each rank brings, and is added once more to the sum", _BIAS_ONCE),
        Mistake(partial(_row_parallel, returns=lambda total, bias, rank, ranks: total + bias / ranks),
                "the bias is divided by the number of ranks, and then added once", _BIAS_ONCE),
        Mistake(partial(_row_parallel, brings=lambda own, bias, rank, ranks: own + bias / ranks,
                        returns=lambda total, bias, rank, ranks: total / ranks),
                "this is the mean of what the ranks bring, not the sum", _SHARED),
        Mistake(partial(_row_parallel, returns=lambda total, bias, rank, ranks: total / ranks + bias),
                "the sum is divided by the number of ranks", _SHARED),
        Mistake(partial(_row_parallel, returns=lambda total, bias, rank, ranks: total + bias * (rank == 0)),
                "rank 0 alone adds the bias, after the sum: the ranks go on with different results", _ALL_RANKS),
        Mistake(partial(_row_parallel, returns=lambda total, bias, rank, ranks: total + bias * (rank == ranks - 1)),
                "the last rank alone adds the bias, after the sum: the ranks go on with different results", _ALL_RANKS),
        Mistake(_not_used, "what all_reduce returns is not used: each rank goes on with its own part", _ALL_RANKS),
        Mistake(_own_alone, "nothing is added up: each rank goes on with its own part", _SHARED[1]),
        Mistake(lambda x, linear, rank, ranks, all_reduce: linear(x),
                "each rank computes the whole layer: nothing is shared out", _SHARED),
        Mistake(lambda x, linear, rank, ranks, all_reduce: all_reduce(linear(x)),
                "each rank computes the whole layer, and the sum has it as many times as there are ranks", _SHARED),
        Mistake(_rows, "the weight is cut into rows: each rank has some outputs whole, and the sum mixes them up",
                ["weight is [out, in]. Which axis is summed over in a product with x?",
                 "The columns, dim=1, belong to parts of the input."]),
    ],
)  # fmt: skip


# Exercise 4: the best cut


def _best_bottleneck(costs: Sequence[float], parts: int) -> float:
    """The least cost of the dearest of at most so many stages, of one more in each round."""
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    best = sums.copy()  # [n]: of the first n layers
    for _ in range(parts - 1):
        best = np.array([0.0] + [np.maximum(best[:n], sums[n] - sums[:n]).min() for n in range(1, len(sums))])
    return float(best[-1])


def _full_at(costs: Sequence[float], parts: int, *, before: bool) -> float:
    """Stages are filled up to an even share, to ``before`` it is passed or just past it; the last takes the rest."""
    share, stages = sum(costs) / parts, [0.0]
    for cost in costs:
        full = stages[-1] + cost > share if before else stages[-1] >= share
        if stages[-1] and full and len(stages) < parts:
            stages.append(0.0)
        stages[-1] += cost
    return max(stages)


def _equal_numbers(costs: Sequence[float], parts: int) -> float:
    return max(float(sum(part)) for part in np.array_split(np.array(costs), parts))


def _rounded_up(costs: Sequence[float], parts: int) -> float:
    each = -(-len(costs) // parts)
    return max(float(sum(costs[first : first + each])) for first in range(0, len(costs), each))


def _any_order(costs: Sequence[float], parts: int) -> float:
    """The dearest layer that is left to the cheapest stage."""
    stages = [0.0] * parts
    for cost in sorted(costs, reverse=True):
        stages[stages.index(min(stages))] += cost
    return max(stages)


def _in_time(rule: Rule, costs: Sequence[float], parts: int) -> Any:
    return within(PATIENCE, endless(PATIENCE), _FASTER, rule, costs, parts)


def _dearer_or_cheaper(found: Any, right: float, costs: Sequence[float], parts: int) -> None:
    if isinstance(found, (int, float, np.number)) and np.isfinite(found):
        if found > right:
            raise Wrong("there is a cut whose dearest stage is cheaper", _TABLE)
        raise Wrong("no cut makes the dearest stage as cheap as that", _CONTIGUOUS)


_CONTIGUOUS = [
    "Which cut is it? Print its stages, and what each of them costs.",
    "A stage is a run of layers in their order, and there are no more stages than parts.",
]
_TABLE = [
    "A greedy cut cannot know what is still to come. What if the first stage is closed a layer earlier?",
    "Let T[k][n] be the best for the first n layers in k stages. The last stage begins somewhere: try all places.",
    "Or ask: with at most c a stage, how many stages are needed? Fill each as far as c allows, and halve the interval.",
]
_FASTER = [
    "How many cuts of 200 layers into 8 stages are there? What do they have in common?",
    "The best for the first n layers in k stages is asked for again and again. Keep it.",
    *_TABLE[1:],
]
_LAYERS = (3 + normal(1021, 200).abs() * torch.linspace(1, 9, 200).sin().abs() * 20).round(decimals=1).tolist()

exercise_4 = Method(
    "The best cut of a chain",
    right=_best_bottleneck,
    ask=_in_time,
    explain=_dearer_or_cheaper,
    what="the cost of the dearest stage",
    hint=_TABLE,
    rtol=1e-4,  # halving an interval ends somewhere
    cases={
        "10 layers, 3 stages": ([5.0, 7.0, 2.5, 2.5, 7.0, 2.5, 8.0, 1.0, 3.0, 1.0], 3),
        "9 layers, the last the dearest": ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 3.0, 8.0], 3),
        "a single stage": ([3.0, 1.5, 2.0], 1),
        "as many stages as layers": ([2.0, 0.5, 4.0, 1.0], 4),
        "200 layers, 8 stages": (_LAYERS, 8),
    },
    mistakes=[
        Mistake(partial(_full_at, before=True),
                "each stage is filled as long as it stays below an even share, and the last has all that is left",
                _TABLE),
        Mistake(partial(_full_at, before=False), "each stage is filled until it reaches an even share", _TABLE),
        Mistake(_equal_numbers, "the stages have equally many layers, whatever these cost",
                ["Let the last layer cost as much as all others together. Where should the cut be?", *_TABLE]),
        Mistake(_rounded_up, "the stages have equally many layers, whatever these cost",
                ["Let the last layer cost as much as all others together. Where should the cut be?", *_TABLE]),
        Mistake(lambda costs, parts: _best_bottleneck(sorted(costs), parts),
                "the layers are sorted first: these are no longer the stages of a chain", _CONTIGUOUS),
        Mistake(lambda costs, parts: _best_bottleneck(sorted(costs, reverse=True), parts),
                "the layers are sorted first: these are no longer the stages of a chain", _CONTIGUOUS),
        Mistake(_any_order, "layers go to any stage that has room: these are no longer the stages of a chain",
                _CONTIGUOUS),
        Mistake(lambda costs, parts: sum(costs) / parts,
                "this is an even share: no cut can be better, and there may be none that is as good", _CONTIGUOUS),
        Mistake(lambda costs, parts: max(costs), "this is the dearest layer, not the dearest stage", _CONTIGUOUS),
        Mistake(lambda costs, parts: _best_bottleneck(costs, parts + 1), "there is one stage too many",
                "parts stages have parts - 1 cuts between them."),
        Mistake(lambda costs, parts: _best_bottleneck(costs, max(parts - 1, 1)), "there is one stage too few",
                "parts stages have parts - 1 cuts between them."),
    ],
)  # fmt: skip


# Exercise 5: which stage to speed up

_SECONDS = (1.0, 1.2, 1.9, 0.9)
"""Of a forward pass, and of either half of a backward pass, in each stage of the figure; six micro-batches, 1F1B."""


def _figure(halved: int | None = None) -> Timeline:
    """The figure's step, with one stage at half its time."""
    seconds = [each / 2 if stage == halved else each for stage, each in enumerate(_SECONDS)]
    return timeline(one_f_one_b(4, 6), Costs(seconds, seconds, seconds))


def _halved(stage: int) -> str:
    return f"from {_figure().makespan:.1f} to {_figure(stage).makespan:.1f}"


_DEAREST = min(range(4), key=lambda stage: _figure(stage).makespan)


def _as_choice(rank: Any) -> Any:
    try:
        return str(operator.index(rank))
    except TypeError:
        return rank


@dataclass(frozen=True)
class _ReadingOfARank(Reading):
    """A choice among ranks, which may be handed in as a whole number."""

    def __call__(self, answer: Any) -> None:
        if isinstance(answer, (tuple, list)) and answer:
            answer = _as_choice(answer[0]), *answer[1:]
        super().__call__(answer)

    def _unreadable(self) -> Wrong:
        return Wrong(f"the {self.called} and the letter of a reason are wanted", 'For instance: 0, "a"')


exercise_5 = _ReadingOfARank(
    "Which stage to speed up? A figure to read",
    right=(str(_DEAREST), "a"),
    choices={
        "0": f"rank 0 is busy first, but then it waits for rank 2: halving it shortens the step {_halved(0)} only",
        "1": f"rank 1 is the second dearest, and waits for rank 2: halving it shortens the step {_halved(1)} only",
        "2": "",
        "3": f"rank 3 waits most, and is quick already: halving it shortens the step {_halved(3)} only",
    },
    reasons={
        "a": "",
        "b": "that holds for rank 0, which has four forward passes to do first; later it waits all the same",
        "c": "that holds for rank 3: who comes last in the pipeline starts last, however quick it is",
        "d": "that holds for rank 0: how many a rank holds goes by its place in the pipeline, not by its time",
    },
    hint=["In the middle of the step, whose row has no white in it, and for whom do the others wait?",
          "A micro-batch can come through no faster than the slowest stage lets it."],
    reason_hint="Try each reason on the four rows. For which of them is it true of the rank that you chose?",
    called="rank",
)  # fmt: skip


# Exercise 6: slots


def _slots(
    experts: Tensor, E: int, capacity: int, *,
    place: Callable[[Tensor], Tensor] = lambda turn: turn.cumsum(0) - 1,
    fits: Callable[[Tensor, int], Tensor] = lambda place, capacity: place < capacity,
    number: Callable[[Tensor, Tensor, int, int], Tensor] = lambda expert, place, E, capacity: expert * capacity + place,
    dropped: Callable[[Tensor, int], Tensor | int] = lambda expert, capacity: -1,
) -> Tensor:  # fmt: skip
    """The ``number`` of each token's slot, by its ``place`` among its expert's if it ``fits``, or ``dropped``."""
    mine = place(F.one_hot(experts, E)).gather(1, experts[:, None])[:, 0]
    return torch.where(fits(mine, capacity), number(experts, mine, E, capacity), dropped(experts, capacity))


def _place_from_one(turn: Tensor) -> Tensor:
    return turn.cumsum(0)


def _place_of_all(turn: Tensor) -> Tensor:
    return torch.arange(len(turn))[:, None].expand(turn.shape)


def _asking(seed: int, tokens: int, E: int, capacity: int) -> Case:
    """Tokens of which the later experts are asked for more often."""
    draws = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    return (E * draws.sqrt()).long(), E, capacity


_MANY = 3000
"""Tokens of the case on which a loop over them would show, and lines of Python that it may take."""


def _without_a_loop(rule: Rule, experts: Tensor, E: int, capacity: int) -> Any:
    lines = _MANY if len(experts) == _MANY else PATIENCE
    return within(lines, f"{_MANY:,} tokens take more than {_MANY:,} lines of Python: there is a loop over tokens",
                   _RUNNING, rule, experts, E, capacity)  # fmt: skip


def _whole_numbers(found: Any, right: Tensor, *case: Any) -> bool:
    return close(found, right) and not (torch.as_tensor(found).is_floating_point() or _is_bool(found))


def _is_bool(found: Any) -> bool:
    return torch.as_tensor(found).dtype == torch.bool


def _first_wrong_slot(found: Any, right: Tensor, experts: Tensor, E: int, capacity: int) -> None:
    if close(found, right):
        raise Wrong("slots are numbers of rows, and yours are no whole numbers",
                    "Which of your lines makes a float? -1.0 does.")  # fmt: skip
    if not isinstance(found, Tensor) or found.shape != right.shape:
        return
    kept = found[found != -1].tolist()
    if outside := [slot for slot in kept if not 0 <= slot < E * capacity]:
        raise Wrong(f"{outside[0]:g} is no slot: there are 0 to {E * capacity - 1}, and -1 for who is dropped", _OFFSET)
    if len(set(kept)) < len(kept):
        raise Wrong("two tokens are sent to the same slot", _RUNNING)
    token = int((found != right).nonzero()[0])
    raise Wrong(f"token {token}, which asks for expert {int(experts[token])}, is sent to slot {found[token]:g}",
                _RUNNING)  # fmt: skip


_RUNNING = [
    "How many tokens before this one ask for the same expert? That is its place.",
    "F.one_hot(experts, E) has a 1 for each token in its expert's column. cumsum(0) counts them as they come.",
]
_FROM_ZERO = [
    "The first token that asks for an expert gets its first slot: place 0. What does your count say there?",
    "cumsum counts the token itself, too.",
]
_FULL = "With a capacity of 1, how many tokens of an expert are kept, and what is the place of the last of them?"
_OFFSET = [
    "Expert 0 has the slots 0 to capacity - 1. Which one is the first of expert 1?",
    "expert * capacity + place, and place is below capacity.",
]
_GONE = "A token that finds no place must not be put where another one is. What does the text ask for instead?"

exercise_6 = Method(
    "Tokens to the slots of their experts",
    right=_slots,
    ask=_without_a_loop,
    agree=_whole_numbers,
    explain=_first_wrong_slot,
    what="the slots",
    hint=_RUNNING,
    cases={
        "10 tokens, 4 experts, 2 slots each": (torch.tensor([2, 0, 2, 1, 0, 2, 2, 1, 0, 2]), 4, 2),
        "40 tokens, 5 experts, 7 slots each": _asking(1041, 40, 5, 7),
        "room for all": _asking(1042, 12, 3, 12),
        "a single expert": (torch.zeros(6, dtype=torch.int64), 1, 4),
        "a slot for each expert": _asking(1043, 20, 6, 1),
        f"{_MANY:,} tokens": _asking(1044, _MANY, 16, 150),
    },
    mistakes=[
        Mistake(partial(_slots, place=_place_from_one), "places are counted from 1: slots are one too far, and one of "
                "each expert's stays empty", _FROM_ZERO),
        Mistake(partial(_slots, place=_place_from_one, fits=operator.le),
                "places are counted from 1: the last of each expert lies in the next one's slots", _FROM_ZERO),
        Mistake(partial(_slots, fits=operator.le), "each expert keeps one token more than it has slots", _FULL),
        Mistake(partial(_slots, fits=lambda place, capacity: place < capacity - 1),
                "each expert keeps one token fewer than it has slots", _FULL),
        Mistake(partial(_slots, fits=lambda place, capacity: place >= 0),
                "nobody is dropped: who finds no place is sent to the slots of the next expert", _GONE),
        Mistake(partial(_slots, dropped=lambda expert, capacity: expert * capacity + capacity - 1),
                "who finds no place is sent to the last one, where another token is already", _GONE),
        Mistake(partial(_slots, dropped=lambda expert, capacity: 0),
                "who finds no place is sent to slot 0, which belongs to another token", _GONE),
        Mistake(lambda experts, E, capacity: (slots := _slots(experts, E, capacity))[slots >= 0],
                "who is dropped is left out: what is wanted is a number for each token", _GONE),
        Mistake(partial(_slots, number=lambda expert, place, E, capacity: place),
                "these are the places within each expert: experts share their slots", _OFFSET),
        Mistake(partial(_slots, number=lambda expert, place, E, capacity: expert * E + place),
                "an expert's slots begin at expert * E: it has capacity slots, not E", _OFFSET),
        Mistake(partial(_slots, number=lambda expert, place, E, capacity: place * E + expert),
                "the slots lie the other way: all first places, then all second ones", _OFFSET),
        Mistake(partial(_slots, place=lambda turn: turn.flip(0).cumsum(0).flip(0) - 1),
                "last come, first served: the places are counted from the end",
                "Who comes first, token 0 or the last? It should get place 0."),
        Mistake(partial(_slots, place=_place_of_all),
                "the place is counted among all tokens, not among those of the same expert", _RUNNING),
    ],
)  # fmt: skip


# Exercise 7: a schedule for little memory

HIDDEN = ((4, 8, 2), (4, 12, 3), (5, 10, 4), (6, 12, 5), (6, 18, 4), (8, 16, 5), (3, 9, 2))
"""Ranks, micro-batches and how many a rank may hold. 1F1B with fewer ahead and each W at once takes 1.36 times as long
as ours on average, GPipe in groups as large as may be held 1.35; and 1.07 if each rank does something whenever it can,
but in any other order than I, F, W."""

LONGEST, BROKEN = 1.05, 2.0


def _greedy(ranks: int, m: int, held: int, order: Sequence[Kind] = ("I", "F", "W")) -> Schedule:
    """Second by second, each rank does the first in ``order`` of what it can."""
    done = {kind: [0] * ranks for kind in order}
    tables: list[list[Task]] = [[] for _ in range(ranks)]
    while sum(done["W"]) < ranks * m:
        now = [can for rank in range(ranks) if (can := _first_that_can(done, rank, ranks, m, held, order))]
        for task in now:
            tables[task.stage].append(task)
            done[task.kind][task.stage] += 1
    return Schedule("greedy", ranks, m, tuple(map(tuple, tables)))


def _first_that_can(
    done: dict[Kind, list[int]], rank: int, ranks: int, m: int, held: int, order: Sequence[Kind]
) -> Task | None:
    """The first in ``order`` of what a rank can do, if so many of each kind are ``done`` by each."""
    f, i, w = (done[kind][rank] for kind in ("F", "I", "W"))
    can = {
        "F": f < m and f - w < held and (rank == 0 or done["F"][rank - 1] > f),
        "I": i < f and (rank == ranks - 1 or done["I"][rank + 1] > i),
        "W": w < i,
    }
    return next((Task(kind, rank, done[kind][rank]) for kind in order if can[kind]), None)


@functools.cache
def _our_step(ranks: int, m: int, held: int) -> float:
    return timeline(_greedy(ranks, m, held)).makespan


def _step(found: Schedule, ranks: int, m: int, held: int) -> tuple[float, str]:
    """How many times as long as ours a step takes, and how the table breaks the rule, if it does."""
    if (found.stages, found.batches, len(found.ranks)) != (ranks, m, ranks):
        return BROKEN, f"it is for {found.stages} stages, {found.batches} micro-batches and {len(found.ranks)} ranks"
    if elsewhere := [stage for stage, rank in enumerate(found.home) if stage != rank]:
        return BROKEN, f"stage {elsewhere[0]} is on rank {found.home[elsewhere[0]]}"
    if any(task.kind == "B" for task in found.ranks[0]):
        return BROKEN, "its backward passes are whole (B)"
    most = in_flight(found)
    if max(most) > held:
        return BROKEN, f"rank {most.index(max(most))} holds {max(most)}"
    return timeline(found).makespan / _our_step(ranks, m, held), ""


def _slips(found: Schedule, held: int) -> Iterator[str]:
    """Where a rank waits, or does something less urgent, while it could do something else."""
    spans = timeline(found).spans
    for second in range(round(timeline(found).makespan)):
        done: dict[Kind, list[int]] = {kind: [0] * found.stages for kind in ("F", "I", "W")}
        for span in spans:
            done[span.task.kind][span.rank] += span.end <= second
        for rank in range(found.stages):
            could = _first_that_can(done, rank, found.stages, found.batches, held, ("I", "F", "W"))
            does = next((span.task for span in spans if span.rank == rank and span.start == second), None)
            if could and (not does or "IFW".index(does.kind) > "IFW".index(could.kind)):
                instead = f"does {does.kind}{does.batch}" if does else "waits"
                yield f"at t = {second} rank {rank} {instead} and could do {could.kind}{could.batch}"


_URGENT = [
    "For which of F, I and W does another rank wait, which gives memory back, and for which does nobody wait?",
    "Play it second by second: each rank that can do an I does it, if not an F that it may hold, if not a W.",
]
_HOLD = [
    "A rank holds one micro-batch more with each F and one fewer with each W, not with I. Count as you go.",
    "Before an F ask: F's done less W's done, is that below held?",
]
_TABLE_FORM = [
    "Stage s is on rank s, and each stage has m tasks of each kind: F, I and W.",
    'pt.Schedule("mine", ranks, m, tables), with a tuple of pt.Task(kind, rank, batch) for each rank.',
]
_ENDLESS = [
    "Print what each rank does in each second. Is there one in which none does anything? Then none ever will.",
    "A rank that holds all it may needs a W before the next F: can it always do one?",
]


def _hints_for(tables: Sequence[Schedule], ways: Sequence[str]) -> list[str]:
    """What breaks the rule comes first; then one place where a rank could do better."""
    if broken := [why for why in ways if why]:
        return _HOLD if " holds " in broken[0] else _TABLE_FORM
    for found, (ranks, m, held) in zip(tables, HIDDEN, strict=True):
        for slip in _slips(found, held):
            return [OfThisAnswer(f"With {ranks} ranks, {m} micro-batches and {held} held, {slip}."), *_URGENT]
    return _URGENT


def exercise_7(answer: Any) -> None:
    """A schedule for little memory, on cases not seen before"""
    tables = []
    for ranks, m, held in HIDDEN:
        on = f"{ranks} ranks, {m} micro-batches, {held} held"
        found = within(
            PATIENCE, f"{endless(PATIENCE)} (on {on})", _ENDLESS, partial(call, on=on), answer, ranks, m, held
        )
        if not isinstance(found, Schedule):
            raise Wrong(f"your function should return a pt.Schedule, and returns a {type(found).__name__} (on {on})",
                        _TABLE_FORM[::-1])  # fmt: skip
        tables.append(found)
    steps = [_step(found, *case) for found, case in zip(tables, HIDDEN, strict=True)]
    mean = float(np.mean([ratio for ratio, _ in steps]))
    if mean > LONGEST:
        each = "; ".join(
            f"{case}: {f'broken, {why}' if why else f'{ratio:.2f}'}"
            for case, (ratio, why) in zip(HIDDEN, steps, strict=True)
        )
        raise Wrong(f"your step takes {mean:.3f} times as long as ours on average, the limit is {LONGEST}; by "
                    f"(ranks, m, held), {each}", _hints_for(tables, [why for _, why in steps]))  # fmt: skip


exercise_8 = OpenProject(
    "An open project: is it worth cutting?",
    rubric=("the reason to cut", "the prediction", "the correctness", "the measurement", "the verdict"),
)
