"""Ridge, bias and variance, calibration and double descent against scikit-learn, NumPy, SciPy and exact sums."""

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
import torch.nn.functional as F
from scipy import optimize
from sklearn.calibration import calibration_curve
from sklearn.linear_model import Ridge
from sklearn.metrics import brier_score_loss
from torch import Tensor, nn

from course_lib import regularization as reg
from course_lib.lab.data import Dataset, load, normalise
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fit, fresh, logits_of
from course_lib.regularization.drawing import unit_rows
from tests.regularization.small import generator, normal

N, D = 40, 6
X = normal(N, D) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
TRUTH = normal(D, seed=1)
Y = X @ TRUTH + normal(N, seed=2)

# --- Ridge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.1, 10.0, 1e4])
@pytest.mark.parametrize("outputs", [1, 3])
def test_ridge_is_scikit_learns(alpha: float, outputs: int) -> None:
    y = Y if outputs == 1 else Y[:, None] * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + normal(N, 3, seed=5)
    theirs = Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(X.numpy(), y.numpy())
    found = reg.ridge(X, y, alpha)
    torch.testing.assert_close(
        found.mT if outputs > 1 else found, torch.from_numpy(theirs.coef_), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("alpha", [0.1, 10.0])
def test_shrinkage_is_what_is_left_along_each_eigenvector(alpha: float) -> None:
    _, vectors = torch.linalg.eigh(X.mT @ X)
    vectors = vectors.flip(1)  # falling
    left = (vectors.mT @ reg.ridge(X, Y, alpha)) / (vectors.mT @ reg.ridge(X, Y, 0.0))
    torch.testing.assert_close(reg.shrinkage(X, alpha), left, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(reg.eigenvalues(X), torch.linalg.eigvalsh(X.mT @ X).flip(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 50.0])
def test_degrees_of_freedom_are_the_trace_of_scikit_learns_predictions(alpha: float) -> None:
    theirs = Ridge(alpha=alpha, fit_intercept=False, solver="svd").fit(X.numpy(), np.eye(N))
    assert reg.degrees_of_freedom(X, alpha) == pytest.approx(np.trace(theirs.predict(X.numpy())), rel=1e-9)


def test_directions_without_data_do_not_count() -> None:
    low = torch.cat([X, X[:, :2] @ normal(2, 3)], 1)  # nine columns of rank six
    assert reg.degrees_of_freedom(low, 0.0) == pytest.approx(6, abs=1e-9)
    wide = normal(4, 10)
    assert reg.degrees_of_freedom(wide, 0.0) == pytest.approx(4, abs=1e-9)
    assert len(reg.shrinkage(wide, 1.0)) == 10
    torch.testing.assert_close(reg.ridge(low, Y, 0.0), torch.linalg.pinv(low, rtol=1e-12) @ Y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 30.0])
def test_bias_and_variance_of_ridge_are_those_of_the_matrix_and_of_draws(alpha: float) -> None:
    found = reg.ridge_bias_variance(X, TRUTH, 0.7, alpha)
    hat = X @ torch.linalg.inv(X.mT @ X + alpha * torch.eye(D).double()) @ X.mT
    truth = X @ TRUTH
    assert found.bias_sq == pytest.approx((hat @ truth - truth).square().mean().item(), rel=1e-9, abs=1e-20)
    assert found.variance == pytest.approx(0.49 * (hat @ hat.mT).trace().item() / N, rel=1e-9)
    draws = truth + 0.7 * normal(4000, N, seed=6)
    predictions = (X @ reg.ridge(X, draws.mT, alpha)).mT
    sampled = reg.squared_error_parts(predictions, truth, corrected=True)
    assert found.variance == pytest.approx(sampled.variance, rel=0.05)
    assert found.bias_sq == pytest.approx(sampled.bias, rel=0.05, abs=1e-3 * found.total)
    assert found.total == found.bias_sq + found.variance


# --- Bias and variance ------------------------------------------------------------------------------------------------


def test_squared_error_falls_apart_exactly() -> None:
    f, y = normal(7, 20, 3), normal(20, 3, seed=1)
    found = reg.squared_error_parts(f, y)
    assert found.total == pytest.approx((f - y).square().sum(-1).mean().item(), rel=1e-12)
    assert found.bias == pytest.approx((f.mean(0) - y).square().sum(-1).mean().item(), rel=1e-12)
    assert found.variance == pytest.approx(f.var(0, unbiased=False).sum(-1).mean().item(), rel=1e-12)


def test_the_correction_takes_the_variance_of_the_mean_off() -> None:
    """Three predictors of bias 2 and variance 1 at each of many examples."""
    f = 2 + normal(3, 200_000)
    zero = torch.zeros(200_000, dtype=torch.float64)
    plain, found = reg.squared_error_parts(f, zero), reg.squared_error_parts(f, zero, corrected=True)
    assert found.bias == pytest.approx(4, abs=0.02)
    assert found.variance == pytest.approx(1, abs=0.01)
    assert plain.bias == pytest.approx(4 + 1 / 3, abs=0.02)
    assert found.total == plain.total == pytest.approx(found.bias + found.variance, rel=1e-12)


def test_cross_entropy_falls_apart_exactly() -> None:
    logits, labels = 2 * normal(6, 30, 4), torch.arange(30) % 4
    found = reg.cross_entropy_parts(logits, labels)
    losses = [F.cross_entropy(each, labels).item() for each in logits]
    assert found.total == pytest.approx(sum(losses) / 6, rel=1e-12)
    assert found.bias + found.variance == pytest.approx(found.total, rel=1e-12)
    mean = F.log_softmax(logits, -1).mean(0).softmax(1)  # the geometric mean, back to a sum of 1
    assert found.bias == pytest.approx(F.nll_loss(mean.log(), labels).item(), rel=1e-12)
    apart = [F.kl_div(F.log_softmax(each, 1), mean, reduction="batchmean").item() for each in logits]
    assert found.variance == pytest.approx(sum(apart) / 6, rel=1e-12)


def test_errors_fall_apart_by_hand() -> None:
    """Four examples: always right; right with one dissenter; wrong with one who is right; wrong in two ways."""
    named = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2], [0, 1, 0, 1]])
    found = reg.zero_one_parts(named, torch.zeros(4, dtype=torch.int64), 3)
    assert reg.main_prediction(named, 3).tolist() == [0, 0, 1, 2]
    assert found.bias == 0.5
    assert found.variance == pytest.approx((1 / 3 - 1 / 3) / 4)
    assert found.total == pytest.approx(6 / 12)


