"""What the tests of the exercises' checks share: useless answers, and what each chapter's checks must do with them."""

import re
from pathlib import Path
from typing import Any

import nbformat

from course_lib.lab import exercises
from course_lib.lab.exercises import check
from course_lib.lab.judging import OpenProject

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


def asked(notebook: str) -> dict[str, str]:
    """What the notebook's cells hand to `check`, an expression, by exercise; open projects have no one solution."""
    read = nbformat.read(NOTEBOOKS / notebook, as_version=4)
    source = "\n".join(cell.source for cell in read.cells if cell.cell_type == "code")
    found = re.findall(r'^check\("(\d\d\.\d+)", (.+)\)$', source, flags=re.MULTILINE)
    checked = {exercise: answer for exercise, answer in found if "record=False" not in answer}
    assert checked, f"{notebook} checks nothing"
    return {e: answer for e, answer in checked.items() if not isinstance(exercises._find(e), OpenProject)}


def assert_printed_solution_passes(notebook: str, exercise: str, **names: Any) -> None:
    """The solution that stands under "Solutions", which sees ``names``, imported at the notebook's top."""
    read = nbformat.read(NOTEBOOKS / notebook, as_version=4)
    (folded,) = [cell.source for cell in read.cells if "<b>Solutions</b>" in cell.source]
    (code,) = re.findall(r"```python\n(.*?)```", folded, flags=re.DOTALL)
    exec(code, names)
    found = check(exercise, eval(asked(notebook)[exercise], names))
    assert found.state == "passed", found
