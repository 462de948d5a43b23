"""Scaling: fitted on training rows, then applied to any. Each method is ``train -> Affine``; call that on rows.

=====================  ==============================================  ================================================
name                   what the training rows have afterwards          source
=====================  ==============================================  ================================================
``standardise``        mean 0 and standard deviation 1 in each column  LeCun et al., Efficient BackProp, 1998
``min_max``            each column from 0 to 1                         scikit-learn, ``MinMaxScaler``
``robust``             median 0 and interquartile range 1              scikit-learn, ``RobustScaler``
``pca_whitening``      uncorrelated columns of variance 1, fewer or    Kessy, Lewin & Strimmer 2018, arXiv:1512.00809
                       as many as before
``zca_whitening``      the same, and as near to the rows before as     Kessy, Lewin & Strimmer 2018, arXiv:1512.00809
                       can be
``per_channel``        mean 0 and deviation 1 in each channel of
                       images
``identity``           what they had: the baseline
=====================  ==============================================  ================================================

``per_image`` needs no fitting: it takes each image's own mean and contrast out (Coates, Lee & Ng, AISTATS 2011).
``scaled`` puts a method on the splits of a data set. ``condition_number`` is what gradient descent gains from it all.

    scaler = standardise(train)
    model(scaler(test))
    scaler.inverse(scaler(test))  # test again

Figures are computed in float64, whatever the rows are; results have the rows' type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset, Split


@dataclass(frozen=True, eq=False)
class Affine:
    r"""A fitted scaler: :math:`z = (x - o)\,F`, and back by :math:`x = z\,B + o`.

    Attributes
    ----------
    offset : o, ``[D]``; for images ``[C, 1, 1]``.
    forward : F, a matrix ``[D, K]``; or a number for each column or channel, in the shape of ``offset``.
    backward : B, ``[K, D]``; or again a number for each.
    """

    offset: Tensor
    forward: Tensor
    backward: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Scale rows ``[N, D] -> [N, K]`` (images ``[N, C, H, W]``); NaN stays NaN, uint8 counts as pixels in [0, 1].

        Raises
        ------
        ValueError : ``x`` has other columns than the rows that the scaler was fitted on.
        """
        self._check("x", x, len(self.offset))
        x = as_numbers(x)
        wide = _wide(x)
        # In the wide type: a column with a large mean and a small spread would lose its digits in float32.
        return _times(wide - self.offset.to(wide), self.forward.to(wide)).to(x.dtype)

    def inverse(self, z: Tensor) -> Tensor:
        """Return the rows that ``z`` was scaled from: exactly, but for directions that the scaler has dropped."""
        self._check("z", z, len(self.backward))
        wide = _wide(z)
        return (_times(wide, self.backward.to(wide)) + self.offset.to(wide)).to(z.dtype)

    def _check(self, name: str, x: Tensor, columns: int) -> None:
        shape, dimensions = (f"[N, {columns}]", 2) if self.offset.ndim == 1 else (f"[N, {columns}, H, W]", 4)
        kind = x.is_floating_point() or x.dtype == torch.uint8
        if not kind or x.ndim != dimensions or x.shape[1] != columns:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: must be floating point or uint8 {shape}")


Fit = Callable[[Tensor], Affine]
"""``train -> Affine``; give other settings with ``functools.partial``."""


def _times(x: Tensor, factor: Tensor) -> Tensor:
    return x @ factor if factor.ndim == 2 else x * factor


# --- One column at a time ---------------------------------------------------------------------------------------------


def identity(train: Tensor) -> Affine:
    """Leave the rows ``[N, D]`` as they are: the baseline of every comparison."""
    ones = torch.ones_like(checked_rows("train", train)[0])
    return Affine(torch.zeros_like(ones), ones, ones)


