"""Penalties and proximal steps against scikit-learn's solutions, torch's namesakes and formulas in float64."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, MultiTaskLasso, Ridge
from torch import Tensor, nn

from course_lib import optimizers
from course_lib import regularization as reg
from course_lib.lab.data import Dataset, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import mlp
from course_lib.lab.training import Objective, Recipe, cross_entropy, evaluate, fit, fresh
from course_lib.optimizers.elementwise import decay_weights
from course_lib.regularization.passes import weights_of
from tests.regularization.small import EXACT, Linear, generator, gradients, images, network, normal

N, D = 60, 8
TRUTH = torch.tensor([2.0, -1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 3.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def regression() -> tuple[Tensor, Tensor]:
    X = normal(N, D) @ (torch.eye(D, dtype=torch.float64) + 0.3 * normal(D, D, seed=1))
    return X, X @ TRUTH + 0.3 * normal(N, seed=2)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=256)


def descend(
    objective: Objective,
    X: Tensor,
    y: Tensor,
    *,
    prox: Callable[[Tensor, float], Tensor] | None = None,
    steps: int = 500,
    momentum: float = 0.0,
) -> Tensor:
    """Full-batch descent at the largest safe rate, through the very code that a recipe uses after each step."""
    model = Linear(X.shape[1], 1 if y.ndim == 1 else y.shape[1])
    lr = 1 / float(torch.linalg.eigvalsh(X.mT @ X / len(X))[-1])
    recipe = Recipe(optimizer=partial(torch.optim.SGD, lr=lr, momentum=momentum))
    if prox is not None:
        recipe = reg.after_step(recipe, prox)
    optimizer = recipe.optimizer(model.named_parameters())  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.zero_grad()
        objective(model, X, y).backward()
        optimizer.step()
    return model.weight.detach().squeeze(0)


# --- Convergence to scikit-learn's solutions --------------------------------------------------------------------------


@pytest.mark.parametrize(("l1_ratio", "momentum"), [(0.2, 0.0), (0.9, 0.0), (0.5, 0.3)])
def test_proximal_descent_finds_the_elastic_net(
    regression: tuple[Tensor, Tensor], l1_ratio: float, momentum: float
) -> None:
    X, y = regression
    theirs = ElasticNet(alpha=0.4, l1_ratio=l1_ratio, fit_intercept=False, tol=1e-14, max_iter=100_000)
    expected = torch.from_numpy(theirs.fit(X.numpy(), y.numpy()).coef_)
    prox = partial(reg.prox_elastic_net, alpha=0.4, l1_ratio=l1_ratio)
    if momentum:  # the running sum of gradients is 1 / (1 - momentum) times as long, and the threshold is not
        prox = partial(reg.prox_elastic_net, alpha=0.4 / (1 - momentum), l1_ratio=l1_ratio)
    found = descend(reg.squared_error, X, y, prox=prox, momentum=momentum)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert torch.equal(found == 0, expected == 0)


def test_proximal_descent_finds_the_lasso_and_its_zeros(regression: tuple[Tensor, Tensor]) -> None:
    X, y = regression
    theirs = Lasso(alpha=0.3, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X.numpy(), y.numpy())
    expected = torch.from_numpy(theirs.coef_)
    assert 2 <= int((expected == 0).sum()) < D
    found = descend(reg.squared_error, X, y, prox=partial(reg.prox_l1, strength=0.3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert torch.equal(found == 0, expected == 0)


def test_the_subgradient_comes_near_and_makes_no_zero(regression: tuple[Tensor, Tensor]) -> None:
    X, y = regression
    theirs = Lasso(alpha=0.3, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X.numpy(), y.numpy())
    found = descend(partial(reg.l1, strength=0.3, objective=reg.squared_error), X, y)
    assert int((found == 0).sum()) == 0
    assert float((found - torch.from_numpy(theirs.coef_)).abs().max()) < 0.1


@pytest.mark.parametrize("way", ["penalty", "proximal"])
def test_both_ways_of_l2_find_ridge(regression: tuple[Tensor, Tensor], way: str) -> None:
    X, y = regression
    expected = torch.from_numpy(Ridge(alpha=N * 0.5, fit_intercept=False).fit(X.numpy(), y.numpy()).coef_)
    if way == "penalty":
        model_objective = partial(reg.l2, weight_decay=0.5, objective=reg.squared_error)
        model = Linear(D)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(500):
            optimizer.zero_grad()
            model_objective(model, X, y).backward()
            optimizer.step()
        found = model.weight.detach().squeeze(0)
    else:
        found = descend(reg.squared_error, X, y, prox=partial(reg.prox_l2, weight_decay=0.5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_penalised_elastic_net_has_its_gradient(regression: tuple[Tensor, Tensor]) -> None:
    """Where no weight is 0: at scikit-learn's solution, the gradient by the weights that are not 0 is 0."""
    X, y = regression
    theirs = ElasticNet(alpha=0.4, l1_ratio=0.6, fit_intercept=False, tol=1e-14, max_iter=100_000)
    model = Linear(D)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(theirs.fit(X.numpy(), y.numpy()).coef_)[None])
    objective = partial(reg.elastic_net, alpha=0.4, l1_ratio=0.6, objective=reg.squared_error)
    (g,) = gradients(model, objective(model, X, y))
    away = model.weight != 0
    assert 0 < int(away.sum()) < D
    assert float(g[away].abs().max()) < 1e-6
    assert float(g[~away].abs().max()) <= 0.4 * 0.6 + 1e-9


