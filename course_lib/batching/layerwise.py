r"""Layer-wise rates for large batches: each layer's step in proportion to its weights.

========  ==============================================================  ==============================================
name      update rule in words                                            source
========  ==============================================================  ==============================================
``LARS``  SGD with momentum, each layer's gradient scaled to its weights  You, Gitman & Ginsburg 2017, arXiv:1708.03888
========  ==============================================================  ==============================================

The same idea for Adam is LAMB, chapter 2's (``optimizers.LAMB``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.lab.arguments import is_number, require
from course_lib.optimizers import Method

Params = Any


def local_rate(theta: Tensor, g: Tensor, *, weight_decay: float, trust_coefficient: float) -> Tensor:
    r"""Return :math:`c\,|\theta| / (|g| + \lambda|\theta|)`, a 0-dimensional tensor; 1 where either norm is zero."""
    weights, gradient = theta.norm(), g.norm()
    usual = trust_coefficient * weights / (gradient + weight_decay * weights)
    return torch.where((weights > 0) & (gradient > 0), usual, 1.0)


def lars(theta: Tensor, g: Tensor, b: Tensor, *, lr: float, momentum: float, weight_decay: float, rate: Any) -> None:
    r"""Take a momentum step along the gradient times a layer's own ``rate`` :math:`r`.

    .. math:: b \leftarrow \mu b + r\,(g + \lambda\theta), \qquad \theta \leftarrow \theta - \eta\,b

    The paper has :math:`\eta` inside the sum; as in ``torch.optim.SGD`` it stands outside here, so that a schedule acts
    at once on all of b. With a constant rate both are the same. Source: You et al. 2017, arXiv:1708.03888.
    """
    b.mul_(momentum).add_(rate * g.add(theta, alpha=weight_decay))
    theta.sub_(b, alpha=lr)


class LARS(Method):
    """SGD with layer-wise adaptive rates, for large batches.

    A layer is a parameter of two dimensions or more. Biases, gains and other vectors take plain momentum steps without
    weight decay: their norms are too small to measure a step by. So ``lr`` must suit those, and ``trust_coefficient``
    scales the layers' steps beside them.

    Parameters
    ----------
    trust_coefficient : how far a layer moves in a step at ``lr`` 1, as a part of the norm of its weights.
    """

    sees_whole_tensors = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "trust_coefficient": trust_coefficient})

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        allowed = (lambda x: is_number(x) and x > 0, "a finite number > 0")
        require("trust_coefficient", group["trust_coefficient"], *allowed)

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        b, lr, momentum = state["momentum_buffer"], group["lr"], group["momentum"]
        if theta.ndim < 2:
            lars(theta, g, b, lr=lr, momentum=momentum, weight_decay=0.0, rate=1.0)
            return
        decay = group["weight_decay"]
        rate = local_rate(theta, g, weight_decay=decay, trust_coefficient=group["trust_coefficient"])
        lars(theta, g, b, lr=lr, momentum=momentum, weight_decay=decay, rate=rate)
