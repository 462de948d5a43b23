"""Sending less, waiting less, scaling: every method against its formula, torch's own, or a simulation apart."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import evaluate, fit
from course_lib.parallel import asynchronous, input_pipeline, scaling
from course_lib.parallel import communicating_less as less
from course_lib.parallel.communicating_less import ErrorFeedback, simulate_workers, top_fraction, top_k
from course_lib.parallel.launching import launch
from tests.parallel import communicated_by_ranks as in_processes
from tests.parallel.communicated_by_ranks import DOUBLE, flat, small

RUN: dict[str, Any] = {"epochs": 2, "batch_size": 100, "lr": 0.1, "momentum": 0.5, "seed": 4}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def some_gradient(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dealt(data: Dataset, workers: int, epochs: int = 2, batch_size: int = 100, seed: int = 4) -> list[list[Any]]:
    """For each step, each worker's examples: written apart from the code under test."""
    steps = []
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        split = data.train.subset(order)
        for x, y in batches(split, batch_size, dtype=torch.float64):
            each = len(x) // workers
            steps.append([(x[w * each : (w + 1) * each], y[w * each : (w + 1) * each]) for w in range(workers)])
    return steps


def gradient_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))])


def move(model: nn.Module, step: Tensor) -> None:
    with torch.no_grad():
        start = 0
        for p in model.parameters():
            p -= step[start : start + p.numel()].view_as(p)
            start += p.numel()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (7, 3), (1000, 10), (1000, 1000)])
def test_top_k_keeps_the_largest_entries(size: int, k: int, dtype: torch.dtype) -> None:
    gradient = some_gradient(size, dtype=dtype)
    message = top_k(gradient, k)
    expected = np.zeros(size)
    largest = np.argsort(-gradient.double().abs().numpy(), kind="stable")[:k]
    expected[largest] = gradient.double().numpy()[largest]
    assert np.array_equal(message.dense().double().numpy(), expected)
    assert message.dense().dtype == dtype


def test_the_bytes_of_a_message_are_those_of_its_tensors() -> None:
    gradient = some_gradient(1003, dtype=torch.float32)
    sparse, signs = top_k(gradient, 17), less.sign_compress(gradient)
    assert sparse.nbytes == sparse.values.nbytes + sparse.indices.nbytes == 17 * 8
    assert signs.nbytes == signs.bits.nbytes + signs.scale.nbytes == 126 + 4


def test_of_equal_magnitudes_the_first_are_kept_whatever_their_last_bits() -> None:
    gradient = torch.tensor([0.0, 2.0, -2.0 - 1e-12, 2.0 + 1e-12], dtype=torch.float64)
    assert top_k(gradient, 2).indices.tolist() == [1, 2]
    assert len(top_k(torch.full((5,), math.nan), 2).values) == 2


@pytest.mark.parametrize(("size", "fraction", "k"), [(1000, 0.01, 10), (10, 0.01, 1), (10, 0.26, 3), (5, 1.0, 5)])
def test_top_fraction_counts_the_entries(size: int, fraction: float, k: int) -> None:
    assert len(top_fraction(some_gradient(size), fraction).values) == k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_signs_are_packed_eight_to_a_byte(size: int, dtype: torch.dtype) -> None:
    gradient = some_gradient(size, dtype=dtype)
    message = less.sign_compress(gradient)
    positive = (gradient >= 0).numpy()
    assert np.array_equal(message.bits.numpy(), np.packbits(positive, bitorder="little"))
    expected = gradient.abs().mean() * torch.where(gradient >= 0, 1.0, -1.0).to(dtype)
    assert torch.equal(message.dense(), expected)


def test_sign_compression_is_a_contraction_as_the_proof_needs() -> None:
    """Karimireddy et al. 2019: ||C(g) - g||^2 = (1 - d)||g||^2 with d = ||g||_1^2 / (n ||g||_2^2)."""
    g = some_gradient(500)
    density = g.abs().sum() ** 2 / (500 * g.square().sum())
    assert (less.sign_compress(g).dense() - g).square().sum() == pytest.approx(float((1 - density) * g.square().sum()))


@pytest.mark.parametrize("compress", [partial(top_k, k=5), less.sign_compress], ids=["top k", "sign"])
def test_error_feedback_loses_nothing(compress: less.Compress) -> None:
    remembering, sent, residual = ErrorFeedback(compress), torch.zeros(100).double(), torch.zeros(100).double()
    for step in range(30):
        gradient = some_gradient(100, seed=step)
        message = remembering(gradient)
        other, residual = less.compress_with_memory(gradient, residual, compress)
        assert torch.equal(message.dense(), other.dense())
        sent += message.dense()
    assert remembering.residual is not None
    assert torch.equal(remembering.residual, residual)
    total = sum(some_gradient(100, seed=step) for step in range(30))
    assert torch.allclose(sent + residual, total, atol=1e-12)
    assert residual.norm() > 0.1  # something was held back at all


def test_without_feedback_a_small_entry_is_never_sent() -> None:
    gradient, remembering = torch.tensor([1.0, 0.1]), ErrorFeedback(partial(top_k, k=1))
    assert all(top_k(gradient, 1).dense()[1] == 0 for _ in range(100))
    mean = torch.stack([remembering(gradient).dense() for _ in range(1000)]).mean(0)
    assert torch.allclose(mean, gradient, rtol=0.02)


