"""Training that survives the death of a process: checkpoints, and a launcher that starts all ranks anew.

======================  =============================================================================================
name                    what it does
======================  =============================================================================================
``train_resumably``     trains on all ranks; rank 0 writes a checkpoint every few steps; a new life goes on from it
``read_lives``          tells how often a run was started anew, and from which step
``save_atomically``     writes a file so that a kill at any moment leaves the old one or the new one, whole
``run_under_torchrun``  runs a module under torch's elastic launcher (``torchrun``), and cleans up behind it
======================  =============================================================================================

When one rank dies the others cannot go on, for they wait for its gradients. ``torchrun`` ends them and starts all anew,
up to ``--max-restarts`` times. All that the script has to do is to find out how far it came. To see it happen, let
rank 1 kill itself in its first life:

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 2 \\
        -m course_lib.parallel.resuming --checkpoint /tmp/run.pt --steps 60 --kill-rank 1 --kill-at 25

The variable works around a fault of torch (github.com/pytorch/pytorch/issues/135712): without it the ranks of the
second life may read the addresses of the first from the store where they meet, and find nobody there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import course_lib
from course_lib.lab.arguments import at_least
from course_lib.lab.data import Split, load, normalise
from course_lib.parallel.data_parallel import average_gradients, local_loss, shard
from course_lib.parallel.data_parallel_runs import replica
from course_lib.parallel.launching import World, process_group

# --- The training script ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed:
    """What a run leaves behind: weights, the loss of every step, and its lives (see `read_lives`)."""

    weights: dict[str, Tensor]
    losses: list[float]
    lives: list[dict[str, int]]


def train_resumably(
    checkpoint: str | Path,
    *,
    steps: int = 60,
    every: int = 10,
    batch_size: int = 61,
    seed: int = 0,
    kill_rank: int | None = None,
    kill_at: int = 0,
) -> Resumed:
    """Train a perceptron in float64 on the digits, on all ranks, going on from ``checkpoint`` where it exists.

    To be run by ``launch`` or ``torchrun``. However often it is interrupted, the weights come out bit for bit the same,
    because each step's batch depends on the seed and the number of the step alone.

    Parameters
    ----------
    checkpoint : a file that all ranks can read; rank 0 writes it ``every`` so many steps, and after the last.
    kill_rank, kill_at : this rank kills itself before that step (counted from 0), in the first life only.

    Raises
    ------
    ValueError : ``steps`` or ``every`` is not positive, or the checkpoint is of another run.
    """
    at_least(1, steps=steps, every=every)
    life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    with process_group() as world:
        data = load("digits").to(world.device)
        model = replica("mlp", data.input_shape, len(data.classes), seed=seed).to(world.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        progress: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "losses": []}
        restore(Path(checkpoint), model, optimizer, progress)
        if len(progress["losses"]) > steps:
            raise ValueError(f"steps is {steps}; checkpoint={str(checkpoint)!r} has {len(progress['losses'])} already")
        lives = note_life(Path(checkpoint), {"life": life, "started_at": len(progress["losses"])}, world)
        for step in range(len(progress["losses"]), steps):
            if world.rank == kill_rank and step == kill_at and life == 0:
                os.kill(os.getpid(), signal.SIGKILL)  # no handler runs, nothing is flushed: as when memory runs out
            x, y = batch_of_step(data.train, batch_size, seed, step)
            optimizer.zero_grad()
            loss = local_loss(model, *shard(x, y, world.rank, world.size), len(y))
            loss.backward()
            average_gradients(model, share=1.0)
            optimizer.step()
            loss = loss.detach()
            dist.all_reduce(loss)
            progress["losses"].append(loss.item())
            if world.rank == 0 and ((step + 1) % every == 0 or step + 1 == steps):
                save_atomically(
                    progress | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint
                )
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        return Resumed(weights, progress["losses"], lives)


def batch_of_step(split: Split, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of one step: float64 ``[B, C, H, W]`` and labels ``[B]``, whatever came before."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.randint(len(split), (batch_size,), generator=generator).to(split.device)
    return normalise(split.images[chosen], split).double(), split.labels[chosen]


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Take up the state of the checkpoint if there is one."""
    if not path.exists():
        return
    try:
        state = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
        found = {name: state[name] for name in progress}
    except Exception as error:
        raise ValueError(f"checkpoint={str(path)!r} cannot be read as a checkpoint: {error}") from error
    for name in ("seed", "batch_size"):
        if found[name] != progress[name]:
            raise ValueError(
                f"checkpoint={str(path)!r} was written with {name}={found[name]}, this run has "
                f"{name}={progress[name]}: use another file, or the same settings"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    progress["losses"] = found["losses"]


def save_atomically(state: dict[str, Any], path: str | Path) -> None:
    """Write beside the file, force it to the disk, then put it in place in one step."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def note_life(checkpoint: Path, row: dict[str, int], world: World) -> list[dict[str, int]]:
    """Add this life to the list beside the checkpoint, and return all lives so far. No rank goes on before that."""
    if world.rank == 0:
        new = row["life"] == row["started_at"] == 0
        with open(_log(checkpoint), "w" if new else "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    dist.barrier()  # all have read the checkpoint: from now on rank 0 may replace it
    return read_lives(checkpoint)


def read_lives(checkpoint: str | Path) -> list[dict[str, int]]:
    """Return the lives of a run, from the list beside its checkpoint: the ``life``, and the step it ``started_at``."""
    return [json.loads(line) for line in _log(Path(checkpoint)).read_text(encoding="utf-8").splitlines()]


def _log(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".lives")


# --- The launcher -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a run of ``torchrun`` ended: its exit code (0 is success), and what it and all ranks printed."""

    exit_code: int
    output: str


def run_under_torchrun(
    module: str, *arguments: str, processes: int = 2, max_restarts: int = 0, timeout: float = 120.0
) -> Outcome:
    """Run ``python -m module arguments`` in ``processes`` ranks under ``torchrun``, on this machine.

    However it ends, none of its processes and log files is left.

    Raises
    ------
    TimeoutError : it had not ended after ``timeout`` seconds; the message has the end of its output.
    """
    options = [
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={max_restarts}",
        "--monitor-interval=0.1",
    ]
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "output", "w+b") as output:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *options,
            f"--log-dir={folder}",
            "-m",
            module,
            *arguments,
        ]
        agent = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=_environment(), start_new_session=True
        )
        try:
            exit_code: int | None = agent.wait(timeout)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            _end(agent)
        output.seek(0)
        printed = output.read().decode(errors="replace")
    if exit_code is None:
        raise TimeoutError(f"torchrun had not ended after {timeout:g} seconds. It last printed:\n{printed[-2000:]}")
    return Outcome(exit_code, printed)


