"""Checks of chapter 5: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import optimizers
from course_lib import regularization as reg
from course_lib.checks import chapter_05
from course_lib.lab import Recipe
from course_lib.lab.exercises import check
from course_lib.lab.judging import Wrong
from course_lib.lab.models import mlp
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "05_regularization.ipynb"
ASKED = checking.asked(NOTEBOOK) if (checking.NOTEBOOKS / NOTEBOOK).exists() else []
BASE, network = chapter_05.BASE, chapter_05.network

soft_threshold, dropout, degrees_of_freedom, smoothed_loss, group_step = (
    getattr(chapter_05, f"exercise_{number}").right for number in (1, 2, 3, 5, 6)
)


# Other right answers


def one_by_one(w, t):
    kept = [math.copysign(max(abs(value) - t, 0.0), value) for value in w.flatten().tolist()]
    return torch.tensor(kept, dtype=w.dtype).reshape(w.shape)


def in_three_parts(w, t):
    return torch.where(w > t, w - t, torch.where(w < -t, w + t, torch.zeros_like(w)))


def selected(x, u, p, training):
    if training:
        return torch.where(u >= p, x / (1 - p), torch.zeros_like(x))
    return x.clone()


def filled(x, u, p, training):
    return x.masked_fill(u < p, 0) / (1 - p) if training else x


def trace_of_hat(X, alpha):
    """Of the matrix that makes predictions of y."""
    inverse = torch.linalg.inv(X.T @ X + alpha * torch.eye(X.shape[1], dtype=X.dtype))
    return torch.trace(X @ inverse @ X.T)


def derivative_of_predictions(X, alpha):
    """How far each prediction follows its own y, as an array: the definition by Efron."""
    N, D = X.shape
    rows = np.vstack([X.numpy(), np.sqrt(alpha) * np.eye(D)])
    fits = [X.numpy() @ np.linalg.lstsq(rows, np.append(np.eye(N)[i], np.zeros(D)), rcond=None)[0] for i in range(N)]
    return sum(fits[i][i] for i in range(N))


def by_torch(logits, y, eps):
    return F.cross_entropy(logits, y, label_smoothing=eps)


def two_losses(logits, y, eps):
    return (1 - eps) * F.cross_entropy(logits, y) - eps * logits.log_softmax(1).mean()


def targets_of_ones(logits, y, eps):
    classes = logits.shape[1]
    targets = F.one_hot(y, classes) * (1 - eps) + eps / classes
    return F.cross_entropy(logits, targets)


def row_by_row(W, t):
    rows = []
    for row in W:
        length = row.norm()
        rows.append(row * (length - t) / length if length > t else 0 * row)
    return torch.stack(rows)


def what_projection_leaves(W, t):
    """Moreau: the rest of a projection onto the ball of the dual norm, which torch has as renorm."""
    return W - torch.renorm(W, 2, 0, t) if t else W


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("05.1", one_by_one),
        ("05.1", in_three_parts),
        ("05.1", lambda w, t: F.softshrink(w, t)),
        ("05.1", lambda w, t: w - w.clamp(-t, t)),
        ("05.1", reg.soft_threshold),
        ("05.2", selected),
        ("05.2", filled),
        ("05.2", lambda x, u, p, training: x * ((u >= p) | (not training)) / (1 - p * training)),
        ("05.3", trace_of_hat),
        ("05.3", derivative_of_predictions),
        ("05.3", reg.degrees_of_freedom),
        ("05.3", lambda X, alpha: sum(s**2 / (s**2 + alpha) for s in torch.linalg.svdvals(X).tolist())),
        ("05.5", by_torch),
        ("05.5", two_losses),
        ("05.5", targets_of_ones),
        ("05.5", lambda *case: by_torch(*case).item()),
        ("05.6", row_by_row),
        ("05.6", what_projection_leaves),
        ("05.6", reg.group_soft_threshold),
        ("05.6", lambda W, t: (W * (1 - t / W.norm(dim=1, keepdim=True)).clamp_min(0)).nan_to_num()),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


@pytest.mark.parametrize(("step", "penalty"), [(soft_threshold, torch.abs), (group_step, lambda W: W.norm(dim=1))])
def test_a_proximal_step_goes_where_distance_and_penalty_are_smallest(step, penalty):
    w, t = torch.tensor([[1.0, -2.0, 0.3], [0.2, 0.1, -0.3], [0.0, 0.0, 0.0]], dtype=torch.float64), 0.7

    def cost(v):
        return (v - w).square().sum() / 2 + t * penalty(v).sum()

    found = step(w, t)
    generator = torch.Generator().manual_seed(0)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            assert cost(found) < cost(found + size * torch.randn(w.shape, generator=generator, dtype=w.dtype))


def recipe(objective=None, **settings):
    changed = {"objective": objective} if objective else {}
    return replace(BASE, optimizer=partial(BASE.optimizer, **settings), **changed)


def dropping(p):
    return lambda: reg.with_dropout(network(), p)


def written_out(p):
    """The same network, built of torch's own parts."""
    layers = [nn.Linear(256, 256), nn.ReLU(), nn.Dropout(p), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(256, 10))


