"""Predictions: a question before an experiment, and the learner's guess beside what was measured after it.

    predict("02.a", "Which of them is lowest after 15 epochs?", choices=["SGD", "momentum", "Adam"])
    ...
    answered("02.a", table["loss"].idxmin())

| what is asked for | how |
| --- | --- |
| one of a few | ``choices=["SGD", "Adam"]`` |
| an order, first to last | ``ranking=["SGD", "momentum", "Adam"]`` |
| a number | ``number=(0, 100), within=5, unit="%"``: a guess that is at most 5 away counts as right |
| a curve | ``curve=(0, 50, 90, 99), between=(0, 1), within=0.05``: a height for each of a few places |

With a kernel, `predict` shows a small form that also asks how sure the learner is; a guess is remembered beside the
exercises that were passed (`progress_file`), and only one that was made before the result counts. Whoever does not want
to guess goes on with one click, or simply goes on. In validation runs, and so in the stored outputs, there is the bare
question, and the result without a guess. `calibration` says how often guesses of each sureness were right.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from course_lib.lab import progress_file
from course_lib.lab.arguments import is_number, require
from course_lib.lab.claims import ReadableTable
from course_lib.lab.experiments import Interval
from course_lib.lab.runtime import in_notebook

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SURE: Mapping[float, str] = {0.25: "no idea", 0.5: "a hunch", 0.75: "fairly sure", 0.9: "sure"}
"""How sure a guess is, as the share of such guesses that should be right, and in words."""

BLUE, GREEN, RED = "#1f5fbf", "#1a7f37", "#b42318"
ENOUGH = 5  # guesses of one sureness before anything is said about them

_asked: dict[str, Prediction] = {}
_unkept: dict[str, Mapping[str, Any]] = {}  # guesses that could not be written down, for this kernel
_seen: set[str] = set()  # results that this kernel has shown: what is guessed afterwards does not count


class Form(Protocol):
    """What a kind of question knows: which guesses there are, how they read, and how far off one is."""

    def checked(self, value: Any) -> Any:
        """The guess or the measured value as it is kept; ValueError that says what is allowed."""

    def words(self, value: Any) -> str:
        """A kept value for a reader."""

    def judged(self, guess: Any, measured: Any) -> tuple[bool, str]:
        """Whether a guess counts as right, and how far off it is in words (empty when there is nothing to add)."""

    @property
    def offered(self) -> str:
        """What may be answered, in words."""


@dataclass(frozen=True)
class OneOf:
    """One of a few."""

    options: tuple[str, ...]

    @property
    def offered(self) -> str:
        return " / ".join(self.options)

    def checked(self, value: Any) -> str:
        if value not in self.options:
            raise ValueError(f"one of {', '.join(map(repr, self.options))}")
        return str(value)

    def words(self, value: str) -> str:
        return value

    def judged(self, guess: str, measured: str) -> tuple[bool, str]:
        return guess == measured, ""


@dataclass(frozen=True)
class Order:
    """All of a few, first to last; right when at most ``within`` pairs stand the wrong way round."""

    options: tuple[str, ...]
    within: float

    @property
    def offered(self) -> str:
        return "order these: " + " / ".join(self.options)

    def checked(self, value: Any) -> list[str]:
        found = [str(item) for item in value] if isinstance(value, (list, tuple)) else []
        if sorted(found) != sorted(self.options):
            raise ValueError(f"each of {', '.join(map(repr, self.options))} once, in order")
        return found

    def words(self, value: list[str]) -> str:
        return " > ".join(value)

    def judged(self, guess: list[str], measured: list[str]) -> tuple[bool, str]:
        place = {item: k for k, item in enumerate(measured)}
        pairs = [(a, b) for k, a in enumerate(guess) for b in guess[k + 1 :]]
        turned = sum(place[a] > place[b] for a, b in pairs)
        return turned <= self.within, f"{turned} of {len(pairs)} pairs the wrong way round" if turned else ""


@dataclass(frozen=True)
class Number:
    """A number from ``low`` to ``high``; right when at most ``within`` away."""

    low: float
    high: float
    within: float
    unit: str

    @property
    def offered(self) -> str:
        return f"a number from {self.low:g} to {self.words(self.high)}; right if at most {self.words(self.within)} off"

    def checked(self, value: Any) -> float:
        if isinstance(value, Interval):
            value = value.mean
        try:
            number = math.nan if isinstance(value, (bool, str)) else float(value)
        except (TypeError, ValueError, RuntimeError):  # of a tensor with many elements
            number = math.nan
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return number

    def words(self, value: float) -> str:
        unit = f"{'' if self.unit == '%' else ' '}{self.unit}" if self.unit else ""
        return f"{value:.3g}{unit}"

    def judged(self, guess: float, measured: float) -> tuple[bool, str]:
        gap = guess - measured
        off = f"{self.words(abs(gap))} too {'high' if gap > 0 else 'low'}" if gap else ""
        return abs(gap) <= self.within * (1 + 1e-9), off


@dataclass(frozen=True)
class Curve:
    """A height for each of the places ``at``; right when the heights are at most ``within`` off on average."""

    at: tuple[float, ...]
    low: float
    high: float
    within: float
    unit: str

    @property
    def offered(self) -> str:
        places = ", ".join(f"{x:g}" for x in self.at)
        single = Number(self.low, self.high, self.within, self.unit)
        return (
            f"a height from {self.low:g} to {single.words(self.high)} at each of {places}; right if at most "
            f"{single.words(self.within)} off on average"
        )

    def checked(self, value: Any) -> list[float]:
        single = Number(self.low, self.high, self.within, self.unit)
        heights = list(value) if hasattr(value, "__len__") and not isinstance(value, str) else []
        if len(heights) != len(self.at):
            raise ValueError(f"{len(self.at)} numbers, one for each of {', '.join(f'{x:g}' for x in self.at)}")
        return [single.checked(height) for height in heights]

    def words(self, value: list[float]) -> str:
        single = Number(self.low, self.high, self.within, self.unit)
        return ", ".join(f"{single.words(y)} at {x:g}" for x, y in zip(self.at, value, strict=True))

    def judged(self, guess: list[float], measured: list[float]) -> tuple[bool, str]:
        off = sum(abs(g - m) for g, m in zip(guess, measured, strict=True)) / len(guess)
        single = Number(self.low, self.high, self.within, self.unit)
        return off <= self.within * (1 + 1e-9), f"{single.words(off)} off on average" if off else ""


def predict(
    key: str,
    question: str,
    *,
    choices: Sequence[str] | None = None,
    ranking: Sequence[str] | None = None,
    number: tuple[float, float] | None = None,
    curve: Sequence[float] | None = None,
    between: tuple[float, float] | None = None,
    within: float | None = None,
    unit: str = "",
) -> Prediction:
    """Ask for a guess before an experiment; exactly one of ``choices``, ``ranking``, ``number`` and ``curve``.

    Parameters
    ----------
    key : chapter and letter, as ``"02.a"``.
    within : how far off still counts as right: in ``unit`` for a number, on average for a curve, in pairs that stand
        the wrong way round for a ranking (0 by default).
    between : the lowest and the highest height of a curve.

    Raises
    ------
    ValueError : a key of another form, not exactly one kind of question, or a range that is none.
    """
    require("key", key, _is_key, "chapter and letter: '02.a'")
    kinds = {"choices": choices, "ranking": ranking, "number": number, "curve": curve}
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'nothing'} given: exactly one of {', '.join(kinds)} is needed")
    asked = Prediction(key, question, _form(given[0], kinds[given[0]], between, within, unit))
    if key in _asked and (_asked[key].question, _asked[key].form) != (asked.question, asked.form):
        _seen.discard(key)
    _asked[key] = asked
    return asked


def _form(kind: str, value: Any, between: tuple[float, float] | None, within: float | None, unit: str) -> Form:
    if kind in ("choices", "ranking"):
        options = tuple(map(str, value))
        if len(options) < 2 or len(set(options)) < len(options):
            raise ValueError(f"{kind}={list(value)!r}: must be at least two different ones")
        return OneOf(options) if kind == "choices" else Order(options, within or 0)
    name, ends = ("number", value) if kind == "number" else ("between", between)
    require(name, ends, _is_range, "two numbers, the lower one first")
    require("within", within, lambda x: is_number(x) and x > 0, "a positive number: how far off still counts as right")
    assert ends is not None
    low, high = ends
    if kind == "number":
        return Number(low, high, float(within or 0), unit)
    places = tuple(float(x) for x in value)
    if len(places) < 2 or list(places) != sorted(set(places)):
        raise ValueError(f"curve={list(value)!r}: must be at least two places, in rising order")
    return Curve(places, low, high, float(within or 0), unit)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and re.fullmatch(r"\d\d\.[a-z]", key) is not None


def _is_range(ends: Any) -> bool:
    return isinstance(ends, (tuple, list)) and len(ends) == 2 and all(map(is_number, ends)) and ends[0] < ends[1]


@dataclass(frozen=True, repr=False)
class Prediction:
    """A question that was asked; made by `predict`."""

    key: str
    question: str
    form: Form

    def guess(self, value: Any, sure: float = 0.5) -> str:
        """Keep a guess, and give back what is to be said of it.

        Raises
        ------
        ValueError : a guess of another form, or a sureness other than those of ``SURE``.
        """
        require("sure", sure, lambda x: x in SURE, f"one of {', '.join(map(str, SURE))}")
        try:
            value = self.form.checked(value)
        except ValueError as allowed:
            raise ValueError(f"guess={value!r}: must be {allowed}") from None
        if self.key in _seen:
            return "The result was there before this guess, so it is not counted."
        if "hit" in self.entry:
            return "Your first guess counts, and stays."
        mine = {"guess": value, "sure": sure, "asked": self._asked}

        def edit(entry: dict[str, Any]) -> None:
            entry.clear()  # of a question that stood here before, or a guess that was thought over
            entry.update(mine)

        note = progress_file.change("predictions", self.key, edit)
        _unkept[self.key] = mine if note else {}
        return f"Your guess: {self.form.words(value)} ({SURE[sure]}).{f' ({note})' if note else ''}"

    @property
    def entry(self) -> Mapping[str, Any]:
        """What is kept of the learner's guess at this very question: ``guess``, ``sure``, and ``hit`` once answered."""
        found = progress_file.kept("predictions").get(self.key) or _unkept.get(self.key) or {}
        try:
            known = found.get("asked") == self._asked and found.get("sure") in SURE
            return {**found, "guess": self.form.checked(found["guess"])} if known else {}
        except (KeyError, ValueError):
            return {}

    @property
    def _asked(self) -> str:
        return f"{self.question} ({self.form.offered})"

    def __repr__(self) -> str:
        return f"Predict {self.key}: {self.question} ({self.form.offered})"

    def _repr_html_(self) -> str:
        return _box(BLUE, f"<strong>Predict.</strong> {_inline(self.question)}<br>{html.escape(self.form.offered)}")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        still = {"text/plain": repr(self), "text/html": self._repr_html_()}
        if progress_file.validating() or not in_notebook():
            return still
        from course_lib.lab.prediction_widgets import widget

        return {**still, **widget(self)._repr_mimebundle_()}


