"""How long a step takes, ours against torch's, on 10 million parameters.

Run ``python -m tests.benchmarks.bench_optimizers``. Each method is compared with its namesake in ``torch.optim``, both
at their default settings, the runs interleaved (A B A B …) so that a change in the machine's load meets both. The
target is a ratio of at most 1.3.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

import torch

from course_lib import optimizers as ours

TARGET = 1.3
METHODS = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Muon")
LAYOUTS = {
    # A small transformer: embedding, 12 blocks, head.
    "transformer": [(1024, 256)]
    + 12 * [(256,), (256,), (768, 256), (768,), (256, 256), (256,), (256,), (256,), (1024, 256), (1024,), (256, 1024)]
    + 12 * [(256,)]
    + [(1024, 256), (256,), (256,), (1024,)],
    "one tensor": [(2500, 4000)],
}


def build(library: object, name: str, shapes: list[tuple[int, ...]], device: torch.device) -> torch.optim.Optimizer:
    """Return one optimizer over parameters of these shapes, with their gradients in place."""
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape in shapes if name != "Muon" or len(shape) == 2]
    params = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    for theta in params:
        theta.grad = torch.randn(theta.shape, generator=generator).to(device)
    return getattr(library, name)(params)


def seconds(optimizer: torch.optim.Optimizer, device: torch.device, steps: int) -> float:
    """Return the time of one step, the mean of a few in a row."""
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def ratio(name: str, shapes: list[tuple[int, ...]], device: torch.device, rounds: int) -> tuple[float, float, float]:
    """Return the median ratio of the rounds, and the two median times in seconds."""
    pair = [build(library, name, shapes, device) for library in (ours, torch.optim)]
    steps = 20 if device.type == "cuda" else 1
    for optimizer in pair:
        seconds(optimizer, device, 3)
    times = [[seconds(optimizer, device, steps) for optimizer in pair] for _ in range(rounds)]
    a, b = zip(*times, strict=True)
    return statistics.median(x / y for x, y in times), statistics.median(a), statistics.median(b)


def main() -> int:
    """Print one line a method; return 1 when any misses the target."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    missed = 0
    for device in devices:
        for layout, shapes in LAYOUTS.items():
            parameters = sum(torch.Size(shape).numel() for shape in shapes) / 1e6
            print(f"\n{layout}: {parameters:.1f} million parameters, {len(shapes)} tensors, {device.type}", end="")
            print(f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
            for name in METHODS:
                slow = name == "Muon" and device.type == "cpu"
                if slow and layout == "one tensor":
                    continue  # 300 billion multiplications a step, none of them ours: nothing to compare
                rounds = int(os.environ.get("BENCH_ROUNDS", 5 if slow else 25))
                measured, a, b = ratio(name, shapes, device, rounds)
                verdict = "ok" if measured <= TARGET else "TOO SLOW"
                missed += measured > TARGET
                figures = f"{measured:.2f}x of torch.optim.{name} (target <= {TARGET}x) {verdict}"
                print(f"  {name + ':':9} {figures:55}  {a * 1e3:8.2f} ms against {b * 1e3:8.2f} ms", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
