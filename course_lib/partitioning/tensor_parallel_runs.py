"""Tensor parallelism that trains, what it holds and sends, and torch's own beside it: to be run by ``launch``.

===========================  =======================================================================
name                         what it does
===========================  =======================================================================
``measure_tensor_parallel``  counts weights, activations and messages of a rank, beside the formulas
``train_tensor_parallel``    trains a ``vit`` on the digits, its matrices shared out
``train_vit_alone``          the same in one process
``compare_with_torch``       differences to ``torch.distributed.tensor.parallel``
===========================  =======================================================================
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least
from course_lib.lab.data import load
from course_lib.lab.models import Attention, EncoderBlock, ViT, vit
from course_lib.lab.training import Recipe, cross_entropy, evaluate, fresh
from course_lib.parallel.collectives import ring_bytes
from course_lib.parallel.data_parallel_runs import Run, endless_batches
from course_lib.parallel.launching import World, process_group
from course_lib.partitioning.collectives import (
    communication,
)
from course_lib.partitioning.restarting import Restart
from course_lib.partitioning.saved import Saved
from course_lib.partitioning.tensor_parallel import (
    SharedLayerNorm,
    layer_activations,
    layer_bytes,
    layer_parameters,
    parallel_attention,
    parallel_mlp,
    shared_tokens,
    tensor_parallel,
    whole_gradients,
    whole_state,
)

# --- What it costs, measured ------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "sequence": {"sequence": True},
    "sequence, gathered twice": {"sequence": True, "gather_twice": True},
}
"""Arguments of `tensor_parallel` for what `measure_tensor_parallel` compares."""


@dataclass(frozen=True)
class Cost:
    """What one rank holds of a network's encoder blocks, and sends in a step; beside it the formulas.

    Attributes
    ----------
    weights, activations : bytes of the blocks' parameters, and of what their forward pass keeps for backward.
    calls, sent : collectives of a step by kind, and the bytes that the rank sends for them on a ring.
    expected_weights, expected_activations, expected_sent : bytes by `layer_parameters`, `layer_activations` and
        `layer_bytes`, exact where N divides the tokens.
    """

    weights: int
    activations: int
    calls: dict[str, int]
    sent: dict[str, int]
    expected_weights: float
    expected_activations: float
    expected_sent: float


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that this rank holds."""
    return sum(p.nbytes for p in model.parameters())


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for backward, besides the parameters: each piece of memory once."""
    with Saved(model.parameters()) as saved:
        out = model(x)  # while it lives all that was kept does
    kept = saved.now
    del out
    return kept


def measure_tensor_parallel(
    *,
    batch_size: int = 32,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Cost]:
    """Count what a rank holds and sends for a ``vit`` on the digits, in each of `MODES`; to be run by ``launch``.

    Raises
    ------
    ValueError : an argument is out of range, or heads or hidden units cannot be shared out evenly.
    """
    with process_group() as world:
        data = load("digits").to(world.device)
        x, y = next(endless_batches(data.train, batch_size, seed=0))
        x = x.to(dtype)
        whole = digit_vit(width=width, depth=depth, heads=heads).to(world.device, dtype)
        tokens, size = len(whole.position), dtype.itemsize
        shape = (batch_size, tokens, width)
        ends = ring_bytes(math.prod(shape) * size, world.size)  # shared tokens are joined once, and so are gradients
        found = {}
        for mode, how in MODES.items():
            model = cast(ViT, tensor_parallel(whole, **how))
            embedded = torch.zeros(shape, dtype=dtype, device=world.device, requires_grad=True)
            kept = saved_bytes(model.blocks, embedded)
            with communication() as count:
                cross_entropy(model, x, y).backward()
            found[mode] = Cost(
                weights=held_bytes(model.blocks),
                activations=kept,
                calls=dict(count.calls),
                sent=dict(count.sent),
                expected_weights=depth * size * layer_parameters(width, world.size),
                expected_activations=depth * size * layer_activations(*shape, heads, world.size, **how),
                expected_sent=depth * layer_bytes(*shape, world.size, size, **how) + ends * bool(how),
            )
        return found


# --- Training runs ----------------------------------------------------------------------------------------------------


def digit_vit(*, width: int = 32, depth: int = 2, heads: int = 4, seed: int = 0) -> ViT:
    """Build the same float64 ``vit`` for the digits on every rank, from the same seed."""
    data = load("digits")
    build = partial(vit, data.input_shape, len(data.classes), width=width, depth=depth, heads=heads)
    return cast(ViT, fresh(build, Recipe(precision="float64"), seed=seed))


def train_vit_alone(**settings: Any) -> Run:
    """Train the ``vit`` in this process, in one piece. Settings as in `train_tensor_parallel`."""
    return _train(lambda model: model, World(0, 1, torch.device("cpu")), Restart(), **settings)


@dataclass(frozen=True)
class TensorRun(Run):
    """A run, and the step at which it began: not 0 where it went on from a checkpoint."""

    started_at: int


def train_tensor_parallel(
    *,
    sequence: bool = False,
    gather_twice: bool = False,
    restart: Restart = Restart(),  # noqa: B008  # frozen
    **settings: Any,
) -> TensorRun:
    """Train the ``vit`` on the digits in float64, its layers shared out; to be run by ``launch``.

    All ranks see the whole batch, and return the same.

    Parameters
    ----------
    sequence, gather_twice : as in `tensor_parallel`.
    restart : a folder of checkpoints, each rank's part of the matrices by itself.
    settings : ``steps`` (10), ``batch_size`` (61), ``examples`` of the training split that are used (249, so that the
        last batch of an epoch has 5), ``lr``, ``momentum``, ``seed``, and the network's ``width``, ``depth``,
        ``heads``.
    """
    with process_group() as world:
        share_out = partial(tensor_parallel, sequence=sequence, gather_twice=gather_twice)
        return _train(share_out, world, restart, **settings)


def _train(
    share_out: Callable[[nn.Module], nn.Module],
    world: World,
    restart: Restart,
    *,
    steps: int = 10,
    batch_size: int = 61,
    examples: int = 249,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 0,
    **network: int,
) -> TensorRun:
    at_least(1, steps=steps)
    data = load("digits").to(world.device)
    model = share_out(digit_vit(seed=seed, **network).to(world.device))
    weights = dict(model.state_dict(keep_vars=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    some = data.train.subset(torch.arange(examples))
    losses: list[Tensor] = restart.history(world, weights, optimizer)
    started_at = len(losses)
    coming = itertools.islice(endless_batches(some, batch_size, seed), started_at, steps)
    for step, (x, y) in enumerate(coming, started_at):
        restart.before(step, world)
        optimizer.zero_grad()
        loss = cross_entropy(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        restart.after(world, weights, optimizer, losses)
    accuracy = evaluate(model, data.val).accuracy
    return TensorRun(whole_state(model), torch.stack(losses).tolist(), accuracy, started_at)


# --- The library that practitioners use -------------------------------------------------------------------------------


class SeparateAttention(nn.Module):
    """`Attention` with queries, keys and values from layers of their own, which torch's plan can cut by heads."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        width = attention.project.in_features
        self.size = width // attention.heads
        self.q, self.k, self.v = (nn.Linear(width, width).to(attention.qkv.weight) for _ in range(3))
        parts = zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
        for layer, (weight, bias) in zip((self.q, self.k, self.v), parts, strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})
        self.project = copy.deepcopy(attention.project)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[N, tokens, width]`` to tokens of the same shape."""
        q, k, v = (part(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def torch_plans() -> dict[str, dict[str, Any]]:
    """What ``torch.distributed.tensor.parallel.parallelize_module`` needs to be told, for each part of a block."""
    # here, since it takes as long to import as the rest of torch
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
    )

    columns, rows = ColwiseParallel(), RowwiseParallel()
    return {
        "mlp": {"0": columns, "2": rows},
        "attention": {"q": columns, "k": columns, "v": columns, "project": rows},
        "sequence": {
            "0": SequenceParallel(),
            "1": ColwiseParallel(input_layouts=Shard(1)),
            "3": RowwiseParallel(output_layouts=Shard(1)),
        },
    }


def compare_with_torch(
    *, batch: int = 3, tokens: int = 12, width: int = 24, heads: int = 4, seed: int = 0
) -> dict[str, float]:
    """Compare a block's parts with torch's own tensor parallelism, in float64; to be run by ``launch``.

    Returns the largest relative difference ``||a - b|| / ||b||`` for each output, and for the gradients of each input
    and parameter, by names like ``"attention: project.weight"``. ``"sequence"`` is a layer norm and the MLP on shared
    tokens.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    with process_group() as world:
        torch.manual_seed(seed)
        block = EncoderBlock(width, heads).double().to(world.device)
        nn.init.normal_(block.norm2.weight)  # all ones would hide a part that is left out
        x, goal = torch.randn(2, batch, tokens, width, dtype=torch.float64, device=world.device)
        shared = shared_tokens(tokens)
        ours = {
            "mlp": parallel_mlp(block.mlp),
            "attention": parallel_attention(block.attention),
            "sequence": nn.Sequential(
                SharedLayerNorm(copy.deepcopy(block.norm2), shared), *parallel_mlp(block.mlp, borders=shared)
            ),
        }
        theirs: dict[str, nn.Module] = {
            "mlp": copy.deepcopy(block.mlp),
            "attention": SeparateAttention(block.attention),
            "sequence": nn.Sequential(copy.deepcopy(block.norm2), *copy.deepcopy(block.mlp)),
        }
        mesh = init_device_mesh(world.device.type, (world.size,))
        found: dict[str, float] = {}
        for part, plan in torch_plans().items():
            x_own, goal_own = (
                (t.tensor_split(world.size, 1)[world.rank] if part == "sequence" else t) for t in (x, goal)
            )
            a = _responses(ours[part], x_own, goal_own)
            b = _responses(parallelize_module(theirs[part], mesh, plan), x_own, goal_own)
            found |= {f"{part}: {name}": float((a[name] - b[name]).norm() / b[name].norm()) for name in b}
        return found


def _responses(model: nn.Module, x: Tensor, goal: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of input and parameters in one piece, of a loss that weighs the output."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    (y * goal).sum().backward()
    assert x.grad is not None
    found = {"output": y.detach(), "input": x.grad}
    if any(hasattr(p, "full_tensor") for p in model.parameters()):  # torch's
        gradients = {name: cast(Any, p.grad).full_tensor() for name, p in model.named_parameters()}
    else:
        gradients = whole_gradients(model)
    for kind in ("weight", "bias"):
        if f"q.{kind}" in gradients:
            gradients[f"qkv.{kind}"] = torch.cat([gradients.pop(f"{part}.{kind}") for part in "qkv"])
    return found | {name: gradient.to(x.device) for name, gradient in gradients.items()}
