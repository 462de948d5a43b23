"""The costs of a network: operations against torch's own counter, bytes against the file, ratios of two networks."""

from __future__ import annotations

import importlib
import io
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from course_lib.lab.costs import cost, flops, savings
from course_lib.lab.timing import SpeedRatio, Timing
from course_lib.pruning.graph import prune_channels
from course_lib.pruning.shrinking import shrink
from tests.pruning.test_shrinking import MODELS, Net, count, example, images, make


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_torchs(name: str) -> None:
    model, x = make(name), example(name)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the fused kernel of the CPU
        model(x)
    assert flops(model, x) == counter.get_total_flops() > 0


def test_flops_of_every_kind_of_product() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, 6)
    products = {
        "conv1d": lambda: F.conv1d(a, torch.randn(6, 2, 3), groups=2, stride=2),
        "conv3d": lambda: F.conv3d(a[None, None], torch.randn(2, 1, 2, 2, 2)),
        "transposed": lambda: F.conv_transpose2d(torch.randn(2, 4, 5, 5), torch.randn(4, 3, 2, 2), stride=2, groups=2),
        "matmul": lambda: torch.matmul(a, b),
        "@": lambda: a @ b,
        "bmm": lambda: torch.bmm(a, b),
        "mm": lambda: a[0].mm(b[0]),
        "attention": lambda: F.scaled_dot_product_attention(torch.randn(2, 3, 7, 4), *torch.randn(2, 2, 3, 9, 4)),
    }
    for name, product in products.items():
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            product()
        assert flops(Net(lambda net, x: product()), a) == counter.get_total_flops() > 0, name  # noqa: B023


def test_cost_counts_what_is_there() -> None:
    model, x = make("convnet", dtype=torch.float32), images().float()
    dense = cost(model, x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert dense.parameters == dense.nonzero == count(model)
    assert dense.file_bytes == len(file.getvalue())
    assert dense.compressed_bytes == len(zlib.compress(file.getvalue()))
    assert dense.peak_bytes >= 3 * 4 * 64 * 4 * 2  # the first convolution and its norm, 4 bytes a number
    prune_channels(model, x, 0.5)
    masked, small = cost(model, x), cost(shrink(model, x), x)
    assert (masked.parameters, masked.flops, masked.file_bytes) == (dense.parameters, dense.flops, dense.file_bytes)
    assert masked.nonzero == small.nonzero == small.parameters < dense.nonzero
    assert masked.compressed_bytes < dense.compressed_bytes
    assert small.flops < 0.4 * dense.flops
    assert small.file_bytes < dense.file_bytes
    assert small.peak_bytes < dense.peak_bytes


def test_savings_is_a_table_of_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make("mlp"), images()
    prune_channels(model, x, 0.5)
    small = shrink(model, x)
    table = savings(model, small, x, rounds=0)
    assert list(table.columns) == ["before", "after", "ratio"]
    assert list(table.index) == ["parameters", "nonzero", "flops", "file_bytes", "compressed_bytes", "peak_bytes"]
    assert table.loc["parameters"].tolist() == [count(model), count(small), count(model) / count(small)]

    def fake(a: Callable[[], Any], b: Callable[[], Any], **settings: Any) -> SpeedRatio:
        torch.testing.assert_close(a(), model(x))
        torch.testing.assert_close(b(), small(x))
        one, two = (Timing(t, t, t, 3) for t in (0.3, 0.1))
        return SpeedRatio(2.9, 2.8, 3.0, settings["rounds"], one, two)

    monkeypatch.setattr(importlib.import_module("course_lib.lab.costs"), "compare_speed", fake)
    assert savings(model, small, x).loc["seconds"].tolist() == [0.3, 0.1, 2.9]


@pytest.mark.parametrize("kdim", [None, 24])
def test_attention_of_torchs_own_layer_counts(kdim: int | None) -> None:
    layer = torch.nn.MultiheadAttention(32, 4, kdim=kdim, vdim=kdim, batch_first=True).train()
    query, key = torch.randn(2, 5, 32), torch.randn(2, 7, kdim or 32)
    with FlopCounterMode(display=False) as counter:
        layer(query, key, key)
    assert flops(layer, (query, key, key)) == counter.get_total_flops() > 0


def test_counting_leaves_a_network_in_training_as_it_is() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert flops(model, torch.randn(4, 1, 6, 6)) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
