"""Checks of arguments at the door of a public function: each error names the argument, its value and what is allowed.

    at_least(1, epochs=epochs, batch_size=batch_size)  # ValueError: epochs=0: must be a whole number of at least 1
    require("lr", lr, lambda x: is_number(x) and x > 0, "a number above 0")

What is allowed is said in words, for the learner; the condition is for the computer.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any


def require(name: str, value: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    """Raise ValueError that names the argument, its value and what is ``allowed``, unless the value is."""
    if not holds(value):
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def at_least(least: int, **arguments: Any) -> None:
    """Raise ValueError for the first argument that is no whole number of ``least`` or more."""
    for name, value in arguments.items():
        require(name, value, lambda x: is_whole(x) and x >= least, f"a whole number of at least {least}")


def is_whole(value: Any) -> bool:
    """Whether a value is an integer, NumPy's included (True and 2.0 are not)."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number (a tensor or a bool is not)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
