"""Data-parallel training runs, by each way to average gradients, to be compared with one process alone.

========================  ============================================================================================
name                      how the gradient of the whole batch comes about
========================  ============================================================================================
``alone``                 one process has the whole batch
``one_by_one``            ``average_gradients``: one message for each parameter
``in_buckets``            ``average_in_buckets``: a few large messages after backward
``overlapped``            ``BucketedAverage``: the same messages during backward
``torch_ddp``             torch's ``DistributedDataParallel`` (Li et al. 2020, arXiv:2006.15704), shares weighed
``torch_ddp_unweighted``  the same with the mean of means: wrong where shares are uneven
========================  ============================================================================================

``train_data_parallel`` trains by one of them, ``train_alone`` without any; ``measure_overlap`` times them. What one
process would do is the measure of all: up to rounding, the weights must be the same.

>>> launch(train_data_parallel, 2, "resnet", overlapped)[0].weights
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from course_lib.lab import models
from course_lib.lab.data import Split, batches, load
from course_lib.lab.training import Recipe, cross_entropy, evaluate, fresh
from course_lib.parallel.batch_norm import synchronize_batchnorm
from course_lib.parallel.data_parallel import (
    MIB,
    BucketedAverage,
    average_gradients,
    average_in_buckets,
    local_loss,
    make_buckets,
    shard,
)
from course_lib.parallel.launching import World, process_group

# --- Ways to get the gradient of a batch that is spread over the ranks ------------------------------------------------

Gradient = Callable[[Tensor, Tensor, int], Tensor]
"""``(x, y, total) -> loss``: leave the whole batch's gradient in ``.grad``; return this rank's part of the loss."""

Method = Callable[[nn.Module], Gradient]
"""A way to find gradients, made ready for one model."""


def alone(model: nn.Module) -> Gradient:
    """One process with the whole batch: what all others must agree with."""

    def gradient(x: Tensor, y: Tensor, total: int) -> Tensor:
        loss = local_loss(model, x, y, total)
        loss.backward()
        return loss.detach()

    return gradient


def one_by_one(model: nn.Module) -> Gradient:
    """Backward, then one message for each parameter."""
    local = alone(model)

    def gradient(x: Tensor, y: Tensor, total: int) -> Tensor:
        loss = local(x, y, total)
        average_gradients(model, share=1.0)
        return loss

    return gradient


def in_buckets(model: nn.Module, bucket_bytes: int = 25 * MIB) -> Gradient:
    """Backward, then one message for each bucket."""
    local, buckets = alone(model), make_buckets(model, bucket_bytes)

    def gradient(x: Tensor, y: Tensor, total: int) -> Tensor:
        loss = local(x, y, total)
        average_in_buckets(buckets, share=1.0)
        return loss

    return gradient


def overlapped(model: nn.Module, bucket_bytes: int = 25 * MIB) -> Gradient:
    """Messages on their way while backward computes."""
    local, average = alone(model), BucketedAverage(model, bucket_bytes, share=1.0)

    def gradient(x: Tensor, y: Tensor, total: int) -> Tensor:
        loss = local(x, y, total)
        average.wait()
        return loss

    return gradient


def torch_ddp(model: nn.Module, bucket_bytes: int = 25 * MIB) -> Gradient:
    """Use torch's own ``DistributedDataParallel``. It takes the mean over ranks, so the weighed loss is scaled up."""
    replica = DistributedDataParallel(model, bucket_cap_mb=bucket_bytes / MIB)

    def gradient(x: Tensor, y: Tensor, total: int) -> Tensor:
        loss = local_loss(replica, x, y, total)
        (loss * dist.get_world_size()).backward()
        return loss.detach()

    return gradient


def torch_ddp_unweighted(model: nn.Module) -> Gradient:
    """Take the mean of the ranks' means, as most scripts do: **wrong** where shares differ, NaN where one is empty."""
    replica = DistributedDataParallel(model)

    def gradient(x: Tensor, y: Tensor, total: int) -> Tensor:
        loss = cross_entropy(replica, x, y)
        loss.backward()
        return loss.detach() / dist.get_world_size()

    return gradient


# --- Training runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run leaves behind: the state of the model, the batches' losses, and the accuracy on the val split."""

    weights: dict[str, Tensor]
    losses: list[float]
    val_accuracy: float


def train_alone(network: str = "mlp", **settings: Any) -> Run:
    """Train on whole batches in this process. Settings as in `train_data_parallel`."""
    return _train(network, alone, 0, 1, torch.device("cpu"), **settings)


