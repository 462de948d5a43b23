"""Checks of chapter 11: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import heapq
import itertools
import math
import re
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from torch import nn

from course_lib import compression as cp
from course_lib.checks import chapter_11
from course_lib.compression import second_order
from course_lib.lab import plotting
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "11_compression.ipynb"
needs_the_notebook = pytest.mark.skipif(not (checking.NOTEBOOKS / NOTEBOOK).exists(), reason="the notebook is to come")

METHODS = {f"11.{number}": getattr(chapter_11, f"exercise_{number}") for number in (1, 2, 3, 4, 6)}
affine, bits_per_weight, integer_linear, huffman_lengths, round_in_order = (m.right for m in METHODS.values())


@pytest.fixture
def impatient(monkeypatch):
    """A loop without end is told sooner."""
    monkeypatch.setattr(chapter_11, "PATIENCE", 300_000)


# Other right answers


def grid_of_the_course(low, high, bits):
    return cp.scale_and_zero(torch.tensor(low).double(), torch.tensor(high).double(), unsigned(bits))


def unsigned(bits):
    return cp.Grid(bits, symmetric=False, signed=False)


def from_the_upper_end(low, high, bits):
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    scale = (high - low) / (2**bits - 1) or np.float64(1)
    return scale, float(np.round(2**bits - 1 - high / scale))


def any_steps_for_nothing(low, high, bits):
    return (0.3, 17) if low == high == 0 else affine(low, high, bits)


def counted_group_by_group(shape, bits, group, affine):
    total = 0
    for _ in range(shape[0]):
        left = math.prod(shape[1:])
        while left > 0:
            total += min(group, left) * bits + 16 + (bits if affine else 0)
            left -= group
    return total / math.prod(shape)


def bits_of_the_course(shape, bits, group, affine):
    grid = cp.Grid(bits, symmetric=not affine, signed=not affine)
    return cp.quantise_weight(torch.randn(shape), grid, group, scale_dtype=torch.float16).bits_per_weight


def in_reals(q_x, z, s_x, q_w, s_w):
    return (s_x * (q_x.double() - z)) @ (s_w[:, None] * q_w.double()).T


def zero_first(q_x, z, s_x, q_w, s_w):
    return ((q_x.int() - z) @ q_w.int().T) * (s_x * s_w)


def by_broadcasting(q_x, z, s_x, q_w, s_w):
    return s_x * s_w * ((q_x.short() - z)[:, None] * q_w.short()[None]).sum(-1)


def lengths_of_the_course(counts):
    return cp.huffman_lengths(counts) if any(counts) else []


def by_walking_the_tree(counts):
    """Equal counts are told apart the other way round."""
    heap = [(count, -k, k) for k, count in enumerate(counts) if count]
    heapq.heapify(heap)
    ties = itertools.count(-1000, -1)
    while len(heap) > 1:
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (a[0] + b[0], next(ties), (a[2], b[2])))
    lengths = dict.fromkeys(range(len(counts)), 0)

    def walk(node, depth):
        if isinstance(node, tuple):
            for child in node:
                walk(child, depth + 1)
        else:
            lengths[node] = max(depth, 1)

    walk(heap[0][2], 0)
    return list(lengths.values())


def with_a_factor(w, H_inv, step):
    """A row of the Cholesky factor for each correction, as in the course."""
    w = w.clone()[None]
    rounded = torch.zeros_like(w)

    def column(q):
        rounded[:, q] = (w[:, q] / step).round() * step
        return rounded[:, q]

    second_order.round_in_order(w, torch.linalg.cholesky(H_inv, upper=True), column)
    return rounded[0]


def all_corrected(w, H_inv, step):
    """An eliminated weight has a column of zeros, so that the whole vector may be corrected."""
    w, H_inv = w.clone(), H_inv.clone()
    for q in range(len(w)):
        off = (w[q] - torch.round(w[q] / step) * step) / H_inv[q, q]
        w = w - off * H_inv[:, q]
        H_inv = H_inv - torch.outer(H_inv[:, q], H_inv[q]) / H_inv[q, q]
        H_inv[q] = H_inv[:, q] = 0
    return (w / step).round() * step


def solved_anew(w, H_inv, step):
    """After each weight, the least squares of all that are left, given what has become of the others."""
    H = torch.linalg.inv(H_inv)
    off = torch.zeros_like(w)
    for q in range(len(w)):
        now = w[q] + off[q]
        off[q] = (now / step).round() * step - w[q]
        if q + 1 < len(w):
            done, left = slice(0, q + 1), slice(q + 1, None)
            off[left] = -torch.linalg.solve(H[left, left], H[left, done] @ off[done])
    return w + off


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("11.1", grid_of_the_course),
        ("11.1", from_the_upper_end),
        ("11.1", any_steps_for_nothing),
        ("11.1", lambda *case: list(affine(*case))),
        ("11.1", lambda *case: torch.tensor(affine(*case), dtype=torch.float64).unbind()),
        ("11.1", lambda *case: np.array(affine(*case))),
        ("11.2", counted_group_by_group),
        ("11.2", bits_of_the_course),
        ("11.2", lambda *case: np.float64(bits_per_weight(*case))),
        ("11.2", lambda *case: torch.tensor(bits_per_weight(*case))),
        ("11.3", in_reals),
        ("11.3", zero_first),
        ("11.3", by_broadcasting),
        ("11.4", lengths_of_the_course),
        ("11.4", by_walking_the_tree),
        ("11.4", lambda counts: torch.tensor(huffman_lengths(counts))),
        ("11.4", lambda counts: [float(length) for length in huffman_lengths(counts)]),
        ("11.6", with_a_factor),
        ("11.6", all_corrected),
        ("11.6", solved_anew),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


# Usual mistakes


def by_dividing(low, high, bits):
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def by_tensors(low, high, bits):
    low, high = torch.tensor(min(low, 0.0)), torch.tensor(max(high, 0.0))
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale)


def bytes_at_once(q_x, z, s_x, q_w, s_w):
    return s_x * s_w * ((q_x - z).long() @ q_w.long().T)


def never_fewer(counts):
    heap = [[count] for count in counts]
    while len(heap) > 1:
        heap = sorted(heap)
    return heap


def rounded_in_place(w, H_inv, step):
    w[:] = round_in_order(w, H_inv, step)
    return w


def inverse_in_place(w, H_inv, step):
    made = round_in_order(w, H_inv, step)
    H_inv -= H_inv
    return made


MISTAKES = [
    ("11.1", by_dividing, r"raised ZeroDivisionError.*\(on 0 to 0, 8 bits\)", "the range is empty"),
    ("11.1", by_tensors, r"the scale is 0, and should be a number above 0 \(on 0 to 0", "any scale above 0"),
    ("11.1", lambda *case: affine(*case)[0], "should return 2 values .*and returns one value", "integer stands for 0"),
    ("11.1", lambda *case: (2 * affine(*case)[0], 0), "the scale is not right", "integer stands for 0"),
    ("11.1", lambda low, high, bits: (affine(low, high, bits)[0], affine(low, high, bits)[1] + (bits == 16)),
     r"the zero point is not right: the difference is 1 \(on -900", "integer stands for 0"),
    ("11.1", lambda low, high, bits: any_steps_for_nothing(low, high, bits) if low or high else (0.3, -1),
     r"the zero point is -1, and should be a whole number from 0 to 255 \(on 0 to 0", "should this be low"),
    ("11.2", lambda *case: bits_per_weight(*case) / 8, "the bits a weight is not right", "third group end"),
    ("11.2", lambda shape, *case: bits_per_weight(shape[::-1], *case), "lie down the columns|not right", "group end"),
    ("11.3", bytes_at_once, "taken off in bytes without a sign", "3 - 5 in unsigned bytes"),
    ("11.3", lambda *case: integer_linear(*case).T, "the result", "Let all q_x be z"),
    ("11.3", lambda q_x, z, s_x, q_w, s_w: q_x @ q_w.T, "raised RuntimeError", ""),
    ("11.4", lambda counts: dict(enumerate(huffman_lengths(counts))), "should return a list of lengths", "For inst"),
    ("11.4", lambda counts: huffman_lengths(counts)[1:], "should be 7 lengths.* and there are 6", "never occur"),
    ("11.4", lambda counts: [length + 0.5 for length in huffman_lengths(counts)], "whole bits", "never occur"),
    ("11.4", lambda counts: [-length for length in huffman_lengths(counts)], "whole bits", "never occur"),
    ("11.4", lambda counts: [math.nan for _ in counts], "whole bits", "never occur"),
    ("11.4", lambda counts: [max(length - 1, 1) for length in huffman_lengths(counts)], "told apart", "begin alike"),
    ("11.4", lambda counts: [int(bool(count)) for count in counts], "told apart", "begin alike"),
    ("11.4", lambda counts: [length + 2 * (c > 0) for length, c in zip(huffman_lengths(counts), counts, strict=True)],
     r"\d+ of the \d+ bits that yours takes can be saved", "two symbols may have the longest"),
    ("11.4", lambda counts: [0, *huffman_lengths(counts)[1:]], "symbol 0 occurs 19 times, and its word has .* 0",
     "never occur"),
    ("11.6", rounded_in_place, "changes its argument w in place", "writes into"),
    ("11.6", inverse_in_place, "changes its argument H_inv in place", "writes into"),
    ("11.6", lambda w, H_inv, step: w, "weight 0 is no multiple of the step", "stay as it is"),
    ("11.6", lambda w, H_inv, step: round_in_order(w, H_inv, step) + step, "weight 0 .*nothing has corrected", "H_inv"),
    ("11.6", lambda w, H_inv, step: round_in_order(w, H_inv, step)[None], r"should have shape \[24\]", "over H_inv"),
    ("11.6", lambda w, H_inv, step: round_in_order(w, H_inv, step) + step * (torch.arange(len(w)) == 3),
     "weight 3 is rounded to another multiple of the step: the 3 before it are right", "over H_inv"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


@pytest.mark.usefixtures("impatient")
def test_a_loop_without_end_comes_to_one():
    before = sys.gettrace()
    checking.assert_hinted("11.4", never_fewer, r"not come to an end.*\(on 7 symbols\)", "one fewer each time")
    assert sys.gettrace() is before


def cells():
    return nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4).cells


@needs_the_notebook
def test_the_bug_of_the_notebook_is_named():
    (code,) = [cell.source for cell in cells() if cell.cell_type == "code" and "def integer_linear" in cell.source]
    names = {"torch": torch, "check": lambda *handed: None}
    exec(code, names)
    checking.assert_hinted("11.3", names["integer_linear"], "the zero point is taken off once", "Let all q_x be z")


@pytest.mark.parametrize("exercise", METHODS)
@pytest.mark.parametrize(
    "odd",
    [
        lambda value: [value, None],
        lambda value: {"result": value},
        lambda value: "0.5",
        lambda value: math.nan,
        lambda value: [],
        lambda value: torch.zeros(2, 3, dtype=torch.bool),
        lambda value: ("0.5", None),
    ],
    ids=["a ragged list", "a dict", "a string", "NaN", "nothing", "bool", "no numbers"],
)
def test_an_odd_result_gets_a_readable_remark(exercise, odd):
    found = check(exercise, lambda *inputs: odd(METHODS[exercise].right(*inputs)))
    assert found.state == "not yet right"
    assert len(found.message) > 20
    assert not re.search(r"raised|Traceback|object at", found.message), found


# What is right here


@pytest.mark.parametrize("on", chapter_11.exercise_1.cases)
def test_the_grid_that_is_right_here_is_the_course_s(on):
    low, high, bits = chapter_11.exercise_1.cases[on]
    (scale, zero), (theirs, their_zero) = affine(low, high, bits), grid_of_the_course(low, high, bits)
    assert scale == pytest.approx(theirs.item())
    assert zero == their_zero
    assert 0 <= zero < 2**bits
    ends = torch.tensor([low, high], dtype=torch.float64)
    back = cp.fake_quantise(ends, scale, zero, unsigned(bits))
    assert ((back - ends).abs() <= scale / 2 + 1e-9).all()


@pytest.mark.parametrize("on", chapter_11.exercise_2.cases)
def test_the_bits_that_are_right_here_are_those_of_a_stored_weight(on):
    shape, bits, group, affine = case = chapter_11.exercise_2.cases[on]
    assert bits_per_weight(*case) == pytest.approx(bits_of_the_course(shape, bits, group, affine))
    assert bits_per_weight(*case) == pytest.approx(counted_group_by_group(*case))


@pytest.mark.parametrize("on", chapter_11.exercise_3.cases)
def test_the_integers_give_what_the_reals_give(on):
    case = chapter_11.exercise_3.cases[on]
    torch.testing.assert_close(integer_linear(*case), in_reals(*case), rtol=1e-12, atol=1e-12)
    layer = nn.Linear(case[3].shape[1], len(case[3]), bias=False).double()
    layer.weight.data = case[4][:, None] * case[3]
    torch.testing.assert_close(integer_linear(*case), layer(case[2] * (case[0].double() - case[1])))


def shortest(counts):
    """The least bits of all complete codes of few symbols."""
    present = [count for count in counts if count]
    return min(
        sum(length * count for length, count in zip(lengths, present, strict=True))
        for lengths in itertools.product(range(1, len(present) + 1), repeat=len(present))
        if sum(2.0**-length for length in lengths) <= 1
    )


def test_the_code_that_is_right_here_is_the_best():
    draw = np.random.default_rng(0)
    for _ in range(20):
        counts = draw.integers(0, 9, 6).tolist()
        counts[0] += 1
        assert chapter_11._total(huffman_lengths(counts), counts) == shortest(counts)
        assert not chapter_11._is_code(huffman_lengths(counts), counts)


@pytest.mark.parametrize("on", chapter_11.exercise_4.cases)
def test_it_takes_as_many_bits_as_the_course_s(on):
    (counts,) = chapter_11.exercise_4.cases[on]
    lengths = huffman_lengths(counts)
    assert cp.HuffmanCode(tuple(lengths)).bits(counts) == cp.HuffmanCode.from_counts(counts).bits(counts)


@pytest.mark.parametrize("on", chapter_11.exercise_6.cases)
def test_what_is_rounded_here_is_the_exact_least_squares_solution(on):
    case = chapter_11.exercise_6.cases[on]
    assert torch.linalg.eigvalsh(case[1]).min() > 0
    torch.testing.assert_close(round_in_order(*case), solved_anew(*case))
    torch.testing.assert_close(round_in_order(*case), with_a_factor(*case))


def test_rounding_in_order_loses_less_than_rounding_to_nearest():
    for w, H_inv, step in chapter_11.exercise_6.cases.values():
        H = torch.linalg.inv(H_inv)
        ordered = cp.output_error(w[None], round_in_order(w, H_inv, step)[None], H)
        nearest = cp.output_error(w[None], ((w / step).round() * step)[None], H)
        assert ordered < nearest if len(w) > 5 else ordered == pytest.approx(nearest)


def test_no_weight_lies_near_the_middle_of_two_steps():
    """Else another order of the sums could round it the other way."""
    for case in chapter_11.exercise_6.cases.values():
        passed = []

        def noted(x, passed=passed):
            passed.append(abs(x.item() - math.floor(x.item()) - 0.5))
            return x.round()

        chapter_11._round_in_order(*case, rounded=noted)
        assert min(passed) > 1e-4


# A figure to read


SPREAD = {"A": [1.0, 1.1, 0.9, 1.0], "B": [4.0, 4.2, 3.9, 4.1], "C": [0.1, 0.2, 0.15, 3.0], "D": [1.5, 2.5, 1.2, 2.0]}


def gain(ranges):
    """How much smaller the mean squared error is with a range for each output: it goes with the range's square."""
    return max(ranges) ** 2 / np.mean(np.square(ranges))


