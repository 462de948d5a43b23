"""What the tests of transfer share, beside the small networks and data of those of merging."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD

from course_lib.lab.training import Recipe
from tests.merging.small import NAMES, batch, close, data, generator, network, normal, same_weights, split

EXACT = Recipe(epochs=2, batch_size=20, optimizer=partial(SGD, lr=0.05), precision="float64")


def moved(before: nn.Module, after: nn.Module) -> set[str]:
    """The parameters and buffers in which two networks of one architecture differ."""
    there = after.state_dict()
    return {name for name, value in before.state_dict().items() if not torch.equal(value, there[name])}


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network with everything that trains moved a little, in place."""
    drawn = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=drawn, dtype=parameter.dtype).to(parameter))
    return model


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, [*named.values()], allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


def untouched(model: nn.Module, act: Callable[[], object]) -> None:
    """Run something that must leave the network, its modes and torch's generator as they are."""
    states, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    act()
    assert torch.equal(before, torch.get_rng_state()), "torch's own generator has moved"
    assert modes == [part.training for part in model.modules()]
    assert grads == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())


__all__ = [
    "EXACT",
    "NAMES",
    "batch",
    "close",
    "data",
    "generator",
    "gradients",
    "moved",
    "network",
    "normal",
    "same_weights",
    "shaken",
    "split",
    "untouched",
]
