"""What the ranks do in test_pipeline.py. Starting processes is slow, so each function tries many things."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib.lab.models import resnet
from course_lib.lab.training import cross_entropy
from course_lib.parallel.launching import process_group
from course_lib.partitioning import pipelined_runs
from course_lib.partitioning.cutting import cut_graph
from course_lib.partitioning.pipeline import Pipeline
from course_lib.partitioning.pipelined_runs import PipelinedRun, gathered, train_pipelined
from course_lib.partitioning.schedules import Schedule, Task, gpipe, interleaved, naive, one_f_one_b, zero_bubble

THREE_CHUNKS = partial(interleaved, chunks=1)
METHODS = {
    "vit": (naive, gpipe, one_f_one_b, interleaved, zero_bubble),
    "mlp": (one_f_one_b,),
    "convnet": (one_f_one_b, zero_bubble),
}


def train_all(settings: dict[str, Any]) -> dict[tuple[str, str], PipelinedRun]:
    return {
        (network, make.__name__): train_pipelined(network, make, **settings)
        for network, some in METHODS.items()
        for make in some
    }


def v_shaped() -> Schedule:
    """Stages 0 and 3 on rank 0, 1 and 2 on rank 1: neighbours on one rank, and gaps in the numbers."""
    orders = ("F0.0 F0.1 F3.0 I3.0 W3.0 F3.1 I3.1 W3.1 I0.0 W0.0 I0.1 W0.1", "F1.0 F2.0 F1.1 F2.1 I2.0 I1.0 W2.0 "
              "W1.0 I2.1 W2.1 I1.1 W1.1")  # fmt: skip
    read = [tuple(Task(t[0], int(t[1]), int(t[3])) for t in order.split()) for order in orders]  # type: ignore[arg-type]
    return Schedule("v", 4, 2, tuple(read))


def through_shortcuts(x: Tensor, y: Tensor) -> dict[str, Any]:
    """A resnet cut within its blocks, where two tensors cross: gradients of two ranks, and of one process alone."""
    with process_group() as world:
        torch.manual_seed(0)
        model = resnet((1, 8, 8), 10, width=4).double().eval()  # batch norm's micro-batches would differ
        expected = copy.deepcopy(model)
        cross_entropy(expected, x, y).backward()
        stages = cut_graph(model, x, 4)
        pipeline = Pipeline(stages, v_shaped(), world, x)
        loss = pipeline.step(x, y)
        dist.all_reduce(loss)
        own = {id(p) for p in pipeline.parameters()}
        mine = {name: p.grad for name, p in model.named_parameters() if id(p) in own and p.grad is not None}
        theirs = {name: p.grad for name, p in expected.named_parameters()}
        several = max(len(shapes) for shapes in pipeline.mail.shapes)
        return {"ours": gathered(mine), "theirs": theirs, "loss": loss, "several": several, "left": pipeline.saved.now}


def spans_of_waiting(schedule: Schedule, costs: Any) -> Any:
    return pipelined_runs.measure_schedule(schedule, costs, repeats=1)


def refuse_other_stages() -> str:
    with process_group() as world:
        try:
            Pipeline([nn.Identity()], gpipe(2, 2), world, torch.zeros(1, 2))
        except ValueError as error:
            return str(error)
    return "accepted"


def refuse_shared() -> str:
    layer = nn.Linear(2, 2)
    with process_group() as world:
        try:
            Pipeline([layer, layer], gpipe(2, 2), world, torch.zeros(1, 2))
        except ValueError as error:
            return str(error)
    return "accepted"
