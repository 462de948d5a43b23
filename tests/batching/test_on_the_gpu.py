"""Every public function on a GPU, or on one that is emulated: the numbers of the CPU, from tensors over there.

Networks are moved, data sets stay here: what takes a data set brings it along. Generators are on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import batching
from course_lib.lab.data import Dataset, Split, load
from course_lib.lab.models import convnet, mlp, resnet
from course_lib.lab.training import Recipe, fit, fresh
from tests.regularization.small import Move, every_name_once, generator, images, normal, on_the_gpu_as_here

SHORT = Recipe(epochs=1, batch_size=20, precision="float64")
ADAM = partial(torch.optim.Adam, lr=0.01)
MLP = partial(mlp, (1, 8, 8), 10, width=6)
CONVNET, RESNET = partial(convnet, (1, 8, 8), 10, width=2), partial(resnet, (1, 8, 8), 10, width=2)
LENGTHS = torch.tensor([3, 9, 4, 4, 8, 1, 2, 9])
CHANCES = torch.tensor([0.1, 0.2, 0.3, 0.4])
ROWS = torch.arange(5)
BUCKETS = [torch.tensor([0, 2]), torch.tensor([1, 7, 4])]


@cache
def digits() -> Dataset:
    return load("digits", train_size=40)


def network(make: Callable[[], nn.Module] = MLP) -> nn.Module:
    return fresh(make, SHORT, seed=0).eval()


def trained(to: Move, recipe: Recipe, make: Callable[[], nn.Module] = MLP, change: Any = lambda m: m) -> list[Tensor]:
    """The weights after a short run that begins there; the data set stays here."""
    model = change(to(network(make)))
    fit(model, digits(), recipe, seed=0)
    return list(model.parameters())


def sampled(to: Move, choose: Callable[[Split], batching.Chooser]) -> list[list[Tensor]]:
    """With the split that is drawn from here, and there."""
    splits = digits().train, to(digits().train)
    return [trained(to, batching.sampled(SHORT, split, choose(split), classes=10)) for split in splits]


def drawn(to: Move) -> list[Tensor]:
    def choose(size: int, generator: torch.Generator) -> batching.Choice:
        return to(torch.randint(40, (size,), generator=generator)), to(torch.linspace(0, 1, size))

    return trained(to, replace(SHORT, augment=batching.drawn_from(digits().train, choose, classes=10)))


def curriculum(to: Move, split: Split) -> batching.Curriculum:
    return batching.Curriculum(batching.loss_scores(to(network()), split), lambda step: 0.5)


def tracked(to: Move) -> list[list[float]]:
    tracker = batching.NoiseScale(0.5)
    recipe = batching.tracked(replace(SHORT, epochs=2, accumulate=4), tracker)
    history = fit(to(network()), digits(), recipe, seed=0)
    return [history[name] for name in ("noise_scale", "gradient_sq", "trace")]


def statistics(to: Move) -> tuple[Tensor, float, float]:
    found = batching.gradient_statistics(to(network(CONVNET)), digits().train, chunk=16)
    return found.mean, found.trace, batching.simple_noise_scale(found)


def accumulated(to: Move) -> tuple[Tensor, ...]:
    model = to(network())
    loss = batching.accumulated_gradient(model, *map(to, images(7)), [3, 4])
    return loss, *(p.grad for p in model.parameters() if p.grad is not None)


def fits(to: Move) -> bool:
    def make(size: int) -> tuple[Tensor, Tensor]:
        x, y = images(size)
        return to(x), to(y)

    return batching.fits_on_device(to(network()), make, ADAM)(4)


def speeds(to: Move) -> list[int]:
    return list(batching.throughput(to(network()), *map(to, images()), [2], rounds=1))


CASES: dict[str, Callable[[Move], Any]] = {
    # noise, tracking
    "per_example_gradients": lambda to: [
        batching.per_example_gradients(to(network()), data, chunk=4) for data in (images(), digits().val.subset(ROWS))
    ],
    "gradient_statistics": statistics,
    "hessian_noise_scale": lambda to: batching.hessian_noise_scale(
        to(network()), digits().train, generator=generator(), draws=2
    ),
    "tracked": tracked,
    # accumulation
    "accumulated_gradient": accumulated,
    "ghost": lambda to: batching.ghost(to(network(partial(resnet, (1, 8, 8), 10, width=2))).train(), 3)(
        to(images()[0])
    ),
    # layerwise, scaling, growing
    "LARS": lambda to: trained(to, replace(SHORT, optimizer=partial(batching.LARS, lr=0.1)), CONVNET),
    "local_rate": lambda to: batching.local_rate(
        to(normal(3, 2)), to(normal(3, 2)), weight_decay=0.1, trust_coefficient=0.1
    ),
    "lars": lambda to: _lars(to(normal(3, 2)), to(normal(3, 2, seed=1)), to(normal(3, 2, seed=2))),
    "rescaled": lambda to: trained(to, batching.rescaled(SHORT, 40, warmup=0.5)),
    "rescaled_adam": lambda to: trained(to, batching.rescaled_adam(replace(SHORT, optimizer=ADAM), 40)),
    "grow_then_decay": lambda to: trained(
        to, batching.grow_then_decay(replace(SHORT, epochs=3, batch_size=10), 40, factor=2, milestones=[1, 2], most=20)
    ),
    # drawing
    "weighted_labels": lambda to: [
        batching.weighted_labels(to(torch.arange(4)), weights, 5) for weights in (CHANCES, to(CHANCES))
    ],
    "drawn_from": drawn,
    "sampled": lambda to: sampled(to, lambda split: batching.Uniform(len(split))),
    "Importance": lambda to: sampled(
        to, lambda split: batching.Importance(split, batching.gradient_norms, every=1, smoothing=0.1)
    ),
    "Curriculum": lambda to: sampled(to, partial(curriculum, to)),
    "hard_examples": lambda to: trained(to, replace(SHORT, objective=batching.hard_examples(keep=0.5))),
    # sampling: scores lie where the split does
    "loss_scores": lambda to: batching.loss_scores(to(network()), to(digits().train)),
    "last_layer_scores": lambda to: batching.last_layer_scores(to(network()), to(digits().train)),
    "gradient_norms": lambda to: batching.gradient_norms(to(network()), to(digits().train)),
    "sampling_variance": lambda to: batching.sampling_variance(to(CHANCES), 0.1, to(CHANCES), 5),
    # bucketing
    "padding": lambda to: [
        batching.padding(to(LENGTHS), BUCKETS),
        batching.padding(LENGTHS, [to(batch) for batch in BUCKETS]),
    ],
    "pad_batch": lambda to: batching.pad_batch([to(normal(2, 3)), to(normal(4, 3))]),
    # memory, speed
    "fits_on_device": fits,
    "throughput": speeds,
}
ON_THE_CPU: dict[str, Callable[[Move], Any]] = {
    "probabilities": lambda to: batching.probabilities(to(CHANCES), 0.2),
    "importance": lambda to: batching.importance(to(CHANCES), 5, generator()),
    "easiest": lambda to: batching.easiest(to(CHANCES.flip(0)), 0.5),
    "length_buckets": lambda to: batching.length_buckets(to(LENGTHS), 2, generator(), pool=4),
    "by_tokens": lambda to: batching.by_tokens(to(LENGTHS), 12, generator()),
    "scores of a split here": lambda to: [
        scores(to(network()), digits().train)
        for scores in (batching.loss_scores, batching.last_layer_scores, batching.gradient_norms)
    ],
}
WITH_OTHERS = "Uniform NoiseScale simple_noise_scale GhostBatchNorm1d GhostBatchNorm2d"
# an address in memory is not to be had on a device that is emulated: see below
NOT_EMULATED = "predicted_memory saved_bytes"
HOLD_NO_TENSORS = """
    Choice Choose Chooser CriticalBatch Estimates GradientStatistics MemoryModel Rule Size adam_beta adam_eps
    best_step_length ema_decay expected_gain exponential_pacing fit_critical from_noise_scale grow largest_batch
    largest_batch_under linear noise_scale_from_two_sizes noise_temperature reshuffled saturating shuffled_once
    square_root variance_with_replacement variance_without_replacement with_replacement
