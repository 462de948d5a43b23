"""Profiles of events made by hand, and of tiny calls under torch's own profiler; never of durations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from course_lib.efficiency import profiling
from course_lib.efficiency.operator_kinds import KINDS, OVERHEAD, kind_of
from course_lib.efficiency.profiling import (
    BETWEEN,
    LAYER,
    OUTSIDE,
    STEP,
    Event,
    Recording,
    by_kind,
    by_layer,
    by_operator,
    layer_table,
    parents,
    profile_steps,
    record,
    self_seconds,
    timeline,
)
from course_lib.lab.costs import flops
from course_lib.lab.models import resnet, vit
from course_lib.lab.timing import _without_profiler_chatter

# --- By hand ----------------------------------------------------------------------------------------------------------

NODE = "autograd::engine::evaluate_function: XBackward0"
# two steps of 10 s; the second does the first's product twice
HAND = (
    Event(STEP, 0, 10),
    Event("aten::linear", 1, 5, sequence=7),
    Event("aten::addmm", 2, 4.5, allocated=100),
    Event("aten::empty", 2, 2.5, allocated=40),
    Event("aten::relu", 6, 7, allocated=8),
    Event(NODE, 7.5, 9.5, sequence=7),
    Event("aten::mm", 8, 9, allocated=-16),
    Event(STEP, 20, 30),
    Event("aten::addmm", 21, 22),
    Event("aten::addmm", 22, 23),
    Event("aten::empty", 24, 25, allocated=2),
)


def test_parents_are_the_innermost_around() -> None:
    assert parents(HAND) == [None, 0, 1, 2, 0, 0, 5, None, 7, 7, 7]
    shuffled = [HAND[i] for i in (6, 3, 5, 2, 4, 1, 0)]
    assert parents(shuffled) == [2, 3, 6, 5, 6, 6, None]


def test_another_thread_and_what_ends_later_is_not_inside() -> None:
    events = [Event("a", 0, 10), Event("b", 1, 2, thread=1), Event("c", 3, 11), Event("d", 10, 12), Event("e", 0, 10)]
    assert parents(events) == [None, None, None, None, 0]


def test_self_seconds() -> None:
    assert self_seconds(HAND) == pytest.approx([10 - 4 - 1 - 2, 1.5, 2, 0.5, 1, 1, 1, 7, 1, 1, 1])
    on_gpu = [Event("a", 0, 10, device_seconds=3.0), Event("b", 1, 2, device_seconds=0.0)]
    assert self_seconds(on_gpu) == [3.0, 0.0]


def test_operators_by_hand() -> None:
    table = by_operator(Recording(HAND, {"aten::mm": 12}))
    assert dict(table["calls"]) == {
        "aten::addmm": 1.5, "aten::empty": 1.0, "aten::linear": 0.5, "aten::relu": 0.5, "aten::mm": 0.5, BETWEEN: 0,
    }  # fmt: skip
    seconds = {"aten::addmm": 2, "aten::empty": 0.75, "aten::linear": 0.75, "aten::relu": 0.5, "aten::mm": 0.5}
    assert dict(table["seconds"]) == pytest.approx(seconds | {BETWEEN: 10 - 4.5})
    assert table["seconds"].is_monotonic_decreasing
    assert table["share"].sum() == pytest.approx(1)
    assert table.loc[BETWEEN, "share"] == pytest.approx(0.55)
    # what is made room for belongs to who asked for it; outside of any operator, to itself; releases do not count
    assert dict(table["bytes"]) == {
        "aten::addmm": 70, "aten::empty": 1, "aten::relu": 4, "aten::mm": 0, "aten::linear": 0, BETWEEN: 0,
    }  # fmt: skip
    assert table.loc["aten::mm", "flops"] == 12

    kinds = by_kind(table)
    assert dict(kinds["seconds"]) == pytest.approx(
        {OVERHEAD: 5.5, "matrix products": 3.25, "copies and layout": 0.75, "element-wise": 0.5}
    )
    assert kinds.loc["matrix products", "flops_per_second"] == pytest.approx(12 / 3.25)
    assert kinds["share"].sum() == pytest.approx(1)
    assert kinds["seconds"].is_monotonic_decreasing


def test_on_a_gpu_what_its_kernels_leave_is_overhead() -> None:
    events = (
        Event(STEP, 0, 10, device_seconds=0.0),
        Event("aten::mm", 1, 1.1, device_seconds=6.0),
        Event("aten::relu", 2, 2.1, thread=2, device_seconds=1.0),
    )
    assert dict(by_operator(Recording(events))["seconds"]) == {"aten::mm": 6, "aten::relu": 1, BETWEEN: 3}


def test_what_lies_between_two_steps_is_left_out() -> None:
    outside = (Event("aten::mm", 10, 11), Event("[memory]", 3, 3), Event("aten::mm", 31, 32))
    assert tuple(profiling._within_steps((*HAND, *outside))) == HAND


def test_timeline_by_hand() -> None:
    bars = timeline(Recording(HAND))
    assert list(bars["name"]) == ["aten::linear", "aten::addmm", "aten::empty", "aten::relu", NODE, "aten::mm"]
    assert list(bars["depth"]) == [0, 1, 2, 0, 0, 1]
    second = timeline(Recording(HAND), 1)
    assert list(second["start"]) == [1, 2, 4]
    assert list(second["end"]) == [2, 3, 5]
    assert list(timeline(Recording(HAND), shortest=1.0)["name"]).count("aten::empty") == 0
    assert list(bars["kind"])[3:5] == ["element-wise", OVERHEAD]
    for step in (-1, 2):
        with pytest.raises(ValueError, match=rf"step={step}: must be from 0 to 1"):
            timeline(Recording(HAND), step)


def test_draw_timeline() -> None:
    bars = timeline(Recording(HAND))
    ax = profiling.draw_timeline(bars, title="a step", deepest=1)
    drawn = sum(len(collection.get_paths()) for collection in ax.collections)
    assert drawn == 5, "all but the one at depth 2"
    assert ax.get_xlim() == (0, 9500)
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"matrix products", "element-wise", OVERHEAD}
    (first, *_) = ax.collections[0].get_paths()
    assert first.vertices[:, 0].min() == 1000
    plt.close("all")


LAYERS = (
    Event(STEP, 0, 20),
    Event(LAYER + "block", 1, 9),
    Event(LAYER + "block.a", 2, 5),
    Event("aten::mm", 3, 4, sequence=1),
    Event("aten::add_", 4.2, 4.6, sequence=2),
    Event("aten::relu", 7, 8, sequence=2),
    Event(LAYER + "b", 9, 12),
    Event("aten::mm", 10, 11, sequence=3),
    Event("aten::sum", 12, 13, sequence=4),
    Event(NODE, 13, 14, thread=1, sequence=4),
    Event(NODE, 14, 15.5, thread=1, sequence=3),
    Event("aten::mm", 14.5, 15, thread=1, sequence=9),
    Event(NODE, 15.5, 16, thread=1, sequence=2),
    Event(NODE, 16, 18, thread=1, sequence=1),
    Event(NODE, 18, 19, thread=1, sequence=-1),
)


def test_layers_by_hand() -> None:
    """An operator without a node bears the number of the next one: the sum in block.a that of the ReLU in block."""
    table = layer_table(Recording(LAYERS))
    assert list(table.index) == ["block", "block.a", "b", OUTSIDE]
    assert list(table["forward"]) == pytest.approx([5, 3, 3, 0])
    assert list(table["backward"]) == pytest.approx([0.5, 2, 1.5, 0])
    assert list(table["seconds"]) == pytest.approx([5.5, 5, 4.5, 5])
    assert list(table["share"]) == pytest.approx([0.275, 0.25, 0.225, 0.25])


# --- Kinds ------------------------------------------------------------------------------------------------------------

OF_KIND = {
    "matrix products": "mm addmm bmm baddbmm linear matmul _int_mm _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_flash_attention_for_cpu_backward mv dot einsum mkldnn_linear",
    "convolutions": "conv2d convolution _convolution mkldnn_convolution convolution_backward cudnn_convolution "
    "conv_transpose2d _conv_depthwise2d thnn_conv2d _slow_conv2d_forward",
    "normalisation": "batch_norm native_batch_norm _batch_norm_impl_index native_batch_norm_backward layer_norm "
    "native_layer_norm cudnn_batch_norm native_group_norm _fused_rms_norm",
    "copies and layout": "empty copy_ _to_copy to clone view t transpose permute as_strided cat empty_like "
    "_unsafe_view zero_ fill_ ones_like detach contiguous index_select flatten resize_ _reshape_alias "
    "_local_scalar_dense",
    "reductions": "sum mean max_pool2d max_pool2d_with_indices_backward _softmax _softmax_backward_data log_softmax "
    "nll_loss_forward cross_entropy_loss adaptive_avg_pool2d topk linalg_vector_norm _foreach_norm amax",
    "element-wise": "add add_ mul div relu clamp_min threshold_backward gelu gelu_backward _foreach_add_ sub rsub sqrt "
    "_fused_sgd_ _fused_adamw_ bernoulli_ native_dropout sigmoid_backward addcmul_ where lerp_ exp log tanh",
    "other operators": "fft_fft nonzero stft",
}


def test_kinds() -> None:
    assert set(KINDS) | {"other operators"} == set(OF_KIND)
    wrong = [(n, kind_of(f"aten::{n}")) for kind, names in OF_KIND.items() for n in names.split()
             if kind_of(f"aten::{n}") != kind]  # fmt: skip
    assert not wrong
    others = ("step", "Optimizer.step#SGD.step", NODE, "MmBackward0", "torch::autograd::AccumulateGrad", "cudaLaunch")
    assert {kind_of(name) for name in others} == {OVERHEAD}
    assert kind_of("## Call CompiledFxGraph fa2 ##") == kind_of("triton_poi_fused_add_0") == "compiled kernels"
    assert kind_of("quantized::conv2d") == "convolutions"


# --- Under the profiler -----------------------------------------------------------------------------------------------


def test_nesting_is_that_of_the_profiler() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    with _without_profiler_chatter(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        layer(x).relu().sum().backward()
    theirs = list(profiler.events())
    ours = parents([profiling._event(e, on_gpu=False) for e in theirs])
    for event, parent in zip(theirs, ours, strict=True):
        assert event.cpu_parent is (None if parent is None else theirs[parent])
    for event, own in zip(theirs, self_seconds([profiling._event(e, on_gpu=False) for e in theirs]), strict=True):
        assert own == pytest.approx(event.self_cpu_time_total * 1e-6, abs=1e-9)


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Any, list[int]]:
    optimizer, calls = torch.optim.SGD(model.parameters(), lr=0.1), [0]

    def step() -> None:
        calls[0] += 1
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, calls


def test_a_real_step(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(7, 6), torch.arange(7) % 3
    step, calls = training_step(model, x, y)
    table = profile_steps(step, 4, warmup=1)
    assert calls == [1 + 4 + 1]
    assert table.loc[["aten::addmm", "aten::mm", "aten::relu", "aten::linear"], "calls"].tolist() == [2, 3, 1, 2]
    assert table["share"].sum() == pytest.approx(1)
    assert (table["seconds"] >= 0).all()
    assert table.loc[BETWEEN, "share"] > 0
    assert table["flops"].sum() == flops(model, x) + (2 * 7 * 5 * 3 * 2 + 2 * 7 * 6 * 5), "no gradient of the images"
    assert table.loc["aten::addmm", "bytes"] == 7 * (5 + 3) * 4
    assert table.loc["aten::addmm", "kind"] == "matrix products"
    assert capfd.readouterr() == ("", "")


def test_flops_of_attention_on_a_cpu_are_counted() -> None:
    model, x = vit((1, 4, 4), 3, width=8, depth=1, heads=2), torch.randn(2, 1, 4, 4)
    with torch.no_grad():
        found = profiling.counted_flops(lambda: model(x))
        with FlopCounterMode(display=False) as theirs:
            model(x)
    assert sum(found.values()) == flops(model, x)
    attention = {name: count for name, count in found.items() if "attention" in name}
    assert sum(attention.values()) == 2 * 2 * 2 * 4 * 4 * 8, "tokens^2 x width, twice, for 2 images"
    assert theirs.get_total_flops() in (sum(found.values()), sum(found.values()) - sum(attention.values()))
    x_grad = torch.randn(2, 2, 4, 4, requires_grad=True)
    backward = profiling.counted_flops(lambda: F.scaled_dot_product_attention(x_grad, x_grad, x_grad).sum().backward())
    forward = next(count for name, count in backward.items() if not name.endswith("backward"))
    assert sum(backward.values()) == pytest.approx(3.5 * forward), "five products for two: scores are computed again"


def test_a_recording_holds_its_steps_alone() -> None:
    found = record(lambda: torch.ones(3).add(1), 2, warmup=0, count_flops=False)
    assert len(found.steps) == 2
    assert found.flops == {}
    counts = Counter(e.name for e in found.events)
    assert counts["aten::add"] == 2
    assert set(timeline(found, 1)["name"]) >= {"aten::add", "aten::ones"}
    assert found.seconds == pytest.approx(sum(e.seconds for e in found.steps) / 2)


def test_every_layer_of_a_residual_network() -> None:
    torch.manual_seed(0)
    model, x = resnet((1, 4, 4), 3, width=2, blocks=(1, 1)), torch.randn(2, 1, 4, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = by_layer(model, x, steps=2)
    called = {name or "(the model)" for name, _ in model.named_modules()}
    assert set(table.index) == called | {OUTSIDE}
    assert table["share"].sum() == pytest.approx(1)
    assert (table >= 0).all().all()
    weighted = [n for n, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    assert (table.loc[weighted, ["forward", "backward"]] > 0).all().all()
    assert table.loc["stages.0.0", "backward"] > 0, "its two ReLUs and its sum"
    assert table.loc[["stages", "stages.0", "stages.0.0.shortcut"], "backward"].tolist() == [0, 0, 0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "it is as it was"
    assert all(p.grad is None for p in model.parameters())
    with profiling.named_layers(model):
        assert all(layer._forward_hooks and layer._forward_pre_hooks for layer in model.modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())


def test_at_the_door() -> None:
    with pytest.raises(ValueError, match="steps=0: must be a whole number of at least 1"):
        record(lambda: None, 0)
    with pytest.raises(ValueError, match="warmup=-1"):
        record(lambda: None, warmup=-1)
    with pytest.raises(ValueError, match="model='ReLU': must be one that trains"):
        by_layer(nn.ReLU(), torch.ones(2))


@pytest.mark.gpu(emulated=False)
def test_on_cuda() -> None:
    x = torch.randn(512, 512, device="cuda")
    table = profile_steps(lambda: (x @ x).relu(), 2, device="cuda")
    assert table.loc["aten::mm", "seconds"] > table.loc["aten::relu", "seconds"] > 0
    assert table["share"].sum() == pytest.approx(1)
    assert table.loc["aten::mm", "flops"] == 2 * 512**3
    layers = by_layer(nn.Sequential(nn.Linear(64, 64), nn.ReLU()).cuda(), x[:, :64])
    assert (layers.loc[["0", "1"], ["forward", "backward"]] > 0).all().all()
