"""Votes, means and weights: against scikit-learn's voting, scipy's ranks and optimiser, and sums written out."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.stats import rankdata
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import VotingClassifier
from torch import Tensor

from course_lib import fusion
from course_lib.lab.training import logits_of
from tests.fusion.small import answers, close, network, split


class Told(ClassifierMixin, BaseEstimator):
    """A classifier of scikit-learn that says what it was told to say, whatever it is asked."""

    def __init__(self, probabilities: np.ndarray) -> None:
        self.probabilities = probabilities

    def fit(self, X: object, y: np.ndarray) -> Told:
        self.classes_ = np.arange(self.probabilities.shape[1])
        return self

    def predict_proba(self, X: object) -> np.ndarray:
        return self.probabilities

    def predict(self, X: object) -> np.ndarray:
        return self.probabilities.argmax(1)


def sklearns(logits: Tensor, labels: Tensor, voting: str, weights: list[float] | None) -> VotingClassifier:
    told = [(f"m{k}", Told(each.softmax(1).numpy())) for k, each in enumerate(logits)]
    return VotingClassifier(told, voting=voting, weights=weights).fit(np.zeros((len(labels), 1)), labels.numpy())


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0, 1.0]])
def test_votes_are_sklearns(weights: list[float] | None) -> None:
    logits, labels = answers()
    X = np.zeros((len(labels), 1))
    hard = sklearns(logits, labels, "hard", weights).predict(X)
    named = logits.argmax(2)
    assert fusion.tied(fusion.votes(named, 4)).any()  # so that ties are tested
    assert torch.equal(fusion.plurality(named, 4, weights), torch.from_numpy(hard))
    soft = sklearns(logits, labels, "soft", weights)
    close(fusion.mean_probability(logits, weights).exp(), torch.from_numpy(soft.predict_proba(X)), 1e-12)
    assert torch.equal(fusion.mean_probability(logits, weights).argmax(1), torch.from_numpy(soft.predict(X)))


def test_borda_counts_are_mean_ranks() -> None:
    logits = answers()[0].round()  # with equal logits
    ranks = np.stack([rankdata(each.numpy(), axis=1) - 1 for each in logits])
    close(fusion.borda(logits), torch.from_numpy(ranks.mean(0)), 1e-12)
    close(fusion.borda(logits, [0, 1, 0, 3, 0]), torch.from_numpy(ranks[1] / 4 + ranks[3] * 3 / 4), 1e-12)
    assert float(fusion.borda(logits)[0].sum()) == pytest.approx(6)  # 3 + 2 + 1 + 0


def test_ties_go_to_the_tie_break_and_at_last_to_the_first() -> None:
    scores = torch.tensor([[2.0, 2, 1], [1, 2, 2], [1, 1, 1], [0, 3, 1]])
    second = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.2, 0.2], [0.1, 0.2, 0.7], [0.9, 0.0, 0.1]])
    assert fusion.winner(scores).tolist() == [0, 1, 0, 1]
    assert fusion.winner(scores, second).tolist() == [1, 1, 2, 1]
    assert fusion.tied(scores).tolist() == [True, True, True, False]


def test_means_are_the_formulas() -> None:
    logits, _ = answers()
    w = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
    q = logits.softmax(2)
    close(fusion.mean_probability(logits, 10 * w), (w[:, None, None] * q).sum(0).log(), 1e-12)
    product_ = (q ** w[:, None, None]).prod(0)
    close(fusion.geometric_mean(logits, w).exp(), product_ / product_.sum(1, keepdim=True), 1e-12)
    close(fusion.mean_logits(logits, w).softmax(1), fusion.geometric_mean(logits, w).exp(), 1e-12)
    close(fusion.mean_logits(logits), logits.mean(0), 1e-12)


def test_a_veto_is_one_of_the_geometric_mean_alone() -> None:
    sure = torch.tensor([[[0.0, -200.0]], [[-200.0, 0.0]], [[-200.0, 0.0]]])
    assert fusion.mean_probability(sure).exp()[0].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert float(fusion.geometric_mean(sure)[0, 0]) < -60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_keep_the_type_and_pass_gradients(dtype: torch.dtype) -> None:
    for mean in (fusion.mean_probability, fusion.geometric_mean, fusion.mean_logits):
        logits = answers()[0].to(dtype).requires_grad_()
        found = mean(logits)
        found[:, 0].sum().backward()
        assert found.dtype is dtype
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_weights_by_accuracy() -> None:
    logits, labels = answers()
    right = [(each.argmax(1) == labels).double().mean().item() for each in logits]
    close(fusion.accuracy_weights(logits, labels), torch.tensor(right, dtype=torch.float64) / sum(right), 1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_fitted_weights_are_scipys_optimum(seed: int) -> None:
    logits, labels = answers(4, 200, seed=seed)
    found = fusion.fit_weights(logits, labels, tolerance=1e-9)

    def loss(w: np.ndarray) -> float:
        return F.nll_loss(fusion.mean_probability(logits, w), labels).item()

    start = np.full(4, 0.25)
    sums_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1}
    theirs = minimize(loss, start, bounds=[(1e-12, 1)] * 4, constraints=sums_to_one, options={"ftol": 1e-14})
    assert loss(found.numpy()) <= theirs.fun + 1e-8
    close(found, torch.from_numpy(theirs.x), 2e-3)
    assert float(found.sum()) == pytest.approx(1)


def test_a_useless_member_gets_nothing_and_a_copy_shares() -> None:
    labels = torch.randint(3, (100,), generator=torch.Generator().manual_seed(0))
    good = 2 * F.one_hot(labels, 3).double()
    found = fusion.fit_weights(torch.stack([good, -good, good]), labels)
    close(found, torch.tensor([0.5, 0, 0.5]).double(), 1e-4)
    impossible = fusion.fit_weights(torch.stack([good * 2000, -good * 2000]), labels)  # probabilities of 0
    close(impossible, torch.tensor([1.0, 0]).double(), 1e-6)


def test_greedy_selection_is_brute_force_step_by_step() -> None:
    logits, labels = answers(3, 40)
    found = fusion.greedy_selection(logits, labels, rounds=4)
    q, chosen = logits.softmax(2), []
    for _ in range(4):
        means = [sum(q[j] for j in [*chosen, k]) / (len(chosen) + 1) for k in range(3)]
        chosen.append(min(range(3), key=lambda k: F.nll_loss(means[k].log(), labels).item()))
    prefixes = [F.nll_loss(q[chosen[:n]].mean(0).log(), labels).item() for n in range(1, 5)]
    length = prefixes.index(min(prefixes)) + 1
    assert found.order == tuple(chosen[:length])
    assert found.score == pytest.approx(-min(prefixes))
    close(found.weights, torch.bincount(torch.tensor(chosen[:length]), minlength=3).double() / length, 1e-12)
    assert fusion.log_likelihood(fusion.mean_probability(logits, found.weights), labels) == pytest.approx(found.score)
    best = max(fusion.accuracy(each, labels) for each in logits)
    assert fusion.greedy_selection(logits, labels, rounds=6, score=fusion.accuracy).score >= best


def test_it_is_never_far_from_the_best_of_all_mixtures() -> None:
    logits, labels = answers(3, 40)
    found = fusion.greedy_selection(logits, labels, rounds=6)
    grid = [w for w in product(range(7), repeat=3) if sum(w) == 6]
    best = max(fusion.log_likelihood(fusion.mean_probability(logits, [float(n) for n in w]), labels) for w in grid)
    assert best - 0.02 <= found.score <= best + 1e-12 or len(found.order) < 6


def test_logits_of_members() -> None:
    models, part = [network(seed=k) for k in range(2)], split(12)
    close(fusion.members_logits(models, part)[1], logits_of(models[1], part), 0)


LOGITS, LABELS = answers()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.mean_probability(LOGITS[0]), "logits="),
        (lambda: fusion.geometric_mean(LOGITS.long()), "logits="),
        (lambda: fusion.mean_logits(LOGITS, [1.0, 2.0]), "weights="),
        (lambda: fusion.mean_logits(LOGITS, [1.0, 1, 1, 1, -1]), "weights="),
        (lambda: fusion.borda(LOGITS, [0.0] * 5), "weights="),
        (lambda: fusion.votes(LOGITS.argmax(2), 4, [1.0]), "weights="),
        (lambda: fusion.votes(LOGITS.argmax(2), 3), "named="),
        (lambda: fusion.votes(LOGITS[0], 4), "named="),
        (lambda: fusion.votes(LOGITS.argmax(2), 0), "classes="),
        (lambda: fusion.winner(LOGITS[0], LOGITS[0, :3]), "tie_break="),
        (lambda: fusion.fit_weights(LOGITS, LABELS[:3]), "labels="),
        (lambda: fusion.fit_weights(LOGITS, LABELS + 9), "labels="),
        (lambda: fusion.fit_weights(LOGITS, LABELS, tolerance=0.0), "tolerance="),
        (lambda: fusion.fit_weights(LOGITS, LABELS, steps=0), "steps="),
        (lambda: fusion.accuracy_weights(-math.inf * torch.eye(4)[LABELS].double()[None], LABELS), "logits="),
        (lambda: fusion.greedy_selection(LOGITS, LABELS, rounds=0), "rounds="),
        (lambda: fusion.members_logits([], split()), "models="),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
