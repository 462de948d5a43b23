"""A chapter as a deck of slides: one HTML file that needs no network, out of the stored notebook.

    python -m classroom.slides 02 [--out FOLDER] [--pdf]     ->  FOLDER/02_optimizers.slides.html, and .slides.pdf

Nothing is executed. What a slide shows is chosen by rule:

| in the chapter | on the slides |
| --- | --- |
| a heading | a new column of slides; a part with sections first lists them |
| a figure, a table, a formula, a list | stands there, with the words that lead to it |
| other paragraphs | their first sentence, and what their author emphasised |
| a prediction | a slide that asks, with what may be answered; its answer comes later, and only after one more key |
| a claim | its sentence; its figures and its condition are notes |
| code | the functions of "The code" and the library's source where it is printed, if short |
| an exercise | its task and the code to start from |
| set-up, hints, solutions, references | nothing |

All prose is in the speaker notes (key S), under the minutes and the advice of ``classroom/guide``. Heights are counted
here, with the widths of the very letters that the deck carries, so that nothing runs over the edge of 1280 by 720.
"""

from __future__ import annotations

import argparse
import ast
import base64
import html
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib
import nbformat
from bs4 import BeautifulSoup
from bs4.element import NavigableString, Tag
from fontTools import subset
from fontTools.ttLib import TTFont
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments import highlight  # type: ignore[import-untyped]
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers import PythonLexer  # type: ignore[import-untyped]

from classroom.student_copy import exercise_of
from course_lib.lab.chapters import CHAPTERS, Chapter
from course_lib.lab.files import replaced

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs"))
from site_builder.formulas import typeset  # noqa: E402
from site_builder.notebooks import claims as claims_of  # noqa: E402
from site_builder.notebooks import html_of, is_claim, picture  # noqa: E402

HERE = Path(__file__).with_suffix("")  # templates, reveal.js and its licence
KATEX = ROOT / "docs" / "_static" / "katex"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Pixels of a slide, as slides/deck.css has them
WIDE, FREE = 1152, 636  # between the margins
WORDS, MONO = 27, 20  # sizes of letters
SCALES = (1.3, 1.2, 1.1, 1.0)  # of the words on a slide that has little else
LEADING = 175  # of words above a figure at most
ROOMY = 0.8  # how much smaller a figure may get for what stands below it
BESIDE, GAP, SLIM = 2.3, 36, 24 / 27  # words stand beside a figure that is less wide than this times its height
LARGEST = 2.0  # how far a figure is enlarged
MOST_LINES = 20  # of code that a slide shows
TABLE_SIZES = (28, 26, 24, 22, 20, 18)
MOST_OF_A_TABLE = 2  # slides

ABBREVIATIONS = re.compile(r"(?:\bal|\be\.g|\bi\.e|\bvs|\bcf|\bFig|\bapprox|\bresp|\b[A-Z])\.$")
POINTS_ELSEWHERE = re.compile(r"\b(?:next cells?|cells? below|cell that|cell runs|[Hh]ints and solutions)\b")
KEPT_SHORT = 240  # characters that a paragraph may have on a slide before it is shortened
EXERCISE = re.compile(r"<strong>Exercise (\d+)")
FOLDED = re.compile(r"<details>.*?</details>", re.DOTALL)  # hints, solutions, answers
PREDICTION = re.compile(r"Predict (\d\d\.[a-z]): ")
ANSWER = re.compile(r"(\d\d\.[a-z]), .* Measured: ", re.DOTALL)


class Refused(Exception):
    """What was asked for cannot be made; the words say why."""


# What a chapter holds, block by block


@dataclass(frozen=True)
class Block:
    """A piece of a chapter: a heading, a paragraph, a list, a figure, an answer … ``content`` depends on the kind."""

    kind: str
    content: Any
    level: int = 0


class _Words(IPythonRenderer):
    """Markdown as HTML with formulas still in TeX, inside elements of the class ``tex``, and with coloured code."""

    def block_math(self, body: str) -> str:
        return f'<div class="tex">{html.escape(body.strip())}</div>'

    def inline_math(self, body: str) -> str:
        return f'<span class="tex">{html.escape(body.strip())}</span>'

    def block_code(self, code: str, info: str | None = None) -> str:
        return f'<pre data-language="{html.escape(info or "")}">{html.escape(code)}</pre>'


def _of_markdown(text: str) -> BeautifulSoup:
    renderer = _Words(escape=False, exclude_anchor_links=True)
    return _with_links_that_work(BeautifulSoup(MarkdownWithMath(renderer=renderer).render(text), "html.parser"))


def _with_links_that_work(soup: BeautifulSoup) -> BeautifulSoup:
    for link in soup.find_all("a"):
        if not str(link.get("href", "")).startswith(("http://", "https://")):
            link.unwrap()  # another chapter or a section: its words say which
        else:
            link["target"], link["rel"] = "_blank", "noopener"
    return soup


def blocks(notebook: NotebookNode) -> Iterator[Block]:
    """The blocks of a chapter in the order in which a reader meets them, without what slides leave out."""
    part = ""  # the title of the part of the chapter
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for block in _blocks_of_words(_of_markdown(FOLDED.sub("", cell.source))):
                if block.kind == "heading" and block.level <= 2:
                    part = _text(block.content)
                yield block
        elif cell.cell_type == "code":
            yield from _blocks_of_code(cell, shows_code=bool(re.search(r"\bThe code\b", part)))


def _blocks_of_words(soup: BeautifulSoup) -> Iterator[Block]:
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
            yield Block("table", _Table.of(node))
        elif node.name == "pre":
            yield Block("code", node.get_text())
        else:
            yield Block("words", node.decode_contents().strip())


def _blocks_of_code(cell: NotebookNode, *, shows_code: bool) -> Iterator[Block]:
    if exercise := exercise_of(cell.source):
        if exercise.stub:
            yield Block("stub", exercise.stub)
        return  # its verdict is the learner's
    hidden = cell.metadata.get("jupyter", {}).get("source_hidden", False)
    printed_source = "getsource(" in cell.source
    if shows_code and not hidden and not printed_source:
        yield from (Block("code", function) for function in _functions(cell.source))
    found = list(filter(None, (_block_of_output(output, printed_source) for output in cell.get("outputs", []))))
    # A cell draws its figure last, and speaks of it before; but an answer is not given away by its figure
    order = {"answer": 0, "question": 0, "picture": 1, "table": 2, "code": 2, "printed": 2, "claim": 3}
    yield from sorted(found, key=lambda block: order.get(block.kind, 3))


