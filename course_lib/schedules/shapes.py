"""Shapes: the learning rate as a function of the step. Each is ``(step, total, **settings) -> factor``.

=========================  =======================================================  ===================================
name                       the factor over the steps                                source
=========================  =======================================================  ===================================
``constant``               small for some steps, then 1                             as ``ConstantLR``
``step_decay``             times gamma every so many steps                          as ``StepLR``
``multi_step``             times gamma at each milestone                            as ``MultiStepLR``
``exponential``            times gamma at every step                                as ``ExponentialLR``
``polynomial``             a power of the part that is left                         as ``PolynomialLR``
``linear``                 a straight line                                          as ``LinearLR``
``cosine``                 half a wave, from 1 to the floor                         Loshchilov & Hutter 2016,
                                                                                    arXiv:1608.03983
``cosine_restarts``        the same again and again, each time longer               the same (SGDR)
``triangular``             up and down between two rates                            Smith 2015, arXiv:1506.01186
``triangular2``            the same, half as high after each cycle                  the same
``exp_range``              the same, its height decaying at every step              the same
``one_cycle``              up once, then down to almost nothing                     Smith & Topin 2017,
                                                                                    arXiv:1708.07120
``one_cycle_three_phase``  up, back down as fast, then to almost nothing            the same
``one_cycle_momentum``     (of the momentum) low where the rate is high             the same
``inverse_square_root``    a line up, then one over the root of the step            Vaswani et al. 2017,
                                                                                    arXiv:1706.03762
``warm_up``                a line up, then any other shape                          Goyal et al. 2017, arXiv:1706.02677
``stable_decay``           1, then down at the end                                  Hu et al. 2024, arXiv:2404.06395
``warm_up_stable_decay``   a line up, 1, then down at the end (WSD)                 the same
=========================  =======================================================  ===================================

``step`` is the number of steps taken so far: 0 at the first, ``total - 1`` at the last of ``total``. The factor
multiplies the optimizer's own rate, which is the *highest* rate of every shape that has a highest one; so a shape can
be changed without touching the rate. ``schedule(cosine, floor=0.01)`` is what ``Recipe.schedule`` wants.

A number of steps is given as a whole number, or as a fraction of all steps: 100, or 0.05. Shapes agree with their
namesakes in ``torch.optim.lr_scheduler`` at every step, ``total`` being torch's ``total_iters``, ``T_max`` or
``total_steps``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from course_lib.lab.arguments import at_least, is_number, is_whole, require

Shape = Callable[..., float]
"""``(step, total, **settings) -> factor``"""

Curve = Callable[[float], float]
"""A way down: the part of the way that is done, 0 to 1 -> the part of the height that is left, 1 to 0."""

Schedule = Callable[[Optimizer, int], LRScheduler]
"""What ``Recipe.schedule`` takes: ``(optimizer, total_steps) -> scheduler``."""

Steps = int | float
"""A number of steps, or a fraction of all of them."""


def count_of(name: str, value: Steps, total: int) -> int:
    """Return a number of steps that may be given as a fraction, below 1, of ``total``.

    Raises
    ------
    ValueError : neither a whole number of at least 0 nor a fraction between 0 and 1.
    """
    if is_whole(value) and value >= 0:
        return int(value)
    fraction = "a whole number of at least 0, or a fraction of all steps between 0 and 1"
    require(name, value, lambda x: is_number(x) and 0 < x < 1, fraction)
    return round(value * total)


# --- Steps down -------------------------------------------------------------------------------------------------------


def constant(step: int, total: int, *, factor: float = 1 / 3, steps: Steps = 5) -> float:
    """Return ``factor`` for the first ``steps`` (torch: ``total_iters``), then 1."""
    _check(step, total)
    _fractions(factor=factor)
    return factor if step < count_of("steps", steps, total) else 1.0


def step_decay(step: int, total: int, *, step_size: Steps, gamma: float = 0.1) -> float:
    r"""Multiply by ``gamma`` every ``step_size`` steps: :math:`\gamma^{\lfloor t/s \rfloor}`."""
    _check(step, total)
    _positive(gamma=gamma)
    return gamma ** (step // max(1, count_of("step_size", step_size, total)))


def multi_step(step: int, total: int, *, milestones: Sequence[Steps], gamma: float = 0.1) -> float:
    """Multiply by ``gamma`` at each of the ``milestones``."""
    _check(step, total)
    _positive(gamma=gamma)
    return gamma ** sum(count_of("milestones", milestone, total) <= step for milestone in milestones)


def exponential(step: int, total: int, *, gamma: float) -> float:
    r"""Multiply by ``gamma`` at every step: :math:`\gamma^t`."""
    _check(step, total)
    _positive(gamma=gamma)
    return gamma**step


# --- Smooth ways down -------------------------------------------------------------------------------------------------


def polynomial(step: int, total: int, *, power: float = 1.0) -> float:
    r"""Return a power of the part of the steps that is left: :math:`(1 - t/T)^p`; 0 from step T on."""
    _check(step, total)
    _positive(power=power)
    return (1 - min(step, total) / total) ** power


def linear(step: int, total: int, *, start_factor: float = 1 / 3, end_factor: float = 1.0) -> float:
    """Go from ``start_factor`` to ``end_factor`` on a straight line, and stay there from step ``total`` on."""
    _check(step, total)
    _fractions(start_factor=start_factor, end_factor=end_factor)
    return linear_between(start_factor, end_factor, min(step, total) / total)


def cosine(step: int, total: int, *, floor: float = 0.0) -> float:
    r"""Go from 1 to ``floor`` on half a wave: :math:`f + (1-f)\,(1 + \cos(\pi t/T))/2`.

    ``floor`` is torch's ``eta_min`` over the optimizer's rate. As in torch the wave rises again past step T.
    Source: Loshchilov & Hutter 2016, arXiv:1608.03983.
    """
    _check(step, total)
    _fractions(floor=floor)
    return cosine_between(1.0, floor, step / total)


def cosine_restarts(step: int, total: int, *, first: Steps, longer: int = 1, floor: float = 0.0) -> float:
    """Go down on half a wave in ``first`` steps, jump back to 1, and again, each wave ``longer`` times the one before.

    ``first`` and ``longer`` are the paper's and torch's ``T_0`` and ``T_mult``.
    Source: SGDR, Loshchilov & Hutter 2016, arXiv:1608.03983.
    """
    _check(step, total)
    at_least(1, longer=longer)
    length = max(1, count_of("first", first, total))
    if longer == 1:
        step %= length
    while step >= length:
        step, length = step - length, length * longer
    return cosine(step, length, floor=floor)


# --- Cycles -----------------------------------------------------------------------------------------------------------


def triangle(step: int, up: int, down: int) -> tuple[int, float]:
    """Return the cycle that ``step`` falls into, from 0, and the height there: 0 at its ends, 1 after ``up`` steps."""
    cycle, within = divmod(step, up + down)
    return cycle, within / up if within <= up else 1 - (within - up) / down


def triangular(
    step: int, total: int, *, step_size_up: Steps, step_size_down: Steps | None = None, low: float = 0.1
) -> float:
    """Go up from ``low`` to 1 and back on straight lines, again and again.

    ``low`` is the lower rate over the upper one, which is the optimizer's (torch: ``base_lr`` and ``max_lr``).
    ``step_size_down`` is ``step_size_up`` if not given. Source: Smith 2015, arXiv:1506.01186.
    """
    _, height = _triangle(step, total, step_size_up, step_size_down, low)
    return low + (1 - low) * height


def triangular2(
    step: int, total: int, *, step_size_up: Steps, step_size_down: Steps | None = None, low: float = 0.1
) -> float:
    """Go up and down as ``triangular``, half as high above ``low`` in each cycle as in the one before."""
    cycle, height = _triangle(step, total, step_size_up, step_size_down, low)
    return low + (1 - low) * height / 2**cycle


def exp_range(
    step: int, total: int, *, step_size_up: Steps, step_size_down: Steps | None = None, low: float = 0.1, gamma: float
) -> float:
    """Go up and down as ``triangular``, the height above ``low`` times ``gamma`` to the power of the step."""
    _positive(gamma=gamma)
    _, height = _triangle(step, total, step_size_up, step_size_down, low)
    return low + (1 - low) * height * gamma**step


def _triangle(step: int, total: int, up: Steps, down: Steps | None, low: float) -> tuple[int, float]:
    _check(step, total)
    _fractions(low=low)
    rise = max(1, count_of("step_size_up", up, total))
    return triangle(step, rise, rise if down is None else max(1, count_of("step_size_down", down, total)))


# --- One cycle --------------------------------------------------------------------------------------------------------


def linear_between(start: float, end: float, part: float) -> float:
    """Return what lies at ``part`` of the straight way from ``start`` to ``end``."""
    return start + (end - start) * part


def cosine_between(start: float, end: float, part: float) -> float:
    """Return what lies at ``part`` of half a wave from ``start`` to ``end``: slow at both ends."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


