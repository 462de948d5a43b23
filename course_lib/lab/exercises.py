"""Exercises: ``check("02.1", answer)`` says at once whether an answer is right, and what is wrong if it is not.

For learners: `check`, and `progress` for the table of what was passed.

For authors: the checks of chapter NN stand in ``course_lib/checks/chapter_NN.py`` as ``exercise_1(answer)``,
``exercise_2(answer)``, … The first line of the docstring is the exercise's title. A check calls the answer on inputs
the learner does not see, returns nothing when it is right and raises `Wrong` when it is not:

    def exercise_1(answer):
        '''The sign of a step.'''
        for w in hidden_weights():
            expect_close(call(answer, w, on="a weight vector"), -w.sign(), what="the step", hint="Which way is down?")

| helper | what it does |
| --- | --- |
| `call` | calls the answer on copies of the inputs; a stub and an error in it end the check with the right words |
| `expect_close` | compares kind, shape, dtype and values, and says what differed without giving the solution away |
| `close` | the same comparison as a truth value, to recognise a usual mistake |
| `expect_unchanged` | the answer left its inputs as they were |

Progress is one small file a learner, ``progress-NAME.json`` in the folder of what is yours (``COURSE_HOME``), so that a
class may share that folder; ``runtime.learner`` says whose it is.
Validation runs (``COURSE_VALIDATING=1``) neither read nor write it.
"""

import copy
import datetime
import difflib
import html
import importlib
import inspect
import json
import os
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import torch
from torch import Tensor

from course_lib.lab.claims import ReadableTable
from course_lib.lab.files import replaced
from course_lib.lab.runtime import data_folder, home_folder, learner

CHECKS = "course_lib.checks"  # the package with one module a chapter
LOCK_SECONDS = 10

State = Literal["not attempted yet", "not yet right", "passed"]
_MARKS: dict[State, tuple[str, str]] = {
    "passed": ("✓", "#1a7f37"),
    "not yet right": ("✗", "#b42318"),
    "not attempted yet": ("○", "#6b7280"),
}
# How often each list of hints was met in this kernel: the next failure gives the next hint.
_hints_given: dict[tuple[str, tuple[str, ...]], int] = {}