def test_errors_fall_apart_as_domingos_has_it() -> None:
    """Loss = bias + c variance, c = 1 where the main prediction is right, else -P(right | not the main one)."""
    named = torch.randint(4, (9, 300), generator=generator())
    labels = torch.randint(4, (300,), generator=generator(1))
    found = reg.zero_one_parts(named, labels, 4)
    assert found.total == pytest.approx((named != labels).double().mean().item())
    assert found.bias + found.variance == pytest.approx(found.total, rel=1e-12)
    total = 0.0
    for k in range(300):
        votes = torch.bincount(named[:, k], minlength=4)
        main = int(votes.argmax())
        variance = (named[:, k] != main).double().mean().item()
        if main == labels[k]:
            total += variance
        elif variance:
            off = named[:, k][named[:, k] != main]
            total -= (off == labels[k]).double().mean().item() * variance
    assert found.variance == pytest.approx(total / 300, rel=1e-12)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=600)


def test_samples_of_a_split(digits: Dataset) -> None:
    parts = reg.disjoint_parts(digits.train, 7, generator())
    assert [len(part) for part in parts] == [85] * 7
    rows = torch.cat([part.images.flatten(1) for part in parts])
    assert len(rows.unique(dim=0)) >= 590
    again = reg.bootstrap(digits.train, generator())
    assert len(again) == 600
    share = len(again.images.flatten(1).unique(dim=0)) / 600
    assert share == pytest.approx(1 - math.exp(-1), abs=0.05)


def test_networks_trained_on_samples(digits: Dataset) -> None:
    recipe = Recipe(epochs=6, batch_size=16, precision="float64")
    parts = reg.disjoint_parts(digits.train, 4, generator())
    network = partial(mlp, (1, 8, 8), 10, width=16)
    logits = reg.resampled_logits(network, digits, recipe, parts, seed=3)
    assert logits.shape == (4, len(digits.test), 10)
    model = fresh(network, recipe, seed=4)
    fit(model, replace(digits, train=parts[1]), recipe, seed=4)
    torch.testing.assert_close(logits[1], logits_of(model, digits.test))
    whole = reg.cross_entropy_parts(logits, digits.test.labels)
    assert 0 < whole.variance < whole.total
    errors = reg.zero_one_parts(logits.argmax(2), digits.test.labels, 10)
    assert errors.bias < errors.total  # the vote is better than a voter


# --- Calibration ------------------------------------------------------------------------------------------------------

LOGITS = 3 * normal(400, 4)
LABELS = torch.distributions.Categorical(logits=LOGITS / 2).probs.multinomial(1, generator=generator(2)).squeeze(1)


