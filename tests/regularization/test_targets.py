"""Softer targets against torch and against formulas; the penalties that noise equals against exact expectations."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from course_lib import preprocessing
from course_lib import regularization as reg
from course_lib.lab.data import load
from course_lib.lab.models import mlp
from course_lib.lab.training import Objective, Recipe, cross_entropy, evaluate, fit, fresh
from tests.regularization.small import generator, gradients, images, network, normal, smooth_network


class Logits(nn.Module):
    """A network whose logits are its parameters, whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Any) -> Tensor:
        return self.logits


N, K = 9, 5
LABELS = torch.arange(N) % K
SOFT = normal(N, K, seed=3).softmax(1)


@pytest.fixture
def model() -> Logits:
    return Logits(3 * normal(N, K))


def agree(found: Tensor, expected: Tensor, model: nn.Module, rel: float = 1e-12) -> None:
    """The same loss and the same gradient."""
    assert found.item() == pytest.approx(expected.item(), rel=rel)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected), rtol=rel, atol=1e-14)


# --- Targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [LABELS, SOFT], ids=["labels", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torchs(model: Logits, y: Tensor, smoothing: float) -> None:
    found = reg.label_smoothing(model, None, y, smoothing=smoothing)
    agree(found, F.cross_entropy(model.logits, y, label_smoothing=smoothing), model)


def test_confidence_penalty_takes_the_entropy_off(model: Logits) -> None:
    entropy = torch.distributions.Categorical(logits=model.logits).entropy()
    torch.testing.assert_close(reg.entropy(model.logits), entropy)
    found = reg.confidence_penalty(model, None, LABELS, beta=0.3)
    agree(found, F.cross_entropy(model.logits, LABELS) - 0.3 * entropy.mean(), model)
    u = torch.full((N, K), 1 / K, dtype=torch.float64)
    towards = F.kl_div(u.log(), model.logits.log_softmax(1), log_target=True, reduction="batchmean")
    other = F.cross_entropy(model.logits, LABELS) + 0.3 * towards - 0.3 * math.log(K)
    assert found.item() == pytest.approx(other.item(), rel=1e-12)


def test_bootstrapping_is_its_formula(model: Logits) -> None:
    logq = model.logits.log_softmax(1)
    q = logq.exp()
    entropy = -(q * logq).sum(1).mean()
    soft = 0.7 * F.nll_loss(logq, LABELS) + 0.3 * entropy
    agree(reg.soft_bootstrap(model, None, LABELS, beta=0.7), soft, model)
    hard = 0.7 * F.nll_loss(logq, LABELS) + 0.3 * F.nll_loss(logq, logq.argmax(1))
    agree(reg.hard_bootstrap(model, None, LABELS, beta=0.7), hard, model)
    for objective in (reg.soft_bootstrap, reg.hard_bootstrap):
        agree(objective(model, None, LABELS, beta=1.0), F.cross_entropy(model.logits, LABELS), model)


@pytest.mark.parametrize("q", [0.3, 0.7, 1.0])
def test_generalized_cross_entropy_is_its_formula(model: Logits, q: float) -> None:
    p = model.logits.softmax(1)
    chosen = p[torch.arange(N), LABELS]
    agree(reg.generalized_cross_entropy(model, None, LABELS, q=q), ((1 - chosen**q) / q).mean(), model)
    soft = (SOFT * (1 - p**q) / q).sum(1).mean()
    agree(reg.generalized_cross_entropy(model, None, SOFT, q=q), soft, model)


def test_generalized_cross_entropy_lies_between_two_losses(model: Logits) -> None:
    near = reg.generalized_cross_entropy(model, None, LABELS, q=1e-9)
    agree(near, F.cross_entropy(model.logits, LABELS), model, rel=1e-7)
    mae = (model.logits.softmax(1) - F.one_hot(LABELS, K)).abs().sum(1).mean()
    agree(reg.generalized_cross_entropy(model, None, LABELS, q=1.0), 0.5 * mae, model)


def test_symmetric_cross_entropy_is_its_formula(model: Logits) -> None:
    p = model.logits.softmax(1)
    chosen = p[torch.arange(N), LABELS]
    hard = 0.2 * F.cross_entropy(model.logits, LABELS) + 1.5 * (4 * (1 - chosen)).mean()
    agree(reg.symmetric_cross_entropy(model, None, LABELS, alpha=0.2, beta=1.5), hard, model)
    soft = 0.2 * F.cross_entropy(model.logits, SOFT) - 1.5 * (p * SOFT.log().clamp(min=-2)).sum(1).mean()
    agree(reg.symmetric_cross_entropy(model, None, SOFT, alpha=0.2, beta=1.5, log_zero=-2.0), soft, model)


