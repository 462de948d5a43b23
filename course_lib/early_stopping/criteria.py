"""Stopping criteria: when a run is over, as pure functions of its history.

==========================  ========================================================================================
name                        stops
==========================  ========================================================================================
``Patience``                after so many validations in a row without an improvement, as Keras and Lightning do
``TargetReached``           when a column is good enough
``BudgetSpent``             after so many epochs, examples or seconds
``all_of``, ``any_of``      when all, or one, of several say so
==========================  ========================================================================================

Each is a frozen dataclass and is called with the whole history, so it has no state that could be lost: a run that goes
on from a checkpoint stops where it would have stopped, and a recorded curve can be asked afterwards (``replay``).
``Recipe(stop=Patience(5), keep="val_loss")`` is the usual early stopping.

It says whether it holds *now*, at the last row. Alone that is where the run ends; below ``all_of`` a criterion may hold
and cease to. Which values are good is told by a column's name, as for ``Recipe.keep``: low ones if it ends in ``loss``,
else high ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.training import History

Criterion = Callable[[History], bool]
"""``history -> whether to stop now``: what ``Recipe.stop`` takes."""


def lower_is_better(column: str) -> bool:
    """Whether low values of a column are good: if its name ends in ``loss``, as for ``Recipe.keep``."""
    return column.endswith("loss")


# --- Patience ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patience:
    r"""Stop after ``patience`` validations in a row none of which was better than the best by more than ``min_delta``.

    Parameters
    ----------
    patience : validations (rows of the history, as in Lightning; Keras' are epochs). 0 is as 1, as in both.
    min_delta : an absolute difference, as in both; an improvement of exactly ``min_delta`` is none. The best value
        moves only with an improvement, so many small steps together count as one large one.
    column : of the history.
    smoothing : 0, or the share of the past in a moving average of the column, which is then what is watched.

    ``EarlyStopping`` of Keras and that of Lightning count alike; they differ in NaN (Lightning ends the run at once, in
    Keras and here it is no improvement). ``ReduceLROnPlateau`` of torch waits one validation longer (it acts after
    *more* than ``patience``), and its threshold is relative.

    Raises
    ------
    ValueError : names the argument that is out of its range.
    """

    patience: int
    min_delta: float = 0.0
    column: str = "val_loss"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, patience=self.patience)
        require("min_delta", self.min_delta, lambda d: is_number(d) and d >= 0, "a number of at least 0")
        check_smoothing(self.smoothing)
        check_column(column=self.column)

    def __call__(self, history: History) -> bool:
        values = smoothed(history[self.column], self.smoothing)
        return waited(values, self.min_delta, lower=lower_is_better(self.column)) >= max(1, self.patience)


def waited(values: Sequence[float], min_delta: float = 0.0, *, lower: bool = True) -> int:
    """Return how many values in a row, up to the last, were not better than the best before by more than ``min_delta``.

    A NaN is never better.
    """
    best, waits = math.inf, 0
    for value in values:
        error = value if lower else -value
        if error + min_delta < best:
            best, waits = error, 0
        else:
            waits += 1
    return waits


def smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    r"""Return the moving averages :math:`\hat m_t=m_t/(1-s^t)` with :math:`m_t=s\,m_{t-1}+(1-s)\,x_t`, :math:`m_0=0`.

    The division undoes the pull towards zero of the beginning: the first average is the first value. The values
    themselves with s = 0.
    """
    if not smoothing:
        return list(values)
    averages, m, weight = [], 0.0, 0.0
    for value in values:
        m = smoothing * m + (1 - smoothing) * value
        weight = smoothing * weight + (1 - smoothing)  # 1 - s^t
        averages.append(m / weight)
    return averages


# --- Targets and budgets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetReached:
    """Stop when a column is at ``value`` or better.

    Raises
    ------
    ValueError : ``value`` is no number.
    """

    column: str
    value: float

    def __post_init__(self) -> None:
        check_column(column=self.column)
        require("value", self.value, is_number, "a number")

    def __call__(self, history: History) -> bool:
        last = history[self.column][-1]
        return last <= self.value if lower_is_better(self.column) else last >= self.value


@dataclass(frozen=True)
class BudgetSpent:
    """Stop after so many epochs, examples, or seconds of training alone, whichever comes first.

    A budget of seconds ends elsewhere on another machine, or another day.

    Raises
    ------
    ValueError : no budget at all, or one that is no number above 0.
    """

    epochs: float | None = None
    examples: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ValueError("BudgetSpent() has no budget: must have epochs=, examples= or seconds=")
        for name, value in given.items():
            require(name, value, lambda x: is_number(x) and x > 0, "a number above 0, or None")

    def __call__(self, history: History) -> bool:
        last = history.rows[-1]
        return (
            (self.epochs is not None and last["epoch"] >= self.epochs)
            or (self.examples is not None and history["examples"][-1] >= self.examples)
            or (self.seconds is not None and math.fsum(history["seconds"]) >= self.seconds)
        )


# --- Several at once --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllOf:
    """See ``all_of``."""

    criteria: tuple[Criterion, ...]

    def __call__(self, history: History) -> bool:
        return all(criterion(history) for criterion in self.criteria)


@dataclass(frozen=True)
class AnyOf:
    """See ``any_of``."""

    criteria: tuple[Criterion, ...]

    def __call__(self, history: History) -> bool:
        return any(criterion(history) for criterion in self.criteria)


def all_of(*criteria: Criterion) -> AllOf:
    """Return the criterion that holds where all of these hold at once.

    ``all_of(Patience(3), BudgetSpent(epochs=10))`` does not stop before the tenth epoch; loss and accuracy are watched
    together by ``all_of(Patience(3), Patience(3, column="val_accuracy"))``.

    Raises
    ------
    ValueError : there are none, or one cannot be called.
    """
    return AllOf(_checked(criteria))


def any_of(*criteria: Criterion) -> AnyOf:
    """Return the criterion that holds where one of these holds: ``any_of(GeneralizationLoss(5), LittleProgress())``.

    Raises
    ------
    ValueError : there are none, or one cannot be called.
    """
    return AnyOf(_checked(criteria))


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _checked(criteria: tuple[Criterion, ...]) -> tuple[Criterion, ...]:
    good = bool(criteria) and all(callable(criterion) for criterion in criteria)
    require("criteria", criteria, lambda _: good, "at least one function of a history")
    return criteria


def check_smoothing(smoothing: Any) -> None:
    """Raise ValueError unless it is a share that leaves something for the present."""
    require("smoothing", smoothing, lambda s: is_number(s) and 0 <= s < 1, "a number of at least 0 and below 1")


def check_column(**arguments: Any) -> None:
    """Raise ValueError for the first argument that is no name of a column."""
    for name, value in arguments.items():
        require(name, value, lambda c: isinstance(c, str) and c != "", "the name of a column of the history")
