"""Checks of chapter 4, batch size: four methods to write, a figure to read, a bug to find, a rate to choose.

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
from course_lib.lab.judging import Case, Design, Method, Mistake, OpenProject, Reading, Rule, Wrong, close, expect_close
from course_lib.lab.training import Recipe

# Exercise 1: a batch in parts

MeanGradient = Callable[[Tensor, Tensor], Tensor]


def _accumulated(
    gradient: MeanGradient, x: Tensor, y: Tensor, parts: int, *,
    share: Callable[[list[int], int], float] = lambda sizes, p: sizes[p] / sum(sizes),
) -> Tensor:  # fmt: skip
    """The parts' gradients, each times ``share(sizes, p)``, added up."""
    cut = list(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True))
    sizes = [len(part) for part, _ in cut]
    return torch.stack([share(sizes, p) * gradient(*part) for p, part in enumerate(cut)]).sum(0)


def _mean_gradient(x: Tensor, y: Tensor) -> Tensor:
    """Of the mean over examples of (w x - y)^2 / 2 at a fixed w: [N, D], [N] -> [D]."""
    if len(x) != len(y):
        raise ValueError(f"gradient was handed {len(x)} examples and {len(y)} targets")
    w = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return (x @ w - y) @ x / len(x)


def _seen_through(rule: Rule, x: Tensor, y: Tensor, parts: int) -> tuple[Any, int]:
    """What the rule returns, and the most examples that it handed to ``gradient`` at once."""
    handed = [0]

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        handed.append(len(x))
        return _mean_gradient(x, y)

    return rule(gradient, x, y, parts), max(handed)


def _right_within_a_part(found: Any, right: tuple[Tensor, int], *case: Any) -> bool:
    return close(found[0], right[0]) and found[1] <= right[1]


def _too_many_at_once(found: Any, right: tuple[Tensor, int], x: Tensor, y: Tensor, parts: int) -> None:
    (result, handed), (wanted, most) = found, right
    if handed > most:
        whole = " (the whole batch)" if handed == len(x) else ""
        largest = f"the largest of {parts} parts has {most}"
        raise Wrong(f"gradient was handed {handed} examples at once{whole}, and {largest}", _ONE_PART)
    expect_close(result, wanted, what="the gradient", hint="Try it with three numbers, cut into two and one.")


def _batch(seed: int, examples: int, parts: int) -> Case:
    return normal(seed, examples, 3), normal(seed + 1, examples), parts


_ONE_PART = [
    "The batch stands for one that does not fit into the memory. What may gradient see at a time?",
    "Call gradient in a loop, once for each pair of x.tensor_split(parts) and y.tensor_split(parts).",
]
_SHARE = [
    "In the whole batch each example counts the same. How much does one of a part of 2 count in yours, and one of 3?",
    "The mean of a part, times its number of examples, is a sum. What do all the sums together have to be divided by?",
]

