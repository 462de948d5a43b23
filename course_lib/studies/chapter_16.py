"""Chapter 16's study: time to accuracy, on two cores.

One run at a time, with all threads, so that its seconds mean something. "combinations": all 64 combinations of the six
rungs on drawn digits; for each, five searches for the shortest run that reaches 93%, and a point more, of the
validation images. "mnist": the recipe that the ladder leads to, one epoch and two. "cifar10": the recipe for
photographs, to about 80%. "wide": the same at the full width of the speed runs, for some minutes. "hour": wider still
and with cutout, as far as an hour reaches; one run, with no interval therefore. "text": a small transformer to 1.9 bits
a character, rung upon rung, each with the length that it needed on the validation text. "script": the network of
PyTorch's MNIST example with Adam at its defaults, tested after each epoch.

Rates and lengths were chosen on validation splits with other seeds than these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

from course_lib.capstone import recipes, rungs, text
from course_lib.capstone.combining import every_set
from course_lib.capstone.networks import example_net
from course_lib.capstone.rules import Entry, Task, accuracy, epochs_needed, run, warm_up
from course_lib.capstone.script import fit_per_image
from course_lib.lab.data import Dataset, load
from course_lib.lab.studies import Part, Study
from course_lib.lab.training import fresh
from course_lib.preprocessing import cutout, on_pixels, random_crop, random_flip
from course_lib.studies import cifar10, mnist

SEEDS = (0, 1, 2, 3, 4)
MANY = tuple(range(20))
TARGET, MARGIN, MOST = 0.93, 0.01, 32
SCRIPT_EPOCHS = 4


def digits() -> Dataset:
    """Drawn digits of 16×16 pixels: 1,000 to train on."""
    return load("glyphs", classes="digits", size=16, difficulty=0.4, train_size=1000, val_size=1000, test_size=2000)


def needed(names: frozenset[str], data: Dataset, seed: int) -> dict[str, float]:
    """The shortest run of a combination that reaches the target with this seed; ``reached`` is 0 if none does."""
    entry, task = rungs.applied(names), Task(data, TARGET)
    warm_up(entry, task)
    found = epochs_needed(entry, task, (100 + seed,), margin=MARGIN, most=MOST)
    if found is None:
        longest = run(entry.lasting(MOST), task, 100 + seed, split="val")
        return {"epochs": float(MOST), "seconds": longest.seconds, "accuracy": longest.score, "reached": 0.0}
    return {
        "epochs": float(found.epochs),
        "seconds": found.seconds,
        "accuracy": found.score,
        "reached": 1.0,
    }


def by_the_script(data: Dataset, seed: int) -> dict[str, float | list[float]]:
    """The first script on MNIST: seconds and accuracy on the test images after each epoch."""
    entry = rungs.first_script().lasting(SCRIPT_EPOCHS)
    model = fresh(lambda: example_net(data.input_shape, len(data.classes)), entry.recipe, seed=seed)
    seconds, tested = [], []

    def note(so_far: float) -> None:
        seconds.append(so_far)
        tested.append(accuracy(model, data.test))

    fit_per_image(model, data, entry.recipe, seed=seed, after_epoch=note)
    epochs = [float(epoch) for epoch in range(1, SCRIPT_EPOCHS + 1)]
    return {"seconds in all": seconds[-1], "epoch": epochs, "seconds": seconds, "accuracy": tested}


@lru_cache(maxsize=1)
def whole_mnist() -> Dataset:
    """50,000 images to train on, 10,000 to test on."""
    return mnist(50_000)


def timed(entry: Entry, data: Dataset, seed: int) -> dict[str, float]:
    """One run by the rules."""
    task = Task(data, target=0.0)
    warm_up(entry, task)
    found = run(entry, task, seed)
    return {"seconds": found.seconds, "accuracy": found.score}


def photographs(data: Dataset, seed: int, *, epochs: int) -> Mapping[str, float]:
    """The recipe for photographs."""
    return timed(recipes.cifar10(data, epochs=epochs), data, seed)


def further(data: Dataset, seed: int, *, widths: Sequence[int], epochs: int, hide: int = 0) -> Mapping[str, float]:
    """The recipe for photographs with more channels; ``hide``: the side of the square that cutout blacks out."""
    entry = recipes.cifar10(data, widths=widths, epochs=epochs)
    if hide:
        shifted = on_pixels(data.train, partial(random_crop, padding=2), random_flip, partial(cutout, size=hide))
        entry = replace(entry, recipe=replace(entry.recipe, augment=shifted))
    return timed(entry, data, seed)


@lru_cache(maxsize=1)
def all_photographs() -> Dataset:
    """CIFAR-10 in 32×32 pixels."""
    return cifar10(41_667)


def written(name: str, data: Dataset, seed: int) -> dict[str, float]:
    """One run of the text's ladder up to a rung."""
    entry = text.up_to(name)
    task = Task(data, text.TARGET, text.bits, lower_is_better=True)
    warm_up(entry, task)
    found = run(entry, task, seed)
    return {"seconds": found.seconds, "bits": found.score, "epochs": float(entry.recipe.epochs)}


def some_text() -> Dataset:
    """The documentation of torch's functions in stretches of 64 characters."""
    return text.windows(text.documentation())


STUDY = Study(
    "16",
    "How fast to the target?",
    {
        "combinations": Part(
            "Drawn digits to 93%, every combination of six rungs",
            digits,
            {name: partial(needed, names) for name, names in every_set().items()},
            SEEDS,
        ),
        "mnist": Part(
            "MNIST, the recipe",
            whole_mnist,
            {
                "one epoch": partial(timed, recipes.mnist()),
                "two epochs": partial(timed, recipes.mnist(epochs=2)),
            },
            MANY,
        ),
        "cifar10": Part(
            "CIFAR-10",
            all_photographs,
            {"three epochs": partial(photographs, epochs=3), "four epochs": partial(photographs, epochs=4)},
            SEEDS,
        ),
        "wide": Part(
            "CIFAR-10, the speed runs' width",
            all_photographs,
            {"six epochs": partial(further, widths=(64, 256, 256), epochs=6)},
            SEEDS,
        ),
        "hour": Part(
            "CIFAR-10, an hour of two cores",
            all_photographs,
            {"thirty-four epochs": partial(further, widths=(128, 384, 384), epochs=34, hide=12)},
            (0,),
        ),
        "text": Part(
            "Text to 1.9 bits a character of validation text, rung upon rung",
            some_text,
            {name: partial(written, name) for name in text.LENGTHS},
            SEEDS,
        ),
        "script": Part("MNIST, the first script", whole_mnist, {"first script": by_the_script}, SEEDS),
    },
    alone=True,
)
