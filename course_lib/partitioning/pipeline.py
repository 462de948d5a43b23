"""A pipeline: each rank holds some stages of a network, and does its tasks of a schedule, micro-batch by micro-batch.

``Pipeline.step`` leaves in the ranks' stages the gradient of the whole batch, whatever the schedule (``schedules.py``)
and however uneven its micro-batches. Outputs and gradients travel between the ranks as they are made; the senders do
not wait. torch's own engine is ``torch.distributed.pipelining``.

Batch norm sees a micro-batch, not the batch: with it a pipeline computes what one process computes that accumulates
gradients over the same micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib.lab.arguments import require
from course_lib.lab.training import Objective, cross_entropy
from course_lib.parallel.collectives import receive, start_sending
from course_lib.parallel.data_parallel import local_loss
from course_lib.parallel.launching import World
from course_lib.partitioning.late_weights import Later, Product, in_time, late_weights
from course_lib.partitioning.saved import Held, Saved
from course_lib.partitioning.schedules import Schedule, Span, Task

Values = tuple[Tensor, ...]
"""What one stage hands to the next: one tensor, or several where a cut goes through shortcuts."""


class Pipeline:
    """The stages of one rank, and what it needs to work with the others.

    Parameters
    ----------
    stages : all stages of the network, each called with what the one before returns, a tensor or a tuple of them; only
        those of this rank are kept (``stages``).
    schedule : who does what; its number of stages is that of ``stages``, its ranks are those of the world.
    example : an input of the network, ``[N, …]``: it is sent through once, to learn what the stages hand on.
    objective : a mean over examples, called with the last stage in the model's place.

    Raises
    ------
    ValueError : the schedule is for other numbers of stages or ranks; or stages of two ranks share a parameter, of
        which each rank would train a copy of its own.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        schedule: Schedule,
        world: World,
        example: Tensor,
        *,
        objective: Objective = cross_entropy,
    ) -> None:
        fits = schedule.stages == len(stages) and len(schedule.ranks) == world.size
        allowed = f"for {len(stages)} stages on {world.size} ranks"
        require("schedule", schedule, lambda _: fits, allowed)
        self.schedule, self.rank, self.objective = schedule, world.rank, objective
        self.mail = Mail(schedule, world, boundaries(stages, example))
        home = schedule.home
        _check_shared(stages, home)
        self.stages = {s: stage for s, stage in enumerate(stages) if home[s] == world.rank}
        self.halves = any(task.kind == "W" for task in schedule.ranks[world.rank])
        self.later: dict[int, Later] = {}
        self.last = schedule.stages - 1
        self.saved = Saved(self.parameters())
        self.held: dict[tuple[int, int], tuple[Values, Values]] = {}
        self.late: dict[tuple[int, int], list[tuple[Product, list[Held]]]] = {}

    def parameters(self) -> list[nn.Parameter]:
        """Those of this rank's stages."""
        return list(dict.fromkeys(p for stage in self.stages.values() for p in stage.parameters()))

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Leave the gradient of a batch ``x [N, …]``, ``y [N]`` in this rank's parameters; return its mean loss.

        Every rank is called with the whole batch; only the first stage looks at ``x``, only the last at ``y``, and only
        the last one's rank knows the loss, the others return 0. ``spans`` then tells when each task ran, in seconds of
        this machine's clock (on a GPU: when it was queued).
        """
        self.inputs = [part.clone() for part in x.tensor_split(self.schedule.batches)]  # no views: each is freed alone
        self.targets, self.total = y.tensor_split(self.schedule.batches), len(y)
        self.loss = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        self.spans: list[Span] = []
        self.mail.open([len(part) for part in self.targets])
        if self.halves:  # lists of this step's own: the layers may be those of another pipeline as well
            self.later = {s: late_weights(stage) for s, stage in self.stages.items()}
        try:
            self._do_tasks()
        finally:
            for stage in self.stages.values():
                in_time(stage)
        self.mail.close()
        return self.loss

    def _do_tasks(self) -> None:
        do = {"F": self._forward, "B": self._backward, "I": self._backward, "W": self._weights}
        for task in self.schedule.ranks[self.rank]:
            arrived = [self.mail.take(need) for need in self.schedule.needs(task) if need.stage != task.stage]
            started = time.perf_counter()
            do[task.kind](task, *arrived)
            self.spans.append(Span(self.rank, task, started, time.perf_counter()))

    def _forward(self, task: Task, *arrived: Values) -> None:
        _, s, b = task
        x = arrived[0] if s else (self.inputs[b],)
        x = tuple(value.requires_grad_(s > 0 and value.is_floating_point()) for value in x)
        with self.saved:
            if s < self.last:
                y = as_tuple(self.stages[s](*x))
            else:
                y = (local_loss(self.stages[s], one(x), self.targets[b], self.total, self.objective),)
                self.loss += y[0].detach()
        self.held[s, b] = x, y
        if s < self.last:
            self.mail.post(task, y)

    def _backward(self, task: Task, *arrived: Values) -> None:
        kind, s, b = task
        x, y = self.held.pop((s, b))
        back(y, arrived[0] if arrived else None)
        if s:
            self.mail.post(task, tuple(gradient(value) for value in x))
        if kind == "I":  # what the other half will need, counted as long as it is kept
            self.late[s, b] = [(each, self.saved.hold(each.inputs, each.errors)) for each in self.later[s]]
            self.later[s].clear()

    def _weights(self, task: Task) -> None:
        for product, _ in self.late.pop((task.stage, task.batch)):
            product.add()


def _check_shared(stages: Sequence[nn.Module], home: Sequence[int]) -> None:
    seen: dict[int, int] = {}
    for number, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            first = seen.setdefault(id(parameter), number)
            if home[first] != home[number]:
                raise ValueError(
                    f"stages: number {number} has {name!r}, a parameter of number {first} as well, which is another "
                    "rank's: stages that share a parameter must be on one rank"
                )


def as_tuple(values: Tensor | Values) -> Values:
    """One tensor as a tuple of one."""
    return (values,) if isinstance(values, Tensor) else values


def one(values: Values) -> Any:
    """A tuple of one as the tensor itself: an objective takes a tensor, or a tuple of several."""
    return values[0] if len(values) == 1 else values


def back(values: Values, errors: Values | None) -> None:
    """Backward from what a stage returned, by the gradients that came back; ``None`` where it is the loss itself."""
    pairs = [(v, e) for v, e in zip(values, errors or [None] * len(values), strict=True) if v.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))  # type: ignore[arg-type]


def gradient(value: Tensor) -> Tensor:
    """What a backward pass has left in a stage's input: zeros where it was not used."""
    return torch.zeros_like(value) if value.grad is None else value.grad


