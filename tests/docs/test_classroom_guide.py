"""The instructor's guide speaks of the chapters as they stand: its links, its minutes, its questions, its exercises."""

import importlib
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest

from classroom import timings
from course_lib.lab.chapters import CHAPTERS, Chapter
from course_lib.lab.judging import Reading
from course_lib.outlook.links import address

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "classroom" / "guide"
LINK = re.compile(r"\]\(\.\./\.\./notebooks/([^)#]+)(?:#([^)]+))?\)")
PARTS = (
    "Plan",
    "The questions to ask",
    "Three discussions",
    "Mistakes you will see",
    "If time is short",
    "For the quick",
    "Traps for the instructor",
)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_words_and_seconds_are_those_of_the_notebook(chapter: Chapter) -> None:
    page = timings.page_of(chapter).read_text(encoding="utf-8")
    assert page == timings.written_out(chapter, timings.read_run_times()), "make class-timings writes it anew"


@lru_cache
def cells(file: str) -> list[tuple[str, str]]:
    """Kind and source of each cell."""
    notebook = json.loads((ROOT / "notebooks" / file).read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


@lru_cache
def anchors(file: str) -> frozenset[str]:
    """Of all headings."""
    number = int(file[:2])
    text = "\n".join(source for kind, source in cells(file) if kind == "markdown")
    return frozenset(address(number, found).split("#")[1] for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", sorted(path.name for path in GUIDE.glob("*.md")))
def test_every_link_leads_to_a_section(page: str) -> None:
    for file, anchor in LINK.findall((GUIDE / page).read_text(encoding="utf-8")):
        assert (ROOT / "notebooks" / file).is_file(), f"{page}: {file}"
        assert not anchor or anchor in anchors(file), f"{page}: {file}#{anchor}"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_every_chapter_has_its_page(chapter: Chapter) -> None:
    text = (GUIDE / f"{chapter.nn}_{chapter.name}.md").read_text(encoding="utf-8")
    assert "**Aim.**" in text
    assert [part for part in re.findall(r"^## (.+)$", text, re.MULTILINE) if part in PARTS] == list(PARTS)
    code = "\n".join(source for kind, source in cells(chapter.file) if kind == "code")
    asked = set(re.findall(r'^predict\(\s*"(\d\d\.[a-z])"', code, re.MULTILINE))
    assert asked <= set(re.findall(r"\b\d\d\.[a-z]\b", text)), "a question that the guide does not name"


def measured(file: str) -> dict[str, str]:
    """What the stored outputs say came out, by prediction."""
    found: dict[str, str] = {}
    for cell in json.loads((ROOT / "notebooks" / file).read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            said = "".join(output.get("data", {}).get("text/plain", ""))
            if match := re.fullmatch(r"(\d\d\.[a-z]), .* Measured: (.*)\.", " ".join(said.split())):
                found[match[1]] = match[2]
    return found


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_what_came_out_is_what_the_notebook_stores(chapter: Chapter) -> None:
    text = (GUIDE / f"{chapter.nn}_{chapter.name}.md").read_text(encoding="utf-8")
    wanted = "; ".join(f"{key} {value}" for key, value in measured(chapter.file).items())
    assert wanted
    assert f"**Measured, in the stored outputs:** {wanted}. " in text, f"the line is to say: {wanted}."


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_the_key_to_a_figure_is_that_of_the_check(chapter: Chapter) -> None:
    text = (GUIDE / f"{chapter.nn}_{chapter.name}.md").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("**Measured, in the stored outputs:**"))
    checks = importlib.import_module(f"course_lib.checks.chapter_{chapter.nn}")
    for name, check in vars(checks).items():
        if isinstance(check, Reading):
            said = line.partition(f"of {name.replace('_', ' ')}: ")[2].removesuffix(".")
            choice, _, reason = said.rpartition(", ")
            assert choice.split()[-1] == str(check.right[0]).split()[-1], said
            assert reason == check.right[1], said


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_the_minutes_of_a_plan_add_up(chapter: Chapter) -> None:
    """The last row of the plan is the sum of those above, column by column."""
    text = (GUIDE / f"{chapter.nn}_{chapter.name}.md").read_text(encoding="utf-8")
    plan = text[text.index("## Plan") : text.index("## The questions to ask")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in plan.splitlines() if line[:1] == "|"]
    numbers = [[cell.strip("*") for cell in row[:3]] for row in rows[2:]]
    *parts, total = [[int(cell) if cell.isdecimal() else 0 for cell in row] for row in numbers]
    assert [sum(column) for column in zip(*parts, strict=True)] == total
    assert total[0] == 30
    assert total[1] == 90
