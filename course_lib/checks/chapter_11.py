"""Checks of chapter 11, compression: a grid, bits, a bug, a code, a figure, second-order rounding, a budget, a project.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on what the chapter's module computes nor on what the learner imports.
"""

import functools
import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from course_lib.checks.designs import normal
from course_lib.checks.patience import PATIENCE, endless, within
from course_lib.lab.judging import (
    Case,
    Hints,
    Method,
    Mistake,
    OfThisAnswer,
    OpenProject,
    Reading,
    Rule,
    Wrong,
    call,
    close,
    parts_of,
)

# Exercise 1: an affine grid


def _affine(
    low: float, high: float, bits: int, *,
    widened: Callable[[float, float], tuple[float, float]] = lambda low, high: (min(low, 0.0), max(high, 0.0)),
    steps: Callable[[int], int] = lambda bits: 2**bits - 1,
    zero: Callable[[float, float, int], float] = lambda low, scale, bits: round(-low / scale),
    of_nothing: float = 1.0,
) -> tuple[float, float]:  # fmt: skip
    """The ``widened`` range in so many ``steps``, and the ``zero`` point by its lower end."""
    low, high = widened(low, high)
    scale = (high - low) / steps(bits)
    return (scale, zero(low, scale, bits)) if scale > 0 else (of_nothing, 0)


def _as_given(low: float, high: float) -> tuple[float, float]:
    return low, high


def _on_grid(low: float, scale: float, bits: int) -> int:
    return min(max(round(-low / scale), 0), 2**bits - 1)


def _below_only(low: float, high: float) -> tuple[float, float]:
    return min(low, 0.0), high


def _to_both_sides(low: float, high: float) -> tuple[float, float]:
    largest = max(abs(low), abs(high))
    return -largest, largest


def _shared_zero(low: float, high: float, bits: int, top: int) -> tuple[float, int]:
    return max(abs(low), abs(high)) / top or 1.0, 0


def _nothing_first(low: float, high: float, bits: int) -> tuple[float, float]:
    return (1.0, 0) if low == high else _affine(low, high, bits)


_GRID = ("the scale", "the zero point")


def _on_ranges(rule: Rule, low: float, high: float, bits: int) -> Any:
    try:
        return rule(low, high, bits)
    except Wrong as wrong:
        divided = "ZeroDivisionError" in wrong.message
        raise Wrong(wrong.message, wrong.hints or (_NOTHING if divided else ())) from None


def _fits_range(found: Any, right: Any, low: float, high: float, bits: int) -> bool:
    """A range of nothing but 0 fits on any steps, and 0 on any number of the grid."""
    if low or high:
        return close(found, right, atol=1e-9)
    scale, zero = map(_as_number, parts_of(found, _GRID, _BOTH))
    return 0 < scale < math.inf and zero in range(2**bits)


def _nothing_but_0(found: Any, right: Any, low: float, high: float, bits: int) -> None:
    if low or high:
        return
    scale, zero = map(_as_number, parts_of(found, _GRID, _BOTH))
    if not 0 < scale < math.inf:
        raise Wrong(f"the scale is {scale:g}, and should be a number above 0", _NOTHING)
    raise Wrong(f"the zero point is {zero:g}, and should be a whole number from 0 to {2**bits - 1}", _ZERO)


def _as_number(value: Any) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


_BOTH = "For instance: return 0.1, 3"
_HOLD_0 = [
    "From 1 to 3: which integer stands for 0? Is it on the grid?",
    "First widen the range until it holds 0: a low above 0 becomes 0, and so does a high below it.",
]
_STEPS = [
    "With 1 bit there are two integers, 0 and 1. How many steps lie between them?",
    "2**bits integers have 2**bits - 1 steps between the first and the last.",
]
_ZERO = [
    "The integer q stands for scale * (q - zero). For which q should this be low, and what is zero then?",
    "q = 0 should stand for low. So zero = -low / scale, and it has to be a whole number.",
]
_NEAREST = "Is 78.9 nearer to 78 or to 79? int() cuts off."
_AFFINE = [
    "Which integers stand for low and for high? With low = 0, is any of them left unused?",
    "Symmetric grids waste what lies beyond the shorter side. Here 0 may be anywhere on the grid.",
]
_NOTHING = "low = high = 0: the range is empty, and any scale above 0 will do, but 0 will not."

