"""Where a criterion would have stopped: recorded curves, asked afterwards.

====================  ==============================================================================================
name                  what it gives
====================  ==============================================================================================
``as_history``        a history made of columns of numbers, for curves that come from elsewhere
``best_row``          the row that ``Recipe.keep`` would keep
``replay``            where a criterion stops on a recorded curve, and which row is kept
``regret``            what that stop costs and saves, by another column: usually the test split's
====================  ==============================================================================================

A run is trained once, to the end, and watched (``Recipe(watch=...)``); any number of criteria are then compared on it
at no cost. This is exact, since a criterion sees nothing but the history.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from course_lib.early_stopping.criteria import Criterion, check_column, lower_is_better
from course_lib.lab.arguments import require
from course_lib.lab.training import History


def as_history(columns: Mapping[str, Sequence[float]]) -> History:
    """Return a history with these columns, one row a validation; ``epoch`` counts from 1 unless it is given.

    Raises
    ------
    ValueError : no columns, or columns of different lengths.
    """
    lengths = {name: len(values) for name, values in columns.items()}
    require("columns", lengths, lambda n: len(set(n.values())) == 1, "at least one, all of the same length")
    count = next(iter(lengths.values()))
    whole = {"epoch": range(1, count + 1)} | dict(columns)
    rows = [{name: float(values[k]) for name, values in whole.items()} for k in range(count)]
    return History(rows=rows, epochs=int(rows[-1]["epoch"]) if rows else 0)


def best_row(values: Sequence[float], *, lower: bool) -> int:
    """Return the index of the best value, the first of several, as ``Recipe.keep`` finds it.

    Raises
    ------
    ValueError : there are no values.
    """
    require("values", len(values), lambda n: n > 0, "of at least one row")
    best, at = math.inf if lower else -math.inf, 0
    for k, value in enumerate(values):
        if not k or (value < best if lower else value > best):  # the first stays where all comparisons fail: NaN
            best, at = value, k
    return at


@dataclass(frozen=True)
class Stop:
    """Where a run ended.

    Attributes
    ----------
    row : index of the last row that was trained for.
    kept : index of the row whose weights remain, the best of ``column`` up to ``row``.
    epochs : trained in all.
    fired : whether the criterion stopped it; else the recorded curve ended first.
    column : by which the best is the best.
    """

    row: int
    kept: int
    epochs: float
    fired: bool
    column: str


def replay(criterion: Criterion, history: History, *, keep: str = "val_loss") -> Stop:
    """Return where ``criterion`` would have stopped the run of ``history``, and the row that ``keep`` would have kept.

    The criterion is asked once a row, each time with a history that ends there, as in ``fit``: with its columns and the
    number of epochs before this one. The losses of single steps are left out.

    Raises
    ------
    ValueError : the history has no rows.
    KeyError : it lacks a column that is asked for.
    """
    require("history", len(history), lambda n: n > 0, "of at least one row")
    check_column(keep=keep)
    values, row, fired = history[keep], len(history) - 1, False
    for k in range(len(history)):
        seen = History(rows=history.rows[: k + 1], epochs=math.ceil(history.rows[k]["epoch"]) - 1)
        if criterion(seen):
            row, fired = k, True
            break
    kept = best_row(values[: row + 1], lower=lower_is_better(keep))
    return Stop(row, kept, history.rows[row]["epoch"], fired, keep)


@dataclass(frozen=True)
class Regret:
    """What a stop costs by a column, and what it saves.

    Attributes
    ----------
    value : of the column at the row that was kept.
    below_best : by how much that is worse than the best of the whole recorded curve; 0 or more.
    below_last : by how much it is worse than the last row, where nothing was stopped; below zero if better.
    share : of the recorded epochs that were trained.
    """

    value: float
    below_best: float
    below_last: float
    share: float


def regret(history: History, stop: Stop, column: str = "test_accuracy") -> Regret:
    """Return what ``stop`` costs by ``column`` of the whole ``history`` that it was found in.

    Raises
    ------
    ValueError : the stop lies beyond the history's rows.
    KeyError : it lacks the column.
    """
    require("stop", stop, lambda s: s.row < len(history), f"in a history of {len(history)} rows")
    lower = lower_is_better(column)
    values, sign = history[column], 1 if lower else -1
    value, best = values[stop.kept], values[best_row(values, lower=lower)]
    return Regret(value, sign * (value - best), sign * (value - values[-1]), stop.epochs / history.rows[-1]["epoch"])
