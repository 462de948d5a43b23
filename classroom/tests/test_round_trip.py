"""Through nbgrader itself, on chapter 2: release, hand in, collect, mark, give back."""

import csv
import os
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from classroom import course
from classroom.tests.helping import chapter, needs_sandbox, solutions

NAME = "02_optimizers"
AUTOMATIC = 2 * 5 + 1  # five methods and a reading; design and report wait for the instructor
Edit = Callable[[NotebookNode, dict[str, NotebookNode]], None]


def right(notebook: NotebookNode, cells: dict[str, NotebookNode]) -> None:
    for exercise, source in solutions(chapter(f"{NAME}.ipynb")).items():
        cells[f"{exercise.replace('.', '-')}-answer"].source = source
    cells["02-8-report"].source = "Muon, as matrices matter."


def wrong(notebook: NotebookNode, cells: dict[str, NotebookNode]) -> None:
    cells["02-1-answer"].source = "def momentum_step(w, g, v, lr, beta):\n    return w - lr * g, v"


def broken(notebook: NotebookNode, cells: dict[str, NotebookNode]) -> None:
    right(notebook, cells)
    cells["02-1-answer"].source = "def momentum_step(w, g"


def empty(notebook: NotebookNode, cells: dict[str, NotebookNode]) -> None:
    pass


def tampered(notebook: NotebookNode, cells: dict[str, NotebookNode]) -> None:
    forged = (
        "def momentum_step(*a):\n    return a[0], a[2]\ncheck = lambda *a, **k: type('P', (), {'state': 'passed'})()"
    )
    cells["02-1-answer"].source = forged
    cells["02-1-mark"].source = "100.0"
    cells["02-1-mark"].metadata.nbgrader.points = 100
    cells["02-1-mark"].outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "100.0"}, execution_count=1)]
    notebook.cells.remove(cells["02-2-answer"])
    notebook.cells.remove(cells["02-2-mark"])
    forger = nbformat.v4.new_code_cell("100.0", metadata={"nbgrader": dict(cells["02-1-mark"].metadata.nbgrader)})
    forger.metadata.nbgrader.grade_id = "02-9-mark"
    notebook.cells.append(forger)


def endless(notebook: NotebookNode, cells: dict[str, NotebookNode]) -> None:
    right(notebook, cells)
    cells["02-2-answer"].source = "while True:\n    pass"


def hog(notebook: NotebookNode, cells: dict[str, NotebookNode]) -> None:
    right(notebook, cells)
    cells["02-1-answer"].source = "held = [bytearray(1 << 28) for _ in range(100)]"


LEARNERS: dict[str, tuple[Edit, float]] = {
    "right": (right, AUTOMATIC),
    "wrong": (wrong, 0),
    "broken": (broken, AUTOMATIC - 2),
    "empty": (empty, 0),
    "tampered": (tampered, 0),
    "endless": (endless, AUTOMATIC - 2 - 2),  # 02.3 is written with 02.2
    "hog": (hog, AUTOMATIC - 2),
}


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, inbox = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("inbox")
    released = course.release(folder, "02")
    with open(folder / course.CONFIG_FILE, "a", encoding="utf-8") as config:
        config.write("c.Judge.exercise_seconds = 8\n")
    for learner, (edit, _) in LEARNERS.items():
        notebook = nbformat.read(released, as_version=4)
        cells = {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}
        edit(notebook, cells)
        nbformat.write(notebook, inbox / f"{learner}.ipynb")
    assert course.collect(folder, "02", inbox) == sorted(LEARNERS)
    assert dict(course.mark(folder, "02")) == dict.fromkeys(sorted(LEARNERS), "")
    return folder


def test_what_is_released_holds_no_hidden_test(tmp_path: Path) -> None:
    released = course.release(tmp_path, "02").read_text(encoding="utf-8")
    assert "HIDDEN TESTS" not in released
    assert "assert check(" not in released


@needs_sandbox
@pytest.mark.parametrize("learner", LEARNERS)
def test_each_earns_what_is_right_and_no_more(marked: Path, learner: str) -> None:
    rows = [row for row in course.marks(marked, "02") if row[0] == learner]
    automatic = {row[2]: row[3] for row in rows if row[2].endswith("-mark")}
    assert sum(automatic.values()) == LEARNERS[learner][1], automatic
    assert sorted(automatic) == [f"02-{number}-mark" for number in range(1, 8)]


@needs_sandbox
def test_feedback_and_marks_are_given_back(marked: Path) -> None:
    path = course.give_back(marked, "02")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["learner"] for row in rows} == set(LEARNERS)
    report = next(row for row in rows if row["learner"] == "right" and row["exercise"] == "02-8-report")
    assert (report["of"], report["by hand"]) == ("5.0", "to do")
    assert [row["exercise"] for row in rows if row["learner"] == "right" and row["by hand"]] == [
        "02-7-mark", "02-8-report"]  # fmt: skip
    page = (marked / "feedback" / "wrong" / NAME / f"{NAME}.html").read_text(encoding="utf-8")
    assert "not yet right" in page
    assert "HIDDEN TESTS" not in page
    page = (marked / "feedback" / "right" / NAME / f"{NAME}.html").read_text(encoding="utf-8")
    assert "Exercise 02.7 is for the instructor: the answer is code" in page


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(course.Refused, match="no such chapter"):
        course.release(tmp_path, "99")
    with pytest.raises(course.Refused, match="no notebook in it"):
        course.collect(tmp_path, "02", tmp_path)
    (tmp_path / "a b.ipynb").write_text("{}")
    with pytest.raises(course.Refused, match="a learner's name"):
        course.collect(tmp_path, "02", tmp_path)
    (tmp_path / "a b.ipynb").rename(tmp_path / "ada.ipynb")
    (tmp_path / "ada.ipynb").write_bytes(b" " * (course.LARGEST + 1))
    with pytest.raises(course.Refused, match="5 are allowed|5 MB"):
        course.collect(tmp_path, "02", tmp_path)


def test_from_the_homes_of_a_hub_no_link_is_followed(tmp_path: Path) -> None:
    homes, file = tmp_path / "homes", f"{NAME}.ipynb"
    for learner in ("ada", "bob", "cleo", "dan", "eve", "fay"):
        (homes / learner).mkdir(parents=True)
        if learner != "cleo":
            (homes / learner / "course").mkdir()
    (homes / "ada" / "course" / file).write_text("hers")
    (homes / "bob" / "course" / file).symlink_to(homes / "ada" / "course" / file)
    (homes / "cleo" / "course").symlink_to(homes / "ada" / "course")
    os.mkfifo(homes / "dan" / "course" / file)
    (homes / "eve" / "course" / file).write_bytes(b" " * (course.LARGEST + 1))
    found = dict(course.collect_homes(tmp_path, "02", homes))
    assert {learner for learner, trouble in found.items() if not trouble} == {"ada"}
    assert {learner for learner, trouble in found.items() if trouble} == {"bob", "cleo", "dan", "eve"}
    assert "5 are allowed" in found["eve"]
    assert [path.read_text() for path in tmp_path.glob(f"submitted/*/{NAME}/{file}")] == ["hers"]
    (homes / "ada" / "course" / file).write_text("hers, again")
    assert dict(course.collect_homes(tmp_path, "02", homes))["ada"] == ""
    assert (tmp_path / "submitted" / "ada" / NAME / file).read_text() == "hers, again"
    with pytest.raises(course.Refused, match="there is no notebook in it"):
        list(course.collect_homes(tmp_path, "03", homes))
