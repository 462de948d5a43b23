r"""Serving: requests come when they like; how many are answered at once decides how long each waits.

=======================  =============================================================  ================================
name                     what it does or gives                                          source
=======================  =============================================================  ================================
``poisson_arrivals``     times of requests that know nothing of each other              Kleinrock 1975
``Affine``               seconds of a batch, :math:`a + b\,n`, fitted to measured ones  Crankshaw et al. 2017 (Clipper),
                                                                                        arXiv:1612.03079
``simulate``             when each request is answered, under a policy of batching
``one_at_a_time``        policy: no batches
``fixed_batch``          policy: wait until a batch is full
``dynamic_batch``        policy: until it is full or the oldest has waited enough       Clipper; Olston et al. 2017
                                                                                        (TensorFlow-Serving),
                                                                                        arXiv:1712.06139
``simulate_continuous``  requests of many steps: who is done leaves, who waits joins    Yu et al. 2022 (Orca), OSDI
``waiting_time``         the mean wait that theory foretells                            Pollaczek 1930, Khinchin 1932
``Batcher``              a thread that answers real requests in batches                 Clipper
=======================  =============================================================  ================================

A batch of n takes hardly longer than one request as long as starting it is what takes the time, so batches raise the
throughput; and who waits for a batch to fill waits longer. One server answers in the order of arrival; it is never
idle for want of policy in ``dynamic_batch(…, max_wait=0)``: then it takes what is there.
"""

from __future__ import annotations

import bisect
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.timing import Clock, measure

ServiceTime = Callable[[int], float]
"""``batch -> seconds``; may draw its answers."""

Policy = Callable[[Sequence[float], int, float], tuple[float, int]]
"""``(arrivals, first, free) -> (start, batch)``: the server is free from ``free`` on and has answered all requests
before number ``first``; when the next batch starts, and how many requests are in it."""

# --- Requests and their cost ------------------------------------------------------------------------------------------


def poisson_arrivals(rate: float, n: int, generator: torch.Generator | None = None) -> list[float]:
    """Return the times of n requests, in seconds from 0 on, ``rate`` a second in the
    mean.

    The gaps are exponentially distributed, which is what many independent users make: a
    Poisson process.
    """
    require("rate", rate, lambda r: is_number(r) and r > 0, "a number above 0")
    at_least(1, n=n)
    gaps = -torch.log1p(-torch.rand(n, generator=generator, dtype=torch.float64)) / rate
    return gaps.cumsum(0).tolist()


@dataclass(frozen=True)
class Affine:
    """Seconds of a batch: ``fixed`` to start it, ``each`` for a request in it."""

    fixed: float
    each: float

    def __call__(self, batch: int) -> float:
        """Return the seconds of a batch of so many requests."""
        return self.fixed + self.each * batch

    def capacity(self, batch: int) -> float:
        """Return the requests a second of batches of this size, one after the other: more than that pile up."""
        return batch / self(batch)


def fit_service(sizes: Sequence[int], seconds: Sequence[float]) -> Affine:
    """Return the line nearest to measured times of batches, by least squares of the
    relative errors; neither of its numbers is negative.

    Relative, since a time of ten milliseconds is off by more than one of a tenth.

    Raises
    ------
    ValueError : fewer than two sizes, or not a positive time for each of them.
    """
    require("sizes", [*sizes], lambda found: len(set(found)) > 1, "two batch sizes or more")
    allowed = f"{len(sizes)} positive numbers, one for each size"
    fits = len(seconds) == len(sizes) and all(t > 0 for t in seconds)
    require("seconds", [*seconds], lambda _: fits, allowed)
    line = np.column_stack([np.ones(len(sizes)), sizes])
    (fixed, each), _ = nnls(line / np.array(seconds)[:, None], np.ones(len(sizes)))
    return Affine(float(fixed), float(each))


