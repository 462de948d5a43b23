"""Runs on hidden data, for exercises in which a recipe is designed."""

import functools
from dataclasses import replace

import torch

from course_lib.lab.data import Dataset, load
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh


@functools.cache
def hidden_digits(seed: int) -> Dataset:
    data = load("glyphs", classes="digits", size=16, difficulty=0.5, count=6000, train_size=1000, seed=seed)
    # Validation after each epoch would cost more than it tells: a hundred images are enough for `keep` and `stop`.
    return replace(data, val=data.val.subset(torch.arange(100)))


def accuracy(recipe: Recipe, seed: int, *, width: int) -> float:
    """Test accuracy of an `mlp` that the recipe trains on the hidden digits of this seed."""
    data = hidden_digits(seed)
    network = fresh(functools.partial(mlp, data.input_shape, len(data.classes), width=width), recipe, seed=seed)
    fit(network, data, recipe, seed=seed, progress=False)
    return evaluate(network, data.test).accuracy
