r"""Quantisation: reals as small integers and a scale. The grid, the rounding, and weights that are stored so.

======================  ============================================  =============================================
name                    what it is or gives                           source
======================  ============================================  =============================================
``Grid``                which integers there are: bits, signed or     Krishnamoorthi 2018, arXiv:1806.08342
                        not, around zero or anywhere
``scale_and_zero``      the scale and the zero point of a range       Jacob et al. 2017, arXiv:1712.05877
``quantise``            reals to integers                             Jacob et al. 2017, equation 1
``dequantise``          integers to reals                             Jacob et al. 2017, equation 1
``fake_quantise``       both: the real that the integer stands for    Jacob et al. 2017, section 3
``quantise_weight``     a weight by tensor, channel or group          Nagel et al. 2021, arXiv:2106.08295
``Quantised``           what that gives: integers, scales, bits
``pack``, ``unpack``    integers of 1 to 16 bits, back to back
``rounding_error``      the error to expect, :math:`s^2/12`           Bennett 1948, Bell System Technical Journal 27
``signal_to_noise``     the error that there is, in decibels
======================  ============================================  =============================================

A real x and its integer q are tied by two numbers, the scale s (a real) and the zero point z (an integer):

.. math:: q = \mathrm{clamp}(\mathrm{round}(x / s) + z,\ low,\ high) \qquad x \approx s\,(q - z)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from course_lib.lab.arguments import is_whole, require

Real = Tensor | float
Whole = Tensor | int
"""One number, or a tensor of them that broadcasts with the others."""

# --- The grid ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The integers from ``low`` to ``high`` that stand for reals.

    Parameters
    ----------
    bits : of each integer, 1 to 16.
    symmetric : whether the zero point is 0, so that products need no correction; otherwise it lies where the range
        wants it (affine), which suits what is not centred on zero.
    signed : whether there are integers below zero. A symmetric signed grid is narrow (-127 to 127, not -128): then
        ``-x`` has an integer wherever ``x`` has one. A symmetric unsigned one suits what a ReLU gives.

    Raises
    ------
    ValueError : the number of bits is not possible; symmetric and signed takes at least 2.
    """

    bits: int = 8
    symmetric: bool = True
    signed: bool = True

    def __post_init__(self) -> None:
        least = 2 if self.symmetric and self.signed else 1
        allowed = f"a whole number of {least} to 16" + (" on a symmetric signed grid" if least == 2 else "")
        require("bits", self.bits, lambda bits: is_whole(bits) and least <= bits <= 16, allowed)

    @property
    def low(self) -> int:
        """The least integer."""
        return -(2 ** (self.bits - 1)) + int(self.symmetric) if self.signed else 0

    @property
    def high(self) -> int:
        """The greatest integer."""
        return 2 ** (self.bits - int(self.signed)) - 1

    @property
    def levels(self) -> int:
        """How many integers there are."""
        return self.high - self.low + 1


LowHigh = Callable[[Tensor, Grid], tuple[Tensor, Tensor]]
"""``(x, grid) -> (low, high)``: from samples ``[..., n]`` the range ``[...]`` of reals that the grid is to cover."""


