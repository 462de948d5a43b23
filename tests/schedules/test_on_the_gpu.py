"""What no other test of the chapter takes to a GPU: curvature, rates by layer and width, and schedules in a run there.

Data sets stay here; generators are on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from course_lib import optimizers, schedules
from course_lib.lab.training import Recipe, fit, fresh, logits_of
from tests.merging.small import Case, Move, batch, data, generator, network, normal, on_the_gpu_as_here

SMALL = data()
SHORT = Recipe(epochs=1, batch_size=10, precision="float64")
SYMMETRIC = normal(5, 5) + normal(5, 5).mT


def trained(to: Move, recipe: Recipe) -> Any:
    """Rates, losses and answers of a run there."""
    model = to(network())
    history = fit(model, SMALL, recipe, seed=0)
    return history.rates, history.losses, logits_of(model, SMALL.val)


def scheduled(to: Move) -> Any:
    shape = schedules.schedule(
        schedules.warm_up, momentum=schedules.one_cycle_momentum, warmup=1, then=schedules.cosine, floor=0.1
    )
    return trained(to, replace(SHORT, schedule=shape))


def by_layer(to: Move) -> Any:
    """The factors come from a network there, and serve another that is trained there."""
    factors = schedules.layerwise_factors(to(network()), 0.5)
    adam = schedules.with_layer_rates(partial(optimizers.Adam, lr=0.01), factors)
    groups = schedules.layerwise_rates(to(network()), 0.1)
    return trained(to, replace(SHORT, optimizer=adam)), factors, [group["lr"] for group in groups]


def on_a_plateau(to: Move) -> Any:
    plateau = schedules.reduce_on_plateau(patience=0, threshold=10.0)
    return trained(to, replace(SHORT, epochs=2, batch_size=40, schedule=plateau))


def curved(to: Move) -> Any:
    """The network lies there, the data set here; sharpness is measured beside a run, too."""
    model = to(network())
    product = schedules.hessian_vector(model, SMALL.train)
    ones = torch.ones(sum(p.numel() for p in model.parameters()), dtype=torch.float64, device=model.head.weight.device)
    return product(ones).cpu(), schedules.sharpness(model, SMALL.val, generator=generator(), steps=1)


def watched(to: Move) -> Any:
    def measure(model: nn.Module, data: Any) -> float:
        return schedules.sharpness(model, data.val, generator=generator(), steps=1)

    return fit(network(), SMALL, replace(SHORT, batch_size=40, watch={"sharpness": measure}), seed=0)["sharpness"]


def preconditioned(to: Move) -> Any:
    found = []
    for make in (partial(torch.optim.Adam, amsgrad=True), optimizers.AdamW):
        model = to(network())
        optimizer = make(model.parameters(), lr=0.01, eps=1e-3)
        nn.functional.cross_entropy(model(to(batch())), to(torch.zeros(6).long())).backward()
        optimizer.step()
        found.append(schedules.adam_preconditioner(model, optimizer).cpu())
        found.append(
            schedules.preconditioned_sharpness(
                model, SMALL.train, optimizer, generator=generator(), steps=2, tolerance=0
            )
        )
    return found


def spectra(to: Move) -> Any:
    matrix, start = to(SYMMETRIC), to(torch.ones(5))
    value, vector = schedules.power_iteration(lambda v: matrix @ v, start, 3)
    return schedules.lanczos(lambda v: matrix @ v, start, 5), value, vector


def wide(to: Move) -> Any:
    model = to(fresh(partial(schedules.mup_mlp, (1, 8, 8), 4, width=8, base_width=4), SHORT, seed=0))
    x, y = to(batch()), to(torch.arange(6) % 4)
    moved = [
        schedules.coordinate_check(
            model, lambda m, f=factors: optimizers.SGD(schedules.mup_groups(m, 0.1, f)), x, y, steps=1
        )
        for factors in (schedules.mup_sgd, schedules.mup_adam)
    ]
    return moved, model(x)


def ranged(to: Move) -> Any:
    return schedules.range_test(to(network()), SMALL, SHORT, low=1e-3, high=1.0, steps=4, seed=0)


TENSORS: dict[str, Case] = {"lanczos": spectra, "coordinate_check": wide}
RUNS: dict[str, Case] = {
    "schedule": scheduled,
    "with_layer_rates": by_layer,
    "reduce_on_plateau": on_a_plateau,
    "hessian_vector": curved,
    "sharpness, watched": watched,
    "preconditioned_sharpness": preconditioned,
    "range_test": ranged,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_on_the_gpu_as_here(name: str, dtype: torch.dtype) -> None:
    on_the_gpu_as_here(TENSORS[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_runs_there_are_those_here(name: str) -> None:
    on_the_gpu_as_here(RUNS[name], lies="cpu")
