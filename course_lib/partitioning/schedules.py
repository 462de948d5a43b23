r"""Pipeline schedules: who computes what, in which order, as tables that can be drawn, timed and executed.

=====================  ==============================================================  ================================
name                   order                                                           source
=====================  ==============================================================  ================================
``naive``              one micro-batch at a time through all stages and back           –
``gpipe``              all forward passes, then all backward passes                    Huang et al. 2018,
                                                                                       arXiv:1811.06965
``one_f_one_b``        as early as possible one backward pass for each forward pass    Narayanan et al. 2019 (SOSP),
                                                                                       2020, arXiv:2006.09503
``interleaved``        the same with several smaller stages on each rank               Narayanan et al. 2021,
                                                                                       arXiv:2104.04473
``zero_bubble``        backward passes in two halves; the weights' half fills gaps     Qi et al. 2023,
                                                                                       arXiv:2401.10241
``zero_bubble_h2``     no gap at all, for twice the memory                             the same
``timeline``           from when to when each task runs                                –
``in_flight``          micro-batches whose activations each rank holds at most         –
``bubble_formula``     the idle share of all ranks' time, in closed form               the papers above
``in_flight_formula``  the micro-batches held, in closed form                          the papers above
=====================  ==============================================================  ================================

A schedule says nothing of time: it is one list of tasks a rank, in the order in which they are to run. ``pipeline.py``
executes the same tables with real processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from course_lib.lab.arguments import at_least, is_number, require

# --- Tables -----------------------------------------------------------------------------------------------------------

Kind = Literal["F", "B", "I", "W"]
"""Forward pass; whole backward pass; its two halves: the gradient of the stage's inputs, and that of its weights."""


class Task(NamedTuple):
    """One micro-batch in one stage, both counted from 0; ``str`` writes it as ``F1.3``: stage 1, micro-batch 3."""

    kind: Kind
    stage: int
    batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.batch}"


@dataclass(frozen=True)
class Schedule:
    """The tasks of every rank, in their order.

    Attributes
    ----------
    name : as in the table at the head of this module.
    stages, batches : how many stages the network has, and micro-batches the batch.
    ranks : the tasks of each rank; a stage's tasks are all on one rank.

    Raises
    ------
    ValueError : a task is missing, stands twice, on two ranks, or can never run because each waits for another.
    """

    name: str
    stages: int
    batches: int
    ranks: tuple[tuple[Task, ...], ...] = field(repr=False)

    def __post_init__(self) -> None:
        at_least(1, stages=self.stages, batches=self.batches)
        tasks = [task for rank in self.ranks for task in rank]
        halves = {kind for kind, _, _ in tasks} & {"I", "W"}
        kinds: tuple[Kind, ...] = ("F", "I", "W") if halves else ("F", "B")
        all_ = {Task(kind, s, b) for kind in kinds for s in range(self.stages) for b in range(self.batches)}
        odd = sorted(map(str, all_ ^ set(tasks))) or sorted({str(task) for task in tasks if tasks.count(task) > 1})
        require("ranks", ", ".join(odd[:5]), lambda text: not text, "every task once")
        for stage in range(self.stages):
            homes = [n for n, rank in enumerate(self.ranks) if any(task.stage == stage for task in rank)]
            require("ranks", homes, lambda found: len(found) == 1, f"one rank for stage {stage}")
        timeline(self)  # tells of tasks that wait for one another

    @property
    def home(self) -> tuple[int, ...]:
        """The rank of each stage."""
        found = {task.stage: number for number, rank in enumerate(self.ranks) for task in rank}
        return tuple(found[stage] for stage in range(self.stages))

    def needs(self, task: Task) -> tuple[Task, ...]:
        """What must have ended before: the same micro-batch one stage before, on its way back one stage after."""
        kind, stage, batch = task
        if kind == "F":
            return (Task("F", stage - 1, batch),) if stage else ()
        if kind == "W":
            return (Task("I", stage, batch),)
        after = (Task(kind, stage + 1, batch),) if stage + 1 < self.stages else ()
        return (Task("F", stage, batch), *after)


def _passes(kind: Kind, stage: int, batches: int) -> list[Task]:
    return [Task(kind, stage, batch) for batch in range(batches)]


def naive(ranks: int, batches: int) -> Schedule:
    """One micro-batch after the other through all stages and back: one rank works, the others wait."""
    at_least(1, ranks=ranks, batches=batches)
    kinds: tuple[Kind, ...] = ("F", "B")  # the first stage begins no other before the gradient is back
    tables = (tuple(Task(kind, s, b) for b in range(batches) for kind in kinds) for s in range(ranks))
    return Schedule("naive", ranks, batches, tuple(tables))


def gpipe(ranks: int, batches: int) -> Schedule:
    """All forward passes, then all backward passes. Source: Huang et al. 2018, arXiv:1811.06965."""
    at_least(1, ranks=ranks, batches=batches)
    tables = (_passes("F", s, batches) + _passes("B", s, batches) for s in range(ranks))
    return Schedule("gpipe", ranks, batches, tuple(map(tuple, tables)))


