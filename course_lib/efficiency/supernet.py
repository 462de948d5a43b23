r"""Cheap scores for a search: one network that holds all others, and a table of seconds that are summed.

======================  ====================================================  ========================================
name                    what it does or gives                                 source
======================  ====================================================  ========================================
``assembled``           an architecture as a network of its own
``architecture_cost``   its parameters and multiplications, in closed form
*accuracy*
``Supernet``            all architectures in one, with shared weights         Guo et al. 2019 (single path one-shot),
                                                                              arXiv:1904.00420
``sliced_weight``       the first channels and the middle of the kernel       Yu et al. 2018 (slimmable networks),
                                                                              arXiv:1812.08928; Cai et al. 2019
                                                                              (once-for-all), arXiv:1908.09791
``single_path``         trains one path a step, drawn uniformly               Guo et al. 2019
``sandwich``            trains the largest, the smallest and some between     Yu & Huang 2019, arXiv:1903.05134
``extracted``           a path as a network of its own, its batch norms
                        given the statistics of that path
``shared_error``        its error on validation data
*time*
``LatencyTable``        seconds of each layer shape, measured once            Cai et al. 2018 (ProxylessNAS),
                                                                              arXiv:1812.00332
======================  ====================================================  ========================================

A network is a stem, the stages of its architecture, a mean over all places and a linear layer. Each stage begins with
stride 2, so nearly all of it works on small images: a path trains, and is scored, in a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.efficiency.cheap_layers import BLOCKS, LayerCost, Size, full, strided
from course_lib.efficiency.search import Architecture, SearchSpace
from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Split
from course_lib.lab.models import Network
from course_lib.lab.runtime import device
from course_lib.lab.timing import measure
from course_lib.lab.training import evaluate
from course_lib.merging.averaging import refresh_batch_norm

STEM = 8
"""Channels of the stem, the same for all architectures."""

# --- Networks ---------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer's shape: all that its time depends on.

    ``kind`` is a block's name, or ``"head"`` for the mean over all places with the linear layer behind it; ``size`` is
    that of its input.
    """

    kind: str
    channels_in: int
    channels_out: int
    size: Size
    stride: int = 1
    kernel: int = 3

    def build(self) -> nn.Module:
        """Return such a layer, with new weights."""
        if self.kind == "head":
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.channels_in, self.channels_out))
        return BLOCKS[self.kind].build(self.channels_in, self.channels_out, self.stride, self.kernel)

    @property
    def cost(self) -> LayerCost:
        """Parameters and multiplications for one example."""
        if self.kind == "head":
            weights = self.channels_in * self.channels_out
            return LayerCost(weights + self.channels_out, weights)
        return BLOCKS[self.kind].cost(self.channels_in, self.channels_out, self.size, self.stride, self.kernel)


def layers_of(
    stages: Architecture, input_shape: Sequence[int], classes: int
) -> list[Layer]:  # fmt: skip
    """Return the layers of an architecture in order: the stem, the blocks, the head.

    Raises
    ------
    ValueError : a kind of block is unknown, or a number below 1.
    """
    channels, height, width = input_shape
    at_least(1, channels=channels, height=height, width=width, classes=classes)
    size = (height, width)
    found, channels = [Layer("full", channels, STEM, size)], STEM
    for stage in stages:
        require("kind", stage.kind, BLOCKS.__contains__, f"one of {', '.join(BLOCKS)}")
        for block in range(stage.depth):
            stride = 2 if block == 0 else 1
            layer = Layer(stage.kind, channels, stage.width, size, stride, stage.kernel)
            found.append(layer)
            channels, size = stage.width, strided(size, stride)
    return [*found, Layer("head", channels, classes, size)]


def architecture_cost(stages: Architecture, input_shape: Sequence[int], classes: int) -> LayerCost:
    """Return what an architecture costs, in closed form."""
    total = LayerCost(0, 0)
    for layer in layers_of(stages, input_shape, classes):
        total = total.plus(layer.cost)
    return total


def assembled(stages: Architecture, input_shape: Sequence[int], classes: int) -> Assembled:
    """Return an architecture as a network with weights of its own.

    Raises
    ------
    ValueError : as ``layers_of``.
    """
    return Assembled(stages, tuple(input_shape), classes)


