"""Functions that the tests of communication run in processes of their own, where a test file cannot be imported."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fresh
from course_lib.parallel.communicating_less import Outcome, Policy, train_worker
from course_lib.parallel.launching import World, process_group

DOUBLE = Recipe(precision="float64")


def small() -> tuple[torch.nn.Module, Dataset]:
    """A new network in float64, the same each time, and the digits."""
    data = load("digits")
    return fresh(partial(mlp, data.input_shape, len(data.classes), width=16), DOUBLE, seed=3), data


def flat(model: torch.nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()


def all_at_once(policies: dict[str, Policy], settings: dict[str, Any], period: int) -> Any:
    """One launch for several tests, since starting a process takes longer than what they do in it."""
    with process_group() as world:
        trained = {name: _train_by(policy, settings) for name, policy in policies.items()}
        averaged = _average_periodically(period, world, **settings)
    return trained, averaged


def _train_by(policy: Policy, settings: dict[str, Any]) -> tuple[Tensor, Outcome]:
    model, data = small()
    outcome = train_worker(model, data, policy, **settings)
    return flat(model), outcome


def _average_periodically(
    period: int, world: World, *, epochs: int, batch_size: int, lr: float, momentum: float, seed: int
) -> Tensor:
    """Local SGD by torch's own averager, on the share of each batch that this process is due."""
    model, data = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    averager = PeriodicModelAverager(period=period, warmup_steps=0)
    averager.step = 1  # torch averages at its steps 0, period, 2 period, …: the first of them before any training
    for epoch in range(1, epochs + 1):
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for x, y in batches(data.train, batch_size, generator=order, dtype=torch.float64):
            optimizer.zero_grad()
            cross_entropy(model(x.chunk(world.size)[world.rank]), y.chunk(world.size)[world.rank]).backward()
            optimizer.step()
            averager.average_parameters(model.parameters())
    return flat(model)
