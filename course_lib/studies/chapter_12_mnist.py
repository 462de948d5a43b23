"""The parts of chapter 12's study on MNIST: alignment over width, and clients that keep their digits to themselves.

Two hidden layers, SGD with momentum. "width": two networks trained on the same 5,000 images from different starts, of
16 to 512 units a layer; every method merges the same pair. "federated": 64 units a layer, ten clients with 500 images
each, twenty rounds; the rate is the same for all arms. Float32.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from course_lib import merging as mg
from course_lib import schedules
from course_lib.lab.data import Dataset
from course_lib.lab.models import mlp
from course_lib.lab.studies import Arm
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.studies import mnist

IMAGES, APART = 5_000, 100
WIDTHS = (16, 32, 64, 128, 256, 512)
POINTS, MIDDLE = 9, 4
CLIENTS, ROUNDS, CLIENT_WIDTH = 10, 20, 64
SKEWS = {"even": None, "alpha 1": 1.0, "alpha 0.1": 0.1}
LOCAL, MOST, STRENGTHS = (1, 5), 10, (0.1, 1.0)


def some() -> Dataset:
    """5,000 labels."""
    return mnist(IMAGES)


def sgd(epochs: int, lr: float = 0.05, batch_size: int = 50) -> Recipe:
    """SGD with momentum, a cosine to zero."""
    return Recipe(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
        schedule=schedules.schedule(schedules.cosine),
        validate_every=epochs,
    )


def network(width: int) -> nn.Module:
    """Two hidden layers."""
    return mlp((1, 28, 28), 10, width=width)


# --- Alignment over width ---------------------------------------------------------------------------------------------


def two_starts(data: Dataset, seed: int, *, width: int) -> dict[str, float | list[float]]:
    """Two networks from different starts: as they are, aligned by weights or activations, and repaired."""
    recipe, models = sgd(20), []
    for apart in (0, APART):
        models.append(fresh(partial(network, width), recipe, seed=seed + apart))
        fit(models[-1], data, recipe, seed=seed + apart, progress=False)
    a, b = models
    images = data.train.subset(torch.arange(1000))
    by_weights = mg.permute(b, mg.match_weights(a, b, generator=torch.Generator().manual_seed(seed)))
    by_activations = mg.permute(b, mg.match_activations(a, b, images))
    found: dict[str, float | list[float]] = {
        "alone": (evaluate(a, data.test).accuracy + evaluate(b, data.test).accuracy) / 2
    }
    for name, other in {"plain": b, "weights": by_weights, "activations": by_activations}.items():
        found |= _along(f"{name}_", mg.loss_along(a, other, data.test, POINTS))

    def repaired(a: nn.Module, b: nn.Module, t: float) -> nn.Module:
        return mg.repair(mg.interpolate(a, b, t), a, b, images, t=t)

    for name, other in {"plain": b, "weights": by_weights, "activations": by_activations}.items():
        found |= _along(f"{name}_repaired_", mg.loss_along(a, other, data.test, (0, 0.5, 1), way=repaired), 1)
    return found


def _along(name: str, path: mg.Path, middle: int = MIDDLE) -> dict[str, float | list[float]]:
    return {
        f"{name}barrier": mg.barrier(path),
        f"{name}middle": path.accuracies[middle],
        f"{name}losses": list(path.losses),
        f"{name}accuracies": list(path.accuracies),
    }


def width_arms() -> dict[str, Arm]:
    """One arm a width."""
    return {f"{width}": partial(two_starts, width=width) for width in WIDTHS}


# --- Clients ----------------------------------------------------------------------------------------------------------


def clients_of(data: Dataset, seed: int, alpha: float | None) -> list[Dataset]:
    """Ten clients with like shares of each class, or with classes of their own."""
    generator = torch.Generator().manual_seed(seed)
    if alpha is None:
        return mg.split_evenly(data, CLIENTS, generator=generator)
    return mg.split_by_dirichlet(data, CLIENTS, alpha, generator=generator)


def federated(
    data: Dataset, seed: int, *, alpha: float | None, local: int, strength: float = 0.0
) -> dict[str, float | list[float]]:
    """Twenty rounds of so many local epochs."""
    recipe = replace(sgd(local, 0.02), schedule=None)
    clients = clients_of(data, seed, alpha)
    found = mg.federated_averaging(
        partial(network, CLIENT_WIDTH), clients, recipe, ROUNDS, seed=seed, strength=strength
    )  # fmt: skip
    return {
        "test": evaluate(found.network, data.test).accuracy,
        "curve": [row["val_accuracy"] for row in found.rows],
        "examples": found.rows[-1]["examples"],
        "bytes": found.rows[-1]["bytes"],
    }


def central(data: Dataset, seed: int, *, epochs: int) -> dict[str, float | list[float]]:
    """All images in one place, as many epochs as all clients took together."""
    recipe = replace(sgd(epochs, 0.02), schedule=None, validate_every=1)
    model = fresh(partial(network, CLIENT_WIDTH), recipe, seed=seed)
    history = fit(model, data, recipe, seed=seed, progress=False)
    return {"test": evaluate(model, data.test).accuracy, "curve": history["val_accuracy"]}


def alone(data: Dataset, seed: int, *, alpha: float | None) -> dict[str, float | list[float]]:
    """Each client by itself, twenty epochs; the mean of ten networks."""
    recipe, found = replace(sgd(ROUNDS, 0.02), schedule=None), []
    for place, client in enumerate(clients_of(data, seed, alpha)):
        model = fresh(partial(network, CLIENT_WIDTH), recipe, seed=seed)
        fit(model, client, recipe, seed=seed + place, progress=False)
        found.append(evaluate(model, data.test).accuracy)
    return {"test": sum(found) / len(found)}


def federated_arms() -> dict[str, Arm]:
    """Skews and local epochs; the proximal term where clients differ most; one place; each alone."""
    arms: dict[str, Arm] = {
        f"{skew}, {local} local": partial(federated, alpha=alpha, local=local)
        for skew, alpha in SKEWS.items()
        for local in LOCAL
    }
    arms |= {
        f"{skew}, {MOST} local": partial(federated, alpha=SKEWS[skew], local=MOST) for skew in ("even", "alpha 0.1")
    }
    arms |= {
        f"alpha 0.1, {MOST} local, mu {strength:g}": partial(federated, alpha=0.1, local=MOST, strength=strength)
        for strength in STRENGTHS
    }
    arms |= {f"alone, {skew}": partial(alone, alpha=alpha) for skew, alpha in SKEWS.items()}
    return arms | {"in one place": partial(central, epochs=ROUNDS)}
