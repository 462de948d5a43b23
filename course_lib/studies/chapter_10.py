"""Chapter 10's study: early exits, and one network cut between two processes.

One run at a time. "exits_digits" and "exits_photographs": MNIST, and CIFAR-10 at 16×16 pixels, with 5,000 training
images each; three convolutions (8, 16 and 32 channels, for photographs 16, 32 and 64) with exits behind the first and
the second, Adam, four epochs, a cosine to zero. Heads afterwards are trained for four epochs more on a network that
stays as it is, so that its last exit is the network without exits. The threshold is the one with fewest multiplications
whose accuracy on 1,000 validation images is at most half a point below that of the whole network; the test images
report. "cuts": a transformer of 1.8 million weights, on batches of 32 MNIST images (512 tokens), Adam, float32, by each
way to share it between two processes of one thread each, beside one process of one thread and of two. Pipelines have
two stages and eight micro-batches, but for the one that sends the whole batch at once. The time of a step is a mean
over all steps but the first two, with the count of activations running in all alike; what is held and sent is that of
the process that holds or sends most.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from course_lib import partitioning as pt
from course_lib import schedules
from course_lib.lab.data import Dataset, batches
from course_lib.lab.models import vit
from course_lib.lab.studies import Arm, Part, Study
from course_lib.lab.training import Objective, Recipe, cross_entropy, fit, fresh
from course_lib.parallel.collectives import traffic
from course_lib.parallel.data_parallel import local_loss, shard
from course_lib.parallel.launching import World
from course_lib.partitioning.collectives import all_reduce, communication
from course_lib.partitioning.pipelined_runs import MakeSchedule, even_stages
from course_lib.partitioning.saved import Saved
from course_lib.studies import mnist
from course_lib.studies.chapter_12 import some as photographs

SEEDS = (0, 1, 2, 3, 4)
MB = 1e6


def digits() -> Dataset:
    """MNIST with 5,000 images to train on."""
    return mnist(5_000)


# --- Early exits ------------------------------------------------------------------------------------------------------

EXITS, EPOCHS, LOSS = ("2", "6"), 4, 0.005
THRESHOLDS = (*(round(0.2 + 0.05 * k, 2) for k in range(16)), 0.97, 0.98, 0.99, 1.01)


def with_exits(data: Dataset, width: int) -> pt.WithExits:
    """Convolutions to one, two and four widths, each with a maximum over 2×2 behind it; exits behind the first two."""
    layers: list[nn.Module] = []
    inputs, side, _ = data.input_shape
    for channels in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        inputs, side = channels, side // 2
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side**2, len(data.classes)))
    return pt.WithExits(network, EXITS, example=torch.zeros(1, *data.input_shape))


def recipe(objective: Objective) -> Recipe:
    """Four epochs."""
    return Recipe(
        epochs=EPOCHS,
        batch_size=50,
        optimizer=partial(torch.optim.Adam, lr=4e-3),
        schedule=schedules.schedule(schedules.cosine),
        objective=objective,
        validate_every=EPOCHS,
    )


def together(data: Dataset, seed: int, *, width: int, weights: tuple[float, ...]) -> pt.WithExits:
    """All exits are trained at once."""
    return _trained(width, recipe(partial(pt.joint, weights=weights)), data, seed)


def afterwards(data: Dataset, seed: int, *, width: int) -> pt.WithExits:
    """The network first, then the heads alone."""
    model = _trained(width, recipe(cross_entropy), data, seed)
    heads = recipe(partial(pt.joint, weights=(1.0, 1.0, 0.0)))
    fit(pt.heads_only(model), data, heads, seed=seed, progress=False)
    return model


def _trained(width: int, how: Recipe, data: Dataset, seed: int) -> pt.WithExits:
    model = fresh(partial(with_exits, data, width), how, seed=seed)
    assert isinstance(model, pt.WithExits)
    fit(model, data, how, seed=seed, progress=False)
    return model


def leaving(train: Callable[[Dataset, int], pt.WithExits], data: Dataset, seed: int) -> dict[str, float | list[float]]:
    """What the exits of a trained network save, and what that costs."""
    model = train(data, seed)
    val, test = (pt.exit_curve(model, split, THRESHOLDS) for split in (data.val, data.test))
    whole, early = test.iloc[-1], test.loc[pt.threshold_for(val, val["accuracy"].iloc[-1] - LOSS)]
    multiplied = 100 * test["flops"] / whole["flops"]
    return {
        "accuracy, whole network": whole["accuracy"],
        "accuracy, leaving early": early["accuracy"],
        "multiplications, %": 100 * early["flops"] / whole["flops"],
        "left at the first exit, %": 100 * early["exit 0"],
        "right early, wrong at last, %": 100 * pt.overthinking(model, data.test).destructive,
        "threshold": list(THRESHOLDS),
        "accuracy": test["accuracy"].tolist(),
        "multiplications at each threshold, %": multiplied.tolist(),
    }


def exit_arms(width: int) -> dict[str, Arm]:
    """Ways to train the exits."""
    return {
        "heads afterwards": partial(leaving, partial(afterwards, width=width)),
        "together, early ones at 0.3": partial(leaving, partial(together, width=width, weights=(0.3, 0.3, 1.0))),
        "together, all alike": partial(leaving, partial(together, width=width, weights=(1.0, 1.0, 1.0))),
    }


# --- One network, two processes ---------------------------------------------------------------------------------------

BATCH, STEPS, WARM_UP, MICRO, LR = 32, 8, 2, 8, 1e-3


def transformer(data: Dataset) -> nn.Module:
    """Four blocks of 192 units on 16 patches."""
    return vit(data.input_shape, len(data.classes), patch=7, width=192, depth=4)


@dataclass(frozen=True)
class Cut:
    """A rank's part of the network: its ``parameters``, and ``(x, y) -> loss`` of the whole batch.

    ``gradient`` leaves the whole batch's gradient in them and returns what this rank has of the loss: the ranks' add
    up. ``saved`` counts the activations.
    """

    parameters: list[nn.Parameter]
    gradient: Callable[[Tensor, Tensor], Tensor]
    saved: Saved


MakeCut = Callable[[nn.Module, Tensor, World], Cut]
"""``(network, example, world) -> Cut``."""


def by_batch(model: nn.Module, example: Tensor, world: World) -> Cut:
    """All of the network, a share of the batch; with one rank, one process alone."""
    parameters = list(model.parameters())
    saved = Saved(parameters)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        with saved:
            loss = local_loss(model, *shard(x, y, world.rank, world.size), len(y))
        loss.backward()
        if world.size > 1:
            own = [p.grad for p in parameters if p.grad is not None]
            vector_to_parameters(all_reduce(parameters_to_vector(own), None), own)  # one message, counted
        return loss.detach()

    return Cut(parameters, gradient, saved)


def by_matrices(model: nn.Module, example: Tensor, world: World, *, sequence: bool) -> Cut:
    """A part of every matrix, and with ``sequence`` of the tokens."""
    shared = pt.tensor_parallel(model, sequence=sequence)
    parameters = list(shared.parameters())
    saved = Saved(parameters)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        with saved:
            loss = cross_entropy(shared, x, y)
        loss.backward()
        return loss.detach() / world.size  # each knows it whole

    return Cut(parameters, gradient, saved)


def by_layers(model: nn.Module, example: Tensor, world: World, *, schedule: MakeSchedule, micro: int = MICRO) -> Cut:
    """Some of the layers."""
    stages = even_stages(model, world.size, example)
    pipeline = pt.Pipeline(stages, schedule(world.size, micro), world, example)
    return Cut(pipeline.parameters(), pipeline.step, pipeline.saved)


@dataclass(frozen=True)
class Way:
    """Processes, the threads of each, and what each of them gets."""

    processes: int
    threads: int
    cut: MakeCut


WAYS = {
    "one process, one thread": Way(1, 1, by_batch),
    "one process, two threads": Way(1, 2, by_batch),
    "two: data": Way(2, 1, by_batch),
    "two: matrices": Way(2, 1, partial(by_matrices, sequence=False)),
    "two: matrices and tokens": Way(2, 1, partial(by_matrices, sequence=True)),
    "two: layers, one batch": Way(2, 1, partial(by_layers, schedule=pt.naive, micro=1)),
    "two: layers, GPipe": Way(2, 1, partial(by_layers, schedule=pt.gpipe)),
    "two: layers, 1F1B": Way(2, 1, partial(by_layers, schedule=pt.one_f_one_b)),
    "two: layers, zero bubble": Way(2, 1, partial(by_layers, schedule=pt.zero_bubble)),
}


def train(way: Way, data: Dataset, seed: int) -> dict[str, Any]:
    """Train as one of the processes of ``launch``."""
    # In the function: how processes are started is no part of what a run depends on
    from course_lib.parallel.launching import process_group

    with process_group() as world:
        model = fresh(partial(transformer, data), Recipe(), seed=seed)
        cut = way.cut(model, torch.zeros(1, *data.input_shape), world)
        optimizer = torch.optim.Adam(cut.parameters, lr=LR)
        order, losses, started = torch.Generator().manual_seed(seed), [], 0.0
        with traffic() as messages, communication() as collectives:
            for step, (x, y) in enumerate(islice(batches(data.train, BATCH, generator=order), STEPS)):
                if step == WARM_UP:
                    dist.barrier()
                    started = time.perf_counter()
                optimizer.zero_grad()
                losses.append(cut.gradient(x, y))
                optimizer.step()
        dist.barrier()
        return {
            "seconds": (time.perf_counter() - started) / (STEPS - WARM_UP),
            "weights": sum(p.nbytes for p in cut.parameters),
            "activations": cut.saved.peak,
            "sent": (messages.bytes_sent + collectives.total) / STEPS,
            "loss": losses[-1],
        }


def shared_out(way: Way, data: Dataset, seed: int) -> dict[str, float]:
    """Train in new processes; what the fuller or slower of them takes."""
    from course_lib.parallel.launching import launch

    ranks = launch(train, way.processes, way, data, seed, threads=way.threads, timeout=300.0)

    def most(what: str) -> float:
        return float(max(rank[what] for rank in ranks))

    return {
        "ms a step": 1e3 * most("seconds"),
        "MB of weights": most("weights") / MB,
        "MB of activations": most("activations") / MB,
        "MB sent a step": most("sent") / MB,
        "last training loss": float(sum(rank["loss"] for rank in ranks)),
    }


STUDY = Study(
    "10",
    "What do early exits save, and what does each cut of a network cost?",
    {
        "exits_digits": Part("Early exits on MNIST", digits, exit_arms(8), SEEDS),
        "exits_photographs": Part("Early exits on CIFAR-10 at 16×16 pixels", photographs, exit_arms(16), SEEDS),
        "cuts": Part(
            "MNIST, a transformer in one process and in two, by each cut",
            digits,
            {name: partial(shared_out, way) for name, way in WAYS.items()},
            SEEDS,
        ),
    },
    alone=True,
)
