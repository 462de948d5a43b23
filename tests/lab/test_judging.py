"""Judging: what each kind of exercise says to right, mistaken and useless answers, and the helpers to write another."""

import numpy as np
import pytest
import torch

from course_lib.lab.judging import (
    Design,
    Method,
    Mistake,
    NotAttempted,
    OpenProject,
    Reading,
    Wrong,
    call,
    close,
    expect_close,
    expect_parts,
    expect_unchanged,
    parts_of,
)
from course_lib.lab.training import Diverged

X = torch.tensor([1.0, 2.0, 3.0])


def told(test, answer):
    """The message and the hints of an answer that is not right."""
    with pytest.raises(Wrong) as caught:
        test(answer)
    return caught.value.message, caught.value.hints


# Methods

DOUBLE = Method(
    "Double it",
    right=lambda x: 2 * x,
    what="the double",
    hint="Think.",
    unchanged="Copy.",
    cases={"zeros": (0 * X,), "a vector": (X,), "a matrix": (torch.eye(2),)},
    mistakes=[
        Mistake(lambda x: x.square(), "this is the square", "Add."),
        Mistake(lambda x: 3 * x, "this is three times as much", ["Less.", "Two."]),
        Mistake(lambda x: 2 * x if x.dim() == 1 else x, "matrices stay as they are"),
    ],
)


def test_a_method_that_is_right_passes():
    DOUBLE(lambda x: x + x)
    DOUBLE(lambda x: (2 * x).double())


def test_a_mistake_is_named_on_the_first_input_that_shows_it():
    assert told(DOUBLE, lambda x: x * x) == ("this is the square (on a vector)", ("Add.",))
    assert told(DOUBLE, lambda x: x + x + x) == ("this is three times as much (on a vector)", ("Less.", "Two."))
    assert told(DOUBLE, lambda x: x * len(x) ** (x.dim() == 1))[0].startswith("this is three")
    assert told(DOUBLE, lambda x: x + x if x.dim() == 1 else x) == ("matrices stay as they are (on a matrix)", ())


def test_a_mistake_that_would_have_shown_earlier_is_not_blamed():
    """On the matrix it squares, too; but it was right on the vector, where squaring is wrong."""
    message, hints = told(DOUBLE, lambda x: x + x if x.dim() == 1 else 3 * x)
    assert (message, hints) == ("the double is not right: the largest difference is 1 (on a matrix)", ("Think.",))


def test_a_rule_that_fails_on_later_inputs_is_not_asked_there():
    failing = Mistake(lambda x: 3 * x if x.dim() == 1 else 1 / 0, "three times")
    method = Method("Double it", DOUBLE.right, DOUBLE.cases, [failing])
    assert told(method, lambda x: x + x if x.dim() == 1 else x)[0].startswith("the result is not right")


