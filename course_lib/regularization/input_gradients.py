r"""Penalties on how fast the output changes with the input.

==============================  =====================================================  =================================
name                            what it adds                                           source
==============================  =====================================================  =================================
``gradient_penalty``            the squared gradient of the loss: double               Drucker & Le Cun 1992, IEEE
                                backpropagation                                        Trans. Neural Networks 3(6)
``jacobian_penalty``            the squared Jacobian of the logits, exactly            Sokolić et al. 2017,
                                                                                       arXiv:1605.08254
``projected_jacobian_penalty``  the same, estimated along random directions            Hoffman, Roberts & Yaida 2019,
                                                                                       arXiv:1908.02729
==============================  =====================================================  =================================

All three are objectives around an objective, and mean over the batch of half a squared norm. In evaluation mode under
``no_grad`` they are values without a gradient. Batch norm in training mode makes each example's output depend on the
others' inputs; then the gradients meant are of the sum over the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import at_least
from course_lib.lab.training import Objective, cross_entropy
from course_lib.regularization.drawing import check_not_negative, unit_rows
from course_lib.regularization.passes import Seen, twice, unseen


def gradient_penalty(
    model: nn.Module, x: Tensor, y: Tensor, *, strength: float, objective: Objective = cross_entropy
) -> Tensor:
    r"""Add :math:`\tfrac{\lambda}{2}\,\tfrac1N\sum_i\|\partial\ell_i/\partial x_i\|^2`, of the wrapped objective.

    :math:`\ell_i` is an example's share of the objective, times the N of the batch.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0.
    """
    check_not_negative(strength=strength)
    trains = torch.is_grad_enabled()
    with torch.enable_grad(), twice():
        x = x.detach().requires_grad_()
        loss = objective(unseen(model), x, y)
        (slope,) = torch.autograd.grad(loss * len(x), x, create_graph=trains)
        return _grown(loss, strength, squared_norms(slope).mean(), trains)


def jacobian_penalty(
    model: nn.Module, x: Tensor, y: Tensor, *, strength: float, objective: Objective = cross_entropy
) -> Tensor:
    r"""Add :math:`\tfrac{\lambda}{2}\,\tfrac1N\sum_i\|\partial z_i/\partial x_i\|_F^2` of the logits z ``[N, K]``.

    It takes K backward passes.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0.
    """
    check_not_negative(strength=strength)
    trains = torch.is_grad_enabled()
    with torch.enable_grad(), twice():
        model, x, logits = _passed(model, x)
        return _grown(objective(model, x, y), strength, squared_jacobian(logits, x, trains).mean(), trains)


def projected_jacobian_penalty(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    strength: float,
    projections: int = 1,
    generator: torch.Generator | None = None,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Add an estimate without bias of what ``jacobian_penalty`` adds, for as many backward passes as ``projections``.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0, or ``projections`` is below 1.
    """
    check_not_negative(strength=strength)
    at_least(1, projections=projections)
    trains = torch.is_grad_enabled()
    with torch.enable_grad(), twice():
        model, x, logits = _passed(model, x)
        estimate = projected_squared_jacobian(logits, x, projections, generator, trains)
        return _grown(objective(model, x, y), strength, estimate.mean(), trains)


# --- Norms ------------------------------------------------------------------------------------------------------------


def squared_norms(x: Tensor) -> Tensor:
    """The squared norm of each example: ``[N, …] -> [N]``."""
    return x.flatten(1).square().sum(1)


def squared_jacobian(logits: Tensor, x: Tensor, create_graph: bool = False) -> Tensor:
    r"""Return :math:`\|J_i\|_F^2=\sum_k\|\partial z_{ik}/\partial x_i\|^2`, ``[N]``, of logits computed from ``x``."""
    rows = [
        torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True, create_graph=create_graph)[0]
        for k in range(logits.shape[1])
    ]
    return torch.stack([squared_norms(row) for row in rows]).sum(0)


def projected_squared_jacobian(
    logits: Tensor, x: Tensor, projections: int, generator: torch.Generator | None, create_graph: bool = False
) -> Tensor:
    r"""Return :math:`\tfrac{K}{n}\sum_v\|\partial(v^\top z_i)/\partial x_i\|^2`, ``[N]``, v uniform on the unit sphere.

    Each example draws directions of its own, ``n`` of them. Their mean is :math:`\|J_i\|_F^2`, since
    :math:`\mathbb{E}\,vv^\top=I/K`.
    """
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for _ in range(projections):
        v = unit_rows(tuple(logits.shape), logits, generator)
        (row,) = torch.autograd.grad((v * logits).sum(), x, retain_graph=True, create_graph=create_graph)
        total = total + squared_norms(row)
    return total * logits.shape[1] / projections


def _passed(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """A forward pass from which gradients can go back to the input, which the wrapped objective need not repeat."""
    x = x.detach().requires_grad_()
    # an answer at hand belongs to the input before it wanted a gradient
    model = unseen(model)
    logits = model(x)
    return Seen(model, x, logits), x, logits


def _grown(loss: Tensor, strength: float, penalty: Tensor, trains: bool) -> Tensor:
    grown = loss + 0.5 * strength * penalty
    return grown if trains else grown.detach()
