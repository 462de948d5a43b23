"""Honest comparisons: the same seeds in each arm, a 95% interval on each mean, and paired differences.

``compare({"plain": recipe, "with momentum": other}, model=..., data=..., seeds=5)`` trains each arm once a seed. The
seeds are shared: with seed 3 all arms start from the same weights and see the batches in the same order, so the
difference between two arms is taken seed by seed, and what a lucky start adds to both cancels out.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler
from scipy import stats
from torch import nn
from tqdm.auto import tqdm

from course_lib.lab import plotting
from course_lib.lab.data import Dataset
from course_lib.lab.runtime import interactive
from course_lib.lab.training import Diverged, History, Recipe, evaluate, fit, fresh

Run = Callable[[int], "History | float"]
"""One run of an arm: ``seed -> History`` or the measured number itself."""


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` runs with its confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width: the number behind the "±"."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero: for a difference, that the data show one."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """The mean of independent runs and its Student-t interval: ``mean ± t · s / √n``, ``n - 1`` degrees of freedom.

    A value that is NaN (a run that diverged) makes the whole interval NaN: there is no mean to speak of.

    Raises
    ------
    ValueError : fewer than two values, or a ``confidence`` outside (0, 1).
    """
    values = np.asarray(list(values), dtype=float)
    if len(values) < 2:
        raise ValueError(f"values={values.tolist()}: an interval needs at least 2 runs")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie strictly between 0 and 1")
    mean = float(values.mean())
    reach = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - reach, mean + reach, len(values))


@dataclass(frozen=True)
class Comparison:
    """The measured numbers of each arm, one a seed, and how to look at them.

    ``values`` maps an arm to an array ``[seeds]``; ``histories`` maps it to its runs' histories where it had any.
    A run that diverged counts as NaN.
    """

    metric: str
    seeds: tuple[int, ...]
    values: Mapping[str, np.ndarray]
    histories: Mapping[str, list[History]]

    def interval(self, arm: str) -> Interval:
        """Mean and 95% interval of one arm."""
        return mean_interval(self.values[self._known(arm)])

    def difference(self, arm: str, other: str) -> Interval:
        """Mean and 95% interval of ``arm - other``, paired by seed."""
        return mean_interval(self.values[self._known(arm)] - self.values[self._known(other)])

    def frame(self, baseline: str | None = None) -> pd.DataFrame:
        """One row an arm: mean, interval, and the paired difference to ``baseline`` (else the first arm)."""
        baseline = self._known(baseline) if baseline is not None else next(iter(self.values))
        rows = {}
        for arm in self.values:
            own, gap = self.interval(arm), self.difference(arm, baseline)
            rows[arm] = {
                self.metric: own.mean,
                "low": own.low,
                "high": own.high,
                f"minus {baseline}": gap.mean,
                "diff low": gap.low,
                "diff high": gap.high,
                "diverged": int(np.isnan(self.values[arm]).sum()),
            }
            if arm == baseline:
                rows[arm] |= {f"minus {baseline}": np.nan, "diff low": np.nan, "diff high": np.nan}
        return pd.DataFrame.from_dict(rows, orient="index")

    def table(self, baseline: str | None = None, digits: int = 3) -> Styler:
        """``frame`` in words a reader takes in at a glance; a difference whose interval excludes zero is bold."""
        frame = self.frame(baseline)
        column = frame.columns[3]
        shown = pd.DataFrame(index=frame.index)
        shown[f"{self.metric} (95% interval)"] = [
            f"{row.iloc[0]:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
            for _, row in frame.iterrows()
        ]
        shown[f"{column} (paired)"] = [
            f"{row[column]:+.{digits}f} [{row['diff low']:+.{digits}f}, {row['diff high']:+.{digits}f}]"
            if not np.isnan(row[column])
            else ""
            for _, row in frame.iterrows()
        ]
        if frame["diverged"].any():
            shown["diverged"] = [f"{n} of {len(self.seeds)}" if n else "" for n in frame["diverged"]]
        clear = (frame["diff low"] > 0) | (frame["diff high"] < 0)
        return shown.style.apply(
            lambda _: ["font-weight: bold" if c else "" for c in clear], subset=[f"{column} (paired)"]
        ).set_caption(f"{len(self.seeds)} seeds; bold: the interval of the difference excludes zero")

    def plot(self, ax: Any = None, **settings: Any) -> Any:
        """Each arm's runs as dots, its mean and interval beside them; returns the axes."""
        return plotting.intervals(self.values, ax=ax, xlabel=f"{self.metric.replace('_', ' ')}", **settings)

    def curves(self, column: str = "val_accuracy", ax: Any = None, **settings: Any) -> Any:
        """The mean of a history's column over epochs for each arm, with a 95% band; returns the axes.

        An arm of which a run diverged has no mean and is left out; the table names it.
        """
        lines = {
            arm: np.array([history[column] for history in histories])
            for arm, histories in self.histories.items()
            if len(histories) == len(self.seeds)
        }
        return plotting.curves(lines, ax=ax, ylabel=column.replace("_", " "), **settings)

    def _known(self, arm: str) -> str:
        if arm not in self.values:
            raise ValueError(f"arm={arm!r}: this comparison has {', '.join(map(repr, self.values))}")
        return arm


