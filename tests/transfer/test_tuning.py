"""Heads, probes against scikit-learn, and which weights move when."""

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
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.optim import SGD
from torchvision import models

from course_lib import transfer
from course_lib.lab.data import batches
from course_lib.lab.models import freeze, resnet
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import cross_entropy, evaluate, fit, logits_of
from course_lib.schedules import layers_by_depth
from tests.transfer.small import (
    EXACT,
    NAMES,
    batch,
    close,
    data,
    generator,
    gradients,
    moved,
    network,
    normal,
    same_weights,
    shaken,
    split,
    untouched,
)

# --- The last layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_new_head_and_nothing_else_new(name: str) -> None:
    model = network(name)
    untouched(model, lambda: transfer.with_head(model, 7, generator=generator()))
    found: Any = transfer.with_head(model, 7, generator=generator())
    again: Any = transfer.with_head(model, 7, generator=generator())
    other: Any = transfer.with_head(model, 7, generator=generator(1))
    assert found(batch()).shape == (6, 7)
    assert found.classes == 7
    assert torch.equal(found.head.weight, again.head.weight)
    assert not torch.equal(found.head.weight, other.head.weight)
    bound = found.head.in_features**-0.5  # of nn.Linear
    assert 0.8 * bound < found.head.weight.abs().max() <= bound
    close(found.embedding(batch()), model.embedding(batch()), 0)  # type: ignore[operator]


def test_a_frozen_network_gets_a_head_that_trains() -> None:
    found = transfer.with_head(freeze(network("convnet")), 3, generator=generator())
    assert {name for name, p in found.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3")])
def test_torchvisions_networks_have_a_last_layer(name: str, head: str) -> None:
    with torch.device("meta"):
        model = models.get_model(name)
    found = transfer.parts.head_name(model)
    assert found == head
    assert transfer.with_head(model, 5, generator=generator()).get_submodule(head).out_features == 5
    assert head not in transfer.layer_names(model)


def test_a_networks_head_is_its_own_whatever_is_around_it() -> None:
    vit, conv, draw = network("vit"), network("convnet"), generator()
    for around in (
        transfer.WithRotations(conv, generator=draw),
        transfer.WithDomains(conv, generator=draw),
        transfer.WithProjection(transfer.WithRotations(conv, generator=draw), generator=draw),
    ):
        found = transfer.parts.head_name(around)
        assert around.get_submodule(found) is conv.head
        assert transfer.with_head(around, 3, generator=draw).get_submodule(found).out_features == 3
        close(transfer.features(around, split(5)), transfer.features(conv, split(5)), 0)
    prompted = transfer.with_prompts(vit, 2, generator=draw)
    assert transfer.parts.head_name(prompted) == "network.head"
    updated = transfer.lora(prompted, 1, 1.0, generator=draw)
    assert not hasattr(updated.network.head, "lora"), "the head, which trains anyway, never gets an update"


# --- Features and probes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_features_are_what_goes_into_the_head(name: str) -> None:
    model, held = network(name).train(), split(11)
    untouched(model, lambda: transfer.features(model, held, batch_size=4))
    x = next(batches(held, 11, dtype=torch.float64))[0]
    model.eval()
    with torch.no_grad():
        close(transfer.features(model, held, batch_size=4), model.embedding(x))  # type: ignore[operator]
        close(transfer.embedding(model, x), model.embedding(x))  # type: ignore[operator]


def test_layers_by_name_are_averaged_over_places_or_tokens() -> None:
    held = split(5)
    x = next(batches(held, 5, dtype=torch.float64))[0]
    conv: Any = network("convnet")
    close(transfer.features(conv, held, "features.3"), conv.features[:4](x).mean((2, 3)).detach())
    vit: Any = network("vit")
    tokens = vit.blocks[0](vit.embed(x).flatten(2).transpose(1, 2) + vit.position)
    close(transfer.features(vit, held, "blocks.0"), tokens.mean(1).detach())


def test_layers_are_blocks_with_what_follows_them() -> None:
    assert transfer.layer_names(network("mlp")) == ["hidden.1", "hidden.3"]
    assert transfer.layer_names(network("convnet")) == ["features.3", "features.7", "pool"]
    assert transfer.layer_names(network("resnet")) == ["stem.2", "stages.0.0", "stages.1.0", "pool"]
    assert transfer.layer_names(network("vit")) == ["embed", "blocks.0", "norm"]


@pytest.mark.parametrize("C", [0.05, 1.0, 20.0])
def test_a_probe_is_scikit_learns_logistic_regression(C: float) -> None:
    x, labels = normal(60, 5), torch.randint(4, (60,), generator=generator(1))
    x[:, 0] += labels
    found = transfer.probe(x, labels, C=C)
    theirs = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(x.numpy(), labels.numpy())
    close(found.weight, torch.from_numpy(theirs.coef_), 2e-5)
    chances = torch.from_numpy(theirs.predict_proba(x.numpy()))
    close(found.logits(x).softmax(1), chances, 2e-5)
    assert found.accuracy(x, labels) == pytest.approx(theirs.score(x.numpy(), labels.numpy()))


def test_of_two_classes_scikit_learns_penalty_is_half() -> None:
    x, labels = normal(50, 3), torch.randint(2, (50,), generator=generator(1))
    found = transfer.probe(x, labels, C=0.5)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x.numpy(), labels.numpy())
    close(found.weight[1] - found.weight[0], torch.from_numpy(theirs.coef_[0]), 2e-5)


