"""Exercises: what a learner is told, what is kept, and what several notebooks at once or a bad disk may not break."""

import datetime
import json
import sys
import types
from dataclasses import replace

import pytest
import torch

from course_lib.lab import exercises, progress_file
from course_lib.lab.exercises import Outcome, check, progress
from course_lib.lab.judging import Design, OfThisAnswer, OpenProject, Wrong, call, expect_close

X = torch.tensor([1.0, 2.0, 3.0])


def doubled(answer):
    """Double it.

    Only the first line is the title.
    """
    expect_close(call(answer, X, on="a vector"), 2 * X, what="the double", hint=["One.", "Two.", "Three."])


def named(answer):
    """Name the winner."""
    if answer != "Adam":
        raise Wrong(f"{answer} came second", hint="Look at the <table>.")


def tenth(answer):
    """The tenth."""


def nearest(answer):
    """Name seven."""
    raise Wrong("not seven", hint=[OfThisAnswer(f"You are off by {7 - answer}."), "Later."])


def other(answer):
    """Another chapter."""
    raise Wrong("no hint here")


@pytest.fixture(autouse=True)
def checks(monkeypatch, tmp_path):
    """Two chapters of checks that stand nowhere on disk, and an empty data folder."""
    package = types.ModuleType("fake_checks")
    package.__path__ = [str(tmp_path / "checks")]
    (tmp_path / "checks").mkdir()
    monkeypatch.setitem(sys.modules, "fake_checks", package)
    for chapter, contents in {
        "03": {"exercise_10": tenth, "exercise_1": doubled, "exercise_2": named, "exercise_helper": None},
        "07": {"exercise_1": other},
    }.items():
        (tmp_path / "checks" / f"chapter_{chapter}.py").touch()
        module = types.ModuleType(f"fake_checks.chapter_{chapter}")
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(exercises, "CHECKS", "fake_checks")
    monkeypatch.setattr(exercises, "_hints_given", {})
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COURSE_LEARNER", "ada")
    monkeypatch.delenv("COURSE_VALIDATING", raising=False)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mine" / "progress-ada.json"


def kept(file):
    return json.loads(file.read_text())["exercises"]


# What a learner is told


def test_passed():
    found = check("03.1", lambda x: x + x)
    assert (found.state, found.message, found.hint) == ("passed", "", "")
    assert repr(found) == "✓ Exercise 03.1 passed: Double it"


def test_wrong_gets_the_next_hint_each_time_and_then_keeps_the_last():
    hints = [check("03.1", lambda x: x).hint for _ in range(4)]
    assert hints == ["One.", "Two.", "Three.", "Three."]
    found = check("03.1", lambda x: x)
    assert found.state == "not yet right"
    assert repr(found) == (
        "✗ Exercise 03.1 not yet right: the double is not right: the largest difference is 3 Hint: Three."
    )


def test_hints_with_the_answers_own_numbers_are_one_list(monkeypatch):
    monkeypatch.setattr(sys.modules["fake_checks.chapter_07"], "exercise_2", nearest, raising=False)
    assert [check("07.2", number).hint for number in (2, 4, 5)] == ["You are off by 5.", "Later.", "Later."]


def test_another_mistake_starts_with_its_own_first_hint():
    check("03.1", lambda x: x)
    assert check("03.2", "SGD").hint == "Look at the <table>."
    assert check("03.1", lambda x: x).hint == "Two."
    assert check("07.1", "SGD").hint == ""


def returns_none(x):
    """To be written."""


def returns_ellipsis(x):
    return ...


def not_implemented(x):
    raise NotImplementedError


@pytest.mark.parametrize("answer", [None, ..., returns_none, returns_ellipsis, not_implemented, (1, ...), {"a": ...}])
def test_not_attempted_yet(answer, file):
    found = check("03.1", answer)
    assert found.state == "not attempted yet"
    assert repr(found).startswith("○ Exercise 03.1 not attempted yet: ")
    assert not file.exists()


