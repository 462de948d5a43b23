"""Honest comparisons: the same seeds in each arm, a 95% interval on each mean, and paired differences.

``compare({"plain": recipe, "with momentum": other}, model=..., data=..., seeds=5)`` trains each arm once a seed. The
seeds are shared: with seed 3 all arms start from the same weights and see the batches in the same order, so the
difference between two arms is taken seed by seed, and what a lucky start adds to both cancels out.

Each run computes on one thread of the processor. So the numbers are the same to the bit whether the runs follow one
another or are spread over all cores (``workers=``), which for networks as small as the course's is the better use of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from course_lib.lab import plotting
from course_lib.lab.arguments import at_least
from course_lib.lab.data import Dataset
from course_lib.lab.runtime import device, interactive, usable_cores
from course_lib.lab.training import Diverged, History, Recipe, evaluate, fit, fresh, trains_on

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

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
    reach = float(plotting.students_t(len(values) - 1, confidence) * values.std(ddof=1) / np.sqrt(len(values)))
    return Interval(mean, mean - reach, mean + reach, len(values))


@dataclass(frozen=True)
class Reach:
    """A metric: what it costs a run to reach ``target`` in a column of its history for the first time.

    ``cost`` is ``"examples"``, ``"seconds"`` (of training alone) or ``"epoch"``. A run that never gets there is
    *censored*: its cost is at least what it spent, and the comparison says so instead of leaving it out.
    """

    target: float
    column: str = "val_accuracy"
    cost: str = "examples"

    def __post_init__(self) -> None:
        if self.cost not in ("examples", "seconds", "epoch"):
            raise ValueError(f"cost={self.cost!r}: must be 'examples', 'seconds' or 'epoch'")

    def __str__(self) -> str:
        return f"{self.cost} to {self.column.replace('_', ' ')} {self.target:g}"

    def __call__(self, history: History) -> tuple[float, bool]:
        """What was spent, and whether the target was reached for it."""
        spent = np.cumsum(history["seconds"]) if self.cost == "seconds" else np.array(history[self.cost])
        values = np.array(history[self.column])
        there = values <= self.target if self.column.endswith("loss") else values >= self.target
        return float(spent[there.argmax() if there.any() else -1]), bool(there.any())


Metric = str | Reach | Callable[[nn.Module, Dataset], float]


@dataclass(frozen=True)
class Comparison:
    """The measured numbers of each arm, one a seed, and how to look at them.

    ``values`` maps an arm to an array ``[seeds]``; ``histories`` maps it to its runs' histories where it had any.
    A run that diverged counts as NaN. ``censored`` maps an arm to a truth value a seed: that number is not the value
    but what it exceeds (see ``Reach``); an interval is then open towards that side.
    """

    metric: str
    seeds: tuple[int, ...]
    values: Mapping[str, np.ndarray]
    histories: Mapping[str, list[History]]
    censored: Mapping[str, np.ndarray] = field(default_factory=dict)

    def interval(self, arm: str) -> Interval:
        """Mean and 95% interval of one arm; with censored runs the mean is a lower bound, and the interval open."""
        found = mean_interval(self.values[self._known(arm)])
        return replace(found, high=np.inf) if self._open(arm) else found

    def difference(self, arm: str, other: str) -> Interval:
        """Mean and 95% interval of ``arm - other``, paired by seed."""
        found = mean_interval(self.values[self._known(arm)] - self.values[self._known(other)])
        found = replace(found, high=np.inf) if self._open(arm) else found
        return replace(found, low=-np.inf) if self._open(other) else found

    def by(self, column: str) -> Comparison:
        """The same runs, compared by another column of their histories, of which the last row counts."""
        wrong = [arm for arm in self.histories if not self._whole(arm)]
        if wrong:
            raise ValueError(f"column={column!r}: not every run of {wrong[0]!r} has a history")
        values = {arm: np.array([h[column][-1] for h in histories]) for arm, histories in self.histories.items()}
        return Comparison(column, self.seeds, values, self.histories)

    def _whole(self, arm: str) -> bool:
        """Whether each run of an arm has a history."""
        return len(self.histories[arm]) == len(self.seeds) and all(map(len, self.histories[arm]))

    def _open(self, arm: str) -> int:
        """How many of an arm's runs are censored."""
        return int(self.censored[arm].sum()) if arm in self.censored else 0

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
                "censored": self._open(arm),
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
            ("> " if row["censored"] else "")
            + f"{row.iloc[0]:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"
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
        if frame["censored"].any():
            shown["not reached"] = [f"{n} of {len(self.seeds)}" if n else "" for n in frame["censored"]]
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
        lines = {}
        for arm in filter(self._whole, self.histories):
            rows = sorted({len(history) for history in self.histories[arm]})
            if len(rows) != 1:
                raise ValueError(f"column={column!r}: must be of runs of one length; {arm!r} has {rows}")
            lines[arm] = np.array([history[column] for history in self.histories[arm]])
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
    metric: Metric = "val_accuracy",
    workers: int | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Run each arm with the same seeds.

    Parameters
    ----------
    arms : a name -> a ``Recipe`` (trained on ``data`` from a fresh ``model()``), or a function of the seed that does
        whatever the arm does and returns a ``History`` or the measured number.
    metric : a column of the history, of which the last row counts; ``"test_accuracy"`` or ``"test_loss"``; any function
        ``(trained network, data) -> number``; or ``Reach(0.97)``, what it costs to reach a target. Choose between arms
        by a ``val_`` metric and report the chosen one by a ``test_`` metric.
    seeds : how many (0, 1, 2, …), or which.
    workers : processes among which the runs are shared, with the same numbers to the bit. By default one for each core
        that may be used when a person waits and the processor computes, else 1. Functions may be those of a notebook.

    Raises
    ------
    ValueError : no arms, fewer than two seeds, no worker, or a recipe without ``model`` and ``data``.
    Exception : whatever a run raises, with a note that names its arm and seed.
    """
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds={seeds}: a comparison needs at least 2 different seeds")
    if not arms:
        raise ValueError("arms={}: a comparison needs at least one arm")
    if workers is None:
        workers = usable_cores() if interactive() and device().type == "cpu" else 1
    at_least(1, workers=workers)
    jobs = [(name, arm, seed, metric, model, data) for name, arm in arms.items() for seed in seeds]
    show = interactive() if progress is None else progress
    outcomes = []
    with tqdm(total=len(jobs), disable=not show, leave=False) as bar:
        for job, outcome in zip(jobs, spread(_one_run, jobs, workers), strict=True):
            bar.set_description(job[0])
            outcomes.append(outcome)
            bar.update()
    values, histories, censored = {}, {}, {}
    for k, name in enumerate(arms):
        own = outcomes[k * len(seeds) : (k + 1) * len(seeds)]
        values[name] = np.array([value for value, _, _ in own])
        histories[name] = [history for _, _, history in own if history is not None]
        censored[name] = np.array([not reached for _, reached, _ in own])
    shown = metric if isinstance(metric, str) else str(metric) if isinstance(metric, Reach) else _name(metric)
    return Comparison(shown, seeds, values, histories, censored)


def spread(
    run: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], workers: int, *, ordered: bool = True
) -> Iterator[Any]:
    """``run(*job)`` for each job, by so many processes, each on one thread of the processor; in order, or as they end.

    The processes stay for the next call and end with this one, or a few minutes after their last work. Ctrl-C, and an
    error in a run, end the work of all of them.
    """
    jobs = list(jobs)
    workers = min(workers, len(jobs))
    if workers == 1:
        for job in jobs:
            with one_thread():
                found = run(*job)
            yield found
        return
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky import get_reusable_executor

    returned = "generator" if ordered else "generator_unordered"
    try:
        with parallel_config("loky", inner_max_num_threads=1):
            # No memory maps: they would leave a folder behind when a process is killed
            pool = Parallel(n_jobs=workers, return_as=returned, max_nbytes=None, batch_size=1)
            yield from pool(delayed(_on_one_thread)(run, job) for job in jobs)
    except BaseException:
        get_reusable_executor().shutdown(wait=True)
        raise


def _on_one_thread(run: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    with one_thread():
        return run(*job)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of the processor, and afterwards as many as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _one_run(
    name: str,
    arm: Recipe | Run,
    seed: int,
    metric: Metric,
    model: Callable[[], nn.Module] | None,
    data: Dataset | None,
) -> tuple[float, bool, History | None]:
    """The measured number of one run, whether it is the value and not only what that exceeds, and its history."""
    try:
        if isinstance(arm, Recipe):
            if model is None or data is None:
                raise ValueError(
                    "an arm that is a Recipe needs model= (a function that makes a fresh network) and data="
                )
            network = fresh(model, arm, seed=seed)  # the same first weights in every arm
            history = fit(network, data, arm, seed=seed, progress=False)
            if callable(metric) and not isinstance(metric, Reach):
                return float(metric(network, data)), True, history
            if metric in ("test_accuracy", "test_loss"):
                on_test = evaluate(network.to(trains_on(arm)), data.test)
                return {"test_accuracy": on_test.accuracy, "test_loss": on_test.loss}[metric], True, history
        else:
            found = arm(seed)
            if not isinstance(found, History):
                return float(found), True, None
            history = found
        if isinstance(metric, Reach):
            return *metric(history), history
        if not isinstance(metric, str):
            raise ValueError(f"metric={_name(metric)}: needs the trained network, so every arm must be a Recipe")
        return history[metric][-1], True, history
    except Diverged:
        return np.nan, True, None  # and the table says so
    except Exception as error:
        error.add_note(f"This happened in the arm {name!r}, with seed {seed}.")
        raise


def _name(metric: Callable[..., Any]) -> str:
    return getattr(metric, "__name__", type(metric).__name__).replace("_", " ")
