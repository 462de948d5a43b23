"""Hand out, collect, mark and give back, in a folder that ``nbgrader`` understands.

    python -m classroom.course release 02 [--keep-outputs]     ->  FOLDER/release/02_optimizers/
    python -m classroom.course collect 02 INBOX                INBOX/ada.ipynb  ->  FOLDER/submitted/ada/02_optimizers/
    python -m classroom.course collect 02 FOLDER/homes         the same from the homes of the room's server (``hub``)
    python -m classroom.course mark 02 [--only ada]            ->  FOLDER/autograded/, and the gradebook
    python -m classroom.course give-back 02                    ->  FOLDER/feedback/, FOLDER/marks.csv

``--folder`` names the folder (``class`` by default). Its ``nbgrader_config.py`` is written with the first release, so
that ``nbgrader formgrader`` and the other commands work in it as well.
"""

import argparse
import csv
import io
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nbgrader import preprocessors
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from traitlets.config import Config
from traitlets.config.loader import PyFileConfigLoader

from classroom.hub.publish import TARGET
from classroom.judge import sandbox
from classroom.judge.nbgrader_judge import Judge, RestoreCells, SaveMarks
from classroom.student_copy import write
from course_lib.lab.chapters import CHAPTERS
from course_lib.lab.files import replaced

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
LARGEST = 5 * 2**20  # bytes of a submission: nbgrader reads it in its own process
NAME = re.compile(r"[A-Za-z0-9_.-]+")
CONFIG_FILE = "nbgrader_config.py"
CONFIG = '''"""Settings of this class, made by ``python -m classroom.course``; it keeps what you add at the end."""

import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from classroom.course import settings

c = get_config()  # noqa: F821
c.merge(settings(Path(__file__).parent))
'''


class Refused(Exception):
    """What was asked for cannot be done; the words say why."""


def settings(folder: str | Path) -> Config:
    """The settings of nbgrader for a class in ``folder``."""
    folder = Path(folder).resolve()
    c, p = Config(), preprocessors
    c.CourseDirectory.course_id = "craft-of-training"
    c.CourseDirectory.root = str(folder)
    c.CourseDirectory.db_url = f"sqlite:///{folder / 'gradebook.db'}"
    # Without ClearSolutions: our sources hold none, and it would replace each stub, the bug to find too, by its own
    c.GenerateAssignment.preprocessors = [
        p.IncludeHeaderFooter, p.LockCells, p.CheckCellMetadata, p.ComputeChecksums, p.SaveCells, p.ClearHiddenTests,
        p.ClearMarkScheme, p.ComputeChecksums, p.CheckCellMetadata,
    ]  # fmt: skip
    c.Autograde.sanitize_preprocessors = [
        RestoreCells, p.OverwriteKernelspec, p.ClearOutput, p.CheckCellMetadata,
    ]  # fmt: skip
    c.RestoreCells.add_missing_cells = True
    c.Autograde.autograde_preprocessors = [Judge, SaveMarks, p.AssignLatePenalties, p.CheckCellMetadata]
    c.Judge.chapters = str(NOTEBOOKS)
    return c


def chapter_of(number: str) -> str:
    """The name of a chapter's notebook, which is that of its assignment: "02" -> "02_optimizers".

    Raises
    ------
    Refused : there is no such chapter.
    """
    for chapter in CHAPTERS:
        if number.isdecimal() and chapter.number == int(number) and (NOTEBOOKS / chapter.file).is_file():
            return Path(chapter.file).stem
    raise Refused(f"NB={number!r}: there is no such chapter; 00 to {CHAPTERS[-1].nn} are there")


def release(folder: Path, number: str, *, keep_outputs: bool = False) -> Path:
    """Make a chapter's student copy; the notebook to hand out."""
    name = chapter_of(number)
    _prepare(folder)
    write(NOTEBOOKS / f"{name}.ipynb", folder / "source" / name / f"{name}.ipynb", keep_outputs=keep_outputs)
    _done(_nbgrader(folder).generate_assignment(name), f"{name} was not released")
    return folder / "release" / name / f"{name}.ipynb"