def train_data_parallel(
    network: str = "mlp",
    method: Method = overlapped,
    *,
    synchronized: bool = True,
    **settings: Any,
) -> Run:
    """Train one replica of many, in float64 on the digits; to be run by ``launch``. All ranks return the same.

    Parameters
    ----------
    network : ``"mlp"``, ``"convnet"`` or ``"resnet"`` of the laboratory.
    method : how the batch's gradient is found: `one_by_one`, `in_buckets`, `overlapped`, `torch_ddp`, …
    synchronized : batch norm over the batch of all ranks; else each normalises by its own share.
    settings : ``steps`` (20), ``batch_size`` of all ranks together (61, so that shares are uneven), ``examples`` of the
        training split that are used (249, so that the last batch of an epoch has 5), ``lr``, ``momentum``, ``seed``.
    """
    with process_group() as world:
        convert = synchronize_batchnorm if synchronized else None
        return _train(network, method, world.rank, world.size, world.device, convert=convert, **settings)


def _train(
    network: str,
    method: Method,
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    convert: Callable[[nn.Module], nn.Module] | None = None,
    steps: int = 20,
    batch_size: int = 61,
    examples: int = 249,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 0,
) -> Run:
    data = load("digits").to(device)
    model = replica(network, data.input_shape, len(data.classes), seed=seed).to(device)
    model = convert(model) if convert else model
    gradient = method(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    losses = torch.zeros(steps, dtype=torch.float64, device=device)
    some = data.train.subset(torch.arange(examples))
    for step, (x, y) in enumerate(itertools.islice(endless_batches(some, batch_size, seed), steps)):
        # Every rank draws the whole batch and keeps its share: no rank has to tell another which examples are its own.
        optimizer.zero_grad()
        losses[step] = gradient(*shard(x, y, rank, world_size), len(y))
        optimizer.step()
    if world_size > 1:
        dist.all_reduce(losses)
    weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    return Run(weights, losses.tolist(), evaluate(model, data.val).accuracy)


def replica(network: str, input_shape: Sequence[int], classes: int, *, seed: int) -> nn.Module:
    """Build the same float64 network on every rank, from the same seed.

    Raises
    ------
    ValueError : ``network`` is none of the laboratory's.
    """
    if network not in ("mlp", "convnet", "resnet", "vit"):
        raise ValueError(f"network is {network!r}; it must be 'mlp', 'convnet', 'resnet' or 'vit'")
    build = partial(getattr(models, network), input_shape, classes)
    return fresh(build, Recipe(precision="float64"), seed=seed)


def endless_batches(split: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in float64, epoch after epoch, each in an order of its own; the last of an epoch may be smaller."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(split, batch_size, generator=order, dtype=torch.float64)


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest relative difference of two models' weights, tensor by tensor: ``||a - b|| / ||b||``."""
    if a.keys() != b.keys():
        raise ValueError(f"a and b differ in their tensors: {sorted(a.keys() ^ b.keys())} are in one of them only")
    tiny = torch.finfo(torch.float64).tiny
    apart = [(a[n].double() - b[n].double()).norm() / b[n].double().norm().clamp(min=tiny) for n in b]
    return float(torch.stack(apart).max())


def measure_overlap(
    *,
    width: int = 1024,
    depth: int = 4,
    batch_size: int = 256,
    bucket_bytes: int = 4 * MIB,
    rounds: int = 10,
    warmup: int = 3,
) -> dict[str, float]:
    """Seconds of one gradient (forward, backward, exchange) by each method; to be run by ``launch``.

    A float32 perceptron of ``depth`` layers of ``width`` units sees ``batch_size`` examples a rank. The methods take
    turns, so that all meet the same machine; the figures are medians over ``rounds``.
    """
    methods: dict[str, Method] = {
        "alone": alone,
        "one by one": one_by_one,
        "in buckets": partial(in_buckets, bucket_bytes=bucket_bytes),
        "overlapped": partial(overlapped, bucket_bytes=bucket_bytes),
        "DistributedDataParallel": partial(torch_ddp, bucket_bytes=bucket_bytes),
    }
    with process_group() as world:
        # In a function of its own, so that DistributedDataParallel goes before the group does. Otherwise its end ends
        # gloo's threads: it waits for them while it holds Python's lock, which they need to end. A deadlock, at times.
        return _take_turns(methods, world, width, depth, batch_size, rounds, warmup)


def _take_turns(
    methods: dict[str, Method], world: World, width: int, depth: int, batch_size: int, rounds: int, warmup: int
) -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(batch_size, 1, 8, 8, device=world.device)
    y = torch.randint(10, (batch_size,), device=world.device)
    networks = {name: models.mlp((1, 8, 8), 10, width=width, depth=depth).to(world.device) for name in methods}
    gradients = {name: method(networks[name]) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn, (name, gradient) in itertools.product(range(-warmup, rounds), gradients.items()):
        networks[name].zero_grad()
        dist.barrier()
        started = time.perf_counter()
        loss = gradient(x, y, batch_size * world.size)
        loss.item()  # a GPU has only queued the work until somebody looks
        if turn >= 0:
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}
