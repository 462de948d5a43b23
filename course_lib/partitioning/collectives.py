"""Collectives that gradients go through, counted: what tensor, sequence and expert parallelism are made of.

======================  ==================================================  ======================================
name                    what it does                                        source
======================  ==================================================  ======================================
``copy_to_ranks``       identity; backward adds up (Megatron's f)           Shoeybi et al. 2019, arXiv:1909.08053
``sum_over_ranks``      adds up; backward identity (Megatron's g)           the same
``split_along``         this rank's part; backward gathers                  the same
``join_along``          gathers the parts; backward takes its own           the same
``gather_along``        gathers the parts; backward adds up and scatters    Korthikanti et al. 2022,
                                                                            arXiv:2205.05198
``scatter_sum_along``   adds up and scatters; backward gathers              the same
``communication``       counts collectives, and their bytes on a ring       –
======================  ==================================================  ======================================

Between layers a tensor is *whole* (the same on all ranks, and so is its gradient), *shared* (each rank has a part) or a
*partial sum*. Each of three pairs of maps takes one kind to another, and the backward pass of one is the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from course_lib.lab.arguments import at_least, require

Group = dist.ProcessGroup | None
"""The ranks that share a layer; ``None`` is all of them."""

Collective = Callable[[Tensor], Tensor]

# --- Who has what -----------------------------------------------------------------------------------------------------


def part_sizes(size: int, ranks: int) -> list[int]:
    """Return the sizes of the ranks' parts: they differ by one at most, the first being larger.

    >>> part_sizes(17, 3)
    [6, 6, 5]
    """
    at_least(0, size=size)
    at_least(1, ranks=ranks)
    return [size // ranks + (rank < size % ranks) for rank in range(ranks)]


def equal_part(name: str, size: int, group: Group = None) -> slice:
    """Return which of ``size`` things belong to this rank.

    Raises
    ------
    ValueError : the ranks cannot have equally many. ``name`` says of what.
    """
    ranks = dist.get_world_size(group)
    require(name, size, lambda s: s % ranks == 0, f"a multiple of {ranks}, the number of ranks")
    first = dist.get_rank(group) * (size // ranks)
    return slice(first, first + size // ranks)


# --- Collectives, counted ---------------------------------------------------------------------------------------------


@dataclass
class Communication:
    """What one rank has given to collectives, by kind (``"all_reduce"``, ``"all_gather"``, …).

    Attributes
    ----------
    calls : how many of each.
    sent : bytes that this rank sends on a ring, where of S bytes an all-reduce moves 2 (N - 1) / N, an all-gather or
        reduce-scatter half of it. In an all-to-all they are those for other ranks.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.sent.values())


_counters: list[Communication] = []


@contextmanager
def communication() -> Iterator[Communication]:
    """Count this rank's collectives, those of backward too, for the length of a ``with`` block."""
    count = Communication()
    _counters.append(count)
    try:
        yield count
    finally:
        # By identity: two counters that have counted the same are equal.
        _counters[:] = [counter for counter in _counters if counter is not count]


