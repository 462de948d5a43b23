"""Deep Compression: the chain, its file bit for bit, and what the table says of its bytes."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from course_lib.compression.coding import entropy, pack_file
from course_lib.compression.deep_compression import (
    CompressedFile,
    DeepCompression,
    compress,
    encode_model,
    prune_and_share,
    read,
)
from course_lib.compression.sharing import share_model, shared_layers
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh, logits_of
from course_lib.pruning.criteria import magnitude
from course_lib.pruning.masks import apply_masks, sparsity
from course_lib.pruning.patterns import global_unstructured

RECIPE = Recipe(epochs=8, precision="float64")
LAYERS = ["features.0", "features.4", "features.8", "head"]


def build(width: int = 8) -> nn.Module:
    return convnet((1, 8, 8), 10, width=width)


def of_perceptron() -> nn.Module:
    return mlp((1, 8, 8), 10, width=64)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=512)


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> Any:
    model = fresh(of_perceptron, RECIPE, seed=0)
    fit(model, digits, RECIPE, seed=0)
    return model


SETTINGS = DeepCompression(
    sparsity=0.85,
    clusters=16,
    after_pruning=Recipe(epochs=3, precision="float64"),
    after_sharing=Recipe(epochs=1, precision="float64", optimizer=partial(torch.optim.SGD, lr=0.001)),
)


@pytest.fixture(scope="module")
def small(trained: Any, digits: Dataset) -> Any:
    return prune_and_share(trained, digits, SETTINGS)


def same(a: nn.Module, b: nn.Module) -> None:
    """Each number of b's layers and of its other tensors, to the bit and in its type."""
    for (name, mine), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert mine.dtype is theirs.dtype, name
        assert torch.equal(mine, theirs), name


# --- The chain --------------------------------------------------------------------------------------------------------


def test_pruned_shared_and_as_good_as_before(trained: Any, small: Any, digits: Dataset) -> None:
    assert sparsity(small) == pytest.approx(0.85, abs=1e-3)
    assert sparsity(trained) == 0
    for name, shared in shared_layers(small).items():
        weight = small.get_submodule(name).weight
        assert weight.dtype is torch.float32
        assert len(weight[weight != 0].unique()) == len(shared.codebook) <= 16
    assert evaluate(small, digits.val).accuracy > evaluate(trained, digits.val).accuracy - 0.03
    crude = prune_and_share(trained, digits, replace(SETTINGS, after_pruning=None, after_sharing=None))
    assert evaluate(crude, digits.val).loss > evaluate(small, digits.val).loss


def test_the_file_is_much_smaller_and_gives_the_same_network(
    trained: Any, small: Any, digits: Dataset, tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "network.craft"
    made = compress(trained, digits, SETTINGS)
    made.write(path)
    assert path.stat().st_size == made.size == len(made.data)
    assert made.size < sum(4 * p.numel() for p in trained.parameters()) / 12
    found = read(path, of_perceptron)
    assert not shared_layers(found)
    for name, layer in found.named_modules():
        if isinstance(layer, nn.Linear):
            assert torch.equal(layer.weight, small.get_submodule(name).weight)
            assert torch.equal(layer.bias, small.get_submodule(name).bias)
    assert torch.equal(logits_of(found, digits.test), logits_of(small, digits.test))
    assert all(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pruned", [0.0, 0.3, 0.95])
def test_convolutions_norms_and_all_types_come_back_to_the_bit(dtype: torch.dtype, pruned: float) -> None:
    model = fresh(build, RECIPE, seed=1).to(dtype)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(generator=torch.Generator().manual_seed(0))
            part.num_batches_tracked += 7
    if pruned:
        apply_masks(model, global_unstructured(magnitude(model), pruned))
    share_model(model, {"features.0": 4, "features.4": 12, "features.8": 16})  # the head stays as it is
    weights = {name: model.get_submodule(name).weight.detach() for name in LAYERS}
    found = encode_model(model, 3).network(build)
    for name, weight in weights.items():
        assert torch.equal(found.get_submodule(name).weight, weight)
        assert found.get_submodule(name).weight.dtype is dtype
    assert torch.equal(found.features[1].running_mean, model.features[1].running_mean)
    assert found.features[1].num_batches_tracked == 7
    same(found, CompressedFile(encode_model(model, 5).data).network(build))


def test_layers_without_any_weight_and_networks_without_sharing_come_back() -> None:
    model = fresh(of_perceptron, RECIPE, seed=2).float()
    same(encode_model(model).network(of_perceptron), model)
    with torch.no_grad():
        model.head.weight.zero_()
    plain = copy.deepcopy(model)
    share_model(model, 256, layers=["head"])
    same(encode_model(model).network(of_perceptron), plain)


# --- The table --------------------------------------------------------------------------------------------------------


def test_the_table_adds_up_to_the_file(small: Any) -> None:
    file = encode_model(small, 4)
    table = file.table()
    assert table.loc["total", "huffman"] == file.size
    tensors = table.drop(["header", "total"])
    assert (tensors.sum() + table.loc["header"]).equals(table.loc["total"])
    weights = tensors[tensors["codebook"] > 0]
    assert (weights["huffman"] == weights["codebook"] + weights["codes"] + weights["steps"]).all()
    assert (weights["entropy"] <= weights["huffman"]).all()
    assert (weights["huffman"] < weights["fixed"]).all()
    assert table.loc["total", "dense"] == sum(4 * p.numel() for p in of_perceptron().parameters())


def test_a_code_of_fixed_length_needs_one_for_zero_only_where_there_is_one() -> None:
    layer = nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 129).view(2, 64) % 16 + 1.0)  # 16 values, none of them 0
    full = nn.Sequential(layer)
    share_model(full, 16)
    assert encode_model(full, 4).table().loc["0.weight", "fixed"] == 16 * 4 + 128 * 4 / 8
    with torch.no_grad():
        layer = nn.Linear(64, 2, bias=False)
        layer.weight.copy_(torch.arange(128).view(2, 64) % 17)  # and 0 now and then
    some = nn.Sequential(layer)
    share_model(some, 16)
    row = encode_model(some, 4).table().loc["0.weight"]
    assert (row["steps"], row["fixed"]) == (0, 16 * 4 + 128 * 5 / 8)


