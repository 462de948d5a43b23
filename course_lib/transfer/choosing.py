r"""Which trained network to take, and how alike two of them are, without training anything.

==================  ====================================================  ============================================
name                what it measures                                      source
==================  ====================================================  ============================================
``logme``           how well a linear model explains the labels, all      You et al. 2021, arXiv:2102.11005
                    weights considered
``leep``            how well the old classes predict the new ones         Nguyen et al. 2020, arXiv:2002.12462
``h_score``         how far apart classes lie, against the spread         Bao et al. 2019, ICIP; arXiv:2212.10082
``linear_cka``      how alike two sets of features are                    Kornblith et al. 2019, arXiv:1905.00414
``cka_matrix``      the same, layer by layer of two networks
==================  ====================================================  ============================================

Larger is better in the first three. All compute in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import require
from course_lib.lab.data import Split
from course_lib.merging.states import doubled
from course_lib.transfer.tuning import features_by_layer


def log_evidence(x: Tensor, y: Tensor, alpha: float, beta: float) -> float:
    r"""Return :math:`\log p(y\mid X,\alpha,\beta)` of :math:`y=Xw+\epsilon`, over all w.

    With :math:`w\sim N(0,\alpha^{-1}I)` and :math:`\epsilon\sim N(0,\beta^{-1})`, for ``[N, D]`` and ``[N]``:

    .. math:: \tfrac N2\log\beta+\tfrac D2\log\alpha-\tfrac N2\log2\pi-\tfrac\beta2\|Xm-y\|^2-\tfrac\alpha2\|m\|^2
        -\tfrac12\log|A|,\quad A=\alpha I+\beta X^\top X,\;m=\beta A^{-1}X^\top y
    """
    x, y = doubled(x), doubled(y)
    count, size = x.shape
    a = alpha * torch.eye(size, dtype=x.dtype, device=x.device) + beta * x.mT @ x
    m = beta * torch.linalg.solve(a, x.mT @ y)
    found = count / 2 * math.log(beta) + size / 2 * math.log(alpha) - count / 2 * math.log(2 * math.pi)
    misfit = beta / 2 * (x @ m - y).square().sum() + alpha / 2 * m.square().sum()
    return found - misfit.item() - torch.linalg.slogdet(a).logabsdet.item() / 2


def logme(x: Tensor, labels: Tensor, *, steps: int = 500, tolerance: float = 1e-8) -> float:
    r"""Return the mean over the classes of the largest log evidence of a linear model for "is it this class", over N.

    For each class the ``log_evidence`` of its 0 and 1 is maximised over :math:`\alpha` and :math:`\beta` by MacKay's
    fixed point, with :math:`\gamma=\sum_i\frac{\beta s_i^2}{\alpha+\beta s_i^2}` and the singular values s of X:

    .. math:: \alpha\leftarrow\gamma/\|m\|^2,\qquad\beta\leftarrow(N-\gamma)/\|Xm-y\|^2

    Parameters
    ----------
    x : features ``[N, D]``, used as they are: neither centred nor scaled.
    steps, tolerance : it ends when :math:`\alpha/\beta` moves by less than this share, or after so many rounds.

    Raises
    ------
    ValueError : the features are no matrix, or the labels not int64 ``[N]``.
    """
    _check_labelled(x, labels)
    x = doubled(x.detach())
    (count, size), classes = x.shape, int(labels.max()) + 1
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    squares, targets = s.square(), F.one_hot(labels.to(x.device), classes).to(x.dtype)
    inside = (u.mT @ targets).square()  # [rank, classes]: y along each left singular vector, squared
    outside = (targets.square().sum(0) - inside.sum(0)).clamp_min(0)
    total = 0.0
    for k in range(classes):
        if not targets[:, k].any():
            continue
        alpha, beta = 1.0, 1.0
        for _ in range(steps):
            t = alpha / beta
            gamma = (squares / (squares + t)).sum().item()
            weights = (squares * inside[:, k] / (squares + t).square()).sum().item()
            misfit = (inside[:, k] * (t / (squares + t)).square()).sum().item() + outside[k].item()
            # features that explain y wholly, or not at all: the optimum lies at infinity
            alpha, beta = gamma / max(weights, 1e-12), max(count - gamma, 1e-12) / max(misfit, 1e-12)
            if abs(alpha / beta - t) <= tolerance * t:
                break
        total += _evidence(alpha, beta, squares, inside[:, k], outside[k].item(), count, size) / count
    return total / int((targets.sum(0) > 0).sum())


def _evidence(
    alpha: float, beta: float, squares: Tensor, inside: Tensor, outside: float, count: int, size: int
) -> float:
    """``log_evidence`` by singular values."""
    t = alpha / beta
    weights = (squares * inside / (squares + t).square()).sum().item()
    misfit = (inside * (t / (squares + t)).square()).sum().item() + outside
    logs = (alpha + beta * squares).log().sum().item() + (size - len(squares)) * math.log(alpha)
    found = count / 2 * math.log(beta) + size / 2 * math.log(alpha) - count / 2 * math.log(2 * math.pi)
    return found - beta / 2 * misfit - alpha / 2 * weights - logs / 2


def leep(probabilities: Tensor, labels: Tensor) -> float:
    r"""Return the mean of :math:`\log\sum_z\hat P(y_i\mid z)\,\theta(x_i)_z`.

    :math:`\theta(x)_z` is what the old network thinks of its own classes z, ``[N, Z]``; and
    :math:`\hat P(y,z)=\tfrac1N\sum_{i:y_i=y}\theta(x_i)_z` what these say of the new labels.

    Raises
    ------
    ValueError : the probabilities are no matrix of rows that sum to 1, or the labels not int64 ``[N]``.
    """
    _check_labelled(probabilities, labels)
    theta = doubled(probabilities)
    if (theta.sum(1) - 1).abs().max() > 1e-4 or theta.min() < 0:
        raise ValueError(
            f"probabilities have rows that sum to {theta.sum(1).min():g} to {theta.sum(1).max():g}: must sum to 1, as "
            "logits.softmax(1) does"
        )
    labels = labels.to(theta.device)
    joint = F.one_hot(labels).to(theta.dtype).mT @ theta / len(theta)  # [classes, Z]
    given = joint / joint.sum(0).clamp_min(torch.finfo(theta.dtype).tiny)
    return (theta * given[labels]).sum(1).log().mean().item()


def h_score(x: Tensor, labels: Tensor) -> float:
    r"""Return :math:`\text{tr}\big(\text{cov}(x)^{+}\,\text{cov}(\mathbb E[x\mid y])\big)` of features ``[N, D]``.

    Raises
    ------
    ValueError : the features are no matrix, or the labels not int64 ``[N]``.
    """
    _check_labelled(x, labels)
    x, own = doubled(x), F.one_hot(labels.to(x.device))
    x = x - x.mean(0)
    counts = own.sum(0).clamp_min(1).to(x.dtype)
    means = (own.to(x.dtype).mT @ x / counts[:, None])[labels.to(x.device)]
    return torch.trace(torch.linalg.pinv(x.mT @ x, hermitian=True) @ (means.mT @ means)).item()


def linear_cka(x: Tensor, y: Tensor) -> float:
    r"""Return :math:`\|Y^\top X\|_F^2/\big(\|X^\top X\|_F\,\|Y^\top Y\|_F\big)` of centred features.

    x is ``[N, D]``, y ``[N, E]``. 1 where one is the other turned and scaled as a whole, 0 where they have nothing
    linear in common. With few examples and many features it is large for anything.

    Raises
    ------
    ValueError : they are not features of the same N > 1 examples, or one is constant.
    """
    for name, part in (("x", x), ("y", y)):
        require(name, list(part.shape), lambda s: len(s) == 2 and s[0] == len(x) > 1, "[N, D] of the same N > 1")
    x, y = (doubled(part) - doubled(part).mean(0) for part in (x, y))
    below = (x.mT @ x).norm() * (y.mT @ y).norm()
    require("x", below.item(), lambda size: size > 0, "features that are not all equal, as those of y")
    return ((y.mT @ x).square().sum() / below).item()


def cka_matrix(
    model: nn.Module,
    other: nn.Module,
    split: Split,
    *,
    layers: Sequence[str] | None = None,
    other_layers: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return ``linear_cka`` between each layer of one network (rows) and each of another, or of the same (columns).

    Layers are all that ``layer_names`` lists, unless named; features are averaged over places or tokens.

    Raises
    ------
    ValueError : there is no such layer, or its features do not vary.
    """
    rows, columns = features_by_layer(model, split, layers), features_by_layer(other, split, other_layers)
    found = [[linear_cka(a, b.to(a.device)) for b in columns.values()] for a in rows.values()]
    return pd.DataFrame(found, index=list(rows), columns=list(columns))


def _check_labelled(x: Tensor, labels: Tensor) -> None:
    require("x", list(x.shape), lambda shape: len(shape) == 2 and shape[0] > 0, "a matrix [N, D], N > 0")
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1]:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: must be int64 [{len(x)}]")
