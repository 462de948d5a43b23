r"""Ridge regression in the eigenbasis: what a penalty does to each direction of the data.

=========================  =============================================================  =============================
name                       what it gives                                                  source
=========================  =============================================================  =============================
``ridge``                  the solution for one or several targets                        Hoerl & Kennard 1970,
                                                                                          Technometrics 12(1)
``shrinkage``              what is left of each direction                                 Hastie, Tibshirani & Friedman
``degrees_of_freedom``     how many parameters it amounts to                              2009, The Elements of
                                                                                          Statistical Learning, 3.4.1
``ridge_bias_variance``    its exact error where the truth is known
=========================  =============================================================  =============================

The loss is :math:`\|y-Xw\|^2+\alpha\|w\|^2`, a sum over examples as in scikit-learn's ``Ridge``; there is no intercept
(centre X and y first). With :math:`X^\top X=V\Lambda V^\top` the solution has along each eigenvector the part
:math:`\lambda/(\lambda+\alpha)` of the least-squares solution: directions in which the data vary much stay, the others
fade. ``weight_decay`` of a mean loss is :math:`\alpha/N` where the mean is of half squares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from course_lib.regularization.drawing import check_matrix, check_not_negative


def ridge(X: Tensor, y: Tensor, alpha: float) -> Tensor:
    r"""Return :math:`(X^\top X+\alpha I)^{-1}X^\top y`: ``[D]`` for y ``[N]``, ``[D, K]`` for ``[N, K]``.

    By the singular values of X, which loses half as many digits as :math:`X^\top X` would. With :math:`\alpha=0` it is
    the shortest of the least-squares solutions.

    Raises
    ------
    ValueError : ``X`` is no matrix of floats, y has another number of rows, or ``alpha`` is no number of at least 0.
    """
    _check(X, alpha)
    if y.ndim not in (1, 2) or len(y) != len(X):
        raise ValueError(f"y has the shape {list(y.shape)}: must be [{len(X)}] or [{len(X)}, K]")
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    there = s > _resolution(X, s)
    gain = torch.where(there, s / (s.square() + alpha).where(there, torch.ones_like(s)), torch.zeros_like(s))
    return Vh.mT @ (gain.view(-1, *[1] * (y.ndim - 1)) * (U.mT @ y))


def eigenvalues(X: Tensor) -> Tensor:
    r"""Return the eigenvalues of :math:`X^\top X`, falling, ``[D]``."""
    check_matrix(X=X)
    squares = torch.linalg.svdvals(X).square()
    return torch.cat([squares, squares.new_zeros(X.shape[1] - len(squares))])


def shrinkage(X: Tensor, alpha: float) -> Tensor:
    r"""Return :math:`\lambda_j/(\lambda_j+\alpha)` of each eigenvector of :math:`X^\top X`, falling, ``[D]``.

    A direction without data has 0, whatever ``alpha``.

    Raises
    ------
    ValueError : ``X`` is no matrix of floats, or ``alpha`` is no number of at least 0.
    """
    _check(X, alpha)
    values = eigenvalues(X)
    there = values.sqrt() > _resolution(X, values.sqrt())
    return torch.where(there, values / (values + alpha).where(there, torch.ones_like(values)), torch.zeros_like(values))


def degrees_of_freedom(X: Tensor, alpha: float) -> float:
    r"""Return :math:`\sum_j\lambda_j/(\lambda_j+\alpha)`, the trace of the matrix that makes predictions of y.

    Raises
    ------
    ValueError : as ``shrinkage``.
    """
    return shrinkage(X, alpha).sum().item()


class RidgeError(NamedTuple):
    """Mean squared error of ridge on its own inputs against the truth, in the units of y squared."""

    bias_sq: float
    variance: float

    @property
    def total(self) -> float:
        """Bias and variance together; the noise of a new y would come on top."""
        return self.bias_sq + self.variance


def ridge_bias_variance(X: Tensor, truth: Tensor, noise: float, alpha: float) -> RidgeError:
    r"""Return bias and variance of :math:`X\hat w` for :math:`y=Xw+\varepsilon`, w the ``truth`` ``[D]``.

    .. math:: \text{bias}^2=\frac1N\sum_j\lambda_j\Big(\frac{\alpha}{\lambda_j+\alpha}\Big)^2(v_j^\top w)^2,\qquad
       \text{variance}=\frac{\sigma^2}{N}\sum_j\Big(\frac{\lambda_j}{\lambda_j+\alpha}\Big)^2

    with independent noise of standard deviation :math:`\sigma` (``noise``).

    Raises
    ------
    ValueError : ``X`` is no matrix, ``truth`` no vector of D, or ``noise`` or ``alpha`` no number of at least 0.
    """
    _check(X, alpha)
    check_not_negative(noise=noise)
    if truth.shape != X.shape[1:]:
        raise ValueError(f"truth has the shape {list(truth.shape)}: must be [{X.shape[1]}]")
    _, s, Vh = torch.linalg.svd(X, full_matrices=False)
    left = shrinkage(X, alpha)[: len(s)]
    bias = (s.square() * (1 - left).square() * (Vh @ truth).square()).sum() / len(X)
    return RidgeError(bias.item(), noise**2 * left.square().sum().item() / len(X))


def _resolution(X: Tensor, singular: Tensor) -> float:
    """Singular values below this are rounding, by the rule of ``torch.linalg.lstsq`` and ``numpy``."""
    return max(X.shape) * torch.finfo(X.dtype).eps * (singular.max().item() if len(singular) else 0.0)


def _check(X: Tensor, alpha: float) -> None:
    check_matrix(X=X)
    check_not_negative(alpha=alpha)
