"""Checks of chapter 17, the outlook: laws of scale and what they say, what a run costs, which technique first.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on what the chapter's package computes nor on what the learner imports.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy import optimize

from course_lib.lab.judging import Method, Mistake, NotAttempted, OpenProject, Wrong, parts_of

# Exercise 1: a straight line in logarithms


def _straight_line(
    n: Any, loss: Any, at: float, *,
    line: Callable[[np.ndarray, np.ndarray], tuple[float, float]] | None = None,
    said: Callable[[float, float, float], tuple[float, float, float]] | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """The slope and the start of the ``line``, and what is ``said`` of them: a, b and the loss at ``at``."""
    slope, start = (line or _least_squares)(np.asarray(n, float), np.asarray(loss, float))
    return (said or _as_a_power)(slope, start, at)


def _least_squares(n: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    slope, start = np.polyfit(np.log(n), np.log(loss), 1)
    return float(slope), float(start)


def _as_a_power(slope: float, start: float, at: float) -> tuple[float, float, float]:
    return math.exp(start), -slope, math.exp(start) * at**slope


def _through_the_ends(n: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    first, last = int(n.argmin()), int(n.argmax())
    slope = math.log(loss[last] / loss[first]) / math.log(n[last] / n[first])
    return slope, math.log(loss[first]) - slope * math.log(n[first])


def _the_other_way(n: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    slope, start = np.polyfit(np.log(loss), np.log(n), 1)
    return float(1 / slope), float(-start / slope)


def _of_the_losses(n: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    slope, start = _least_squares(n, loss)
    (slope, start), _ = optimize.curve_fit(lambda n, slope, start: np.exp(start + slope * np.log(n)), n, loss,
                                           p0=(slope, start))  # fmt: skip
    return float(slope), float(start)


def _half_logarithmic(n: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    slope, start = np.polyfit(np.log(n), loss, 1)
    return float(slope), float(start)


def _in_tens(n: np.ndarray, loss: np.ndarray) -> tuple[float, float]:
    slope, start = np.polyfit(np.log10(n), np.log10(loss), 1)
    return float(slope), float(start)


def _runs_of(seed: int, sizes: Sequence[float], a: float, b: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and losses on a power law, off by some percent, to four digits."""
    n = np.array(sizes, float)
    off = np.random.default_rng(seed).normal(0, spread, len(n))
    return n, np.round(a * n**-b * np.exp(off), 4)


_LINE = ("a", "b", "the predicted loss")
_LOGS = [
    "Take the logarithm of both sides of L = a n^-b. What is the slope of that line, and where does it start?",
    "slope, start = np.polyfit(np.log(n), np.log(loss), 1); then a = np.exp(start) and b = -slope.",
]
_PREDICT = ["Put the size into the law that you have found.", "a * at ** -b"]
_ALL_RUNS = "Each run is off by chance. How many of them does your line look at, and what does it take as its error?"

exercise_1 = Method(
    "A straight line in logarithms",
    right=_straight_line,
    what=_LINE,
    hint=[*_LOGS, *_PREDICT],
    cases={
        "6 runs": (*_runs_of(1701, [1e4, 3e4, 1e5, 3e5, 1e6, 3e6], 12.0, 0.15, 0.05), 1e8),
        "4 runs that are not sorted": (*_runs_of(1702, [800, 100, 3200, 200], 4.0, 0.4, 0.1), 25_600.0),
        "3 runs on one line, and a smaller size": (np.array([4.0, 16.0, 64.0]), np.array([2.0, 1.0, 0.5]), 1.0),
    },
    mistakes=[
        Mistake(partial(_straight_line, said=lambda slope, start, at: (
                    math.exp(start), slope, math.exp(start) * at**slope)),
                "b has the wrong sign: in a n^-b the minus stands already", _LOGS),
        Mistake(partial(_straight_line, said=lambda slope, start, at: (
                    math.exp(start), -slope, math.exp(start) * at**-slope)),
                "the predicted loss rises with size: the minus in a n^-b is lost", _PREDICT),
        Mistake(partial(_straight_line, said=lambda slope, start, at: (
                    math.exp(start), slope, math.exp(start) * at**-slope)),
                "b has the wrong sign, and so the predicted loss rises with size", _LOGS),
        Mistake(partial(_straight_line, said=lambda slope, start, at: (
                    start, -slope, math.exp(start) * at**slope)),
                "a is still a logarithm", "The line starts at log a: np.exp brings it back."),
        Mistake(partial(_straight_line, said=lambda slope, start, at: (start, -slope, start * at**slope)),
                "a is still a logarithm", "The line starts at log a: np.exp brings it back."),
        Mistake(partial(_straight_line, said=lambda slope, start, at: (
                    math.exp(start), -slope, start + slope * math.log(at))),
                "the predicted loss is still a logarithm", ["np.exp brings it back.", *_PREDICT]),
        Mistake(partial(_straight_line, said=lambda slope, start, at: (
                    math.exp(start), -slope, math.exp(start) * math.log(at) ** slope)),
                "the logarithm of the size is put into the law, where the size belongs", _PREDICT),
        Mistake(partial(_straight_line, line=_in_tens),
                "the logarithms have base 10, and e is raised to them",
                "10 ** start, or np.log in place of np.log10."),
        Mistake(partial(_straight_line, said=lambda slope, start, at: _as_a_power(start, slope, at)),
                "slope and start are exchanged: np.polyfit gives the highest power first", _LOGS),
        Mistake(partial(_straight_line, line=_through_the_ends),
                "your line goes through the smallest and the largest run, and does not look at the others",
                [_ALL_RUNS, *_LOGS]),
        Mistake(partial(_straight_line, line=_the_other_way),
                "you fit sizes to losses: the errors are those of the loss", [_ALL_RUNS, *_LOGS]),
        Mistake(partial(_straight_line, line=_of_the_losses),
                "these are least squares of the losses, and should be those of their logarithms",
                [_ALL_RUNS, *_LOGS]),
        Mistake(partial(_straight_line, line=_half_logarithmic),
                "only the sizes are in logarithms: the losses have to be, too", _LOGS),
        Mistake(partial(_straight_line, line=_half_logarithmic,
                        said=lambda slope, start, at: (start, -slope, start + slope * math.log(at))),
                "only the sizes are in logarithms: the losses have to be, too", _LOGS),
    ],
)  # fmt: skip


