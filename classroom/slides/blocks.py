"""A chapter as blocks, in the order in which a reader meets them, without what slides leave out.

| kind | content |
| --- | --- |
| ``heading``, ``words`` | HTML, with formulas in TeX (see `words`) |
| ``list`` | its element |
| ``formula`` | TeX |
| ``table`` | a `Table` |
| ``picture`` | a picture, and what its controls are if it moves |
| ``question`` | its key ("02.a"), its words, and what may be answered, as HTML |
| ``answer`` | its key, the words of the question, and what was measured, as HTML |
| ``claim`` | a claim |
| ``code``, ``stub`` | source; a stub is what an exercise begins with |
| ``printed`` | what a cell printed |
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import nbformat
from bs4 import BeautifulSoup
from bs4.element import NavigableString, Tag
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from classroom.slides import Refused
from classroom.slides.listings import short_functions
from classroom.slides.tables import Table, bold_cells
from classroom.slides.words import plain
from classroom.student_copy import exercise_of
from site_builder.notebooks import claims, html_of, is_claim, picture

FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)  # hints, solutions, answers
PREDICTION = re.compile(r"Predict (\d\d\.[a-z]): ")
ANSWER = re.compile(r"(\d\d\.[a-z]), .* Measured: ", re.DOTALL)
ASKED = re.compile(r"</strong>\s*(.*?)<br>(.*)</div>", re.DOTALL)  # the words of a question, and what may be answered
MEASURED = re.compile(r'<div role="status"[^>]*>(.*?)\s*<strong>Measured: (.*?)\.</strong>', re.DOTALL)
# A cell draws its figure last, and speaks of it before; but an answer is not given away by its figure
ORDER = {"answer": 0, "question": 0, "picture": 1, "table": 2, "code": 2, "printed": 2, "claim": 3}


Kind = Literal[
    "heading", "words", "list", "formula", "table", "picture", "question", "answer", "claim", "code", "stub", "printed"
]


@dataclass(frozen=True)
class Block:
    """A piece of a chapter; what its ``content`` is depends on its kind, and only a heading has a level."""

    kind: Kind
    content: Any
    level: int = 0


def blocks(notebook: NotebookNode) -> Iterator[Block]:
    """The blocks of a chapter.

    Raises
    ------
    Refused : a question or an answer has a form that is not known here.
    """
    part = ""  # the title of the part of the chapter
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for block in _of_words(_rendered(FOLDED.sub("", cell.source))):
                if block.kind == "heading" and block.level <= 2:
                    part = plain(block.content)
                yield block
        elif cell.cell_type == "code":
            yield from _of_code(cell, shows_code=bool(re.search(r"\bThe code\b", part)))


# Markdown


class _Renderer(IPythonRenderer):
    """Markdown as HTML, with formulas left in TeX and code left as it is."""

    def block_math(self, body: str) -> str:
        return f'<div class="tex">{html.escape(body.strip())}</div>'

    def inline_math(self, body: str) -> str:
        return f'<span class="tex">{html.escape(body.strip())}</span>'

    def block_code(self, code: str, info: str | None = None) -> str:
        return f'<pre data-language="{html.escape(info or "")}">{html.escape(code)}</pre>'


def _rendered(text: str) -> BeautifulSoup:
    renderer = _Renderer(escape=False, exclude_anchor_links=True)
    return _with_links_that_work(BeautifulSoup(MarkdownWithMath(renderer=renderer).render(text), "html.parser"))


def _with_links_that_work(soup: BeautifulSoup) -> BeautifulSoup:
    for link in soup.find_all("a"):
        if not str(link.get("href", "")).startswith(("http://", "https://")):
            link.unwrap()  # another chapter or a section: its words say which
        else:
            link["target"], link["rel"] = "_blank", "noopener"
    return soup


def _of_words(soup: BeautifulSoup) -> Iterator[Block]:
    for node in soup.children:
        if not isinstance(node, Tag):
            continue
        inside = [child for child in node.children if not (isinstance(child, NavigableString) and not child.strip())]
        if re.fullmatch("h[1-6]", node.name):
            yield Block("heading", node.decode_contents(), int(node.name[1]))
        elif "tex" in (node.get("class") or ""):
            yield Block("formula", node.get_text())
        elif node.name == "p" and len(inside) == 1 and isinstance(inside[0], Tag) and inside[0].name == "div":
            yield Block("formula", inside[0].get_text())
        elif node.name in ("ul", "ol"):
            yield Block("list", node)
        elif node.name == "table":
            yield Block("table", Table.of(node))
        elif node.name == "pre":
            yield Block("code", node.get_text())
        else:
            yield Block("words", node.decode_contents().strip())


# Code and its outputs


def _of_code(cell: NotebookNode, *, shows_code: bool) -> Iterator[Block]:
    if exercise := exercise_of(cell.source):
        if exercise.stub:
            yield Block("stub", exercise.stub)
        return  # its verdict is the learner's
    hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    prints_source = "getsource(" in cell.source
    if shows_code and not hidden and not prints_source:
        yield from (Block("code", function) for function in short_functions(cell.source))
    found = (_of_output(output, "code" if prints_source else "printed") for output in cell.get("outputs", []))
    yield from sorted(filter(None, found), key=lambda block: ORDER[block.kind])


def _of_output(output: NotebookNode, printed: Kind) -> Block | None:
    """An output as a block, if slides show it; ``printed`` is the kind of what goes to stdout."""
    if output.output_type == "stream":
        return Block(printed, output.text.strip("\n")) if output.text.strip() else None
    data, shown = output.get("data", {}), html_of(output)
    text = str(data.get("text/plain", ""))
    if "image/png" in data:
        return Block("picture", (picture(output), text if text.startswith("Explorer:") else ""))
    if found := PREDICTION.match(text):
        return Block("question", (found[1], *_both(ASKED, shown, "a question")))
    if found := ANSWER.match(text):
        return Block("answer", (found[1], *_both(MEASURED, shown, "an answer")))
    if is_claim(output):
        alone = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])])
        return Block("claim", claims(alone)[0])
    if "<table" in shown:
        soup = _with_links_that_work(BeautifulSoup(shown, "html.parser"))
        return Block("table", Table.of(soup.find_all("table")[0], bold_cells(soup)))
    return Block("printed", text) if text and not shown else None


def _both(pattern: re.Pattern[str], shown: str, what: str) -> tuple[str, str]:
    found = pattern.search(shown)
    if found is None:
        raise Refused(f"{what} of another form than the deck knows: {shown[:200]}")
    return found[1], found[2]
