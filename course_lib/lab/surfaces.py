"""Losses of two weights, on which the way of an optimizer can be seen.

``ravine`` (an ill-conditioned quadratic), ``saddle`` (flat in the middle, two minima) and ``rosenbrock`` (a bent
valley; H. H. Rosenbrock, "An automatic method for finding the greatest or least value of a function", The Computer
Journal 3 (1960), 175-184). A surface is a function ``[..., 2] -> [...]``; ``descend`` runs an optimizer on it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least

Surface = Callable[[Tensor], Tensor]


def ravine(condition: float = 25.0, angle: float = 0.0) -> Surface:
    """``½ (a² + condition · b²)`` with the axes ``a, b`` turned by ``angle`` degrees; its minimum is at the origin."""
    if condition < 1:
        raise ValueError(f"condition={condition}: the ratio of the largest to the smallest curvature is at least 1")
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def surface(w: Tensor) -> Tensor:
        x, y = w.unbind(-1)
        return 0.5 * ((cos * x + sin * y) ** 2 + condition * (cos * y - sin * x) ** 2)

    return surface


def saddle(w: Tensor) -> Tensor:
    """``½ x² - ½ y² + ¼ y⁴``: a saddle at the origin, minima of -¼ at (0, ±1)."""
    x, y = w.unbind(-1)
    return 0.5 * x**2 - 0.5 * y**2 + 0.25 * y**4


def rosenbrock(w: Tensor) -> Tensor:
    """``(1 - x)² + 100 (y - x²)²``: a bent valley whose minimum, 0, is at (1, 1)."""
    x, y = w.unbind(-1)
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def descend(
    surface: Surface, start: Sequence[float], optimizer: Callable[[list[Tensor]], Optimizer], steps: int
) -> Tensor:
    """The points an optimizer visits, float64 ``[steps + 1, 2]``; fewer when it leaves for where nothing is finite.

    The two weights are one row of a matrix ``[1, 2]``, so that methods for matrices (Muon, Shampoo) run too.
    """
    at_least(1, steps=steps)
    weights = torch.tensor([list(start)], dtype=torch.float64, requires_grad=True)
    optim = optimizer([weights])

    def gradient() -> float:
        loss = surface(weights[0])
        (weights.grad,) = torch.autograd.grad(loss, weights)
        return loss.item()

    points = [weights.detach().clone()]
    for _ in range(steps):
        optim.step(gradient)
        if not weights.detach().abs().max().item() < 1e6:  # NaN is not below anything either
            break
        points.append(weights.detach().clone())
    return torch.cat(points)
