"""The identities: both sides by hand, against chapter 5's decompositions, scikit-learn, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from sklearn.metrics import matthews_corrcoef

from course_lib import fusion
from course_lib.regularization import cross_entropy_parts, squared_error_parts
from tests.fusion.small import answers, close, normal

LOGITS, LABELS = answers(4, 50)
W = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def test_the_ambiguity_of_squared_errors() -> None:
    f, y = normal(4, 30), normal(30, seed=1)
    found = fusion.squared_ambiguity(f, y, W)
    mean = W @ f
    assert found.ensemble == pytest.approx(float((mean - y).square().mean()), abs=1e-12)
    assert found.members == pytest.approx(float((W @ (f - y).square()).mean()), abs=1e-12)
    assert found.diversity == pytest.approx(found.members - found.ensemble, abs=1e-12)
    plain, parts = fusion.squared_ambiguity(LOGITS, LOGITS[0]), squared_error_parts(LOGITS, LOGITS[0])
    assert plain == pytest.approx((parts.bias, parts.total, parts.variance), abs=1e-12)


def test_the_ambiguity_of_the_geometric_mean() -> None:
    found = fusion.geometric_ambiguity(LOGITS, LABELS, W)
    q = LOGITS.softmax(2)
    product = (q ** W[:, None, None]).prod(0)
    assert found.ensemble == pytest.approx(F.nll_loss((product / product.sum(1, keepdim=True)).log(), LABELS).item())
    losses = torch.stack([F.cross_entropy(each, LABELS) for each in LOGITS])
    assert found.members == pytest.approx(float(W @ losses), abs=1e-12)
    assert found.diversity == pytest.approx(found.members - found.ensemble, abs=1e-12)
    assert found.diversity == pytest.approx(-float(product.sum(1).log().mean()), abs=1e-12)
    parts = cross_entropy_parts(LOGITS, LABELS)
    plain = fusion.geometric_ambiguity(LOGITS, LABELS)
    assert plain == pytest.approx((parts.bias, parts.total, parts.variance), abs=1e-12)
    other = fusion.geometric_ambiguity(LOGITS, (LABELS + 1) % 4, W)
    assert other.diversity == pytest.approx(found.diversity, abs=1e-12)  # whatever the labels are


def test_the_ambiguity_of_the_arithmetic_mean() -> None:
    found = fusion.arithmetic_ambiguity(LOGITS, LABELS, W)
    mean = (W[:, None, None] * LOGITS.softmax(2)).sum(0)
    assert found.ensemble == pytest.approx(F.nll_loss(mean.log(), LABELS).item(), abs=1e-12)
    assert found.diversity == pytest.approx(found.members - found.ensemble, abs=1e-12)
    assert found.diversity > 0
    other = fusion.arithmetic_ambiguity(LOGITS, (LABELS + 1) % 4, W)
    assert other.diversity != pytest.approx(found.diversity, abs=1e-3)  # this one depends on them


def test_probabilities_of_zero_are_no_numbers_lost() -> None:
    sure = torch.tensor([[[0.0, -2000.0]], [[0.0, -1.0]]]).double()
    found = fusion.geometric_ambiguity(sure, torch.tensor([0]))
    assert all(map(math.isfinite, found))
    assert found.ensemble == pytest.approx(found.members - found.diversity, abs=1e-12)


@pytest.mark.parametrize("outputs", [(), (3,)])
def test_bias_variance_and_diversity(outputs: tuple[int, ...]) -> None:
    f, y = normal(5, 4, 20, *outputs), normal(20, *outputs, seed=1)
    found = fusion.bias_variance_diversity(f, y)
    assert found.ensemble == pytest.approx(found.bias + found.variance - found.diversity, abs=1e-12)
    scale = outputs[0] if outputs else 1
    assert found.ensemble == pytest.approx(scale * float((f.mean(1) - y).square().mean()))
    bias = np.mean([[(f[:, m, n].mean(0) - y[n]).square().sum() for n in range(20)] for m in range(4)])
    assert found.bias == pytest.approx(float(bias))
    diversity = np.mean([fusion.squared_ambiguity(each, y).diversity for each in f])
    assert found.diversity == pytest.approx(float(diversity))


def test_the_variance_of_a_mean() -> None:
    covariance = 2.0 * (0.3 * torch.ones(5, 5) + 0.7 * torch.eye(5))
    assert fusion.variance_of_mean(2.0, 0.3, 5) == pytest.approx(float(covariance.mean()))
    assert fusion.variance_of_mean(2.0, -0.25, 5) == pytest.approx(0)
    assert fusion.variance_of_mean(2.0, 0.5, 1) == pytest.approx(2.0)


@pytest.mark.parametrize("members", [1, 2, 5, 8])
def test_the_majority_of_independent_voters(members: int) -> None:
    law = binom(members, 0.6)
    expected = law.sf(members // 2) + (0.5 * law.pmf(members // 2) if members % 2 == 0 else 0)
    assert fusion.majority_accuracy(0.6, members) == pytest.approx(float(expected))
    assert fusion.majority_accuracy(0.5, members) == pytest.approx(0.5)


def test_members_two_by_two() -> None:
    right = LOGITS.argmax(2) == LABELS
    a, b = right[0].numpy(), right[2].numpy()
    n11, n10, n01, n00 = (a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()
    assert float(fusion.disagreement(right)[0, 2]) == pytest.approx((n10 + n01) / 50)
    assert float(fusion.double_fault(right)[0, 2]) == pytest.approx(n00 / 50)
    q = (n11 * n00 - n01 * n10) / (n11 * n00 + n01 * n10)
    assert float(fusion.q_statistic(right)[0, 2]) == pytest.approx(q)
    assert float(fusion.error_correlation(right)[0, 2]) == pytest.approx(matthews_corrcoef(a, b))
    close(fusion.error_correlation(right), torch.from_numpy(np.corrcoef(right.double().numpy())), 1e-12)
    named = LOGITS.argmax(2)
    assert float(fusion.disagreement(named)[1, 3]) == float((named[1] != named[3]).double().mean())
    table = fusion.double_fault(right)
    pairs = [float(table[i, j]) for i in range(4) for j in range(4) if i != j]
    assert fusion.pair_mean(table) == pytest.approx(np.mean(pairs))


def test_calibrated_members_do_not_make_a_calibrated_mean() -> None:
    world = fusion.TWO_HALVES
    for member in world.members:
        assert fusion.calibration_gap(world.chance, world.truth, member) == 0
    mean = world.members.mean(0)
    assert fusion.calibration_gap(world.chance, world.truth, mean) == 0.125
    assert fusion.calibration_gap(world.chance, world.truth, world.truth) == 0
    brier = [float((world.chance * (f - world.truth).square()).sum()) for f in (*world.members, mean)]
    assert brier[2] < min(brier[:2])  # and yet it is better


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.squared_ambiguity(normal(3, 4), normal(5)), "targets="),
        (lambda: fusion.geometric_ambiguity(LOGITS, LABELS[:2]), "labels="),
        (lambda: fusion.arithmetic_ambiguity(LOGITS, LABELS, [1.0]), "weights="),
        (lambda: fusion.bias_variance_diversity(normal(3, 4), normal(4)), "targets="),
        (lambda: fusion.variance_of_mean(1.0, -0.5, 5), "correlation="),
        (lambda: fusion.variance_of_mean(-1.0, 0.5, 5), "variance="),
        (lambda: fusion.majority_accuracy(1.5, 3), "accuracy="),
        (lambda: fusion.majority_accuracy(0.5, 0), "members="),
        (lambda: fusion.double_fault(LOGITS.argmax(2)), "right="),
        (lambda: fusion.disagreement(LABELS), "named="),
        (lambda: fusion.pair_mean(torch.ones(1, 1)), "table="),
        (lambda: fusion.calibration_gap(torch.ones(2), torch.ones(2), torch.ones(2)), "chance"),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
