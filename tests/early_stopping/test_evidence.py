"""The evidence-based criterion against loops over examples, gradients whose answer is known, and BackPACK's moments."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib import early_stopping as es
from course_lib.lab.data import Split, batches
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import convnet, mlp, resnet
from course_lib.lab.training import Objective, Recipe, cross_entropy, fit, fresh
from tests.early_stopping.small import RECIPE, digits, network

EXACT = Recipe(precision="float64")
NETWORKS = {
    "mlp": partial(mlp, (1, 8, 8), 10, width=6),
    "convnet": partial(convnet, (1, 8, 8), 10, width=2),
    "resnet": partial(resnet, (1, 8, 8), 10, width=2),  # batch norm
}


def looped(model: nn.Module, split: Split, objective: Objective = cross_entropy) -> dict[str, np.ndarray]:
    """The gradient of each example, one backward pass each, ``[N, numbers]`` by name."""
    model.eval()
    found: dict[str, list[np.ndarray]] = {}
    for x, y in batches(split, 1, dtype=torch.float64):
        model.zero_grad()
        objective(model, x, y).backward()
        for name, w in model.named_parameters():
            if w.requires_grad:
                found.setdefault(name, []).append(w.grad.flatten().numpy().copy())  # type: ignore[union-attr]
    return {name: np.stack(rows) for name, rows in found.items()}


def criterion(gradients: np.ndarray) -> float:
    """The paper's equation, by NumPy."""
    mean, variance = gradients.mean(0), gradients.var(0, ddof=1)
    used = variance > 0
    return float(1 - len(gradients) * np.mean(mean[used] ** 2 / variance[used]))


def tempered(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x) / 2, y) + 0.1 * model(x).square().sum(1).mean()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("objective", [cross_entropy, tempered])
def test_evidence_is_that_of_a_loop_over_examples(name: str, objective: Objective) -> None:
    model = fresh(NETWORKS[name], EXACT, seed=0)
    split = digits().train.subset(torch.arange(37))
    gradients = looped(model, split, objective)
    model.train()
    found = es.gradient_moments(model, split, objective=objective, chunk=10)
    assert model.training
    assert found.examples == 37
    assert list(found.sizes) == list(gradients)
    whole = np.concatenate(list(gradients.values()), 1)
    np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(found.variance, whole.var(0, ddof=1), rtol=1e-8, atol=1e-14)
    assert es.evidence(model, split, objective=objective) == pytest.approx(criterion(whole), rel=1e-8)
    layers = es.evidence_by_layer(model, split, objective=objective, chunk=5)
    expected = {name: criterion(rows) for name, rows in gradients.items()}
    assert layers == pytest.approx(expected, rel=1e-8, nan_ok=True)
    mean = np.nanmean(list(expected.values()))
    assert es.mean_layer_evidence(model, split, objective=objective) == pytest.approx(mean, rel=1e-8)
    used = whole.var(0) > 0
    ratios = 37 * whole.mean(0)[used] ** 2 / whole.var(0, ddof=1)[used]
    assert es.silent_share(model, split, objective=objective) == pytest.approx((ratios < 1 - 1e-5).mean(), abs=1e-9)


def test_frozen_weights_are_left_out() -> None:
    model = fresh(NETWORKS["mlp"], EXACT, seed=0)
    next(model.parameters()).requires_grad_(False)
    split = digits().train.subset(torch.arange(20))
    gradients = looped(model, split)
    assert list(es.evidence_by_layer(model, split)) == list(gradients) != [n for n, _ in model.named_parameters()]
    assert es.evidence(model, split) == pytest.approx(criterion(np.concatenate(list(gradients.values()), 1)), rel=1e-8)


def test_a_batch_counts_as_a_split() -> None:
    model, split = fresh(NETWORKS["mlp"], EXACT, seed=0), digits().train.subset(torch.arange(20))
    x, y = next(batches(split, 20, dtype=torch.float64))
    assert es.evidence(model, (x, y)) == pytest.approx(es.evidence(model, split), rel=1e-12)


