"""Calibration: against scikit-learn, scipy's optimiser, and sums over bins and orders written out."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.metrics import log_loss, roc_auc_score

from course_lib import fusion
from course_lib.lab.training import logits_of
from course_lib.regularization import brier_score, fit_temperature
from tests.fusion.small import answers, close, data, generator, network, normal

LOGITS, LABELS = answers(3, 80)
ONE = 2 * LOGITS[0]


def test_the_likelihood_is_sklearns() -> None:
    expected = log_loss(LABELS.numpy(), ONE.softmax(1).numpy(), labels=range(4))
    assert fusion.negative_log_likelihood(ONE, LABELS) == pytest.approx(expected)
    assert fusion.negative_log_likelihood(ONE.log_softmax(1), LABELS) == pytest.approx(expected)


def test_temperatures_of_members() -> None:
    found = fusion.tempered_members(LOGITS, LABELS)
    assert found.tolist() == [fit_temperature(each, LABELS) for each in LOGITS]
    before = fusion.mean_probability(LOGITS)
    assert fit_temperature(before, LABELS) < found.min()  # the mean is less sure than its members


def test_a_vector_is_scipys_optimum() -> None:
    found = fusion.fit_vector(ONE, LABELS, strength=1e-3)

    def loss(ab: np.ndarray) -> float:
        a, b = torch.from_numpy(ab).split(4)
        return (F.cross_entropy(a * ONE + b, LABELS) + 1e-3 * ((a - 1).square().sum() + b.square().sum())).item()

    theirs = minimize(loss, np.r_[np.ones(4), np.zeros(4)], tol=1e-12)
    assert loss(torch.cat(found).numpy()) <= theirs.fun + 1e-10
    close(torch.cat(found), torch.from_numpy(theirs.x), 1e-4)
    scaled = F.cross_entropy(found.factor * ONE + found.offset, LABELS)
    assert scaled < F.cross_entropy(ONE / fit_temperature(ONE, LABELS), LABELS)


def test_a_network_with_a_vector() -> None:
    model, small = network(), data()
    found = fusion.vector_scaled(model, small.val)
    vector = fusion.fit_vector(logits_of(model, small.val), small.val.labels)
    close(logits_of(found, small.test), logits_of(model, small.test) * vector.factor + vector.offset, 1e-12)
    assert found.float()(torch.zeros(2, 1, 8, 8)).dtype is torch.float32


@pytest.mark.parametrize("bins", [1, 7])
def test_the_parts_of_the_brier_score_are_an_identity(bins: int) -> None:
    parts = fusion.brier_parts(ONE, LABELS, bins=bins)
    assert parts.score == pytest.approx(brier_score(ONE, LABELS), abs=1e-12)
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within
    assert total == pytest.approx(parts.score, abs=1e-12)
    q, one_hot, n = ONE.softmax(1), torch.eye(4, dtype=torch.float64)[LABELS], len(LABELS)
    reliability = resolution = 0.0
    for k in range(4):
        for b in range(bins):
            inside = (q[:, k] > b / bins) & (q[:, k] <= (b + 1) / bins)
            if inside.any():
                p, o = q[inside, k].mean(), one_hot[inside, k].mean()
                reliability += float(inside.sum().double() / n * (p - o) ** 2)
                resolution += float(inside.sum().double() / n * (o - one_hot[:, k].mean()) ** 2)
    assert parts.reliability == pytest.approx(reliability, abs=1e-12)
    assert parts.resolution == pytest.approx(resolution, abs=1e-12)


def test_equal_forecasts_leave_nothing_within() -> None:
    levels = torch.tensor([[0.1, 0.9], [0.4, 0.6], [0.8, 0.2]], dtype=torch.float64).log()
    rows = torch.randint(3, (50,), generator=generator())
    labels = torch.randint(2, (50,), generator=generator(1))
    parts = fusion.brier_parts(levels[rows], labels, bins=10)
    assert parts.within == pytest.approx(0, abs=1e-12)
    assert parts.uncertainty == pytest.approx(2 * float(labels.double().mean() * (1 - labels.double().mean())))


def test_the_risk_is_the_mean_over_all_orders_of_equals() -> None:
    confidence = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.2])
    right = torch.tensor([True, False, True, True, False])
    found = fusion.risk_coverage(confidence, right)
    orders = [[0, *middle, 4] for middle in permutations([1, 2, 3])]
    kept = torch.arange(1, 6)
    risks = torch.stack([(~right)[order].double().cumsum(0) / kept for order in orders]).mean(0)
    close(found.risk, risks, 1e-12)
    assert found.coverage.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert found.area == pytest.approx(risks.mean().item())
    assert found.best == pytest.approx((0 + 0 + 0 + 1 / 4 + 2 / 5) / 5)
    assert fusion.risk_coverage(right.double(), right).area == pytest.approx(found.best)


def test_telling_errors_is_sklearns_area() -> None:
    confidence, right = normal(60).mul(3).round(), normal(60, seed=1) + normal(60) > 0
    expected = roc_auc_score(right.numpy(), confidence.numpy())
    assert fusion.error_auroc(confidence, right) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.negative_log_likelihood(LOGITS, LABELS), "logits="),
        (lambda: fusion.negative_log_likelihood(ONE, LABELS[:2]), "labels="),
        (lambda: fusion.tempered_members(ONE, LABELS), "logits="),
        (lambda: fusion.fit_vector(ONE, LABELS, strength=0.0), "strength="),
        (lambda: fusion.brier_parts(ONE, LABELS, bins=0), "bins="),
        (lambda: fusion.risk_coverage(torch.rand(3), torch.ones(3)), "confidence="),
        (lambda: fusion.risk_coverage(torch.tensor([torch.nan]), torch.tensor([True])), "confidence="),
        (lambda: fusion.error_auroc(torch.rand(3), torch.ones(3, dtype=torch.bool)), "right="),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
