"""Checks of chapter 8, pruning: masks, a schedule, the removal of dead units, a figure to read, a bug, a design.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports. Where equal magnitudes leave a choice, a mask is judged by how
many weights it keeps and how large they are; a network without its dead units, by what it computes.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.lab.data import Dataset, load
from course_lib.lab.exercises import Wrong, call, close, expect_close, expect_unchanged
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh

Rule = Callable[..., Any]
Mistake = tuple[Rule, str, Sequence[str]]  # the mistaken rule, what is wrong with it, hints
Network = tuple[Tensor, Tensor, Tensor, Tensor]


def exercise_1(answer: Any) -> None:
    """A mask that removes the smallest weights."""
    cases = {
        "a matrix, sparsity 0.3": (_weights(51, 4, 5), 0.3),
        "a matrix, sparsity 0.33": (_weights(58, 4, 5), 0.33),
        "a kernel of a convolution, sparsity 0.7": (_weights(52, 3, 2, 2, 2), 0.7),
        "a vector, sparsity 0.36": (_weights(53, 12), 0.36),
        "a vector, sparsity 0": (_weights(54, 5), 0.0),
        "a vector, sparsity 1": (_weights(55, 5), 1.0),
        "a matrix with many equal magnitudes, sparsity 0.4": (_weights(56, 5, 6).mul(2).round(), 0.4),
        "a matrix of which half is zero already, sparsity 0.25": (_weights(57, 4, 8).relu(), 0.25),
    }
    for on, (weight, sparsity) in cases.items():
        mask = _mask(call(answer, weight, sparsity, on=on), weight, on)
        removed, wanted = int((~mask).sum()), round(sparsity * weight.numel())
        if _as_large(mask, _magnitude_mask(weight, sparsity), weight):
            continue
        if 0 < wanted < weight.numel():  # else several mistakes give the same mask
            _recognise(mask, (weight, sparsity), _MAGNITUDE_MISTAKES, on)
        if removed != wanted:
            raise Wrong(
                f"your mask removes {removed} of {weight.numel()} weights; {wanted} were to go (on {on})",
                _NONE_OR_ALL if wanted in (0, weight.numel()) else _TIES,
            )
        raise Wrong(
            f"the number of weights removed is right, but larger ones go while smaller ones stay (on {on})",
            ["How large a weight is has nothing to do with its sign, its row or its place."],
        )
    _expect_weight_unchanged(answer, cases)


def exercise_2(answer: Any) -> None:
    """The 2:4 pattern."""
    equal = torch.tensor([[1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0], [0.5, 0.5, -3.0, 0.5, -2.0, 2.0, 2.0, -2.0]])
    cases = {
        "a matrix of 8 by 12": (_weights(61, 8, 12),),
        "a matrix of 3 by 8": (_weights(62, 3, 8),),
        "a matrix of 2 by 4": (_weights(63, 2, 4),),
        "a matrix with equal magnitudes": (equal,),
    }
    for on, (weight,) in cases.items():
        mask = _mask(call(answer, weight, on=on), weight, on)
        kept = mask.reshape(-1, 4).sum(1)
        if (kept == 2).all() and _as_large(mask, _two_of_four(weight), weight):
            continue
        _recognise(mask, (weight,), _PATTERN_MISTAKES, on)
        if (kept != 2).any():
            group = int((kept != 2).nonzero()[0])
            row, column = divmod(4 * group, weight.shape[1])
            raise Wrong(
                f"your mask keeps {kept[group]} of the 4 neighbours from column {column} of row {row}; 2 of every 4 "
                f"should stay (on {on})",
                [
                    "Which four weights belong together? Reshaping can give each such group a row of its own.",
                    "A threshold cannot tell equal magnitudes apart; positions can.",
                ],
            )
        raise Wrong(
            f"2 of every 4 neighbours stay, but not always the larger ones (on {on})",
            ["Within each group, compare magnitudes. Does each result go back to the place it came from?"],
        )
    _expect_weight_unchanged(answer, cases)


def exercise_3(answer: Any) -> None:
    """The cubic schedule of gradual pruning."""
    for begin, end, final in ((10, 50, 0.9), (0, 8, 0.5), (100, 1100, 0.95)):
        length = end - begin
        steps = [
            *(begin + length * eighth // 8 for eighth in range(9)),  # the ramp first, and then what is outside of it
            *(step for step in (0, begin // 2, begin - 1) if 0 <= step < begin),
            *(end + 1, end + length // 2, 3 * end),
        ]
        on = f"begin {begin}, end {end}, final {final:g}"
        found = tuple(call(answer, step, begin, end, final, on=f"step {step}, {on}") for step in steps)
        _judge_curve(found, steps, begin, end, final, on)


def exercise_4(answer: Any) -> None:
    """Remove dead units, and change nothing."""
    cases = _dead_cases()
    for on, case in cases.items():
        found, right = call(answer, *case, on=on), _remove_units(*case)
        if close(found, right):
            continue
        _recognise(found, case, _DEAD_MISTAKES, on)
        _expect_same_function(found, right, case, on)
    for on, case in cases.items():
        expect_unchanged(
            answer, *case, on=on,
            hint=["Which of your lines writes into a tensor that the caller still needs?",
                  "b2 += … changes the caller's tensor; a plain + makes a new one."],
        )  # fmt: skip


def exercise_5(answer: Any) -> None:
    """Whose pruning was worth it? A figure to read."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not all(isinstance(a, str) for a in answer):
        raise Wrong("wanted are a name and the letter of a reason", 'For instance: name, reason = "Ada", "a"')
    name, reason = answer[0].strip().capitalize(), answer[1].strip(" )").lower()
    if name not in _READINGS or reason not in _REASONS:
        raise Wrong(f"there is no {answer[0]!r} with the reason {answer[1]!r}", "Four names, and the letters a to d.")
    if name != "Cleo":
        raise Wrong(_READINGS[name], "Which dense network would you have trained instead, and how good is that?")
    if reason != "c":
        raise Wrong(f"the name is right, the reason is not: {_REASONS[reason]}", "What is each square compared with?")