def compare(
    arms: Mapping[str, Recipe | Run],
    *,
    model: Callable[[], nn.Module] | None = None,
    data: Dataset | None = None,
    seeds: int | Iterable[int] = 5,
    metric: str = "val_accuracy",
    progress: bool | None = None,
) -> Comparison:
    """Run each arm with the same seeds.

    Parameters
    ----------
    arms : a name -> a ``Recipe`` (trained on ``data`` from a fresh ``model()``), or a function of the seed that does
        whatever the arm does and returns a ``History`` or the measured number.
    metric : a column of the history, of which the last epoch counts, or ``"test_accuracy"``/``"test_loss"`` (recipes
        only). Choose between arms by a ``val_`` metric and report the chosen one by a ``test_`` metric.
    seeds : how many (0, 1, 2, …), or which.

    Raises
    ------
    ValueError : no arms, fewer than two seeds, or a recipe without ``model`` and ``data``.
    """
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds={seeds}: a comparison needs at least 2 different seeds")
    if not arms:
        raise ValueError("arms={}: a comparison needs at least one arm")
    values: dict[str, np.ndarray] = {}
    histories: dict[str, list[History]] = {}
    show = interactive() if progress is None else progress
    with tqdm(total=len(arms) * len(seeds), disable=not show, leave=False) as bar:
        for name, arm in arms.items():
            bar.set_description(name)
            values[name], histories[name] = np.full(len(seeds), np.nan), []
            for k, seed in enumerate(seeds):
                try:
                    values[name][k], history = _one_run(arm, seed, metric, model, data)
                    if history:
                        histories[name].append(history)
                except Diverged:
                    pass  # stays NaN, and the table says so
                bar.update()
    return Comparison(metric, seeds, values, histories)


def _one_run(
    arm: Recipe | Run, seed: int, metric: str, model: Callable[[], nn.Module] | None, data: Dataset | None
) -> tuple[float, History | None]:
    """The measured number of one run, and its history where it has one."""
    if not isinstance(arm, Recipe):
        found = arm(seed)
        return (found[metric][-1], found) if isinstance(found, History) else (float(found), None)
    if model is None or data is None:
        raise ValueError("an arm that is a Recipe needs model= (a function that makes a fresh network) and data=")
    network = fresh(model, arm, seed=seed)  # the same first weights in every arm
    history = fit(network, data, arm, seed=seed, progress=False)
    if metric.startswith("test_"):
        on_test = evaluate(network, data.test)
        return {"test_accuracy": on_test.accuracy, "test_loss": on_test.loss}[metric], history
    return history[metric][-1], history
