r"""Several answers into one: votes, ranks, means, and how much each member's voice should count.

=======================  ==================================================  =========================================
name                     what it does                                        source
=======================  ==================================================  =========================================
``votes``                counts the members that name each class
``plurality``            the class that most of them name
``borda``                points for the rank that each gives to a class      Borda 1781
``winner``               the best class, and what becomes of ties
``mean_probability``     the arithmetic mean of probabilities                Lakshminarayanan et al. 2016,
                                                                             arXiv:1612.01474
``geometric_mean``       the geometric one, made to sum to 1                 Wood et al. 2023, arXiv:2301.03962
``mean_logits``          the mean of logits                                  –
``accuracy_weights``     weights by accuracy on validation                   –
``fit_weights``          those of the least negative log-likelihood          Cover 1984, IEEE Trans. Inf. Theory 30
``greedy_selection``     members added one by one, some more than once       Caruana et al. 2004, ICML
=======================  ==================================================  =========================================

Answers of M members to N examples are logits ``[M, N, K]`` or named classes, int64 ``[M, N]``. The three means give
log-probabilities or logits ``[N, K]``: their softmax is what the members think together. After the softmax the mean of
logits *is* the geometric mean, for weights that sum to 1: what a member adds to all its logits cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.fusion.answers import Weights, check_labels, check_logits, check_named, exact, shares
from course_lib.lab.arguments import at_least, is_number, require

Fuse = Callable[[Tensor], Tensor]
"""Logits of members ``[M, N, K]`` -> log-probabilities or logits ``[N, K]``."""

# --- Votes ------------------------------------------------------------------------------------------------------------


def votes(named: Tensor, classes: int, weights: Weights = None) -> Tensor:
    """Return how many members name each class: int64 ``[M, N]`` to float64 ``[N, K]``; with weights, their sums.

    The weights are used as they are, and may be below 0 (a member that is worse than chance).

    Raises
    ------
    ValueError : named classes are out of range, or the weights are not M finite numbers.
    """
    check_named(named, classes)
    each = torch.ones(len(named), dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
    if each.shape != (len(named),) or not each.isfinite().all():
        raise ValueError(f"weights={each.tolist()}: must be {len(named)} finite numbers, one a member")
    return (F.one_hot(named, classes) * each.to(named.device)[:, None, None]).sum(0)


def plurality(named: Tensor, classes: int, weights: Weights = None) -> Tensor:
    """Return the class with most votes, the first of equals: int64 ``[M, N]`` to ``[N]``; errors as ``votes``."""
    return winner(votes(named, classes, weights))


def borda(logits: Tensor, weights: Weights = None) -> Tensor:
    r"""Return the points of each class, float64 ``[N, K]``: a member gives one for each class that it ranks below.

    .. math:: \sum_m w_m\Big(\#\{j: z_{mj}<z_{mk}\}+\tfrac12\,\#\{j\ne k: z_{mj}=z_{mk}\}\Big)

    Only the order of a member's logits counts, so members need not be calibrated alike. The weights sum to 1; equal
    ones make it the mean.

    Raises
    ------
    ValueError : logits are not ``[M, N, K]``, or the weights do not fit.
    """
    z = exact(logits)
    total = torch.zeros_like(z[0])
    for each, weight in zip(z, shares(weights, z), strict=True):  # one by one: all at once would hold M N K K numbers
        beats = (each[:, :, None] > each[:, None, :]).to(z.dtype)
        # those below and half of the equals, as everything is below, equal or above
        total += weight * (beats.sum(2) - beats.sum(1) + z.shape[2] - 1) / 2
    return total


def winner(scores: Tensor, tie_break: Tensor | None = None) -> Tensor:
    """Return the class with the highest score, ``[N, K]`` to int64 ``[N]``.

    Among equals the one with the highest ``tie_break`` ``[N, K]`` (mean probabilities, say), and at last the first: the
    same answer on every machine.

    Raises
    ------
    ValueError : the shapes are not alike.
    """
    if scores.ndim != 2 or (tie_break is not None and tie_break.shape != scores.shape):
        found = None if tie_break is None else list(tie_break.shape)
        raise ValueError(f"scores={list(scores.shape)}, tie_break={found}: must both be [N, K]")
    best = scores == scores.max(1, keepdim=True).values
    second = torch.zeros_like(scores) if tie_break is None else tie_break.to(scores)
    second = second.masked_fill(~best, -torch.inf)
    first = best & (second == second.max(1, keepdim=True).values)
    return first.to(torch.int8).argmax(1)  # of ones and zeros: the first one


def tied(scores: Tensor) -> Tensor:
    """Return where several classes share the highest score: ``[N, K]`` to bool ``[N]``."""
    return (scores == scores.max(1, keepdim=True).values).sum(1) > 1


# --- Means ------------------------------------------------------------------------------------------------------------


def mean_probability(logits: Tensor, weights: Weights = None) -> Tensor:
    r"""Return :math:`\log\sum_m w_m\,\mathrm{softmax}(z_m)`, ``[M, N, K]`` to ``[N, K]``, the weights made to sum to 1.

    A class is possible if one member finds it so. Gradients pass through.

    Raises
    ------
    ValueError : logits are not ``[M, N, K]``, or the weights do not fit.
    """
    check_logits(logits)
    w = shares(weights, logits)
    return (logits.log_softmax(2) + w.log()[:, None, None]).logsumexp(0)


def geometric_mean(logits: Tensor, weights: Weights = None) -> Tensor:
    r"""Return :math:`\log\prod_m q_m^{w_m}` less the logarithm of its sum over classes, ``[M, N, K]`` to ``[N, K]``.

    A member that finds a class impossible has a veto. Errors as ``mean_probability``.
    """
    check_logits(logits)
    w = shares(weights, logits)
    return torch.einsum("m,mnk->nk", w, logits.log_softmax(2)).log_softmax(1)


def mean_logits(logits: Tensor, weights: Weights = None) -> Tensor:
    r"""Return :math:`\sum_m w_mz_m`, ``[M, N, K]`` to ``[N, K]``; errors as ``mean_probability``."""
    check_logits(logits)
    return torch.einsum("m,mnk->nk", shares(weights, logits), logits)


# --- Weights ----------------------------------------------------------------------------------------------------------


def accuracy_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each member's accuracy over the sum of all, float64 ``[M]``: nearly equal where members are nearly so.

    Raises
    ------
    ValueError : logits and labels do not fit, or no member is ever right.
    """
    z = exact(logits)
    check_labels(labels, z.shape[1], z.shape[2])
    right = (z.argmax(2) == labels).double().mean(1)
    require("logits", right.tolist(), any, "of members of which at least one is right once; these are accuracies")
    return right / right.sum()


def fit_weights(logits: Tensor, labels: Tensor, *, tolerance: float = 1e-6, steps: int = 20_000) -> Tensor:
    r"""Return the weights, float64 ``[M]``, for which ``mean_probability`` has the least negative log-likelihood.

    The loss :math:`L(w)=-\tfrac1N\sum_n\log\sum_mw_mq_{mn}`, with :math:`q_{mn}` what member m gives to the label, is
    convex in w. Each step multiplies each weight by its slope

    .. math:: g_m=\tfrac1N\sum_n\frac{q_{mn}}{\sum_lw_lq_{ln}},

    which keeps their sum at 1 (:math:`\sum_mw_mg_m=1`), never raises the loss, and is the EM algorithm for the shares
    of a mixture. As :math:`L(w)-L^*\le\log\max_mg_m`, it ends when that is below ``tolerance``, or after ``steps``.

    Raises
    ------
    ValueError : logits and labels do not fit, ``tolerance`` is no number above 0, or ``steps`` is below 1.
    """
    at_least(1, steps=steps)
    require("tolerance", tolerance, lambda t: is_number(t) and t > 0, "a number above 0")
    z = exact(logits)
    check_labels(labels, z.shape[1], z.shape[2])
    log_q = z.log_softmax(2)[:, torch.arange(len(labels), device=z.device), labels]  # [M, N]
    q = (log_q - log_q.max(0).values).exp()  # each example's scale cancels in the slope
    w = shares(None, q)
    for _ in range(steps):
        slope = (q / (w @ q)).mean(1)
        if slope.max().log() < tolerance:
            break
        w = w * slope
    return w / w.sum()


Score = Callable[[Tensor, Tensor], float]
"""``(log-probabilities [N, K], labels [N]) -> number``, the larger the better."""


def log_likelihood(log_q: Tensor, labels: Tensor) -> float:
    """Return the mean logarithm of what is given to the label; ``log_q`` may be logits as well."""
    return -F.cross_entropy(log_q, labels).item()


def accuracy(log_q: Tensor, labels: Tensor) -> float:
    """Return the share of labels that are named."""
    return (log_q.argmax(1) == labels).double().mean().item()


class Selection(NamedTuple):
    """``weights`` float64 ``[M]``, the members in the ``order`` in which they were added, the ``score`` reached."""

    weights: Tensor
    order: tuple[int, ...]
    score: float


def greedy_selection(logits: Tensor, labels: Tensor, *, rounds: int, score: Score = log_likelihood) -> Selection:
    """Add in each of ``rounds`` the member that makes the mean probability best; one may come in more than once.

    How often it is in is its weight. What remains is the stretch of rounds with the best score, the first of equals; so
    on the data chosen on, it is never worse than the best member. The paper also starts from several members at once
    and averages over random subsets of the library, which guard against choosing by luck.

    Raises
    ------
    ValueError : ``rounds`` is below 1, or logits and labels do not fit.
    """
    at_least(1, rounds=rounds)
    q = exact(logits).softmax(2)
    check_labels(labels, q.shape[1], q.shape[2])
    total, order, reached = torch.zeros_like(q[0]), [], []
    for count in range(1, rounds + 1):
        scores = [score(((total + each) / count).log(), labels) for each in q]
        best = max(range(len(q)), key=scores.__getitem__)
        total = total + q[best]
        order.append(best)
        reached.append(scores[best])
    length = max(range(rounds), key=reached.__getitem__) + 1
    counts = torch.bincount(torch.tensor(order[:length]), minlength=len(q)).double()
    return Selection((counts / length).to(q.device), tuple(order[:length]), reached[length - 1])
