"""A function in which a bug is to be found is told from one in which somebody has begun to look for it."""

import ast
import json
import linecache
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from course_lib.lab.exercises import check, digest
from course_lib.lab.handed_out import HANDED_OUT

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def functions() -> Iterator[tuple[str, str]]:
    """Each exercise that hands out a function with a bug, and the function's source."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text = ""
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                text = source
                continue
            asked = re.search(r"""check\("(\d\d\.\d)", (\w+)\)""", source)
            if asked and "find the bug" in text.lower():
                found = [part for part in ast.parse(source).body if getattr(part, "name", "") == asked[2]]
                yield asked[1], ast.get_source_segment(source, found[0]) or ""


FUNCTIONS = dict(functions())


def made(source: str) -> Any:
    """The function of a source, which can be looked up, as in a notebook."""
    name = f"<handed out {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {"torch": torch}
    exec(compile(source, name, "exec"), names)
    return next(value for key, value in names.items() if callable(value) and getattr(value, "__code__", None))


def test_the_table_is_that_of_the_chapters() -> None:
    assert HANDED_OUT.keys() == FUNCTIONS.keys()
    assert len(HANDED_OUT) == 18


@pytest.mark.parametrize("exercise", HANDED_OUT)
def test_an_unchanged_function_is_no_attempt_whatever_its_layout(exercise: str) -> None:
    source = FUNCTIONS[exercise]
    assert digest(made(source)) == HANDED_OUT[exercise]
    found = check(exercise, made(source.replace("\n", "  # as it was\n", 1) + "\n\n"))
    assert found.state == "not attempted yet"
    assert "as it was handed to you" in repr(found)


def test_a_line_more_is_an_attempt() -> None:
    first, *rest = FUNCTIONS["16.3"].splitlines()
    found = check("16.3", made("\n".join([first, "    looked = True", *rest]) + "\n"))
    assert found.state == "not yet right"


def test_what_has_no_source_has_no_digest() -> None:
    assert digest(3) == digest(len) == digest(eval("lambda x: x")) == ""