@dataclass(frozen=True, repr=False)
class Answer:
    """What was measured, beside what was guessed; made by `answered`."""

    prediction: Prediction
    measured: Any
    guess: Any = None
    sure: float = 0.0

    @property
    def _sentence(self) -> str:
        words = self.prediction.form.words
        said = f"Measured: {words(self.measured)}."
        if self.guess is None:
            return said
        _, off = self.prediction.form.judged(self.guess, self.measured)
        return f"You guessed {words(self.guess)} ({SURE[self.sure]}). {said}{f' {off.capitalize()}.' if off else ''}"

    @property
    def hit(self) -> bool | None:
        """Whether the guess counts as right; None without a guess."""
        return None if self.guess is None else self.prediction.form.judged(self.guess, self.measured)[0]

    @property
    def _mark(self) -> tuple[str, str]:
        return {None: ("", BLUE), True: ("✓ ", GREEN), False: ("✗ ", RED)}[self.hit]

    def __repr__(self) -> str:
        return f"{self._mark[0]}{self.prediction.key}, {self.prediction.question} {self._sentence}"

    def _repr_html_(self) -> str:
        mark, colour = self._mark
        return _box(colour, f"{mark}{_inline(self.prediction.question)} <strong>{html.escape(self._sentence)}</strong>")


