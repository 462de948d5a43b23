"""Exercises: what a learner is told, what is kept, and what several notebooks at once or a bad disk may not break."""

import datetime
import json
import multiprocessing
import os
import sys
import time
import types
import warnings

import pytest
import torch

from course_lib.lab import exercises
from course_lib.lab.exercises import Outcome, Wrong, call, check, close, expect_close, expect_unchanged, progress

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


# Helpers for authors of checks


def wrong(*args, **kwargs):
    with pytest.raises(Wrong) as caught:
        expect_close(*args, what="the loss", hint="Think.", on="a batch", **kwargs)
    assert caught.value.hints == ("Think.",)
    return caught.value.message


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "the loss should have shape [3, 2], and has [2, 3] (on a batch)"),
        (torch.ones(1), 1.0, "the loss should have shape [], and has [1] (on a batch)"),
        (
            torch.ones(2).double(),
            torch.ones(2),
            "the loss should be float32 like its input, and is float64 (on a batch)",
        ),
        (torch.tensor([1, torch.nan]), torch.ones(2), "the loss is not finite: it holds NaN or infinity (on a batch)"),
        (torch.tensor([1.0, 3.5]), torch.ones(2), "the loss is not right: the largest difference is 2.5 (on a batch)"),
        (2.5, 1.0, "the loss is not right: the difference is 1.5 (on a batch)"),
        ("one", 1.0, "the loss should be a number, and is a str (on a batch)"),
        ((1.0, "a"), torch.ones(2), "the loss should be a tensor, and is a tuple of 2 (on a batch)"),
        (object(), 1.0, "the loss should be a number, and is an object (on a batch)"),
    ],
)
def test_expect_close_says_what_differs(found, expected, message):
    assert wrong(found, expected) == message


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.ones(2) + 1e-7, torch.ones(2)),
        (1.0, 1.0),
        (torch.tensor(1.0), 1.0),
        (torch.ones(()).double(), 1.0),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        ([1.0, 2.0], torch.tensor([1.0, 2.0])),
        (torch.tensor([3, 4]), torch.tensor([3, 4])),
    ],
)
def test_expect_close_accepts(found, expected):
    expect_close(found, expected, what="the loss")


def test_expect_close_keeps_to_its_tolerances():
    expect_close(1.04, 1.0, what="the loss", rtol=0.05)
    with pytest.raises(Wrong):
        expect_close(1.06, 1.0, what="the loss", rtol=0.05)


def test_close_compares_tuples_part_by_part():
    assert close((X, 1.0), (X.clone(), 1.0))
    assert close([X, 1.0], (X, 1.0))
    assert not close((X, 1.0), (X, 2.0))
    assert not close((X,), (X, 1.0))
    assert not close(X, (X, 1.0))
    assert not close("a", 1.0)
    assert not close(torch.ones(3, 1), torch.ones(3))


def test_expect_unchanged_names_the_argument():
    def second(w, g):
        g.mul_(2)
        return w

    expect_unchanged(lambda w, g: w * g, X, X)
    with pytest.raises(Wrong, match="changes its argument g in place") as caught:
        expect_unchanged(second, X, X.clone(), hint="Copy it.")
    assert caught.value.hints == ("Copy it.",)


def test_call_copies_modules_lists_and_gradients():
    layer, numbers, weight = torch.nn.Linear(2, 2), [1, 2], torch.ones(2, requires_grad=True)

    def meddle(layer, numbers, weight):
        layer.weight.data.zero_()
        numbers.append(3)
        assert weight.requires_grad
        return 1

    call(meddle, layer, numbers, weight)
    assert layer.weight.abs().sum() > 0
    assert numbers == [1, 2]


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
    monkeypatch.setattr(exercises, "_file", lambda: pytest.fail("the learner's progress was looked at"))
    assert check("03.1", lambda x: 2 * x).state == "passed"
    assert check("03.2", "SGD").note == ""
    assert set(progress()["state"]) == {"○ not attempted yet"}
    assert (file.read_bytes(), sorted(file.parent.iterdir())) == before


def test_what_check_says_does_not_depend_on_what_was_kept(file, monkeypatch):
    first = repr(check("03.1", lambda x: 2 * x))
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    assert repr(check("03.1", lambda x: 2 * x)) == first


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b'{"exercises": []}', b'{"exercises": {"03.1": 3}}',
        b'{"exercises": {"03.1": {"attempts": "3", "passed": null}}}',
        b'{"exercises": {"03.1": {"attempts": 3, "passed": 4}}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("action", [lambda: check("03.1", lambda x: 2 * x), progress])
def test_a_damaged_file_is_set_aside(file, content, action):
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"progress-.*\.json was damaged: set aside as progress-.*\.damaged-1\.json"):
        action()
    assert (file.parent / f"{file.stem}.damaged-1.json").read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("03.1", lambda x: 2 * x)
    assert kept(file)["03.1"]["passed"]


