"""Tables of sentences with links to sections of other chapters and to sources, for a notebook and for the web site."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

from course_lib.lab.chapters import CHAPTERS

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler


def address(chapter: int, section: str) -> str:
    """The address of a section from beside its notebook, with the anchor that the web site gives it."""
    words = re.sub(r"\$[^$]*\$|[`*]", "", section).strip().lower().replace(" ", "-")
    return f"{CHAPTERS[chapter].file}#{re.sub(r'[^-_a-z0-9]', '', words)}"


def to_section(chapter: int, section: str) -> str:
    """A link in HTML that says the chapter and the section's number, as "8, section 6.1"."""
    number = section.split()[0].rstrip(".")
    return to_page(f"{chapter}, section {number}", address(chapter, section))


def to_page(words: str, url: str) -> str:
    """A link in HTML."""
    return f'<a href="{html.escape(url, quote=True)}">{html.escape(words)}</a>'


def readable(table: Styler) -> Styler:
    """A table of sentences: left, from the top, in lines that break."""
    return table.set_table_styles(
        [
            {"selector": "th, td", "props": "text-align: left; vertical-align: top; padding: 0.3em 0.5em"},
            {"selector": "td", "props": "font-size: 90%; min-width: 6em; white-space: normal"},
            {"selector": "caption", "props": "text-align: left; caption-side: top"},
        ]
    )
