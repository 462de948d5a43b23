"""Chapter 12's study: merging residual networks that were trained on photographs.

CIFAR-10 at 16×16 pixels, so that many networks can be trained, and ResNets of three blocks: 16, 32 and 64 channels
unless it says otherwise. SGD with momentum and weight decay, cosine to zero, on flipped and shifted images; rates and
scales of merging are chosen on the validation split where a method has one, all else is as it is for every arm. Every
network that was merged gets batch-norm statistics of its own from 1,000 training images, unless the name says "stale".
Float32.

"resnets": two networks from different starts, of three widths, before and after alignment. "starts": two that were one
network for some epochs. "soups": eight fine-tunings of one network on five classes that it did not know. "halves": one
network tuned on two halves of the classes apart. "run": averages along one run. "growing": small networks made wide,
at an equal number of multiplications. The parts on MNIST are in ``chapter_12_mnist.py``.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor, nn

from course_lib import merging as mg
from course_lib import preprocessing as pre
from course_lib import regularization as reg
from course_lib import schedules
from course_lib.lab.costs import flops
from course_lib.lab.data import Augment, Dataset, Split, random_shift
from course_lib.lab.data.resizing import resize
from course_lib.lab.models import freeze, resnet, thaw
from course_lib.lab.studies import Arm, Part, Study
from course_lib.lab.training import Objective, Recipe, cross_entropy, evaluate, fit, fresh, logits_of
from course_lib.studies import chapter_12_mnist as digits
from course_lib.studies import cifar10

SEEDS = (0, 1, 2, 3, 4)
IMAGES, EPOCHS, WIDTH, PIXELS = 5_000, 10, 16, 16
WIDTHS, TOGETHER, BRANCH = (8, 16, 32), (0, 2), 6
POINTS, MIDDLE, FOR_NORM = 5, 2, 1_000
APART = 100  # the second network of a pair has a seed this far away
SOURCE, TARGET, LABELS = (0, 2, 4, 6, 8), (1, 3, 5, 7, 9), 1_000
SAMPLED = 500  # images of each half that the weighted means ask for
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
SHARES = {"large from the start": 0.0, "grown after half": 0.5, "small only": 1.0}


@lru_cache(maxsize=4)
def images(count: int) -> Dataset:
    """CIFAR-10 at 16×16 pixels; test on every second image, 5,000 (they lie sorted by class)."""
    small = cifar10(count).with_inputs(partial(resize, size=PIXELS))
    return replace(small, test=small.test.subset(torch.arange(0, len(small.test), 2)))


def some() -> Dataset:
    """5,000 labels."""
    return images(IMAGES)


def many() -> Dataset:
    """10,000 labels."""
    return images(2 * IMAGES)


def flipped_and_shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Chapter 1's two augmentations of photographs, half the shift for half the pixels."""
    return random_shift(pre.random_flip(x, generator), generator, 2)


def sgd(epochs: int, lr: float = 0.05, augment: Augment | None = flipped_and_shifted, constant: bool = False) -> Recipe:
    """SGD with momentum, a cosine to zero or a rate that stays."""
    return Recipe(
        epochs=epochs,
        batch_size=50,
        optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
        schedule=None if constant else schedules.schedule(schedules.cosine),
        augment=augment,
        validate_every=epochs,
    )


def network(width: int = WIDTH, classes: int = 10) -> nn.Module:
    """A residual network of three blocks."""
    return resnet((3, PIXELS, PIXELS), classes, width=width)


def trained(model: nn.Module, data: Dataset, recipe: Recipe, seed: int) -> nn.Module:
    """The network after training; the seed decides over order and augmentation."""
    fit(model, data, recipe, seed=seed, progress=False)
    return model


def normed(model: nn.Module, data: Dataset) -> nn.Module:
    """The network with batch-norm statistics of 1,000 training images, in place."""
    return mg.refresh_batch_norm(model, data.train.subset(torch.arange(min(FOR_NORM, len(data.train)))))


def together(models: list[nn.Module], split: Split) -> Tensor:
    """Logarithms of the mean of probabilities ``[N, K]``: the networks as an ensemble."""
    return torch.stack([logits_of(model, split).log_softmax(1) for model in models]).logsumexp(0)


def share_right(logits: Tensor, split: Split) -> float:
    """The accuracy of logits."""
    return float((logits.argmax(1).cpu() == split.labels.cpu()).double().mean())


