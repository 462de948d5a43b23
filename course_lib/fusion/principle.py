r"""Why several answers together are better than one, how much of that is left, and what it does to calibration.

===========================  ==============================================  ===========================================
name                         what it gives                                   source
===========================  ==============================================  ===========================================
``squared_ambiguity``        squared error: members' less diversity          Krogh & Vedelsby 1994, NIPS
``geometric_ambiguity``      the same of the cross-entropy                   Heskes 1998, Neural Computation 10(6);
                                                                             Wood et al. 2023, arXiv:2301.03962
``arithmetic_ambiguity``     the same of the mean of probabilities           –
``bias_variance_diversity``  over training sets as well                      Wood et al. 2023
``variance_of_mean``         what averaging leaves of the variance           –
``majority_accuracy``        independent voters                              Condorcet 1785
``disagreement``, …          members two by two                              Kuncheva & Whitaker 2003, Machine
                                                                             Learning 51
``TWO_HALVES``               calibrated members, an uncalibrated mean        Ranjan & Gneiting 2010, JRSS B 72;
                                                                             Rahaman & Thiery 2020, arXiv:2007.08792
===========================  ==============================================  ===========================================

An *ambiguity* decomposition is an identity, for any members and labels: what the ensemble loses is what its members
lose on average, less how far they are from it. So it is never worse than its average member; than its best one it may
be.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from course_lib.fusion.answers import Weights, check_labels, exact, shares
from course_lib.fusion.voting import geometric_mean, mean_probability
from course_lib.lab.arguments import at_least, is_number, require

# --- Ambiguity --------------------------------------------------------------------------------------------------------


class Ambiguity(NamedTuple):
    """Means over the examples: the loss of the ``ensemble``, that of the ``members`` on average, the ``diversity``."""

    ensemble: float
    members: float
    diversity: float


def squared_ambiguity(predictions: Tensor, targets: Tensor, weights: Weights = None) -> Ambiguity:
    r"""Take apart :math:`(\bar f-y)^2=\sum_mw_m(f_m-y)^2-\sum_mw_m(f_m-\bar f)^2`, with :math:`\bar f=\sum_mw_mf_m`.

    Parameters
    ----------
    predictions : ``[M, N]``, or ``[M, N, K]``, whose squares are summed over K (probabilities: the Brier score)
    targets : ``[N]`` or ``[N, K]``

    Raises
    ------
    ValueError : the shapes or weights do not fit.
    """
    f, y = predictions.detach().double(), targets.detach().double()
    if f.ndim < 2 or not f.numel() or f.shape[1:] != y.shape:
        raise ValueError(f"targets={list(y.shape)}: must be {list(f.shape[1:])}, as the predictions {list(f.shape)}")
    w = shares(weights, f)
    mean = torch.tensordot(w, f, 1)

    def over_examples(squares: Tensor) -> Tensor:  # [..., N(, K)] -> [...]
        return squares.sum(-1).mean(-1) if y.ndim == 2 else squares.mean(-1)

    return Ambiguity(
        over_examples((mean - y).square()).item(),
        (w @ over_examples((f - y).square())).item(),
        (w @ over_examples((f - mean).square())).item(),
    )


def geometric_ambiguity(logits: Tensor, labels: Tensor, weights: Weights = None) -> Ambiguity:
    r"""Take apart the negative log-likelihood of the geometric mean :math:`\bar q\propto\prod_mq_m^{w_m}`:

    .. math:: -\log\bar q_y=-\sum_mw_m\log q_{m,y}-\sum_mw_m\,\mathrm{KL}(\bar q\,\|\,q_m)

    The diversity does not depend on the label: it is :math:`-\log\sum_k\prod_mq_{mk}^{w_m}`.

    Raises
    ------
    ValueError : logits ``[M, N, K]``, labels or weights do not fit.
    """
    z, w = _checked(logits, labels, weights)
    log_q, log_mean = z.log_softmax(2), geometric_mean(z, w)
    apart = (log_mean.exp() * (log_mean - log_q)).nan_to_num().sum(2).mean(1)
    return Ambiguity(_loss(log_mean, labels).item(), (w @ _losses(log_q, labels)).item(), (w @ apart).item())


def arithmetic_ambiguity(logits: Tensor, labels: Tensor, weights: Weights = None) -> Ambiguity:
    r"""Take apart the negative log-likelihood of the mean of probabilities :math:`\bar q=\sum_mw_mq_m`:

    .. math:: -\log\bar q_y=-\sum_mw_m\log q_{m,y}-\Big(\log\bar q_y-\sum_mw_m\log q_{m,y}\Big)

    The diversity is the gap in Jensen's inequality, at least 0, and counts only what members give to the label.

    Raises
    ------
    ValueError : logits ``[M, N, K]``, labels or weights do not fit.
    """
    z, w = _checked(logits, labels, weights)
    log_q, log_mean = z.log_softmax(2), mean_probability(z, w)
    rows = torch.arange(len(labels), device=labels.device)
    gap = log_mean[rows, labels] - w @ log_q[:, rows, labels]
    return Ambiguity(_loss(log_mean, labels).item(), (w @ _losses(log_q, labels)).item(), gap.mean().item())


class ThreeParts(NamedTuple):
    """The ``ensemble``'s mean squared error is ``bias + variance - diversity``, the first two means over members."""

    ensemble: float
    bias: float
    variance: float
    diversity: float


