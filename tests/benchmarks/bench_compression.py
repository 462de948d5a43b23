"""What int8 gains in time, memory and bytes: ``python -m tests.benchmarks.bench_compression``. Measured in turns.

torchvision's ResNet-18 in ONNX Runtime, int8 over float32 in the same engine, with one thread and with two; a network
of linear layers, a vision transformer, and the laboratory's smallest convnet, which is too small to gain; torch's own
int8; 4-bit weights that become reals at each use, which saves bytes and costs time; GPTQ over OBQ, its slow exact kin.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import course_lib  # noqa: F401  mends torchvision's import where torch is a CPU-only build
from course_lib.compression import engines, second_order
from course_lib.compression.quantisation import Grid
from course_lib.lab.models import convnet, mlp, vit
from course_lib.lab.timing import compare_speed, peak_memory

ROUNDS = 11
INT8_GAIN = 1.5
"""How many times as fast as float32 int8 must be where networks are large enough to gain."""


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    from torchvision.models import resnet18

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        missed = onnx_lines(
            "ResNet-18", resnet18(weights=None), torch.randn(8, 3, 224, 224), Path(folder), [8, 1], [1, 2]
        )
        missed += onnx_lines(
            "MLP, 1024 wide", mlp((1, 16, 16), 10, width=1024), torch.randn(64, 1, 16, 16), Path(folder)
        )
        wide = vit((1, 32, 32), 10, patch=4, width=256, depth=4)
        missed += dynamic_line("ViT, 256 wide", wide, torch.randn(16, 1, 32, 32), Path(folder), 1.0)
        small = convnet((1, 8, 8), 10)
        onnx_lines("convnet, 16 wide", small, torch.randn(64, 1, 8, 8), Path(folder), [64, 1], target=None)
    missed += torch_lines()
    missed += packed_lines()
    missed += gptq_line()
    torch.set_num_threads(threads)
    return missed


def onnx_lines(
    name: str,
    model: nn.Module,
    x: Tensor,
    folder: Path,
    sizes: list[int] | None = None,
    threads: list[int] | None = None,
    target: float | None = INT8_GAIN,
) -> int:
    """Float32 over static int8 in ONNX Runtime, for batches of these sizes; the target is that of the first."""
    path = engines.export_onnx(model, x, folder / f"{name}.onnx")
    small = engines.quantise_onnx(path, folder / f"{name}.int8.onnx", [x])
    table = engines.compare_engines(
        {"float32": engines.onnx_engine(path), "int8": engines.onnx_engine(small)}, x, rounds=1
    )
    row = table.loc["int8"]
    print(f"{name}: {engines.file_size(path) / 1e6:.1f} MB, int8 {row['smaller']:.2f} times smaller, ", end="")
    print(f"outputs within {row['difference']:.1%} of the largest, the same answer for {row['same']:.0%}", flush=True)
    peaks = [engines.peak_bytes(file, x.shape) / 1e6 for file in (path, small)]
    print(f"  memory at the peak: {peaks[0]:.0f} MB, int8 {peaks[1]:.0f} MB")
    missed = 0
    for count in threads or [1]:
        a, b = (engines.session(file, count) for file in (path, small))
        for size in sizes or [len(x)]:
            part = x[:size]
            goal = target if size == len(x) else None
            label = f"  float32 / int8, batch {size}, {count} thread{'s' * (count > 1)}"
            missed += line(label, partial(engines.run, a, part), partial(engines.run, b, part), goal)
    return missed


def dynamic_line(name: str, model: nn.Module, x: Tensor, folder: Path, target: float) -> int:
    """Float32 over dynamic int8 in ONNX Runtime."""
    path = engines.export_onnx(model, x, folder / f"{name}.onnx")
    a, b = engines.session(path), engines.session(engines.dynamic_onnx(path, folder / f"{name}.int8.onnx"))
    static = engines.session(engines.quantise_onnx(path, folder / f"{name}.static.onnx", [x]))
    line(f"{name}: float32 / static int8", partial(engines.run, a, x), partial(engines.run, static, x), None)
    return line(f"{name}: float32 / dynamic int8", partial(engines.run, a, x), partial(engines.run, b, x), target)


def torch_lines() -> int:
    """Float32 over int8, both in torch's own kernels."""
    x = torch.randn(64, 1, 16, 16)
    model = mlp((1, 16, 16), 10, width=1024)
    float32 = engines.torch_engine(model)
    missed = 0
    for name, made in (("static", engines.torch_static(model, [x])), ("dynamic", engines.torch_dynamic(model))):
        small = engines.torch_engine(made)
        ways = [partial(each.answer, x) for each in (float32, small)]
        missed += line(f"torch, MLP: float32 / {name} int8", ways[0], ways[1], 1.2)
    return missed


def packed_lines() -> int:
    """4-bit weights: the bytes that the network keeps, the memory and the time of a run."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4))).eval()
    packed = engines.pack_linears(model, second_order.round_to_nearest(model, Grid(4), 64))
    sizes = [engines.saved_size(each) / 1e6 for each in (model, packed)]
    print(f"4 linear layers, 1024 wide: {sizes[0]:.1f} MB, packed in 4 bits {sizes[1]:.1f} MB", end="")
    missed = sizes[0] / sizes[1] < 6
    print(f" ({sizes[0] / sizes[1]:.1f} times smaller, target >= 6) {'MISSED' if missed else 'ok'}")
    with torch.no_grad():
        for size in (1, 256):
            x = torch.randn(size, 1024)
            peaks = [peak_memory(partial(each, x), device="cpu").bytes / 1e6 for each in (model, packed)]
            print(f"  memory of a run, batch {size}: {peaks[0]:.1f} MB, packed {peaks[1]:.1f} MB")
            line(f"  float32 / packed, batch {size}", partial(model, x), partial(packed, x), None)
    return int(missed)


def gptq_line() -> int:
    """OBQ over GPTQ on a small layer."""
    w, h = torch.randn(64, 64), second_order.hessian(torch.randn(500, 64) @ torch.randn(64, 64))
    slow, fast = (partial(way, w, h, Grid(4)) for way in (second_order.obq, second_order.gptq))
    return line("OBQ / GPTQ, 64 x 64", slow, fast, 2.0)


def line(name: str, plain: Callable[[], object], other: Callable[[], object], target: float | None) -> bool:
    speed = compare_speed(plain, other, rounds=ROUNDS, device="cpu")
    bad = target is not None and speed.ratio < target
    goal = "(no target)" if target is None else f"(target >= {target:g}x)"
    times = f"{speed.a.median * 1e3:.2f} ms against {speed.b.median * 1e3:.2f} ms"
    print(f"{name + ':':42} {speed.ratio:6.2f}x {goal:16} {'MISSED' if bad else 'ok':8} {times}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
