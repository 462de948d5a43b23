"""The luck of the best epoch against draws, known values, and splits that are drawn again and again."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from course_lib import early_stopping as es
from course_lib.lab.experiments import mean_interval


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_known_values() -> None:
    assert es.expected_maximum(1) == pytest.approx(0, abs=1e-9)
    assert es.expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), rel=1e-10)
    assert es.expected_maximum(3) == pytest.approx(3 / (2 * math.sqrt(math.pi)), rel=1e-10)
    # of four and five numbers: closed forms with arcsines, as in tables of order statistics
    assert es.expected_maximum(4) == pytest.approx(1.0293753730, rel=1e-9)
    assert es.expected_maximum(5) == pytest.approx(1.1629644736, rel=1e-9)
    assert es.expected_maximum(2, 0.3) == pytest.approx(0.3 / math.sqrt(math.pi), rel=1e-10)
    # E max of two steps: E S₁⁺ + E S₂⁺ / 2
    assert es.expected_walk_maximum(0) == 0
    assert es.expected_walk_maximum(1) == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert es.expected_walk_maximum(2, 2.0) == pytest.approx(2 * (1 + 1 / math.sqrt(2)) / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("n", [7, 50, 1000])
def test_the_largest_of_many_is_that_of_draws(n: int) -> None:
    draws = torch.randn(2_000_000 // n, n, generator=generator()).amax(1)
    error = draws.std().item() / math.sqrt(len(draws))
    assert es.expected_maximum(n) == pytest.approx(draws.mean().item(), abs=4 * error)
    assert 4 * error < 0.04
    assert es.expected_maximum(10 * n) > es.expected_maximum(n)


def test_a_million_of_them() -> None:
    """Near the asymptote: with b = sqrt(2 log n), b - (log log n + log 4π) / 2b + γ / b, up to terms of 1/b²."""
    b = math.sqrt(2 * math.log(10**6))
    near = b - (math.log(math.log(10**6)) + math.log(4 * math.pi)) / (2 * b) + 0.5772 / b
    assert es.expected_maximum(10**6) == pytest.approx(near, abs=0.03)


@pytest.mark.parametrize("n", [3, 20, 200])
def test_the_maximum_of_a_walk_is_that_of_draws(n: int) -> None:
    walks = 0.5 * torch.randn(1_000_000 // n, n, generator=generator(), dtype=torch.float64).cumsum(1)
    highest = walks.amax(1).clamp_min(0)
    error = highest.std().item() / math.sqrt(len(highest))
    assert es.expected_walk_maximum(n, 0.5) == pytest.approx(highest.mean().item(), abs=4 * error)
    assert 4 * error < 0.05 * highest.mean()


def test_a_chain_lies_between() -> None:
    free = es.expected_ar1_maximum(20, 0.0, 2.0, generator=generator())
    assert free.mean == pytest.approx(es.expected_maximum(20, 2.0), abs=4 * free.error)
    assert free.error < 0.01
    for correlation in (-0.5, 0.3, 0.9):  # of two, E max is half the mean difference
        pair = es.expected_ar1_maximum(2, correlation, generator=generator(1), draws=200_000)
        assert pair.mean == pytest.approx(math.sqrt((1 - correlation) / math.pi), abs=4 * pair.error)
    means = [es.expected_ar1_maximum(50, r, generator=generator(2), draws=4000).mean for r in (0.0, 0.5, 0.9, 0.99)]
    assert means == sorted(means, reverse=True)
    same = es.expected_ar1_maximum(50, 1.0, generator=generator(2))
    assert same.mean == pytest.approx(0, abs=4 * same.error)
    # correlation one and two apart, from the draws' own covariance: the chain is stationary
    x = es.expected_ar1_maximum(1, 0.7, generator=generator(3), draws=100_000)
    assert x.error == pytest.approx(1 / math.sqrt(100_000), rel=0.02)


def test_the_noise_of_an_accuracy_is_that_of_draws() -> None:
    right = torch.rand(4000, 500, generator=generator()) < 0.9
    assert es.accuracy_standard_error(0.9, 500) == pytest.approx(right.double().mean(1).std().item(), rel=0.05)
    assert es.accuracy_standard_error(0.5, 100) == pytest.approx(0.05)
    assert es.accuracy_standard_error(1.0, 100) == 0


def shared(epochs: int, examples: int, common: float, seed: int = 0) -> torch.Tensor:
    """Epochs that are right on 80%, mostly on the same examples."""
    g = generator(seed)
    base = torch.randn(1, examples, generator=g) * math.sqrt(common)
    own = torch.randn(epochs, examples, generator=g) * math.sqrt(1 - common)
    return base + own < 0.8416


def test_the_noise_of_a_difference_is_that_of_draws() -> None:
    pairs = [shared(2, 300, 0.9, seed) for seed in range(1500)]
    differences = [(a.double().mean() - b.double().mean()).item() for a, b in pairs]
    errors = [es.difference_standard_error(a, b) for a, b in pairs]
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.06)
    alone = math.sqrt(2) * es.accuracy_standard_error(0.8, 300)
    assert np.mean(errors) < 0.65 * alone
    a, b = pairs[0]
    both = a.double() - b.double()
    assert errors[0] == pytest.approx(both.std(unbiased=False).item() / math.sqrt(300), rel=1e-12)
    assert es.difference_standard_error(a, a) == 0


def test_the_covariance_of_accuracies_is_that_of_draws() -> None:
    draws = torch.stack([shared(3, 200, 0.7, seed).double().mean(1) for seed in range(3000)])
    found = es.accuracy_covariance(shared(3, 100_000, 0.7)) * 100_000 / 200
    np.testing.assert_allclose(found, np.cov(draws.T), rtol=0.12)
    one = shared(1, 50, 0.7)
    p = one.double().mean().item()
    assert es.accuracy_covariance(one).item() == pytest.approx(p * (1 - p) / 49, rel=1e-12)
    two = es.accuracy_covariance(shared(2, 400, 0.7, 5))
    a, b = shared(2, 400, 0.7, 5)
    apart = two[0, 0] + two[1, 1] - 2 * two[0, 1]
    assert math.sqrt(apart.item() * 399 / 400) == pytest.approx(es.difference_standard_error(a, b), rel=1e-10)


def test_measured_optimism() -> None:
    """Twenty epochs that are all alike: what validation promises at the best is the expected maximum of its noise."""
    rng = np.random.default_rng(0)
    val, test = 0.8 + 0.02 * rng.standard_normal((400, 20)), 0.77 + 0.001 * rng.standard_normal((400, 20))
    histories = [es.as_history({"val_accuracy": v, "test_accuracy": t}) for v, t in zip(val, test, strict=True)]
    found = es.best_epoch_optimism(histories)
    assert found.everywhere.mean == pytest.approx(0.03, abs=0.001)
    assert found.choice.low < es.expected_maximum(20, 0.02) < found.choice.high
    assert found.best.mean == pytest.approx(found.everywhere.mean + found.choice.mean)
    drift = np.linspace(0, 1, 20)  # the splits need not be equally far apart at all epochs
    drifting = [es.as_history({"val_accuracy": v + drift, "test_accuracy": t}) for v, t in zip(val, test, strict=True)]
    assert es.best_epoch_optimism(drifting).everywhere.mean == pytest.approx(0.53, abs=0.001)
    at = val.argmax(1)
    by_hand = mean_interval(val[range(400), at] - test[range(400), at])
    assert (found.best.mean, found.best.low) == (pytest.approx(by_hand.mean), pytest.approx(by_hand.low))
    losses = [es.as_history({"val_loss": 1 - v, "test_loss": 1 - t}) for v, t in zip(val, test, strict=True)]
    turned = es.best_epoch_optimism(losses, "val_loss", "test_loss")
    assert turned.choice.mean == pytest.approx(found.choice.mean)
    assert turned.best.mean == pytest.approx(found.best.mean)


@pytest.mark.parametrize("common", [0.0, 0.8])
def test_the_bootstrap_finds_about_the_optimism_of_alike_epochs(common: float) -> None:
    """The truth is known here: all epochs are right on 80%."""
    found, real = [], []
    for seed in range(40):
        right = shared(15, 200, common, seed)
        found.append(es.bootstrap_optimism(right, generator=generator(seed), draws=100).mean)
        real.append(right.double().mean(1).max().item() - 0.8)
    assert 0.4 * np.mean(real) < np.mean(found) < 1.05 * np.mean(real)


def test_the_bootstrap_by_a_loop() -> None:
    right = shared(6, 40, 0.5)
    found = es.bootstrap_optimism(right, generator=generator(4), draws=30)
    picked = torch.randint(40, (30, 40), generator=generator(4))
    gaps = []
    for rows in picked:
        drawn = right[:, rows].double().mean(1)
        epoch = int(drawn.argmax())
        gaps.append((drawn[epoch] - right[epoch].double().mean()).item())
    assert found.mean == pytest.approx(np.mean(gaps), rel=1e-9)
    assert found.error == pytest.approx(np.std(gaps, ddof=1) / math.sqrt(30), rel=1e-9)
    clear = torch.zeros(3, 50, dtype=torch.bool)
    clear[1] = True  # one epoch is right on everything
    assert es.bootstrap_optimism(clear, generator=generator()).mean == 0


RIGHT = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.expected_maximum(0), "n=0: must be a whole number of at least 1"),
        (lambda: es.expected_maximum(3, -1.0), "sd=-1.0: must be a number of at least 0"),
        (lambda: es.expected_walk_maximum(-1), "n=-1: must be a whole number of at least 0"),
        (
            lambda: es.expected_ar1_maximum(3, 1.1, generator=generator()),
            "correlation=1.1: must be a number from -1 to",
        ),
        (lambda: es.expected_ar1_maximum(3, 0.1, generator=generator(), draws=1), "draws=1: must be"),
        (lambda: es.accuracy_standard_error(90, 100), "accuracy=90: must be a number from 0 to 1"),
        (lambda: es.accuracy_standard_error(0.9, 0), "examples=0: must be"),
        (lambda: es.difference_standard_error(RIGHT[0], RIGHT[0, :4]), "must be of the shape [5]"),
        (lambda: es.difference_standard_error(RIGHT, RIGHT), "right is torch.bool [2, 5]: must be truth values"),
        (lambda: es.accuracy_covariance(RIGHT.double()), "right is torch.float64 [2, 5]: must be truth values"),
        (lambda: es.accuracy_covariance(RIGHT[:, :1]), "right=1: must be of at least 2 examples"),
        (lambda: es.bootstrap_optimism(RIGHT, generator=generator(), draws=1), "draws=1: must be"),
        (lambda: es.best_epoch_optimism([]), "histories=0: must be of at least 2 runs"),
        (
            lambda: es.best_epoch_optimism([es.as_history({"val_accuracy": [1.0]})] * 2, test="test_loss"),
            "test='test_loss': must be a column where good values are as in 'val_accuracy'",
        ),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
