r"""What a filter's error is made of, and when gradient descent had best be stopped: where the truth is known.

==============================  ======================================================================================
name                            what it gives
==============================  ======================================================================================
``bias_variance``               the error of the predictions of any filter of ``filtering``, in closed form
``weight_error``                the same of the weights
``gd_bias_variance``            of gradient descent that stops after t steps
``best_steps``                  the t with the least error
``best_steps_by_direction``     the best t of each direction by itself
``oracle_filter``               the filter that none of them can beat
==============================  ======================================================================================

The model is :math:`y=Xw+\varepsilon` with independent noise of standard deviation :math:`\sigma`, learnt from
:math:`w_0=0`; the directions are those of ``spectrum``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.early_stopping.filtering import gd_filter
from course_lib.early_stopping.spectral import (
    check_matrix,
    check_not_negative,
    check_steps,
    check_vector,
    singular,
    spectrum,
)
from course_lib.lab.arguments import is_number, require


@dataclass(frozen=True)
class FilterError:
    """Mean squared error against the truth, without the noise of new targets."""

    bias_sq: float
    variance: float

    @property
    def total(self) -> float:
        """Bias and variance together."""
        return self.bias_sq + self.variance


def bias_variance(X: Tensor, truth: Tensor, noise: float, kept: Tensor) -> FilterError:
    r"""Return the error :math:`\frac1N\|X(\hat w-w)\|^2` of the predictions, w being the ``truth``.

    .. math:: \text{bias}^2=\sum_j\lambda_j(1-f_j)^2(v_j^\top w)^2,\qquad
       \text{variance}=\frac{\sigma^2}N\sum_jf_j^2

    with independent noise of standard deviation :math:`\sigma` (``noise``), the filter ``kept`` ``[D]``, from zero.

    Raises
    ------
    ValueError : X is no matrix of floats, ``truth`` or ``kept`` does not fit it, or ``noise`` is below 0.
    """
    signal = _signal(X, truth)
    check_vector(X.shape[1], kept=kept)
    bias = (signal * (1 - kept).square()).sum().item()
    return FilterError(bias, _noise(noise) ** 2 / len(X) * kept[_there(X)].square().sum().item())


def weight_error(X: Tensor, truth: Tensor, noise: float, kept: Tensor) -> FilterError:
    r"""Return the error :math:`\|\hat w-w\|^2` of the weights: each term of ``bias_variance`` over its eigenvalue.

    Along directions without data all of w is bias.

    Raises
    ------
    ValueError : as ``bias_variance``.
    """
    _signal(X, truth)
    check_vector(X.shape[1], kept=kept)
    there, values = _there(X), spectrum(X)
    along = singular(X)[2] @ truth
    missing = truth.square().sum() - along.square().sum()
    left = (1 - kept[: len(along)]).where(there[: len(along)], torch.ones_like(along))
    bias = (left.square() * along.square()).sum() + missing.clamp_min(0)
    variance = _noise(noise) ** 2 / len(X) * (kept[there].square() / values[there]).sum()
    return FilterError(bias.item(), variance.item())


def gd_bias_variance(X: Tensor, truth: Tensor, noise: float, lr: float, steps: int) -> FilterError:
    """Return ``bias_variance`` of gradient descent that stops after so many steps.

    Raises
    ------
    ValueError : as ``gd_filter`` and ``bias_variance``.
    """
    return bias_variance(X, truth, noise, gd_filter(spectrum(X), lr, steps))


@dataclass(frozen=True)
class BestStop:
    """The number of steps with the least error, and that error."""

    steps: int
    error: FilterError


def best_steps(X: Tensor, truth: Tensor, noise: float, lr: float, most: int) -> BestStop:
    """Return the best moment to stop gradient descent, of 0 to ``most`` steps: where bias and variance add up to least.

    Raises
    ------
    ValueError : as ``gd_bias_variance``.
    """
    check_steps(lr, most)
    values, signal = spectrum(X), _signal(X, truth)
    left = torch.ones_like(values)
    spread = _noise(noise) ** 2 / len(X)
    totals = []
    for _ in range(most + 1):
        totals.append((signal * left.square()).sum() + spread * (1 - left).square().sum())
        left = left * (1 - lr * values)
    steps = int(torch.stack(totals).argmin())
    return BestStop(steps, gd_bias_variance(X, truth, noise, lr, steps))


def oracle_filter(X: Tensor, truth: Tensor, noise: float) -> Tensor:
    r"""Return the filter with the least error, :math:`f_j=\lambda_jc_j^2/(\lambda_jc_j^2+\sigma^2/N)`.

    :math:`c_j=v_j^\top w` is the part of the truth along a direction.

    No stopping time and no weight decay can do better, since they have one dial for all directions.

    Raises
    ------
    ValueError : as ``bias_variance``.
    """
    signal, spread = _signal(X, truth), _noise(noise) ** 2 / len(X)
    return torch.where(signal > 0, signal / (signal + spread).where(signal > 0, torch.ones_like(signal)), 0.0)


def best_steps_by_direction(X: Tensor, truth: Tensor, noise: float, lr: float) -> Tensor:
    r"""Return the moment at which each direction would best be stopped by itself, ``[D]``, no whole numbers.

    .. math:: t_j=\frac{\log q_j}{\log(1-\eta\lambda_j)},\qquad q_j=\frac{\sigma^2/N}{\lambda_jc_j^2+\sigma^2/N}

    since there ``gd_filter`` is ``oracle_filter``. They lie far apart, and one clock serves all.

    Raises
    ------
    ValueError : as ``oracle_filter``; or ``lr`` is not below 1 over the largest eigenvalue.
    """
    values = spectrum(X)
    largest = values.max().item()
    require("lr", lr, lambda r: is_number(r) and 0 < r * largest < 1, f"above 0 and below {1 / largest:.4g}")
    left = torch.log1p(-oracle_filter(X, truth, noise))
    return left / torch.log1p(-lr * values)


def _there(X: Tensor) -> Tensor:
    """Which directions have data, ``[D]``."""
    return spectrum(X) > 0


def _signal(X: Tensor, truth: Tensor) -> Tensor:
    """What each direction adds to the mean square of the true outputs, ``[D]``."""
    check_matrix(X)
    check_vector(X.shape[1], truth=truth)
    _, s, Vh = singular(X)
    signal = s.square() / len(X) * (Vh @ truth).square()
    return torch.cat([signal, signal.new_zeros(X.shape[1] - len(signal))])


def _noise(noise: float) -> float:
    check_not_negative(noise=noise)
    return noise
