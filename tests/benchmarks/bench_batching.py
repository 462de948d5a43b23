"""What batching brings: ``python -m tests.benchmarks.bench_batching``. One thread, all pairs measured in turns.

Per-example gradients by ``vmap`` against one backward pass an example; a bucketed epoch of a GRU, whose time is its
cells, against one of random batches; and the examples a second of a batch of 256 against those of a batch of 1.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.batching import length_buckets, pad_batch, padding, per_example_gradients, throughput
from course_lib.lab.models import convnet, mlp
from course_lib.lab.timing import compare_speed

ROUNDS = 9
PER_EXAMPLE = {"small mlp": (256, 5.0), "mlp": (64, 2.5), "convnet": (64, 2.5)}
"""Examples at once, and how many times as long one backward pass an example should take at least.

On a processor ``vmap`` saves calls, not products: the more numbers a network has (3,466, 26,122 and 24,058 here), the
less of the time is calls. The gradients of a convolution's weights are grouped convolutions then, which are slow.
"""
BUCKETED = 1.5
"""How many times as long an epoch of random batches should take at least."""
THROUGHPUT = {"mlp": 50.0, "convnet": 8.0}
"""Examples a second at a batch of 256 over those at a batch of 1, at least."""
MODELS = {"small mlp": partial(mlp, width=32), "mlp": mlp, "convnet": convnet}


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % 10


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weights = list(model.parameters())
    rows = []
    for i in range(len(y)):
        found = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), weights)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows)


def epoch(model: nn.GRU, sequences: list[Tensor], batches: list[Tensor]) -> None:
    """Forward and backward pass of all batches."""
    for batch in batches:
        tokens, mask = pad_batch([sequences[i] for i in batch.tolist()])
        out, _ = model(tokens)
        out[mask].square().mean().backward()
        model.zero_grad()


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    missed = 0
    x, y = images(256)
    for name, (chunk, target) in PER_EXAMPLE.items():
        model = MODELS[name]((1, 8, 8), 10).eval()
        at_once = partial(per_example_gradients, model, (x, y), chunk=chunk)
        torch.testing.assert_close(at_once(), one_by_one(model, x, y), rtol=1e-3, atol=1e-5)
        speed = compare_speed(partial(one_by_one, model, x, y), at_once, rounds=ROUNDS, device="cpu")
        times = f"{speed.a.median * 1e3:.1f} ms against {speed.b.median * 1e3:.1f} ms for {len(y)} gradients"
        missed += line(f"{name}: one by one / vmap", speed.ratio, target, times)

    generator = torch.Generator().manual_seed(0)
    # most are short, a few long, as sentences are
    lengths = (torch.empty(512).exponential_(generator=generator) * 12).long() + 1
    sequences = [torch.randn(int(length), 16, generator=generator) for length in lengths]
    plain = list(torch.randperm(len(lengths), generator=generator).split(32))
    buckets = length_buckets(lengths, 32, generator)
    gru = nn.GRU(16, 64, batch_first=True)
    speed = compare_speed(
        partial(epoch, gru, sequences, plain), partial(epoch, gru, sequences, buckets), rounds=ROUNDS, device="cpu"
    )
    parts = f"padding {padding(lengths, plain):.0%} against {padding(lengths, buckets):.0%}"
    missed += line("GRU: random / bucketed batches", speed.ratio, BUCKETED, parts)

    for name, target in THROUGHPUT.items():
        found = throughput(MODELS[name]((1, 8, 8), 10), x, y, [1, 256], rounds=15)
        rates = f"{found[256]:,.0f} against {found[1]:,.0f} examples a second"
        missed += line(f"{name}: batch 256 / batch 1", found[256] / found[1], target, rates)
    torch.set_num_threads(threads)
    return missed


def line(name: str, ratio: float, target: float, figures: str) -> bool:
    bad = ratio < target
    verdict = "TOO SLOW" if bad else "ok"
    print(f"{name + ':':32} {ratio:6.1f}x (target >= {target:g}x) {verdict:8}  {figures}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
