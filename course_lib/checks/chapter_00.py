"""Checks of chapter 0, start here: accuracy, intervals, a figure to read, a bug, the inner step, a recipe to design.

The right answers are written out with SciPy and torch, and each usual mistake beside them in a table, so that a wrong
answer is met with the hint for that mistake.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.checks import digits
from course_lib.lab.data import Split, batches
from course_lib.lab.judging import Design, Method, Mistake, OpenProject, Reading, Rule, Wrong, expect_close
from course_lib.lab.training import Recipe, evaluate

# Exercise 1: accuracy


def _scored(examples: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(examples) % classes
    logits = torch.randn(examples, classes, generator=torch.Generator().manual_seed(seed))
    logits[::2, :] += 4 * F.one_hot(labels[::2], classes)  # about half of them right, so that 0 and 1 both fail
    return logits, labels


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


exercise_1 = Method(
    "Accuracy from logits",
    right=_accuracy,
    what="the accuracy",
    hint="argmax(1) picks a class for each row.",
    rtol=1e-4,
    cases={
        f"{examples} examples of {classes} classes": _scored(examples, classes, seed)
        for examples, classes, seed in ((40, 10, 0), (7, 3, 1), (6, 6, 2))
    },
    mistakes=[
        Mistake(lambda logits, labels: _accuracy(logits, labels) * len(labels),
                "this counts the right answers; what is wanted is their share",
                "Which method of a tensor turns ones and zeros into their share? Booleans must become floats first."),
        Mistake(lambda *case: 1 - _accuracy(*case), "this is the share of wrong answers",
                "Compare with == rather than !=."),
        Mistake(lambda *case: 100 * _accuracy(*case), "this is a percentage; what is wanted is a fraction from 0 to 1",
                "Leave out the 100."),
    ],
)  # fmt: skip


# Exercises 2 and 3: intervals

Pair = tuple[float, float]


def _interval(values: np.ndarray, *, quantile: float | None = None, ddof: int = 1, root: bool = True) -> Pair:
    """Mean ± t · s / √n; the arguments make the usual mistakes."""
    count = len(values)
    t = stats.t.ppf(0.975, count - 1) if quantile is None else quantile
    reach = t * values.std(ddof=ddof) / (np.sqrt(count) if root else 1.0)
    return float(values.mean() - reach), float(values.mean() + reach)


def _unpaired(a: np.ndarray, b: np.ndarray) -> Pair:
    """The interval of a difference of means of independent arms of one size (pooled variance)."""
    reach = stats.t.ppf(0.975, 2 * len(a) - 2) * np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
    gap = float(a.mean() - b.mean())
    return gap - float(reach), gap + float(reach)


def _arms(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(100 + seeds)
    luck = source.normal(size=seeds)
    return luck + 0.3 * source.normal(size=seeds) + 0.5, luck + 0.3 * source.normal(size=seeds)


_ENDS, _ENDS_HINT = ("the lower end", "the upper end"), "The interval is mean ± t · s / √n: return low, high."
_INTERVAL_MISTAKES = [
    Mistake(lambda v: _interval(v)[::-1], "low and high are swapped", "The smaller one comes first."),
    Mistake(lambda v: _interval(v, quantile=stats.norm.ppf(0.975)),
            "1.96 belongs to a known spread; here it was estimated from a few runs, and the interval is too narrow",
            "Look for scipy.stats.t.ppf, with n - 1 degrees of freedom."),
    Mistake(lambda v: _interval(v, quantile=stats.t.ppf(0.95, len(v) - 1)),
            "this interval leaves 5% on each side, so it is one of 90%",
            "Half of the 5% goes to either side: which quantile does that make?"),
    Mistake(lambda v: _interval(v, quantile=stats.t.ppf(0.975, len(v))), "the degrees of freedom are not right",
            "One of the n is used up by the mean."),
    Mistake(lambda v: _interval(v, ddof=0), "the spread is too small: the squares were divided by n",
            "NumPy divides by n unless it is told ddof=1."),
    Mistake(lambda v: _interval(v, root=False), "this says where a single run falls; what is wanted is where "
                                                "the mean lies",
            "The mean of n runs wobbles less than one run, by a factor of √n."),
]  # fmt: skip

exercise_2 = Method(
    "A 95% interval of a mean, by hand",
    right=_interval,
    what=_ENDS,
    hint=_ENDS_HINT,
    rtol=1e-3,
    cases={
        f"{runs} runs": (centre + np.random.default_rng(runs).normal(size=runs),)
        for runs, centre in ((5, 0.95), (3, -2.0), (12, 40.0))
    },
    mistakes=_INTERVAL_MISTAKES,
)

exercise_3 = Method(
    "A 95% interval of a paired difference",
    right=lambda a, b: _interval(a - b),
    what=_ENDS,
    hint=_ENDS_HINT,
    rtol=1e-3,
    cases={f"{seeds} seeds": _arms(seeds) for seeds in (5, 9, 4)},
    mistakes=[
        Mistake(lambda a, b: _interval(b - a), "the sign is turned round: what is wanted is a minus b",
                "Which of the two is subtracted?"),
        Mistake(_unpaired, "this is the unpaired interval: the spreads of the two arms were added up",
                "Seed 3 of a belongs to seed 3 of b. What is the difference for each seed?"),
        *[Mistake(partial(lambda rule, a, b: rule(a - b), mistake.rule), mistake.message, mistake.hint)
          for mistake in _INTERVAL_MISTAKES],
    ],
)  # fmt: skip


exercise_4 = Reading(
    'Who may report "as good as equal"? A figure to read',
    right=("Cleo", "c"),
    choices={
        "Ada": "Ada's interval also holds a gain of three points, and a loss of three",
        "Ben": "Ben's interval says that the new recipe is better, perhaps by three points",
        "Cleo": "",
        "Dan": "Dan's interval also holds a gain of two points and more",
        "Eve": "Eve's interval is centred at zero, and still holds a gain or a loss of nearly two points",
    },
    reasons={
        "a": "three intervals hold zero, and none of them shows that the two are equal",
        "b": "the mean alone says nothing; Eve's is the smallest",
        "c": "",
        "d": "an interval in which anything is possible shows nothing",
        "e": "an interval without zero shows that there is a difference, not that it is small",
    },
    hint="Which gains does the interval leave possible? None of them may matter.",
    reason_hint="Which sentence is true of this interval, and would allow you to say that the difference does "
    "not matter?",
)


# Exercise 5: the accuracy on a whole split


def _linear(inputs: int, outputs: int, seed: int, **options: Any) -> nn.Linear:
    """A layer made without a draw from the notebook's own random numbers."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, **options)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=p.dtype))
    return layer