def _functions(source: str) -> list[str]:
    defined = (ast.FunctionDef, ast.ClassDef)
    found = [ast.get_source_segment(source, node) or "" for node in ast.parse(source).body if isinstance(node, defined)]
    return [function for function in found if len(function.splitlines()) <= MOST_LINES]


def _block_of_output(output: NotebookNode, printed_source: bool) -> Block | None:
    if output.output_type == "stream":
        return Block("code" if printed_source else "printed", output.text.strip("\n")) if output.text.strip() else None
    data, text = output.get("data", {}), str(output.get("data", {}).get("text/plain", ""))
    if "image/png" in data:
        return Block("picture", (picture(output), text if text.startswith("Explorer:") else ""))
    if found := PREDICTION.match(text):
        return Block("question", (found[1], *_question_and_offered(output)))
    if found := ANSWER.match(text):
        return Block("answer", (found[1], *_question_and_measured(output)))
    if is_claim(output):
        return Block("claim", claims_of(nbformat.v4.new_notebook(cells=[_with(output)]))[0])
    if "<table" in html_of(output):
        soup = _with_links_that_work(BeautifulSoup(html_of(output), "html.parser"))
        return Block("table", _Table.of(soup.find_all("table")[0], bold=_bold_cells(soup)))
    return Block("printed", text) if text and not html_of(output) else None


def _with(output: NotebookNode) -> NotebookNode:
    return nbformat.v4.new_code_cell(outputs=[output])


def _question_and_offered(output: NotebookNode) -> tuple[str, str]:
    found = re.search(r"</strong>\s*(.*?)<br>(.*)</div>", html_of(output), re.DOTALL)
    if found is None:
        raise Refused(f"a question of another form than the deck knows: {html_of(output)[:200]}")
    return found[1], found[2]


def _question_and_measured(output: NotebookNode) -> tuple[str, str]:
    found = re.search(r'<div role="status"[^>]*>(.*?)\s*<strong>Measured: (.*?)\.</strong>', html_of(output), re.DOTALL)
    if found is None:
        raise Refused(f"an answer of another form than the deck knows: {html_of(output)[:200]}")
    return found[1], found[2]


# Letters, lines and formulas


FACES = {  # family, style -> file of the font
    ("Deck Sans", 400, "normal"): HERE / "reveal" / "fonts" / "source-sans-pro-regular.woff",
    ("Deck Sans", 600, "normal"): HERE / "reveal" / "fonts" / "source-sans-pro-semibold.woff",
    ("Deck Sans", 400, "italic"): HERE / "reveal" / "fonts" / "source-sans-pro-italic.woff",
    ("Deck Signs", 400, "normal"): Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf",
    ("Deck Mono", 400, "normal"): Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf",
}


LETTERS = frozenset(  # what most chapters use: a deck has others besides only if they occur
    code for low, high in ((0x20, 0x7F), (0xA0, 0x180), (0x391, 0x3CA), (0x2010, 0x2027), (0x2070, 0x208F),
                           (0x2190, 0x2194), (0x2200, 0x2266), (0x2713, 0x2718)) for code in range(low, high)
)  # fmt: skip


@cache
def _advances(family: str, weight: int = 400) -> dict[int, float]:
    """The width of each letter of a font, in em."""
    font = TTFont(FACES[family, weight, "normal"])
    widths, em = font["hmtx"], font["head"].unitsPerEm
    return {code: widths[name][0] / em for code, name in font.getBestCmap().items()}


def _width(text: str, size: float, weight: int = 400) -> float:
    sans, signs = _advances("Deck Sans", weight), _advances("Deck Signs")
    return size * sum(sans.get(ord(letter)) or signs.get(ord(letter), 1.0) for letter in text)


