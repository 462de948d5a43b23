"""Second-order rounding against least squares, solved anew after each weight, in float64."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.compression import second_order as so
from course_lib.compression.quantisation import Grid, quantise, quantise_weight, scale_and_zero
from course_lib.lab.models import convnet, vit

ROWS, COLUMNS = 5, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(count: int = 300, columns: int = COLUMNS, seed: int = 1) -> Tensor:
    """Inputs whose directions have very different variances."""
    mixing = normal(columns, columns, seed=seed + 50) * torch.logspace(0, -1.5, columns, dtype=torch.float64)[:, None]
    return normal(count, columns, seed=seed) @ mixing


def damped(x: Tensor, damping: float) -> Tensor:
    """More rows for X, so that X^T X has ``damping`` times the mean of its diagonal added to the diagonal."""
    extra = (damping * x.square().sum(0).mean()).sqrt()
    return torch.cat([x, extra * torch.eye(x.shape[1], dtype=x.dtype)])


def by_least_squares(
    w: Tensor, x: Tensor, scales: Callable[[Tensor, int], tuple[Tensor, Tensor]], grid: Grid, order: list[int]
) -> Tensor:
    """Fix the columns in an order; after each find the others anew, so that ``x w`` changes least: no inverse, no H."""
    now, integers = w.clone(), torch.zeros_like(w, dtype=torch.int32)
    target = x @ w.mT  # [examples, rows]
    fixed: list[int] = []
    for column in order:
        scale, zero = scales(now, column)
        integers[:, column] = quantise(now[:, column], scale, zero, grid)
        now[:, column] = (integers[:, column] - zero) * scale
        fixed.append(column)
        rest = [c for c in range(w.shape[1]) if c not in fixed]
        missing = target - x[:, fixed] @ now[:, fixed].mT
        if rest:
            now[:, rest] = torch.linalg.lstsq(x[:, rest], missing).solution.mT
    return integers


def error(w: Tensor, made: Tensor, x: Tensor) -> float:
    return float((x @ (made - w).mT).square().sum() / len(x))


# --- The error --------------------------------------------------------------------------------------------------------


def test_the_hessian_is_the_second_derivative() -> None:
    x = normal(20, 4)
    found, a, b = so.hessian(x), normal(4, seed=3), normal(4, seed=4)

    def cost(row: Tensor) -> Tensor:
        return (x @ row).square().mean()

    torch.testing.assert_close(a @ found @ b, cost(a + b) - cost(a) - cost(b))  # exact: the cost is quadratic
    torch.testing.assert_close(found, found.mT)
    torch.testing.assert_close(so.hessian([x[:3], x[3:].reshape(1, 17, 4)]), found)
    assert so.hessian(x.bfloat16()).dtype == torch.float32


def test_the_error_is_that_of_the_outputs() -> None:
    x, w, other = correlated(), normal(ROWS, COLUMNS), normal(ROWS, COLUMNS, seed=2)
    assert so.output_error(w, other, so.hessian(x)) == pytest.approx(error(w, other, x), rel=1e-10)
    shaped = so.output_error(w.view(ROWS, 3, 2, 2), other.view(ROWS, 3, 2, 2), so.hessian(x))
    assert shaped == pytest.approx(error(w, other, x), rel=1e-10)


def test_the_factor_is_that_of_the_inverse() -> None:
    h = so.hessian(correlated())
    for damping in (0.0, 0.1):
        u = so.inverse_factor(h, damping)
        assert torch.equal(u, u.triu())
        added = damping * h.diagonal().mean() * torch.eye(COLUMNS, dtype=h.dtype)
        torch.testing.assert_close(u.mT @ u @ (h + added), torch.eye(COLUMNS, dtype=h.dtype), rtol=0, atol=1e-8)
        # row q: the inverse of what is left from q on
        left = torch.linalg.inv((h + added)[4:, 4:])[0]
        torch.testing.assert_close(u[4, 4:] * u[4, 4], left, rtol=1e-8, atol=1e-8)


# --- One layer --------------------------------------------------------------------------------------------------------

GRIDS = [Grid(3), Grid(4, symmetric=False), Grid(2, symmetric=False, signed=False)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 5])
def test_gptq_is_least_squares_column_by_column(grid: Grid, act_order: bool, granularity: Any) -> None:
    """The same integers, and the scales of each group from its weights when its first column is reached."""
    w, x = normal(ROWS, COLUMNS), correlated()
    x = x[:, torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5))]
    made = so.gptq(w, so.hessian(x), grid, granularity, damping=0.02, act_order=act_order)
    size = {"tensor": COLUMNS, "channel": COLUMNS}.get(granularity, granularity)
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def scales(now: Tensor, column: int) -> tuple[Tensor, Tensor]:
        first = column // size * size
        if first not in kept:
            part = now if granularity == "tensor" else now[:, first : first + size]
            low, high = (part.min(), part.max()) if granularity == "tensor" else (part.amin(1), part.amax(1))
            scale, zero = scale_and_zero(low, high, grid)
            kept[first] = scale.float().double(), zero
        return kept[first]

    order = x.square().sum(0).argsort(descending=True).tolist() if act_order else [*range(COLUMNS)]
    wanted = by_least_squares(w, damped(x, 0.02), scales, grid, order)
    assert torch.equal(made.integers, wanted)
    for first, (scale, zero) in kept.items():
        torch.testing.assert_close(made.scales[:, first // size].double(), scale.expand(len(made.scales)))
        assert torch.equal(made.zeros[:, first // size], zero.expand(len(made.zeros)))
    assert made.dtype == torch.float64
    assert made.grid == grid


@pytest.mark.parametrize("grid", GRIDS)
def test_obq_takes_the_cheapest_next(grid: Grid) -> None:
    """By trying all: fix each weight left, solve for the others, keep the one that changes the outputs least."""
    w, x = normal(3, 6), damped(correlated(columns=6), 0.01)
    made = so.obq(w, so.hessian(correlated(columns=6)), grid, damping=0.01)
    for row, original in enumerate(w):
        scale, zero = scale_and_zero(original.min(), original.max(), grid)
        scale = scale.float().double()
        now, fixed = original.clone(), list[int]()
        while len(fixed) < 6:
            tried = []
            for column in set(range(6)) - set(fixed):
                held = now.clone()
                held[column] = (quantise(now[column], scale, zero, grid) - zero) * scale
                rest = [c for c in range(6) if c not in (*fixed, column)]
                missing = x @ original - x[:, [*fixed, column]] @ held[[*fixed, column]]
                if rest:
                    held[rest] = torch.linalg.lstsq(x[:, rest], missing[:, None]).solution[:, 0]
                tried.append((float((x @ (held - original)).square().sum()), column, held))
            _, column, now = min(tried, key=lambda each: each[0])
            fixed.append(column)
        assert torch.equal(made.integers[row], quantise(now, scale, zero, grid))


def test_corrections_pay_where_inputs_are_correlated() -> None:
    w, x = normal(40, 24), correlated(400, 24)
    h = so.hessian(x)
    nearest = error(w, quantise_weight(w, Grid(3)).dequantise(), x)
    for method in (so.gptq, so.obq):
        assert error(w, method(w, h, Grid(3)).dequantise(), x) < 0.7 * nearest


def test_for_white_inputs_the_nearest_is_best() -> None:
    w, h = normal(8, 10), 2 * torch.eye(10, dtype=torch.float64)
    for method in (so.gptq, so.obq):
        assert torch.equal(method(w, h, Grid(3)).integers, quantise_weight(w, Grid(3)).integers)


def test_the_best_of_all_is_not_far() -> None:
    """Two inputs, alike but for a little: of all pairs of integers GPTQ finds one that is nearly the best."""
    x = normal(200, 1) + 0.1 * normal(200, 2, seed=1)
    w = torch.tensor([[0.4, 0.4, 1.0], [0.45, 0.35, -1.0]], dtype=torch.float64)
    x = torch.cat([x, 1e-3 * normal(200, 1, seed=2)], 1)
    grid = Grid(2)
    made = so.gptq(w, so.hessian(x), grid, damping=0.0)
    nearest = quantise_weight(w, grid)
    for row in range(2):
        scale = made.scales[row].double()
        every = torch.tensor([*itertools.product((-1, 0, 1), repeat=3)], dtype=torch.float64) * scale
        best = min(error(w[row : row + 1], each[None], x) for each in every)
        ours, plain = (error(w[row : row + 1], q.dequantise()[row : row + 1], x) for q in (made, nearest))
        assert ours < 1.5 * best < 0.5 * plain


def test_an_input_that_is_always_zero_goes_to_the_nearest() -> None:
    x, w = correlated(), normal(ROWS, COLUMNS)
    x[:, 4] = 0
    for method in (so.gptq, so.obq):
        made = method(w, so.hessian(x), Grid(4), damping=0.0)
        assert torch.equal(made.integers[:, 4], quantise_weight(w, Grid(4)).integers[:, 4])


def test_types_and_shapes_stay() -> None:
    w, h = normal(4, 3, 2, 2), so.hessian(correlated())
    flat = so.gptq(w.flatten(1), h, Grid(4))
    for method in (so.gptq, so.obq):
        assert method(w.float(), h, Grid(4)).dequantise().dtype == torch.float32
        assert method(w, h, Grid(4)).integers.shape == w.shape
    assert torch.equal(so.gptq(w, h, Grid(4)).integers.flatten(1), flat.integers)
    assert torch.equal(so.gptq(w, h.float(), Grid(4)).integers.flatten(1), flat.integers)


# --- A network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": "same", "dilation": 2},
        {"stride": 2, "padding": (0, 2), "padding_mode": "circular"},
        {"kernel_size": (1, 3)},
    ],
)
def test_rows_are_what_the_weight_multiplies(settings: dict[str, Any]) -> None:
    layer = nn.Conv2d(2, 3, **({"kernel_size": 3} | settings), bias=False).double()
    x = normal(4, 2, 7, 6)
    rows = so.input_rows(layer, x)
    wanted = layer(x)
    torch.testing.assert_close(rows @ layer.weight.flatten(1).mT, wanted.flatten(2).mT.flatten(0, 1))
    linear = nn.Linear(6, 5, bias=False).double()
    torch.testing.assert_close(so.input_rows(linear, x) @ linear.weight.mT, linear(x).reshape(-1, 5))


class Backwards(nn.Module):
    """Its layers run in another order than they are listed in."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 9)
        self.norm = nn.BatchNorm1d(16)
        self.first = nn.Linear(5, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.norm(self.first(x))))