def test_the_layer_that_is_right_is_the_one_that_gains_most():
    gains = {name: gain(ranges) for name, ranges in SPREAD.items()}
    best, second = sorted(gains, key=gains.get, reverse=True)[:2]
    assert chapter_11.exercise_5.right == (best, "b") == ("C", "b")
    assert gains[best] > 2 * gains[second]
    drop = {name: max(ranges) ** 2 - np.mean(np.square(ranges)) for name, ranges in SPREAD.items()}
    assert max(drop, key=drop.get) == best
    assert max(SPREAD, key=lambda name: max(SPREAD[name])) == "B", "reason c"


@needs_the_notebook
def test_the_figure_is_the_notebook_s():
    (code,) = [cell.source for cell in cells() if cell.cell_type == "code" and "spread = {" in cell.source]
    drawn = {"plt": plt, "np": np, "plotting": plotting}
    exec(code, drawn)
    plt.close("all")
    assert drawn["spread"] == SPREAD


# The budget


def down_and_filled(weights, losses, budget):
    """Down where a bit costs least; what is left over is given back."""
    bits = chapter_11._down(weights, losses, budget, lambda count, loss, now, lower: loss / (count * (now - lower)))
    while True:
        fits = [
            (losses[name][bits[name]] - losses[name][b], name, b)
            for name in weights
            for b in losses[name]
            if losses[name][b] < losses[name][bits[name]] and chapter_11._fits({**bits, name: b}, weights, budget)
        ]
        if not fits:
            return bits
        _, name, b = max(fits)
        bits[name] = b


