"""Checks of chapter 15, model optimization: a roof, a fold, a bug, a scale, a figure, cuts, a policy, a project.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on what the chapter's module computes nor on what the learner imports.
"""

import bisect
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
    expect_close,
    expect_parts,
    parts_of,
)

SHORT_PATIENCE = 1_000_000
"""Lines of Python that an answer may take where each may be a product of tensors."""

_COUNTER = "Print the counter of your loop in each round. Does it reach its end?"


def _in_time(rule: Rule, *case: Any) -> Any:
    return within(PATIENCE, endless(PATIENCE), _COUNTER, rule, *case)


def _number(value: Any) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


# Exercise 1: the roof over a layer


def _linear_roof(
    batch: int, inputs: int, outputs: int, size: int, peak: float, bandwidth: float, *,
    operations: Callable[[int, int, int], int] = lambda n, i, o: 2 * n * i * o,
    numbers: Callable[[int, int, int], int] = lambda n, i, o: n * i + i * o + n * o,
    seconds: Callable[[float, float], float] = max,
    computes: Callable[[float, float, float], bool] = lambda intensity, peak, bandwidth: intensity > peak / bandwidth,
) -> tuple[float, float, str]:  # fmt: skip
    """So many ``operations`` on so many ``numbers``; the ``seconds`` by those of each, and which it waits for."""
    work, moved = operations(batch, inputs, outputs), size * numbers(batch, inputs, outputs)
    bound = "compute" if computes(work / moved, peak, bandwidth) else "memory"
    return work / moved, seconds(work / peak, moved / bandwidth), bound


def _moving_more(times: float) -> Rule:
    """As if each number took so many times its bytes."""
    return lambda batch, inputs, outputs, size, *machine: _linear_roof(batch, inputs, outputs, size * times, *machine)


def _upside_down(*case: Any) -> tuple[float, float, str]:
    intensity, seconds, bound = _linear_roof(*case)
    return 1 / intensity, seconds, bound


def _attained(batch: int, inputs: int, outputs: int, size: int, peak: float, bandwidth: float) -> Any:
    intensity, _, bound = _linear_roof(batch, inputs, outputs, size, peak, bandwidth)
    return intensity, min(peak, bandwidth * intensity), bound


def _named_bound(rule: Rule, *case: Any) -> tuple[Any, Any, float]:
    """What bounds the layer as a number: 1 for compute."""
    *numbers, word = parts_of(_in_time(rule, *case), _ROOF, _THREE)
    if not isinstance(word, str) or word.strip().lower() not in _BOUNDS:
        raise Wrong(f"what bounds it should be {' or '.join(map(repr, _BOUNDS))}, and is {word!r:.60}", _THREE)
    return *numbers, float(_BOUNDS.index(word.strip().lower()))


def _either_at_the_ridge(found: Any, right: Any, *case: Any) -> bool:
    *_, peak, bandwidth = case
    numbers = 2 if math.isclose(right[0], peak / bandwidth) else 3
    return close(found[:numbers], right[:numbers], atol=0)


def _not_by_these_seconds(found: Any, right: Any, *case: Any) -> None:
    expect_parts(found[:2], right[:2], what=_ROOF[:2], hint=_MOVED, atol=0)
    raise Wrong(f"what bounds it is not right: you say {_BOUNDS[int(found[2])]!r}", _LONGER)


_BOUNDS = ("memory", "compute")
_ROOF = ("the intensity", "the seconds", "what bounds it")
_THREE = 'For instance: return 0.5, 1e-6, "memory"'
_MOVED = [
    "Write down the three matrices: [batch, inputs], [inputs, outputs], [batch, outputs]. How many bytes is each?",
    "The intensity is all operations over all bytes: 2 * batch * inputs * outputs over size * (the three together).",
]
_OPERATIONS = [
    "One output is a sum of how many products? And how many outputs are there?",
    "A multiplication and an addition are two operations: 2 * batch * inputs * outputs.",
]
_LONGER = [
    "How long would the arithmetic take alone, and how long the bytes alone? The layer waits for the longer one.",
    "operations / peak against bytes / bandwidth. Or: the intensity against the ridge, peak / bandwidth.",
]
_AT_ONCE = [
    "The roofline lets arithmetic and memory work at the same time. When is the layer done, then?",
    *_LONGER,
]

exercise_1 = Method(
    "The roof over a layer",
    right=_linear_roof,
    ask=_named_bound,
    agree=_either_at_the_ridge,
    explain=_not_by_these_seconds,
    what=_ROOF,
    hint=_MOVED,
    atol=0,
    cases={
        "3 examples, 64 inputs, 48 outputs": (3, 64, 48, 4, 2e11, 2e10),
        "512 examples, 1,024 inputs, 768 outputs": (512, 1024, 768, 2, 1e12, 1e11),
        "a single example": (1, 4096, 1000, 1, 3e12, 5e10),
        "as many examples as inputs and outputs, at the ridge": (64, 64, 64, 4, 32e9, 3e9),
    },
    mistakes=[
        Mistake(partial(_linear_roof, operations=lambda n, i, o: n * i * o),
                "multiplications alone are counted, not the additions", _OPERATIONS),
        Mistake(partial(_linear_roof, operations=lambda n, i, o: 2 * i * o),
                "the operations are those of one example", _OPERATIONS),
        Mistake(partial(_linear_roof, operations=lambda n, i, o: n * (2 * i + 1) * o),
                "an operation for a bias is counted, and there is none", _OPERATIONS),
        Mistake(partial(_linear_roof, numbers=lambda n, i, o: n * i + i * o),
                "the outputs are not counted: they have to be written", _MOVED),
        Mistake(partial(_linear_roof, numbers=lambda n, i, o: i * o + n * o),
                "the inputs are not counted: they have to be read", _MOVED),
        Mistake(partial(_linear_roof, numbers=lambda n, i, o: n * i + n * o),
                "the weights are not counted: they have to be read", _MOVED),
        Mistake(partial(_linear_roof, numbers=lambda n, i, o: i * o), "the weights alone are counted", _MOVED),
        Mistake(partial(_linear_roof, numbers=lambda n, i, o: n * i + i * o + n * o + o),
                "bytes of a bias are counted, and there is none", _MOVED),
        Mistake(partial(_linear_roof, numbers=lambda n, i, o: n * (i + i * o + o)),
                "the weights are read once for each example: once for the batch will do", _MOVED),
        Mistake(partial(_linear_roof, numbers=lambda n, i, o: i + i * o + o),
                "inputs and outputs are those of one example", _MOVED),
        Mistake(lambda batch, inputs, outputs, size, *machine: _linear_roof(batch, inputs, outputs, 1, *machine),
                "numbers are counted, not bytes", "Each number takes size bytes."),
        Mistake(_moving_more(8), "bits are counted, not bytes", "size is in bytes already."),
        Mistake(_upside_down, "the intensity is upside down: these are bytes an operation", _MOVED),
        Mistake(partial(_linear_roof, seconds=lambda arithmetic, moving: arithmetic + moving),
                "the two times are added up", _AT_ONCE),
        # So are the shorter of the two
        Mistake(partial(_linear_roof, seconds=lambda arithmetic, moving: arithmetic),
                "these are the seconds of the arithmetic, and the bytes take longer", _LONGER),
        Mistake(_attained, "these are operations a second, not seconds",
                "Divide the operations by what the machine attains of them in a second."),
        # So is a ridge that is upside down
        Mistake(partial(_linear_roof, computes=lambda intensity, peak, bandwidth: intensity <= peak / bandwidth),
                "the layer waits for the longer of its two times, and you name the other", _LONGER),
        # Right as long as memory bounds
        Mistake(partial(_linear_roof, seconds=lambda arithmetic, moving: moving),
                "these are the seconds of the bytes, and the arithmetic takes longer", _LONGER),
        Mistake(partial(_linear_roof, computes=lambda intensity, peak, bandwidth: intensity > peak),
                "what bounds the layer is memory, whatever the layer is", _LONGER),
    ],
)  # fmt: skip


