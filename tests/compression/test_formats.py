"""Formats: against torch's casts, torchao's MX, NVFP4 and NF4, the published levels, and brute force."""

from __future__ import annotations

import itertools
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from course_lib.compression import formats
from course_lib.compression.formats import (
    BFLOAT16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FLOAT16,
    FloatFormat,
    absmean,
    best_ternary,
    binary,
    microscaling,
    nf4,
    nf4_levels,
    nvfp4,
    round_to_float,
    ternary,
)
from course_lib.compression.quantisation import Grid, quantise_weight, signal_to_noise

WHOLE = [nf4, nvfp4, microscaling, binary, ternary, best_ternary, absmean]

PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Floats of few bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(BFLOAT16, torch.bfloat16), (FLOAT16, torch.float16), (E5M2, torch.float8_e5m2), (E4M3, torch.float8_e4m3fn)],
)
def test_rounded_floats_are_torchs_casts(format: FloatFormat, dtype: torch.dtype) -> None:
    sizes = 10.0 ** torch.arange(-12, 8).repeat_interleave(500)
    largest = torch.finfo(dtype).max
    least = 2.0 ** (format.least_exponent - format.mantissa_bits)
    ties = least * torch.arange(-40, 40) / 4
    edges = largest * torch.tensor([1, 1 + 2**-9, 1.03, 1.0357, 1.04, 1.0666, 1.0667, 1.07, 1.125, 1.2, 2.0])
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3e38])
    x = torch.cat([normal(10_000) * sizes, ties, edges, -edges, special])
    mine, theirs = round_to_float(x, format), x.to(dtype).float()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(mine.signbit()[~x.isnan()], theirs.signbit()[~x.isnan()])
    assert format.largest == largest
    assert format.bits == torch.finfo(dtype).bits


@pytest.mark.parametrize(
    ("format", "numbers"),
    [
        (E2M1, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (E3M2, None),
        (E2M3, None),
        (FloatFormat(2, 0, "none"), [0, 1, 2, 4]),
    ],
)
def test_small_floats_by_their_numbers(format: FloatFormat, numbers: list[float] | None) -> None:
    """All numbers of the format from its bits; each real goes to the nearest."""
    bits = itertools.product(range(2**format.exponent_bits), range(2**format.mantissa_bits))
    made = sorted(
        (m / 2**format.mantissa_bits + (e > 0)) * 2.0 ** (max(e, 1) - format.bias) for e, m in bits
    )  # fmt: skip
    assert numbers is None or made == numbers
    assert format.largest == made[-1]
    grid = torch.tensor(made)
    x = 1.3 * made[-1] * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    nearest = grid[(x[:, None] - grid).abs().argmin(1)]
    assert torch.equal(round_to_float(x, format), nearest)
    assert torch.equal(round_to_float(-grid, format), -grid)


def test_types_stay_and_formats_that_are_none() -> None:
    for dtype in (torch.float64, torch.float16):
        assert round_to_float(normal(3).to(dtype), E4M3).dtype is dtype
    for settings in ({"exponent_bits": 1}, {"mantissa_bits": 24}, {"special": "all"}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*: must be"):
            FloatFormat(**{"exponent_bits": 4, "mantissa_bits": 3, **settings})  # type: ignore[arg-type]


# --- Shared scales ----------------------------------------------------------------------------------------------------


def torchao(name: str) -> Any:
    import importlib

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torchao.{name}")


@pytest.mark.parametrize(
    ("element", "dtype", "bits"),
    [(E2M1, "float4_e2m1fn_x2", 4.25), (E4M3, "float8_e4m3fn", 8.25), (E5M2, "float8_e5m2", 8.25)],
)
def test_microscaling_is_torchaos(element: FloatFormat, dtype: str, bits: float) -> None:
    mx = torchao("prototype.mx_formats.mx_tensor").MXTensor
    w = normal(16, 96) * 10 ** normal(16, 1, seed=1)
    found = microscaling(w, element)
    assert torch.equal(found.weight, mx.to_mx(w, getattr(torch, dtype), 32).dequantize())
    assert found.bits_per_weight == bits


def test_nvfp4_is_torchaos() -> None:
    module = torchao("prototype.mx_formats.nvfp4_tensor")
    w = normal(16, 96) * 10 ** normal(16, 1, seed=1)
    theirs = module.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=module.per_tensor_amax_to_scale(w.abs().max()))
    found = nvfp4(w)
    torch.testing.assert_close(found.weight, theirs.dequantize(), rtol=1e-6, atol=0)
    assert found.bits_per_weight == 4 + 8 / 16 + 32 / w.numel()


def test_the_published_levels_of_nf4() -> None:
    assert nf4_levels().tolist() == pytest.approx(PUBLISHED_NF4, abs=1e-6)


def test_nf4_is_torchaos() -> None:
    """It has the levels with four digits: a weight in ten thousand lies between two and goes to the other."""
    to_nf4 = torchao("quantization.quantize_.workflows.nf4.nf4_tensor").to_nf4
    w = normal(256, 128)
    found, theirs = nf4(w), to_nf4(w, 64, 256).get_original_weight()
    off = (found.weight - theirs).abs()
    assert (off > 1e-3).double().mean() < 5e-4
    assert off[off < 1e-3].max() < 3e-4
    assert found.bits_per_weight == 4 + 8 / 64 + 32 * 3 / w.numel()  # two scales of scales, and their mean


def test_nf4_by_hand() -> None:
    w = normal(3, 50)
    flat = torch.cat([w.flatten(), torch.zeros(42)]).view(3, 64)
    most = flat.abs().amax(1, keepdim=True)
    levels = torch.tensor(PUBLISHED_NF4)
    nearest = levels[(flat[..., None] / most[..., None] - levels).abs().argmin(-1)] * most
    found = nf4(w, scale_block=None)
    torch.testing.assert_close(found.weight, nearest.flatten()[:150].view(3, 50), rtol=1e-5, atol=1e-6)
    assert found.bits_per_weight == 4 + 32 * 3 / 150
    double = nf4(w)
    assert 0 < (double.weight - found.weight).abs().max() < 0.02


# --- Integers, here since torchao takes seconds to import -------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 16)])
def test_the_integers_of_torchao(bits: int, group: int) -> None:
    """torchao's symmetric grid has one integer more, -128 or -8, and a step of max / 127.5 or max / 7.5.

    Its variant without clipping, given the narrow ends, is ours.
    """
    ao = torchao("quantization.quant_primitives")
    w, grid = normal(8, 64), Grid(bits)
    block = (1, group)
    ends = {"quant_min": grid.low, "quant_max": grid.high}
    for kind in (ao.MappingType.SYMMETRIC, ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR):
        scale, zero = ao.choose_qparams_affine(
            w, kind, block, torch.int8, **ends, eps=1e-9, zero_point_dtype=torch.int32
        )
        q = ao.quantize_affine(w, block, scale, zero, torch.int8, **ends)
        ours = quantise_weight(w, grid, group)
        torch.testing.assert_close(ours.scales, scale.view(8, -1), rtol=1e-6, atol=0)
        assert torch.equal(ours.integers, q.int())


# --- Two values and three ---------------------------------------------------------------------------------------------


def test_binary_by_brute_force() -> None:
    w = normal(4, 6).double()
    for row, found in zip(w, binary(w).weight, strict=True):
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
        alphas = (signs @ row).clamp(min=0) / 6  # least squares for these signs
        errors = (alphas[:, None] * signs - row).square().sum(1)
        assert float((found - row).square().sum()) == pytest.approx(float(errors.min()))
    assert binary(torch.tensor([[0.0, -2.0]])).weight.tolist() == [[1.0, -1.0]]
    assert binary(w).bits_per_weight == 1 + 32 / 6


def test_ternary_by_brute_force() -> None:
    w = normal(4, 6).double()
    patterns = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=6)), dtype=torch.float64)
    for row, found in zip(w, best_ternary(w).weight, strict=True):
        alphas = (patterns @ row).clamp(min=0) / patterns.square().sum(1).clamp(min=1)
        errors = (alphas[:, None] * patterns - row).square().sum(1)
        assert float((found - row).square().sum()) == pytest.approx(float(errors.min()))


