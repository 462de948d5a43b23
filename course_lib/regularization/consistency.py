r"""Objectives that ask a network to agree with itself.

=========================  ===========================================================  ================================
name                       with what it should agree                                    source
=========================  ===========================================================  ================================
``r_drop``                 with itself under another draw of dropout                    Liang et al. 2021,
                                                                                        arXiv:2106.14448
``virtual_adversarial``    with itself at the worst input nearby; needs no labels       Miyato et al. 2018,
                                                                                        arXiv:1704.03976
=========================  ===========================================================  ================================
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least
from course_lib.lab.training import Objective, cross_entropy
from course_lib.regularization.drawing import check_not_negative, check_positive, normalised_rows, unit_rows
from course_lib.regularization.passes import Seen, statistics_rest, unseen


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r"""Return :math:`\text{KL}(p\,\|\,q)=\sum_k p_k(\log p_k-\log q_k)` of logits ``[N, K]``, as ``[N]``."""
    log_p, log_q = F.log_softmax(p_logits, 1), F.log_softmax(q_logits, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def r_drop(model: nn.Module, x: Tensor, y: Tensor, *, alpha: float, objective: Objective = cross_entropy) -> Tensor:
    r"""The objective of two passes, and :math:`\alpha` times how far they are from one another.

    .. math:: \ell_1 + \ell_2 + \tfrac{\alpha}{2}\,\tfrac1N\sum_i
       \big(\text{KL}(p_{1i}\,\|\,p_{2i}) + \text{KL}(p_{2i}\,\|\,p_{1i})\big)

    The two passes draw their dropout masks anew. The sum of both losses, not their mean, is the paper's: at
    :math:`\alpha=0` the gradient is about twice that of one pass.

    Raises
    ------
    ValueError : ``alpha`` is no number of at least 0.
    """
    check_not_negative(alpha=alpha)
    # an answer at hand would come twice, and agree with itself
    model = unseen(model)
    first, second = model(x), model(x)
    loss = objective(Seen(model, x, first), x, y) + objective(Seen(model, x, second), x, y)
    apart = kl_divergence(first, second) + kl_divergence(second, first)
    return loss + 0.5 * alpha * apart.mean()


# --- Virtual adversarial training -------------------------------------------------------------------------------------


def worst_direction(
    model: nn.Module,
    x: Tensor,
    logits: Tensor,
    *,
    xi: float = 1e-2,
    power_iterations: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return for each example the direction of norm 1 in which the model's answer changes fastest, ``[N, …]`` as x.

    Close to x the divergence is :math:`\tfrac12 r^\top H r`, and its gradient at :math:`r=\xi d` about :math:`\xi Hd`:
    :math:`d\leftarrow\nabla_r\text{KL}(p(x)\,\|\,p(x+r))` and back to norm 1, from a random start, is power iteration.
    ``logits`` are those of x; a small :math:`\xi` in low precision loses digits.

    Raises
    ------
    ValueError : ``xi`` is no number above 0, or ``power_iterations`` below 1.
    """
    check_positive(xi=xi)
    at_least(1, power_iterations=power_iterations)
    logits = logits.detach()
    d = unit_rows(tuple(x.shape), x, generator)
    with torch.enable_grad(), statistics_rest(model):
        for _ in range(power_iterations):
            r = (xi * d).requires_grad_()
            (slope,) = torch.autograd.grad(kl_divergence(logits, model(x.detach() + r)).sum(), r)
            d = normalised_rows(slope)
    return d


def virtual_adversarial(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    alpha: float = 1.0,
    xi: float = 1e-2,
    power_iterations: int = 1,
    generator: torch.Generator | None = None,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""The objective, and :math:`\alpha\,\tfrac1N\sum_i\text{KL}(p(x_i)\,\|\,p(x_i+\epsilon d_i))`, d the worst.

    ``eps`` is a distance in the space of normalised inputs: the norm of a whole image's change. p(x) is a constant to
    the gradient, as in the paper. Batch norm sees the changed inputs, and keeps its running statistics from them.
    Dropout should be off or the network would also be asked to agree with other masks.

    Raises
    ------
    ValueError : ``eps`` or ``xi`` is no number above 0, ``alpha`` none of at least 0, ``power_iterations`` below 1.
    """
    check_positive(eps=eps)
    check_not_negative(alpha=alpha)
    logits = model(x)
    d = worst_direction(model, x, logits, xi=xi, power_iterations=power_iterations, generator=generator)
    with statistics_rest(model):
        apart = kl_divergence(logits.detach(), model(x + eps * d))
    return objective(Seen(model, x, logits), x, y) + alpha * apart.mean()
