"""Explorers: a figure that is redrawn as the learner turns its controls, and that needs no kernel to be read.

    def draw(method, lr):
        figure, axes = plt.subplots()
        ...
        return figure

    explorer(draw, method=choice("method", ["SGD", "Adam"]), lr=log_slider("learning rate", 1e-4, 1.0, 1e-2))

| building block | what it lets the learner choose |
| --- | --- |
| `choice` | one of a few options |
| `slider` | a number in a range; whole numbers when the range and the step are whole |
| `log_slider` | a positive number over several powers of ten |
| `explorer` | ties controls to a drawing function |

Shown in a notebook, an explorer is one output with everything in it: the live widget for a running kernel, the picture
of the default state for every reader without one, and the picture's content for the check of plots. Called, as in
``show(lr=0.1)``, it is a plain function that returns the figure.
"""

from __future__ import annotations

import html
import inspect
import io
import math
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

if TYPE_CHECKING:
    import ipywidgets  # where a widget is made, and only there: it brings half of IPython along

C = TypeVar("C", bound="Control")

DPI = 90  # points of the screen for each inch of a figure
STORED, LIVE = 2.0, 1.5  # dots of a picture for each such point: sharp in print; while a slider moves, drawn sooner
LARGEST_PNG = 90_000  # bytes; every picture is stored twice in a notebook, in the output and in the widget's state
QUICK = 0.15  # seconds; a figure that is redrawn faster than this follows the slider while it moves
_FIGURE_STYLE: dict[Any, Any] = {"figure.figsize": (6.4, 3.8), "figure.constrained_layout.use": True}


class Control(Protocol):
    """What an explorer asks of a control."""

    @property
    def label(self) -> str: ...
    @property
    def value(self) -> Any: ...
    @property
    def allowed(self) -> str: ...
    def read(self, value: Any) -> Any:
        """The value as the drawing function gets it; ValueError (without the control's name) when not allowed."""

    def widget(self) -> ipywidgets.ValueWidget: ...
    def positions(self, count: int) -> list[Any]:
        """About ``count`` of the values, in order, for who must draw them beforehand."""


@dataclass(frozen=True)
class Choice:
    """One of ``options``; see `choice`."""

    label: str
    options: tuple[Any, ...]
    value: Any

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(map(repr, self.options))

    def read(self, value: Any) -> Any:
        for option in self.options:
            if type(option) is type(value) and option == value:
                return option
        raise ValueError

    def widget(self) -> ipywidgets.ValueWidget:
        import ipywidgets

        options = [(str(option), option) for option in self.options]
        return ipywidgets.Dropdown(description=self.label, options=options, value=self.value, **_wide_label())

    def positions(self, count: int) -> list[Any]:
        """All options, however many are asked for."""
        return list(self.options)


