r"""Successive halving: many runs for a short time, the best of them for longer, the best of those for longer still.

============================  =============================================================  =======================
name                          what it does                                                   source
============================  =============================================================  =======================
``SuccessiveHalving``         the best 1/η of each rung go on to η times as many epochs      Jamieson & Talwalkar
                                                                                             2015, arXiv:1502.07943
``Hyperband``                 that from several starts: many briefly, few for long           Li et al. 2016,
                                                                                             arXiv:1603.06560
``Asha``                      promotes as soon as it can, so that no worker waits            Li et al. 2018,
                                                                                             arXiv:1810.05934
``hyperband_brackets``        which runs for how long, as a table
``replay_runs``               what a rule would have done with recorded curves
============================  =============================================================  =======================

A rule makes a *plan*: a generator that says which jobs may be started and asks for the values that it needs next. The
same plan is driven by recorded curves (``replay_runs``) or by training (``search``).

``Asha`` decides by a clock that counts epochs instead of seconds: its workers all train at one pace, and what is
finished first does not depend on the machine. So the same call gives the same table everywhere, with any number of
processes.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from course_lib.early_stopping.runs import Mode, badness, check_mode
from course_lib.lab.arguments import at_least, require


class Rung(NamedTuple):
    """So many configurations, each trained to so many epochs in all."""

    configs: int
    epochs: int


class Job(NamedTuple):
    """A configuration to be trained to so many epochs in all; it has been trained to the rung below before."""

    bracket: int
    config: str
    rung: int
    epochs: int


class Request(NamedTuple):
    """Jobs that may be started now, and the one whose value the plan needs to go on."""

    start: tuple[Job, ...]
    need: Job


Plan = Generator[Request, float, None]
"""Yields requests, is sent values."""


class HalvingRule(Protocol):
    """What ``replay_runs`` and ``search`` take."""

    def plan(self, configs: Sequence[str], mode: Mode) -> Plan:
        """Return the plan for these configurations."""

    @property
    def milestones(self) -> tuple[int, ...]:
        """The epochs at which a run may be ended, rising."""


# --- Rungs and brackets -----------------------------------------------------------------------------------------------


def rungs_of(configs: int, epochs: Sequence[int], reduction_factor: int) -> tuple[Rung, ...]:
    r"""Return :math:`n_i=\max(1,\lfloor n\,\eta^{-i}\rfloor)` configurations for each of the ``epochs``."""
    return tuple(Rung(max(1, configs // reduction_factor**i), r) for i, r in enumerate(epochs))


def rung_epochs(min_resource: int, max_resource: int, reduction_factor: int) -> tuple[int, ...]:
    r"""Return :math:`r\,\eta^i` up to ``max_resource``."""
    epochs = [min_resource]
    while epochs[-1] * reduction_factor <= max_resource:
        epochs.append(epochs[-1] * reduction_factor)
    return tuple(epochs)


def table_size(bracket: int, largest: int, reduction_factor: int) -> int:
    r"""Return :math:`\lfloor\frac{s_{\max}+1}{s+1}\rfloor\,\eta^s` configurations for bracket s, as in Table 1."""
    return (largest + 1) // (bracket + 1) * reduction_factor**bracket


def formula_size(bracket: int, largest: int, reduction_factor: int) -> int:
    r"""Return :math:`\lceil\frac{s_{\max}+1}{s+1}\,\eta^s\rceil`, as in the paper's Algorithm 1 and in Optuna."""
    return -(-(largest + 1) * reduction_factor**bracket // (bracket + 1))


@dataclass(frozen=True)
class Bracket:
    """One run of successive halving: its number s, and its rungs."""

    number: int
    rungs: tuple[Rung, ...]


def hyperband_brackets(
    max_resource: int,
    reduction_factor: int = 3,
    min_resource: int = 1,
    *,
    size: Callable[[int, int, int], int] = table_size,
) -> tuple[Bracket, ...]:
    r"""Return the brackets of Hyperband, the one with the most configurations first.

    Bracket s, from :math:`s_{\max}=\lfloor\log_\eta(R/r)\rfloor` down to 0, has its rungs at
    :math:`r_i=\lfloor R\,\eta^{i-s}\rfloor` epochs with :math:`n_i=\lfloor n\,\eta^{-i}\rfloor` configurations. For n
    the paper has two answers. Table 1 (81, 27, 9, 6 and 5 for R = 81, η = 3) and the authors' code have
    ``table_size``, Algorithm 1 has ``formula_size`` (81, 34, 15, 8 and 5).
    Source: Li et al. 2016, arXiv:1603.06560.

    Raises
    ------
    ValueError : an argument is out of its range.
    """
    _check(min_resource, max_resource, reduction_factor)
    largest = len(rung_epochs(min_resource, max_resource, reduction_factor)) - 1
    brackets = []
    for s in range(largest, -1, -1):
        epochs = [max_resource // reduction_factor ** (s - i) for i in range(s + 1)]
        brackets.append(Bracket(s, rungs_of(size(s, largest, reduction_factor), epochs, reduction_factor)))
    return tuple(brackets)


# --- Rules ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SuccessiveHalving:
    r"""Train all configurations to ``min_resource`` epochs, the best 1/η of them to η times as many, and so on.

    The rungs end with the last that is not above ``max_resource``; one configuration at least goes all the way.

    Raises
    ------
    ValueError : an argument is out of its range.
    """

    min_resource: int
    max_resource: int
    reduction_factor: int = 3

    def __post_init__(self) -> None:
        _check(self.min_resource, self.max_resource, self.reduction_factor)

    @property
    def milestones(self) -> tuple[int, ...]:
        """The epochs of the rungs."""
        return rung_epochs(self.min_resource, self.max_resource, self.reduction_factor)

    def plan(self, configs: Sequence[str], mode: Mode) -> Plan:
        """Return the plan for these configurations."""
        rungs = rungs_of(len(configs), self.milestones, self.reduction_factor)
        return _halve(configs, Bracket(len(rungs) - 1, rungs), mode)


@dataclass(frozen=True)
class Hyperband:
    """Successive halving from several starts, since nobody knows how early a good run can be told from a bad one.

    Each bracket takes the next of the configurations, ``needed`` in all. ``size`` is as in ``hyperband_brackets``.

    Raises
    ------
    ValueError : an argument is out of its range.
    """

    max_resource: int
    reduction_factor: int = 3
    min_resource: int = 1
    size: Callable[[int, int, int], int] = table_size

    def __post_init__(self) -> None:
        _check(self.min_resource, self.max_resource, self.reduction_factor)

    @property
    def brackets(self) -> tuple[Bracket, ...]:
        """What is trained, and for how long."""
        return hyperband_brackets(self.max_resource, self.reduction_factor, self.min_resource, size=self.size)

    @property
    def needed(self) -> int:
        """The number of configurations of all brackets."""
        return sum(bracket.rungs[0].configs for bracket in self.brackets)

    @property
    def milestones(self) -> tuple[int, ...]:
        """The epochs of the rungs of all brackets."""
        return tuple(sorted({rung.epochs for bracket in self.brackets for rung in bracket.rungs}))

    def plan(self, configs: Sequence[str], mode: Mode) -> Plan:
        """Return the plan for these configurations.

        Raises
        ------
        ValueError : there are not exactly ``needed`` of them.
        """
        require("configs", len(configs), lambda n: n == self.needed, f"{self.needed} of them, for all brackets")
        return self._plan(configs, mode)

    def _plan(self, configs: Sequence[str], mode: Mode) -> Plan:
        taken = 0
        for bracket in self.brackets:
            own = configs[taken : taken + bracket.rungs[0].configs]
            taken += len(own)
            yield from _halve(own, bracket, mode)


@dataclass(frozen=True)
class Asha:
    """Promote a run as soon as it is among the best 1/η of its rung; start the next configuration if there is none.

    A run can be called back long after it was left. ``concurrent`` runs are trained at a time: this is part of the
    rule, since what is known at a decision depends on it; the processes of ``search`` are another matter.

    Raises
    ------
    ValueError : an argument is out of its range.
    """

    min_resource: int
    max_resource: int
    reduction_factor: int = 3
    concurrent: int = 4

    def __post_init__(self) -> None:
        _check(self.min_resource, self.max_resource, self.reduction_factor)
        at_least(1, concurrent=self.concurrent)

    @property
    def milestones(self) -> tuple[int, ...]:
        """The epochs of the rungs."""
        return rung_epochs(self.min_resource, self.max_resource, self.reduction_factor)

    def plan(self, configs: Sequence[str], mode: Mode) -> Plan:
        """Return the plan for these configurations."""
        check_mode(mode)
        waiting = deque(configs)
        rungs: list[dict[str, float]] = [{} for _ in self.milestones]
        promoted: list[set[str]] = [set() for _ in self.milestones]
        running: list[tuple[int, int, Job]] = []  # by the epoch of the clock at which each ends
        clock, started = 0, 0
        while True:
            start = []
            while len(running) < self.concurrent and (job := self._next(waiting, rungs, promoted)):
                done = self.milestones[job.rung - 1] if job.rung else 0
                heapq.heappush(running, (clock + job.epochs - done, started, job))
                started += 1
                start.append(job)
            if not running:
                return
            clock, _, job = heapq.heappop(running)
            value = yield Request(tuple(start), job)
            rungs[job.rung][job.config] = badness(value, mode)

    def _next(self, waiting: deque[str], rungs: list[dict[str, float]], promoted: list[set[str]]) -> Job | None:
        """The paper's ``get_job``: a promotion, from the highest rung that has one, or a new configuration."""
        for k in range(len(rungs) - 2, -1, -1):
            for config in promotable(rungs[k], promoted[k], self.reduction_factor):
                promoted[k].add(config)
                return Job(0, config, k + 1, self.milestones[k + 1])
        return Job(0, waiting.popleft(), 0, self.milestones[0]) if waiting else None


def promotable(rung: Mapping[str, float], promoted: set[str], reduction_factor: int) -> list[str]:
    r"""Return who of a rung may go on: among its best :math:`\lfloor|\text{rung}|/\eta\rfloor`, and not yet promoted.

    ``rung`` maps configurations to how bad they were; of two that are alike the first to come is the better.
    """
    top = sorted(rung, key=lambda config: rung[config])[: len(rung) // reduction_factor]
    return [config for config in top if config not in promoted]


def _halve(configs: Sequence[str], bracket: Bracket, mode: Mode) -> Plan:
    check_mode(mode)
    left = list(configs)
    for i, rung in enumerate(bracket.rungs):
        if i:  # stable: of two that are alike the first stays
            left = sorted(left, key=lambda config: found[config])[: rung.configs]
        jobs = tuple(Job(bracket.number, config, i, rung.epochs) for config in left)
        found: dict[str, float] = {}
        for k, job in enumerate(jobs):
            value = yield Request(jobs if not k else (), job)
            found[job.config] = badness(value, mode)


def _check(min_resource: int, max_resource: int, reduction_factor: int) -> None:
    at_least(1, min_resource=min_resource)
    at_least(2, reduction_factor=reduction_factor)
    at_least(min_resource, max_resource=max_resource)