def count_collective(kind: str, sent: int) -> None:
    """Enter a collective, in which this rank sends so many bytes, into the open counters."""
    for count in _counters:
        count.calls[kind] += 1
        count.sent[kind] += sent


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Return the sum of all ranks' tensors, on all ranks."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    ranks = dist.get_world_size(group)
    count_collective("all_reduce", 2 * (ranks - 1) * total.nbytes // ranks)
    return total


def all_gather(x: Tensor, dim: int, size: int, group: Group) -> Tensor:
    """Return all ranks' parts side by side. Smaller ones are padded: messages have one size."""
    rows, sizes = x.movedim(dim, 0), part_sizes(size, dist.get_world_size(group))
    parts = [x.new_empty(sizes[0], *rows.shape[1:]) for _ in sizes]
    dist.all_gather(parts, _padded(rows, sizes[0]), group=group)
    count_collective("all_gather", (len(parts) - 1) * parts[0].nbytes)
    whole = torch.cat([part[:own] for part, own in zip(parts, sizes, strict=True)])
    return whole.movedim(0, dim).contiguous()


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's part of the sum of all ranks' tensors; padded as in `all_gather`."""
    sizes = part_sizes(x.shape[dim], dist.get_world_size(group))
    parts = [_padded(part, sizes[0]) for part in x.movedim(dim, 0).split(sizes)]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    count_collective("reduce_scatter", (len(parts) - 1) * own.nbytes)
    return own[: sizes[dist.get_rank(group)]].movedim(0, dim).contiguous()


def own_part(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's part, in memory of its own: a view would keep the whole."""
    part = x.tensor_split(dist.get_world_size(group), dim)[dist.get_rank(group)]
    return part.clone(memory_format=torch.contiguous_format)


def _padded(rows: Tensor, length: int) -> Tensor:
    padding = rows.new_zeros(length - len(rows), *rows.shape[1:])
    return torch.cat([rows, padding]).contiguous()


# --- Three pairs of maps, each the backward of the other --------------------------------------------------------------


class Adjoint(torch.autograd.Function):
    """A linear map ``there`` in forward, and in backward its transpose, ``back``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Collective, back: Collective) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.back(grad), None, None


def copy_to_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Let each rank go its own way with a whole tensor: backward adds up (all-reduce)."""
    return Adjoint.apply(x, _as_it_is, lambda grad: all_reduce(grad, group))


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """Add up the ranks' partial sums (all-reduce). Its gradient is that of each of them."""
    return Adjoint.apply(x, lambda x: all_reduce(x, group), _as_it_is)


def split_along(x: Tensor, dim: int, group: Group = None) -> Tensor:
    """Keep this rank's part of a whole tensor; backward joins the gradients (all-gather).

    Parts may be uneven (`part_sizes`).
    """
    size = x.shape[dim]
    return Adjoint.apply(
        x,
        lambda x: own_part(x, dim, group),
        lambda grad: all_gather(grad, dim, size, group),
    )


def join_along(
    x: Tensor,
    dim: int,
    size: int | None = None,
    group: Group = None,
) -> Tensor:
    """Join the ranks' parts to a whole that all use alike; backward keeps this rank's.

    ``size`` as in `gather_along`.
    """
    size = _whole_size(x, dim, size, group)
    return Adjoint.apply(
        x,
        lambda x: all_gather(x, dim, size, group),
        lambda grad: own_part(grad, dim, group),
    )


def gather_along(
    x: Tensor,
    dim: int,
    size: int | None = None,
    group: Group = None,
) -> Tensor:
    """Join the ranks' parts, for each to go its own way; backward adds up and scatters.

    Parameters
    ----------
    size : of the whole along ``dim``; by default N times this rank's part. It must be
        given where parts are uneven (`part_sizes`).

    Raises
    ------
    ValueError : this rank's part is not that of such a whole.
    """
    size = _whole_size(x, dim, size, group)
    return Adjoint.apply(
        x,
        lambda x: all_gather(x, dim, size, group),
        lambda grad: reduce_scatter(grad, dim, group),
    )


def scatter_sum_along(x: Tensor, dim: int, group: Group = None) -> Tensor:
    """Add up the ranks' partial sums and keep a part (reduce-scatter); backward gathers."""
    size = x.shape[dim]
    return Adjoint.apply(
        x,
        lambda x: reduce_scatter(x, dim, group),
        lambda grad: all_gather(grad, dim, size, group),
    )


def _as_it_is(x: Tensor) -> Tensor:
    return x.view_as(x)


def _whole_size(x: Tensor, dim: int, size: int | None, group: Group) -> int:
    ranks = dist.get_world_size(group)
    size = x.shape[dim] * ranks if size is None else size
    own = part_sizes(size, ranks)[dist.get_rank(group)]
    require("size", size, lambda _: x.shape[dim] == own, f"such that this rank's part is x's {x.shape[dim]}, not {own}")
    return size
