"""The pages that collect what all chapters hold: the claims, the references, and (`studies`) the recorded studies.

| directive | what it shows |
| --- | --- |
| ``{claims}`` | every claim with its condition, its measured figures and its place, to be filtered |
| ``{bibliography}`` | every reference once, with the chapters that cite it, to be filtered |
| ``{studies}`` | every recorded study: question, tables, provenance |
| ``{example-claim}`` | one claim as it stands in its notebook: the cell, and what came of it |
| ``{example-figure}`` | the beginning of what is stored beside a picture |

All is read from the stored notebooks and recordings each time a page is read, and a page is read again only when one of
them changed, came or went.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging

from course_lib.lab.chapters import Chapter
from course_lib.proving.figures import FIGURE_MIME
from site_builder import collecting, notebooks, studies
from site_builder.collecting import CODE, Collecting, escaped, link, markdown, named, notebook_of, scrolls
from site_builder.notebooks import Claim, Reference, plain

logger = logging.getLogger(__name__)


def filter_form(name: str, chapters: Sequence[Chapter]) -> str:
    """The form that ``filter.js`` shows and fills with life; without a script it stays hidden."""
    options = "".join(f'<option value="{chapter.nn}">{named(chapter)}</option>' for chapter in chapters)
    return (
        f'<form class="filter" role="search" aria-label="Filter the {name}" data-filter="{name}" hidden>'
        f'<p><label for="{name}-words">Words</label>'
        f'<input type="search" id="{name}-words" name="words" autocomplete="off" spellcheck="false"></p>'
        f'<p><label for="{name}-chapter">Chapter</label>'
        f'<select id="{name}-chapter" name="chapter"><option value="">all</option>{options}</select></p>'
        '<p><button type="reset">Show all</button></p>'
        '<p class="found" role="status"></p></form>'
    )


# Claims


def claim_item(claim: Claim, chapter: Chapter) -> str:
    """One claim of a list; its number is that in the chapter."""
    mark = "" if claim.holds else '<strong class="fails">does not hold: </strong>'
    return (
        f'<li value="{claim.number}" data-chapter="{chapter.nn}">{mark}'
        f"{link(chapter, escaped(claim.sentence), claim.anchor)}"
        f"<dl><div><dt>holds if</dt><dd>{CODE}{html.escape(plain(claim.condition))}</code></dd></div>"
        f"<div><dt>measured</dt><dd>{escaped(claim.figures)}</dd></div></dl></li>"
    )


def claim_counts(counted: Sequence[tuple[Chapter, int]]) -> str:
    """How many there are, by chapter and in all."""
    rows = "".join(
        f'<tr><th scope="row"><a href="#claims-{chapter.nn}">{named(chapter)}</a></th><td>{count}</td></tr>'
        for chapter, count in counted
    )
    total = sum(count for _, count in counted)
    table = (
        '<table class="counts"><caption>Claims by chapter</caption>'
        '<thead><tr><th scope="col">chapter</th><th scope="col">claims</th></tr></thead>'
        f'<tbody>{rows}</tbody><tfoot><tr><th scope="row">all chapters</th><td>{total}</td></tr></tfoot></table>'
    )
    return scrolls("Claims by chapter", table)


class Claims(Collecting):
    """``{claims}``: all claims of all chapters."""

    def run(self) -> list[nodes.Node]:
        held = [(chapter, notebooks.claims(notebook_of(chapter))) for chapter in self.chapters()]
        held = [(chapter, claims) for chapter, claims in held if claims]
        counts = claim_counts([(chapter, len(claims)) for chapter, claims in held])
        shown: list[nodes.Node] = [self.html(counts + filter_form("claims", [chapter for chapter, _ in held]))]
        for chapter, claims in held:
            items = "".join(claim_item(claim, chapter) for claim in claims)
            content = self.html(f'<ol class="filtered claims">{items}</ol>')
            shown.append(self.section(f"claims-{chapter.nn}", f"{chapter.number} · {chapter.title}", content))
        return shown


# References


@dataclass(frozen=True)
class Work:
    """A work in its most complete wording, and the chapters that cite it."""

    reference: Reference
    chapters: tuple[Chapter, ...]


def works(cited: Iterable[tuple[Chapter, Reference]]) -> list[Work]:
    """Every work once, by first author, then year, then title."""
    merged: dict[str, list[tuple[Chapter, Reference]]] = {}
    for chapter, reference in cited:
        merged.setdefault(reference.key, []).append((chapter, reference))
    found = []
    for entries in merged.values():
        fullest = max((reference for _, reference in entries), key=completeness)
        found.append(Work(fullest, tuple(dict.fromkeys(chapter for chapter, _ in entries))))
    return sorted(found, key=lambda work: place_of(work.reference.text))


def completeness(reference: Reference) -> tuple[int, int]:
    """How many authors are named, then how much is said of the work (its address says nothing)."""
    authors, _, rest = re.sub(r"\]\(\S*\)", "]", reference.text).partition("(")
    return len(re.split(r", | and ", authors.replace(" et al.", ""))), len(rest)


def place_of(text: str) -> tuple[str, str]:
    """What a reference is sorted by: first author without accents, and the rest, which begins with the year."""
    authors, _, rest = text.partition("(")
    return folded(re.split(r",| et al\.| and ", authors)[0]), folded(rest)


def folded(text: str) -> str:
    """Lower case, without accents and signs."""
    bare = unicodedata.normalize("NFKD", text)
    return re.sub(r"\W+", " ", "".join(c for c in bare if not unicodedata.combining(c))).strip().lower()


def work_item(work: Work) -> str:
    """One work of the list."""
    places = ", ".join(link(chapter, named(chapter), "references") for chapter in work.chapters)
    numbers = " ".join(chapter.nn for chapter in work.chapters)
    cited = f'<span class="cited">cited in {places}</span>'
    return f'<li data-chapter="{numbers}">{markdown(work.reference.text)} {cited}</li>'


class Bibliography(Collecting):
    """``{bibliography}``: all references of all chapters."""

    def run(self) -> list[nodes.Node]:
        there = self.chapters()
        cited = [(chapter, entry) for chapter in there for entry in notebooks.references(notebook_of(chapter))]
        for chapter, entry in cited:
            if not entry.url:
                logger.warning("%s: a reference without an address: %s", chapter.file, entry.text[:60])
        found = works(cited)
        citing = [chapter for chapter in there if any(chapter in work.chapters for work in found)]
        items = "".join(map(work_item, found))
        counted = f"<p>{len(found)} works, cited by {len(citing)} chapters.</p>"
        return [self.html(f'{counted}{filter_form("works", citing)}<ul class="filtered works">{items}</ul>')]


# Examples of what is stored


class Example(Collecting):
    """``{example-claim} NN`` and ``{example-figure} NN``: one of a chapter's (``:number:``, by default the first)."""

    required_arguments = 1
    option_spec = {"number": directives.positive_int}  # noqa: RUF012  (docutils wants it so)

    def chapter(self) -> Chapter:
        """The chapter that the argument names."""
        for chapter in self.chapters():
            if chapter.nn == self.arguments[0]:
                return chapter
        raise self.error(f"there is no chapter {self.arguments[0]!r} yet")

    def one_of(self, held: Sequence[Any], what: str) -> Any:
        """The one that ``:number:`` asks for."""
        number = self.options.get("number", 1)
        if number > len(held):
            raise self.error(f"chapter {self.arguments[0]} has {len(held)} {what}, and number {number} was asked for")
        return held[number - 1]