# --- Policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_averaging_at_every_step_is_training_with_the_whole_batch(digits: Dataset, workers: int) -> None:
    model, _ = small()
    reference, _ = small()
    outcome = simulate_workers(model, digits, workers=workers, **RUN)
    optimizer = partial(_torch_sgd, lr=RUN["lr"], momentum=RUN["momentum"])
    history = fit(reference, digits, _recipe(optimizer), seed=RUN["seed"])
    assert relative(flat(model), flat(reference)) < 1e-12
    assert list(outcome.curve) == history["val_accuracy"]
    assert outcome.val_accuracy == evaluate(model, digits.val).accuracy


def _torch_sgd(named: Any, lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=lr, momentum=momentum)


def _recipe(optimizer: Any) -> Any:
    from dataclasses import replace

    return replace(DOUBLE, optimizer=optimizer, epochs=RUN["epochs"], batch_size=RUN["batch_size"])


def test_accumulation_is_a_larger_batch(digits: Dataset) -> None:
    model, _ = small()
    reference, _ = small()
    accumulate = partial(less.accumulate, steps=5)
    outcome = simulate_workers(model, digits, accumulate, **RUN | {"batch_size": 20})
    large = simulate_workers(reference, digits, **RUN | {"batch_size": 100})
    assert relative(flat(model), flat(reference)) < 1e-12
    assert (outcome.steps, outcome.rounds) == (100, 20)
    assert outcome.wire_bytes == large.wire_bytes


def test_accumulation_ends_with_what_is_left(digits: Dataset) -> None:
    """Ten steps in threes: the last average is of one gradient."""
    model, _ = small()
    reference, _ = small()
    settings = RUN | {"epochs": 1, "momentum": 0.0}
    outcome = simulate_workers(model, digits, partial(less.accumulate, steps=3), **settings)
    steps = dealt(digits, 1, epochs=1)
    for first in range(0, 10, 3):
        group = steps[first : first + 3]
        move(reference, 0.1 * torch.stack([gradient_of(reference, *step[0]) for step in group]).mean(0))
    assert outcome.rounds == 4
    assert relative(flat(model), flat(reference)) < 1e-12


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_local_sgd_is_several_optimizers_and_an_average(digits: Dataset, steps: int) -> None:
    model, _ = small()
    outcome = simulate_workers(
        model, digits, partial(less.local_sgd, steps=steps), workers=3, **RUN | {"batch_size": 66}
    )
    start, _ = small()
    replicas = [copy.deepcopy(start) for _ in range(3)]
    optimizers = [torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.5) for replica in replicas]
    rounds = 0
    for number, hands in enumerate(dealt(digits, 3, batch_size=66), 1):
        for replica, optimizer, (x, y) in zip(replicas, optimizers, hands, strict=True):
            optimizer.zero_grad()
            cross_entropy(replica(x), y).backward()
            optimizer.step()
        if number % steps == 0 or number == 32:
            rounds += 1
            with torch.no_grad():
                for same in zip(*(replica.parameters() for replica in replicas), strict=True):
                    mean = torch.stack([p.detach() for p in same]).mean(0)
                    for p in same:
                        p.copy_(mean)
    assert relative(flat(model), flat(replicas[0])) < 1e-12
    assert outcome.rounds == rounds


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("kind", ["top", "sign"])
def test_compressed_training_follows_its_formula(digits: Dataset, kind: str, feedback: bool) -> None:
    """The formula of Karimireddy et al. (2019) for several workers, written out with autograd and numpy."""

    def squeeze(vector: np.ndarray) -> np.ndarray:
        if kind == "sign":
            return np.abs(vector).mean() * np.where(vector >= 0, 1.0, -1.0)
        kept = np.argsort(-np.abs(vector).astype(np.float32), kind="stable")[:30]
        return np.where(np.isin(np.arange(len(vector)), kept), vector, 0.0)

    model, _ = small()
    compress = partial(top_k, k=30) if kind == "top" else less.sign_compress
    policy = less.with_error_feedback if feedback else less.compressed
    simulate_workers(model, digits, partial(policy, compress=compress), workers=4, **RUN)
    reference, _ = small()
    residuals = [np.zeros(flat(reference).numel()) for _ in range(4)]
    velocity = np.zeros_like(residuals[0])
    for hands in dealt(digits, 4):
        messages = []
        for worker, (x, y) in enumerate(hands):
            wanted = gradient_of(reference, x, y).numpy() + residuals[worker]
            messages.append(squeeze(wanted))
            if feedback:
                residuals[worker] = wanted - messages[-1]
        velocity = 0.5 * velocity + np.mean(messages, axis=0)
        move(reference, torch.from_numpy(0.1 * velocity))
    assert relative(flat(model), flat(reference)) < 1e-12


