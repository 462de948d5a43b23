r"""The critical batch size: where more examples a step stop saving steps.

====================  ==================================================================  ============================
name                  what it gives                                                       source
====================  ==================================================================  ============================
``fit_critical``      the hyperbola through steps and examples to a target                McCandlish et al. 2018,
``CriticalBatch``     its three numbers, and steps and examples at any batch size         arXiv:1812.06162, section 2.3
``expected_gain``     part of the whole gradient's gain that a batch's step keeps         its section 2.2
``best_step_length``  the rate that gains the most with a batch                           its section 2.2
====================  ==================================================================  ============================

Few large steps or many small ones: a run to a target loss takes S steps and E = B S examples, and

.. math:: \left(\frac{S}{S_\mathrm{min}} - 1\right)\left(\frac{E}{E_\mathrm{min}} - 1\right) = 1,

so :math:`S = S_\mathrm{min}(1 + B_\mathrm{crit}/B)` and :math:`E = E_\mathrm{min}(1 + B/B_\mathrm{crit})` with
:math:`B_\mathrm{crit} = E_\mathrm{min}/S_\mathrm{min}`. At that size both are twice their least. It holds where the
rate is tuned at each batch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize

from course_lib.lab.arguments import at_least, is_number, is_whole, require

LEAST_SIZES = 3
_FURTHEST = 1000.0
"""The bend is looked for up to this factor below the smallest and above the largest batch."""


@dataclass(frozen=True)
class CriticalBatch:
    """What ``fit_critical`` found.

    Attributes
    ----------
    s_min : steps that the largest batches need.
    e_min : examples that the smallest batches need.
    b_crit : their ratio: the batch size with twice of both.
    low, high : 95% interval of ``b_crit`` over the seeds; both NaN where there was one seed, or no generator.
    error : the root mean square of the residuals of log S (0.1: the points lie within about 10%).
    left_out : ``(batch size, number of the run)`` of runs that never reached the target.
    """

    s_min: float
    e_min: float
    b_crit: float
    low: float
    high: float
    error: float
    left_out: tuple[tuple[int, int], ...] = ()

    def steps(self, batch_size: float) -> float:
        """Predicted steps to the target."""
        require("batch_size", batch_size, lambda b: is_number(b) and b > 0, "a number above 0")
        return self.s_min * (1 + self.b_crit / batch_size)

    def examples(self, batch_size: float) -> float:
        """Predicted examples to the target."""
        require("batch_size", batch_size, lambda b: is_number(b) and b > 0, "a number above 0")
        return self.e_min * (1 + batch_size / self.b_crit)


def fit_critical(
    steps: Mapping[int, Sequence[float | None]],
    *,
    generator: torch.Generator | None = None,
    resamples: int = 400,
) -> CriticalBatch:
    """Fit the hyperbola to the ``steps`` to a target, ``{batch size: [one number a seed]}``.

    Least squares of log S, so that a point at 50 steps counts as much as one at 5,000. For a given bend the best
    ``s_min`` is a mean, which leaves one unknown; all of its range is searched, so there is no start to choose.
    ``None`` and ``inf`` stand for a run that never reached the target: it is left out and named. That makes its batch
    size look better than it is; leave out the size if there are many.

    With ``generator`` an interval: the seeds are drawn again with replacement, for all sizes alike, ``resamples``
    times. An end of it is 0 or infinite where so drawn runs show no bend. Of few seeds it is too narrow, as bootstraps
    are: with 8 of them it holds the truth in about 87 of 100 cases.

    Raises
    ------
    ValueError : fewer than 3 sizes with a run that reached the target; sizes or steps that are no positive numbers;
        another number of runs at some size; or the sizes lie all on one side of the bend, so that it cannot be found.
    """
    at_least(1, resamples=resamples)
    table, left_out = _table(steps)
    sizes = np.array(list(steps), dtype=float)
    if (reached := int(np.isfinite(table).any(1).sum())) < LEAST_SIZES:
        named = f"; never reached at {sorted({size for size, _ in left_out})}" if left_out else ""
        raise ValueError(
            f"steps has {reached} batch sizes with a run that reached the target{named}: must have {LEAST_SIZES}"
        )
    bend, s_min, error = _fitted(sizes, table)
    if not 0 < bend < math.inf:
        flat = "steps times batch size is" if bend else "steps are"
        where = "above" if bend else "below"
        raise ValueError(
            f"steps at batch sizes {sorted(steps)}: {flat} about the same at all of them, so the bend lies far "
            f"{where}; must have sizes there"
        )
    low = high = math.nan
    if generator is not None and table.shape[1] > 1:
        seeds = torch.randint(table.shape[1], (resamples, table.shape[1]), generator=generator).numpy()
        drawn = [_fitted(sizes, table[:, chosen])[0] for chosen in seeds if _enough(table[:, chosen])]
        if drawn:
            # the nearest draw and not a mean of two: one of them may be infinite
            low, high = (float(q) for q in np.quantile(drawn, [0.025, 0.975], method="nearest"))
    return CriticalBatch(s_min, s_min * bend, bend, low, high, error, left_out)


def _table(steps: Mapping[int, Sequence[float | None]]) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """log S, ``[sizes, seeds]``, NaN where the target was never reached; and which those are."""
    counts = {len(runs) for runs in steps.values()}
    if not all(counts) or len(counts) > 1:
        raise ValueError(
            f"steps has {sorted(counts)} runs a batch size: must have equally many at each, of the same seeds"
        )
    rows, left_out = [], []
    for size, runs in steps.items():
        require("batch size", size, lambda b: is_whole(b) and b >= 1, "a whole number of at least 1")
        row = []
        for number, value in enumerate(runs):
            if value is None or value == math.inf:
                left_out.append((int(size), number))
                row.append(math.nan)
                continue
            require(
                f"steps[{size}][{number}]", value, lambda s: is_number(s) and s > 0, "a number above 0, None or inf"
            )
            row.append(math.log(value))
        rows.append(row)
    return np.array(rows, dtype=float).reshape(len(steps), max(counts, default=0)), tuple(left_out)


def _enough(table: np.ndarray) -> bool:
    return int(np.isfinite(table).any(1).sum()) >= LEAST_SIZES


def _fitted(sizes: np.ndarray, table: np.ndarray) -> tuple[float, float, float]:
    """The bend, s_min and the error that fit log S best; the bend is 0 or infinite where it lies out of sight."""
    there = np.isfinite(table)
    size, log_s = np.broadcast_to(sizes[:, None], table.shape)[there], table[there]

    def residuals(log_bend: np.ndarray) -> np.ndarray:  # [..., points]; s_min is the mean that is taken out
        rest = log_s - np.log1p(np.exp(log_bend)[..., None] / size)
        return rest - rest.mean(-1, keepdims=True)

    def error(log_bend: float) -> float:
        return float(np.square(residuals(np.array(log_bend))).mean())

    grid = np.linspace(math.log(size.min() / _FURTHEST), math.log(size.max() * _FURTHEST), 120)
    best = int(np.square(residuals(grid)).mean(-1).argmin())
    if best in (0, len(grid) - 1):
        return (0.0 if best == 0 else math.inf), math.nan, math.nan
    around = (grid[best - 1], grid[best + 1])
    found = optimize.minimize_scalar(error, bounds=around, method="bounded", options={"xatol": 1e-10})
    bend = math.exp(found.x)
    s_min = math.exp(float((log_s - np.log1p(bend / size)).mean()))
    return bend, s_min, math.sqrt(error(found.x))


def expected_gain(batch_size: float, noise_scale: float) -> float:
    r"""Return :math:`1/(1 + B_\mathrm{noise}/B)`: what the best step with a batch gains of what all examples would.

    Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.2.

    Raises
    ------
    ValueError : ``batch_size`` is not above 0, or ``noise_scale`` below 0.
    """
    require("batch_size", batch_size, lambda b: is_number(b) and b > 0, "a number above 0")
    require("noise_scale", noise_scale, lambda b: is_number(b) and b >= 0, "a finite number of at least 0")
    return 1 / (1 + noise_scale / batch_size)


def best_step_length(longest: float, batch_size: float, noise_scale: float) -> float:
    r"""Return :math:`\epsilon_\mathrm{max}/(1 + B_\mathrm{noise}/B)`, the rate that gains the most in expectation.

    ``longest`` is :math:`\epsilon_\mathrm{max} = |G|^2 / G^\top H G`, the best rate of the whole gradient. It grows
    with small batches in proportion, and not at all with large ones.
    Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.2.

    Raises
    ------
    ValueError : ``longest`` is not above 0, or as ``expected_gain``.
    """
    require("longest", longest, lambda rate: is_number(rate) and rate > 0, "a number above 0")
    return longest * expected_gain(batch_size, noise_scale)
