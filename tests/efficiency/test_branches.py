"""Merged blocks against the blocks themselves, kernels against torch's convolutions one after and beside another."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.efficiency import branches as r
from course_lib.efficiency.branches import BLOCKS, Branches, repvgg


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def used(model: nn.Module) -> nn.Module:
    """As after training: the batch norms' statistics, scales and shifts are not those of a new network."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point() and "head" not in name:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return model.eval()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("m", "n", "stride"), [(6, 6, 1), (5, 6, 1), (6, 8, 2)])
def test_a_merged_block_gives_the_same(
    block: str, m: int, n: int, stride: int, dtype: torch.dtype, error: float
) -> None:
    made = used(BLOCKS[block](m, n, stride)).to(dtype)
    assert isinstance(made, Branches)
    x = normal(3, m, 7, 9).to(dtype)
    plain = made.merged()
    layer, last = plain
    assert isinstance(layer, nn.Conv2d)
    assert isinstance(last, nn.ReLU)
    assert layer.weight.shape == (n, m, 3, 3)
    wanted = made(x)
    assert (wanted > 0).any()
    assert (plain(x) - wanted).abs().max() < error * wanted.abs().max().clamp(min=1)


def test_a_repvgg_block_by_hand() -> None:
    """The paper's equation 2, and an identity only where the shape stays."""
    made = used(r.repvgg_block(4, 4)).double()
    assert isinstance(made, Branches)
    three, one, identity = made.branches
    x = normal(2, 4, 5, 5)
    assert torch.equal(made(x), F.relu(three(x) + one(x) + identity(x)))
    assert [len(r.repvgg_block(4, n, s).branches) for n, s in ((4, 1), (5, 1), (4, 2))] == [3, 2, 2]


def test_the_block_in_training_mode_is_another_function() -> None:
    made = used(r.repvgg_block(4, 4)).double()
    x = normal(2, 4, 5, 5)
    assert isinstance(made, Branches)
    assert (made.train()(x) - made.merged()(x)).abs().max() > 0.1
    assert made.merged().training
    made.eval()
    assert not made.merged().training


# --- Kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_folding_by_the_formula(affine: bool) -> None:
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.1, affine=affine)
    model = used(nn.Sequential(conv, norm)).double()
    x = normal(2, 3, 5, 5)
    weight, bias = r.fold(conv.weight, norm)
    torch.testing.assert_close(F.conv2d(x, weight, bias), model(x), rtol=1e-12, atol=1e-12)
    assert not weight.requires_grad
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.weight if affine else torch.ones(4)) / (norm.running_var + 0.1).sqrt()
    shift = (norm.bias if affine else torch.zeros(4)) - norm.running_mean * scale
    torch.testing.assert_close(bias, shift.detach(), rtol=1e-12, atol=1e-12)


