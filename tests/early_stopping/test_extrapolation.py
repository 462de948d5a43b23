"""Forecasts against draws from the same prior, and how often the interval held on curves that are known."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from course_lib import early_stopping as es
from course_lib.early_stopping import extrapolation
from course_lib.early_stopping.families import FAMILIES, ranges

X = np.arange(1.0, 41.0)


def generated(count: int, seed: int) -> list[list[float]]:
    """Curves of all four families, with noise of one in 500 to one in 50."""
    rng = np.random.default_rng(seed)
    curves = []
    for k in range(count):
        family = extrapolation.AVERAGED[k % 4]
        limit, first = rng.uniform(0.6, 0.98), rng.uniform(0.1, 0.5)
        alpha, speed = rng.uniform(0.4, 1.5), math.exp(rng.uniform(math.log(0.02), math.log(0.5)))
        shape = {
            "pow3": X**-alpha,
            "pow4": ((X + 20 * speed) / (1 + 20 * speed)) ** -alpha,
            "weibull": np.exp(-((speed * X) ** alpha)),
            "mmf": 1 / (1 + (speed * X) ** alpha),
        }[family]
        noise = math.exp(rng.uniform(math.log(0.002), math.log(0.02)))
        curves.append([float(v) for v in limit - (limit - first) * shape + noise * rng.standard_normal(40)])
    return curves


# --- Against draws ----------------------------------------------------------------------------------------------------


def drawn(family: str, y: np.ndarray, at: float, ends: tuple[float, float], draws: int, seed: int) -> tuple[Any, ...]:
    """Importance sampling: all parameters from the prior, each weighted by how likely it makes the data.

    Gives the log of the mean likelihood and the value at ``at`` of every draw with its weight. The first value is drawn
    from far more than the data allow, by its own width, which is taken out of the likelihood again.
    """
    rng = np.random.default_rng(seed)
    kind, x = FAMILIES[family], np.arange(1, len(y) + 1, dtype=float)
    box = ranges(kind.shape, kind.thetas, x[-1])
    theta = np.stack([rng.uniform(*edge, draws) for edge in box], 1)
    limit = rng.uniform(*ends, draws)
    low, high = y[0] - 0.4, y[0] + 0.4
    first = rng.uniform(low, high, draws)
    span = np.ptp(y)
    sigma = np.exp(rng.uniform(math.log(1e-4 * span), math.log(span), draws))
    start = kind.shape(np.ones(1), theta)
    fallen = start == 0  # to nothing, before 1
    h, ahead = kind.shape(x, theta) / (start + fallen), (kind.shape(np.array([at]), theta) / (start + fallen))[:, 0]
    h[fallen[:, 0], 0] = 1.0
    left = y - (limit + (first - limit) * h.T).T
    logs = -0.5 * np.square(left).sum(1) / sigma**2 - len(y) * np.log(sigma * math.sqrt(2 * math.pi))
    logs = logs + math.log(high - low)
    weights = np.exp(logs - logs.max())
    value = limit + (first - limit) * ahead
    return logs.max() + math.log(weights.mean()), value, sigma, weights / weights.sum()


RISING, FLAT = (0.30, 0.55, 0.48, 0.66, 0.58), (0.52, 0.48, 0.55, 0.47, 0.50)


@pytest.mark.parametrize(
    ("family", "values"), [("pow3", RISING), ("weibull", RISING), ("mmf", RISING), ("pow4", RISING), ("pow3", FLAT)]
)
def test_the_average_over_curves_is_that_of_draws_from_the_prior(family: str, values: tuple[float, ...]) -> None:
    y = np.array(values)
    ends = extrapolation._limits(y, "max", None)
    evidence, value, sigma, weights = drawn(family, y, 20.0, ends, 1_000_000, seed=0)
    assert 1 / np.square(weights).sum() > 1000, "too few draws count"
    logs, means, deviations = extrapolation._of_family(FAMILIES[family], y, np.array([20.0]), ends)
    ours = np.exp(logs - logs.max())
    # (2π)^(1 - n/2) and the density of the limit are the same for all, and left out
    same = (1 - len(y) / 2) * math.log(2 * math.pi) - math.log(ends[1] - ends[0])
    log_evidence = logs.max() + math.log(ours.sum()) + same
    assert log_evidence == pytest.approx(evidence, abs=0.08)
    ours /= ours.sum()
    mean = float((ours * means[:, 0]).sum())
    sd = math.sqrt((ours * (deviations[:, 0] ** 2 + means[:, 0] ** 2)).sum() - mean**2)
    expected = float((weights * value).sum())
    spread = math.sqrt((weights * (sigma**2 + value**2)).sum() - expected**2)
    assert mean == pytest.approx(expected, abs=0.1 * spread)
    assert sd == pytest.approx(spread, rel=0.08)


@pytest.mark.parametrize("between", [(-1.0, 2.0), (0.5, 0.7), (3.0, 5.0), (-9.0, -4.0), (12.0, 13.0), (-2.0, 90.0)])
def test_mean_and_variance_of_a_truncated_normal(between: tuple[float, float]) -> None:
    inside, mean, variance = (float(v) for v in extrapolation._truncated(*(np.array(end) for end in between)))
    theirs = stats.truncnorm(*between)
    assert mean == pytest.approx(theirs.mean(), rel=1e-6)
    assert variance == pytest.approx(theirs.var(), rel=1e-3, abs=1e-9)
    assert inside == pytest.approx(stats.truncnorm(*between).logpdf(between[0]) * -1 + stats.norm.logpdf(between[0]))


# --- Forecasts --------------------------------------------------------------------------------------------------------


def from_the_prior(count: int, seen: int, seed: int) -> list[list[float]]:
    """Curves of the families with shapes from all over their ranges."""
    rng, curves = np.random.default_rng(seed), []
    while len(curves) < count:
        kind = FAMILIES[extrapolation.AVERAGED[rng.integers(4)]]
        theta = np.array([rng.uniform(*ends) for ends in ranges(kind.shape, kind.thetas, seen)])
        shape = kind.shape(X, theta) / max(kind.shape(np.ones(1), theta)[0], 1e-300)
        first = rng.uniform(0, 0.6)
        limit = rng.uniform(first, 1)
        clean = limit + (first - limit) * shape
        span = np.ptp(clean[:seen])
        y = clean + math.exp(rng.uniform(math.log(0.01), math.log(0.3))) * span * rng.standard_normal(40)
        if span > 0.05 and y.min() > 0 and y.max() < 1:
            curves.append([float(v) for v in y])
    return curves


@pytest.mark.parametrize(("curves", "seen"), [(generated(40, seed=3), 12), (from_the_prior(40, 8, seed=1), 8)])
def test_what_is_said_to_be_as_likely_is_as_frequent(curves: list[list[float]], seen: int) -> None:
    """The probability of what came is as often below a tenth, or above a half, as it says."""
    chances = np.array([es.will_it_beat(c[:seen], c[-1], 40) for c in curves])
    assert 0.78 <= ((chances > 0.05) & (chances < 0.95)).mean() <= 0.99
    assert 0.3 <= ((chances > 0.25) & (chances < 0.75)).mean() <= 0.7
    assert 0.35 <= chances.mean() <= 0.65


def test_coverage_is_the_share_of_intervals_that_held() -> None:
    curves = generated(8, seed=4)
    found = es.coverage(curves, 10, confidence=0.6)
    forecasts = [es.extrapolate(c[:10], 40, confidence=0.6) for c in curves]
    held = [f.low[0] <= c[-1] <= f.high[0] for f, c in zip(forecasts, curves, strict=True)]
    assert 0 < found.share < 1
    assert (found.share, found.curves) == (np.mean(held), 8)
    assert found.width == pytest.approx(np.mean([f.high[0] - f.low[0] for f in forecasts]))


def test_more_of_a_curve_tells_more() -> None:
    curve = generated(1, seed=5)[0]
    widths = []
    for seen in (6, 12, 25):
        found = es.extrapolate(curve[:seen], [30, 40])
        widths.append(found.high[1] - found.low[1])
        assert (found.low < found.mean).all()
        assert (found.mean < found.high).all()
        assert sum(found.families.values()) == pytest.approx(1)
    assert widths == sorted(widths, reverse=True)
    assert widths[2] < 0.5 * widths[0]


def test_a_loss_is_the_same_upside_down() -> None:
    curve = np.array(generated(2, seed=6)[1][:10])
    up = es.extrapolate(curve, 30)
    down = es.extrapolate(1 - curve, 30, mode="min", limit=0.0)
    assert (down.mean, down.low, down.high) == (
        pytest.approx(1 - up.mean), pytest.approx(1 - up.high), pytest.approx(1 - up.low),
    )  # fmt: skip
    assert es.will_it_beat(curve, 0.8, 30) == pytest.approx(es.will_it_beat(1 - curve, 0.2, 30, mode="min"))


def test_the_chance_to_beat_is_where_the_interval_ends() -> None:
    curve = generated(3, seed=7)[2][:10]
    found = es.extrapolate(curve, 30, confidence=0.9)
    assert es.will_it_beat(curve, float(found.high[0]), 30) == pytest.approx(0.05, abs=1e-6)
    assert es.will_it_beat(curve, float(found.low[0]), 30) == pytest.approx(0.95, abs=1e-6)
    assert es.will_it_beat(curve, 2.0, 30) < 1e-6


def test_a_curve_with_hardly_any_noise_is_followed_closely() -> None:
    for family, parameters in (("pow3", (0.9, 0.5, 0.7)), ("weibull", (0.9, 0.2, 0.1, 0.9))):
        y = FAMILIES[family].formula(X[:20], *parameters)
        found = es.extrapolate(list(y), 40)
        assert found.mean[0] == pytest.approx(
            float(FAMILIES[family].formula(np.array([40.0]), *parameters)[0]), abs=0.004
        )
        assert found.families[family] > 0.5 or family == "pow3"  # pow3 is a pow4 too


def test_between_what_the_limit_is_thought_to_lie() -> None:
    for values, mode, limit, expected in (
        ([0.5, 0.7, 0.6], "max", None, (0.6, 1.0)),
        ([0.5, 0.7, 0.6], "max", 0.9, (0.6, 0.9)),
        ([-2.0, -1.0], "min", None, (-1.5, 0.0)),  # losses 2 and 1, upside down
        ([-2.0, -1.0], "min", 0.5, (-1.5, -0.5)),
        ([1.0, 3.0], "max", None, (2.0, 9.0)),
        ([-2.0, 1.0], "min", None, (-0.5, 10.0)),
    ):
        assert extrapolation._limits(np.array(values), mode, limit) == pytest.approx(expected)  # type: ignore[arg-type]


def test_the_limit_bounds_the_forecast() -> None:
    rising = [0.5, 0.6, 0.7, 0.8, 0.9]
    free = es.extrapolate(rising, 1000, limit=3.0)
    bound = es.extrapolate(rising, 1000)
    assert bound.mean[0] < 1.0 < free.high[0]
    assert bound.high[0] < 1.1  # the noise of a measured value comes on top
    losses = [2.0, 1.5, 1.2, 1.0, 0.9]
    assert es.extrapolate(losses, 1000, mode="min").low[0] > -0.2


def test_odd_curves_have_a_forecast() -> None:
    for curve in ([0.5] * 6, [0.9, 0.8, 0.7, 0.6, 0.5], [1e-9 * k for k in range(6)], [0.1, 0.1, 0.1, 0.1, 0.9],
                  [5.0, 3.0, 8.0, 9.0, 12.0]):  # fmt: skip
        with np.errstate(all="raise", under="ignore"):
            found = es.extrapolate(curve, [6, 100])
        assert np.isfinite([found.mean, found.low, found.high]).all()
        assert (found.low <= found.high).all()


def test_unpromising_runs_are_stopped() -> None:
    curve = generated(2, seed=8)[1][:16]
    history = es.as_history({"val_accuracy": curve, "val_loss": [1 - v for v in curve]})
    for column, best, mode in (("val_accuracy", 0.97, "max"), ("val_loss", 0.03, "min")):
        criterion = es.Unpromising(best=best, at=20, column=column)
        chances = [es.will_it_beat(history[column][:n], best, 20, mode=mode) for n in range(5, 16)]  # type: ignore[arg-type]
        expected = next(n for n, chance in zip(range(5, 16), chances, strict=True) if chance < 0.05)
        found = es.replay(criterion, history)
        assert found.fired
        assert found.row + 1 == expected
    even = [es.will_it_beat(curve[:n], curve[-1], 20) for n in range(5, 16)]
    assert 0.05 < min(even) < 0.9
    assert not es.replay(es.Unpromising(best=curve[-1], at=20), history).fired
    assert es.replay(es.Unpromising(best=curve[-1], at=20, chance=0.9), history).fired


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.extrapolate([0.1] * 4, 9), "curve=4: must be of at least 5 epochs"),
        (lambda: es.extrapolate([0.1] * 5, 0), "at=0: must be whole numbers of at least 1"),
        (lambda: es.extrapolate([0.1] * 5, 2.5), "at=2.5: must be whole numbers"),  # type: ignore[arg-type]
        (lambda: es.extrapolate([0.1] * 5, 9, confidence=1.0), "confidence=1.0: must be a number between 0 and 1"),
        (lambda: es.extrapolate([0.1] * 5, 9, mode="up"), "mode='up': must be"),  # type: ignore[arg-type]
        (lambda: es.extrapolate([0.1] * 5, 9, limit=0.05), "limit=0.05: must be at least as good as all values"),
        (lambda: es.extrapolate([1.0] * 5, 9, mode="min", limit=2.0), "limit=2.0: must be at least as good"),
        (lambda: es.will_it_beat([0.1] * 5, math.nan, 9), "best=nan: must be a number"),
        (lambda: es.Unpromising(0.9, 10, chance=1.0), "chance=1.0: must be a number between 0 and 1"),
        (lambda: es.Unpromising(0.9, 0), "at=0: must be"),
        (lambda: es.coverage([[0.1] * 9], 4), "seen=4: must be a whole number of at least 5"),
        (lambda: es.coverage([[0.1] * 9], 9), "must be of more than 9 epochs each"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
