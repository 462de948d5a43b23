"""Tensor and sequence parallelism against the network in one piece, against formulas, and against torch's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from course_lib.lab.models import convnet, mlp, vit
from course_lib.parallel.data_parallel_runs import Run, relative_difference
from course_lib.parallel.launching import RankFailed, launch, process_group
from course_lib.partitioning.collectives import (
    part_sizes,
)
from course_lib.partitioning.restarting import Restart
from course_lib.partitioning.tensor_parallel import (
    layer_activations,
    layer_bytes,
    layer_parameters,
    parallel_mlp,
    tensor_parallel,
)
from course_lib.partitioning.tensor_parallel_runs import (
    MODES,
    digit_vit,
    held_bytes,
    measure_tensor_parallel,
    saved_bytes,
    train_tensor_parallel,
    train_vit_alone,
)
from tests.partitioning import matrices_by_ranks as ranks

PATIENCE = 300.0  # seconds: a launch takes a few, but the machine may be busy
EXACT = 1e-12


@pytest.fixture(scope="module", params=[2, 3])
def found(request: Any) -> list[dict[str, Any]]:
    """What each of two and of three ranks found."""
    return launch(ranks.matrices, request.param, timeout=PATIENCE)


@pytest.fixture(scope="module")
def trained() -> Any:
    """Runs, costs, differences to torch and counts beside torch's, of both of two ranks."""
    return list(zip(*launch(ranks.train_matrices, 2, timeout=PATIENCE), strict=True))


# --- The maps between ranks, the layers, the networks -----------------------------------------------------------------


def test_each_map_and_its_backward_are_the_formula(found: Any) -> None:
    for by_rank in found:
        assert len(by_rank["maps"]) == 24
        assert max(by_rank["maps"].values()) < EXACT, by_rank["maps"]


