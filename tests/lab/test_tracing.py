"""Channels followed: opened attention against torch's own; groups of a network (their ties are tested with pruning)."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib.lab.models import mlp, resnet
from course_lib.lab.tracing import Attention, channel_groups, follow, groups_of, open_attention

BLOCKED = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "tokens first": ({"batch_first": False}, {}),
    "without biases": ({"bias": False}, {}),
    "no weights asked for": ({}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "mask of truths": ({}, {"attn_mask": BLOCKED}),
    "mask of numbers": ({}, {"attn_mask": torch.linspace(-2, 1, 25, dtype=torch.float64).view(5, 5)}),
    "padding": ({}, {"key_padding_mask": PADDED}),
    "padding and mask": ({}, {"key_padding_mask": PADDED, "attn_mask": BLOCKED, "need_weights": False}),
    "other widths": ({"kdim": 6, "vdim": 4}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_opened_attention_computes_what_torchs_does(case: str) -> None:
    settings, call = CASES[case]
    torch.manual_seed(0)
    original = nn.MultiheadAttention(12, 3, **{"batch_first": True} | settings).double()
    for parameter in original.parameters():
        parameter.data.normal_()
    inputs = [torch.randn(3, 5, settings.get(name, 12), dtype=torch.float64) for name in ("width", "kdim", "vdim")]
    if not original.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    opened = Attention(original)
    for found, expected in zip(opened(*inputs, **call), original(*inputs, **call), strict=True):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.second(*[self.first(x, x, x)[0]] * 3)[0])


def test_only_what_can_be_opened_is_and_in_its_own_mode_and_freedom() -> None:
    model = Kept().eval()
    model.first.requires_grad_(False)
    expected = model(x := torch.randn(2, 3, 8))
    found = open_attention(copy.deepcopy(model), keep=["second"])
    assert type(found.first) is Attention
    assert type(found.second) is type(found.layer.self_attn) is nn.MultiheadAttention
    assert not found.first.training
    assert not any(p.requires_grad for p in found.first.parameters())
    torch.testing.assert_close(found(x), expected)


def test_groups_of_a_network_that_permute_together() -> None:
    """What a reader of groups relies on: reordering a group's units by its members leaves the outputs as they were."""
    for model, x in ((mlp((1, 8, 8), 5, width=6, depth=2), torch.randn(2, 1, 8, 8)),
                     (resnet((1, 8, 8), 5, width=4).eval(), torch.randn(2, 1, 8, 8))):  # fmt: skip
        expected = model(x)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        moved = 0
        for group in channel_groups(model, x):
            if group.why_not is None:
                order = torch.randperm(group.units, generator=torch.Generator().manual_seed(1))
                for member in group.members:
                    there, come_from = member.indices.flatten(), member.indices[order].flatten()
                    tensor = state[member.name].data
                    tensor.index_copy_(member.dim, there, tensor.index_select(member.dim, come_from))
                moved += 1
        assert moved
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_followed_network_does_not_wait_for_the_garbage_collector() -> None:
    model, x = resnet((1, 8, 8), 5, width=4).eval(), torch.randn(2, 1, 8, 8)
    gone = weakref.ref(model)
    gc.disable()
    try:
        assert groups_of(follow(model, x))
        del model
        assert gone() is None
    finally:
        gc.enable()