def on_the_line(a: nn.Module, b: nn.Module, data: Dataset, name: str = "") -> dict[str, float | list[float]]:
    """Barrier, instability, the middle's accuracy, and the curves between two networks on the test split."""
    path = mg.loss_along(a, b, data.test, POINTS, prepare=partial(normed, data=data))
    return {
        f"{name}barrier": mg.barrier(path),
        f"{name}instability": mg.instability(path),
        f"{name}middle": path.accuracies[MIDDLE],
        f"{name}losses": list(path.losses),
        f"{name}accuracies": list(path.accuracies),
    }


# --- Two networks -----------------------------------------------------------------------------------------------------


def two_starts(data: Dataset, seed: int, *, width: int) -> dict[str, float | list[float]]:
    """Two networks trained alike from different starts: as they are, and with the units of one in another order."""
    a, b = (
        trained(fresh(partial(network, width), sgd(EPOCHS), seed=seed + apart), data, sgd(EPOCHS), seed + apart)
        for apart in (0, APART)
    )
    generator = torch.Generator().manual_seed(seed)
    some_images = data.train.subset(torch.arange(FOR_NORM))
    ordered = {
        "plain": b,
        "weights": mg.permute(b, mg.match_weights(a, b, generator=generator)),
        "activations": mg.permute(b, mg.match_activations(a, b, some_images)),
    }
    found: dict[str, float | list[float]] = {
        "alone": (evaluate(a, data.test).accuracy + evaluate(b, data.test).accuracy) / 2,
        "ensemble": share_right(together([a, b], data.test), data.test),
    }
    for name, other in ordered.items():
        found |= on_the_line(a, other, data, f"{name}_")
        found[f"{name}_stale"] = evaluate(mg.interpolate(a, other, 0.5), data.test).accuracy
    return found


def common_start(data: Dataset, seed: int, *, epochs: int) -> dict[str, float | list[float]]:
    """One network for some epochs at a constant rate, then two, with other orders and augmentations."""
    start = fresh(network, sgd(BRANCH), seed=seed)
    if epochs:
        trained(start, data, sgd(epochs, constant=True), seed)
    a, b = (trained(copy.deepcopy(start), data, sgd(BRANCH), seed + APART * k) for k in (1, 2))
    alone = (evaluate(a, data.test).accuracy + evaluate(b, data.test).accuracy) / 2
    ensemble = share_right(together([a, b], data.test), data.test)
    apart = float(sum(v.square().sum() for v in mg.task_vector(a, b).values())) ** 0.5
    return {"alone": alone, "ensemble": ensemble, "distance": apart} | on_the_line(a, b, data)


# --- Soups ------------------------------------------------------------------------------------------------------------


def of_classes(data: Dataset, classes: tuple[int, ...], count: int | None = None) -> Dataset:
    """The examples of some classes, numbered from 0; ``count`` of the training split."""

    def chosen(split: Split, most: int | None = None) -> Split:
        places = torch.isin(split.labels, torch.tensor(classes)).nonzero().flatten()[:most]
        kept = split.subset(places)
        return replace(kept, labels=torch.searchsorted(torch.tensor(classes), kept.labels))

    names = tuple(data.classes[each] for each in classes)
    return replace(
        data, train=chosen(data.train, count), val=chosen(data.val), test=chosen(data.test), classes=names
    )  # fmt: skip


def smoothed(strength: float) -> Objective:
    """Chapter 5's label smoothing, or none."""
    return partial(reg.label_smoothing, smoothing=strength) if strength else cross_entropy


SETTINGS = [
    replace(sgd(12, lr, augment), objective=smoothed(strength))
    for lr, augment, strength in product((0.003, 0.03), (None, flipped_and_shifted), (0.0, 0.2))
]
"""Eight ways to tune: two rates, with and without augmentation, with and without smoothed labels."""


