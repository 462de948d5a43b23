"""Tables: read from HTML, measured, and put on as many slides as they need."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from bs4 import BeautifulSoup
from bs4.element import Tag

from classroom.slides.letters import lines, width
from classroom.slides.slide import WIDE, Item, fixed
from classroom.slides.words import plain

SIZES = (28, 26, 24, 22, 20, 18)  # of letters
BOLD, BOLDER = 600, 1.02  # the weight of what is bold, and how much wider than counted it may be
MOST_SLIDES = 2
HINT = 34  # pixels of the line that says that a table was cut


class Cell(NamedTuple):
    """A cell: its HTML, whether it is bold, how many rows and columns it spans."""

    html: str
    bold: bool = False
    down: int = 1
    across: int = 1


Row = list[Cell]


@dataclass
class Table:
    """A table: the rows of its head, those below, and its caption."""

    head: list[Row]
    rows: list[Row]
    caption: str = ""

    @classmethod
    def of(cls, table: Tag, bold: frozenset[str] = frozenset()) -> Self:
        """Read an element; ``bold`` are the ids of the cells that its style sheet prints bold."""
        head: list[Row] = []
        rows: list[Row] = []
        for row in table.find_all("tr"):
            cells = row.find_all(["th", "td"])
            is_head = bool(row.find_parent("thead")) or (not rows and all(cell.name == "th" for cell in cells))
            (head if is_head else rows).append([_cell(cell, bold) for cell in cells])
        caption = " ".join(table.caption.get_text().split()) if table.caption else ""
        # pandas names the index in a row of its own, under the columns' names
        if len(head) == 2 and not any(plain(cell.html) for cell in head[1][1:]) and not plain(head[0][0].html):
            head = [[head[1][0], *head[0][1:]]]
        head = [row for row in head if any(plain(cell.html) for cell in row)]
        return cls(head, rows, caption)

    @property
    def columns(self) -> int:
        """How many there are."""
        return max(_columns(row) for row in self.all_rows)

    @property
    def all_rows(self) -> list[Row]:
        """Those of the head too."""
        return [*self.head, *self.rows]

    def says(self, *first: str) -> bool:
        """Whether its first row begins with these words."""
        return [plain(cell.html) for cell in self.all_rows[0][: len(first)]] == list(first)

    def upright(self) -> "Table":
        """The table, turned over where it has many columns and hardly a row."""
        spans = any(cell.down > 1 or cell.across > 1 for row in self.all_rows for cell in row)
        if spans or self.columns <= 8 or len(self.rows) > 2 or len(self.head) != 1:
            return self
        turned = [list(column) for column in zip(*self.all_rows, strict=True)]
        return Table(turned[:1], turned[1:], self.caption)


def bold_cells(soup: BeautifulSoup) -> frozenset[str]:
    """The ids that a table of pandas prints bold."""
    style = " ".join(found.get_text() for found in soup.find_all("style"))
    rules = re.findall(r"([^{}]+)\{[^{}]*font-weight:\s*bold", style)
    return frozenset(name for rule in rules for name in re.findall(r"#(\w+)", rule))


def _cell(cell: Tag, bold: frozenset[str]) -> Cell:
    down, across = (int(str(cell.get(name) or 1)) for name in ("rowspan", "colspan"))
    return Cell(" ".join(cell.decode_contents().split()), cell.get("id", "") in bold, down, across)


def _columns(row: Sequence[Cell]) -> int:
    return sum(cell.across for cell in row)


# How large it is


class _Measured(NamedTuple):
    """The widths of a table's columns, the height of its caption and head, and the heights of its rows."""

    widths: list[float]
    head: float
    rows: list[float]


def _measured(table: Table, size: int) -> _Measured:
    widths = _widths(table, size)
    head = sum(_row_height(row, widths, size, BOLD) for row in table.head) + 20  # and the table's margins
    head += lines(table.caption, 20.5, max(sum(widths), 1)) * 25 + 8 if table.caption else 0
    return _Measured(widths, head, [_row_height(row, widths, size, 400) for row in table.rows])


def _widths(table: Table, size: int) -> list[float]:
    """The width of each column: what its longest cell takes, less for those that can be broken."""

    def taken(text: str) -> float:
        return width(text, size, BOLD) * BOLDER + 24  # and the cell's margins

    natural, least = [0.0] * table.columns, [0.0] * table.columns
    for row in table.all_rows:
        if _columns(row) != table.columns or any(cell.across > 1 for cell in row):
            continue  # of a cell that spans others, the others decide
        for k, cell in enumerate(row):
            words = plain(cell.html)
            natural[k] = max(natural[k], taken(words))
            least[k] = max([least[k], *map(taken, words.split())])
    if sum(natural) <= WIDE:
        return natural
    spare = WIDE - sum(least)
    if spare <= 0:
        return [low * WIDE / sum(least) for low in least]
    more = [max(0.0, min(wide, WIDE * 0.6) - low) for wide, low in zip(natural, least, strict=True)]
    share = min(1.0, spare / (sum(more) or 1.0))
    return [low + rest * share for low, rest in zip(least, more, strict=True)]