# Exercise 2: the energy of a run


def _energy(
    operations: float, peak: float, utilisation: float, watts: float, pue: float, *,
    seconds: Callable[[float, float, float], float] = lambda operations, peak, used: operations / (peak * used),
    drawn: Callable[[float, float], float] = lambda watts, pue: watts * pue,
    joules: float = 3.6e6,
) -> float:  # fmt: skip
    """Kilowatt-hours: ``seconds`` times the watts ``drawn``, and so many ``joules`` are one unit."""
    return seconds(operations, peak, utilisation) * drawn(watts, pue) / joules


_USED = [
    "Twice the utilisation: does the same run take longer, or shorter?",
    "The device delivers peak * utilisation operations a second: operations are divided by both.",
]
_BUILDING = [
    "A PUE of 1.2: the building draws 1.2 kWh for each that the machines draw. Is that more, or less?",
    "watts * pue",
]
_UNITS = [
    "One kilowatt for one hour is 1 kWh. How many seconds, and how many watts, is that?",
    "Watts times seconds are joules; 3,600 * 1,000 of them are a kilowatt-hour.",
]

exercise_2 = Method(
    "Find the bug: the energy of a run",
    right=_energy,
    what="the energy",
    hint=[*_USED, *_BUILDING, *_UNITS],
    cases={
        "a day on one GPU": (4e19, 1e15, 0.45, 700.0, 1.25),
        "a device that is hardly used": (1e18, 3e14, 0.05, 300.0, 1.6),
        "a building that needs nothing more": (2e21, 2e14, 0.5, 450.0, 1.0),
        "a device at its peak": (3e12, 1e9, 1.0, 5.0, 1.1),
    },
    mistakes=[
        Mistake(partial(_energy, seconds=lambda operations, peak, used: operations / peak * used),
                "the operations are multiplied by the utilisation: a device that is used worse would be done sooner",
                _USED),
        Mistake(partial(_energy, seconds=lambda operations, peak, used: operations / peak),
                "the device works at its peak by your rule: the utilisation is missing, or cancels out", _USED),
        Mistake(partial(_energy, drawn=lambda watts, pue: watts / pue),
                "the watts are divided by the PUE: the building would draw less than the machines in it", _BUILDING),
        Mistake(partial(_energy, drawn=lambda watts, pue: watts),
                "the PUE is missing: this is what the machines draw, not the building", _BUILDING),
        Mistake(partial(_energy, drawn=lambda watts, pue: watts * (1 + pue)),
                "the PUE has the machines in it already: it is not added to them", _BUILDING),
        Mistake(partial(_energy, drawn=lambda watts, pue: watts * (pue - 1)),
                "this is only what the building draws besides the machines", _BUILDING),
        Mistake(partial(_energy, joules=3.6e3), "these are watt-hours, and should be kilowatt-hours", _UNITS),
        Mistake(partial(_energy, joules=1.0), "these are watt-seconds, and should be kilowatt-hours", _UNITS),
        Mistake(partial(_energy, joules=1e3), "these are kilowatt-seconds, and what is wanted are "
                                              "kilowatt-hours", _UNITS),
        Mistake(partial(_energy, joules=6e4), "an hour has 3,600 seconds, and you take 60", _UNITS),
        Mistake(lambda operations, peak, utilisation, watts, pue: operations / (peak * utilisation) / 3600,
                "these are hours: the power is missing", _UNITS),
    ],
)  # fmt: skip


