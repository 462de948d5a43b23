"""The cost of a run, against published runs and arithmetic by hand."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from course_lib.outlook.run_cost import (
    PUBLISHED_RUNS,
    RANGES,
    Assumptions,
    RunCost,
    checkpoint_interval,
    compare_with_published,
    goodput,
    run_cost,
    sensitivity,
)

ROUND = Assumptions(
    devices=4, peak=1e12, utilisation=0.5, goodput=0.8, watts=500, pue=1.5, price=2.0, intensity=100, trials=3
)


def test_by_hand():
    """3 times 1.44e15 operations at 4e11 a second are 3 hours; 4 devices need three quarters of an hour."""
    found = run_cost(1.44e15, ROUND)
    assert found.device_hours == pytest.approx(3)
    assert found.hours == pytest.approx(0.75)
    assert found.kilowatt_hours == pytest.approx(3 * 0.5 * 1.5)
    assert found.money == pytest.approx(6)
    assert found.co2 == pytest.approx(0.225)


@pytest.mark.parametrize(
    "name", ["T5, 11B", "Meena, 2.6B", "GShard, 600B in experts", "Switch, 1500B in experts", "GPT-3, 175B"]
)
def test_what_was_published_comes_out(name):
    row = compare_with_published().loc[name]
    assert row["predicted hours"] == pytest.approx(row["hours"], rel=0.02)
    assert row["predicted MWh"] == pytest.approx(row["MWh"], rel=0.01)
    assert row["predicted tonnes"] == pytest.approx(row["tonnes"], rel=0.015)


def test_a_large_run_took_longer_than_its_operations_say():
    """The authors of Llama 3 report interruptions; more hours were paid for than the operations alone need."""
    row = compare_with_published().loc["Llama 3.1, 405B"]
    assert 1.05 < row["hours ratio"] < 1.3
    assert math.isnan(row["MWh"])


@pytest.mark.parametrize(
    ("change", "field", "factor"),
    [
        ({"devices": 8}, "hours", 0.5),
        ({"devices": 8}, "device_hours", 1),
        ({"peak": 2e12}, "money", 0.5),
        ({"utilisation": 0.25}, "device_hours", 2),
        ({"goodput": 0.4}, "kilowatt_hours", 2),
        ({"watts": 1000}, "co2", 2),
        ({"watts": 1000}, "money", 1),
        ({"pue": 3}, "kilowatt_hours", 2),
        ({"price": 6}, "money", 3),
        ({"intensity": 50}, "co2", 0.5),
        ({"intensity": 50}, "kilowatt_hours", 1),
        ({"trials": 6}, "hours", 2),
    ],
)
def test_each_assumption_moves_what_it_should(change, field, factor):
    before, after = run_cost(1e18, ROUND), run_cost(1e18, replace(ROUND, **change))
    assert getattr(after, field) == pytest.approx(factor * getattr(before, field))


def test_sensitivity_is_the_ratio_of_the_ends_and_sorted():
    table = sensitivity(1e22, of="co2")
    assert table.loc["intensity", "factor"] == pytest.approx(RANGES["intensity"][1] / RANGES["intensity"][0])
    assert table.loc["utilisation", "factor"] == pytest.approx(2.5)
    assert table.loc["utilisation", "cost from"] > table.loc["utilisation", "cost to"]
    assert table.loc["price", "factor"] == pytest.approx(1)
    assert (table["factor"].diff().dropna() <= 0).all()
    assert sensitivity(1e22, of="money").loc["intensity", "factor"] == pytest.approx(1)
    free = sensitivity(1e22, replace(ROUND, price=0.0), of="money")
    assert free.loc["trials", "factor"] == 1
    assert free.loc["price", "factor"] > 1


def test_every_published_run_says_where_it_stands():
    assert all("arXiv:" in run.source for run in PUBLISHED_RUNS)
    assert {field.name for field in fields(RunCost)} == {"hours", "device_hours", "kilowatt_hours", "money", "co2"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": 0}, "devices=0: must be a whole number of at least 1"),
        ({"peak": -1}, "peak=-1: must be a number above 0"),
        ({"utilisation": 1.2}, "utilisation=1.2: must be a share above 0 and up to 1"),
        ({"goodput": 0}, "goodput=0: must be a share"),
        ({"watts": 0}, "watts=0: must be a number above 0"),
        ({"pue": 0.9}, "pue=0.9: must be a number of at least 1"),
        ({"trials": 0}, "trials=0: must be a number of at least 1"),
        ({"price": -1}, "price=-1: must be a number of at least 0"),
        ({"intensity": math.nan}, "intensity=nan"),
    ],
)
def test_what_cannot_be_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        replace(ROUND, **change)


def test_errors_of_the_functions():
    with pytest.raises(ValueError, match="operations=0: must be a number above 0"):
        run_cost(0)
    with pytest.raises(ValueError, match="of='carbon': must be 'hours' or"):
        sensitivity(1e20, of="carbon")
    with pytest.raises(ValueError, match="ranges='peaks': must be names out of"):
        sensitivity(1e20, ranges={"peaks": (1, 2)})


def simulated_goodput(devices, lifetime, work, write, restart, rng, periods=4000):
    """Failures at random times, one period after the other: what is lost when one comes, and what it takes to begin."""
    apart, spent = lifetime / devices, 0.0
    for _ in range(periods):
        while True:
            next_failure = rng.exponential(apart)
            if next_failure >= work + write:
                spent += work + write
                break
            spent += next_failure
            while (again := rng.exponential(apart)) < restart:  # fails while it restarts
                spent += again
            spent += restart
    return periods * work / spent


@pytest.mark.parametrize(("devices", "restart"), [(100, 0.25), (2000, 0.25), (10_000, 0.5), (10_000, 0.0)])
def test_goodput_is_that_of_a_simulation(devices, restart):
    lifetime, write = 20_000.0, 0.05
    work = checkpoint_interval(write, lifetime / devices)
    found = goodput(devices, lifetime, write=write, restart=restart)
    assert found == pytest.approx(
        simulated_goodput(devices, lifetime, work, write, restart, np.random.default_rng(0)), rel=0.03
    )


def test_the_interval_is_nearly_the_best():
    apart, write = 5.0, 0.02

    def share(work):
        return work / (apart * math.expm1((work + write) / apart))

    best = max(np.linspace(0.05, 3, 3000), key=share)
    assert checkpoint_interval(write, apart) == pytest.approx(best, rel=0.05)
    assert checkpoint_interval(0.5, 4.0) == pytest.approx(2.0)


def test_more_devices_fail_more_often():
    found = [goodput(n, 50_000, restart=0.2) for n in (1, 100, 10_000, 100_000)]
    assert found[0] > 0.99
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: goodput(0, 1000), "devices=0: must be a whole number of at least 1"),
        (lambda: goodput(8, 0), "lifetime=0: must be a number of hours above 0"),
        (lambda: goodput(8, 1000, write=0), "write=0: must be a number of hours above 0"),
        (lambda: goodput(8, 1000, restart=-1), "restart=-1: must be a number of hours of at least 0"),
        (lambda: checkpoint_interval(1, 0), "between_failures=0"),
    ],
)
def test_times_that_cannot_be(call, words):
    with pytest.raises(ValueError, match=words):
        call()
