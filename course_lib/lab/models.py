"""Small real networks, each a few lines of the architecture that its name promises.

===========  ===========================================================  ========================================
``mlp``      linear layers and ReLU                                       Rumelhart, Hinton & Williams 1986, Nature 323
``convnet``  3x3 convolutions, batch norm, max pooling (VGG in small)     Simonyan & Zisserman 2014, arXiv 1409.1556
``resnet``   basic residual blocks on three resolutions                   He et al. 2015, arXiv 1512.03385
``vit``      image patches as tokens, pre-norm transformer encoder        Dosovitskiy et al. 2020, arXiv 2010.11929
===========  ===========================================================  ========================================

Each takes ``(input_shape, classes)`` and normalised float images ``[N, C, H, W]``, and gives logits ``[N, classes]``;
``mlp`` takes tables as well, ``[N, D]``. ``embedding(x)`` are the features ``[N, D]`` which ``head`` turns into logits:
``model(x)`` is ``model.head(model.embedding(x))``. ``freeze`` keeps a part of a network as it is, ``thaw`` lets it go.

Weights are drawn from torch's global generator: ``seed_everything(3)`` before the call fixes them. ``torch.fx`` can
trace all of them, since nothing they do depends on the values that they see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least


class Network(nn.Module):
    """An ``nn.Module`` that knows what goes in and what comes out."""

    def __init__(self, name: str, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.name = name
        self.input_shape = input_shape
        self.classes = classes
        self.head: nn.Module

    def embedding(self, x: Tensor) -> Tensor:
        """The features ``[N, D]`` of a batch: all of the network but its last layer, ``head``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, classes]``."""
        return self.head(self.embedding(x))

    @property
    def parameter_count(self) -> int:
        """How many numbers training may change."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.input_shape)
        header = f"{self.name}: {shape} -> {self.classes} classes, {self.parameter_count:,} parameters"
        return f"{header}\n{super().__repr__()}"


# Multi-layer perceptron -----------------------------------------------------------------------------------------------


def mlp(input_shape: Sequence[int], classes: int, *, width: int = 128, depth: int = 2) -> MLP:
    """A multi-layer perceptron: ``depth`` hidden layers of ``width`` units with ReLU, then one linear layer.

    ``input_shape`` is that of an image, or ``(D,)`` for a table of ``D`` columns.
    """
    shape = _checked_columns(input_shape) if len(input_shape) == 1 else _checked_shape(input_shape)
    return MLP(shape, _whole(1, classes=classes), _whole(1, width=width), _depth(depth))


