"""Checks of chapter 2, optimizers: four rules to write, a figure to read, a bug to find, a run to design.

The update rules are written out here once more, in float64 and with each usual mistake beside them, so that a check
depends neither on the chapter's module nor on what the learner imports.
"""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_lib.checks import digits
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
from course_lib.lab.training import Recipe

Step = tuple[Tensor, ...]  # the new w, and then the new state


def _tensors(seed: int, shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def _state_first(*names: str) -> Rule:
    """Explains a step part by part, w last: a wrong state makes wrong weights."""

    def explain(found: Any, right: Step, *case: Any) -> None:
        parts = parts_of(found, names, "The next step needs the state that this one leaves behind.")
        for name, part, expected in list(zip(names, parts, right, strict=True))[1:]:
            expect_close(part, expected, what=name, hint="Look at how this state is updated.")
        expect_close(parts[0], right[0], what=names[0], hint="The state is right; look at how it becomes a step.")

    return explain


_NEW_ONES = [
    "w -= … and v.mul_(…) change the caller's tensors. Which expressions make new ones?",
    "Write w = w - lr * … instead of w -= lr * …",
]
_RETURN_ALL = "The next step needs the new m and v too: return w, m, v."


# Exercise 1: momentum


def _momentum(w: Tensor, g: Tensor, v: Tensor, lr: float, beta: float) -> Step:
    v = beta * v + g
    return w - lr * v, v


exercise_1 = Method(
    "One step of SGD with momentum",
    right=_momentum,
    explain=_state_first("the new w", "the new v"),
    unchanged=_NEW_ONES,
    cases={
        "a vector of weights in mid-training": (*_tensors(1, (5,), 3), 0.1, 0.9),
        "a matrix of weights": (*_tensors(2, (3, 4), 3), 0.02, 0.5),
        "the very first step, when v is zero": (
            *_tensors(3, (2, 3, 2), 2), torch.zeros(2, 3, 2, dtype=torch.float64), 0.3, 0.95
        ),
    },
    mistakes=[
        Mistake(lambda w, g, v, lr, beta: _momentum(w, (1 - beta) * g, v, lr, beta),
                "your v is an average: the gradient enters with a factor (1 - beta)",
                ["Torch's SGD sums the gradients with fading weights. Adam averages them. Which factor is left out?",
                 "The gradient is added to beta * v as it is."]),
        Mistake(lambda w, g, v, lr, beta: _momentum(w, g, v, -lr, beta),
                "your step goes uphill: the new w moves along v",
                "v points where the loss grows. Which sign takes w down?"),
        Mistake(lambda w, g, v, lr, beta: _momentum(w, -g, v, -lr, beta), "your v holds the negative gradients",
                "The steps come out right only if v starts at zero and stays yours. Torch keeps the sign for the step "
                "of w."),
        Mistake(lambda w, g, v, lr, beta: (w - lr * (g + beta * (beta * v + g)), beta * v + g),
                "your step is Nesterov's: it looks one step ahead",
                ["The velocity is right, but the step uses g + beta * v. Plain momentum steps along something simpler.",
                 "Plain momentum steps along the new v itself."]),
        Mistake(lambda w, g, v, lr, beta: (w - lr * v, beta * v + g), "your step uses the old v",
                "In which order are v and w updated? This gradient should already count in this step."),
        Mistake(lambda w, g, v, lr, beta: (w - lr * g, beta * v + g), "your step uses the gradient alone",
                "The velocity is updated, and then not used. What should w move along?"),
        Mistake(lambda w, g, v, lr, beta: _momentum(w, lr * g, v, 1, beta), "your v already contains the learning rate",
                "It makes no difference until lr changes. Torch keeps lr out of v: where does it enter instead?"),
        Mistake(lambda *case: _momentum(*case)[::-1], "your function returns v first and w second",
                "The order asked for is w, v."),
        Mistake(lambda *case: _momentum(*case)[0], "your function returns only w",
                "The next step needs the new v too: return w, v."),
        Mistake(lambda w, g, v, *rest: (_momentum(w, g, v, *rest)[0], v), "your function returns the old v",
                "The new w is right. The next step needs the v that this step made."),
    ],
)  # fmt: skip


# Exercises 2 and 3: Adam and AdamW


def _in_mid_training(seed: int, *shape: int) -> Step:
    w, g, m, v = _tensors(seed, shape, 4)
    return w, g, m, v.square()


def _at_the_start(seed: int, *shape: int) -> Step:
    w, g, m, v = _in_mid_training(seed, *shape)
    return w, g, 0 * m, 0 * v


# A large eps first: it shows where eps is added. No state in balance: it shows what is corrected.
_ADAM_CASES: dict[str, tuple[Any, ...]] = {
    "a vector, third step, large eps": (*_in_mid_training(11, 6), 3, 0.1, (0.6, 0.8), 0.1),
    "a matrix, first step, from zero state": (*_at_the_start(12, 3, 4), 1, 0.01, (0.9, 0.999), 1e-8),
    "a vector, second step, usual eps": (*_in_mid_training(13, 5), 2, 0.02, (0.8, 0.95), 1e-8),
    "a matrix, hundredth step": (*_in_mid_training(14, 2, 3), 100, 0.001, (0.9, 0.99), 1e-8),
}


def _adam(
    w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float, *,
    direction: Rule = lambda m, v, c1, c2, eps: (m / c1) / ((v / c2).sqrt() + eps),
    square: Rule = torch.square, late: int = 0,
) -> Step:  # fmt: skip
    """Adam; ``direction(m, v, c1, c2, eps)``, where c1 and c2 correct the bias, and the rest make the mistakes."""
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * square(g)
    return w - lr * direction(m, v, 1 - betas[0] ** (t + late), 1 - betas[1] ** (t + late), eps), m, v


def _returning_corrected(w: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: Any, eps: float) -> Step:
    w, m, v = _adam(w, g, m, v, t, lr, betas, eps)
    return w, m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)


