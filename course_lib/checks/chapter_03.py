"""Checks of chapter 3, the learning rate: four methods to write, a figure to read, a bug to find, a schedule to design.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_lib.checks.designs import accuracy_on_glyphs, normal, rate_and_schedule_only
from course_lib.lab.judging import (
    Design,
    Method,
    Mistake,
    OpenProject,
    Reading,
    Rule,
    Wrong,
    expect_close,
    parts_of,
)
from course_lib.lab.training import Recipe

# Exercise 1: warm-up, then half a cosine

_TOTAL = 12  # all steps are asked, and the one past the last


def _half_wave(part: float) -> float:
    return (1 + math.cos(math.pi * part)) / 2


def _from_floor(wave: float, floor: float) -> float:
    return floor + (1 - floor) * wave


def _factor(
    step: int, total: int, warmup: int, floor: float, *,
    rise: Callable[[int, int], float] = lambda step, warmup: (step + 1) / warmup,
    part: Callable[[int, int, int], float] = lambda step, total, warmup: (step - warmup) / (total - warmup),
    wave: Callable[[float], float] = _half_wave,
    down_to: Callable[[float, float], float] = _from_floor,
    late: int = 0,
) -> float:  # fmt: skip
    """``rise(step, warmup)`` at first, then ``down_to(wave(part), floor)``; the rise ends ``late`` steps late."""
    if step < warmup + late:
        return rise(step, max(1, warmup))
    return down_to(wave(part(step, total, warmup)), floor)


def _curve(rule: Rule, total: int, warmup: int, floor: float) -> tuple[Any, ...]:
    return tuple(rule(step, total, warmup, floor) for step in range(total + 1))


_FLOOR = [
    "Two ends are given: 1 at step warmup, and floor at step total. Which of them does yours miss?",
    "A wave from 1 to 0 becomes one from 1 to floor when it is shrunk first, and lifted then.",
]
_ENDS = [
    "Which part of the way down is done at step warmup, and which at step total?",
    "The way begins at step warmup, and is total - warmup steps long.",
]
_RISE_ENDS = "What does your function give at the last step of the warm-up, and what at the next?"

exercise_1 = Method(
    "A warm-up, then half a cosine down to a floor",
    right=_factor,
    ask=_curve,
    what=[f"the factor at step {step}" for step in range(_TOTAL + 1)],
    hint=["Work out four steps by hand: the first, the last of the warm-up, the next, and the one at total.",
          "How far is it from step warmup to step total, and which part of that is done?"],
    cases={
        "12 steps, 4 of them warm-up": (_TOTAL, 4, 0.1),
        "12 steps without a warm-up": (_TOTAL, 0, 0.25),
        "12 steps, 1 of them warm-up, to nothing": (_TOTAL, 1, 0.0),
    },
    mistakes=[
        Mistake(partial(_factor, rise=lambda step, warmup: step / warmup),
                "your first step has a rate of 0, and does nothing",
                "Steps are counted from 0. After the warm-up's last step, which part of the rise should be done?"),
        Mistake(partial(_factor, rise=lambda step, warmup: (step + 1) / (warmup + 1)),
                "your warm-up takes a step more than it should", _RISE_ENDS),
        Mistake(partial(_factor, late=1), "your rise goes on at step warmup, and leaves 1 behind", _RISE_ENDS),
        Mistake(partial(_factor, rise=lambda step, warmup: 1.0), "there is no warm-up",
                "What comes before the cosine?"),
        Mistake(partial(_factor, rise=lambda step, warmup: float((step + 1) // warmup)),
                "your warm-up stays at 0 until its last step", "Which division rounds down?"),
        Mistake(partial(_factor, part=lambda step, total, warmup: step / total),
                "your cosine runs over all steps, warm-up included, so the rate falls at once after it", _ENDS),
        Mistake(partial(_factor, part=lambda step, total, warmup: (step - warmup) / total),
                "your cosine is too slow: at step total it has not come down", _ENDS),
        Mistake(partial(_factor, part=lambda step, total, warmup: step / (total - warmup)),
                "your cosine counts its steps from the start of the training", _ENDS),
        Mistake(partial(_factor, part=lambda step, total, warmup: (step - warmup) / (total - 1 - warmup)),
                "your cosine reaches the floor at the last step, and it should be one step later",
                "With a floor of 0 the last step would do nothing. Which step is one past the last?"),
        Mistake(partial(_factor, part=lambda step, total, warmup: (step + 1 - warmup) / (total - warmup)),
                "your cosine is a step ahead: at step warmup it is below 1", _ENDS),
        Mistake(partial(_factor, down_to=lambda wave, floor: floor + wave),
                "the floor is added on top, so the wave begins above 1", _FLOOR),
        Mistake(partial(_factor, down_to=max), "the wave goes to 0, and is cut off at the floor", _FLOOR),
        Mistake(partial(_factor, down_to=lambda wave, floor: wave), "your cosine goes down to 0, not to the floor",
                _FLOOR),
        Mistake(partial(_factor, down_to=lambda wave, floor: (1 - floor) * wave),
                "the wave is shrunk, and not lifted: it begins below 1", _FLOOR),
        Mistake(partial(_factor, wave=lambda part: (1 + math.cos(2 * math.pi * part)) / 2),
                "your cosine is a whole wave, down and up again",
                "Where does a cosine have its first minimum? The wave should end there."),
        Mistake(partial(_factor, wave=lambda part: math.cos(math.pi * part / 2)),
                "your cosine is a quarter of a wave, which is steep at its end",
                "Half a wave is flat at both ends, and goes from 1 to -1. What brings that to 1 and 0?"),
        Mistake(partial(_factor, wave=lambda part: math.cos(math.pi * part)), "your wave goes down to -1",
                "A cosine goes from 1 to -1. What brings that to 1 and 0?"),
        Mistake(partial(_factor, wave=lambda part: (1 + math.cos(part)) / 2), "the factor pi is missing in the cosine",
                "In which unit is an angle measured here, and at which angle is half a wave over?"),
        Mistake(partial(_factor, wave=lambda part: 1 - part), "your way down is a straight line",
                "Both ends of half a cosine are flat."),
        Mistake(partial(_factor, wave=lambda part: 1 - _half_wave(part)),
                "your wave is upside down: it goes up from the floor to 1",
                "What is the cosine of 0, and which sign brings it to the top?"),
    ],
)  # fmt: skip


# Exercise 2: sharpness by power iteration

Product = Callable[[Tensor], Tensor]


def _unit(v: Tensor) -> Tensor:
    return v / v.norm()


def _iterated(product: Product, v: Tensor, steps: int, scaled: Callable[[Tensor], Tensor] = _unit) -> Tensor:
    for _ in range(steps):
        v = scaled(product(v))
    return v


def _quotient(product: Product, v: Tensor) -> Tensor:
    return v @ product(v)


def _sharpness(product: Product, start: Tensor, steps: int) -> float:
    return _quotient(product, _iterated(product, _unit(start), steps)).item()


def _norm_within(product: Product, start: Tensor, steps: int) -> Tensor:
    """The length of the last product of the loop: by which the last v was divided."""
    return product(_iterated(product, _unit(start), steps - 1)).norm()


def _last_as_it_is(product: Product, start: Tensor, steps: int) -> Tensor:
    return _quotient(product, product(_iterated(product, _unit(start), steps - 1)))


def _never_scaled(product: Product, start: Tensor, steps: int) -> Tensor:
    return _quotient(product, _iterated(product, start, steps, scaled=lambda v: v))


def _scaled_once(product: Product, start: Tensor, steps: int) -> Tensor:
    return _quotient(product, _unit(_iterated(product, start, steps, scaled=lambda v: v)))


def _with_eigenvalues(seed: int, *values: float) -> Tensor:
    q = torch.linalg.qr(normal(seed, len(values), len(values))).Q
    matrix = (q * torch.tensor(values, dtype=q.dtype)) @ q.T
    return (matrix + matrix.T) / 2


_SIGN = [
    "A length is never negative. Is the largest eigenvalue never negative?",
    "v @ product(v) has the sign: product(v) points along v, or against it.",
]
_LENGTH = [
    "How long is the v that you multiply at the end?",
    "Each step multiplies and then normalises, so that the last v has length 1 too.",
]
_COUNT = "One step is one product and one division by the length. The product at the end is none of the steps."

exercise_2 = Method(
    "Sharpness by power iteration",
    right=_sharpness,
    ask=lambda rule, matrix, start, steps: rule(lambda v: matrix @ v, start, steps),
    what="the sharpness",
    hint=["Try a diagonal matrix of two numbers, and follow v for two steps.",
          "There are three parts: v of length 1, the loop, and v @ product(v) with the v that the loop leaves."],
    unchanged=["start /= … changes the caller's vector. Which expression makes a new one?",
               "Write v = start / start.norm()."],
    cases={
        # Three steps: the eigenvalue is not found yet, so that each step shows
        "three steps, the largest eigenvalue negative": (
            _with_eigenvalues(21, -5.0, 3.0, 2.0, -1.0, 0.5), 3 * normal(22, 5), 3
        ),
        "one step": (_with_eigenvalues(23, 4.0, 3.0, -2.0), 0.1 * normal(24, 3), 1),
        "200 steps, large eigenvalues": (_with_eigenvalues(25, 900.0, 500.0, 20.0, -100.0), normal(26, 4), 200),
    },
    mistakes=[
        Mistake(lambda product, start, steps: product(_iterated(product, _unit(start), steps)).norm(),
                "the length of product(v) is returned, which has lost the sign", _SIGN),
        Mistake(_norm_within, "the length by which the last v was divided is returned: it has no sign", _SIGN),
        Mistake(lambda *case: abs(_sharpness(*case)), "the sign is thrown away", _SIGN),
        Mistake(lambda product, start, steps: _sharpness(product, start, steps - 1), "that is a step too few", _COUNT),
        Mistake(lambda product, start, steps: _sharpness(product, start, steps + 1), "that is a step too many", _COUNT),
        Mistake(lambda product, start, steps: _quotient(product, _unit(start)),
                "that is v @ product(v) of the start: nothing was iterated",
                "Which v does the loop leave behind? It should go on with it in each step, and end with it."),
        Mistake(lambda product, start, steps: _quotient(product, start),
                "that is v @ product(v) of the start as it was handed in",
                "Which v does the loop leave behind? It should go on with it in each step, and end with it."),
        Mistake(lambda product, start, steps: _quotient(product, _unit(product(start))),
                "one step is done, whatever steps says", "Does each step begin with what the one before left?"),
        Mistake(_last_as_it_is, "the last v does not have length 1", _LENGTH),
        Mistake(_never_scaled, "v is never normalised", _LENGTH),
        Mistake(_scaled_once, "v is normalised only at the end, and by then its entries are too large for a float",
                "900 to the power of 200 fits into no float. When should v be brought back to length 1?"),
        Mistake(lambda product, start, steps: _quotient(
                    product, _iterated(product, _unit(start), steps, lambda v: v / v.abs().max())),
                "v is divided by its largest entry, so its length is not 1", _LENGTH),
        Mistake(lambda product, start, steps: _quotient(
                    product, _iterated(product, _unit(start), steps, lambda v: v / v.abs().sum())),
                "v is divided by the sum of its entries, so its length is not 1", _LENGTH),
        Mistake(lambda product, start, steps: _quotient(
                    product, _iterated(product, _unit(start), steps, lambda v: v / (v @ v))),
                "v is divided by its squared length", "Which power is missing? Try it with v = [3, 4]."),
        Mistake(lambda product, start, steps: _iterated(product, _unit(start), steps), "v is returned",
                "v is the direction. How sharp is the loss along it?"),
        Mistake(lambda product, start, steps: product(_iterated(product, _unit(start), steps)),
                "product(v) is returned, a vector", "How much of it points along v?"),
    ],
)  # fmt: skip


# Exercise 3: the noise floor


def _directions(lr: float, *h_and_variance: tuple[float, float]) -> tuple[Tensor, Tensor, float]:
    h, variance = torch.tensor(h_and_variance, dtype=torch.float64).unbind(1)
    return h, variance, lr


def _losses(h: Tensor, variance: Tensor, lr: float) -> Tensor:
    """What each direction adds to the expected loss: [D]."""
    return lr * variance / (2 * (2 - lr * h))


def _noise_floor(
    h: Tensor, variance: Tensor, lr: float, *,
    losses: Callable[[Tensor, Tensor, float], Tensor] = _losses,
    total: Callable[[Tensor], Tensor] = torch.sum,
    diverges: Callable[[Tensor], Any] = lambda product: (product >= 2).any(),
) -> float:  # fmt: skip
    """``total(losses(h, variance, lr))``, or infinite where ``diverges(lr h)``."""
    return math.inf if diverges(lr * h) else total(losses(h, variance, lr)).item()


def _infinite_for_one(found: Any, right: float, h: Tensor, variance: Tensor, lr: float) -> None:
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError):
        return
    if math.isinf(right) and not value == right:
        raise Wrong(f"a direction is past its stability limit, and your function returns {value:.3g}", _ONE_IS_ENOUGH)
    if math.isinf(value) and not math.isinf(right):
        raise Wrong("your function returns infinity, and each direction is below its stability limit", _LIMIT)


_LIMIT = [
    "A step multiplies w by 1 - lr h. For which lr h does w shrink?",
    "1 - lr h may be negative: w then changes sides at each step, and still shrinks until it is -1.",
]
_ONE_IS_ENOUGH = [
    "One direction whose w grows without end is enough. What is the sum then?",
    "Ask for the limit first, of all directions, and only then add up.",
]
_BALANCE = [
    "Where w has settled, E w^2 is the same before and after a step: E w^2 = (1 - lr h)^2 E w^2 + lr^2 variance.",
    "Solve that for E w^2. One lr and one h cancel.",
]
_FROM_SQUARE = ["E w^2 is not yet a loss. What stands before w_i^2 in it?", "The loss of a direction is h/2 E w^2."]

exercise_3 = Method(
    "The noise floor of a constant rate",
    right=_noise_floor,
    what="the expected loss",
    hint=[*_BALANCE, *_FROM_SQUARE],
    explain=_infinite_for_one,
    cases={
        "three directions, none near its limit": _directions(0.3, (0.5, 4.0), (2.0, 0.3), (1.0, 1.5)),
        "a single direction, below its limit": _directions(0.3, (5.0, 0.3)),
        "four directions, each below its limit": _directions(0.1, (9.0, 0.5), (8.0, 2.0), (5.0, 1.0), (6.0, 0.2)),
        # From here on the sum is infinite: first what is told by all directions, then what by fewer
        "two directions, both past their limits": _directions(0.5, (6.0, 0.5), (5.0, 2.0)),
        "three directions, one of them far past its limit": _directions(0.2, (50.0, 0.1), (1.0, 1.0), (3.0, 0.5)),
        "three directions, the last past its limit": _directions(0.2, (1.0, 1.0), (3.0, 0.5), (12.0, 0.2)),
        "two directions, the first on its limit": _directions(0.5, (4.0, 0.5), (1.0, 2.0)),
    },
    mistakes=[
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: lr * variance / 4),
                "that is the approximation for small rates, which knows no h",
                ["Near the stability limit the loss is much higher. Which term was dropped?", *_BALANCE]),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: lr * variance / (h * (2 - lr * h))),
                "that is the expected square of w, not the loss", _FROM_SQUARE),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: lr * variance / (2 - lr * h)),
                "that is twice the loss", "Which factor stands before the sum of h_i w_i^2?"),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: lr * variance / (2 * h * (2 - lr * h))),
                "that is half the expected square of w: h is forgotten", _FROM_SQUARE),
        Mistake(partial(_noise_floor, total=torch.mean), "that is the mean of the directions",
                "The loss is the sum over them."),
        Mistake(partial(_noise_floor, total=torch.max), "that is the loss of one direction, the largest",
                "The loss is the sum over them."),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: lr**2 * variance / (2 * (2 - lr * h))),
                "lr enters squared", ["The noise of one step is lr^2 variance. What divides it?", *_BALANCE]),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: variance / (2 * (2 - lr * h))),
                "lr is missing", ["With a rate of 0 no noise enters. What should the loss be?", *_BALANCE]),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: lr**2 * h * variance / 2),
                "that is the loss that the noise of one step makes",
                ["The noise of earlier steps has not died away. How much of it is left after a step?", *_BALANCE]),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: lr * variance / (2 * (2 + lr * h))),
                "a sign is wrong: your loss falls when h grows",
                ["Where h comes near the limit, the loss goes to infinity. Does yours?", *_BALANCE]),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: lr * variance * h / (2 * (2 - lr * h))),
                "there is one h too many", ["h stands in E w^2 too. Does it cancel?", *_BALANCE]),
        Mistake(lambda h, variance, lr: _noise_floor(h, variance.sqrt(), lr),
                "the standard deviation of the noise is used, not its variance",
                "variance is handed in as it enters: squared already."),
        Mistake(lambda h, variance, lr: _noise_floor(h, variance.square(), lr), "the variance is squared",
                "It is a square already."),
        Mistake(partial(_noise_floor, diverges=lambda product: (product >= 1).any()),
                "the stability limit is taken to be 1 / h", _LIMIT),
        Mistake(partial(_noise_floor, diverges=lambda product: product.sum() >= 2),
                "the limit is asked of the sum of h",
                "Each direction goes its own way. Which of them has an h that large?"),
        Mistake(partial(_noise_floor, diverges=lambda product: False),
                "a direction past its limit is added up like the others",
                ["The formula holds where w settles. Does it there, when lr h is above 2?", *_ONE_IS_ENOUGH]),
        Mistake(lambda h, variance, lr: _losses(h, variance, lr)[lr * h < 2].sum(),
                "the directions past their limit are left out", _ONE_IS_ENOUGH),
        Mistake(partial(_noise_floor, losses=lambda h, variance, lr: _losses(h, variance, lr).abs(),
                        diverges=lambda product: False),
                "a negative loss is made positive", ["Why did it come out negative?", *_ONE_IS_ENOUGH]),
        Mistake(partial(_noise_floor, diverges=lambda product: (product >= 2).all()),
                "your function returns infinity only when all directions are past their limits", _ONE_IS_ENOUGH),
        Mistake(partial(_noise_floor, diverges=lambda product: product.mean() >= 2),
                "the limit is asked of the mean of h", _ONE_IS_ENOUGH),
    ],
)  # fmt: skip


exercise_4 = Reading(
    "Whose rate fell too early? A figure to read",
    right=("Ben", "b"),
    choices={
        "Ada": "Ada's loss had been flat for 600 steps: a noise floor, which the smaller rate lowered. Her rate fell "
        "too late, if anything",
        "Ben": "",
        "Cleo": "Cleo's loss was flat, and the smaller rate changed nothing: neither noise nor speed kept it up",
        "Dan": "Dan's loss had no trend before the drop: his rate was past the stability limit, and should have fallen "
        "at once",
    },
    reasons={
        "a": "that is true, and does not tell why: a harder task, or a smaller network, may end higher too",
        "b": "",
        "c": "a fall at once with the rate is the mark of noise, and then the drop was due",
        "d": "that is not what the figure shows here: the curve has a bend at the dashed line",
    },
    hint=["Cover the right half of each panel. Which loss would you let run on as it is?",
          "Too early means that the large rate had not done its work yet."],
    reason_hint="Compare the slope right before the dashed line with the slope right after it.",
)  # fmt: skip


# Exercise 5: a schedule that hardly moves


def _rates(
    epochs: int, steps: int, peak: float, *,
    part: Callable[[int, int, int], float] = lambda t, epochs, steps: t / (epochs * steps),
    height: Callable[[float], float] = _half_wave,
) -> Tensor:  # fmt: skip
    """The rate of each step t, where ``part(t, epochs, steps)`` of half a wave is done: [epochs * steps]."""
    parts = (part(t, epochs, steps) for t in range(epochs * steps))
    return torch.tensor([peak * height(done) for done in parts], dtype=torch.float64)


_UNITS = [
    "T_max counts calls of scheduler.step(). How many are there in the whole training?",
    "Either T_max may be changed, or the place of scheduler.step(). One of them lets it fall at each step.",
]

exercise_5 = Method(
    "Find the bug: a rate that hardly falls",
    right=_rates,
    what="the list of rates",
    hint=["Print what your function returns for 2 epochs of 3 steps. Which numbers do you expect?", *_UNITS],
    cases={
        "3 epochs of 4 steps": (3, 4, 0.1),
        "a single epoch of 6 steps": (1, 6, 0.5),
        "5 epochs of a single step": (5, 1, 2.0),
    },
    mistakes=[
        Mistake(partial(_rates, part=lambda t, epochs, steps: t // steps / (epochs * steps)),
                "the rate falls once an epoch, and each time by as little as a step should", _UNITS),
        Mistake(partial(_rates, part=lambda t, epochs, steps: t // steps / epochs),
                "the rate comes down in stairs: it stays as it is for a whole epoch",
                ["It should fall a little at every step. Which call belongs in the inner loop?", *_UNITS]),
        Mistake(partial(_rates, part=lambda t, epochs, steps: t / epochs),
                "the rate goes down and up again in waves: half a wave is over after as many steps as there are epochs",
                _UNITS),
        Mistake(partial(_rates, part=lambda t, epochs, steps: t / steps),
                "the rate goes down in one epoch, and up again in the next", _UNITS),
        Mistake(partial(_rates, part=lambda t, epochs, steps: t // steps / steps),
                "the rate falls once an epoch, along a wave as long as an epoch has steps", _UNITS),
        Mistake(partial(_rates, part=lambda t, epochs, steps: (t + 1) / (epochs * steps)),
                "the rate is noted after scheduler.step(): the first one, the peak, is missing",
                "With which rate does the first optimizer.step() go? Note it before it changes."),
        Mistake(partial(_rates, part=lambda t, epochs, steps: t / max(1, epochs * steps - 1)),
                "the last step has a rate of 0, and does nothing",
                "The wave should be over after the last step, not at it. After how many calls is that?"),
        Mistake(partial(_rates, part=lambda t, epochs, steps: t / (epochs * steps + 1)),
                "the wave is a step too long: it is not over when the training is",
                "After how many calls of scheduler.step() should the rate be 0?"),
        Mistake(partial(_rates, part=lambda t, epochs, steps: (t + t // steps) / (epochs * steps)),
                "scheduler.step() is called at every step, and once more at the end of each epoch",
                "Move the call, do not copy it."),
        Mistake(partial(_rates, part=lambda t, epochs, steps: t / (2 * epochs * steps)),
                "the rate comes down half of the way", _UNITS),
        Mistake(partial(_rates, height=lambda done: 1 - done), "the rate comes down along a straight line",
                "The scheduler is the right one. How far does it get?"),
        Mistake(partial(_rates, part=lambda t, epochs, steps: 0.0), "the rate does not fall at all",
                "Who calls scheduler.step(), and how often?"),
    ],
)  # fmt: skip


# Exercise 6: schedule-free SGD

Pair = tuple[Tensor, Tensor]
Gradient = Callable[[Tensor], Tensor]


def _between(x: Tensor, z: Tensor, beta: float) -> Tensor:
    return (1 - beta) * z + beta * x


def _averaged_step(
    x: Tensor, z: Tensor, gradient: Gradient, t: int, lr: float, beta: float, *,
    at: Callable[[Tensor, Tensor, float], Tensor] = _between,
    stepping: Callable[[Tensor, Tensor, float], Tensor] = lambda x, z, beta: z,
    share: Callable[[int, float], float] = lambda t, beta: 1 / t,
) -> Pair:  # fmt: skip
    """The gradient of ``at(x, z, beta)``, a step of ``stepping(x, z, beta)``, x moves by ``share(t, beta)``."""
    z_new = stepping(x, z, beta) - lr * gradient(at(x, z, beta))
    return x + share(t, beta) * (z_new - x), z_new


def _mixed_gradients(x: Tensor, z: Tensor, gradient: Gradient, t: int, lr: float, beta: float) -> Pair:
    direction = _between(gradient(x), gradient(z), beta)
    return _averaged_step(x, z, lambda y: direction, t, lr, beta)


def _both_step(x: Tensor, z: Tensor, gradient: Gradient, t: int, lr: float, beta: float) -> Pair:
    direction = gradient(_between(x, z, beta))
    return _averaged_step(x - lr * direction, z, lambda y: direction, t, lr, beta)


def _after_moving_x(x: Tensor, z: Tensor, gradient: Gradient, t: int, lr: float, beta: float) -> Pair:
    moved = x + (z - x) / t
    return moved, _averaged_step(moved, z, gradient, t, lr, beta)[1]


def _to_the_old_z(x: Tensor, z: Tensor, *rest: Any) -> Pair:
    return x + (z - x) / rest[1], _averaged_step(x, z, *rest)[1]


def _z_then_x(found: Any, right: Pair, *case: Any) -> None:
    parts = parts_of(found, ("the new x", "the new z"), "The next step needs both: return x, z.")
    expect_close(parts[1], right[1], what="the new z", hint="At which point is the gradient taken, and who steps?")
    expect_close(parts[0], right[0], what="the new x", hint="z is right. Which part of the way to it does x go?")


_Y = [
    "Three points have names: x, z and y. At which of them is the gradient taken?",
    "y lies between z and x. With beta = 1 it is x.",
]
_ONLY_Z = "z takes the step, from where it was; x only follows it."
_MEAN = [
    "After three steps x should be the mean of three z. What is its share of the third?",
    "t counts from 1: in the first step x goes all the way to z.",
]

exercise_6 = Method(
    "One step of schedule-free SGD",
    right=_averaged_step,
    # A gradient that is no straight line: a mixture of two gradients is then not the gradient of a mixture
    ask=lambda rule, x, z, t, lr, beta: rule(x, z, lambda y: 2 * y + y**3, t, lr, beta),
    explain=_z_then_x,
    unchanged=["z -= … and x.lerp_(…) change the caller's tensors. Which expressions make new ones?",
               "Write z = z - lr * … instead of z -= lr * …"],
    cases={
        "the third step of a vector": (normal(61, 5), normal(62, 5), 3, 0.1, 0.7),
        "the first step, x and z at one point": (normal(63, 4), normal(63, 4), 1, 0.2, 0.9),
        "a matrix, fortieth step": (normal(64, 2, 3), normal(65, 2, 3), 40, 0.05, 0.9),
    },
    mistakes=[
        Mistake(partial(_averaged_step, at=lambda x, z, beta: x), "the gradient is taken at x", _Y),
        Mistake(partial(_averaged_step, at=lambda x, z, beta: z), "the gradient is taken at z", _Y),
        Mistake(partial(_averaged_step, at=lambda x, z, beta: _between(z, x, beta)),
                "y has beta the wrong way round: it is beta z + (1 - beta) x", _Y),
        Mistake(_mixed_gradients, "two gradients are mixed, and it should be one gradient, of the mixture",
                "Mix the points first. Then one call of gradient is enough."),
        Mistake(_to_the_old_z, "x moves towards the old z",
                "z takes its step first. Then x follows it."),
        Mistake(_after_moving_x, "x moves before the gradient is taken, and towards the old z",
                "The order is y, z, x: each needs the ones before it."),
        Mistake(partial(_averaged_step, share=lambda t, beta: 1 / (t + 1)), "x moves by 1 / (t + 1)", _MEAN),
        Mistake(partial(_averaged_step, share=lambda t, beta: 1 - 1 / t),
                "the parts of x are swapped: it moves all of the way but 1/t", _MEAN),
        Mistake(partial(_averaged_step, share=lambda t, beta: 1 - beta),
                "x moves by 1 - beta, which makes an exponential average",
                ["beta says where y lies. The average of all z has another share.", *_MEAN]),
        Mistake(partial(_averaged_step, share=lambda t, beta: beta), "x moves by beta",
                ["beta says where y lies. The average of all z has another share.", *_MEAN]),
        Mistake(partial(_averaged_step, share=lambda t, beta: 1.0), "x becomes the new z", _MEAN),
        Mistake(_both_step, "x takes the step as well", _ONLY_Z),
        Mistake(partial(_averaged_step, stepping=_between), "the step goes from y, not from z", _ONLY_Z),
        Mistake(partial(_averaged_step, stepping=lambda x, z, beta: x), "the step goes from x, not from z", _ONLY_Z),
        Mistake(lambda x, z, gradient, t, lr, beta: _averaged_step(x, z, gradient, t, -lr, beta),
                "your step goes uphill", "The gradient points where the loss grows. Which sign takes z down?"),
        Mistake(lambda x, z, gradient, t, lr, beta: _averaged_step(x, z, gradient, t, 1.0, beta),
                "lr is missing: z goes the whole gradient", "How long is a step of SGD?"),
        Mistake(lambda x, z, gradient, t, lr, beta: _averaged_step(x, z, gradient, t, lr / t, beta),
                "the rate falls with t", "The average does the work of a schedule: lr stays as it is."),
        Mistake(lambda *case: _averaged_step(*case)[::-1], "your function returns z first and x second",
                "The order asked for is x, z."),
        Mistake(lambda x, z, *rest: (_averaged_step(x, z, *rest)[0], z), "your function returns the old z",
                "The new x is right. The next step needs the z that this step made."),
        Mistake(lambda x, z, *rest: (x, _averaged_step(x, z, *rest)[1]), "your function returns the old x",
                "The new z is right. What does x do with it?"),
        Mistake(lambda *case: _averaged_step(*case)[0], "your function returns only x",
                "The next step needs the new z too: return x, z."),
    ],
)  # fmt: skip


# Exercises 7 and 8

BASE = Recipe(
    epochs=4,
    batch_size=20,
    optimizer=partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    precision="float64",
    validate_every=4,
)
"""What the learner starts from. Batches are small and epochs few: noise is then what limits a constant rate, whatever
its momentum, so that only a rate that falls reaches the mark."""

_FOR_INSTANCE = "For instance: mine = replace(base, optimizer=partial(torch.optim.SGD, lr=0.03, momentum=0.9))"


exercise_7 = Design(
    "Design a schedule: 0.77 in four epochs",
    admit=rate_and_schedule_only(BASE, _FOR_INSTANCE),
    score=partial(accuracy_on_glyphs, train_size=1000),
    seeds=(331, 332, 333, 334, 335, 336),
    least=0.77,
    hint=["What keeps the constant rate up in the end: its speed, or its noise?",
          "Where the rate ends near nothing, its peak may be higher than the best constant rate. How much higher?",
          "Try four peaks, each twice the one before, on a validation split of your own."],
    diverged=["Where does the loss blow up: at the start, or at the peak? The range test says which rates are worth a "
              "try.", "A smaller peak."],
)  # fmt: skip

exercise_8 = OpenProject(
    "An open project: the schedule of a training of your own",
    rubric=["range", "the peak", "the budget", "the reason", "honesty"],
)