def by_hand(model, x, y, q=0.7):
    """The generalized cross-entropy as it stands in the paper."""
    return ((1 - model(x).softmax(1).gather(1, y[:, None]) ** q) / q).mean()


def smoothing(share):
    return partial(reg.label_smoothing, smoothing=share)


def giving_up(q):
    return partial(reg.generalized_cross_entropy, q=q)


def decay_of_weights(weight_decay, objective):
    optimizer = partial(reg.decay_only_weights, make=BASE.optimizer, weight_decay=weight_decay)
    return replace(BASE, objective=objective, optimizer=optimizer)


@pytest.mark.parametrize(
    "answer",
    [
        (dropping(0.5), recipe(giving_up(0.7))),
        (dropping(0.7), recipe(smoothing(0.5))),
        (network, decay_of_weights(0.01, giving_up(0.7))),
    ],
)
def test_several_kinds_of_regularization_reach_it_by_more_than_a_point(answer):
    design = chapter_05.exercise_7
    replace(design, least=design.least + 0.01)(answer)


def test_what_the_course_has_not_made_is_good_as_well():
    found = check("05.7", [partial(written_out, 0.3), recipe(by_hand)])
    assert found.state == "passed", found


@pytest.mark.parametrize(
    "answer",
    [
        (network, recipe(weight_decay=1e-4)),
        (dropping(0.1), BASE),
        (network, recipe(smoothing(0.05))),
        (dropping(0.1), recipe(smoothing(0.05), weight_decay=1e-4)),
        (dropping(0.5), BASE),
        (network, recipe(weight_decay=0.05)),
    ],
)
def test_what_is_weak_or_alone_stays_far_below(answer):
    design = chapter_05.exercise_7
    with pytest.raises(Wrong, match=r"a mean accuracy of 0\.[56]"):
        replace(design, least=design.least - 0.02, seeds=design.seeds[:1])(answer)


# Usual mistakes


def drawn_anew(x, u, p, training):
    return dropout(x, torch.rand(x.shape, dtype=x.dtype), p, training)


def masked_in_place(x, u, p, training):
    if training:
        x[u < p] = 0
        return x / (1 - p)
    return x


def shrunk_in_place(W, t):
    for row in W:
        row *= (row.norm() - t).clamp_min(0) / row.norm().clamp_min(1e-12)
    return W


def always_the_same(made):
    return lambda: made


def always_dropping():
    """Dropout that does not know of evaluation."""
    made = network()
    made.hidden[1].register_forward_hook(lambda part, args, output: F.dropout(output, 0.5, training=True))
    return made


