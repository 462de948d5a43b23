"""How exercises are judged: the kinds of exercise that the authors of checks fill in as tables.

The checks of chapter NN stand in ``course_lib/checks/chapter_NN.py`` as ``exercise_1``, ``exercise_2``, …: one of
these kinds, or a function of the answer whose docstring's first line is the exercise's title. It returns nothing when
the answer is right and raises `Wrong` when it is not.

| kind | what the learner hands in | what the author writes down |
| --- | --- | --- |
| `Method` | a function, written or mended | the right one, hidden inputs, usual mistakes with their hints |
| `Reading` | what a figure says, and the letter of the reason | what is wrong with each other choice and reason |
| `Design` | settings that reach a score | a score on hidden seeds, and how high it must be |
| `OpenProject` | a mark for each point of a rubric | the points |

    exercise_1 = Method(
        "The sign of a step",
        right=lambda w: -w.sign(),
        cases={"a vector": (torch.tensor([2.0, -3.0]),)},
        mistakes=[Mistake(lambda w: w.sign(), "the step goes uphill", "Which way is down?")],
        what="the step",
    )

A check of another kind uses the same helpers: `call`, `close`, `expect_close`, `expect_unchanged`.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from course_lib.lab.training import Diverged

Rule = Callable[..., Any]
Hints = str | Sequence[str]  # one, or several that are given one by one
Case = tuple[Any, ...]

UNCHANGED = (
    "Which of your lines writes into a tensor or a list that the caller still needs?",
    "x += … and x.mul_(…) change what you were handed; x = x + … makes a new one.",
)


class OfThisAnswer(str):
    """A hint with the answer's own numbers in it. With other numbers in it, a list of hints goes on where it was."""


