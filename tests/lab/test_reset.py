"""A chapter comes back as it was, and what the learner wrote stays."""

import datetime
import subprocess
from pathlib import Path

import pytest

from course_lib.lab import reset as module
from course_lib.lab.reset import CannotReset, main, reset

STORED = '{"cells": [], "metadata": {"ü": 1}}\n'
EDITED = "all my work"


@pytest.fixture(params=["plain", "my course ü"])
def course(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A repository with two chapters, in a folder with an easy name and in one with a difficult one."""
    root = tmp_path / request.param
    (root / "notebooks").mkdir(parents=True)
    for name in ("02_optimizers.ipynb", "08_pruning.ipynb"):
        (root / "notebooks" / name).write_text(STORED, encoding="utf-8")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "course"]):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *command], cwd=root, check=True)
    return root


def files(course: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (course / "notebooks").iterdir()}


def test_an_edited_chapter_comes_back_and_the_copy_stays(course: Path) -> None:
    path = course / "notebooks" / "02_optimizers.ipynb"
    path.write_text(EDITED)
    today = datetime.date.today().isoformat()
    copy = reset("2", course)
    assert copy is not None
    assert copy.name == f"my_{today}_02_optimizers.ipynb"
    path.write_text("once more")
    second = reset("02", course)
    assert second is not None
    assert files(course) == {
        "02_optimizers.ipynb": STORED, "08_pruning.ipynb": STORED, copy.name: EDITED, second.name: "once more",
    }  # fmt: skip
    status = subprocess.run(
        ["git", "status", "--short", "-uno"], cwd=course, capture_output=True, text=True, check=True
    )
    assert status.stdout == ""  # git pull meets nothing that was edited


def test_a_chapter_that_was_not_edited_is_left_alone(course: Path) -> None:
    assert reset("08", course) is None
    assert set(files(course)) == {"02_optimizers.ipynb", "08_pruning.ipynb"}


def test_a_deleted_chapter_comes_back(course: Path) -> None:
    (course / "notebooks" / "08_pruning.ipynb").unlink()
    assert reset("08", course) is None
    assert files(course)["08_pruning.ipynb"] == STORED


@pytest.mark.parametrize("chapter", ["03", "", "../secret", "x"])
def test_an_unknown_chapter_is_named_with_those_there_are(course: Path, chapter: str) -> None:
    with pytest.raises(CannotReset, match=r"there is no such chapter; there are 02, 08"):
        reset(chapter, course)


def test_without_git_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "02_optimizers.ipynb"
    path.write_text(EDITED)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(CannotReset, match="git has no chapter to give back here"):
        reset("02", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotReset, match="git is not installed"):
        reset("02", tmp_path)
    assert path.read_text() == EDITED


def test_the_command_says_where_the_copy_is(
    course: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "checkout", lambda: course)
    (course / "notebooks" / "02_optimizers.ipynb").write_text(EDITED)
    assert main(["02"]) == 0
    assert "chapter 02 is as it was; your copy is notebooks/my_" in capsys.readouterr().out
    assert main(["02"]) == 0
    assert "already" in capsys.readouterr().out
    assert main([]) == 2
    assert "there are 02, 08" in capsys.readouterr().err
