"""Chapter 6's study: what does each stopping criterion cost and save, and which runs should never have gone so far?

A criterion sees nothing but the history of a run. So runs are trained once, to the end, watched all the way, and kept
as curves; any number of criteria are asked afterwards, all on the same runs.

"mnist" and "cifar10": fifty runs, five recipes with five seeds each, 500 labels of MNIST and 2,000 of CIFAR-10, 40
epochs. Some overfit early, some late, one hardly at all within its budget. Each is validated after every epoch on 1,000
images, on the first 100 of them, and on the test split, and the evidence-based criterion is measured beside.

"descent": 600 drawn digits, with right labels and with three in ten wrong, at a rate at which the test error falls,
rises and falls again.

"search": sixty settings drawn at random for 1,000 drawn digits, each trained for 27 epochs with five seeds: the curves
that rules which stop whole runs are compared on.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from course_lib import early_stopping as stopping
from course_lib import regularization as reg
from course_lib import schedules
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import mlp
from course_lib.lab.studies import Arm, Part, Study
from course_lib.lab.training import Diverged, History, Recipe, evaluate, fit, fresh
from course_lib.studies import cifar10, mnist

SEEDS = (0, 1, 2, 3, 4)
EPOCHS, SMALL = 40, 100
CONFIGS, SEARCH_EPOCHS = 60, 27
TESTED_IMAGES = 2000
EVIDENCE_EXAMPLES = 200

Curves = dict[str, float | list[float]]


def mnist_500() -> Dataset:
    """500 labels; test on the first 2,000 images: there is a test after every epoch."""
    return _shorter_test(mnist(500))


def cifar10_2000() -> Dataset:
    """2,000 labels; test on 2,000 images."""
    return _shorter_test(cifar10(2000))


def _shorter_test(data: Dataset) -> Dataset:
    # The folder's images lie in the order of their classes
    chosen = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[:TESTED_IMAGES]
    return replace(data, test=data.test.subset(chosen))


def digits(count: int) -> Dataset:
    """Drawn digits; 1,000 to validate and 5,000 to test."""
    return load(
        "glyphs", classes="digits", size=16, difficulty=0.5, train_size=count, val_size=1000, test_size=5000
    )  # fmt: skip


def convolutional() -> nn.Module:
    """Two convolutions with a stride of 2 and a dense layer, ``[N, 3, 32, 32] -> [N, 10]``."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def dense() -> nn.Module:
    """Two hidden layers of 128, ``[N, 1, 28, 28] -> [N, 10]``."""
    return mlp((1, 28, 28), 10, width=128)


def of_small_split(model: nn.Module, data: Dataset, what: str) -> float:
    """Loss or accuracy on the first images of the validation split."""
    return float(getattr(evaluate(model, data.val.subset(torch.arange(SMALL))), what))


WATCH: dict[str, Callable[[nn.Module, Dataset], float]] = {
    "test_loss": lambda model, data: evaluate(model, data.test).loss,
    "test_accuracy": lambda model, data: evaluate(model, data.test).accuracy,
    "small_loss": partial(of_small_split, what="loss"),
    "small_accuracy": partial(of_small_split, what="accuracy"),
    "evidence": stopping.EvidenceColumn(examples=EVIDENCE_EXAMPLES),
}
KEPT = ("epoch", "train_loss", "val_loss", "val_accuracy", *WATCH)


def base(lr: float, batch_size: int) -> Recipe:
    """SGD with momentum, validated after each epoch."""
    sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9)
    return Recipe(epochs=EPOCHS, batch_size=batch_size, optimizer=sgd, watch=WATCH)


def recipes(plain: Recipe, lr: float) -> dict[str, Recipe]:
    """Four ways to train: as it is, at a tenth of the rate, with Adam, down to zero along a cosine."""
    return {
        "plain": plain,
        "small rate": replace(plain, optimizer=partial(torch.optim.SGD, lr=lr / 10, momentum=0.9)),
        "Adam": replace(plain, optimizer=partial(torch.optim.Adam, lr=1e-3)),
        "cosine": replace(plain, schedule=schedules.schedule(schedules.cosine)),
    }


def watched(
    data: Dataset, seed: int, *, network: Callable[[], nn.Module], recipe: Recipe, wrong: float = 0.0
) -> Curves:
    """Train to the end; the curves, and the test accuracy of the last epoch as ``test``."""
    if wrong:
        data = reg.with_wrong_labels(data, wrong, torch.Generator().manual_seed(seed))[0]
    history = fit(fresh(network, recipe, seed=seed), data, recipe, seed=seed, progress=False)
    return {"test": history["test_accuracy"][-1]} | curves_of(history, KEPT)


