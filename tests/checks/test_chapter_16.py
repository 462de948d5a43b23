"""Checks of chapter 16: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import json
import math
import re
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from course_lib.capstone import Entry, Result, quick_net
from course_lib.checks import chapter_16
from course_lib.checks.chapter_16 import LEAVE_ONE_OUT
from course_lib.efficiency.ladder import Rounds, log_ratio
from course_lib.lab.exercises import check
from course_lib.lab.training import Recipe, fit
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "16_capstone.ipynb"
needs_the_notebook = pytest.mark.skipif(not (checking.NOTEBOOKS / NOTEBOOK).exists(), reason="the notebook is to come")

READ = {
    "most": "quick network",
    "cannot tell": {"SGD with momentum", "one cycle"},
    "hurts": {"channels last, bf16"},
}


# Other right answers


def by_statistics(seconds, scores, target):
    return sum(scores) >= target * len(scores), statistics.median(seconds)


def by_torch(seconds, scores, target):
    return torch.tensor(scores).mean() >= target, torch.tensor(seconds).quantile(0.5)


def by_the_ladder(before, after):
    found = log_ratio(before, after)
    return found.ratio, found.low, found.high


def by_scipy(before, after):
    """The interval of a one-sample t-test of the logarithms against 0."""
    low, high = stats.ttest_1samp(np.log(before) - np.log(after), 0).confidence_interval(0.95)
    return stats.gmean(before / after), np.exp(low), np.exp(high)


def by_dividing(alone, together):
    for single in alone.values():
        together /= single
    return together


def by_logarithms(alone, together):
    return math.exp(math.log(together) - sum(map(math.log, alone.values())))


def by_counting(examples, batch, epochs, seconds_a_step):
    return seconds_a_step * sum(len(range(0, examples, batch)) for _ in range(epochs))


def by_the_interval(mean, deviation, target, confidence=0.95):
    """The lower end of a two-sided interval that is wrong on each side as often as the one-sided one."""
    n = 2
    while deviation and stats.t.interval(2 * confidence - 1, n - 1, mean, deviation / math.sqrt(n))[0] < target:
        n += 1
    return np.int64(n)


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, of rounds that all give the same ratio
@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("16.1", by_statistics), ("16.1", by_torch), ("16.2", by_the_ladder), ("16.2", by_scipy),
        ("16.3", by_dividing), ("16.3", by_logarithms), ("16.4", by_counting), ("16.8", by_the_interval),
    ],
)  # fmt: skip
def test_another_right_answer_passes(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


# What stands in no table


def test_a_wrong_verdict_is_told_in_words():
    def two_at_least(seconds, scores, target):
        return len(scores) > 1 and statistics.fmean(scores) >= target, statistics.median(seconds)

    message = r"you say that the entry does not qualify \(on a single run\)"
    checking.assert_hinted("16.1", two_at_least, message, "One score")


def test_a_loop_that_never_gets_there_has_forgotten_the_root():
    def forgets_the_root(mean, deviation, target, confidence=0.95):
        n = 2
        while mean - stats.t.ppf(confidence, n - 1) * deviation < target:
            n += 1
        return n

    checking.assert_hinted("16.8", forgets_the_root, "not divided by the root of n", "How far does the mean")


def test_a_loop_without_end_comes_to_one(monkeypatch):
    monkeypatch.setattr(chapter_16, "PATIENCE", 3_000)

    def for_ever(mean, deviation, target, confidence=0.95):
        n = 0.0
        while deviation:
            n += 1
        return 2

    checking.assert_hinted("16.8", for_ever, "has not come to an end", "Print the lower end")


@pytest.mark.parametrize("answer", [lambda *plan: 2.5, lambda *plan: True, lambda *plan: "3", lambda *plan: [1, 2]])
def test_a_number_of_runs_is_a_whole_number(answer):
    checking.assert_hinted("16.8", answer, "should be a whole number", "Try n = 2")


# The table of rungs left out


def test_the_table_says_what_the_check_says():
    seconds = {name: np.array(values) for name, values in LEAVE_ONE_OUT.items()}
    found = {name: log_ratio(values, seconds["all rungs"]) for name, values in seconds.items() if name != "all rungs"}
    assert {len(values) for values in LEAVE_ONE_OUT.values()} == {8}
    assert {name for name, each in found.items() if not each.differs} == {f"without {n}" for n in READ["cannot tell"]}
    assert {name for name, each in found.items() if each.high < 1} == {f"without {n}" for n in READ["hurts"]}
    assert max(found, key=lambda name: found[name].low) == f"without {READ['most']}"
    assert max(found, key=lambda name: found[name].ratio) == "without one cycle", "whoever forgets the interval"
    shown = [f"{each.ratio:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in found.values()]
    source = re.sub(r"\s+", " ", Path(chapter_16.__file__).read_text())
    assert all(figures in source for figures in shown), shown


@pytest.mark.parametrize(
    "answer",
    [
        READ,
        {"most": ["Quick Network"], "cannot tell": ["one cycle", "sgd with momentum"], "hurts": "channels last, bf16"},
        {"most": "without quick network", "cannot tell": ("one cycle", "SGD with momentum"), "hurts": READ["hurts"]},
    ],
)
def test_the_table_is_read_right(answer):
    assert check("16.5", answer).state == "passed"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"most": "one cycle"}, "nobody knows that it is worth most", "lower end"),
        ({"most": "small batches"}, "small batches is not worth most", "round by round"),
        ({"cannot tell": {"one cycle"}}, "SGD with momentum cannot be told from 1: .* 0.98 to 1.03", "eight ratios"),
        ({"cannot tell": {"SGD with momentum"}}, "one cycle cannot be told from 1: .* 8.9", "eight ratios"),
        ({"cannot tell": {*READ["cannot tell"], "small batches"}}, "small batches can be told .* paired", "eight"),
        ({"hurts": set()}, "channels last, bf16 hurts, and you do not say so", "eight ratios"),
        ({"hurts": {*READ["hurts"], "small batches"}}, "small batches is not known to hurt", "eight ratios"),
        ({"most": {"quick network", "one cycle"}}, "should be one rung", "For instance"),
        ({"most": "Adam"}, "there is no rung 'Adam'", "There are whole batches; SGD"),
        ({"hurts": 3}, "'hurts' should be names of rungs", "For instance"),
        ({"other": 3}, "expected a dict with 'most', 'cannot tell', 'hurts'", "For instance"),
    ],
)
def test_a_wrong_reading_is_told_what_is_wrong(change, message, hint):
    checking.assert_hinted("16.5", {**READ, **change}, message, hint)


@pytest.mark.parametrize("answer", [..., None, dict.fromkeys(READ, ...), {**READ, "cannot tell": {...}}])
def test_a_table_that_is_not_read_is_not_attempted(answer):
    checking.assert_not_attempted("16.5", answer)


# The race


@pytest.fixture
def small(monkeypatch):
    """A hundred digits, of which nothing is expected; nobody is timed."""
    data = chapter_16.load("glyphs", classes="digits", size=16, count=300, train_size=100, val_size=100, test_size=100)
    task = chapter_16.Task(data, 0.0)
    monkeypatch.setattr(chapter_16, "_drawn", lambda: (task, data.test))
    monkeypatch.setattr(chapter_16, "exercise_6", replace(chapter_16.exercise_6, least=0.0))
    monkeypatch.setattr(chapter_16, "race", lambda *args: pytest.fail("somebody was timed"))
    return data


SHORT = Recipe(epochs=1, batch_size=50)


@pytest.mark.parametrize("answer", [SHORT, Entry(quick_net, SHORT), Entry(quick_net, SHORT, per_image=True),
                                    Entry(quick_net, SHORT, channels_last=True)])  # fmt: skip
def test_a_recipe_and_an_entry_take_part_and_validation_times_nobody(small, answer):
    assert repr(check("16.6", answer)) == "✓ Exercise 16.6 passed: Your recipe in the race"


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        (3, "expected a Recipe or an Entry", "For instance"),
        (Entry(quick_net, 3), "expected a Recipe or an Entry", "For instance"),
        (replace(SHORT, epochs=17), "17 epochs, and 16 are the most", "Chapters 2, 3 and 4"),
        (replace(SHORT, stop=len), "fills the slot stop", "stop=None"),
        (replace(SHORT, keep="val_loss"), "fills the slot keep", "keep=None"),
        (replace(SHORT, watch={"test": len}), "fills the slot watch", "watch=None"),
        (replace(SHORT, compile=True), "compiles", "compile=False"),
        (Entry(lambda *shape: 1 / 0, SHORT), "your design raised ZeroDivisionError", ""),
    ],
)
def test_what_is_against_the_rules_is_told(small, answer, message, hint):
    checking.assert_hinted("16.6", answer, message, hint)


def test_a_network_that_was_trained_before_is_found_out(small):
    model = quick_net(small.input_shape, 10)
    fit(model, replace(small, train=small.test), Recipe(epochs=30, batch_size=20), seed=0, progress=False)
    checking.assert_hinted("16.6", Entry(lambda *shape: model, SHORT), "before its first step", "a new one")


def test_an_entry_never_sees_the_images_that_it_is_tested_on():
    task, test = chapter_16._drawn()
    held = task.data
    assert (len(held.train), len(test)) == (1000, 2000)
    assert {len(held.val), len(held.test)} == {100}
    assert torch.equal(held.test.images, held.train.images[:100])
    seen = {image.numpy().tobytes() for image in held.train.images}
    assert not any(image.numpy().tobytes() in seen for image in test.images)
    blank = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    assert task.score(blank, held.test) == chapter_16.evaluate(blank, test).accuracy


@pytest.fixture
def learner(monkeypatch, tmp_path, small):
    """Somebody whose progress is kept, in races that are not run but told."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path))
    monkeypatch.setenv("COURSE_LEARNER", "ada")
    monkeypatch.delenv("COURSE_VALIDATING")
    called = []

    def told(entries, task, seeds):
        called.append((entries, seeds))
        seconds = np.array([[8.0, 1.0], [6.0, 2.0], [30.0, 0.8]])
        return Result(task, Rounds(tuple(entries), seconds), np.array([[0.5, 0.93], [0.5, 0.91], [0.5, 0.95]]))

    monkeypatch.setattr(chapter_16, "race", told)
    return called, tmp_path / "progress-ada.json"


