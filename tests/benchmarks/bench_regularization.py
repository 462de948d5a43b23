"""What regularization costs a step: ``python -m tests.benchmarks.bench_regularization``. One thread, measured in turns.

A step is forward pass, backward pass and SGD on a batch of 64 images, of an MLP and of a convnet; each ratio is a
regularised step over a plain one. Passes count: R-Drop takes two of each kind, virtual adversarial training three
forward and two backward, the exact Jacobian one backward a class and all of them again to be differentiated. Then our
layers against their namesakes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD

from course_lib import regularization as reg
from course_lib.lab.models import convnet, mlp
from course_lib.lab.timing import compare_speed
from course_lib.lab.training import Objective, cross_entropy

from torchvision import ops  # isort: skip  # course_lib mends its import where torch is a CPU-only build

ROUNDS = 9
MODELS = {"mlp": mlp, "convnet": convnet}
OBJECTIVES: dict[str, tuple[Objective, float, float]] = {
    "label smoothing": (reg.label_smoothing, 1.7, 1.3),
    "confidence penalty": (reg.confidence_penalty, 1.9, 1.3),
    "L1": (partial(reg.l1, strength=1e-4), 1.9, 1.3),
    "soft orthogonality": (partial(reg.soft_orthogonality, strength=1e-4), 3.5, 1.5),
    "input noise": (partial(reg.input_noise, std=0.1), 1.5, 1.3),
    "weight noise": (partial(reg.weight_noise, std=0.01), 3.0, 1.5),
    "R-Drop": (partial(reg.r_drop, alpha=1.0), 3.0, 2.5),
    "virtual adversarial": (partial(reg.virtual_adversarial, eps=1.0), 7.0, 4.0),
    "gradient penalty": (partial(reg.gradient_penalty, strength=0.1), 6.0, 4.0),
    "projected Jacobian": (partial(reg.projected_jacobian_penalty, strength=0.1), 6.0, 4.0),
    "exact Jacobian": (partial(reg.jacobian_penalty, strength=0.1), 40.0, 25.0),
}
"""How many times as long a step may take at most, of the MLP and of the convnet.

The MLP's step is half a millisecond of calls: there each call counts, and it is passes that count in the convnet.
"""
NETWORKS: dict[str, tuple[Callable[[nn.Module], nn.Module], float, float]] = {
    "dropout": (partial(reg.with_dropout, p=0.5), 2.0, 2.2),
    "spectral norm": (reg.with_spectral_norm, 2.5, 1.5),
    "layer norm": (partial(reg.with_norm, kind="layer"), 1.8, 1.3),
}
LAYERS = 1.6
"""How many times as long as its namesake one of our layers may take at most."""
PROXIMAL = 1.6


def step(model: nn.Module, optimizer: SGD, objective: Objective, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    objective(model, x, y).backward()
    optimizer.step()


def stepping(model: nn.Module, objective: Objective, x: Tensor, y: Tensor) -> Callable[[], None]:
    # a rate of 0, so that the thousandth step is of the network that the first was of
    return partial(step, model.train(), SGD(model.parameters(), lr=0.0), objective, x, y)


def main() -> int:
    """Print one line a ratio beside its target; return how many were missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    missed = 0
    for place, (name, make) in enumerate(MODELS.items()):
        plain = stepping(make((1, 8, 8), 10), cross_entropy, x, y)
        for what, (objective, *targets) in OBJECTIVES.items():
            regularised = stepping(make((1, 8, 8), 10), objective, x, y)
            missed += line(f"{name}: {what}", plain, regularised, targets[place])
        for what, (change, *targets) in NETWORKS.items():
            regularised = stepping(change(make((1, 8, 8), 10)), cross_entropy, x, y)
            missed += line(f"{name}: {what}", plain, regularised, targets[place])
        shrunk = make((1, 8, 8), 10)
        sgd = SGD(shrunk.parameters(), lr=1e-9)
        sgd.register_step_post_hook(lambda optimizer, *_: proximal(optimizer))
        missed += line(f"{name}: proximal L1", plain, partial(step, shrunk.train(), sgd, cross_entropy, x, y), PROXIMAL)

    images = torch.randn(64, 32, 16, 16)
    pairs = {
        "dropout": (nn.Dropout(0.5), reg.Dropout(0.5)),
        "dropout2d": (nn.Dropout2d(0.5), reg.Dropout2d(0.5)),
        "drop block": (ops.DropBlock2d(0.1, 3), reg.DropBlock2d(0.1, 3)),
        "stochastic depth": (ops.StochasticDepth(0.5, "row"), reg.StochasticDepth(0.5)),
    }
    for what, (theirs, ours) in pairs.items():
        missed += line(f"{what}: ours / theirs", partial(theirs, images), partial(ours, images), LAYERS)
    theirs = parametrizations.spectral_norm(nn.Linear(256, 256))
    ours = reg.spectral_norm(nn.Linear(256, 256))
    row = torch.randn(1, 256)
    missed += line("spectral norm: ours / theirs", partial(theirs, row), partial(ours, row), LAYERS)
    torch.set_num_threads(threads)
    return missed


def proximal(optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for group in optimizer.param_groups:
            for w in reg.weights_of(group["params"]):
                w.copy_(reg.prox_l1(w, group["lr"], strength=1e-4))


def line(name: str, plain: Callable[[], object], other: Callable[[], object], target: float) -> bool:
    speed = compare_speed(other, plain, rounds=ROUNDS, device="cpu")
    bad = speed.ratio > target
    verdict = "TOO SLOW" if bad else "ok"
    times = f"{speed.a.median * 1e3:.2f} ms against {speed.b.median * 1e3:.2f} ms"
    print(f"{name + ':':32} {speed.ratio:6.2f}x (target <= {target:g}x) {verdict:8}  {times}", flush=True)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
