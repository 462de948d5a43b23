"""Collective operations, built from messages between two processes, and the bytes that each of them moves.

=======================  ===============================================  ==============================================
name                     what it does                                     source
=======================  ===============================================  ==============================================
``broadcast``            one rank's tensor to all, by a binomial tree     Thakur, Rabenseifner & Gropp, IJHPCA 19(1),
                                                                          2005
``reduce``               the sum of all to one rank, up the same tree     the same
``tree_all_reduce``      ``reduce``, then ``broadcast``                   the same
``ring_reduce_scatter``  the sum cut in N chunks, one finished by each    Patarasuk & Yuan, JPDC 69(2), 2009
``ring_all_gather``      the finished chunks to all, round the ring       the same
``ring_all_reduce``      ``ring_reduce_scatter``, ``ring_all_gather``     the same; Gibiansky 2017 brought it to deep
                                                                          learning (Baidu)
=======================  ===============================================  ==============================================

All work in place on a contiguous tensor of any shape and size, also one that N does not divide, on every rank alike.
Inside ``with traffic() as count:`` they count what this rank sends and receives.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from course_lib.lab.arguments import at_least
from course_lib.parallel.launching import process_group

# --- Messages, and their count ----------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """What one rank has sent and received. An empty chunk is no message: both sides know that it is empty."""

    messages_sent: int = 0
    bytes_sent: int = 0
    messages_received: int = 0
    bytes_received: int = 0


_counters: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count this rank's messages for the length of a ``with`` block."""
    count = Traffic()
    _counters.append(count)
    try:
        yield count
    finally:
        # By identity: two counters that have counted the same are equal.
        _counters[:] = [counter for counter in _counters if counter is not count]


def send(tensor: Tensor, to: int) -> None:
    """Send a tensor to a rank."""
    if tensor.numel():
        dist.send(tensor, to)
        _count_sent(tensor)


def start_sending(tensor: Tensor, to: int, group: dist.ProcessGroup | None = None) -> dist.Work | None:
    """Send a tensor to a rank without waiting until it has arrived; it must not change before ``wait`` returns."""
    if not tensor.numel():
        return None
    _count_sent(tensor)
    return dist.isend(tensor, to, group=group)


def receive(tensor: Tensor, source: int, group: dist.ProcessGroup | None = None) -> None:
    """Receive into a tensor from a rank."""
    if tensor.numel():
        dist.recv(tensor, source, group=group)
        _count_received(tensor)


def exchange(outgoing: Tensor, to: int, incoming: Tensor, source: int) -> None:
    """Send and receive at once: were all in a ring to send first, each would wait for the next to receive."""
    operations = []
    if outgoing.numel():
        operations.append(dist.P2POp(dist.isend, outgoing, to))
        _count_sent(outgoing)
    if incoming.numel():
        operations.append(dist.P2POp(dist.irecv, incoming, source))
        _count_received(incoming)
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()


def _count_sent(tensor: Tensor) -> None:
    for count in _counters:
        count.messages_sent += 1
        count.bytes_sent += tensor.nbytes


def _count_received(tensor: Tensor) -> None:
    for count in _counters:
        count.messages_received += 1
        count.bytes_received += tensor.nbytes


# --- The tree ---------------------------------------------------------------------------------------------------------


def tree_rounds(world_size: int) -> list[list[tuple[int, int]]]:
    """Return who sends to whom in each round of a broadcast from rank 0: those who know double every round.

    >>> tree_rounds(6)
    [[(0, 1)], [(0, 2), (1, 3)], [(0, 4), (1, 5)]]
    """
    at_least(1, world_size=world_size)
    distances = [2**k for k in range(_levels(world_size))]
    return [[(rank, rank + far) for rank in range(min(far, world_size - far))] for far in distances]


def broadcast(tensor: Tensor, src: int = 0) -> None:
    """Copy the tensor of rank ``src`` to all ranks, in ceil(log2 N) rounds."""
    rank, size = _place("src", src)
    flat = _flat(tensor)
    for pairs in tree_rounds(size):
        for sender, receiver in pairs:
            if (sender + src) % size == rank:  # the tree is drawn from rank 0; here it starts at src
                send(flat, (receiver + src) % size)
            elif (receiver + src) % size == rank:
                receive(flat, (sender + src) % size)


def reduce(tensor: Tensor, dst: int = 0) -> None:
    """Add up the tensors of all ranks in rank ``dst``: the broadcast backwards. The other ranks hold partial sums."""
    rank, size = _place("dst", dst)
    flat = _flat(tensor)
    incoming = torch.empty_like(flat)
    for pairs in reversed(tree_rounds(size)):
        for receiver, sender in pairs:
            if (sender + dst) % size == rank:
                send(flat, (receiver + dst) % size)
            elif (receiver + dst) % size == rank:
                receive(incoming, (sender + dst) % size)
                flat += incoming