# Exercise 3: the best split of a budget


def _best_split(
    A: float, alpha: float, B: float, beta: float, operations: float, *,
    each: float = 6.0,
    ratio: Callable[[float, float, float, float], float] = lambda A, alpha, B, beta: alpha * A / (beta * B),
    power: Callable[[float, float], float] = lambda alpha, beta: beta,
) -> tuple[float, float]:  # fmt: skip
    """N from the ``ratio`` of the slopes and the ``power`` of N D; D is what is left."""
    pairs = operations / each
    found = (ratio(A, alpha, B, beta) * pairs ** power(alpha, beta)) ** (1 / (alpha + beta))
    return found, pairs / found


def _exchanged(A: float, alpha: float, B: float, beta: float, operations: float) -> tuple[float, float]:
    parameters, examples = _best_split(A, alpha, B, beta, operations)
    return examples, parameters


def _twenty_each(A: float, alpha: float, B: float, beta: float, operations: float) -> tuple[float, float]:
    parameters = math.sqrt(operations / 120)
    return parameters, 20 * parameters


def _alike(A: float, alpha: float, B: float, beta: float, operations: float) -> tuple[float, float]:
    return math.sqrt(operations / 6), math.sqrt(operations / 6)


def _within_budget(found: Any, right: Any, *case: Any) -> None:
    parameters, examples = parts_of(found, _SPLIT)
    try:
        share = float(6 * parameters * examples / case[-1])
    except (TypeError, ValueError, RuntimeError):
        return
    if not 0.98 <= share <= 1.02:
        raise Wrong(f"6 N D is {share:.3g} times the operations that there are", _BUDGET)


_SPLIT = ("N", "D")
_BUDGET = ["All of the budget is spent: what is D, once N is chosen?", "D = operations / (6 * N)"]
_LEAST = [
    "Put D = operations / (6 N) into the loss: one number is left to choose. A grid in logarithms would do.",
    "At the best N one percent more of it brings as much as one percent more of D: alpha A N^-alpha = beta B D^-beta.",
]

exercise_3 = Method(
    "The best split of a budget",
    right=_best_split,
    explain=_within_budget,
    what=_SPLIT,
    hint=[*_LEAST, *_BUDGET],
    rtol=0.01,
    cases={
        "a law in which data count more": (400.0, 0.34, 2000.0, 0.28, 1e20),
        "a law in which parameters count more": (50.0, 0.2, 9.0, 0.35, 3e15),
        "two equal exponents": (10.0, 0.5, 40.0, 0.5, 6e12),
        "a small budget": (3.0, 0.6, 20.0, 0.4, 1e8),
    },
    mistakes=[
        Mistake(partial(_best_split, each=1.0), "the budget is taken as N D: the 6 is missing", _BUDGET),
        Mistake(partial(_best_split, each=2.0),
                "the budget is taken as 2 N D: that is the forward pass alone", _BUDGET),
        Mistake(_exchanged, "N and D are exchanged", "Parameters first, then examples."),
        Mistake(partial(_best_split, power=lambda alpha, beta: alpha),
                "the exponents of the budget are exchanged: N grows with beta / (alpha + beta)", _LEAST),
        Mistake(partial(_best_split, ratio=lambda A, alpha, B, beta: A / B),
                "here the two terms are equally large: at the best split it is their slopes that balance", _LEAST),
        Mistake(partial(_best_split, ratio=lambda A, alpha, B, beta: beta * B / (alpha * A)),
                "the factor is upside down: the more is lost by few parameters (A), the more of them", _LEAST),
        Mistake(partial(_best_split, ratio=lambda A, alpha, B, beta: 1.0),
                "A and B do not come into it by your rule: only the exponents do", _LEAST),
        Mistake(partial(_best_split, ratio=lambda A, alpha, B, beta: beta * A / (alpha * B)),
                "alpha and beta are exchanged in the factor", _LEAST),
        Mistake(_twenty_each, "20 examples for each parameter: that suits one law, not any law", _LEAST),
        Mistake(_alike, "as many examples as parameters: that does not look at the law", _LEAST),
    ],
)  # fmt: skip


# Exercise 4: a table of extrapolations

EXTRAPOLATIONS: dict[str, dict[str, float]] = {
    law: dict(zip(("numbers", "seen", "seed 1", "seed 2", "seed 3", "seed 4", "seed 5"), row, strict=True))
    for law, row in {
        "power law": (2, 1.9, -5.2, -4.6, -5.9, -5.0, -4.8),
        "power law with floor": (3, 0.6, -0.4, 0.9, -1.1, 0.7, -0.2),
        "exponential with floor": (3, 0.9, 2.9, 1.2, 2.6, 0.9, 2.2),
        "parabola in logarithms": (3, 0.5, 1.9, -2.8, 4.0, -1.1, -1.9),
        "polynomial of degree 4": (5, 0.2, 6.1, 14.0, 3.8, 9.7, 11.5),
    }.items()
}
"""Laws fitted to the same small runs: how many numbers were fitted, the error on the runs seen (root mean square), and
at ten times their budget (predicted over observed, less 1), for each seed; all in percent, and made up.

The means at ten times the budget, with 95% intervals: -5.10 [-5.72, -4.48]; -0.02 [-1.04, 1.00]; 1.96 [0.88, 3.04];
0.02 [-3.51, 3.55]; 9.02 [3.93, 14.11].
"""