def test_a_row_by_hand(small: Any) -> None:
    """The head's row from its weights alone: steps of 4 bits with fillers, codes, their entropies."""
    weight = small.head.weight.detach().flatten().numpy()
    places = np.flatnonzero(weight)
    values = np.unique(weight[places])
    steps, codes, at = [], [], -1
    for place in places:
        while place - at > 16:
            steps.append(15)
            codes.append(0)
            at += 16
        steps.append(place - at - 1)
        codes.append(1 + int(np.searchsorted(values, weight[place])))
        at = place
    row = encode_model(small, 4).table().loc["head.weight"]
    assert row["weights"] == 640
    assert row["kept"] == len(places)
    assert row["dense"] == 2560
    assert row["codebook"] == 4 * len(values)
    bits = 4 + np.ceil(np.log2(len(values) + (0 in codes)))
    assert row["fixed"] == 4 * len(values) + np.ceil(len(codes) * bits / 8)
    least = sum(entropy(np.bincount(np.array(stream))) for stream in (codes, steps)) * len(codes) / 8
    assert row["entropy"] == pytest.approx(4 * len(values) + least)
    assert least <= row["codes"] + row["steps"] < least + 2 * len(codes) / 8


# --- Files that are not what they should be ---------------------------------------------------------------------------


def test_foreign_damaged_and_unfitting_files_are_refused(small: Any, tmp_path: Path) -> None:
    data = encode_model(small).data
    path = tmp_path / "file"
    torch.save(small.state_dict(), path)
    cases: list[tuple[str, bytes]] = [
        ("is no file of the format 'craft-dc'", path.read_bytes()),
        ("is no file of the format 'craft-dc'", b""),
        ("is damaged", data[:-1]),
        ("is damaged", data[:100] + bytes([data[100] ^ 1]) + data[101:]),
        ("is of version 2 of the format 'craft-dc': must be of version 1", pack_file("craft-dc", 2, [], [])),
    ]
    for words, written in cases:
        path.write_bytes(written)
        with pytest.raises(ValueError, match="file: data") as caught:
            read(path, of_perceptron)
        assert words in str(caught.value)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"makes 'hidden.0.weight' of shape \[32, 64\], the file holds \[64, 64\]"):
        read(path, partial(mlp, (1, 8, 8), 10, width=32))
    with pytest.raises(ValueError, match=r"makes 'features.0.weight' of shape \[8, 1, 3, 3\], the file holds None"):
        read(path, build)


def test_bad_settings_are_named(trained: Any, digits: Dataset) -> None:
    with pytest.raises(ValueError, match="sparsity=1.2"):
        compress(trained, digits, DeepCompression(sparsity=1.2))
    with pytest.raises(ValueError, match="clusters=0"):
        compress(trained, digits, DeepCompression(clusters=0))
    with pytest.raises(ValueError, match="step_bits=0: must be a whole number from 1 to 16"):
        encode_model(trained, 0)