def test_ternary_by_hand() -> None:
    w = torch.tensor([[0.1, -1.0, 2.0, 0.64, -0.6]])  # mean size 0.868, threshold 0.6076
    alpha = (1.0 + 2.0 + 0.64) / 3
    torch.testing.assert_close(ternary(w).weight, torch.tensor([[0, -alpha, alpha, alpha, 0]]))
    assert ternary(w, threshold=10.0).weight.abs().max() == 0
    assert ternary(w).bits_per_weight == pytest.approx(1.6 + 32 / 5)
    with pytest.raises(ValueError, match="threshold=-1: must be a number of at least 0"):
        ternary(w, -1)
    big = normal(8, 4000)
    best, near = (signal_to_noise(big, way(big).weight) for way in (best_ternary, ternary))
    assert best - 0.15 < near <= best


def test_a_block_of_zeros_stays_zero_and_leaves_the_other_scales_alone() -> None:
    w = 0.02 * normal(2, 64)
    with_zeros = torch.cat([w, torch.zeros(2, 64)])
    assert (nf4(with_zeros).weight[2:] == 0).all()
    exact = nf4(w, scale_block=None).weight  # a scale of 1 among those of 0.05 would coarsen the 8 bits of them all
    torch.testing.assert_close(nf4(with_zeros).weight[:2], exact, rtol=0.006, atol=1e-9)


def test_the_best_ternary_in_half_precision() -> None:
    w = 100 * normal(2, 4000)  # squares of sums beyond 65,504
    half = best_ternary(w.half())
    assert half.weight.dtype is torch.float16
    torch.testing.assert_close(half.weight.float(), best_ternary(w.half().float()).weight, rtol=1e-3, atol=0)


def test_absmean_by_hand() -> None:
    w = torch.tensor([[0.1, -1.0, 3.0], [0.4, -0.6, 0.9]])  # mean size 1
    assert absmean(w).weight.tolist() == [[0, -1, 1], [0, -1, 1]]
    assert absmean(2 * w).weight.tolist() == [[0, -2, 2], [0, -2, 2]]
    assert absmean(w).bits_per_weight == pytest.approx(1.6 + 32 / 6)


# --- All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WHOLE)
def test_shape_and_type_stay_and_zeros_are_zeros(format: Any) -> None:
    w = normal(3, 2, 5, 5).bfloat16().requires_grad_()
    found = format(w)
    assert found.dequantise() is found.weight
    assert found.weight.shape == w.shape
    assert found.weight.dtype is torch.bfloat16
    assert not found.weight.requires_grad
    assert 1 < found.bits_per_weight < 15
    assert (format(torch.zeros(2, 70)).weight == 0).all()
    assert format(normal(3, 70).double()).weight.dtype is torch.float64


def test_more_bits_err_less() -> None:
    w = normal(64, 128)
    six_bits = [partial(microscaling, element=element) for element in (E3M2, E2M3)]
    order: list[Any] = [binary, absmean, ternary, microscaling, nvfp4, *six_bits]
    ratios = [signal_to_noise(w, format(w).weight) for format in order]
    assert ratios == sorted(ratios)
    with pytest.raises(ValueError, match="block=0"):
        nf4(w, block=0)
    assert formats.TRIT_BITS >= 1.584962