def test_who_has_passed_is_timed_and_entered(learner):
    called, file = learner
    found = check("16.6", SHORT)
    assert found.note == "8.0 times as fast as the first script on this machine"
    ((entries, seeds),) = called
    assert [entry.recipe.epochs for entry in entries.values()] == [8, 1]
    assert [entry.per_image for entry in entries.values()] == [True, False]
    assert seeds == chapter_16.HIDDEN
    entry = json.loads(file.read_text())["races"]["16.6"]
    assert (entry["ratio"], entry["score"]) == (8.0, pytest.approx(0.93))


def test_what_is_not_recorded_is_not_timed(learner):
    called, file = learner
    assert check("16.6", SHORT, record=False).note == ""
    assert not called
    assert not file.exists()


def test_who_has_not_passed_is_not_timed(learner, monkeypatch):
    called, _ = learner
    monkeypatch.setattr(chapter_16, "exercise_6", replace(chapter_16.exercise_6, least=1.1))
    assert check("16.6", SHORT).state == "not yet right"
    assert not called


def test_who_misses_the_target_while_timed_is_not_entered(learner, monkeypatch):
    _, file = learner
    drawn = chapter_16._drawn()
    monkeypatch.setattr(chapter_16, "_drawn", lambda: (replace(drawn[0], target=0.94), drawn[1]))
    assert check("16.6", SHORT).note.endswith("not entered, since the runs that were timed reached 0.930")
    assert not json.loads(file.read_text())["races"]


def test_a_race_that_fails_takes_nothing_back(learner, monkeypatch):
    monkeypatch.setattr(chapter_16, "race", lambda *args: 1 / 0)
    found = check("16.6", SHORT)
    assert (found.state, found.note) == (
        "passed",
        "its time could not be measured: ZeroDivisionError: division by zero",
    )


# The notebook's own


@needs_the_notebook
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 8])
def test_the_printed_solutions_pass(number):
    from course_lib import capstone

    exercise = f"16.{number}"
    assert exercise in checking.asked(NOTEBOOK)
    names = {"np": np, "torch": torch, "math": math, "stats": stats, "partial": partial, "replace": replace}
    own = {"Recipe": Recipe, "Entry": Entry, "capstone": capstone, "LEAVE_ONE_OUT": LEAVE_ONE_OUT}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names, **own)


@needs_the_notebook
def test_the_buggy_function_of_the_notebook_has_the_bug():
    read = nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4)
    (cell,) = [cell.source for cell in read.cells if cell.cell_type == "code" and "def what_is_left" in cell.source]
    names = {"np": np, "math": math}
    exec(cell.split("check(")[0], names)
    assert check("16.3", names["what_is_left"]).message.startswith("the speed-ups are added up")
