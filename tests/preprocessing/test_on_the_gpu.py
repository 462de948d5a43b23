"""What no other test of the chapter takes to a GPU: the numbers of the CPU, from tensors and networks over there.

Data sets stay here, where a function takes a network beside them; generators are on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from course_lib import preprocessing as pre
from course_lib.lab.data import Split, batches
from course_lib.lab.training import Recipe, fit, fresh, logits_of
from tests.merging.small import Case, Move, data, generator, network, normal, on_the_gpu_as_here, split

SHORT = Recipe(epochs=1, batch_size=10, precision="float64")
SMALL = data()
LABELS = torch.arange(30) % 3
SAID = (2 * normal(30, 3) + torch.eye(3)[LABELS]).softmax(1)
ROWS = normal(20, 3).index_fill(0, torch.tensor([4]), 9.0)
IMAGES = torch.rand(6, 3, 8, 8, generator=generator())


def twice(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows[:2]])


def placed(found: Split) -> tuple[Any, Tensor]:
    return found.inputs, found.labels


def copies(to: Move) -> Any:
    """Groups of copies that were found there, labels here or there."""
    groups = pre.exact_duplicates(to(twice(ROWS)))
    labels = torch.arange(22)
    found = [pre.conflicts(groups, labels), pre.conflicts(groups, to(labels)), pre.conflicts(groups, 0 * labels)]
    return [[members.tolist() for members in each] for each in found]


def dropped(to: Move) -> Any:
    there = to(SMALL.train)
    rows = torch.arange(30)
    return (
        placed(pre.drop_rows(there, rows)),
        placed(pre.drop_rows(there, to(rows))),
        placed(pre.drop_duplicates(there)),
    )


FOUND = (
    *(pre.class_thresholds, pre.confident_labels, pre.confident_joint, pre.estimated_joint, pre.off_diagonal),
    *(pre.prune_by_class, pre.prune_by_noise_rate, pre.loss_ranking),
)


def wrong(to: Move, find: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Answers lie there, labels here or there."""
    return [find(labels, to(SAID)) for labels in (LABELS, to(LABELS))]


def watched(to: Move) -> Any:
    """In a run the network and the data are where ``fit`` has brought them; the augmentation draws here."""
    mixed = partial(pre.cutmix, classes=4)
    recipe = Recipe(
        epochs=1,
        batch_size=20,
        precision="float64",
        augment=pre.on_pixels(SMALL.train, pre.random_flip, partial(pre.random_crop, padding=1), mixed),
        watch={"balanced": lambda model, data: pre.balanced_accuracy(model, data.val)},
    )
    history = fit(network(), SMALL, recipe, seed=0)
    return history.losses, history["balanced"]


def composed(to: Move) -> Any:
    both = pre.compose(pre.random_flip, partial(pre.mixup, classes=3))
    x, y = to(IMAGES), to(LABELS[:6])
    return (
        both(x, y, generator()),
        pre.compose(pre.random_flip, pre.random_noise)(x, generator()),
        pre.takes_labels(both),
    )


def views(to: Move) -> Tensor:
    return logits_of(pre.test_time(to(network()), [lambda x: x, partial(pre.flip, which=True)]), SMALL.val)


def adjusted(to: Move) -> Tensor:
    """The shares of the classes are counted here or there, before the network is moved or after it."""
    model = to(network())
    prior = pre.class_prior(SMALL.train.labels, 4)
    return torch.stack(
        [
            logits_of(pre.adjust_logits(model, prior), SMALL.val),
            logits_of(pre.adjust_logits(model, to(prior)), SMALL.val),
            logits_of(to(pre.adjust_logits(network(), prior)), SMALL.val),
        ]
    )


def first_batch(to: Move) -> Any:
    return next(pre.balanced_batches(to(SMALL.train), 2, generator(), dtype=torch.float64))


CASES: dict[str, Case] = {
    "conflicts": copies,
    "drop": dropped,
    "outliers": lambda to: [
        *(method(to(ROWS)) for method in (pre.zscore_outliers, pre.iqr_outliers, pre.mad_outliers)),
        pre.mahalanobis_outliers(to(ROWS), 0.01),
        pre.winsorise(to(ROWS), pre.quantile_fences(ROWS)),
    ],
    "images": lambda to: [pre.per_channel(to(IMAGES))(to(IMAGES)), pre.per_image(to(IMAGES))],
    "operations": lambda to: pre.apply_operations(
        to(IMAGES), ["Rotate", "Posterize"], torch.arange(6) % 2, torch.full((6,), 4.0)
    ),
    "compose": composed,
    "class weights": lambda to: [pre.effective_number_weights(to(LABELS)), pre.balanced_weights(to(LABELS))],
    "balanced batches": first_batch,
    **{find.__name__: partial(wrong, find=find) for find in FOUND},
    "precision and recall": lambda to: [
        pre.precision_and_recall(to(LABELS > 1), true) for true in (LABELS > 0, to(LABELS > 0))
    ],
    "soft labels": lambda to: [pre.soft_labels(to(LABELS), 3), pre.soft_labels(to(SAID))],
}
WITH_A_DATA_SET: dict[str, Case] = {
    "test_time": views,
    "adjust_logits": adjusted,
    "recalls": lambda to: pre.recalls(to(network()), SMALL.val),
    "out of sample": lambda to: pre.out_of_sample_probabilities(
        SMALL.train, pre.by_network(SMALL, partial(fresh, network, SHORT, seed=0), SHORT, seed=0), folds=2,
        generator=generator(),
    ),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_on_the_gpu_as_here(name: str, dtype: torch.dtype) -> None:
    on_the_gpu_as_here(CASES[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WITH_A_DATA_SET)
def test_answers_lie_where_the_labels_do(name: str) -> None:
    on_the_gpu_as_here(WITH_A_DATA_SET[name], lies="cpu")


@pytest.mark.gpu
def test_augmented_and_watched_in_a_run_on_the_gpu() -> None:
    on_the_gpu_as_here(watched)


@pytest.mark.gpu
def test_scaled_data_stay_where_they_are() -> None:
    rows = pre.scaled(SMALL.to("cuda"), pre.standardise)
    assert {part.device.type for part in (rows.train, rows.val, rows.test)} == {"cuda"}
    x, _ = next(batches(rows.val, 20))
    wanted, _ = next(batches(pre.scaled(SMALL, pre.standardise).val, 20))
    torch.testing.assert_close(x.cpu(), wanted)
    mixed = pre.scaled(type(SMALL)("mixed", SMALL.train.to("cuda"), SMALL.val, SMALL.test, SMALL.classes))
    torch.testing.assert_close(mixed.val.inputs, pre.scaled(SMALL).val.inputs)


@pytest.mark.gpu
def test_objectives_on_the_gpu_with_weights_counted_here() -> None:
    model, (x, y) = network().cuda(), next(batches(split().to("cuda"), 10, dtype=torch.float64))
    weights = pre.class_weights(split().labels, 4)
    loss = pre.weighted_cross_entropy(model, x, y, weights=weights)
    loss = loss + pre.logit_adjusted_cross_entropy(model, x, y, prior=pre.class_prior(split().labels, 4))
    loss.backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in model.parameters())
