"""Recorded studies: what a minute cannot tell, run once at a real scale, and recorded so that it can be believed.

    python -m course_lib.lab.studies 02          # or: make study NB=02

A chapter declares its study in ``course_lib/studies/chapter_NN.py`` as ``STUDY``. Running it appends one line of JSON
for each finished run to ``data/studies/chapter_NN.jsonl``: a kill loses the runs that were under way, and the next call
goes on with them. A notebook shows it with ``recorded("02", "mnist")``, an ordinary ``Comparison``.

==============  =======================================================================================================
``Study``       a question, and the parts that answer it
``Part``        data, arms, seeds, and what is measured
``Tuned``       an arm whose setting is chosen first: on the validation split, with seeds of its own
``RecipeFor``   an arm whose recipe is made from the data
``run_study``   runs what is not recorded yet
``recorded``    what was found, if it was found by the code as it stands
==============  =======================================================================================================

With the rows stands where they came from: versions, processor, date, seconds, the checksum of the data. Each row holds
the fingerprint of its arm (``fingerprints.py``); rows of other code, or of another declaration, are refused, until a
repeated run has shown that the other code finds the same (``confirming.py``).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from course_lib.lab import runtime
from course_lib.lab.arguments import require
from course_lib.lab.data import Dataset
from course_lib.lab.experiments import Comparison, one_thread, spread
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.training import Diverged, History, Recipe, evaluate, fit, fresh, trains_on

STUDIES = "course_lib.studies"  # the package with one module a chapter

Arm = Callable[[Dataset, int], "float | Mapping[str, float | list[float]]"]
"""``(data, seed) -> number``, or several by name: whatever a recipe alone cannot say. Lists of numbers are curves."""


@dataclass(frozen=True)
class RecipeFor:
    """An arm whose recipe needs the data first: their mean colour, their classes, their size."""

    make: Callable[[Dataset], Recipe]


@dataclass(frozen=True)
class Tuned:
    """An arm with a setting to choose: ``candidates`` are trained with ``seeds``, and the best on average is the arm.

    Best is the highest accuracy on the validation split; a candidate of which a run diverged is out. A candidate that
    is a function says it itself: ``val_accuracy`` is one of its numbers.
    """

    candidates: Mapping[str, Recipe | RecipeFor | Arm]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One comparison of a study.

    Attributes
    ----------
    title : what is compared, and on what, as a reader should see it.
    data : makes the data set; called once in each process.
    arms : a name -> a recipe, ``RecipeFor`` the data, a ``Tuned`` choice among them, or a function of data and seed.
    seeds : of the runs that are reported.
    model : makes the network of arms that are recipes, which are measured by their test accuracy.
    """

    title: str
    data: Callable[[], Dataset]
    arms: Mapping[str, Recipe | RecipeFor | Tuned | Arm]
    seeds: tuple[int, ...]
    model: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class Study:
    """A question and its parts, by name.

    ``alone``: one run at a time, with all threads of the processor. For what is timed.
    """

    chapter: str
    question: str
    parts: Mapping[str, Part]
    alone: bool = False


class StudyOutdated(RuntimeError):
    """What is recorded was found by other code than that which stands now, or is not whole."""


@dataclass(frozen=True)
class Job:
    """One run: an arm of a part (of a tuned arm, one candidate), with one seed."""

    part: str
    arm: str
    candidate: str | None
    seed: int
    tuning: bool

    @property
    def key(self) -> tuple[Any, ...]:
        return self.part, self.arm, self.candidate, self.seed, self.tuning


@dataclass(frozen=True)
class Recorded(Comparison):
    """A comparison that was recorded. ``caption`` says at what scale, where and when; ``chosen`` what tuning chose."""

    caption: str = ""
    chosen: Mapping[str, str] | None = None

    def table(self, baseline: str | None = None, digits: int = 3) -> Any:
        """The comparison's table with the study's caption."""
        return super().table(baseline, digits).set_caption(self.caption)


# --- Running ----------------------------------------------------------------------------------------------------------


def declared(chapter: str) -> Study:
    """The study of a chapter (``"02"``).

    Raises
    ------
    ValueError : the chapter has none.
    """
    name = f"{STUDIES}.chapter_{str(chapter).zfill(2)}"
    try:
        return importlib.import_module(name).STUDY
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ValueError(f"chapter={chapter!r}: there is no study of it ({name.replace('.', '/')}.py)") from None


