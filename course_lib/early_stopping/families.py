r"""Families of learning curves: what a curve of validation values looks like, fitted by least squares.

===============  =======================================================  ==============================================
name             the curve                                                parameters
===============  =======================================================  ==============================================
``pow3``         :math:`c-a\,x^{-\alpha}`                                 c the limit
``pow4``         :math:`c-(ax+b)^{-\alpha}`                               c the limit
``exp4``         :math:`c-e^{-ax^\alpha+b}`                               c the limit
``log_power``    :math:`a/(1+(x/e^b)^c)`                                  a the limit (c < 0), or the start of a fall
``weibull``      :math:`\alpha-(\alpha-\beta)\,e^{-(\kappa x)^\delta}`    α the limit, β the value at 0
``janoschek``    :math:`\alpha-(\alpha-\beta)\,e^{-\kappa x^\delta}`      the same
``mmf``          :math:`\alpha-(\alpha-\beta)/(1+(\kappa x)^\delta)`      the same (Morgan, Mercer & Flodin)
===============  =======================================================  ==============================================

x counts epochs from 1. The curves rise to their limit; falling ones (losses) are fitted upside down. Three of them are
one curve under three names (``exp4``, ``weibull`` and ``janoschek``), and ``log_power`` is an ``mmf`` that begins at 0.

All are linear in two numbers at most. So the others are searched for on a grid, each time with the best of the linear
ones (variable projection), and polished from the best place: no starting values are needed, and no local minimum of a
bad start is taken for a fit.

Source: Domhan, Springenberg & Hutter 2015, Speeding up automatic hyperparameter optimization of deep neural networks by
extrapolation of learning curves, IJCAI.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from course_lib.early_stopping.runs import Mode, check_mode
from course_lib.lab.arguments import is_number, require

Array = NDArray[np.float64]


# --- The formulas -----------------------------------------------------------------------------------------------------


def pow3(x: Array, c: float, a: float, alpha: float) -> Array:
    r"""Return :math:`c-a\,x^{-\alpha}`."""
    return c - a * x**-alpha


def pow4(x: Array, c: float, a: float, b: float, alpha: float) -> Array:
    r"""Return :math:`c-(ax+b)^{-\alpha}`."""
    return c - (a * x + b) ** -alpha


def exp4(x: Array, c: float, a: float, b: float, alpha: float) -> Array:
    r"""Return :math:`c-e^{-ax^\alpha+b}`."""
    return c - np.exp(-a * x**alpha + b)


def log_power(x: Array, a: float, b: float, c: float) -> Array:
    r"""Return :math:`a/(1+(x/e^b)^c)`."""
    return a / (1 + (x / math.exp(b)) ** c)


def weibull(x: Array, alpha: float, beta: float, kappa: float, delta: float) -> Array:
    r"""Return :math:`\alpha-(\alpha-\beta)\,e^{-(\kappa x)^\delta}`."""
    return alpha - (alpha - beta) * np.exp(-((kappa * x) ** delta))


def janoschek(x: Array, alpha: float, beta: float, kappa: float, delta: float) -> Array:
    r"""Return :math:`\alpha-(\alpha-\beta)\,e^{-\kappa x^\delta}`."""
    return alpha - (alpha - beta) * np.exp(-kappa * x**delta)


def mmf(x: Array, alpha: float, beta: float, kappa: float, delta: float) -> Array:
    r"""Return :math:`\alpha-(\alpha-\beta)/(1+(\kappa x)^\delta)`."""
    return alpha - (alpha - beta) / (1 + (kappa * x) ** delta)


# --- Their shapes: what is left to learn, falling towards 0 -----------------------------------------------------------

Shape = Callable[[Array, Array], Array]
"""``(x [n], θ [..., 1 or 2]) -> [..., n]``, θ in logarithms."""


def power_shape(x: Array, theta: Array) -> Array:
    r"""Return :math:`(x+d)^{-\alpha}` for θ = (log α, log d), or without d for θ = (log α)."""
    alpha = np.exp(theta[..., :1])
    return (x + (np.exp(theta[..., 1:]) if theta.shape[-1] > 1 else 0)) ** -alpha


def exponential_shape(x: Array, theta: Array) -> Array:
    r"""Return :math:`e^{-(\kappa x)^\delta}` for θ = (log κ, log δ)."""
    return np.exp(-((np.exp(theta[..., :1]) * x) ** np.exp(theta[..., 1:])))


def hyperbolic_shape(x: Array, theta: Array) -> Array:
    r"""Return :math:`1/(1+(\kappa x)^\delta)` for θ = (log κ, log δ)."""
    return 1 / (1 + (np.exp(theta[..., :1]) * x) ** np.exp(theta[..., 1:]))


def ranges(shape: Shape, count: int, last: float) -> list[tuple[float, float]]:
    """Return the lowest and highest log θ that are thought possible for curves of so many parameters, seen up to x."""
    if shape is power_shape:
        return [(math.log(0.02), math.log(8.0)), (math.log(0.01), math.log(20 * last))][:count]
    return [(math.log(0.02 / last), math.log(50.0)), (math.log(0.1), math.log(8.0))]


@dataclass(frozen=True)
class Family:
    """A formula, the shape that it is made of, and how its parameters come from those of the shape.

    ``parameters`` takes limit, amplitude (below zero: the curve is ``limit + amplitude * shape``) and θ in logarithms.
    A family that is ``at_zero`` either begins or ends there.
    """

    formula: Callable[..., Array]
    shape: Shape
    thetas: int
    parameters: Callable[[float, float, Array], tuple[float, ...]]
    at_zero: bool = False


FAMILIES: Mapping[str, Family] = {
    "pow3": Family(pow3, power_shape, 1, lambda c, b, t: (c, -b, math.exp(t[0]))),
    "pow4": Family(pow4, power_shape, 2, lambda c, b, t: (c, *_scaled(-b, t))),
    "exp4": Family(
        exp4, exponential_shape, 2,
        lambda c, b, t: (c, math.exp(t[0] * math.exp(t[1])), math.log(-b), math.exp(t[1])),
    ),
    "log_power": Family(
        log_power, hyperbolic_shape, 2,
        lambda c, b, t: (c, -t[0], -math.exp(t[1])) if c else (b, -t[0], math.exp(t[1])),
        at_zero=True,
    ),
    "weibull": Family(weibull, exponential_shape, 2, lambda c, b, t: (c, c + b, math.exp(t[0]), math.exp(t[1]))),
    "janoschek": Family(
        janoschek, exponential_shape, 2,
        lambda c, b, t: (c, c + b, math.exp(t[0] * math.exp(t[1])), math.exp(t[1])),
    ),
    "mmf": Family(mmf, hyperbolic_shape, 2, lambda c, b, t: (c, c + b, math.exp(t[0]), math.exp(t[1]))),
}  # fmt: skip


def _scaled(amplitude: float, theta: Array) -> tuple[float, float, float]:
    r"""a, b and α with :math:`(ax+b)^{-\alpha}` = amplitude · :math:`(x+d)^{-\alpha}`."""
    alpha = math.exp(theta[0])
    a = amplitude ** (-1 / alpha)
    return a, a * math.exp(theta[1]), alpha


# --- The fit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FittedCurve:
    """A curve of a family: its parameters as in the table, upside down with ``mode="min"``, and how well it fits.

    ``sd`` is the standard deviation of the residuals, over the observations less the parameters (NaN if none are left).
    """

    family: str
    parameters: tuple[float, ...]
    mode: Mode
    sd: float

    def at(self, x: float | Sequence[float] | Array) -> Array:
        """Return the curve's values at these epochs."""
        values = FAMILIES[self.family].formula(np.asarray(x, dtype=float), *self.parameters)
        return values if self.mode == "max" else -values


