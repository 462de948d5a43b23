"""The first script: it trains as ``fit`` does, image by image, and refuses what it has no place for."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from course_lib.capstone import PerImage, fit_per_image, quick_net
from course_lib.capstone.script import SLOTS
from course_lib.lab.data import normalise
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fit, fresh
from tests.capstone.small import coloured, glyphs

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
FALLING = partial(LambdaLR, lr_lambda=lambda step: 0.8**step)


def falling(optimizer, total):
    return FALLING(optimizer)


@pytest.mark.parametrize("data", [glyphs(), coloured()], ids=["grey", "coloured"])
def test_pixels_are_those_of_the_laboratory(data):
    split = PerImage(data.train)
    x = torch.stack([split[index][0] for index in range(len(split))])
    torch.testing.assert_close(x, normalise(data.train.images, data.train), rtol=1e-5, atol=1e-6)
    assert [split[index][1] for index in range(len(split))] == data.train.labels.tolist()
    assert x.dtype == torch.float32


def test_a_split_for_testing_is_normalised_as_the_training_split_is():
    data = coloured()
    x, _ = PerImage(data.test)[3]
    torch.testing.assert_close(x, normalise(data.test.images[3:4], data.train)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", [None, falling], ids=["constant", "falling"])
@pytest.mark.parametrize("network", [mlp, quick_net])
def test_one_batch_an_epoch_gives_the_weights_of_fit(schedule, network):
    """Then the order of the images does not matter."""
    data = glyphs()
    recipe = Recipe(epochs=4, batch_size=len(data.train), optimizer=SGD, schedule=schedule)
    ours, theirs, untrained = (fresh(partial(network, data.input_shape, 10), recipe, seed=3) for _ in range(3))
    assert fit_per_image(ours, data, recipe, seed=3) > 0
    fit(theirs, data, recipe, seed=3, progress=False)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=2e-6)
    assert not torch.allclose(ours.head.weight, untrained.head.weight, atol=1e-3)


def test_bfloat16_rounds_as_in_fit():
    data = glyphs()
    recipe = Recipe(epochs=2, batch_size=len(data.train), optimizer=SGD, precision="bfloat16")
    ours, theirs, exact = (fresh(partial(mlp, data.input_shape, 10), recipe, seed=3) for _ in range(3))
    fit_per_image(ours, data, recipe, seed=3)
    fit(theirs, data, recipe, seed=3, progress=False)
    fit(exact, data, replace(recipe, precision="float32"), seed=3, progress=False)
    rounded = (theirs.head.weight - exact.head.weight).abs().max()
    assert (ours.head.weight - theirs.head.weight).abs().max() < 0.5 * rounded


@pytest.mark.parametrize(("batch_size", "epochs"), [(24, 3), (7, 2), (100, 4)])
def test_the_schedule_is_told_of_each_step(batch_size, epochs):
    data, told = glyphs(), []

    class Counted(LambdaLR):
        def step(self, *arguments):
            told.append(self.total)
            super().step(*arguments)

    def schedule(optimizer, total):
        Counted.total = total
        found = Counted(optimizer, lambda step: 1.0)
        told.clear()  # its own first step
        return found

    recipe = Recipe(epochs=epochs, batch_size=batch_size, optimizer=SGD, schedule=schedule)
    fit_per_image(fresh(partial(mlp, data.input_shape, 10), recipe, seed=0), data, recipe, seed=0)
    steps = epochs * math.ceil(24 / batch_size)
    assert told == [steps] * steps == [sum(recipe.steps(24))] * steps


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    data, seen = glyphs(), []

    def watched(model, x, y):
        seen.append(x.detach())
        return Recipe().objective(model, x, y)

    recipe = Recipe(epochs=2, batch_size=10, optimizer=SGD, objective=watched)
    model = fresh(partial(mlp, data.input_shape, 10), recipe, seed=0)
    fit_per_image(model.eval(), data, recipe, seed=0)
    assert model.training
    assert [len(x) for x in seen] == [10, 10, 4] * 2
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert not torch.equal(first, second)
    rows = [sorted(tuple(row) for row in epoch.flatten(1).tolist()) for epoch in (first, second)]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == len(data.train)


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    data, recipe = glyphs(), Recipe(epochs=1, batch_size=5, optimizer=SGD)
    found = []
    for seed in (1, 1, 2):
        model = fresh(partial(mlp, data.input_shape, 10), recipe, seed=1)
        fit_per_image(model, data, recipe, seed=seed)
        found.append(model.head.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


FILLED = {
    "augment": lambda x, generator: x, "clip_norm": 1.0, "accumulate": 2, "compile": True, "ema": 0.9, "stop": len,
    "keep": "val_loss", "watch": {"loss": lambda model, data: 0.0},
}  # fmt: skip


@pytest.mark.parametrize("slot", [*SLOTS, "batch_size"])
def test_a_slot_that_the_script_does_not_have_is_named(slot):
    data = glyphs()
    recipe = replace(Recipe(), **{slot: {**FILLED, "batch_size": lambda epoch: 8}[slot]})
    with pytest.raises(ValueError, match=rf"recipe\.{slot}=.*: must be"):
        fit_per_image(mlp(data.input_shape, 10), data, recipe, seed=0)


def test_no_slot_is_passed_over():
    """Whatever a recipe may hold is used by the script, or refused."""
    used = {"epochs", "batch_size", "optimizer", "schedule", "objective", "precision"}
    timing = {"validate_every"}  # a race sets it itself
    assert set(Recipe.__dataclass_fields__) == used | timing | set(SLOTS)
    assert set(SLOTS) == set(FILLED)
