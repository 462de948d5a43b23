"""Engines against the arithmetic of their integers, written out, and against torch."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.compression import engines
from course_lib.compression.quantisation import Grid, fake_quantise, quantise_weight, scale_and_zero
from course_lib.lab.timing import compare_speed


class Small(nn.Module):
    """A convolution with batch norm, linear layers on tokens (MatMul, when exported) and on features (Gemm)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.position = nn.Parameter(torch.randn(36, 12))
        self.layer_norm = nn.LayerNorm(12)
        self.tokens = nn.Linear(12, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).flatten(2).mT + self.position
        return self.head(F.relu(self.tokens(self.layer_norm(x))).mean(1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """In float64 and in training mode, its batch norm not that of a new network."""
    torch.manual_seed(0)
    made = Small().double()
    for tensor in (made.norm.weight, made.norm.bias, made.norm.running_mean, made.norm.running_var):
        assert tensor is not None
        tensor.data.add_(torch.rand(12))
    return made


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        made = engines.export_onnx(model, normal(1, 2, 6, 6).double(), tmp_path_factory.mktemp("onnx") / "small.onnx")
    assert not [str(each.message) for each in heard]
    return made


@pytest.fixture(scope="module")
def static(path: Path) -> Path:
    return engines.quantise_onnx(
        path, path.with_name("static.onnx"), [normal(20, 2, 6, 6), normal(20, 2, 6, 6, seed=1)]
    )


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).float().eval()(x)


# --- A network as a file ----------------------------------------------------------------------------------------------


def test_the_file_answers_as_the_network_does(model: nn.Module, path: Path) -> None:
    loaded = engines.session(path, threads=2)
    for count in (1, 2, 7):
        x = normal(count, 2, 6, 6, seed=count)
        torch.testing.assert_close(engines.run(loaded, x), answer(model, x), rtol=1e-4, atol=1e-5)
    assert engines.run(loaded, x.double()).dtype == torch.float64
    assert model.training, "the network is as it was"
    assert next(model.parameters()).dtype == torch.float64
    assert [each.name for each in path.parent.iterdir() if "small" in each.name] == ["small.onnx"], "one file, whole"
    options = loaded.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_the_weights_in_the_file(model: nn.Module, path: Path) -> None:
    """Batch norm is folded into the convolution; all have their outputs first."""
    found = engines.float_weights(path)
    conv, norm, tokens, head = (getattr(model, name) for name in ("conv", "norm", "tokens", "head"))
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(found["conv.weight"], (conv.weight * factor.view(-1, 1, 1, 1)).float().detach())
    torch.testing.assert_close(found["head.weight"], head.weight.float().detach(), rtol=0, atol=0)
    assert len(found) == 3, "the position is no weight of a layer"
    (other,) = (value for name, value in found.items() if name not in ("conv.weight", "head.weight"))
    torch.testing.assert_close(other, tokens.weight.float().detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "granularity"),
    [({}, "channel"), ({"per_channel": False}, "tensor")],
)
def test_the_integers_of_onnx_runtime_are_ours(
    path: Path, tmp_path: Path, settings: dict[str, Any], granularity: Any
) -> None:
    out = engines.quantise_onnx(path, tmp_path / "q.onnx", [normal(4, 2, 6, 6)], reduce_range=False, **settings)
    found, floats = engines.int8_weights(out), engines.float_weights(path)
    assert found.keys() == floats.keys()
    for name, weight in found.items():
        ours = quantise_weight(floats[name], Grid(8), granularity)
        assert torch.equal(weight.integers, ours.integers), name
        torch.testing.assert_close(weight.scales, ours.scales, rtol=1e-6, atol=0)
        assert weight.group == ours.group
        torch.testing.assert_close(weight.dequantise(), ours.dequantise(), rtol=1e-6, atol=1e-9)


def test_seven_bits_for_older_processors(path: Path, tmp_path: Path) -> None:
    """From -64 to 64: one more on either side than a narrow grid of 7 bits has."""
    out = engines.quantise_onnx(path, tmp_path / "q.onnx", [normal(4, 2, 6, 6)], reduce_range=True)
    w = engines.float_weights(path)["head.weight"]
    integers = engines.int8_weights(out)["head.weight"].integers
    assert torch.equal(integers, torch.round(w / (w.abs().amax(1, keepdim=True) / 64)).int())


