"""Checks of chapter 0, start here: accuracy, intervals, a figure to read, a bug, the inner step, a recipe to design.

The right answers are written out with SciPy and torch, and each usual mistake beside them in a table, so that a wrong
answer is met with the hint for that mistake.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.data import Dataset, Split, batches, load
from course_lib.lab.exercises import Wrong, call, close, expect_close, expect_unchanged
from course_lib.lab.models import mlp
from course_lib.lab.training import Diverged, Recipe, evaluate, fit, fresh

Mistake = tuple[Callable[..., Any], str, str]  # what the mistaken answer gives, what is wrong with it, a hint
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
        if not close(found, right, rtol=1e-4):
            _name(found, _made(_ACCURACY_MISTAKES, right, examples), on, rtol=1e-4)
            expect_close(
                found, right, what="the accuracy", on=on, rtol=1e-4, hint="argmax(1) picks a class for each row."
            )


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
        _judge(found, _interval(values), _made(_INTERVAL_MISTAKES, values), on)


def exercise_3(answer: Any) -> None:
    """A 95% interval of a paired difference."""
    for runs in (5, 9, 4):
        source = np.random.default_rng(100 + runs)
        luck = source.normal(size=runs)
        a, b = luck + 0.3 * source.normal(size=runs) + 0.5, luck + 0.3 * source.normal(size=runs)
        on = f"{runs} seeds"
        found = _pair(call(answer, a, b, on=on), on)
        _judge(found, _interval(a - b), _made(_PAIR_MISTAKES, a, b) + _made(_INTERVAL_MISTAKES, a - b), on)


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


_INTERVAL_MISTAKES: list[Mistake] = [
    (lambda v: _interval(v)[::-1], "low and high are swapped", "The smaller one comes first."),
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
_PAIR_MISTAKES: list[Mistake] = [
    (lambda a, b: _interval(b - a), "the sign is turned round: wanted is a minus b", "Which of the two is subtracted?"),
    (_unpaired, "this is the unpaired interval: the spreads of the two arms were added up",
     "Seed 3 of a belongs to seed 3 of b. What is the difference for each seed?"),
]  # fmt: skip


def _made(mistakes: Iterable[Mistake], *inputs: Any) -> list[tuple[Any, str, str]]:
    """What each mistaken answer gives on the inputs, with its message and hint."""
    return [(rule(*inputs), message, hint) for rule, message, hint in mistakes]


def _name(found: Any, made: Iterable[tuple[Any, str, str]], on: str, rtol: float = 1e-3) -> None:
    """Raise `Wrong` with the mistake that explains what was found, if one does."""
    for mistaken, message, hint in made:
        if close(found, mistaken, rtol=rtol):
            raise Wrong(f"{message} (on {on})", hint)


def _pair(found: Any, on: str) -> Pair:
    if not isinstance(found, (tuple, list, np.ndarray)) or len(found) != 2:
        raise Wrong(f"wanted are two numbers, low and high (on {on})", "End with: return low, high")
    return found[0], found[1]


def _judge(found: Pair, right: Pair, made: Sequence[tuple[Pair, str, str]], on: str) -> None:
    """Both ends agree with ``right``, or the mistake that explains them is named."""
    if close(found, right, rtol=1e-3):
        return
    _name(found, made, on)
    for value, expected, what in zip(found, right, ("the lower end", "the upper end"), strict=True):
        expect_close(value, expected, what=what, on=on, rtol=1e-3, hint="The interval is mean ± t · s / √n.")


def exercise_4(answer: Any) -> None:
    """Who may report "as good as equal"? A figure to read."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not all(isinstance(a, str) for a in answer):
        raise Wrong("wanted are a name and the letter of a reason", 'For instance: name, reason = "Ada", "a"')
    name, reason = answer[0].strip().capitalize(), answer[1].strip(" )").lower()
    if name not in _READINGS or reason not in _REASONS:
        raise Wrong(f"there is no {answer[0]!r} with the reason {answer[1]!r}", "Five names, and the letters a to e.")
    if name != "Cleo":
        raise Wrong(_READINGS[name], "Which gains does the interval leave possible? None of them may matter.")
    if reason != "c":
        raise Wrong(f"the name is right, the reason is not: {_REASONS[reason]}", "What would change your mind?")


_READINGS = {
    "Ada": "Ada's interval also holds a gain of three points, and a loss of three",
    "Ben": "Ben's interval says that the new recipe is better, perhaps by three points",
    "Cleo": "",
    "Dan": "Dan's interval also holds a gain of two points and more",
    "Eve": "Eve's interval is centred at zero, and still holds a gain or a loss of nearly two points",
}
_REASONS = {
    "a": "three intervals hold zero, and none of them shows that the two are equal",
    "b": "the mean alone says nothing; Eve's is the smallest",
    "c": "",
    "d": "an interval in which anything is possible shows nothing",
    "e": "an interval without zero shows that there is a difference, not that it is small",
}


def exercise_5(answer: Any) -> None:
    """Find the bug: the accuracy on a whole split, in batches."""
    linear = nn.Linear(16, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(5)))
    model = nn.Sequential(nn.Flatten(), linear)
    for count, batch_size in ((64, 16), (65, 16), (9, 4), (5, 256)):
        split = _scored_split(model, count)
        on = f"{count} images in batches of {batch_size}"
        right = evaluate(model, split).accuracy
        # The batches come from the learner's own call, so the split is handed over as it is
        found = call(functools.partial(_call_with, answer, model, split, batch_size), on=on)
        if not close(found, right, rtol=1e-6):
            _name(found, _made(_BATCH_MISTAKES, model, split, batch_size), on, rtol=1e-6)
            expect_close(
                found, right, what="the accuracy", on=on, rtol=1e-6, hint="Count the images, then divide once."
            )


