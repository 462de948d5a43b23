"""Checks of chapter 2: right answers pass, each usual mistake gets its own hint, stubs are not attempted."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from course_lib.checks import chapter_02
from course_lib.lab import Recipe
from course_lib.lab.exercises import check
from course_lib.optimizers import SGD, AdamW, Composite, Muon
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")


FUNCTIONS = {
    "02.1": "momentum_step",
    "02.2": "adam_step",
    "02.3": "adamw_step",
    "02.4": "orthogonalise",
    "02.6": "lion_step",
}
BASE = Recipe(epochs=6, batch_size=100, precision="float64")


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


def momentum(w, g, v, lr, beta):
    v = beta * v + g
    return w - lr * v, v


def adam(w, g, m, v, t, lr, betas, eps):
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return w - lr * m_hat / (v_hat.sqrt() + eps), m, v


def adamw(w, g, m, v, t, lr, betas, eps, weight_decay):
    return adam(w * (1 - lr * weight_decay), g, m, v, t, lr, betas, eps)


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


def lion(w, g, m, lr, betas):
    return w - lr * torch.lerp(g, m, betas[0]).sign(), torch.lerp(g, m, betas[1])


def given_lion(w, g, m, lr, betas):
    m = lion(w, g, m, lr, betas)[1]
    return lion(w, g, m, lr, betas)[0], m


def muon_and_adamw(named_parameters, lr):
    parameters = [p for _, p in named_parameters]
    hidden = [p for p in parameters if p.ndim == 2][:-1]
    rest = [p for p in parameters if not any(p is h for h in hidden)]
    return Composite(Muon(hidden, lr=lr, weight_decay=0.0), AdamW(rest, lr=0.003))


def printed():
    """The solutions that the notebook prints, with what its cells have defined."""
    return checking.printed_solutions(
        "02_optimizers.ipynb", replace=replace, partial=partial, base=BASE, muon_and_adamw=muon_and_adamw
    )


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("02.5", ("C", "b")),
        ("02.5", [" c", "b)"]),
        ("02.6", lion),
        ("02.1", momentum),
        ("02.1", torch_momentum),
        ("02.2", adam),
        ("02.2", torch_adam),
        ("02.3", adamw),
        ("02.3", torch_adamw),
        ("02.4", newton_schulz),
        ("02.4", lambda g, steps: newton_schulz(g, steps, transpose=False)),
        ("02.4", lambda g, steps: newton_schulz(g, steps, dtype=torch.bfloat16)),
        ("02.4", lambda g, steps: newton_schulz(g, 3 * steps, (1.5, -0.5, 0.0))),
        ("02.4", lambda g, steps: newton_schulz(g / torch.linalg.matrix_norm(g, 2), steps)),
    ],
)
def test_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


def in_place(w, g, v, lr, beta):
    v.mul_(beta).add_(g)
    w -= lr * v
    return w, v


def v_in_place(w, g, m, v, t, lr, betas, eps):
    return (*adam(w, g, m, v, t, lr, betas, eps)[:2], v.mul_(betas[1]).add_((1 - betas[1]) * g**2))


def plain(w, g, v, lr, beta):
    return w - lr * g, v


def averaged(w, g, v, lr, beta):
    v = beta * v + (1 - beta) * g
    return w - lr * v, v


def nesterov(w, g, v, lr, beta):
    v = beta * v + g
    return w - lr * (g + beta * v), v


def adam_with(m_hat=lambda m, beta, t: m / (1 - beta**t), step=lambda m, v, eps: m / (v.sqrt() + eps), v_hat=None):
    def answer(w, g, m, v, t, lr, betas, eps):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        return w - lr * step(m_hat(m, betas[0], t), (v_hat or m_hat)(v, betas[1], t), eps), m, v

    return answer


def swapped(w, g, m, v, t, lr, betas, eps):
    return adam(w, g, m, v, t, lr, betas[::-1], eps)


def adam_of_g(w, g, m, v, t, lr, betas, eps):
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g
    return w - lr * m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps), m, v


def corrected_state(w, g, m, v, t, lr, betas, eps):
    w, m, v = adam(w, g, m, v, t, lr, betas, eps)
    return w, m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)


def uncorrected(m, beta, t):
    return m


def l2(w, g, m, v, t, lr, betas, eps, weight_decay):
    return adam(w, g + weight_decay * w, m, v, t, lr, betas, eps)


def unscaled(w, g, m, v, t, lr, betas, eps, weight_decay):
    return adam(w * (1 - weight_decay), g, m, v, t, lr, betas, eps)


def after(w, g, m, v, t, lr, betas, eps, weight_decay):
    w, m, v = adam(w, g, m, v, t, lr, betas, eps)
    return w - lr * weight_decay * w, m, v


def growing(w, g, m, v, t, lr, betas, eps, weight_decay):
    return adam(w * (1 + lr * weight_decay), g, m, v, t, lr, betas, eps)


def forgotten(w, g, m, v, t, lr, betas, eps, weight_decay):
    return adam(w, g, m, v, t, lr, betas, eps)


def adamw_uncorrected(w, g, m, v, t, lr, betas, eps, weight_decay):
    return adam_with(uncorrected)(w * (1 - lr * weight_decay), g, m, v, t, lr, betas, eps)


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
    ("02.1", averaged, r"\(1 - beta\)", "left out"),
    ("02.1", lambda w, g, v, lr, beta: (w + lr * (beta * v + g), beta * v + g), "uphill", "sign"),
    ("02.1", lambda w, g, v, lr, beta: (w + lr * (beta * v - g), beta * v - g), "negative gradients", "sign"),
    ("02.1", nesterov, "Nesterov", "simpler"),
    ("02.1", in_place, "changes its argument w in place", "make new ones"),
    ("02.1", lambda *a: momentum(*a)[0], "returns only w", "return w, v"),
    ("02.1", lambda *a: momentum(*a)[::-1], "v first and w second", "order"),
    ("02.1", lambda w, g, v, lr, beta: (w - lr * v, beta * v + g), "uses the old v", "order"),
    ("02.1", lambda w, g, v, lr, beta: (w - lr * g, beta * v + g), "gradient alone", "move along"),
    ("02.1", lambda w, g, v, lr, beta: (momentum(w, g, v, lr, beta)[0], v), "returns the old v", "this step made"),
    ("02.1", lambda w, g, v, lr, beta: (w - beta * v - lr * g, beta * v + lr * g), "contains the learning", "lr out"),
    ("02.1", plain, "the new v is not right: the largest difference is", "updated"),
    ("02.1", lambda *a: (*momentum(*a), 0), "should return 2 values .w, v., and returns 3 values", "next step"),
    ("02.1", lambda *a: (momentum(*a)[0][:1], momentum(*a)[1]), r"w should have shape \[5\], and has \[1\]", "step"),
    ("02.1", lambda w, g, v, lr, beta: w @ g, "should return 2 values .w, v., and returns one value", "next step"),
    ("02.2", adam_with(uncorrected), "bias correction is missing", "start at zero"),
    ("02.2", adam_with(v_hat=uncorrected), "only m is corrected", "v starts at zero"),
    ("02.2", adam_with(uncorrected, v_hat=lambda v, beta, t: v / (1 - beta**t)), "only v is corrected", "m starts"),
    ("02.2", adam_with(step=lambda m, v, eps: m / (v + eps).sqrt()), "inside the root", "guards the division"),
    ("02.2", adam_with(step=lambda m, v, eps: m / (v + eps)), "root of v is missing", "unit"),
    ("02.2", adam_with(step=lambda m, v, eps: -m / (v.sqrt() + eps)), "uphill", "sign"),
    ("02.2", adam_with(lambda m, beta, t: m / (1 - beta ** (t + 1))), "t is counted from 0", "already 1"),
    ("02.2", adam_with(lambda m, beta, t: m / (1 - beta ** (t - 1))), "one step behind", "already 1"),
    ("02.2", swapped, "betas are swapped", "remember longer"),
    ("02.2", adam_of_g, "not its square", "whatever its sign"),
    ("02.2", corrected_state, "returns the corrected m and v", "this step only"),
    ("02.2", lambda *a: adam(*a)[0], "returns only w", "return w, m, v"),
    ("02.2", v_in_place, "changes its argument v in place", "make new ones"),
    ("02.3", l2, "Adam with L2", "Keep it away"),
    ("02.3", unscaled, "not scaled by the learning rate", "lr were zero"),
    ("02.3", after, "comes after the step", "first"),
    ("02.3", growing, "weights grow", "below one"),
    ("02.3", forgotten, "no weight decay", "w itself"),
    ("02.3", adamw_uncorrected, "bias correction is missing", "start at zero"),
    ("02.3", lambda *a: adamw(*a)[0], "returns only w", "return w, m, v"),
    ("02.5", ("A", "b"), "line A goes on falling", "near the minimum"),
    ("02.5", ("B", "b"), "swings as it falls", "near the minimum"),
    ("02.5", ("D", "a"), "one factor a step", "near the minimum"),
    ("02.5", ("C", "a"), "reason is not: that is gradient descent", "sign"),
    ("02.5", ("C", "c"), "reason is not: Lion divides", "sign"),
    ("02.5", ("C", "d"), "reason is not: that is momentum", "sign"),
    ("02.5", ("E", "b"), "no line 'E'", "A to D"),
    ("02.5", "C", "letter of a line", "for instance|For instance"),
    ("02.6", given_lion, "holds it already", "handed in"),
    ("02.6", lambda w, g, m, lr, betas: lion(w, g, m, lr, betas[::-1]), "betas are swapped", "for the step"),
    ("02.6", lambda *a: (lion(*a)[0], a[2]), "returns the old m", "this one made"),
    ("02.6", lambda *a: (lion(*a)[0], torch.lerp(a[1], a[2], a[4][0])), "kept as the momentum", "second"),
    ("02.7", 3, "wanted is a Recipe", "replace"),
    ("02.7", replace(BASE, epochs=7, batch_size=50), "changed epochs, batch_size", "Start from"),
    ("02.7", replace(BASE, optimizer=partial(SGD, lr=0.1)), "a mean accuracy of", "lead the race"),
    ("02.7", replace(BASE, optimizer=partial(SGD, lr=1e12)), "diverged|a mean accuracy", "smaller|lead"),
    ("02.7", replace(BASE, optimizer=lambda parameters: 1 / 0), "raised ZeroDivisionError", ""),
    ("02.4", unnormalised, "depends on the scale", "from 0 to 1"),
    ("02.4", lambda g, steps: unnormalised(g.T, steps).T, "depends on the scale", "from 0 to 1"),
    ("02.4", lambda g, steps: newton_schulz(g, steps, (1.5, -0.5, 0.0)), "cubic", "How many steps"),
    ("02.4", lambda g, steps: newton_schulz(g, 1), "1 of the 5 steps", "range"),
    ("02.4", lambda g, steps: g / g.norm(), "no step is done", "range"),
    ("02.4", lambda g, steps: newton_schulz(g if len(g) < 9 else g.T, steps), "comes out transposed", "back"),
    ("02.4", lambda g, steps: newton_schulz(g, steps, (2.0315, -4.7750, 3.4445)), "singular values", "3.4445 s"),
    ("02.4", lambda g, steps: torch.eye(*g.shape), "other directions|singular values", "."),
    ("02.4", wrong_side, r"runs away|other directions|run from", "."),
    ("02.4", lambda g, steps: -newton_schulz(g, steps), "opposite direction", "sign"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_each_usual_mistake_gets_its_own_hint(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


def test_no_two_mistakes_look_alike_on_the_first_hidden_input():
    for mistakes, case in (
        (chapter_02._MOMENTUM_MISTAKES, (*chapter_02._tensors(1, (5,), 3), 0.1, 0.9)),
        (chapter_02._ADAM_MISTAKES, chapter_02._adam_cases()[0]),
        (chapter_02._ADAMW_MISTAKES, (*chapter_02._adam_cases()[0], 0.5)),
        (chapter_02._LION_MISTAKES, (*chapter_02._tensors(63, (40,), 3), 0.02, (0.8, 0.3))),
    ):
        checking.assert_no_two_alike([rule(*case) for rule, _, _ in mistakes])


@pytest.mark.parametrize("exercise", FUNCTIONS)
@pytest.mark.parametrize("answer", checking.STUBS)
def test_stubs_are_not_attempted(exercise, answer):
    checking.assert_not_attempted(exercise, answer)


@pytest.mark.parametrize("exercise", FUNCTIONS)
@pytest.mark.parametrize("answer", checking.USELESS)
def test_any_other_answer_is_told_what_is_wrong(exercise, answer):
    checking.assert_told_what_is_wrong(exercise, answer)


@pytest.mark.parametrize(("exercise", "name"), FUNCTIONS.items())
def test_the_printed_solutions_pass(exercise, name):
    found = check(exercise, printed()[name])
    assert found.state == "passed", found


def test_the_other_printed_solutions_pass():
    solutions = printed()
    assert check("02.5", (solutions["line"], solutions["reason"])).state == "passed"
    found = check("02.7", solutions["mine"])
    assert found.state == "passed", found


@pytest.mark.parametrize(("exercise", "answer"), [("02.5", (..., ...)), ("02.7", ...)])
def test_what_is_no_function_is_not_attempted_either(exercise, answer):
    checking.assert_not_attempted(exercise, answer)
