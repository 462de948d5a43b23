r"""Scaling a network: what a budget of multiplications buys as depth, as width, as resolution, or as all three.

======================  ====================================================  ========================================
name                    what it does or gives                                 source
======================  ====================================================  ========================================
``Size``                a network's depth, width and resolution
``single``              the whole budget into one of the three                Tan & Le 2019 (EfficientNet),
                                                                              arXiv:1905.11946, equation 2
``compound``            all three together, in fixed proportions              the same, equation 3
``Coefficients``        those proportions
``candidates``          proportions to try, all for the same budget           the same, section 3.3
``nearest``             the network whose counted cost is nearest             –
``scaled_sizes``        all four ways side by side
======================  ====================================================  ========================================

Twice as many layers multiply twice as often; twice the channels, in and out, four times; twice the pixels each way,
four times. With factors d, w and r for depth, width and resolution the cost is

.. math:: C(d, w, r) \approx d\,w^2 r^2\,C(1, 1, 1)

So :math:`(\alpha^\varphi, \beta^\varphi, \gamma^\varphi)` with :math:`\alpha\beta^2\gamma^2 \approx 2` costs
:math:`2^\varphi` times as much. A real network follows that law only roughly, since its stem and head are not repeated
and its numbers are whole: ``nearest`` counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import pandas as pd

from course_lib.efficiency.cheap_layers import family_cost
from course_lib.lab.arguments import at_least, is_number, require

Direction = Literal["depth", "width", "resolution"]

# --- The law ----------------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """How many times as deep, as wide, and as many pixels each way."""

    depth: float
    width: float
    resolution: float

    @property
    def cost(self) -> float:
        """How many times as many multiplications, by the law."""
        return self.depth * self.width**2 * self.resolution**2


@dataclass(frozen=True)
class Coefficients:
    r"""The proportions of compound scaling; the defaults are EfficientNet's, found by a small grid search.

    Attributes
    ----------
    alpha, beta, gamma : the factors of depth, width and resolution for one step, each at least 1.

    Raises
    ------
    ValueError : one is below 1, or all are 1.
    """

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            require(name, getattr(self, name), lambda x: is_number(x) and x >= 1, "a number of at least 1")
        require("alpha, beta, gamma", self.growth, lambda x: x > 1, "not 1 all three")

    @property
    def growth(self) -> float:
        """How many times as many multiplications one step takes, by the law: about 2."""
        return self.alpha * self.beta**2 * self.gamma**2

    def at(self, phi: float) -> Factors:
        """Return the factors of ``phi`` steps; it need not be whole."""
        return Factors(self.alpha**phi, self.beta**phi, self.gamma**phi)


def single(direction: Direction, times: float) -> Factors:
    r"""Return the factors that spend ``times`` the multiplications on one direction:
    d = times, or w or r = :math:`\sqrt{times}`.

    Raises
    ------
    ValueError : the direction is none of the three, or ``times`` is not above 0.
    """
    _check_times(times)
    root = math.sqrt(times)
    ways = {
        "depth": Factors(times, 1.0, 1.0),
        "width": Factors(1.0, root, 1.0),
        "resolution": Factors(1.0, 1.0, root),
    }
    require("direction", direction, lambda name: name in ways, f"one of {', '.join(ways)}")
    return ways[direction]


def compound(times: float, coefficients: Coefficients | None = None) -> Factors:
    r"""Return the factors that spend ``times`` the multiplications on all three:
    :math:`\varphi = \log(times) / \log(\alpha\beta^2\gamma^2)` steps.

    Raises
    ------
    ValueError : ``times`` is not above 0.
    """
    _check_times(times)
    given = coefficients or Coefficients()
    return given.at(math.log(times) / math.log(given.growth))


def candidates(
    *, growth: float = 2.0, step: float = 0.05, tolerance: float = 0.05
) -> list[Coefficients]:  # fmt: skip
    r"""Return the proportions on a grid for which :math:`\alpha\beta^2\gamma^2` is near
    ``growth``.

    Each is tried on the small network (one step, so twice its cost), the best is kept,
    and serves for all larger ones.

    Parameters
    ----------
    step : between neighbours on the grid, which begins at 1.
    tolerance : how far from ``growth``, as a part of it.

    Raises
    ------
    ValueError : ``growth`` is not above 1, or ``step`` or ``tolerance`` not above 0.
    """
    require("growth", growth, lambda x: is_number(x) and x > 1, "a number above 1")
    for name, value in {"step": step, "tolerance": tolerance}.items():
        require(name, value, lambda x: is_number(x) and x > 0, "a number above 0")
    count = math.ceil((growth * (1 + tolerance) - 1) / step)
    grid = [round(1 + step * k, 10) for k in range(count + 1)]
    made = (Coefficients(*each) for each in itertools.product(grid, repeat=3) if max(each) > 1)
    return [each for each in made if abs(each.growth / growth - 1) <= tolerance + 1e-12]


# --- Networks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A network's size.

    Attributes
    ----------
    depth : blocks in each stage.
    width : channels of the first stage.
    resolution : pixels each way.

    Raises
    ------
    ValueError : one is below 1.
    """

    depth: int
    width: int
    resolution: int

    def __post_init__(self) -> None:
        at_least(1, depth=self.depth, width=self.width, resolution=self.resolution)

    def times(self, factors: Factors) -> list[Size]:
        """Return the whole sizes around this size scaled: each number rounded down and up, none below 1."""
        exact = [own * factor for own, factor in zip(self.whole, factors, strict=True)]
        ends = [sorted({max(1, math.floor(x)), max(1, math.ceil(x))}) for x in exact]
        return [Size(*each) for each in itertools.product(*ends)]

    @property
    def whole(self) -> tuple[int, int, int]:
        """Depth, width and resolution."""
        return self.depth, self.width, self.resolution