Between = Callable[[float, float, float], float]


def one_cycle(
    step: int,
    total: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    between: Between = cosine_between,
) -> float:
    """Go up from ``1 / div_factor`` to 1 in the first ``pct_start`` of all steps, then down to almost nothing.

    The last factor is the first one divided by ``final_div_factor``. ``between=linear_between`` draws straight lines,
    as the paper does. Source: Smith & Topin 2017, arXiv:1708.07120; the waves, and two phases where the paper has
    three, are those of fastai and torch.
    """
    first = _one_cycle_ends(step, total, pct_start, div_factor, final_div_factor)
    ends = [pct_start * total - 1, total - 1]
    return _piecewise(min(step, total), ends, [first, 1.0, first / final_div_factor], between)


def one_cycle_three_phase(
    step: int,
    total: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    between: Between = cosine_between,
) -> float:
    """Go up as ``one_cycle``, back to the first factor in as many steps, and from there to almost nothing.

    This is the cycle as the paper draws it. Source: Smith & Topin 2017, arXiv:1708.07120.
    """
    first = _one_cycle_ends(step, total, pct_start, div_factor, final_div_factor)
    ends = [pct_start * total - 1, 2 * pct_start * total - 2, total - 1]
    return _piecewise(min(step, total), ends, [first, 1.0, first, first / final_div_factor], between)


