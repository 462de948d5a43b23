"""Ensembles: against members trained one by one, the papers' rates written out, and masks drawn by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from course_lib import fusion
from course_lib.distillation import Ensemble, soft_targets
from course_lib.fusion.ensembles import triangle_rate
from course_lib.lab.models import freeze
from course_lib.lab.runtime import seed_everything
from course_lib.lab.training import evaluate, fit, fresh, logits_of
from course_lib.regularization.drop import Dropout
from course_lib.regularization.placing import with_dropout
from tests.fusion.small import EXACT, NETWORKS, batch, close, data, generator, network, same_weights

SMALL = data(40)
MLP = NETWORKS["mlp"]


def test_members_are_the_ensemble_of_distillation_and_more() -> None:
    models, x = [network(seed=k) for k in range(3)], batch()
    members = fusion.Members(models)
    with torch.no_grad():
        close(members(x).exp(), Ensemble(models)(x).softmax(1), 1e-12)
        close(fusion.Members(models, fusion.mean_logits)(x), Ensemble(models, of="logits")(x), 1e-12)
        close(members.each(x), torch.stack([model(x) for model in models]), 0)
        weighted = fusion.Members(models, partial(fusion.mean_probability, weights=[1.0, 0, 3]))
        mixed = (models[0](x).softmax(1) + 3 * models[2](x).softmax(1)) / 4
        close(weighted(x), mixed.log(), 1e-12)
        close(members[:1](x), models[0](x).log_softmax(1), 1e-12)
    assert (len(members), len(members[1:]), members.training) == (3, 2, False)
    right = (logits_of(members, SMALL.test).argmax(1) == SMALL.test.labels).double().mean()
    assert evaluate(members, SMALL.test).accuracy == pytest.approx(float(right))
    soft_targets(network(seed=5), x, torch.zeros(6, dtype=torch.int64), teacher=members).backward()


def test_members_of_a_deep_ensemble_are_runs_of_their_own() -> None:
    found = fusion.deep_ensemble(MLP, SMALL, EXACT, members=2, seed=3)
    at_once = fusion.deep_ensemble_at_once(MLP, SMALL, EXACT, members=2, seed=3)
    for place, seed in enumerate((3, 103)):
        model = fresh(MLP, EXACT, seed=seed)
        fit(model, SMALL, EXACT, seed=seed)
        same_weights(found.networks[place], model)
        same_weights(at_once.networks[place], model, 1e-9)
        assert not found.networks[place].training
        assert not at_once.networks[place].training


def test_members_that_differ_by_their_plan() -> None:
    other = replace(EXACT, optimizer=partial(SGD, lr=0.01))
    found = fusion.trained([(MLP, SMALL, EXACT, 0), (NETWORKS["convnet"], SMALL, other, 1)])
    model = fresh(NETWORKS["convnet"], other, seed=1)
    fit(model, SMALL, other, seed=1)
    same_weights(found.networks[1], model)
    assert [net.name for net in found.networks] == ["mlp", "convnet"]


def test_snapshots_lie_at_the_ends_of_cycles() -> None:
    """Four steps: two cycles of two. The rates are written out, and the run is done by hand."""
    cycles, total = 2, 4
    found = fusion.snapshots(MLP, SMALL, EXACT, cycles=cycles, seed=1)
    model, places = fresh(MLP, EXACT, seed=1), []

    class ByHand(ConstantLR):
        def get_lr(self) -> list[float]:
            t = self.last_epoch + 1  # counted from 1, as in the paper
            length = math.ceil(total / cycles)
            return [0.05 / 2 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)]

    def watched(optimizer: torch.optim.Optimizer, steps: int) -> ByHand:
        optimizer.register_step_post_hook(lambda *_: places.append(copy.deepcopy(model.state_dict())))
        return ByHand(optimizer)

    fit(model, SMALL, replace(EXACT, schedule=watched), seed=1)
    assert len(found) == cycles
    for member, state in zip(found.networks, places[1::2], strict=True):
        for name, value in member.state_dict().items():
            close(value, state[name], 1e-12)
    same_weights(found.networks[-1], model, 1e-12)


def test_the_rate_of_fast_geometric_ensembling() -> None:
    a1, a2, c = 0.05, 0.0005, 8
    for i in range(1, 25):
        t = ((i - 1) % c + 1) / c
        expected = (1 - 2 * t) * a1 + 2 * t * a2 if t <= 0.5 else (2 - 2 * t) * a2 + (2 * t - 1) * a1
        assert a1 * triangle_rate(i - 1, cycle=c, low=a2 / a1) == pytest.approx(expected)
    rates = [triangle_rate(step, cycle=c, low=0.1) for step in range(c)]
    assert min(range(c), key=rates.__getitem__) == c // 2 - 1  # step c/2, counted from 1
    assert rates[-1] == 1


def test_fast_geometric_members_lie_at_the_low_points() -> None:
    start = freeze(network())
    before = copy.deepcopy(start.state_dict())
    recipe = replace(EXACT, epochs=4)
    found = fusion.fast_geometric(start, SMALL, recipe, cycle=4, low=0.1, seed=2)
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())
    model, states = network(), []

    def watched(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        optimizer.register_step_post_hook(lambda *_: states.append(copy.deepcopy(model.state_dict())))
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (0.55, 0.1, 0.55, 1.0)[s % 4])

    fit(model, SMALL, replace(recipe, schedule=watched), seed=2)
    assert len(found) == 2
    for member, state in zip(found.networks, (states[1], states[5]), strict=True):
        for name, value in member.state_dict().items():
            close(value, state[name], 1e-12)


def test_dropout_goes_on_in_evaluation_and_all_else_rests() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), Dropout(0.5, generator(3)), nn.Linear(64, 4)).double()
    sampled = fusion.MonteCarloDropout(model, samples=3).eval()
    x = batch(5)
    with torch.no_grad():
        found = sampled.each(x)
        drawn, flat = generator(3), model[0](x).flatten(1)
        for each in found:
            mask = torch.empty(flat.shape, dtype=torch.float64).bernoulli_(0.5, generator=drawn)
            close(each, model[3](flat * mask / 0.5), 1e-12)
    assert not any(part.training for part in sampled.modules())
    assert int(model[0].num_batches_tracked) == 0
    sampled.train()
    assert sampled(x).shape == (5, 4)
    assert int(model[0].num_batches_tracked) == 1


def test_dropout_of_a_frozen_network_goes_on_too() -> None:
    model = freeze(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 4)).double())
    sampled, x = fusion.MonteCarloDropout(model, samples=4).eval(), batch(5)
    found = sampled.each(x)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(model.train()(x), model(x)), "it is not frozen any more"


def test_many_samples_come_near_the_mean_over_all_masks() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 3)).double()
    sampled, x = fusion.MonteCarloDropout(model, samples=4000).eval(), torch.tensor([[1.0, -2]], dtype=torch.float64)
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 2])] * 2).double()
    with torch.no_grad():
        expected = model[1](masks * x).softmax(1).mean(0)
        seed_everything(0)
        first = sampled(x)
        seed_everything(0)
        assert torch.equal(first, sampled(x))
    close(first.exp()[0], expected, 0.02)


def test_dropout_is_found_wherever_it_is() -> None:
    assert len(fusion.dropouts(with_dropout(network("resnet"), 0.2))) > 2
    assert not fusion.dropouts(network())
    recipe = replace(EXACT, epochs=1)
    model = fusion.MonteCarloDropout(with_dropout(network(), 0.2), samples=2)
    fit(model, SMALL, recipe, seed=0)
    assert logits_of(model, SMALL.test).shape == (20, 4)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.Members([]), "at least one network"),
        (lambda: fusion.deep_ensemble(MLP, SMALL, EXACT, members=0, seed=0), "members="),
        (lambda: fusion.snapshots(MLP, SMALL, EXACT, cycles=3, seed=0), "cycles="),
        (
            lambda: fusion.snapshots(MLP, SMALL, replace(EXACT, schedule=lambda o, s: ConstantLR(o)), cycles=2, seed=0),
            "recipe.schedule=",
        ),
        (lambda: fusion.fast_geometric(network(), SMALL, EXACT, cycle=3, seed=0), "cycle="),
        (lambda: fusion.fast_geometric(network(), SMALL, EXACT, cycle=2, low=2.0, seed=0), "low="),
        (lambda: fusion.MonteCarloDropout(network()), "model="),
        (lambda: fusion.MonteCarloDropout(nn.Dropout(0.1), samples=0), "samples="),
        (lambda: fusion.trained([]), "plans="),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Trained there, the networks come back to where they lay."""
    made = fusion.deep_ensemble_at_once(MLP, SMALL, EXACT, members=2, seed=3)
    assert {p.device.type for p in made.parameters()} == {"cpu"}
    expected = logits_of(fusion.deep_ensemble(MLP, SMALL, EXACT, members=2, seed=3), SMALL.test)
    torch.testing.assert_close(logits_of(made.cuda(), SMALL.test), expected, rtol=1e-9, atol=1e-9)
