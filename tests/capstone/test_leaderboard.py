"""The leaderboard: whose best is kept, who comes first, and what a damaged file may not break."""

import json
import multiprocessing
import os
import re

import pytest

from course_lib.capstone import enter, leaderboard
from course_lib.lab import runtime


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The folder of a class, in which nobody has done anything."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "class"))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COURSE_LEARNER", "ada")
    monkeypatch.delenv("COURSE_VALIDATING", raising=False)
    monkeypatch.setattr(runtime, "_processor_name", lambda: "Test 9000")
    return tmp_path / "class"


def stored(folder, who="ada"):
    return json.loads((folder / f"progress-{who}.json").read_text())["races"]


def test_an_entry_is_kept_with_its_day_and_its_processor(folder):
    assert enter("16.6", ratio=7.25, score=0.913) == ""
    entry = stored(folder)["16.6"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry.pop("date"))
    assert entry == {"ratio": 7.25, "score": 0.913, "name": "ada", "machine": "Test 9000"}


def test_the_best_ratio_stays_whole(folder):
    for ratio, score in ((5.0, 0.95), (8.0, 0.91), (6.0, 0.99), (8.0, 0.97)):
        enter("16.6", ratio=ratio, score=score)
    enter("16.9", ratio=2, score=0.5, name="Ada L.")
    assert {key: (entry["ratio"], entry["score"]) for key, entry in stored(folder).items()} == {
        "16.6": (8.0, 0.91), "16.9": (2.0, 0.5),
    }  # fmt: skip
    assert stored(folder)["16.9"]["name"] == "Ada L."


def test_what_else_is_in_the_file_stays(folder):
    folder.mkdir()
    before = {"exercises": {"03.1": {"attempts": 2, "passed": None}}}
    (folder / "progress-ada.json").write_text(json.dumps(before))
    enter("16.6", ratio=2.0, score=0.9)
    assert json.loads((folder / "progress-ada.json").read_text())["exercises"] == before["exercises"]


@pytest.mark.parametrize(("ratio", "score"), [(0, 0.9), (-1.0, 0.9), (float("nan"), 0.9), (2.0, None), ("2", 0.9)])
def test_what_is_no_entry_is_refused(folder, ratio, score):
    with pytest.raises(ValueError, match=r"(ratio|score)=.*: must be a number"):
        enter("16.6", ratio=ratio, score=score)
    assert not folder.exists()


def everybody(monkeypatch):
    for name, ratio, score in (("bo", 3.0, 0.925), ("ada", 7.25, 0.913), ("cy", 12.04, 0.9)):
        monkeypatch.setenv("COURSE_LEARNER", name)
        enter("16.6", ratio=ratio, score=score, name="Cy <b>" if name == "cy" else "")


def test_the_fastest_comes_first(folder, monkeypatch):
    everybody(monkeypatch)
    board = leaderboard()
    assert list(board.columns) == ["rank", "who", "times as fast as the first script", "accuracy", "date", "processor"]
    assert [row[:4] for row in board.itertuples(index=False, name=None)] == [
        (1, "Cy <b>", "12.0", "0.900"), (2, "ada", "7.2", "0.913"), (3, "bo", "3.0", "0.925"),
    ]  # fmt: skip
    assert set(board["processor"]) == {"Test 9000"}
    assert "Cy &lt;b&gt;" in board._repr_html_()
    assert list(leaderboard("16.7")["who"]) == ["nobody has entered yet"]


def test_of_two_equals_the_earlier_comes_first(folder, monkeypatch):
    folder.mkdir()
    for name, date in (("ada", "2026-05-02"), ("bo", "2026-05-01")):
        entry = {"ratio": 4.0, "score": 0.9, "date": date, "name": name, "machine": ""}
        (folder / f"progress-{name}.json").write_text(json.dumps({"exercises": {}, "races": {"16.6": entry}}))
    assert list(leaderboard()["who"]) == ["bo", "ada"]


def test_a_damaged_file_is_passed_over_and_not_touched(folder, monkeypatch):
    everybody(monkeypatch)
    (folder / "progress-bo.json").write_bytes(b"{")
    with pytest.warns(UserWarning, match=r"progress-bo\.json is passed over"):
        assert list(leaderboard()["who"]) == ["Cy <b>", "ada"]
    assert (folder / "progress-bo.json").read_bytes() == b"{"


def test_an_entry_with_nothing_but_its_figures_is_shown(folder):
    folder.mkdir()
    bare = {"exercises": {}, "races": {"16.6": {"ratio": 2, "score": 1}}}
    (folder / "progress-dee.json").write_text(json.dumps(bare))
    assert list(leaderboard().itertuples(index=False, name=None)) == [(1, "dee", "2.0", "1.000", "", "")]


def test_nobody_has_entered_yet(folder):
    assert "nobody has entered yet" in repr(leaderboard())
    assert not folder.exists()


def test_a_validation_run_enters_nothing_and_knows_nobody(folder, monkeypatch):
    everybody(monkeypatch)
    before = (folder / "progress-ada.json").read_bytes()
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    monkeypatch.setenv("COURSE_LEARNER", "ada")
    assert enter("16.6", ratio=100.0, score=1.0) == ""
    assert list(leaderboard()["who"]) == ["nobody has entered yet"]
    assert (folder / "progress-ada.json").read_bytes() == before


def test_a_folder_that_cannot_be_written_is_told(folder):
    folder.touch()
    assert enter("16.6", ratio=2.0, score=0.9).startswith("your progress could not be kept")


def several(own, ready):
    ready.wait()
    for ratio in range(1, 9):
        assert enter(own, ratio=ratio, score=0.9) == ""
        assert enter("16.6", ratio=ratio, score=0.9) == ""


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_several_notebooks_of_one_learner_lose_nothing(folder):
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(2)
    notebooks = [fork.Process(target=several, args=(f"16.{number}", ready)) for number in (7, 9)]
    for notebook in notebooks:
        notebook.start()
    for notebook in notebooks:
        notebook.join()
    assert [notebook.exitcode for notebook in notebooks] == [0, 0]
    assert {key: entry["ratio"] for key, entry in stored(folder).items()} == {"16.6": 8, "16.7": 8, "16.9": 8}