def one_f_one_b(ranks: int, batches: int) -> Schedule:
    """A backward pass as soon as one is possible, then always one forward and one backward pass in turns.

    Rank r of p begins with p - r - 1 forward passes, as many as a micro-batch needs to come back to it; from then on
    each backward pass frees what the next forward pass will hold. Source: PipeDream-Flush, arXiv:2006.09503.
    """
    at_least(1, ranks=ranks, batches=batches)
    tables = []
    for rank in range(ranks):
        ahead = min(ranks - rank - 1, batches)
        tables.append(tuple(_in_turns(_passes("F", rank, batches), _passes("B", rank, batches), ahead)))
    return Schedule("one_f_one_b", ranks, batches, tuple(tables))


def _in_turns(forward: list[Task], backward: list[Task], ahead: int) -> Iterator[Task]:
    """``ahead`` forward passes, then one of each in turns, then the backward passes that are left."""
    yield from forward[:ahead]
    for f, b in zip(forward[ahead:], backward, strict=False):
        yield f
        yield b
    yield from backward[len(forward) - ahead :]


def interleaved(ranks: int, batches: int, chunks: int = 2) -> Schedule:
    """``chunks`` stages on each rank, stage s on rank s mod p, so that a micro-batch passes each rank several times.

    The ramps at both ends are of smaller stages, so the bubble is ``chunks`` times as small; the messages are
    ``chunks`` times as many. Micro-batches go in groups of p, each group through all of a rank's stages in order.

    Raises
    ------
    ValueError : ``batches`` is no multiple of ``ranks``, or an argument is below 1.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2.
    """
    at_least(1, ranks=ranks, batches=batches, chunks=chunks)
    require("batches", batches, lambda m: m % ranks == 0, f"a multiple of ranks={ranks}")
    tables = []
    for rank in range(ranks):
        order = [(chunk, batch) for group in range(0, batches, ranks) for chunk in range(chunks)
                 for batch in range(group, group + ranks)]  # fmt: skip
        forward = [Task("F", chunk * ranks + rank, batch) for chunk, batch in order]
        backward = [Task("B", (chunks - 1 - chunk) * ranks + rank, batch) for chunk, batch in order]
        ahead = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, len(order))
        tables.append(tuple(_in_turns(forward, backward, ahead)))
    return Schedule("interleaved", ranks * chunks, batches, tuple(tables))


def zero_bubble(ranks: int, batches: int) -> Schedule:
    """Backward passes cut in two: the next rank waits only for the inputs' half (I), the weights' half fills gaps (W).

    As 1F1B, but with I for B, and rank r computes the gradients of its weights r micro-batches later: the later a rank
    comes in the pipeline, the fewer micro-batches it holds for 1F1B, so there is room. Every rank then holds p
    (a micro-batch is held until its W), and work for the end, when 1F1B would wait. The paper's ZB-H1.

    Source: Qi et al. 2023, arXiv:2401.10241, section 2.
    """
    at_least(1, ranks=ranks, batches=batches)
    tables = (_with_late_weights(r, batches, ahead=ranks - r - 1, late=r) for r in range(ranks))
    return Schedule("zero_bubble", ranks, batches, tuple(tables))


def zero_bubble_h2(ranks: int, batches: int) -> Schedule:
    """Twice as many micro-batches ahead and twice as late: once a rank has begun it does not wait until it ends.

    For 2p - 1 micro-batches or more. They begin and end one after the other, so a step lasts no longer than the work
    (`Timeline.period`) only if no rank waits for the others between two steps. Every rank holds 2p - 1 micro-batches.

    Source: Qi et al. 2023, arXiv:2401.10241, section 2 (ZB-H2).
    """
    at_least(1, ranks=ranks, batches=batches)
    tables = (_with_late_weights(r, batches, ahead=2 * (ranks - r - 1), late=2 * r) for r in range(ranks))
    return Schedule("zero_bubble_h2", ranks, batches, tuple(tables))


def _with_late_weights(rank: int, batches: int, *, ahead: int, late: int) -> tuple[Task, ...]:
    """``ahead`` forward passes; then F, I and the W of ``late`` micro-batches before in turns, as far as there are."""
    f, i, w = (_passes(kind, rank, batches) for kind in ("F", "I", "W"))
    tasks = f[:ahead]
    for batch in range(batches):
        tasks += f[batch + ahead :][:1] + [i[batch]] + ([w[batch - late]] if batch >= late else [])
    return tuple(tasks + w[max(batches - late, 0) :])


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "naive": naive,
    "gpipe": gpipe,
    "one_f_one_b": one_f_one_b,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}