def test_a_probe_has_a_row_for_a_class_without_examples() -> None:
    x, labels = normal(40, 5, seed=3), torch.arange(40) % 2
    found = transfer.probe(x, labels, classes=3)
    assert found.weight.shape == (3, 5)
    assert (found.logits(x).argmax(1) != 2).all()
    with pytest.raises(ValueError, match="classes=1: must be above the largest label, 1"):
        transfer.probe(x, labels, classes=1)


def test_a_probe_of_float32_features_is_solved_in_float64() -> None:
    x, labels = normal(40, 3), torch.arange(40) % 3
    close(transfer.probe(x.float(), labels).weight, transfer.probe(x.float().double(), labels).weight, 0)


def test_a_probe_curve_is_a_probe_a_layer() -> None:
    model, seen, held = network("resnet"), split(40), split(20, seed=1)
    found = transfer.probe_curve(model, seen, held, C=0.3)
    assert [*found] == transfer.layer_names(model)
    for name, accuracy in found.items():
        x, other = (transfer.features(model, part, name).numpy() for part in (seen, held))
        theirs = LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000).fit(x, seen.labels.numpy())
        assert accuracy == pytest.approx(theirs.score(other, held.labels.numpy()))


def test_a_probe_becomes_the_head() -> None:
    model, held = network("vit"), split(30, classes=3)
    found = transfer.probe(transfer.features(model, held), held.labels)
    close(
        logits_of(transfer.with_probe(model, found), held),
        found.logits(transfer.features(model, held)),
    )
    assert network("vit").head.out_features == model.head.out_features == 4  # type: ignore[union-attr]


# --- All weights ------------------------------------------------------------------------------------------------------


def test_fine_tuning_is_a_run_from_where_the_weights_are() -> None:
    start, task = freeze(network("convnet")), data(40, classes=3)
    before = copy.deepcopy(start)
    found = transfer.fine_tune(start, task, EXACT, seed=4)
    assert not moved(before, start)
    by_hand = transfer.with_head(network("convnet"), 3, generator=generator(4))
    fit(by_hand, task, EXACT, seed=4)
    same_weights(found.network, by_hand)
    assert found.history["val_accuracy"][-1] == evaluate(found.network, task.val).accuracy


