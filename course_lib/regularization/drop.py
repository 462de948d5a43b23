r"""Noise that switches off: numbers, channels, weights, blocks of pixels, whole branches.

==========================  ==========================================================  ================================
name                        what is switched off                                        source
==========================  ==========================================================  ================================
``dropout``                 single numbers                                              Srivastava et al. 2014, JMLR 15
``gaussian_dropout``        nothing: a normal factor of the same mean and variance      Srivastava et al. 2014, sect. 10
``dropout2d``               whole channels of an image                                  Tompson et al. 2014,
                                                                                        arXiv:1411.4280
``drop_block2d``            squares of a channel                                        Ghiasi et al. 2018,
                                                                                        arXiv:1810.12890
``stochastic_depth``        a whole residual branch                                     Huang et al. 2016,
                                                                                        arXiv:1603.09382
``drop_connect``            single weights, for each example others                     Wan et al., ICML 2013
``Dropout``, …, ``Drop-``   the same as modules, which rest in evaluation mode
``Connect``
==========================  ==========================================================  ================================

What stays is divided by the chance to stay, so that the mean is what it was and evaluation needs no correction. ``p``
is the chance to be switched off. Arguments as of the namesakes in torch and torchvision, and a ``generator`` beside
them; without one the draws are those of the namesakes to the bit, on the CPU.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.regularization.drawing import bernoulli, check_chance, normal

Mode = Literal["batch", "row"]
"""One draw for the whole batch, or one for each example."""


def kept(shape: tuple[int, ...], p: float, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return factors of mean 1: 0 with probability ``p``, else ``1 / (1 - p)``; all are 0 where ``p`` is 1."""
    check_chance(p=p)
    mask = bernoulli(shape, 1 - p, like, generator)
    return mask.div_(1 - p) if p < 1 else mask


def dropout(x: Tensor, p: float = 0.5, training: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """Switch off each number of ``x`` with probability ``p``; as ``F.dropout``.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to 1.
    """
    check_chance(p=p)
    return x * kept(tuple(x.shape), p, x, generator) if training and p else x


def gaussian_dropout(
    x: Tensor, p: float = 0.5, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    r"""Multiply each number by one of :math:`\mathcal{N}(1, p/(1-p))`: the mean and variance of dropout's factors.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to below 1.
    """
    require("p", p, lambda value: value != 1, "below 1")
    check_chance(p=p)
    return x * (1 + (p / (1 - p)) ** 0.5 * normal(tuple(x.shape), x, generator)) if training and p else x


def dropout2d(x: Tensor, p: float = 0.5, training: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """Switch off whole channels of images ``[N, C, H, W]``; as ``F.dropout2d``.

    Neighbouring pixels say nearly the same: with one of them off the others tell what it was, and little is lost.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to 1, or ``x`` is no batch of images.
    """
    check_chance(p=p)
    _check_images(x)
    return x * kept((*x.shape[:2], 1, 1), p, x, generator) if training and p else x


def drop_block2d(
    x: Tensor, p: float, block_size: int, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    r"""Switch off squares of ``block_size`` pixels in images ``[N, C, H, W]``; as ``torchvision.ops.drop_block2d``.

    Corners of squares are drawn wherever a square fits, each with probability

    .. math:: \gamma=\frac{p}{b^2}\cdot\frac{HW}{(H-b+1)(W-b+1)}

    so that about ``p`` of the pixels are off (somewhat fewer, since squares overlap). What stays is scaled by the share
    that stayed in this draw. A block larger than the image counts as the image's smaller side. torchvision takes odd
    ``block_size`` alone.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to 1, ``block_size`` below 1, or ``x`` is no batch of images.
    """
    check_chance(p=p)
    at_least(1, block_size=block_size)
    _check_images(x)
    if not training or p == 0:
        return x
    n, c, height, width = x.shape
    b = min(block_size, height, width)
    rows, columns = height - b + 1, width - b + 1
    gamma = min(1.0, p * height * width / (b**2 * rows * columns))
    corners = bernoulli((n, c, rows, columns), gamma, x, generator)
    # a pixel is off if any of the b x b corners whose square reaches it is drawn
    on = 1 - F.max_pool2d(F.pad(corners, [b - 1] * 4), kernel_size=b, stride=1)
    return x * on * (on.numel() / (1e-6 + on.sum()))


def stochastic_depth(
    x: Tensor, p: float, mode: Mode = "row", training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Switch off a residual branch ``x`` ``[N, …]``, for some examples or for all; as torchvision's.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to 1, or ``mode`` neither "batch" nor "row".
    """
    check_chance(p=p)
    require("mode", mode, lambda m: m in ("batch", "row"), "'batch' or 'row'")
    if not training or p == 0:
        return x
    count = len(x) if mode == "row" else 1
    return x * kept((count, *[1] * (x.ndim - 1)), p, x, generator)


def drop_connect(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return ``F.linear(x, weight, bias)``, ``[N, in] -> [N, out]``, with weights switched off, others each example.

    It holds ``N * out * in`` numbers. The paper evaluates by sampling from a normal law of the same moments; this is
    its mean, as for dropout.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to 1, or ``x`` no matrix.
    """
    check_chance(p=p)
    if x.ndim != 2:
        raise ValueError(f"x has the shape {list(x.shape)}: must be [N, in]")
    if not training or p == 0:
        return F.linear(x, weight, bias)
    y = torch.einsum("ni,noi->no", x, weight * kept((len(x), *weight.shape), p, weight, generator))
    return y if bias is None else y + bias


def _check_images(x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has the shape {list(x.shape)}: must be [N, C, H, W]")


# --- As modules -------------------------------------------------------------------------------------------------------


class _Drop(nn.Module):
    """A chance and a generator; each use in training mode draws anew."""

    def __init__(self, p: float = 0.5, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_chance(p=p)
        self.p, self.generator = p, generator

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class Dropout(_Drop):
    """``dropout`` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return dropout(x, self.p, self.training, self.generator)


class GaussianDropout(_Drop):
    """``gaussian_dropout`` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return gaussian_dropout(x, self.p, self.training, self.generator)


class Dropout2d(_Drop):
    """``dropout2d`` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return dropout2d(x, self.p, self.training, self.generator)


class DropBlock2d(_Drop):
    """``drop_block2d`` as a module."""

    def __init__(self, p: float, block_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__(p, generator)
        at_least(1, block_size=block_size)
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        return drop_block2d(x, self.p, self.block_size, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, block_size={self.block_size}"


class StochasticDepth(_Drop):
    """``stochastic_depth`` as a module, for the output of a residual branch."""

    def __init__(self, p: float, mode: Mode = "row", generator: torch.Generator | None = None) -> None:
        super().__init__(p, generator)
        require("mode", mode, lambda m: m in ("batch", "row"), "'batch' or 'row'")
        self.mode: Mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …]`` to the same shape."""
        return stochastic_depth(x, self.p, self.mode, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, mode={self.mode!r}"


class DropConnect(nn.Linear):
    """``drop_connect`` as a linear layer: the arguments, parameters and evaluation of ``nn.Linear``."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        p: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        check_chance(p=p)
        self.p, self.generator = p, generator

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in]`` to ``[N, out]``."""
        return drop_connect(x, self.weight, self.bias, self.p, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p:g}"
