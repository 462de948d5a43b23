"""What each rule keeps when the batch changes: the way, the noise, the memory of an average."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from course_lib import optimizers, schedules
from course_lib.batching import scaling
from course_lib.lab.data import load
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fit, fresh

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=1e-3)


def test_rates_and_decays_by_their_formulas() -> None:
    assert scaling.linear(0.1, 32, 128) == pytest.approx(0.4)
    assert scaling.linear(0.1, 32, 8) == pytest.approx(0.025)
    assert scaling.square_root(0.1, 32, 128) == pytest.approx(0.2)
    assert scaling.adam_beta(0.999, 32, 128) == pytest.approx(0.996)
    assert scaling.adam_eps(1e-8, 32, 128) == pytest.approx(5e-9)
    assert scaling.ema_decay(0.9, 32, 96) == pytest.approx(0.729)
    for rule in (scaling.linear, scaling.square_root, partial(scaling.saturating, noise_scale=50.0)):
        assert rule(0.1, 32, 32) == pytest.approx(0.1)
        assert rule(rule(0.1, 32, 200), 200, 32) == pytest.approx(0.1)


def test_linear_goes_as_far_in_one_step_as_the_small_batches_in_many() -> None:
    """With gradients that do not change on the way, which is what the rule supposes."""
    gradients = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # 4 batches of 8
    small = -sum(0.1 * batch.mean(0) for batch in gradients)
    large = -scaling.linear(0.1, 8, 32) * gradients.flatten(0, 1).mean(0)
    torch.testing.assert_close(small, large, rtol=1e-12, atol=0)


def walk(lr: float, batch_size: int, examples: int, make: Any = torch.optim.SGD, **settings: Any) -> float:
    """The spread of 4,000 weights that see nothing but noise of variance 1 an example, after so many examples."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.zeros(4000, dtype=torch.float64, requires_grad=True)
    optimizer = make([theta], lr=lr, **settings)
    for _ in range(examples // batch_size):
        theta.grad = torch.randn(4000, generator=generator, dtype=torch.float64) / math.sqrt(batch_size)
        optimizer.step()
    return float(theta.detach().square().mean().sqrt())


def test_for_sgd_the_square_root_keeps_the_noise_of_a_step_and_linear_that_of_an_epoch() -> None:
    step, epoch = walk(0.1, 4, 4), walk(0.1, 4, 2048)
    assert walk(scaling.square_root(0.1, 4, 64), 64, 64) == pytest.approx(step, rel=0.05)
    assert walk(scaling.linear(0.1, 4, 64), 64, 64) > 3 * step
    assert walk(scaling.linear(0.1, 4, 64), 64, 2048) == pytest.approx(epoch, rel=0.05)
    assert walk(scaling.square_root(0.1, 4, 64), 64, 2048) < epoch / 3


def test_adams_rule_keeps_the_walk_and_each_setting_has_its_part() -> None:
    old, new, examples = 2, 16, 16384
    settings = {"betas": (0.98, 0.99), "eps": 0.5}
    small = walk(1e-3, old, examples, torch.optim.Adam, **settings)
    scaled = {
        "betas": tuple(scaling.adam_beta(beta, old, new) for beta in settings["betas"]),  # type: ignore[attr-defined]
        "eps": scaling.adam_eps(0.5, old, new),
    }
    lr = scaling.square_root(1e-3, old, new)
    assert walk(lr, new, examples, torch.optim.Adam, **scaled) == pytest.approx(small, rel=0.04)
    assert walk(scaling.linear(1e-3, old, new), new, examples, torch.optim.Adam, **scaled) > 2 * small
    assert walk(lr, new, examples, torch.optim.Adam, **{**scaled, "eps": 0.5}) < 0.8 * small


def test_an_average_of_weights_forgets_as_much() -> None:
    """Weights that wait for kappa steps: the average with the power of the decay stands where the other does."""
    decay, kappa = 0.97, 5
    slow, fast = 0.0, 0.0
    for value in (1.0, 3.0, -2.0):
        for _ in range(kappa):
            slow = decay * slow + (1 - decay) * value
        power = scaling.ema_decay(decay, 10, 10 * kappa)
        fast = power * fast + (1 - power) * value
    assert fast == pytest.approx(slow, rel=1e-12)


def test_an_average_of_gradients_is_as_long_in_examples() -> None:
    beta = scaling.adam_beta(0.99, 10, 50)
    assert 50 / (1 - beta) == pytest.approx(10 / (1 - 0.99))


def test_saturating_is_linear_below_the_noise_scale_and_flat_above() -> None:
    from course_lib.batching.critical import best_step_length

    rule = partial(scaling.saturating, noise_scale=1000.0)
    assert rule(0.1, 1, 2) == pytest.approx(scaling.linear(0.1, 1, 2), rel=2e-3)
    assert rule(0.1, 10**6, 2 * 10**6) == pytest.approx(0.1, rel=1e-3)
    expected = best_step_length(7.0, 640, 1000.0) / best_step_length(7.0, 64, 1000.0)
    assert rule(0.1, 64, 640) == pytest.approx(0.1 * expected)


# --- Recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_for_another_batch() -> None:
    recipe = Recipe(batch_size=32, optimizer=SGD, ema=0.99)
    changed = scaling.rescaled(recipe, 128, rule=scaling.square_root)
    assert changed.batch_size == 128
    assert changed.ema == pytest.approx(0.99**4)
    group = changed.optimizer(mlp((4,), 3).named_parameters()).param_groups[0]
    assert group["lr"] == pytest.approx(0.2)
    assert group["momentum"] == 0.9
    assert changed.schedule is None
    assert recipe.optimizer.keywords["lr"] == 0.1  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, optimizers.Adam])