def run_study(study: Study, file: Path, *, workers: int | None = None, progress: bool | None = None) -> int:
    """Run what ``file`` does not hold yet, and append it there; returns the number of new rows.

    By default one process for each core, or one in all on a GPU and for a study that runs ``alone``. Choices are made
    when all their runs are there.

    Raises
    ------
    ValueError : more than one worker for a study that runs alone.
    """
    if study.alone:
        require("workers", workers, lambda given: given in (None, 1), "1 or None: this study times its runs")
    workers = workers or (1 if study.alone or runtime.device().type != "cpu" else runtime.usable_cores())
    for job in every_job(study):
        arm_fingerprint(study, job)  # now: a file that is edited while the study runs would be read as it is by then
    book = Book(file)
    book.open_session(study, workers)
    show = runtime.interactive() if progress is None else progress
    new = 0
    for jobs in (list(tuning_jobs(study)), None):
        jobs = list(final_jobs(study, book.rows)) if jobs is None else jobs
        done = {_key(row) for row in book.rows if row["fingerprint"] == arm_fingerprint(study, job_of(row))}
        left = [job for job in jobs if job.key not in done]
        with tqdm(
            total=len(jobs), initial=len(jobs) - len(left), disable=not show, desc=f"study {study.chapter}"
        ) as bar:
            work = [(study, job, arm_fingerprint(study, job)) for job in left]
            rows = (run_job(*each) for each in work) if study.alone else spread(run_job, work, workers, ordered=False)
            for row in rows if work else ():
                book.append(row)
                new += 1
                bar.update()
    return new


def tuning_jobs(study: Study) -> Iterator[Job]:
    """The runs that choose."""
    for name, part in study.parts.items():
        for arm, what in part.arms.items():
            if isinstance(what, Tuned):
                for seed in what.seeds:
                    yield from (Job(name, arm, candidate, seed, True) for candidate in what.candidates)


def final_jobs(study: Study, rows: list[dict[str, Any]]) -> Iterator[Job]:
    """The runs that are reported, with the candidates that tuning chose."""
    for name, part in study.parts.items():
        tuned = [arm for arm, what in part.arms.items() if isinstance(what, Tuned)]
        tries: dict[str, list[dict[str, Any]]] = {arm: [] for arm in tuned}
        for row in rows:
            if row["part"] == name and row["tuning"] and row["arm"] in tries:
                tries[row["arm"]].append(row)
        candidates = {arm: chosen(study, name, arm, tries[arm]) for arm in tuned}
        for seed in part.seeds:
            yield from (Job(name, arm, candidates.get(arm), seed, False) for arm in part.arms)


def every_job(study: Study) -> Iterator[Job]:
    """One run of each kind that may be asked for: every arm, or each of its candidates, to choose and to report."""
    for name, part in study.parts.items():
        for arm, what in part.arms.items():
            for candidate in what.candidates if isinstance(what, Tuned) else (None,):
                yield from (Job(name, arm, candidate, 0, tuning) for tuning in (True, False))


def chosen(study: Study, part: str, arm: str, rows: list[dict[str, Any]]) -> str:
    """The candidate with the best mean over the tuning seeds.

    Raises
    ------
    StudyOutdated : not all candidates were run, or every one diverged.
    """
    what = study.parts[part].arms[arm]
    assert isinstance(what, Tuned)
    means = {}
    for candidate in what.candidates:
        jobs = [Job(part, arm, candidate, seed, True) for seed in what.seeds]
        means[candidate] = float(np.mean([_on_validation(_value(study, job, rows)["value"]) for job in jobs]))
    best = max(means, key=lambda candidate: means[candidate])
    if means[best] == -np.inf:
        raise StudyOutdated(f"every candidate of {arm!r} diverged: {', '.join(what.candidates)}")
    return best


def _on_validation(value: Any) -> float:
    """What a candidate's run is judged by; of one that diverged, less than anything."""
    if isinstance(value, Mapping):
        require("candidates", list(value), lambda names: "val_accuracy" in names, "functions that return val_accuracy")
        value = value["val_accuracy"]
    return -math.inf if value is None else value


