"""When two outputs of the same cell agree: words exactly, numbers within a tolerance.

Used by ``figures.py`` (words and data of figures) and ``nbval_plugin.py`` (printed text and tables). A tolerance of
``None`` stands for measured times and memory: every number only has to be finite.
"""

import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import numpy as np

# One per cent of the value. Training the same network with other CPU kernels or another number of threads moves a
# learning curve by less than that; a wrong method, another seed or another learning rate moves it by more.
TOLERANCE = 0.01

# A number that stands by itself: not the 2 of conv2d, not a colour (#0072B2), not a version (2.13.0).
_NUMBER = (
    r"(?<![\w.#])[-+−]?(?>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?>(?:[eE][-+−]?\d+)?)(?!\.\d)"
    r"|(?<!\w)[-+−]?(?:nan|NaN|inf)(?!\w)"
)
_NUMBER_PATTERN = re.compile(_NUMBER)
# A time may be printed in µs on one machine and in ms on another.
_MEASURED_PATTERN = re.compile(rf"(?:{_NUMBER})(?:\s?(?:ns|µs|μs|us|ms|s|min|h|B|kB|KB|MB|GB|KiB|MiB|GiB)(?!\w))?")
_VOLATILE = (
    (re.compile(r"\x1b\[[0-9;]*[A-Za-z]"), ""),  # terminal colours
    (re.compile(r"\b0x[0-9a-fA-F]{6,}\b"), "0x…"),  # memory addresses
    (re.compile(r"\b[0-9a-f]{32}\b"), "…"),  # ids of widget models
    (re.compile(r"([-=─━_.])\1{3,}"), r"\1\1\1"),  # rules as wide as the numbers above them
)


def pack(values: Any) -> str:
    """A column of numbers as a string: ``"0.91 0.934 nan"``, or ``"0:29:30"`` where they are evenly spaced."""
    array: np.ndarray = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan).ravel()
    rounded = np.array([float(f"{value:.4g}") for value in array])
    if len(array) > 3 and np.isfinite(array).all() and array[0] != array[-1]:
        even = np.linspace(rounded[0], rounded[-1], len(array))
        if np.abs(even - array).max() <= 1e-4 * abs(array[-1] - array[0]):
            return f"{rounded[0]:g}:{rounded[-1]:g}:{len(array)}"
    return " ".join(f"{value:.4g}" for value in array)


def unpack(column: str) -> np.ndarray:
    """The numbers that ``pack`` stored, ``[N]``."""
    if ":" in column:
        first, last, count = column.split(":")
        return np.linspace(float(first), float(last), int(count))
    return np.array([float(value) for value in column.split()])


@dataclass(frozen=True)
class _Token:
    """A number of a text and the words before it."""

    words: str
    number: str  # "" at the end of the text
    line: int
    start: int


def _tokens(text: str, pattern: re.Pattern[str]) -> list[_Token]:
    tokens, end = [], 0
    for match in pattern.finditer(text):
        words = " ".join(text[end : match.start()].split())
        tokens.append(_Token(words, match.group(), text.count("\n", 0, match.start()), match.start()))
        end = match.end()
    rest = " ".join(text[end:].split())
    return [*tokens, _Token(rest, "", text.count("\n", 0, end + 1), end)]


def _value(number: str) -> float:
    match = _NUMBER_PATTERN.match(number)
    return float(match.group().replace(",", "").replace("−", "-")) if match else math.nan


def _last_digit(number: str) -> float:
    """What one unit of the last printed decimal is worth; 0 for an integer, which is a count and not rounded."""
    mantissa, _, exponent = number.lower().replace("−", "-").partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0


def _number_difference(stored: str, fresh: str, tolerance: float | None, scale: float) -> str | None:
    a, b = _value(stored), _value(fresh)
    if tolerance is None:
        return None if math.isfinite(b) else f"{fresh} is not finite"
    if not (math.isfinite(a) and math.isfinite(b)):
        same = a == b or (math.isnan(a) and math.isnan(b))
        return None if same else f"{fresh}, stored {stored}"
    allowed = tolerance * max(abs(a), scale)
    # Values that agree may still be rounded to neighbouring decimals. A number of one digit (0.001) is taken as exact,
    # as learning rates are; zero is what rounding made of something small.
    last = max(_last_digit(stored), _last_digit(fresh))
    if last <= 0.1 * abs(a) * (1 + 1e-9) or 0 in (a, b):
        allowed += last
    return None if abs(a - b) <= allowed * (1 + 1e-9) else f"{fresh}, stored {stored}, tolerance {allowed:.2g}"


def _scale(text: str, tolerance: float | None) -> float:
    """The number that a cell's own tolerance refers to: the largest decimal of the line.

    A difference between two accuracies lies about zero, and a share of zero would be no tolerance at all. Without a
    tag each number is measured by itself, so that a learning rate is not measured by the accuracy beside it.
    """
    if tolerance is None or tolerance <= TOLERANCE:
        return 0.0
    decimals = [match.group() for match in _NUMBER_PATTERN.finditer(text) if _last_digit(match.group())]
    return max((abs(value) for value in map(_value, decimals) if math.isfinite(value)), default=0.0)


