"""Experts with slots: routing and the layer against loops over tokens, and several ranks against one process."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib.merging import experts as merging_experts
from course_lib.parallel.data_parallel_runs import relative_difference
from course_lib.parallel.launching import RankFailed, launch, process_group
from course_lib.partitioning import experts as ex
from course_lib.partitioning.restarting import Restart
from course_lib.partitioning.tensor_parallel_runs import (
    digit_vit,
)
from tests.partitioning import matrices_by_ranks as ranks

PATIENCE = 300.0  # seconds: a launch takes a few, but the machine may be busy
EXACT = 1e-12

# --- Routing ----------------------------------------------------------------------------------------------------------


def served(logits: Tensor, top_k: int, capacity: int) -> list[tuple[int, int, int]]:
    """Token, expert and slot of each choice that finds room, one after the other."""
    taken, found = [0] * logits.shape[1], []
    for choice in range(top_k):
        for token, row in enumerate(logits.tolist()):
            expert = sorted(range(len(row)), key=lambda e: -row[e])[choice]
            if taken[expert] < capacity:
                found.append((token, expert, taken[expert]))
                taken[expert] += 1
    return found


def pairs(routes: ex.Routes) -> list[tuple[int, int, int]]:
    return list(zip(routes.token.tolist(), routes.expert.tolist(), routes.slot.tolist(), strict=True))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("capacity", [0, 1, 3, 40])
def test_who_comes_first_is_served_first(top_k: int, capacity: int) -> None:
    logits = ranks.normal(17, 4, seed=top_k)
    routes = ex.route(logits, top_k, capacity)
    expected = served(logits, top_k, capacity)
    assert pairs(routes) == expected
    assert torch.equal(routes.gate, logits.softmax(1)[routes.token, routes.expert])
    chosen = logits.topk(top_k).indices.flatten().tolist()
    assert routes.asked.tolist() == [chosen.count(expert) for expert in range(4)]
    assert routes.dropped == pytest.approx(1 - len(expected) / (17 * top_k))


def test_first_choices_come_before_second_ones() -> None:
    """The first token's second choice is the second one's first: with one slot, it is the first token that waits."""
    logits = torch.tensor([[3.0, 2.0, 0.0], [0.0, 3.0, 2.0]])
    assert pairs(ex.route(logits, 2, 1)) == [(0, 0, 0), (1, 1, 0), (1, 2, 0)]


def test_no_tokens_have_no_routes() -> None:
    routes = ex.route(torch.zeros(0, 3), 2, 0)
    assert (pairs(routes), routes.asked.tolist(), routes.dropped) == ([], [0, 0, 0], 0)


def test_experts_choose_the_tokens_that_prefer_them_most() -> None:
    logits = ranks.normal(9, 3, seed=0)
    probabilities = logits.softmax(1)
    routes = ex.route_by_experts(logits, 4)
    for expert in range(3):
        best = sorted(range(9), key=lambda token: -float(probabilities[token, expert]))[:4]
        mine = [(token, slot) for token, e, slot in pairs(routes) if e == expert]
        assert sorted(mine, key=lambda pair: pair[1]) == list(zip(best, range(4), strict=True))
    assert torch.equal(routes.gate, probabilities[routes.token, routes.expert])
    assert routes.asked.tolist() == [4, 4, 4]
    assert routes.dropped == 0
    assert len(pairs(ex.route_by_experts(logits, 20))) == 27  # there are no more tokens
    x = ranks.normal(9, 5, seed=1)
    said = ex.combine(ex.dispatch(x, routes), routes, 9)  # experts that repeat what they hear
    weight = torch.zeros(9, dtype=torch.float64).index_add(0, routes.token, routes.gate)
    assert torch.allclose(said, weight[:, None] * x)


@pytest.mark.parametrize(
    ("arguments", "slots"),
    [
        ((64, 4), 20),
        ((64, 4, 2, 1.0), 32),
        ((10, 4, 1, 1.0), 3),
        ((0, 4), 0),
        ((1, 8, 1, 0.5), 1),
        ((50, 5, 1, 1.1), 11),  # in floating point 11.000000000000002
    ],
)
def test_slots_are_a_factor_of_an_even_share(arguments: Any, slots: int) -> None:
    assert ex.capacity_of(*arguments) == slots


def test_balance_is_that_of_switch() -> None:
    logits = ranks.normal(23, 5, seed=0).requires_grad_()
    other = logits.detach().clone().requires_grad_()
    ours, theirs = ex.balance_loss(logits), merging_experts.balance_loss(other)
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=EXACT)
    assert logits.grad is not None
    assert other.grad is not None
    assert ranks.apart(logits.grad, other.grad) < EXACT


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_of_extremes(top_k: int) -> None:
    even = 50 * torch.eye(6) + 40 * torch.eye(6).roll(1, 1)  # each expert is one token's first, another's second
    assert ex.balance_loss(even, top_k).item() == pytest.approx(1, rel=1e-3)
    one = torch.tensor([50.0, 50.0, 0, 0, 0, 0]).repeat(6, 1) + torch.tensor([1e-3, 0, 0, 0, 0, 0]) * (top_k > 1)
    assert ex.balance_loss(one, top_k).item() == pytest.approx(3, rel=1e-2)
    assert ex.balance_loss(torch.zeros(0, 6), top_k).item() == 0


def test_balance_of_several_choices_by_the_formula() -> None:
    logits = ranks.normal(11, 4, seed=5)
    share = torch.tensor([0.0] * 4, dtype=torch.float64)
    for row in logits:
        for expert in row.topk(2).indices:
            share[expert] += 1 / 22
    assert ex.balance_loss(logits, 2).item() == pytest.approx(float(4 * (share * logits.softmax(1).mean(0)).sum()))


def test_imbalance_is_the_fullest_over_the_mean() -> None:
    assert ex.imbalance(torch.tensor([2, 2, 2])) == 1
    assert ex.imbalance(torch.tensor([6, 0, 0])) == 3


# --- The layer in one process -----------------------------------------------------------------------------------------


def by_tokens(layer: ex.MixtureOfExperts, x: Tensor) -> Tensor:
    """The layer as a loop over groups and tokens: each goes through its experts by itself."""
    out = []
    for part in x.tensor_split(layer.groups):
        rows = part.flatten(0, -2)
        logits = layer.router(rows)
        share = layer.capacity_factor * layer.top_k * len(rows) / len(layer.experts)
        said: list[Tensor] = [torch.zeros_like(row) for row in rows]
        for token, expert, _ in served(logits, layer.top_k, math.ceil(share - 1e-9)):
            said[token] = said[token] + logits[token].softmax(0)[expert] * layer.experts[expert](rows[token])
        out.append(torch.stack(said).view(part.shape) if said else part)
    return torch.cat(out)


@pytest.mark.parametrize("groups", [1, 2, 5])
@pytest.mark.parametrize(("top_k", "factor"), [(1, 1.25), (1, 0.4), (2, 1.0), (6, 1.0)])
def test_the_layer_is_a_loop_over_tokens(groups: int, top_k: int, factor: float) -> None:
    layer = ranks.mixture(top_k=top_k, capacity_factor=factor, groups=groups)
    results = []
    for function in (layer, lambda x: by_tokens(layer, x)):
        layer.zero_grad()
        x = ranks.normal(4, 3, 5, seed=1).requires_grad_()
        y = function(x)
        (y * ranks.normal(4, 3, 5, seed=2)).sum().backward()
        assert x.grad is not None
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in layer.named_parameters()}
        results.append({"output": y.detach(), "input": x.grad} | gradients)
    assert ranks.all_apart(*results) < EXACT
    assert len(layer.routes) == len(layer.logits) == groups
    if (groups, factor) == (1, 0.4):
        assert layer.routes[0].dropped > 0.3, "nothing was dropped: the comparison says little"


def test_the_router_learns_of_one_expert_only() -> None:
    layer = ranks.mixture(top_k=1)
    layer(ranks.normal(4, 3, 5, seed=1)).sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.norm() > 1e-3


def test_balance_of_groups_is_weighed_by_their_tokens() -> None:
    layer = ranks.mixture(groups=2, top_k=2)
    x = ranks.normal(3, 4, 5, seed=0)
    layer(x)
    parts = [ex.balance_loss(layer.router(part.flatten(0, 1)), 2) for part in (x[:2], x[2:])]
    assert layer.balance().item() == pytest.approx((2 * parts[0] + parts[1]).item() / 3)


# --- The layer on several ranks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def found(request: Any) -> list[dict[str, Any]]:
    return launch(ranks.layers_of_experts, request.param, timeout=PATIENCE)


def test_ranks_give_what_one_process_gives_in_as_many_groups(found: Any) -> None:
    for by_rank in found:
        assert len(by_rank["layers"]) == 3
        for case, differences in by_rank["layers"].items():
            assert differences.pop("experts") == 4 * 6 / len(found), case
            assert max(differences.values()) < EXACT, (case, differences)


def test_rows_travel_there_and_gradients_back(found: Any) -> None:
    for by_rank in found:
        assert by_rank["exchange"] == {"forward": 0, "backward": 0, "calls": 0, "bytes": 0}


RUNS: list[dict[str, Any]] = [
    {},
    {"top_k": 2, "capacity_factor": 0.8, "steps": 4, "strength": 0.3, "block": 0, "experts": 2},
    {"steps": 4, "batch_size": 3, "examples": 4, "seed": 1, "lr": 0.2, "momentum": 0.5, "width": 16, "heads": 2},
]


@pytest.fixture(scope="module")
def trained() -> list[list[ex.ExpertRun]]:
    return launch(ranks.train_experts, 2, RUNS, timeout=PATIENCE)


@pytest.mark.parametrize("place", range(len(RUNS)))
def test_ranks_train_as_one_process(trained: Any, place: int) -> None:
    alone = ex.train_groups_alone(2, **RUNS[place])
    for run in (by_rank[place] for by_rank in trained):
        assert relative_difference(run.weights, alone.weights) < EXACT
        assert run.losses == pytest.approx(alone.losses, rel=EXACT)
        assert run.val_accuracy == alone.val_accuracy
        assert torch.equal(run.asked, alone.asked)
        assert run.dropped == alone.dropped
    assert len(alone.losses) == len(alone.dropped) == len(alone.asked) == RUNS[place].get("steps", 10)
    choices = {0: 61 * 16, 1: 61 * 16 * 2, 2: 3 * 16}[place]
    assert alone.asked[0].sum() == choices
    start = ex.sparse_vit(digit_vit(), generator=torch.Generator().manual_seed(0)).state_dict()
    if place == 0:
        assert relative_difference(start, alone.weights) > 0.1, "it hardly moved: the comparison says little"


def test_other_groups_drop_other_tokens(trained: Any) -> None:
    """What the comparison rests on: one process without groups trains another network."""
    assert relative_difference(trained[0][0].weights, ex.train_groups_alone(1).weights) > 1e-6


def test_bytes_are_those_of_the_formula() -> None:
    settings: dict[str, Any] = {"steps": 2, "batch_size": 6, "width": 16, "heads": 2, "factors": (1.0, 2.5)}
    for rows in launch(ex.measure_expert_parallel, 2, timeout=PATIENCE, **settings):
        assert [(row["strength"], row["capacity_factor"]) for row in rows] == [
            (0.0, 1.0),
            (0.0, 2.5),
            (0.1, 1.0),
            (0.1, 2.5),
        ]
        for row in rows:
            slots = math.ceil(row["capacity_factor"] * 3 * 16 / 4)
            assert row["bytes"] == row["expected_bytes"] == 4 * 1 / 2 * 4 * slots * 16 * 8
            assert 1 <= row["imbalance"] <= 4
            assert 0 <= row["dropped"] < 1
        assert rows[0]["dropped"] > rows[1]["dropped"]
        assert rows[0]["loss"] != rows[2]["loss"]


def test_balance_loss_balances() -> None:
    """Each expert's share of choices over the last steps, with the loss and without."""
    settings: dict[str, Any] = {"steps": 25, "batch_size": 32, "examples": 32, "width": 16, "heads": 2, "depth": 1}
    loose, held = (ex.train_groups_alone(1, strength=s, block=0, **settings) for s in (0.0, 0.3))
    assert torch.equal(loose.asked[0], held.asked[0])
    assert ex.imbalance(held.asked[-5:].sum(0)) < 0.8 * ex.imbalance(loose.asked[-5:].sum(0))