# --- Groups -----------------------------------------------------------------------------------------------------------


def test_group_lasso_of_orthogonal_inputs_is_a_threshold_of_least_squares() -> None:
    Q, _ = torch.linalg.qr(normal(N, D))
    X = Q * math.sqrt(N)  # X'X / N is the identity
    Y = X @ torch.stack([TRUTH, 0.05 * TRUTH.flip(0), normal(D, seed=5)]).mT + 0.1 * normal(N, 3, seed=6)
    least = (X.mT @ Y / N).mT  # [3, D]
    strength = 0.15
    length = least.norm(dim=1)
    expected = least * (1 - strength * math.sqrt(D) / length).clamp_min(0)[:, None]
    found = descend(reg.squared_error, X, Y, prox=partial(reg.prox_group_lasso, strength=strength), steps=300)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert bool((found[1] == 0).all())
    assert not bool((found[0] == 0).any())


def test_group_lasso_is_scikit_learns_with_a_group_an_input(regression: tuple[Tensor, Tensor]) -> None:
    """``MultiTaskLasso`` groups a feature's weights over tasks: rows of the transposed weight."""
    X, y = regression
    Y = torch.stack([y, y + normal(N, seed=3), 0.5 * y], 1)
    theirs = MultiTaskLasso(alpha=0.6, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(X.numpy(), Y.numpy())
    expected = torch.from_numpy(theirs.coef_)
    assert 1 <= int((expected == 0).all(0).sum()) < D

    def prox(w: Tensor, lr: float) -> Tensor:
        return reg.prox_group_lasso(w.mT, lr, strength=0.6 / math.sqrt(w.mT.shape[1])).mT

    found = descend(reg.squared_error, X, Y, prox=prox)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert torch.equal(found == 0, expected == 0)


def test_group_norm_sum_and_its_gradient_at_zero() -> None:
    weights = [normal(3, 4), normal(2, 3, 5, 5, seed=1)]
    expected = sum(
        math.sqrt(w[0].numel()) * math.sqrt(float((w[k] ** 2).sum())) for w in weights for k in range(len(w))
    )
    assert float(reg.group_norm_sum(weights)) == pytest.approx(expected, rel=1e-14)
    dead = normal(3, 4).index_fill(0, torch.tensor([1]), 0.0).requires_grad_()
    (g,) = torch.autograd.grad(reg.group_norm_sum([dead]), dead)
    assert bool((g[1] == 0).all())
    torch.testing.assert_close(g[0], 2 * dead[0].detach() / dead[0].detach().norm())


def test_group_lasso_prunes_whole_units_of_a_network(digits: Dataset) -> None:
    recipe = Recipe(epochs=20, batch_size=16, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5))
    strong = reg.after_step(recipe, partial(reg.prox_group_lasso, strength=0.006))
    model = fresh(partial(mlp, (1, 8, 8), 10, width=32), recipe, seed=0)
    fit(model, digits, strong, seed=0)
    assert 0.1 < reg.zero_share(model, rows=True) < 0.5
    assert evaluate(model, digits.test).accuracy > 0.8
    penalised = fresh(partial(mlp, (1, 8, 8), 10, width=32), recipe, seed=0)
    fit(penalised, digits, Recipe(epochs=2, objective=partial(reg.group_lasso, strength=0.006)), seed=0)
    assert reg.zero_share(penalised) == 0


# --- Proximal operators -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0])
def test_soft_threshold_is_softshrink(threshold: float) -> None:
    w = normal(50)
    torch.testing.assert_close(reg.soft_threshold(w, threshold), nn.functional.softshrink(w, threshold))