def down(weights, losses, budget):
    return chapter_11._down(weights, losses, budget, lambda count, loss, now, lower: loss / (count * (now - lower)))


def up(weights, losses, budget):
    """Up where a bit brings most, as long as a step fits."""
    bits = dict.fromkeys(weights, 2)
    while True:
        gains = {}
        for name, b in bits.items():
            if b < 8 and chapter_11._fits(
                {**bits, name: (more := min(m for m in losses[name] if m > b))}, weights, budget
            ):
                gains[name, more] = (losses[name][b] - losses[name][more]) / (weights[name] * (more - b))
        if not gains:
            return bits
        name, more = max(gains, key=gains.get)
        bits[name] = more


def one_step_too_few(weights, losses, budget):
    return down(weights, losses, budget + 0.6)


def eight(weights, losses, budget):
    return dict.fromkeys(weights, 8)


def stuck(weights, losses, budget):
    """The layer that it would take bits from has none left."""
    bits = dict.fromkeys(weights, 8)
    while sum(weights[name] * b for name, b in bits.items()) > budget * sum(weights.values()):
        bits["layer1"] = 2
    return bits


def all_choices(weights, losses, budget):
    best = None
    for each in itertools.product(*losses.values()):
        bits = dict(zip(losses, each, strict=True))
        lost = sum(losses[name][b] for name, b in bits.items())
        if chapter_11._fits(bits, weights, budget) and (best is None or lost < best[0]):
            best = lost, bits
    return best[1]


