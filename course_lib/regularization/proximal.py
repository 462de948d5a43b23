r"""Steps that act after the optimizer's: proximal steps, which reach exact zeros, and projections.

==========================  ========================================================  ==================================
name                        what it does                                              source
==========================  ========================================================  ==================================
``soft_threshold``          every number towards 0, and no further                    Tibshirani 1996, JRSSB 58(1);
                                                                                      Parikh & Boyd 2014, Foundations
                                                                                      and Trends in Optimization 1(3)
``group_soft_threshold``    whole rows towards 0                                      Yuan & Lin 2006, JRSSB 68(1)
``clip_row_norms``          rows back into a ball: max-norm                           Srivastava et al. 2014, JMLR 15
``prox_l1``, ``prox_l2``,   the same as functions of a weight and a rate
``prox_elastic_net``,
``prox_group_lasso``,
``max_norm``
``after_step``              a recipe that does one of them after each step
``zero_share``              how many weights, or units, are exactly 0
==========================  ========================================================  ==================================

The proximal step of a penalty R at rate :math:`\eta` is :math:`\arg\min_z\tfrac12\|z-w\|^2+\eta R(z)`. A gradient step
on the loss and then this one converge to the minimum of loss and penalty together (proximal gradient descent), although
R has no gradient at 0. With momentum or Adam the step before is another, and the proximal step the same: then it is
decoupled, as the decay of AdamW is.

``after_step(recipe, partial(prox_l1, strength=1e-4))`` is all that a run needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Recipe
from course_lib.regularization.drawing import check_chance, check_not_negative, check_positive
from course_lib.regularization.passes import flat_filters, weights_of

Prox = Callable[[Tensor, float], Tensor]
"""``(weight, lr) -> weight``: what becomes of a weight after a step of rate ``lr``."""


def soft_threshold(w: Tensor, threshold: float) -> Tensor:
    r"""Return :math:`\text{sign}(w)\max(|w| - t, 0)`.

    Raises
    ------
    ValueError : ``threshold`` is no number of at least 0.
    """
    check_not_negative(threshold=threshold)
    return w.sign() * (w.abs() - threshold).clamp_min(0)


def group_soft_threshold(w: Tensor, threshold: float) -> Tensor:
    r"""Return :math:`\max(1 - t/\|w_g\|_2, 0)\,w_g` for each row g of ``[out, …]``; a row shorter than t becomes 0.

    Raises
    ------
    ValueError : ``threshold`` is no number of at least 0.
    """
    check_not_negative(threshold=threshold)
    norms = torch.linalg.vector_norm(flat_filters(w), dim=1)
    kept = (norms - threshold).clamp_min(0) / norms.clamp_min(torch.finfo(w.dtype).tiny)
    return w * kept.view(-1, *[1] * (w.ndim - 1))


def clip_row_norms(w: Tensor, limit: float) -> Tensor:
    """Shrink each row of ``[out, …]`` that is longer than ``limit`` to that length, as ``torch.renorm`` does.

    Raises
    ------
    ValueError : ``limit`` is no number above 0.
    """
    check_positive(limit=limit)
    norms = torch.linalg.vector_norm(flat_filters(w), dim=1)
    return w * (limit / norms.clamp_min(limit)).view(-1, *[1] * (w.ndim - 1))


# --- Of a weight and a rate -------------------------------------------------------------------------------------------


def prox_l1(w: Tensor, lr: float, *, strength: float) -> Tensor:
    r"""The proximal step of :math:`\lambda\|w\|_1`: ``soft_threshold`` by :math:`\eta\lambda`."""
    check_not_negative(strength=strength)
    return soft_threshold(w, lr * strength)


def prox_l2(w: Tensor, lr: float, *, weight_decay: float) -> Tensor:
    r"""The proximal step of :math:`\tfrac{\lambda}{2}\|w\|^2`: :math:`w/(1+\eta\lambda)`, shrinkage after the step."""
    check_not_negative(weight_decay=weight_decay)
    return w / (1 + lr * weight_decay)


def prox_elastic_net(w: Tensor, lr: float, *, alpha: float, l1_ratio: float = 0.5) -> Tensor:
    r"""The proximal step of ``penalties.elastic_net``: the threshold, then the shrinkage."""
    check_not_negative(alpha=alpha)
    check_chance(l1_ratio=l1_ratio)
    return prox_l2(prox_l1(w, lr, strength=alpha * l1_ratio), lr, weight_decay=alpha * (1 - l1_ratio))


def prox_group_lasso(w: Tensor, lr: float, *, strength: float) -> Tensor:
    r"""The proximal step of ``penalties.group_lasso``: ``group_soft_threshold`` by :math:`\eta\lambda\sqrt{|g|}`."""
    check_not_negative(strength=strength)
    return group_soft_threshold(w, lr * strength * math.sqrt(flat_filters(w).shape[1]))


def max_norm(w: Tensor, lr: float, *, limit: float) -> Tensor:
    """The projection on the weights whose rows are no longer than ``limit``, at whatever rate.

    It is the proximal step of a penalty that is 0 there and infinite elsewhere. With dropout it allows large rates
    (Srivastava et al. 2014, JMLR 15, who name limits of 3 to 4).
    """
    return clip_row_norms(w, limit)


# --- In a recipe ------------------------------------------------------------------------------------------------------


def after_step(recipe: Recipe, prox: Prox) -> Recipe:
    """Return a recipe in which ``prox`` acts on each weight (``weights_of``) after each step, at that step's rate.

    Raises
    ------
    ValueError : ``prox`` is bad for a weight of two numbers: its settings are tried at the door.
    """
    prox(torch.ones(2, 1), 0.1)
    return after_each_step(recipe, partial(_act, prox=prox))


def _act(optimizer: Optimizer, step: int, *, prox: Prox) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for w in weights_of(group["params"]):
                w.copy_(prox(w, float(group["lr"])))


def zero_share(model: nn.Module, *, rows: bool = False) -> float:
    """Return the share of weights (``weights_of``) that are exactly 0; of whole output units with ``rows``.

    Raises
    ------
    ValueError : the model has no weights.
    """
    weights = [flat_filters(w.detach()) for w in weights_of(model.parameters())]
    at_least(1, weights=len(weights))
    zero = [(w == 0).all(1) if rows else w == 0 for w in weights]
    return sum(int(part.sum()) for part in zero) / sum(part.numel() for part in zero)
