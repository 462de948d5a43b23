"""What makes a network faster, as ratios: ``python -m tests.benchmarks.bench_efficiency``. Measured in turns.

The laboratory's convnet and torchvision's ResNet-18, plain and with batch norm folded, channels last, bfloat16,
compiled, and in ONNX Runtime, with one thread and with two; RepVGG's branches against the one convolution that they
become; attention in one kernel against attention written out; Adam's step as a loop, by lists, and in one kernel; a
depthwise-separable convolution against a full one. A ratio has a target where the gain does not depend on what the
processor can do: bfloat16 without the instructions for it is slower.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

import course_lib  # noqa: F401  mends torchvision's import where torch is a CPU-only build
from course_lib.compression import engines
from course_lib.efficiency.branches import reparameterise, repvgg
from course_lib.efficiency.cheap_layers import depthwise_separable, depthwise_separable_cost, full, full_cost
from course_lib.lab.models import convnet, mlp
from course_lib.lab.timing import compare_speed

ROUNDS = 11


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    missed = 0
    for threads in (1, 2):
        if threads > (os.cpu_count() or 1):
            continue
        with threads_set(threads), tempfile.TemporaryDirectory() as folder, torch.no_grad():
            print(f"{threads} thread{'s' * (threads > 1)}")
            missed += network_lines(
                "convnet", convnet((1, 16, 16), 10), torch.randn(64, 1, 16, 16), Path(folder), threads
            )
            image = torch.randn(4, 3, 224, 224)
            missed += network_lines("ResNet-18", resnet18(weights=None), image, Path(folder), threads, onnx=1.0)
    with threads_set(1):
        missed += reparameterised_line()
        missed += attention_lines()
        missed += adam_lines()
        missed += separable_lines()
    return missed


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    was = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(was)


def network_lines(name: str, model: nn.Module, x: Tensor, folder: Path, threads: int, onnx: float | None = None) -> int:
    """The plain network over the same one changed in one way each."""
    plain = model.eval()
    against = partial(line, f"  {name}: eager", partial(plain, x))
    folded = fuse(fx.symbolic_trace(copy.deepcopy(plain)))
    missed = int(against("batch norm folded", partial(folded, x), 1.0 if threads == 1 else None))
    last: nn.Module = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.to(memory_format=torch.channels_last)
    missed += against("channels last", partial(last, x_last), None)
    missed += against("bfloat16", partial(autocast, plain, x), None)
    session = engines.session(engines.export_onnx(plain, x, folder / f"{name}.onnx"), threads)
    missed += against("ONNX Runtime", partial(engines.run, session, x), onnx)
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        missed += against("torch.compile", partial(torch.compile(plain), x), None)
    else:
        print("  torch.compile: left out, there is no C++ compiler")
    return missed


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return model(x)


def reparameterised_line() -> int:
    """RepVGG's training network over the plain one that it becomes."""
    model, x = repvgg((3, 32, 32), 10, width=32).eval(), torch.randn(16, 3, 32, 32)
    plain = reparameterise(model)
    with torch.no_grad():
        return line("RepVGG: branches", partial(model, x), "one convolution", partial(plain, x), 1.3)


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With all scores ``[.., T, T]`` in memory."""
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v


def attention_lines() -> int:
    missed = 0
    for tokens, target in ((64, None), (1024, 1.0)):
        q, k, v = torch.randn(3, 4, 8, tokens, 64).unbind(0)
        fused = partial(F.scaled_dot_product_attention, q, k, v)
        missed += line(
            f"attention, {tokens} tokens: naive", partial(naive_attention, q, k, v), "one kernel", fused, target
        )
    return missed


def adam_lines() -> int:
    """Adam's step over many small tensors."""
    ways = {name: adam_step(**{name: True}) for name in ("foreach", "fused")}
    loop = adam_step(foreach=False)
    missed = line("Adam: loop", loop, "lists", ways["foreach"], None)
    return missed + line("Adam: loop", loop, "fused", ways["fused"], 1.2)


def adam_step(**way: bool) -> Callable[[], object]:
    model = mlp((1, 8, 8), 10, width=32, depth=50)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.Adam(model.parameters(), **way).step  # type: ignore[arg-type]


def separable_lines() -> int:
    """A full convolution over a depthwise-separable one: the multiplications that it saves, and the time."""
    for channels, side in ((16, 16), (128, 28)):
        costs = [cost(channels, channels, (side, side)) for cost in (full_cost, depthwise_separable_cost)]
        saved = costs[0].multiplications / costs[1].multiplications
        print(f"full over depthwise-separable, {channels} channels: {saved:.1f} times the multiplications")
        x = torch.randn(16, channels, side, side)
        a, b = (build(channels, channels).eval() for build in (full, depthwise_separable))
        with torch.no_grad():
            line("  forward: full", partial(a, x), "separable", partial(b, x), None)
        line("  with backward: full", partial(step, a, x), "separable", partial(step, b, x), None)
    return 0


def step(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def line(
    name: str, plain: Callable[[], object], other_name: str, other: Callable[[], object], target: float | None
) -> bool:
    """Print the time of the plain way over that of the other; say whether the target was missed."""
    speed = compare_speed(plain, other, rounds=ROUNDS, device="cpu")
    bad = target is not None and speed.ratio < target
    goal = "(no target)" if target is None else f"(target >= {target:g}x)"
    times = f"{speed.a.median * 1e3:.2f} ms against {speed.b.median * 1e3:.2f} ms"
    label = f"{name} / {other_name}:"
    print(f"{label:46} {speed.ratio:6.2f}x {goal:16} {'MISSED' if bad else 'ok':8} {times}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
