r"""Early stopping without a validation split: when the gradient can no longer be told from its own noise.

=========================  ===========================================================================================
name                       what it gives
=========================  ===========================================================================================
``evidence_of``            the criterion, from mean and variance of the examples' gradients
``evidence``               the same of a network on a split, all weights in one
``evidence_by_layer``      of each weight tensor by itself; ``mean_layer_evidence`` of all, each with the same say
``silent_share``           how many single weights have a gradient that is noise
``EvidenceColumn``         one of these as a column of the history, for ``Recipe.watch``
``Evidence``               the stopping criterion on that column
=========================  ===========================================================================================

The gradient of the training loss is a mean over B examples, and would be another for other examples. As long as it is
large against that spread it points to what all examples have in common. When it is as small as the spread alone would
make it, only the examples at hand are still being learnt.

Source: Mahsereci, Balles, Lassner & Hennig 2017, arXiv:1703.09580.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.batching.noise import gradient_chunks
from course_lib.early_stopping.criteria import check_column, check_smoothing, smoothed
from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Dataset, Split
from course_lib.lab.training import History, Objective, cross_entropy

Data = Split | tuple[Any, Tensor]

# --- The formula ------------------------------------------------------------------------------------------------------


def signal_to_noise(mean: Tensor, variance: Tensor, examples: int) -> Tensor:
    r"""Return :math:`B\,g_k^2/\hat\Sigma_k` of each weight, NaN where all examples have a gradient of exactly zero.

    ``mean`` g and ``variance`` :math:`\hat\Sigma` (divided by B - 1) are those of the gradients of B ``examples``.
    For a gradient that is noise about zero it is the square of a Student-t variable with B - 1 degrees of freedom: 1,
    on average nearly, exactly :math:`(B-1)/(B-3)` for normal noise.
    """
    return examples * mean.square() / variance


def evidence_of(mean: Tensor, variance: Tensor, examples: int) -> float:
    r"""Return :math:`1-\frac{B}{D}\sum_{k=1}^D\frac{g_k^2}{\hat\Sigma_k}`: above zero, the gradient may be noise.

    Far below zero the examples agree. Weights whose gradient is exactly zero for every example (behind a dead unit or a
    constant pixel) say nothing and are not among the D. NaN where no weight is left.

    Raises
    ------
    ValueError : ``examples`` is no whole number of at least 2.
    """
    at_least(2, examples=examples)
    return float(1 - signal_to_noise(mean, variance, examples).nanmean())


# --- Of a network -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GradientMoments:
    """Mean and variance of the examples' gradients, weight by weight, ``[D]`` each; the variance is divided by N - 1.

    ``sizes`` are the numbers in each weight tensor, by name, in the order in which they stand.
    """

    mean: Tensor
    variance: Tensor
    examples: int
    sizes: dict[str, int]


def gradient_moments(
    model: nn.Module, data: Data, *, objective: Objective = cross_entropy, chunk: int = 64
) -> GradientMoments:
    r"""Return the mean and the variance of each weight's gradient over the examples of ``data``.

    In evaluation mode, whatever the model's mode is, and with ``chunk`` examples' gradients in memory at once. Two
    groups of m and n examples are joined by :math:`S=S_m+S_n+\frac{mn}{m+n}(g_m-g_n)^2` for the sums of squares about
    the means. Batch norm then takes part with its running statistics.

    Raises
    ------
    ValueError : fewer than 2 examples, or nothing can be trained.
    """
    require("data", len(data if isinstance(data, Split) else data[1]), lambda n: n >= 2, "of at least 2 examples")
    model = copy.deepcopy(model).eval()
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    mean, squares, done = torch.zeros(()), torch.zeros(()), 0
    for rows in gradient_chunks(model, data, objective, chunk):
        gradients = rows[:, : sum(sizes.values())]  # behind them stand the weights of an objective that has some
        count, own = len(gradients), gradients.mean(0)
        within = (gradients - own).square().sum(0)
        if not done:
            mean, squares, done = own, within, count
            continue
        away = own - mean
        squares = squares + within + away.square() * (done * count / (done + count))
        mean = mean + away * (count / (done + count))
        done += count
    return GradientMoments(mean, squares / (done - 1), done, sizes)


def evidence(model: nn.Module, data: Data, *, objective: Objective = cross_entropy, chunk: int = 64) -> float:
    """Return ``evidence_of`` all weights of the model together, on the examples of ``data`` (a split, or ``(x, y)``).

    Raises
    ------
    ValueError : as ``gradient_moments``.
    """
    found = gradient_moments(model, data, objective=objective, chunk=chunk)
    return evidence_of(found.mean, found.variance, found.examples)


def evidence_by_layer(
    model: nn.Module, data: Data, *, objective: Objective = cross_entropy, chunk: int = 64
) -> dict[str, float]:
    """Return ``evidence_of`` each weight tensor by itself, by its name.

    In the mean over all weights a large layer outvotes the small ones, which often learn at another pace.

    Raises
    ------
    ValueError : as ``gradient_moments``.
    """
    found = gradient_moments(model, data, objective=objective, chunk=chunk)
    parts = zip(*(t.split(list(found.sizes.values())) for t in (found.mean, found.variance)), strict=True)
    return {
        name: evidence_of(mean, variance, found.examples)
        for name, (mean, variance) in zip(found.sizes, parts, strict=True)
    }


def mean_layer_evidence(
    model: nn.Module, data: Data, *, objective: Objective = cross_entropy, chunk: int = 64
) -> float:
    """Return the mean of ``evidence_by_layer``: each weight tensor has the same say, whatever its size.

    Raises
    ------
    ValueError : as ``gradient_moments``.
    """
    layers = evidence_by_layer(model, data, objective=objective, chunk=chunk)
    return float(torch.tensor(list(layers.values()), dtype=torch.float64).nanmean())


def silent_share(model: nn.Module, data: Data, *, objective: Objective = cross_entropy, chunk: int = 64) -> float:
    r"""Return the share of single weights with :math:`1-B\,g_k^2/\hat\Sigma_k>0`, among those with a gradient.

    The paper's greedy variant stops such weights one by one. Of a gradient that is all noise it is 68%: the chance that
    a normal variable lies within its standard deviation. A weight that one single example moves has a ratio of exactly
    1, and is none of them.

    Raises
    ------
    ValueError : as ``gradient_moments``.
    """
    found = gradient_moments(model, data, objective=objective, chunk=chunk)
    ratios = signal_to_noise(found.mean, found.variance, found.examples)
    return float((ratios[~ratios.isnan()] < 1 - 1e-5).double().mean())  # 1 as float32 finds it


# --- In a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvidenceColumn:
    """What ``Recipe.watch`` measures: ``watch={"evidence": EvidenceColumn()}``.

    Parameters
    ----------
    examples : the first so many of the training split (they are balanced by class); None for all. It costs a gradient
        for each: for a small network on all examples, as much as ten epochs.
    measure : ``evidence``, ``mean_layer_evidence`` or ``silent_share``.
    objective : the recipe's, for the gradient that training follows.
    chunk : examples' gradients in memory at once.

    Raises
    ------
    ValueError : ``examples`` or ``chunk`` is out of its range.
    """

    examples: int | None = None
    measure: Callable[..., float] = evidence
    objective: Objective = cross_entropy
    chunk: int = 64

    def __post_init__(self) -> None:
        at_least(2, **({} if self.examples is None else {"examples": self.examples}))
        at_least(1, chunk=self.chunk)

    def __call__(self, model: nn.Module, data: Dataset) -> float:
        split = data.train
        if self.examples is not None and self.examples < len(split):
            split = split.subset(torch.arange(self.examples))
        return self.measure(model, split, objective=self.objective, chunk=self.chunk)


@dataclass(frozen=True)
class Evidence:
    """Stop when the column, smoothed, is above zero: the gradient cannot be told from noise any more.

    The column is one that ``EvidenceColumn`` measures. From one validation to the next it jumps about, above all near
    zero: ``smoothing`` is the share of the past in a moving average.

    Raises
    ------
    ValueError : ``smoothing`` or ``column`` is out of its range.
    """

    column: str = "evidence"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)
        check_column(column=self.column)

    def __call__(self, history: History) -> bool:
        return smoothed(history[self.column], self.smoothing)[-1] > 0
