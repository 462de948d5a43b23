r"""A network that learns how to put the answers of others together.

=====================  ====================================================  ===========================================
name                   what it does                                          source
=====================  ====================================================  ===========================================
``out_of_fold``        what members say of examples they have not learned    Wolpert 1992, Neural Networks 5
``Stacked``            members under a linear layer on their answers
``stacking``           all of it, the members trained again on all           Wolpert 1992; Ting & Witten 1999, JAIR 10
=====================  ====================================================  ===========================================

A member looks better on the examples that it has learned than it is; a learner on top that saw those answers would
trust it too much. Folds and networks trained on all but one of them are chapter 1's, where they find wrong labels
(``out_of_sample_probabilities``); the learner on top, a logistic regression, is chapter 13's ``probe``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.fusion.ensembles import Factory, member_seeds
from course_lib.lab.arguments import require
from course_lib.lab.data import Dataset
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.merging.states import check_positive
from course_lib.preprocessing.wrong_labels import by_network, out_of_sample_probabilities
from course_lib.transfer.tuning import Probe, probe


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


class Stacked(nn.Module):
    """Networks, and a linear layer on their probabilities side by side, ``[N, M K]``, that gives the logits."""

    weight: Tensor
    bias: Tensor

    def __init__(self, networks: Sequence[nn.Module], head: Probe) -> None:
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
    ValueError : as ``out_of_fold``, or ``C`` is not above 0.
    """
    check_positive(C=C)
    said = out_of_fold(networks, data, recipe, folds=folds, seed=seed, generator=generator)
    labels = data.train.labels.to(said.device)
    head = probe(side_by_side(said), labels, C=C, classes=len(data.classes))
    trained = []
    for own, network in zip(member_seeds(len(networks), seed), networks, strict=True):
        model = fresh(network, recipe, seed=own)
        fit(model, data, recipe, seed=own, progress=False)
        trained.append(model.eval())
    return Stacked(trained, head)


def side_by_side(probabilities: Tensor) -> Tensor:
    """Return answers ``[M, N, K]`` as features ``[N, M K]``, the first member's first."""
    return probabilities.transpose(0, 1).flatten(1)