class ExampleClaim(Example):
    """The cell that makes a claim, and the claim."""

    def run(self) -> list[nodes.Node]:
        chapter = self.chapter()
        notebook = notebook_of(chapter)
        made = [cell for cell in notebook.cells for output in cell.get("outputs", []) if notebooks.is_claim(output)]
        cell, claim = self.one_of(list(zip(made, notebooks.claims(notebook), strict=True)), "claims")
        item = self.html(f'<ol class="claims">{claim_item(claim, chapter)}</ol>')
        return [nodes.literal_block(cell.source, cell.source, language="python"), item]


class ExampleFigure(Example):
    """What is stored beside a picture: its axes, and its first series."""

    def run(self) -> list[nodes.Node]:
        data = [output.get("data", {}) for output in notebooks.outputs(notebook_of(self.chapter()))]
        held = [found[FIGURE_MIME] for found in data if FIGURE_MIME in found]
        content = self.one_of([one for one in held if has_a_line(one)], "figures with a title, labels and a line")
        text = json.dumps(beginning(content), indent=1, ensure_ascii=False)
        return [nodes.literal_block(text, text, language="json")]


def has_a_line(content: dict[str, Any]) -> bool:
    """Whether a figure begins with axes that have a title, labels and a line."""
    axes = content["axes"][0] if content.get("axes") else {}
    return bool(axes.get("title") and all(axes["label"].get(way) for way in "xy") and _lines(axes))


def _lines(axes: dict[str, Any]) -> list[dict[str, Any]]:
    return [series for series in axes["series"] if series["kind"] == "line"]


def beginning(content: dict[str, Any], width: int = 50) -> dict[str, Any]:
    """The first axes of a figure with the first line, empty entries left out and long columns cut short."""
    axes = content["axes"][0]
    series = [{**one, "data": {k: _short(v, width) for k, v in one["data"].items()}} for one in _lines(axes)[:1]]
    kept = {name: value for name, value in axes.items() if value not in ("", [], {}, {"x": {}, "y": {}}, None)}
    return {"axes": [{**kept, "series": series}]}


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[:width].rsplit(' ', 1)[0]} …"


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    app.add_node(collecting.collected, html=(collecting.visit, None))
    app.add_directive("claims", Claims)
    app.add_directive("bibliography", Bibliography)
    app.add_directive("studies", studies.Studies)
    app.add_directive("example-claim", ExampleClaim)
    app.add_directive("example-figure", ExampleFigure)
    app.connect("env-get-outdated", collecting.outdated)
    app.connect("html-page-context", collecting.add_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