exercise_1 = Method(
    "The gradient of a batch, part by part",
    right=_accumulated,
    ask=_seen_through,
    agree=_right_within_a_part,
    explain=_too_many_at_once,
    what="the gradient",
    unchanged="Which of your lines writes into x or y? Their parts are views: x -= … in a part changes the batch.",
    cases={
        # Uneven parts first: only they tell a mean of means from the mean
        "10 examples in 4 parts": _batch(11, 10, 4),
        "6 examples in 3 parts": _batch(13, 6, 3),
        "5 examples in 5 parts": _batch(15, 5, 5),
        "4 examples in a single part": _batch(17, 4, 1),
    },
    mistakes=[
        Mistake(partial(_accumulated, share=lambda sizes, p: 1 / len(sizes)),
                "that is the mean of the parts' means, in which an example of a small part counts more", _SHARE),
        Mistake(partial(_accumulated, share=lambda sizes, p: 1.0),
                "the parts' gradients are added up, so that the result grows with the number of parts",
                ["Each of them is a mean already. What if all parts were the same?", *_SHARE]),
        Mistake(partial(_accumulated, share=lambda sizes, p: float(p == len(sizes) - 1)),
                "only the last part is left", "What becomes of the others? Compare = with +=."),
        Mistake(partial(_accumulated, share=lambda sizes, p: float(p == 0)), "only the first part is used",
                "Does your function return before the loop is over?"),
        Mistake(partial(_accumulated, share=lambda sizes, p: float(sizes[p])),
                "that is the sum over all examples, not the mean",
                "Each part counts by its number of examples, as it should. What is a sum divided by, to be a mean?"),
        Mistake(partial(_accumulated, share=lambda sizes, p: sizes[p] / len(sizes)),
                "the sum over the examples is divided by the number of parts",
                "The mean over the examples is wanted. How many of them are there?"),
        Mistake(partial(_accumulated, share=lambda sizes, p: 1 / sizes[p]),
                "each part is divided by its number of examples, which gradient has done already", _SHARE),
        Mistake(partial(_accumulated, share=lambda sizes, p: 1 / sum(sizes)),
                "the parts' means are added up and divided by the number of examples",
                ["How many numbers did you add up, and by how many do you divide?", *_SHARE]),
        Mistake(partial(_accumulated, share=lambda sizes, p: sum(sizes) / sizes[p]),
                "the weights are upside down: a small part counts more", _SHARE),
        Mistake(partial(_accumulated, share=lambda sizes, p: sum(sizes) / sizes[p] / len(sizes) ** 2),
                "the weights are upside down: a small part counts more", _SHARE),
        Mistake(partial(_accumulated, share=lambda sizes, p: sizes[0] / sum(sizes)),
                "every part is weighted as if it were as large as the first", _SHARE),
        Mistake(partial(_accumulated, share=lambda sizes, p: sizes[-1] / sum(sizes)),
                "every part is weighted as if it were as large as the last", _SHARE),
        Mistake(partial(_accumulated, share=lambda sizes, p: -sizes[p] / sum(sizes)), "the sign is wrong",
                "The gradient is wanted, not the step that goes against it."),
    ],
)  # fmt: skip


# Exercise 2: the noise scale from two batch sizes


def _gradient_sq(small_sq: Tensor, big_sq: Tensor, small: float, big: float) -> Tensor:
    return (big * big_sq - small * small_sq) / (big - small)


def _trace(small_sq: Tensor, big_sq: Tensor, small: float, big: float) -> Tensor:
    return (small_sq - big_sq) / (1 / small - 1 / big)


def _mean_over_mean(trace: Tensor, gradient_sq: Tensor) -> Tensor:
    return trace.mean() / gradient_sq.mean()


Estimate = Callable[[Tensor, Tensor, float, float], Tensor]


def _noise_scale(
    small_sq: Tensor, big_sq: Tensor, small: float, big: float, *,
    trace: Estimate = _trace,
    gradient_sq: Estimate = _gradient_sq,
    ratio: Callable[[Tensor, Tensor], Tensor] = _mean_over_mean,
) -> Any:  # fmt: skip
    """``ratio(trace, gradient_sq)`` of the two estimates: [T], [T] -> a float, or what a mistake makes of it."""
    measured = small_sq, big_sq, small, big
    found = ratio(trace(*measured), gradient_sq(*measured))
    return found if found.ndim else found.item()


def _measured(seed: int, steps: int, gradient_sq: float, trace: float, small: int, big: int) -> Case:
    """Squared norms that scatter around gradient_sq + trace / B, as of a gradient of some 30 directions."""
    spread = 0.25 * normal(seed, 2, steps).clamp(-2, 2)
    small_sq, big_sq = ((gradient_sq + trace / b) * (1 + s) for b, s in zip((small, big), spread, strict=True))
    return small_sq, big_sq, small, big


_TWO_UNKNOWNS = [
    "The squared norm of a batch's gradient is, in the mean, |G|² + tr Σ / B. Write that down for both batches.",
    "Two equations, two unknowns. Which combination of the two lets tr Σ drop out, and which one |G|²?",
]
_AVERAGE_FIRST = [
    "Print your estimate of |G|² step by step. What does a ratio do where it comes near zero?",
    "Each of the two estimates is right in the mean, and their ratio is not. What should be averaged?",
]
_WHICH_IS_LARGER = "Which of the two squared norms is larger in the mean, and why?"
_EXAMPLES = (
    "A noise scale is a number of examples, and a noisier gradient needs more of them. Does yours grow with tr Σ?"
)

