"""Keeping an old task: penalties and mixed batches written out, measures on a matrix worked by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from course_lib import merging, transfer
from course_lib.lab.data import batches
from course_lib.lab.training import cross_entropy, fit
from tests.transfer.small import (
    EXACT,
    batch,
    close,
    data,
    generator,
    gradients,
    moved,
    network,
    shaken,
    split,
    untouched,
)

X, LABELS = batch(), torch.arange(6) % 4


def test_a_consolidated_task_is_its_weights_and_fisher_information() -> None:
    model, held = network(), split(12)
    untouched(model, lambda: transfer.consolidate(model, held, generator=generator(1)))
    found = transfer.consolidate(model, held, generator=generator(1), samples=2)
    expected = merging.fisher(model, held, generator=generator(1), samples=2)
    weights = copy.deepcopy(dict(model.named_parameters()))
    shaken(model)
    for name, value in expected.items():
        close(found.fisher[name], value, 0)
        close(found.weights[name], weights[name].detach(), 0)


def test_ewc_is_its_formula() -> None:
    model = network("convnet")
    tasks = [
        transfer.consolidate(network("convnet", seed), split(12, seed=seed), generator=generator()) for seed in (0, 1)
    ]
    changed: Any = shaken(transfer.with_head(model, 3, generator=generator()))
    y = LABELS % 3
    found = transfer.ewc(changed, X, y, tasks=tasks, strength=7.0)
    expected = F.cross_entropy(changed(X), y)
    for task in tasks:
        for name, value in changed.named_parameters():
            if not name.startswith("head."):
                expected = expected + 3.5 * (task.fisher[name] * (value - task.weights[name]) ** 2).sum()
    close(found, expected)
    for key, slope in gradients(expected, changed).items():
        close(gradients(found, changed)[key], slope)
    close(transfer.ewc(model, X, LABELS, tasks=tasks[:1]), cross_entropy(model, X, LABELS))


def test_a_penalty_keeps_the_weights_that_matter() -> None:
    model, old, new = network("mlp"), data(40), data(40)
    turned = replace(new, train=replace(new.train, labels=3 - new.train.labels))
    fit(model, old, replace(EXACT, epochs=20), seed=0)
    task = transfer.consolidate(model, old.train, generator=generator())
    moves = []
    for strength in (0.0, 30.0):
        other = copy.deepcopy(model)
        objective = partial(transfer.ewc, tasks=[task], strength=strength)
        fit(other, turned, replace(EXACT, epochs=10, objective=objective), seed=0)
        apart = [(task.fisher[n] * (p - task.weights[n]).square()).sum() for n, p in other.named_parameters()]
        moves.append(torch.stack(apart).sum())
    assert moves[1] < 0.5 * moves[0]


def test_a_memory_has_all_classes_as_evenly_as_there_are() -> None:
    labels = torch.tensor([0] * 30 + [1] * 8 + [2] * 2)
    held = replace(split(40), labels=labels)
    kept = transfer.memory(held, 12, generator=generator()).split.labels
    assert kept.bincount().tolist() == [5, 5, 2]
    first, again, other = (transfer.memory(held, 12, generator=generator(seed)).split.images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(transfer.memory(held, 40, generator=generator()).split) == 40


def test_rehearsal_is_one_batch_of_new_and_old() -> None:
    model, old = network("convnet").train(), transfer.Pool(split(9, seed=5))
    torch.manual_seed(2)
    more, labels = old.draw(3, X)
    expected = cross_entropy(copy.deepcopy(model), torch.cat([X, more]), torch.cat([LABELS, labels]))
    torch.manual_seed(2)
    close(transfer.rehearsal(copy.deepcopy(model), X, LABELS, old=old, share=0.5), expected)
    model.eval()
    close(transfer.rehearsal(model, X, LABELS, old=old), cross_entropy(model, X, LABELS))
    before = copy.deepcopy(model)
    fit(model, data(40), replace(EXACT, objective=partial(transfer.rehearsal, old=old)), seed=0)
    assert "head.weight" in moved(before, model)


MATRIX = torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.7, 0.7]], dtype=torch.float64)


def test_measures_of_a_matrix_worked_by_hand() -> None:
    assert transfer.average_accuracy(MATRIX) == pytest.approx((0.5 + 0.7 + 0.7) / 3)
    assert transfer.backward_transfer(MATRIX) == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    untrained = torch.tensor([0.25, 0.15, 0.2], dtype=torch.float64)
    assert transfer.forward_transfer(MATRIX, untrained) == pytest.approx(((0.2 - 0.15) + (0.3 - 0.2)) / 2)
    close(transfer.forgetting(MATRIX[0], MATRIX[2]), torch.tensor([0.4, -0.5, -0.6], dtype=torch.float64))


def test_a_row_of_the_matrix() -> None:
    model, splits = network(), [split(20), split(30, seed=3)]
    found = transfer.accuracies(model, splits)
    for accuracy, part in zip(found.tolist(), splits, strict=True):
        x, y = next(batches(part, 30, dtype=torch.float64))
        assert accuracy == (model(x).argmax(1) == y).double().mean().item()


def test_bad_input_is_named() -> None:
    model, pool = network(), transfer.Pool(split(5))
    task = transfer.consolidate(model, split(5), generator=generator())
    cases: list[tuple[str, Any]] = [
        ("samples=0: must be", lambda: transfer.consolidate(model, split(5), generator=generator(), samples=0)),
        ("strength=-1: must be", lambda: transfer.ewc(model, X, LABELS, tasks=[task], strength=-1)),
        ("tasks=[]: must be", lambda: transfer.ewc(model, X, LABELS, tasks=[])),
        ("count=0: must be a whole number from 1 to 5", lambda: transfer.memory(split(5), 0, generator=generator())),
        ("count=6: must be", lambda: transfer.memory(split(5), 6, generator=generator())),
        ("share=0: must be", lambda: transfer.rehearsal(model, X, LABELS, old=pool, share=0)),
        ("y is torch.float64 [6]: must be int64", lambda: transfer.rehearsal(model, X, LABELS.double(), old=pool)),
        ("splits=[]: must be", lambda: transfer.accuracies(model, [])),
        ("matrix=[3, 2]: must be square", lambda: transfer.average_accuracy(MATRIX[:, :2])),
        (
            "matrix=[1, 1]: must be square, [T, T] with T of at least 2",
            lambda: transfer.backward_transfer(MATRIX[:1, :1]),
        ),
        ("untrained=[2]: must be [3]", lambda: transfer.forward_transfer(MATRIX, MATRIX[0, :2])),
        ("after=[2]: must be [3]", lambda: transfer.forgetting(MATRIX[0], MATRIX[0, :2])),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_remembering_on_the_gpu(dtype: torch.dtype) -> None:
    here = network("convnet").to(dtype)
    task = transfer.consolidate(here, split(12), generator=generator())
    shaken(here)
    there = copy.deepcopy(here).cuda()
    losses = []
    for model, place in ((here, "cpu"), (there, "cuda")):
        model.train()
        torch.manual_seed(1)
        objective = partial(transfer.ewc, tasks=[task])
        old = transfer.Pool(split(9, seed=5).to(place))
        losses.append(
            transfer.rehearsal(model, X.to(place, dtype), LABELS.to(place), old=old, objective=objective).cpu()
        )
    close(losses[1], losses[0], 1e-7 if dtype == torch.float64 else 1e-2)
