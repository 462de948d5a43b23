"""What transfer costs: ``python -m tests.benchmarks.bench_transfer``. One thread, measured in turns.

Steps that train few numbers over a step of all of them, in time and in memory; a head on features that are computed
once over one whose features are computed each time, and a probe over five epochs of that; a merged network over one
with its updates beside; projections over one another; objectives that look at a target over the plain one on twice as
many images; a masked encoder over one that sees all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from course_lib import transfer
from course_lib.lab.data import Dataset, Split, batches, load
from course_lib.lab.models import convnet, freeze, thaw, vit
from course_lib.lab.timing import compare_speed, peak_memory
from course_lib.lab.training import Recipe, cross_entropy, fit

ROUNDS = 9


def step(model: nn.Module, x: Tensor, y: Tensor, objective: Callable[..., Tensor] = cross_entropy) -> Callable[[], Any]:
    """One step of Adam, ready to be taken: its state is there, so memory counts what a step adds."""
    model.train()
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def take() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(model, x, y).backward()
        optimizer.step()

    take()
    return take


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    data: Dataset = load("glyphs", classes="digits", size=16, train_size=512, val_size=10, test_size=10)
    x, y = next(batches(data.train, 64))
    net = vit((1, 16, 16), 10, width=64, depth=4, patch=4)

    full = step(transfer.with_head(net, 10, generator=draw), x, y)
    low = transfer.lora(net, 4, 8.0, ["*.qkv"], generator=draw)
    head = transfer.with_head(freeze(net), 10, generator=draw)
    thaw(net)
    few: list[tuple[str, nn.Module, float, float]] = [
        ("LoRA", low, 1.1, 0.8),
        ("BitFit", transfer.bitfit(net), 0.95, 0.8),
        ("adapters", transfer.with_adapters(net, 8, generator=draw), 1.2, 1.0),
        ("head alone", head, 0.5, 0.5),
    ]
    missed = 0
    for name, model, time, memory in few:
        taken = step(model, x, y)
        missed += line(f"{name}: a step / of all weights", full, taken, time)
        missed += told(f"{name}: memory / of all weights", peak_memory(taken, device="cpu").bytes, peak(full), memory)

    recipe = Recipe(epochs=1, optimizer=partial(SGD, lr=0.0))
    frozen = transfer.with_head(freeze(vit((1, 16, 16), 10, depth=4, patch=4)), 10, generator=draw)
    epoch = partial(fit, frozen, data, recipe, seed=0)
    seen = transfer.features(net, data.train)
    once = Split(seen, data.train.labels, (0.0,) * 64, (1.0,) * 64)
    rows = replace(data, train=once, val=once.subset(torch.arange(10)))
    cached = partial(fit, nn.Linear(64, 10), rows, recipe, seed=0)
    missed += line("head: on cached features / not", epoch, cached, 0.4)
    five = partial(fit, frozen, data, replace(recipe, epochs=5), seed=0)
    missed += line("a probe, solved / 5 epochs of it", five, partial(transfer.probe, seen, data.train.labels), 0.5)

    low.eval()
    plain = transfer.merged(low).eval()
    with torch.no_grad():
        missed += line("LoRA: merged / beside", partial(low, x), partial(plain, x), 0.97)
        missed += line("LoRA: merged / the network", partial(net.eval(), x), partial(plain, x), 1.2)

    z = torch.randn(200)
    dense, fast = (kind(60_000, 200, seed=0).float() for kind in (transfer.Dense, transfer.Fastfood))
    missed += line("Fastfood / dense, 60,000 x 200", partial(dense, z), partial(fast, z), 2.0)
    missed += told("Fastfood: bytes / dense", held(fast), held(dense), 0.03)

    small, target = convnet((1, 16, 16), 10), transfer.Pool(data.train)
    twice = step(small, torch.cat([x, x]), torch.cat([y, y]))
    adversary = transfer.WithDomains(small, 32, generator=draw)
    for name, objective in (("coral", transfer.coral), ("dan", transfer.dan), ("dann", transfer.dann)):
        taken = step(adversary, x, y, partial(objective, target=target))
        missed += line(f"{name}: a step / of 2x the images", twice, taken, 1.6)
    masked = transfer.MaskedAutoencoder(net, 32, heads=4, generator=draw)
    all_seen = step(net, x, y)
    missed += line("masked 75%: a step / all seen", all_seen, step(masked, x, y, transfer.masked_patches), 0.7)
    torch.set_num_threads(threads)
    return missed


def peak(taken: Callable[[], Any]) -> int:
    return peak_memory(taken, device="cpu").bytes


def held(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.buffers())


def told(name: str, ours: float, other: float, target: float) -> bool:
    ratio = ours / other
    verdict = "TOO MUCH" if ratio > target else "ok"
    print(f"{name + ':':38} {ratio:6.2f}x (target <= {target:g}x) {verdict}", flush=True)
    return ratio > target


def line(name: str, plain: Callable[[], object], other: Callable[[], object], target: float) -> bool:
    speed = compare_speed(other, plain, rounds=ROUNDS, device="cpu")
    bad = speed.ratio > target
    verdict = "TOO SLOW" if bad else "ok"
    times = f"{speed.a.median * 1e3:.2f} ms against {speed.b.median * 1e3:.2f} ms"
    print(f"{name + ':':38} {speed.ratio:6.2f}x (target <= {target:g}x) {verdict:8}  {times}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