ENOUGH = 2.0
"""A law is good enough if the whole interval is at most so many percent away from the observed loss."""

_TRUST, _FOOLED, _CANNOT_TELL = (
    "power law with floor",
    "polynomial of degree 4",
    {"exponential with floor", "parabola in logarithms"},
)
_PARTS = ("trust", "best fit, fails", "cannot tell")
_ANSWER = 'For instance: {"trust": "power law", "best fit, fails": "power law with floor", "cannot tell": {…}}'
_INTERVALS = [
    "Take each law's five errors and their mean with its 95% interval: mean_interval(np.array([…])). Where does it "
    f"lie, seen from -{ENOUGH:g} and {ENOUGH:g}?",
    f"All of it between -{ENOUGH:g} and {ENOUGH:g}: trust. All of it outside: it fails. Some of it here, some there: "
    "five seeds cannot tell.",
]
_WHY = {
    "power law": "its interval ends more than four percent below the observed loss: without a floor it goes on falling",
    "power law with floor": "its interval reaches about one percent to either side",
    "exponential with floor": "its interval begins below two percent and ends above three",
    "parabola in logarithms": "its mean is nearly 0, and its interval reaches more than three percent to either side",
    "polynomial of degree 4": "its interval begins nearly four percent above the observed loss",
}
_SEEN = "The column seen says how well each law fits the runs that it was fitted to."


def _laws_named(value: Any, part: str) -> set[str]:
    """One name or several, as a set of names that there are."""
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, (list, tuple, set, frozenset)) or not all(isinstance(n, str) for n in several):
        if isinstance(several, (list, tuple, set, frozenset)) and ... in several:
            raise NotAttempted
        raise Wrong(f"{part!r} should be names of laws", _ANSWER)
    known = {name.lower(): name for name in EXTRAPOLATIONS}
    found = set()
    for name in several:
        if (plain := name.strip(" .()").lower()) not in known:
            raise Wrong(f"there is no law {name!r:.60}", f"There are {'; '.join(EXTRAPOLATIONS)}.")
        found.add(known[plain])
    return found


def exercise_4(answer: Any) -> None:
    """Which law for ten times the budget: a table to read."""
    if not isinstance(answer, Mapping) or set(answer) != set(_PARTS):
        raise Wrong(f"expected a dict with {', '.join(map(repr, _PARTS))}", _ANSWER)
    trust, fooled, unsure = (_laws_named(answer[part], part) for part in _PARTS)
    for part, found in (("trust", trust), ("best fit, fails", fooled)):
        if len(found) != 1:
            raise Wrong(f"{part!r} should be one law", _ANSWER)
    for law in EXTRAPOLATIONS:  # in the table's order
        if (law in unsure) != (law in _CANNOT_TELL):
            verb = "can be told, and you say that it cannot" if law in unsure else "cannot be told yet"
            raise Wrong(f"{law} {verb}: {_WHY[law]}", _INTERVALS)
    if trust != {_TRUST}:
        (law,) = trust
        raise Wrong(f"{law} is not to be trusted at ten times the budget: {_WHY[law]}", _INTERVALS)
    if fooled != {_FOOLED}:
        (law,) = fooled
        if law == _TRUST or law in _CANNOT_TELL:
            raise Wrong(f"{law} is not known to fail at ten times the budget: {_WHY[law]}", _INTERVALS)
        raise Wrong(f"{law} fails, and it did not fit best where it saw: another law's error there is lower", _SEEN)


# Exercise 5: which technique first

TECHNIQUES = {
    "accumulate gradients": "makes a large batch fit (chapter 4), and no batch is too large here",
    "average the tunings": "makes one network of several tunings of one base (chapter 12), and here there are none",
    "checkpoint activations": "saves memory in training (chapter 15), and here training fits",
    "contrast without labels": "learns from images without labels (chapter 13), which is not what is missing here",
    "cosine to zero": "lets the rate fall towards an end that is known (chapter 3): a good habit, which does not mend "
    "this",
    "cut channels and distil": "makes a network smaller and faster (chapters 8 and 9), and neither is wanted here",
    "ensemble": "asks several networks and pays for each at every answer (chapter 14), and that does not mend this",
    "fine-tune all weights": "brings what another task has taught (chapter 13), and that is not what is missing here",
    "label smoothing": "changes how sure a network is (chapter 5), and that is not what hurts here",
    "max-norm": "holds back a network that learns wrong labels by heart (chapter 5), and the labels are right here",
    "prune single weights": "makes a file smaller (chapter 8), and no file is too large here",
    "round to 8 bits": "makes a network smaller (chapter 11), and none is too large here",
    "schedule-free": "averages along a run whose end is not known (chapter 3), and the end is not what hurts here",
    "shard (FSDP)": "spreads a training over several devices (chapter 7), and here nothing is too large for one",
}
"""What there is to choose from, and what is to be said of each where it does not help."""

