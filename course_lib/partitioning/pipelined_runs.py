"""Pipelines that train, and what they cost: to be run by ``launch``, and compared with one process alone.

=========================  =============================================================================================
name                       what it does
=========================  =============================================================================================
``train_pipelined``        trains on the digits by any schedule; goes on from a checkpoint after a rank has died
``train_torch_pipelined``  the same by torch's own engine, ``torch.distributed.pipelining``
``train_in_pieces``        one process that accumulates gradients over the same micro-batches
``measure_schedule``       when each rank really did each task, with stages that wait instead of computing
``measure_pipeline``       seconds of a step of real layers over numbers of micro-batches
``measure_engines``        seconds of a step by ours and by torch's engine, in turns
``measure_held``           bytes of activations that each rank held, and those that the schedule says
=========================  =============================================================================================

>>> launch(train_pipelined, 2, "vit", one_f_one_b)[0].weights
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import load
from course_lib.lab.training import cross_entropy, evaluate
from course_lib.parallel.collectives import traffic
from course_lib.parallel.data_parallel import local_loss
from course_lib.parallel.data_parallel_runs import Run, endless_batches, replica
from course_lib.parallel.launching import World, process_group
from course_lib.partitioning.cutting import balanced_cuts, chain, flop_costs
from course_lib.partitioning.late_weights import Later, Product
from course_lib.partitioning.pipeline import Pipeline
from course_lib.partitioning.restarting import Restart
from course_lib.partitioning.saved import Saved
from course_lib.partitioning.schedules import Costs, Kind, Schedule, Span, Task, Timeline, in_flight, one_f_one_b

MakeSchedule = Callable[[int, int], Schedule]
"""``(ranks, micro_batches) -> Schedule``."""

# --- Stages out of a network ------------------------------------------------------------------------------------------


def even_stages(model: nn.Module, number: int, example: Tensor) -> list[nn.Module]:
    """Cut a network of the laboratory into so many stages of even arithmetic, each with its share of the weights.

    Raises
    ------
    ValueError : the network has fewer layers.
    """
    layers = [layer for _, layer in chain(model)]
    edges = [0, *balanced_cuts(flop_costs(layers, example), number), len(layers)]
    return [nn.Sequential(*layers[a:b]) for a, b in itertools.pairwise(edges)]


# --- Training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PipelinedRun(Run):
    """A run, and of this rank: the bytes of activations held at most, the bytes sent in all, where the run began."""

    held: int
    sent: int
    started_at: int


def train_pipelined(
    network: str = "vit",
    schedule: MakeSchedule = one_f_one_b,
    *,
    micro_batches: int = 4,
    steps: int = 20,
    batch_size: int = 61,
    examples: int = 249,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 5,
    kill_rank: int | None = None,
    kill_at: int = 0,
) -> PipelinedRun:
    """Train in float64 on the digits, each rank holding some stages; to be run by ``launch``.

    All ranks return the whole network's weights. With the defaults the last batch of an epoch has 5 examples, so its
    micro-batches have 2, 1, 1 and 1.

    Parameters
    ----------
    network : ``"mlp"``, ``"convnet"``, ``"resnet"`` or ``"vit"``.
    schedule : `gpipe`, `one_f_one_b`, … ; it says how many stages there are.
    checkpoint : a folder that all ranks can reach: each writes its stages there ``every`` so many steps. A run that
        finds one goes on from it, and ends with the same weights as if nothing had happened.
    kill_rank, kill_at : this rank kills itself before that step, counted from 0.
    """
    at_least(1, steps=steps, micro_batches=micro_batches)
    with process_group() as world:
        data = load("digits").to(world.device)
        model = replica(network, data.input_shape, len(data.classes), seed=seed).to(world.device)
        plan = schedule(world.size, micro_batches)
        example = torch.zeros(2, *data.input_shape, dtype=torch.float64, device=world.device)
        pipeline = Pipeline(even_stages(model, plan.stages, example), plan, world, example)
        own = {id(t) for stage in pipeline.stages.values() for t in stage.state_dict(keep_vars=True).values()}
        weights = {name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) in own}
        optimizer = torch.optim.SGD(pipeline.parameters(), lr=lr, momentum=momentum)
        restart = Restart(checkpoint, every, kill_rank, kill_at)
        losses: list[float] = restart.history(world, weights, optimizer)
        started_at = len(losses)
        some = data.train.subset(torch.arange(examples))
        coming = itertools.islice(endless_batches(some, batch_size, seed), started_at, steps)
        with traffic() as sent:
            for step, (x, y) in enumerate(coming, started_at):
                restart.before(step, world)
                optimizer.zero_grad()
                loss = pipeline.step(x, y)
                optimizer.step()
                dist.all_reduce(loss)  # only the last stage's rank knows it; the others add 0
                losses.append(loss.item())
                restart.after(world, weights, optimizer, losses)
        whole = gathered({name: t.detach().cpu() for name, t in weights.items()})
        model.load_state_dict(whole)
        accuracy = evaluate(model, data.val).accuracy
        return PipelinedRun(whole, losses, accuracy, pipeline.saved.peak, sent.bytes_sent, started_at)


def gathered(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks hold, by name, on each of them."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return {name: tensor for part in parts for name, tensor in part.items()}


def train_in_pieces(
    network: str = "convnet",
    *,
    micro_batches: int = 4,
    steps: int = 20,
    batch_size: int = 61,
    examples: int = 249,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 0,
) -> Run:
    """Train in this process, the gradient of a batch accumulated over micro-batches. Settings as `train_pipelined`."""
    data = load("digits")
    model = replica(network, data.input_shape, len(data.classes), seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    some, losses = data.train.subset(torch.arange(examples)), []
    for x, y in itertools.islice(endless_batches(some, batch_size, seed), steps):
        optimizer.zero_grad()
        pieces = zip(x.tensor_split(micro_batches), y.tensor_split(micro_batches), strict=True)
        parts = [local_loss(model, *piece, len(y)) for piece in pieces]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    return Run({name: t.clone() for name, t in model.state_dict().items()}, losses, evaluate(model, data.val).accuracy)


# --- torch's engine ---------------------------------------------------------------------------------------------------


def train_torch_pipelined(
    network: str = "vit",
    schedule: str = "1F1B",
    *,
    micro_batches: int = 4,
    steps: int = 20,
    batch_size: int = 60,
    examples: int = 240,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 0,
) -> Run:
    """Train by ``torch.distributed.pipelining``, with as many stages as there are ranks; to be run by ``launch``.

    Its micro-batches must all be of one size.

    Parameters
    ----------
    schedule : ``"1F1B"`` or ``"GPipe"``; the rest as in `train_pipelined`.
    """
    from torch.distributed import pipelining  # takes a second to import

    require("schedule", schedule, lambda name: name in ("1F1B", "GPipe"), "'1F1B' or 'GPipe'")
    even = batch_size % micro_batches == 0 and examples % batch_size == 0
    require("batch_size", batch_size, lambda _: even, "a multiple of micro_batches that divides examples")
    with process_group() as world:
        data = load("digits").to(world.device)
        model = replica(network, data.input_shape, len(data.classes), seed=seed).to(world.device)
        example = torch.zeros(2, *data.input_shape, dtype=torch.float64, device=world.device)
        module = even_stages(model, world.size, example)[world.rank]
        own = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
        weights = {name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) in own}
        module.register_forward_hook(lambda *call: call[-1].contiguous())  # it sends no other tensors
        stage = pipelining.PipelineStage(module, world.rank, world.size, world.device)
        make = getattr(pipelining, f"Schedule{schedule}")
        engine = make(stage, micro_batches, loss_fn=_share_of(batch_size), scale_grads=False)
        optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
        some, losses = data.train.subset(torch.arange(examples)), []
        for x, y in itertools.islice(endless_batches(some, batch_size, seed), steps):
            optimizer.zero_grad()
            parts: list[Tensor] = []
            first, last = world.rank == 0, world.rank == world.size - 1
            engine.step(*([x] if first else []), **({"target": y, "losses": parts} if last else {}))
            optimizer.step()
            loss = sum((part.detach() for part in parts), torch.zeros((), dtype=x.dtype, device=world.device))
            dist.all_reduce(loss)
            losses.append(loss.item())
        whole = gathered({name: t.detach().cpu() for name, t in weights.items()})
        model.load_state_dict(whole)
        return Run(whole, losses, evaluate(model, data.val).accuracy)


def _share_of(total: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The part of a batch's mean loss that a micro-batch has."""
    return lambda logits, y: nn.functional.cross_entropy(logits, y, reduction="sum") / total