PROXES: list[tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = [
    (partial(reg.prox_l1, strength=0.7), lambda z: 0.7 * reg.l1_norm([z])),
    (partial(reg.prox_l2, weight_decay=0.7), lambda z: 0.7 * reg.half_squared_norm([z])),
    (
        partial(reg.prox_elastic_net, alpha=0.7, l1_ratio=0.4),
        lambda z: 0.7 * (0.4 * reg.l1_norm([z]) + 0.6 * reg.half_squared_norm([z])),
    ),
    (partial(reg.prox_group_lasso, strength=0.7), lambda z: 0.7 * reg.group_norm_sum([z])),
]


@pytest.mark.parametrize(("prox", "penalty"), PROXES, ids=["l1", "l2", "elastic_net", "group_lasso"])
def test_a_proximal_step_is_the_minimum_that_defines_it(
    prox: Callable[..., Tensor], penalty: Callable[[Tensor], Tensor]
) -> None:
    """No point nearby, in any of many directions, has a lower half squared distance plus penalty."""
    w, lr = normal(4, 3), 0.6
    found = prox(w, lr)

    def value(z: Tensor) -> float:
        return float(0.5 * (z - w).square().sum() + lr * penalty(z))

    least = value(found)
    for seed in range(200):
        for size in (1e-3, 1e-1):
            assert value(found + size * normal(4, 3, seed=seed)) > least
    assert value(found) < value(w)


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3, 3)])
def test_max_norm_is_renorm(shape: tuple[int, ...]) -> None:
    w = normal(*shape)
    limit = float(w.flatten(1).norm(dim=1).median())
    # torch divides by the norm plus 1e-7
    torch.testing.assert_close(reg.max_norm(w, 0.1, limit=limit), torch.renorm(w, 2, 0, limit), rtol=1e-6, atol=0)
    inside = w.flatten(1).norm(dim=1) <= limit
    assert torch.equal(reg.clip_row_norms(w, limit)[inside], w[inside])


def test_what_acts_after_a_step_holds_at_the_end_of_a_run(digits: Dataset) -> None:
    network_ = partial(mlp, (1, 8, 8), 10, width=16)
    recipe = Recipe(epochs=3, batch_size=16, optimizer=partial(torch.optim.Adam, lr=3e-3))
    model = fresh(network_, recipe, seed=0)
    fit(model, digits, reg.after_step(recipe, partial(reg.max_norm, limit=0.5)), seed=0)
    norms = torch.cat([w.detach().norm(dim=1) for w in weights_of(model.parameters())])
    assert float(norms.max()) == pytest.approx(0.5, rel=1e-6)
    sparse = fresh(network_, recipe, seed=0)
    fit(sparse, digits, reg.after_step(recipe, partial(reg.prox_l1, strength=0.3)), seed=0)
    assert reg.zero_share(sparse) > 0.05
    assert all(bool((p != 0).any()) for p in sparse.parameters() if p.ndim == 1)  # biases are left alone


