"""Adam's step in three ways, against torch's fused one in float64."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.efficiency.updating import (
    Adam,
    Averages,
    adam_flat,
    adam_foreach,
    adam_loop,
    adam_update,
    flatten_parameters,
    operations,
)
from course_lib.lab.models import convnet

SETTINGS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(0)
    return convnet((1, 4, 4), 3, width=2).double().eval()


def backward(model: nn.Module, seed: int) -> None:
    y = torch.arange(6) % 3
    F.cross_entropy(model(normal(6, 1, 4, 4, seed=seed)), y).backward()


def same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("way", ["loop", "foreach", "flat"])
def test_the_same_weights_as_torchs_fused_adam(way: str) -> None:
    model = network()
    reference = copy.deepcopy(model)
    theirs = torch.optim.Adam(reference.parameters(), fused=True, **SETTINGS)
    params, flat = list(model.parameters()), None
    if way == "flat":
        flat = flatten_parameters(model)
        params = [flat.values]
    state = Averages.of(params)
    for seed in range(6):
        theirs.zero_grad()
        flat.zero_grad() if flat else model.zero_grad()
        backward(model, seed)
        backward(reference, seed)
        if flat:
            adam_flat(flat, state, Adam(**SETTINGS))
        else:
            {"loop": adam_loop, "foreach": adam_foreach}[way](params, state, Adam(**SETTINGS))
        theirs.step()
        same(model, reference)
    assert state.steps == 6


def test_the_first_step_by_hand() -> None:
    """Whatever the gradient's size, the first step is the learning rate long."""
    p, g = torch.tensor([1.0, 1.0]).double(), torch.tensor([100.0, -0.01]).double()
    adam_update(p, g, m := torch.zeros(2).double(), v := torch.zeros(2).double(), 1, Adam(lr=0.1, eps=0.0))
    torch.testing.assert_close(p, torch.tensor([0.9, 1.1]).double())
    torch.testing.assert_close(m, 0.1 * g)
    torch.testing.assert_close(v, 0.001 * g * g)


def test_a_flat_network_is_one_tensor() -> None:
    model = network()
    reference, x = copy.deepcopy(model), normal(2, 1, 4, 4)
    backward(model, 7)
    grads = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    flat = flatten_parameters(model)
    assert len(flat.values) == sum(p.numel() for p in model.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))  # type: ignore[arg-type]
    assert flat.values.grad is not None
    flat.values.grad.mul_(2)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), grads, strict=True))  # type: ignore[arg-type]
    assert torch.equal(model(x), reference(x))
    with torch.no_grad():
        flat.values.add_(1)
        for p in reference.parameters():
            p.add_(1)
    same(model, reference)
    model.load_state_dict(network().state_dict())
    assert torch.equal(flat.values.detach(), torch.cat([p.detach().flatten() for p in network().parameters()]))
    model.zero_grad()  # lets go of the views
    flat.zero_grad()
    backward(model, 1)
    assert torch.equal(flat.values.grad, torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    flat.zero_grad()
    assert not any(p.grad.any() for p in model.parameters())  # type: ignore[union-attr]


def test_any_optimizer_trains_a_flat_network() -> None:
    model = network()
    reference = copy.deepcopy(model)
    flat = flatten_parameters(model)
    ours = torch.optim.SGD([flat.values], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        flat.zero_grad()
        theirs.zero_grad()
        backward(model, seed)
        backward(reference, seed)
        ours.step()
        theirs.step()
    same(model, reference)


def test_operations_counted() -> None:
    model = network()
    backward(model, 0)
    params, adam = list(model.parameters()), Adam(**SETTINGS)
    assert len(params) > 5
    loop = operations(lambda: adam_loop(params, Averages.of(params), adam))
    del loop["zeros_like"], loop["clone"]
    assert loop.total() == 7 * len(params)
    state = Averages.of(params)
    assert operations(lambda: adam_foreach(params, state, adam)).total() == 7
    flat = flatten_parameters(model)
    state = Averages.of([flat.values])
    assert operations(lambda: adam_flat(flat, state, adam)) == Counter(
        ["lerp_", "mul_", "addcmul_", "sqrt", "div_", "add_", "addcdiv_"]
    )
    x = normal(2, 3)
    assert not operations(lambda: (x.view(-1), x.t(), x[0], torch.empty(3)))
    theirs = torch.optim.Adam([flat.values], fused=True)
    theirs.step()
    assert operations(theirs.step) == Counter(["_foreach_add_", "_fused_adam_"])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = network().cuda()
    flat = flatten_parameters(model)
    F.cross_entropy(model(normal(6, 1, 4, 4).cuda()), (torch.arange(6) % 3).cuda()).backward()
    before = flat.values.detach().clone()
    adam_flat(flat, Averages.of([flat.values]), Adam())
    assert flat.values.is_cuda
    assert (flat.values - before).abs().max() > 0


def test_errors_at_the_door() -> None:
    with pytest.raises(ValueError, match="lr=-1: must be a number of 0 or more"):
        Adam(lr=-1)
    with pytest.raises(ValueError, match=r"betas=\(0\.9, 1\.0\): must be two numbers from 0 to 1"):
        Adam(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="eps=-1"):
        Adam(eps=-1)
    with pytest.raises(ValueError, match=r"model=set\(\): must be a network of one type"):
        flatten_parameters(nn.ReLU())
    mixed = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())
    with pytest.raises(ValueError, match="a network of one type, on one device"):
        flatten_parameters(mixed)
    params = list(network().parameters())
    with pytest.raises(ValueError, match="must be parameters that all have a gradient"):
        adam_loop(params, Averages.of(params), Adam())