def boundaries(stages: Sequence[nn.Module], example: Tensor) -> list[list[tuple[torch.Size, torch.dtype]]]:
    """Shape (without the first dimension) and type of each tensor that a stage hands on, for all stages but the last.

    Nothing is computed on real numbers: batch norm's statistics and random numbers stay as they were.
    """
    found: list[list[tuple[torch.Size, torch.dtype]]] = []
    values: Values = (example,)
    for stage in stages[:-1]:
        modes = [(part, part.training) for part in stage.modules()]
        stage.eval()
        with torch.no_grad():
            values = as_tuple(stage(*values))
        for part, mode in modes:
            part.training = mode
        found.append([(value.shape[1:], value.dtype) for value in values])
    return found


class Mail:
    """What tasks of one rank need from tasks of others: sent as soon as it is made, received in the order of sending.

    A rank knows the other ranks' tables, so it knows what they will send it and in which order: a message needs neither
    an address nor a shape. What comes before it is wanted is kept.
    """

    def __init__(self, schedule: Schedule, world: World, shapes: list[list[tuple[torch.Size, torch.dtype]]]) -> None:
        self.schedule, self.world, self.shapes = schedule, world, shapes
        pairs = {(a, b) for s, t in pairwise(schedule.home) for a, b in ((s, t), (t, s)) if a != b}
        # NCCL runs all messages of a group in one order, so that two directions in one group can block each other
        apart = dist.is_initialized() and dist.get_backend() == "nccl"
        self.groups = {pair: dist.new_group(list(pair)) if apart else None for pair in sorted(pairs)}

    def open(self, rows: list[int]) -> None:
        """Begin a step with micro-batches of so many rows each."""
        self.rows = rows
        self.arrived: dict[Task, Values] = {}
        self.sent: list[tuple[dist.Work, Tensor]] = []
        self.expected = {
            rank: [task for task in tasks if self._reader(task) == self.world.rank]
            for rank, tasks in enumerate(self.schedule.ranks)
        }

    def _reader(self, task: Task) -> int | None:
        """The rank that needs what a task has made."""
        kind, stage, _ = task
        reader = {"F": stage + 1, "B": stage - 1, "I": stage - 1, "W": -1}[kind]
        return self.schedule.home[reader] if 0 <= reader < self.schedule.stages else None

    def post(self, task: Task, values: Values) -> None:
        """Hand on what a task has made."""
        to, values = self._reader(task), tuple(value.detach() for value in values)
        assert to is not None
        if to == self.world.rank:
            self.arrived[task] = values
            return
        self.sent = [(work, tensor) for work, tensor in self.sent if not work.is_completed()]
        for value in map(Tensor.contiguous, values):
            work = start_sending(value, to, self.groups[self.world.rank, to])
            self.sent += [(work, value)] if work else []

    def take(self, task: Task) -> Values:
        """What a task has made; waits until it is there."""
        source = self.schedule.home[task.stage]
        while task not in self.arrived:
            early = self.expected[source].pop(0)
            self.arrived[early] = self._receive(early, source)
        return self.arrived.pop(task)

    def _receive(self, task: Task, source: int) -> Values:
        boundary = task.stage if task.kind == "F" else task.stage - 1
        buffers = [
            torch.empty(self.rows[task.batch], *shape, dtype=dtype, device=self.world.device)
            for shape, dtype in self.shapes[boundary]
        ]
        for buffer in buffers:
            receive(buffer, source, self.groups[source, self.world.rank])
        return tuple(buffers)

    def close(self) -> None:
        """Wait until all that was sent has arrived."""
        for work, _ in self.sent:
            work.wait()
        self.sent = []
