"""The two recipes on real data: what the ladder taught, with rates and widths chosen on validation images.

``mnist``    one epoch of ``quick_net``: 99.0% of the test images on average, in some seconds of two cores
``cifar10``  ``speed_net`` with a whitened stem, mirrored and shifted images, smoothed labels; the wider, the further

The second has the main parts of the CIFAR-10 speed runs' recipe (Jordan 2024, arXiv:2404.00498: whitened patches, a
triangle of the rate, label smoothing), without its initialisation, the biases' rate, the average of the weights and the
mirrored test images; with ``widths=(64, 256, 256)`` it is of their size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.capstone.networks import SpeedNet, speed_net, whiten_stem
from course_lib.capstone.rules import Entry
from course_lib.capstone.rungs import applied
from course_lib.lab.data import Dataset, normalise
from course_lib.lab.training import Recipe
from course_lib.preprocessing import on_pixels, random_crop, random_flip
from course_lib.schedules import linear_between, one_cycle, schedule

PATCHES_FROM = 5_000
"""Training images whose patches are looked at to whiten."""


def triangle(step: int, total: int, *, up: float = 0.25) -> float:
    """Up in a share of the run, then down to nothing, in straight lines."""
    return one_cycle(step, total, pct_start=up, between=linear_between)


def mnist(*, lr: float = 0.3, batch_size: int = 128, epochs: int = 1) -> Entry:
    """Return the ladder's top with its rate and batch chosen on MNIST, and smoothed labels, which help here."""
    entry = applied()
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    recipe = replace(
        entry.recipe,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=schedule(triangle),
        objective=partial(smoothed, by=0.1),
    )
    return replace(entry, recipe=recipe)


def smoothed(model: nn.Module, x: Tensor, y: Tensor, by: float = 0.2) -> Tensor:
    """Cross-entropy with a share of each label spread over all classes (chapter 5)."""
    return F.cross_entropy(model(x), y, label_smoothing=by)


def free_only(named: Iterable[tuple[str, nn.Parameter]], **settings: float) -> torch.optim.SGD:
    """Nesterov's momentum for what is not frozen."""
    return torch.optim.SGD([p for _, p in named if p.requires_grad], nesterov=True, **settings)  # type: ignore[arg-type]


def whitened(network: nn.Module, data: Dataset) -> nn.Module:
    """Whiten the stem by the data's own patches."""
    assert isinstance(network, SpeedNet)
    images = normalise(data.train.images[:PATCHES_FROM], data.train)
    return whiten_stem(network, images)


def cifar10(
    data: Dataset,
    *,
    widths: Sequence[int] = (32, 64, 64),
    epochs: int = 4,
    lr: float = 0.3,
    batch_size: int = 128,
) -> Entry:
    """Return the recipe for photographs.

    Parameters
    ----------
    data : the statistics of its training images undo the normalisation while pixels are moved.
    widths : channels of the three stages; (64, 256, 256) with 10 epochs is the size of the speed runs.
    """
    recipe = Recipe(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(free_only, lr=lr, momentum=0.85, weight_decay=3e-4),
        schedule=schedule(triangle),
        augment=on_pixels(data.train, partial(random_crop, padding=2), random_flip),
        objective=smoothed,
        precision="bfloat16",
    )
    return Entry(partial(speed_net, widths=tuple(widths)), recipe, channels_last=True, prepare=whitened)