_FROM_ONE = [
    "At the very first step, t is already 1. What power of beta should stand there?",
    "Use t as it is handed in: do not add or subtract one.",
]
_ADAM_MISTAKES = [
    Mistake(partial(_adam, direction=lambda m, v, c1, c2, eps: m / (v.sqrt() + eps)), "the bias correction is missing",
            ["m and v start at zero. What are they after one step, next to the gradient and its square?",
             "Divide each by one minus its beta to the power t before using it."]),
    Mistake(partial(_adam, direction=lambda m, v, c1, c2, eps: m / c1 / (v.sqrt() + eps)),
            "only m is corrected for its bias", "v starts at zero too. Which beta belongs to it?"),
    Mistake(partial(_adam, direction=lambda m, v, c1, c2, eps: m / ((v / c2).sqrt() + eps)),
            "only v is corrected for its bias", "m starts at zero too. Which beta belongs to it?"),
    Mistake(partial(_adam, direction=lambda m, v, c1, c2, eps: (m / c1) / (v / c2 + eps).sqrt()),
            "eps stands inside the root",
            ["It guards the division, not the root. Where does it belong?",
             "With 1e-8 inside, the root is never below 1e-4, which holds tiny gradients back. Add eps after it."]),
    Mistake(partial(_adam, direction=lambda m, v, c1, c2, eps: (m / c1) / ((v.sqrt() + eps) / c2**0.5)),
            "eps is added before the bias of v is corrected",
            "Correct v first, take the root, and only then add eps."),
    Mistake(partial(_adam, direction=lambda m, v, c1, c2, eps: (m / c1) / (v / c2 + eps)),
            "the root of v is missing",
            "v has the unit of a squared gradient. The step should not change when all gradients are doubled."),
    Mistake(lambda w, g, m, v, t, lr, *rest: _adam(w, g, m, v, t, -lr, *rest), "your step goes uphill",
            "m points where the loss grows. Which sign takes w down?"),
    Mistake(partial(_adam, late=1),
            "t is counted from 0 in your bias correction, and it is handed in counting from 1", _FROM_ONE),
    Mistake(partial(_adam, late=-1), "your bias correction is one step behind", _FROM_ONE),
    Mistake(lambda w, g, m, v, t, lr, betas, eps: _adam(w, g, m, v, t, lr, betas[::-1], eps),
            "the two betas are swapped",
            "betas is (for m, for v). Which of the two averages should remember longer?"),
    Mistake(partial(_adam, square=lambda g: g), "v averages the gradient, not its square",
            "v stands for the size of the gradient, whatever its sign."),
    Mistake(_returning_corrected, "your function returns the corrected m and v",
            "The correction is for this step only. What would happen if the next step corrected them again?"),
    Mistake(lambda w, g, m, v, *rest: (_adam(w, g, m, v, *rest)[0], m, v), "your function returns the old m and v",
            "The new w is right. The next step needs the m and v that this step made."),
]  # fmt: skip