_READINGS = {
    "Ada": "Ada's network is the most accurate of all, and as slow as the dense one: 90% zeros saved no time",
    "Ben": "Ben's network is half as slow, and a small network, trained as it was, is better still",
    "Cleo": "",
    "Dan": "Dan's two intervals overlap by more than half: his runs cannot tell whether pruning gained anything",
}
_REASONS = {
    "a": "most accurate of all is the one that saved no time",
    "b": "how many weights are gone is not what anybody waits for",
    "c": "",
    "d": "losing little against the dense network is nothing if a small network loses less",
}


def exercise_6(answer: Any) -> None:
    """Find the bug: a second round of pruning."""
    for seed, fraction in ((71, 0.5), (72, 0.25), (73, 0.1)):
        weight = _weights(seed, 8, 10)
        first = _magnitude_mask(_weights(seed + 10, 8, 10), 0.4)  # pruned weights may keep their old size below a mask
        for on, mask in {"a first round": torch.ones_like(first), "a later round": first}.items():
            on = f"{on}, fraction {fraction:g}"
            found = _mask(call(answer, weight, mask, fraction, on=on), weight, on)
            if torch.equal(found, _prune_again(weight, mask, fraction)):
                continue
            if not mask.all():
                _recognise(found, (weight, mask, fraction), _ROUND_MISTAKES, on)
            raise Wrong(
                f"your mask keeps {int(found.sum())} weights, and not those that it should (on {on})",
                ["Of those that are left, which go? How many is that?"],
            )
    inputs = _weights(71, 8, 10), _magnitude_mask(_weights(81, 8, 10), 0.4), 0.5
    expect_unchanged(answer, *inputs, on="a later round", hint="mask.clone() leaves the caller's mask alone.")


def _prune_again(weight: Tensor, mask: Tensor, fraction: float) -> Tensor:
    left = int(mask.sum())
    return _top(weight.abs().masked_fill(~mask, -1), left - round(fraction * left))


