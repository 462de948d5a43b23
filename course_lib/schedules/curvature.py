"""Curvature: how sharply the loss bends, which bounds the rate that training survives.

============================  ===================================================  ==================================
name                          what it gives                                        source
============================  ===================================================  ==================================
``hessian_vector``            the Hessian times a vector, without the Hessian      Pearlmutter 1994, Neural
                                                                                   Computation 6(1)
``power_iteration``           the eigenvalue of largest magnitude of any product
``lanczos``                   the ends of the spectrum of a symmetric product      Lanczos 1950, Journal of Research
                                                                                   of the NBS 45(4)
``sharpness``                 the largest eigenvalue of the loss's Hessian         Cohen et al. 2021,
                                                                                   arXiv:2103.00065
``preconditioned_sharpness``  the same as Adam sees it                             Cohen et al. 2022,
                                                                                   arXiv:2207.14484
``stability_limit``           the curvature that a rate survives                   Cohen et al. 2021
``adam_stability_limit``      the same for the preconditioned sharpness            Cohen et al. 2022
============================  ===================================================  ==================================

On a quadratic loss of curvature h, a step of rate lr multiplies the distance to the minimum by ``1 - lr h``: it grows
once h is above ``2 / lr``. Training with all examples in one batch goes to that edge by itself, and stays there.

``data`` is a ``Split``; the model is not changed, and taken in the mode (train or eval) that it is in. Dropout must be
off: with other units at each product there is no one Hessian.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split, batches
from course_lib.lab.training import Objective, cross_entropy

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix as a function: ``v -> A v``, both ``[D]``."""


def hessian_vector(
    model: nn.Module, data: Split, *, objective: Objective = cross_entropy, batch_size: int = 1024
) -> Product:
    r"""Return ``v -> H v`` for the Hessian H of the mean loss over ``data``, by all weights that can be trained.

    The product is the gradient of :math:`g^\top v`, so it costs about two gradients and never needs the ``[D, D]``
    numbers of H. Weights stand in ``v`` in the order of ``model.parameters()``.
    """
    plain = copy.deepcopy(model)
    weights = _trainable(plain)
    there = data.to(weights[0].device)

    def product(v: Tensor) -> Tensor:
        parts = _like(weights, v)
        total = torch.zeros_like(v)
        for x, y in batches(there, batch_size, dtype=weights[0].dtype):
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                loss = objective(plain, x, y) * (len(y) / len(data))
            gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * part).sum() for g, part in zip(gradients, parts, strict=True)]).sum()
            if slope.requires_grad:  # it does not where the gradient is the same everywhere
                second = torch.autograd.grad(slope, weights, materialize_grads=True)
                total += torch.cat([part.flatten() for part in second])
        return total

    return product


# --- Eigenvalues from products alone ----------------------------------------------------------------------------------


def power_iteration(product: Product, start: Tensor, steps: int) -> tuple[float, Tensor]:
    r"""Multiply and normalise: :math:`v \leftarrow Av / \|Av\|`. Returns :math:`v^\top A v` and v ``[D]``.

    v turns to the eigenvector whose eigenvalue has the largest *magnitude*, by the ratio of the two largest a step; a
    negative eigenvalue may be that one, which ``lanczos`` tells from the largest.
    """
    at_least(1, steps=steps)
    v = start / start.norm()
    for _ in range(steps):
        w = product(v)
        norm = w.norm()
        if norm == 0:
            return 0.0, v
        v = w / norm
    return torch.dot(v, product(v)).item(), v


def lanczos(product: Product, start: Tensor, steps: int, *, tolerance: float = 0.0) -> Tensor:
    r"""Return eigenvalues of a symmetric product, rising, ``[at most steps]``: the first and the last are the best.

    They are those of A within the space that :math:`v, Av, A^2v, \dots` span. In the orthonormal basis of that space A
    is tridiagonal: :math:`A q_k = \beta_{k-1} q_{k-1} + \alpha_k q_k + \beta_k q_{k+1}`. It stops early when the space
    holds no more, or when the largest eigenvalue has moved by less than ``tolerance`` times itself.
    """
    at_least(1, steps=steps)
    basis = [start / start.norm()]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    largest = None
    for _ in range(min(steps, start.numel())):
        w = product(basis[-1])
        alphas.append(torch.dot(basis[-1], w))
        scale = w.norm()
        # Rounding undoes the orthogonality that the three terms alone promise: all of the basis, twice, restores it.
        span = torch.stack(basis)
        for _ in range(2):
            w = w - span.mT @ (span @ w)
        ritz = torch.linalg.eigvalsh(_tridiagonal(alphas, betas))
        done = largest is not None and (ritz[-1] - largest).abs() < tolerance * ritz[-1].abs()
        largest = ritz[-1]
        beta = w.norm()
        if done or beta <= 10 * torch.finfo(w.dtype).eps * scale:
            break
        betas.append(beta)
        basis.append(w / beta)
    return ritz


def _tridiagonal(alphas: list[Tensor], betas: list[Tensor]) -> Tensor:
    diagonal = torch.diag(torch.stack(alphas))
    if len(alphas) == 1:
        return diagonal
    beside = torch.stack(betas[: len(alphas) - 1])
    return diagonal + torch.diag(beside, 1) + torch.diag(beside, -1)


