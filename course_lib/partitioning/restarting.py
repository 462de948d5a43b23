"""Checkpoints in shards: each rank of a network that is cut writes its own part, and a run goes on where all have one.

===============  =====================================================================================================
name             what it does
===============  =====================================================================================================
``Restart``      where and how often a run writes; and a rank that is to die, to see that the run goes on
``save_shard``   writes a rank's part
``load_shard``   takes it up
===============  =====================================================================================================

torch's own, which can be read by another number of ranks, is ``torch.distributed.checkpoint``.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from course_lib.lab.arguments import at_least
from course_lib.parallel.launching import World


@dataclass(frozen=True)
class Restart:
    """How a run of several ranks outlives one of them.

    Attributes
    ----------
    checkpoint : a folder that all ranks can reach, or None; each writes its part there ``every`` so many steps. A run
        that finds one goes on from it, and ends with the same weights as if nothing had happened.
    kill_rank, kill_at : this rank kills itself before that step, counted from 0.

    Raises
    ------
    ValueError : ``every`` is below 1.
    """

    checkpoint: str | Path | None = None
    every: int = 5
    kill_rank: int | None = None
    kill_at: int = 0

    def __post_init__(self) -> None:
        at_least(1, every=self.every)

    def history(self, world: World, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> list[Any]:
        """Take up what there is; return an entry for each step that was done."""
        return load_shard(self.checkpoint, world, weights, optimizer) if self.checkpoint else []

    def before(self, step: int, world: World) -> None:
        """Die, if it is time."""
        if world.rank == self.kill_rank and step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)  # as when memory runs out: no handler, nothing flushed

    def after(
        self, world: World, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, history: list[Any]
    ) -> None:
        """Write, if it is time."""
        if self.checkpoint and len(history) % self.every == 0:
            save_shard(self.checkpoint, world, weights, optimizer, history)


def save_shard(
    folder: str | Path, world: World, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, history: list[Any]
) -> None:
    """Write this rank's part; it counts once all have written theirs, and only then the one before is removed.

    ``history`` has an entry for each step so far.

    A rank that dies in between leaves a shard that nobody will read: the file ``latest`` still names the step before.
    """
    from course_lib.parallel.resuming import save_atomically  # a script too: python -m warns of one imported before

    folder, step = Path(folder), len(history)
    state = {"weights": weights, "optimizer": optimizer.state_dict(), "history": history}
    save_atomically(state, _shard(folder, step, world.rank))
    dist.barrier()  # all shards of this step are on the disk
    if world.rank == 0:
        save_atomically({"step": step, "ranks": world.size}, folder / "latest")
    dist.barrier()  # and all know it
    for old in folder.glob(f"step-*-rank-{world.rank}.pt"):
        if old != _shard(folder, step, world.rank):
            old.unlink()


def load_shard(
    folder: str | Path, world: World, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> list[Any]:
    """Take up this rank's part of the newest checkpoint, if there is one; return the history so far.

    Raises
    ------
    ValueError : the checkpoint was written by another number of ranks, or for other parts of a network.
    """
    folder = Path(folder)
    if not (folder / "latest").exists():
        return []
    latest = torch.load(folder / "latest")
    if latest["ranks"] != world.size:
        raise ValueError(f"checkpoint={str(folder)!r} has {latest['ranks']} ranks: must be read by as many")
    state = torch.load(_shard(folder, latest["step"], world.rank), map_location=world.device)
    if state["weights"].keys() != weights.keys():
        raise ValueError(f"checkpoint={str(folder)!r} has other parts: must be read with the same network and cuts")
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(state["weights"][name])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["history"])


def _shard(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step-{step:06d}-rank-{rank}.pt"