exercise_2 = Method(
    "The noise scale from two batch sizes",
    right=_noise_scale,
    what="the noise scale",
    hint=["Try it without chance: |G|² = 1, tr Σ = 8, batches of 2 and 4. The norms are 5 and 3, the noise scale 8.",
          *_TWO_UNKNOWNS],
    cases={
        "12 steps, batches of 8 and 64": _measured(21, 12, 2.0, 30.0, 8, 64),
        "8 steps, batches of 1 and 10": _measured(22, 8, 5.0, 40.0, 1, 10),
        "a single step, batches of 32 and 48": (
            torch.tensor([3.5], dtype=torch.float64), torch.tensor([2.9], dtype=torch.float64), 32, 48
        ),
    },
    mistakes=[
        Mistake(partial(_noise_scale, ratio=lambda trace, gradient_sq: (trace / gradient_sq).mean()),
                "you divide at each step, and average the ratios", _AVERAGE_FIRST),
        Mistake(partial(_noise_scale, ratio=lambda trace, gradient_sq: trace / gradient_sq),
                "your function returns a ratio for each step", _AVERAGE_FIRST),
        Mistake(partial(_noise_scale, ratio=lambda trace, gradient_sq: (trace / gradient_sq).median()),
                "you divide at each step, and take the median of the ratios", _AVERAGE_FIRST),
        Mistake(partial(_noise_scale, gradient_sq=lambda small_sq, big_sq, small, big: big_sq),
                "the large batch's squared norm stands for |G|², and it still holds noise",
                ["How much of tr Σ is left in big_sq?", *_TWO_UNKNOWNS]),
        Mistake(partial(_noise_scale, gradient_sq=lambda small_sq, big_sq, small, big: small_sq),
                "the small batch's squared norm stands for |G|², and most of it may be noise",
                ["How much of tr Σ is left in small_sq?", *_TWO_UNKNOWNS]),
        Mistake(partial(_noise_scale, trace=lambda small_sq, big_sq, small, big: small_sq - big_sq),
                "the difference of the norms stands for tr Σ, whatever the batch sizes", _TWO_UNKNOWNS),
        Mistake(partial(_noise_scale, trace=lambda small_sq, big_sq, small, big: small * (small_sq - big_sq)),
                "your tr Σ takes the large batch's gradient to be free of noise: 1/B is missing",
                ["By how much do tr Σ / b and tr Σ / B differ?", *_TWO_UNKNOWNS]),
        Mistake(partial(_noise_scale,
                        trace=lambda small_sq, big_sq, small, big: (small_sq - big_sq) * (1 / small - 1 / big)),
                "the difference of the norms is multiplied by 1/b - 1/B, and should be divided by it", _TWO_UNKNOWNS),
        Mistake(partial(_noise_scale,
                        trace=lambda small_sq, big_sq, small, big: (small_sq - big_sq) / (big - small)),
                "the difference of the norms is divided by B - b, and should be by what tr Σ was multiplied by",
                _TWO_UNKNOWNS),
        Mistake(partial(_noise_scale, gradient_sq=lambda small_sq, big_sq, small, big: big * big_sq - small * small_sq),
                "your |G|² is not divided by B - b", ["How many times |G|² is B |G_B|² - b |G_b|²?", *_TWO_UNKNOWNS]),
        Mistake(partial(_noise_scale, gradient_sq=lambda small_sq, big_sq, small, big: _gradient_sq(
                    big_sq, small_sq, small, big)),
                "in your |G|² each norm is multiplied by the other's batch size",
                ["B |G_B|² holds tr Σ once. Which product takes it away?", *_TWO_UNKNOWNS]),
        Mistake(partial(_noise_scale, ratio=lambda trace, gradient_sq: gradient_sq.mean() / trace.mean()),
                "the ratio is upside down", _EXAMPLES),
        Mistake(lambda small_sq, big_sq, small, big: _noise_scale(small_sq, big_sq, big, small),
                "small and big are exchanged, or the two norms are", _WHICH_IS_LARGER),
        Mistake(lambda *measured: -_noise_scale(*measured), "a sign is wrong: your noise scale is below 0",
                _WHICH_IS_LARGER),
        Mistake(lambda *measured: _noise_scale(*measured) ** 0.5, "that is the root of the noise scale",
                "tr Σ and |G|² are squares, both. Is their ratio to be one of lengths?"),
        Mistake(lambda *measured: _noise_scale(*measured) ** 2, "that is the square of the noise scale",
                "tr Σ and |G|² are squares already."),
        Mistake(lambda small_sq, big_sq, *sizes: _noise_scale(small_sq.sqrt(), big_sq.sqrt(), *sizes),
                "the norms are used, not their squares", "Which of the two adds up, of gradient and noise?"),
        Mistake(lambda small_sq, big_sq, *sizes: _noise_scale(small_sq**2, big_sq**2, *sizes),
                "the norms are squared once more", "small_sq and big_sq are squares as they are handed in."),
        Mistake(partial(_noise_scale, ratio=lambda trace, gradient_sq: trace.mean()), "that is tr Σ, not the ratio",
                "What is the noise compared with?"),
    ],
)  # fmt: skip


