"""LARS against pytorch_optimizer's, and against the paper's own formula where the two place the rate differently."""

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

from course_lib.batching.layerwise import LARS, local_rate
from course_lib.lab.data import batches, load
from course_lib.lab.models import convnet
from course_lib.lab.training import Recipe, fit, fresh


def network(seed: int = 0) -> nn.Module:
    return fresh(partial(convnet, (1, 8, 8), 10, width=2), Recipe(precision="float64"), seed=seed)


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, change: Callable[[int], None] = lambda step: None
) -> Tensor:
    passes = list(batches(load("digits", train_size=48).train, 12, dtype=torch.float64)) * 5
    for step, (x, y) in enumerate(passes):
        change(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_steps_are_those_of_pytorch_optimizer(momentum: float, weight_decay: float) -> None:
    from pytorch_optimizer import LARS as THEIRS

    settings = {"lr": 0.5, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": 0.02}
    ours, theirs = network(), network()
    start = torch.cat([p.detach().flatten() for p in ours.parameters()])
    mine, other = LARS(ours.parameters(), **settings), THEIRS(theirs.parameters(), **settings)

    def halve(step: int) -> None:  # a rate that changes must act on all of the momentum
        for optimizer in (mine, other):
            optimizer.param_groups[0]["lr"] = 0.5 * 0.9**step

    moved = trained(ours, mine, halve)
    torch.testing.assert_close(moved, trained(theirs, other, halve), rtol=1e-10, atol=1e-12)
    assert (moved - start).norm() > 0.1


def test_with_a_constant_rate_they_are_the_papers() -> None:
    theta, velocity = [torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)], 0.0
    ours = nn.Parameter(theta[0].clone())
    optimizer = LARS([ours], lr=0.3, momentum=0.8, weight_decay=0.1, trust_coefficient=0.5)
    paper = theta[0].clone()
    for step in range(6):
        g = torch.sin(paper + step)
        local = 0.5 * paper.norm() / (g.norm() + 0.1 * paper.norm())
        velocity = 0.8 * velocity + 0.3 * local * (g + 0.1 * paper)
        paper = paper - velocity
        ours.grad = torch.sin(ours.detach() + step)
        optimizer.step()
    torch.testing.assert_close(ours.detach(), paper, rtol=1e-12, atol=1e-13)


def test_a_layer_moves_by_a_part_of_its_weights_however_large_its_gradient() -> None:
    for scale in (1e-6, 1.0, 1e6):
        theta = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        theta.grad, bias.grad = scale * torch.arange(12.0, dtype=torch.float64).view(3, 4), torch.ones_like(bias)
        LARS([theta, bias], lr=1.0, trust_coefficient=0.01, weight_decay=0.0).step()
        assert float((theta.detach() - 1).norm()) == pytest.approx(0.01 * 12**0.5, rel=1e-12)
        assert bias.tolist() == [-1.0] * 3  # a plain step


def test_zero_norms_do_not_divide() -> None:
    g = torch.ones(2, 2)
    assert local_rate(torch.zeros(2, 2), g, weight_decay=0.1, trust_coefficient=0.1) == 1
    assert local_rate(g, torch.zeros(2, 2), weight_decay=0.0, trust_coefficient=0.1) == 1


def test_it_trains_in_fit_and_goes_on_from_its_state() -> None:
    data = load("digits", train_size=200)
    recipe = Recipe(epochs=5, batch_size=40, optimizer=partial(LARS, lr=2.0, trust_coefficient=0.02))
    history = fit(network().float(), data, recipe, seed=0)
    assert history["train_loss"][-1] < 0.7 * history["train_loss"][0]
    model = network()
    optimizer = LARS(model.parameters(), lr=0.1)
    trained(model, optimizer)
    other = copy.deepcopy(model)
    again = LARS(other.parameters(), lr=9.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(trained(model, optimizer), trained(other, again))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1.0}, "lr=-1.0: must be"),
        ({"momentum": 1.5}, "momentum=1.5: must be"),
        ({"weight_decay": -1}, "weight_decay=-1: must be"),
        ({"trust_coefficient": 0}, "trust_coefficient=0: must be a finite number > 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        LARS([nn.Parameter(torch.ones(2))], **settings)
    with pytest.raises(ValueError, match=re.escape(said)):
        LARS([{"params": [nn.Parameter(torch.ones(2))], **settings}])
