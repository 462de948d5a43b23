"""What a rule for whole runs did: on recorded curves here, on real runs in ``search``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from course_lib.early_stopping.halving import HalvingRule, Job, Plan
from course_lib.early_stopping.runs import Curve, Mode, badness, check_mode
from course_lib.lab.arguments import require


class Done(NamedTuple):
    """A job, the epochs that were trained for it, the value it came to, and whether the run diverged."""

    job: Job
    spent: int
    value: float
    diverged: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a rule did with its configurations, job by job, in the order in which they were finished."""

    jobs: tuple[Done, ...]
    mode: Mode

    @property
    def epochs(self) -> int:
        """Trained in all; a promoted run goes on where it was left."""
        return sum(done.spent for done in self.jobs)

    @property
    def best(self) -> Done:
        """The job with the best value seen; of several, the one that was trained for longest."""
        return min(self.jobs, key=lambda done: (badness(done.value, self.mode), -done.job.epochs))

    def table(self) -> pd.DataFrame:
        """One row a job: ``bracket``, ``config``, ``rung``, ``epochs`` in all and ``spent`` on it, ``value``."""
        rows = [done.job._asdict() | done._asdict() for done in self.jobs]
        columns = ["bracket", "config", "rung", "epochs", "spent", "value", "diverged"]
        return pd.DataFrame(rows, columns=columns)


def follow(plan: Plan, start: Callable[[Job], None], finish: Callable[[Job], float]) -> None:
    """Drive a plan to its end: ``start`` what may be started, and let ``finish`` give the value that is needed."""
    try:
        request = next(plan)
        while True:
            for job in request.start:
                start(job)
            request = plan.send(finish(request.need))
    except StopIteration:
        return


def replay_runs(curves: Mapping[str, Curve], rule: HalvingRule, *, mode: Mode = "max") -> Outcome:
    """Return what ``rule`` would have done with configurations whose whole curves are known, one value an epoch.

    Raises
    ------
    ValueError : no curves, one that is shorter than the rule's last milestone, or not as many as the rule needs.
    """
    require("curves", len(curves), lambda n: n > 0, "at least one")
    check_mode(mode)
    last = rule.milestones[-1]
    require("curves", {k: len(c) for k, c in curves.items()}, lambda n: min(n.values()) >= last, f"of {last} epochs")
    reached = dict.fromkeys(curves, 0)
    jobs = []

    def finish(job: Job) -> float:
        value = float(curves[job.config][job.epochs - 1])
        jobs.append(Done(job, job.epochs - reached[job.config], value))
        reached[job.config] = job.epochs
        return value

    follow(rule.plan(list(curves), mode), lambda job: None, finish)
    return Outcome(tuple(jobs), mode)