@torch.no_grad()
def measure_service(
    fn: Callable[[Tensor], Any],
    example: Tensor,
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
    *,
    repeats: int = 7,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Return the median seconds of ``fn`` on batches of some sizes, made of an example
    ``[...]`` without gradients.
    """
    times = []
    for size in sizes:
        x = example.expand(size, *example.shape).contiguous()
        timing = measure(lambda x=x: fn(x), repeats=repeats, device=x.device, clock=clock)  # type: ignore[misc]
        times.append(timing.median)
    return times


# --- What comes of it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """When each request came, when its batch started, when it was answered, in seconds.

    Attributes
    ----------
    batches : from when to when the server worked, and on how many requests, ``(start, end, requests)``.
    """

    arrivals: tuple[float, ...] = field(repr=False)
    starts: tuple[float, ...] = field(repr=False)
    ends: tuple[float, ...] = field(repr=False)
    batches: tuple[tuple[float, float, int], ...] = field(repr=False)

    @property
    def latencies(self) -> np.ndarray:
        """Seconds from each request's coming to its answer."""
        return np.subtract(self.ends, self.arrivals)

    @property
    def waits(self) -> np.ndarray:
        """Seconds from each request's coming to the start of its batch."""
        return np.subtract(self.starts, self.arrivals)

    def percentile(self, share: float) -> float:
        """Return the latency that ``share`` percent of the requests do not pass: 50, 95, 99."""
        require("share", share, lambda p: is_number(p) and 0 <= p <= 100, "a number from 0 to 100")
        return float(np.percentile(self.latencies, share))

    @property
    def horizon(self) -> float:
        """Seconds from the first request to the last answer."""
        return max(self.ends) - min(self.arrivals)

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return len(self.arrivals) / self.horizon

    @property
    def utilisation(self) -> float:
        """The share of the time in which the server works."""
        return sum(end - start for start, end, _ in self.batches) / self.horizon

    @property
    def mean_batch(self) -> float:
        """Requests a batch, in the mean over batches."""
        return sum(size for *_, size in self.batches) / len(self.batches)

    def in_system(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the times at which somebody comes or goes, and how many are waiting or
        being answered after each.
        """
        times = np.concatenate([self.arrivals, self.ends])
        changes = np.repeat([1, -1], len(self.arrivals))
        order = np.argsort(times, kind="stable")
        return times[order], np.cumsum(changes[order])

    @property
    def mean_in_system(self) -> float:
        """How many are waiting or being answered, in the mean over the time.

        Little's law: the throughput times the mean latency, on any path that starts and
        ends empty (Little 1961, Operations Research 9(3)).
        """
        times, counts = self.in_system()
        return float(np.diff(times) @ counts[:-1]) / self.horizon


# --- Policies ---------------------------------------------------------------------------------------------------------


def one_at_a_time(arrivals: Sequence[float], first: int, free: float) -> tuple[float, int]:
    """Answer the next request as soon as there is one."""
    return max(free, arrivals[first]), 1


def fixed_batch(size: int) -> Policy:
    """Start when ``size`` requests are there, or when there will be no more."""
    at_least(1, size=size)

    def next_batch(arrivals: Sequence[float], first: int, free: float) -> tuple[float, int]:
        last = min(first + size, len(arrivals)) - 1
        return max(free, arrivals[last]), last - first + 1

    return next_batch


def dynamic_batch(max_batch: int, max_wait: float) -> Policy:
    """Start when ``max_batch`` requests are there, or when the oldest has waited
    ``max_wait`` seconds, with those that are there by then.
    """
    at_least(1, max_batch=max_batch)
    allowed = "a number of seconds, 0 or more"
    require("max_wait", max_wait, lambda s: is_number(s) and s >= 0, allowed)

    def next_batch(
        arrivals: Sequence[float],
        first: int,
        free: float,
    ) -> tuple[float, int]:
        full = first + max_batch - 1
        filled = arrivals[full] if full < len(arrivals) else float("inf")
        start = max(free, min(filled, arrivals[first] + max_wait))
        waiting = bisect.bisect_right(arrivals, start) - first
        return start, min(waiting, max_batch)

    return next_batch


# --- Simulation -------------------------------------------------------------------------------------------------------


def simulate(
    arrivals: Sequence[float],
    service_time: ServiceTime,
    policy: Policy,
    lengths: Sequence[int] | None = None,
) -> Served:
    """Return when each request is answered by one server that answers batches.

    Parameters
    ----------
    arrivals : in order.
    lengths : steps of each request, such as words to write; then ``service_time`` is
        that of a step, and a batch makes as many as its longest request needs.

    Raises
    ------
    ValueError : there are no arrivals, they are out of order, or have other lengths;
        or the policy makes an empty batch.
    """
    arrivals, steps = _checked(arrivals, lengths)
    starts, ends, batches = [], [], []
    first, free = 0, 0.0
    while first < len(arrivals):
        start, size = policy(arrivals, first, free)
        at_least(1, batch=size)
        free = start + max(steps[first : first + size]) * service_time(size)
        starts += [start] * size
        ends += [free] * size
        batches.append((start, free, size))
        first += size
    return Served(tuple(arrivals), tuple(starts), tuple(ends), tuple(batches))


def simulate_continuous(
    arrivals: Sequence[float],
    lengths: Sequence[int],
    step_time: ServiceTime,
    max_batch: int,
) -> Served:
    """Return the same when requests join and leave between any two steps.

    A batch of the result is one step. Source: Yu et al. 2022 (Orca), OSDI.
    """
    at_least(1, max_batch=max_batch)
    arrivals, steps = _checked(arrivals, lengths)
    starts, ends, batches = [0.0] * len(steps), [0.0] * len(steps), []
    at_work: set[int] = set()
    now, first = 0.0, 0
    while at_work or first < len(arrivals):
        now = now if at_work else max(now, arrivals[first])
        while _may_join(arrivals, first, now) and len(at_work) < max_batch:
            at_work.add(first)
            starts[first], first = now, first + 1
        begin, now = now, now + step_time(len(at_work))
        batches.append((begin, now, len(at_work)))
        for request in list(at_work):
            steps[request] -= 1
            if steps[request] == 0:
                at_work.remove(request)
                ends[request] = now
    return Served(tuple(arrivals), tuple(starts), tuple(ends), tuple(batches))


def _may_join(arrivals: Sequence[float], first: int, now: float) -> bool:
    return first < len(arrivals) and arrivals[first] <= now


def _checked(arrivals: Sequence[float], lengths: Sequence[int] | None) -> tuple[list[float], list[int]]:
    """Copies of both; a step each without lengths."""
    found = [float(t) for t in arrivals]
    require("arrivals", found[:5], bool, "one time or more")
    require("arrivals", [*found[:5], "..."], lambda _: found == sorted(found), "times in order")
    steps = [1] * len(found) if lengths is None else [*lengths]
    require("lengths", len(steps), len(found).__eq__, f"as many as there are arrivals, {len(found)}")
    at_least(1, **{"min(lengths)": min(steps)})
    return found, steps


# --- Theory -----------------------------------------------------------------------------------------------------------


def waiting_time(rate: float, mean: float, variance: float = 0.0) -> float:
    r"""Return the mean seconds that a request waits for its start, one at a time, when
    requests come by a Poisson process: the formula of Pollaczek and Khinchin.

    .. math:: W = \frac{\lambda\,(\sigma^2 + s^2)}{2\,(1 - \lambda s)}

    With the server's load :math:`\rho = \lambda s` near 1 waiting has no end. Equal
    times (variance 0, M/D/1) halve it against exponential ones (variance :math:`s^2`,
    M/M/1).

    Parameters
    ----------
    rate : requests a second.
    mean, variance : of the seconds that answering one takes.

    Raises
    ------
    ValueError : a number is negative, or the load is 1 or more.
    """
    for name, value in (("rate", rate), ("mean", mean), ("variance", variance)):
        require(name, value, lambda x: is_number(x) and x >= 0, "a number of 0 or more")
    allowed = "below 1, or requests pile up"
    require("rate * mean", rate * mean, lambda load: load < 1, allowed)
    return rate * (variance + mean**2) / (2 * (1 - rate * mean))


# --- For real ---------------------------------------------------------------------------------------------------------


class Closed(RuntimeError):
    """A request came after the batcher was closed."""


class Batcher:
    """Answers requests of many threads in batches, by one thread of its own.

    >>> with Batcher(model, max_batch=16, max_wait=0.002) as batcher:
    ...     answer = batcher.submit(x).result()  # x: one example, [...]

    Leaving the block answers what is still waiting and ends the thread.

    Parameters
    ----------
    fn : ``[B, ...] -> [B, ...]``, a row for each example. Called without gradients; what it raises, all requests of
        its batch raise.
    max_batch : requests in a batch at most.
    max_wait : seconds that the first of a batch waits for others; with 0 a batch is what has come during the last one.
    clock : seconds that pass.

    Raises
    ------
    ValueError : a setting is out of its range.
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        *,
        max_batch: int = 16,
        max_wait: float = 0.0,
        clock: Clock = time.monotonic,
    ) -> None:
        at_least(1, max_batch=max_batch)
        require("max_wait", max_wait, lambda s: is_number(s) and s >= 0, "a number of seconds, 0 or more")
        self.fn, self.max_batch, self.max_wait, self._clock = fn, max_batch, max_wait, clock
        self._like: tuple[torch.Size, torch.dtype, torch.device] | None = None
        self._waiting: queue.SimpleQueue[tuple[Tensor, Future[Tensor]] | None] = queue.SimpleQueue()
        self._open, self._door = True, threading.Lock()
        self._thread = threading.Thread(target=self._work, name="Batcher", daemon=True)
        self._thread.start()

    def submit(self, x: Tensor) -> Future[Tensor]:
        """Hand in one example ``[...]``; its row of the answer is in the future.

        Raises
        ------
        Closed : the batcher was closed.
        ValueError : the example is not like the first one (shape, type, device): they could not be stacked.
        """
        future: Future[Tensor] = Future()
        with self._door:  # nothing comes behind the sign that closes
            if not self._open:
                raise Closed("the batcher is closed; make a new one")
            like = (x.shape, x.dtype, x.device)
            self._like = self._like or like
            require("x", like, self._like.__eq__, f"as the first example, {self._like}")
            self._waiting.put((x, future))
        return future

    def close(self) -> None:
        """Answer what is waiting, and end the thread; nothing happens the second time."""
        with self._door:
            if self._open:
                self._open = False
                self._waiting.put(None)
        self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _work(self) -> None:
        """Answer batch after batch, until the sign that closes."""
        more = True
        while more:
            batch, more = self._gather()
            batch = [(x, f) for x, f in batch if f.set_running_or_notify_cancel()]
            if batch:
                _answer(self.fn, batch)

    def _gather(self) -> tuple[list[tuple[Tensor, Future[Tensor]]], bool]:
        """Wait for a request, then for others until the batch is full or the time is
        over; whether there may be more.
        """
        item = self._waiting.get()
        batch: list[tuple[Tensor, Future[Tensor]]] = []
        until = self._clock() + self.max_wait
        while item is not None:
            batch.append(item)
            if len(batch) == self.max_batch:
                return batch, True
            left = until - self._clock()
            try:
                item = self._waiting.get(left > 0, max(left, 0))
            except queue.Empty:
                return batch, True
        return batch, False


@torch.no_grad()
def _answer(fn: Callable[[Tensor], Tensor], batch: Sequence[tuple[Tensor, Future[Tensor]]]) -> None:
    """Call the function once, and give each request its row, or the error."""
    try:
        rows = fn(torch.stack([x for x, _ in batch]))
        allowed = f"a row for each of {len(batch)} examples"
        require("rows of fn", len(rows), len(batch).__eq__, allowed)
    except Exception as error:
        for _, future in batch:
            future.set_exception(error)
        return
    for row, (_, future) in zip(rows, batch, strict=True):
        future.set_result(row)