exercise_2 = Method(
    "One step of Adam, with bias correction",
    right=_adam,
    explain=_state_first("the new w", "the new m", "the new v"),
    unchanged=_NEW_ONES,
    cases=_ADAM_CASES,
    mistakes=[
        *_ADAM_MISTAKES,
        Mistake(lambda *case: _adam(*case)[0], "your function returns only w", _RETURN_ALL),
    ],
)


def _adamw(*case: Any, adam: Rule = _adam, share: Rule = lambda lr, decay: lr * decay) -> Step:
    """``adam`` for the step, and w shrunk by a ``share(lr, weight_decay)`` of what it was before."""
    w, *_, lr, _, _, decay = case
    moved, m, v = adam(*case[:-1])
    return moved - share(lr, decay) * w, m, v


def _decayed_after(*case: Any) -> Step:
    moved, m, v = _adam(*case[:-1])
    return moved * (1 - case[5] * case[-1]), m, v


exercise_3 = Method(
    "One step of AdamW: weight decay apart from the gradient",
    right=_adamw,
    explain=_state_first("the new w", "the new m", "the new v"),
    unchanged=_NEW_ONES,
    cases={
        f"{on}, weight_decay {decay:g}": (*case, decay)
        for (on, case), decay in zip(_ADAM_CASES.items(), (0.5, 0.1, 0.3, 0.0), strict=True)
    },
    mistakes=[
        Mistake(lambda w, g, *rest: _adam(w, g + rest[-1] * w, *rest[:-1]),
                "the decay is added to the gradient: that is Adam with L2, not AdamW",
                ["There it passes through m and the division by the root of v, so weights with large gradients decay "
                 "less. Keep it away from both.", "Leave g alone, and shrink w by a factor of its own."]),
        Mistake(partial(_adamw, share=lambda lr, decay: decay), "the decay is not scaled by the learning rate",
                "If lr were zero, nothing should move, weight decay included."),
        Mistake(_decayed_after, "the decay comes after the step, so it shrinks the step too",
                "Only the weights as they were before the step decay. Which of the two lines comes first?"),
        Mistake(partial(_adamw, share=lambda lr, decay: -lr * decay), "the decay makes the weights grow",
                "Decay pulls w towards zero: the factor on w should be a little below one."),
        Mistake(partial(_adamw, share=lambda lr, decay: 0.0), "there is no weight decay in the step",
                "The rest is Adam, and right. What happens to w itself?"),
        Mistake(partial(_adamw, share=lambda lr, decay: lr * decay * decay), "the decay enters twice",
                "The factor on w is one minus a single product."),
        *[Mistake(partial(_adamw, adam=mistake.rule), mistake.message, mistake.hint) for mistake in _ADAM_MISTAKES],
        Mistake(lambda *case: _adamw(*case)[0], "your function returns only w", _RETURN_ALL),
    ],
)  # fmt: skip


# Exercise 4: orthogonalisation

_LOW, _HIGH = 0.6, 1.25  # five quintic steps leave 0.68 to 1.14; some room for an answer that works in bfloat16
_STEPS = 5


def _with_spread_singular_values(rows: int, columns: int) -> Tensor:
    """``U diag(s) V^T`` with s from 1 down to 0.05, float32."""
    generator = torch.Generator().manual_seed(100 * rows + columns)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return (u * torch.logspace(0, -1.3, min(rows, columns))) @ vt


def _newton_schulz(
    g: Tensor, steps: int, coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
) -> Tensor:
    a, b, c = coefficients
    x = g / g.norm()
    for _ in range(steps):
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def _singular_values(found: Tensor) -> Tensor:
    return torch.linalg.svdvals(found) if found.isfinite().all() else torch.tensor([torch.nan])


