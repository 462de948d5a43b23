"""What a teacher costs a step: ``python -m tests.benchmarks.bench_distillation``. One thread, measured in turns.

A step is forward pass, backward pass and SGD on a batch of 64 images. The student is a convnet, its teacher one of
twice the width, whose forward pass alone takes about as long as a step of the student: most of what distillation costs
is that. Each ratio is a step with the objective over a plain one; over soft targets written out by hand; over the same
with what the teacher says looked up; and two objectives on one teacher over one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from course_lib import distillation as kd
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet
from course_lib.lab.timing import compare_speed
from course_lib.lab.training import Objective, cross_entropy

ROUNDS = 9
AT = {"features.4": "features.4"}
ROWS = {"embedding": "embedding"}
BY_HAND = 1.15
"""How many times as long as soft targets written out by hand ours may take at most."""
LOOKED_UP = 0.8
TWO = 1.35
"""Soft targets within attention transfer over soft targets alone: student and teacher run once in both."""


def step(model: nn.Module, optimizer: SGD, objective: Objective, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    objective(model, x, y).backward()
    optimizer.step()


def stepping(model: nn.Module, objective: Objective, x: Tensor, y: Tensor) -> Callable[[], None]:
    # a rate of 0, so that the thousandth step is of the network that the first was of
    return partial(step, model.train(), SGD(model.parameters(), lr=0.0), objective, x, y)


def by_hand(model: nn.Module, x: Tensor, y: Tensor, *, teacher: nn.Module) -> Tensor:
    """As most training scripts have it."""
    logits = model(x)
    with torch.no_grad():
        taught = teacher(x)
    soft = F.kl_div(F.log_softmax(logits / 4, 1), F.log_softmax(taught / 4, 1), log_target=True, reduction="batchmean")
    return 0.1 * F.cross_entropy(logits, y) + 0.9 * 16 * soft


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data: Dataset = load("glyphs", classes="digits", size=16, train_size=64, val_size=10, test_size=10)
    x, y = torch.randn(64, 1, 16, 16), data.train.labels
    teacher = kd.frozen(convnet((1, 16, 16), 10, width=16))
    _, cache = kd.cached(teacher, data)

    def student() -> nn.Module:
        return convnet((1, 16, 16), 10, width=8)

    plain = stepping(student(), cross_entropy, x, y)
    soft = partial(kd.soft_targets, teacher=teacher)
    ours = stepping(student(), soft, x, y)
    hinted = kd.with_connectors(student(), kd.connectors(student(), teacher, AT, x))
    projected = kd.with_projections(student(), teacher, ROWS, x)
    objectives: dict[str, tuple[nn.Module, Objective, float]] = {
        "soft targets": (student(), soft, 3.0),
        "decoupled": (student(), partial(kd.decoupled, teacher=teacher), 3.0),
        "standardized": (student(), partial(kd.standardized, teacher=teacher), 3.0),
        "hints": (hinted, partial(kd.hints, teacher=teacher, at=AT), 3.5),
        "attention transfer": (student(), partial(kd.attention_transfer, teacher=teacher, at=AT), 3.0),
        "similarity preserving": (student(), partial(kd.similarity_preserving, teacher=teacher, at=ROWS), 3.0),
        "relational": (student(), partial(kd.relational, teacher=teacher, at=ROWS), 5.0),
        "contrastive": (projected, partial(kd.contrastive, teacher=teacher, at=ROWS), 3.0),
        "mutual, two students": (kd.Cohort([student(), student()]), kd.mutual, 2.5),
        "self-distillation": (kd.WithExits(student(), ["features.2", "features.6"], x), kd.self_distillation, 1.6),
    }
    missed = 0
    for name, (model, objective, target) in objectives.items():
        missed += line(name, plain, stepping(model, objective, x, y), target)
    missed += line("soft: ours / by hand", stepping(student(), partial(by_hand, teacher=teacher), x, y), ours, BY_HAND)
    looked_up = cache.objective(partial(kd.soft_targets, teacher=cache))
    missed += line("soft: looked up / live", ours, stepping(student(), looked_up, x, torch.arange(64)), LOOKED_UP)
    both = partial(kd.attention_transfer, teacher=teacher, at=AT, objective=soft)
    missed += line("two objectives / one", ours, stepping(student(), both, x, y), TWO)
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