def test_padding_keeps_the_convolution() -> None:
    x = normal(2, 3, 6, 7)
    for high, wide in ((1, 1), (1, 3), (3, 1), (3, 3)):
        w = normal(4, 3, high, wide)
        for size in (3, 5):
            large = F.conv2d(x, r.padded(w, size), padding=size // 2)
            torch.testing.assert_close(large, F.conv2d(x, w, padding=(high // 2, wide // 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_identity_is_torchs(kernel: int) -> None:
    wanted = nn.init.dirac_(torch.empty(4, 4, kernel, kernel, dtype=torch.float64))
    found = r.identity_kernel(4, kernel, wanted)
    assert torch.equal(found, wanted)
    assert found.dtype == torch.float64


def test_beside_one_another() -> None:
    x = normal(2, 3, 6, 7)
    kernels = [r.Kernel(normal(4, 3, 3, 3, seed=s), normal(4, seed=10 + s)) for s in range(3)]
    wanted = torch.stack([F.conv2d(x, *each, padding=1) for each in kernels]).sum(0)
    torch.testing.assert_close(F.conv2d(x, *r.in_parallel(iter(kernels)), padding=1), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_after_one_another(stride: int) -> None:
    x, first = normal(2, 3, 6, 7), normal(8, 3, 1, 1)
    second = r.Kernel(normal(4, 8, 3, 3, seed=1), normal(4, seed=2))
    wanted = F.conv2d(F.conv2d(x, first), *second, stride=stride, padding=1)
    found = F.conv2d(x, *r.in_sequence(first, second), stride=stride, padding=1)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
def test_a_network_and_what_it_becomes(block: str) -> None:
    model = used(repvgg((1, 12, 12), 5, width=4, block=block)).double()
    x = normal(3, 1, 12, 12)
    plain = r.reparameterise(model)
    wanted = model(x)
    torch.testing.assert_close(plain(x), wanted, rtol=1e-11, atol=1e-11)
    assert not [part for part in plain.modules() if isinstance(part, (Branches, nn.BatchNorm2d))]
    assert len([part for part in model.modules() if isinstance(part, Branches)]) == 6, "the network is as it was"
    assert torch.equal(model(x), wanted)
    # 3 x 3 with bias six times, and the head: whatever the branches were
    channels = [1, 4, 4, 8, 8, 16, 16]
    convolutions = sum(9 * a * b + b for a, b in itertools.pairwise(channels))
    assert sum(p.numel() for p in plain.parameters()) == convolutions + 16 * 5 + 5
    assert model.embedding(x).shape == (3, 16)  # type: ignore[operator]


def test_a_block_alone_is_merged_too() -> None:
    block = used(r.repvgg_block(3, 3)).double()
    x = normal(2, 3, 5, 5)
    torch.testing.assert_close(r.reparameterise(block)(x), block(x), rtol=1e-12, atol=1e-12)


def test_bad_input_is_named() -> None:
    def one(*layers: nn.Module) -> Callable[[], Any]:
        return lambda: Branches([nn.Sequential(*layers)], 4).merged()

    norm = nn.BatchNorm2d(4)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("branches=[]: must be at least one", lambda: Branches([], 4)),
        ("must be batch norm, or", one(nn.Conv2d(4, 4, 3, padding=1, bias=False))),
        ("must be batch norm, or", one(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), norm)),
        ("must be without bias", one(nn.Conv2d(4, 4, 3, padding=1), norm)),
        ("must be without bias", one(nn.Conv2d(4, 4, 3, bias=False), norm)),
        ("must be without bias", one(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), norm)),
        ("must be without bias", one(nn.Conv2d(4, 4, 3, padding=1, dilation=2, bias=False), norm)),
        ("must be without bias", one(nn.Conv2d(4, 4, 1, 2, bias=False), nn.Conv2d(4, 4, 1, bias=False), norm)),
        (
            "first=(8, 3, 3, 3): must be",
            lambda: r.in_sequence(normal(8, 3, 3, 3), r.Kernel(normal(4, 8, 3, 3), normal(4))),
        ),
        (
            "first=(7, 3, 1, 1): must be",
            lambda: r.in_sequence(normal(7, 3, 1, 1), r.Kernel(normal(4, 8, 3, 3), normal(4))),
        ),
        ("kernel=3: must be (5, 5)", lambda: r.padded(normal(4, 3, 5, 5), 3)),
        ("kernel=3: must be (2, 2)", lambda: r.padded(normal(4, 3, 2, 2), 3)),
        ("norm: must have", lambda: r.fold(normal(4, 3, 1, 1), nn.BatchNorm2d(4, track_running_stats=False))),
        ("block='quick': must be one of", lambda: repvgg((1, 8, 8), 3, block="quick")),
        ("depth=0: must be", lambda: repvgg((1, 8, 8), 3, depth=0)),
        ("expansion=0: must be", lambda: r.expanded_block(3, 3, expansion=0)),
        ("must be a network with Branches", lambda: r.reparameterise(nn.Linear(2, 2))),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = used(repvgg((1, 12, 12), 5, width=4)).double().cuda()
    x = normal(3, 1, 12, 12).cuda()
    torch.testing.assert_close(r.reparameterise(model)(x), model(x), rtol=1e-9, atol=1e-9)