@pytest.mark.parametrize("policy", [less.compressed, less.with_error_feedback])
def test_sending_all_entries_is_not_compressing(digits: Dataset, policy: Any) -> None:
    model, _ = small()
    reference, _ = small()
    simulate_workers(model, digits, partial(policy, compress=partial(top_fraction, fraction=1.0)), **RUN)
    simulate_workers(reference, digits, **RUN)
    assert relative(flat(model), flat(reference)) < 1e-12


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_bytes_are_counted_as_they_are_sent(digits: Dataset, workers: int) -> None:
    n = flat(small()[0]).numel()
    sent = {}
    policies = {
        "every": (less.every_step, 4 * n, 2 * (workers - 1) / workers),
        "local": (partial(less.local_sgd, steps=20), 4 * n, 2 * (workers - 1) / workers),
        "top": (partial(less.compressed, compress=partial(top_k, k=9)), 9 * 8, workers - 1),
        "sign": (partial(less.with_error_feedback, compress=less.sign_compress), -(-n // 8) + 4, workers - 1),
    }
    for name, (policy, payload, times) in policies.items():
        model, _ = small()
        outcome = simulate_workers(model, digits, policy, workers=workers, **RUN)
        sent[name] = outcome.wire_bytes
        assert outcome.rounds == (1 if name == "local" else 20)
        assert outcome.payload_bytes == outcome.rounds * payload
        assert outcome.wire_bytes == outcome.rounds * round(times * payload)
    assert workers == 1 or sent["top"] < sent["every"]


def test_dealing_by_class_changes_nothing_for_an_average_and_much_for_local_sgd(digits: Dataset) -> None:
    def weights(policy: less.Policy, arrange: Any = None) -> Tensor:
        model, _ = small()
        simulate_workers(model, digits, policy, arrange=arrange, **RUN)
        return flat(model)

    assert relative(weights(less.every_step, less.by_class), weights(less.every_step)) < 1e-12
    local = partial(less.local_sgd, steps=10)
    assert relative(weights(local, less.by_class), weights(local)) > 0.01
    x, y = less.by_class(torch.arange(5.0), torch.tensor([3, 1, 2, 1, 0]))
    assert (x.tolist(), y.tolist()) == ([4, 1, 3, 2, 0], [0, 1, 1, 2, 3])


def test_a_last_batch_too_small_to_be_dealt_out_is_left_out(digits: Dataset) -> None:
    """1,000 examples in batches of 27 leave one over, too few for three workers: 37 steps an epoch."""
    model, _ = small()
    outcome = simulate_workers(model, digits, partial(less.local_sgd, steps=99), workers=3, **RUN | {"batch_size": 27})
    assert (outcome.steps, outcome.rounds) == (74, 1)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"workers": 0}, "workers"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 50}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"policy": partial(less.local_sgd, steps=0)}, "steps"),
        ({"policy": partial(less.accumulate, steps=0)}, "steps"),
        ({"policy": partial(less.compressed, compress=partial(top_k, k=10**6))}, "k=1000000"),
        ({"policy": partial(less.compressed, compress=partial(top_fraction, fraction=1.2))}, "fraction=1.2"),
    ],
)
def test_bad_settings_are_named(digits: Dataset, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        simulate_workers(small()[0], digits, **RUN | change)


def test_models_that_no_policy_can_share_are_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="buffers"):
        simulate_workers(convnet(digits.input_shape, 10), digits, **RUN)
    frozen, _ = small()
    next(frozen.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        simulate_workers(frozen, digits, **RUN)


# --- The same in real processes ---------------------------------------------------------------------------------------


POLICIES: dict[str, less.Policy] = {
    "every step": less.every_step,
    "accumulate": partial(less.accumulate, steps=3),
    "local": partial(less.local_sgd, steps=5),
    "top k": partial(less.compressed, compress=partial(top_k, k=30)),
    "top k with feedback": partial(less.with_error_feedback, compress=partial(top_k, k=30)),
    "sign with feedback": partial(less.with_error_feedback, compress=less.sign_compress),
}


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    """What two processes found: the policies' weights and outcomes, and torch's averager's weights."""
    return launch(in_processes.all_at_once, 2, POLICIES, RUN, 5, timeout=120)


@pytest.mark.parametrize("name", POLICIES)
def test_two_processes_do_what_the_simulation_does(digits: Dataset, ranks: list[Any], name: str) -> None:
    model, _ = small()
    outcome = simulate_workers(model, digits, POLICIES[name], workers=2, **RUN)
    for trained, _ in ranks:
        weights, found = trained[name]
        assert relative(weights, flat(model)) < 1e-12
        assert found == outcome


def test_local_sgd_is_the_periodic_averaging_of_torch(digits: Dataset, ranks: list[Any]) -> None:
    model, _ = small()
    simulate_workers(model, digits, partial(less.local_sgd, steps=5), workers=2, **RUN)
    for _, weights in ranks:
        assert relative(weights, flat(model)) < 1e-12


# --- Staleness --------------------------------------------------------------------------------------------------------


def test_no_delay_is_sgd(digits: Dataset) -> None:
    model, _ = small()
    reference, _ = small()
    curve = asynchronous.stale_gradients(model, digits, delay=0, **RUN)
    history = fit(reference, digits, _recipe(partial(_torch_sgd, lr=0.1, momentum=0.5)), seed=4)
    assert torch.equal(flat(model), flat(reference))
    assert curve == history["val_accuracy"]


@pytest.mark.parametrize("delay", [1, 4, 30])
def test_a_delayed_gradient_is_that_of_earlier_weights(digits: Dataset, delay: int) -> None:
    """v <- mu v + g_t(theta_{max(0, t - delay)}), written out with all weights of the past kept."""
    model, _ = small()
    curve = asynchronous.stale_gradients(model, digits, delay=delay, **RUN | {"lr": 0.02})
    probe, _ = small()
    past, velocity = [flat(probe)], torch.zeros_like(flat(probe))
    for t, ((x, y),) in enumerate(dealt(digits, 1)):
        nn.utils.vector_to_parameters(past[max(0, t - delay)].clone(), probe.parameters())
        velocity = 0.5 * velocity + gradient_of(probe, x, y)
        past.append(past[-1] - 0.02 * velocity)
    assert relative(flat(model), past[-1]) < 1e-12
    assert curve[-1] == evaluate(model, digits.val).accuracy
    assert len(curve) == 2


@pytest.mark.parametrize("delay", [0, 1, 2, 5, 16])
def test_the_largest_stable_rate_is_where_the_largest_root_leaves_the_unit_circle(delay: int) -> None:
    """x_{t+1} = x_t - lr h x_{t-d} has the characteristic polynomial z^(d+1) - z^d + lr h."""
    rate = asynchronous.largest_stable_rate(3.0, delay)
    for factor, stable in ((0.999, True), (1.001, False)):
        polynomial = np.zeros(delay + 2)
        polynomial[[0, 1]] += [1, -1]
        polynomial[-1] += factor * rate * 3.0
        assert (np.abs(np.roots(polynomial)).max() < 1) == stable


def test_staleness_divides_the_learning_rate() -> None:
    assert [asynchronous.staleness_aware(0.8, delay) for delay in (0, 1, 2, 8)] == [0.8, 0.8, 0.4, 0.1]


@pytest.mark.parametrize("bad", [{"delay": -1}, {"delay": 1.5}, {"lr": -1.0}, {"momentum": 1.0}, {"epochs": 0}])
def test_bad_settings_of_staleness_are_named(digits: Dataset, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        asynchronous.stale_gradients(small()[0], digits, **{"delay": 1} | RUN | bad)


def test_stable_rate_refuses_a_flat_parabola() -> None:
    with pytest.raises(ValueError, match="curvature"):
        asynchronous.largest_stable_rate(0.0, 1)


# --- Hogwild ----------------------------------------------------------------------------------------------------------


def test_one_hogwild_process_is_sgd(digits: Dataset) -> None:
    model, _ = small()
    start = flat(model)
    accuracy = asynchronous.hogwild(model, digits, workers=1, **RUN)
    reference, _ = small()
    asynchronous.stale_gradients(reference, digits, delay=0, **RUN)
    assert relative(flat(model) - start, flat(reference) - start) < 1e-12
    assert accuracy == evaluate(model, digits.val).accuracy


def in_shared_memory() -> set[str]:
    """What lies there, but for joblib's folders: those are of other tests, which run at the same time."""
    there = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in there if not name.startswith("joblib_")}


def test_hogwild_processes_write_to_one_memory_and_leave_nothing(digits: Dataset) -> None:
    """At a tiny rate all gradients are those of the first weights: their sum must arrive, whoever computed it."""
    before = in_shared_memory()
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 50, "lr": 1e-5, "momentum": 0.0, "seed": 4}
    reference, _ = small()
    start = flat(reference)
    asynchronous.stale_gradients(reference, digits, delay=0, **settings)
    expected = flat(reference) - start
    off = []
    for _ in range(5):
        model, _ = small()
        asynchronous.hogwild(model, digits, workers=2, **settings)
        off.append(float(((flat(model) - start - expected).abs() > 0.05 * expected.abs()).double().mean()))
    # interrupted between reading and writing, a process undoes what the other did: now and then, not in every run
    assert min(off) < 0.05, off  # where a share of the data is left out, 0.95 in each
    assert not multiprocessing.active_children()
    if before:
        assert in_shared_memory() <= before