_ROUND_MISTAKES: list[Mistake] = [
    (
        lambda weight, mask, fraction: mask & _magnitude_mask(weight, fraction),
        "too few weights go: weights that were pruned before are chosen again, and counted",
        ["Print how many of the chosen ones were there before.", "Those that are gone must not take part."],
    ),
    (
        lambda weight, mask, fraction: mask & _top(weight.abs(), mask.numel() - round(fraction * int(mask.sum()))),
        "the number is right now, but some of the chosen ones were gone before",
        ["masked_fill can put those that are gone out of reach."],
    ),
    (
        lambda weight, mask, fraction: _top(
            weight.abs().masked_fill(~mask, -1), max(int(mask.sum()) - round(fraction * mask.numel()), 0)
        ),
        "the fraction is taken of all weights, not of those that are left",
        ["A half, and then a half of what is left: how many are there after two rounds?"],
    ),
    (
        lambda weight, mask, fraction: _magnitude_mask(weight, fraction),
        "weights that were pruned before come back",
        ["True only where the old mask is true as well."],
    ),
]

LARGEST_EPOCHS, SMALLEST_ACCURACY, HIDDEN_SEEDS = 5, 0.745, (101, 102, 103, 104)


def exercise_7(answer: Any) -> None:
    """Design a pruning: 0.745 with one weight in twenty, five epochs later."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 3 or not isinstance(answer[2], Recipe):
        raise Wrong(
            "wanted are three things: a criterion, a pattern, a recipe",
            "For instance: mine = pruning.snip, pruning.layer_unstructured, tuning",
        )
    criterion, pattern, recipe = answer
    if recipe.epochs > LARGEST_EPOCHS:
        raise Wrong(f"{recipe.epochs} epochs; the budget is {LARGEST_EPOCHS}", "More of the same is not allowed.")
    data, scores = _hidden_data(), []
    for seed in HIDDEN_SEEDS:
        model = copy.deepcopy(_hidden_network(seed))
        try:
            masks = pattern(criterion(model, data.train), 0.95)
            left = sum(int(mask.sum()) for mask in masks.values())
            if left > 0.0501 * sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)):
                raise Wrong(f"{left} weights are left, more than one in twenty", "Does the pattern cover each layer?")
            _masked(model, masks)
            fit(model, data, recipe, seed=seed, progress=False)
        except Wrong:
            raise
        except Exception as error:  # what the learner wrote may fail in any way
            raise Wrong(f"your design raised {type(error).__name__}: {error}") from None
        scores.append(evaluate(model, data.test).accuracy)
    if (mean := sum(scores) / len(scores)) < SMALLEST_ACCURACY:
        raise Wrong(
            f"a mean accuracy of {mean:.3f} over {len(scores)} hidden seeds; wanted is at least {SMALLEST_ACCURACY}",
            ["Which criterion and which pattern did best in sections 5.1 and 5.3? The rest is the recipe.",
             "Five epochs are few: smaller batches make more steps of them, and the last steps should be small."],
        )  # fmt: skip


def _masked(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Weights outside the masks are zero, and stay so."""
    for name, mask in masks.items():
        nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", _Times(mask))


