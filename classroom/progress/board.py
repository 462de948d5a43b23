"""The page as data: counted, ordered by name, and without any answer.

Nothing here knows which guess was right: what is shown to a room before the experiment must not say it. The guesses
are held against what the question allows, so that a forged file can add a wrong guess, but no text of its own.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from classroom.progress.files import Record
from classroom.progress.lesson import Lesson
from course_lib.lab.predictions import Curve, Number, OneOf, Order, Prediction

AT_WORK = 10  # minutes since the last change
MANY_TRIES = 3  # of one exercise that is not passed: somebody may need help
LONGEST_NAME = 32
DOTS = 60  # places for dots on a strip

State = Literal["passed", "tried", "not begun"]


@dataclass(frozen=True)
class Cell:
    """One exercise of one learner."""

    exercise: str
    attempts: int = 0
    passed: bool = False

    @property
    def state(self) -> State:
        return "passed" if self.passed else "tried" if self.attempts else "not begun"

    @property
    def stuck(self) -> bool:
        """Whether it was tried often, and is not passed."""
        return not self.passed and self.attempts >= MANY_TRIES


@dataclass(frozen=True)
class Row:
    """One learner: ``minutes`` since the last change, None before the first; ``trouble`` with the file, if any."""

    name: str
    minutes: int | None
    trouble: str
    cells: tuple[Cell, ...]

    @property
    def ago(self) -> str:
        """How long ago the last change was."""
        if self.minutes is None:
            return ""
        for size, unit in ((24 * 60, "d"), (60, "h"), (1, "min")):
            if self.minutes >= size:
                return f"{self.minutes // size} {unit}"
        return "now"

    @property
    def may_need_help(self) -> bool:
        return any(cell.stuck for cell in self.cells)


@dataclass(frozen=True)
class Column:
    """One exercise of all learners."""

    exercise: str
    title: str
    cells: tuple[Cell, ...]

    @property
    def passed(self) -> int:
        return sum(cell.passed for cell in self.cells)

    @property
    def trying(self) -> int:
        """Learners who tried, and have not passed."""
        return sum(cell.state == "tried" for cell in self.cells)

    @property
    def tries(self) -> int:
        """Their tries."""
        return sum(cell.attempts for cell in self.cells if not cell.passed)

    @property
    def share(self) -> float:
        """The share of learners who passed."""
        return self.passed / len(self.cells) if self.cells else 0.0


@dataclass(frozen=True)
class Dot:
    """A guess in a figure that is 1 wide and 1 high."""

    x: float
    y: float


@dataclass(frozen=True)
class Guesses:
    """What was guessed at one question.

    Attributes
    ----------
    key, question, offered : as the learner read them.
    count : guesses.
    bars : each option, and how many chose it.
    places : each option, and how many put it first, second, …
    dots : numbers along a strip, close ones above each other, ``tallest`` at most; ``ends`` says where it begins and
        ends.
    lines : sketched curves, a list of dots each, over ``at``.
    words : the figure for who does not see it.
    """

    key: str
    question: str
    offered: str
    count: int
    words: str
    bars: tuple[tuple[str, int], ...] = ()
    places: tuple[tuple[str, tuple[int, ...]], ...] = ()
    dots: tuple[Dot, ...] = ()
    tallest: int = 0
    lines: tuple[tuple[Dot, ...], ...] = ()
    ends: tuple[str, str] = ("", "")
    at: tuple[str, ...] = ()


@dataclass(frozen=True)
class Board:
    """All that the page shows."""

    lesson: Lesson
    rows: tuple[Row, ...]
    guesses: tuple[Guesses, ...]

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        cells = zip(*(row.cells for row in self.rows), strict=True)
        by_exercise = list(cells) or [()] * len(self.lesson.exercises)
        titles = self.lesson.exercises.items()
        return tuple(Column(*title, column) for title, column in zip(titles, by_exercise, strict=True))

    @property
    def at_work(self) -> int:
        """Learners who changed something a short while ago."""
        return sum(row.minutes is not None and row.minutes <= AT_WORK for row in self.rows)

    @property
    def may_need_help(self) -> int:
        return sum(row.may_need_help for row in self.rows)

    @property
    def share(self) -> float:
        """How much of all exercises of all learners is passed."""
        return statistics.fmean(column.share for column in self.columns) if self.columns else 0.0

    @property
    def hardest(self) -> Column | None:
        """The exercise with the most tries of people who have not passed it; of equals, the one that fewer passed."""
        tried = [column for column in self.columns if column.tries]
        return max(tried, key=lambda column: (column.tries, -column.share), default=None)


def board(lesson: Lesson, records: Iterable[Record], now: float, shown: Callable[[str], str] = str) -> Board:
    """Count.

    Parameters
    ----------
    now : in seconds since 1970, as the records' ``changed``.
    shown : the name to show for a learner's; rows are in the order of the names shown.
    """
    records = list(records)
    rows = [
        Row(
            readable(shown(record.learner)),
            None if record.changed is None else max(0, int((now - record.changed) // 60)),
            record.trouble,
            tuple(Cell(number, *record.exercises.get(number, ())) for number in lesson.exercises),
        )
        for record in records
    ]
    rows.sort(key=lambda row: (row.name.casefold(), row.name))
    return Board(lesson, tuple(rows), tuple(_guesses(asked, records) for asked in lesson.predictions))


def readable(name: str) -> str:
    """A name that somebody else chose, without signs that do not print or turn the line round, and not too long."""
    printed = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)
    return printed if len(printed) <= LONGEST_NAME else f"{printed[: LONGEST_NAME - 1]}…"


# Guesses


def _guesses(asked: Prediction, records: Sequence[Record]) -> Guesses:
    found, form = [], asked.form
    for record in records:
        try:
            found.append(form.checked(record.guesses[asked.key]))
        except (KeyError, ValueError, TypeError, OverflowError):
            continue  # none, or one that the question does not allow
    return Guesses(asked.key, asked.question, form.offered, len(found), **_figure(form, found))


def _figure(form: Any, found: Sequence[Any]) -> dict[str, Any]:
    match form:
        case OneOf():
            counts = Counter(found)
            bars = tuple((option, counts[option]) for option in form.options)
            return {"bars": bars, "words": "; ".join(f"{option}: {count}" for option, count in bars)}
        case Order():
            ranks = range(len(form.options))
            places = tuple(
                (option, tuple(sum(order[rank] == option for order in found) for rank in ranks))
                for option in form.options
            )
            return {"places": places, "words": "; ".join(f"{option}: {first} put it first"
                                                         for option, (first, *_) in places)}  # fmt: skip
        case Number():
            ends = (form.words(form.low), form.words(form.high))
            stacks = Counter(round(DOTS * _along(form, guess)) for guess in found)
            tallest = max([2, *stacks.values()])
            dots = tuple(Dot(x / DOTS, k / tallest) for x, count in sorted(stacks.items()) for k in range(count))
            return {"dots": dots, "tallest": tallest, "ends": ends, "words": _range(form, found)}
        case Curve():
            single = Number(form.low, form.high, form.within, form.unit)
            steps = max(len(form.at) - 1, 1)
            lines = tuple(
                tuple(Dot(place / steps, _along(single, height)) for place, height in enumerate(guess))
                for guess in found
            )
            at, ends = tuple(f"{x:g}" for x in form.at), (single.words(form.low), single.words(form.high))
            by_place = zip(form.at, zip(*found, strict=True), strict=True) if found else ()
            words = "; ".join(f"at {x:g} {_range(single, heights)}" for x, heights in by_place)
            return {"lines": lines, "at": at, "ends": ends, "words": words or "no guesses"}
    raise TypeError(f"form={form!r}: there is no figure for it")


def _along(form: Number, guess: float) -> float:
    """Where a number stands between the ends; one beyond them stands at the end."""
    return min(max((guess - form.low) / (form.high - form.low), 0.0), 1.0)


def _range(form: Number, found: Sequence[float]) -> str:
    if not found:
        return "no guesses"
    low, middle, high = (form.words(value) for value in (min(found), statistics.median(found), max(found)))
    return f"from {low} to {high}, the middle one {middle}"
