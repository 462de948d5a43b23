"""Explorers: a plain function, a live widget without a kernel, and one output that every reader can show."""

import io
import json
from base64 import b64decode

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image

matplotlib.use("agg")

from course_lib.lab.widgets import LIVE, Explorer, choice, explorer, log_slider, slider, to_png


@pytest.fixture(autouse=True)
def figures_closed():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before, "a matplotlib figure was left open"


@pytest.fixture
def drawn():
    return []


@pytest.fixture
def waves(drawn):
    def draw(kind, frequency, scale):
        drawn.append((kind, frequency, scale))
        if frequency == 13:
            plt.subplots()
            raise RuntimeError("13 is <unlucky>")
        figure, axes = plt.subplots()
        x = np.linspace(0, 1, 100)
        axes.plot(x, scale * getattr(np, kind)(frequency * x))
        axes.set_title(f"{kind} {frequency}", loc="center")
        return figure

    return explorer(
        draw,
        kind=choice("kind", ["sin", "cos"]),
        frequency=slider("frequency", 1, 20, 5, 1),
        scale=log_slider("scale", 1e-3, 1.0, 0.1),
    )


def controls_of(widget):
    return {control.description: control for control in widget.children[0].children}


def test_called_it_is_a_plain_function(waves, drawn):
    figure = waves(kind="cos", scale=0.5)
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_title() == "cos 5"
    assert drawn[-1] == ("cos", 5, 0.5)
    assert tuple(figure.get_size_inches()) == (6.4, 3.8)


def test_many_calls_leave_no_figure_open(waves):
    for frequency in range(1, 6):
        waves(frequency=frequency)
    assert plt.get_fignums() == []


def test_a_figure_that_was_open_before_stays_open(waves):
    mine = plt.figure()
    waves()
    assert plt.get_fignums() == [mine.number]
    plt.close(mine)


def test_a_draw_error_is_raised_on_a_call_and_leaves_no_figure(waves):
    with pytest.raises(RuntimeError, match="unlucky"):
        waves(frequency=13)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1}, r"colour: no such control; allowed are kind, frequency, scale"),
        ({"kind": "tan"}, r"kind: 'tan' is not allowed for 'kind'; allowed: one of 'sin', 'cos'"),
        ({"frequency": 21}, r"frequency: 21 is not allowed for 'frequency'; allowed: whole numbers from 1 to 20"),
        ({"frequency": 2.5}, r"frequency: 2\.5 is not allowed"),
        ({"frequency": True}, r"frequency: True is not allowed"),
        ({"frequency": "5"}, r"frequency: '5' is not allowed"),
        ({"scale": 0}, r"scale: 0 is not allowed for 'scale'; allowed: numbers from 0\.001 to 1"),
        ({"scale": float("nan")}, r"scale: nan is not allowed"),
    ],
)
def test_bad_values(waves, values, message):
    with pytest.raises(ValueError, match=message):
        waves(**values)