exercise_1 = Method(
    "An affine grid",
    right=_affine,
    ask=_on_ranges,
    agree=_fits_range,
    explain=_nothing_but_0,
    what=_GRID,
    hint=[*_HOLD_0, *_ZERO],
    atol=1e-9,
    cases={
        "-1.3 to 2.9, 8 bits": (-1.3, 2.9, 8),
        "0.7 to 2.3, 4 bits": (0.7, 2.3, 4),
        "-3 to -0.5, 6 bits": (-3.0, -0.5, 6),
        "2.5 to 2.5, 8 bits": (2.5, 2.5, 8),
        "0 to 6, 3 bits": (0.0, 6.0, 3),
        "-900 to 37.5, 16 bits": (-900.0, 37.5, 16),
        "-1 to 2, a single bit": (-1.0, 2.0, 1),
        "0 to 0, 8 bits": (0.0, 0.0, 8),
    },
    mistakes=[
        Mistake(partial(_affine, steps=lambda bits: 2**bits), "the range is divided by the number of integers, not of "
                "steps between them", _STEPS),
        Mistake(partial(_affine, steps=lambda bits: 2 ** (bits - 1) - 1 or 1),
                "half of the grid is unused: this is the scale of positive integers that have a sign", _STEPS),
        Mistake(partial(_affine, zero=lambda low, scale, bits: -low / scale),
                "the zero point is no whole number: 0 has no integer of its own", [*_ZERO, "round()"]),
        Mistake(partial(_affine, zero=lambda low, scale, bits: int(-low / scale)),
                "the zero point is cut off, not rounded", _NEAREST),
        Mistake(partial(_affine, zero=lambda low, scale, bits: math.ceil(-low / scale)),
                "the zero point is rounded up, not to the nearest", _NEAREST),
        Mistake(partial(_affine, zero=lambda low, scale, bits: round(low / scale)),
                "the zero point has the wrong sign: it lies below the grid", _ZERO),
        Mistake(partial(_affine, zero=lambda low, scale, bits: round(-low / scale) - 2 ** (bits - 1)),
                "the zero point is that of integers with a sign: these begin at 0", _ZERO),
        Mistake(partial(_affine, zero=lambda low, scale, bits: low),
                "the zero point is the lower end of the range, and should be an integer of the grid", _ZERO),
        Mistake(partial(_affine, zero=lambda low, scale, bits: 0),
                "the zero point is always 0: there is no integer for what lies below 0", _ZERO),
        Mistake(lambda *case: _affine(*case)[::-1], "scale and zero point are in each other's place",
                "The scale comes first."),
        Mistake(lambda *case: (1 / _affine(*case)[0], _affine(*case)[1]),
                "the scale is upside down: it should be what one step of the integers means in reals", _STEPS),
        Mistake(partial(_affine, widened=_to_both_sides), "the range is made as wide below 0 as above it", _AFFINE),
        Mistake(lambda low, high, bits: _shared_zero(low, high, bits, 2 ** (bits - 1) - 1),
                "this is a symmetric grid of integers with a sign", _AFFINE),
        Mistake(lambda low, high, bits: _shared_zero(low, high, bits, 2**bits - 1),
                "this is a symmetric grid: the zero point is 0, whatever the range", _AFFINE),
        # Right if the range holds 0
        Mistake(partial(_affine, widened=_as_given), "the range is not widened until it holds 0: the zero point lies "
                "outside the grid", _HOLD_0),
        Mistake(partial(_affine, widened=_as_given, zero=_on_grid), "the range is not widened until it holds 0: the "
                "zero point is on the grid, and now the other end is out of reach", _HOLD_0),
        Mistake(partial(_affine, widened=_below_only), "a range that ends below 0 is not widened: the zero point lies "
                "outside the grid", _HOLD_0),
        Mistake(partial(_affine, widened=_below_only, zero=_on_grid), "a range that ends below 0 is not widened: the "
                "zero point is on the grid, and now the lower end is out of reach", _HOLD_0),
        Mistake(_nothing_first, "a range of a single number other than 0 is taken for an empty one",
                ["Widen the range first. Is it still empty?", *_HOLD_0]),
        Mistake(partial(_affine, of_nothing=0.0), "the scale of an empty range is 0", _NOTHING),
    ],
)  # fmt: skip


# Exercise 2: bits that count


def _bits_per_weight(
    shape: Sequence[int], bits: int, group: int, affine: bool, *,
    groups: Callable[[int, int, int], float] = lambda rows, inputs, group: rows * -(-inputs // group),
    each: Callable[[int, bool], float] = lambda bits, affine: 16 + bits * affine,
    inputs: Callable[[Sequence[int]], int] = lambda shape: math.prod(shape[1:]),
) -> float:  # fmt: skip
    """So many ``groups``, with as many bits besides the weights' own for ``each``."""
    besides = groups(shape[0], inputs(shape), group) * each(bits, affine)
    return bits + besides / math.prod(shape)


def _all_bits(shape: Sequence[int], bits: int, group: int, affine: bool) -> float:
    return math.prod(shape) * _bits_per_weight(shape, bits, group, affine)


_ROWS = [
    "A row of 21 weights in groups of 8: where does the third group end, and where does the next row's first begin?",
    "Groups in a row, rounded up, times the rows.",
]
_UP = [
    "A row of 21 weights in groups of 8: the last 5 need a scale, too.",
    "Round up: -(-inputs // group), or math.ceil(inputs / group).",
]
_ROW_OF = "A convolution's weight is [outputs, inputs, height, width]: what belongs to one output is its row."
_ZEROS = "An affine group stores its scale and its zero point, a symmetric one its scale alone."

exercise_2 = Method(
    "Bits that count",
    right=_bits_per_weight,
    what="the bits a weight",
    hint=[*_ROWS, _ZEROS],
    cases={
        "5 rows of 21, groups of 8, affine": ((5, 21), 5, 8, True),
        "16 rows of 100, groups of 32, symmetric": ((16, 100), 3, 32, False),
        "a convolution of 3 by 3, affine": ((6, 4, 3, 3), 4, 8, True),
        "rows of 10, groups of 32": ((7, 10), 4, 32, True),
        "rows of 64, groups of 16, symmetric": ((8, 64), 8, 16, False),
        "each weight a group": ((3, 5), 2, 1, True),
    },
    mistakes=[
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: -(-rows * inputs // group)),
                "groups run on from one row into the next", _ROWS),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: rows * inputs // group),
                "groups run on from one row into the next, and what is left over has no scale", [*_ROWS, *_UP]),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: rows * inputs / group),
                "groups that are not full count as parts of one", _UP),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: rows * (inputs // group)),
                "the shorter group at the end of a row is forgotten", _UP),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: rows * max(inputs // group, 1)),
                "the shorter group at the end of a row is forgotten", _UP),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: rows * (inputs // group + 1)),
                "a row that its groups fill has one group too many", ["8 weights in groups of 8: how many?", *_UP]),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: -(-inputs // group)),
                "these are the groups of one row", "How many rows are there?"),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: rows),
                "there is one scale for each row", _ROWS),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: 1), "there is one scale in all", _ROWS),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: inputs * -(-rows // group)),
                "the groups lie down the columns: neighbours in a row share a scale", _ROWS),
        Mistake(partial(_bits_per_weight, each=lambda bits, affine: 16), "the zero points are not counted", _ZEROS),
        Mistake(partial(_bits_per_weight, each=lambda bits, affine: 16 + 16 * affine),
                "a zero point takes 16 bits: it should take as many as a weight", _ZEROS),
        Mistake(partial(_bits_per_weight, each=lambda bits, affine: 32 + bits * affine),
                "the scales take 32 bits", "How many bits has a scale, says the text?"),
        Mistake(partial(_bits_per_weight, each=lambda bits, affine: bits * affine), "the scales are not counted",
                _ZEROS),
        Mistake(lambda shape, bits, group, affine: float(bits), "this is the weights' part alone",
                "What has to be stored for each group besides?"),
        Mistake(_all_bits, "these are the bits of all weights together", "How many weights are there?"),
        Mistake(lambda shape, bits, *case: _bits_per_weight(shape, bits, *case) - bits,
                "the weights' own bits are missing", "Bits of a weight, and its part of what the groups store."),
        # Right of an affine linear layer
        Mistake(partial(_bits_per_weight, each=lambda bits, affine: 16 + bits),
                "zero points are counted on a symmetric grid, too: there they are all 0", _ZEROS),
        Mistake(partial(_bits_per_weight, inputs=lambda shape: shape[1]),
                "a row of the convolution has as many weights as inputs: its kernels are larger", _ROW_OF),
        Mistake(partial(_bits_per_weight, groups=lambda rows, inputs, group: rows * -(-inputs // min(group, 9)),),
                "groups end with a kernel: a row goes on through all kernels of an output", _ROW_OF),
    ],
)  # fmt: skip