def one_cycle_momentum(
    step: int,
    total: int,
    *,
    pct_start: float = 0.3,
    base_momentum: float = 0.85,
    max_momentum: float = 0.95,
    between: Between = cosine_between,
) -> float:
    """Return the momentum (no factor) that goes with ``one_cycle``: lowest where the rate is highest."""
    _check(step, total)
    _fractions(pct_start=pct_start, base_momentum=base_momentum, max_momentum=max_momentum)
    ends = [pct_start * total - 1, total - 1]
    return _piecewise(min(step, total), ends, [max_momentum, base_momentum, max_momentum], between)


def _piecewise(step: int, ends: Sequence[float], values: Sequence[float], between: Between) -> float:
    """Join ``values`` by one piece after the other; each ends at its step, the last goes on."""
    start = 0.0
    for i, end in enumerate(ends):
        if step <= end or i == len(ends) - 1:
            break
        start = end
    return between(values[i], values[i + 1], (step - start) / (end - start) if end != start else 1.0)


def _one_cycle_ends(step: int, total: int, pct_start: float, div_factor: float, final_div_factor: float) -> float:
    _check(step, total)
    _fractions(pct_start=pct_start)
    _positive(div_factor=div_factor, final_div_factor=final_div_factor)
    return 1 / div_factor


# --- Warm-up ----------------------------------------------------------------------------------------------------------


def inverse_square_root(step: int, total: int, *, warmup: Steps) -> float:
    r"""Go up on a line to 1 in ``warmup`` steps, then down as :math:`\sqrt{w/s}`, steps :math:`s` counted from 1.

    .. math:: \min\big(s/w,\ \sqrt{w/s}\big)

    The paper's rate is this times :math:`(d\,w)^{-1/2}`, with the width d of the model.
    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 3.
    """
    _check(step, total)
    w, s = max(1, count_of("warmup", warmup, total)), step + 1
    return min(s / w, math.sqrt(w / s))


def flat(step: int, total: int) -> float:
    """Return 1: the rate stays as it is."""
    return 1.0


def warm_up(
    step: int, total: int, *, warmup: Steps, then: Shape = flat, start_factor: float = 0.01, **settings: Any
) -> float:
    """Go up on a line from ``start_factor`` in ``warmup`` steps, ``then`` another shape over the steps that are left.

    ``settings`` are those of the other shape. Torch says it as ``SequentialLR([LinearLR(…), …], milestones=[warmup])``.
    Source: Goyal et al. 2017, arXiv:1706.02677.
    """
    _check(step, total)
    _fractions(start_factor=start_factor)
    w = count_of("warmup", warmup, total)
    if step < w:
        return linear_between(start_factor, 1.0, step / w)
    return then(step - w, max(1, total - w), **settings)


# --- Stable, then down ------------------------------------------------------------------------------------------------


def linear_decay(part: float) -> float:
    """Return what a straight way down has left: ``1 - part``."""
    return 1 - part


def one_minus_sqrt(part: float) -> float:
    """Return ``1 - sqrt(part)``: steep at first. Source: Hägele et al. 2024, arXiv:2405.18392."""
    return 1 - math.sqrt(part)