def test_a_hopeless_label_pulls_without_limit_only_in_cross_entropy() -> None:
    hopeless = Logits(torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64))
    y = torch.tensor([1])
    pulls = {
        objective.__name__: gradients(hopeless, objective(hopeless, None, y))[0].abs().max().item()  # type: ignore[attr-defined]
        for objective in (cross_entropy, reg.generalized_cross_entropy)
    }
    assert pulls["cross_entropy"] == pytest.approx(1, rel=1e-6)
    assert pulls["generalized_cross_entropy"] < 1e-6


TARGETS: dict[str, Objective] = {
    "smoothing": reg.label_smoothing,
    "confidence": reg.confidence_penalty,
    "soft": reg.soft_bootstrap,
    "hard": reg.hard_bootstrap,
    "generalized": reg.generalized_cross_entropy,
    "symmetric": reg.symmetric_cross_entropy,
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_take_other_types_and_mixed_labels(name: str, dtype: torch.dtype) -> None:
    exact = TARGETS[name](Logits(3 * normal(N, K)), None, SOFT).item()
    found = TARGETS[name](Logits((3 * normal(N, K)).to(dtype)), None, SOFT.to(dtype))
    assert found.item() == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 0.05)
    x, y = preprocessing.mixup(*images(), generator(), classes=4)
    TARGETS[name](network("convnet"), x, y).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("name", TARGETS)
def test_targets_on_the_gpu(name: str) -> None:
    for y in (LABELS, SOFT):
        here = TARGETS[name](Logits(3 * normal(N, K)), None, y).item()
        there = TARGETS[name](Logits(3 * normal(N, K)).cuda(), None, y.cuda())
        assert there.item() == pytest.approx(here, rel=1e-10)


# --- Wrong labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [preprocessing.flip_symmetric, preprocessing.flip_pairwise])
def test_wrong_labels_are_in_the_training_split_alone(flip: Any) -> None:
    data = load("digits", train_size=200)
    noisy, wrong = reg.with_wrong_labels(data, 0.3, generator(), flip=flip)
    assert int(wrong.sum()) == 60
    assert torch.equal(noisy.train.labels != data.train.labels, wrong)
    assert torch.equal(noisy.train.images, data.train.images)
    assert noisy.val is data.val
    assert noisy.test is data.test
    assert torch.equal(noisy.train.labels, flip(data.train.labels, 0.3, 10, generator()))


def test_generalized_cross_entropy_survives_wrong_labels() -> None:
    data, _ = reg.with_wrong_labels(load("digits", train_size=300), 0.4, generator())
    found = {}
    for name, objective in (("plain", cross_entropy), ("generalized", reg.generalized_cross_entropy)):
        recipe = Recipe(epochs=25, batch_size=32, objective=objective, precision="float64")
        model = fresh(partial(mlp, (1, 8, 8), 10, width=128), recipe, seed=0)
        fit(model, data, recipe, seed=0)
        found[name] = evaluate(model, data.test).accuracy
    assert found["generalized"] > found["plain"] + 0.05


# --- Noise of a linear model ------------------------------------------------------------------------------------------

ROWS, COLUMNS = 12, 5
X, Y = normal(ROWS, COLUMNS, seed=1), normal(ROWS, seed=2)
W = normal(COLUMNS, seed=3)


def test_input_noise_is_ridge_in_expectation() -> None:
    """Of a quadratic two moments are enough: steps to both sides along each axis have those of the noise."""
    std = 0.7
    points = std * math.sqrt(COLUMNS) * torch.cat([torch.eye(COLUMNS), -torch.eye(COLUMNS)]).double()
    exact = torch.stack([reg.linear_loss(X + point, Y, W) for point in points]).mean()
    assert reg.input_noise_loss(X, Y, W, std).item() == pytest.approx(exact.item(), rel=1e-12)
    drawn = torch.randn(20_000, ROWS, COLUMNS, generator=generator(), dtype=torch.float64)
    sampled = 0.5 * (Y - (X + std * drawn) @ W).square().mean()
    assert reg.input_noise_loss(X, Y, W, std).item() == pytest.approx(sampled.item(), rel=0.01)