def run_job(study: Study, job: Job, identity: str) -> dict[str, Any]:
    """One run, as the row that is recorded. ``value`` is None where it diverged."""
    part, started = study.parts[job.part], time.perf_counter()
    data = _data(study.chapter, job.part, part.data)
    what = _made(_what(study, job), data)
    row = {"part": job.part, "arm": job.arm, "candidate": job.candidate, "seed": job.seed, "tuning": job.tuning}
    value: Any = None
    first: dict[str, float] = {}
    try:
        if isinstance(what, Recipe):
            assert part.model is not None, "an arm that is a recipe needs the part's model"
            network = fresh(part.model, what, seed=job.seed)
            history = fit(network, data, what, seed=job.seed, progress=False)
            if job.tuning:
                value = history["val_accuracy"][-1]
            else:
                value = evaluate(network.to(trains_on(what)), data.test).accuracy
            first = first_loss(history, data, what)
        else:
            value = what(data, job.seed)
    except Diverged:
        pass
    value = dict(value) if isinstance(value, Mapping) else value
    seconds = round(time.perf_counter() - started, 2)
    return row | {"value": value, "seconds": seconds, "first_epoch": first, "fingerprint": identity}


def first_loss(history: History, data: Dataset, recipe: Recipe) -> dict[str, float]:
    """The mean training loss of the first epoch: what a test repeats, to see that the code still does the same."""
    steps = recipe.steps(len(data.train))[0]
    return {"mean_loss": float(np.mean(history.losses[:steps]))}


def repeat_first_epoch(study: Study, job: Job) -> dict[str, float]:
    """Train the first epoch of a recorded run once more; compare with the row's ``first_epoch``."""
    part = study.parts[job.part]
    data = _data(study.chapter, job.part, part.data)
    what = _made(_what(study, job), data)
    assert isinstance(what, Recipe)
    assert part.model is not None
    once = replace(what, validate_every=1, stop=lambda history: True)
    with one_thread():
        history = fit(fresh(part.model, once, seed=job.seed), data, once, seed=job.seed, progress=False)
    return first_loss(history, data, once)


def arm_fingerprint(study: Study, job: Job) -> str:
    """What a run depends on, but for its seed and the contents of the data (their checksum stands with the session)."""
    part, what = study.parts[job.part], _what(study, job)
    # One arm has many runs, and a digest of all that it uses takes a while. The objects are kept, so ids stay theirs
    known = _fingerprints.setdefault((id(what), id(part), job.tuning), (what, part, ""))
    if not known[2]:
        known = (what, part, fingerprint((what, part.model, part.data, job.tuning)))
        _fingerprints[id(what), id(part), job.tuning] = known
    return known[2]


_fingerprints: dict[tuple[int, int, bool], tuple[Any, Part, str]] = {}


def _made(what: Recipe | RecipeFor | Arm, data: Dataset) -> Recipe | Arm:
    return what.make(data) if isinstance(what, RecipeFor) else what


def _what(study: Study, job: Job) -> Recipe | RecipeFor | Arm:
    try:
        what = study.parts[job.part].arms[job.arm]
        if isinstance(what, Tuned):
            return what.candidates[job.candidate or ""]
    except KeyError as error:
        raise StudyOutdated(
            f"the study has no {error} any more, of which there are rows: run it into a new file"
        ) from None
    return what


_loaded: dict[tuple[str, str], Dataset] = {}  # one data set a process: the last one asked for


def _data(chapter: str, part: str, make: Callable[[], Dataset]) -> Dataset:
    if (chapter, part) not in _loaded:
        _loaded.clear()
        _loaded[chapter, part] = make()
    return _loaded[chapter, part]


# --- The file ---------------------------------------------------------------------------------------------------------


