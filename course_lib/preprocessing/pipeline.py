"""Pipelines: transforms one after the other, on pixels; and the same idea when a network is tested.

===============  ======================================================================================================
name             what it gives
===============  ======================================================================================================
compose          one transform that applies several, some of which may change labels too
on_pixels        for ``Recipe(augment=...)``: the normalised batch becomes pixels in [0, 1], and is normalised again
test_time        a network that averages its probabilities over views of its input
===============  ======================================================================================================

``compose`` and ``on_pixels`` give ``functools.partial`` objects of functions in this file: they can be pickled, and two
of the same settings have the same fingerprint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.data import Augment, Split
from course_lib.lab.data.dataset import _required_arguments

View = Callable[[Tensor], Tensor]
"""A deterministic function of a batch, such as ``partial(geometry.flip, which=True)``."""


def takes_labels(transform: Augment) -> bool:
    """Whether a transform is ``(x, y, generator) -> (x, y)`` and not ``(x, generator) -> x``."""
    return _required_arguments(transform) == 3


def compose(*transforms: Augment) -> Augment:
    """Apply transforms one after the other, all drawing from one generator.

    The result takes labels, ``(x, y, generator) -> (x, y)``, as soon as one of them does; else ``(x, generator) -> x``.

    Raises
    ------
    ValueError : one that needs more arguments than that: give its settings by ``functools.partial``.
    """
    _check(transforms)
    if any(map(takes_labels, transforms)):
        return partial(_labelled, transforms)
    return partial(_unlabelled, transforms)


def on_pixels(split: Split, *transforms: Augment) -> Augment:
    """Apply transforms of pixels in [0, 1] to the normalised batches of ``split``, for ``Recipe(augment=...)``.

    Black comes in at the edges, where ``lab.data.random_shift``, which works on normalised batches, brings in the mean
    colour. Half precision is left for float32 in between: it cannot hold 256 levels.

    Raises
    ------
    ValueError : the inputs of ``split`` are no images.
    """
    _check(transforms)
    inputs = split.inputs
    if not isinstance(inputs, Tensor) or inputs.dtype != torch.uint8:
        raise ValueError(f"split={split!r}: must be a split of images")
    function = _labelled_pixels if any(map(takes_labels, transforms)) else _unlabelled_pixels
    return partial(function, split.mean, split.std, transforms)


def _check(transforms: tuple[Augment, ...]) -> None:
    for transform in transforms:
        if not callable(transform) or _required_arguments(transform) not in (2, 3):
            raise ValueError(
                f"transforms holds {transform!r}: must be functions (x, generator) -> x or "
                "(x, y, generator) -> (x, y), their settings given by functools.partial"
            )


def _unlabelled(transforms: tuple[Any, ...], x: Tensor, generator: torch.Generator) -> Tensor:
    for transform in transforms:
        x = transform(x, generator)
    return x


def _labelled(transforms: tuple[Any, ...], x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    for transform in transforms:
        if takes_labels(transform):
            x, y = transform(x, y, generator)
        else:
            x = transform(x, generator)
    return x, y


def _unlabelled_pixels(
    mean: tuple[float, ...], std: tuple[float, ...], transforms: tuple[Any, ...], x: Tensor, generator: torch.Generator
) -> Tensor:
    pixels = _unlabelled(transforms, _to_pixels(x, mean, std), generator)
    return _from_pixels(pixels, mean, std).to(x.dtype)


def _labelled_pixels(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    transforms: tuple[Any, ...],
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    pixels, y = _labelled(transforms, _to_pixels(x, mean, std), y, generator)
    return _from_pixels(pixels, mean, std).to(x.dtype), y


def _to_pixels(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    if x.ndim != 4 or x.shape[1] != len(mean):
        raise ValueError(
            f"x has the shape {list(x.shape)}: must be [N, {len(mean)}, H, W], a batch of the split's images"
        )
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # rounding leaves black a little below 0
    return (x * _channels(std, x)).add_(_channels(mean, x)).clamp_(0, 1)


def _from_pixels(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (x - _channels(mean, x)).div_(_channels(std, x))


def _channels(figures: tuple[float, ...], x: Tensor) -> Tensor:
    return torch.tensor(figures, dtype=x.dtype).to(x.device, non_blocking=True).view(-1, 1, 1)


# --- When a network is tested -----------------------------------------------------------------------------------------


class AveragedViews(nn.Module):
    r"""A network that looks at several views of its input: :math:`\log\frac1V\sum_v \text{softmax}(f(v(x)))`.

    The logarithm of the mean probabilities acts as logits: its softmax is that mean. See ``test_time``.
    """

    def __init__(self, model: nn.Module, views: Iterable[View]) -> None:
        super().__init__()
        self.model = model
        self.views = tuple(views)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Inputs of the model, [N, ...] -> logarithms of probabilities [N, K]."""
        each = torch.stack([F.log_softmax(self.model(view(x)), 1) for view in self.views])
        return each.logsumexp(0) - math.log(len(self.views))


def test_time(model: nn.Module, views: Iterable[View]) -> AveragedViews:
    """Average a network's probabilities over views of each input (test-time augmentation).

    Views are functions of the batch that the network would get; the batch as it is, ``lambda x: x``, is one only where
    it is among them. The result is a network like any other: ``evaluate(test_time(model, views), data.test)``.

    Raises
    ------
    ValueError : no view.
    """
    views = tuple(views)
    if not views or not all(map(callable, views)):
        raise ValueError(f"views={views!r}: must be one function of a batch at least")
    return AveragedViews(model, views)


test_time.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for a test where a test imports it
