"""Penalties by the input, spectral normalisation, R-Drop and virtual adversarial training, each against its formula."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap
from torch.nn.utils import parametrizations, parametrize

from course_lib import regularization as reg
from course_lib.lab.data import load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Objective, Recipe, cross_entropy, evaluate, fit, fresh
from course_lib.regularization.drawing import unit_rows
from course_lib.regularization.input_gradients import projected_squared_jacobian, squared_jacobian
from course_lib.regularization.passes import statistics_rest
from tests.regularization.small import NETWORKS, generator, gradients, images, network, normal, smooth_network

COUNT, INPUTS, CLASSES = 7, 3, 4


@pytest.fixture
def model() -> nn.Module:
    return smooth_network(INPUTS, CLASSES)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return normal(COUNT, INPUTS, seed=9), torch.arange(COUNT) % CLASSES


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """``[N, K, D]``, by forward and reverse rules of torch.func."""
    return vmap(jacrev(lambda row: model(row[None])[0]))(x)


# --- Penalties by the input -------------------------------------------------------------------------------------------


def test_gradient_penalty_is_its_formula(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    added = reg.gradient_penalty(model, x, y, strength=0.6) - cross_entropy(model, x, y)
    errors = model(x).softmax(1) - F.one_hot(y, CLASSES)  # the gradient by the logits
    slopes = torch.einsum("nk,nkd->nd", errors, jacobians(model, x))
    assert added.item() == pytest.approx((0.3 * slopes.square().sum(1).mean()).item(), rel=1e-12)


def test_jacobian_penalty_is_its_formula(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    added = reg.jacobian_penalty(model, x, y, strength=0.6) - cross_entropy(model, x, y)
    assert added.item() == pytest.approx((0.3 * jacobians(model, x).square().sum((1, 2)).mean()).item(), rel=1e-12)


def test_the_projected_jacobian_is_right_on_average_and_exact_for_one_output() -> None:
    model = smooth_network(INPUTS, CLASSES)
    x = normal(1, INPUTS).expand(40_000, -1).clone().requires_grad_()
    logits = model(x)
    exact = jacobians(model, x.detach()[:1]).square().sum().item()
    found = projected_squared_jacobian(logits, x, 1, generator())
    spread = found.std().item() / len(found) ** 0.5
    assert found.mean().item() == pytest.approx(exact, abs=4 * spread)
    assert 4 * spread < 0.02 * exact
    several = projected_squared_jacobian(logits[:4000], x, 4, generator())[:4000]
    assert several.std().item() == pytest.approx(found.std().item() / 2, rel=0.1)
    one = smooth_network(INPUTS, 1)
    x = normal(5, INPUTS).requires_grad_()
    torch.testing.assert_close(projected_squared_jacobian(one(x), x, 1, generator()), squared_jacobian(one(x), x))


PENALISED: dict[str, Callable[..., Tensor]] = {
    "gradient": partial(reg.gradient_penalty, strength=0.6),
    "jacobian": partial(reg.jacobian_penalty, strength=0.6),
    "projected": lambda *args: reg.projected_jacobian_penalty(*args, strength=0.6, generator=generator(3)),
    "adversarial": lambda *args: reg.virtual_adversarial(*args, eps=0.5, generator=generator(3)),
    "r_drop": partial(reg.r_drop, alpha=2.0),
}


@pytest.mark.parametrize("name", ["gradient", "jacobian", "projected"])
def test_the_gradient_goes_through_the_penalty(name: str, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Along a random direction of the weights, by central differences."""
    objective = PENALISED[name]
    direction = [normal(*p.shape, seed=50 + k) for k, p in enumerate(model.parameters())]
    loss = objective(model, *batch)
    slope = sum((g * d).sum().item() for g, d in zip(gradients(model, loss), direction, strict=True))

    def at(step: float) -> float:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(step * d)
        return objective(moved, *batch).item()

    assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-7)


@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_they_train_and_evaluate_all_networks(name: str, architecture: str) -> None:
    model, (x, y) = network(architecture), images()
    loss = PENALISED[name](model, x, y)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert x.grad is None
    assert not x.requires_grad
    model.eval()
    expected = PENALISED[name](model, x, y)
    with torch.no_grad():
        found = PENALISED[name](model, x, y)
    assert not found.requires_grad
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_penalised_network_is_smoother() -> None:
    data = load("digits", train_size=128)
    norms = []
    for objective in (
        cross_entropy,
        partial(reg.jacobian_penalty, strength=0.3),
        partial(reg.projected_jacobian_penalty, strength=0.3),
    ):
        recipe = Recipe(epochs=15, batch_size=32, objective=objective, precision="float64")
        trained = fresh(partial(mlp, (1, 8, 8), 10, width=32), recipe, seed=0)
        fit(trained, data, recipe, seed=0)
        x = normal(64, 1, 8, 8).requires_grad_()
        norms.append(squared_jacobian(trained(x), x).mean().item())
        assert evaluate(trained, data.test).accuracy > 0.75
    assert norms[1] < 0.5 * norms[0]
    assert norms[2] < 0.5 * norms[0]


