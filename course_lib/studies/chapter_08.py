"""Chapter 8's study: criteria, schedules and sizes on a residual network and CIFAR-10.

A ResNet of 8, 16 and 32 channels learns 10,000 images for eight epochs. Then weights go, by each criterion and to each
sparsity, at once, and it trains on for two epochs; or in two rounds, with one epoch after each: the same number of
epochs in all. (Wanda's scores are compared within each output, as its authors do: they scale with the inputs of their
layer, and ranked over the whole network they emptied one.) Beside it stands a network of half as many channels from
the start, trained for all ten epochs, and the large one cut down to its size, channel by channel. Float32, batch size
100, momentum 0.9.
"""

import copy
from collections.abc import Mapping
from functools import lru_cache, partial

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from course_lib import pruning
from course_lib.lab.data import Dataset, batches
from course_lib.lab.models import resnet
from course_lib.lab.studies import Part, Study
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.pruning.criteria import Criterion
from course_lib.pruning.patterns import Scores
from course_lib.pruning.schedules import Pattern
from course_lib.studies import cifar10

SEEDS = (0, 1, 2, 3, 4)
SPARSITIES = (0.9, 0.97)
WIDTH, HALF = 8, 4


def cosine(optimizer: Optimizer, steps: int) -> CosineAnnealingLR:
    """From the peak to zero along half a cosine."""
    return CosineAnnealingLR(optimizer, steps)


def sgd(lr: float, epochs: int) -> Recipe:
    """Momentum, from this rate down to zero."""
    optimizer = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    return Recipe(epochs=epochs, batch_size=100, optimizer=optimizer, schedule=cosine, validate_every=epochs)


DENSE, AFTERWARDS, ONE_ROUND, FROM_THE_START = sgd(0.1, 8), sgd(0.02, 2), sgd(0.02, 1), sgd(0.1, 10)


def small_cifar10() -> Dataset:
    """10,000 labels."""
    return cifar10(10_000)


def network(width: int = WIDTH) -> nn.Module:
    """Three stages of one block each."""
    return resnet((3, 32, 32), 10, width=width)


@lru_cache(maxsize=2)
def dense(data: Dataset, seed: int) -> nn.Module:
    """The trained large network; kept, since all arms begin with it."""
    model = fresh(network, DENSE, seed=seed)
    fit(model, data, DENSE, seed=seed, progress=False)
    return model


def sample(data: Dataset, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ten batches for criteria that look at data."""
    order = torch.Generator().manual_seed(seed)
    return [batch for _, batch in zip(range(10), batches(data.train, 100, generator=order), strict=False)]


def random_choice(model: nn.Module, data: object, *, seed: int) -> Scores:
    """What the others must beat."""
    return pruning.random_scores(model, generator=torch.Generator().manual_seed(seed))


def at_once(
    data: Dataset, seed: int, *, criterion: Criterion, pattern: Pattern = pruning.global_unstructured
) -> Mapping[str, float]:
    """Test accuracy at each sparsity, pruned in one step, two epochs later."""
    found = {"0": evaluate(dense(data, seed), data.test).accuracy}
    for sparsity in SPARSITIES:
        model = copy.deepcopy(dense(data, seed))
        pruning.one_shot(model, sample(data, seed), sparsity=sparsity, criterion=criterion, pattern=pattern)
        fit(model, data, AFTERWARDS, seed=1000 + seed, progress=False)
        found[f"{sparsity:g}"] = evaluate(model, data.test).accuracy
    return found


def at_once_by_chance(data: Dataset, seed: int) -> Mapping[str, float]:
    """The same with scores drawn by chance, other ones for each seed."""
    return at_once(data, seed, criterion=partial(random_choice, seed=seed))


def in_rounds(data: Dataset, seed: int) -> Mapping[str, float]:
    """Test accuracy at each sparsity, pruned by magnitude in two rounds, an epoch after each."""
    found = {"0": evaluate(dense(data, seed), data.test).accuracy}
    for sparsity in SPARSITIES:
        model = copy.deepcopy(dense(data, seed))
        for k in (1, 2):
            pruning.one_shot(model, None, sparsity=1 - (1 - sparsity) ** (k / 2))
            fit(model, data, ONE_ROUND, seed=1000 * k + seed, progress=False)
        found[f"{sparsity:g}"] = evaluate(model, data.test).accuracy
    return found


def small_from_the_start(data: Dataset, seed: int) -> float:
    """Test accuracy of a network of half the channels, trained for all ten epochs."""
    model = fresh(partial(network, HALF), FROM_THE_START, seed=seed)
    fit(model, data, FROM_THE_START, seed=seed, progress=False)
    return evaluate(model, data.test).accuracy


def cut_down(data: Dataset, seed: int) -> float:
    """Test accuracy of the large network cut down to as many channels, two epochs later."""
    model, example = copy.deepcopy(dense(data, seed)), torch.zeros(2, 3, 32, 32)
    pruning.prune_channels(model, example, sparsity=1 - HALF / WIDTH)
    small = pruning.shrink(model, example)
    fit(small, data, AFTERWARDS, seed=1000 + seed, progress=False)
    return evaluate(small, data.test).accuracy


def large(data: Dataset, seed: int) -> float:
    """Test accuracy of the large network, trained on for the same two epochs."""
    model = copy.deepcopy(dense(data, seed))
    fit(model, data, AFTERWARDS, seed=1000 + seed, progress=False)
    return evaluate(model, data.test).accuracy


STUDY = Study(
    "08",
    "Which criterion, which schedule, and is it better to cut a network down or to begin with a small one?",
    {
        "criteria": Part(
            "ResNet of 8, 16, 32 channels on CIFAR-10 with 10,000 labels",
            small_cifar10,
            {
                "magnitude": partial(at_once, criterion=pruning.magnitude),
                "in two rounds": in_rounds,
                "Taylor": partial(at_once, criterion=pruning.taylor),
                "Wanda": partial(at_once, criterion=pruning.wanda, pattern=pruning.per_row),
                "by chance": at_once_by_chance,
            },
            SEEDS,
        ),
        "sizes": Part(
            "ResNets on CIFAR-10 with 10,000 labels, 10 epochs in all",
            small_cifar10,
            {"cut down": cut_down, "small from the start": small_from_the_start, "large": large},
            SEEDS,
        ),
    },
)
