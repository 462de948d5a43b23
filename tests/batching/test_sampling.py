"""Orders and draws by counting, variances by listing every draw, scores by gradients taken one by one."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.batching import sampling
from course_lib.batching.noise import variance_with_replacement
from course_lib.batching.sampling import importance, probabilities
from course_lib.lab.data import Split, batches, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, fresh

RECIPE = Recipe(precision="float64")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def split() -> Split:
    return load("digits", train_size=30).train


# --- Orders -----------------------------------------------------------------------------------------------------------


def test_orders_of_epochs() -> None:
    n = 50
    everything = torch.arange(n)
    drawn, new, same = (
        order(n, 3, generator()) for order in (sampling.with_replacement, sampling.reshuffled, sampling.shuffled_once)
    )
    for order in (drawn, new, same):
        assert order.shape == (3, n)
        assert order.dtype == torch.int64
    assert torch.equal(new.sort(1).values, everything.expand(3, n))
    assert not torch.equal(new[0], new[1])
    assert torch.equal(same[0].sort().values, everything)
    assert not torch.equal(same[0], everything)
    assert torch.equal(same[0], same[2])
    missing = [1 - len(epoch.unique()) / 4000 for epoch in sampling.with_replacement(4000, 5, generator())]
    assert sum(missing) / 5 == pytest.approx(math.exp(-1), abs=0.01)
    assert torch.equal(new, sampling.reshuffled(n, 3, generator()))


# --- Choices ----------------------------------------------------------------------------------------------------------


def test_probabilities_follow_the_scores_and_are_smoothed() -> None:
    scores = torch.tensor([0.0, 1.0, 3.0])
    torch.testing.assert_close(probabilities(scores), torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64))
    smooth = probabilities(scores, 0.3)
    torch.testing.assert_close(smooth, torch.tensor([0.1, 0.275, 0.625], dtype=torch.float64))
    assert 1 / (3 * smooth.min()) <= 1 / 0.3 + 1e-12  # the bound of the weights
    torch.testing.assert_close(probabilities(torch.zeros(4)), torch.full((4,), 0.25, dtype=torch.float64))


def test_draws_come_as_often_as_they_should_with_the_weights_that_undo_it() -> None:
    p = probabilities(torch.tensor([0.0, 1.0, 2.0, 5.0, 0.0]))
    indices, weights = importance(p, 40_000, generator())
    counts = indices.bincount(minlength=5).double() / 40_000
    assert (counts - p).abs().max() < 4 * math.sqrt(0.25 / 40_000)
    assert counts[0] == counts[4] == 0
    torch.testing.assert_close(weights, 1 / (5 * p[indices]))
    again = importance(p, 40_000, generator())
    assert torch.equal(indices, again[0])


def every_draw(g: Tensor, p: Tensor, size: int) -> tuple[Tensor, float]:
    """Expectation and variance of the weighted mean, from all ordered draws and their chances."""
    mean, second = torch.zeros_like(g[0]), 0.0
    for rows in itertools.product(range(len(g)), repeat=size):
        chosen = torch.tensor(rows)
        chance = p[chosen].prod()
        estimate = (g[chosen] / (len(g) * p[chosen])[:, None]).mean(0)
        mean = mean + chance * estimate
        second += float(chance * (estimate - g.mean(0)).square().sum())
    return mean, second


def test_the_estimate_is_unbiased_and_its_variance_as_said() -> None:
    g = torch.randn(4, 3, generator=generator(), dtype=torch.float64) * torch.tensor([[0.1], [1.0], [2.0], [5.0]])
    norms, mean = g.norm(dim=1), g.mean(0)
    uniform, best = probabilities(torch.ones(4)), probabilities(norms)
    some = probabilities(torch.tensor([3.0, 1.0, 1.0, 1.0]))
    for p in (uniform, best, some, probabilities(norms, 0.4)):
        for size in (1, 3):
            expected, variance = every_draw(g, p, size)
            torch.testing.assert_close(expected, mean, rtol=0, atol=1e-12)
            found = sampling.sampling_variance(norms, float(mean.norm()), p, size)
            assert found == pytest.approx(variance, rel=1e-10)
    at_best = sampling.sampling_variance(norms, float(mean.norm()), best, 2)
    assert at_best == pytest.approx(float(norms.mean() ** 2 - mean.square().sum()) / 2, rel=1e-12)
    trace = float((g - mean).square().sum()) / 4
    plain = sampling.sampling_variance(norms, float(mean.norm()), uniform, 2)
    assert plain == pytest.approx(variance_with_replacement(trace, 2), rel=1e-12)
    # no other distribution does better
    for seed in range(50):
        other = probabilities(norms * torch.rand(4, generator=generator(seed), dtype=torch.float64).add(0.5))
        assert sampling.sampling_variance(norms, float(mean.norm()), other, 2) > at_best
    assert sampling.sampling_variance(norms, 0.0, torch.tensor([1.0, 0.0, 0.0, 0.0]), 2) == math.inf


# --- Scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mlp, convnet])
def test_scores_are_those_of_each_example_by_itself(make: Any, split: Split) -> None:
    model = fresh(partial(make, (1, 8, 8), 10, width=4), RECIPE, seed=0).train()
    losses, at_logits, whole = [], [], []
    model.eval()
    for x, y in batches(split, 1, dtype=torch.float64):
        logits = model(x).detach().requires_grad_()
        loss = F.cross_entropy(logits, y)
        losses.append(loss.item())
        at_logits.append(torch.autograd.grad(loss, logits)[0].norm().item())
        g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        whole.append(math.sqrt(sum(part.square().sum().item() for part in g)))
    model.train()
    for found, expected in (
        (sampling.loss_scores(model, split), losses),
        (sampling.last_layer_scores(model, split), at_logits),
        (sampling.gradient_norms(model, split, chunk=7), whole),
    ):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        assert not found.requires_grad
    assert all(part.training for part in model.modules())


def test_the_last_layers_score_stands_in_for_the_whole_gradient() -> None:
    split = load("digits", train_size=300).train
    model = fresh(partial(mlp, (1, 8, 8), 10, width=32), RECIPE, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in [next(batches(split, 300, dtype=torch.float64))] * 600:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    norms, scores = sampling.gradient_norms(model, split), sampling.last_layer_scores(model, split)
    assert float(torch.corrcoef(torch.stack([norms, scores]))[0, 1]) > 0.9
    g = float(sampling_mean(model, split))
    uniform = sampling.sampling_variance(norms, g, probabilities(torch.ones(300)), 1)
    assert sampling.sampling_variance(norms, g, probabilities(scores, 0.1), 1) < 0.6 * uniform


def sampling_mean(model: nn.Module, split: Split) -> Tensor:
    x, y = next(batches(split, len(split), dtype=torch.float64))
    g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([part.flatten() for part in g]).norm()


# --- Curricula --------------------------------------------------------------------------------------------------------


def test_the_pace_rises_in_steps_to_all() -> None:
    pace = partial(sampling.exponential_pacing, start=0.1, increase=2.0, every=10)
    assert [pace(step) for step in (0, 9, 10, 19, 20, 39, 40, 10**9)] == [0.1, 0.1, 0.2, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert sampling.exponential_pacing(10**9, start=0.5, increase=1.0) == 0.5


def test_the_easiest_come_first() -> None:
    difficulty = torch.tensor([3.0, 1.0, 2.0, 1.0, 9.0])
    assert sampling.easiest(difficulty, 1.0).tolist() == [1, 3, 2, 0, 4]
    assert sampling.easiest(difficulty, 0.6).tolist() == [1, 3, 2]
    assert sampling.easiest(difficulty, 0.01).tolist() == [1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: sampling.reshuffled(0, 1, generator()), "n=0: must be"),
        (lambda: sampling.shuffled_once(3, 0, generator()), "epochs=0: must be"),
        (lambda: probabilities(torch.tensor([1.0, -1.0])), "scores lie from -1.0 to 1.0: must be finite"),
        (lambda: probabilities(torch.tensor([1.0, math.nan])), "scores lie from .*: must be finite"),
        (lambda: probabilities(torch.ones(2, 2)), r"scores has the shape \[2, 2\]: must be \[N\]"),
        (lambda: probabilities(torch.ones(2), 1.5), "smoothing=1.5: must be a number from 0 to 1"),
        (lambda: importance(torch.ones(3), 2, generator()), "has the sum 3: must be"),
        (lambda: importance(torch.ones(1), 0, generator()), "size=0: must be"),
        (lambda: sampling.sampling_variance(torch.ones(2), 0.0, torch.ones(1), 1), r"p has the shape \[1\]"),
        (lambda: sampling.sampling_variance(torch.ones(1), -1.0, torch.ones(1), 1), "mean_norm=-1.0"),
        (lambda: sampling.easiest(torch.ones(2), 0.0), "part=0.0: must be"),
        (lambda: sampling.easiest(torch.ones(2, 2), 1.0), r"difficulty has the shape \[2, 2\]"),
        (lambda: sampling.exponential_pacing(0, start=0.0), "start=0.0: must be"),
        (lambda: sampling.exponential_pacing(0, increase=0.5), "increase=0.5: must be"),
        (lambda: sampling.exponential_pacing(-1), "step=-1: must be"),
    ],
)
def test_bad_arguments(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
