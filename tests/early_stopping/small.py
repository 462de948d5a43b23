"""A small run that all tests of early stopping share: an MLP on digits, some of them with wrong labels, so that it
overfits within a second."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import torch
from torch import nn

from course_lib.lab.data import Dataset, load
from course_lib.lab.models import mlp
from course_lib.lab.training import History, Recipe

RECIPE = Recipe(
    epochs=14, batch_size=10, precision="float64", optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9)
)  # fmt: skip
TIMES = ("seconds", "examples_per_second")


@cache
def digits() -> Dataset:
    data = load("digits", train_size=150)
    labels = data.train.labels.clone()
    labels[::3] = (labels[::3] + 1) % 10
    return replace(data, train=replace(data.train, labels=labels), val=data.val.subset(torch.arange(150)))


def network() -> nn.Module:
    return mlp((1, 8, 8), 10, width=32)


def untimed(history: History) -> list[dict[str, float]]:
    """The rows without what the clock has measured."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history.rows]


def random_curves(count: int, length: int, seed: int, *, ties: bool = False) -> list[list[float]]:
    """Noisy curves that rise, some with equal values in them."""
    generator = np.random.default_rng(seed)
    level, rate = generator.uniform(0.4, 0.9, (count, 1)), generator.uniform(0.05, 0.6, (count, 1))
    noise = 0.05 * generator.standard_normal((count, length))
    curves = level * (1 - np.exp(-rate * np.arange(1, length + 1))) + noise
    return [[float(v) for v in curve] for curve in (curves.round(1) if ties else curves)]