def test_the_minimum_under_input_noise_is_scikit_learns_ridge() -> None:
    std = 0.7
    found = reg.input_noise_solution(X, Y, std)
    theirs = Ridge(alpha=ROWS * std**2, fit_intercept=False, solver="svd").fit(X.numpy(), Y.numpy())
    torch.testing.assert_close(found, torch.from_numpy(theirs.coef_), rtol=1e-10, atol=1e-12)
    w = found.clone().requires_grad_()
    (g,) = torch.autograd.grad(reg.input_noise_loss(X, Y, w, std), w)
    assert g.abs().max().item() < 1e-13


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_of_a_linear_model_is_a_weighted_ridge(p: float) -> None:
    """Over all 32 masks of a row, each with its probability."""
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=COLUMNS)), dtype=torch.float64)
    chance = ((1 - p) ** masks * p ** (1 - masks)).prod(1)
    exact = sum(c * reg.linear_loss(X * mask / (1 - p), Y, W) for mask, c in zip(masks, chance, strict=True))
    assert reg.dropout_loss(X, Y, W, p).item() == pytest.approx(float(exact), rel=1e-12)
    w = reg.dropout_solution(X, Y, p).requires_grad_()
    (g,) = torch.autograd.grad(reg.dropout_loss(X, Y, w, p), w)
    assert g.abs().max().item() < 1e-13


def test_dropout_does_not_mind_the_scale_of_features_and_ridge_does() -> None:
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        (X * scale) @ reg.dropout_solution(X * scale, Y, 0.3), X @ reg.dropout_solution(X, Y, 0.3)
    )
    gap = (X * scale) @ reg.input_noise_solution(X * scale, Y, 0.5) - X @ reg.input_noise_solution(X, Y, 0.5)
    assert gap.abs().max().item() > 0.1


def test_training_with_dropout_goes_to_the_closed_form() -> None:
    """Averaged steps with the module of the course, its mask drawn anew at each."""
    drop, w = reg.Dropout(0.3, generator()), torch.zeros(COLUMNS, dtype=torch.float64, requires_grad=True)
    many, answers = X.repeat(50, 1), Y.repeat(50)
    mean, count = torch.zeros(COLUMNS, dtype=torch.float64), 0
    for step in range(1500):
        (g,) = torch.autograd.grad(reg.linear_loss(drop(many), answers, w), w)
        with torch.no_grad():
            w -= 0.1 * g
        if step >= 500:
            mean, count = mean + w.detach(), count + 1
    torch.testing.assert_close(mean / count, reg.dropout_solution(X, Y, 0.3), rtol=0, atol=5e-3)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_of_logistic_regression_to_second_order(p: float) -> None:
    """Against all masks: halving the weights quarters the penalty, and what it leaves over shrinks faster."""
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=COLUMNS)), dtype=torch.float64)
    chance = ((1 - p) ** masks * p ** (1 - masks)).prod(1)

    def left_over(w: Tensor) -> float:
        noisy = torch.stack([F.softplus((X * mask / (1 - p)) @ w).mean() for mask in masks])
        return ((chance * noisy).sum() - F.softplus(X @ w).mean() - reg.dropout_logistic_penalty(X, w, p)).item()

    sizes = [abs(left_over(scale * W)) for scale in (0.1, 0.05, 0.025)]
    assert sizes[0] < 0.05 * reg.dropout_logistic_penalty(X, 0.1 * W, p).item()
    for larger, smaller in itertools.pairwise(sizes):
        assert larger / smaller > 7


def test_dropout_of_logistic_regression_minds_confident_rows_less() -> None:
    small = reg.dropout_logistic_penalty(X, W, 0.3).item()
    ridge_like = 0.25 * 0.5 * 0.3 / 0.7 * (X.square() @ W.square()).mean().item()
    assert small < 0.75 * ridge_like
    assert reg.dropout_logistic_penalty(X, 1e-4 * W, 0.3).item() == pytest.approx(1e-8 * ridge_like, rel=1e-4)


# --- Noise of a network's input ---------------------------------------------------------------------------------------