def _lines(text: str, size: float, wide: float, weight: int = 400) -> int:
    """How many lines a text takes, broken at its spaces and, where a word is wider than the line, within it."""
    count, used, space = 1, 0.0, _width(" ", size, weight)
    for word in text.split():
        width = _width(word, size, weight)
        if used and used + space + width > wide:
            count, used = count + 1, 0.0
        used += width + (space if used else 0)
        count, used = count + int(used // wide), used % wide if used > wide else used
    return count


@lru_cache(maxsize=4096)
def _formula(tex: str, display: bool) -> tuple[str, str, str, float]:
    """A formula for the eye, for the notes (MathML only), its letters in a row, and its height in em."""
    shown = typeset(tex, display)
    spoken = re.sub(r"<annotation.*?</annotation>", "", re.search(r"<math.*?</math>", shown, re.DOTALL)[0])  # type: ignore[index]
    seen = shown.split('aria-hidden="true">', 1)[1]
    row = html.unescape(re.sub(r"<[^>]+>", "", seen)).replace("\u200b", "")
    row += " " * round(sum(float(gap) for gap in re.findall(r"margin-right:([\d.]+)em", seen)) * 2)
    struts = [float(height) for height in re.findall(r'strut" style="height:([\d.]+)em', seen)]
    return shown, spoken, row, max(struts, default=1.0)


def _formula_lines(tex: str, most: float) -> list[str]:
    """A formula in display, cut between its parts (``\\quad``) until no line is wider than ``most`` em."""
    if _formula_width(tex) <= most:
        return [tex]
    spaces = [found for found in re.finditer(r"\\q?quad", tex) if tex[: found.start()].count("{") ==
              tex[: found.start()].count("}") and r"\begin" not in tex]  # fmt: skip
    if not spaces:
        return [tex]
    middle = min(spaces, key=lambda found: abs(_formula_width(tex[: found.start()]) - _formula_width(tex) / 2))
    return [*_formula_lines(tex[: middle.start()], most), *_formula_lines(tex[middle.end() :], most)]


def _formula_width(tex: str) -> float:
    """About how wide a formula in display is, in em."""

    def wider(match: re.Match[str]) -> str:  # of two parts that stand one above the other
        return f"{{{max(match[1], match[2], key=lambda part: len(re.sub(r'[a-zA-Z]{3,}|[{}_^]', '', part)))}}}"

    inner = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
    flat = re.sub(rf"\\[dt]?frac{inner}{inner}", wider, re.sub(rf"\\underbrace{inner}_{inner}", wider, tex))
    return len(_formula(flat, True)[2]) * 0.6 * 1.06


def _replaced_tex(fragment: str, make: Callable[[str, bool], str]) -> str:
    def one(match: re.Match[str]) -> str:
        return make(html.unescape(match[2]), match[1] == "div")

    return re.sub(r'<(span|div) class="tex">(.*?)</\1>', one, fragment, flags=re.DOTALL)


def _typeset(fragment: str) -> str:
    # a line must not begin with the comma after a formula
    held = re.sub(r'(<span class="tex">[^<]{1,40}</span>[.,;:?!)]+)', r'<span class="held">\1</span>', fragment)
    return _replaced_tex(held, lambda tex, display: _formula(tex, display)[0])


def _spoken(fragment: str) -> str:
    return _replaced_tex(fragment, lambda tex, display: _formula(tex, display)[1])


def _text(fragment: str) -> str:
    """The words of a piece of HTML on one line, formulas as their letters."""
    plain = _replaced_tex(fragment, lambda tex, display: html.escape(_formula(tex, display)[2]))
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", plain)).split())


def _sentences(fragment: str) -> list[str]:
    """A paragraph's sentences, each with its markup: it is cut only outside of elements."""
    parts = re.findall(r"<[^>]+>|[^<]+", fragment)
    cuts, at, depth, before = [0], 0, 0, ""
    for k, part in enumerate(parts):
        if part.startswith("<"):
            depth += 0 if part.endswith("/>") or part.startswith("<br") else -1 if part.startswith("</") else 1
        elif depth == 0:
            for space in re.finditer(r"\s+", part):
                ended = before + part[: space.start()]
                following = part[space.end() :] or (parts[k + 1] if k + 1 < len(parts) else "")
                so_far = fragment[cuts[-1] : at + space.start()]
                if (
                    so_far.count("(") <= so_far.count(")")
                    and re.search(r"[.!?…][\"”’)]*$", ended)
                    and not ABBREVIATIONS.search(ended)
                    and re.match(r"[A-Z“\"(<ÀÉÖ]", following)
                ):
                    cuts.append(at + space.end())
        before = (before + ("" if part.startswith("<") else part))[-40:]
        at += len(part)
    cuts.append(at)
    return [fragment[low:high].strip() for low, high in pairwise(cuts) if fragment[low:high].strip()]


def _key(fragment: str) -> str:
    """What a slide shows of a paragraph: all if it is short, else its first sentence and what is emphasised."""
    said = [sentence for sentence in _sentences(fragment) if not POINTS_ELSEWHERE.search(_text(sentence))]
    if len(_text(" ".join(said))) <= KEPT_SHORT:
        return " ".join(said)
    kept: list[str] = []
    used = 0
    for sentence in said:
        stressed = any(" " in _text(found) for found in re.findall(r"<(?:em|strong)>(.*?)</", sentence, re.DOTALL))
        # a first sentence that is a title or a question says nothing without the next
        if used < 45 or kept[-1].endswith(("?", "?</strong>", "?</em>")) or (stressed and used <= KEPT_SHORT):
            kept.append(sentence)
            used += len(_text(sentence))
    return " ".join(kept)


def _lead(fragment: str) -> str:
    """What a slide shows of a paragraph that leads to a figure: its last sentences, without asides in brackets."""
    kept: list[str] = []
    for sentence in reversed(_sentences(fragment)):
        if POINTS_ELSEWHERE.search(_text(sentence)) or (sentence.startswith("(") and sentence.endswith(")")):
            continue
        if kept and len(_text(" ".join([sentence, *kept]))) > KEPT_SHORT:
            break
        kept.insert(0, sentence)
    return " ".join(kept)


# Code and tables


def _coloured(code: str) -> str:
    """Code with each line an element that hangs in when it is broken."""
    shown = highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
    plain = code.split("\n")
    made = []
    for k, line in enumerate(shown):
        indent = len(plain[k]) - len(plain[k].lstrip()) if k < len(plain) else 0
        made.append(f'<span class="line" style="--indent:{indent}">{line}</span>')
    return f"<pre>{''.join(made)}</pre>"


def _code_lines(code: str) -> int:
    wide = int((WIDE - 45) / (MONO * 0.6021))
    count = 0
    for line in code.split("\n"):
        rest = len(line) - wide
        hanging = len(line) - len(line.lstrip()) + 4
        count += 1 if rest <= 0 else 2 + rest // (wide - hanging - 6)
    return count


def _without_docstrings(code: str) -> str:
    """Code without docstrings (the chapter says what they say) and without empty lines in a row."""
    bare = re.sub(r'^[ \t]+r?"""(?:(?!""").)*"""[ \t]*\n', "", code, flags=re.MULTILINE | re.DOTALL)
    return textwrap.dedent(re.sub(r"\n{2,}", "\n\n", bare).strip("\n"))


Cell = tuple[str, bool, int, int]  # HTML, whether it is bold, how many rows and columns it spans


@dataclass
class _Table:
    """A table: its head, its rows, and its caption."""

    head: list[list[Cell]]
    rows: list[list[Cell]]
    caption: str = ""

    @classmethod
    def of(cls, table: Tag, bold: frozenset[str] = frozenset()) -> _Table:
        head: list[list[Cell]] = []
        rows: list[list[Cell]] = []
        for row in table.find_all("tr"):
            cells = row.find_all(["th", "td"])
            made = [
                (
                    " ".join(cell.decode_contents().split()),
                    cell.get("id", "") in bold,
                    int(str(cell.get("rowspan") or 1)),
                    int(str(cell.get("colspan") or 1)),
                )
                for cell in cells
            ]
            is_head = bool(row.find_parent("thead")) or (not rows and all(cell.name == "th" for cell in cells))
            (head if is_head else rows).append(made)
        caption = " ".join(table.caption.get_text().split()) if table.caption else ""
        # pandas names the index in a row of its own, under the columns' names
        if len(head) == 2 and not any(_text(cell[0]) for cell in head[1][1:]) and not _text(head[0][0][0]):
            head = [[head[1][0], *head[0][1:]]]
        head = [row for row in head if any(_text(cell[0]) for cell in row)]
        return cls(head, rows, caption)

    @property
    def columns(self) -> int:
        return max(sum(cell[3] for cell in row) for row in [*self.head, *self.rows])

    def upright(self) -> _Table:
        """The table, turned over where it has many columns and hardly a row."""
        spans = any(cell[2] > 1 or cell[3] > 1 for row in [*self.head, *self.rows] for cell in row)
        if spans or self.columns <= 8 or len(self.rows) > 2 or len(self.head) != 1:
            return self
        turned = [list(column) for column in zip(*self.head, *self.rows, strict=True)]
        return _Table(turned[:1], turned[1:], self.caption)

    def says(self, *first: str) -> bool:
        """Whether its first row begins with these words."""
        return [_text(cell[0]) for cell in [*self.head, *self.rows][0][: len(first)]] == list(first)


def _bold_cells(soup: BeautifulSoup) -> frozenset[str]:
    """The ids that a table of pandas prints bold."""
    style = " ".join(found.get_text() for found in soup.find_all("style"))
    rules = re.findall(r"([^{}]+)\{[^{}]*font-weight:\s*bold", style)
    return frozenset(name for rule in rules for name in re.findall(r"#(\w+)", rule))


def _columns(table: _Table, size: int) -> list[float]:
    """The width of each column: what its longest cell takes, less for those that can be broken."""
    natural, least = [0.0] * table.columns, [0.0] * table.columns
    for row in [*table.head, *table.rows]:
        if sum(cell[3] for cell in row) != table.columns or any(cell[3] > 1 for cell in row):
            continue  # of a cell that spans others, the others decide
        for k, (content, *_) in enumerate(row):
            words = _text(content)
            natural[k] = max(natural[k], _width(words, size, 600) * 1.02 + 24)
            least[k] = max([least[k], *(_width(word, size, 600) * 1.02 + 24 for word in words.split())])
    if sum(natural) <= WIDE:
        return natural
    fair = [min(width, WIDE * 0.6) for width in natural]
    spare = WIDE - sum(least)
    if spare <= 0:
        return [width * WIDE / sum(least) for width in least]
    wanted = sum(width - low for width, low in zip(fair, least, strict=True) if width > low) or 1.0
    return [low + max(0.0, width - low) * min(1.0, spare / wanted) for width, low in zip(fair, least, strict=True)]


def _row_height(row: Sequence[Cell], columns: Sequence[float], size: int, weight: int) -> float:
    at, most = 0, 1
    for content, bold, _, across in row:
        wide = sum(columns[at : at + across]) - 21
        most = max(most, _lines(_text(content), size * (1.02 if bold else 1.0), wide, 600 if bold else weight))
        at += across
    return most * size * 1.25 + 12


# Slides


Height = Callable[[float, float], float]


@dataclass
class Item:
    """What stands on a slide.

    Attributes
    ----------
    height : its pixels, by the width that it has and by the scale of the words.
    said : what is said about it, as HTML.
    leads : whether it belongs to what comes next.
    longer : the same at more length, for a slide that has the room.
    words : whether it can be enlarged, and stand in a narrow column.
    """

    html: str
    height: Height
    said: str = ""
    leads: bool = False
    longer: Item | None = None
    words: bool = True


def _high(items: Sequence[Item], wide: float = WIDE, scale: float = 1.0) -> float:
    return sum(item.height(wide, scale) for item in items)


def _fixed(height: float) -> Height:
    return lambda wide, scale: height


def _lined(fragment: str, size: float = WORDS, inset: float = 0, pad: float = 14, weight: int = 400) -> Height:
    """The height of words of a size, with ``pad`` pixels of margin below."""
    parts = [_text(part) for part in fragment.split("<br>")]

    def height(wide: float, scale: float) -> float:
        at = size * scale
        count = sum(_lines(part, at * 1.03, wide - inset * scale, weight) for part in parts)
        return count * at * 1.37 + pad * scale + 1

    return height


@dataclass
class Figure:
    """A figure on a slide: its element, and its size in pixels of the screen."""

    html: str
    width: int
    height: int

    @property
    def beside(self) -> float:
        """How wide it is with words beside it; 0 where they do better above and below."""
        shape = self.width / self.height
        return 0.0 if shape > BESIDE else min(WIDE * 0.62, 545 * shape, LARGEST * self.width)

    @property
    def tall(self) -> float:
        """How high it is where it takes all of the width that it can use."""
        return min(LARGEST, WIDE / self.width) * self.height


@dataclass
class Slide:
    """One slide. What is ``above`` and ``below`` a figure stands in a column beside it if it is not a wide one."""

    title: str
    above: list[Item] = field(default_factory=list)
    figure: Figure | None = None
    below: list[Item] = field(default_factory=list)
    kind: Literal["words", "figure", "question", "answer", "title", "part"] = "words"
    said: list[str] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """All that stands on it but its title and its figure."""
        return [*self.above, *self.below]

    @property
    def free(self) -> float:
        """The height below the title."""
        return FREE - (_lines(_text(self.title), 36, WIDE, 600) * 41.4 + 34 if self.title else 0)

    def has_room(self, item: Item) -> bool:
        """Whether an item fits."""
        items = [*self.items, item]
        if self.figure is None:
            return _high(items) <= self.free
        if self.figure.beside:
            return item.words and _high(items, WIDE - GAP - self.figure.beside, SLIM) <= self.free
        return _high(items) + min(self.figure.tall, self.free) * ROOMY <= self.free

    def html(self) -> str:
        """What is inside of the slide."""
        title = f"<h2>{_typeset(self.title)}</h2>" if self.title else ""
        above, below = _joined(self.above), _joined(self.below)
        if self.figure is None:
            below = f'<div class="fragment">{below}</div>' if self.kind == "answer" else below
            return f'{title}<div class="body" style="font-size:{WORDS * self._scale():.1f}px">{above}{below}</div>'
        if self.figure.beside and (above or below) and self.kind == "figure":
            beside = f'<div class="body" style="font-size:{WORDS * SLIM:.0f}px">{above}{below}</div>'
            figure = self.figure.html.replace("<figure>", f'<figure style="flex:0 0 {self.figure.beside:.0f}px">')
            return f'{title}<div class="beside">{beside}{figure}</div>'
        parts = [f'<div class="body">{part}</div>' if part else "" for part in (above, below)]
        return f"{title}{parts[0]}{self.figure.html}{parts[1]}"

    def _scale(self) -> float:
        if self.kind != "words":
            return 1.0
        return next((scale for scale in SCALES if _high(self.items, WIDE, scale) <= self.free * 0.94), 1.0)

    def notes(self) -> str:
        """What is said about it, as HTML."""
        return _spoken("\n".join(part for part in [*self.said, *(item.said for item in self.items)] if part))


def _joined(items: Sequence[Item]) -> str:
    made = _typeset("\n".join(item.html for item in items if item.html))
    return re.sub(r"</(ul|ol)>\s*<\1(?: start=\"\d+\")?>", "", made)


def _paragraph(fragment: str, said: str, *, leads: bool = False) -> Item:
    if not _text(fragment):
        return Item("", _fixed(0), f"<p>{said}</p>", leads)
    longer = Item(f"<p>{said}</p>", _lined(said), f"<p>{said}</p>", leads) if fragment != said else None
    return Item(f"<p>{fragment}</p>", _lined(fragment), f"<p>{said}</p>", leads, longer)


class Deck:
    """A chapter's slides, in columns: built block by block."""

    def __init__(self, chapter: Chapter, notebook: NotebookNode, guide: Guide) -> None:
        self.chapter, self.guide = chapter, guide
        self.columns: list[list[Slide]] = []
        self._pending: list[Item] = []  # of the slide that is being filled
        self._title = ""
        self._part = ""  # the title of the part, without its number
        self._said_first: list[str] = []
        self._offered: dict[str, str] = {}
        found = list(blocks(notebook))
        for k, block in enumerate(found):
            self._add(block, found[k + 1 :])
        self._flush()

    @property
    def slides(self) -> list[Slide]:
        """All slides, in order."""
        return [slide for column in self.columns for slide in column]

    # Blocks

    def _add(self, block: Block, following: Sequence[Block]) -> None:
        if self._part == "References" and block.kind in ("words", "list"):
            self._last.said.append(f"<p>{block.content}</p>" if block.kind == "words" else str(block.content))
        elif block.kind == "heading":
            self._add_heading(block, following)
        elif block.kind == "words":
            self._add_words(str(block.content), following[0].kind if following else "")
        else:
            getattr(self, f"_add_{block.kind}")(block.content)
            if block.kind == "list" and following and following[0].kind == "formula":
                self._pending[-1].leads = True

    def _add_heading(self, block: Block, following: Sequence[Block]) -> None:
        self._flush()
        words = _text(block.content)
        if block.level == 1:
            self._start_of_chapter(block.content)
            return
        self._title = block.content
        if block.level == 2:
            self._part = re.sub(r"^\d+\.\s*", "", words)
        number = re.match(r"(\d+(?:\.\d+)?)\.?\s", words)
        said = self.guide.minutes(number[1]) if number else ""
        self._said_first = [said] if said else []
        if block.level <= 3:
            self.columns.append([])
        if self._part == "References":
            shown = f"They are listed, with their addresses, at the end of <code>notebooks/{self.chapter.file}</code>."
            self._show(Slide(self._title, [Item(f"<p>{shown}</p>", _lined(shown))]))
        elif self._part == "Exercises":
            self._agenda([_title_of_exercise(one.content) for one in _until_part(following) if _is_exercise(one)])
        elif block.level == 2 and following and following[0].kind == "heading" and following[0].level == 3:
            self._agenda([one.content for one in _until_part(following) if one.kind == "heading" and one.level == 3])

    def _start_of_chapter(self, heading: str) -> None:
        found = re.match(r"(\d+) · (.*)", heading, re.DOTALL)
        number, title = (found[1], found[2]) if found else ("", heading)
        first = f'<p class="number">The Craft of Training · chapter {number}</p><h1>{title}</h1>'
        self._title, self._said_first = "", []
        self.columns.append([])
        self._show(Slide("", [Item(first, _lined(title, 54, pad=80, weight=600))], kind="title"))

    def _agenda(self, lines: Sequence[str]) -> None:
        if lines:
            many = " many" if len(lines) > 8 else ""
            listed = "".join(f"<li>{line}</li>" for line in lines)
            agenda = Item(f'<ul class="agenda{many}">{listed}</ul>', _fixed(FREE / 2), words=False)
            self._show(Slide(self._title, [agenda], kind="part"))

    def _add_words(self, content: str, following: str) -> None:
        if self._on_first and content.startswith("<em>"):  # the promise below the title
            said = f"<p>{content}</p>"
            self._last.above.append(Item(f'<p class="promise">{content}</p>', _lined(content, 28), said))
            return
        if self._on_first:
            self._title = "Before we start"
        if EXERCISE.match(content):
            self._flush()
            self._title = _title_of_exercise(content)
            task = _lettered(content.partition("</strong>")[2].strip())
            self._stack(Item(f"<p>{task}</p>", _lined(task), f"<p>{content}</p>", leads=following in ("table", "list")))
        elif self._part == "Exercises" and not POINTS_ELSEWHERE.search(_text(content)):
            task = _lettered(content)
            self._stack(Item(f"<p>{task}</p>", _lined(task), f"<p>{content}</p>"))
        elif self._part == "Exercises":
            self._last.said.append(f"<p>{content}</p>")
        elif self._part == "What we showed":
            self._stack(_paragraph(content, content))
        elif following in ("formula", "picture", "table", "list", "code", "printed"):
            whole = following in ("formula", "list") and len(_text(content)) <= KEPT_SHORT
            self._stack(_paragraph(content if whole else _lead(content), content, leads=True))
        else:
            self._attach(_paragraph(_key(content), content))

    def _add_list(self, content: Tag) -> None:
        if self._on_first:
            self._title = "Before we start"
        items = content.find_all("li", recursive=False)
        tag, start = content.name, int(str(content.get("start") or 1))
        whole = len(_text(str(content))) <= 900 or self._part == "Exercises"
        for k, item in enumerate(items):
            inner = item.decode_contents().strip()
            if "<ul" not in inner and "<ol" not in inner:
                inner = re.sub(r"</?p>", " ", inner).strip()
            opening = f'<ol start="{start + k}">' if tag == "ol" else "<ul>"
            said = f"{opening}<li>{inner}</li></{tag}>"
            shown = inner if whole else _key(inner)
            longer = Item(said, _lined(inner, inset=30, pad=12), said, k == 0) if shown != inner else None
            height = _lined(shown, inset=30, pad=12)
            self._stack(Item(f"{opening}<li>{shown}</li></{tag}>", height, said, k == 0, longer))

    def _add_formula(self, tex: str) -> None:
        size = 31 / WORDS  # in em of the words
        lines = _formula_lines(tex, WIDE / (WORDS * size))
        widest = max(map(_formula_width, lines)) * WORDS
        size = min(size, max(20 / WORDS, WIDE / widest))
        tall = sum(_formula(line, True)[3] * 1.06 * size * WORDS + 26 for line in lines)

        def height(wide: float, scale: float) -> float:
            return tall * scale if widest * size * scale <= wide else float("inf")

        shown = "".join(
            f'<div class="formula" style="font-size:{size:.3f}em"><div class="tex">{html.escape(line)}</div></div>'
            for line in lines
        )
        said = "".join(f"<p>{_formula(line, True)[1]}</p>" for line in lines)
        high = height if widest * size <= WIDE else _fixed(tall)
        self._stack(Item(shown, high, said))

    def _add_picture(self, content: tuple[Any, str]) -> None:
        shown, explorer = content
        enlarged = min(LARGEST, WIDE / shown.width)
        data = base64.b64encode(shown.png).decode()
        image = (
            f'<img src="data:image/png;base64,{data}" alt="{html.escape(shown.alt, quote=True)}" '
            f'style="max-width:{shown.width * enlarged:.0f}px;max-height:{shown.height * enlarged:.0f}px">'
        )
        figure = Figure(f"<figure>{image}</figure>", shown.width, shown.height)
        if self._on_first:
            self._last.figure = figure
            return
        slide = Slide(self._title, figure=figure, kind="figure")
        wide, scale, most = float(WIDE), 1.0, float(LEADING)
        if figure.beside:
            wide, scale = WIDE - GAP - figure.beside, SLIM
            most = slide.free if self._part == "Exercises" else LEADING * 2
        while self._pending:
            run = _last_run(self._pending)  # a list is not torn apart
            if not all(item.words for item in run) or _high([*run, *slide.above], wide, scale) > most:
                break
            slide.above[:0] = run
            del self._pending[-len(run) :]
        self._flush()
        if explorer:
            names = re.findall(r"(?:Explorer: |; )([^=;()]+?) = ", explorer)
            words = html.escape(f"In the notebook this figure moves: {', '.join(names)}.")
            slide.below.append(Item(f'<p class="hint">{words}</p>', _lined(words, 22)))
        self._show(slide)

    def _add_table(self, table: _Table) -> None:
        if table.says("time to read"):
            self.columns[0][0].said.append(_table_html(table, table.rows, [], 16))
        elif table.says("exercise", "title", "state"):
            return  # the learner's own progress
        elif table.says("claim", "condition", "measured"):
            for claim, condition, measured in ([cell[0] for cell in row] for row in table.rows):
                self._stack(_claim_item(_text(claim), True, f"{condition} · {measured}"))
        else:
            leading = _high([item for item in self._pending if item.leads])
            items = _table_items(table.upright(), Slide(self._title).free, leading)
            for item in items:
                self._attach(item) if len(items) == 1 else self._stack(item)

    def _add_question(self, content: tuple[str, str, str]) -> None:
        self._flush()
        key, question, offered = content
        self._offered[key] = offered
        long = " long" if len(_text(question)) > 130 else ""
        items = [
            Item(f'<p class="badge">Predict {key}</p>', _fixed(50), words=False),
            Item(f'<p class="asked{long}">{question}</p>', _fixed(150)),
            Item(_options(offered, large=True), _fixed(150), self.guide.question(key)),
        ]
        self._show(Slide(self._title, items, kind="question"))

    def _add_answer(self, content: tuple[str, str, str]) -> None:
        self._flush()
        key, question, measured = content
        long = " long" if len(_text(measured)) > 60 else ""
        offered = self._offered.get(key, "")
        rows = _lines(_text(offered) + " m" * 4 * offered.count(" / "), 26, WIDE - 40)
        above = [
            Item(f'<p class="badge">Answer to {key}</p>', _fixed(52), words=False),
            Item(f'<p class="asked">{question}</p>', _lined(question, WORDS, pad=30)),
            Item(_options(offered, large=False), _fixed(rows * 58 + 22)),
        ]
        big = f'<p class="measured{long}"><small>Measured</small> {measured}</p>'
        below = [Item(big, _lined(measured, 32 if long else 44, pad=60, weight=600))]
        self._show(Slide(self._title, above, below=below, kind="answer"))

    def _add_claim(self, claim: Any) -> None:
        sentence, condition, figures = map(html.unescape, (claim.sentence, claim.condition, claim.figures))
        self._attach(_claim_item(_text(sentence), claim.holds, f"{html.escape(figures)}; {html.escape(condition)}"))

    def _add_code(self, code: str) -> None:
        for piece in filter(str.strip, _pieces(_without_docstrings(code))):
            self._stack(_code_item(piece))

    def _add_stub(self, code: str) -> None:
        item = _code_item(code)
        alone = not self._pending and not self._last.has_room(item)
        if len(code.splitlines()) <= MOST_LINES and ("def " in code or not alone):  # a name to fill in needs no slide
            self._attach(item)

    def _add_printed(self, text: str) -> None:
        if "tuning included" in text:  # of a recorded study: when and where it ran
            self._pending.append(Item("", _fixed(0), f"<p>{html.escape(text)}</p>"))
        elif _code_lines(text) <= MOST_LINES:
            self._attach(_code_item(text, coloured=False))

    # Where a block goes

    @property
    def _last(self) -> Slide:
        return self.columns[-1][-1]

    @property
    def _on_first(self) -> bool:
        """Whether nothing came yet but the title and what is said about the chapter."""
        return len(self.columns) == 1 and len(self.columns[0]) == 1 and not self._pending and self._title == ""

    def _stack(self, item: Item) -> None:
        """Put an item on the slide that is being filled; what leads to it goes with it to the next where it must."""
        full = not Slide(self._title, self._pending).has_room(item)
        if full and any(one.html for one in self._pending):
            carried: list[Item] = []
            while self._pending and self._pending[-1].leads:
                carried.insert(0, self._pending.pop())
            self._flush()
            self._pending = carried
            if not Slide(self._title, carried).has_room(item):
                self._flush()
        self._pending.append(item)

    def _attach(self, item: Item) -> None:
        """Put an item below the last figure or answer if it fits there."""
        last = self._last if self.columns and self.columns[-1] else None
        goes_on = last and not self._pending and last.kind in ("figure", "answer") and last.title == self._title
        if last and goes_on and last.has_room(item):
            last.below.append(item)
        else:
            self._stack(item)

    def _flush(self) -> None:
        if any(item.html for item in self._pending):
            slide = Slide(self._title, self._pending)
            for k, item in enumerate(slide.above):  # a slide with a lone sentence does better with the paragraph
                with_it = [*slide.above[:k], item.longer or item, *slide.above[k + 1 :]]
                if _high(with_it) <= slide.free * 0.5:
                    slide.above = with_it
            self._show(slide)
        elif self._pending and self.columns and self.columns[-1]:
            self._last.said += [item.said for item in self._pending]
        elif self._pending:
            self._said_first += [item.said for item in self._pending]
        self._pending = []

    def _show(self, slide: Slide) -> None:
        slide.said = [*self._said_first, *slide.said]
        self._said_first = []
        self.columns[-1].append(slide)


def _until_part(following: Sequence[Block]) -> Iterator[Block]:
    for block in following:
        if block.kind == "heading" and block.level <= 2:
            return
        yield block


def _is_exercise(block: Block) -> bool:
    return block.kind == "words" and bool(EXERCISE.match(block.content))


def _title_of_exercise(content: str) -> str:
    return re.sub(r"^<strong>", "", str(content).partition("</strong>")[0]).rstrip(".: ")


def _lettered(task: str) -> str:
    """A task with each of its choices, a) to d), on a line of its own."""
    return re.sub(r"\s(?=[a-h]\)\s)", "<br>", task) if re.search(r"\ba\) .* b\) ", task, re.DOTALL) else task


def _last_run(items: Sequence[Item]) -> list[Item]:
    """The last item, with all others of its list and what leads to it."""
    count = 1
    while count < len(items):
        before, tag = items[-count - 1], items[-count].html[:3]
        if not before.leads and not (tag in ("<ul", "<ol") and before.html.startswith(tag)):
            break
        count += 1
    return list(items[-count:])


def _options(offered: str, *, large: bool) -> str:
    """What may be answered: a row or a column of choices, or a sentence."""
    choices = offered.removeprefix("order these: ").split(" / ")
    if len(choices) == 1:
        return f'<p class="range">{offered[:1].upper()}{offered[1:]}.</p>' if offered else ""
    order = offered.startswith("order these: ")
    named = [one if order else f"<strong>{chr(ord('A') + k)}</strong>&ensp;{one}" for k, one in enumerate(choices)]
    kind = " column" if large and len(choices) <= 5 and not order else " many" if not large or len(choices) > 8 else ""
    head = '<p class="range">Put these in order.</p>' if order else ""
    return f'{head}<ul class="options{kind}">{"".join(f"<li>{one}</li>" for one in named)}</ul>'


def _claim_item(sentence: str, holds: bool, proof: str) -> Item:
    mark, kind = ("✓", "claim") if holds else ("✗", "claim fails")
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(sentence))
    shown = f'<div class="{kind}"><span class="mark">{mark}</span><span>{words}</span></div>'
    return Item(shown, _lined(words, WORDS * 0.9, inset=75, pad=26), f"<p>{mark} {words} ({proof})</p>")


