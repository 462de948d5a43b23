"""Code on a slide: without docstrings, coloured, cut to what a slide holds."""

import ast
import html
import re
import textwrap

from pygments import highlight  # type: ignore[import-untyped]
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers import PythonLexer  # type: ignore[import-untyped]

from classroom.slides.slide import FREE, WIDE, Item, fixed

MOST_LINES = 20  # of code that a slide shows
SIZES, SMALLEST = (24, 22), 20  # of letters; in the smallest, lines that are too long are broken
LETTER, LINE = 0.6021, 1.3  # width of a letter and height of a line, in em
EDGE = 45  # pixels of a block beside its lines


def short_functions(source: str) -> list[str]:
    """The functions and classes that a cell defines, without those that are too long for a slide."""
    defined = (ast.FunctionDef, ast.ClassDef)
    found = [ast.get_source_segment(source, node) or "" for node in ast.parse(source).body if isinstance(node, defined)]
    return [function for function in found if len(function.splitlines()) <= MOST_LINES]


def without_docstrings(code: str) -> str:
    """Code without docstrings (the chapter says what they say) and without empty lines in a row."""
    bare = re.sub(r'^[ \t]+r?"""(?:(?!""").)*"""[ \t]*\n', "", code, flags=re.MULTILINE | re.DOTALL)
    return textwrap.dedent(re.sub(r"\n{2,}", "\n\n", bare).strip("\n"))


def line_count(code: str) -> int:
    """How many lines code takes at the smallest size, where long ones are broken and hang in."""
    wide = int((WIDE - EDGE) / (SMALLEST * LETTER))
    count = 0
    for line in code.split("\n"):
        rest = len(line) - wide
        hanging = _indent(line) + 4
        count += 1 if rest <= 0 else 2 + rest // (wide - hanging - 6)
    return count


def pieces(code: str) -> list[str]:
    """Code in pieces that fit on a slide each, cut at empty lines where there are any."""
    most = int((FREE - 130) / (SMALLEST * LINE))
    made: list[list[str]] = [[]]
    for line in code.split("\n"):
        if line_count("\n".join([*made[-1], line])) > most:
            empty = [k for k, one in enumerate(made[-1]) if not one.strip() and k > most // 3]
            cut = empty[-1] if empty else len(made[-1])
            made[-1:] = [made[-1][:cut], made[-1][cut:]]
        made[-1].append(line)
    return ["\n".join(piece).strip("\n") for piece in made]


def code_item(code: str) -> Item:
    """Python on a slide."""
    return _item(code, "".join(_coloured_lines(code)))


def printed_item(text: str) -> Item:
    """What a cell printed, on a slide."""
    return _item(text, html.escape(text))


def _item(text: str, shown: str) -> Item:
    count, longest = line_count(text), max(map(len, text.split("\n")))
    fits = (one for one in SIZES if longest * one * LETTER < WIDE - EDGE and count * one * LINE < FREE / 2)
    size = next(fits, SMALLEST)
    return Item(f'<pre style="font-size:{size}px">{shown}</pre>', fixed(count * size * LINE + 40), words=False)


def _coloured_lines(code: str) -> list[str]:
    """Coloured code, each line an element that hangs in when it is broken."""
    shown = highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
    return [
        f'<span class="line" style="--indent:{_indent(line)}">{coloured}</span>'
        for line, coloured in zip(code.split("\n"), shown, strict=False)
    ]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