def standardise(train: Tensor) -> Affine:
    r"""Take out each column's mean and divide by its standard deviation: :math:`z = (x - \mu)/\sigma`.

    :math:`\sigma` is that of the N rows themselves (divided by N, not N - 1). A constant column is only centred. NaN
    is left out of the figures. All as in scikit-learn's ``StandardScaler``.
    """
    mean, std, constant = column_figures(checked_rows("train", train))
    return _scale(mean, std.masked_fill(constant, 1))


def min_max(train: Tensor, *, low: float = 0.0, high: float = 1.0) -> Affine:
    r"""Map each column's smallest value to ``low`` and its largest to ``high``. Rows seen later may lie outside.

    A constant column (a range below ten times the machine epsilon of its type) is mapped to ``low``. NaN is left out
    of the figures. All as in scikit-learn's ``MinMaxScaler``. One wild value squeezes all others together.

    Raises
    ------
    ValueError : not ``low < high``.
    """
    if not (is_number(low) and is_number(high) and low < high):
        raise ValueError(f"low={low!r}, high={high!r}: must be numbers with low < high")
    x = checked_rows("train", train)
    least, most = column_range(x)
    span = _without_zeros(most - least, train)
    return _scale(least - low * span / (high - low), span / (high - low))


def robust(train: Tensor, *, low: float = 0.25, high: float = 0.75) -> Affine:
    """Take out each column's median and divide by the distance between two of its quantiles, the quartiles by default.

    Neither moves when a few values are wild. A column whose quantiles are equal is only centred. NaN is left out of
    the figures. All as in scikit-learn's ``RobustScaler``.

    Raises
    ------
    ValueError : not ``0 <= low < high <= 1``.
    """
    check_quantiles(low, high)
    x = checked_rows("train", train)
    return _scale(quantile(x, 0.5), _without_zeros(quantile(x, high) - quantile(x, low), train))


def _scale(offset: Tensor, divisor: Tensor) -> Affine:
    return Affine(offset, 1 / divisor, divisor)


def _without_zeros(span: Tensor, train: Tensor) -> Tensor:
    return span.masked_fill(span < 10 * torch.finfo(train.dtype).eps, 1)


# --- All columns together ---------------------------------------------------------------------------------------------


def pca_whitening(train: Tensor, *, keep: int | None = None, eps: float = 0.0) -> Affine:
    r"""Rotate the rows to their principal axes and give each variance 1: :math:`F = U(\Lambda + \epsilon)^{-1/2}`.

    :math:`U\Lambda U^\top` is the covariance (divided by N - 1), its axes in order of falling variance, each with its
    largest entry positive, as in scikit-learn's ``PCA(whiten=True)``. There ``eps`` is 0; above 0 it keeps axes of
    little variance, which hold mostly noise, from being blown up. Axes without any variance are dropped, where
    scikit-learn divides rounding errors by the machine epsilon.

    Parameters
    ----------
    keep : how many axes; by default all that have variance.

    Raises
    ------
    ValueError : ``keep`` is no whole number from 1 to the number of axes with variance, ``eps`` negative, NaN in the
        rows, or fewer than two rows.
    """
    mean, variances, axes = _principal_axes(train, eps)
    rank = len(variances)
    if keep is not None:
        at_least(1, keep=keep)
        require("keep", keep, lambda k: k <= rank, f"at most {rank}, the number of directions with variance")
    root = (variances + eps).sqrt()[:keep]
    axes = axes[:, :keep]
    return Affine(mean, axes / root, (axes * root).T)


def zca_whitening(train: Tensor, *, eps: float = 0.0) -> Affine:
    r"""Whiten and rotate back: :math:`F = U(\Lambda + \epsilon)^{-1/2}U^\top`, the symmetric root of the covariance.

    Of all whitenings it moves the rows least, so that whitened images still look like images. The covariance is
    divided by N - 1. Directions without variance are mapped to 0 (a pseudo-inverse). For ``eps`` see
    ``pca_whitening``; with pixels in [0, 1] values from 0.001 to 0.1 are usual.

    Raises
    ------
    ValueError : ``eps`` negative, NaN in the rows, or fewer than two rows.
    """
    mean, variances, axes = _principal_axes(train, eps)
    root = (variances + eps).sqrt()
    return Affine(mean, (axes / root) @ axes.T, (axes * root) @ axes.T)


