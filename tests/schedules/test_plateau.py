"""``ReduceOnPlateau`` against torch's ``ReduceLROnPlateau``, figure by figure."""

from __future__ import annotations

import itertools
import math
import pickle
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from course_lib.lab.data import load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.schedules.plateau import Plateau, ReduceOnPlateau, reduce_on_plateau, watched


def two_groups() -> SGD:
    return SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.4, 0.03)])


def figures(kind: str) -> list[float]:
    noise = torch.rand(80, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
    if kind == "falling":
        return [1 / (1 + t) + 0.3 * n for t, n in enumerate(noise)]
    if kind == "negative":
        return [-(1 - math.exp(-t / 20)) + 0.1 * n for t, n in enumerate(noise)]
    if kind == "slow":  # improves by less than the threshold at each step
        return [1 - 1e-3 * t for t in range(80)]
    return [*noise[:20], math.nan, math.inf, *([0.5] * 20), *noise[20:40]]


def rates(optimizer: SGD) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


SETTINGS = [
    dict(zip(("mode", "threshold_mode", "patience", "cooldown", "threshold"), values, strict=True))
    for values in itertools.product(("min", "max"), ("rel", "abs"), (0, 1, 4), (0, 3), (0.0, 1e-4, 0.05))
]


@pytest.mark.parametrize("kind", ["falling", "negative", "slow", "odd"])
def test_the_rates_are_torchs_after_each_figure(kind: str) -> None:
    reduced = 0
    for settings, (factor, floor) in itertools.product(SETTINGS, [(0.5, 0.0), (0.1, [0.01, 0.002])]):
        a, b = two_groups(), two_groups()
        ours = ReduceOnPlateau(a, factor=factor, min_lr=floor, **settings)  # type: ignore[arg-type]
        theirs = ReduceLROnPlateau(b, factor=factor, min_lr=floor, **settings)  # type: ignore[arg-type]
        for t, figure in enumerate(figures(kind)):
            ours.observe(figure)
            theirs.step(figure)
            assert rates(a) == rates(b), (settings, t)
        reduced += rates(b) != [0.4, 0.03]
    assert reduced > len(SETTINGS), "hardly any rate was reduced: the comparison says little"


def test_a_change_smaller_than_eps_is_not_made() -> None:
    for eps in (1e-3, 0.25, 0.1):
        a, b = two_groups(), two_groups()
        ours, theirs = ReduceOnPlateau(a, factor=0.5, patience=0, eps=eps), ReduceLROnPlateau(b, "min", 0.5, 0, eps=eps)
        for _ in range(6):
            ours.observe(1.0)
            theirs.step(1.0)
            assert rates(a) == rates(b)
    assert rates(a) != [0.4, 0.03]


def test_the_rule_counts_from_the_best_figure() -> None:
    """By hand: patience 1, one figure of cool-down."""
    state, reductions = Plateau(math.inf), []
    for value in (5.0, 4.0, 4.5, 4.2, 9.0, 9.0, 9.0, 3.0, 3.5):
        state, reduce = watched(state, value, patience=1, cooldown=1)
        reductions.append(reduce)
    #         the second not below 4 ↓                 ↓ the first 9.0 was let off
    assert reductions == [False, False, False, True, False, False, True, False, False]
    assert state == Plateau(3.0, 1, 0)


def test_a_schedule_that_is_loaded_goes_on_where_it_was() -> None:
    values = figures("falling")
    a, b = two_groups(), two_groups()
    first = ReduceOnPlateau(a, patience=2, cooldown=2)
    for value in values[:33]:
        first.observe(value)
    second = ReduceOnPlateau(b, patience=2, cooldown=2)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    b.load_state_dict(a.state_dict())
    for value in values[33:]:
        first.observe(value)
        second.observe(value)
        assert rates(a) == rates(b)
    assert first.state == second.state


@pytest.mark.parametrize("column", ["val_loss", "train_loss"])
def test_fit_tells_it_of_each_validation(column: str) -> None:
    """Against torch's, which ``fit`` tells the validation loss; and with another column, against the history itself."""
    data = load("digits", train_size=200)
    settings: dict[str, Any] = {"patience": 0, "factor": 0.5, "threshold": 0.05}
    recipe = Recipe(epochs=6, batch_size=50, validate_every=1 / 2, precision="float64")
    histories = []
    for made in (reduce_on_plateau(column=column, **settings), lambda o, _: ReduceLROnPlateau(o, **settings)):
        model = fresh(partial(mlp, (1, 8, 8), 10, width=8), recipe, seed=0)
        histories.append(fit(model, data, Recipe(**{**vars(recipe), "schedule": made}), seed=0))
    mine, torchs = histories
    assert len(set(mine["lr"])) > 1
    if column == "val_loss":
        assert mine.rates == torchs.rates
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=0.05)
    replayed = ReduceOnPlateau(optimizer, **settings)
    for figure, lr in zip(mine[column], mine["lr"], strict=True):
        assert optimizer.param_groups[0]["lr"] == lr
        replayed.observe(figure)


def test_it_can_be_pickled_and_told_from_others() -> None:
    one, other = reduce_on_plateau(patience=3), reduce_on_plateau(patience=4)
    assert fingerprint(pickle.loads(pickle.dumps(one))) == fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "low"}, "mode='low': must be 'min' or 'max'"),
        ({"threshold_mode": "x"}, "threshold_mode='x': must be 'rel' or 'abs'"),
        ({"factor": 1.0}, "factor=1.0: must be a number between 0 and 1"),
        ({"patience": -1}, "patience=-1: must be a whole number of at least 0"),
        ({"cooldown": 0.5}, "cooldown=0.5: must be a whole number of at least 0"),
        ({"threshold": -1}, "threshold=-1: must be a number of at least 0"),
        ({"min_lr": [0.1]}, "min_lr=[0.1]: must be a number of at least 0, or one for each of 2"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ReduceOnPlateau(two_groups(), **settings)


def test_an_unknown_setting_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="patients"):
        reduce_on_plateau(patients=3)