# Exercise 3: the critical batch from a line

Line = tuple[float, float, float]


def _weighted(design: Tensor, target: Tensor, weight: Tensor) -> list[float]:
    """What minimises the sum of (weight (design @ coefficients - target))^2: [K, P], [K], [K] -> P numbers."""
    return torch.linalg.lstsq(weight[:, None] * design, (weight * target)[:, None]).solution[:, 0].tolist()


def _columns(u: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(u), u], 1)


def _critical(
    sizes: Tensor, steps: Tensor, *,
    weight: Callable[[Tensor, Tensor], Tensor] = lambda sizes, steps: 1 / steps,
    against: Callable[[Tensor], Tensor] = torch.reciprocal,
    bend: Callable[[float, float], float] = lambda s_min, e_min: e_min / s_min,
) -> Line:  # fmt: skip
    """A line against ``against(sizes)``, the squares of its errors weighted by ``weight``'s: s_min, e_min, ``bend``."""
    s_min, e_min = _weighted(_columns(against(sizes)), steps, weight(sizes, steps))
    return s_min, e_min, bend(s_min, e_min)


def _returned(*places: int, **settings: Any) -> Rule:
    """`_critical`, with its results in another order."""
    return lambda *case: tuple(_critical(*case, **settings)[place] for place in places)


def _power_law(sizes: Tensor, steps: Tensor) -> Line:
    height, slope = _weighted(_columns(sizes.log()), steps.log(), torch.ones_like(steps))
    return math.exp(height), slope, slope / math.exp(height)


def _by_log_errors(sizes: Tensor, steps: Tensor) -> Line:
    """The same law, fitted to log S: Gauss-Newton from the right answer, which lies near."""
    columns = _columns(1 / sizes)
    found = torch.tensor(_critical(sizes, steps)[:2], dtype=steps.dtype)
    for _ in range(20):
        law = columns @ found
        step = _weighted(columns / law[:, None], (steps / law).log(), torch.ones_like(steps))
        found = found + torch.tensor(step, dtype=steps.dtype)
    s_min, e_min = found.tolist()
    return s_min, e_min, e_min / s_min


def _through_zero(sizes: Tensor, steps: Tensor) -> Line:
    (e_min,) = _weighted((1 / sizes)[:, None], steps, 1 / steps)
    return 0.0, e_min, math.inf


def _runs(seed: int, s_min: float, b_crit: float, spread: float, *sizes: int) -> Case:
    b = torch.tensor(sizes, dtype=torch.float64)
    return b, s_min * (1 + b_crit / b) * (spread * normal(seed, len(sizes)).clamp(-2, 2)).exp()


_BY_WEIGHT = [
    "Divide both sides of S_i = S_min + E_min u_i by S_i. What is on the left, and what are the two columns?",
    "After that it is ordinary least squares, with a target of ones: torch.linalg.lstsq solves it.",
]
_BEND = "At B_crit both parts of S_min + E_min / B are equal. Solve that for B."
_ORDER = "The order asked for is s_min, e_min, b_crit."

