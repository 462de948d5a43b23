r"""The principle: gradient descent as a filter that opens with time, and what it has to do with weight decay.

==================================  ===================================================  ==============================
name                                what it gives                                        source
==================================  ===================================================  ==============================
``gd_filter``                       what t steps have learnt of each direction           Hastie, Tibshirani & Friedman
``ridge_filter``                    what weight decay leaves of it                       2009, 3.4.1
``momentum_filter``                 the same with heavy-ball momentum                    Polyak 1964
``flow_filter``                     with steps without length: gradient flow             Ali, Kolter & Tibshirani 2018,
                                                                                         arXiv:1810.10082
``equivalent_ridge``, …             the weight decay that t steps amount to
``filtered_solution``               the weights that a filter leads to
==================================  ===================================================  ==============================

The loss is the mean of half squares, :math:`L(w)=\frac1{2N}\|y-Xw\|^2`, without an intercept. Its Hessian
:math:`X^\top X/N` has the eigenvalues :math:`\lambda_j` (``spectrum``) along the directions :math:`v_j`. Each direction
is learnt by itself: from :math:`w_0=0`, after t steps a share :math:`f_j` of the least-squares solution is there. Where
the data vary much it comes soon; where they hardly vary the noise of y is large, and comes late. To stop early is to
leave that out (``filter_error`` counts it). A weight decay :math:`\gamma`, that is :math:`L+\frac\gamma2\|w\|^2`, does
nearly the same. (Chapter 5's ``ridge`` adds up instead of averaging: its ``alpha`` is :math:`N\gamma`.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.early_stopping.spectral import (
    check_matrix,
    check_not_negative,
    check_steps,
    check_vector,
    singular,
    spectrum,
)
from course_lib.lab.arguments import at_least, is_number, require

# --- Filters ----------------------------------------------------------------------------------------------------------


def gd_filter(eigenvalues: Tensor, lr: float, steps: int) -> Tensor:
    r"""Return :math:`f_j=1-(1-\eta\lambda_j)^t`, what t steps of gradient descent have learnt of each direction.

    Above :math:`\eta=2/\lambda_{\max}` it grows without bound.

    Raises
    ------
    ValueError : ``lr`` is no number above 0 or ``steps`` no whole number of at least 0.
    """
    check_steps(lr, steps)
    x = lr * eigenvalues
    # 1 - (1 - x)^t loses all digits of a small x; expm1 and log1p keep them, up to x = 1
    small = -torch.expm1(steps * torch.log1p(-x.clamp(max=0.5)))
    return torch.where(x <= 0.5, small, 1 - (1 - x) ** steps)


def momentum_filter(eigenvalues: Tensor, lr: float, steps: int, momentum: float) -> Tensor:
    r"""Return the same with momentum :math:`\mu`, as in ``torch.optim.SGD``.

    What is left, :math:`r=1-f`, follows :math:`r_{t+1}=(1+\mu-\eta\lambda)\,r_t-\mu\,r_{t-1}` from
    :math:`r_0=r_{-1}=1`: the t-th power of a 2 × 2 matrix. Where its eigenvalues are complex a direction overshoots
    and swings, and f is above 1 now and then.

    Raises
    ------
    ValueError : as ``gd_filter``, or ``momentum`` is not at least 0 and below 1.
    """
    check_steps(lr, steps)
    require("momentum", momentum, lambda m: is_number(m) and 0 <= m < 1, "a number of at least 0 and below 1")
    recursion = eigenvalues.new_zeros(len(eigenvalues), 2, 2)
    recursion[:, 0, 0] = 1 + momentum - lr * eigenvalues
    recursion[:, 0, 1] = -momentum
    recursion[:, 1, 0] = 1
    return 1 - torch.linalg.matrix_power(recursion, steps)[:, 0].sum(1)


def flow_filter(eigenvalues: Tensor, time: float) -> Tensor:
    r"""Return :math:`f_j=1-e^{-t\lambda_j}` of gradient flow, the limit of many small steps: ``time`` is rate × steps.

    Raises
    ------
    ValueError : ``time`` is no number of at least 0.
    """
    check_not_negative(time=time)
    return -torch.expm1(-time * eigenvalues)


def ridge_filter(eigenvalues: Tensor, weight_decay: float) -> Tensor:
    r"""Return :math:`f_j=\lambda_j/(\lambda_j+\gamma)`, what weight decay leaves of each direction; 0 where it is 0/0.

    Raises
    ------
    ValueError : ``weight_decay`` is no number of at least 0.
    """
    check_not_negative(weight_decay=weight_decay)
    below = eigenvalues + weight_decay
    return torch.where(below > 0, eigenvalues / below.where(below > 0, torch.ones_like(below)), 0.0)


# --- The weight decay that stopping amounts to ------------------------------------------------------------------------


def equivalent_ridge(lr: float, steps: int) -> float:
    r"""Return :math:`\gamma=1/(\eta t)`, the weight decay that does about the same as stopping after t steps.

    Exact to first order where :math:`\eta t\lambda` is small; elsewhere both filters are open or half open.

    Raises
    ------
    ValueError : ``lr`` is no number above 0 or ``steps`` no whole number of at least 1.
    """
    check_steps(lr, steps)
    at_least(1, steps=steps)
    return 1 / (lr * steps)


def equivalent_ridge_by_direction(eigenvalues: Tensor, lr: float, steps: int) -> Tensor:
    r"""Return the weight decay that each direction would need, :math:`\gamma_j=\lambda_j\frac q{1-q}`.

    With :math:`q=(1-\eta\lambda_j)^t` it solves :math:`\lambda/(\lambda+\gamma)=1-q`. Weak directions get
    :math:`1/(\eta t)`, strong ones nearly none: stopping early leaves the strong directions less shrunk than weight
    decay does.

    Raises
    ------
    ValueError : as ``equivalent_ridge``.
    """
    at_least(1, steps=steps)
    learnt = gd_filter(eigenvalues, lr, steps)
    there = learnt > 0
    gamma = eigenvalues * (1 - learnt) / learnt.where(there, torch.ones_like(learnt))
    return torch.where(there, gamma, torch.full_like(gamma, 1 / (lr * steps)))


# --- Weights ----------------------------------------------------------------------------------------------------------


def filtered_solution(X: Tensor, y: Tensor, kept: Tensor, start: Tensor | None = None) -> Tensor:
    r"""Return :math:`w=\sum_jv_j\big(f_j\,\hat w_j+(1-f_j)\,v_j^\top w_0\big)`, ``[D]``.

    :math:`\hat w_j` is the least-squares solution along a direction, f the filter ``kept`` ``[D]``, w₀ the ``start``
    (zero). Directions without data stay where they started.

    Raises
    ------
    ValueError : X is no matrix of floats, or y, ``kept`` or ``start`` do not fit it.
    """
    check_matrix(X)
    check_vector(len(X), y=y)
    check_vector(X.shape[1], kept=kept, **({} if start is None else {"start": start}))
    U, s, V = singular(X)
    there = s > 0
    there_s = s.where(there, torch.ones_like(s))
    start = torch.zeros_like(kept) if start is None else start
    learnt = kept[: len(s)] * torch.where(there, U.mT @ y / there_s - V @ start, 0.0)
    return start + V.mT @ learnt


def gd_solution(X: Tensor, y: Tensor, lr: float, steps: int, start: Tensor | None = None) -> Tensor:
    """Return the weights after so many steps of gradient descent, in closed form, ``[D]``.

    Raises
    ------
    ValueError : as ``gd_filter`` and ``filtered_solution``.
    """
    return filtered_solution(X, y, gd_filter(spectrum(X), lr, steps), start)
