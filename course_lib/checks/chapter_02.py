"""Checks of chapter 2, optimizers: four rules to write, a figure to read, a bug to find, a run to design.

The update rules are written out here once more, in float64 and with each usual mistake beside them, so that a check
depends neither on the chapter's module nor on what the learner imports.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from course_lib.lab.data import Dataset, load
from course_lib.lab.exercises import Wrong, call, close, expect_close, expect_unchanged
from course_lib.lab.models import mlp
from course_lib.lab.training import Diverged, Recipe, evaluate, fit, fresh

Rule = Callable[..., Any]
Mistake = tuple[Rule, str, Sequence[str]]  # the mistaken rule, what is wrong with it, hints


def exercise_1(answer: Any) -> None:
    """One step of SGD with momentum."""
    cases = [
        (*_tensors(1, (5,), 3), 0.1, 0.9),
        (*_tensors(2, (3, 4), 3), 0.02, 0.5),
        (*_tensors(3, (2, 3, 2), 2), torch.zeros(2, 3, 2, dtype=torch.float64), 0.3, 0.95),
    ]
    on = ["a vector of weights in mid-training", "a matrix of weights", "the very first step, when v is zero"]
    _judge(answer, _momentum, ("the new w", "the new v"), _MOMENTUM_MISTAKES, cases, on)


def exercise_2(answer: Any) -> None:
    """One step of Adam, with bias correction."""
    _judge(answer, _adam, ("the new w", "the new m", "the new v"), _ADAM_MISTAKES, _adam_cases(), _ADAM_ON)


def exercise_3(answer: Any) -> None:
    """One step of AdamW: weight decay apart from the gradient."""
    cases = [(*case, decay) for case, decay in zip(_adam_cases(), (0.5, 0.1, 0.3, 0.0), strict=True)]
    names = ("the new w", "the new m", "the new v")
    on = [f"{where}, weight_decay {case[-1]:g}" for where, case in zip(_ADAM_ON, cases, strict=True)]
    _judge(answer, _adamw, names, _ADAMW_MISTAKES, cases, on)


def exercise_4(answer: Any) -> None:
    """Orthogonalise a gradient by Newton-Schulz iteration, as Muon does."""
    for rows, columns, kind in ((8, 8, "a square matrix"), (5, 12, "a wide matrix"), (12, 5, "a tall matrix")):
        for scale, size in ((1.0, ""), (40.0, " with large entries"), (1e-2, " with small entries")):
            _judge_orthogonal(answer, scale * _with_spread_singular_values(rows, columns), kind + size)


# What exercises 1 to 3 share


def _judge(
    answer: Any,
    right: Rule,
    names: Sequence[str],
    mistakes: Sequence[Mistake],
    cases: Sequence[tuple[Any, ...]],
    on: Sequence[str],
) -> None:
    """Compare with ``right`` on each case; a result that matches a usual mistake gets that mistake's hint."""
    for case, where in zip(cases, on, strict=True):
        found, expected = call(answer, *case, on=where), right(*case)
        if close(found, expected):
            continue
        for mistaken, message, hints in mistakes:
            if close(found, mistaken(*case)):
                raise Wrong(f"{message} (on {where})", hints)
        _expect_parts(found, expected, names, where)
    for case, where in zip(cases, on, strict=True):
        expect_unchanged(
            answer, *case, on=where,
            hint=["w -= … and v.mul_(…) change the caller's tensors. Which expressions make new ones?",
                  "Write w = w - lr * … instead of w -= lr * …"],
        )  # fmt: skip


def _expect_parts(found: Any, expected: tuple[Tensor, ...], names: Sequence[str], where: str) -> None:
    if not isinstance(found, (tuple, list)) or len(found) != len(expected):
        got = f"{len(found)} values" if isinstance(found, (tuple, list)) else "one value"
        wanted = ", ".join(name.removeprefix("the new ") for name in names)
        raise Wrong(
            f"your function should return {len(expected)} values ({wanted}), and returns {got} (on {where})",
            "The next step needs the state that this one leaves behind.",
        )
    # The state first: a wrong state makes wrong weights.
    for part in (*range(1, len(expected)), 0):
        hint = (
            "The state is right; look at how it becomes a step." if part == 0 else "Look at how this state is updated."
        )
        expect_close(found[part], expected[part], what=names[part], hint=hint, on=where)


