"""The learning-rate range test: train a little while the rate grows, and see where the loss falls, and blows up.

Source: Smith 2015, arXiv:1506.01186. That the rate grows by a factor a step, that the loss is smoothed, and when the
test is over: Gugger 2018, sgugger.github.io/how-do-you-find-a-good-learning-rate.html.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset
from course_lib.lab.training import Diverged, Recipe, fit

BLOWN_UP = 4.0
"""The test is over once the smoothed loss is so many times its lowest value."""


@dataclass(frozen=True)
class RangeTest:
    """The rate of each step, the loss of its batch before it was taken, and the smoothed losses."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest, over the logarithm of the rate, before its minimum.

        The first tenth of the steps is not asked: there the smoothed loss is a mean of a few noisy ones.
        """
        slopes = slopes_over_log(self.rates, self.smoothed)
        first = min(len(slopes) // 10, self._lowest)
        return self.rates[min(range(first, self._lowest + 1), key=slopes.__getitem__)]

    @property
    def before_divergence(self) -> float:
        """A tenth of the rate at which the smoothed loss is lowest: right before it rises is too close."""
        return self.rates[self._lowest] / 10

    @property
    def _lowest(self) -> int:
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)


def smooth(values: Sequence[float], beta: float) -> list[float]:
    r"""Return the running means :math:`m \leftarrow \beta m + (1-\beta) x`, corrected for their start at zero."""
    mean, means = 0.0, []
    for t, value in enumerate(values, start=1):
        mean = beta * mean + (1 - beta) * value
        means.append(mean / (1 - beta**t))
    return means


def slopes_over_log(rates: Sequence[float], values: Sequence[float]) -> list[float]:
    """Return the slope of ``values`` over the logarithm of ``rates`` at each: between its neighbours, or at an end."""
    last = len(rates) - 1
    pairs = [(max(0, i - 1), min(last, i + 1)) for i in range(len(rates))]
    return [(values[b] - values[a]) / math.log(rates[b] / rates[a]) for a, b in pairs]


def range_test(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 100,
    seed: int,
    beta: float = 0.9,
) -> RangeTest:
    """Train a copy of ``model`` for ``steps`` steps whose rate grows from ``low`` to ``high`` by one factor a step.

    The steps are those of ``fit``: optimizer, objective, augmentation, batch size, clipping and precision are the
    recipe's; its schedule, stop and validations are left out. With several parameter groups, ``low`` and ``high`` are
    the rates of the first, the others keep their ratio to it. What comes after the loss has blown up, to four times its
    lowest smoothed value, is cut off. ``model`` stays as it was.

    Parameters
    ----------
    beta : how much of the smoothed loss is kept at each step, of 0 (nothing) to below 1.

    Raises
    ------
    ValueError : not ``0 < low < high``, fewer than 3 steps, or the loss was not finite within the first 3.
    """
    for name, value in {"low": low, "high": high}.items():
        require(name, value, lambda x: is_number(x) and x > 0, "a number above 0")
    require("high", high, lambda x: x > low, f"above low={low!r}")
    require("beta", beta, lambda x: is_number(x) and 0 <= x < 1, "a number from 0 to below 1")
    at_least(3, steps=steps)
    grows = partial(_growing, low=low, high=high, steps=steps)
    plain = replace(recipe, epochs=1, schedule=grows, stop=None, keep=None, ema=None, watch=None, validate_every=1)
    try:
        history = fit(copy.deepcopy(model), _for_steps(data, recipe, steps, seed), plain, seed=seed, progress=False)
    except Diverged as error:
        history = error.history
    rates, losses = [rates[0] for rates in history.rates], history.losses
    kept = _before_blow_up(losses, smooth(losses, beta))
    if kept < 3:
        raise ValueError(f"low={low!r}: must be a rate at which the loss stays finite, it was {losses[:3]}")
    return RangeTest(tuple(rates[:kept]), tuple(losses[:kept]), tuple(smooth(losses[:kept], beta)))


def _growing(optimizer: Optimizer, total_steps: int, *, low: float, high: float, steps: int) -> LambdaLR:
    own = optimizer.param_groups[0]["lr"]
    require("optimizer's lr", own, lambda x: x > 0, "above 0, so that it can be scaled")
    return LambdaLR(optimizer, lambda step: low / own * (high / low) ** (step / (steps - 1)))


def _for_steps(data: Dataset, recipe: Recipe, steps: int, seed: int) -> Dataset:
    """A data set of which one epoch has exactly ``steps`` steps; the single validation at its end costs nothing."""
    generator = torch.Generator().manual_seed(seed)
    needed, count = steps * recipe.size_of_batch(1), len(data.train)
    passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    train = data.train.subset(torch.cat(passes)[:needed])
    return replace(data, train=train, val=data.val.subset(torch.arange(1)))


def _before_blow_up(losses: Sequence[float], smoothed: Sequence[float]) -> int:
    """How many steps there are up to the first at which the loss is not finite or has blown up."""
    lowest = math.inf
    for step, (loss, value) in enumerate(zip(losses, smoothed, strict=True)):
        lowest = min(lowest, value)
        if not math.isfinite(loss) or value > BLOWN_UP * lowest:
            return step
    return len(losses)
