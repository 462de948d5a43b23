"""Cheap layers against torchvision's with the same weights, and their costs against what is counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import course_lib  # noqa: F401  mends torchvision's import where torch is a CPU-only build
from course_lib.efficiency import cheap_layers
from course_lib.efficiency.cheap_layers import BLOCKS, family, family_cost
from course_lib.lab.costs import flops

SHAPE = (1, 16, 16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def copied(source: nn.Module, target: nn.Module) -> None:
    """The weights of one in the other, in the order in which they were declared; batch norms made unlike new ones."""
    generator = torch.Generator().manual_seed(1)
    for buffer in source.state_dict().values():
        if buffer.is_floating_point() and buffer.ndim == 1:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    theirs = target.state_dict()
    values = source.state_dict().values()
    target.load_state_dict({name: value.clone() for name, value in zip(theirs, values, strict=True)})


# --- Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "stride"), [(6, 1), (8, 1), (6, 2)])
def test_the_inverted_residual_is_torchvisions(n: int, stride: int) -> None:
    from torchvision.models.mobilenetv2 import InvertedResidual

    ours = cheap_layers.inverted_residual(6, n, stride).double().eval()
    theirs = InvertedResidual(6, n, stride, expand_ratio=cheap_layers.EXPANSION).double().eval()
    copied(ours, theirs)
    x = 5 * normal(2, 6, 7, 9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert (ours.train()(x) - theirs.train()(x)).abs().max() < 1e-10


@pytest.mark.parametrize(("m", "stride"), [(8, 1), (6, 1), (8, 2)])
def test_the_bottleneck_is_torchvisions(m: int, stride: int) -> None:
    from torchvision.models.resnet import Bottleneck

    ours = cheap_layers.bottleneck(m, 8, stride).double().eval()
    shortcut = None if m == 8 and stride == 1 else nn.Sequential(nn.Conv2d(m, 8, 1, stride, bias=False), norm(8))
    theirs = Bottleneck(m, 2, stride, shortcut).double().eval()
    order = [theirs.conv1, theirs.bn1, theirs.conv2, theirs.bn2, theirs.conv3, theirs.bn3]
    copied(ours, nn.Sequential(*order, *([shortcut] if shortcut else [])))
    x = normal(2, m, 7, 9)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def test_the_shuffle_is_torchvisions_and_torchs() -> None:
    from torchvision.models.shufflenetv2 import channel_shuffle

    for groups in (1, 2, 3, 6):
        x = normal(2, 12, 3, 4)
        assert torch.equal(cheap_layers.channel_shuffle(x, groups), channel_shuffle(x, groups))
        assert torch.equal(cheap_layers.channel_shuffle(x, groups), nn.ChannelShuffle(groups)(x))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_separable_block_by_hand(kernel: int, stride: int) -> None:
    """Each channel by itself, then a matrix over channels at each place."""
    block = cheap_layers.depthwise_separable(4, 5, stride, kernel).double().eval()
    within, norm1, _, across, norm2, _ = block
    assert isinstance(within, nn.Conv2d)
    assert isinstance(across, nn.Conv2d)
    norm1.running_mean.copy_(normal(4))  # type: ignore[operator]
    norm2.running_mean.copy_(normal(5))  # type: ignore[operator]
    x = normal(2, 4, 6, 6)
    apart = [F.conv2d(x[:, c : c + 1], within.weight[c : c + 1], None, stride, kernel // 2) for c in range(4)]
    z = F.relu(norm1(torch.cat(apart, 1)))
    wanted = F.relu(norm2(torch.einsum("nm,bmhw->bnhw", across.weight[:, :, 0, 0], z)))
    torch.testing.assert_close(block(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "stride"), [(8, 1), (16, 1), (16, 2)])
def test_a_shuffle_unit_by_hand(n: int, stride: int) -> None:
    """The paper's figure 2 (b) and (c)."""
    block = cheap_layers.shuffle_unit(8, n, stride).double().eval()
    x = normal(2, 8, 6, 6)
    reduce, within, expand = ([*part] for part in (block.reduce, block.within, block.expand))
    z = F.conv2d(x, reduce[0].weight, groups=2) / (1 + 1e-5) ** 0.5
    z = nn.ChannelShuffle(2)(F.relu(z))
    z = F.conv2d(z, within[0].weight, None, stride, 1, groups=n // 4) / (1 + 1e-5) ** 0.5
    z = F.conv2d(z, expand[0].weight, groups=2) / (1 + 1e-5) ** 0.5
    wanted = F.relu(x + z) if n == 8 else F.relu(torch.cat([F.avg_pool2d(x, 3, stride, 1), z], 1))
    torch.testing.assert_close(block(x), wanted, rtol=1e-10, atol=1e-12)


def test_all_groups_of_a_shuffle_unit_hear_of_each_other() -> None:
    """What ``channel_shuffle`` is for: without it half of the outputs would never see half of the inputs."""
    block = cheap_layers.shuffle_unit(16, 16).double().eval()
    x = normal(1, 16, 4, 4).requires_grad_()
    body = block.expand(block.within(cheap_layers.channel_shuffle(block.reduce(x), 2)))
    (gradient,) = torch.autograd.grad(body[:, :8].square().sum(), x)
    assert (gradient[:, 8:] != 0).any()


# --- Costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("m", "n", "stride", "kernel"), [(8, 8, 1, 3), (8, 16, 1, 5), (8, 16, 2, 3), (16, 24, 2, 5)])
def test_the_cost_of_a_block_is_what_is_counted(block: str, m: int, n: int, stride: int, kernel: int) -> None:
    module = BLOCKS[block].build(m, n, stride, kernel)
    cost = BLOCKS[block].cost(m, n, (7, 10), stride, kernel)
    assert cost.parameters == sum(p.numel() for p in module.parameters())
    x = torch.zeros(1, m, 7, 10)
    assert 2 * cost.multiplications == flops(module.eval(), x)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert 2 * cost.multiplications == counter.get_total_flops()
    assert module(x).shape[1:] == (n, *cheap_layers.strided((7, 10), stride))


def test_separable_costs_the_share_of_the_paper() -> None:
    m, n, k = 32, 64, 3
    whole = cheap_layers.full_cost(m, n, (14, 14)).multiplications
    parts = cheap_layers.depthwise_separable_cost(m, n, (14, 14)).multiplications
    assert parts / whole == pytest.approx(1 / n + 1 / k**2, rel=1e-12)


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("width", "depth", "kernel"), [(8, 1, 3), (16, 2, 5)])
def test_a_family_costs_what_is_said(block: str, width: int, depth: int, kernel: int) -> None:
    shape = (3, 17, 12)
    model = family(shape, 7, block=block, width=width, depth=depth, kernel=kernel)
    cost = family_cost(shape, 7, block=block, width=width, depth=depth, kernel=kernel)
    x = torch.zeros(2, *shape)
    assert cost.parameters == model.parameter_count
    assert 2 * 2 * cost.multiplications == flops(model.eval(), x)
    assert model.embedding(x).shape == (2, 4 * width)
    assert torch.equal(model(x), model.head(model.embedding(x)))
    assert (model.name, model.input_shape, model.classes, len(model.blocks)) == (block, shape, 7, 3 * depth)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_width_that_comes_closest(block: str) -> None:
    step = BLOCKS[block].multiple
    costs = {w: family_cost(SHAPE, 10, block=block, width=w).multiplications for w in range(step, 41, step)}
    for budget in (0.6 * costs[step], 5e4, 1e5, 2.5e5):
        if budget > 0.5 * costs[step]:
            wanted = min(costs, key=lambda w: abs(costs[w] - budget))
            assert cheap_layers.width_for(budget, SHAPE, 10, block=block) == wanted


