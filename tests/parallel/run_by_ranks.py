"""What the processes of test_parallel.py run, and how to find what they left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from course_lib import parallel
from course_lib.parallel import process_group

# --- For the launcher -------------------------------------------------------------------------------------------------


def gather(offset: int = 0) -> tuple[int, int, list[float]]:
    """The rank, the size of the world, and a sum that needed all ranks."""
    with process_group() as world:
        x = torch.tensor([1.0, world.rank, 10.0**world.rank]) + offset
        dist.all_reduce(x)
        return world.rank, world.size, x.tolist()


def gather_in_two_groups(pause: float = 0.2) -> list[list[float]]:
    """One group after another, which the ranks do not enter and leave at the same time."""
    first = gather()
    time.sleep(pause * first[0])
    return [first[2], gather(1)[2]]


def environment(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in names} | {"threads": str(torch.get_num_threads())}


def echo(*args: Any) -> Any:
    return args


def imported(*names: str) -> list[bool]:
    return [name in sys.modules for name in names]


def lone() -> tuple[int, int]:
    with process_group(backend="gloo") as world:
        return world.rank, world.size


def explode(culprit: int) -> None:
    """One rank raises; the others then fail for want of it."""
    with process_group() as world:
        dist.barrier()
        if world.rank == culprit:
            raise KeyError("the culprit's own words")
        dist.all_reduce(torch.ones(3))


def explode_apart(culprit: int) -> None:
    """One rank raises, and the others do not notice."""
    if int(os.environ["RANK"]) == culprit:
        raise KeyError("the culprit's own words")
    time.sleep(60)


def die(culprit: int, how: str) -> None:
    """One rank is gone without a word; the others then fail for want of it."""
    with process_group() as world:
        dist.barrier()
        if world.rank == culprit:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3 if how == "exit 3" else 0)
        dist.all_reduce(torch.ones(3))


def hang(sleeper: int, folder: str | None = None) -> None:
    """One rank sleeps, the others wait for it; each leaves its process id in the folder, if there is one."""
    with process_group() as world:
        if folder:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (Path(folder) / f"{world.rank}.partial").write_text(f"{os.getpid()} {child.pid}")
            (Path(folder) / f"{world.rank}.partial").rename(Path(folder) / f"{world.rank}.pid")
        if world.rank == sleeper:
            oversleep()
        dist.all_reduce(torch.ones(3))


def oversleep() -> None:
    time.sleep(600)


def linger() -> str:
    """Return, but leave a thread behind that keeps the process from ending."""
    threading.Thread(target=oversleep).start()
    return "done"


def add_to(tensor: Tensor, parameter: Tensor) -> bool:
    """Add ten to the number that belongs to this rank, in memory that may be shared."""
    rank = int(os.environ["RANK"])
    with torch.no_grad():
        tensor[rank] += 10
        parameter[rank] += 10
    return tensor.is_shared()


def tensors() -> dict[str, Any]:
    large = torch.arange(10_000_000, dtype=torch.float32)
    weight = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    strided = torch.arange(6.0).view(2, 3).t()
    return {"large": large, "view": large[5:7], "weight": weight, "strided": strided, "empty": torch.zeros(0, 4)}


def unpicklable() -> Callable[[], int]:
    return lambda: 1


# --- For the collectives ----------------------------------------------------------------------------------------------


def vector(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings: the same in every process that asks."""
    generator = torch.Generator().manual_seed(1000 * size + rank)
    x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return x.view(2, -1) if size % 2 == 0 else x  # a matrix too; of size 0 as well


def run_collectives(sizes: list[int], dtypes: list[torch.dtype]) -> dict[tuple[int, torch.dtype], dict[str, Any]]:
    """Every collective on every size and type: the results and the traffic of this rank."""
    found = {}
    with process_group() as world:
        for size in sizes:
            for dtype in dtypes:
                found[size, dtype] = _collectives(vector(world.rank, size, dtype), world.size)
    return found


