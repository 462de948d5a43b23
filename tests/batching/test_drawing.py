"""Batches that are drawn inside ``fit``: the very gradients, the runs by hand, and what is forgotten between runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.batching import drawing, sampling
from course_lib.batching.drawing import Curriculum, Importance, Uniform, hard_examples, sampled
from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, cross_entropy, fit, fresh

RECIPE = Recipe(epochs=2, batch_size=16, precision="float64", optimizer=partial(torch.optim.SGD, lr=0.1))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("digits", train_size=40)


def network(make: Any = mlp, **settings: Any) -> nn.Module:
    return fresh(partial(make, (1, 8, 8), 10, **({"width": 4} | settings)), RECIPE, seed=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- Labels that carry weights ----------------------------------------------------------------------------------------


def test_weighted_labels_make_cross_entropy_a_weighted_mean() -> None:
    logits = torch.randn(6, 4, generator=generator(), dtype=torch.float64, requires_grad=True)
    y, w = torch.tensor([0, 3, 1, 1, 2, 0]), torch.tensor([0.5, 2.0, 0.0, 1.0, 7.0, 0.1], dtype=torch.float64)
    rows = drawing.weighted_labels(y, w, 4)
    expected = (w * F.cross_entropy(logits, y, reduction="none")).mean()
    found = F.cross_entropy(logits, rows)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, logits)[0], rtol=1e-12, atol=1e-15
    )
    with pytest.raises(ValueError, match=r"weights has the shape \[2\]: must be \[6\]"):
        drawing.weighted_labels(y, w[:2], 4)
    with pytest.raises(ValueError, match="classes=3"):
        drawing.weighted_labels(y, w, 3)


# --- Drawing ----------------------------------------------------------------------------------------------------------


def test_an_augmentation_that_draws_its_own_batch(data: Dataset) -> None:
    chosen = torch.tensor([5, 5, 0, 39])
    augment: Any = drawing.drawn_from(data.train, lambda size, _: (chosen[:size], None), classes=10)
    handed = next(batches(data.train, 4))
    x, y = augment(*handed, generator())
    everything, labels = next(batches(data.train, len(data.train)))
    torch.testing.assert_close(x, everything[chosen], rtol=0, atol=0)
    assert torch.equal(y, labels[chosen])
    short, _ = augment(handed[0][:2], handed[1][:2], generator())
    assert len(short) == 2
    wrong: Any = drawing.drawn_from(data.train, lambda size, _: (torch.tensor([40]), None), classes=10)
    with pytest.raises(ValueError, match="choose gave indices from 40 to 40: must be from 0 to 39"):
        wrong(*handed, generator())


def test_uniform_choices_are_drawn_from_all_and_by_the_generator() -> None:
    chooser = Uniform(20)
    indices, weights = chooser.choose(4000, generator())
    assert weights is None
    assert indices.bincount(minlength=20).min() > 130  # 200 expected, 14 their deviation
    assert torch.equal(indices, chooser.choose(4000, generator())[0])


def steps_by_hand(data: Dataset, model: nn.Module, every: int, smoothing: float, seed: int) -> list[int]:
    """Importance sampling written out, with the loop's own generators; returns when scores were taken."""
    optimizer = RECIPE.optimizer(model.named_parameters())
    train, taken, step = data.train, [], 0
    p = torch.full((len(train),), 1 / len(train), dtype=torch.float64)
    everything, labels = next(batches(train, len(train), dtype=torch.float64))
    for epoch in (1, 2):
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for _, handed in batches(train, 16, generator=order):
            indices, w = sampling.importance(p, len(handed), order)
            if step % every == 0:
                with torch.no_grad():
                    scores = (model(everything).softmax(1) - F.one_hot(labels, 10)).norm(dim=1)
                p = (1 - smoothing) * scores / scores.sum() + smoothing / len(train)
                taken.append(step)
            optimizer.zero_grad()
            (w * F.cross_entropy(model(everything[indices]), labels[indices], reduction="none")).mean().backward()
            optimizer.step()
            step += 1
    return taken


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_importance_sampling_is_the_one_written_out(accumulate: int, data: Dataset) -> None:
    chooser = Importance(data.train, sampling.last_layer_scores, every=2, smoothing=0.3)
    recipe = sampled(replace(RECIPE, accumulate=accumulate), data.train, chooser, classes=10)
    model, other = network(), network()
    fit(model, data, recipe, seed=4)
    assert steps_by_hand(data, other, 2, 0.3, 4) == [0, 2, 4]
    assert chooser.refreshes == 3
    torch.testing.assert_close(weights_of(model), weights_of(other), rtol=0, atol=1e-11)
    # a second run with the same chooser knows nothing of the first
    again = network()
    fit(again, data, recipe, seed=4)
    assert torch.equal(weights_of(again), weights_of(model))


