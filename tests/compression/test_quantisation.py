"""Grids, rounding, packing: against torch's kernels, ONNX Runtime's integers, and sums in float64."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from course_lib.compression.quantisation import (
    Grid,
    Quantised,
    dequantise,
    fake_quantise,
    min_max,
    pack,
    quantise,
    quantise_weight,
    rounding_error,
    scale_and_zero,
    signal_to_noise,
    unpack,
)

GRIDS = [
    Grid(8),
    Grid(4),
    Grid(2),
    Grid(8, symmetric=False),
    Grid(3, symmetric=False, signed=False),
    Grid(5, signed=False),
    Grid(1, symmetric=False, signed=False),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- The grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "low", "high"),
    [
        (Grid(8), -127, 127),
        (Grid(4), -7, 7),
        (Grid(2), -1, 1),
        (Grid(8, symmetric=False), -128, 127),
        (Grid(8, signed=False), 0, 255),
        (Grid(4, symmetric=False, signed=False), 0, 15),
        (Grid(1, signed=False), 0, 1),
    ],
)
def test_the_integers_of_a_grid(grid: Grid, low: int, high: int) -> None:
    assert (grid.low, grid.high, grid.levels) == (low, high, high - low + 1)


@pytest.mark.parametrize("bits", [0, 1, 17, 2.5, True, "8"])
def test_grids_that_are_none(bits: Any) -> None:
    with pytest.raises(ValueError, match=rf"bits={bits!r}: must be a whole number of 2 to 16 on a symmetric"):
        Grid(bits)


def test_scales_and_zero_points_by_hand() -> None:
    scale, zero = scale_and_zero(-1.0, 3.0, Grid(8))
    assert (float(scale), int(zero)) == (pytest.approx(3 / 127), 0)
    scale, zero = scale_and_zero(-1.0, 3.0, Grid(2, symmetric=False, signed=False))
    assert (float(scale), int(zero)) == (pytest.approx(4 / 3), 1)  # round(0.75)
    scale, zero = scale_and_zero(2.0, 3.0, Grid(8, symmetric=False))  # widened to 0
    assert (float(scale), int(zero)) == (pytest.approx(3 / 255), -128)
    scale, zero = scale_and_zero(-3.0, -2.0, Grid(8, symmetric=False))
    assert (float(scale), int(zero)) == (pytest.approx(3 / 255), 127)
    scale, zero = scale_and_zero(torch.zeros(2), torch.zeros(2), Grid(8, symmetric=False))
    assert (scale.tolist(), zero.tolist()) == ([1, 1], [-128, -128])
    assert zero.dtype is torch.int32
    scale, _ = scale_and_zero(torch.zeros(3, 1), torch.ones(1, 2), Grid(8))
    assert scale.shape == (3, 2)


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)])
def test_ranges_that_are_none(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"low=.*, high=.*: must be finite, and low at most high"):
        scale_and_zero(low, high, Grid(8))


# --- Reals and integers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_integers_by_fractions(grid: Grid) -> None:
    """In exact arithmetic, halves to even: q = clamp(round(x / s) + z)."""
    x = torch.cat([normal(200, seed=1), torch.arange(-20, 21) / 8, torch.tensor([1e9, -1e9])]).double()
    scale, zero = torch.tensor(0.25, dtype=torch.float64), (0 if grid.symmetric else grid.low + grid.levels // 3)
    q = quantise(x, scale, zero, grid)
    expected = [min(max(round(Fraction(v) / Fraction(0.25)) + zero, grid.low), grid.high) for v in x.tolist()]
    assert q.tolist() == expected
    assert q.dtype is torch.int32
    back = [0.25 * (k - zero) for k in expected]
    assert dequantise(q, scale, zero).tolist() == fake_quantise(x, scale, zero, grid).tolist() == back


@pytest.mark.parametrize("grid", GRIDS)
def test_torchs_fake_quantisation_per_tensor_and_per_channel(grid: Grid) -> None:
    x = normal(6, 50)
    low, high = min_max(x.flatten())
    scale, zero = scale_and_zero(0.7 * low, 0.6 * high, grid)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero, grid.low, grid.high)
    assert torch.equal(fake_quantise(x, scale, zero, grid), theirs)
    scale, zero = scale_and_zero(*min_max(x), grid)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, grid.low, grid.high)
    assert torch.equal(fake_quantise(x, scale[:, None], zero[:, None], grid), theirs)


def test_torchs_integers() -> None:
    x, grid = normal(5, 40), Grid(8, symmetric=False)
    scale, zero = scale_and_zero(*min_max(x), grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.quantize_per_channel(x, scale, zero, 0, torch.qint8).int_repr()
    assert torch.equal(quantise(x, scale[:, None], zero[:, None], grid), theirs.int())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_the_integers_of_onnx_runtime(symmetric: bool, shift: float) -> None:
    from onnx import TensorProto
    from onnxruntime.quantization.quant_utils import quantize_data

    x = normal(500) + shift
    kind, grid = (TensorProto.INT8, Grid(8)) if symmetric else (TensorProto.UINT8, Grid(8, False, False))
    zero_, scale_, q_ = quantize_data(x.numpy(), kind, symmetric)
    scale, zero = scale_and_zero(*min_max(x), grid)
    assert float(scale) == pytest.approx(float(scale_), rel=1e-6)
    assert int(zero) == int(zero_)
    assert quantise(x, torch.tensor(float(scale_)), zero, grid).tolist() == q_.astype(np.int64).tolist()


def test_half_precision_is_rounded_in_float32() -> None:
    x = normal(1000).bfloat16()
    scale, zero = scale_and_zero(*min_max(x), Grid(8))
    q = quantise(x, scale, zero, Grid(8))
    assert scale.dtype is torch.float32
    assert torch.equal(q, torch.round(x.double() / scale.double()).int())
    assert fake_quantise(x, scale, zero, Grid(8)).dtype is torch.bfloat16


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 5, 9, 1000])
def test_weights_group_by_group(grid: Grid, granularity: Any) -> None:
    w = normal(4, 3, 3, 3, dtype=torch.float64)
    found = quantise_weight(w, grid, granularity, scale_dtype=torch.float64)
    rows = w.flatten(1)
    columns = {"tensor": None, "channel": 27}.get(granularity, granularity)
    expected = torch.empty_like(rows)
    parts = [(slice(None), slice(None))] if columns is None else [
        (slice(r, r + 1), slice(c, c + columns)) for r in range(4) for c in range(0, 27, columns)
    ]  # fmt: skip
    for part in parts:
        low, high = rows[part].min(), rows[part].max()
        expected[part] = fake_quantise(rows[part], *scale_and_zero(low, high, grid), grid)
    assert torch.equal(found.dequantise(), expected.view_as(w))
    assert found.scales.numel() == found.zeros.numel() == len(parts)
    bits = 64 + (0 if grid.symmetric else grid.bits)
    assert found.bits_per_weight == pytest.approx(grid.bits + bits * len(parts) / w.numel())
    assert (found.integers.min() >= grid.low) & (found.integers.max() <= grid.high)


def test_a_half_precision_weight_is_rounded_once() -> None:
    found = quantise_weight(normal(16, 40).half(), Grid(8))
    exact = (found.integers.double() - found.zeros) * found.scales.double()
    assert torch.equal(found.dequantise(), exact.half())
    assert found.dequantise().dtype is torch.float16


def test_each_weight_is_off_by_half_a_step_at_most() -> None:
    w = normal(10, 96)
    for granularity in ("tensor", "channel", 32):
        found = quantise_weight(w, Grid(6), granularity)  # type: ignore[arg-type]
        assert ((found.dequantise() - w).abs() <= found.spread(found.scales) * (0.5 + 1e-5)).all()
    errors = [signal_to_noise(w, quantise_weight(w, Grid(4), g).dequantise()) for g in ("tensor", "channel", 32, 8)]  # type: ignore[arg-type]
    assert errors == sorted(errors)


def test_scales_are_rounded_before_the_weights_are() -> None:
    w = normal(6, 32)
    found = quantise_weight(w, Grid(8), scale_dtype=torch.bfloat16)
    assert found.scales.dtype is torch.bfloat16
    assert found.bits_per_weight == 8 + 16 / 32
    exact = (w / found.scales.float()).round().clamp(-127, 127).int()
    assert torch.equal(found.integers, exact)
    with pytest.raises(ValueError, match=r"scale_dtype=torch.float16: must hold all scales"):
        quantise_weight(1e-9 * w, Grid(8), scale_dtype=torch.float16)


def test_another_range_is_asked_for_by_group_and_types_come_back() -> None:
    asked = []

    def half(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        asked.append(tuple(x.shape))
        return tuple(end / 2 for end in min_max(x))  # type: ignore[return-value]

    w = normal(4, 10).bfloat16()
    found = quantise_weight(w, Grid(8), 4, half)
    assert asked == [(4, 2, 4), (4, 1, 2)]
    assert found.dequantise().dtype is torch.bfloat16
    assert float(found.dequantise().max()) == pytest.approx(float(w.max()) / 2, rel=0.01)


@pytest.mark.parametrize("granularity", ["row", 0, 1.5, True, -4])
def test_granularities_that_are_none(granularity: Any) -> None:
    with pytest.raises(ValueError, match=r"granularity=.*: must be 'tensor', 'channel' or a whole number"):
        quantise_weight(normal(2, 2), Grid(8), granularity)


def test_weights_that_are_none() -> None:
    for w in (normal(3), torch.empty(0, 3)):
        with pytest.raises(ValueError, match=r"w=.*: must be a weight \[outputs, inputs, ...\]"):
            quantise_weight(w, Grid(8))
    with pytest.raises(ValueError, match=r"(?s)low=.*must be finite"):
        quantise_weight(torch.full((2, 2), torch.nan), Grid(8))
    with pytest.raises(ValueError, match=r"x=\(2, 0\): must be a tensor"):
        min_max(torch.empty(2, 0))


# --- Bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 64, 101])
def test_packed_integers_come_back(bits: int, count: int) -> None:
    values = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    packed = pack(values, bits)
    assert packed.dtype is torch.uint8
    assert len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits, count), values)


def test_the_order_of_packed_bits() -> None:
    assert pack(torch.tensor([1, 2]), 4).tolist() == [0x21]
    assert pack(torch.tensor([5, 3, 7]), 3).tolist() == [0b11_011_101, 0b1]
    stream = sum(v << (3 * k) for k, v in enumerate([5, 3, 7, 1, 6]))
    assert bytes(pack(torch.tensor([5, 3, 7, 1, 6]), 3).tolist()) == stream.to_bytes(2, "little")


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="values of -1 to 3: must be 0 to 15"):
        pack(torch.tensor([-1, 3]), 4)
    with pytest.raises(ValueError, match="values of 0 to 16: must be 0 to 15"):
        pack(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match="bits=17: must be a whole number of 1 to 16"):
        pack(torch.tensor([0]), 17)
    with pytest.raises(ValueError, match="count=3: must be at most the 2 values that were packed"):
        unpack(torch.zeros(1, dtype=torch.uint8), 4, 3)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 7])
def test_bytes_hold_the_weight(grid: Grid, granularity: Any) -> None:
    found = quantise_weight(normal(5, 3, 3, 2, dtype=torch.float64), grid, granularity, scale_dtype=torch.float16)
    data = found.packed()
    assert -1e-9 < len(data) - found.bits_per_weight * 90 / 8 < 2  # the last byte of integers, and of zero points
    blank = Quantised(
        torch.zeros_like(found.integers), torch.zeros_like(found.scales), torch.zeros_like(found.zeros),
        found.group, grid, found.dtype,
    )  # fmt: skip
    back = blank.unpacked(data)
    assert torch.equal(back.integers, found.integers)
    assert torch.equal(back.scales, found.scales)
    assert torch.equal(back.zeros, found.zeros)
    assert torch.equal(back.dequantise(), found.dequantise())
    with pytest.raises(ValueError, match=rf"data={len(data) + 1}: must be {len(data)} bytes long"):
        blank.unpacked(data + b"x")


# --- How large the error is -------------------------------------------------------------------------------------------


def test_the_error_of_rounding_and_six_decibels_a_bit() -> None:
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    ratios = []
    for bits in (4, 5, 6, 7, 8):
        scale, zero = scale_and_zero(-1.0, 1.0, Grid(bits, symmetric=False))
        y = fake_quantise(x, scale.double(), zero, Grid(bits, symmetric=False))
        assert float((x - y).square().mean()) == pytest.approx(float(rounding_error(scale)), rel=0.02)
        ratios.append(signal_to_noise(x, y))
    assert np.diff(ratios) == pytest.approx(20 * math.log10(2), abs=0.4)


def test_decibels_by_hand() -> None:
    x = torch.tensor([3.0, 4.0])
    assert signal_to_noise(x, torch.tensor([3.0, 4.5])) == pytest.approx(20)
    assert signal_to_noise(x, x) == math.inf
    with pytest.raises(ValueError, match=r"y=\(1,\): must be a tensor of the shape \(2,\)"):
        signal_to_noise(x, torch.ones(1))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    w = normal(8, 64)
    there, here = quantise_weight(w.cuda(), Grid(4), 16), quantise_weight(w, Grid(4), 16)
    assert there.packed() == here.packed()
    assert there.unpacked(here.packed()).dequantise().is_cuda