class Book:
    """The rows of a study, one JSON line each; among them the sessions that made them, and what was confirmed since.

    A row has the fingerprint of the code that made it, or the newest that was confirmed to find the same
    (``confirming.py``).

    A line is written whole and forced to disk. A kill can leave half a line at the end, which is cut off when the book
    is opened to write; any other line that cannot be read is an error.

    Raises
    ------
    StudyOutdated : a line in the middle cannot be read.
    """

    def __init__(self, file: Path, *, read_only: bool = False) -> None:
        self.file = file
        text = file.read_bytes() if file.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if text != whole and not read_only:
            with open(file, "r+b") as stream:
                stream.truncate(len(whole))
        self.rows: list[dict[str, Any]] = []
        self.sessions: list[dict[str, Any]] = []
        self.confirmations: list[dict[str, Any]] = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise StudyOutdated(f"{file.name}, line {number}, cannot be read: {error}") from None
            held = self.sessions if "session" in entry else self.confirmations if "confirmed" in entry else self.rows
            held.append(entry)
        for entry in self.confirmations:  # in the order in which they came: code may change back, too
            self._believe(entry)

    def open_session(self, study: Study, workers: int) -> None:
        """Write down where the rows to come are made, if it is another place than that of the last ones."""
        data = {name: fingerprint(part.data()) for name, part in study.parts.items()}
        found = provenance() | {"workers": workers, "data": data}
        if study.alone:
            found["threads"] = torch.get_num_threads()
        last = self.sessions[-1] if self.sessions else {}
        if {k: v for k, v in last.items() if k not in ("session", "date")} != found:
            session = len(self.sessions) + 1
            entry = {"session": session, "date": datetime.date.today().isoformat()} | found
            self._write(entry)
            self.sessions.append(entry)

    def append(self, row: dict[str, Any]) -> None:
        """Keep a row, for good, before anything else happens."""
        row = row | {"in": self.sessions[-1]["session"]}
        self._write(row)
        self.rows.append(row)

    def confirm(self, entry: dict[str, Any]) -> None:
        """Keep that the rows of one fingerprint are those of another, too: a run with either found the same."""
        self._write(entry)
        self.confirmations.append(entry)
        self._believe(entry)

    def _believe(self, entry: dict[str, Any]) -> None:
        for row in self.rows:
            if row["fingerprint"] == entry["confirmed"]:
                row["fingerprint"] = entry["as"]

    def _write(self, entry: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "ab") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def provenance() -> dict[str, Any]:
    """Versions, and what computes; each run uses one thread of a processor, but in a study that runs alone."""
    machine = runtime.describe_machine()["this machine"]
    where = machine["processor"] if runtime.device().type == "cpu" else machine["device"]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": where,
        "threads": 1,
    }


def study_file(chapter: str) -> Path:
    """Where a chapter's rows are: in the checkout, and so in git."""
    root = runtime.checkout()
    folder = root / "data" if root is not None else runtime.data_folder()
    return folder / "studies" / f"chapter_{str(chapter).zfill(2)}.jsonl"


# --- Reading ----------------------------------------------------------------------------------------------------------


def recorded(chapter: str, part: str | None = None, of: str | None = None) -> Recorded:
    """What a study found: the values of its arms over seeds, on the test split.

    Parameters
    ----------
    part : one of the study's parts; may be left out where there is only one.
    of : where each run measured several numbers, which of them; arms that did not measure it are left out. Curves are
        in ``histories``.

    Raises
    ------
    ValueError : there is no such study, part or number.
    StudyOutdated : the rows were found by other code, or some are missing: run the study again.
    """
    study = declared(chapter)
    return read(study, study_file(study.chapter), part, of)