# Exercise 3: integer products


def _integer_linear(
    q_x: Tensor, z: int, s_x: float, q_w: Tensor, s_w: Tensor, *,
    correction: Callable[[Tensor, int, Tensor], Any] = lambda x, z, w: z * w.sum(1),
    scales: Callable[[float, Tensor], Any] = lambda s_x, s_w: s_x * s_w,
) -> Tensor:  # fmt: skip
    """The sum of products less its ``correction``, times the ``scales``."""
    x, w = q_x.long(), q_w.long()
    return scales(s_x, s_w) * (x @ w.T - correction(x, z, w))


def _in_bytes(q_x: Tensor, z: int, s_x: float, q_w: Tensor, s_w: Tensor) -> Tensor:
    """The difference in 8 bits, without a sign."""
    return s_x * s_w * ((q_x.to(torch.uint8) - z).long() @ q_w.long().T)


def _in_signed_bytes(q_x: Tensor, z: int, s_x: float, q_w: Tensor, s_w: Tensor) -> Tensor:
    return s_x * s_w * ((q_x.to(torch.int8) - z).long() @ q_w.long().T)


def _product_in_bytes(x: Tensor, z: int, w: Tensor) -> Tensor:
    return (z * w).to(torch.int8).long().sum(1)


def _sum_in_bytes(q_x: Tensor, z: int, s_x: float, q_w: Tensor, s_w: Tensor) -> Tensor:
    sums = q_x.long() @ q_w.long().T - z * q_w.long().sum(1)
    return s_x * s_w * sums.to(torch.int8)


def _outside(q_x: Tensor, z: int, s_x: float, q_w: Tensor, s_w: Tensor) -> Tensor:
    return s_x * s_w * (q_x.long() @ q_w.long().T) - z * q_w.long().sum(1)


def _layer_in_integers(seed: int, N: int, I: int, O: int, z: int) -> Case:  # noqa: E741 - the exercise's names
    draw = torch.Generator().manual_seed(seed)
    q_x = torch.randint(0, 256, (N, I), generator=draw).to(torch.uint8)
    q_w = torch.randint(-127, 128, (O, I), generator=draw).to(torch.int8)
    return q_x, z, 0.021, q_w, torch.linspace(0.004, 0.05, O, dtype=torch.float64)


_MULTIPLY_OUT = [
    "Let all q_x be z: the reals are all 0. What comes out of your function?",
    "Multiply out the sum over i of q_w[o, i] (q_x[n, i] - z). What is z multiplied by?",
    "The correction is z times the sum of output o's weights: one number for each output.",
]
_EIGHT_BITS = [
    "3 - 5 in unsigned bytes is 254. Of which type are the numbers that you subtract or multiply?",
    "q_x.long() and q_w.long() first, then everything else.",
]
_SCALES = "An integer product stands for s_x times s_w[o] of its output o. Which axis of [N, O] is that?"

exercise_3 = Method(
    "Find the bug: a layer in integers",
    right=_integer_linear,
    what="the result",
    hint=[*_MULTIPLY_OUT, *_EIGHT_BITS],
    rtol=5e-7,  # an integer times one of Python's floats is float32 in torch
    atol=1e-7,
    cases={
        "4 examples, 4 inputs, 4 outputs": _layer_in_integers(1101, 4, 4, 4, 131),
        "5 examples, 40 inputs, 3 outputs": _layer_in_integers(1102, 5, 40, 3, 7),
        "a single example, and a zero point of 255": _layer_in_integers(1103, 1, 9, 6, 255),
        "a zero point of 0": _layer_in_integers(1104, 3, 8, 2, 0),
    },
    mistakes=[
        Mistake(partial(_integer_linear, correction=lambda x, z, w: z),
                "the zero point is taken off once: it is in each product of the sum", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: -z * w.sum(1)),
                "the correction is added, and should be taken off", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: 0), "there is no correction", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: z * x.sum(1, keepdim=True)),
                "the zero point is multiplied by the sum of the inputs, not of the weights", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: z * x.sum(1)),
                "the zero point is multiplied by the sum of the inputs, not of the weights", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: z * w.sum(0)),
                "the weights are summed over the outputs: what is wanted is a sum for each output", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: z * w.sum(1, keepdim=True)),
                "the corrections are laid along the examples: each belongs to an output", _SCALES),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: z * w.sum()),
                "all weights are summed: what is wanted is a sum for each output", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: z * w.shape[1]),
                "the zero point is taken off once an input, and not multiplied by the weights", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: w.sum(1)),
                "the sum of the weights is not multiplied by the zero point", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, correction=lambda x, z, w: x.shape[1] * z * w.sum(1)),
                "the correction is there once for each input, and should be there once", _MULTIPLY_OUT),
        Mistake(partial(_integer_linear, scales=lambda s_x, s_w: s_x * s_w[:, None]),
                "the scales of the outputs are laid along the examples", _SCALES),
        Mistake(partial(_integer_linear, scales=lambda s_x, s_w: s_x), "the scales of the weights are missing",
                _SCALES),
        Mistake(partial(_integer_linear, scales=lambda s_x, s_w: s_x * s_w.mean()),
                "all outputs have one scale: each has its own", _SCALES),
        Mistake(partial(_integer_linear, scales=lambda s_x, s_w: s_x * s_w[0]),
                "all outputs have one scale: each has its own", _SCALES),
        Mistake(partial(_integer_linear, scales=lambda s_x, s_w: s_w), "the scale of the inputs is missing", _SCALES),
        Mistake(partial(_integer_linear, scales=lambda s_x, s_w: 1), "these are integers: the scales are missing",
                _SCALES),
        Mistake(_outside, "the correction is taken off after the scales: it is one of integers", _SCALES),
        Mistake(_in_bytes, "the zero point is taken off in bytes without a sign: what is below 0 comes out as 255, 254 "
                "and so on", _EIGHT_BITS),
        Mistake(_in_signed_bytes, "the inputs are put into 8 bits with a sign, and those above 127 do not fit",
                _EIGHT_BITS),
        Mistake(partial(_integer_linear, correction=_product_in_bytes),
                "z times a weight is computed in 8 bits, and does not fit into them", _EIGHT_BITS),
        Mistake(_sum_in_bytes, "the sums are put into 8 bits, and do not fit into them",
                ["How large can a sum of 40 products of bytes be?", *_EIGHT_BITS]),
    ],
)  # fmt: skip


