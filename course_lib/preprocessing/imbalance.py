"""Imbalance: few examples of some classes. What can be changed: the weights, the sample, or the logits.

=================================  ==================================================  ================================
name                               what it does                                        source
=================================  ==================================================  ================================
``class_weights``                  a rare class's examples count more, by 1 / n        scikit-learn, ``"balanced"``
``effective_number_weights``       the same, less so where examples overlap            Cui et al. 2019, arXiv:1901.05555
``weighted_cross_entropy``         the objective with a weight for each class          torch, ``weight=``
``oversample``, ``undersample``    a split with equally many of each class
``balanced_sample``                a sample in which each class is as likely           torch, ``WeightedRandomSampler``
``balanced_batches``               batches with equally many of each class
``smote``                          new rows between neighbours of a rare class         Chawla et al., JAIR 16, 2002
``adjust_logits``                  a trained network, told that classes are as likely  Menon et al. 2020,
``logit_adjusted_cross_entropy``   the objective that learns it at once                arXiv:2007.07314
``long_tailed``                    makes a split imbalanced, for experiments           Cui et al. 2019, arXiv:1901.05555
``balanced_accuracy``              the mean of the recalls: what to measure            Brodersen et al., ICPR 2010
=================================  ==================================================  ================================

Labels are int64 ``[N]`` from 0 to ``classes`` - 1. Generators are CPU generators: the draws are the same on every
device. Settings of objectives are given by ``functools.partial``, which can be pickled and fingerprinted:
``Recipe(objective=partial(weighted_cross_entropy, weights=class_weights(labels, 10)))``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split, batches
from course_lib.lab.training import logits_of
from course_lib.preprocessing.drawing import check_generator
from course_lib.preprocessing.scaling import checked_rows


def class_counts(labels: Tensor, classes: int | None = None) -> Tensor:
    """Return how many examples each class has, int64 ``[K]``; ``classes`` is by default the largest label and 1.

    Raises
    ------
    ValueError : ``labels`` is empty or not int64 ``[N]``, or a label lies outside of 0 to ``classes`` - 1.
    """
    if labels.dtype != torch.int64 or labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels is {labels.dtype} {list(labels.shape)}: must be int64 [N] with N at least 1")
    if classes is not None:
        at_least(1, classes=classes)
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or (classes is not None and most >= classes):
        upper = "0 or more" if classes is None else f"from 0 to {classes - 1}"
        raise ValueError(f"labels lie from {least} to {most}: must be {upper}")
    return labels.bincount(minlength=classes or 0)


def class_prior(labels: Tensor, classes: int | None = None) -> Tensor:
    """Return the share of each class, float64 ``[K]``; every class must have an example."""
    counts = _none_empty(class_counts(labels, classes))
    return counts.double() / counts.sum()


def _none_empty(counts: Tensor) -> Tensor:
    if empty := (counts == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"labels holds no example of class {empty[0]}: must hold one of each of {len(counts)} classes")
    return counts


# --- Weights ----------------------------------------------------------------------------------------------------------


def class_weights(labels: Tensor, classes: int | None = None) -> Tensor:
    r"""Return :math:`w_k = N / (K n_k)`, float64 ``[K]``: all classes together weigh the same.

    As scikit-learn's ``compute_class_weight("balanced")``: the mean weight of an example is 1.

    Raises
    ------
    ValueError : a class has no example, or bad labels (``class_counts``).
    """
    counts = _none_empty(class_counts(labels, classes)).double()
    return counts.sum() / (len(counts) * counts)


def effective_number_weights(labels: Tensor, classes: int | None = None, *, beta: float = 0.999) -> Tensor:
    r"""Return :math:`w_k \propto (1 - \beta)/(1 - \beta^{n_k})`, float64 ``[K]``, with the sum K.

    :math:`(1 - \beta^n)/(1 - \beta)` is the effective number of n examples that overlap: at ``beta`` 0 it is 1 (all
    weights equal), near 1 it is n. Source: Cui et al. 2019, arXiv:1901.05555.

    Raises
    ------
    ValueError : not ``0 <= beta < 1``, a class has no example, or bad labels (``class_counts``).
    """
    require("beta", beta, lambda b: is_number(b) and 0 <= b < 1, "a number of at least 0 and less than 1")
    counts = _none_empty(class_counts(labels, classes)).double()
    effective = (1 - beta**counts) / (1 - beta)
    return len(counts) / effective / (1 / effective).sum()


def weighted_cross_entropy(model: nn.Module, x: Tensor, y: Tensor, *, weights: Tensor) -> Tensor:
    """Cross-entropy with the ``weights`` ``[K]`` of the classes: the weighted mean over the batch, as in torch."""
    logits = model(x)
    return F.cross_entropy(logits, y, weight=_fitting("weights", weights, logits))


def _fitting(name: str, values: Tensor, logits: Tensor) -> Tensor:
    if values.shape != logits.shape[1:2]:
        raise ValueError(f"{name} has the shape {list(values.shape)}: must be [{logits.shape[1]}], one for each logit")
    return values.to(logits)


# --- Samples ----------------------------------------------------------------------------------------------------------


def oversample(split: Split, generator: torch.Generator) -> Split:
    """Repeat examples of the rarer classes until each has as many as the largest, none left out.

    What is missing is drawn with replacement. Only the training split: copies on both sides of a cut are leakage.
    """
    groups = _members(split.labels)
    most = max(map(len, groups))
    return _chosen(split, [torch.cat([group, _draw(group, most - len(group), generator)]) for group in groups])


def undersample(split: Split, generator: torch.Generator) -> Split:
    """Leave out examples, drawn without replacement, until each class has as few as the smallest."""
    groups = _members(split.labels)
    least = min(map(len, groups))
    return _chosen(split, [_shuffled(group, generator)[:least] for group in groups])


def balanced_weights(labels: Tensor) -> Tensor:
    """Return a weight for each example, float64 ``[N]``, by which every class that occurs is drawn as often."""
    return 1 / class_counts(labels).double()[labels]


def balanced_sample(split: Split, size: int, generator: torch.Generator) -> Split:
    """Draw ``size`` examples with replacement, every class as likely; their order is random."""
    at_least(1, size=size)
    check_generator(generator)
    weights = balanced_weights(split.labels).cpu()
    return split.subset(torch.multinomial(weights, size, replacement=True, generator=generator))


def balanced_batches(
    split: Split, per_class: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in batches with ``per_class`` examples of each class that occurs: normalised ``x``, and labels ``y``.

    The pass ends when the largest class has been seen (its last batch filled up with examples seen already). Smaller
    classes go round, shuffled anew each time, so that no example is seen a second time before all have been seen once.
    """
    at_least(1, per_class=per_class)
    groups = _members(split.labels)
    count = math.ceil(max(map(len, groups)) / per_class)

    def rounds(group: Tensor) -> Tensor:
        needed = count * per_class
        return torch.cat([_shuffled(group, generator) for _ in range(math.ceil(needed / len(group)))])[:needed]

    order = torch.stack([rounds(group).view(count, per_class) for group in groups], 1)  # [batches, classes, per_class]
    return batches(split.subset(order.flatten()), len(groups) * per_class, dtype=dtype)


