"""Pipelines of two processes, against one process alone and against torch's engine."""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from course_lib.lab.training import cross_entropy
from course_lib.parallel.data_parallel_runs import Run, relative_difference, train_alone
from course_lib.parallel.launching import RankFailed, World, launch, process_group
from course_lib.partitioning import pipelined_runs
from course_lib.partitioning.late_weights import in_time, late_weights
from course_lib.partitioning.pipeline import Pipeline
from course_lib.partitioning.pipelined_runs import (
    PipelinedRun,
    measure_held,
    measure_pipeline,
    train_in_pieces,
    train_pipelined,
    train_torch_pipelined,
)
from course_lib.partitioning.saved import Saved
from course_lib.partitioning.schedules import SCHEDULES, Costs, gpipe, interleaved, one_f_one_b, timeline, zero_bubble
from tests.partitioning import pipelined_by_ranks as ranks

PATIENCE = 300.0  # seconds: a launch takes a few, but the machine may be busy
SHORT = {"steps": 6, "examples": 124}  # batches of 61, 61 and 2 examples: the last one's micro-batches 1, 1, 0 and 0


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], list[PipelinedRun]]:
    found = launch(ranks.train_all, 2, SHORT, timeout=PATIENCE)
    return {key: [by_rank[key] for by_rank in found] for key in found[0]}


@pytest.fixture(scope="module")
def alone() -> dict[str, Run]:
    pieces = train_in_pieces("convnet", **SHORT)
    return {"vit": train_alone("vit", **SHORT), "mlp": train_alone("mlp", **SHORT), "convnet": pieces}


@pytest.mark.parametrize(
    ("network", "name"), [(n, make.__name__) for n, some in ranks.METHODS.items() for make in some]
)
def test_two_ranks_train_as_one_process(runs: Any, alone: dict[str, Run], network: str, name: str) -> None:
    first, second = runs[network, name]
    assert relative_difference(first.weights, alone[network].weights) < 1e-12
    assert relative_difference(first.weights, second.weights) == 0
    assert first.losses == pytest.approx(alone[network].losses, rel=1e-12)
    assert len(set(first.losses)) == SHORT["steps"], "nothing changed: the comparison says little"
    assert first.val_accuracy == alone[network].val_accuracy


def test_batch_norm_sees_micro_batches(alone: dict[str, Run]) -> None:
    assert relative_difference(alone["convnet"].weights, train_alone("convnet", **SHORT).weights) > 1e-3


def test_what_is_held_and_sent(runs: Any) -> None:
    held = {name: [run.held for run in runs["vit", name]] for name in SCHEDULES}
    assert held["naive"][0] < held["one_f_one_b"][0] < held["gpipe"][0]
    assert held["naive"][1] == held["one_f_one_b"][1]  # the last rank holds one either way
    assert runs["vit", "gpipe"][0].sent == runs["vit", "one_f_one_b"][0].sent
    assert runs["vit", "interleaved"][0].sent == 3 * runs["vit", "gpipe"][0].sent  # three cuts, one after the other
    rows, tokens, width = 61 + 61 + 2, 16, 64
    assert runs["vit", "gpipe"][0].sent == 2 * rows * tokens * width * 8  # two epochs of activations, float64


def test_torchs_engine_trains_the_same_weights() -> None:
    even: dict[str, Any] = {"steps": 4, "batch_size": 60, "examples": 120}
    for theirs in launch(train_torch_pipelined, 2, timeout=PATIENCE, **even):
        ours = train_alone("vit", **even)
        assert relative_difference(theirs.weights, ours.weights) < 1e-12
        assert theirs.losses == pytest.approx(ours.losses, rel=1e-12)


def test_cuts_through_shortcuts() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(10, (5,), generator=generator)
    for found in launch(ranks.through_shortcuts, 2, x, y, timeout=PATIENCE):
        assert found["several"] > 1, "no cut crosses a shortcut"
        assert found["ours"].keys() == found["theirs"].keys()
        for name, expected in found["theirs"].items():
            torch.testing.assert_close(found["ours"][name], expected, rtol=1e-10, atol=1e-14)
        assert found["left"] == 0


