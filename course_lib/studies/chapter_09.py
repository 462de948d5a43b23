"""Chapter 9's study: what does a residual network's word bring a network a tenth its size, on photographs?

The teacher is a ResNet of 16, 32 and 64 channels, trained on 10,000 images of CIFAR-10; each seed has its own. The
student has three convolutions, 8 channels at first, and 1,000 of the labels. Both by Adam, up and down (one-cycle), on
flipped and shifted images; every student takes the same number of steps unless its name says otherwise. Strengths of
methods are the library's defaults, which are those of papers and public code, but for two that were set by hand on
drawn digits: 0.1 for logits, beta 2 for decoupled. Nothing was tuned on these data, for no method and not for the
student alone. Float32.

"methods": every lesson on the same student. "images": 250 labels, and 1,000 with 9,000 images that have none.
"patience": the teacher's answers computed once against computed anew for each augmented image, 48 epochs and 96.
"sizes": students of 4, 8 and 16 channels, alone and taught; and the teacher cut down channel by channel (chapter 8),
trained on with the labels, or with its own former self as teacher. The parts on drawn digits are in
``chapter_09_digits.py``.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import nn

from course_lib import distillation as kd
from course_lib import preprocessing as pre
from course_lib import pruning, schedules
from course_lib import regularization as reg
from course_lib.lab.data import Dataset, batches, random_shift
from course_lib.lab.files import replaced
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import convnet, resnet, thaw
from course_lib.lab.runtime import data_folder
from course_lib.lab.studies import Arm, Part, Study
from course_lib.lab.training import Objective, Recipe, cross_entropy, evaluate, fit, fresh, logits_of
from course_lib.studies import chapter_09_digits as digits
from course_lib.studies import cifar10

SEEDS = (0, 1, 2, 3, 4)
LABELS, FEW, OF_TEACHER = 1_000, 250, 10_000
EPOCHS, LONG = 48, 96
SMALL, STUDENT, LARGE, TEACHER = 4, 8, 16, 16
PAIRS = {"features.6": "stages.1", "features.10": "stages.2"}
LAST = {"embedding": "embedding"}


def labelled() -> Dataset:
    """1,000 labels; test on all 10,000 images."""
    return cifar10(LABELS)


def flipped_and_shifted(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Chapter 1's two augmentations of photographs."""
    return random_shift(pre.random_flip(x, generator), generator, 4)


def adam(epochs: int, lr: float) -> Recipe:
    """Adam, up and down."""
    return Recipe(
        epochs=epochs,
        batch_size=50,
        optimizer=partial(torch.optim.Adam, lr=lr),
        schedule=schedules.schedule(schedules.one_cycle),
        augment=flipped_and_shifted,
        validate_every=epochs,
    )


TEACHING, LEARNING = adam(20, 3e-3), adam(EPOCHS, 1e-2)


def student(width: int = STUDENT) -> nn.Module:
    """Three convolutions; 8 channels at first are 6,418 parameters."""
    return convnet((3, 32, 32), 10, width=width)


def large(width: int = TEACHER) -> nn.Module:
    """A residual network of three blocks; 16 channels at first are 78,042 parameters."""
    return resnet((3, 32, 32), 10, width=width)


@lru_cache(maxsize=8)
def teacher(seed: int) -> nn.Module:
    """The teacher of a seed; its weights are kept beside the data, since every arm and process needs them."""
    model = fresh(large, TEACHING, seed=1000 + seed)
    trained = fingerprint((TEACHING, model, seed, OF_TEACHER, torch.__version__))
    file = data_folder() / "cache" / f"chapter_09_teacher_{trained}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        fit(model, cifar10(OF_TEACHER), TEACHING, seed=1000 + seed, progress=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file) as written:
            torch.save(model.state_dict(), written)
    return kd.frozen(model)


def outcome(model: nn.Module, data: Dataset, taught_by: nn.Module | None = None) -> dict[str, float]:
    """Accuracy on test and training images, calibration, parameters; and how often it answers as its teacher."""
    found = {
        "test": evaluate(model, data.test).accuracy,
        "train": evaluate(model, data.train).accuracy,
        "calibration_error": reg.calibration_error(logits_of(model, data.test), data.test.labels),
        "parameters": float(sum(p.numel() for p in model.parameters())),
    }
    if taught_by is not None:
        found["agreement"] = kd.agreement(model, taught_by, data.test)
    return found