def _clean(text: str) -> str:
    for pattern, replacement in _VOLATILE:
        text = pattern.sub(replacement, text)
    return text


def without_numbers(text: str) -> str:
    """The words of a text, with a mark where each number stood."""
    return _NUMBER_PATTERN.sub("#", text)


def shorten(text: str, width: int = 80) -> str:
    """One line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def text_differences(
    stored: str, fresh: str, tolerance: float | None = TOLERANCE, *, row: str | None = None
) -> list[str]:
    """What differs between two texts: words exactly (white space aside), numbers within ``tolerance``.

    ``row`` is the whole row of a table that a cell's text stands in.
    """
    stored, fresh = _clean(stored), _clean(fresh)
    pattern = _MEASURED_PATTERN if tolerance is None else _NUMBER_PATTERN
    old, new = _tokens(stored, pattern), _tokens(fresh, pattern)
    stored_lines, fresh_lines = [[*text.splitlines(), ""] for text in (stored, fresh)]
    several = len(fresh_lines) > 2
    found = []
    for a, b in zip(old, new, strict=False):
        if a.words != b.words or bool(a.number) != bool(b.number):
            # The words before a number may begin on an earlier line: show the first line that reads otherwise.
            pairs = zip(stored_lines, fresh_lines, strict=False)
            words = [[pattern.sub("0", " ".join(line.split())) for line in pair] for pair in pairs]
            line = next((i for i, (x, y) in enumerate(words) if x != y), min(a.line, b.line, len(words) - 1))
            where = f"line {line + 1} reads" if several else "reads"
            found.append(f"{where} '{shorten(fresh_lines[line])}', stored '{shorten(stored_lines[line])}'")
            break
        if not b.number:
            continue
        scale = _scale(stored_lines[a.line] if row is None else row, tolerance)
        problem = _number_difference(a.number, b.number, tolerance, scale)
        if problem:
            context = shorten(fresh_lines[b.line], 60)
            where = (f"line {b.line + 1}, " if several else "") + (f"'{context}': " if context != b.number else "")
            found.append(where + problem)
    return found


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, ...]
    heading: bool


class _HtmlReader(HTMLParser):
    """Reads HTML as rows of cells; a line outside a table is a row of one cell. Styles and ids are left out."""

    _BLOCKS = frozenset(
        ("p", "div", "br", "li", "h1", "h2", "h3", "h4", "table", "caption", "summary", "details", "pre", "tr")
    )
    _SILENT = frozenset(("style", "script"))
    _PICTURES = frozenset(("svg", "canvas", "video"))

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[_Row] = []
        self.pictures = 0
        self._cells: list[str] = []
        self._heading = False
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self._SILENT
        self.pictures += tag in self._PICTURES or (tag == "img" and (dict(attrs).get("src") or "").startswith("data:"))
        if tag in self._BLOCKS:
            self.flush()
            self._heading = tag == "tr"
        if tag in ("td", "th"):
            self._heading = self._heading and tag == "th"
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._silent -= tag in self._SILENT
        if tag in self._BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if self._silent == 0 and (self._cells or data.strip()):
            self._cells = [*self._cells[:-1], (self._cells[-1] if self._cells else "") + data]

    def flush(self) -> None:
        cells = tuple(" ".join(cell.split()) for cell in self._cells)
        if any(cells):
            self.rows.append(_Row(cells, self._heading and len(cells) > 1))
        self._cells = []


def _read_html(html: str) -> _HtmlReader:
    reader = _HtmlReader()
    reader.feed(html)
    reader.close()
    reader.flush()
    return reader


def html_pictures(html: str) -> int:
    """How many pictures are drawn inside a piece of HTML, where no data can stand beside them."""
    return _read_html(html).pictures


def html_differences(stored: str, fresh: str, tolerance: float | None = TOLERANCE) -> list[str]:
    """What differs between two pieces of HTML, table cell by table cell; styles, ids and colours do not count."""
    old, new = _read_html(stored).rows, _read_html(fresh).rows
    if [len(row.cells) for row in old] != [len(row.cells) for row in new]:
        if len(old) != len(new):
            changed = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a.cells[0] != b.cells[0]), -1)
            first = f", the first other one begins with '{shorten(new[changed].cells[0], 40)}'" if new else ""
            return [f"{len(new)} rows, stored {len(old)}{first}"]
        row = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if len(a.cells) != len(b.cells))
        return [f"row {row + 1} has {len(new[row].cells)} columns, stored {len(old[row].cells)}"]
    found: list[str] = []
    heading: tuple[str, ...] = ()
    for number, (a, b) in enumerate(zip(old, new, strict=True), start=1):
        heading = a.cells if a.heading else heading
        for column, (x, y) in enumerate(zip(a.cells, b.cells, strict=True)):
            where = ""
            if len(a.cells) > 1:
                row_name = f"'{shorten(a.cells[0], 40)}'" if a.cells[0] else str(number)
                named = len(heading) == len(a.cells) and heading[column] and not a.heading
                where = f"row {row_name}, column {repr(heading[column]) if named else column + 1}: "
            for problem in text_differences(x, y, tolerance, row=" ".join(a.cells)):
                # In a cell the number is its own context.
                found.append(where + (problem.removeprefix(f"'{shorten(y, 60)}': ") if where else problem))
    return found
