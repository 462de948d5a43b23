"""How far training scales: what communication costs, and what speed-up is left.

====================  ====================================================  ===========================================
name                  what it computes                                      source
====================  ====================================================  ===========================================
ring_time             seconds of a ring all-reduce                          Patarasuk & Yuan, JPDC 69(2), 2009
tree_time             of a reduction to one worker and a broadcast back     Thakur, Rabenseifner & Gropp, IJHPCA 2005
double_tree_time      of two pipelined trees, half of the vector in each    Sanders, Speck & Träff, Parallel Comput. 35,
                                                                            2009; NCCL 2.4
in_network_time       of switches that add up on the way                    Graham et al., COMHPC 2016 (SHARP)
hierarchical_time     of rings inside nodes and rings across nodes          the two-level scheme of all large clusters
overlap_timeline      which bucket of gradients is on the wire, and when    Li et al. 2020, arXiv:2006.15704
simulate_scaling      step time, speed-up, efficiency over worker counts
straggler_factor      how much longer the slowest of N workers takes        the expected maximum of N normal numbers
amdahl                speed-up of a fixed amount of work                    Amdahl, AFIPS 1967
gustafson             speed-up of an amount that grows with the workers     Gustafson, CACM 31(5), 1988
fit_link              latency and bandwidth from measured all-reduces       least squares of relative errors
measure_step          seconds of real data-parallel steps
====================  ====================================================  ===========================================

Everywhere: times in seconds, ``size`` in bytes, ``bandwidth`` in bytes a second, ``latency`` in seconds a message.
Adding the numbers up is taken to cost nothing beside moving them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from scipy import integrate, optimize, stats
from torch import nn

from course_lib.lab.arguments import at_least
from course_lib.lab.models import mlp
from course_lib.parallel.launching import process_group

# --- One all-reduce ---------------------------------------------------------------------------------------------------

AllReduceTime = Callable[[float, float, float, int], float]
"""``(size, bandwidth, latency, workers) -> seconds``."""


def ring_time(size: float, bandwidth: float, latency: float, workers: int) -> float:
    r"""Seconds of a ring all-reduce: :math:`2(N-1)` rounds, in each of which everyone sends a chunk of 1/N.

    .. math:: T = 2(N-1)\left(\alpha + \frac{S}{N\beta}\right)

    with latency :math:`\alpha`, bandwidth :math:`\beta`, size :math:`S`. Source: Patarasuk & Yuan, JPDC 69(2), 2009.
    """
    _check_link(size, bandwidth, latency, workers)
    return 2 * (workers - 1) * (latency + size / workers / bandwidth)


def tree_time(size: float, bandwidth: float, latency: float, workers: int) -> float:
    r"""Seconds of a binomial tree up and down: :math:`2\lceil\log_2 N\rceil` rounds, in each the whole vector.

    .. math:: T = 2\lceil\log_2 N\rceil\left(\alpha + \frac{S}{\beta}\right)

    This is the plain tree of ``collectives.tree_all_reduce``; ``double_tree_time`` is what real libraries make of it.
    """
    _check_link(size, bandwidth, latency, workers)
    return 2 * _levels(workers) * (latency + size / bandwidth)


def double_tree_time(
    size: float, bandwidth: float, latency: float, workers: int, *, blocks: int | None = None
) -> float:
    r"""Seconds of an all-reduce by two trees at once, each for half of the vector, cut into ``blocks`` :math:`k`.

    .. math:: T = 4\,(L + k - 1)\left(\alpha + \frac{S}{2k\beta}\right), \qquad L = \lceil\log_2 N\rceil

    What is an inner node of one binary tree is a leaf of the other, so nobody has more than two messages to send and
    two to receive of each block, and they can be dealt out to two kinds of rounds: a block leaves the first worker
    every second round and waits for one round at most on each of the :math:`L - 1` levels below. So a broadcast takes
    :math:`2(L + k - 1)` rounds at most, the reduction before it, which is a broadcast backwards, as many. ``None``
    stands for the best number of blocks (any number from 1, not only whole ones), for which

    .. math:: T = \left(\sqrt{2S/\beta} + 2\sqrt{(L-1)\,\alpha}\right)^2 \quad\text{with}\quad
        k = \sqrt{\frac{(L-1)\,S}{2\alpha\beta}} \ge 1 .

    The bytes cost as much as in an endless ring, the latencies grow with the logarithm. Source: Sanders, Speck &
    Träff, Parallel Computing 35, 2009; in NCCL since 2.4, where reduction and broadcast overlap as well.
    """
    _check_link(size, bandwidth, latency, workers)
    if workers == 1:
        return 0.0
    levels, carried = _levels(workers), size / (2 * bandwidth)
    if blocks is not None:
        at_least(1, blocks=blocks)
        return 4 * (levels + blocks - 1) * (latency + carried / blocks)
    return 4 * _best_pipeline(levels - 1, carried, latency)


def in_network_time(
    size: float, bandwidth: float, latency: float, workers: int, *, ports: int = 32, blocks: int | None = None
) -> float:
    r"""Seconds of an all-reduce in which the switches add up, each what comes from the ``ports`` :math:`p` below it.

    .. math:: T = (2H + k - 1)\left(\alpha + \frac{S}{k\beta}\right), \qquad H = \lceil\log_p N\rceil

    Every worker sends its vector once, in ``blocks`` :math:`k`; :math:`H` levels of switches add up what passes and
    send the sum down again. A link carries one block up and one down in each round, so the first block is back after
    :math:`2H` rounds, and then one arrives in each. ``None`` stands for the best number of blocks, as above:

    .. math:: T = \left(\sqrt{S/\beta} + \sqrt{(2H-1)\,\alpha}\right)^2 \quad\text{with}\quad
        k = \sqrt{\frac{(2H-1)\,S}{\alpha\beta}} \ge 1 .

    Half of a ring's bytes: :math:`S` from each worker, where end points alone need nearly :math:`2S`. The latency is
    charged once a link; a switch, which adds in hardware, needs less. Source: Graham et al., COMHPC 2016,
    doi:10.1109/COMHPC.2016.006 (NVIDIA's SHARP).
    """
    _check_link(size, bandwidth, latency, workers)
    at_least(2, ports=ports)
    if workers == 1:
        return 0.0
    links, carried = 2 * _levels(workers, ports), size / bandwidth
    if blocks is not None:
        at_least(1, blocks=blocks)
        return (links + blocks - 1) * (latency + carried / blocks)
    return _best_pipeline(links - 1, carried, latency)


def _best_pipeline(fill: int, carried: float, latency: float) -> float:
    """The least ``(fill + k) (latency + carried / k)`` over all k of at least 1."""
    if fill * carried <= latency:  # one block is the best
        return (fill + 1) * (latency + carried)
    return (math.sqrt(carried) + math.sqrt(fill * latency)) ** 2


def _levels(workers: int, fan_out: int = 2) -> int:
    """How many levels of ``fan_out`` branches it takes to reach so many workers, without a logarithm's rounding."""
    levels, reached = 0, 1
    while reached < workers:
        levels, reached = levels + 1, reached * fan_out
    return levels


def hierarchical_time(
    size: float,
    bandwidth: float,
    latency: float,
    workers: int,
    *,
    per_node: int = 8,
    node_bandwidth: float,
    node_latency: float,
) -> float:
    r"""Seconds of an all-reduce in two levels.

    Reduce-scatter by a ring inside each node of ``per_node`` workers; a ring all-reduce across the nodes of each
    worker's share :math:`S/p`, all :math:`p` shares at the same time; all-gather inside the node.

    ``bandwidth`` and ``latency`` are those between nodes, for each worker: a node whose workers share one network
    card gives each of them ``1 / per_node`` of it. ``node_bandwidth`` and ``node_latency`` are those inside a node.
    """
    _check_link(size, bandwidth, latency, workers)
    _check_link(size, node_bandwidth, node_latency, per_node, names=("node_bandwidth", "node_latency", "per_node"))
    if workers <= per_node:
        return ring_time(size, node_bandwidth, node_latency, workers)
    if workers % per_node:
        raise ValueError(f"workers={workers}: must fill whole nodes of per_node={per_node}")
    inside = ring_time(size, node_bandwidth, node_latency, per_node)  # its two halves, before and after
    return inside + ring_time(size / per_node, bandwidth, latency, workers // per_node)


# --- One step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """One bucket of gradients: when it is ``ready``, and from when to when it is on the wire (seconds of the step)."""

    ready: float
    start: float
    end: float


def overlap_timeline(
    compute_time: float, bucket_times: Sequence[float], *, backward_share: float = 2 / 3
) -> list[Transfer]:
    """When each bucket of gradients is all-reduced, if each may leave as soon as it is ready.

    The forward pass comes first, then the backward pass (``backward_share`` of the compute time: two of its three
    matrix products a layer), during which the buckets become ready at equal distances, the last at its end. The wire
    carries one bucket at a time. One bucket alone is communication without overlap.
    """
    forward, backward = (1 - backward_share) * compute_time, backward_share * compute_time
    free, transfers = 0.0, []
    for done, seconds in enumerate(bucket_times, 1):
        ready = forward + backward * done / len(bucket_times)
        start = max(ready, free)
        free = start + seconds
        transfers.append(Transfer(ready, start, free))
    return transfers


def straggler_factor(workers: int, spread: float) -> float:
    r"""How many times the mean time the slowest of N workers takes: :math:`1 + \sigma\,\mathrm{E}\max_i z_i`.

    Each worker's time is normal with standard deviation ``spread`` (a share of the mean). The expected maximum of N
    standard normal numbers is an integral, not a draw: the result is always the same.
    """
    at_least(1, workers=workers)
    if not 0 <= spread < math.inf:
        raise ValueError(f"spread={spread!r}: must be 0 or positive")
    if workers == 1 or spread == 0:
        return 1.0
    density = lambda z: z * workers * stats.norm.pdf(z) * stats.norm.cdf(z) ** (workers - 1)  # noqa: E731
    return 1 + spread * integrate.quad(density, -10, 10)[0]


def simulate_scaling(
    compute_time: float,
    size: float,
    bandwidth: float,
    latency: float,
    workers: Sequence[int],
    algorithm: AllReduceTime = ring_time,
    *,
    scaling: Literal["weak", "strong"] = "weak",
    buckets: int = 1,
    backward_share: float = 2 / 3,
    spread: float = 0.0,
) -> pd.DataFrame:
    """Predict a step of data-parallel training for each number of workers.

    Parameters
    ----------
    compute_time : seconds of forward and backward pass on one worker.
    size : bytes of the gradients.
    algorithm : ``ring_time``, ``tree_time``, ``double_tree_time``, ``in_network_time``, or ``hierarchical_time`` with
        its node's figures bound by ``partial``.
    scaling : ``"weak"``: each worker keeps its batch, so the global batch grows; ``"strong"``: the global batch stays,
        and each worker computes 1/N of it (taken to need 1/N of the time: true of large batches only).
    buckets : parts in which the gradients are sent, each as soon as it is ready; 1 waits for the whole.
    spread : standard deviation of a worker's compute time, as a share of its mean; all wait for the slowest.

    Returns
    -------
    A table, one row for each number of workers: seconds of ``compute``, ``communication`` (all of it), ``exposed``
    (the part after the last gradient, which nothing hides) and ``step``; ``speedup`` in examples a second over one
    worker, and ``efficiency``, which is that divided by the workers.
    """
    if not 0 < compute_time < math.inf:
        raise ValueError(f"compute_time={compute_time!r}: must be a positive number of seconds")
    if not 0 <= backward_share <= 1:
        raise ValueError(f"backward_share={backward_share!r}: must lie between 0 and 1")
    if scaling not in ("weak", "strong"):
        raise ValueError(f"scaling={scaling!r}: must be 'weak' or 'strong'")
    at_least(1, buckets=buckets)
    rows = []
    for n in workers:
        compute = compute_time * straggler_factor(n, spread) / (n if scaling == "strong" else 1)
        bucket_times = [algorithm(size / buckets, bandwidth, latency, n)] * buckets
        step = overlap_timeline(compute, bucket_times, backward_share=backward_share)[-1].end
        speedup = compute_time / step * (n if scaling == "weak" else 1)
        rows.append((n, compute, sum(bucket_times), step - compute, step, speedup, speedup / n))
    columns = ["workers", "compute", "communication", "exposed", "step", "speedup", "efficiency"]
    return pd.DataFrame(rows, columns=columns).set_index("workers")


# --- Laws of speed-up -------------------------------------------------------------------------------------------------


def amdahl(serial_fraction: float, workers: int | np.ndarray) -> Any:
    r"""Speed-up of a fixed amount of work of which the share :math:`s` cannot be divided: :math:`1/(s + (1-s)/N)`.

    Source: Amdahl, AFIPS 1967.
    """
    _check_fraction(serial_fraction)
    return 1 / (serial_fraction + (1 - serial_fraction) / workers)


def gustafson(serial_fraction: float, workers: int | np.ndarray) -> Any:
    r"""Speed-up when the work grows with the workers: :math:`s + (1-s)N`.

    Here :math:`s` is the share of the *parallel* run's time that is serial. Source: Gustafson, CACM 31(5), 1988.
    """
    _check_fraction(serial_fraction)
    return serial_fraction + (1 - serial_fraction) * workers


# --- From a measured machine ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A connection: seconds a message (``latency``) and bytes a second (``bandwidth``)."""

    latency: float
    bandwidth: float


def fit_link(sizes: Sequence[float], seconds: Sequence[float], workers: int = 2) -> Link:
    """Find the latency and bandwidth for which ``ring_time`` comes closest to measured all-reduces.

    Least squares of the *relative* errors, neither figure below zero: in plain least squares the largest message,
    which takes a thousand times as long as the smallest, would decide alone.
    """
    if len(sizes) != len(seconds) or len(set(sizes)) < 2:
        raise ValueError(f"sizes={list(sizes)}: must hold two different sizes at least, and one for each of seconds")
    if not all(0 <= size < math.inf for size in sizes) or not all(0 < t < math.inf for t in seconds):
        raise ValueError(f"sizes={list(sizes)}, seconds={list(seconds)}: sizes must be 0 or more, seconds positive")
    if workers < 2:
        raise ValueError(f"workers={workers!r}: must be 2 or more, one alone sends nothing")
    rounds = 2 * (workers - 1)
    terms = np.array([(rounds / t, rounds * size / workers / t) for size, t in zip(sizes, seconds, strict=True)])
    (latency, seconds_a_byte), _ = optimize.nnls(terms, np.ones(len(terms)))  # each row: predicted over measured
    if seconds_a_byte == 0:
        raise ValueError(f"seconds={list(seconds)}: do not grow with the size, so they tell of no bandwidth")
    return Link(float(latency), float(1 / seconds_a_byte))


def measure_step(
    widths: Sequence[int] = (64, 256, 1024), *, batch_size: int = 64, repeats: int = 20
) -> list[dict[str, float]]:
    """Seconds of a step of data-parallel SGD on random images, for MLPs of several widths. To be run by ``launch``.

    Each worker has ``batch_size`` examples of its own (weak scaling) and averages its gradients as one flat vector.
    One row a width, each the median of ``repeats`` steps: ``bytes`` of the gradients, ``compute`` (forward, backward
    and update), ``communication`` (the all-reduce) and ``step`` (both).
    """
    with process_group() as world:
        return [_measured_step(width, batch_size, repeats, world.size, world.device) for width in widths]


def _measured_step(width: int, batch_size: int, repeats: int, workers: int, device: torch.device) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 1, 16, 16, generator=generator).to(device)
    y = torch.randint(10, (batch_size,), generator=generator).to(device)
    model = mlp((1, 16, 16), 10, width=width).to(device)
    gradient = torch.zeros(model.parameter_count, device=device)
    pieces = gradient.split([p.numel() for p in model.parameters()])
    for p, piece in zip(model.parameters(), pieces, strict=True):
        p.grad = piece.view_as(p)  # all gradients lie in one vector, so that one all-reduce averages them
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    computing, communicating = [], []
    for _ in range(3 + repeats):  # the first three to warm up
        dist.barrier()
        started = _now(device)
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), y).backward()
        ready = _now(device)
        dist.all_reduce(gradient)
        averaged = _now(device)
        gradient /= workers
        optimizer.step()
        communicating.append(averaged - ready)
        computing.append(_now(device) - started - communicating[-1])
    compute, communication = (statistics.median(times[3:]) for times in (computing, communicating))
    step = statistics.median(a + b for a, b in list(zip(computing, communicating, strict=True))[3:])
    size = gradient.numel() * gradient.element_size()
    return {"width": width, "bytes": size, "compute": compute, "communication": communication, "step": step}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _check_link(
    size: float,
    bandwidth: float,
    latency: float,
    workers: int,
    names: tuple[str, str, str] = ("bandwidth", "latency", "workers"),
) -> None:
    if not 0 <= size < math.inf:
        raise ValueError(f"size={size!r}: must be a number of bytes, 0 or more")
    if not bandwidth > 0:
        raise ValueError(f"{names[0]}={bandwidth!r}: must be a positive number of bytes a second")
    if not 0 <= latency < math.inf:
        raise ValueError(f"{names[1]}={latency!r}: must be a number of seconds, 0 or more")
    at_least(1, **{names[2]: workers})


def _check_fraction(serial_fraction: float) -> None:
    if not 0 <= serial_fraction <= 1:
        raise ValueError(f"serial_fraction={serial_fraction!r}: must lie between 0 and 1")
