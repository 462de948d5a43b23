"""Docstrings, written to be read in code, as the text that Sphinx reads: `converted` does all of it.

| what stands in a docstring | what becomes of it |
| --- | --- |
| a table, Markdown's or reStructuredText's | a ``list-table``; names in its first column are links |
| a name in backticks, single or double | a link where it names something of the course, else a literal |
| ``Parameters``, ``Attributes``, ``Raises``, … | a field with a list; a section ends where ordinary text goes on |
| an indented example | a block of code, Python where it is Python |
| a number of arXiv | a link |
| formulas, directives, doctests | as they are |

What a name stands for is not known here: a function `Link` says so.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

Link = Callable[[str], str | None]
"""A name as it is written -> the role that leads to what it names, or None."""

Rows = list[list[str]]

_SECTIONS = ("Parameters", "Attributes", "Returns", "Yields", "Raises")
_ENTRY = re.compile(r"(?P<names>\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*)(?: : (?P<text>.*))?$")
_RULER = re.compile(r"=+( +=+)+\s*$")
_MARKDOWN_RULER = re.compile(r"\|?\s*:?-{3,}:?\s*(\|\s*:?-{3,}:?\s*)*\|?\s*$")
_DIRECTIVE = re.compile(r"\.\. [\w:-]+::")
_ITEM = re.compile(r"[-*] |\d+\. ")
_BEGINS = re.compile(rf"{_DIRECTIVE.pattern}|[-*] ")
_CODE = re.compile(
    r"(?<!`)``(?P<double>(?:[^`]|`(?!`))+)``(?!`)|(?P<role>:[\w:+-]+:`[^`]*`)|(?<![`\w])`(?P<single>[^`]+)`(?![`\w_])"
    r"|(?<![`<\w])arXiv:(?P<paper>\d{4}\.\d{4,5})(?![`>\d])"
)
_NAME = re.compile(r"(?<![\w.`<~…])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?![\w`>…])")


def converted(lines: Sequence[str], link: Link, quiet: frozenset[str] = frozenset()) -> list[str]:
    """A docstring's lines as reStructuredText.

    Names in ``quiet`` stay literals where they stand in double backticks: an argument ``data`` is no module.
    """
    found: list[str] = []
    blocks = list(_blocks(list(lines)))
    for kind, block in blocks:
        if found and found[-1].strip():
            found.append("")
        found += _of_kind(kind, block, link, quiet)
    return [*found, ""]


def _of_kind(kind: str, block: list[str], link: Link, quiet: frozenset[str]) -> list[str]:
    match kind:
        case "table":
            heads = 1 if sum(_RULER.match(line) is not None for line in block) > 2 else 0
            return list_table(simple_table(block), link, quiet, heads)
        case "markdown":
            return list_table(markdown_table(block), link, quiet)
        case "example":
            return code_block(block)
        case "raw":
            return block
        case "text":
            return with_links("\n".join(block), link, quiet).splitlines()
    return field(kind, block, link, quiet)


def _blocks(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The parts of a docstring with their kinds; a section's kind is its name, and its lines come without its head."""
    at = 0
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        if lines[at] in _SECTIONS and at + 1 < len(lines) and re.fullmatch("-{3,}", lines[at + 1].strip()):
            end = _end_of_section(lines, at + 2)
            yield lines[at], lines[at + 2 : end]
        elif _RULER.match(lines[at]):
            end = _last_ruler(lines, at) + 1
            yield "table", lines[at:end]
        elif (
            at + 1 < len(lines) and lines[at].lstrip().startswith("|") and _MARKDOWN_RULER.match(lines[at + 1].strip())
        ):
            end = _end_of(lines, at, lambda line: line.lstrip().startswith("|"))
            yield "markdown", lines[at:end]
        elif _DIRECTIVE.match(lines[at]):
            end = _end_of(lines, at + 1, lambda line: not line.strip() or line[0] == " ")
            yield "raw", _without_blank_ends(lines[at:end])
        elif lines[at][0] == " ":
            end = _end_of(lines, at, lambda line: not line.strip() or line[0] == " ")
            after = next((line for line in reversed(lines[:at]) if line.strip()), "")
            yield ("raw" if after.rstrip().endswith("::") else "example"), _without_blank_ends(lines[at:end])
        elif lines[at].startswith(">>>"):
            end = _end_of(lines, at, lambda line: bool(line.strip()))
            yield "raw", lines[at:end]
        else:
            if _ITEM.match(lines[at]):  # what is indented after a blank line is the item's
                end = _end_of(lines, at + 1, lambda line: not line.strip() or line[0] == " " or bool(_ITEM.match(line)))
            else:  # a list may begin without a blank line, as in Markdown
                end = _end_of(lines, at + 1, lambda line: bool(line.strip()) and not _BEGINS.match(line))
            yield "text", _without_blank_ends(lines[at:end])
        at = end


