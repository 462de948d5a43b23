r"""Members that differ by what they are shown: other examples, other pixels, other weights of the examples.

=======================  ===================================================  ==========================================
name                     what it does                                         source
=======================  ===================================================  ==========================================
``bagging``              each member learns a bootstrap sample                Breiman 1996, Machine Learning 24
``out_of_bag``           judged on what it has not seen                       Breiman 1996
``random_subspaces``     each sees some of the pixels                         Ho 1998, IEEE TPAMI 20
``adaboost``             examples count more where the members were wrong     Zhu et al. 2009, Statistics and Its
                                                                              Interface 2 (SAMME)
``boosted_networks``     the same with networks of the laboratory
``weighted_by_example``  the objective and data set for weights of examples
=======================  ===================================================  ==========================================

A bootstrap sample is drawn as by chapter 5's ``bootstrap``: the same generator gives the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.fusion.answers import check_labels, exact, members_logits
from course_lib.fusion.ensembles import Factory, Members, member_seeds
from course_lib.fusion.voting import votes
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset
from course_lib.lab.training import Recipe, fit, fresh, logits_of

# --- Bagging ----------------------------------------------------------------------------------------------------------


def bootstrap_rows(examples: int, members: int, generator: torch.Generator) -> Tensor:
    """Return as many examples as there are, drawn with replacement, for each member: int64 ``[M, N]``.

    About 37% (1/e) are in no given sample.

    Raises
    ------
    ValueError : ``examples`` or ``members`` is below 1.
    """
    at_least(1, examples=examples, members=members)
    return torch.stack([torch.randint(examples, (examples,), generator=generator) for _ in range(members)])


class Bagged(NamedTuple):
    """The ``members``, and the ``rows`` of the training split that each has learned, int64 ``[M, N]``."""

    members: Members
    rows: Tensor


def bagging(
    network: Factory, data: Dataset, recipe: Recipe, *, members: int, seed: int, generator: torch.Generator
) -> Bagged:
    """Return members trained on bootstrap samples, each with first weights and batches of its own, too.

    Raises
    ------
    ValueError : ``members`` is below 1.
    """
    rows = bootstrap_rows(len(data.train), members, generator)
    trained = []
    for own, sample in zip(member_seeds(members, seed), rows, strict=True):
        model = fresh(network, recipe, seed=own)
        fit(model, replace(data, train=data.train.subset(sample)), recipe, seed=own, progress=False)
        trained.append(model.eval())
    return Bagged(Members(trained), rows)


def out_of_bag(logits: Tensor, rows: Tensor) -> Tensor:
    """Return for each training example what those members say together that have not learned it, ``[N, K]``.

    Log-probabilities, float64: the mean of probabilities. NaN for an example that all have learned.

    Parameters
    ----------
    logits : those of all members on the training split, ``[M, N, K]``
    rows : what each has learned, int64 ``[M, N']``

    Raises
    ------
    ValueError : the two do not fit.
    """
    z = exact(logits)
    fits = rows.ndim == 2 and len(rows) == len(z) and rows.dtype == torch.int64 and rows.numel() > 0
    if not fits or int(rows.min()) < 0 or int(rows.max()) >= z.shape[1]:
        found = f"{rows.dtype} {list(rows.shape)}"
        raise ValueError(f"rows={found}: must be int64 [{len(z)}, …], examples from 0 to {z.shape[1] - 1}")
    learned = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device).scatter_(1, rows.to(z.device), True)
    fresh_ones = (~learned).double()[:, :, None]
    return ((z.softmax(2) * fresh_ones).sum(0) / fresh_ones.sum(0)).log()


def out_of_bag_error(bagged: Bagged, data: Dataset) -> float:
    """Return the share of training examples named wrongly by the members that have not learned them.

    An estimate of the test error for which nothing has to be held back; a bit too high, since each example is judged by
    about a third of the members. Those that all have learned are left out.
    """
    log_q = out_of_bag(members_logits([*bagged.members.networks], data.train), bagged.rows)
    judged = ~log_q[:, 0].isnan()
    require("members", len(bagged.members), lambda _: bool(judged.any()), "so many that an example is judged by one")
    return (log_q.argmax(1) != data.train.labels.to(log_q.device))[judged].double().mean().item()


# --- Random subspaces -------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A network that sees its inputs times a mask of zeros and ones, of one example's shape; the mask is a buffer."""

    mask: Tensor

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mask", mask)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …]`` to logits ``[N, K]``."""
        return self.model(x * self.mask.to(x))


def pixel_mask(input_shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """Return a mask that keeps a random ``share`` of the pixels (all channels of each), or of the columns of a table.

    Raises
    ------
    ValueError : ``share`` is not above 0 and at most 1.
    """
    return patch_mask(input_shape, 1, share, generator)


def patch_mask(input_shape: Sequence[int], patch: int, share: float, generator: torch.Generator) -> Tensor:
    """Return a mask that keeps a random ``share`` of the squares of ``patch`` times ``patch`` pixels, at least one.

    After normalisation 0 is the mean colour of the training split.

    Raises
    ------
    ValueError : ``patch`` does not divide height and width, or ``share`` is not above 0 and at most 1.
    """
    require("share", share, lambda s: is_number(s) and 0 < s <= 1, "a number above 0 and at most 1")
    at_least(1, patch=patch)
    sides = [size // patch for size in (input_shape if len(input_shape) == 1 else input_shape[1:])]
    fits = len(input_shape) in (1, 3) and all(size % patch == 0 for size in input_shape[-len(sides) :])
    require("patch", patch, lambda _: fits, f"a divisor of the sides of {tuple(input_shape)}")
    places = torch.zeros(sides).flatten()
    places[torch.randperm(len(places), generator=generator)[: max(1, round(share * len(places)))]] = 1
    mask = places.view(sides)
    for dim in range(mask.ndim):
        mask = mask.repeat_interleave(patch, dim)
    return mask.expand(*input_shape).clone()


def random_subspaces(network: Factory, data: Dataset, recipe: Recipe, masks: Sequence[Tensor], *, seed: int) -> Members:
    """Return members each of which sees its inputs through one of the masks, in training and ever after.

    ``masks = [pixel_mask(data.input_shape, 0.5, generator) for _ in range(8)]``

    Raises
    ------
    ValueError : there are no masks.
    """
    require("masks", len(masks), lambda count: count >= 1, "at least one mask")
    trained = []
    for own, mask in zip(member_seeds(len(masks), seed), masks, strict=True):
        model = Masked(fresh(network, recipe, seed=own), mask)
        fit(model, data, recipe, seed=own, progress=False)
        trained.append(model.eval())
    return Members(trained)


# --- Boosting ---------------------------------------------------------------------------------------------------------


class Boost(NamedTuple):
    """What a round of boosting gives: the member's voice ``alpha``, and the examples' new weights ``[N]``, of sum 1."""

    alpha: float
    weights: Tensor


def samme(weights: Tensor, right: Tensor, classes: int) -> Boost:
    r"""Return the voice of a member that is ``right`` on some examples, and how much each counts for the next one.

    .. math:: \varepsilon=\frac{\sum_{i\text{ wrong}}w_i}{\sum_iw_i},\qquad
        \alpha=\log\frac{1-\varepsilon}\varepsilon+\log(K-1),\qquad w_i\leftarrow w_i\,e^{\alpha\,[i\text{ wrong}]}

    For two classes it is AdaBoost. Alpha is above 0 where the member is better than guessing, :math:`1-1/K`; without
    an error it is infinite, and the weights stay.

    Raises
    ------
    ValueError : the two do not fit, a weight is below 0 or none above, or ``classes`` is below 2.
    """
    at_least(2, classes=classes)
    w = weights.detach().double()
    if w.ndim != 1 or right.shape != w.shape or right.dtype != torch.bool or (w < 0).any() or not w.sum() > 0:
        found = f"{list(weights.shape)}, right={right.dtype} {list(right.shape)}"
        raise ValueError(f"weights={found}: must be numbers of at least 0, not all of them 0, and bool, both [N]")
    w = w / w.sum()
    error = float(w[~right].sum())
    if error <= 0:
        return Boost(float("inf"), w)
    alpha = float(torch.tensor(1 - error, dtype=torch.float64).log() - torch.tensor(error, dtype=torch.float64).log())
    alpha += float(torch.tensor(classes - 1, dtype=torch.float64).log())
    grown = torch.where(right, w, w * torch.tensor(alpha, dtype=torch.float64).exp().to(w.device))
    return Boost(alpha, grown / grown.sum())


class Boosting(NamedTuple):
    """What each round has made: the ``learners``, their ``alphas``, the ``weights`` ``[rounds, N]`` they learned by."""

    learners: list[Any]
    alphas: list[float]
    weights: Tensor


def adaboost(learn: Callable[[Tensor], tuple[Any, Tensor]], labels: Tensor, classes: int, *, rounds: int) -> Boosting:
    """Boost anything that learns from weighted examples: ``learn(weights)`` -> (learner, what it names, int64 ``[N]``).

    It ends early with a learner that is right everywhere, whose voice is then 1 as in scikit-learn, and before one that
    is no better than guessing.
    ``boosted_votes`` counts the voices.

    Raises
    ------
    ValueError : labels are no classes, ``rounds`` is below 1, or already the first learner is no better than guessing.
    """
    at_least(1, rounds=rounds)
    check_labels(labels, len(labels), classes)
    weights = torch.full((len(labels),), 1 / len(labels), dtype=torch.float64, device=labels.device)
    found = Boosting([], [], torch.zeros(0))
    by = []
    for _ in range(rounds):
        learner, named = learn(weights)
        alpha, next_weights = samme(weights, named.to(labels.device) == labels, classes)
        if alpha <= 0:
            break
        found.learners.append(learner)
        by.append(weights)
        found.alphas.append(1.0 if alpha == float("inf") else alpha)
        if alpha == float("inf"):
            break
        weights = next_weights
    if not by:
        raise ValueError(f"learn={alpha:.3g} (its alpha): must be better than guessing, alpha above 0")
    return found._replace(weights=torch.stack(by))


def boosted_votes(named: Tensor, alphas: Sequence[float], classes: int) -> Tensor:
    """Return the sum of the voices for each class, ``[M, N]`` named classes to float64 ``[N, K]``."""
    return votes(named, classes, list(alphas))


def example_weighted(model: nn.Module, x: Any, y: Tensor, *, labels: Tensor, weights: Tensor) -> Tensor:
    r"""Return :math:`\tfrac1B\sum_b\tilde w_{y_b}\,\ell_b`, the cross-entropy times the weights of the examples.

    The labels y ``[B]`` of a batch are the numbers of its examples, as ``weighted_by_example`` makes them; ``labels``
    and ``weights``, both ``[N]``, say what they stand for. The weights are made to have the mean 1, so that the
    learning rate keeps its meaning.
    """
    numbers = y.to(labels.device)
    losses = F.cross_entropy(model(x), labels[numbers].to(y.device), reduction="none")
    return ((weights / weights.mean())[numbers].to(losses) * losses).mean()


def weighted_by_example(data: Dataset, weights: Tensor) -> tuple[Dataset, Callable[..., Tensor]]:
    """Return the data set with example numbers for training labels, and the objective that gives each its weight.

    ``numbered, objective = weighted_by_example(data, weights)``, then
    ``fit(model, numbered, replace(recipe, objective=objective))``. Validation and test labels stay. Augmentations that
    mix labels cannot be used with it.

    Raises
    ------
    ValueError : the weights are not one number of at least 0 for each training example, or all are 0.
    """
    if weights.shape != data.train.labels.shape or not (weights >= 0).all() or not weights.any():
        found = f"{list(weights.shape)} from {float(weights.min()):g}"
        raise ValueError(f"weights={found}: must be {len(data.train)} numbers of at least 0, not all of them 0")
    labels = data.train.labels
    numbers = torch.arange(len(labels), device=labels.device)
    numbered = replace(data, train=replace(data.train, labels=numbers))
    return numbered, partial(example_weighted, labels=labels, weights=weights.to(labels.device))


class Voices(nn.Module):
    """Networks whose votes count by their voice: gives the sums over classes ``[N, K]``, over that of all voices."""

    def __init__(self, networks: Sequence[nn.Module], alphas: Sequence[float]) -> None:
        super().__init__()
        require("networks", [*networks], bool, "at least one network")
        require("alphas", list(alphas), lambda a: len(a) == len(networks), f"{len(networks)} numbers, one a network")
        self.networks, self.alphas = nn.ModuleList(networks), tuple(alphas)
        self.train(self.networks[0].training)

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to shares of the voices ``[N, K]``."""
        logits = [network(x) for network in self.networks]
        named = torch.stack([each.argmax(1) for each in logits])
        return (boosted_votes(named, self.alphas, logits[0].shape[1]) / sum(self.alphas)).to(logits[0])


def boosted_networks(network: Factory, data: Dataset, recipe: Recipe, *, rounds: int, seed: int) -> Voices:
    """Return networks boosted by ``adaboost``, each trained with the weighted cross-entropy of ``example_weighted``.

    A network that fits all training examples leaves nothing to boost: small ones and short recipes are meant. The
    recipe's objective is not used.

    Raises
    ------
    ValueError : as ``adaboost``.
    """
    seeds = iter(member_seeds(rounds, seed))

    def learn(weights: Tensor) -> tuple[nn.Module, Tensor]:
        own = next(seeds)
        numbered, objective = weighted_by_example(data, weights)
        model = fresh(network, recipe, seed=own)
        fit(model, numbered, replace(recipe, objective=objective), seed=own, progress=False)
        return model.eval(), logits_of(model, data.train).argmax(1)

    found = adaboost(learn, data.train.labels, len(data.classes), rounds=rounds)
    return Voices(found.learners, found.alphas)
