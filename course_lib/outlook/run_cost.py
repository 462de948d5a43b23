r"""What a training run costs: time, energy, money and carbon, with every assumption on the table.

==================  ======================================================================================
``Assumptions``     what has to be assumed: machines, their use, power, prices
``run_cost``        operations and assumptions in, hours, kilowatt-hours, money and kilograms of CO2 out
``sensitivity``     which assumption moves the result most
``goodput``         the share of the time that failures leave, with checkpoints as often as is best
``PUBLISHED_RUNS``  runs of which energy or hours were published; ``compare_with_published`` holds the formula to them
==================  ======================================================================================

.. math:: \text{hours of a device} = \frac{C}{3600\,P\,u\,g}, \quad
    \text{energy} = \text{hours}\cdot w \cdot \text{PUE}, \quad
    \text{CO}_2 = \text{energy}\cdot i

with operations C, stated peak P, utilisation u (MFU), goodput g (the share of the time that ends up in the network
that is kept), power w of a device with its share of the machine around it, PUE (what the building draws over what the
machines draw) and the grid's intensity i. Source: Patterson et al. 2021, arXiv:2104.10350, and Lacoste et al. 2019,
arXiv:1910.09700.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd

from course_lib.lab.arguments import at_least, is_number, require

HOUR = 3600.0


@dataclass(frozen=True)
class Assumptions:
    """What has to be assumed. The figures that stand here are examples, to be replaced by your own.

    Attributes
    ----------
    devices : how many work at once.
    peak : operations a second that the maker of one states, in the format that is used.
    utilisation : share of the peak that the model's own operations make (MFU), up to 1.
    goodput : share of the time that counts: the rest goes to failures, restarts, evaluations and repeated steps.
    watts : of one device under load, with its share of processors, memory, network.
    pue : power usage effectiveness of the building, at least 1.
    price : of an hour of one device, in the currency of your choice, electricity included.
    intensity : grams of CO2 for a kilowatt-hour of the grid.
    trials : all runs made for the one that is kept, in units of it: searches, failures, ablations; at least 1.
    """

    devices: int = 8
    peak: float = 989e12
    utilisation: float = 0.4
    goodput: float = 0.9
    watts: float = 1000.0
    pue: float = 1.2
    price: float = 2.5
    intensity: float = 400.0
    trials: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, devices=self.devices)
        for name in ("peak", "watts"):
            require(name, getattr(self, name), lambda x: is_number(x) and x > 0, "a number above 0")
        for name in ("utilisation", "goodput"):
            require(name, getattr(self, name), lambda x: is_number(x) and 0 < x <= 1, "a share above 0 and up to 1")
        for name in ("pue", "trials"):
            require(name, getattr(self, name), lambda x: is_number(x) and x >= 1, "a number of at least 1")
        for name in ("price", "intensity"):
            require(name, getattr(self, name), lambda x: is_number(x) and x >= 0, "a number of at least 0")


@dataclass(frozen=True)
class RunCost:
    """What a run costs: ``hours`` on the clock, ``device_hours``, ``kilowatt_hours``, ``money``, ``co2`` in kg."""

    hours: float
    device_hours: float
    kilowatt_hours: float
    money: float
    co2: float


def run_cost(operations: float, given: Assumptions = Assumptions()) -> RunCost:
    """Cost of a run of so many ``operations``, and of the trials that go with it.

    Raises
    ------
    ValueError : ``operations`` is not a number above 0.
    """
    require("operations", operations, lambda x: is_number(x) and x > 0, "a number above 0")
    device_hours = given.trials * operations / (given.peak * given.utilisation * given.goodput) / HOUR
    energy = device_hours * given.watts / 1000 * given.pue
    return RunCost(
        hours=device_hours / given.devices,
        device_hours=device_hours,
        kilowatt_hours=energy,
        money=device_hours * given.price,
        co2=energy * given.intensity / 1000,
    )


RANGES: Mapping[str, tuple[float, float]] = {
    "utilisation": (0.2, 0.5),
    "goodput": (0.7, 0.97),
    "watts": (700.0, 1400.0),
    "pue": (1.08, 1.6),
    "price": (1.5, 6.0),
    "intensity": (20.0, 700.0),
    "trials": (1.0, 10.0),
}
"""How far each assumption may reasonably lie from another one, between good and bad: a choice, not a measurement."""


def sensitivity(
    operations: float,
    given: Assumptions = Assumptions(),
    of: str = "co2",
    ranges: Mapping[str, tuple[float, float]] = RANGES,
) -> pd.DataFrame:
    """What each assumption alone does to a cost when it goes from one end of its range to the other.

    ``of`` is a field of ``RunCost``. One row an assumption: the cost at both ends, and ``factor``, the larger over the
    smaller; sorted by it. An assumption that does not matter has a factor of 1.

    Raises
    ------
    ValueError : ``of`` is no field of ``RunCost``, or ``ranges`` names no assumption.
    """
    known = [field.name for field in fields(RunCost)]
    require("of", of, lambda x: x in known, " or ".join(map(repr, known)))
    names = [field.name for field in fields(Assumptions)]
    rows = {}
    for name, ends in ranges.items():
        require("ranges", name, lambda x: x in names, "names out of " + ", ".join(names))
        low, high = (getattr(run_cost(operations, _with(given, name, end)), of) for end in ends)
        rows[name] = {
            "from": ends[0],
            "to": ends[1],
            "cost from": low,
            "cost to": high,
            "factor": 1.0 if low == high else max(low, high) / min(low, high) if min(low, high) else math.inf,
        }
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("factor", ascending=False)


def _with(given: Assumptions, name: str, value: Any) -> Assumptions:
    return replace(given, **{name: value})


# --- Failures ---------------------------------------------------------------------------------------------------------


def checkpoint_interval(write: float, between_failures: float) -> float:
    r"""Hours of work between two checkpoints: :math:`\sqrt{2\,\delta M}`, the best to first order.

    Writing one takes :math:`\delta` (``write``), and failures come :math:`M` apart (``between_failures``), in hours.
    More often, and writing costs; more rarely, and each failure throws more away. Source: Young 1974, CACM 17(9).
    """
    for name, value in (("write", write), ("between_failures", between_failures)):
        require(name, value, lambda x: is_number(x) and x > 0, "a number of hours above 0")
    return math.sqrt(2 * write * between_failures)


def goodput(devices: int, lifetime: float, *, write: float = 1 / 60, restart: float = 0.25) -> float:
    r"""Share of the time that ends up in the network, when any of ``devices`` that fails stops all.

    .. math:: g = \frac{\tau}{M e^{R/M}\left(e^{(\tau+\delta)/M} - 1\right)}, \qquad M = \frac{L}{n}

    with hours :math:`\tau` between checkpoints (``checkpoint_interval``), :math:`\delta` to ``write`` one, :math:`R` to
    ``restart``, and a ``lifetime`` :math:`L` between two failures of one device; failures come at random, also while
    it restarts. Source: Daly 2006, doi:10.1016/j.future.2004.11.016.

    Raises
    ------
    ValueError : no device, or a time that is not above 0 (``restart`` may be 0).
    """
    at_least(1, devices=devices)
    require("lifetime", lifetime, lambda x: is_number(x) and x > 0, "a number of hours above 0")
    require("restart", restart, lambda x: is_number(x) and x >= 0, "a number of hours of at least 0")
    apart = lifetime / devices
    work = checkpoint_interval(write, apart)
    return work / (apart * math.exp(restart / apart) * math.expm1((work + write) / apart))


@dataclass(frozen=True)
class PublishedRun:
    """A run whose operations, machines and power were measured, and what its authors say that it took.

    ``device_hours``, ``kilowatt_hours`` and ``co2`` (kg) are theirs; NaN where they do not say.
    """

    name: str
    operations: float
    given: Assumptions
    device_hours: float
    kilowatt_hours: float
    co2: float
    source: str


NAN = float("nan")


def _patterson(
    name: str,
    operations: float,
    devices: int,
    peak: float,
    reached: float,
    watts: float,
    pue: float,
    intensity: float,
    days: float,
    megawatt_hours: float,
    tonnes: float,
) -> PublishedRun:
    """Return a column of table 4: ``reached`` and ``peak`` in 10^12 operations a second."""
    given = Assumptions(devices, peak * 1e12, reached / peak, 1.0, watts, pue, 0.0, intensity)
    theirs = devices * days * 24, megawatt_hours * 1000, tonnes * 1000
    return PublishedRun(name, operations, given, *theirs, "Patterson et al. 2021, arXiv:2104.10350, table 4")


PUBLISHED_RUNS = (
    _patterson("T5, 11B", 4.05e22, 512, 123, 45.6, 310, 1.12, 545, 20, 85.7, 46.7),
    _patterson("Meena, 2.6B", 1.12e23, 1024, 123, 42.3, 289, 1.09, 415, 30, 232, 96.4),
    _patterson("GShard, 600B in experts", 1.33e22, 1024, 123, 48.0, 288, 1.09, 201, 3.1, 24.1, 4.8),
    _patterson("Switch, 1500B in experts", 8.22e22, 1024, 123, 34.4, 245, 1.10, 403, 27, 179, 72.2),
    _patterson("GPT-3, 175B", 3.14e23, 10_000, 125, 24.6, 330, 1.10, 429, 14.8, 1287, 552.1),
    PublishedRun(
        "Llama 3.1, 405B",
        3.8e25,
        Assumptions(16_384, 989e12, 0.41, 1.0, 700, 1.0, 0.0, 0.0),  # its authors give the share of the peak, and 700 W
        30.84e6,
        NAN,
        NAN,
        "Llama team 2024, arXiv:2407.21783; hours: the model card",
    ),
)
"""Runs to hold the formula against. The energy of the last one was not published."""


def compare_with_published(runs: Iterable[PublishedRun] = PUBLISHED_RUNS) -> pd.DataFrame:
    """Return a table: hours, energy and carbon as published and as ``run_cost`` has them.

    Columns: ``hours`` of one device, ``MWh`` and ``tonnes`` of CO2 as published; the same ``predicted``; and ``hours
    ratio``, published over predicted: above 1 where time went elsewhere than into the operations that are counted.
    """
    rows = {}
    for run in runs:
        ours = run_cost(run.operations, run.given)
        rows[run.name] = {
            "hours": run.device_hours,
            "predicted hours": ours.device_hours,
            "hours ratio": run.device_hours / ours.device_hours,
            "MWh": run.kilowatt_hours / 1000,
            "predicted MWh": ours.kilowatt_hours / 1000,
            "tonnes": run.co2 / 1000,
            "predicted tonnes": ours.co2 / 1000,
        }
    return pd.DataFrame.from_dict(rows, orient="index")
