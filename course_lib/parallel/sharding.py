r"""Sharding: ranks that hold the same thing N times over hold a part of it each instead.

====================  ======================================================  ========================================
name                  what it does                                            source
====================  ======================================================  ========================================
``ShardedOptimizer``  each rank keeps the optimizer state of its parameters,  ZeRO stage 1: Rajbhandari et al. 2019,
                      updates those, and sends them round                     arXiv:1910.02054
``reduce_to_owners``  each rank gets the gradients of its parameters only     ZeRO stage 2
``memory_per_rank``   bytes of weights, gradients and state at each stage     the same, figure 1
``measure_sharding``  the same bytes, counted in a real run; stage 3 by       FSDP: Zhao et al. 2023, arXiv:2304.11277
                      torch's ``fully_shard``
====================  ======================================================  ========================================

In data-parallel training all ranks hold equal weights, gradients and optimizer state. Stage 1 shards the state, stage 2
the gradients too, stage 3 the weights as well. What is computed stays the same at every stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least
from course_lib.lab.data import batches, load
from course_lib.lab.models import mlp
from course_lib.parallel.data_parallel import average_gradients, broadcast_tensors, local_loss, shard
from course_lib.parallel.launching import process_group

# --- Who keeps what ---------------------------------------------------------------------------------------------------


def partition(sizes: Sequence[int], loads: Sequence[int]) -> list[int]:
    """Give each thing an owner: the largest first, each to the rank that has least so far.

    Parameters
    ----------
    sizes : one size for each thing.
    loads : what each rank has already; ``[0] * world_size`` at the start.

    Returns
    -------
    The owner of each thing. The fullest rank has at most a largest thing more than the emptiest, or than it had before.
    """
    loads, owners = list(loads), [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # sorting is stable: the same on every rank
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += sizes[index]
    return owners


# --- Stage 1: the optimizer's state -----------------------------------------------------------------------------------


class ShardedOptimizer(Optimizer):
    """Any optimizer, its state spread over the ranks (ZeRO stage 1). The weights come out as without sharding.

    >>> optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    Every rank calls `step` with the same, averaged gradients. Schedules work as usual: settings are read from
    ``param_groups`` at each step. Whole tensors are shared out, so the spread is uneven where one is large. It is not
    for optimizers that compute gradients themselves (L-BFGS, SAM).

    Parameters
    ----------
    params : as for any optimizer; also groups, and pairs of name and parameter.
    optimizer_class : the optimizer of each part, with its ``settings``.
    """

    def __init__(self, params: Any, optimizer_class: type[Optimizer], **settings: Any) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.owner: dict[Tensor, int] = {}
        self._whole: dict[str, Any] | None = None  # the state of all ranks, while it is up to date
        self.inner = optimizer_class(params, **settings)
        self._share_out()
        super().__init__([dict(group) for group in self.inner.param_groups], self.inner.defaults)
        self._keep_own()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update this rank's parameters, then receive the others from their owners."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _copy_settings(self.param_groups, self.inner.param_groups)
        self.inner.step()
        for rank in range(self.world_size):
            broadcast_tensors([p for p, owner in self.owner.items() if owner == rank], src=rank)
        self._whole = None
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters later (on all ranks): they are shared out, the others stay where they are."""
        super().add_param_group(param_group)
        if len(self.param_groups) > len(self.inner.param_groups):
            added = self.param_groups[-1]
            self.inner.add_param_group({name: value for name, value in added.items() if name != "param_names"})
            self._share_out()
            self._keep_own()

    def _share_out(self) -> None:
        """Find an owner for each parameter that has none."""
        new = [p for group in self.inner.param_groups for p in group["params"] if p not in self.owner]
        loads = [0] * self.world_size
        for p, rank in self.owner.items():
            loads[rank] += p.numel()
        self.owner.update(zip(new, partition([p.numel() for p in new], loads), strict=True))

    def _keep_own(self) -> None:
        """Take the other ranks' parameters, and what state there is for them, from the inner optimizer."""
        for group in self.inner.param_groups:
            group["params"] = [p for p in group["params"] if self.owner[p] == self.rank]
            group.pop("param_names", None)
        for p in [p for p in self.inner.state if self.owner[p] != self.rank]:
            del self.inner.state[p]
        self.state = self.inner.state
        self._whole = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that this rank keeps."""
        return local_bytes(self.state)

    # A checkpoint holds the state of all ranks, in the form that the optimizer has which is not sharded: it can be
    # loaded into that one, or onto any number of ranks.

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Collect the state of all ranks on rank ``to``, for `state_dict`. All ranks must call it."""
        position = {p: index for index, p in enumerate(self._parameters())}
        own = {position[p]: _on_cpu(state) for p, state in self.state.items()}
        parts: list[dict[int, Any]] | None = [{} for _ in range(self.world_size)] if self.rank == to else None
        dist.gather_object(own, parts, dst=to)
        if parts is not None:
            groups = [group | {"params": [position[p] for p in group["params"]]} for group in self.param_groups]
            merged = {index: state for part in parts for index, state in part.items()}
            self._whole = {"state": dict(sorted(merged.items())), "param_groups": groups}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all ranks, in the form of the optimizer that is not sharded.

        Raises
        ------
        RuntimeError : it was not collected on this rank since the last step. Collecting it here would hang where, as
            usual, only one rank writes the checkpoint.
        """
        if self._whole is None:
            raise RuntimeError(
                f"rank {self.rank} has only its own part of the state: let all ranks call "
                f"consolidate_state_dict(to={self.rank}) after the last step, then state_dict() on rank {self.rank}"
            )
        return self._whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part from the state of all. Every rank must call it with the whole.

        Raises
        ------
        ValueError : the groups have other sizes than this optimizer's.
        """
        saved = state_dict["param_groups"]
        sizes, saved_sizes = ([len(group["params"]) for group in groups] for groups in (self.param_groups, saved))
        if sizes != saved_sizes:
            raise ValueError(f"state_dict has groups of {saved_sizes} parameters; this optimizer's have {sizes}")
        numbers = [number for group in saved for number in group["params"]]
        own = {n for n, p in zip(numbers, self._parameters(), strict=True) if self.owner[p] == self.rank}
        groups = [group | {"params": [n for n in group["params"] if n in own]} for group in saved]
        state = {n: value for n, value in state_dict["state"].items() if n in own}
        self.inner.load_state_dict({"state": state, "param_groups": groups})
        _copy_settings(self.inner.param_groups, self.param_groups)
        self._keep_own()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def _copy_settings(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    for old, new in zip(source, target, strict=True):
        new.update({name: value for name, value in old.items() if name not in ("params", "param_names")})


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    return value


# --- Stage 2: the gradients -------------------------------------------------------------------------------------------


@torch.no_grad()
def reduce_to_owners(optimizer: ShardedOptimizer, share: float | None = None) -> None:
    """Sum ``share`` times each gradient on the rank that needs it, and drop it on the others (ZeRO stage 2).

    It takes the place of ``average_gradients``, with the same ``share``, before ``optimizer.step()``. A rank that has
    no gradient of a parameter counts as zero.
    """
    share = 1 / optimizer.world_size if share is None else share
    for p, owner in optimizer.owner.items():
        if p.requires_grad:
            whole = torch.zeros_like(p) if p.grad is None else p.grad * share
            whole = whole.contiguous()
            dist.reduce(whole, dst=owner)
            p.grad = whole if owner == optimizer.rank else None


# --- Memory: the formula, and the count -------------------------------------------------------------------------------


def memory_per_rank(
    parameters: int,
    world_size: int,
    stage: int,
    *,
    bytes_weight: float = 4,
    bytes_gradient: float = 4,
    bytes_state: float = 8,
) -> float:
    r"""Return the bytes of weights, gradients and optimizer state that one of N ranks holds at a stage of ZeRO.

    .. math::
        P\,(w + g + s), \quad P\,(w + g + \tfrac{s}{N}), \quad P\,(w + \tfrac{g + s}{N}), \quad P\,\tfrac{w + g + s}{N}

    for stages 0 (plain data parallelism) to 3, with P parameters and w, g and s bytes for each. The defaults are Adam
    in float32; with mixed precision w = g = 2 and s = 12 (weights in float32, two moments). Activations come on top.
    Source: Rajbhandari et al. 2019, arXiv:1910.02054, figure 1.

    Raises
    ------
    ValueError : ``parameters`` or a number of bytes is negative, ``world_size`` below 1, or ``stage`` not 0 to 3.
    """
    sizes = {"bytes_weight": bytes_weight, "bytes_gradient": bytes_gradient, "bytes_state": bytes_state}
    for name, value in {"parameters": parameters, **sizes}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be 0 or more")
    at_least(1, world_size=world_size)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage is {stage!r}; it must be 0, 1, 2 or 3")
    state = bytes_state / (world_size if stage >= 1 else 1)
    gradient = bytes_gradient / (world_size if stage >= 2 else 1)
    weight = bytes_weight / (world_size if stage >= 3 else 1)
    return parameters * (weight + gradient + state)


def local_bytes(value: Any) -> int:
    """Bytes that this rank holds of all tensors in ``value`` (nested containers); of a sharded one, its own part."""
    if isinstance(value, Tensor):
        part = value.to_local() if hasattr(value, "to_local") else value  # a DTensor has the size of the whole
        return part.numel() * part.element_size()
    if isinstance(value, Mapping):
        return sum(local_bytes(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(local_bytes(part) for part in value)
    return 0


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds after a step, and the trained model's whole weights."""

    weights: int
    gradients: int
    state: int
    trained: dict[str, Tensor]

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state


def measure_sharding(
    *, width: int = 256, depth: int = 5, batch_size: int = 64, steps: int = 3, dtype: torch.dtype = torch.float32
) -> dict[int, Memory]:
    """Train a perceptron with Adam at stages 0 to 3, and count the bytes of each; to be run by ``launch``.

    The stages see the same batches and end with the same weights. Stage 3 is torch's ``fully_shard``: between uses,
    each rank holds its rows of every weight.
    """
    with process_group() as world:
        x, y = next(batches(load("digits").train.to(world.device), batch_size, dtype=dtype))
        share = shard(x, y, world.rank, world.size)
        found = {}
        for stage, prepare in enumerate((_stage_0, _stage_1, _stage_2, _stage_3)):
            torch.manual_seed(0)
            model = mlp(x.shape[1:], 10, width=width, depth=depth).to(world.device, dtype)
            optimizer, gradient = prepare(model)
            for _ in range(steps):
                optimizer.zero_grad()
                gradient(*share, len(y))
                optimizer.step()
            gradients = [p.grad for p in model.parameters()]
            found[stage] = Memory(
                weights=local_bytes(list(model.parameters())),
                gradients=local_bytes(gradients),
                state=local_bytes(optimizer.state),
                trained={name: _whole(p.detach()).cpu() for name, p in model.named_parameters()},
            )
        return found


def _whole(p: Tensor) -> Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p


Stage = tuple[Optimizer, Callable[[Tensor, Tensor, int], None]]


def _stage_0(model: nn.Module) -> Stage:
    def gradient(x: Tensor, y: Tensor, total: int) -> None:
        local_loss(model, x, y, total).backward()
        average_gradients(model, share=1.0)

    return torch.optim.Adam(model.parameters(), lr=1e-3), gradient


def _stage_1(model: nn.Module) -> Stage:
    _, gradient = _stage_0(model)
    return ShardedOptimizer(model.parameters(), torch.optim.Adam, lr=1e-3), gradient


def _stage_2(model: nn.Module) -> Stage:
    optimizer = ShardedOptimizer(model.parameters(), torch.optim.Adam, lr=1e-3)

    def gradient(x: Tensor, y: Tensor, total: int) -> None:
        local_loss(model, x, y, total).backward()
        reduce_to_owners(optimizer, share=1.0)

    return optimizer, gradient


def _stage_3(model: nn.Module) -> Stage:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # here, since it takes as long to import as the rest of torch

    ranks = dist.get_world_size()
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks,))
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        fully_shard(layer, mesh=mesh)  # one layer at a time is gathered, used, and let go again
    fully_shard(model, mesh=mesh)

    def gradient(x: Tensor, y: Tensor, total: int) -> None:
        (local_loss(model, x, y, total) * ranks).backward()  # it takes the mean over ranks

    return torch.optim.Adam(model.parameters(), lr=1e-3), gradient
