"""The part of chapter 5's study on drawn digits: what an MLP can carry, each method at five strengths.

600 drawn digits of which three in ten have a wrong label, two hidden layers of 256, SGD with momentum 0.9, batches of
20, 20 epochs, after which the plain network knows every label by heart. Two seeds choose a method's strength on 1,000
images with right labels, five others report on 5,000. For normalisation the strength is the learning rate, on wrong and
on right labels.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from course_lib import regularization as reg
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import mlp
from course_lib.lab.studies import Arm
from course_lib.lab.training import Recipe, evaluate, fit, fresh, logits_of

WRONG = 0.3
BASE = Recipe(
    epochs=20,
    batch_size=20,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    precision="float64",
    validate_every=20,
)
OBJECTIVES: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "spectral penalty": (reg.spectral_penalty, "strength"),
    "soft orthogonality": (reg.soft_orthogonality, "strength"),
    "gradient penalty": (reg.gradient_penalty, "strength"),
    "Jacobian penalty": (reg.projected_jacobian_penalty, "strength"),
    "input noise": (reg.input_noise, "std"),
    "weight noise": (reg.weight_noise, "std"),
    "virtual adversarial": (reg.virtual_adversarial, "eps"),
    "label smoothing": (reg.label_smoothing, "smoothing"),
    "confidence penalty": (reg.confidence_penalty, "beta"),
    "soft bootstrap": (reg.soft_bootstrap, "beta"),
    "hard bootstrap": (reg.hard_bootstrap, "beta"),
    "generalized cross-entropy": (reg.generalized_cross_entropy, "q"),
    "symmetric cross-entropy": (reg.symmetric_cross_entropy, "alpha"),
}
AFTER_STEPS: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "L1, proximal": (reg.prox_l1, "strength"),
    "group lasso, proximal": (reg.prox_group_lasso, "strength"),
    "max-norm": (reg.max_norm, "limit"),
}
STRENGTHS: dict[str, tuple[float, ...]] = {
    "weight decay": (0.01, 0.03, 0.05, 0.07, 0.1),
    "L1, proximal": (0.001, 0.003, 0.01, 0.02, 0.03),
    "group lasso, proximal": (0.001, 0.003, 0.005, 0.01, 0.015),
    "max-norm": (0.2, 0.3, 0.5, 0.7, 1.0),
    "spectral penalty": (0.1, 0.3, 1.0, 2.0, 4.0),
    "soft orthogonality": (0.003, 0.01, 0.03, 0.1, 0.3),
    "gradient penalty": (0.3, 1.0, 3.0, 10.0, 20.0),
    "Jacobian penalty": (0.01, 0.03, 0.1, 0.3, 1.0),
    "dropout": (0.1, 0.3, 0.5, 0.7, 0.8),
    "input noise": (0.3, 0.6, 1.0, 1.5, 2.0),
    "weight noise": (0.02, 0.04, 0.05, 0.06, 0.08),
    "R-Drop": (3.0, 10.0, 20.0, 30.0, 50.0),
    "virtual adversarial": (1.0, 2.0, 4.0, 8.0, 16.0),
    "label smoothing": (0.3, 0.5, 0.7, 0.8, 0.9),
    "confidence penalty": (0.3, 1.0, 3.0, 10.0, 30.0),
    "soft bootstrap": (0.6, 0.5, 0.4, 0.3, 0.2),
    "hard bootstrap": (0.8, 0.6, 0.5, 0.4, 0.35),
    "generalized cross-entropy": (0.3, 0.5, 0.6, 0.7, 0.9),
    "symmetric cross-entropy": (0.003, 0.01, 0.03, 0.1, 0.3),
}
RATES = (0.001, 0.003, 0.01, 0.03)
KINDS: tuple[reg.Kind, ...] = ("none", "batch", "layer", "group", "weight")


def right() -> Dataset:
    """600 digits to train on, 1,000 to choose and 5,000 to report; all labels right."""
    return load(
        "glyphs", classes="digits", size=16, difficulty=0.5, train_size=600, val_size=1000, test_size=5000
    )  # fmt: skip


def wrong() -> Dataset:
    """The same, with three in ten of the training labels another class."""
    return reg.with_wrong_labels(right(), WRONG, torch.Generator().manual_seed(5))[0]


def network() -> nn.Module:
    """134,154 parameters."""
    return mlp((1, 16, 16), 10, width=256)


def made_of(method: str, strength: float) -> tuple[Callable[[], nn.Module], Recipe]:
    """The network and the recipe of one method."""
    if method in OBJECTIVES:
        objective, argument = OBJECTIVES[method]
        return network, replace(BASE, objective=partial(objective, **{argument: strength}))
    if method in AFTER_STEPS:
        step, argument = AFTER_STEPS[method]
        return network, reg.after_step(BASE, partial(step, **{argument: strength}))
    if method == "weight decay":
        return network, replace(BASE, optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=strength))
    if method == "dropout":
        return lambda: reg.with_dropout(network(), strength), BASE
    if method == "R-Drop":
        return lambda: reg.with_dropout(network(), 0.3), replace(BASE, objective=partial(reg.r_drop, alpha=strength))
    return network, BASE


def measured(build: Callable[[], nn.Module], recipe: Recipe, data: Dataset, seed: int) -> dict[str, float]:
    """Train once; accuracies (training labels as they were given), the test loss and the calibration error."""
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


def run(data: Dataset, seed: int, *, method: str, strength: float) -> dict[str, float]:
    """One method at one strength."""
    return measured(*made_of(method, strength), data, seed)


def run_normalised(data: Dataset, seed: int, *, kind: reg.Kind, lr: float) -> dict[str, float]:
    """One kind of normalisation at one rate."""
    recipe = replace(BASE, optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9))
    return measured(lambda: reg.with_norm(network(), kind), recipe, data, seed)


def arms() -> dict[str, Arm]:
    """Nothing, and each method at each strength."""
    found: dict[str, Arm] = {"nothing": partial(run, method="nothing", strength=0.0)}
    for method, strengths in STRENGTHS.items():
        found |= {f"{method} {strength:g}": partial(run, method=method, strength=strength) for strength in strengths}
    return found


def normalised() -> dict[str, Arm]:
    """Each kind of normalisation at each rate."""
    return {f"{kind} {lr:g}": partial(run_normalised, kind=kind, lr=lr) for kind in KINDS for lr in RATES}
