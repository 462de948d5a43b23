"""Bagging, subspaces and boosting: against scikit-learn, the loops that they stand for, and runs by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import make_classification
from sklearn.ensemble import AdaBoostClassifier
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from course_lib import fusion
from course_lib.lab.training import fit, fresh, logits_of
from course_lib.regularization import bootstrap
from tests.fusion.small import EXACT, NETWORKS, answers, batch, close, data, generator, network, normal, same_weights

MLP, SMALL = NETWORKS["mlp"], data(40)


def test_bootstrap_rows_are_those_of_chapter_5() -> None:
    rows = fusion.bootstrap_rows(40, 2, generator(3))
    again = generator(3)
    for own in rows:
        assert torch.equal(SMALL.train.subset(own).images, bootstrap(SMALL.train, again).images)
    many = fusion.bootstrap_rows(2000, 5, generator())
    left_out = np.mean([1 - len(own.unique()) / 2000 for own in many])
    assert left_out == pytest.approx(np.exp(-1), abs=0.02)


def test_bagged_members_learn_their_samples() -> None:
    found = fusion.bagging(MLP, SMALL, EXACT, members=2, seed=4, generator=generator(3))
    assert torch.equal(found.rows, fusion.bootstrap_rows(40, 2, generator(3)))
    model = fresh(MLP, EXACT, seed=104)
    fit(model, replace(SMALL, train=SMALL.train.subset(found.rows[1])), EXACT, seed=104)
    same_weights(found.members.networks[1], model)
    log_q = fusion.out_of_bag(fusion.members_logits([*found.members.networks], SMALL.train), found.rows)
    judged = ~log_q.isnan().any(1)
    expected = (log_q[judged].argmax(1) != SMALL.train.labels[judged]).double().mean()
    assert 0 < int(judged.sum()) < 40
    assert fusion.out_of_bag_error(found, SMALL) == pytest.approx(float(expected))


def test_out_of_bag_is_the_mean_of_those_that_have_not_seen_it() -> None:
    logits, _ = answers(4, 12)
    rows = fusion.bootstrap_rows(12, 4, generator())
    rows[:, 0] = 5  # example 5: seen by all
    found = fusion.out_of_bag(logits, rows)
    for n in range(12):
        fresh_ones = [m for m in range(4) if n not in rows[m].tolist()]
        if fresh_ones:
            close(found[n].exp(), logits[fresh_ones, n].softmax(1).mean(0), 1e-12)
        else:
            assert found[n].isnan().all()
    assert found[5].isnan().all()


@pytest.mark.parametrize(("shape", "patch"), [((3, 8, 8), 1), ((1, 8, 4), 2), ((10,), 1)])
def test_masks_keep_a_share(shape: tuple[int, ...], patch: int) -> None:
    mask = fusion.patch_mask(shape, patch, 0.5, generator())
    assert mask.shape == shape
    assert float(mask.mean()) == pytest.approx(0.5)
    if len(shape) == 3:
        assert torch.equal(mask, mask[:1].expand(shape))
        blocks = mask[0].unflatten(0, (-1, patch)).unflatten(2, (-1, patch))
        assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))
    if patch == 1:
        assert torch.equal(mask, fusion.pixel_mask(shape, 0.5, generator()))


def test_members_of_random_subspaces_see_their_pixels_alone() -> None:
    masks = [fusion.pixel_mask((1, 8, 8), 0.3, generator(k)) for k in range(2)]
    found = fusion.random_subspaces(MLP, SMALL, EXACT, masks, seed=0)
    x = batch()
    changed = x + 5 * (1 - masks[0])
    member = found.networks[0]
    with torch.no_grad():
        close(member(changed), member(x), 1e-12)
        assert not torch.allclose(found.networks[1](changed), found.networks[1](x))
        close(member(x), member.model(x * masks[0]), 0)


def stumps(X: np.ndarray, y: np.ndarray) -> Any:
    def learn(weights: Tensor) -> tuple[DecisionTreeClassifier, Tensor]:
        tree = DecisionTreeClassifier(max_depth=1, random_state=0).fit(X, y, sample_weight=weights.numpy())
        return tree, torch.from_numpy(tree.predict(X))

    return learn


@pytest.mark.parametrize("classes", [2, 3])
def test_boosted_stumps_are_sklearns(classes: int) -> None:
    X, y = make_classification(120, 6, n_informative=4, n_classes=classes, random_state=0)
    found = fusion.adaboost(stumps(X, y), torch.from_numpy(y), classes, rounds=8)
    stump = DecisionTreeClassifier(max_depth=1, random_state=0)
    theirs = AdaBoostClassifier(stump, n_estimators=8, random_state=0).fit(X, y)
    close(torch.tensor(found.alphas, dtype=torch.float64), torch.from_numpy(theirs.estimator_weights_), 1e-9)
    named = torch.stack([torch.from_numpy(tree.predict(X)) for tree in found.learners])
    scores = fusion.boosted_votes(named, found.alphas, classes)
    assert np.array_equal(fusion.winner(scores).numpy(), theirs.predict(X))
    assert found.weights.shape == (8, 120)
    close(found.weights.sum(1), torch.ones(8, dtype=torch.float64), 1e-12)


def test_a_round_is_the_formula() -> None:
    w = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    right = torch.tensor([True, False, True, True])
    found = fusion.samme(5 * w, right, 3)
    alpha = np.log(0.8 / 0.2) + np.log(2)
    assert found.alpha == pytest.approx(alpha)
    grown = w * torch.tensor([1.0, np.exp(alpha), 1, 1])
    close(found.weights, grown / grown.sum(), 1e-12)
    chance = fusion.samme(torch.ones(3), torch.tensor([True, False, False]), 3)
    assert chance.alpha == pytest.approx(0)


def test_boosting_ends_with_a_perfect_learner_and_before_a_useless_one() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    perfect = fusion.adaboost(lambda w: ("p", labels), labels, 2, rounds=5)
    assert (perfect.learners, perfect.alphas) == (["p"], [1.0])
    named = iter([torch.tensor([0, 1, 0, 0]), torch.tensor([1, 0, 1, 0])])
    found = fusion.adaboost(lambda w: ("q", next(named)), labels, 2, rounds=5)
    assert len(found.learners) == 1
    with pytest.raises(ValueError, match="learn="):
        fusion.adaboost(lambda w: ("q", 1 - labels), labels, 2, rounds=5)


def test_weights_of_examples_in_an_objective() -> None:
    model, w = network(), torch.rand(40, generator=generator(), dtype=torch.float64)
    numbered, objective = fusion.weighted_by_example(SMALL, w)
    x, rows = batch(6), torch.tensor([3, 39, 0, 7, 7, 20])
    losses = F.cross_entropy(model(x), SMALL.train.labels[rows], reduction="none")
    close(objective(model, x, rows), (w / w.mean())[rows] @ losses / 6, 1e-12)
    weighted, plain = copy.deepcopy(model), copy.deepcopy(model)
    numbered, objective = fusion.weighted_by_example(SMALL, torch.full((40,), 7.0))
    fit(weighted, numbered, replace(EXACT, objective=objective), seed=0)
    fit(plain, SMALL, EXACT, seed=0)
    same_weights(weighted, plain, 1e-9)  # equal weights change nothing
    assert torch.equal(numbered.test.labels, SMALL.test.labels)


def test_boosted_networks_vote_by_their_voices() -> None:
    recipe = replace(EXACT, epochs=3, optimizer=partial(torch.optim.Adam, lr=0.01))
    found = fusion.boosted_networks(MLP, SMALL, recipe, rounds=3, seed=0)
    first = fresh(MLP, recipe, seed=0)
    fit(first, SMALL, recipe, seed=0)
    same_weights(found.networks[0], first, 1e-9)  # the first one learns with equal weights
    named = torch.stack([logits_of(model, SMALL.test).argmax(1) for model in found.networks])
    expected = fusion.boosted_votes(named, found.alphas, 4) / sum(found.alphas)
    close(logits_of(found, SMALL.test), expected, 1e-12)


LOGITS, LABELS = answers()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.bootstrap_rows(0, 2, generator()), "examples="),
        (lambda: fusion.out_of_bag(LOGITS, torch.zeros(2, 3, dtype=torch.int64)), "rows="),
        (lambda: fusion.out_of_bag(LOGITS, torch.full((5, 3), 60)), "rows="),
        (lambda: fusion.pixel_mask((1, 8, 8), 0.0, generator()), "share="),
        (lambda: fusion.patch_mask((1, 8, 8), 3, 0.5, generator()), "patch="),
        (lambda: fusion.random_subspaces(MLP, SMALL, EXACT, [], seed=0), "masks="),
        (lambda: fusion.samme(torch.ones(3), torch.ones(3), 2), "weights="),
        (lambda: fusion.samme(normal(3), torch.ones(3, dtype=torch.bool), 1), "classes="),
        (lambda: fusion.adaboost(lambda w: (0, LABELS), LABELS, 4, rounds=0), "rounds="),
        (lambda: fusion.weighted_by_example(SMALL, torch.zeros(40)), "weights="),
        (lambda: fusion.Voices([network()], [1.0, 2.0]), "alphas="),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
