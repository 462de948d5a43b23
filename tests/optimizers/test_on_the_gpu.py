"""Rules, wrappers and several optimizers together on a GPU: the numbers of the CPU, from tensors over there.

``test_optimizers.py`` trains by each optimizer there; here is what that does not reach.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import optimizers as ours
from course_lib.lab.training import Recipe, fit, logits_of
from tests.merging.small import Case, Move, data, network, normal, on_the_gpu_as_here

SMALL = data()
SHORT = Recipe(epochs=2, batch_size=20, precision="float64")


def moved(to: Move, rule: Callable[..., Any], *states: Tensor, **settings: Any) -> Any:
    """A weight and what is kept for it, after the rule has moved them."""
    tensors = [to(each.clone()) for each in (normal(4, 3, seed=1), normal(4, 3, seed=2), *states)]
    rule(*tensors, **settings)
    return tensors


def zeros() -> Tensor:
    return torch.zeros(4, 3, dtype=torch.float64)


def two_parts(named: Any) -> ours.Composite:
    named = list(named)
    matrices = [p for _, p in named if p.ndim == 2]
    return ours.Composite(ours.Muon(matrices, lr=0.02), ours.AdamW([p for _, p in named if p.ndim != 2], lr=0.01))


def all_moved(to: Move) -> Any:
    """Of many tensors at once, as on a GPU, or of one after the other."""
    thetas = ours.Tensors([to(normal(3, seed=1)), to(normal(2, 2, seed=2))])
    ours.adam(
        thetas, ours.Tensors(x + 1 for x in thetas), *(ours.Tensors(map(torch.zeros_like, thetas)) for _ in range(2)),
        step=1, lr=0.1, betas=(0.9, 0.99), eps=1e-8,
    )  # fmt: skip
    return list(thetas)


def steps(to: Move, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Any:
    """Two steps, the second by a copy of the optimizer and its weights; bytes that are kept."""
    weights = [nn.Parameter(to(normal(4, 3, seed=1))), nn.Parameter(to(normal(3, seed=2)))]
    optimizer = make(weights)
    for copied in (False, True):
        if copied:
            weights, optimizer = copy.deepcopy((weights, optimizer))

        def closure(weights: list[nn.Parameter] = weights, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (weights[0].square().sum() + (weights[0] @ weights[1]).sum()) / 2
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]  # torch says float
    return list(weights), ours.state_bytes(optimizer)


ADAM = partial(ours.AdamW, lr=0.01)
RULES: dict[str, Case] = {
    "decay_weights": lambda to: moved(to, lambda theta, g: ours.decay_weights(theta, 0.1, 0.1)),
    "rmsprop": lambda to: moved(to, ours.rmsprop, zeros() + 2, lr=0.1),
    "root_mean_square": lambda to: ours.root_mean_square(to(normal(4, 3)), to(zeros()), 0.9),
    "newton_schulz": lambda to: ours.newton_schulz(to(normal(4, 3)), 2, dtype=torch.float32),
    "directions": lambda to: [
        f([to(normal(3, seed=1))], [to(normal(3, seed=2))], 0.1)
        for f in (ours.sharpest_direction, ours.adaptive_sharpest_direction)
    ],
    "Tensors": all_moved,
}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Composite": lambda weights: two_parts(enumerate(weights)),
    "SAM around a Composite": lambda weights: ours.SAM(two_parts(enumerate(weights)), adaptive=True),
    "Lookahead": lambda weights: ours.Lookahead(ADAM(weights), k=2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_rules_on_the_gpu_as_here(name: str, dtype: torch.dtype) -> None:
    on_the_gpu_as_here(RULES[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_copies_go_on_there(name: str) -> None:
    """Muon rounds to bfloat16, which a GPU does its own way."""
    on_the_gpu_as_here(lambda to: steps(to, OPTIMIZERS[name]), torch.float32)


@pytest.mark.gpu
def test_a_run_there_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    recipe = replace(SHORT, optimizer=two_parts)
    whole, again = network(), network()
    fit(whole, SMALL, recipe, seed=0)
    fit(network(), SMALL, replace(recipe, epochs=1), seed=0, checkpoint=tmp_path / "run.pt")
    fit(again, SMALL, recipe, seed=0, checkpoint=tmp_path / "run.pt")
    torch.testing.assert_close(logits_of(again, SMALL.val), logits_of(whole, SMALL.val), rtol=1e-6, atol=1e-6)
