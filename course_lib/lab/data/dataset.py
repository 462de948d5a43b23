"""Data sets as whole tensors, and batches from them without any per-image Python.

A ``Split`` holds all its images in one ``uint8`` tensor, so that it fits in memory (MNIST: 47 MB), moves to a GPU in
one copy, and a batch is one indexing operation. Shuffling and augmentation draw from a CPU generator: the same seed
gives the same batches on every device.

Inputs that are no images are one ``float32`` tensor; inputs that come in parts (two views of an example) are a tuple
of tensors, and so is then the ``x`` of a batch, which the network takes as it is.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from course_lib.lab.arguments import at_least

Inputs = Tensor | tuple[Tensor, ...]
Augment = Callable[[Any, torch.Generator], Any] | Callable[[Any, Tensor, torch.Generator], tuple[Any, Tensor]]
"""``(x, generator) -> x`` on a whole batch, or ``(x, y, generator) -> (x, y)`` where labels change too (mixup, CutMix).

The number of required arguments says which: settings have defaults, or are given by ``functools.partial``.
"""


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set, whole in memory.

    Attributes
    ----------
    inputs : images, uint8 [N, C, H, W]; or numbers, float32 [N, D] (or [N, D, ...]); or a tuple of such tensors
    labels : int64 [N], positions in ``Dataset.classes``
    mean, std : one number for each channel or column (those of several parts one after the other), of the **training**
        split, with pixels in [0, 1]. ``std`` is 1 where all values are equal, so that dividing by it is always safe.
        Means of 0 and deviations of 1 leave numbers as they are.
    """

    inputs: Inputs
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        count, labels = len(self.labels), self.labels
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise ValueError(f"labels must be int64 [N], got {labels.dtype} {list(labels.shape)}")
        if not _parts(self.inputs) or not all(isinstance(part, Tensor) for part in _parts(self.inputs)):
            raise ValueError(f"inputs must be a tensor or a tuple of tensors, got {type(self.inputs).__name__}")
        for part in _parts(self.inputs):
            images = part.dtype == torch.uint8 and part.ndim == 4
            numbers = part.dtype == torch.float32 and part.ndim >= 2
            if not (images or numbers) or len(part) != count:
                raise ValueError(
                    f"inputs must be images, uint8 [{count}, C, H, W], or numbers, float32 [{count}, D], one for each "
                    f"label; got {part.dtype} {list(part.shape)}"
                )
        columns = sum(part.shape[1] for part in _parts(self.inputs))
        if not len(self.mean) == len(self.std) == columns:
            raise ValueError(
                f"mean and std need one number for each of {columns} channels or columns, got {len(self.mean)} and "
                f"{len(self.std)}"
            )

    @property
    def images(self) -> Tensor:
        """The inputs, where they are images."""
        if isinstance(self.inputs, tuple) or self.inputs.dtype != torch.uint8:
            raise AttributeError("the inputs of this split are not images: read .inputs")
        return self.inputs

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on ``device``."""
        if self.device == torch.device(device):
            return self
        return replace(self, inputs=_each(self.inputs, lambda t: t.to(device)), labels=self.labels.to(device))

    def subset(self, indices: Tensor) -> Split:
        """The examples at ``indices`` (int64 or bool [N]), still normalised with the whole training split's figures.

        An index may stand there twice: ``torch.multinomial(weights, n, replacement=True)`` is a weighted sample.
        """
        indices = indices.to(self.device)
        return replace(self, inputs=_rows(self.inputs, indices), labels=self.labels[indices])

    def __repr__(self) -> str:
        return f"Split({len(self):,} {_kind(self.inputs)}, on {self.device})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits and the names of the classes."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[Any, ...]:
        """(channels, height, width) of an image, (columns,) of numbers, a tuple of shapes for inputs in parts."""
        shapes = tuple(tuple(part.shape[1:]) for part in _parts(self.train.inputs))
        return shapes if isinstance(self.train.inputs, tuple) else shapes[0]

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with all three splits on ``device``."""
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def with_inputs(self, function: Callable[[Any], Inputs]) -> Dataset:
        """The same examples seen otherwise: ``function`` makes the new inputs of a split from its whole inputs.

        It must keep their number and order. ``mean`` and ``std`` are then those of the new training inputs. Two views,
        for instance, the left and the right half: ``data.with_inputs(lambda x: (x[..., :4], x[..., 4:]))``.
        """
        train, val, test = (function(split.inputs) for split in (self.train, self.val, self.test))
        mean, std = statistics(train)
        return replace(
            self,
            train=replace(self.train, inputs=train, mean=mean, std=std),
            val=replace(self.val, inputs=val, mean=mean, std=std),
            test=replace(self.test, inputs=test, mean=mean, std=std),
        )

    def __repr__(self) -> str:
        sizes = ", ".join(f"{part} {len(getattr(self, part)):,}" for part in ("train", "val", "test"))
        kind = _kind(self.train.inputs)
        return f"{self.name}: {kind}, {len(self.classes)} classes; {sizes}; on {self.train.device}"