# Exercise 2: fold a batch norm


def _fold(
    weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, *,
    scale: Callable[[Tensor, Tensor, float], Tensor] = lambda gamma, var, eps: gamma / (var + eps).sqrt(),
    laid: Callable[[Tensor], Tensor] = lambda scale: scale[:, None, None, None],
    shift: Callable[..., Tensor] = lambda bias, scale, beta, mean: (bias - mean) * scale + beta,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weight times the ``scale`` as it is ``laid`` over it, and what its outputs ``shift`` by."""
    times = scale(gamma, var, eps)
    before = torch.zeros_like(mean) if bias is None else bias
    return weight * laid(times), shift(before, times, beta, mean)


def _norm_first(
    weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As if the batch norm came before the convolution."""
    scale = gamma / (var + eps).sqrt()
    before = torch.zeros_like(weight[:, 0, 0, 0]) if bias is None else bias
    return weight * scale[None, :, None, None], before + weight.sum((2, 3)) @ (beta - mean * scale)


def _nothing_without_a_bias(weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, *others: Any) -> Any:
    folded, shifted = _fold(weight, bias, gamma, beta, *others)
    return folded, beta if bias is None else shifted


def _usual_eps(*case: Any) -> tuple[Tensor, Tensor]:
    weight, bias, gamma, beta, mean, var, _ = case
    return _fold(weight, bias, gamma, beta, mean, var, 1e-5)


def _with_or_without(rule: Rule, weight: Tensor, bias: Tensor | None, *norm: Any) -> Any:
    try:
        return _in_time(rule, weight, bias, *norm)
    except Wrong as wrong:
        hints = wrong.hints or ([_NO_BIAS, *_BIAS] if bias is None and "TypeError" in wrong.message else ())
        raise Wrong(wrong.message, hints) from None


def _a_bias_is_none(found: Any, right: Any, weight: Tensor, bias: Tensor | None, *norm: Any) -> None:
    if bias is None and parts_of(found, _FOLDED)[1] is None:
        raise Wrong("the bias is None: a batch norm shifts outputs that had no bias, too", [_NO_BIAS, *_BIAS])


def _norm_case(seed: int, shape: tuple[int, ...], eps: float, *, biased: bool = True, spread: float = 1.0) -> Case:
    outputs = shape[0]
    bias = normal(seed + 1, outputs) if biased else None
    gamma, beta, mean = (normal(seed + place, outputs) for place in (2, 3, 4))
    return normal(seed, *shape), bias, gamma, beta, mean, spread * (0.2 + normal(seed + 5, outputs).abs()), eps


_FOLDED = ("the weight", "the bias")
_SCALE = [
    "The batch norm divides by the standard deviation and multiplies by gamma: by what factor does an output grow?",
    "gamma / (var + eps).sqrt(): one factor for each output channel.",
]
_BIAS = [
    "Let all weights be 0: the convolution gives its bias. What does the batch norm make of it?",
    "(bias - mean) times the factor, plus beta. A convolution without a bias has one of 0.",
]
_LAID = [
    "weight is [O, I, kH, kW], and the factors are [O]. Which of the four axes is theirs?",
    "Give the factors the shape [O, 1, 1, 1]: factors[:, None, None, None].",
]
_NO_BIAS = "bias may be None: what does the convolution add then?"

exercise_2 = Method(
    "Fold a batch norm",
    right=_fold,
    ask=_with_or_without,
    explain=_a_bias_is_none,
    what=_FOLDED,
    hint=[*_SCALE, *_BIAS],
    cases={
        "3 outputs, 3 inputs, 3 by 3": _norm_case(1501, (3, 3, 3, 3), 0.1),
        "5 outputs, 2 inputs, 3 by 4": _norm_case(1511, (5, 2, 3, 4), 1e-3),
        "no bias": _norm_case(1521, (4, 6, 1, 1), 1e-2, biased=False),
        "a single output, hardly any variance": _norm_case(1531, (1, 2, 5, 5), 1e-5, spread=1e-5),
    },
    mistakes=[
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: beta - mean * scale),
                "the convolution's own bias is lost", _BIAS),
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: bias + beta - mean * scale),
                "the convolution's own bias is added as it is: the batch norm scales it, too", _BIAS),
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: bias * scale + beta),
                "the mean is not taken off", _BIAS),
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: bias * scale + beta - mean),
                "the mean is taken off after the scale: it belongs to the outputs before", _BIAS),
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: (bias + mean) * scale + beta),
                "the mean is added, and should be taken off", _BIAS),
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: (bias - mean) * scale), "beta is missing", _BIAS),
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: (bias - mean + beta) * scale),
                "beta is scaled: it is added last", _BIAS),
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: beta), "the bias is beta alone", _BIAS),
        Mistake(partial(_fold, shift=lambda bias, scale, beta, mean: bias), "the bias stays as it was", _BIAS),
        Mistake(partial(_fold, laid=torch.ones_like), "the weight stays as it was", _SCALE),
        Mistake(partial(_fold, scale=lambda gamma, var, eps: gamma / (var + eps)),
                "the factors divide by the variance, not by its root", _SCALE),
        Mistake(partial(_fold, scale=lambda gamma, var, eps: gamma * (var + eps).sqrt()),
                "the factors multiply by the standard deviation, and should divide by it", _SCALE),
        Mistake(partial(_fold, scale=lambda gamma, var, eps: 1 / (var + eps).sqrt()),
                "gamma is missing from the factors", _SCALE),
        Mistake(partial(_fold, scale=lambda gamma, var, eps: gamma / var.sqrt()), "eps is missing", _SCALE),
        Mistake(partial(_fold, scale=lambda gamma, var, eps: gamma / (var.sqrt() + eps)),
                "eps is added to the standard deviation: it belongs to the variance", _SCALE),
        Mistake(partial(_fold, scale=lambda gamma, var, eps: gamma / (var + eps**2).sqrt()),
                "eps is squared", _SCALE),
        Mistake(_usual_eps, "eps is torch's usual one, whatever is handed in", _SCALE),
        Mistake(partial(_fold, laid=lambda scale: scale), "the factors are laid along the kernels' columns", _LAID),
        Mistake(partial(_fold, laid=lambda scale: scale[:, None]), "the factors are laid along the kernels' rows",
                _LAID),
        Mistake(partial(_fold, laid=lambda scale: scale[:, None, None]), "the factors are laid along the inputs",
                _LAID),
        Mistake(_norm_first, "this is a batch norm before the convolution: what is wanted is one behind it",
                ["Which of the two sees x first? Whose channels does the batch norm know?", *_LAID]),
        # Right as long as there is a bias
        Mistake(_nothing_without_a_bias, "without a bias of the convolution, the mean is not taken off", _BIAS),
    ],
)  # fmt: skip


