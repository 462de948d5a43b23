r"""Scaling laws: how a loss falls with parameters and examples, and what a fit says of runs that nobody has made.

==================  =====================================================  ============================================
name                what it computes                                       source
==================  =====================================================  ============================================
JointLaw            :math:`E + A\,N^{-\alpha} + B\,D^{-\beta}`             Hoffmann et al. 2022, arXiv:2203.15556
fit_joint_law       its five numbers, from runs                            Hoffmann et al. 2022, approach 3; scale of
                                                                           the objective: Besiroglu et al. 2024,
                                                                           arXiv:2404.10102
extrapolate         fits what was cheap, and compares with what was dear
==================  =====================================================  ============================================

Losses are in nats. N counts parameters, D examples (tokens), C operations; :math:`C = 6ND` for a forward pass (2 for
each parameter and example) and a backward pass (4): Kaplan et al. 2020, arXiv:2001.08361.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize
from threadpoolctl import threadpool_limits

from course_lib.lab.arguments import is_number, require

Array = np.ndarray
OPERATIONS = 6.0  # for each parameter and example


@dataclass(frozen=True)
class JointLaw:
    r"""A loss that falls with parameters and examples: :math:`L(N, D) = E + A\,N^{-\alpha} + B\,D^{-\beta}`.

    ``E`` is what no size and no amount of data takes away, the second term what the network is too small for, the third
    what it has not seen.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, parameters: Any, examples: Any) -> Any:
        """The loss at N and D, numbers or arrays."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(examples, dtype=float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta

    def best(self, operations: float, each: float = OPERATIONS) -> tuple[float, float]:
        r"""Parameters and examples of the lowest loss for a number of ``operations`` C.

        .. math:: N = G\left(\frac{C}{6}\right)^{\beta/(\alpha+\beta)},\quad
            D = G^{-1}\left(\frac{C}{6}\right)^{\alpha/(\alpha+\beta)},\quad
            G = \left(\frac{\alpha A}{\beta B}\right)^{1/(\alpha+\beta)}

        ``each`` is what stands for the 6. Source: Hoffmann et al. 2022, equation 4.
        """
        require("operations", operations, lambda x: is_number(x) and x > 0, "a number above 0")
        together = self.alpha + self.beta
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / together)
        pairs = operations / each
        return g * pairs ** (self.beta / together), pairs ** (self.alpha / together) / g


# --- The fit ----------------------------------------------------------------------------------------------------------


def fit_joint_law(
    parameters: Sequence[float], examples: Sequence[float], loss: Sequence[float], *, delta: float = 1e-3
) -> JointLaw:
    r"""Fit :math:`E + A\,N^{-\alpha} + B\,D^{-\beta}` to runs, as Hoffmann et al. do in their third approach.

    .. math:: \min \sum_i \operatorname{Huber}_\delta\left(
        \log\left(e^{\,e} + e^{\,a-\alpha\log N_i} + e^{\,b-\beta\log D_i}\right) - \log L_i\right)

    over :math:`e = \log E`, :math:`a = \log A`, :math:`b = \log B` and the exponents, by L-BFGS from the best places
    of a grid (variable projection: Czech et al. 2026, arXiv:2603.22339). Beyond ``delta`` an error counts in
    proportion, so that a run that went wrong does not decide. The sum is minimised: of the mean, the search ends
    before it has arrived (Besiroglu et al. 2024).

    Raises
    ------
    ValueError : fewer than six runs, fewer than two sizes or amounts, or a number that is not above 0.
    """
    n, d, y = _positive(parameters=parameters, examples=examples, loss=loss)
    _enough("parameters", [n], 2)
    _enough("examples", [d], 2)
    _enough("loss", [n, d], 6)
    require("delta", delta, lambda x: is_number(x) and x > 0, "a number above 0")
    log_n, log_d, log_y = np.log(n), np.log(d), np.log(y)
    # Centred, the exponents hardly pull at the factors, and the search is short
    mean_n, mean_d = log_n.mean(), log_d.mean()

    def objective(theta: Array) -> tuple[float, Array]:
        e, a, alpha, b, beta = theta
        terms = np.stack([np.full_like(log_n, e), a - alpha * (log_n - mean_n), b - beta * (log_d - mean_d)])
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        error = top + np.log(total) - log_y
        shares /= total
        small = np.abs(error) <= delta
        value = np.where(small, error**2 / 2, delta * (np.abs(error) - delta / 2)).sum()
        slope = np.where(small, error, delta * np.sign(error))
        gradient = np.array(
            [
                (slope * shares[0]).sum(),
                (slope * shares[1]).sum(),
                -(slope * shares[1] * (log_n - mean_n)).sum(),
                (slope * shares[2]).sum(),
                -(slope * shares[2] * (log_d - mean_d)).sum(),
            ]
        )
        return value / delta**2, gradient / delta**2

    with threadpool_limits(1):  # five numbers: threads would spend twenty times as long on waiting for one another
        ends = [
            optimize.minimize(objective, start, jac=True, method="L-BFGS-B", bounds=BOUNDS, options=PRECISELY)
            for start in _starts(log_n - mean_n, log_d - mean_d, y)
        ]
    e, a, alpha, b, beta = min(ends, key=lambda end: float(end.fun)).x
    return JointLaw(math.exp(e), math.exp(a + alpha * mean_n), float(alpha), math.exp(b + beta * mean_d), float(beta))


BOUNDS = ((-30, 30), (-30, 30), (1e-3, 5), (-30, 30), (1e-3, 5))
PRECISELY = {"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-7}
EXPONENTS = np.geomspace(0.03, 3, 12)


def _starts(x: Array, z: Array, loss: Array, count: int = 2) -> list[Array]:
    """Where to begin: the ``count`` best pairs of exponents of a grid, with the factors that suit each best.

    For given exponents the law is a sum of three terms whose factors are found at once, by least squares of the
    relative errors with no factor below zero (variable projection). ``x`` and ``z`` are centred logarithms of N and D.
    """
    found = []
    for alpha, beta in product(EXPONENTS, EXPONENTS):
        terms = np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * z)], axis=1) / loss[:, None]
        factors, error = optimize.nnls(terms, np.ones_like(loss))
        e, a, b = np.log(np.maximum(factors, 1e-4 * loss.min()))
        found.append((error, np.array([e, a, alpha, b, beta])))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])[:count]]


# --- What a fit says of runs that it has not seen ---------------------------------------------------------------------


@dataclass(frozen=True)
class Extrapolation:
    """A law fitted to the cheap runs, and what it says of the dear ones.

    ``table`` has one row a run that the fit did not see: parameters, examples, operations, the loss as it was
    (``observed``), as it was ``predicted``, and ``error``: predicted over observed, less 1.
    """

    law: JointLaw
    table: pd.DataFrame

    @property
    def worst(self) -> float:
        """The largest error, of either sign."""
        return float(self.table["error"].abs().max())

    @property
    def typical(self) -> float:
        """The root mean square of the errors."""
        return float((self.table["error"] ** 2).mean() ** 0.5)


def extrapolate(
    parameters: Sequence[float], examples: Sequence[float], loss: Sequence[float], *, largest: float
) -> Extrapolation:
    """Fit the runs of at most ``largest`` operations (six for each parameter and example), and predict the others.

    Raises
    ------
    ValueError : as ``fit_joint_law``; or no run is larger.
    """
    n, d, y = _positive(parameters=parameters, examples=examples, loss=loss)
    operations = OPERATIONS * n * d
    require("largest", largest, lambda x: is_number(x) and x < operations.max(), f"less than {operations.max():.3g}")
    seen = operations <= largest * (1 + 1e-9)
    law = fit_joint_law(n[seen].tolist(), d[seen].tolist(), y[seen].tolist())
    rest = ~seen
    predicted = law(n[rest], d[rest])
    columns = {"parameters": n[rest], "examples": d[rest], "operations": operations[rest], "observed": y[rest]}
    table = pd.DataFrame(columns | {"predicted": predicted, "error": predicted / y[rest] - 1})
    return Extrapolation(law, table.sort_values("operations", ignore_index=True))


# --- At the door ------------------------------------------------------------------------------------------------------


def _positive(**columns: Sequence[float]) -> tuple[Array, ...]:
    """As arrays of one length, all numbers above 0."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
    first = next(iter(arrays))
    for name, values in arrays.items():
        if values.ndim != 1 or len(values) != len(arrays[first]):
            raise ValueError(f"{name} has shape {list(values.shape)}: must hold one number for each of {first}")
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if len(wrong):
            raise ValueError(f"{name} holds {wrong[0]:g}: every number must be above 0 and finite")
    return tuple(arrays.values())


def _enough(name: str, columns: Sequence[Array], least: int) -> None:
    different = len(set(zip(*(column.tolist() for column in columns), strict=True)))
    if different < least:
        raise ValueError(f"{name} holds {different} different values: the law needs at least {least}")