def test_a_check_that_calls_the_answer_itself_meets_a_stub_too(monkeypatch):
    monkeypatch.setattr(sys.modules["fake_checks.chapter_07"], "exercise_1", lambda answer: answer(X))
    assert check("07.1", not_implemented).state == "not attempted yet"


def test_an_error_in_the_answer_is_told_in_one_line():
    def broken(x):
        raise KeyError("lr\nand more")

    found = check("03.1", broken)
    assert found.state == "not yet right"
    assert found.message == r"your function raised KeyError: 'lr\nand more' (on a vector)"
    assert "\n" not in repr(found)
    assert check("03.1", lambda: 1).message.startswith("your function raised TypeError: ")
    assert (
        check("03.1", lambda x: [][0]).message
        == "your function raised IndexError: list index out of range (on a vector)"
    )
    assert check("03.1", 5).message == "a function is wanted here, and this is an int"


def test_an_error_in_the_check_itself_is_not_blamed_on_the_learner(monkeypatch):
    def faulty(answer):
        """Faulty."""
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["fake_checks.chapter_07"], "exercise_1", faulty)
    with pytest.raises(ZeroDivisionError):
        check("07.1", 1)


@pytest.mark.parametrize("answer", [lambda x: 2 * x, lambda x: x, None])
def test_the_html_line_says_the_state_in_words_and_by_a_mark(answer):
    found = check("03.1", answer)
    shown = found._repr_html_()
    assert found.state in shown
    assert any(mark in shown for mark in "✓✗○")
    assert 'role="status"' in shown


def test_html_is_escaped():
    shown = check("03.2", "<b>SGD</b>")._repr_html_()
    assert "&lt;b&gt;SGD" in shown
    assert "&lt;table&gt;" in shown


@pytest.mark.parametrize(
    ("exercise", "message"),
    [
        ("03.3", r"no '03\.3'; did you mean '03\.[12]'\? There are: 03\.1, 03\.2, 03\.10, 07\.1"),
        ("3.1", r"did you mean '03\.1'\?"),
        ("99.99.99", r"There are: 03\.1"),
        (3.1, r"no 3\.1"),
        ("03.helper", r"no '03\.helper'"),
        ("../03.1", r"There are"),
        ("", r"no ''\. There are"),
    ],
)
def test_an_unknown_exercise(exercise, message):
    with pytest.raises(ValueError, match=message):
        check(exercise, None)


def test_an_answer_cannot_fool_the_check_by_changing_its_input(file):
    def cheat(x):
        x.zero_()
        return x

    assert check("03.1", cheat).state == "not yet right"
    assert torch.equal(X, torch.tensor([1.0, 2.0, 3.0]))


def test_random_numbers_of_an_answer_leave_the_notebooks_own_alone():
    drawn = []
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for _ in range(2):
        check("03.1", lambda x: drawn.append(torch.rand(1).item()) or x)
    assert torch.equal(torch.rand(3), expected)
    assert drawn[0] == drawn[1]


# What is kept