# --- Time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds of a micro-batch in one stage, the same for all stages or one number for each.

    Attributes
    ----------
    forward : the forward pass.
    inputs, weights : the two halves of the backward pass, together that of a whole one.
    send : from the end of a task until its result is there at another rank.
    """

    forward: float | Sequence[float] = 1.0
    inputs: float | Sequence[float] = 1.0
    weights: float | Sequence[float] = 1.0
    send: float = 0.0

    def of(self, task: Task) -> float:
        """Seconds of a task."""
        f, i, w = (_at(cost, task.stage) for cost in (self.forward, self.inputs, self.weights))
        return {"F": f, "B": i + w, "I": i, "W": w}[task.kind]


def _at(cost: float | Sequence[float], stage: int) -> float:
    found = cost[stage] if isinstance(cost, Sequence) else cost
    require("costs", found, lambda t: is_number(t) and t >= 0, "numbers of seconds, 0 or more")
    return found


class Span(NamedTuple):
    """A task of a rank, from when to when it runs (seconds)."""

    rank: int
    task: Task
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When each task of a schedule runs."""

    spans: tuple[Span, ...] = field(repr=False)
    ranks: int

    @property
    def makespan(self) -> float:
        """Seconds from the first task's start to the last one's end, over all ranks."""
        return max(span.end for span in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """Seconds in which each rank computes."""
        return tuple(math.fsum(s.end - s.start for s in self.spans if s.rank == rank) for rank in range(self.ranks))

    @property
    def bubble(self) -> float:
        """The share of all ranks' time, from the first start to the last end, in which they wait."""
        return 1 - math.fsum(self.busy) / (self.ranks * self.makespan)

    @property
    def period(self) -> float:
        """Seconds from step to step if no rank waits for the others between them: the longest of the ranks' spans."""
        own = [[span for span in self.spans if span.rank == rank] for rank in range(self.ranks)]
        return max(max(s.end for s in spans) - min(s.start for s in spans) for spans in own)


def timeline(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Let every rank do its tasks in their order, each as soon as what it needs has arrived.

    Raises
    ------
    ValueError : tasks wait for one another for ever; the message names the first of each rank.
    """
    costs, ended, spans = costs or Costs(), dict[Task, Span](), list[Span]()
    todo = [list(reversed(rank)) for rank in schedule.ranks]
    while any(todo):
        ready = [n for n, tasks in enumerate(todo) if tasks and all(t in ended for t in schedule.needs(tasks[-1]))]
        if not ready:
            stuck = [str(tasks[-1]) for tasks in todo if tasks]
            raise ValueError(f"ranks={stuck}: must be tasks in an order that can run; these wait for one another")
        for rank in ready:
            task = todo[rank].pop()
            free = max((span.end for span in spans if span.rank == rank), default=0.0)
            arrived = [ended[t].end + costs.send * (ended[t].rank != rank) for t in schedule.needs(task)]
            start = max([free, *arrived])
            ended[task] = Span(rank, task, start, start + costs.of(task))
            spans.append(ended[task])
    return Timeline(tuple(spans), len(schedule.ranks))


# --- Memory -----------------------------------------------------------------------------------------------------------


def in_flight(schedule: Schedule) -> tuple[int, ...]:
    """How many activations each rank holds at most: stages of micro-batches after F and before the end of B or W."""
    most = []
    for tasks in schedule.ranks:
        held, peak = 0, 0
        for task in tasks:
            held += {"F": 1, "I": 0, "B": -1, "W": -1}[task.kind]
            peak = max(peak, held)
        most.append(peak)
    return tuple(most)


# --- In closed form ---------------------------------------------------------------------------------------------------


def bubble_formula(name: str, ranks: int, batches: int, *, chunks: int = 2) -> float:
    r"""The idle share of all ranks' time, for equal stages and messages that take no time.

    With p ranks, m micro-batches, v stages a rank:

    .. math:: \text{naive}\; 1-\tfrac1p, \qquad \text{GPipe, 1F1B}\; \frac{p-1}{m+p-1}, \qquad
        \text{interleaved}\; \frac{p-1}{vm+p-1}, \qquad \text{zero bubble}\; \frac{p-1}{3m+p-1}

    The last for m of at least p and F, I and W of the same length: the ramps then cost one of them a rank, not three.
    """
    at_least(1, ranks=ranks, batches=batches, chunks=chunks)
    require("name", name, lambda n: n in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    if name == "naive":
        return 1 - 1 / ranks
    times = {"interleaved": chunks, "zero_bubble": 3}.get(name, 1)
    return (ranks - 1) / (times * batches + ranks - 1)


def in_flight_formula(name: str, ranks: int, batches: int, rank: int, *, chunks: int = 2) -> int:
    r"""Stages of micro-batches that rank r holds at most.

    .. math:: \text{naive}\; 1, \quad \text{GPipe}\; m, \quad \text{1F1B}\; \min(p-r,\,m), \quad
        \text{interleaved}\; \min(2(p-r-1)+(v-1)p+1,\,vm), \quad \text{zero bubble}\; \min(p,\,m)
    """
    at_least(1, ranks=ranks, batches=batches, chunks=chunks)
    require("rank", rank, lambda r: r in range(ranks), f"from 0 to {ranks - 1}")
    require("name", name, lambda n: n in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    return {
        "naive": 1,
        "gpipe": batches,
        "one_f_one_b": min(ranks - rank, batches),
        "interleaved": min(2 * (ranks - rank - 1) + (chunks - 1) * ranks + 1, chunks * batches),
        "zero_bubble": min(ranks, batches),
    }[name]
