"""A search on real runs: successive halving, Hyperband or ASHA, with checkpoints that go on.

    found = search(build, configs, SuccessiveHalving(1, 27), data=data, folder="runs")
    found.table(), found.best.job.config

``build`` makes a ``Trial`` (a network and a recipe) of a configuration. Each is trained by ``fit`` to the epochs of its
rung; the checkpoint stays, and a promoted run goes on from it, to the bit as if it had never been interrupted. Finished
jobs are written down one by one. A search that was killed is called again with the same arguments: what is written down
is taken from there, what was under way goes on from its checkpoint, and the table is the same.

The rule alone decides, by values and epochs, so the table does not depend on how many processes there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import filelock
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm.auto import tqdm

from course_lib.early_stopping.criteria import check_column, lower_is_better
from course_lib.early_stopping.halving import HalvingRule, Job
from course_lib.early_stopping.outcomes import Done, Outcome, follow
from course_lib.early_stopping.runs import Mode
from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Dataset
from course_lib.lab.experiments import one_thread
from course_lib.lab.files import replaced
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.runtime import device, interactive, usable_cores
from course_lib.lab.training import Diverged, History, Recipe, fit, fresh


@dataclass(frozen=True)
class Trial:
    """What a configuration stands for: a function that makes the network, and how it is trained.

    The recipe's ``epochs`` are the rule's affair. Its schedule must not depend on their number, since nobody knows
    before how long a run will be: a constant rate, or one that falls after so many steps.
    """

    model: Callable[[], nn.Module]
    recipe: Recipe


@dataclass(frozen=True)
class Found(Outcome):
    """What a search found.

    Attributes
    ----------
    column : of the history, whose last row counts.
    configs : by name, as they were given.
    histories : of each configuration as far as it was trained.
    """

    column: str = "val_accuracy"
    configs: Mapping[str, Any] = field(default_factory=dict)
    histories: Mapping[str, History] = field(default_factory=dict)


def search(
    build: Callable[[Any], Trial],
    configs: Mapping[str, Any] | Sequence[Any],
    rule: HalvingRule,
    *,
    data: Dataset,
    folder: str | Path,
    column: str = "val_accuracy",
    seed: int = 0,
    workers: int | None = None,
    progress: bool | None = None,
) -> Found:
    """Train configurations as ``rule`` says, and return what came of each.

    Parameters
    ----------
    build : a configuration -> its ``Trial``.
    configs : by name, or a list, whose names are then "0", "1", … Whatever ``build`` takes: numbers, dictionaries.
    rule : ``SuccessiveHalving``, ``Hyperband`` or ``Asha``.
    folder : where checkpoints and finished jobs lie; one for each search.
    column : of the history, whose last row counts; low is good if its name ends in ``loss``.
    seed : of first weights and batches, the same for all.
    workers : processes, each on one thread. By default one for each core that may be used when a person waits and the
        processor computes, else 1; with 0 or 1 everything is trained here.

    A run that diverges counts as worst, like one whose value is NaN, and is not trained again.

    Raises
    ------
    ValueError : a configuration's schedule depends on the number of epochs, its validations leave a rung out, or the
        folder holds another search.
    Exception : whatever a run raises, with a note that names its configuration.
    """
    named = dict(configs) if isinstance(configs, Mapping) else {str(k): c for k, c in enumerate(configs)}
    require("configs", len(named), lambda n: n > 0, "at least one")
    check_column(column=column)
    if workers is None:
        workers = usable_cores() if interactive() and device().type == "cpu" else 1
    at_least(0, workers=workers)
    trials = {name: build(config) for name, config in named.items()}
    for name, trial in trials.items():
        _check_trial(name, trial, rule.milestones, data)
    mode: Mode = "min" if lower_is_better(column) else "max"
    plan = rule.plan(list(named), mode)
    seen = fingerprint((data.train, data.val, seed))
    identities = {name: fingerprint((t.model, replace(t.recipe, epochs=1), seen)) for name, t in trials.items()}
    book, pool = _Book(Path(folder), identities), _Pool(workers)
    jobs: list[Done] = []
    last: dict[str, _Row] = {}

    def start(job: Job) -> None:
        if book.row(job) is None:
            pool.submit(job, _train, trials[job.config], data, seed, job.epochs, book.checkpoint(job.config))

    def finish(job: Job) -> float:
        row = book.row(job)
        if row is None:
            row = pool.result(job)
            book.enter(job, row)
        spent = row["epochs"] - (last[job.config]["epochs"] if job.config in last else 0)
        last[job.config] = row
        value = math.nan if row["diverged"] else _history(row)[column][-1]
        jobs.append(Done(job, spent, value, row["diverged"]))
        bar.update()
        return value

    show = interactive() if progress is None else progress
    with pool, tqdm(disable=not show, leave=False, desc="jobs") as bar:
        follow(plan, start, finish)
    return Found(tuple(jobs), mode, column, named, {name: _history(row) for name, row in last.items()})


# --- One job ----------------------------------------------------------------------------------------------------------


class _Row(TypedDict):
    """What is written down of a finished job: the run's history so far, its epochs, and whether it diverged."""

    rows: list[dict[str, float]]
    epochs: int
    diverged: bool


def _history(row: _Row) -> History:
    return History(rows=row["rows"], epochs=int(row["rows"][-1]["epoch"]) if row["rows"] else 0)


