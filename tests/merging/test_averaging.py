"""Means of weights: against torch's averages along a run, scipy's arcs, and sums written out."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.spatial import geometric_slerp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from course_lib import merging
from course_lib.lab.data import batches
from course_lib.lab.models import freeze
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.merging.averaging import slerp_vectors
from tests.merging.small import NAMES, NETWORKS, batch, close, data, network, normal, same_weights, split

RECIPE = Recipe(epochs=2, batch_size=10, precision="float64")

# --- Means and ways ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_average_is_the_weighted_sum_and_leaves_the_networks_alone(name: str) -> None:
    models = [network(name, seed) for seed in range(3)]
    before = copy.deepcopy([model.state_dict() for model in models])
    found = merging.average(models, [0.5, 0.2, 0.3]).state_dict()
    for key, value in found.items():
        each = [model.state_dict()[key] for model in models]
        if value.is_floating_point():
            close(value, 0.5 * each[0] + 0.2 * each[1] + 0.3 * each[2], 1e-14)
        else:
            assert torch.equal(value, each[0])
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    close(
        next(merging.average(models).parameters()), sum(next(model.parameters()) for model in models) / 3, 1e-14
    )  # fmt: skip
    assert merging.average(models) is not models[0]


def test_an_average_of_one_is_itself_and_a_tied_weight_stays_tied() -> None:
    same_weights(merging.average([network()]), network())

    class Tied(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            nn.init.constant_(self.a.weight, value)
            self.b.weight = self.a.weight

    found = merging.average([Tied(1.0), Tied(3.0)])
    assert found.a.weight is found.b.weight  # type: ignore[union-attr]
    assert (found.b.weight == 2).all()  # type: ignore[union-attr]
    ones = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2), "b.bias": torch.ones(2)}
    twos = {name: 3 * value for name, value in ones.items()}
    sure = merging.fisher_merge([Tied(1.0), Tied(3.0)], [ones, twos])
    assert (sure.b.weight == 2.5).all()  # type: ignore[union-attr]


def test_half_precision_is_summed_in_float32() -> None:
    models = [network("mlp", seed).bfloat16() for seed in range(8)]
    found = next(merging.average(models).parameters())
    wide = torch.stack([next(model.parameters()).float() for model in models]).mean(0)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
    for way in (merging.slerp, merging.slerp_by_tensor):
        assert next(way(models[0], models[1], 0.5).parameters()).dtype is torch.bfloat16


def test_interpolation_has_both_ends() -> None:
    a, b = network("convnet", 0), network("convnet", 1)
    same_weights(merging.interpolate(a, b, 0.0), a)
    middle = merging.interpolate(a, b, 0.25).state_dict()
    for key, value in middle.items():
        if value.is_floating_point():
            close(value, 0.75 * a.state_dict()[key] + 0.25 * b.state_dict()[key], 1e-14)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_an_arc_is_scipys(t: float) -> None:
    a, b = normal(7, seed=1), normal(7, seed=2)
    a, b = a / a.norm(), b / b.norm()
    expected = torch.from_numpy(geometric_slerp(a.numpy(), b.numpy(), t))
    close(slerp_vectors(a, b, t), expected, 1e-13)
    assert float(slerp_vectors(3 * a, 3 * b, t).norm()) == pytest.approx(3)


def test_where_there_is_no_arc_the_way_is_straight() -> None:
    a = normal(5)
    for b in (a, 2 * a, -a, 0 * a, a * (1 + 1e-17)):
        found = slerp_vectors(a, b, 0.3)
        close(found, 0.7 * a + 0.3 * b, 1e-12)
        assert found.isfinite().all()
    near = a + 1e-9 * normal(5, seed=3)
    close(slerp_vectors(a, near, 0.5), (a + near) / 2, 1e-14)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_arcs_of_networks(name: str) -> None:
    a, b = network(name, 0), network(name, 1)
    parts = [dict(model.named_parameters()) for model in (a, b)]
    rows = [nn.utils.parameters_to_vector(model.parameters()) for model in (a, b)]
    whole = slerp_vectors(rows[0], rows[1], 0.4)
    close(nn.utils.parameters_to_vector(merging.slerp(a, b, 0.4).parameters()), whole, 1e-13)
    for key, value in merging.slerp_by_tensor(a, b, 0.4).named_parameters():
        close(value, slerp_vectors(parts[0][key].flatten(), parts[1][key].flatten(), 0.4).view_as(value), 1e-13)
    straight = merging.interpolate(a, b, 0.4)
    for way in (merging.slerp, merging.slerp_by_tensor):
        for mine, theirs in zip(way(a, b, 0.4).buffers(), straight.buffers(), strict=True):
            assert torch.equal(mine, theirs)


# --- Soups ------------------------------------------------------------------------------------------------------------


class Number(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))


def test_a_greedy_soup_by_hand() -> None:
    """The score is the nearness to 0; alone 1 and -1.5 are the best two, their mean is nearer, 4 would spoil it."""
    models = [Number(4.0), Number(1.0), Number(-1.5), Number(-2.0)]
    soup = merging.greedy_soup(models, lambda model: -abs(model.value.item()))  # type: ignore[arg-type]
    assert soup.ingredients == (1, 2)
    assert soup.network.value.item() == -0.25  # type: ignore[operator, union-attr]
    assert soup.score == -0.25
    assert merging.uniform_soup(models).value.item() == pytest.approx(0.375)  # type: ignore[operator, union-attr]


def test_a_greedy_soup_takes_what_does_no_harm_and_is_never_worse() -> None:
    models = [network("mlp", seed) for seed in range(5)]
    held = split(60)
    score = lambda model: evaluate(model, held).accuracy  # noqa: E731
    soup = merging.greedy_soup(models, score)
    assert soup.score == score(soup.network) >= max(map(score, models))
    same_weights(soup.network, merging.average([models[place] for place in soup.ingredients]))
    assert merging.greedy_soup(models, lambda model: 1.0).ingredients == (0, 1, 2, 3, 4)


# --- Along a run ------------------------------------------------------------------------------------------------------


def with_torchs(recipe: Recipe, model: nn.Module, torchs: AveragedModel, start: int, every: int) -> Recipe:
    def follow(optimizer: Any, step: int) -> None:
        if step > start and (step - start) % every == 0:
            torchs.update_parameters(model)

    return after_each_step(recipe, follow)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_averages_along_a_run_are_torchs(kind: str, start: int, every: int, use_buffers: bool) -> None:
    plain = fresh(NETWORKS["convnet"], RECIPE, seed=3)
    rule = None if kind == "SWA" else get_ema_multi_avg_fn(0.7)
    torchs = AveragedModel(plain, multi_avg_fn=rule, use_buffers=use_buffers)
    fit(plain, data(), with_torchs(RECIPE, plain, torchs, start, every), seed=5)
    own = {"SWA": merging.SWA, "EMA": partial(merging.EMA, decay=0.7)}[kind]
    model = fresh(lambda: own(NETWORKS["convnet"](), use_buffers=use_buffers), RECIPE, seed=3)
    fit(model, data(), merging.following(RECIPE, model, start=start, every=every), seed=5)  # type: ignore[arg-type]
    same_weights(model.network, plain)  # type: ignore[arg-type]
    mine, theirs = model.average.state_dict(), torchs.module.state_dict()  # type: ignore[union-attr]
    for name, value in theirs.items():
        if value.is_floating_point() or not use_buffers:  # torch averages counts, too
            close(mine[name], value, 1e-13)
    assert int(model.n_averaged) == int(torchs.n_averaged)  # type: ignore[arg-type]


def test_the_average_answers_in_evaluation_and_the_network_in_training() -> None:
    model, x = merging.SWA(network("mlp", 0)).eval(), batch()
    with torch.no_grad():
        next(model.network.parameters()).add_(1.0)
    assert torch.equal(model(x), model.network(x)), "there is no average yet"
    model.update()
    before = model(x)
    with torch.no_grad():
        next(model.network.parameters()).add_(1.0)
    assert torch.equal(model(x), before)
    assert not torch.equal(model.network(x), before)
    assert torch.equal(model.train()(x), model.network(x))
    assert not any(p.requires_grad for p in model.average.parameters())


def test_ema_is_that_of_the_recipe() -> None:
    plain = fresh(NETWORKS["mlp"], RECIPE, seed=1)
    fit(plain, data(), replace(RECIPE, ema=0.8), seed=2)
    model = fresh(lambda: merging.EMA(NETWORKS["mlp"](), decay=0.8), RECIPE, seed=1)
    model.update()  # type: ignore[operator]
    history = fit(model, data(), merging.following(RECIPE, model), seed=2)  # type: ignore[arg-type]
    same_weights(model.average, plain, 1e-13)  # type: ignore[arg-type]
    assert history["val_loss"][-1] == pytest.approx(evaluate(plain, data().val).loss, rel=1e-12)


def test_a_run_goes_on_with_its_average(tmp_path: Path) -> None:
    def run(epochs: int, **where: Any) -> nn.Module:
        model = fresh(lambda: merging.SWA(NETWORKS["convnet"]()), RECIPE, seed=0)
        fit(model, data(), merging.following(replace(RECIPE, epochs=epochs), model, every=3), seed=0, **where)  # type: ignore[arg-type]
        return model

    whole = run(2)
    run(1, checkpoint=tmp_path / "run.pt")
    same_weights(run(2, checkpoint=tmp_path / "run.pt"), whole)


# --- Batch norm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_refreshed_statistics_are_torchs(name: str) -> None:
    model = network(name).train()
    model(batch())  # it has seen a batch already, which must not count
    model.eval()
    expected, frozen = copy.deepcopy(model), freeze(copy.deepcopy(model))
    held = split(50)
    update_bn([x for x, _ in batches(held, 16, dtype=torch.float64)], expected)
    modes = [part.training for part in model.modules()]
    assert merging.refresh_batch_norm(model, held, batch_size=16) is model
    same_weights(model, expected)
    assert modes == [part.training for part in model.modules()]
    assert {part.momentum for part in model.modules() if isinstance(part, nn.BatchNorm2d)} == {0.1}
    same_weights(merging.refresh_batch_norm(frozen, held, batch_size=16), expected)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_refreshing_without_batch_norm_changes_nothing() -> None:
    same_weights(merging.refresh_batch_norm(network("vit"), split(5)), network("vit"))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    a, wide = network(), fresh(partial(NETWORKS["mlp"].func, (1, 8, 8), 4, width=7), RECIPE, seed=0)  # type: ignore[attr-defined]
    cases: list[tuple[str, Any]] = [
        ("models=[]: must be at least one network", lambda: merging.average([])),
        ("models=[]: must be at least one network", lambda: merging.greedy_soup([], lambda model: 0.0)),
        ("models[1] has 'hidden.0.weight' as float64 [7, 64], models[0] as float64 [6, 64]",
         lambda: merging.average([a, wide])),
        ("models[1] has 'hidden.0.weight' as float32 [6, 64]", lambda: merging.average([a, network().float()])),
        ("models[1] differs from models[0] in 'features.0.weight'", lambda: merging.average([a, network("convnet")])),
        ("models[1]=int: must be a network", lambda: merging.average([a, 3])),  # type: ignore[list-item]
        ("weights=[0.5, 0.6]: must be numbers whose sum is 1, not 1.1", lambda: merging.average([a, a], [0.5, 0.6])),
        ("weights=[1.0]: must be as many numbers as there are networks, 2", lambda: merging.average([a, a], [1.0])),
        ("weights=[1.5, -0.5]: must be numbers of at least 0", lambda: merging.average([a, a], [1.5, -0.5])),
        ("t=1.2: must be a number from 0 to 1", lambda: merging.interpolate(a, a, 1.2)),
        ("b has 'hidden.0.weight'", lambda: merging.slerp(a, wide, 0.5)),
        ("t=nan: must be a number from 0 to 1", lambda: merging.slerp_by_tensor(a, a, float("nan"))),
        ("decay=1: must be a number from 0 to below 1", lambda: merging.EMA(a, decay=1)),
        ("model=MLP: must be SWA(network) or EMA(network)", lambda: merging.following(RECIPE, a)),  # type: ignore[arg-type]
        ("every=0: must be a whole number of at least 1", lambda: merging.following(RECIPE, merging.SWA(a), every=0)),
        ("start=-1: must be a whole number of at least 0", lambda: merging.following(RECIPE, merging.SWA(a), start=-1)),
        ("batch_size=0: must be", lambda: merging.refresh_batch_norm(a, split(4), batch_size=0)),
        ("must be a split with examples", lambda: merging.refresh_batch_norm(a, split(4).subset(torch.arange(0)))),
    ]  # fmt: skip
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_averages_on_the_gpu(name: str) -> None:
    here = [network(name, seed) for seed in range(2)]
    there = [copy.deepcopy(model).cuda() for model in here]
    for merge in (
        lambda pair: merging.average(pair),
        lambda pair: merging.slerp(pair[0], pair[1], 0.3),
        lambda pair: merging.slerp_by_tensor(pair[0], pair[1], 0.3),
        lambda pair: merging.refresh_batch_norm(merging.average(pair), split(30)),
    ):
        same_weights(merge(there).cpu(), merge(here), 1e-9)