# Exercise 4: Huffman's lengths

Union = tuple[float, int, list[int]]
"""How often its symbols occur together, a number to tell equal ones apart, and the symbols."""


def _huffman(counts: Sequence[int], *, sign: int = 1, alone: int = 1, count_none: bool = False) -> list[int]:
    """The two rarest become one, again and again; of the opposite ``sign`` the two most frequent."""
    lengths = [0] * len(counts)
    heap: list[Union] = [(sign * count, k, [k]) for k, count in enumerate(counts) if count or count_none]
    if len(heap) == 1:
        lengths[heap[0][1]] = alone
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, k, some), (b, _, others) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in some + others:
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, k + len(counts), some + others))
    return lengths


def _none_for_none(rule: Rule, counts: Sequence[int]) -> list[int]:
    return [length if count else 0 for length, count in zip(rule(counts), counts, strict=True)]


def _all_symbols_in_the_tree(counts: Sequence[int]) -> list[int]:
    return _huffman(counts, count_none=True)


def _for_each(counts: Sequence[int], length: Callable[[float], float]) -> list[float]:
    """A length by the share alone."""
    total = sum(counts)
    return [length(count / total) if count else 0 for count in counts]


def _rounded_up(share: float) -> int:
    return max(math.ceil(-math.log2(share) - 1e-12), 1)


def _fixed(counts: Sequence[int], *, of: Callable[[Sequence[int]], int]) -> list[int]:
    return [max((of(counts) - 1).bit_length(), 1) if count else 0 for count in counts]


def _present(counts: Sequence[int]) -> int:
    return sum(count > 0 for count in counts)


def _in_turns(counts: Sequence[int]) -> list[int]:
    """Neighbours in the order of their counts become one, and the unions again, in turns: a balanced tree."""
    lengths = [0] * len(counts)
    line = deque([k] for k in sorted(range(len(counts)), key=counts.__getitem__) if counts[k])
    if len(line) == 1:
        lengths[line[0][0]] = 1
    while len(line) > 1:
        union = line.popleft() + line.popleft()
        for symbol in union:
            lengths[symbol] += 1
        line.append(union)
    return lengths


def _halved(counts: Sequence[int]) -> list[int]:
    """From above, into two parts of nearly equal counts (Fano 1949)."""
    lengths = [0] * len(counts)

    def split(symbols: list[int]) -> None:
        if len(symbols) < 2:
            return
        sums = np.cumsum([counts[k] for k in symbols])
        cut = 1 + int(np.abs(2 * sums[:-1] - sums[-1]).argmin())
        for symbol in symbols:
            lengths[symbol] += 1
        split(symbols[:cut])
        split(symbols[cut:])

    present = sorted((k for k in range(len(counts)) if counts[k]), key=lambda k: -counts[k])
    if len(present) == 1:
        lengths[present[0]] = 1
    split(present)
    return lengths


def _one_more_each(counts: Sequence[int]) -> list[int]:
    """1, 2, 3, …: the sum of the two rarest always stays the rarest."""
    lengths = [0] * len(counts)
    present = sorted((k for k in range(len(counts)) if counts[k]), key=lambda k: -counts[k])
    for place, symbol in enumerate(present):
        lengths[symbol] = min(place + 1, max(len(present) - 1, 1))
    return lengths


def _unions(counts: Sequence[int]) -> list[int]:
    """How many unions, not symbols, a word lies in: only the unions' first symbol grows."""
    lengths = [0] * len(counts)
    heap = [(count, k) for k, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, k), (b, other) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[k] += 1
        lengths[other] += 1
        heapq.heappush(heap, (a + b, k))
    return lengths


def _in_time(rule: Rule, counts: Sequence[int]) -> Any:
    return within(PATIENCE, endless(PATIENCE), _NO_END, rule, counts)


def _lengths(found: Any) -> list[float] | None:
    """The lengths as numbers; None for what is no row of numbers."""
    try:
        values = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return None
    return values.tolist() if values.ndim == 1 and values.dtype != torch.bool else None


def _is_code(lengths: Sequence[float], counts: Sequence[int]) -> str:
    """What keeps these from being the lengths of a prefix code; nothing if they are (Kraft's inequality)."""
    if len(lengths) != len(counts):
        return f"there should be {len(counts)} lengths, one for each symbol, and there are {len(lengths)}"
    for symbol, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        if not math.isfinite(length) or length != int(length) or length < 0:
            return f"the length of symbol {symbol}'s word is {length:g}: words have whole bits"
        if bool(length) != bool(count):
            return f"symbol {symbol} occurs {count} times, and its word has the length {length:g}"
    if sum(2.0**-length for length in lengths if length) > 1:
        return "no code has these lengths: so many short words cannot be told apart"
    return ""


def _total(lengths: Sequence[float], counts: Sequence[int]) -> float:
    return sum(length * count for length, count in zip(lengths, counts, strict=True))