exercise_3 = Method(
    "The critical batch from a straight line",
    right=_critical,
    what=("s_min", "e_min", "b_crit"),
    hint=["Make steps by the law, from numbers of your own and without chance. Do you get them back?", *_BY_WEIGHT],
    cases={
        "six batch sizes": _runs(31, 120.0, 200.0, 0.15, 8, 32, 128, 512, 2048, 8192),
        "four batch sizes": _runs(32, 40.0, 900.0, 0.1, 16, 100, 1000, 4000),
        "five batch sizes without chance": _runs(33, 500.0, 64.0, 0.0, 4, 20, 100, 300, 1000),
    },
    mistakes=[
        Mistake(partial(_critical, weight=lambda sizes, steps: torch.ones_like(steps)),
                "plain least squares: the small batches, with thousands of steps, decide nearly alone",
                ["Ten steps too many of a thousand, or of twenty: which is the larger error here?", *_BY_WEIGHT]),
        Mistake(partial(_critical, weight=lambda sizes, steps: steps.rsqrt()),
                "the squared errors are divided by S_i, and should be by its square",
                ["S_i stands inside the square.", *_BY_WEIGHT]),
        Mistake(partial(_critical, weight=lambda sizes, steps: steps),
                "the errors are multiplied by S_i, so that large numbers of steps count even more", _BY_WEIGHT),
        Mistake(partial(_critical, weight=lambda sizes, steps: sizes),
                "the errors are those of the examples B S, not relative ones",
                ["B S is a straight line too, but its large numbers decide. Whose are they?", *_BY_WEIGHT]),
        Mistake(_by_log_errors, "the law is fitted to log S: nearly the same errors, and not those asked for",
                ["With S_i in the denominator the problem stays linear, and needs no search.", *_BY_WEIGHT]),
        Mistake(_power_law, "a straight line through log S against log B is a power law, without a bend",
                ["Against what is S a straight line?", *_BY_WEIGHT]),
        Mistake(partial(_critical, against=lambda sizes: sizes), "the line is fitted against B",
                "Against what is S a straight line? Put u = 1/B into the law."),
        Mistake(partial(_critical, weight=lambda sizes, steps: torch.ones_like(steps), against=lambda sizes: sizes),
                "the line is fitted against B, and by plain least squares",
                ["Against what is S a straight line? Put u = 1/B into the law.", *_BY_WEIGHT]),
        Mistake(_through_zero, "S_min is taken to be 0: your steps halve with each doubling, without end",
                ["What is S for a batch without bound, u = 0?", "A line has two unknowns: a column of ones is missing, "
                 "divided by S_i like the other."]),
        Mistake(partial(_critical, bend=lambda s_min, e_min: s_min / e_min), "b_crit is upside down", _BEND),
        Mistake(partial(_critical, bend=lambda s_min, e_min: s_min * e_min),
                "b_crit is the product of the other two", _BEND),
        Mistake(_returned(1, 0, 2), "s_min and e_min are exchanged",
                ["Which of the two is the slope against u?", _ORDER]),
        Mistake(_returned(1, 0, 2, bend=lambda s_min, e_min: s_min / e_min),
                "s_min and e_min are exchanged, and b_crit is upside down for it",
                ["Which of the two is the slope against u?", _ORDER]),
        Mistake(_returned(2, 0, 1), "your function returns b_crit first", _ORDER),
        Mistake(_returned(0, 2, 1), "e_min and b_crit are exchanged", _ORDER),
        Mistake(lambda *case: _critical(*case)[:2], "b_crit is missing", _BEND),
        Mistake(lambda *case: _critical(*case)[2], "your function returns b_crit alone", _ORDER),
    ],
)  # fmt: skip


exercise_4 = Reading(
    "Who should take a larger batch? A figure to read",
    right=("Ben", "c"),
    choices={
        "Ada": "Ada's curve is flat at her dot: twice the batch saves her hardly a step, and costs twice the examples",
        "Ben": "",
        "Cleo": "Cleo stands at the bend: twice the batch saves a quarter of her steps. Somebody saves more",
        "Dan": "Dan's curve rises at his dot: more examples a step cannot make steps worse unless the rate is wrong. "
        "He should tune it first, and look at the figure again",
    },
    reasons={
        "a": "how many steps there are depends on the task. What a larger batch saves is the curve's slope at the dot",
        "b": "where the curve is flat more examples save no steps: that is where there is nothing to gain",
        "c": "",
        "d": "the size alone tells nothing: another of the four uses the same batch, and gains less. What matters is "
        "the size beside the bend",
    },
    hint=["Go from each dot to the right by one doubling. By how much does the curve fall?",
          "On logarithmic axes steps that halve with each doubling fall along a line with a slope of -1: a decade "
          "down for a decade to the right."],
    reason_hint="What does this curve do at its dot that the others do not?",
)  # fmt: skip


# Exercise 5: an estimate that favours what is drawn often


def _estimate(
    values: Tensor, p: Tensor, drawn: Tensor, *,
    weights: Callable[[Tensor, Tensor], Tensor] = lambda p, drawn: 1 / (len(p) * p[drawn]),
    total: Callable[[Tensor], Tensor] = torch.mean,
) -> float:  # fmt: skip
    """``total`` of the drawn values, each times its weight."""
    return total(weights(p, drawn) * values[drawn]).item()