def test_the_threshold_follows_the_schedule() -> None:
    """At rate 0 nothing is shrunk; at twice the rate, twice as much."""
    w = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64))
    w.grad = torch.zeros_like(w)
    recipe = reg.after_step(Recipe(optimizer=partial(torch.optim.SGD, lr=0.1)), partial(reg.prox_l1, strength=1.0))
    optimizer = recipe.optimizer(iter([("w", w)]))
    expected = 3.0
    for lr in (0.1, 0.0, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        expected -= lr
        assert float(w.detach()[0, 0]) == pytest.approx(expected, rel=1e-12)


# --- L2 and decay -----------------------------------------------------------------------------------------------------


def trained(objective: Objective, make: Callable[..., Any], decay: float = 0.0, steps: int = 5) -> list[Tensor]:
    """``decay``: shrink the weights by hand before each step."""
    model = network("mlp")
    x, y = images(12)
    optimizer = make(model.named_parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        objective(model, x, y).backward()
        with torch.no_grad():
            for w in weights_of(model.parameters()) if decay else []:
                decay_weights(w, optimizer.param_groups[0]["lr"], decay)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("package", [torch.optim, optimizers])
def test_l2_is_decay_for_sgd_and_not_for_adam(package: Any) -> None:
    penalised = partial(reg.l2, weight_decay=0.3)

    def decayed(kind: str, **settings: Any) -> Callable[..., Any]:
        return partial(reg.decay_only_weights, make=partial(getattr(package, kind), **settings), weight_decay=0.3)

    sgd = trained(penalised, partial(package.SGD, lr=0.1))
    assert close(sgd, trained(cross_entropy, decayed("SGD", lr=0.1)))  # the optimizer adds the penalty's gradient
    assert close(sgd, trained(cross_entropy, partial(package.SGD, lr=0.1), decay=0.3))  # or the weights shrink
    assert not close(sgd, trained(cross_entropy, partial(package.SGD, lr=0.1)))
    adam = trained(penalised, partial(package.Adam, lr=0.01))
    adamw = trained(cross_entropy, decayed("AdamW", lr=0.01))
    assert close(adam, trained(cross_entropy, decayed("Adam", lr=0.01)))
    assert not close(adam, adamw)
    assert close(adamw, trained(cross_entropy, partial(package.Adam, lr=0.01), decay=0.3))
    # Adam cancels the size of the penalty: ten times the decay moves the weights nearly alike
    gap = max(float((p - q).abs().max()) for p, q in zip(adam, adamw, strict=True))
    assert gap > 1e-3


def test_decay_groups_leave_biases_and_norms_alone() -> None:
    model = network("convnet")
    make = partial(torch.optim.SGD, lr=0.1)
    optimizer = reg.decay_only_weights(model.named_parameters(), make=make, weight_decay=0.5)  # type: ignore[arg-type]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert all(p.ndim >= 2 for p in optimizer.param_groups[0]["params"])
    assert all(p.ndim == 1 for p in optimizer.param_groups[1]["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


# --- Formulas ---------------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> list[np.ndarray]:
    return [p.detach().flatten(1).numpy() for p in model.parameters() if p.ndim >= 2]


def residual(w: np.ndarray) -> np.ndarray:
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return gram - np.eye(len(gram))


FORMULAS: dict[str, tuple[Objective, Callable[[np.ndarray], float]]] = {
    "l1": (partial(reg.l1, strength=0.3), lambda w: 0.3 * np.abs(w).sum()),
    "l2": (partial(reg.l2, weight_decay=0.3), lambda w: 0.15 * (w**2).sum()),
    "elastic_net": (
        partial(reg.elastic_net, alpha=0.3, l1_ratio=0.2),
        lambda w: 0.06 * np.abs(w).sum() + 0.12 * (w**2).sum(),
    ),
    "group_lasso": (
        partial(reg.group_lasso, strength=0.3),
        lambda w: 0.3 * math.sqrt(w.shape[1]) * np.linalg.norm(w, axis=1).sum(),
    ),
    "soft_orthogonality": (
        partial(reg.soft_orthogonality, strength=0.3),
        lambda w: 0.3 * np.linalg.norm(residual(w)) ** 2,
    ),
    "srip": (partial(reg.srip, strength=0.3, steps=2000), lambda w: 0.3 * np.linalg.norm(residual(w), 2)),
    "spectral": (
        partial(reg.spectral_penalty, strength=0.3, steps=1000),
        lambda w: 0.15 * np.linalg.norm(w, 2) ** 2,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("architecture", ["mlp", "convnet"])
def test_a_penalty_is_its_formula(name: str, architecture: str) -> None:
    objective, formula = FORMULAS[name]
    model = network(architecture)
    x, y = images()
    added = (objective(model, x, y) - cross_entropy(model, x, y)).item()
    assert added == pytest.approx(sum(formula(w) for w in weights(model)), rel=1e-9)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_penalty_has_the_gradient_of_its_formula(name: str) -> None:
    """Along a random direction, by central differences of the formula."""
    objective, formula = FORMULAS[name]
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=k))
    x, y = normal(3, 1, 3, 3), torch.arange(3)
    direction = [normal(*p.shape, seed=50 + k) for k, p in enumerate(model.parameters())]
    added = objective(model, x, y) - cross_entropy(model, x, y)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients(model, added), direction, strict=True))

    def at(step: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(step * d)
        return sum(formula(w) for w in weights(moved))

    assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 4), (4, 7)])
def test_an_orthogonal_weight_costs_nothing(inputs: int, outputs: int) -> None:
    model = Linear(inputs, outputs)
    with torch.no_grad():
        nn.init.orthogonal_(model.weight, generator=generator())
    for objective in (reg.soft_orthogonality, reg.srip):
        x, y = normal(3, inputs), normal(3, outputs)
        added = objective(model, x, y, strength=1.0, objective=reg.squared_error)
        plain = reg.squared_error(model, x, y)
        assert (added - plain).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("objective", [reg.soft_orthogonality, reg.srip])
