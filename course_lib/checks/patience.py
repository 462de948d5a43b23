"""How long an answer may take: an end to loops without one, counted in lines of Python, since clocks differ."""

import sys
from types import FrameType
from typing import Any

from course_lib.lab.judging import Hints, Rule, Wrong

PATIENCE = 40_000_000
"""Lines of Python that an answer may take on a hidden case, some seconds' worth."""


class _TooLong(BaseException):
    """An answer takes more lines than it may; no Exception, so that it is not taken for one of the answer's own."""


def within(lines: int, message: str, hint: Hints, rule: Rule, *inputs: Any) -> Any:
    """``rule(*inputs)``; `Wrong` if it takes more lines of Python, so that a loop without end comes to one.

    What runs in C is not counted, and cannot be stopped.
    """
    left = lines

    def count(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooLong
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return rule(*inputs)
    except _TooLong:
        raise Wrong(message, hint) from None
    finally:
        sys.settrace(before)


def endless(lines: int) -> str:
    """What is said of an answer that took them all."""
    return f"your function has not come to an end after {lines / 1e6:g} million lines of Python"
