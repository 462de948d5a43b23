"""What a chapter asks of its learners, from its notebook: exercises and predictions, and no answer to either."""

import ast
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from classroom.student_copy import exercises, test_of
from course_lib.lab.chapters import CHAPTERS, Chapter
from course_lib.lab.predictions import Prediction, predict

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@dataclass(frozen=True)
class Lesson:
    """A chapter, its exercises' titles by number, and its predictions in order."""

    chapter: Chapter
    exercises: dict[str, str]
    predictions: tuple[Prediction, ...]


@functools.cache
def lesson(number: str) -> Lesson:
    """What chapter ``number`` ("02") asks.

    Raises
    ------
    ValueError : there is no such chapter.
    """
    chapter = next((chapter for chapter in CHAPTERS if chapter.nn == number), None)
    if chapter is None:
        raise ValueError(f"chapter={number!r}: there are 00 to {CHAPTERS[-1].nn}")
    notebook = nbformat.read(NOTEBOOKS / chapter.file, as_version=4)
    titles = {exercise.number: _title(test_of(exercise.number)) for exercise in exercises(notebook)}
    return Lesson(chapter, titles, tuple(asked(notebook)))


def asked(notebook: NotebookNode) -> Iterator[Prediction]:
    """The predictions of a chapter. What a call only names, as ``choices=arena``, is read from its stored output.

    Raises
    ------
    ValueError : a question, or what it offers, stands neither in its call nor in its output.
    """
    for cell in notebook.cells:
        for call in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "predict":
                yield _prediction(call, cell)


def _prediction(call: ast.Call, cell: NotebookNode) -> Prediction:
    key, shown = ast.literal_eval(call.args[0]), ""
    for output in cell.get("outputs", ()):
        text = output.get("data", {}).get("text/plain", "")  # "Predict 02.a: Which …? (SGD / momentum / Adam)"
        if text.startswith(f"Predict {key}: "):
            shown = text.removeprefix(f"Predict {key}: ")
    question = _literal(call.args[1])
    offers = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    try:
        if question is None:
            offered = f" ({predict(key, '', **offers).form.offered})"
            question = shown[: shown.rindex(offered)]
        for kind in [kind for kind, value in offers.items() if value is None]:
            options = shown[shown.index(begins := f"{question} (") + len(begins) :].removesuffix(")")
            offers[kind] = options.removeprefix("order these: ").split(" / ")
    except ValueError:
        raise ValueError(f"{key}: what it asks stands neither in its call nor in its stored output") from None
    return predict(key, question, **offers)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _title(test: Any) -> str:
    return getattr(test, "title", None) or (inspect.getdoc(test) or "").partition("\n")[0].rstrip(".")
