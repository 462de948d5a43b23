"""Ladders on a clock that only steps move on: known effects come back exactly, intervals cover as they promise."""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Callable, Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats

from course_lib.efficiency import ladder
from course_lib.efficiency.ladder import (
    ALL,
    BASE,
    Rounds,
    Rung,
    ablate,
    alone,
    climb,
    in_turns,
    log_ratio,
    product_of_singles,
    timed,
)

Setting = frozenset[str]


@pytest.fixture(autouse=True)
def no_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """To collect the garbage of all that was imported takes longer than these tests."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def rung(name: str) -> Rung[Setting]:
    return Rung(name, lambda setting: setting | {name})


RUNGS = [rung("compile"), rung("bfloat16"), rung("batch")]
FACTORS = {"compile": 2.0, "bfloat16": 1.5, "batch": 0.8}


def independent(setting: Setting) -> float:
    """Seconds, if each rung divides by its factor whatever the others do."""
    return 12 / math.prod(FACTORS[name] for name in setting)


def interacting(setting: Setting) -> float:
    """Two rungs that mend the same thing: with both, the second brings nothing."""
    return independent(setting) * (1.5 if {"compile", "bfloat16"} <= setting else 1)


# --- Known effects ----------------------------------------------------------------------------------------------------


def test_a_climb() -> None:
    found = climb(frozenset(), RUNGS, independent, rounds=3)
    assert found.arms == (BASE, "+ compile", "+ bfloat16", "+ batch")
    table = found.table()
    assert list(table["seconds"]) == pytest.approx([12, 6, 4, 5])
    assert list(table["speedup"]) == pytest.approx([1, 2, 3, 2.4])
    assert list(table["gain"]) == pytest.approx([1, 2, 1.5, 0.8])
    assert list(table["gain_low"]) == pytest.approx([1, 2, 1.5, 0.8]), "no noise, no width"
    assert table.index.name == "climb"


def test_an_ablation() -> None:
    found = ablate(frozenset(), RUNGS, interacting, rounds=2)
    assert found.arms == (ALL, "without compile", "without bfloat16", "without batch")
    table = found.table()
    assert list(table["seconds"]) == pytest.approx([7.5, 10, 7.5, 6])
    assert list(table["gain"]) == pytest.approx([1, 10 / 7.5, 1, 0.8]), "beside compile, bfloat16 is worth nothing"
    assert list(table["speedup"]) == pytest.approx([1, 0.75, 1, 1.25])


def test_each_alone_against_all() -> None:
    found = alone(frozenset(), RUNGS, independent, rounds=2)
    assert found.arms == (BASE, "compile", "bfloat16", "batch", ALL)
    assert list(found.table()["gain"]) == pytest.approx([1, 2, 1.5, 0.8, 2.4])
    together = product_of_singles(found)
    assert (together.joint.ratio, together.product.ratio) == pytest.approx((2.4, 2.4))
    assert together.interaction.ratio == pytest.approx(1)

    together = product_of_singles(alone(frozenset(), RUNGS, interacting, rounds=2))
    assert (together.joint.ratio, together.product.ratio) == pytest.approx((1.6, 2.4))
    assert together.interaction.ratio == pytest.approx(1 / 1.5)
    assert together.interaction.differs


def test_the_setting_is_not_changed() -> None:
    base: Setting = frozenset({"compile"})
    assert climb(base, RUNGS[1:], independent, rounds=2).seconds[0] == pytest.approx([6, 4, 5])
    assert base == {"compile"}


# --- Intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    before, after = np.array([2.0, 3.0, 8.0, 5.0]), np.array([1.0, 2.0, 2.0, 4.0])
    logs = np.log(before / after)
    low, high = stats.t.interval(0.95, 3, logs.mean(), stats.sem(logs))
    found = log_ratio(before, after)
    assert (found.ratio, found.low, found.high) == pytest.approx(
        (stats.gmean(before / after), math.exp(low), math.exp(high))
    )
    assert (found.lower, found.median, found.upper) == pytest.approx(
        tuple(np.exp(np.quantile(np.log([2, 1.5, 4, 1.25]), [0.25, 0.5, 0.75])))
    )
    assert found.rounds == 4
    assert log_ratio(before, after, 0.5).low > found.low
    assert str(log_ratio(np.full(2, 3.0), np.full(2, 2.0))) == "1.50x [1.50, 1.50]"
    swapped = log_ratio(after, before)
    assert (swapped.ratio, swapped.low, swapped.high) == pytest.approx((1 / found.ratio, 1 / found.high, 1 / found.low))


def test_an_interval_that_holds_no_change() -> None:
    assert not log_ratio(np.array([1.0, 2.0]), np.array([2.0, 1.0])).differs
    assert log_ratio(np.full(3, 2.0), np.full(3, 1.0)).differs
    assert log_ratio(np.full(3, 1.0), np.full(3, 2.0)).differs


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """800 ladders of 6 rounds, on a machine whose speed drifts by 30% and whose steps vary by 5%."""
    generator = np.random.default_rng(0)
    truth = np.array(
        [independent(frozenset(names)) for names in ((), ("compile",), ("bfloat16",), ("batch",), FACTORS)]
    )
    within, within_interaction = 0, 0
    for _ in range(800):
        drift = np.exp(0.3 * generator.standard_normal((6, 1)))
        seconds = truth * drift * np.exp(0.05 * generator.standard_normal((6, 5)))
        rounds = Rounds((BASE, *FACTORS, ALL), seconds, "alone")
        found, together = rounds.gain("compile"), product_of_singles(rounds).interaction
        within += found.low <= 2 <= found.high
        within_interaction += together.low <= 1 <= together.high
        assert found.high / found.low < 1.4, "what slows all arms of a round widens nothing"
    assert 0.93 < within / 800 < 0.97
    assert 0.93 < within_interaction / 800 < 0.97


# --- Measuring --------------------------------------------------------------------------------------------------------


def test_in_turns() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = in_turns({name: name for name in "abcd"}, measure, rounds=6, seed=1)
    assert calls[:4] == list("abcd"), "not counted"
    orders = ["".join(calls[start : start + 4]) for start in range(4, 28, 4)]
    assert all(Counter(order) == Counter("abcd") for order in orders)
    assert [order[::-1] for order in orders[::2]] == orders[1::2]
    assert len(set(orders)) > 2, "drawn anew"
    for arm in "abcd":
        numbers = [4 * round_ + order.index(arm) + 5 for round_, order in enumerate(orders)]
        assert found.of(arm).tolist() == numbers, "each time stands at its arm and round"
    again: list[str] = list(calls)
    calls.clear()
    in_turns({name: name for name in "abcd"}, measure, rounds=6, seed=1)
    assert calls == again


def test_timed() -> None:
    now, built, run = [100.0], [], []

    def build(setting: list[float]) -> Callable[[], None]:
        built.append(setting)

        def step() -> None:
            run.append(setting)
            now[0] += setting[0]

        return step

    measure = timed(build, steps=4, device="cpu", clock=lambda: now[0])
    fast, slow, twin = [1.0], [3.0], [1.0]
    assert [measure(fast), measure(slow), measure(fast)] == [1, 3, 1]
    assert len(run) == 12
    assert built == [fast, slow]
    measure(twin)
    assert built[-1] is twin, "told apart as objects"
    found = climb(fast, [Rung("slower", lambda setting: [setting[0] * 5])], measure, rounds=2)
    assert found.seconds.tolist() == [[1, 5], [1, 5]]


def test_timed_takes_the_clock_after_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("course_lib.lab.timing._synchronise", lambda device: seen.append(device.type))
    ticks: Iterator[float] = iter([1.0, 5.0])
    measure = timed(
        lambda _: lambda: seen.append("step"), device="cuda", clock=lambda: (seen.append("clock"), next(ticks))[1]
    )
    assert measure(object()) == 4
    assert seen == ["cuda", "clock", "step", "cuda", "clock"]


# --- Drawn ------------------------------------------------------------------------------------------------------------


def test_plots() -> None:
    for found, lengths in (
        (climb(frozenset(), RUNGS, independent, rounds=2), [1, 2, 3, 2.4]),
        (ablate(frozenset(), RUNGS, independent, rounds=2), [1, 2, 1.5, 0.8]),
    ):
        ax = found.plot(title="a ladder")
        assert [bar.get_width() for bar in ax.patches] == pytest.approx(lengths)
        assert [label.get_text() for label in ax.get_yticklabels()] == list(found.arms)
        assert "2 rounds" in ax.get_xlabel()
    plt.close("all")


# --- At the door ------------------------------------------------------------------------------------------------------


def test_at_the_door() -> None:
    ones = np.ones(2)
    rounds = Rounds((BASE, "a"), np.ones((2, 2)), "climb")
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: climb(frozenset(), [], independent), r"rungs=\[\]: must be at least one, of different names"),
        (lambda: alone(frozenset(), [rung("a"), rung("a")], independent), "rungs="),
        (lambda: ablate(frozenset(), [rung(ALL)], independent), "rungs="),
        (lambda: climb(frozenset(), RUNGS, independent, rounds=1), "rounds=1: must be a whole number of at least 2"),
        (lambda: log_ratio(ones, np.ones(3)), "after="),
        (lambda: log_ratio(ones, np.zeros(2)), "the least of the seconds=.*0.0.*: must be above 0"),
        (lambda: log_ratio(np.ones(1), np.ones(1)), "at least 2 runs"),
        (lambda: product_of_singles(rounds), "rounds='climb': must be those of alone"),
        (lambda: rounds.gain("b"), "arm='b': must be one of base, a"),
        (lambda: rounds.speedup("a", "b"), "arm='b'"),
        (lambda: timed(lambda _: print, steps=0), "steps=0"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_garbage_is_not_collected_meanwhile() -> None:
    seen: list[bool] = []
    in_turns({"a": 1, "b": 2}, lambda setting: float(seen.append(gc.isenabled()) or setting), rounds=2)
    assert seen == [True, True, False, False, False, False]
    assert gc.isenabled()


@pytest.mark.gpu
def test_on_cuda() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    rungs: list[Rung[int]] = [Rung("fewer", lambda count: count // 10)]
    found = climb(50, rungs, timed(lambda count: lambda: [x @ x for _ in range(count)], device="cuda"), rounds=5)
    assert found.gain("+ fewer").ratio > 2
    assert ladder.BASE in found.arms