"""


def _lars(theta: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    batching.lars(theta, g, b, lr=0.1, momentum=0.9, weight_decay=0.1, rate=batching.local_rate(
        theta, g, weight_decay=0.1, trust_coefficient=0.1
    ))  # fmt: skip
    return theta, b


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu_as_here(name: str) -> None:
    on_the_gpu_as_here(CASES[name], rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_computed_there_and_brought_back(name: str) -> None:
    on_the_gpu_as_here(ON_THE_CPU[name], lies="cpu")


def test_every_public_name_has_been_there() -> None:
    here = [name for name in ON_THE_CPU if name in batching.__all__]
    every_name_once(batching, CASES, here, WITH_OTHERS, NOT_EMULATED, HOLD_NO_TENSORS)


@pytest.mark.gpu(emulated=False)
def test_memory_on_the_gpu() -> None:
    (x, y), model = images(), network()
    here = batching.predicted_memory(model, x, y, ADAM), batching.saved_bytes(model, x, y)
    x, y, model = x.cuda(), y.cuda(), model.cuda()
    there = batching.predicted_memory(model, x, y, ADAM), batching.saved_bytes(model, x, y)
    assert there[0].weights == here[0].weights
    assert there[0].gradients == here[0].gradients
    assert there[1] >= here[1]  # storage is handed out in blocks
