r"""Attention: the same answer without the square of scores in memory, and what generation keeps.

=========================  ===================================================  =====================================
name                       what it does                                         source
=========================  ===================================================  =====================================
``naive_attention``        all scores at once: ``[T, T]`` in memory             Vaswani et al. 2017, arXiv:1706.03762
``online_softmax``         a softmax over blocks, seen once                     Milakov & Gimelshein 2018,
                                                                                arXiv:1805.02867
``tiled_attention``        tile after tile of the scores, none of them kept     Dao et al. 2022 (FlashAttention),
                                                                                arXiv:2205.14135
``flash_attention``        the same for training: the tiles are computed again  the same, appendix B
*generation*
``KVCache``                keys and values of the tokens so far                 Shazeer 2019, arXiv:1911.02150
``grouped_attention``      several heads of queries share one of keys           Ainslie et al. 2023 (GQA),
                                                                                arXiv:2305.13245
*costs*
``attention_products``, …  multiplications, bytes held, bytes moved             the papers above
=========================  ===================================================  =====================================

Queries, keys and values are ``[N, heads, T, d]``; ``keep`` is True for the tokens ``[N, T]`` that are no padding. A
query that may see nothing gets 0. Causal queries are the last of the keys' tokens, so that a new token sees all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from course_lib.lab.arguments import at_least, require
from course_lib.lab.models import Attention

# --- Softmax attention ------------------------------------------------------------------------------------------------


def visible(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    keep: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return which keys each query may see, bool, broadcasting to ``[N, heads, queries,
    keys]``.

    Parameters
    ----------
    causal : only those up to its own place; the queries are the last ones.
    keep : False for padding, ``[N, keys]``.
    """
    device = device if keep is None else keep.device
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen.tril(keys - queries)
    return seen if keep is None else seen & keep[:, None, None, :]


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    r"""Return :math:`\mathrm{softmax}(q k^\top / \sqrt d)\, v`, with all scores in
    memory, ``[N, heads, queries, d]``.

    The largest score of a row is taken off first, so that no exponential overflows.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # [N, heads, queries, keys]
    see = visible(*scores.shape[-2:], causal=causal, keep=keep, device=q.device)
    scores = scores.masked_fill(~see, -torch.inf)
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.clamp(min=torch.finfo(q.dtype).tiny)) @ v


class Running(NamedTuple):
    """A softmax-weighted sum so far: the largest score and the sum of the weights ``[..., 1]``, the sum ``[..., d]``.

    Weights are relative to the largest score that was seen.
    """

    largest: Tensor
    total: Tensor
    weighted: Tensor

    @staticmethod
    def start(q: Tensor, width: int) -> Running:
        """Nothing seen yet, for queries ``[..., d]`` and values of a width."""
        zeros = q.new_zeros(*q.shape[:-1], 1)
        return Running(zeros + torch.finfo(q.dtype).min, zeros, zeros.expand(*q.shape[:-1], width))

    def result(self) -> Tensor:
        """The sum over the weights' total; 0 where nothing was seen."""
        return self.weighted / self.total.clamp(min=torch.finfo(self.total.dtype).tiny)

    def log_total(self) -> Tensor:
        r"""The logarithm of :math:`\sum e^{s}`, ``[..., 1]``: what brings a tile's
        weights back.
        """
        return self.largest + self.total.clamp(min=torch.finfo(self.total.dtype).tiny).log()


