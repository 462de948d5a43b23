"""The planner: its formulas against the papers' and against real layers, its choice against trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.lab.costs import flops
from course_lib.lab.models import EncoderBlock
from course_lib.parallel.scaling import Link, hierarchical_time, ring_time
from course_lib.parallel.sharding import memory_per_rank
from course_lib.partitioning import planning
from course_lib.partitioning.planning import (
    PUBLISHED,
    Choices,
    Cluster,
    Plan,
    Precision,
    Transformer,
    activation_bytes,
    memory_of,
    plans,
    step_time,
    why_not,
)

GPT3 = Transformer(96, 12_288, 96)
MEGATRON_2021, MEGATRON_2022, LLAMA = PUBLISHED[:10], PUBLISHED[10:14], PUBLISHED[14:]

SMALL = Transformer(layers=6, width=64, heads=4, tokens=128, vocabulary=1000)
MIXTURE = replace(SMALL, experts=4, top_k=2)
NODES = Cluster(16, 5e6, 1e12, 0.5, 1e11, 4, Link(1e-6, 1e11), Link(1e-5, 1e10))


# --- The job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", MEGATRON_2021, ids=lambda run: run.name)
def test_parameters_are_those_of_the_paper(run: planning.Published) -> None:
    job = run.job
    L, h, s, V = job.layers, job.width, job.tokens, job.vocabulary
    assert job.parameters == pytest.approx(12 * L * h**2 * (1 + 13 / (12 * h) + (V + s) / (12 * L * h)), rel=1e-12)
    assert f"{job.parameters / 1e9:.1f}B" == run.name


@pytest.mark.parametrize(
    ("layers", "width", "heads", "ffn", "billions"),
    [(32, 4096, 32, 14_336, 8.03), (80, 8192, 64, 28_672, 70.55), (126, 16_384, 128, 53_248, 405.85)],
)
def test_parameters_of_the_llama_family(layers: int, width: int, heads: int, ffn: int, billions: float) -> None:
    job = Transformer(layers, width, heads, 8192, 128_256, ffn, gated=True, kv_heads=8)
    assert job.parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_layer_is_a_real_layer() -> None:
    layer = nn.TransformerEncoderLayer(48, 4, 4 * 48)
    job = Transformer(1, 48, 4, tokens=20, vocabulary=7)
    assert job.layer_parameters == sum(p.numel() for p in layer.parameters())
    assert job.layer_flops == flops(EncoderBlock(48, 4), torch.zeros(1, 20, 48))
    assert job.output_flops == flops(nn.Linear(48, 7), torch.zeros(1, 20, 48))


def test_grouped_queries_and_gates_are_matrices_of_their_sizes() -> None:
    job = Transformer(1, 48, 4, ffn_width=100, gated=True, kv_heads=2)
    matrices = [(48, 48), (48, 24), (48, 24), (48, 48), (48, 100), (48, 100), (100, 48)]
    assert job.layer_parameters == sum(a * b for a, b in matrices) + 2 * 48


def test_experts_are_feed_forward_layers_of_which_few_compute() -> None:
    h, f = 64, 256
    expert = 2 * h * f + h + f
    assert MIXTURE.expert_parameters == 4 * expert
    assert MIXTURE.layer_parameters == SMALL.layer_parameters + 3 * expert + 4 * h  # and the router
    assert MIXTURE.layer_flops == SMALL.layer_flops + 128 * 2 * 2 * h * f  # one more of two matrices for each token
    assert SMALL.expert_parameters == 0


@pytest.mark.parametrize("run", MEGATRON_2021[::3], ids=lambda run: run.name)
def test_operations_are_those_of_the_papers(run: planning.Published) -> None:
    job, B = run.job, 64
    L, h, s, V = job.layers, job.width, job.tokens, job.vocabulary
    full = 96 * B * s * L * h**2 * (1 + s / (6 * h) + V / (16 * L * h))
    model = 72 * B * s * L * h**2 * (1 + s / (6 * h) + V / (12 * L * h))
    assert job.flops_per_step(B, "full") == pytest.approx(full, rel=1e-12)
    assert job.flops_per_step(B) == pytest.approx(model, rel=1e-12)
    assert job.flops_per_step(B, "selective") == pytest.approx(model + B * L * 4 * s**2 * h, rel=1e-12)


def test_published_figures_agree_with_one_another() -> None:
    """The papers' other columns: all workers' petaFLOP/s together; the share of the peak."""
    petaflops = [4.4, 8.8, 18.2, 34.6, 70.8, 143.8, 227.1, 297.4, 410.2, 502.0]
    for run, expected in zip(MEGATRON_2021, petaflops, strict=True):
        assert run.job.flops_per_step(run.batch, "full") / run.seconds / 1e15 == pytest.approx(expected, rel=0.007)
    for run, percent in zip(MEGATRON_2022, [41.5, 51.4, 56.0, 56.3], strict=True):
        assert 100 * run.mfu == pytest.approx(percent, abs=0.2)
    for run, percent in zip(LLAMA, [43, 41], strict=True):
        assert 100 * run.mfu == pytest.approx(percent, abs=1)
        assert run.batch * run.job.tokens == 2**24
    assert [run.data for run in MEGATRON_2021] == [32, 32, 32, 32, 32, 32, 24, 15, 9, 6]
    assert [run.data for run in LLAMA] == [64, 128]
    assert [run.batch for run in MEGATRON_2021] == [512, 512, 512, 1024, 1536, 1792, 2304, 2160, 2520, 3072]


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("job", "ratio"), [(GPT3, 80), (Transformer(105, 20_480, 128), 64)])
@pytest.mark.parametrize("t", [1, 8])
def test_activations_are_those_of_the_papers_table(job: Transformer, ratio: float, t: int) -> None:
    """``5 a s / h`` is 80 for GPT-3 and 64 for the 530B model: Korthikanti et al. 2022."""
    b = 2
    sbh = job.tokens * b * job.width
    plan = Plan(tensor=t, micro_batch=b)
    shared = replace(plan, sequence_parallel=True)
    assert activation_bytes(job, plan) == pytest.approx(sbh * (10 + 24 / t + ratio / t))
    assert activation_bytes(job, shared) == pytest.approx(sbh * (34 + ratio) / t)
    assert activation_bytes(job, replace(plan, recompute="selective")) == pytest.approx(sbh * (10 + 24 / t))
    assert activation_bytes(job, replace(shared, recompute="selective")) == pytest.approx(sbh * 34 / t)
    assert activation_bytes(job, replace(plan, recompute="full")) == pytest.approx(2 * sbh)
    assert activation_bytes(job, replace(shared, recompute="full")) == pytest.approx(2 * sbh / t)
    assert activation_bytes(job, replace(shared, fused=True)) == pytest.approx(sbh * 34 / t)


def test_activations_of_the_llama_family_are_those_of_its_matrices() -> None:
    job = planning.LLAMA_3_405B
    h, kv, f = 16_384, 1024, 53_248
    kept = (
        2 * (h + h) + 2 * (h + h) + 2 * (h + 2 * kv + h) + 2 * 3 * f
    )  # norms, two inputs, q k v and mixed, three of f
    assert activation_bytes(job, Plan(fused=True)) == 8192 * kept
    assert activation_bytes(replace(job, experts=4, top_k=2), Plan(fused=True)) == 8192 * (kept + 2 * 3 * f)


@pytest.mark.parametrize(
    ("plan", "batch", "layers"),
    [
        (Plan(), 8, 12),  # one micro-batch at a time
        (Plan(pipeline=4), 8, 12),  # four of them in three layers
        (Plan(pipeline=4), 2, 6),  # there are only two
        (Plan(pipeline=4, chunks=3), 8, 12 * (1 + 3 / 12)),
        (Plan(data=2, pipeline=4, micro_batch=2), 8, 6),
        (Plan(pipeline=5), 10, 15),  # rounded up: three layers
    ],
)
def test_layers_in_flight(plan: Plan, batch: int, layers: float) -> None:
    assert planning.layers_in_flight(Transformer(12, 8, 1), plan, batch) == pytest.approx(layers)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("job", [SMALL, MIXTURE, replace(SMALL, gated=True)], ids=["plain", "experts", "gated"])
def test_states_are_chapter_7s_without_tensor_and_pipeline(job: Transformer, zero: int) -> None:
    plan, precision = Plan(data=4, zero=zero), Precision(2, 2, 12)
    expected = memory_per_rank(job.parameters, 4, zero, bytes_weight=2, bytes_gradient=2, bytes_state=12)
    assert memory_of(job, plan, 4, precision).states == pytest.approx(expected, rel=1e-12)
    assert memory_of(job, plan, 4).gathered == (2 * 2 * job.layer_parameters if zero == 3 else 0)


def test_memory_by_hand() -> None:
    plan = Plan(data=2, tensor=2, pipeline=3, zero=1, recompute="full", sequence_parallel=True)
    layer = 12 * 64**2 + 13 * 64
    held = (2 * layer + (1000 + 128) * 64) / 2  # two of six layers, and the embedding, on two workers
    one = 128 * 64
    found = memory_of(SMALL, plan, 12)
    assert found.states == pytest.approx(held * (2 + 4 + 12 / 2))
    whole = one * (34 + 5 * 4 * 128 / 64) / 2
    assert found.activations == pytest.approx(6 * one + (whole - one))  # 2 s b h / 2 for each, and one layer whole
    assert found.total == found.states + found.activations + found.gathered
    alone = memory_of(SMALL, Plan(), 1)
    assert alone.activations == pytest.approx(6 * one * (34 + 40) + 4 * 128 * 1000)  # and the logits


def test_what_is_gathered_is_what_others_hold() -> None:
    dense = MIXTURE.layer_parameters - MIXTURE.expert_parameters
    apart = memory_of(MIXTURE, Plan(data=4, expert=4, zero=3), 4).gathered  # each expert stands whole on its rank
    assert apart == pytest.approx(2 * 2 * dense)
    half = memory_of(MIXTURE, Plan(data=4, expert=2, zero=3), 4).gathered
    assert half == pytest.approx(2 * 2 * (dense + MIXTURE.expert_parameters / 2))


def test_experts_are_shared_out_and_the_rest_is_not() -> None:
    apart, together = (memory_of(MIXTURE, Plan(data=4, expert=e), 4) for e in (4, 1))
    assert together.states - apart.states == pytest.approx(18 * 6 * MIXTURE.expert_parameters * 3 / 4)
    assert apart.activations == together.activations
    one = memory_of(MIXTURE, Plan(data=4, expert=4, zero=1), 4)  # each expert is there once: nothing to shard of it
    dense = MIXTURE.parameters - 6 * MIXTURE.expert_parameters
    assert apart.states - one.states == pytest.approx(12 * dense * 3 / 4)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_more_of_anything_that_shares_needs_fewer_bytes(zero: int, recompute: planning.Recompute) -> None:
    plan = Plan(data=2, zero=zero, recompute=recompute, sequence_parallel=True)
    base = replace(plan, pipeline=2)

    def total(plan: Plan) -> float:
        return memory_of(GPT3, plan, 16).total

    assert total(plan) > total(replace(plan, tensor=2)) > total(replace(plan, tensor=8))
    assert total(plan) > total(base)
    assert memory_of(GPT3, base, 16).states > memory_of(GPT3, replace(base, pipeline=8), 16).states
    if zero < 3 and zero > 0:
        assert total(plan) > total(replace(plan, data=4)) > total(replace(plan, data=4, zero=zero + 1))
    if recompute == "full":
        assert total(plan) < total(replace(plan, recompute="selective")) < total(replace(plan, recompute="none"))


# --- Time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_without_a_pipeline_every_operation_is_computed_once(recompute: planning.Recompute) -> None:
    plan = Plan(data=8, tensor=2, micro_batch=2, recompute=recompute)
    time = step_time(MIXTURE, NODES, plan, 32)
    assert time.compute * 16 * 0.5e12 == pytest.approx(MIXTURE.flops_per_step(32, recompute), rel=1e-12)
    fused = step_time(MIXTURE, NODES, replace(plan, recompute="none", fused=True), 32)
    assert fused.compute * 16 * 0.5e12 == pytest.approx(MIXTURE.flops_per_step(32, "selective"), rel=1e-12)
    assert (time.bubble, time.sends, time.all_to_all) == (0, 0, 0)
    assert time.mfu == pytest.approx(MIXTURE.flops_per_step(32) / time.total / 16e12)


@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("full", 3)])
def test_a_step_by_hand(recompute: planning.Recompute, passes: int) -> None:
    """Two nodes of four: pairs of tensor-parallel workers, two of each pair in a node, two stages in two chunks."""
    plan = Plan(data=4, tensor=2, pipeline=2, chunks=2, micro_batch=2, recompute=recompute, zero=1)
    s, h, V, b, m = 128, 64, 1000, 2, 4  # m: 32 sequences in four pipelines, two at a time
    time = step_time(SMALL, NODES, plan, 32)
    layer = (passes + 1) * (24 * s * h * h + 4 * s * s * h)  # the backward pass is two passes
    output = 3 * 2 * s * h * V / layer
    assert planning.stage_layers(SMALL, plan) == 4  # six layers in four chunks of two: the last chunk is empty
    layers = max(4, 2 + 0 + output)
    assert planning.paced_layers(SMALL, plan) == pytest.approx(layers)
    compute = layers * b * layer / 2 / 0.5e12
    touched = s * b * h * (10 + 24 / 2 + 5 * 4 * s / (h * 2))
    elementwise = layers * touched * (7 if recompute == "full" else 5) / 1e11
    message = 2 * b * s * h
    all_reduce = layers * 2 * passes * (2 * (1e-6 + message / 2 / 1e11))
    sends = 2 * 2 * (1e-5 + message / 2 / 1e10)
    held = (4 * (12 * h * h + 13 * h) + (V + s) * h) / 2

    def exchanged(size: float) -> float:  # four workers in two nodes: pairs inside, then pairs across
        return 2 * (1e-6 + size / 2 / 1e11) + 2 * (1e-5 + size / 2 / 2 / 1e10)

    wire = (exchanged(4 * held) + exchanged(2 * held)) / 2
    busy = compute + elementwise + all_reduce
    bucket, backward = wire / 8, 2 / 3 * busy
    exposed = max(bucket, wire - backward * 7 / 8)
    assert time.compute == pytest.approx(m * compute)
    assert time.elementwise == pytest.approx(m * elementwise)
    assert time.all_reduce == pytest.approx(m * all_reduce)
    assert time.sends == pytest.approx(m * sends)
    assert time.bubble == pytest.approx((busy + sends) / 2)  # (p - 1) / v of a micro-batch
    assert time.exchange == pytest.approx(exposed)
    assert time.total == pytest.approx(m * (busy + sends) + (busy + sends) / 2 + exposed)


def test_the_output_layer_can_set_the_pace() -> None:
    job = Transformer(8, 64, 4, 128, 8000)
    output = 3 * job.output_flops / job.layer_step_flops()
    assert output > 1
    assert planning.paced_layers(job, Plan(pipeline=4)) == pytest.approx(2 + output)
    assert planning.paced_layers(job, Plan(pipeline=3)) == pytest.approx(max(3, 2 + output))  # 3, 3 and 2 layers
    assert planning.paced_layers(job, Plan()) == pytest.approx(8 + output)


def test_experts_send_tokens_there_and_back() -> None:
    time = step_time(MIXTURE, NODES, Plan(data=4, expert=4, tensor=4, micro_batch=2), 8)
    size = 2 * 2 * 128 * 64 * 2 / 4  # two bytes, two copies of each token, shared out among four workers
    across = 3 * (1e-5 + size / 4 / 1e10)  # nobody is in the same node
    output = 3 * MIXTURE.output_flops / MIXTURE.layer_step_flops()
    assert time.all_to_all == pytest.approx((6 + output) * 4 * across)
    inside = planning.layer_all_to_all(MIXTURE, NODES, Plan(data=4, expert=4, micro_batch=2))
    assert inside == pytest.approx(4 * 3 * (1e-6 + size * 4 / 4 / 1e11))
    mixed = planning.layer_all_to_all(MIXTURE, NODES, Plan(data=4, expert=4, tensor=2, recompute="full"))
    assert mixed == pytest.approx(6 * ((1e-6 + size / 4 / 1e11) + 2 * (1e-5 + size / 4 / 1e10)))


def test_all_reduces_take_the_connection_they_have() -> None:
    def expected(size: float, workers: int) -> float:
        return ring_time(size, 1e10, 1e-5, workers)

    assert planning.all_reduce_time(1e6, 1, NODES, stride=1) == 0
    assert planning.all_reduce_time(1e6, 4, NODES, stride=1) == ring_time(1e6, 1e11, 1e-6, 4)
    assert planning.all_reduce_time(1e6, 4, NODES, stride=4) == expected(1e6, 4)  # one worker of each node
    assert planning.all_reduce_time(1e6, 4, NODES, stride=8) == expected(1e6, 4)
    two_levels = hierarchical_time(1e6, 1e10, 1e-5, 4, per_node=2, node_bandwidth=1e11, node_latency=1e-6)
    assert planning.all_reduce_time(1e6, 4, NODES, stride=2) == two_levels
    assert planning.all_reduce_time(1e6, 3, NODES, stride=2) == expected(1e6, 3)  # they do not fill the nodes


def test_what_sharding_sends() -> None:
    plan = Plan(data=4, tensor=4)
    equal = Precision(4, 4, 12)
    stages = [planning.exchange_time(SMALL, NODES, replace(plan, zero=z), 5, equal) for z in range(4)]
    assert np.allclose(np.array(stages) / stages[0], [1, 1, 5 / 2 + 1 / 2, 5 * 1.5])
    half = [planning.exchange_time(SMALL, NODES, replace(plan, zero=z), 1, Precision(2, 4, 12)) for z in range(4)]
    weights = planning.exchange_time(SMALL, NODES, plan, 1, Precision(2, 2, 12))
    assert half[1] == pytest.approx(half[0] / 2 + weights / 2)
    assert half[3] == pytest.approx(half[0] / 2 + weights)


def simulated(stages: Sequence[float], links: Sequence[float], micro_batches: int) -> float:
    """When the last micro-batch leaves: each part takes them in turn, as soon as it is free and they have arrived."""
    parts = [t for pair in itertools.zip_longest(stages, links, fillvalue=0.0) for t in pair]
    free = [0.0] * len(parts)
    for _ in range(micro_batches):
        arrived = 0.0
        for part, seconds in enumerate(parts):
            free[part] = arrived = max(arrived, free[part]) + seconds
    return arrived


def test_a_pipeline_takes_as_long_as_in_a_simulation() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        p = int(generator.integers(1, 6))
        stages, links = generator.random(p).tolist(), (1.5 * generator.random(p - 1)).tolist()
        m = int(generator.integers(1, 9))
        assert planning.predict_pipeline(stages, links, m) == pytest.approx(simulated(stages, links, m))
    assert planning.predict_pipeline([2.0] * 4, [0.0] * 3, 8) == 2 * (8 + 4 - 1)


# --- Plans ------------------------------------------------------------------------------------------------------------

FREE = Choices(micro_batches=(1, 2), chunks=(1, 2), zero=(1, 2, 3), recompute=("none", "selective", "full"))


def every_plan(job: Transformer, cluster: Cluster, choices: Choices) -> list[Plan]:
    """All combinations, by trying all numbers."""
    numbers = range(1, cluster.workers + 1)
    degrees = [(d, t, p) for d, t, p in itertools.product(numbers, repeat=3) if d * t * p == cluster.workers]
    found = []
    for (d, t, p), e in itertools.product(degrees, range(1, job.experts + 1)):
        for b, v, r, z in itertools.product(choices.micro_batches, choices.chunks, choices.recompute, choices.zero):
            found.append(Plan(d, t, p, e, b, v, z, r, choices.sequence_parallel and t > 1, choices.fused))
    return found


@pytest.mark.parametrize("job", [SMALL, MIXTURE, replace(SMALL, layers=5, heads=2)], ids=["plain", "experts", "odd"])
@pytest.mark.parametrize("memory", [1.8e6, 3e6, 1e9])
def test_the_best_plan_is_the_best_of_all(job: Transformer, memory: float) -> None:
    cluster = replace(NODES, memory=memory)
    possible = [plan for plan in every_plan(job, cluster, FREE) if not why_not(job, cluster, plan, 16)]
    table = plans(job, cluster, 16, FREE)
    listed = [Plan(**row) for row in table[[f.name for f in fields(Plan)]].to_dict("records")]
    lowest = {replace(plan, zero=0): plan for plan in sorted(possible, key=lambda plan: -plan.zero)}
    assert set(listed) == set(lowest.values())
    assert len(listed) == len(lowest)
    assert table["seconds"].is_monotonic_increasing
    for row, plan in zip(table.to_dict("records"), listed, strict=True):
        time = step_time(job, cluster, plan, 16)
        assert row["seconds"] == time.total == pytest.approx(sum(row[f.name] for f in fields(time)[:-1]))
        assert row["memory"] == memory_of(job, plan, 16).total <= memory
        assert row["mfu"] == time.mfu
    if possible:
        best = planning.best_plan(job, cluster, 16, FREE)
        least = min(step_time(job, cluster, plan, 16).total for plan in possible)
        assert step_time(job, cluster, best, 16).total == least == table["seconds"].iloc[0]
    else:
        with pytest.raises(ValueError, match="no plan is possible for batch=16"):
            planning.best_plan(job, cluster, 16, FREE)


def test_memory_decides_what_is_possible() -> None:
    sizes = [len(plans(SMALL, replace(NODES, memory=m), 16, FREE)) for m in (1e5, 1.8e6, 3e6, 1e9)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 0 < sizes[1] < sizes[2] < sizes[3]


@pytest.mark.parametrize(
    ("plan", "batch", "job", "why"),
    [
        (Plan(data=16), 16, SMALL, ""),
        (Plan(data=8), 16, SMALL, "takes 8 workers of 16"),
        (Plan(data=2, tensor=8), 16, SMALL, "tensor=8 does not divide the node of 4"),
        (Plan(data=4, tensor=4), 16, replace(SMALL, heads=2), "heads=2 not divisible by tensor=4"),
        (Plan(data=4, tensor=4), 16, replace(SMALL, heads=32, width=96, kv_heads=4, ffn_width=30), "ffn=30 not"),
        (Plan(data=4, tensor=4), 16, replace(SMALL, heads=12, width=96, kv_heads=3), "kv_heads=3 and tensor=4"),
        (Plan(data=4, tensor=4), 16, replace(SMALL, kv_heads=2), ""),
        (Plan(data=2, pipeline=8), 16, SMALL, "layers=6 are too few for 8 parts"),
        (Plan(data=4, pipeline=4, chunks=2), 16, SMALL, "layers=6 are too few for 8 parts"),
        (Plan(data=16), 24, SMALL, "batch=24 not divisible by data . micro_batch=16"),
        (Plan(data=16, micro_batch=2), 16, SMALL, "batch=16 not divisible by data . micro_batch=32"),
        (Plan(data=16, expert=8), 16, MIXTURE, "experts=4 not divisible by expert=8"),
        (Plan(data=2, tensor=4, pipeline=2, expert=4), 16, MIXTURE, "data=2 not divisible by expert=4"),
        (Plan(data=16, chunks=2), 16, SMALL, "chunks=2 without a pipeline"),
        (Plan(data=8, pipeline=2, chunks=2), 24, SMALL, "3 micro-batches are no multiple of pipeline=2"),
        (Plan(data=8, pipeline=2), 24, SMALL, ""),
    ],
)
def test_what_stands_in_the_way_is_said(plan: Plan, batch: int, job: Transformer, why: str) -> None:
    found = why_not(job, replace(NODES, memory=1e9), plan, batch)
    assert (why.split(" . ")[0] in found and why.split(" . ")[-1] in found) if why else found == ""


def test_what_does_not_fit_says_how_much_it_needs() -> None:
    cluster = planning.a100(8)
    assert why_not(GPT3, cluster, Plan(tensor=8), 8) == (
        f"does not fit: needs {memory_of(GPT3, Plan(tensor=8), 8).total / 1e9:.1f} GB of 80.0"
    )


def test_what_is_refused_and_what_is_possible_are_all_there_is() -> None:
    choices = replace(FREE, zero=(1,))
    cluster = replace(NODES, memory=3e6)
    table = planning.refused(SMALL, cluster, 16, choices)
    whys = {(*row[:-1],): row[-1] for row in table.itertuples(index=False)}
    assert all(whys.values())
    possible = plans(SMALL, cluster, 16, choices)
    settings = [tuple(row) for row in possible[[f.name for f in fields(Plan)]].itertuples(index=False)]
    assert not set(settings) & set(whys)
    shapes = [plan for plan in every_plan(SMALL, cluster, choices) if plan.tensor <= 4]
    assert len(settings) + len(whys) == len(shapes)
    assert any("does not fit" in why for why in whys.values())


@pytest.mark.parametrize("n", [1, 2, 12, 13, 36, 16_384])
def test_divisors(n: int) -> None:
    assert planning.divisors(n) == [i for i in range(1, n + 1) if n % i == 0]


# --- What was run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: f"{run.name}-{run.cluster.workers}")
def test_what_was_run_is_possible_for_the_planner(run: planning.Published) -> None:
    plan = run.plan()
    assert (plan.data, plan.tensor, plan.pipeline) == (run.data, run.tensor, run.pipeline)
    assert plan.workers == run.cluster.workers
    assert why_not(run.job, run.cluster, plan, run.batch) == ""
    assert memory_of(run.job, plan, run.batch).total <= 80e9
    if run.micro_batch is not None:
        assert (plan.micro_batch, plan.chunks) == (run.micro_batch, run.chunks)


def test_predictions_are_near_what_was_measured() -> None:
    table = planning.compare_with_published()
    assert len(table) == len(PUBLISHED)
    assert (table["gain"] >= 1).all()
    errors = (table["predicted"] / table["seconds"] - 1).tolist()
    assert errors == pytest.approx(table["error"].tolist())
    assert np.median(np.abs(errors[:14])) < 0.05
    assert max(map(abs, errors[:14])) < 0.2
    assert max(map(abs, errors)) < 0.35
    assert table["mfu"].tolist() == [run.mfu for run in PUBLISHED]
    agree = table.iloc[:14]
    assert (agree["tensor"] == agree["our tensor"]).sum() >= 8
    assert (agree["pipeline"] == agree["our pipeline"]).sum() >= 8


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Transformer(0, 8, 1), "layers=0"),
        (lambda: Transformer(1, 9, 2), "width=9: must be a multiple of heads, 2"),
        (lambda: Transformer(1, 8, 4, kv_heads=3), "kv_heads=3"),
        (lambda: Transformer(1, 8, 4, experts=2, top_k=3), "top_k=3"),
        (lambda: Plan(tensor=0), "tensor=0"),
        (lambda: Plan(zero=4), "zero=4: must be 0, 1, 2 or 3"),
        (lambda: Plan(recompute="some"), "recompute='some'"),
        (lambda: replace(NODES, memory=0), "memory=0"),
        (lambda: replace(NODES, efficiency=1.2), "efficiency=1.2"),
        (lambda: replace(NODES, workers=0), "workers=0"),
        (lambda: step_time(SMALL, NODES, Plan(data=16), 8), "batch=8: must be a multiple of data . micro_batch, 16"),
        (lambda: memory_of(SMALL, Plan(data=16), 8), "batch=8"),
        (lambda: memory_of(MIXTURE, Plan(data=2, expert=4), 8), "expert=4: must be a divisor of data, 2"),
        (lambda: plans(SMALL, NODES, 0), "batch=0"),
        (lambda: planning.predict_pipeline([], [], 1), "stage_seconds=.*one number"),
        (lambda: planning.predict_pipeline([1.0], [1.0], 1), "send_seconds=.*0 numbers"),
        (lambda: planning.predict_pipeline([1.0, -1.0], [1.0], 1), "seconds="),
        (lambda: planning.predict_pipeline([1.0], [], 0), "micro_batches=0"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_settings_do_not_change() -> None:
    for value in (SMALL, NODES, Plan(), Precision(), Choices(), PUBLISHED[0]):
        with pytest.raises(AttributeError):
            setattr(value, fields(value)[0].name, 1)
    assert math.isclose(sum(vars(planning.MIXED).values()), 18)
