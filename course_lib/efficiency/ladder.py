r"""The ladder: changes made one after the other, and what each of them brings, alone and with the others.

=======================  =============================================================================================
name                     what it gives
=======================  =============================================================================================
``Rung``                 a change: from a setting to a faster one
``climb``                rungs upon rungs: the first alone, the first two, … all
``ablate``               all rungs, and all but each
``alone``                each rung by itself, and all together
``Rounds``               what they measure: seconds of each arm in each round, with ratios, tables and a plot
``timed``                seconds of a step as a ``measure``: built once, warmed up, the device synchronised
``log_ratio``            how many times as fast, with a 95% interval, from the rounds' own ratios
``product_of_singles``   what the rungs bring alone, multiplied, against what they bring together
=======================  =============================================================================================

Speed multiplies: a rung that halves the time of a step and one that takes a third off make it a third. So everything is
reckoned with logarithms of ratios. A ratio is taken within a round, in which every arm runs once, in an order drawn
anew: what slows the machine down for a while slows all of them. The interval is Student's over the rounds' logarithms;
it speaks of this machine on this afternoon. Rungs *interact* when what they bring together is not the product: two that
mend the same thing bring less, one that makes room for the other brings more (Amdahl 1967, AFIPS 30: what was small
beside the rest becomes large once the rest is gone).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes

from course_lib.lab import plotting, runtime
from course_lib.lab.arguments import at_least, require
from course_lib.lab.experiments import mean_interval
from course_lib.lab.timing import _no_garbage_collection, _seconds

T = TypeVar("T")
Clock = Callable[[], float]
Measure = Callable[[T], float]
"""A setting -> the seconds of one step with it."""

BASE, ALL = "base", "all"


@dataclass(frozen=True)
class Rung(Generic[T]):
    """A change that may make a step faster.

    Attributes
    ----------
    name : as it stands in tables.
    apply : a setting -> the changed one; the setting itself stays as it is.
    """

    name: str
    apply: Callable[[T], T]


# --- Arithmetic -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speedup:
    """How many times as fast: ``ratio`` (the geometric mean over rounds) with its interval, ``low`` to ``high``.

    ``median`` and the quartiles ``lower`` and ``upper`` are those of the rounds' own ratios.
    """

    ratio: float
    low: float
    high: float
    median: float
    lower: float
    upper: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}]"

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1, which is no change."""
        return self.low > 1 or self.high < 1


def log_ratio(
    before: np.ndarray,
    after: np.ndarray,
    confidence: float = 0.95,
) -> Speedup:
    r"""Return how many times as fast the second is as the first, paired by round.

    .. math:: \exp\Big( \bar d \pm t_{n-1} \frac{s_d}{\sqrt n} \Big), \qquad
        d_i = \ln \frac{before_i}{after_i}

    Parameters
    ----------
    before, after : seconds ``[rounds]``, above 0.

    Raises
    ------
    ValueError : fewer than two rounds, different numbers of them, or times of 0.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    same = f"as many rounds as before, {before.shape}"
    require("after", after.shape, lambda shape: shape == np.shape(before), same)
    least = float(min(before.min(), after.min()))
    require("the least of the seconds", least, lambda seconds: seconds > 0, "above 0")
    return _speedup(np.log(before / after), confidence)


def _speedup(logs: np.ndarray, confidence: float = 0.95) -> Speedup:
    """From the rounds' logarithms ``[rounds]``."""
    found = mean_interval(logs, confidence)
    lower, median, upper = map(float, np.exp(np.quantile(logs, (0.25, 0.5, 0.75))))
    middle, low, high = map(float, np.exp((found.mean, found.low, found.high)))
    return Speedup(middle, low, high, median, lower, upper, len(logs))