def online_softmax(so_far: Running, scores: Tensor, v: Tensor) -> Running:
    r"""Take another block of keys into a softmax-weighted sum.

    With the new largest score :math:`m' = \max(m, \max s)` all that was summed up
    shrinks by :math:`e^{m - m'}`:

    .. math:: l' = l\, e^{m-m'} + \sum e^{s-m'} \qquad
        o' = o\, e^{m-m'} + \sum e^{s-m'} v

    Parameters
    ----------
    scores : of each query with each key of the block, ``[..., queries, block]``.
    v : the block's values, ``[..., block, d]``.
    """
    largest = torch.maximum(so_far.largest, scores.amax(-1, keepdim=True))
    shrink = torch.exp(so_far.largest - largest)
    weights = torch.exp(scores - largest)
    total = so_far.total * shrink + weights.sum(-1, keepdim=True)
    return Running(largest, total, so_far.weighted * shrink + weights @ v)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    keep: Tensor | None = None,
    block: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return what ``naive_attention`` does, holding ``[block, block]`` scores of each
    head at a time.

    Returns
    -------
    The values' sums ``[N, heads, queries, d]``, and the logarithm of each query's sum of
    exponentials ``[N, heads, queries, 1]``, with which any tile can be computed again.
    """
    outputs, logs = [], []
    for rows in _blocks(q.shape[-2], block):
        running = Running.start(q[..., rows, :], v.shape[-1])
        for columns in _seen_by(rows, q, k, block, causal):
            scores = _tile(q, k, rows, columns, causal, keep)
            running = online_softmax(running, scores, v[..., columns, :])
        outputs.append(running.result())
        logs.append(running.log_total())
    return torch.cat(outputs, -2), torch.cat(logs, -2)


def _blocks(length: int, block: int) -> Iterator[slice]:
    at_least(1, block=block)
    return (slice(start, min(start + block, length)) for start in range(0, length, block))


def _seen_by(rows: slice, q: Tensor, k: Tensor, block: int, causal: bool) -> Iterator[slice]:
    """The blocks of keys that a block of queries sees; causal ones need not look at
    those behind them.
    """
    keys = k.shape[-2]
    last = min(rows.stop + keys - q.shape[-2], keys) if causal else keys
    return _blocks(max(last, 0), block)


def _tile(q: Tensor, k: Tensor, rows: slice, columns: slice, causal: bool, keep: Tensor | None) -> Tensor:
    """Scores of a block of queries with a block of keys, minus infinity where the one may not see the other."""
    scores = q[..., rows, :] @ k[..., columns, :].mT / math.sqrt(q.shape[-1])
    if causal:
        shift = k.shape[-2] - q.shape[-2]
        places = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + shift
        scores = scores.masked_fill(torch.arange(columns.start, columns.stop, device=q.device) > places, -torch.inf)
    return scores if keep is None else scores.masked_fill(~keep[:, None, None, columns], -torch.inf)


class _Flash(torch.autograd.Function):
    """``tiled_attention`` with a backward pass that computes each tile of weights again from the saved logarithms."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, keep: Tensor | None, block: int) -> Tensor:
        o, logs = tiled_attention(q, k, v, causal=causal, keep=keep, block=block)
        ctx.save_for_backward(q, k, v, o, logs, keep)
        ctx.causal, ctx.block = causal, block
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, logs, keep = ctx.saved_tensors
        dq, dk, dv = flash_backward(do, q, k, v, o, logs, causal=ctx.causal, keep=keep, block=ctx.block)
        return dq, dk, dv, None, None, None


def flash_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logs: Tensor,
    *,
    causal: bool,
    keep: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the gradients of q, k and v from that of the output, tile after tile.

    With the weights :math:`p = e^{s - \log\sum e^s}`, the gradient of the scores is
    :math:`p\,(do\,v^\top - \sum_j do_j o_j)`.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    inner = (do * o).sum(-1, keepdim=True)  # [N, heads, queries, 1]
    for rows in _blocks(q.shape[-2], block):
        for columns in _seen_by(rows, q, k, block, causal):
            tile = _tile(q, k, rows, columns, causal, keep)
            p = torch.exp(tile - logs[..., rows, :])
            dv[..., columns, :] += p.mT @ do[..., rows, :]
            ds = p * (do[..., rows, :] @ v[..., columns, :].mT - inner[..., rows, :])
            dq[..., rows, :] += ds @ k[..., columns, :] * scale
            dk[..., columns, :] += ds.mT @ q[..., rows, :] * scale
    return dq, dk, dv


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    keep: Tensor | None = None,
    block: int = 64,
) -> Tensor:
    """Return what ``naive_attention`` does, ``[N, heads, queries, d]``, with gradients;
    scores are never all in memory.

    What is saved for backward is q, k, v, the result and one number for each query. The
    reason of the algorithm is memory traffic on a GPU, where a tile lives in the fast
    memory of one kernel; written out like this it saves memory, and time is saved by
    ``F.scaled_dot_product_attention``.

    Raises
    ------
    ValueError : ``block`` is below 1.
    """
    with torch.autocast(q.device.type, enabled=False):  # the backward pass runs without it: both in the type of q
        return _Flash.apply(q, k, v, causal, keep, block)


# --- Generation -------------------------------------------------------------------------------------------------------