def _collectives(x: Tensor, world_size: int) -> dict[str, Any]:
    results: dict[str, Any] = {"torch": x.clone()}
    dist.all_reduce(results["torch"])
    for name, all_reduce in (("ring", parallel.ring_all_reduce), ("tree", parallel.tree_all_reduce)):
        y = x.clone()
        with parallel.traffic() as count:
            all_reduce(y)
        results[name], results[f"{name} traffic"] = y, asdict(count)
    y = x.clone()
    chunk = parallel.ring_reduce_scatter(y)
    results["chunk"] = chunk.clone()
    results["chunk is a view"] = chunk.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    for root in range(world_size):
        results[f"broadcast {root}"], results[f"reduce {root}"] = x.clone(), x.clone()
        parallel.broadcast(results[f"broadcast {root}"], root)
        parallel.reduce(results[f"reduce {root}"], root)
    return results


def all_gather(size: int) -> tuple[Tensor, Tensor]:
    """A vector of which each rank knows its own chunk; the same after the all-gather."""
    with process_group() as world:
        x = torch.full((size,), -1.0)
        x.tensor_split(world.size)[(world.rank + 1) % world.size].fill_(world.rank)
        before = x.clone()
        parallel.ring_all_gather(x)
        return before, x


def nested_counts() -> list[dict[str, int]]:
    """Three counters: around all, around the first of two all-reduces, and one after both."""
    with process_group():
        with parallel.traffic() as outer:
            with parallel.traffic() as inner:
                parallel.ring_all_reduce(torch.ones(4))
            parallel.ring_all_reduce(torch.ones(4))
        with parallel.traffic() as late:
            pass
        return [asdict(count) for count in (outer, inner, late)]


def bad_arguments() -> list[str]:
    """The messages of wrong calls, and a parameter that is added up although it requires a gradient."""
    messages = []
    with process_group() as world:
        for call in (
            lambda: parallel.broadcast(torch.ones(2), world.size),
            lambda: parallel.reduce(torch.ones(2), -1),
            lambda: parallel.ring_all_reduce(torch.ones(2, 3).t()),
        ):
            try:
                call()
            except ValueError as error:
                messages.append(str(error))
        parameter = torch.nn.Parameter(torch.ones(3))
        parallel.ring_all_reduce(parameter)
        messages.append(str(parameter.tolist()))
    return messages


# --- What a launch may leave behind: nothing --------------------------------------------------------------------------


def processes() -> dict[int, int]:
    """Parents by process, of the whole machine; those that have ended and wait to be collected left out."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue  # ended just now
            if state != "Z":
                found[int(folder.name)] = int(parent)
    return found


def descendants() -> set[int]:
    """Our processes, without the two helpers of multiprocessing that stay for the next launch."""
    parents = processes()
    ours, found = {os.getpid()}, set()
    while new := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= new
        for pid in new:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            helper = b"multiprocessing.forkserver" in command or b"multiprocessing.resource_tracker" in command
            if not (helper and parents[pid] == os.getpid()):
                found.add(pid)
    return found


def listening() -> set[str]:
    """The listening TCP sockets of this process."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if Path(table).exists():
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
            inodes |= {f"socket:[{row[9]}]" for row in rows if row[3] == "0A"}
    return inodes & set(open_files())


def open_files() -> list[str]:
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except OSError:
            continue  # the listing's own
    return sorted(found)


def shared_memory() -> set[str]:
    """Files that a process of torch which is ours, or is no more, has in shared memory."""
    names = {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").exists() else set()
    alive = set(processes()) - {os.getpid()}
    return {name for name in names if (pid := re.match(r"torch_(\d+)_", name)) and int(pid[1]) not in alive}


if __name__ == "__main__":
    found = gather(offset=2)
    (Path(sys.argv[1]) / f"{found[0]}.json").write_text(json.dumps(found))
