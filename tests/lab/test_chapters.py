"""What is known of the chapters."""

from course_lib.lab.chapters import CHAPTERS, MODULES, of_slot, written
from course_lib.lab.plotting import SLOTS


def test_chapters_are_numbered_in_order_and_stand_on_earlier_ones():
    assert [chapter.number for chapter in CHAPTERS] == list(range(18))
    assert all(max(chapter.needs, default=-1) < chapter.number for chapter in CHAPTERS)
    assert {chapter.slot for chapter in CHAPTERS} == {*SLOTS, ""}
    assert [bool(chapter.module) for chapter in CHAPTERS] == [n >= 1 for n in range(18)]
    assert len(set(MODULES)) == 17
    assert len({chapter.place for chapter in CHAPTERS}) == 18


def test_a_chapter_of_two_digits():
    assert CHAPTERS[2].file == "02_optimizers.ipynb"
    assert (CHAPTERS[2].nn, CHAPTERS[12].nn) == ("02", "12")
    assert of_slot("objective") == (5, 9)


def test_a_chapter_is_written_when_its_notebook_is_there(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("03_learning_rate.ipynb", "my_2026-05-04_02_optimizers.ipynb", "04_something.ipynb"):
        (tmp_path / "notebooks" / name).touch()
    assert written(tmp_path) == {3}
