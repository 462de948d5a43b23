"""Criteria against the loops of Keras and of Lightning, written anew; and in ``fit``, with checkpoints."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from course_lib import early_stopping as es
from course_lib.lab.checkpoints import Checkpoint
from course_lib.lab.data import Split
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.training import History, fit, fresh
from tests.early_stopping.small import RECIPE, digits, network, random_curves, untimed

NEVER = None


def stops_at(criterion: es.Criterion, **columns: Sequence[float]) -> int | None:
    """The number of rows after which it stops."""
    found = es.replay(criterion, es.as_history(columns), keep=next(iter(columns)))
    return found.row + 1 if found.fired else NEVER


# --- Patience ---------------------------------------------------------------------------------------------------------


def keras(values: Sequence[float], patience: int, min_delta: float, lower: bool) -> int | None:
    """The documented rule of ``keras.callbacks.EarlyStopping``."""
    less = (lambda a, b: a < b) if lower else (lambda a, b: a > b)
    delta = -min_delta if lower else min_delta
    best, wait = (math.inf if lower else -math.inf), 0
    for epoch, current in enumerate(values):
        wait += 1
        if less(current - delta, best):
            best, wait = current, 0
            continue
        if wait >= patience and epoch > 0:
            return epoch + 1
    return NEVER


def lightning(values: Sequence[float], patience: int, min_delta: float, lower: bool) -> int | None:
    """The documented rule of Lightning's ``EarlyStopping``, with ``check_finite``."""
    score, count = (np.inf if lower else -np.inf), 0
    for check, value in enumerate(values, start=1):
        if not np.isfinite(value):
            return check
        improved = value + min_delta < score if lower else value - min_delta > score
        if improved:
            score, count = value, 0
        else:
            count += 1
            if count >= patience:
                return check
    return NEVER


@pytest.mark.parametrize("lower", [True, False])
def test_patience_stops_where_keras_and_lightning_stop(lower: bool) -> None:
    column = "val_loss" if lower else "val_accuracy"
    fired = 0
    for ties in (False, True):
        for curve in random_curves(40, 30, seed=1, ties=ties):
            values = [1 - v for v in curve] if lower else curve
            for patience, delta in itertools.product((0, 1, 2, 5), (0.0, 0.03, 0.1)):
                found = stops_at(es.Patience(patience, delta, column), **{column: values})
                assert found == keras(values, patience, delta, lower)
                assert found == lightning(values, patience, delta, lower)
                fired += found is not NEVER
    assert fired > 500


def test_a_nan_is_no_improvement_as_in_keras() -> None:
    values = [1.0, 0.8, math.nan, math.nan, 0.7, math.nan, 0.9, 0.9]
    assert stops_at(es.Patience(3), val_loss=values) == keras(values, 3, 0.0, True) == 8
    assert lightning(values, 3, 0.0, True) == 3


def test_small_steps_together_are_an_improvement() -> None:
    """The best value stays until it is beaten by more than min_delta."""
    falling = [1.0 - 0.04 * k for k in range(12)]
    assert stops_at(es.Patience(3, min_delta=0.1), val_loss=falling) is NEVER
    assert stops_at(es.Patience(2, min_delta=0.1), val_loss=falling) == 3
    assert stops_at(es.Patience(1, min_delta=0.25), val_loss=[1.0, 0.75]) == 2  # by exactly that is none


def test_smoothing_is_the_weighted_mean() -> None:
    values, s = random_curves(1, 25, seed=3)[0], 0.7
    weights = [s ** np.arange(t, -1, -1) for t in range(25)]
    expected = [w @ values[: len(w)] / w.sum() for w in weights]
    np.testing.assert_allclose(es.smoothed(values, s), expected, rtol=1e-12)
    assert es.smoothed(values, 0.0) == values
    loss = [1 - v for v in values]
    plain = stops_at(es.Patience(2), val_loss=[1 - v for v in expected])
    assert stops_at(es.Patience(2, smoothing=s), val_loss=loss) == plain != stops_at(es.Patience(2), val_loss=loss)


# --- Targets, budgets, several ----------------------------------------------------------------------------------------


def test_a_target_is_reached_from_its_own_side() -> None:
    assert stops_at(es.TargetReached("val_loss", 0.5), val_loss=[0.9, 0.51, 0.5, 0.4]) == 3
    assert stops_at(es.TargetReached("val_accuracy", 0.5), val_accuracy=[0.2, 0.49, 0.5, 0.4]) == 3
    assert stops_at(es.TargetReached("val_accuracy", 0.6), val_accuracy=[0.2, math.nan, 0.5]) is NEVER


def test_budgets() -> None:
    columns = {"epoch": [0.5, 1, 1.5, 2], "examples": [50, 100, 150, 200], "seconds": [0.25, 0.25, 0.5, 0.25]}
    assert stops_at(es.BudgetSpent(epochs=1.5), **columns) == 3
    assert stops_at(es.BudgetSpent(examples=100), **columns) == 2
    assert stops_at(es.BudgetSpent(seconds=1), **columns) == 3  # of all rows together
    assert stops_at(es.BudgetSpent(epochs=2, examples=60), **columns) == 2
    assert stops_at(es.BudgetSpent(epochs=3, seconds=2), **columns) is NEVER


