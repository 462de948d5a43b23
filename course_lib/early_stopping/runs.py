"""Stopping whole runs: rules that end a run which others have left behind, one epoch at a time.

======================  ===============================================================  ============================
name                    ends a run when                                                  source
======================  ===============================================================  ============================
``median_rule``         its best is worse than the median of the others' averages        Golovin et al. 2017, KDD
``percentile_rule``     its best is worse than a percentile of the others here           as Optuna's PercentilePruner
``stopping_rule``       at a rung, it is not among the best 1/η that came so far         Li et al. 2018,
                                                                                         arXiv:1810.05934
``patient_rule``        its last values are worse than its best before                   as Optuna's PatientPruner
``threshold_rule``      a value is out of bounds                                         as Optuna's ThresholdPruner
``prune``               one run after another, each with the rule: what is saved
======================  ===============================================================  ============================

A rule is a pure function ``(curve, completed, stopped) -> whether to end it``: the values of the run so far, one an
epoch, and those of the runs before it, which went to their end or were stopped on the way. ``partial`` sets the rest:
``prune(curves, partial(median_rule, mode="min"))``. With ``mode="max"`` high values are good.

Optuna's ``MedianPruner`` is ``percentile_rule`` at 50: it looks at the others' values at this very epoch. The rule of
Vizier, which it is named after, takes each other's average over all epochs so far, which is worse than its value now:
it stops less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from course_lib.lab.arguments import at_least, is_number, require

Mode = Literal["min", "max"]
Curve = Sequence[float]
Rule = Callable[[Curve, Sequence[Curve], Sequence[Curve]], bool]
"""``(curve, completed, stopped) -> whether to end the run now``."""


def check_mode(mode: str) -> None:
    """Raise ValueError unless it is one of the two."""
    require("mode", mode, lambda m: m in ("min", "max"), "'min' or 'max'")


def badness(value: float, mode: Mode) -> float:
    """Return a number that is low where ``value`` is good; infinite for a NaN, which is worst."""
    return math.inf if math.isnan(value) else value if mode == "min" else -value


# --- Rules ------------------------------------------------------------------------------------------------------------


def median_rule(
    curve: Curve,
    completed: Sequence[Curve],
    stopped: Sequence[Curve] = (),
    *,
    mode: Mode = "max",
    startup: int = 5,
    warmup: int = 0,
) -> bool:
    r"""End a run whose best value up to epoch s is worse than the median of the completed runs' averages up to s.

    Not before ``startup`` runs are completed, and not in the first ``warmup`` epochs.
    Source: Golovin et al. 2017, Google Vizier: a service for black-box optimization, KDD, section 3.2.

    Raises
    ------
    ValueError : an argument is out of its range.
    """
    _check(curve, mode, startup, warmup)
    if len(completed) < max(startup, 1) or len(curve) <= warmup:
        return False
    averages = [np.mean([badness(v, mode) for v in other[: len(curve)]]) for other in completed]
    return _best(curve, mode) > float(np.median(averages))


def percentile_rule(
    curve: Curve,
    completed: Sequence[Curve],
    stopped: Sequence[Curve] = (),
    *,
    percentile: float = 50.0,
    mode: Mode = "max",
    startup: int = 5,
    warmup: int = 0,
    every: int = 1,
    min_runs: int = 1,
) -> bool:
    """End a run whose best value so far is not among the best ``percentile`` percent of the completed runs' here.

    ``startup`` and ``warmup`` are as in ``median_rule``; the run is judged after each ``every`` epochs, and by not
    fewer than ``min_runs`` others that came so far. A run of nothing but NaN is ended. Arguments of Optuna's
    ``PercentilePruner``: ``n_startup_trials``, ``n_warmup_steps``, ``interval_steps``, ``n_min_trials``.

    Raises
    ------
    ValueError : an argument is out of its range.
    """
    _check(curve, mode, startup, warmup)
    at_least(1, every=every, min_runs=min_runs)
    require("percentile", percentile, lambda p: is_number(p) and 0 <= p <= 100, "a number from 0 to 100")
    if len(completed) < max(startup, 1) or len(curve) <= warmup or (len(curve) - 1 - warmup) % every:
        return False
    if all(math.isnan(value) for value in curve):
        return True
    here = [other[len(curve) - 1] for other in completed if len(other) >= len(curve)]
    known = [badness(value, mode) for value in here if not math.isnan(value)]
    if len(here) < min_runs or not known:
        return False
    return _best(curve, mode) > float(np.percentile(known, percentile))


def stopping_rule(
    curve: Curve,
    completed: Sequence[Curve],
    stopped: Sequence[Curve] = (),
    *,
    min_resource: int = 1,
    reduction_factor: int = 3,
    mode: Mode = "max",
) -> bool:
    r"""End a run at a rung (:math:`r\,\eta^k` epochs) unless it is among the best 1/η of all that came there so far.

    Successive halving for runs that come one by one: nobody waits, and nobody is called back who was sent away. As
    Optuna's ``SuccessiveHalvingPruner``, with r its ``min_resource`` and η its ``reduction_factor``. The first to reach
    a rung always passes. For the rule that calls runs back see ``Asha``.

    Raises
    ------
    ValueError : an argument is out of its range.
    """
    _check(curve, mode)
    at_least(1, min_resource=min_resource)
    at_least(2, reduction_factor=reduction_factor)
    epochs, rung = len(curve), min_resource
    while rung < epochs:
        rung *= reduction_factor
    if rung != epochs:
        return False
    if math.isnan(curve[-1]):
        return True
    own = badness(curve[-1], mode)
    came = [other[epochs - 1] for other in (*completed, *stopped) if len(other) >= epochs]
    values = sorted([own, *(badness(value, mode) for value in came if not math.isnan(value))])
    return own > values[max(1, len(values) // reduction_factor) - 1]


def patient_rule(
    curve: Curve,
    completed: Sequence[Curve] = (),
    stopped: Sequence[Curve] = (),
    *,
    patience: int,
    min_delta: float = 0.0,
    mode: Mode = "max",
) -> bool:
    """End a run whose last ``patience`` + 1 values are all worse than the best before, by more than ``min_delta``.

    As Optuna's ``PatientPruner`` without a pruner of its own. Not ``Patience``: a run that stays where it is goes on,
    and ``min_delta`` is a tolerance, not an improvement that is asked for.

    Raises
    ------
    ValueError : an argument is out of its range.
    """
    _check(curve, mode)
    at_least(0, patience=patience)
    require("min_delta", min_delta, lambda d: is_number(d) and d >= 0, "a number of at least 0")
    if len(curve) <= patience + 1:
        return False
    before, last = _best(curve[: -patience - 1], mode), _best(curve[-patience - 1 :], mode)
    return before < math.inf and last < math.inf and before + min_delta < last


def threshold_rule(
    curve: Curve,
    completed: Sequence[Curve] = (),
    stopped: Sequence[Curve] = (),
    *,
    lower: float = -math.inf,
    upper: float = math.inf,
    warmup: int = 0,
) -> bool:
    """End a run whose last value is below ``lower``, above ``upper``, or NaN; not in the first ``warmup`` epochs.

    Raises
    ------
    ValueError : there are no bounds, or the lower one is above the upper one.
    """
    _check(curve, "min", 0, warmup)
    bounds = f"lower={lower!r}, upper={upper!r}"
    if not lower <= upper or (lower == -math.inf and upper == math.inf):
        raise ValueError(f"{bounds}: must be a lower bound, an upper one above it, or both")
    return len(curve) > warmup and not lower <= curve[-1] <= upper


# --- All runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """What became of each run.

    Attributes
    ----------
    epochs : that each was trained.
    completed : whether it went to the end of its curve.
    all_epochs : of all curves together.
    """

    epochs: tuple[int, ...]
    completed: tuple[bool, ...]
    all_epochs: int

    @property
    def share(self) -> float:
        """The share of all epochs that were trained."""
        return sum(self.epochs) / self.all_epochs

    def best(self, curves: Sequence[Curve], mode: Mode = "max") -> int:
        """Return which run had the best value among all that were seen."""
        check_mode(mode)
        seen = [_best(curve[:n], mode) for curve, n in zip(curves, self.epochs, strict=True)]
        return int(np.argmin(seen))


def prune(curves: Sequence[Curve], rule: Rule) -> Pruned:
    """Replay runs one after another, in the order in which they stand, each ended where ``rule`` says so.

    A run of which the rule says so at its very last epoch has saved nothing, and yet is none of the completed ones.

    Raises
    ------
    ValueError : no curves, or an empty one.
    """
    require("curves", [len(c) for c in curves], lambda n: n and min(n) > 0, "at least one, each of at least one epoch")
    completed: list[Curve] = []
    stopped: list[Curve] = []
    epochs, done = [], []
    for curve in curves:
        ended = next((n for n in range(1, len(curve) + 1) if rule(curve[:n], completed, stopped)), None)
        (completed if ended is None else stopped).append(curve[:ended])
        epochs.append(len(curve) if ended is None else ended)
        done.append(ended is None)
    return Pruned(tuple(epochs), tuple(done), sum(len(c) for c in curves))


def _best(curve: Curve, mode: Mode) -> float:
    return min(badness(value, mode) for value in curve)


def _check(curve: Curve, mode: Mode, startup: int = 0, warmup: int = 0) -> None:
    require("curve", len(curve), lambda n: n > 0, "of at least one epoch")
    check_mode(mode)
    at_least(0, startup=startup, warmup=warmup)
