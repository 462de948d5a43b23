"""Chapter 15's study: what cheaper networks are worth on photographs, at an equal number of multiplications.

CIFAR-10, 5,000 labels, SGD with momentum, a cosine to zero, flipped and shifted images, 6 epochs; 5,000 test images.
Rates are the same for all arms; no arm was tuned more than another.

"blocks": networks of five kinds of block, each as wide as brings it to the multiplications of the one of full
convolutions, at 16×16 pixels. "branches": a plain network and three that train with more branches and end as the plain
one (RepVGG and relatives), the accuracy before and after they are merged. "scaling": four times the multiplications
spent on depth, on width, on resolution, or on all three; images of 12×12 pixels and more.
"""

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import nn

from course_lib.efficiency import cheap_layers, scaling_networks
from course_lib.efficiency.branches import reparameterise, repvgg
from course_lib.lab.data import Dataset
from course_lib.lab.data.resizing import resize
from course_lib.lab.studies import Part, Study
from course_lib.lab.training import evaluate, fit, fresh
from course_lib.studies import cifar10
from course_lib.studies.chapter_12 import sgd, some

SEEDS = (0, 1, 2, 3, 4)
EPOCHS, LABELS = 6, 5_000
WIDTH, DEPTH = 16, 2
PATHS: dict[str, scaling_networks.Path] = {
    "depth": partial(scaling_networks.single, "depth"),
    "width": partial(scaling_networks.single, "width"),
    "resolution": partial(scaling_networks.single, "resolution"),
    "compound": scaling_networks.compound,
}
BASE, TIMES = scaling_networks.Size(depth=1, width=8, resolution=12), 4.0


def right(model: nn.Module, data: Dataset) -> float:
    """The accuracy on the test split."""
    return evaluate(model, data.test).accuracy


def block(kind: str, data: Dataset, seed: int) -> dict[str, float]:
    """A network of one kind of block, of the width that brings it to the full one's multiplications."""
    shape = data.input_shape
    budget = cheap_layers.family_cost(shape, 10, width=WIDTH, depth=DEPTH).multiplications
    width = cheap_layers.width_for(budget, shape, 10, block=kind, depth=DEPTH)
    cost = cheap_layers.family_cost(shape, 10, block=kind, width=width, depth=DEPTH)
    make = partial(cheap_layers.family, shape, 10, block=kind, width=width, depth=DEPTH)
    model = fresh(make, sgd(EPOCHS), seed=seed)
    fit(model, data, sgd(EPOCHS), seed=seed, progress=False)
    return {
        "accuracy": right(model, data),
        "width": float(width),
        "parameters": float(cost.parameters),
        "multiplications": float(cost.multiplications),
    }


def branches(kind: str, data: Dataset, seed: int) -> dict[str, float]:
    """A network that trains with some kind of branches, then merged."""
    make = partial(repvgg, data.input_shape, 10, width=WIDTH, depth=DEPTH, block=kind)
    model = fresh(make, sgd(EPOCHS), seed=seed)
    fit(model, data, sgd(EPOCHS), seed=seed, progress=False)
    merged = reparameterise(model)
    return {
        "accuracy": right(model, data),
        "merged": right(merged, data),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "parameters merged": float(sum(p.numel() for p in merged.parameters())),
    }


@lru_cache(maxsize=1)
def whole_images() -> Dataset:
    """5,000 labels in 32×32 pixels; test on every second image."""
    large = cifar10(LABELS)
    return replace(large, test=large.test.subset(torch.arange(0, len(large.test), 2)))


def scaled(way: str, data: Dataset, seed: int) -> dict[str, float]:
    """The small network, or one of four times its multiplications."""
    cost = partial(scaling_networks.family_multiplications, channels=3)
    size = BASE
    if way != "small":
        path = PATHS[way]
        size = scaling_networks.nearest(BASE, path, TIMES, cost)
    images = data.with_inputs(partial(resize, size=size.resolution))
    make = partial(cheap_layers.family, images.input_shape, 10, width=size.width, depth=size.depth)
    model = fresh(make, sgd(EPOCHS), seed=seed)
    fit(model, images, sgd(EPOCHS), seed=seed, progress=False)
    return {
        "accuracy": right(model, images),
        "depth": float(size.depth),
        "width": float(size.width),
        "resolution": float(size.resolution),
        "multiplications": float(cost(size)),
    }


BRANCHES = ("plain", "repvgg", "asymmetric", "expanded")
WAYS = ("small", *PATHS)

STUDY = Study(
    "15",
    "What are cheaper networks worth?",
    {
        "blocks": Part(
            "Blocks at equal multiplications", some, {k: partial(block, k) for k in cheap_layers.BLOCKS}, SEEDS
        ),
        "branches": Part("More branches in training", some, {k: partial(branches, k) for k in BRANCHES}, SEEDS),
        "scaling": Part("Four times the multiplications", whole_images, {k: partial(scaled, k) for k in WAYS}, SEEDS),
    },
)
