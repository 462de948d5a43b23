r"""Formats: what else than evenly spaced integers a weight can be stored as.

======================  ============================================  =============================================
name                    what a weight becomes                         source
======================  ============================================  =============================================
``round_to_float``      a float of e exponent and m mantissa bits     IEEE 754; Micikevicius et al. 2022 (FP8),
                                                                      arXiv:2209.05433
``microscaling``        small floats, 32 to a power of two            Rouhani et al. 2023 (MX), arXiv:2310.10537
``nvfp4``               4-bit floats, 16 to an 8-bit scale            NVIDIA 2025, arXiv:2509.25149
``nf4``                 one of 16 quantiles of a normal               Dettmers et al. 2023 (QLoRA),
                        distribution, 64 to a scale                   arXiv:2305.14314
``binary``              its sign times the mean size                  Rastegari et al. 2016 (XNOR-Net),
                                                                      arXiv:1603.05279
``ternary``             the same, or 0 where it is small              Li et al. 2016 (TWN), arXiv:1605.04711
``best_ternary``        the same, with the least squared error        Li et al. 2016, equation 4
``absmean``             ternary by rounding, one scale                Ma et al. 2024 (BitNet b1.58),
                                                                      arXiv:2402.17764
======================  ============================================  =============================================

Each but the first is ``weight -> Rounded``: the reals that are left, in the weight's shape and type, and the bits that
each takes with its part of the scales. ``functools.partial`` makes other settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy import stats
from torch import Tensor

from course_lib.lab.arguments import at_least, is_number, require


@dataclass(frozen=True)
class Rounded:
    """A weight in some format: the reals that are left of it, and how many bits each takes, scales included."""

    weight: Tensor
    bits_per_weight: float

    def dequantise(self) -> Tensor:
        """Return the reals: under the same name as an integer weight has (``quantisation.Quantised``)."""
        return self.weight


Format = Callable[[Tensor], Rounded]
"""``weight -> Rounded``, as all formats of this file."""

SCALE_BITS = 32
"""Bits of a scale that is a plain float."""

TRIT_BITS = 8 / 5
"""Bits of one of three values, five to a byte (3**5 = 243); no code needs less than log2(3) = 1.58."""

# --- Floats of few bits -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FloatFormat:
    """A floating-point format: a sign, exponent bits, mantissa bits.

    Parameters
    ----------
    exponent_bits : 2 to 8; more is a wider range.
    mantissa_bits : 0 to 23; more is a finer grid.
    special : what the greatest exponent holds. ``"ieee"``: infinity and NaN alone; ``"nan"``: numbers, and one NaN
        (torch's types say ``fn``, finite); ``"none"``: numbers alone.
    """

    exponent_bits: int
    mantissa_bits: int
    special: Literal["ieee", "nan", "none"] = "ieee"

    def __post_init__(self) -> None:
        require("exponent_bits", self.exponent_bits, lambda n: n in range(2, 9), "a whole number of 2 to 8")
        require("mantissa_bits", self.mantissa_bits, lambda n: n in range(24), "a whole number of 0 to 23")
        require("special", self.special, lambda s: s in ("ieee", "nan", "none"), "'ieee', 'nan' or 'none'")

    @property
    def bits(self) -> int:
        """Of one number, with its sign."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is taken off the stored exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @property
    def least_exponent(self) -> int:
        """Of a normal number; below, the steps become no smaller (subnormal numbers)."""
        return 1 - self.bias

    @property
    def greatest_exponent(self) -> int:
        """Of a number that is not infinite or NaN."""
        return 2**self.exponent_bits - 1 - self.bias - int(self.special == "ieee")

    @property
    def largest(self) -> float:
        """The largest number."""
        gone = 2 if self.special == "nan" else 1  # the last mantissa of the greatest exponent is the NaN
        return (2 - gone * 2.0**-self.mantissa_bits) * 2.0**self.greatest_exponent


BFLOAT16 = FloatFormat(8, 7)
FLOAT16 = FloatFormat(5, 10)
E5M2 = FloatFormat(5, 2)
E4M3 = FloatFormat(4, 3, "nan")
E3M2 = FloatFormat(3, 2, "none")
E2M3 = FloatFormat(2, 3, "none")
E2M1 = FloatFormat(2, 1, "none")


def round_to_float(x: Tensor, to: FloatFormat) -> Tensor:
    r"""Return the nearest numbers of a floating-point format, in the type of ``x``;
    halves go to the even mantissa.

    Between :math:`2^e` and :math:`2^{e+1}` they lie :math:`2^{e-m}` apart, below the
    least exponent no closer. What is too large becomes infinity, or in a format that
    has none the largest number, as in torch's casts. For the largest number in any
    format clamp first: ``x.clamp(-to.largest, to.largest)``.
    """
    wide = x.double()
    exponent = torch.frexp(wide).exponent - 1  # frexp's mantissa lies between 1/2 and 1
    one = torch.ones_like(wide)
    step = torch.ldexp(one, exponent.clamp(min=to.least_exponent) - to.mantissa_bits)
    rounded = torch.where(wide.isfinite(), torch.round(wide / step) * step, wide)
    beyond = torch.inf if to.special == "ieee" else to.largest
    too_large = rounded.abs() > to.largest
    return torch.where(too_large, torch.copysign(beyond * one, wide), rounded).to(x.dtype)


# --- Small floats with shared scales ----------------------------------------------------------------------------------


def microscaling(w: Tensor, element: FloatFormat = E2M1, block: int = 32) -> Rounded:
    r"""Return a weight in an MX format: small floats, of which each block along a row
    shares a power of two.

    The scale is :math:`2^{\lfloor\log_2 \max|w|\rfloor - e}`, e the greatest exponent
    of an element, so that the largest weight of the block fits, or is clipped by a
    little. It takes 8 bits. ``element`` E2M1 makes MXFP4, E2M3 and E3M2 MXFP6, E4M3 and
    E5M2 MXFP8.
    """
    blocks = _blocks(w.flatten(1), block)
    most = blocks.abs().amax(-1, keepdim=True)
    exponent = torch.frexp(most).exponent - 1 - element.greatest_exponent
    scale = torch.ldexp(torch.ones_like(most), exponent.clamp(-127, 127))
    scaled = (blocks / scale).clamp(-element.largest, element.largest)
    values = round_to_float(scaled, element) * scale
    return _unblocked(values, w, element.bits, 8 * scale.numel())


def nvfp4(w: Tensor, block: int = 16) -> Rounded:
    """Return a weight in NVFP4: 4-bit floats, of which each block along a row shares an
    8-bit float.

    Two levels of scales: a tensor's, in 32 bits, brings the largest of the blocks'
    scales to the largest E4M3 number. A block's is its largest weight over 6, the
    largest E2M1 number.
    """
    blocks = _blocks(w.flatten(1), block)
    most = blocks.abs().amax(-1, keepdim=True)
    whole = _positive(most.max() / (E4M3.largest * E2M1.largest))
    least = 2.0 ** (E4M3.least_exponent - E4M3.mantissa_bits)
    share = (most / E2M1.largest / whole).clamp(least, E4M3.largest)
    scale = round_to_float(share, E4M3) * whole
    scaled = (blocks / scale).clamp(-E2M1.largest, E2M1.largest)
    values = round_to_float(scaled, E2M1) * scale
    return _unblocked(values, w, E2M1.bits, 8 * scale.numel() + SCALE_BITS)


# --- Quantiles of a normal distribution -------------------------------------------------------------------------------


def nf4_levels() -> Tensor:
    """Return the 16 levels of NormalFloat: quantiles of a normal distribution, scaled
    to -1 to 1, float64.

    Eight above 0 and seven below are evenly spaced in probability, each side by itself,
    and 0 stands between: so that both 0 and the ends are exact.
    """
    # the outermost probability: the mean of the middles of the last of 15 parts and of 16
    end = 1 - (1 / 30 + 1 / 32) / 2
    above = stats.norm.ppf(torch.linspace(0.5, end, 9, dtype=torch.float64)[1:])
    below = -stats.norm.ppf(torch.linspace(0.5, end, 8, dtype=torch.float64)[1:])
    sides = torch.as_tensor(below).flip(0), torch.zeros(1), torch.as_tensor(above)
    levels = torch.cat(sides)
    return levels / levels.max()


def nf4(w: Tensor, block: int = 64, scale_block: int | None = 256) -> Rounded:
    """Return a weight in NF4: in blocks of neighbours in the flat weight, the nearest
    level times the largest size.

    Parameters
    ----------
    scale_block : so many blocks' scales are quantised together, to 8-bit integers
        around their mean (double quantisation: 4.13 bits a weight in place of 4.5);
        None leaves them as they are. The paper rounds them to 8-bit floats, torchao to
        integers, as here.
    """
    blocks = _blocks(w.reshape(1, -1), block)
    scales = blocks.abs().amax(-1, keepdim=True)  # 0 for a block of zeros
    levels = nf4_levels().to(w.device, blocks.dtype)
    middles = (levels[1:] + levels[:-1]) / 2
    scaled = (blocks / _positive(scales)).contiguous()
    nearest = torch.bucketize(scaled, middles)
    bits = SCALE_BITS * scales.numel()
    if scale_block is not None:
        scales, bits = _double_quantised(scales, scale_block)
    return _unblocked(levels[nearest] * scales, w, 4, bits)


def _double_quantised(scales: Tensor, block: int) -> tuple[Tensor, int]:
    """Scales in 8 bits each, and how many bits they take: each block of them has a scale, all together a mean."""
    mean = scales.mean()
    around = _blocks((scales - mean).reshape(1, -1), block)
    step = _positive(around.abs().amax(-1, keepdim=True) / 128)
    rounded = (around / step).round().clamp(-128, 127) * step
    back = rounded.flatten()[: scales.numel()].view_as(scales) + mean
    return back, 8 * scales.numel() + SCALE_BITS * (step.numel() + 1)


# --- Two values and three ---------------------------------------------------------------------------------------------


def binary(w: Tensor) -> Rounded:
    r"""Return each output's weights as :math:`\pm\alpha`, :math:`\alpha` the mean of
    its :math:`|w|`.

    No other two values :math:`\pm\alpha` come nearer to w in squared error. The sign of
    0 is taken as +.
    """
    rows = w.flatten(1)
    alpha = rows.abs().mean(1, keepdim=True)
    return _rounded(torch.where(rows >= 0, alpha, -alpha), w, 1, SCALE_BITS * len(rows))


def ternary(w: Tensor, threshold: float = 0.7) -> Rounded:
    r"""Return each output's weights as :math:`\pm\alpha`, or 0 where :math:`|w|` is at
    most 0.7 of its mean.

    :math:`\alpha` is the mean size of the others. 0.7 comes near to the best threshold
    for weights that are normally distributed; ``best_ternary`` looks for it.

    Raises
    ------
    ValueError : the threshold is negative.
    """
    allowed = "a number of at least 0"
    require("threshold", threshold, lambda t: is_number(t) and t >= 0, allowed)
    rows = w.flatten(1)
    size = rows.abs()
    kept = size > threshold * size.mean(1, keepdim=True)
    alpha = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return _rounded(rows.sign() * kept * alpha, w, TRIT_BITS, SCALE_BITS * len(rows))


def best_ternary(w: Tensor) -> Rounded:
    r"""Return each output's weights as :math:`\pm\alpha` or 0 with the least squared
    error.

    With the k largest kept, :math:`\alpha` is their mean size and the error
    :math:`\|w\|^2 - S_k^2 / k`, where :math:`S_k` is the sum of their sizes: so sorting
    and one pass over k find the best.
    """
    rows = w.flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # squares of sums
    size = rows.abs().sort(dim=1, descending=True).values
    counts = torch.arange(1, size.shape[1] + 1, device=w.device)
    sums = size.cumsum(1)
    best = (sums.square() / counts).argmax(1, keepdim=True)
    alpha = sums.gather(1, best) / (best + 1)
    kept = rows.abs() >= size.gather(1, best)
    return _rounded(rows.sign() * kept * alpha, w, TRIT_BITS, SCALE_BITS * len(rows))


def absmean(w: Tensor) -> Rounded:
    r"""Return a weight as :math:`\gamma` times -1, 0 or 1, :math:`\gamma` the mean of
    all :math:`|w|`.

    The three are the rounded :math:`w/\gamma`: 0 is what is smaller than half the mean.
    """
    gamma = _positive(w.abs().mean())
    return _rounded((w / gamma).round().clamp(-1, 1) * gamma, w, TRIT_BITS, SCALE_BITS)


# --- Inside -----------------------------------------------------------------------------------------------------------


def _blocks(rows: Tensor, block: int) -> Tensor:
    """``[rows, columns]`` to ``[rows, blocks, block]``, the last filled up with zeros."""
    at_least(1, block=block)
    filled = torch.nn.functional.pad(rows.detach(), (0, -rows.shape[1] % block))
    return filled.unflatten(1, (-1, block))


def _unblocked(blocks: Tensor, w: Tensor, bits: float, extra: float) -> Rounded:
    rows = blocks.flatten(1)
    return _rounded(rows[:, : w.numel() // len(rows)], w, bits, extra)


def _rounded(values: Tensor, w: Tensor, bits: float, extra: float) -> Rounded:
    """Values in the shape and type of the weight; ``extra`` are the bits of all scales together."""
    return Rounded(values.detach().reshape(w.shape).to(w.dtype), bits + extra / w.numel())


def _positive(scale: Tensor) -> Tensor:
    """1 for the scale of what is 0 anyway."""
    return torch.where(scale > 0, scale, 1)