def answered(key: str, value: Any, ax: Axes | None = None, axis: Literal["x", "y"] = "y") -> Answer:
    """Show what was measured beside the learner's guess, and keep whether that was right.

    Parameters
    ----------
    value : one of the choices, the ranking in order, the number (or an `Interval`), or the heights of the curve.
    ax : the figure's axes, into which the guess is drawn too: a curve as a dashed line, a number as one across
        ``axis``, a choice or an order in words.

    Raises
    ------
    ValueError : nobody asked ``key``, or the question does not allow ``value``.
    """
    prediction = _find(key)
    try:
        measured = prediction.form.checked(value)
    except ValueError as allowed:
        raise ValueError(f"value={value!r}: {key} must be answered by {allowed}") from None
    entry = prediction.entry
    found = Answer(prediction, measured, entry.get("guess"), entry.get("sure", 0.0))
    if entry and "hit" not in entry:
        progress_file.change("predictions", key, lambda kept: kept.update(hit=found.hit))
    _seen.add(key)
    if ax is not None and entry:
        _draw(ax, axis, prediction.form, entry["guess"])
    return found


def _draw(ax: Axes, axis: str, form: Form, guess: Any) -> None:
    style: dict[str, Any] = {"color": "0.35", "linestyle": (0, (4, 2)), "linewidth": 1.2, "zorder": 5}
    if isinstance(form, Curve):
        ax.plot(form.at, guess, marker="o", markersize=3, label="your guess", **style)
        ax.annotate("your guess", (form.at[-1], guess[-1]), (3, 3), textcoords="offset points", color="0.35")
    elif isinstance(form, Number) and axis == "y":
        ax.axhline(guess, **style)
        ax.annotate("your guess", (1, guess), (-3, 3), ax.get_yaxis_transform(), "offset points", ha="right")
    elif isinstance(form, Number):
        ax.axvline(guess, **style)
        ax.annotate("your guess", (guess, 1), (3, -10), ax.get_xaxis_transform(), "offset points")
    else:
        ax.annotate(f"your guess: {form.words(guess)}", (0, 1), (3, -10), "axes fraction", "offset points")


