"""Chapter 13's study: five classes of photographs that help, or do not, with five others.

CIFAR-10 at 16×16 pixels and ResNets of 16, 32 and 64 channels, as in chapter 12's study. The source are 2,500 images of
each of five classes, the target the five others, of which each class has 2 to 250 labels. Each way of training takes
the same 150 steps of SGD with momentum and a cosine, on flipped and shifted images; its rate is chosen among four on
the 500 validation images of the target, for each number of labels anew. Each seed has its own source network and its
own labels. Float32.

"labels": what a source network brings, and how much of it may move. "sources": what else one can train on, most of it
without a label; the classes of "labels", too. "domains" is in ``chapter_13_domains.py``, "looks" in
``chapter_13_looks.py``, "numbers" and "handwriting" in ``chapter_13_vit.py``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from course_lib import transfer
from course_lib.lab.data import Dataset, load
from course_lib.lab.files import replaced
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import thaw
from course_lib.lab.runtime import data_folder
from course_lib.lab.studies import Arm, Part, Study
from course_lib.lab.training import Diverged, Recipe, evaluate, fit, fresh
from course_lib.studies import chapter_13_domains as domains
from course_lib.studies import chapter_13_looks as looks
from course_lib.studies import chapter_13_vit as few_numbers
from course_lib.studies.chapter_12 import PIXELS, SOURCE, TARGET, flipped_and_shifted, images, network, of_classes, sgd

SEEDS = (0, 1, 2, 3, 4)
IMAGES, LABELS, STEPS = 25_000, (2, 10, 50, 250), 150
RATES, LARGE_RATES, LARGEST_RATES = (0.003, 0.01, 0.03, 0.1), (0.01, 0.03, 0.1, 0.3), (0.03, 0.1, 0.3, 1.0)
"""For a trained network's weights; for random ones and for updates of low rank; for biases."""
EPOCHS = {"classes": 10, "rotations": 5, "contrast": 12, "own average": 12, "drawn letters": 10}
SOURCES_AT = (10, 50)
RANK = 4


def data() -> Dataset:
    """25,000 images, 2,500 of each class."""
    return images(IMAGES)


@lru_cache(maxsize=2)
def letters() -> Dataset:
    """Drawn letters in colour, as many as the source has images."""
    return load("glyphs", classes="letters", size=PIXELS, domain="colour", train_size=12_500, val_size=26, test_size=26)


# --- Sources ----------------------------------------------------------------------------------------------------------


def by_classes(whole: Dataset, seed: int) -> nn.Module:
    """Trained on the source's labels."""
    recipe = sgd(EPOCHS["classes"])
    model = fresh(partial(network, classes=5), recipe, seed=seed)
    fit(model, of_classes(whole, SOURCE), recipe, seed=seed, progress=False)
    return model


def by_rotations(whole: Dataset, seed: int) -> nn.Module:
    """Trained to tell which way is up."""
    recipe = replace(sgd(EPOCHS["rotations"]), objective=transfer.rotation)
    model = transfer.WithRotations(fresh(network, recipe, seed=seed), generator=torch.Generator().manual_seed(seed))
    fit(model, of_classes(whole, SOURCE), recipe, seed=seed, progress=False)
    return transfer.bare(model)


def distorted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Another view: flipped, shifted by up to four pixels, brighter or darker, with more or less contrast."""
    moved = flipped_and_shifted(flipped_and_shifted(x, generator), generator)
    contrast, light = (
        torch.rand(len(x), 1, 1, 1, generator=generator).to(x.device) * 0.8 + offset for offset in (0.6, -0.4)
    )
    return moved * contrast + light


def by_contrast(whole: Dataset, seed: int) -> nn.Module:
    """Trained to find an image's other view among others (SimCLR)."""
    recipe = replace(sgd(EPOCHS["contrast"]), batch_size=100, augment=None)
    recipe = replace(recipe, objective=partial(transfer.simclr, view=distorted))
    model = transfer.WithProjection(fresh(network, recipe, seed=seed), generator=torch.Generator().manual_seed(seed))
    fit(model, of_classes(whole, SOURCE), recipe, seed=seed, progress=False)
    return transfer.bare(model)


def by_own_average(whole: Dataset, seed: int) -> nn.Module:
    """Trained to foretell what its own moving average says of another view (BYOL)."""
    recipe = replace(sgd(EPOCHS["own average"]), batch_size=100, augment=None)
    recipe = replace(recipe, objective=partial(transfer.byol, view=distorted))
    model = transfer.WithTarget(fresh(network, recipe, seed=seed), generator=torch.Generator().manual_seed(seed))
    fit(model, of_classes(whole, SOURCE), transfer.following_target(recipe, model), seed=seed, progress=False)
    return transfer.bare(model)