def _principal_axes(train: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[D]``, variances ``[R]`` in falling order and their axes ``[D, R]``: those with variance."""
    require("eps", eps, lambda value: is_number(value) and value >= 0, "a number of at least 0")
    x = checked_rows("train", train, complete=True, least=2)
    mean = x.mean(0)
    centred = x - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    variances, axes = variances.flip(0), axes.flip(1)
    # The rounding of eigh itself: below it a variance cannot be told from none.
    real = variances > variances[0] * max(x.shape) * torch.finfo(x.dtype).eps
    if not bool(real.any()):
        raise ValueError("train holds only equal rows: whitening needs at least one direction with variance")
    variances, axes = variances[real], axes[:, real]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return mean, variances, axes * largest.sign()


# --- Images -----------------------------------------------------------------------------------------------------------


def per_channel(train: Tensor) -> Affine:
    """Take out the mean of each channel of images ``[N, C, H, W]`` and divide by its deviation.

    That is what ``course_lib.lab.data.normalise`` does to every image of the laboratory. uint8 counts as pixels in
    [0, 1]. A constant channel is only centred.
    """
    x = _images("train", train)
    mean, std, constant = column_figures(_wide(x).transpose(0, 1).flatten(1).T)  # [N, C, H, W] -> [N H W, C]
    scale = std.masked_fill(constant, 1)[:, None, None]
    return Affine(mean[:, None, None], 1 / scale, scale)


def per_image(x: Tensor, *, eps: float = 1e-8) -> Tensor:
    r"""Global contrast normalisation: each image minus its own mean, divided by :math:`\sqrt{\sigma^2 + \epsilon}`.

    Brightness and contrast, which say little of what is seen, are gone. ``[N, C, H, W]`` in and out; uint8 becomes
    float32 with pixels in [0, 1] first. Nothing is fitted, so nothing leaks. ``eps`` keeps an image without contrast
    from becoming noise. For a data set: ``data.with_inputs(per_image)``. Source: Coates, Lee & Ng, AISTATS 2011.

    Raises
    ------
    ValueError : ``x`` is not ``[N, C, H, W]``, or ``eps`` not positive.
    """
    require("eps", eps, lambda value: is_number(value) and value > 0, "a number above 0")
    x = _images("x", x)
    wide = _wide(x)
    centred = wide - wide.mean((1, 2, 3), keepdim=True)
    return (centred / (centred.square().mean((1, 2, 3), keepdim=True) + eps).sqrt()).to(x.dtype)


def _images(name: str, x: Tensor) -> Tensor:
    if x.ndim != 4 or not x.numel() or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}: must be images, uint8 or floating point [N, C, H, W]")
    return as_numbers(x)


# --- What it is for ---------------------------------------------------------------------------------------------------


def condition_number(x: Tensor) -> float:
    r"""Return :math:`\kappa = \lambda_{\max}/\lambda_{\min}` of :math:`X^\top X/N`, the Hessian of least squares.

    The number of steps that gradient descent needs grows in proportion to it. There is no column of ones for a bias:
    append one to see it with (``torch.cat([x, torch.ones_like(x[:, :1])], 1)``). Infinite where columns depend on each
    other. Source: LeCun, Kanter & Solla, Physical Review Letters 66, 1991.

    Raises
    ------
    ValueError : ``x`` is not floating point ``[N, D]``, or holds NaN.
    """
    wide = checked_rows("x", x, complete=True)
    if wide.shape[0] < wide.shape[1]:
        return math.inf
    # Of the triangular factor: squaring first would lose half of the digits.
    roots = torch.linalg.svdvals(torch.linalg.qr(wide, mode="r").R)
    if bool(roots[-1] <= roots[0] * max(wide.shape) * torch.finfo(wide.dtype).eps):
        return math.inf
    return float((roots[0] / roots[-1]).square())


def scaled(data: Dataset, fit: Fit = standardise) -> Dataset:
    """Fit on the training split alone, apply to all three: a data set of float32 rows ``[N, D]``.

    Images become rows of pixels in [0, 1] first. The new splits have mean 0 and std 1 written down, so that the
    laboratory leaves the numbers alone: what ``fit`` makes of them is what the network sees.

    Raises
    ------
    ValueError : the inputs of ``data`` come in parts.
    """
    if isinstance(data.train.inputs, tuple):
        raise ValueError(f"data has inputs in {len(data.train.inputs)} parts: must be one tensor (data.with_inputs)")
    scaler = fit(_flat(data.train))

    def apply(split: Split) -> Split:
        rows = scaler(_flat(split))
        return replace(split, inputs=rows, mean=(0.0,) * rows.shape[1], std=(1.0,) * rows.shape[1])

    return replace(data, train=apply(data.train), val=apply(data.val), test=apply(data.test))


def _flat(split: Split) -> Tensor:
    assert isinstance(split.inputs, Tensor)
    return as_numbers(split.inputs).flatten(1)


# --- Figures of columns, which cleaning needs as well -----------------------------------------------------------------


def as_numbers(x: Tensor) -> Tensor:
    """Pixels (uint8) as float32 in [0, 1]; numbers as they are."""
    return x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x


def checked_rows(name: str, x: Tensor, *, complete: bool = False, least: int = 1) -> Tensor:
    """Return floating-point rows ``[N, D]`` in float64 (float32 where a device has no other).

    Raises
    ------
    ValueError : not floating point ``[N, D]``; fewer than ``least`` rows; infinite values; or NaN where the rows must
        be ``complete``.
    """
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2 and len(x) >= least and x.shape[1]):
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {got}: must be floating point [N, D] with N at least {least} and D at least 1")
    if bool(x.isinf().any()):
        raise ValueError(f"{name} holds infinite values: must be finite")
    if complete and bool(x.isnan().any()):
        raise ValueError(f"{name} holds NaN: must be complete (cleaning.impute_mean and its like fill gaps)")
    return _wide(x)


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()


def column_figures(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation (divided by N) and whether it is constant, of each column; NaN is left out.

    Constant up to the rounding of the mean, as in scikit-learn: 0.1 three times over has a tiny variance in floating
    point.
    """
    count = (~x.isnan()).sum(0)
    mean = x.nanmean(0)
    variance = (x - mean).square().nansum(0) / count
    eps = torch.finfo(x.dtype).eps
    constant = variance <= count * eps * variance + (count * mean * eps).square()
    return mean, variance.sqrt(), constant


def column_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each column; NaN is left out."""
    gaps = x.isnan()
    return x.masked_fill(gaps, torch.inf).amin(0), x.masked_fill(gaps, -torch.inf).amax(0)


def quantile(x: Tensor, q: float) -> Tensor:
    """The q-th quantile of each column, linear between two values; NaN is left out."""
    # torch.quantile takes at most 16 million numbers
    ordered = x.sort(0).values  # NaN last
    position = q * ((~x.isnan()).sum(0) - 1).clamp(min=0).to(x.dtype)
    below, above = (ordered.gather(0, place.long()[None])[0] for place in (position.floor(), position.ceil()))
    return below + (above - below) * (position - position.floor())


def check_quantiles(low: float, high: float) -> None:
    """Raise ValueError unless ``0 <= low < high <= 1``."""
    if not (is_number(low) and is_number(high) and 0 <= low < high <= 1):
        raise ValueError(f"low={low!r}, high={high!r}: must be numbers with 0 <= low < high <= 1")
