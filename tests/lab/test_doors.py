"""What does not fit together is named by its slot, with what it gave and what is needed."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, cross_entropy, fit
from tests.lab.test_training import RECIPE, blobs, network, weights


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")


def frozen():
    return network().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "words"),
    [(lambda: mlp((1, 4, 4), 2), "model=MLP has 2 outputs; blobs has 3 classes"),
     (lambda: mlp((1, 5, 5), 3), r"model=MLP cannot take an example of blobs \(inputs of 1×4×4\)"),
     (frozen, "model=Sequential: there is nothing to train, all its weights are frozen"),
     (nn.Flatten, "model=Flatten: there is nothing to train, it has no weights")],
)  # fmt: skip
def test_a_network_that_does_not_fit_is_named(model, words):
    with pytest.raises(ValueError, match=words):
        fit(model(), blobs(), RECIPE, seed=0)


@pytest.mark.parametrize(
    ("slot", "value", "words"),
    [("objective", lambda m, x, y: nn.functional.cross_entropy(m(x), y, reduction="none"),
      r"objective gave a tensor of shape \[16\].*scalar"),
     ("objective", lambda m, x, y: cross_entropy(m, x, y).item(), "objective gave float .*do not call"),
     ("objective", lambda m, x, y: cross_entropy(m, x, y).detach(), "without a gradient"),
     ("objective", lambda m, x, y: None, "objective gave NoneType"),
     ("optimizer", lambda p: list(p), r"optimizer gave \["),
     ("optimizer", lambda p: None, r"optimizer gave None.*torch\.optim\.Optimizer"),
     ("schedule", lambda o, steps: 0.1, r"schedule gave 0\.1.*\(optimizer, total_steps\)"),
     ("batch_size", lambda epoch: 0, r"batch_size\(1\) = 0: must be a whole number of at least 1")],
)  # fmt: skip
def test_a_slot_that_gives_the_wrong_thing_is_named(slot, value, words):
    with pytest.raises(ValueError, match=words):
        fit(network(), blobs(), replace(RECIPE, **{slot: value}), seed=0)


def test_an_error_of_torch_that_says_more_is_left_alone():
    def breaks(model, x, y):
        loss = cross_entropy(model, x, y)
        loss.register_hook(lambda gradient: gradient.reshape(7))
        return loss

    with pytest.raises(RuntimeError, match=re.escape("shape '[7]' is invalid")):
        fit(network(), blobs(), replace(RECIPE, objective=breaks), seed=0)


def test_trying_the_network_leaves_no_trace():
    """Neither batch norm's statistics nor the random numbers of the run know of it."""
    tried, other = network(dropout=0.2), network(dropout=0.2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("course_lib.lab.doors.check_network", lambda model, data: None)
        fit(other, blobs(), RECIPE, seed=0)
    fit(tried, blobs(), RECIPE, seed=0)
    assert torch.equal(weights(tried), weights(other))


def test_more_outputs_than_classes_are_allowed():
    fit(mlp((1, 4, 4), 7), blobs(), Recipe(epochs=1, optimizer=partial(torch.optim.SGD, lr=0.1)), seed=0)
