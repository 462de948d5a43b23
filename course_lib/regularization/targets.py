r"""Objectives that ask for something softer than the given label.

=============================  ========================================================  ===============================
name                           what it asks for                                          source
=============================  ========================================================  ===============================
``label_smoothing``            the label, and a little of every class                    Szegedy et al. 2015,
                                                                                         arXiv:1512.00567
``confidence_penalty``         the label, without being sure                             Pereyra et al. 2017,
                                                                                         arXiv:1701.06548
``soft_bootstrap``             the label, and what the network says anyway               Reed et al. 2014,
``hard_bootstrap``             the label, and the class that the network names           arXiv:1412.6596
``generalized_cross_entropy``  the label, giving up on the hopeless                      Zhang & Sabuncu 2018,
                                                                                         arXiv:1805.07836
``symmetric_cross_entropy``    the label, and the prediction in the label's place        Wang et al. 2019,
                                                                                         arXiv:1908.06112
``with_wrong_labels``          a data set of which a share of labels is wrong
=============================  ========================================================  ===============================

All but the confidence penalty, which wraps another, are objectives by themselves: the innermost of a chain. Labels
``y`` are int64 ``[N]`` or probabilities ``[N, K]``, as mixup makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import is_number, require
from course_lib.lab.data import Dataset
from course_lib.lab.training import Inputs, Objective, cross_entropy
from course_lib.preprocessing.mixing import soft_labels
from course_lib.preprocessing.wrong_labels import flip_symmetric
from course_lib.regularization.drawing import check_chance, check_not_negative
from course_lib.regularization.passes import Seen


def against(targets: Tensor, logits: Tensor) -> Tensor:
    r"""Return the mean of :math:`-\sum_k t_{ik}\log q_{ik}`, q being the softmax of the logits; both ``[N, K]``."""
    return -(targets * F.log_softmax(logits, 1)).sum(1).mean()


def entropy(logits: Tensor) -> Tensor:
    r"""Return :math:`-\sum_k q_k\log q_k` of each example, in nats: ``[N, K] -> [N]``."""
    log_q = F.log_softmax(logits, 1)
    return -(log_q.exp() * log_q).sum(1)


def _asked(y: Tensor, logits: Tensor) -> Tensor:
    return soft_labels(y, logits.shape[1], logits.dtype)


# --- Softer targets ---------------------------------------------------------------------------------------------------


def smoothed(targets: Tensor, smoothing: float) -> Tensor:
    r"""Return :math:`(1-\epsilon)\,t+\epsilon/K` of probabilities ``[N, K]``."""
    check_chance(smoothing=smoothing)
    return (1 - smoothing) * targets + smoothing / targets.shape[1]


def label_smoothing(model: nn.Module, x: Inputs, y: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """The cross-entropy against smoothed labels; as ``F.cross_entropy(..., label_smoothing=smoothing)``.

    Raises
    ------
    ValueError : ``smoothing`` is no number from 0 to 1, or the labels are no labels of as many classes.
    """
    check_chance(smoothing=smoothing)
    logits = model(x)
    return against(smoothed(_asked(y, logits), smoothing), logits)


def confidence_penalty(
    model: nn.Module, x: Inputs, y: Tensor, *, beta: float = 0.1, objective: Objective = cross_entropy
) -> Tensor:
    r"""The objective minus :math:`\beta` times the mean entropy of the predictions.

    Up to a constant it adds :math:`\beta\,\text{KL}(q\,\|\,u)` with u uniform, where label smoothing adds the other
    direction, :math:`\text{KL}(u\,\|\,q)`.

    Raises
    ------
    ValueError : ``beta`` is no number of at least 0.
    """
    check_not_negative(beta=beta)
    logits = model(x)
    return objective(Seen(model, x, logits), x, y) - beta * entropy(logits).mean()


# --- Under wrong labels -----------------------------------------------------------------------------------------------


def soft_bootstrap(model: nn.Module, x: Inputs, y: Tensor, *, beta: float = 0.95) -> Tensor:
    r"""The cross-entropy against :math:`\beta t+(1-\beta)q`: the label mixed with the prediction itself.

    Gradients flow through both q, as in the paper: it is :math:`\beta` of the cross-entropy plus :math:`1-\beta` of the
    entropy, which asks for confident predictions (the opposite of ``confidence_penalty``).

    Raises
    ------
    ValueError : ``beta`` is no number from 0 to 1, or the labels are no labels of as many classes.
    """
    check_chance(beta=beta)
    logits = model(x)
    return against(beta * _asked(y, logits) + (1 - beta) * logits.softmax(1), logits)


def hard_bootstrap(model: nn.Module, x: Inputs, y: Tensor, *, beta: float = 0.8) -> Tensor:
    r"""The cross-entropy against :math:`\beta t+(1-\beta)z`, z being 1 for the most likely class.

    Raises
    ------
    ValueError : ``beta`` is no number from 0 to 1, or the labels are no labels of as many classes.
    """
    check_chance(beta=beta)
    logits = model(x)
    named = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)
    return against(beta * _asked(y, logits) + (1 - beta) * named, logits)


def generalized_cross_entropy(model: nn.Module, x: Inputs, y: Tensor, *, q: float = 0.7) -> Tensor:
    r"""The mean of :math:`(1-p_y^q)/q`: the cross-entropy as q goes to 0, and :math:`1-p_y` at q = 1.

    Its gradient is :math:`p_y^q` times that of the cross-entropy: an example that the network thinks impossible, as a
    wrong label becomes, pulls less and less.

    Raises
    ------
    ValueError : ``q`` is no number above 0 and up to 1, or the labels are no labels of as many classes.
    """
    require("q", q, lambda value: is_number(value) and 0 < value <= 1, "a number above 0, at most 1")
    logits = model(x)
    # expm1 of the logarithm: with a small q the power is near 1, and the difference would lose its digits
    loss = -torch.expm1(q * F.log_softmax(logits, 1)) / q
    return (_asked(y, logits) * loss).sum(1).mean()


def symmetric_cross_entropy(
    model: nn.Module, x: Inputs, y: Tensor, *, alpha: float = 0.1, beta: float = 1.0, log_zero: float = -4.0
) -> Tensor:
    r"""The mean of :math:`-\alpha\sum_k t_k\log q_k-\beta\sum_k q_k\log t_k`, with :math:`\log 0` as ``log_zero``.

    For a hard label the second part is :math:`-A(1-q_y)`, A being ``log_zero``: bounded, so that no single example can
    pull without limit.

    Raises
    ------
    ValueError : ``alpha`` or ``beta`` is no number of at least 0, ``log_zero`` none below 0, or bad labels.
    """
    check_not_negative(alpha=alpha, beta=beta)
    require("log_zero", log_zero, lambda value: is_number(value) and value < 0, "a number below 0")
    logits = model(x)
    targets = _asked(y, logits)
    reverse = -(logits.softmax(1) * targets.log().clamp_min(log_zero)).sum(1).mean()
    return alpha * against(targets, logits) + beta * reverse


# --- Data whose labels are wrong --------------------------------------------------------------------------------------


def with_wrong_labels(
    data: Dataset,
    share: float,
    generator: torch.Generator,
    *,
    flip: Callable[[Tensor, float, int, torch.Generator], Tensor] = flip_symmetric,
) -> tuple[Dataset, Tensor]:
    """Return the data set with ``share`` of its training labels wrong, and which ones are: bool ``[N]``.

    Validation and test labels stay right. ``flip`` is a function of chapter 1: ``preprocessing.flip_symmetric`` (any
    other class) or ``preprocessing.flip_pairwise`` (the next class).

    Raises
    ------
    ValueError : as ``flip``: ``share`` is no number from 0 to 1.
    """
    labels = flip(data.train.labels, share, len(data.classes), generator)
    return replace(data, train=replace(data.train, labels=labels)), labels != data.train.labels
