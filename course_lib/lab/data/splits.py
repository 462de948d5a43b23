"""Splits that keep the class balance and are disjoint by construction: slices of one fixed order."""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random order of all examples of which **every** beginning is class-balanced.

    First comes one example of each class, then the rest so that the shares of the classes stay as near to those of the
    whole as whole numbers allow (Webster's method of apportionment: the r-th example of a class of n stands at
    (r + 1/2) / n). Slices of the order are therefore disjoint and balanced, and its beginnings are nested: the first
    100 examples are part of the first 200.

    Parameters
    ----------
    labels : int64 [N]

    Returns
    -------
    int64 [N], a permutation of 0 … N-1
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    # Shuffled first: the order within a class, and between classes at equal positions, is then random.
    shuffled = torch.randperm(count, generator=generator)
    position = torch.empty(count, dtype=torch.float64)
    for members in (shuffled[labels[shuffled] == label] for label in labels.unique()):
        position[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        position[members[0]] = 0.0
    return shuffled[torch.argsort(position[shuffled], stable=True)]
