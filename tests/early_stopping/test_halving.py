"""Successive halving, Hyperband and ASHA against the papers' tables and pseudocode, on recorded curves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from course_lib import early_stopping as es
from tests.early_stopping.small import random_curves

MODES = ("max", "min")


def named(count: int, length: int, seed: int = 0, *, ties: bool = False) -> dict[str, list[float]]:
    return {f"c{k}": curve for k, curve in enumerate(random_curves(count, length, seed, ties=ties))}


def trained(outcome: es.Outcome) -> list[tuple[str, int]]:
    return [(done.job.config, done.job.epochs) for done in outcome.jobs]


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_table_1_of_hyperband() -> None:
    """Li et al. 2016: n_i and r_i for R = 81 and η = 3."""
    table = {
        4: [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        3: [(27, 3), (9, 9), (3, 27), (1, 81)],
        2: [(9, 9), (3, 27), (1, 81)],
        1: [(6, 27), (2, 81)],
        0: [(5, 81)],
    }
    found = es.hyperband_brackets(81)
    assert {b.number: [tuple(rung) for rung in b.rungs] for b in found} == table
    assert [b.number for b in found] == [4, 3, 2, 1, 0]
    assert es.Hyperband(81).needed == 81 + 27 + 9 + 6 + 5
    assert es.Hyperband(81).milestones == (1, 3, 9, 27, 81)


@pytest.mark.parametrize(("R", "eta"), [(81, 3), (27, 3), (16, 2), (243, 3), (100, 3), (16, 4)])
def test_brackets_are_those_of_both_formulas(R: int, eta: int) -> None:
    s_max = max(s for s in range(20) if eta**s <= R)
    B = (s_max + 1) * R
    by_table, by_formula = es.hyperband_brackets(R, eta), es.hyperband_brackets(R, eta, size=es.formula_size)
    for place, s in enumerate(range(s_max, -1, -1)):
        code = math.ceil(int(B / R / (s + 1)) * eta**s)  # as the authors' code has it
        algorithm = math.ceil(B / R * eta**s / (s + 1) - 1e-9)  # Algorithm 1
        for found, n in ((by_table, code), (by_formula, algorithm)):
            expected = [(max(1, int(n * eta**-i + 1e-9)), int(R * eta ** (i - s) + 1e-9)) for i in range(s + 1)]
            assert [tuple(rung) for rung in found[place].rungs] == expected
    assert [b.rungs[0].configs for b in es.hyperband_brackets(81, size=es.formula_size)] == [81, 34, 15, 8, 5]


def test_the_least_resource_cuts_brackets_off() -> None:
    assert [b.rungs[0].epochs for b in es.hyperband_brackets(81, 3, 9)] == [9, 27, 81]
    assert es.rung_epochs(2, 50, 3) == (2, 6, 18)
    assert es.rung_epochs(5, 5, 3) == (5,)


# --- Successive halving -----------------------------------------------------------------------------------------------


def halve(curves: dict[str, list[float]], rungs: Sequence[tuple[int, int]], mode: str) -> list[tuple[str, int]]:
    """The inner loop of Hyperband: train, keep the best n_i."""
    sign = -1 if mode == "max" else 1
    left, jobs = list(curves), []
    for i, (_, r) in enumerate(rungs):
        losses = [sign * curves[name][r - 1] for name in left]
        jobs += [(name, r) for name in left]
        keep = rungs[i + 1][0] if i + 1 < len(rungs) else 0
        left = [left[k] for k in np.argsort(losses, kind="stable")[:keep]]
    return jobs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ties", [False, True])
def test_successive_halving_is_the_loop(mode: str, ties: bool) -> None:
    for count, eta, length in ((27, 3, 27), (8, 2, 8), (20, 3, 30), (2, 3, 9)):
        curves = named(count, length, seed=count, ties=ties)
        epochs = [eta**i for i in range(9) if eta**i <= length]
        rungs = [(max(1, count // eta**i), r) for i, r in enumerate(epochs)]
        rule = es.SuccessiveHalving(1, length, eta)
        found = es.replay_runs(curves, rule, mode=mode)  # type: ignore[arg-type]
        assert trained(found) == halve(curves, rungs, mode)
        assert rule.milestones == tuple(epochs)
        last = {name: max(e for n, e in trained(found) if n == name) for name in curves}
        assert found.epochs == sum(last.values())  # promoted runs go on


@pytest.mark.parametrize("mode", MODES)
def test_hyperband_is_the_loop_over_brackets(mode: str) -> None:
    rule = es.Hyperband(9, 3)
    curves = named(rule.needed, 9)
    names, expected = list(curves), []
    for bracket in rule.brackets:
        own, names = names[: bracket.rungs[0].configs], names[bracket.rungs[0].configs :]
        expected += halve({name: curves[name] for name in own}, bracket.rungs, mode)
    found = es.replay_runs(curves, rule, mode=mode)  # type: ignore[arg-type]
    assert trained(found) == expected
    assert {done.job.bracket for done in found.jobs} == {0, 1, 2}


def test_by_hand() -> None:
    curves = {"a": [0.1, 0.9, 0.9], "b": [0.5, 0.6, 0.7], "c": [0.4, 0.8, 0.8], "d": [0.2, math.nan, 0.1]}
    found = es.replay_runs(curves, es.SuccessiveHalving(1, 2, 2))
    assert trained(found) == [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("b", 2), ("c", 2)]
    assert (found.epochs, found.best.job.config, found.best.value) == (6, "c", 0.8)
    table = found.table()
    assert list(table.columns) == ["bracket", "config", "rung", "epochs", "spent", "value", "diverged"]
    assert table.iloc[5].tolist() == [1, "c", 1, 2, 1, 0.8, False]
    least = es.replay_runs(curves, es.SuccessiveHalving(1, 2, 2), mode="min")
    assert trained(least)[4:] == [("a", 2), ("d", 2)]
    assert least.best.job == trained_job("a", 1)  # a NaN is worst
    # two values that are alike: the run that was trained for longer is the best
    even = es.replay_runs({"a": [0.5, 0.1], "b": [0.3, 0.5]}, es.SuccessiveHalving(1, 2, 2))
    assert (even.best.job.config, even.best.job.epochs) == ("a", 1)
    even = es.replay_runs({"a": [0.5, 0.5], "b": [0.3, 0.5]}, es.SuccessiveHalving(1, 2, 2))
    assert even.best.job.epochs == 2


def trained_job(config: str, epochs: int) -> es.Job:
    return es.Job(1, config, 0, epochs)


# --- ASHA -------------------------------------------------------------------------------------------------------------


def asha(curves: dict[str, list[float]], r: int, R: int, eta: int, workers: int, mode: str) -> list[tuple[str, int]]:
    """Algorithm 2 of Li et al. 2018, epoch by epoch: each worker trains one epoch at a tick of the clock."""
    sign = -1.0 if mode == "max" else 1.0
    top = math.floor(math.log(R / r) / math.log(eta) + 1e-9)
    rungs: list[list[tuple[float, str]]] = [[] for _ in range(top + 1)]
    promoted: list[list[str]] = [[] for _ in range(top + 1)]
    new, finished = list(curves), []

    def get_job() -> tuple[str, int] | None:
        for k in range(top - 1, -1, -1):
            ranked = sorted(rungs[k], key=lambda entry: entry[0])
            for _, name in ranked[: len(ranked) // eta]:
                if name not in promoted[k]:
                    promoted[k].append(name)
                    return name, k + 1
        return (new.pop(0), 0) if new else None

    busy: list[dict[str, Any]] = []
    started = 0
    while True:
        while len(busy) < workers and (job := get_job()):
            name, k = job
            left = r * eta**k - (r * eta ** (k - 1) if k else 0)
            busy.append({"name": name, "rung": k, "left": left, "order": started})
            started += 1
        if not busy:
            return finished
        while all(worker["left"] > 0 for worker in busy):
            for worker in busy:
                worker["left"] -= 1
        done = min((w for w in busy if w["left"] == 0), key=lambda w: w["order"])
        busy.remove(done)
        epochs = r * eta ** done["rung"]
        value = curves[done["name"]][epochs - 1]
        rungs[done["rung"]].append((math.inf if math.isnan(value) else sign * value, done["name"]))
        finished.append((done["name"], epochs))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workers", [1, 3, 7])
def test_asha_is_the_algorithm(mode: str, workers: int) -> None:
    for count, r, R, eta in ((20, 1, 9, 3), (13, 2, 16, 2), (3, 1, 9, 3), (30, 1, 27, 3)):
        curves = named(count, R, seed=count, ties=count % 2 == 1)
        found = es.replay_runs(curves, es.Asha(r, R, eta, workers), mode=mode)  # type: ignore[arg-type]
        assert trained(found) == asha(curves, r, R, eta, workers, mode)


def test_asha_promotes_before_the_rung_is_full_and_calls_back() -> None:
    curves = named(27, 9)
    jobs = trained(es.replay_runs(curves, es.Asha(1, 9, 3, 1)))
    first = next(k for k, (_, epochs) in enumerate(jobs) if epochs == 3)
    assert first == 3  # after three at the lowest rung the best of them goes on
    assert {name for name, epochs in jobs if epochs == 1} == set(curves)
    best_third = sorted(curves, key=lambda name: -curves[name][0])[:9]
    assert set(best_third) <= {name for name, epochs in jobs if epochs == 3}  # those that came early were called back
    few, many = (es.replay_runs(curves, es.Asha(1, 9, 3, workers)) for workers in (1, 9))
    assert trained(few) != trained(many)


def test_who_is_promotable() -> None:
    rung = {"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.1, "e": 0.9, "f": 0.8}
    assert es.promotable(rung, set(), 2) == ["b", "d", "c"]
    assert es.promotable(rung, {"b"}, 3) == ["d"]
    assert es.promotable({"a": 0.1}, set(), 2) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.SuccessiveHalving(0, 9), "min_resource=0: must be a whole number of at least 1"),
        (lambda: es.SuccessiveHalving(3, 2), "max_resource=2: must be a whole number of at least 3"),
        (lambda: es.Hyperband(9, 1), "reduction_factor=1: must be a whole number of at least 2"),
        (lambda: es.Asha(1, 9, 3, 0), "concurrent=0: must be a whole number of at least 1"),
        (lambda: es.hyperband_brackets(0), "max_resource=0: must be"),
        (lambda: es.replay_runs({}, es.Asha(1, 9)), "curves=0: must be at least one"),
        (lambda: es.replay_runs(named(2, 4), es.Asha(1, 9)), "must be of 9 epochs"),
        (lambda: es.replay_runs(named(5, 9), es.Hyperband(9)), "configs=5: must be 15 of them"),
        (lambda: es.replay_runs(named(5, 9), es.Asha(1, 9), mode="up"), "mode='up': must be"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