def mean_ratio(answer):
    places = range(len(chapter_11.HIDDEN))
    return np.mean([chapter_11._ratio(place, answer(*chapter_11._hidden(place))) for place in places])


@pytest.mark.parametrize(
    ("answer", "most"),
    [(chapter_11._priced, 1.015), (down, 1.015), (down_and_filled, 1.005), (up, 1.005)],
    ids=["the printed solution", "down", "down and filled", "up"],
)
def test_choices_by_the_price_of_a_bit_pass_clearly(answer, most):
    assert check("11.7", answer).state == "passed"
    assert mean_ratio(answer) < most


@pytest.mark.parametrize("kind", [np.int64, float, torch.tensor])
def test_bits_may_be_of_other_kinds(kind):
    found = check("11.7", lambda *case: {name: kind(b) for name, b in down_and_filled(*case).items()})
    assert found.state == "passed", found


def told(answer):
    """The mean ratio, what is said of each case, and the hint."""
    found = check("11.7", answer)
    assert found.state == "not yet right"
    pattern = r"(.*)your choices lose (.*) times as much as the best on average, the limit is 1\.05; by .*?\), "
    said = re.match(pattern, found.message)
    assert said, found
    return said[1], float(said[2]), found.message[said.end() :].split("; "), found.hint


@pytest.mark.parametrize(
    ("answer", "least", "remark", "hint"),
    [
        (chapter_11._equal, 1.5, "all layers have the same bits", "losses of two layers"),
        (chapter_11._largest_first, 1.5, "the largest layers have the fewest", "losses of two layers"),
        (chapter_11._largest_in_turns, 1.5, "the largest layers have the fewest", "losses of two layers"),
        (chapter_11._by_loss, 1.25, "taken where the loss grows least", "20 times as many bits"),
        (chapter_11._up_by_loss, 1.25, "given where the loss falls most", "20 times as many bits"),
        (lambda weights, *case: dict.fromkeys(weights, 2), 1.5, "all layers have 2 bits", "is left"),
        (lambda *case: {**down(*case), "layer2": 2}, 1.06, "^$", r"^With \d+ layers and a budget of [\d.]+, .*bits in"),
    ],
)
def test_other_choices_are_told_what_they_lose(answer, least, remark, hint):
    said, mean, each, hinted = told(answer)
    assert mean > least
    assert mean == pytest.approx(mean_ratio(answer), abs=0.001)
    assert re.search(remark, said)
    assert re.search(hint, hinted), hinted
    assert [text.rpartition(": ")[0] for text in each] == [str(case[:2]) for case in chapter_11.HIDDEN]