def test_adam_for_another_batch_with_its_defaults(make: Any) -> None:
    changed = scaling.rescaled_adam(Recipe(batch_size=32, optimizer=partial(make)), 64)
    group = changed.optimizer(mlp((4,), 3).named_parameters()).param_groups[0]
    assert group["lr"] == pytest.approx(1e-3 * math.sqrt(2))
    assert group["betas"] == pytest.approx((0.8, 0.998))
    assert group["eps"] == pytest.approx(1e-8 / math.sqrt(2))


def test_warm_up_starts_at_the_old_rate_and_reaches_the_new_one() -> None:
    data = load("digits", train_size=80)
    recipe = Recipe(epochs=2, batch_size=4, optimizer=SGD)
    changed = scaling.rescaled(recipe, 8, warmup=10, then=schedules.cosine)
    history = fit(fresh(partial(mlp, (1, 8, 8), 10, width=4), changed, seed=0), data, changed, seed=0)
    rates = [rate for (rate,) in history.rates]
    assert rates[0] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(0.15)
    assert rates[10] == pytest.approx(0.2)
    assert rates[15] == pytest.approx(0.1)  # half way down the wave


def test_what_cannot_be_scaled_says_so() -> None:
    recipe = Recipe(batch_size=32, optimizer=SGD)
    with pytest.raises(ValueError, match=r"batch_size=0: must be a whole number of at least 1"):
        scaling.rescaled(recipe, 0)
    with pytest.raises(ValueError, match=r"must be functools.partial\(method, lr=...\)"):
        scaling.rescaled(replace(recipe, optimizer=lambda parameters: SGD(parameters)), 64)
    with pytest.raises(ValueError, match=r"whose betas can be scaled"):
        scaling.rescaled_adam(recipe, 64)
    with pytest.raises(ValueError, match=r"recipe.batch_size=.*must be a whole number"):
        scaling.rescaled(replace(recipe, batch_size=lambda epoch: 32), 64)
    with pytest.raises(ValueError, match=r"recipe.schedule=.*must be None beside warmup"):
        scaling.rescaled(replace(recipe, schedule=schedules.schedule(schedules.cosine)), 64, warmup=5)
    with pytest.raises(ValueError, match=r"batch_size=16: must be one at which the rate grows, beside warmup=5"):
        scaling.rescaled(recipe, 16, warmup=5)
    with pytest.raises(ValueError, match=r"beta=0.9 at 16 times the batch would be -0.6.*at most 320"):
        scaling.rescaled_adam(Recipe(batch_size=32, optimizer=ADAM), 512)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: scaling.linear(-1, 8, 16), "lr=-1: must be"),
        (lambda: scaling.square_root(0.1, 0, 16), "old=0: must be"),
        (lambda: scaling.saturating(0.1, 8, 16, noise_scale=-1), "noise_scale=-1: must be"),
        (lambda: scaling.adam_beta(1.0, 8, 16), "beta=1.0: must be"),
        (lambda: scaling.adam_eps(-1, 8, 16), "eps=-1: must be"),
        (lambda: scaling.ema_decay(1.0, 8, 16), "decay=1.0: must be"),
    ],
)
def test_bad_arguments(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