def test_attempts_and_the_day_of_the_first_pass_are_kept(file, monkeypatch):
    class Day(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(exercises.datetime, "date", Day)
    day = "2026-05-04"
    check("03.1", lambda x: x)
    check("03.1", lambda x: 2 * x)
    day = "2026-06-01"
    check("03.1", lambda x: 2 * x)
    check("03.1", lambda x: x)
    check("03.2", "SGD")
    assert kept(file) == {
        "03.1": {"attempts": 4, "passed": "2026-05-04"},
        "03.2": {"attempts": 1, "passed": None},
    }
    assert [tuple(row) for row in progress().to_numpy()] == [
        ("03", "03.1", "Double it", "✓ passed", 4, "2026-05-04"),
        ("03", "03.2", "Name the winner", "✗ not yet right", 1, ""),
        ("03", "03.10", "The tenth", "○ not attempted yet", 0, ""),
        ("07", "07.1", "Another chapter", "○ not attempted yet", 0, ""),
    ]


def test_an_open_project_is_done_by_the_learners_own_rubric(file, monkeypatch):
    project = OpenProject("A project", rubric=["runs", "report"])
    monkeypatch.setattr(sys.modules["fake_checks.chapter_07"], "exercise_1", project)
    assert check("07.1", {"runs": ..., "report": "there"}).state == "not attempted yet"
    found = check("07.1", {"runs": "missing", "report": "there"})
    assert repr(found) == "✗ Exercise 07.1 not yet right: by your own rubric there is still missing: runs"
    assert progress()["state"].iloc[-1] == "✗ not yet right"
    found = check("07.1", {"runs": "there", "report": "done well"})
    assert repr(found) == "✓ Exercise 07.1 passed: A project (by your own rubric)"
    assert progress()["state"].iloc[-1] == "✓ passed, by your own rubric"
    assert kept(file)["07.1"]["attempts"] == 2


@pytest.fixture
def told(monkeypatch):
    """A design that anything of 3 and more passes; what was told of those that did."""
    told = []

    def afterwards(answer):
        told.append((answer, torch.rand(1).item()))
        return f"{answer} times as fast"

    design = Design("A design", lambda answer: None, lambda answer, seed: answer, [0], 3, afterwards=afterwards)
    monkeypatch.setattr(sys.modules["fake_checks.chapter_07"], "exercise_1", design)
    return told


def test_what_follows_on_a_design_that_passed_becomes_part_of_the_note(told, file):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert repr(check("07.1", 4)) == "✓ Exercise 07.1 passed: A design (4 times as fast)"
    assert torch.equal(torch.rand(1), expected), "the notebook's own random numbers are left alone"
    assert kept(file)["07.1"]["attempts"] == 1
    assert check("07.1", 2).state == "not yet right"
    assert [answer for answer, _ in told] == [4]


def test_nothing_follows_in_a_solution_cell_or_a_validation_run(told, monkeypatch):
    assert check("07.1", 4, record=False).note == ""
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    assert check("07.1", 4).note == ""
    assert not told


def test_what_is_kept_is_kept_before_anything_follows(told, file, monkeypatch):
    def interrupted(answer):
        raise KeyboardInterrupt

    design = sys.modules["fake_checks.chapter_07"].exercise_1
    monkeypatch.setattr(sys.modules["fake_checks.chapter_07"], "exercise_1", replace(design, afterwards=interrupted))
    with pytest.raises(KeyboardInterrupt):
        check("07.1", 4)
    assert kept(file)["07.1"]["passed"]


def test_a_solution_cell_leaves_no_trace(file):
    assert check("03.1", lambda x: 2 * x, record=False).state == "passed"
    assert not file.exists()


def test_progress_before_anything_was_done_makes_no_file(file):
    assert set(progress()["state"]) == {"○ not attempted yet"}
    assert not file.parent.exists()


def test_validation_neither_reads_nor_writes(file, monkeypatch):
    check("03.1", lambda x: 2 * x)
    before = file.read_bytes(), sorted(file.parent.iterdir())
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    monkeypatch.setattr(progress_file, "_file", lambda: pytest.fail("the learner's progress was looked at"))
    assert check("03.1", lambda x: 2 * x).state == "passed"
    assert check("03.2", "SGD").note == ""
    assert set(progress()["state"]) == {"○ not attempted yet"}
    assert (file.read_bytes(), sorted(file.parent.iterdir())) == before


def test_what_check_says_does_not_depend_on_what_was_kept(file, monkeypatch):
    first = repr(check("03.1", lambda x: 2 * x))
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    assert repr(check("03.1", lambda x: 2 * x)) == first


def test_a_folder_that_cannot_be_written_still_gets_an_answer(tmp_path, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "a_file" / "mine"))
    found = check("03.1", lambda x: 2 * x)
    assert found.state == "passed"
    assert repr(found).endswith("(your progress could not be kept: Not a directory)")
    assert "could not be kept" in found._repr_html_()
    assert set(progress()["state"]) == {"○ not attempted yet"}


def test_an_outcome_is_one_line_whatever_the_message():
    assert "\n" not in repr(Outcome("03.1", "Title", "not yet right", "two\nlines", "and\n\nmore"))