def test_an_answer_that_changes_its_input_is_told_once_all_is_right():
    def meddling(x):
        return x.add_(x)

    assert told(DOUBLE, meddling) == ("your function changes its argument x in place (on a vector)", ("Copy.",))
    assert told(DOUBLE, lambda x: x.mul_(3))[0] == "this is three times as much (on a vector)"
    assert torch.equal(X, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("value", [[1, 2], (X, [3]), {"a": X}, np.ones(2), torch.tensor([True])])
def test_changes_deep_inside_are_seen(value):
    def meddling(values):
        if isinstance(values, list):
            values.append(3)
        elif isinstance(values, tuple):
            values[1][0] = 4
        elif isinstance(values, dict):
            values["a"] += 1
        else:
            values[0] = 0
        return 1

    method = Method("One", lambda values: 1, {"it": (value,)})
    assert told(method, meddling)[0] == "your function changes its argument values in place (on it)"
    method(lambda values: 1)


def test_what_is_no_answer_yet():
    for stub in (lambda x: None, lambda x: ...):
        with pytest.raises(NotAttempted):
            DOUBLE(stub)
    assert told(DOUBLE, 5)[0] == "a function is wanted here, and this is an int"
    assert told(DOUBLE, lambda x: x[9])[0].startswith("your function raised IndexError: index 9 is out of bounds")


def test_a_return_that_one_branch_lacks_is_a_mistake_and_no_empty_cell():
    method = Method("Twice", lambda x: 2 * x, {"a small one": (1.0,), "a large one": (9.0,)})
    message, hints = told(method, lambda x: 2 * x if x < 5 else None)
    assert (message, *hints) == (
        "your function returns nothing for some inputs (on a large one)", "Does every way through it end in a return?"
    )  # fmt: skip


def test_a_method_may_ask_in_its_own_way_and_judge_by_its_own_rule():
    def explain(found, right, steps):
        raise Wrong(f"{found} is too low")

    method = Method(
        "A sequence",
        right=lambda step: step,
        cases={"three steps": (3,)},
        ask=lambda rule, steps: [rule(step) for step in range(steps)],
        agree=lambda found, right, steps: all(f >= r for f, r in zip(found, right, strict=True)),
        explain=explain,
    )
    method(lambda step: step + 1)
    assert told(method, lambda step: step - 1)[0] == "[-1, 0, 1] is too low (on three steps)"


def test_several_results_are_judged_part_by_part():
    method = Method("Two", lambda x: (x, 2 * x), {"a vector": (X,)}, what=("the new w", "the new v"), hint="Both.")
    method(lambda x: [x, x + x])
    method(lambda x: np.stack([x.numpy(), 2 * x.numpy()]))
    assert told(method, lambda x: (x, x))[0] == "the new v is not right: the largest difference is 3 (on a vector)"
    wanted = "your function should return 2 values (w, v), and returns"
    assert told(method, lambda x: x) == (f"{wanted} one value (on a vector)", ("Both.",))
    assert told(method, lambda x: (x, x, x))[0] == f"{wanted} 3 values (on a vector)"


# Readings, designs, open projects

READING = Reading(
    "Who?", ("Ada", "b"), {"Ada": "", "Ben": "Ben is slow"}, {"a": "no", "b": ""}, hint="Look.", reason_hint="Why?"
)


def test_a_reading():
    for answer in [("Ada", "b"), [" ada.", "B)"]]:
        READING(answer)
    assert told(READING, ("Ben", "b")) == ("Ben is slow", ("Look.",))
    assert told(READING, ("Ada", "a")) == ("the name is right, the reason is not: no", ("Why?",))
    assert told(READING, ("Eve", "b")) == ("there is no name 'Eve'", ("There are Ada, Ben.",))
    assert told(READING, ("Ada", "c")) == ("there is no reason 'c'", ("The reasons are a, b.",))
    for answer in ("Ada", ("Ada",), 3, ("Ada", 3), (3, "b")):
        assert told(READING, answer)[0] == "the name and the letter of a reason are wanted"


def test_a_reading_of_a_number():
    reading = Reading(
        "How much?", (0.35, "b"), {0.7: "both halves"}, {"a": "no", "b": ""}, within=0.05, called="share", hint="Half."
    )
    for number in (0.35, 0.31, torch.tensor(0.39)):
        reading((number, "b"))
    assert told(reading, (0.68, "b")) == ("both halves", ("Half.",))
    assert told(reading, (0.5, "b")) == ("the share is not right: 0.5 is more than 0.05 off", ("Half.",))
    assert told(reading, (0.35, "a"))[0] == "the share is right, the reason is not: no"
    for number in ("many", None, [1, 2]):
        assert told(reading, (number, "b"))[0] == "the share and the letter of a reason are wanted"


def test_a_design_is_judged_by_its_mean_over_the_hidden_seeds():
    def admit(answer):
        if not callable(answer):
            raise Wrong("wanted is a function")

    design = Design("Reach it", admit, lambda answer, seed: answer(seed), seeds=(1, 2, 3), least=2.0, hint="More.")
    design(lambda seed: seed)
    assert told(design, lambda seed: seed - 0.5) == (
        "a mean accuracy of 1.500 over 3 hidden seeds; at least 2.0 is wanted", ("More.",)
    )  # fmt: skip
    assert told(design, lambda seed: float("nan"))[0].startswith("a mean accuracy of nan")
    assert told(design, 3)[0] == "wanted is a function"
    assert told(design, lambda seed: [][0])[0] == "your design raised IndexError: list index out of range"

    def diverging(seed):
        raise Diverged("the loss is NaN", 3, 5, 0.1)

    message, hints = told(design, diverging)
    assert message.startswith("the run diverged: ")
    assert hints == ("A smaller learning rate.",)
    assert told(design, lambda seed: expect_close(1.0, 2.0, what="it"))[0].startswith("it is not right")
    with pytest.raises(NotAttempted):
        design(lambda seed: call(lambda: None))


def test_an_open_project_wants_a_mark_for_each_point():
    project = OpenProject("Try it", ["runs", "report"])
    project({"runs": "there", "report": "done well"})
    assert told(project, {"runs": "missing", "report": "missing"})[0].endswith("still missing: runs, report")
    assert told(project, {"runs": "fine", "report": "there"})[0] == "there is no mark 'fine' (for runs)"
    for answer in ("my notes", {"runs": "there"}, {"runs": "there", "report": "there", "more": "there"}):
        message, (hint,) = told(project, answer)
        assert message == "a mark is wanted for each point of the rubric: runs, report"
        assert hint == 'The marks are "missing", "there", "done well".'


# Helpers


def wrong(*args, **kwargs):
    with pytest.raises(Wrong) as caught:
        expect_close(*args, what="the loss", hint="Think.", on="a batch", **kwargs)
    assert caught.value.hints == ("Think.",)
    return caught.value.message


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "the loss should have shape [3, 2], and has [2, 3] (on a batch)"),
        (torch.ones(1), 1.0, "the loss should have shape [], and has [1] (on a batch)"),
        (
            torch.ones(2).double(),
            torch.ones(2),
            "the loss should be float32 like its input, and is float64 (on a batch)",
        ),
        (torch.tensor([1, torch.nan]), torch.ones(2), "the loss is not finite: it holds NaN or infinity (on a batch)"),
        (torch.tensor([1.0, 3.5]), torch.ones(2), "the loss is not right: the largest difference is 2.5 (on a batch)"),
        (2.5, 1.0, "the loss is not right: the difference is 1.5 (on a batch)"),
        ("one", 1.0, "the loss should be a number, and is a str (on a batch)"),
        ((1.0, "a"), torch.ones(2), "the loss should be a tensor, and is a tuple of 2 (on a batch)"),
        (object(), 1.0, "the loss should be a number, and is an object (on a batch)"),
    ],
)
def test_expect_close_says_what_differs(found, expected, message):
    assert wrong(found, expected) == message


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.ones(2) + 1e-7, torch.ones(2)),
        (1.0, 1.0),
        (torch.tensor(1.0), 1.0),
        (torch.ones(()).double(), 1.0),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        ([1.0, 2.0], torch.tensor([1.0, 2.0])),
        (torch.tensor([3, 4]), torch.tensor([3, 4])),
    ],
)
def test_expect_close_accepts(found, expected):
    expect_close(found, expected, what="the loss")