@pytest.mark.parametrize("bad", [{"workers": 0}, {"lr": 0.0}, {"batch_size": 0}])
def test_bad_settings_of_hogwild_are_named(digits: Dataset, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        asynchronous.hogwild(small()[0], digits, **{"seed": 0} | bad)


def test_hogwild_refuses_what_the_processes_do_not_share(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="model has buffers"):
        asynchronous.hogwild(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)), digits, seed=0)


# --- Scaling ----------------------------------------------------------------------------------------------------------

LINK = {"bandwidth": 1e9, "latency": 1e-4}


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 13])
def test_ring_time_is_that_of_a_ring_played_message_by_message(workers: int) -> None:
    """Each round every worker sends a chunk to its right neighbour and waits for the one from its left."""
    clocks = np.zeros(workers)
    for _ in range(2 * (workers - 1)):
        arrivals = clocks + LINK["latency"] + 8e6 / workers / LINK["bandwidth"]
        clocks = np.maximum(arrivals, np.roll(arrivals, 1))
    assert scaling.ring_time(8e6, workers=workers, **LINK) == pytest.approx(clocks.max(), rel=1e-12)


@pytest.mark.parametrize("workers", [1, 2, 3, 8, 13])
def test_tree_time_is_that_of_a_tree_played_message_by_message(workers: int) -> None:
    """Rank r hands its sum to r - 2^i in round i, once both have theirs; then the same backwards."""
    seconds = LINK["latency"] + 8e6 / LINK["bandwidth"]
    edges = [
        (r, r - 2**i) for i in range(workers.bit_length()) for r in range(2**i, workers, 2 ** (i + 1))
    ]  # (child, parent), leaves first
    clocks = np.zeros(workers)
    for child, parent in edges:
        clocks[parent] = max(clocks[parent], clocks[child]) + seconds
    for child, parent in reversed(edges):  # a parent sends to its children one after the other
        clocks[parent] = clocks[child] = clocks[parent] + seconds
    assert scaling.tree_time(8e6, workers=workers, **LINK) == pytest.approx(clocks.max(), rel=1e-12)