def test_each_layer_sees_what_the_rounded_ones_before_it_give() -> None:
    torch.manual_seed(0)
    model = Backwards().double()
    model.first.eval()
    before = copy.deepcopy(model)
    given = [normal(30, 5), normal(20, 5, seed=1)]
    assert [*so.running_layers(model, given[0])] == ["first", "last"]
    found = so.gptq_model(model, iter(given), Grid(3), 2, damping=0.03, act_order=True)
    assert [*found] == ["first", "last"]

    def by_hand(layer: nn.Linear, x: Tensor) -> Tensor:
        return so.gptq(layer.weight, so.hessian(x), Grid(3), 2, damping=0.03, act_order=True).integers

    x = torch.cat(given)
    assert torch.equal(found["first"].integers, by_hand(model.first, x))
    rounded = F.linear(x, found["first"].dequantise(), model.first.bias)
    model.norm.eval()
    with torch.no_grad():
        hidden, unrounded = (F.relu(model.norm(y)) for y in (rounded, model.first(x)))
    model.norm.train()
    assert torch.equal(found["last"].integers, by_hand(model.last, hidden))
    assert not torch.equal(found["last"].integers, by_hand(model.last, unrounded)), "or this would show nothing"
    # the network is as it was: numbers, statistics, modes
    for name, value in before.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert [part.training for part in model.modules()] == [part.training for part in before.modules()]
    assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("make", [lambda: convnet((1, 8, 8), 4, width=3), lambda: vit((1, 8, 8), 4, width=16, depth=1)])