def test_expect_close_keeps_to_its_tolerances():
    expect_close(1.04, 1.0, what="the loss", rtol=0.05)
    with pytest.raises(Wrong):
        expect_close(1.06, 1.0, what="the loss", rtol=0.05)


def test_close_compares_tuples_part_by_part():
    assert close((X, 1.0), (X.clone(), 1.0))
    assert close([X, 1.0], (X, 1.0))
    assert not close((X, 1.0), (X, 2.0))
    assert not close((X,), (X, 1.0))
    assert not close(X, (X, 1.0))
    assert not close("a", 1.0)
    assert not close(torch.ones(3, 1), torch.ones(3))


def test_expect_unchanged_names_the_argument():
    def second(w, g):
        g.mul_(2)
        return w

    expect_unchanged(lambda w, g: w * g, X, X)
    with pytest.raises(Wrong, match="changes its argument g in place") as caught:
        expect_unchanged(second, X, X.clone(), hint="Copy it.")
    assert caught.value.hints == ("Copy it.",)


def test_call_copies_modules_lists_and_gradients():
    layer, numbers, weight = torch.nn.Linear(2, 2), [1, 2], torch.ones(2, requires_grad=True)

    def meddle(layer, numbers, weight):
        layer.weight.data.zero_()
        numbers.append(3)
        assert weight.requires_grad
        return 1

    call(meddle, layer, numbers, weight)
    assert layer.weight.abs().sum() > 0
    assert numbers == [1, 2]


def test_parts_are_counted():
    assert parts_of((1, 2), ("the new w", "v")) == (1, 2)
    with pytest.raises(Wrong, match=r"should return 2 values \(w, v\), and returns one value"):
        parts_of(X, ("the new w", "v"))
    expect_parts(X, X, what="it")
    with pytest.raises(Wrong, match="v is not right"):
        expect_parts((X, 1.0), (X, 2.0), what=("w", "v"))
