r"""Whether a network that says 90% is right nine times out of ten, and how to mend it.

==========================  ==========================================================  ================================
name                        what it gives                                               source
==========================  ==========================================================  ================================
``reliability``             confidence against accuracy, in bins                        Niculescu-Mizil & Caruana 2005,
                                                                                        ICML
``calibration_error``       their mean distance (ECE)                                   Naeini et al. 2015, AAAI;
                                                                                        Guo et al. 2017,
                                                                                        arXiv:1706.04599
``brier_score``             the squared error of probabilities                          Brier 1950, Monthly Weather
                                                                                        Review 78(1)
``fit_temperature``         the one number that mends most of it                        Guo et al. 2017
``Tempered``                a network whose logits are divided by it
==========================  ==========================================================  ================================

Logits are ``[N, K]``, labels int64 ``[N]``, both on one device, as ``logits_of`` gives them. The calibration error
depends on the bins and is biased upwards where they hold few examples; the Brier score and the cross-entropy need none,
but mix calibration with accuracy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least
from course_lib.lab.data import Split
from course_lib.lab.training import logits_of
from course_lib.regularization.drawing import check_positive


class Reliability(NamedTuple):
    """One number a bin ``[bins]``: mean confidence, accuracy (both NaN where it is empty), and how many examples."""

    confidence: Tensor
    accuracy: Tensor
    examples: Tensor


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> Reliability:
    r"""Sort predictions into bins of equal width by their confidence :math:`\max_k q_k`; the upper edge belongs to one.

    Raises
    ------
    ValueError : ``bins`` is below 1, or logits and labels do not fit.
    """
    at_least(1, bins=bins)
    _check(logits, labels)
    confidence, named = logits.double().softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(place, minlength=bins)
    sums = torch.bincount(place, confidence, bins), torch.bincount(place, (named == labels).double(), bins)
    return Reliability(sums[0] / count, sums[1] / count, count)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    r"""Return :math:`\sum_b\tfrac{n_b}{N}|\text{accuracy}_b-\text{confidence}_b|`, the expected calibration error.

    Raises
    ------
    ValueError : as ``reliability``.
    """
    found = reliability(logits, labels, bins)
    gaps = (found.accuracy - found.confidence).abs().nan_to_num()
    return (gaps * found.examples).sum().item() / len(labels)


def brier_score(logits: Tensor, labels: Tensor) -> float:
    r"""Return the mean of :math:`\sum_k(q_k-t_k)^2`, from 0 to 2, t being 1 for the label.

    For two classes it is twice what is often called so, the squared error of the one probability.

    Raises
    ------
    ValueError : logits and labels do not fit.
    """
    _check(logits, labels)
    q = logits.double().softmax(1)
    return (q - F.one_hot(labels.to(q.device), q.shape[1])).square().sum(1).mean().item()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    r"""Return the temperature T for which the softmax of :math:`z/T` has the least cross-entropy.

    To be fitted on validation logits. The loss is convex in :math:`\beta=1/T` and its slope
    :math:`\overline{\sum_kq_kz_k-z_y}` rises, so bisection finds where it is 0: T is between 0.001 and 1000, and one of
    these where the slope keeps its sign (all predictions right: the smaller the better).

    Raises
    ------
    ValueError : logits and labels do not fit.
    """
    _check(logits, labels)
    z = logits.detach().double()
    of_label = z.gather(1, labels[:, None]).mean()

    def slope(log_beta: float) -> float:
        return ((z * (z * 10**log_beta).softmax(1)).sum(1).mean() - of_label).item()

    low, high = -3.0, 3.0  # of log10 beta
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) <= 0 else (low, middle)
    return float(10 ** -((low + high) / 2))


class Tempered(nn.Module):
    """A network whose logits are divided by a temperature; the class that it names stays.

    Raises
    ------
    ValueError : ``temperature`` is no number above 0.
    """

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.model, self.temperature = model, temperature
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …]`` to logits ``[N, K]``."""
        return self.model(x) / self.temperature


def tempered(model: nn.Module, val: Split) -> Tempered:
    """Return the network with the temperature that fits ``val``."""
    return Tempered(model, fit_temperature(logits_of(model, val), val.labels))


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or not len(labels):
        raise ValueError(
            f"logits {list(logits.shape)}, labels {labels.dtype} {list(labels.shape)}: must be [N, K] and int64 [N]"
        )
