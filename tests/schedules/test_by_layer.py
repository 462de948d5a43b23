"""Layers by depth of every network, and steps that are the layer's part of a plain step."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from course_lib import optimizers
from course_lib.lab.data import load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.schedules.by_layer import layers_by_depth, layerwise_factors, layerwise_rates, with_layer_rates
from course_lib.schedules.shapes import cosine, schedule

SHAPE = (1, 8, 8)
NETWORKS: dict[str, tuple[Any, list[str]]] = {
    # the beginning of the names in each layer
    "mlp": (partial(mlp, SHAPE, 10, width=8, depth=3), ["hidden.0", "hidden.2", "hidden.4", "head"]),
    "convnet": (
        partial(convnet, SHAPE, 10, width=2),
        ["features.[01]", "features.[45]", "features.(8|9)", "head"],
    ),
    "resnet": (
        partial(resnet, SHAPE, 10, width=2, blocks=(2, 1)),
        ["stem", "stages.0.0", "stages.0.1", "stages.1.0", "head"],
    ),
    "vit": (
        partial(vit, SHAPE, 10, width=8, depth=2, heads=2),
        ["(position|embed)", "blocks.0", "(blocks.1|norm)", "head"],
    ),
    "resnet18": (
        partial(torchvision.models.resnet18, num_classes=3),
        ["(conv1|bn1)", *(rf"layer{k}\.{b}" for k in (1, 2, 3, 4) for b in (0, 1)), "fc"],
    ),
    "linear": (partial(nn.Linear, 3, 2), ["(weight|bias)"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_come_from_the_input_and_hold_every_parameter_once(name: str) -> None:
    make, expected = NETWORKS[name]
    model = make()
    layers = layers_by_depth(model)
    assert len(layers) == len(expected)
    for names, pattern in zip(layers, expected, strict=True):
        assert all(re.match(pattern + r"(\.|$)", n) for n in names), (pattern, names)
    everything = [n for names in layers for n in names]
    assert sorted(everything) == sorted(n for n, _ in model.named_parameters())


def test_shared_parameters_stand_where_they_are_met_first() -> None:
    shared = nn.Linear(4, 4)
    layers = layers_by_depth(nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4), shared, nn.Linear(4, 2)))
    assert layers == [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["4.weight", "4.bias"]]


def test_rates_fall_by_the_decay_from_the_head_down() -> None:
    model = NETWORKS["vit"][0]()
    groups = layerwise_rates(model, 0.1, 0.5)
    assert [group["lr"] for group in groups] == pytest.approx([0.0125, 0.025, 0.05, 0.1])
    named = dict(model.named_parameters())
    for group, names in zip(groups, layers_by_depth(model), strict=True):
        assert [n for n, _ in group["params"]] == names
        assert all(p is named[n] for n, p in group["params"])
    assert torch.optim.Adam(groups).param_groups[0]["param_names"] == layers_by_depth(model)[0]
    assert [group["lr"] for group in layerwise_rates(model, 2.6)][-2:] == pytest.approx([1.0, 2.6])


@pytest.mark.parametrize("make", [torch.optim.SGD, optimizers.SGD])
@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_each_layer_takes_its_part_of_the_plain_step(name: str, make: Any) -> None:
    model = NETWORKS[name][0]().double()
    plain, scaled = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = layerwise_factors(model, 0.3)
    assert len(set(factors.values())) == len(NETWORKS[name][1])
    for network, factory in (
        (plain, partial(make, lr=0.1)),
        (scaled, with_layer_rates(partial(make, lr=0.1), factors)),
    ):
        optimizer = factory(network.named_parameters())
        network(x).square().sum().backward()
        optimizer.step()
    before, whole = dict(model.named_parameters()), dict(plain.named_parameters())
    for n, p in scaled.named_parameters():
        torch.testing.assert_close(p - before[n], factors[n] * (whole[n] - before[n]), rtol=1e-9, atol=1e-14)


def test_a_schedule_keeps_the_ratios_in_fit() -> None:
    data = load("digits", train_size=100)
    make = partial(mlp, SHAPE, 10, width=8)
    recipe = Recipe(epochs=1, batch_size=25, precision="float64", schedule=schedule(cosine))
    factory = with_layer_rates(partial(torch.optim.SGD, lr=0.1), layerwise_factors(make(), 0.5))
    recipe = Recipe(**{**vars(recipe), "optimizer": factory})
    history = fit(fresh(make, recipe, seed=0), data, recipe, seed=0)
    for step, rates in enumerate(history.rates):
        assert rates == pytest.approx([0.1 * f * cosine(step, 4) for f in (0.25, 0.5, 1.0)])


def test_it_can_be_pickled_and_told_from_others() -> None:
    factors = {d: layerwise_factors(NETWORKS["mlp"][0](), d) for d in (0.5, 0.6)}
    one, other = (with_layer_rates(partial(torch.optim.SGD, lr=0.1), factors[d]) for d in (0.5, 0.6))
    assert fingerprint(pickle.loads(pickle.dumps(one))) == fingerprint(one) != fingerprint(other)


def test_bad_settings_are_named() -> None:
    model = NETWORKS["mlp"][0]()
    with pytest.raises(ValueError, match="decay=0: must be a number above 0"):
        layerwise_factors(model, 0)
    with pytest.raises(ValueError, match="lr=-1: must be a number of at least 0"):
        layerwise_rates(model, -1)
    with pytest.raises(ValueError, match="model='ReLU': must be a network with parameters"):
        layers_by_depth(nn.ReLU())
    with pytest.raises(ValueError, match="must be a number of at least 0"):
        with_layer_rates(torch.optim.SGD, {"head.weight": -1.0})
    factors = {n: 1.0 for n, _ in model.named_parameters() if n != "head.bias"}
    with pytest.raises(ValueError, match="has none for 'head.bias'"):
        with_layer_rates(torch.optim.SGD, factors)(model.named_parameters())