def test_several_at_once() -> None:
    columns = {"val_loss": [3.0, 2, 3, 3, 1, 2, 2], "val_accuracy": [0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.3]}
    loss, accuracy = es.Patience(2), es.Patience(2, column="val_accuracy")
    assert stops_at(loss, **columns) == 4
    assert stops_at(accuracy, **columns) == 6
    assert stops_at(es.any_of(loss, accuracy), **columns) == 4
    # at the fourth row the loss has waited, at the sixth the accuracy: both at once only at the seventh
    assert stops_at(es.all_of(loss, accuracy), **columns) == 7
    assert stops_at(es.all_of(loss, es.BudgetSpent(epochs=6)), **columns) == 7
    assert stops_at(es.any_of(es.all_of(loss, accuracy), es.BudgetSpent(epochs=5)), **columns) == 5


# --- In a run ---------------------------------------------------------------------------------------------------------


def heard_over_half(model: nn.Module, data: Split, **settings: Any) -> float:
    """Above zero in the middle of the run; the evidence itself stays below."""
    return 0.5 - es.silent_share(model, data, **settings)


WATCHED = {"evidence": es.EvidenceColumn(examples=40, measure=heard_over_half)}
IN_RUNS: dict[str, es.Criterion] = {
    "patience": es.Patience(2),
    "smooth patience": es.Patience(2, 0.001, "val_accuracy", 0.5),
    "GL": es.GeneralizationLoss(2.0),
    "PQ": es.ProgressQuotient(0.02, strip=2),
    "UP": es.SuccessiveIncreases(2, strip=1),
    "progress": es.LittleProgress(100.0, strip=3),
    "target": es.TargetReached("val_accuracy", 0.55),
    "budget": es.BudgetSpent(examples=900),
    "evidence": es.Evidence(smoothing=0.3),
    "unpromising": es.Unpromising(best=0.95, at=12),
    "all": es.all_of(es.Patience(1), es.BudgetSpent(epochs=6)),
    "any": es.any_of(es.Patience(3), es.GeneralizationLoss(4.0)),
}


@pytest.fixture(scope="module")
def whole() -> History:
    """A run to its end."""
    recipe = replace(RECIPE, watch=WATCHED)
    return fit(fresh(network, recipe, seed=0), digits(), recipe, seed=0)


class Killed(BaseException):
    """What nothing catches."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Let a run die after it has saved its state so many times."""
    real = Checkpoint.save

    def arm(times: int | None) -> None:
        left = [times]

        def save(self: Checkpoint, history: History) -> None:
            real(self, history)
            if left[0] is not None:
                left[0] -= 1
                if not left[0]:
                    raise Killed

        monkeypatch.setattr(Checkpoint, "save", save)

    return arm


@pytest.mark.parametrize("name", IN_RUNS)
def test_a_run_stops_where_its_curve_says_also_after_a_kill(
    name: str, whole: History, kill: Callable[[int | None], None], tmp_path: Path
) -> None:
    criterion = IN_RUNS[name]
    expected = es.replay(criterion, whole)
    assert expected.fired, "this would say nothing"
    assert 2 <= expected.row < 11, "this would say little"
    recipe = replace(RECIPE, watch=WATCHED, stop=criterion)
    kill(2)
    with pytest.raises(Killed):
        fit(fresh(network, recipe, seed=0), digits(), recipe, seed=0, checkpoint=tmp_path / "run.pt")
    kill(None)
    history = fit(fresh(network, recipe, seed=0), digits(), recipe, seed=0, checkpoint=tmp_path / "run.pt")
    assert history.stopped
    assert untimed(history) == untimed(whole)[: expected.row + 1]


def test_criteria_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    criteria = [*IN_RUNS.values(), es.Patience(3), es.Patience(2, 0.01), es.GeneralizationLoss(3.0)]
    criteria += [es.all_of(es.Patience(2), es.BudgetSpent(epochs=6)), es.any_of(*IN_RUNS["all"].criteria)]  # type: ignore[attr-defined]
    assert len({fingerprint(criterion) for criterion in criteria}) == len(criteria)
    assert fingerprint(es.all_of(es.Patience(1), es.BudgetSpent(epochs=6))) == fingerprint(IN_RUNS["all"])
    recipe = replace(RECIPE, epochs=1, stop=es.Patience(2))
    fit(fresh(network, recipe, seed=0), digits(), recipe, seed=0, checkpoint=tmp_path / "run.pt")
    other = replace(recipe, stop=es.Patience(3))
    with pytest.raises(ValueError, match="stop"):
        fit(fresh(network, other, seed=0), digits(), other, seed=0, checkpoint=tmp_path / "run.pt")


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match="val_los"):
        stops_at(es.Patience(2, column="val_los"), val_loss=[1.0, 2.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.Patience(-1), "patience=-1: must be a whole number of at least 0"),
        (lambda: es.Patience(2.0), "patience=2.0: must be a whole number"),  # type: ignore[arg-type]
        (lambda: es.Patience(2, -0.1), "min_delta=-0.1: must be a number of at least 0"),
        (lambda: es.Patience(2, math.nan), "min_delta=nan: must be"),
        (lambda: es.Patience(2, smoothing=1.0), "smoothing=1.0: must be a number of at least 0 and below 1"),
        (lambda: es.Patience(2, column=""), "column='': must be the name of a column"),
        (lambda: es.TargetReached("val_loss", math.inf), "value=inf: must be a number"),
        (lambda: es.BudgetSpent(), "must have epochs=, examples= or seconds="),
        (lambda: es.BudgetSpent(epochs=0), "epochs=0: must be a number above 0, or None"),
        (lambda: es.all_of(), "criteria=(): must be at least one function"),
        (lambda: es.any_of(es.Patience(1), 3), "must be at least one function of a history"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