def under_noise(losses: Callable[[Tensor], Tensor], x: Tensor, std: float) -> Tensor:
    """The expected loss of each example under normal noise, by Gauss-Hermite quadrature in two dimensions."""
    nodes, chances = np.polynomial.hermite_e.hermegauss(40)
    grid = torch.tensor(list(itertools.product(nodes, nodes)))
    chance = torch.tensor([a * b for a, b in itertools.product(chances, chances)]) / (2 * math.pi)
    moved = (x[:, None] + std * grid).flatten(0, 1)  # [N, 1600, 2] -> [N * 1600, 2]
    return losses(moved).view(len(x), -1) @ chance


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_input_noise_is_the_curvature_up_to_the_fourth_order(loss: str) -> None:
    model = smooth_network(2, 3)
    x = normal(5, 2, seed=7)

    def losses(z: Tensor) -> Tensor:
        out = model(z)
        y = torch.zeros(len(z), dtype=torch.int64)
        return F.cross_entropy(out, y, reduction="none") if loss == "cross-entropy" else 0.5 * (out - 1).square().sum(1)

    with torch.no_grad():
        left = [
            under_noise(losses, x, std) - losses(x) - reg.input_noise_curvature(losses, x, std) for std in (0.02, 0.01)
        ]
        added = under_noise(losses, x, 0.02) - losses(x)
    torch.testing.assert_close(left[0] / left[1], torch.full((5,), 16.0, dtype=torch.float64), rtol=0.05, atol=0)
    assert left[0].abs().mean().item() < 0.05 * added.abs().mean().item()


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_tikhonov_is_the_curvature_where_the_network_fits(loss: str) -> None:
    """With the residual at 0 the second derivative of the network has no say."""
    model, x = smooth_network(2, 3), normal(5, 2, seed=7)
    answers = model(x).detach()

    def losses(z: Tensor) -> Tensor:
        if loss == "squared":
            return 0.5 * (model(z) - answers).square().sum(1)
        return -(answers.softmax(1) * model(z).log_softmax(1)).sum(1)

    curvature = None if loss == "squared" else reg.softmax_curvature(answers)
    found = reg.input_noise_tikhonov(model, x, 0.3, curvature)
    torch.testing.assert_close(found, reg.input_noise_curvature(losses, x, 0.3), rtol=1e-10, atol=1e-12)
    assert bool((found > 0).all())


def test_tikhonov_of_squares_is_the_jacobian_penalty() -> None:
    model, x = smooth_network(2, 3), normal(5, 2, seed=7)
    y = normal(5, 3, seed=8)
    added = reg.jacobian_penalty(model, x, y, strength=0.3**2, objective=reg.squared_error)
    found = reg.input_noise_tikhonov(model, x, 0.3).mean() + reg.squared_error(model, x, y)
    assert added.item() == pytest.approx(found.item(), rel=1e-12)


def test_softmax_curvature_is_the_second_derivative() -> None:
    z = normal(3, 4)
    for k in range(3):
        exact = torch.autograd.functional.hessian(lambda row: F.cross_entropy(row[None], torch.tensor([1])), z[k])
        torch.testing.assert_close(reg.softmax_curvature(z)[k], exact)


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("smoothing=1.2: must be a number from 0 to 1", lambda: ask(reg.label_smoothing, smoothing=1.2)),
    ("beta=-1: must be a number of at least 0", lambda: ask(reg.confidence_penalty, beta=-1)),
    ("beta=2: must be", lambda: ask(reg.soft_bootstrap, beta=2)),
    ("beta=2: must be", lambda: ask(reg.hard_bootstrap, beta=2)),
    ("q=0: must be a number above 0, at most 1", lambda: ask(reg.generalized_cross_entropy, q=0)),
    ("alpha=-1: must be", lambda: ask(reg.symmetric_cross_entropy, alpha=-1)),
    ("log_zero=0: must be a number below 0", lambda: ask(reg.symmetric_cross_entropy, log_zero=0)),
    ("classes=5: must be 3", lambda: reg.label_smoothing(Logits(normal(N, K)), None, normal(N, 3))),
    ("share=1.2: must be", lambda: reg.with_wrong_labels(load("digits", train_size=20), 1.2, generator())),
    ("std=-1: must be", lambda: reg.input_noise_loss(X, Y, W, -1)),
    ("std=-1: must be", lambda: reg.input_noise_solution(X, Y, -1)),
    ("p=1: must be a number from 0 to below 1", lambda: reg.dropout_loss(X, Y, W, 1)),
    ("p=1: must be", lambda: reg.dropout_solution(X, Y, 1)),
    ("p=1: must be", lambda: reg.dropout_logistic_penalty(X, W, 1)),
    ("X is torch.float64 [12]: must be a matrix", lambda: reg.dropout_loss(Y, Y, W, 0.1)),
    ("std=-1: must be", lambda: reg.input_noise_curvature(lambda x: x.sum(1), X, -1)),
    ("curvature has the shape [1]", lambda: reg.input_noise_tikhonov(smooth_network(5), X, 1, torch.ones(1))),
]


def ask(objective: Any, **settings: Any) -> Tensor:
    return objective(Logits(normal(N, K)), None, LABELS, **settings)


@pytest.mark.parametrize(("message", "bad"), BAD, ids=[f"{k}: {message}" for k, (message, _) in enumerate(BAD)])
def test_bad_settings_are_named(message: str, bad: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bad()