SITUATIONS = {
    "few labels": "fine-tune all weights",
    "phone": "cut channels and distil",
    "batch": "accumulate gradients",
    "two tunings": "average the tunings",
    "wrong labels": "max-norm",
    "open end": "schedule-free",
}
"""Each situation and the technique that the chapters bear out."""

_UNFIT: dict[str, dict[str, str]] = {
    "few labels": {
        "average the tunings": "there has to be a network that was tuned before one can average (chapter 12): how does "
        "the first one come about?",
        "contrast without labels": "it does without labels, and the related images have them: in chapter 13 "
        "(section 5.4) images with labels were the better source, and after a short contrast a network with ten labels "
        "a class was worse than from random weights",
        "ensemble": "its members have all seen the same few labels (chapter 14), and every answer costs them all",
        "label smoothing": "it brings a little where there are thousands of labels (chapter 5): it knows nothing that "
        "the few labels do not say, and the related set does",
        "max-norm": "it is at its best where labels are wrong (chapter 5, section 5.2); yours are right, and few",
    },
    "phone": {
        "round to 8 bits": "it saves the bytes; only kernels for int8 save time, and the phone has none (chapter 11, "
        "section 5.8)",
        "prune single weights": "zeros are multiplied like any other number: only the compressed file is smaller "
        "(chapter 8, section 6.1)",
        "checkpoint activations": "it saves memory on the way back (chapter 15, section 3.4), and an answer never goes "
        "that way",
        "ensemble": "it makes each answer dearer, not cheaper (chapter 14)",
        "average the tunings": "the mean of several networks is as large and as slow as one of them (chapter 12)",
        "fine-tune all weights": "the tuned network is as large and as slow as the one it began with (chapter 13)",
        "shard (FSDP)": "it spreads a training over several devices (chapter 7), and the phone is one, and does not "
        "train",
    },
    "batch": {
        "checkpoint activations": "it runs the forward pass again on the way back (chapter 15, section 3.4): worth it "
        "when not even a small batch fits. Parts of 32 fit as they are, at no extra operation",
        "shard (FSDP)": "it needs several devices (chapter 7), and there is one",
        "round to 8 bits": "it makes a trained network small (chapter 11); what does not fit are a training step's "
        "activations",
        "prune single weights": "masked weights take their room as before, and activations too (chapter 8, section "
        "6.1)",
        "cut channels and distil": "the batch would fit, and the network would be another one (chapters 8 and 9): "
        "what is wanted is the same step",
        "average the tunings": "it averages the weights of several trained networks (chapter 12), not the gradients of "
        "one batch's parts",
    },
    "two tunings": {
        "ensemble": "it asks both networks at each answer (chapter 14), and what is wanted is the price of one",
        "fine-tune all weights": "one would be tuned on the other's data, and these may not leave their team; and it "
        "would forget its own task on the way (chapter 13, section 5.7)",
        "cut channels and distil": "it makes one network smaller (chapters 8 and 9); to teach it both tasks takes "
        "the data, and training",
        "round to 8 bits": "two networks in 8 bits are still two networks to run (chapter 11)",
        "prune single weights": "two sparse networks are still two networks to run (chapter 8)",
    },
    "wrong labels": {
        "label smoothing": "with every fifth label wrong it did the least of the five that were asked about "
        "(chapter 5, section 5.2)",
        "contrast without labels": "the wrong labels come back when it is tuned (chapter 13), and after a short "
        "contrast a network was worse than from random weights",
        "ensemble": "its members learn the same wrong labels (chapter 14), and each answer costs them all",
        "fine-tune all weights": "there is no related network here to begin with, and wrong labels can be learnt by "
        "heart from any start (chapter 13)",
        "cosine to zero": "it takes the noise of the steps away (chapter 3), not that of the labels: the network still "
        "learns them by heart",
    },
    "open end": {
        "cosine to zero": "stopped on its way it cannot be told from a constant rate: its noise is still there "
        "(chapter 3, section 6.3)",
        "average the tunings": "it averages finished tunings of one base (chapter 12), and this is one run, which is "
        "not finished",
        "ensemble": "several runs to train share the days that one could have had (chapter 14), and each may be "
        "stopped as early",
    },
}
"""What is wrong with the more tempting choices."""

_CHOOSE = [
    "What hurts: the labels, the size, the time of an answer, the memory of a step, the run's end? And what is at "
    "hand: data, devices, kernels?",
    "Section 1 has what each technique takes and where it fails; what is not there stands in its own chapter, under "
    "In practice.",
]


