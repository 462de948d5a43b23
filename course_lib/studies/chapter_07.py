"""Chapter 7's study: what workers may leave unsaid, and what a second process is worth.

One run at a time. "messages": eight workers, simulated in one process of one thread, share batches of 160 images of
MNIST for three epochs (float32, no momentum, a perceptron of two layers of 64 units); each way at the best of three
rates, found on the validation images with a seed of its own. The bytes are those of a ring. "transformer" and
"perceptron": the same batches for one process of one thread, for one of two threads, and for two processes of one
thread each, which share every batch; Adam, float32. The transformer has few weights and batches of 256 images, the
perceptron many weights and batches of 32. Two processes with "nothing said" never average: their time is that of
computing alone. The time of a step is a mean over all steps but the first three; bytes are of the fuller process, and
the buffers of messages are not counted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.data import Dataset, batches
from course_lib.lab.experiments import one_thread
from course_lib.lab.models import mlp, vit
from course_lib.lab.studies import Arm, Part, Study, Tuned
from course_lib.lab.training import Recipe, evaluate, fresh
from course_lib.parallel.communicating_less import (
    Outcome,
    Policy,
    accumulate,
    compressed,
    every_step,
    local_sgd,
    sign_compress,
    simulate_workers,
    top_fraction,
    with_error_feedback,
)
from course_lib.parallel.data_parallel import local_loss, shard
from course_lib.parallel.data_parallel_runs import (
    Gradient,
    alone,
    one_by_one,
    overlapped,
    torch_ddp,
)
from course_lib.parallel.sharding import ShardedOptimizer, local_bytes, reduce_to_owners
from course_lib.studies import mnist

SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
MB = 1e6


@lru_cache(maxsize=1)
def some() -> Dataset:
    """MNIST with 10,000 images to train on."""
    return mnist(10_000)


# --- What need not be said --------------------------------------------------------------------------------------------

WORKERS, BATCH, EPOCHS, RATES = 8, 160, 3, (0.1, 0.3, 1.0)
TOP = partial(top_fraction, fraction=0.01)
POLICIES: dict[str, Policy] = {
    "every step": every_step,
    "accumulate 16 steps": partial(accumulate, steps=16),
    "local SGD, 16 steps": partial(local_sgd, steps=16),
    "local SGD, 64 steps": partial(local_sgd, steps=64),
    "top 1%, rest lost": partial(compressed, compress=TOP),
    "top 1%, feedback": partial(with_error_feedback, compress=TOP),
    "sign, rest lost": partial(compressed, compress=sign_compress),
    "sign, feedback": partial(with_error_feedback, compress=sign_compress),
}


def small(data: Dataset) -> nn.Module:
    """Two hidden layers of 64 units."""
    return mlp(data.input_shape, len(data.classes), width=64)


def shared_by_eight(data: Dataset, policy: Policy, lr: float, seed: int) -> tuple[nn.Module, Outcome]:
    """Eight simulated workers under a policy."""
    model = fresh(partial(small, data), Recipe(), seed=seed)
    found = simulate_workers(
        model, data, policy, workers=WORKERS, epochs=EPOCHS, batch_size=BATCH, lr=lr, momentum=0.0, seed=seed
    )
    return model, found


def said(data: Dataset, seed: int, *, policy: Policy, lr: float) -> dict[str, float | list[float]]:
    """What a policy reaches at a rate, and what it sends."""
    with one_thread():
        model, found = shared_by_eight(data, policy, lr, seed)
        return {
            "test accuracy": evaluate(model, data.test).accuracy,
            "kB sent a worker": found.wire_bytes / 1e3,
            "exchanges": float(found.rounds),
            "val_accuracy": found.val_accuracy,
            "rate": lr,
            "validation accuracy after each epoch": list(found.curve),
        }


def messages() -> dict[str, Tuned]:
    """Each policy, at the best of the rates."""
    return {
        name: Tuned({f"rate {lr:g}": partial(said, policy=policy, lr=lr) for lr in RATES}, (TUNING_SEED,))
        for name, policy in POLICIES.items()
    }


# --- What a second process is worth -----------------------------------------------------------------------------------

WARM_UP, LAST, LR = 3, 5, 1e-3
Ready = tuple[Optimizer, Gradient]
"""What a way makes of a network: who moves the weights, and who finds the gradient of a batch."""


def averaged(model: nn.Module, method: Callable[[nn.Module], Gradient]) -> Ready:
    """Adam, whole in every process."""
    return torch.optim.Adam(model.parameters(), lr=LR), method(model)


def sharded_state(model: nn.Module) -> Ready:
    """Stage 1 of ZeRO: each process moves its own share of the parameters."""
    return ShardedOptimizer(model.parameters(), torch.optim.Adam, lr=LR), overlapped(model)


def sharded_gradients(model: nn.Module) -> Ready:
    """Stage 2: … and keeps the gradients of that share."""
    optimizer, local = ShardedOptimizer(model.parameters(), torch.optim.Adam, lr=LR), alone(model)

    def gradient(x: Tensor, y: Tensor, total: int) -> Tensor:
        loss = local(x, y, total)
        reduce_to_owners(optimizer, share=1.0)
        return loss

    return optimizer, gradient


def sharded_weights(model: nn.Module) -> Ready:
    """Stage 3: … and its half of the weights, by torch's ``fully_shard``, one linear layer at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes as long to import as the rest of torch

    mesh = init_device_mesh("cpu", (2,))
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def gradient(x: Tensor, y: Tensor, total: int) -> Tensor:
        loss = local_loss(model, x, y, total)
        (2 * loss).backward()  # it takes the mean over processes
        return loss

    return torch.optim.Adam(model.parameters(), lr=LR), gradient


