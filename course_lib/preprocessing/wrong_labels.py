"""Wrong labels: injected, to know the truth, and found again by what a network thinks of examples it has not seen.

===================================  ================================================  ================================
name                                 what it does                                      source
===================================  ================================================  ================================
``flip_symmetric``                   gives some examples any other class               Han et al. 2018, arXiv:1804.06872
``flip_pairwise``                    gives some examples the next class                Han et al. 2018, arXiv:1804.06872
``out_of_sample_probabilities``      predictions by cross-validation
``loss_ranking``                     the highest loss first: the baseline
``confident_joint``                  counts given against likely labels                Northcutt, Jiang & Chuang 2021,
``estimated_joint``                  the same as shares, calibrated                    JAIR, arXiv:1911.00068
``off_diagonal``                     examples confidently counted elsewhere
``prune_by_class``                   the least likely of each class
``prune_by_noise_rate``              the largest margins of each pair of classes
``precision_and_recall``             what was found against the truth
===================================  ================================================  ================================

Labels are int64 ``[N]``, probabilities ``[N, K]``; what is found is a mask, bool ``[N]``. The methods of Northcutt et
al. rest on one idea: a class has a threshold of its own, the mean probability that its own examples get, so that a
class of which the network is always unsure is not called wrong as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset, Split
from course_lib.lab.training import Recipe, fit, fresh, logits_of
from course_lib.preprocessing.drawing import check_generator
from course_lib.preprocessing.imbalance import class_counts

# --- Making labels wrong ----------------------------------------------------------------------------------------------


def flip_symmetric(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Give ``round(share * N)`` examples, drawn without replacement, one of the other classes, each as likely.

    Raises
    ------
    ValueError : ``share`` is no number from 0 to 1, ``classes`` below 2, or labels outside of them.
    """
    rows = _drawn(labels, share, classes, generator)
    step = torch.randint(1, classes, (len(rows),), generator=generator)
    return _moved(labels, rows, step, classes)