def test_a_network_comes_nearer_to_what_it_was(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model = make().double().eval()
    seen = [normal(60, 1, 8, 8).cumsum(3), normal(60, 1, 8, 8, seed=1).cumsum(2)]
    plain = so.with_weights(model, so.round_to_nearest(model, Grid(3)))
    second = so.with_weights(model, so.gptq_model(model, seen, Grid(3)))
    held = normal(100, 1, 8, 8, seed=2).cumsum(3)
    with torch.no_grad():
        apart = [float((other(held) - model(held)).square().mean()) for other in (plain, second)]
    assert apart[1] < 0.8 * apart[0]


def test_weights_in_a_network() -> None:
    torch.manual_seed(0)
    model = convnet((1, 8, 8), 4, width=3)
    before = copy.deepcopy(model.state_dict())
    found = so.round_to_nearest(model, Grid(4), "tensor", layers=["head", "features.4"])
    assert [*found] == ["head", "features.4"]
    made = so.with_weights(model, found).state_dict()
    for name, value in before.items():
        layer = name.removesuffix(".weight")
        wanted = quantise_weight(value, Grid(4), "tensor").dequantise() if layer in found else value
        assert torch.equal(made[name], wanted)
        assert torch.equal(model.state_dict()[name], value)


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    w, h, model = normal(3, 4), torch.eye(4, dtype=torch.float64), convnet((1, 8, 8), 4, width=3).double()
    one = torch.ones(4, 4, dtype=torch.float64)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("inputs=0: must be at least one row", lambda: so.hessian([])),
        ("inputs=0: must be at least one row", lambda: so.hessian(torch.empty(0, 4))),
        ("hessian=(4, 4): must be (3, 3)", lambda: so.gptq(w.mT, h, Grid(3))),
        ("hessian=(4, 4): must be (3, 3)", lambda: so.obq(w.mT, h, Grid(3))),
        ("hessian=(4, 4): must be (3, 3)", lambda: so.output_error(w.mT, w.mT, h)),
        ("rounded=(4, 3): must be of shape (3, 4)", lambda: so.output_error(w, w.mT, h)),
        ("damping=-1: must be", lambda: so.gptq(w, h, Grid(3), damping=-1)),
        ("damping=0.0 leaves the inputs' Hessian singular", lambda: so.gptq(w, one, Grid(3), damping=0.0)),
        ("granularity='row': must be", lambda: so.gptq(w, h, Grid(3), "row")),  # type: ignore[arg-type]
        ("batches=[]: must be at least one batch", lambda: so.gptq_model(model, [], Grid(3))),
        ("layers='none': must be among features.0, ", lambda: so.round_to_nearest(model, Grid(3), layers=["none"])),
        (
            "layers='features.1': must",
            lambda: so.gptq_model(model, [normal(2, 1, 8, 8)], Grid(3), layers=["features.1"]),
        ),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    idle = Backwards().double()
    idle.spare = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=re.escape("layers=['spare']: must be layers that run")):
        so.gptq_model(idle, [normal(3, 5)], Grid(3))
    grouped = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2))
    with pytest.raises(ValueError, match="none: there is no such"):
        so.round_to_nearest(grouped, Grid(3), layers=["0"])


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    w, x = normal(ROWS, COLUMNS), correlated()
    for method in (so.gptq, so.obq):
        here, there = method(w, so.hessian(x), Grid(3)), method(w.cuda(), so.hessian(x.cuda()), Grid(3))
        assert there.integers.is_cuda
        assert torch.equal(there.integers.cpu(), here.integers)
    model = vit((1, 8, 8), 4, width=8, depth=1, heads=2).double()
    on_gpu = so.gptq_model(copy.deepcopy(model).cuda(), [normal(10, 1, 8, 8).cuda()], Grid(4), 8)
    for name, weight in so.gptq_model(model, [normal(10, 1, 8, 8)], Grid(4), 8).items():
        assert torch.equal(on_gpu[name].integers.cpu(), weight.integers)
