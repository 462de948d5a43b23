"""Checks of chapter 0, start here: accuracy, a t-interval, a paired difference, and the inner step of the loop.

The right answers are written out with SciPy and torch, and each usual mistake beside them, so that a wrong answer is
met with the hint for that mistake.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.exercises import Wrong, call, close, expect_close, expect_unchanged

Mistake = tuple[Callable[..., Any], str, str]  # the mistaken answer, what is wrong with it, a hint
Pair = tuple[float, float]


def exercise_1(answer: Any) -> None:
    """Accuracy from logits."""
    for examples, classes, seed in ((40, 10, 0), (7, 3, 1), (6, 6, 2)):
        source = torch.Generator().manual_seed(seed)
        labels = torch.arange(examples) % classes
        logits = torch.randn(examples, classes, generator=source)
        logits[::2, :] += 4 * F.one_hot(labels[::2], classes)  # about half of them right, so that 0 and 1 both fail
        on = f"{examples} examples of {classes} classes"
        right = (logits.argmax(1) == labels).double().mean().item()
        found = call(answer, logits, labels, on=on)
        if close(found, right, rtol=1e-4):
            continue
        for mistaken, message, hint in _ACCURACY_MISTAKES:
            if close(found, mistaken(right, examples), rtol=1e-4):
                raise Wrong(f"{message} (on {on})", hint)
        expect_close(found, right, what="the accuracy", on=on, rtol=1e-4, hint="argmax(1) picks a class for each row.")


_ACCURACY_MISTAKES: list[Mistake] = [
    (lambda right, count: right * count, "this counts the right answers; wanted is their share", "Which method of a "
     "tensor turns ones and zeros into their share? Booleans must become floats first."),
    (lambda right, count: 1 - right, "this is the share of wrong answers", "Compare with == rather than !=."),
    (lambda right, count: 100 * right, "this is a percentage; wanted is a fraction from 0 to 1", "Leave out the 100."),
]  # fmt: skip


def exercise_2(answer: Any) -> None:
    """A 95% interval of a mean, by hand."""
    for runs, centre in ((5, 0.95), (3, -2.0), (12, 40.0)):
        values = centre + np.random.default_rng(runs).normal(size=runs)
        on = f"{runs} runs"
        found = _pair(call(answer, values, on=on), on)
        _judge(found, _interval(values), [(rule(values), *rest) for rule, *rest in _INTERVAL_MISTAKES], on)


def exercise_3(answer: Any) -> None:
    """A 95% interval of a paired difference."""
    for runs in (5, 9, 4):
        source = np.random.default_rng(100 + runs)
        luck = source.normal(size=runs)
        a, b = luck + 0.3 * source.normal(size=runs) + 0.5, luck + 0.3 * source.normal(size=runs)
        on = f"{runs} seeds"
        found = _pair(call(answer, a, b, on=on), on)
        mistakes = [
            (_interval(b - a), "the sign is turned round: wanted is a minus b", "Which of the two is subtracted?"),
            (_unpaired(a, b), "this is the unpaired interval: the spreads of the two arms were added up",
             "Seed 3 of a belongs to seed 3 of b. What is the difference for each seed?"),
            *((rule(a - b), message, hint) for rule, message, hint in _INTERVAL_MISTAKES),
        ]  # fmt: skip
        _judge(found, _interval(a - b), mistakes, on)


def _interval(values: np.ndarray, *, quantile: float | None = None, ddof: int = 1, root: bool = True) -> Pair:
    """Mean ± t · s / √n; the arguments make the usual mistakes."""
    count = len(values)
    t = stats.t.ppf(0.975, count - 1) if quantile is None else quantile
    reach = t * values.std(ddof=ddof) / (np.sqrt(count) if root else 1.0)
    return float(values.mean() - reach), float(values.mean() + reach)


_INTERVAL_MISTAKES: list[Mistake] = [
    (lambda v: _interval(v, quantile=stats.norm.ppf(0.975)), "1.96 belongs to a known spread; here it was estimated "
     "from a few runs, and the interval is too narrow", "Look for scipy.stats.t.ppf, with n - 1 degrees of freedom."),
    (lambda v: _interval(v, quantile=stats.t.ppf(0.95, len(v) - 1)), "this interval leaves 5% on each side, so it is "
     "one of 90%", "Half of the 5% goes to either side: which quantile does that make?"),
    (lambda v: _interval(v, quantile=stats.t.ppf(0.975, len(v))), "the degrees of freedom are not right",
     "One of the n is used up by the mean."),
    (lambda v: _interval(v, ddof=0), "the spread is too small: the squares were divided by n",
     "NumPy divides by n unless it is told ddof=1."),
    (lambda v: _interval(v, root=False), "this says where a single run falls; wanted is where the mean lies",
     "The mean of n runs wobbles less than one run, by a factor of √n."),
]  # fmt: skip


def _unpaired(a: np.ndarray, b: np.ndarray) -> Pair:
    """The interval of a difference of means of independent arms of one size (pooled variance)."""
    reach = stats.t.ppf(0.975, 2 * len(a) - 2) * np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
    gap = float(a.mean() - b.mean())
    return gap - float(reach), gap + float(reach)


def _pair(found: Any, on: str) -> Pair:
    if not isinstance(found, (tuple, list, np.ndarray)) or len(found) != 2:
        raise Wrong(f"wanted are two numbers, low and high (on {on})", "End with: return low, high")
    return found[0], found[1]


def _judge(found: Pair, right: Pair, mistakes: Sequence[tuple[Pair, str, str]], on: str) -> None:
    """Both ends agree with ``right``, or the mistake that explains them is named."""
    if close(found, right, rtol=1e-3):
        return
    if close(found[::-1], right, rtol=1e-3):
        raise Wrong(f"low and high are swapped (on {on})", "The smaller one comes first.")
    for mistaken, message, hint in mistakes:
        if close(found, mistaken, rtol=1e-3):
            raise Wrong(f"{message} (on {on})", hint)
    for value, expected, what in zip(found, right, ("the lower end", "the upper end"), strict=True):
        expect_close(value, expected, what=what, on=on, rtol=1e-3, hint="The interval is mean ± t · s / √n.")


def exercise_4(answer: Any) -> None:
    """The inner step of the training loop."""
    runs = {"the first step": 1, "three steps in a row": 3}
    for on, steps in runs.items():
        (right_weights, right_losses), (weights, losses) = _run(_step, steps), _run(_called(answer, on), steps)
        if close(weights, right_weights):
            for found, expected in zip(losses, right_losses, strict=True):
                expect_close(
                    _detached(found), expected.item(), what="the loss that is returned", on=on, rtol=1e-4,
                    hint="Wanted is the mean loss of the batch before the step, the one that was differentiated.",
                )  # fmt: skip
            continue
        for mistaken, message, hint in _STEP_MISTAKES:
            if close(weights, _run(mistaken, steps)[0]):
                raise Wrong(f"{message} (on {on})", hint)
        expect_close(weights, right_weights, what="the weights after it", on=on, hint="Forward, backward, step.")
    x, y = _batch()
    model = _model()
    expect_unchanged(lambda x, y: answer(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y), x, y)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def _without_zeroing(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def _zeroed_too_late(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)  # the weights stay where they are: no gradient, or no step


def _summed(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y, reduction="sum")
    loss.backward()
    optimizer.step()
    return loss


_STEP_MISTAKES: list[Mistake] = [
    (_without_zeroing, "the gradient still holds that of the step before", "backward() adds to what is in .grad. "
     "Which method of the optimizer empties it?"),
    (_zeroed_too_late, "the weights have not moved", "In which order come backward(), step() and zero_grad()?"),
    (_summed, "the loss was summed over the batch", "Wanted is the mean, which cross_entropy gives by default."),
]  # fmt: skip


def _model() -> nn.Module:
    model = nn.Linear(4, 3, dtype=torch.float64)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=source, dtype=p.dtype))
    return model


def _batch() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(2)
    x = torch.randn(9, 4, generator=source, dtype=torch.float64)
    return x, torch.randint(0, 3, (9,), generator=source)


def _run(step: Callable[..., Any], steps: int) -> tuple[Tensor, list[Any]]:
    """The weights after so many steps on one batch, and what each step returned."""
    model, (x, y) = _model(), _batch()
    # A gradient of an earlier life, as it is there in the midst of training
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = [step(model, optimizer, x.clone(), y.clone()) for _ in range(steps)]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), losses


def _called(answer: Any, on: str) -> Callable[..., Any]:
    """The answer as a step; `call` would hand it copies, and the optimizer would then move other weights."""
    if not callable(answer):
        call(answer)  # says what is wanted

    def step(*inputs: Any) -> Any:
        return call(functools.wraps(answer)(lambda: answer(*inputs)), on=on)

    return step


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
