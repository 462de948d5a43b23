"""Chapter 3's study: which schedule, when the run is short, long, or of unknown length, on real images?

Seven schedules, each with its own peak, chosen among four rates a factor of about three apart, with two seeds, on the
validation split; and that at each of three budgets. The best peak of each is then trained with five other seeds and
measured on the test split. CIFAR-10 with 10,000 labels, SGD with momentum 0.9, batches of 100, float32.

Then the question of the unknown length: one rate for all, and the test accuracy read at each of the three budgets
within *one* run, as if it had been stopped there. A run that goes down at its end is made for each of them.

Four further parts need many runs rather than large ones. They are on drawn digits, of which any number can be made:
6,000 to train on, one pass in batches of 20 (300 steps) unless it is said otherwise, an MLP of width 64.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from course_lib import schedules
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.studies import Part, Study, Tuned
from course_lib.lab.training import Diverged, Recipe, evaluate, fit, fresh
from course_lib.studies import cifar10

TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)
BUDGETS = (2, 5, 15)  # epochs of 100 steps
RATES = (0.03, 0.1, 0.3, 1.0)
FREE_RATES = (0.3, 1.0, 3.0, 10.0)  # the rate of a schedule-free run is that of SGD without momentum
ONE_RATE, ONE_FREE_RATE = 0.2, 2.0

SHAPES: dict[str, schedules.Schedule] = {
    "constant": schedules.schedule(schedules.flat),
    "steps down": schedules.schedule(schedules.multi_step, milestones=(0.5, 0.75)),
    "cosine": schedules.schedule(schedules.cosine),
    "line to zero": schedules.schedule(schedules.polynomial),
    "one-cycle": schedules.schedule(schedules.one_cycle),
    "stable, then decay": schedules.schedule(schedules.warm_up_stable_decay),
}

STOPPED: dict[str, tuple[schedules.Schedule | None, float | None]] = {
    "constant": (None, None),
    "cosine for 15": (schedules.schedule(schedules.cosine), None),
    "constant, averaged": (None, 0.99),
}


def small_cifar10() -> Dataset:
    """10,000 labels."""
    return cifar10(10_000)


def network() -> nn.Module:
    """A convolutional network of 8, 16 and 32 channels."""
    return convnet((3, 32, 32), 10, width=8)


def recipe(epochs: int, lr: float, shape: schedules.Schedule | None) -> Recipe:
    """SGD with momentum."""
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    return Recipe(epochs=epochs, batch_size=100, optimizer=optimizer, schedule=shape, validate_every=epochs)


def schedule_free(epochs: int, lr: float) -> Recipe:
    """The same without a schedule; its momentum is the weight of the average in the point of the gradient."""
    optimizer = partial(schedules.ScheduleFreeSGD, lr=lr, momentum=0.9, warmup_steps=10)
    return Recipe(epochs=epochs, batch_size=100, optimizer=optimizer, validate_every=epochs)


def at_budget(epochs: int) -> Part:
    """Every schedule for so many epochs, each with its own peak."""
    arms = {
        name: Tuned({f"peak {lr:g}": recipe(epochs, lr, shape) for lr in RATES}, TUNING)
        for name, shape in SHAPES.items()
    }
    arms["schedule-free"] = Tuned({f"rate {lr:g}": schedule_free(epochs, lr) for lr in FREE_RATES}, TUNING)
    return Part(f"Convnet on CIFAR-10, 10,000 labels, {epochs} epochs", small_cifar10, arms, SEEDS, network)


def accuracies(data: Dataset, seed: int, made: Recipe) -> dict[str, float]:
    """The test accuracy after each number of epochs in ``BUDGETS`` that the run reaches."""
    watched = {"test_accuracy": lambda model, data: evaluate(model, data.test).accuracy}
    made = replace(made, validate_every=1, watch=watched)
    history = fit(fresh(network, made, seed=seed), data, made, seed=seed, progress=False)
    return {str(epochs): history["test_accuracy"][epochs - 1] for epochs in BUDGETS if epochs <= made.epochs}


def read_early(data: Dataset, seed: int, *, name: str) -> dict[str, float]:
    """One long run, read at each budget."""
    shape, ema = STOPPED[name]
    made = recipe(BUDGETS[-1], ONE_RATE, shape)
    return accuracies(data, seed, replace(made, ema=ema))


def read_early_free(data: Dataset, seed: int) -> dict[str, float]:
    """One long run without a schedule, read at each budget."""
    return accuracies(data, seed, schedule_free(BUDGETS[-1], ONE_FREE_RATE))


def decayed_for_each(data: Dataset, seed: int) -> dict[str, float]:
    """A constant rate, and for each budget a way down over its last fifth: up to there the runs are one."""
    found = {}
    for epochs in BUDGETS:
        run = recipe(epochs, ONE_RATE, schedules.schedule(schedules.stable_decay))
        found[str(epochs)] = accuracies(data, seed, run)[str(epochs)]
    return found


# --- On drawn digits --------------------------------------------------------------------------------------------------

DIGITS = (1, 16, 16)
PEAKS = (0.003, 0.01, 0.03, 0.06, 0.1)  # of Adam
WARMUPS = (0, 10, 30, 100)  # steps of 300
NOISE = {20: 1, 60: 3, 200: 10, 600: 30}  # the batch size, and the epochs that make 300 steps of it
NOISE_RATES = (0.02, 0.05, 0.1, 0.2)
SWEEP = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
WIDTHS, WIDTH_RATES = (64, 128, 256, 512, 1024), (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)


def glyphs() -> Dataset:
    """6,000 digits to train on, 1,000 to choose by, 5,000 to test on."""
    return load(
        "glyphs", classes="digits", size=16, difficulty=0.5, train_size=6000, val_size=1000, test_size=5000
    )  # fmt: skip


def small_mlp() -> nn.Module:
    """Two hidden layers of width 64."""
    return mlp(DIGITS, 10, width=64)


def digits_recipe(lr: float, shape: schedules.Schedule | None, *, epochs: int = 1, batch_size: int = 20) -> Recipe:
    """SGD with momentum, 300 steps."""
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    return Recipe(
        epochs=epochs, batch_size=batch_size, optimizer=optimizer, schedule=shape, precision="float64",
        validate_every=epochs,
    )  # fmt: skip


def scores(data: Dataset, seed: int, made: Recipe) -> tuple[float, float]:
    """Accuracy on validation and on test; one that says nothing where the run diverged."""
    network = fresh(small_mlp, made, seed=seed)
    try:
        fit(network, data, made, seed=seed, progress=False)
    except Diverged:
        return 1 / 10, 1 / 10
    return evaluate(network, data.val).accuracy, evaluate(network, data.test).accuracy


def over_peaks(data: Dataset, seed: int, *, warmup: int) -> dict[str, float]:
    """Adam, up in ``warmup`` steps and down along a cosine, to each of ``PEAKS``."""
    shape = schedules.schedule(schedules.warm_up, warmup=warmup, then=schedules.cosine)
    plain = digits_recipe(0.1, shape)
    adam = {peak: replace(plain, optimizer=partial(torch.optim.Adam, lr=peak)) for peak in PEAKS}
    return {f"{peak:g}": scores(data, seed, made)[1] for peak, made in adam.items()}


def over_noise(data: Dataset, seed: int, *, shape: schedules.Schedule) -> dict[str, float]:
    """300 steps of each batch size, the rate chosen on the validation split by a run of another seed."""
    found = {}
    for size, epochs in NOISE.items():
        makes = {lr: digits_recipe(lr, shape, epochs=epochs, batch_size=size) for lr in NOISE_RATES}
        best = max(makes.values(), key=lambda made: scores(data, seed + 100, made)[0])
        found[str(size)] = scores(data, seed, best)[1]
    return found


def over_rates(data: Dataset, seed: int, *, shape: schedules.Schedule) -> dict[str, float]:
    """One schedule at each peak in ``SWEEP``."""
    return {f"{lr:g}": scores(data, seed, digits_recipe(lr, shape))[1] for lr in SWEEP}


def over_free_rates(data: Dataset, seed: int) -> dict[str, float]:
    """Schedule-free SGD at ten times these rates, which is what a momentum of 0.9 makes of them."""
    found = {}
    for lr in SWEEP:
        free = partial(schedules.ScheduleFreeSGD, lr=10 * lr, warmup_steps=15)
        found[f"{lr:g}"] = scores(data, seed, replace(digits_recipe(lr, None), optimizer=free))[1]
    return found


def over_widths(data: Dataset, seed: int, *, width: int, mup: bool) -> dict[str, float]:
    """Adam with each of ``WIDTH_RATES``, batches of 50, a line to zero; muP with width 64 as its base."""
    usual = partial(mlp, DIGITS, 10, width=width)
    make = partial(schedules.mup_mlp, DIGITS, 10, width=width, base_width=WIDTHS[0]) if mup else usual
    found = {}
    for lr in WIDTH_RATES:
        adam = partial(torch.optim.Adam, lr=lr)
        made = Recipe(
            epochs=1,
            batch_size=50,
            optimizer=schedules.with_layer_rates(adam, schedules.mup_adam(make())) if mup else adam,
            schedule=schedules.schedule(schedules.polynomial),
        )
        network = fresh(make, made, seed=seed)
        fit(network, data, made, seed=seed, progress=False)
        found[f"{lr:g}"] = evaluate(network, data.test).accuracy
    return found


LINE = SHAPES["line to zero"]

ON_DIGITS = {
    "warmup": Part(
        "Adam, MLP on drawn digits: warm-up against peak",
        glyphs,
        {f"{warmup} steps": partial(over_peaks, warmup=warmup) for warmup in WARMUPS},
        SEEDS,
    ),
    "noise": Part(
        "MLP on drawn digits, 300 steps of 20, 60, 200 or 600 examples",
        glyphs,
        {"constant": partial(over_noise, shape=SHAPES["constant"]), "line to zero": partial(over_noise, shape=LINE)},
        SEEDS,
    ),
    "sensitivity": Part(
        "MLP on drawn digits, every schedule at six peaks",
        glyphs,
        {name: partial(over_rates, shape=shape) for name, shape in SHAPES.items()} | {"schedule-free": over_free_rates},
        SEEDS,
    ),
    "width": Part(
        "Adam, MLPs of five widths on drawn digits, usual and in muP",
        glyphs,
        {
            f"{name}, {width}": partial(over_widths, width=width, mup=name == "muP")
            for name in ("usual", "muP")
            for width in WIDTHS
        },
        SEEDS,
    ),
}


STUDY = Study(
    "03",
    "Which schedule, when the run is short, long, or of unknown length?",
    {f"epochs_{epochs}": at_budget(epochs) for epochs in BUDGETS}
    | {
        "stopped": Part(
            "Convnet on CIFAR-10, 10,000 labels, stopped after 2, 5 or 15 epochs",
            small_cifar10,
            {name: partial(read_early, name=name) for name in STOPPED}
            | {"schedule-free": read_early_free, "constant, then decay": decayed_for_each},
            SEEDS,
        ),
    }
    | ON_DIGITS,
)
