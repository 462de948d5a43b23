"""Chapter 4's study: how many steps, and how many examples, does each batch size need to reach a loss on MNIST?

An MLP of width 128 on 20,000 labels, nine batch sizes from 8 to 2,048. At each of them all rates a factor of two apart
are tried, from the middle of the range outwards, until the runs at both ends are hopeless; for each rate the steps are
recorded at which the loss on 2,000 other images fell to 0.5, 0.3 and 0.2. Seven seeds: the first two are there to
choose a rate by, the other five to be reported. SGD with momentum 0.9 and Adam, constant rates, float32.

Beside it the noise scale along a run of batches of 64, and the accuracy on test images after equal epochs and after
equal steps, each batch size at the best of its rates, on 5,000 labels and with a rate that falls to zero.
"""

import math
from functools import partial

import torch
from torch import nn

from course_lib import batching, schedules
from course_lib.lab.data import Dataset, Split, batches
from course_lib.lab.models import mlp
from course_lib.lab.studies import Arm, Part, Study, Tuned
from course_lib.lab.training import Recipe, cross_entropy, evaluate
from course_lib.studies import mnist

CHOOSING, REPORTED = (100, 101), (0, 1, 2, 3, 4)
SIZES = tuple(2**k for k in range(3, 12))
TARGETS = (0.5, 0.3, 0.2)
LADDERS = {"momentum": tuple(0.0025 * 2**k for k in range(10)), "Adam": tuple(0.00025 * 2**k for k in range(9))}
HOPELESS = 1.5
"""A rate is given up when it has taken so many times the steps of the best so far."""
SHORTEST, LONGEST, MOST_EXAMPLES = 10, 6000, 800_000


def labels_20000() -> Dataset:
    """20,000 labels, the loss is read on 2,000 others."""
    return mnist(20_000, 2000)


def labels_5000() -> Dataset:
    """5,000 labels."""
    return mnist(5000)


def network() -> nn.Module:
    """Two hidden layers of width 128."""
    return mlp((1, 28, 28), 10, width=128)


def optimizer_of(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam."""
    if name == "momentum":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return torch.optim.Adam(model.parameters(), lr=lr)


def run(
    data: Dataset, seed: int, name: str, size: int, lr: float, most: float, looked_at: dict[float, float] | None = None
) -> dict[float, float]:
    """The steps to each target; infinite where there were ``most`` steps before. ``looked_at`` takes the noise scales.

    The loss is read every 4% of the steps done, and the step is interpolated between two readings.
    """
    torch.manual_seed(seed)
    model, generator = network(), torch.Generator().manual_seed(seed)
    optimizer, found = optimizer_of(name, model, lr), dict.fromkeys(TARGETS, math.inf)
    step, due, before = 0, SHORTEST, (0, math.log(10))
    while step < most:
        for x, y in batches(data.train, size, generator=generator):
            if len(y) < size:
                continue  # the last one of a pass: its gradient would be another's
            optimizer.zero_grad()
            cross_entropy(model, x, y).backward()
            optimizer.step()
            step += 1
            if step < due and step < most:
                continue
            due = max(step + 1, round(1.04 * step))
            loss = evaluate(model, data.val).loss
            if not math.isfinite(loss):
                return found
            for target in TARGETS:
                if found[target] == math.inf and loss <= target:
                    share = (before[1] - target) / (before[1] - loss) if before[1] > loss else 1.0
                    found[target] = before[0] + min(max(share, 0.0), 1.0) * (step - before[0])
                    if looked_at is not None:
                        looked_at[target] = noise_scale(model, data.train)
            if found[TARGETS[-1]] < math.inf or step >= most:
                return found
            before = (step, loss)
    return found


def noise_scale(model: nn.Module, split: Split) -> float:
    """The simple noise scale on 5,000 examples."""
    return batching.simple_noise_scale(batching.gradient_statistics(model, split.subset(torch.arange(5000))))


def over_rates(data: Dataset, seed: int, *, name: str, size: int) -> dict[str, float]:
    """The steps to each target at each rate, as ``"0.3 at 0.02"``: from a rate in the middle, up and then down."""
    ladder = LADDERS[name]
    found = {lr: dict.fromkeys(TARGETS, math.inf) for lr in ladder}
    middle = min(range(len(ladder)), key=lambda k: abs(math.log(ladder[k] / (ladder[2] * (size / 8) ** 0.5))))
    best, longest = math.inf, min(LONGEST, MOST_EXAMPLES // size)
    for way in (range(middle, len(ladder)), range(middle - 1, -1, -1)):
        for k in way:
            found[ladder[k]] = run(data, seed, name, size, ladder[k], min(longest, HOPELESS * best))
            steps = found[ladder[k]][TARGETS[-1]]
            best = min(best, steps)
            if steps == math.inf and (best < math.inf or k > middle):
                break
    return {f"{target:g} at {lr:g}": found[lr][target] for lr in ladder for target in TARGETS}


def along_a_run(data: Dataset, seed: int, *, lr: float) -> dict[str, float]:
    """The noise scale when each target is reached, batches of 64."""
    scales: dict[float, float] = {}
    run(data, seed, "momentum", 64, lr, LONGEST, scales)
    return {f"{target:g}": scales[target] for target in TARGETS}


# --- At equal epochs, at equal steps ----------------------------------------------------------------------------------

GAP_SIZES = (16, 64, 256, 1024, 5000)
GAP_RATES = {16: 0.01, 64: 0.02, 256: 0.05, 1024: 0.1, 5000: 0.1}  # the lowest of five, a factor of two apart
EPOCHS, STEPS = 16, 600


def with_rates(size: int, epochs: int) -> Tuned:
    """One batch size, five rates."""
    rates = [GAP_RATES[size] * 2**k for k in range(5)]
    recipes = {
        f"lr {lr:g}": Recipe(
            epochs=epochs,
            batch_size=size,
            optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
            schedule=schedules.schedule(schedules.polynomial),
            validate_every=epochs,
        )
        for lr in rates
    }
    return Tuned(recipes, CHOOSING)


def to_target(name: str) -> Part:
    """Every batch size at every rate, with one optimizer."""
    arms: dict[str, Arm] = {f"{name}, {size}": partial(over_rates, name=name, size=size) for size in SIZES}
    title = f"{name}, MLP on MNIST, 20,000 labels: steps to a loss, every batch size at every rate"
    return Part(title, labels_20000, arms, (*CHOOSING, *REPORTED))


STUDY = Study(
    "04",
    "How many steps and how many examples does each batch size need?",
    {
        "momentum": to_target("momentum"),
        "Adam": to_target("Adam"),
        "noise_scale": Part(
            "MLP on MNIST, 20,000 labels: noise scale along a run of batches of 64",
            labels_20000,
            {f"lr {lr:g}": partial(along_a_run, lr=lr) for lr in (0.02, 0.08)},
            REPORTED,
        ),
        "equal_epochs": Part(
            f"MLP on MNIST, 5,000 labels, {EPOCHS} epochs",
            labels_5000,
            {str(size): with_rates(size, EPOCHS) for size in GAP_SIZES},
            REPORTED,
            network,
        ),
        "equal_steps": Part(
            f"MLP on MNIST, 5,000 labels, about {STEPS} steps",
            labels_5000,
            {str(size): with_rates(size, max(1, round(STEPS / math.ceil(5000 / size)))) for size in GAP_SIZES},
            REPORTED,
            network,
        ),
    },
)