class KVCache:
    """Room for the keys and values of ``capacity`` tokens, filled from the front: a new token computes its own alone.

    Parameters
    ----------
    shape : ``(N, heads, d)`` of keys and values; with ``grouped_attention`` the heads of the keys.
    capacity : tokens.

    Attributes
    ----------
    length : tokens that are in it.

    Raises
    ------
    ValueError : more tokens come than there is room for, or of another shape.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        at_least(1, capacity=capacity)
        batch, heads, width = shape
        self._room = torch.zeros(2, batch, heads, capacity, width, dtype=dtype, device=device)
        self.length = 0

    @property
    def size(self) -> int:
        """Bytes of the whole room."""
        return self._room.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values ``[N, heads, new, d]`` behind the
        others.

        Returns
        -------
        Views of all keys and all values so far, ``[N, heads, length, d]``.
        """
        wanted, new = (*self._room.shape[1:3], k.shape[-2], self._room.shape[-1]), k.shape[-2]
        for name, part in (("k", k), ("v", v)):
            require(name, tuple(part.shape), wanted.__eq__, f"of the shape {wanted}")
        left = self._room.shape[-2] - self.length
        require("tokens", new, lambda n: n <= left, f"at most {left}, for which there is room")
        self._room[0, :, :, self.length : self.length + new] = k
        self._room[1, :, :, self.length : self.length + new] = v
        self.length += new
        return self._room[0, :, :, : self.length], self._room[1, :, :, : self.length]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
    """Return what the new tokens see ``[N, heads, new, d]``: themselves and all that
    the cache holds, which grows.

    One token at a time, some at a time or all at once: the rows are those of one causal
    pass over all tokens.
    """
    keys, values = cache.append(k, v)
    return grouped_attention(q, keys, values, causal=True)


def grouped_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """Return attention of ``heads`` heads of queries to fewer heads of keys and values,
    ``[N, heads, queries, d]``.

    Neighbouring heads share one: with as many it is the usual attention, with one it is
    multi-query attention. The cache shrinks as many times; multiplications do not.

    Raises
    ------
    ValueError : the heads of q are no multiple of those of k.
    """
    heads, groups = q.shape[1], k.shape[1]
    require("heads", heads, lambda n: n % groups == 0, f"a multiple of the {groups} of k")
    # a group's queries, one head after the other, are as one head with more queries
    shared = q.unflatten(1, (groups, heads // groups))  # [N, groups, share, queries, d]
    see = visible(q.shape[-2], k.shape[-2], causal=causal, keep=keep, device=q.device)
    see = see if keep is None else see[:, :, None]
    mixed = F.scaled_dot_product_attention(shared, k[:, :, None], v[:, :, None], see)
    return mixed.flatten(1, 2)


# --- Costs ------------------------------------------------------------------------------------------------------------
# Of one head and one example; times heads and examples for all.


def attention_products(queries: int, keys: int, width: int) -> int:
    """Return the multiplications, naive or tiled: ``2 queries keys width``."""
    return 2 * queries * keys * width


def score_bytes(queries: int, keys: int, itemsize: int = 4, block: int | None = None) -> int:
    """Return the bytes of the scores that are there at once: all, or a tile."""
    at_least(1, queries=queries, keys=keys, itemsize=itemsize)
    if block is None:
        return queries * keys * itemsize
    at_least(1, block=block)
    return min(block, queries) * min(block, keys) * itemsize


def attention_traffic(tokens: int, width: int, itemsize: int = 4, block: int | None = None) -> int:
    """Return the bytes that a GPU's large memory reads and writes.

    Naive: q, k, v and the result once, the scores four times (written, read by the
    softmax, its weights written, read). Tiled: q and the result once, k and v once for
    each block of queries.
    """
    at_least(1, tokens=tokens, width=width, itemsize=itemsize)
    if block is None:
        return itemsize * (4 * tokens * width + 4 * tokens * tokens)
    at_least(1, block=block)
    return itemsize * (2 * tokens * width + 2 * tokens * width * math.ceil(tokens / block))


def cache_bytes(layers: int, kv_heads: int, width: int, tokens: int, batch: int = 1, itemsize: int = 2) -> int:
    """Return the bytes of the keys and values of a network, ``width`` that of one
    head.
    """
    at_least(1, layers=layers, kv_heads=kv_heads, width=width, tokens=tokens, batch=batch, itemsize=itemsize)
    return 2 * layers * kv_heads * width * tokens * batch * itemsize


# --- In a network -----------------------------------------------------------------------------------------------------


class _AttentionBy(Attention):
    """The laboratory's attention, with another function in the middle."""

    def __init__(self, of: Attention, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self.heads, self.qkv, self.project, self.mix = of.heads, of.qkv, of.project, mix

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[N, tokens, width]`` to tokens of the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.project(self.mix(q, k, v).transpose(1, 2).flatten(2))


def with_attention(vit: nn.Module, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> nn.Module:
    """Return a copy of a network whose attention is another function, ``(q, k, v) ->
    mixed``; the weights stay.

    Raises
    ------
    ValueError : the network has no attention of ``lab.models``.
    """
    made = copy.deepcopy(vit)
    found = [name for name, module in made.named_modules() if isinstance(module, Attention)]
    require("vit", type(vit).__name__, lambda _: bool(found), "a network with attention, as lab.models.vit makes it")
    for name in found:
        of: Any = made.get_submodule(name)
        made.set_submodule(name, _AttentionBy(of, attention).train(of.training))
    return made
