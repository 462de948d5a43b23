"""Sizes epoch by epoch, the temperature of two runs that should be alike, and what ``fit`` makes of it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from course_lib import schedules
from course_lib.batching.growing import from_noise_scale, grow, grow_then_decay, noise_temperature
from course_lib.lab.data import load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fit, fresh

RECIPE = Recipe(epochs=6, batch_size=8, precision="float64", optimizer=partial(torch.optim.SGD, lr=0.1))


def test_the_size_is_multiplied_where_multi_step_would_lower_the_rate() -> None:
    size = grow(8, factor=2, milestones=(2, 5))
    assert [size(epoch) for epoch in range(1, 8)] == [8, 8, 16, 16, 16, 32, 32]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5], gamma=0.5)
    for epoch in range(1, 8):
        assert size(epoch) == 8 / optimizer.param_groups[0]["lr"]
        optimizer.step()
        steps.step()
    assert [grow(10, factor=1.5, milestones=(1, 2, 3), most=30)(epoch) for epoch in range(1, 6)] == [10, 15, 22, 30, 30]


def test_the_temperature_of_a_growing_batch_is_that_of_a_falling_rate() -> None:
    size = grow(8, factor=4, milestones=(3,))
    for epoch in range(1, 6):
        rate = 0.1 * 0.25 ** (epoch > 3)
        assert noise_temperature(0.1, size(epoch), 4000) == pytest.approx(noise_temperature(rate, 8, 4000))
    assert noise_temperature(0.1, 100, 1000) == pytest.approx(1.0)
    assert noise_temperature(0.1, 100, 1000, momentum=0.9) == pytest.approx(10.0)


def test_it_is_the_temperature_that_a_quadratic_settles_at() -> None:
    """Momentum on x^2 / 2 with noise: for small rates the mean of x^2 follows lr / (B (1 - m))."""
    generator = torch.Generator().manual_seed(0)

    def spread(lr: float, batch_size: int, momentum: float) -> float:
        x = torch.zeros(4000, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum)
        seen = []
        for step in range(900):
            noise = torch.randn(4000, generator=generator, dtype=torch.float64) / math.sqrt(batch_size)
            x.grad = x.detach() + noise
            optimizer.step()
            if step >= 600 and step % 50 == 0:
                seen.append(float(x.detach().square().mean()))
        return sum(seen) / len(seen)

    settings = [(0.02, 4, 0.0), (0.02, 16, 0.0), (0.01, 8, 0.8)]
    ratios = [spread(*each) / noise_temperature(each[0], each[1], 1000, momentum=each[2]) for each in settings]
    assert max(ratios) / min(ratios) < 1.1


def test_a_run_grows_then_lets_the_rate_fall() -> None:
    data = load("digits", train_size=90)
    recipe = grow_then_decay(RECIPE, 90, factor=2, milestones=(1, 2, 4), most=20)
    model = fresh(partial(mlp, (1, 8, 8), 10, width=4), recipe, seed=0)
    history = fit(model, data, recipe, seed=0)
    sizes = [8, 16, 20, 20, 20, 20]
    assert recipe.steps(90) == [math.ceil(90 / size) for size in sizes]
    assert len(history.losses) == sum(recipe.steps(90))
    wanted = [8, 16, 32, 32, 64, 64]
    expected = [0.1 * size / want for size, want in zip(sizes, wanted, strict=True)]
    rates = iter(rate for (rate,) in history.rates)
    for steps, rate, want in zip(recipe.steps(90), expected, wanted, strict=True):
        for _ in range(steps):
            assert next(rates) == pytest.approx(rate)
        assert rate / sizes[wanted.index(want)] == pytest.approx(0.1 / want)  # the temperature
    assert fingerprint(recipe) == fingerprint(grow_then_decay(RECIPE, 90, factor=2, milestones=[1, 2, 4], most=20))
    with pytest.raises(ValueError, match=r"examples gave 14 steps, the run has 42: must be"):
        fit(model, data, grow_then_decay(RECIPE, 30, factor=2, milestones=(1,)), seed=0)


def test_sizes_that_follow_a_measured_noise_scale() -> None:
    size = from_noise_scale([3.0, 21.0, 27.0, math.inf, -5.0, 50.0], least=8, most=64, multiple=8)
    assert [size(epoch) for epoch in range(1, 9)] == [8, 24, 24, 64, 8, 48, 48, 48]
    recipe = replace(RECIPE, batch_size=size)
    assert recipe.steps(96) == [12, 4, 4, 2, 12, 2]
    assert fingerprint(size) == fingerprint(
        from_noise_scale((3, 21, 27, math.inf, -5, 50), least=8, most=64, multiple=8)
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: grow(0, factor=2, milestones=()), "first=0: must be"),
        (lambda: grow(8, factor=1, milestones=()), "factor=1: must be a number above 1"),
        (lambda: grow(8, factor=2, milestones=(3, 2)), r"milestones=\(3, 2\): must be whole numbers .*rising"),
        (lambda: grow(8, factor=2, milestones=(), most=4), "most=4: must be None or at least first=8"),
        (lambda: grow_then_decay(replace(RECIPE, batch_size=grow), 9, factor=2, milestones=()), "recipe.batch_size="),
        (
            lambda: grow_then_decay(
                replace(RECIPE, schedule=schedules.schedule(schedules.cosine)), 9, factor=2, milestones=()
            ),
            "recipe.schedule=.*must be None",
        ),
        (lambda: noise_temperature(0.1, 10, 9), "batch_size=10: must be at most examples=9"),
        (lambda: noise_temperature(-0.1, 1, 9), "lr=-0.1: must be"),
        (lambda: noise_temperature(0.1, 1, 9, momentum=1), "momentum=1: must be"),
        (lambda: from_noise_scale([], least=1, most=2), r"noise_scales=\(\): must be at least one number"),
        (lambda: from_noise_scale([math.nan], least=1, most=2), "none of them NaN"),
        (lambda: from_noise_scale([1.0], least=4, most=2), "most=2: must be a whole number of at least least=4"),
        (lambda: from_noise_scale([1.0], least=8, most=20, multiple=8), "most=20: must be a multiple of multiple=8"),
    ],
)
def test_bad_arguments(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
