"""A chapter as a student copy for ``nbgrader``: the course's own notebook is the only source.

    python -m classroom.student_copy notebooks/02_optimizers.ipynb 02_copy.ipynb [--keep-outputs]

| cell of the chapter | becomes |
| --- | --- |
| code that ends in ``check("NN.k", answer)`` | a solution cell (all before it), then a locked cell with the check |
| the check of an open project | a cell for the report, marked by hand; the learner's own marks stay below it |
| code with ``predict("NN.x", …)`` | stays, and a cell follows for the guess and its reason |
| the folded solutions | nothing |
| all other cells | stay |
"""

import argparse
import ast
import copy
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nbformat
from nbformat import NotebookNode

from course_lib.lab.files import replaced
from course_lib.lab.judging import Method, OpenProject, Reading

SOLUTIONS = "<b>Solutions</b>"
POINTS = {Method: 2, Reading: 1}  # designs, and checks of a kind of their own: 3
OTHERS, REPORT = 3, 5
# For whoever marks with plain nbgrader: `check` raises nothing, and a cell that raises nothing earns full marks.
HIDDEN = """
### BEGIN HIDDEN TESTS
assert check("{exercise}", {answer}, record=False).state == "passed"
### END HIDDEN TESTS"""


@dataclass(frozen=True)
class Exercise:
    """An exercise as it stands in a chapter.

    Attributes
    ----------
    number : "02.1".
    answer : what the check is handed, as source.
    stub : the source before the check, which the learner completes.
    """

    number: str
    answer: str
    stub: str


def student_copy(chapter: NotebookNode, *, keep_outputs: bool = False) -> NotebookNode:
    """Return the notebook to hand out; ``chapter`` stays as it is.

    Widgets' state is kept only with the outputs, which show it.

    Raises
    ------
    ValueError : an exercise has no check in ``course_lib/checks``.
    """
    made = copy.deepcopy(chapter)
    kept = {"kernelspec", "language_info", *(["widgets"] if keep_outputs else [])}
    made.metadata = {key: value for key, value in made.metadata.items() if key in kept}
    if not keep_outputs:
        for cell in made.cells:
            _clear(cell)
    made.cells = [new for cell in made.cells for new in _cells_for(cell)]
    return made


def exercises(chapter: NotebookNode) -> Iterator[Exercise]:
    """The exercises of a chapter, in its order."""
    for cell in chapter.cells:
        if cell.cell_type == "code" and (exercise := exercise_of(cell.source)):
            yield exercise


def exercise_of(source: str) -> Exercise | None:
    """The exercise whose check a code cell ends in; None for any other cell, ``check(…, record=False)`` too."""
    statements = ast.parse(source).body
    last = statements[-1].value if statements and isinstance(statements[-1], ast.Expr) else None
    if not isinstance(last, ast.Call) or not _calls(last, "check") or last.keywords:
        return None
    number, answer = last.args
    head = "\n".join(source.splitlines()[: last.lineno - 1]).rstrip()
    return Exercise(ast.literal_eval(number), ast.get_source_segment(source, answer) or "", head)


def test_of(exercise: str) -> Any:
    """What `check` holds an answer against, such as a `Method`.

    Raises
    ------
    ValueError : there is no such exercise.
    """
    chapter, _, number = exercise.partition(".")
    try:
        return getattr(importlib.import_module(f"course_lib.checks.chapter_{chapter}"), f"exercise_{number}")
    except (ModuleNotFoundError, AttributeError):
        raise ValueError(f"exercise: there is no check for {exercise!r} in course_lib/checks") from None


def points(exercise: str) -> int:
    """What an exercise is worth, by its kind."""
    test = test_of(exercise)
    return next((value for kind, value in POINTS.items() if isinstance(test, kind)), OTHERS)


def grade_id(exercise: str, part: str) -> str:
    """How nbgrader knows a cell of an exercise: "02-1-answer" (it allows no dot)."""
    return f"{exercise.replace('.', '-')}-{part}"


def exercise_in(grade_id: str) -> tuple[str, str]:
    """The exercise and the part that a cell's ``grade_id`` names: "02-1-answer" -> ("02.1", "answer")."""
    exercise, _, part = grade_id.rpartition("-")
    return exercise.replace("-", "."), part


# One cell of the chapter


def _cells_for(cell: NotebookNode) -> list[NotebookNode]:
    if cell.cell_type != "code":
        return [] if SOLUTIONS in cell.source else [cell]
    if exercise := exercise_of(cell.source):
        return _cells_of_project(cell, exercise) if _is_project(exercise) else _cells_of_exercise(exercise)
    return [cell, *(_cell_of_guess(key) for key in _predictions(cell.source))]


def _is_project(exercise: Exercise) -> bool:
    return isinstance(test_of(exercise.number), OpenProject)


def _cells_of_exercise(exercise: Exercise) -> list[NotebookNode]:
    number, answer = exercise.number, exercise.answer
    test = f'check("{number}", {answer})' + HIDDEN.format(exercise=number, answer=answer)
    return [
        _cell("code", exercise.stub, grade_id(number, "answer"), solution=True),
        _cell("code", test, grade_id(number, "mark"), locked=True, worth=points(number)),
    ]


def _cells_of_project(cell: NotebookNode, exercise: Exercise) -> list[NotebookNode]:
    asked = "*Your report, half a page.*"
    return [_cell("markdown", asked, grade_id(exercise.number, "report"), solution=True, worth=REPORT), cell]


def _cell_of_guess(key: str) -> NotebookNode:
    # nbgrader has no cell to write in that is not graded: worth nothing, then
    return _cell("markdown", f"**Your guess ({key}), and why:** …", f"guess-{key.replace('.', '-')}", solution=True,
                 worth=0)  # fmt: skip


def _cell(
    kind: Literal["code", "markdown"], source: str, name: str, *, solution: bool = False, locked: bool = False,
    worth: int | None = None,
) -> NotebookNode:  # fmt: skip
    make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
    graded = worth is not None
    about = {"schema_version": 3, "grade_id": name, "grade": graded, "solution": solution, "locked": locked,
             "task": False, "cell_type": kind}  # fmt: skip
    if graded:
        about["points"] = worth
    return make(source, id=name, metadata={"nbgrader": about})


def _predictions(source: str) -> list[str]:
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _calls(node, "predict"))
    return [ast.literal_eval(call.args[0]) for call in calls]


def _calls(call: ast.Call, name: str) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id == name


def _clear(cell: NotebookNode) -> None:
    if cell.cell_type == "code":
        cell.outputs, cell.execution_count = [], None
        cell.metadata.get("jupyter", {}).pop("outputs_hidden", None)


def write(path: Path, to: Path, *, keep_outputs: bool = False) -> None:
    """Write the student copy of the chapter at ``path`` to ``to``, whole or not at all."""
    made = student_copy(nbformat.read(path, as_version=4), keep_outputs=keep_outputs)
    nbformat.validate(made)
    with replaced(to) as file:
        file.write(nbformat.writes(made).encode())


def main(arguments: list[str] | None = None) -> int:
    """Write the copy that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a chapter's student copy.")
    parser.add_argument("chapter", type=Path, help="the chapter's notebook")
    parser.add_argument("to", type=Path, help="where the copy goes")
    parser.add_argument("--keep-outputs", action="store_true", help="keep the outputs of the chapter's own cells")
    given = parser.parse_args(arguments)
    write(given.chapter, given.to, keep_outputs=given.keep_outputs)
    print(f"{given.to}: {given.to.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
