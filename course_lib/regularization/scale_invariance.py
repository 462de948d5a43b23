r"""What normalisation does to the rate: the length of a weight no longer matters, only its direction.

=========================  =============================================================  =============================
name                       what it gives                                                  source
=========================  =============================================================  =============================
``radial_share``           how much of a gradient points along its weight: 0 behind a     van Laarhoven 2017,
                           normalisation                                                  arXiv:1706.05350
``effective_rate``         the rate at which the direction learns: lr over the squared    van Laarhoven 2017;
                           length                                                         Zhang et al. 2018,
                                                                                          arXiv:1810.12281
``equilibrium_norm``       the length where growth and decay balance                      van Laarhoven 2017;
``norm_over_steps``        the way there                                                  Wan et al. 2020,
``equilibrium_rotation``   the angle of a step once it is reached                         arXiv:2006.08419
``adam_equilibrium_…``     the same for AdamW                                             Kosson et al. 2023,
``rotation``                                                                              arXiv:2305.17212
``angle``                  between two weights
``Rotations``, ``turned``  lengths and angles of a run, step by step
=========================  =============================================================  =============================

If :math:`f(cw)=f(w)` for every c > 0, the gradient is orthogonal to w and shrinks as w grows:
:math:`g(w)=\tilde g/\|w\|`, with :math:`\tilde g` the gradient at length 1. A step of SGD then makes w longer
(Pythagoras), weight decay makes it shorter, and

.. math:: \|w\|^2\leftarrow(1-\eta\lambda)^2\|w\|^2+\eta^2\,\|\tilde g\|^2/\|w\|^2

comes to rest. So weight decay does not regularise such a layer: it sets how fast it turns.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Recipe
from course_lib.regularization.drawing import check_not_negative, check_positive


def radial_share(weight: Tensor, gradient: Tensor) -> float:
    r"""Return :math:`|w^\top g|/(\|w\|\|g\|)`, from 0 (orthogonal, as for a scale-invariant layer) to 1."""
    w, g = weight.detach().flatten(), gradient.detach().flatten()
    return (torch.dot(w, g).abs() / (w.norm() * g.norm()).clamp_min(torch.finfo(w.dtype).tiny)).item()


def effective_rate(lr: float, weight: Tensor) -> float:
    r"""Return :math:`\eta/\|w\|^2`: the rate that would move the direction alike at length 1.

    Raises
    ------
    ValueError : ``lr`` is no number of at least 0, or the weight is 0.
    """
    check_not_negative(lr=lr)
    squared = weight.detach().square().sum().item()
    require("weight", squared, lambda length: length > 0, "of a length above 0")
    return lr / squared


def equilibrium_norm(lr: float, weight_decay: float, gradient_sq: float, momentum: float = 0.0) -> float:
    r"""Return the length at which a scale-invariant weight comes to rest under SGD.

    .. math:: \|w\|^4=\frac{\eta\,\mathbb{E}\|\tilde g\|^2}
       {\lambda\,(1-\mu)\,\big(2-\eta\lambda/(1+\mu)\big)}\approx\frac{\eta\,\mathbb{E}\|\tilde g\|^2}{2\lambda(1-\mu)}

    ``gradient_sq`` is :math:`\mathbb{E}\|\tilde g\|^2`, the mean of the squared gradient times the squared length, of
    gradients that are independent from step to step. Source: Wan et al. 2020, arXiv:2006.08419.

    Raises
    ------
    ValueError : a setting is no number above 0, or ``momentum`` none from 0 to below 1.
    """
    _check(lr, weight_decay, momentum)
    check_positive(gradient_sq=gradient_sq)
    below = weight_decay * (1 - momentum) * (2 - lr * weight_decay / (1 + momentum))
    return (lr * gradient_sq / below) ** 0.25


def norm_over_steps(lr: float, weight_decay: float, gradient_sq: float, start: float, steps: int) -> list[float]:
    r"""Return the length before each of so many steps of SGD without momentum and after the last, from ``start``.

    The recursion at the head of this file, with the mean of :math:`\|\tilde g\|^2`. Near its end
    :math:`\|w\|^4` approaches its limit as :math:`e^{-4\eta\lambda t}`.

    Raises
    ------
    ValueError : a setting is no number above 0, or ``steps`` is below 1.
    """
    _check(lr, weight_decay, 0.0)
    check_positive(gradient_sq=gradient_sq, start=start)
    at_least(1, steps=steps)
    squares = [start**2]
    for _ in range(steps):
        squares.append((1 - lr * weight_decay) ** 2 * squares[-1] + lr**2 * gradient_sq / squares[-1])
    return [math.sqrt(square) for square in squares]


def equilibrium_rotation(lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    r"""Return the angle of a step of SGD at rest, in radians: :math:`\sqrt{2\eta\lambda/(1+\mu)}`.

    Neither the loss nor the gradient is in it: all scale-invariant layers turn alike. Without momentum the exact angle
    is :math:`\arccos(1-\eta\lambda)`. Source: Wan et al. 2020, arXiv:2006.08419.

    Raises
    ------
    ValueError : a setting is no number above 0, or ``momentum`` none from 0 to below 1.
    """
    _check(lr, weight_decay, momentum)
    return math.sqrt(2 * lr * weight_decay / (1 + momentum))


def adam_equilibrium_rotation(lr: float, weight_decay: float, beta1: float = 0.9) -> float:
    r"""Return the angle of a step of AdamW at rest, in radians: :math:`\sqrt{2\eta\lambda(1-\beta_1)/(1+\beta_1)}`.

    For gradients that are noise, independent from step to step. Source: Kosson et al. 2023, arXiv:2305.17212.

    Raises
    ------
    ValueError : a setting is no number above 0, or ``beta1`` none from 0 to below 1.
    """
    check_positive(lr=lr, weight_decay=weight_decay)
    require("beta1", beta1, lambda b: is_number(b) and 0 <= b < 1, "a number from 0 to below 1")
    return math.sqrt(2 * lr * weight_decay * (1 - beta1) / (1 + beta1))


def angle(a: Tensor, b: Tensor) -> float:
    """Return the angle between two weights of one shape, in radians.

    By the difference of the directions: the arccosine of their product would lose the digits of small angles.
    """
    u, v = (w.detach().flatten() / w.detach().norm() for w in (a, b))
    return 2 * math.atan2((u - v).norm().item(), (u + v).norm().item())


# --- Measured in a run ------------------------------------------------------------------------------------------------


class Rotations:
    """The length and the turn of one parameter after each step: ``norms``, and ``angles`` in radians.

    ``position`` is the parameter's place among those of the optimizer, 0 for the first layer. A copy starts empty.

    Raises
    ------
    ValueError : ``position`` is below 0.
    """

    def __init__(self, position: int = 0) -> None:
        at_least(0, position=position)
        self.position = position
        self.reset()

    def reset(self) -> None:
        """Forget all that was seen."""
        self.norms: list[float] = []
        self.angles: list[float] = []
        self._last: Tensor | None = None

    def __getstate__(self) -> dict[str, int]:
        return {"position": self.position}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.position = state["position"]
        self.reset()

    def see(self, optimizer: Optimizer) -> None:
        """Look at the parameter as it is now."""
        everything = [p for group in optimizer.param_groups for p in group["params"]]
        require("position", self.position, lambda k: k < len(everything), f"below {len(everything)}")
        weight = everything[self.position].detach().clone()
        self.norms.append(weight.norm().item())
        if self._last is not None:
            self.angles.append(angle(self._last, weight))
        self._last = weight


def turned(recipe: Recipe, rotations: Rotations) -> Recipe:
    """Return a recipe whose runs tell ``rotations`` of each step; each run starts with an empty one."""
    return after_each_step(recipe, partial(_tell, rotations=rotations))


def _tell(optimizer: Optimizer, step: int, *, rotations: Rotations) -> None:
    if step == 1:
        rotations.reset()
    rotations.see(optimizer)


def _check(lr: float, weight_decay: float, momentum: float) -> None:
    check_positive(lr=lr, weight_decay=weight_decay)
    require("momentum", momentum, lambda m: is_number(m) and 0 <= m < 1, "a number from 0 to below 1")