class Assembled(Network):
    """See ``assembled``."""

    def __init__(self, stages: Architecture, input_shape: tuple[int, ...], classes: int) -> None:
        super().__init__("assembled", input_shape, classes)
        self.stages = stages
        *body, head = layers_of(stages, input_shape, classes)
        self.body = nn.Sequential(*(layer.build() for layer in body))
        self.head = nn.Linear(head.channels_in, classes)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, width of the last stage]``."""
        return self.body(x).mean((2, 3))


# --- All of them in one -----------------------------------------------------------------------------------------------


def sliced_weight(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the part of a weight ``[N, M, k, k]`` that a smaller layer uses: the first
    outputs and inputs, the middle of the kernel.

    Raises
    ------
    ValueError : the shape is larger somewhere.
    """
    fits = all(a <= b for a, b in zip(shape, weight.shape, strict=True))
    require("shape", tuple(shape), lambda _: fits, f"at most {tuple(weight.shape)}")
    outputs, inputs, high, wide = shape
    top, left = (weight.shape[2] - high) // 2, (weight.shape[3] - wide) // 2
    return weight[:outputs, :inputs, top : top + high, left : left + wide]


def sliced(block: Iterable[nn.Module], x: Tensor, width: int, kernel: int) -> Tensor:
    """Return what the first ``width`` channels of a block give, with the middle of its
    kernels.

    ``[B, M, H, W]`` to ``[B, width, ...]``, M being at most the block's. Batch norm
    takes the batch's own statistics: those of one path would be wrong for the next.
    """
    for layer in block:
        if isinstance(layer, nn.Conv2d):
            side, inputs = min(kernel, layer.kernel_size[0]), x.shape[1]
            apart = layer.groups > 1  # depthwise: as many outputs as there are inputs
            outputs = inputs if apart else width
            groups = inputs if apart else 1
            shape = (outputs, inputs // groups, side, side)
            weight = sliced_weight(layer.weight, shape)
            x = F.conv2d(x, weight, None, layer.stride, side // 2, groups=groups)
        elif isinstance(layer, nn.BatchNorm2d):
            gamma, beta = layer.weight[: x.shape[1]], layer.bias[: x.shape[1]]
            x = F.batch_norm(x, None, None, gamma, beta, training=True, eps=layer.eps)
        else:
            x = layer(x)
    return x


class Supernet(Network):
    """All architectures of a space in one network: each block is held once, at its largest.

    There is a block for each place and kind; narrower ones are its first channels, smaller kernels its middle. Called
    with a path it computes that architecture, without one the largest. Batch norm uses the batch's statistics, also in
    evaluation: to use a path, ``extracted`` it.

    Parameters
    ----------
    space : with blocks of the kinds ``"full"`` and ``"depthwise_separable"``, the two that can be sliced here.

    Raises
    ------
    ValueError : the space has other kinds, or a number is below 1.
    """

    def __init__(self, space: SearchSpace, input_shape: Sequence[int], classes: int) -> None:
        super().__init__("supernet", tuple(input_shape), classes)
        kinds = ("full", "depthwise_separable")
        require("space.kinds", space.kinds, lambda own: set(own) <= set(kinds), f"some of {', '.join(kinds)}")
        self.space = space
        self.stem = full(self.input_shape[0], STEM)
        self.blocks = nn.ModuleDict()
        largest, channels = max(space.kernels), STEM
        for number, widths in enumerate(space.widths):
            for block in range(max(space.depths)):
                stride = 2 if block == 0 else 1
                for kind in space.kinds:
                    self.blocks[f"{number}/{block}/{kind}"] = BLOCKS[kind].build(channels, max(widths), stride, largest)
                channels = max(widths)
        self.head = nn.Linear(channels, classes)

    def blocks_of(self, path: Architecture) -> list[nn.Module]:
        """Return the stem and the blocks that an architecture goes through.

        Raises
        ------
        ValueError : the architecture is not in the space.
        """
        require("path", path, self.space.__contains__, "an architecture of the space")
        names = (f"{number}/{block}/{stage.kind}" for number, stage in enumerate(path) for block in range(stage.depth))
        return [self.stem, *(self.blocks[name] for name in names)]

    def embedding(self, x: Tensor, path: Architecture | None = None) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, width of the path's last stage]``."""
        path = path or self.space.largest
        sizes = [(STEM, 3), *((stage.width, stage.kernel) for stage in path for _ in range(stage.depth))]
        for block, (width, kernel) in zip(self.blocks_of(path), sizes, strict=True):
            x = sliced(block, x, width, kernel)  # type: ignore[arg-type]
        return x.mean((2, 3))

    def forward(self, x: Tensor, path: Architecture | None = None) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, classes]`` of one architecture."""
        features = self.embedding(x, path)
        assert isinstance(self.head, nn.Linear)
        return F.linear(features, self.head.weight[:, : features.shape[1]], self.head.bias)


def single_path(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of one architecture, drawn anew at each step from torch's global
    generator: an objective for ``fit``.
    """
    assert isinstance(model, Supernet)
    return F.cross_entropy(model(x, model.space.sample()), y)


def sandwich(model: nn.Module, x: Tensor, y: Tensor, *, between: int = 2) -> Tensor:
    """The mean cross-entropy of the largest, the smallest and ``between`` random
    architectures: an objective for ``fit``.

    Raises
    ------
    ValueError : ``between`` is below 0.
    """
    assert isinstance(model, Supernet)
    at_least(0, between=between)
    space = model.space
    paths = [space.largest, space.smallest, *(space.sample() for _ in range(between))]
    return torch.stack([F.cross_entropy(model(x, path), y) for path in paths]).mean()


@torch.no_grad()
def extracted(
    supernet: Supernet, path: Architecture, split: Split | None = None
) -> Assembled:  # fmt: skip
    """Return an architecture with the supernet's weights, as a network of its own.

    Parameters
    ----------
    split : its batch norms get the statistics that this path has there; without it they
        are those of a new network.

    Raises
    ------
    ValueError : the architecture is not in the space.
    """
    blocks = supernet.blocks_of(path)
    made = assembled(path, supernet.input_shape, supernet.classes)
    assert isinstance(supernet.head, nn.Linear)
    made.to(supernet.head.weight)
    pairs = zip([*made.body, made.head], [*blocks, supernet.head], strict=True)
    for own, shared in pairs:
        for mine, theirs in zip(own.parameters(), shared.parameters(), strict=True):
            if mine.ndim == 4:
                mine.copy_(sliced_weight(theirs, mine.shape))
            else:  # batch norm's, and the head's weight and bias
                mine.copy_(theirs[tuple(slice(size) for size in mine.shape)])
    return made if split is None else refresh_batch_norm(made, split)  # type: ignore[return-value]


def shared_error(supernet: Supernet, path: Architecture, train: Split, val: Split) -> float:
    """Return the share of wrong answers on ``val`` of an architecture with the weights of
    the supernet, its batch norms refreshed on ``train``.
    """
    return 1 - evaluate(extracted(supernet, path, train), val).accuracy


# --- Time -------------------------------------------------------------------------------------------------------------

Seconds = Callable[[nn.Module, Tensor], float]
"""``(module, x) -> seconds`` of a forward pass."""


def measured_seconds(module: nn.Module, x: Tensor, *, repeats: int = 7) -> float:
    """Return the median seconds of a forward pass without gradients."""
    with torch.no_grad():
        return measure(lambda: module(x), warmup=2, repeats=repeats, device=x.device).median


class LatencyTable:
    """The time of an architecture as the sum of its layers', each shape measured once, when it is first asked for.

    A sum leaves out what happens between layers and in caches; ``compare`` says how much that is.

    Parameters
    ----------
    batch : examples at once.
    seconds : measures; in evaluation mode, on the laboratory's device.

    Raises
    ------
    ValueError : a number is below 1.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        *,
        batch: int = 64,
        seconds: Seconds = measured_seconds,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        at_least(1, batch=batch, classes=classes)
        self.input_shape, self.classes, self.batch = tuple(input_shape), classes, batch
        self.dtype = dtype
        self.measured: dict[Layer, float] = {}
        self._seconds = seconds

    def of_layer(self, layer: Layer) -> float:
        """Seconds of one layer."""
        if layer not in self.measured:
            self.measured[layer] = self._time(layer.build(), (layer.channels_in, *layer.size))
        return self.measured[layer]

    def predicted(self, stages: Architecture) -> float:
        """Seconds of an architecture, summed over its layers."""
        return sum(map(self.of_layer, layers_of(stages, self.input_shape, self.classes)))

    def whole(self, stages: Architecture) -> float:
        """Seconds of an architecture, measured as it is."""
        return self._time(assembled(stages, self.input_shape, self.classes), self.input_shape)

    def compare(self, architectures: Iterable[Architecture]) -> pd.DataFrame:
        """Return a row for each: ``predicted`` and ``measured`` seconds, and ``error``, how far the sum is off."""
        rows = [(self.predicted(each), self.whole(each)) for each in architectures]
        table = pd.DataFrame(rows, columns=["predicted", "measured"])
        table["error"] = table["predicted"] / table["measured"] - 1
        return table

    def _time(self, module: nn.Module, shape: Sequence[int]) -> float:
        where = device()
        return self._seconds(
            module.to(where, self.dtype).eval(), torch.zeros(self.batch, *shape, device=where, dtype=self.dtype)
        )
