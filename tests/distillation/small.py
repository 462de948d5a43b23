"""Small students and teachers that all tests of distillation share."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import distillation as kd
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet
from tests.regularization.small import NETWORKS, generator, gradients, images, network, normal

__all__ = [
    "LABELS",
    "NETWORKS",
    "SMALL_CONVNET",
    "K",
    "Logits",
    "N",
    "Says",
    "counted",
    "generator",
    "gradients",
    "images",
    "network",
    "normal",
    "teacher",
    "tiny",
]

N, K = 9, 5
LABELS = torch.arange(N) % K


class Logits(nn.Module):
    """A network whose logits are its parameters, whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Any) -> Tensor:
        return self.logits


class Says:
    """A teacher that is no network and says the same to all."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, x: Any) -> Tensor:
        return self.logits


def teacher(name: str = "convnet", seed: int = 7) -> nn.Module:
    """In float64, with sharper answers than a new network gives."""
    found = network(name, seed)
    with torch.no_grad():
        found.head.weight.mul_(8)  # type: ignore[operator, union-attr]
    return kd.frozen(found)


def tiny(train_size: int = 60) -> Dataset:
    return load("glyphs", classes="digits", size=16, difficulty=0.3, train_size=train_size, val_size=40, test_size=40)


SMALL_CONVNET = partial(convnet, (1, 16, 16), 10, width=2)


def counted(model: nn.Module) -> list[int]:
    """A list that grows by one at each of the network's passes."""
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    return passes
