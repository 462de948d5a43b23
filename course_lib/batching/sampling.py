r"""Sampling: in which order examples come, and how often each.

===============================  ===========================================================  =========================
name                             what it gives                                                source
===============================  ===========================================================  =========================
*orders of epochs*
``with_replacement``             each draw from all examples: some twice, a third never
``reshuffled``                   each example once an epoch, in a new order
``shuffled_once``                each once, in the same order in every epoch
*choices that are not uniform*
``probabilities``                in proportion to scores, smoothed
``importance``                   a draw by them, with the weights that undo the bias
``sampling_variance``            the variance of such a batch's gradient, as a formula        Katharopoulos & Fleuret
                                                                                              2018, arXiv:1803.00942
*scores*
``loss_scores``                  the loss of each example
``last_layer_scores``            the gradient's norm at the logits: a cheap stand-in          Katharopoulos & Fleuret
                                                                                              2018, arXiv:1803.00942
``gradient_norms``               the exact norm of each example's gradient
*curricula*
``exponential_pacing``           part of the examples, easiest first, by step                 Hacohen & Weinshall 2019,
                                                                                              arXiv:1904.03626
``easiest``                      the easiest part, by scores                                  Bengio et al., ICML 2009
===============================  ===========================================================  =========================

Indices are int64, on the CPU. Generators are CPU generators: the draws are the same on every device. How a choice gets
into ``fit`` stands in ``drawing.py``; batches with equally many of each class in ``preprocessing.imbalance``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.batching.noise import gradient_chunks
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split
from course_lib.lab.training import Objective, cross_entropy, logits_of

# --- Orders of epochs -------------------------------------------------------------------------------------------------


def with_replacement(n: int, epochs: int, generator: torch.Generator) -> Tensor:
    """Return n independent draws an epoch, ``[epochs, n]``; an example is missing from an epoch with chance 1/e."""
    _check(n, epochs, generator)
    return torch.randint(n, (epochs, n), generator=generator)


def reshuffled(n: int, epochs: int, generator: torch.Generator) -> Tensor:
    """Return a new permutation for each epoch, ``[epochs, n]``: what ``fit`` does by itself."""
    _check(n, epochs, generator)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(epochs)])


def shuffled_once(n: int, epochs: int, generator: torch.Generator) -> Tensor:
    """Return one permutation for all epochs, ``[epochs, n]``: the batches hold the same examples again and again."""
    _check(n, epochs, generator)
    return torch.randperm(n, generator=generator).repeat(epochs, 1)


# --- Choices that are not uniform -------------------------------------------------------------------------------------


def probabilities(scores: Tensor, smoothing: float = 0.0) -> Tensor:
    r"""Return :math:`p_i = (1 - s)\,a_i / \sum_j a_j + s / N` for the scores a, float64 ``[N]``.

    ``smoothing`` s bounds the weights :math:`1/(N p_i)` by 1 / s. Where all scores are zero, all examples are alike.
    With s = 0 and the norms of the examples' gradients as scores the variance of a batch's gradient is the least.

    Raises
    ------
    ValueError : ``scores`` is not ``[N]``, or holds a negative or infinite one; ``smoothing`` is not from 0 to 1.
    """
    require("smoothing", smoothing, lambda s: is_number(s) and 0 <= s <= 1, "a number from 0 to 1")
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"scores has the shape {list(scores.shape)}: must be [N] with N at least 1")
    wide = scores.detach().double().cpu()
    if not bool((wide.isfinite() & (wide >= 0)).all()):
        raise ValueError(f"scores lie from {float(wide.min())} to {float(wide.max())}: must be finite and at least 0")
    total = wide.sum()
    share = wide / total if total > 0 else torch.full_like(wide, 1 / len(wide))
    return (1 - smoothing) * share + smoothing / len(wide)


def importance(p: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    r"""Draw ``size`` examples by ``p`` with replacement; return indices and weights :math:`w_i = 1/(N p_i)`.

    The weighted mean :math:`\frac1B\sum_b w_b g_b` is then unbiased: its expectation is the mean over all N examples.
    Only examples with :math:`p_i = 0` are out of it; see that none has that and a gradient.

    Parameters
    ----------
    p : probabilities of the N examples, ``[N]`` with the sum 1 (``probabilities``).

    Returns
    -------
    Indices int64 ``[size]`` and weights float64 ``[size]``, both on the CPU.

    Raises
    ------
    ValueError : ``p`` is no distribution.
    """
    at_least(1, size=size)
    _check_generator(generator)
    wide = _distribution(p)
    # the inverse of the distribution function: torch.multinomial stops at 2^24 examples and draws by the device
    edges = wide.cumsum(0)
    drawn = torch.rand(size, generator=generator, dtype=torch.float64) * edges[-1]
    # right: the first edge strictly above, so that an example of no probability is never met
    indices = torch.searchsorted(edges, drawn, right=True).clamp(max=int(wide.nonzero()[-1]))
    return indices, 1 / (len(wide) * wide[indices])


def sampling_variance(norms: Tensor, mean_norm: float, p: Tensor, size: int) -> float:
    r"""Return :math:`E|\hat G - G|^2` of the weighted mean over ``size`` examples drawn by ``p``.

    .. math:: \frac1B\left(\sum_i \frac{|g_i|^2}{N^2\,p_i} - |G|^2\right)

    With :math:`p_i = 1/N` it is tr / B. It is least for :math:`p_i \propto |g_i|`, where it is
    :math:`\big((\frac1N\sum_i|g_i|)^2 - |G|^2\big)/B`. Infinite where an example with a gradient is never drawn.
    Source: Katharopoulos & Fleuret 2018, arXiv:1803.00942.

    Parameters
    ----------
    norms : :math:`|g_i|` of the examples, ``[N]`` (``gradient_norms``).
    mean_norm : :math:`|G|`, the norm of their mean.

    Raises
    ------
    ValueError : ``p`` is no distribution, or not of as many examples.
    """
    at_least(1, size=size)
    require("mean_norm", mean_norm, lambda g: is_number(g) and g >= 0, "a finite number of at least 0")
    wide, squares = _distribution(p), norms.detach().double().cpu().square()
    if squares.shape != wide.shape:
        raise ValueError(f"p has the shape {list(wide.shape)}: must be that of norms, {list(squares.shape)}")
    seen = squares > 0  # 0 / 0 is an example without a gradient that is never drawn: it adds nothing
    return (float((squares[seen] / wide[seen]).sum()) / len(wide) ** 2 - mean_norm**2) / size


def _distribution(p: Tensor) -> Tensor:
    wide = p.detach().double().cpu()
    if wide.ndim != 1 or not len(wide) or not bool((wide >= 0).all()) or not abs(float(wide.sum()) - 1) < 1e-6:
        shape, total = list(wide.shape), float(wide.sum())
        raise ValueError(f"p of the shape {shape} has the sum {total:g}: must be [N] numbers of at least 0, the sum 1")
    return wide


# --- Scores -----------------------------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that each part had: amid a training step they may differ."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def loss_scores(model: nn.Module, split: Split) -> Tensor:
    """Return the cross-entropy of each example, ``[N]``, in evaluation mode."""
    logits = logits_of(model, split)
    return F.cross_entropy(logits, split.labels.to(logits.device), reduction="none")


def last_layer_scores(model: nn.Module, split: Split) -> Tensor:
    r"""Return :math:`|\mathrm{softmax}(z_i) - y_i|`, ``[N]``, in evaluation mode: the gradient's norm at the logits.

    One forward pass gives it, and the norm of the whole gradient is bounded by a constant times it.
    Source: Katharopoulos & Fleuret 2018, arXiv:1803.00942.
    """
    logits = logits_of(model, split)
    labels = split.labels.to(logits.device)
    return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)


def gradient_norms(model: nn.Module, split: Split, *, objective: Objective = cross_entropy, chunk: int = 64) -> Tensor:
    """Return the norm of each example's gradient, ``[N]``, in evaluation mode; ``chunk`` of them at once.

    They lie where the split does, as the other scores.

    Raises
    ------
    ValueError : as ``per_example_gradients``.
    """
    with evaluating(model):
        chunks = gradient_chunks(model, split, objective=objective, chunk=chunk)
        return torch.cat([rows.norm(dim=1) for rows in chunks]).to(split.device)


# --- Curricula --------------------------------------------------------------------------------------------------------


def exponential_pacing(step: int, *, start: float = 0.04, increase: float = 1.9, every: int = 100) -> float:
    r"""Return the part of the examples that a step (from 0) draws from: :math:`\min(1,\ a\,b^{\lfloor t/k\rfloor})`.

    Source: the fixed exponential pacing of Hacohen & Weinshall 2019, arXiv:1904.03626.

    Raises
    ------
    ValueError : ``start`` is not in (0, 1], ``increase`` below 1, or ``every`` below 1.
    """
    at_least(0, step=step)
    at_least(1, every=every)
    require("start", start, lambda a: is_number(a) and 0 < a <= 1, "a number above 0 and at most 1")
    require("increase", increase, lambda b: is_number(b) and b >= 1, "a number of at least 1")
    if increase == 1:
        return start
    # what is reached after so many rises never falls again, and increase**rises would overflow
    part = start
    for _ in range(step // every):
        part *= increase
        if part >= 1:
            return 1.0
    return part


def easiest(difficulty: Tensor, part: float) -> Tensor:
    """Return the indices of the easiest ``part`` of the examples, at least one, from the easiest on.

    Source: Bengio, Louradour, Collobert & Weston, Curriculum learning, ICML 2009.

    Parameters
    ----------
    difficulty : a number an example, ``[N]``, larger for a harder one: ``loss_scores`` of a trained network, say.

    Raises
    ------
    ValueError : ``difficulty`` is not ``[N]``, or ``part`` not in (0, 1].
    """
    require("part", part, lambda a: is_number(a) and 0 < a <= 1, "a number above 0 and at most 1")
    if difficulty.ndim != 1 or not len(difficulty):
        raise ValueError(f"difficulty has the shape {list(difficulty.shape)}: must be [N] with N at least 1")
    return difficulty.detach().cpu().argsort(stable=True)[: max(1, round(part * len(difficulty)))]


def _check(n: int, epochs: int, generator: torch.Generator) -> None:
    at_least(1, n=n, epochs=epochs)
    _check_generator(generator)


def _check_generator(generator: torch.Generator) -> None:
    require("generator", generator, lambda g: g.device.type == "cpu", "a CPU generator")
