"""The least of a smooth convex function of a few numbers, to the last digits: what calibration and stacking ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def least(loss: Callable[..., Tensor], start: Sequence[Tensor], *, steps: int = 200) -> list[Tensor]:
    """Return where ``loss(*numbers)`` is least, from ``start``, in float64: L-BFGS with a line search."""
    numbers = [each.detach().double().clone().requires_grad_() for each in start]
    solver = torch.optim.LBFGS(
        numbers,
        max_iter=steps,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        found = loss(*numbers)
        found.backward()
        return found

    with torch.enable_grad():
        solver.step(closure)
    return [each.detach() for each in numbers]