def exercise_5(answer: Any) -> None:
    """Which technique first."""
    if not isinstance(answer, Mapping) or set(answer) != set(SITUATIONS):
        raise Wrong(
            f"expected a dict with {', '.join(map(repr, SITUATIONS))}", 'For instance: {"phone": "ensemble", …}'
        )
    chosen = {situation: _technique(answer[situation], situation) for situation in SITUATIONS}
    for situation, technique in chosen.items():
        if technique != SITUATIONS[situation]:
            why = _UNFIT[situation].get(technique) or f"it {TECHNIQUES[technique]}"
            raise Wrong(f"{situation!r}: {technique} is not the first thing to try: {why}", _CHOOSE)


def _technique(value: Any, situation: str) -> str:
    if not isinstance(value, str):
        raise Wrong(f"{situation!r} should have the name of one technique", f"There are {'; '.join(TECHNIQUES)}.")
    if (plain := value.strip(" .").lower()) not in (known := {name.lower(): name for name in TECHNIQUES}):
        raise Wrong(f"there is no technique {value!r:.60}", f"There are {'; '.join(TECHNIQUES)}.")
    return known[plain]


# Exercise 6: a plan of small runs

LARGE = (1e8, 2e9)
"""Parameters and examples of the run that is to be foretold."""
BUDGET = 6 * LARGE[0] * LARGE[1] / 10
"""Operations that all small runs together may take."""

SCHEDULES = {
    "ends with each run": "",
    "one long run, read on the way": "half of a long run is not a run of half the length: its rate has not come down "
    "yet",
    "constant": "without a fall at the end a run's loss is wherever its noise happens to be",
}
_ASKED = ("fitted", "held out", "seeds", "rates", "schedule")
_WIDE, _LEVELS, _FEWEST, _TOGETHER, _BEYOND, _SMALLEST = 8, 3, 6, 0.5, 2, 1000
_PLAN = 'For instance: {"fitted": [(1e6, 1e7), (2e6, 1e7), …], "held out": [(8e6, 8e7)], "seeds": 2, "rates": 2, …}'
_GRID = [
    "Which runs tell what parameters bring and what examples bring? Hold one fixed while the other changes.",
    "Every size with every amount: [(n, d) for n in (…) for d in (…)].",
]
_CHEAPER = [
    "Which runs take most of it? Operations grow with both: twice the parameters and twice the examples are four times "
    "as many.",
    "Shift the whole grid to smaller sizes, or give the largest sizes fewer examples.",
]


def exercise_6(answer: Any) -> None:
    """Plan the small runs."""
    if not isinstance(answer, Mapping) or set(answer) != set(_ASKED):
        raise Wrong(f"expected a dict with {', '.join(map(repr, _ASKED))}", _PLAN)
    fitted, held = (_sizes(answer[part], part) for part in ("fitted", "held out"))
    _tell_apart(fitted)
    seeds, rates = _whole(answer["seeds"], "seeds"), answer["rates"]
    if seeds < 3:
        raise Wrong(f"{seeds} {'seed' if seeds == 1 else 'seeds'} a size: nobody can tell a law's error from chance",
                    "How wide is a 95% interval of two runs? Three are the least that is wanted here.")  # fmt: skip
    transferred = isinstance(rates, str) and rates.strip().lower() == "transferred"
    tries = 3 if transferred else _whole(rates, "rates")
    if tries < 3:
        raise Wrong(f"{tries} {'rate' if tries == 1 else 'rates'} at each size: a size whose rate does not suit it "
                    "looks worse than it is, and the law bends",
                    ["Chapter 3: does the best rate stay where it is as a network grows?",
                     'Three rates at each size, or "transferred" (muP: three at the smallest run).'])  # fmt: skip
    _judge_schedule(answer["schedule"])
    _beyond(fitted, held)
    smallest = min(n * d for n, d in fitted)
    spent = 6 * sum(n * d * (seeds + (0 if transferred else tries)) for n, d in fitted + held)
    spent += 6 * smallest * 3 if transferred else 0
    if spent > BUDGET * (1 + 1e-9):
        raise Wrong(f"all runs together take {spent:.2g} operations, and a tenth of the large run's are {BUDGET:.2g}",
                    _CHEAPER)  # fmt: skip


def _sizes(value: Any, part: str) -> list[tuple[float, float]]:
    """The different pairs of parameters and examples."""
    try:
        if isinstance(value, (str, Mapping)):
            raise TypeError
        pairs = [(float(n), float(d)) for n, d in value]
    except (TypeError, ValueError):
        if isinstance(value, (list, tuple)) and ... in value:
            raise NotAttempted from None
        raise Wrong(f"{part!r} should be a list of runs, each (parameters, examples)", _PLAN) from None
    for n, d in pairs:
        if not (math.isfinite(n) and math.isfinite(d) and n > 0 and d > 0):
            raise Wrong(f"{part!r} has a run ({n:g}, {d:g}): both numbers should be above 0", _PLAN)
        for what, own, large in zip(("parameters", "examples"), (n, d), LARGE, strict=True):
            if own < large / _SMALLEST:
                raise Wrong(f"{part!r} has a run of {own:g} {what}: that is less than a thousandth of the large run's",
                            "So small a run says little about so large a one: what matters there may be "
                            "something else.")  # fmt: skip
    return list(dict.fromkeys(pairs))


