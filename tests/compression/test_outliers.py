"""Outliers against the same products written out, and functions that must stay as they are to the last digits."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard
from torch import Tensor, nn

from course_lib.compression import outliers as ol
from course_lib.compression import second_order as so
from course_lib.compression.quantisation import Grid, quantise_weight
from course_lib.lab.models import ViT, convnet, vit

CHANNELS = [3, 10]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(count: int = 12, seed: int = 0) -> Tensor:
    return normal(count, 1, 8, 8, seed=seed)


@pytest.fixture(scope="module")
def model() -> ViT:
    """Its norms are not those of a new network."""
    torch.manual_seed(0)
    made = vit((1, 8, 8), 5, width=16, depth=2, heads=2).double()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * normal(*parameter.shape, seed=len(name))
    return made


@pytest.fixture(scope="module")
def loud(model: ViT) -> nn.Module:
    return ol.inject_outliers(model, batch(), channels=CHANNELS, factor=64)


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight  # type: ignore[return-value]


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def apart(a: nn.Module, b: nn.Module, seed: int = 7) -> float:
    """The root mean square of the difference of the answers, as a part of the answers'."""
    x = batch(40, seed)
    return float((answer(a, x) - answer(b, x)).square().mean().sqrt() / answer(a, x).square().mean().sqrt())


# --- Products of integers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scales", ["row", "tensor"])
def test_products_of_integers_are_those_of_rounded_reals(bits: int, scales: Any) -> None:
    x, w = normal(2, 7, 12), normal(5, 12, seed=1)
    top = 2 ** (bits - 1) - 1
    step = (x.abs().amax(-1, keepdim=True) if scales == "row" else x.abs().max()) / top
    rounded = torch.round(x / step).clamp(-top, top) * step
    wanted = F.linear(rounded, quantise_weight(w, Grid(bits)).dequantise())
    torch.testing.assert_close(ol.int8_matmul(x, w, bits=bits, scales=scales), wanted, rtol=0, atol=1e-12)
    assert ol.int8_matmul(x.bfloat16(), w.bfloat16()).dtype == torch.bfloat16
    assert not ol.int8_matmul(0 * x, w).any()


def test_a_row_of_its_own_scale_is_not_spoilt_by_others() -> None:
    x, w = normal(4, 12), normal(5, 12, seed=1)
    alone = ol.int8_matmul(x[:1], w)
    x[1:] *= 1000
    torch.testing.assert_close(ol.int8_matmul(x, w)[:1], alone, rtol=0, atol=1e-12)
    assert (ol.int8_matmul(x, w, scales="tensor")[:1] - x[:1] @ w.mT).abs().max() > 0.3