MISTAKES = [
    ("05.1", lambda w, t: 2 * soft_threshold(w, t), "the new w is not right", "slope of .v. change"),
    ("05.1", lambda w, t: w.abs_().sub_(t), "the sign|turned around|other side|the new w is not right", "."),
    ("05.1", lambda w, t: soft_threshold(w, t).flatten(), r"should have shape \[3, 4\]", "slope"),
    ("05.2", drawn_anew, "other numbers are switched off than u says", "Draw nothing yourself"),
    ("05.2", lambda *case: 2 * dropout(*case), "the result is not right", "x = 1 everywhere"),
    ("05.2", masked_in_place, "changes its argument x in place", "activations"),
    ("05.3", lambda *case: 2 * degrees_of_freedom(*case), "degrees of freedom is not right", "half a parameter"),
    ("05.3", lambda X, alpha: reg.shrinkage(X, alpha), r"should have shape \[\]", "half a parameter"),
    ("05.3", lambda X, alpha: torch.linalg.matrix_rank(X).item(), "number of features, whatever α", "λ_j"),
    ("05.5", lambda *case: 2 * smoothed_loss(*case), "the loss is not right", "sum of each row"),
    ("05.5", lambda logits, y, eps: F.cross_entropy(logits, y, label_smoothing=eps, reduction="none"),
     "a loss for each example", "averaged"),
    ("05.5", lambda logits, y, eps: F.cross_entropy(logits, y), "without smoothing", "eps"),
    ("05.6", shrunk_in_place, "changes its argument W in place", "caller's weights"),
    ("05.6", lambda W, t: 2 * group_step(W, t), "the new W is not right", "one row, .3, 4."),
    ("05.6", lambda W, t: group_step(W, t)[W.norm(dim=1) > t], "should have shape", "one row, .3, 4."),
    ("05.6", lambda W, t: W * (1 - t / W.square().mean(1, keepdim=True).sqrt()).clamp_min(0),
     "the root of the number of inputs", "used as it is"),
    ("05.7", 3, "expected two things", "with_dropout"),
    ("05.7", recipe(smoothing(0.5)), "expected two things", "with_dropout"),
    ("05.7", (recipe(smoothing(0.5)), network), "expected two things", "with_dropout"),
    ("05.7", (network, replace(BASE, epochs=60, batch_size=20)), "you changed epochs, batch_size", "Start from"),
    ("05.7", (network, replace(BASE, keep="val_accuracy")), "you changed keep", "Start from"),
    ("05.7", (network, replace(BASE, stop=lambda history: len(history) > 3)), "you changed stop", "Start from"),
    ("05.7", (network, reg.after_step(BASE, partial(reg.max_norm, limit=1.0))), "should be base's SGD", "For instance"),
    ("05.7", (network, replace(BASE, optimizer=partial(torch.optim.AdamW, weight_decay=0.1))), "base's SGD", "stay"),
    ("05.7", (network, recipe(lr=0.001)), "your SGD changes lr", "stay as they are"),
    ("05.7", (network, recipe(nesterov=True)), "your SGD changes nesterov", "stay as they are"),
    ("05.7", (network, replace(BASE, optimizer=partial(optimizers.SGD, lr=0.03))), "changes momentum", "stay"),
    ("05.7", (network, decay_of_weights(0.1, 0.5)), "objective should be a function", "For instance"),
    ("05.7", (network(), BASE), "that is a network, and what is wanted is a function", "lambda"),
    ("05.7", (3, BASE), "a function is wanted here", ""),
    ("05.7", (lambda: 3, BASE), "makes no network", "For instance"),
    ("05.7", (lambda: 1 / 0, BASE), "raised ZeroDivisionError", ""),
    ("05.7", (partial(mlp, (1, 16, 16), 10, width=32), BASE), "has other weights", "Free are"),
    ("05.7", (always_the_same(network()), BASE), "does not begin with the weights", "each run draws its own"),
    ("05.7", (always_dropping, BASE), "in evaluation your network says something else", "training alone"),
    ("05.7", (network, recipe(weight_decay=-1.0)), "raised ValueError", ""),
    ("05.7", (network, recipe(lambda model, x, y: model(x))), "raised", ""),
    ("05.7", (network, recipe(partial(reg.l2, weight_decay=1e6))), "the run diverged", "A smaller strength"),
    ("05.7", (network, BASE), r"a mean accuracy of 0\.5[4-7]", "know at the end"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


def test_the_right_name_for_another_reason():
    """A small gap is no evidence: somebody's is smaller."""
    found = check("05.4", ("ben", "b"))
    assert found.state == "not yet right"
    assert "the smallest gap is Dan's" in found.message


@pytest.mark.parametrize("exercise", ASKED)
def test_the_printed_solutions_pass(exercise):
    names = {"math": math, "torch": torch, "F": F, "partial": partial, "replace": replace, "reg": reg}
    names |= {"regularization": reg, "Recipe": Recipe, "mlp": mlp, "network": network, "base": BASE}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names)
