"""Values over the pipe: what arrives is what was sent, and what was made up is refused."""

import functools
import io
from typing import Any

import numpy as np
import pytest
import torch

from classroom.judge import wire
from course_lib.capstone import applied
from course_lib.early_stopping import Patience
from course_lib.lab import random_shift
from course_lib.lab.training import Recipe
from course_lib.optimizers import Adam
from course_lib.preprocessing import compose, random_crop, random_flip
from course_lib.schedules import one_cycle, reduce_on_plateau, schedule

VALUES: list[Any] = [
    None, True, "words", 3, -(10**30), 0.1, float("inf"), ..., (1, [2.0, "x"], {"a": torch.ones(2)}),
    torch.tensor([[1.5, 2.0]], dtype=torch.bfloat16), torch.tensor(3), torch.empty(0, 4), torch.tensor([True, False]),
    torch.tensor([1 + 2j]), {"a": {"b", "c"}}, set(), torch.arange(4.0)[1:2].expand(1), torch.ones(3, 2)[:1, 1],
]  # fmt: skip


def named(value: Any) -> str:
    """A case by its type: addresses and the order of sets differ between the processes that share the tests."""
    return type(value).__name__


@pytest.mark.parametrize("value", VALUES, ids=named)
def test_what_is_sent_arrives(value: Any) -> None:
    same(wire.decode(wire.encode(value)), value)


def same(found: Any, value: Any) -> None:
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert found.dtype == value.dtype
        assert torch.equal(found, value)
    elif isinstance(value, (tuple, list)):
        for one, other in zip(found, value, strict=True):
            same(one, other)
    elif isinstance(value, dict):
        same(list(found.items()), list(value.items()))
    else:
        assert found == value


def test_arrays_and_gradients_arrive() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1]
    np.testing.assert_array_equal(wire.decode(wire.encode(array)), array)
    assert wire.decode(wire.encode(torch.ones(2, requires_grad=True))).requires_grad


def test_a_function_travels_as_its_place() -> None:
    functions: list[Any] = []
    said = wire.encode((1.0, len), functions)
    assert functions == [len]
    assert wire.decode(said, lambda number: f"function {number}") == (1.0, "function 0")


def test_a_design_is_rebuilt_where_designs_are_allowed() -> None:
    recipe = Recipe(epochs=3, optimizer=functools.partial(Adam, lr=0.01))
    said = wire.encode(recipe)
    with pytest.raises(wire.Unfit):
        wire.decode(said)
    made = wire.decode(said, designs=True)
    assert (made.epochs, made.optimizer.func, made.optimizer.keywords) == (3, Adam, {"lr": 0.01})


@pytest.mark.parametrize("design", [
    functools.partial(random_shift, pixels=1), schedule(one_cycle, pct_start=0.3), reduce_on_plateau(), Patience(3),
    compose(random_flip, functools.partial(random_crop, padding=2)), applied().lasting(6),
], ids=named)  # fmt: skip
def test_what_the_chapters_put_into_designs_travels(design: Any) -> None:
    assert repr(wire.decode(wire.encode(design), designs=True)) == repr(design)


@pytest.mark.parametrize("path", [
    "os:system", "torch:load", "torch.optim:torch", "course_lib.lab.training:torch", "course_lib.checks.chapter_02:x",
    "course_lib.optimizers:_private", "course_lib.schedules.shapes:_at",
    "torch.optim.sgd:__import__", "builtins:eval", "torch.optim.sgd:SGD.step",
])  # fmt: skip
def test_other_names_are_refused(path: str) -> None:
    with pytest.raises(wire.Unfit):
        wire.decode({"named": path}, designs=True)


@pytest.mark.parametrize("value", [object(), slice(1), torch.nn.Linear(1, 1), functools.partial(print, 1)], ids=named)
def test_objects_do_not_travel(value: Any) -> None:
    with pytest.raises(wire.Unfit):
        wire.encode(value)


@pytest.mark.parametrize("said", [
    3, [], {}, {"?": 1}, {"i": []}, {"f": "x"}, {"t": "AAAA", "d": "float32", "s": [9]},
    {"t": "", "d": "object", "s": []}, {"a": "AAAA", "d": "O", "s": []}, {"dict": [[{"list": []}, 1]]}, {"call": 0},
])  # fmt: skip
def test_what_no_encoding_made_raises_one_of_the_errors_that_are_awaited(said: Any) -> None:
    with pytest.raises((wire.Unfit, KeyError, TypeError, ValueError, RuntimeError)):
        wire.decode(said)


def test_a_message_has_a_largest_size() -> None:
    with pytest.raises(wire.Unfit, match="may travel"):
        wire.send(io.BytesIO(), {"value": "x" * wire.LARGEST})