ALL: dict[str, Objective] = {
    **{name: partial(objective) for name, objective in PENALISED.items()},
    "l1": partial(reg.l1, strength=1e-3),
    "group_lasso": partial(reg.group_lasso, strength=1e-3),
    "srip": partial(reg.srip, strength=1e-3),
    "spectral": partial(reg.spectral_penalty, strength=1e-3),
    "confidence": reg.confidence_penalty,
    "generalized": reg.generalized_cross_entropy,
    "input_noise": partial(reg.input_noise, std=0.1),
    "weight_noise": partial(reg.weight_noise, std=0.01),
}


@pytest.mark.parametrize("name", ALL)
def test_every_objective_trains_in_bfloat16_with_a_batch_in_parts(name: str) -> None:
    data = load("digits", train_size=64)
    recipe = Recipe(epochs=2, batch_size=32, precision="bfloat16", accumulate=2, objective=ALL[name])
    model = fresh(partial(convnet, (1, 8, 8), 10, width=4), recipe, seed=0)
    history = fit(model, data, recipe, seed=0)
    assert history["train_loss"][-1] < history["train_loss"][0]
    exact = fresh(partial(convnet, (1, 8, 8), 10, width=4), recipe, seed=0)
    plain = fit(exact, data, replace(recipe, precision="float32"), seed=0)
    assert history["train_loss"][0] == pytest.approx(plain["train_loss"][0], rel=0.05)


# --- One forward pass for all -----------------------------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.model(x)


CHAINS: list[tuple[Objective, int]] = [
    (cross_entropy, 1),
    (partial(reg.confidence_penalty, objective=partial(reg.l1, strength=1.0)), 1),
    (partial(reg.jacobian_penalty, strength=1.0, objective=reg.confidence_penalty), 1),
    (partial(reg.gradient_penalty, strength=1.0, objective=reg.confidence_penalty), 1),
    (partial(reg.r_drop, alpha=1.0, objective=partial(reg.l2, weight_decay=1.0)), 2),
    (partial(reg.confidence_penalty, objective=partial(reg.r_drop, alpha=1.0)), 3),  # two answers of its own
    (partial(reg.virtual_adversarial, eps=1.0, objective=reg.label_smoothing), 3),
    (partial(reg.confidence_penalty, objective=partial(reg.virtual_adversarial, eps=1.0)), 3),
    (partial(reg.input_noise, std=0.1, objective=reg.confidence_penalty), 1),
    (partial(reg.confidence_penalty, objective=partial(reg.weight_noise, std=0.1)), 2),
]


@pytest.mark.parametrize(("objective", "passes"), CHAINS, ids=[str(k) for k in range(len(CHAINS))])
def test_wrapped_objectives_share_their_passes(objective: Objective, passes: int) -> None:
    counted, (x, y) = Counted(network("mlp")).train(), images()
    objective(counted, x, y).backward()
    assert counted.passes == passes
    assert all(p.grad is not None for p in counted.parameters())


