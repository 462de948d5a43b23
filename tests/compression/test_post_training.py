"""Trained networks in small integers: against torch's int8 kernels, ONNX Runtime's, and sums written out."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.compression import formats
from course_lib.compression.calibration import least_squares, percentile
from course_lib.compression.post_training import (
    IntegerLayer,
    adaptive_rounding,
    correct_bias,
    dynamic,
    equalisable_pairs,
    equalise,
    equalise_pair,
    fold_batch_norm,
    layer_inputs,
    quantisable_layers,
    requantise,
    sensitivity,
    static,
    stored_bytes,
    weights_only,
    with_weights,
)
from course_lib.compression.quantisation import Grid, min_max, quantise_weight, scale_and_zero, signal_to_noise
from course_lib.lab.data import Split
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.training import evaluate

NETWORKS: dict[str, Any] = {
    "mlp": partial(mlp, width=12),
    "convnet": partial(convnet, width=4),
    "resnet": partial(resnet, width=4),
    "vit": partial(vit, width=8, depth=1, heads=2),
}
SEVEN_BITS = Grid(7, symmetric=False, signed=False)
"""For what goes into int8 kernels: without VNNI their pairs of products would overflow 16 bits at 255 * 127 * 2."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(name: str, seed: int = 0) -> nn.Module:
    """With batch norms as training leaves them: a scale of either sign, statistics of their own."""
    torch.manual_seed(seed)
    model = NETWORKS[name]((1, 8, 8), 3).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_()  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                module.weight.uniform_(-0.5, 2)
                module.bias.normal_()
    return model


def split(count: int = 40) -> Split:
    images = torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Split(images, torch.arange(count) % 3, (0.5,), (0.25,))


def state_bytes(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue())


