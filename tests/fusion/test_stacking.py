"""Stacking: against scikit-learn's on the same predictions, and folds done by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.ensemble import StackingClassifier
from sklearn.linear_model import LogisticRegression

from course_lib import fusion
from course_lib.fusion.stacking import side_by_side
from course_lib.lab.training import fit, fresh, logits_of
from course_lib.preprocessing.wrong_labels import fold_numbers
from course_lib.transfer.tuning import probe
from tests.fusion.small import EXACT, NETWORKS, answers, close, data, generator, same_weights
from tests.fusion.test_voting import Told

SMALL = data(40)
RECIPE = replace(EXACT, epochs=1)


def test_answers_come_from_networks_that_learned_other_folds() -> None:
    kinds = [NETWORKS["mlp"], NETWORKS["convnet"]]
    found = fusion.out_of_fold(kinds, SMALL, RECIPE, folds=2, seed=5, generator=generator(1))
    numbers = fold_numbers(SMALL.train.labels, 2, generator(1))
    for place, kind in enumerate(kinds):
        for fold in range(2):
            model = fresh(kind, RECIPE, seed=5 + 100 * place)
            learned = replace(SMALL, train=SMALL.train.subset(numbers != fold))
            fit(model, learned, RECIPE, seed=5 + 100 * place)
            expected = logits_of(model, SMALL.train.subset(numbers == fold)).softmax(1)
            close(found[place, numbers == fold], expected, 1e-12)


@pytest.mark.parametrize("C", [0.1, 10.0])
def test_the_learner_on_top_is_sklearns(C: float) -> None:
    logits, labels = answers(2, 80)
    features = side_by_side(logits.softmax(2))
    found = probe(features, labels, C=C, classes=4)
    theirs = LogisticRegression(C=C, tol=1e-12, max_iter=10_000).fit(features.numpy(), labels.numpy())
    said = (features @ found.weight.T + found.bias).softmax(1)
    close(said, torch.from_numpy(theirs.predict_proba(features.numpy())), 1e-5)
    close(found.weight, torch.from_numpy(theirs.coef_), 1e-4)


def test_stacking_is_sklearns_on_the_same_answers() -> None:
    logits, labels = answers(3, 80)
    q = logits.softmax(2)
    told = [(f"m{k}", Told(each.numpy()).fit(None, labels.numpy())) for k, each in enumerate(q)]
    top = LogisticRegression(tol=1e-12, max_iter=10_000)
    theirs = StackingClassifier(told, final_estimator=top, cv="prefit").fit(np.zeros((80, 1)), labels.numpy())
    head = probe(side_by_side(q), labels, classes=4)

    class Says(torch.nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = logits

        def forward(self, x: object) -> torch.Tensor:
            return self.logits

    stacked = fusion.Stacked([Says(each) for each in logits], head)
    expected = torch.from_numpy(theirs.predict_proba(np.zeros((80, 1))))
    close(stacked(torch.zeros(80, 1)).softmax(1), expected, 1e-5)


def test_all_of_it() -> None:
    kinds = [NETWORKS["mlp"], NETWORKS["convnet"]]
    found = fusion.stacking(kinds, SMALL, RECIPE, folds=2, seed=5, generator=generator(1))
    said = fusion.out_of_fold(kinds, SMALL, RECIPE, folds=2, seed=5, generator=generator(1))
    head = probe(side_by_side(said), SMALL.train.labels, classes=4)
    model = fresh(kinds[1], RECIPE, seed=105)
    fit(model, SMALL, RECIPE, seed=105)
    same_weights(found.networks[1], model)
    q = torch.cat([logits_of(net, SMALL.test).softmax(1) for net in found.networks], 1)
    close(logits_of(found, SMALL.test), F.linear(q, head.weight, head.bias), 1e-9)
    assert found.float()(torch.zeros(2, 1, 8, 8)).dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.out_of_fold([], SMALL, RECIPE, seed=0, generator=generator()), "networks="),
        (lambda: fusion.out_of_fold([NETWORKS["mlp"]], SMALL, RECIPE, folds=1, seed=0, generator=generator()), "folds"),
        (lambda: probe(torch.rand(3, 2), torch.tensor([0, 1, 2]), classes=2), "classes=2"),
        (lambda: fusion.stacking([NETWORKS["mlp"]], SMALL, RECIPE, C=0.0, seed=0, generator=generator()), "C="),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
