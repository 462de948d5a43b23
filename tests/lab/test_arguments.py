"""Checks at the door: what is let in, and what is said of the rest."""

import math
import re

import numpy as np
import pytest
import torch

from course_lib.lab.arguments import at_least, is_number, is_whole, require


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_whole_numbers_of_at_least_one_are_let_in(value):
    at_least(1, epochs=value)
    assert is_whole(value)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None, math.nan, torch.tensor(2)])
def test_the_argument_its_value_and_what_is_allowed_are_named(value):
    said = re.escape(f"epochs={value!r}: must be a whole number of at least 1")
    with pytest.raises(ValueError, match=f"^{said}$"):
        at_least(1, width=3, epochs=value)


def test_the_least_is_let_in_and_one_less_is_not():
    at_least(0, warmup=0)
    at_least(5, k=5)
    with pytest.raises(ValueError, match="k=4: must be a whole number of at least 5"):
        at_least(5, k=4)


def test_require_says_what_is_allowed():
    require("lr", 0.1, lambda x: x > 0, "a positive number")
    with pytest.raises(ValueError, match=r"lr=-0.1: must be a positive number"):
        require("lr", -0.1, lambda x: x > 0, "a positive number")


def test_numbers_are_finite_and_real():
    assert all(map(is_number, (0, -1.5, np.float32(2))))
    assert not any(map(is_number, (True, math.inf, math.nan, "1", 1j, torch.tensor(1.0))))
