"""Checks of chapter 16, the capstone: who has reached it, how many times as fast, what is left, a race of one's own.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on what the chapter's package computes nor on what the learner imports. Only exercise 6 runs the race by its rules.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from course_lib.capstone import Entry, Task, enter, first_script, quick_net, race, run
from course_lib.checks.patience import endless, within
from course_lib.lab.data import Split, load
from course_lib.lab.judging import (
    Design,
    Method,
    Mistake,
    NotAttempted,
    OpenProject,
    Rule,
    Wrong,
    expect_parts,
    parts_of,
)
from course_lib.lab.training import Recipe, evaluate, fresh

# Exercise 1: who has reached it


def _verdict(
    seconds: Sequence[float], scores: Sequence[float], target: float, *,
    reaches: Callable[[np.ndarray, float], Any] = lambda scores, target: scores.mean() >= target,
    time: Callable[[np.ndarray, np.ndarray, float], Any] = lambda seconds, scores, target: np.median(seconds),
) -> tuple[bool, float]:  # fmt: skip
    """Whether the scores together reach the target, and the one time of all these seconds."""
    took, reached = np.array(seconds), np.array(scores)
    return bool(reaches(reached, target)), float(time(took, reached, target))


def _time_of_those(seconds: np.ndarray, scores: np.ndarray, target: float) -> float:
    reached = seconds[scores >= target]
    return float(np.median(reached)) if len(reached) else math.nan


def _no_time_without(seconds: np.ndarray, scores: np.ndarray, target: float) -> float:
    return float(np.median(seconds)) if scores.mean() >= target else math.inf


def _in_words(found: Any, right: Any, *case: Any) -> None:
    qualifies, seconds = parts_of(found, _VERDICT, _TWO)
    if isinstance(qualifies, (bool, np.bool_)) and bool(qualifies) != right[0]:
        raise Wrong(f"you say that the entry {'qualifies' if qualifies else 'does not qualify'}", _MEAN)
    expect_parts((qualifies, seconds), right, what=_VERDICT, hint=[*_MEAN, *_MEDIAN])


_VERDICT = ("whether it qualifies", "the seconds")
_TWO = "For instance: return True, 1.5"
_MEAN = [
    "One score stands for the entry: which one? It must not depend on how lucky a single run was.",
    "The mean of all scores, and whether it is at least the target.",
]
_MEDIAN = [
    "Take the seconds 30, 1 and 2. Which of them is the time of the entry?",
    "The median of all runs: np.median, or the middle one; of an even number the mean of the middle two.",
]
_ALL_RUNS = "A run that missed the target took its time, too, and its score is in the mean. No run is left out."

exercise_1 = Method(
    "Who has reached it?",
    right=_verdict,
    explain=_in_words,
    what=_VERDICT,
    hint=[*_MEAN, *_MEDIAN],
    unchanged="seconds.sort() sorts the caller's list, whose places belong to those of scores; sorted(seconds) makes a "
              "new one.",
    # All figures are exact in binary
    cases={
        "3 runs that all reach the target": ([1.0, 2.0, 4.0], [0.625, 0.875, 0.75], 0.5),
        "5 runs, of which 4 reach it": ([2.5, 1.5, 3.0, 9.0, 2.0], [0.75, 0.375, 0.625, 0.875, 0.625], 0.5),
        "5 runs, of which one reaches it": ([4.0, 1.0, 2.0, 8.0, 16.0], [0.25, 0.375, 0.25, 0.625, 0.25], 0.5),
        "4 runs, of which 2 reach it": ([4.0, 1.0, 2.5, 16.0], [0.75, 0.75, 0.375, 0.375], 0.5),
        "4 runs, 2 of them just": ([1.0, 8.0, 2.0, 3.0], [0.5, 0.5, 0.375, 0.125], 0.5),
        "5 runs, of which 2 reach it by far": ([1.0, 4.0, 3.0, 6.0, 5.0], [0.375, 1.0, 0.375, 1.0, 0.375], 0.5),
        "3 runs whose mean is the target": ([0.5, 2.0, 1.5], [0.625, 0.25, 0.625], 0.5),
        "a single run": ([3.5], [0.75], 0.625),
    },
    mistakes=[
        Mistake(partial(_verdict, reaches=lambda scores, target: scores.min() >= target),
                "all runs must reach the target by your rule", _MEAN),
        Mistake(partial(_verdict, reaches=lambda scores, target: scores.max() >= target),
                "one lucky run is enough by your rule: the best one decides", _MEAN),
        Mistake(partial(_verdict, reaches=lambda scores, target: (scores >= target).mean() > 0.5),
                "the majority of the runs decides by your rule, not their mean", _MEAN),
        Mistake(partial(_verdict, reaches=lambda scores, target: (scores >= target).mean() >= 0.5),
                "half of the runs decide by your rule, not their mean", _MEAN),
        Mistake(partial(_verdict, reaches=lambda scores, target: np.median(scores) >= target),
                "the median of the scores decides by your rule, and it should be their mean", _MEAN),
        Mistake(partial(_verdict, reaches=lambda scores, target: scores.mean() > target),
                "a mean that is the target has reached it, and by your rule it has not",
                "At least the target: which sign is that?"),
        Mistake(partial(_verdict, reaches=lambda scores, target: scores.mean() <= target),
                "it is the wrong way round: your entry qualifies when it stays below the target", _MEAN),
        Mistake(partial(_verdict, time=lambda seconds, scores, target: seconds.mean()),
                "this is the mean of the seconds: one run that something held up moves it", _MEDIAN),
        Mistake(partial(_verdict, time=lambda seconds, scores, target: seconds.min()),
                "this is the fastest run", _MEDIAN),
        Mistake(partial(_verdict, time=lambda seconds, scores, target: seconds.max()),
                "this is the slowest run", _MEDIAN),
        Mistake(partial(_verdict, time=lambda seconds, scores, target: seconds.sum()),
                "these are the seconds of all runs together", _MEDIAN),
        Mistake(partial(_verdict, time=_time_of_those),
                "only the runs that reached the target are timed", [_ALL_RUNS, *_MEDIAN]),
        Mistake(partial(_verdict, time=lambda seconds, scores, target: seconds[scores.argmax()]),
                "this is the time of the run with the best score", [_ALL_RUNS, *_MEDIAN]),
        Mistake(partial(_verdict, time=lambda seconds, scores, target: seconds[len(seconds) // 2]),
                "this is the run in the middle of the list, and the list is not sorted", _MEDIAN),
        # Right as long as the entry qualifies
        Mistake(partial(_verdict, time=_no_time_without),
                "an entry that does not qualify has its time, too", "The seconds do not depend on the scores."),
        # Right as long as the number of runs is odd
        Mistake(partial(_verdict, time=lambda seconds, scores, target: np.sort(seconds)[(len(seconds) - 1) // 2]),
                "of an even number of runs this is the lower of the middle two: so torch's median has it", _MEDIAN[1]),
        Mistake(partial(_verdict, time=lambda seconds, scores, target: np.sort(seconds)[len(seconds) // 2]),
                "of an even number of runs this is the upper of the middle two", _MEDIAN[1]),
    ],
)  # fmt: skip


# Exercise 2: how many times as fast, and how sure


def _student(n: int) -> float:
    return float(stats.t.ppf(0.975, n - 1))


def _paired(logs: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    return float(logs.std(ddof=1))


def _unpaired(logs: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    return float(np.sqrt(np.log(before).var(ddof=1) + np.log(after).var(ddof=1)))


def _speedup(
    before: Any, after: Any, *,
    middle: Callable[[np.ndarray, np.ndarray], Any] | None = None,
    spread: Callable[[np.ndarray, np.ndarray, np.ndarray], float] = _paired,
    quantile: Callable[[int], float] = _student,
    root: Callable[[int], float] = math.sqrt,
    around: bool = False,
) -> tuple[float, float, float]:  # fmt: skip
    """The geometric mean (or the ``middle``) of the ratios, with the ends of the interval; they lie ``around`` it."""
    before, after = np.asarray(before, float), np.asarray(after, float)
    logs = np.log(before / after)
    reach = quantile(len(logs)) * spread(logs, before, after) / root(len(logs))
    centre = math.exp(logs.mean())
    ratio = centre if middle is None else float(middle(before, after))
    base = ratio if around else centre
    return ratio, base * math.exp(-reach), base * math.exp(reach)


def _of_the_ratios(before: Any, after: Any, inverted: bool = False) -> tuple[float, float, float]:
    """Student's interval of the ratios as they are."""
    ratios = np.asarray(before, float) / np.asarray(after, float)
    reach = _student(len(ratios)) * ratios.std(ddof=1) / math.sqrt(len(ratios))
    return float(ratios.mean()), float(ratios.mean() - reach), float(ratios.mean() + reach)