# --- One rank that dies -----------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 7, "every": 2, "batch_size": 30, "examples": 70}
    whole = launch(train_pipelined, 2, "vit", timeout=PATIENCE, **settings)[0]
    folder = tmp_path / "run"
    folder.mkdir()
    again = {"checkpoint": folder, "timeout": PATIENCE, **settings}
    with pytest.raises(RankFailed, match="rank 1 of 2 was killed") as failure:
        launch(train_pipelined, 2, "vit", kill_rank=1, kill_at=5, **again)
    assert failure.value.rank == 1
    for run in launch(train_pipelined, 2, "vit", **again):
        assert run.started_at == 4
        assert run.losses == whole.losses
        assert all(torch.equal(run.weights[name], weight) for name, weight in whole.weights.items())
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest",
        "step-000006-rank-0.pt",
        "step-000006-rank-1.pt",
    ]
    (folder / "step-000008-rank-0.pt").write_bytes(b"a shard whose rank died while the others wrote theirs")
    assert launch(train_pipelined, 2, "vit", **again)[0].losses == whole.losses
    with pytest.raises(RankFailed, match="has 2 ranks: must be read by as many"):
        launch(train_pipelined, 1, "vit", **again)
    with pytest.raises(RankFailed, match="has other parts"):
        launch(train_pipelined, 2, "mlp", **again)


# --- Time and memory, without a clock ---------------------------------------------------------------------------------


def test_each_rank_does_its_tasks_in_order_and_after_what_they_need() -> None:
    schedule, costs = zero_bubble(3, 4), Costs(0.002, 0.002, 0.002)
    times = launch(ranks.spans_of_waiting, 3, schedule, costs, timeout=PATIENCE)[0]
    assert times.ranks == 3
    worked = {span.task: span.start + 0.9 * 0.002 for span in times.spans}  # what it made may leave before its end
    for rank, tasks in enumerate(schedule.ranks):
        own = sorted((span.start, span.task) for span in times.spans if span.rank == rank)
        assert [task for _, task in own] == list(tasks)
    for span in times.spans:
        assert span.end - span.start >= 0.9 * 0.002
        assert all(worked[need] <= span.start for need in schedule.needs(span.task))
    assert times.makespan >= timeline(schedule, costs).makespan * 0.9


def test_held_is_predicted() -> None:
    schedules = [make(2, 6) for make in SCHEDULES.values()]
    rows = launch(measure_held, 2, schedules, timeout=PATIENCE)[0]
    assert len(rows) == 2 * len(SCHEDULES)
    for row in rows:
        if row["schedule"] == "zero_bubble":  # what it puts aside has gradients, too
            assert row["predicted"] < row["held"] < 2 * row["predicted"]
        elif row["rank"] == 0:
            assert row["held"] == row["predicted"]
        else:  # the loss comes on top
            assert row["predicted"] < row["held"] < 1.3 * row["predicted"]


def test_measured_numbers_of_micro_batches() -> None:
    seconds = launch(measure_pipeline, 2, micro_batches=[1, 2], width=8, depth=2, batch_size=8, timeout=PATIENCE)[0]
    assert list(seconds) == [0, 1, 2]
    assert all(0 < each < math.inf for each in seconds.values())


# --- Late weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2, bias=False)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 3, bias=False)).double()


