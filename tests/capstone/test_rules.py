"""The rules of the race, on a clock of its own: who is paired with whom, what is counted, who qualifies."""

import gc
import itertools
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from course_lib.capstone import Attempt, Entry, Task, accuracy, epochs_needed, quick_net, race, rules, run, trained
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fresh
from tests.capstone.small import glyphs

ENTRY = Entry(mlp, Recipe(epochs=1, batch_size=12))


def task(target=0.5, **settings):
    return Task(glyphs(), target, **settings)


@pytest.fixture(autouse=True)
def no_cleaning(monkeypatch):
    """To collect the garbage of all that was imported takes longer than these tests."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


# A race whose runs are told, not run

NAMES = ("slow", "quick", "lucky")
SECONDS = {"slow": [8.0, 4.0, 16.0, 8.0], "quick": [2.0, 1.0, 4.0, 4.0], "lucky": [1.0, 1.0, 1.0, 1.0]}
SCORES = {"slow": [0.5, 0.75, 0.25, 0.5], "quick": [0.9, 0.9, 0.7, 0.9], "lucky": [1.0, 0.25, 0.25, 0.25]}
SEEDS = (11, 5, 7, 3)


@pytest.fixture
def told(monkeypatch):
    """What was run, in its order: ("warm", name) or (name, seed)."""
    entries = {name: Entry(mlp, Recipe(epochs=place + 1)) for place, name in enumerate(NAMES)}
    names, calls = {id(entry): name for name, entry in entries.items()}, []

    def fake_run(entry, task, seed):
        name = names[id(entry)]
        calls.append((name, seed))
        place = SEEDS.index(seed)
        return Attempt(SECONDS[name][place], SCORES[name][place])

    monkeypatch.setattr(rules, "run", fake_run)
    monkeypatch.setattr(rules, "warm_up", lambda entry, task: calls.append(("warm", names[id(entry)])))
    return entries, calls


def test_each_round_has_one_seed_and_everybody_runs_in_it(told):
    entries, calls = told
    found = race(entries, task(), SEEDS)
    assert calls[:3] == [("warm", name) for name in NAMES]
    rounds = [calls[place : place + 3] for place in range(3, 15, 3)]
    assert [{seed for _, seed in each} for each in rounds] == [{seed} for seed in SEEDS]
    assert all({name for name, _ in each} == set(NAMES) for each in rounds)
    assert len(calls) == 15
    assert found.rounds.arms == NAMES
    assert found.rounds.seconds.T.tolist() == [SECONDS[name] for name in NAMES], "the warm-up is not among them"
    assert found.scores.T.tolist() == [SCORES[name] for name in NAMES]


def test_the_order_is_drawn_anew_and_by_its_own_seed(told):
    entries, calls = told
    orders = set()
    for order in range(4):
        calls.clear()
        race(entries, task(), SEEDS, order=order)
        orders.add(tuple(name for name, _ in calls[3:]))
        first, second = ([name for name, _ in calls[a : a + 3]] for a in (3, 6))
        assert second == first[::-1]
    assert len(orders) > 1


def test_the_table(told):
    entries, _ = told
    table = race(entries, task(), SEEDS).table()
    assert list(table.columns) == [
        "seconds", "speedup", "speedup_low", "speedup_high", "gain", "gain_low", "gain_high", "score", "score_low",
        "score_high", "qualifies",
    ]  # fmt: skip
    assert list(table.index) == list(NAMES)
    assert list(table["seconds"]) == [8.0, 3.0, 1.0]
    ratio = (4 * 4 * 4 * 2) ** 0.25
    assert table.loc["quick", "speedup"] == pytest.approx(ratio)
    assert list(table["score"]) == pytest.approx([0.5, 0.85, 0.4375])
    reach = 3.182446 * np.std(SCORES["quick"], ddof=1) / 2
    assert table.loc["quick", "score_low"] == pytest.approx(0.85 - reach, rel=1e-5)
    assert table.loc["quick", "score_high"] == pytest.approx(0.85 + reach, rel=1e-5)


def test_the_mean_qualifies_and_the_median_is_the_time(told):
    entries, _ = told
    found = race(entries, task(), SEEDS)
    assert list(found.table()["qualifies"]) == [True, True, False], "0.5 is the target; one lucky run is not enough"
    assert [found.qualifies(name) for name in NAMES] == [True, True, False]
    assert found.seconds("slow") == 8.0
    loss = race(entries, task(lower_is_better=True), SEEDS)
    assert [loss.qualifies(name) for name in NAMES] == [True, False, True]


@pytest.mark.parametrize(("kind", "gains"), [("", [1, 4, 8]), ("climb", [1, 4, 2]), ("ablate", [1, 1 / 4, 1 / 8])])
def test_the_kind_is_that_of_the_ladder(told, monkeypatch, kind, gains):
    entries, _ = told
    monkeypatch.setitem(SECONDS, "slow", [8.0] * 4)
    monkeypatch.setitem(SECONDS, "quick", [2.0] * 4)
    assert list(race(entries, task(), SEEDS, kind=kind).table()["gain"]) == pytest.approx(gains)


def test_one_seed_is_no_race(told):
    with pytest.raises(ValueError, match="rounds=1"):
        race(told[0], task(), (1,))


# The task


@pytest.mark.parametrize(
    ("lower", "score", "margin", "reached"),
    [
        (False, 0.5, 0.0, True), (False, 0.5, 0.125, False), (False, 0.625, 0.125, True), (False, 0.25, 0.0, False),
        (True, 0.5, 0.0, True), (True, 0.5, 0.125, False), (True, 0.375, 0.125, True), (True, 0.75, 0.0, False),
        (False, math.nan, 0.0, False), (True, math.nan, 0.0, False),
    ],
)  # fmt: skip
def test_a_target_is_reached(lower, score, margin, reached):
    assert task(lower_is_better=lower).reached(score, margin) is reached


def test_the_usual_score_is_the_accuracy():
    model = quick_net((1, 16, 16), 10)
    assert task().score is accuracy
    assert accuracy(model, glyphs().test) == evaluate(model, glyphs().test).accuracy


# A run


def test_lasting_changes_the_length_alone():
    assert ENTRY.lasting(9) == replace(ENTRY, recipe=replace(ENTRY.recipe, epochs=9))
    assert ENTRY.recipe.epochs == 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_run_is_scored_on_its_split(split):
    scored = []

    def score(model, held):
        scored.append(held)
        return 0.25

    found = run(ENTRY, task(score=score), 3, split=split)
    assert found.score == 0.25
    assert found.seconds > 0
    assert scored == [getattr(glyphs(), split)]


def test_a_run_on_another_split_is_refused():
    with pytest.raises(ValueError, match="split='train': must be 'val' or 'test'"):
        run(ENTRY, task(), 3, split="train")


@pytest.mark.parametrize("per_image", [False, True])
def test_first_weights_and_order_are_those_of_the_seed(per_image):
    first_weights = []

    def look(model, data):
        first_weights.append(model.head.weight.detach().clone())
        return model

    entry = replace(ENTRY, per_image=per_image, prepare=look, recipe=replace(ENTRY.recipe, epochs=2))
    first, again, other = (trained(entry, glyphs(), seed)[0].head.weight for seed in (4, 4, 5))
    for seed, weights in zip((4, 4, 5), first_weights, strict=True):
        drawn = fresh(partial(mlp, glyphs().input_shape, 10), entry.recipe, seed=seed)
        assert torch.equal(weights, drawn.head.weight)
    assert torch.equal(first, again)
    moved = [after - before for after, before in zip((first, other), first_weights[1:], strict=True)]
    assert not torch.allclose(*moved, atol=1e-4)


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_lie_as_the_entry_says(channels_last):
    entry = Entry(quick_net, ENTRY.recipe, channels_last=channels_last)
    weight = trained(entry, glyphs(), 1)[0].features[3].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last


@pytest.fixture
def clock(monkeypatch):
    """A clock that only ``now[0] += …`` moves on, and loops that take 3 seconds, or 1 and then 2."""
    now, called = [100.0], []
    monkeypatch.setattr(rules, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def fake_fit(network, data, recipe, *, seed, progress):
        called.append(("fit", recipe, seed, progress))
        now[0] += 50  # with validation, which is not counted
        return {"seconds": [1.0, 2.0]}

    def fake_script(network, data, recipe, *, seed):
        called.append(("script", recipe, seed))
        return 3.0

    monkeypatch.setattr(rules, "fit", fake_fit)
    monkeypatch.setattr(rules, "fit_per_image", fake_script)
    return now, called


@pytest.mark.parametrize("per_image", [False, True])
def test_what_is_prepared_is_on_the_clock_and_first_weights_are_not(clock, per_image):
    now, called = clock

    def network(shape, classes):
        now[0] += 1000
        return mlp(shape, classes)

    def prepare(model, data):
        now[0] += 4
        return model

    entry = Entry(network, Recipe(epochs=5, validate_every=1), per_image=per_image)
    assert trained(entry, glyphs(), 2)[1] == 3.0
    assert trained(replace(entry, prepare=prepare), glyphs(), 2)[1] == 7.0
    assert [call[0] for call in called] == ["script" if per_image else "fit"] * 2
    assert {call[1].validate_every for call in called} == {5}, "once, at the end"
    assert {call[2] for call in called} == {2}


def test_what_prepare_returns_is_trained():
    other = mlp((1, 16, 16), 10)
    network, _ = trained(replace(ENTRY, prepare=lambda model, data: other), glyphs(), 0)
    assert network is other


def test_a_warm_up_is_short(monkeypatch):
    calls = []
    monkeypatch.setattr(rules, "trained", lambda *arguments, **named: calls.append((*arguments, *named.values())))
    for data in (glyphs(), glyphs(300)):
        rules.warm_up(ENTRY.lasting(9), Task(data, 0.5))
    assert [(entry.recipe.epochs, len(data.train)) for entry, data, _ in calls] == [(1, 24), (1, rules.WARM_UP)]


def test_a_real_race_of_two():
    """The only one that trains: a script image by image, and whole batches."""
    found = race({"script": replace(ENTRY, per_image=True), "batches": ENTRY}, task(0.0), (1, 2))
    assert found.rounds.seconds.shape == found.scores.shape == (2, 2)
    assert (found.rounds.seconds > 0).all()
    assert list(found.table()["qualifies"]) == [True, True]
    assert found.scores[1, 1] == run(ENTRY, task(), 2).score


# The length of a run


@pytest.fixture
def lengths(monkeypatch):
    """``lengths(curve)``: as if a run of n epochs scored ``curve(n, seed)``; the runs that were made."""
    made = []

    def prepare(curve):
        made.clear()

        def fake_run(entry, task, seed, *, split):
            made.append((entry.recipe.epochs, seed, split))
            return Attempt(10.0 * entry.recipe.epochs + seed, curve(entry.recipe.epochs, seed))

        monkeypatch.setattr(rules, "run", fake_run)
        return made

    return prepare


def by_hand(curve, seeds, most, reached):
    """The first length whose mean reaches it, tried one by one."""
    means = {n: sum(curve(n, seed) for seed in seeds) / len(seeds) for n in range(1, most + 1)}
    return next((n for n in means if reached(means[n])), None)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 16, 20])
def test_the_shortest_run_is_found_whatever_the_curve(lengths, most):
    for needed in range(1, most + 3):
        made = lengths(lambda n, seed, needed=needed: float(n >= needed))
        found = epochs_needed(ENTRY, task(0.5), (0,), most=most)
        wanted = by_hand(lambda n, seed, needed=needed: float(n >= needed), (0,), most, lambda mean: mean >= 0.5)
        assert (found and found.epochs) == wanted
        assert max(Counter(n for n, *_ in made).values()) == 1, "no length is tried twice"
        assert all(1 <= n <= most for n, *_ in made)
        assert len(made) <= 2 * math.log2(most) + 3


@pytest.mark.parametrize(("target", "margin"), [*itertools.product((0.3, 0.62, 0.9), (0.0, 0.05))])
def test_the_mean_over_the_seeds_decides_and_a_margin_is_kept(lengths, target, margin):
    def curve(n, seed):
        return 1 - 0.8 ** (n + seed) / 2

    made = lengths(curve)
    found = epochs_needed(ENTRY, task(target), (1, 5), margin=margin, most=30)
    assert found.epochs == by_hand(curve, (1, 5), 30, lambda mean: mean >= target + margin)
    assert found.score == pytest.approx((curve(found.epochs, 1) + curve(found.epochs, 5)) / 2)
    assert found.seconds == 10 * found.epochs + 3, "the median"
    assert {split for *_, split in made} == {"val"}
    assert set(Counter((n, seed) for n, seed, _ in made).values()) == {1}
    assert {seed for _, seed, _ in made} == {1, 5}


def test_a_loss_falls_to_its_target(lengths):
    def curve(n, seed):
        return 2.0 * 0.9**n

    lengths(curve)
    found = epochs_needed(ENTRY, task(1.0, lower_is_better=True), (0,), margin=0.1)
    assert found.epochs == by_hand(curve, (0,), 64, lambda mean: mean <= 0.9)


def test_what_is_never_reached_is_none(lengths):
    made = lengths(lambda n, seed: 0.4)
    assert epochs_needed(ENTRY, task(0.5), (0, 1), most=12) is None
    assert max(n for n, *_ in made) == 12, "the longest run is tried"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seeds": ()}, "seeds=0"), ({"most": 0}, "most=0"), ({"margin": math.nan}, "margin=nan: must be a number")],
)
def test_a_search_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        epochs_needed(ENTRY, task(), **{"seeds": (0,), **arguments})