def collect(folder: Path, number: str, inbox: Path) -> list[str]:
    """Copy ``inbox/LEARNER.ipynb`` to where nbgrader looks for it; the learners' names.

    Raises
    ------
    Refused : there is none, one's name has other signs than letters, digits, ``_``, ``.`` and ``-``, or is too large.
    """
    name = chapter_of(number)
    found = sorted(inbox.glob("*.ipynb"))
    if not found:
        raise Refused(f"{inbox}: there is no notebook in it; put one there for each learner, such as ada.ipynb")
    for path in found:
        if not NAME.fullmatch(path.stem) or path.stem.startswith("."):
            raise Refused(f"{path.name}: a learner's name may hold letters, digits and _ . -")
        _check_size(path)
    for path in found:
        to = folder / "submitted" / path.stem / name / f"{name}.ipynb"
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
    return [path.stem for path in found]


def collect_homes(folder: Path, number: str, homes: Path) -> Iterator[tuple[str, str]]:
    """Copy ``homes/LEARNER/course/NAME.ipynb``, from a hub's homes; each learner with why it was not copied, if so.

    Learners write there: no link is followed, and only a file of a submission's size is read.

    Raises
    ------
    Refused : nobody has the chapter's notebook.
    """
    name = chapter_of(number)
    learners = sorted(path.parents[1].name for path in homes.glob(f"*/{TARGET}/{name}.ipynb"))
    if not learners:
        raise Refused(f"{homes}: there is no notebook in it, such as ada.ipynb, and no ada/{TARGET}/{name}.ipynb")
    for learner in learners:
        to = folder / "submitted" / learner / name / f"{name}.ipynb"
        try:
            content = _read_without_links(homes, learner, TARGET, f"{name}.ipynb")
        except (OSError, Refused) as error:
            yield learner, f"not collected: {error.strerror if isinstance(error, OSError) else error}"
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        with replaced(to) as file:
            file.write(content)
        yield learner, ""


def mark(folder: Path, number: str, *, only: str = "") -> Iterator[tuple[str, str]]:
    """Mark what was handed in; each learner with what went wrong, if anything did.

    Raises
    ------
    Refused : nothing was handed in.
    NoSandbox : submissions cannot be run safely here, so none is marked.
    """
    sandbox.bwrap()
    name = chapter_of(number)
    learners = sorted(path.parent.name for path in (folder / "submitted").glob(f"{only or '*'}/{name}"))
    if not learners:
        raise Refused(f"{folder / 'submitted'}: {only or 'nobody'} has handed in {name}")
    api = _nbgrader(folder)
    for learner in learners:
        try:
            for path in (folder / "submitted" / learner / name).glob("*.ipynb"):
                _check_size(path)
            _done(api.autograde(name, learner), "not marked")
            yield learner, ""
        except Refused as error:
            yield learner, str(error)


def give_back(folder: Path, number: str) -> Path:
    """Make a page of feedback for each learner, and ``marks.csv``, whose path is returned."""
    name = chapter_of(number)
    _done(_nbgrader(folder).generate_feedback(name), f"there is no feedback on {name}")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["learner", "chapter", "exercise", "points", "of", "by hand"])
    table.writerows(marks(folder, number))
    with replaced(folder / "marks.csv") as file:
        file.write(text.getvalue().encode())
    return folder / "marks.csv"


def marks(folder: Path, number: str) -> list[tuple[str, str, str, float, float, str]]:
    """Learner, chapter, exercise, points, points to be had, and "to do" where the instructor still has to mark."""
    name = chapter_of(number)
    rows = []
    with Gradebook(_settings_of(folder).CourseDirectory.db_url) as book:
        for submission in book.assignment_submissions(name):
            for grade in (grade for notebook in submission.notebooks for grade in notebook.grades):
                if grade.max_score:
                    todo = "to do" if grade.needs_manual_grade else ""
                    rows.append((submission.student_id, name, grade.name, grade.score, grade.max_score, todo))
    return sorted(rows)


def _prepare(folder: Path) -> None:
    if not (folder / CONFIG_FILE).exists():
        with replaced(folder / CONFIG_FILE) as file:
            file.write(CONFIG.format(root=str(ROOT)).encode())