def test_late_gradients_are_the_gradients(network: nn.Module) -> None:
    x = torch.randn(7, 2, 8, 8, dtype=torch.float64)
    expected, late = copy.deepcopy(network), copy.deepcopy(network)
    products = late_weights(late)
    assert late.state_dict().keys() == network.state_dict().keys()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, given in zip((expected, late), inputs, strict=True):
        model(given).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    assert late[0].weight.grad is None, "the weights' half came with the inputs'"  # type: ignore[index]
    for _ in range(2):  # twice: they add up
        for product in products:
            product.add()
    for (name, ours), theirs in zip(late.named_parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        times = 1 if name.startswith("1.") else 2  # batch norm is not late
        torch.testing.assert_close(ours.grad, times * theirs.grad, rtol=1e-12, atol=1e-12)


def test_in_time_again(network: nn.Module) -> None:
    x = torch.randn(7, 2, 8, 8, dtype=torch.float64)
    expected, late = copy.deepcopy(network), copy.deepcopy(network)
    late_weights(late)
    in_time(late)
    for model in (expected, late):
        model(x).square().sum().backward()
    for ours, theirs in zip(late.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_frozen_weights_get_none(network: nn.Module) -> None:
    products = late_weights(network.requires_grad_(False))
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    network(x).sum().backward()
    for product in products:
        product.add()
    assert all(p.grad is None for p in network.parameters())
    assert x.grad is not None


def test_other_paddings_are_refused() -> None:
    with pytest.raises(ValueError, match="network='0' pads by reflect"):
        late_weights(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")))


# --- One rank alone, and what it counts -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpipe, one_f_one_b, zero_bubble])
def test_a_pipeline_of_one(network: nn.Module, make: Any) -> None:
    network.eval()
    x, y = torch.randn(9, 2, 8, 8, dtype=torch.float64), torch.randint(3, (9,))
    expected = copy.deepcopy(network)
    loss = cross_entropy(expected, x, y)
    loss.backward()
    pipeline = Pipeline([network], make(1, 4), World(0, 1, torch.device("cpu")), x)
    torch.testing.assert_close(pipeline.step(x, y), loss.detach(), rtol=1e-12, atol=0)
    for ours, theirs in zip(pipeline.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    assert pipeline.saved.now == 0 < pipeline.saved.peak


def test_pipelines_of_one_network_do_not_disturb_each_other(network: nn.Module) -> None:
    """Nor the network's own training: the layers keep nothing of a schedule whose halves come late."""
    network.eval()
    x, y = torch.randn(9, 2, 8, 8, dtype=torch.float64), torch.randint(3, (9,))
    expected = copy.deepcopy(network)
    cross_entropy(expected, x, y).backward()
    alone = World(0, 1, torch.device("cpu"))
    pipelines = [Pipeline([network], make(1, 4), alone, x) for make in (zero_bubble, gpipe, zero_bubble)]
    for work in [*(partial(each.step, x, y) for each in pipelines), lambda: cross_entropy(network, x, y).backward()]:
        network.zero_grad()
        work()
        for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("schedule", [interleaved(1, 4, 2), zero_bubble(1, 4)])
def test_inputs_may_be_integers(schedule: Any) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(30, 3))
    x, y = torch.randint(11, (7, 5)), torch.randint(3, (7,))
    expected = copy.deepcopy(network)
    loss = cross_entropy(expected, x, y)
    loss.backward()
    stages = [network[:1], network[1:]] if schedule.stages == 2 else [network]
    pipeline = Pipeline(stages, schedule, World(0, 1, torch.device("cpu")), x)
    torch.testing.assert_close(pipeline.step(x, y), loss.detach())
    for ours, theirs in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_stages_that_share_a_parameter_must_be_one_ranks() -> None:
    assert (
        "stages: number 1 has 'weight', a parameter of number 0 as well"
        in launch(ranks.refuse_shared, 2, timeout=PATIENCE)[0]
    )
    layer, x, y = nn.Linear(3, 3), torch.randn(4, 3), torch.randint(3, (4,))
    pipeline = Pipeline([layer, layer], interleaved(1, 2, 2), World(0, 1, torch.device("cpu")), x)
    assert len(pipeline.parameters()) == 2
    pipeline.step(x, y)
    found = layer.weight.grad
    layer.zero_grad()
    cross_entropy(nn.Sequential(layer, layer), x, y).backward()
    torch.testing.assert_close(found, layer.weight.grad)


def test_saved_counts_memory_once() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.ones(3, 8)
    with Saved(layer.parameters()) as saved:
        out = (layer(x).exp() * 2).sum() + layer(x[1:]).sum()  # x, and a part of the same memory; what exp returned
    assert saved.now == saved.peak == x.nbytes + 3 * 4 * 4
    kept = saved.hold(torch.ones(5))
    out.backward()
    assert saved.now == 20
    assert saved.peak == x.nbytes + 3 * 4 * 4 + 20
    del kept
    assert saved.now == 0


def test_a_schedule_for_others_is_refused() -> None:
    assert "must be for 1 stages on 2 ranks" in launch(ranks.refuse_other_stages, 2, timeout=PATIENCE)[0]
    with pytest.raises(ValueError, match=r"schedule='ZB': must be '1F1B' or 'GPipe'"):
        train_torch_pipelined(schedule="ZB")
    with pytest.raises(ValueError, match=r"batch_size=61: must be a multiple of micro_batches"):
        train_torch_pipelined(batch_size=61)
    assert pipelined_runs.KINDS == ("F", "I", "W")


def test_layers_that_the_stages_cannot_share_evenly_are_refused() -> None:
    with process_group() as world, pytest.raises(ValueError, match="depth=3: must be a multiple of the 2 stages"):
        pipelined_runs._perceptron([nn.Linear(2, 2)] * 3, interleaved(1, 2, 2), world, torch.zeros(1, 2))
