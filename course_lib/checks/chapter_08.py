"""Checks of chapter 8, pruning: masks, a schedule, the removal of dead units, a figure to read, a bug, a design.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports. Where equal magnitudes leave a choice, a mask is judged by how
many weights it keeps and how large they are.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.lab.data import Dataset, load
from course_lib.lab.judging import (
    Design,
    Method,
    Mistake,
    OpenProject,
    Reading,
    Rule,
    Wrong,
    close,
    expect_close,
    parts_of,
)
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh

# What the masks of exercises 1, 2 and 6 share


def _weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _top(values: Tensor, count: int) -> Tensor:
    """True at the ``count`` largest of ``values``."""
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.flatten().topk(count).indices] = True
    return mask.view_as(values)


def _masked_by(rule: Rule, weight: Tensor, *rest: Any) -> Tensor:
    """The mask that a rule gives, if it can be one of ``weight``."""
    found = rule(weight, *rest)
    shape = "One True or False for each weight, in the shape of the weights."
    if not isinstance(found, Tensor):
        raise Wrong(f"the mask should be a tensor, and is of type {type(found).__name__}", shape)
    if found.shape != weight.shape:
        expect_close(found, weight, what="the mask", hint=shape)
    kept = found != 0
    if found.dtype != torch.bool and close(found[kept], weight[kept]) and not close(found, kept):
        raise Wrong("your function returns the pruned weights; what is wanted is the mask",
                    "True where a weight is kept, False where it is removed.")  # fmt: skip
    if found.dtype != torch.bool:
        raise Wrong(f"the mask should be bool, and is {str(found.dtype).removeprefix('torch.')}",
                    "A comparison gives True and False, and so does .bool().")  # fmt: skip
    return found


def _as_large(mask: Tensor, right: Tensor, weight: Tensor, *rest: Any) -> bool:
    """Whether as many weights are kept as in ``right``, and as large ones; which of several equal ones is left open."""
    return torch.equal(weight.abs()[mask].sort().values, weight.abs()[right].sort().values)


_ONLY_SAYS = [
    "The mask only says which weights stay. Which of your lines writes into the weights themselves?",
    "abs_() and weight[…] = … change the caller's tensor; abs() makes a new one.",
]
_MAGNITUDE = ["Which weight matters more to the output, 0.01 or -2?", "Look at the size without the sign."]


# Exercise 1: magnitude


def _magnitude_mask(
    weight: Tensor, sparsity: float, *, by: Callable[[Tensor], Tensor] = torch.abs,
    whole: Callable[[float], int] = round,
) -> Tensor:  # fmt: skip
    """Removes the ``whole(sparsity * n)`` weights of smallest ``by``; by the magnitude, and rounded, it is right."""
    return _top(by(weight), weight.numel() - whole(sparsity * weight.numel()))


def _each_row(weight: Tensor, sparsity: float) -> Tensor:
    return torch.stack([_magnitude_mask(row, sparsity) for row in weight])


def _wrong_count(found: Tensor, right: Tensor, weight: Tensor, sparsity: float) -> None:
    removed, wanted = int((~found).sum()), int((~right).sum())
    if removed == wanted:
        raise Wrong("the number of weights removed is right, but larger ones go while smaller ones stay",
                    "How large a weight is has nothing to do with its sign, its row or its place.")  # fmt: skip
    none_or_all = ["What does your function do when no weight is to go, or each one is?",
                   "Index -1 is the last entry, not the one before the first."]  # fmt: skip
    ties = ["A threshold cannot tell equal magnitudes apart. What can choose exactly so many of them?",
            "Choose positions rather than values: sorting gives those too."]  # fmt: skip
    raise Wrong(
        f"your mask removes {removed} of {weight.numel()} weights; {wanted} were to go",
        none_or_all if wanted in (0, weight.numel()) else ties,
    )


_COUNT = [
    "sparsity * n is rarely a whole number. Which whole number was asked for?",
    "The nearest one: round() gives it.",
]
_THRESHOLD = "Does the weight at your threshold stay or go? Which one of the sorted magnitudes is it, counted from 0?"

exercise_1 = Method(
    "A mask that removes the smallest weights",
    right=_magnitude_mask,
    ask=_masked_by,
    agree=_as_large,
    explain=_wrong_count,
    unchanged=_ONLY_SAYS,
    cases={
        "a matrix, sparsity 0.3": (_weights(51, 4, 5), 0.3),
        "a matrix, sparsity 0.33": (_weights(58, 4, 5), 0.33),
        "a kernel of a convolution, sparsity 0.7": (_weights(52, 3, 2, 2, 2), 0.7),
        "a vector, sparsity 0.36": (_weights(53, 12), 0.36),
        "a vector, sparsity 0": (_weights(54, 5), 0.0),
        "a vector, sparsity 1": (_weights(55, 5), 1.0),
        "a matrix with many equal magnitudes, sparsity 0.4": (_weights(56, 5, 6).mul(2).round(), 0.4),
        "a matrix of which half is zero already, sparsity 0.25": (_weights(57, 4, 8).relu(), 0.25),
    },
    mistakes=[
        Mistake(lambda *case: ~_magnitude_mask(*case), "your mask is True where a weight is removed",
                "weight * mask should be the pruned weight. What does True do in a product?"),
        Mistake(partial(_magnitude_mask, by=lambda weight: weight),
                "the smallest values go rather than the smallest magnitudes: every large negative weight is lost",
                _MAGNITUDE),
        Mistake(lambda weight, sparsity: _magnitude_mask(weight, 1 - sparsity),
                "your sparsity is the fraction that is kept",
                "A sparsity of 0.9 means that nine of ten weights are gone."),
        Mistake(partial(_magnitude_mask, by=lambda weight: -weight.abs()),
                "the largest weights go and the smallest stay", "Which weights does the output miss least?"),
        Mistake(_each_row, "each row loses the same share",
                "All weights compete with each other here. How could the tensor be looked at as one long vector?"),
        Mistake(partial(_magnitude_mask, whole=int),
                "the number of weights to remove is cut off rather than rounded", _COUNT),
        Mistake(partial(_magnitude_mask, whole=math.ceil), "the number of weights to remove is rounded up", _COUNT),
        Mistake(partial(_magnitude_mask, whole=lambda count: round(count) + 1), "one weight too many goes", _THRESHOLD),
        Mistake(partial(_magnitude_mask, whole=lambda count: round(count) - 1), "one weight too few goes", _THRESHOLD),
        Mistake(lambda weight, sparsity: weight.abs() > sparsity,
                "the sparsity is used as a threshold for the weights",
                "Sparsity is a share of the weights, whatever their scale. How many of them is that?"),
        Mistake(lambda weight, sparsity: weight.abs() > sparsity * weight.abs().max(),
                "your threshold is a share of the largest weight",
                "Sparsity is a share of the number of weights. How many of them are below your threshold?"),
    ],
)  # fmt: skip


# Exercise 2: the 2:4 pattern


def _grouped(weight: Tensor, keep: int = 2, *, by: Callable[[Tensor], Tensor] = torch.abs) -> Tensor:
    """True at the ``keep`` largest of every four along the last dimension."""
    return torch.stack([_top(by(group), keep) for group in weight.reshape(-1, 4)]).view_as(weight)


def _far_apart(weight: Tensor) -> Tensor:
    """Groups whose members stand a quarter of a row apart."""
    rows, columns = weight.shape
    apart = weight.reshape(rows, 4, columns // 4).transpose(1, 2)
    return _grouped(apart.contiguous()).transpose(1, 2).reshape(rows, columns)


def _reordered(weight: Tensor) -> Tensor:
    """Groups made by view(4, -1), in which each group is a column."""
    return _grouped(weight.reshape(4, -1).T.contiguous()).T.reshape(weight.shape)


def _two_in_each(found: Tensor, right: Tensor, weight: Tensor) -> bool:
    return bool((found.reshape(-1, 4).sum(1) == 2).all()) and _as_large(found, right, weight)


def _first_wrong_group(found: Tensor, right: Tensor, weight: Tensor) -> None:
    kept = found.reshape(-1, 4).sum(1)
    if (kept == 2).all():
        raise Wrong("2 of every 4 neighbours stay, but not always the larger ones",
                    "Within each group, compare magnitudes. Does each result go back to the place it came from?"
                    )  # fmt: skip
    group = int((kept != 2).nonzero()[0])
    row, column = divmod(4 * group, weight.shape[1])
    raise Wrong(f"your mask keeps {kept[group]} of the 4 neighbours from column {column} of row {row}; 2 of every 4 "
                f"should stay",
                ["Which four weights belong together? Reshaping can give each such group a row of its own.",
                 "A threshold cannot tell equal magnitudes apart; positions can."])  # fmt: skip


_NOT_STORED = "That is as sparse, but the hardware could not store it: it wants two in every group of four."

exercise_2 = Method(
    "The 2:4 pattern",
    right=_grouped,
    ask=_masked_by,
    agree=_two_in_each,
    explain=_first_wrong_group,
    unchanged=_ONLY_SAYS,
    cases={
        "a matrix of 8 by 12": (_weights(61, 8, 12),),
        "a matrix of 3 by 8": (_weights(62, 3, 8),),
        "a matrix of 2 by 4": (_weights(63, 2, 4),),
        "a matrix with equal magnitudes": (
            torch.tensor([[1.0, -1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0], [0.5, 0.5, -3.0, 0.5, -2.0, 2.0, 2.0, -2.0]]),
        ),
    },
    mistakes=[
        Mistake(lambda weight: _grouped(weight.T.contiguous()).T, "your groups of four go down the columns",
                "Neighbours in a row share an output. Which dimension runs along a row?"),
        Mistake(_far_apart, "the four members of your groups stand far apart in a row",
                ["Which index changes fastest in a reshape: the first or the last?", "The 4 belongs last."]),
        Mistake(_reordered, "the four members of your groups come from different rows",
                "Print torch.arange(24).view(3, 8) after your reshape. Do neighbours share a group?"),
        Mistake(lambda weight: torch.stack([_top(row, len(row) // 2) for row in weight.abs()]),
                "your mask keeps the larger half of each row, wherever it stands", _NOT_STORED),
        Mistake(lambda weight: _magnitude_mask(weight, 0.5),
                "your mask keeps the larger half of the whole matrix, wherever it stands", _NOT_STORED),
        Mistake(partial(_grouped, by=lambda group: group),
                "the two largest values stay rather than the two largest magnitudes", _MAGNITUDE),
        Mistake(lambda weight: ~_grouped(weight), "the two smallest of every four stay",
                "The mask is True where a weight is kept. Which weights should that be?"),
        Mistake(lambda weight: _grouped(weight, 1), "one of every four stays",
                "The pattern is 2:4, half of the weights."),
        Mistake(lambda weight: _grouped(weight, 3), "three of every four stay",
                "The pattern is 2:4, half of the weights. Does the weight at your threshold stay or go?"),
        Mistake(lambda weight: (torch.arange(weight.shape[1]) % 4 < 2).expand_as(weight),
                "the first two of every four stay, whatever their size",
                ["Which two does the output miss least? Compare before you choose.",
                 "Sorting gives positions within each group: they have to be turned back into places in the mask."]),
    ],
)  # fmt: skip


# Exercise 3: the schedule


def _cubic(progress: float, final: float) -> float:
    return final * (1 - (1 - progress) ** 3)


def _schedule(
    step: int, begin: int, end: int, final: float, *,
    shape: Callable[[float, float], float] = _cubic,
    through: Callable[[int, int, int], float] = lambda step, begin, end: (step - begin) / (end - begin),
) -> float:  # fmt: skip
    """``shape(progress, final)``, which is cubic; ``through(step, begin, end)`` is how far the pruning has come."""
    return shape(min(max(through(step, begin, end), 0.0), 1.0), final)


def _curve(rule: Rule, steps: Sequence[int], begin: int, end: int, final: float) -> tuple[Any, ...]:
    """A single step may be right by luck, so mistakes are recognised by all steps of a ramp together."""
    return tuple(rule(step, begin, end, final) for step in steps)


def _schedule_cases() -> dict[str, tuple[Any, ...]]:
    """For each schedule first its ramp, and then what is outside of it."""
    cases: dict[str, tuple[Any, ...]] = {}
    for begin, end, final in ((10, 50, 0.9), (0, 8, 0.5), (100, 1100, 0.95)):
        length, on = end - begin, f"begin {begin}, end {end}, final {final:g}"
        before = [step for step in (0, begin // 2, begin - 1) if 0 <= step < begin]
        cases[on] = [begin + length * eighth // 8 for eighth in range(9)], begin, end, final
        cases[f"steps outside of {on}"] = [*before, end + 1, end + length // 2, 3 * end], begin, end, final
    return cases


def _first_wrong_step(
    found: Sequence[Any], right: Sequence[float], steps: Sequence[int], begin: int, end: int, final: float
) -> None:
    step, value, wanted = next(wrong for wrong in zip(steps, found, right, strict=True) if not close(*wrong[1:]))
    held = ["What does your formula give for a step far outside? Try one by hand.",
            "How far the pruning has come is a number from 0 to 1, whatever the step."]  # fmt: skip
    if step < begin:
        raise Wrong(f"before begin nothing is pruned yet, and your schedule is not 0 at step {step}", held)
    if step > end:
        raise Wrong(f"after end your schedule does not stay at final, at step {step}", held)
    expect_close(
        value, wanted, what=f"the sparsity at step {step}",
        hint=["Work out by hand what it should be at begin, half-way, and at end.",
              "At half-way, (1/2)**3 is missing."],
    )  # fmt: skip


exercise_3 = Method(
    "The cubic schedule of gradual pruning",
    right=_schedule,
    ask=_curve,
    explain=_first_wrong_step,
    cases=_schedule_cases(),
    mistakes=[
        Mistake(partial(_schedule, shape=lambda progress, final: final * progress),
                "your schedule rises in a straight line",
                "While there are many weights to spare, pruning may go fast; near the end, slowly. What bends the line "
                "so?"),
        Mistake(partial(_schedule, shape=lambda progress, final: final * progress**3),
                "your schedule starts slowly and ends fast: it is the cube of the progress",
                ["It should be the other way round: fast while there are many weights to spare.",
                 "What falls with the cube is what is still missing to the end."]),
        Mistake(partial(_schedule, shape=lambda progress, final: final * (1 - progress) ** 3),
                "your schedule falls: it is what is still missing to the final sparsity",
                "It should begin at zero and end at final. What is left when the missing part is taken away?"),
        Mistake(partial(_schedule, shape=lambda progress, final: final * (1 - (1 - progress) ** 2)),
                "your schedule is quadratic", "The right bend, and the wrong power: the paper's schedule is cubic."),
        Mistake(partial(_schedule, shape=lambda progress, final: _cubic(progress, 1)),
                "your schedule ends at 1: all weights would be gone", "Where does final enter?"),
        Mistake(partial(_schedule, shape=lambda progress, final: _cubic(final * progress, 1)),
                "final stands inside the cube", "The cube bends the way from 0 to 1. Only then is it scaled."),
        Mistake(partial(_schedule, shape=lambda progress, final: final - (1 - progress) ** 3),
                "your schedule begins below zero: the missing part is not scaled",
                "At begin, nothing is pruned, so all of final is still missing."),
        Mistake(partial(_schedule, shape=lambda progress, final: 1 - _cubic(progress, final)),
                "your schedule is the fraction that is kept", "Sparsity is the fraction that is gone."),
        Mistake(partial(_schedule, through=lambda step, begin, end: step / end),
                "the progress is counted from step 0",
                "How far has the pruning come at step begin? And at step end?"),
        Mistake(partial(_schedule, through=lambda step, begin, end: (step - begin) / end),
                "the progress is too small: the schedule does not reach final at step end",
                "How many steps are there from begin to end?"),
        Mistake(partial(_schedule, shape=lambda progress, final: 100 * _cubic(progress, final)),
                "this is a percentage", "What is wanted is a fraction from 0 to 1."),
    ],
)  # fmt: skip


# Exercise 4: dead units

Network = tuple[Tensor, Tensor, Tensor, Tensor]  # w1 [hidden, inputs], b1, w2 [outputs, hidden], b2


def _network(seed: int, inputs: int, hidden: int, outputs: int, dead: Sequence[int]) -> Network:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((hidden, inputs), (hidden,), (outputs, hidden), (outputs,))
    w1, b1, w2, b2 = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    w1[list(dead)] *= 0.0  # leaves -0.0 as well, as a mask does
    return w1, b1, w2, b2


def _telling_network() -> Network:
    """As many outputs as hidden units, and rows that are not quite dead: the usual mistakes run, and differ."""
    w1, _, w2, b2 = _network(81, 4, 6, 6, dead=(1, 4))
    w1[2] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    w1[3, 1] = 0.0
    return w1, torch.tensor([0.0, 0.75, 0.4, -0.6, -0.5, -0.3], dtype=torch.float64), w2, b2


def _remove_units(
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *,
    stay: Callable[[Tensor, Tensor], Tensor] = lambda w1, b1: (w1 != 0).any(1),
    constant: Callable[[Tensor, Tensor, Tensor], Any] = lambda w2, b1, dead: w2[:, dead] @ b1[dead].relu(),
) -> Network:  # fmt: skip
    """Removal of all but ``stay(w1, b1)`` units, with ``constant(w2, b1, dead)`` added to ``b2``."""
    kept = stay(w1, b1)
    return w1[kept], b1[kept], w2[:, kept], b2 + constant(w2, b1, ~kept)


def _rows_of_w2(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Network:
    w1_kept, b1_kept, _, b2_new = _remove_units(w1, b1, w2, b2)
    # Where there are fewer outputs than hidden units, the mistake raises an error of its own
    return w1_kept, b1_kept, w2[(w1 != 0).any(1)], b2_new


def _zeroed(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Network:
    return w1, b1, w2 * (w1 != 0).any(1), _remove_units(w1, b1, w2, b2)[3]


def _in_order(rule: Rule, *case: Tensor) -> Any:
    """The network that a rule gives, its units in the order of their biases: which order they have is free."""
    found = rule(*case)
    sizes = [tuple(getattr(part, "shape", ())) for part in found] if isinstance(found, (tuple, list)) else []
    if len(sizes) != 4 or not sizes[1] or not sizes[0][:1] == sizes[1] == sizes[2][1:]:
        return found
    w1, b1, w2, b2 = found
    order = b1.argsort()
    return w1[order], b1[order], w2[:, order], b2


def _shapes_first(found: Any, right: Network, *case: Tensor) -> None:
    parts = parts_of(found, _PARTS, "The smaller network has two layers too, each with weights and biases.")
    for name, part, wanted in zip(_PARTS, parts, right, strict=True):
        if getattr(part, "shape", ()) != wanted.shape:
            all_three = "A hidden unit has a row of w1, an entry of b1 and a column of w2. All three go."
            expect_close(part, wanted, what=name, hint=[all_three, *_ROWS])


_PARTS = ("the new w1", "the new b1", "the new w2", "the new b2")
_ROWS = [
    "A unit is dead when no input reaches it at all. What does its row of w1 look like then?",
    "Ask of each row whether any entry differs from zero.",
]

exercise_4 = Method(
    "Remove dead units, and change nothing",
    right=_remove_units,
    ask=_in_order,
    explain=_shapes_first,
    what=_PARTS,
    hint=["Which units are gone, and what did each of them add to the outputs?",
          "A unit whose row is zero gives a constant: work it out, and find a place for it."],
    cases={
        "a network with two dead units": _telling_network(),
        "a network with one output": _network(82, 3, 5, 1, dead=(0, 2, 3)),
        "a network without dead units": _network(83, 5, 4, 2, dead=()),
        "a network of dead units only": _network(84, 2, 3, 4, dead=(0, 1, 2)),
    },
    mistakes=[
        Mistake(partial(_remove_units, constant=lambda w2, b1, dead: 0),
                "the dead units are gone, and with them what they added to the outputs",
                ["What does a unit compute when its row of w1 is zero? It is not always zero.",
                 "Such a unit gives the same number for every input. Where can a constant go?"]),
        Mistake(partial(_remove_units, constant=lambda w2, b1, dead: w2[:, dead] @ b1[dead]),
                "a dead unit with a negative bias changes your outputs", "What stands between the two layers?"),
        Mistake(partial(_remove_units, constant=lambda w2, b1, dead: b1[dead].relu().sum()),
                "what the dead units gave is added to b2 without their weights in w2",
                "How does a hidden unit reach the outputs?"),
        Mistake(partial(_remove_units, constant=lambda w2, b1, dead: -(w2[:, dead] @ b1[dead].relu())),
                "the dead units' constant is taken away from b2",
                "It was part of the outputs, and should stay a part of them."),
        Mistake(partial(_remove_units, constant=lambda w2, b1, dead: w2 @ b1.relu()),
                "the constants of all units are added to b2, also of those that stay",
                "Those that stay still give their own share."),
        Mistake(partial(_remove_units, constant=lambda w2, b1, dead: w2[:, ~dead] @ b1[~dead].relu()),
                "the constants of the wrong units are added to b2",
                "Those that stay still give their own share. Whose share is lost?"),
        Mistake(partial(_remove_units, stay=lambda w1, b1: (w1 == 0).all(1)),
                "the dead units stay, and the others go", "True in an index keeps the row."),
        Mistake(partial(_remove_units, stay=lambda w1, b1: b1 != 0), "units are removed by their bias", _ROWS),
        Mistake(partial(_remove_units, stay=lambda w1, b1: b1 > 0),
                "units are removed by the sign of their bias", _ROWS),
        Mistake(partial(_remove_units, stay=lambda w1, b1: (w1 != 0).any(1) | (b1 > 0)),
                "dead units with a positive bias are left in the network",
                "They give a constant, and there is a place for constants."),
        Mistake(partial(_remove_units, stay=lambda w1, b1: w1.sum(1) != 0),
                "units whose weights add up to zero are removed with the dead ones", _ROWS),
        Mistake(partial(_remove_units, stay=lambda w1, b1: (w1 != 0).all(1)),
                "units with a single zero weight are removed with the dead ones", _ROWS),
        Mistake(_rows_of_w2, "w2 loses rows: those belong to the outputs",
                "w2 is [outputs, hidden]. Which of the two dimensions shrinks?"),
        Mistake(_zeroed, "the dead units no longer matter, but they are still there",
                "Zeros take as long to multiply as other numbers. The tensors themselves should become smaller."),
        Mistake(lambda *case: case, "nothing is removed", _ROWS),
    ],
    unchanged=["Which of your lines writes into a tensor that the caller still needs?",
               "b2 += … changes the caller's tensor; a plain + makes a new one."],
)  # fmt: skip


exercise_5 = Reading(
    "Whose pruning was worth it? A figure to read",
    right=("Cleo", "c"),
    choices={
        "Ada": "Ada's network is the most accurate of all, and as slow as the dense one: 90% zeros saved no time",
        "Ben": "Ben's network is nearly twice as fast, but a small dense network of the same speed, trained for "
        "as many epochs, is more accurate",
        "Cleo": "",
        "Dan": "Dan's two intervals overlap by more than half: his runs cannot tell whether pruning gained anything",
    },
    reasons={
        "a": "most accurate of all is the one that saved no time",
        "b": "how many weights are gone is not what anybody waits for",
        "c": "",
        "d": "losing little against the dense network is nothing if a small network loses less",
    },
    hint="Which dense network would you have trained instead, and how good is that?",
    reason_hint="What is each square compared with?",
)


# Exercise 6: another round


def _prune_again(weight: Tensor, mask: Tensor, fraction: float, *, whole: int | None = None) -> Tensor:
    """``fraction`` of what is left goes; of ``whole`` weights, if that is given."""
    left = int(mask.sum())
    return _top(weight.abs().masked_fill(~mask, -1), max(left - round(fraction * (whole or left)), 0))


def _rounds() -> dict[str, tuple[Tensor, Tensor, float]]:
    cases = {}
    for seed, fraction in ((71, 0.5), (72, 0.25), (73, 0.1)):
        weight = _weights(seed, 8, 10)
        later = _magnitude_mask(_weights(seed + 10, 8, 10), 0.4)  # pruned weights may keep their old size below a mask
        cases[f"a first round, fraction {fraction:g}"] = weight, torch.ones_like(later), fraction
        cases[f"a later round, fraction {fraction:g}"] = weight, later, fraction
    return cases


def _wrong_round(found: Tensor, right: Tensor, *case: Any) -> None:
    raise Wrong(f"your mask keeps {int(found.sum())} weights, and not those that it should",
                "Of those that are left, which go? How many is that?")  # fmt: skip


exercise_6 = Method(
    "Find the bug: a second round of pruning",
    right=_prune_again,
    ask=_masked_by,
    explain=_wrong_round,
    cases=_rounds(),
    mistakes=[
        Mistake(lambda weight, mask, fraction: mask & _magnitude_mask(weight, fraction),
                "too few weights go: weights that were pruned before are chosen again, and counted",
                ["Print how many of the chosen ones were there before.", "Those that are gone must not take part."]),
        Mistake(lambda weight, mask, fraction: mask & _magnitude_mask(weight, fraction * mask.double().mean().item()),
                "the number is right now, but some of the chosen ones were gone before",
                "masked_fill can put those that are gone out of reach."),
        Mistake(lambda weight, mask, fraction: _prune_again(weight, mask, fraction, whole=mask.numel()),
                "the fraction is taken of all weights, not of those that are left",
                "A half, and then a half of what is left: how many are there after two rounds?"),
        Mistake(lambda weight, mask, fraction: _magnitude_mask(weight, fraction),
                "weights that were pruned before come back", "True only where the old mask is true as well."),
    ],
    unchanged="mask.clone() leaves the caller's mask alone.",
)  # fmt: skip


# Exercises 7 and 8

LARGEST_EPOCHS = 5


def _within_the_budget(answer: Any) -> None:
    if not isinstance(answer, (tuple, list)) or len(answer) != 3 or not isinstance(answer[2], Recipe):
        raise Wrong("expected three things: a criterion, a pattern, a recipe",
                    "For instance: mine = pruning.snip, pruning.layer_unstructured, tuning")  # fmt: skip
    if answer[2].epochs > LARGEST_EPOCHS:
        raise Wrong(f"{answer[2].epochs} epochs; the budget is {LARGEST_EPOCHS}",
                    f"Set epochs={LARGEST_EPOCHS} or fewer, and gain elsewhere in the recipe.")  # fmt: skip


def _pruned_accuracy(answer: Any, seed: int) -> float:
    criterion, pattern, recipe = answer
    data, model = _hidden_data(), copy.deepcopy(_hidden_network(seed))
    masks = pattern(criterion(model, data.train), 0.95)
    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    left = sum(
        int(masks[name].count_nonzero()) if name in masks else weight.numel() for name, weight in weights.items()
    )
    if left > 0.0501 * sum(weight.numel() for weight in weights.values()):
        raise Wrong(f"{left} weights are left, more than one in twenty", "Does the pattern cover each layer?")
    for name, mask in masks.items():
        nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", _Times(mask))
    fit(model, data, recipe, seed=seed, progress=False)
    return evaluate(model, data.test).accuracy


class _Times(nn.Module):
    """Weights outside the mask are zero, and stay so."""

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
    model = fresh(partial(mlp, data.input_shape, len(data.classes), width=64), recipe, seed=seed)
    fit(model, data, recipe, seed=seed, progress=False)
    return model


exercise_7 = Design(
    "Design a pruning: 0.745 with one weight in twenty, five epochs later",
    admit=_within_the_budget,
    score=_pruned_accuracy,
    seeds=(101, 102, 103, 104),
    least=0.745,
    hint=["Which criterion and which pattern did best in sections 5.1 and 5.3? The rest is the recipe.",
          "Five epochs are few: smaller batches make more steps of them, and the last steps should be small."],
)  # fmt: skip

exercise_8 = OpenProject(
    "An open project: a network twice as fast, and its rival",
    rubric=["the saving", "the loss", "the rival", "the choice", "honesty"],
)