def _is_best(found: Any, right: list[int], counts: Sequence[int]) -> bool:
    """Whether there is such a code, and it takes no more bits."""
    lengths = _lengths(found)
    return lengths is not None and not _is_code(lengths, counts) and _total(lengths, counts) == _total(right, counts)


def _what_is_wrong_with_the_code(found: Any, right: list[int], counts: Sequence[int]) -> None:
    lengths = _lengths(found)
    if lengths is None:
        raise Wrong(
            "your function should return a list of lengths, one number for each symbol", "For instance: [2, 1, 2]"
        )
    if why := _is_code(lengths, counts):
        if "told apart" in why:
            raise Wrong(why, ["The sum of 2**-length over all words is at most 1, or two words begin alike.", *_RAREST])
        raise Wrong(why, _PRESENT)
    more = _total(lengths, counts) - _total(right, counts)
    raise Wrong(f"there is such a code, and a better one: {more:g} of the {_total(lengths, counts):g} bits that yours "
                "takes can be saved", _RAREST)  # fmt: skip


_RAREST = [
    "Which two symbols may have the longest words? Make one of them, which occurs as often as both. And now?",
    "heapq: take the two smallest out, put their sum back, and let the words of all symbols below it grow by one.",
]
_BACK = [
    "The two rarest are one now, and occur more often together. Are they still among the two rarest?",
    *_RAREST[1:],
]
_WHOLE = [
    "A share of 0.4 wants 1.3 bits. Rounding each length by itself leaves words unused, or takes some twice.",
    *_RAREST,
]
_PRESENT = [
    "Leave symbols that never occur out before you begin. What is their length?",
    "A single symbol is never joined to another: its length has to be set.",
]
_NO_END = "Print how many unions are left in each round. Is it one fewer each time?"
_MANY = (1 + 400 * normal(1111, 60).exp()).long().tolist()

exercise_4 = Method(
    "Huffman's lengths",
    right=_huffman,
    ask=_in_time,
    agree=_is_best,
    explain=_what_is_wrong_with_the_code,
    what="the lengths",
    hint=_RAREST,
    cases={
        "7 symbols": ([19, 3, 8, 7, 2, 11, 5],),
        "9 symbols, 3 of which never occur": ([0, 12, 5, 0, 31, 2, 2, 0, 9],),
        "a single symbol": ([0, 0, 6, 0],),
        "2 symbols": ([5, 90],),
        "8 symbols, all as frequent": ([4] * 8,),
        "10 symbols, each twice as frequent as the one before": ([2**k for k in range(10)],),
        "60 symbols": (_MANY,),
    },
    mistakes=[
        Mistake(partial(_for_each, length=_rounded_up),
                "each length is its own -log2 of the share, rounded up (Shannon's code): some words could be shorter",
                _WHOLE),
        Mistake(partial(_for_each, length=lambda share: max(round(-math.log2(share)), 1)),
                "each length is its own -log2 of the share, rounded", _WHOLE),
        Mistake(partial(_for_each, length=lambda share: max(math.floor(-math.log2(share)), 1)),
                "each length is its own -log2 of the share, rounded down: no code has such short words", _WHOLE),
        Mistake(partial(_for_each, length=lambda share: -math.log2(share)),
                "this is what each symbol would take at best, in fractions of bits: words have whole ones", _WHOLE),
        Mistake(partial(_fixed, of=_present), "all words have one length", _RAREST),
        Mistake(partial(_fixed, of=len), "all words have one length", _RAREST),
        Mistake(lambda counts: [max((len(counts) - 1).bit_length(), 1)] * len(counts), "all words have one length",
                _RAREST),
        Mistake(partial(_huffman, sign=-1), "the two most frequent are joined: they get the longest words", _RAREST),
        Mistake(_in_turns, "a union is joined only when all others have been: the tree is balanced",
                _BACK),
        Mistake(_one_more_each, "the words are 1, 2, 3, … bits long: a union is always joined next, even if two others "
                "are rarer", _BACK),
        Mistake(_halved, "the symbols are halved from above (Fano's code), which is not always best", _RAREST),
        Mistake(_unions, "of the symbols below a union only one grows: all their words do", _RAREST[1:]),
        Mistake(lambda counts: [length + (count > 0) for length, count in zip(_huffman(counts), counts, strict=True)],
                "all words are one bit too long", "Two symbols alone: how many bits do they need?"),
        # Right as long as all symbols occur
        Mistake(_all_symbols_in_the_tree, "symbols that never occur get words, which make others longer", _PRESENT),
        Mistake(partial(_none_for_none, _all_symbols_in_the_tree),
                "symbols that never occur are part of the tree, and make other words longer", _PRESENT),
        Mistake(partial(_huffman, alone=0), "the only symbol has a word of 0 bits: none could tell how often it comes",
                _PRESENT[1:]),
    ],
)  # fmt: skip


# Exercise 5: which layer gains most

exercise_5 = Reading(
    "A range for each output: who gains?",
    right=("C", "b"),
    choices={
        "A": "layer A's outputs have nearly one range already: a range for each leaves almost all steps as they are",
        "B": "layer B's weights are large, and so are all its steps; but its outputs have nearly one range: steps of "
             "their own would be hardly smaller",
        "C": "",
        "D": "layer D gains something: its ranges differ by a factor of 2. Does another layer's differ by more?",
    },
    reasons={
        "a": "the figure does not show how many weights there are, and the step depends on their range only",
        "b": "",
        "c": "that holds for layer B: what is large for all outputs alike makes one range as good as four",
        "d": "all layers in the figure have four outputs",
    },
    hint=["With one range for the layer, all outputs have the step of the largest. Which outputs are left with few "
          "levels?",
          "Divide the tallest bar of each layer by its shortest."],
    reason_hint="What would change for an output if it had a range of its own? Its step goes with its bar.",
    called="layer",
)  # fmt: skip


# Exercise 6: round in order