class Wrong(Exception):
    """Raised by a check: what is wrong, in the learner's terms, and a hint, or several that are given one by one."""

    def __init__(self, message: str, hint: str | Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hints = (hint,) if isinstance(hint, str) else tuple(hint)


class _NotAttempted(Exception):
    """Raised by `call` when the answer is still the stub."""


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

    An answer that is ``...`` or None, or a function that still returns one of those or raises NotImplementedError, is
    "not attempted yet". ``record=False`` (for the cell with the solution) leaves the learner's progress as it is.

    Raises
    ------
    ValueError
        There is no such exercise.
    """
    test = _find(exercise)
    title = _title(test)
    try:
        if answer is None or _has_ellipsis(answer):
            raise _NotAttempted
        # An answer that draws random numbers is judged the same each time, and leaves the notebook's own as they were.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            test(answer)
    except (_NotAttempted, NotImplementedError) as stub:
        return Outcome(exercise, title, "not attempted yet", str(stub))
    except Wrong as wrong:
        note = _record(exercise, passed=False) if record else ""
        return Outcome(exercise, title, "not yet right", wrong.message, _next_hint(exercise, wrong.hints), note)
    note = _record(exercise, passed=True) if record else ""
    return Outcome(exercise, title, "passed", note=note)


def progress() -> ReadableTable:
    """All exercises of the chapters that are there: chapter, exercise, title, state, attempts, when first passed."""
    kept = {} if _validating() else _read_progress()
    rows = []
    for chapter in _chapters():
        for exercise, test in _exercises(chapter).items():
            entry = kept.get(exercise, {"attempts": 0, "passed": None})
            untouched = "not yet right" if entry["attempts"] else "not attempted yet"
            state: State = "passed" if entry["passed"] else untouched  # type: ignore[assignment]
            shown = f"{_MARKS[state][0]} {state}"
            rows.append((chapter, exercise, _title(test), shown, entry["attempts"], entry["passed"] or ""))
    return ReadableTable(rows, columns=["chapter", "exercise", "title", "state", "attempts", "first passed"])


# For authors of checks


def call(answer: Any, *inputs: Any, on: str = "") -> Any:
    """``answer(*inputs)`` on copies of the inputs; ``on`` describes them to the learner, as in "a wide matrix".

    Raises `Wrong` if the answer is no function or raises an error, and ends the check as "not attempted yet" if it
    returns nothing.
    """
    if not callable(answer):
        raise Wrong(f"a function is wanted here, and this is {_kind(answer)}")
    where = f" (on {on})" if on else ""
    try:
        result = answer(*(_copy(value) for value in inputs))
    except NotImplementedError as error:
        raise _NotAttempted(str(error)) from None
    except Exception as error:  # an answer may fail in any way; the learner needs its words, not our traceback
        said = str(error).strip().splitlines()
        message = f": {said[0]}" if said else ""
        raise Wrong(f"your function raised {type(error).__name__}{message}{where}") from None
    if result is None or result is ...:
        raise _NotAttempted(f"{getattr(answer, '__name__', 'your function')} returns nothing so far")
    return result


def expect_close(
    found: Any,
    expected: Any,
    *,
    what: str,
    hint: str | Sequence[str] = (),
    on: str = "",
    rtol: float = 1e-5,
    atol: float = 1e-7,
) -> None:
    """Raise `Wrong` unless ``found`` has the kind, shape, dtype and values of ``expected`` (a tensor or a number).

    ``what`` names the quantity and ``on`` the hidden input. The message tells how far off the answer is, never what
    the right answer is.
    """
    where = f" (on {on})" if on else ""
    values = _as_tensor(found)
    if values is None:
        wanted = "a tensor" if isinstance(expected, Tensor) else "a number"
        raise Wrong(f"{what} should be {wanted}, and is {_kind(found)}{where}", hint)
    right = torch.as_tensor(expected)
    if values.shape != right.shape:
        raise Wrong(f"{what} should have shape {_shape(right)}, and has {_shape(values)}{where}", hint)
    if isinstance(expected, Tensor) and isinstance(found, Tensor) and values.dtype != right.dtype:
        raise Wrong(f"{what} should be {_dtype(right)} like its input, and is {_dtype(values)}{where}", hint)
    if right.isfinite().all() and not values.isfinite().all():
        raise Wrong(f"{what} is not finite: it holds NaN or infinity{where}", hint)
    if not close(found, expected, rtol=rtol, atol=atol):
        gap = (values.detach().cpu().double() - right.detach().cpu().double()).abs().max().item()
        largest = "the largest difference" if values.numel() > 1 else "the difference"
        raise Wrong(f"{what} is not right: {largest} is {gap:.2g}{where}", hint)


def close(found: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-7) -> bool:
    """Whether two tensors or numbers, or two tuples of them, agree in shape and values; False for anything else."""
    if isinstance(expected, (tuple, list)):
        return (
            isinstance(found, (tuple, list))
            and len(found) == len(expected)
            and all(close(f, e, rtol=rtol, atol=atol) for f, e in zip(found, expected, strict=True))
        )
    values, right = _as_tensor(found), torch.as_tensor(expected)
    if values is None or values.shape != right.shape:
        return False
    values, right = values.detach().cpu().double(), right.detach().cpu().double()
    return torch.allclose(values, right, rtol=rtol, atol=atol, equal_nan=True)


def expect_unchanged(answer: Callable[..., Any], *inputs: Any, hint: str | Sequence[str] = (), on: str = "") -> None:
    """Raise `Wrong` if ``answer(*inputs)`` changes one of its tensors in place, naming the argument."""
    handed = [_copy(value) for value in inputs]
    # call() would hand over copies of its own, and so never see the change.
    call(lambda: answer(*handed), on=on)
    for position, (before, after) in enumerate(zip(inputs, handed, strict=True)):
        if isinstance(before, Tensor) and not torch.equal(before, after):
            name = _argument_names(answer, len(inputs))[position]
            where = f" (on {on})" if on else ""
            raise Wrong(f"your function changes its argument {name} in place{where}", hint)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return copy.deepcopy(value)


def _as_tensor(value: Any) -> Tensor | None:
    if isinstance(value, str):
        return None
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _shape(values: Tensor) -> str:
    return "[" + ", ".join(map(str, values.shape)) + "]"


def _dtype(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _argument_names(answer: Callable[..., Any], count: int) -> list[str]:
    try:
        names = list(inspect.signature(answer).parameters)
    except (TypeError, ValueError):
        names = []
    return [*names, *(str(position + 1) for position in range(len(names), count))]


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
    chapters = _chapters()
    chapter = str(exercise).partition(".")[0]
    if chapter in chapters and (test := _exercises(chapter).get(str(exercise))):
        return test
    existing = [name for chapter in chapters for name in _exercises(chapter)]
    nearest = difflib.get_close_matches(str(exercise), existing, n=1, cutoff=0.6)
    meant = f"; did you mean {nearest[0]!r}?" if nearest else "."
    raise ValueError(f"exercise: there is no {exercise!r}{meant} There are: {', '.join(existing) or 'none'}")


def _title(test: Callable[[Any], None]) -> str:
    return (inspect.getdoc(test) or "").partition("\n")[0].rstrip(".")


def _has_ellipsis(answer: Any) -> bool:
    if isinstance(answer, dict):
        answer = list(answer.values())
    return answer is ... or (isinstance(answer, (tuple, list)) and any(_has_ellipsis(part) for part in answer))


def _next_hint(exercise: str, hints: tuple[str, ...]) -> str:
    if not hints:
        return ""
    given = _hints_given.get((exercise, hints), 0)
    _hints_given[exercise, hints] = given + 1
    return hints[min(given, len(hints) - 1)]


# The learner's progress: {"exercises": {"02.1": {"attempts": 3, "passed": "2026-05-04"}}}


def _validating() -> bool:
    return os.environ.get("COURSE_VALIDATING", "") not in ("", "0")


def _file() -> Path:
    return home_folder() / f"progress-{learner()}.json"


def _lock(file: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(f"{file}.lock", timeout=LOCK_SECONDS)


def _record(exercise: str, passed: bool) -> str:
    """Keep an attempt; the note to show if that cannot be done, else nothing."""
    if _validating():
        return ""
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file):
            kept = _load(file)
            entry = kept.setdefault(exercise, {"attempts": 0, "passed": None})
            entry["attempts"] += 1
            if passed and not entry["passed"]:
                entry["passed"] = datetime.date.today().isoformat()
            _write(file, kept)
    except (OSError, NotImplementedError) as error:  # a read-only folder, a full disk, a file system without locks
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return f"your progress could not be kept: {reason}"
    return ""


def _read_progress() -> dict[str, dict[str, Any]]:
    file = _file()
    if not file.exists():
        return _from_before(file)
    try:
        with _lock(file):
            return _load(file)
    except (OSError, NotImplementedError):
        # A folder that takes no lock is not written to either, so the file can be read as it stands.
        try:
            return _parse(file.read_bytes())
        except (OSError, ValueError):
            return {}


def _load(file: Path) -> dict[str, dict[str, Any]]:
    """The exercises in ``file``; a damaged file is renamed, so that nothing in it is lost, and forgotten."""
    if not file.exists():
        return _from_before(file)
    try:
        return _parse(file.read_bytes())
    except ValueError:
        aside = next(name for name in _aside_names(file) if not name.exists())
        file.rename(aside)
        warnings.warn(f"{file.name} was damaged: set aside as {aside.name}, progress starts afresh", stacklevel=4)
        return {}


def _from_before(file: Path) -> dict[str, dict[str, Any]]:
    """Progress once lay in the data folder: it is taken over from there, and the old file stays."""
    try:
        return _parse((data_folder() / file.name).read_bytes())
    except (OSError, ValueError):
        return {}


def _aside_names(file: Path) -> Iterator[Path]:
    number = 0
    while True:
        number += 1
        yield file.with_name(f"{file.stem}.damaged-{number}.json")


def _parse(content: bytes) -> dict[str, dict[str, Any]]:
    """Raises ValueError for anything that `_write` did not write."""
    stored = json.loads(content)
    kept = stored.get("exercises") if isinstance(stored, dict) else None
    if not isinstance(kept, dict):
        raise ValueError("no exercises")
    for entry in kept.values():
        attempts, passed = (entry.get("attempts"), entry.get("passed")) if isinstance(entry, dict) else (None, None)
        if not isinstance(attempts, int) or not (passed is None or isinstance(passed, str)):
            raise ValueError("not an entry")
    return kept


def _write(file: Path, kept: dict[str, dict[str, Any]]) -> None:
    """Replace the file in one step: a reader, or a power cut, meets the old one or the new one, never half of it."""
    with replaced(file) as stream:
        stream.write(json.dumps({"exercises": kept}, indent=1, sort_keys=True).encode())