def _in_logs(before: Any, after: Any) -> tuple[float, ...]:
    return tuple(math.log(value) for value in _speedup(before, after))


def _ends_exchanged(before: Any, after: Any) -> tuple[float, float, float]:
    ratio, low, high = _speedup(before, after)
    return ratio, high, low


def _rounds(seed: int, count: int, ratio: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of rounds that are slow for both or for neither, to a thousandth."""
    generator = np.random.default_rng(seed)
    slow = np.exp(generator.normal(0, 0.3, count))
    first, second = np.exp(generator.normal(0, spread, (2, count)))
    return np.round(3 * slow * first, 3), np.round(3 / ratio * slow * second, 3)


_SPEEDUP = ("the ratio", "the lower end", "the upper end")
_RATIO = [
    "Take two rounds: once twice as fast, once half as fast. What should come out in the middle?",
    "d = np.log(before / after), one number a round. The ratio is np.exp(d.mean()).",
]
_WIDTH = [
    "Write down the interval of a mean: the mean ± t · s / √n. Which of the three does yours have otherwise?",
    "s = d.std(ddof=1), n = len(d), t = stats.t.ppf(0.975, n - 1): 2.5% at each end, n - 1 degrees of freedom.",
]
_BY_ROUND = [
    "A round that is slow is slow for both. What does that do to each list's spread, and what to the ratios'?",
    "Take the logarithms of the rounds' own ratios first; their standard deviation is the one that counts.",
]

exercise_2 = Method(
    "How many times as fast, and how sure?",
    right=_speedup,
    what=_SPEEDUP,
    hint=[*_RATIO, *_WIDTH],
    cases={
        "5 rounds": _rounds(1601, 5, 1.8, 0.2),
        "12 rounds": _rounds(1602, 12, 0.9, 0.1),
        "2 rounds": _rounds(1603, 2, 3.0, 0.3),
        "4 rounds that give nearly the same ratio": (
            np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.5, 1.0, 2.0, 4.001])),
    },
    mistakes=[
        Mistake(lambda before, after: _speedup(after, before),
                "the ratio is upside down: twice as fast should be 2, not 0.5", "Which time is the larger one?"),
        *[Mistake(partial(_speedup, middle=lambda before, after: before.mean() / after.mean(), around=around),
                  "this is the ratio of the means: a slow round counts more than the others", _RATIO)
          for around in (False, True)],
        *[Mistake(partial(_speedup, middle=lambda before, after: np.median(before) / np.median(after), around=around),
                  "this is the ratio of the medians: they may stem from different rounds", _BY_ROUND)
          for around in (False, True)],
        *[Mistake(partial(_speedup, middle=lambda before, after: np.median(before / after), around=around),
                  "this is the median of the rounds' ratios, and what is wanted is their geometric mean", _RATIO)
          for around in (False, True)],
        *[Mistake(rule, "this is the arithmetic mean of the ratios: of 2 and 0.5 it makes 1.25", _RATIO)
          for rule in (_of_the_ratios,
                       partial(_speedup, middle=lambda before, after: (before / after).mean()),
                       partial(_speedup, middle=lambda before, after: (before / after).mean(), around=True))],
        Mistake(_in_logs, "these are logarithms still: the way back is missing", "np.exp of all three."),
        Mistake(_ends_exchanged, "the two ends are exchanged", "The lower one comes first."),
        Mistake(partial(_speedup, quantile=lambda n: float(stats.norm.ppf(0.975))),
                "the quantile is the normal one, 1.96, as if the standard deviation were known", _WIDTH),
        Mistake(partial(_speedup, quantile=lambda n: 1.96),
                "the quantile is the normal one, 1.96, as if the standard deviation were known", _WIDTH),
        Mistake(partial(_speedup, quantile=lambda n: float(stats.t.ppf(0.95, n - 1))),
                "5% lie beyond each end, and should be 2.5%: this is an interval of 90%", _WIDTH),
        Mistake(partial(_speedup, quantile=lambda n: float(stats.t.ppf(0.975, n))),
                "n rounds leave n - 1 degrees of freedom, and you take n", _WIDTH),
        Mistake(partial(_speedup, quantile=lambda n: 1.0),
                "the quantile is missing: this is one standard error each way", _WIDTH),
        Mistake(partial(_speedup, spread=lambda logs, before, after: float(logs.std())),
                "the standard deviation divides by n, and should by n - 1: ddof=1", _WIDTH),
        Mistake(partial(_speedup, spread=lambda logs, before, after: float(logs.var(ddof=1))),
                "this is the variance, where the standard deviation belongs", _WIDTH),
        Mistake(partial(_speedup, root=lambda n: 1.0),
                "the division by the root of n is missing: so far single rounds spread, not their mean", _WIDTH),
        Mistake(partial(_speedup, root=float), "you divide by n, and should by its root", _WIDTH),
        *[Mistake(partial(_speedup, spread=_unpaired, quantile=quantile),
                  "the two lists are taken as if they had nothing to do with each other: pair them by round", _BY_ROUND)
          for quantile in (_student, lambda n: float(stats.t.ppf(0.975, 2 * n - 2)))],
    ],
)  # fmt: skip


# Exercise 3: what is left


def _what_is_left(
    alone: Mapping[str, float], together: float, *,
    expected: Callable[[list[float]], float] = math.prod,
    compared: Callable[[float, float], float] = lambda together, expected: together / expected,
) -> float:  # fmt: skip
    """What the rungs bring together, compared with what is expected of them by what each brings alone."""
    return float(compared(together, expected(list(alone.values()))))


_MULTIPLY = [
    "One rung makes a run twice as fast, another one three times. How fast is it with both, if neither "
    "affects the other?",
    "Speed-ups multiply: 2 times 3. math.prod(alone.values()) does that.",
]
_OVER = [
    "If together they bring less than the product, the result should lie below 1. Where does yours lie?",
    "together divided by the product.",
]

exercise_3 = Method(
    "Find the bug: what is left of the product",
    right=_what_is_left,
    what="the interaction",
    hint=[*_MULTIPLY, *_OVER],
    cases={
        "three rungs": ({"whole batches": 1.6, "one cycle": 1.25, "quick network": 2.5}, 4.2),
        "two rungs that make room for each other": ({"whole batches": 1.1, "bfloat16": 1.05}, 1.9),
        "a rung that hurts": ({"one cycle": 2.2, "small batches": 0.8, "bfloat16": 1.3, "compile": 0.95}, 2.0),
        "a single rung": ({"one cycle": 1.75}, 1.75),
    },
    mistakes=[
        Mistake(partial(_what_is_left, expected=sum),
                "the speed-ups are added up, and they multiply", _MULTIPLY),
        Mistake(partial(_what_is_left, expected=lambda singles: 1 + sum(single - 1 for single in singles)),
                "the gains above 1 are added up, and speed-ups multiply", _MULTIPLY),
        Mistake(partial(_what_is_left, compared=lambda together, expected: expected / together),
                "it is upside down: this is the product over what they bring together", _OVER),
        Mistake(partial(_what_is_left, expected=lambda singles: float(np.mean(singles))),
                "this compares with the mean of the single speed-ups", _MULTIPLY),
        Mistake(partial(_what_is_left, expected=lambda singles: math.prod(singles) ** (1 / len(singles))),
                "this compares with the geometric mean of the single speed-ups: no root belongs there", _MULTIPLY),
        Mistake(partial(_what_is_left, expected=max), "this compares with the best single rung", _MULTIPLY),
        Mistake(lambda alone, together: together / (together * math.prod(alone.values())),
                "the product has the joint speed-up in it: it is that of the single ones alone", _OVER),
        Mistake(partial(_what_is_left, compared=lambda together, expected: together - expected),
                "this is a difference: 0 would mean that they do not affect each other, and it should be 1", _OVER),
        Mistake(partial(_what_is_left, compared=lambda together, expected: together * expected),
                "the product is multiplied by, and should be divided by", _OVER),
        Mistake(partial(_what_is_left, compared=lambda together, expected: math.log(together / expected)),
                "this is the logarithm of the interaction", "np.exp undoes it, or no logarithm at all."),
        Mistake(lambda alone, together: together, "this is what they bring together, compared with nothing", _OVER),
    ],
)  # fmt: skip


# Exercise 4: seconds = epochs × steps × seconds a step


def _predicted(
    examples: int, batch: int, epochs: int, seconds_a_step: float, *,
    steps: Callable[[int, int, int], float] = lambda examples, batch, epochs: epochs * math.ceil(examples / batch),
) -> float:  # fmt: skip
    """The ``steps`` of a run, each of which takes so long."""
    return steps(examples, batch, epochs) * seconds_a_step


_LAST = [
    "10 examples in batches of 4: write down the batches of one epoch. How many steps is that?",
    "The last, smaller batch is a step, too: math.ceil(examples / batch).",
]
_EACH_EPOCH = [
    "Each epoch begins anew: does the smaller batch at its end disappear because another epoch follows?",
    "Round up the steps of one epoch, then multiply by the epochs.",
]
_ALL_THREE = "Epochs, steps an epoch, seconds a step: which of the three is missing?"

exercise_4 = Method(
    "Seconds = epochs × steps × seconds a step",
    right=_predicted,
    what="the seconds",
    hint=[*_LAST, *_EACH_EPOCH],
    cases={
        "1,000 examples in batches of 64, 7 epochs": (1000, 64, 7, 0.004),
        "1,000 examples in batches of 300, 5 epochs": (1000, 300, 5, 0.02),
        "960 examples in batches of 64, 3 epochs": (960, 64, 3, 0.5),
        "100 examples in batches of 512, 4 epochs": (100, 512, 4, 0.25),
        "60,000 examples in batches of 7, 1 epoch": (60_000, 7, 1, 1e-5),
    },
    mistakes=[
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: epochs * (examples // batch)),
                "the last, smaller batch of each epoch is not counted", _LAST),
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: epochs * examples / batch),
                "steps are counted in parts: the last, smaller batch takes a whole one", _LAST),
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: math.ceil(epochs * examples / batch)),
                "the steps are rounded up after multiplying with the epochs: each epoch has a smaller batch of its own",
                _EACH_EPOCH),
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: epochs * examples // batch),
                "the steps are rounded down, and after multiplying with the epochs", [*_LAST, *_EACH_EPOCH]),
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: math.ceil(examples / batch)),
                "these are the seconds of one epoch", _ALL_THREE),
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: epochs),
                "each epoch is one step by your rule", _ALL_THREE),
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: epochs * examples),
                "each example is a step by your rule: a batch of them is one", _LAST),
        Mistake(lambda examples, batch, epochs, seconds_a_step: epochs * math.ceil(examples / batch),
                "these are steps, not seconds", _ALL_THREE),
        # Right as long as the last batch is a large one
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: epochs * round(examples / batch)),
                "the steps are rounded to the nearest: a small batch at the end is a step, too", _LAST),
        # Right as long as there is a rest
        Mistake(partial(_predicted, steps=lambda examples, batch, epochs: epochs * (examples // batch + 1)),
                "where the examples divide evenly there is no smaller batch, and you count one",
                ["96 examples in batches of 32: how many are there?", *_LAST]),
    ],
)  # fmt: skip


# Exercise 5: the table of rungs left out

LEAVE_ONE_OUT: dict[str, list[float]] = {
    "all rungs": [2.08, 2.19, 3.47, 2.25, 2.11, 3.08, 2.12, 2.58],
    "without whole batches": [3.72, 4.05, 6.64, 4.12, 3.98, 6.13, 4.13, 5.03],
    "without SGD with momentum": [2.12, 2.21, 3.32, 2.35, 2.04, 3.14, 2.14, 2.63],
    "without one cycle": [24.07, 1.58, 30.91, 2.48, 1.71, 40.71, 1.27, 19.13],
    "without quick network": [5.46, 5.6, 9.45, 5.49, 5.71, 7.37, 5.86, 6.55],
    "without small batches": [2.37, 2.57, 3.72, 2.52, 2.42, 3.56, 2.48, 2.97],
    "without channels last, bf16": [1.89, 1.98, 3.14, 2.03, 1.94, 2.78, 1.94, 2.4],
}
"""Seconds of eight rounds on another machine, on which the third round and the sixth were slow for everybody.

By round, with the 95% interval: whole batches are worth 1.89 [1.84, 1.95], SGD 1.01 [0.98, 1.03], one cycle 2.81
[0.89, 8.91], the quick network 2.59 [2.48, 2.71], small batches 1.14 [1.11, 1.17], and channels last with bfloat16
0.91 [0.90, 0.92]. With the rounds unpaired nobody could tell the last two from 1.
"""

_NAMES = tuple(name.removeprefix("without ") for name in LEAVE_ONE_OUT if name.startswith("without "))
_MOST, _CANNOT_TELL, _HURTS = "quick network", {"SGD with momentum", "one cycle"}, {"channels last, bf16"}
_PARTS = ("most", "cannot tell", "hurts")
_ANSWER = 'For instance: {"most": "small batches", "cannot tell": {"whole batches"}, "hurts": {"one cycle"}}'
_RATIOS = [
    "A rung is worth the seconds without it over those of all rungs, round by round: eight ratios. Your speedup of "
    "exercise 2 makes of them a ratio and an interval.",
    "An interval that has 1 in it cannot tell; one that lies below 1 says that the rung hurts.",
]
_WHY = {
    "whole batches": "without whole batches every round takes nearly twice as long: that can be told",
    "SGD with momentum": "the interval of SGD with momentum reaches from 0.98 to 1.03",
    "one cycle": "the interval of one cycle reaches from 0.89 to 8.9: some of its rounds are slower without it, some "
    "faster",
    "quick network": "without the quick network every round takes more than twice as long: that can be told",
    "small batches": "small batches are worth a little in every single round: paired by round their interval lies "
    "above 1",
    "channels last, bf16": "without channels last and bf16 every single round is faster: paired by round their "
    "interval lies below 1",
}


def _rungs_named(value: Any, part: str) -> set[str]:
    """One name or several, as a set of names that there are."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, (list, tuple, set, frozenset)) or not all(isinstance(n, str) for n in several):
        if isinstance(several, (set, frozenset)) and ... in several:
            raise NotAttempted
        raise Wrong(f"{part!r} should be names of rungs", _ANSWER)
    known = {name.lower(): name for name in _NAMES}
    found = set()
    for name in several:
        plain = name.strip(" .()").lower().removeprefix("without ")
        if plain not in known:
            raise Wrong(f"there is no rung {name!r:.60}", f"There are {'; '.join(_NAMES)}.")
        found.add(known[plain])
    return found


def exercise_5(answer: Any) -> None:
    """What each rung is worth: a table to read."""
    if not isinstance(answer, Mapping) or set(answer) != set(_PARTS):
        raise Wrong(f"expected a dict with {', '.join(map(repr, _PARTS))}", _ANSWER)
    most, unsure, hurts = (_rungs_named(answer[part], part) for part in _PARTS)
    if len(most) != 1:
        raise Wrong("'most' should be one rung", _ANSWER)
    for rung in _NAMES:  # in the table's order
        if (rung in unsure) != (rung in _CANNOT_TELL):
            verb = "can be told from 1, and you say that it cannot" if rung in unsure else "cannot be told from 1"
            raise Wrong(f"{rung} {verb}: {_WHY[rung]}", _RATIOS)
        if (rung in hurts) != (rung in _HURTS):
            verb = "is not known to hurt" if rung in hurts else "hurts, and you do not say so"
            raise Wrong(f"{rung} {verb}: {_WHY[rung]}", _RATIOS)
    if most != {_MOST}:
        (rung,) = most
        if rung in _CANNOT_TELL:
            raise Wrong(f"{rung} cannot be told from 1, so nobody knows that it is worth most",
                        "Worth most is the rung of which even the lower end of the interval lies highest.")  # fmt: skip
        raise Wrong(f"{rung} is not worth most: another rung's whole interval lies above its own", _RATIOS)


# Exercise 6: a recipe in the race

TARGET, EPOCHS, BASELINE = 0.90, 16, 8
HIDDEN = (1661, 1662, 1663)
YOURS, SCRIPT = "yours", "the first script"

_FOR_INSTANCE = "For instance: mine = Recipe(epochs=8, batch_size=32, optimizer=partial(torch.optim.SGD, lr=0.05))"
_REFUSED = {
    "stop": "the length of a run is fixed before it starts",
    "keep": "the last weights count: who looks for the best ones looks at more than the training images",
    "watch": "nobody looks on in a race",
}


@functools.cache
def _drawn() -> tuple[Task, Split]:
    """The task, of which an entry sees nothing but the training images, and the split that it is tested on."""
    data = load("glyphs", classes="digits", size=16, difficulty=0.5, train_size=1000, val_size=1000, test_size=2000,
                seed=1660)  # fmt: skip
    few = data.train.subset(torch.arange(100))  # fit wants something to validate on; it is not timed

    def score(model: Any, split: Split) -> float:
        return evaluate(model, data.test).accuracy

    return Task(replace(data, val=few, test=few), TARGET, score), data.test


def _as_entry(answer: Any) -> Entry:
    if isinstance(answer, Recipe):
        return Entry(network=quick_net, recipe=answer)
    if not isinstance(answer, Entry) or not isinstance(answer.recipe, Recipe):
        raise Wrong("expected a Recipe or an Entry", _FOR_INSTANCE)
    return answer


def _keeps_the_rules(answer: Any) -> None:
    recipe = _as_entry(answer).recipe
    if recipe.epochs > EPOCHS:
        raise Wrong(f"your runs have {recipe.epochs} epochs, and {EPOCHS} are the most that is allowed",
                    "What makes a shorter run reach as far? Chapters 2, 3 and 4 have answers.")  # fmt: skip
    for slot, why in _REFUSED.items():
        if getattr(recipe, slot) is not None:
            raise Wrong(f"your recipe fills the slot {slot}: {why}", f"Leave {slot} as it is: {slot}=None.")
    if recipe.compile:
        raise Wrong("your recipe compiles: that takes longer than the whole race", "compile=False")


def _accuracy(answer: Any, seed: int) -> float:
    entry, (task, test) = _as_entry(answer), _drawn()
    shape, classes = task.data.input_shape, len(task.data.classes)
    untrained = fresh(lambda: entry.network(shape, classes), entry.recipe, seed=seed)
    if entry.prepare is not None:
        untrained = entry.prepare(untrained, task.data)
    if (known := evaluate(untrained, test).accuracy) > 0.5:
        raise Wrong(f"your network knows {known:.0%} of the digits before its first step: it was trained before",
                    "network(input_shape, classes) should make a new one at each call.")  # fmt: skip
    return run(entry, task, seed).score


def _entered(answer: Any) -> str:
    """Time the entry and the first script in turns, and enter their ratio; what is to be said of it."""
    task, _ = _drawn()
    try:
        found = race({SCRIPT: first_script().lasting(BASELINE), YOURS: _as_entry(answer)}, task, HIDDEN)
    except Exception as error:  # it has passed: whatever happens here does not change that
        return f"its time could not be measured: {type(error).__name__}: {error}"
    ratio = found.seconds(SCRIPT) / found.seconds(YOURS)
    said = f"{ratio:.1f} times as fast as the first script on this machine"
    if not found.qualifies(YOURS):
        return f"{said}; not entered, since the runs that were timed reached {found.score(YOURS).mean:.3f}"
    return "; ".join(filter(None, [said, enter("16.6", ratio=ratio, score=found.score(YOURS).mean)]))


exercise_6 = Design(
    "Your recipe in the race",
    admit=_keeps_the_rules,
    score=_accuracy,
    seeds=HIDDEN,
    least=TARGET,
    hint=["Reach the target first, with all the epochs that are allowed; then shorten the run.",
          "Which rung of the ladder makes a short run reach farthest? Look at the figure of the rungs left out.",
          "applied().lasting(8) is an entry: how far does it get on digits of your own?"],
    afterwards=_entered,
)  # fmt: skip

exercise_7 = OpenProject(
    "An open project: your own race",
    rubric=["the task and its target", "the rules, written down before", "the baseline",
            "each rung, alone and left out", "seeds and intervals", "what did not help", "another machine"],
)  # fmt: skip


# Exercise 8: how many seeds

PATIENCE = 300_000
"""Lines of Python that an answer may take for one plan."""
_ENOUGH = 300
"""No mistake looks farther than so many runs: it never comes to an end."""

Plan = tuple[float, ...]
"""Mean, deviation, target, and sometimes the confidence."""


@functools.cache
def _t(confidence: float, freedom: int) -> float:
    return float(stats.t.ppf(confidence, freedom))


def _seeds_needed(
    mean: float, deviation: float, target: float, confidence: float = 0.95, *,
    quantile: Callable[[float, int], float] = lambda confidence, n: _t(confidence, n - 1),
    error: Callable[[float, int], float] = lambda deviation, n: deviation / math.sqrt(n),
    least: int = 2,
) -> float:  # fmt: skip
    """The first number of runs with which the lower end of the interval reaches the target."""
    reached = (n for n in range(least, _ENOUGH) if mean - quantile(confidence, n) * error(deviation, n) >= target)
    return next(reached, math.inf)


@functools.cache
def _normal(confidence: float, n: int) -> float:
    return float(stats.norm.ppf(confidence))


def _in_one_formula(mean: float, deviation: float, target: float, confidence: float = 0.95) -> int:
    return math.ceil((_normal(confidence, 0) * deviation / (mean - target)) ** 2)


def _usual_confidence(mean: float, deviation: float, target: float, confidence: float = 0.95) -> float:
    return _seeds_needed(mean, deviation, target)


def _plans(rule: Rule, *plans: Plan) -> Tensor:
    """The number of runs for each plan; infinity where the rule comes to no end."""
    return torch.tensor([_number_of_runs(rule, plan) for plan in plans], dtype=torch.float64)


def _number_of_runs(rule: Rule, plan: Plan) -> float:
    try:
        found = within(PATIENCE, _ENDLESS, _NO_END, rule, *plan)
    except Wrong as wrong:
        if wrong.message != _ENDLESS:
            raise
        return math.inf
    if isinstance(found, float) and found == math.inf:
        return math.inf
    try:
        value = float("nan") if isinstance(found, (str, bool)) else float(found)
    except (TypeError, ValueError, RuntimeError):
        value = math.nan
    if not value.is_integer():
        raise Wrong(f"the number of runs should be a whole number, and is {found!r:.60}, for {plan}", _FIRST)
    return value


def _which_plan(found: Tensor, right: Tensor, *plans: Plan) -> None:
    place = int((found != right).nonzero()[0])
    many = "too many" if found[place] > right[place] else "too few"
    plan = ", ".join(f"{value:g}" for value in plans[place])
    if found[place] == math.inf:
        raise Wrong(f"{_ENDLESS}, for the plan ({plan})", [_NO_END, *_ROOT])
    raise Wrong(f"{int(found[place])} runs are {many} for the plan ({plan})", [*_FIRST, *_STUDENT])


_ENDLESS = endless(PATIENCE)
_NO_END = "Print the lower end in each round of your loop. Does it come nearer to the target?"
_FIRST = [
    "Try n = 2, then 3, and so on. The first n whose lower end is at least the target is the answer.",
    "The lower end: mean - t * deviation / n ** 0.5, with t = stats.t.ppf(confidence, n - 1).",
]
_STUDENT = [
    "The deviation was estimated from a few runs. Which distribution knows that, and how many degrees of freedom has "
    "it with n runs?",
    "t = stats.t.ppf(confidence, n - 1), anew for each n.",
]
_ONE_SIDE = [
    "Nobody minds if the mean lies far above the target. At how many ends may the interval be wrong?",
    "All of 1 - confidence lies on one side: stats.t.ppf(confidence, …), not stats.t.ppf((1 + confidence) / 2, …).",
]
_ROOT = ["How far does the mean of n runs spread, if a single one spreads by deviation?", "deviation / n ** 0.5."]

exercise_8 = Method(
    "How many seeds?",
    right=_seeds_needed,
    ask=_plans,
    explain=_which_plan,
    what="the number of runs",
    hint=[*_FIRST, *_STUDENT],
    cases={
        "four plans": ((0.905, 0.01, 0.9), (0.922, 0.01, 0.9), (0.918, 0.01, 0.9), (0.9035, 0.01, 0.9)),
        "plans with little to spare, and with much": ((0.902, 0.01, 0.9), (0.99, 0.01, 0.9), (0.95, 0.001, 0.9)),
        "other confidences": ((0.905, 0.01, 0.9, 0.99), (0.905, 0.01, 0.9, 0.8), (0.76, 0.03, 0.75, 0.9)),
    },
    mistakes=[
        Mistake(partial(_seeds_needed, quantile=_normal),
                "the quantile is the normal one: a deviation from few runs is not known that well", _STUDENT),
        Mistake(_in_one_formula, "this is the formula of the normal distribution: a deviation from few runs is not "
                "known that well", _STUDENT),
        Mistake(partial(_seeds_needed, quantile=lambda confidence, n: _t((1 + confidence) / 2, n - 1)),
                "the interval is two-sided, and it does not matter how far above the target the mean lies", _ONE_SIDE),
        Mistake(partial(_seeds_needed, quantile=lambda confidence, n: _normal((1 + confidence) / 2, n)),
                "the quantile is the normal one, and two-sided", [*_STUDENT, *_ONE_SIDE]),
        Mistake(partial(_seeds_needed, error=lambda deviation, n: deviation),
                "the deviation is not divided by the root of n: a mean spreads less than a run", _ROOT),
        Mistake(partial(_seeds_needed, error=lambda deviation, n: deviation / n),
                "the deviation is divided by n, and should be by its root", _ROOT),
        Mistake(partial(_seeds_needed, error=lambda deviation, n: deviation / math.sqrt(n - 1)),
                "the deviation is divided by the root of n - 1, and it is n runs whose mean is taken", _ROOT),
        Mistake(partial(_seeds_needed, error=lambda deviation, n: deviation**2 / math.sqrt(n)),
                "the deviation is squared", _ROOT),
        Mistake(partial(_seeds_needed, quantile=lambda confidence, n: 1.0),
                "the quantile is missing: this is one standard error", _STUDENT),
        Mistake(partial(_seeds_needed, quantile=lambda confidence, n: _t(confidence, n)),
                "n runs leave n - 1 degrees of freedom, and you take n", _STUDENT),
        Mistake(lambda *plan: _seeds_needed(*plan) + 1, "this is one run more than needed", _FIRST),
        Mistake(lambda *plan: _seeds_needed(*plan) - 1, "this is the last number that does not suffice", _FIRST),
        # Right as long as more than two are needed
        Mistake(partial(_seeds_needed, least=3), "two runs suffice for some plans, and you begin with three", _FIRST),
        # Right as long as it is the usual one
        Mistake(_usual_confidence, "the confidence is 0.95, whatever is handed in",
                "confidence is an argument: the 0.95 in the first line is only its value by default."),
    ],
)  # fmt: skip