def bias_variance_diversity(predictions: Tensor, targets: Tensor) -> ThreeParts:
    r"""Take apart the squared error of the mean of M members, over R training sets r:

    .. math:: \overline{(\bar f_r-y)^2}=\overline{(\bar f_{m}-y)^2}+\overline{(f_{rm}-\bar f_m)^2}
        -\overline{(f_{rm}-\bar f_r)^2}

    with :math:`\bar f_r` the mean over members, :math:`\bar f_m` that over training sets, bars over all that is left.
    An identity for the R at hand.

    Parameters
    ----------
    predictions : ``[R, M, N]``, or ``[R, M, N, K]``, whose squares are summed over K
    targets : ``[N]`` or ``[N, K]``

    Raises
    ------
    ValueError : the shapes do not fit.
    """
    f, y = predictions.detach().double(), targets.detach().double()
    if f.ndim < 3 or not f.numel() or f.shape[2:] != y.shape:
        raise ValueError(f"targets={list(y.shape)}: must be {list(f.shape[2:])}, as the predictions {list(f.shape)}")
    outputs = y[0].numel()
    ensemble, member = f.mean(1, keepdim=True), f.mean(0, keepdim=True)
    gaps = (ensemble - y, member - y, f - member, f - ensemble)
    return ThreeParts(*(outputs * gap.square().mean().item() for gap in gaps))


def variance_of_mean(variance: float, correlation: float, members: int) -> float:
    r"""Return :math:`\rho\sigma^2+\tfrac{1-\rho}M\sigma^2`, the variance of the mean of M errors so correlated.

    Raises
    ------
    ValueError : ``variance`` is below 0, ``members`` below 1, or ``correlation`` not from -1/(M-1) to 1.
    """
    at_least(1, members=members)
    require("variance", variance, lambda v: is_number(v) and v >= 0, "a number of at least 0")
    least = -1 / (members - 1) if members > 1 else -1.0
    require("correlation", correlation, lambda r: is_number(r) and least <= r <= 1, f"a number from {least:g} to 1")
    return correlation * variance + (1 - correlation) / members * variance


def majority_accuracy(accuracy: float, members: int) -> float:
    r"""Return how often most of M independent voters are right, each being so with probability p; ties count half.

    .. math:: \sum_{k>M/2}\binom Mkp^k(1-p)^{M-k}+\tfrac12\,[M\text{ even}]\,\binom M{M/2}\big(p(1-p)\big)^{M/2}

    Raises
    ------
    ValueError : ``accuracy`` is not from 0 to 1, or ``members`` below 1.
    """
    at_least(1, members=members)
    require("accuracy", accuracy, lambda p: is_number(p) and 0 <= p <= 1, "a number from 0 to 1")
    chances = [math.comb(members, k) * accuracy**k * (1 - accuracy) ** (members - k) for k in range(members + 1)]
    return math.fsum(c * ((2 * k > members) + 0.5 * (2 * k == members)) for k, c in enumerate(chances))


# --- Two by two -------------------------------------------------------------------------------------------------------


def disagreement(named: Tensor) -> Tensor:
    """Return the share of examples that two members name differently: ``[M, N]`` to float64 ``[M, M]``.

    Of classes, or of bool ``right``, which is what Kuncheva and Whitaker take: two can be wrong in different ways.
    """
    _check_table("named", named)
    return (named[:, None] != named[None]).double().mean(2)


def double_fault(right: Tensor) -> Tensor:
    """Return the share of examples on which both are wrong: bool ``[M, N]`` to float64 ``[M, M]``."""
    return _counts(right)[3]