# Exercise 3: softmax in pieces

Rescale = Callable[[Tensor, Tensor], Tensor]


def _rescaled(old: Tensor, new: Tensor) -> Tensor:
    return (old - new).exp()


def _left(old: Tensor, new: Tensor) -> Tensor:
    return torch.ones_like(new)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, block: int, *,
    total_by: Rescale = _rescaled,
    out_by: Rescale = _rescaled,
    first: float = -math.inf,
    top_of: Rescale = torch.maximum,
    width: Callable[[Tensor, Tensor], float] = lambda q, k: len(q) ** 0.5,
    keys: Callable[[int, int], int] = lambda count, block: count,
    end: Rescale = lambda out, total: out / total,
) -> Tensor:  # fmt: skip
    """The sum and the output so far are multiplied by what ``total_by`` and ``out_by`` make of the rising top."""
    top, total, out = q.new_tensor(first), q.new_tensor(0.0), torch.zeros_like(v[0])
    for start in range(0, keys(len(k), block), block):
        scores = k[start : start + block] @ q / width(q, k)
        old, top = top, top_of(top, scores.max())
        weights = (scores - top).exp()
        total = total * total_by(old, top) + weights.sum()
        out = out * out_by(old, top) + weights @ v[start : start + block]
    return end(out, total)


_as_given = partial(_attend, total_by=_left, out_by=_left)


