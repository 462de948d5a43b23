"""Measuring time and memory honestly: warm-up, medians with quartiles, interleaved comparisons, a synchronised device.

| function | what it gives |
| --- | --- |
| `measure` | seconds of one call: the median of many, and the quartiles around it |
| `compare_speed` | how many times as long A takes as B, measured in turns |
| `peak_memory` | bytes that torch held at the peak, above what it held at the start |

A wall-clock time says as much about the machine as about the code, so notebooks claim ratios, and with a margin.
"""

import gc
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from course_lib.lab.arguments import at_least

Clock = Callable[[], float]
_CHATTER = re.compile(rb"(USDT:|\[W)[^\n]*(SyncActivityProfilerHandler|CPUAllocator)\.cpp[^\n]*\n")


@dataclass(frozen=True, repr=False)
class Timing:
    """Seconds of one call: the median over ``repeats`` calls and the quartiles ``low`` and ``high``."""

    median: float
    low: float
    high: float
    repeats: int

    def __repr__(self) -> str:
        scale, unit = _unit(self.median)
        low, middle, high = (f"{value * scale:.3g}" for value in (self.low, self.median, self.high))
        return f"{middle} {unit} ({low} to {high}, {self.repeats} repeats)"


@dataclass(frozen=True, repr=False)
class SpeedRatio:
    """Time of A over time of B: the median over ``rounds`` pairs and the quartiles ``low`` and ``high``."""

    ratio: float
    low: float
    high: float
    rounds: int
    a: Timing
    b: Timing
    names: tuple[str, str] = ("A", "B")

    def __repr__(self) -> str:
        a, b = self.names
        return (
            f"{a} takes {self.ratio:.2f}x the time of {b} ({self.low:.2f} to {self.high:.2f}, {self.rounds} "
            f"round{'' if self.rounds == 1 else 's'})"
        )


@dataclass(frozen=True)
class PeakMemory:
    """``bytes`` that torch held at the peak above the start, and the ``result`` of the call."""

    bytes: int
    result: Any = field(repr=False)


def measure(
    fn: Callable[[], Any],
    *,
    warmup: int = 3,
    repeats: int = 20,
    device: torch.device | str | None = None,
    clock: Clock = time.perf_counter,
) -> Timing:
    """Time ``fn()``: ``warmup`` uncounted calls, then the median and quartiles of ``repeats`` calls, in seconds.

    ``device`` (the laboratory's by default) is synchronised before the clock is read, so that work which a GPU has
    only queued is counted. Garbage collection is off meanwhile.
    """
    at_least(0, warmup=warmup)
    at_least(1, repeats=repeats)
    device = _device(device)
    for _ in range(warmup):
        fn()
    with _no_garbage_collection():
        return _timing([_seconds(fn, device, clock) for _ in range(repeats)])


def compare_speed(
    a: Callable[[], Any],
    b: Callable[[], Any],
    *,
    rounds: int = 15,
    warmup: int = 3,
    device: torch.device | str | None = None,
    names: tuple[str, str] = ("A", "B"),
    clock: Clock = time.perf_counter,
) -> SpeedRatio:
    """Time of ``a()`` over time of ``b()``, measured in turns so that both meet the same machine.

    A machine that slows down while it is measured would favour whoever went first, so the turns alternate:
    A B, B A, A B, … The ratio is the median of the rounds' own ratios, with quartiles.
    """
    at_least(0, warmup=warmup)
    at_least(1, rounds=rounds)
    device = _device(device)
    for _ in range(warmup):
        a()
        b()
    pairs = []
    with _no_garbage_collection():
        for round_ in range(rounds):
            if round_ % 2 == 0:
                of_a = _seconds(a, device, clock)
                of_b = _seconds(b, device, clock)
            else:
                of_b = _seconds(b, device, clock)
                of_a = _seconds(a, device, clock)
            pairs.append((of_a, of_b))
    low, ratio, high = _quartiles([of_a / max(of_b, sys.float_info.min) for of_a, of_b in pairs])
    times_a, times_b = zip(*pairs, strict=True)
    return SpeedRatio(ratio, low, high, rounds, _timing(times_a), _timing(times_b), names)


def peak_memory(fn: Callable[[], Any], *, device: torch.device | str | None = None) -> PeakMemory:
    """Bytes that torch held during ``fn()`` at the peak, above what it held before, and what ``fn`` returned.

    On the CPU every allocation of ``fn`` and its release is counted, to the byte (by torch's profiler, which slows
    ``fn`` down: never time inside it); releasing tensors older than the call makes no room there. On CUDA it is the
    caching allocator's own peak counter, which rounds each tensor up to 512 bytes.
    """
    device = _device(device)
    gc.collect()  # a release of older garbage during the call would hide an allocation of the same size
    if device.type == "cuda":
        _synchronise(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = fn()
        _synchronise(device)
        return PeakMemory(torch.cuda.max_memory_allocated(device) - before, result)
    if device.type != "cpu":
        raise ValueError(f"device: {device} keeps no record of its peak memory; allowed are cpu and cuda")
    with _without_profiler_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = fn()
    tree: Any = profiler.profiler.kineto_results.experimental_event_tree()
    return PeakMemory(_highest(_allocations(tree)), result)


def _allocations(tree: Iterable[Any]) -> list[tuple[int, int]]:
    """Address and bytes of each allocation (and, negative, of each release) in the order in which they happened."""
    # The profiler's public event list folds them into the operators that made them, and so loses their order.
    found, waiting = [], list(tree)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda event: event[0])]


def _highest(changes: Iterable[tuple[int, int]]) -> int:
    """The most bytes held at once of what was allocated in ``changes``.

    Releases of anything else are passed over: torch guesses their size from what once lay at the same address.
    """
    held: dict[int, int] = {}
    now = highest = 0
    for address, size in changes:
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        highest = max(highest, now)
    return highest


def _seconds(fn: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    _synchronise(device)
    start = clock()
    fn()
    _synchronise(device)
    return clock() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _timing(seconds: Sequence[float]) -> Timing:
    low, median, high = _quartiles(seconds)
    return Timing(median, low, high, len(seconds))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _unit(seconds: float) -> tuple[float, str]:
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * scale >= 1:
            return scale, unit
    return 1e9, "ns"


def _device(device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    from course_lib.lab import runtime

    return runtime.device()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _without_profiler_chatter() -> Iterator[None]:
    """Hold stderr back, and pass it on without the lines (with the time of day) that the profiler adds in C++."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # no stderr at all, as under pythonw
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            held.seek(0)
            os.write(stderr, _CHATTER.sub(b"", held.read()))
            os.close(stderr)