def test_a_second_damaged_file_does_not_replace_the_first(file):
    for content in (b"first", b"second"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="damaged"):
            check("03.1", lambda x: 2 * x)
    assert (file.parent / f"{file.stem}.damaged-1.json").read_bytes() == b"first"
    assert (file.parent / f"{file.stem}.damaged-2.json").read_bytes() == b"second"


def test_a_folder_that_cannot_be_written_still_gets_an_answer(tmp_path, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "a_file" / "mine"))
    found = check("03.1", lambda x: 2 * x)
    assert found.state == "passed"
    assert repr(found).endswith("(your progress could not be kept: Not a directory)")
    assert "could not be kept" in found._repr_html_()
    assert set(progress()["state"]) == {"○ not attempted yet"}


def test_progress_is_read_from_a_folder_that_takes_no_lock(file, monkeypatch):
    check("03.1", lambda x: 2 * x)

    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(exercises, "_lock", refused)
    before = file.read_bytes()
    assert progress()["state"][0] == "✓ passed"
    assert check("03.2", "Adam").note == "your progress could not be kept: Permission denied"
    assert file.read_bytes() == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="file modes do not bind root, nor Windows")
def test_a_read_only_folder(file):
    check("03.1", lambda x: 2 * x)
    file.parent.chmod(0o555)
    try:
        assert "could not be kept" in check("03.2", "Adam").note
        assert progress()["state"][0] == "✓ passed"
    finally:
        file.parent.chmod(0o755)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_half_way_leaves_the_old_file(file, monkeypatch, fails):
    check("03.1", lambda x: 2 * x)
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exercises.os, fails, full)
    assert check("03.2", "Adam").note == "your progress could not be kept: No space left on device"
    assert file.read_bytes() == before


def test_a_lock_that_another_notebook_never_lets_go(file, monkeypatch):
    check("03.1", lambda x: 2 * x)
    monkeypatch.setattr(exercises, "LOCK_SECONDS", 0.05)
    with exercises.filelock.FileLock(f"{file}.lock"):
        assert check("03.2", "Adam").note.startswith("your progress could not be kept")
        assert progress()["state"][0] == "✓ passed"


# Real processes; forked, so that they are all there at once, and not one after the other as torch is imported.
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs fork")


def write(own, rounds, ready):
    ready.wait()
    for _ in range(rounds):
        notes = exercises._record(own, passed=False), exercises._record("00.0", passed=True)
        assert notes == ("", "")


@posix_only
def test_several_notebooks_at_once_lose_nothing(file):
    """Each counts an exercise of its own, and one that all share."""
    count, rounds = 4, 25
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(count)
    notebooks = [fork.Process(target=write, args=(f"01.{number}", rounds, ready)) for number in range(count)]
    for notebook in notebooks:
        notebook.start()
    for notebook in notebooks:
        notebook.join()
    assert [notebook.exitcode for notebook in notebooks] == [0] * count
    found = kept(file)
    assert found.pop("00.0")["attempts"] == count * rounds
    assert found == {f"01.{number}": {"attempts": rounds, "passed": None} for number in range(count)}
    assert {path.name for path in file.parent.iterdir()} <= {file.name, f"{file.name}.lock"}


@posix_only
def test_a_notebook_killed_while_it_writes_does_no_harm(file):
    fork = multiprocessing.get_context("fork")
    before = 0
    for moment in range(1, 6):
        ready = fork.Barrier(2)
        notebook = fork.Process(target=write, args=("01.1", 10**6, ready))
        notebook.start()
        ready.wait()
        while not file.exists() or kept(file).get("01.1", {"attempts": 0})["attempts"] < before + moment:
            time.sleep(0.001 * moment)
        notebook.kill()
        notebook.join()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it would be a warning that the file was damaged
            assert check("03.2", "Adam").note == ""
        before = kept(file)["01.1"]["attempts"]
    assert kept(file)["03.2"]["attempts"] == 5


def test_an_outcome_is_one_line_whatever_the_message():
    assert "\n" not in repr(Outcome("03.1", "Title", "not yet right", "two\nlines", "and\n\nmore"))


def test_two_learners_of_one_folder_have_a_file_each(monkeypatch, file):
    for name in ("ada", "Grace Hopper"):
        monkeypatch.setenv("COURSE_LEARNER", name)
        check("03.1", lambda x: x + x)
    assert {"progress-ada.json", "progress-Grace_Hopper.json"} <= {path.name for path in file.parent.iterdir()}


def test_progress_of_before_is_taken_over_from_the_data_folder_and_stays_there(tmp_path, file):
    old = tmp_path / "data" / "progress-ada.json"
    old.parent.mkdir()
    content = {"exercises": {"03.2": {"attempts": 4, "passed": "2026-05-04"}}}
    old.write_text(json.dumps(content))
    assert "2026-05-04" in list(progress()["first passed"])
    check("03.1", lambda x: x + x)
    assert kept(file)["03.2"] == content["exercises"]["03.2"]
    assert kept(file)["03.1"]["passed"]
    assert json.loads(old.read_text()) == content
