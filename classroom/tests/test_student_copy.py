"""Student copies of all chapters: what is in them, and what is not."""

import itertools
import re

import nbformat
import pytest

from classroom import course
from classroom.student_copy import POINTS, SOLUTIONS, exercise_in, exercise_of, exercises, points, student_copy
from classroom.tests.helping import chapter, solutions
from course_lib.lab.chapters import CHAPTERS

NAMES = [entry.file for entry in CHAPTERS if (course.NOTEBOOKS / entry.file).is_file()]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_a_valid_notebook_with_each_exercise_once(name: str) -> None:
    copy = student_copy(chapter(name))
    nbformat.validate(copy)
    assert len({cell.id for cell in copy.cells}) == len(copy.cells)
    ids = [cell.metadata.nbgrader.grade_id for cell in copy.cells if "nbgrader" in cell.metadata]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", grade_id) for grade_id in ids)
    asked = [exercise.number for exercise in exercises(chapter(name))]
    assert len(asked) >= 6
    assert [number for number, part in map(exercise_in, ids) if part in ("answer", "report")] == asked


@pytest.mark.parametrize("name", NAMES)
def test_each_check_stands_right_below_its_answer_and_is_locked(name: str) -> None:
    cells = student_copy(chapter(name)).cells
    for above, cell in itertools.pairwise(cells):
        about = cell.metadata.get("nbgrader", {})
        exercise, part = exercise_in(about.get("grade_id", ""))
        if part == "mark":
            assert about.locked
            assert about.points == points(exercise)
            assert above.metadata.nbgrader.grade_id == about.grade_id.replace("-mark", "-answer")
            shown = cell.source.partition("### BEGIN HIDDEN TESTS")[0]
            found = exercise_of(shown)
            assert found is not None
            assert (found.number, found.stub) == (exercise, "")
            assert f'assert check("{exercise}", ' in cell.source


@pytest.mark.parametrize("name", NAMES)
def test_no_solution_is_in_a_copy(name: str) -> None:
    copy = student_copy(chapter(name))
    given = {line.strip() for cell in chapter(name).cells if SOLUTIONS not in cell.source
             for line in cell.source.splitlines()}  # fmt: skip
    secret = {line.strip() for text in solutions(chapter(name)).values() for line in text.splitlines()}
    handed_out = {line.strip() for cell in copy.cells for line in cell.source.splitlines()}
    assert not (secret - given) & handed_out
    assert not any(SOLUTIONS in cell.source for cell in copy.cells)


def test_outputs_go_or_stay() -> None:
    name = NAMES[2]
    assert not any(cell.get("outputs") for cell in student_copy(chapter(name)).cells)
    assert "widgets" not in student_copy(chapter(name)).metadata
    kept = student_copy(chapter(name), keep_outputs=True)
    assert any(cell.get("outputs") for cell in kept.cells)
    assert ("widgets" in kept.metadata) == ("widgets" in chapter(name).metadata)


def test_a_prediction_gets_a_cell_to_write_in() -> None:
    cells = student_copy(chapter(NAMES[2])).cells
    asked = [at for at, cell in enumerate(cells) if cell.cell_type == "code" and re.search(r"\bpredict\(", cell.source)]
    assert asked
    for at in asked:
        assert cells[at + 1].metadata.nbgrader.grade_id.startswith("guess-")
        assert cells[at + 1].metadata.nbgrader.points == 0


def test_points_follow_the_kind() -> None:
    assert [points(exercise) for exercise in ("02.1", "02.5", "02.7")] == [*POINTS.values(), 3]
    with pytest.raises(ValueError, match=r"no check for '02\.99'"):
        points("02.99")


def test_the_demonstration_of_a_check_is_no_exercise() -> None:
    assert exercise_of('check("00.1", answer, record=False)') is None
    assert exercise_of("x = 1") is None