def _round_in_order(
    w: Tensor, H_inv: Tensor, step: float, *,
    rounded: Callable[[Tensor], Tensor] = torch.round,
    error: Callable[[Tensor, Tensor, int], Tensor] = lambda off, inverse, q: off / inverse[q, q],
    sign: int = 1,
    update: Callable[[Tensor, int], Tensor] = lambda H, q: H - torch.outer(H[:, q], H[q]) / H[q, q],
    corrected: Callable[[int], int] = lambda q: q + 1,
    given: bool = False,
) -> Tensor:  # fmt: skip
    """Each weight ``rounded``, its ``error`` spread by a column of the inverse from ``corrected(q)`` on."""
    first, w, inverse = w, w.clone(), H_inv.clone()
    for q in range(len(w)):
        nearest = rounded(w[q] / step) * step
        off = error((first if given else w)[q] - nearest, inverse, q)
        after = corrected(q)
        w[after:] -= sign * off * inverse[after:, q]
        w[q] = nearest
        inverse = update(inverse, q)
    return w


def _never(inverse: Tensor, q: int) -> Tensor:
    return inverse


def _of_all_at_once(w: Tensor, H_inv: Tensor, step: float) -> Tensor:
    """All rounded first; what each spoils is made good at the others, which are rounded again."""
    off = (w - (w / step).round() * step) / H_inv.diagonal()
    return ((w - off @ (H_inv - H_inv.diagonal().diag())) / step).round() * step


def _from_the_last(w: Tensor, H_inv: Tensor, step: float) -> Tensor:
    return _round_in_order(w.flip(0), H_inv.flip(0, 1), step).flip(0)


def _what_is_wrong_with_the_rounding(found: Any, right: Tensor, w: Tensor, H_inv: Tensor, step: float) -> None:
    if not isinstance(found, Tensor) or found.shape != right.shape or not found.isfinite().all():
        return
    off = (found / step - (found / step).round()).abs()
    if off.max() > 1e-6:
        raise Wrong(f"weight {int((off > 1e-6).nonzero()[0])} is no multiple of the step", _DONE)
    place = int(((found - right).abs() > step / 2).nonzero()[0])
    first = "it is the first, and nothing has corrected it" if place == 0 else f"the {place} before it are right"
    raise Wrong(f"weight {place} is rounded to another multiple of the step: {first}", _BY_THE_INVERSE)


def _rows(seed: int, n: int, step: float) -> Case:
    """Weights of some steps, and the inverse Hessian of inputs that go together."""
    x = normal(seed, 4 * n, n) @ (torch.eye(n, dtype=torch.float64) + 0.9 * normal(seed + 1, n, n))
    H = 2 * x.T @ x / len(x)
    H_inv = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(n))
    return 3 * step * normal(seed + 2, n), 9 * H_inv / H_inv.diagonal().mean(), step


_BY_THE_INVERSE = [
    "Of weight q, the error is w[q] less its rounding, over H_inv[q, q]. The others lose it times column q.",
    "Take two weights and compute the second by hand.",
]
_ELIMINATE = [
    "A weight that is done cannot move any more. Does your H_inv still count on it?",
    "Afterwards H_inv loses the outer product of its column q and its row q, over H_inv[q, q].",
]
_TURN = [
    "Are the weights still to come what they were when the loop began? Round each when its turn comes.",
    *_BY_THE_INVERSE,
]
_DOWN = [
    "Two inputs are always alike: only the sum of their weights counts. One is rounded up. What should the other do?",
    *_BY_THE_INVERSE,
]
_DONE = "Which entries does the correction change? A weight that has been rounded should stay as it is."

exercise_6 = Method(
    "Round in order",
    right=_round_in_order,
    explain=_what_is_wrong_with_the_rounding,
    what="the rounded weights",
    hint=_BY_THE_INVERSE,
    cases={
        "24 weights": _rows(1124, 24, 0.1),
        "8 weights": _rows(1121, 8, 0.25),
        "inputs that do not go together": (normal(1127, 5), torch.diag(torch.arange(1.0, 6.0).double()), 0.5),
        "a single weight": (torch.tensor([0.83], dtype=torch.float64), torch.tensor([[2.5]], dtype=torch.float64), 0.2),
        "64 weights": _rows(1128, 64, 0.05),
    },
    mistakes=[
        Mistake(partial(_round_in_order, sign=0), "each weight goes to its nearest multiple: nothing is corrected",
                ["Compute the error before you overwrite w[q]: afterwards it is 0.", *_BY_THE_INVERSE]),
        Mistake(partial(_round_in_order, sign=-1), "the corrections have the wrong sign: they double what was spoilt",
                _DOWN),
        Mistake(partial(_round_in_order, error=lambda off, inverse, q: off),
                "the error is not divided by H_inv[q, q]", _BY_THE_INVERSE),
        Mistake(partial(_round_in_order, error=lambda off, inverse, q: off * inverse[q, q]),
                "the error is multiplied by H_inv[q, q], and should be divided by it", _BY_THE_INVERSE),
        Mistake(partial(_round_in_order, error=lambda off, inverse, q: off / inverse[q, q].sqrt()),
                "the error is divided by the root of H_inv[q, q]: that goes with a factor of H_inv, not with H_inv",
                _BY_THE_INVERSE),
        Mistake(partial(_round_in_order, update=_never), "H_inv stays as it is: corrections count on weights that are "
                "done", _ELIMINATE),
        Mistake(partial(_round_in_order, update=lambda H, q: H - torch.outer(H[:, q], H[q])),
                "what H_inv loses is not divided by H_inv[q, q]", _ELIMINATE),
        Mistake(partial(_round_in_order, update=lambda H, q: H + torch.outer(H[:, q], H[q]) / H[q, q]),
                "H_inv gains what it should lose", _ELIMINATE),
        Mistake(partial(_round_in_order, update=_never, corrected=lambda q: 0),
                "weights that are done are corrected, too: these are no multiples of the step", [_DONE, *_ELIMINATE]),
        Mistake(partial(_round_in_order, given=True),
                "the error is that of the weight as it was given, not of the corrected one", _TURN),
        Mistake(_of_all_at_once, "all weights are rounded first: a correction no longer sees the one before it", _TURN),
        Mistake(_from_the_last, "the order is from the last to the first", "range(len(w)) begins with the first."),
        Mistake(partial(_round_in_order, rounded=torch.floor), "weights are rounded down, not to the nearest",
                "torch.round, or .round()"),
        Mistake(lambda w, H_inv, step: _round_in_order(w, torch.linalg.inv(H_inv), step),
                "H_inv is inverted: it is the inverse already", _BY_THE_INVERSE),
        Mistake(lambda w, H_inv, step: _round_in_order(w, H_inv, step) / step,
                "these are the integers: multiples of the step are wanted", "Multiply by the step again."),
        Mistake(lambda w, H_inv, step: _round_in_order(w, H_inv, 1.0), "the step is taken to be 1",
                "Divide by the step, round, multiply by the step."),
    ],
)  # fmt: skip