# --- Measuring --------------------------------------------------------------------------------------------------------


KINDS: tuple[Kind, ...] = ("F", "I", "W")


class _Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: Waiting) -> Tensor:
        ctx.stage = stage
        time.sleep(stage.costs[0])
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        stage = ctx.stage
        time.sleep(stage.costs[1])
        if stage.later is None:
            time.sleep(stage.costs[2])
        else:
            stage.later.append(Product(stage, grad, grad))
        return grad, None


class Waiting(nn.Module):
    """A stage that waits as long as another would compute: so that more ranks than cores can be timed.

    Parameters
    ----------
    forward, inputs, weights : seconds of the forward pass and of both halves of the backward pass.
    """

    weight = bias = None

    def __init__(self, forward: float, inputs: float, weights: float) -> None:
        super().__init__()
        self.costs = forward, inputs, weights
        self.later: Later | None = None
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers, later."""
        return _Waits.apply(x * self.scale, self)

    def gradients(self, x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """The half that may come later."""
        time.sleep(self.costs[2])
        return x, errors


def measure_schedule(schedule: Schedule, costs: Costs, *, rows: int = 8, repeats: int = 3) -> Timeline:
    """When each rank does each task, for stages that wait as long as ``costs`` says; to be run by ``launch``.

    The messages are real, ``rows`` rows of 64 numbers a micro-batch. Of several runs the one with the median makespan.
    """
    with process_group() as world:
        of = [[costs.of(Task(kind, s, 0)) for kind in KINDS] for s in range(schedule.stages)]
        stages = [Waiting(*three) for three in of]
        x = torch.ones(rows * schedule.batches, 64, device=world.device)
        y = torch.zeros(len(x), dtype=torch.long, device=world.device)
        pipeline = Pipeline(stages, schedule, world, x[:1])
        runs = [_timed(pipeline, x, y) for _ in range(repeats + 1)][1:]  # the first opens the connections
        return sorted(runs, key=lambda run: run.makespan)[len(runs) // 2]


def _timed(pipeline: Pipeline, x: Tensor, y: Tensor) -> Timeline:
    """One step of all ranks, on one clock: that of the machine on which they all are."""
    dist.barrier()
    pipeline.step(x, y)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, pipeline.spans)
    spans = [span for part in parts for span in part]
    began = min(span.start for span in spans)
    return Timeline(tuple(Span(s.rank, s.task, s.start - began, s.end - began) for s in spans), len(parts))


def measure_pipeline(
    schedule: MakeSchedule = one_f_one_b,
    micro_batches: Sequence[int] = (1, 2, 4, 8),
    *,
    width: int = 512,
    depth: int = 8,
    batch_size: int = 512,
    repeats: int = 5,
) -> dict[int, float]:
    """Seconds of a step (gradients alone) by number of micro-batches, for a perceptron; to be run by ``launch``.

    Under 0: what one rank needs for all of it, undivided, while the others wait. The numbers of micro-batches take
    turns, so that all meet the same machine; medians over ``repeats``.
    """
    with process_group() as world:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()).to(world.device) for _ in range(depth)]
        x = torch.randn(batch_size, width, device=world.device)
        y = torch.randint(width, (batch_size,), device=world.device)
        pipelines = {m: _perceptron(layers, schedule(world.size, m), world, x) for m in micro_batches}
        seconds: dict[int, list[float]] = {0: [], **{m: [] for m in micro_batches}}
        for _ in range(repeats + 1):
            seconds[0].append(_seconds(lambda: _alone(layers, x, y) if world.rank == 0 else None))
            for m, pipeline in pipelines.items():
                seconds[m].append(_seconds(lambda pipeline=pipeline: pipeline.step(x, y)))  # type: ignore[misc]
        return {m: statistics.median(times[1:]) for m, times in seconds.items()}


def _perceptron(layers: Sequence[nn.Module], schedule: Schedule, world: World, x: Tensor) -> Pipeline:
    require("depth", len(layers), lambda n: n % schedule.stages == 0, f"a multiple of the {schedule.stages} stages")
    size = len(layers) // schedule.stages
    stages = [nn.Sequential(*layers[s * size : (s + 1) * size]) for s in range(schedule.stages)]
    return Pipeline(stages, schedule, world, x[:1])


def _alone(layers: Iterable[nn.Module], x: Tensor, y: Tensor) -> None:
    cross_entropy(nn.Sequential(*layers), x, y).backward()


def _seconds(work: Callable[[], Any]) -> float:
    """Until all ranks have done it."""
    dist.barrier()
    started = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - started


def measure_engines(
    *, micro_batches: int = 8, width: int = 512, depth: int = 8, batch_size: int = 256, rounds: int = 10
) -> dict[str, float]:
    """Seconds of a step of 1F1B by our ``Pipeline`` and by torch's engine, in turns; to be run by ``launch``."""
    from torch.distributed import pipelining

    with process_group() as world:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()).to(world.device) for _ in range(depth)]
        x = torch.randn(batch_size, width, device=world.device)
        y = torch.randint(width, (batch_size,), device=world.device)
        ours = _perceptron(layers, one_f_one_b(world.size, micro_batches), world, x)
        first, last = world.rank == 0, world.rank == world.size - 1
        module = next(iter(ours.stages.values()))
        stage = pipelining.PipelineStage(module, world.rank, world.size, world.device)
        theirs = pipelining.Schedule1F1B(stage, micro_batches, loss_fn=_share_of(batch_size), scale_grads=False)
        given: dict[str, Any] = {"target": y} if last else {}
        steps: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours.step(x, y),
            "torch": lambda: theirs.step(*([x] if first else []), **given),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn, (name, step) in itertools.product(range(rounds + 2), steps.items()):
            spent = _seconds(step)
            if turn > 1:
                seconds[name].append(spent)
        return {name: statistics.median(times) for name, times in seconds.items()}