def tree_all_reduce(tensor: Tensor) -> None:
    """Add up the tensors of all ranks, in all ranks, by way of rank 0: few messages, but each of the whole tensor."""
    reduce(tensor)
    broadcast(tensor)


# --- The ring ---------------------------------------------------------------------------------------------------------


def ring_schedule(rank: int, step: int, world_size: int) -> tuple[int, int]:
    """Return which chunk a rank sends to its right neighbour, and which it receives from its left one, in a step.

    Steps 0 to N - 2 add up (reduce-scatter): after them the sum of chunk ``rank + 1`` is complete in ``rank``. Steps
    N - 1 to 2 N - 3 hand the sums on (all-gather). In all of them a rank sends what it received in the step before.
    """
    at_least(1, world_size=world_size)
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie between 0 and {world_size - 1}, got {rank!r}")
    if not 0 <= step < 2 * (world_size - 1):
        raise ValueError(f"step must be at least 0 and below 2 (N - 1) = {2 * (world_size - 1)}, got {step!r}")
    return (rank - step) % world_size, (rank - step - 1) % world_size


def ring_reduce_scatter(tensor: Tensor) -> Tensor:
    """Add up chunk ``(rank + 1) % N`` of all ranks' tensors in this rank; return it, a view. The rest is partial."""
    rank, size = _place()
    chunks = _flat(tensor).tensor_split(size)
    space = torch.empty_like(chunks[0])  # the first chunk is the largest
    for step in range(size - 1):
        outgoing, addend = (chunks[i] for i in ring_schedule(rank, step, size))
        incoming = space[: addend.numel()]
        exchange(outgoing, (rank + 1) % size, incoming, (rank - 1) % size)
        addend += incoming
    return chunks[(rank + 1) % size]


def ring_all_gather(tensor: Tensor) -> None:
    """Fill the tensor on every rank: chunk ``(r + 1) % N`` of it comes from rank ``r``."""
    rank, size = _place()
    chunks = _flat(tensor).tensor_split(size)
    for step in range(size - 1, 2 * (size - 1)):
        outgoing, incoming = (chunks[i] for i in ring_schedule(rank, step, size))
        exchange(outgoing, (rank + 1) % size, incoming, (rank - 1) % size)


def ring_all_reduce(tensor: Tensor) -> None:
    """Add up the tensors of all ranks, in all ranks: every rank sends 2 (N - 1) / N of the tensor, whatever N."""
    ring_reduce_scatter(tensor)
    ring_all_gather(tensor)