def _find(key: str) -> Prediction:
    if key in _asked:
        return _asked[key]
    raise ValueError(f"key={key!r}: must have been asked by predict before; asked: {', '.join(_asked) or 'nothing'}")


def hits(chapter: str) -> list[bool]:
    """Whether each guess of a chapter that was made and answered was right."""
    found = progress_file.kept("predictions")
    return [bool(entry["hit"]) for key, entry in sorted(found.items()) if key.startswith(chapter) and "hit" in entry]


def calibration() -> ReadableTable:
    """How often guesses of each sureness were right: sureness, what it promises, guesses, right, and what that says."""
    rows = []
    answered_ones = [entry for entry in progress_file.kept("predictions").values() if "hit" in entry]
    for sure, words in SURE.items():
        right = [bool(entry["hit"]) for entry in answered_ones if entry.get("sure") == sure]
        if right:
            rows.append((words, f"{sure:.0%}", len(right), sum(right), _verdict(sum(right), len(right), sure)))
    return ReadableTable(rows, columns=["you were", "so right in", "guesses", "right", "which says"])


def _verdict(hits: int, guesses: int, sure: float) -> str:
    if guesses < ENOUGH:
        return "too few to tell"
    low, high = wilson(hits, guesses)
    return "too sure" if high < sure else "too modest" if low > sure else "well calibrated so far"


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953)."""
    z = 1.959964
    centre, spread = hits + z * z / 2, z * math.sqrt(hits * (count - hits) / count + z * z / 4)
    return (centre - spread) / (count + z * z), (centre + spread) / (count + z * z)


def _inline(text: str) -> str:
    """Escaped, with `code` and *emphasis* as in Markdown."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)


def _box(colour: str, inner: str) -> str:
    return f'<div role="status" style="border-left:4px solid {colour};padding:0.2em 0.6em">{inner}</div>'
