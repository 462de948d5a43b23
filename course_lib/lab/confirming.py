"""A recorded study after a change of the code that is to leave its runs as they are: shown by running, not by reading.

    python -m course_lib.lab.confirming 13 --since HEAD~1      # or: make confirm NB=13 SINCE=HEAD~1

A row of a study holds the fingerprint of the code that made it, and one line mended in a function that it calls makes
it outdated, also where the mended case never comes up in the study. Running the study again takes hours. Here one run
of each outdated arm is repeated, the shortest that is recorded, by the code as it stands. Found again to the last bit,
its rows are believed on; the book notes which run was repeated, where and when, behind the rows, which stay as they
were. On another kind of processor no number of float32 comes out again to the last bit; so where the row's is not
found, the older code, checked out beside, runs the same on this machine, and the two must agree.

What is measured in seconds cannot be confirmed. One seed is evidence for the others, not proof: a case that comes up
with one seed only would not be seen. Whoever changes what a method computes runs the study again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm.auto import tqdm

from course_lib.lab import runtime
from course_lib.lab.arguments import require
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.studies import (
    Book,
    Study,
    arm_fingerprint,
    declared,
    job_of,
    provenance,
    study_file,
)


@dataclass(frozen=True)
class Outdated:
    """An arm whose rows hold another fingerprint than the code has now, and the recorded run that will be repeated."""

    before: str
    now: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What came of an arm: ``by`` says what it agreed with; None where the code finds something else."""

    arm: Outdated
    by: str | None


def outdated(study: Study, book: Book) -> list[Outdated]:
    """The arms of which there are rows of other code only, each with its shortest run."""
    there = {(job_of(row).key, row["fingerprint"]) for row in book.rows}
    found: dict[tuple[str, str], Outdated] = {}
    for row in book.rows:
        job = job_of(row)
        now = arm_fingerprint(study, job)
        if now == row["fingerprint"] or (job.key, now) in there:
            continue
        arm = row["fingerprint"], now
        if arm not in found or row["seconds"] < found[arm].row["seconds"]:
            found[arm] = Outdated(row["fingerprint"], now, row)
    return list(found.values())


def confirm(
    study: Study, file: Path, since: str | None = None, *, workers: int | None = None, progress: bool | None = None
) -> list[Verdict]:
    """Repeat a run of each outdated arm, and note in ``file`` those that find the same, as each ends.

    Parameters
    ----------
    since : a commit with the code that made the rows, for numbers that this processor does not find to the last bit.

    Raises
    ------
    ValueError : the study times its runs; the data are others than those recorded; or ``since`` has other code than the
        rows.
    """
    require("study", study.chapter, lambda _: not study.alone, "one that does not time its runs: run it again")
    book = Book(file)
    left = outdated(study, book)
    for part in dict.fromkeys(each.row["part"] for each in left):
        recorded = next(own["data"][part] for own in reversed(book.sessions) if part in own["data"])
        if fingerprint(study.parts[part].data()) != recorded:
            raise ValueError(f"data={part!r}: must be the data that were recorded")
    show = runtime.interactive() if progress is None else progress
    workers = max(1, min(workers or runtime.usable_cores(), len(left)))
    verdicts = []
    with ExitStack() as stack:
        trees = [runtime.checkout() or Path.cwd()]
        if since is not None and left:
            trees.append(stack.enter_context(checked_out(since, trees[0])))
        free: SimpleQueue[list[Runner]] = SimpleQueue()
        for _ in range(workers):
            free.put([stack.enter_context(Runner(tree, study.chapter)) for tree in trees])

        def one(arm: Outdated) -> Verdict:
            runners = free.get()
            try:
                return Verdict(arm, _agrees_with(arm, runners, since))
            finally:
                free.put(runners)

        pool = stack.enter_context(ThreadPoolExecutor(workers))  # each waits for a process
        ended = as_completed([pool.submit(one, arm) for arm in left])
        for future in tqdm(ended, total=len(left), disable=not show, desc=f"study {study.chapter}"):
            verdict = future.result()
            if verdict.by is not None:
                book.confirm(_entry(verdict))
            verdicts.append(verdict)
    return verdicts


