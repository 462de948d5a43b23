"""What others call: a chapter's number -> its deck, as one HTML file, and printed as a PDF."""

import base64
import html
import os
import re
import shutil
from functools import cache
from pathlib import Path

import jinja2
import nbformat

from classroom.slides import ROOT, Refused
from classroom.slides.deck import Deck
from classroom.slides.guide import Guide
from classroom.slides.letters import font_faces
from course_lib.lab.chapters import CHAPTERS
from course_lib.lab.files import replaced

HERE = Path(__file__).parent  # the template, and reveal.js with its licence
KATEX = ROOT / "docs" / "_static" / "katex"
BROWSERS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)  # fmt: skip


def deck_of(number: str, root: Path = ROOT) -> Deck:
    """The slides of a chapter.

    Raises
    ------
    Refused : there is no such chapter.
    """
    chapter = next((one for one in CHAPTERS if number.isdecimal() and one.number == int(number)), None)
    path = root / "notebooks" / chapter.file if chapter else root
    if chapter is None or not path.is_file():
        raise Refused(f"NB={number!r}: there is no such chapter; 00 to {CHAPTERS[-1].nn} are there")
    guide = root / "classroom" / "guide" / f"{path.stem}.md"
    words = guide.read_text(encoding="utf-8") if guide.is_file() else ""
    return Deck(chapter, nbformat.read(path, as_version=4), Guide(words))


def as_html(deck: Deck) -> str:
    """The one file that a deck is."""
    columns = [
        [{"kind": slide.kind, "html": slide.html(), "notes": slide.notes()} for slide in column]
        for column in deck.columns
        if column
    ]
    letters = html.unescape(re.sub(r"<[^>]+>", "", " ".join(slide["html"] for column in columns for slide in column)))
    return jinja2.Template(_read("deck.html"), trim_blocks=True).render(
        title=html.escape(f"{deck.chapter.number} · {deck.chapter.title}: slides"),
        columns=columns,
        fonts=font_faces(letters),
        katex_css=_katex_css(),
        deck_css=_read("deck.css"),
        reveal_css=_read("reveal/reveal.css"),
        reveal_js=_read("reveal/reveal.js"),
        notes_js=_read("reveal/notes.js"),
    )


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def _katex_css() -> str:
    def inlined(match: re.Match[str]) -> str:
        return f"url(data:font/woff2;base64,{base64.b64encode((KATEX / match[1]).read_bytes()).decode()})"

    return re.sub(r"url\((fonts/[^)]+)\)", inlined, (KATEX / "katex.min.css").read_text(encoding="utf-8"))


def write(number: str, folder: Path) -> Path:
    """Write a chapter's deck into a folder; its path.

    Raises
    ------
    Refused : there is no such chapter.
    """
    deck = deck_of(number)
    path = folder / f"{Path(deck.chapter.file).stem}.slides.html"
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write(as_html(deck).encode())
    return path


def browser() -> str:
    """A Chromium or Chrome: what ``CHROMIUM`` names, else the first that is found.

    Raises
    ------
    Refused : there is none.
    """
    if chosen := os.environ.get("CHROMIUM", "").strip():
        if found := shutil.which(chosen):
            return found
        raise Refused(f"CHROMIUM={chosen!r} is no program; it must be a browser's name or path, or not be set")
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        return found
    raise Refused("a PDF is printed by Chromium or Chrome, and there is none; CHROMIUM=/path/to/chrome names one")


def write_pdf(deck: Path) -> Path:
    """Print a deck, one page a slide, beside its HTML; the path of the PDF.

    Raises
    ------
    Refused : there is no browser, or nothing that drives it.
    """
    program, path = browser(), deck.with_suffix(".pdf")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise Refused("a PDF needs something that drives the browser: pip install playwright") from None
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        # as root Chromium starts only without its own sandbox
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"] if root else [])
        page = chromium.new_page(viewport={"width": 1280, "height": 720})
        page.goto(f"{deck.resolve().as_uri()}?print-pdf")
        page.wait_for_function("document.querySelector('.pdf-page') && document.fonts.status == 'loaded'")
        made = page.pdf(prefer_css_page_size=True, print_background=True)
        chromium.close()
    with replaced(path) as file:
        file.write(made)
    return path