# Exercise 7: a budget of bits

Losses = Mapping[str, Mapping[int, float]]
Bits = Mapping[str, int]

BITS = (2, 3, 4, 6, 8)
MOST, OVER = 1.05, 2.0

HIDDEN = (
    (8, 4.0, 28), (8, 3.0, 16), (10, 4.5, 6), (12, 3.5, 7), (12, 5.0, 4), (16, 3.0, 9), (16, 4.0, 1), (20, 3.5, 5),
)  # fmt: skip
"""Layers, budget and seed of the hidden tables.

What is best by the price of a bit loses 1.008 times as much as the best on average, and as much or less bit by bit from
8 down or from 2 up. Equal bits lose 3.4 times as much, the fewest bits for the largest layers 2.3 times or more, and
bits by the loss alone 1.31 (given where it falls most) or 1.38 times as much (taken where it grows least).
"""


@functools.cache
def _hidden(place: int) -> tuple[dict[str, int], dict[str, dict[int, float]], float]:
    """Layers of 1,000 to 20,000 weights whose losses fall with the bits, each in its own way and not evenly."""
    layers, budget, seed = HIDDEN[place]
    draw = np.random.default_rng(seed)
    weights, losses = {}, {}
    for k in range(layers):
        weights[f"layer{k + 1}"] = count = 64 * round(10 ** draw.uniform(3.0, 4.3) / 64)
        first = 10 ** draw.uniform(-2.0, 0.0) * (count / 1e4) ** draw.uniform(0.0, 0.5)
        rate, uneven = draw.uniform(2.2, 4.5), np.exp(draw.uniform(-0.6, 0.6, len(BITS)))
        falling = np.minimum.accumulate([first * rate ** (2 - b) * u for b, u in zip(BITS, uneven, strict=True)])
        losses[f"layer{k + 1}"] = {b: float(f"{loss:.3g}") for b, loss in zip(BITS, falling, strict=True)}
    return weights, losses, budget


@functools.cache
def _least_loss(place: int) -> float:
    """The best there is: layer by layer, what no other choice beats in both bits and loss."""
    weights, losses, budget = _hidden(place)
    left, total = sum(weights.values()), budget * sum(weights.values())
    used, lost = np.zeros(1), np.zeros(1)
    for name in sorted(weights, key=weights.__getitem__, reverse=True):
        left -= weights[name]
        used = np.concatenate([used + weights[name] * b for b in BITS])
        lost = np.concatenate([lost + losses[name][b] for b in BITS])
        order = np.lexsort((lost, used))
        used, lost = used[order], lost[order]
        better = np.append(True, lost[1:] < np.minimum.accumulate(lost)[:-1])
        keep = better & (used + min(BITS) * left <= total)
        used, lost = used[keep], lost[keep]
    return float(lost.min())


def _used(bits: Bits, weights: Mapping[str, int]) -> int:
    return sum(weights[name] * b for name, b in bits.items())


def _lost(bits: Bits, losses: Losses) -> float:
    return sum(losses[name][b] for name, b in bits.items())


def _fits(bits: Bits, weights: Mapping[str, int], budget: float) -> bool:
    return _used(bits, weights) <= budget * sum(weights.values()) * (1 + 1e-12)


def _priced(weights: Mapping[str, int], losses: Losses, budget: float) -> dict[str, int]:
    """The best of what is best for each layer if a bit costs so much, for all prices: the printed solution."""
    prices = np.logspace(-12, 3, 400)
    fitting = (
        bits
        for price in prices
        if _fits(bits := {name: _at_price(losses[name], price * weights[name]) for name in weights}, weights, budget)
    )
    return min(fitting, key=lambda bits: _lost(bits, losses))


def _at_price(losses: Mapping[int, float], price: float) -> int:
    return min(losses, key=lambda b: losses[b] + price * b)


def _down(
    weights: Mapping[str, int], losses: Losses, budget: float,
    worth: Callable[[int, float, int, int], Any],
) -> dict[str, int]:  # fmt: skip
    """From 8 bits a step down, again and again, where ``worth(weights, loss, from, to)`` is least."""
    bits = dict.fromkeys(weights, max(BITS))
    while not _fits(bits, weights, budget):
        lower = {name: BITS[BITS.index(b) - 1] for name, b in bits.items() if b > min(BITS)}
        name = min(lower, key=lambda n: worth(weights[n], losses[n][lower[n]] - losses[n][bits[n]], bits[n], lower[n]))
        bits[name] = lower[name]
    return bits


def _equal(weights: Mapping[str, int], losses: Losses, budget: float) -> dict[str, int]:
    return dict.fromkeys(weights, max(b for b in BITS if b <= budget))


def _by_loss(weights: Mapping[str, int], losses: Losses, budget: float) -> dict[str, int]:
    return _down(weights, losses, budget, lambda count, loss, now, lower: loss)


def _largest_first(weights: Mapping[str, int], losses: Losses, budget: float) -> dict[str, int]:
    """The largest layer down to 2 bits, then the next."""
    return _down(weights, losses, budget, lambda count, loss, now, lower: -count)


def _largest_in_turns(weights: Mapping[str, int], losses: Losses, budget: float) -> dict[str, int]:
    """All down one step, the largest layers first."""
    return _down(weights, losses, budget, lambda count, loss, now, lower: (-now, -count))


def _up_by_loss(weights: Mapping[str, int], losses: Losses, budget: float) -> dict[str, int]:
    """From 2 bits up, where a step gains most, as long as one fits."""
    bits = dict.fromkeys(weights, min(BITS))
    while True:
        gains = {}
        for name, b in bits.items():
            if b < max(BITS) and _fits({**bits, name: (more := BITS[BITS.index(b) + 1])}, weights, budget):
                gains[name, more] = losses[name][b] - losses[name][more]
        if not gains:
            return bits
        name, more = max(gains, key=gains.__getitem__)
        bits[name] = more


