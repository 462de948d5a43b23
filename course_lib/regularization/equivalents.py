r"""The penalties that noise is equal to: exactly for linear regression, to second order for all else.

==================================  ==================================================  ================================
name                                what it gives                                       source
==================================  ==================================================  ================================
``squared_error``                   half the mean squared error, as an objective
``input_noise_loss``                the expected loss of a linear model under noise     Bishop 1995, Neural
``input_noise_solution``            of its input, and its minimum: ridge                Computation 7(1)
``dropout_loss``                    the same under dropout of its input, and its        Srivastava et al. 2014, JMLR 15,
``dropout_solution``                minimum                                             sect. 9.1
``dropout_logistic_penalty``        what dropout adds to logistic regression            Wager, Wang & Liang 2013,
                                                                                        arXiv:1307.1493
``input_noise_curvature``           what noise adds to a network's loss: the trace      Bishop 1995
                                    of the Hessian by the input
``input_noise_tikhonov``            its part that is never negative: the Jacobian       Bishop 1995
==================================  ==================================================  ================================

A linear model is a vector w ``[D]`` with predictions ``X @ w``. Written for comparison, in the type of the tensors that
come in: give float64. But for ``squared_error`` they are values, not objectives; of those of networks, what comes back
from ``input_noise_curvature`` and ``input_noise_tikhonov`` is cut off from the graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import is_number, require
from course_lib.lab.training import Inputs
from course_lib.regularization.drawing import check_matrix, check_not_negative
from course_lib.regularization.passes import twice
from course_lib.regularization.ridge import ridge


def squared_error(model: nn.Module, x: Inputs, y: Tensor) -> Tensor:
    r"""Return :math:`\tfrac{1}{2N}\sum_i\|f(x_i)-y_i\|^2`, the objective of regression; y ``[N]`` or ``[N, K]``."""
    predicted = model(x)
    return 0.5 * (predicted - y.view_as(predicted)).square().sum() / len(y)


# --- Linear models ----------------------------------------------------------------------------------------------------


def linear_loss(X: Tensor, y: Tensor, w: Tensor) -> Tensor:
    r"""Return :math:`\tfrac{1}{2N}\|y-Xw\|^2`."""
    return 0.5 * (y - X @ w).square().mean()


def input_noise_loss(X: Tensor, y: Tensor, w: Tensor, std: float) -> Tensor:
    r"""Return :math:`\mathbb{E}\,\tfrac{1}{2N}\|y-(X+E)w\|^2=\tfrac{1}{2N}\|y-Xw\|^2+\tfrac{\sigma^2}{2}\|w\|^2`.

    E has independent entries of mean 0 and standard deviation :math:`\sigma`, of any law.

    Raises
    ------
    ValueError : ``X`` is no matrix of floats, or ``std`` is no number of at least 0.
    """
    check_matrix(X=X)
    check_not_negative(std=std)
    return linear_loss(X, y, w) + 0.5 * std**2 * w.square().sum()


def input_noise_solution(X: Tensor, y: Tensor, std: float) -> Tensor:
    r"""Return the minimum of ``input_noise_loss``, ``[D]``: ridge with :math:`\alpha=N\sigma^2`.

    Raises
    ------
    ValueError : as ``input_noise_loss``, or y has another number of rows.
    """
    check_matrix(X=X)
    check_not_negative(std=std)
    return ridge(X, y, len(X) * std**2)


def dropout_loss(X: Tensor, y: Tensor, w: Tensor, p: float) -> Tensor:
    r"""Return the expectation of :math:`\tfrac{1}{2N}\|y-\tfrac{1}{1-p}(M\odot X)w\|^2` over dropout masks M.

    .. math:: \tfrac{1}{2N}\|y-Xw\|^2+\tfrac{1}{2N}\,\tfrac{p}{1-p}\sum_j(X^\top X)_{jj}\,w_j^2

    A ridge penalty in which each weight counts by the size of its feature. Where all features are of one size it is
    plain ridge; and however features are scaled, the best predictions under dropout stay.

    Raises
    ------
    ValueError : ``X`` is no matrix of floats, or ``p`` is no number from 0 to below 1.
    """
    sizes = _feature_sizes(X, p)
    return linear_loss(X, y, w) + 0.5 * (sizes * w.square()).sum() / len(X)


def dropout_solution(X: Tensor, y: Tensor, p: float) -> Tensor:
    r"""Return its minimum, ``[D]``: :math:`\big(X^\top X+\tfrac{p}{1-p}\,\text{diag}(X^\top X)\big)^{-1}X^\top y`.

    Raises
    ------
    ValueError : as ``dropout_loss``. Not where the matrix is singular, as with ``p=0`` and too few examples: then there
        is no one minimum, and rounding decides what comes back, unless torch refuses.
    """
    return torch.linalg.solve(X.mT @ X + torch.diag(_feature_sizes(X, p)), X.mT @ y)


def dropout_logistic_penalty(X: Tensor, w: Tensor, p: float) -> Tensor:
    r"""Return what dropout of X adds to the mean logistic loss, to second order in the noise.

    .. math:: \tfrac{1}{2N}\,\tfrac{p}{1-p}\sum_i\sigma(z_i)(1-\sigma(z_i))\sum_j x_{ij}^2w_j^2,\qquad z=Xw

    It is smallest where predictions are confident, which ridge never is: rare features may have large weights. The
    exact addition is :math:`\mathbb{E}\,A(\tilde z)-A(z)` with :math:`A(z)=\log(1+e^z)`, whatever the labels.

    Raises
    ------
    ValueError : as ``dropout_loss``.
    """
    _feature_sizes(X, p)
    slope = torch.sigmoid(X @ w)
    return 0.5 * p / (1 - p) * (slope * (1 - slope) * (X.square() @ w.square())).mean()


def _feature_sizes(X: Tensor, p: float) -> Tensor:
    r"""Return :math:`\tfrac{p}{1-p}\,\text{diag}(X^\top X)`, ``[D]``."""
    check_matrix(X=X)
    require("p", p, lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1")
    return p / (1 - p) * X.square().sum(0)


# --- Networks ---------------------------------------------------------------------------------------------------------


def input_noise_curvature(losses: Callable[[Tensor], Tensor], x: Tensor, std: float) -> Tensor:
    r"""Return :math:`\tfrac{\sigma^2}{2}\,\text{tr}\,\partial^2\ell_i/\partial x_i^2`, ``[N]``, of each example's loss.

    ``losses`` is ``x -> [N]``. The expected loss under normal noise is the loss plus this, up to :math:`O(\sigma^4)`.
    One product with the Hessian a number of the input.

    Raises
    ------
    ValueError : ``std`` is no number of at least 0.
    """
    check_not_negative(std=std)
    with torch.enable_grad(), twice():
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(losses(x).sum(), x, create_graph=True)
        columns = slope.flatten(1).unbind(1)
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for place, column in enumerate(columns):
            if column.requires_grad:
                (second,) = torch.autograd.grad(column.sum(), x, retain_graph=True, materialize_grads=True)
                trace += second.flatten(1)[:, place]
    return 0.5 * std**2 * trace


def input_noise_tikhonov(model: nn.Module, x: Tensor, std: float, curvature: Tensor | None = None) -> Tensor:
    r"""Return :math:`\tfrac{\sigma^2}{2}\,\text{tr}(J_i^\top B_iJ_i)`, ``[N]``, J being the Jacobian of the outputs.

    B, ``curvature`` ``[N, K, K]``, is the second derivative of the loss by the outputs: the identity for half the
    squared error (by default), ``softmax_curvature`` for the cross-entropy. It is ``input_noise_curvature`` without the
    second derivative of the network, whose factor is the residual: at a good fit it averages to nothing (Bishop 1995).

    Raises
    ------
    ValueError : ``std`` is no number of at least 0, or ``curvature`` is not ``[N, K, K]``.
    """
    check_not_negative(std=std)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = model(x)
        rows = [
            torch.autograd.grad(outputs[:, k].sum(), x, retain_graph=True)[0].flatten(1)
            for k in range(outputs.shape[1])
        ]
    J = torch.stack(rows, 1)  # [N, K, D]
    n, k = outputs.shape
    if curvature is not None and curvature.shape != (n, k, k):
        raise ValueError(f"curvature has the shape {list(curvature.shape)}: must be [{n}, {k}, {k}]")
    bent = J if curvature is None else curvature.detach() @ J
    return 0.5 * std**2 * (J * bent).sum((1, 2))


def softmax_curvature(logits: Tensor) -> Tensor:
    r"""Return :math:`\text{diag}(q)-qq^\top`, the cross-entropy's second derivative by the logits: ``[N, K, K]``."""
    q = F.softmax(logits, 1)
    return torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
