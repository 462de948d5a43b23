r"""Sums of many terms in few bits: what is lost, and four ways to lose less.

===================  ==============================================================  =============================
name                 how n terms are added                                           source
===================  ==============================================================  =============================
``sequential_sum``   one after the other, each sum rounded: what goes wrong          Higham 1993,
                                                                                     SIAM J. Sci. Comput. 14(4)
``blocked_sum``      in blocks, then the blocks' sums                                the same
``pairwise_sum``     neighbours, then neighbouring sums, as a tournament             the same
``compensated_sum``  what each addition lost is added with the next                  Kahan 1965, CACM 8(1)
``wide_sum``         in a wider type, rounded at the end                             Micikevicius et al. 2017,
                                                                                     arXiv:1710.03740, section 3.3
``roundings``        how often a term is rounded on its way: the bound of the error  Higham 1993
===================  ==============================================================  =============================

A sum in the type of its terms stops growing when a term is less than half the step between two numbers at the sum: of
ones in bfloat16 at 256, in float16 at 2048. All take ``[..., n]`` and give ``[...]``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from course_lib.lab.arguments import at_least


def sequential_sum(x: Tensor) -> Tensor:
    """``[..., n]`` to ``[...]``: term after term, each sum rounded to the type of
    ``x``.
    """
    total = torch.zeros_like(x[..., 0])
    for term in x.unbind(-1):
        total = total + term
    return total


def blocked_sum(x: Tensor, block: int = 32) -> Tensor:
    """``[..., n]`` to ``[...]``: each block term after term, then the blocks' sums."""
    at_least(1, block=block)
    padded = F.pad(x, (0, -x.shape[-1] % block))
    return sequential_sum(sequential_sum(padded.unflatten(-1, (-1, block))))


def pairwise_sum(x: Tensor) -> Tensor:
    """``[..., n]`` to ``[...]``: neighbours are added until one number is left."""
    while x.shape[-1] > 1:
        x = F.pad(x, (0, x.shape[-1] % 2))
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def kahan_add(total: Tensor, lost: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of ``total`` and ``term``, and what rounding has lost on the way.

    Both are handed back to the next call, which adds what was lost. Source: Kahan 1965,
    CACM 8(1).
    """
    wanted = term + lost
    new = total + wanted
    return new, wanted - (new - total)


def compensated_sum(x: Tensor) -> Tensor:
    """``[..., n]`` to ``[...]``: term after term, with what each addition lost carried
    along.
    """
    total = lost = torch.zeros_like(x[..., 0])
    for term in x.unbind(-1):
        total, lost = kahan_add(total, lost, term)
    return total


def wide_sum(x: Tensor, accumulator: torch.dtype = torch.float32) -> Tensor:
    """``[..., n]`` to ``[...]``: term after term in a wider type, rounded once: what
    matrix units do inside.
    """
    return sequential_sum(x.to(accumulator)).to(x.dtype)


def roundings(n: int, block: int | None = None, *, pairwise: bool = False) -> int:
    r"""Return how often a term is rounded at most on its way into a sum of n: the
    error's bound in units of :math:`u \sum |x_i|` (to first order).

    Term after term :math:`n - 1`; in blocks of b :math:`(b - 1) + (\lceil n/b \rceil -
    1)`; in pairs :math:`\lceil \log_2 n \rceil`. Source: Higham 1993, SIAM J. Sci.
    Comput. 14(4).
    """
    at_least(1, n=n)
    if pairwise:
        return math.ceil(math.log2(n))
    if block is None:
        return n - 1
    at_least(1, block=block)
    return min(block, n) - 1 + math.ceil(n / block) - 1