_A_BIT_COSTS = [
    "A step down in a layer of 20,000 weights saves 20 times as many bits as in one of 1,000. What does each cost?",
    "All at 8 bits; then take bits away where the loss per bit saved is least, until the budget is kept.",
]
_EACH_ITS_OWN = [
    "Print the losses of two layers. Where does a bit less cost more?",
    *_A_BIT_COSTS,
]
_HABITS: Sequence[tuple[Rule, str, Hints]] = (
    (_equal, "all layers have the same bits", _EACH_ITS_OWN),
    (_largest_first, "the largest layers have the fewest bits, whatever that costs", _EACH_ITS_OWN),
    (_largest_in_turns, "the largest layers have the fewest bits, whatever that costs", _EACH_ITS_OWN),
    (_by_loss, "bits are taken where the loss grows least, whatever that saves", _A_BIT_COSTS),
    (_up_by_loss, "bits are given where the loss falls most, whatever that takes", _A_BIT_COSTS),
    (lambda weights, losses, budget: dict.fromkeys(weights, min(BITS)), "all layers have 2 bits",
     "How much of the budget is left?"),
)  # fmt: skip
_FORM = [
    "A dict with a number of bits for each layer, one of those that its losses have: {'layer1': 4, …}",
    "Begin with dict.fromkeys(weights, 8), and change numbers in it.",
]
_SUM = "You use the sum of weights[layer] * bits[layer]; you have budget * sum(weights.values())."
_SHORTER = [
    "There are 5 to the power of 20 choices for 20 layers: not all can be tried. And does your loop end at 2 bits?",
    *_A_BIT_COSTS,
]


def _checked_bits(found: Any, losses: Losses, on: str) -> dict[str, int]:
    if not isinstance(found, Mapping):
        raise Wrong(f"your function should return a dict, and returns a {type(found).__name__}{on}", _FORM)
    if missing := [name for name in losses if name not in found]:
        raise Wrong(f"there are no bits for {missing[0]}{on}", _FORM)
    if unknown := [name for name in found if name not in losses]:
        raise Wrong(f"there is no layer {unknown[0]!r}{on}", _FORM)
    for name, bits in found.items():
        if _as_number(bits) not in losses[name]:
            raise Wrong(f"{name} cannot have {bits!r} bits: it has losses for {', '.join(map(str, BITS))}{on}", _FORM)
    return {name: int(found[name]) for name in losses}


def _ratio(place: int, bits: Bits) -> float:
    weights, losses, budget = _hidden(place)
    return _lost(bits, losses) / _least_loss(place) if _fits(bits, weights, budget) else OVER


def _slips(place: int, bits: Bits) -> Iterator[str]:
    """What would lose less within the budget: another number of bits for a layer, or for two of them."""
    weights, losses, budget = _hidden(place)

    def better(changed: Bits) -> bool:
        return (
            _fits({**bits, **changed}, weights, budget)
            and sum(losses[name][b] - losses[name][bits[name]] for name, b in changed.items()) < -1e-9
        )

    def told(name: str, b: int) -> str:
        return f"{name} {b} bits in place of {bits[name]}"

    single = [(name, b) for name in weights for b in BITS if better({name: b})]
    yield from (f"the budget has room to give {told(name, b)}" for name, b in single)
    more = [(name, b) for name in weights for b in BITS if b > bits[name]]
    less = [(name, b) for name in weights for b in BITS if b < bits[name]]
    for name, b in more:
        for other, c in less:
            if other != name and better({name: b, other: c}):
                yield f"give {told(name, b)}, and {told(other, c)}: the budget is kept, and less is lost"


def _said_of(found: Sequence[Bits]) -> tuple[str, Hints]:
    """A habit that explains all choices, or one place where they could be better."""
    for place, bits in enumerate(found):
        weights, _, budget = _hidden(place)
        if not _fits(bits, weights, budget):
            spent = OfThisAnswer(
                f"With {len(weights)} layers and a budget of {budget:g} you use {_used(bits, weights):,} bits, and "
                f"there are {budget * sum(weights.values()):,.0f}."
            )
            return "", [spent, _SUM]
    for rule, message, hints in _HABITS:
        if all(bits == rule(*_hidden(place)) for place, bits in enumerate(found)):
            return f"{message}; ", hints
    worst = max(range(len(found)), key=lambda place: _ratio(place, found[place]))
    slip = next(_slips(worst, found[worst]), None)
    layers, budget, _ = HIDDEN[worst]
    where = [OfThisAnswer(f"With {layers} layers and a budget of {budget:g}, {slip}.")] if slip else []
    return "", [*where, *_A_BIT_COSTS]


def exercise_7(answer: Any) -> None:
    """A budget of bits, on tables not seen before"""
    found = []
    for place, (layers, budget, _) in enumerate(HIDDEN):
        on = f"{layers} layers, a budget of {budget:g}"
        case = _hidden(place)
        bits = within(PATIENCE, f"{endless(PATIENCE)} (on {on})", _SHORTER, partial(call, on=on), answer, *case)
        found.append(_checked_bits(bits, case[1], f" (on {on})"))
    ratios = [_ratio(place, bits) for place, bits in enumerate(found)]
    mean = float(np.mean(ratios))
    if mean > MOST:
        said, hints = _said_of(found)
        each = "; ".join(
            f"{case[:2]}: {f'{ratio:.2f}' if _fits(bits, *_hidden(place)[::2]) else 'over budget'}"
            for place, (case, ratio, bits) in enumerate(zip(HIDDEN, ratios, found, strict=True))
        )
        raise Wrong(f"{said}your choices lose {mean:.3f} times as much as the best on average, the limit is "
                    f"{MOST}; by (layers, budget), {each}", hints)  # fmt: skip


exercise_8 = OpenProject(
    "An open project: smaller, for a place",
    rubric=("the need", "the method", "what it saves", "what it costs", "the verdict"),
)
