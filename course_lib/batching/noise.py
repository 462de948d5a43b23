r"""Gradient noise: how much the gradient of a batch differs from that of all examples, and how large a batch pays.

===================================  =======================================================  =========================
name                                 what it gives                                            source
===================================  =======================================================  =========================
``per_example_gradients``            the gradient of each example, ``[N, D]``
``gradient_statistics``              their mean and the trace of their covariance
``variance_with_replacement``        of a batch's gradient: tr / B
``variance_without_replacement``     the same from a finite split, less: 0 at B = N           Cochran, Sampling
                                                                                              Techniques, 1977
``simple_noise_scale``               the batch at which noise and gradient are equal          McCandlish et al. 2018,
``noise_scale_from_two_sizes``       estimates from the norms of a small and a large batch    arXiv:1812.06162, and its
                                                                                              appendix A.1
``hessian_noise_scale``              the noise in the directions that the loss bends in       its section 2.2
===================================  =======================================================  =========================

``data`` is a ``Split`` or a batch ``(x, y)``. The model is not changed, and taken in the mode (train or eval) that it
is in. The examples' gradients stand in the order of ``model.parameters()``, those that can be trained.

Batch norm in training mode has no gradient of one example: each output depends on the whole batch. Such a network is
refused, and so is one with dropout on, whose gradient is another at each call. ``model.eval()`` makes both possible.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split, batches
from course_lib.lab.training import Objective, cross_entropy
from course_lib.schedules import hessian_vector

Data = Split | tuple[Any, Tensor]

# --- One gradient an example ------------------------------------------------------------------------------------------


def per_example_gradients(
    model: nn.Module, data: Data, *, objective: Objective = cross_entropy, chunk: int = 64
) -> Tensor:
    """Return the gradient of each example's loss, ``[N, D]``, in the type of the weights.

    ``torch.func.vmap`` computes ``chunk`` of them at once. All N stand in memory: ``gradient_statistics`` needs only
    a chunk.

    Raises
    ------
    ValueError : the network has batch norm in training mode or dropout that is on; nothing can be trained.
    """
    count = len(data if isinstance(data, Split) else data[1])
    at_least(1, **{"the examples of data": count})
    rows, done = torch.empty(0), 0
    for parts in _parts_of_gradients(model, data, objective, chunk):
        if not done:
            rows = parts[0].new_empty(count, sum(part.shape[1] for part in parts))
        # straight into the result: at these sizes one copy more costs as much as the gradients
        torch.cat(parts, dim=1, out=rows[done : done + len(parts[0])])
        done += len(parts[0])
    return rows


class _Loss(nn.Module):
    """A network and its objective in one module, so that ``functional_call`` reaches the weights of any objective."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x: Any, y: Tensor) -> Tensor:
        return self.objective(self.model, x, y)


def gradient_chunks(model: nn.Module, data: Data, objective: Objective, chunk: int) -> Iterator[Tensor]:
    """Yield the gradients of ``chunk`` examples after the other, ``[at most chunk, D]`` each."""
    for parts in _parts_of_gradients(model, data, objective, chunk):
        yield torch.cat(parts, dim=1)


def _parts_of_gradients(model: nn.Module, data: Data, objective: Objective, chunk: int) -> Iterator[list[Tensor]]:
    """The gradients of a chunk by each weight, ``[at most chunk, numbers of the weight]``."""
    at_least(1, chunk=chunk)
    _check_examples_are_apart(model)
    loss = _Loss(copy.deepcopy(model), objective)
    state: dict[str, Tensor] = {name: value.detach() for name, value in loss.named_parameters()}
    trained = {name: state[name] for name, value in loss.named_parameters() if value.requires_grad}
    if not trained:
        raise ValueError("model has no weights that require a gradient: must have some")
    rest = {name: value for name, value in [*state.items(), *loss.named_buffers()] if name not in trained}

    def of_one(weights: dict[str, Tensor], x: Any, y: Tensor) -> Tensor:
        one = tuple(part[None] for part in x) if isinstance(x, tuple) else x[None]
        return torch.func.functional_call(loss, weights | rest, (one, y[None]))

    gradients = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0))
    weight = next(iter(trained.values()))
    for x, y in _in_chunks(data, chunk, weight):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batched form
            found = gradients(trained, x, y)
        yield [found[name].flatten(1) for name in trained]