def test_collectives_are_counted(found: Any) -> None:
    ranks_, size = len(found), 2 * 6 * 4 * 8
    ring = 2 * (ranks_ - 1) * size // ranks_
    for by_rank in found:
        assert by_rank["counts"] == {
            "copy": ({"all_reduce": 1}, {"all_reduce": ring}),
            "sum": ({"all_reduce": 1}, {"all_reduce": ring}),
            "split": ({"all_gather": 1}, {"all_gather": ring // 2}),
            "scatter": (
                {"reduce_scatter": 1, "all_gather": 1},
                {"reduce_scatter": ring // 2, "all_gather": ring // 2},
            ),
            "nothing": ({}, {}),
        }


def test_networks_in_parts_compute_what_they_do_in_one_piece(found: Any) -> None:
    """Outputs, gradients of inputs and of all parameters, the whole state; and the original is as it was."""
    for by_rank in found:
        assert len(by_rank["networks"]) == 7
        assert max(by_rank["networks"].values()) < 1e-11, by_rank["networks"]


def test_some_ranks_can_share_a_layer_among_themselves(found: Any) -> None:
    assert max(by_rank["group"] for by_rank in found) < EXACT


def test_numbers_stay_of_their_type(found: Any) -> None:
    for by_rank in found:
        assert all(kind == case.split(", ")[-1] for case, kind in by_rank["precisions"].items())


def test_what_cannot_be_shared_out_evenly_is_refused(found: Any) -> None:
    words = ("heads=5", "out_features=5", "out_features=5", "in_features=5", "size=40", "experts=5")
    for by_rank in found:
        for said, expected in zip(by_rank["refusals"], words, strict=True):
            assert said.startswith(f"{expected}: must be "), said
        assert f"a multiple of {len(found)}, the number of ranks" in by_rank["refusals"][0]


@pytest.mark.parametrize("mode", MODES)
def test_one_rank_has_all(mode: str) -> None:
    whole = ranks.drawn(vit((1, 8, 8), 10, width=8, heads=2))
    x = ranks.normal(3, 1, 8, 8, seed=0)
    with process_group():
        model = tensor_parallel(whole, **MODES[mode])
        assert torch.allclose(model(x), whole(x), rtol=1e-12)
        assert held_bytes(model) == held_bytes(whole)


# --- Whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> Run:
    return train_vit_alone()


@pytest.mark.parametrize("mode", MODES)
def test_ranks_train_as_one_process(trained: Any, alone: Run, mode: str) -> None:
    first, second = (runs[mode] for runs in trained[0])
    assert relative_difference(first.weights, alone.weights) < EXACT
    assert relative_difference(second.weights, alone.weights) < EXACT
    assert first.losses == pytest.approx(alone.losses, rel=EXACT)
    assert first.val_accuracy == second.val_accuracy == alone.val_accuracy
    moved = relative_difference(digit_vit().state_dict(), alone.weights)
    assert moved > 0.1, "it hardly moved: the comparison says little"


def test_settings_reach_the_run(trained: Any) -> None:
    settings: dict[str, Any] = {"steps": 2, "seed": 3, "lr": 0.1, "momentum": 0.5, "batch_size": 9}
    expected = train_vit_alone(**settings, width=16, depth=1, heads=2)
    assert relative_difference(trained[0][0]["other settings"].weights, expected.weights) < EXACT
    assert len(expected.losses) == 2


def test_torch_gives_the_same(trained: Any) -> None:
    for differences in trained[2]:
        assert {name.split(": ")[0] for name in differences} == {"mlp", "attention", "sequence"}
        assert len(differences) == 20  # 12 parameters, 3 outputs, 3 inputs, and the layer norm's two
        assert max(differences.values()) < 1e-10, differences


def test_torch_counts_as_many_collectives(trained: Any) -> None:
    for counts in trained[3]:
        # two blocks: 4 all-reduces each; or 4 all-gathers, 4 reduce-scatters, 6 vectors each, and 2 at the ends
        assert counts == {"tensor": (8, 8), "sequence": (30, 30), "sequence, gathered twice": (34, 34)}


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sequence": True, "steps": 5, "timeout": PATIENCE}
    whole = launch(train_tensor_parallel, 2, **settings)[0]
    restart = Restart(tmp_path, every=2)
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed"):
        launch(train_tensor_parallel, 2, restart=replace(restart, kill_rank=1, kill_at=3), **settings)
    for run in launch(train_tensor_parallel, 2, restart=restart, **settings):
        assert (whole.started_at, run.started_at) == (0, 2)
        assert run.losses == whole.losses
        assert all(torch.equal(run.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.gpu
def test_a_gpu_trains_as_a_processor() -> None:
    run = launch(train_tensor_parallel, 1, sequence=True, timeout=PATIENCE)[0]
    assert relative_difference(run.weights, train_vit_alone().weights) < 1e-6


# --- What it costs ----------------------------------------------------------------------------------------------------


def test_costs_of_two_ranks_are_those_of_the_formulas(trained: Any) -> None:
    for costs in trained[1]:
        assert list(costs) == list(MODES)
        for cost in costs.values():
            assert cost.weights == cost.expected_weights
            assert cost.activations == cost.expected_activations
            assert sum(cost.sent.values()) == cost.expected_sent
        assert costs["tensor"].calls == {"all_reduce": 8}
        assert costs["sequence"].calls == {"all_gather": 10, "reduce_scatter": 8, "all_reduce": 12}
        assert costs["sequence, gathered twice"].calls == {"all_gather": 14, "reduce_scatter": 8, "all_reduce": 12}


def test_costs_of_one_rank_are_those_of_the_formulas() -> None:
    for cost in measure_tensor_parallel(batch_size=2, width=16, depth=1, heads=2).values():
        assert (cost.weights, cost.activations) == (cost.expected_weights, cost.expected_activations)
        assert set(cost.sent.values()) == {0} == {cost.expected_sent}


def test_the_formulas_by_hand() -> None:
    # 2 examples of 8 tokens of 4 float32 numbers: 256 bytes, of which a ring of 4 moves 1.5 times
    assert layer_bytes(2, 8, 4, 4) == 4 * 1.5 * 256
    assert layer_bytes(2, 8, 4, 4, itemsize=8) == 4 * 1.5 * 512
    assert layer_bytes(2, 8, 4, 4, sequence=True) == 4 * 1.5 * 256 + 1.5 * 6 * 4 * 4
    assert layer_bytes(2, 8, 4, 4, sequence=True, gather_twice=True) == 5 * 1.5 * 256 + 1.5 * 6 * 4 * 4
    assert layer_bytes(2, 8, 4, 1) == 0
    block = vit((1, 8, 8), 10, width=8).blocks[0]
    assert layer_parameters(8, 1) == sum(p.numel() for p in block.parameters())
    # 64 numbers a tensor: 4 whole and 12 shared ones; 2 + 2 statistics and 2 heads for each of 16 tokens
    assert layer_activations(2, 8, 4, 2, 1) == 16 * 64 + 16 * 4 + 16 * 2
    assert layer_activations(2, 8, 4, 2, 2) == 10 * 64 + 16 * 4 + 16
    assert layer_activations(2, 8, 4, 2, 2, sequence=True) == 9 * 64 + 16 * 2 + 16
    assert layer_activations(2, 8, 4, 2, 2, sequence=True, gather_twice=True) == 8 * 64 + 16 * 2 + 16


def test_memory_that_is_kept_twice_counts_once() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    assert saved_bytes(nn.Sequential(nn.Tanh()), x) == 64  # its output
    assert saved_bytes(nn.Linear(4, 4), x) == 64  # its input, not its weight
    both = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(4, 4))
    assert saved_bytes(both, x) == 128


@pytest.mark.parametrize(("size", "ranks_", "sizes"), [(7, 3, [3, 2, 2]), (2, 3, [1, 1, 0]), (0, 2, [0, 0])])
def test_parts_are_those_of_tensor_split(size: int, ranks_: int, sizes: list[int]) -> None:
    assert part_sizes(size, ranks_) == sizes == [len(part) for part in torch.ones(size).tensor_split(ranks_)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: part_sizes(-1, 2), "size=-1: must be a whole number of at least 0"),
        (lambda: layer_bytes(1, 2, 3, 0), "ranks=0: must be a whole number of at least 1"),
        (lambda: layer_bytes(1, 2, 3, 2, gather_twice=True), "gather_twice=True: must be False without sequence"),
        (lambda: layer_parameters(0, 1), "width=0"),
        (lambda: layer_activations(1, 1, 1, 0, 1), "heads=0"),
        (lambda: layer_activations(1, 1, 1, 1, 1, gather_twice=True), "gather_twice=True"),
        (lambda: tensor_parallel(convnet((1, 8, 8), 10)), "model=ConvNet: must be a ViT or an MLP"),
        (lambda: tensor_parallel(mlp((1, 8, 8), 10), sequence=True), "model=MLP: must be a ViT"),
        (lambda: tensor_parallel(vit((1, 8, 8), 10), gather_twice=True), "gather_twice=True"),
        (lambda: parallel_mlp(nn.Sequential(nn.Linear(2, 2))), "must be two linear layers or more"),
        (
            lambda: parallel_mlp(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))),
            r"layers=LayerNorm\(.*must be an activation between two linear layers",
        ),
        (lambda: train_vit_alone(steps=0), "steps=0"),
    ],
)
def test_bad_arguments_are_named(call: Any, words: str) -> None:
    with process_group(), pytest.raises(ValueError, match=words):
        call()
