r"""Bias and variance, by training on many samples of the data.

===============================  ======================================================  ===============================
name                             what it takes apart                                     source
===============================  ======================================================  ===============================
``squared_error_parts``          the squared error                                       Geman, Bienenstock & Doursat
                                                                                         1992, Neural Computation 4(1)
``cross_entropy_parts``          the cross-entropy                                       Heskes 1998, Neural Computation
                                                                                         10(6); Yang et al. 2020,
                                                                                         arXiv:2002.11328
``zero_one_parts``               the share of errors                                     Domingos 2000, ICML
``bootstrap``                    a sample of as many examples, with replacement          Efron 1979, Ann. Statist. 7(1)
``disjoint_parts``               samples that share no example                           Yang et al. 2020
``resampled_logits``             what networks say that were trained on each of them
===============================  ======================================================  ===============================

Each decomposition is an identity for the R predictors at hand, whose mean stands for the mean over all samples. So
each bias is too large by the variance of that mean, about 1/R of the variance; ``squared_error_parts`` can take it off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least
from course_lib.lab.data import Dataset, Split
from course_lib.lab.training import Recipe, fit, fresh, logits_of


class Parts(NamedTuple):
    """Mean over the examples. ``total`` is what the R predictors lose on average: bias and variance together."""

    bias: float
    variance: float
    total: float


def squared_error_parts(predictions: Tensor, targets: Tensor, *, corrected: bool = False) -> Parts:
    r"""Take apart :math:`\overline{(f_r-y)^2}=(\bar f-y)^2+\overline{(f_r-\bar f)^2}`, means over r and examples.

    The bias is the squared one, and holds the noise of the targets where these are not the truth.

    Parameters
    ----------
    predictions : ``[R, N]`` or ``[R, N, K]``, whose squares are summed over K
    targets : ``[N]`` or ``[N, K]``
    corrected : divide the variance by R - 1 and take 1/R of it off the bias: both then estimate those of all samples
        without bias, and the bias may come out below 0.

    Raises
    ------
    ValueError : there are fewer than two predictors, or targets of another shape.
    """
    _check(predictions, targets, predictions.shape[1:])
    count = len(predictions)
    mean = predictions.mean(0)
    bias = (mean - targets).square().sum().item() / predictions.shape[1]
    variance = (predictions - mean).square().sum().item() / (count * predictions.shape[1])
    total = bias + variance
    if corrected:
        variance *= count / (count - 1)
        bias -= variance / count
    return Parts(bias, variance, total)


def cross_entropy_parts(logits: Tensor, labels: Tensor) -> Parts:
    r"""Take apart :math:`-\overline{\log q_{r,y}}=-\log\bar q_y+\overline{\text{KL}(\bar q\,\|\,q_r)}`.

    :math:`\bar q\propto\exp\overline{\log q_r}` is the geometric mean of the predictions, which is the softmax of the
    mean logits.

    Parameters
    ----------
    logits : ``[R, N, K]``
    labels : int64 ``[N]``

    Raises
    ------
    ValueError : there are fewer than two predictors, or labels of another shape.
    """
    _check(logits, labels, logits.shape[1:-1])
    labels = labels.to(logits.device)
    log_q = F.log_softmax(logits, -1)
    log_mean = F.log_softmax(log_q.mean(0), -1)
    bias = F.nll_loss(log_mean, labels).item()
    variance = (log_mean.exp() * (log_mean - log_q)).sum(-1).mean().item()
    total = torch.stack([F.nll_loss(each, labels) for each in log_q]).mean().item()
    return Parts(bias, variance, total)


def main_prediction(named: Tensor, classes: int) -> Tensor:
    """Return the class that most of the predictors name, the first of equals: int64 ``[R, N] -> [N]``."""
    return F.one_hot(named, classes).sum(0).argmax(1)


def zero_one_parts(named: Tensor, labels: Tensor, classes: int) -> Parts:
    r"""Take apart the share of errors of named classes, int64 ``[R, N]``, of labels without noise.

    With the ``main_prediction`` :math:`m`, bias is the share of examples with :math:`m\ne y`, and each disagreement
    with m counts as variance: it costs where m is right, and gains where m is wrong and the disagreement happens to be
    right:

    .. math:: \text{variance}=P(f\ne m,\,m=y)-P(f=y,\,m\ne y)

    the net variance of Domingos, which may be below 0.

    Raises
    ------
    ValueError : there are fewer than two predictors, or labels of another shape.
    """
    _check(named, labels, named.shape[1:])
    labels = labels.to(named.device)
    main = main_prediction(named, classes)
    right = main == labels
    costs = ((named != main) & right).double().mean().item()
    gains = ((named == labels) & ~right).double().mean().item()
    return Parts((~right).double().mean().item(), costs - gains, (named != labels).double().mean().item())


def _check(predictions: Tensor, targets: Tensor, shape: Sequence[int]) -> None:
    at_least(2, predictors=len(predictions))
    if tuple(targets.shape) != tuple(shape):
        raise ValueError(
            f"targets have the shape {list(targets.shape)}: must be {list(shape)}, as the predictions have"
        )


# --- Samples of the data ----------------------------------------------------------------------------------------------


def bootstrap(split: Split, generator: torch.Generator) -> Split:
    """Return a sample of as many examples as the split has, drawn with replacement."""
    return split.subset(torch.randint(len(split), (len(split),), generator=generator))


def disjoint_parts(split: Split, parts: int, generator: torch.Generator) -> list[Split]:
    """Cut a split into ``parts`` samples of equal size that share no example; what is left over is left out.

    Raises
    ------
    ValueError : ``parts`` is below 2 or above the number of examples.
    """
    at_least(2, parts=parts)
    if parts > len(split):
        raise ValueError(f"parts={parts}: must be at most {len(split)}, the number of examples")
    size = len(split) // parts
    order = torch.randperm(len(split), generator=generator)
    return [split.subset(order[k * size : (k + 1) * size]) for k in range(parts)]


def resampled_logits(
    network: Callable[[], nn.Module], data: Dataset, recipe: Recipe, samples: Sequence[Split], *, seed: int
) -> Tensor:
    """Return the logits ``[R, N, K]`` on ``data.test`` of networks trained on each of R training splits.

    Each starts from first weights of its own (``seed``, ``seed + 1``, …), so that the variance is that of data and
    initialisation together.

    Raises
    ------
    ValueError : ``samples`` is empty.
    """
    at_least(1, samples=len(samples))
    found = []
    for k, sample in enumerate(samples):
        model = fresh(network, recipe, seed=seed + k)
        fit(model, replace(data, train=sample), recipe, seed=seed + k, progress=False)
        found.append(logits_of(model, data.test))
    return torch.stack(found)
