r"""Re-parameterisation: branches that help while a network trains, and the one convolution that they become afterwards.

=======================  ==============================================  =============================================
name                     what it does or gives                           source
=======================  ==============================================  =============================================
``repvgg_block``         3 x 3 + 1 x 1 + identity, each with batch norm  Ding et al. 2021 (RepVGG), arXiv:2101.03697
``asymmetric_block``     3 x 3 + 1 x 3 + 3 x 1, each with batch norm     Ding et al. 2019 (ACNet), arXiv:1908.03930
``expanded_block``       1 x 1 to many channels, 3 x 3 back              Guo, Alvarez & Salzmann 2018 (ExpandNets),
                                                                         arXiv:1811.10495
``fold``                 a convolution and batch norm as one             Jacob et al. 2017, arXiv:1712.05877
``padded``               a small kernel as the middle of a large one     Ding et al. 2019
``identity_kernel``      the convolution that changes nothing            Ding et al. 2021
``in_parallel``          a sum of convolutions as one                    Ding et al. 2019
``in_sequence``          1 x 1 and then k x k as one                     Guo, Alvarez & Salzmann 2018
``repvgg``               a network of such blocks
``reparameterise``       its copy, with one convolution for each block
=======================  ==============================================  =============================================

All rests on one fact: a convolution is linear in its kernel, so

.. math:: W_1 * x + W_2 * x = (W_1 + W_2) * x \qquad W_2 * (W_1 * x) = (W_2 \circ W_1) * x

and batch norm, once its statistics stand still, is linear too. The many-branched network and the plain one compute the
same function; only their gradients differ, so they must be merged after training and not before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from course_lib.efficiency.cheap_layers import conv_norm
from course_lib.lab.arguments import at_least, require
from course_lib.lab.models import Network

# --- Kernels ----------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A convolution as tensors: the weight ``[N, M / groups, k, k]`` and the bias ``[N]``."""

    weight: Tensor
    bias: Tensor


def fold(weight: Tensor, norm: nn.BatchNorm2d) -> Kernel:
    r"""Return the convolution that gives what ``weight`` and then batch norm give, its
    statistics as they stand.

    .. math:: W' = \frac{\gamma}{\sqrt{\sigma^2 + \varepsilon}}\,W \qquad
        b' = \beta - \frac{\gamma\,\mu}{\sqrt{\sigma^2 + \varepsilon}}

    Raises
    ------
    ValueError : the batch norm has no running statistics.
    """
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("norm: must have running statistics (track_running_stats=True)")
    gamma, beta = norm.weight, norm.bias
    folded = fuse_conv_bn_weights(weight, None, mean, var, norm.eps, gamma, beta)
    return Kernel(folded[0].detach(), folded[1].detach())


