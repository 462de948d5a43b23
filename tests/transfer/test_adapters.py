"""Adapters, low-rank updates and prompts: the network itself at first, their formulas afterwards, plain when merged."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import transfer
from course_lib.lab.models import freeze, vit
from course_lib.lab.training import fit
from tests.transfer.small import (
    EXACT,
    NAMES,
    batch,
    close,
    data,
    generator,
    moved,
    network,
    normal,
    same_weights,
    shaken,
    untouched,
)

BUILDERS: dict[str, Any] = {
    "adapters": lambda model: transfer.with_adapters(model, 3, generator=generator()),
    "residual": transfer.with_residual_adapters,
    "lora": lambda model: transfer.lora(model, 2, 4.0, generator=generator()),
}
FITTING = [("adapters", "vit"), ("residual", "convnet"), ("residual", "resnet"), *(("lora", name) for name in NAMES)]


@pytest.mark.parametrize(("kind", "name"), FITTING)
def test_at_first_it_is_the_network(kind: str, name: str) -> None:
    model = network(name)
    untouched(model, lambda: BUILDERS[kind](model))
    found = BUILDERS[kind](model)
    close(found(batch()), model(batch()), 0)
    assert set(model.state_dict()) <= set(found.state_dict()), "the network's weights keep their names"
    same_weights(transfer.without_adapters(shaken(freeze_all_but_new(found))), model)


def freeze_all_but_new(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("adapter" in name or "lora" in name)
    return model


@pytest.mark.parametrize(("kind", "name"), FITTING)
def test_training_moves_the_new_part_and_the_head(kind: str, name: str) -> None:
    model = network(name)
    found = BUILDERS[kind](model)
    before = copy.deepcopy(found)
    fit(found, data(40), EXACT, seed=0)
    changed = moved(before, found)
    norms = {
        f"{n}.{own}"
        for n, part in model.named_modules()
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm)
        for own in part.state_dict()
    }
    new = {n for n in changed if "adapter" in n or "lora" in n or n.startswith("head.")}
    assert changed - new <= (norms if kind != "lora" else set())
    assert any("adapter" in n or "lora" in n for n in changed)
    assert "head.weight" in changed
    plain = {n for n, part in model.named_modules() if type(part) in (nn.Linear, nn.Conv2d) and n != "head"}
    assert not changed & {f"{n}.weight" for n in plain}


# --- Adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_stand_behind_each_branch() -> None:
    found: Any = shaken(transfer.with_adapters(network("vit"), 3, generator=generator()))
    x = batch()
    tokens = found.embed(x).flatten(2).transpose(1, 2) + found.position

    def detour(adapter: Any, h: Tensor) -> Tensor:
        inner = F.gelu(h @ adapter.down.weight.T + adapter.down.bias)
        return h + inner @ adapter.up.weight.T + adapter.up.bias

    for block in found.blocks:
        plain = copy.deepcopy(block.attention)
        plain._forward_hooks.clear()
        tokens = tokens + detour(block.attention.adapter, plain(block.norm1(tokens)))
        inner = block.mlp[2](block.mlp[1](block.mlp[0](block.norm2(tokens))))
        tokens = tokens + detour(block.mlp.adapter, inner)
    close(found(x), found.head(found.norm(tokens).mean(1)))
    own = {n for n, p in found.named_parameters() if p.requires_grad}
    assert {n for n in own if "adapter" not in n} == {n for n in own if "norm" in n or n.startswith("head.")}
    width, inside = 8, 3
    new = sum(p.numel() for n, p in found.named_parameters() if "adapter" in n)
    assert new == 4 * (2 * width * inside + width + inside)


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_residual_adapters_are_a_mixture_of_channels(name: str) -> None:
    found: Any = shaken(transfer.with_residual_adapters(network(name)))
    by_hand = transfer.without_adapters(found)
    for key, part in found.named_modules():
        if isinstance(part, nn.Conv2d) and "adapter" in part._modules:
            mix = torch.eye(part.out_channels, dtype=torch.float64) + part.adapter.weight[:, :, 0, 0]  # type: ignore[union-attr, index]
            weight = torch.einsum("oc,cikl->oikl", mix, part.weight)
            by_hand.get_submodule(key).weight.data.copy_(weight)  # type: ignore[operator]
        assert not (key.endswith("shortcut.0") and "adapter" in part._modules), "a 1x1 convolution gets none"
    close(found.eval()(batch()), by_hand.eval()(batch()))
    same_weights(transfer.merged(found), by_hand, 1e-12)


def test_residual_adapters_mix_biases_too() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 36, 2)).double()
    found = shaken(transfer.with_residual_adapters(model))
    close(transfer.merged(found)(batch().expand(-1, 2, -1, -1)), found(batch().expand(-1, 2, -1, -1)), 1e-12)


# --- Low-rank updates -------------------------------------------------------------------------------------------------


def test_a_low_rank_update_of_a_linear_layer_is_its_formula() -> None:
    model: Any = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    found: Any = shaken(transfer.lora(model, 2, 3.0, ["0"], generator=generator()))
    x, update = normal(4, 5), found[0].lora
    hidden = x @ model[0].weight.T + model[0].bias + 3 / 2 * (x @ update.down.weight.T @ update.up.weight.T)
    close(found(x), hidden @ found[1].weight.T + found[1].bias)
    assert update.down.weight.shape == (2, 5)
    assert update.up.weight.shape == (7, 2)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_low_rank_update_of_a_convolution_is_one_of_its_kernel(stride: int) -> None:
    conv = nn.Conv2d(3, 4, (3, 2), stride=stride, padding=(2, 1), dilation=(1, 2), padding_mode="reflect").double()
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(4, 2)).double()
    found: Any = shaken(transfer.lora(model, 2, 6.0, generator=generator()))
    update = found[0].lora
    product = torch.einsum("or,rikl->oikl", update.up.weight[:, :, 0, 0], update.down.weight)
    plain = copy.deepcopy(conv)
    with torch.no_grad():
        plain.weight += 6 / 2 * product
    x = normal(2, 3, 8, 9)
    close(found[0](x), plain(x))
    close(transfer.merged(found)[0](x), plain(x), 1e-12)  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
def test_merged_it_is_a_plain_network_that_computes_the_same(name: str) -> None:
    model = network(name)
    found = transfer.lora(model, 2, 4.0, generator=generator())
    fit(found, data(40), EXACT, seed=0)
    plain = transfer.merged(found)
    close(plain.eval()(batch()), found.eval()(batch()), 1e-12)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert type(plain) is type(model)
    assert transfer.trainable(plain) == transfer.trainable(model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in plain.modules())


def test_names_choose_layers() -> None:
    found = transfer.lora(network("vit"), 2, 4.0, ["*.qkv", "blocks.1.mlp.?"], generator=generator())
    chosen = {name.removesuffix(".lora") for name, part in found.named_modules() if isinstance(part, transfer.LowRank)}
    assert chosen == {"blocks.0.attention.qkv", "blocks.1.attention.qkv", "blocks.1.mlp.0", "blocks.1.mlp.2"}


def test_it_is_what_peft_computes() -> None:
    import peft  # here: it takes seconds

    model = network("vit")
    ours: Any = shaken(transfer.lora(model, 2, 5.0, ["*.qkv", "embed"], generator=generator()))
    settings = peft.LoraConfig(r=2, lora_alpha=5.0, target_modules=["qkv", "embed"], lora_dropout=0.0)
    theirs = peft.get_peft_model(copy.deepcopy(model), settings).double()
    inner = theirs.base_model.model
    inner.head = copy.deepcopy(ours.head)
    with torch.no_grad():
        for name, part in ours.named_modules():
            if isinstance(part, transfer.LowRank):
                layer = inner.get_submodule(name.removesuffix(".lora"))
                layer.lora_A["default"].weight.copy_(part.down.weight)
                layer.lora_B["default"].weight.copy_(part.up.weight)
    x = batch()
    close(ours(x), theirs(x), 1e-12)
    close(transfer.merged(ours)(x), theirs.merge_and_unload()(x), 1e-12)


def test_a_stabilised_scale_is_over_the_root_of_the_rank() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    found: Any = transfer.lora(model, 4, transfer.rank_stabilised(6.0, 4), generator=generator())
    assert found[0].lora.scale == pytest.approx(6 / 4**0.5)


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_are_tokens_that_nobody_reads(deep: bool) -> None:
    model: Any = network("vit")
    build = transfer.with_deep_prompts if deep else transfer.with_prompts
    untouched(model, lambda: build(model, 3, generator=generator()))
    found = build(model, 3, generator=generator())
    assert found.prompts.shape == (2 if deep else 1, 3, 8)
    bound = (6 / (model.patch**2 + 8)) ** 0.5
    assert 0.7 * bound < found.prompts.abs().max() <= bound
    # the same by hooks on the plain network: prompts in before a block, out again behind it, or before the norm
    plain, prompts = copy.deepcopy(model), found.prompts
    taken = 0
    for place, block in enumerate(plain.blocks):
        if deep or place == 0:
            block.register_forward_pre_hook(
                lambda part, inputs, own=prompts[place]: torch.cat([own.expand(len(inputs[0]), -1, -1), inputs[0]], 1)
            )
            taken += 1
        if deep:
            block.register_forward_hook(lambda part, inputs, output: output[:, 3:])
    if not deep:
        plain.norm.register_forward_pre_hook(lambda part, inputs: inputs[0][:, 3:])
    close(found(batch()), plain(batch()))
    assert (found(batch()) - model(batch())).abs().max() > 1e-3
    close(transfer.embedding(found, batch()), found.embedding(batch()), 0)


def test_prompts_and_head_train() -> None:
    found = transfer.with_deep_prompts(network("vit"), 2, generator=generator())
    before = copy.deepcopy(found)
    fit(found, data(40), EXACT, seed=0)
    assert moved(before, found) == {"prompts", "network.head.weight", "network.head.bias"}
    assert transfer.trainable(found) == 2 * 2 * 8 + 8 * 4 + 4


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    model, conv, draw = network("vit"), network("convnet"), generator()
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(4, 2))
    cases: list[tuple[str, Any]] = [
        ("width=0: must be", lambda: transfer.with_adapters(model, 0, generator=draw)),
        ("model=ConvNet: must have encoder blocks", lambda: transfer.with_adapters(conv, 2, generator=draw)),
        ("model=MLP: must have convolutions", lambda: transfer.with_residual_adapters(network("mlp"))),
        ("rank=0: must be", lambda: transfer.lora(model, 0, 1, generator=draw)),
        ("alpha=0: must be", lambda: transfer.lora(model, 1, 0, generator=draw)),
        ("'*.nose' fits none of 'embed', 'blocks.0.", lambda: transfer.lora(model, 1, 1, ["*.nose"], generator=draw)),
        ("fits none of", lambda: transfer.lora(model, 1, 1, [], generator=draw)),
        ("must leave out '0', a convolution of 4 groups", lambda: transfer.lora(grouped, 1, 1, generator=draw)),
        ("rank=0: must be", lambda: transfer.rank_stabilised(1.0, 0)),
        (
            "model has 'lora' in 'embed' already",
            lambda: transfer.lora(transfer.lora(model, 1, 1, generator=draw), 1, 1, generator=draw),
        ),
        (
            "model has 'adapter' in 'blocks.0.attention' already",
            lambda: transfer.with_adapters(transfer.with_adapters(model, 2, generator=draw), 2, generator=draw),
        ),
        (
            "model has 'adapter' in 'features.0' already",
            lambda: transfer.with_residual_adapters(transfer.with_residual_adapters(conv)),
        ),
        ("model=ViT: must have low-rank updates", lambda: transfer.merged(model)),
        ("must have linear adapters", lambda: transfer.merged(transfer.with_adapters(model, 2, generator=draw))),
        ("count=0: must be", lambda: transfer.with_prompts(model, 0, generator=draw)),
        ("model=ConvNet: must be a vit", lambda: transfer.with_deep_prompts(conv, 2, generator=draw)),
        ("must be a vit with a block", lambda: transfer.with_prompts(vit((1, 8, 8), 2, depth=0), 2, generator=draw)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapters_on_the_gpu(dtype: torch.dtype) -> None:
    model = freeze(network("vit")).to(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    prompted = partial(transfer.with_deep_prompts, count=2)
    for build in (BUILDERS["adapters"], BUILDERS["lora"], lambda m: prompted(m, generator=generator())):
        here = build(model)
        there = build(copy.deepcopy(model).cuda())
        assert all(p.is_cuda and p.dtype == dtype for p in there.parameters())
        close(there(batch().to("cuda", dtype)).cpu(), here(batch().to(dtype)), tolerance)
    there = shaken(transfer.lora(copy.deepcopy(model), 2, 4.0, generator=generator())).cuda()
    close(transfer.merged(there)(batch().to("cuda", dtype)), there(batch().to("cuda", dtype)), tolerance)
