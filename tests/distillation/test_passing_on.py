"""Chains of students, students that teach one another, and networks that teach themselves."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import distillation as kd
from course_lib import pruning
from course_lib import regularization as reg
from course_lib.lab.data import Dataset
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from tests.distillation.small import SMALL_CONVNET, counted, gradients, images, network, normal, teacher, tiny

RECIPE = Recipe(epochs=2, batch_size=20, precision="float64")
LONGER = replace(RECIPE, epochs=12)
MLP = partial(mlp, (1, 16, 16), 10, width=16)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tiny()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- Chains -----------------------------------------------------------------------------------------------------------


def test_distilled_is_fit_with_soft_targets(data: Dataset) -> None:
    wise = kd.frozen(SMALL_CONVNET())
    within = replace(RECIPE, objective=reg.label_smoothing)
    found = kd.distilled(SMALL_CONVNET, wise, data, within, seed=3, temperature=2.0, mix=0.5)
    objective = partial(
        kd.soft_targets, teacher=wise, temperature=2.0, mix=0.5, objective=reg.label_smoothing
    )  # fmt: skip
    by_hand = fresh(SMALL_CONVNET, RECIPE, seed=3)
    fit(by_hand, data, replace(RECIPE, objective=objective), seed=3)
    assert same(found, by_hand)


def test_each_of_a_chain_is_the_student_of_the_one_before(data: Dataset) -> None:
    factories = [partial(SMALL_CONVNET.func, *SMALL_CONVNET.args, width=width) for width in (4, 3, 2)]
    chain = kd.assistants(factories, data, RECIPE, seed=5, temperature=3.0, mix=0.8)
    first = fresh(factories[0], RECIPE, seed=5)
    fit(first, data, RECIPE, seed=5)
    assert same(chain[0], first)
    second = kd.distilled(factories[1], kd.frozen(first), data, RECIPE, seed=1005, temperature=3.0, mix=0.8)
    assert same(chain[1], second)
    third = kd.distilled(factories[2], kd.frozen(second), data, RECIPE, seed=2005, temperature=3.0, mix=0.8)
    assert same(chain[2], third)
    assert not any(p.requires_grad for network in chain for p in network.parameters())
    given = kd.assistants(factories[1:2], data, RECIPE, seed=5, teacher=chain[0], temperature=3.0, mix=0.8)
    apart = kd.distilled(factories[1], chain[0], data, RECIPE, seed=5, temperature=3.0, mix=0.8)
    assert same(given[0], apart)


def test_born_again_is_a_chain_of_the_same(data: Dataset) -> None:
    found = kd.born_again(SMALL_CONVNET, data, RECIPE, generations=2, seed=1)
    expected = kd.assistants([SMALL_CONVNET] * 3, data, RECIPE, seed=1, temperature=1.0, mix=0.5)
    assert len(found) == 3
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert evaluate(kd.Ensemble(found), data.val).loss > 0


def test_a_pruned_network_learns_from_what_it_was_and_keeps_its_zeros(data: Dataset) -> None:
    dense = fresh(MLP, LONGER, seed=0)
    fit(dense, data, LONGER, seed=0)
    pruned = copy.deepcopy(dense)
    masks = pruning.global_unstructured(pruning.magnitude(pruned), 0.7)
    pruning.apply_masks(pruned, masks)
    before = {name: (dict(pruned.named_modules())[name.removesuffix(".weight")].weight == 0) for name in masks}
    apart = partial(kd.divergence_from, teacher=kd.frozen(dense), split=data.train)
    at_first = apart(pruned)
    objective = partial(kd.soft_targets, teacher=dense, mix=1.0, temperature=1.0)
    fit(pruned, data, replace(LONGER, objective=objective), seed=1)
    for name, zeros in before.items():
        weight = dict(pruned.named_modules())[name.removesuffix(".weight")].weight
        assert isinstance(weight, torch.Tensor)
        assert (weight[zeros] == 0).all()
        assert zeros.any()
    assert apart(pruned) < 0.5 * at_first


# --- One another ------------------------------------------------------------------------------------------------------


def test_mutual_is_its_formula() -> None:
    x, y = images()
    members = [network("mlp", seed) for seed in range(3)]
    cohort = kd.Cohort(members)
    found = kd.mutual(cohort, x, y, strength=0.5, temperature=2.0)
    logits = [member(x) for member in members]
    expected = sum(F.cross_entropy(z, y) for z in logits)
    for k in range(3):
        for other in {0, 1, 2} - {k}:
            expected = expected + 0.25 * kd.soft_loss(logits[k], logits[other].detach(), 2.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(gradients(cohort, found), gradients(cohort, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert torch.equal(cohort(x), members[0](x))


def test_a_cohort_trains_and_its_members_come_nearer(data: Dataset) -> None:
    def apart(strength: float) -> float:
        recipe = replace(LONGER, objective=partial(kd.mutual, strength=strength))
        cohort = fresh(lambda: kd.Cohort([MLP(), MLP()]), recipe, seed=0)
        history = fit(cohort, data, recipe, seed=0)
        assert history["train_loss"][-1] < history["train_loss"][0]
        return kd.divergence_from(cohort.students[1], teacher=cohort.students[0], split=data.val)  # type: ignore[index]

    assert apart(1.0) < 0.75 * apart(0.0)


# --- Early exits ------------------------------------------------------------------------------------------------------


def test_self_distillation_is_its_formula() -> None:
    x, y = images()
    model = network("convnet")
    model.train()
    exits = kd.WithExits(model, ["features.2", "features.6"], x)
    passes = counted(model)
    found = kd.self_distillation(exits, x, y, temperature=2.0, mix=0.4, hint=0.1)
    assert len(passes) == 1
    assert exits.model is model
    logits, seen = exits.exits(x)
    torch.testing.assert_close(logits[-1], exits(x))
    with kd.features(model, ["features.2", "embedding"]) as layers:
        model(x)
    first = exits.adapters[0](layers["features.2"].mean((2, 3)))
    torch.testing.assert_close(seen[0], first)
    torch.testing.assert_close(logits[0], exits.heads[0](first.relu()))
    torch.testing.assert_close(seen[-1], layers["embedding"])
    expected = F.cross_entropy(logits[-1], y)
    for z, mine in zip(logits[:2], seen[:2], strict=True):
        expected = expected + 0.6 * F.cross_entropy(z, y) + 0.4 * kd.soft_loss(z, logits[-1].detach(), 2.0)
        expected = expected + 0.1 * F.mse_loss(mine, seen[-1].detach())
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(gradients(exits, found), gradients(exits, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_exits_fit_every_network(name: str) -> None:
    x, y = images()
    layer = {"mlp": "hidden.1", "resnet": "stages.0", "vit": "blocks.0"}[name]
    exits = kd.WithExits(network(name), [layer], x.float())
    kd.self_distillation(exits, x, y).backward()
    assert all(p.grad is not None for p in exits.parameters())


# --- Its own average --------------------------------------------------------------------------------------------------


def test_the_average_follows_the_steps(data: Dataset) -> None:
    model = fresh(lambda: kd.WithAverage(SMALL_CONVNET(), decay=0.9), RECIPE, seed=0)
    expected = copy.deepcopy([*model.student.parameters()])  # type: ignore[union-attr, operator]
    snapshots = []
    recipe = kd.following(replace(RECIPE, objective=kd.mean_teacher), model)  # type: ignore[arg-type]
    seen = kd.WithAverage.follow

    def follow(self: kd.WithAverage) -> None:
        snapshots.append(copy.deepcopy([*self.student.parameters()]))
        seen(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd.WithAverage, "follow", follow)
        history = fit(model, data, recipe, seed=0)
    assert len(snapshots) == 6
    with torch.no_grad():
        for weights in snapshots:
            expected = [nn.Parameter(0.9 * a + 0.1 * w) for a, w in zip(expected, weights, strict=True)]
    for mine, by_hand in zip(model.average.parameters(), expected, strict=True):  # type: ignore[union-attr, operator]
        torch.testing.assert_close(mine, by_hand, rtol=1e-12, atol=1e-14)
    assert history["val_accuracy"][-1] == evaluate(model.average, data.val).accuracy  # type: ignore[arg-type]
    assert same(model.train().student, model.student)  # type: ignore[arg-type]


def test_mean_teacher_is_its_formula_and_needs_no_labels() -> None:
    x, y = images()
    model = kd.WithAverage(network("convnet")).train()
    with torch.no_grad():
        for p in model.average.parameters():
            p.add_(0.1 * normal(*p.shape, seed=3))
    statistics = copy.deepcopy([*model.average.buffers()])
    found = kd.mean_teacher(model, x, y, strength=3.0)
    assert all(torch.equal(a, b) for a, b in zip(statistics, model.average.buffers(), strict=True))
    q, p = model.student(x).softmax(1), model.average(x).detach().softmax(1)
    expected = F.cross_entropy(model.student(x), y) + 3 * (q - p).square().sum() / (6 * 4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    kd.mean_teacher(model, x, torch.full((6,), -100), objective=kd.labelled_only).backward()
    assert torch.equal(model(x), model.student(x))
    assert torch.equal(model.eval()(x), model.average(x))


def test_a_run_goes_on_with_its_average(data: Dataset, tmp_path: Path) -> None:
    def run(epochs: int, **where: Any) -> nn.Module:
        model = fresh(lambda: kd.WithAverage(SMALL_CONVNET()), RECIPE, seed=0)
        recipe = kd.following(replace(RECIPE, objective=kd.mean_teacher, epochs=epochs), model)  # type: ignore[arg-type]
        fit(model, data, recipe, seed=0, **where)
        return model

    whole = run(2)
    run(1, checkpoint=tmp_path / "run.pt")
    assert same(whole, run(2, checkpoint=tmp_path / "run.pt"))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(data: Dataset) -> None:
    x, y = images()
    model = network()
    cohort, exits, average = kd.Cohort([model, model]), kd.WithExits(model, ["hidden.0"], x), kd.WithAverage(model)
    wise = teacher("mlp")
    cases: list[tuple[str, Any]] = [
        ("networks=[]: must be at least one factory", lambda: kd.assistants([], data, RECIPE, seed=0)),
        ("mix=2: must be a number from 0 to 1", lambda: kd.assistants([SMALL_CONVNET], data, RECIPE, seed=0, mix=2)),
        ("temperature=0: must be", lambda: kd.assistants([SMALL_CONVNET], data, RECIPE, seed=0, temperature=0)),
        (
            "generations=0: must be a whole number of at least 1",
            lambda: kd.born_again(SMALL_CONVNET, data, RECIPE, generations=0, seed=0),
        ),
        ("teacher=MLP gives logits", lambda: kd.soft_targets(SMALL_CONVNET().double(), x, y, teacher=wise)),
        ("must be at least two networks", lambda: kd.Cohort([model])),
        ("model=MLP: must be a Cohort of students", lambda: kd.mutual(model, x, y)),
        ("strength=-1: must be a number of at least 0", lambda: kd.mutual(cohort, x, y, strength=-1)),
        ("temperature=0: must be a number above 0", lambda: kd.mutual(cohort, x, y, temperature=0)),
        ("at=[]: must be the names of at least one layer", lambda: kd.WithExits(model, [], x)),
        ("layer='5': must be one of MLP's layers", lambda: kd.WithExits(model, ["5"], x)),
        ("layer='embedding': must be one of", lambda: kd.WithExits(nn.Sequential(nn.Flatten()), ["0"], x)),
        ("model=MLP: must be a network WithExits", lambda: kd.self_distillation(model, x, y)),
        ("mix=-0.1: must be a number from 0 to 1", lambda: kd.self_distillation(exits, x, y, mix=-0.1)),
        ("hint=-1: must be a number of at least 0", lambda: kd.self_distillation(exits, x, y, hint=-1)),
        ("temperature=0: must be a number above 0", lambda: kd.self_distillation(exits, x, y, temperature=0)),
        ("decay=1: must be a number from 0 to below 1", lambda: kd.WithAverage(model, decay=1)),
        ("model=MLP: must be a network WithAverage", lambda: kd.mean_teacher(model, x, y)),
        ("strength=-1: must be a number of at least 0", lambda: kd.mean_teacher(average, x, y, strength=-1)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_mutual_and_self_distillation_on_the_gpu() -> None:
    x, y = images()
    for objective, model in (
        (kd.mutual, kd.Cohort([network("mlp", 0), network("mlp", 1)])),
        (kd.self_distillation, kd.WithExits(network("convnet"), ["features.2"], x)),
        (kd.mean_teacher, kd.WithAverage(network("convnet"))),
    ):
        here = objective(model, x, y).item()  # type: ignore[operator]
        there = objective(model.cuda(), x.cuda(), y.cuda()).item()  # type: ignore[operator]
        assert there == pytest.approx(here, rel=1e-8)