def test_the_ends_of_a_log_slider_are_met_to_rounding(waves, drawn):
    waves(scale=0.001 * (1 - 1e-13))
    assert drawn[-1][2] == 0.001


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: choice("kind", []), r"options: \[\] is empty"),
        (lambda: choice("kind", ["a"], "b"), r"value: 'b' is not allowed for 'kind'"),
        (lambda: slider("x", 2, 1, 1, 1), r"low, high: 2 to 1 is no range"),
        (lambda: slider("x", 1, 2, 1, 0), r"step: 0 is not allowed"),
        (lambda: slider("x", 1, 2, 3, 1), r"value: 3 is not allowed"),
        (lambda: log_slider("x", 0, 1, 1), r"low, high: 0 to 1 is no range"),
        (lambda: log_slider("x", 1, 10, 1, per_decade=0), r"per_decade: 0 is not allowed"),
    ],
)
def test_bad_controls(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def needs_method(method, lr):
    return plt.figure()


def test_controls_must_fit_the_drawing_function():
    with pytest.raises(ValueError, match=r"controls: lr do not fit needs_method: missing .* 'method'"):
        explorer(needs_method, lr=slider("lr", 0, 1, 0, 1))


def test_a_draw_that_returns_no_figure_stops_the_cell_that_makes_the_explorer():
    with pytest.raises(TypeError, match="must return a matplotlib Figure, not NoneType"):
        explorer(lambda: None)


def test_turning_a_control_redraws(waves, drawn):
    controls = controls_of(waves.widget)
    image = waves.widget.children[2]
    first = image.value
    assert Image.open(io.BytesIO(first)).format == "PNG"
    controls["frequency"].value = 9
    assert drawn[-1] == ("sin", 9, 0.1)
    assert image.value != first
    controls["kind"].value = "cos"
    assert drawn[-1] == ("cos", 9, 0.1)
    controls["frequency"].value = 5
    controls["kind"].value = "sin"
    assert image.value == to_png(waves(), LIVE)
    assert image.width == "576"


def test_a_draw_error_is_shown_in_the_widget_until_the_next_good_picture(waves):
    controls = controls_of(waves.widget)
    _, message, image = waves.widget.children
    assert message.value == ""
    controls["frequency"].value = 13
    assert "RuntimeError: 13 is &lt;unlucky&gt;" in message.value
    assert image.layout.display == "none"
    controls["frequency"].value = 12
    assert message.value == ""
    assert image.layout.display == ""


def test_sliders_follow_the_mouse_only_while_redrawing_is_quick():
    now = [0.0]
    cost = [0.0]

    def draw(x):
        now[0] += cost[0]
        return plt.figure()

    show = Explorer(draw, {"x": slider("x", 0.0, 1.0, 0.0, 0.1)}, clock=lambda: now[0])
    control = controls_of(show.widget)["x"]
    assert control.continuous_update is False
    control.value = 0.1
    assert control.continuous_update is True
    cost[0] = 0.5
    control.value = 0.2
    assert control.continuous_update is False


def test_whole_numbers_stay_whole_and_others_do_not():
    assert type(slider("x", 1, 9, 2, 1).read(3.0)) is int
    assert slider("x", 0.0, 1.0, 0.5, 0.1).read(0.25) == 0.25


def test_the_output_holds_widget_picture_content_and_text(waves):
    from course_lib.proving.figures import FIGURE_MIME

    bundle, metadata = waves._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.jupyter.widget-view+json", "image/png", FIGURE_MIME, "text/plain"}
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == waves.widget.model_id
    assert b64decode(bundle["image/png"]) == waves.widget.children[2].value
    assert metadata == {"image/png": {"width": 576}}
    assert waves.widget.children[2].width == "576"
    assert "sin 5" in json.dumps(bundle[FIGURE_MIME])
    assert bundle["text/plain"] == (
        "Explorer: kind = sin (one of 'sin', 'cos'); frequency = 5 (whole numbers from 1 to 20); "
        "scale = 0.1 (numbers from 0.001 to 1)"
    )


def test_the_output_shows_the_default_state_whatever_was_turned(waves):
    before = waves._repr_mimebundle_()[0]["image/png"]
    controls_of(waves.widget)["frequency"].value = 9
    assert waves._repr_mimebundle_()[0]["image/png"] == before


def test_pictures_are_small_even_with_many_colours():
    generator = np.random.default_rng(0)
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    axes.imshow(generator.random((120, 200, 3)) * np.linspace(0, 1, 200)[None, :, None], aspect="auto")
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=180)
    x, y = np.meshgrid(np.linspace(-2, 2, 200), np.linspace(-1, 3, 200))
    landscape, axes = plt.subplots(figsize=(6.4, 3.8))
    axes.contourf(x, y, np.log1p((1 - x) ** 2 + 100 * (y - x**2) ** 2), levels=40)
    assert len(to_png(figure)) < 0.6 * raw.tell()
    assert len(to_png(landscape)) < 90_000
    plt.close("all")


NOTEBOOK = """
import matplotlib.pyplot as plt
from course_lib.lab.widgets import explorer, slider
def draw(n):
    figure, axes = plt.subplots()
    axes.plot([0, n])
    return figure

show = explorer(draw, n=slider("n", 1, 5, 2, 1))
show
"""


