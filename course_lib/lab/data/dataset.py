"""Data sets as whole tensors, and batches from them without any per-image Python.

A ``Split`` holds all its images in one ``uint8`` tensor, so that it fits in memory (MNIST: 47 MB), moves to a GPU in
one copy, and a batch is one indexing operation. Shuffling and augmentation draw from a CPU generator: the same seed
gives the same batches on every device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Augment = (
    Callable[[Tensor, torch.Generator], Tensor] | Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
)
"""``(x, generator) -> x`` on a whole batch, or ``(x, y, generator) -> (x, y)`` where labels change too (mixup, CutMix).

The number of required arguments says which: settings have defaults, or are given by ``functools.partial``.
"""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set, whole in memory.

    Attributes
    ----------
    images : uint8 [N, C, H, W]
    labels : int64 [N], positions in ``Dataset.classes``
    mean, std : one number a channel, of the **training** split, with pixels in [0, 1].
        ``std`` is 1 for a channel that is constant, so that dividing by it is always safe.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
        if not len(self.mean) == len(self.std) == images.shape[1]:
            raise ValueError(f"mean and std need one number for each of {images.shape[1]} channels")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on ``device``."""
        if self.device == torch.device(device):
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> Split:
        """The examples at ``indices`` (int64 or bool [N]), still normalised with the whole training split's figures."""
        indices = indices.to(self.device)
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def __repr__(self) -> str:
        return f"Split({len(self):,} images {_by(self.images.shape[1:])}, on {self.device})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits and the names of the classes."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with all three splits on ``device``."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {len(getattr(self, part)):,}" for part in ("train", "val", "test"))
        return (
            f"{self.name}: images {_by(self.input_shape)}, {len(self.classes)} classes; {sizes}; on {self.train.device}"
        )


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 [N, C, H, W], with pixels in [0, 1].

    Counted, not summed in floating point: the figures are the same on every machine. A constant channel has std 1.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.cpu().unbind(1):
        share = torch.bincount(channel.reshape(-1), minlength=256).double() / channel.numel()
        centre = (share * levels).sum()
        spread = (share * (levels - centre) ** 2).sum().sqrt()
        mean.append(centre.item())
        std.append(spread.item() if (share > 0).sum() > 1 else 1.0)
    return tuple(mean), tuple(std)


def normalise(images: Tensor, split: Split) -> Tensor:
    """uint8 [B, C, H, W] -> float32 with zero mean and unit variance in each channel over the training split."""
    return _scaled(images, *_scale_and_offset(split, images.device))


def _scale_and_offset(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor([split.mean, split.std], dtype=torch.float32).view(2, -1, 1, 1)
    return (1 / (255 * std)).to(device), (-mean / std).to(device)


def _scaled(images: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return images.to(torch.float32).mul_(scale).add_(offset)


def batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    augment: Augment | None = None,
    drop_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over ``split`` in batches ``(x, y)``: normalised floats [B, C, H, W] and labels [B], on its device.

    Parameters
    ----------
    generator : shuffles the examples; ``None`` keeps their order. A CPU generator, so that the order is the same on
        every device. Nothing else is drawn from it but what ``augment`` draws.
    augment : ``(x, generator) -> x`` or ``(x, y, generator) -> (x, y)``, applied to each whole normalised batch.
    drop_last : leaves out the last batch when it is smaller than ``batch_size``.

    Raises
    ------
    ValueError : at the call, not at the first batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if augment is not None and generator is None:
        raise ValueError("augment needs generator=torch.Generator(): its randomness comes from there")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator is on {generator.device}; it must be a CPU generator")
    return _batches(split, batch_size, generator, augment, drop_last, dtype)


def _batches(
    split: Split,
    batch_size: int,
    generator: torch.Generator | None,
    augment: Augment | None,
    drop_last: bool,
    dtype: torch.dtype,
) -> Iterator[tuple[Tensor, Tensor]]:
    count = len(split)
    stop = count - count % batch_size if drop_last else count
    # The whole order crosses to the device once: a copy for every batch would make a GPU wait.
    order = None if generator is None else torch.randperm(count, generator=generator).to(split.device)
    scale, offset = _scale_and_offset(split, split.device)
    with_labels = augment is not None and _required_arguments(augment) == 3
    for start in range(0, stop, batch_size):
        rows = slice(start, min(start + batch_size, stop))
        chosen = rows if order is None else order[rows]
        x = _scaled(split.images[chosen], scale, offset)
        y = split.labels[chosen]
        if with_labels:
            x, y = augment(x, y, generator)  # type: ignore[misc, call-arg, arg-type]
        elif augment is not None:
            x = augment(x, generator)  # type: ignore[assignment, call-arg, arg-type]
        yield x.to(dtype), y


def _required_arguments(augment: Augment) -> int:
    """How many positional arguments a function needs; 2 where it does not say."""
    try:
        parameters = inspect.signature(augment).parameters.values()
    except (TypeError, ValueError):
        return 2
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def random_shift(x: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Shifts each image of a batch by its own whole number of pixels, up to ``pixels`` each way, in both directions.

    What comes in at the edge is 0: after normalisation that is the training split's mean colour.

    Parameters
    ----------
    x : [N, C, H, W], on any device
    generator : CPU generator; the shifts are the same on every device

    Raises
    ------
    ValueError : ``pixels`` negative or not smaller than the image
    """
    count, _, height, width = x.shape
    if not 0 <= pixels < min(height, width):
        raise ValueError(f"pixels is {pixels}; it must be between 0 and {min(height, width) - 1} for {height}×{width}")
    down, right = torch.randint(0, 2 * pixels + 1, (2, count), generator=generator).to(x.device)
    padded = torch.nn.functional.pad(x, [pixels] * 4)
    # A view of all windows, [N, C, 2p + 1, 2p + 1, H, W]: picking one for each image copies only what is picked.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=x.device), :, down, right]


def _by(shape: torch.Size | tuple[int, ...]) -> str:
    return "×".join(str(side) for side in shape)