def test_chains_add_up(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    plain = cross_entropy(model, x, y)
    chain = partial(
        reg.l2,
        weight_decay=0.1,
        objective=partial(
            reg.jacobian_penalty,
            strength=0.2,
            objective=partial(reg.confidence_penalty, beta=0.3, objective=partial(reg.l1, strength=0.4)),
        ),
    )
    parts = [
        reg.l2(model, x, y, weight_decay=0.1),
        reg.jacobian_penalty(model, x, y, strength=0.2),
        reg.confidence_penalty(model, x, y, beta=0.3),
        reg.l1(model, x, y, strength=0.4),
    ]
    assert chain(model, x, y).item() == pytest.approx(sum(p.item() for p in parts) - 3 * plain.item(), rel=1e-12)


def test_seen_answers_for_its_batch_alone() -> None:
    model, (x, _) = network("mlp"), images()
    logits = torch.zeros(len(x), 4)
    seen = reg.Seen(model, x, logits)
    assert seen(x) is logits
    torch.testing.assert_close(seen(x.clone()), model(x))
    assert reg.unseen(reg.Seen(seen, x, logits)) is model
    assert [id(p) for p in seen.parameters()] == [id(p) for p in model.parameters()]
    assert not reg.Seen(model.eval(), x, logits).training


# --- Spectral normalisation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make", [partial(nn.Linear, 7, 5), partial(nn.Conv2d, 3, 4, 3)], ids=["linear", "conv"])
def test_spectral_norm_is_torchs_over_steps(make: Callable[[], nn.Module], steps: int) -> None:
    ours = make().double()
    theirs = copy.deepcopy(ours)
    reg.spectral_norm(ours, n_power_iterations=steps, generator=generator())
    parametrizations.spectral_norm(theirs, n_power_iterations=steps)
    mine, yours = ours.parametrizations.weight[0], theirs.parametrizations.weight[0]  # type: ignore[index,union-attr]
    yours._u.copy_(mine.u)  # type: ignore[operator,union-attr]
    yours._v.copy_(mine.v)  # type: ignore[operator,union-attr]
    x = normal(4, 7) if isinstance(ours, nn.Linear) else normal(4, 3, 6, 6)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.5) for layer in (ours, theirs)]
    for step in range(6):
        train = step != 3  # in evaluation the vectors stay
        outputs = []
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            layer.train(train)
            optimizer.zero_grad()
            output = layer(x)
            (output - 1).square().mean().backward()
            optimizer.step()
            outputs.append(output.detach())
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine.u, yours._u, rtol=1e-12, atol=1e-12)  # type: ignore[union-attr]


def test_spectral_norm_trains_in_bfloat16() -> None:
    model = reg.with_spectral_norm(network("mlp"), generator=generator()).float().train()
    x = normal(20, 1, 8, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().mean().backward()
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert model.eval()(x).dtype == torch.float32


def test_a_normalised_network_stretches_nothing() -> None:
    model = reg.with_spectral_norm(network("mlp"), n_power_iterations=300, generator=generator()).train()
    x = normal(20, 1, 8, 8)
    model(x)
    for layer in (part for part in model.modules() if isinstance(part, nn.Linear)):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, rel=1e-6)
    a, b = normal(200, 1, 8, 8, seed=1), normal(200, 1, 8, 8, seed=2)
    ratio = (model(a) - model(b)).norm(dim=1) / (a - b).flatten(1).norm(dim=1)
    assert ratio.max().item() <= 1
    expected = model.eval()(x)
    for layer in [part for part in model.modules() if isinstance(part, nn.Linear)]:
        parametrize.remove_parametrizations(layer, "weight")
    assert model.state_dict().keys() == network("mlp").state_dict().keys()
    torch.testing.assert_close(model(x), expected)


# --- R-Drop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_r_drop_is_its_formula(alpha: float) -> None:
    model, (x, y) = reg.with_dropout(network("mlp"), 0.4), images()
    torch.manual_seed(3)
    found = reg.r_drop(model, x, y, alpha=alpha)
    torch.manual_seed(3)
    p, q = model(x).log_softmax(1), model(x).log_softmax(1)
    both = F.kl_div(p, q, log_target=True, reduction="batchmean") + F.kl_div(
        q, p, log_target=True, reduction="batchmean"
    )
    assert both.item() > 1e-3
    expected = F.nll_loss(p, y) + F.nll_loss(q, y) + alpha * 0.5 * both
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_r_drop_without_dropout_is_twice_the_loss() -> None:
    model, (x, y) = network("mlp"), images()
    assert reg.r_drop(model, x, y, alpha=5.0).item() == pytest.approx(2 * cross_entropy(model, x, y).item())


def test_r_drop_inside_another_still_draws_twice() -> None:
    """Were the answer at hand taken for both, they would agree and the penalty be 0."""
    model, (x, y) = reg.with_dropout(network("mlp"), 0.4), images()
    inside = partial(reg.confidence_penalty, beta=0.0, objective=partial(reg.r_drop, alpha=100.0))
    torch.manual_seed(3)
    plain = reg.r_drop(model, x, y, alpha=0.0).item()
    assert inside(model, x, y).item() > plain + 0.1


# --- Virtual adversarial training -------------------------------------------------------------------------------------


def fishers(model: nn.Module, x: Tensor) -> Tensor:
    """The second derivative of the divergence by the change, ``[N, D, D]``, of each example."""

    def divergence(r: Tensor, row: Tensor) -> Tensor:
        p = model(row[None]).log_softmax(1).detach()
        return F.kl_div(model((row + r)[None]).log_softmax(1), p, log_target=True, reduction="sum")

    return torch.stack([hessian(divergence)(torch.zeros_like(row), row) for row in x])


