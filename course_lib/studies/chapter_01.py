"""Chapter 1's study: what augmentations are worth, in points and in labels.

``mlp`` and ``convnet``: drawn digits of 16×16 pixels, from 100 to 4,000 labels, as many steps for each number, one
augmentation at a time at one plausible strength, five seeds, 5,000 test images.
``strength``: the MLP with 300 labels, from a touch of each augmentation to far too much.
``cifar10``: a convolutional network and 10,000 photographs, 12 epochs: the usual crop and flip, and what comes on top.
``longer``: without and with crop and flip, for three times as many epochs.
Nothing is tuned for an augmentation but its strength, which is its authors' or the one named. Float32, momentum 0.9.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from course_lib import preprocessing as pre
from course_lib.lab.data import Augment, Dataset, Split, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.studies import Part, RecipeFor, Study
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.studies import cifar10

SEEDS = (0, 1, 2, 3, 4)
LABELS = (100, 300, 1000, 4000)
BATCH = 50

ONE_AT_A_TIME: dict[str, tuple[Augment, ...]] = {
    "none": (),
    "shift": (partial(pre.random_crop, padding=2),),
    "rotation": (partial(pre.random_rotation, degrees=15),),
    "affine": (pre.random_affine,),
    "elastic": (pre.random_elastic,),
    "cutout": (partial(pre.cutout, size=5),),
    "noise": (partial(pre.random_noise, sigma=0.1),),
    "light": (pre.random_brightness_contrast,),
    "flip": (pre.random_flip,),
    "mixup": (partial(pre.mixup, alpha=0.2, classes=10),),
    "CutMix": (partial(pre.cutmix, alpha=1.0, classes=10),),
    "TrivialAugment": (pre.trivial_augment,),
}
STRENGTHS: dict[str, tuple[Callable[[float], Augment], tuple[float, ...]]] = {
    "rotation": (lambda s: partial(pre.random_rotation, degrees=s), (5, 15, 30, 60, 90, 180)),
    "shift": (lambda s: partial(pre.random_crop, padding=int(s)), (1, 2, 3, 4, 6, 8)),
    "cutout": (lambda s: partial(pre.cutout, size=int(s)), (3, 5, 7, 9, 12, 15)),
    "noise": (lambda s: partial(pre.random_noise, sigma=s), (0.03, 0.1, 0.2, 0.3, 0.5, 1.0)),
    "mixup": (lambda s: partial(pre.mixup, alpha=s, classes=10), (0.05, 0.1, 0.2, 0.5, 1.0, 4.0)),
}

UNITS = {
    "rotation": "largest angle (degrees)",
    "shift": "largest shift (pixels)",
    "cutout": "side of the hole (pixels)",
    "noise": "deviation of the noise",
    "mixup": "α of mixup",
}


def cosine(optimizer: Optimizer, steps: int) -> CosineAnnealingLR:
    """From the peak to zero along half a cosine."""
    return CosineAnnealingLR(optimizer, steps)


@dataclass(frozen=True)
class Digits:
    """A network for the drawn digits, its peak rate (chosen without augmentation, on validation data), its steps."""

    network: Callable[[], nn.Module]
    lr: float
    steps: int


# --- Drawn digits -----------------------------------------------------------------------------------------------------


def light_on_dark(data: Dataset) -> Dataset:
    """The negative of drawn digits, which are black on white: what comes in at the edges, black, is paper then."""

    def negative(split: Split) -> Split:
        return replace(split, inputs=255 - split.images, mean=tuple(1 - mean for mean in split.mean))

    return replace(data, train=negative(data.train), val=negative(data.val), test=negative(data.test))


@lru_cache(maxsize=1)
def glyphs() -> Dataset:
    """4,000 drawn digits to learn, 5,000 to test."""
    paper = load(
        "glyphs", classes="digits", size=16, difficulty=0.5, train_size=max(LABELS), val_size=1000, test_size=5000
    )
    return light_on_dark(paper)


def with_labels(data: Dataset, count: int) -> Dataset:
    """The first ``count`` training images, which hold all classes alike."""
    return replace(data, train=data.train.subset(torch.arange(count)))


def recipe(data: Dataset, transforms: tuple[Augment, ...], lr: float, steps: int) -> Recipe:
    """So many steps, however many labels there are."""
    epochs = steps * BATCH // len(data.train)
    return Recipe(
        epochs=epochs,
        batch_size=BATCH,
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
        schedule=cosine,
        augment=pre.on_pixels(data.train, *transforms) if transforms else None,
        validate_every=epochs,
    )


def accuracy(data: Dataset, seed: int, on: Digits, transforms: tuple[Augment, ...]) -> float:
    """Test accuracy of one run."""
    how, network = recipe(data, transforms, on.lr, on.steps), on.network
    model = fresh(network, how, seed=seed)
    fit(model, data, how, seed=seed, progress=False)
    return evaluate(model, data.test).accuracy


def over_labels(data: Dataset, seed: int, *, on: Digits, transforms: tuple[Augment, ...]) -> Mapping[str, float]:
    """Test accuracy for each number of labels."""
    return {str(n): accuracy(with_labels(data, n), seed, on, transforms) for n in LABELS}


def over_strengths(data: Dataset, seed: int, *, name: str) -> Mapping[str, float]:
    """Test accuracy with 300 labels, without (level 0) and at each of the strengths (levels 1 to 6)."""
    make, strengths = STRENGTHS[name]
    few = with_labels(data, 300)
    found = {"0": accuracy(few, seed, MLP, ())}
    return found | {str(level): accuracy(few, seed, MLP, (make(s),)) for level, s in enumerate(strengths, start=1)}


def small_mlp() -> nn.Module:
    """Two hidden layers of 128."""
    return mlp((1, 16, 16), 10, width=128)


def small_convnet() -> nn.Module:
    """A convolutional network of 8, 16 and 32 channels."""
    return convnet((1, 16, 16), 10, width=8)


MLP, CONVNET = Digits(small_mlp, 0.05, 800), Digits(small_convnet, 0.2, 600)


# --- Photographs ------------------------------------------------------------------------------------------------------

BASE: tuple[Augment, ...] = (pre.random_crop, pre.random_flip)
ON_PHOTOGRAPHS: dict[str, tuple[Augment, ...]] = {
    "none": (),
    "crop": (pre.random_crop,),
    "flip": (pre.random_flip,),
    "crop and flip": BASE,
    "… and cutout": (*BASE, partial(pre.cutout, size=12)),
    "… and mixup": (*BASE, partial(pre.mixup, alpha=0.2, classes=10)),
    "… and CutMix": (*BASE, partial(pre.cutmix, alpha=1.0, classes=10)),
    "… and TrivialAugment": (*BASE, pre.trivial_augment),
}


def small_cifar10() -> Dataset:
    """10,000 labels."""
    return cifar10(10_000)


def cifar_network() -> nn.Module:
    """A convolutional network of 16, 32 and 64 channels."""
    return convnet((3, 32, 32), 10, width=16)


def on_photographs(data: Dataset, *, name: str) -> Recipe:
    """12 epochs with one of ``ON_PHOTOGRAPHS``."""
    transforms = ON_PHOTOGRAPHS[name]
    return Recipe(
        epochs=12,
        batch_size=100,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        schedule=cosine,
        augment=pre.on_pixels(data.train, *transforms) if transforms else None,
        validate_every=12,
    )


def three_times_as_long(data: Dataset, *, name: str) -> Recipe:
    """The same for 36 epochs."""
    return replace(on_photographs(data, name=name), epochs=36, validate_every=36)


def digits_part(title: str, on: Digits) -> Part:
    """One network, every augmentation, every number of labels."""
    arms = {name: partial(over_labels, on=on, transforms=transforms) for name, transforms in ONE_AT_A_TIME.items()}
    return Part(title, glyphs, arms, SEEDS)


STUDY = Study(
    "01",
    "What is an augmentation worth, on which network, with how many labels, and how much of it?",
    {
        "mlp": digits_part("MLP on drawn digits, 100 to 4,000 labels, 800 steps", MLP),
        "convnet": digits_part("Convnet on drawn digits, 100 to 4,000 labels, 600 steps", CONVNET),
        "strength": Part(
            "MLP on drawn digits, 300 labels, 800 steps",
            glyphs,
            {name: partial(over_strengths, name=name) for name in STRENGTHS},
            SEEDS,
        ),
        "cifar10": Part(
            "Convnet on CIFAR-10, 10,000 labels, 12 epochs",
            small_cifar10,
            {name: RecipeFor(partial(on_photographs, name=name)) for name in ON_PHOTOGRAPHS},
            SEEDS,
            cifar_network,
        ),
        "longer": Part(
            "Convnet on CIFAR-10, 10,000 labels, 36 epochs",
            small_cifar10,
            {name: RecipeFor(partial(three_times_as_long, name=name)) for name in ("none", "crop and flip")},
            SEEDS,
            cifar_network,
        ),
    },
)
