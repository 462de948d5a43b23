"""Few bits: against torch's types, its GradScaler, and steps by hand."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib.efficiency.precision import (
    DynamicLossScaler,
    all_finite,
    binades,
    float_facts,
    hold_in,
    low_copy,
    mixed_step,
    overflow_share,
    stalled_share,
    stochastic_bfloat16,
    stochastic_round,
    store_compensated,
    store_master,
    store_nearest,
    store_stochastic,
    ulp,
    underflow_share,
    updated_scale,
)

LOW = [torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- Formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*LOW, torch.float32, torch.float64])
def test_facts_are_those_of_the_numbers_themselves(dtype: torch.dtype) -> None:
    facts, one = float_facts(dtype), torch.ones((), dtype=dtype)
    assert facts.eps == (torch.nextafter(one, 2 * one) - one).item() == 2.0**-facts.mantissa_bits
    assert facts.smallest_subnormal == torch.nextafter(torch.zeros_like(one), one).item()
    assert torch.nextafter(one * facts.largest, one * math.inf) == math.inf
    assert facts.bits == 8 * one.element_size()
    assert facts.powers_of_two == pytest.approx({16: {10: 40, 7: 261}, 32: {23: 277}, 64: {52: 2098}}[facts.bits][
        facts.mantissa_bits], abs=0.01)  # fmt: skip


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
def test_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    x = torch.cat([normal(200, dtype=dtype) * 10.0**k for k in range(-8, 5)]).to(dtype)
    x = torch.cat([x, torch.tensor([0.0, 1.0, 2.0, 0.5, torch.finfo(dtype).smallest_normal], dtype=dtype)])
    x = x[x.isfinite()]
    expected = torch.nextafter(x.abs(), torch.full_like(x, math.inf)) - x.abs()
    assert torch.equal(ulp(x), expected)
    assert torch.equal(ulp(x.double(), dtype), expected.double())


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_what_underflows_is_below_half_of_the_least_number(dtype: torch.dtype, scale: float) -> None:
    g = torch.exp(3 * normal(2000) - 16)
    expected = (g * scale <= float_facts(dtype).smallest_subnormal / 2).double().mean().item()
    parts = [g[:500].view(20, 25), torch.zeros(7).double(), g[500:]]  # numbers that are 0 do not count
    assert underflow_share(parts, dtype, scale) == expected
    assert (0.2 < expected < 0.8) == (dtype is torch.float16 and scale == 1)
    huge = overflow_share(g * 2.0**30, dtype, scale)
    assert huge == ((g * scale * 2.0**30).to(dtype).isinf()).double().mean().item()
    assert (huge > 0) == (dtype is torch.float16)


def test_binades() -> None:
    assert binades([torch.tensor([0.0, 1.0, -1.5, 7.9]), torch.tensor([0.5, 0.4])]).tolist() == [0, 0, 2, -1, -2]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def test_the_scaler_is_torchs_step_for_step() -> None:
    """Overflow comes and goes, and the scale is watched at each step."""
    bad = [3, 4, 11, 25]
    settings: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 3, "growth_factor": 4.0}
    mine, theirs = DynamicLossScaler(**settings), torch.amp.GradScaler("cpu", **settings)
    ours, reference = network(), network()
    opt, ref = torch.optim.Adam(ours.parameters(), lr=0.1), torch.optim.Adam(reference.parameters(), lr=0.1)
    scales = set()
    for step in range(30):
        x = normal(5, 3, seed=step, dtype=torch.float32) * (1e38 if step in bad else 1)
        for model, optimizer in ((ours, opt), (reference, ref)):
            optimizer.zero_grad()
            loss = model(x).square().mean() + (math.inf * model[0].bias.sum() if step in bad else 0)  # type: ignore[index,union-attr,operator]
            (mine.scaled(loss) if model is ours else theirs.scale(loss)).backward()
        assert mine.step(opt) == (step not in bad)
        theirs.step(ref)
        theirs.update()
        assert mine.scale == theirs.get_scale()
        assert mine.good_steps == theirs._get_growth_tracker()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), reference.parameters(), strict=True))
        scales.add(mine.scale)
    assert mine.skipped == len(bad)
    assert len(scales) > 4


def test_a_scale_stays_finite() -> None:
    assert updated_scale(2.0**127, 1999, True) == (2.0**127, 0)
    assert updated_scale(2.0**126, 1999, True) == (2.0**127, 0)
    assert updated_scale(8.0, 1998, True) == (8.0, 1999)
    assert updated_scale(8.0, 1998, False) == (4.0, 0)


def test_scaling_brings_float16_gradients_back() -> None:
    w = torch.ones(4, dtype=torch.float16, requires_grad=True)
    (w * torch.tensor(1e-9)).sum().half().backward()
    assert w.grad is not None
    assert not w.grad.any()
    w.grad = None
    scaler = DynamicLossScaler(2.0**16)
    (scaler.scaled(w.float()) * 1e-9).sum().backward()
    torch.testing.assert_close(w.grad.float() / scaler.scale, torch.full((4,), 1e-9), rtol=1e-2, atol=0)


def test_what_is_not_finite_is_found() -> None:
    good = [torch.ones(3), torch.full((2,), torch.finfo(torch.float32).max)]
    assert all_finite([])
    assert all_finite(good)
    assert not any(all_finite([*good, torch.tensor([0.0, bad])]) for bad in (math.inf, -math.inf, math.nan))


# --- Updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW)
def test_updates_below_half_an_ulp_stall(dtype: torch.dtype) -> None:
    w = (1 + normal(1000).abs() * 0.2 + 0.01).clamp(max=1.9).to(dtype).double()
    half = ulp(w, dtype) / 2
    assert stalled_share(w, 0.98 * half, dtype) == 1
    assert stalled_share(w, -1.02 * half, dtype) == 0
    mixed = torch.cat([0.98 * half[:300], 1.02 * half[300:900], torch.zeros(100).double()])
    assert stalled_share([w[:500], w[500:]], mixed, dtype) == pytest.approx(300 / 900)


@pytest.mark.parametrize("dtype", LOW)
def test_stochastic_rounding_is_right_in_the_mean(dtype: torch.dtype) -> None:
    x = torch.tensor([1.001, -1.001, 3.14159, 1e-3, 0.0, 2e-8, 1.0], dtype=torch.float64)
    draws = stochastic_round(x.expand(40_000, -1), dtype, torch.Generator().manual_seed(0)).double()
    low, step = torch.floor(x / ulp(x, dtype)) * ulp(x, dtype), ulp(x, dtype)
    assert ((draws == low) | (draws == low + step)).all()
    error = (draws.mean(0) - x).abs() / step
    assert error.max() < 4 * 0.5 / math.sqrt(40_000)
    nearest = (x.to(dtype).double() - x).abs() / step
    assert nearest.max() > 0.1, "rounding to the nearest would fail here"
    numbers = normal(50, dtype=dtype)
    assert torch.equal(stochastic_round(numbers.double(), dtype), numbers)
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    assert torch.equal(stochastic_round(odd, dtype).float().nan_to_num(7.0, 5.0, 6.0), torch.tensor([5.0, 6.0, 7.0]))


def test_two_integer_operations_round_by_chance() -> None:
    x = torch.tensor([1.001, -1.001, 3.14159, 1e-3, 0.0, 1.0, -2.5e-30])
    draws = stochastic_bfloat16(x.expand(40_000, -1), torch.Generator().manual_seed(1)).double()
    step = ulp(x.double(), torch.bfloat16)
    below = torch.floor(x.double() / step) * step
    assert ((draws == below) | (draws == below + step)).all()
    assert ((draws.mean(0) - x.double()).abs() / step).max() < 4 * 0.5 / math.sqrt(40_000)
    assert stochastic_bfloat16(torch.tensor([math.inf])).isinf().all()
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert stochastic_bfloat16(nan.repeat(100)).isnan().all(), "neither carried over nor cut to infinity"
    with pytest.raises(ValueError, match=r"x=torch\.float64: must be a tensor of float32"):
        stochastic_bfloat16(x.double())


RULES: dict[str, Any] = {
    "nearest": store_nearest,
    "stochastic": partial(store_stochastic, generator=torch.Generator().manual_seed(0)),
    "compensated": store_compensated,
    "master": store_master,
}


@pytest.mark.parametrize("name", RULES)
def test_a_thousand_small_steps(name: str) -> None:
    """Each step is a fifth of half an ulp: rounding to the nearest stands still, the others arrive."""
    w = nn.Parameter(torch.full((500,), 1.0, dtype=torch.float64))
    optimizer = hold_in(torch.optim.SGD([w], lr=1.0), torch.bfloat16, RULES[name])
    step = 2.0**-8 / 5
    for _ in range(1000):
        w.grad = torch.full_like(w, -step)
        optimizer.step()
        assert torch.equal(w, w.bfloat16().double())
        w.grad = None
    gone = (w.mean() - 1).item()
    expected = 0 if name == "nearest" else 1000 * step
    assert gone == pytest.approx(expected, abs=0.01)


def test_weights_are_of_the_type_before_the_first_step() -> None:
    w = nn.Parameter(torch.tensor([1.001]))
    optimizer = hold_in(torch.optim.SGD([w], lr=1.0), torch.bfloat16, store_nearest)
    assert w.item() == 1
    with torch.no_grad():
        w.fill_(1.0051)  # by someone else
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == 1.0078125


def test_master_weights_are_training_in_full_with_rounded_weights_for_the_gradient() -> None:
    """Momentum and all; written out by hand."""
    x, target = normal(20, 5), normal(20)
    w = nn.Parameter(normal(5, seed=1))
    optimizer = hold_in(torch.optim.SGD([w], lr=0.01, momentum=0.9), torch.bfloat16, store_master)
    master = normal(5, seed=1).bfloat16().double()
    velocity = torch.zeros(5).double()
    for _ in range(50):
        optimizer.zero_grad()
        (x @ w - target).square().mean().backward()
        optimizer.step()
        velocity = 0.9 * velocity + 2 * x.T @ (x @ master.bfloat16().double() - target) / 20
        master -= 0.01 * velocity
        assert torch.equal(w.detach(), master.bfloat16().double()) or (w - master).abs().max() < 0.02
    torch.testing.assert_close(w.detach(), master.bfloat16().double(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_mixed_step_is_autocast_by_hand(scaled: bool) -> None:
    full = network().double()
    model, masters = low_copy(copy.deepcopy(full), torch.bfloat16)
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    assert all(torch.equal(p, m) for p, m in zip(full.parameters(), masters, strict=True))
    optimizer = torch.optim.SGD(masters, lr=0.1)
    x = normal(8, 3)
    reference = copy.deepcopy(model)
    reference(x.bfloat16()).float().square().mean().backward()
    before = [m.detach().clone() for m in masters]
    scaler = DynamicLossScaler(2.0**8) if scaled else None
    loss, made = mixed_step(model, masters, optimizer, lambda m: m(x.bfloat16()).float().square().mean(), scaler)
    assert made
    assert not loss.requires_grad
    for p, m, b, r in zip(model.parameters(), masters, before, reference.parameters(), strict=True):
        assert r.grad is not None
        torch.testing.assert_close(m.detach(), b - 0.1 * r.grad.double(), rtol=0, atol=1e-12)
        assert torch.equal(p, m.bfloat16())
        assert p.grad is None
    broken = mixed_step(model, masters, optimizer, lambda m: m(x.bfloat16()).sum() * math.inf, DynamicLossScaler(2.0))
    assert not broken[1]
    assert all(torch.isfinite(m).all() for m in masters)


@pytest.mark.gpu(emulated=False)
def test_on_a_gpu() -> None:
    x = normal(100, dtype=torch.float32).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    assert (stochastic_round(x, torch.bfloat16, generator).float() - x).abs().max() < 0.04
    assert stochastic_bfloat16(x, generator).device.type == "cuda"
    model, masters = low_copy(network().cuda(), torch.float16)
    loss, made = mixed_step(
        model,
        masters,
        torch.optim.SGD(masters, lr=0.1),
        lambda m: m(torch.ones(2, 3, device="cuda").half()).float().mean(),
        DynamicLossScaler(2.0**10),
    )
    assert made
    assert loss.is_cuda


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_errors_at_the_door() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match=r"dtype=torch\.int8: must be a floating-point type"):
        float_facts(torch.int8)
    with pytest.raises(ValueError, match=r"scale=0: must be a number above 0"):
        underflow_share(one, torch.float16, 0)
    with pytest.raises(ValueError, match=r"grads=0: must be numbers of which one or more is not 0"):
        underflow_share(one * 0, torch.float16)
    with pytest.raises(ValueError, match=r"updates=3: must be as many numbers as there are weights, 2"):
        stalled_share(one, torch.ones(3), torch.float16)
    with pytest.raises(ValueError, match=r"updates=0: must be numbers"):
        stalled_share(one, 0 * one, torch.float16)
    with pytest.raises(ValueError, match=r"growth_factor=1: must be a number above 1"):
        DynamicLossScaler(growth_factor=1)
    with pytest.raises(ValueError, match=r"backoff_factor=1\.0: must be a number between 0 and 1"):
        DynamicLossScaler(backoff_factor=1.0)
    with pytest.raises(ValueError, match=r"growth_interval=0: must be a whole number of at least 1"):
        DynamicLossScaler(growth_interval=0)


def test_master_weights_are_part_of_the_optimizers_state() -> None:
    """What a checkpoint holds: a run that is taken up goes on from them, not from the rounded weights."""

    def step(w: nn.Parameter, optimizer: torch.optim.Optimizer, times: int) -> None:
        for _ in range(times):
            w.grad = torch.full_like(w, 0.001)
            optimizer.step()

    whole, cut, resumed = (nn.Parameter(torch.ones(3)) for _ in range(3))
    make = partial(hold_in, dtype=torch.bfloat16, store=store_master)
    step(whole, make(torch.optim.SGD([whole], lr=1.0)), 8)
    first = make(torch.optim.SGD([cut], lr=1.0))
    step(cut, first, 3)
    with torch.no_grad():
        resumed.copy_(cut)
    second = make(torch.optim.SGD([resumed], lr=1.0))
    second.load_state_dict(first.state_dict())
    step(resumed, second, 5)
    assert torch.equal(resumed, whole)
    assert not torch.equal(whole, torch.ones(3)), "eight steps of 0.001 are more than half a step of bfloat16's grid"