def _scored_split(count: int, batch_size: int) -> tuple[nn.Module, Split, int]:
    """Images of which the model gets the first three quarters right, and the rest wrong."""
    model = nn.Sequential(nn.Flatten(), _linear(16, 3, seed=5, bias=False))
    pixels = torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    blank = Split(pixels, torch.zeros(count, dtype=torch.int64), (0.5,), (0.25,))
    ((x, _),) = batches(blank, count)
    said = model(x).argmax(1)
    wrong = torch.arange(count) >= 3 * count // 4
    return model, replace(blank, labels=torch.where(wrong, (said + 1) % 3, said)), batch_size


def _from_shares(combined: Callable[[np.ndarray, int, int], float]) -> Rule:
    """``combined(shares, images, batch_size)`` of the accuracies of the batches."""

    def accuracy(model: nn.Module, split: Split, batch_size: int) -> float:
        shares = [_accuracy(model(x), y) for x, y in batches(split, batch_size)]
        return float(combined(np.array(shares), len(split), batch_size))

    return accuracy


def _accuracy_on(model: nn.Module, split: Split, batch_size: int) -> float:
    return evaluate(model, split).accuracy


exercise_5 = Method(
    "Find the bug: the accuracy on a whole split, in batches",
    right=_accuracy_on,
    what="the accuracy",
    hint="Count the images, then divide once.",
    rtol=1e-6,
    cases={
        f"{count} images in batches of {batch_size}": _scored_split(count, batch_size)
        for count, batch_size in ((64, 16), (65, 16), (9, 4), (5, 256))
    },
    mistakes=[
        Mistake(_from_shares(lambda shares, count, size: shares.mean()), "the images do not all count the same",
                "Write down the batches of this split. What does one image add to the result?"),
        Mistake(_from_shares(lambda shares, count, size: shares[: count // size].mean()),
                "the images of the last batch do not count at all", "A smaller batch has images too."),
        Mistake(_from_shares(lambda shares, count, size: shares.sum() * size / count),
                "the last batch is counted as if it were full", "len(y) knows how many images a batch has."),
        Mistake(lambda *case: _accuracy_on(*case) * len(case[1]),
                "this counts the right answers; what is wanted is their share", "Divide by the number of images."),
    ],
)  # fmt: skip


# Exercise 6: the inner step


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, *,
    zeroed: bool = True, stepped: bool = True, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """A training step; the other arguments make the usual mistakes."""
    if zeroed:
        optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y, reduction=reduction)
    loss.backward()
    if stepped:
        optimizer.step()
    return loss.detach()


def _after(step: Rule, steps: int, part: str) -> Tensor | list[Any]:
    """The weights after so many steps on one batch, or what each step returned."""
    model, source = _linear(4, 3, seed=1, dtype=torch.float64), torch.Generator().manual_seed(2)
    x, y = torch.randn(9, 4, generator=source, dtype=torch.float64), torch.randint(0, 3, (9,), generator=source)
    for p in model.parameters():  # a gradient of an earlier life, as it is there in the midst of training
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = [step(model, optimizer, x.clone(), y.clone()) for _ in range(steps)]
    return losses if part == _LOSS else torch.cat([p.detach().flatten() for p in model.parameters()])


def _first_wrong(found: Any, right: Any, steps: int, part: str) -> None:
    if part == _WEIGHTS:
        expect_close(found, right, what=part, hint="Forward, backward, step.", rtol=1e-4)
        return
    wanted = "What is wanted is the mean loss of the batch before the step, the one that was differentiated."
    for loss, expected in zip(found, right, strict=True):
        value = loss.detach() if isinstance(loss, Tensor) else loss
        expect_close(value, expected.item(), what=part, hint=wanted, rtol=1e-4)


_WEIGHTS, _LOSS = "the weights after it", "the loss that is returned"

exercise_6 = Method(
    "The inner step of the training loop",
    right=_step,
    ask=_after,
    explain=_first_wrong,
    rtol=1e-4,  # a loss in single precision will do
    cases={
        "the first step": (1, _WEIGHTS),
        "three steps in a row": (3, _WEIGHTS),
        "each of three steps": (3, _LOSS),
    },
    mistakes=[
        Mistake(partial(_step, zeroed=False), "the gradient still holds that of the step before",
                "backward() adds to what is in .grad. Which method of the optimizer empties it?"),
        Mistake(partial(_step, stepped=False), "the weights have not moved",
                "In which order come backward(), step() and zero_grad()?"),
        Mistake(partial(_step, reduction="sum"), "the loss was summed over the batch",
                "What is wanted is the mean, which cross_entropy gives by default."),
    ],
)  # fmt: skip


# Exercises 7 and 8

LARGEST_EPOCHS = 20


def _within_the_budget(answer: Any) -> None:
    if not isinstance(answer, Recipe):
        raise Wrong("expected a Recipe", "For instance: mine = replace(plain, ema=0.9)")
    if answer.epochs > LARGEST_EPOCHS:
        raise Wrong(f"{answer.epochs} epochs; the budget is {LARGEST_EPOCHS}",
                    f"Set epochs={LARGEST_EPOCHS} or fewer, and gain elsewhere in the recipe.")  # fmt: skip


exercise_7 = Design(
    "Design a recipe: 0.89 on images that nobody has seen, in twenty epochs",
    admit=_within_the_budget,
    score=partial(digits.accuracy, width=128),
    seeds=(701, 702, 703),
    least=0.89,
    diverged="A smaller learning rate, or clip_norm.",
    hint=["Which two changes of this chapter helped, and which slots do they fill?",
          "Move the images, and average the weights over the last few epochs."],
)  # fmt: skip

exercise_8 = OpenProject(
    "An open project: a trick that you believe in, and one that you doubt",
    rubric=["expectation", "fair arms", "runs", "report", "honesty"],
)