def tuned_from(data: Dataset, seed: int, *, source: bool) -> dict[str, float | list[float]]:
    """Eight networks tuned on 1,000 labels of five classes, from one pre-trained network or from eight random ones."""
    target = of_classes(data, TARGET, LABELS)
    if source:
        start = trained(
            fresh(partial(network, classes=5), sgd(EPOCHS), seed=seed), of_classes(data, SOURCE), sgd(EPOCHS), seed
        )
        start.head = fresh(lambda: nn.Linear(4 * WIDTH, 5), sgd(1), seed=seed)
        for name, part in start.named_children():
            if name != "head":
                freeze(part)
        trained(start, target, sgd(5), seed)  # the head first, while all else rests: one start for all eight
        starts = [thaw(copy.deepcopy(start)) for _ in SETTINGS]
    else:
        starts = [fresh(partial(network, classes=5), sgd(1), seed=seed + APART * k) for k in range(len(SETTINGS))]
    models = [
        trained(model, target, recipe, seed + APART * k)
        for k, (model, recipe) in enumerate(zip(starts, SETTINGS, strict=True))
    ]

    def score(model: nn.Module) -> float:
        return evaluate(normed(copy.deepcopy(model), target), target.val).accuracy

    greedy = mg.greedy_soup(models, score)
    validated = [evaluate(model, target.val).accuracy for model in models]
    alone = [evaluate(model, target.test).accuracy for model in models]
    best = models[max(range(len(models)), key=lambda k: validated[k])]
    made = {
        "best": logits_of(best, target.test),
        "uniform": logits_of(normed(mg.uniform_soup(models), target), target.test),
        "stale": logits_of(mg.uniform_soup(models), target.test),
        "greedy": logits_of(normed(greedy.network, target), target.test),
        "ensemble": together(models, target.test),
    }
    found: dict[str, float | list[float]] = {name: share_right(z, target.test) for name, z in made.items()}
    for name, z in made.items():
        found[f"{name}_loss"] = float(nn.functional.cross_entropy(z, target.test.labels))
        found[f"{name}_calibration"] = reg.calibration_error(z, target.test.labels)
    mean = sum(alone) / len(alone)
    return found | {"mean": mean, "ingredients": float(len(greedy.ingredients)), "each": alone}


# --- Two halves of a task ---------------------------------------------------------------------------------------------