def _agrees_with(arm: Outdated, runners: list[Runner], since: str | None) -> str | None:
    new = runners[0].run(arm.row)
    require("code", new["fingerprint"], lambda found: found == arm.now, f"that which stood at the start, {arm.now}")
    if _numbers(new) == _numbers(arm.row):
        return "the recorded run"
    if len(runners) == 1:
        return None
    old = runners[1].run(arm.row)
    name = f"{arm.row['part']}, {arm.row['arm']}"
    require("since", since, lambda _: old["fingerprint"] == arm.before, f"a commit with the code of the rows of {name}")
    return f"the code of {runners[1].commit} on the same machine" if _numbers(new) == _numbers(old) else None


def _numbers(row: dict[str, Any]) -> str:
    """What a run measured, every digit of it."""
    return json.dumps([row["value"], row["first_epoch"]], sort_keys=True)


def _entry(verdict: Verdict) -> dict[str, Any]:
    arm = verdict.arm
    made = provenance()
    return {
        "confirmed": arm.before,
        "as": arm.now,
        "run": list(astuple(job_of(arm.row))),
        "by": verdict.by,
        "date": datetime.date.today().isoformat(),
        "device": made["device"],
        "torch": made["torch"],
    }


# --- Processes of two trees of code -----------------------------------------------------------------------------------


class Runner:
    """A process that runs what it is told with the code of one tree."""

    def __init__(self, tree: Path, chapter: str) -> None:
        self.tree, self.chapter = tree, chapter
        named = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=tree, capture_output=True, text=True)
        self.commit = named.stdout.strip()

    def __enter__(self) -> Runner:
        places = {"PYTHONPATH": str(self.tree), "COURSE_DATA": str(runtime.data_folder()), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, self.chapter],
            cwd=self.tree,
            env=os.environ | places,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def run(self, row: dict[str, Any]) -> dict[str, Any]:
        """The run of a row once more.

        Raises
        ------
        RuntimeError : the process has ended (what it said stands on the error stream), or has the code of another tree.
        """
        sent, received = self.process.stdin, self.process.stdout
        assert sent is not None
        assert received is not None
        sent.write(json.dumps(astuple(job_of(row))) + "\n")
        sent.flush()
        answer = received.readline()
        if not answer:
            raise RuntimeError(f"a run of {row['part']!r}, {row['arm']!r}, has failed with the code of {self.tree}")
        made, tree = json.loads(answer)
        if Path(tree).resolve() != self.tree.resolve():
            raise RuntimeError(f"the code of {tree} was run in place of that of {self.tree}")
        return made


# Only names that older trees have, too
_SERVER = """
import json, os, sys
said = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
import course_lib
from course_lib.lab import studies
from course_lib.lab.experiments import one_thread
study = studies.declared(sys.argv[1])
for line in sys.stdin:
    job = studies.Job(*json.loads(line))
    with one_thread():
        row = studies.run_job(study, job, studies.arm_fingerprint(study, job))
    print(json.dumps([row, os.path.dirname(os.path.dirname(course_lib.__file__))]), file=said, flush=True)
"""


@contextmanager
def checked_out(commit: str, root: Path) -> Iterator[Path]:
    """Within it the files of a commit lie in a folder beside.

    Raises
    ------
    ValueError : there is no such commit.
    """
    with tempfile.TemporaryDirectory(prefix="since-") as folder:
        tree = Path(folder) / "tree"
        made = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), commit], cwd=root, capture_output=True, text=True
        )
        require("since", commit, lambda _: made.returncode == 0, f"a commit of this checkout ({made.stderr.strip()})")
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=root, capture_output=True)


def main(arguments: list[str] | None = None) -> int:
    """Confirm the study of the chapter that the command line names; 1 where an arm finds something else."""
    parser = argparse.ArgumentParser(description="Repeat one run of each outdated arm of a chapter's recorded study.")
    parser.add_argument("chapter", help="a chapter's number, such as 13")
    parser.add_argument("--since", help="a commit with the code that made the rows (on another processor)")
    parser.add_argument("--workers", type=int, default=None, help="runs at a time; default: one for each core")
    options = parser.parse_args(arguments)
    try:
        study = declared(options.chapter)
        verdicts = confirm(study, study_file(study.chapter), options.since, workers=options.workers)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    others = [verdict.arm.row for verdict in verdicts if verdict.by is None]
    print(f"study {study.chapter}: {len(verdicts) - len(others)} of {len(verdicts)} outdated arms find the same")
    for row in others:
        print(f"  finds something else: {row['part']}, {row['arm']}{', tuning' if row['tuning'] else ''}: run it again")
    return bool(others)


if __name__ == "__main__":
    # By the module's own name, as for the studies
    sys.exit(importlib.import_module("course_lib.lab.confirming").main())
