"""Scores of transferability and likeness: evidence by direct maximisation, all others by their sums."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from course_lib import transfer
from tests.transfer.small import close, generator, network, normal, split

LABELS = torch.randint(3, (30,), generator=generator(1))


def test_log_evidence_is_the_density_of_the_labels() -> None:
    x, y = normal(9, 4), normal(9, seed=1)
    covariance = (x @ x.mT / 0.7).numpy() + np.eye(9) / 1.9
    expected = multivariate_normal(np.zeros(9), covariance).logpdf(y.numpy())
    assert transfer.log_evidence(x, y, 0.7, 1.9) == pytest.approx(expected)


@pytest.mark.parametrize("columns", [4, 40])
def test_logme_is_the_largest_evidence(columns: int) -> None:
    """Found here by a general optimiser, also with more features than examples."""
    x = normal(30, columns)
    x[:, 0] += LABELS

    def largest(y: torch.Tensor) -> float:
        starts = [(a, b) for a in (-2.0, 0.0, 2.0) for b in (0.0, 2.0)]
        found = [
            minimize(lambda logs: -transfer.log_evidence(x, y, *np.exp(logs)), start, method="L-BFGS-B",
                     bounds=[(-8, 30), (-8, 8)], options={"maxiter": 60}).fun
            for start in starts
        ]  # fmt: skip
        return -min(found) / 30

    expected = np.mean([largest(LABELS.eq(k).double()) for k in range(3)])
    assert transfer.logme(x, LABELS) == pytest.approx(expected, abs=1e-5)
    assert transfer.logme(x.float(), LABELS) == pytest.approx(expected, abs=1e-4)


def test_features_with_the_label_in_them_score_higher() -> None:
    x = normal(30, 4)
    informed = x.clone()
    informed[:, 0] += 2 * LABELS
    assert transfer.logme(informed, LABELS) > transfer.logme(x, LABELS)
    assert transfer.h_score(informed, LABELS) > transfer.h_score(x, LABELS)


def test_leep_is_its_sums() -> None:
    theta = normal(30, 5).softmax(1)
    joint = np.zeros((3, 5))
    for chances, label in zip(theta.numpy(), LABELS.tolist(), strict=True):
        joint[label] += chances / 30
    given = joint / joint.sum(0)
    logs = [np.log((given[label] * chances).sum()) for chances, label in zip(theta.numpy(), LABELS, strict=True)]
    assert transfer.leep(theta, LABELS) == pytest.approx(np.mean(logs))
    sure = torch.eye(3, dtype=torch.float64)[LABELS]
    assert transfer.leep(sure, LABELS) == pytest.approx(0)


def test_h_score_is_a_ratio_of_covariances() -> None:
    x = normal(30, 4)
    means = torch.stack([x[label == LABELS].mean(0) for label in LABELS])
    inside = np.cov(means.T.numpy(), ddof=0)
    expected = np.trace(np.linalg.inv(np.cov(x.T.numpy(), ddof=0)) @ inside)
    assert transfer.h_score(x, LABELS) == pytest.approx(expected)


def test_cka_is_the_likeness_of_gram_matrices() -> None:
    x, y = normal(12, 5), normal(12, 3, seed=1)
    centre = np.eye(12) - 1 / 12
    k, m = (centre @ (part @ part.mT).numpy() @ centre for part in (x, y))
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert transfer.linear_cka(x, y) == pytest.approx(expected)
    turned = 3 * x @ torch.linalg.qr(normal(5, 5, seed=2)).Q + 7
    assert transfer.linear_cka(x, turned) == pytest.approx(1)
    assert transfer.linear_cka(x, y) == pytest.approx(transfer.linear_cka(y, x))


def test_a_matrix_of_layers() -> None:
    model, other, held = network("resnet"), network("vit", seed=1), split(20)
    found = transfer.cka_matrix(model, other, held)
    assert [*found.index] == transfer.layer_names(model)
    assert [*found.columns] == transfer.layer_names(other)
    x = transfer.features(model, held, "stages.1.0")
    assert found.loc["stages.1.0", "blocks.0"] == transfer.linear_cka(x, transfer.features(other, held, "blocks.0"))
    with_itself = transfer.cka_matrix(model, copy.deepcopy(model), held)
    close(torch.from_numpy(with_itself.to_numpy().diagonal().copy()), torch.ones(4, dtype=torch.float64))
    some = transfer.cka_matrix(model, other, held, layers=["pool"], other_layers=["norm", "embed"])
    assert some.shape == (1, 2)


def test_bad_input_is_named() -> None:
    x, chances = normal(30, 4), normal(30, 4).softmax(1)
    cases: list[tuple[str, Any]] = [
        ("x=[30]: must be", lambda: transfer.logme(x[:, 0], LABELS)),
        ("labels are torch.int64 [4]: must be int64 [30]", lambda: transfer.logme(x, LABELS[:4])),
        ("labels are torch.float32 [30]", lambda: transfer.h_score(x, LABELS.float())),
        ("must sum to 1, as logits.softmax(1) does", lambda: transfer.leep(x, LABELS)),
        ("must sum to 1", lambda: transfer.leep(2 * chances, LABELS)),
        ("y=[29, 4]: must be", lambda: transfer.linear_cka(x, x[1:])),
        ("must be features that are not all equal", lambda: transfer.linear_cka(0 * x, x)),
        ("layer='nose': must be", lambda: transfer.cka_matrix(network(), network(), split(5), layers=["nose"])),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_scores_on_the_gpu() -> None:
    x, y = normal(30, 4), normal(30, 3, seed=2)
    assert transfer.logme(x.cuda(), LABELS) == pytest.approx(transfer.logme(x, LABELS))
    assert transfer.h_score(x.cuda(), LABELS.cuda()) == pytest.approx(transfer.h_score(x, LABELS))
    assert transfer.leep(y.softmax(1).cuda(), LABELS) == pytest.approx(transfer.leep(y.softmax(1), LABELS))
    assert transfer.linear_cka(x.cuda(), y.cuda()) == pytest.approx(transfer.linear_cka(x, y))
