"""What stopping costs: ``python -m tests.benchmarks.bench_early_stopping``. One thread, all pairs measured in turns.

What is asked at each validation against an epoch of training: criteria, the evidence on all examples or on some, a
forecast. Then per-example gradients by ``vmap`` against one backward pass an example, and gradient descent in closed
form against its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import SGD

from course_lib import early_stopping as es
from course_lib.lab.data import Split, batches, load
from course_lib.lab.models import mlp
from course_lib.lab.timing import compare_speed
from course_lib.lab.training import History

ROUNDS = 9
ROWS = 200
OF_AN_EPOCH = {
    "patience": 0.01,
    "patience, smoothed": 0.01,
    "GL": 0.01,
    "PQ": 0.01,
    "UP": 0.01,
    "all of these": 0.03,
    "evidence, all": 20.0,
    "evidence, a tenth": 3.5,
    "forecast": 4.0,
}
"""How many epochs of the MLP on 1,000 digits (16 steps, a hundredth of a second) each may cost at most.

The evidence takes a gradient of 26,122 numbers for each example where training takes one for 64: it may be asked of a
sample, and seldom.
"""
PER_EXAMPLE = 2.5
"""How many times as long one backward pass an example should take at least."""
CLOSED_FORM = 10.0
"""How many times as long 1,000 steps of gradient descent should take at least."""


def history() -> History:
    rising = [1 + abs(t - ROWS / 2) / ROWS for t in range(ROWS)]
    return es.as_history({"val_loss": rising, "train_loss": rising, "val_accuracy": [1 - v / 2 for v in rising]})


def epoch(model: torch.nn.Module, sgd: SGD, split: Split) -> None:
    for x, y in batches(split, 64):
        sgd.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        sgd.step()


def one_by_one(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    weights = list(model.parameters())
    rows = []
    for i in range(len(y)):
        found = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), weights)
        rows.append(torch.cat([g.flatten() for g in found]))
    gradients = torch.stack(rows)
    return es.evidence_of(gradients.mean(0), gradients.var(0), len(y))


def descend(X: Tensor, y: Tensor, lr: float, steps: int) -> Tensor:
    w = torch.zeros(X.shape[1], dtype=X.dtype)
    for _ in range(steps):
        w = w - lr / len(X) * (X.mT @ (X @ w - y))
    return w


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load("digits", train_size=1000)
    model, seen = mlp((1, 8, 8), 10), history()
    training = partial(epoch, model, SGD(model.parameters(), lr=1e-9), data.train)
    tenth = data.train.subset(torch.arange(100))
    criteria: dict[str, es.Criterion] = {
        "patience": es.Patience(5),
        "patience, smoothed": es.Patience(5, smoothing=0.9),
        "GL": es.GeneralizationLoss(500.0),
        "PQ": es.ProgressQuotient(500.0),
        "UP": es.SuccessiveIncreases(50),
    }
    asked: dict[str, Callable[[], object]] = {name: partial(c, seen) for name, c in criteria.items()}
    asked["all of these"] = partial(es.all_of(*criteria.values()), seen)
    asked["evidence, all"] = partial(es.evidence, model, data.train)
    asked["evidence, a tenth"] = partial(es.evidence, model, tenth)
    asked["forecast"] = partial(es.will_it_beat, seen["val_accuracy"][:20], 0.9, 50)
    missed = 0
    for name, work in asked.items():
        missed += at_most(name, work, training, OF_AN_EPOCH[name])

    x, y = next(batches(data.train, 256))
    missed += at_least(
        "evidence by vmap", partial(es.evidence, model, (x, y)), partial(one_by_one, model, x, y), PER_EXAMPLE
    )
    X = torch.randn(200, 50, dtype=torch.float64) / 2
    targets = X.sum(1)
    closed = partial(es.gd_solution, X, targets, 0.1, 1000)
    missed += at_least("1,000 steps at once", closed, partial(descend, X, targets, 0.1, 1000), CLOSED_FORM)
    torch.set_num_threads(threads)
    return missed


def at_most(name: str, work: Callable[[], object], training: Callable[[], object], target: float) -> bool:
    speed = compare_speed(work, training, rounds=ROUNDS, device="cpu")
    bad = speed.ratio > target
    times = f"{speed.a.median * 1e3:.3f} ms against {speed.b.median * 1e3:.1f} ms"
    verdict = "TOO SLOW" if bad else "ok"
    print(f"{name + ' / epoch:':28} {speed.ratio:8.4f}x (target <= {target:g}x) {verdict:8}  {times}", flush=True)
    return bad


def at_least(name: str, ours: Callable[[], object], plain: Callable[[], object], target: float) -> bool:
    speed = compare_speed(plain, ours, rounds=ROUNDS, device="cpu")
    bad = speed.ratio < target
    times = f"{speed.a.median * 1e3:.2f} ms against {speed.b.median * 1e3:.2f} ms"
    verdict = "TOO SLOW" if bad else "ok"
    print(f"{name + ':':28} {speed.ratio:8.2f}x (target >= {target:g}x) {verdict:8}  {times}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