def test_power_iteration_finds_the_worst_direction(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    values, vectors = torch.linalg.eigh(fishers(model, x).detach())
    logits = model(x)
    d = reg.worst_direction(model, x, logits, xi=1e-5, power_iterations=400, generator=generator())
    torch.testing.assert_close(d.norm(dim=1), torch.ones(COUNT, dtype=torch.float64))
    overlap = (d * vectors[:, :, -1]).sum(1).abs()
    separated = values[:, -2] < 0.98 * values[:, -1]
    assert int(separated.sum()) >= 5
    assert overlap[separated].min().item() == pytest.approx(1, rel=1e-6)
    once = reg.worst_direction(model, x, logits, xi=1e-5, power_iterations=1, generator=generator())
    start = unit_rows(tuple(x.shape), x, generator())
    expected = F.normalize(torch.einsum("nij,nj->ni", fishers(model, x), start), dim=1)
    torch.testing.assert_close(once, expected.detach(), rtol=1e-3, atol=1e-3)


def test_the_penalty_is_half_the_largest_eigenvalue_and_more_than_of_chance(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    eps = 1e-3
    largest = torch.linalg.eigvalsh(fishers(model, x))[:, -1].mean().item()
    loss = reg.virtual_adversarial(model, x, y, eps=eps, xi=1e-5, power_iterations=400, generator=generator())
    added = loss.item() - cross_entropy(model, x, y).item()
    assert added == pytest.approx(0.5 * eps**2 * largest, rel=5e-3)
    chance = reg.kl_divergence(model(x), model(x + eps * F.normalize(normal(COUNT, INPUTS, seed=4), dim=1)))
    assert added > 1.2 * chance.mean().item()
    twice = reg.virtual_adversarial(
        model, x, y, eps=eps, alpha=2.0, xi=1e-5, power_iterations=400, generator=generator()
    )
    assert (twice - loss).item() == pytest.approx(added, rel=1e-6)


def test_its_gradient_takes_the_clean_answer_and_the_direction_as_constants(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    found = gradients(model, reg.virtual_adversarial(model, x, y, eps=0.5, generator=generator()))
    d = reg.worst_direction(model, x, model(x), generator=generator())
    p = model(x).detach().log_softmax(1)
    loss = cross_entropy(model, x, y) + F.kl_div(
        model(x + 0.5 * d).log_softmax(1), p, log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(found, gradients(model, loss))


def test_running_statistics_see_the_clean_batch_alone() -> None:
    model, (x, y) = network("convnet").train(), images()
    plain = copy.deepcopy(model)
    plain(x)
    reg.virtual_adversarial(model, x, y, eps=5.0).backward()
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(part.track_running_stats for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    # within, batch norm still normalises by the batch
    with statistics_rest(model):
        torch.testing.assert_close(model(3 * x), plain(3 * x))


def test_kl_divergence_is_torchs() -> None:
    p, q = normal(6, 5), normal(6, 5, seed=1)
    expected = F.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(reg.kl_divergence(p, q), expected)


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("strength=-1: must be", lambda: reg.gradient_penalty(network(), *images(), strength=-1)),
    ("strength=-1: must be", lambda: reg.jacobian_penalty(network(), *images(), strength=-1)),
    ("projections=0: must be", lambda: reg.projected_jacobian_penalty(network(), *images(), strength=1, projections=0)),
    ("alpha=-1: must be", lambda: reg.r_drop(network(), *images(), alpha=-1)),
    ("eps=0: must be a number above 0", lambda: reg.virtual_adversarial(network(), *images(), eps=0)),
    ("xi=0: must be a number above 0", lambda: reg.virtual_adversarial(network(), *images(), eps=1, xi=0)),
    ("power_iterations=0: must", lambda: reg.virtual_adversarial(network(), *images(), eps=1, power_iterations=0)),
    ("n_power_iterations=0: must", lambda: reg.spectral_norm(nn.Linear(2, 2), n_power_iterations=0)),
    ("name='bias': must be a parameter of Linear", lambda: reg.spectral_norm(nn.Linear(2, 2), "bias")),
    ("network=Flatten: must have a linear", lambda: reg.with_spectral_norm(nn.Flatten())),
]


@pytest.mark.parametrize(("message", "bad"), BAD, ids=[f"{k}: {message}" for k, (message, _) in enumerate(BAD)])
def test_bad_settings_are_named(message: str, bad: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bad()


@pytest.mark.gpu
@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_on_the_gpu(name: str, architecture: str) -> None:
    model, (x, y) = network(architecture).eval(), images()
    here = PENALISED[name](model, x, y).item()
    there = PENALISED[name](model.cuda(), x.cuda(), y.cuda())
    there.backward()
    assert there.item() == pytest.approx(here, rel=1e-6)
