"""The range test: its own steps against a loop written out, its suggestions on curves whose answer is known."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, fresh
from course_lib.schedules.range_test import RangeTest, range_test, slopes_over_log, smooth

RECIPE = Recipe(batch_size=32, optimizer=partial(torch.optim.SGD, lr=0.5), precision="float64")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=100)


def network(recipe: Recipe = RECIPE, make: Any = mlp) -> nn.Module:
    return fresh(partial(make, (1, 8, 8), 10, width=8), recipe, seed=0)


def test_rates_grow_by_one_factor_and_the_losses_are_those_of_plain_training(digits: Dataset) -> None:
    """All examples are one image, so that no order of them matters; there are more steps than an epoch has."""
    one = replace(digits, train=digits.train.subset(torch.zeros(40, dtype=torch.int64)))
    steps, low, high = 12, 1e-3, 0.5
    found = range_test(network(), one, RECIPE, low=low, high=high, steps=steps, seed=0)
    expected = np.geomspace(low, high, steps)
    assert found.rates == pytest.approx(expected, rel=1e-12)
    model, losses = network(), []
    x = (one.train.images[:1].double() / 255 - one.train.mean[0]) / one.train.std[0]
    for rate in expected:
        loss = F.cross_entropy(model(x), one.train.labels[:1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        for p, g in zip(model.parameters(), grads, strict=True):
            p.data.sub_(g, alpha=float(rate))
    assert losses[-1] < 0.5 * losses[0]
    assert found.losses == pytest.approx(losses, rel=1e-6)  # pixels are normalised in float32
    assert found.smoothed == pytest.approx(smooth(found.losses, 0.9))


def test_the_model_and_the_recipe_stay_as_they_were(digits: Dataset) -> None:
    recipe = replace(RECIPE, keep="val_loss", ema=0.9, validate_every=5, epochs=3)
    model = network(recipe, convnet)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    range_test(model, digits, recipe, steps=8, seed=0)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_same_seed_gives_the_same_answer_and_another_another(digits: Dataset) -> None:
    answers = [range_test(network(), digits, RECIPE, steps=8, seed=seed) for seed in (0, 0, 1)]
    assert answers[0] == answers[1]
    assert answers[0].losses != answers[2].losses


def test_what_comes_after_the_blow_up_is_cut_off(digits: Dataset) -> None:
    found = range_test(network(), digits, RECIPE, low=1e-3, high=1e6, steps=60, seed=0)
    assert 3 <= len(found.rates) < 60
    lowest = np.minimum.accumulate(found.smoothed)
    assert bool((np.array(found.smoothed) <= 4 * lowest).all())
    assert all(math.isfinite(loss) for loss in found.losses)
    # SGD on this network is stable at 0.05 and not at 1,000
    assert 1e-3 < found.steepest < 1e3
    assert found.before_divergence < found.rates[-1]


def test_other_groups_keep_their_ratio(digits: Dataset) -> None:
    seen = []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        weights = [p for _, p in parameters]
        made = torch.optim.SGD([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.05}], lr=0.5)
        made.register_step_post_hook(lambda o, *_: seen.append(tuple(g["lr"] for g in o.param_groups)))
        return made

    range_test(network(), digits, replace(RECIPE, optimizer=optimizer), low=1e-3, high=0.1, steps=5, seed=0)
    assert [a for a, _ in seen] == pytest.approx(np.geomspace(1e-3, 0.1, 5))
    assert [b / a for a, b in seen] == pytest.approx([0.1] * 5)


def test_suggestions_on_a_curve_whose_answer_is_known() -> None:
    """A sigmoid over log(rate) that falls fastest at 0.01, with a rise after 1: steep there, but upwards."""
    rates = np.geomspace(1e-4, 10, 401)
    curve = 2 - 1 / (1 + np.exp(-3 * np.log(rates / 0.01))) + np.where(rates > 1, np.log(rates), 0) ** 2
    found = RangeTest(tuple(rates), tuple(curve), tuple(curve))
    assert found.steepest == pytest.approx(0.01, rel=0.02)
    assert found.before_divergence == pytest.approx(0.1, rel=0.02)


def test_a_fall_after_the_minimum_is_not_the_steepest() -> None:
    rates = tuple(np.geomspace(1e-3, 1, 7))
    curve = (3.0, 2.9, 2.5, 1.0, 5.0, 1.5, 2.0)
    assert RangeTest(rates, curve, curve).steepest == rates[2]
    assert RangeTest(rates, curve, curve).before_divergence == rates[3] / 10


def test_slopes_are_those_of_numpy_and_smoothing_that_of_pandas() -> None:
    rates = np.geomspace(1e-3, 1, 20)
    values = np.random.default_rng(0).normal(size=20)
    assert slopes_over_log(rates, values)[1:-1] == pytest.approx(np.gradient(values, np.log(rates))[1:-1])
    assert slopes_over_log(rates, values)[0] == pytest.approx(np.gradient(values, np.log(rates))[0])
    pandas = pytest.importorskip("pandas")
    assert smooth(list(values), 0.9) == pytest.approx(pandas.Series(values).ewm(alpha=0.1).mean())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0}, "low=0: must be a number above 0"),
        ({"low": 1.0, "high": 0.1}, "high=0.1: must be above low=1.0"),
        ({"steps": 2}, "steps=2: must be a whole number of at least 3"),
        ({"beta": 1.0}, "beta=1.0: must be a number from 0 to below 1"),
        ({"low": 1e9, "high": 1e12}, "low=1000000000.0: must be a rate at which the loss stays finite"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str, digits: Dataset) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        range_test(network(), digits, RECIPE, **{"steps": 5, "seed": 0, **settings})
