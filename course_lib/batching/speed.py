"""Throughput: examples a second at each batch size.

==============  ======================================================================================================
name            what it gives
==============  ======================================================================================================
``throughput``  examples a second of forward and backward pass, all sizes measured in turns
==============  ======================================================================================================
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import at_least
from course_lib.lab.timing import measure
from course_lib.lab.training import Inputs, Objective, cross_entropy


def throughput(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    sizes: Sequence[int],
    *,
    objective: Objective = cross_entropy,
    rounds: int = 7,
) -> dict[int, float]:
    """Return examples a second of the gradient of a batch, ``{size: median over rounds}``.

    Each round measures every size once, every second one from the last to the first, so that a machine which slows
    down meets all of them alike. The first examples of ``(x, y)`` make each batch. The model is copied, and taken
    where it lies and in the mode that it is in.

    Raises
    ------
    ValueError : no size, or one that is not between 1 and the examples of ``y``.
    """
    at_least(1, rounds=rounds)
    if not sizes:
        raise ValueError(f"sizes={list(sizes)!r}: must hold at least one batch size")
    for size in sizes:
        at_least(1, size=size)
        if size > len(y):
            raise ValueError(f"sizes={list(sizes)!r}: must be at most {len(y)}, the examples of y")
    calls = {size: _gradient(copy.deepcopy(model), x, y, size, objective) for size in sizes}
    for call in calls.values():
        call()
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for round_ in range(rounds):
        for size in list(calls)[:: 1 if round_ % 2 == 0 else -1]:
            seconds[size].append(measure(calls[size], warmup=0, repeats=1, device=y.device).median)
    return {size: size / statistics.median(times) for size, times in seconds.items()}


def _gradient(model: nn.Module, x: Inputs, y: Tensor, size: int, objective: Objective) -> Callable[[], object]:
    batch = tuple(part[:size] for part in x) if isinstance(x, tuple) else x[:size]
    weights = [p for p in model.parameters() if p.requires_grad]
    return partial(_taken, model, batch, y[:size], weights, objective)


def _taken(model: nn.Module, x: Inputs, y: Tensor, weights: Sequence[Tensor], objective: Objective) -> object:
    return torch.autograd.grad(objective(model, x, y), weights, allow_unused=True)
