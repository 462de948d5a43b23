"""Slides of all chapters: what is on them, what is not, and that nothing runs over their edge."""

import functools
import html
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from classroom.course import NOTEBOOKS
from classroom.slides import ROOT, Refused, writing
from classroom.slides.__main__ import main
from classroom.slides.deck import Deck
from classroom.slides.guide import Guide
from classroom.slides.slide import WIDE, Slide
from classroom.slides.tables import MOST_SLIDES, Cell, Table, table_items
from classroom.slides.words import sentences
from classroom.slides.writing import as_html, deck_of
from classroom.student_copy import SOLUTIONS
from classroom.tests.helping import chapter
from course_lib.lab.chapters import CHAPTERS

ALL = [entry for entry in CHAPTERS if (NOTEBOOKS / entry.file).is_file()]
EACH = pytest.mark.parametrize("nn", [entry.nn for entry in ALL])
LOOKED_AT = ("02", "07", "17")  # formulas and figures; code and wide tables; many questions and long tables
PREDICT = re.compile(r"Predict (\d\d\.[a-z]): ")
MEASURED = re.compile(r"(\d\d\.[a-z]), .* Measured: (.*)\.", re.DOTALL)


@functools.cache
def deck(nn: str) -> Deck:
    return deck_of(nn)


@functools.cache
def file(nn: str) -> str:
    return as_html(deck(nn))


def notebook(nn: str) -> Any:
    return chapter(CHAPTERS[int(nn)].file)


def said(nn: str) -> Iterator[str]:
    """What the outputs of a chapter say as plain text."""
    for cell in notebook(nn).cells:
        for output in cell.get("outputs", []):
            yield str(output.get("data", {}).get("text/plain", ""))


def words(fragment: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", fragment)).split())


def shown(slide: Slide) -> str:
    """The words on a slide, without those that wait for a key."""
    apart = re.sub(r"(?=</?(?:p|li|h2|div|pre|td|th)\b)", " ", slide.html())
    return words(re.sub(r'<div class="fragment">.*', "", apart, flags=re.DOTALL))


# What is on the slides


@EACH
def test_each_prediction_is_asked_before_it_is_answered(nn: str) -> None:
    asked = {text[8:12]: text for text in said(nn) if PREDICT.match(text)}
    measured = {found[1]: found[2] for found in map(MEASURED.fullmatch, said(nn)) if found}
    assert asked
    assert set(measured) == set(asked)
    seen = [shown(slide) for slide in deck(nn).slides]
    for key, text in asked.items():
        (question,) = [k for k, text in enumerate(seen) if f"Predict {key}" in text]
        (answer,) = [k for k, text in enumerate(seen) if f"Answer to {key}" in text]
        assert question < answer
        assert "Measured" not in seen[question] + seen[answer]  # it waits for a key
        (waiting,) = re.findall(r'<div class="fragment">(.*)', deck(nn).slides[answer].html(), re.DOTALL)
        assert words(measured[key]) in words(waiting)
        # beside its title the question's slide holds what the notebook asks there, and not a word more
        own = set(re.findall(r"\w+", seen[question])) - set(
            re.findall(r"\w+", text + words(deck(nn).slides[question].title))
        )
        assert own <= {*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "Put", "these", "in", "order"}


@EACH
def test_a_question_shows_all_that_may_be_answered_and_favours_nothing(nn: str) -> None:
    for slide in deck(nn).slides:
        if slide.kind == "question":
            options = re.findall(r"<li>(.*?)</li>", slide.html())
            assert len(options) >= 2 or re.search(r"(A number|A height) from .*; right if ", shown(slide))
            assert len(set(options)) == len(options)
            assert "fragment" not in slide.html()


@EACH
def test_no_solution_and_no_hint_is_in_the_deck(nn: str) -> None:
    cells = notebook(nn).cells
    folded = re.findall(r"<details>.*?</details>", "\n".join(cell.source for cell in cells), re.DOTALL)
    assert any(SOLUTIONS in source for source in folded)
    printed = [output.get("text", "") for cell in cells for output in cell.get("outputs", [])]  # the library's source
    open_ = [re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL) for cell in cells]
    elsewhere = " ".join(" ".join([*open_, *printed]).split())
    secret = {" ".join(line.split()) for source in folded for line in source.splitlines()}
    secret = {line for line in secret if len(line) > 25 and line not in elsewhere}
    assert secret
    made = words(file(nn))
    assert [line for line in secret if line in made] == []