def padded(weight: Tensor, kernel: int) -> Tensor:
    """Put a small kernel into the middle of zeros: ``[N, M, h, w]`` to
    ``[N, M, kernel, kernel]``.

    The same convolution, if the input is padded by as many more places.

    Raises
    ------
    ValueError : the small kernel is larger, or one is odd and the other even.
    """
    spare = [kernel - size for size in weight.shape[-2:]]
    fits = all(each >= 0 and each % 2 == 0 for each in spare)
    require("kernel", kernel, lambda _: fits, f"{tuple(weight.shape[-2:])} or more by even numbers")
    high, wide = (each // 2 for each in spare)
    return F.pad(weight, (wide, wide, high, high))


def identity_kernel(channels: int, kernel: int, like: Tensor) -> Tensor:
    """Return the weight ``[C, C, kernel, kernel]`` of a convolution that changes nothing:
    1 in the middle, from each channel to itself, in the type and on the device of
    ``like``.
    """
    weight = like.new_zeros(channels, channels, kernel, kernel)
    each = torch.arange(channels, device=like.device)
    weight[each, each, kernel // 2, kernel // 2] = 1
    return weight


def in_parallel(kernels: Iterable[Kernel]) -> Kernel:
    """Return the one convolution whose output is the sum of theirs: the sum of weights and
    of biases.
    """
    weights, biases = zip(*kernels, strict=True)
    return Kernel(sum(weights[1:], weights[0]), sum(biases[1:], biases[0]))


def in_sequence(first: Tensor, second: Kernel) -> Kernel:
    """Return the one convolution that does a 1 x 1 convolution and then another.

    The first must have no bias. If it had, the second would see it everywhere but in
    the padding, and no single convolution does so.

    Parameters
    ----------
    first : ``[K, M, 1, 1]``.
    second : a weight ``[N, K, k, k]`` and its bias.

    Raises
    ------
    ValueError : the first is not 1 x 1, or their channels do not fit.
    """
    shape = tuple(first.shape)
    fits = shape[2:] == (1, 1) and shape[0] == second.weight.shape[1]
    require("first", shape, lambda _: fits, f"({second.weight.shape[1]}, M, 1, 1)")
    weight = torch.einsum("nkhw,km->nmhw", second.weight, first[:, :, 0, 0])
    return Kernel(weight, second.bias)


# --- Blocks -----------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """A sum of linear branches, then ReLU. Each branch ends in batch norm.

    Parameters
    ----------
    branches : batch norm alone (the identity), or ``nn.Sequential`` of convolutions without activation and batch norm.
    channels : of the output.
    kernel : of the convolution that they can become.
    stride : of each branch as a whole.

    Raises
    ------
    ValueError : there is no branch.
    """

    def __init__(self, branches: Sequence[nn.Module], channels: int, *, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        require("branches", [*branches], bool, "at least one branch")
        self.branches = nn.ModuleList(branches)
        self.channels, self.kernel, self.stride = channels, kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """``[B, M, H, W]`` to ``[B, N, H / stride, W / stride]``."""
        first, *others = self.branches
        return F.relu(sum((branch(x) for branch in others), first(x)))

    def merged(self) -> nn.Sequential:
        """Return one convolution and ReLU that give what the block gives in evaluation mode."""
        weight, bias = in_parallel(branch_kernel(branch, self.kernel) for branch in self.branches)
        inputs, padding = weight.shape[1], self.kernel // 2
        layer = nn.Conv2d(inputs, self.channels, self.kernel, self.stride, padding).to(weight)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return nn.Sequential(layer, nn.ReLU()).train(self.training)


@torch.no_grad()
def branch_kernel(branch: nn.Module, kernel: int) -> Kernel:
    """Return a branch of ``Branches`` as one convolution with a ``kernel`` x ``kernel``
    kernel.

    Raises
    ------
    ValueError : it is none of the three forms, or one of its convolutions has a bias,
        groups, dilation, or another padding than half its kernel.
    """
    match [*branch] if isinstance(branch, nn.Sequential) else [branch]:
        case [nn.BatchNorm2d() as norm]:
            like = next(iter(norm.buffers()))
            return fold(identity_kernel(norm.num_features, kernel, like), norm)
        case [nn.Conv2d() as conv, nn.BatchNorm2d() as norm]:
            return fold(padded(_plain(conv), kernel), norm)
        case [nn.Conv2d() as first, nn.Conv2d() as conv, nn.BatchNorm2d() as norm]:
            second = fold(padded(_plain(conv), kernel), norm)
            return in_sequence(_plain(first, stride=(1, 1)), second)
    raise ValueError(f"branch={branch}: must be batch norm, or Conv2d once or twice and it")


def _plain(conv: nn.Conv2d, stride: tuple[int, ...] | None = None) -> Tensor:
    """The weight of a convolution that the formulas above hold for."""
    same = conv.padding == tuple(size // 2 for size in conv.kernel_size)
    holds = conv.bias is None and conv.groups == 1 and conv.dilation == (1, 1) and same
    allowed = "without bias, groups and dilation, padded by half its kernel"
    require("branch", conv, lambda c: holds and (stride is None or c.stride == stride), allowed)
    return conv.weight


def repvgg_block(channels_in: int, channels_out: int, stride: int = 1) -> Branches:
    """3 x 3, 1 x 1 and, where the shape stays, the identity, each with batch norm; the
    sum, then ReLU.
    """
    branches: list[nn.Module] = [
        nn.Sequential(*conv_norm(channels_in, channels_out, 3, stride)),
        nn.Sequential(*conv_norm(channels_in, channels_out, 1, stride)),
    ]
    if stride == 1 and channels_in == channels_out:
        branches.append(nn.BatchNorm2d(channels_out))
    return Branches(branches, channels_out, stride=stride)


def asymmetric_block(channels_in: int, channels_out: int, stride: int = 1) -> Branches:
    """3 x 3, 1 x 3 and 3 x 1, each with batch norm; the sum, then ReLU: a cross of more
    weight in the middle of the kernel.
    """

    def branch(high: int, wide: int) -> nn.Sequential:
        padding = (high // 2, wide // 2)
        layer = nn.Conv2d(channels_in, channels_out, (high, wide), stride, padding, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(channels_out))

    branches = [branch(3, 3), branch(1, 3), branch(3, 1)]
    return Branches(branches, channels_out, stride=stride)


def expanded_block(
    channels_in: int, channels_out: int, stride: int = 1, expansion: int = 4
) -> Branches:  # fmt: skip
    """1 x 1 to ``expansion * channels_in`` channels and 3 x 3 back, nothing between them;
    batch norm, ReLU.
    """
    at_least(1, expansion=expansion)
    wide = expansion * channels_in
    first = nn.Conv2d(channels_in, wide, 1, bias=False)
    layers = nn.Sequential(first, *conv_norm(wide, channels_out, 3, stride))
    return Branches([layers], channels_out, stride=stride)


def plain_block(channels_in: int, channels_out: int, stride: int = 1) -> Branches:
    """3 x 3 alone, with batch norm, then ReLU: what the others are compared with."""
    return Branches([nn.Sequential(*conv_norm(channels_in, channels_out, 3, stride))], channels_out, stride=stride)


BLOCKS = {
    "plain": plain_block,
    "repvgg": repvgg_block,
    "asymmetric": asymmetric_block,
    "expanded": expanded_block,
}

# --- Networks ---------------------------------------------------------------------------------------------------------


def repvgg(
    input_shape: Sequence[int], classes: int, *, width: int = 16, depth: int = 2, block: str = "repvgg"
) -> RepVGG:
    """Return a network of three stages of ``depth`` blocks, a mean over all places, a linear layer.

    The stages have ``width``, ``2 width`` and ``4 width`` channels; each after the first begins with stride 2. Merged,
    it is nothing but 3 x 3 convolutions and ReLU.

    Parameters
    ----------
    block : a name in ``BLOCKS``; after ``reparameterise`` all have the same shape.

    Raises
    ------
    ValueError : the block is unknown, or a number below 1.
    """
    shape = tuple(input_shape)
    require("input_shape", shape, lambda s: len(s) == 3, "(channels, height, width)")
    require("block", block, lambda name: name in BLOCKS, f"one of {', '.join(BLOCKS)}")
    at_least(1, classes=classes, width=width, depth=depth)
    return RepVGG(shape, classes, width, depth, block)


class RepVGG(Network):
    """See ``repvgg``."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int, depth: int, block: str) -> None:
        super().__init__("repvgg", input_shape, classes)
        blocks, channels = [], input_shape[0]
        for stage in range(3):
            for number in range(depth):
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(BLOCKS[block](channels, width * 2**stage, stride))
                channels = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, 4 width]``."""
        return self.pool(self.blocks(x)).flatten(1)


def reparameterise(model: nn.Module) -> nn.Module:
    """Return a copy in which each ``Branches`` is the one convolution that it amounts to
    in evaluation mode.

    Raises
    ------
    ValueError : there is none.
    """
    made = copy.deepcopy(model)
    if isinstance(made, Branches):
        return made.merged()
    found = [name for name, part in made.named_modules() if isinstance(part, Branches)]
    require("model", found, bool, "a network with Branches in it")
    for name in found:
        block = made.get_submodule(name)
        assert isinstance(block, Branches)
        owner, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(owner), attribute, block.merged())
    return made