def flip_pairwise(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Give ``round(share * N)`` examples, drawn without replacement, the next class (the last class: the first).

    So are mistakes that have a system, like that of 4 for 9. At a share above a half they outvote the truth.

    Raises
    ------
    ValueError : as ``flip_symmetric``.
    """
    rows = _drawn(labels, share, classes, generator)
    return _moved(labels, rows, torch.ones(len(rows), dtype=torch.int64), classes)


def _drawn(labels: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    require("share", share, lambda s: is_number(s) and 0 <= s <= 1, "a number from 0 to 1")
    at_least(2, classes=classes)
    class_counts(labels, classes)
    check_generator(generator)
    return torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]


def _moved(labels: Tensor, rows: Tensor, step: Tensor, classes: int) -> Tensor:
    moved, rows = labels.clone(), rows.to(labels.device)
    moved[rows] = (moved[rows] + step.to(labels.device)) % classes
    return moved


# --- Predictions for examples that were not trained on ----------------------------------------------------------------

Predict = Callable[[Split, Split], Tensor]
"""``(train, held_out) -> probabilities`` ``[held out, K]``: trains on the one part, predicts the other."""


def by_network(data: Dataset, network: Callable[[], nn.Module], recipe: Recipe, *, seed: int) -> Predict:
    """Return a ``Predict`` that trains a new ``network`` by ``recipe``, always from the first weights of ``seed``.

    ``data`` gives the validation split, for the recipes that look at it.
    """

    def predict(train: Split, held_out: Split) -> Tensor:
        model = fresh(network, recipe, seed=seed)
        fit(model, replace(data, train=train), recipe, seed=seed, progress=False)
        return logits_of(model, held_out).softmax(1)

    return predict


def fold_numbers(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """Return for each example the fold that it belongs to, int64 ``[N]``: shuffled, and equal within each class.

    Raises
    ------
    ValueError : ``folds`` below 2 or above the number of examples, or bad labels.
    """
    at_least(2, folds=folds)
    check_generator(generator)
    class_counts(labels)
    require("folds", folds, lambda f: f <= len(labels), f"at most {len(labels)}, the number of examples")
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels.cpu()[order].argsort(stable=True)]  # class by class, shuffled within
    numbers = torch.empty_like(order)
    numbers[order] = torch.arange(len(labels)) % folds
    return numbers.to(labels.device)


def out_of_sample_probabilities(
    split: Split, predict: Predict, *, folds: int = 5, generator: torch.Generator
) -> Tensor:
    """Return probabilities ``[N, K]``, each by a network that was trained on the other folds.

    A network fits the wrong labels that it trains on; only what it says of others can contradict them. Folds hold the
    given classes in equal shares. Inputs are normalised by the figures of the whole split, which hold no labels.

    Raises
    ------
    ValueError : as ``fold_numbers``; or ``predict`` returns no row for each example.
    """
    numbers = fold_numbers(split.labels, folds, generator)
    parts, places = [], []
    for fold in range(folds):
        held_out = (numbers == fold).nonzero()[:, 0]
        part = predict(split.subset(numbers != fold), split.subset(held_out))
        if part.ndim != 2 or len(part) != len(held_out):
            raise ValueError(f"predict returned the shape {list(part.shape)}: must be [{len(held_out)}, classes]")
        parts.append(part.to(split.device))
        places.append(held_out)
    return torch.cat(parts)[torch.cat(places).argsort()]


# --- Finding them -----------------------------------------------------------------------------------------------------


def loss_ranking(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the examples' indices ``[N]`` by falling cross-entropy: the baseline that every method has to beat.

    It does not say where the wrong ones end: the first ``n`` are those to look at first.
    """
    own = _of_given(*_checked(labels, probabilities))
    return own.argsort(stable=True)


def class_thresholds(labels: Tensor, probabilities: Tensor) -> Tensor:
    r"""Return :math:`t_k`, the mean probability of class k over the examples labelled so, float64 ``[K]``.

    Raises
    ------
    ValueError : a class has no example, or labels and probabilities do not fit together.
    """
    labels, p = _checked(labels, probabilities)
    sums = torch.zeros_like(p[0]).index_add(0, labels, _of_given(labels, p))
    return sums / class_counts(labels, p.shape[1])


def confident_labels(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return each example's likely label, int64 ``[N]``, or -1: the most probable class of those above their threshold.

    The class may be another than the most probable of all, which may be below its own, higher threshold. (The package
    cleanlab takes that one once two or more classes are above theirs; here the paper is followed.)
    """
    thresholds = class_thresholds(labels, probabilities)
    _, p = _checked(labels, probabilities)
    above = p >= thresholds - 1e-6  # where all get the same probability, rounding should not put them below its mean
    likely = p.masked_fill(~above, -1).argmax(1)
    return likely.masked_fill(~above.any(1), -1)


def confident_joint(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return counts int64 ``[K, K]``: examples with the given label i (row) that confidently belong to j (column).

    Examples without a class above its threshold are not counted.
    Source: Northcutt, Jiang & Chuang 2021, arXiv:1911.00068.

    Raises
    ------
    ValueError : as ``class_thresholds``.
    """
    likely, classes = confident_labels(labels, probabilities), probabilities.shape[1]
    labels, sure = labels.to(likely.device), likely >= 0
    return (labels[sure] * classes + likely[sure]).bincount(minlength=classes**2).view(classes, classes)


def estimated_joint(labels: Tensor, probabilities: Tensor) -> Tensor:
    r"""Return the estimated joint distribution of given and true labels, float64 ``[K, K]`` with the sum 1.

    .. math:: Q_{ij} = \frac{n_i}{N}\,\frac{C_{ij}}{\sum_j C_{ij}}

    Each row has the share that its class has among the given labels; no row of the counts is empty, since the most
    probable of a class's own examples is not below their mean. ``1 - Q.trace()`` is the estimated share of wrong
    labels. Source: as ``confident_joint``.
    """
    counts = confident_joint(labels, probabilities).double()
    given = class_counts(labels, len(counts)).to(counts)
    return counts / counts.sum(1, keepdim=True) * (given / given.sum())[:, None]


def off_diagonal(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Return the examples that ``confident_joint`` counts off its diagonal: they confidently belong elsewhere."""
    likely = confident_labels(labels, probabilities)
    return (likely >= 0) & (likely != labels.to(likely.device))


def prune_by_class(labels: Tensor, probabilities: Tensor) -> Tensor:
    r"""Return of each class i the :math:`N\sum_{j \ne i} Q_{ij}` examples with the lowest probability of their label.

    How many comes from ``estimated_joint``, rounded; which ones from the probabilities alone.
    """
    joint = estimated_joint(labels, probabilities)
    labels, p = _checked(labels, probabilities)
    wrong = (joint.sum(1) - joint.diagonal()) * len(labels)
    found = torch.zeros_like(labels, dtype=torch.bool)
    for i in range(len(joint)):
        members = (labels == i).nonzero()[:, 0]
        found[members[p[members, i].argsort(stable=True)[: round(float(wrong[i]))]]] = True
    return found


def prune_by_noise_rate(labels: Tensor, probabilities: Tensor) -> Tensor:
    r"""Return for each pair of classes the :math:`N Q_{ij}` examples of i with the largest margin :math:`p_j - p_i`.

    Unlike ``prune_by_class`` it asks what an example should be instead. One that is found for two classes counts once.
    """
    joint = estimated_joint(labels, probabilities) * len(labels)
    labels, p = _checked(labels, probabilities)
    found = torch.zeros_like(labels, dtype=torch.bool)
    for i in range(len(joint)):
        members = (labels == i).nonzero()[:, 0]
        for j in range(len(joint)):
            if i != j:
                margin = p[members, j] - p[members, i]
                count = round(float(joint[i, j]))
                found[members[margin.argsort(descending=True, stable=True)[:count]]] = True
    return found


class PrecisionRecall(NamedTuple):
    """Fractions: of what was found, how much is wrong; and of what is wrong, how much was found."""

    precision: float
    recall: float


def precision_and_recall(found: Tensor, truly_wrong: Tensor) -> PrecisionRecall:
    """Compare two masks bool ``[N]``. A fraction of nothing (nothing found, nothing wrong) is NaN.

    Raises
    ------
    ValueError : they are no masks of one length.
    """
    for name, mask in (("found", found), ("truly_wrong", truly_wrong)):
        if mask.dtype != torch.bool or mask.ndim != 1 or len(mask) != len(found):
            raise ValueError(f"{name} is {mask.dtype} {list(mask.shape)}: must be a mask, bool [{len(found)}]")
    truly_wrong = truly_wrong.to(found.device)
    both = (found & truly_wrong).sum().double()
    return PrecisionRecall(float(both / found.sum()), float(both / truly_wrong.sum()))


def _of_given(labels: Tensor, p: Tensor) -> Tensor:
    return p.gather(1, labels[:, None])[:, 0]


def _checked(labels: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and probabilities in one place, these in float64 (float32 where a device has no other)."""
    p = probabilities
    if p.ndim != 2 or len(p) != len(labels) or not p.is_floating_point():
        raise ValueError(f"probabilities is {p.dtype} {list(p.shape)}: must be floating point [{len(labels)}, classes]")
    if not bool((p >= 0).all()) or not bool(((p.sum(1) - 1).abs() < 1e-2).all()):
        raise ValueError("probabilities holds rows that are no distribution: must be at least 0 with the sum 1")
    counts = class_counts(labels, p.shape[1])
    if empty := (counts == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"labels holds no example of class {empty[0]}: must hold one of each of {len(counts)} classes")
    return labels.to(p.device), p if p.device.type == "mps" else p.double()
