"""The part of chapter 9's study on drawn digits: temperatures, teachers and transfer sets.

The teacher is an MLP with two hidden layers of 256, trained on 5,000 drawn digits; the student's hidden layers have 8
units, and it has 500 of the labels, or all of them. Both by Adam, whose steps do not grow with the loss: at a high
temperature the soft loss is far steeper than the cross-entropy, and under SGD each temperature would need a rate of its
own. All students of a part take the same number of steps. Each seed has its own teacher. Float64.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import nn

from course_lib import distillation as kd
from course_lib import regularization as reg
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import mlp
from course_lib.lab.studies import Arm
from course_lib.lab.training import Objective, Recipe, evaluate, fit, fresh

FEW, MANY = 500, 5000
STUDENT, TEACHER = 8, 256
TEMPERATURES, MIXES = (1.0, 2.0, 4.0, 8.0, 16.0), (0.25, 0.5, 0.75, 0.9, 1.0)
WIDTHS = (8, 16, 32, 128, 256, 1024)
TEACHERS_APART = 500  # a teacher's seed is never a student's


def adam(epochs: int, batch_size: int, lr: float) -> Recipe:
    """Adam at one rate, validated at the end."""
    return Recipe(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.Adam, lr=lr),
        precision="float64",
        validate_every=epochs,
    )


TEACHING, LEARNING, LEARNING_MANY = adam(10, 50, 1e-3), adam(40, 20, 3e-3), adam(10, 50, 3e-3)


def digits(count: int) -> Dataset:
    """Drawn digits; 1,000 to validate and 5,000 to test, the same for any count."""
    return load(
        "glyphs", classes="digits", size=16, difficulty=0.5, train_size=count, val_size=1000, test_size=5000
    )  # fmt: skip


def few() -> Dataset:
    """500 labels."""
    return digits(FEW)


def many() -> Dataset:
    """5,000 labels: the teacher's."""
    return digits(MANY)


def network(width: int) -> nn.Module:
    """Two hidden layers."""
    return mlp((1, 16, 16), 10, width=width)


@lru_cache(maxsize=64)
def teacher(seed: int, width: int = TEACHER, smoothing: float = 0.0, labels: int = MANY) -> nn.Module:
    """A teacher of this seed; kept, since many students have it."""
    recipe = TEACHING if labels == MANY else LEARNING
    if smoothing:
        recipe = replace(recipe, objective=partial(reg.label_smoothing, smoothing=smoothing))
    model = fresh(partial(network, width), recipe, seed=seed + TEACHERS_APART)
    fit(model, digits(labels), recipe, seed=seed + TEACHERS_APART, progress=False)
    return kd.frozen(model)


def outcome(model: nn.Module, data: Dataset, taught_by: nn.Module | None = None) -> dict[str, float]:
    """Accuracy on the test and the validation split; and how often it answers as its teacher, and how good that is."""
    found = {"test": evaluate(model, data.test).accuracy, "val": evaluate(model, data.val).accuracy}
    if taught_by is not None:
        found["agreement"] = kd.agreement(model, taught_by, data.test)
        found["teacher"] = evaluate(taught_by, data.test).accuracy
    return found


def learn(
    data: Dataset, seed: int, objective: Objective | None = None, *, width: int = STUDENT, recipe: Recipe | None = None
) -> nn.Module:
    """A student of this seed."""
    recipe = recipe or (LEARNING if len(data.train) == FEW else LEARNING_MANY)
    recipe = recipe if objective is None else replace(recipe, objective=objective)
    model = fresh(partial(network, width), recipe, seed=seed)
    fit(model, data, recipe, seed=seed, progress=False)
    return model


def alone(data: Dataset, seed: int, *, smoothing: float = 0.0, width: int = STUDENT) -> dict[str, float]:
    """The labels alone, perhaps smoothed."""
    objective = partial(reg.label_smoothing, smoothing=smoothing) if smoothing else None
    return outcome(learn(data, seed, objective, width=width), data)


def taught(
    data: Dataset,
    seed: int,
    *,
    temperature: float = 4.0,
    mix: float = 0.9,
    width: int = TEACHER,
    smoothing: float = 0.0,
    labels: int = MANY,
) -> dict[str, float]:
    """Soft targets of one teacher."""
    by = teacher(seed, width, smoothing, labels)
    objective = partial(kd.soft_targets, teacher=by, temperature=temperature, mix=mix)
    return outcome(learn(data, seed, objective), data, by)