def _at_once(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    return (k @ q / len(q) ** 0.5).softmax(0) @ v


def _by_blocks(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """What each block would give alone, ``[blocks, d]``."""
    pieces = zip(k.split(block), v.split(block), strict=True)
    return torch.stack([_at_once(q, keys, values, block) for keys, values in pieces])


def _new_ones_too(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The factor is applied after the block has been added."""
    top, total, out = q.new_tensor(-math.inf), q.new_tensor(0.0), torch.zeros_like(v[0])
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        scores = keys @ q / len(q) ** 0.5
        old, top = top, torch.maximum(top, scores.max())
        weights = (scores - top).exp()
        total, out = (total + weights.sum()) * (old - top).exp(), (out + weights @ values) * (old - top).exp()
    return out / total


class _AllScores(TorchFunctionMode):
    """Notices a tensor of as many floating-point numbers as there are keys, and attention that is made elsewhere."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys, self.seen = keys, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            whole = made.numel() == self.keys and made.is_floating_point()
            self.seen |= whole or func is F.scaled_dot_product_attention
        return made


def _in_pieces(rule: Rule, q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Any, float]:
    """What the rule gives, and of `_MANY` keys whether it has held all their scores at once.

    It is watched in a run of its own: one that is broken off in the midst would leave torch in this mode.
    """
    found = within(SHORT_PATIENCE, endless(SHORT_PATIENCE), _COUNTER, rule, q, k, v, block)
    if len(k) < _MANY:
        return found, 0.0
    with _AllScores(len(k)) as scores:
        rule(q, k, v, block)
    return found, float(scores.seen)


def _right_and_in_pieces(found: tuple[Any, float], right: tuple[Tensor, float], *case: Any) -> bool:
    return close(found, right)


def _whether_in_pieces(found: tuple[Any, float], right: tuple[Tensor, float], *case: Any) -> None:
    expect_close(found[0], right[0], what="the result", hint=_RISES)
    raise Wrong(_ALL_HELD, _PIECES)


_MANY = 401


def _scores(seed: int, d: int, block: int, scores: Sequence[float] | Tensor) -> Case:
    """Keys whose scores are these, besides what is orthogonal to the query."""
    q = normal(seed, d)
    wanted = torch.as_tensor(scores, dtype=torch.float64)
    k = normal(seed + 1, len(wanted), d)
    k = k - torch.outer(k @ q - wanted * d**0.5, q) / (q @ q)
    return q, k, normal(seed + 2, len(wanted), d), block


_RISES = [
    "The first block was weighed with exp(score - its top). What would it be with the top that came later?",
    "Times exp(old top - new top). What has been summed up so far has to be multiplied by it before more is added.",
    "Both the running sum and the running output were made with the old top.",
]
_UPSIDE_DOWN = [
    "The top rises by 3. Do the weights so far, exp(score - top), become larger or smaller?",
    *_RISES[1:],
]
_BOTH = "out / total is a ratio: what happens to it if only one of the two is rescaled?"
_TOP = [
    "What is exp(1000) as a number? And exp(1000 - 1000)?",
    "Subtract the largest score so far, not 0 and not the block's: then no exponent is above 0.",
]
_LAST = "11 keys in blocks of 4: how many blocks are there, and how long is the last?"
_WIDTH = "The scores are divided by the root of len(q), the number of features: that line was right."
_ONE_SOFTMAX = [
    "A block with small scores should count for little. How much does it count in yours?",
    "Weights without a division, summed over all blocks; one division at the end.",
]
_PIECES = "What is the shape of your scores? In a block there should be block of them, at most."
_ALL_HELD = "all scores are there at once: the result is right, but not made in pieces"

exercise_3 = Method(
    "Find the bug: softmax in pieces",
    right=_attend,
    ask=_in_pieces,
    agree=_right_and_in_pieces,
    explain=_whether_in_pieces,
    what="the result",
    hint=_RISES,
    cases={
        "11 keys, the largest scores late": _scores(
            1541, 3, 4, [0.3, -1.1, 1.7, 0.8, 0.5, -0.4, 1.1, 0.9, 1.2, 3.4, 2.7]
        ),
        "equal scores": _scores(1544, 5, 2, [0.7] * 6),
        "scores around 1,000": _scores(1547, 4, 3, 1000 + 2 * normal(1548, 8)),
        "scores around -1,000": _scores(1551, 4, 3, -1000 + 2 * normal(1552, 8)),
        "scores from 900 down to -900": _scores(1555, 2, 2, torch.linspace(900, -900, 7)),
        "a block larger than the keys": _scores(1558, 3, 16, 2 * normal(1559, 5)),
        "a single key": _scores(1562, 4, 1, [2.5]),
        f"{_MANY} keys": _scores(1565, 6, 8, 3 * normal(1566, _MANY)),
    },
    mistakes=[
        Mistake(_as_given, "what was summed up before the top rose is not rescaled", _RISES),
        Mistake(partial(_attend, out_by=_left), "the running sum is rescaled, the output is not", [_BOTH, *_RISES]),
        Mistake(partial(_attend, total_by=_left), "the output is rescaled, the running sum is not", [_BOTH, *_RISES]),
        Mistake(partial(_attend, total_by=lambda old, new: (new - old).exp().nan_to_num(1.0, 1.0),
                        out_by=lambda old, new: (new - old).exp().nan_to_num(1.0, 1.0)),
                "the factor is upside down: what came before grows when the top rises", _UPSIDE_DOWN),
        Mistake(partial(_attend, total_by=lambda old, new: (new - old).exp(),
                        out_by=lambda old, new: (new - old).exp()),
                "the factor is upside down: at the first block it is infinite", _UPSIDE_DOWN),
        Mistake(_new_ones_too, "the new block is rescaled, too: its weights have the new top already", _RISES),
        Mistake(partial(_attend, total_by=_left, out_by=_left, top_of=lambda old, new: new),
                "each block has a top of its own, and they are added up all the same", _RISES),
        Mistake(partial(_attend, end=lambda out, total: out), "the division by the sum is missing",
                "Weights should sum to 1: which line sees to that?"),
        Mistake(lambda *case: _by_blocks(*case).mean(0), "each block is a softmax of its own, and all count the same",
                _ONE_SOFTMAX),
        Mistake(lambda *case: _by_blocks(*case).sum(0), "each block is a softmax of its own, and they are added up",
                _ONE_SOFTMAX),
        Mistake(lambda *case: _by_blocks(*case)[-1], "the last block alone is there", "What does out hold before?"),
        Mistake(partial(_attend, keys=lambda count, block: count // block * block),
                "the last block is left out if it is shorter", _LAST),
        Mistake(partial(_attend, width=lambda q, k: 1.0), "the scores are not divided by the root of len(q)", _WIDTH),
        Mistake(partial(_attend, width=lambda q, k: float(len(q))), "the scores are divided by len(q), not by its root",
                _WIDTH),
        Mistake(partial(_attend, width=lambda q, k: len(k) ** 0.5),
                "the scores are divided by the root of the number of keys", _WIDTH),
        # Right as long as nothing overflows
        Mistake(partial(_attend, first=0.0, top_of=lambda old, new: old),
                "no top is taken off: exp(1000) is infinite", _TOP),
        Mistake(partial(_attend, first=0.0), "the top begins at 0: if all scores lie far below, all weights are 0",
                [_TOP[0], "-inf lies below every score. And exp(-1000)?"]),
        Mistake(partial(_attend, top_of=lambda old, new: new),
                "the top falls with the blocks: a factor above 1 may be infinite", _TOP),
        # Right, but not made in pieces
        Mistake(_at_once, _ALL_HELD, _PIECES),
    ],
)  # fmt: skip


# Exercise 4: a loss scale that finds itself


def _update(
    scale: float, good: int, finite: bool, growth: float = 2.0, backoff: float = 0.5, interval: int = 4, *,
    full: Callable[[int, int], bool] = lambda good, interval: good >= interval,
    grown: Callable[[float, float], float] = lambda scale, growth: scale * growth,
    anew: Callable[[int], int] = lambda good: 0,
    backed: Callable[[float, float], float] = lambda scale, backoff: scale * backoff,
    broken: Callable[[int], int] = lambda good: 0,
    steps: tuple[bool, bool, bool] = (True, True, False),
) -> tuple[float, int, bool]:  # fmt: skip
    """``steps``: whether there is one after a good step, when the scale grows, and after one that is not finite."""
    if not finite:
        return backed(scale, backoff), broken(good), steps[2]
    if full(good + 1, interval):
        return grown(scale, growth), anew(good + 1), steps[1]
    return scale, good + 1, steps[0]


def _counts_first(scale: float, good: int, finite: bool, growth: float, backoff: float, interval: int) -> Any:
    """The count is looked at before this step is added to it."""
    if not finite:
        return scale * backoff, 0, False
    return (scale * growth, 0, True) if good >= interval else (scale, good + 1, True)


def _grows_whatever_comes(scale: float, good: int, finite: bool, growth: float, backoff: float, interval: int) -> Any:
    if good + 1 >= interval:
        return scale * growth, 0, finite
    return (scale, good + 1, True) if finite else (scale * backoff, 0, False)


def _fixed(**settings: Any) -> Rule:
    """Settings of its own, whatever is handed in."""
    return lambda scale, good, finite, growth, backoff, interval: _update(
        scale, good, finite, **{"growth": growth, "backoff": backoff, "interval": interval, **settings}
    )


def _in_sequence(rule: Rule, scale: float, good: int, came: str, *settings: Any) -> tuple[Tensor, ...]:
    """What becomes of the scale, the count and the step, call by call; of those that ``came``, ``x`` is not finite."""
    rows = []
    for place, mark in enumerate(came):
        scale, good, step = parts_of(_in_time(rule, scale, good, mark == ".", *settings), _STATE, _STATE_FORM)
        row = _number(scale), _number(good), float(step) if isinstance(step, bool) else _number(step)
        for name, value, given in zip(_STATE, row, (scale, good, step), strict=True):
            if math.isnan(value):
                raise Wrong(f"{name} should be a number, and is {given!r:.60}, after {_calls(came, place)}",
                            _STATE_FORM)  # fmt: skip
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


def _calls(came: str, place: int) -> str:
    return f"call {place + 1} of {came!r}, where x is a gradient that is not finite"


def _first_wrong_call(found: Any, right: Any, scale: float, good: int, came: str, *settings: Any) -> None:
    wrong = torch.stack(found).isclose(torch.stack(right)).logical_not()  # [3, calls]
    place = int(wrong.any(0).nonzero()[0])
    part = int(wrong[:, place].nonzero()[0])
    hints = (_SCALES, _COUNTING, _SKIP)
    raise Wrong(f"{_STATE[part]} is not right after {_calls(came, place)}", hints[part])


_STATE = ("the scale", "the count", "whether to step")
_STATE_FORM = "For instance: return scale, good + 1, True"
_SKIP = [
    "The gradients hold infinity. What would become of the weights after a step with them?",
    "step is whether the gradients are finite, and nothing else.",
]
_COUNTING = [
    "Write down good after each step for interval = 4 and seven good steps: 1, 2, 3, and then?",
    "Count this step first. If that makes interval of them, the scale grows and the count is 0 again.",
]
_IN_A_ROW = ["'In a row': what does a step that is not finite do to the count?", "It begins anew: 0."]
_SCALES = [
    "After which steps does the scale change, and by which factor?",
    "interval good ones in a row: times growth. One that is not finite: times backoff, which is below 1.",
]
_HANDED = "growth, backoff and interval are arguments: the values in the first line are only those by default."

exercise_4 = Method(
    "A loss scale that finds itself",
    right=_update,
    ask=_in_sequence,
    explain=_first_wrong_call,
    what=_STATE,
    hint=[*_SCALES, *_COUNTING],
    cases={
        "growth 3, backoff 0.25, interval 6": (8.0, 1, "........x........xx.....x.......", 3.0, 0.25, 6),
        "the usual settings": (65536.0, 0, ".........xx....x...x....."),
        "an interval of 1": (2.0, 0, "..x.", 1.5, 0.5, 1),
        "nothing is finite": (1024.0, 3, "xxxx", 2.0, 0.5, 4),
    },
    mistakes=[
        Mistake(partial(_update, full=lambda good, interval: good > interval, anew=lambda good: 0),
                "the scale grows one step too late", _COUNTING),
        Mistake(_counts_first, "the scale grows one step too late", _COUNTING),
        Mistake(partial(_update, full=lambda good, interval: good >= interval - 1),
                "the scale grows one step too early", _COUNTING),
        Mistake(partial(_update, anew=lambda good: good), "the count is not set back when the scale grows", _COUNTING),
        Mistake(partial(_update, full=lambda good, interval: good % interval == 0, anew=lambda good: good),
                "the count goes on when the scale grows: it should begin anew", _COUNTING),
        Mistake(partial(_update, anew=lambda good: 1), "the count begins at 1 after the scale has grown", _COUNTING),
        Mistake(partial(_update, full=lambda good, interval: False), "the scale never grows", _SCALES),
        Mistake(partial(_update, full=lambda good, interval: True), "the scale grows after each good step", _SCALES),
        Mistake(partial(_update, grown=lambda scale, growth: scale + growth),
                "growth is added, and should be multiplied by", _SCALES),
        Mistake(partial(_update, backed=lambda scale, backoff: scale), "the scale stays as it is when gradients are "
                "not finite", _SCALES),
        Mistake(partial(_update, backed=lambda scale, backoff: scale / backoff), "the scale grows when gradients are "
                "not finite: backoff is divided by", _SCALES),
        Mistake(partial(_update, backed=lambda scale, backoff: scale - backoff),
                "backoff is taken off, and should be multiplied by", _SCALES),
        Mistake(partial(_update, broken=lambda good: good), "the count goes on after a step that is not finite",
                _IN_A_ROW),
        Mistake(partial(_update, broken=lambda good: good + 1), "a step that is not finite is counted as a good one",
                _IN_A_ROW),
        Mistake(partial(_update, broken=lambda good: 1), "the count begins at 1 after a step that is not finite",
                _IN_A_ROW),
        Mistake(partial(_update, broken=lambda good: max(good - 1, 0)), "a step that is not finite takes one off the "
                "count", _IN_A_ROW),
        Mistake(_grows_whatever_comes, "the scale grows when the step is not finite", _SCALES),
        Mistake(partial(_update, steps=(True, True, True)), "there is a step with gradients that are not finite",
                _SKIP),
        Mistake(partial(_update, steps=(False, False, True)), "step is the wrong way round", _SKIP),
        Mistake(partial(_update, steps=(True, False, False)), "there is no step when the scale grows", _SKIP),
        Mistake(partial(_update, steps=(False, False, False)), "there never is a step", _SKIP),
        Mistake(_fixed(growth=2.0), "growth is 2, whatever is handed in", _HANDED),
        Mistake(_fixed(backoff=0.5), "backoff is 0.5, whatever is handed in", _HANDED),
        Mistake(_fixed(interval=4), "interval is 4, whatever is handed in", _HANDED),
        Mistake(_fixed(growth=2.0, backoff=0.5, interval=4), "the settings are the usual ones, whatever is handed in",
                _HANDED),
    ],
)  # fmt: skip


# Exercise 5: which layer gains the factor two

exercise_5 = Reading(
    "Half the bytes: a roofline to read",
    right=("A", "b"),
    choices={
        "A": "",
        "B": "layer B lies at a tenth of the roof above it: its bytes take a tenth of its time at most, and it waits "
             "for something else",
        "C": "layer C lies under the flat part of the roof: it waits for its products, and these stay as slow",
        "D": "layer D lies right of the ridge, and below the roof as well: its bytes are a small part of its time",
    },
    reasons={
        "a": "the figure does not show how many operations a layer does in all: the axis is operations for each byte",
        "b": "",
        "c": "that holds for layer B, and what keeps it there is not its bytes",
        "d": "all intensities double, and none of the four crosses the ridge: layer A moves from 0.25 to 0.5",
    },
    hint=["For each layer: what share of its time would its bytes take alone, at the full bandwidth?",
          "A point on the sloping roof takes just the time of its bytes. Which points lie there?"],
    reason_hint="What does the time of a layer on the sloping part of the roof consist of?",
    called="layer",
)  # fmt: skip


# Exercise 6: where to keep


Way = tuple[int, int, tuple[int, ...]]
"""Of some first layers: the bytes kept, the largest segment, and the cut places."""


def _boundaries(sizes: Sequence[int], k: int) -> list[int]:
    """Segment by segment, for each layer that one may end with, all ways that no other beats in both."""
    n, sums = len(sizes), [0, *itertools.accumulate(sizes)]
    ways: dict[int, list[Way]] = {0: [(0, 0, ())]}
    whole: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(k):
        longer: dict[int, list[Way]] = {}
        for start, (kept, largest, cuts) in ((start, way) for start, some in ways.items() for way in some):
            whole.append((kept + max(largest, sums[n] - sums[start]), cuts))
            for end in range(start + 1, n):
                way = kept + sizes[end - 1], max(largest, sums[end] - sums[start]), (*cuts, end - 1)
                longer.setdefault(end, []).append(way)
        ways = {end: _not_beaten(some) for end, some in longer.items()}
    return [*min(whole)[1]]


def _not_beaten(ways: Sequence[Way]) -> list[Way]:
    """Those that keep less than any with as small a largest segment."""
    left: list[Way] = []
    for way in sorted(ways):
        if not left or way[1] < left[-1][1]:
            left.append(way)
    return left


def _segments(cuts: Sequence[int], n: int) -> list[range]:
    starts = [0, *(cut + 1 for cut in cuts)]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], n], strict=True)]