class _Times(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@functools.cache
def _hidden_data() -> Dataset:
    return load("glyphs", classes="digits", size=16, difficulty=0.5, count=12_000, train_size=1000, seed=8)


@functools.cache
def _hidden_network(seed: int) -> nn.Module:
    data, recipe = _hidden_data(), Recipe(epochs=15, batch_size=100, precision="float64", validate_every=100)
    model = fresh(functools.partial(mlp, data.input_shape, len(data.classes), width=64), recipe, seed=seed)
    fit(model, data, recipe, seed=seed, progress=False)
    return model


def _recognise(found: Any, case: tuple[Any, ...], mistakes: Sequence[Mistake], on: str) -> None:
    """Raise `Wrong` with the mistake's own hints if ``found`` is what that mistake gives on ``case``."""
    for mistaken, message, hints in mistakes:
        if close(found, mistaken(*case)):
            raise Wrong(f"{message} (on {on})", hints)


def _weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Exercises 1 and 2: masks


_SHAPE = "One True or False for each weight, in the shape of the weights."


def _mask(found: Any, weight: Tensor, on: str) -> Tensor:
    """``found`` if it can be a mask of ``weight``."""
    if not isinstance(found, Tensor):
        raise Wrong(f"the mask should be a tensor, and is of type {type(found).__name__} (on {on})", _SHAPE)
    if found.shape == weight.shape and found.dtype != torch.bool:
        kept = found != 0
        if close(found[kept], weight[kept]) and not close(found, kept):
            raise Wrong(
                f"your function returns the pruned weights; wanted is the mask (on {on})",
                "True where a weight is kept, False where it is removed.",
            )
        raise Wrong(
            f"the mask should be bool, and is {str(found.dtype).removeprefix('torch.')} (on {on})",
            "A comparison gives True and False, and so does .bool().",
        )
    if found.shape != weight.shape:
        expect_close(found, weight, what="the mask", on=on, hint=_SHAPE)
    return found


def _as_large(mask: Tensor, right: Tensor, weight: Tensor) -> bool:
    """Whether as many weights are kept as in ``right``, and as large ones; which of several equal ones is left open."""
    return torch.equal(weight.abs()[mask].sort().values, weight.abs()[right].sort().values)


def _expect_weight_unchanged(answer: Any, cases: dict[str, Any]) -> None:
    for on, case in cases.items():
        expect_unchanged(
            answer, *case, on=on,
            hint=["The mask only says which weights stay. Which of your lines writes into the weights themselves?",
                  "abs_() and weight[…] = … change the caller's tensor; abs() makes a new one."],
        )  # fmt: skip


def _top(values: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of ``values``."""
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().topk(count).indices] = True
    return mask.view_as(values)


def _magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    return _top(weight.abs(), weight.numel() - round(sparsity * weight.numel()))


def _largest_of_each_row(weight: Tensor, sparsity: float) -> Tensor:
    rows = weight.flatten(1) if weight.dim() > 1 else weight[None]
    return torch.stack([_magnitude_mask(row, sparsity) for row in rows]).view_as(weight)


def _removing(count: Callable[[float], int]) -> Rule:
    """A mask that removes the ``count(sparsity * n)`` smallest magnitudes, at least none and at most all."""

    def mask(weight: Tensor, sparsity: float) -> Tensor:
        n = weight.numel()
        return _top(weight.abs(), n - min(max(count(sparsity * n), 0), n))

    return mask


_NONE_OR_ALL = [
    "What does your function do when no weight is to go, or each one is?",
    "Index -1 is the last entry, not the one before the first.",
]
_TIES = [
    "A threshold cannot tell equal magnitudes apart. What can choose exactly so many of them?",
    "Choose positions rather than values: sorting gives those too.",
]
_COUNT = [
    "sparsity * n is rarely a whole number. Which whole number was asked for?",
    "The nearest one: round() gives it.",
]
_MAGNITUDE_MISTAKES: list[Mistake] = [
    (
        lambda weight, sparsity: ~_magnitude_mask(weight, sparsity),
        "your mask is True where a weight is removed",
        ["weight * mask should be the pruned weight. What does True do in a product?"],
    ),
    (
        lambda weight, sparsity: _top(weight, weight.numel() - round(sparsity * weight.numel())),
        "the smallest values go rather than the smallest magnitudes: every large negative weight is lost",
        ["Which weight matters more to the output, 0.01 or -2?", "Look at the size without the sign."],
    ),
    (
        lambda weight, sparsity: _top(weight.abs(), round(sparsity * weight.numel())),
        "your sparsity is the fraction that is kept",
        ["A sparsity of 0.9 means that nine of ten weights are gone."],
    ),
    (
        lambda weight, sparsity: _top(-weight.abs(), weight.numel() - round(sparsity * weight.numel())),
        "the largest weights go and the smallest stay",
        ["Which weights does the output miss least?"],
    ),
    (
        _largest_of_each_row,
        "each row loses the same share",
        ["All weights compete with each other here. How could the tensor be looked at as one long vector?"],
    ),
    (
        _removing(int),
        "the number of weights to remove is cut off rather than rounded",
        _COUNT,
    ),
    (
        _removing(lambda count: -int(-count // 1)),
        "the number of weights to remove is rounded up",
        _COUNT,
    ),
    (
        _removing(lambda count: round(count) + 1),
        "one weight too many goes",
        ["Does the weight at your threshold stay or go? Which one of the sorted magnitudes is it, counted from 0?"],
    ),
    (
        _removing(lambda count: round(count) - 1),
        "one weight too few goes",
        ["Does the weight at your threshold stay or go? Which one of the sorted magnitudes is it, counted from 0?"],
    ),
    (
        lambda weight, sparsity: weight.abs() > sparsity,
        "the sparsity is used as a threshold for the weights",
        ["Sparsity is a share of the weights, whatever their scale. How many of them is that?"],
    ),
    (
        lambda weight, sparsity: weight.abs() > sparsity * weight.abs().max(),
        "your threshold is a share of the largest weight",
        ["Sparsity is a share of the number of weights. How many of them are below your threshold?"],
    ),
]


def _grouped(weight: Tensor, keep: int = 2) -> Tensor:
    """True at the ``keep`` largest of every four along the last dimension."""
    return torch.stack([_top(group, keep) for group in weight.reshape(-1, 4)]).view_as(weight)


def _two_of_four(weight: Tensor) -> Tensor:
    return _grouped(weight.abs())


def _down_the_columns(weight: Tensor) -> Tensor:
    if len(weight) % 4:
        return torch.zeros_like(weight, dtype=torch.bool)
    return _two_of_four(weight.T.contiguous()).T


def _far_apart(weight: Tensor) -> Tensor:
    """Groups whose members stand a quarter of a row apart."""
    rows, columns = weight.shape
    apart = weight.reshape(rows, 4, columns // 4).transpose(1, 2)
    return _two_of_four(apart.contiguous()).transpose(1, 2).reshape(rows, columns)


def _reordered(weight: Tensor) -> Tensor:
    """Groups made by view(4, -1), in which each group is a column."""
    return _two_of_four(weight.reshape(4, -1).T.contiguous()).T.reshape(weight.shape)


_PATTERN_MISTAKES: list[Mistake] = [
    (
        _down_the_columns,
        "your groups of four go down the columns",
        ["Neighbours in a row share an output. Which dimension runs along a row?"],
    ),
    (
        _far_apart,
        "the four members of your groups stand far apart in a row",
        ["Which index changes fastest in a reshape: the first or the last?", "The 4 belongs last."],
    ),
    (
        _reordered,
        "the four members of your groups come from different rows",
        ["Print torch.arange(24).view(3, 8) after your reshape. Do neighbours share a group?"],
    ),
    (
        lambda weight: torch.stack([_top(row, weight.shape[1] // 2) for row in weight.abs()]),
        "your mask keeps the larger half of each row, wherever it stands",
        ["That is as sparse, but the hardware could not store it: it wants two in every group of four."],
    ),
    (
        lambda weight: _top(weight.abs(), weight.numel() // 2),
        "your mask keeps the larger half of the whole matrix, wherever it stands",
        ["That is as sparse, but the hardware could not store it: it wants two in every group of four."],
    ),
    (
        _grouped,
        "the two largest values stay rather than the two largest magnitudes",
        ["Which weight matters more to the output, 0.01 or -2?", "Look at the size without the sign."],
    ),
    (
        lambda weight: ~_two_of_four(weight),
        "the two smallest of every four stay",
        ["The mask is True where a weight is kept. Which weights should that be?"],
    ),
    (
        lambda weight: _grouped(weight.abs(), 1),
        "one of every four stays",
        ["The pattern is 2:4, half of the weights."],
    ),
    (
        lambda weight: _grouped(weight.abs(), 3),
        "three of every four stay",
        ["The pattern is 2:4, half of the weights. Does the weight at your threshold stay or go?"],
    ),
    (
        lambda weight: (torch.arange(weight.shape[1]) % 4 < 2).expand_as(weight),
        "the first two of every four stay, whatever their size",
        ["Which two does the output miss least? Compare before you choose.",
         "Sorting gives positions within each group: they have to be turned back into places in the mask."],
    ),
]  # fmt: skip


# Exercise 3: the schedule


def _progress(step: int, begin: int, end: int) -> float:
    return min(max((step - begin) / (end - begin), 0.0), 1.0)


def _sparsity_at(step: int, begin: int, end: int, final: float) -> float:
    return final * (1 - (1 - _progress(step, begin, end)) ** 3)


def _shaped(shape: Callable[[float, float], float]) -> Rule:
    """A schedule that is ``shape(progress, final)`` from begin to end."""
    return lambda step, begin, end, final: shape(_progress(step, begin, end), final)


_HELD = [
    "What does your formula give for a step far outside? Try one by hand.",
    "How far the pruning has come is a number from 0 to 1, whatever the step.",
]
_CURVE_MISTAKES: list[Mistake] = [
    (
        _shaped(lambda progress, final: final * progress),
        "your schedule rises in a straight line",
        ["While there are many weights to spare, pruning may go fast; near the end, slowly. What bends the line so?"],
    ),
    (
        _shaped(lambda progress, final: final * progress**3),
        "your schedule starts slowly and ends fast: it is the cube of the progress",
        [
            "It should be the other way round: fast while there are many weights to spare.",
            "What falls with the cube is what is still missing to the end.",
        ],
    ),
    (
        _shaped(lambda progress, final: final * (1 - progress) ** 3),
        "your schedule falls: it is what is still missing to the final sparsity",
        ["It should begin at zero and end at final. What is left when the missing part is taken away?"],
    ),
    (
        _shaped(lambda progress, final: final * (1 - (1 - progress) ** 2)),
        "your schedule is quadratic",
        ["The right bend, and the wrong power: the paper's schedule is cubic."],
    ),
    (
        _shaped(lambda progress, final: 1 - (1 - progress) ** 3),
        "your schedule ends at 1: all weights would be gone",
        ["Where does final enter?"],
    ),
    (
        _shaped(lambda progress, final: 1 - (1 - final * progress) ** 3),
        "final stands inside the cube",
        ["The cube bends the way from 0 to 1. Only then is it scaled."],
    ),
    (
        _shaped(lambda progress, final: final - (1 - progress) ** 3),
        "your schedule begins below zero: the missing part is not scaled",
        ["At begin, nothing is pruned, so all of final is still missing."],
    ),
    (
        _shaped(lambda progress, final: 1 - final * (1 - (1 - progress) ** 3)),
        "your schedule is the fraction that is kept",
        ["Sparsity is the fraction that is gone."],
    ),
    (
        lambda step, begin, end, final: _sparsity_at(step, 0, end, final),
        "the progress is counted from step 0",
        ["How far has the pruning come at step begin? And at step end?"],
    ),
    (
        lambda step, begin, end, final: _sparsity_at(step, begin, begin + end, final),
        "the progress is too small: the schedule does not reach final at step end",
        ["How many steps are there from begin to end?"],
    ),
    (
        _shaped(lambda progress, final: 100 * final * (1 - (1 - progress) ** 3)),
        "this is a percentage",
        ["Wanted is a fraction from 0 to 1."],
    ),
]


def _judge_curve(found: tuple[Any, ...], steps: Sequence[int], begin: int, end: int, final: float, on: str) -> None:
    """A single step may be right by luck, so mistakes are recognised by all steps of the ramp together."""

    def curve(rule: Rule) -> tuple[Any, ...]:
        return tuple(rule(step, begin, end, final) for step in steps)

    right = curve(_sparsity_at)
    if close(found, right):
        return
    ramp = slice(0, sum(begin <= step <= end for step in steps))
    for mistaken, message, hints in _CURVE_MISTAKES:
        if close(found[ramp], curve(mistaken)[ramp]):
            raise Wrong(f"{message} (on {on})", hints)
    hint = ["Work out by hand what it should be at begin, half-way, and at end.", "At half-way, (1/2)**3 is missing."]
    for value, wanted, step in zip(found, right, steps, strict=True):
        if close(value, wanted):
            continue
        if step < begin:
            raise Wrong(f"before begin nothing is pruned yet, and your schedule is not 0 (step {step}, {on})", _HELD)
        if step > end:
            raise Wrong(f"after end your schedule does not stay at final (step {step}, {on})", _HELD)
        expect_close(value, wanted, what="the sparsity", on=f"step {step}, {on}", hint=hint)


# Exercise 4: dead units


def _dead_cases() -> dict[str, Network]:
    def network(seed: int, inputs: int, hidden: int, outputs: int, dead: Sequence[int]) -> Network:
        generator = torch.Generator().manual_seed(seed)
        shapes = ((hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
        w1, b1, w2, b2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        w1[list(dead)] *= 0.0  # leaves -0.0 as well, as a mask does
        return w1, b1, w2, b2

    # As many outputs as hidden units, and rows that are not quite dead: the usual mistakes run, and differ
    w1, b1, w2, b2 = network(81, 4, 6, 6, dead=(1, 4))
    w1[2] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    w1[3, 1] = 0.0
    b1 = torch.tensor([0.0, 0.75, 0.4, -0.6, -0.5, -0.3], dtype=torch.float64)
    return {
        "a network with two dead units": (w1, b1, w2, b2),
        "a network with one output": network(82, 3, 5, 1, dead=(0, 2, 3)),
        "a network without dead units": network(83, 5, 4, 2, dead=()),
        "a network of dead units only": network(84, 2, 3, 4, dead=(0, 1, 2)),
    }


def _alive(w1: Tensor) -> Tensor:
    return (w1 != 0).any(1)


def _outputs(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return (x @ w1.T + b1).relu() @ w2.T + b2


def _keeping(chosen: Callable[[Tensor, Tensor], Tensor], constant: Callable[[Tensor, Tensor, Tensor], Any]) -> Rule:
    """Removal of all but ``chosen(w1, b1)`` units, with ``constant(w2, b1, dead)`` added to ``b2``."""

    def remove(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Network:
        stay = chosen(w1, b1)
        return w1[stay], b1[stay], w2[:, stay], b2 + constant(w2, b1, ~stay)

    return remove


def _constant(w2: Tensor, b1: Tensor, dead: Tensor) -> Tensor:
    return w2[:, dead] @ b1[dead].relu()


_remove_units = _keeping(lambda w1, b1: _alive(w1), _constant)


def _but_constant(constant: Callable[[Tensor, Tensor, Tensor], Any]) -> Rule:
    return _keeping(lambda w1, b1: _alive(w1), constant)


def _but_units(chosen: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    return _keeping(chosen, _constant)


def _wrong_axis(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Network:
    w1_kept, b1_kept, _, b2_new = _remove_units(w1, b1, w2, b2)
    # Where there are fewer outputs than hidden units, the mistake raises an error of its own
    return w1_kept, b1_kept, w2[_alive(w1).nonzero().flatten().clamp(max=len(w2) - 1)], b2_new


def _rows_of_zeros(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Network:
    return w1, b1, w2 * _alive(w1), b2 + _constant(w2, b1, ~_alive(w1))


_ROWS = [
    "A unit is dead when no input reaches it at all. What does its row of w1 look like then?",
    "Ask of each row whether any entry differs from zero.",
]
_DEAD_MISTAKES: list[Mistake] = [
    (
        _but_constant(lambda w2, b1, dead: 0),
        "the dead units are gone, and with them what they added to the outputs",
        [
            "What does a unit compute when its row of w1 is zero? It is not always zero.",
            "Such a unit gives the same number for every input. Where can a constant go?",
        ],
    ),
    (
        _but_constant(lambda w2, b1, dead: w2[:, dead] @ b1[dead]),
        "a dead unit with a negative bias changes your outputs",
        ["What stands between the two layers?"],
    ),
    (
        _but_constant(lambda w2, b1, dead: b1[dead].relu().sum()),
        "what the dead units gave is added to b2 without their weights in w2",
        ["How does a hidden unit reach the outputs?"],
    ),
    (
        _but_constant(lambda w2, b1, dead: -(w2[:, dead] @ b1[dead].relu())),
        "the dead units' constant is taken away from b2",
        ["It was part of the outputs, and should stay a part of them."],
    ),
    (
        _but_constant(lambda w2, b1, dead: w2 @ b1.relu()),
        "the constants of all units are added to b2, also of those that stay",
        ["Those that stay still give their own share."],
    ),
    (
        _but_constant(lambda w2, b1, dead: w2[:, ~dead] @ b1[~dead].relu()),
        "the constants of the wrong units are added to b2",
        ["Those that stay still give their own share. Whose share is lost?"],
    ),
    (
        _but_units(lambda w1, b1: ~_alive(w1)),
        "the dead units stay, and the others go",
        ["True in an index keeps the row."],
    ),
    (
        _but_units(lambda w1, b1: b1 != 0),
        "units are removed by their bias",
        _ROWS,
    ),
    (
        _but_units(lambda w1, b1: b1 > 0),
        "units are removed by the sign of their bias",
        _ROWS,
    ),
    (
        _but_units(lambda w1, b1: _alive(w1) | (b1 > 0)),
        "dead units with a positive bias are left in the network",
        ["They give a constant, and there is a place for constants."],
    ),
    (
        _but_units(lambda w1, b1: w1.sum(1) != 0),
        "units whose weights add up to zero are removed with the dead ones",
        _ROWS,
    ),
    (
        _but_units(lambda w1, b1: (w1 != 0).all(1)),
        "units with a single zero weight are removed with the dead ones",
        _ROWS,
    ),
    (
        _wrong_axis,
        "w2 loses rows: those belong to the outputs",
        ["w2 is [outputs, hidden]. Which of the two dimensions shrinks?"],
    ),
    (
        _rows_of_zeros,
        "the dead units no longer matter, but they are still there",
        ["Zeros take as long to multiply as other numbers. The tensors themselves should become smaller."],
    ),
    (
        lambda w1, b1, w2, b2: (w1, b1, w2, b2),
        "nothing is removed",
        _ROWS,
    ),
]


def _expect_same_function(found: Any, right: Network, case: Network, on: str) -> None:
    if not isinstance(found, (tuple, list)) or len(found) != 4:
        got = f"{len(found)} values" if isinstance(found, (tuple, list)) else "one value"
        raise Wrong(
            f"your function should return 4 values (w1, b1, w2, b2), and returns {got} (on {on})",
            "The smaller network has two layers too, each with weights and biases.",
        )
    for name, part, wanted in zip(("w1", "b1", "w2", "b2"), found, right, strict=True):
        if not isinstance(part, Tensor) or part.shape != wanted.shape or part.dtype != wanted.dtype:
            expect_close(
                part, wanted, what=f"the new {name}", on=on,
                hint=["A hidden unit has a row of w1, an entry of b1 and a column of w2. All three go.", *_ROWS],
            )  # fmt: skip
    # The order of the units is free, so what counts is what the network computes
    x = torch.randn((20, case[0].shape[1]), generator=torch.Generator().manual_seed(89), dtype=torch.float64)
    expect_close(
        _outputs(x, *found), _outputs(x, *case), what="the output of the smaller network", on=on,
        hint=["Which units are gone, and what did each of them add to the outputs?",
              "A unit whose row is zero gives a constant: work it out, and find a place for it."],
    )  # fmt: skip