def q_statistic(right: Tensor) -> Tensor:
    r"""Return Yule's Q of being right, bool ``[M, N]`` to float64 ``[M, M]``.

    .. math:: Q=\frac{n_{11}n_{00}-n_{01}n_{10}}{n_{11}n_{00}+n_{01}n_{10}}

    0 for independent members, -1 where they are never wrong together, NaN where it is 0 over 0.
    """
    both, first, second, none = _counts(right)
    return (both * none - first * second) / (both * none + first * second)


def error_correlation(right: Tensor) -> Tensor:
    """Return the correlation of being right, bool ``[M, N]`` to float64 ``[M, M]``; NaN where a member always is."""
    both, first, second, none = _counts(right)
    spread = ((both + first) * (second + none) * (both + second) * (first + none)).sqrt()
    return (both * none - first * second) / spread


def pair_mean(table: Tensor) -> float:
    """Return the mean of a table ``[M, M]`` over pairs of different members.

    Raises
    ------
    ValueError : it is no such table, or of one member.
    """
    require("table", list(table.shape), lambda s: len(s) == 2 and s[0] == s[1] >= 2, "[M, M] with M of at least 2")
    return table[~torch.eye(len(table), dtype=torch.bool, device=table.device)].double().mean().item()


def _counts(right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shares of examples on which both are right, the first alone, the second alone, none: each ``[M, M]``."""
    _check_table("right", right)
    require("right", right.dtype, lambda dtype: dtype == torch.bool, "bool [M, N]")
    a, b = right.double(), (~right).double()
    count = right.shape[1]
    return a @ a.T / count, a @ b.T / count, b @ a.T / count, b @ b.T / count


def _check_table(name: str, table: Tensor) -> None:
    require(name, list(table.shape), lambda shape: len(shape) == 2 and min(shape) > 0, "of shape [M, N]")


# --- Calibrated members, an uncalibrated mean -------------------------------------------------------------------------


class World(NamedTuple):
    """Finitely many states: how often each comes ``[S]``, ``truth`` P(y = 1) in it, what ``members`` say ``[M, S]``."""

    chance: Tensor
    truth: Tensor
    members: Tensor


def _two_halves() -> World:
    truth = torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=torch.float64)
    first = torch.tensor([0.25, 0.25, 0.75, 0.75], dtype=torch.float64)
    second = torch.tensor([0.25, 0.75, 0.25, 0.75], dtype=torch.float64)
    return World(torch.full((4,), 0.25, dtype=torch.float64), truth, torch.stack([first, second]))


TWO_HALVES = _two_halves()
"""Two fair bits, y = 1 with probability (a + b) / 2. One member sees a, the other b, and each says the truth about it.

Each is calibrated: where it says 0.75, y is 1 three times out of four. Their mean says 0.25, 0.5 or 0.75, and is right
only in the middle: where it says 0.75, y is always 1. It is not sure enough, for what the one knows and the other does
not is diluted and not added. No temperature of a member mends that, one of the mean does: 0 and 1 are the limit T = 0.
"""


def calibration_gap(chance: Tensor, truth: Tensor, forecast: Tensor) -> float:
    r"""Return :math:`\sum_sP(s)\,|\,\mathrm E[y\mid f]-f\,|`, the calibration error in a ``World``, without bins.

    Parameters
    ----------
    chance : P(s) ``[S]``
    truth : P(y = 1 | s) ``[S]``
    forecast : what is said in each state ``[S]``

    Raises
    ------
    ValueError : the shapes differ, or the chances do not sum to 1.
    """
    p, t, f = chance.double(), truth.double(), forecast.double()
    if p.ndim != 1 or p.shape != t.shape or p.shape != f.shape or not math.isclose(float(p.sum()), 1, abs_tol=1e-9):
        found = f"{list(p.shape)} (sum {float(p.sum()):g}), {list(t.shape)}, {list(f.shape)}"
        raise ValueError(f"chance, truth, forecast={found}: must be alike, [S], and the chances sum to 1")
    values, group = f.unique(return_inverse=True)
    mass = torch.zeros_like(values).scatter_add(0, group, p)
    happened = torch.zeros_like(values).scatter_add(0, group, p * t)
    return (happened - mass * values).abs().sum().item()


def _checked(logits: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    z = exact(logits)
    check_labels(labels, z.shape[1], z.shape[2])
    return z, shares(weights, z)


def _loss(log_q: Tensor, labels: Tensor) -> Tensor:
    return _losses(log_q[None], labels)[0]


def _losses(log_q: Tensor, labels: Tensor) -> Tensor:
    """The mean negative log-likelihood of each member, ``[M, N, K]`` to ``[M]``."""
    return -log_q[:, torch.arange(len(labels), device=labels.device), labels].mean(1)