@pytest.mark.parametrize("answer", [eight, one_step_too_few])
def test_who_is_over_budget_counts_twice(answer):
    said, mean, each, hint = told(answer)
    assert mean == 2
    assert not said
    assert all(text.endswith(": over budget") for text in each)
    assert re.search(r"With 8 layers and a budget of 4 you use [\d,]+ bits, and there are [\d,]+\.", hint)


def test_once_over_budget_may_be_made_good_elsewhere(monkeypatch):
    """By the rule that the text sets: the mean decides."""
    monkeypatch.setattr(chapter_11, "MOST", 1.2)
    first = chapter_11._hidden(0)[0]

    def once(weights, losses, budget):
        return eight(weights, losses, budget) if weights == first else down_and_filled(weights, losses, budget)

    assert check("11.7", once).state == "passed"


@pytest.mark.parametrize("place", range(2))
def test_the_least_loss_is_that_of_all_choices(place, monkeypatch):
    """On the first seven layers of a table."""
    weights, losses, budget = chapter_11._hidden(place)
    few = dict(itertools.islice(weights.items(), 7))
    case = few, {name: losses[name] for name in few}, budget
    monkeypatch.setattr(chapter_11, "_hidden", lambda place: case)
    found = chapter_11._least_loss.__wrapped__(place)
    assert found == pytest.approx(chapter_11._lost(all_choices(*case), case[1]))


