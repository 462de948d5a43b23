"""Chapter 5's study: which regularizer helps a network that learns its photographs by heart, and by how much?

CIFAR-10 with 5,000 labels, as they are and with every fifth of them wrong. Two convolutions and a dense layer of 256: a
small network by today's measure that still knows all 5,000 labels by heart after 20 epochs, the wrong ones too. Every
method has three strengths, every strength seven seeds: two choose the strength, on the validation split, whose labels
are right; the other five report, on the test split. SGD with momentum 0.9, one rate for all, up and down (one-cycle),
batches of 50, float32.

Each run reports accuracy on the test and the validation split, on the training labels as they were given, and how well
calibrated it is. Beside single methods stand pairs of them at a middle strength, and flips with shifts of the images
(chapter 1), as a yardstick. Another part takes the network from narrow to wide, with wrong labels, with and without
decay. The parts on drawn digits, where many more methods are compared, are in ``chapter_05_digits.py``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from course_lib import preprocessing as pre
from course_lib import regularization as reg
from course_lib import schedules
from course_lib.lab.data import Dataset, random_shift
from course_lib.lab.studies import Arm, Part, Study
from course_lib.lab.training import Objective, Recipe, cross_entropy, evaluate, fit, fresh, logits_of
from course_lib.studies import chapter_05_digits as digits
from course_lib.studies import cifar10

CHOOSING, REPORTED = (100, 101), (0, 1, 2, 3, 4)
EPOCHS, LR = 20, 0.05
WRONG = 0.2
WIDTHS = (1, 2, 4, 8, 16)

STRENGTHS: dict[str, tuple[float, ...]] = {
    "weight decay": (1e-3, 3e-3, 1e-2),
    "L1": (1e-5, 5e-5, 2e-4),
    "max-norm": (0.5, 1.0, 2.0),
    "dropout": (0.25, 0.5, 0.75),
    "spatial dropout": (0.1, 0.2, 0.4),
    "input noise": (0.2, 0.5, 1.0),
    "label smoothing": (0.1, 0.3, 0.6),
    "confidence penalty": (0.1, 0.3, 1.0),
    "generalized cross-entropy": (0.3, 0.5, 0.7),
    "hard bootstrap": (0.9, 0.8, 0.6),
    "R-Drop": (0.3, 1.0, 3.0),
}
"""Three strengths of each: a decay, a strength, a longest row, a probability, a standard deviation, a share."""
MIDDLE = {"weight decay": 3e-3, "dropout": 0.5, "label smoothing": 0.3}
PAIRS = (("weight decay", "dropout"), ("weight decay", "label smoothing"), ("dropout", "label smoothing"),
         ("weight decay", "dropout", "label smoothing"))  # fmt: skip


def clean() -> Dataset:
    """5,000 labels."""
    return cifar10(5000)


def noisy() -> Dataset:
    """5,000 labels, of which every fifth is another class: the same ones for all runs."""
    return reg.with_wrong_labels(clean(), WRONG, torch.Generator().manual_seed(5))[0]


def network(width: int = 16) -> nn.Module:
    """Two convolutions with a stride of 2 and a dense layer, ``[N, 3, 32, 32] -> [N, 10]``; 16 is 532,000 weights."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 64, 16 * width),
        nn.ReLU(),
        nn.Linear(16 * width, 10),
    )


def with_dense_dropout(made: nn.Module, p: float) -> nn.Module:
    """Dropout after the last two activations, as in the networks that it was made for."""
    parts = list(made)  # type: ignore[call-overload]
    return nn.Sequential(*parts[:5], reg.Dropout(p), *parts[5:7], reg.Dropout(p), *parts[7:])


def with_spatial_dropout(made: nn.Module, p: float) -> nn.Module:
    """Whole channels, after each convolution."""
    parts = list(made)  # type: ignore[call-overload]
    return nn.Sequential(*parts[:2], reg.Dropout2d(p), *parts[2:4], reg.Dropout2d(p), *parts[4:])


def flipped_and_shifted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Chapter 1's two augmentations of photographs."""
    return random_shift(pre.random_flip(x, generator), generator, 4)