@dataclass(frozen=True)
class Rounds:
    """Seconds of several arms, measured in turns.

    Attributes
    ----------
    arms : their names.
    seconds : ``[rounds, arms]``.
    kind : ``"climb"``, ``"ablate"`` or ``"alone"``: what the arms are.
    """

    arms: tuple[str, ...]
    seconds: np.ndarray
    kind: str = ""

    def of(self, arm: str) -> np.ndarray:
        """Seconds of an arm, ``[rounds]``.

        Raises
        ------
        ValueError : there is none of that name.
        """
        require("arm", arm, lambda name: name in self.arms, f"one of {', '.join(self.arms)}")
        return self.seconds[:, self.arms.index(arm)]

    def speedup(self, arm: str, over: str | None = None) -> Speedup:
        """How many times as fast an arm is as another, the first by default."""
        return log_ratio(self.of(over or self.arms[0]), self.of(arm))

    def gain(self, arm: str) -> Speedup:
        """What the arm's own rung brings: over the arm before it (climb), over the base (alone), or how much faster all
        are than without it (ablate). The first arm's is 1.
        """
        place = self.arms.index(arm) if arm in self.arms else -1
        if self.kind == "ablate":
            return log_ratio(self.of(arm), self.of(self.arms[0]))
        return self.speedup(arm, self.arms[max(place - 1, 0)] if self.kind == "climb" else None)

    def table(self) -> pd.DataFrame:
        """One row an arm: the median of its ``seconds``; ``speedup`` over the first arm and what its own rung brings
        (``gain``), each with the ends of its 95% interval.
        """
        rows = {}
        for arm in self.arms:
            whole, own = self.speedup(arm), self.gain(arm)
            rows[arm] = {
                "seconds": float(np.median(self.of(arm))),
                "speedup": whole.ratio,
                "speedup_low": whole.low,
                "speedup_high": whole.high,
                "gain": own.ratio,
                "gain_low": own.low,
                "gain_high": own.high,
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(self.kind or "arm")

    def plot(self, ax: Axes | None = None, *, title: str = "") -> Axes:
        """Draw a bar for each arm: its speed-up over the first and the 95% interval; without a rung, what that costs.

        For ``ablate`` the bars are the gains: how much each rung is worth beside all the others.
        """
        ax = ax if ax is not None else plt.subplots(figsize=(6.4, 1.1 + 0.32 * len(self.arms)))[1]
        shown = [(self.gain if self.kind == "ablate" else self.speedup)(arm) for arm in self.arms]
        ratios = np.array([each.ratio for each in shown])
        reach = [ratios - [each.low for each in shown], [each.high for each in shown] - ratios]
        ax.barh(range(len(shown)), ratios, color=plotting.PALETTE[5], height=0.6)
        ax.errorbar(ratios, range(len(shown)), xerr=reach, fmt="none", color=plotting.INK, capsize=3)
        ax.axvline(1, color=plotting.FAINT, linewidth=1)
        ax.set_yticks(range(len(shown)), list(self.arms))
        ax.set_ylim(len(shown) - 0.5, -0.5)
        what = "how many times as fast with it, beside all others" if self.kind == "ablate" else "times as fast"
        ax.set(xlabel=f"{what} ({len(self.seconds)} rounds, 95% interval)", title=title)
        ax.grid(axis="y", visible=False)
        return ax


@dataclass(frozen=True)
class Together:
    """What rungs bring together against what they bring alone.

    Attributes
    ----------
    joint : all of them, over the base.
    product : of what each brings alone.
    interaction : ``joint`` over ``product``: 1 if the rungs do not care for one another, less if they do the same work.
    """

    joint: Speedup
    product: Speedup
    interaction: Speedup


def product_of_singles(rounds: Rounds) -> Together:
    r"""Return what the rungs of ``alone`` bring together against the product of what
    each brings by itself.

    .. math:: \ln I = \ln \frac{t_{base}}{t_{all}} -
        \sum_r \ln \frac{t_{base}}{t_r}

    within each round, so that the interval of I knows that all share one base.

    Raises
    ------
    ValueError : the rounds are not those of ``alone``.
    """
    require("rounds", rounds.kind, lambda kind: kind == "alone", "those of alone")
    logs = np.log(rounds.of(BASE))[:, None] - np.log(rounds.seconds)  # [rounds, arms]
    is_single = np.array([arm not in (BASE, ALL) for arm in rounds.arms])
    singles, joint = logs[:, is_single].sum(1), logs[:, rounds.arms.index(ALL)]
    return Together(_speedup(joint), _speedup(singles), _speedup(joint - singles))


# --- Measuring --------------------------------------------------------------------------------------------------------


def climb(base: T, rungs: Sequence[Rung[T]], measure: Measure[T], *, rounds: int = 10, seed: int = 0) -> Rounds:
    """Measure the base, then with the first rung, with the first two, and so on.

    Parameters
    ----------
    base : the setting without any rung: whatever ``measure`` and the rungs take.
    measure : seconds of one step; ``timed`` makes one.
    rounds : in each of which every arm is measured once; at least 2, for an interval.
    seed : of the order within the rounds.
    """
    arms, setting = {BASE: base}, base
    for rung in _checked(rungs):
        setting = rung.apply(setting)
        arms[f"+ {rung.name}"] = setting
    return in_turns(arms, measure, rounds=rounds, seed=seed, kind="climb")


def ablate(base: T, rungs: Sequence[Rung[T]], measure: Measure[T], *, rounds: int = 10, seed: int = 0) -> Rounds:
    """Measure all rungs, and all but each; arguments as those of ``climb``."""
    names = [rung.name for rung in _checked(rungs)]
    arms = {ALL: _applied(base, rungs)}
    arms |= {f"without {name}": _applied(base, [rung for rung in rungs if rung.name != name]) for name in names}
    return in_turns(arms, measure, rounds=rounds, seed=seed, kind="ablate")


def alone(base: T, rungs: Sequence[Rung[T]], measure: Measure[T], *, rounds: int = 10, seed: int = 0) -> Rounds:
    """Measure the base, each rung by itself, and all together; arguments as those of ``climb``."""
    arms = {BASE: base} | {rung.name: rung.apply(base) for rung in _checked(rungs)} | {ALL: _applied(base, rungs)}
    return in_turns(arms, measure, rounds=rounds, seed=seed, kind="alone")


def _applied(setting: T, rungs: Sequence[Rung[T]]) -> T:
    for rung in rungs:
        setting = rung.apply(setting)
    return setting


def _checked(rungs: Sequence[Rung[T]]) -> Sequence[Rung[T]]:
    names = [rung.name for rung in rungs]
    distinct = bool(names) and len({*names, BASE, ALL}) == len(names) + 2
    require("rungs", names, lambda _: distinct, f"at least one, of different names, none of them {BASE} or {ALL}")
    return rungs


def in_turns(
    arms: Mapping[str, T],
    measure: Measure[T],
    *,
    rounds: int = 10,
    seed: int = 0,
    kind: str = "",
) -> Rounds:
    """Measure every arm once a round, in an order drawn anew; each order is gone
    through backwards in the next round, so that nobody is always late.

    A first measurement of each arm, in their order, is not counted.
    """
    at_least(2, rounds=rounds)
    at_least(0, seed=seed)
    names, generator = list(arms), np.random.default_rng(seed)
    for name in names:
        measure(arms[name])
    seconds = np.empty((rounds, len(names)))
    order = np.arange(len(names))
    with _no_garbage_collection():
        for number in range(rounds):
            # drawn anew, then the same backwards
            order = order[::-1] if number % 2 else generator.permutation(len(names))
            for arm in order:
                seconds[number, arm] = measure(arms[names[arm]])
    return Rounds(tuple(names), seconds, kind)


def timed(
    build: Callable[[T], Callable[[], Any]],
    *,
    steps: int = 1,
    device: torch.device | str | None = None,
    clock: Clock = time.perf_counter,
) -> Measure[T]:
    """Return a ``measure``: the seconds of a step, the mean of ``steps`` of them in a row.

    A setting's step is built when it is first met, and kept: compiling it or filling its caches belongs to the
    measurement that ``in_turns`` does not count. Settings are told apart as objects, not by what is in them.

    Parameters
    ----------
    build : a setting -> a step that can be run again and again.
    device : is synchronised before the clock is read; the laboratory's by default.
    """
    at_least(1, steps=steps)
    where = runtime.device() if device is None else torch.device(device)
    built: dict[int, tuple[T, Callable[[], Any]]] = {}  # with the setting, so that no other gets its id

    def seconds(setting: T) -> float:
        if id(setting) not in built:
            built[id(setting)] = setting, build(setting)
        step = built[id(setting)][1]

        def all_steps() -> None:
            for _ in range(steps):
                step()

        return _seconds(all_steps, where, clock) / steps

    return seconds