def long_tailed(split: Split, ratio: float, generator: torch.Generator) -> Split:
    r"""Leave out examples so that the classes fall off exponentially: class k keeps :math:`n\,r^{-k/(K-1)}`.

    n is the smallest class's number, r is ``ratio``: the first class has r times as many as the last.
    Source: Cui et al. 2019, arXiv:1901.05555.

    Raises
    ------
    ValueError : ``ratio`` below 1, or so large that nothing would be left of the last class; fewer than two classes.
    """
    require("ratio", ratio, lambda r: is_number(r) and r >= 1, "a number of at least 1")
    groups = _members(split.labels)
    if len(groups) < 2:
        raise ValueError("split holds one class: must hold at least two")
    most = min(map(len, groups))
    sizes = [round(most * ratio ** (-k / (len(groups) - 1))) for k in range(len(groups))]
    if sizes[-1] < 1:
        raise ValueError(f"ratio={ratio!r}: must be less than {2 * most}, for the last class to keep an example")
    return _chosen(split, [_shuffled(group, generator)[:size] for group, size in zip(groups, sizes, strict=True)])


def _members(labels: Tensor) -> list[Tensor]:
    """The indices of each class that occurs, on the CPU, where they are drawn from."""
    counts = class_counts(labels).cpu()
    return list(labels.cpu().argsort(stable=True).split(counts[counts > 0].tolist()))


def _shuffled(group: Tensor, generator: torch.Generator) -> Tensor:
    check_generator(generator)
    return group[torch.randperm(len(group), generator=generator)]