def in_order_tree(nodes: int) -> dict[int, int]:
    """The parent of each of 1 to n in a binary tree whose leaves are the odd numbers; its root's parent is 0."""
    parents = {}
    for node in range(1, nodes + 1):
        bit = node & -node
        above = (node ^ bit) | (bit << 1)
        parents[node] = above if above <= nodes else node ^ bit
    return parents


def two_trees(nodes: int) -> tuple[dict[int, int], dict[int, int]]:
    """The tree, and the same with its nodes renamed so that the inner ones, the even numbers, are its leaves."""
    tree = in_order_tree(nodes)
    other = {node: node % nodes + 1 if nodes % 2 else nodes + 1 - node for node in tree} | {0: 0}
    return tree, {other[node]: other[parent] for node, parent in tree.items()}


def two_kinds_of_rounds(trees: Sequence[dict[int, int]]) -> dict[tuple[int, int], int]:
    """The edges ``(tree, child)`` in two kinds: of those that one worker sends on, or receives on, one of each kind."""
    edges = [(k, child) for k, tree in enumerate(trees) for child in tree]
    senders = {edge: [e for e in edges if trees[e[0]][e[1]] == trees[edge[0]][edge[1]]] for edge in edges}
    receivers = {edge: [e for e in edges if e[1] == edge[1]] for edge in edges}
    kinds: dict[tuple[int, int], int] = {}
    for first in edges:
        waiting = [(first, 0)] if first not in kinds else []
        while waiting:
            edge, kind = waiting.pop()
            assert kinds.setdefault(edge, kind) == kind
            clashing = {*senders[edge], *receivers[edge]} - {edge}
            waiting += [(other, 1 - kind) for other in clashing if other not in kinds]
    return kinds


def broadcast_rounds(workers: int, blocks: int) -> int:
    """Rounds until all have each block of both halves, in each of which a worker sends one block and receives one."""
    trees = two_trees(workers - 1)
    kinds = two_kinds_of_rounds(trees)
    have = [dict.fromkeys(range(1, workers), 0) | {0: blocks} for _ in trees]
    rounds = 0
    while any(count < blocks for half in have for count in half.values()):
        parity = rounds % 2
        moving = [(k, child) for (k, child), kind in kinds.items() if kind == parity]
        moving = [(k, child) for k, child in moving if have[k][child] < have[k][trees[k][child]]]
        senders, receivers = [trees[k][child] for k, child in moving], [child for _, child in moving]
        assert len(set(senders)) == len(senders)
        assert len(set(receivers)) == len(receivers)
        for k, child in moving:
            have[k][child] += 1
        rounds += 1
    return rounds


@pytest.mark.parametrize("workers", [2, 3, 5, 8, 13, 16, 32, 33])
@pytest.mark.parametrize("blocks", [1, 4, 9])
def test_double_tree_time_is_that_of_two_trees_played_block_by_block(workers: int, blocks: int) -> None:
    """A broadcast, and before it the same backwards; where a tree is not full it may be done one round earlier."""
    round_seconds = LINK["latency"] + 8e6 / (2 * blocks) / LINK["bandwidth"]
    rounds = scaling.double_tree_time(8e6, workers=workers, blocks=blocks, **LINK) / round_seconds
    played = 2 * broadcast_rounds(workers, blocks)
    full = workers in (2, 8, 16, 32)
    assert rounds == pytest.approx(played, rel=1e-12) if full else played <= round(rounds, 9) <= played + 2


def arrival_of_the_sum(workers: int, ports: int, blocks: int) -> float:
    """When the last block of the sum has reached all workers, every link carrying one block at a time each way."""
    seconds = LINK["latency"] + 8e6 / blocks / LINK["bandwidth"]
    nodes = [np.zeros(blocks) for _ in range(workers)]  # when each has each block: the workers have their own at once
    levels = 0
    while len(nodes) > 1:
        nodes = [
            np.max([sent_on(node, seconds) for node in nodes[k : k + ports]], 0) for k in range(0, len(nodes), ports)
        ]
        levels += 1
    arrived = nodes[0]
    for _ in range(levels):  # all ports of a switch send down at once, so any one way down is like the others
        arrived = sent_on(arrived, seconds)
    return float(arrived[-1])


def sent_on(ready: np.ndarray, seconds: float) -> np.ndarray:
    """When the blocks that are ready at these times are at the other end of a link."""
    free, arrived = 0.0, []
    for time in ready:
        free = max(free, float(time)) + seconds
        arrived.append(free)
    return np.array(arrived)


