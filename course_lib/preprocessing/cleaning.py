"""Cleaning: copies, gaps and outliers, found in whole batches; what is fitted is fitted on training rows.

========================  ======================================================  =====================================
name                      what it finds or does                                   source
========================  ======================================================  =====================================
``exact_duplicates``      rows that are equal, in groups
``near_duplicates``       pairs of rows with a high correlation                   Barz & Denzler 2020, arXiv:1902.00423,
``leakage``               test rows with a copy in the training part              search in features of a network; here
                                                                                  in whatever is given
``conflicts``             groups of copies whose labels differ
``drop_duplicates``       a split without its copies; ``drop_rows`` without any
``missing_mask``          where values are missing (NaN)
``impute_mean`` and       fill gaps with a number a column, and say where they    scikit-learn, ``SimpleImputer``
``_median, _constant``    were
``impute_neighbours``     fill gaps with the mean of the nearest rows             Troyanskaya et al., Bioinformatics 17,
                                                                                  2001
``zscore_fences``         mean ± 3 standard deviations
``iqr_fences``            quartiles ± 1.5 interquartile ranges                    Tukey, Exploratory Data Analysis, 1977
``mad_fences``            median ± 3.5 robust deviations                          Iglewicz & Hoaglin, 1993
``quantile_fences``       two quantiles
``mahalanobis``           distance of a whole row, in deviations along each axis  scikit-learn, ``EmpiricalCovariance``
========================  ======================================================  =====================================

``outliers`` says what lies outside of fences, ``winsorise`` moves it onto them; ``zscore_outliers``, ``iqr_outliers``,
``mad_outliers`` and ``mahalanobis_outliers`` do it for rows by their own figures. Rows are floating point ``[N, D]``;
copies are also looked for among images, uint8 or floating point ``[N, C, H, W]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split
from course_lib.preprocessing.scaling import (
    as_numbers,
    check_quantiles,
    checked_rows,
    column_figures,
    column_range,
    quantile,
)

# --- Copies -----------------------------------------------------------------------------------------------------------


def exact_duplicates(inputs: Tensor) -> list[Tensor]:
    """Return groups of equal rows of ``[N, ...]``: the indices of each group in rising order, groups by their first.

    Each row gets a number that equal rows share, the numbers are sorted, and only rows whose number occurs twice are
    compared: N log N steps. NaN equals NaN here, and -0.0 equals 0.0.

    Raises
    ------
    ValueError : ``inputs`` is no tensor of rows.
    """
    rows = _flat("inputs", inputs)
    bits = _bits(rows)
    _, which, count = _hash(bits).unique(return_inverse=True, return_counts=True)
    suspects = (count[which] > 1).nonzero()[:, 0]
    if not len(suspects):
        return []
    _, group = bits[suspects].unique(dim=0, return_inverse=True)
    order = group.argsort(stable=True)
    sizes = group.bincount().tolist()
    groups = [members for members in suspects[order].split(sizes) if len(members) > 1]
    return sorted(groups, key=lambda members: int(members[0]))


def conflicts(groups: Iterable[Tensor], labels: Tensor) -> list[Tensor]:
    """Return those groups of copies whose labels ``[N]`` differ: at least one of each is wrong."""
    named = ((members, labels[members.to(labels.device)]) for members in groups)
    return [members for members, own in named if bool((own != own[0]).any())]


class Pairs(NamedTuple):
    """Rows that resemble each other: ``rows`` int64 ``[P, 2]`` and their ``similarity`` ``[P]``, from -1 to 1."""

    rows: Tensor
    similarity: Tensor


def near_duplicates(x: Tensor, threshold: float = 0.95, *, block: int = 1024) -> Pairs:
    """Return all pairs of rows (i < j) of ``[N, ...]`` whose correlation is at least ``threshold``, highest first.

    The correlation of two rows is the cosine of the angle between them once each has lost its mean: brightness and
    contrast of an image do not count. A row of equal values has none: ``exact_duplicates`` finds its copies. Give
    features of a trained network instead of pixels to find copies that were cut or moved.

    Parameters
    ----------
    threshold : above 0, at most 1. Rounding may leave a copy at 0.9999999: take 0.9999 rather than 1.
    block : rows compared at once. N squared comparisons are made, but never more than block squared are held.

    Raises
    ------
    ValueError : ``threshold`` is no number above 0 and at most 1, ``block`` below 1, or ``x`` not complete rows.
    """
    _check_threshold(threshold)
    at_least(1, block=block)
    unit = _directions("x", x)
    found, similarity = [], []
    for i, left in _blocks(unit, block):
        for j, right in _blocks(unit, block):
            if j < i:
                continue
            close = left @ right.T
            mask = close >= threshold
            if i == j:
                mask = mask.triu(1)
            places = mask.nonzero()
            found.append(places + torch.tensor([i, j], device=places.device))
            similarity.append(close[mask])
    rows, values = torch.cat(found), torch.cat(similarity).clamp(max=1)
    order = values.argsort(descending=True, stable=True)
    return Pairs(rows[order], values[order])


def leakage(train: Tensor, test: Tensor, threshold: float = 0.95, *, block: int = 1024) -> Pairs:
    """Return the test rows that have a copy in ``train``, each with the training row most like it: (test, train).

    A copy is an equal row (similarity 1), or one whose correlation is at least ``threshold`` (``near_duplicates``).
    What a network scores on such rows says nothing of others.

    Raises
    ------
    ValueError : as ``near_duplicates``; or the rows of ``train`` and ``test`` have not the same shape and type.
    """
    _check_threshold(threshold)
    at_least(1, block=block)
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise ValueError(
            f"test is {test.dtype} {list(test.shape)}: its rows must be like those of train, {train.dtype} "
            f"{list(train.shape)}"
        )
    known, asked = _directions("train", train), _directions("test", test)
    best = torch.full((len(test),), -torch.inf, dtype=asked.dtype, device=asked.device)
    where = torch.zeros(len(test), dtype=torch.int64, device=asked.device)
    for i, left in _blocks(asked, block):
        rows = slice(i, i + len(left))
        for j, right in _blocks(known, block):
            value, place = (left @ right.T).max(1)
            better = value > best[rows]
            best[rows] = torch.where(better, value, best[rows])
            where[rows] = torch.where(better, place + j, where[rows])
    for members in exact_duplicates(torch.cat([train, test])):
        first, copies = members[0], members[members >= len(train)] - len(train)
        if first < len(train):
            best[copies], where[copies] = 1.0, first
    copied = (best >= threshold).nonzero()[:, 0]
    return Pairs(torch.stack([copied, where[copied]], 1), best[copied].clamp(max=1))


def drop_rows(split: Split, rows: Tensor) -> Split:
    """Return the split without the examples at ``rows`` (int64, or bool ``[N]``), the others in their order."""
    keep = torch.ones(len(split), dtype=torch.bool, device=split.device)
    keep[rows.to(split.device)] = False
    return split.subset(keep)


def drop_duplicates(split: Split) -> Split:
    """Return the split with the first of each group of equal inputs only, whatever the labels (see ``conflicts``).

    Raises
    ------
    ValueError : the inputs come in parts.
    """
    if isinstance(split.inputs, tuple):
        raise ValueError(f"split has inputs in {len(split.inputs)} parts: must be one tensor")
    copies = [members[1:] for members in exact_duplicates(split.inputs)]
    return drop_rows(split, torch.cat(copies)) if copies else split


def _flat(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.numel() or x.is_complex():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {got}: must be rows of numbers or images, [N, ...]")
    return x.flatten(1)


def _bits(rows: Tensor) -> Tensor:
    """Integers that are equal where the values are."""
    if not rows.is_floating_point():
        return rows
    same = (rows + 0.0).masked_fill(rows.isnan(), torch.nan)  # -0.0 + 0.0 is 0.0, and there are many kinds of NaN
    return same.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])


def _hash(bits: Tensor, block: int = 4096) -> Tensor:
    """A number int64 ``[N]`` for each row: a sum of its entries times odd numbers, modulo 2 to the 64."""
    fixed = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (bits.shape[1],), generator=fixed).mul_(2).add_(1).to(bits.device)
    return torch.cat([(rows.long() * factors).sum(1) for rows in bits.split(block)])


def _directions(name: str, x: Tensor) -> Tensor:
    """Rows without their mean, of length 1; rows of equal values become 0."""
    rows = as_numbers(_flat(name, x))
    if not rows.is_floating_point() or bool((~rows.isfinite()).any()):
        raise ValueError(f"{name} is {x.dtype}, or holds NaN or infinite values: must be complete numbers or uint8")
    rows = rows.to(torch.float32) if rows.element_size() < 4 else rows
    level = (rows == rows[:, :1]).all(1, keepdim=True)
    centred = rows - rows.mean(1, keepdim=True)
    return (centred / centred.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)).masked_fill(level, 0)


def _blocks(rows: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size]


def _check_threshold(threshold: float) -> None:
    require("threshold", threshold, lambda t: is_number(t) and 0 < t <= 1, "a number above 0 and at most 1")


# --- Gaps -------------------------------------------------------------------------------------------------------------


def missing_mask(x: Tensor) -> Tensor:
    """Return where values of ``[N, D]`` are missing, which is where they are NaN."""
    return x.isnan()


@dataclass(frozen=True, eq=False)
class Imputer:
    """Fills gaps; made by ``impute_mean``, ``impute_median`` and ``impute_constant``.

    Attributes
    ----------
    values : what stands in for a missing value of each column, ``[D]``.
    indicated : the columns ``[I]`` with gaps in the training part. A column of 0 and 1 for each is appended, because
        that a value is missing may say more than the value.
    """

    values: Tensor
    indicated: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Fill ``[N, D] -> [N, D + I]``. Gaps in columns that had none in training are filled without a mark."""
        _check_columns(x, len(self.values))
        gaps = missing_mask(x)
        filled = torch.where(gaps, self.values.to(x), x)
        return torch.cat([filled, gaps[:, self.indicated.to(x.device)].to(x.dtype)], 1)