def curves_of(history: History, columns: tuple[str, ...]) -> dict[str, Any]:
    """The columns as lists, to five digits: what a reader of the file has to download."""
    return {name: [float(f"{value:.5g}") for value in history[name]] for name in columns}


def runs(network: Callable[[], nn.Module], lr: float, batch_size: int) -> dict[str, Arm]:
    """The four recipes, and the plain one with every fifth label wrong."""
    ways = recipes(base(lr, batch_size), lr)
    found: dict[str, Arm] = {name: partial(watched, network=network, recipe=recipe) for name, recipe in ways.items()}
    return found | {"20% wrong labels": partial(watched, network=network, recipe=ways["plain"], wrong=0.2)}


# --- Down, up, and down again -----------------------------------------------------------------------------------------

DESCENT = Recipe(
    epochs=100,
    batch_size=20,
    optimizer=partial(torch.optim.SGD, lr=0.03, momentum=0.9),
    precision="float64",
    watch={name: WATCH[name] for name in ("test_loss", "test_accuracy")},
)


def digit_network(width: int = 256) -> nn.Module:
    """Two hidden layers."""
    return mlp((1, 16, 16), 10, width=width)


def descent(data: Dataset, seed: int, *, wrong: float) -> Curves:
    """A long run, of which one epoch in two is kept from the 20th on."""
    if wrong:
        data = reg.with_wrong_labels(data, wrong, torch.Generator().manual_seed(seed))[0]
    history = fit(fresh(digit_network, DESCENT, seed=seed), data, DESCENT, seed=seed, progress=False)
    history.rows = [row for row in history.rows if row["epoch"] <= 20 or row["epoch"] % 2 == 0]
    columns = ("epoch", "train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy")
    return {"test": history["test_accuracy"][-1]} | curves_of(history, columns)


# --- A search ---------------------------------------------------------------------------------------------------------


def setting(number: int) -> Mapping[str, float]:
    """One of the settings of the search, drawn from a seed of its own."""
    draw = np.random.default_rng(number)
    return {
        "lr": float(10 ** draw.uniform(-3.5, -0.5)),
        "momentum": float(draw.choice((0.0, 0.5, 0.9))),
        "weight_decay": float(10 ** draw.uniform(-5, -1)),
        "dropout": float(draw.uniform(0, 0.7)),
        "width": int(draw.choice((32, 64, 128, 256))),
        "batch_size": int(draw.choice((10, 20, 50, 100))),
    }


def searched(data: Dataset, seed: int, *, number: int) -> Curves:
    """Train one setting; a run that diverges stays at chance from there on."""
    drawn = setting(number)
    optimizer = partial(
        torch.optim.SGD, lr=drawn["lr"], momentum=drawn["momentum"], weight_decay=drawn["weight_decay"]
    )  # fmt: skip
    recipe = Recipe(
        epochs=SEARCH_EPOCHS,
        batch_size=int(drawn["batch_size"]),
        optimizer=optimizer,
        precision="float64",
        watch={"test_accuracy": WATCH["test_accuracy"]},
    )
    try:
        model = fresh(lambda: reg.with_dropout(digit_network(int(drawn["width"])), drawn["dropout"]), recipe, seed=seed)
        history = fit(model, data, recipe, seed=seed, progress=False)
    except Diverged as lost:
        history = lost.history
        chance = {"val_accuracy": 0.1, "test_accuracy": 0.1}
        history.rows += [chance] * (SEARCH_EPOCHS - len(history))
    return {"test": history["test_accuracy"][-1]} | curves_of(history, ("val_accuracy", "test_accuracy"))


STUDY = Study(
    "06",
    "What does each stopping criterion cost and save, and which runs should never have gone so far?",
    {
        "mnist": Part("MLP on MNIST, 500 labels, 40 epochs", mnist_500, runs(dense, 0.02, 20), SEEDS),
        "cifar10": Part(
            "Convolutional network on CIFAR-10, 2,000 labels, 40 epochs",
            cifar10_2000,
            runs(convolutional, 0.01, 50),
            SEEDS,
        ),
        "descent": Part(
            "MLP on 600 drawn digits, 100 epochs",
            partial(digits, 600),
            {"right labels": partial(descent, wrong=0.0), "30% wrong": partial(descent, wrong=0.3)},
            SEEDS,
        ),
        "search": Part(
            "MLPs on 1,000 drawn digits, 60 settings, 27 epochs",
            partial(digits, 1000),
            {f"setting {number}": partial(searched, number=number) for number in range(CONFIGS)},
            SEEDS,
        ),
    },
)
