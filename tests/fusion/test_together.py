"""Networks trained at once: each must become what ``fit`` makes of it alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from course_lib import fusion
from course_lib.lab.data import random_shift
from course_lib.lab.training import Recipe, cross_entropy, fit
from course_lib.regularization.targets import label_smoothing
from tests.fusion.small import EXACT, NAMES, batch, close, data, network, same_weights

VARIANTS: dict[str, Recipe] = {
    "momentum": EXACT,
    "adam, foreach": replace(EXACT, optimizer=partial(Adam, lr=1e-2, foreach=True)),
    "adamw, decay": replace(EXACT, optimizer=partial(AdamW, lr=1e-2, weight_decay=0.1)),
    "schedule": replace(EXACT, schedule=lambda optimizer, steps: LinearLR(optimizer, 0.1, total_iters=steps)),
    "augment": replace(EXACT, augment=random_shift),
    "objective": replace(EXACT, objective=partial(label_smoothing, smoothing=0.1)),
    "growing batch": replace(EXACT, batch_size=lambda epoch: 8 * epoch),
}


def alone(models: list[nn.Module], recipe: Recipe, seeds: list[int], small: Any) -> list[list[float]]:
    return [fit(model, small, recipe, seed=seed).losses for model, seed in zip(models, seeds, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_each_network_becomes_what_fit_makes_of_it(name: str) -> None:
    models, seeds, small = [network(name, k) for k in range(3)], [5, 6, 7], data(30)
    others = copy.deepcopy(models)
    losses = fusion.train_together(models, small, EXACT, seeds=seeds)
    close(losses.T, torch.tensor(alone(others, EXACT, seeds, small), dtype=torch.float64), 1e-9)
    for mine, theirs in zip(models, others, strict=True):
        same_weights(mine, theirs, 1e-9)  # running statistics too


@pytest.mark.parametrize("variant", VARIANTS)
def test_in_every_slot_that_counts(variant: str) -> None:
    models, seeds, small, recipe = [network("mlp", k) for k in range(2)], [1, 9], data(30), VARIANTS[variant]
    others = copy.deepcopy(models)
    fusion.train_together(models, small, recipe, seeds=seeds)
    alone(others, recipe, seeds, small)
    for mine, theirs in zip(models, others, strict=True):
        same_weights(mine, theirs, 1e-9)


def test_inputs_in_parts_and_float32() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 4)

        def forward(self, x: Any) -> torch.Tensor:
            return self.a(x[0].flatten(1)) + self.b(x[1].flatten(1))

    halves = data(30).with_inputs(lambda x: (x[..., :4], x[..., 4:]))
    torch.manual_seed(0)
    models, recipe = [Two() for _ in range(2)], replace(EXACT, precision="float32")
    others = copy.deepcopy(models)
    fusion.train_together(models, halves, recipe, seeds=[0, 1])
    for other, seed in zip(others, (0, 1), strict=True):
        fit(other, halves, recipe, seed=seed)
    for mine, theirs in zip(models, others, strict=True):
        same_weights(mine, theirs, 1e-4)
        assert next(mine.parameters()).dtype is torch.float32


def test_frozen_parts_stay() -> None:
    models = [network("mlp", k) for k in range(2)]
    for model in models:
        model.hidden.requires_grad_(False)  # type: ignore[union-attr]
    before = copy.deepcopy(models)
    fusion.train_together(models, data(20), EXACT, seeds=[0, 1])
    same_weights(models[1].hidden, before[1].hidden)  # type: ignore[arg-type]
    assert not torch.equal(models[1].head.weight, before[1].head.weight)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_gives_all_logits(name: str) -> None:
    models, x = [network(name, k) for k in range(3)], batch()
    with torch.no_grad():
        close(fusion.Stack(models).forward(x), torch.stack([model(x) for model in models]), 1e-12)


def test_dropout_draws_for_each() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4, bias=False)).double()
    stack = fusion.Stack([model, model])
    x = batch(4)
    y = torch.zeros(2, 4, dtype=torch.int64)
    first, second = stack.losses(torch.stack([x, x]), y).tolist()
    assert first != second


def test_an_objective_that_looks_at_weights_or_elsewhere_is_refused() -> None:
    def decayed(model: nn.Module, x: Any, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model, x, y) + sum(p.square().sum() for p in model.parameters())

    def twice(model: nn.Module, x: Any, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model, x, y) + cross_entropy(model, 2 * x, y)

    for objective in (decayed, twice):
        with pytest.raises((RuntimeError, NotImplementedError)):
            fusion.train_together([network()], data(20), replace(EXACT, objective=objective), seeds=[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"clip_norm": 1.0}, "clip_norm"),
        ({"accumulate": 2}, "accumulate"),
        ({"ema": 0.9}, "ema"),
        ({"keep": "val_loss"}, "keep"),
        ({"stop": lambda history: False}, "stop"),
        ({"watch": {"a": lambda model, data: 0.0}}, "watch"),
        ({"precision": "bfloat16"}, "precision"),
        ({"schedule": lambda optimizer, steps: ReduceLROnPlateau(optimizer)}, "schedule"),
    ],
)
def test_slots_about_a_whole_network_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"recipe.{named}="):
        fusion.train_together([network()], data(20), replace(EXACT, **change), seeds=[0])


def test_bad_arguments_are_named() -> None:
    recipe = replace(EXACT, optimizer=partial(SGD, lr=0.1))
    with pytest.raises(ValueError, match="seeds="):
        fusion.train_together([network()], data(20), recipe, seeds=[0, 1])
    with pytest.raises(ValueError, match="models="):
        fusion.train_together([], data(20), recipe, seeds=[])
    with pytest.raises(ValueError, match="models=ConvNet"):
        fusion.train_together([network(), network("convnet")], data(20), recipe, seeds=[0, 1])
