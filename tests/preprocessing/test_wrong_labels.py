"""Confident learning against cleanlab, and against the paper's formulas written out example by example."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cleanlab.count import compute_confident_joint, estimate_joint, get_confident_thresholds
from cleanlab.filter import find_label_issues
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from course_lib.lab.data import Dataset, Split, load
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fit, fresh, logits_of
from course_lib.preprocessing.wrong_labels import (
    by_network,
    class_thresholds,
    confident_joint,
    confident_labels,
    estimated_joint,
    flip_pairwise,
    flip_symmetric,
    fold_numbers,
    loss_ranking,
    off_diagonal,
    out_of_sample_probabilities,
    precision_and_recall,
    prune_by_class,
    prune_by_noise_rate,
)

Judged = tuple[Tensor, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def judged(count: int = 400, classes: int = 4, seed: int = 0, sharpness: float = 2.0) -> Judged:
    """Given labels, a quarter of them wrong, and the probabilities of an unsure network with a bias for class 0."""
    g = generator(seed)
    true = torch.randint(classes, (count,), generator=g)
    logits = torch.randn(count, classes, generator=g, dtype=torch.float64)
    logits[torch.arange(count), true] += sharpness
    logits[:, 0] += 0.7
    return flip_symmetric(true, 0.25, classes, g), logits.softmax(1)


CASES = {"many": judged(), "unsure": judged(seed=1, sharpness=0.8), "three": judged(300, 3, seed=2, sharpness=3)}


# --- Making labels wrong ----------------------------------------------------------------------------------------------


def test_symmetric_flips_are_exactly_as_many_and_go_everywhere_alike() -> None:
    labels = torch.arange(5).repeat(2000)
    flipped = flip_symmetric(labels, 0.3, 5, generator())
    wrong = flipped != labels
    assert int(wrong.sum()) == 3000
    counts = (labels[wrong] * 5 + flipped[wrong]).bincount(minlength=25).view(5, 5)
    assert counts.diagonal().tolist() == [0] * 5
    off = counts[~torch.eye(5, dtype=torch.bool)]
    assert 110 < int(off.min()) <= int(off.max()) < 195  # 150 ± 3.7 deviations
    assert torch.equal(labels, torch.arange(5).repeat(2000))


def test_pairwise_flips_go_to_the_next_class() -> None:
    labels = torch.arange(4).repeat(50)
    flipped = flip_pairwise(labels, 0.4, 4, generator())
    wrong = flipped != labels
    assert int(wrong.sum()) == 80
    assert torch.equal(flipped[wrong], (labels[wrong] + 1) % 4)
    assert len(labels[wrong].unique()) == 4


@pytest.mark.parametrize("flip", [flip_symmetric, flip_pairwise])
def test_flips_are_drawn_from_the_generator(flip: Any) -> None:
    labels = torch.arange(4).repeat(50)
    assert torch.equal(flip(labels, 0.4, 4, generator(1)), flip(labels, 0.4, 4, generator(1)))
    assert not torch.equal(flip(labels, 0.4, 4, generator(1)), flip(labels, 0.4, 4, generator(2)))
    assert torch.equal(flip(labels, 0, 4, generator()), labels)
    assert bool((flip(labels, 1, 4, generator()) != labels).all())


# --- Out-of-sample probabilities --------------------------------------------------------------------------------------


def test_folds_are_shuffled_and_hold_each_class_alike() -> None:
    labels = torch.tensor([0] * 23 + [1] * 50 + [2] * 7)[torch.randperm(80, generator=generator())]
    numbers = fold_numbers(labels, 5, generator())
    for name, size in enumerate((23, 50, 7)):
        counts = numbers[labels == name].bincount(minlength=5)
        assert int(counts.sum()) == size
        assert int(counts.max() - counts.min()) <= 1
    sizes = numbers.bincount(minlength=5)
    assert int(sizes.max() - sizes.min()) <= 1
    assert not torch.equal(numbers, fold_numbers(labels, 5, generator(1)))
    members = numbers[labels == 1]
    assert not torch.equal(members, members[0].add(torch.arange(50)) % 5)


def test_probabilities_are_in_the_order_of_the_examples_and_of_those_trained_on_others() -> None:
    x = torch.arange(40.0)[:, None]
    split = Split(x, torch.arange(40) % 4, (0.0,), (1.0,))
    seen: list[tuple[set[float], set[float]]] = []

    def predict(train: Split, held_out: Split) -> Tensor:
        a, b = train.inputs, held_out.inputs
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        seen.append((set(a.flatten().tolist()), set(b.flatten().tolist())))
        return torch.cat([b, 1 - b], 1)

    found = out_of_sample_probabilities(split, predict, folds=5, generator=generator())
    assert torch.equal(found[:, :1], x)
    everything = set(x.flatten().tolist())
    assert len(seen) == 5
    assert all(not train & held and train | held == everything for train, held in seen)
    assert set.union(*(held for _, held in seen)) == everything


def test_any_classifier_can_predict() -> None:
    wine = load("wine")

    def by_regression(train: Split, held_out: Split) -> Tensor:
        mean, std = np.array(train.mean), np.array(train.std)
        a, b = ((np.asarray(split.inputs) - mean) / std for split in (train, held_out))
        return torch.from_numpy(LogisticRegression().fit(a, train.labels.numpy()).predict_proba(b))

    found = out_of_sample_probabilities(wine.train, by_regression, folds=4, generator=generator())
    assert float((found.argmax(1) == wine.train.labels).double().mean()) > 0.9


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=500)


NETWORK = partial(mlp, (1, 8, 8), 10, width=32)
RECIPE = Recipe(epochs=8, batch_size=50, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), precision="float64")


def test_a_network_predicts_what_it_was_not_trained_on(digits: Dataset) -> None:
    predict = by_network(digits, NETWORK, RECIPE, seed=3)
    part, held_out = digits.train.subset(torch.arange(400)), digits.train.subset(torch.arange(400, 500))
    found = predict(part, held_out)
    model = fresh(NETWORK, RECIPE, seed=3)
    fit(model, replace(digits, train=part), RECIPE, seed=3)
    torch.testing.assert_close(found, logits_of(model, held_out).softmax(1))
    assert float((found.argmax(1) == held_out.labels).double().mean()) > 0.8


def test_injected_mistakes_in_digits_are_found_again(digits: Dataset) -> None:
    noisy = replace(digits.train, labels=flip_symmetric(digits.train.labels, 0.2, 10, generator()))
    wrong = noisy.labels != digits.train.labels
    predict = by_network(replace(digits, train=noisy), NETWORK, RECIPE, seed=0)
    p = out_of_sample_probabilities(noisy, predict, folds=4, generator=generator())
    for method in (off_diagonal, prune_by_class, prune_by_noise_rate):
        precision, recall = precision_and_recall(method(noisy.labels, p), wrong)
        assert precision > 0.6, method.__name__
        assert recall > 0.7, method.__name__
    first = torch.zeros(500, dtype=torch.bool)
    first[loss_ranking(noisy.labels, p)[:100]] = True
    assert precision_and_recall(first, wrong).precision > 0.7
    assert 1 - float(estimated_joint(noisy.labels, p).trace()) == pytest.approx(0.2, abs=0.08)


# --- Finding them -----------------------------------------------------------------------------------------------------


def example_by_example(labels: Tensor, p: Tensor) -> tuple[np.ndarray, list[int]]:
    """The paper's equations (1) and (2) in plain loops."""
    classes = p.shape[1]
    rows = list(zip(labels.tolist(), p.tolist(), strict=True))
    t = [math.fsum(row[k] for y, row in rows if y == k) / sum(y == k for y, _ in rows) for k in range(classes)]
    counts, likely = np.zeros((classes, classes), dtype=int), []
    for y, row in rows:
        above = [k for k in range(classes) if row[k] >= t[k]]
        likely.append(max(above, key=lambda k: row[k]) if above else -1)
        if above:
            counts[y, likely[-1]] += 1
    return counts, likely