def by_letters(whole: Dataset, seed: int) -> nn.Module:
    """Trained to read drawn letters."""
    recipe = sgd(EPOCHS["drawn letters"])
    model = fresh(partial(network, classes=26), recipe, seed=seed)
    fit(model, letters(), recipe, seed=seed, progress=False)
    return model


def untrained(whole: Dataset, seed: int) -> nn.Module:
    """Not trained at all."""
    return fresh(network, sgd(1), seed=seed)


SOURCES: Mapping[str, Callable[[Dataset, int], nn.Module]] = {
    "classes": by_classes,
    "rotations": by_rotations,
    "contrast": by_contrast,
    "own average": by_own_average,
    "drawn letters": by_letters,
    "none": untrained,
}


def source(name: str, whole: Dataset, seed: int) -> nn.Module:
    """A source network; its weights are kept beside the data, since several arms need them."""
    identity = fingerprint((SOURCES[name], EPOCHS.get(name), seed, IMAGES, torch.__version__))
    file = data_folder() / "cache" / f"chapter_13_source_{identity}.pt"
    if file.exists():
        model: nn.Module = torch.load(file, weights_only=False)
        return model
    model = SOURCES[name](whole, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replaced(file) as written:
        torch.save(model, written)
    return model


# --- Ways to use one --------------------------------------------------------------------------------------------------


def few(whole: Dataset, seed: int, each: int) -> Dataset:
    """The target with so many labels a class, drawn by the seed."""
    target = of_classes(whole, TARGET)
    order = torch.randperm(len(target.train), generator=torch.Generator().manual_seed(seed))
    labels = target.train.labels[order]
    kept = torch.cat([order[labels == k][:each] for k in range(len(TARGET))])
    return replace(target, train=target.train.subset(kept))


def steps(count: int, lr: float) -> Recipe:
    """150 steps, or a few more: whole epochs."""
    batch = min(50, count)
    epochs = -(-STEPS // -(-count // batch))
    return replace(sgd(epochs, lr), batch_size=batch, validate_every=epochs)


Way = Callable[[nn.Module, Dataset, Recipe, int], tuple[nn.Module, Recipe]]
"""``(source, target, recipe, seed) -> (network to train, recipe)``."""


def headed(model: nn.Module, target: Dataset, seed: int) -> nn.Module:
    """A trainable copy with a new head."""
    generator = torch.Generator().manual_seed(seed)
    return thaw(transfer.with_head(model, len(target.classes), generator=generator))


def from_scratch(model: nn.Module, target: Dataset, recipe: Recipe, seed: int) -> tuple[nn.Module, Recipe]:
    return fresh(partial(network, classes=5), recipe, seed=seed), recipe


def all_weights(model: nn.Module, target: Dataset, recipe: Recipe, seed: int) -> tuple[nn.Module, Recipe]:
    return headed(model, target, seed), recipe


def probe_first(model: nn.Module, target: Dataset, recipe: Recipe, seed: int) -> tuple[nn.Module, Recipe]:
    return transfer.with_probe(thaw(model), probed(model, target)), recipe


def near_the_start(model: nn.Module, target: Dataset, recipe: Recipe, seed: int) -> tuple[nn.Module, Recipe]:
    held = partial(transfer.l2_sp, start=transfer.starting_point(model), alpha=0.1, beta=0.01)
    return headed(model, target, seed), replace(recipe, objective=held)


def slower_below(model: nn.Module, target: Dataset, recipe: Recipe, seed: int) -> tuple[nn.Module, Recipe]:
    return headed(model, target, seed), transfer.discriminative_rates(recipe, model, decay=0.5)


def last_first(model: nn.Module, target: Dataset, recipe: Recipe, seed: int) -> tuple[nn.Module, Recipe]:
    each = max(1, recipe.epochs // 6)
    return headed(model, target, seed), transfer.gradual_unfreezing(recipe, model, target, epochs_each=each)


def biases(model: nn.Module, target: Dataset, recipe: Recipe, seed: int) -> tuple[nn.Module, Recipe]:
    return transfer.bitfit(headed(model, target, seed)), recipe


def low_rank(model: nn.Module, target: Dataset, recipe: Recipe, seed: int) -> tuple[nn.Module, Recipe]:
    generator = torch.Generator().manual_seed(seed)
    own = transfer.lora(headed(model, target, seed), RANK, 2.0 * RANK, ["stem.*", "stages.*"], generator=generator)
    return own, recipe


def probed(model: nn.Module, target: Dataset) -> transfer.Probe:
    """A logistic regression on the features, standardised by the strength of its penalty alone."""
    return transfer.probe(transfer.features(model, target.train), target.train.labels, C=0.1)


WAYS: Mapping[str, tuple[Way, tuple[float, ...]]] = {
    "from scratch": (from_scratch, LARGE_RATES),
    "all weights": (all_weights, RATES),
    "probe, then all": (probe_first, RATES),
    "near the start": (near_the_start, RATES),
    "slower below": (slower_below, RATES),
    "last layers first": (last_first, RATES),
    "biases": (biases, LARGEST_RATES),
    "LoRA": (low_rank, LARGE_RATES),
}


def tuned(model: nn.Module, target: Dataset, seed: int, way: Way, rates: tuple[float, ...]) -> tuple[float, float, int]:
    """Test accuracy at the rate that is best on the validation split, that rate, and how many numbers trained.

    A rate at which training diverges is out.
    """
    best = (-1.0, 0.0, 0.0, 0)
    for lr in rates:
        made, recipe = way(model, target, steps(len(target.train), lr), seed)
        numbers = transfer.trainable(made)
        try:
            fit(made, target, recipe, seed=seed, progress=False)
        except Diverged:
            continue
        found = evaluate(made, target.val).accuracy
        if found > best[0]:
            best = (found, evaluate(made, target.test).accuracy, lr, numbers)
    return best[1:]


def with_labels(whole: Dataset, seed: int, *, way: Way, rates: tuple[float, ...]) -> dict[str, float]:
    """One way of using the source's classes, for every number of labels."""
    model, found = source("classes", whole, seed), dict[str, float]()
    for each in LABELS:
        found[f"{each}"], found[f"rate, {each}"], numbers = tuned(model, few(whole, seed, each), seed, way, rates)
        found["numbers"] = float(numbers)
    return found


def probe_with_labels(whole: Dataset, seed: int) -> dict[str, float]:
    """The head alone."""
    model, found = source("classes", whole, seed), dict[str, float]()
    for each in LABELS:
        target = few(whole, seed, each)
        seen = transfer.features(model, target.test)
        found[f"{each}"] = probed(model, target).accuracy(seen, target.test.labels)
    return found | {"numbers": float(5 * (seen.shape[1] + 1))}


def from_source(whole: Dataset, seed: int, *, name: str) -> dict[str, float]:
    """A source probed and tuned, and what could have been known of it beforehand."""
    model, found = source(name, whole, seed), dict[str, float]()
    own = transfer.features(source("classes", whole, seed), few(whole, seed, 250).train)
    for each in SOURCES_AT:
        target = few(whole, seed, each)
        seen, held = (transfer.features(model, split) for split in (target.train, target.test))
        found[f"probe, {each}"] = probed(model, target).accuracy(held, target.test.labels)
        found[f"tuned, {each}"], *_ = tuned(model, target, seed, probe_first, RATES)
        found[f"logme, {each}"] = transfer.logme(seen, target.train.labels)
    found["cka"] = transfer.linear_cka(transfer.features(model, few(whole, seed, 250).train), own)
    curve = transfer.probe_curve(model, few(whole, seed, 250).train, target.test, C=0.1)
    return found | {f"layer {place}": value for place, value in enumerate(curve.values())}


def label_arms() -> dict[str, Arm]:
    """One arm a way."""
    arms: dict[str, Arm] = {"probe": probe_with_labels}
    return arms | {name: partial(with_labels, way=way, rates=rates) for name, (way, rates) in WAYS.items()}


STUDY = Study(
    "13",
    "What do five classes of photographs bring to five others?",
    {
        "labels": Part("Five other classes, 2 to 250 labels each", data, label_arms(), SEEDS),
        "sources": Part(
            "Sources with and without labels", data, {name: partial(from_source, name=name) for name in SOURCES}, SEEDS
        ),
        "domains": Part("Drawn digits with labels, real ones without", domains.real, domains.arms(), SEEDS),
        "looks": Part("Drawn digits with labels, others drawn without", domains.drawn, looks.arms(), SEEDS),
        "numbers": Part("How few numbers of a transformer have to train", domains.real, few_numbers.arms(), SEEDS),
        "handwriting": Part("Who needs a source", few_numbers.handwritten, few_numbers.kinds(), SEEDS),
    },
)
