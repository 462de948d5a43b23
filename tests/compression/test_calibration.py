"""Ranges: against numpy's percentiles, brute force, integrals in float64, and ONNX Runtime's entropy threshold."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

from course_lib.compression.calibration import (
    divergence,
    entropy,
    gaussian,
    gaussian_clip,
    laplacian,
    laplacian_clip,
    least_squares,
    min_max,
    moving_average,
    percentile,
)
from course_lib.compression.quantisation import Grid, fake_quantise, quantise_weight, scale_and_zero, signal_to_noise

UNSIGNED = Grid(4, symmetric=False, signed=False)
ALL: list[Any] = [min_max, percentile, least_squares, partial(entropy, bins=65), gaussian, laplacian]


def samples(kind: str, *shape: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.laplace(size=shape) if kind == "laplace" else rng.normal(size=shape))


def error(x: Tensor, low: Tensor, high: Tensor, grid: Grid) -> float:
    return float((fake_quantise(x, *scale_and_zero(low, high, grid), grid) - x).square().mean())


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("grid", [Grid(4), UNSIGNED, Grid(4, signed=False)])
def test_rows_are_treated_each_by_itself(method: Any, grid: Grid) -> None:
    x = samples("normal", 2, 2, 400) * torch.tensor([5.0, 0.01])[:, None]
    x = x if grid.signed or not grid.symmetric else x.relu()
    low, high = method(x, grid)
    assert low.shape == high.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            one = method(x[i, j], grid)
            assert torch.equal(torch.stack(one), torch.stack([low[i, j], high[i, j]]))
    least, most = min_max(x)
    assert ((least <= low) & (low <= high) & (high <= most)).all()


@pytest.mark.parametrize("p", [50.0, 90.0, 99.9, 100.0])
def test_percentiles_are_numpys(p: float) -> None:
    x = samples("laplace", 1001) + 0.5
    low, high = percentile(x, Grid(8), p)
    clip = np.percentile(x.abs().numpy(), p)
    assert float(high) == pytest.approx(min(clip, float(x.max())))
    assert float(low) == pytest.approx(max(-clip, float(x.min())))
    low, high = percentile(x, UNSIGNED, p)
    assert (float(low), float(high)) == pytest.approx(np.percentile(x.numpy(), [(100 - p) / 2, (100 + p) / 2]))


def test_percentages_that_are_none() -> None:
    for p in (0, 101, float("nan")):
        with pytest.raises(ValueError, match=r"p=.*: must be a number above 0 and at most 100"):
            percentile(samples("normal", 5), Grid(8), p)


@pytest.mark.parametrize("grid", [Grid(2), Grid(4), Grid(3, symmetric=False)])
@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_no_other_shrunken_range_has_a_smaller_error(grid: Grid, kind: str) -> None:
    x = samples(kind, 3000)
    low, high = min_max(x)
    errors = [error(x, low * k / 100, high * k / 100, grid) for k in range(1, 101)]
    found = error(x, *least_squares(x, grid), grid)
    assert found == pytest.approx(min(errors), rel=1e-9)
    assert found < errors[-1]


# --- From a distribution ----------------------------------------------------------------------------------------------


def expected_error(clip: float, steps: int, density: Any) -> float:
    """Rounding to steps between the clips as noise, and clipping, by an integral."""
    beyond = 2 * integrate.quad(lambda x: (x - clip) ** 2 * density(x), clip, np.inf)[0]
    return clip**2 / (3 * steps**2) + beyond


@pytest.mark.parametrize("steps", [4, 8, 16, 256])
@pytest.mark.parametrize(("clip", "density"), [(gaussian_clip, stats.norm.pdf), (laplacian_clip, stats.laplace.pdf)])
def test_the_best_clips_by_integration(steps: int, clip: Any, density: Any) -> None:
    best = optimize.minimize_scalar(
        expected_error, bounds=(0.1, 15), args=(steps, density), method="bounded", options={"xatol": 1e-8}
    )
    assert clip(steps) == pytest.approx(best.x, rel=1e-3)


def test_the_published_clips() -> None:
    """Banner et al. 2018: 1.71, 2.15, 2.55 standard deviations and 2.83, 3.89, 5.03 b for 2, 3, 4 bits."""
    assert [gaussian_clip(2**m) for m in (2, 3, 4)] == pytest.approx([1.71, 2.15, 2.55], abs=0.01)
    assert [laplacian_clip(2**m) for m in (2, 3, 4)] == pytest.approx([2.83, 3.89, 5.03], abs=0.01)


def exact_best_clip(grid: Grid, density: Any) -> float:
    """With the levels as they are: the error at each real, summed by its density."""
    x = np.linspace(0, 15, 15_001)
    weights = density(x) / density(x).sum()

    def mean_error(clip: float) -> float:
        step = clip / grid.high
        return float(weights @ (x - step * np.minimum(np.round(x / step), grid.high)) ** 2)

    return float(optimize.minimize_scalar(mean_error, bounds=(0.5, 10), method="bounded").x)


@pytest.mark.parametrize(
    ("kind", "density", "method"), [("normal", stats.norm.pdf, gaussian), ("laplace", stats.laplace.pdf, laplacian)]
)
@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_finds_the_clip_of_the_distribution(kind: str, density: Any, method: Any, bits: int) -> None:
    x, grid = samples(kind, 30_000), Grid(bits)
    found = max(float(end.abs()) for end in least_squares(x, grid))
    assert found == pytest.approx(exact_best_clip(grid, density), rel=0.06)
    # as noise, without looking at the levels: hardly worse
    assert error(x, *method(x, grid), grid) < 1.06 * error(x, *least_squares(x, grid), grid)


@pytest.mark.parametrize(
    ("kind", "method", "clip"), [("normal", gaussian, gaussian_clip), ("laplace", laplacian, laplacian_clip)]
)
def test_steps_on_one_side_and_on_both(kind: str, method: Any, clip: Any) -> None:
    x = samples(kind, 100_000)
    assert float(method(x, Grid(4))[1]) == pytest.approx(clip(14), rel=0.02)
    assert float(method(x, Grid(4, symmetric=False))[0]) == pytest.approx(-clip(15), rel=0.02)
    low, high = method(x.abs(), Grid(3, signed=False))  # 7 steps, and as many below that nobody needs
    assert low >= 0
    assert float(high) == pytest.approx(clip(14), rel=0.02)
    # an affine grid shares its levels out as the samples need them, whatever its integers are called
    assert float(method(x, UNSIGNED)[0]) == pytest.approx(-clip(15), rel=0.02)
    assert float(method(x.abs(), UNSIGNED)[1]) == pytest.approx(clip(30), rel=0.02)


# --- From the histogram -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end", "levels"), [(3, 18, 5), (0, 21, 5), (6, 15, 4), (2, 19, 17)])
def test_the_divergence_by_loops(start: int, end: int, levels: int) -> None:
    counts = np.round(1000 * stats.laplace.pdf(np.linspace(-6, 6, 21)))
    counts[7] = 0
    p = counts[start:end].copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[end:].sum()
    q = np.zeros(len(p))
    for level in range(levels):
        mine = [k for k in range(len(p)) if k * levels // len(p) == level]
        filled = [k for k in mine if p[k] > 0]
        for k in filled:
            q[k] = sum(counts[start + j] for j in mine) / len(filled)

    def smooth(values: np.ndarray) -> np.ndarray:
        empty = values == 0
        return np.where(empty, 1e-4, values - 1e-4 * empty.sum() / (~empty).sum())

    expected = stats.entropy(smooth(p), smooth(q))
    assert divergence(torch.from_numpy(counts), start, end, levels) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_the_threshold_of_onnx_runtime(kind: str) -> None:
    """It merges ``n // levels`` bins a level and leaves the rest to the last, we share them out: nearly the same."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    x, grid, bins = samples(kind, 50_000), Grid(4), 513
    most = float(x.abs().max())
    histogram = (*np.histogram(x.numpy(), bins=bins, range=(-most, most)), np.array(-most), np.array(most))
    theirs = HistogramCollector("entropy", True, bins, grid.levels, 99.9, "same").get_entropy_threshold(
        histogram, grid.levels
    )
    _, high = entropy(x, grid, bins)
    assert float(high) == pytest.approx(float(theirs[1]), rel=0.08)
    assert float(high) < 0.8 * most


