"""The learner's file: what several notebooks at once, a kill or a bad disk may not break."""

import json
import multiprocessing
import os
import time
import warnings

import filelock
import pytest

from course_lib.lab import progress_file
from course_lib.lab.progress_file import change, kept, kept_by_all


@pytest.fixture
def file(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COURSE_LEARNER", "ada")
    monkeypatch.delenv("COURSE_VALIDATING", raising=False)
    return tmp_path / "home" / "progress-ada.json"


def attempt(key, *, passed=False):
    """Count an attempt; what is to be said of it."""

    def edit(entry):
        entry["attempts"] = entry.get("attempts", 0) + 1
        entry["passed"] = entry.get("passed") or ("2026-05-04" if passed else None)

    return change("exercises", key, edit)


def stored(file):
    return json.loads(file.read_text())["exercises"]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe\x00", b"[]", b"{}", b'{"exercises": []}', b'{"exercises": {"03.1": 3}}',
        b'{"exercises": {"03.1": {"attempts": "3", "passed": null}}}',
        b'{"exercises": {"03.1": {"attempts": 3, "passed": 4}}}',
        b'{"exercises": {}, "predictions": []}', b'{"exercises": {}, "predictions": {"03.a": 1}}',
        b'{"exercises": {}, "races": {"16.6": {"ratio": "7", "score": 0.9}}}',
        b'{"exercises": {}, "races": {"16.6": {"ratio": NaN, "score": 0.9}}}', b'{"exercises": {}, "races": [1]}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("action", [lambda: attempt("03.1"), lambda: kept("predictions")])
def test_a_damaged_file_is_set_aside(file, content, action):
    file.parent.mkdir()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"progress-.*\.json was damaged: set aside as progress-.*\.damaged-1\.json"):
        action()
    assert (file.parent / f"{file.stem}.damaged-1.json").read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attempt("03.1", passed=True)
    assert stored(file)["03.1"]["passed"]


def test_a_second_damaged_file_does_not_replace_the_first(file):
    for content in (b"first", b"second"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="damaged"):
            attempt("03.1", passed=True)
    assert (file.parent / f"{file.stem}.damaged-1.json").read_bytes() == b"first"
    assert (file.parent / f"{file.stem}.damaged-2.json").read_bytes() == b"second"


def test_progress_is_read_from_a_folder_that_takes_no_lock(file, monkeypatch):
    attempt("03.1", passed=True)

    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(progress_file, "_lock", refused)
    before = file.read_bytes()
    assert kept("exercises")["03.1"]["passed"]
    assert attempt("03.2") == "your progress could not be kept: Permission denied"
    assert file.read_bytes() == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="file modes do not bind root, nor Windows")
def test_a_read_only_folder(file):
    attempt("03.1", passed=True)
    file.parent.chmod(0o555)
    try:
        assert "could not be kept" in attempt("03.2")
        assert kept("exercises")["03.1"]["passed"]
    finally:
        file.parent.chmod(0o755)


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_half_way_leaves_the_old_file(file, monkeypatch, fails):
    attempt("03.1", passed=True)
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    assert attempt("03.2") == "your progress could not be kept: No space left on device"
    assert file.read_bytes() == before


def test_a_lock_that_another_notebook_never_lets_go(file, monkeypatch):
    attempt("03.1", passed=True)
    monkeypatch.setattr(progress_file, "LOCK_SECONDS", 0.05)
    with filelock.FileLock(f"{file}.lock"):
        assert attempt("03.2").startswith("your progress could not be kept")
        assert kept("exercises")["03.1"]["passed"]


# Real processes; forked, so that they are all there at once, and not one after the other as torch is imported.
posix_only = pytest.mark.skipif(os.name != "posix", reason="needs fork")


def write(own, rounds, ready):
    ready.wait()
    for _ in range(rounds):
        notes = attempt(own), attempt("00.0", passed=True)
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
    found = stored(file)
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
        while not file.exists() or stored(file).get("01.1", {"attempts": 0})["attempts"] < before + moment:
            time.sleep(0.001 * moment)
        notebook.kill()
        notebook.join()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it would be a warning that the file was damaged
            assert attempt("03.2") == ""
        before = stored(file)["01.1"]["attempts"]
    assert stored(file)["03.2"]["attempts"] == 5


def test_two_learners_of_one_folder_have_a_file_each(monkeypatch, file):
    for name in ("ada", "Grace Hopper"):
        monkeypatch.setenv("COURSE_LEARNER", name)
        attempt("03.1", passed=True)
    assert {"progress-ada.json", "progress-Grace_Hopper.json"} <= {path.name for path in file.parent.iterdir()}


def test_progress_of_before_is_taken_over_from_the_data_folder_and_stays_there(tmp_path, file):
    old = tmp_path / "data" / "progress-ada.json"
    old.parent.mkdir()
    content = {"exercises": {"03.2": {"attempts": 4, "passed": "2026-05-04"}}}
    old.write_text(json.dumps(content))
    assert kept("exercises") == content["exercises"]
    attempt("03.1", passed=True)
    assert stored(file)["03.2"] == content["exercises"]["03.2"]
    assert stored(file)["03.1"]["passed"]
    assert json.loads(old.read_text()) == content


def test_sections_are_kept_apart_and_validation_knows_neither(file, monkeypatch):
    attempt("03.1")
    change("predictions", "03.a", lambda entry: entry.update(guess=3))
    assert (set(kept("exercises")), kept("predictions")) == ({"03.1"}, {"03.a": {"guess": 3}})
    before = file.read_bytes()
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    assert kept("exercises") == kept("predictions") == {}
    assert attempt("03.1") == ""
    assert file.read_bytes() == before


# Races, and everybody's


RACE = {"ratio": 7.3, "score": 0.913}


def test_a_file_from_before_there_were_races_is_whole(file):
    file.parent.mkdir()
    old = {"exercises": {"03.1": {"attempts": 1, "passed": None}}, "predictions": {"03.a": {"guess": 3}}}
    file.write_text(json.dumps(old))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept("races") == {}
        assert kept_by_all("races") == {"ada": {}}
        assert change("races", "16.6", lambda entry: entry.update(RACE)) == ""
    assert json.loads(file.read_text()) == {**old, "races": {"16.6": RACE}}
    assert kept("races") == {"16.6": RACE}


def test_everybody_of_a_folder_is_read_and_what_is_damaged_passed_over_as_it_is(file, monkeypatch):
    for name in ("ada", "bo"):
        monkeypatch.setenv("COURSE_LEARNER", name)
        change("races", "16.6", lambda entry: entry.update(RACE))
    (file.parent / "progress-cy.json").write_bytes(b"{")
    (file.parent / "progress-dee.damaged-1.json").write_bytes(b"{")
    (file.parent / "progress-eve.json").mkdir()
    (file.parent / "progress-ada.json.partial").write_bytes(b"{")
    before = sorted(file.parent.iterdir())
    with pytest.warns(UserWarning, match="is passed over") as told:
        found = kept_by_all("races")
    assert found == {"ada": {"16.6": RACE}, "bo": {"16.6": RACE}}
    assert [str(warning.message).split()[0] for warning in told] == ["progress-cy.json", "progress-eve.json"]
    assert sorted(file.parent.iterdir()) == before
    assert (file.parent / "progress-cy.json").read_bytes() == b"{"


def test_nobody_is_known_in_a_validation_run_or_without_a_folder(file, monkeypatch):
    assert kept_by_all("races") == {}
    change("races", "16.6", lambda entry: entry.update(RACE))
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    assert kept_by_all("races") == {}
