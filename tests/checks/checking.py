"""What the tests of the exercises' checks share: useless answers, and what each chapter's checks must do with them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

from course_lib.lab import exercises
from course_lib.lab.exercises import check

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def stub(*inputs):
    """To be written."""


def raising_stub(*inputs):
    raise NotImplementedError


STUBS = [stub, raising_stub, lambda *inputs: ..., None, ...]
USELESS = [3, lambda: 1, lambda *inputs: "a", lambda *inputs: 1 / 0, lambda *inputs: inputs]


def assert_not_attempted(exercise: str, answer: Any) -> None:
    assert check(exercise, answer).state == "not attempted yet"


def assert_told_what_is_wrong(exercise: str, answer: Any) -> None:
    found = check(exercise, answer)
    assert found.state == "not yet right"
    assert found.message


def assert_hinted(exercise: str, answer: Any, message: str, hint: str) -> None:
    """The mistake is told by ``message`` and answered by ``hint``, both regular expressions."""
    found = check(exercise, answer)
    assert found.state == "not yet right"
    assert re.search(message, found.message), found
    assert re.search(hint, found.hint), found


def assert_all_made(listed: Sequence[tuple[Any, str, Any]], exercise: str, mistakes: Sequence[Sequence[Any]]) -> None:
    """Each mistake that a check lists, ``(rule, message, hints)``, is made by one of those that are tried."""
    met = [check(made, answer).message for made, answer, *_ in mistakes if made == exercise]
    for _, message, hints in listed:
        assert any(said.startswith(message) for said in met), message
        assert hints


def assert_no_two_alike(results: Sequence[Any]) -> None:
    """Else the first in a list of mistakes would take the other's place, and the hint would mislead."""
    for first in range(len(results)):
        for second in range(first):
            assert not exercises.close(results[first], results[second]), (second, first)


def printed_solutions(notebook: str, **names: Any) -> dict[str, Any]:
    """The functions under "Solutions", which see ``names``, imported at the notebook's top."""
    read = nbformat.read(NOTEBOOKS / notebook, as_version=4)
    (folded,) = [cell.source for cell in read.cells if "<b>Solutions</b>" in cell.source]
    (code,) = re.findall(r"```python\n(.*?)```", folded, flags=re.DOTALL)
    exec(code, names)
    return names