def test_outlier_channels_in_full_precision() -> None:
    x, w = normal(3, 6, 12), normal(5, 12, seed=1)
    x[1, 2, 4], x[0, 0, 9] = -9.0, 6.0
    large = [4, 9]
    rest = [c for c in range(12) if c not in large]
    wanted = x[..., large] @ w[:, large].mT + ol.int8_matmul(x[..., rest], w[:, rest])
    torch.testing.assert_close(ol.llm_int8(x, w), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(ol.llm_int8(x, w, threshold=1e-9), x @ w.mT)
    torch.testing.assert_close(ol.llm_int8(x, w, threshold=1e9, bits=4), ol.int8_matmul(x, w, bits=4))


# --- Rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8, 64, 12, 7])
def test_the_rotation_is_hadamards(size: int) -> None:
    """In blocks where the size is no power of two; orthogonal, and with signs before it."""
    block = size & -size
    by_blocks = torch.block_diag(*[torch.from_numpy(hadamard(block)).double() / block**0.5] * (size // block))
    x, signs = normal(3, 2, size), ol.random_signs(size, torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(ol.rotate(x), x @ by_blocks)
    torch.testing.assert_close(ol.rotate(x, signs), x @ torch.diag(signs) @ by_blocks)
    torch.testing.assert_close(ol.rotate(x, signs).square().sum(-1), x.square().sum(-1))
    assert set(ol.random_signs(64, torch.Generator().manual_seed(0)).tolist()) == {-1.0, 1.0}


def test_turning_both_changes_no_product() -> None:
    x, w = normal(3, 5, 48), normal(7, 48, seed=1)
    exact: ol.Matmul = lambda a, b: a @ b.mT  # noqa: E731
    for generator in (None, torch.Generator().manual_seed(2)):
        turned = ol.rotated_matmul(x, w, matmul=exact, generator=generator)
        torch.testing.assert_close(turned, x @ w.mT, rtol=0, atol=1e-12)


def test_turning_spreads_an_outlier() -> None:
    x = normal(50, 64)
    x[:, 5] *= 100
    assert ol.peak_to_rms(x) > 12
    assert ol.peak_to_rms(ol.rotate(x)) < 6
    assert ol.peak_to_rms(torch.tensor([3.0, -4.0, 0.0, 0.0])) == pytest.approx(4 / 2.5)
    w, exact = normal(9, 64, seed=1), x @ normal(9, 64, seed=1).mT
    plain, turned = (f(x, w) for f in (ol.int8_matmul, ol.rotated_matmul))
    assert (turned - exact).abs().mean() < 0.5 * (plain - exact).abs().mean()


# --- In a network -----------------------------------------------------------------------------------------------------


def test_layers_that_multiply_otherwise(model: ViT) -> None:
    seen: list[tuple[int, ...]] = []

    def watched(x: Tensor, w: Tensor) -> Tensor:
        seen.append(tuple(w.shape))
        return 2 * x @ w.mT

    made = ol.with_matmul(model, watched, layers=["blocks.1.mlp.2", "head"])
    found = answer(made, batch())
    assert seen == [(16, 64), (5, 16)]
    by_hand = copy.deepcopy(model)
    for name in ("blocks.1.mlp.2", "head"):
        weight_of(by_hand, name).data *= 2
    torch.testing.assert_close(found, answer(by_hand, batch()), rtol=0, atol=1e-12)
    assert sum(isinstance(part, ol.MatmulLinear) for part in ol.with_matmul(model, watched).modules()) == 9
    assert not any(isinstance(part, ol.MatmulLinear) for part in model.modules())
    bare = ol.with_matmul(nn.Sequential(nn.Linear(4, 3, bias=False)), ol.int8_matmul)
    assert bare(torch.ones(2, 4)).shape == (2, 3)


def test_the_norms_and_who_reads_them(model: ViT) -> None:
    wanted = {
        f"blocks.{k}.{norm}": [f"blocks.{k}.{linear}"]
        for k in range(2)
        for norm, linear in (("norm1", "attention.qkv"), ("norm2", "mlp.0"))
    }
    assert ol.norm_pairs(model, batch()) == wanted
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def inputs_of(model: nn.Module, name: str) -> Tensor:
    return torch.cat([rows for _, rows in so.layer_inputs(model, [batch()], {name: model.get_submodule(name)})])


def test_injected_outliers_change_no_bit(model: ViT, loud: nn.Module) -> None:
    assert torch.equal(answer(loud, batch(9, 4)), answer(model, batch(9, 4)))
    for name in ("blocks.0.attention.qkv", "blocks.1.mlp.0"):
        before, after = (inputs_of(each, name) for each in (model, loud))
        factor = torch.ones(16, dtype=torch.float64)
        factor[CHANNELS] = 64
        assert torch.equal(after, before * factor)
    for name in ("blocks.0.attention.project", "blocks.1.mlp.2", "head"):
        assert torch.equal(inputs_of(loud, name), inputs_of(model, name))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_smoothing_shares_and_keeps_the_function(loud: nn.Module, alpha: float) -> None:
    seen = [batch(seed=1), batch(seed=2)]
    made = ol.smooth_quant(loud, iter(seen), alpha=alpha)
    torch.testing.assert_close(answer(made, batch(30, 4)), answer(loud, batch(30, 4)), rtol=0, atol=1e-12)
    for name in ("blocks.0.attention.qkv", "blocks.1.mlp.0"):
        rows = [
            torch.cat([r for _, r in so.layer_inputs(each, seen, {name: each.get_submodule(name)})])
            for each in (loud, made)
        ]
        before, after = (r.abs().amax(0) for r in rows)
        weight, smoothed = (weight_of(each, name).detach().abs().amax(0) for each in (loud, made))
        scales = before**alpha / weight ** (1 - alpha)
        torch.testing.assert_close(after, before / scales, rtol=1e-9, atol=0)
        torch.testing.assert_close(smoothed, weight * scales, rtol=1e-9, atol=0)


def test_a_channel_that_is_silent_keeps_its_scale() -> None:
    one, none = torch.tensor([4.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 0.0])
    assert ol.smooth_scales(one, none).tolist() == [2.0, 1.0, 1.0]


def test_several_layers_behind_one_norm() -> None:
    """Queries and values by layers of their own: they share a scale, from the largest weight of either."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return torch.cat([self.a(y), self.b(y)], -1)

    torch.manual_seed(0)
    model, x = Two().double(), normal(20, 6)
    assert ol.norm_pairs(model, x) == {"norm": ["a", "b"]}
    made = ol.smooth_quant(model, [x])
    torch.testing.assert_close(answer(made, x), answer(model, x), rtol=0, atol=1e-12)
    largest = torch.cat([made.a.weight, made.b.weight]).abs().amax(0)  # type: ignore[union-attr, list-item]
    torch.testing.assert_close(made.norm(x).abs().amax(0), largest)  # type: ignore[operator]


def test_outliers_spoil_8_bits_and_each_way_mends_it(model: ViT, loud: nn.Module) -> None:
    per_tensor = partial(ol.int8_matmul, scales="tensor")
    quiet = apart(model, ol.with_matmul(model, per_tensor))
    spoilt = apart(model, ol.with_matmul(loud, per_tensor))
    assert spoilt > 8 * quiet
    smooth = ol.smooth_quant(loud, [batch(seed=1)])
    mended = {
        "smooth": ol.with_matmul(smooth, per_tensor),
        "rotated": ol.with_matmul(loud, partial(ol.rotated_matmul, matmul=per_tensor)),
        "mixed": ol.with_matmul(loud, partial(ol.llm_int8, threshold=10.0)),
    }
    # of n channels a rotation lowers the peak by sqrt(n) at best, and here n is only 16
    for name, most in (("smooth", 0.4), ("rotated", 0.6), ("mixed", 0.2)):
        assert apart(model, mended[name]) < most * spoilt, name


# --- Weights alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", 4])
def test_awq_by_hand(granularity: Any) -> None:
    """All exponents tried, the error from the outputs themselves."""
    w, x = normal(8, 12), normal(200, 12, seed=1) * torch.logspace(0, 1.5, 12, dtype=torch.float64)
    made = ol.awq(w, x.abs().mean(0), so.hessian(x), Grid(3), granularity, points=10)
    tried = []
    for alpha in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        s = x.abs().mean(0) ** alpha
        s = s / (s.max() * s.min()) ** 0.5
        rounded = quantise_weight(w * s, Grid(3), granularity).dequantise()
        tried.append((float(((x / s) @ rounded.mT - x @ w.mT).square().sum()), rounded / s))
    best, wanted = min(tried, key=lambda each: each[0])
    torch.testing.assert_close(made.dequantise(), wanted)
    assert float(made.scales.max() * made.scales.min()) == pytest.approx(1), "around 1"
    assert best < 0.9 * tried[0][0], "better than the nearest"
    assert made.bits_per_weight == made.weight.bits_per_weight


def test_awq_with_silent_inputs() -> None:
    w, x = normal(8, 12), normal(50, 12, seed=1)
    x[:, 3] = 0
    assert ol.awq(w, x.abs().mean(0), so.hessian(x), Grid(3), 4).dequantise().isfinite().all()
    silent = ol.awq(w, torch.zeros(12), torch.zeros(12, 12, dtype=torch.float64), Grid(3), 4)
    torch.testing.assert_close(silent.dequantise(), quantise_weight(w, Grid(3), 4).dequantise())


def test_awq_in_a_network(model: ViT) -> None:
    seen = [batch(seed=1), batch(seed=2)]
    found = ol.awq_model(model, iter(seen), Grid(3), 8, points=5)
    assert [*found] == [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    for name, made in found.items():
        rows = torch.cat([r for _, r in so.layer_inputs(model, seen, {name: model.get_submodule(name)})])
        weight = weight_of(model, name).detach()
        by_hand = ol.awq(weight, rows.abs().mean(0), so.hessian(rows), Grid(3), 8, points=5)
        torch.testing.assert_close(made.dequantise(), by_hand.dequantise())
    assert [*ol.awq_model(model, seen, Grid(3), layers=["head"])] == ["head"]


def test_awq_weights_go_where_the_norm_divides(loud: nn.Module) -> None:
    """What ``Scaled`` stands for: rounded columns that were enlarged, and a norm that is as much smaller."""
    name, norm = "blocks.0.mlp.0", "blocks.0.norm2"
    made = ol.awq_model(loud, [batch(seed=1)], Grid(4), 8, layers=[name])[name]
    assert float(made.scales.max() / made.scales.min()) > 2
    folded = copy.deepcopy(loud)
    ol.migrate(folded.get_submodule(norm), [folded.get_submodule(name)], made.scales)  # type: ignore[arg-type, list-item]
    weight_of(folded, name).data = made.weight.dequantise()
    wanted = so.with_weights(loud, {name: made})
    torch.testing.assert_close(answer(folded, batch()), answer(wanted, batch()), rtol=0, atol=1e-11)


# --- Bad input --------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Something else reads the norm, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.linear(y)


def test_bad_input_is_named(model: ViT) -> None:
    w, x, h = normal(3, 4), normal(5, 4), torch.eye(4, dtype=torch.float64)
    shared, plain = Shared().double(), convnet((1, 8, 8), 4, width=2).double()
    inject = partial(ol.inject_outliers, model, batch())
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("scales='column': must be 'row' or 'tensor'", lambda: ol.int8_matmul(x, w, scales="column")),  # type: ignore[arg-type]
        ("threshold=0: must be", lambda: ol.llm_int8(x, w, threshold=0)),
        ("count=0: must be", lambda: ol.random_signs(0, torch.Generator())),
        ("layers='embed': must be among blocks.0", lambda: ol.with_matmul(model, ol.int8_matmul, layers=["embed"])),
        ("alpha=1.5: must be", lambda: ol.smooth_quant(model, [batch()], alpha=1.5)),
        ("batches=[]: must be", lambda: ol.smooth_quant(model, [])),
        ("pairs={}: must be", lambda: ol.smooth_quant(plain, [batch()])),
        ("channels=[16]: must be whole numbers from 0 to 15", lambda: inject(channels=[16])),
        ("channels=[-1]: must be whole numbers from 0 to 15", lambda: inject(channels=[-1])),
        ("factor=0: must be", lambda: inject(channels=[1], factor=0)),
        ("pairs: something else reads", lambda: ol.inject_outliers(shared, x, channels=[0])),
        ("magnitudes=(3,): must be of shape (4,)", lambda: ol.awq(w, torch.ones(3), h, Grid(3))),
        ("points=0: must be", lambda: ol.awq(w, torch.ones(4), h, Grid(3), points=0)),
        ("batches=[]: must be", lambda: ol.awq_model(model, [], Grid(3))),
        ("layers='embed': must be among blocks.0", lambda: ol.awq_model(model, [batch()], Grid(3), layers=["embed"])),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_on_the_gpu(model: ViT) -> None:
    there = copy.deepcopy(model).cuda()
    some = ["blocks.0.attention.qkv", "blocks.0.mlp.0"]
    assert answer(ol.with_matmul(there, ol.rotated_matmul, layers=some), batch().cuda()).is_cuda
    loud = ol.inject_outliers(there, batch().cuda(), channels=CHANNELS)
    smooth = ol.smooth_quant(loud, [batch().cuda()])
    torch.testing.assert_close(answer(smooth, batch().cuda()).cpu(), answer(model, batch()), rtol=0, atol=1e-9)
    here = ol.awq_model(model, [batch()], Grid(3), 8, layers=some, points=5)
    for name, made in ol.awq_model(there, [batch().cuda()], Grid(3), 8, layers=some, points=5).items():
        torch.testing.assert_close(made.dequantise().cpu(), here[name].dequantise())