def impute_mean(train: Tensor) -> Imputer:
    """Fill with the mean of the training values of the column. As scikit-learn's ``SimpleImputer(add_indicator=True)``.

    Raises
    ------
    ValueError : a column of ``train`` has no value at all (scikit-learn drops it).
    """
    return _imputer(train, _with_values("train", train).nanmean(0))


def impute_median(train: Tensor) -> Imputer:
    """Fill with the median of the training values of the column, which wild values do not move.

    Raises
    ------
    ValueError : a column of ``train`` has no value at all.
    """
    return _imputer(train, quantile(_with_values("train", train), 0.5))


def impute_constant(train: Tensor, value: float = 0.0) -> Imputer:
    """Fill every gap with ``value``; what is learnt from ``train`` is where gaps are to be marked."""
    require("value", value, is_number, "a finite number")
    return _imputer(train, torch.full_like(checked_rows("train", train)[0], value))


def _imputer(train: Tensor, values: Tensor) -> Imputer:
    return Imputer(values, missing_mask(train).any(0).nonzero()[:, 0])


@dataclass(frozen=True, eq=False)
class NeighbourImputer:
    """Fills gaps from the nearest training rows; made by ``impute_neighbours``."""

    train: Tensor
    k: int

    def __call__(self, x: Tensor, *, block: int = 1024) -> Tensor:
        """Fill ``[N, D] -> [N, D]``, ``block`` rows at a time."""
        _check_columns(x, self.train.shape[1])
        at_least(1, block=block)
        wide = checked_rows("x", x)
        return torch.cat([self._filled(rows) for _, rows in _blocks(wide, block)]).to(x.dtype)

    def _filled(self, x: Tensor) -> Tensor:
        train, gaps = self.train.to(x), missing_mask(x)
        away = _distances(x, train)
        filled = x.clone()
        for column in gaps.any(0).nonzero()[:, 0].tolist():
            asking = gaps[:, column]
            donors = ~missing_mask(train)[:, column]
            values = train[donors, column]
            near, place = away[asking][:, donors].topk(min(self.k, len(values)), largest=False)
            usable = near.isfinite()
            mean = (values[place] * usable).sum(1) / usable.sum(1)
            filled[asking, column] = torch.where(usable.any(1), mean, values.mean())
        return filled