def binned(logits: Tensor, labels: Tensor, bins: int) -> list[tuple[float, float, int]]:
    q = logits.double().softmax(1).numpy()
    confidence, right = q.max(1), q.argmax(1) == labels.numpy()
    found = []
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        found.append((confidence[inside].mean(), right[inside].mean(), inside.sum()) if inside.any() else (0, 0, 0))
    return found


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_reliability_and_calibration_error_by_hand(bins: int) -> None:
    found, expected = reg.reliability(LOGITS, LABELS, bins), binned(LOGITS, LABELS, bins)
    for k, (confidence, accuracy, count) in enumerate(expected):
        assert found.examples[k] == count
        if count:
            assert found.confidence[k].item() == pytest.approx(confidence, rel=1e-12)
            assert found.accuracy[k].item() == pytest.approx(accuracy, rel=1e-12)
        else:
            assert math.isnan(found.confidence[k].item())
    error = sum(count * abs(accuracy - confidence) for confidence, accuracy, count in expected) / len(LABELS)
    assert reg.calibration_error(LOGITS, LABELS, bins) == pytest.approx(error, rel=1e-12)


def test_reliability_is_scikit_learns_curve() -> None:
    confidence, named = LOGITS.softmax(1).max(1)
    accuracy, mean = calibration_curve((named == LABELS).numpy(), confidence.numpy(), n_bins=10)
    found = reg.reliability(LOGITS, LABELS, 10)
    there = found.examples > 0
    np.testing.assert_allclose(found.accuracy[there], accuracy)
    np.testing.assert_allclose(found.confidence[there], mean)


def test_the_upper_edge_belongs_to_a_bin() -> None:
    half = reg.reliability(torch.zeros(3, 2), torch.tensor([0, 1, 0]), 10)  # confidences of 1/2
    assert half.examples.tolist() == [0, 0, 0, 0, 3, 0, 0, 0, 0, 0]


def test_a_network_that_is_as_right_as_it_says_has_no_error() -> None:
    logits = 2 * normal(200_000, 3, seed=4)
    honest = logits.softmax(1).multinomial(1, generator=generator()).squeeze(1)
    assert reg.calibration_error(logits, honest) < 0.005
    assert reg.calibration_error(3 * logits, honest) > 0.1
    assert reg.calibration_error(torch.tensor([[50.0, 0.0]]), torch.tensor([0])) == 0  # a confidence of 1 has a bin


def test_brier_score_is_scikit_learns() -> None:
    expected = brier_score_loss(LABELS.numpy(), LOGITS.softmax(1).numpy(), labels=[0, 1, 2, 3], scale_by_half=False)
    assert reg.brier_score(LOGITS, LABELS) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_the_temperature_is_the_best(scale: float) -> None:
    logits = scale * LOGITS
    best = optimize.minimize_scalar(
        lambda log: F.cross_entropy(logits / math.exp(log), LABELS).item(), bounds=(-5, 5), options={"xatol": 1e-10}
    )
    found = reg.fit_temperature(logits, LABELS)
    assert found == pytest.approx(math.exp(best.x), rel=1e-5)
    assert found == pytest.approx(2 * scale, rel=0.2)  # labels were drawn at temperature 2
    cold = reg.fit_temperature(torch.eye(3).double(), torch.arange(3))
    assert cold == pytest.approx(1e-3, rel=1e-6)


def test_a_tempered_network_names_the_same_classes(digits: Dataset) -> None:
    recipe = Recipe(epochs=25, precision="float64")
    noisy, _ = reg.with_wrong_labels(digits, 0.3, generator())
    model = fresh(partial(mlp, (1, 8, 8), 10, width=64), recipe, seed=0)
    fit(model, noisy, recipe, seed=0)
    mended = reg.tempered(model, digits.val)
    before, after = logits_of(model, digits.test), logits_of(mended, digits.test)
    assert torch.equal(before.argmax(1), after.argmax(1))
    torch.testing.assert_close(after * mended.temperature, before)
    labels = digits.test.labels
    assert F.cross_entropy(after, labels).item() < F.cross_entropy(before, labels).item()
    assert reg.calibration_error(after, labels) < reg.calibration_error(before, labels)