def test_a_probe_first_and_all_weights_then() -> None:
    start, task = network("convnet"), data(40)
    rests = replace(EXACT, epochs=1, optimizer=partial(SGD, lr=0.0))
    found = transfer.linear_probe_then_fine_tune(start, task, rests, seed=0, C=0.5).network
    x = transfer.features(start, task.train)
    theirs = transfer.probe(x, task.train.labels, C=0.5)
    close(found.head.weight.detach(), theirs.weight, 1e-8)  # type: ignore[union-attr, operator]
    trained = transfer.linear_probe_then_fine_tune(start, task, EXACT, seed=0, C=0.5).network
    assert {"features.0.weight", "head.weight"} <= moved(found, trained)


# --- Some layers before others ----------------------------------------------------------------------------------------


def test_how_many_layers_train() -> None:
    assert [transfer.layers_training(epoch, 3, 2) for epoch in range(1, 8)] == [1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("name", NAMES)
def test_one_layer_more_an_epoch(name: str) -> None:
    model, task, seen = network(name), data(40), list[set[str]]()
    layers = layers_by_depth(model)
    before = copy.deepcopy(model)

    def look(optimizer: Any, step: int) -> None:
        if step % 2 == 0:  # the last of an epoch's two
            seen.append(moved(before, model) & dict(model.named_parameters()).keys())
            before.load_state_dict(model.state_dict())

    recipe = replace(EXACT, epochs=len(layers) + 1)
    fit(model, task, after_each_step(transfer.gradual_unfreezing(recipe, network(name), task), look), seed=0)
    expected = [{n for names in layers[-k:] for n in names} for k in [*range(1, len(layers) + 1), len(layers)]]
    assert seen == expected


def test_unfreezing_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    task = data(40)
    whole, parts = network("convnet"), network("convnet")
    recipe = transfer.gradual_unfreezing(replace(EXACT, epochs=4), whole, task)
    fit(whole, task, recipe, seed=0)
    fit(network("convnet"), task, replace(recipe, epochs=2), seed=0, checkpoint=tmp_path / "run")
    fit(parts, task, recipe, seed=0, checkpoint=tmp_path / "run")
    same_weights(whole, parts)


def test_what_was_frozen_stays_so_and_two_schedules_go_together() -> None:
    model, task = network("convnet"), data(40)
    model.features[0].requires_grad_(False)  # type: ignore[index]
    before = copy.deepcopy(model)
    recipe = transfer.gradual_unfreezing(transfer.discriminative_rates(replace(EXACT, epochs=5), model), model, task)
    history = fit(model, task, recipe, seed=0)
    assert "features.0.weight" not in moved(before, model)
    assert "features.4.weight" in moved(before, model)
    assert history.rates[0] == pytest.approx(tuple(0.05 / 2.6**k for k in (3, 2, 1, 0)))


def test_rates_fall_towards_the_input() -> None:
    model, task = network("resnet"), data(20)
    before = copy.deepcopy(model)
    recipe = transfer.discriminative_rates(replace(EXACT, epochs=1), network("resnet"), decay=0.5)
    x, y = next(batches(task.train, 20, generator=generator(1), dtype=torch.float64))
    copied = copy.deepcopy(before).train()
    slope = gradients(cross_entropy(copied, x, y), copied)
    fit(model, task, recipe, seed=0)  # one step, on all 20 examples
    layers = layers_by_depth(model)
    for depth, names in enumerate(reversed(layers)):
        for name in names:
            change = model.get_parameter(name) - before.get_parameter(name)
            close(change.detach(), -0.05 * 0.5**depth * slope[name], 1e-7)


# --- Near the start ---------------------------------------------------------------------------------------------------


def test_l2_sp_is_its_formula() -> None:
    start = transfer.starting_point(network("convnet"))
    model = shaken(transfer.with_head(network("convnet"), 3, generator=generator()))
    model.features[1].requires_grad_(False)  # type: ignore[index]
    x, y = batch(), torch.arange(6) % 3
    found = transfer.l2_sp(model, x, y, start=start, alpha=0.3, beta=0.7)
    expected = F.cross_entropy(model(x), y)
    for name, value in model.named_parameters():
        if name.startswith("head"):
            expected = expected + 0.35 * value.square().sum()
        elif not name.startswith("features.1."):
            expected = expected + 0.15 * (value - start[name]).square().sum()
    close(found, expected)
    assert set(start) == {name for name, _ in model.named_parameters()}


# --- Few numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_bitfit_moves_biases_and_the_head(name: str) -> None:
    model, task = network(name), data(40)
    found = transfer.bitfit(model)
    fit(found, task, EXACT, seed=0)
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias")} | {"head.weight"}
    changed = moved(model, found)
    assert changed <= biases, "weights and batch norm's statistics stay"
    assert {"head.weight", "head.bias"} < changed
    assert transfer.trainable(found) == sum(model.get_parameter(n).numel() for n in biases)


def test_counting() -> None:
    model = resnet((1, 8, 8), 3)
    assert transfer.trainable(model) == model.parameter_count
    assert transfer.trainable(freeze(model)) == 0


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    model, task, held = network("convnet"), data(), split(8)
    x, labels = normal(8, 3), held.labels
    cases: list[tuple[str, Any]] = [
        ("classes=0: must be", lambda: transfer.with_head(model, 0, generator=generator())),
        ("model='ReLU': must be a network whose last", lambda: transfer.with_head(nn.ReLU(), 2, generator=generator())),
        ("layer='nose': must be a layer of ConvNet", lambda: transfer.features(model, held, "nose")),
        ("batch_size=0: must be", lambda: transfer.features(model, held, batch_size=0)),
        ("C=0: must be", lambda: transfer.probe(x, labels, C=0)),
        ("steps=0: must be", lambda: transfer.probe(x, labels, steps=0)),
        ("x=[8]: must be features", lambda: transfer.probe(x[:, 0], labels)),
        ("must be int64 [8] of at least 0", lambda: transfer.probe(x, labels[:5])),
        ("must be int64 [8] of at least 0", lambda: transfer.probe(x, labels - 9)),
        ("must be a probe of 12 features", lambda: transfer.with_probe(model, transfer.probe(x, labels))),
        ("C=-1: must be", lambda: transfer.linear_probe_then_fine_tune(model, task, EXACT, seed=0, C=-1)),
        ("epochs_each=0: must be", lambda: transfer.gradual_unfreezing(EXACT, model, task, epochs_each=0)),
        (
            "must be of the architecture",
            lambda: fit(network("mlp"), task, transfer.gradual_unfreezing(EXACT, model, task), seed=0),
        ),
        ("decay=0: must be", lambda: transfer.discriminative_rates(EXACT, model, decay=0)),
        ("alpha=-1: must be", lambda: transfer.l2_sp(model, batch(), labels[:6], start={}, alpha=-1)),
        ("beta=nan: must be", lambda: transfer.l2_sp(model, batch(), labels[:6], start={}, beta=float("nan"))),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tuning_on_the_gpu(dtype: torch.dtype) -> None:
    here = network("convnet").to(dtype)
    there = copy.deepcopy(here).cuda()
    held = split(30)
    seen: Tensor = transfer.features(there, held)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    assert seen.is_cuda
    close(seen.cpu(), transfer.features(here, held), tolerance)
    found, expected = (transfer.probe(transfer.features(model, held), held.labels) for model in (there, here))
    close(found.weight.cpu(), expected.weight, 1e-5 if dtype == torch.float64 else 1e-2)
    assert transfer.with_probe(there, found).head.weight.is_cuda  # type: ignore[union-attr]
    assert transfer.with_head(there, 3, generator=generator()).head.weight.is_cuda  # type: ignore[union-attr]