def taught_by_several(data: Dataset, seed: int, *, count: int) -> dict[str, float]:
    """Soft targets of several teachers' mean."""
    by = kd.frozen(kd.Ensemble([teacher(seed + 50 * k) for k in range(count)]))
    return outcome(learn(data, seed, partial(kd.soft_targets, teacher=by)), data, by)


def taught_over(data: Dataset, seed: int, *, widths: tuple[int, ...]) -> dict[str, float]:
    """Soft targets of an assistant, which has them of a larger one, and so on: from ``widths[0]`` down.

    The assistants see the teacher's 5,000 images, as a teacher of their size would.
    """
    by = teacher(seed, widths[0])
    for width in widths[1:]:
        objective = partial(kd.soft_targets, teacher=by)
        by = kd.frozen(learn(many(), seed + TEACHERS_APART, objective, width=width, recipe=TEACHING))
    return outcome(learn(data, seed, partial(kd.soft_targets, teacher=by)), data, by)


def with_transfer(data: Dataset, seed: int, *, extra: int) -> dict[str, float]:
    """Soft targets on further images that have no label; as many steps as without."""
    by, images = teacher(seed), many().train.images
    known = {image.numpy().tobytes() for image in data.train.images}
    others = torch.tensor([image.numpy().tobytes() not in known for image in images])
    larger = kd.transfer_set(data, images[others][:extra])
    recipe = replace(LEARNING, epochs=round(LEARNING.epochs * FEW / (FEW + extra)))
    recipe = replace(recipe, validate_every=recipe.epochs)
    objective = partial(kd.soft_targets, teacher=by, objective=kd.labelled_only)
    return outcome(learn(larger, seed, objective, recipe=recipe), data, by)


OBJECTIVES: dict[str, Callable[..., torch.Tensor]] = {
    "logits": partial(kd.match_logits, strength=0.1),
    "decoupled": partial(kd.decoupled, beta=2.0),
    "standardised": kd.standardized,
}


def by_logits(data: Dataset, seed: int, *, objective: str) -> dict[str, float]:
    """Another objective on the teacher's logits."""
    by = teacher(seed)
    return outcome(learn(data, seed, partial(OBJECTIVES[objective], teacher=by)), data, by)


def map_arms() -> dict[str, Arm]:
    """Nothing, smoothed labels, and each temperature with each mix."""
    found: dict[str, Arm] = {"alone": alone, "smoothed": partial(alone, smoothing=0.1)}
    return found | {
        f"T {temperature:g}, mix {mix:g}": partial(taught, temperature=temperature, mix=mix)
        for temperature in TEMPERATURES
        for mix in MIXES
    }


def teacher_arms() -> dict[str, Arm]:
    """Teachers of many sizes and kinds, the assistants, and transfer sets; the student is the same."""
    found: dict[str, Arm] = {"alone": alone}
    found |= {f"width {width}": partial(taught, width=width) for width in WIDTHS}
    found |= {f"smoothed {s:g}": partial(taught, smoothing=s) for s in (0.1, 0.3)}
    found |= {f"smoothed {s:g}, T 1": partial(taught, smoothing=s, temperature=1.0) for s in (0.1, 0.3)}
    found |= {
        f"width {width}, T {t:g}": partial(taught, width=width, temperature=t)
        for width, t in ((16, 1.0), (TEACHER, 1.0), (1024, 1.0), (1024, 16.0))
    }
    found |= {f"{n} teachers": partial(taught_by_several, count=n) for n in (3, 5)}
    found["taught by 500 labels"] = partial(taught, labels=FEW)
    found["its own like, by 500 labels"] = partial(taught, width=STUDENT, labels=FEW)
    found["1024, 128, 8"] = partial(taught_over, widths=(1024, 128))
    found["1024, 128, 32, 8"] = partial(taught_over, widths=(1024, 128, 32))
    found |= {f"{extra} more images": partial(with_transfer, extra=extra) for extra in (500, 1500, 4500)}
    found |= {name: partial(by_logits, objective=name) for name in OBJECTIVES}
    return found


def size_arms() -> dict[str, Arm]:
    """Larger students, alone: what the teacher's word is worth in units."""
    return {f"alone, width {width}": partial(alone, width=width) for width in (8, 12, 16, 24, 32)}
