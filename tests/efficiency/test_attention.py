"""Attention in all forms: against torch's own in float64, and gradients against numerical ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.efficiency import attention
from course_lib.efficiency.attention import (
    KVCache,
    Running,
    attention_products,
    attention_traffic,
    cache_bytes,
    cached_attention,
    flash_attention,
    grouped_attention,
    naive_attention,
    online_softmax,
    score_bytes,
    tiled_attention,
    visible,
    with_attention,
)
from course_lib.lab.costs import flops
from course_lib.lab.models import mlp, vit
from course_lib.lab.timing import peak_memory
from course_lib.partitioning.saved import Saved


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def qkv(queries: int = 11, keys: int = 11, heads: int = 3, kv_heads: int | None = None) -> tuple[Tensor, ...]:
    q = normal(2, heads, queries, 4, seed=1)
    return q, *(normal(2, kv_heads or heads, keys, 4, seed=seed) for seed in (2, 3))


KEEP = torch.tensor([[True] * 7 + [False] * 4, [False] * 2 + [True] * 9])
WAYS: dict[str, Any] = {
    "naive": naive_attention,
    **{f"flash {block}": partial(flash_attention, block=block) for block in (1, 3, 4, 11, 64)},
    "grouped": grouped_attention,
}

# --- Softmax attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_same_as_torch(name: str, causal: bool, padded: bool) -> None:
    q, k, v = qkv()
    keep = KEEP if padded else None
    see = torch.ones(11, 11, dtype=torch.bool).tril() if causal else torch.ones(11, 11, dtype=torch.bool)
    mask = see & KEEP[:, None, None, :] if padded else see
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    found = WAYS[name](q, k, v, causal=causal, keep=keep)
    close(found, expected)
    if causal and padded:
        assert not found[1, :, :2].any(), "a token that sees padding alone"
    if not padded:
        close(found, F.scaled_dot_product_attention(q, k, v, is_causal=causal))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("queries", "keys"), [(3, 11), (1, 5), (5, 3)])
def test_causal_queries_are_the_last_ones(name: str, queries: int, keys: int) -> None:
    q, k, v = qkv(queries, keys)
    allowed = torch.tensor([[j - (keys - queries) <= i for j in range(keys)] for i in range(queries)])
    assert torch.equal(visible(queries, keys, causal=True), allowed)
    close(WAYS[name](q, k, v, causal=True), F.scaled_dot_product_attention(q, k, v, attn_mask=allowed))


@pytest.mark.parametrize("name", WAYS)
def test_large_scores_do_not_overflow(name: str) -> None:
    q, k, v = qkv()
    close(WAYS[name](1e4 * q, k, v), F.scaled_dot_product_attention(1e4 * q, k, v))


def test_online_softmax_in_any_blocks() -> None:
    scores, v = 3 * normal(5, 12), normal(12, 4)
    running = Running.start(normal(5, 4), 4)
    for part in (slice(0, 1), slice(1, 7), slice(7, 12)):
        running = online_softmax(running, scores[:, part], v[part])
    close(running.result(), scores.softmax(-1) @ v)
    close(running.log_total(), scores.logsumexp(-1, keepdim=True))
    close(tiled_attention(*qkv(), block=4)[1].squeeze(-1), (qkv()[0] @ qkv()[1].mT / 2).logsumexp(-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients(causal: bool, padded: bool) -> None:
    inputs = [x[:, :1, :5].clone().requires_grad_() for x in qkv()]
    keep = torch.tensor([[True] * 3 + [False] * 2, [False] + [True] * 4]) if padded else None
    assert torch.autograd.gradcheck(partial(flash_attention, causal=causal, keep=keep, block=2), inputs)
    grads = torch.autograd.grad(flash_attention(*inputs, causal=causal, keep=keep, block=2).square().sum(), inputs)
    expected = torch.autograd.grad(naive_attention(*inputs, causal=causal, keep=keep).square().sum(), inputs)
    close(grads, expected)


def test_what_is_held_and_what_is_saved() -> None:
    tokens, heads, width, size = 128, 2, 8, 8
    q, k, v = (normal(1, heads, tokens, width, seed=seed).requires_grad_() for seed in range(3))
    scores = heads * score_bytes(tokens, tokens, size)
    with torch.no_grad():
        naive = peak_memory(lambda: naive_attention(q, k, v), device="cpu").bytes
        tiled = peak_memory(lambda: flash_attention(q, k, v, block=16), device="cpu").bytes
    assert naive >= 2 * scores
    assert tiled < scores / 2
    inputs = 3 * heads * tokens * width * size
    with Saved() as saved:
        held = flash_attention(q, k, v, block=16)
        assert saved.now == inputs + heads * tokens * (width + 1) * size
    del held
    with Saved() as saved:
        naive_attention(q, k, v)
    assert saved.peak > 2 * scores


# --- Generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("sizes", [[1] * 6, [4, 1, 1], [6], [3, 3]])
def test_a_cache_gives_the_rows_of_one_causal_pass(kv_heads: int, sizes: list[int]) -> None:
    q, k, v = qkv(6, 6, heads=4, kv_heads=kv_heads)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    cache = KVCache((2, kv_heads, 4), 8, dtype=torch.float64)
    parts = [x.split(sizes, -2) for x in (q, k, v)]
    found = [cached_attention(*new, cache) for new in zip(*parts, strict=True)]
    close(torch.cat(found, -2), expected)
    assert cache.length == 6
    assert cache.size == cache_bytes(1, kv_heads, 4, 8, 2, 8)


def test_appended_keys_are_views() -> None:
    cache = KVCache((1, 1, 2), 3)
    first, _ = cache.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    second, values = cache.append(2 * torch.ones(1, 1, 2, 2), 3 * torch.ones(1, 1, 2, 2))
    assert first.data_ptr() == second.data_ptr()
    assert second[0, 0, :, 0].tolist() == [1, 2, 2]
    assert values[0, 0, :, 0].tolist() == [1, 3, 3]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads_are_torchs(kv_heads: int) -> None:
    q, k, v = qkv(heads=6, kv_heads=kv_heads)
    close(grouped_attention(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    mask = visible(11, 11, causal=True, keep=KEEP)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    close(grouped_attention(q, k, v, causal=True, keep=KEEP), expected)


# --- Costs ------------------------------------------------------------------------------------------------------------


class Called(nn.Module):
    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.fn(*inputs)


def test_products_are_those_counted() -> None:
    q, k, v = (x[:1, :1] for x in qkv(7, 11))
    assert flops(Called(naive_attention), (q, k, v)) == 2 * attention_products(7, 11, 4)
    assert flops(Called(F.scaled_dot_product_attention), (q, k, v)) == 2 * attention_products(7, 11, 4)
    assert flops(Called(tiled_attention), (q, k, v)) == 2 * attention_products(7, 11, 4)


def test_bytes_by_hand() -> None:
    assert score_bytes(1024, 1024) == 4 << 20
    assert score_bytes(1024, 1024, 2, 64) == 8192
    assert score_bytes(10, 1024, 2, 64) == 10 * 64 * 2
    assert attention_traffic(100, 10, 1) == 4 * 1000 + 4 * 10_000
    assert attention_traffic(100, 10, 2, 30) == 2 * (2000 + 2000 * 4)
    assert attention_traffic(100, 10, 1, 100) == 4 * 1000
    assert cache_bytes(32, 32, 128, 4096) == 2 << 30


# --- In a network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [naive_attention, flash_attention, grouped_attention])
def test_a_network_with_another_attention(fn: Any) -> None:
    torch.manual_seed(0)
    model, x = vit((1, 8, 8), 3, width=8, heads=2).double().eval(), normal(2, 1, 8, 8)
    made = with_attention(model, fn)
    close(made(x), model(x))
    assert not made.training
    assert made.state_dict().keys() == model.state_dict().keys()
    assert made.blocks[0].attention.qkv.weight is not model.blocks[0].attention.qkv.weight  # type: ignore[index,union-attr]
    other = with_attention(model, lambda q, k, v: v)
    assert (other(x) - model(x)).abs().max() > 1e-3
    close(with_attention(other, fn)(x), model(x))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    q, k, v = (x.float().cuda() for x in qkv())
    for way in WAYS.values():
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(11, 11, causal=True, device=q.device))
        torch.testing.assert_close(way(q, k, v, causal=True), expected, rtol=1e-4, atol=1e-5)
    cache = KVCache((2, 3, 4), 11, device="cuda")
    torch.testing.assert_close(
        cached_attention(q, k, v, cache), naive_attention(q, k, v, causal=True), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_types(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv())
    for way in WAYS.values():
        assert way(q, k, v).dtype is dtype
    torch.testing.assert_close(flash_attention(q, k, v, block=4), naive_attention(q, k, v), rtol=2e-2, atol=2e-2)


def test_errors_at_the_door() -> None:
    q, k, v = qkv(heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="heads=3: must be a multiple of the 2 of k"):
        grouped_attention(q, k, v)
    with pytest.raises(ValueError, match="block=0: must be a whole number of at least 1"):
        flash_attention(*qkv(), block=0)
    cache = KVCache((1, 1, 2), 3)
    with pytest.raises(ValueError, match=r"k=\(1, 2, 1, 2\): must be of the shape \(1, 1, 1, 2\)"):
        cache.append(torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1, 2))
    with pytest.raises(ValueError, match="tokens=4: must be at most 3, for which there is room"):
        cache.append(torch.ones(1, 1, 4, 2), torch.ones(1, 1, 4, 2))
    with pytest.raises(ValueError, match="vit='MLP': must be a network with attention"):
        with_attention(mlp((1, 4, 4), 2), naive_attention)
    with pytest.raises(ValueError, match="capacity=0"):
        KVCache((1, 1, 2), 0)
    assert attention.visible(2, 2).all()


def test_a_cache_refuses_values_of_another_shape() -> None:
    for v in (torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 3)):
        with pytest.raises(ValueError, match=r"v=.*: must be of the shape \(1, 1, 1, 2\)"):
            KVCache((1, 1, 2), 3).append(torch.ones(1, 1, 1, 2), v)