def test_scores_leave_the_statistics_of_batch_norm_alone(data: Dataset) -> None:
    """Probabilities that are all smoothed away: the run must be the one of a chooser that never looks."""

    class Blind(Importance):
        def see(self, model: nn.Module) -> None:
            pass

    runs = []
    for kind in (Importance, Blind):
        chooser = kind(data.train, sampling.gradient_norms, every=1, smoothing=1.0)
        model = network(convnet, width=2)
        fit(model, data, sampled(RECIPE, data.train, chooser, classes=10), seed=0)
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


def test_the_recipes_own_augmentation_comes_behind(data: Dataset) -> None:
    seen = []

    def look(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    batches_seen = []

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        batches_seen.append(x)
        return cross_entropy(model, x, y)

    recipe = replace(RECIPE, augment=look, objective=objective, epochs=1)
    fit(network(), data, sampled(recipe, data.train, Curriculum(torch.arange(40.0), _one), classes=10), seed=0)
    easiest = next(batches(data.train, 1))[0][0]
    assert all(torch.equal(row, easiest) for x in seen for row in x)
    assert all(not x.any() for x in batches_seen)


def _one(step: int) -> float:
    return 0.01


def test_a_curriculum_draws_from_more_and_more(data: Dataset) -> None:
    difficulty = torch.arange(40.0).flip(0)
    pace = partial(sampling.exponential_pacing, start=0.25, increase=2.0, every=2)
    chooser, seen = Curriculum(difficulty, pace), []

    class Watched(Curriculum):
        def choose(self, size: int, generator: torch.Generator) -> Any:
            seen.append(super().choose(size, generator)[0])
            return seen[-1], None

    watched = Watched(difficulty, pace)
    for _ in range(2):
        fit(network(), data, sampled(RECIPE, data.train, watched, classes=10), seed=0)
    lowest = [int(indices.min()) for indices in seen]
    for run in (lowest[:6], lowest[6:]):  # the hardest are those of small index: 10, 20 and 40 of 40 from the end
        assert all(a >= b for a, b in zip(run, (30, 30, 20, 20, 0, 0), strict=True))
        assert min(run[2:4]) < 30
        assert min(run[4:]) < 20
    assert len(chooser.choose(5, generator())[0]) == 5


def test_a_chooser_is_the_same_whatever_it_saw(data: Dataset) -> None:
    def recipe(chooser: Any) -> Recipe:
        return sampled(RECIPE, data.train, chooser, classes=10)

    for make in (
        partial(Importance, data.train, sampling.loss_scores),
        partial(Curriculum, torch.arange(40.0)),
        partial(Uniform, 40),
    ):
        used: Any = make()
        fit(network(), data, recipe(used), seed=0)
        assert fingerprint(recipe(used)) == fingerprint(recipe(make()))
    used = Importance(data.train, sampling.loss_scores)
    fit(network(), data, recipe(used), seed=0)
    assert used.refreshes == 1
    assert copy.deepcopy(used).refreshes == 0
    assert fingerprint(Importance(data.train, sampling.loss_scores, every=3)) != fingerprint(used)


# --- The hardest ------------------------------------------------------------------------------------------------------


def test_hard_examples_are_those_of_the_highest_loss(data: Dataset) -> None:
    x, y = next(batches(data.train, 10, dtype=torch.float64))
    model = network().train()
    losses = F.cross_entropy(model(x), y, reduction="none")
    kept = losses.sort().values[-3:]
    found = hard_examples(keep=0.3)(model, x, y)
    assert found.item() == pytest.approx(kept.mean().item(), rel=1e-12)
    expected = torch.autograd.grad(kept.mean(), list(model.parameters()))
    for a, b in zip(torch.autograd.grad(found, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert torch.equal(hard_examples(keep=1.0)(model, x, y), cross_entropy(model, x, y))
    assert hard_examples(keep=0.001)(model, x, y).item() == pytest.approx(losses.max().item())


def test_hard_examples_of_another_objective_leave_batch_norm_to_the_kept(data: Dataset) -> None:
    x, y = next(batches(data.train, 10, dtype=torch.float64))
    model = network(convnet, width=2).train()
    model.features[1].eval()
    seen = []

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(y))
        return F.cross_entropy(model(x), y, label_smoothing=0.1)

    hard_examples(objective, keep=0.5)(model, x, y)
    assert seen == [5]
    assert model.features[5].num_batches_tracked == 1
    assert model.features[5].training
    assert not model.features[1].training


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda data: hard_examples(keep=0), "keep=0: must be a number above 0 and at most 1"),
        (lambda data: Importance(data.train, sampling.loss_scores, every=0), "every=0: must be"),
        (lambda data: Importance(data.train, sampling.loss_scores, smoothing=2), "smoothing=2: must be"),
        (lambda data: Uniform(0), "n=0: must be"),
        (lambda data: Curriculum(torch.ones(2, 2)), r"difficulty has the shape \[2, 2\]"),
        (lambda data: drawing.drawn_from(data.train, Uniform(3).choose, classes=0), "classes=0: must be"),
    ],
)
def test_bad_arguments(call: Any, said: str, data: Dataset) -> None:
    with pytest.raises(ValueError, match=said):
        call(data)