@pytest.mark.parametrize(("workers", "ports"), [(2, 32), (8, 2), (32, 32), (33, 32), (100, 4)])
@pytest.mark.parametrize("blocks", [1, 3, 10])
def test_in_network_time_is_that_of_switches_played_block_by_block(workers: int, ports: int, blocks: int) -> None:
    found = scaling.in_network_time(8e6, workers=workers, ports=ports, blocks=blocks, **LINK)
    assert found == pytest.approx(arrival_of_the_sum(workers, ports, blocks), rel=1e-12)


@pytest.mark.parametrize("time", [scaling.double_tree_time, scaling.in_network_time])
@pytest.mark.parametrize("size", [0, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("workers", [2, 3, 64, 1000])
def test_no_number_of_blocks_is_better_than_the_best(time: Any, size: float, workers: int) -> None:
    some = [time(size, workers=workers, blocks=k, **LINK) for k in (*range(1, 100), *range(100, 2000, 20))]
    best = time(size, workers=workers, **LINK)
    assert best <= min(some) * (1 + 1e-12)
    assert best == pytest.approx(min(some), rel=0.01)  # whole numbers come that close


@pytest.mark.parametrize(
    ("time", "latencies", "vectors"), [(scaling.double_tree_time, 4 * 10, 2), (scaling.in_network_time, 2 * 2, 1)]
)
def test_pipelines_cost_a_few_latencies_and_the_bytes(time: Any, latencies: int, vectors: int) -> None:
    """A thousand workers: 10 levels of a binary tree, 2 of switches with 32 ports."""
    assert time(1e9, workers=1, **LINK) == 0
    assert time(0, workers=1000, **LINK) == pytest.approx(latencies * LINK["latency"])
    assert time(1e14, workers=1000, **LINK) == pytest.approx(vectors * 1e14 / LINK["bandwidth"], rel=0.01)
    assert time(1e9, 1e9, 0.0, 1000) == pytest.approx(vectors)


def test_switches_halve_the_time_of_a_large_ring_and_two_trees_that_of_a_long_one() -> None:
    ring, trees, switches = (
        scaling.ring_time(1e12, workers=512, **LINK),
        scaling.double_tree_time(1e12, workers=512, **LINK),
        scaling.in_network_time(1e12, workers=512, **LINK),
    )
    assert switches / ring == pytest.approx(0.5, rel=0.01)
    assert trees / ring == pytest.approx(1, rel=0.01)
    long = {"workers": 10_000, **LINK}
    assert scaling.double_tree_time(1e8, **long) < scaling.ring_time(1e8, **long) / 2
    few, many = (scaling.double_tree_time(0, workers=n, **LINK) for n in (1000, 1000**2))
    assert many == pytest.approx(2 * few)  # the square of the workers: twice the levels


def test_ring_beats_tree_for_large_messages_and_loses_for_small_ones() -> None:
    assert scaling.ring_time(1e9, workers=64, **LINK) < scaling.tree_time(1e9, workers=64, **LINK)
    assert scaling.ring_time(1e3, workers=64, **LINK) > scaling.tree_time(1e3, workers=64, **LINK)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 8), (2, 4), (16, 8)])
def test_two_levels_move_as_many_bytes_as_one_ring(nodes: int, per_node: int) -> None:
    """2 (p-1)/p + 2 (m-1)/(m p) = 2 (N-1)/N: with one kind of link and no latency both take the same time."""
    free = {"bandwidth": 1e9, "latency": 0.0}
    two_level = scaling.hierarchical_time(
        5e7, workers=nodes * per_node, per_node=per_node, node_bandwidth=1e9, node_latency=0.0, **free
    )
    assert two_level == pytest.approx(scaling.ring_time(5e7, workers=nodes * per_node, **free), rel=1e-12)


def test_two_levels_save_rounds_between_nodes() -> None:
    fast = {"node_bandwidth": 1e11, "node_latency": 0.0}
    found = scaling.hierarchical_time(0, workers=64, per_node=8, **fast, **LINK)
    assert found == pytest.approx(2 * 7 * LINK["latency"])
    assert scaling.hierarchical_time(1e6, workers=4, per_node=8, **fast, **LINK) == scaling.ring_time(1e6, 1e11, 0.0, 4)
    with pytest.raises(ValueError, match="workers=12"):
        scaling.hierarchical_time(1e6, workers=12, per_node=8, **fast, **LINK)


def test_the_wire_carries_one_bucket_at_a_time() -> None:
    """Forward pass 1 s, backward pass 2 s, four buckets of 0.8 s: ready at 1.5, 2, 2.5, 3."""
    transfers = scaling.overlap_timeline(3.0, [0.8] * 4)
    assert [t.ready for t in transfers] == pytest.approx([1.5, 2.0, 2.5, 3.0])
    assert [t.start for t in transfers] == pytest.approx([1.5, 2.3, 3.1, 3.9])
    assert [t.end for t in transfers] == pytest.approx([2.3, 3.1, 3.9, 4.7])
    waits = scaling.overlap_timeline(3.0, [0.1, 0.1])  # a wire that is idle waits for the bucket
    assert [(t.start, t.end) for t in waits] == [pytest.approx((2.0, 2.1)), pytest.approx((3.0, 3.1))]


