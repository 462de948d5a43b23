"""The judge on honest answers: right, wrong, unfinished, and of every kind that travels."""

import time

import pytest

from classroom.judge.judge import Answer, _Submission, judge
from classroom.judge.slices import Slice, needed
from classroom.student_copy import exercise_of, exercises
from classroom.tests.helping import QUICK, SMALL, chapter, needs_sandbox, solutions, verdict
from course_lib.lab.exercises import Outcome

pytestmark = needs_sandbox
RIGHT = "def momentum_step(w, g, v, lr, beta):\n    v = beta * v + g\n    return w - lr * v, v"


@pytest.mark.parametrize(("source", "state", "says"), [
    (RIGHT, "passed", ""),
    ("def momentum_step(w, g, v, lr, beta):\n    return w - lr * g, v", "not yet right", "the new"),
    ("def momentum_step(w, g, v, lr, beta):\n    v *= beta\n    v += g\n    return w - lr * v, v", "not yet right",
     "v in place"),
    ("def momentum_step(w, g, v, lr, beta):\n    ...", "not attempted yet", "nothing so far"),
    ("def momentum_step(w, g, v, lr, beta):\n    raise NotImplementedError", "not attempted yet", ""),
    ("def momentum_step(w, g, v, lr, beta):\n    return 1 / 0", "not yet right", "ZeroDivisionError: division by zero"),
    ("def momentum_step(w, g", "not yet right", "the cell raised SyntaxError"),
    ("def momentum_step(w, g, v, lr, beta):\n    ...\nmomentum_step = better", "not yet right",
     "the cell raised NameError: name 'better' is not defined"),
    ("momentum_step = 3", "not yet right", "a function is wanted here"),
])  # fmt: skip
def test_an_answer_gets_what_check_says_of_it(source: str, state: str, says: str) -> None:
    found = verdict(source)
    assert found.outcome.state == state
    assert says in repr(found.outcome)
    assert found.points(2) == (2 if state == "passed" else 0)


def test_all_that_follows_a_lost_process_is_judged() -> None:
    answers = [
        Answer("02.1", RIGHT, "momentum_step"),
        Answer("02.2", "while True:\n    pass", "adam_step"),
        Answer("02.4", "orthogonalise = momentum_step", "orthogonalise"),
    ]
    found = judge(answers, Slice(("import torch",), frozenset()), patience=QUICK, limits=SMALL)
    assert [verdict.outcome.state for verdict in found.values()] == ["passed", "not yet right", "not yet right"]
    assert "took too long" in found["02.2"].outcome.message
    assert "TypeError" in found["02.4"].outcome.message, "it knows of what came before"


def test_an_untouched_cell_earns_nothing_though_the_instructor_would_decide() -> None:
    network = Slice(("import torch",), frozenset())
    stub = "def train_step(model, optimizer, x, y):\n    ..."
    for source, by_hand in [(f"{stub}\n", False), (f"{stub}\n    return 1.0", True)]:
        asked = [Answer("00.6", source, "train_step", stub)]
        found = judge(asked, network, patience=QUICK, limits=SMALL)["00.6"]
        assert (found.by_hand, found.points(2)) == (by_hand, None if by_hand else 0)


@pytest.mark.parametrize(("source", "says"), [
    ("import torch\ndef accuracy_on(model, split):\n    return 1.0", "takes an argument"),
    ("def stacked(learners, top, x, y, new, folds):\n    return learners[0](x, y)", "is handed a function"),
])  # fmt: skip
def test_what_follows_an_answer_for_the_instructor_is_judged(source: str, says: str) -> None:
    number, expression = ("00.5", "accuracy_on") if "accuracy_on" in source else ("14.5", "stacked")
    answers = [Answer(number, source, expression), Answer("02.1", RIGHT, "momentum_step")]
    found = judge(answers, Slice(("import torch",), frozenset()), patience=QUICK, limits=SMALL)
    assert found[number].by_hand
    assert says in found[number].outcome.message
    assert found["02.1"].outcome.state == "passed"


def test_hints_begin_anew_with_each_submission() -> None:
    uphill = "def momentum_step(w, g, v, lr, beta):\n    v = beta * v + g\n    return w + lr * v, v"
    first, second = verdict(uphill), verdict(uphill)
    assert first.outcome.hint
    assert first == second


@pytest.mark.parametrize(("optimizer", "by_hand", "says"), [
    ("partial(Adam, lr=0.003)", False, "mean accuracy"),
    ("lambda parameters: Adam(parameters)", True, "code or an object"),
    ("partial(os.system, 'id')", True, "code or an object"),
    ("partial(torch.load, 'x')", True, "code or an object"),
])  # fmt: skip
def test_a_design_is_trained_if_it_is_made_of_known_names(optimizer: str, by_hand: bool, says: str) -> None:
    notebook = chapter("02_optimizers.ipynb")
    source = f"import os\nimport torch\nmine = replace(base, optimizer={optimizer})"
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code" and not exercise_of(cell.source)]
    found = judge([Answer("02.7", source, "mine")], needed(code, [source]), patience=QUICK, limits=SMALL)["02.7"]
    assert found.by_hand == by_hand
    assert says in repr(found.outcome) or found.outcome.state == "passed"


def test_the_process_outlives_the_trial_of_a_design(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []

    def tried(self: _Submission, exercise: str, value: object) -> Outcome:
        assert self._process is not None
        left.append(self._process._until - time.monotonic())
        return Outcome(exercise, "", "passed")

    monkeypatch.setattr(_Submission, "_tried", tried)
    judge([Answer("16.5", "reading = {}", "reading")], Slice((), frozenset()), patience=QUICK, limits=SMALL)
    assert left[0] > QUICK.design


def test_functions_as_arguments_are_called_back() -> None:
    notebook = chapter("03_learning_rate.ipynb")
    solved = solutions(notebook)
    answer = next(exercise.answer for exercise in exercises(notebook) if exercise.number == "03.2")
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code" and not exercise_of(cell.source)]
    asked = [Answer("03.2", solved["03.2"], answer)]
    found = judge(asked, needed(code, [solved["03.2"]]), patience=QUICK, limits=SMALL)
    assert found["03.2"].outcome.state == "passed"
