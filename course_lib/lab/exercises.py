"""Exercises: ``check("02.1", answer)`` says at once whether an answer is right, and what is wrong if it is not.

For learners: `check`, and `progress` for the table of what was passed.

For authors: the checks of chapter NN stand in ``course_lib/checks/chapter_NN.py`` as ``exercise_1``, ``exercise_2``, …;
`judging` has the kinds that there are, and the helpers to write another.

What was passed is remembered in the learner's own file (`progress_file`), but for validation runs.
"""

import ast
import datetime
import difflib
import hashlib
import html
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from course_lib.lab import chapters, predictions, progress_file
from course_lib.lab.claims import ReadableTable
from course_lib.lab.handed_out import HANDED_OUT
from course_lib.lab.judging import NotAttempted, OfThisAnswer, OpenProject, Wrong

CHECKS = "course_lib.checks"  # the package with one module a chapter

State = Literal["not attempted yet", "not yet right", "passed"]
_MARKS: dict[State, tuple[str, str]] = {
    "passed": ("✓", "#1a7f37"),
    "not yet right": ("✗", "#b42318"),
    "not attempted yet": ("○", "#6b7280"),
}
# How often each list of hints was met in this kernel: the next failure gives the next hint.
_hints_given: dict[tuple[str, tuple[str, ...]], int] = {}


@dataclass(frozen=True, repr=False)
class Outcome:
    """What `check` found, shown as one line."""

    exercise: str
    title: str
    state: State
    message: str = ""
    hint: str = ""
    note: str = ""

    def __repr__(self) -> str:
        said = f": {self.message}" if self.message else f": {self.title}"
        parts = [f"{_MARKS[self.state][0]} Exercise {self.exercise} {self.state}{said}"]
        if self.hint:
            parts.append(f"Hint: {self.hint}")
        if self.note:
            parts.append(f"({self.note})")
        return " ".join(" ".join(parts).split())

    def _repr_html_(self) -> str:
        mark, colour = _MARKS[self.state]
        said = html.escape(self.message or self.title)
        hint = f" <em>Hint: {html.escape(self.hint)}</em>" if self.hint else ""
        note = f" <small>({html.escape(self.note)})</small>" if self.note else ""
        return (
            f'<div role="status" style="border-left:4px solid {colour};padding:0.2em 0.6em">{mark} '
            f"<strong>Exercise {html.escape(self.exercise)} {self.state}:</strong> {said}{hint}{note}</div>"
        )


def check(exercise: str, answer: Any, *, record: bool = True) -> Outcome:
    """Check ``answer`` to an exercise such as ``"02.1"`` on hidden inputs.

    An answer that is ``...`` or None, a function that still returns one of those or raises NotImplementedError, or one
    in which a bug is to be found and no line was changed, is "not attempted yet". ``record=False`` (for the cell with
    the solution) leaves the learner's progress as it is.

    Raises
    ------
    ValueError
        There is no such exercise.
    """
    test = _find(exercise)
    title = _title(test)
    try:
        if answer is None or _has_ellipsis(answer):
            raise NotAttempted
        if exercise in HANDED_OUT and digest(answer) == HANDED_OUT[exercise]:
            raise NotAttempted("it is as it was handed to you; find the bug first")
        # An answer that draws random numbers is judged the same each time, and leaves the notebook's own as they were.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            test(answer)
    except (NotAttempted, NotImplementedError) as stub:
        return Outcome(exercise, title, "not attempted yet", str(stub))
    except Wrong as wrong:
        note = _record(exercise, passed=False) if record else ""
        return Outcome(exercise, title, "not yet right", wrong.message, _next_hint(exercise, wrong.hints), note)
    notes = [_judge_of(test)]
    if record:
        notes += [_record(exercise, passed=True), _afterwards(test, answer)]
    return Outcome(exercise, title, "passed", note="; ".join(filter(None, notes)))


