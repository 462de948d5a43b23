"""Linear attention in four orders of multiplication: all are the sum of weighted values, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.efficiency.linear_attention import (
    causal_linear_attention,
    linear_attention,
    linear_attention_by_scores,
    linear_products,
    linear_step,
)
from course_lib.lab.costs import flops


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def qkv(queries: int = 11, keys: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, 3, queries, 4, seed=1), normal(2, 3, keys, 4, seed=2), normal(2, 3, keys, 4, seed=3)


def test_linear_attention_in_both_orders() -> None:
    q, k, v = qkv(7, 11)
    scores = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    expected = scores / scores.sum(-1, keepdim=True) @ v
    close(linear_attention_by_scores(q, k, v), expected)
    close(linear_attention(q, k, v), expected)


def test_causal_linear_attention_three_times() -> None:
    q, k, v = qkv()
    scores = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    expected = scores / scores.sum(-1, keepdim=True) @ v
    close(linear_attention_by_scores(q, k, v, causal=True), expected)
    close(causal_linear_attention(q, k, v), expected)
    state, rows = None, []
    for t in range(11):
        state, row = linear_step(state, q[..., t, :], k[..., t, :], v[..., t, :])
        rows.append(row)
    close(torch.stack(rows, -2), expected)
    assert state is not None
    assert state.memory.shape == (2, 3, 4, 4)


class Called(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return linear_attention(*inputs)


def test_products_are_those_counted() -> None:
    q, k, v = (x[:1, :1] for x in qkv())
    assert flops(Called(), (q, k, v)) == 2 * linear_products(11, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_types(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    for way in (linear_attention, causal_linear_attention, linear_attention_by_scores):
        assert way(q, k, v).dtype is dtype


def test_errors_at_the_door() -> None:
    with pytest.raises(ValueError, match="width=0: must be a whole number of at least 1"):
        linear_products(3, 0)