def _sums(sizes: Sequence[int], cuts: Sequence[int]) -> list[int]:
    return [sum(sizes[layer] for layer in segment) for segment in _segments(cuts, len(sizes))]


def _kept(sizes: Sequence[int], cuts: Sequence[int]) -> int:
    return sum(sizes[cut] for cut in cuts)


def _peak(sizes: Sequence[int], cuts: Sequence[int]) -> int:
    return _kept(sizes, cuts) + max(_sums(sizes, cuts))


def _ends_once(sizes: Sequence[int], cuts: Sequence[int]) -> int:
    """A segment without its own end, which is kept."""
    ends = [*(sizes[cut] for cut in cuts), 0]
    return _kept(sizes, cuts) + max(total - end for total, end in zip(_sums(sizes, cuts), ends, strict=True))


def _freed(sizes: Sequence[int], cuts: Sequence[int]) -> int:
    """The ends of segments that are done are given back."""
    before = [0, *itertools.accumulate(sizes[cut] for cut in cuts)]
    return max(held + total for held, total in zip(before, _sums(sizes, cuts), strict=True))


def _all_cuts(n: int, k: int) -> Iterator[tuple[int, ...]]:
    """All cuts of n layers into at most k segments."""
    return itertools.chain.from_iterable(itertools.combinations(range(n - 1), count) for count in range(min(k, n)))