def _call_with(answer: Any, *inputs: Any) -> Any:
    return answer(*inputs) if callable(answer) else call(answer)  # call says what is wanted


def _scored_split(model: nn.Module, count: int) -> Split:
    """Images of which the model gets the first three quarters right, and the rest wrong."""
    pixels = torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    blank = Split(pixels, torch.zeros(count, dtype=torch.int64), (0.5,), (0.25,))
    ((x, _),) = batches(blank, count)
    said = model(x).argmax(1)
    wrong = torch.arange(count) >= 3 * count // 4
    return replace(blank, labels=torch.where(wrong, (said + 1) % 3, said))


def _shares(model: nn.Module, split: Split, batch_size: int) -> list[float]:
    return [(model(x).argmax(1) == y).double().mean().item() for x, y in batches(split, batch_size)]


_BATCH_MISTAKES: list[Mistake] = [
    (lambda model, split, size: float(np.mean(_shares(model, split, size))), "the images do not all count the same",
     "Write down the batches of this split. What does one image add to the result?"),
    (lambda model, split, size: sum(_shares(model, split, size)[: len(split) // size]) / max(len(split) // size, 1),
     "the images of the last batch do not count at all", "A smaller batch has images too."),
    (lambda model, split, size: sum(s * size for s in _shares(model, split, size)) / len(split),
     "the last batch is counted as if it were full", "len(y) knows how many images a batch has."),
    (lambda model, split, size: evaluate(model, split).accuracy * len(split), "this counts the right answers; wanted "
     "is their share", "Divide by the number of images."),
]  # fmt: skip


def exercise_6(answer: Any) -> None:
    """The inner step of the training loop."""
    for on, steps in {"the first step": 1, "three steps in a row": 3}.items():
        (right_weights, right_losses), (weights, losses) = _run(_step, steps), _run(_called(answer, on), steps)
        if close(weights, right_weights):
            for found, expected in zip(losses, right_losses, strict=True):
                expect_close(
                    _detached(found), expected.item(), what="the loss that is returned", on=on, rtol=1e-4,
                    hint="Wanted is the mean loss of the batch before the step, the one that was differentiated.",
                )  # fmt: skip
            continue
        _name(weights, [(_run(rule, steps)[0], *said) for rule, *said in _STEP_MISTAKES], on, rtol=1e-5)  # type: ignore[misc]
        expect_close(weights, right_weights, what="the weights after it", on=on, hint="Forward, backward, step.")
    x, y = _batch()
    model = _model()
    expect_unchanged(lambda x, y: answer(model, torch.optim.SGD(model.parameters(), lr=0.1), x, y), x, y)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    optimizer.zero_grad()
    return _without_zeroing(model, optimizer, x, y, reduction)


def _without_zeroing(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, reduction: str = "mean"
) -> Tensor:
    loss = F.cross_entropy(model(x), y, reduction=reduction)
    loss.backward()
    optimizer.step()
    return loss


_STEP_MISTAKES: list[Mistake] = [
    (_without_zeroing, "the gradient still holds that of the step before", "backward() adds to what is in .grad. "
     "Which method of the optimizer empties it?"),
    (lambda model, optimizer, x, y: None, "the weights have not moved", "In which order come backward(), step() and "
     "zero_grad()?"),
    (functools.partial(_step, reduction="sum"), "the loss was summed over the batch", "Wanted is the mean, which "
     "cross_entropy gives by default."),
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


LARGEST_EPOCHS, SMALLEST_ACCURACY = 20, 0.89
HIDDEN_SEEDS = (701, 702, 703)


def exercise_7(answer: Any) -> None:
    """Design a recipe: 0.89 on images that nobody has seen, in twenty epochs."""
    if not isinstance(answer, Recipe):
        raise Wrong("wanted is a Recipe", "For instance: mine = replace(plain, ema=0.9)")
    if answer.epochs > LARGEST_EPOCHS:
        raise Wrong(f"{answer.epochs} epochs; the budget is {LARGEST_EPOCHS}", "More of the same is not allowed.")
    scores = []
    for seed in HIDDEN_SEEDS:
        data = _hidden_digits(seed)
        network = fresh(functools.partial(mlp, data.input_shape, len(data.classes)), answer, seed=seed)
        try:
            fit(network, data, answer, seed=seed, progress=False)
        except Diverged as error:
            raise Wrong(f"the run diverged: {error}", "A smaller learning rate, or clip_norm.") from None
        except Exception as error:  # an objective or an augmentation of the learner's own may fail in any way
            raise Wrong(f"training with it raised {type(error).__name__}: {error}") from None
        scores.append(evaluate(network, data.test).accuracy)
    if np.mean(scores) < SMALLEST_ACCURACY:
        raise Wrong(
            f"a mean accuracy of {np.mean(scores):.3f} on {len(scores)} hidden data sets; wanted is at least "
            f"{SMALLEST_ACCURACY}", ("Which two changes of this chapter helped, and which slots do they fill?",
                                     "Move the images, and average the weights over the last few epochs."),
        )  # fmt: skip


@functools.cache
def _hidden_digits(seed: int) -> Dataset:
    data = load("glyphs", classes="digits", size=16, difficulty=0.5, count=6000, train_size=1000, seed=seed)
    # Validation after each epoch would cost more than it tells: a hundred images are enough for `keep` and `stop`.
    return replace(data, val=data.val.subset(torch.arange(100)))
