"""Weights and measures against scikit-learn and torch, SMOTE by its geometry and against imbalanced-learn."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from imblearn.over_sampling import SMOTE
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from course_lib.lab.data import Dataset, Split, batches, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, cross_entropy, fit, fresh, logits_of
from course_lib.preprocessing.imbalance import (
    adjust_logits,
    balanced_accuracy,
    balanced_batches,
    balanced_sample,
    balanced_weights,
    class_counts,
    class_prior,
    class_weights,
    effective_number_weights,
    logit_adjusted_cross_entropy,
    long_tailed,
    oversample,
    recalls,
    smote,
    undersample,
    weighted_cross_entropy,
)

SIZES = (40, 12, 3, 25)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels_of(sizes: tuple[int, ...] = SIZES) -> Tensor:
    labels = torch.cat([torch.full((size,), k) for k, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=generator())]


def split_of(labels: Tensor) -> Split:
    """Each example's only number is its place, so that it is known wherever it goes."""
    return Split(torch.arange(len(labels), dtype=torch.float32)[:, None], labels, (0.0,), (1.0,))


def places(split: Split) -> list[int]:
    assert isinstance(split.inputs, Tensor)
    return [int(place) for place in split.inputs[:, 0].tolist()]


def test_counts_and_shares() -> None:
    assert class_counts(labels_of()).tolist() == list(SIZES)
    assert class_counts(labels_of(), 6).tolist() == [*SIZES, 0, 0]
    assert class_prior(labels_of()).tolist() == pytest.approx([size / 80 for size in SIZES])


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_class_weights_are_scikit_learns() -> None:
    labels = labels_of()
    want = compute_class_weight("balanced", classes=labels.unique().numpy(), y=labels.numpy())
    assert class_weights(labels).tolist() == pytest.approx(want.tolist(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.9999, 1 - 1e-12])
def test_effective_numbers_are_the_sum_of_what_each_example_adds(beta: float) -> None:
    inverse = [1 / math.fsum(beta**j for j in range(size)) for size in SIZES]
    want = [4 * value / math.fsum(inverse) for value in inverse]
    assert effective_number_weights(labels_of(), beta=beta).tolist() == pytest.approx(want, rel=1e-9)