def test_descent_on_an_orthogonality_penalty_makes_weights_orthogonal(objective: Any) -> None:
    w = Linear(6, 4)
    with torch.no_grad():
        w.weight.copy_(0.6 * normal(4, 6))
    optimizer = torch.optim.SGD(w.parameters(), lr=0.05)
    before = reg.gram_residual(w.weight).norm().item()
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 600)
        optimizer.zero_grad()
        objective(w, normal(2, 6), normal(2, 4), strength=1.0, objective=lambda *_: torch.zeros(())).backward()
        optimizer.step()
    assert reg.gram_residual(w.weight).norm().item() < 0.02 * before


def test_two_steps_of_power_iteration_come_close() -> None:
    matrix = reg.gram_residual(normal(8, 20) / 4)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert 0.7 * exact < float(reg.largest_singular_value(matrix, 2)) <= exact * (1 + 1e-12)
    assert float(reg.largest_singular_value(torch.zeros(3, 3), 4)) == 0


# --- In recipes -------------------------------------------------------------------------------------------------------


def test_penalties_add_up_whatever_their_order() -> None:
    model, (x, y) = network("mlp"), images()
    one = partial(reg.l1, strength=0.1, objective=partial(reg.l2, weight_decay=0.2))
    other = partial(reg.l2, weight_decay=0.2, objective=partial(reg.l1, strength=0.1))
    net = partial(reg.elastic_net, alpha=0.3, l1_ratio=1 / 3)
    assert one(model, x, y).item() == pytest.approx(other(model, x, y).item(), rel=1e-14)
    assert one(model, x, y).item() == pytest.approx(net(model, x, y).item(), rel=1e-14)


def test_recipes_have_fingerprints_that_tell_strengths_apart() -> None:
    recipes = [
        Recipe(objective=partial(reg.l1, strength=1e-4)),
        Recipe(objective=partial(reg.l1, strength=1e-3)),
        reg.after_step(Recipe(), partial(reg.prox_l1, strength=1e-4)),
        reg.after_step(Recipe(), partial(reg.prox_l1, strength=1e-3)),
    ]
    found = [fingerprint(recipe) for recipe in recipes]
    assert len(set(found)) == 4
    assert found[0] == fingerprint(Recipe(objective=partial(reg.l1, strength=1e-4)))


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("strength=-1: must be a number of at least 0", lambda: call(reg.l1, strength=-1)),
    ("weight_decay=nan: must be", lambda: call(reg.l2, weight_decay=math.nan)),
    ("alpha=-0.1: must be", lambda: call(reg.elastic_net, alpha=-0.1)),
    ("l1_ratio=1.5: must be a number from 0 to 1", lambda: call(reg.elastic_net, alpha=0.1, l1_ratio=1.5)),
    ("strength='a': must be", lambda: call(reg.group_lasso, strength="a")),
    ("strength=-1: must be", lambda: call(reg.soft_orthogonality, strength=-1)),
    ("steps=0: must be a whole number of at least 1", lambda: call(reg.srip, strength=1, steps=0)),
    ("steps=0: must be", lambda: call(reg.spectral_penalty, strength=1, steps=0)),
    ("model=Flatten: must have weights", lambda: reg.l1(nn.Flatten(), *images(), strength=1, objective=zero)),
    ("strength=-1: must be", lambda: reg.after_step(Recipe(), partial(reg.prox_l1, strength=-1))),
    ("limit=0: must be a number above 0", lambda: reg.after_step(Recipe(), partial(reg.max_norm, limit=0))),
    ("weight_decay=-1: must be", lambda: reg.prox_l2(torch.ones(2), 0.1, weight_decay=-1)),
    ("weight_decay=-1: must be", lambda: reg.decay_only_weights(iter([]), make=lambda x: x, weight_decay=-1)),
    ("weights=0: must be", lambda: reg.zero_share(nn.Flatten())),
]


def zero(*_: Any) -> Tensor:
    return torch.zeros(())


def call(objective: Any, **settings: Any) -> Tensor:
    return objective(network("mlp"), *images(), **settings)


@pytest.mark.parametrize(("message", "bad"), BAD, ids=[f"{k}: {message}" for k, (message, _) in enumerate(BAD)])
def test_bad_settings_are_named(message: str, bad: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bad()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMULAS)
def test_penalties_on_the_gpu(name: str) -> None:
    objective, _ = FORMULAS[name]
    if name in ("srip", "spectral"):  # thousands of steps of power iteration take a while over there
        objective = partial(objective, steps=5)
    model, (x, y) = network("convnet").eval(), images()
    here = objective(model, x, y).item()
    there = objective(model.cuda(), x.cuda(), y.cuda()).item()
    assert there == pytest.approx(here, rel=1e-8)


def test_exact_is_float64() -> None:
    assert next(network().parameters()).dtype == EXACT.dtype