@dataclass(frozen=True)
class Way:
    """Processes, the threads of each, and how they find and apply a gradient."""

    processes: int
    threads: int
    ready: Callable[[nn.Module], Ready]


ONE, TWO = "one process", "two processes"
WAYS = {
    f"{ONE}, one thread": Way(1, 1, partial(averaged, method=alone)),
    f"{ONE}, two threads": Way(1, 2, partial(averaged, method=alone)),
    f"{TWO}, nothing said": Way(2, 1, partial(averaged, method=alone)),
    f"{TWO}, a message a parameter": Way(2, 1, partial(averaged, method=one_by_one)),
    f"{TWO}, buckets during backward": Way(2, 1, partial(averaged, method=overlapped)),
    f"{TWO}, torch's DDP": Way(2, 1, partial(averaged, method=torch_ddp)),
}
SHARDED = {
    f"{TWO}, ZeRO stage 1": Way(2, 1, sharded_state),
    f"{TWO}, ZeRO stage 2": Way(2, 1, sharded_gradients),
    f"{TWO}, ZeRO stage 3": Way(2, 1, sharded_weights),
}


@dataclass(frozen=True)
class Job:
    """A network and the batches that train it."""

    network: Callable[[Dataset], nn.Module]
    batch_size: int
    steps: int


def transformer(data: Dataset) -> nn.Module:
    """Four blocks of 64 units on 16 patches."""
    return vit(data.input_shape, len(data.classes), patch=7, width=64, depth=4)


def perceptron(data: Dataset) -> nn.Module:
    """Two hidden layers of 1,536 units."""
    return mlp(data.input_shape, len(data.classes), width=1536)


def train(way: Way, job: Job, data: Dataset, seed: int) -> dict[str, Any]:
    """Train as one of the processes of ``launch``."""
    # In the function: how processes are started is no part of what a run depends on
    from course_lib.parallel.launching import process_group

    with process_group() as world:
        return _train(way, job, data, seed, world.rank, world.size)


def _train(way: Way, job: Job, data: Dataset, seed: int, rank: int, size: int) -> dict[str, Any]:
    # A function of its own, so that DistributedDataParallel goes before the group does
    model = fresh(partial(job.network, data), Recipe(), seed=seed)
    optimizer, gradient = way.ready(model)
    order, losses, started = torch.Generator().manual_seed(seed), [], 0.0
    coming = batches(data.train, job.batch_size, generator=order)
    for step, (x, y) in enumerate(islice(coming, job.steps)):
        if step == WARM_UP:
            dist.barrier()
            started = time.perf_counter()
        optimizer.zero_grad()
        losses.append(gradient(*shard(x, y, rank, size), len(y)).detach())
        optimizer.step()
    dist.barrier()
    seconds = (time.perf_counter() - started) / (job.steps - WARM_UP)
    state, weights = local_bytes(optimizer.state), list(model.parameters())
    held = state + local_bytes(weights) + local_bytes([p.grad for p in weights])
    return {"seconds": seconds, "state": state, "held": held, "losses": torch.stack(losses)}


def raced(way: Way, job: Job, data: Dataset, seed: int) -> dict[str, float]:
    """Train in new processes; what the slower or fuller of them takes."""
    from course_lib.parallel.launching import launch

    ranks = launch(train, way.processes, way, job, data, seed, threads=way.threads, timeout=300.0)
    losses = torch.stack([rank["losses"] for rank in ranks]).sum(0)  # each has its share of a batch's loss
    return {
        "ms a step": 1e3 * max(rank["seconds"] for rank in ranks),
        "training loss at the end": losses[-LAST:].mean().item(),
        "MB of optimizer state": max(rank["state"] for rank in ranks) / MB,
        "MB of weights, gradients and state": max(rank["held"] for rank in ranks) / MB,
    }


def race(job: Job, ways: dict[str, Way]) -> dict[str, Arm]:
    """An arm a way."""
    return {name: partial(raced, way, job) for name, way in ways.items()}


STUDY = Study(
    "07",
    "What can workers leave unsaid, and what is a second process worth?",
    {
        "messages": Part(
            "MNIST, eight workers: accuracy for what they send",
            some,
            messages(),
            SEEDS,
        ),
        "transformer": Part(
            "MNIST, a small transformer in one process and in two",
            some,
            race(Job(transformer, batch_size=256, steps=15), WAYS),
            SEEDS,
        ),
        "perceptron": Part(
            "MNIST, a wide perceptron in one process and in two",
            some,
            race(Job(perceptron, batch_size=32, steps=18), WAYS | SHARDED),
            SEEDS,
        ),
    },
    alone=True,
)