def train(model: nn.Module, data: Dataset, seed: int, recipe: Recipe, objective: Objective = cross_entropy) -> None:
    """Train a network by the recipe with this objective."""
    fit(model, data, replace(recipe, objective=objective), seed=seed, progress=False)


def alone(
    data: Dataset, seed: int, *, width: int = STUDENT, smoothing: float = 0.0, epochs: int = EPOCHS
) -> dict[str, float]:
    """The labels alone, perhaps smoothed."""
    recipe = adam(epochs, 1e-2)
    model = fresh(partial(student, width), recipe, seed=seed)
    train(model, data, seed, recipe, partial(reg.label_smoothing, smoothing=smoothing) if smoothing else cross_entropy)
    return outcome(model, data)


def of_teacher(data: Dataset, seed: int) -> dict[str, float]:
    """The teacher itself."""
    return outcome(teacher(seed), data)


def taught(
    data: Dataset,
    seed: int,
    *,
    lesson: Callable[..., torch.Tensor] = kd.soft_targets,
    at: dict[str, str] | None = None,
    connected: str = "",
    width: int = STUDENT,
    epochs: int = EPOCHS,
) -> dict[str, float]:
    """A student with a lesson of its teacher; ``connected`` with regressors or projections."""
    by, recipe = teacher(seed), adam(epochs, 1e-2)
    model = fresh(partial(student, width), recipe, seed=seed)
    objective = partial(lesson, teacher=by) if at is None else partial(lesson, teacher=by, at=at)
    example = next(batches(data.train, 4))[0]
    carrier = model
    if at is not None and connected == "regressors":
        carrier = kd.with_connectors(model, kd.connectors(model, by, at, example))
    elif at is not None and connected == "projections":
        carrier = kd.with_projections(model, by, at, example)
    train(carrier, data, seed, recipe, objective)
    return outcome(model, data, by)


def cached(data: Dataset, seed: int, *, epochs: int = EPOCHS) -> dict[str, float]:
    """Soft targets that the teacher gave once, for the images as they are."""
    by, recipe = teacher(seed), adam(epochs, 1e-2)
    model = fresh(student, recipe, seed=seed)
    numbered, cache = kd.cached(by, data)
    train(model, numbered, seed, recipe, cache.objective(partial(kd.soft_targets, teacher=cache)))
    return outcome(model, data, by)


def born_again(data: Dataset, seed: int) -> dict[str, float]:
    """A student of its own like, which the same labels taught."""
    first, second = (fresh(student, LEARNING, seed=seed + apart) for apart in (kd.SEEDS_APART, 0))
    train(first, data, seed + kd.SEEDS_APART, LEARNING)
    by = kd.frozen(first)
    train(second, data, seed, LEARNING, partial(kd.soft_targets, teacher=by, temperature=1.0, mix=0.5))
    return outcome(second, data, by)


def mutual(data: Dataset, seed: int) -> dict[str, float]:
    """Two students that teach one another, without a teacher."""
    cohort = kd.Cohort([fresh(student, LEARNING, seed=seed + apart) for apart in (0, kd.SEEDS_APART)])
    train(cohort, data, seed, LEARNING, kd.mutual)
    return outcome(cohort.students[0], data)


def by_exits(data: Dataset, seed: int) -> dict[str, float]:
    """A student whose last layer teaches its earlier ones."""
    model = fresh(student, LEARNING, seed=seed)
    with_exits = kd.WithExits(model, ["features.2", "features.6"], next(batches(data.train, 4))[0])
    train(with_exits, data, seed, LEARNING, kd.self_distillation)
    return outcome(model, data)


# --- Fewer labels, more images ----------------------------------------------------------------------------------------