@EACH
def test_every_figure_is_there_once_and_says_what_it_shows(nn: str) -> None:
    stored = [
        output.data["image/png"].replace("\n", "")
        for cell in notebook(nn).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    images = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)"', file(nn))
    assert sorted(data for data, _ in images) == sorted(stored)
    assert all(len(alt) > 10 for _, alt in images)


@EACH
def test_the_notes_hold_the_prose(nn: str) -> None:
    notes = words(" ".join(slide.notes() for slide in deck(nn).slides))
    count = 0
    for cell in notebook(nn).cells:
        if cell.cell_type != "markdown":
            continue
        prose = re.sub(r"<details>.*?</details>|```.*?```|\$\$.*?\$\$", "\n\n", cell.source, flags=re.DOTALL)
        prose = re.sub(r"^[#|].*$", "", prose, flags=re.MULTILINE)
        prose = re.sub(r"\$[^$]+\$|\]\([^)]*\)", "\n\n", prose)  # formulas and addresses are set otherwise
        for run in re.split(r"\n\n|\n-|\n\d+\.|[$`*|\[\]()<>_\\&]|https?:\S+", prose):
            plain = " ".join(re.sub(r"^\s*(?:-|\d+\.)\s", "", run).split())
            if len(plain) > 20:
                count += 1
                assert plain in notes
    assert count > 100 or nn == "17"


def test_notes_begin_with_the_minutes_and_the_advice_of_the_guide() -> None:
    found = [slide for slide in deck("02").slides if slide.title.startswith("5.2 ")]
    assert "30: 15; 90: 20; half a day: 25" in found[0].notes()
    assert "Minutes" not in found[1].notes()
    (asked,) = [slide for slide in deck("02").slides if slide.kind == "question" and "02.d" in slide.html()]
    assert "loss prefers a cautious rate" in asked.notes()
    assert "loss prefers a cautious rate" not in shown(asked)


def test_the_guide_is_read_as_a_table_and_as_a_list() -> None:
    plan = "## Plan\n\n| 30 | 90 | half a day | what | section | how |\n| --- | --- | --- | --- | --- | --- |\n"
    guide = Guide(plan + "| – | 5 | 10 | the ring | [3.1](a#b), [3.2](a#c) | board |\n| 1 | 2 | 3 | break |  |  |\n")
    minutes = "Minutes (in a plan of 90: 5; half a day: 10), with 3.2: the ring; board."
    assert guide.minutes("3.1") == f"<p><strong>{minutes}</strong></p>"
    assert guide.minutes("3.2") == ""
    listed = Guide("## The questions to ask\n\n- **17.a, the share.** Two *camps*.\n")
    assert listed.question("17.a") == "<p><strong>Two camps.</strong></p>"


def test_set_up_and_hidden_code_stay_away_and_the_code_that_counts_is_there() -> None:
    made = words(" ".join(slide.html() for slide in deck("02").slides))
    assert "import matplotlib" not in made
    assert "claims.claim(" not in made
    assert "def adam_by_hand(" in made
    assert "m.lerp_(g, 1 - beta1)" in made  # the library's own source
    assert "update = betas[0] * m" in made  # the bug to find is the task


def test_an_exercise_shows_its_task_only() -> None:
    found = [slide for slide in deck("02").slides if slide.title.startswith("Exercise 6")]
    assert "Mend it; return" in shown(found[0])
    assert "not yet right" not in " ".join(slide.html() + slide.notes() for slide in found)


