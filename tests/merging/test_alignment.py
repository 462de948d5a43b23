"""Units in another order: the same function, the best order by brute force, the order that was hidden found again."""

from __future__ import annotations

import copy
import itertools
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from course_lib import merging
from course_lib.lab.data import batches
from course_lib.lab.models import mlp, resnet
from course_lib.lab.tracing import open_attention
from course_lib.lab.training import fresh
from course_lib.merging import alignment
from tests.merging.small import EXACT, FOLLOWED, NAMES, batch, close, generator, network, normal, same_weights, split


def shuffled(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    source = generator(seed)
    return {group.name: torch.randperm(group.units, generator=source) for group in merging.permutation_groups(model)}


def back(order: Tensor) -> Tensor:
    return torch.argsort(order)


def small_mlp(width: int, depth: int, seed: int) -> nn.Module:
    return fresh(partial(mlp, (3,), 2, width=width, depth=depth), EXACT, seed=seed)


# --- The same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_another_order_is_the_same_function(name: str, training: bool) -> None:
    model, x = network(name).train(training), batch()
    orders = shuffled(model)
    moved = merging.permute(model, orders)
    assert moved.training is training
    assert any((order != torch.arange(len(order))).any() for order in orders.values())
    changed = [key for key, value in moved.named_parameters() if not torch.equal(value, model.get_parameter(key))]
    assert len(changed) >= len(orders)
    same_weights(merging.permute(moved, {key: back(order) for key, order in orders.items()}), model)
    close(moved(x), model(x), 1e-12)


def test_an_order_says_which_unit_comes_where() -> None:
    model = small_mlp(4, 1, 0)
    order = torch.tensor([2, 0, 3, 1])
    moved = merging.permute(model, {"hidden.0": order})
    assert torch.equal(moved.get_parameter("hidden.0.weight"), model.get_parameter("hidden.0.weight")[order])
    assert torch.equal(moved.get_parameter("hidden.0.bias"), model.get_parameter("hidden.0.bias")[order])
    assert torch.equal(moved.get_parameter("head.weight"), model.get_parameter("head.weight")[:, order])


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("mlp", ["hidden.0", "hidden.2"]),
        ("convnet", ["features.0", "features.4", "features.8"]),
        ("resnet", ["stem.0", "stages.0.0.conv1", "stages.1.0.conv1", "stages.1.0.conv2", "stages.2.0.conv1",
                    "stages.2.0.conv2"]),
        ("vit", ["blocks.0.attention.qkv", "blocks.0.mlp.0", "blocks.1.attention.qkv", "blocks.1.mlp.0"]),
    ],
)  # fmt: skip
def test_the_groups_are_those_of_the_architecture(name: str, groups: list[str]) -> None:
    assert [group.name for group in merging.permutation_groups(network(name))] == groups