def test_the_copy_is_new_and_the_original_as_it_was() -> None:
    dense = digit_vit()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = ex.sparse_vit(dense, generator=torch.Generator().manual_seed(0), experts=3)
    assert ranks.all_apart(dense.state_dict(), before) == 0
    layer: Any = sparse.blocks[1].mlp
    assert isinstance(layer, ex.MixtureOfExperts)
    weights = [networks.get_parameter("0.weight") for networks in layer.experts]
    assert not torch.equal(weights[0], weights[1])
    assert weights[0].std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert layer.router.weight.dtype == torch.float64


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 5, "timeout": PATIENCE}
    whole = launch(ex.train_expert_parallel, 2, **settings)[0]
    restart = Restart(tmp_path, every=2)
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed"):
        launch(ex.train_expert_parallel, 2, restart=replace(restart, kill_rank=1, kill_at=3), **settings)
    for run in launch(ex.train_expert_parallel, 2, restart=restart, **settings):
        assert (whole.started_at, run.started_at) == (0, 2)
        assert run.losses == whole.losses
        assert torch.equal(run.asked, whole.asked)
        assert all(torch.equal(run.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.gpu
def test_a_gpu_trains_as_a_processor() -> None:
    run = launch(ex.train_expert_parallel, 1, timeout=PATIENCE)[0]
    assert relative_difference(run.weights, ex.train_groups_alone(1).weights) < 1e-6


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ex.capacity_of(-1, 4), "tokens=-1"),
        (lambda: ex.capacity_of(4, 4, factor=0), "factor=0: must be a number above 0"),
        (lambda: ex.route(torch.zeros(3), 1, 1), r"logits=\[3\]: must be of shape \[tokens, experts\]"),
        (lambda: ex.route(torch.zeros(3, 2), 3, 1), "top_k=3: must be from 1 to 2, the experts"),
        (lambda: ex.route(torch.zeros(3, 2), 1, -1), "capacity=-1"),
        (lambda: ex.route_by_experts(torch.zeros(3, 2), -1), "capacity=-1"),
        (lambda: ex.balance_loss(torch.zeros(3, 2), 0), "top_k=0"),
        (lambda: ex.MixtureOfExperts(nn.Linear(2, 2), []), "experts=.*at least one"),
        (lambda: ranks.mixture(top_k=7), "top_k=7: must be from 1 to 6"),
        (lambda: ranks.mixture(groups=0), "groups=0"),
        (lambda: ranks.mixture(capacity_factor=-1.0), "factor=-1.0"),
        (lambda: ex.MixtureOfExperts(nn.Linear(2, 3), [nn.Identity()]), "a layer with 1 outputs"),
        (lambda: ex.expert_parallel(nn.Linear(2, 2)), "model='Linear': must be a network with a MixtureOfExperts"),
        (lambda: ex.exchange_bytes(4, 0, 2, 2), "width=0"),
        (lambda: ex.sparse_vit(digit_vit(), generator=torch.Generator(), block=2), "block=2: must be from 0 to 1"),
        (lambda: ex.sparse_vit(digit_vit(), generator=torch.Generator(), experts=0), "experts=0"),
        (lambda: ex.train_groups_alone(1, strength=-1), "strength=-1"),
        (lambda: ex.train_groups_alone(1, steps=0), "steps=0"),
    ],
)
def test_bad_arguments_are_named(call: Any, words: str) -> None:
    with process_group(), pytest.raises(ValueError, match=words):
        call()


def test_a_network_of_experts_can_be_copied_after_a_pass() -> None:
    layer = ex.MixtureOfExperts(nn.Linear(4, 3), [nn.Linear(4, 4) for _ in range(3)], top_k=1)
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.routes
    other = copy.deepcopy(layer)
    assert other.routes == other.logits == []
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
