"""Copies against all pairs, imputation and distances against scikit-learn, fences against numpy and scipy."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.covariance import EmpiricalCovariance
from sklearn.impute import KNNImputer, SimpleImputer
from torch import Tensor

from course_lib.lab.data import Split, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.preprocessing import cleaning
from course_lib.preprocessing.cleaning import (
    conflicts,
    drop_duplicates,
    drop_rows,
    exact_duplicates,
    impute_constant,
    impute_mean,
    impute_median,
    impute_neighbours,
    iqr_fences,
    iqr_outliers,
    leakage,
    mad_fences,
    mad_outliers,
    mahalanobis,
    mahalanobis_outliers,
    missing_mask,
    near_duplicates,
    outliers,
    quantile_fences,
    winsorise,
    zscore_fences,
    zscore_outliers,
)

TYPES = [torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(count: int = 60, columns: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, columns, generator=generator(seed), dtype=torch.float64).to(dtype)


def with_gaps(x: Tensor, share: float = 0.25, seed: int = 9) -> Tensor:
    holes = torch.rand(x.shape, generator=generator(seed)) < share
    return x.masked_fill(holes, math.nan)


def split_of(x: Tensor, labels: Tensor | None = None) -> Split:
    columns = x.shape[1]
    labels = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels
    return Split(x, labels, (0.0,) * columns, (1.0,) * columns)


# --- Copies -----------------------------------------------------------------------------------------------------------


def by_comparing_all(x: Tensor) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for i, row in enumerate(x.flatten(1)):
        groups.setdefault(str(row.tolist()).encode(), []).append(i)
    return [members for members in groups.values() if len(members) > 1]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(200, 3), (100, 1, 2, 2)])
def test_exact_duplicates_are_those_of_comparing_every_row(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(0, 4, shape, generator=generator()).to(dtype)
    found = [members.tolist() for members in exact_duplicates(x)]
    assert found == by_comparing_all(x)
    assert len(found) > 10


def test_rows_without_copies_make_no_groups() -> None:
    assert exact_duplicates(rows()) == []
    assert exact_duplicates(torch.arange(256, dtype=torch.uint8).view(256, 1)) == []


def test_equal_hashes_do_not_make_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "_hash", lambda bits: torch.zeros(len(bits), dtype=torch.int64))
    x = torch.randint(0, 4, (100, 3), generator=generator())
    assert [members.tolist() for members in exact_duplicates(x)] == by_comparing_all(x)


def test_hashes_tell_rows_apart() -> None:
    """Rows that differ in one place, that hold the same values in another order, or that have the same sum."""
    x = torch.cat([torch.eye(64, dtype=torch.int64), 2 * torch.eye(64, dtype=torch.int64)])
    assert len(cleaning._hash(x).unique()) == 128
    shuffled = torch.stack([torch.arange(20)[torch.randperm(20, generator=generator(s))] for s in range(500)])
    assert len(cleaning._hash(shuffled).unique()) == 500


def test_missing_values_and_signed_zeros_are_equal() -> None:
    nan = math.nan
    x = torch.tensor([[nan, 1.0], [0.0, 2.0], [nan, 1.0], [-0.0, 2.0], [1.0, nan]])
    x[2, 0] = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)[0]  # another NaN
    assert [members.tolist() for members in exact_duplicates(x)] == [[0, 2], [1, 3]]


def test_conflicts_are_groups_with_two_labels() -> None:
    groups = [torch.tensor([0, 2]), torch.tensor([1, 3, 4])]
    labels = torch.tensor([5, 1, 5, 1, 2])
    assert [members.tolist() for members in conflicts(groups, labels)] == [[1, 3, 4]]


@pytest.mark.parametrize("block", [7, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_duplicates_are_the_pairs_of_numpys_correlations(block: int, dtype: torch.dtype) -> None:
    x = rows(40, 6, dtype=dtype)
    pairs, similarity = near_duplicates(x, 0.7, block=block)
    correlation = np.corrcoef(x.double().numpy())
    want = {(i, j) for i in range(40) for j in range(i + 1, 40) if correlation[i, j] >= 0.7}
    assert {tuple(pair) for pair in pairs.tolist()} == want
    assert len(pairs) == len(want) > 20
    assert similarity.tolist() == sorted(similarity.tolist(), reverse=True)
    for (i, j), value in zip(pairs.tolist(), similarity.tolist(), strict=True):
        assert value == pytest.approx(correlation[i, j], abs=1e-5 if dtype == torch.float32 else 1e-12)


def test_a_brighter_and_paler_copy_is_a_near_duplicate_and_an_empty_image_is_none() -> None:
    images = torch.randint(0, 200, (30, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    images[20] = images[4] // 2 + 50
    images[21], images[22] = 7, 9
    pairs, similarity = near_duplicates(images, 0.9)
    assert pairs.tolist() == [[4, 20]]
    assert 0.999 < float(similarity[0]) <= 1
    level = (torch.arange(1, 41) / 10)[:, None].repeat(1, 7)  # the mean of seven times 0.1 need not be 0.1
    assert bool((level.mean(1) != level[:, 0]).any())
    assert len(near_duplicates(level, 0.01).rows) == 0


def test_leakage_finds_exact_and_near_copies_in_the_training_part() -> None:
    train, test = rows(50, 8, seed=1), rows(20, 8, seed=2)
    train[7] = 3.0  # without a correlation, but a copy
    test[3], test[5], test[11] = train[41], 2 * train[12] + 1, train[7]
    test[15] = test[16]  # copies within the test part are no leak
    for block in (6, 1024):
        pairs, similarity = leakage(train, test, 0.999, block=block)
        assert pairs.tolist() == [[3, 41], [5, 12], [11, 7]]
        torch.testing.assert_close(similarity, torch.ones(3, dtype=torch.float64))
    level = train.clone()
    level[7] = torch.arange(8)  # its correlation, 0 / 0, is not asked for
    best = np.corrcoef(torch.cat([test[:11], test[12:], level]).numpy())
    best = np.insert(best[:19, 19:], 11, -1, axis=0)
    best[:, 7] = -1
    loose = leakage(train, test, 0.6, block=9)
    close = {i: int(best[i].argmax()) for i in range(20) if best[i].max() >= 0.6} | {11: 7}
    assert dict(loose.rows.tolist()) == close
    assert len(close) > 8


def test_drop_duplicates_keeps_the_first_of_each() -> None:
    x = torch.tensor([[1.0, 0], [2, 0], [1, 0], [3, 0], [2, 0], [1, 0]])
    split = drop_duplicates(split_of(x, torch.tensor([4, 1, 2, 3, 1, 0])))
    assert isinstance(split.inputs, Tensor)
    assert split.inputs[:, 0].tolist() == [1, 2, 3]
    assert split.labels.tolist() == [4, 1, 3]
    assert len(drop_duplicates(split)) == 3
    assert drop_rows(split, torch.tensor([1])).labels.tolist() == [4, 3]
    assert drop_rows(split, torch.tensor([True, False, False])).labels.tolist() == [1, 3]


def test_copies_put_into_real_images_are_found() -> None:
    train = load("digits").train
    before = sum(map(len, exact_duplicates(train.images)))
    twice = train.subset(torch.cat([torch.arange(len(train)), torch.tensor([5, 9])]))
    assert sum(map(len, exact_duplicates(twice.images))) == before + 4
    assert len(drop_duplicates(twice)) == len(drop_duplicates(train))


# --- Gaps -------------------------------------------------------------------------------------------------------------

IMPUTERS: dict[str, tuple[Any, Any]] = {
    "mean": (impute_mean, {"strategy": "mean"}),
    "median": (impute_median, {"strategy": "median"}),
    "constant": (lambda x: impute_constant(x, -7.5), {"strategy": "constant", "fill_value": -7.5}),
}


@pytest.mark.parametrize("name", IMPUTERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_imputers_are_scikit_learns(name: str, dtype: torch.dtype) -> None:
    ours, settings = IMPUTERS[name]
    train, test = with_gaps(rows()).to(dtype), with_gaps(rows(20, seed=1), seed=8).to(dtype)
    train[:, 2] = 1.5 * torch.arange(60, dtype=dtype)  # no gap in training, some in the test part
    assert bool(missing_mask(test)[:, 2].any())
    theirs = SimpleImputer(add_indicator=True, **settings).fit(train.double().numpy())
    filled = ours(train)(test)
    assert filled.dtype == dtype
    assert filled.shape == (20, 9)
    torch.testing.assert_close(
        filled.double(), torch.from_numpy(theirs.transform(test.double().numpy())), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("k", [1, 3, 5, 100])
@pytest.mark.parametrize("block", [4, 1024])
def test_neighbours_fill_gaps_as_scikit_learns_do(k: int, block: int) -> None:
    train, test = with_gaps(rows(50)) + 100, with_gaps(rows(20, seed=1), 0.4, seed=8) + 100
    test[0], test[1, 1:] = math.nan, math.nan  # nothing in common with anybody; one value
    train[:48, 3] = math.nan  # two donors only
    want = KNNImputer(n_neighbors=k).fit(train.numpy()).transform(test.numpy())
    torch.testing.assert_close(
        impute_neighbours(train, k)(test, block=block), torch.from_numpy(want), rtol=1e-9, atol=1e-9
    )


def test_a_row_of_the_training_part_is_filled_by_others() -> None:
    train = with_gaps(rows(50))
    want = KNNImputer(n_neighbors=4).fit_transform(train.numpy())
    torch.testing.assert_close(impute_neighbours(train, 4)(train), torch.from_numpy(want), rtol=1e-9, atol=1e-9)


# --- Outliers ---------------------------------------------------------------------------------------------------------


def wild(dtype: torch.dtype = torch.float64) -> Tensor:
    x = rows(200, 3)
    x[3, 0], x[4, 1], x[5, 2] = 30, -40, 8
    return (x * torch.tensor([1, 5, 0.01]) + 2).to(dtype)


def test_zscore_outliers_are_scipys() -> None:
    x = wild()
    want = np.abs(stats.zscore(x.numpy())) > 2.5
    assert torch.equal(zscore_outliers(x, 2.5), torch.from_numpy(want))
    assert 3 <= want.sum() < 20


def test_iqr_fences_are_tukeys() -> None:
    x = wild()
    first, third = np.quantile(x.numpy(), [0.25, 0.75], axis=0)
    fences = iqr_fences(x, 2)
    np.testing.assert_allclose(fences.low.numpy(), first - 2 * (third - first))
    np.testing.assert_allclose(fences.high.numpy(), third + 2 * (third - first))
    want = (x.numpy() < first - 1.5 * (third - first)) | (x.numpy() > third + 1.5 * (third - first))
    assert torch.equal(iqr_outliers(x), torch.from_numpy(want))
    assert want.sum() >= 3
    normal = torch.randn(200_000, 1, generator=generator(), dtype=torch.float64)
    assert float(iqr_outliers(normal).double().mean()) == pytest.approx(0.00698, abs=0.0006)


def test_mad_outliers_are_those_of_the_modified_z_score() -> None:
    x = wild()
    mad = stats.median_abs_deviation(x.numpy())
    score = 0.6744897501960817 * (x.numpy() - np.median(x.numpy(), axis=0)) / mad
    assert torch.equal(mad_outliers(x), torch.from_numpy(np.abs(score) > 3.5))
    assert torch.equal(mad_outliers(x, 2), torch.from_numpy(np.abs(score) > 2))
    assert bool(mad_outliers(x)[[3, 4, 5], [0, 1, 2]].all())


def test_outliers_hide_each_other_from_the_z_score_and_not_from_the_mad() -> None:
    x = torch.cat([rows(80, 1), torch.full((20, 1), 50.0, dtype=torch.float64)])
    assert not bool(zscore_outliers(x).any())
    assert mad_outliers(x)[80:].all()
    ten = torch.tensor([[0.0]] * 9 + [[1e6]])
    assert not bool(zscore_outliers(ten).any())
    assert bool(zscore_outliers(ten, 2.99)[9])


@pytest.mark.parametrize("fences", [zscore_fences, iqr_fences, mad_fences, quantile_fences])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_columns_and_gaps_are_no_outliers(fences: Any, dtype: torch.dtype) -> None:
    x = wild(dtype)
    x[:, 1] = 0.1
    x[7, 0] = math.nan
    mask = outliers(x, fences(x))
    assert not bool(mask[:, 1].any())
    assert not bool(mask[7, 0])
    assert bool(mask[3, 0])
    clipped = winsorise(x, fences(x))
    assert clipped.dtype == dtype
    assert torch.equal(clipped[:, 1], x[:, 1])
    assert bool(clipped[7, 0].isnan())
    assert torch.equal(clipped[~mask].nan_to_num(), x[~mask].nan_to_num())


def test_the_rounding_of_a_mean_puts_nothing_outside() -> None:
    level = (torch.arange(1, 41, dtype=torch.float64) / 10).repeat(83, 1)
    assert bool((level.mean(0) != level[0]).any())
    assert not bool(zscore_outliers(level, 0.5).any())


def test_fences_of_training_rows_judge_others() -> None:
    train, test = wild(), torch.tensor([[100.0, 2, 2], [2, 2, -100]], dtype=torch.float64)
    fences = quantile_fences(train, 0.1, 0.8)
    low, high = np.quantile(train.numpy(), [0.1, 0.8], axis=0)
    assert outliers(test, fences).tolist() == [[True, False, False], [False, False, True]]
    np.testing.assert_allclose(winsorise(test, fences).numpy(), np.clip(test.numpy(), low, high))
    assert float(outliers(train, fences).double().mean()) == pytest.approx(0.3, abs=0.01)


def test_mahalanobis_is_scikit_learns() -> None:
    train, test = wild() @ rows(3, 3, seed=4), rows(20, 3, seed=5)
    theirs = EmpiricalCovariance().fit(train.numpy())
    found = mahalanobis(test, train)
    torch.testing.assert_close(found, torch.from_numpy(theirs.mahalanobis(test.numpy())), rtol=1e-7, atol=1e-7)
    doubled = mahalanobis(torch.cat([test, test], 1), torch.cat([train, train], 1))
    torch.testing.assert_close(doubled, found, rtol=1e-8, atol=1e-8)


def test_mahalanobis_sees_a_row_whose_values_are_all_usual() -> None:
    x = torch.randn(500, 1, generator=generator(), dtype=torch.float64)
    x = torch.cat([x, x + 0.1 * torch.randn(500, 1, generator=generator(1), dtype=torch.float64)], 1)
    x[0] = torch.tensor([1.0, -1.0])
    assert not bool(zscore_outliers(x)[0].any())
    found = mahalanobis_outliers(x)
    assert bool(found[0])
    assert int(found.sum()) < 6
    squared = EmpiricalCovariance().fit(x.numpy()).mahalanobis(x.numpy())
    assert torch.equal(mahalanobis_outliers(x, 0.05), torch.from_numpy(squared > stats.chi2.ppf(0.95, 2)))
    copied = torch.cat([x, x[:, :1]], 1)  # no third degree of freedom
    assert torch.equal(mahalanobis_outliers(copied, 0.05), mahalanobis_outliers(x, 0.05))
    assert not bool(mahalanobis_outliers(torch.ones(5, 2)).any())


# --- Settings, bad input, devices -------------------------------------------------------------------------------------


def test_what_is_fitted_can_be_pickled_and_fingerprinted() -> None:
    x = with_gaps(rows())
    for made in (impute_mean(x), impute_neighbours(x), mad_fences(x)):
        assert fingerprint(pickle.loads(pickle.dumps(made))) == fingerprint(made)
    assert fingerprint(impute_mean(x)) != fingerprint(impute_median(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: exact_duplicates(x[0]), r"inputs is torch.float64 \[5\]: must be rows"),
        (lambda x: near_duplicates(x, 0), r"threshold=0: must be a number above 0 and at most 1"),
        (lambda x: near_duplicates(x, 1.5), r"threshold=1.5"),
        (lambda x: near_duplicates(x, 0.5, block=0), r"block=0"),
        (lambda x: near_duplicates(with_gaps(x)), r"x is torch.float64, or holds NaN"),
        (lambda x: leakage(x, x[:, :3]), r"test is torch.float64 \[60, 3\]: its rows must be like those of train"),
        (lambda x: leakage(x, x.float()), r"test is torch.float32"),
        (lambda x: drop_duplicates(load("digits", train_size=64).with_inputs(lambda i: (i, i)).train), r"in 2 parts"),
        (lambda x: impute_mean(x.masked_fill(torch.arange(5) == 2, math.nan)), r"train has no value in column 2"),
        (lambda x: impute_neighbours(x, 0), r"k=0"),
        (lambda x: impute_constant(x, math.nan), r"value=nan"),
        (lambda x: impute_mean(x)(x[:, :3]), r"x is torch.float64 \[60, 3\]: must be floating point \[N, 5\]"),
        (lambda x: zscore_fences(x, 0), r"threshold=0"),
        (lambda x: iqr_fences(x, -1), r"k=-1"),
        (lambda x: mad_fences(x, math.inf), r"threshold=inf"),
        (lambda x: quantile_fences(x, 0.9, 0.1), r"low=0.9, high=0.1"),
        (lambda x: mahalanobis(with_gaps(x), x), r"x holds NaN"),
        (lambda x: mahalanobis_outliers(x, 0), r"share=0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(rows())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cleaning_agrees_on_a_gpu(dtype: torch.dtype) -> None:
    x = wild(dtype)
    x[50] = x[60]
    there = x.cuda()
    assert [members.tolist() for members in exact_duplicates(there)] == [[50, 60]]
    pairs, similarity = near_duplicates(there, 0.99)
    # in float32 other rows of three numbers are as near to 1: [50, 60] is one of the first, not the first
    assert [50, 60] in pairs[similarity >= 1 - 4 * torch.finfo(dtype).eps].tolist()
    torch.testing.assert_close(similarity.cpu(), near_duplicates(x, 0.99).similarity, rtol=0, atol=1e-6)
    assert leakage(there[:55], there[55:], 0.9999).rows.tolist()[:1]
    for fences in (zscore_fences, iqr_fences, mad_fences, quantile_fences):
        assert torch.equal(outliers(there, fences(there)).cpu(), outliers(x, fences(x)))
    holes = with_gaps(x)
    for impute in (impute_mean, impute_median, impute_constant, impute_neighbours):
        filled = impute(holes.cuda())(holes.cuda())
        assert filled.is_cuda
        torch.testing.assert_close(filled.cpu(), impute(holes)(holes), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mahalanobis(there, there).cpu(), mahalanobis(x, x), rtol=1e-4, atol=1e-4)
