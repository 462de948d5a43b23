"""What merging costs: ``python -m tests.benchmarks.bench_merging``. One thread, measured in turns.

Averages over the plain arithmetic written out by hand, and over torch's own where there is one; the Fisher information
over one backward pass an example; a mixture of experts over the layer that it was made of; a network of four side by
side over the four in turn; a federated round over a run on the same number of examples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from course_lib import merging
from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.models import convnet, mlp, resnet
from course_lib.lab.timing import compare_speed
from course_lib.lab.training import Recipe, cross_entropy, fit

ROUNDS = 9
BY_HAND = 1.5
"""How many times as long as arithmetic written out by hand, or torch's own, ours may take at most."""


def by_hand(a: nn.Module, b: nn.Module) -> nn.Module:
    """The mean of two networks as most scripts have it."""
    made, theirs = copy.deepcopy(a), b.state_dict()
    mean = {k: (v + theirs[k]) / 2 if v.is_floating_point() else v for k, v in a.state_dict().items()}
    made.load_state_dict(mean)
    return made


def step(model: nn.Module, optimizer: SGD, x: Tensor, y: Tensor, after: Callable[[], None]) -> None:
    optimizer.zero_grad()
    cross_entropy(model, x, y).backward()
    optimizer.step()
    after()


def one_backward_pass_each(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    total = [torch.zeros_like(p) for p in model.parameters()]
    for one, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(cross_entropy(model, one[None], label[None]), [*model.parameters()])
        for mine, g in zip(total, gradients, strict=True):
            mine.add_(g.square())
    return total


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data: Dataset = load("glyphs", classes="digits", size=16, train_size=256, val_size=10, test_size=10)
    x, y = next(batches(data.train, 64))
    wide = [resnet((1, 16, 16), 10, width=32) for _ in range(2)]
    missed = line("average / by hand", partial(by_hand, *wide), partial(merging.average, wide), BY_HAND)

    net = convnet((1, 16, 16), 10, width=16)
    model = merging.EMA(net, decay=0.99)
    torchs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    model.update()
    torchs.update_parameters(net)
    missed += line("EMA: update / torch's", partial(torchs.update_parameters, net), model.update, BY_HAND)
    sgd = SGD(net.parameters(), lr=0.0)
    plain, followed = (partial(step, net, sgd, x, y, after) for after in (lambda: None, model.update))
    missed += line("EMA: a step / a plain one", plain, followed, 1.2)
    seen = [part for part, _ in batches(data.train, 64)]
    ours = partial(merging.refresh_batch_norm, net, data.train, batch_size=64)
    missed += line("refreshed batch norm / torch's", partial(update_bn, seen, net), ours, BY_HAND)

    net.eval()
    part = data.train.subset(torch.arange(64))
    loop, batched = partial(one_backward_pass_each, net, x, y), partial(merging.empirical_fisher, net, part)
    missed += line("Fisher: ours / pass by pass", loop, batched, 0.7)
    epoch = partial(fit, copy.deepcopy(net), data, Recipe(epochs=1, optimizer=partial(SGD, lr=0.0)), seed=0)
    others = [convnet((1, 16, 16), 10, width=16) for _ in range(2)]
    matched = partial(merging.match_weights, *others, generator=torch.Generator())
    missed += line("match_weights / 256 examples", epoch, matched, 2.0)

    four = [mlp((1, 16, 16), 10, width=64) for _ in range(4)]
    joint = merging.join(four)
    missed += line("joined / four in turn", lambda: [network(x) for network in four], partial(joint, x), 1.2)
    dense, many = mlp((1, 16, 16), 10, width=512), torch.randn(256, 1, 16, 16)
    sparse = merging.upcycle(dense, "hidden", 4, generator=torch.Generator(), top_k=1)
    missed += line("1 of 4 experts / dense", partial(dense, many), partial(sparse, many), 2.5)

    recipe = Recipe(epochs=1, batch_size=32)
    more = load("glyphs", classes="digits", size=16, train_size=1024, val_size=10, test_size=10)
    clients = merging.split_evenly(more, 4, generator=torch.Generator())
    central = partial(fit, mlp((1, 16, 16), 10), more, recipe, seed=0)
    rounds = partial(merging.federated_averaging, partial(mlp, (1, 16, 16), 10), clients, replace(recipe), 1, seed=0)
    missed += line("a federated round / an epoch", central, rounds, 2.0)
    torch.set_num_threads(threads)
    return missed


def line(name: str, plain: Callable[[], object], other: Callable[[], object], target: float) -> bool:
    speed = compare_speed(other, plain, rounds=ROUNDS, device="cpu")
    bad = speed.ratio > target
    verdict = "TOO SLOW" if bad else "ok"
    times = f"{speed.a.median * 1e3:.2f} ms against {speed.b.median * 1e3:.2f} ms"
    print(f"{name + ':':32} {speed.ratio:6.2f}x (target <= {target:g}x) {verdict:8}  {times}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