def test_other_networks_need_an_example_and_torchs_attention_comes_back_opened() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.after = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.after(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = Attending().double().eval(), normal(2, 5, 8)
    with pytest.raises(ValueError, match="example_input=None: must be given for Attending"):
        merging.permutation_groups(model)
    groups = merging.permutation_groups(model, x)
    orders = {group.name: torch.arange(group.units).flip(0) for group in groups}
    moved = merging.permute(model, orders, x)
    assert {"attention.query", "after.0"} <= set(orders)
    close(moved(x), model(x), 1e-12)
    assert not torch.equal(
        moved.get_parameter("attention.query.weight"),
        open_attention(copy.deepcopy(model)).get_parameter("attention.query.weight"),
    )
    found = merging.match_weights(model, moved, generator=generator(), example_input=x)
    assert all(torch.equal(found[name], back(order)) for name, order in orders.items())


# --- By weights -------------------------------------------------------------------------------------------------------


def by_brute_force(a: nn.Module, b: nn.Module) -> float:
    """The largest similarity over all orders of all groups."""
    groups = merging.permutation_groups(b)
    orders = [list(map(torch.tensor, itertools.permutations(range(group.units)))) for group in groups]
    best = -np.inf
    fixed = {name: value.detach() for name, value in a.named_parameters()}
    for choice in itertools.product(*orders):
        moved = {name: value.detach() for name, value in b.named_parameters()}
        for group, order in zip(groups, choice, strict=True):
            alignment.reorder(moved, group, order)
        best = max(best, sum(float((fixed[name] * value).sum()) for name, value in moved.items()))
    return best


@pytest.mark.parametrize("seed", range(4))
def test_one_group_gets_the_best_of_all_orders(seed: int) -> None:
    a, b = small_mlp(5, 1, seed), small_mlp(5, 1, 50 + seed)
    found = merging.permute(b, merging.match_weights(a, b, generator=generator()))
    assert merging.weight_similarity(a, found) == pytest.approx(by_brute_force(a, b), rel=1e-12)


def test_two_groups_get_a_local_optimum_and_the_best_from_some_start() -> None:
    a, b = small_mlp(4, 2, 3), small_mlp(4, 2, 60)
    best, groups, reached = by_brute_force(a, b), merging.permutation_groups(b), []
    fixed = {name: value.detach() for name, value in a.named_parameters()}
    for seed in range(6):
        orders = merging.match_weights(a, b, generator=generator(seed))
        moved = merging.permute(b, orders)
        reached.append(merging.weight_similarity(a, moved))
        weights = {name: value.detach() for name, value in moved.named_parameters()}
        for group, order in itertools.product(groups, itertools.permutations(range(4))):
            other = dict(weights)  # no change of one group alone helps
            alignment.reorder(other, group, torch.tensor(order))
            nearer = sum(float((value * other[name]).sum()) for name, value in fixed.items())
            assert nearer <= reached[-1] + 1e-12
    assert max(reached) <= best + 1e-12
    assert min(reached) > merging.weight_similarity(a, b)
    assert max(reached) == pytest.approx(best, rel=1e-12)


def test_each_sweep_brings_the_networks_nearer() -> None:
    a, b = network("resnet", 0), network("resnet", 1)
    reached = [merging.weight_similarity(a, b)]
    for sweeps in (1, 2, 100):
        moved = merging.permute(b, merging.match_weights(a, b, generator=generator(1), sweeps=sweeps))
        reached.append(merging.weight_similarity(a, moved))
    assert reached == sorted(reached)
    assert reached[1] > reached[0]
    again = merging.match_weights(a, b, generator=generator(1))
    assert all(torch.equal(order, again[name]) for name, order in
               merging.match_weights(a, b, generator=generator(1)).items())  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_hidden_order_is_found_by_weights(name: str) -> None:
    a = network(name)
    orders = shuffled(a, 3)
    found = merging.match_weights(a, merging.permute(a, orders), generator=generator())
    assert all(torch.equal(found[key], back(order)) for key, order in orders.items())


def test_the_similarity_is_of_parameters_and_the_distance_follows_it() -> None:
    a, b = network("convnet", 0), network("convnet", 1)
    rows = [nn.utils.parameters_to_vector(model.parameters()) for model in (a, b)]
    assert merging.weight_similarity(a, b) == pytest.approx(float((rows[0] @ rows[1]).detach()))


class Loop(nn.Module):
    """A layer whose rows and columns are one group, as in a recurrent or residual network without a second layer."""

    input_shape = (3,)

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        for place, p in enumerate(self.parameters()):
            p.data = normal(*p.shape, seed=10 * seed + place)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.head(h + self.again(h).relu())


def test_a_group_on_both_sides_of_a_weight_never_gets_worse() -> None:
    for seed in range(6):
        a, b = Loop(seed), Loop(seed + 20)
        moved = merging.permute(b, merging.match_weights(a, b, generator=generator(seed)))
        assert by_brute_force(a, b) + 1e-9 >= merging.weight_similarity(a, moved) >= merging.weight_similarity(a, b)
        close(moved(normal(4, 3)), b(normal(4, 3)), 1e-12)


# --- By activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_hidden_order_is_found_by_activations(name: str) -> None:
    a = network(name)
    orders = shuffled(a, 4)
    found = merging.match_activations(a, merging.permute(a, orders), split(30), batch_size=7)
    assert all(torch.equal(found[key], back(order)) for key, order in orders.items())


def test_correlations_are_numpys_before_the_activation() -> None:
    a, b, held = network("mlp", 0), network("mlp", 1), split(25)
    found = merging.unit_correlations(a, b, held, batch_size=6)
    x = next(batches(held, 25, dtype=torch.float64))[0].flatten(1)
    said = [model.hidden[0](x).detach().numpy().T for model in (a, b)]  # type: ignore[union-attr, index, operator]
    close(found["hidden.0"], torch.from_numpy(np.corrcoef(*said)[:6, 6:]), 1e-10)
    pairs = itertools.permutations(range(6))
    best = max(sum(float(found["hidden.0"][i, j]) for i, j in enumerate(order)) for order in pairs)
    order = merging.match_activations(a, b, held)["hidden.0"]
    assert float(found["hidden.0"][torch.arange(6), order].sum()) == pytest.approx(best)


def test_correlations_of_images_are_of_what_the_norms_give_at_all_places() -> None:
    a, b, held = network("convnet", 0), network("convnet", 1), split(12)
    with torch.no_grad():
        a.get_parameter("features.1.weight")[0] *= -1  # what it gives turns round: the filter alone would not tell
    x = next(batches(held, 12, dtype=torch.float64))[0]
    said = [model.features[:2](x).detach() for model in (a, b)]  # type: ignore[union-attr, index, operator]
    rows = [each.movedim(1, 0).flatten(1).numpy() for each in said]
    found = merging.unit_correlations(a, b, held, batch_size=5)["features.0"]
    close(found, torch.from_numpy(np.corrcoef(*rows)[:3, 3:]), 1e-10)


def test_a_unit_that_never_changes_correlates_with_none() -> None:
    a, b = network("mlp", 0), network("mlp", 1)
    with torch.no_grad():
        a.get_parameter("hidden.0.weight")[2] = 0.0
    found = merging.unit_correlations(a, b, split(10))["hidden.0"]
    assert (found[2] == 0).all()
    assert found.isfinite().all()


# --- Repair -----------------------------------------------------------------------------------------------------------


def merged_pair(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    a, b = network(name, 0), network(name, 1)
    b = merging.permute(b, merging.match_activations(a, b, split(60)))
    return merging.average([a, b]), a, b


@pytest.mark.parametrize("t", [0.5, 0.2])
def test_repaired_units_have_the_mean_and_spread_between(t: float) -> None:
    merged, a, b = merged_pair("mlp")
    held, layers = split(60), ["hidden.0", "hidden.2"]
    before = copy.deepcopy(merged.state_dict())
    found = merging.repair(merged, a, b, held, t=t, batch_size=25)
    here, first, second, plain = (merging.unit_statistics(m, layers, held) for m in (found, a, b, merged))
    for layer in layers:
        for mine, one, other in zip(here[layer], first[layer], second[layer], strict=True):
            close(mine, (1 - t) * one + t * other, 1e-10)
        assert (plain[layer][1] < here[layer][1]).double().mean() > 0.8, "averaging takes spread away"
    assert all(torch.equal(value, before[name]) for name, value in merged.state_dict().items())
    assert torch.equal(found.get_parameter("head.weight"), merged.get_parameter("head.weight"))


def test_statistics_are_of_examples_and_places() -> None:
    model, held = network("convnet"), split(14)
    found = merging.unit_statistics(model, ["features.4"], held, batch_size=5)["features.4"]
    x = next(batches(held, 14, dtype=torch.float64))[0]
    said = model.features[:5](x).detach().movedim(1, 0).flatten(1)  # type: ignore[union-attr, index, operator]
    close(found[0], said.mean(1), 1e-10)
    close(found[1], said.std(1, unbiased=False), 1e-10)


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_with_batch_norm_repair_refreshes_it(name: str) -> None:
    merged, a, b = merged_pair(name)
    held = split(30)
    found = merging.repair(merged, a, b, held, batch_size=30)
    same_weights(found, merging.refresh_batch_norm(copy.deepcopy(merged), held, batch_size=30))


def test_convolutions_without_norm_get_a_bias_and_dead_units_stay() -> None:
    def plain(seed: int) -> nn.Module:
        made = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5), nn.ReLU(), nn.Linear(5, 4)
        ).double()  # fmt: skip
        for place, p in enumerate(made.parameters()):
            p.data = normal(*p.shape, seed=10 * seed + place)
        made[0].weight.data[1] = 0.0
        return made

    a, b, x, held = plain(0), plain(1), batch(2), split(20)
    found = merging.repair(merging.average([a, b]), a, b, held, example_input=x)
    here, first, second = (merging.unit_statistics(model, ["0", "3"], held) for model in (found, a, b))
    for layer in ("0", "3"):
        for mine, one, other in zip(here[layer], first[layer], second[layer], strict=True):
            close(mine, (one + other) / 2, 1e-9)
    assert found[0].bias.shape == (4,)  # type: ignore[index, union-attr]