def test_no_choice_is_better_than_the_best():
    for place in range(len(chapter_11.HIDDEN)):
        for rule in (chapter_11._priced, down, down_and_filled):
            assert chapter_11._ratio(place, rule(*chapter_11._hidden(place))) >= 1 - 1e-9


def test_losses_fall_with_the_bits_and_not_evenly():
    uneven = 0
    for place, (layers, budget, _) in enumerate(chapter_11.HIDDEN):
        weights, losses, given = chapter_11._hidden(place)
        assert len(weights) == len(losses) == layers
        assert given == budget
        for costs in losses.values():
            assert tuple(costs) == chapter_11.BITS
            values = [*costs.values()]
            assert values == sorted(values, reverse=True)
            slopes = np.diff(values) / np.diff(chapter_11.BITS)
            uneven += bool((np.diff(slopes) < 0).any())
    assert uneven >= 5, "layers whose losses are not convex"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("answer", [stuck, all_choices])
def test_a_loop_without_an_end_in_sight_comes_to_one(answer):
    told = r"not come to an end after 0\.3 million lines of Python \(on 8 layers, a budget of 4\)"
    checking.assert_hinted("11.7", answer, told, "not all can be tried")


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        (3, "a function is wanted here", ""),
        (lambda: 1, "raised TypeError", ""),
        (lambda *case: 1 / 0, r"raised ZeroDivisionError.*\(on 8 layers", ""),
        (lambda *case: "a", r"should return a dict, and returns a str \(on 8 layers, a budget of 4\)", "A dict with"),
        (lambda *case: [4] * 8, "should return a dict, and returns a list", "A dict with"),
        (lambda *case: {}, "there are no bits for layer1", "A dict with"),
        (lambda *case: {**eight(*case), "head": 8}, "there is no layer 'head'", "A dict with"),
        (lambda *case: {**eight(*case), "layer3": 5}, "layer3 cannot have 5 bits: .* for 2, 3, 4, 6, 8", "A d"),
        (lambda *case: {**eight(*case), "layer3": "8"}, "layer3 cannot have '8' bits", "A dict with"),
        (lambda *case: {**eight(*case), "layer3": [8]}, r"layer3 cannot have \[8\] bits", "A dict with"),
        (lambda *case: {**eight(*case), "layer3": None}, "layer3 cannot have None bits", "A dict with"),
    ],
)  # fmt: skip
def test_what_is_no_choice_of_bits_is_told_what_is_wanted(answer, message, hint):
    checking.assert_hinted("11.7", answer, message, hint)


@pytest.mark.parametrize("answer", checking.STUBS)
def test_a_budget_that_is_still_a_stub_is_not_attempted(answer):
    checking.assert_not_attempted("11.7", answer)


# The notebook's own


@needs_the_notebook
@pytest.mark.parametrize("number", range(1, 8))
def test_the_printed_solutions_pass(number):
    exercise = f"11.{number}"
    assert exercise in checking.asked(NOTEBOOK)
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, np=np, torch=torch)
