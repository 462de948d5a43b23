"""A part of chapter 13's study: real handwritten digits, read by a network that has labels of drawn ones alone.

The source are 10,000 digits drawn as in chalk, the target 10,000 images of MNIST without their labels, both at 16×16
pixels; a convolutional network of 16 channels, six epochs of SGD with momentum and a cosine. Nothing is tuned, since
there are no labels of the target to tune it by: every strength that was tried is an arm. Float32.
"""

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import nn

from course_lib import merging, schedules, transfer
from course_lib.lab.data import Dataset, load
from course_lib.lab.data.resizing import resize
from course_lib.lab.models import convnet
from course_lib.lab.studies import Arm
from course_lib.lab.training import Objective, Recipe, evaluate, fit, fresh
from course_lib.studies import mnist

PIXELS, IMAGES, EPOCHS, LR = 16, 10_000, 6, 0.05
STRENGTHS = {"CORAL": (1.0, 10.0, 100.0), "DAN": (0.1, 1.0, 10.0), "DANN": (0.1, 1.0, 10.0)}
BATCHES = {"256": 256, "32": 32}


def alike(data: Dataset) -> Dataset:
    """Standardised by the same numbers, wherever it comes from."""
    same = {"mean": (0.25,), "std": (0.25,)}
    return replace(data, **{name: replace(getattr(data, name), **same) for name in ("train", "val", "test")})


def real() -> Dataset:
    """MNIST at 16×16 pixels: the target."""
    return alike(mnist(IMAGES).with_inputs(partial(resize, size=PIXELS)))


@lru_cache(maxsize=1)
def drawn() -> Dataset:
    """Digits in chalk: the source."""
    chalk = partial(load, "glyphs", classes="digits", size=PIXELS, domain="chalk", difficulty=0.4)
    return alike(chalk(train_size=IMAGES, val_size=100, test_size=5_000))


def recipe(objective: Objective | None = None) -> Recipe:
    """SGD with momentum, a cosine to zero."""
    plain = Recipe(
        epochs=EPOCHS,
        batch_size=50,
        optimizer=partial(torch.optim.SGD, lr=LR, momentum=0.9),
        schedule=schedules.schedule(schedules.cosine),
        validate_every=EPOCHS,
    )
    return plain if objective is None else replace(plain, objective=objective)


def network() -> nn.Module:
    """Three convolutions with batch norm."""
    return convnet((1, PIXELS, PIXELS), 10, width=16)


def told(model: nn.Module, target: Dataset, seed: int) -> dict[str, float]:
    """Accuracies with the statistics as they are and with the target's own, and how far the domains are apart."""
    own = transfer.adabn(model, target.train)
    found = {
        "source": evaluate(model, drawn().test).accuracy,
        "target": evaluate(model, target.test).accuracy,
        "target, own statistics": evaluate(own, target.test).accuracy,
    }
    for name, (left, right) in {"distance": (model, model), "distance, own statistics": (model, own)}.items():
        seen = (transfer.features(left, drawn().test), transfer.features(right, target.test))
        found[name] = transfer.proxy_a_distance(*seen, generator=torch.Generator().manual_seed(seed))
    return found


def source_alone(target: Dataset, seed: int) -> dict[str, float]:
    """Trained on drawn digits; and what test-time entropy makes of it, and the terms of the bound."""
    model = fresh(network, recipe(), seed=seed)
    fit(model, drawn(), recipe(), seed=seed, progress=False)
    found = told(model, target, seed)
    for name, size in BATCHES.items():
        adapted = transfer.tent(model, target.test, batch_size=size)
        found[f"tent, {name}"] = (adapted.logits.argmax(1).cpu() == target.test.labels.cpu()).double().mean().item()
    for name, each in {"": model, ", own statistics": transfer.adabn(model, target.train)}.items():
        bound = transfer.adaptation_bound(each, drawn(), target, generator=torch.Generator().manual_seed(seed), C=0.1)
        found |= {f"bound {term}{name}": float(value) for term, value in vars(bound).items()}
    return found


def with_labels(target: Dataset, seed: int, *, both: bool) -> dict[str, float]:
    """With the target's labels, alone or beside the source's: what adaptation would like to reach."""
    data = merging.united([drawn(), target]) if both else target
    model = fresh(network, recipe(), seed=seed)
    fit(model, data, recipe(), seed=seed, progress=False)
    return told(model, target, seed)


def adapted(target: Dataset, seed: int, *, method: str, strength: float) -> dict[str, float]:
    """Trained on the source's labels and the target's images."""
    pool, model = transfer.Pool(target.train), fresh(network, recipe(), seed=seed)
    if method == "DANN":
        watched = transfer.WithDomains(model, generator=torch.Generator().manual_seed(seed))
        how = recipe(partial(transfer.dann, target=pool, strength=strength))
        fit(watched, drawn(), transfer.with_progress(how, watched, drawn()), seed=seed, progress=False)
        return told(transfer.bare(watched), target, seed)
    objective = {"CORAL": transfer.coral, "DAN": transfer.dan}[method]
    fit(model, drawn(), recipe(partial(objective, target=pool, strength=strength)), seed=seed, progress=False)
    return told(model, target, seed)


def arms() -> dict[str, Arm]:
    """One arm a method and strength."""
    found: dict[str, Arm] = {"source alone": source_alone}
    for method, strengths in STRENGTHS.items():
        for strength in strengths:
            found[f"{method}, {strength:g}"] = partial(adapted, method=method, strength=strength)
    found["target's labels"] = partial(with_labels, both=False)
    return found | {"both labels": partial(with_labels, both=True)}
