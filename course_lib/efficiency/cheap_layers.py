r"""Cheaper layers: a full convolution factored into parts that multiply less, what they cost, and networks of them.

=========================  ============================================  =============================================
name                       what it does or gives                         source
=========================  ============================================  =============================================
``full``                   one k x k convolution over all channels
``depthwise_separable``    k x k within each channel, 1 x 1 across       Howard et al. 2017 (MobileNet),
                                                                         arXiv:1704.04861
``bottleneck``             k x k on a quarter of the channels            He et al. 2015, arXiv:1512.03385
``shuffle_unit``           1 x 1 within groups, which are then mixed     Zhang et al. 2017 (ShuffleNet),
                                                                         arXiv:1707.01083
``inverted_residual``      k x k on many channels, each by itself,       Sandler et al. 2018 (MobileNetV2),
                           between two narrow ends                       arXiv:1801.04381
``channel_shuffle``        deals the channels of each group round        Zhang et al. 2017
``full_cost``, …           parameters and multiplications of each,       the papers above
                           in closed form
``family``                 a network of any of these blocks
``family_cost``            what it costs, in closed form
``width_for``              the width that a budget buys
=========================  ============================================  =============================================

With M channels in, N out and a kernel of k x k, a full convolution multiplies :math:`k^2MN` times for each place of its
output, a depthwise-separable one :math:`k^2M+MN` times: the share :math:`1/N+1/k^2`. Each block has batch norm behind
every convolution, takes ``[B, M, H, W]`` and gives ``[B, N, ceil(H / stride), ceil(W / stride)]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.arguments import at_least, require
from course_lib.lab.models import Network

# --- The parts --------------------------------------------------------------------------------------------------------

GROUPS = 2
"""Groups of a ``shuffle_unit``'s 1 x 1 convolutions."""
REDUCTION = 4
"""How many times as narrow the middle of a ``bottleneck`` and of a ``shuffle_unit`` is as its output."""
EXPANSION = 4
"""How many times as wide the middle of an ``inverted_residual`` is as its input."""