class MLP(Network):
    """See ``mlp``."""

    def __init__(self, input_shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        super().__init__("mlp", input_shape, classes)
        sizes = [math.prod(input_shape)] + [width] * depth
        self.hidden = nn.Sequential(*(layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())))
        self.head = nn.Linear(sizes[-1], classes)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` or rows ``[N, D]`` to features ``[N, width]``."""
        return self.hidden(x.flatten(1))


# Plain convolutional network ------------------------------------------------------------------------------------------


def convnet(input_shape: Sequence[int], classes: int, *, width: int = 16) -> ConvNet:
    """Three 3x3 convolutions of ``width``, ``2 width``, ``4 width`` channels, each followed by batch norm and ReLU.

    The image is halved between them by max pooling, and averaged over all places at the end.
    """
    return ConvNet(_checked_shape(input_shape, smallest=4), _whole(1, classes=classes), _whole(1, width=width))


class ConvNet(Network):
    """See ``convnet``."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, width: int) -> None:
        super().__init__("convnet", input_shape, classes)
        self.features = nn.Sequential(
            *_conv_norm_relu(input_shape[0], width),
            nn.MaxPool2d(2),
            *_conv_norm_relu(width, 2 * width),
            nn.MaxPool2d(2),
            *_conv_norm_relu(2 * width, 4 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4 * width, classes)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, 4 width]``."""
        return self.pool(self.features(x)).flatten(1)


def _conv_norm_relu(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    # no bias: the batch norm behind it subtracts it again
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()


# Residual network -----------------------------------------------------------------------------------------------------


def resnet(input_shape: Sequence[int], classes: int, *, width: int = 16, blocks: Sequence[int] = (1, 1, 1)) -> ResNet:
    """The residual network for small images of He et al. 2015 (arXiv 1512.03385, section 4.2).

    A 3x3 stem, then one stage for each entry of ``blocks``: that many basic blocks, the first of each later stage with
    stride 2 and twice the channels. ``blocks=(3, 3, 3)`` is the paper's ResNet-20. Where a block changes the shape its
    shortcut is a 1x1 convolution (the paper's option B).
    """
    blocks = tuple(blocks)
    if not blocks or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in blocks):
        raise ValueError(f"blocks must hold one positive integer for each stage, got {blocks!r}")
    shape = _checked_shape(input_shape, smallest=2 ** (len(blocks) - 1))
    return ResNet(shape, _whole(1, classes=classes), _whole(1, width=width), blocks)


class ResNet(Network):
    """See ``resnet``."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, width: int, blocks: tuple[int, ...]) -> None:
        super().__init__("resnet", input_shape, classes)
        self.stem = nn.Sequential(*_conv_norm_relu(input_shape[0], width))
        stages, channels = [], width
        for stage, count in enumerate(blocks):
            first = BasicBlock(channels, width * 2**stage, stride=1 if stage == 0 else 2)
            channels = width * 2**stage
            stages.append(nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(count - 1))))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)
        _he_initialise(self)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, channels of the last stage]``."""
        return self.pool(self.stages(self.stem(x))).flatten(1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut: ``relu(f(x) + shortcut(x))``."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, kernel_size=1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels_in, H, W]`` to ``[N, channels_out, H / stride, W / stride]``."""
        f = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(f + self.shortcut(x))


def _he_initialise(network: nn.Module) -> None:
    """Convolution weights of variance ``2 / fan_out`` (He et al. 2015, arXiv 1502.01852): ReLU keeps half of it."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# Vision transformer ---------------------------------------------------------------------------------------------------


def vit(
    input_shape: Sequence[int],
    classes: int,
    *,
    patch: int | None = None,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
) -> ViT:
    """The vision transformer of Dosovitskiy et al. 2020 (arXiv 2010.11929), with mean pooling for the class token.

    The image is cut into ``patch`` x ``patch`` squares, each a token of ``width`` numbers; ``depth`` pre-norm encoder
    blocks of ``heads`` heads follow. Without ``patch`` the smallest of 2 pixels or more that leaves 4 to 64 tokens is
    taken. Mean pooling does as well as the class token (the paper's appendix D.3).
    """
    shape = _checked_shape(input_shape)
    _whole(1, classes=classes, width=width, heads=heads)
    if width % heads:
        raise ValueError(f"width must be a multiple of heads ({heads}), got {width!r}")
    return ViT(shape, classes, _checked_patch(patch, shape), width, _depth(depth), heads)


class ViT(Network):
    """See ``vit``."""

    def __init__(
        self, input_shape: tuple[int, int, int], classes: int, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__("vit", input_shape, classes)
        channels, height, breadth = input_shape
        self.patch = patch
        # a convolution whose stride is its size: one linear map, applied to each patch
        self.embed = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((height // patch) * (breadth // patch), width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, width]``, the mean over the tokens."""
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position  # [N, C, H, W] -> [N, tokens, width]
        return self.norm(self.blocks(tokens)).mean(dim=1)


class EncoderBlock(nn.Module):
    """Attention across tokens, then an MLP within each; both see normalised tokens and add to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[N, tokens, width]`` to tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Multi-head self-attention: ``softmax(q k^T / sqrt(d)) v`` in each head (Vaswani et al. 2017, arXiv 1706.03762).

    The rows of ``qkv`` are all queries, then all keys, then all values, each sorted by head; so a head can be cut out
    by its rows there and its columns in ``project``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[N, tokens, width]`` to tokens of the same shape."""
        # [N, tokens, 3 width] -> q, k, v of [N, heads, tokens, width / heads]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.project(mixed.transpose(1, 2).flatten(2))


# Parts that stay as they are ------------------------------------------------------------------------------------------


def freeze(module: nn.Module) -> nn.Module:
    """Keep a network or a part of it as it is while the rest trains; gradients still pass through. Returns it.

    Its parameters want no gradient, and it computes as in evaluation even after ``model.train()``: batch norm uses its
    running statistics and leaves them alone, dropout lets all through. Copies and pickled models stay frozen; a
    ``state_dict`` holds weights alone, as ever.
    """
    thaw(module)  # so that freezing twice is freezing once
    module.requires_grad_(False)
    for part in module.modules():
        part.register_forward_pre_hook(_as_in_evaluation)
    return module.eval()


def thaw(module: nn.Module) -> nn.Module:
    """Undo ``freeze``, of this part and all within it: from the next ``model.train()`` on it trains. Returns it."""
    module.requires_grad_(True)
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if hook is _as_in_evaluation:
                del part._forward_pre_hooks[key]
    return module


@contextmanager
def as_in_training(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Within it these parts compute as in training, frozen ones too; afterwards each is as it was."""
    held = [(part, part.training, part._forward_pre_hooks.copy()) for part in parts]
    try:
        for part, _, hooks in held:
            for key, hook in hooks.items():
                if hook is _as_in_evaluation:
                    del part._forward_pre_hooks[key]
            part.training = True
        yield
    finally:
        for part, mode, hooks in held:
            part._forward_pre_hooks.clear()
            part._forward_pre_hooks.update(hooks)
            part.training = mode


def _as_in_evaluation(module: nn.Module, args: object) -> None:
    # A hook and not another train(): hooks are copied and pickled with the module, and no class has to change
    module.training = False


# Checks at the door ---------------------------------------------------------------------------------------------------


def _checked_shape(input_shape: Sequence[int], smallest: int = 1) -> tuple[int, int, int]:
    shape = tuple(input_shape)
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"input_shape must be three positive integers (channels, height, width), got {input_shape!r}")
    if min(shape[1:]) < smallest:
        raise ValueError(f"input_shape must be at least {smallest} pixels high and wide here, got {input_shape!r}")
    return shape


def _checked_columns(input_shape: Sequence[int]) -> tuple[int]:
    (columns,) = input_shape
    return (_whole(1, input_shape=columns),)


def _whole(least: int, **arguments: int) -> int:
    """Check each argument by its name; give back the last."""
    at_least(least, **arguments)
    return list(arguments.values())[-1]


def _depth(depth: int) -> int:
    return _whole(0, depth=depth)


def _checked_patch(patch: int | None, shape: tuple[int, int, int]) -> int:
    """The patch size: it must divide height and width. By default the smallest that makes 4 to 64 real patches."""
    divisors = [n for n in range(1, min(shape[1:]) + 1) if shape[1] % n == 0 and shape[2] % n == 0]
    if patch is not None:
        if isinstance(patch, bool) or patch not in divisors:
            raise ValueError(f"patch must divide the image's {shape[1]}x{shape[2]} pixels: {divisors}, got {patch!r}")
        return patch
    tokens = {n: (shape[1] // n) * (shape[2] // n) for n in divisors}
    fitting = [n for n in divisors if n > 1 and 4 <= tokens[n] <= 64]
    return min(fitting, default=min(divisors, key=lambda n: abs(tokens[n] - 64)))