def _least(peak: Callable[[Sequence[int], Sequence[int]], int]) -> Rule:
    return lambda sizes, k: [*min(_all_cuts(len(sizes), k), key=partial(peak, sizes))]


def _exactly(sizes: Sequence[int], k: int) -> list[int]:
    cuts = itertools.combinations(range(len(sizes) - 1), min(k, len(sizes)) - 1)
    return [*min(cuts, key=partial(_peak, sizes))]


def _evenly(sizes: Sequence[int], k: int) -> list[int]:
    n = len(sizes)
    return sorted({n * part // k - 1 for part in range(1, k)} - {-1, n - 1})


def _by_the_root(sizes: Sequence[int], k: int) -> list[int]:
    return _evenly(sizes, round(len(sizes) ** 0.5))


def _smallest(sizes: Sequence[int], k: int) -> list[int]:
    return sorted(sorted(range(len(sizes) - 1), key=sizes.__getitem__)[: k - 1])


def _one_by_one(sizes: Sequence[int], k: int) -> list[int]:
    """The best further cut, again and again, as long as one helps."""
    cuts: list[int] = []
    while len(cuts) < k - 1:
        more = min((sorted({*cuts, place}) for place in range(len(sizes) - 1)), key=partial(_peak, sizes))
        if _peak(sizes, more) >= _peak(sizes, cuts):
            break
        cuts = more
    return cuts


def _filled(sizes: Sequence[int], k: int) -> list[int]:
    """A segment ends when it holds its equal part of the bytes."""
    cuts: list[int] = []
    held = 0
    for layer, size in enumerate(sizes[:-1]):
        held += size
        if held >= sum(sizes) / k and len(cuts) < k - 1:
            cuts.append(layer)
            held = 0
    return cuts


def _cut(rule: Rule, sizes: Sequence[int], k: int) -> Any:
    found = within(PATIENCE, endless(PATIENCE), _TOO_MANY, rule, sizes, k)
    places = _places(found)
    return found if places is None else places


def _places(found: Any) -> list[int] | None:
    """The cut places as whole numbers; None for what is no row of them."""
    try:
        values = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    if values.ndim != 1 or values.dtype == torch.bool or values.is_complex():
        return None
    whole = values.isfinite().all() and bool((values == values.to(torch.int64)).all())
    return [int(value) for value in values.tolist()] if whole else None


def _no_cuts(cuts: Sequence[int], n: int, k: int) -> str:
    """What keeps these from cutting n layers into at most k segments; nothing if they do."""
    if beyond := [cut for cut in cuts if not 0 <= cut < n]:
        return f"there is no layer {beyond[0]}: they are 0 to {n - 1}"
    if n - 1 in cuts:
        return "the last layer is among the cut places: the last segment ends there by itself"
    if any(later <= earlier for earlier, later in itertools.pairwise(cuts)):
        return "the cut places do not ascend"
    if len(cuts) > k - 1:
        return f"at most {k} segments have at most {k - 1} cut places, and there are {len(cuts)}"
    return ""


def _is_least(found: Any, right: list[int], sizes: Sequence[int], k: int) -> bool:
    cuts = _places(found)
    return cuts is not None and not _no_cuts(cuts, len(sizes), k) and _peak(sizes, cuts) == _peak(sizes, right)


def _what_is_wrong_with_the_cuts(found: Any, right: list[int], sizes: Sequence[int], k: int) -> None:
    cuts = _places(found)
    if cuts is None:
        raise Wrong(f"your function should return a list of layers' numbers, and this {type(found).__name__} is none",
                    "For instance: [2, 5]. Without a cut: []")  # fmt: skip
    if why := _no_cuts(cuts, len(sizes), k):
        raise Wrong(why, _FORM)
    kept, largest = _kept(sizes, cuts), max(_sums(sizes, cuts))
    more = kept + largest - _peak(sizes, right)
    raise Wrong(f"you keep {kept:,} bytes, the largest segment has {largest:,}, and together {more:,} of them can be "
                "saved", [*_COUNT_BOTH, *_BOUND])  # fmt: skip


_FORM = [
    "Four layers in two segments of two: the first ends with layer 1, so [1].",
    "The number of a segment's last layer, counted from 0, for each segment but the last.",
]
_COUNT_BOTH = [
    "Take three layers and two segments, and compute the peak of each cut by hand: kept plus largest segment.",
    "sum(sizes[cut] for cut in cuts) + max(sum(segment) for each segment), each segment with its last layer.",
]
_BOUND = [
    "Suppose you knew that no segment may have more than 100 bytes. Which cuts keep the fewest bytes then?",
    "The largest segment is one of n (n + 1) / 2 stretches: try the size of each as the bound, and let a table say "
    "for each layer what is kept at least from there on.",
]
_FEWER = [
    "A further cut keeps a further output. Does it always make up for it?",
    "At most k: compare with fewer segments, too.",
]
_TOO_MANY = [
    "40 layers in 8 segments: math.comb(39, 7) ways to cut. How long do you take for each?",
    *_BOUND,
]


def _chain(seed: int, layers: int) -> list[int]:
    """Outputs whose sizes differ widely, as of a network that narrows and widens."""
    draw = random.Random(seed)
    return [round(10 ** (1 + 1.5 * draw.random())) for _ in range(layers)]


exercise_6 = Method(
    "Where to keep",
    right=_boundaries,
    ask=_cut,
    agree=_is_least,
    explain=_what_is_wrong_with_the_cuts,
    what="the cut places",
    hint=_BOUND,
    cases={
        "12 layers, at most 4 segments": (_chain(569, 12), 4),
        "9 layers, at most 7 segments": (_chain(5, 9), 7),
        "6 layers, a single segment": (_chain(6, 6), 1),
        "10 equal layers, at most 3 segments": ([64] * 10, 3),
        "5 layers, at most 9 segments": ([5, 400, 3, 300, 20], 9),
        "a single layer": ([100], 2),
        "40 layers, at most 8 segments": (_chain(0, 40), 8),
    },
    mistakes=[
        Mistake(lambda sizes, k: [], "nothing is cut: all outputs are held at once", _COUNT_BOTH),
        Mistake(_evenly, "the segments have as many layers each, whatever these hold", _COUNT_BOTH),
        Mistake(_by_the_root, "the segments have as many layers each, about the root of them all", _COUNT_BOTH),
        Mistake(_filled, "each segment ends when it has its equal part of the bytes, whatever is kept there", _BOUND),
        Mistake(_smallest, "the smallest outputs are kept, whatever lies between them", _COUNT_BOTH),
        Mistake(_least(lambda sizes, cuts: max(_sums(sizes, cuts))),
                "the largest segment is as small as can be, but what is kept is not counted", _COUNT_BOTH),
        Mistake(_least(_ends_once), "a segment is counted without its last output: it counts in both",
                _COUNT_BOTH),
        Mistake(_least(_freed), "outputs kept for segments that are done are taken to be gone: here all are counted",
                _COUNT_BOTH),
        Mistake(lambda sizes, k: _boundaries(sizes, k + 1), "there is one segment too many: k segments have k - 1 cuts",
                _FORM),
        Mistake(lambda sizes, k: _boundaries(sizes, max(k - 1, 1)), "there is one segment fewer than there may be",
                _FORM),
        Mistake(lambda sizes, k: [cut + 1 for cut in _boundaries(sizes, k)],
                "these are the first layers of the segments: the last ones are wanted", _FORM),
        Mistake(lambda sizes, k: [*_boundaries(sizes, k), len(sizes) - 1],
                "the last layer is among the cut places: the last segment ends there by itself", _FORM),
        Mistake(_one_by_one, "each cut is the best further one: together others are better", _BOUND),
        # Right as long as each cut is worth what it keeps
        Mistake(_exactly, "there are k segments, and fewer would be better", _FEWER),
    ],
)  # fmt: skip


# Exercise 7: a batching policy


class Load(NamedTuple):
    """Requests ``rate`` a second; batches of ``fixed`` seconds, and ``each`` for a request; answers within ``limit``.

    ``least`` is the machine's busy share with the best policy of a grid, of those that keep the limit.
    """

    rate: float
    fixed: float
    each: float
    limit: float
    least: float


HIDDEN = (
    Load(5, 0.02, 0.005, 0.5, 0.056),
    Load(40, 0.05, 0.004, 0.4, 0.313),
    Load(400, 0.02, 0.001, 0.1, 0.761),
    Load(20, 0.05, 0.03, 0.6, 0.754),
    Load(100, 0.03, 0.007, 0.5, 0.818),
    Load(1000, 0.01, 0.0006, 0.06, 0.938),
    Load(10, 0.1, 0.05, 1.0, 0.674),
    Load(60, 0.08, 0.002, 0.25, 0.621),
)

REQUESTS, SEED = 5000, 1500
PUNCTUAL = 0.95
MOST, LATE = 1.1, 2.0


@functools.cache
def _arrivals(place: int, seed: int = SEED) -> tuple[float, ...]:
    """Seconds at which requests come, at random and each on its own."""
    draw = random.Random(seed + place)
    between = (-math.log(1 - draw.random()) / HIDDEN[place].rate for _ in range(REQUESTS))
    return tuple(itertools.accumulate(between))


def _serve(place: int, max_batch: float, max_wait: float, seed: int = SEED) -> tuple[float, float]:
    """The share of the requests that are answered within the limit, and the machine's busy seconds for each second.

    A batch begins when it is full or its oldest request has waited ``max_wait``, but not before the machine is free,
    and takes what waits then.
    """
    _, fixed, each, limit, _ = HIDDEN[place]
    came = _arrivals(place, seed)
    largest = int(min(max_batch, len(came)))
    free = busy = 0.0  # when the machine is done, and the seconds that it has worked
    first = punctual = 0
    while first < len(came):
        full = came[first + largest - 1] if first + largest <= len(came) else math.inf
        start = max(free, min(full, came[first] + max_wait))
        end = min(first + largest, bisect.bisect_right(came, start))
        seconds = fixed + each * (end - first)
        free, busy = start + seconds, busy + seconds
        punctual += end - bisect.bisect_left(came, free - limit, first, end)
        first = end
    return punctual / len(came), busy / came[-1]


def _ratio(place: int, max_batch: float, max_wait: float, seed: int = SEED) -> float:
    punctual, busy = _serve(place, max_batch, max_wait, seed)
    return busy / HIDDEN[place].least if punctual >= PUNCTUAL else LATE


Policy = tuple[float, float]

_PAIR = ("max_batch", "max_wait")
_FORM_OF_A_POLICY = "For instance: return 8, 0.05"
_HOW_LONG = [
    "A batch whose oldest request waits max_wait seconds: how many have come by then, and how long does it take?",
    "max_wait + fixed + each * n is what the oldest one waits for its answer, and n is 1 + rate * max_wait on average.",
    "Some batches are larger than on average: by the root of n, or twice that. Leave room for them.",
]
_KEEP_UP = [
    "The machine does n requests in fixed + each * n seconds. How large must n be so that it keeps up with rate?",
    *_HOW_LONG,
]
_LONGER_WAIT = [
    "Each batch costs fixed seconds, however many share it. How long may they wait for each other?",
    *_HOW_LONG,
]


def _keeps_up(load: Load, max_batch: float) -> bool:
    return load.rate * (load.fixed / max_batch + load.each) < 1


_HABITS: Sequence[tuple[Callable[[Sequence[Policy]], bool], str, Hints]] = (
    (lambda found: all(batch == 1 for batch, _ in found), "each request goes alone", _KEEP_UP),
    (lambda found: all(wait == 0 for _, wait in found), "no batch waits for more", _LONGER_WAIT),
    (lambda found: all(wait >= load.limit for load, (_, wait) in zip(HIDDEN, found, strict=True)),
     "max_wait is all of the limit, and nothing is left for the batch's own time", _HOW_LONG),
    (lambda found: len({round(wait / load.limit, 4) for load, (_, wait) in zip(HIDDEN, found, strict=True)}) == 1,
     "max_wait is the same part of the limit everywhere, whatever a batch takes", _HOW_LONG),
)  # fmt: skip


def _checked_policy(found: Any, on: str) -> Policy:
    batch, wait = map(_number, parts_of(found, _PAIR, _FORM_OF_A_POLICY))
    if not batch >= 1 or (batch < math.inf and batch != int(batch)):
        raise Wrong(f"max_batch should be a whole number of at least 1, and is {found[0]!r:.60} (on {on})",
                    _FORM_OF_A_POLICY)  # fmt: skip
    if not 0 <= wait < math.inf:
        raise Wrong(f"max_wait should be a number of seconds, at least 0, and is {found[1]!r:.60} (on {on})",
                    _FORM_OF_A_POLICY)  # fmt: skip
    return batch, wait


def _named(load: Load) -> str:
    return f"{load.rate:g} a second, fixed {load.fixed:g}, each {load.each:g}, limit {load.limit:g}"


def _at_its_worst(found: Sequence[Policy]) -> tuple[str, Hints]:
    """Where the policy falls short most, and in what way."""
    place = max(range(len(HIDDEN)), key=lambda place: _ratio(place, *found[place]))
    load, (batch, wait) = HIDDEN[place], found[place]
    punctual, busy = _serve(place, batch, wait)
    if not _keeps_up(load, batch):
        most = batch / (load.fixed + load.each * batch)
        return (f"With {_named(load)}, no more than {most:.3g} requests a second are done in batches of {batch:g}: "
                "they pile up."), _KEEP_UP  # fmt: skip
    if punctual < PUNCTUAL:
        oldest = wait + load.fixed + load.each * min(batch, 1 + load.rate * wait)
        return (f"With {_named(load)}, {punctual:.1%} are answered in time. On average the oldest of a batch waits "
                f"{oldest:.3g} s for its answer, longer if that is large or the machine busy."), _HOW_LONG  # fmt: skip
    return (f"With {_named(load)}, {punctual:.1%} are answered in time, and the machine works {busy / load.least:.2f} "
            "times as long as it must: batches may be larger."), _LONGER_WAIT  # fmt: skip


def exercise_7(answer: Any) -> None:
    """A batching policy, on loads not seen before"""
    found = []
    for load in HIDDEN:
        on = _named(load)
        told = f"{endless(PATIENCE)} (on {on})"
        made = within(PATIENCE, told, _HOW_LONG, partial(call, on=on), answer, *load[:4])
        found.append(_checked_policy(made, on))
    ratios = [_ratio(place, *policy) for place, policy in enumerate(found)]
    mean = float(np.mean(ratios))
    if mean > MOST:
        worst, hints = _at_its_worst(found)
        here = OfThisAnswer(worst)
        habit = next(((said, hint) for has, said, hint in _HABITS if has(found)), None)
        said, hints = (f"{habit[0]}; ", habit[1]) if habit else ("", hints)
        each = "; ".join(
            f"{load[:4]}: {'late' if ratio == LATE else f'{ratio:.2f}'}"
            for load, ratio in zip(HIDDEN, ratios, strict=True)
        )
        raise Wrong(f"{said}by your policy the machine works {mean:.3f} times as long as it must on average, "
                    f"the limit is {MOST}; by (rate, fixed, each, limit), {each}", [here, *hints])  # fmt: skip


exercise_8 = OpenProject(
    "An open project: make a job of your own faster",
    rubric=("where time goes", "the rungs", "what each brings", "the result is the same", "the verdict"),
)