def few_labels(data: Dataset, seed: int, *, told: bool) -> dict[str, float]:
    """250 labels, with or without the teacher's word; as many steps as with 1,000."""
    few, recipe = replace(data, train=data.train.subset(torch.arange(FEW))), adam(EPOCHS * LABELS // FEW, 1e-2)
    model = fresh(student, recipe, seed=seed)
    if not told:
        train(model, few, seed, recipe)
        return outcome(model, data)
    by = teacher(seed)
    train(model, few, seed, recipe, partial(kd.soft_targets, teacher=by))
    return outcome(model, data, by)


def more_images(data: Dataset, seed: int) -> dict[str, float]:
    """The 1,000 labels, and the teacher's word on its other 9,000 images as well; no more steps."""
    by, images = teacher(seed), cifar10(OF_TEACHER).train.images
    known = {image.numpy().tobytes() for image in data.train.images}
    others = torch.tensor([image.numpy().tobytes() not in known for image in images])
    larger, recipe = kd.transfer_set(data, images[others][: OF_TEACHER - LABELS]), adam(5, 1e-2)
    model = fresh(student, recipe, seed=seed)
    train(model, larger, seed, recipe, partial(kd.soft_targets, teacher=by, objective=kd.labelled_only))
    return outcome(model, data, by)


# --- Sizes ------------------------------------------------------------------------------------------------------------


def cut_down(data: Dataset, seed: int, *, told: bool) -> dict[str, float]:
    """The teacher cut to a quarter of its channels, trained on by the labels or by its former self."""
    by = teacher(seed)
    # a copy of a frozen network is frozen as well: its batch norm would go on using the statistics of all channels
    model, example = thaw(copy.deepcopy(by)), torch.zeros(2, 3, 32, 32)
    pruning.prune_channels(model, example, sparsity=0.75)
    small = pruning.shrink(model, example)
    train(small, data, seed, LEARNING, partial(kd.soft_targets, teacher=by) if told else cross_entropy)
    return outcome(small, data, by)


METHODS: dict[str, Arm] = {
    "alone": alone,
    "smoothed labels": partial(alone, smoothing=0.1),
    "soft targets": taught,
    "logits": partial(taught, lesson=partial(kd.match_logits, strength=0.1)),
    "decoupled": partial(taught, lesson=partial(kd.decoupled, beta=2.0)),
    "standardised": partial(taught, lesson=kd.standardized),
    "hints": partial(taught, lesson=kd.hints, at={"features.6": "stages.1"}, connected="regressors"),
    "attention transfer": partial(taught, lesson=kd.attention_transfer, at=PAIRS),
    "similarity-preserving": partial(taught, lesson=kd.similarity_preserving, at=LAST),
    "relational": partial(taught, lesson=kd.relational, at=LAST),
    "contrastive": partial(taught, lesson=kd.contrastive, at=LAST, connected="projections"),
    "born again": born_again,
    "mutual": mutual,
    "early exits": by_exits,
    "teacher itself": of_teacher,
}

STUDY = Study(
    "09",
    "What does a residual network's word bring a network a tenth its size?",
    {
        "map": Part("Student of 8 units, 500 drawn digits", digits.few, digits.map_arms(), SEEDS),
        "map_many": Part("The same with 5,000 labels", digits.many, digits.map_arms(), SEEDS),
        "teachers": Part("The same student with other teachers, 500 labels", digits.few, digits.teacher_arms(), SEEDS),
        "units": Part("Larger students without a teacher, 500 labels", digits.few, digits.size_arms(), SEEDS),
        "methods": Part("Small convnet on CIFAR-10, 1,000 labels", labelled, METHODS, SEEDS),
        "images": Part(
            "The same with fewer labels and with more images, as many steps",
            labelled,
            {
                "250 labels, alone": partial(few_labels, told=False),
                "250 labels, taught": partial(few_labels, told=True),
                "1,000 labels and 9,000 images, taught": more_images,
            },
            SEEDS,
        ),
        "patience": Part(
            "Teacher's answers once or anew, 1,000 labels",
            labelled,
            {
                "computed once, 48 epochs": cached,
                "computed once, 96 epochs": partial(cached, epochs=LONG),
                "anew, 96 epochs": partial(taught, epochs=LONG),
                "alone, 96 epochs": partial(alone, epochs=LONG),
            },
            SEEDS,
        ),
        "sizes": Part(
            "Small networks of several sizes, 1,000 labels",
            labelled,
            {
                "alone, 4": partial(alone, width=SMALL),
                "taught, 4": partial(taught, width=SMALL),
                "alone, 16": partial(alone, width=LARGE),
                "taught, 16": partial(taught, width=LARGE),
                "cut down, labels": partial(cut_down, told=False),
                "cut down, taught": partial(cut_down, told=True),
            },
            SEEDS,
        ),
    },
)
