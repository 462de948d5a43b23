"""The site in a real browser: as a reader meets it, on a desk, on a phone, without scripts, and from a zip on disk."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from site_builder import archive, notebooks
from tests.browser.accessibility import serious_violations
from tests.browser.chromium import Watched, watched
from tests.docs.building import built

CHAPTERS = [f"chapters/{Path(chapter.file).stem}.html" for chapter in notebooks.chapters()]
DESK, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served."""
    handler = functools.partial(Quiet, directory=str(built()))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """Opens a page of the site in a window of its own, and asks at the end that nothing went wrong in it."""
    seen: list[Watched] = []
    contexts = []

    def opened(name: str, base: str = address, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": DESK, **options})
        contexts.append(context)
        page = context.new_page()
        seen.append(watched(page, base))
        page.goto(base + name)
        return page

    yield opened
    for context in contexts:
        context.close()
    for one in seen:
        assert not one.complaints, "\n".join(one.complaints)


def names() -> list[str]:
    """Every page that is not a listing of source code."""
    site = built()
    paths = (path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")))
    return [path for path in paths if not path.startswith("_modules/")]


def test_every_page_loads_cleanly_and_fits_a_phone(open_page: Any, address: str) -> None:
    page = open_page("index.html", viewport=PHONE)
    for name in names():
        page.goto(address + name)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], f"{name} is {wide} points wide on a phone"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_violation_of_accessibility(open_page: Any, address: str, theme: str) -> None:
    page = open_page("index.html", color_scheme=theme)
    of_both = ["index.html", "claims.html", "bibliography.html", "studies.html", "glossary.html", CHAPTERS[2]]
    others = [*(name for name in CHAPTERS if name not in of_both), "use.html", "api.html", "search.html"]
    for name in of_both if theme == "dark" else [*of_both, *others]:
        page.goto(address + name)
        for button in page.get_by_role("button", name="Show all answers").all():
            button.click()  # what is folded is read too
        found = [f"{name}: {one}" for one in serious_violations(page)]
        assert not found, "\n".join(found)


def test_formulas_are_drawn_with_their_fonts(open_page: Any) -> None:
    page = open_page(CHAPTERS[2])
    page.evaluate("document.documentElement.classList.remove('asks')")  # nothing is folded
    boxes = page.evaluate("[...document.querySelectorAll('.katex-html')].map(e => e.getBoundingClientRect().width)")
    assert len(boxes) > 20
    assert min(boxes) > 2
    page.evaluate("document.fonts.ready")
    assert page.evaluate("[...document.fonts].some(f => f.family === 'KaTeX_Math' && f.status === 'loaded')")


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_explorer_moves(open_page: Any, name: str) -> None:
    page = open_page(name)
    for button in page.get_by_role("button", name="Show all answers").all():
        button.click()  # an explorer may be the answer to a question
    page.locator("figure.explorer").first.scroll_into_view_if_needed()
    page.locator("figure.explorer :is(input[type=range], select)").first.wait_for()
    picture = page.locator("figure.explorer svg").first
    picture.wait_for()
    before, sliders = picture.inner_html(), page.locator("figure.explorer input[type=range]")
    if sliders.count():
        control = sliders.first
        said = control.get_attribute("aria-valuetext")
        control.focus()
        page.keyboard.press("End" if control.input_value() == "0" else "Home")
    else:  # choices alone
        control = page.locator("figure.explorer select").first
        others = control.evaluate(
            "select => [...select.options].map((_, k) => k).filter(k => k !== select.selectedIndex)"
        )
        control.select_option(index=others[0])
    page.wait_for_function("before => document.querySelector('figure.explorer svg').innerHTML !== before", arg=before)
    if sliders.count():
        assert control.get_attribute("aria-valuetext") != said
    assert picture.get_attribute("aria-label")


def test_the_search_finds_what_the_chapters_say(open_page: Any) -> None:
    page = open_page("search.html?q=Newton–Schulz")
    page.locator("#search-results a[href*='02_optimizers']").first.wait_for()
    page = open_page("search.html?q=warm-up")
    page.locator("#search-results a[href*='03_learning_rate']").first.wait_for()


def test_light_and_dark_and_pictures_on_paper_in_both(open_page: Any) -> None:
    page = open_page(CHAPTERS[2], color_scheme="light")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    for _ in range(3):  # light, dark, as the system says: in an order that depends on the system
        page.locator(".content-icon-container .theme-toggle").click()
        if page.evaluate(colour) != light:
            break
    assert page.evaluate(colour) != light
    paper = "getComputedStyle(document.querySelector('.picture img')).backgroundColor"
    assert page.evaluate(paper) == "rgb(255, 255, 255)"


def test_what_answers_a_question_is_shown_once_the_reader_has_decided(open_page: Any) -> None:
    page = open_page(CHAPTERS[2])
    question = page.locator(".prediction").first
    key = question.get_attribute("data-key")
    answer = page.locator(f".answer[data-key='{key}']")
    assert not answer.is_visible()
    question.locator("button").first.click()
    answer.wait_for()
    assert "You said" in question.inner_text()
    others = page.locator(".answer")
    assert not others.last.is_visible()
    page.reload()
    answer.wait_for()  # it is remembered
    page.get_by_role("button", name="Show all answers").click()
    others.last.wait_for()


def test_a_link_to_a_claim_unfolds_it(open_page: Any) -> None:
    page = open_page(CHAPTERS[2])
    folded = page.locator("[class*='asked-'] .claim").first
    assert not folded.is_visible()
    number = folded.get_attribute("id")
    page = open_page(f"{CHAPTERS[2]}#{number}")
    page.locator(f"#{number}").wait_for()


def test_without_scripts_and_on_paper_all_is_in_sight(open_page: Any) -> None:
    page = open_page(CHAPTERS[2], java_script_enabled=False)
    for selector in (".answer", ".claim", "figure.explorer img", ".picture img"):
        parts = page.locator(selector).all()
        assert parts
        assert all(part.is_visible() for part in parts)
    page = open_page(CHAPTERS[2])
    page.emulate_media(media="print")
    assert all(part.is_visible() for part in page.locator(".answer").all())


def test_claims_are_filtered_by_words(open_page: Any) -> None:
    page = open_page("claims.html")
    items = page.locator(".filtered > li:visible")
    everything = items.count()
    page.get_by_label("Words").fill("momentum")
    page.wait_for_function("document.querySelector('form[data-filter] [role=status]').textContent.includes(' of ')")
    assert 1 <= items.count() < everything
    assert all("momentum" in item.inner_text().lower() for item in items.all())


def test_the_archive_opens_from_disk(open_page: Any, tmp_path: Path) -> None:
    """For a room without network: everything above also by file://, in a folder with a space in its name."""
    import zipfile

    target = tmp_path / "craft of training.zip"
    archive.pack(built(), target)
    with zipfile.ZipFile(target) as packed:
        packed.extractall(tmp_path)
    base = (tmp_path / "craft of training").as_uri() + "/"
    page = open_page("index.html", base)
    page.locator(".loop a").first.click()
    page.wait_for_url("**/chapters/*.html")
    page.goto(base + CHAPTERS[2])
    page.locator("figure.explorer").first.scroll_into_view_if_needed()
    page.locator("figure.explorer svg").first.wait_for()
    page.goto(base + "search.html?q=momentum")
    page.locator("#search-results a[href*='02_optimizers']").first.wait_for()