class Fixed(nn.Module):
    """A network whose logits are its inputs times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def batch(count: int = 50) -> tuple[Tensor, Tensor]:
    g = generator(3)
    return torch.randn(count, 4, generator=g, dtype=torch.float64), torch.randint(4, (count,), generator=g)


def test_weighted_cross_entropy_is_the_weighted_mean_of_losses() -> None:
    x, y = batch()
    weights = class_weights(labels_of())
    losses = -x.log_softmax(1)[torch.arange(50), y]
    want = (weights[y] * losses).sum() / weights[y].sum()
    found = weighted_cross_entropy(Fixed(), x, y, weights=weights.float())
    assert float(found.detach()) == pytest.approx(float(want), rel=1e-6)
    assert abs(float(want - losses.mean())) > 0.01
    same = weighted_cross_entropy(Fixed(), x, y, weights=torch.full((4,), 3.0))
    torch.testing.assert_close(same, cross_entropy(Fixed(), x, y))


# --- Samples ----------------------------------------------------------------------------------------------------------


def test_oversampling_keeps_all_and_fills_up() -> None:
    split = split_of(labels_of())
    made = oversample(split, generator())
    assert class_counts(made.labels).tolist() == [40] * 4
    assert set(places(made)) == set(range(80))
    assert all(int(split.labels[place]) == y for place, y in zip(places(made), made.labels.tolist(), strict=True))
    often = Counter(places(made))
    assert max(often[place] for place in range(80) if split.labels[place] == 0) == 1
    assert len({often[place] for place in range(80) if split.labels[place] == 1}) > 1, "drawn with replacement"


def test_undersampling_takes_each_example_once() -> None:
    split = split_of(labels_of())
    made = undersample(split, generator())
    assert class_counts(made.labels).tolist() == [3] * 4
    assert len(set(places(made))) == 12
    assert places(made) != places(undersample(split, generator(1)))


def test_balanced_weights_and_samples_make_classes_as_likely() -> None:
    labels = labels_of()
    weights = balanced_weights(labels)
    sums = [float(weights[labels == k].sum()) for k in range(4)]
    assert sums == pytest.approx([1.0] * 4)
    made = balanced_sample(split_of(labels), 8000, generator())
    assert len(made) == 8000
    assert all(abs(count - 2000) < 4 * math.sqrt(8000 * 3 / 16) for count in class_counts(made.labels).tolist())
    often = Counter(places(made))
    rare = [often[place] for place in range(80) if labels[place] == 2]
    assert all(abs(count - 2000 / 3) < 100 for count in rare)
    assert int(made.labels[:100].diff().count_nonzero()) > 50, "in random order"


def test_balanced_batches_hold_each_class_alike_and_use_all() -> None:
    split = split_of(labels_of())
    seen: list[int] = []
    passes = list(balanced_batches(split, 6, generator(), dtype=torch.float64))
    assert len(passes) == math.ceil(40 / 6)
    for x, y in passes:
        assert class_counts(y).tolist() == [6] * 4
        assert x.dtype == torch.float64
        assert torch.equal(split.labels[x[:, 0].long()], y)
        seen += x[:, 0].long().tolist()
    often = Counter(seen)
    for k, size in enumerate(SIZES):
        counts = [often[place] for place in range(80) if split.labels[place] == k]
        assert sum(counts) == 42
        assert set(counts) <= {42 // size, math.ceil(42 / size)}, "nobody twice before all once"
    twos = [place for place in seen if split.labels[place] == 2]
    orders = {tuple(twos[start : start + 3]) for start in range(0, 42, 3)}
    assert len(orders) > 2, "shuffled anew each round"


def test_balanced_batches_are_normalised() -> None:
    data = load("digits", train_size=100)
    x, _ = next(iter(balanced_batches(data.train, 2, generator())))
    everything, _ = next(iter(batches(data.train, 100)))
    assert x.shape == (20, 1, 8, 8)
    rows = everything.flatten(1)
    assert all(bool((rows == image).all(1).any()) for image in x.flatten(1))


@pytest.mark.parametrize(("ratio", "want"), [(1, [30] * 5), (16, [30, 15, 8, 4, 2]), (10, [30, 17, 9, 5, 3])])
def test_long_tails_fall_off_exponentially(ratio: float, want: list[int]) -> None:
    split = split_of(labels_of((30, 35, 31, 30, 90)))
    made = long_tailed(split, ratio, generator())
    assert class_counts(made.labels).tolist() == want
    assert len(set(places(made))) == sum(want)
    assert places(made) == places(long_tailed(split, ratio, generator()))


# --- SMOTE ------------------------------------------------------------------------------------------------------------


def cloud(sizes: tuple[int, ...] = (60, 12, 20), columns: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = labels_of(sizes)
    x = torch.randn(len(labels), columns, generator=generator(seed), dtype=torch.float64)
    return x + 2 * labels[:, None], labels


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_smotes_rows_lie_between_a_row_and_one_of_its_neighbours(neighbours: int) -> None:
    x, labels = cloud()
    rows, names = smote(x, labels, neighbours=neighbours, generator=generator())
    assert class_counts(names).tolist() == [60] * 3
    assert torch.equal(rows[:92], x)
    assert torch.equal(names[:92], labels)
    shares, ranks = [], set()
    for row, name in zip(rows[92:], names[92:].tolist(), strict=True):
        own = x[labels == name]
        found = []
        for i, base in enumerate(own):
            order = (own - base).norm(dim=1).argsort()
            order = order[order != i]
            for rank, j in enumerate(order[:neighbours].tolist()):
                way = own[j] - base
                share = float((row - base) @ way / way.square().sum())
                if float((base + share * way - row).norm()) < 1e-9 and 0 < share < 1:
                    found.append((share, rank))
        assert found, "on no segment between neighbours"
        if len(found) == 1:
            shares.append(found[0][0])
            ranks.add(found[0][1])
    assert ranks >= set(range(1, neighbours)), "the nearest is often the nearest of both, and then counts for neither"
    if shares:
        assert 0.3 < sum(shares) / len(shares) < 0.7
        assert min(shares) < 0.2
        assert max(shares) > 0.8


def test_smotes_rows_are_spread_like_those_of_imbalanced_learn() -> None:
    x, labels = cloud((3000, 40))
    rows, _ = smote(x, labels, neighbours=4, generator=generator())
    theirs, _ = SMOTE(k_neighbors=4, random_state=0).fit_resample(x.numpy(), labels.numpy())
    ours, other = rows[3040:], torch.from_numpy(theirs)[3040:]
    assert ours.shape == other.shape == (2960, 3)
    torch.testing.assert_close(ours.mean(0), other.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(torch.cov(ours.T), torch.cov(other.T), rtol=0, atol=0.06)


def test_smote_keeps_the_type_and_draws_from_the_generator() -> None:
    x, labels = cloud()
    made = smote(x.float(), labels, generator=generator(4))[0]
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.double(), smote(x, labels, generator=generator(4))[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(made, smote(x.float(), labels, generator=generator(5))[0])


# --- Logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_adjusted_logits_are_those_of_equal_shares(tau: float) -> None:
    """By Bayes: a posterior divided by the prior and normalised is the posterior under equal priors."""
    x, _ = batch()
    prior = class_prior(labels_of())
    found = adjust_logits(Fixed(), prior, tau=tau)(x).softmax(1)
    posterior = x.softmax(1) / prior**tau
    torch.testing.assert_close(found, posterior / posterior.sum(1, keepdim=True))


def test_the_adjusted_objective_is_menons_pairwise_loss() -> None:
    """log(1 + sum over others of (pi_other / pi_y) ** tau * exp(f_other - f_y)), written out."""
    x, y = batch()
    prior = class_prior(labels_of())
    found = float(logit_adjusted_cross_entropy(Fixed(), x, y, prior=prior.float(), tau=0.7).detach())
    losses = [
        math.log1p(sum(float((prior[k] / prior[own]) ** 0.7 * (row[k] - row[own]).exp()) for k in range(4) if k != own))
        for row, own in zip(x, y.tolist(), strict=True)
    ]
    assert found == pytest.approx(math.fsum(losses) / 50, rel=1e-6)
    flat = logit_adjusted_cross_entropy(Fixed(), x, y, prior=torch.full((4,), 0.25))
    torch.testing.assert_close(flat, F.cross_entropy(x, y))


# --- Measuring --------------------------------------------------------------------------------------------------------


def test_balanced_accuracy_is_scikit_learns() -> None:
    labels = labels_of()
    x = torch.randn(80, 4, generator=generator(5)) + 0.8 * F.one_hot(labels, 4)
    split = Split(x, labels, (0.0,) * 4, (1.0,) * 4)
    found = balanced_accuracy(Fixed(), split)
    assert found == pytest.approx(balanced_accuracy_score(labels.numpy(), x.argmax(1).numpy()), rel=1e-12)
    assert abs(found - float((x.argmax(1) == labels).double().mean())) > 0.01
    some = split.subset(labels != 2)
    with pytest.warns(UserWarning, match="not in y_true"):
        want = balanced_accuracy_score(some.labels.numpy(), x[labels != 2].argmax(1).numpy())
    assert balanced_accuracy(Fixed(), some) == pytest.approx(want, rel=1e-12)
    assert bool(recalls(Fixed(), some)[2].isnan())


# --- In the loop ------------------------------------------------------------------------------------------------------

NETWORK = partial(mlp, (1, 8, 8), 10, width=16)


@pytest.fixture(scope="module")
def tail() -> Dataset:
    data = load("digits")
    return replace(data, train=long_tailed(data.train, 40, generator()))


def recipe(objective: Any) -> Recipe:
    return Recipe(
        epochs=10,
        batch_size=32,
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        objective=objective,
        precision="float64",
    )


@pytest.fixture(scope="module")
def plain(tail: Dataset) -> nn.Module:
    model = fresh(NETWORK, recipe(cross_entropy), seed=0)
    fit(model, tail, recipe(cross_entropy), seed=0)
    return model


def objectives(labels: Tensor) -> dict[str, Any]:
    return {
        "weights": partial(weighted_cross_entropy, weights=class_weights(labels, 10)),
        "effective numbers": partial(weighted_cross_entropy, weights=effective_number_weights(labels, 10)),
        "logit adjustment": partial(logit_adjusted_cross_entropy, prior=class_prior(labels, 10)),
    }


@pytest.mark.parametrize("name", ["weights", "effective numbers", "logit adjustment"])
def test_objectives_help_the_rare_and_can_be_part_of_a_recipe(name: str, tail: Dataset, plain: nn.Module) -> None:
    made = recipe(objectives(tail.train.labels)[name])
    again = pickle.loads(pickle.dumps(made))
    assert fingerprint(again) == fingerprint(made)
    assert fingerprint(made) != fingerprint(recipe(cross_entropy))
    assert fingerprint(made) != fingerprint(recipe(objectives(tail.val.labels)[name]))
    model = fresh(NETWORK, made, seed=0)
    fit(model, tail, again, seed=0)
    assert balanced_accuracy(model, tail.test) > balanced_accuracy(plain, tail.test) + 0.05


def test_adjustment_after_training_helps_the_rare(tail: Dataset, plain: nn.Module) -> None:
    prior = class_prior(tail.train.labels, 10)
    adjusted = adjust_logits(plain.eval(), prior)
    before, after = logits_of(plain, tail.test), logits_of(adjusted, tail.test)
    assert not plain.training
    torch.testing.assert_close(after, before - prior.log())
    assert balanced_accuracy(adjusted, tail.test) > balanced_accuracy(plain, tail.test) + 0.05
    assert float(recalls(adjusted, tail.test)[7:].mean()) > float(recalls(plain, tail.test)[7:].mean()) + 0.05
    assert fingerprint(adjusted) == fingerprint(pickle.loads(pickle.dumps(adjusted)))


# --- Bad input, devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda y: class_counts(y.float()), r"labels is torch.float32"),
        (lambda y: class_counts(y[:0]), r"N at least 1"),
        (lambda y: class_counts(y - 1), r"labels lie from -1 to 2: must be 0 or more"),
        (lambda y: class_counts(y, 3), r"labels lie from 0 to 3: must be from 0 to 2"),
        (lambda y: class_weights(y, 5), r"labels holds no example of class 4"),
        (lambda y: class_prior(y, 5), r"labels holds no example of class 4"),
        (lambda y: effective_number_weights(y, beta=1.0), r"beta=1.0"),
        (lambda y: weighted_cross_entropy(Fixed(), *batch(), weights=torch.ones(3)), r"weights has the shape \[3\]"),
        (lambda y: balanced_sample(split_of(y), 0, generator()), r"size=0"),
        (lambda y: balanced_batches(split_of(y), 0, generator()), r"per_class=0"),
        (lambda y: long_tailed(split_of(y), 0.5, generator()), r"ratio=0.5"),
        (lambda y: long_tailed(split_of(y), 20, generator()), r"ratio=20: must be less than 6"),
        (lambda y: long_tailed(split_of(y * 0), 2, generator()), r"split holds one class"),
        (
            lambda y: smote(torch.randn(80, 2), y, generator=generator()),
            r"neighbours=5: must be less than 3, .* class 2",
        ),
        (lambda y: smote(torch.randn(80, 2), y, neighbours=0, generator=generator()), r"neighbours=0"),
        (lambda y: smote(torch.randn(79, 2), y, generator=generator()), r"labels has 80 entries"),
        (lambda y: smote(torch.full((80, 2), math.nan), y, generator=generator()), r"x holds NaN"),
        (lambda y: adjust_logits(Fixed(), torch.tensor([0.5, 0.5, 0.0, 0.0])), r"prior=\[0.5, 0.5, 0.0, 0.0\]"),
        (lambda y: adjust_logits(Fixed(), torch.ones(4)), r"prior=.*with the sum 1"),
        (lambda y: adjust_logits(Fixed(), class_prior(y), tau=math.nan), r"tau=nan"),
        (lambda y: adjust_logits(Fixed(), torch.ones(2) / 2)(batch()[0]), r"prior has the shape \[2\]: must be \[4\]"),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(labels_of())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_imbalance_agrees_on_a_gpu(dtype: torch.dtype) -> None:
    labels = labels_of()
    split, there = split_of(labels), split_of(labels).to("cuda")
    for made in (oversample, undersample, partial(balanced_sample, size=30), partial(long_tailed, ratio=2)):
        found = made(there, generator=generator())
        assert found.labels.is_cuda
        assert places(found) == places(made(split, generator=generator()))
    x, names = cloud()
    rows, _ = smote(x.to("cuda", dtype), names.cuda(), generator=generator())
    assert rows.is_cuda
    torch.testing.assert_close(rows.cpu(), smote(x.to(dtype), names, generator=generator())[0], rtol=1e-5, atol=1e-5)
    x, y = batch()
    model = Fixed().to("cuda", dtype)
    inputs, targets = x.to("cuda", dtype), y.cuda()
    prior = class_prior(labels)
    for loss in (
        weighted_cross_entropy(model, inputs, targets, weights=class_weights(labels)),
        logit_adjusted_cross_entropy(model, inputs, targets, prior=prior),
    ):
        assert loss.is_cuda
        assert bool(loss.isfinite())
    torch.testing.assert_close(
        adjust_logits(model, prior)(inputs).cpu().double(), x - prior.log(), rtol=1e-4, atol=1e-4
    )
