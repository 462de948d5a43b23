"""Small networks and batches that all tests of regularization share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.training import Recipe, fresh

EXACT = Recipe(precision="float64")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": partial(mlp, (1, 8, 8), 4, width=8),
    "convnet": partial(convnet, (1, 8, 8), 4, width=4),
    "resnet": partial(resnet, (1, 8, 8), 4, width=4),
    "vit": partial(vit, (1, 8, 8), 4, width=8, depth=2, heads=2),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def network(name: str = "mlp", seed: int = 0) -> nn.Module:
    return fresh(NETWORKS[name], EXACT, seed=seed)


def smooth_network(inputs: int = 2, outputs: int = 3, width: int = 6, seed: int = 0) -> nn.Sequential:
    """With derivatives of all orders, in float64."""
    layers = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()
    with torch.no_grad():
        for k, p in enumerate(layers.parameters()):
            p.copy_(normal(*p.shape, seed=100 * seed + k))
    return layers


def images(count: int = 6, channels: int = 1, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(count, channels, size, size, seed=seed), torch.arange(count) % 4


class Linear(nn.Module):
    """A linear model without a bias: ``[N, D] -> [N, K]``, or ``[N]`` for a vector of weights."""

    def __init__(self, inputs: int, outputs: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(
        loss, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


# --- On a GPU ---------------------------------------------------------------------------------------------------------

Move = Callable[[Any], Any]
"""Brings a tensor, a network or a data set to where a case is computed."""


def on_the_gpu_as_here(case: Callable[[Move], Any], *, rtol: float = 1e-8, lies: str = "cuda") -> None:
    """Whatever a case gives on the GPU it gives on the CPU, too; and its tensors lie where they should."""
    with mock.patch.dict(os.environ, COURSE_DEVICE="cpu"):
        here = tree_leaves(case(lambda x: x))
    for mine, theirs in zip(here, tree_leaves(case(lambda x: x.to("cuda"))), strict=True):
        if isinstance(mine, Tensor):
            assert theirs.device.type == lies
            torch.testing.assert_close(
                theirs.detach().cpu(), mine.detach(), rtol=rtol, atol=1e-3 * rtol, equal_nan=True
            )
        elif isinstance(mine, float):
            assert theirs == pytest.approx(mine, rel=rtol, abs=1e-3 * rtol, nan_ok=True)
        else:
            assert theirs == mine


def every_name_once(package: Any, *groups: str | Iterable[str]) -> None:
    """All that a package offers stands in one of the groups, and nothing else does."""
    names = [name for group in groups for name in (group.split() if isinstance(group, str) else group)]
    assert sorted(names) == sorted(package.__all__)
