"""Checks of chapter 8: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from course_lib import pruning
from course_lib.checks import chapter_08
from course_lib.lab import Recipe
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "08_pruning.ipynb"
TUNING = Recipe(epochs=3, batch_size=100, precision="float64", validate_every=100)

magnitude_mask, two_of_four, sparsity_at, remove_units, prune_again = (
    getattr(chapter_08, f"exercise_{number}").right for number in (1, 2, 3, 4, 6)
)


def torch_magnitude_mask(weight, sparsity):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight)
    prune.l1_unstructured(layer, "weight", amount=round(sparsity * weight.numel()))
    return layer.weight_mask.bool()


def ranked_magnitude_mask(weight, sparsity):
    ranks = weight.abs().flatten().argsort(descending=True).argsort()
    return (ranks < weight.numel() - round(sparsity * weight.numel())).reshape(weight.shape)


def torch_two_of_four(weight):
    model = torch.nn.Sequential(torch.nn.Linear(*weight.T.shape, bias=False))
    model[0].weight.data = weight
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, config=[{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    return model[0].parametrizations.weight[0].mask.bool()


def two_of_four_in_a_loop(weight):
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for row, start in itertools.product(range(weight.shape[0]), range(0, weight.shape[1], 4)):
        group = weight[row, start : start + 4].abs().tolist()
        for place in max(itertools.combinations(range(4), 2), key=lambda pair: sum(group[place] for place in pair)):
            mask[row, start + place] = True
    return mask


def sparsity_at_in_branches(step, begin, end, final, initial=0.0):
    """Equation 1 of Zhu & Gupta (2017) with n Δt = end - begin, held at both ends."""
    if step < begin:
        return initial
    if step > end:
        return torch.tensor(final)
    return final + (initial - final) * math.pow(1 - (step - begin) / (end - begin), 3)


def remove_units_in_a_loop(w1, b1, w2, b2):
    b2 = b2.clone()
    stay = []
    for unit in reversed(range(len(w1))):  # the order of the units is free
        if w1[unit].abs().max() > 0:
            stay.append(unit)
        else:
            b2 += w2[:, unit] * max(b1[unit].item(), 0)
    return [w1[stay], b1[stay], w2[:, stay], b2]


def prune_again_in_a_loop(weight, mask, fraction):
    new = mask.clone()
    there = sorted((abs(weight[place].item()), place) for place in map(tuple, mask.nonzero().tolist()))
    for _, place in there[: round(fraction * len(there))]:
        new[place] = False
    return new


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("08.1", torch_magnitude_mask),
        ("08.1", ranked_magnitude_mask),
        ("08.2", torch_two_of_four),
        ("08.2", two_of_four_in_a_loop),
        ("08.3", sparsity_at_in_branches),
        ("08.4", remove_units_in_a_loop),
        ("08.6", prune_again_in_a_loop),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


def test_the_hidden_networks_need_every_step():
    """Dead units of either sign, exact zeros of either sign, rows that are nearly dead, and nothing or all dead."""
    cases = chapter_08.exercise_4.cases
    w1, b1, w2, _ = cases["a network with two dead units"]
    dead = (w1 == 0).all(1)
    assert dead.sum() == 2
    assert (b1[dead] > 0).any() and (b1[dead] < 0).any()  # noqa: PT018
    assert torch.signbit(w1[dead]).any()
    assert (w1[~dead].sum(1) == 0).any()
    assert (w1[~dead] == 0).any()
    assert w2.shape[0] == w1.shape[0]
    assert sorted(int((w1 == 0).all(1).sum()) for w1, *_ in cases.values()) == [0, 2, 3, 3]


# Usual mistakes


def at_quantile(weight, sparsity):
    """A threshold at the magnitude of the k-th weight: ties go together."""
    removed = round(sparsity * weight.numel())
    if removed == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    return weight.abs() > weight.abs().flatten().kthvalue(removed).values


def with_sort(weight, sparsity):
    """Like the last, but with index -1 where nothing goes."""
    return weight.abs() > weight.abs().flatten().sort().values[round(sparsity * weight.numel()) - 1]


def any_place(weight, sparsity):
    return (torch.arange(weight.numel()) >= round(sparsity * weight.numel())).view_as(weight)


def made_absolute(weight, sparsity):
    return magnitude_mask(weight.abs_(), sparsity)


def zeroed(weight):
    mask = two_of_four(weight)
    weight[~mask] = 0
    return mask


def at_the_second(weight):
    """A threshold at the second of every four: ties go together."""
    groups = weight.abs().reshape(-1, 4)
    return (groups >= groups.topk(2).values[:, -1:]).reshape(weight.shape)


def unbalanced(weight):
    """Right, but for two groups of equal magnitudes: three stay in one and one in the other."""
    mask = two_of_four(weight)
    if (weight[0].abs() == 1).all():
        mask[0] = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]).bool()
    return mask


def first_two(weight):
    return (torch.arange(weight.shape[1]) % 4 < 2).expand_as(weight)


def pattern(weight):
    return two_of_four(weight).reshape(-1, 4)


def b1_forgotten(w1, b1, w2, b2):
    w1_new, _, w2_new, b2_new = remove_units(w1, b1, w2, b2)
    return w1_new, b1, w2_new, b2_new


def curve(shape, low=0.0, high=1.0):
    """``shape(progress, final)`` with the progress held between ``low`` and ``high``."""
    return lambda step, begin, end, final: shape(min(max((step - begin) / (end - begin), low), high), final)


def cubic(p, final):
    return final * (1 - (1 - p) ** 3)


MISTAKES = [
    ("08.1", at_quantile, r"removes \d+ of 30 weights; 12 were to go .on a matrix with many equal", "apart"),
    ("08.1", with_sort, "removes 5 of 5 weights; 0 were to go", "when no weight is to go"),
    ("08.1", any_place, "larger ones go while smaller ones stay", "its place"),
    ("08.1", lambda *case: magnitude_mask(*case).float(), "should be bool, and is float32", "comparison"),
    ("08.1", lambda weight, sparsity: weight * magnitude_mask(weight, sparsity), "returns the pruned weights", "kept"),
    ("08.1", lambda *case: magnitude_mask(*case).flatten(), r"shape \[4, 5\], and has \[20\]", "each weight"),
    ("08.1", lambda *case: magnitude_mask(*case).tolist(), "should be a tensor, and is of type list", "each weight"),
    ("08.1", made_absolute, "changes its argument weight in place", "only says"),
    ("08.2", at_the_second, r"keeps 4 of the 4 neighbours from column 0 of row 0; .* equal", "four weights"),
    ("08.2", unbalanced, r"keeps 3 of the 4 neighbours from column 0 of row 0; .* equal", "four weights"),
    ("08.2", lambda weight: ~first_two(weight), "not always the larger ones", "Within each group"),
    ("08.2", pattern, r"should have shape \[8, 12\], and has \[24, 4\]", "in the shape"),
    ("08.2", lambda weight: two_of_four(weight).int(), "should be bool, and is int32", "comparison"),
    ("08.2", zeroed, "changes its argument weight in place", "only says"),
    ("08.3", curve(lambda p, final: p * final, low=-9, high=9), "straight line", "bends"),
    ("08.3", curve(cubic, low=-math.inf, high=math.inf), "before begin", "far outside"),
    ("08.3", curve(cubic, low=-math.inf), "before begin", "far outside"),
    ("08.3", curve(cubic, high=math.inf), "after end", "far outside"),
    ("08.3", lambda step, *rest: sparsity_at(step, *rest) * (step <= rest[1]), "after end", "far outside"),
    ("08.3", curve(lambda p, final: final * p**0.5), "the sparsity at step 15 is not right", "by hand"),
    ("08.4", b1_forgotten, r"the new b1 should have shape \[4\], and has \[6\]", "All three go"),
    ("08.4", lambda *case: remove_units(*case)[:3], "should return 4 values .* and returns 3 values", "two layers"),
    ("08.4", lambda *case: remove_units(*case)[0], "and returns one value", "two layers"),
    ("08.6", lambda weight, *rest: prune_again(1 / weight, *rest), "not those that it should", "Of those"),
    ("08.7", Recipe(epochs=2), "three things", "For instance"),
    ("08.7", (pruning.magnitude, pruning.global_unstructured, replace(TUNING, epochs=6)), "6 epochs", "epochs=5"),
    ("08.7", (pruning.magnitude, lambda scores, _: {}, TUNING), "are left, more than one in twenty", "each layer"),
    ("08.7", (pruning.magnitude, lambda s, x: {k: 0.02 * torch.ones_like(v) for k, v in s.items()}, TUNING),
     "are left", "each layer"),
    ("08.7", (pruning.magnitude, pruning.global_unstructured, TUNING), "mean accuracy of 0.7", "Which criterion"),
    ("08.7", (pruning.snip, pruning.layer_unstructured, TUNING), "mean accuracy of 0.", "Which criterion"),
    ("08.7", (pruning.magnitude, lambda s, _: pruning.global_unstructured(s, 0.9), TUNING), "are left", "Does"),
    ("08.4", lambda *case: (*remove_units(*case)[:3], 0 * case[3]), "the new b2 is not right", "Which units"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


@pytest.mark.parametrize("exercise", checking.asked(NOTEBOOK))
def test_the_printed_solutions_pass(exercise):
    names = {"torch": torch, "pruning": pruning, "replace": replace, "tuning": TUNING}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names)
