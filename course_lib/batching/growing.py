r"""Growing batches: let the batch grow where others let the rate fall, and save steps.

=====================  =============================================================  ==================================
name                   what it does                                                   source
=====================  =============================================================  ==================================
``noise_temperature``  how strongly SGD shakes: rate times examples over batch        Smith & Le 2017, arXiv:1710.06451
``grow``               a batch size that is multiplied at milestones                  Smith et al. 2017,
``grow_then_decay``    the same in a recipe, whose rate falls once it is too large     arXiv:1711.00489
``from_noise_scale``   a batch size that follows a measured noise scale               McCandlish et al. 2018,
                                                                                      arXiv:1812.06162, appendix D
=====================  =============================================================  ==================================

``Recipe(batch_size=grow(32, factor=2, milestones=(10, 20)))``: ``fit`` asks for the size of each epoch, from 1. It asks
for all of them at the start, to count the steps; so a size cannot react to the run it is used in, and
``from_noise_scale`` takes what an earlier run measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from course_lib.lab.arguments import at_least, is_number, is_whole, require
from course_lib.lab.training import Recipe

Size = Callable[[int], int]
"""``epoch -> examples``, epochs from 1, as ``Recipe.batch_size`` takes it."""


def noise_temperature(lr: float, batch_size: int, examples: int, *, momentum: float = 0.0) -> float:
    r"""Return :math:`g = \eta N / (B\,(1 - m))`, the scale of SGD's random fluctuations, for B far below N.

    Half the rate or twice the batch: the same g. Source: Smith & Le 2017, arXiv:1710.06451; with momentum Smith et al.
    2017, arXiv:1711.00489.

    Raises
    ------
    ValueError : a rate below 0, a momentum that is not in [0, 1), or a batch of more than ``examples``.
    """
    at_least(1, examples=examples, batch_size=batch_size)
    require("batch_size", batch_size, lambda b: b <= examples, f"at most examples={examples}")
    require("lr", lr, lambda rate: is_number(rate) and rate >= 0, "a finite number of at least 0")
    require("momentum", momentum, lambda m: is_number(m) and 0 <= m < 1, "a number of at least 0 and less than 1")
    return lr * examples / (batch_size * (1 - momentum))


def grow(first: int, *, factor: float, milestones: Sequence[int], most: int | None = None) -> Size:
    r"""Return ``epoch -> size``: ``first`` times ``factor`` for each of the ``milestones`` that is over.

    A milestone is a number of epochs: with ``milestones=(10,)`` epoch 11 is the first of the larger batch, just where
    ``MultiStepLR`` would lower the rate. Sizes are rounded, and at most ``most``: the memory's limit, or a tenth of the
    examples, beyond which the temperature is no longer what it seems. Source: Smith et al. 2017, arXiv:1711.00489.

    Raises
    ------
    ValueError : ``factor`` is not above 1, a milestone is no whole number from 1, or ``most`` is below ``first``.
    """
    at_least(1, first=first)
    require("factor", factor, lambda f: is_number(f) and f > 1, "a number above 1")
    marks = tuple(milestones)
    whole = "whole numbers of at least 1, rising"
    require("milestones", marks, lambda m: all(is_whole(e) and e >= 1 for e in m) and list(m) == sorted(set(m)), whole)
    require("most", most, lambda b: b is None or (is_whole(b) and b >= first), f"None or at least first={first}")
    return partial(_grown, first=first, factor=factor, milestones=marks, most=most)


def _grown(epoch: int, *, first: int, factor: float, milestones: tuple[int, ...], most: int | None) -> int:
    wanted = round(_wanted(epoch, first, factor, milestones))
    return wanted if most is None else min(wanted, most)


def _wanted(epoch: int, first: int, factor: float, milestones: tuple[int, ...]) -> float:
    """The size without limit and rounding."""
    return first * factor ** sum(milestone < epoch for milestone in milestones)


def grow_then_decay(
    recipe: Recipe, examples: int, *, factor: float, milestones: Sequence[int], most: int | None = None
) -> Recipe:
    """Return a recipe whose batch grows by ``grow`` up to ``most``, and whose rate falls for what is then missing.

    The temperature is in each epoch that of a rate divided by ``factor`` at each milestone. The recipe's batch size is
    the first. Source: Smith et al. 2017, arXiv:1711.00489.

    Parameters
    ----------
    examples : of the training split, which the steps of an epoch depend on.

    Raises
    ------
    ValueError : as ``grow``; or the recipe's batch size is no number, or it has a schedule.
    """
    at_least(1, examples=examples, **{"recipe.batch_size": recipe.batch_size})
    require("recipe.schedule", recipe.schedule, lambda s: s is None, "None: the rate falls by itself here")
    first: int = recipe.batch_size  # type: ignore[assignment]
    size = grow(first, factor=factor, milestones=milestones, most=most)
    grown = replace(recipe, batch_size=size)
    left = [size(e) / _wanted(e, first, factor, tuple(milestones)) for e in range(1, recipe.epochs + 1)]
    ends = tuple(accumulate(grown.steps(examples)))
    return replace(grown, schedule=partial(_decayed, ends=ends, left=tuple(left)))


def _decayed(optimizer: Optimizer, total_steps: int, *, ends: tuple[int, ...], left: tuple[float, ...]) -> LambdaLR:
    if total_steps != ends[-1]:
        raise ValueError(
            f"examples gave {ends[-1]} steps, the run has {total_steps}: must be the number of the training split, and "
            "epochs those of the recipe"
        )
    return LambdaLR(optimizer, partial(_left_at, ends=ends, left=left))


def _left_at(step: int, *, ends: tuple[int, ...], left: tuple[float, ...]) -> float:
    return left[min(sum(end <= step for end in ends), len(left) - 1)]


def from_noise_scale(noise_scales: Sequence[float], *, least: int, most: int, multiple: int = 1) -> Size:
    """Return ``epoch -> size``: the noise scale of that epoch, from ``least`` to ``most``, by whole ``multiple``.

    ``noise_scales`` is one number an epoch, such as ``history["noise_scale"]`` of a ``tracked`` run; epochs beyond the
    last go on with it, an infinite one stands for ``most``. The optimal size at each moment is of the order of the
    noise scale, no more. Source: McCandlish et al. 2018, arXiv:1812.06162, appendix D.

    Raises
    ------
    ValueError : no number, one that is NaN, or not ``multiple <= least <= most`` in whole multiples.
    """
    at_least(1, multiple=multiple)
    require("least", least, lambda b: is_whole(b) and b >= multiple, f"a whole number of at least multiple={multiple}")
    require("most", most, lambda b: is_whole(b) and b >= least, f"a whole number of at least least={least}")
    for name, value in {"least": least, "most": most}.items():
        require(name, value, lambda b: b % multiple == 0, f"a multiple of multiple={multiple}")
    scales = tuple(map(float, noise_scales))
    require(
        "noise_scales", scales, lambda s: s and not any(map(math.isnan, s)), "at least one number, none of them NaN"
    )
    return partial(_followed, scales=scales, least=least, most=most, multiple=multiple)


def _followed(epoch: int, *, scales: tuple[float, ...], least: int, most: int, multiple: int) -> int:
    within = min(max(scales[min(epoch, len(scales)) - 1], least), most)
    return round(within / multiple) * multiple