def _row_height(row: Sequence[Cell], widths: Sequence[float], size: int, weight: int) -> float:
    at, most = 0, 1
    for cell in row:
        wide = sum(widths[at : at + cell.across]) - 21
        larger, heavier = (BOLDER, BOLD) if cell.bold else (1.0, weight)
        most = max(most, lines(plain(cell.html), size * larger, wide, heavier))
        at += cell.across
    return most * size * 1.25 + 12


# How it stands on slides


def table_items(table: Table, room: float, lead: float) -> list[Item]:
    """A table as large as it can be, in as many parts as it needs; a very long one is cut, and says so.

    Parameters
    ----------
    room : the height of a slide.
    lead : what of it the words that lead to the table take, on the first one.
    """
    for size in SIZES:
        widths, head, rows = _measured(table, size)
        if head + sum(rows) + lead <= room:
            return [Item(table_html(table, table.rows, widths, size), fixed(head + sum(rows)), words=False)]
    return _parts(table, room, lead)


def _parts(table: Table, room: float, lead: float) -> list[Item]:
    # It is cut in any case: then its letters need not be the smallest
    fits = (size for size in SIZES[2:] if sum(_measured(table, size).rows) < MOST_SLIDES * (room - 130))
    size = next(fits, SIZES[-1])
    widths, head, rows = _measured(table, size)
    count = min(MOST_SLIDES, -(-int(sum(rows)) // int(room - head - HINT)))
    if count * room < (head + sum(rows)) / 5:  # a few of very many rows are no table: an example
        count = 1
    made, at = [], 0
    for part in range(count):
        first, last = part == 0, part == count - 1
        used, start = head + (lead if first else 0), at
        most = room - HINT if last else min(room - HINT, head + sum(rows[at:]) / (count - part) + max(rows))
        while at < len(rows) and (at == start or used + rows[at] <= most):
            used, at = used + rows[at], at + 1
        text = table_html(table, table.rows[start:at], widths, size)
        if last and at < len(rows):
            text += f'<p class="hint">{at} of {len(rows)} rows; the notebook has all.</p>'
        made.append(Item(text, fixed(used + HINT - (lead if first else 0)), words=False))
    return made


def table_html(table: Table, rows: Sequence[Row], widths: Sequence[float] = (), size: int = 0) -> str:
    """A table with some of its rows, in letters of a size; without ``widths`` it is as wide as it gets."""
    left = [k for k in range(table.columns) if k == 0 or _is_wordy(table, k)]
    caption = f"<caption>{html.escape(table.caption)}</caption>" if table.caption else ""
    columns = "".join(f'<col style="width:{wide:.0f}px">' for wide in widths)
    head = "".join(_row_html(row, left, table.columns, head=True) for row in table.head)
    body = "".join(_row_html(row, left, table.columns, head=False) for row in rows)
    style = f' style="font-size:{size}px;width:{sum(widths):.0f}px"' if widths else ""
    return (
        f"<table{style}>{caption}<colgroup>{columns}</colgroup>"
        f"{f'<thead>{head}</thead>' if head else ''}<tbody>{body}</tbody></table>"
    )


def _row_html(row: Row, left: Sequence[int], columns: int, *, head: bool) -> str:
    """A row; ``left`` are the columns whose words begin at the left, unless the row has cells that span several."""
    made = []
    for k, cell in enumerate(row):
        name = "th" if head or k == 0 else "td"
        scope = f' scope="{"col" if head else "row"}"' if name == "th" else ""
        counts = {"rowspan": cell.down, "colspan": cell.across}
        spans = "".join(f' {attribute}="{count}"' for attribute, count in counts.items() if count > 1)
        where = ' class="left"' if k in left and cell.across == 1 and len(row) == columns else ""
        inner = f"<strong>{cell.html}</strong>" if cell.bold else cell.html
        made.append(f"<{name}{scope}{spans}{where}>{inner}</{name}>")
    return f"<tr>{''.join(made)}</tr>"


def _is_wordy(table: Table, column: int) -> bool:
    """Whether a column holds words rather than numbers."""
    found = [plain(row[column].html) for row in table.rows if len(row) == table.columns]
    return sum(bool(re.match(r"[A-Za-z“(‘…]", text)) for text in found) > len(found) / 2
