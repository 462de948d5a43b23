"""Predictions: what is asked, what counts as right, what is kept, and what a reader without a kernel sees."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from course_lib.lab import predictions
from course_lib.lab.exercises import progress
from course_lib.lab.experiments import mean_interval
from course_lib.lab.predictions import answered, calibration, predict, wilson

KINDS = {
    "choices": ({"choices": ["SGD", "Adam"]}, "Adam", "SGD"),
    "ranking": ({"ranking": ["a", "b", "c"]}, ["b", "a", "c"], ["b", "c", "a"]),
    "number": ({"number": (0, 100), "within": 5, "unit": "points"}, 40.0, 46.0),
    "curve": ({"curve": (0, 0.5, 1), "between": (0, 1), "within": 0.1}, [0.0, 0.5, 1.0], [0.0, 0.2, 0.9]),
}


pytestmark = pytest.mark.usefixtures("prediction_file")


def new_kernel(monkeypatch):
    monkeypatch.setattr(predictions, "_seen", set())


def kept(file):
    return json.loads(file.read_text())["predictions"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_and_a_wrong_guess_are_told_apart_and_kept(kind, prediction_file):
    asked, right, wrong = KINDS[kind]
    for key, guess, hit in (("02.a", right, True), ("02.b", wrong, False)):
        predict(key, "Which?", **asked).guess(guess, sure=0.9)
        found = answered(key, right)
        assert found.hit is hit
        assert kept(prediction_file)[key]["hit"] is hit
        assert kept(prediction_file)[key]["guess"] == guess
        assert repr(found).startswith("✓" if hit else "✗")
        assert all("(sure)" in shown and "Measured:" in shown for shown in (repr(found), found._repr_html_()))


def test_how_far_off_a_guess_was_is_said():
    predict("02.a", "How many?", number=(0, 100), within=5, unit="points").guess(46)
    assert "Measured: 40 points. 6 points too high." in repr(answered("02.a", 40))
    predict("02.b", "In which order?", ranking=list("abcd")).guess(list("dabc"))
    assert "3 of 6 pairs the wrong way round" in repr(answered("02.b", list("abcd"))).lower()
    predict("02.c", "How does it fall?", curve=(1, 2), between=(0, 1), within=0.1).guess([0.5, 0.5])
    assert "0.25 off on average" in repr(answered("02.c", [1.0, 0.5]))


@pytest.mark.parametrize(("guess", "hit"), [(35, True), (45, True), (34.9, False), (45.1, False)])
def test_a_number_counts_up_to_the_tolerance_that_was_announced(guess, hit):
    asked = predict("02.a", "How many?", number=(0, 100), within=5)
    assert "at most 5 off" in repr(asked)
    asked.guess(guess)
    assert answered("02.a", 40).hit is hit


def test_a_ranking_may_allow_pairs():
    predict("02.a", "Order?", ranking=list("abc"), within=1).guess(list("bac"))
    assert answered("02.a", list("abc")).hit
    predict("02.b", "Order?", ranking=list("abc"), within=1).guess(list("bca"))
    assert not answered("02.b", list("abc")).hit


@pytest.mark.parametrize(
    "value", [mean_interval([39.0, 41.0]), np.float64(40), torch.tensor(40.0), 40, np.array([40.0])[0]]
)
def test_what_was_measured_may_come_as_an_interval_or_any_number(value):
    predict("02.a", "How many?", number=(0, 100), within=5)
    assert answered("02.a", value).measured == 40


def test_what_was_measured_may_lie_outside_of_what_could_be_guessed():
    predict("02.a", "How many?", number=(0, 10), within=1).guess(9)
    assert not answered("02.a", 250).hit


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_guess_there_is_the_result_alone(kind, prediction_file):
    asked, right, _ = KINDS[kind]
    predict("02.a", "Which?", **asked)
    found = answered("02.a", right)
    assert found.hit is None
    assert "guess" not in repr(found) + found._repr_html_()
    assert "Measured:" in repr(found)
    assert not prediction_file.exists()


def test_validation_knows_no_guess_and_keeps_none(prediction_file, monkeypatch):
    asked = predict("02.a", "Which?", choices=["x", "y"])
    asked.guess("x")
    before = prediction_file.read_bytes()
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    figure, ax = plt.subplots()
    found = answered("02.a", "x", ax)
    assert found.guess is None
    assert not [*ax.texts, *ax.lines]
    assert set(asked._repr_mimebundle_()) == {"text/plain", "text/html"}
    assert prediction_file.read_bytes() == before
    plt.close(figure)


def test_a_guess_may_be_thought_over_until_the_result_is_there(prediction_file, monkeypatch):
    asked = predict("02.a", "Which?", choices=["x", "y"])
    assert asked.guess("x", sure=0.9) == "Your guess: x (sure)."
    asked.guess("y", sure=0.25)
    assert answered("02.a", "y").hit
    assert "not counted" in asked.guess("x")
    new_kernel(monkeypatch)
    assert asked.guess("x") == "Your first guess counts, and stays."
    assert kept(prediction_file)["02.a"] | {"asked": ""} == {"guess": "y", "sure": 0.25, "hit": True, "asked": ""}


def test_a_guess_after_the_result_does_not_count(prediction_file):
    asked = predict("02.a", "Which?", choices=["x", "y"])
    answered("02.a", "y")
    assert "not counted" in asked.guess("y")
    assert answered("02.a", "y").hit is None
    assert not prediction_file.exists()


def test_a_guess_at_another_question_is_forgotten(monkeypatch):
    predict("02.a", "Which?", choices=["x", "y"]).guess("x")
    answered("02.a", "x")
    new_kernel(monkeypatch)
    changed = predict("02.a", "Which?", choices=["x", "y", "z"])
    assert changed.entry == {}
    changed.guess("z")
    assert not answered("02.a", "x").hit


def test_exercises_and_predictions_share_the_file(prediction_file):
    prediction_file.parent.mkdir()
    prediction_file.write_text(json.dumps({"exercises": {"00.1": {"attempts": 3, "passed": None}}}))
    predict("02.a", "Which?", choices=["x", "y"]).guess("x")
    assert json.loads(prediction_file.read_text())["exercises"] == {"00.1": {"attempts": 3, "passed": None}}


def test_a_guess_that_cannot_be_written_down_counts_in_this_kernel(tmp_path, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "a_file" / "mine"))
    said = predict("02.a", "Which?", choices=["x", "y"]).guess("x")
    assert "could not be kept" in said
    assert answered("02.a", "x").hit


def guesses(right, wrong, sure):
    for k in range(right + wrong):
        key = f"{k // 26:02}.{'abcdefghijklmnopqrstuvwxyz'[k % 26]}"
        predict(key, f"Which, at {sure}?", choices=["x", "y"]).guess("x", sure=sure)
        answered(key, "x" if k < right else "y")


@pytest.mark.parametrize(
    ("right", "wrong", "sure", "says"),
    [(2, 1, 0.9, "too few to tell"), (9, 1, 0.9, "well calibrated so far"), (4, 6, 0.9, "too sure"),
     (10, 0, 0.5, "too modest"), (5, 5, 0.5, "well calibrated so far"), (9, 1, 0.25, "too modest")],
)  # fmt: skip
def test_calibration_holds_the_share_of_right_guesses_against_how_sure_they_were(right, wrong, sure, says):
    guesses(right, wrong, sure)
    (row,) = calibration().to_numpy()
    assert list(row) == [predictions.SURE[sure], f"{sure:.0%}", right + wrong, right, says]


def test_progress_shows_the_guesses_by_chapter_and_sureness():
    before = progress()
    guesses(2, 1, 0.75)
    rows = [tuple(row) for row in progress().to_numpy() if row[1] == "predictions"]
    assert rows[0] == ("00", "predictions", "Guesses before a result", "2 right", 3, "")
    title = "Guesses you were “fairly sure” about: 75% should be right"
    assert rows[1:] == [("all", "predictions", title, "2 right: too few to tell", 3, "")]
    assert len(progress()) == len(before) + 2


def test_the_interval_of_a_share_is_that_of_scipy():
    from scipy.stats import binomtest

    for hits, count in ((0, 5), (3, 7), (20, 20), (9, 40)):
        found = binomtest(hits, count).proportion_ci(0.95, "wilson")
        assert wilson(hits, count) == pytest.approx((found.low, found.high), abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"key": "2.a", "choices": ["x", "y"]}, "key='2.a': must be chapter and letter"),
        ({}, "nothing given: exactly one of choices, ranking, number, curve is needed"),
        ({"choices": ["x", "y"], "number": (0, 1)}, "choices and number given: exactly one"),
        ({"choices": ["x"]}, "at least two different ones"),
        ({"ranking": ["x", "x"]}, "at least two different ones"),
        ({"number": (1, 0), "within": 1}, r"number=\(1, 0\): must be two numbers, the lower one first"),
        ({"number": (0, 1)}, "within=None: must be a positive number"),
        ({"curve": (0, 1), "within": 1}, "between=None: must be two numbers"),
        ({"curve": (1, 0), "between": (0, 1), "within": 1}, "in rising order"),
    ],
)
def test_a_question_that_is_none_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        predict(wrong.pop("key", "02.a"), "Which?", **wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [None, "nothing of this", ["x"], float("nan"), True, [1, 2]])
def test_a_guess_or_a_result_of_another_kind_is_refused(kind, value):
    asked = predict("02.a", "Which?", **KINDS[kind][0])
    with pytest.raises(ValueError, match="guess=.*: must be"):
        asked.guess(value)
    with pytest.raises(ValueError, match=r"value=.*: 02\.a must be answered by"):
        answered("02.a", value)


def test_what_nobody_asked_cannot_be_answered():
    predict("02.a", "Which?", choices=["x", "y"])
    with pytest.raises(ValueError, match=r"key='02.b': must have been asked by predict before; asked: 02.a"):
        answered("02.b", "x")
    with pytest.raises(ValueError, match="sure=0.8: must be one of 0.25, 0.5, 0.75, 0.9"):
        predict("02.a", "Which?", choices=["x", "y"]).guess("x", sure=0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_guess_is_drawn_into_the_figure(kind):
    asked, right, wrong = KINDS[kind]
    predict("02.a", "Which?", **asked).guess(wrong)
    figure, ax = plt.subplots()
    answered("02.a", right, ax)
    assert any("your guess" in text.get_text() for text in ax.texts)
    if kind == "curve":
        assert list(ax.lines[-1].get_ydata()) == wrong
    if kind == "number":
        assert list(ax.lines[-1].get_ydata()) == [wrong, wrong]
        answered("02.a", right, ax, axis="x")
        assert list(ax.lines[-1].get_xdata()) == [wrong, wrong]
    figure.canvas.draw()
    plt.close(figure)


def test_a_question_is_escaped_and_may_hold_code():
    shown = predict("02.a", "Is `a < b` *ever* <true>?", choices=["<yes>", "no"])._repr_html_()
    assert "<code>a &lt; b</code> <em>ever</em> &lt;true&gt;" in shown
    assert "&lt;yes&gt; / no" in shown
