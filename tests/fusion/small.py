"""What the tests of fusion share, beside the small networks and data of those of merging."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.optim import SGD

from course_lib.lab.training import Recipe
from tests.merging.small import NAMES, NETWORKS, batch, close, data, generator, network, normal, same_weights, split

EXACT = Recipe(epochs=2, batch_size=20, optimizer=partial(SGD, lr=0.05, momentum=0.9), precision="float64")


def answers(members: int = 5, examples: int = 60, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits ``[M, N, K]`` of members that are better the later they come, and labels ``[N]``."""
    labels = torch.randint(classes, (examples,), generator=generator(seed + 50))
    skill = torch.linspace(1.0, 1.4, members, dtype=torch.float64)[:, None, None]
    return normal(members, examples, classes, seed=seed) + skill * torch.eye(classes)[labels], labels


__all__ = [
    "EXACT",
    "NAMES",
    "NETWORKS",
    "answers",
    "batch",
    "close",
    "data",
    "generator",
    "network",
    "normal",
    "same_weights",
    "split",
]