def _tell_apart(runs: Sequence[tuple[float, float]]) -> None:
    """Whether the runs tell parameters from examples."""
    if len(runs) < _FEWEST:
        raise Wrong(f"{len(runs)} different runs are fitted, and the law has five numbers: at least {_FEWEST}", _GRID)
    columns = np.array(runs).T
    for what, own in zip(("parameters", "examples"), columns, strict=True):
        if own.max() < _WIDE * own.min() * (1 - 1e-9):
            raise Wrong(f"the {what} of the fitted runs vary by a factor of {own.max() / own.min():.3g}, and should by "
                        f"{_WIDE} at least",
                        "An exponent is a slope in logarithms. How sure is a slope between neighbours?")  # fmt: skip
        if len(set(own.tolist())) < _LEVELS:
            raise Wrong(f"the fitted runs have only two different numbers of {what}: no curve can be told from a line",
                        ["Two points of a power law with a floor: how many laws go through them?", *_GRID])  # fmt: skip
    together = float(np.corrcoef(np.log(columns))[0, 1])
    if abs(together) > _TOGETHER:
        verb = "more" if together > 0 else "fewer"
        raise Wrong(f"the larger the network, the {verb} examples it sees (the logarithms' correlation is "
                    f"{together:.2f}): what brought the gain cannot be told", _GRID)  # fmt: skip


def _whole(value: Any, part: str) -> int:
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not number.is_integer() or number < 1:
        raise Wrong(f"{part!r} should be a whole number, and is {value!r:.60}", _PLAN)
    return int(number)


def _judge_schedule(value: Any) -> None:
    known = f"There are {', '.join(map(repr, SCHEDULES))}."
    if not isinstance(value, str) or (plain := value.strip(" .").lower()) not in SCHEDULES:
        raise Wrong(f"there is no schedule {value!r:.60}", known)
    if SCHEDULES[plain]:
        raise Wrong(SCHEDULES[plain], ["Chapter 3, section 6.3: what was the cosine for 15 epochs worth after 5?",
                                       'Each run has a schedule of its own length: "ends with each run".'])  # fmt: skip


def _beyond(fitted: Sequence[tuple[float, float]], held: Sequence[tuple[float, float]]) -> None:
    """Whether the runs that are held out lie beyond all that were fitted."""
    if not held:
        raise Wrong("no run is held out: nobody will know how far off the law is beyond what it saw",
                    "The largest run that you can afford should not be fitted, but foretold.")  # fmt: skip
    largest = max(n * d for n, d in fitted)
    for n, d in held:
        if n * d < _BEYOND * largest * (1 - 1e-9):
            raise Wrong(f"the run ({n:g}, {d:g}) that is held out takes {n * d / largest:.2g} times the operations of "
                        f"the largest one that is fitted, and should at least {_BEYOND} times",
                        ["To foretell a run among the fitted ones is easy. Where will the law be used?",
                         "Take the largest run out of the fitted ones, and hold it out."])  # fmt: skip


exercise_7 = OpenProject(
    "An open project: a recommendation of one page",
    rubric=["the problem, as a number", "what was measured first", "the first technique, and why", "two that were "
            "turned down", "the price", "how it will be checked", "what would change your mind"],
)  # fmt: skip


# Exercise 8: data that are read again


