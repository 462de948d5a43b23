"""Chapter 17's study: how the loss falls with parameters and examples, and what the small runs say of the large ones.

Drawn letters and digits of 16×16 pixels, 36 classes of which some cannot be told apart (O and 0), an MLP with two
hidden layers in muP, Adam, batches of 64, a short warm-up and a cosine to zero. "grid": seven widths times six
numbers of examples, each seen once. "repeated": 16,384 examples seen up to sixteen times, to be compared with as many
that are all new. The rate of every arm is chosen among six a factor of two apart, on the validation split, with two
other seeds. Each seed has its own weights, its own examples where they are few, and its own order. Float32.
"""

from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch.optim import Adam

from course_lib import schedules
from course_lib.lab.data import Dataset, Split
from course_lib.lab.data.dataset import statistics
from course_lib.lab.glyphs import CLASSES, generate
from course_lib.lab.models import MLP
from course_lib.lab.studies import Part, Study, Tuned
from course_lib.lab.training import Recipe, evaluate, fit, fresh

PIXELS, DIFFICULTY = 16, 0.5
WIDTHS = (8, 16, 32, 64, 128, 256, 512)
EXAMPLES = tuple(2**k for k in range(13, 19))  # 8,192 to 262,144
BLOCK, BLOCKS = EXAMPLES[0], EXAMPLES[-1] // EXAMPLES[0]  # examples are drawn, and given out, in blocks
BASE_WIDTH = 64
RATES = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)
PASSES, UNIQUE, REPEATING_WIDTH = (2, 4, 8, 16), 16_384, 128
TUNING, SEEDS = (100, 101), (0, 1, 2, 3, 4)


def block(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one block of training examples: images and labels."""
    return generate(BLOCK, size=PIXELS, seed=(17, number), difficulty=DIFFICULTY)


@lru_cache(maxsize=1)
def glyphs(blocks: int = BLOCKS) -> Dataset:
    """All blocks one after the other; 4,000 images to validate and 10,000 to test."""
    drawn = [block(k) for k in range(blocks)]
    images = torch.from_numpy(np.concatenate([x for x, _ in drawn]))
    mean, std = statistics(torch.from_numpy(drawn[0][0]))  # of the first block, however many there are
    others = (generate(n, size=PIXELS, seed=(18, n), difficulty=DIFFICULTY) for n in (4000, 10_000))
    val, test = (Split(torch.from_numpy(x), torch.from_numpy(y), mean, std) for x, y in others)
    train = Split(images, torch.from_numpy(np.concatenate([y for _, y in drawn])), mean, std)
    return Dataset("glyphs, 36 classes", train, val, test, tuple(CLASSES["all"]))


def some(data: Dataset, examples: int, seed: int) -> Dataset:
    """So many examples, from the block on that has the seed's number; where it ends, they go on from the first."""
    start = (seed % (len(data.train) // BLOCK)) * BLOCK
    return replace(data, train=data.train.subset((start + torch.arange(examples)) % len(data.train)))


def network(width: int) -> MLP:
    """Two hidden layers, in muP: one rate is meant to suit all widths."""
    return schedules.mup_mlp((1, PIXELS, PIXELS), len(CLASSES["all"]), width=width, base_width=BASE_WIDTH)


def trained(data: Dataset, seed: int, *, width: int, examples: int, lr: float, passes: int = 1) -> dict[str, float]:
    """Train on ``examples`` once, or ``passes`` times; loss (nats) and accuracy on the test split."""
    few = some(data, examples, seed)
    factors = schedules.mup_adam(network(width))
    recipe = Recipe(
        epochs=passes,
        batch_size=64,
        optimizer=lambda named: Adam([{"params": [p], "lr": lr * factors[name]} for name, p in named]),
        schedule=schedules.schedule(schedules.warm_up, warmup=0.05, then=schedules.cosine),
        validate_every=passes,
    )
    model = fresh(partial(network, width), recipe, seed=seed)
    history = fit(model, few, recipe, seed=seed, progress=False)
    found = evaluate(model, data.test)
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "parameters": sum(p.numel() for p in model.parameters()),
        "val_accuracy": history["val_accuracy"][-1],
    }


def rates(width: int, examples: int, passes: int = 1) -> Tuned:
    """Choose among the rates."""
    run = partial(trained, width=width, examples=examples, passes=passes)
    return Tuned({f"{lr:g}": partial(run, lr=lr) for lr in RATES}, TUNING)


def arm(width: int, examples: int) -> str:
    """The name of a run of the grid."""
    return f"width {width}, {examples:,} examples"


GRID = {(width, examples): arm(width, examples) for width in WIDTHS for examples in EXAMPLES}

STUDY = Study(
    chapter="17",
    question="What do small runs say of large ones?",
    parts={
        "grid": Part(
            title="Drawn letters and digits, an MLP of seven widths, six numbers of examples, each seen once",
            data=glyphs,
            arms={name: rates(width, examples) for (width, examples), name in GRID.items()},
            seeds=SEEDS,
        ),
        "repeated": Part(
            title=f"The same, {UNIQUE:,} examples seen several times, width {REPEATING_WIDTH}",
            data=glyphs,
            arms={f"{passes} passes": rates(REPEATING_WIDTH, UNIQUE, passes) for passes in PASSES},
            seeds=SEEDS,
        ),
    },
)