def _by_own_weights(values: Tensor, p: Tensor, drawn: Tensor) -> float:
    weights = 1 / p[drawn]
    return ((weights * values[drawn]).sum() / weights.sum()).item()


def _draw(seed: int, shares: tuple[float, ...], *drawn: int) -> Case:
    p = torch.tensor(shares, dtype=torch.float64)
    return normal(seed, len(p)) + 3, p / p.sum(), torch.tensor(drawn)


_EXPECTED = [
    "Write the expectation of one draw as a sum over all examples: example i adds p[i] times what it counts for.",
    "That sum should be the mean of all N values. What must example i count for, so that p[i] cancels?",
]
_ALL_P = "The weight of an example needs its own probability alone. What do the examples that were not drawn add?"

exercise_5 = Method(
    "Find the bug: what is drawn often counts too much",
    right=_estimate,
    what="the estimate",
    hint=["Take two examples, 0 and 1, of which the second is drawn nine times of ten. What is the mean of your "
          "estimates?", *_EXPECTED],
    cases={
        # Fewer draws than examples: positions in `drawn` are numbers of examples too, and can be mixed up with them
        "8 examples, 5 draws": _draw(51, (1, 8, 2, 5, 3, 9, 4, 6), 5, 1, 7, 5, 3),
        "5 examples, 9 draws": _draw(52, (6, 1, 3, 2, 8), 4, 0, 4, 2, 0, 4, 1, 3, 4),
        "4 examples, a single draw": _draw(53, (1, 2, 3, 4), 2),
        "6 examples with equal chances": _draw(54, (1,) * 6, 0, 3, 3, 5),
    },
    mistakes=[
        Mistake(partial(_estimate, weights=lambda p, drawn: torch.ones_like(p[drawn])),
                "that is the mean of what was drawn, as it stood there: what is drawn often counts more", _EXPECTED),
        Mistake(partial(_estimate, weights=lambda p, drawn: p[drawn]),
                "each value is multiplied by its probability: what is drawn often counts still more",
                ["An example that is drawn twice as often should count half as much each time.", *_EXPECTED]),
        Mistake(partial(_estimate, weights=lambda p, drawn: len(p) * p[drawn]),
                "the weights are upside down: what is drawn often counts still more", _EXPECTED),
        Mistake(partial(_estimate, weights=lambda p, drawn: 1 / p[drawn]),
                "N is missing: that estimates the sum of all values",
                ["If all chances are equal, 1/p is N. What should the weights be then?", *_EXPECTED]),
        Mistake(partial(_estimate, weights=lambda p, drawn: 1 / (len(drawn) * p[drawn])),
                "the weights hold the number of draws, and should hold that of all examples",
                "If all chances are equal, every weight should be 1. Is it, whatever the number of draws?"),
        Mistake(partial(_estimate, total=torch.sum), "the weighted values are added up, so that more draws give more",
                "Each draw alone is an estimate. What is done with several?"),
        Mistake(partial(_estimate, weights=lambda p, drawn: 1 / p[drawn], total=torch.sum),
                "the weighted values are added up, and N is missing",
                ["Each draw alone is an estimate. What is done with several?", *_EXPECTED]),
        Mistake(_by_own_weights,
                "the weights of the drawn are divided by their own sum, which makes the estimate biased: that sum is "
                "left to chance too, and a ratio of two estimates is not right in the mean",
                ["With a single draw your estimate is that draw's value, whatever its probability. What is its mean?",
                 *_EXPECTED]),
        Mistake(partial(_estimate, weights=lambda p, drawn: (1 / p)[drawn] / (1 / p).mean()),
                "1/p is divided by its mean over all examples", [_ALL_P, *_EXPECTED]),
        Mistake(partial(_estimate, weights=lambda p, drawn: (1 / p)[drawn] / (1 / p).sum()),
                "1/p is divided by its sum over all examples", [_ALL_P, *_EXPECTED]),
        Mistake(partial(_estimate, weights=lambda p, drawn: (1 / p)[drawn] / (1 / p).sum(), total=torch.sum),
                "1/p is divided by its sum over all examples", [_ALL_P, *_EXPECTED]),
        # A learner's raises where there are more draws than examples; ours must not, and is told before that
        Mistake(partial(_estimate, weights=lambda p, drawn: 1 / (len(p) * p[torch.arange(len(drawn)) % len(p)])),
                "the weights are those of the first examples, not of the drawn ones",
                "values is looked up at drawn. Where is p looked up?"),
        Mistake(partial(_estimate, weights=lambda p, drawn: 1 - p[drawn]),
                "1 - p falls where p grows, but not in proportion", _EXPECTED),
        Mistake(partial(_estimate, weights=lambda p, drawn: (len(p) * p[drawn]).rsqrt()),
                "the weights are the root of what they should be", _EXPECTED),
        Mistake(lambda values, p, drawn: _estimate(values, p, drawn.unique()),
                "an example that was drawn several times counts once",
                "It was drawn with replacement: each draw is an estimate of its own."),
        Mistake(lambda values, p, drawn: values.mean().item(), "that is the mean of all values, drawn or not",
                "The estimate may look only at what was drawn: the others stand for gradients never computed."),
        Mistake(lambda values, p, drawn: (p * values).sum().item(), "that is the expectation of one draw",
                "The estimate may look only at what was drawn: the others stand for gradients never computed."),
    ],
)  # fmt: skip