def test_normal_noise_about_zero_has_the_evidence_of_students_t() -> None:
    """B g² / var is a squared t with B - 1 degrees of freedom, of mean (B - 1) / (B - 3)."""
    for examples in (8, 30):
        noise = torch.randn(examples, 150_000, generator=torch.Generator().manual_seed(examples), dtype=torch.float64)
        noise = noise * torch.rand(150_000, generator=torch.Generator().manual_seed(1)).double()  # any size
        mean, variance = noise.mean(0), noise.var(0)
        assert es.evidence_of(mean, variance, examples) == pytest.approx(-2 / (examples - 3), abs=0.02)
        silent = (es.signal_to_noise(mean, variance, examples) < 1).double().mean().item()
        assert silent == pytest.approx(2 * _t_below_one(examples - 1) - 1, abs=0.005)
    assert 2 * _t_below_one(10**6) - 1 == pytest.approx(0.6827, abs=1e-4)


def _t_below_one(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.cdf(1, freedom))


def test_known_answers() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert es.evidence_of(one, one, 100) == pytest.approx(1 - 100)  # all examples agree up to a spread of 1
    assert es.evidence_of(0 * one, one, 100) == 1  # a mean of nothing, and a spread
    mixed = torch.tensor([0.1, 0.1, 0.0], dtype=torch.float64)
    spread = torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64)  # the third has no gradient at all
    assert es.evidence_of(mixed, spread, 100) == pytest.approx(1 - (1 + 0.25) / 2)
    assert es.evidence_of(one, 0 * one, 100) == -math.inf
    assert math.isnan(es.evidence_of(0 * one, 0 * one, 100))


def test_least_squares_with_much_noise_stops_before_the_noise_is_learnt() -> None:
    """Gradient descent on a linear model: the criterion fires near the best step, long before the end."""
    g = torch.Generator().manual_seed(0)
    n, d, noise, lr = 60, 20, 1.5, 0.2
    X = torch.randn(n, d, generator=g).double() * torch.logspace(0, -1.5, d).double()
    truth = torch.randn(d, generator=g).double()
    y = X @ truth + noise * torch.randn(n, generator=g).double()
    values = []
    for steps in range(60):
        w = es.gd_solution(X, y, lr, steps)
        rows = (X @ w - y)[:, None] * X  # each example's gradient of half its squared error
        values.append(es.evidence_of(rows.mean(0), rows.var(0), n))
    assert values[0] < -1
    fired = next(k for k, v in enumerate(values) if v > 0)
    error = {t: es.gd_bias_variance(X, truth, noise, lr, t).total for t in (fired, 100_000)}
    best = es.best_steps(X, truth, noise, lr, 1000)
    assert 5 < fired < best.steps < 60
    assert error[fired] < 1.3 * best.error.total
    assert error[fired] < 0.8 * error[100_000]


def test_the_column_of_a_run() -> None:
    columns = {
        "evidence": es.EvidenceColumn(),
        "few": es.EvidenceColumn(examples=30),
        "layers": es.EvidenceColumn(30, es.mean_layer_evidence, tempered, 7),
    }
    recipe = replace(RECIPE, epochs=1, watch=columns)
    model = fresh(network, recipe, seed=0)
    history = fit(model, digits(), recipe, seed=0)
    few = digits().train.subset(torch.arange(30))
    assert history["evidence"] == [es.evidence(model, digits().train)]
    assert history["few"] == [es.evidence(model, few)]
    assert history["layers"] == [pytest.approx(es.mean_layer_evidence(model, few, objective=tempered), rel=1e-10)]
    assert len({fingerprint(column) for column in columns.values()}) == 3


def test_it_stops_above_zero() -> None:
    values = [-3.0, 0.5, -1.0, 0.2, 0.3, 0.4]
    history = es.as_history({"evidence": values, "val_loss": values})
    assert es.replay(es.Evidence(), history).row == 1
    assert es.replay(es.Evidence(smoothing=0.5), history).row == 4  # 0.3 + 0.1 - 0.25 + 0.0625 - 0.1875 > 0
    assert es.replay(es.Evidence(smoothing=0.9), history).fired is False
    assert not es.replay(es.Evidence(), es.as_history({"evidence": [0.0, math.nan], "val_loss": [1.0, 1.0]})).fired


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.evidence_of(torch.ones(2), torch.ones(2), 1), "examples=1: must be a whole number of at least 2"),
        (lambda: es.evidence(network(), digits().train.subset(torch.arange(1))), "data=1: must be of at least 2"),
        (lambda: es.EvidenceColumn(examples=1), "examples=1: must be a whole number of at least 2"),
        (lambda: es.EvidenceColumn(chunk=0), "chunk=0: must be a whole number of at least 1"),
        (lambda: es.Evidence(smoothing=-0.1), "smoothing=-0.1: must be"),
        (lambda: es.evidence(network().requires_grad_(False), digits().val), "model has no weights"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