def _code_item(code: str, *, coloured: bool = True) -> Item:
    lines = _code_lines(code)
    longest = max(map(len, code.split("\n")))
    size = next((one for one in (24, 22) if longest * one * 0.6021 < WIDE - 45 and lines * one * 1.3 < FREE / 2), MONO)
    shown = _coloured(code) if coloured else f"<pre>{html.escape(code)}</pre>"
    shown = shown.replace("<pre>", f'<pre style="font-size:{size}px">', 1)
    return Item(shown, _fixed(lines * size * 1.3 + 40), words=False)


def _pieces(code: str) -> list[str]:
    """Code in pieces that fit on a slide each, cut at empty lines where there are any."""
    most = int((FREE - 130) / (MONO * 1.3))
    pieces: list[list[str]] = [[]]
    for line in code.split("\n"):
        if _code_lines("\n".join([*pieces[-1], line])) > most:
            empty = [k for k, one in enumerate(pieces[-1]) if not one.strip() and k > most // 3]
            cut = empty[-1] if empty else len(pieces[-1])
            pieces[-1:] = [pieces[-1][:cut], pieces[-1][cut:]]
        pieces[-1].append(line)
    return ["\n".join(piece).strip("\n") for piece in pieces]


def _table_items(table: _Table, room: float, lead: float) -> list[Item]:
    """A table as large as it can be, in as many parts as it needs; a very long one is cut, and says so."""

    def heights(size: int) -> tuple[list[float], float, list[float]]:
        columns = _columns(table, size)
        fixed = sum(_row_height(row, columns, size, 600) for row in table.head) + 20
        fixed += _lines(table.caption, 20.5, max(sum(columns), 1)) * 25 + 8 if table.caption else 0
        return columns, fixed, [_row_height(row, columns, size, 400) for row in table.rows]

    for size in TABLE_SIZES:
        columns, fixed, rows = heights(size)
        if fixed + sum(rows) + lead <= room:
            return [Item(_table_html(table, table.rows, columns, size), _fixed(fixed + sum(rows)), words=False)]
    # It is cut in any case: then its letters need not be the smallest
    size = next((one for one in TABLE_SIZES[2:] if sum(heights(one)[2]) < MOST_OF_A_TABLE * (room - 130)), 18)
    columns, fixed, rows = heights(size)
    count = min(MOST_OF_A_TABLE, -(-int(sum(rows)) // int(room - fixed - 34)))
    if count * room < (fixed + sum(rows)) / 5:  # a few of very many rows are no table: an example
        count = 1
    made, at = [], 0
    for part in range(count):
        used, start = fixed + (lead if part == 0 else 0), at
        last = part == count - 1
        most = room - 34 if last else min(room - 34, fixed + sum(rows[at:]) / (count - part) + max(rows))
        while at < len(rows) and (at == start or used + rows[at] <= most):
            used, at = used + rows[at], at + 1
        text = _table_html(table, table.rows[start:at], columns, size)
        if last and at < len(rows):
            text += f'<p class="hint">{at} of {len(rows)} rows; the notebook has all.</p>'
        made.append(Item(text, _fixed(used + 34 - (lead if part == 0 else 0)), words=False))
    return made


def _table_html(table: _Table, rows: Sequence[Any], columns: Sequence[float], size: int) -> str:
    wordy = [k for k in range(table.columns) if k == 0 or _is_wordy(table, k)]

    def cells(row: Sequence[Cell], tag: str, scope: str) -> str:
        made = []
        for k, (content, bold, down, across) in enumerate(row):
            spans = (f' rowspan="{down}"' if down > 1 else "") + (f' colspan="{across}"' if across > 1 else "")
            left = ' class="left"' if k in wordy and across == 1 and len(row) == table.columns else ""
            inner = f"<strong>{content}</strong>" if bold else content
            name = "th" if tag == "th" or k == 0 else tag
            scoped = f' scope="{scope if tag == "th" else "row"}"' if name == "th" else ""
            made.append(f"<{name}{scoped}{spans}{left}>{inner}</{name}>")
        return f"<tr>{''.join(made)}</tr>"

    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    widths = "".join(f'<col style="width:{width:.0f}px">' for width in columns)
    head = "".join(cells(row, "th", "col") for row in table.head)
    body = "".join(cells(row, "td", "") for row in rows)
    style = f' style="font-size:{size}px;width:{sum(columns):.0f}px"' if columns else ""
    return (
        f"<table{style}>{caption}<colgroup>{widths}</colgroup>"
        f"{f'<thead>{head}</thead>' if head else ''}<tbody>{body}</tbody></table>"
    )


def _is_wordy(table: _Table, column: int) -> bool:
    """Whether a column holds words rather than numbers."""
    found = [_text(row[column][0]) for row in table.rows if len(row) == table.columns]
    return sum(bool(re.match(r"[A-Za-z“(‘…]", text)) for text in found) > len(found) / 2


# What the instructor's guide says of a section and of a question


class Guide:
    """The minutes of a chapter's plan by section, and its advice on each question, as HTML."""

    def __init__(self, text: str) -> None:
        self._plan: dict[str, list[str]] = {}
        self._advice: dict[str, str] = {}
        part = ""
        head: list[str] = []
        for line in text.splitlines():
            if line.startswith("## "):
                part, head = line.removeprefix("## "), []
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
            if cells and not head:
                head = cells
            elif part == "Plan" and len(cells) == 6:
                self._add_plan(head, cells)
            elif part == "The questions to ask":
                self._add_advice(head, cells, line)

    def _add_plan(self, head: Sequence[str], cells: Sequence[str]) -> None:
        *_, what, section, how = cells
        sections = re.findall(r"\[(\d+(?:\.\d+)?)", section)
        times = "; ".join(f"{plan}: {cells[k]}" for k, plan in enumerate(head[:3]) if cells[k] not in ("–", ""))
        together = f", with {', '.join(sections[1:])}" if len(sections) > 1 else ""
        words = f"Minutes (in a plan of {times}){together}: {what}; {how}."
        for number in sections[:1]:
            self._plan.setdefault(number, []).append(f"<p><strong>{html.escape(words)}</strong></p>")

    def _add_advice(self, head: Sequence[str], cells: Sequence[str], line: str) -> None:
        if cells and (found := re.match(r"\d\d\.[a-z]", cells[0])):
            said = "; ".join(f"{name}: {cell}" for name, cell in zip(head[1:], cells[1:], strict=False))
            self._advice[found[0]] = f"<p><strong>{html.escape(said[:1].upper() + said[1:])}</strong></p>"
        elif found := re.match(r"- \*\*(\d\d\.[a-z])[^*]*\*\*\s*(.*)", line):
            self._advice[found[1]] = f"<p><strong>{html.escape(found[2].replace('*', ''))}</strong></p>"

    def minutes(self, section: str) -> str:
        """The minutes of a section, as the plan names it; empty where it does not."""
        return "".join(self._plan.get(section, []))

    def question(self, key: str) -> str:
        """The advice on a question; empty where there is none."""
        return self._advice.get(key, "")


# The file


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
    read = {name: (HERE / name).read_text(encoding="utf-8") for name in ("deck.html", "deck.css")}
    reveal = {name: (HERE / "reveal" / name).read_text(encoding="utf-8") for name in
              ("reveal.css", "reveal.js", "notes.js")}  # fmt: skip
    letters = html.unescape(re.sub(r"<[^>]+>", "", " ".join(one["html"] for column in columns for one in column)))
    return jinja2.Template(read["deck.html"], trim_blocks=True).render(
        title=html.escape(f"{deck.chapter.number} · {deck.chapter.title}: slides"),
        columns=columns,
        fonts=_font_faces(LETTERS | {ord(letter) for letter in letters}),
        katex_css=_katex_css(),
        deck_css=read["deck.css"],
        reveal_css=reveal["reveal.css"],
        reveal_js=reveal["reveal.js"],
        notes_js=reveal["notes.js"],
    )


@cache
def _font_faces(letters: frozenset[int]) -> str:
    """The fonts, cut to the letters that occur, under names of their own as their licence asks."""
    rules = []
    for (family, weight, style), path in FACES.items():
        font = TTFont(path, recalcTimestamp=False)
        options = subset.Options(notdef_outline=True, layout_features=["kern", "tnum"], name_IDs=[0, 13, 14])
        options.drop_tables += ["FFTM", "webf"]
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=sorted(letters))
        cutter.subset(font)
        font.flavor, stream = "woff", io.BytesIO()
        font.save(stream)
        data = base64.b64encode(stream.getvalue()).decode()
        rules.append(
            f'@font-face{{font-family:"{family}";font-weight:{weight};font-style:{style};'
            f'src:url(data:font/woff;base64,{data}) format("woff")}}'
        )
    return "\n".join(rules)


@cache
def _katex_css() -> str:
    def inlined(match: re.Match[str]) -> str:
        return f"url(data:font/woff2;base64,{base64.b64encode((KATEX / match[1]).read_bytes()).decode()})"

    return re.sub(r"url\((fonts/[^)]+)\)", inlined, (KATEX / "katex.min.css").read_text(encoding="utf-8"))


def write(number: str, folder: Path) -> Path:
    """Write a chapter's deck into a folder; its path."""
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
    usual = ["/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"]
    for name in (*BROWSERS, *usual):
        if found := shutil.which(name):
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


def main(arguments: list[str] | None = None) -> int:
    """Write what the command line asks for: 0 if done, 2 if it cannot be."""
    parser = argparse.ArgumentParser(description="Write a chapter's slides.")
    parser.add_argument("chapter", help="a chapter's number, such as 02, or all")
    parser.add_argument("--out", type=Path, default=Path("class") / "slides", help="the folder for the decks")
    parser.add_argument("--pdf", action="store_true", help="print it as well (needs Chromium or Chrome)")
    given = parser.parse_args(arguments)
    numbers = [chapter.nn for chapter in CHAPTERS] if given.chapter == "all" else [given.chapter]
    try:
        if given.pdf:
            browser()  # before anything is written
        for number in numbers:
            path = write(number, given.out)
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MB", flush=True)
            if given.pdf:
                print(write_pdf(path), flush=True)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
