"""Feeding the network and using one machine's cores: loader processes, threads, pinned memory.

====================  ============================================================================================
name                  what it measures
====================  ============================================================================================
measure_loading       examples a second from a ``DataLoader`` with 0, 1, 2, … worker processes, and in whole batches
measure_threads       seconds of a training step of networks of several sizes on 1, 2, … threads
measure_pinned        how many times as fast pinned memory is copied to a GPU
====================  ============================================================================================

All of it is wall-clock time of this machine. Sources: the pages ``torch.utils.data`` (multi-process loading, memory
pinning) and "CPU threading" of torch's documentation.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Examples

from course_lib.lab.data import Split, batches, normalise
from course_lib.lab.models import mlp
from course_lib.lab.timing import compare_speed

# --- Loading ----------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, angles: Tensor, pixels: int) -> Tensor:
    """Turn images [B, C, H, W] by ``angles`` [B] in radians and resize them: [B, C, pixels, pixels]."""
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    maps = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(maps, [len(x), x.shape[1], pixels, pixels], align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def random_rotation(x: Tensor, generator: torch.Generator | None = None, *, pixels: int = 96) -> Tensor:
    """Turn each image of a batch by its own angle of up to 15 degrees, and enlarge it: work worth sharing."""
    angles = (2 * torch.rand(len(x), generator=generator) - 1) * math.pi / 12
    return rotated(x, angles.to(x), pixels)


class OneByOne(Examples[tuple[Tensor, int]]):
    """A split as most loaders see theirs: one example at a time, each transformed by itself."""

    def __init__(self, split: Split, pixels: int) -> None:
        self.split, self.pixels = split, pixels

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = normalise(self.split.images[index : index + 1], self.split)
        return random_rotation(x, pixels=self.pixels)[0], int(self.split.labels[index])


def measure_loading(
    split: Split, workers: Sequence[int] = (0, 1, 2), *, batch_size: int = 100, pixels: int = 96
) -> pd.DataFrame:
    """Examples a second of one pass over ``split``, every image rotated and enlarged to ``pixels`` on the way.

    Returns
    -------
    A table with one row for each number of loader processes (0: the training process itself) and one for whole
    batches, ``course_lib``'s way: the ``first pass``, which includes starting the processes, and the ``second pass``.
    """
    split = split.to("cpu")
    rows = {}
    for count in workers:
        loader = DataLoader(
            OneByOne(split, pixels), batch_size, shuffle=True, num_workers=count, persistent_workers=count > 0
        )
        rows[f"one by one, {count} workers"] = [_examples_a_second(loader), _examples_a_second(loader)]
        del loader  # ends its processes
    draws = torch.Generator().manual_seed(0)
    augment = partial(random_rotation, pixels=pixels)
    rows["whole batches"] = [
        _examples_a_second(batches(split, batch_size, generator=draws, augment=augment)) for _ in range(2)
    ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["first pass", "second pass"])


def _examples_a_second(loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    started = time.perf_counter()
    examples = sum(len(y) for _, y in loader)
    return examples / (time.perf_counter() - started)


# --- Threads ----------------------------------------------------------------------------------------------------------


def measure_threads(
    widths: Sequence[int] = (64, 256, 1024),
    threads: Sequence[int] = (1, 2),
    *,
    batch_size: int = 100,
    repeats: int = 15,
) -> pd.DataFrame:
    """Seconds of a training step of MLPs, a row for each width and a column for each number of threads.

    Medians of ``repeats`` rounds, in each of which all numbers of threads have their turn. The number of threads that
    torch had is given back to it at the end.
    """
    before = torch.get_num_threads()
    rows = []
    try:
        for width in widths:
            step = _training_step(width, batch_size)
            rounds = [[_seconds_with(count, step) for count in threads] for _ in range(repeats)]
            rows.append([statistics.median(times) for times in zip(*rounds, strict=True)])
    finally:
        torch.set_num_threads(before)
    return pd.DataFrame(rows, index=pd.Index(widths, name="width"), columns=pd.Index(threads, name="threads"))


def _seconds_with(threads: int, step: Callable[[], None], warm_up: int = 2, steps: int = 3) -> float:
    torch.set_num_threads(threads)
    for _ in range(warm_up):
        step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


def _training_step(width: int, batch_size: int) -> Callable[[], None]:
    model = mlp((1, 8, 8), 10, width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x, y = torch.zeros(batch_size, 1, 8, 8), torch.zeros(batch_size, dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


# --- Copies to a GPU --------------------------------------------------------------------------------------------------


def measure_pinned(megabytes: int = 64) -> float | None:
    """How many times as long a copy to the GPU takes from ordinary memory as from pinned; None without CUDA.

    The GPU fetches pinned memory by itself; ordinary memory is first copied into a pinned buffer.
    """
    if not torch.cuda.is_available():
        return None
    ordinary = torch.zeros(megabytes * 2**20, dtype=torch.uint8)
    pinned = ordinary.pin_memory()
    return compare_speed(lambda: ordinary.to("cuda"), lambda: pinned.to("cuda"), device="cuda").ratio
