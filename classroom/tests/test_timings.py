"""The table of timings in each page of the guide is that of its notebook as it stands."""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from classroom import timings
from classroom.timings import BEGIN, END, NOTEBOOKS, RunTimes, Section, block, sections, with_block, words
from course_lib.lab.chapters import CHAPTERS, Chapter
from course_lib.proving.run_notebook import NotebookFailed

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
RECORDED = timings.read_run_times()


@pytest.fixture
def chapter() -> NotebookNode:
    return new_notebook(
        cells=[
            new_markdown_cell("# 99 · A chapter\n\nThree words here."),
            new_code_cell("import time"),
            new_markdown_cell("## 1. The idea\n\nOne *two*.\n\n```python\n## no heading, no words\n```"),
            new_code_cell("time.sleep(0.3)"),
            new_code_cell("  \n"),
            new_markdown_cell("Three more words.\n\n### 1.1 A part\n\nFour.\n\n## References"),
            new_code_cell("assert True"),
        ]
    )


def written(chapter: NotebookNode, folder: Path) -> Path:
    path = folder / "99_chapter.ipynb"
    nbformat.write(chapter, path)
    return path


# The guide


@each_chapter
def test_every_section_with_code_has_a_run_time(chapter: Chapter) -> None:
    if chapter.nn not in RECORDED:
        pytest.skip(f"not timed yet: python -m classroom.timings --measure {chapter.nn}")
    parts = sections(nbformat.read(NOTEBOOKS / chapter.file, as_version=4))
    assert set(RECORDED[chapter.nn].seconds) == {part.name for part in parts if part.code}, (
        f"its sections have changed: python -m classroom.timings --measure {chapter.nn}"
    )
    assert all(seconds >= 0 for seconds in RECORDED[chapter.nn].seconds.values())
    assert RECORDED[chapter.nn].processor


@each_chapter
def test_the_sections_are_those_of_the_course(chapter: Chapter) -> None:
    names = [part.name for part in sections(nbformat.read(NOTEBOOKS / chapter.file, as_version=4))]
    assert names[0] == timings.OPENING
    assert names[-1] == "References"
    assert len(set(names)) == len(names)
    whole = [int(name) for name in names if name.isdecimal()]
    assert whole == list(range(1, len(whole) + 1))
    assert len(whole) >= 7


# Counting


def test_words_and_cells_go_to_the_section_that_they_stand_in(chapter: NotebookNode) -> None:
    assert sections(chapter) == [
        Section("opening", 6, [1]),  # 99, A, chapter, and three
        Section("1 The idea", 8, [2]),
        Section("1.1 A part", 4, []),
        Section("References", 1, [3]),
    ]
    assert [part.name for part in sections(chapter)] == ["opening", "1", "1.1", "References"]


@pytest.mark.parametrize(
    ("prose", "count"),
    [
        ("two words", 2),
        ("a dash – and a colon : are none", 7),
        ("[a link](../elsewhere.ipynb#with-words) counts by what is read", 7),
        ("where $x + y$ is one", 4),
        ("nothing\n\n$$a = b \\text{ and so on}$$", 1),
        ("<b>bold</b> words", 2),
        ("<details><summary>Hints</summary>\n\nmany words of hints\n</details> after", 1),
        ("- a list\n- of two", 4),
        ("| a | table |\n| --- | --- |\n| of | cells |", 4),
        ("", 0),
    ],
)
def test_words(prose: str, count: int) -> None:
    assert words(prose) == count


# The block


def test_the_block_adds_up_and_shows_a_dash_for_what_was_not_timed() -> None:
    parts = [Section("opening", 100, [1]), Section("1 The idea", 500, []), Section("1.1 More", 1400, [2, 3])]
    rows = block(parts, None).splitlines()
    assert "opening | 100 | <1 | 1 | –" in rows
    assert "**all** | 2,000 | 10 | 3 | –" in rows
    timed = block(parts, RunTimes({"opening": 0.2, "1.1": 12.4}, "a processor, 2 cores", "2026-05-04"))
    rows = timed.splitlines()
    assert "opening | 100 | <1 | 1 | <1" in rows
    assert "1 The idea | 500 | 2 | – | –" in rows
    assert "1.1 More | 1,400 | 7 | 2 | 12" in rows
    assert "**all** | 2,000 | 10 | 3 | 13" in rows
    assert "2026-05-04 on a processor, 2 cores" in timed


def test_no_row_begins_as_a_list_or_breaks_the_table() -> None:
    chapter = new_notebook(cells=[new_markdown_cell("## 1. This | that")])
    assert r"1 This \| that | 3 |" in block(sections(chapter), None)


def test_a_block_goes_below_the_plan_and_is_replaced_there() -> None:
    page = "# Page\n\n## Plan\n\nMinutes.\n\n## The questions to ask\n\nMine.\n"
    once = with_block(page, f"{BEGIN}\nold\n{END}")
    assert once == f"# Page\n\n## Plan\n\nMinutes.\n\n{BEGIN}\nold\n{END}\n\n## The questions to ask\n\nMine.\n"
    twice = with_block(once, f"{BEGIN}\nnew\n{END}")
    assert twice == once.replace("old", "new")


@pytest.mark.parametrize("page", [BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{END}", "no plan"])
def test_a_page_that_cannot_be_written_is_left_alone(page: str) -> None:
    with pytest.raises(ValueError, match="page: there must be one"):
        with_block(page, "")


# Measuring


def test_a_run_is_timed_by_section_and_the_notebook_stays(chapter: NotebookNode, tmp_path: Path) -> None:
    path = written(chapter, tmp_path)
    before = path.read_bytes()
    times = timings.measured(path)
    assert path.read_bytes() == before
    assert list(times.seconds) == ["opening", "1", "References"]
    assert times.seconds["1"] >= 0.3
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_cell_that_fails_is_named_and_nothing_is_recorded(chapter: NotebookNode, tmp_path: Path) -> None:
    chapter.cells[3].source = "1 / 0"
    with pytest.raises(NotebookFailed, match=r"99_chapter.ipynb: code cell \[2\] failed.*\n(.|\n)*ZeroDivisionError"):
        timings.measured(written(chapter, tmp_path))


def test_run_times_are_kept_chapter_by_chapter(tmp_path: Path) -> None:
    path = tmp_path / "run_times.csv"
    assert timings.read_run_times(path) == {}
    first = {"02": RunTimes({"opening": 2.5, "3.1": 0.1, "3.10": 7.0}, "one, 2 cores", "2026-05-04")}
    timings.write_run_times(first, path)
    assert timings.read_run_times(path) == first
    second = {**first, "00": RunTimes({"1": 3.0}, "another", "2026-05-05")}
    timings.write_run_times(second, path)
    assert timings.read_run_times(path) == second
    assert path.read_text(encoding="utf-8").startswith("chapter,section,seconds,processor,date\n00,1,3.0,another,")


def test_what_does_not_exist_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert timings.main(["--measure", "02", "77"]) == 2
    assert "--measure 77: there are 00 to 17, and all" in capsys.readouterr().err


def test_nothing_is_measured_on_a_busy_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "measured", lambda notebook: pytest.fail("it was measured"))
    monkeypatch.setattr(timings.os, "getloadavg", lambda: (7.5, 0.0, 0.0), raising=False)
    assert timings.main(["--measure", "02"]) == 2
    assert "a load of 7.5" in capsys.readouterr().err