def _nbgrader(folder: Path) -> Any:
    here = str(Path(sys.executable).parent)  # nbgrader calls `alembic` by its name
    if here not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([here, os.environ["PATH"]])
    return NbGraderAPI(config=_settings_of(folder))


def _settings_of(folder: Path) -> Config:
    if not (folder / CONFIG_FILE).is_file():
        raise Refused(f"{folder}: no chapter has been released in this folder")
    return PyFileConfigLoader(CONFIG_FILE, path=str(folder.resolve())).load_config()


def _done(result: Mapping[str, Any], otherwise: str) -> None:
    if not result["success"]:
        said = f"{result.get('log', '')}\n{result.get('error', '')}".strip()
        raise Refused(f"{otherwise}: {said.splitlines()[-1] if said else 'nbgrader does not say why'}")


def _check_size(path: Path) -> None:
    _allowed(path.name, path.stat().st_size)


def _allowed(name: str, size: int) -> None:
    if size > LARGEST:
        raise Refused(f"{name} has {size / 2**20:.1f} MB, and {LARGEST / 2**20:.0f} are allowed: clear its outputs")


def _read_without_links(folder: Path, *names: str) -> bytes:
    """The bytes of ``folder / names[0] / …``, of which all names are a learner's to choose."""
    with ExitStack() as stack:
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        for last, name in enumerate(names, 1 - len(names)):
            stack.callback(os.close, here)
            kind = os.O_NONBLOCK if last == 0 else os.O_DIRECTORY  # a pipe would wait for its writer
            here = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=here)
        with open(here, "rb") as file:
            found = os.fstat(here)
            if not stat.S_ISREG(found.st_mode):
                raise Refused(f"{names[-1]} is no file")
            _allowed(names[-1], found.st_size)
            return file.read(LARGEST)


# The command line


def _release(folder: Path, given: argparse.Namespace) -> int:
    numbers = [chapter.nn for chapter in CHAPTERS] if given.chapter == "all" else [given.chapter]
    for number in numbers:
        print(f"to hand out: {release(folder, number, keep_outputs=given.keep_outputs)}", flush=True)
    return 0


def _collect(folder: Path, given: argparse.Namespace) -> int:
    if any(given.inbox.glob("*.ipynb")):
        print(f"collected: {', '.join(collect(folder, given.chapter, given.inbox))}")
        return 0
    troubled = 0
    for learner, trouble in collect_homes(folder, given.chapter, given.inbox):
        troubled += bool(trouble)
        print(f"{learner}: {trouble or 'collected'}", flush=True)
    return min(troubled, 1)


def _mark(folder: Path, given: argparse.Namespace) -> int:
    failed = 0
    for learner, trouble in mark(folder, given.chapter, only=given.only):
        failed += bool(trouble)
        print(f"{learner}: {trouble or 'marked'}", flush=True)
    return min(failed, 1)


def _give_back(folder: Path, given: argparse.Namespace) -> int:
    print(f"feedback: {folder / 'feedback'}; marks: {give_back(folder, given.chapter)}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; 1 if a submission could not be marked, 2 if nothing could be done."""
    parser = argparse.ArgumentParser(description="Hand out, collect, mark and give back a chapter.")
    parser.add_argument("--folder", type=Path, default=Path("class"), help="the folder of this class")
    steps = parser.add_subparsers(required=True)
    for name, do in {"release": _release, "collect": _collect, "mark": _mark, "give-back": _give_back}.items():
        step = steps.add_parser(name)
        step.set_defaults(do=do)
        step.add_argument("chapter", help="a chapter's number, such as 02" + ", or all" * (name == "release"))
        if name == "release":
            step.add_argument("--keep-outputs", action="store_true", help="keep the outputs of the chapter's cells")
        if name == "collect":
            step.add_argument("inbox", type=Path, help="a folder with one notebook a learner, or a hub's homes")
        if name == "mark":
            step.add_argument("--only", default="", help="one learner")
    given = parser.parse_args(arguments)
    try:
        return int(given.do(given.folder, given))
    except (Refused, sandbox.NoSandbox) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