def test_the_step_without_overlap_is_the_sum_and_with_overlap_less() -> None:
    counts = [1, 2, 8, 64]
    apart = scaling.simulate_scaling(0.1, 1e8, 1e9, 1e-5, counts)
    assert list(apart.index) == counts
    assert apart["communication"].tolist() == pytest.approx([scaling.ring_time(1e8, 1e9, 1e-5, n) for n in counts])
    assert apart["step"].tolist() == pytest.approx((0.1 + apart["communication"]).tolist())
    assert apart["efficiency"].tolist() == pytest.approx((0.1 / apart["step"]).tolist())
    assert apart["speedup"].tolist() == pytest.approx((np.array(counts) * 0.1 / apart["step"]).tolist())
    overlapped = scaling.simulate_scaling(0.1, 1e8, 1e9, 1e-5, counts, buckets=10)
    assert (overlapped["step"] <= apart["step"]).all()
    assert (overlapped["step"] >= overlapped[["compute", "communication"]].max(axis=1)).all()
    assert overlapped["exposed"].tolist() == pytest.approx((overlapped["step"] - overlapped["compute"]).tolist())
    assert overlapped.loc[8, "exposed"] < 0.8 * apart.loc[8, "exposed"]
    many = scaling.simulate_scaling(0.1, 1e8, 1e9, 1e-3, counts, buckets=100)  # each bucket pays latency
    assert many.loc[64, "step"] > scaling.simulate_scaling(0.1, 1e8, 1e9, 1e-3, counts).loc[64, "step"]


def test_one_worker_scales_perfectly_and_an_endless_wire_too() -> None:
    for kind in ("weak", "strong"):
        table = scaling.simulate_scaling(0.1, 1e8, math.inf, 0.0, [1, 7], scaling=kind)
        assert table["efficiency"].tolist() == pytest.approx([1.0, 1.0])
    strong = scaling.simulate_scaling(0.1, 1e8, 1e9, 0.0, [1, 4], scaling="strong")
    assert strong.loc[4, "step"] == pytest.approx(0.025 + 0.15)
    assert strong.loc[4, "speedup"] == pytest.approx(0.1 / 0.175)
    tree = scaling.simulate_scaling(0.1, 1e8, 1e9, 0.0, [4], algorithm=scaling.tree_time)
    assert tree.loc[4, "communication"] == pytest.approx(0.4)


@pytest.mark.parametrize(("workers", "largest"), [(1, 0.0), (2, math.pi**-0.5), (3, 1.5 * math.pi**-0.5)])
def test_the_slowest_of_a_few_is_as_slow_as_the_textbook_says(workers: int, largest: float) -> None:
    assert scaling.straggler_factor(workers, 0.2) == pytest.approx(1 + 0.2 * largest, rel=1e-9)


def test_the_slowest_of_many_is_as_slow_as_drawn() -> None:
    drawn = np.random.default_rng(0).normal(1.0, 0.1, (20_000, 256)).max(axis=1).mean()
    assert scaling.straggler_factor(256, 0.1) == pytest.approx(drawn, abs=0.002)
    table = scaling.simulate_scaling(0.1, 0, 1e9, 0.0, [256], spread=0.1)
    assert table.loc[256, "efficiency"] == pytest.approx(1 / drawn, abs=0.002)


def test_amdahl_and_gustafson_are_one_law_seen_from_both_ends() -> None:
    """A share s of the parallel run is a share s / (s + (1 - s) N) of the same work done by one."""
    workers = np.array([1, 4, 1000])
    for s in (0.0, 0.05, 1.0):
        serial = s / (s + (1 - s) * workers)
        expected = [scaling.amdahl(float(one), int(n)) for one, n in zip(serial, workers, strict=True)]
        assert scaling.gustafson(s, workers).tolist() == pytest.approx(expected)
    assert scaling.amdahl(0.05, 10**9) == pytest.approx(20, rel=1e-6)
    assert scaling.amdahl(0.1, 10) == pytest.approx(1 / 0.19)


