r"""A network that learns how to put the answers of others together.

=====================  ====================================================  ===========================================
name                   what it does                                          source
=====================  ====================================================  ===========================================
``out_of_fold``        what members say of examples they have not learned    Wolpert 1992, Neural Networks 5
``fit_logistic``       the learner on top: multinomial logistic regression   –
``stacking``           both, and the members trained again on all            Wolpert 1992; Ting & Witten 1999, JAIR 10
=====================  ====================================================  ===========================================

A member looks better on the examples that it has learned than it is; a learner on top that saw those answers would
trust it too much. Folds and networks trained on all but one of them are chapter 1's, where they find wrong labels
(``out_of_sample_probabilities``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.fusion._solving import least
from course_lib.fusion.answers import check_labels
from course_lib.fusion.ensembles import Factory, member_seeds
from course_lib.lab.arguments import is_number, require
from course_lib.lab.data import Dataset
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.preprocessing.wrong_labels import by_network, out_of_sample_probabilities


def out_of_fold(
    networks: Sequence[Factory], data: Dataset, recipe: Recipe, *, folds: int = 5, seed: int, generator: torch.Generator
) -> Tensor:
    """Return probabilities ``[M, N, K]`` of each kind of network for the training examples, learned on other folds.

    All kinds see the same folds.

    Raises
    ------
    ValueError : there are no networks, or ``folds`` is below 2 or above the number of examples.
    """
    require("networks", [*networks], bool, "at least one factory")
    state = generator.get_state()
    found = []
    for own, network in zip(member_seeds(len(networks), seed), networks, strict=True):
        generator.set_state(state)
        predict = by_network(data, network, recipe, seed=own)
        found.append(out_of_sample_probabilities(data.train, predict, folds=folds, generator=generator))
    return torch.stack(found)


class Logistic(NamedTuple):
    """A linear classifier: ``weight`` ``[K, D]`` and ``bias`` ``[K]``, float64."""

    weight: Tensor
    bias: Tensor


def fit_logistic(features: Tensor, labels: Tensor, classes: int, *, C: float = 1.0) -> Logistic:
    r"""Return the multinomial logistic regression of scikit-learn, to the last digits.

    It minimises :math:`\sum_n\ell_n+\tfrac1{2C}\|W\|^2`, the cross-entropies and the squares of the weights; the bias
    is free.

    Raises
    ------
    ValueError : features ``[N, D]`` and labels do not fit, or ``C`` is no number above 0.
    """
    require("C", C, lambda c: is_number(c) and c > 0, "a number above 0")
    if features.ndim != 2 or not features.is_floating_point() or not features.numel():
        raise ValueError(f"features={features.dtype} {list(features.shape)}: must be floats [N, D], none of them 0")
    check_labels(labels, len(features), classes)
    x = features.detach().double()

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(x @ weight.T + bias, labels) + weight.square().sum() / (2 * C * len(x))

    zeros = x.new_zeros(classes, x.shape[1])
    return Logistic(*least(loss, [zeros, zeros[:, 0]], steps=1000))


class Stacked(nn.Module):
    """Networks, and a linear layer on their probabilities side by side, ``[N, M K]``, that gives the logits."""

    weight: Tensor
    bias: Tensor

    def __init__(self, networks: Sequence[nn.Module], head: Logistic) -> None:
        super().__init__()
        require("networks", [*networks], bool, "at least one network")
        self.networks = nn.ModuleList(networks)
        self.register_buffer("weight", head.weight)
        self.register_buffer("bias", head.bias)
        self.train(self.networks[0].training)

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to logits ``[N, K]``."""
        said = torch.cat([network(x).softmax(1) for network in self.networks], dim=1)
        return F.linear(said, self.weight.to(said), self.bias.to(said))


def stacking(
    networks: Sequence[Factory],
    data: Dataset,
    recipe: Recipe,
    *,
    folds: int = 5,
    C: float = 1.0,
    seed: int,
    generator: torch.Generator,
) -> Stacked:
    """Return networks trained on all training examples, under a logistic regression on out-of-fold probabilities.

    It costs ``folds`` + 1 runs for each kind of network.

    Raises
    ------
    ValueError : as ``out_of_fold`` and ``fit_logistic``.
    """
    said = out_of_fold(networks, data, recipe, folds=folds, seed=seed, generator=generator)
    labels = data.train.labels.to(said.device)
    head = fit_logistic(side_by_side(said), labels, len(data.classes), C=C)
    trained = []
    for own, network in zip(member_seeds(len(networks), seed), networks, strict=True):
        model = fresh(network, recipe, seed=own)
        fit(model, data, recipe, seed=own, progress=False)
        trained.append(model.eval())
    return Stacked(trained, head)


def side_by_side(probabilities: Tensor) -> Tensor:
    """Return answers ``[M, N, K]`` as features ``[N, M K]``, the first member's first."""
    return probabilities.transpose(0, 1).flatten(1)