def stable_decay(
    step: int, total: int, *, decay: Steps = 0.2, curve: Curve = linear_decay, floor: float = 0.0
) -> float:
    """Stay at 1, and go down to ``floor`` along ``curve`` in the last ``decay`` steps.

    A run can be lengthened as long as it has not begun to go down; ``cosine`` must know its end from the start.
    Source: Hu et al. 2024, arXiv:2404.06395.
    """
    _check(step, total)
    _fractions(floor=floor)
    d = count_of("decay", decay, total)
    require("decay", decay, lambda _: d <= total, f"at most total={total}")
    done = min(step, total) - (total - d)
    return 1.0 if done <= 0 else floor + (1 - floor) * curve(done / d)


def warm_up_stable_decay(
    step: int,
    total: int,
    *,
    warmup: Steps = 0.05,
    decay: Steps = 0.2,
    curve: Curve = linear_decay,
    floor: float = 0.0,
    start_factor: float = 0.01,
) -> float:
    """Go up in ``warmup`` steps, stay, and go down in the last ``decay`` ones (WSD); fractions are of all steps."""
    _check(step, total)
    d = count_of("decay", decay, total)
    return warm_up(
        step,
        total,
        warmup=warmup,
        then=stable_decay,
        start_factor=start_factor,
        decay=d,
        curve=curve,
        floor=floor,
    )


# --- In a recipe ------------------------------------------------------------------------------------------------------


def schedule(shape: Shape, *, momentum: Shape | None = None, **settings: Any) -> Schedule:
    """Return what ``Recipe.schedule`` takes: the optimizer's rates, each times ``shape(step, total, **settings)``.

    ``Recipe(schedule=schedule(warm_up, warmup=0.05, then=cosine))``. With ``momentum``, a shape too (with settings of
    its own by ``functools.partial``), the momentum of each group is set to its value: ``momentum`` itself, or Adam's
    first ``beta``.

    Raises
    ------
    ValueError : ``settings`` holds something that ``shape`` does not take, or lacks what it needs; at the first step,
        also when ``momentum`` is given for an optimizer that has none, or a setting is out of its range.
    """
    try:
        inspect.signature(shape).bind(0, 1, **settings)
    except TypeError as error:
        raise ValueError(f"settings={settings!r}: must fit {_name(shape)}{inspect.signature(shape)}: {error}") from None
    return partial(_scheduled, shape=shape, momentum=momentum, settings=settings)


def _scheduled(
    optimizer: Optimizer, total_steps: int, *, shape: Shape, momentum: Shape | None, settings: Mapping[str, Any]
) -> LRScheduler:
    at_least(1, total_steps=total_steps)
    factor = partial(_at, shape=partial(shape, **settings), total=total_steps)
    if momentum is None:
        return LambdaLR(optimizer, factor)
    return RateAndMomentum(optimizer, factor, partial(_at, shape=momentum, total=total_steps))


def _at(step: int, *, shape: Shape, total: int) -> float:
    return shape(step, total)


class RateAndMomentum(LambdaLR):
    """A ``LambdaLR`` that sets the momentum as well, to ``momentum(step)``."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[int], float], momentum: Callable[[int], float]) -> None:
        self.momentum = momentum
        super().__init__(optimizer, factor)

    def get_lr(self) -> list[Any]:
        """Set the momentum of the step, and return its rates."""
        for group in self.optimizer.param_groups:
            set_momentum(group, self.momentum(self.last_epoch))
        return super().get_lr()

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict().items() if name != "momentum"}


def set_momentum(group: dict[str, Any], momentum: float) -> None:
    """Set a parameter group's momentum: ``momentum``, or the first of ``betas``.

    Raises
    ------
    ValueError : the group has neither.
    """
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    elif "momentum" in group:
        group["momentum"] = momentum
    else:
        raise ValueError(f"optimizer has the settings {sorted(group)}: must have 'momentum' or 'betas' to be cycled")


def factors(shape: Shape, total: int, **settings: Any) -> list[float]:
    """Return the factors of all ``total`` steps, to look at."""
    at_least(1, total=total)
    return [shape(step, total, **settings) for step in range(total)]


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _check(step: int, total: int) -> None:
    at_least(0, step=step)
    at_least(1, total=total)


def _fractions(**arguments: float) -> None:
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and 0 <= x <= 1, "a number from 0 to 1")


def _positive(**arguments: float) -> None:
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and x > 0, "a number above 0")


def _name(shape: Any) -> str:
    return getattr(shape, "__name__", type(shape).__name__)
