"""What a study measured, by the names of its arms: the number is read from the recorded rows whenever it is asked for.

==============  =======================================================================================
``Points``      the difference of two arms in points: of accuracy, say
``Times``       how many times less one arm needs than another: seconds, bytes, steps
``Best``        the best of several arms, or numbers, in the eyes of seeds that are not reported
``FromCurve``   a number that is read from a run's curves: where a rule would have stopped it
``verdict``     whether a measured number shows a gain, a loss, or neither
==============  =======================================================================================

Both pair their runs by seed, and both refuse what other code found (``StudyOutdated``): an arm that is asked for is
checked, the others of its part are not, which takes seconds for a whole chapter's findings and not a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

import numpy as np

from course_lib.lab.arguments import require
from course_lib.lab.experiments import Interval, mean_interval
from course_lib.lab.studies import Recorded, Study, declared, read, study_file
from course_lib.lab.training import History

VERDICTS = ("gain", "loss", "cannot be told")

BySeed = dict[int, float]


@dataclass(frozen=True)
class Best:
    """One of several, chosen by seeds that are left out of what is reported.

    Attributes
    ----------
    options : arms, where it stands for an arm; numbers that a run measured, where it stands for such a number.
    seeds : those that choose, by their mean.
    by : the number that they choose by; None for the one that is reported.
    lowest : whether the lowest mean is the best.
    on : the arm that they look at, where that is another one than is reported: all seeds are reported then.
    """

    options: tuple[str, ...]
    seeds: tuple[int, ...]
    by: str | None = None
    lowest: bool = False
    on: str | None = None


@dataclass(frozen=True)
class FromCurve:
    """A number that ``read`` takes from the curves of a run; ``beside`` is a number that the same runs measured."""

    read: Callable[[History], float]
    beside: str


Number = str | Best | FromCurve | None
"""Which of a run's numbers: its name, a choice among several, one of its curves; None where it measured only one."""

SAME = "the same"
"""For ``other_of``: the same number as ``of``."""


class Measured(Hashable, Protocol):
    """A number with an interval over seeds, and words for it."""

    @property
    def interval(self) -> Interval:
        """Mean and 95% interval over seeds."""

    @property
    def nothing(self) -> float:
        """The value that says that the arms are equal."""

    @property
    def what(self) -> str:
        """What is counted."""

    @property
    def caption(self) -> str:
        """On what, how often, how long, on which machine: as the study's table says it."""

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class _Pair:
    """Two arms of one study, and the number that is compared.

    Attributes
    ----------
    chapter, part : of the study; ``other_part`` where the other arm stands in another part.
    arm, other : their names, or ``Best`` of several.
    of : which number, where a run measured several; ``other_of`` the other arm's, by default the same.
    what : what is counted, as the words after the number.
    leave_out : seeds that are not reported, since they chose something.
    """

    chapter: str
    part: str
    arm: str | Best
    other: str | Best
    of: Number = None
    other_part: str | None = None
    other_of: Number = SAME
    what: str = ""
    leave_out: tuple[int, ...] = ()

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """The two arms' numbers ``[seeds]``, of the seeds that both have.

        Raises
        ------
        ValueError : there is no such study, part, arm or number, or fewer than two seeds are in both.
        StudyOutdated : the rows were found by other code, or some are missing.
        """
        mine = by_seed(self.chapter, self.part, self.arm, self.of)
        other_of = self.of if self.other_of == SAME else self.other_of
        theirs = by_seed(self.chapter, self.other_part or self.part, self.other, other_of)
        seeds = [seed for seed in mine if seed in theirs and seed not in self.leave_out]
        require("seeds", seeds, lambda both: len(both) > 1, "at least two that both arms report")
        return np.array([mine[seed] for seed in seeds]), np.array([theirs[seed] for seed in seeds])

    @property
    def caption(self) -> str:
        """On what, how often, how long, on which machine: as the study's table says it."""
        arm = self.arm.options[0] if isinstance(self.arm, Best) else self.arm
        return _recorded(self.chapter, self.part, arm, _name(self.of)).caption


@dataclass(frozen=True)
class Points(_Pair):
    """``arm`` minus ``other``, times 100, paired by seed; above zero is good.

    ``lower`` : whether less is better, as with a calibration error; the difference is then ``other`` minus ``arm``.
    """

    what: str = "points of accuracy"
    lower: bool = False

    nothing = 0.0

    @property
    def interval(self) -> Interval:
        """Mean and 95% interval of the difference."""
        mine, theirs = self.values()
        return mean_interval(100 * (theirs - mine if self.lower else mine - theirs))

    def __str__(self) -> str:
        found = self.interval
        return f"{_signed(found.mean)} [{_signed(found.low)}, {_signed(found.high)}] {self.what}".rstrip()


