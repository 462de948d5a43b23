"""Filters against the steps themselves, torch's SGD, chapter 5's ridge, and draws of the noise."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn

from course_lib import early_stopping as es
from course_lib import regularization as reg


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


N, D = 40, 6
X = normal(N, D) @ torch.diag(torch.tensor([2.0, 1.5, 1.0, 0.5, 0.2, 0.05]).double())
TRUTH = normal(D, seed=1)
Y = X @ TRUTH + 0.5 * normal(N, seed=2)
WIDE = normal(5, 9, seed=3)
LR = 0.2
VALUES, VECTORS = (t.flip(-1) for t in torch.linalg.eigh(X.mT @ X / N))


def descend(X: Tensor, y: Tensor, lr: float, steps: int, start: Tensor | None = None, momentum: float = 0.0) -> Tensor:
    """By torch: SGD on the mean of half squares."""
    w = nn.Parameter(torch.zeros(X.shape[1], dtype=torch.float64) if start is None else start.clone())
    sgd = torch.optim.SGD([w], lr=lr, momentum=momentum)
    for _ in range(steps):
        sgd.zero_grad()
        (0.5 * (X @ w - y).square().mean()).backward()
        sgd.step()
    return w.detach()


# --- Filters ----------------------------------------------------------------------------------------------------------


def test_the_spectrum() -> None:
    torch.testing.assert_close(es.spectrum(X), VALUES, rtol=1e-10, atol=1e-12)
    wide = es.spectrum(WIDE)
    assert len(wide) == 9
    assert (wide > 0).sum() == 5
    torch.testing.assert_close(wide, torch.linalg.eigvalsh(WIDE.mT @ WIDE / 5).flip(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 7, 200])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_a_filter_is_what_sgd_has_learnt_of_each_direction(steps: int, momentum: float) -> None:
    full = VECTORS.mT @ torch.linalg.lstsq(X, Y[:, None]).solution[:, 0]
    learnt = (VECTORS.mT @ descend(X, Y, LR, steps, momentum=momentum)) / full
    torch.testing.assert_close(es.momentum_filter(VALUES, LR, steps, momentum), learnt, rtol=1e-8, atol=1e-9)
    if not momentum:
        torch.testing.assert_close(es.gd_filter(VALUES, LR, steps), learnt, rtol=1e-8, atol=1e-9)


def test_large_and_tiny_rates() -> None:
    """Beyond 1 a direction swings, beyond 2 it grows; and a tiny one keeps its digits."""
    x = torch.tensor([0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 2.1]).double()
    torch.testing.assert_close(es.gd_filter(x, 1.0, 5), 1 - (1 - x) ** 5)
    tiny = torch.tensor([1e-14]).double()
    torch.testing.assert_close(es.gd_filter(tiny, 0.1, 1000), tiny * 100, rtol=1e-9, atol=0.0)


def test_flow_is_the_limit_of_small_steps() -> None:
    for time in (0.5, 3.0):
        small = es.gd_filter(VALUES, time / 200_000, 200_000)
        torch.testing.assert_close(es.flow_filter(VALUES, time), small, rtol=1e-4, atol=1e-8)
    assert (es.flow_filter(VALUES, 0.0) == 0).all()


@pytest.mark.parametrize("decay", [0.0, 0.1, 3.0])
def test_ridge_is_that_of_chapter_5(decay: float) -> None:
    torch.testing.assert_close(es.ridge_filter(VALUES, decay), reg.shrinkage(X, N * decay), rtol=1e-9, atol=1e-12)
    solution = es.filtered_solution(X, Y, es.ridge_filter(es.spectrum(X), decay))
    torch.testing.assert_close(solution, reg.ridge(X, Y, N * decay), rtol=1e-8, atol=1e-9)
    assert es.ridge_filter(torch.tensor([0.0]), 0.0).item() == 0


def test_weight_decay_is_that_of_torch() -> None:
    """A weight decay of SGD leads to the ridge filter."""
    w = nn.Parameter(torch.zeros(D, dtype=torch.float64))
    sgd = torch.optim.SGD([w], lr=LR, weight_decay=0.3)
    for _ in range(700):
        sgd.zero_grad()
        (0.5 * (X @ w - Y).square().mean()).backward()
        sgd.step()
    expected = es.filtered_solution(X, Y, es.ridge_filter(es.spectrum(X), 0.3))
    torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-10)


# --- Equivalents ------------------------------------------------------------------------------------------------------


def test_the_equivalent_weight_decay_of_each_direction_is_exact() -> None:
    for steps in (1, 10, 100):
        decays = es.equivalent_ridge_by_direction(VALUES, LR, steps)
        torch.testing.assert_close(VALUES / (VALUES + decays), es.gd_filter(VALUES, LR, steps), rtol=1e-9, atol=1e-12)
    weak = torch.tensor([1e-9, 0.0]).double()
    assert es.equivalent_ridge(LR, 50) == pytest.approx(1 / (50 * LR))
    torch.testing.assert_close(
        es.equivalent_ridge_by_direction(weak, LR, 50), torch.full((2,), 0.1).double(), rtol=1e-6, atol=0.0
    )
    strong = es.equivalent_ridge_by_direction(VALUES[:1], LR, 50)
    assert strong.item() < 1e-3 * es.equivalent_ridge(LR, 50)


# --- Solutions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("X_", "y"), [(X, Y), (WIDE, normal(5, seed=4))])
@pytest.mark.parametrize("from_zero", [True, False])
def test_the_solution_is_that_of_the_steps(X_: Tensor, y: Tensor, from_zero: bool) -> None:
    start = None if from_zero else normal(X_.shape[1], seed=5)
    for steps in (0, 3, 60):
        found = es.gd_solution(X_, y, 0.15, steps, start)
        torch.testing.assert_close(found, descend(X_, y, 0.15, steps, start), rtol=1e-8, atol=1e-10)
    moved = es.filtered_solution(X_, y, es.momentum_filter(es.spectrum(X_), 0.1, 30, 0.9), start)
    torch.testing.assert_close(moved, descend(X_, y, 0.1, 30, start, momentum=0.9), rtol=1e-7, atol=1e-9)


def test_directions_that_are_rounding_have_no_data() -> None:
    """A column that stands there twice."""
    twice = torch.cat([X, X[:, :1]], 1)
    assert (es.spectrum(twice) > 0).sum() == D
    found = es.filtered_solution(twice, Y, es.ridge_filter(es.spectrum(twice), 0.0))
    torch.testing.assert_close(found, torch.linalg.pinv(twice, rtol=1e-10) @ Y, rtol=1e-8, atol=1e-9)
    error = es.weight_error(twice, normal(D + 1), 1.0, es.ridge_filter(es.spectrum(twice), 0.0))
    assert 0 < error.bias_sq < 10  # what lies along the direction that is not there
    assert error.variance < 1e4


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 5, 60, 5000])
def test_bias_and_variance_are_those_of_the_matrix_and_of_draws(steps: int) -> None:
    noise = 0.7
    found = es.gd_bias_variance(X, TRUTH, noise, LR, steps)
    hat = torch.stack([X @ es.gd_solution(X, column, LR, steps) for column in torch.eye(N).double()], 1)
    truth = X @ TRUTH
    assert found.bias_sq == pytest.approx((hat @ truth - truth).square().mean().item(), rel=1e-8, abs=1e-16)
    assert found.variance == pytest.approx(noise**2 * (hat @ hat.mT).trace().item() / N, rel=1e-8)
    draws = truth + noise * normal(3000, N, seed=6)
    predictions = draws @ hat.mT
    assert found.total == pytest.approx((predictions - truth).square().mean().item(), rel=0.05)


def test_the_error_of_ridge_is_that_of_chapter_5() -> None:
    theirs = reg.ridge_bias_variance(X, TRUTH, 0.7, 0.4 * N)
    found = es.bias_variance(X, TRUTH, 0.7, es.ridge_filter(es.spectrum(X), 0.4))
    assert found.bias_sq == pytest.approx(theirs.bias_sq, rel=1e-9)
    assert found.variance == pytest.approx(theirs.variance, rel=1e-9)


@pytest.mark.parametrize("X_", [X, WIDE])
def test_the_error_of_the_weights_is_that_of_draws(X_: Tensor) -> None:
    n, d = X_.shape
    truth, noise = normal(d, seed=7), 0.6
    kept = es.gd_filter(es.spectrum(X_), 0.1, 20)
    found = es.weight_error(X_, truth, noise, kept)
    to_weights = torch.stack([es.filtered_solution(X_, column, kept) for column in torch.eye(n).double()], 1)
    bias = (to_weights @ X_ @ truth - truth).square().sum().item()
    assert found.bias_sq == pytest.approx(bias, rel=1e-8)
    assert found.variance == pytest.approx(noise**2 * to_weights.square().sum().item(), rel=1e-8)
    other = es.bias_variance(X_, truth, noise, kept)
    out = X_ @ (to_weights @ X_ @ truth - truth)
    assert other.bias_sq == pytest.approx(out.square().mean().item(), rel=1e-8)
    assert other.variance == pytest.approx(noise**2 * (X_ @ to_weights).square().sum().item() / n, rel=1e-8)


def test_the_risk_of_flow_is_at_most_1_69_of_ridge() -> None:
    """Ali, Kolter & Tibshirani 2018, theorem 1: at time t against a weight decay of 1/t, along the whole path."""
    worst = optimize.minimize_scalar(lambda x: -((1 - math.exp(-x)) * (1 + x) / x), bounds=(0.1, 20), method="bounded")
    assert worst.fun**2 == pytest.approx(1.6862, abs=1e-3)
    largest = 0.0
    for seed in range(8):
        X_ = normal(30, 8, seed=seed) @ torch.diag(torch.logspace(0, -2, 8).double())
        truth, values = (10 ** (seed % 4 - 2)) * normal(8, seed=100 + seed), es.spectrum(X_)
        for time in np.geomspace(0.01, 1e5, 30):
            flow, ridge = es.flow_filter(values, float(time)), es.ridge_filter(values, 1 / float(time))
            for error in (es.weight_error, es.bias_variance):
                ratio = error(X_, truth, 1.0, flow).total / error(X_, truth, 1.0, ridge).total
                largest = max(largest, ratio)
                assert ratio <= 1.6862
    assert largest > 1.3


@pytest.mark.parametrize("noise", [0.05, 0.5, 5.0])
def test_the_best_moment_is_that_of_all_tried(noise: float) -> None:
    found = es.best_steps(X, TRUTH, noise, LR, 400)
    errors = [es.gd_bias_variance(X, TRUTH, noise, LR, t).total for t in range(401)]
    assert found.steps == int(np.argmin(errors))
    assert found.error.total == pytest.approx(min(errors), rel=1e-12)


def test_each_direction_has_a_best_moment_of_its_own() -> None:
    lr, noise = 0.05, 0.5
    moments = es.best_steps_by_direction(X, TRUTH, noise, lr)
    along = VECTORS.mT @ TRUTH
    for j in range(D):
        signal, spread = (VALUES[j] * along[j] ** 2).item(), noise**2 / N
        x = lr * VALUES[j].item()

        def error(t: float, signal: float = signal, spread: float = spread, x: float = x) -> float:
            return signal * (1 - x) ** (2 * t) + spread * (1 - (1 - x) ** t) ** 2

        best = optimize.minimize_scalar(error, bounds=(0, 4 * moments[j].item() + 1), method="bounded",
                                        options={"xatol": 1e-6})  # fmt: skip
        assert moments[j].item() == pytest.approx(best.x, rel=1e-3)
    assert moments.max() > 5 * moments.min()


def test_nothing_beats_the_oracle() -> None:
    noise = 0.5
    oracle = es.oracle_filter(X, TRUTH, noise)
    least = es.bias_variance(X, TRUTH, noise, oracle).total
    for change in (0.99, 1.01):
        for j in range(D):
            other = oracle.clone()
            other[j] *= change
            assert es.bias_variance(X, TRUTH, noise, other).total > least
    assert least < es.best_steps(X, TRUTH, noise, LR, 400).error.total
    assert (es.oracle_filter(WIDE, normal(9), 0.0)[:5] == 1).all()
    assert (es.oracle_filter(WIDE, normal(9), 0.0)[5:] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.gd_filter(VALUES, 0.0, 3), "lr=0.0: must be a number above 0"),
        (lambda: es.gd_filter(VALUES, 0.1, -1), "steps=-1: must be a whole number of at least 0"),
        (lambda: es.momentum_filter(VALUES, 0.1, 1, 1.0), "momentum=1.0: must be a number of at least 0 and below 1"),
        (lambda: es.flow_filter(VALUES, -1.0), "time=-1.0: must be a number of at least 0"),
        (lambda: es.ridge_filter(VALUES, -1.0), "weight_decay=-1.0: must be a number of at least 0"),
        (lambda: es.equivalent_ridge(0.1, 0), "steps=0: must be a whole number of at least 1"),
        (lambda: es.equivalent_ridge_by_direction(VALUES, 0.1, 0), "steps=0: must be"),
        (lambda: es.filtered_solution(X, Y[:-1], VALUES), f"y has the shape [{N - 1}]: must be [{N}]"),
        (lambda: es.filtered_solution(X, Y, VALUES[:-1]), "kept has the shape [5]: must be [6]"),
        (lambda: es.filtered_solution(X, Y, VALUES, Y), "start has the shape [40]: must be [6]"),
        (lambda: es.spectrum(Y), "X is torch.float64 [40]: must be a matrix of floats"),
        (lambda: es.bias_variance(X, TRUTH, -1.0, VALUES), "noise=-1.0: must be a number of at least 0"),
        (lambda: es.bias_variance(X, Y, 1.0, VALUES), "truth has the shape [40]: must be [6]"),
        (lambda: es.weight_error(X, TRUTH, 1.0, Y), "kept has the shape [40]: must be [6]"),
        (lambda: es.best_steps_by_direction(X, TRUTH, 1.0, 3.0), "lr=3.0: must be above 0 and below"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
