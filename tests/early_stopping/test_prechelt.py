"""Prechelt's criteria against his formulas in NumPy, curves made by hand, and the figures of another implementation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from course_lib import early_stopping as es
from tests.early_stopping.small import random_curves
from tests.early_stopping.test_criteria import NEVER, stops_at

CURVES = [(np.array(a) + 1.5, np.array(b) + 1.5) for a, b in zip(
    random_curves(25, 40, seed=1), random_curves(25, 40, seed=2), strict=True)]  # fmt: skip
ERRORS = [(2.6 - np.linspace(0, 1, 40) * va + np.linspace(0, 1, 40) ** 2 * 2, 3.6 - tr) for va, tr in CURVES]
"""Validation errors that fall and rise again, training errors that fall."""


def gl(va: np.ndarray, t: int) -> float:
    """By the paper: epochs count from 1."""
    return 100 * (va[t - 1] / np.minimum.accumulate(va)[t - 1] - 1)


def p(tr: np.ndarray, t: int, k: int) -> float:
    strip = tr[t - k : t]
    return 1000 * (strip.sum() / (k * strip.min()) - 1)


def up(va: np.ndarray, t: int, s: int, k: int) -> bool:
    """As the paper defines it, by itself."""
    if t % k or t - k < k:
        return False
    rises = bool(va[t - 1] > va[t - k - 1])
    return rises if s == 1 else rises and up(va, t - k, s - 1, k)


def first(holds: Callable[[int], bool]) -> int | None:
    return next((t for t in range(1, 41) if holds(t)), NEVER)


@pytest.mark.parametrize("alpha", [1.0, 5.0, 20.0])
def test_generalization_loss(alpha: float) -> None:
    found = [stops_at(es.GeneralizationLoss(alpha), val_loss=va) for va, _ in ERRORS]
    assert found == [first(lambda t, va=va: gl(va, t) > alpha) for va, _ in ERRORS]  # type: ignore[misc]
    assert len(set(found)) > 3
    for va, _ in ERRORS[:3]:
        np.testing.assert_allclose(
            [es.generalization_loss(va[:t]) for t in range(1, 41)], [gl(va, t) for t in range(1, 41)], atol=1e-10
        )


@pytest.mark.parametrize(("alpha", "strip"), [(0.5, 5), (1.0, 5), (0.5, 3), (0.2, 1)])
def test_progress_quotient(alpha: float, strip: int) -> None:
    found, expected = [], []
    for va, tr in ERRORS:
        found.append(stops_at(es.ProgressQuotient(alpha, strip), val_loss=va, train_loss=tr))
        with np.errstate(all="ignore"):
            holds = [t % strip == 0 and bool(gl(va, t) / np.float64(p(tr, t, strip)) > alpha) for t in range(1, 41)]
        expected.append(holds.index(True) + 1 if any(holds) else NEVER)
    assert found == expected
    assert len(set(found)) > 2


@pytest.mark.parametrize(("strips", "strip"), [(1, 5), (2, 5), (3, 5), (3, 2), (4, 1)])
def test_successive_increases(strips: int, strip: int) -> None:
    found = [stops_at(es.SuccessiveIncreases(strips, strip), val_loss=va) for va, _ in ERRORS]
    assert found == [first(lambda t, va=va: up(va, t, strips, strip)) for va, _ in ERRORS]  # type: ignore[misc]
    assert len(set(found)) > 1


@pytest.mark.parametrize("strip", [2, 5])
def test_progress(strip: int) -> None:
    for _, tr in ERRORS[:5]:
        for t in (strip, strip + 3, 40):
            assert es.training_progress(tr[:t], strip) == pytest.approx(p(tr, t, strip), rel=1e-10)
    settling = [1 + 0.5 ** (t / 4) for t in range(60)]
    expected = first(lambda t: t % strip == 0 and p(np.array(settling), t, strip) < 60)
    assert stops_at(es.LittleProgress(60.0, strip), train_loss=settling) == expected is not NEVER


def test_by_hand() -> None:
    """An error of 10% above the lowest is GL = 10; training errors 2, 1, 1, 1, 1 have P = 200."""
    assert es.generalization_loss([2.0, 1.0, 1.1]) == pytest.approx(10)
    assert es.generalization_loss([2.0, 1.0]) == 0
    assert es.training_progress([9.0, 2.0, 1, 1, 1, 1]) == pytest.approx(200)
    va, tr = [1.0, 1, 1, 1, 1.3], [2.0, 1, 1, 1, 1]  # GL 30, P 200
    assert stops_at(es.ProgressQuotient(0.149), val_loss=va, train_loss=tr) == 5
    assert stops_at(es.ProgressQuotient(0.151), val_loss=va, train_loss=tr) is NEVER
    # at the ends of strips of two: 9, 5, 6, 7
    assert stops_at(es.SuccessiveIncreases(2, 2), val_loss=[1.0, 9, 1, 5, 1, 6, 1, 7]) == 8
    assert stops_at(es.SuccessiveIncreases(1, 2), val_loss=[1.0, 9, 1, 5, 1, 6, 1, 7]) == 6
    assert stops_at(es.SuccessiveIncreases(2, 2), val_loss=[1.0, 9, 1, 5, 1, 6, 1, 6]) is NEVER


def test_the_figures_of_another_implementation() -> None:
    """Those that the tests of EarlyStopping.jl expect."""
    losses = [10.0, 8, 9, 10, 11, 12, 12, 13, 14, 15, 16, 17, 16]
    for alpha, row in {12: 3, 20: 4, 40: 6, 90: 11, 110: 12, 1000: NEVER}.items():
        assert stops_at(es.GeneralizationLoss(alpha), val_loss=losses) == row
    for strips, row in {1: 3, 2: 4, 3: 5, 4: 6, 5: 12, 6: NEVER}.items():
        assert stops_at(es.SuccessiveIncreases(strips, 1), val_loss=losses) == row
    assert es.training_progress([2.0, 3, 6, 7], 4) == pytest.approx(1000 * (4.5 - 2) / 2)


def test_where_a_quotient_has_no_value() -> None:
    flat = [1.0] * 5
    assert stops_at(es.ProgressQuotient(0.5), val_loss=[1.0, 1, 1, 1, 1.1], train_loss=flat) == 5  # no progress at all
    assert stops_at(es.ProgressQuotient(0.5), val_loss=flat, train_loss=flat) is NEVER
    assert es.generalization_loss([0.0, 0.0]) == 0
    assert es.generalization_loss([0.0, 0.1]) == math.inf
    assert es.generalization_loss([1.0, math.nan]) == math.inf
    assert es.generalization_loss([math.nan, 1.0]) == 0
    assert es.training_progress([0.0] * 5) == 0
    assert es.training_progress([1.0, 0, 0, 0, 0]) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.GeneralizationLoss(-1), "alpha=-1: must be a number of at least 0"),
        (lambda: es.GeneralizationLoss(1, "val_accuracy"), "column='val_accuracy': must be a column of errors"),
        (lambda: es.ProgressQuotient(1, 0), "strip=0: must be a whole number of at least 1"),
        (lambda: es.ProgressQuotient(1, train="train_accuracy"), "train='train_accuracy': must be a column of errors"),
        (lambda: es.SuccessiveIncreases(0), "strips=0: must be a whole number of at least 1"),
        (lambda: es.LittleProgress(0.0), "least=0.0: must be a number above 0"),
        (lambda: es.generalization_loss([]), "must be of at least one validation"),
        (lambda: es.generalization_loss([1.0, -1.0]), "errors=-1.0: must be numbers of at least 0"),
        (lambda: es.training_progress([1.0]), "must be of at least 5 epochs"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
