"""What the kit's tests share: chapters, their printed solutions, and whether marking can run here."""

import ast
import functools
import re

import nbformat
import pytest
from nbformat import NotebookNode

from classroom.course import NOTEBOOKS
from classroom.judge.judge import Answer, Patience, Verdict, judge
from classroom.judge.sandbox import Limits, NoSandbox, bwrap
from classroom.judge.slices import Slice
from classroom.student_copy import SOLUTIONS, exercises

QUICK = Patience(exercise=8, design=60)
SMALL = Limits(cpu=60)


def why_no_sandbox() -> str:
    """Why submissions cannot be run here; nothing if they can."""
    try:
        bwrap()
    except NoSandbox as error:
        return str(error)
    return ""


needs_sandbox = pytest.mark.skipif(bool(why_no_sandbox()), reason=f"marking refuses here: {why_no_sandbox()}")


@functools.cache
def chapter(name: str) -> NotebookNode:
    """A chapter's notebook, by the name of its file."""
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def solutions(notebook: NotebookNode) -> dict[str, str]:
    """The printed solutions of a chapter, by exercise, each below what the exercise's cell holds already."""
    folded = "\n".join(cell.source for cell in notebook.cells if SOLUTIONS in cell.source)
    code = "\n".join(re.findall(r"```python\n(.*?)```", folded, re.DOTALL))
    body = ast.parse(code).body
    statements = [(names_bound(part), part) for part in body]
    imports = [ast.unparse(part) for part in body if isinstance(part, (ast.Import, ast.ImportFrom))]
    asked = list(exercises(notebook))
    answered = {exercise.number: names_in(ast.parse(exercise.answer)) for exercise in asked}
    found = {}
    for exercise in asked:
        wanted = set(answered[exercise.number])
        of_others = set().union(*answered.values()) - wanted
        parts: list[str] = []
        for bound, part in reversed(statements):  # an answer may need a function that stands above it
            if bound & wanted:
                parts.insert(0, ast.get_source_segment(code, part) or "")
                wanted |= names_in(part) - of_others
        if parts:
            found[exercise.number] = "\n".join([exercise.stub, *imports, *parts])
    return found


def names_in(tree: ast.AST) -> set[str]:
    """All names that stand in it."""
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def names_bound(statement: ast.stmt) -> set[str]:
    """The names that a statement of a solution defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    stored = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
    return {node.id for node in stored if isinstance(node.ctx, ast.Store)}


def verdict(source: str, exercise: str = "02.1", expression: str = "momentum_step") -> Verdict:
    """The verdict on one answer."""
    chapter = Slice(("import torch", "from course_lib.lab import check"), frozenset())
    return judge([Answer(exercise, source, expression)], chapter, patience=QUICK, limits=SMALL)[exercise]
