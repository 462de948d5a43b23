"""Two parts of chapter 13's study: how few numbers of a transformer have to train, and who needs a source at all.

"numbers": a small vision transformer learnt 10,000 letters drawn as in chalk, and is now to read real digits: MNIST at
16×16 pixels, with 10 or 100 labels a class. Each way takes 100 steps of AdamW with a cosine, at a rate that is chosen
among three on 1,000 validation images; each seed has its own source and its own labels.

"handwriting": the 1,797 handwritten digits of scikit-learn, 8×8 pixels, after letters in chalk, shrunk to that size;
a convolutional network and a transformer, each from scratch and in four ways from its own source, with 1 to 100 labels
a class. The same optimizer, steps and number of rates. Float32.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from course_lib import schedules, transfer
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet, freeze, thaw, vit
from course_lib.lab.studies import Arm
from course_lib.lab.training import Diverged, Recipe, evaluate, fit, fresh
from course_lib.studies.chapter_13_domains import PIXELS, alike

LETTERS, EPOCHS, STEPS, LABELS = 10_000, 10, 100, (10, 100)
RATES, LARGE_RATES = (0.001, 0.003, 0.01), (0.01, 0.03, 0.1)
PARTS = ("blocks.*",)  # all matrices of all blocks
APART = 1_000  # the seed of a network from scratch is this far away


def network(classes: int = 10) -> nn.Module:
    """16 tokens of 64 numbers, four blocks."""
    return vit((1, PIXELS, PIXELS), classes, patch=4, width=64, heads=4, depth=4)


def adamw(epochs: int, lr: float, batch_size: int = 50) -> Recipe:
    """AdamW, a cosine to zero."""
    return Recipe(
        epochs=epochs,
        batch_size=batch_size,
        optimizer=partial(torch.optim.AdamW, lr=lr),
        schedule=schedules.schedule(schedules.cosine),
        validate_every=epochs,
    )


def letters() -> Dataset:
    """The source."""
    chalk = partial(load, "glyphs", classes="letters", size=PIXELS, domain="chalk", difficulty=0.3)
    return alike(chalk(train_size=LETTERS, val_size=26, test_size=2_000))


def few(target: Dataset, seed: int, each: int) -> Dataset:
    """So many labels a class, drawn by the seed."""
    order = torch.randperm(len(target.train), generator=torch.Generator().manual_seed(seed))
    labels = target.train.labels[order]
    kept = torch.cat([order[labels == k][:each] for k in range(len(target.classes))])
    return replace(target, train=target.train.subset(kept))


Way = Callable[[nn.Module, torch.Generator], nn.Module]
"""A network with a new head -> what is trained."""
WAYS: dict[str, tuple[Way, tuple[float, ...]]] = {
    "head alone": (lambda model, generator: transfer.with_head(freeze(model), 10, generator=generator), LARGE_RATES),
    "prompts": (lambda model, generator: transfer.with_prompts(model, 4, generator=generator), LARGE_RATES),
    "deep prompts": (lambda model, generator: transfer.with_deep_prompts(model, 4, generator=generator), LARGE_RATES),
    "biases": (lambda model, generator: transfer.bitfit(model), LARGE_RATES),
    "LoRA, rank 1": (lambda model, generator: transfer.lora(model, 1, 2.0, PARTS, generator=generator), LARGE_RATES),
    "LoRA, rank 4": (lambda model, generator: transfer.lora(model, 4, 8.0, PARTS, generator=generator), LARGE_RATES),
    "LoRA, rank 16": (lambda model, generator: transfer.lora(model, 16, 32.0, PARTS, generator=generator), LARGE_RATES),
    "adapters": (lambda model, generator: transfer.with_adapters(model, 8, generator=generator), LARGE_RATES),
    "all weights": (lambda model, generator: model, RATES),
}


def numbers(whole: Dataset, seed: int, *, each: int) -> dict[str, float]:
    """Every way, from one source network and with the same labels; and from scratch."""
    first = adamw(EPOCHS, 0.002)
    source = fresh(partial(network, 26), first, seed=seed)
    drawn, target = letters(), few(whole, seed, each)
    fit(source, drawn, first, seed=seed, progress=False)
    found: dict[str, float] = {"source": evaluate(source, drawn.test).accuracy}
    seen, held = (transfer.features(source, split) for split in (target.train, target.test))
    found["probe"] = transfer.probe(seen, target.train.labels, C=0.1).accuracy(held, target.test.labels)

    def made(name: str, seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        if name == "from scratch":
            return fresh(network, first, seed=seed + APART)
        return WAYS[name][0](thaw(transfer.with_head(source, 10, generator=generator)), generator)

    tried = {name: rates for name, (_, rates) in WAYS.items()} | {"from scratch": RATES}
    for name, rates in tried.items():
        best = -1.0
        for lr in rates:
            model = made(name, seed)
            epochs = -(-STEPS // -(-len(target.train) // 50))
            try:
                fit(model, target, adamw(epochs, lr, min(50, len(target.train))), seed=seed, progress=False)
            except Diverged:
                continue
            held_out = evaluate(model, target.val).accuracy
            if held_out > best:
                best, found[name] = held_out, evaluate(model, target.test).accuracy
                found[f"{name}, rate"], found[f"{name}, numbers"] = lr, float(transfer.trainable(model))
    return found


def arms() -> dict[str, Arm]:
    """One arm a number of labels: all ways share its source network."""
    return {f"{each} labels": partial(numbers, each=each) for each in LABELS}


# --- Handwriting ------------------------------------------------------------------------------------------------------

SHOTS, SMALL = (1, 3, 10, 30, 100), (1, 8, 8)


def handwritten() -> Dataset:
    """Real digits of 8×8 pixels."""
    return alike(load("digits"))


def small_letters() -> Dataset:
    """Letters of 16×16 pixels, shrunk by means of four."""
    large = letters()
    return large.with_inputs(lambda x: F.avg_pool2d(x.float(), 2).round().to(torch.uint8))


KINDS: dict[str, Callable[[int], nn.Module]] = {
    "convnet": lambda classes: convnet(SMALL, classes, width=16),
    "transformer": lambda classes: vit(SMALL, classes, patch=2, width=32, heads=4, depth=3),
}
RANK = 4


def handwriting(whole: Dataset, seed: int, *, kind: str) -> dict[str, float]:
    """One architecture, from scratch and from letters, for every number of labels."""
    first, make = adamw(EPOCHS, 0.003), KINDS[kind]
    source = fresh(partial(make, 26), first, seed=seed)
    fit(source, small_letters(), first, seed=seed, progress=False)
    found: dict[str, float] = {"source": evaluate(source, small_letters().test).accuracy}
    for each in SHOTS:
        target = few(whole, seed, each)
        held = transfer.features(source, whole.test)
        probe = transfer.probe(transfer.features(source, target.train), target.train.labels, C=0.1, classes=10)
        found[f"probe, {each}"] = probe.accuracy(held, whole.test.labels)
        starts = {
            "from scratch": (fresh(partial(make, 10), first, seed=seed + APART), RATES),
            "all weights": (thaw(transfer.with_head(source, 10, generator=torch.Generator().manual_seed(seed))), RATES),
            "probe, then all": (transfer.with_probe(thaw(copy.deepcopy(source)), probe), RATES),
            "LoRA": (_low_rank(source, seed), LARGE_RATES),
        }
        for name, (start, rates) in starts.items():
            found[f"{name}, {each}"] = _best(start, rates, target, seed)
    return found


def _low_rank(source: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    return transfer.lora(transfer.with_head(source, 10, generator=generator), RANK, 2.0 * RANK, generator=generator)


def _best(start: nn.Module, rates: tuple[float, ...], target: Dataset, seed: int) -> float:
    """Test accuracy of a copy at the rate that is best on the validation split."""
    best, result = -1.0, math.nan
    size = min(20, len(target.train))
    for lr in rates:
        model = copy.deepcopy(start)
        try:
            fit(model, target, adamw(-(-STEPS // -(-len(target.train) // size)), lr, size), seed=seed, progress=False)
        except Diverged:
            continue
        held_out = evaluate(model, target.val).accuracy
        if held_out > best:
            best, result = held_out, evaluate(model, target.test).accuracy
    return result


def kinds() -> dict[str, Arm]:
    """One arm an architecture."""
    return {kind: partial(handwriting, kind=kind) for kind in KINDS}
