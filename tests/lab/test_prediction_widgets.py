"""The form of a prediction: every kind takes a guess, says what is missing, and can be left with one click."""

import os

import nbformat
import pytest
from nbclient import NotebookClient

from course_lib.lab.prediction_widgets import widget
from course_lib.lab.predictions import answered, predict
from tests.lab.test_predictions import KINDS, kept

pytestmark = pytest.mark.usefixtures("prediction_file")


def parts(form):
    _, controls, said = form.children
    inputs, sure, buttons = controls.children
    return inputs, sure, *buttons.children, controls, said


def fill(inputs, guess):
    if hasattr(inputs, "value"):
        inputs.value = guess
    else:
        for child, value in zip(inputs.children, guess, strict=True):
            child.value = value


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_takes_a_guess_and_shows_it_again(kind, prediction_file):
    asked, right, _ = KINDS[kind]
    prediction = predict("02.a", "Which?", **asked)
    inputs, sure, guess, _, _, said = parts(widget(prediction))
    fill(inputs, right)
    sure.value = 0.9
    guess.click()
    assert all(words in said.value for words in ("Your guess: ", "(sure)"))
    assert kept(prediction_file)["02.a"]["guess"] == pytest.approx(right) if kind in ("number", "curve") else right
    again, sure, _, _, _, said = parts(widget(prediction))
    assert "Your guess: " in said.value
    assert sure.value == 0.9
    shown = again.value if hasattr(again, "value") else [child.value for child in again.children]
    assert shown == right
    answered("02.a", right)
    assert parts(widget(prediction))[4].layout.display == "none"


def test_the_form_says_what_is_missing(prediction_file):
    inputs, _, guess, _, _, said = parts(widget(predict("02.a", "Order?", ranking=["x", "y"])))
    guess.click()
    assert all(words in said.value for words in ("Not taken: ", "each of", "once, in order"))
    fill(inputs, ["x", "x"])
    guess.click()
    assert "Not taken" in said.value
    assert not prediction_file.exists()
    _, _, guess, _, _, said = parts(widget(predict("02.b", "Which?", choices=["x", "y"])))
    guess.click()
    assert "Not taken: " in said.value


def test_one_click_goes_on_without_a_guess(prediction_file):
    prediction = predict("02.a", "Which?", choices=["x", "y"])
    _, _, _, leave, controls, _ = parts(widget(prediction))
    leave.click()
    assert controls.layout.display == "none"
    assert answered("02.a", "x").hit is None
    assert not prediction_file.exists()


def test_in_a_kernel_there_is_a_form_and_in_a_validation_run_there_is_none(tmp_path, prediction_file):
    """A real kernel, as in JupyterLab: the form's own button is clicked, and the result then shows the guess."""
    cells = [
        "from course_lib.lab.predictions import answered, predict",
        "asked = predict('02.a', 'Which?', choices=['x', 'y'])\nasked",
        "from course_lib.lab.prediction_widgets import widget\n"
        "form = widget(asked)\nform.children[1].children[0].value = 'x'\n"
        "form.children[1].children[2].children[0].click()",
        "answered('02.a', 'x')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    environment = {name: value for name, value in os.environ.items() if name != "COURSE_VALIDATING"}
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute(env=environment)
    asked, shown = notebook.cells[1].outputs[0].data, notebook.cells[3].outputs[0].data
    assert "application/vnd.jupyter.widget-view+json" in asked
    assert "You guessed x (a hunch). Measured: x." in shown["text/plain"]
    assert kept(prediction_file)["02.a"]["hit"] is True
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute(env=environment | {"COURSE_VALIDATING": "1"})
    asked, shown = notebook.cells[1].outputs[0].data, notebook.cells[3].outputs[0].data
    assert set(asked) == {"text/plain", "text/html"}
    assert "guess" not in shown["text/plain"]