def _end_of(lines: list[str], start: int, belongs: Callable[[str], bool]) -> int:
    return next((at for at in range(start, len(lines)) if not belongs(lines[at])), len(lines))


def _without_blank_ends(lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return lines


def _last_ruler(lines: list[str], start: int) -> int:
    """Where a simple table ends: at the ruler after which a blank line, or nothing, follows."""
    rulers = [at for at in range(start, len(lines)) if _RULER.match(lines[at])]
    return next((at for at in rulers[1:] if at + 1 == len(lines) or not lines[at + 1].strip()), rulers[-1])


def _end_of_section(lines: list[str], start: int) -> int:
    """Where a section ends: at the next one, or at a paragraph that is no entry, for this is where text goes on."""
    for at in range(start, len(lines)):
        new_paragraph = at > start and not lines[at - 1].strip()
        if new_paragraph and lines[at].strip() and lines[at][0] != " " and not _is_entry(lines, at):
            return at
    return len(lines)


def _is_entry(lines: list[str], at: int) -> bool:
    if at + 1 < len(lines) and re.fullmatch("-{3,}", lines[at + 1].strip()):
        return False  # the head of the next section
    match = _ENTRY.match(lines[at])
    below = at + 1 < len(lines) and lines[at + 1].startswith(" ")
    return match is not None and (match["text"] is not None or below)


# --- Text -------------------------------------------------------------------------------------------------------------


def with_links(text: str, link: Link, quiet: frozenset[str] = frozenset()) -> str:
    """Text in which names in backticks are links, if they name anything, other things in backticks literals.

    Numbers of arXiv are links too.
    """

    def instead(match: re.Match[str]) -> str:
        if match["paper"]:
            return f"`arXiv:{match['paper']} <https://arxiv.org/abs/{match['paper']}>`__"
        if match["role"]:
            return match[0]
        written = match["double"] or match["single"]
        name = " ".join(written.split())
        if name not in quiet or match["single"]:
            role = link(name) if re.fullmatch(r"[A-Za-z_][\w.]*(?:\(\))?", name) else None
            if role:
                return role
        return match[0] if match["double"] else f"``{name}``"

    return _CODE.sub(instead, text)


def with_names_linked(text: str, link: Link) -> str:
    r"""Text in which bare words too are links where they name anything, as in a table's first column."""
    parts, last = [], 0
    for match in _NAME.finditer(text):
        role = link(match[0])
        if role:
            # a role ends only before a blank or a sign that may end one, which ( is not
            end = "" if match.end() == len(text) or text[match.end()] in " ,;:.)" else "\\ "
            parts += [text[last : match.start()], role + end]
            last = match.end()
    return "".join([*parts, text[last:]])


# --- Tables -----------------------------------------------------------------------------------------------------------


def simple_table(lines: Sequence[str]) -> Rows:
    """The rows of a table between rulers of ``=``, the heads, where it has any, first.

    A line without a first cell goes on with the row above it; so does one below a first cell that ends in a comma.
    """
    starts = [match.start() for match in re.finditer("=+", lines[0])]
    ends = [*starts[1:], None]
    rows: Rows = []
    for line in lines:
        if _RULER.match(line) or not line.strip():
            continue
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if rows and (not cells[0] or rows[-1][0].endswith(",")):
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    return rows


def markdown_table(lines: Sequence[str]) -> Rows:
    """The rows of a Markdown table, the heads first."""
    cut = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    rows = [[cell.strip().replace("\\|", "|") for cell in cells] for k, cells in enumerate(cut) if k != 1]
    width = len(rows[0])
    return [(row + [""] * width)[:width] for row in rows]


def list_table(rows: Rows, link: Link, quiet: frozenset[str] = frozenset(), heads: int = 1) -> list[str]:
    """The rows as a ``list-table``; what stands in the first column is linked, in backticks or not."""
    found = [".. list-table::", f"   :header-rows: {heads}", "   :widths: auto", "   :class: reference-table", ""]
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            text = _cell(cell, link, quiet, first=column == 0 and number >= heads)
            found.append(f"   {'* -' if column == 0 else '  -'} {text}".rstrip())
    return found


def _cell(text: str, link: Link, quiet: frozenset[str], first: bool) -> str:
    if not first:
        return with_links(text, link, quiet)
    if re.fullmatch(r"\*[^*]+\*", text) and (linked := with_names_linked(text[1:-1], link)) != text[1:-1]:
        return linked  # a line that heads a group, and names its file: a link cannot be in italics too
    return with_links(text, link) if "`" in text else with_names_linked(text, link)


# --- Code -------------------------------------------------------------------------------------------------------------


def code_block(lines: Sequence[str]) -> list[str]:
    """An indented example as a block of code."""
    code = textwrap.dedent("\n".join(lines)).splitlines()
    return [f".. code-block:: {language(code)}", "", *(f"   {line}".rstrip() for line in code)]


def language(code: Iterable[str]) -> str:
    """``python`` for what Python can read, else ``text`` (a command, a file)."""
    try:
        ast.parse("\n".join(code).replace("…", "..."))
    except SyntaxError:
        return "text"
    return "python"


# --- Sections ---------------------------------------------------------------------------------------------------------


def field(name: str, lines: Sequence[str], link: Link, quiet: frozenset[str] = frozenset()) -> list[str]:
    """A section as a field: a list of its entries, or its text where it has none (what is returned, mostly)."""
    entries = list(_entries(list(lines), named=name not in ("Returns", "Yields")))
    if not entries:
        text = with_links("\n".join(_without_blank_ends(list(lines))), link, quiet)
        return [f":{name}:", *_indented(text)]
    found = [f":{name}:"]
    for names, call, text in entries:
        heads = [_exception(part, link) if name == "Raises" else f"**{_escaped(part)}**" for part in names.split(", ")]
        head = ", ".join(heads) + (f" ({call})" if call else "")
        first, *rest = _indented(f"{head} – {with_links(text, link, quiet)}" if text else head, 5)
        found += [f"   * {first.strip()}", *rest]
    return found


def _entries(lines: list[str], named: bool) -> Iterator[tuple[str, str, str]]:
    """Of each entry its names, how it is called, and its text, whether that begins beside the name or below it."""
    at = 0
    while at < len(lines):
        match = _ENTRY.match(lines[at])
        if match is None or (match["text"] is None and not named):
            at += 1
            continue
        end = _end_of(lines, at + 1, lambda line: not line.strip() or line[0] == " ")
        beside, below = (match["text"] or "").strip(), textwrap.dedent("\n".join(lines[at + 1 : end])).strip()
        if re.fullmatch("``[^`]+``", beside) and below[:1].isupper():
            yield match["names"], beside, below
        else:
            yield match["names"], "", "\n".join(filter(None, (beside, below)))
        at = end


def _exception(name: str, link: Link) -> str:
    return link(name) or f":py:exc:`{name}`"


def _escaped(name: str) -> str:
    return name.replace("*", "\\*")


def _indented(text: str, width: int = 3) -> list[str]:
    return [f"{' ' * width}{line}".rstrip() for line in text.splitlines()]
