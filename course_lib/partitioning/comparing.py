"""One network, one batch, two or more processes: which way to share the work sends least, and which is fastest.

``measure_partitions`` runs a step by each way, ``predict_partitions`` says beforehand what it will send and how long it
will take, from one process's time and the link between them (chapter 7's ``fit_link``).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from course_lib.lab.arguments import at_least, require
from course_lib.lab.models import ViT, vit
from course_lib.lab.training import cross_entropy
from course_lib.parallel.collectives import ring_bytes, traffic
from course_lib.parallel.data_parallel import local_loss, shard
from course_lib.parallel.launching import World, process_group
from course_lib.parallel.scaling import Link, ring_time
from course_lib.partitioning.collectives import all_reduce, communication
from course_lib.partitioning.pipeline import Pipeline
from course_lib.partitioning.pipelined_runs import even_stages
from course_lib.partitioning.planning import predict_pipeline
from course_lib.partitioning.schedules import one_f_one_b
from course_lib.partitioning.tensor_parallel import (
    layer_bytes,
    tensor_parallel,
)

FLOAT = 4  # bytes of a float32 number


@dataclass(frozen=True)
class Job:
    """A ``vit`` and the batch of one step, in float32.

    Attributes
    ----------
    batch : images of ``side`` x ``side`` pixels, cut into patches of 4 x 4.
    width, depth, heads : of the network.
    micro_batches : of the pipeline.
    """

    batch: int
    width: int
    depth: int = 4
    heads: int = 4
    side: int = 16
    micro_batches: int = 4

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, width=self.width, depth=self.depth, heads=self.heads)
        at_least(1, micro_batches=self.micro_batches)
        require("side", self.side, lambda n: n > 0 and n % 4 == 0, "a multiple of 4")

    def network(self) -> ViT:
        """The network, the same on all ranks."""
        torch.manual_seed(0)
        return vit((1, self.side, self.side), 10, patch=4, width=self.width, depth=self.depth, heads=self.heads)

    @property
    def tokens(self) -> int:
        """Of one image."""
        return (self.side // 4) ** 2

    @property
    def parameters(self) -> int:
        """Of the network, without building it."""
        h, ends = self.width, 17 * self.width + self.tokens * self.width + 10 * (self.width + 1)
        return self.depth * (12 * h * h + 13 * h) + ends + 2 * h


# --- Measured ---------------------------------------------------------------------------------------------------------

Step = Callable[[], Any]


def measure_partitions(jobs: Iterable[Job], *, repeats: int = 5) -> list[dict[str, Any]]:
    """Seconds and sent bytes of one gradient, by one process and by each way to share it; to be run by ``launch``.

    One row a job and way, ``alone``, ``data``, ``tensor`` and ``pipeline``: ``seconds`` until all ranks are done, a
    median over ``repeats`` in which the ways take turns, and ``sent``, the bytes that rank 0 gave to the others (on a
    ring, where they talk all at once).
    """
    with process_group() as world:
        return [row for number, job in enumerate(jobs) for row in _measured(number, job, world, repeats)]


def _measured(number: int, job: Job, world: World, repeats: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(job.batch, 1, job.side, job.side, generator=generator).to(world.device)
    y = torch.randint(10, (job.batch,), generator=generator).to(world.device)
    ways = {name: make(job, x, y, world) for name, make in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sent: dict[str, int] = {}
    for turn, (name, step) in itertools.product(range(repeats + 1), ways.items()):
        dist.barrier()
        started = time.perf_counter()
        with traffic() as messages, communication() as collectives:
            step()
        dist.barrier()
        if turn:  # the first opens connections, and allocates
            seconds[name].append(time.perf_counter() - started)
        sent[name] = messages.bytes_sent + collectives.total
    return [
        {"job": number, "way": name, "seconds": statistics.median(times), "sent": sent[name]}
        for name, times in seconds.items()
    ]


def _alone(job: Job, x: Tensor, y: Tensor, world: World) -> Step:
    """Rank 0 computes all of it, the others wait."""
    model = job.network().to(world.device)
    return lambda: _gradient(model, x, y) if world.rank == 0 else None


def _data(job: Job, x: Tensor, y: Tensor, world: World) -> Step:
    model = job.network().to(world.device)
    own = shard(x, y, world.rank, world.size)

    def step() -> None:
        model.zero_grad()
        local_loss(model, *own, len(y)).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        vector_to_parameters(all_reduce(parameters_to_vector(gradients), None), gradients)  # one message, counted

    return step


def _tensor(job: Job, x: Tensor, y: Tensor, world: World) -> Step:
    model = tensor_parallel(job.network().to(world.device))
    return lambda: _gradient(model, x, y)


def _pipeline(job: Job, x: Tensor, y: Tensor, world: World) -> Step:
    stages = even_stages(job.network().to(world.device), world.size, x[:1])
    pipeline = Pipeline(stages, one_f_one_b(world.size, job.micro_batches), world, x[:1])

    def step() -> None:
        for p in pipeline.parameters():
            p.grad = None
        pipeline.step(x, y)

    return step


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    cross_entropy(model, x, y).backward()


WAYS = {"alone": _alone, "data": _data, "tensor": _tensor, "pipeline": _pipeline}

# --- Predicted --------------------------------------------------------------------------------------------------------


def predict_partitions(job: Job, alone: float, link: Link, ranks: int = 2) -> pd.DataFrame:
    r"""Predict ``seconds`` and ``sent`` bytes of a step by each way, from the ``alone`` seconds of one process.

    The work is taken to divide evenly. With :math:`P` parameters and :math:`T = bs` tokens of width h in L blocks,
    a rank sends on a ring

    .. math:: \text{data}\; 2\tfrac{N-1}{N}P, \qquad \text{tensor}\; 2\tfrac{N-1}{N}\,4LTh, \qquad
        \text{pipeline}\; Th

    numbers. As :math:`P\approx12Lh^2`, tensor parallelism sends less than data parallelism where :math:`T<3h`.
    """
    at_least(2, ranks=ranks)
    shape = (job.batch, job.tokens, job.width)
    edge = FLOAT * job.batch * job.tokens * job.width  # activations between two stages
    reduce = ring_time(edge, link.bandwidth, link.latency, ranks)
    micro = [alone / ranks / job.micro_batches] * ranks
    send = [2 * (link.latency + edge / job.micro_batches / link.bandwidth)] * (ranks - 1)
    rows = {
        "alone": (alone, 0.0),
        "data": (
            alone / ranks + ring_time(FLOAT * job.parameters, link.bandwidth, link.latency, ranks),
            ring_bytes(FLOAT * job.parameters, ranks),
        ),
        "tensor": (alone / ranks + 4 * job.depth * reduce, job.depth * layer_bytes(*shape, ranks)),
        "pipeline": (predict_pipeline(micro, send, job.micro_batches), float(edge)),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["seconds", "sent"]).rename_axis("way")