def min_max(x: Tensor, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
    """Return the range that holds all samples: ``[..., n]`` to lows and highs
    ``[...]``. The grid is not looked at.

    Raises
    ------
    ValueError : there is no sample.
    """
    some = x.ndim > 0 and x.shape[-1] > 0
    require("x", tuple(x.shape), lambda _: some, "a tensor [..., n] of n > 0 samples")
    return x.amin(-1), x.amax(-1)


def scale_and_zero(low: Real, high: Real, grid: Grid) -> tuple[Tensor, Tensor]:
    r"""Return the scale and the zero point with which a grid covers the reals from
    ``low`` to ``high``.

    Symmetric: :math:`s = \max(|low|, |high|) / grid.high`, z = 0. Affine: the range is
    widened until it holds 0, which so gets an integer of its own (padding and ReLU need
    it). Then :math:`s = (high - low) / (levels - 1)`, and z is the integer nearest to
    :math:`grid.low - low / s`. A range of nothing but 0 gets the scale 1.

    Parameters
    ----------
    low, high : of any shapes that broadcast.

    Returns
    -------
    The scales, positive, and the zero points, int32, in the broadcast shape.

    Raises
    ------
    ValueError : a range ends before it starts or is not finite.
    """
    low, high = _checked_range(low, high)
    if grid.symmetric:
        scale = torch.maximum(low.abs(), high.abs()) / grid.high
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (grid.levels - 1)
    scale = torch.where(scale > 0, scale, 1)
    if grid.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero = torch.round(grid.low - low / scale).clamp(grid.low, grid.high)
    return scale, zero.to(torch.int32)


# --- Reals and integers -----------------------------------------------------------------------------------------------


def quantise(x: Tensor, scale: Real, zero: Whole, grid: Grid) -> Tensor:
    r"""Return the integers, int32.

    .. math:: q = \mathrm{clamp}(\mathrm{round}(x / s) + z,\ low,\ high)

    Halves are rounded to even. torch's kernels multiply by ``1 / s`` in float32 in
    place of dividing, which can move a real that lies within a rounding error of the
    middle between two integers; ONNX divides, as here.

    Parameters
    ----------
    scale, zero : of shapes that broadcast with ``x``.
    """
    # a half-precision quotient could not tell 8-bit integers apart
    q = torch.round(_wide(x) / scale) + zero
    return q.clamp(grid.low, grid.high).to(torch.int32)


def dequantise(q: Tensor, scale: Real, zero: Whole) -> Tensor:
    """Return the reals that integers stand for: ``scale * (q - zero)``, in the scale's
    type.
    """
    return (q - zero) * scale


def fake_quantise(x: Tensor, scale: Real, zero: Whole, grid: Grid) -> Tensor:
    """Return the reals on the grid that are nearest to ``x``, in its type: what comes
    out of integers and back.
    """
    return dequantise(quantise(x, scale, zero, grid), scale, zero).to(x.dtype)


# --- Weights ----------------------------------------------------------------------------------------------------------

Granularity = Literal["tensor", "channel"] | int
"""What shares a scale: a whole tensor, an output channel (dimension 0), or so many neighbouring inputs of a channel."""


@dataclass(frozen=True)
class Quantised:
    """A weight as integers.

    Attributes
    ----------
    integers : int32, in the weight's shape ``[rows, ...]``.
    scales, zeros : ``[rows, groups]``, or ``[1, 1]`` for one scale in all; the zeros are int32.
    group : how many neighbours of a row ``[inputs * kernel]`` share a scale; the last group may be shorter.
    grid : which integers there are.
    dtype : of the weight, to which it is put back.
    """

    integers: Tensor
    scales: Tensor
    zeros: Tensor
    group: int
    grid: Grid
    dtype: torch.dtype = torch.float32

    def spread(self, values: Tensor) -> Tensor:
        """Give each weight the value of its group: ``[rows, groups]`` to a shape that broadcasts with the weight's."""
        if values.numel() == 1:
            return values.reshape(())
        columns = self.integers[0].numel()
        each = values.repeat_interleave(self.group, dim=1)[:, :columns]
        return each.view(self.integers.shape)

    def dequantise(self) -> Tensor:
        """Return the weight that the integers stand for."""
        scales, zeros = self.spread(self.scales), self.spread(self.zeros)
        wider = torch.promote_types(scales.dtype, self.dtype)  # a product of rounded scales would be rounded twice
        return dequantise(self.integers, scales.to(wider), zeros).to(self.dtype)

    @property
    def bits_per_weight(self) -> float:
        """Bits that each weight takes, its part of the scales and (on an affine grid) of the zero points included."""
        zeros = 0 if self.grid.symmetric else self.zeros.numel() * self.grid.bits
        scales = self.scales.numel() * self.scales.element_size() * 8
        return self.grid.bits + (scales + zeros) / self.integers.numel()

    def packed(self) -> bytes:
        """Return what has to be stored: the integers back to back, the scales, on an affine grid the zero points."""
        return self.stored().cpu().numpy().tobytes()

    def unpacked(self, data: bytes) -> Quantised:
        """Return another weight of this shape, grid and grouping from its ``packed`` bytes.

        Raises
        ------
        ValueError : there are more bytes or fewer than such a weight has.
        """
        stored = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.integers.device)
        require("data", len(stored), lambda n: n == sum(self._sizes()), f"{sum(self._sizes())} bytes long")
        return self.restored(stored)

    def stored(self) -> Tensor:
        """Return the packed bytes as a tensor where the weight is, uint8."""
        parts = [pack(self.integers - self.grid.low, self.grid.bits), self.scales.contiguous().flatten()]
        if not self.grid.symmetric:
            parts.append(pack(self.zeros - self.grid.low, self.grid.bits))
        return torch.cat([part.view(torch.uint8) for part in parts])

    def restored(self, stored: Tensor) -> Quantised:
        """Return another weight of this shape, grid and grouping from its ``stored`` bytes."""
        integers, scales, zeros = stored.split(self._sizes())
        return replace(
            self,
            integers=self._integers(integers, self.integers.shape),
            scales=scales.clone().view(self.scales.dtype).view(self.scales.shape),  # a copy: aligned for its type
            zeros=torch.zeros(self.zeros.shape, dtype=torch.int32, device=stored.device)
            if self.grid.symmetric
            else self._integers(zeros, self.zeros.shape),
        )

    def _integers(self, packed: Tensor, shape: torch.Size) -> Tensor:
        return unpack(packed, self.grid.bits, shape.numel()).view(shape) + self.grid.low

    def _sizes(self) -> list[int]:
        """Bytes of the integers, the scales, the zero points."""
        zeros = 0 if self.grid.symmetric else self.zeros.numel()
        integers, zeros = (-(-count * self.grid.bits // 8) for count in (self.integers.numel(), zeros))
        return [integers, self.scales.numel() * self.scales.element_size(), zeros]


def quantise_weight(
    w: Tensor,
    grid: Grid,
    granularity: Granularity = "channel",
    low_high: LowHigh = min_max,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantised:
    """Return a weight ``[outputs, ...]`` as integers, with a scale for the tensor, each output, or each group.

    Parameters
    ----------
    granularity : ``"tensor"``, ``"channel"`` (an output, dimension 0), or a number of neighbouring inputs that share a
        scale (of a convolution: of its row ``[inputs * kernel height * kernel width]``).
    low_high : gives the range to cover; ``calibration`` has others than the whole of it.
    scale_dtype : in which the scales are stored. They are rounded to it first, so that the integers fit.

    Raises
    ------
    ValueError : the weight has fewer than two dimensions, no element, or NaN or infinity in it; the granularity is none
        of the three; or a scale is 0 or infinite in ``scale_dtype``.
    """
    require("w", tuple(w.shape), lambda shape: len(shape) > 1 and w.numel() > 0, "a weight [outputs, inputs, ...]")
    w, dtype = _wide(w.detach()), w.dtype
    group = _group_size(w, granularity)
    samples = w.reshape(1, -1) if granularity == "tensor" else w.flatten(1)
    low, high = _ranges(samples, group, grid, low_high)
    scales, zeros = scale_and_zero(low, high, grid)
    scales = scales.to(scale_dtype)
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError(f"scale_dtype={scale_dtype}: must hold all scales, {float(low.min())} to {float(high.max())}")
    blank = Quantised(torch.empty_like(w, dtype=torch.int32), scales, zeros, group, grid, dtype)
    integers = quantise(w, blank.spread(scales).to(w.dtype), blank.spread(zeros), grid)
    return Quantised(integers, scales, zeros, group, grid, dtype)


def _ranges(samples: Tensor, group: int, grid: Grid, low_high: LowHigh) -> tuple[Tensor, Tensor]:
    """Rows ``[rows, columns]`` to the lows and highs ``[rows, groups]``; a last group that is shorter counts too."""
    whole = samples.shape[1] // group * group
    parts = [samples[:, :whole].unflatten(1, (-1, group))] if whole else []
    if whole < samples.shape[1]:
        parts.append(samples[:, None, whole:])
    lows, highs = zip(*(low_high(part, grid) for part in parts), strict=True)
    return torch.cat(lows, 1), torch.cat(highs, 1)


def _group_size(w: Tensor, granularity: Granularity) -> int:
    allowed = "'tensor', 'channel' or a whole number of at least 1"
    require("granularity", granularity, lambda g: g in ("tensor", "channel") or (is_whole(g) and g > 0), allowed)
    if granularity == "tensor":
        return w.numel()
    return w[0].numel() if granularity == "channel" else min(int(granularity), w[0].numel())


# --- Bits -------------------------------------------------------------------------------------------------------------


def pack(values: Tensor, bits: int) -> Tensor:
    """Return integers of 0 to ``2**bits - 1`` as bytes, uint8: the lowest bit of the
    first comes first, no gaps.

    The last byte is filled up with zeros. ``n`` values of 3 bits take ``ceil(3 n / 8)``
    bytes.

    Raises
    ------
    ValueError : a value does not fit into so many bits, or there are not 1 to 16 of
        them.
    """
    _check_bits(bits)
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 2**bits:
        least, most = int(values.min()), int(values.max())
        raise ValueError(f"values of {least} to {most}: must be 0 to {2**bits - 1}")
    places = torch.arange(bits, device=values.device)
    stream = (values.flatten()[:, None].to(torch.int32) >> places & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8))
    bytes_ = stream.view(-1, 8) << torch.arange(8, device=values.device)
    return bytes_.sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` integers, int32 ``[count]``, out of the bytes that
    ``pack`` made.

    Raises
    ------
    ValueError : there are fewer bytes than that takes, or not 1 to 16 bits.
    """
    _check_bits(bits)
    if 8 * packed.numel() < count * bits:
        most = 8 * packed.numel() // bits
        raise ValueError(f"count={count}: must be at most the {most} values that were packed")
    places = torch.arange(8, device=packed.device)
    stream = (packed.flatten()[:, None].to(torch.int32) >> places & 1).flatten()
    powers = torch.arange(bits, device=packed.device)
    values = stream[: count * bits].view(count, bits) << powers
    return values.sum(1).to(torch.int32)


# --- How large the error is -------------------------------------------------------------------------------------------


def rounding_error(scale: Real) -> Real:
    r"""Return the mean squared error to expect of rounding to multiples of ``scale``,
    :math:`s^2 / 12`.

    That is the variance of an error which is anywhere between :math:`-s/2` and
    :math:`s/2` with equal chance. Each bit more halves s, so the error falls by a
    factor of 4: 6.02 dB.
    """
    return scale * scale / 12


def signal_to_noise(x: Tensor, y: Tensor) -> float:
    r"""Return how much larger ``x`` is than the error of ``y``, in decibels.

    That is :math:`10 \log_{10} (\|x\|^2 / \|x - y\|^2)`; infinite where ``y`` is ``x``.

    Raises
    ------
    ValueError : the shapes differ.
    """
    shape = tuple(x.shape)
    require("y", tuple(y.shape), shape.__eq__, f"a tensor of the shape {shape}")
    x, y = x.detach().double(), y.detach().double()
    signal, noise = x.square().sum(), (x - y).square().sum()
    return float(10 * torch.log10(signal / noise))


# --- Inside -----------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _checked_range(low: Real, high: Real) -> tuple[Tensor, Tensor]:
    usual = torch.get_default_dtype()
    ends = [_wide(x) if isinstance(x, Tensor) else torch.tensor(float(x), dtype=usual) for x in (low, high)]
    first, last = torch.broadcast_tensors(*ends)
    if not bool((first.isfinite() & last.isfinite() & (first <= last)).all()):
        raise ValueError(f"low={low}, high={high}: must be finite, and low at most high")
    return first, last


def _check_bits(bits: int) -> None:
    require("bits", bits, lambda n: is_whole(n) and 1 <= n <= 16, "a whole number of 1 to 16")