def _inside(found: Tensor, g: Tensor) -> Tensor:
    """``U^T X V``: diagonal when X has the directions of g."""
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    return u.T @ found.to(g.dtype) @ vt.T


def _is_orthogonalised(found: Any, right: Tensor, g: Tensor, scale: float, steps: int = _STEPS) -> bool:
    if not isinstance(found, Tensor) or found.shape != g.shape:
        return False
    if steps != _STEPS:  # more than nothing has happened to the smallest, and less than after all five
        smallest = _singular_values(found.to(g.dtype)).min()
        return bool(1.2 * _singular_values(g / g.norm()).min() < smallest < _LOW)
    values, inside = _singular_values(found.to(g.dtype)), _inside(found, g)
    straight = close(inside, inside.diagonal().diag(), atol=0.1, rtol=0)
    return bool(values.min() >= _LOW and values.max() <= _HIGH and straight and inside.diagonal().min() >= 0)


def _why_not_orthogonalised(found: Any, right: Tensor, g: Tensor, scale: float, steps: int = _STEPS) -> None:
    if not isinstance(found, Tensor):
        raise Wrong(f"the result should be a tensor, and is of type {type(found).__name__}")
    if steps != _STEPS and found.shape == g.shape:  # five steps came before, and were right
        raise Wrong(f"with steps={steps} that is not the result of {steps} step", "Loop over range(steps).")
    if found.shape == g.T.shape != g.shape:
        raise Wrong("the result should have the shape of its input, and comes out transposed",
                    "If you transpose at the start, transpose back at the end.")  # fmt: skip
    if found.shape != g.shape:
        expect_close(found, g, what="the result")
    found = found.detach().to(g.dtype)
    values, inside = _singular_values(found), _inside(found, g)
    if scale != 1:  # the same matrix with entries of usual size came before, and was right
        raise Wrong("the result depends on the scale of the input",
                    ["The iteration only works on singular values from 0 to 1. What makes sure of that at the start?",
                     "Divide g by its Frobenius norm before the first step."])  # fmt: skip
    if not values.isfinite().all():
        raise Wrong("the iteration runs away: the result is not finite",
                    "Every term of a step is X, or a product of A = X X^T with X. Check the products, and then the "
                    "signs.")  # fmt: skip
    if not (values.min() >= _LOW and values.max() <= _HIGH):
        raise Wrong(f"the singular values of the result run from {values.min():.2g} to {values.max():.2g}; "
                    f"they should lie between {_LOW} and {_HIGH}",
                    ["Follow one singular value s through one step: it should become 3.4445 s - 4.7750 s^3 + 2.0315 "
                     "s^5.", "With A = X X^T, the step is a X + (b A + c A A) X. Check which coefficient stands "
                     "where."])  # fmt: skip
    if (off := (inside - inside.diagonal().diag()).abs().max().item()) > 0.1:
        raise Wrong(f"the result is orthogonal, but in other directions than its input: off its diagonal, U^T X V "
                    f"reaches {off:.2g}",
                    "Each step may only change the singular values of X, never its singular vectors: every term is X, "
                    "or a product of X X^T with X.")  # fmt: skip
    raise Wrong("the result is orthogonal, but points in the opposite direction of its input",
                "No sign should change here: the step of w has the minus.")  # fmt: skip


exercise_4 = Method(
    "Orthogonalise a gradient by Newton-Schulz iteration, as Muon does",
    right=_newton_schulz,
    ask=lambda rule, g, scale, steps=_STEPS: rule(g, steps),
    agree=_is_orthogonalised,
    explain=_why_not_orthogonalised,
    rtol=0.02,
    atol=0.02,
    cases={
        kind + size: (scale * _with_spread_singular_values(rows, columns), scale)
        for rows, columns, kind in ((8, 8, "a square matrix"), (5, 12, "a wide matrix"), (12, 5, "a tall matrix"))
        for scale, size in ((1.0, ""), (40.0, " with large entries"), (1e-2, " with small entries"))
    } | {"a wide matrix, a single step": (_with_spread_singular_values(5, 12), 1.0, 1)},
    mistakes=[
        Mistake(lambda g, steps: _newton_schulz(g, steps, (1.5, -0.5, 0.0)),
                "five steps of the cubic iteration leave the small singular values far below one",
                ["The cubic multiplies a small singular value by 1.5 a step. How many steps would it need?",
                 "Muon's quintic multiplies it by 3.4445 a step: use its three coefficients."]),
        Mistake(lambda g, steps: g / g.norm(), "the input is normalised, and then no step is done",
                "Loop over range(steps)."),
        *[Mistake(partial(lambda done, g, steps: _newton_schulz(g, done), done),
                  f"{done} of the {_STEPS} steps are done", "Loop over range(steps).") for done in (1, 2)],
    ],
)  # fmt: skip


