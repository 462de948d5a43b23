"""The hyperbola from points that lie on it, from noisy descents whose noise scale is known, and from runs that fail."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from course_lib.batching import critical
from course_lib.batching.critical import fit_critical

SIZES = (8, 32, 128, 512)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("s_min", "b_crit"), [(50.0, 100.0), (3.0, 7.0), (1e5, 2000.0)])
def test_points_on_a_hyperbola_give_it_back(s_min: float, b_crit: float) -> None:
    found = fit_critical({size: [s_min * (1 + b_crit / size)] * 2 for size in SIZES}, generator=generator())
    assert found.s_min == pytest.approx(s_min, rel=1e-6)
    assert found.b_crit == pytest.approx(b_crit, rel=1e-6)
    assert found.e_min == pytest.approx(s_min * b_crit, rel=1e-6)
    assert found.error < 1e-6
    assert found.low == pytest.approx(b_crit, rel=1e-6)
    assert found.high == pytest.approx(b_crit, rel=1e-6)
    for size in (1, 77, 4096):
        steps, examples = found.steps(size), found.examples(size)
        assert examples == pytest.approx(size * steps, rel=1e-9)
        assert (steps / found.s_min - 1) * (examples / found.e_min - 1) == pytest.approx(1, rel=1e-6)
    assert found.steps(found.b_crit) == pytest.approx(2 * found.s_min)


def noisy(seed: int, runs: int = 8, spread: float = 0.1) -> dict[int, list[float]]:
    rng = np.random.default_rng(seed)
    return {size: list(60 * (1 + 90 / size) * np.exp(spread * rng.standard_normal(runs))) for size in SIZES}


def test_the_fit_is_the_least_squares_of_the_logarithms() -> None:
    from scipy import optimize

    steps = noisy(0)
    size = np.repeat(list(steps), 8)
    log_s = np.log(np.concatenate(list(steps.values())))
    best = optimize.least_squares(lambda p: p[0] + np.log1p(np.exp(p[1]) / size) - log_s, [3.0, 3.0], xtol=1e-14)
    found = fit_critical(steps)
    assert found.s_min == pytest.approx(math.exp(best.x[0]), rel=1e-5)
    assert found.b_crit == pytest.approx(math.exp(best.x[1]), rel=1e-5)
    assert found.error == pytest.approx(np.sqrt(np.square(best.fun).mean()), rel=1e-6)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    fits = [fit_critical(noisy(seed), generator=generator(seed), resamples=150) for seed in range(40)]
    inside = sum(found.low <= 90 <= found.high for found in fits)
    assert 32 <= inside <= 40  # a bootstrap over 8 seeds is a little narrow
    assert all(found.low < found.b_crit < found.high for found in fits)
    widths = [found.high / found.low for found in fits]
    assert 1.1 < np.median(widths) < 1.8
    again = fit_critical(noisy(0), generator=generator(0), resamples=150)
    assert (again.low, again.high) == (fits[0].low, fits[0].high)


def test_a_descent_in_noise_follows_it() -> None:
    """One step against a gradient of known noise, at the best rate, from the formulas of expectation alone."""
    h, noise, size_0 = 1.0, 4.0, 1.0  # L = h x^2 / 2, variance of one example's gradient, |x| at the start

    def steps_to_half(batch_size: float) -> int:
        square, steps = size_0**2, 0  # E x^2
        while square > 0.5 * size_0**2 and steps < 10_000:
            # the noise scale is held at its first value, as the law supposes
            rate = 0.01 * critical.best_step_length(1 / h, batch_size, noise / (h * size_0) ** 2)
            square += 0.01 * (
                -2 * rate / 0.01 * h * square + (rate / 0.01) ** 2 * (h * h * square + noise / batch_size * square)
            )
            steps += 1
        return steps

    found = fit_critical({size: [steps_to_half(size)] for size in (1, 2, 4, 8, 32)})
    assert found.b_crit == pytest.approx(noise, rel=0.05)
    assert found.error < 0.01


def test_gain_and_best_rate_are_those_of_a_quadratic() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 3)), rng.standard_normal((3, 3))
    hessian, covariance, g = a @ a.T, b @ b.T, rng.standard_normal(3)
    noise_scale = np.trace(hessian @ covariance) / (g @ hessian @ g)
    longest = g @ g / (g @ hessian @ g)
    for size in (1, 5, 60):

        def expected_change(rate: float, size: int = size) -> float:
            return -rate * g @ g + rate**2 / 2 * (g @ hessian @ g + np.trace(hessian @ covariance) / size)

        best = critical.best_step_length(longest, size, noise_scale)
        for factor in (0.99, 1.01):
            assert expected_change(best) < expected_change(factor * best)
        whole = -longest * g @ g / 2
        assert expected_change(best) / whole == pytest.approx(critical.expected_gain(size, noise_scale))
    assert critical.expected_gain(32, 32) == 0.5


def test_runs_that_never_arrive_are_left_out_and_named() -> None:
    steps: dict[int, list[float | None]] = {size: [50 * (1 + 100 / size)] * 3 for size in SIZES}
    steps[8][1], steps[512][2] = None, math.inf
    found = fit_critical(steps, generator=generator())
    assert found.left_out == ((8, 1), (512, 2))
    assert found.b_crit == pytest.approx(100, rel=1e-6)
    assert found.low == pytest.approx(100, rel=1e-6)
    steps[8] = [None] * 3
    assert fit_critical(steps).b_crit == pytest.approx(100, rel=1e-6)
    steps[32] = [None] * 3
    with pytest.raises(ValueError, match=r"steps has 2 batch sizes .*never reached at \[8, 32, 512\]: must have 3"):
        fit_critical(steps)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ({8: [1.0], 16: [1.0]}, "steps has 2 batch sizes with a run that reached the target: must have 3"),
        ({8: [1.0], 16: [1.0, 2.0], 32: [1.0]}, r"steps has \[1, 2\] runs a batch size: must have equally many"),
        ({8: [0.0], 16: [1.0], 32: [1.0]}, r"steps\[8\]\[0\]=0.0: must be a number above 0, None or inf"),
        ({0: [2.0], 16: [1.0], 32: [1.0]}, "batch size=0: must be a whole number of at least 1"),
        ({8: [800.0], 16: [400.0], 32: [200.0]}, "steps times batch size is about the same .* lies far above"),
        ({8: [70.0], 16: [70.0], 32: [70.0]}, "steps are about the same .* lies far below"),
        ({}, "steps has 0 batch sizes"),
        ({8: [], 16: [], 32: []}, r"steps has \[0\] runs"),
    ],
)
def test_what_cannot_be_fitted_says_why(steps: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_critical(steps)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="noise_scale=inf: must be"):
        critical.expected_gain(8, math.inf)
    with pytest.raises(ValueError, match="batch_size=0: must be a number above 0"):
        critical.expected_gain(0, 1.0)
    with pytest.raises(ValueError, match="longest=-1"):
        critical.best_step_length(-1, 8, 1.0)
    found = fit_critical({size: [50 * (1 + 100 / size)] for size in SIZES})
    with pytest.raises(ValueError, match="batch_size=-1"):
        found.steps(-1)
