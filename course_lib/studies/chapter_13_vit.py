"""A part of chapter 13's study: how few numbers of a transformer have to train.

A small vision transformer learnt 10,000 letters drawn as in chalk, and is now to read real digits: MNIST at 16×16
pixels, with 10 or 100 labels a class. Each way takes 100 steps of AdamW with a cosine, at a rate that is chosen among
three on 1,000 validation images; each seed has its own source and its own labels. Float32.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from course_lib import schedules, transfer
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import freeze, thaw, vit
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