def test_bad_input_is_named() -> None:
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("kernel=4: must be odd", lambda: cheap_layers.full(4, 4, 1, 4)),
        ("stride=0: must be", lambda: cheap_layers.full(4, 4, 0)),
        ("groups=3: must be a divisor of the channels", lambda: cheap_layers.conv_norm(4, 6, groups=3)),
        ("groups=3: must be a divisor of the 4", lambda: cheap_layers.channel_shuffle(normal(1, 4, 2, 2), 3)),
        ("channels_out=6: must be a multiple of 4", lambda: cheap_layers.bottleneck(4, 6)),
        ("channels_out=8: must be more than", lambda: cheap_layers.shuffle_unit(8, 8, 2)),
        ("block='fast': must be one of full", lambda: family(SHAPE, 10, block="fast")),
        ("width=12: must be a multiple of 8", lambda: family(SHAPE, 10, block="shuffle_unit", width=12)),
        ("depth=0: must be", lambda: family_cost(SHAPE, 10, depth=0)),
        ("input_shape=(1, 16): must be", lambda: family((1, 16), 10)),
        ("multiplications=10: must be at least half", lambda: cheap_layers.width_for(10, SHAPE, 10, block="full")),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("block", BLOCKS)
def test_on_a_gpu(block: str) -> None:
    model = family(SHAPE, 10, block=block).double().eval()
    x = normal(3, *SHAPE)
    wanted = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), wanted, rtol=1e-9, atol=1e-9)
