"""Early exits: leaving early answers as all exits would, costs what is counted, and the formulas hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.costs import flops
from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.training import Recipe, cross_entropy, evaluate, fit
from course_lib.partitioning.cutting import (
    chain,
)
from course_lib.partitioning.early_exits import (
    Edge,
    WithExits,
    answer_early,
    device_and_server_time,
    exit_curve,
    exit_flops,
    exit_logits,
    first_sure,
    heads_only,
    joint,
    max_probability,
    negative_entropy,
    on_device_alone,
    on_server_alone,
    overthinking,
    pooled,
    threshold_for,
)

SHAPE = (1, 8, 8)
PLACES = {
    "mlp": ("hidden.1", "hidden.3"),
    "convnet": ("features.3", "features.7"),
    "resnet": ("stem", "stages.1.0"),
    "vit": ("embed", "blocks.0"),
}
NETWORKS: dict[str, Callable[..., Any]] = {
    "mlp": mlp,
    "convnet": partial(convnet, width=4),
    "resnet": partial(resnet, width=4),
    "vit": partial(vit, width=16, heads=2),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(name: str, **settings: Any) -> tuple[nn.Module, WithExits]:
    torch.manual_seed(0)
    network = NETWORKS[name](SHAPE, 10, **settings).double()
    return network, WithExits(network, PLACES[name])


@pytest.fixture(scope="module")
def digits() -> Dataset:
    data = load("digits")
    return replace(data, train=data.train.subset(torch.arange(300)))


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> WithExits:
    _, model = built("mlp", width=24)
    recipe = Recipe(epochs=4, precision="float64", objective=partial(joint, weights=(1, 1, 1)), validate_every=4)
    fit(model, digits, recipe, seed=0)
    return model


# --- The network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_last_exit_is_the_network(name: str) -> None:
    network, model = built(name)
    x = numbers(5, *SHAPE)
    assert model.training
    network.eval(), model.eval()
    logits = model.all_exits(x)
    assert [each.shape for each in logits] == [(5, 10)] * 3
    assert torch.equal(logits[-1], network(x))
    assert torch.equal(model(x), network(x))
    own = sum(p.numel() for p in network.parameters())
    heads = sum(p.numel() for p in model.heads.parameters())
    assert sum(p.numel() for p in model.parameters()) == own + heads
    assert all(p.dtype == torch.float64 for p in model.parameters())
    layers = dict(chain(network))
    for part, place in zip(model.parts, PLACES[name], strict=False):
        assert [*part.children()][-1] is layers[place] or place == "embed", "an exit is not behind its layer"
    h = x
    for part, head, early in zip(model.parts, model.heads, logits, strict=False):
        h = part(h)
        rows = F.adaptive_avg_pool2d(h, min(4, h.shape[-1])).flatten(1) if h.ndim == 4 else h
        rows = rows.mean(1) if h.ndim == 3 else rows
        linear: Any = head.linear
        torch.testing.assert_close(early, rows @ linear.weight.T + linear.bias)


def test_a_raster_of_one_is_the_mean() -> None:
    h = numbers(3, 4, 5, 7)
    torch.testing.assert_close(pooled(h), h.mean((2, 3)))
    assert pooled(h, 6).shape == (3, 4 * 5 * 6)  # no finer than the image
    torch.testing.assert_close(pooled(h, 100), h.flatten(1))
    torch.testing.assert_close(pooled(numbers(3, 6, 4)), numbers(3, 6, 4).mean(1))
    assert WithExits(convnet(SHAPE, 10), ["features.3"], grid=1).heads[0].linear.in_features == 16  # type: ignore[union-attr]


@pytest.mark.parametrize("places", [(), ("hidden.3", "hidden.1"), ("hidden.1", "hidden.1"), ("head",), ("nowhere",)])
def test_places_that_do_not_fit_are_refused(places: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"places=.*: must be some of flatten, hidden.0"):
        WithExits(mlp(SHAPE, 10), places)


def test_a_network_of_ones_own_needs_an_example() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    model = WithExits(network, ["2"], example=numbers(2, *SHAPE))
    assert [each.shape for each in model.all_exits(numbers(4, *SHAPE))] == [(4, 3)] * 2
    with pytest.raises(ValueError, match="example=None: must be a batch"):
        WithExits(network, ["2"])
    with pytest.raises(ValueError, match="grid=0: must be"):
        WithExits(network, ["2"], grid=0, example=numbers(2, *SHAPE))


# --- Training ---------------------------------------------------------------------------------------------------------


def test_joint_is_the_weighted_sum_of_any_objective() -> None:
    _, model = built("convnet")
    model.eval()
    x, y = numbers(6, *SHAPE), torch.arange(6)

    def smoothed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, label_smoothing=0.2)

    for smoothing, objective in ((0.0, cross_entropy), (0.2, smoothed)):
        each = [F.cross_entropy(logits, y, label_smoothing=smoothing) for logits in model.all_exits(x)]
        expected = 0.5 * each[0] + 0.0 * each[1] + 2 * each[2]
        found = joint(model, x, y, weights=(0.5, 0, 2), objective=objective)
        assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    for weights in ((1, 1), (1, -1, 1), (1, 1, float("nan"))):
        with pytest.raises(ValueError, match="weights=.*: must be 3 numbers of at least 0"):
            joint(model, x, y, weights=weights)
    with pytest.raises(ValueError, match="model=Linear: must be a network WithExits"):
        joint(nn.Linear(2, 2), x, y, weights=(1,))


def test_heads_alone_leave_the_network_as_it_was(digits: Dataset) -> None:
    _, model = built("convnet")
    before, heads = copy.deepcopy(model.parts.state_dict()), copy.deepcopy(model.heads.state_dict())
    recipe = Recipe(epochs=1, precision="float64", objective=partial(joint, weights=(1, 1, 1)))
    fit(heads_only(model), digits, recipe, seed=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.parts.state_dict().items())
    assert not any(torch.equal(heads[name], tensor) for name, tensor in model.heads.state_dict().items())


# --- Leaving early ----------------------------------------------------------------------------------------------------


def test_confidences_are_their_formulas() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]]).double()
    assert max_probability(logits).tolist() == pytest.approx([0.25, 1])
    entropy = torch.distributions.Categorical(logits=numbers(7, 4)).entropy()
    torch.testing.assert_close(negative_entropy(numbers(7, 4)), -entropy)
    assert negative_entropy(torch.tensor([[0.0, -torch.inf]])).tolist() == [0]


def test_the_first_exit_that_is_sure_answers() -> None:
    sure = torch.tensor([[0.1, 0.6, 0.2, 0.5], [0.4, 0.9, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = first_sure([*sure[:, :, None]], 0.5, confidence=lambda each: each[:, 0])
    assert found.tolist() == [2, 0, 1, 0]  # as sure as the threshold is sure enough


@pytest.mark.parametrize("confidence", [max_probability, negative_entropy])
@pytest.mark.parametrize("name", NETWORKS)
def test_leaving_early_answers_as_the_exits_do(name: str, confidence: Any) -> None:
    _, model = built(name)
    x = numbers(40, *SHAPE)
    model.train()(x)  # batch norm has seen something
    seen = [0, 0, 0]
    for number, part in enumerate(model.parts):
        part.register_forward_hook(lambda _, args, out, n=number: seen.__setitem__(n, len(args[0])))
    model.eval()
    logits = torch.stack(model.all_exits(x))
    usual = confidence(logits[0]).median().item()
    model.train()
    for threshold in (-100.0, usual, 100.0):
        expected = first_sure([*logits], threshold, confidence=confidence)
        seen[:] = [0, 0, 0]
        found = answer_early(model, x, threshold, confidence=confidence)
        assert torch.equal(found.exits, expected)
        torch.testing.assert_close(found.logits, logits[expected, torch.arange(40)], rtol=0, atol=1e-12)
        assert seen == [int((expected >= k).sum()) for k in range(3)], "a part saw others than those still open"
    assert model.training
    assert not found.logits.requires_grad
    assert {*first_sure([*logits], usual, confidence=confidence).tolist()} > {0}


# --- Costs ------------------------------------------------------------------------------------------------------------


def test_flops_of_the_exits_are_counted_by_hand() -> None:
    _, model = built("mlp", width=20)
    first, second, head = 64 * 20, 20 * 20, 20 * 10
    x = numbers(1, *SHAPE)
    assert exit_flops(model, x) == [
        2 * (first + head),
        2 * (first + second + 2 * head),
        2 * (first + second + 3 * head),
    ]
    network, model = built("convnet")
    heads = [2 * sum(p.numel() for p in head.parameters() if p.ndim == 2) for head in model.heads]
    assert exit_flops(model, x)[-1] == flops(network.eval(), x) + sum(heads)


def test_the_curve_is_what_leaving_early_does(trained: WithExits, digits: Dataset) -> None:
    thresholds = [0.0, 0.5, 0.9, 1.1]
    curve = exit_curve(trained, digits.val, thresholds)
    costs = exit_flops(trained, numbers(1, *SHAPE))
    images = torch.stack([*exit_logits(trained, digits.val)])
    assert images.shape == (3, len(digits.val), 10)
    x, y = next(batches(digits.val, len(digits.val), dtype=torch.float64))
    for threshold in thresholds:
        found = answer_early(trained, x, threshold)
        row = curve.loc[threshold]
        assert row["accuracy"] == pytest.approx((found.logits.argmax(1) == y).double().mean().item())
        assert row["flops"] == pytest.approx(sum(costs[k] for k in found.exits.tolist()) / len(y))
        assert [row[f"exit {k}"] for k in range(3)] == pytest.approx(
            [(found.exits == k).double().mean().item() for k in range(3)]
        )
    assert curve["exit 0"].loc[0.0] == 1
    assert curve["exit 2"].loc[1.1] == 1
    assert curve["accuracy"].loc[1.1] == pytest.approx(evaluate(trained, digits.val).accuracy)
    assert curve["flops"].is_monotonic_increasing
    assert curve["exit 1"].loc[0.5] > 0


def test_the_cheapest_threshold_that_is_good_enough() -> None:
    table = {"accuracy": [0.5, 0.8, 0.9, 0.85], "flops": [1.0, 2.0, 3.0, 4.0]}
    curve = pd.DataFrame(table, index=pd.Index([0.1, 0.2, 0.3, 0.4], name="threshold"))
    assert [threshold_for(curve, a) for a in (0.0, 0.8, 0.81, 0.9)] == [0.1, 0.2, 0.3, 0.3]
    with pytest.raises(ValueError, match=r"accuracy=0.91: must be at most 0.9"):
        threshold_for(curve, 0.91)


def test_overthinking_is_counted(trained: WithExits, digits: Dataset) -> None:
    found = overthinking(trained, digits.test)
    right = exit_logits(trained, digits.test).argmax(2) == digits.test.labels
    counts = [0, 0, 0]
    for of_one in right.T.tolist():
        early = of_one[0] or of_one[1]
        counts = [
            a + b for a, b in zip(counts, (early and of_one[2], early and not of_one[2], any(of_one)), strict=True)
        ]
    assert [*found] == pytest.approx([count / len(digits.test) for count in counts])
    assert 0 < found.destructive < found.wasteful


# --- A device and a server --------------------------------------------------------------------------------------------


def test_time_on_a_device_and_a_server_is_the_formula() -> None:
    shares = {"exit 0": [0.5, 0.0, 1.0], "exit 1": [0.3, 0.0, 0.0], "exit 2": [0.2, 1.0, 0.0]}
    curve = pd.DataFrame({"accuracy": [1.0] * 3, "flops": [0.0] * 3, **shares})
    costs, edge = [10.0, 30.0, 100.0], Edge(device_speed=5, server_speed=50, bandwidth=8, latency=0.25)
    sent = 0.25 + 16 / 8
    first = 0.5 * 2 + 0.3 * (2 + sent + 20 / 50) + 0.2 * (2 + sent + 90 / 50)
    found = device_and_server_time(curve, costs, edge, place=0, message=16)
    assert found.tolist() == pytest.approx([first, 2 + sent + 90 / 50, 2])
    later = device_and_server_time(curve, costs, edge, place=1, message=16)
    assert later[0] == pytest.approx(0.5 * 2 + 0.3 * 6 + 0.2 * (6 + sent + 70 / 50))
    whole = device_and_server_time(curve, costs, edge, place=2, message=16)
    assert whole[1] == on_device_alone(100, edge) == 20
    assert on_server_alone(100, edge, message=16) == pytest.approx(sent + 2)
    for settings, words in (
        ({"place": 3, "message": 1}, "place=3: must be an exit, 0 to 2"),
        ({"message": -1}, "message=-1"),
    ):
        with pytest.raises(ValueError, match=words):
            device_and_server_time(curve, costs, edge, **settings)
    with pytest.raises(ValueError, match=r"costs=\[1\]: must be 3 numbers"):
        device_and_server_time(curve, [1], edge, message=1)


@pytest.mark.parametrize("name", ["device_speed", "server_speed", "bandwidth", "latency"])
def test_an_edge_of_no_speed_is_refused(name: str) -> None:
    settings = {"device_speed": 1.0, "server_speed": 1.0, "bandwidth": 1.0, "latency": 0.0}
    Edge(**settings)
    with pytest.raises(ValueError, match=f"{name}=-1.0: must be a number"):
        Edge(**(settings | {name: -1.0}))
    if name != "latency":
        with pytest.raises(ValueError, match=f"{name}=0.0: must be a number above 0"):
            Edge(**(settings | {name: 0.0}))