# --- Sharpness --------------------------------------------------------------------------------------------------------


def sharpness(
    model: nn.Module,
    data: Split,
    *,
    generator: torch.Generator,
    steps: int = 50,
    tolerance: float = 1e-4,
    objective: Objective = cross_entropy,
    batch_size: int = 1024,
) -> float:
    """Return the largest eigenvalue of the Hessian of the mean loss over ``data``.

    By ``lanczos`` from a random direction, drawn from ``generator``, in ``steps`` products at most. Beside the training
    it fits into a recipe's ``watch``. Source: Cohen et al. 2021, arXiv:2103.00065.
    """
    _check(generator, tolerance)
    product = hessian_vector(model, data, objective=objective, batch_size=batch_size)
    return lanczos(product, _random_direction(model, generator), steps, tolerance=tolerance)[-1].item()


def preconditioned_sharpness(
    model: nn.Module,
    data: Split,
    optimizer: Optimizer,
    *,
    generator: torch.Generator,
    steps: int = 50,
    tolerance: float = 1e-4,
    objective: Objective = cross_entropy,
    batch_size: int = 1024,
) -> float:
    r"""Return the largest eigenvalue of :math:`P^{-1} H`, what Adam makes of the Hessian H by its division.

    .. math:: P = (1 - \beta_1^t)\,\Big(\mathrm{diag}\sqrt{v / (1 - \beta_2^t)} + \epsilon\Big)

    It is that of the symmetric :math:`P^{-1/2} H P^{-1/2}`; with AMSGrad v is the largest that it has been. Large
    batches bring it to ``adam_stability_limit``. ``optimizer`` is an ``Adam`` or ``AdamW``, of torch or chapter 2, that
    has taken a step of ``model``. Source: Cohen et al. 2022, arXiv:2207.14484.

    Raises
    ------
    ValueError : the optimizer keeps no squares of a weight's gradient.
    """
    _check(generator, tolerance)
    product = hessian_vector(model, data, objective=objective, batch_size=batch_size)
    root = adam_preconditioner(model, optimizer).rsqrt()
    start = _random_direction(model, generator)
    return lanczos(lambda v: root * product(root * v), start, steps, tolerance=tolerance)[-1].item()


def adam_preconditioner(model: nn.Module, optimizer: Optimizer) -> Tensor:
    """Return what Adam divides each weight's gradient by, ``[D]``, in the order of ``model.parameters()``.

    Raises
    ------
    ValueError : the optimizer keeps no squares of a weight's gradient.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts = []
    for p in _trainable(model):
        state: Any = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"optimizer={type(optimizer).__name__} keeps no squared gradients ('exp_avg_sq') of a weight of shape "
                f"{tuple(p.shape)}: must be an Adam or AdamW that has taken a step of this model"
            )
        group, step = group_of[id(p)], float(state["step"])
        beta1, beta2 = group["betas"]
        squares = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
        scale = (squares / (1 - beta2**step)).sqrt() + group["eps"]
        parts.append(((1 - beta1**step) * scale).flatten())
    return torch.cat(parts)


def stability_limit(lr: float, momentum: float = 0.0) -> float:
    r"""Return the curvature above which gradient descent diverges on a quadratic loss: :math:`(2 + 2\mu)/\eta`.

    Source: Cohen et al. 2021, arXiv:2103.00065.
    """
    require("lr", lr, lambda x: is_number(x) and x > 0, "a number above 0")
    require("momentum", momentum, lambda x: is_number(x) and 0 <= x < 1, "a number from 0 to below 1")
    return (2 + 2 * momentum) / lr


def adam_stability_limit(lr: float, beta1: float = 0.9) -> float:
    r"""Return the preconditioned sharpness above which Adam diverges on a quadratic loss, its divisor being constant.

    :math:`(2 + 2\beta_1)/((1 - \beta_1)\,\eta)`, which is 38 over the rate for 0.9: Adam's momentum is a mean of
    gradients, not a sum. Source: Cohen et al. 2022, arXiv:2207.14484.
    """
    require("beta1", beta1, lambda x: is_number(x) and 0 <= x < 1, "a number from 0 to below 1")
    return stability_limit(lr, beta1) / (1 - beta1)


# --- Inside -----------------------------------------------------------------------------------------------------------


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    weights = [p for p in model.parameters() if p.requires_grad]
    require("model", type(model).__name__, lambda _: bool(weights), "a network with weights that can be trained")
    return weights


def _like(weights: list[nn.Parameter], v: Tensor) -> list[Tensor]:
    parts = v.split([p.numel() for p in weights])
    return [part.view_as(p) for part, p in zip(parts, weights, strict=True)]


def _random_direction(model: nn.Module, generator: torch.Generator) -> Tensor:
    weights = _trainable(model)
    count, first = sum(p.numel() for p in weights), weights[0]
    return torch.randn(count, generator=generator, dtype=torch.float64).to(first.device, first.dtype)


def _check(generator: torch.Generator, tolerance: float) -> None:
    require("generator", generator, lambda x: x.device.type == "cpu", "a CPU generator, so that draws agree everywhere")
    require("tolerance", tolerance, lambda x: is_number(x) and x >= 0, "a number of at least 0")