@pytest.mark.parametrize("saturates", [True, False])
def test_weights_have_seven_bits_where_the_processor_clips_products(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    monkeypatch.setattr(engines, "products_saturate", lambda: saturates)
    static = engines.quantise_onnx(path, tmp_path / "q.onnx", [normal(4, 2, 6, 6)])
    for file in (static, engines.dynamic_onnx(path, tmp_path / "d.onnx")):
        for weight in engines.int8_weights(file).values():
            assert weight.integers.abs().max() == (64 if saturates else 127)
    if not saturates:
        return
    for chosen, most in ((False, 127), (True, 64)):
        file = engines.dynamic_onnx(path, tmp_path / f"{chosen}.onnx", reduce_range=chosen)
        assert engines.int8_weights(file)["head.weight"].integers.abs().max() == most


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's instructions are read from Linux")
def test_whether_products_saturate_is_asked_of_the_engine() -> None:
    """Instructions for sums of four products (VNNI) never clip; x86 processors without them do."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    newer = flags & {"avx512_vnni", "avx_vnni", "avx_vnni_int8"}
    if "avx2" not in flags:
        pytest.skip("not an x86 processor of the kind in question")
    assert engines.products_saturate() == (not newer)


def test_dynamic_quantisation_leaves_convolutions_alone(model: nn.Module, path: Path, tmp_path: Path) -> None:
    out = engines.dynamic_onnx(path, tmp_path / "d.onnx", reduce_range=False)
    found, floats = engines.int8_weights(out), engines.float_weights(path)
    assert found.keys() == floats.keys() - {"conv.weight"}
    for name, weight in found.items():
        assert torch.equal(weight.integers, quantise_weight(floats[name], Grid(8)).integers), name
    x = normal(9, 2, 6, 6, seed=3)
    wanted = answer(model, x)
    near = engines.session(engines.dynamic_onnx(path, tmp_path / "here.onnx"))
    assert (engines.run(near, x) - wanted).abs().max() < 0.05 * wanted.abs().max()
    per_tensor = engines.dynamic_onnx(path, tmp_path / "t.onnx", per_channel=False, reduce_range=False)
    weight = engines.int8_weights(per_tensor)["head.weight"]
    assert weight.scales.shape == (1, 1)
    assert torch.equal(weight.integers, quantise_weight(floats["head.weight"], Grid(8), "tensor").integers)


def test_only_the_named_operators(path: Path, tmp_path: Path) -> None:
    out = engines.quantise_onnx(path, tmp_path / "q.onnx", [normal(4, 2, 6, 6)], operators=["Conv"])
    assert engines.int8_weights(out).keys() == {"conv.weight"}


def gemm_file(path: Path, weight: Tensor, bias: Tensor) -> Path:
    """``relu(x W^T + b)`` as an ONNX file, written by hand."""
    from onnx import TensorProto, helper, numpy_helper, save

    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["z"], transB=1),
        helper.make_node("Relu", ["z"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in zip("xy", weight.shape[::-1], strict=True)
    ]
    stored = [numpy_helper.from_array(value.numpy(), name) for name, value in (("w", weight), ("b", bias))]
    graph = helper.make_graph(nodes, "gemm", ends[:1], ends[1:], stored)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def test_the_engine_computes_what_its_integers_say(tmp_path: Path) -> None:
    """One layer, by hand: 8-bit inputs with the range of all batches, int8 weights, the output on a grid again."""
    from onnx import TensorProto, load

    weight, bias = normal(6, 40), normal(6, seed=1)
    seen = [normal(30, 40, seed=2), 2 * normal(30, 40, seed=3), normal(30, 40, seed=4)]
    file = gemm_file(tmp_path / "gemm.onnx", weight, bias)
    small = engines.quantise_onnx(file, tmp_path / "q.onnx", seen)
    loaded = engines.session(small)
    zeros = {each.name: each.data_type for each in load(str(small)).graph.initializer if "zero_point" in each.name}
    assert zeros["x_zero_point"] == TensorProto.UINT8
    every, unsigned = torch.cat(seen).double(), Grid(8, symmetric=False, signed=False)

    def on_grid(x: Tensor, like: Tensor) -> tuple[Tensor, float]:
        scale, zero = scale_and_zero(like.min(), like.max(), unsigned)
        return fake_quantise(x, scale, zero, unsigned), float(scale)

    x = 2 * normal(50, 40, seed=5)
    exact = F.relu(F.linear(every, weight.double(), bias.double()))
    (integers,) = engines.int8_weights(small).values()  # of 8 bits, or 7 where the processor asks for it
    inner = F.linear(on_grid(x.double(), every)[0], integers.dequantise().double())
    wanted, step = on_grid(F.relu(inner + bias), exact)
    apart = (engines.run(loaded, x) - wanted).abs()
    assert apart.max() < 1.01 * step
    assert (apart > 0.01 * step).double().mean() < 0.03  # rounded the other way, at a half


def test_a_quantised_file_is_small_and_near(model: nn.Module, path: Path, static: Path) -> None:
    x = normal(30, 2, 6, 6, seed=5)
    wanted = answer(model, x)
    apart = (engines.run(engines.session(static), x) - wanted).abs().max() / wanted.abs().max()
    assert 1e-4 < apart < 0.1


def test_the_tools_are_quiet(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engines.quantise_onnx(path, tmp_path / "q.onnx", [normal(4, 2, 6, 6)])
        engines.dynamic_onnx(path, tmp_path / "d.onnx")
    assert not caplog.records
    assert logging.root.manager.disable == 0
    assert {each.name for each in tmp_path.iterdir()} == {"q.onnx", "d.onnx"}, "nothing is left behind"


# --- torch's own int8 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["static", "dynamic"])
def test_torchs_own_int8_is_near_and_small(way: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 5)).double()
    x = normal(60, 40)
    made: dict[str, Callable[[], nn.Module]] = {
        "static": lambda: engines.torch_static(plain, [x[:30].double(), x[30:]]),
        "dynamic": lambda: engines.torch_dynamic(plain),
    }
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        small = engines.torch_engine(made[way]())
    assert not [str(each.message) for each in heard]
    assert next(plain.parameters()).dtype == torch.float64, "the network is as it was"
    assert plain.training
    wanted = answer(plain, x)
    assert 1e-4 < (small.answer(x) - wanted).abs().max() / wanted.abs().max() < 0.06
    assert small.bytes < 0.35 * engines.saved_size(plain.float())


def test_torchs_static_ranges_are_those_of_all_batches() -> None:
    layer = nn.Sequential(nn.Linear(8, 4))
    made = engines.torch_static(layer, [torch.full((2, 8), -3.0), torch.full((2, 8), 5.0), torch.zeros(2, 8)])
    held = dict(made.named_buffers())
    (scale,) = (float(value) for name, value in held.items() if "input_scale" in name)
    levels = round(8 / scale)
    assert levels in (127, 255)  # 7 bits, without VNNI's guarantee, or 8


# --- 4 bits in memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [Grid(4), Grid(3), Grid(4, symmetric=False), Grid(2, symmetric=False, signed=False)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_a_packed_layer_is_the_layer_with_rounded_weights(grid: Grid, granularity: Any) -> None:
    w, bias = normal(6, 11).double(), normal(6, seed=1).double()
    weight = quantise_weight(w, grid, granularity)
    layer = engines.PackedLinear(weight, bias)
    assert torch.equal(layer.weight, weight.dequantise())
    x = normal(2, 3, 11).double()
    assert torch.equal(layer(x), F.linear(x, weight.dequantise(), bias))
    assert torch.equal(engines.PackedLinear(weight)(x), F.linear(x, weight.dequantise()))
    assert layer.packed.numel() == (36 if granularity == 4 else 33)  # 3 groups of 4 a row; or 11
    assert layer.packed.dtype == torch.uint8
    again = engines.PackedLinear(quantise_weight(2 * w, grid, granularity), bias)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_packed_layers_in_a_network(model: nn.Module) -> None:
    names = ["tokens", "head"]
    weights = {name: quantise_weight(model.get_submodule(name).weight, Grid(4), 16) for name in names}  # type: ignore[arg-type]
    made = engines.pack_linears(model, weights).eval()
    rounded = copy.deepcopy(model).eval()
    for name in names:
        rounded.get_submodule(name).weight.data = weights[name].dequantise()
    x = normal(3, 2, 6, 6).double()
    with torch.no_grad():
        assert torch.equal(made(x), rounded(x))
    assert isinstance(model.get_submodule("head"), nn.Linear)
    big = nn.Sequential(nn.Linear(256, 256, bias=False))
    packed = engines.pack_linears(big, {"0": quantise_weight(big[0].weight, Grid(4), 64)})  # type: ignore[arg-type]
    assert engines.saved_size(packed) < 0.2 * engines.saved_size(big)


# --- What it saves ----------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_files(path: Path, tmp_path: Path) -> None:
    assert engines.file_size(path) == len(path.read_bytes())
    model = nn.Linear(300, 10)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert abs(engines.saved_size(model) - engines.file_size(tmp_path / "m.pt")) < 200  # the file's own name


def test_engines_are_compared_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the engines themselves move on."""
    now = [0.0]
    monkeypatch.setattr(engines, "compare_speed", partial(compare_speed, clock=lambda: now[0]))

    def engine(seconds: float, size: int, off: Tensor) -> engines.Engine:
        return engines.Engine(lambda x: (now.__setitem__(0, now[0] + seconds), x + off)[1], size)

    y = torch.tensor([[1.0, 4.0], [2.0, 0.0], [0.0, 1.0], [3.0, 2.0]])
    off = torch.tensor([[0.5, 0.0], [0.0, 2.0], [-2.5, 0.0], [0.0, 0.0]])
    ways = {"whole": engine(3.0, 1000, 0 * y), "half": engine(0.5, 250, off * 0.9), "other": engine(6.0, 2000, 2 * off)}
    table = engines.compare_engines(ways, y, rounds=2)
    assert [*table.index] == ["whole", "half", "other"]
    wanted: dict[str, list[float]] = {
        "bytes": [1000, 250, 2000],
        "smaller": [1.0, 4.0, 0.5],
        "milliseconds": [3000.0, 500.0, 6000.0],
        "faster": [1.0, 6.0, 0.5],
        "low": [1.0, 6.0, 0.5],
        "high": [1.0, 6.0, 0.5],
        "difference": [0.0, 2.25 / 4, 5.0 / 4],
        "same": [1.0, 1.0, 0.75],
    }
    assert [*table.columns] == [*wanted]
    for column, numbers in wanted.items():
        np.testing.assert_allclose(table[column].to_numpy(), numbers, rtol=1e-6)


def test_engines_of_a_file_and_of_a_network(model: nn.Module, path: Path) -> None:
    x = normal(5, 2, 6, 6)
    file, network = engines.onnx_engine(path), engines.torch_engine(model.float())
    model.double()
    assert file.bytes == engines.file_size(path)
    torch.testing.assert_close(file.answer(x), network.answer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux has /proc/self/status")
def test_the_peak_holds_weights_and_outputs(tmp_path: Path) -> None:
    """And the output: 4 and 32 million bytes."""
    large = gemm_file(tmp_path / "gemm.onnx", normal(2000, 500), normal(2000))
    assert 36e6 < engines.peak_bytes(large, (4000, 500)) < 500e6


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(model: nn.Module, path: Path, tmp_path: Path) -> None:
    engine = engines.Engine(torch.sin, 1)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("example=(0, 2): must be a batch", lambda: engines.export_onnx(model, torch.empty(0, 2), tmp_path / "e")),
        ("batches=[]: must be at least one", lambda: engines.quantise_onnx(path, tmp_path / "e", [])),
        ("batches=[]: must be at least one", lambda: engines.torch_static(model, [])),
        ("threads=0: must be", lambda: engines.session(path, 0)),
        ("must be on a grid of at most 4", lambda: engines.PackedLinear(quantise_weight(normal(3, 4), Grid(8)))),
        ("must be a matrix", lambda: engines.PackedLinear(quantise_weight(normal(3, 4, 1), Grid(4)))),
        ("weights['conv'] has", lambda: engines.pack_linears(model, {"conv": quantise_weight(normal(3, 4), Grid(4))})),
        ("weights['head'] has", lambda: engines.pack_linears(model, {"head": quantise_weight(normal(3, 4), Grid(4))})),
        ("engines={}: must be", lambda: engines.compare_engines({}, normal(2))),
        ("rounds=0: must be", lambda: engines.compare_engines({"a": engine}, normal(2), rounds=0)),
        ("threads=0: must be", lambda: engines.peak_bytes(path, (1, 2, 6, 6), threads=0)),
        ("shape=(0, 2): must be", lambda: engines.peak_bytes(path, (0, 2))),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    if Path("/proc/self/status").is_file():
        with pytest.raises(RuntimeError, match="failed"):
            engines.peak_bytes(tmp_path / "nowhere.onnx", (1, 2))