def impute_neighbours(train: Tensor, k: int = 5) -> NeighbourImputer:
    r"""Fill a gap with the mean of that column over the ``k`` nearest training rows that have a value there.

    The distance of two rows counts the columns that both have, scaled up as if they had all D of them:
    :math:`d^2 = \frac{D}{m}\sum (x - y)^2` over m common columns. Where no row has a column in common, the column's
    mean is taken. As scikit-learn's ``KNNImputer``. Columns count by their size: ``standardise`` first, gaps and all.
    Source: Troyanskaya et al., Bioinformatics 17, 2001 (there nearer rows weigh more).

    Raises
    ------
    ValueError : ``k`` below 1, or a column of ``train`` has no value at all.
    """
    at_least(1, k=k)
    return NeighbourImputer(_with_values("train", train), k)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances ``[N, M]`` over common columns, infinite where there are none."""
    centre = y.nanmean(0)  # so that the squares below are of the size of the differences
    x, y = x - centre, y - centre
    has_x, has_y = (~x.isnan()).to(x.dtype), (~y.isnan()).to(x.dtype)
    x, y = x.nan_to_num(0), y.nan_to_num(0)
    common = has_x @ has_y.T
    squares = x.square() @ has_y.T - 2 * x @ y.T + has_x @ y.square().T
    return torch.where(common > 0, squares.clamp(min=0) * x.shape[1] / common, torch.inf)


def _with_values(name: str, x: Tensor) -> Tensor:
    wide = checked_rows(name, x)
    if empty := wide.isnan().all(0).nonzero()[:, 0].tolist():
        raise ValueError(
            f"{name} has no value in column {empty[0]}: must have at least one in each (or drop the column)"
        )
    return wide


def _check_columns(x: Tensor, columns: int) -> None:
    if x.ndim != 2 or x.shape[1] != columns or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: must be floating point [N, {columns}]")


# --- Outliers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fences:
    """The range of each column, ``low`` and ``high`` ``[D]``, outside of which a value is an outlier."""

    low: Tensor
    high: Tensor


def zscore_fences(train: Tensor, threshold: float = 3.0) -> Fences:
    r"""Mean ± ``threshold`` standard deviations (divided by N) of each column.

    Outliers hide each other, because they widen the deviation: among n values none is more than
    :math:`\sqrt{n - 1}` deviations from the mean, so that 3 finds nothing at all among ten.
    """
    _check_width("threshold", threshold)
    x = checked_rows("train", train)
    mean, std, constant = column_figures(x)
    least, most = column_range(x)
    # The mean of equal values may be off by a rounding, which would put them all outside.
    low, high = mean - threshold * std, mean + threshold * std
    return Fences(torch.where(constant, least, low), torch.where(constant, most, high))


def iqr_fences(train: Tensor, k: float = 1.5) -> Fences:
    """Tukey's fences: from ``k`` interquartile ranges below the first quartile to as many above the third.

    In normal numbers 0.7% lie outside of them. Source: Tukey, Exploratory Data Analysis, 1977.
    """
    _check_width("k", k)
    x = checked_rows("train", train)
    first, third = quantile(x, 0.25), quantile(x, 0.75)
    return Fences(first - k * (third - first), third + k * (third - first))


def mad_fences(train: Tensor, threshold: float = 3.5) -> Fences:
    r"""Median ± ``threshold`` robust deviations: MAD / 0.6745, with the median absolute deviation from the median.

    In normal numbers the MAD is 0.6745 standard deviations; it stays where it is until half of the values are wild. A
    column of which more than half is one value has a MAD of 0: everything else lies outside.
    Source: Iglewicz & Hoaglin, How to Detect and Handle Outliers, 1993.
    """
    _check_width("threshold", threshold)
    x = checked_rows("train", train)
    median = quantile(x, 0.5)
    width = threshold * quantile((x - median).abs(), 0.5) / stats.norm.ppf(0.75)
    return Fences(median - width, median + width)


def quantile_fences(train: Tensor, low: float = 0.05, high: float = 0.95) -> Fences:
    """Two quantiles of each column: those of winsorising, which always calls the same share of values outliers."""
    check_quantiles(low, high)
    x = checked_rows("train", train)
    return Fences(quantile(x, low), quantile(x, high))


def outliers(x: Tensor, fences: Fences) -> Tensor:
    """Return where values of ``[N, D]`` lie outside of the fences, as a mask of that shape; NaN does not."""
    _check_columns(x, len(fences.low))
    wide = checked_rows("x", x)
    return (wide < fences.low.to(wide)) | (wide > fences.high.to(wide))


def winsorise(x: Tensor, fences: Fences) -> Tensor:
    """Move values of ``[N, D]`` that lie outside of the fences onto them; NaN stays."""
    _check_columns(x, len(fences.low))
    wide = checked_rows("x", x)
    return wide.clamp(fences.low.to(wide), fences.high.to(wide)).to(x.dtype)


def zscore_outliers(x: Tensor, threshold: float = 3.0) -> Tensor:
    """Return which values ``[N, D]`` lie outside of ``zscore_fences`` of the same rows."""
    return outliers(x, zscore_fences(x, threshold))


def iqr_outliers(x: Tensor, k: float = 1.5) -> Tensor:
    """Return which values ``[N, D]`` lie outside of ``iqr_fences`` of the same rows."""
    return outliers(x, iqr_fences(x, k))


def mad_outliers(x: Tensor, threshold: float = 3.5) -> Tensor:
    """Return which values ``[N, D]`` lie outside of ``mad_fences`` of the same rows."""
    return outliers(x, mad_fences(x, threshold))


def mahalanobis(x: Tensor, train: Tensor) -> Tensor:
    r"""Return the squared distances ``[N]`` of rows to the middle of the training rows, in their own deviations.

    .. math:: d^2 = (x - \mu)^\top \Sigma^{+} (x - \mu)

    with the covariance :math:`\Sigma` divided by N and its pseudo-inverse, as in scikit-learn's
    ``EmpiricalCovariance``. A row may be far away though each of its values is usual: tall, and light.

    Raises
    ------
    ValueError : NaN in the rows, or other columns in ``x`` than in ``train``.
    """
    _check_columns(x, train.shape[-1])
    return _mahalanobis(checked_rows("x", x, complete=True), checked_rows("train", train, complete=True))[0].to(x.dtype)


def mahalanobis_outliers(x: Tensor, share: float = 0.001) -> Tensor:
    """Return which rows ``[N]`` are further from the middle than all but ``share`` of normal rows would be.

    Squared distances of normal rows follow a chi-squared distribution with as many degrees of freedom as there are
    directions with variance; its quantile is the fence.

    Raises
    ------
    ValueError : ``share`` is no number strictly between 0 and 1, or NaN in the rows.
    """
    require("share", share, lambda p: is_number(p) and 0 < p < 1, "a number strictly between 0 and 1")
    wide = checked_rows("x", x, complete=True)
    squared, rank = _mahalanobis(wide, wide)
    return squared > float(stats.chi2.isf(share, rank)) if rank else torch.zeros_like(squared, dtype=torch.bool)


def _mahalanobis(x: Tensor, train: Tensor) -> tuple[Tensor, int]:
    """Squared distances ``[N]``, and in how many directions the training rows differ."""
    mean = train.mean(0)
    centred = train - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(train))
    real = variances > variances[-1] * max(train.shape) * torch.finfo(train.dtype).eps
    along = (x - mean) @ axes[:, real]
    return (along.square() / variances[real]).sum(1), int(real.sum())


def _check_width(name: str, value: float) -> None:
    require(name, value, lambda width: is_number(width) and width > 0, "a number above 0")