def _worth(
    unique: float, passes: float, r_star: float = 15.4, *,
    repeated: Callable[[float, float], float] = lambda again, r_star: r_star * (1 - math.exp(-again / r_star)),
    again: Callable[[float], float] = lambda passes: passes - 1,
    before: Callable[[float, float, Callable[[float], float]], float] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Effective examples, and what came with the last pass over what came with the first; ``unique`` ones count one.

    ``again`` is how often they are repeated, ``repeated`` what that is worth; ``before`` what there was a pass ago.
    """

    def after(count: float) -> float:
        return 1 + repeated(again(count), r_star) if count > 1 else count

    earlier = before(passes, r_star, after) if before else after(passes - 1)
    return unique * after(passes), after(passes) - earlier


def _at_the_end(unique: float, passes: float, r_star: float = 15.4) -> tuple[float, float]:
    return _worth(unique, passes, r_star)[0], math.exp(-(passes - 1) / r_star)


def _mean_worth(unique: float, passes: float, r_star: float = 15.4) -> tuple[float, float]:
    effective = _worth(unique, passes, r_star)[0]
    return effective, effective / (unique * passes)


def _in_examples(unique: float, passes: float, r_star: float = 15.4) -> tuple[float, float]:
    effective, share = _worth(unique, passes, r_star)
    return effective, share * unique


def _of_all(unique: float, passes: float, r_star: float = 15.4) -> tuple[float, float]:
    effective, share = _worth(unique, passes, r_star)
    return effective, share * unique / effective


def _formula(passes: float, r_star: float) -> float:
    """The law taken for what it is not made for: less than one pass."""
    return 1 + r_star * (1 - math.exp(-(passes - 1) / r_star))


def _usual_constant(unique: float, passes: float, r_star: float = 15.4) -> tuple[float, float]:
    return _worth(unique, passes)


def _whole_passes(unique: float, passes: float, r_star: float = 15.4) -> tuple[float, float]:
    return _worth(unique, math.floor(passes), r_star)


_EFFECTIVE = ("the effective examples", "the share")
_REPEATED = [
    "Work it out for passes = 1: nothing is repeated, and D' is unique.",
    "For passes = 2 and r_star = 2, D' is 1.787 times unique.",
    "again = passes - 1; unique + unique * r_star * (1 - math.exp(-again / r_star)).",
]
_LAST_PASS = [
    "How many effective examples were there one pass ago? What has come since then?",
    "(D' after passes - D' after passes - 1) / unique.",
]
_BELOW_ONE = [
    "After one pass and a half: how many effective examples were there a pass ago, after half a pass?",
    "Up to one pass nothing is repeated: D' = unique * passes. The formula holds from there on.",
]

exercise_8 = Method(
    "Data that are read again",
    right=_worth,
    what=_EFFECTIVE,
    hint=[*_REPEATED, *_LAST_PASS],
    cases={
        "4 passes": (1000.0, 4.0),
        "40 passes": (5e9, 40.0),
        "another constant, 7 passes": (250.0, 7.0, 3.0),
        "2 passes and a half": (100.0, 2.5),
        "a single pass": (64.0, 1.0),
        "1 pass and a half": (1000.0, 1.5),
        "1 pass and a quarter, another constant": (80.0, 1.25, 2.0),
    },
    mistakes=[
        Mistake(partial(_worth, again=lambda passes: passes),
                "the first pass is counted as a repetition: R is passes - 1", _REPEATED),
        Mistake(lambda unique, passes, r_star=15.4: (unique * passes, 1.0),
                "each pass counts like the first by your rule: nothing wears off", _REPEATED),
        Mistake(lambda unique, passes, r_star=15.4: (
                    unique * _worth(1, passes, r_star)[0] - unique, _worth(1, passes, r_star)[1]),
                "only the repeated examples are counted: the first pass is missing", _REPEATED),
        Mistake(partial(_worth, repeated=lambda again, r_star: r_star * math.exp(-again / r_star)),
                "1 - exp(…) is wanted, and exp(…) stands there: the more is repeated, the less it would all be worth",
                _REPEATED),
        Mistake(partial(_worth, repeated=lambda again, r_star: 1 - math.exp(-again / r_star)),
                "the factor R* is missing before the bracket", _REPEATED),
        Mistake(partial(_worth, repeated=lambda again, r_star: r_star * (1 - math.exp(-again))),
                "the repetitions are not divided by R* in the exponent", _REPEATED),
        Mistake(_at_the_end,
                "this is what an example is worth at the very end of the last pass, and what is wanted is the "
                "whole pass",
                _LAST_PASS),
        Mistake(_mean_worth, "this is what all passes are worth on average, and what is wanted is the last "
                             "one", _LAST_PASS),
        Mistake(_in_examples, "these are examples, and what is wanted is a share of the first pass: divide by unique",
                _LAST_PASS),
        Mistake(_of_all, "this is the last pass's share of all effective examples, and what is wanted is that "
                         "of the first "
                "pass", _LAST_PASS),
        Mistake(lambda unique, passes, r_star=15.4: (
                    _worth(unique, passes, r_star)[0],
                    _worth(1, passes + 1, r_star)[0] - _worth(1, passes, r_star)[0]),
                "this is the worth of the pass that would come next", _LAST_PASS),
        # Right as long as it is the usual one, whole, at least 2
        Mistake(_usual_constant, "R* is 15.4 by your rule, whatever is handed in",
                "r_star is an argument: the 15.4 in the first line is only its value by default."),
        Mistake(_whole_passes, "passes are rounded down: part of a pass counts, too", _REPEATED),
        Mistake(partial(_worth, before=lambda passes, r_star, after: _formula(passes - 1, r_star)),
                "the formula is carried on below one pass, where nothing has been repeated yet", _BELOW_ONE),
        Mistake(partial(_worth, before=lambda passes, r_star, after: after(max(passes - 1, 1)) if passes > 1 else 0),
                "the last pass began in the middle of the first one: what came since then is more than the part that "
                "was repeated", _BELOW_ONE),
    ],
)  # fmt: skip
