"""Work against counts by hand and by torch, the roof against its formula; measured figures by their structure alone."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from course_lib.efficiency import roofline
from course_lib.efficiency.roofline import (
    Machine,
    Work,
    attainable,
    bound,
    convolution_work,
    elementwise_work,
    layer_work,
    least_seconds,
    linear_work,
    measured_peaks,
    per_layer,
    ridge,
    seen_inputs,
)
from course_lib.lab.costs import flops
from course_lib.lab.models import convnet, mlp, resnet, vit

MACHINE = Machine(flops_per_second=1000, bytes_per_second=100)

# --- The roof ---------------------------------------------------------------------------------------------------------


def test_the_roof() -> None:
    assert ridge(MACHINE) == 10
    assert [attainable(MACHINE, i) for i in (0.5, 10, 20)] == [50, 1000, 1000]
    few, many = Work(flops=500, bytes_moved=100), Work(flops=5000, bytes_moved=100)
    assert (few.intensity, many.intensity) == (5, 50)
    assert (least_seconds(MACHINE, few), least_seconds(MACHINE, many)) == (1, 5)
    assert (bound(MACHINE, few), bound(MACHINE, many)) == ("memory", "compute")
    assert bound(MACHINE, Work(1000, 100)) == "compute", "on the ridge"
    for work in (few, many):
        assert least_seconds(MACHINE, work) == pytest.approx(work.flops / attainable(MACHINE, work.intensity))
    assert few + many == Work(5500, 200)
    assert Work(1, 0).intensity == math.inf


@pytest.mark.parametrize("name", ["flops_per_second", "bytes_per_second"])
@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_a_machine_is_faster_than_nothing(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value}: must be a number above 0"):
        Machine(**({"flops_per_second": 1.0, "bytes_per_second": 1.0} | {name: value}))


# --- Measured ---------------------------------------------------------------------------------------------------------


def test_measured() -> None:
    found = measured_peaks(sizes=(32,), array_bytes=4096, repeats=1, device="cpu")
    assert 0 < found.flops_per_second < 1e16
    assert 0 < found.bytes_per_second < 1e15
    assert found.name == "cpu, float32"


def test_arithmetic_of_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 32 and 64 rows take 2 s and 4 s, the triad 8 s: the best product counts, and three passes."""
    seconds = iter([2.0, 4.0, 8.0])
    monkeypatch.setattr(roofline, "_seconds", lambda *_: next(seconds))
    found = measured_peaks(sizes=(32, 64), array_bytes=4096, device="cpu")
    assert found.flops_per_second == 2 * 64**3 / 4
    assert found.bytes_per_second == 3 * 4096 / 8


def test_what_is_measured() -> None:
    here = torch.device("cpu")
    assert roofline._triad(5, here)().tolist() == [1 + 3 * 2] * 5
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int8):
        product = roofline._product(16, dtype, here)()
        assert product.tolist() == [[16] * 16] * 16
        assert product.dtype == (torch.int32 if dtype == torch.int8 else dtype)


def test_measuring_at_the_door() -> None:
    calls: list[tuple[dict[str, Any], str]] = [
        ({"sizes": ()}, r"sizes=\(\): must be at least one number of rows"),
        ({"sizes": (8,)}, "sizes=8: must be a whole number of at least 16"),
        ({"repeats": 0}, "repeats=0"),
        ({"array_bytes": 8}, "array_bytes=8"),
        ({"dtype": torch.bool, "sizes": (16,)}, "dtype=torch.bool: must be one with matrix products on cpu"),
    ]
    for settings, message in calls:
        with pytest.raises(ValueError, match=message):
            measured_peaks(device="cpu", **settings)


@pytest.mark.gpu(emulated=False)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_measured_on_cuda(dtype: torch.dtype) -> None:
    found = measured_peaks(dtype, device="cuda")
    assert found.flops_per_second > 1e11
    assert found.bytes_per_second > 1e10