def test_a_link_is_found_again_from_its_times() -> None:
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    for workers in (2, 5):
        exact = [scaling.ring_time(size, 2e9, 3e-5, workers) for size in sizes]
        link = scaling.fit_link(sizes, exact, workers)
        assert (link.latency, link.bandwidth) == (pytest.approx(3e-5), pytest.approx(2e9))
    noise = np.random.default_rng(1).uniform(0.9, 1.1, 5)
    link = scaling.fit_link(
        sizes, [scaling.ring_time(size, 2e9, 3e-5, 2) * e for size, e in zip(sizes, noise, strict=True)]
    )
    assert link.latency == pytest.approx(3e-5, rel=0.15)  # plain least squares would be off by a factor of 3
    assert link.bandwidth == pytest.approx(2e9, rel=0.15)
    assert scaling.fit_link([1e6, 2e6], [1e-3, 3e-3]).latency == 0  # a line with a negative start


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: scaling.ring_time(-1, 1e9, 0, 2), "size"),
        (lambda: scaling.ring_time(1, 0, 0, 2), "bandwidth"),
        (lambda: scaling.tree_time(1, 1e9, -1, 2), "latency"),
        (lambda: scaling.tree_time(1, 1e9, 0, 0), "workers"),
        (lambda: scaling.double_tree_time(1, 1e9, 0, 8, blocks=0), "blocks=0"),
        (lambda: scaling.double_tree_time(1, 1e9, 0, 1.5), "workers=1.5"),  # type: ignore[arg-type]
        (lambda: scaling.in_network_time(1, 1e9, 0, 8, ports=1), "ports=1"),
        (lambda: scaling.in_network_time(1, 1e9, 0, 8, blocks=-2), "blocks=-2"),
        (lambda: scaling.in_network_time(1, 0, 0, 8), "bandwidth"),
        (lambda: scaling.hierarchical_time(1, 1e9, 0, 8, per_node=0, node_bandwidth=1, node_latency=0), "per_node"),
        (lambda: scaling.simulate_scaling(0, 1, 1, 0, [1]), "compute_time"),
        (lambda: scaling.simulate_scaling(1, 1, 1, 0, [1], buckets=0), "buckets"),
        (lambda: scaling.simulate_scaling(1, 1, 1, 0, [1], scaling="both"), "scaling"),  # type: ignore[arg-type]
        (lambda: scaling.simulate_scaling(1, 1, 1, 0, [1], spread=-1), "spread"),
        (lambda: scaling.simulate_scaling(1, 1, 1, 0, [1], backward_share=2), "backward_share"),
        (lambda: scaling.amdahl(1.2, 4), "serial_fraction"),
        (lambda: scaling.gustafson(-0.1, 4), "serial_fraction"),
        (lambda: scaling.fit_link([1, 1], [1, 2]), "sizes"),
        (lambda: scaling.fit_link([1, 2], [1, -2]), "seconds"),
        (lambda: scaling.fit_link([1e6, 1e7], [1.0, 1e-3]), "seconds"),
        (lambda: scaling.fit_link([1, 2], [1, 2], workers=1), "workers"),
    ],
)
def test_bad_figures_are_named(call: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()


def test_measured_steps_have_the_figures_that_a_prediction_needs() -> None:
    for rows in launch(scaling.measure_step, 2, (8, 16), repeats=2, timeout=120):
        assert [row["width"] for row in rows] == [8, 16]
        for row in rows:
            assert row["bytes"] == 4 * mlp((1, 16, 16), 10, width=int(row["width"])).parameter_count
            assert all(0 < row[name] < math.inf for name in ("compute", "communication", "step"))


# --- Input pipeline ---------------------------------------------------------------------------------------------------


def test_rotation_turns_and_keeps(digits: Dataset) -> None:
    x = digits.train.images[:6].double()
    same = input_pipeline.rotated(x, torch.zeros(6).double(), 8)
    quarter = input_pipeline.rotated(x, torch.full((6,), math.pi / 2, dtype=torch.float64), 8)
    assert torch.allclose(same, x, atol=1e-9)
    assert torch.allclose(quarter, torch.rot90(x, 1, dims=(2, 3)), atol=1e-9)
    first, again, other = (
        input_pipeline.random_rotation(x, torch.Generator().manual_seed(seed), pixels=12) for seed in (0, 0, 1)
    )
    assert first.shape == (6, 1, 12, 12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loading_is_measured_for_each_number_of_workers(digits: Dataset) -> None:
    table = input_pipeline.measure_loading(digits.val, (0, 1), batch_size=50, pixels=16)
    assert list(table.index) == ["one by one, 0 workers", "one by one, 1 workers", "whole batches"]
    assert np.isfinite(table.to_numpy()).all()
    assert (table.to_numpy() > 0).all()
    assert not multiprocessing.active_children()
    one_by_one = input_pipeline.OneByOne(digits.val, 16)
    assert len(one_by_one) == len(digits.val)
    assert one_by_one[3][0].shape == (1, 16, 16)
    assert one_by_one[3][1] == digits.val.labels[3]


def test_the_number_of_threads_is_given_back() -> None:
    before = torch.get_num_threads()
    order = (1, 2) if before == 1 else (2, 1)
    table = input_pipeline.measure_threads((8,), order, repeats=1)
    assert torch.get_num_threads() == before
    assert (list(table.index), tuple(table.columns)) == ([8], order)
    assert (table.to_numpy() > 0).all()
    with pytest.raises(RuntimeError):
        input_pipeline.measure_threads((8,), (order[1], 0), repeats=1)
    assert torch.get_num_threads() == before


def test_pinned_memory_needs_cuda() -> None:
    ratio = input_pipeline.measure_pinned(1)
    assert (ratio is not None) == torch.cuda.is_available()


# --- On a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("compress", [partial(top_k, k=30), less.sign_compress], ids=["top k", "sign"])
def test_a_gpu_does_the_same(digits: Dataset, compress: less.Compress) -> None:
    for policy in (less.every_step, partial(less.with_error_feedback, compress=compress)):
        model, _ = small()
        reference, _ = small()
        on_gpu = simulate_workers(model.to("cuda"), digits, policy, **RUN)
        on_cpu = simulate_workers(reference, digits, policy, **RUN)
        assert relative(flat(model).cpu(), flat(reference)) < 1e-9
        assert on_gpu.wire_bytes == on_cpu.wire_bytes
    delayed, reference = small()[0].to("cuda"), small()[0]
    asynchronous.stale_gradients(delayed, digits, delay=2, **RUN)
    asynchronous.stale_gradients(reference, digits, delay=2, **RUN)
    assert relative(flat(delayed).cpu(), flat(reference)) < 1e-9


@pytest.mark.gpu(emulated=False)
def test_pinned_memory_is_not_slower() -> None:
    ratio = input_pipeline.measure_pinned(16)
    assert ratio is not None
    assert ratio > 0.5