# Exercise 6: ghost batch norm

Groups = Callable[[Tensor, int], tuple[Tensor, ...]]


def _normalised(
    group: Tensor, eps: float, *,
    over: tuple[int, ...] = (0, 2, 3),
    correction: int = 0,
    scale: Callable[[Tensor, float], Tensor] = lambda variance, eps: (variance + eps).sqrt(),
) -> Tensor:  # fmt: skip
    """A group by its own mean and variance over the axes ``over``."""
    variance, mean = torch.var_mean(group, over, correction=correction, keepdim=True)
    return (group - mean) / scale(variance, eps)


def _ghost_norm(
    x: Tensor, size: int, eps: float, *,
    groups: Groups = torch.split,
    norm: Callable[[Tensor, float], Tensor] = _normalised,
) -> Tensor:  # fmt: skip
    return torch.cat([norm(group, eps) for group in groups(x, size)])


def _interleaved(x: Tensor, size: int, eps: float) -> Tensor:
    result, groups = torch.empty_like(x), _count(x, size)
    for first in range(groups):
        result[first::groups] = _normalised(x[first::groups], eps)
    return result


def _last_as_it_was(x: Tensor, size: int, eps: float) -> Tensor:
    whole = len(x) // size * size
    return torch.cat([_ghost_norm(x[:whole], size, eps), x[whole:]]) if whole else x