# --- Double descent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(8, 5), (5, 8), (6, 6)])
def test_minimum_norm_is_numpys_least_squares(rows: int, columns: int) -> None:
    A, b = normal(rows, columns), normal(rows, 2, seed=1)
    expected = torch.from_numpy(np.linalg.lstsq(A.numpy(), b.numpy(), rcond=None)[0])
    torch.testing.assert_close(reg.minimum_norm(A, b), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(reg.minimum_norm(A, b), torch.linalg.pinv(A) @ b, rtol=1e-9, atol=1e-10)


def test_random_features_are_nested_and_are_relu() -> None:
    features = reg.RandomFeatures(5, 30, generator())
    x = normal(4, 5)
    torch.testing.assert_close(features(x, 12), features(x)[:, :12] * math.sqrt(30 / 12))
    torch.testing.assert_close(features(x), torch.relu(x @ features.directions.mT) / math.sqrt(30))
    assert features.directions.square().sum(1).mean().item() == pytest.approx(1, abs=0.2)


def test_errors_over_width_are_those_of_pinv() -> None:
    features = reg.RandomFeatures(5, 40, generator())
    train = (normal(15, 5), normal(15, 2, seed=1))
    test = (normal(30, 5, seed=2), normal(30, 2, seed=3))
    for row in reg.errors_over_width(features, train, test, [5, 15, 40]):
        w = np.linalg.pinv(features(train[0], row.width).numpy()) @ train[1].numpy()
        for (x, y), found in ((train, row.train), (test, row.test)):
            error = ((features(x, row.width).numpy() @ w - y.numpy()) ** 2).sum(1).mean()
            assert found == pytest.approx(error, rel=1e-6, abs=1e-15)
        assert row.norm == pytest.approx(np.linalg.norm(w), rel=1e-6)


def test_digits_descend_twice_and_a_penalty_takes_the_peak_away() -> None:
    data, _ = reg.with_wrong_labels(load("digits", train_size=150), 0.2, generator())
    sets = [(normalise(s.inputs, s).double(), reg.one_hot_targets(s.labels, 10)) for s in (data.train, data.test)]
    features = reg.RandomFeatures(64, 1500, generator())
    widths = [30, 150, 1500]
    few, equal, many = reg.errors_over_width(features, sets[0], sets[1], widths)
    assert equal.test > 3 * few.test
    assert equal.test > 3 * many.test
    assert many.test < few.test
    assert few.train > 0.1 > 1e-10 > many.train
    assert equal.norm > many.norm
    penalised = reg.errors_over_width(features, sets[0], sets[1], widths, alpha=1.0)
    assert penalised[1].test < 0.3 * equal.test
    assert penalised[2].test <= penalised[1].test <= penalised[0].test


def test_one_hot_targets() -> None:
    found = reg.one_hot_targets(torch.tensor([1, 0]), 4)
    assert found.tolist() == [[-0.25, 0.75, -0.25, -0.25], [0.75, -0.25, -0.25, -0.25]]


def test_unit_rows_are_uniform_directions() -> None:
    v = unit_rows((20_000, 2, 2), X, generator())
    torch.testing.assert_close(v.flatten(1).norm(dim=1), torch.ones(20_000, dtype=torch.float64))
    torch.testing.assert_close(v.flatten(1).mT @ v.flatten(1) / 20_000, torch.eye(4).double() / 4, rtol=0, atol=0.01)


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("alpha=-1: must be a number of at least 0", lambda: reg.ridge(X, Y, -1)),
    ("y has the shape [6]: must be [40]", lambda: reg.ridge(X, TRUTH, 1)),
    ("X is torch.float64 [40]: must be a matrix", lambda: reg.shrinkage(Y, 1)),
    ("noise=-1: must be", lambda: reg.ridge_bias_variance(X, TRUTH, -1, 1)),
    ("truth has the shape [40]: must be [6]", lambda: reg.ridge_bias_variance(X, Y, 1, 1)),
    ("predictors=1: must be a whole number of at least 2", lambda: reg.squared_error_parts(normal(1, 3), normal(3))),
    ("targets have the shape [4]: must be [3]", lambda: reg.squared_error_parts(normal(2, 3), normal(4))),
    ("targets have the shape [4]: must be [3]", lambda: reg.cross_entropy_parts(normal(2, 3, 2), normal(4))),
    ("predictors=1: must be", lambda: reg.zero_one_parts(torch.zeros(1, 3).long(), torch.zeros(3).long(), 2)),
    ("parts=1: must be", lambda: reg.disjoint_parts(load("digits", train_size=20).train, 1, generator())),
    ("parts=21: must be at most 20", lambda: reg.disjoint_parts(load("digits", train_size=20).train, 21, generator())),
    ("samples=0: must be", lambda: reg.resampled_logits(nn.Module, None, Recipe(), [], seed=0)),  # type: ignore[arg-type]
    ("bins=0: must be", lambda: reg.reliability(LOGITS, LABELS, 0)),
    ("must be [N, K] and int64 [N]", lambda: reg.brier_score(LOGITS, LABELS[:5])),
    ("must be [N, K] and int64 [N]", lambda: reg.fit_temperature(LOGITS, LABELS.double())),
    ("temperature=0: must be a number above 0", lambda: reg.Tempered(nn.Flatten(), 0)),
    ("width=0: must be", lambda: reg.RandomFeatures(3, 0, generator())),
    ("width=9: must be at most 4", lambda: over(9)),
    ("classes=1: must be", lambda: reg.one_hot_targets(LABELS, 1)),
]


def over(width: int) -> Any:
    return reg.errors_over_width(reg.RandomFeatures(D, 4, generator()), (X, Y), (X, Y), [width])


@pytest.mark.parametrize(("message", "bad"), BAD, ids=[f"{k}: {message}" for k, (message, _) in enumerate(BAD)])
def test_bad_settings_are_named(message: str, bad: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bad()
