"""The audit finds what is planted: a pale word among hundreds, wherever it stands, and what it does not measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.browser.accessibility import serious_violations

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WORDS = "<span>word</span> " * 50
PALE = "<span style='color: #bbb'>pale</span> "
CODE = "<div class='highlight'><pre>{}</pre></div>"
PAGE = """<!doctype html><html lang="en"><title>A page</title>
<style>html, body {{ height: 100% }} body {{ background: white; color: black }}</style><main><h1>Title</h1>{}</main>"""

PLANTED = {
    "one word of code": (CODE.format(WORDS + PALE + WORDS), "color-contrast"),
    "every word of code": (CODE.format(PALE * 50), "color-contrast"),
    "one below all that the window shows": (f"{'<p>text</p>' * 300}<p>{PALE}</p>", "color-contrast"),
    "a good colour on another background": (
        f"<p>{WORDS}</p><div style='background: #333'><div><p>{WORDS}</p></div></div>",
        "color-contrast",
    ),
    "seen where the first ones are hidden": (
        f"<p hidden>{PALE * 5}</p><p style='visibility: hidden'>{PALE * 5}</p><p>{PALE}</p>",
        "color-contrast",
    ),
    "seen where the first ones are scrolled away": (
        f"<pre tabindex='0' style='overflow: auto; width: 9em; height: 3em'>{' ' * 300}{PALE * 5}</pre>"
        f"<pre tabindex='0' style='overflow: auto; width: 9em; height: 3em'>{PALE}</pre>",
        "color-contrast",
    ),
    "a word after signs": (CODE.format("<span style='color: #bbb'>():</span>" * 50 + PALE), "color-contrast"),
    "smaller letters": (
        "<p style='color: #888; font-size: 30px'>large</p>" * 9 + "<p style='color: #888'>small</p>",
        "color-contrast",
    ),
    "what one writes in": ("<label>Name <input style='color: #bbb' value='pale'></label>", "color-contrast"),
    "a picture without words": ("<img src='data:,'>", "image-alt"),
    "a button without a name": ("<button></button>", "button-name"),
    "a box that scrolls for the mouse alone": (
        f"<pre style='overflow: auto; width: 5em'>{'word' * 99}</pre>",
        "scrollable-region-focusable",
    ),
}


@pytest.mark.parametrize(("content", "rule"), PLANTED.values(), ids=PLANTED)
def test_what_hinders_a_reader_is_found(browser: Browser, content: str, rule: str) -> None:
    page = browser.new_page()
    page.set_content(PAGE.format(content))
    (found,) = serious_violations(page)
    page.close()
    assert found.startswith(f"{rule}: ")


def test_what_hinders_nobody_is_not(browser: Browser) -> None:
    page = browser.new_page()
    page.set_content(PAGE.format(f"<p>{WORDS}</p>{CODE.format(WORDS)}<img alt='A dot' src='data:,'>"))
    assert not serious_violations(page)
    page.close()