def _by_first_group(x: Tensor, size: int, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x[:size], (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def _count(x: Tensor, size: int) -> int:
    return math.ceil(len(x) / size)


def _only_whole(x: Tensor, size: int) -> tuple[Tensor, ...]:
    return x[: len(x) // size * size].split(size)


def _rest_joined(x: Tensor, size: int) -> tuple[Tensor, ...]:
    last = max(0, len(x) // size - 1) * size
    return (*x[:last].split(size), x[last:]) if last else (x,)


def _images(seed: int, *shape: int) -> Tensor:
    """Channels and examples of different means and widths."""
    examples, channels = (torch.arange(1, n + 1, dtype=torch.float64) for n in shape[:2])
    widths = channels[:, None, None] * (1 + 0.3 * examples[:, None, None, None])
    return widths * normal(seed, *shape) + 2 * channels[:, None, None] - examples[:, None, None, None]


_WHICH_AXES = [
    "Batch norm has one mean for each channel. Over which of the four axes is it taken?",
    "Over three of them: the group's examples and both of the picture's. keepdim=True lets the result be subtracted.",
]
_GROUPS = [
    "Write down the numbers of the examples of each group, for 10 examples and a size of 4.",
    "The first four, the next four, and the two that are left. x.split does that.",
]

exercise_6 = Method(
    "Ghost batch norm",
    right=_ghost_norm,
    what="the batch",
    hint=["For a group of the whole batch it is batch norm. Does yours give what F.batch_norm(…, training=True) gives?",
          *_GROUPS, *_WHICH_AXES],
    unchanged=["x -= … and writing into x[…] change the caller's batch, and a view of x is x.",
               "Collect the groups' results in a list, and join them with torch.cat."],
    cases={
        # 10 by 4 tells groups of 4 from 4 groups, and the rest of 2 from a rest that is joined or spread out
        "10 examples, groups of 4": (_images(61, 10, 2, 2, 3), 4, 0.1),
        "6 examples, groups of 2": (_images(62, 6, 3, 2, 2), 2, 1e-5),
        "3 examples, groups of 1": (_images(63, 3, 2, 3, 3), 1, 0.01),
        "3 examples, groups of 8": (_images(64, 3, 2, 2, 2), 8, 0.5),
    },
    mistakes=[
        Mistake(partial(_ghost_norm, groups=lambda x, size: (x,)), "the whole batch is normalised at once",
                "Where does size come in?"),
        Mistake(partial(_ghost_norm, groups=lambda x, size: x.split(1)), "each example is normalised by itself",
                "Over which axes do you take the mean? The group's examples share one."),
        Mistake(partial(_ghost_norm, norm=partial(_normalised, over=(0, 1, 2, 3))),
                "all channels of a group share one mean and one variance", _WHICH_AXES),
        Mistake(partial(_ghost_norm, norm=partial(_normalised, over=(1, 2, 3))),
                "each example is normalised by itself, over all of its channels", _WHICH_AXES),
        Mistake(partial(_ghost_norm, norm=partial(_normalised, over=(0,))),
                "each pixel has a mean of its own", _WHICH_AXES),
        Mistake(partial(_ghost_norm, norm=partial(_normalised, correction=1)),
                "the variance is the unbiased one", "Which argument of var says what the sum is divided by?"),
        Mistake(partial(_ghost_norm, norm=partial(_normalised, scale=lambda variance, eps: variance.sqrt() + eps)),
                "eps is added to the standard deviation", "eps belongs to the variance: what is the root taken of?"),
        Mistake(partial(_ghost_norm, norm=partial(_normalised, scale=lambda variance, eps: variance.sqrt())),
                "eps is missing", "What would a group be divided by that is the same everywhere?"),
        Mistake(partial(_ghost_norm, norm=partial(_normalised, scale=lambda variance, eps: variance + eps)),
                "you divide by the variance", "Which width should the result have? Try a group with a variance of 4."),
        Mistake(partial(_ghost_norm, norm=partial(_normalised, scale=lambda variance, eps: torch.ones_like(variance))),
                "the mean is taken away, and nothing is divided", "The result should have a variance of about 1."),
        Mistake(_interleaved, "your groups take every k-th example, not consecutive ones", _GROUPS),
        Mistake(partial(_ghost_norm, groups=_only_whole), "the last, smaller group is missing", _GROUPS),
        Mistake(_last_as_it_was, "the last, smaller group is left as it was", _GROUPS),
        Mistake(partial(_ghost_norm, groups=_rest_joined), "the rest is joined to the last whole group", _GROUPS),
        Mistake(partial(_ghost_norm, groups=lambda x, size: x.tensor_split(_count(x, size))),
                "your groups are made as equal as can be", _GROUPS),
        Mistake(partial(_ghost_norm, groups=torch.chunk), "size is taken for the number of groups", _GROUPS),
        Mistake(partial(_ghost_norm, groups=torch.tensor_split), "size is taken for the number of groups", _GROUPS),
        Mistake(_by_first_group, "all groups are normalised by the first one's mean and variance",
                "Each group has its own. What is computed inside your loop, and what before it?"),
    ],
)  # fmt: skip


# Exercises 7 and 8

BASE = Recipe(
    epochs=10,
    batch_size=600,
    optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    precision="float64",
    validate_every=10,
)
"""What the learner starts from: 100 steps on 6,000 digits, at a rate for batches of 20. How far they go is what limits
them, not noise: a larger rate gains 9 points, and 30 times the rate loses all."""


_FOR_INSTANCE = "For instance: mine = replace(base, optimizer=partial(torch.optim.SGD, lr=0.03, momentum=0.9))"

exercise_7 = Design(
    "Choose a rate for a batch 30 times as large",
    admit=rate_and_schedule_only(BASE, _FOR_INSTANCE),
    score=partial(accuracy_on_glyphs, train_size=6000),
    seeds=(431, 432, 433, 434),
    least=0.86,
    hint=["Look at the training loss of your run: does it still fall when the steps are over, or does it jump?",
          "A rule says where to begin to look, not where to end. Between the old rate and 30 times it there is room.",
          "Try rates a factor of two apart on a validation split of your own. A schedule that falls early throws "
          "steps away, of which there are only 100."],
    diverged=["A batch 30 times as large does not bear 30 times the rate: what limits it now is not noise, but the "
              "curvature.", "A smaller rate."],
)  # fmt: skip

exercise_8 = OpenProject(
    "An open project: the batch size of a training of your own",
    rubric=["throughput", "noise", "the rate", "the cost", "honesty"],
)