CostOf = Callable[[Size], float]
"""``size -> multiplications`` of one example."""
Path = Callable[[float], Factors]
"""``times -> factors``: a way to spend a budget, such as ``compound`` or ``partial(single, "depth")``."""


def family_multiplications(
    size: Size, *, channels: int = 1, classes: int = 10, block: str = "full"
) -> int:  # fmt: skip
    """Return the multiplications of a ``cheap_layers.family`` of this size, in closed
    form.
    """
    shape = (channels, size.resolution, size.resolution)
    cost = family_cost(shape, classes, block=block, width=size.width, depth=size.depth)
    return cost.multiplications


def nearest(
    base: Size, path: Path, times: float, cost: CostOf = family_multiplications
) -> Size:  # fmt: skip
    """Return the size along a path whose counted cost is nearest to ``times`` that of
    ``base``.

    The law says only where to look: from a quarter of the factor to four times it, at
    200 places, each number rounded down and up.

    Raises
    ------
    ValueError : ``times`` is not above 0.
    """
    _check_times(times)
    budget = times * cost(base)
    places = (path(times * 4 ** (k / 100)) for k in range(-100, 101))
    looked = dict.fromkeys(size for place in places for size in base.times(place))
    return min(looked, key=lambda size: abs(math.log(cost(size) / budget)))


def scaled_sizes(
    base: Size,
    times: float,
    cost: CostOf = family_multiplications,
    coefficients: Coefficients | None = None,
) -> pd.DataFrame:
    """Return what ``times`` the multiplications buy, a row for each way to spend them.

    Returns
    -------
    Rows ``depth``, ``width``, ``resolution`` and ``compound``; columns ``depth``, ``width``, ``resolution``,
    ``multiplications`` as counted, and ``budget``, their part of what was to be spent (1 is all of it).

    Raises
    ------
    ValueError : ``times`` is not above 0.
    """
    directions: tuple[Direction, ...] = ("depth", "width", "resolution")
    paths: dict[str, Path] = {name: partial(single, name) for name in directions}
    paths["compound"] = partial(compound, coefficients=coefficients)
    rows = {}
    for name, path in paths.items():
        size = nearest(base, path, times, cost)
        found = cost(size)
        rows[name] = (*size.whole, found, found / (times * cost(base)))
    columns = [*directions, "multiplications", "budget"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def _check_times(times: float) -> None:
    require("times", times, lambda x: is_number(x) and x > 0, "a number above 0")
