"""What holds for the exercises of every chapter: each right answer passes, and each mistake is called by its name."""

import copy

import nbformat
import numpy as np
import pytest
import torch
from torch import Tensor

from course_lib.lab import exercises
from course_lib.lab.exercises import check
from course_lib.lab.judging import Design, Method, OpenProject, Reading, Wrong
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

ALL = {name: test for chapter in exercises._chapters() for name, test in exercises._exercises(chapter).items()}
METHODS = {name: test for name, test in ALL.items() if isinstance(test, Method)}
READINGS = {name: test for name, test in ALL.items() if isinstance(test, Reading)}
PROJECTS = {name: test for name, test in ALL.items() if isinstance(test, OpenProject)}
MISTAKES = [(name, mistake) for name, method in METHODS.items() for mistake in method.mistakes]


def first(hints):
    return next(iter(Wrong("", hints).hints), "")


@pytest.mark.parametrize("exercise", ALL)
def test_each_exercise_has_a_title_of_its_own(exercise):
    titles = [exercises._title(test) for test in ALL.values()]
    assert exercises._title(ALL[exercise])
    assert titles.count(exercises._title(ALL[exercise])) == 1


# Methods to write or to mend


@pytest.mark.parametrize("exercise", METHODS)
def test_the_right_answer_passes(exercise):
    found = check(exercise, METHODS[exercise].right)
    assert found.state == "passed", found


@pytest.mark.parametrize(("exercise", "mistake"), [pytest.param(*m, id=f"{m[0]} {m[1].message}") for m in MISTAKES])
def test_each_mistake_is_named(exercise, mistake):
    found = check(exercise, mistake.rule)
    assert found.state == "not yet right"
    assert found.message.startswith(f"{mistake.message} (on "), found
    assert found.hint == first(mistake.hint)
    assert found.hint, "what is the learner to do about it?"


@pytest.mark.parametrize("exercise", METHODS)
@pytest.mark.parametrize("answer", checking.STUBS)
def test_a_stub_is_not_attempted(exercise, answer):
    checking.assert_not_attempted(exercise, answer)


def misshapen(result):
    if isinstance(result, Tensor):
        return result[None]
    return (*result, 0) if isinstance(result, tuple) else [result, result]


@pytest.mark.parametrize("exercise", METHODS)
@pytest.mark.parametrize("answer", [*checking.USELESS, misshapen])
def test_another_kind_of_result_is_told_what_is_wrong(exercise, answer):
    if answer is misshapen:
        right = METHODS[exercise].right
        found = check(exercise, lambda *inputs: misshapen(right(*inputs)))
        assert found.state == "not yet right"
        assert "raised" not in found.message
    else:
        checking.assert_told_what_is_wrong(exercise, answer)


def meddled(value):
    """Whether this could be changed in place, and was."""
    if isinstance(value, Tensor):
        value.data.copy_(~value if value.dtype == torch.bool else value + 1)
    elif isinstance(value, np.ndarray):
        value += 1
    elif isinstance(value, list):
        value.reverse()
        value.append(value[0])
    return isinstance(value, (Tensor, np.ndarray, list))


@pytest.mark.parametrize("exercise", METHODS)
def test_an_answer_that_changes_its_inputs_is_caught(exercise):
    done = []

    def answer(*inputs):
        result = METHODS[exercise].right(*inputs)
        result = result.detach().clone() if isinstance(result, Tensor) else copy.deepcopy(result)
        done.append(any(meddled(value) for value in inputs))
        return result

    found = check(exercise, answer)
    if any(done):
        assert "your function changes its argument" in found.message, found
        assert found.hint
    else:
        assert found.state == "passed", "its inputs cannot be changed"


# Figures to read


@pytest.mark.parametrize("exercise", READINGS)
def test_a_figure_is_read_right(exercise):
    reading = READINGS[exercise]
    choice, reason = reading.right
    assert check(exercise, reading.right).state == "passed"
    assert check(exercise, [choice, f" {reason.upper()}) "]).state == "passed"
    for answer in [(..., ...), (choice, ...), (..., reason)]:
        checking.assert_not_attempted(exercise, answer)


@pytest.mark.parametrize("exercise", READINGS)
def test_each_wrong_reading_is_told_what_is_wrong(exercise):
    reading = READINGS[exercise]
    choice, reason = reading.right
    for wrong, message in reading.choices.items():
        if wrong != choice:
            assert message
            assert check(exercise, (wrong, reason)).message == message
    for letter, message in reading.reasons.items():
        if letter != reason:
            assert message
            assert check(exercise, (choice, letter)).message.endswith(f"is right, the reason is not: {message}")


@pytest.mark.parametrize("exercise", READINGS)
def test_what_is_no_reading_is_told_what_is_wanted(exercise):
    choice, reason = READINGS[exercise].right
    for answer in [*checking.USELESS, choice, (choice,), (choice, 3), ([], reason), ("Zoe", reason), (choice, "z")]:
        if answer is not None:
            checking.assert_told_what_is_wrong(exercise, answer)
            assert exercises.check(exercise, answer).hint


# Designs and open projects


@pytest.mark.parametrize("exercise", [name for name, test in ALL.items() if isinstance(test, Design)])
def test_a_design_of_another_kind_is_told_what_is_wrong(exercise):
    for answer in checking.USELESS:
        checking.assert_told_what_is_wrong(exercise, answer)
    checking.assert_not_attempted(exercise, ...)


@pytest.mark.parametrize("exercise", PROJECTS)
def test_an_open_project_is_done_when_no_point_is_missing(exercise):
    points = PROJECTS[exercise].rubric
    assert check(exercise, dict.fromkeys(points, "there")).note == "by your own rubric"
    checking.assert_not_attempted(exercise, dict.fromkeys(points, ...))
    assert points[-1] in check(exercise, {**dict.fromkeys(points, "done well"), points[-1]: "missing"}).message


@pytest.mark.parametrize("exercise", PROJECTS)
def test_the_points_of_a_rubric_are_those_of_the_notebook(exercise):
    notebook = next(checking.NOTEBOOKS.glob(f"{exercise[:2]}_*.ipynb"), None)
    if notebook is None:
        pytest.skip("the notebook is to come")
    text = " ".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells).lower()
    if "an open project" not in text:
        pytest.skip("the notebook has no open project yet")
    for point in PROJECTS[exercise].rubric:
        assert f"| {point} |" in text or f"**{point}:**" in text