def ring_states(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield what every rank of a ring holds at the start and after each step, ``[N, elements]``: without any process.

    With rank ``r`` full of ``10**r``, the digits of each number tell whose contributions are already in it.
    """
    size = len(tensors)
    at_least(1, world_size=size)
    state = torch.stack([tensor.flatten() for tensor in tensors])  # N tensors of any shape -> [N, elements]
    yield state.clone()
    for step in range(2 * (size - 1)):
        before, after = state.tensor_split(size, dim=1), state.clone().tensor_split(size, dim=1)
        for rank in range(size):
            _, chunk = ring_schedule(rank, step, size)
            incoming = before[chunk][rank - 1]
            after[chunk][rank] = after[chunk][rank] + incoming if step < size - 1 else incoming
        state = torch.cat(after, dim=1)
        yield state.clone()


# --- What it costs, by formula ----------------------------------------------------------------------------------------


def ring_bytes(size: float, world_size: int) -> float:
    """Bytes that every rank sends in a ring all-reduce of ``size`` bytes: ``2 (N - 1) / N * size``.

    No all-reduce in which only the ranks add can do with less from every rank (Patarasuk & Yuan 2009).
    """
    at_least(1, world_size=world_size)
    return 2 * (world_size - 1) / world_size * size


def ring_messages(world_size: int) -> int:
    """Messages that every rank sends in a ring all-reduce, one after the other: ``2 (N - 1)``."""
    at_least(1, world_size=world_size)
    return 2 * (world_size - 1)


def tree_bytes(size: float, world_size: int) -> float:
    """Bytes that the busiest rank, the root, sends in a tree all-reduce: ``ceil(log2 N) * size``; it receives as many.

    All ranks together send ``2 (N - 1) * size``, no more than in the ring: but the ring shares it out evenly.
    """
    return tree_messages(world_size) * size


def tree_messages(world_size: int) -> int:
    """Messages that the root sends in a tree all-reduce: ``ceil(log2 N)``; it has received as many before."""
    at_least(1, world_size=world_size)
    return _levels(world_size)


def ring_traffic(elements: int, element_size: int, world_size: int, rank: int) -> Traffic:
    """What a rank moves in a ring all-reduce, to the byte, also where N does not divide the number of elements.

    Of ``S`` bytes in chunks of ``c_0`` to ``c_{N-1}``, rank ``r`` receives ``2 S - c_r - c_{r+1}`` and sends ``2 S -
    c_{r+1} - c_{r+2}``: every chunk twice, but for the two that it sees once.
    """
    at_least(1, world_size=world_size)
    chunks = [elements // world_size + (r < elements % world_size) for r in range(world_size)]
    full = sum(chunk > 0 for chunk in chunks)
    own, done, after = (chunks[(rank + offset) % world_size] for offset in (0, 1, 2))
    return Traffic(
        messages_sent=2 * full - (done > 0) - (after > 0),
        bytes_sent=(2 * elements - done - after) * element_size,
        messages_received=2 * full - (own > 0) - (done > 0),
        bytes_received=(2 * elements - own - done) * element_size,
    )


def tree_traffic(elements: int, element_size: int, world_size: int, rank: int) -> Traffic:
    """What a rank moves in a tree all-reduce: the whole tensor, both ways, along each of its edges in the tree."""
    edges = sum(rank in pair for pairs in tree_rounds(world_size) for pair in pairs) if elements else 0
    return Traffic(edges, edges * elements * element_size, edges, edges * elements * element_size)


# --- What it costs, measured ------------------------------------------------------------------------------------------


WARM_UP = 10  # rounds: the first messages between two processes take several times as long


def all_reduce_demo(elements: int = 8) -> dict[str, Any]:
    """Add up ``10**rank`` over all ranks by the ring; to be run by ``launch``. Returns what this rank had and moved."""
    with process_group() as world:
        tensor = torch.full((elements,), 10**world.rank, device=world.device)
        before = tensor.tolist()
        with traffic() as count:
            ring_all_reduce(tensor)
        return {"rank": world.rank, "before": before, "after": tensor.tolist(), **asdict(count)}


def measure_collectives(sizes: Sequence[int], repeats: int = 15) -> list[dict[str, Any]]:
    """Time the all-reduces on tensors of these sizes in bytes; to be run by ``launch``.

    Returns one row for each size and algorithm (``"ring"``, ``"tree"``, ``"torch"``): the seconds until the last rank
    is done (the median of ``repeats``, in turns and after some for warming up), and for ours the bytes and messages
    that this rank sent.
    """
    if not sizes or min(sizes) < 4:
        raise ValueError(f"sizes must be numbers of bytes, 4 (one float32) or more each, got {sizes!r}")
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats!r}")
    algorithms = {"ring": ring_all_reduce, "tree": tree_all_reduce, "torch": dist.all_reduce}
    rows = []
    with process_group() as world:
        for size in sizes:
            tensor = torch.zeros(size // 4, device=world.device)
            rounds = [[_seconds(f, tensor) for f in algorithms.values()] for _ in range(WARM_UP + repeats)][WARM_UP:]
            for (name, all_reduce), times in zip(algorithms.items(), zip(*rounds, strict=True), strict=True):
                with traffic() as count:
                    all_reduce(tensor)
                counted = {"bytes_sent": count.bytes_sent, "messages_sent": count.messages_sent}
                row = {"bytes": size, "algorithm": name, "world_size": world.size, "seconds": statistics.median(times)}
                rows.append(row | (counted if name != "torch" else dict.fromkeys(counted)))
    return rows


def _seconds(all_reduce: Callable[[Tensor], Any], tensor: Tensor) -> float:
    """Return how long the slowest rank took, from a common start."""
    dist.barrier()
    started = time.perf_counter()
    all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    slowest = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=tensor.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


# --- Small helpers, and checks at the door ----------------------------------------------------------------------------


def _levels(world_size: int) -> int:
    return (world_size - 1).bit_length()  # ceil(log2 N), exactly


def _place(name: str = "", root: int = 0) -> tuple[int, int]:
    """Return this rank and the size of the world; check a rank that was given."""
    size = dist.get_world_size()
    if isinstance(root, bool) or not isinstance(root, int) or not 0 <= root < size:
        raise ValueError(f"{name} must be a rank from 0 to {size - 1}, got {root!r}")
    return dist.get_rank(), size


def _flat(tensor: Tensor) -> Tensor:
    """Return the same memory in one dimension, out of autograd's sight."""
    if not tensor.is_contiguous():
        raise ValueError(f"tensor must be contiguous, for it is changed in place; got strides {tensor.stride()}")
    return tensor.detach().view(-1)