def measure_held(
    schedules: Sequence[Schedule], *, width: int = 64, depth: int = 16, rows: int = 32
) -> list[dict[str, Any]]:
    """Bytes of activations that each rank held at most in one step of a perceptron; to be run by ``launch``.

    One row a schedule and rank: ``held`` as counted, ``predicted`` as the schedule's `in_flight` times what one
    micro-batch of ``rows`` rows leaves in one stage.
    """
    with process_group() as world:
        found = []
        for schedule in schedules:
            torch.manual_seed(0)
            layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()).to(world.device) for _ in range(depth)]
            x = torch.randn(rows * schedule.batches, width, device=world.device)
            pipeline = _perceptron(layers, schedule, world, x)
            pipeline.step(x, torch.zeros(len(x), dtype=torch.long, device=world.device))
            own: dict[str, Any] = {"schedule": schedule.name, "rank": world.rank, "held": pipeline.saved.peak}
            own["predicted"] = in_flight(schedule)[world.rank] * _one_micro_batch(pipeline, x[:rows])
            parts: list[Any] = [None] * world.size
            dist.all_gather_object(parts, own)
            found += parts
        return found


def _one_micro_batch(pipeline: Pipeline, x: Tensor) -> int:
    """Bytes that a stage in the middle leaves for its backward pass."""
    stage = next(iter(pipeline.stages.values()))
    with Saved(pipeline.parameters()) as saved:
        kept = stage(x.clone().requires_grad_())
    held = saved.now
    del kept
    return held
