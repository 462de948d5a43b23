r"""Where a learning curve is going, and how sure that is: a forecast from its beginning, with an interval.

=======================  =============================================================================================
name                     what it gives
=======================  =============================================================================================
``extrapolate``          the value at a later epoch, with an interval
``will_it_beat``         the probability that it is better than a given one
``Unpromising``          the stopping criterion: the run will hardly beat the best one so far
``coverage``             how often the interval held, on curves that are known to the end
=======================  =============================================================================================

The curve is one of four ``families`` (``pow3``, ``pow4``, ``weibull``, ``mmf``; the others are the same curves) plus
independent normal noise. Before the data, all are alike: the families, the logarithms of their shapes' parameters and
of the noise within wide ranges, the first value, and the limit between the values seen and the best there can be. Limit
and amplitude are integrated out in closed form, the shapes on a grid that is refined where the weight is, so that the
forecast is an average over all curves that fit, each by how well it does. Nothing is drawn at random.

The noise of real validation curves is not independent, and a rate that falls later makes a curve that none of these
is: measure the ``coverage`` on runs of your own before you believe an interval.

Source: Domhan, Springenberg & Hutter 2015, IJCAI, who average over eleven families by Markov chain Monte Carlo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special

from course_lib.early_stopping.criteria import check_column, lower_is_better
from course_lib.early_stopping.families import FAMILIES, Array, Family, checked_curve, ranges
from course_lib.early_stopping.runs import Curve, Mode, check_mode
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.training import History

AVERAGED = ("pow3", "pow4", "weibull", "mmf")
LEAST = 5
"""Values that a forecast needs."""
_POINTS, _REFINEMENTS = 24, 10  # of a grid in each direction; of grids at most


@dataclass(frozen=True, eq=False)
class Forecast:
    """What a curve is expected to be at later epochs.

    Attributes
    ----------
    at : the epochs, ``[m]``.
    mean, low, high : the expected measured value and the ends of the interval, ``[m]``.
    confidence : of the interval.
    families : the share of each family.
    """

    at: Array
    mean: Array
    low: Array
    high: Array
    confidence: float
    families: dict[str, float] = field(default_factory=dict)


def extrapolate(
    curve: Curve,
    at: int | Sequence[int],
    *,
    mode: Mode = "max",
    limit: float | None = None,
    confidence: float = 0.9,
) -> Forecast:
    """Return a forecast of the values measured at the epochs ``at``, from those of epochs 1, 2, ….

    Parameters
    ----------
    curve : at least 5 values.
    mode : whether high (``"max"``) or low values are good. The curve is thought to improve: its limit is at least as
        good as the better half of what was seen.
    limit : the best value that there can be. By default 1 for values from 0 to 1 where high is good, 0 for losses that
        are nowhere below; else three times as far from the best value as that is from the worst.
    confidence : of the interval.

    Raises
    ------
    ValueError : an argument is out of its range.
    """
    epochs = np.atleast_1d(np.asarray(at))
    require("at", at, lambda _: epochs.dtype.kind in "iu" and epochs.min() >= 1, "whole numbers of at least 1")
    require("confidence", confidence, lambda c: is_number(c) and 0 < c < 1, "a number between 0 and 1")
    found = _mixture(curve, epochs.astype(float), mode, limit)
    mean = (found.weights[:, None] * found.means).sum(0)
    low, high = (found.quantile(q) for q in ((1 - confidence) / 2, (1 + confidence) / 2))
    if mode == "min":
        mean, low, high = -mean, -high, -low
    return Forecast(epochs.astype(float), mean, low, high, confidence, found.families)


def will_it_beat(curve: Curve, best: float, at: int, *, mode: Mode = "max", limit: float | None = None) -> float:
    """Return the probability that the value measured at epoch ``at`` is better than ``best``.

    Domhan et al. end a run where it is below 5%.

    Raises
    ------
    ValueError : as ``extrapolate``.
    """
    require("best", best, is_number, "a number")
    at_least(1, at=at)
    found = _mixture(curve, np.array([float(at)]), mode, limit)
    return float(1 - found.below(np.array([best if mode == "max" else -best]))[0])


@dataclass(frozen=True)
class Unpromising:
    """Stop a run that will hardly be better than ``best`` at epoch ``at``: with a probability below ``chance``.

    It is asked from the fifth validation on, one an epoch, and takes some hundredths of a second each time.

    Raises
    ------
    ValueError : an argument is out of its range.
    """

    best: float
    at: int
    chance: float = 0.05
    column: str = "val_accuracy"

    def __post_init__(self) -> None:
        require("best", self.best, is_number, "a number")
        at_least(1, at=self.at)
        require("chance", self.chance, lambda p: is_number(p) and 0 < p < 1, "a number between 0 and 1")
        check_column(column=self.column)

    def __call__(self, history: History) -> bool:
        values = history[self.column]
        if not LEAST <= len(values) < self.at:
            return False
        mode: Mode = "min" if lower_is_better(self.column) else "max"
        return will_it_beat(values, self.best, self.at, mode=mode) < self.chance


@dataclass(frozen=True)
class Coverage:
    """How many of the intervals held the value that came, and how wide they were on average."""

    share: float
    width: float
    curves: int


def coverage(
    curves: Sequence[Curve], seen: int, *, mode: Mode = "max", limit: float | None = None, confidence: float = 0.9
) -> Coverage:
    """Return how often the interval from the first ``seen`` values of a curve held its last value.

    Raises
    ------
    ValueError : no curves, one that has no more than ``seen`` values, or as ``extrapolate``.
    """
    require("curves", len(curves), lambda n: n > 0, "at least one")
    at_least(LEAST, seen=seen)
    require("curves", [len(c) for c in curves], lambda n: min(n) > seen, f"of more than {seen} epochs each")
    forecasts = [extrapolate(c[:seen], len(c), mode=mode, limit=limit, confidence=confidence) for c in curves]
    held = [f.low[0] <= c[-1] <= f.high[0] for f, c in zip(forecasts, curves, strict=True)]
    return Coverage(float(np.mean(held)), float(np.mean([f.high[0] - f.low[0] for f in forecasts])), len(curves))


# --- The average over curves ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Normals:
    """A mixture of normal distributions: weights ``[k]``, means and deviations ``[k, m]``."""

    weights: Array
    means: Array
    deviations: Array
    families: dict[str, float]

    def below(self, values: Array) -> Array:
        """The probability of lying below ``values`` ``[m]``."""
        return (self.weights[:, None] * special.ndtr((values - self.means) / self.deviations)).sum(0)

    def quantile(self, chance: float) -> Array:
        """The values ``[m]`` below which it lies with this probability, by halving."""
        low, high = (self.means - 9 * self.deviations).min(0), (self.means + 9 * self.deviations).max(0)
        for _ in range(60):
            middle = (low + high) / 2
            under = self.below(middle) < chance
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        return (low + high) / 2


def _mixture(curve: Curve, at: Array, mode: Mode, limit: float | None) -> _Normals:
    check_mode(mode)
    values = checked_curve(curve, LEAST)
    y = values if mode == "max" else -values
    ends = _limits(y, mode, limit)
    parts = [_of_family(FAMILIES[name], y, at, ends) for name in AVERAGED]
    logs = np.concatenate([log for log, _, _ in parts])
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    shares = np.split(weights, np.cumsum([len(log) for log, _, _ in parts])[:-1])
    families = {name: float(share.sum()) for name, share in zip(AVERAGED, shares, strict=True)}
    there = weights > 1e-7 * weights.max()  # of tens of thousands of curves a few thousand count
    means, deviations = (np.concatenate([part[k] for part in parts])[there] for k in (1, 2))
    return _Normals(weights[there] / weights[there].sum(), means, deviations, families)


def _limits(y: Array, mode: Mode, limit: float | None) -> tuple[float, float]:
    """Between what the limit of the curve is thought to lie."""
    span = max(float(np.ptp(y)), 1e-9)
    if limit is None:
        if mode == "max" and y.min() >= 0 and y.max() <= 1:
            highest = 1.0
        elif mode == "min" and y.max() <= 0:
            highest = 0.0
        else:
            highest = y.max() + 3 * span
    else:
        require("limit", limit, is_number, "a number, or None")
        highest = limit if mode == "max" else -limit
        if y.max() > highest:
            raise ValueError(f"limit={limit!r}: must be at least as good as all values, of which one is better")
    return float(y.max() - span / 2), float(highest)


def _of_family(family: Family, y: Array, at: Array, ends: tuple[float, float]) -> tuple[Array, Array, Array]:
    """Log weights ``[k]`` of a family's curves (θ and noise), and mean and deviation of each at ``at`` ``[k, m]``.

    Grids, each over what had weight in the one before, until the next would be hardly finer. A cell counts by its size.
    """
    x = np.arange(1, len(y) + 1, dtype=float)
    span = math.log(max(float(np.ptp(y)), 1e-9))
    prior = np.array([*ranges(family.shape, family.thetas, x[-1]), (span - math.log(1e4), span)])  # the last is noise
    box, whole = prior, np.prod(prior[:, 1] - prior[:, 0])
    for _ in range(_REFINEMENTS):
        steps = (box[:, 1] - box[:, 0]) / _POINTS
        *along, noises = (low + step * (np.arange(_POINTS) + 0.5) for (low, _), step in zip(box, steps, strict=True))
        theta = np.stack(np.meshgrid(*along, indexing="ij"), -1).reshape(-1, family.thetas)
        logs, means, deviations = _linear_part(family, theta, np.exp(noises), x, y, at, ends)
        logs = logs + math.log(np.prod(steps) / whole)
        heavy = logs > logs.max() - 14  # a millionth of the best
        points = [*theta[heavy.any(1)].T, noises[heavy.any(0)]]
        lowest, highest = np.array([p.min() for p in points]) - steps, np.array([p.max() for p in points]) + steps
        lowest[-1] -= 1  # what a coarse grid misses looks like noise: the next may find less of it
        finer = np.stack([np.maximum(lowest, prior[:, 0]), np.minimum(highest, prior[:, 1])], 1)
        if np.prod(finer[:, 1] - finer[:, 0]) > 0.5 * np.prod(box[:, 1] - box[:, 0]):
            break
        box = finer
    return logs.ravel(), means.reshape(-1, len(at)), deviations.reshape(-1, len(at))


def _linear_part(
    family: Family, theta: Array, noises: Array, x: Array, y: Array, at: Array, ends: tuple[float, float]
) -> tuple[Array, Array, Array]:
    r"""Integrate over limit c and amplitude b of :math:`y=c+b\,h(x)+\sigma\varepsilon`, for each θ and each σ.

    Gives ``[k, s]``, ``[k, s, m]`` and ``[k, s, m]`` for k θ, s ``noises`` and m epochs ``at``. h is the shape over its
    value at 1, so that c + b is the first value. (c, b) is normal, with the least squares as its mean and
    :math:`\sigma^2(\Phi^\top\Phi)^{-1}` as its covariance. The limit is cut off at ``ends``: a value follows it by
    ``along``, and takes over mean and variance of the truncated normal.
    """
    h, ahead = _over_first(family, x, theta), _over_first(family, at, theta)  # [k, n], [k, m]
    n, middle = len(x), h.mean(1)
    away = h - middle[:, None]
    spread = np.maximum(np.square(away).sum(1), 1e-12)
    b = (away * y).sum(1) / spread
    c = y.mean() - b * middle
    squares = np.maximum(np.square(y - y.mean()).sum() - spread * b**2, 0.0)
    var_b, var_c, both = 1 / spread, 1 / n + middle**2 / spread, -middle / spread  # over σ²
    sd_c = np.sqrt(var_c)[:, None] * noises  # [k, s]
    inside, shift, shrunk = _truncated(*((end - c)[:, None] / sd_c for end in ends))
    squared = -squares[:, None] / (2 * noises**2) - (n - 2) * np.log(noises)
    logs = squared - 0.5 * np.log(n * spread)[:, None] + inside
    along = 1 + ahead * (both / var_c)[:, None]  # [k, m]
    own = 1 + np.square(ahead) * (var_b - both**2 / var_c)[:, None]  # over σ², with the noise of the value itself
    means = (c[:, None] + b[:, None] * ahead)[:, None] + along[:, None] * (shift * sd_c)[..., None]
    variances = own[:, None] * np.square(noises)[:, None] + np.square(along)[:, None] * (shrunk * sd_c**2)[..., None]
    return logs, means, np.sqrt(variances)


def _over_first(family: Family, x: Array, theta: Array) -> Array:
    """The shape over its value at 1; one that has fallen to nothing before 1 is 1 there and 0 behind."""
    first = family.shape(np.ones(1), theta)
    return np.where(first > 0, family.shape(x, theta) / np.where(first > 0, first, 1.0), (x <= 1).astype(float))


def _truncated(low: Array, high: Array) -> tuple[Array, Array, Array]:
    """Log probability, mean and variance of a standard normal number that lies between ``low`` and ``high``."""
    mirrored = low > 0  # the tail that keeps its digits
    a, b = np.where(mirrored, -high, low), np.where(mirrored, -low, high)
    inside = special.log_ndtr(b) + np.log1p(-np.exp(np.minimum(special.log_ndtr(a) - special.log_ndtr(b), -1e-16)))
    at_a, at_b = (np.exp(np.minimum(-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - inside, 50.0)) for z in (a, b))
    mean = at_a - at_b
    variance = 1 + a * at_a - b * at_b - mean**2
    hopeless = inside < -200  # no weight; only to be finite
    mean = np.where(hopeless, 0.0, np.clip(mean, a, b))
    return inside, np.where(mirrored, -mean, mean), np.where(hopeless, 1.0, np.clip(variance, 0.0, 1.0))
