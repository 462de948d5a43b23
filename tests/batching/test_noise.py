"""Gradients one by one, variances by listing every batch, and the noise scale of runs whose noise is known."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib import optimizers
from course_lib.batching import noise
from course_lib.batching.noise import GradientStatistics, gradient_statistics, per_example_gradients
from course_lib.batching.tracking import NoiseScale, tracked
from course_lib.lab.data import Dataset, Split, batches, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import convnet, mlp, vit
from course_lib.lab.training import Recipe, fit, fresh

RECIPE = Recipe(epochs=1, precision="float64")
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": partial(mlp, (1, 8, 8), 10, width=3),
    "convnet": partial(convnet, (1, 8, 8), 10, width=1),
    "vit": partial(vit, (1, 8, 8), 10, width=4, depth=1, heads=2, patch=4),
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("digits", train_size=24)


@pytest.fixture(scope="module")
def split(data: Dataset) -> Split:
    return data.train


def network(name: str = "mlp", seed: int = 0) -> nn.Module:
    return fresh(MODELS[name], RECIPE, seed=seed).eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat_gradient(model: nn.Module, x: Any, y: Tensor, objective: Any = None) -> Tensor:
    """The gradient by a plain backward pass."""
    weights = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        loss = objective(model, x, y) if objective else F.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, materialize_grads=True)])


def one_by_one(model: nn.Module, split: Split, objective: Any = None) -> Tensor:
    return torch.stack([flat_gradient(model, x, y, objective) for x, y in batches(split, 1, dtype=torch.float64)])


# --- One gradient an example ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_each_examples_gradient_is_that_of_its_own_backward_pass(name: str, split: Split) -> None:
    model = network(name)
    before = copy.deepcopy(model.state_dict())
    expected = one_by_one(model, split)
    for chunk in (7, 64):
        found = per_example_gradients(model, split, chunk=chunk)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_any_objective_a_batch_in_place_of_a_split_and_frozen_weights(split: Split) -> None:
    model = network()
    next(iter(model.parameters())).requires_grad_(False)

    def penalised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, label_smoothing=0.1) + sum(p.square().sum() for p in model.parameters())

    x, y = next(batches(split, len(split), dtype=torch.float64))
    found = per_example_gradients(model, (x, y), objective=penalised, chunk=5)
    torch.testing.assert_close(found, one_by_one(model, split, penalised), rtol=1e-10, atol=1e-12)
    # soft labels, and inputs in two parts
    pair = _Pair().double()
    soft = torch.rand(6, 3, generator=generator(), dtype=torch.float64).softmax(1)
    parts = (x[:6], 2 * x[:6])
    found = per_example_gradients(pair, (parts, soft), chunk=4)
    expected = torch.stack(
        [flat_gradient(pair, (parts[0][i : i + 1], parts[1][i : i + 1]), soft[i : i + 1]) for i in range(6)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return self.layer((x[0] * x[1]).flatten(1))


def test_networks_whose_examples_are_not_apart_are_refused(split: Split) -> None:
    with pytest.raises(ValueError, match=r"BatchNorm2d 'features.1' in training mode.*must be in evaluation mode"):
        per_example_gradients(network("convnet").train(), split)
    with pytest.raises(ValueError, match="Dropout"):
        per_example_gradients(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).double(), split)
    with pytest.raises(ValueError, match="require a gradient"):
        per_example_gradients(network().requires_grad_(False), split)
    with pytest.raises(ValueError, match="chunk=0: must be a whole number of at least 1"):
        per_example_gradients(network(), split, chunk=0)


# --- Mean and spread --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [5, 24, 1])
def test_statistics_are_those_of_all_gradients_however_they_are_cut(chunk: int, split: Split) -> None:
    model = network("vit")
    gradients = one_by_one(model, split)
    found = gradient_statistics(model, split, chunk=chunk)
    torch.testing.assert_close(found.mean, gradients.mean(0), rtol=1e-10, atol=1e-13)
    assert found.trace == pytest.approx(torch.cov(gradients.mT, correction=0).trace().item(), rel=1e-11)
    assert found.examples == len(split)


def test_the_trace_survives_a_mean_that_dwarfs_the_spread(split: Split) -> None:
    """The mean of the squares less the square of the mean would lose every digit here."""
    model = network()

    def tilted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) + 1e8 * sum(p.sum() for p in model.parameters())

    plain, far = (
        gradient_statistics(model, split, chunk=5),
        gradient_statistics(model, split, objective=tilted, chunk=5),
    )
    assert far.trace == pytest.approx(plain.trace, rel=1e-6)


def test_variances_are_those_of_every_batch_that_can_be_drawn() -> None:
    n = 5
    g = torch.randn(n, 3, generator=generator(), dtype=torch.float64)
    mean = g.mean(0)
    trace = (g - mean).square().sum().item() / n
    for size in (1, 2, 3):
        ordered = [g[list(rows)].mean(0) for rows in itertools.product(range(n), repeat=size)]
        spread = torch.stack(ordered).sub(mean).square().sum(1).mean().item()
        assert noise.variance_with_replacement(trace, size) == pytest.approx(spread, rel=1e-12)
    for size in range(1, n + 1):
        drawn = [g[list(rows)].mean(0) for rows in itertools.combinations(range(n), size)]
        spread = torch.stack(drawn).sub(mean).square().sum(1).mean().item()
        assert noise.variance_without_replacement(trace, size, n) == pytest.approx(spread, rel=1e-12, abs=1e-15)
    assert noise.variance_without_replacement(0.0, 1, 1) == 0
    with pytest.raises(ValueError, match="batch_size=6: must be at most examples=5"):
        noise.variance_without_replacement(trace, 6, n)


# --- The noise scale --------------------------------------------------------------------------------------------------


def test_two_sizes_give_unbiased_estimates_over_all_batches() -> None:
    n = 4
    g = torch.randn(n, 3, generator=generator(1), dtype=torch.float64) + 0.5
    mean_sq, trace = g.mean(0).square().sum().item(), (g - g.mean(0)).square().sum().item() / n

    def averages(draws: Any, small: int, big: int) -> noise.Estimates:
        found = []
        for rows in draws(big):
            batch = g[list(rows)]
            parts = batch.split(small)
            small_sq = sum(part.mean(0).square().sum().item() for part in parts) / len(parts)
            found.append(noise.noise_scale_from_two_sizes(small_sq, batch.mean(0).square().sum().item(), small, big))
        return noise.Estimates(np.mean([f.gradient_sq for f in found]), np.mean([f.trace for f in found]))

    exact = averages(lambda big: itertools.product(range(n), repeat=big), 2, 4)
    assert exact.gradient_sq == pytest.approx(mean_sq, rel=1e-11)
    assert exact.trace == pytest.approx(trace, rel=1e-11)
    # without replacement: what the docstring says of the population
    finite = averages(lambda big: itertools.permutations(range(n), big), 1, 2)
    assert finite.trace == pytest.approx(trace * n / (n - 1), rel=1e-11)
    assert finite.gradient_sq == pytest.approx(mean_sq - finite.trace / n, rel=1e-11)
    # and the parts in a tracker, of several sizes
    tracker = NoiseScale(decay=0.0)
    sums = np.zeros(2)
    for rows in itertools.product(range(n), repeat=4):
        batch = g[list(rows)]
        squares = [part.mean(0).square().sum().item() for part in batch.split([3, 1])]
        found = tracker.update(squares, [3, 1], batch.mean(0).square().sum().item())
        sums += [found.gradient_sq, found.trace]
    np.testing.assert_allclose(sums / n**4, [mean_sq, trace], rtol=1e-11)


def test_the_simple_noise_scale_is_their_ratio() -> None:
    statistics = GradientStatistics(torch.tensor([3.0, 4.0]), 100.0, 10)
    assert noise.simple_noise_scale(statistics) == 4
    assert noise.simple_noise_scale(GradientStatistics(torch.zeros(2), 1.0, 10)) == math.inf
    assert noise.Estimates(-1.0, 2.0).noise_scale == math.inf


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((1.0, 1.0, 4, 4), "big=4: must be a number above small=4"),
        ((1.0, 1.0, 0, 4), "small=0: must be a number above 0"),
        ((-1.0, 1.0, 2, 4), "small_sq=-1.0"),
        ((1.0, math.nan, 2, 4), "big_sq=nan"),
    ],
)
def test_bad_sizes_and_norms(arguments: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        noise.noise_scale_from_two_sizes(*arguments)


def test_averages_are_taken_before_the_ratio_and_corrected_for_their_start() -> None:
    tracker = NoiseScale(decay=0.9)
    assert math.isnan(tracker.noise_scale)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(7):
        squares = rng.uniform(2, 3, 3)
        found.append(tracker.update(list(squares), [4, 4, 4], rng.uniform(1, 2)))
        weights = 0.9 ** np.arange(len(found) - 1, -1, -1)
        for name in ("gradient_sq", "trace"):
            expected = np.average([getattr(f, name) for f in found], weights=weights)
            assert getattr(tracker.estimates, name) == pytest.approx(expected, rel=1e-12)
    assert tracker.noise_scale == pytest.approx(tracker.estimates.trace / tracker.estimates.gradient_sq)
    with pytest.raises(ValueError, match="two parts"):
        tracker.update([1.0], [4], 1.0)
    with pytest.raises(ValueError, match="decay=1: must be"):
        NoiseScale(1)


# --- With the Hessian -------------------------------------------------------------------------------------------------


def test_the_curvatures_share_is_that_of_the_whole_matrices(split: Split) -> None:
    model = fresh(partial(mlp, (1, 8, 8), 10, depth=0), RECIPE, seed=0)  # convex: no sign to cancel
    model.head.bias.data[0] += 2  # a mean that is no small part of each gradient
    gradients = one_by_one(model, split)
    product = noise.hessian_vector(model, split)
    spread = gradients - gradients.mean(0)
    bent = sum(torch.dot(v, product(v)) for v in spread).item() / len(spread)
    expected = bent / torch.dot(gradients.mean(0), product(gradients.mean(0))).item()
    draws = 500
    # u^T H u of random signs: twice the sum of the squared entries off the diagonal of V H V^T / N is its variance
    entries = spread @ torch.stack([product(v) for v in spread]).mT / len(spread)
    deviation = math.sqrt(2 * (entries.square().sum() - entries.diagonal().square().sum()).item()) / bent
    error = deviation / math.sqrt(draws)
    assert error < 0.02  # else the next line says little
    found = noise.hessian_noise_scale(model, split, generator=generator(), draws=draws, chunk=7)
    assert found == pytest.approx(expected, rel=4 * error)
    assert found == noise.hessian_noise_scale(model, split, generator=generator(), draws=draws, chunk=7)


# --- In a run ---------------------------------------------------------------------------------------------------------


def test_a_tracked_run_takes_the_steps_of_one_without_and_sees_its_gradients(data: Dataset) -> None:
    recipe = replace(RECIPE, epochs=2, batch_size=10, accumulate=3, clip_norm=0.05)  # batches of 10, 10 and 4
    tracker = NoiseScale(decay=0.5)
    plain, model = network(), network()
    fit(plain, data, recipe, seed=3)
    watched = tracked(recipe, tracker)
    history = fit(model, data, watched, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert tracker.steps == 6
    assert history["noise_scale"][-1] == tracker.noise_scale
    assert history["trace"][-1] == tracker.estimates.trace

    # the same by hand: the steps again, each part's gradient by its own backward pass
    other = network()
    optimizer = recipe.optimizer(other.named_parameters())
    expected = NoiseScale(decay=0.5)
    for epoch in (1, 2):
        order = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        for x, y in batches(data.train, 10, generator=order, dtype=torch.float64):
            parts = list(zip(x.chunk(3), y.chunk(3), strict=True))
            squares = [flat_gradient(other, *part).square().sum().item() for part in parts]
            whole = flat_gradient(other, x, y)
            expected.update(squares, [len(part_y) for _, part_y in parts], whole.square().sum().item())
            clipped = whole * min(1.0, 0.05 / (whole.norm().item() + 1e-6))
            for p, g in zip(other.parameters(), clipped.split([p.numel() for p in other.parameters()]), strict=True):
                p.grad = g.view_as(p)
            optimizer.step()
    assert tracker.estimates.trace == pytest.approx(expected.estimates.trace, rel=1e-9)
    assert tracker.estimates.gradient_sq == pytest.approx(expected.estimates.gradient_sq, rel=1e-9)

    # a later run without it tells the tracker nothing, another run with it starts anew
    fit(model, data, recipe, seed=3)
    assert tracker.steps == 6
    fit(network(), data, watched, seed=4)
    assert tracker.steps == 6


def test_a_network_that_is_tracked_again_is_looked_at_once(data: Dataset) -> None:
    watched = tracked(replace(RECIPE, batch_size=12, accumulate=3), NoiseScale(decay=0.5))
    model = network()
    fit(model, data, watched, seed=1)
    copied = copy.deepcopy(model)
    columns = ("noise_scale", "gradient_sq", "trace")
    expected, found = (fit(each, data, watched, seed=2).rows[-1] for each in (copied, model))
    assert [found[name] for name in columns] == [expected[name] for name in columns]


def test_the_tracked_noise_scale_is_that_of_the_population(data: Dataset) -> None:
    """A rate of zero holds the gradients still; what is left is chance, which 200 epochs average out."""
    recipe = Recipe(
        epochs=200, batch_size=12, accumulate=4, precision="float64", optimizer=partial(torch.optim.SGD, lr=0.0)
    )
    tracker, model = NoiseScale(decay=0.999), network()
    model.head.bias.data[0] += 3  # certain and mostly wrong: a gradient that stands out of its noise
    fit(model, data, tracked(replace(recipe, validate_every=200), tracker), seed=0)
    exact = gradient_statistics(model, data.train)
    n = exact.examples
    trace = exact.trace * n / (n - 1)
    assert tracker.estimates.trace == pytest.approx(trace, rel=0.03)
    assert tracker.estimates.gradient_sq == pytest.approx(exact.mean.square().sum().item() - trace / n, rel=0.03)
    assert tracker.noise_scale == pytest.approx(trace / tracker.estimates.gradient_sq, rel=0.03)


def test_what_cannot_be_tracked_says_so(data: Dataset) -> None:
    with pytest.raises(ValueError, match=r"recipe.accumulate=1: must be at least 2"):
        tracked(RECIPE, NoiseScale())
    sam = replace(RECIPE, accumulate=2, optimizer=_sam)
    with pytest.raises(ValueError, match="asked for 4 parts in one step of accumulate=2"):
        fit(network(), data, tracked(sam, NoiseScale()), seed=0)


def _sam(parameters: Any) -> torch.optim.Optimizer:
    return optimizers.SAM(torch.optim.SGD(parameters, lr=0.1))


def test_a_tracked_recipe_can_be_fingerprinted_and_resumed(data: Dataset, tmp_path: Any) -> None:
    recipe = replace(RECIPE, accumulate=2, batch_size=12, epochs=2)
    assert fingerprint(tracked(recipe, NoiseScale())) == fingerprint(tracked(recipe, NoiseScale()))
    whole, parts = network(), network()
    fit(whole, data, tracked(recipe, NoiseScale()), seed=0)
    fit(network(), data, tracked(replace(recipe, epochs=1), NoiseScale()), seed=0, checkpoint=tmp_path / "run")
    again = tracked(recipe, NoiseScale())
    fit(parts, data, again, seed=0, checkpoint=tmp_path / "run")
    assert fingerprint(again) == fingerprint(tracked(recipe, NoiseScale()))  # what it saw is no part of what it is
    assert fingerprint(again) != fingerprint(tracked(recipe, NoiseScale(0.5)))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
