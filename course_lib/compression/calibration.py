r"""Calibration: the range of reals that a grid should cover, from samples of them.

======================  ============================================  =============================================
name                    the range                                     source
======================  ============================================  =============================================
``min_max``             all samples                                   Krishnamoorthi 2018, arXiv:1806.08342
``percentile``          but for a few                                 Wu et al. 2020, arXiv:2004.09602
``least_squares``       with the least squared error                  Choukroun et al. 2019, arXiv:1902.06822
``entropy``             whose histogram tells the most                Migacz 2017, GTC (TensorRT)
``gaussian``,           best for samples that are distributed so      Banner, Nahshan & Soudry 2018 (ACIQ),
``laplacian``                                                         arXiv:1810.05723
``moving_average``      of ranges, batch after batch                  Jacob et al. 2017, arXiv:1712.05877
======================  ============================================  =============================================

What lies outside is clipped, so a narrow range errs on a few large samples, and a wide one a little on all.

Each is ``(x, grid) -> (low, high)``, from samples ``[..., n]`` to ranges ``[...]``: ``x.flatten()`` gives the range of
a tensor, ``x.flatten(1)`` one for each channel. Give other settings with ``functools.partial``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from scipy.optimize import brentq
from scipy.special import lambertw
from torch import Tensor

from course_lib.compression.quantisation import Grid, LowHigh, fake_quantise, min_max, scale_and_zero
from course_lib.lab.arguments import at_least, is_number, is_whole, require

__all__ = [
    "LowHigh",
    "divergence",
    "entropy",
    "gaussian",
    "gaussian_clip",
    "laplacian",
    "laplacian_clip",
    "least_squares",
    "min_max",
    "moving_average",
    "percentile",
]

Range = tuple[Tensor, Tensor]

# --- From the samples -------------------------------------------------------------------------------------------------


def percentile(x: Tensor, grid: Grid, p: float = 99.9) -> Range:
    """Return the range that holds ``p`` percent of the samples, interpolated between
    neighbours.

    On a symmetric grid those with the smallest ``|x|``; on an affine one as many are
    left out below as above.

    Raises
    ------
    ValueError : ``p`` is not above 0 and at most 100.
    """
    allowed = "a number above 0 and at most 100"
    require("p", p, lambda p: is_number(p) and 0 < p <= 100, allowed)
    if grid.symmetric:
        return _within(_quantile(x.abs(), p / 100), x)
    return _quantile(x, (1 - p / 100) / 2), _quantile(x, (1 + p / 100) / 2)


def least_squares(x: Tensor, grid: Grid, candidates: int = 100) -> Range:
    """Return the range with the least squared error of rounding and clipping together.

    Of the whole range the fractions ``1 / candidates``, ``2 / candidates``, ..., 1 are
    tried: both ends shrink alike.
    """
    at_least(1, candidates=candidates)
    low, high = min_max(x, grid)
    errors = []
    for k in range(1, candidates + 1):
        part = k / candidates
        scale, zero = scale_and_zero(low * part, high * part, grid)
        y = fake_quantise(x, scale[..., None], zero[..., None], grid)
        errors.append((x - y).square().mean(-1))
    best = (torch.stack(errors).argmin(0) + 1).to(x.dtype) / candidates
    return low * best, high * best


def _quantile(x: Tensor, q: float) -> Tensor:
    # torch.quantile refuses more than 16 million samples
    place = min(max(q, 0.0), 1.0) * (x.shape[-1] - 1)
    ordered = x.sort(-1).values
    below, above = ordered[..., math.floor(place)], ordered[..., math.ceil(place)]
    return torch.lerp(below, above, place - math.floor(place))


# --- From their histogram ---------------------------------------------------------------------------------------------


def entropy(x: Tensor, grid: Grid, bins: int = 2049) -> Range:
    """Return the range, on both sides of 0 alike, whose clipped histogram loses the
    least when it is quantised.

    The loss is the Kullback-Leibler ``divergence``. Samples that are not negative have
    the side above 0 alone, and all levels of an affine or unsigned grid there.
    What is exactly 0 is left out: it has an integer of its own, and where a ReLU made it
    of half the samples no clip but the narrowest would leave its bin alone.

    Parameters
    ----------
    bins : of the histogram, an odd number, so that one of them lies around 0; many more
        than the grid has levels.

    Raises
    ------
    ValueError : there are not more bins than levels, or their number is even.
    """
    allowed = f"an odd number above the {grid.levels} levels of the grid"
    enough = is_whole(bins) and bins % 2 == 1 and bins > grid.levels
    require("bins", bins, lambda _: enough, allowed)
    rows = x.reshape(-1, x.shape[-1])
    thresholds = [_entropy_threshold(row, grid, bins) for row in rows]
    return _within(torch.stack(thresholds).view(x.shape[:-1]), x)


def _entropy_threshold(x: Tensor, grid: Grid, bins: int) -> Tensor:
    most = x.abs().max()
    if most == 0:
        return most
    sides = 1 if _one_sided(x, grid) else 2
    width = sides * most / bins
    places = ((x + (sides - 1) * most) / width).long().clamp(0, bins - 1)
    counts = torch.bincount(places[x != 0], minlength=bins).double().cpu()
    if sides == 2:
        middle, least = bins // 2, grid.levels // 2
        parts = [(middle - i, middle + i + 1) for i in _about(128, least, middle)]
    else:
        parts = [(0, end) for end in _about(128, grid.levels, bins)]
    losses = [divergence(counts, start, end, grid.levels) for start, end in parts]
    start, end = parts[min(range(len(parts)), key=losses.__getitem__)]
    return (end - start) * width / sides


def _about(count: int, first: int, last: int) -> range:
    """So many whole numbers from the one to the other, or a few more; the last is always among them."""
    step = max(1, (last - first) // count)
    return range(last, first - 1, -step)


def divergence(counts: Tensor, start: int, end: int, levels: int) -> float:
    r"""Return the Kullback-Leibler divergence :math:`\sum p \log(p/q)` of a clipped
    histogram from its quantised one.

    p are the counts from bin ``start`` to ``end``, those outside added to the
    outermost; q are the same bins, without those outside, merged to ``levels`` and
    spread evenly again over the bins that are not empty. So q misses what is clipped as
    well as what is merged.
    """
    inside = counts[start:end]
    p = inside.clone()
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    filled = (p > 0).to(p.dtype)
    level = torch.arange(len(p), device=p.device) * levels // len(p)
    none = p.new_zeros(levels)
    merged, shared = (none.index_add(0, level, v) for v in (inside, filled))
    q = filled * (merged / shared.clamp(min=1))[level]
    # for the logarithm an empty bin gets a trace of the others, as in ONNX Runtime
    p, q = _smoothed(p), _smoothed(q)
    return float((p * (p / q).log()).sum())


def _smoothed(counts: Tensor, trace: float = 1e-4) -> Tensor:
    empty = counts <= 0
    if bool(empty.all()):
        return torch.full_like(counts, 1 / len(counts))
    taken = trace * empty.sum() / (~empty).sum()
    counts = torch.where(empty, trace, (counts - taken).clamp(min=trace))
    return counts / counts.sum()


# --- From a distribution ----------------------------------------------------------------------------------------------


def gaussian(x: Tensor, grid: Grid) -> Range:
    """Return the best range for normally distributed samples of mean 0: so many
    standard deviations (ACIQ).
    """
    sigma = x.square().mean(-1).sqrt()
    return _within(sigma * gaussian_clip(_steps(x, grid)), x)


def laplacian(x: Tensor, grid: Grid) -> Range:
    """Return the best range for Laplace-distributed samples of mean 0: so many mean
    absolute values (ACIQ).
    """
    b = x.abs().mean(-1)
    return _within(b * laplacian_clip(_steps(x, grid)), x)


def gaussian_clip(steps: int) -> float:
    r"""Return where to clip a standard normal number that is rounded to ``steps`` steps
    between the two clips.

    Clipping at :math:`\pm c` errs by :math:`2\int_c^\infty (x-c)^2 \varphi(x)\,dx`,
    rounding by :math:`c^2/(3\,n^2)`. In the least sum of both the derivatives are
    equal: :math:`2 (\varphi(c) - c\,\Phi(-c)) = c / (3 n^2)`.
    """
    at_least(1, steps=steps)

    def slope(c: float) -> float:
        density = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
        tail = math.erfc(c / math.sqrt(2)) / 2
        return 2 * c / (3 * steps**2) - 4 * (density - c * tail)

    return float(brentq(slope, 1e-9, 40.0))


def laplacian_clip(steps: int) -> float:
    r"""Return where to clip a Laplace-distributed number of scale 1 that is rounded to
    ``steps`` steps.

    Clipping at :math:`\pm c` errs by :math:`2 e^{-c}`, rounding by
    :math:`c^2/(3\,n^2)`; the sum is least where :math:`c\,e^c = 3 n^2`: at Lambert's
    :math:`W(3 n^2)`.
    """
    at_least(1, steps=steps)
    return float(lambertw(3 * steps**2).real)


def _steps(x: Tensor, grid: Grid) -> int:
    # numbers of one sign are half of a distribution that has both
    return (grid.levels - 1) * (2 if _one_sided(x, grid) else 1)


# --- Over batches -----------------------------------------------------------------------------------------------------


def moving_average(ranges: Iterable[Range], momentum: float = 0.1) -> Range:
    """Return the exponential moving average of ranges: the first counts whole, each
    next by ``momentum``.

    A sample that is far out moves it in its own batch alone, and each later batch
    forgets a part of that.

    Raises
    ------
    ValueError : there is no range, or ``momentum`` is not above 0 and at most 1.
    """
    allowed = "a number above 0 and at most 1"
    require("momentum", momentum, lambda m: is_number(m) and 0 < m <= 1, allowed)
    each = iter(ranges)
    first = next(each, None)
    if first is None:
        raise ValueError("ranges holds none: must hold at least one")
    low, high = first
    for new_low, new_high in each:
        low = torch.lerp(low, new_low, momentum)
        high = torch.lerp(high, new_high, momentum)
    return low, high


# --- Inside -----------------------------------------------------------------------------------------------------------


def _one_sided(x: Tensor, grid: Grid) -> bool:
    """Whether all levels of the grid lie on the side above 0."""
    return not grid.signed if grid.symmetric else not bool((x < 0).any())


def _within(clip: Tensor, x: Tensor) -> Range:
    """The range from ``-clip`` to ``clip``, but no wider than the samples."""
    low, high = min_max(x)
    return torch.maximum(low, -clip), torch.minimum(high, clip)