class Wrong(Exception):
    """Raised by a check: what is wrong, in the learner's terms, and a hint, or several that are given one by one."""

    def __init__(self, message: str, hint: Hints = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hints = (hint,) if isinstance(hint, str) else tuple(hint)


class NotAttempted(Exception):
    """Raised when the answer is still the stub."""


@dataclass(frozen=True)
class Mistake:
    """A usual mistake: what it computes, what is wrong with it, and hints."""

    rule: Rule
    message: str
    hint: Hints = ()


def _as_it_is(rule: Rule, *case: Any) -> Any:
    return rule(*case)


@dataclass(frozen=True)
class Method:
    """Write a method, or find the bug in one: a function that should do what ``right`` does.

    A result that is not right is put down to the first mistake that gives the same, on this case and on all before
    it; to no mistake, if there is none such. At last the answer must have left its tensors, arrays and lists alone.

    Parameters
    ----------
    cases
        The hidden inputs, by what they are called to the learner: "a wide matrix". First those that tell the mistakes
        from each other.
    what
        The name of the result; of each part, if there are several.
    hint
        For a result that no mistake explains.
    ask : ``(rule, *case) -> result``
        How a rule, the answer's or a mistake's, is put to a case: several calls, or one with inputs of its own.
    agree : ``(found, right, *case) -> bool``
        Whether a result is right, where equal ones are not the only right ones.
    explain : ``(found, right, *case)``
        Raises `Wrong` for a result that no mistake explains; without it, or when it returns, `expect_parts` does.
    unchanged
        Hints for an answer that changes what it was handed.
    """

    title: str
    right: Rule
    cases: Mapping[str, Case]
    mistakes: Sequence[Mistake] = ()
    what: str | Sequence[str] = "the result"
    hint: Hints = ()
    ask: Rule = _as_it_is
    agree: Rule | None = None
    explain: Rule | None = None
    unchanged: Hints = UNCHANGED
    rtol: float = 1e-5
    atol: float = 1e-7

    def __call__(self, answer: Any) -> None:
        _expect_function(answer)
        before: list[Case] = []
        meddled = ""
        for on, case in self.cases.items():
            changed: list[str] = []
            try:
                self._judge(self.ask(_watched(answer, changed, bool(before)), *map(_copy, case)), case, before)
            except Wrong as wrong:
                raise Wrong(f"{wrong.message} (on {on})", wrong.hints) from None
            if changed and not meddled:
                meddled = f"your function changes its argument {changed[0]} in place (on {on})"
            before.append(case)
        if meddled:
            raise Wrong(meddled, self.unchanged)

    def _judge(self, found: Any, case: Case, before: Sequence[Case]) -> None:
        if self._is_right(found, case):
            return
        for mistake in self.mistakes:
            made = all(self._is_right(self.ask(mistake.rule, *earlier), earlier) for earlier in before)
            if made and self._close(found, self.ask(mistake.rule, *case)):
                raise Wrong(mistake.message, mistake.hint)
        right = self.ask(self.right, *case)
        if self.explain:
            self.explain(found, right, *case)
        expect_parts(found, right, what=self.what, hint=self.hint, rtol=self.rtol, atol=self.atol)

    def _is_right(self, found: Any, case: Case) -> bool:
        right = self.ask(self.right, *case)
        return self.agree(found, right, *case) if self.agree else self._close(found, right)

    def _close(self, found: Any, expected: Any) -> bool:
        return close(found, expected, rtol=self.rtol, atol=self.atol)


@dataclass(frozen=True)
class Reading:
    """Read a figure: a choice, or a number read off it, and the letter of the reason.

    Parameters
    ----------
    right
        The choice and the reason; of a number, what it should be.
    choices
        What is wrong with each choice; nothing (``""``) with the right one. For a number, what is wrong with each
        number that is a usual misreading.
    reasons
        What is wrong with each reason, by its letter; nothing with the right one.
    hint, reason_hint
        For a wrong choice, and for a wrong reason.
    within
        How far a number may be off.
    called
        What a choice is: "name", "line".
    """

    title: str
    right: tuple[str | float, str]
    choices: Mapping[Any, str]
    reasons: Mapping[str, str]
    hint: Hints = ()
    reason_hint: Hints = ()
    within: float = 0.0
    called: str = "name"

    def __call__(self, answer: Any) -> None:
        if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not isinstance(answer[1], str):
            raise self._unreadable()
        reason = answer[1].strip(" .()").lower()
        if reason not in self.reasons:
            raise Wrong(f"there is no reason {answer[1]!r}", f"The reasons are {', '.join(self.reasons)}.")
        (self._judge_choice if isinstance(self.right[0], str) else self._judge_number)(answer[0])
        if reason != self.right[1]:
            raise Wrong(f"the {self.called} is right, the reason is not: {self.reasons[reason]}", self.reason_hint)

    def _unreadable(self) -> Wrong:
        example = next(iter(self.choices)) if isinstance(self.right[0], str) else 1.5
        return Wrong(f"the {self.called} and the letter of a reason are wanted", f'For instance: {example!r}, "a"')

    def _judge_choice(self, found: Any) -> None:
        if not isinstance(found, str):
            raise self._unreadable()
        named = {choice.lower(): choice for choice in self.choices}
        choice = named.get(found.strip(" .()").lower())
        if choice is None:
            raise Wrong(f"there is no {self.called} {found!r}", f"There are {', '.join(self.choices)}.")
        if choice != self.right[0]:
            raise Wrong(self.choices[choice], self.hint)

    def _judge_number(self, found: Any) -> None:
        value = _as_tensor(found)
        if value is None or value.numel() != 1:
            raise self._unreadable()
        if abs(value.item() - float(self.right[0])) <= self.within:
            return
        for misread, message in self.choices.items():
            if abs(value.item() - misread) <= self.within:
                raise Wrong(message, self.hint)
        raise Wrong(f"the {self.called} is not right: {value.item():g} is more than {self.within:g} off", self.hint)


@dataclass(frozen=True)
class Design:
    """Design a run: something whose mean ``score(answer, seed)`` on hidden seeds is at least ``least``.

    ``admit(answer)`` raises `Wrong` for an answer of the wrong kind, or beyond its budget. ``afterwards(answer)`` is
    called when the design has passed and that is recorded. It is no part of the judgement; what it returns is added to
    the note.
    """

    title: str
    admit: Callable[[Any], None]
    score: Callable[[Any, int], float]
    seeds: Sequence[int]
    least: float
    hint: Hints = ()
    diverged: Hints = "A smaller learning rate."
    what: str = "a mean accuracy"
    afterwards: Callable[[Any], str] | None = None

    def __call__(self, answer: Any) -> None:
        self.admit(answer)
        mean = float(np.mean([self._scored(answer, seed) for seed in self.seeds]))
        if not mean >= self.least:
            missed = f"{self.what} of {mean:.3f} over {len(self.seeds)} hidden seeds; at least {self.least} is wanted"
            raise Wrong(missed, self.hint)

    def _scored(self, answer: Any, seed: int) -> float:
        try:
            return self.score(answer, seed)
        except (Wrong, NotAttempted):
            raise
        except Diverged as error:
            raise Wrong(f"the run diverged: {error}", self.diverged) from None
        except Exception as error:  # what the learner wrote may fail in any way
            raise Wrong(f"your design raised {type(error).__name__}: {error}") from None


MARKS = ("missing", "there", "done well")


@dataclass(frozen=True)
class OpenProject:
    """An open project, judged by the learner: a mark, of `MARKS`, for each point of the rubric.

    It is done when no point is missing.
    """

    title: str
    rubric: Sequence[str]

    def __call__(self, answer: Any) -> None:
        points, marks = ", ".join(self.rubric), ", ".join(f'"{mark}"' for mark in MARKS)
        if not isinstance(answer, Mapping) or set(answer) != set(self.rubric):
            raise Wrong(f"a mark is wanted for each point of the rubric: {points}", f"The marks are {marks}.")
        for point, mark in answer.items():
            if mark not in MARKS:
                raise Wrong(f"there is no mark {mark!r} (for {point})", f"The marks are {marks}.")
        if missing := [point for point in self.rubric if answer[point] == "missing"]:
            raise Wrong(f"by your own rubric there is still missing: {', '.join(missing)}")


# Helpers


def call(answer: Any, *inputs: Any, on: str = "") -> Any:
    """``answer(*inputs)`` on copies of the inputs; ``on`` describes them to the learner, as in "a wide matrix".

    Raises `Wrong` if the answer is no function or raises an error, and ends the check as "not attempted yet" if it
    returns nothing.
    """
    return _called(answer, [_copy(value) for value in inputs], f" (on {on})" if on else "")


def _called(answer: Any, inputs: Sequence[Any], where: str = "") -> Any:
    _expect_function(answer)
    try:
        result = answer(*inputs)
    except NotImplementedError as error:
        raise NotAttempted(str(error)) from None
    except Exception as error:  # an answer may fail in any way; the learner needs its words, not our traceback
        said = str(error).strip().splitlines()
        message = f": {said[0]}" if said else ""
        raise Wrong(f"your function raised {type(error).__name__}{message}{where}") from None
    if result is None or result is ...:
        raise NotAttempted(f"{getattr(answer, '__name__', 'your function')} returns nothing so far")
    return result


def _expect_function(answer: Any) -> None:
    if not callable(answer):
        raise Wrong(f"a function is wanted here, and this is {_kind(answer)}")


def _watched(answer: Any, changed: list[str], answered: bool = False) -> Rule:
    """The answer as a rule, which adds the name of each argument that it changes to ``changed``.

    ``answered``: it has returned something before, so that to return nothing now is a mistake, and no empty cell.
    """

    def rule(*inputs: Any) -> Any:
        before = [_copy(value) if isinstance(value, _DATA) else None for value in inputs]
        nonlocal answered
        try:
            result = _called(answer, inputs)
        except NotAttempted:
            if not answered:
                raise
            raise Wrong("your function returns nothing for some inputs",
                        "Does every way through it end in a return?") from None  # fmt: skip
        answered = True
        for position, (old, new) in enumerate(zip(before, inputs, strict=True)):
            if old is not None and not _same(old, new):
                changed.append(_argument_names(answer, len(inputs))[position])
        return result

    return rule


def expect_close(
    found: Any,
    expected: Any,
    *,
    what: str,
    hint: Hints = (),
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
    rounded = close(found, expected, rtol=1e-3, atol=1e-3)  # else the type is not what is wrong
    if rounded and isinstance(expected, Tensor) and isinstance(found, Tensor) and values.dtype != right.dtype:
        raise Wrong(f"{what} should be {_dtype(right)} like its input, and is {_dtype(values)}{where}", hint)
    if right.isfinite().all() and not values.isfinite().all():
        raise Wrong(f"{what} is not finite: it holds NaN or infinity{where}", hint)
    if not close(found, expected, rtol=rtol, atol=atol):
        gap = (values.detach().cpu().double() - right.detach().cpu().double()).abs().max().item()
        largest = "the largest difference" if values.numel() > 1 else "the difference"
        raise Wrong(f"{what} is not right: {largest} is {gap:.2g}{where}", hint)


def expect_parts(
    found: Any, expected: Any, *, what: str | Sequence[str], hint: Hints = (), rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """As `expect_close`, and for a tuple ``expected`` of as many parts as ``what`` has names: part by part."""
    if isinstance(what, str):
        return expect_close(found, expected, what=what, hint=hint, rtol=rtol, atol=atol)
    for name, part, wanted in zip(what, parts_of(found, what, hint), expected, strict=True):
        expect_close(part, wanted, what=name, hint=hint, rtol=rtol, atol=atol)


def parts_of(found: Any, names: Sequence[str], hint: Hints = ()) -> Sequence[Any]:
    """The values that a function returned; raises `Wrong` unless there are as many as names."""
    parts = _parts(found)
    if parts is None or len(parts) != len(names):
        got = "one value" if parts is None else f"{len(parts)} values"
        wanted = ", ".join(name.removeprefix("the new ") for name in names)
        raise Wrong(f"your function should return {len(names)} values ({wanted}), and returns {got}", hint)
    return parts


def close(found: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-7) -> bool:
    """Whether two tensors or numbers, or two tuples of them, agree in shape and values; False for anything else."""
    if isinstance(expected, (tuple, list)):
        parts = _parts(found)
        return (
            parts is not None
            and len(parts) == len(expected)
            and all(close(f, e, rtol=rtol, atol=atol) for f, e in zip(parts, expected, strict=True))
        )
    values, right = _as_tensor(found), torch.as_tensor(expected)
    if values is None or values.shape != right.shape:
        return False
    values, right = values.detach().cpu().double(), right.detach().cpu().double()
    return torch.allclose(values, right, rtol=rtol, atol=atol, equal_nan=True)


def expect_unchanged(answer: Rule, *inputs: Any, hint: Hints = UNCHANGED, on: str = "") -> None:
    """Raise `Wrong` if ``answer(*inputs)`` changes a tensor, an array or a list in place, naming the argument."""
    changed: list[str] = []
    _watched(answer, changed)(*map(_copy, inputs))
    if changed:
        raise Wrong(f"your function changes its argument {changed[0]} in place{f' (on {on})' if on else ''}", hint)


_DATA = (Tensor, np.ndarray, list, tuple, dict)


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, (list, tuple)):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(_same(before[key], after[key]) for key in before)
    if isinstance(before, (Tensor, np.ndarray)):
        return close(after, before, rtol=0, atol=0)
    return before == after if isinstance(before, (int, float, str)) else True


def _parts(found: Any) -> Sequence[Any] | None:
    """The values that a function returned together, if there are several."""
    if isinstance(found, np.ndarray) and found.ndim:
        return list(found)
    return found if isinstance(found, (tuple, list)) else None


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


def _argument_names(answer: Rule, count: int) -> list[str]:
    try:
        names = list(inspect.signature(answer).parameters)
    except (TypeError, ValueError):
        names = []
    return [*names, *(str(position + 1) for position in range(len(names), count))]