def _train(trial: Trial, data: Dataset, seed: int, epochs: int, checkpoint: Path) -> _Row:
    """Train to so many epochs in all, from the checkpoint if there is one."""
    recipe = replace(trial.recipe, epochs=epochs)
    # A search that was killed may have left a process behind that still trains: wait for it, then take its checkpoint
    with filelock.FileLock(f"{checkpoint}.lock"), one_thread():
        model = fresh(trial.model, recipe, seed=seed)
        try:
            history = fit(model, data, recipe, seed=seed, checkpoint=checkpoint, progress=False)
        except Diverged as error:
            return {"rows": error.history.rows, "epochs": error.epoch, "diverged": True}
    # Not history.epochs, which leaves out the last epoch of a run that has stopped itself
    return {"rows": history.rows, "epochs": math.ceil(history.rows[-1]["epoch"]), "diverged": False}


class _Pool:
    """Jobs at work: in processes, or here, one at a time, when its result is asked for."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.waiting: dict[Job, Callable[[], _Row]] = {}

    def __enter__(self) -> _Pool:
        if self.workers > 1:
            from joblib.externals.loky import get_reusable_executor

            # It takes functions of a notebook too, and its processes stay for the next search, or end after a while
            self.executor = get_reusable_executor(max_workers=self.workers)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.workers > 1:
            self.executor.shutdown(wait=True, kill_workers=True)  # their checkpoints stay

    def submit(self, job: Job, run: Callable[..., _Row], *arguments: Any) -> None:
        if self.workers > 1:
            self.waiting[job] = self.executor.submit(run, *arguments).result
        else:
            self.waiting[job] = partial(run, *arguments)

    def result(self, job: Job) -> _Row:
        try:
            return self.waiting.pop(job)()
        except Exception as error:
            error.add_note(f"This happened in the configuration {job.config!r}, on the way to epoch {job.epochs}.")
            raise


# --- What is finished -------------------------------------------------------------------------------------------------


class _Book:
    """The finished jobs of a search, in one file that is whole at every moment, beside the checkpoints.

    Raises
    ------
    ValueError : the file cannot be read, or holds a configuration of the same name that was something else.
    """

    def __init__(self, folder: Path, identities: Mapping[str, str]) -> None:
        self.folder, self.file = folder, folder / "finished.json"
        self.identities: dict[str, str] = {}
        self.rows: dict[str, dict[str, _Row]] = {}
        if self.file.exists():
            try:
                stored = json.loads(self.file.read_bytes())
                self.identities, self.rows = stored["identities"], stored["rows"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"folder={str(folder)!r}: {self.file.name} cannot be read ({error!r})") from error
        for name, identity in identities.items():
            if self.identities.get(name, identity) != identity:
                raise ValueError(
                    f"folder={str(folder)!r} holds another search: its {name!r} had another network, recipe, data set "
                    "or seed; must be a folder of its own, or the same search"
                )
        self.identities |= identities

    def checkpoint(self, config: str) -> Path:
        return self.folder / f"{fingerprint(config)[:16]}.pt"

    def row(self, job: Job) -> _Row | None:
        """The job's row, if it is finished; the last one of a run that has diverged on the way."""
        rows = self.rows.get(job.config, {})
        diverged = (row for row in rows.values() if row["diverged"])
        return rows.get(str(job.epochs)) or next(diverged, None)

    def enter(self, job: Job, row: _Row) -> None:
        self.rows.setdefault(job.config, {})[str(job.epochs)] = row
        with replaced(self.file) as file:
            file.write(json.dumps({"identities": self.identities, "rows": self.rows}).encode())


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _check_trial(name: str, trial: Any, milestones: tuple[int, ...], data: Dataset) -> None:
    """Raise ValueError where a run to one milestone would not be the beginning of a run to the last."""
    require(f"build({name!r})", trial, lambda t: isinstance(t, Trial), "a Trial")
    every = trial.recipe.validate_every
    if every > 1 and any(epochs % round(every) for epochs in milestones):
        raise ValueError(
            f"configuration {name!r}: validate_every={every} leaves out one of the epochs {milestones} at which runs "
            "are compared; must divide them all, or be at most 1"
        )
    if trial.recipe.schedule is not None and _rates(trial, data, milestones[0], milestones) != _rates(
        trial, data, milestones[-1], milestones
    ):
        raise ValueError(
            f"configuration {name!r}: its schedule has other rates in {milestones[0]} epochs than in the first of "
            f"{milestones[-1]}; must not depend on the number of epochs, since a promoted run goes on"
        )


def _rates(trial: Trial, data: Dataset, epochs: int, milestones: tuple[int, ...]) -> list[list[float]]:
    """The learning rates up to the first milestone, by a schedule that was made for so many epochs."""
    recipe = replace(trial.recipe, epochs=epochs)
    optimizer = recipe.optimizer(trial.model().named_parameters())
    assert recipe.schedule is not None
    steps = recipe.steps(len(data.train))
    schedule = recipe.schedule(optimizer, sum(steps))
    optimizer._opt_called = True  # type: ignore[attr-defined]  # else torch warns of the missing steps
    rates = []
    for _ in range(sum(steps[: milestones[0]])):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        if not isinstance(schedule, ReduceLROnPlateau):
            schedule.step()
    return rates
