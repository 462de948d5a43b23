"""Attention that can be followed: torch's own computes all its heads behind one door."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """What an ``nn.MultiheadAttention`` computes, called as that is, with a layer for each of its four maps.

    The rows of ``query``, ``key`` and ``value`` are sorted by head, and so are the columns of ``project``. torch's own
    class cannot have fewer heads than fit its width; this one can.
    """

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.dropout, self.batch_first = original.num_heads, original.dropout, original.batch_first
        self.scale = original.head_dim**-0.5
        if original._qkv_same_embed_dim:
            weights = original.in_proj_weight.chunk(3)  # [3 width, width] -> three of [width, width]
            trains = original.in_proj_weight.requires_grad
        else:
            weights = original.q_proj_weight, original.k_proj_weight, original.v_proj_weight
            trains = original.q_proj_weight.requires_grad
        biases = (None,) * 3 if original.in_proj_bias is None else original.in_proj_bias.chunk(3)
        self.query, self.key, self.value = (
            _linear(weight, bias).requires_grad_(trains) for weight, bias in zip(weights, biases, strict=True)
        )
        out = original.out_proj
        self.project = _linear(out.weight, out.bias).requires_grad_(out.weight.requires_grad)
        self.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Batches ``[N, tokens, width]``, or ``[tokens, N, width]`` without ``batch_first``; see torch's own."""
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._heads(self.query(query)), self._heads(self.key(key)), self._heads(self.value(value))
        mask = _added(attn_mask, q)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, q)[:, None, None, :]  # [N, tokens] -> [N, 1, 1, tokens]
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = torch.matmul(q, k.transpose(-2, -1)) * self.scale
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout, self.training)
            mixed = torch.matmul(weights, v)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.project(mixed.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(
            1, 2
        )  # [N, tokens, heads * size] -> [N, heads, tokens, size]


def open_attention(model: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    """Put an `Attention` with the same weights in the place of each ``nn.MultiheadAttention``. Returns the model.

    Left as they are: those in a module named in ``keep``, those in ``nn.TransformerEncoderLayer`` and its kin, which
    reach into torch's own class, and those with a bias or a zero added to their keys.
    """
    for name, module in list(model.named_modules()):
        if not name or type(module) is not nn.MultiheadAttention or _holds(keep, name):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        if type(parent).__module__ == nn.TransformerEncoderLayer.__module__:
            continue
        if module.bias_k is None and not module.add_zero_attn:
            model.set_submodule(name, Attention(module))
    return model


def _holds(keep: Collection[str], name: str) -> bool:
    return any(name == kept or name.startswith(f"{kept}.") for kept in keep)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


def _added(mask: Tensor | None, like: Tensor) -> Any:
    """A mask as numbers to add to the scores; in torch's own, True means "do not look here"."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
