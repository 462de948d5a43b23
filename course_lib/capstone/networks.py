"""The networks of the capstone: what everybody begins with, and what is quick.

================  ==========================================================================================
``example_net``   the network of PyTorch's own MNIST example: 32 and 64 channels, dropout, 128 units
``quick_net``     strides where the example pools, a third of the channels, batch norm; no wide layer at the end
``speed_net``     for photographs: three stages of two convolutions, after the CIFAR-10 speed runs
================  ==========================================================================================

Sources: ``example_net`` is github.com/pytorch/examples/blob/main/mnist/main.py; ``speed_net`` has the shape of the one
that Jordan 2024 (arXiv:2404.00498) trains to 94% of CIFAR-10, with every width free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.lab.models import Network


def _image_shape(input_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    shape = tuple(input_shape)
    require("input_shape", shape, lambda s: len(s) == 3 and min(s[1:]) >= smallest,
            f"(channels, height, width) of at least {smallest} pixels")  # fmt: skip
    return shape  # type: ignore[return-value]


class ExampleNet(Network):
    """See ``example_net``."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__("example_net", input_shape, classes)
        channels, height, width = input_shape
        self.conv1, self.conv2 = nn.Conv2d(channels, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1 = nn.Linear(64 * ((height - 4) // 2) * ((width - 4) // 2), 128)
        self.head = nn.Linear(128, classes)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, 128]``."""
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
        return self.dropout2(F.relu(self.fc1(x)))


def example_net(input_shape: Sequence[int], classes: int) -> ExampleNet:
    """Return the network of PyTorch's MNIST example, for images of any size.

    Raises
    ------
    ValueError : the images are smaller than 6×6 pixels, or there is no class.
    """
    at_least(1, classes=classes)
    return ExampleNet(_image_shape(input_shape, 6), classes)


def _conv_norm_relu(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> list[nn.Module]:
    # no bias: the batch norm behind it subtracts it again
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class QuickNet(Network):
    """See ``quick_net``."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, width: int) -> None:
        super().__init__("quick_net", input_shape, classes)
        channels, height, wide = input_shape
        self.features = nn.Sequential(
            *_conv_norm_relu(channels, width, 5, stride=2),  # a quarter of the places from the first layer on
            *_conv_norm_relu(width, 2 * width),
            nn.MaxPool2d(2),
            *_conv_norm_relu(2 * width, 4 * width),
            nn.MaxPool2d(2),
        )
        halved = [((side + 1) // 2) // 4 for side in (height, wide)]
        self.head = nn.Linear(4 * width * halved[0] * halved[1], classes)

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, 4 width (H / 8) (W / 8)]``."""
        return self.features(x).flatten(1)


def quick_net(input_shape: Sequence[int], classes: int, *, width: int = 16) -> QuickNet:
    """Return a network that does its work at half the resolution.

    A 5×5 convolution of stride 2, two of 3×3 with a max pool behind each; ``width``, ``2 width`` and ``4 width``
    channels, batch norm and ReLU behind each.

    Raises
    ------
    ValueError : the images are smaller than 7×7 pixels, or there is no class or channel.
    """
    at_least(1, classes=classes, width=width)
    return QuickNet(_image_shape(input_shape, 7), classes, width)


class SpeedNet(Network):
    """See ``speed_net``."""

    def __init__(self, input_shape: tuple[int, int, int], classes: int, widths: tuple[int, ...], scale: float) -> None:
        super().__init__("speed_net", input_shape, classes)
        channels, stem = input_shape[0], 24
        self.stem = nn.Sequential(nn.Conv2d(channels, stem, 2), nn.GELU())
        stages, inputs = [], stem
        for width in widths:
            stages += [
                nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.GELU(),
            ]  # fmt: skip
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(widths[-1], classes, bias=False)
        self.scale = scale

    def embedding(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to features ``[N, widths[-1]]``, scaled down so that the first logits are small."""
        return self.pool(self.stages(self.stem(x))).flatten(1) * self.scale


def speed_net(
    input_shape: Sequence[int], classes: int, *, widths: Sequence[int] = (64, 256, 256), scale: float = 1 / 9
) -> SpeedNet:
    """Return the network of the CIFAR-10 speed runs: a 2×2 stem, then a stage of two convolutions for each width.

    Each stage halves the resolution right behind its first convolution.

    Raises
    ------
    ValueError : the images are too small to be halved so often, or a width or the classes are below 1.
    """
    widths = tuple(widths)
    at_least(1, classes=classes, widths=min(widths, default=0))
    return SpeedNet(_image_shape(input_shape, 2 ** len(widths) + 1), classes, widths, scale)


@torch.no_grad()
def whiten_stem(network: SpeedNet, images: Tensor, *, eps: float = 5e-4) -> SpeedNet:
    """Set the stem to the principal axes of the 2×2 patches of normalised ``images`` ``[N, C, H, W]``, and freeze it.

    What the first layer would learn first, chapter 1's whitening knows without learning: the filters are the patches'
    eigenvectors over the roots of their eigenvalues, and the same negated, so that nothing is lost behind the
    activation. The bias stays free. Source: Page 2018 (How to train your ResNet, part 8); Jordan 2024,
    arXiv:2404.00498, section 3.1.
    """
    convolution = network.stem[0]
    assert isinstance(convolution, nn.Conv2d)
    size = convolution.kernel_size[0]
    patches = images.double().unfold(2, size, 1).unfold(3, size, 1).movedim(1, 3).flatten(3)  # [N, H', W', C·size²]
    patches = patches.flatten(0, 2)
    covariance = patches.T @ patches / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    filters = (vectors / (values + eps).sqrt()).T.flip(0)  # the largest first
    both = torch.cat([filters, -filters]).reshape(-1, *convolution.weight.shape[1:])
    require("network", len(both), lambda n: n == len(convolution.weight), f"a stem of {len(both)} filters")
    convolution.weight.copy_(both)
    convolution.weight.requires_grad_(False)
    return network