def _in_chunks(data: Data, size: int, like: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The examples in order, ``size`` at a time, where ``like`` lies and in its type."""
    if isinstance(data, Split):
        yield from batches(data.to(like.device), size, dtype=like.dtype)
        return
    x, y = data
    for start in range(0, len(y), size):
        rows = slice(start, start + size)
        parts = [part[rows].to(like.device, like.dtype) for part in (x if isinstance(x, tuple) else (x,))]
        yield (tuple(parts) if isinstance(x, tuple) else parts[0]), y[rows].to(like.device)


def _check_examples_are_apart(model: nn.Module) -> None:
    for name, part in model.named_modules():
        said = f"model holds {type(part).__name__} {name!r} in training mode"
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None):
            raise ValueError(f"{said}: one example has no gradient of its own there; must be in evaluation mode")
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            raise ValueError(f"{said}: each call draws another gradient; must be in evaluation mode")


# --- Mean and spread --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GradientStatistics:
    r"""Mean and spread of the gradients of N examples.

    Attributes
    ----------
    mean : the gradient of the mean loss, ``[D]``.
    trace : the trace of their covariance (divided by N), :math:`\frac1N\sum_i |g_i - G|^2`.
    examples : N.
    """

    mean: Tensor
    trace: float
    examples: int


def gradient_statistics(
    model: nn.Module, data: Data, *, objective: Objective = cross_entropy, chunk: int = 64
) -> GradientStatistics:
    r"""Return mean and trace of the covariance of the examples' gradients, with ``chunk`` of them in memory at once.

    Two groups of m and n examples are joined by :math:`S = S_m + S_n + \frac{mn}{m+n}|G_m - G_n|^2` for the sums of
    squares about the means. A difference of two large sums would lose the digits that are asked for.

    Raises
    ------
    ValueError : as ``per_example_gradients``.
    """
    mean, spread, done = torch.zeros(()), torch.zeros(()), 0
    for gradients in gradient_chunks(model, data, objective, chunk):
        count, own = len(gradients), gradients.mean(0)
        within = (gradients - own).square().sum()
        if not done:
            mean, spread, done = own, within, count
            continue
        away = own - mean
        spread = spread + within + away.square().sum() * (done * count / (done + count))
        mean = mean + away * (count / (done + count))
        done += count
    return GradientStatistics(mean, float(spread) / done, done)


def variance_with_replacement(trace: float, batch_size: int) -> float:
    r"""Return :math:`E|G_B - G|^2 = \mathrm{tr}\,\Sigma / B` of a batch drawn with replacement."""
    at_least(1, batch_size=batch_size)
    return trace / batch_size


def variance_without_replacement(trace: float, batch_size: int, examples: int) -> float:
    r"""Return :math:`E|G_B - G|^2 = \frac{\mathrm{tr}\,\Sigma}{B} \cdot \frac{N - B}{N - 1}` of one batch of an epoch.

    The last factor is the correction for a finite population: a batch of all N examples has no noise.
    Source: Cochran, Sampling Techniques, 3rd edition, Wiley 1977, chapter 2.

    Raises
    ------
    ValueError : ``batch_size`` is not between 1 and ``examples``.
    """
    at_least(1, examples=examples, batch_size=batch_size)
    require("batch_size", batch_size, lambda b: b <= examples, f"at most examples={examples}")
    return 0.0 if examples == 1 else trace / batch_size * (examples - batch_size) / (examples - 1)


# --- The noise scale --------------------------------------------------------------------------------------------------


def simple_noise_scale(statistics: GradientStatistics) -> float:
    r"""Return :math:`B_\mathrm{simple} = \mathrm{tr}\,\Sigma / |G|^2`, in examples.

    A batch of that size has as much noise (tr / B) as gradient. Infinite where the gradient is zero.
    Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.2.
    """
    return _ratio(statistics.trace, float(statistics.mean.square().sum()))


@dataclass(frozen=True)
class Estimates:
    r"""Estimates of :math:`|G|^2` and of :math:`\mathrm{tr}\,\Sigma`; each alone may fall below zero by chance."""

    gradient_sq: float
    trace: float

    @property
    def noise_scale(self) -> float:
        """Their ratio, in examples; infinite where the gradient cannot be told from zero."""
        return _ratio(self.trace, self.gradient_sq)


def noise_scale_from_two_sizes(small_sq: float, big_sq: float, small: float, big: float) -> Estimates:
    r"""Return unbiased estimates from the squared norms of the gradients of a small and of a big batch.

    .. math::
        |G|^2 \approx \frac{B|G_B|^2 - b|G_b|^2}{B - b}, \qquad
        \mathrm{tr}\,\Sigma \approx \frac{|G_b|^2 - |G_B|^2}{1/b - 1/B}

    since :math:`E|G_B|^2 = |G|^2 + \mathrm{tr}\,\Sigma/B`. Their ratio is not unbiased: average both over many steps
    before you divide. Batches drawn from N examples without replacement give the figures of the population that the
    N were drawn from: the trace is N / (N - 1) of theirs, and :math:`|G|^2` smaller than theirs by trace / N.
    Source: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.

    Raises
    ------
    ValueError : not ``0 < small < big``, or a squared norm that is below zero or not finite.
    """
    require("small", small, lambda b: is_number(b) and b > 0, "a number above 0")
    require("big", big, lambda b: is_number(b) and b > small, f"a number above small={small}")
    for name, value in {"small_sq": small_sq, "big_sq": big_sq}.items():
        require(name, value, lambda v: is_number(v) and v >= 0, "a finite number of at least 0")
    gradient_sq = (big * big_sq - small * small_sq) / (big - small)
    return Estimates(gradient_sq, (small_sq - big_sq) / (1 / small - 1 / big))


def _ratio(trace: float, gradient_sq: float) -> float:
    return trace / gradient_sq if gradient_sq > 0 else math.inf


# --- The curvature's share --------------------------------------------------------------------------------------------


def hessian_noise_scale(
    model: nn.Module,
    split: Split,
    *,
    generator: torch.Generator,
    draws: int = 30,
    objective: Objective = cross_entropy,
    chunk: int = 64,
) -> float:
    r"""Return :math:`B_\mathrm{noise} = \mathrm{tr}(H\Sigma) / G^\top H G`, in examples, of all of ``split``.

    Noise counts where the loss bends. The best step against a batch's gradient then gains
    :math:`1/(1 + B_\mathrm{noise}/B)` of what the whole gradient would. The trace is the mean of :math:`u^\top H u`
    over ``draws`` of :math:`u = N^{-1/2}\sum_i s_i (g_i - G)` with random signs s, since
    :math:`E\,uu^\top = \Sigma`. Each costs a Hessian product and a pass over the examples' gradients. It is infinite
    where the gradient points along no positive curvature, and may be negative where the noise sees more negative than
    positive curvature. Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.2.

    Raises
    ------
    ValueError : as ``per_example_gradients``; or ``generator`` is not on the CPU.
    """
    at_least(1, draws=draws)
    require("generator", generator, lambda g: g.device.type == "cpu", "a CPU generator")
    product = hessian_vector(model, split, objective=objective)
    signs = torch.randint(2, (draws, len(split)), generator=generator) * 2 - 1
    mean, sums, done = torch.zeros(()), torch.zeros(()), 0
    for gradients in gradient_chunks(model, split, objective, chunk):
        s = signs[:, done : done + len(gradients)].to(gradients)
        mean, sums, done = mean.to(gradients) + gradients.sum(0), sums.to(gradients) + s @ gradients, done + s.shape[1]
    mean = mean / done
    u = (sums - signs.sum(1).to(sums)[:, None] * mean) / math.sqrt(done)  # [draws, D]
    bent = torch.stack([torch.dot(v, product(v)) for v in u]).mean()
    along = float(torch.dot(mean, product(mean)))
    return float(bent) / along if along > 0 else math.inf