@dataclass(frozen=True)
class Slider:
    """A number from ``low`` to ``high``; see `slider`."""

    label: str
    low: float
    high: float
    value: float
    step: float

    @property
    def whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.value, self.step))

    @property
    def allowed(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        return f"{kind} from {self.low:g} to {self.high:g}"

    def read(self, value: Any) -> Any:
        number = _number(value, self.low, self.high)
        if not self.whole:
            return number
        if number != int(number):
            raise ValueError
        return int(number)

    def widget(self) -> ipywidgets.ValueWidget:
        import ipywidgets

        kind = ipywidgets.IntSlider if self.whole else ipywidgets.FloatSlider
        return kind(
            description=self.label, min=self.low, max=self.high, step=self.step, value=self.value,
            continuous_update=False, **({} if self.whole else {"readout_format": ".3g"}), **_wide_label(),
        )  # fmt: skip

    def positions(self, count: int) -> list[Any]:
        """At most ``count`` values, 3 at least, both ends and the start among them, the others on whole steps."""
        kind = int if self.whole else float
        # 0.30000000000000004 is not what a reader would see
        near = (round((number - self.low) / self.step) for number in _spread(self.low, self.value, self.high, count))
        steps = [kind(f"{self.low + k * self.step:.10g}") for k in near]
        inside = [number for number in steps if self.low < number < self.high]
        return _in_order(kind(self.low), self.value, kind(self.high), inside)


@dataclass(frozen=True)
class LogSlider:
    """A positive number from ``low`` to ``high``, in equal ratios; see `log_slider`."""

    label: str
    low: float
    high: float
    value: float
    per_decade: int

    @property
    def allowed(self) -> str:
        return f"numbers from {self.low:g} to {self.high:g}"

    def read(self, value: Any) -> Any:
        return _number(value, self.low, self.high)

    def widget(self) -> ipywidgets.ValueWidget:
        import ipywidgets

        return ipywidgets.FloatLogSlider(
            description=self.label, base=10, min=math.log10(self.low), max=math.log10(self.high),
            step=1 / self.per_decade, value=self.value, readout_format=".2g", continuous_update=False, **_wide_label(),
        )  # fmt: skip

    def positions(self, count: int) -> list[Any]:
        """At most ``count`` values, 3 at least, both ends and the start among them, in about equal ratios.

        They have as few digits as that allows, and are whole where the ends and the start are.
        """
        logs = _spread(math.log10(self.low), math.log10(self.value), math.log10(self.high), count)
        slack = 0.2 * math.log10(self.high / self.low) / (max(count, 3) - 1)
        whole = all(number == int(number) for number in (self.low, self.high, self.value))
        near = [_few_digits(10**log, slack) for log in logs]
        inside = [float(round(number)) if whole else number for number in near]
        inside = [number for number in inside if self.low < number < self.high]
        return _in_order(float(self.low), self.value, float(self.high), inside)


def choice(label: str, options: Sequence[Any], value: Any = None) -> Choice:
    """A control for one of ``options``; it starts at ``value``, or at the first."""
    if not options:
        raise ValueError(f"options: {options!r} is empty; {label!r} needs at least one")
    made = Choice(label, tuple(options), options[0] if value is None else value)
    return _starting_inside(made)


def slider(label: str, low: float, high: float, value: float, step: float) -> Slider:
    """A control for a number from ``low`` to ``high`` in steps of ``step``; whole if all four are whole."""
    if not low < high:
        raise ValueError(f"low, high: {low} to {high} is no range for {label!r}; low must be below high")
    if not step > 0:
        raise ValueError(f"step: {step} is not allowed for {label!r}; it must be above 0")
    return _starting_inside(Slider(label, low, high, value, step))


def log_slider(label: str, low: float, high: float, value: float, *, per_decade: int = 10) -> LogSlider:
    """A control for a positive number from ``low`` to ``high``, with ``per_decade`` steps for each power of ten."""
    if not 0 < low < high:
        raise ValueError(f"low, high: {low} to {high} is no range for {label!r}; it must hold that 0 < low < high")
    if per_decade < 1:
        raise ValueError(f"per_decade: {per_decade} is not allowed for {label!r}; it must be at least 1")
    return _starting_inside(LogSlider(label, low, high, value, per_decade))


def explorer(draw: Callable[..., Figure], **controls: Control) -> Explorer:
    """Tie ``controls`` to ``draw(**values) -> Figure``: displayed, a live widget; called, a plain function.

    The default state is drawn at once, so that a mistake in ``draw`` stops the cell that makes the explorer.
    """
    return Explorer(draw, controls)


class Explorer:
    """A drawing function with controls; made by `explorer`."""

    def __init__(
        self,
        draw: Callable[..., Figure],
        controls: Mapping[str, Control],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        from course_lib.proving.figures import describe_figure

        try:
            inspect.signature(draw).bind(**controls)
        except TypeError as error:
            raise ValueError(f"controls: {', '.join(controls) or 'none'} do not fit {_name(draw)}: {error}") from None
        self.controls = dict(controls)
        self._draw = draw
        self._clock = clock
        figure = self()
        self._content = describe_figure(figure)
        self._png, self._width = to_png(figure), _width(figure)

    def __call__(self, **values: Any) -> Figure:
        """The figure for ``values``; controls that are not named stay at their defaults.

        Raises
        ------
        ValueError
            An unknown control, or a value that its control does not allow.
        """
        values = self._read(values)
        with _no_figure_left_open(), plt.rc_context(_FIGURE_STYLE):
            figure = self._draw(**values)
        if not isinstance(figure, Figure):
            raise TypeError(f"{_name(self._draw)} must return a matplotlib Figure, not {type(figure).__name__}")
        return figure

    @cached_property
    def widget(self) -> ipywidgets.VBox:
        """The live widget: the controls in a row, a line for messages, and the picture."""
        import ipywidgets

        inputs = {name: control.widget() for name, control in self.controls.items()}
        image = ipywidgets.Image(value=self._png, format="png", width=self._width, layout={"max_width": "100%"})
        message = ipywidgets.HTML()

        def redraw(_: Any = None) -> None:
            started = self._clock()
            try:
                figure = self(**{name: widget.value for name, widget in inputs.items()})
                image.value, image.width = to_png(figure, LIVE), _width(figure)
                message.value, image.layout.display = "", ""
            except Exception as error:  # whatever draw raises is for the learner to read
                # The last picture belongs to other values of the controls: showing it on would mislead.
                message.value, image.layout.display = _error_line(error), "none"
            quick = self._clock() - started < QUICK
            for widget in inputs.values():
                if widget.has_trait("continuous_update"):
                    widget.continuous_update = quick

        for widget in inputs.values():
            widget.observe(redraw, names="value")
        row = ipywidgets.HBox(list(inputs.values()), layout={"flex_flow": "row wrap"})
        return ipywidgets.VBox([row, message, image])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        from course_lib.proving.figures import FIGURE_MIME

        bundle = {
            **self.widget._repr_mimebundle_(),
            "image/png": b64encode(self._png).decode(),
            FIGURE_MIME: self._content,
            "text/plain": repr(self),
        }
        return bundle, {"image/png": {"width": int(self._width)}}

    def __repr__(self) -> str:
        parts = (f"{control.label} = {control.value} ({control.allowed})" for control in self.controls.values())
        return f"Explorer: {'; '.join(parts)}"

    def _read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if unknown := sorted(set(values) - set(self.controls)):
            raise ValueError(f"{unknown[0]}: no such control; allowed are {', '.join(self.controls) or 'none'}")
        return {
            name: _checked(name, control, values.get(name, control.value)) for name, control in self.controls.items()
        }


def to_png(figure: Figure, dots: float = STORED) -> bytes:
    """The figure as a PNG of at most about 90 kB: pictures with many colours are stored with a palette of 256."""
    # savefig would lay a figure out twice, which takes as long as drawing it.
    canvas, dpi = figure.canvas, figure.dpi
    try:
        figure.dpi = dots * DPI
        agg = FigureCanvasAgg(figure)
        agg.draw()
        image = Image.fromarray(np.asarray(agg.buffer_rgba())).convert("RGB")
    finally:
        figure.dpi = dpi
        figure.set_canvas(canvas)
    png = _encoded(image)
    return png if len(png) <= LARGEST_PNG else _encoded(image.quantize(256, dither=Image.Dither.NONE))


def _width(figure: Figure) -> str:
    """The points on the screen that a figure is wide, as HTML wants them."""
    return str(round(figure.get_figwidth() * DPI))


def _encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="png")
    return stream.getvalue()


def _starting_inside(control: C) -> C:
    _checked("value", control, control.value)
    return control


def _checked(name: str, control: Control, value: Any) -> Any:
    try:
        return control.read(value)
    except ValueError:
        raise ValueError(
            f"{name}: {value!r} is not allowed for {control.label!r}; allowed: {control.allowed}"
        ) from None


def _number(value: Any, low: float, high: float) -> float:
    """``value`` if it lies in the range; the ends are met to rounding, as 10 ** -3 in a slider is not quite 0.001."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError
    slack = 1e-9 * max(abs(low), abs(high))
    if not low - slack <= value <= high + slack:
        raise ValueError
    return min(max(value, low), high)


def _spread(low: float, start: float, high: float, count: int) -> list[float]:
    """``count`` numbers (3 at least) from ``low`` to ``high`` by way of ``start``, as evenly as ``start`` lets them."""
    steps = max(count, 3) - 1
    if low < start < high:
        before = min(max(round(steps * (start - low) / (high - low)), 1), steps - 1)
        return [*np.linspace(low, start, before + 1), *np.linspace(start, high, steps - before + 1)[1:]]
    return list(np.linspace(low, high, steps + 1))


def _in_order(low: float, start: float, high: float, inside: Sequence[float]) -> list[float]:
    """Each number once. The start is kept as it was given: drawn from it, the picture is the stored one."""
    others = {number for number in (low, *inside, high) if not math.isclose(number, start, rel_tol=1e-9, abs_tol=1e-12)}
    return sorted({*others, start})


def _few_digits(number: float, slack: float) -> float:
    """The number with the fewest digits whose decimal logarithm is within ``slack`` of that of ``number``."""
    shorter = (float(f"{number:.{digits}g}") for digits in range(1, 17))
    return next(one for one in shorter if abs(math.log10(one / number)) <= slack)


@contextmanager
def _no_figure_left_open() -> Iterator[None]:
    """Close what was opened inside, also after an error: pyplot would keep it, and the notebook show it once more."""
    before = set(plt.get_fignums())
    try:
        yield
    finally:
        for number in set(plt.get_fignums()) - before:
            plt.close(number)


def _error_line(error: Exception) -> str:
    text = html.escape(f"{type(error).__name__}: {error}")
    return f'<div role="alert" style="border-left:4px solid #b42318;padding:0.2em 0.6em">✗ Not drawn. {text}</div>'


def _name(draw: Callable[..., Any]) -> str:
    return getattr(draw, "__name__", repr(draw))


def _wide_label() -> dict[str, Any]:
    return {"style": {"description_width": "initial"}, "layout": {"width": "22em"}}