def fit_family(curve: Sequence[float], family: str, *, mode: Mode = "max") -> FittedCurve:
    """Return the curve of ``family`` with the least squares to the values of epochs 1, 2, …, among those that improve.

    Raises
    ------
    ValueError : fewer than 4 values, one that is not finite, or no such family.
    """
    values = checked_curve(curve, 4)
    require("family", family, lambda f: f in FAMILIES, " or ".join(map(repr, FAMILIES)))
    check_mode(mode)
    kind, x = FAMILIES[family], np.arange(1, len(values) + 1, dtype=float)
    y = values if mode == "max" else -values
    box = ranges(kind.shape, kind.thetas, x[-1])
    grid = np.stack(np.meshgrid(*(np.linspace(*ends, 40) for ends in box), indexing="ij"), -1).reshape(-1, kind.thetas)
    errors = np.square(_left(grid, kind, x, y)).sum(-1)
    lowest, highest = np.array(box).T
    # A grid point may be the best only because the valley is narrow: polish some, and take the best of those
    polished = [
        optimize.least_squares(
            _left, start, args=(kind, x, y), bounds=(lowest, highest), xtol=1e-15, ftol=1e-15, gtol=1e-15
        )
        for start in grid[np.argsort(errors, kind="stable")[:4]]
    ]
    theta = min(polished, key=lambda found: found.cost).x
    limit, amplitude = (float(part) for part in _linear(kind.shape(x, theta), y, kind.at_zero))
    free = len(x) - kind.thetas - (1 if kind.at_zero else 2)
    sd = math.sqrt(np.square(_left(theta, kind, x, y)).sum() / free) if free else math.nan
    return FittedCurve(family, tuple(map(float, kind.parameters(limit, amplitude, theta))), mode, sd)


def _linear(shape: Array, y: Array, at_zero: bool) -> tuple[Array, Array]:
    """The limit and the amplitude with the least squares, for shapes ``[..., n]``; the amplitude is below zero."""
    if at_zero:  # it begins there, or ends there where all is below zero: a loss upside down
        rise = 1 - shape if y.mean() > 0 else shape
        size = (rise * y).sum(-1) / np.square(rise).sum(-1)
        return (size, -size) if y.mean() > 0 else (np.zeros_like(size), size)
    middle = shape.mean(-1, keepdims=True)
    away = shape - middle
    spread = np.square(away).sum(-1)
    least = -1e-12 * (np.ptp(y) + 1e-12)  # a curve that does not improve is nearly flat
    amplitude = np.minimum((away * y).sum(-1) / np.where(spread > 0, spread, 1.0), least)
    return y.mean() - amplitude * middle[..., 0], amplitude


def _left(theta: Array, kind: Family, x: Array, y: Array) -> Array:
    """The residuals, for θ ``[..., thetas]``."""
    shape = kind.shape(x, theta)
    limit, amplitude = _linear(shape, y, kind.at_zero)
    return limit[..., None] + amplitude[..., None] * shape - y


def checked_curve(curve: Sequence[float], least: int) -> Array:
    """Return the values of a curve as an array.

    Raises
    ------
    ValueError : fewer than ``least`` values, or one that is not finite.
    """
    require("curve", len(curve), lambda n: n >= least, f"of at least {least} epochs")
    require("curve", list(curve), lambda c: all(is_number(float(v)) for v in c), "finite numbers")
    return np.asarray(curve, dtype=float)