@pytest.mark.parametrize("case", CASES)
def test_the_confident_joint_is_the_papers(case: str) -> None:
    labels, p = CASES[case]
    counts, likely = example_by_example(labels, p)
    assert confident_joint(labels, p).tolist() == counts.tolist()
    assert confident_labels(labels, p).tolist() == likely
    assert off_diagonal(labels, p).tolist() == [k >= 0 and k != y for k, y in zip(likely, labels.tolist(), strict=True)]
    assert -1 in likely
    shares = counts / counts.sum(1, keepdims=True) * labels.bincount().numpy()[:, None] / len(labels)
    np.testing.assert_allclose(estimated_joint(labels, p).numpy(), shares, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_confident_joint_is_cleanlabs_where_the_two_rules_agree(case: str) -> None:
    labels, p = CASES[case]
    thresholds = class_thresholds(labels, p)
    np.testing.assert_allclose(thresholds.numpy(), get_confident_thresholds(labels.numpy(), p.numpy()), rtol=1e-12)
    above = p >= thresholds
    alike = (above.sum(1) < 2) | above.gather(1, p.argmax(1, keepdim=True))[:, 0]
    assert int(alike.sum()) > 0.9 * len(alike)
    theirs = compute_confident_joint(
        labels[alike].numpy(), p[alike].numpy(), thresholds=thresholds.numpy(), calibrate=False
    )
    ours = labels[alike] * p.shape[1] + confident_labels(labels, p)[alike]
    sure = confident_labels(labels, p)[alike] >= 0
    assert ours[sure].bincount(minlength=theirs.size).tolist() == theirs.flatten().tolist()


def sharp(count: int = 500, classes: int = 5, seed: int = 4) -> Judged:
    """Probabilities with which cleanlab's rule and the paper's agree on every example."""
    labels, p = judged(count, classes, seed, sharpness=4)
    above = p >= class_thresholds(labels, p)
    assert bool(((above.sum(1) < 2) | above.gather(1, p.argmax(1, keepdim=True))[:, 0]).all())
    return labels, p


def test_methods_find_what_cleanlab_finds() -> None:
    labels, p = sharp()
    y, q = labels.numpy(), p.numpy()
    np.testing.assert_allclose(estimated_joint(labels, p).numpy(), estimate_joint(y, q), atol=1.01 / len(labels))
    # The same rounded counts for both, since cleanlab rounds so that each row keeps its sum; and cleanlab never
    # doubts an example whose given label is the most probable.
    counts = (estimated_joint(labels, p) * len(labels)).round().long().numpy()
    free = p.argmax(1) != labels
    for name, method in (("prune_by_class", prune_by_class), ("prune_by_noise_rate", prune_by_noise_rate)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = find_label_issues(y, q, filter_by=name, confident_joint=counts, min_examples_per_class=0, n_jobs=1)
        ours = (method(labels, p) & free).numpy()
        assert ours.sum() > 80
        assert (ours != theirs).sum() <= 5, name  # each class's sum is rounded once here, term by term there
    theirs = find_label_issues(y, q, filter_by="confident_learning", n_jobs=1)
    assert ((off_diagonal(labels, p) & free).numpy() == theirs).all()


def counted(labels: Tensor, found: Tensor) -> list[int]:
    return labels[found].bincount(minlength=int(labels.max()) + 1).tolist()


@pytest.mark.parametrize("case", CASES)
def test_prune_by_class_takes_the_least_likely_of_each_class(case: str) -> None:
    labels, p = CASES[case]
    joint, found = estimated_joint(labels, p), prune_by_class(labels, p)
    for i in range(p.shape[1]):
        own = [(float(p[n, i]), n) for n in range(len(labels)) if labels[n] == i]
        count = round(len(labels) * float(joint[i].sum() - joint[i, i]))
        assert {n for _, n in sorted(own)[:count]} == set((found & (labels == i)).nonzero()[:, 0].tolist())
        assert count > 0


@pytest.mark.parametrize("case", CASES)
def test_prune_by_noise_rate_takes_the_largest_margins_of_each_pair(case: str) -> None:
    labels, p = CASES[case]
    joint, want = estimated_joint(labels, p), set()
    for i in range(p.shape[1]):
        for j in range(p.shape[1]):
            own = [(float(p[n, i] - p[n, j]), n) for n in range(len(labels)) if labels[n] == i]
            want |= {n for _, n in sorted(own)[: round(len(labels) * float(joint[i, j]))]} if i != j else set()
    assert want == set(prune_by_noise_rate(labels, p).nonzero()[:, 0].tolist())
    assert want != set(prune_by_class(labels, p).nonzero()[:, 0].tolist())


def test_a_class_of_which_the_network_is_never_sure_is_not_called_wrong() -> None:
    """Class 1 gets 0.4 to 0.48 of its own examples; more than half of class 0's probability lies elsewhere for none."""
    own = torch.linspace(0.4, 0.48, 50, dtype=torch.float64)
    sure = torch.linspace(0.9, 0.99, 50, dtype=torch.float64)
    p = torch.cat([torch.stack([sure, 1 - sure], 1), torch.stack([1 - own, own], 1)])
    labels = torch.arange(2).repeat_interleave(50)
    assert bool((p.argmax(1) != labels).any())
    for method in (off_diagonal, prune_by_class, prune_by_noise_rate):
        assert not bool(method(labels, p).any())


def test_the_likely_label_is_the_most_probable_of_those_above_their_threshold() -> None:
    p = torch.tensor(
        [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.42, 0.38, 0.2], [0.9, 0.1, 0], [0, 0.1, 0.9]]
    )
    p = torch.cat([p, torch.tensor([[0.6, 0.3, 0.1]])]).double()
    labels = torch.tensor([0, 1, 1, 1, 0, 2, 2])
    # thresholds 0.9, 0.493 and 0.5
    assert confident_labels(labels, p).tolist() == [0, 1, -1, -1, 0, 2, -1]
    low = torch.tensor([[0.55, 0.40, 0.05], [0.9, 0.05, 0.05], [0.3, 0.35, 0.35], [0.2, 0.3, 0.5]]).double()
    # thresholds 0.6 (of 0.9 and 0.3), 0.4 and 0.5: class 0 is the most probable of the first, and below its own
    assert confident_labels(torch.tensor([1, 0, 0, 2]), low).tolist() == [1, 0, -1, 2]


def test_no_row_of_the_joint_is_empty_however_unsure_the_network() -> None:
    unsure = torch.tensor(
        [[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.3, 0.1, 0.6], [0.2, 0.2, 0.6], [0.1, 0.1, 0.8]]
    ).double()
    joint = estimated_joint(torch.tensor([0, 0, 1, 2, 2]), unsure)
    assert joint.sum(1).tolist() == pytest.approx([0.4, 0.2, 0.4])
    assert joint[1].tolist() == pytest.approx([0, 0.2, 0])


def test_equal_probabilities_are_not_below_their_own_mean() -> None:
    labels, above = torch.arange(3).repeat(10), 0
    for seed in range(20):
        p = torch.randn(1, 3, generator=generator(seed), dtype=torch.float64).softmax(1).repeat(30, 1)
        likely = int(p[0].argmax())
        above += bool(class_thresholds(labels, p)[likely] > p[0, likely])
        assert bool((confident_labels(labels, p) == likely).all())
    assert above, "some means are rounded up"


def test_the_loss_ranking_is_by_cross_entropy() -> None:
    labels, p = CASES["many"]
    losses = torch.nn.functional.nll_loss(p.log(), labels, reduction="none")
    order = loss_ranking(labels, p)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert bool((losses[order].diff() <= 0).all())


def test_precision_and_recall() -> None:
    found = torch.tensor([True, True, True, False, False, False])
    wrong = torch.tensor([True, True, False, True, True, False])
    assert precision_and_recall(found, wrong) == pytest.approx((2 / 3, 1 / 2))
    assert precision_and_recall(found, wrong).recall == 0.5
    nothing = torch.zeros(6, dtype=torch.bool)
    assert math.isnan(precision_and_recall(nothing, wrong).precision)
    assert precision_and_recall(nothing, wrong).recall == 0
    assert math.isnan(precision_and_recall(found, nothing).recall)


def test_float32_probabilities_find_the_same() -> None:
    labels, p = CASES["many"]
    for method in (off_diagonal, prune_by_class, prune_by_noise_rate):
        assert int((method(labels, p.float()) != method(labels, p)).sum()) <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda y, p: flip_symmetric(y, 1.5, 4, generator()), r"share=1.5: must be a number from 0 to 1"),
        (lambda y, p: flip_symmetric(y, 0.5, 1, generator()), r"classes=1"),
        (lambda y, p: flip_pairwise(y, 0.5, 3, generator()), r"labels lie from 0 to 3: must be from 0 to 2"),
        (lambda y, p: fold_numbers(y, 1, generator()), r"folds=1"),
        (lambda y, p: fold_numbers(y[:3], 4, generator()), r"folds=4: must be at most 3"),
        (
            lambda y, p: confident_joint(y, p[:10]),
            r"probabilities is torch.float64 \[10, 4\]: must be .* \[400, classes\]",
        ),
        (lambda y, p: confident_joint(y, p * 2), r"no distribution"),
        (lambda y, p: confident_joint(y, p.log()), r"no distribution"),
        (lambda y, p: confident_joint(y.clamp(max=2), p), r"labels holds no example of class 3"),
        (lambda y, p: confident_joint(y, p[:, :3] / p[:, :3].sum(1, keepdim=True)), r"labels lie from 0 to 3"),
        (lambda y, p: precision_and_recall(y, y == 1), r"found is torch.int64"),
        (lambda y, p: precision_and_recall(y == 1, y[:3] == 1), r"truly_wrong is torch.bool \[3\]"),
        (
            lambda y, p: out_of_sample_probabilities(
                Split(p.float(), y, (0.0,) * 4, (1.0,) * 4), lambda a, b: torch.ones(3, 2), generator=generator()
            ),
            r"predict returned the shape \[3, 2\]",
        ),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(*CASES["many"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_labels_agree_on_a_gpu(dtype: torch.dtype) -> None:
    labels, p = CASES["many"][0], CASES["many"][1].to(dtype)
    there = labels.cuda(), p.cuda()
    for method in (off_diagonal, prune_by_class, prune_by_noise_rate, loss_ranking, confident_joint):
        found = method(*there)
        assert found.is_cuda
        assert torch.equal(found.cpu(), method(labels, p))
    for flip in (flip_symmetric, flip_pairwise):
        assert torch.equal(flip(there[0], 0.3, 4, generator()).cpu(), flip(labels, 0.3, 4, generator()))
    assert torch.equal(fold_numbers(there[0], 4, generator()).cpu(), fold_numbers(labels, 4, generator()))
