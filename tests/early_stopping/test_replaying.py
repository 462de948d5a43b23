"""Replays against runs that ``fit`` really stops, and the rows that it really keeps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from course_lib import early_stopping as es
from course_lib.lab.training import Best, History, evaluate, fit, fresh
from tests.early_stopping.small import RECIPE, digits, network, random_curves


@pytest.mark.parametrize("keep", ["val_loss", "val_accuracy"])
def test_the_kept_row_is_the_one_whose_weights_fit_keeps(keep: str) -> None:
    recipe = replace(RECIPE, keep=keep, stop=es.Patience(4))
    model = fresh(network, recipe, seed=1)
    history = fit(model, digits(), recipe, seed=1)
    found = es.replay(es.Patience(4), history, keep=keep)
    assert found.fired
    assert found.row == len(history) - 1 != found.kept
    assert found.epochs == history["epoch"][-1]
    kept = evaluate(model, digits().val)
    assert (kept.loss, kept.accuracy) == (history["val_loss"][found.kept], history["val_accuracy"][found.kept])


@pytest.mark.parametrize("lower", [True, False])
def test_the_best_row_is_that_of_the_laboratory(lower: bool) -> None:
    column = "x_loss" if lower else "x"
    curves = [*random_curves(20, 15, seed=0, ties=True), [math.nan, 1.0, 2.0], [2.0, math.nan, 1.0, 1.0], [3.0]]
    for values in curves:
        laboratory = Best(column)
        kept = 0
        for k in range(len(values)):
            before = laboratory.weights
            laboratory.consider(es.as_history({column: values[: k + 1]}), network())
            kept = k if laboratory.weights is not before else kept
        assert es.best_row(values, lower=lower) == kept


def test_each_row_is_asked_once_with_the_history_up_to_it() -> None:
    history = es.as_history({"val_loss": [3.0, 2, 1, 0], "epoch": [0.5, 1, 1.5, 2]})
    asked: list[tuple[list[float], int]] = []

    def criterion(seen: History) -> bool:
        asked.append((seen["val_loss"], seen.epochs))
        return len(seen) == 3

    found = es.replay(criterion, history)
    assert asked == [([3.0], 0), ([3.0, 2], 0), ([3.0, 2, 1], 1)]
    assert found == es.Stop(2, 2, 1.5, True, "val_loss")
    assert es.replay(lambda _: False, history) == es.Stop(3, 3, 2.0, False, "val_loss")


def test_a_curve_may_come_from_anywhere() -> None:
    history = es.as_history({"val_loss": [2.0, 1.0], "test_accuracy": (0.5, 0.6)})
    assert history["epoch"] == [1, 2]
    assert history.epochs == 2
    assert history.frame().loc[2.0, "test_accuracy"] == 0.6


def test_a_criterion_is_asked_as_fit_asks() -> None:
    """Everything that a history holds but for the single steps."""
    asked: list[tuple[list[dict[str, float]], int, bool]] = []

    def criterion(seen: History) -> bool:
        asked.append((list(seen.rows), seen.epochs, seen.stopped))
        return len(seen) == 5

    recipe = replace(RECIPE, stop=criterion, validate_every=1 / 2)
    history = fit(fresh(network, recipe, seed=0), digits(), recipe, seed=0)
    in_fit = list(asked)
    asked.clear()
    es.replay(criterion, history)
    assert asked == in_fit


def test_regret() -> None:
    columns = {
        "val_loss": [5.0, 4, 3, 4, 5, 2],
        "test_accuracy": [0.5, 0.9, 0.8, 0.7, 0.6, 0.7],
        "test_loss": [5.0, 1, 2, 3, 4, 6],
    }
    history = es.as_history(columns)
    stop = es.replay(es.Patience(2), history)
    assert (stop.row, stop.kept) == (4, 2)
    found = es.regret(history, stop)
    assert found.value == 0.8
    assert (found.below_best, found.below_last) == (pytest.approx(0.1), pytest.approx(-0.1))
    assert found.share == pytest.approx(5 / 6)
    loss = es.regret(history, stop, "test_loss")
    assert (loss.value, loss.below_best, loss.below_last) == (2, 1, -4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.as_history({}), "columns={}: must be at least one"),
        (lambda: es.as_history({"a": [1.0], "b": [1.0, 2.0]}), "all of the same length"),
        (lambda: es.replay(es.Patience(1), History()), "history=0: must be of at least one row"),
        (lambda: es.best_row([], lower=True), "values=0: must be of at least one row"),
        (
            lambda: es.regret(es.as_history({"test_loss": [1.0]}), es.Stop(3, 2, 4.0, True, "val_loss"), "test_loss"),
            "must be in a history of 1 rows",
        ),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