def statistics(inputs: Inputs) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for ``Split``: of each channel (pixels in [0, 1]) or column, part after part."""
    found = [
        channel_statistics(part) if part.dtype == torch.uint8 else column_statistics(part) for part in _parts(inputs)
    ]
    return sum((mean for mean, _ in found), ()), sum((std for _, std in found), ())


def column_statistics(numbers: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each column of float32 [N, D, ...]; a constant one has std 1.

    ``fsum`` adds without rounding: the figures are the same on every machine.
    """
    mean, std = [], []
    for column in numbers.cpu().unbind(1):
        values = column.reshape(-1).tolist()
        centre = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / len(values))
        mean.append(centre)
        std.append(spread if min(values) < max(values) else 1.0)
    return tuple(mean), tuple(std)


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


def normalise(inputs: Any, split: Split) -> Any:
    """Inputs like those of ``split`` -> float32 with zero mean and unit variance over the training split.

    Each channel of images (uint8 [B, C, H, W]), each column of numbers, each part of a tuple.
    """
    return _normalised(inputs, _scales_and_offsets(split, _parts(inputs)[0].device))


def _scales_and_offsets(split: Split, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each part what its values are multiplied by, and what is then added."""
    parts = _parts(split.inputs)
    figures = torch.tensor([split.mean, split.std], dtype=torch.float32).split([part.shape[1] for part in parts], dim=1)
    found = []
    for part, columns in zip(parts, figures, strict=True):
        mean, std = columns.view(2, -1, *[1] * (part.ndim - 2))
        levels = 255 if part.dtype == torch.uint8 else 1
        found.append(((1 / (levels * std)).to(device), (-mean / std).to(device)))
    return found


def _normalised(inputs: Inputs, figures: list[tuple[Tensor, Tensor]]) -> Inputs:
    # copy=True: a batch in order is a view of the split, which must stay as it is
    done = tuple(
        part.to(torch.float32, copy=True).mul_(scale).add_(offset)
        for part, (scale, offset) in zip(_parts(inputs), figures, strict=True)
    )
    return done if isinstance(inputs, tuple) else done[0]


def batches(
    split: Split,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    augment: Augment | None = None,
    drop_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Any, Tensor]]:
    """One pass over ``split`` in batches ``(x, y)``: normalised floats [B, C, H, W] and labels [B], on its device.

    Where the inputs are numbers ``x`` is [B, D]; where they come in parts it is a tuple of tensors.

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
    at_least(1, batch_size=batch_size)
    if augment is not None and generator is None:
        raise ValueError("augment needs generator=torch.Generator(): its randomness comes from there")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator is on {generator.device}; it must be a CPU generator")
    if augment is not None and _required_arguments(augment) > 3:
        raise ValueError(
            f"augment takes {inspect.signature(augment)}; it must take (x, generator) or (x, y, generator), "
            "its settings given by functools.partial"
        )
    return _batches(split, batch_size, generator, augment, drop_last, dtype)


def _batches(
    split: Split,
    batch_size: int,
    generator: torch.Generator | None,
    augment: Augment | None,
    drop_last: bool,
    dtype: torch.dtype,
) -> Iterator[tuple[Any, Tensor]]:
    count = len(split)
    stop = count - count % batch_size if drop_last else count
    # The whole order crosses to the device once: a copy for every batch would make a GPU wait.
    order = None if generator is None else torch.randperm(count, generator=generator).to(split.device)
    figures = _scales_and_offsets(split, split.device)
    with_labels = augment is not None and _required_arguments(augment) == 3
    for start in range(0, stop, batch_size):
        rows = slice(start, min(start + batch_size, stop))
        chosen = rows if order is None else order[rows]
        x: Any = _normalised(_rows(split.inputs, chosen), figures)
        y = split.labels[chosen]
        if with_labels:
            x, y = augment(x, y, generator)  # type: ignore[misc, call-arg, arg-type]
            y = y.to(dtype) if y.is_floating_point() else y
        elif augment is not None:
            x = augment(x, generator)  # type: ignore[call-arg, arg-type]
        yield _each(x, lambda part: part.to(dtype)), y


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


def _parts(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _each(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """``function`` of the inputs, or of each part of them."""
    return tuple(map(function, inputs)) if isinstance(inputs, tuple) else function(inputs)


def _rows(inputs: Inputs, chosen: slice | Tensor) -> Inputs:
    return _each(inputs, lambda part: part[chosen])


def _kind(inputs: Inputs) -> str:
    if isinstance(inputs, tuple):
        return " + ".join(map(_kind, inputs))
    shape = _by(inputs.shape[1:])
    return f"images {shape}" if inputs.dtype == torch.uint8 else f"rows of {shape} numbers"
