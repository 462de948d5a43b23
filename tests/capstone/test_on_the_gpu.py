"""The race on a GPU: networks and recipes trained there, scores as here. Times are no part of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from course_lib import capstone
from course_lib.capstone import networks, recipes, script, text
from course_lib.capstone.rules import trained
from course_lib.lab.data import normalise
from course_lib.lab.training import Recipe, fresh, logits_of
from tests.capstone.small import coloured, glyphs
from tests.merging.small import Case, Move, on_the_gpu_as_here

SHORT = Recipe(epochs=1, batch_size=12)
EXACT = Recipe(epochs=1, batch_size=20, precision="float64")
WORDS = text.windows("the quick brown fox jumps over the lazy dog " * 8, 16)


def said(to: Move, make: Any, x: torch.Tensor) -> torch.Tensor:
    return to(fresh(make, EXACT, seed=0)).eval()(to(x))


def whitened(to: Move) -> torch.Tensor:
    """Images lie there or here; the network there."""
    found = []
    for data in (coloured(), to(coloured())):
        model = to(fresh(partial(networks.speed_net, (3, 8, 8), 3, widths=(4,)), EXACT, seed=0))
        images = normalise(data.train.images, data.train)
        found.append(networks.whiten_stem(model, images).stem[0].weight.abs())  # an axis has no sign
    return torch.stack(found)


def one_by_one(to: Move) -> torch.Tensor:
    """The images of a split that lies there come one at a time all the same."""
    data = to(glyphs())
    model = fresh(partial(networks.example_net, data.input_shape, 10), SHORT, seed=0).eval()
    model.dropout1.p = model.dropout2.p = 0.0  # drawn there, they are others than here
    script.fit_per_image(model, data, SHORT, seed=0)
    return logits_of(model, glyphs().val)


def raced(to: Move) -> Any:
    entry = capstone.applied(["whole batches", "quick network"])
    entry = replace(entry, recipe=replace(entry.recipe, batch_size=24))
    task = capstone.Task(to(glyphs()), 0.5)
    return capstone.run(entry, task, 0).score, capstone.run(entry, task, 0, split="val").score


def letters(to: Move) -> float:
    entry = text.first_script(batch_size=64)
    entry = replace(entry, network=tiny, recipe=replace(entry.recipe, optimizer=text.muon_and_adam))
    return text.bits(trained(entry, to(WORDS), 0)[0], WORDS.val)


def tiny(input_shape: tuple[int, ...], classes: int) -> text.CharTransformer:
    return text.CharTransformer(input_shape[0], classes, width=8, depth=1, heads=2)


CASES: dict[str, Case] = {
    "example_net": lambda to: said(to, partial(networks.example_net, (1, 8, 8), 4), torch.ones(2, 1, 8, 8)),
    "quick_net": lambda to: said(to, partial(networks.quick_net, (1, 8, 8), 4, width=2), torch.ones(2, 1, 8, 8)),
    "speed_net": lambda to: said(to, partial(networks.speed_net, (3, 8, 8), 4, widths=(4,)), torch.ones(2, 3, 8, 8)),
    "char_transformer": lambda to: said(to, partial(text.char_transformer, (16,), 96), WORDS.val.inputs),
    "whiten_stem": whitened,
}
RUNS: dict[str, Case] = {"fit_per_image": one_by_one, "run": raced, "text": letters}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu_as_here(name: str) -> None:
    on_the_gpu_as_here(CASES[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_runs_there_are_those_here(name: str) -> None:
    on_the_gpu_as_here(RUNS[name], torch.float32, lies="cpu")


@pytest.mark.gpu
def test_the_recipe_for_photographs_runs_there() -> None:
    """In bfloat16, channels last, with a whitened stem."""
    data = coloured()
    entry = recipes.cifar10(data, widths=(4,), epochs=1, batch_size=30)
    attempt = capstone.run(entry, capstone.Task(data, 0.9), 0)
    assert 0 <= attempt.score <= 1