# One file that asks for nothing


@EACH
def test_the_file_asks_for_nothing_else(nn: str) -> None:
    made = file(nn)
    assert re.findall(r"url\((?!data:)[^)]*\)", made[: made.index("</head>")]) == []
    assert re.findall(r"<(?:script|link)\b[^>]*\b(?:src|href)=", made[: made.index("<body>")]) == []
    assert re.findall(r"<script\b[^>]+>", made) == []
    inside = made[made.index('<div class="slides">') : made.index("<script>")]
    assert re.findall(r"<(?:img|iframe|link)\b[^>]*\b(?:src|href)=\"(?!data:)[^\"]*", inside) == []
    links = re.findall(r'<a\b[^>]*\bhref="([^"]*)"', inside)
    assert all(link.startswith(("https://", "http://")) for link in links)  # to follow, none to load
    assert "$" not in re.sub(r"<(pre|code|annotation|img|table)\b.*?(</\1>|>)", "", inside, flags=re.DOTALL).replace(
        "$10", ""
    )


def test_the_same_notebook_makes_the_same_file() -> None:
    assert file("06") == as_html(deck_of("06"))


# Nothing runs over the edge


@EACH
def test_by_count_every_slide_holds_what_is_on_it(nn: str) -> None:
    for slide in deck(nn).slides:
        if slide.kind == "words":
            assert sum(item.height(WIDE, 1.0) for item in slide.above) <= slide.free, slide.title


def test_a_sentence_ends_where_a_reader_ends_it() -> None:
    text = "As Choi et al. (2019) say. (Run it. Or not.) <em>Why? It</em> pays. By J. Smith, e.g. Here."
    assert sentences(text) == [
        "As Choi et al. (2019) say.", "(Run it. Or not.)", "<em>Why? It</em> pays.", "By J. Smith, e.g. Here.",
    ]  # fmt: skip


def test_a_long_table_is_cut_and_says_so() -> None:
    rows = [[Cell(f"row {k}"), Cell("word " * 60)] for k in range(40)]
    table = Table([[Cell("what"), Cell("why")]], rows)
    parts = table_items(table, 560, 0)
    assert len(parts) == MOST_SLIDES
    assert all(part.height(WIDE, 1.0) <= 560 for part in parts)
    on_slides = re.findall(r"row \d+", " ".join(part.html for part in parts))
    assert on_slides == [f"row {k}" for k in range(len(on_slides))]
    assert f"{len(on_slides)} of 40 rows; the notebook has all." in parts[-1].html


def test_a_table_that_fits_is_whole_and_one_that_is_wide_is_turned() -> None:
    row = [Cell(str(k)) for k in range(12)]
    turned = Table([row], [row]).upright()
    assert len(turned.rows) == 11
    assert turned.columns == 2
    assert len(table_items(turned, 560, 0)) == 1


# In a browser