def digest(function: Any) -> str:
    """Sixteen hexadecimal digits that stand for a function's source, comments and layout apart; "" if it has none."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # no function, or typed in where nobody keeps the source
        return ""
    return hashlib.sha256(ast.unparse(ast.parse(source)).encode()).hexdigest()[:16]


def progress() -> ReadableTable:
    """All exercises of the chapters that are there: chapter, exercise, title, state, attempts, when first passed.

    Predictions that were guessed and answered follow: how many were right by chapter, and by how sure the learner was.
    """
    kept = progress_file.kept("exercises")
    rows, there = [], chapters.written()
    for chapter in _chapters():
        if there and int(chapter) not in there:
            continue  # its notebook is to come
        for exercise, test in _exercises(chapter).items():
            entry = kept.get(exercise, {"attempts": 0, "passed": None})
            untouched = "not yet right" if entry["attempts"] else "not attempted yet"
            state: State = "passed" if entry["passed"] else untouched  # type: ignore[assignment]
            by = _judge_of(test) if state == "passed" else ""
            shown = f"{_MARKS[state][0]} {state}{by and f', {by}'}"
            rows.append((chapter, exercise, _title(test), shown, entry["attempts"], entry["passed"] or ""))
        if hits := predictions.hits(chapter):
            rows.append((chapter, "predictions", "Guesses before a result", f"{sum(hits)} right", len(hits), ""))
    for words, promised, guesses, right, says in predictions.calibration().itertuples(index=False):
        title = f"Guesses you were “{words}” about: {promised} should be right"
        rows.append(("all", "predictions", title, f"{right} right: {says}", guesses, ""))
    return ReadableTable(rows, columns=["chapter", "exercise", "title", "state", "attempts", "first passed"])


# Which exercises there are


def _chapters() -> list[str]:
    package = importlib.import_module(CHECKS)
    matches = (re.fullmatch(r"chapter_(\d\d)", module.name) for module in pkgutil.iter_modules(package.__path__))
    return sorted(match[1] for match in matches if match)


def _exercises(chapter: str) -> dict[str, Callable[[Any], None]]:
    module = importlib.import_module(f"{CHECKS}.chapter_{chapter}")
    numbers = sorted(int(match[1]) for name in vars(module) if (match := re.fullmatch(r"exercise_(\d+)", name)))
    return {f"{chapter}.{number}": getattr(module, f"exercise_{number}") for number in numbers}


def _find(exercise: str) -> Callable[[Any], None]:
    numbers = _chapters()
    chapter = str(exercise).partition(".")[0]
    if chapter in numbers and (test := _exercises(chapter).get(str(exercise))):
        return test
    existing = [name for chapter in numbers for name in _exercises(chapter)]
    nearest = difflib.get_close_matches(str(exercise), existing, n=1, cutoff=0.6)
    meant = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise ValueError(f"exercise: there is no {exercise!r}{meant} There are: {', '.join(existing) or 'none'}")


def _title(test: Callable[[Any], None]) -> str:
    return getattr(test, "title", None) or (inspect.getdoc(test) or "").partition("\n")[0].rstrip(".")


def _judge_of(test: Callable[[Any], None]) -> str:
    return "by your own rubric" if isinstance(test, OpenProject) else ""


def _afterwards(test: Callable[[Any], None], answer: Any) -> str:
    """What follows when a design has passed, and is said then; nothing in a validation run."""
    follows = getattr(test, "afterwards", None)
    if follows is None or progress_file.validating():
        return ""
    with torch.random.fork_rng(devices=[]):
        return follows(answer)


def _has_ellipsis(answer: Any) -> bool:
    if isinstance(answer, dict):
        answer = list(answer.values())
    return answer is ... or (isinstance(answer, (tuple, list)) and any(_has_ellipsis(part) for part in answer))


def _next_hint(exercise: str, hints: tuple[str, ...]) -> str:
    if not hints:
        return ""
    kept = tuple("" if isinstance(hint, OfThisAnswer) else hint for hint in hints)
    given = _hints_given.get((exercise, kept), 0)
    _hints_given[exercise, kept] = given + 1
    return hints[min(given, len(hints) - 1)]


def _record(exercise: str, passed: bool) -> str:
    """Keep an attempt; the note to show if that cannot be done, else nothing."""

    def edit(entry: dict[str, Any]) -> None:
        entry["attempts"] = entry.get("attempts", 0) + 1
        entry["passed"] = entry.get("passed") or (datetime.date.today().isoformat() if passed else None)

    return progress_file.change("exercises", exercise, edit)