def _environment() -> dict[str, str]:
    """Return this process's environment, with the course on the path and a new meeting point in each life (see top)."""
    root = str(Path(course_lib.__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _end(agent: subprocess.Popen[bytes], grace: float = 10.0) -> None:
    """End torchrun and its ranks: politely, so that it ends the ranks; then all that is still there, by force."""
    if agent.poll() is not None:
        return
    ranks = _descendants(agent.pid)  # found now, since orphans can be told from others no longer
    agent.terminate()
    with suppress(subprocess.TimeoutExpired):
        agent.wait(grace)
    for pid in (agent.pid, *ranks):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    agent.wait()


def _descendants(pid: int) -> list[int]:
    """Find the processes that ``pid`` has started, and those that they have."""
    if Path("/proc/self/stat").exists():  # Linux, also where `ps` is not installed
        parents = dict(_parent_of(folder) for folder in Path("/proc").glob("[0-9]*"))
    else:
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = {int(child): int(parent) for child, parent in map(str.split, table.splitlines())}
    found = [pid]
    for ancestor in found:  # the list grows while it is read
        found += [child for child, parent in parents.items() if parent == ancestor]
    return found[1:]


def _parent_of(process: Path) -> tuple[int, int]:
    try:
        after_name = (process / "stat").read_text().rpartition(")")[2]
        return int(process.name), int(after_name.split()[1])
    except (OSError, IndexError):  # it has just ended
        return int(process.name), 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank of the script; rank 0 reports."""
    parser = argparse.ArgumentParser(description="Train on all ranks of torchrun; go on from the checkpoint.")
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill-rank", type=int, help="this rank kills itself in its first life …")
    parser.add_argument("--kill-at", type=int, default=0, help="… before this step")
    run = train_resumably(**vars(parser.parse_args(arguments)))
    if os.environ.get("RANK", "0") == "0":
        for row in run.lives:
            print(f"life {row['life']} started at step {row['started_at']}")
        print(f"{len(run.losses)} steps, loss {run.losses[0]:.4f} at first, {run.losses[-1]:.4f} at last")


if __name__ == "__main__":
    main()
