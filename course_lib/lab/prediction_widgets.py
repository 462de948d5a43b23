"""The form in which a learner with a kernel gives a guess: all of it can be used with the keyboard alone."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import ipywidgets

from course_lib.lab.predictions import SURE, Curve, Number, OneOf, Order, Prediction

WIDE = {"description_width": "initial"}


def widget(prediction: Prediction) -> ipywidgets.VBox:
    """The question, what may be answered, how sure, and two buttons: guess, or go on without."""
    entry = prediction.entry
    inputs, read = _inputs(prediction.form, entry.get("guess"))
    sure = ipywidgets.ToggleButtons(
        options=[(words, share) for share, words in SURE.items()],
        value=entry.get("sure", 0.5),
        tooltips=[f"{share:.0%} of such guesses should be right" for share in SURE],
        style={"button_width": "7.5em"},
    )
    guess = ipywidgets.Button(description="This is my guess", button_style="primary", layout={"width": "12em"})
    leave = ipywidgets.Button(description="Go on without one", layout={"width": "12em"})
    said = ipywidgets.HTML(value=_said(prediction))
    form = ipywidgets.VBox([inputs, sure, ipywidgets.HBox([guess, leave])])

    def keep(_: Any) -> None:
        try:
            said.value = _status(prediction.guess(read(), sure.value))
        except ValueError as error:
            said.value = _status(f"Not taken: {error}")

    def go_on(_: Any) -> None:
        form.layout.display = "none"
        said.value = _status("Without a guess, then.")

    guess.on_click(keep)
    leave.on_click(go_on)
    if "hit" in entry:
        form.layout.display = "none"
    return ipywidgets.VBox([ipywidgets.HTML(value=prediction._repr_html_()), form, said])


def _said(prediction: Prediction) -> str:
    entry = prediction.entry
    if not entry:
        return ""
    return _status(f"Your guess: {prediction.form.words(entry['guess'])} ({SURE[entry['sure']]}).")


def _status(text: str) -> str:
    return f'<div role="status">{html.escape(text)}</div>'


def _inputs(form: Any, guess: Any) -> tuple[ipywidgets.Widget, Callable[[], Any]]:
    """Controls for one kind of question, and what reads the guess off them."""
    if isinstance(form, OneOf):
        radio = ipywidgets.RadioButtons(options=form.options, value=guess, layout={"width": "max-content"})
        return radio, lambda: radio.value
    if isinstance(form, Order):
        options = [("…", None), *((option, option) for option in form.options)]
        wide: dict[str, Any] = {"layout": {"width": "20em"}, "style": {"description_width": "2em"}}
        places = [
            ipywidgets.Dropdown(description=f"{k + 1}.", options=options, value=guess and guess[k], **wide)
            for k in range(len(form.options))
        ]
        return ipywidgets.VBox(places), lambda: [place.value for place in places]
    if isinstance(form, Number):
        number = ipywidgets.BoundedFloatText(
            description=form.unit, min=form.low, max=form.high, step=form.within / 2, style=WIDE,
            value=(form.low + form.high) / 2 if guess is None else guess,
        )  # fmt: skip
        return number, lambda: number.value
    assert isinstance(form, Curve)
    middle = (form.low + form.high) / 2
    heights = [
        ipywidgets.FloatSlider(
            description=f"{x:g}", min=form.low, max=form.high, step=(form.high - form.low) / 100,
            value=middle if guess is None else guess[k], orientation="vertical", layout={"height": "11em"},
            readout_format=".3g",
        )
        for k, x in enumerate(form.at)
    ]  # fmt: skip
    return ipywidgets.HBox(heights), lambda: [height.value for height in heights]