def test_entropy_of_one_side_and_of_both() -> None:
    x = samples("normal", 20_000)
    low, high = entropy(x, UNSIGNED, 255)
    assert float(low) == pytest.approx(-float(high))
    assert torch.equal(entropy(x, Grid(4, symmetric=False), 255)[1], high)
    low, above = entropy(x.abs(), UNSIGNED, 255)
    assert low == x.abs().min()
    assert torch.equal(entropy(x.abs(), Grid(4, signed=False), 255)[1], above)
    assert 1.05 * high < above < x.abs().max()  # twice as many levels for this side
    cut = entropy(x.relu(), UNSIGNED, 255)[1]  # zeros of a ReLU are not counted
    assert torch.equal(cut, entropy(x[x > 0], UNSIGNED, 255)[1])


def test_an_outlier_is_cut_off_by_all_but_the_whole_range() -> None:
    x = samples("normal", 20_000)
    x[0] = 100.0
    for method in (percentile, entropy, gaussian, laplacian):
        assert method(x, Grid(8))[1] < 20
    assert min_max(x, Grid(8))[1] == 100
    # its square outweighs all others here: to clip it costs 100**2 / 20000, to cover it (100/127)**2 / 12
    assert least_squares(x, Grid(8))[1] > 80
    weight = torch.cat([x[1:257].view(4, 64), torch.full((4, 1), 30.0)], 1)
    plain, cut = (
        quantise_weight(weight, Grid(3), low_high=method).dequantise()[:, :64] for method in (min_max, percentile_90)
    )
    assert signal_to_noise(weight[:, :64], cut) > signal_to_noise(weight[:, :64], plain) + 3


percentile_90 = partial(percentile, p=98.0)


def test_nothing_but_zeros_and_bins_that_do_not_do() -> None:
    zeros = torch.zeros(10)
    for method in ALL:
        low, high = method(zeros, Grid(4))
        assert low == high == 0
    for bins in (15, 100, 7.0):
        with pytest.raises(ValueError, match=r"bins=.*: must be an odd number above the 15 levels"):
            entropy(samples("normal", 10), Grid(4), bins)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="candidates=0"):
        least_squares(zeros, Grid(4), 0)
    with pytest.raises(ValueError, match="steps=0"):
        gaussian_clip(0)


# --- Over batches -----------------------------------------------------------------------------------------------------


def test_the_moving_average_is_torchs() -> None:
    from torch.ao.quantization import MovingAverageMinMaxObserver

    batches = [samples("normal", 100, seed=seed).float() for seed in range(5)]
    observer = MovingAverageMinMaxObserver(averaging_constant=0.2)
    for x in batches:
        observer(x)
    low, high = moving_average((min_max(x) for x in batches), 0.2)
    assert (float(low), float(high)) == pytest.approx((float(observer.min_val), float(observer.max_val)))
    for momentum in (0, 1.5):
        with pytest.raises(ValueError, match="momentum="):
            moving_average([(low, high)], momentum)
    with pytest.raises(ValueError, match="ranges holds none"):
        moving_average([])
