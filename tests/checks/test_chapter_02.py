"""Checks of chapter 2: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from course_lib.checks import chapter_02
from course_lib.lab.exercises import check
from course_lib.optimizers import SGD, AdamW, Composite, Muon
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "02_optimizers.ipynb"
BASE = chapter_02.BASE
momentum, adam, lion = (getattr(chapter_02, f"exercise_{number}").right for number in (1, 2, 6))


def with_torch(kind, w, g, state, t, **settings):
    """One step of torch's own optimizer from a given state."""
    parameter = torch.nn.Parameter(w.clone())
    parameter.grad = g.clone()
    optimizer = kind([parameter], **settings)
    optimizer.state[parameter] = {name: value.clone() for name, value in state.items()}
    if t is not None:
        optimizer.state[parameter]["step"] = torch.tensor(float(t - 1))
    optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def torch_momentum(w, g, v, lr, beta):
    new, state = with_torch(torch.optim.SGD, w, g, {"momentum_buffer": v}, None, lr=lr, momentum=beta)
    return new, state["momentum_buffer"]


def torch_adam(w, g, m, v, t, lr, betas, eps):
    new, state = with_torch(torch.optim.Adam, w, g, {"exp_avg": m, "exp_avg_sq": v}, t, lr=lr, betas=betas, eps=eps)
    return new, state["exp_avg"], state["exp_avg_sq"]


def torch_adamw(w, g, m, v, t, lr, betas, eps, weight_decay):
    new, state = with_torch(
        torch.optim.AdamW, w, g, {"exp_avg": m, "exp_avg_sq": v}, t,
        lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
    )  # fmt: skip
    return new, state["exp_avg"], state["exp_avg_sq"]


def newton_schulz(g, steps, coefficients=(3.4445, -4.7750, 2.0315), dtype=torch.float32, transpose=True):
    a, b, c = coefficients
    x = g.to(dtype)
    x = x / (x.norm() + 1e-7)
    tall = transpose and x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def lion_by_lerp(w, g, m, lr, betas):
    return w - lr * torch.lerp(g, m, betas[0]).sign(), torch.lerp(g, m, betas[1])


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("02.1", torch_momentum),
        ("02.2", torch_adam),
        ("02.3", torch_adamw),
        ("02.4", newton_schulz),
        ("02.4", lambda g, steps: newton_schulz(g, steps, transpose=False)),
        ("02.4", lambda g, steps: newton_schulz(g, steps, dtype=torch.bfloat16)),
        ("02.4", lambda g, steps: newton_schulz(g, 3 * steps, (1.5, -0.5, 0.0))),
        ("02.4", lambda g, steps: newton_schulz(g / torch.linalg.matrix_norm(g, 2), steps)),
        ("02.6", lion_by_lerp),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


def in_place(w, g, v, lr, beta):
    v.mul_(beta).add_(g)
    w -= lr * v
    return w, v


def v_in_place(w, g, m, v, t, lr, betas, eps):
    return (*adam(w, g, m, v, t, lr, betas, eps)[:2], v.mul_(betas[1]).add_((1 - betas[1]) * g**2))


def unnormalised(g, steps):
    x = g
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


def wrong_side(g, steps):
    x = g / g.norm()
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x.T @ x @ x + 2.0315 * x.T @ x @ x.T @ x @ x
    return x


MISTAKES = [
    ("02.1", in_place, "changes its argument w in place", "make new ones"),
    ("02.1", lambda w, g, v, lr, beta: (w - lr * g, v), "the new v is not right: the largest difference is", "updated"),
    ("02.1", lambda w, *rest: (2 * w, momentum(w, *rest)[1]), "the new w is not right", "The state is right"),
    ("02.1", lambda *a: (*momentum(*a), 0), "should return 2 values .w, v., and returns 3 values", "next step"),
    ("02.1", lambda *a: (momentum(*a)[0][:1], momentum(*a)[1]), r"w should have shape \[5\], and has \[1\]", "step"),
    ("02.1", lambda w, g, v, lr, beta: w @ g, "should return 2 values .w, v., and returns one value", "next step"),
    ("02.2", v_in_place, "changes its argument v in place", "make new ones"),
    ("02.4", unnormalised, "depends on the scale .* with large entries", "from 0 to 1"),
    ("02.4", lambda g, steps: unnormalised(g.T, steps).T, "depends on the scale", "from 0 to 1"),
    ("02.4", lambda g, steps: newton_schulz(g, steps - 3), "2 of the 5 steps", "range"),
    ("02.4", lambda g, steps: newton_schulz(g, steps - 1), r"with steps=1 .* \(on a wide .* single step\)", "range"),
    ("02.4", lambda g, steps: newton_schulz(g, 5), "with steps=1 that is not the result of 1 step", "range"),
    ("02.4", lambda g, steps: newton_schulz(g, steps).numpy(), "should be a tensor, and is of type ndarray", ""),
    ("02.4", lambda g, steps: newton_schulz(g if len(g) < 9 else g.T, steps), "comes out transposed", "back"),
    ("02.4", lambda g, steps: newton_schulz(g, steps, (2.0315, -4.7750, 3.4445)), "singular values", "3.4445 s"),
    ("02.4", lambda g, steps: torch.linalg.qr(g).Q, "other directions", "never its singular vectors"),
    ("02.4", wrong_side, r"runs away|other directions|run from", "."),
    ("02.4", lambda g, steps: g / 0, "runs away", "Check the products"),
    ("02.4", lambda g, steps: -newton_schulz(g, steps), "opposite direction", "sign"),
    ("02.7", 3, "expected a Recipe", "replace"),
    ("02.7", replace(BASE, epochs=7, batch_size=50), "changed epochs, batch_size", "Start from"),
    ("02.7", replace(BASE, optimizer=partial(SGD, lr=0.1)), "a mean accuracy of", "lead the race"),
    ("02.7", replace(BASE, optimizer=partial(SGD, lr=1e12)), "diverged|a mean accuracy", "smaller|lead"),
    ("02.7", replace(BASE, optimizer=lambda parameters: 1 / 0), "raised ZeroDivisionError", ""),
]


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


def muon_and_adamw(named_parameters, lr):
    parameters = [p for _, p in named_parameters]
    hidden = [p for p in parameters if p.ndim == 2][:-1]
    rest = [p for p in parameters if not any(p is h for h in hidden)]
    return Composite(Muon(hidden, lr=lr, weight_decay=0.0), AdamW(rest, lr=0.003))


@pytest.mark.parametrize("exercise", checking.asked(NOTEBOOK))
def test_the_printed_solutions_pass(exercise):
    names = {"replace": replace, "partial": partial, "base": BASE, "muon_and_adamw": muon_and_adamw}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names)