exercise_5 = Reading(
    "Which line is Lion's? A figure to read",
    right=("C", "b"),
    called="line",
    choices={
        "A": "line A goes on falling: its steps become shorter with the gradient",
        "B": "line B swings as it falls, and settles",
        "C": "",
        "D": "line D falls by one factor a step in the end, and so goes on",
    },
    reasons={
        "a": "that is gradient descent on a bowl",
        "b": "",
        "c": "Lion divides by nothing",
        "d": "that is momentum, and it settles in the end",
    },
    hint="How long is a step of Lion near the minimum?",
    reason_hint="What does the sign throw away?",
)


# Exercise 6: Lion


def _lion(w: Tensor, g: Tensor, m: Tensor, lr: float, betas: tuple[float, float]) -> Step:
    update = betas[0] * m + (1 - betas[0]) * g
    return w - lr * update.sign(), betas[1] * m + (1 - betas[1]) * g


def _lion_of_new(w: Tensor, g: Tensor, m: Tensor, lr: float, betas: tuple[float, float]) -> Step:
    m = betas[1] * m + (1 - betas[1]) * g
    return _lion(w, g, m, lr, betas)[0], m


exercise_6 = Method(
    "Find the bug: a step of Lion",
    right=_lion,
    explain=_state_first("the new w", "the new m"),
    unchanged=_NEW_ONES,
    cases={
        "a momentum that forgets fast": (*_tensors(63, (40,), 3), 0.02, (0.8, 0.3)),  # most signs differ here
        "a matrix of weights": (*_tensors(62, (3, 4), 3), 0.1, (0.5, 0.8)),
        "a vector of weights": (*_tensors(61, (6,), 3), 0.01, (0.9, 0.99)),
    },
    mistakes=[
        Mistake(_lion_of_new, "the step mixes the gradient into the new momentum, which holds it already",
                ["Which m should the mixture see: the one handed in, or the one handed back?", "Update m last."]),
        Mistake(lambda w, g, m, lr, betas: (_lion(w, g, m, lr, betas)[0], betas[0] * m + (1 - betas[0]) * g),
                "the mixture of the step is kept as the momentum",
                "The step mixes with the first beta, the momentum with the second."),
        Mistake(lambda w, g, m, lr, betas: _lion(w, g, m, lr, betas[::-1]), "the two betas are swapped",
                "betas is (for the step, for the momentum)."),
        Mistake(lambda w, g, m, lr, betas: (_lion(w, g, m, lr, betas)[0], m), "your function returns the old m",
                "The next step needs the momentum that this one made."),
    ],
)  # fmt: skip


# Exercises 7 and 8

BASE = Recipe(epochs=6, batch_size=100, precision="float64")


def _only_the_optimizer_changed(answer: Any) -> None:
    if not isinstance(answer, Recipe):
        raise Wrong("expected a Recipe", "For instance: mine = replace(base, optimizer=partial(Adam, lr=0.003))")
    others = [slot.name for slot in fields(Recipe) if slot.name != "optimizer"]
    if changed := [name for name in others if getattr(answer, name) != getattr(BASE, name)]:
        raise Wrong(f"besides the optimizer you changed {', '.join(changed)}", "Start from replace(base, optimizer=…).")


exercise_7 = Design(
    "Design a run: sixty steps to 0.77, by the optimizer alone",
    admit=_only_the_optimizer_changed,
    score=partial(digits.accuracy, width=64),
    seeds=(801, 802, 803),
    least=0.77,
    hint=["Which methods lead the race of section 5.2, and at which rates?", "The hidden layers are matrices."],
)

exercise_8 = OpenProject(
    "An open project: a method that you believe in, and one that you doubt",
    rubric=["expectation", "budget", "seeds", "report", "limits"],
)