def test_layers_without_norm_are_repaired_before_and_behind_batch_norm() -> None:
    def mixed(seed: int) -> nn.Module:
        made = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(),
            nn.Linear(5 * 16, 6), nn.ReLU(), nn.Linear(6, 4),
        ).double()  # fmt: skip
        for place, p in enumerate(made.parameters()):
            p.data = normal(*p.shape, seed=10 * seed + place)
        return made.eval()

    held = split(30)
    a, b = (merging.refresh_batch_norm(mixed(seed), held) for seed in range(2))
    found = merging.repair(merging.average([a, b]), a, b, held, example_input=batch(2))
    here, first, second = (merging.unit_statistics(model, ["0", "6"], held) for model in (found, a, b))
    for layer in ("0", "6"):
        for mine, one, other in zip(here[layer], first[layer], second[layer], strict=True):
            close(mine, (one + other) / 2, 1e-9)
    same_weights(found, merging.refresh_batch_norm(copy.deepcopy(found), held), 1e-12)


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    a, b, held = network("mlp", 0), network("convnet", 0), split(5)
    cases: list[tuple[str, Any]] = [
        ("orders='hidden.9': must be orders of hidden.0, hidden.2",
         lambda: merging.permute(a, {"hidden.9": torch.arange(6)})),
        ("orders['hidden.0']=tensor([0, 0, 1, 2, 3, 4]): must have each of 0 to 5 once",
         lambda: merging.permute(a, {"hidden.0": torch.tensor([0, 0, 1, 2, 3, 4])})),
        ("must have each of 0 to 5 once", lambda: merging.permute(a, {"hidden.0": torch.arange(5)})),
        ("b differs from a", lambda: merging.match_weights(a, b, generator=generator())),
        ("sweeps=0: must be", lambda: merging.match_weights(a, a, generator=generator(), sweeps=0)),
        ("b differs from a", lambda: merging.match_activations(a, b, held)),
        ("must be a split with examples", lambda: merging.match_activations(a, a, held.subset(torch.arange(0)))),
        ("b differs from merged", lambda: merging.repair(a, a, b, held)),
        ("t=2: must be a number from 0 to 1", lambda: merging.repair(a, a, a, held, t=2)),
        ("must be a network with units that can change places",
         lambda: merging.permutation_groups(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))),
        ("batch_size=0: must be", lambda: merging.unit_statistics(a, ["hidden.0"], held, batch_size=0)),
    ]  # fmt: skip
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FOLLOWED)
def test_alignment_on_the_gpu(name: str) -> None:
    two_stages = partial(resnet, (1, 8, 8), 4, width=3, blocks=(1, 1))
    make = partial(fresh, two_stages, EXACT) if name == "resnet" else partial(network, name)
    a, b, held = make(seed=0).eval(), make(seed=1).eval(), split(10)
    there = [copy.deepcopy(model).cuda() for model in (a, b)]
    by_weights = merging.match_weights(a, b, generator=generator())
    assert all(torch.equal(order, by_weights[key]) for key, order in
               merging.match_weights(*there, generator=generator()).items())  # fmt: skip
    by_activations = merging.match_activations(a, b, held)
    assert all(torch.equal(order, by_activations[key]) for key, order in
               merging.match_activations(*there, held).items())  # fmt: skip
    moved = merging.permute(there[1], by_weights)
    same_weights(moved.cpu(), merging.permute(b, by_weights))
    repaired = merging.repair(merging.average(there), *there, held).cpu()
    same_weights(repaired, merging.repair(merging.average([a, b]), a, b, held), 1e-8)
