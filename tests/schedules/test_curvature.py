"""Eigenvalues from products against the whole matrix, and the limits of stability against descents that cross them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import optimizers
from course_lib.lab.data import Split, batches, load
from course_lib.lab.models import convnet, mlp, vit
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.schedules import curvature
from course_lib.schedules.curvature import hessian_vector, lanczos, power_iteration, preconditioned_sharpness, sharpness

RECIPE = Recipe(epochs=1, precision="float64")
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": partial(mlp, (1, 8, 8), 10, width=3),
    "convnet": partial(convnet, (1, 8, 8), 10, width=1),
    "vit": partial(vit, (1, 8, 8), 10, width=4, depth=1, heads=2, patch=4),
}


@pytest.fixture(scope="module")
def split() -> Split:
    return load("digits", train_size=24).train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(split: Split) -> Tensor:
    return next(batches(split, len(split), dtype=torch.float64))[0]


def exact_hessian(model: nn.Module, split: Split) -> Tensor:
    """The whole matrix, from one vector of all weights."""
    x = inputs(split)
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    buffers = {n: b.detach() for n, b in model.named_buffers()}

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([s.numel() for s in shapes])
        weights = {n: part.view(s) for n, s, part in zip(names, shapes, parts, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights | buffers, (x,)), split.labels)

    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    if any(isinstance(part, nn.LayerNorm) for part in model.modules()):
        # torch.func.hessian of torch 2.13 is not symmetric where a layer norm has weights: one reverse pass a row
        with sdpa_kernel(SDPBackend.MATH):
            hessian = torch.autograd.functional.hessian(loss, weights)
    else:
        hessian = torch.func.hessian(loss)(weights)
    torch.testing.assert_close(hessian, hessian.mT, rtol=0, atol=1e-12)
    return hessian


@pytest.fixture(scope="module", params=MODELS)
def measured(request: pytest.FixtureRequest, split: Split) -> tuple[nn.Module, Tensor]:
    model = fresh(MODELS[request.param], RECIPE, seed=0).eval()
    return model, exact_hessian(model, split)


def test_the_product_is_that_of_the_whole_hessian_however_large_the_batches(
    measured: tuple[nn.Module, Tensor], split: Split
) -> None:
    model, hessian = measured
    before = copy.deepcopy(model.state_dict())
    v = torch.randn(len(hessian), generator=generator(), dtype=torch.float64)
    for batch_size in (1024, 7):
        found = hessian_vector(model, split, batch_size=batch_size)(v)
        torch.testing.assert_close(found, hessian @ v, rtol=1e-9, atol=1e-10 * float((hessian @ v).norm()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_sharpness_is_the_largest_eigenvalue(measured: tuple[nn.Module, Tensor], split: Split) -> None:
    model, hessian = measured
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    for seed in (0, 1):
        found = sharpness(model, split, generator=generator(seed), steps=60, tolerance=0.0)
        assert found == pytest.approx(largest, rel=1e-6)
    # and with the tolerance and the number of steps by which it is usually stopped
    assert sharpness(model, split, generator=generator()) == pytest.approx(largest, rel=1e-2)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, optimizers.Adam])
def test_preconditioned_sharpness_is_that_of_the_divided_hessian(make: Any, amsgrad: bool, split: Split) -> None:
    model = fresh(MODELS["mlp"], RECIPE, seed=0)
    optimizer = make(model.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-3, amsgrad=amsgrad)
    x = inputs(split)
    means, steps = [torch.zeros_like(p) for p in model.parameters()], 3
    squares = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), split.labels) * 0.1**step).backward()  # falling gradients: the squares fall, too
        for mean, square, p in zip(means, squares, model.parameters(), strict=True):
            assert p.grad is not None
            mean.mul_(0.95).add_(0.05 * p.grad**2)
            square.copy_(torch.maximum(square, mean) if amsgrad else mean)
        optimizer.step()
    scale = torch.cat([(s / (1 - 0.95**steps)).sqrt().flatten() + 1e-3 for s in squares]) * (1 - 0.8**steps)
    divided = exact_hessian(model, split) / scale[:, None]  # not symmetric: its eigenvalues are real all the same
    expected = torch.linalg.eigvals(divided).real.max().item()
    found = preconditioned_sharpness(model, split, optimizer, generator=generator(), steps=60, tolerance=0.0)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_frozen_part_counts_as_constant(split: Split) -> None:
    model = fresh(MODELS["mlp"], RECIPE, seed=0)
    hessian = exact_hessian(model, split)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    rest = hessian[first.numel() :, first.numel() :]
    found = sharpness(model, split, generator=generator(), steps=60, tolerance=0.0)
    assert found == pytest.approx(torch.linalg.eigvalsh(rest)[-1].item(), rel=1e-6)


def test_it_can_be_watched_while_a_network_trains() -> None:
    data = load("digits", train_size=64)

    def watched(model: nn.Module, data: Any) -> float:
        return sharpness(model, data.train, generator=generator())

    recipe = Recipe(epochs=2, precision="float64", watch={"sharpness": watched})
    plain = fresh(MODELS["mlp"], recipe, seed=0)
    model = copy.deepcopy(plain)
    history = fit(model, data, recipe, seed=0)
    fit(plain, data, RECIPE.__class__(epochs=2, precision="float64"), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert history["sharpness"][-1] == watched(model, data) > 0


# --- Any matrix -------------------------------------------------------------------------------------------------------


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator(seed), dtype=torch.float64))
    return q @ torch.diag(values.double()) @ q.mT


def start(count: int) -> Tensor:
    return torch.randn(count, generator=generator(9), dtype=torch.float64)


def test_lanczos_finds_all_of_a_small_spectrum_and_both_ends_of_a_large_one() -> None:
    values = torch.tensor([-5.0, -1.0, 0.0, 0.5, 2.0, 4.0]).double()
    a = symmetric(values)
    torch.testing.assert_close(lanczos(lambda v: a @ v, start(6), 50), values, rtol=0, atol=1e-12)
    large = torch.cat([torch.linspace(-1, 1, 298), torch.tensor([-7.0, 3.0])]).double()
    b = symmetric(large)
    found = lanczos(lambda v: b @ v, start(300), 30)
    assert len(found) == 30
    assert found[0].item() == pytest.approx(-7, rel=1e-10)
    assert found[-1].item() == pytest.approx(3, rel=1e-10)


def test_lanczos_stops_where_there_is_no_more_and_at_its_tolerance() -> None:
    calls: list[int] = []
    a = symmetric(torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 0.0]))  # three different values: three steps hold all

    def product(v: Tensor) -> Tensor:
        calls.append(1)
        return a @ v

    torch.testing.assert_close(lanczos(product, start(6), 6), torch.tensor([0.0, 1, 3]).double(), rtol=0, atol=1e-12)
    assert len(calls) == 3
    calls.clear()
    b = symmetric(torch.cat([torch.linspace(0, 1, 99), torch.tensor([50.0])]))
    found = lanczos(lambda v: (calls.append(1), b @ v)[1], start(100), 90, tolerance=1e-3)
    assert len(calls) < 8
    assert found[-1].item() == pytest.approx(50, rel=1e-3)


def test_a_rounding_error_makes_no_ghosts() -> None:
    """Without the orthogonalisation a large eigenvalue is found again and again, and pushes the others aside."""
    values = torch.cat([torch.linspace(0, 1, 60), torch.tensor([1e4, 2.0])]).double()
    a = symmetric(values)
    found = lanczos(lambda v: a @ v, start(62), 62)
    torch.testing.assert_close(found, values.sort().values, rtol=1e-6, atol=1e-6)


def test_power_iteration_finds_the_largest_magnitude() -> None:
    for values, expected in (([-5.0, 1.0, 4.0], -5.0), ([0.0, 1.0, 3.0], 3.0), ([0.0, 0.0, 0.0], 0.0)):
        a = symmetric(torch.tensor(values))
        found, v = power_iteration(partial(torch.matmul, a), start(3), 200)
        assert found == pytest.approx(expected, abs=1e-10)
        assert float((a @ v - expected * v).norm()) < 1e-8


# --- Stability --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("lr", [0.1, 0.03])
def test_descent_on_a_parabola_diverges_right_above_the_limit(lr: float, momentum: float) -> None:
    def distance(curvature_: float, make: Callable[..., torch.optim.Optimizer]) -> float:
        w = torch.ones(1, dtype=torch.float64, requires_grad=True)
        optimizer = make([w])
        for _ in range(4000):
            w.grad = curvature_ * w.detach()
            optimizer.step()
        return w.abs().item()

    sgd = partial(torch.optim.SGD, lr=lr, momentum=momentum)
    limit = curvature.stability_limit(lr, momentum)
    assert distance(0.99 * limit, sgd) < 1e-2 < 1 < distance(1.01 * limit, sgd)
    # Adam with a divisor that is constant: its momentum is a mean of gradients
    mean = partial(torch.optim.SGD, lr=lr, momentum=momentum, dampening=momentum)
    limit = curvature.adam_stability_limit(lr, momentum)
    assert distance(0.99 * limit, mean) < 1e-2 < 1 < distance(1.01 * limit, mean)


def test_adams_limit_is_38_over_the_rate() -> None:
    assert curvature.adam_stability_limit(1e-3) == pytest.approx(38e3)


BAD: list[tuple[str, Callable[[nn.Module, Split], Any]]] = [
    ("lr=0: must be a number above 0", lambda m, s: curvature.stability_limit(0)),
    ("momentum=1: must be a number from 0 to below 1", lambda m, s: curvature.stability_limit(0.1, 1)),
    ("beta1=-1: must be", lambda m, s: curvature.adam_stability_limit(0.1, -1)),
    ("steps=0: must be a whole number of at least 1", lambda m, s: sharpness(m, s, generator=generator(), steps=0)),
    ("tolerance=-1: must be", lambda m, s: sharpness(m, s, generator=generator(), tolerance=-1)),
    (
        "keeps no squared gradients ('exp_avg_sq')",
        lambda m, s: preconditioned_sharpness(m, s, torch.optim.SGD(m.parameters()), generator=generator()),
    ),
    ("model='Flatten': must be a network with weights", lambda m, s: hessian_vector(nn.Flatten(), s)),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings_are_named(message: str, call: Callable[[nn.Module, Split], Any], split: Split) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(fresh(MODELS["mlp"], RECIPE, seed=0), split)
