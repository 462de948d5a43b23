r"""The optimism of the best epoch: the best of many noisy numbers is partly luck, and what that luck is worth.

===============================  =====================================================================================
name                             what it gives
===============================  =====================================================================================
``expected_maximum``             the mean of the largest of n independent normal numbers
``expected_walk_maximum``        of a random walk of n steps
``expected_ar1_maximum``         of n numbers each of which resembles the one before
``accuracy_standard_error``      the noise of an accuracy on so many examples
``difference_standard_error``    the noise of the difference of two accuracies on the same examples
``accuracy_covariance``          the noise of every epoch's accuracy, and what they share
``best_epoch_optimism``          measured over runs: validation at the best epoch against test there
``bootstrap_optimism``           estimated from the validation split of one run
===============================  =====================================================================================

Validation accuracy is the true accuracy and noise; the epoch with the highest has, on average, both. How much of it is
noise depends on its size (few examples) and on how independent it is from epoch to epoch: neighbouring epochs err on
the same examples, so a hundred of them are worth a few independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import integrate, special
from torch import Tensor

from course_lib.early_stopping.criteria import lower_is_better
from course_lib.early_stopping.replaying import best_row
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.experiments import Interval, mean_interval
from course_lib.lab.training import History

# --- The largest of many numbers --------------------------------------------------------------------------------------


def expected_maximum(n: int, sd: float = 1.0) -> float:
    r"""Return the mean of the largest of n independent normal numbers of mean 0 and standard deviation ``sd``.

    .. math:: \sigma\int_0^\infty\big(1-\Phi(x)^n-\Phi(-x)^n\big)\,dx

    by numerical integration, to about 10 digits. It grows like :math:`\sigma\sqrt{2\log n}`, slowly.

    Raises
    ------
    ValueError : n is no whole number of at least 1, or ``sd`` no number of at least 0.
    """
    at_least(1, n=n)
    _check_not_negative(sd=sd)

    def beyond(x: float) -> float:
        # of Φ(x)ⁿ close to 1 the difference would be rounding
        return -math.expm1(n * special.log_ndtr(x)) - math.exp(n * special.log_ndtr(-x))

    middle = math.sqrt(2 * math.log(n)) if n > 1 else 1.0  # where the integrand falls
    parts = [integrate.quad(beyond, *ends, epsabs=1e-13, limit=200)[0] for ends in ((0, middle), (middle, middle + 12))]
    return sd * sum(parts)


def expected_walk_maximum(n: int, sd: float = 1.0) -> float:
    r"""Return the mean of :math:`\max(0,S_1,\dots,S_n)` of a walk with n independent normal steps of ``sd``.

    .. math:: \sum_{k=1}^n\frac{E[S_k^+]}k=\frac{\sigma}{\sqrt{2\pi}}\sum_{k=1}^n\frac1{\sqrt k}

    by Spitzer's identity, exactly. Noise that adds up drifts, and its best value grows like :math:`\sqrt n`.
    Source: Spitzer 1956, Transactions of the AMS 82(2).

    Raises
    ------
    ValueError : n is no whole number of at least 0, or ``sd`` no number of at least 0.
    """
    at_least(0, n=n)
    _check_not_negative(sd=sd)
    return sd / math.sqrt(2 * math.pi) * math.fsum(1 / math.sqrt(k) for k in range(1, n + 1))


@dataclass(frozen=True)
class Drawn:
    """A mean over random draws, with its standard error."""

    mean: float
    error: float


def expected_ar1_maximum(
    n: int, correlation: float, sd: float = 1.0, *, generator: torch.Generator, draws: int = 20_000
) -> Drawn:
    r"""Return the mean of the largest of n numbers :math:`x_t=\rho\,x_{t-1}+\sqrt{1-\rho^2}\,\varepsilon_t`.

    Each has the standard deviation ``sd`` and ``correlation`` :math:`\rho` with the one before. By simulation: there is
    no closed form. At 0 it is ``expected_maximum``, near 1 it falls towards 0.

    Raises
    ------
    ValueError : n or ``draws`` is out of its range, or ``correlation`` not from -1 to 1.
    """
    at_least(1, n=n)
    at_least(2, draws=draws)
    _check_not_negative(sd=sd)
    require("correlation", correlation, lambda r: is_number(r) and -1 <= r <= 1, "a number from -1 to 1")
    fresh = math.sqrt(1 - correlation**2)
    x = torch.randn(draws, generator=generator, dtype=torch.float64)
    largest = x.clone()
    for _ in range(n - 1):
        x = correlation * x + fresh * torch.randn(draws, generator=generator, dtype=torch.float64)
        largest = torch.maximum(largest, x)
    return Drawn(sd * largest.mean().item(), sd * largest.std().item() / math.sqrt(draws))


# --- The noise of an accuracy -----------------------------------------------------------------------------------------


def accuracy_standard_error(accuracy: float, examples: int) -> float:
    r"""Return :math:`\sqrt{p(1-p)/n}`, the standard error of an ``accuracy`` p measured on n ``examples``.

    Raises
    ------
    ValueError : ``accuracy`` is not from 0 to 1, or ``examples`` no whole number of at least 1.
    """
    require("accuracy", accuracy, lambda p: is_number(p) and 0 <= p <= 1, "a number from 0 to 1")
    at_least(1, examples=examples)
    return math.sqrt(accuracy * (1 - accuracy) / examples)


def difference_standard_error(right: Tensor, other: Tensor) -> float:
    r"""Return the standard error of the difference of two accuracies on the same n examples.

    .. math:: \frac1n\sqrt{b+c-\frac{(b-c)^2}n}

    where b examples are right in one alone and c in the other alone: where both agree there is no noise. ``right`` and
    ``other`` are truth values ``[n]``. Two epochs of a run disagree on few examples, so their difference is far less
    noisy than :math:`\sqrt2` times ``accuracy_standard_error``.

    Raises
    ------
    ValueError : they are no truth values of the same examples.
    """
    _check_right(1, right=right)
    _check_right(1, other=other)
    require("other", other, lambda o: o.shape == right.shape, f"of the shape {list(right.shape)}")
    n = len(right)
    b, c = int((right & ~other).sum()), int((other & ~right).sum())
    return math.sqrt(b + c - (b - c) ** 2 / n) / n


def accuracy_covariance(right: Tensor) -> Tensor:
    r"""Return the covariance of the noise of the accuracies of E epochs on the same n examples, ``[E, E]``.

    ``right`` says which example was right after which epoch, truth values ``[E, n]``. The diagonal holds the squares of
    ``accuracy_standard_error``, up to n / (n - 1); off it stands what two epochs share.

    Raises
    ------
    ValueError : ``right`` holds no truth values, or those of fewer than 2 examples.
    """
    _check_right(2, right=right)
    require("right", right.shape[1], lambda n: n >= 2, "of at least 2 examples")
    return torch.cov(right.double()).reshape(len(right), len(right)) / right.shape[1]


# --- Measured ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimism:
    """By how much validation promises more than the test split keeps, over runs, with 95% intervals.

    Attributes
    ----------
    best : at the epoch that is best on validation.
    everywhere : on the mean over all epochs: the two splits are not equally hard.
    choice : best minus everywhere, run by run: what choosing the epoch has added.
    """

    best: Interval
    everywhere: Interval
    choice: Interval


def best_epoch_optimism(
    histories: Sequence[History], column: str = "val_accuracy", test: str = "test_accuracy"
) -> Optimism:
    """Return the measured optimism of the best epoch: ``column`` there, minus ``test`` there.

    Above zero, the best epoch looked better than it was; the sign is turned for columns where low is good.

    Raises
    ------
    ValueError : fewer than 2 histories, or ``column`` and ``test`` differ in which values are good.
    KeyError : a history lacks a column.
    """
    require("histories", len(histories), lambda n: n >= 2, "of at least 2 runs")
    lower = lower_is_better(column)
    require("test", test, lambda t: lower_is_better(t) == lower, f"a column where good values are as in {column!r}")
    best, everywhere = [], []
    for history in histories:
        promised = (-1 if lower else 1) * (np.array(history[column]) - np.array(history[test]))
        best.append(promised[best_row(history[column], lower=lower)])
        everywhere.append(promised.mean())
    gaps = [b - e for b, e in zip(best, everywhere, strict=True)]
    return Optimism(mean_interval(best), mean_interval(everywhere), mean_interval(gaps))


def bootstrap_optimism(right: Tensor, *, generator: torch.Generator, draws: int = 500) -> Drawn:
    r"""Return by how much the best epoch's validation accuracy is too high, from the validation split alone.

    The examples are drawn anew with replacement; the epoch that is best on the draw is looked up there and on the
    examples as they are. The mean difference is an estimate of what the same choice costs in truth: too small where the
    epochs differ little, since a draw of the examples sees the luck of the examples themselves as truth. ``right`` is
    as for ``accuracy_covariance``; ``error`` is that of the draws alone.
    Source: Efron 1983, Journal of the American Statistical Association 78(382).

    Raises
    ------
    ValueError : ``right`` holds no truth values, or ``draws`` is no whole number of at least 2.
    """
    _check_right(2, right=right)
    at_least(2, draws=draws)
    n = right.shape[1]
    picked = torch.randint(n, (draws, n), generator=generator)
    counts = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, picked, torch.ones(draws, n).double())
    drawn = counts.to(right.device) @ right.double().mT / n  # [draws, E]
    highest, epoch = drawn.max(1)
    gaps = highest - right.double().mean(1)[epoch]
    return Drawn(gaps.mean().item(), gaps.std().item() / math.sqrt(draws))


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _check_not_negative(**arguments: float) -> None:
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and x >= 0, "a number of at least 0")


def _check_right(dimensions: int, **arguments: Tensor) -> None:
    shape = "[epochs, examples]" if dimensions == 2 else "[examples]"
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.dtype != torch.bool or value.ndim != dimensions or not value.numel():
            what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} is {what}: must be truth values {shape}")