@dataclass(frozen=True)
class Times(_Pair):
    """What ``other`` needs over what ``arm`` needs, paired by seed; above one is good.

    The mean is the geometric one: the interval is taken on the logarithms and taken back, since a ratio's errors are
    lopsided. ``unit`` and ``other_unit`` multiply the numbers: the examples in a step, say.
    """

    what: str = "times less"
    unit: float = 1.0
    other_unit: float = 1.0

    nothing = 1.0

    @property
    def interval(self) -> Interval:
        """Geometric mean and 95% interval of the ratio."""
        mine, theirs = self.values()
        found = mean_interval(np.log(theirs * self.other_unit / (mine * self.unit)))
        return Interval(math.exp(found.mean), math.exp(found.low), math.exp(found.high), found.n)

    def __str__(self) -> str:
        found = self.interval
        spread = f" [{_ratio(found.low)}, {_ratio(found.high)}]" if found.high / found.low > 1.001 else ""
        return f"{_ratio(found.mean)}{spread} {self.what}".rstrip()


def verdict(measured: Measured) -> str:
    """One of ``VERDICTS``: a gain or a loss if the interval lies wholly on that side of "the arms are equal"."""
    found = measured.interval
    if found.low > measured.nothing:
        return "gain"
    return "loss" if found.high < measured.nothing else "cannot be told"


def by_seed(chapter: str, part: str, arm: str | Best, of: Number = None) -> BySeed:
    """The number of an arm for each seed that is reported.

    Raises
    ------
    ValueError : there is no such study, part, arm or number.
    StudyOutdated : the rows were found by other code, or some are missing.
    """
    if isinstance(arm, Best):
        return _without(by_seed(chapter, part, _chosen_arm(chapter, part, arm, of), of), arm)
    if isinstance(of, Best):
        return _without(by_seed(chapter, part, arm, _chosen_number(chapter, part, arm, of)), of)
    if isinstance(of, FromCurve):
        runs = _recorded(chapter, part, arm, of.beside)
        return {seed: of.read(history) for seed, history in zip(runs.seeds, runs.histories[arm], strict=True)}
    runs = _recorded(chapter, part, arm, of)
    require("of", of, lambda _: arm in runs.values, f"a number that {arm!r} measured")
    return dict(zip(runs.seeds, runs.values[arm].tolist(), strict=True))


def _chosen_arm(chapter: str, part: str, best: Best, of: Number) -> str:
    by = best.by or of
    return _first(best, {arm: by_seed(chapter, part, arm, by) for arm in best.options})


def _chosen_number(chapter: str, part: str, arm: str, best: Best) -> str:
    looked_at = best.on or arm
    return _first(best, {of: by_seed(chapter, part, looked_at, of) for of in best.options})


def _first(best: Best, found: dict[str, BySeed]) -> str:
    means = {option: np.mean([values[seed] for seed in best.seeds]) for option, values in found.items()}
    sign = -1 if best.lowest else 1
    # A run that diverged, or never arrived, is no candidate
    return max(means, key=lambda option: sign * means[option] if math.isfinite(means[option]) else -math.inf)


def _without(values: BySeed, best: Best) -> BySeed:
    return values if best.on else {seed: value for seed, value in values.items() if seed not in best.seeds}


def _name(of: Number) -> str | None:
    if isinstance(of, Best):
        return of.options[0]
    return of.beside if isinstance(of, FromCurve) else of


@cache
def _recorded(chapter: str, part: str, arm: str, of: str | None) -> Recorded:
    study = _with_one_arm(chapter, part, arm)
    return read(study, study_file(study.chapter), part, of)


@cache
def _with_one_arm(chapter: str, part: str, arm: str) -> Study:
    """The study with nothing else in it: only what is asked for is checked, as fingerprints take time."""
    study = declared(chapter)
    require("part", part, lambda name: name in study.parts, f"one of {', '.join(map(repr, study.parts))}")
    whole = study.parts[part]
    require("arm", arm, lambda name: name in whole.arms, f"one of {', '.join(map(repr, whole.arms))}")
    return replace(study, parts={part: replace(whole, arms={arm: whole.arms[arm]})})


def _signed(points: float) -> str:
    """One decimal, with a sign; what rounds to zero has none."""
    return "0.0" if abs(points) < 0.05 else f"{points:+.1f}".replace("-", "−")


def _ratio(times: float) -> str:
    return f"{times:.0f}" if times >= 100 else f"{times:.3g}"
