"""Every optimizer against a reference: torch.optim, pytorch_optimizer, or the formula evaluated apart in float64."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from course_lib import optimizers as ours
from course_lib.optimizers import LAMB, SAM, SGD, Adam, AdamW, Lion, Lookahead, Muon, Shampoo, _method

STEPS = 100
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
Make = Callable[[Any], torch.optim.Optimizer]


# --- A network with tensors of 0, 1, 2 and 4 dimensions ---------------------------------------------------------------


class Net(nn.Module):
    """A convolution [4, 1, 3, 3], a linear layer [3, 64], their biases, a scalar gain, and a weight never used."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> nn.Parameter:
            scale = 1 / math.sqrt(max(1, math.prod(shape[1:])))
            return nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype))

        self.filters, self.filter_bias = normal(4, 1, 3, 3), normal(4)
        self.weight, self.bias = normal(3, 64), normal(3)
        self.hidden = normal(64, 64)
        self.gain = nn.Parameter(torch.tensor(1.5, dtype=dtype))
        self.unused = normal(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(nn.functional.conv2d(x, self.filters, self.filter_bias)).flatten(1)
        return self.gain * nn.functional.linear(torch.tanh(x @ self.hidden), self.weight, self.bias)

    def groups(self, **second: Any) -> list[dict[str, Any]]:
        """Two groups; the second with settings of its own."""
        first = [self.filters, self.bias, self.gain]
        return [{"params": first}, {"params": [self.weight, self.filter_bias, self.hidden, self.unused], **second}]

    def matrices(self, **second: Any) -> list[dict[str, Any]]:
        return [{"params": [self.weight]}, {"params": [self.hidden, self.unused], **second}]


def batch(step: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(16, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (16,), generator=generator)
    return x.to(device, dtype), y.to(device)


def closure_for(net: nn.Module, optimizer: torch.optim.Optimizer, step: int, calls: list[int] | None = None) -> Any:
    reference = next(net.parameters())
    x, y = batch(step, reference.dtype, reference.device)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        if step % 3 == 1:
            net.filter_bias.grad = None  # a parameter that takes part in some steps only
        if calls is not None:
            calls.append(step)
        return loss

    return closure


def train(net: Net, optimizer: torch.optim.Optimizer, first: int = 0, steps: int = STEPS) -> Net:
    """Train by closures; halfway the learning rate falls to a third, as a schedule would do it."""
    for step in range(first, first + steps):
        if step == STEPS // 2:
            for group in optimizer.param_groups:
                group["lr"] /= 3
        optimizer.step(closure_for(net, optimizer, step))
    return net


def difference(a: nn.Module, b: nn.Module) -> float:
    """The largest relative difference of any tensor."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((x.detach().double() - y.detach().double()).norm() / y.detach().double().norm()) for x, y in pairs)


def assert_agree(
    make: Make,
    reference: Make,
    tolerance: float,
    dtype: torch.dtype = torch.float64,
    groups: Callable[[Net], Any] = lambda net: net.groups(weight_decay=0.02, lr=0.004),
) -> float:
    a, b = Net(dtype), Net(dtype)
    start = Net(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(a, make(groups(a)))
        train(b, reference(groups(b)))
    assert difference(b, start) > 1e-2, "the reference did not move: the comparison says nothing"
    assert torch.equal(a.unused, start.unused)
    measured = difference(a, b)
    assert measured <= tolerance
    return measured


# --- Against torch.optim ----------------------------------------------------------------------------------------------

TORCH_CASES = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.001, "momentum": 0.5, "maximize": True}),
    ("Adagrad", {"lr": 0.03}),
    ("Adagrad", {"lr": 0.03, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.1, "eps": 1e-3}),
    ("RMSprop", {"lr": 0.003}),
    ("RMSprop", {"lr": 0.003, "momentum": 0.8, "alpha": 0.9, "weight_decay": 0.05}),
    ("RMSprop", {"lr": 0.003, "centered": True, "eps": 1e-3}),
    ("RMSprop", {"lr": 0.003, "centered": True, "momentum": 0.5, "maximize": True, "eps": 1e-3}),
    ("Adam", {"lr": 0.01}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "betas": (0.9, 0.9), "weight_decay": 0.05}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
]
MUON_CASES = [
    {"lr": 0.02},
    {"lr": 0.02, "nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
    {"lr": 0.05, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    {"lr": 0.02, "ns_coefficients": (2.0, -1.5, 0.5), "adjust_lr_fn": "original"},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "settings"), TORCH_CASES, ids=str)
def test_agrees_with_torch(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    assert_agree(
        lambda groups: getattr(ours, name)(groups, **settings),
        lambda groups: getattr(torch.optim, name)(groups, **settings),
        TOLERANCE[dtype],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("settings", MUON_CASES, ids=str)
def test_muon_agrees_with_torch(settings: dict[str, Any], dtype: torch.dtype) -> None:
    assert_agree(
        lambda groups: Muon(groups, **settings),
        lambda groups: torch.optim.Muon(groups, **settings),
        TOLERANCE[dtype],
        dtype,
        lambda net: net.matrices(lr=0.01, weight_decay=0.3),
    )


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Muon"])
def test_arguments_are_those_of_the_namesake(name: str) -> None:
    mine = inspect.signature(getattr(ours, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    # Of torch's execution, not of the method; and AdamW in Adam's clothes.
    switches = {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
    assert list(mine) == [argument for argument in theirs if argument not in switches]
    for argument, parameter in mine.items():
        assert parameter.default == theirs[argument].default


# --- Against the formula, evaluated apart in float64 ------------------------------------------------------------------


class Formula(torch.optim.Optimizer):
    """Applies ``rule(theta, g, state, t, **settings) -> theta`` on NumPy arrays."""

    def __init__(self, params: Any, rule: Callable[..., np.ndarray], **settings: Any) -> None:
        super().__init__(params, settings)
        self.rule = rule

    def step(self, closure: Any) -> Any:
        loss = closure()
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["t"] = state.get("t", 0) + 1
                    new = self.rule(p.detach().numpy().copy(), p.grad.numpy(), state, state["t"], **settings)
                    p.data = torch.from_numpy(np.asarray(new))
        return loss


def lion_formula(theta, g, state, t, *, lr, betas, weight_decay):
    m = state.get("m", np.zeros_like(theta))
    c = betas[0] * m + (1 - betas[0]) * g
    state["m"] = betas[1] * m + (1 - betas[1]) * g
    return theta - lr * (np.sign(c) + weight_decay * theta)


def lamb_formula(theta, g, state, t, *, lr, betas, eps, weight_decay):
    m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * g**2
    r = (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    u = r + weight_decay * theta
    return theta - lr * np.linalg.norm(np.ravel(theta)) / np.linalg.norm(np.ravel(u)) * u


def shampoo_formula(theta, g, state, t, *, lr, weight_decay, momentum, matrix_eps, precondition_frequency):
    """The Kronecker product of all roots, as one large matrix, times the gradient as one long vector."""
    g = np.atleast_1d(g + weight_decay * theta)
    k = g.ndim
    state.setdefault("H", [matrix_eps * np.eye(n) for n in g.shape])
    for i in range(k):
        others = [j for j in range(k) if j != i]
        state["H"][i] = state["H"][i] + np.tensordot(g, g, axes=(others, others))
    if (t - 1) % precondition_frequency == 0:
        state["roots"] = [np.real(scipy.linalg.fractional_matrix_power(H, -1 / (2 * k))) for H in state["H"]]
    whole = np.eye(1)
    for root in state["roots"]:
        whole = np.kron(whole, root)
    state["b"] = momentum * state.get("b", 0) + (whole @ g.ravel()).reshape(np.shape(theta))
    return theta - lr * state["b"]


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.002, "betas": (0.9, 0.99), "weight_decay": 0.0},
        {"lr": 0.002, "betas": (0.5, 0.8), "weight_decay": 0.5},
    ],
)
def test_lion_agrees_with_formula(settings: dict[str, Any]) -> None:
    assert_agree(
        lambda groups: Lion(groups, **settings), lambda groups: Formula(groups, lion_formula, **settings), 1e-12
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0},
        {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.3},
    ],
)
def test_lamb_agrees_with_formula(settings: dict[str, Any]) -> None:
    assert_agree(
        lambda groups: LAMB(groups, **settings), lambda groups: Formula(groups, lamb_formula, **settings), 1e-11
    )


def small_groups(net: Net) -> Any:
    return [{"params": [net.filters, net.gain]}, {"params": [net.bias, net.filter_bias], "lr": 0.02}]


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.05, "weight_decay": 0.0, "momentum": 0.0, "matrix_eps": 1e-6, "precondition_frequency": 1},
        {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.8, "matrix_eps": 1e-2, "precondition_frequency": 7},
    ],
)
def test_shampoo_agrees_with_formula(settings: dict[str, Any]) -> None:
    make = lambda groups: Shampoo(groups, **settings)  # noqa: E731
    assert_agree(make, lambda groups: Formula(groups, shampoo_formula, **settings), 1e-8, groups=small_groups)


def test_shampoo_keeps_only_the_diagonal_of_long_dimensions() -> None:
    generator = torch.Generator().manual_seed(3)
    theta = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    rows, columns = torch.full((6,), 0.1, dtype=torch.float64), 0.1 * torch.eye(4, dtype=torch.float64)
    p = nn.Parameter(theta.clone())
    optimizer = Shampoo([p], lr=0.3, matrix_eps=0.1, max_precondition_dim=5)
    for _ in range(4):
        g = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        p.grad = g.clone()
        optimizer.step()
        rows += g.square().sum(1)
        columns += g.T @ g
        right = torch.from_numpy(scipy.linalg.fractional_matrix_power(columns.numpy(), -0.25))
        theta -= 0.3 * rows[:, None] ** -0.25 * g @ right
    torch.testing.assert_close(p.detach(), theta, rtol=1e-10, atol=1e-12)


# --- Against the pytorch_optimizer package ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package() -> Any:
    return pytest.importorskip("pytorch_optimizer")


def test_lion_agrees_with_package(package: Any) -> None:
    settings = {"lr": 0.002, "weight_decay": 0.1}
    assert_agree(lambda groups: Lion(groups, **settings), lambda groups: package.Lion(groups, **settings), 1e-12)


def test_lamb_agrees_with_package_where_both_mean_the_same(package: Any) -> None:
    # The package corrects no bias and clamps norms at 10: with betas of 0 and small weights that makes no difference.
    settings = {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-12}
    reference = lambda groups: package.Lamb(groups, weight_decouple=False, **settings)  # noqa: E731
    plain = lambda net: net.groups(weight_decay=0.05, lr=0.004)  # noqa: E731
    assert_agree(lambda groups: LAMB(groups, weight_decay=0.0, **settings), reference, 1e-9, groups=plain)


def test_shampoo_agrees_with_package(package: Any) -> None:
    settings = {"lr": 0.03, "matrix_eps": 1e-3, "weight_decay": 0.01}
    groups = lambda net: [{"params": [net.weight, net.bias]}, {"params": [net.filter_bias], "lr": 0.01}]  # noqa: E731
    make, reference = (lambda g: Shampoo(g, **settings)), (lambda g: package.Shampoo(g, **settings))
    assert_agree(make, reference, 1e-8, groups=groups)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_agrees_with_package(package: Any, adaptive: bool) -> None:
    a, b = Net(), Net()
    mine = SAM(SGD(a.groups(lr=0.02), lr=0.1, momentum=0.9), rho=0.2, adaptive=adaptive)
    theirs = package.SAM(b.groups(lr=0.02), torch.optim.SGD, rho=0.2, adaptive=adaptive, lr=0.1, momentum=0.9)
    for step in range(STEPS):
        mine.step(closure_for(a, mine, step))
        closure = closure_for(b, theirs, step)
        closure()
        theirs.step(closure)
    assert difference(b, Net()) > 0.1
    assert difference(a, b) <= 1e-5  # the package computes the norm in float32


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_agrees_with_formula(adaptive: bool) -> None:
    net, rate, rho = Net(), 0.1, 0.2
    names = [name for name, _ in net.named_parameters() if name != "unused"]
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}

    def gradient(at: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        at = {name: value.clone().requires_grad_() for name, value in at.items()}
        x, y = batch(step, torch.float64)
        loss = nn.functional.cross_entropy(torch.func.functional_call(net, at, (x,)), y)
        return dict(zip(names, torch.autograd.grad(loss, [at[name] for name in names]), strict=True))

    for step in range(0, 3 * STEPS, 3):
        g = gradient(weights, step)
        unit = {name: weights[name].abs() if adaptive else torch.ones_like(weights[name]) for name in names}
        norm = math.sqrt(sum(float((unit[name] * g[name]).square().sum()) for name in names))
        worst = {name: weights[name] + rho / norm * unit[name] ** 2 * g[name] for name in names}
        g = gradient(worst, step)
        weights = {name: weights[name] - rate * g[name] if name in g else weights[name] for name in weights}
    optimizer = SAM(SGD(net.parameters(), lr=rate), rho=rho, adaptive=adaptive)
    for step in range(0, 3 * STEPS, 3):
        optimizer.step(closure_for(net, optimizer, step))
    reference = Net()
    reference.load_state_dict(weights)
    assert difference(reference, Net()) > 0.1
    assert difference(net, reference) <= 1e-11


@pytest.mark.parametrize(("k", "alpha"), [(5, 0.5), (3, 0.8)])
def test_lookahead_agrees_with_package(package: Any, k: int, alpha: float) -> None:
    assert_agree(
        lambda groups: Lookahead(SGD(groups, lr=0.05, momentum=0.9), k=k, alpha=alpha),
        lambda groups: package.Lookahead(torch.optim.SGD(groups, lr=0.05, momentum=0.9), k=k, alpha=alpha),
        1e-12,
        groups=lambda net: [{"params": [net.filters, net.hidden, net.weight]}, {"params": [net.bias], "lr": 0.01}],
    )


# --- Newton-Schulz ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_newton_schulz_puts_singular_values_near_one_and_keeps_directions(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    S = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    result = ours.newton_schulz(U * S @ Vh, dtype=torch.float64)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.65
    assert values.max() < 1.25
    inside = U.T @ result @ Vh.T  # diagonal when the singular vectors are untouched
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-12)
    polar = U @ Vh
    assert float((result * polar).sum() / (result.norm() * polar.norm())) > 0.97


def test_newton_schulz_maps_each_singular_value_by_the_polynomial() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    sigma = torch.linalg.svdvals(matrix) / matrix.norm()
    a, b, c = coefficients = (3.0, -3.2, 1.2)
    for steps in range(4):
        values = torch.linalg.svdvals(ours.newton_schulz(matrix, steps, coefficients, dtype=torch.float64))
        torch.testing.assert_close(values, sigma.abs().sort(descending=True).values, rtol=1e-9, atol=1e-12)
        sigma = a * sigma + b * sigma**3 + c * sigma**5


def test_newton_schulz_default_runs_in_bfloat16_and_equals_torch() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    for shape in [(20, 30), (30, 20)]:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
        before = matrix.clone()
        result = ours.newton_schulz(matrix)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, _zeropower_via_newtonschulz(matrix.clone(), (3.4445, -4.775, 2.0315), 5, 1e-7))
        assert torch.equal(matrix, before)
    with pytest.raises(ValueError, match=r"matrix has shape \(3,\)"):
        ours.newton_schulz(torch.ones(3))


# --- Properties -------------------------------------------------------------------------------------------------------


def moved(make: Make, start: Tensor, gradients: list[Tensor]) -> Tensor:
    theta = nn.Parameter(start.clone())
    optimizer = make([theta])
    for g in gradients:
        theta.grad = g.clone()
        optimizer.step()
    return theta.detach() - start


def gradients(count: int = 3, shape: tuple[int, ...] = (8, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_lion_moves_every_weight_by_exactly_the_learning_rate() -> None:
    change = moved(lambda p: Lion(p, lr=0.25), torch.zeros(8, 5, dtype=torch.float64), gradients(1))
    assert torch.equal(change, -0.25 * gradients(1)[0].sign())


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_adam_and_lion_ignore_the_scale_of_the_gradient(scale: float) -> None:
    start = torch.zeros(8, 5, dtype=torch.float64)
    for make in (lambda p: Adam(p, eps=0.0), Lion):
        scaled = moved(make, start, [scale * g for g in gradients()])
        torch.testing.assert_close(scaled, moved(make, start, gradients()), rtol=1e-9, atol=0)


def test_adam_first_step_is_the_learning_rate_thanks_to_bias_correction() -> None:
    change = moved(lambda p: Adam(p, lr=0.01, eps=0.0), torch.zeros(8, 5, dtype=torch.float64), gradients(1))
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.01))


def test_adamw_decay_does_not_depend_on_the_gradient_and_adams_does() -> None:
    start = torch.ones(8, 5, dtype=torch.float64)

    def decay(cls: type[Adam], scale: float) -> Tensor:
        steps = [scale * g for g in gradients(1)]
        with_decay = moved(lambda p: cls(p, lr=0.1, weight_decay=0.5, eps=0.0), start, steps)
        return with_decay - moved(lambda p: cls(p, lr=0.1, weight_decay=0.0, eps=0.0), start, steps)

    for scale in (0.1, 100.0):
        torch.testing.assert_close(decay(AdamW, scale), torch.full_like(start, -0.05))
    assert not torch.allclose(decay(Adam, 0.1), decay(Adam, 100.0), rtol=0, atol=1e-3)


def test_amsgrad_divisor_never_shrinks() -> None:
    theta = nn.Parameter(torch.zeros(3))
    optimizer = Adam([theta], amsgrad=True, betas=(0.9, 0.5))
    for scale in (5.0, 0.1, 0.1, 0.1):
        theta.grad = torch.full((3,), scale)
        before = optimizer.state[theta].get("max_exp_avg_sq", torch.zeros(3)).clone()
        optimizer.step()
        assert (optimizer.state[theta]["max_exp_avg_sq"] >= before).all()
    assert (optimizer.state[theta]["exp_avg_sq"] < optimizer.state[theta]["max_exp_avg_sq"]).all()


def test_lamb_moves_each_layer_by_the_rate_times_its_norm() -> None:
    for size in (0.01, 1.0, 50.0):
        start = size * gradients(1)[0]
        change = moved(lambda p: LAMB(p, lr=0.1), start, gradients(1))
        assert float(change.norm()) == pytest.approx(0.1 * float(start.norm()))


def test_lamb_still_moves_weights_that_are_zero() -> None:
    change = moved(lambda p: LAMB(p, lr=0.1, eps=0.0), torch.zeros(8, 5, dtype=torch.float64), gradients(1))
    torch.testing.assert_close(change.abs(), torch.full_like(change, 0.1))


def test_shampoo_on_a_single_number_is_adagrad() -> None:
    start, steps = torch.tensor(1.0, dtype=torch.float64), [torch.tensor(g, dtype=torch.float64) for g in (3, -1, 2)]
    a = moved(lambda p: Shampoo(p, lr=0.1, matrix_eps=1e-12), start, steps)
    torch.testing.assert_close(a, moved(lambda p: ours.Adagrad(p, lr=0.1), start, steps))


def test_shampoo_recomputes_its_roots_only_every_so_many_steps() -> None:
    theta = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    optimizer = Shampoo([theta], precondition_frequency=3)
    seen = []
    for g in gradients(6, (4, 3)):
        theta.grad = g
        optimizer.step()
        seen.append(optimizer.state[theta]["inverse_roots"][0].clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [False, False, True, False, False]


# --- SAM and Lookahead, by hand ---------------------------------------------------------------------------------------


def quadratic(theta: Tensor) -> Tensor:
    return 0.5 * (torch.tensor([1.0, 10.0], dtype=torch.float64) * theta**2).sum()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_step_by_hand(adaptive: bool) -> None:
    curvature = torch.tensor([1.0, 10.0], dtype=torch.float64)
    start = torch.tensor([2.0, 0.5], dtype=torch.float64)
    theta = nn.Parameter(start.clone())
    optimizer = SAM(SGD([theta], lr=0.1), rho=0.3, adaptive=adaptive)
    points = []

    def closure() -> Tensor:
        points.append(theta.detach().clone())
        optimizer.zero_grad()
        loss = quadratic(theta)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    g = curvature * start
    climb = 0.3 * start**2 * g / (start * g).norm() if adaptive else 0.3 * g / g.norm()
    assert len(points) == 2
    torch.testing.assert_close(points[1], start + climb)
    distance = (climb / start).norm() if adaptive else climb.norm()
    assert float(distance) == pytest.approx(0.3)
    assert loss.item() == quadratic(start).item()
    torch.testing.assert_close(theta.detach(), start - 0.1 * curvature * (start + climb))
    assert ours.state_bytes(optimizer) == 0  # the way back is forgotten


def test_sam_in_two_halves_equals_sam_by_closure() -> None:
    a, b = Net(), Net()
    one, two = SAM(Adam(a.groups(), lr=0.01)), SAM(Adam(b.groups(), lr=0.01))
    for step in range(5):
        one.step(closure_for(a, one, step))
        closure = closure_for(b, two, step)
        closure()
        two.first_step()
        closure()
        two.second_step()
    assert difference(a, b) == 0
    with pytest.raises(ValueError, match="closure is None"):
        one.step()


def test_sam_without_radius_is_the_base_optimizer_and_a_zero_gradient_stays_finite() -> None:
    a, b = Net(), Net()
    train(a, SAM(SGD(a.groups(), lr=0.1), rho=0.0), steps=5)
    train(b, SGD(b.groups(), lr=0.1), steps=5)
    assert difference(a, b) == 0
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SAM(SGD([theta], lr=0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = quadratic(theta)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(theta.detach(), torch.zeros(2, dtype=torch.float64))


def test_sam_that_is_interrupted_goes_back() -> None:
    net = Net()
    optimizer = SAM(SGD(net.groups(), lr=0.1), rho=0.5)
    calls: list[int] = []
    closure = closure_for(net, optimizer, 0, calls)

    def interrupted() -> Tensor:
        if calls:
            assert difference(net, Net()) > 0.01
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)
    assert difference(net, Net()) == 0


def test_lookahead_by_hand() -> None:
    theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Lookahead(SGD([theta], lr=1.0), k=2, alpha=0.25)
    seen = []
    for _ in range(4):
        theta.grad = torch.ones_like(theta)
        optimizer.step()
        seen.append(theta.item())
    assert seen == [-1.0, -0.5, -1.5, -1.0]  # from 0 to -2, back to a quarter of the way; from there again


@pytest.mark.parametrize("wrap", [SAM, Lookahead], ids=["SAM", "Lookahead"])
def test_wrappers_share_groups_with_their_base(wrap: Any) -> None:
    net = Net()
    base = SGD([net.weight], lr=1.0)
    optimizer = wrap(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    optimizer.step(closure_for(net, optimizer, 0))
    schedule.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.1)
    optimizer.add_param_group({"params": [net.bias], "lr": 0.5})
    assert base.param_groups is optimizer.param_groups
    assert [group["lr"] for group in base.param_groups] == [pytest.approx(0.1), 0.5]
    before = net.bias.detach().clone()
    optimizer.step(closure_for(net, optimizer, 2))
    assert not torch.equal(net.bias, before)
    optimizer.zero_grad()
    assert net.bias.grad is None
    optimizer.load_state_dict(optimizer.state_dict())
    base.param_groups[0]["lr"] = 7.0
    assert optimizer.param_groups[0]["lr"] == 7.0
    with pytest.raises(ValueError, match="must also have 'base'"):
        optimizer.load_state_dict(base.state_dict())
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [net.gain], "lr": -1})


def test_wrappers_nest() -> None:
    net = Net()
    optimizer = Lookahead(SAM(AdamW(net.groups(), lr=0.01)), k=2)
    calls: list[int] = []
    for step in range(4):
        optimizer.step(closure_for(net, optimizer, step, calls))
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    twin_net, twin = copy.deepcopy((net, optimizer))
    assert isinstance(twin.base.base, AdamW)
    train(net, optimizer, first=4, steps=3)
    assert difference(net, twin_net) > 0
    train(twin_net, twin, first=4, steps=3)
    assert difference(net, twin_net) == 0


# --- What all must do -------------------------------------------------------------------------------------------------

ALL: dict[str, Make] = {
    "SGD": lambda p: SGD(p, lr=0.05),
    "SGD momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.1),
    "SGD nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: ours.Adagrad(p, lr_decay=0.01),
    "RMSprop": lambda p: ours.RMSprop(p, momentum=0.5, centered=True, eps=1e-3),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AMSGrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=0.01),
    "Lion": lambda p: Lion(p, lr=0.01),
    "LAMB": lambda p: LAMB(p, lr=0.01, weight_decay=0.01),
    "Muon": lambda p: Muon(p, lr=0.01),
    "Shampoo": lambda p: Shampoo(p, lr=0.05, momentum=0.5, precondition_frequency=3, max_precondition_dim=40),
    "SAM": lambda p: SAM(AdamW(p, lr=0.01)),
    "Lookahead": lambda p: Lookahead(SGD(p, lr=0.05, momentum=0.9), k=4),
}
everything = pytest.mark.parametrize("name", ALL)


def groups_for(name: str, net: Net) -> Any:
    return net.matrices(lr=0.02) if name == "Muon" else net.groups(lr=0.02)


@everything
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_continues_bit_identically_from_a_saved_state(name: str, dtype: torch.dtype) -> None:
    whole, half = Net(dtype), Net(dtype)
    train(whole, ALL[name](groups_for(name, whole)), steps=55)
    optimizer = ALL[name](groups_for(name, half))
    train(half, optimizer, steps=17)
    file = io.BytesIO()
    torch.save({"net": half.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net(dtype)
    again.load_state_dict(saved["net"])
    optimizer = ALL[name](groups_for(name, again))
    optimizer.load_state_dict(saved["optimizer"])
    train(again, optimizer, first=17, steps=38)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@everything
def test_closure_is_evaluated_under_gradients_and_its_loss_returned(name: str) -> None:
    net = Net()
    optimizer = ALL[name](groups_for(name, net))
    calls: list[int] = []
    with torch.no_grad():
        closure = closure_for(net, optimizer, 0, calls)

        def checked() -> Tensor:
            assert torch.is_grad_enabled()
            return closure()

        loss = optimizer.step(checked)
    assert len(calls) == (2 if name == "SAM" else 1)
    x, y = batch(0, torch.float64)
    assert loss.item() == nn.functional.cross_entropy(Net()(x), y).item()


@everything
def test_step_works_without_closure(name: str) -> None:
    if name == "SAM":
        pytest.skip("SAM needs two gradients: its error without closure is tested above")
    a, b = Net(), Net()
    one, two = ALL[name](groups_for(name, a)), ALL[name](groups_for(name, b))
    for step in range(3):
        one.step(closure_for(a, one, step))
        closure_for(b, two, step)()
        assert two.step() is None
    assert difference(a, b) == 0


@everything
def test_bfloat16_training_lowers_the_loss_and_stays_bfloat16(name: str) -> None:
    net = Net(torch.bfloat16)
    optimizer = ALL[name](groups_for(name, net))
    losses = [optimizer.step(closure_for(net, optimizer, 0)).item() for _ in range(40)]
    assert all(p.dtype == torch.bfloat16 for p in net.parameters())
    assert losses[-1] < 0.95 * losses[0]


@everything
def test_nan_is_not_hidden(name: str) -> None:
    net = Net()
    optimizer = ALL[name](groups_for(name, net))

    def closure() -> Tensor:
        loss = closure_for(net, optimizer, 0)()
        net.weight.grad[0, 0] = math.nan
        return loss

    optimizer.step(closure)
    assert net.weight.isnan().any()


@everything
def test_sparse_gradients_raise(name: str) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = ALL[name](embedding.parameters())

    def closure() -> Tensor:
        loss = embedding(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"dense gradients.*\(5, 3\).*sparse"):
        optimizer.step(closure)


@everything
def test_does_not_change_gradients_and_all_tensors_at_once_give_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = Net(), Net()
    one, many = ALL[name](groups_for(name, a)), ALL[name](groups_for(name, b))
    for step in range(10):
        monkeypatch.setattr(_method, "all_at_once", lambda device: False)
        one.step(closure_for(a, one, step))
        monkeypatch.setattr(_method, "all_at_once", lambda device: True)
        closure = closure_for(b, many, step)
        if name == "SAM":
            many.step(closure)
            continue
        closure()
        before = {p: p.grad.clone() for p in b.parameters() if p.grad is not None}
        many.step()
        assert all(torch.equal(p.grad, g) for p, g in before.items())
    assert difference(a, b) <= 1e-15


def test_tensors_name_what_torch_has_no_batched_form_of() -> None:
    with pytest.raises(AttributeError, match="no batched form of 'cholesky'"):
        ours.Tensors([torch.ones(2, 2)]).cholesky()


def test_state_bytes() -> None:
    numbers = 100
    for make, per_number in [
        (lambda p: SGD(p, lr=0.1), 0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), 4),
        (Lion, 4),
        (Adam, 8),
        (lambda p: Adam(p, amsgrad=True), 12),
        (lambda p: Lookahead(Adam(p)), 12),
    ]:
        theta = nn.Parameter(torch.ones(numbers))
        optimizer = make([theta])
        assert ours.state_bytes(optimizer) == 0
        theta.grad = torch.ones(numbers)
        optimizer.step()
        assert ours.state_bytes(optimizer) == per_number * numbers
    theta = nn.Parameter(torch.ones(3, 5))
    theta.grad = torch.ones(3, 5)
    optimizer = Shampoo([theta])
    optimizer.step()
    assert ours.state_bytes(optimizer) == 4 * 2 * (9 + 25)


# --- Bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "argument", "value", "allowed"),
    [
        (SGD, "lr", -0.1, ">= 0"),
        (SGD, "lr", math.nan, ">= 0"),
        (SGD, "lr", "0.1", ">= 0"),
        (SGD, "lr", torch.tensor(0.1), ">= 0"),
        (SGD, "momentum", 1.5, "from 0 to 1"),
        (SGD, "dampening", -1, "from 0 to 1"),
        (SGD, "weight_decay", math.inf, ">= 0"),
        (SGD, "nesterov", True, "momentum > 0"),
        (SGD, "maximize", "yes", "True or False"),
        (ours.Adagrad, "lr_decay", -1, ">= 0"),
        (ours.Adagrad, "initial_accumulator_value", -1, ">= 0"),
        (ours.RMSprop, "alpha", 2, "from 0 to 1"),
        (ours.RMSprop, "eps", -1e-8, ">= 0"),
        (Adam, "betas", (0.9, 1.0), "< 1"),
        (Adam, "betas", 0.9, "two numbers"),
        (AdamW, "weight_decay", -1, ">= 0"),
        (Lion, "betas", (-0.1, 0.9), "< 1"),
        (LAMB, "eps", None, ">= 0"),
        (Muon, "ns_steps", 100, "from 1 to 99"),
        (Muon, "ns_steps", 2.5, "from 1 to 99"),
        (Muon, "ns_coefficients", (1, 2), "three"),
        (Muon, "adjust_lr_fn", "rms", "match_rms_adamw"),
        (Shampoo, "matrix_eps", 0, "> 0"),
        (Shampoo, "precondition_frequency", 0, ">= 1"),
        (Shampoo, "max_precondition_dim", 1.5, ">= 1"),
    ],
)
def test_bad_arguments_name_argument_value_and_range(cls: Any, argument: str, value: Any, allowed: str) -> None:
    theta = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=argument) as error:
        cls([theta], **{argument: value})
    assert repr(value) in str(error.value)
    assert allowed in str(error.value)
    with pytest.raises(ValueError, match=argument):
        cls([{"params": [theta], argument: value}])
    optimizer = cls([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=argument):
        optimizer.add_param_group({"params": [theta], argument: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SAM(SGD(p), rho=-1), "rho=-1: must be a finite number >= 0"),
        (lambda p: SAM(SGD(p), adaptive=1), "adaptive=1: must be True or False"),
        (lambda p: SAM(SGD), "base is .* it must be an optimizer"),
        (lambda p: Lookahead(SGD(p), k=0), "k=0: must be an integer >= 1"),
        (lambda p: Lookahead(SGD(p), alpha=1.1), "alpha=1.1: must be a number from 0 to 1"),
        (lambda p: Muon([nn.Parameter(torch.ones(3))]), r"shape \(3,\); Muon takes tensors of 2 dimensions only"),
        (lambda p: SGD([nn.Parameter(torch.ones(3, dtype=torch.complex64))]), "complex64"),
        (lambda p: SGD([]), "empty parameter list"),
    ],
)
def test_bad_wrappers_and_parameters(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2, 2))])


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@everything
def test_cuda_agrees_with_cpu(name: str) -> None:
    here, there = Net(), Net().cuda()
    train(here, ALL[name](groups_for(name, here)), steps=20)
    train(there, ALL[name](groups_for(name, there)), steps=20)
    assert difference(there.cpu(), here) <= (0.02 if name == "Muon" else 1e-8)  # Muon rounds to bfloat16


@pytest.mark.gpu
@everything
def test_cuda_bfloat16_training_lowers_the_loss(name: str) -> None:
    net = Net(torch.bfloat16).cuda()
    optimizer = ALL[name](groups_for(name, net))
    losses = [optimizer.step(closure_for(net, optimizer, 0)).item() for _ in range(40)]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "settings"), TORCH_CASES, ids=str)
def test_cuda_agrees_with_torch(name: str, settings: dict[str, Any]) -> None:
    a, b = Net(torch.float32).cuda(), Net(torch.float32).cuda()
    one, two = getattr(ours, name)(a.groups(), **settings), getattr(torch.optim, name)(b.groups(), **settings)
    for step in range(STEPS):
        closure_for(a, one, step)()
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()  # the same gradients: cuDNN's own vary from run to run
        one.step()
        two.step()
    assert difference(a, b) <= 1e-6


# --- Composite ------------------------------------------------------------------------------------------------------


def split(net: Net) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of a network, and everything else."""
    matrices = [p for p in net.parameters() if p.ndim == 2]
    return matrices, [p for p in net.parameters() if p.ndim != 2]


def muon_and_adamw(net: Net) -> ours.Composite:
    matrices, rest = split(net)
    return ours.Composite(Muon(matrices, lr=0.02), AdamW(rest, lr=0.01))


def test_composite_moves_each_part_as_its_optimizer_alone_would() -> None:
    together, apart = Net(), Net()
    train(together, muon_and_adamw(together), steps=40)
    matrices, rest = split(apart)
    muon, adamw = Muon(matrices, lr=0.02), AdamW(rest, lr=0.01)
    for step in range(40):
        closure_for(apart, muon_and_adamw(apart), step)()
        muon.step()
        adamw.step()
    assert difference(together, apart) == 0


def test_composite_resumes_exactly() -> None:
    whole, resumed = Net(), Net()
    train(whole, muon_and_adamw(whole))
    first = muon_and_adamw(resumed)
    train(resumed, first, steps=40)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = muon_and_adamw(resumed)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    train(resumed, second, first=40, steps=STEPS - 40)
    assert difference(whole, resumed) == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_a_composite_goes_on_by_itself(again: Callable[[Any], Any]) -> None:
    net = Net()
    composite = muon_and_adamw(net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(composite, 0.5)  # it puts a `step` of its own on the instance
    train(net, composite, steps=5)
    schedule.step()
    other, its = again((net, composite))
    train(other, its, first=5, steps=5)
    assert difference(other, net) > 1e-3, "a copy must not move the original"
    train(net, composite, first=5, steps=5)
    assert difference(other, net) == 0
    assert [type(part) for part in its.parts] == [Muon, AdamW]
    assert its.state_dict()["parts"][0]["state"].keys() == composite.state_dict()["parts"][0]["state"].keys()


def test_a_schedule_reaches_every_part_of_a_composite() -> None:
    net = Net()
    composite = muon_and_adamw(net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(composite, 0.5)
    train(net, composite, steps=1)
    schedule.step()
    assert [part.param_groups[0]["lr"] for part in composite.parts] == [0.01, 0.005]


def test_sam_goes_around_a_composite() -> None:
    net = Net()
    composite = muon_and_adamw(net)
    calls: list[int] = []
    SAM(composite).step(closure_for(net, composite, 0, calls))
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"SAM\(Composite"):
        ours.Composite(SAM(SGD(list(net.parameters()), lr=0.1)))


def test_composite_refuses_what_it_cannot_share_out() -> None:
    weights = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(ValueError, match="share 1 parameters"):
        ours.Composite(SGD(weights), Adam(weights))
    with pytest.raises(ValueError, match=r"parts is \(\)"):
        ours.Composite()
    with pytest.raises(ValueError, match="add the group to one of the parts"):
        ours.Composite(SGD(weights)).add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(ValueError, match="state of 0 parts; it must be 1"):
        ours.Composite(SGD(weights)).load_state_dict({})