def conv_norm(
    channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a convolution that keeps the size of the image (but for its stride), and batch norm.

    Raises
    ------
    ValueError : a number is below 1, the kernel is even, or the groups do not divide the channels.
    """
    at_least(1, channels_in=channels_in, channels_out=channels_out, kernel=kernel, stride=stride, groups=groups)
    require("kernel", kernel, lambda k: k % 2 == 1, "odd, so that it has a centre")
    fits = channels_in % groups == 0 and channels_out % groups == 0
    require("groups", groups, lambda _: fits, f"a divisor of the channels, {channels_in} and {channels_out}")
    # no bias: the batch norm behind it subtracts it again
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(channels_out)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal channels round, so that each group of the next layer has some of every group of this one.

    ``[N, C, H, W]`` to the same shape; channel ``g * C / groups + i`` becomes channel ``i * groups + g``.

    Raises
    ------
    ValueError : the groups do not divide the channels.
    """
    at_least(1, groups=groups)
    require("groups", groups, lambda g: x.shape[1] % g == 0, f"a divisor of the {x.shape[1]} channels")
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


# --- The blocks -------------------------------------------------------------------------------------------------------


def full(
    channels_in: int, channels_out: int, stride: int = 1, kernel: int = 3
) -> nn.Sequential:  # fmt: skip
    """One convolution over all channels, batch norm, ReLU."""
    layers = conv_norm(channels_in, channels_out, kernel, stride)
    return nn.Sequential(*layers, nn.ReLU())


def depthwise_separable(
    channels_in: int, channels_out: int, stride: int = 1, kernel: int = 3
) -> nn.Sequential:  # fmt: skip
    """A convolution within each channel, then a 1 x 1 convolution across them, each with
    batch norm and ReLU.
    """
    within = conv_norm(channels_in, channels_in, kernel, stride, groups=channels_in)
    across = conv_norm(channels_in, channels_out)
    return nn.Sequential(*within, nn.ReLU(), *across, nn.ReLU())


class Residual(nn.Module):
    """A function beside a shortcut: ``last(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.last = body, shortcut, last

    def forward(self, x: Tensor) -> Tensor:
        """``[B, M, H, W]`` to ``[B, N, H / stride, W / stride]``."""
        return self.last(self.body(x) + self.shortcut(x))


def bottleneck(
    channels_in: int, channels_out: int, stride: int = 1, kernel: int = 3
) -> Residual:  # fmt: skip
    """1 x 1 to ``channels_out / REDUCTION`` channels, k x k there, 1 x 1 back, beside a
    shortcut.

    The stride is that of the k x k convolution, as in torchvision. Where the shape
    changes the shortcut is a 1 x 1 convolution.
    """
    middle = _divided(channels_out, REDUCTION)
    body = nn.Sequential(
        *conv_norm(channels_in, middle), nn.ReLU(),
        *conv_norm(middle, middle, kernel, stride), nn.ReLU(),
        *conv_norm(middle, channels_out),
    )  # fmt: skip
    shortcut: nn.Module = nn.Identity()
    if stride != 1 or channels_in != channels_out:
        shortcut = nn.Sequential(*conv_norm(channels_in, channels_out, 1, stride))
    return Residual(body, shortcut, nn.ReLU())


def inverted_residual(
    channels_in: int, channels_out: int, stride: int = 1, kernel: int = 3
) -> nn.Module:  # fmt: skip
    """1 x 1 to ``EXPANSION * channels_in`` channels, k x k within each of them, 1 x 1 to
    few again.

    Nothing is cut off at the narrow end: a ReLU there would lose what few channels
    hold. A shortcut where the shape stays.
    """
    middle = EXPANSION * channels_in
    body = nn.Sequential(
        *conv_norm(channels_in, middle), nn.ReLU6(),
        *conv_norm(middle, middle, kernel, stride, groups=middle), nn.ReLU6(),
        *conv_norm(middle, channels_out),
    )  # fmt: skip
    if stride != 1 or channels_in != channels_out:
        return body
    return Residual(body, nn.Identity(), nn.Identity())


class ShuffleUnit(nn.Module):
    """See ``shuffle_unit``."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, kernel: int) -> None:
        super().__init__()
        added = channels_in if stride != 1 or channels_in != channels_out else 0
        require("channels_out", channels_out, lambda n: n > added, f"more than channels_in={channels_in} here")
        middle = _divided(channels_out, REDUCTION)
        self.reduce = nn.Sequential(*conv_norm(channels_in, middle, groups=GROUPS), nn.ReLU())
        self.within = nn.Sequential(*conv_norm(middle, middle, kernel, stride, groups=middle))
        self.expand = nn.Sequential(*conv_norm(middle, channels_out - added, groups=GROUPS))
        self.pool = nn.AvgPool2d(3, stride, padding=1) if added else None

    def forward(self, x: Tensor) -> Tensor:
        """``[B, M, H, W]`` to ``[B, N, H / stride, W / stride]``."""
        z = channel_shuffle(self.reduce(x), GROUPS)
        z = self.expand(self.within(z))
        return F.relu(x + z if self.pool is None else torch.cat([self.pool(x), z], dim=1))


def shuffle_unit(
    channels_in: int, channels_out: int, stride: int = 1, kernel: int = 3
) -> ShuffleUnit:  # fmt: skip
    """1 x 1 within groups to ``channels_out / REDUCTION`` channels, a shuffle, k x k
    within each channel, 1 x 1 within groups.

    The result is added to the input where the shape stays; elsewhere it is put beside
    the mean of 3 x 3 places of it, which costs no multiplication.

    Raises
    ------
    ValueError : the shape changes and ``channels_out`` is no more than ``channels_in``.
    """
    return ShuffleUnit(channels_in, channels_out, stride, kernel)


# --- What they cost ---------------------------------------------------------------------------------------------------


class LayerCost(NamedTuple):
    """Numbers that training may change, and multiplications for one example.

    Those of the convolutions and of the last layer alone, as everywhere; ``lab.costs.flops`` counts two for each, one
    for the addition.
    """

    parameters: int
    multiplications: int

    def plus(self, other: LayerCost) -> LayerCost:
        """Both together."""
        return LayerCost(self.parameters + other.parameters, self.multiplications + other.multiplications)


Size = tuple[int, int]
"""Height and width of an image."""


def conv_cost(
    m: int, n: int, size: Size, stride: int = 1, kernel: int = 1, groups: int = 1
) -> LayerCost:  # fmt: skip
    r"""Return the cost of a convolution with batch norm: :math:`k^2MN/g` weights, each used once a place.

    Parameters
    ----------
    m, n : channels in and out.
    size : of the input.
    """
    height, width = strided(size, stride)
    weights = kernel**2 * m * n // groups
    return LayerCost(weights + 2 * n, weights * height * width)


def strided(size: Size, stride: int) -> Size:
    """Return the size of what a convolution with this stride gives: rounded up."""
    return -(-size[0] // stride), -(-size[1] // stride)


def full_cost(
    m: int, n: int, size: Size, stride: int = 1, kernel: int = 3
) -> LayerCost:  # fmt: skip
    r"""Return :math:`k^2MN` for each place of the output."""
    return conv_cost(m, n, size, stride, kernel)


def depthwise_separable_cost(
    m: int, n: int, size: Size, stride: int = 1, kernel: int = 3
) -> LayerCost:  # fmt: skip
    r"""Return :math:`k^2M+MN` for each place of the output."""
    height, width = strided(size, stride)
    weights = kernel**2 * m + m * n
    return LayerCost(weights + 2 * (m + n), weights * height * width)


def bottleneck_cost(
    m: int, n: int, size: Size, stride: int = 1, kernel: int = 3
) -> LayerCost:  # fmt: skip
    r"""Return :math:`Mb` for each place of the input and :math:`k^2b^2+bN` of the output,
    with :math:`b=N/4`; MN more where the shape changes.
    """
    b, small = _divided(n, REDUCTION), strided(size, stride)
    projects = stride != 1 or m != n
    inside, after = m * b, kernel**2 * b**2 + b * n + m * n * projects
    norms = 2 * (2 * b + n + n * projects)
    places = size[0] * size[1], small[0] * small[1]
    return LayerCost(inside + after + norms, inside * places[0] + after * places[1])


def inverted_residual_cost(
    m: int, n: int, size: Size, stride: int = 1, kernel: int = 3
) -> LayerCost:  # fmt: skip
    r"""Return :math:`tM^2` for each place of the input and :math:`k^2tM+tMN` of the
    output, with the expansion t.
    """
    wide, small = EXPANSION * m, strided(size, stride)
    inside, after = m * wide, kernel**2 * wide + wide * n
    places = size[0] * size[1], small[0] * small[1]
    norms = 2 * (2 * wide + n)
    return LayerCost(inside + after + norms, inside * places[0] + after * places[1])


def shuffle_unit_cost(
    m: int, n: int, size: Size, stride: int = 1, kernel: int = 3
) -> LayerCost:  # fmt: skip
    r"""Return :math:`Mb/g` for each place of the input and :math:`k^2b+bN'/g` of the
    output, with :math:`b=N/4` and g groups.

    :math:`N'` are the channels that are computed: N, or N - M beside the pooled input.
    """
    b, small = _divided(n, REDUCTION), strided(size, stride)
    computed = n - m if stride != 1 or m != n else n
    inside, after = m * b // GROUPS, kernel**2 * b + b * computed // GROUPS
    places = size[0] * size[1], small[0] * small[1]
    norms = 2 * (2 * b + computed)
    return LayerCost(inside + after + norms, inside * places[0] + after * places[1])


# --- Networks of them -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A kind of block: how it is built, what it costs, and of what the channels must be a multiple."""

    build: Callable[..., nn.Module]
    cost: Callable[..., LayerCost]
    multiple: int = 1


BLOCKS = {
    "full": Block(full, full_cost),
    "depthwise_separable": Block(depthwise_separable, depthwise_separable_cost),
    "bottleneck": Block(bottleneck, bottleneck_cost, REDUCTION),
    "shuffle_unit": Block(shuffle_unit, shuffle_unit_cost, REDUCTION * GROUPS),
    "inverted_residual": Block(inverted_residual, inverted_residual_cost),
}


class Place(NamedTuple):
    """A block's place in a network: channels in and out, the size of its input, its stride."""

    channels_in: int
    channels_out: int
    size: Size
    stride: int


def family(
    input_shape: Sequence[int], classes: int, *, block: str = "full", width: int = 16, depth: int = 1, kernel: int = 3
) -> CheapNet:
    """Return a network of one kind of block: a stem, three stages of ``depth`` blocks, a mean, a linear layer.

    The stages have ``width``, ``2 width`` and ``4 width`` channels; each after the first begins with stride 2. The stem
    is a full 3 x 3 convolution whatever the blocks are: from so few channels there is nothing to separate.

    Parameters
    ----------
    block : a name in ``BLOCKS``.
    kernel : of the blocks.

    Raises
    ------
    ValueError : the block is unknown, the width no multiple of what it needs, or a number below 1.
    """
    shape = _checked(input_shape, block, width, depth)
    at_least(1, classes=classes)
    return CheapNet(shape, classes, block, width, depth, kernel)


class CheapNet(Network):
    """See ``family``."""

    def __init__(
        self, input_shape: tuple[int, int, int], classes: int, block: str, width: int, depth: int, kernel: int
    ) -> None:
        super().__init__(block, input_shape, classes)
        self.stem = full(input_shape[0], width)
        build = BLOCKS[block].build
        self.blocks = nn.Sequential(
            *(build(p.channels_in, p.channels_out, p.stride, kernel) for p in places(input_shape[1:], width, depth))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, classes)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, 4 width]``."""
        return self.pool(self.blocks(self.stem(x))).flatten(1)


def places(size: Size, width: int, depth: int) -> list[Place]:
    """Return where the blocks of a ``family`` stand, in order."""
    found, channels = [], width
    for stage in range(3):
        for number in range(depth):
            stride = 2 if stage > 0 and number == 0 else 1
            found.append(Place(channels, width * 2**stage, size, stride))
            channels, size = width * 2**stage, strided(size, stride)
    return found


def family_cost(
    input_shape: Sequence[int], classes: int, *, block: str = "full", width: int = 16, depth: int = 1, kernel: int = 3
) -> LayerCost:
    """Return what a network of ``family`` costs, in closed form: nothing is built.

    Raises
    ------
    ValueError : as ``family``.
    """
    channels, *size = _checked(input_shape, block, width, depth)
    total = full_cost(channels, width, (size[0], size[1]))
    for place in places((size[0], size[1]), width, depth):
        total = total.plus(BLOCKS[block].cost(*place, kernel))
    return total.plus(LayerCost((4 * width + 1) * classes, 4 * width * classes))


def width_for(
    multiplications: float, input_shape: Sequence[int], classes: int, *, block: str, depth: int = 1, kernel: int = 3
) -> int:
    """Return the width with which a network of ``family`` comes closest to so many multiplications.

    Raises
    ------
    ValueError : the narrowest network needs more than twice as many.
    """
    step = BLOCKS[_known(block)].multiple

    def apart(width: int) -> float:
        cost = family_cost(input_shape, classes, block=block, width=width, depth=depth, kernel=kernel)
        return cost.multiplications - multiplications

    allowed = f"at least half of what {block} needs at width {step}, {apart(step) + multiplications:.0f}"
    require("multiplications", multiplications, lambda budget: apart(step) <= budget, allowed)
    width = step
    while apart(width + step) <= 0:
        width += step
    return min(width, width + step, key=lambda w: abs(apart(w)))


# Checks at the door ---------------------------------------------------------------------------------------------------


def _checked(input_shape: Sequence[int], block: str, width: int, depth: int) -> tuple[int, int, int]:
    shape = tuple(input_shape)
    require("input_shape", shape, lambda s: len(s) == 3, "(channels, height, width)")
    at_least(1, channels=shape[0], height=shape[1], width=shape[2], depth=depth)
    at_least(1, width=width)
    multiple = BLOCKS[_known(block)].multiple
    require("width", width, lambda w: w % multiple == 0, f"a multiple of {multiple} with {block} blocks")
    return shape[0], shape[1], shape[2]


def _known(block: str) -> str:
    require("block", block, lambda name: name in BLOCKS, f"one of {', '.join(BLOCKS)}")
    return block


def _divided(channels: int, by: int) -> int:
    """The channels of a narrow middle."""
    require("channels_out", channels, lambda n: n % by == 0, f"a multiple of {by}")
    return channels // by
