"""What acts after each step of the optimizer: projections, proximal steps, masks, a look at what happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from course_lib.lab.training import Recipe


def after_each_step(recipe: Recipe, action: Callable[[Optimizer, int], None]) -> Recipe:
    """Return a recipe whose optimizer calls ``action(optimizer, step)`` after each step, counted from 1.

    The count lies in the optimizer's first parameter group, so a run resumed from a checkpoint goes on counting.
    Several actions can be wrapped around one another; the innermost comes first, and each counts for itself.
    """

    wrapped = recipe.optimizer  # alone, so that a checkpoint's identity has nothing of the recipe twice

    def make(parameters: Iterator[tuple[str, nn.Parameter]]) -> Optimizer:
        optimizer = wrapped(parameters)
        counter = f"steps_done_{sum(key.startswith('steps_done') for key in optimizer.param_groups[0])}"
        optimizer.param_groups[0][counter] = 0

        def hook(optimizer: Optimizer, *_: Any) -> None:
            optimizer.param_groups[0][counter] += 1
            action(optimizer, optimizer.param_groups[0][counter])

        optimizer.register_step_post_hook(hook)
        return optimizer

    return replace(recipe, optimizer=make)