def _tensors(seed: int, shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


# Exercise 1: momentum


def _momentum(w: Tensor, g: Tensor, v: Tensor, lr: float, beta: float) -> tuple[Tensor, Tensor]:
    v = beta * v + g
    return w - lr * v, v


def _averaged(w: Tensor, g: Tensor, v: Tensor, lr: float, beta: float) -> tuple[Tensor, Tensor]:
    v = beta * v + (1 - beta) * g
    return w - lr * v, v


def _lr_inside(w: Tensor, g: Tensor, v: Tensor, lr: float, beta: float) -> tuple[Tensor, Tensor]:
    v = beta * v + lr * g
    return w - v, v


_MOMENTUM_MISTAKES: list[Mistake] = [
    (
        _averaged,
        "your v is an average: the gradient enters with a factor (1 - beta)",
        [
            "Torch's SGD sums the gradients with fading weights. Adam averages them. Which factor is left out?",
            "The gradient is added to beta * v as it is.",
        ],
    ),
    (
        lambda w, g, v, lr, beta: (w + lr * (beta * v + g), beta * v + g),
        "your step goes uphill: the new w moves along v",
        ["v points where the loss grows. Which sign takes w down?"],
    ),
    (
        lambda w, g, v, lr, beta: (w + lr * (beta * v - g), beta * v - g),
        "your v holds the negative gradients",
        ["The steps come out right only if v starts at zero and stays yours. Torch keeps the sign for the step of w."],
    ),
    (
        lambda w, g, v, lr, beta: (w - lr * (g + beta * (beta * v + g)), beta * v + g),
        "your step is Nesterov's: it looks one step ahead",
        [
            "The velocity is right, but the step uses g + beta * v. Plain momentum steps along something simpler.",
            "Plain momentum steps along the new v itself.",
        ],
    ),
    (
        lambda w, g, v, lr, beta: (w - lr * v, beta * v + g),
        "your step uses the old v",
        ["In which order are v and w updated? This gradient should already count in this step."],
    ),
    (
        lambda w, g, v, lr, beta: (w - lr * g, beta * v + g),
        "your step uses the gradient alone",
        ["The velocity is updated, and then not used. What should w move along?"],
    ),
    (
        _lr_inside,
        "your v already contains the learning rate",
        ["It makes no difference until lr changes. Torch keeps lr out of v: where does it enter instead?"],
    ),
    (
        lambda w, g, v, lr, beta: tuple(reversed(_momentum(w, g, v, lr, beta))),
        "your function returns v first and w second",
        ["The order asked for is w, v."],
    ),
    (
        lambda w, g, v, lr, beta: _momentum(w, g, v, lr, beta)[0],
        "your function returns only w",
        ["The next step needs the new v too: return w, v."],
    ),
    (
        lambda w, g, v, lr, beta: (_momentum(w, g, v, lr, beta)[0], v),
        "your function returns the old v",
        ["The new w is right. The next step needs the v that this step made."],
    ),
]


# Exercises 2 and 3: Adam and AdamW

_ADAM_ON = [
    "a vector, third step, large eps",
    "a matrix, first step, from zero state",
    "a vector, second step, usual eps",
    "a matrix, hundredth step",
]


def _adam_cases() -> list[tuple[Any, ...]]:
    def state(seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w, g, m, v = _tensors(seed, shape, 4)
        return w, g, m, v.square()

    w, g, m, v = state(12, 3, 4)
    # A large eps first: it shows where eps is added. No state in balance: it shows what is corrected.
    return [
        (*state(11, 6), 3, 0.1, (0.6, 0.8), 0.1),
        (w, g, torch.zeros_like(m), torch.zeros_like(v), 1, 0.01, (0.9, 0.999), 1e-8),
        (*state(13, 5), 2, 0.02, (0.8, 0.95), 1e-8),
        (*state(14, 2, 3), 100, 0.001, (0.9, 0.99), 1e-8),
    ]


def _moments(g: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    return betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g


def _adam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = _moments(g, m, v, betas)
    return w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps), m, v


def _adam_but(direction: Callable[..., Tensor]) -> Rule:
    """Adam with the right moments and another ``direction(m, v, c1, c2, eps)``; c1, c2 correct the bias."""

    def step(
        w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        m, v = _moments(g, m, v, betas)
        return w - lr * direction(m, v, 1 - betas[0] ** t, 1 - betas[1] ** t, eps), m, v

    return step


def _adam_shifted(shift: int) -> Rule:
    return lambda w, g, m, v, t, lr, betas, eps: (
        _adam_at(w, g, m, v, t + shift, lr, betas, eps)
    )  # fmt: skip


def _adam_at(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam at any t, with the NaN or infinity that t = 0 gives in tensors."""
    m, v = _moments(g, m, v, betas)
    corrections = torch.tensor([1 - betas[0] ** t, 1 - betas[1] ** t], dtype=w.dtype)
    return w - lr * (m / corrections[0]) / ((v / corrections[1]).sqrt() + eps), m, v


def _adam_returning_corrected(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    w, m, v = _adam(w, g, m, v, t, lr, betas, eps)
    return w, m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)


def _adam_unsquared(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g
    return w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps), m, v


_NO_CORRECTION = [
    "m and v start at zero. What are they after one step, next to the gradient and its square?",
    "Divide each by one minus its beta to the power t before using it.",
]
_FROM_ONE = [
    "At the very first step, t is already 1. What power of beta should stand there?",
    "Use t as it is handed in: do not add or subtract one.",
]
_ADAM_MISTAKES: list[Mistake] = [
    (_adam_but(lambda m, v, c1, c2, eps: m / (v.sqrt() + eps)), "the bias correction is missing", _NO_CORRECTION),
    (
        _adam_but(lambda m, v, c1, c2, eps: m / c1 / (v.sqrt() + eps)),
        "only m is corrected for its bias",
        ["v starts at zero too. Which beta belongs to it?"],
    ),
    (
        _adam_but(lambda m, v, c1, c2, eps: m / ((v / c2).sqrt() + eps)),
        "only v is corrected for its bias",
        ["m starts at zero too. Which beta belongs to it?"],
    ),
    (
        _adam_but(lambda m, v, c1, c2, eps: (m / c1) / (v / c2 + eps).sqrt()),
        "eps stands inside the root",
        [
            "It guards the division, not the root. Where does it belong?",
            "With 1e-8 inside, the root is never below 1e-4, which holds tiny gradients back. Add eps after it.",
        ],
    ),
    (
        _adam_but(lambda m, v, c1, c2, eps: (m / c1) / ((v.sqrt() + eps) / c2**0.5)),
        "eps is added before the bias of v is corrected",
        ["Correct v first, take the root, and only then add eps."],
    ),
    (
        _adam_but(lambda m, v, c1, c2, eps: (m / c1) / (v / c2 + eps)),
        "the root of v is missing",
        ["v has the unit of a squared gradient. The step should not change when all gradients are doubled."],
    ),
    (
        _adam_but(lambda m, v, c1, c2, eps: -(m / c1) / ((v / c2).sqrt() + eps)),
        "your step goes uphill",
        ["m points where the loss grows. Which sign takes w down?"],
    ),
    (_adam_shifted(1), "t is counted from 0 in your bias correction, and it is handed in counting from 1", _FROM_ONE),
    (_adam_shifted(-1), "your bias correction is one step behind", _FROM_ONE),
    (
        lambda w, g, m, v, t, lr, betas, eps: _adam(w, g, m, v, t, lr, (betas[1], betas[0]), eps),
        "the two betas are swapped",
        ["betas is (for m, for v). Which of the two averages should remember longer?"],
    ),
    (
        _adam_unsquared,
        "v averages the gradient, not its square",
        ["v stands for the size of the gradient, whatever its sign."],
    ),
    (
        _adam_returning_corrected,
        "your function returns the corrected m and v",
        ["The correction is for this step only. What would happen if the next step corrected them again?"],
    ),
    (
        lambda w, g, m, v, t, lr, betas, eps: _adam(w, g, m, v, t, lr, betas, eps)[0],
        "your function returns only w",
        ["The next step needs the new m and v too: return w, m, v."],
    ),
    (
        lambda w, g, m, v, t, lr, betas, eps: (_adam(w, g, m, v, t, lr, betas, eps)[0], m, v),
        "your function returns the old m and v",
        ["The new w is right. The next step needs the m and v that this step made."],
    ),
]


def _adamw(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    moved, m, v = _adam(w, g, m, v, t, lr, betas, eps)
    return moved - lr * weight_decay * w, m, v


def _decayed_after(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    moved, m, v = _adam(w, g, m, v, t, lr, betas, eps)
    return moved * (1 - lr * weight_decay), m, v


def _with_decay(factor: Callable[[float, float], float], rule: Rule = _adam) -> Rule:
    """``rule`` for the step, and ``w`` shrunk by ``factor(lr, weight_decay)``."""

    def step(w: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        moved, m, v = rule(w, *rest[:-1])
        return moved - factor(rest[4], rest[-1]) * w, m, v

    return step


_ADAMW_MISTAKES: list[Mistake] = [
    (
        lambda w, g, m, v, t, lr, betas, eps, decay: _adam(w, g + decay * w, m, v, t, lr, betas, eps),
        "the decay is added to the gradient: that is Adam with L2, not AdamW",
        [
            "There it passes through m and the division by the root of v, so weights with large gradients decay less. "
            "Keep it away from both.",
            "Leave g alone, and shrink w by a factor of its own.",
        ],
    ),
    (
        _with_decay(lambda lr, decay: decay),
        "the decay is not scaled by the learning rate",
        ["If lr were zero, nothing should move, weight decay included."],
    ),
    (
        _decayed_after,
        "the decay comes after the step, so it shrinks the step too",
        ["Only the weights as they were before the step decay. Which of the two lines comes first?"],
    ),
    (
        _with_decay(lambda lr, decay: -lr * decay),
        "the decay makes the weights grow",
        ["Decay pulls w towards zero: the factor on w should be a little below one."],
    ),
    (
        _with_decay(lambda lr, decay: 0.0),
        "there is no weight decay in the step",
        ["The rest is Adam, and right. What happens to w itself?"],
    ),
    (
        _with_decay(lambda lr, decay: lr * decay * decay),
        "the decay enters twice",
        ["The factor on w is one minus a single product."],
    ),
    *[
        (_with_decay(lambda lr, decay: lr * decay, rule), message, hints)
        for rule, message, hints in _ADAM_MISTAKES[:-2]
        if rule is not _adam_returning_corrected
    ],
    (
        lambda *case: _adamw(*case)[0],
        "your function returns only w",
        ["The next step needs the new m and v too: return w, m, v."],
    ),
]


# Exercise 4: orthogonalisation

_LOW, _HIGH = 0.6, 1.25  # five quintic steps leave 0.68 to 1.14; some room for an answer that works in bfloat16
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def _with_spread_singular_values(rows: int, columns: int) -> Tensor:
    """``U diag(s) V^T`` with s from 1 down to 0.05, float32."""
    generator = torch.Generator().manual_seed(100 * rows + columns)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return (u * torch.logspace(0, -1.3, min(rows, columns))) @ vt


def _newton_schulz(g: Tensor, steps: int, coefficients: tuple[float, float, float]) -> Tensor:
    a, b, c = coefficients
    x = g / g.norm()
    for _ in range(steps):
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def _judge_orthogonal(answer: Any, g: Tensor, kind: str) -> None:
    found = call(answer, g, _STEPS, on=kind)
    if isinstance(found, Tensor) and found.shape == g.T.shape != g.shape:
        raise Wrong(
            f"the result should have the shape of its input, and comes out transposed (on {kind})",
            "If you transpose at the start, transpose back at the end.",
        )
    if not isinstance(found, Tensor) or found.shape != g.shape:
        expect_close(found, g, what="the result", on=kind)
    found = found.detach().to(g.dtype)
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    inside = u.T @ found @ vt.T  # U^T X V: diagonal when X has the directions of g
    values = torch.linalg.svdvals(found) if found.isfinite().all() else torch.tensor([torch.nan])
    if not (values.min() >= _LOW and values.max() <= _HIGH):
        raise _why_not_orthogonal(answer, g, found, values, kind)
    off = (inside - inside.diagonal().diag()).abs().max().item()
    if off > 0.1:
        raise Wrong(
            f"the result is orthogonal, but in other directions than its input: off its diagonal, U^T X V reaches "
            f"{off:.2g} (on {kind})",
            "Each step may only change the singular values of X, never its singular vectors: every term is X, or a "
            "product of X X^T with X.",
        )
    if inside.diagonal().min() < 0:
        raise Wrong(
            f"the result is orthogonal, but points in the opposite direction of its input (on {kind})",
            "No sign should change here: the step of w has the minus.",
        )


def _why_not_orthogonal(answer: Any, g: Tensor, found: Tensor, values: Tensor, kind: str) -> Wrong:
    # One step only: later ones would blow rounding errors of a wrong iteration up until they look like a scale.
    if not close(call(answer, 3 * g, 1, on=kind), call(answer, g, 1, on=kind), rtol=0.05, atol=0.02):
        return Wrong(
            f"the result depends on the scale of the input (on {kind})",
            [
                "The iteration only works on singular values from 0 to 1. What makes sure of that at the start?",
                "Divide g by its Frobenius norm before the first step.",
            ],
        )
    if close(found, _newton_schulz(g, _STEPS, (1.5, -0.5, 0.0)), rtol=0.02, atol=0.02):
        return Wrong(
            f"five steps of the cubic iteration leave the small singular values at {values.min():.2g} (on {kind})",
            [
                "The cubic multiplies a small singular value by 1.5 a step. How many steps would it need?",
                "Muon's quintic multiplies it by 3.4445 a step: use its three coefficients.",
            ],
        )
    if close(found, g / g.norm(), rtol=0.02, atol=0.02):
        return Wrong(f"the input is normalised, and then no step is done (on {kind})", "Loop over range(steps).")
    for steps in range(1, _STEPS):
        if close(found, _newton_schulz(g, steps, _QUINTIC), rtol=0.02, atol=0.02):
            return Wrong(f"{steps} of the {_STEPS} steps are done (on {kind})", "Loop over range(steps).")
    if not values.isfinite().all():
        return Wrong(
            f"the iteration runs away: the result is not finite (on {kind})",
            "Every term of a step is X, or a product of A = X X^T with X. Check the products, and then the signs.",
        )
    return Wrong(
        f"the singular values of the result run from {values.min():.2g} to {values.max():.2g}; "
        f"they should lie between {_LOW} and {_HIGH} (on {kind})",
        [
            "Follow one singular value s through one step: it should become 3.4445 s - 4.7750 s^3 + 2.0315 s^5.",
            "With A = X X^T, the step is a X + (b A + c A A) X. Check which coefficient stands where.",
        ],
    )


def exercise_5(answer: Any) -> None:
    """Which line is Lion's? A figure to read."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not all(isinstance(a, str) for a in answer):
        raise Wrong("wanted are the letter of a line and that of a reason", 'For instance: line, reason = "A", "a"')
    line, reason = answer[0].strip().upper(), answer[1].strip(" )").lower()
    if line not in _LINES or reason not in _REASONS:
        raise Wrong(f"there is no line {answer[0]!r} with the reason {answer[1]!r}", "Lines A to D, reasons a to d.")
    if line != "C":
        raise Wrong(f"line {line} {_LINES[line]}", "How long is a step of Lion near the minimum?")
    if reason != "b":
        raise Wrong(f"the line is right, the reason is not: {_REASONS[reason]}", "What does the sign throw away?")


_LINES = {
    "A": "goes on falling: its steps become shorter with the gradient",
    "B": "swings as it falls, and settles",
    "C": "",
    "D": "falls by one factor a step in the end, and so goes on",
}
_REASONS = {
    "a": "that is gradient descent on a bowl",
    "b": "",
    "c": "Lion divides by nothing",
    "d": "that is momentum, and it settles in the end",
}


# Exercise 6: Lion


def exercise_6(answer: Any) -> None:
    """Find the bug: a step of Lion."""
    cases = [
        (*_tensors(61, (6,), 3), 0.01, (0.9, 0.99)),
        (*_tensors(62, (3, 4), 3), 0.1, (0.5, 0.8)),
        (*_tensors(63, (40,), 3), 0.02, (0.8, 0.3)),  # here most signs differ between the mistakes
    ]
    on = ["a vector of weights", "a matrix of weights", "a momentum that forgets fast"]
    _judge(answer, _lion, ("the new w", "the new m"), _LION_MISTAKES, cases[::-1], on[::-1])


def _lion(w: Tensor, g: Tensor, m: Tensor, lr: float, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    update = betas[0] * m + (1 - betas[0]) * g
    return w - lr * update.sign(), betas[1] * m + (1 - betas[1]) * g


def _lion_of_new(w: Tensor, g: Tensor, m: Tensor, lr: float, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    m = betas[1] * m + (1 - betas[1]) * g
    return w - lr * (betas[0] * m + (1 - betas[0]) * g).sign(), m


_LION_MISTAKES: list[Mistake] = [
    (
        _lion_of_new,
        "the step mixes the gradient into the new momentum, which holds it already",
        ["Which m should the mixture see: the one handed in, or the one handed back?", "Update m last."],
    ),
    (
        lambda w, g, m, lr, betas: (_lion(w, g, m, lr, betas)[0], betas[0] * m + (1 - betas[0]) * g),
        "the mixture of the step is kept as the momentum",
        ["The step mixes with the first beta, the momentum with the second."],
    ),
    (
        lambda w, g, m, lr, betas: _lion(w, g, m, lr, betas[::-1]),
        "the two betas are swapped",
        ["betas is (for the step, for the momentum)."],
    ),
    (
        lambda w, g, m, lr, betas: (_lion(w, g, m, lr, betas)[0], m),
        "your function returns the old m",
        ["The next step needs the momentum that this one made."],
    ),
]


# Exercise 7: a run to design

BASE = Recipe(epochs=6, batch_size=100, precision="float64")
SMALLEST_ACCURACY = 0.77
HIDDEN_SEEDS = (801, 802, 803)


def exercise_7(answer: Any) -> None:
    """Design a run: sixty steps to 0.77, by the optimizer alone."""
    if not isinstance(answer, Recipe):
        raise Wrong("wanted is a Recipe", "For instance: mine = replace(base, optimizer=partial(Adam, lr=0.003))")
    others = [f.name for f in fields(Recipe) if f.name != "optimizer"]
    changed = [name for name in others if getattr(answer, name) != getattr(BASE, name)]
    if changed:
        raise Wrong(f"besides the optimizer you changed {', '.join(changed)}", "Start from replace(base, optimizer=…).")
    scores = []
    for seed in HIDDEN_SEEDS:
        data = _hidden_digits(seed)
        try:
            network = fresh(functools.partial(mlp, data.input_shape, len(data.classes), width=64), answer, seed=seed)
            fit(network, data, answer, seed=seed, progress=False)
        except Diverged as error:
            raise Wrong(f"the run diverged: {error}", "A smaller learning rate.") from None
        except Exception as error:  # an optimizer of the learner's own may fail in any way
            raise Wrong(f"training with it raised {type(error).__name__}: {error}") from None
        scores.append(evaluate(network, data.test).accuracy)
    if np.mean(scores) < SMALLEST_ACCURACY:
        raise Wrong(
            f"a mean accuracy of {np.mean(scores):.3f} on {len(scores)} hidden data sets; wanted is at least "
            f"{SMALLEST_ACCURACY}", ("Which methods lead the race of section 5.2, and at which rates?",
                                     "The hidden layers are matrices."),
        )  # fmt: skip


@functools.cache
def _hidden_digits(seed: int) -> Dataset:
    data = load("glyphs", classes="digits", size=16, difficulty=0.5, count=6000, train_size=1000, seed=seed)
    return replace(data, val=data.val.subset(torch.arange(100)))