def _draw(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    check_generator(generator)
    return group[torch.randint(len(group), (size,), generator=generator)]


def _chosen(split: Split, groups: list[Tensor]) -> Split:
    return split.subset(torch.cat(groups).sort().values)


def smote(x: Tensor, labels: Tensor, *, neighbours: int = 5, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    r"""Bring each class to the size of the largest by new rows between neighbours: ``[N, D] -> [M, D]``, and labels.

    A new row is :math:`x_i + u\,(x_j - x_i)` with a row drawn from the class, one of its ``neighbours`` nearest in the
    class, and :math:`u` uniform in [0, 1): a point on the segment between them. The given rows come first. Columns
    count by their size: scale first. For numbers only: between two categories there is nothing, and between two
    images a double exposure. Source: Chawla et al., JAIR 16, 2002.

    Raises
    ------
    ValueError : a class that needs new rows has no more than ``neighbours`` of its own, bad rows, or bad labels.
    """
    at_least(1, neighbours=neighbours)
    check_generator(generator)
    wide = checked_rows("x", x, complete=True)
    groups = _members(labels)
    if len(labels) != len(x):
        raise ValueError(f"labels has {len(labels)} entries: must have one for each of {len(x)} rows")
    most = max(map(len, groups))
    rows, names = [wide], [labels]
    for group in groups:
        missing, name = most - len(group), labels[group[0]]
        if not missing:
            continue
        if len(group) <= neighbours:
            raise ValueError(
                f"neighbours={neighbours}: must be less than {len(group)}, the number of rows of class {int(name)}"
            )
        own = wide[group.to(x.device)]
        away = torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
        nearest = away.topk(neighbours, largest=False).indices
        base = torch.randint(len(group), (missing,), generator=generator).to(x.device)
        other = torch.randint(neighbours, (missing,), generator=generator).to(x.device)
        share = torch.rand(missing, 1, generator=generator, dtype=torch.float64).to(wide)
        rows.append(own[base] + share * (own[nearest[base, other]] - own[base]))
        names.append(name.expand(missing))
    return torch.cat(rows).to(x.dtype), torch.cat(names)


# --- Logits -----------------------------------------------------------------------------------------------------------


class AdjustedLogits(nn.Module):
    """A network whose logits ``[B, K]`` have ``shift`` ``[K]`` added; made by ``adjust_logits``."""

    shift: Tensor

    def __init__(self, model: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("shift", shift)
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        return logits + _fitting("prior", self.shift, logits)


def adjust_logits(model: nn.Module, prior: Tensor, *, tau: float = 1.0) -> nn.Module:
    r"""Take the classes' shares out of a trained network's logits: :math:`f_k(x) - \tau\log\pi_k`.

    A network trained on many of class k learns to expect it. With :math:`\tau = 1` what is left is the posterior under
    equal shares, which is best for the balanced error. The network is shared, not copied.
    Source: Menon et al. 2020, arXiv:2007.07314.

    Parameters
    ----------
    prior : the shares :math:`\pi` of the classes in training, ``[K]`` (``class_prior``).

    Raises
    ------
    ValueError : ``prior`` is not positive with the sum 1, or ``tau`` no finite number.
    """
    return AdjustedLogits(model, -_log_prior(prior, tau))


def logit_adjusted_cross_entropy(model: nn.Module, x: Tensor, y: Tensor, *, prior: Tensor, tau: float = 1.0) -> Tensor:
    r"""Cross-entropy of :math:`f_k(x) + \tau\log\pi_k`: the shares are given, so that the network need not learn them.

    Rare classes get the larger margin. After training the logits are used as they are.
    Source: Menon et al. 2020, arXiv:2007.07314.

    Raises
    ------
    ValueError : as ``adjust_logits``.
    """
    logits = model(x)
    return F.cross_entropy(logits + _fitting("prior", _log_prior(prior, tau), logits), y)


def _log_prior(prior: Tensor, tau: float) -> Tensor:
    require("tau", tau, is_number, "a finite number")
    if prior.ndim != 1 or not bool((prior > 0).all()) or abs(float(prior.sum()) - 1) > 1e-4:
        raise ValueError(f"prior={prior.tolist()}: must be one positive share for each class, with the sum 1")
    return tau * prior.log()


# --- Measuring --------------------------------------------------------------------------------------------------------


def recalls(model: nn.Module, split: Split) -> Tensor:
    """Return the fraction of each class's examples that the model finds, float64 ``[K]``; NaN where it has none."""
    logits = logits_of(model, split)
    labels = split.labels.to(logits.device)
    right = (logits.argmax(1) == labels).double()
    counts = class_counts(labels, logits.shape[1]).double()
    return torch.zeros_like(counts).index_add(0, labels, right) / counts


def balanced_accuracy(model: nn.Module, split: Split) -> float:
    """Return the mean recall of the classes that occur: each counts the same, however rare.

    As scikit-learn's ``balanced_accuracy_score``. Always naming the largest class scores 1 / K.
    Source: Brodersen et al., The balanced accuracy and its posterior distribution, ICPR 2010.
    """
    return float(recalls(model, split).nanmean())