def halves(data: Dataset, seed: int) -> dict[str, float]:
    """One network for ten classes, tuned on five and on the other five apart, and merged by every method."""
    drawn = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    first, later = (
        replace(data, train=data.train.subset(drawn[part]))
        for part in (slice(len(drawn) // 5), slice(len(drawn) // 5, None))
    )
    base = trained(fresh(network, sgd(EPOCHS), seed=seed), first, sgd(EPOCHS), seed)
    low = later.train.labels < 5
    parts = [replace(later, train=later.train.subset(which.nonzero().flatten())) for which in (low, ~low)]
    tuning = sgd(BRANCH, 0.02)
    tuned = [trained(copy.deepcopy(base), part, tuning, seed + APART * k) for k, part in enumerate(parts)]
    joint = trained(copy.deepcopy(base), later, tuning, seed)
    strangers = [
        trained(fresh(network, tuning, seed=seed + APART * (k + 1)), part, sgd(EPOCHS), seed)
        for k, part in enumerate(parts)
    ]
    vectors = [mg.task_vector(base, model) for model in tuned]
    generator = torch.Generator().manual_seed(seed)
    dropped = [mg.dare(vector, 0.8, generator=generator) for vector in vectors]
    samples = [part.train.subset(torch.arange(SAMPLED)) for part in parts]
    fishers = [mg.fisher(m, s, generator=generator) for m, s in zip(tuned, samples, strict=True)]
    products = [mg.inner_products(m, s) for m, s in zip(tuned, samples, strict=True)]
    ways: Mapping[str, list[nn.Module]] = {
        "base": [base],
        "first half": [tuned[0]],
        "second half": [tuned[1]],
        "average": [mg.average(tuned)],
        "arithmetic": [mg.add(base, vectors, scale) for scale in SCALES],
        "ties": [mg.add(base, [mg.ties(vectors)], 2 * scale) for scale in SCALES],
        "dare": [mg.add(base, dropped, scale) for scale in SCALES],
        "fisher": [mg.fisher_merge(tuned, fishers)],
        "regmean": [mg.regmean(tuned, products)],
        "two starts": [mg.average(strangers)],
        "joint": [joint],
    }
    merged = {name: [normed(copy.deepcopy(model), later) for model in models] for name, models in ways.items()}
    best = {name: max(found, key=lambda model: evaluate(model, data.val).accuracy) for name, found in merged.items()}
    logits = {name: logits_of(model, data.test) for name, model in best.items()}
    logits["ensemble"] = together(tuned, data.test)
    found = {name: share_right(z, data.test) for name, z in logits.items()}
    in_first = data.test.labels < 5
    for name, z in logits.items():
        right = (z.argmax(1) == data.test.labels).double()
        found |= {f"{name}, first": float(right[in_first].mean()), f"{name}, second": float(right[~in_first].mean())}
    return found | {"cosine": float(mg.similarities(vectors)[0, 1])}


# --- Along a run ------------------------------------------------------------------------------------------------------


def averaged_run(data: Dataset, seed: int) -> dict[str, float | list[float]]:
    """A run at a constant rate, the mean of its second half's weights, and its last ones."""
    recipe = replace(sgd(EPOCHS, constant=True), validate_every=1)
    plain = fresh(network, recipe, seed=seed)
    model = mg.SWA(plain)
    steps = len(data.train) // 50

    def last(model: nn.Module, data: Dataset) -> float:
        return evaluate(model.network, data.val).accuracy  # type: ignore[arg-type]

    def mean(model: nn.Module, data: Dataset) -> float:
        return evaluate(normed(copy.deepcopy(model.average), data), data.val).accuracy  # type: ignore[arg-type]

    watched = replace(recipe, watch={"last": last, "mean": mean})
    following = mg.following(watched, model, start=EPOCHS // 2 * steps, every=steps // 4)
    history = fit(model, data, following, seed=seed, progress=False)
    return {
        "last": evaluate(model.network, data.test).accuracy,
        "mean": evaluate(normed(model.average, data), data.test).accuracy,
        "curve_last": history["last"],
        "curve_mean": history["mean"],
    }


def decayed_run(data: Dataset, seed: int) -> dict[str, float]:
    """The same steps with a cosine to zero."""
    found = evaluate(trained(fresh(network, sgd(EPOCHS), seed=seed), data, sgd(EPOCHS), seed), data.test).accuracy
    return {"last": found, "mean": found}


# --- Growing ----------------------------------------------------------------------------------------------------------


def grown(data: Dataset, seed: int, *, share: float) -> dict[str, float | list[float]]:
    """A narrow network for a share of the multiplications, twice as wide for the rest.

    Each phase has a cosine of its own.
    """
    example = torch.zeros(1, 3, PIXELS, PIXELS)
    small = fresh(partial(network, WIDTH // 2), sgd(1), seed=seed)
    dearer = flops(network(), example) / flops(small, example)
    early, late = round(share * EPOCHS * dearer), round((1 - share) * EPOCHS)
    found: dict[str, float | list[float]] = {"dearer": dearer, "epochs_small": early, "epochs_large": late}
    if early:
        trained(small, data, sgd(early), seed)
        found["small"] = evaluate(small, data.test).accuracy
    if not late:
        return found | {"test": found["small"]}
    if early:
        generator = torch.Generator().manual_seed(seed)
        large: nn.Module = small
        for group in mg.permutation_groups(small):
            large = mg.wider(large, group.name, 2 * group.units, generator=generator, noise=0.05)
        found["begins"] = evaluate(large, data.test).accuracy
    else:
        large = fresh(network, sgd(1), seed=seed)
    recipe = replace(sgd(late), validate_every=1)
    history = fit(large, data, recipe, seed=seed, progress=False)
    return found | {"test": evaluate(large, data.test).accuracy, "curve": history["val_accuracy"]}


GROWING: dict[str, Arm] = {name: partial(grown, share=share) for name, share in SHARES.items()}

STUDY = Study(
    "12",
    "What becomes of residual networks whose weights are merged?",
    {
        "width": Part("Two MLPs from different starts, MNIST, 5,000 labels", digits.some, digits.width_arms(), SEEDS),
        "federated": Part("Ten clients, MNIST, 5,000 labels", digits.some, digits.federated_arms(), SEEDS),
        "halves": Part("Two halves of CIFAR-10 learned apart", many, {"tuned apart": halves}, SEEDS),
        "soups": Part(
            "Eight fine-tunings on 1,000 labels of five classes",
            many,
            {"one start": partial(tuned_from, source=True), "eight starts": partial(tuned_from, source=False)},
            SEEDS,
        ),
        "resnets": Part(
            "Two ResNets from different starts, 5,000 labels",
            some,
            {f"{width} channels": partial(two_starts, width=width) for width in WIDTHS},
            SEEDS,
        ),
        "starts": Part(
            "Two ResNets from a common start, 5,000 labels",
            some,
            {f"{epochs} epochs together": partial(common_start, epochs=epochs) for epochs in TOGETHER},
            SEEDS,
        ),
        "run": Part(
            "Averages along a run, 5,000 labels",
            some,
            {"plain mean": averaged_run, "cosine": decayed_run},
            SEEDS,
        ),
        "growing": Part("From a narrow network to one twice as wide, 5,000 labels", some, GROWING, SEEDS),
    },
)
