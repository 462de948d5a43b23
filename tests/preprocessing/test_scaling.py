"""Scalers against scikit-learn, or against the formula in float64 by another road (an SVD where ours takes eigh)."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler
from torch import Tensor

from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.preprocessing import scaling
from course_lib.preprocessing.scaling import (
    Affine,
    condition_number,
    identity,
    min_max,
    pca_whitening,
    per_channel,
    per_image,
    robust,
    scaled,
    standardise,
    zca_whitening,
)

COLUMNS: dict[str, tuple[Any, Any]] = {
    "standardise": (standardise, StandardScaler()),
    "min_max": (min_max, MinMaxScaler()),
    "min_max -1 to 3": (partial(min_max, low=-1, high=3), MinMaxScaler(feature_range=(-1, 3))),
    "robust": (robust, RobustScaler()),
    "robust 10 to 80": (partial(robust, low=0.1, high=0.8), RobustScaler(quantile_range=(10, 80))),
}
FITS: dict[str, Any] = {
    "identity": identity,
    "standardise": standardise,
    "min_max": min_max,
    "robust": robust,
    "pca_whitening": pca_whitening,
    "zca_whitening": zca_whitening,
}


def rows(count: int = 83, columns: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Correlated columns, skewed, of unlike size and far from 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=g, dtype=torch.float64).exp()
    x = x @ torch.randn(columns, columns, generator=g, dtype=torch.float64)
    return (x * 10.0 ** torch.arange(-2, columns - 2) + 50).to(dtype)


def covariance(z: Tensor) -> Tensor:
    return torch.cov(z.T).reshape(z.shape[1], z.shape[1])


# --- Columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_columns_are_scaled_as_in_scikit_learn(name: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = COLUMNS[name]
    train, test = rows(dtype=dtype), rows(31, seed=1, dtype=dtype)
    scaler = ours(train)
    theirs.fit(train.double().numpy())
    z = scaler(test)
    assert z.dtype == dtype
    torch.testing.assert_close(
        z.double(), torch.from_numpy(theirs.transform(test.double().numpy())), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(scaler.inverse(z), test, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", COLUMNS)
def test_gaps_and_constant_columns_are_treated_as_in_scikit_learn(name: str) -> None:
    ours, theirs = COLUMNS[name]
    train, test = rows(), rows(31, seed=1)
    train[:, 2], train[:, 4] = 0.1, 7e8 + 0.1  # neither mean is exact in floating point
    train[::3, 0], train[:5, 5], test[4, 1] = math.nan, math.nan, math.nan
    z = ours(train)(test)
    want = torch.from_numpy(theirs.fit(train.numpy()).transform(test.numpy()))
    torch.testing.assert_close(z, want, rtol=1e-11, atol=1e-11, equal_nan=True)
    assert bool(z[4, 1].isnan())
    inside = ours(train)(train)
    assert bool(inside[:, [2, 4]].isfinite().all())
    assert float((inside[:, 2] - inside[0, 2]).abs().max()) == 0


def test_the_rounding_of_a_mean_is_not_taken_for_a_spread() -> None:
    level = (torch.arange(1, 41, dtype=torch.float64) / 10).repeat(83, 1)
    assert bool((level.mean(0) != level[0]).any())
    assert float(standardise(level)(level).abs().max()) < 1e-12


def test_a_small_spread_far_from_zero_keeps_its_digits_in_float32() -> None:
    column = torch.linspace(0, 1, 101)[:, None] + 10_000
    z = standardise(column)(column)
    want = StandardScaler().fit_transform(column.double().numpy())
    torch.testing.assert_close(z.double(), torch.from_numpy(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("q", [0, 0.05, 0.25, 1 / 3, 0.5, 0.9, 1])
def test_quantiles_are_numpys(q: float) -> None:
    x = rows(50)
    x[::4, 1] = math.nan
    np.testing.assert_allclose(scaling.quantile(x, q).numpy(), np.nanquantile(x.numpy(), q, axis=0), rtol=1e-13)


def test_figures_are_those_of_the_training_rows_alone() -> None:
    train, test = rows(), rows(20, seed=3) * 5
    for fit in FITS.values():
        scaler = fit(train)
        alone = torch.cat([scaler(row[None]) for row in test])
        torch.testing.assert_close(scaler(test), alone, rtol=1e-11, atol=1e-11)


def test_identity_changes_nothing() -> None:
    x = rows(dtype=torch.float32)
    assert torch.equal(identity(x)(x), x)
    assert torch.equal(identity(x).inverse(x), x)


# --- Whitening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [pca_whitening, zca_whitening])
def test_whitened_rows_have_the_identity_as_covariance(whiten: Any) -> None:
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x @ torch.randn(20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 9
    scaler = whiten(x)
    z = scaler(x)
    assert float((covariance(z) - torch.eye(20, dtype=torch.float64)).abs().max()) < 1e-8
    assert float(z.mean(0).abs().max()) < 1e-10
    torch.testing.assert_close(scaler.inverse(z), x, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("keep", [None, 1, 3])
def test_pca_whitening_is_scikit_learns(keep: int | None) -> None:
    train, test = rows(), rows(31, seed=1)
    theirs = PCA(n_components=keep, whiten=True, svd_solver="full").fit(train.numpy())
    scaler = pca_whitening(train, keep=keep)
    z = scaler(test)
    torch.testing.assert_close(z, torch.from_numpy(theirs.transform(test.numpy())), rtol=1e-7, atol=1e-7)
    back = torch.from_numpy(theirs.inverse_transform(z.numpy()))
    torch.testing.assert_close(scaler.inverse(z), back, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_zca_whitening_is_the_inverse_root_of_the_covariance(eps: float) -> None:
    train, test = torch.nn.functional.normalize(rows(), dim=0) * 9, rows(31, seed=1)
    _, s, v = torch.linalg.svd(train - train.mean(0), full_matrices=False)
    root = v.T @ torch.diag((s.square() / (len(train) - 1) + eps).rsqrt()) @ v
    scaler = zca_whitening(train, eps=eps)
    torch.testing.assert_close(scaler(test), (test - train.mean(0)) @ root, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(scaler.forward, scaler.forward.T)
    torch.testing.assert_close(scaler.inverse(scaler(test)), test, rtol=1e-8, atol=1e-8)


def test_zca_moves_the_rows_less_than_pca() -> None:
    x = standardise(rows())(rows())
    moved = [float((whiten(x)(x) - x).square().sum()) for whiten in (zca_whitening, pca_whitening)]
    assert moved[0] < 0.8 * moved[1]


def test_pca_with_eps_shrinks_weak_axes_by_the_formula() -> None:
    x = rows()
    variances = torch.linalg.svdvals(x - x.mean(0)).square() / (len(x) - 1)
    z = pca_whitening(x, eps=2.0)(x)
    torch.testing.assert_close(z.var(0), variances / (variances + 2.0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("whiten", [pca_whitening, zca_whitening])
def test_directions_without_variance_are_dropped(whiten: Any, dtype: torch.dtype) -> None:
    x = rows(60, 4, dtype=dtype)
    x = (x - x.mean(0)) / x.std(0)
    wide = torch.cat([x, x[:, :2], torch.full((60, 1), 3.0, dtype=dtype)], 1)
    scaler = whiten(wide)
    z = scaler(wide)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    spectrum = torch.linalg.eigvalsh(covariance(z.double()))
    want = torch.tensor([0.0] * (z.shape[1] - 4) + [1.0] * 4, dtype=torch.float64)
    assert z.shape[1] == (4 if whiten is pca_whitening else 7)
    torch.testing.assert_close(spectrum, want, rtol=0, atol=tolerance)
    torch.testing.assert_close(scaler.inverse(z), wide, rtol=tolerance, atol=tolerance)
    odd = wide.clone()
    odd[:, -1] += 1  # a direction never seen in training must not explode
    assert float(scaler(odd).abs().max()) < 2 * float(z.abs().max())


def test_rank_deficient_rows_agree_with_scikit_learn_where_there_is_variance() -> None:
    few = rows(5, 9)
    theirs = PCA(n_components=4, whiten=True, svd_solver="full").fit(few.numpy())
    z = pca_whitening(few)(few)
    assert z.shape == (5, 4)
    torch.testing.assert_close(z, torch.from_numpy(theirs.transform(few.numpy())), rtol=1e-6, atol=1e-6)


# --- Images -----------------------------------------------------------------------------------------------------------


def pictures(count: int = 12, channels: int = 3, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (count, channels, 5, 4), generator=g, dtype=torch.uint8)


def test_per_channel_is_the_laboratorys_normalisation() -> None:
    data = load("glyphs", size=16, train_size=64, val_size=36, test_size=36)
    want, _ = next(iter(batches(data.test, 36)))
    torch.testing.assert_close(per_channel(data.train.images)(data.test.images), want, rtol=1e-5, atol=1e-5)


def test_per_channel_has_figures_of_each_channel_and_goes_back() -> None:
    x = pictures()
    x[:, 1] = 17
    z = per_channel(x)(x)
    pixels = (x.double() / 255)[:, [0, 2]]
    want = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(z[:, [0, 2]].double(), want, rtol=1e-6, atol=1e-6)
    assert float(z[:, 1].abs().max()) < 1e-6
    torch.testing.assert_close(per_channel(x).inverse(z), x / 255, rtol=1e-6, atol=1e-6)


def test_per_image_forgets_brightness_and_contrast() -> None:
    x = pictures()
    z = per_image(x)
    flat = z.double().flatten(1)
    assert float(flat.mean(1).abs().max()) < 1e-6
    torch.testing.assert_close(flat.std(1, correction=0), torch.ones(12, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(per_image(0.3 * x.double() / 255 + 0.2), z.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(per_image(torch.full((2, 1, 3, 3), 0.7)), torch.zeros(2, 1, 3, 3))
    strong = per_image(x.double(), eps=1e4)
    centred = x.double() - x.double().mean((1, 2, 3), keepdim=True)
    want = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e4).sqrt()
    torch.testing.assert_close(strong, want, rtol=1e-12, atol=1e-12)


# --- What it is for ---------------------------------------------------------------------------------------------------


def test_condition_number_is_that_of_the_hessian() -> None:
    x = rows()
    unit = standardise(x)(x)
    assert condition_number(x) == pytest.approx(np.linalg.cond(x.numpy()) ** 2, rel=1e-6)
    assert condition_number(unit) == pytest.approx(np.linalg.cond((unit.T @ unit).numpy()), rel=1e-6)
    assert condition_number(unit) < condition_number(x) / 1e4
    assert condition_number(zca_whitening(x)(x)) == pytest.approx(1, abs=1e-6)
    assert condition_number(torch.cat([x, x[:, :1] + x[:, 1:2]], 1)) == math.inf
    assert condition_number(x[:3]) == math.inf


def test_gradient_descent_needs_steps_in_proportion_to_the_condition_number() -> None:
    """The slowest error shrinks by (1 - 2 / (kappa + 1)) a step at the best rate."""
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([1, 2, 5.0])
    hessian, kappa = x.T @ x / len(x), condition_number(x)
    values, vectors = torch.linalg.eigh(hessian)
    w = vectors[:, 0].clone()
    for _ in range(50):
        w -= 2 / (values[0] + values[-1]) * hessian @ w
    assert float(w.norm()) == pytest.approx((1 - 2 / (kappa + 1)) ** 50, rel=1e-6)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=256)


@pytest.mark.parametrize("name", FITS)
def test_scaled_splits_reach_the_network_as_the_scaler_made_them(name: str, digits: Dataset) -> None:
    made = scaled(digits, FITS[name])
    want = FITS[name]((digits.train.images / 255).flatten(1))
    for part in ("train", "val", "test"):
        x, y = next(iter(batches(getattr(made, part), 10_000)))
        split = getattr(digits, part)
        assert torch.equal(x, want((split.images / 255).flatten(1)))
        assert torch.equal(y, split.labels)
        assert x.dtype == torch.float32
    assert made.classes == digits.classes


def test_scaled_learns_nothing_from_the_test_split(digits: Dataset) -> None:
    other = replace(digits, test=replace(digits.test, inputs=255 - digits.test.images))
    assert torch.equal(scaled(digits).train.inputs, scaled(other).train.inputs)  # type: ignore[arg-type]
    assert torch.equal(scaled(digits).val.inputs, scaled(other).val.inputs)  # type: ignore[arg-type]


def test_tables_are_scaled_too() -> None:
    wine = load("wine")
    made = scaled(wine)
    x = made.train.inputs
    assert isinstance(x, Tensor)
    torch.testing.assert_close(
        x.double().std(0, correction=0), torch.ones(x.shape[1], dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_scalers_can_be_pickled_and_fingerprinted() -> None:
    x = rows()
    for fit in FITS.values():
        scaler: Affine = fit(x)
        again = pickle.loads(pickle.dumps(scaler))
        assert torch.equal(again(x), scaler(x))
        assert fingerprint(again) == fingerprint(scaler)
    assert fingerprint(standardise(x)) != fingerprint(standardise(x + 1))


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: standardise(x.long()), r"train is torch.int64 \[83, 6\]: must be floating point"),
        (lambda x: standardise(x[0]), r"train is torch.float64 \[6\]"),
        (lambda x: standardise(x[:0]), r"N at least 1"),
        (lambda x: standardise(x / 0), r"train holds infinite values"),
        (lambda x: pca_whitening(x * math.nan), r"train holds NaN"),
        (lambda x: pca_whitening(x, keep=7), r"keep=7: must be at most 6"),
        (lambda x: pca_whitening(x, keep=0), r"keep=0"),
        (lambda x: zca_whitening(x, eps=-1), r"eps=-1"),
        (lambda x: zca_whitening(x[:1]), r"N at least 2"),
        (lambda x: zca_whitening(torch.ones(4, 2)), r"only equal rows"),
        (lambda x: min_max(x, low=1, high=1), r"low=1, high=1"),
        (lambda x: robust(x, low=0.5, high=0.2), r"low=0.5, high=0.2"),
        (lambda x: standardise(x)(x[:, :3]), r"x is torch.float64 \[83, 3\]: must be .* \[N, 6\]"),
        (lambda x: standardise(x)(x.long()), r"x is torch.int64"),
        (lambda x: pca_whitening(x, keep=2).inverse(x), r"z is torch.float64 \[83, 6\]: must be .* \[N, 2\]"),
        (lambda x: per_channel(x), r"must be images"),
        (lambda x: per_channel(pictures())(pictures(channels=1)), r"\[N, 3, H, W\]"),
        (lambda x: per_image(pictures(), eps=0), r"eps=0"),
        (lambda x: condition_number(x * math.nan), r"x holds NaN"),
        (lambda x: scaled(load("digits", train_size=64).with_inputs(lambda i: (i, i))), r"data has inputs in 2 parts"),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(rows())


@pytest.mark.gpu
@pytest.mark.parametrize("name", FITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalers_agree_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    x = standardise(rows())(rows()).to(dtype)
    want, found = FITS[name](x), FITS[name](x.cuda())
    z = found(x.cuda())
    assert z.is_cuda
    assert z.dtype == dtype
    torch.testing.assert_close(z.cpu(), want(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.inverse(z).cpu(), x, rtol=1e-4, atol=1e-4)
    assert condition_number(x.cuda()) == pytest.approx(condition_number(x), rel=1e-6)
