"""What fusion costs: ``python -m tests.benchmarks.bench_fusion``. Measured in turns, on one thread.

Networks trained at once over one after the other (on one thread, and on all usable cores), and asked at once; means
over the plain arithmetic written out by hand; members within one network over a plain step; a cascade over the large
network alone; weights over many calls of an optimiser.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from course_lib import fusion
from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.runtime import usable_cores
from course_lib.lab.timing import compare_speed
from course_lib.lab.training import Recipe, cross_entropy, fit, fresh

ROUNDS, WARMUP = 9, 3
ON_ALL_CORES = 5, 1, 500
"""Rounds, uncounted ones and images: few, since threads of so small networks wait for each other at each operation;
where another process has one of the cores, they wait for it, and both sides take a hundred times as long."""
BY_HAND = 1.5
"""How many times as long as arithmetic written out by hand ours may take at most."""
TOGETHER = 1 / 1.5
"""What part of the time of one after the other training at once may take at most."""


def step(model: nn.Module, optimizer: SGD, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    cross_entropy(model, x, y).backward()
    optimizer.step()


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    were = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (1, 16, 16)
    data = load("glyphs", classes="digits", size=16, difficulty=0.5, train_size=1000, val_size=50, test_size=50)
    x, y = next(batches(data.train, 50))

    missed = 0
    for threads in dict.fromkeys((1, usable_cores())):
        missed += eight_networks(data, threads)

    nets = [mlp(shape, 10, width=64) for _ in range(8)]
    members = fusion.Members([net.eval() for net in nets])
    stack = fusion.Stack([*members.networks])
    with torch.no_grad():
        missed += line("8 asked at once / in turn", partial(members.each, x), partial(stack.forward, x), 1.6)

    logits = torch.randn(8, 1000, 10)
    labels = torch.randint(10, (1000,))
    by_hand = partial(lambda z: z.softmax(2).mean(0).log(), logits)
    missed += line("mean probability / by hand", by_hand, partial(fusion.mean_probability, logits), 3.0)
    sort = partial(lambda z: z.argsort(2).argsort(2).double().mean(0), logits)
    missed += line("Borda / ranks by sorting", sort, partial(fusion.borda, logits), 3.0)

    def descent() -> None:
        w = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        solver, log_q = Adam([w], lr=0.05), logits.double().log_softmax(2)
        for _ in range(200):
            solver.zero_grad()
            mixed = (log_q + w.log_softmax(0)[:, None, None]).logsumexp(0)
            F.nll_loss(mixed, labels).backward()
            solver.step()

    missed += line("fitted weights / 200 steps of Adam", descent, partial(fusion.fit_weights, logits, labels), 0.3)

    plain = mlp(shape, 10, width=64)
    shared = fusion.BatchEnsemble(plain, 4, generator=torch.Generator())
    mimo = fusion.MIMO(partial(mlp, width=64), shape, 10, members=3)
    first, second = (SGD(net.parameters(), lr=0.0) for net in (plain, shared))
    missed += line(
        "batch ensemble: a step / plain", partial(step, plain, first, x, y), partial(step, shared, second, x, y), 3.0
    )

    def mimo_step(optimizer: SGD = SGD(mimo.parameters(), lr=0.0)) -> None:  # noqa: B008
        optimizer.zero_grad()
        fusion.mimo_loss(mimo, x, y).backward()
        optimizer.step()

    missed += line("MIMO of 3: a step / plain", partial(step, plain, first, x, y), mimo_step, 3.0)

    many = torch.randn(1000, *shape)
    small, large = mlp(shape, 10, width=64).eval(), convnet(shape, 10, width=16).eval()
    with torch.no_grad():
        threshold = float(fusion.max_probability(small(many)).quantile(0.25))  # three of four are sure enough
        cascade = fusion.Cascade([small, large], [threshold], combine=fusion.last)
        missed += line("cascade, 1 of 4 go on / large one", partial(large, many), partial(cascade, many), 0.6)
    torch.set_num_threads(were)
    return missed


def eight_networks(data: Dataset, threads: int) -> int:
    """Compare 8 networks trained at once with one after the other, both on so many of torch's own threads.

    (Never on threads of Python: ``torch.func`` is not made for them.) How many targets were missed.
    """
    missed, rounds, warmup = 0, ROUNDS, WARMUP
    if threads > 1:
        rounds, warmup, images = ON_ALL_CORES
        data = replace(data, train=data.train.subset(torch.arange(images)))
    for name, optimizer in (("SGD", partial(SGD, lr=0.05, momentum=0.9)), ("Adam", partial(Adam, lr=1e-3))):
        recipe = Recipe(epochs=2, batch_size=50, optimizer=optimizer)
        nets = [fresh(partial(mlp, data.input_shape, 10, width=64), recipe, seed=seed) for seed in range(8)]

        def in_turn(nets: list[nn.Module] = nets, recipe: Recipe = recipe) -> None:
            for seed, net in enumerate(copy.deepcopy(nets)):
                fit(net, data, recipe, seed=seed, progress=False)

        def at_once(nets: list[nn.Module] = nets, recipe: Recipe = recipe) -> None:
            fusion.train_together(copy.deepcopy(nets), data, recipe, seeds=range(8))

        title = f"8 at once / in turn, {name}, {threads} thread{'' if threads == 1 else 's'}"
        was = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            missed += line(title, in_turn, at_once, TOGETHER, rounds, warmup)
        finally:
            torch.set_num_threads(was)
    return missed


def line(
    name: str,
    plain: Callable[[], object],
    other: Callable[[], object],
    target: float,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
) -> bool:
    speed = compare_speed(other, plain, rounds=rounds, warmup=warmup, device="cpu")
    bad = speed.ratio > target
    verdict = "TOO SLOW" if bad else "ok"
    times = f"{speed.a.median * 1e3:.2f} ms against {speed.b.median * 1e3:.2f} ms"
    print(f"{name + ':':36} {speed.ratio:6.2f}x (target <= {target:.2g}x) {verdict:8}  {times}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
