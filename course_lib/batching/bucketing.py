r"""Bucketing: batches of sequences of like length, so that little of them is padding.

====================  ===================================================================  ===========================
name                  what it does                                                         source
====================  ===================================================================  ===========================
``length_buckets``    batches of equally many sequences, sorted by length within pools
``by_tokens``         batches of equally many cells: many short sequences or a few long    Vaswani et al. 2017,
                                                                                           arXiv:1706.03762, section 5
``padding``           the part of the cells that padding fills
``pad_batch``         sequences of several lengths as one tensor and a mask                by torch's ``pad_sequence``
====================  ===================================================================  ===========================

Sorting all sequences would leave the least padding, and the same batches in every epoch. A pool is the compromise: the
order is drawn, cut into pools, and sorted within each. The larger the pool the less padding, the less chance. A pool of
one batch sorts nothing that matters: those are plain random batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from course_lib.lab.arguments import at_least, require


def length_buckets(lengths: Tensor, size: int, generator: torch.Generator, *, pool: int | None = None) -> list[Tensor]:
    """Return batches of ``size`` indices (the last of each pool may be smaller), each sequence in one, in random order.

    Indices are on the CPU, as everywhere in this chapter.

    Parameters
    ----------
    lengths : int64 ``[N]``, at least 1 each.
    generator : a CPU generator; it draws the pools and the order of the batches.
    pool : sequences that are sorted together; 100 batches if not given.

    Raises
    ------
    ValueError : ``lengths`` is not such a tensor, ``size`` is below 1, or ``pool`` below ``size``.
    """
    at_least(1, size=size)
    pool = 100 * size if pool is None else pool
    at_least(size, pool=pool)
    batches = [batch for chosen in _pools(lengths, pool, generator) for batch in chosen.split(size)]
    return _shuffled(batches, generator)


def by_tokens(lengths: Tensor, budget: int, generator: torch.Generator, *, pool: int | None = None) -> list[Tensor]:
    """Return batches of at most ``budget`` cells with their padding, each sequence in exactly one, in random order.

    Within a pool (all sequences, if not given) they are taken by length, shortest first, while sequences times the
    longest of them stays within the budget. So memory and time of a batch are about the same, whatever the lengths.

    Raises
    ------
    ValueError : as ``length_buckets``, or a sequence is longer than the budget.
    """
    at_least(1, budget=budget)
    pool = len(lengths) if pool is None else pool
    at_least(1, pool=pool)
    _check_lengths(lengths)
    require("budget", budget, lambda b: b >= int(lengths.max()), f"at least {int(lengths.max())}, the longest sequence")
    batches = []
    for chosen in _pools(lengths, pool, generator):
        start = 0
        for end, length in enumerate(lengths.cpu()[chosen].tolist()):  # rising: the newest is the longest
            if (end - start + 1) * length > budget:
                batches.append(chosen[start:end])
                start = end
        batches.append(chosen[start:])
    return _shuffled(batches, generator)


def _pools(lengths: Tensor, pool: int, generator: torch.Generator) -> list[Tensor]:
    """The sequences in pools, each sorted by length; equal lengths in random order."""
    _check_lengths(lengths)
    require("generator", generator, lambda g: g.device.type == "cpu", "a CPU generator")
    order, lengths = torch.randperm(len(lengths), generator=generator), lengths.cpu()
    return [part[lengths[part].argsort(stable=True)] for part in order.split(pool)]


def _shuffled(batches: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def padding(lengths: Tensor, batches: Sequence[Tensor]) -> float:
    """Return the part of all cells that is padding, where each batch is as long as its longest sequence."""
    _check_lengths(lengths)
    if not batches or any(not len(batch) for batch in batches):
        raise ValueError(
            f"batches holds {[len(batch) for batch in batches]} sequences: must hold batches of at least 1"
        )
    found = [lengths[batch.to(lengths.device)] for batch in batches]
    cells = sum(len(batch) * int(batch.max()) for batch in found)
    return 1 - sum(int(batch.sum()) for batch in found) / cells


def pad_batch(sequences: Sequence[Tensor], *, value: float = 0) -> tuple[Tensor, Tensor]:
    """Return the sequences as one tensor ``[B, L, …]``, filled up with ``value``, and where they are: bool ``[B, L]``.

    Each sequence is ``[length, …]``, all of one type and of like shape behind the length.

    Raises
    ------
    ValueError : no sequence, or of several types or shapes.
    """
    kinds = {(s.dtype, s.device, tuple(s.shape[1:])) for s in sequences}
    if len(kinds) != 1 or any(s.ndim < 1 for s in sequences):
        raise ValueError(f"sequences are of the kinds {sorted(map(str, kinds))}: must be [length, ...] of one kind")
    padded = pad_sequence(list(sequences), batch_first=True, padding_value=value)
    lengths = torch.tensor([len(s) for s in sequences], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def _check_lengths(lengths: Tensor) -> None:
    if lengths.dtype != torch.int64 or lengths.ndim != 1 or not len(lengths) or int(lengths.min()) < 1:
        said = f"{lengths.dtype} {list(lengths.shape)}"
        raise ValueError(f"lengths is {said}: must be int64 [N] with N at least 1, of lengths of at least 1")