OVER = """() => {
  const over = [];
  for (const section of Reveal.getSlides()) {
    const at = Reveal.getIndices(section);
    Reveal.slide(at.h, at.v || 0, 99);
    const slide = section.querySelector('.slide'), edge = slide.getBoundingClientRect(), named = `${at.h}/${at.v || 0}`;
    if (slide.scrollHeight > slide.clientHeight + 1 || slide.scrollWidth > slide.clientWidth + 1)
      over.push(`${named} scrolls: ${slide.scrollWidth} x ${slide.scrollHeight}`);
    for (const part of slide.querySelectorAll('h1, h2, p, li, table, td, th, pre, .line, .claim, .katex-base, img')) {
      const box = part.getBoundingClientRect(), size = parseFloat(getComputedStyle(part).fontSize);
      if (part.closest('.katex-mathml') || !box.width) continue;
      if (box.left < edge.left || box.right > edge.right || box.top < edge.top || box.bottom > edge.bottom)
        over.push(`${named} ${part.tagName} beyond the edge: ${part.textContent.slice(0, 40)}`);
      if (['TD', 'TH', 'LI', 'P'].includes(part.tagName) && part.scrollWidth > part.clientWidth + 2)
        over.push(`${named} ${part.tagName} too wide: ${part.textContent.slice(0, 40)}`);
      if (size < (['TD', 'TH'].includes(part.tagName) || part.tagName == 'TABLE' ? 18 : 20) && part.tagName != 'IMG')
        over.push(`${named} ${part.tagName} of ${size}px`);
    }
  }
  return over;
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    try:
        path = writing.browser()
    except Refused as error:
        pytest.skip(str(error))
    driver = pytest.importorskip("playwright.sync_api", reason="nothing drives the browser: pip install playwright")
    with driver.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decks")


def opened(chromium: Any, folder: Path, nn: str) -> tuple[Any, list[str]]:
    """A deck in a browser, and all that it asks for or complains of."""
    path = folder / f"{nn}.html"
    if not path.exists():
        path.write_text(file(nn), encoding="utf-8")
    page, heard = chromium.new_page(viewport={"width": 1280, "height": 720}), []
    page.on("console", lambda message: heard.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.on(
        "request", lambda asked: None if asked.url.startswith(("data:", path.as_uri())) else heard.append(asked.url)
    )
    page.goto(path.as_uri())
    page.wait_for_function("Reveal.isReady() && document.fonts.status == 'loaded'")
    return page, heard


@pytest.mark.parametrize("nn", LOOKED_AT)
def test_nothing_runs_over_the_edge_and_nothing_is_asked_for(chromium: Any, folder: Path, nn: str) -> None:
    page, heard = opened(chromium, folder, nn)
    assert page.evaluate("Reveal.getTotalSlides()") == len(deck(nn).slides)
    assert page.evaluate(OVER) == []
    assert heard == []
    page.close()


def test_an_answer_comes_only_after_one_more_key(chromium: Any, folder: Path) -> None:
    page, _ = opened(chromium, folder, "02")
    at = page.evaluate("""() => {
        const answer = Reveal.getSlides().find(slide => slide.textContent.includes('Answer to 02.b'));
        return Reveal.getIndices(answer);
    }""")
    page.evaluate(f"Reveal.slide({at['h']}, {at['v']}, -1)")
    measured = page.locator("section.present section.present .measured")
    assert not measured.is_visible()
    page.keyboard.press("Space")
    measured.wait_for(state="visible", timeout=10_000)
    assert "Muon" in measured.inner_text()
    page.close()


def test_the_speaker_has_the_notes_of_the_slide(chromium: Any, folder: Path) -> None:
    page, heard = opened(chromium, folder, "02")
    with page.expect_popup() as found:
        page.keyboard.press("s")
    notes = found.value.locator(".speaker-controls-notes .value")
    notes.get_by_text("to say what each optimizer does").or_(notes.get_by_text("After this chapter")).first.wait_for()
    assert heard == []
    page.context.close()


def test_the_pdf_has_a_page_a_slide(chromium: Any, folder: Path) -> None:
    command = [sys.executable, "-m", "classroom.slides", "06", "--out", str(folder), "--pdf"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (folder / "06_early_stopping.slides.html").is_file()
    pdf = folder / "06_early_stopping.slides.pdf"
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", pdf.read_bytes())) == len(deck("06").slides)


# What goes wrong


@pytest.mark.parametrize("wrong", ["99", "two", "", "-1"])
def test_an_unknown_chapter_is_named(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--out={tmp_path}", "--", wrong]) == 2
    assert f"NB={wrong!r}: there is no such chapter; 00 to 17 are there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_a_browser_there_is_no_pdf_and_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    assert main(["02", f"--out={tmp_path}", "--pdf"]) == 2
    assert "CHROMIUM='no-such-browser' is no program" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("CHROMIUM")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Refused, match="a PDF is printed by Chromium or Chrome, and there is none"):
        writing.browser()