OBJECTIVES: dict[str, Callable[[float], Objective]] = {
    "L1": lambda s: partial(reg.l1, strength=s),
    "input noise": lambda s: partial(reg.input_noise, std=s),
    "label smoothing": lambda s: partial(reg.label_smoothing, smoothing=s),
    "confidence penalty": lambda s: partial(reg.confidence_penalty, beta=s),
    "generalized cross-entropy": lambda s: partial(reg.generalized_cross_entropy, q=s),
    "hard bootstrap": lambda s: partial(reg.hard_bootstrap, beta=s),
    "R-Drop": lambda s: partial(reg.r_drop, alpha=s),
}


def made_of(methods: dict[str, float], width: int = 16) -> tuple[Callable[[], nn.Module], Recipe]:
    """The network and the recipe of one or several methods with their strengths."""

    def build() -> nn.Module:
        made = network(width)
        if "spatial dropout" in methods:
            made = with_spatial_dropout(made, methods["spatial dropout"])
        p = methods.get("dropout", 0.5 if "R-Drop" in methods else 0.0)
        return with_dense_dropout(made, p) if p else made

    objective: Objective = cross_entropy
    for name, strength in methods.items():
        if name in OBJECTIVES:
            objective = OBJECTIVES[name](strength)
    optimizer = partial(torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=methods.get("weight decay", 0.0))
    settings: dict[str, Any] = {"augment": flipped_and_shifted} if "flips and shifts" in methods else {}
    recipe = Recipe(
        epochs=EPOCHS,
        batch_size=50,
        optimizer=optimizer,
        objective=objective,
        schedule=schedules.schedule(schedules.one_cycle),
        validate_every=EPOCHS,
        **settings,
    )
    if "max-norm" in methods:
        recipe = reg.after_step(recipe, partial(reg.max_norm, limit=methods["max-norm"]))
    return build, recipe


def run(data: Dataset, seed: int, *, methods: dict[str, float], width: int = 16) -> dict[str, float]:
    """Train once; accuracies, the test loss, and the calibration error before a temperature."""
    build, recipe = made_of(methods, width)
    model = fresh(build, recipe, seed=seed)
    fit(model, data, recipe, seed=seed, progress=False)
    test = evaluate(model, data.test)
    return {
        "test": test.accuracy,
        "val": evaluate(model, data.val).accuracy,
        "train": evaluate(model, data.train).accuracy,
        "test_loss": test.loss,
        "calibration_error": reg.calibration_error(logits_of(model, data.test), data.test.labels),
    }


def arms() -> dict[str, Arm]:
    """Nothing, each method at each strength, the pairs, and the yardstick."""
    found: dict[str, Arm] = {"nothing": partial(run, methods={})}
    for name, strengths in STRENGTHS.items():
        found |= {f"{name} {strength:g}": partial(run, methods={name: strength}) for strength in strengths}
    for pair in PAIRS:
        found[" + ".join(pair)] = partial(run, methods={name: MIDDLE[name] for name in pair})
    found["flips and shifts"] = partial(run, methods={"flips and shifts": 1.0})
    return found


def widths() -> dict[str, Arm]:
    """From narrow to wide, with and without decay."""
    ways: dict[str, dict[str, float]] = {"no decay": {}, "decay": {"weight decay": 1e-2}}
    return {
        f"{way}, width {width}": partial(run, methods=methods, width=width)
        for way, methods in ways.items()
        for width in WIDTHS
    }


STUDY = Study(
    "05",
    "Which regularizer helps a network that learns its photographs by heart, and by how much?",
    {
        "clean": Part("Small dense-headed network on CIFAR-10, 5,000 labels", clean, arms(), (*CHOOSING, *REPORTED)),
        "noisy": Part("The same with every fifth label wrong", noisy, arms(), (*CHOOSING, *REPORTED)),
        "width": Part("From narrow to wide, every fifth label wrong", noisy, widths(), REPORTED),
        "digits": Part(
            "MLP on 600 drawn digits, three in ten labels wrong", digits.wrong, digits.arms(), (*CHOOSING, *REPORTED)
        ),
        "norms": Part(
            "Kinds of normalisation, 600 drawn digits", digits.right, digits.normalised(), (*CHOOSING, *REPORTED)
        ),
        "norms_noisy": Part(
            "The same with three in ten labels wrong", digits.wrong, digits.normalised(), (*CHOOSING, *REPORTED)
        ),
    },
)