def read(study: Study, file: Path, part: str | None = None, of: str | None = None) -> Recorded:
    """``recorded`` for any study and file."""
    if part is None and len(study.parts) == 1:
        part = next(iter(study.parts))
    if part is None or part not in study.parts:
        raise ValueError(f"part={part!r}: the study has {', '.join(map(repr, study.parts))}")
    book, declared_part = Book(file, read_only=True), study.parts[part]
    jobs = list(final_jobs(replace(study, parts={part: declared_part}), book.rows))
    values, used = {arm: np.full(len(declared_part.seeds), np.nan) for arm in declared_part.arms}, []
    curves_of: dict[str, dict[int, History]] = {}
    measured: dict[str, set[str]] = {}  # each number with the arms that have it
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in book.rows:
        rows.setdefault(_key(row), []).append(row)
    for job in jobs:
        row = _value(study, job, rows.get(job.key, []))
        used.append(row)
        value = row["value"]
        if isinstance(value, dict):
            curves = {name: curve for name, curve in value.items() if isinstance(curve, list)}
            if curves:
                curves_of.setdefault(job.arm, {})[job.seed] = _history(curves)
            for name in (name for name in value if name not in curves):
                measured.setdefault(name, set()).add(job.arm)
            value = value.get(of) if of not in curves else None
        values[job.arm][declared_part.seeds.index(job.seed)] = np.nan if value is None else value
    if measured:
        if of not in measured:
            raise ValueError(f"of={of!r}: each run measured {', '.join(map(repr, measured))}; choose one")
        # a student without a teacher agrees with nobody; an arm all of whose runs diverged has measured nothing
        without = {job.arm for job, row in zip(jobs, used, strict=True) if isinstance(row["value"], dict)}
        values = {arm: found for arm, found in values.items() if arm in measured[of] or arm not in without}
    # A run that diverged left no curves: an empty history keeps the others at the place of their seed
    histories = {arm: [found.get(seed, History()) for seed in declared_part.seeds] for arm, found in curves_of.items()}
    metric = "test accuracy" if of is None else of
    choices = {job.arm: job.candidate for job in jobs if job.candidate}
    caption = _caption(declared_part, book, [r for r in book.rows if r["part"] == part], used)
    return Recorded(metric, declared_part.seeds, values, histories, {}, caption, choices)


def _history(curves: Mapping[str, list[float]]) -> History:
    """One column a curve; where one is shorter than another, it ends in NaN."""
    rows = [dict(zip(curves, row, strict=True)) for row in zip_longest(*curves.values(), fillvalue=math.nan)]
    return History(rows, epochs=int(rows[-1].get("epoch", len(rows))))


def _caption(part: Part, book: Book, rows: list[dict[str, Any]], used: list[dict[str, Any]]) -> str:
    session = next(s for s in book.sessions if s["session"] == used[-1]["in"])
    hours = sum(row["seconds"] for row in rows) / 3600
    cores = "one core" if session["threads"] == 1 else f"{session['threads']} cores"
    seeds = "one seed" if len(part.seeds) == 1 else f"{len(part.seeds)} seeds"
    runs = "one run" if len(rows) == 1 else f"{len(rows)} runs, tuning included,"
    return (
        f"{part.title}: {seeds}; {runs} in {hours:.1f} hours of {cores} "
        f"({session['device']}, torch {session['torch']}, {session['date']}). Bold: the interval of the difference "
        "excludes zero."
    )


def _value(study: Study, job: Job, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a run.

    Raises
    ------
    StudyOutdated : there is none, or only of other code.
    """
    same = [row for row in rows if _key(row) == job.key]
    again = f"run the study again (make study NB={study.chapter})"
    if not same:
        raise StudyOutdated(f"the run {job.key} of study {study.chapter} is not recorded: {again}")
    expected = arm_fingerprint(study, job)
    for row in same:
        if row["fingerprint"] == expected:
            return row
    raise StudyOutdated(f"the run {job.key} of study {study.chapter} was recorded with other code: {again}")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return job_of(row).key


def job_of(row: Mapping[str, Any]) -> Job:
    """The run that a row tells of."""
    return Job(row["part"], row["arm"], row["candidate"], row["seed"], row["tuning"])


def main(arguments: list[str] | None = None) -> int:
    """Run the study of the chapter that the command line names."""
    parser = argparse.ArgumentParser(description="Run a chapter's recorded study; what is recorded already is kept.")
    parser.add_argument("chapter", help="a chapter's number, such as 02")
    parser.add_argument("--workers", type=int, default=None, help="processes; default: one for each core, 1 on a GPU")
    options = parser.parse_args(arguments)
    try:
        study = declared(options.chapter)
        new = run_study(study, study_file(study.chapter), workers=options.workers)
    except (ValueError, StudyOutdated) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"study {study.chapter}: {new} new runs; {study_file(study.chapter)}")
    for name in study.parts:
        print(f"\n{name}: {study.parts[name].title}")
    return 0


if __name__ == "__main__":
    # By the module's own name: the studies import it, and a class of __main__ would be another than theirs
    sys.exit(importlib.import_module("course_lib.lab.studies").main())
