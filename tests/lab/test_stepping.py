"""What acts after each step: counted, nested, and after the step indeed."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from course_lib.lab.data import Dataset, load
from course_lib.lab.models import mlp
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Recipe, fit, fresh

RECIPE = Recipe(epochs=2, batch_size=100)
network = partial(mlp, (1, 8, 8), 10, width=8)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=300)


def test_actions_after_each_step_nest_and_each_counts_for_itself(digits: Dataset) -> None:
    counts: dict[str, list[int]] = {"inner": [], "outer": []}
    recipe = after_each_step(RECIPE, lambda _, step: counts["inner"].append(step))
    recipe = after_each_step(recipe, lambda _, step: counts["outer"].append(step))
    fit(fresh(network, recipe, seed=0), digits, recipe, seed=0)
    assert len(counts["inner"]) > 1
    assert counts["inner"] == counts["outer"] == list(range(1, len(counts["inner"]) + 1))


def test_it_acts_on_the_weights_after_the_step(digits: Dataset) -> None:
    """A projection onto a ball: after training, and so after the last step, no row is longer than 1."""
    model = fresh(network, RECIPE, seed=0)

    @torch.no_grad()
    def project(optimizer: torch.optim.Optimizer, step: int) -> None:
        weight = model.hidden[0].weight
        weight.mul_((1 / weight.norm(dim=1, keepdim=True)).clamp(max=1))

    with torch.no_grad():
        model.hidden[0].weight.mul_(10)
    fit(model, digits, after_each_step(RECIPE, project), seed=0)
    torch.testing.assert_close(model.hidden[0].weight.norm(dim=1).max(), torch.tensor(1.0), rtol=1e-5, atol=0)
