"""Data-parallel, sharded and resumed training, against one process alone and against torch's own classes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from course_lib.lab.data import load
from course_lib.lab.models import mlp
from course_lib.parallel import batch_norm, data_parallel, data_parallel_runs, resuming
from course_lib.parallel.data_parallel import MIB, local_loss, make_buckets, shard
from course_lib.parallel.data_parallel_runs import Run, relative_difference, train_alone, train_data_parallel
from course_lib.parallel.launching import launch
from course_lib.parallel.resuming import batch_of_step, read_lives, run_under_torchrun, save_atomically, train_resumably
from course_lib.parallel.sharding import local_bytes, measure_sharding, memory_per_rank, partition
from tests.parallel import trained_by_ranks as ranks

RIGHT = (data_parallel_runs.one_by_one, ranks.small_buckets, ranks.small_overlapped, data_parallel_runs.torch_ddp)
WRONG = data_parallel_runs.torch_ddp_unweighted
METHODS = {"mlp": (*RIGHT, WRONG), "convnet": (ranks.small_overlapped, WRONG), "resnet": (ranks.small_overlapped,)}
PATIENCE = 300.0  # seconds: a launch takes a few, but the machine may be busy

# --- Whole runs: data-parallel training is single-process training ----------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], list[Run]]:
    """Each network by each method on two ranks, 20 steps in float64, shares of 31 and 30 (and 3 and 2) examples."""
    found = launch(ranks.train_all, 2, METHODS, {}, timeout=PATIENCE)
    return {key: [by_rank[key] for by_rank in found] for key in found[0]}


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    return {network: train_alone(network) for network in METHODS}


@pytest.mark.parametrize(
    ("network", "method"), [(n, m.__name__) for n, methods in METHODS.items() for m in methods if m is not WRONG]
)
def test_two_ranks_train_as_one_process(runs: Any, alone: dict[str, Run], network: str, method: str) -> None:
    first, second = runs[network, method]
    assert relative_difference(first.weights, alone[network].weights) < 1e-12
    assert relative_difference(first.weights, second.weights) == 0
    assert first.losses == pytest.approx(alone[network].losses, rel=1e-12)
    assert first.losses[-1] < 0.8 * first.losses[0], "it learned nothing: the comparison says little"
    assert first.val_accuracy == alone[network].val_accuracy


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_the_mean_of_means_is_another_gradient(runs: Any, alone: dict[str, Run], network: str) -> None:
    assert relative_difference(runs[network, "torch_ddp_unweighted"][0].weights, alone[network].weights) > 1e-3


def test_without_synchronized_batch_norm_it_is_another_run(runs: Any, alone: dict[str, Run]) -> None:
    apart = runs["resnet", "unsynchronized"]
    assert relative_difference(apart[0].weights, alone["resnet"].weights) > 1e-2
    statistics = [name for name in apart[0].weights if "running" in name]
    assert statistics
    assert any(not torch.equal(apart[0].weights[name], apart[1].weights[name]) for name in statistics)


def test_three_ranks_with_an_empty_share() -> None:
    settings = {"steps": 6, "batch_size": 61, "examples": 124}  # the third batch of an epoch has 2 examples
    expected = train_alone("convnet", **settings)
    for by_rank in launch(ranks.train_all, 3, {"convnet": RIGHT}, settings, timeout=PATIENCE):
        for run in by_rank.values():
            assert relative_difference(run.weights, expected.weights) < 1e-12


def test_the_public_function_trains_as_one_process() -> None:
    settings: dict[str, Any] = {"steps": 4, "seed": 3, "lr": 0.1, "momentum": 0.5, "batch_size": 9}
    expected = train_alone("mlp", **settings)
    run = launch(train_data_parallel, 2, "mlp", data_parallel_runs.overlapped, timeout=PATIENCE, **settings)[1]
    assert relative_difference(run.weights, expected.weights) < 1e-12


@pytest.mark.gpu
def test_a_gpu_trains_as_a_processor() -> None:
    run = launch(train_data_parallel, 1, "resnet", data_parallel_runs.overlapped, timeout=PATIENCE)[0]
    assert relative_difference(run.weights, train_alone("resnet").weights) < 1e-6


# --- One step: shares, buckets, hooks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [(7, [3, 2, 2]), (6, [2, 2, 2]), (2, [1, 1, 0]), (0, [0, 0, 0])])
def test_shares_are_disjoint_and_complete(count: int, sizes: list[int]) -> None:
    x, y = torch.arange(2 * count).view(count, 2), torch.arange(count)
    shares = [shard(x, y, rank, 3) for rank in range(3)]
    assert [len(part) for _, part in shares] == sizes
    assert torch.equal(torch.cat([part for part, _ in shares]), x)
    assert torch.equal(torch.cat([part for _, part in shares]), y)


def test_parts_of_the_loss_add_up() -> None:
    x, y = ranks.examples(7, seed=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    parts = [local_loss(model, *shard(x, y, rank, 9), 7) for rank in range(9)]
    assert parts[8].item() == 0.0
    assert parts[8].requires_grad
    assert torch.stack(parts).sum().item() == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-14)


@pytest.fixture(scope="module")
def averaged() -> list[dict[str, Any]]:
    return launch(ranks.try_averaging, 2, timeout=PATIENCE)


SIZES = (1, 100, 25 * MIB)
EXACT = [
    "broadcast",
    "one by one",
    "one by one, mean",
    "accumulation",
    *(f"{way} of {size}" for size in SIZES for way in ("buckets", "overlapped", "no_sync")),
    *(f"no_sync of {size} stays local" for size in SIZES),
    *(f"removed {size}" for size in SIZES),
]


@pytest.mark.parametrize("what", EXACT)
def test_gradients_are_the_weighted_sum(averaged: Any, what: str) -> None:
    for found in averaged:
        assert found[what] < (1e-6 if what not in ("accumulation", "broadcast") else 1e-12)  # one parameter is float32


def test_a_bucket_holds_one_type_of_number_and_keeps_its_size(averaged: Any) -> None:
    # last to first: [2, 3] and a scalar of float64 (56 bytes), the one in float32, filters, [3, 4]
    assert averaged[0]["kinds"] == [[(7,)], [(2, 3), ()], [(5,)], [(4, 3, 2, 2)], [(3, 4)]]


def test_buckets_leave_during_backward(averaged: Any) -> None:
    buckets, *seen = averaged[0]["launched in backward"]
    assert buckets == 3
    assert seen[:3] in ([0, 1, 2], [1, 2, 3])  # which of the two hooks runs first is torch's affair
    assert seen[3:] == [0, 0, 0, *seen[:3]]


def test_a_second_backward_is_refused(averaged: Any) -> None:
    assert "no_sync()" in averaged[0]["twice"]


def test_measure_overlap_times_every_method() -> None:
    settings: dict[str, Any] = {
        "width": 16,
        "depth": 2,
        "batch_size": 4,
        "rounds": 2,
        "warmup": 1,
        "bucket_bytes": 1000,
    }
    for seconds in launch(data_parallel_runs.measure_overlap, 2, timeout=PATIENCE, **settings):
        assert list(seconds) == ["alone", "one by one", "in buckets", "overlapped", "DistributedDataParallel"]
        assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: shard(torch.ones(3), torch.ones(3), 2, 2), "rank is 2; .* world_size - 1 = 1"),
        (lambda: shard(torch.ones(3), torch.ones(2), 0, 2), "y has 2 labels; .* 3 examples"),
        (lambda: make_buckets(nn.Linear(1, 1), 0), "bucket_bytes is 0; it must be positive"),
        (lambda: make_buckets(nn.ReLU()), "model has no parameter"),
        (lambda: data_parallel.average_gradients(nn.Linear(1, 1), share=2), "share is 2; .* between 0 and 1"),
        (lambda: train_alone("lenet"), "network is 'lenet'; .* 'resnet'"),
        (lambda: relative_difference({"a": torch.ones(1)}, {}), r"\['a'\] are in one of them only"),
        (lambda: memory_per_rank(-1, 2, 0), "parameters is -1; it must be 0 or more"),
        (lambda: memory_per_rank(1, 2, 0, bytes_state=-4), "bytes_state is -4"),
        (lambda: memory_per_rank(1, 0, 0), "world_size=0: must be a whole number of at least 1"),
        (lambda: memory_per_rank(1, 2, 4), "stage is 4; it must be 0, 1, 2 or 3"),
        (lambda: train_resumably("nowhere", steps=0), "steps=0: must be a whole number of at least 1"),
        (lambda: train_resumably("nowhere", every=0), "every=0: must be a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_named(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# --- Batch norm -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3])
def normalised(request: Any) -> list[list[dict[str, float]]]:
    return launch(ranks.try_batch_norm, request.param, timeout=PATIENCE)


def test_batch_norm_of_shares_is_that_of_the_whole_batch(normalised: Any) -> None:
    limits = {torch.float64: 1e-12, torch.float32: 2e-3, torch.bfloat16: 5e-2}
    for by_case in normalised:
        for case, found in zip(ranks.NORM_CASES, by_case, strict=True):
            assert found["replaced"] == 1
            assert found["type"] == 0
            rest = {name: value for name, value in found.items() if name not in ("replaced", "type")}
            assert max(rest.values()) < limits[case[2]], (case, rest)


def test_the_variance_of_one_value_is_zero() -> None:
    for rank, found in enumerate(launch(ranks.norm_of_one_value, 2)):
        assert torch.equal(found["output"], torch.zeros(1 - rank, 3))
        torch.testing.assert_close(found["running_mean"], torch.full((3,), 0.2))
        torch.testing.assert_close(found["running_var"], torch.full((3,), 0.9))


def test_conversion_keeps_tensors_and_leaves_the_rest() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm1d(2, affine=False)), nn.LayerNorm(3))
    model[0].eval()
    weight, layer_norm = model[0].weight, model[2]
    assert batch_norm.synchronize_batchnorm(model) is model
    assert type(model[0]) is batch_norm.SynchronizedBatchNorm2d
    assert model[0].weight is weight
    assert not model[0].training
    assert type(model.get_submodule("1.0")) is batch_norm.SynchronizedBatchNorm1d
    assert model[2] is layer_norm
    assert type(batch_norm.synchronize_batchnorm(nn.BatchNorm2d(3))) is batch_norm.SynchronizedBatchNorm2d
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(model[0].train()(x), nn.BatchNorm2d(3)(x)), "outside a group it is the usual one"


# --- Sharding ---------------------------------------------------------------------------------------------------------


def test_partition_is_balanced() -> None:
    assert partition([5, 3, 3, 2], [0, 0]) == [0, 1, 1, 0]
    assert partition([4, 4], [10, 0, 0]) == [1, 2]
    assert partition([], [0, 0]) == []
    sizes = [1 + (37 * i) % 101 for i in range(200)]
    owners = partition(sizes, [0] * 7)
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(7)]
    assert max(loads) - min(loads) <= max(sizes)
    assert max(loads) < 1.02 * sum(sizes) / 7


@pytest.fixture(scope="module")
def sharded() -> dict[int, list[dict[str, Any]]]:
    """Three ranks start, two go on from the state that the three have left."""
    three = launch(ranks.try_sharding, 3, timeout=PATIENCE)
    return {3: three, 2: launch(ranks.try_sharding, 2, three[0]["states"], timeout=PATIENCE)}


@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_sharded_optimizer_gives_the_same_weights(sharded: Any, name: str, world_size: int) -> None:
    for found in sharded[world_size]:
        assert found[name, "apart"] < 1e-13
        assert found[name, "moved"] > 1e-3
    own = [found[name, "bytes"] for found in sharded[world_size]]
    assert sum(own) == sharded[world_size][0][name, "whole bytes"]
    assert max(own) < 0.75 * sum(own)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_a_sharded_optimizer_agrees_with_torchs(sharded: Any, name: str) -> None:
    for world_size in (2, 3):
        assert sharded[world_size][0][name, "from torch"] < 1e-13


@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_a_checkpoint_fits_any_number_of_ranks(sharded: Any, name: str) -> None:
    for found in sharded[2]:
        for who in ("sharded", "whole"):
            assert found[name, f"resumed from {who}"] < 1e-13
            assert found[name, f"bytes from {who}"] == found[name, "bytes"]


@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_the_collected_state_is_that_of_one_optimizer(sharded: Any, name: str) -> None:
    ours, whole, end = sharded[3][0]["states"][name]
    assert [group["params"] for group in ours["param_groups"]] == [group["params"] for group in whole["param_groups"]]
    assert [group["lr"] for group in ours["param_groups"]] == [group["lr"] for group in whole["param_groups"]]
    assert ours["state"].keys() == whole["state"].keys()
    for number, expected in whole["state"].items():
        assert ours["state"][number].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(ours["state"][number][key], value, rtol=0, atol=1e-13)
    kind, settings = ranks.OPTIMIZERS[name]
    params = [nn.Parameter(value) for value in end]
    kind(ranks.groups(params), **settings).load_state_dict(ours)  # the whole optimizer takes it, too


def test_a_part_of_the_state_is_not_taken_for_the_whole(sharded: Any) -> None:
    for found in sharded[3]:
        out_of_date, unfit = found["refused"]
        assert out_of_date.startswith("RuntimeError")
        assert "consolidate_state_dict" in out_of_date
        assert unfit.startswith("ValueError")
        assert "[2] parameters" in unfit


def test_parameters_may_come_later(sharded: Any) -> None:
    assert all(found["added"] < 1e-13 for found in sharded[2] + sharded[3])


def test_a_closure_is_called_once(sharded: Any) -> None:
    assert sharded[2][0]["closure"] == pytest.approx(9 + 3 - 0.6)


def test_stage_2_keeps_own_gradients_only(sharded: Any) -> None:
    for found in sharded[2] + sharded[3]:
        assert found["stage 2"]["kept"] == found["stage 2"]["owned"]
        assert found["stage 2"]["apart"] < 1e-12


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_memory_is_that_of_the_papers_figure_1(stage: int, gigabytes: float) -> None:
    # Psi = 7.5 billion, N_d = 64, K = 12, 16-bit weights and gradients
    found = memory_per_rank(7_500_000_000, 64, stage, bytes_weight=2, bytes_gradient=2, bytes_state=12)
    assert found / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_measured_memory_is_that_of_the_formula() -> None:
    found = launch(measure_sharding, 2, timeout=PATIENCE)
    sizes = {name: tensor.numel() for name, tensor in found[0][0].trained.items()}
    count, steps = sum(sizes.values()), 4 * len(sizes)  # Adam counts steps in 4 bytes for each tensor
    for stage in range(4):
        ideal = memory_per_rank(count, 2, stage)
        totals = [by_stage[stage].total for by_stage in found]
        spare = steps if stage in (0, 3) else 16 * max(sizes.values()) * 2
        assert all(ideal <= total <= ideal + spare or abs(total - ideal) <= spare for total in totals)
        assert sum(totals) == 2 * ideal + (steps if stage in (1, 2) else 2 * steps)
        for by_stage in found:
            assert relative_difference(by_stage[stage].trained, found[0][0].trained) < 1e-5
    start = measure_start(found[0][0].trained)
    assert start > 1e-3, "nothing was trained: the comparison says nothing"


def measure_start(trained: dict[str, torch.Tensor]) -> float:
    torch.manual_seed(0)
    model = mlp((1, 8, 8), 10, width=256, depth=5)
    return relative_difference(trained, dict(model.state_dict()))


def test_local_bytes_counts_nested_tensors() -> None:
    assert local_bytes({"a": torch.ones(3), "b": [torch.ones(2, dtype=torch.float64), None], "c": 1.0}) == 12 + 16


# --- Resuming ---------------------------------------------------------------------------------------------------------


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    undisturbed = launch(train_resumably, 2, tmp_path / "undisturbed.pt", steps=30, timeout=PATIENCE)
    assert undisturbed[0].lives == [{"life": 0, "started_at": 0}]
    options = f"--steps 30 --every 10 --kill-rank 1 --kill-at 25 --checkpoint {tmp_path / 'killed.pt'}"
    outcome = run_under_torchrun("course_lib.parallel.resuming", *options.split(), max_restarts=1, timeout=PATIENCE)
    assert outcome.exit_code == 0, outcome.output
    assert read_lives(tmp_path / "killed.pt") == [{"life": 0, "started_at": 0}, {"life": 1, "started_at": 20}]
    assert "life 1 started at step 20" in outcome.output
    state = torch.load(tmp_path / "killed.pt", weights_only=True)
    assert state["losses"] == undisturbed[0].losses
    assert state["losses"][-1] < 0.8 * state["losses"][0]
    assert state["model"].keys() == undisturbed[0].weights.keys()
    for name, tensor in undisturbed[0].weights.items():
        assert torch.equal(state["model"][name], tensor)
    names = {"undisturbed.pt", "undisturbed.pt.lives", "killed.pt", "killed.pt.lives"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_run_in_parts_is_the_whole_run(tmp_path: Path) -> None:
    whole = train_resumably(tmp_path / "whole.pt", steps=7, every=100)
    train_resumably(tmp_path / "parts.pt", steps=3)
    parts = train_resumably(tmp_path / "parts.pt", steps=7)
    assert parts.losses == whole.losses
    assert all(torch.equal(parts.weights[name], tensor) for name, tensor in whole.weights.items())
    assert [row["started_at"] for row in parts.lives] == [0, 3]
    for settings, words in (({"seed": 1}, "seed=0, this run has seed=1"), ({"batch_size": 5}, "batch_size=61")):
        with pytest.raises(ValueError, match=words):
            train_resumably(tmp_path / "parts.pt", steps=8, **settings)
    with pytest.raises(ValueError, match="steps is 5; .* has 7 already"):
        train_resumably(tmp_path / "parts.pt", steps=5)
    (tmp_path / "parts.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="parts.pt' cannot be read as a checkpoint"):
        train_resumably(tmp_path / "parts.pt", steps=8)


def test_each_step_has_a_batch_of_its_own() -> None:
    split = load("digits").train
    (x, y), again, later, other = (
        batch_of_step(split, 61, seed, step) for seed, step in ((0, 5), (0, 5), (0, 6), (1, 5))
    )
    assert x.shape == (61, *split.images.shape[1:])
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert not torch.equal(x, later[0])
    assert not torch.equal(x, other[0])


def test_a_kill_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_atomically({"step": 1}, tmp_path / "state.pt")

    def die(_: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({"step": 2}, tmp_path / "state.pt")
    monkeypatch.undo()
    assert torch.load(tmp_path / "state.pt", weights_only=True) == {"step": 1}
    save_atomically({"step": 3}, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_torchrun_that_fails_or_hangs_is_reported() -> None:
    outcome = run_under_torchrun("no_such_module", processes=1, timeout=PATIENCE)
    assert outcome.exit_code != 0
    assert "No module named no_such_module" in outcome.output
    with pytest.raises(TimeoutError, match="after 0.5 seconds"):
        run_under_torchrun("timeit", "import time; time.sleep(1000)", timeout=0.5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX shell")
def test_what_does_not_end_politely_is_killed() -> None:
    # an agent that ignores SIGTERM, with a rank in a session of its own, as torchrun starts them
    rank = "import time; print('up', flush=True); time.sleep(1000)"
    agent_code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', {rank!r}], start_new_session=True); time.sleep(1000)"
    )
    agent = subprocess.Popen([sys.executable, "-c", agent_code], stdout=subprocess.PIPE)
    assert agent.stdout is not None
    assert agent.stdout.readline() == b"up\n"
    (rank_pid,) = resuming._descendants(agent.pid)
    resuming._end(agent, grace=0.1)
    assert agent.returncode == -signal.SIGKILL
    assert agent.stdout.read() == b""  # ends only when the last one that could write has ended
    agent.stdout.close()
    for _ in range(1000):  # an orphan is reaped by whoever has adopted it
        if not Path(f"/proc/{rank_pid}").exists() or "Z" in Path(f"/proc/{rank_pid}/stat").read_text():
            break
        time.sleep(0.01)
    else:
        pytest.fail("the rank is still there")