# --- Weights alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("granularity", ["tensor", "channel", 6])
def test_packed_weights_compute_as_rounded_ones(name: str, granularity: Any) -> None:
    model, x = network(name), normal(5, 1, 8, 8)
    before, grid = copy.deepcopy(model.state_dict()), Grid(4, symmetric=False)
    found = weights_only(model, grid, granularity)
    rounded = copy.deepcopy(model)
    bits = 0.0
    for layer in quantisable_layers(rounded).values():
        stored = quantise_weight(layer.weight, grid, granularity)  # type: ignore[arg-type]
        layer.weight.data = stored.dequantise()  # type: ignore[union-attr]
        bits += stored.bits_per_weight * stored.integers.numel()
    assert torch.equal(found(x), rounded(x))
    others = [value for key, value in before.items() if key.removesuffix(".weight") not in quantisable_layers(model)]
    rest = sum(value.numel() * value.element_size() for value in others)
    assert -1e-6 < stored_bytes(found) - rest - bits / 8 < 2 * len(quantisable_layers(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if granularity != 6:
        assert state_bytes(found) < 0.75 * state_bytes(model)


def test_packed_networks_are_saved_loaded_copied_and_change_their_type() -> None:
    model, other, x = network("convnet", 0), network("convnet", 1), normal(2, 1, 8, 8)
    found, loaded = weights_only(model, Grid(3), 8), weights_only(other, Grid(3), 8)
    loaded.load_state_dict(found.state_dict())
    assert torch.equal(loaded(x), found(x))
    single = copy.deepcopy(found).float()
    assert single(x.float()).dtype is torch.float32
    torch.testing.assert_close(single(x.float()).double(), found(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(found(x), loaded(x))
    with pytest.raises(ValueError, match="weight is packed: must be replaced by with_weights"):
        found.get_submodule("head").weight = torch.zeros(3, 16).double()
    with pytest.raises(ValueError, match="layers names 'features.0', whose weight is computed"):
        weights_only(found, Grid(4))


def test_other_formats_and_chosen_layers() -> None:
    model = network("mlp")
    found = weights_only(model, formats.nf4, layers=["head"])
    head = model.get_parameter("head.weight")
    assert torch.equal(found.get_parameter("head.weight"), formats.nf4(head.detach()).weight)
    assert torch.equal(found.get_parameter("hidden.0.weight"), model.get_parameter("hidden.0.weight"))
    cut = weights_only(model, Grid(2), "tensor", low_high=least_squares)
    plain = weights_only(model, Grid(2), "tensor")
    ratios = [signal_to_noise(head, m.get_submodule("head").weight) for m in (plain, cut)]  # type: ignore[arg-type]
    assert ratios[0] < ratios[1]
    weights = {"head": formats.binary(head.detach())}
    assert torch.equal(with_weights(model, weights).get_parameter("head.weight"), weights["head"].weight)
    saved = stored_bytes(model) - stored_bytes(model, weights)
    assert saved == pytest.approx(head.numel() * (8 - weights["head"].bits_per_weight / 8))


def test_layers_that_are_none() -> None:
    model = network("mlp")
    for layers in (["hidden.1"], ["nowhere"]):
        with pytest.raises(ValueError, match=rf"layers='{layers[0]}': must be among hidden.0, hidden.2, head"):
            weights_only(model, Grid(4), layers=layers)
    with pytest.raises(ValueError, match=r"layers='head': must be several names, such as \['head'\]"):
        weights_only(model, Grid(4), layers="head")
    with pytest.raises(ValueError, match=r"layers=\[\]: must be the names of one layer or more"):
        weights_only(nn.Sequential(nn.ReLU()), Grid(4))
    with pytest.raises(ValueError, match=r"weights\['head'\]=\(2, 2\): must be of the shape \(3, 12\)"):
        with_weights(model, {"head": quantise_weight(torch.ones(2, 2), Grid(4))})


# --- Integer products -------------------------------------------------------------------------------------------------


def by_sums(layer: Any, x: Tensor, weights: Grid, activations: Grid, integer_bias: bool) -> Tensor:
    """A linear layer on rows, number by number in Python's integers."""
    stored = quantise_weight(layer.weight, weights)
    s_x, z_x = (v.item() for v in scale_and_zero(*min_max(x.flatten()), activations))
    rows = []
    for row in x.tolist():
        q_x = [min(max(round(v / s_x) + z_x, activations.low), activations.high) for v in row]
        out = []
        for q_w, s_w, z_w, b in zip(
            stored.integers.tolist(), stored.scales[:, 0].tolist(), stored.zeros[:, 0].tolist(), layer.bias.tolist(),
            strict=True,
        ):  # fmt: skip
            total = sum((a - z_x) * (w - z_w) for a, w in zip(q_x, q_w, strict=True))
            step = s_x * s_w
            out.append((total + round(b / step)) * step if integer_bias else total * step + b)
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("weights", [Grid(8), Grid(4, symmetric=False)])
@pytest.mark.parametrize("activations", [Grid(8, symmetric=False, signed=False), Grid(8)])
def test_products_by_sums_of_integers(weights: Grid, activations: Grid) -> None:
    layer, x = nn.Linear(20, 6).double(), normal(7, 20) + 0.3
    found = dynamic(layer, weights, activations)
    torch.testing.assert_close(found(x), by_sums(layer, x, weights, activations, False), rtol=1e-12, atol=1e-12)
    found = static(layer, [x], weights, activations)
    torch.testing.assert_close(found(x), by_sums(layer, x, weights, activations, True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(10, 4),
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4),
    ],
)
def test_products_are_those_of_the_rounded_reals(layer: nn.Module) -> None:
    """Padding too: 0 has an integer of its own."""
    layer = layer.double()
    shape = {2: (5, 10), 3: (2, 4, 9), 4: (2, 4, 7, 7)}[layer.weight.ndim]  # type: ignore[union-attr, index]
    x, grid = normal(*shape) + 0.5, Grid(5, symmetric=False)
    plain = copy.deepcopy(layer)
    plain.weight.data = quantise_weight(layer.weight, Grid(6)).dequantise()  # type: ignore[arg-type, union-attr]
    scale, zero = scale_and_zero(*min_max(x.flatten()), grid)
    expected = plain(((x / scale).round() + zero).clamp(grid.low, grid.high).sub(zero) * scale)
    torch.testing.assert_close(dynamic(layer, Grid(6), grid, layers=[""])(x), expected, rtol=1e-11, atol=1e-11)
    fixed = static(layer, [x], Grid(6), grid)
    assert isinstance(fixed, IntegerLayer)
    unit = scale * quantise_weight(layer.weight, Grid(6)).scales[:, 0]  # type: ignore[arg-type]
    off = (fixed(x) - expected).abs().movedim(1, -1) if layer.weight.ndim > 2 else (fixed(x) - expected).abs()  # type: ignore[operator, union-attr]
    assert (off <= unit / 2 * (1 + 1e-6)).all()  # half a unit of the bias


def test_torchs_dynamic_int8_kernel() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 20), normal(9, 48, dtype=torch.float32) + 0.4
    found = dynamic(layer, Grid(8), SEVEN_BITS)
    stored = quantise_weight(layer.weight, Grid(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zeros = torch.zeros(20, dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(stored.integers.to(torch.int8), stored.scales[:, 0], zeros, 0)
        packed = torch.ops.quantized.linear_prepack(weight, layer.bias)
        theirs = torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True)
    # the same integers; torch adds and multiplies in float32
    torch.testing.assert_close(found(x), theirs, rtol=1e-5, atol=1e-5)


def test_torchs_quantize_dynamic_within_its_rounding() -> None:
    """Its weights have one scale a layer and an integer more, so it differs by rounding and no more."""
    model, x = network("mlp").float(), normal(64, 1, 8, 8, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    found = dynamic(model, granularity="tensor")
    exact = model(x)
    mine, other = signal_to_noise(exact, found(x)), signal_to_noise(exact, theirs(x))
    assert mine > 30
    assert abs(mine - other) < 6  # a bit: torch keeps one back in what goes in (reduce_range)


def test_torchs_static_int8_kernel_and_requantisation() -> None:
    torch.manual_seed(1)
    layer, x = nn.Conv2d(4, 6, 3, padding=1), normal(2, 4, 7, 7, dtype=torch.float32) + 0.2
    found: Any = static(layer, [x], Grid(8), SEVEN_BITS, granularity="tensor")
    out_scale, out_zero = scale_and_zero(*min_max(layer(x).detach().flatten()), Grid(8, False, False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stored = quantise_weight(layer.weight, Grid(8), "tensor")
        weight = torch._make_per_tensor_quantized_tensor(stored.integers.to(torch.int8), stored.scales.item(), 0)
        packed = torch.ops.quantized.conv2d_prepack(weight, layer.bias, [1, 1], [1, 1], [1, 1], 1)
        q_x = torch.quantize_per_tensor(x, found.scale, found.zero, torch.quint8)
        theirs = torch.ops.quantized.conv2d(q_x, packed, out_scale.item(), out_zero.item()).int_repr()
    q = (x / found.scale).round().add(found.zero).clamp(0, 127)
    sums = found.accumulate(q, found.zero) + found.by_channel(found.integer_bias())
    multiplier = (found.scale * found.scales[0] / out_scale).item()
    mine = requantise(sums.long(), multiplier, int(out_zero), Grid(8, False, False))
    off = (mine - theirs.int()).abs()
    assert off.max() <= 1
    assert (off > 0).double().mean() < 0.01  # halves, and float32


def test_requantisation_needs_no_reals() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**31), 2**31 - 1, (20_000,), generator=generator)
    for multiplier in (0.9999, 0.5, 0.0003, 1e-7, 2.0**-40, 1e-12):
        exact = (sums.double() * multiplier + 0.5).floor() + 3
        found = requantise(sums, multiplier, 3, Grid(8))
        off = (found - exact.clamp(-127, 127)).abs()
        assert off.max() <= 1
        assert (off > 0).double().mean() < 1e-3  # within 2**-31 of a half
    small = torch.tensor([5, 6, 7, -5, -6])
    assert requantise(small, 0.25, 0, Grid(8)).tolist() == [1, 2, 2, -1, -1]  # 1.25, 1.5, 1.75, -1.25, -1.5
    for multiplier in (0.0, 1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="multiplier=.*: must be a number between 0 and 1"):
            requantise(small, multiplier, 0, Grid(8))


def test_onnx_runtimes_integer_product() -> None:
    import onnxruntime
    from onnx import TensorProto, helper

    layer, x = nn.Linear(30, 7, bias=False).double(), normal(5, 30)
    found: Any = static(layer, [x], Grid(8), SEVEN_BITS)
    node = helper.make_node("MatMulInteger", ["a", "b", "z"], ["y"])
    values = [("a", TensorProto.UINT8, (5, 30)), ("b", TensorProto.INT8, (30, 7)), ("z", TensorProto.UINT8, ())]
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info(*value) for value in values],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (5, 7))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    q = (x / found.scale).round().add(found.zero).clamp(0, 127)
    feed = {"a": q.byte().numpy(), "b": found.integers.T.numpy(), "z": found.zero.byte().numpy()}
    assert found.accumulate(q, found.zero).tolist() == session.run(None, feed)[0].tolist()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_whole_networks_in_integers(name: str) -> None:
    model, x = network(name), normal(20, 1, 8, 8)
    exact = model(x)
    everywhere = list(quantisable_layers(model))
    for found in (dynamic(model, layers=everywhere), static(model, [x]), static(model, [x], fold=False)):
        assert sum(isinstance(m, IntegerLayer) for m in found.modules()) == len(everywhere)
        assert signal_to_noise(exact, found(x)) > 25
        assert found(x).dtype is torch.float64
    fine = static(model, [x], Grid(16), Grid(16, symmetric=False, signed=False))
    assert signal_to_noise(exact, fine(x)) > 65
    assert torch.equal(model(x), exact)
    copied = copy.deepcopy(fine)
    copied.load_state_dict(fine.state_dict())
    assert torch.equal(copied(x), fine(x))


def test_dynamic_layers_are_the_linear_ones_and_follow_each_batch() -> None:
    model = network("convnet")
    found = dynamic(model)
    assert [n for n, m in found.named_modules() if isinstance(m, IntegerLayer)] == ["head"]
    layer, x = nn.Linear(10, 3).double(), normal(4, 10)
    narrow, wide = dynamic(layer), static(layer, [1000 * x])
    assert signal_to_noise(layer(x), narrow(x)) > 30 > signal_to_noise(layer(x), wide(x))
    with pytest.raises(ValueError, match="model='Sequential': must be a network with an nn.Linear"):
        dynamic(nn.Sequential(nn.Conv2d(1, 1, 3)))
    with pytest.raises(ValueError, match="granularity=.*: must be 'tensor' or 'channel' here"):
        dynamic(layer, granularity=2)
    with pytest.raises(ValueError, match="padding_mode='reflect': must be 'zeros'"):
        dynamic(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), layers=[""])


def test_calibration_sees_what_the_layers_see() -> None:
    model, x = network("mlp"), normal(30, 1, 8, 8)
    batches = list(x.split(10))
    seen = layer_inputs(model, batches)
    assert list(seen) == ["hidden.0", "hidden.2", "head"]
    first = F.relu(F.linear(x.flatten(1), *model.get_submodule("hidden.0").parameters()))
    torch.testing.assert_close(torch.cat(seen["hidden.2"]), first)
    found: Any = static(model, batches, calibrator=partial(percentile, p=80.0))
    scale, zero = scale_and_zero(*percentile(first.flatten(), found.hidden[2].activations, 80.0), Grid(8, False, False))
    torch.testing.assert_close(found.hidden[2].scale, scale.detach())
    assert torch.equal(found.hidden[2].zero, zero)
    moving: Any = static(model, batches, momentum=0.25)
    lows, highs = zip(*(min_max(b.flatten()) for b in batches), strict=True)
    ends = [0.75 * (0.75 * end[0] + 0.25 * end[1]) + 0.25 * end[2] for end in (lows, highs)]
    scale, zero = scale_and_zero(*ends, Grid(8, False, False))
    torch.testing.assert_close(moving.hidden[0].scale, scale)
    labelled = static(model, split())
    assert labelled(x).shape == (30, 3)
    with pytest.raises(ValueError, match="samples=0: must be one batch or more"):
        static(model, [])


# --- Batch norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
def test_folded_networks_compute_the_same(name: str) -> None:
    model, x = network(name), normal(5, 1, 8, 8)
    folded = fold_batch_norm(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert type(folded) is type(model)


def test_a_batch_norm_that_is_not_alone_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rows = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm, self.last = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.last(self.rows(self.norm(y) + y))

    model, x = Twice().double(), normal(6, 4)
    model(x)
    folded = fold_batch_norm(model.eval())
    torch.testing.assert_close(folded(x), model(x))
    assert isinstance(folded.norm, nn.BatchNorm1d)
    assert isinstance(folded.last, nn.Identity)


# --- What helps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("mlp", [("hidden.0", "hidden.2"), ("hidden.2", "head")]),
        ("convnet", [("features.0", "features.4"), ("features.4", "features.8"), ("features.8", "head")]),
        ("resnet", [(f"stages.{k}.0.conv1", f"stages.{k}.0.conv2") for k in range(3)]),
        ("vit", []),
    ],
)
def test_pairs_and_their_equalisation(name: str, pairs: list[tuple[str, str]]) -> None:
    model, x = fold_batch_norm(network(name)), normal(5, 1, 8, 8)
    assert equalisable_pairs(model) == pairs
    found: Any = equalise(model)
    torch.testing.assert_close(found(x), model(x), rtol=1e-9, atol=1e-9)
    for first, second in pairs:
        ranges = [
            found.get_submodule(first).weight.abs().flatten(1).amax(1),
            found.get_submodule(second).weight.abs().transpose(0, 1).flatten(1).amax(1),
        ]
        torch.testing.assert_close(*ranges, rtol=1e-3, atol=0)


class Repeated(nn.Module):
    """One layer and one norm, each used twice, and a layer of its own behind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.layer(x)))
        return self.last(torch.relu(self.layer(self.norm(x))))


def test_what_is_used_twice_is_neither_folded_nor_scaled() -> None:
    torch.manual_seed(0)
    model, x = Repeated().double(), 10 * normal(50, 4).double()
    model(x)  # the norm sees something
    model.eval()
    folded = fold_batch_norm(model)
    assert isinstance(folded.norm, nn.BatchNorm1d)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert equalisable_pairs(model) == []
    torch.testing.assert_close(equalise(model)(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_norm_without_statistics_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    folded, x = fold_batch_norm(model), normal(9, 4).float()
    torch.testing.assert_close(folded(x), model(x))


def test_a_pair_by_hand_and_channels_of_zeros() -> None:
    first, second = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()
    first.weight.data = torch.tensor([[8.0, -2], [0.5, 0.5], [0, 0]]).double()
    first.bias.data = torch.tensor([4.0, 1, 1]).double()
    second.weight.data = torch.tensor([[0.5, 1, 1], [-0.25, -2, 0]]).double()
    assert equalise_pair(first, second).tolist() == [4.0, 0.5, 1.0]
    assert first.weight.tolist() == [[2, -0.5], [1, 1], [0, 0]]
    assert first.bias.tolist() == [1, 2, 1]
    assert second.weight.tolist() == [[2, 0.5, 1], [-1, -1, 0]]


def test_equalised_channels_bear_one_scale() -> None:
    model, x = network("mlp"), normal(200, 1, 8, 8)
    with torch.no_grad():  # the same function, with channels of very different sizes
        sizes = 10 ** normal(12)
        first, second = model.get_submodule("hidden.0"), model.get_submodule("hidden.2")
        first.weight.mul_(sizes[:, None])  # type: ignore[operator, union-attr]
        first.bias.mul_(sizes)  # type: ignore[operator, union-attr]
        second.weight.div_(sizes)  # type: ignore[operator, union-attr]
    exact = model(x)
    before, after = (weights_only(m, Grid(6), "tensor") for m in (model, equalise(model)))
    assert signal_to_noise(exact, after(x)) > signal_to_noise(exact, before(x)) + 10


@pytest.mark.parametrize("name", ["mlp", "convnet", "vit"])
def test_corrected_biases_give_the_outputs_their_means(name: str) -> None:
    model, x = fold_batch_norm(network(name)), normal(60, 1, 8, 8)
    for coarse in (weights_only(model, Grid(3), "tensor"), static(model, [x], Grid(3), fold=False)):
        found = correct_bias(coarse, model, [x[:30], x[30:]])
        wanted = model(x).mean(0)
        assert (coarse(x).mean(0) - wanted).abs().max() > 0.01
        unit = 1e-9 if name == "mlp" and not any(isinstance(m, IntegerLayer) for m in found.modules()) else 0.01
        torch.testing.assert_close(found(x).mean(0), wanted, rtol=0, atol=unit)
    bare = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    assert correct_bias(weights_only(bare, Grid(2)), bare, [normal(9, 4)]).get_parameter("0.bias").shape == (2,)


def test_adaptive_rounding_against_all_roundings() -> None:
    w = normal(4, 8, seed=3)
    x = normal(100, 3, seed=4) @ normal(3, 8, seed=5) + 0.3 * normal(100, 8, seed=6)
    hessian, grid = x.T @ x / 100, Grid(3)
    nearest, found = quantise_weight(w, grid), adaptive_rounding(w, hessian, grid)

    def errors(rounded: Tensor) -> Tensor:
        return ((x @ (rounded - w).T) ** 2).mean(0)

    scale = nearest.scales.double()
    ups = torch.tensor(list(itertools.product([0, 1], repeat=8)))
    best = torch.stack([errors(((w / scale).floor() + up).clamp(-3, 3) * scale) for up in ups]).amin(0)
    reached, plain = errors(found.dequantise()), errors(nearest.dequantise())
    assert (reached >= best - 1e-9).all()
    assert reached.sum() < best.sum() + 0.35 * (plain.sum() - best.sum())
    assert (found.integers - (w / scale).floor()).unique().tolist() == [0, 1]
    alone = adaptive_rounding(w, torch.eye(8), grid)  # inputs that have nothing to do with each other
    assert torch.equal(alone.integers, nearest.integers)
    with pytest.raises(ValueError, match=r"hessian=\(3, 3\): must be of the shape \(8, 8\)"):
        adaptive_rounding(w, torch.eye(3), grid)


def test_the_sensitivity_of_each_layer() -> None:
    model, held = network("resnet"), split()
    table = sensitivity(model, held, Grid(3), "tensor")
    assert list(table.index) == list(quantisable_layers(model))
    plain = evaluate(model, held)
    for name in ("stem.0", "head"):
        alone = evaluate(weights_only(model, Grid(3), "tensor", layers=[name]), held)
        row = table.loc[name]
        assert (row["loss"], row["accuracy"]) == (alone.loss, alone.accuracy)
        assert row["increase"] == pytest.approx(alone.loss - plain.loss)
        assert row["weights"] == model.get_parameter(f"{name}.weight").numel()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model, x = network("convnet").cuda(), normal(4, 1, 8, 8).cuda()
    here = network("convnet")
    for way in (partial(weights_only, to=Grid(4)), partial(static, samples=[x])):
        other = partial(way.func, **{k: [x.cpu()] if k == "samples" else v for k, v in way.keywords.items()})
        torch.testing.assert_close(way(model)(x).cpu(), other(here)(x.cpu()), rtol=1e-6, atol=1e-6)
