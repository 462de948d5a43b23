"""What exercises have in common in which a rate and a schedule are designed, and run on digits that nobody has seen."""

import functools
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_lib.lab.data import Dataset, load
from course_lib.lab.experiments import one_thread
from course_lib.lab.judging import Wrong
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.optimizers import SGD

FREE = ("optimizer", "schedule")


def normal(seed: int, *shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rate_and_schedule_only(base: Recipe, example: str) -> Callable[[Any], None]:
    """Return what admits a recipe that differs from ``base`` in the rate and momentum of its SGD and in its schedule.

    ``example`` is what a learner is shown who has handed in something else.
    """
    return partial(_admit, base=base, example=example)


def _admit(answer: Any, *, base: Recipe, example: str) -> None:
    if not isinstance(answer, Recipe):
        raise Wrong("expected a Recipe", example)
    others = [slot.name for slot in fields(Recipe) if slot.name not in FREE]
    if changed := [name for name in others if getattr(answer, name) != getattr(base, name)]:
        raise Wrong(f"besides the optimizer and the schedule you changed {', '.join(changed)}",
                    "Start from replace(base, optimizer=…, schedule=…).")  # fmt: skip
    optimizer = answer.optimizer
    if not isinstance(optimizer, partial) or optimizer.func not in (torch.optim.SGD, SGD) or optimizer.args:
        raise Wrong("the optimizer should be SGD, torch's or the course's, its settings given by functools.partial",
                    example)  # fmt: skip
    if not {"lr"} <= set(optimizer.keywords):
        raise Wrong("your SGD has no lr", example)
    if settings := sorted(set(optimizer.keywords) - {"lr", "momentum"}):
        raise Wrong(
            f"your SGD sets {', '.join(settings)}", "Only lr and momentum are free here: what matters is the rate."
        )
    if answer.schedule is not None and not callable(answer.schedule):
        raise Wrong("the schedule should be a function of the optimizer and the number of steps, or None",
                    "For instance: schedule=schedules.schedule(schedules.exponential, gamma=0.99)")  # fmt: skip


@functools.cache
def hidden_glyphs(seed: int, train_size: int) -> Dataset:
    """Drawn digits of this seed, 3,000 of them to test on."""
    return load(
        "glyphs", classes="digits", size=16, difficulty=0.5, count=train_size + 3100, train_size=train_size,
        val_size=100, test_size=3000, seed=seed,
    )  # fmt: skip


def accuracy_on_glyphs(recipe: Recipe, seed: int, *, train_size: int) -> float:
    """Test accuracy on digits of this seed, of a network of this seed."""
    data = hidden_glyphs(seed, train_size)
    model = fresh(partial(mlp, data.input_shape, len(data.classes), width=64), recipe, seed=seed)
    with one_thread():  # several would wait for each other where the machine has other work: batches are small
        fit(model, data, recipe, seed=seed, progress=False)
        return evaluate(model, data.test).accuracy