def test_an_executed_notebook_stores_the_picture_twice_and_shows_it_once():
    """In the output for readers without a kernel, and in the widget's state for JupyterLab without one."""
    cells = [nbformat.v4.new_code_cell("%matplotlib inline"), nbformat.v4.new_code_cell(NOTEBOOK)]
    cells.append(nbformat.v4.new_code_cell("show(n=3)"))
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    outputs = notebook.cells[1].outputs
    assert [output.output_type for output in outputs] == ["execute_result"]
    png = outputs[0].data["image/png"].strip()
    state = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert outputs[0].data["application/vnd.jupyter.widget-view+json"]["model_id"] in state
    images = [model for model in state.values() if model["model_name"] == "ImageModel"]
    assert len(images) == 1
    stored = images[0]["buffers"][0]
    assert stored["path"] == ["value"]
    assert b64decode(stored["data"]) == b64decode(png)
    assert outputs[0].metadata["image/png"]["width"] == 576
    assert Image.open(io.BytesIO(b64decode(png))).size == (1152, 684)  # twice what it is shown at
    # The plain call gives its figure as the cell's result, and the inline backend does not show it again.
    assert [output.output_type for output in notebook.cells[2].outputs] == ["execute_result"]
    assert "image/png" in notebook.cells[2].outputs[0].data


@pytest.mark.parametrize(
    ("control", "count", "expected"),
    [
        (choice("kind", ["sin", "cos", "tan"]), 2, ["sin", "cos", "tan"]),
        (slider("n", 2, 60, 5, 1), 3, [2, 5, 60]),
        (slider("n", 2, 60, 5, 1), 7, [2, 5, 16, 27, 38, 49, 60]),
        (slider("n", 0, 6, 2, 1), 20, [0, 1, 2, 3, 4, 5, 6]),
        (slider("start at the end", 0, 100, 0, 10), 4, [0, 30, 70, 100]),
        (slider("x", 0.0, 3.0, 0.7, 0.1), 6, [0.0, 0.7, 1.3, 1.8, 2.4, 3.0]),
        (slider("off its steps", 0.0, 1.0, 0.33, 0.25), 9, [0.0, 0.25, 0.33, 0.5, 0.75, 1.0]),
        (log_slider("lr", 1e-4, 1.0, 0.03), 5, [0.0001, 0.002, 0.03, 0.2, 1.0]),
        (log_slider("lr", 1e-4, 1.0, 0.01), 9, [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
        (log_slider("size", 1, 256, 8), 9, [1, 2, 4, 8, 16, 30, 60, 130, 256]),
    ],
)
def test_positions_hold_both_ends_and_the_start(control, count, expected):
    assert control.positions(count) == expected


@pytest.mark.parametrize(
    "control",
    [
        slider("n", 1, 64, 4, 1),
        slider("x", 0.2, 2.0, 1.0, 0.1),
        slider("momentum", 0.5, 0.99, 0.9, 0.01),
        log_slider("rate", 0.02, 1.9, 0.2),
        log_slider("size", 0.1, 1e5, 400),
        log_slider("whole", 1, 10_000, 20),
    ],
)
@pytest.mark.parametrize("count", [1, 3, 4, 8, 25])
def test_positions_are_even_allowed_and_read_as_they_are(control, count):
    found = control.positions(count)
    assert 3 <= len(found) <= max(count, 3)
    assert (found[0], found[-1]) == (control.low, control.high)
    assert control.value in found
    assert found == sorted(set(found))
    assert [control.read(value) for value in found] == found
    assert [float(f"{value:.10g}") for value in found] == found, "the number that is shown is the number"
    is_log = hasattr(control, "per_decade")
    scaled = np.log10(np.array(found, dtype=float)) if is_log else np.array(found, dtype=float)
    start = found.index(control.value)
    for side in (scaled[: start + 1], scaled[start:]):
        gaps = np.diff(side)
        slack = 0.8 * np.ptp(scaled) / (max(count, 3) - 1) if is_log else control.step
        assert np.ptp(gaps) <= slack + 1e-9 or len(found) < count, "evenly spaced on its own scale"


def test_drawn_from_its_positions_the_start_is_the_stored_picture():
    """The start keeps its type: 8 is written as 8 by a drawing function that 8.0 would make write 8.0."""
    for control in (log_slider("size", 1, 256, 8), slider("share", 0, 0.95, 0, 0.05), slider("n", 1, 9, 5, 1)):
        (start,) = (value for value in control.positions(5) if value == control.value)
        assert type(start) is type(control.value)
    assert all(type(value) is int for value in slider("n", 1, 9, 5, 1).positions(5))