# --- Work in closed form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_intensity_of_a_convolution_counts_operations_and_bytes(groups: int, stride: int) -> None:
    layer = nn.Conv2d(16, 32, 3, stride, 1, groups=groups, bias=False).double()
    x = torch.randn(5, 16, 9, 7, dtype=torch.float64)
    moved = sum(each.numel() * each.element_size() for each in (x, layer.weight, layer(x)))
    assert layer_work(layer, x).intensity == pytest.approx(flops(layer, x) / moved, rel=1e-12)


def test_depthwise_is_bound_by_memory_and_full_is_not() -> None:
    depthwise = convolution_work(100, 64, 64, 3, 64, groups=64).intensity
    assert depthwise == pytest.approx(2 * 9 / 8, rel=0.01)
    assert convolution_work(100, 64, 64, 3, 64).intensity == pytest.approx(64 * 2 * 9 / 8, rel=0.01)


def test_intensities_to_remember() -> None:
    assert elementwise_work(10).intensity == 1 / 8, "a ReLU in float32"
    assert elementwise_work(999, torch.bfloat16).intensity == 1 / 4
    assert elementwise_work(7, inputs=2).intensity == 1 / 12, "a sum"
    assert elementwise_work(7, torch.float64, operations=5).intensity == 5 / 16
    one, many = linear_work(1, 1024, 1024), linear_work(256, 1024, 1024)
    assert one.intensity == pytest.approx(1 / 2, rel=4e-3)
    assert many.intensity == pytest.approx(2 * 256 / 4 / (1 + 2 * 256 / 1024), rel=1e-3)
    full, depthwise = convolution_work(8, 64, 64, 3, 16), convolution_work(8, 64, 64, 3, 16, groups=64)
    assert depthwise.flops * 64 == full.flops
    assert depthwise.intensity == pytest.approx(9 / 4, rel=0.01)
    pixels = 8 * 16 * 16
    assert full.intensity == pytest.approx(2 * 9 * 64 / (4 * (2 + 9 * 64 / pixels)))
    assert depthwise.intensity == pytest.approx(2 * 9 / (4 * (2 + 9 / pixels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_closed_forms_are_the_work_of_layers(dtype: torch.dtype) -> None:
    linear, x = nn.Linear(6, 5, dtype=dtype), torch.ones(4, 3, 6, dtype=dtype)
    assert layer_work(linear, x) == linear_work(12, 6, 5, dtype)
    assert layer_work(nn.Linear(6, 5, bias=False, dtype=dtype), x) == linear_work(12, 6, 5, dtype, bias=False)
    for groups in (1, 2, 4):
        conv = nn.Conv2d(4, 8, 3, padding=1, bias=False, groups=groups, dtype=dtype)
        images = torch.ones(2, 4, 5, 5, dtype=dtype)
        assert layer_work(conv, images) == convolution_work(2, 4, 8, 3, 5, dtype, groups=groups)
    assert layer_work(nn.ReLU(), x) == elementwise_work(72, dtype)
    assert layer_work(nn.ReLU(inplace=True), x.clone()) == elementwise_work(72, dtype)
    assert layer_work(nn.GELU(), x) == elementwise_work(72, dtype, operations=5)


def by_torch(layer: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops()


def test_operations_are_those_of_torch() -> None:
    for model in (mlp((1, 4, 4), 3), convnet((1, 8, 8), 3), resnet((1, 8, 8), 3)):
        x = torch.ones(2, *model.input_shape)
        assert layer_work(model, x).flops == flops(model, x) == by_torch(model, x)


def test_layers_without_products() -> None:
    x = torch.ones(2, 3, 4, 4)
    assert layer_work(nn.BatchNorm2d(3).eval(), x) == Work(2 * 96, 4 * (96 + 4 * 3 + 96)), "two weights, two statistics"
    assert layer_work(nn.MaxPool2d(2), x) == Work(96, 4 * (96 + 24))
    assert layer_work(nn.LayerNorm(4), x) == Work(7 * 96, 4 * (96 + 8 + 96))
    assert layer_work(nn.Flatten(), x) == layer_work(nn.Dropout().eval(), x) == Work(0, 0)
    assert layer_work(nn.Bilinear(3, 3, 2), (torch.ones(2, 3), torch.ones(2, 3))).bytes_moved == 4 * (12 + 20 + 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_work(0, 1, 1), "rows=0"),
        (lambda: elementwise_work(3, inputs=0), "inputs=0"),
        (lambda: elementwise_work(-1), "count=-1"),
        (lambda: convolution_work(1, 1, 1, 0, 1), "kernel=0"),
        (lambda: convolution_work(1, 4, 6, 3, 8, groups=4), "groups=4: must be a divisor of 4 and 6"),
        (lambda: convolution_work(1, 4, 6, 3, 8, groups=0), "groups=0"),
    ],
)
def test_closed_forms_at_the_door(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- Layer by layer ---------------------------------------------------------------------------------------------------


class Listed(nn.Module):
    """A list of layers, which is never called itself, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 3), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[1](self.parts[0](self.parts[1](x)))


def test_what_a_layer_is() -> None:
    model = vit((1, 4, 4), 3, width=8, depth=1, heads=2)
    names = [name for name, *_ in seen_inputs(model, torch.ones(2, 1, 4, 4))]
    assert names == ["embed", "blocks.0.norm1", "blocks.0.attention", "blocks.0.norm2", "blocks.0.mlp.0",
                     "blocks.0.mlp.1", "blocks.0.mlp.2", "norm", "head"]  # fmt: skip
    outer = nn.Sequential(Listed())
    assert [name for name, *_ in seen_inputs(outer, torch.ones(2, 3))] == ["0.parts.1", "0.parts.0", "0.parts.1"]
    (only,) = seen_inputs(nn.ReLU(), torch.ones(2))
    assert only[0] == ""


def test_a_table_of_layers() -> None:
    model, x = resnet((1, 8, 8), 3, width=4), torch.randn(2, 1, 8, 8)
    total = flops(model, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = per_layer(model, x, MACHINE)
    products = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert table.loc[products, "flops"].sum() == total
    assert table.loc["stages.0.0.conv1", "flops"] == 2 * 2 * 64 * 4 * 4 * 9
    assert "stages.0.0.shortcut" not in table.index, "it moves nothing"
    for row in table.itertuples():
        work = Work(row.flops, row.bytes)
        assert (row.intensity, row.bound) == (work.intensity, bound(MACHINE, work))
        assert row.least_seconds == least_seconds(MACHINE, work)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.modules())

    twice = per_layer(nn.Sequential(Listed()), torch.ones(2, 3), MACHINE)
    assert list(twice.index) == ["0.parts.1", "0.parts.0", "0.parts.1 (2)"]


def test_measured_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", lambda fn, **_: type("Timing", (), {"median": (fn(), 4.0)[1]}))
    model, x = nn.Sequential(nn.Linear(10, 10), nn.ReLU()), torch.ones(10, 10)
    table = per_layer(model, x, MACHINE, measured=True)
    assert list(table["seconds"]) == [4, 4]
    assert table.loc["0", "roof_share"] == pytest.approx(4 * (100 + 110 + 100) / 100 / 4)
    assert list(table.loc[["1"], "roof_share"]) == [8 * 100 / 100 / 4]


def test_drawn() -> None:
    table = per_layer(nn.Sequential(nn.Linear(10, 10), nn.ReLU()), torch.ones(100, 10), MACHINE)
    table["seconds"] = 10.0
    for points in (table, {"0": (4.0, 2000.0), "1": (1 / 8, 100.0)}):
        ax = roofline.draw(plt.subplots()[1], MACHINE, points)
        roof = ax.lines[0]
        assert all(y == attainable(MACHINE, x) for x, y in zip(roof.get_xdata(), roof.get_ydata(), strict=True))
        assert 10 in roof.get_xdata(), "the ridge itself"
        assert [text.get_text() for text in ax.texts] == ["0", "1"]
        assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
        assert ax.lines[-1].get_xdata()[0] == 1 / 8
        assert ax.lines[-1].get_ydata()[0] == 100
    plt.close("all")
