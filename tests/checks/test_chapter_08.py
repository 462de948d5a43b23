"""Checks of chapter 8: right answers pass, each usual mistake gets its own hint, stubs are not attempted."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

from course_lib import pruning
from course_lib.checks import chapter_08
from course_lib.lab import Recipe, exercises
from course_lib.lab.exercises import check
from tests.checks import checking

EXERCISES = {
    "08.1": "magnitude_mask",
    "08.2": "two_of_four",
    "08.3": "sparsity_at",
    "08.4": "remove_units",
    "08.6": "prune_again",
}


TUNING = Recipe(epochs=3, batch_size=100, precision="float64", validate_every=100)

pytestmark = pytest.mark.usefixtures("unknown_learner")


# Solutions, as the notebook prints them


def magnitude_mask(weight, sparsity):
    removed = round(sparsity * weight.numel())
    smallest = weight.abs().flatten().argsort()[:removed]
    mask = torch.ones(weight.numel(), dtype=torch.bool)
    mask[smallest] = False
    return mask.view_as(weight)


def two_of_four(weight):
    groups = weight.abs().reshape(-1, 4)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(1, groups.topk(2, dim=1).indices, True)
    return mask.view_as(weight)


def sparsity_at(step, begin, end, final):
    progress = min(max((step - begin) / (end - begin), 0), 1)
    return final * (1 - (1 - progress) ** 3)


def remove_units(w1, b1, w2, b2):
    alive = (w1 != 0).any(dim=1)
    constant = w2[:, ~alive] @ b1[~alive].relu()
    return w1[alive], b1[alive], w2[:, alive], b2 + constant


def prune_again(weight, mask, fraction):
    left = int(mask.sum())
    scores = weight.abs().masked_fill(~mask, float("inf"))
    new = mask.clone()
    new.view(-1)[scores.flatten().topk(round(fraction * left), largest=False).indices] = False
    return new


# The same in other ways


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
        ("08.1", magnitude_mask),
        ("08.1", torch_magnitude_mask),
        ("08.1", ranked_magnitude_mask),
        ("08.2", two_of_four),
        ("08.2", torch_two_of_four),
        ("08.2", two_of_four_in_a_loop),
        ("08.3", sparsity_at),
        ("08.3", sparsity_at_in_branches),
        ("08.4", remove_units),
        ("08.4", remove_units_in_a_loop),
        ("08.5", ("Cleo", "c")),
        ("08.5", ["cleo ", "C)"]),
        ("08.6", prune_again),
        ("08.6", prune_again_in_a_loop),
    ],
)
def test_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


def test_the_hidden_networks_need_every_step():
    """Dead units of either sign, exact zeros of either sign, rows that are nearly dead, and nothing or all dead."""
    cases = chapter_08._dead_cases()
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


def removing(count):
    """A mask that removes the ``count(sparsity * n)`` smallest magnitudes."""
    return lambda weight, sparsity: magnitude_mask(weight, count(sparsity * weight.numel()) / weight.numel())


def signed(weight, sparsity):
    return magnitude_mask(weight - weight.min(), sparsity)


def largest_removed(weight, sparsity):
    return magnitude_mask(1 / weight, sparsity)


def each_row(weight, sparsity):
    return torch.stack([magnitude_mask(row, sparsity) for row in weight])


def any_place(weight, sparsity):
    return (torch.arange(weight.numel()) >= round(sparsity * weight.numel())).view_as(weight)


def made_absolute(weight, sparsity):
    return magnitude_mask(weight.abs_(), sparsity)


def zeroed(weight):
    mask = two_of_four(weight)
    weight[~mask] = 0
    return mask


def keep_of_four(count, by=torch.abs):
    def answer(weight):
        groups = by(weight).reshape(-1, 4)
        return (groups >= groups.topk(count).values[:, -1:]).reshape(weight.shape)

    return answer


def down(weight):
    return two_of_four(weight.T).T


def apart(weight):
    groups = weight.abs().reshape(len(weight), 4, -1)
    return (groups >= groups.topk(2, dim=1).values[:, -1:]).reshape(weight.shape)


def reordered(weight):
    groups = weight.abs().reshape(4, -1)
    return (groups >= groups.topk(2, dim=0).values[-1:]).reshape(weight.shape)


def half_of_rows(weight):
    return weight.abs() >= weight.abs().topk(weight.shape[1] // 2, dim=1).values[:, -1:]


def half_of_all(weight):
    return magnitude_mask(weight, 0.5)


def first_two(weight):
    mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    return mask.view_as(weight)


def unbalanced(weight):
    """Right, but for two groups of equal magnitudes: three stay in one and one in the other."""
    mask = two_of_four(weight)
    if (weight[0].abs() == 1).all():
        mask[0] = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]).bool()
    return mask


def last_two(weight):
    return ~first_two(weight)


def pattern(weight):
    return two_of_four(weight).reshape(-1, 4)


def curve(shape, progress=lambda step, begin, end: (step - begin) / (end - begin), low=0.0, high=1.0):
    """``shape(progress, final)`` with the progress held between ``low`` and ``high``."""

    def answer(step, begin, end, final):
        return shape(min(max(progress(step, begin, end), low), high), final)

    return answer


def cubic(p, final):
    return final * (1 - (1 - p) ** 3)


def remove(stay=lambda w1, b1: w1.abs().sum(1) > 0, constant=lambda w2, b1, dead: w2[:, dead] @ b1[dead].clamp(min=0)):
    def answer(w1, b1, w2, b2):
        chosen = stay(w1, b1)
        return w1[chosen], b1[chosen], w2[:, chosen], b2 + constant(w2, b1, ~chosen)

    return answer


def wrong_axis(w1, b1, w2, b2):
    alive = (w1 != 0).any(1)
    return w1[alive], b1[alive], w2[alive], b2 + w2[:, ~alive] @ b1[~alive].relu()


def masked(w1, b1, w2, b2):
    dead = (w1 == 0).all(1)
    return w1, b1, w2 * ~dead, b2 + w2[:, dead] @ b1[dead].relu()


def b1_forgotten(w1, b1, w2, b2):
    w1_new, _, w2_new, b2_new = remove_units(w1, b1, w2, b2)
    return w1_new, b1, w2_new, b2_new


def folded_in_place(w1, b1, w2, b2):
    w1_new, b1_new, w2_new, b2_new = remove_units(w1, b1, w2, b2)
    return w1_new, b1_new, w2_new, b2.copy_(b2_new)


def as_given(weight, mask, fraction):
    new = mask.clone()
    new.view(-1)[weight.abs().flatten().topk(round(fraction * weight.numel()), largest=False).indices] = False
    return new


def counted_right(weight, mask, fraction):
    new = mask.clone()
    new.view(-1)[weight.abs().flatten().topk(round(fraction * int(mask.sum())), largest=False).indices] = False
    return new


def of_all(weight, mask, fraction):
    return prune_again(weight, mask, min(fraction * weight.numel() / int(mask.sum()), 1))


def revived(weight, mask, fraction):
    return as_given(weight, torch.ones_like(mask), fraction)


def not_the_smallest(weight, mask, fraction):
    return prune_again(1 / weight, mask, fraction)


def in_place_again(weight, mask, fraction):
    return mask.copy_(prune_again(weight, mask, fraction))


MISTAKES = [
    ("08.1", lambda *case: ~magnitude_mask(*case), "True where a weight is removed", r"weight \* mask"),
    ("08.1", signed, "every large negative weight is lost", "matters more"),
    ("08.1", lambda weight, sparsity: magnitude_mask(weight, 1 - sparsity), "fraction that is kept", "nine of ten"),
    ("08.1", largest_removed, "the largest weights go", "miss least"),
    ("08.1", each_row, "each row loses the same share", "one long vector"),
    ("08.1", removing(math.floor), "cut off rather than rounded", "whole number"),
    ("08.1", removing(math.ceil), "rounded up", "whole number"),
    ("08.1", removing(lambda count: round(count) + 1), "one weight too many", "threshold"),
    ("08.1", removing(lambda count: round(count) - 1), "one weight too few", "threshold"),
    ("08.1", lambda weight, sparsity: weight.abs() >= sparsity, "as a threshold", "whatever their scale"),
    ("08.1", lambda weight, sparsity: weight.abs() > sparsity * weight.abs().max(), "share of the largest", "below"),
    ("08.1", at_quantile, r"removes \d+ of 30 weights; 12 were to go .on a matrix with many equal", "apart"),
    ("08.1", with_sort, "removes 5 of 5 weights; 0 were to go", "when no weight is to go"),
    ("08.1", any_place, "larger ones go while smaller ones stay", "its place"),
    ("08.1", lambda *case: magnitude_mask(*case).float(), "should be bool, and is float32", "comparison"),
    ("08.1", lambda weight, sparsity: weight * magnitude_mask(weight, sparsity), "returns the pruned weights", "kept"),
    ("08.1", lambda *case: magnitude_mask(*case).flatten(), r"shape \[4, 5\], and has \[20\]", "each weight"),
    ("08.1", lambda *case: magnitude_mask(*case).tolist(), "should be a tensor, and is of type list", "each weight"),
    ("08.1", made_absolute, "changes its argument weight in place", "only says"),
    ("08.2", down, "down the columns", "share an output"),
    ("08.2", apart, "far apart in a row", "changes fastest"),
    ("08.2", reordered, "from different rows", "Print"),
    ("08.2", half_of_rows, "larger half of each row", "could not store"),
    ("08.2", half_of_all, "larger half of the whole matrix", "could not store"),
    ("08.2", keep_of_four(2, by=lambda weight: weight), "two largest values", "matters more"),
    ("08.2", keep_of_four(2, by=lambda weight: -weight.abs()), "two smallest", "Which weights"),
    ("08.2", keep_of_four(1), "one of every four", "half of the weights"),
    ("08.2", keep_of_four(3), "three of every four", "half of the weights"),
    ("08.2", first_two, "the first two of every four", "Compare"),
    ("08.2", keep_of_four(2), r"keeps 4 of the 4 neighbours from column 0 of row 0; .* equal", "four weights"),
    ("08.2", unbalanced, r"keeps 3 of the 4 neighbours from column 0 of row 0; .* equal", "four weights"),
    ("08.2", last_two, "not always the larger ones", "Within each group"),
    ("08.2", pattern, r"should have shape \[8, 12\], and has \[24, 4\]", "in the shape"),
    ("08.2", lambda weight: two_of_four(weight).int(), "should be bool, and is int32", "comparison"),
    ("08.2", zeroed, "changes its argument weight in place", "only says"),
    ("08.3", curve(lambda p, final: p * final), "straight line", "bends"),
    ("08.3", curve(lambda p, final: p * final, low=-9, high=9), "straight line", "bends"),
    ("08.3", curve(lambda p, final: final * p**3), "cube of the progress", "other way round"),
    ("08.3", curve(lambda p, final: final * (1 - p) ** 3), "your schedule falls", "begin at zero"),
    ("08.3", curve(lambda p, final: final * (1 - (1 - p) ** 2)), "quadratic", "wrong power"),
    ("08.3", curve(lambda p, final: 1 - (1 - p) ** 3), "all weights would be gone", "final"),
    ("08.3", curve(lambda p, final: 1 - (1 - final * p) ** 3), "inside the cube", "scaled"),
    ("08.3", curve(lambda p, final: final - (1 - p) ** 3), "begins below zero", "missing"),
    ("08.3", curve(lambda p, final: 1 - cubic(p, final)), "fraction that is kept", "gone"),
    ("08.3", curve(cubic, lambda step, begin, end: step / end), "counted from step 0", "How far"),
    ("08.3", curve(cubic, lambda step, begin, end: (step - begin) / end), "does not reach final", "How many steps"),
    ("08.3", curve(lambda p, final: 100 * cubic(p, final)), "percentage", "0 to 1"),
    ("08.3", curve(cubic, low=-math.inf, high=math.inf), "before begin", "far outside"),
    ("08.3", curve(cubic, low=-math.inf), "before begin", "far outside"),
    ("08.3", curve(cubic, high=math.inf), "after end", "far outside"),
    ("08.3", lambda step, *rest: sparsity_at(step, *rest) * (step <= rest[1]), "after end", "far outside"),
    ("08.3", curve(lambda p, final: final * p**0.5), "the sparsity is not right", "by hand"),
    ("08.4", remove(constant=lambda *_: 0), "what they added to the outputs", "not always zero"),
    ("08.4", remove(constant=lambda w2, b1, dead: w2[:, dead] @ b1[dead]), "negative bias", "between the two layers"),
    ("08.4", remove(constant=lambda w2, b1, dead: b1[dead].relu().sum()), "without their weights", "reach the outputs"),
    ("08.4", remove(constant=lambda w2, b1, dead: -w2[:, dead] @ b1[dead].relu()), "taken away", "part of"),
    ("08.4", remove(constant=lambda w2, b1, dead: w2 @ b1.relu()), "constants of all units", "own share"),
    ("08.4", remove(constant=lambda w2, b1, dead: w2[:, ~dead] @ b1[~dead].relu()), "of the wrong units", "own share"),
    ("08.4", remove(stay=lambda w1, b1: (w1 == 0).all(1)), "the others go", "keeps the row"),
    ("08.4", remove(stay=lambda w1, b1: b1 != 0), "removed by their bias", "no input reaches"),
    ("08.4", remove(stay=lambda w1, b1: b1 > 0), "sign of their bias", "no input reaches"),
    ("08.4", remove(stay=lambda w1, b1: (w1 != 0).any(1) | (b1 > 0)), "left in the network", "a place for"),
    ("08.4", remove(stay=lambda w1, b1: w1.sum(1) != 0), "add up to zero", "no input reaches"),
    ("08.4", remove(stay=lambda w1, b1: (w1 != 0).all(1)), "a single zero weight", "no input reaches"),
    ("08.4", wrong_axis, "w2 loses rows", "Which of the two"),
    ("08.4", masked, "still there", "as long to multiply"),
    ("08.4", lambda *case: case, "nothing is removed", "no input reaches"),
    ("08.4", b1_forgotten, r"the new b1 should have shape \[4\], and has \[6\]", "All three go"),
    ("08.4", lambda *case: remove_units(*case)[:3], "should return 4 values .* and returns 3 values", "two layers"),
    ("08.4", lambda *case: remove_units(*case)[0], "and returns one value", "two layers"),
    ("08.4", lambda *case: (*remove_units(*case)[:3], 0 * case[3]), "output of the smaller network", "Which units"),
    ("08.5", ("Ada", "c"), "90% zeros saved no time", "Which dense network"),
    ("08.5", ("Ben", "c"), "is better still", "Which dense network"),
    ("08.5", ("Dan", "c"), "cannot tell", "Which dense network"),
    ("08.5", ("Cleo", "a"), "the reason is not: most accurate", "compared with"),
    ("08.5", ("Cleo", "b"), "the reason is not: how many", "compared with"),
    ("08.5", ("Cleo", "d"), "the reason is not: losing little", "compared with"),
    ("08.5", ("Eve", "c"), "there is no 'Eve'", "Four names"),
    ("08.5", "Cleo", "a name and the letter", "For instance"),
    ("08.6", as_given, "are chosen again, and counted", "how many of the chosen"),
    ("08.6", counted_right, "the number is right now", "out of reach"),
    ("08.6", of_all, "taken of all weights", "after two rounds"),
    ("08.6", revived, "come back", "old mask"),
    ("08.6", not_the_smallest, "not those that it should", "Of those that are left"),
    ("08.6", in_place_again, "changes its argument mask in place", "clone"),
    ("08.7", Recipe(epochs=2), "three things", "For instance"),
    ("08.7", (pruning.magnitude, pruning.global_unstructured, replace(TUNING, epochs=6)), "6 epochs", "the same"),
    ("08.7", (pruning.magnitude, pruning.global_unstructured, TUNING), "mean accuracy of 0.7", "Which criterion"),
    ("08.7", (pruning.snip, pruning.layer_unstructured, TUNING), "mean accuracy of 0.", "Which criterion"),
    ("08.7", (pruning.magnitude, lambda s, _: pruning.global_unstructured(s, 0.9), TUNING), "are left", "Does"),
    ("08.4", folded_in_place, "changes its argument b2 in place", "writes into"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_each_usual_mistake_gets_its_own_hint(exercise, answer, message, hint, monkeypatch):
    monkeypatch.setattr(exercises, "_hints_given", {})
    checking.assert_hinted(exercise, answer, message, hint)


LISTS = {
    "08.1": chapter_08._MAGNITUDE_MISTAKES,
    "08.2": chapter_08._PATTERN_MISTAKES,
    "08.3": chapter_08._CURVE_MISTAKES,
    "08.4": chapter_08._DEAD_MISTAKES,
    "08.6": chapter_08._ROUND_MISTAKES,
}


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_mistake_that_is_listed_is_made_above(exercise):
    checking.assert_all_made(LISTS[exercise], exercise, MISTAKES)


def test_no_two_mistakes_look_alike_on_the_first_hidden_input():
    weight = chapter_08._weights(51, 4, 5)
    network = chapter_08._dead_cases()["a network with two dead units"]

    def whole_ramp(rule):
        return tuple(rule(step, 10, 50, 0.9) for step in range(10, 51, 5))

    # sparsity * n is whole there, so that only later inputs tell cutting off and rounding up from rounding
    masks = [rule for rule, _, hints in LISTS["08.1"] if hints is not chapter_08._COUNT]
    results = [
        [rule(weight, 0.3) for rule in [chapter_08._magnitude_mask, *masks]],
        [rule(chapter_08._weights(61, 8, 12)) for rule, *_ in [(chapter_08._two_of_four,), *LISTS["08.2"]]],
        [whole_ramp(rule) for rule, *_ in [(chapter_08._sparsity_at,), *LISTS["08.3"]]],
        [rule(*network) for rule, *_ in [(chapter_08._remove_units,), *LISTS["08.4"]]],
    ]
    for of_one_exercise in results:
        checking.assert_no_two_alike(of_one_exercise)


@pytest.mark.parametrize("exercise", EXERCISES)
@pytest.mark.parametrize("answer", checking.STUBS)
def test_stubs_are_not_attempted(exercise, answer):
    checking.assert_not_attempted(exercise, answer)


@pytest.mark.parametrize("exercise", EXERCISES)
@pytest.mark.parametrize("answer", checking.USELESS)
def test_any_other_answer_is_told_what_is_wrong(exercise, answer):
    checking.assert_told_what_is_wrong(exercise, answer)


def printed():
    names = {"torch": torch, "pruning": pruning, "replace": replace, "tuning": TUNING}
    return checking.printed_solutions("08_pruning.ipynb", **names)


@pytest.mark.parametrize(("exercise", "name"), EXERCISES.items())
def test_the_printed_solutions_pass(exercise, name):
    found = check(exercise, printed()[name])
    assert found.state == "passed", found


def test_the_printed_reading_and_design_pass():
    solutions = printed()
    assert check("08.5", (solutions["name"], solutions["reason"])).state == "passed"
    found = check("08.7", solutions["mine"])
    assert found.state == "passed", found


@pytest.mark.parametrize(("exercise", "answer"), [("08.5", (..., ...)), ("08.5", ("Cleo", ...)), ("08.7", ...)])
def test_dots_are_not_attempted(exercise, answer):
    checking.assert_not_attempted(exercise, answer)


@pytest.mark.parametrize("exercise", ["08.5", "08.7"])
@pytest.mark.parametrize("answer", checking.USELESS)
def test_useless_designs_and_readings_are_told_what_is_wrong(exercise, answer):
    checking.assert_told_what_is_wrong(exercise, answer)
