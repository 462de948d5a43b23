"""The description of a figure, and what counts as a difference between two."""

import json
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from course_lib.lab import plotting
from course_lib.proving.agreement import html_differences, pack, text_differences, unpack
from course_lib.proving.figures import FIGURE_MIME, describe_figure, differences, register

EPOCHS = np.arange(1, 31)


def adam(x: np.ndarray) -> np.ndarray:
    return 0.97 - 0.6 * np.exp(-x / 4)


def sgd(x: np.ndarray) -> np.ndarray:
    return 0.95 - 0.7 * np.exp(-x / 9)


def curves(change: Callable[[plt.Axes], None] = lambda axes: None) -> Figure:
    """Two learning curves with a band and a legend, changed by ``change``."""
    fig = Figure(figsize=(6, 4))
    axes = fig.subplots()
    axes.plot(EPOCHS, adam(EPOCHS), label="Adam")
    axes.plot(EPOCHS, sgd(EPOCHS), label="SGD")
    axes.fill_between(EPOCHS, sgd(EPOCHS) - 0.02, sgd(EPOCHS) + 0.02, alpha=0.2, label="95% of seeds")
    axes.set(title="test accuracy", xlabel="epoch", ylabel="accuracy")
    axes.legend()
    change(axes)
    return fig


def one(draw: Callable[[plt.Axes], object]) -> Figure:
    fig = Figure()
    draw(fig.subplots())
    return fig


def compare(a: Figure, b: Figure, tolerance: float | None = 0.01) -> list[str]:
    # Through JSON, as it is stored: nbformat writes the keys in alphabetical order.
    stored = json.loads(json.dumps(describe_figure(a), allow_nan=False, sort_keys=True))
    return differences(stored, json.loads(json.dumps(describe_figure(b), allow_nan=False)), tolerance)


def move(line: int, epoch: int, value: float) -> Callable[[plt.Axes], None]:
    def change(axes: plt.Axes) -> None:
        values = np.array(axes.lines[line].get_ydata(), dtype=float)
        values[epoch - 1] = value
        axes.lines[line].set_ydata(values)

    return change


def test_the_same_figure_agrees_with_itself() -> None:
    assert compare(curves(), curves()) == []


def test_a_dozen_named_bars_agree_and_two_swapped_do_not() -> None:
    names = [f"method {letter}" for letter in "abcdefghijklm"]
    bars = one(lambda axes: axes.barh(names, range(13)))
    assert compare(bars, bars) == []
    names[3], names[11] = names[11], names[3]
    assert "tick labels" in compare(bars, one(lambda axes: axes.barh(names, range(13))))[0]


def test_a_changed_curve_is_reported_in_the_readers_terms() -> None:
    found = compare(curves(), curves(move(0, 7, 0.8)))
    assert found == ["axes 'test accuracy', line 'Adam': epoch 7 is 0.8, stored 0.8657, tolerance 0.0087"]


@pytest.mark.parametrize("epoch", [1, 15, 30])
def test_two_per_cent_fail_and_half_a_per_cent_pass(epoch: int) -> None:
    value = adam(EPOCHS)[epoch - 1]
    assert compare(curves(), curves(move(0, epoch, 1.005 * value))) == []
    assert len(compare(curves(), curves(move(0, epoch, 1.02 * value)))) == 1
    assert compare(curves(), curves(move(0, epoch, 1.02 * value)), tolerance=0.05) == []


def test_a_moved_band_names_its_edge() -> None:
    def change(axes: plt.Axes) -> None:
        axes.collections[0].remove()
        axes.fill_between(EPOCHS, sgd(EPOCHS) - 0.02, sgd(EPOCHS) + 0.06, alpha=0.2, color="C0", label="95% of seeds")

    found = compare(curves(), curves(change))
    assert len(found) == 1
    assert "band '95% of seeds': upper end, epoch " in found[0]
    assert "(and 29 more of 30 points)" in found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.legend(["SGD", "Adam", "95% of seeds"]), "the legend reads 'SGD', stored 'Adam'"),
        (lambda a: a.legend(handles=[a.lines[1], a.lines[0], a.collections[0]]), "the legend reads 'SGD'"),
        (lambda a: a.legend(a.lines[::-1], ["Adam", "SGD"]), "the legend has Adam, SGD, stored"),
        (lambda a: a.get_legend().remove(), "the legend is missing"),
        (lambda a: a.lines[0].remove(), "line 'Adam' is missing"),
        (lambda a: a.collections[0].remove(), "band '95% of seeds' is missing"),
        (lambda a: a.plot([1, 2], [0.5, 0.6], label="Lion"), "line 'Lion' is new"),
        (lambda a: a.set_title("train accuracy"), "title reads 'train accuracy', stored 'test accuracy'"),
        (lambda a: a.set_title(""), "title is '', stored 'test accuracy'"),
        (lambda a: a.set_xlabel("step"), "x label reads 'step', stored 'epoch'"),
        (lambda a: a.set_yscale("log"), "y scale is log, stored linear"),
        (lambda a: a.lines[0].set_color("black"), "line 'Adam': colour is #000000"),
        (lambda a: a.lines[0].set_linestyle(":"), "line 'Adam': style is :, stored -"),
        (lambda a: a.set_ylim(0, 1), "y limits: 0 to 1"),
        (lambda a: a.invert_yaxis(), "y limits"),
        (lambda a: a.text(10, 0.5, "here"), "the text 'here' is new"),
        (lambda a: a.lines[0].set_data(EPOCHS[:20], adam(EPOCHS[:20])), "line 'Adam' has 20 points, stored 30"),
        (lambda a: a.lines[0].set_data(EPOCHS + 3, adam(EPOCHS)), "line 'Adam': point 1 of 30 is at (4, "),
        (lambda a: plotting.describe(a.figure, "Adam is ahead"), "alternative text is 'Adam is ahead', stored ''"),
        (lambda a: a.figure.suptitle("all"), "title is 'all', stored ''"),
        (lambda a: a.figure.add_axes((0.5, 0.5, 0.2, 0.2)), "2 axes, stored 1"),
        (move(0, 5, np.nan), "line 'Adam': epoch 5 is nan"),
    ],
)
def test_each_kind_of_change_is_found(change: Callable[[plt.Axes], None], message: str) -> None:
    found = compare(curves(), curves(change))
    assert any(message in line for line in found), found


def test_a_legend_that_names_the_other_series_is_found() -> None:
    # The words stand in their places; only the handles are swapped.
    def swap(axes: plt.Axes) -> None:
        axes.legend([axes.lines[1], axes.lines[0], axes.collections[0]], ["Adam", "SGD", "95% of seeds"])

    found = compare(curves(), curves(swap))
    assert found[0].startswith("axes 'test accuracy', the legend: 'Adam': colour is #")


def test_labels_written_beside_curves_are_held_to_them() -> None:
    def labels(first: str, second: str) -> Callable[[plt.Axes], None]:
        def change(axes: plt.Axes) -> None:
            for line, name in zip(axes.lines, (first, second), strict=True):
                axes.text(30, float(line.get_ydata()[-1]), name, color=line.get_color())

        return change

    assert compare(curves(labels("Adam", "SGD")), curves(labels("Adam", "SGD"))) == []
    assert compare(curves(labels("Adam", "SGD")), curves(labels("SGD", "Adam"))) != []


def test_a_number_in_a_label_is_compared_as_a_number() -> None:
    def label(text: str) -> Callable[[plt.Axes], None]:
        def change(axes: plt.Axes) -> None:
            axes.lines[0].set_label(text)
            axes.legend()

        return change

    assert compare(curves(label("Adam, 0.953")), curves(label("Adam, 0.954"))) == []
    assert "0.853, stored 0.953" in compare(curves(label("Adam, 0.953")), curves(label("Adam, 0.853")))[0]
    assert "is missing" in compare(curves(label("Adam, 0.953")), curves(label("Adamax, 0.953")))[-2]


# ---- tolerance -------------------------------------------------------------------------------------------------------


def line(y: np.ndarray, scale: str = "linear", limits: tuple[float, float] | None = None) -> Figure:
    def draw(axes: plt.Axes) -> None:
        axes.plot(np.arange(len(y)), y)
        axes.set_yscale(scale)
        if limits:
            axes.set_ylim(limits)

    return one(draw)


def test_rounding_noise_about_zero_is_no_difference() -> None:
    y = np.linspace(-1, 1, 21)
    assert compare(line(y), line(y + 1e-9)) == []
    assert compare(line(0 * y, limits=(-1, 1)), line(0 * y + 1e-5, limits=(-1, 1))) == []


def test_a_small_change_about_a_large_offset_counts() -> None:
    falling = 1000 - np.linspace(0, 1, 20)
    assert compare(line(falling), line(np.full(20, 999.5))) != []
    assert compare(line(falling), line(falling[::-1])) != []


def test_log_axes_are_compared_in_decades() -> None:
    y = np.logspace(0, -6, 20)
    changed = y.copy()
    changed[10] *= 2  # 1e-3: nothing on a linear axis
    assert compare(line(y), line(changed)) == []
    found = compare(line(y, "log"), line(changed, "log"))
    assert len(found) == 1
    assert "x = 10 is" in found[0]
    assert compare(line(y, "log"), line(y * 1.005, "log")) == []
    below = np.where(y > 1e-5, y, 0.0)  # zero is below every log axis
    assert compare(line(below, "log", (1e-4, 1)), line(np.where(below > 0, below, 1e-30), "log", (1e-4, 1))) == []


def test_symlog_axes_show_what_happens_near_zero() -> None:
    y = np.array([-100.0, -0.01, 0.01, 100.0])

    def draw(values: np.ndarray) -> Figure:
        def on(axes: plt.Axes) -> None:
            axes.plot(values)
            axes.set_yscale("symlog", linthresh=1e-3)

        return one(on)

    assert compare(draw(y), draw(y)) == []
    assert compare(draw(y), draw(y * np.array([1, 1, 2, 1]))) != []


def test_what_lies_far_outside_the_axes_is_not_seen() -> None:
    y = np.array([1.0, 2.0, 3.0, 1e6])
    other = np.array([1.0, 2.0, 3.0, 5e5])
    assert compare(line(y, limits=(0, 4)), line(other, limits=(0, 4))) == []
    assert compare(line(y, limits=(0, 4)), line(np.array([1.0, 2.0, 3.0, 3.0]), limits=(0, 4))) != []


def test_infinite_and_missing_values_are_stored_and_compared() -> None:
    y = np.array([1.0, np.nan, np.inf, 2.0, -np.inf])
    assert compare(line(y), line(y)) == []
    assert compare(line(y), line(np.array([1.0, 1.5, np.inf, 2.0, -np.inf]))) != []


def test_timing_asks_only_for_finite_numbers() -> None:
    y = np.array([1.0, 2.0, 3.0])
    assert compare(line(y), line(100 * y), tolerance=None) == []
    assert "not finite" in compare(line(y), line(np.array([1.0, np.nan, 3.0])), tolerance=None)[0]
    assert "has 2 points" in compare(line(y), line(y[:2]), tolerance=None)[0]
    assert compare(curves(), curves(lambda a: a.set_title("other")), tolerance=None) != []
    red, blue = (curves(lambda a, c=c: a.plot([1, 2], [0.5, 0.6], "o", color=c)) for c in ("red", "blue"))
    assert compare(red, blue, tolerance=None) == []  # the colour of nameless points may say what was measured
    assert any("colour" in line for line in compare(red, blue))


# ---- kinds of series -------------------------------------------------------------------------------------------------

GRID = np.linspace(-2, 2, 40)
X, Y = np.meshgrid(GRID, GRID)
POINTS = np.random.default_rng(0).normal(size=(50, 2))
PIXELS = np.random.default_rng(1).random((28, 28))


@pytest.mark.parametrize(
    ("draw", "change", "message"),
    [
        pytest.param(
            lambda a, k: a.bar(["Adam", "SGD"], [0.9, 0.8 + k]), 0.05, "bars 1: 'SGD' is 0.85, stored 0.8", id="bar"
        ),
        pytest.param(lambda a, k: a.barh(["Adam", "SGD"], [0.9, 0.8 + k]), 0.05, "'SGD' is 0.85", id="barh"),
        pytest.param(
            lambda a, k: a.bar(["Adam", "SGD"][:: -1 if k else 1], [0.9, 0.8]), 1, "tick labels", id="bar names"
        ),
        pytest.param(lambda a, k: a.hist(POINTS[:, 0] + k, bins=np.arange(-4, 4)), 1, "bars 1", id="histogram"),
        pytest.param(
            lambda a, k: a.errorbar([1, 2], [3, 4], yerr=[0.5, 0.5 + k], label="Adam"),
            0.2,
            "error bars 'Adam': lower end, x = 2 is 3.3, stored 3.5",
            id="error bars",
        ),
        pytest.param(lambda a, k: a.errorbar([1, 2], [3, 4], xerr=0.5 + k), 0.2, "left end", id="sideways error bars"),
        pytest.param(lambda a, k: a.scatter(*(POINTS + np.array([k, 0])).T), 1, "points 1: point", id="scatter"),
        pytest.param(lambda a, k: a.scatter(*POINTS.T, c=POINTS[:, 0] * (1 + k)), 1, "value", id="coloured scatter"),
        pytest.param(lambda a, k: a.scatter(*POINTS.T, c=["r", "b"] * 25 if k else "r"), 1, "colour", id="classes"),
        pytest.param(lambda a, k: a.imshow(PIXELS * (1 - k)), 0.5, "image 1", id="image"),
        pytest.param(lambda a, k: a.imshow(np.eye(3) * (1 + k), vmax=1), 0.5, "row 1 of 3, column 1", id="heat map"),
        pytest.param(lambda a, k: a.imshow(np.dstack([PIXELS, PIXELS, PIXELS * (1 - k)])), 0.5, "image 1", id="RGB"),
        pytest.param(lambda a, k: a.imshow(PIXELS, cmap="gray" if k else "viridis"), 1, "colour map", id="colours"),
        pytest.param(lambda a, k: a.pcolormesh(X, Y, X**2 + (1 + k) * Y**2), 1, "colour mesh 1", id="mesh"),
        pytest.param(
            lambda a, k: a.pcolormesh(X, Y, 10 ** (X + Y + k * (X + Y < -2)), norm="log"), 0.5, "mesh 1", id="log mesh"
        ),
        pytest.param(
            lambda a, k: a.contour(X, Y, (X - k) ** 2 + 3 * Y**2, levels=[1, 2]), 0.3, "contours 1", id="contours"
        ),
        pytest.param(lambda a, k: a.contourf(X, Y, X * Y + k * X, levels=[0, 1]), 0.5, "filled contours", id="filled"),
        pytest.param(lambda a, k: a.quiver(GRID, GRID, GRID, GRID * (1 + k)), 1, "arrows 1", id="arrows"),
        pytest.param(lambda a, k: a.stem([1, 2, 3], [1, 2, 3 + k]), 1, "stems 1: x = 3 is 4, stored 3", id="stems"),
        pytest.param(lambda a, k: a.axhline(0.5 + k), 0.2, "line 1: y is 0.7, stored 0.5", id="horizontal line"),
        pytest.param(lambda a, k: a.axvspan(1, 2 + k), 0.5, "shape 1", id="span"),
        pytest.param(lambda a, k: a.hlines([1, 2], 0, [3, 4 + k]), 1, "segments 1", id="segments"),
        pytest.param(lambda a, k: a.boxplot([POINTS[:, 0] + k]), 1, "line", id="box plot"),
        pytest.param(lambda a, k: a.table([["a", "b" if k else "c"]]), 1, "Table 1", id="table"),
        pytest.param(
            lambda a, k: a.annotate("", (1 - k, 1), (0, 0), arrowprops={"arrowstyle": "->"}), 0.5, "arrow 1", id="arrow"
        ),
        pytest.param(lambda a, k: a.inset_axes((0.5, 0.5, 0.4, 0.4)).plot([1, 2 + k]), 1, "line 1", id="inset"),
        pytest.param(lambda a, k: a.twinx().plot([1, 2 + k]), 1, "line 1", id="twin"),
        pytest.param(lambda a, k: a.figure.colorbar(a.imshow(PIXELS)).set_label("ab"[k]), 1, "y label", id="bar"),
    ],
)
def test_every_kind_of_series_is_held_to_its_data(
    draw: Callable[[plt.Axes, float], object], change: float, message: str
) -> None:
    same = one(lambda axes: draw(axes, 0))
    assert compare(same, one(lambda axes: draw(axes, 0))) == []
    assert compare(same, same, tolerance=None) == []
    found = compare(same, one(lambda axes: draw(axes, change)))
    assert any(message in difference for difference in found), found


def test_three_dimensions() -> None:
    def surface(k: float) -> Figure:
        fig = Figure()
        axes = fig.add_subplot(projection="3d")
        axes.plot_surface(X, Y, X**2 + (1 + k) * Y**2)
        axes.plot([0, 1], [0, 1], [0, 1 + k])
        axes.scatter([0], [0], [k])
        return fig

    assert compare(surface(0), surface(0)) == []
    found = compare(surface(0), surface(1))
    assert {kind for kind in ("surface", "line", "points") if any(kind in each for each in found)} == {
        "surface",
        "line",
        "points",
    }


# ---- storing ---------------------------------------------------------------------------------------------------------


def test_columns_are_packed_and_read_back() -> None:
    assert pack(np.arange(30)) == "0:29:30"
    assert pack([0.123456, np.nan, np.inf]) == "0.1235 nan inf"
    for values in (np.linspace(3, 7, 100), np.array([1.0]), np.array([]), np.array([2.0, 2.0, 2.0, 2.0]), -EPOCHS):
        np.testing.assert_allclose(unpack(pack(values)), values, rtol=5e-4)


def test_a_long_series_is_thinned_with_both_ends_and_stays_small() -> None:
    y = np.random.default_rng(0).normal(size=100_000)
    series = describe_figure(line(y))["axes"][0]["series"][0]
    kept = unpack(series["data"]["y"])
    assert series["points"] == 100_000
    assert len(kept) == 200
    np.testing.assert_allclose(kept[[0, -1]], y[[0, -1]], rtol=1e-3)
    assert len(json.dumps(series)) < 3_000


def test_describing_does_not_change_the_figure() -> None:
    fig = curves()
    before = describe_figure(fig)
    fig.canvas.draw()
    assert describe_figure(fig) == before


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("loss 0.123", "loss 0.1235"),
        ("  loss    0.123", "loss 0.123"),
        ("-0.00", "0.00"),
        ("0.12, 0.13", "0.13, 0.13"),  # neighbours after rounding
        ("[0.1  0.2]", "[ 0.1 0.2]"),
        ("1,797 images", "1,790 images"),
        ("<Styler at 0x7fb8223e2c90>", "<Styler at 0x7f07b7da7d90>"),
        ("a\n------\n1.00", "a\n--------\n1.001"),
        ("\x1b[31m1.0\x1b[0m", "1.0"),
        ("nan", "NaN"),
        ("1.2e-05", "1.3e-05"),
        ("0.00", "-0.01"),
    ],
)
def test_texts_that_agree(stored: str, fresh: str) -> None:
    assert text_differences(stored, fresh) == []


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ("loss 0.123", "loss 0.133"),
        ("loss 0.123", "lost 0.123"),
        ("conv2d", "conv3d"),
        ("epoch 5", "epoch 6"),
        ("loss 0.5", "loss 0.6"),
        ("lr 0.001", "lr 0.002"),
        ("torch 2.13.0", "torch 2.13.1"),
        ("0.5", "-0.5"),
        ("1, 2, 3", "1, 2"),
        ("1, 2", "1, 2, 3"),
        ("ready", "ready 1"),
        ("loss 0.1", "loss nan"),
        ("a\nb", "a\nc"),
        ("#00ff00", "#00ff01"),
        ("1.2e-05", "1.2e-04"),
    ],
)
def test_texts_that_differ(stored: str, fresh: str) -> None:
    assert len(text_differences(stored, fresh)) == 1


def test_a_cells_own_tolerance_is_measured_by_the_line() -> None:
    line, other = "Adam - SGD: -0.0012 [-0.0051, 0.0027]", "Adam - SGD: 0.0003 [-0.0040, 0.0041]"
    assert len(text_differences(line, other)) == 3
    assert text_differences(line, other, 0.5) == []
    assert text_differences(line, other.replace("0.0041", "0.0141"), 0.5) != []


def test_the_difference_of_a_text_says_where() -> None:
    found = text_differences("Adam 0.91\nSGD 0.95\n", "Adam 0.91\nSGD 0.85\n")
    assert found == ["line 2, 'SGD 0.85': 0.85, stored 0.95, tolerance 0.019"]
    assert text_differences("a 1\nb 2\n", "a 1\nc 2\n") == ["line 2 reads 'c 2', stored 'b 2'"]


def test_measured_text_may_change_its_unit_but_not_its_words() -> None:
    assert text_differences("a step takes 30 µs", "a step takes 1.2 ms", None) == []
    assert text_differences("a step takes 30 µs", "a stride takes 30 µs", None) != []
    assert text_differences("a step takes 30 µs", "a step takes nan µs", None) != []
    assert text_differences("a step takes 30 µs", "a step takes 30 ms") != []


def table(accuracy: str, name: str = "Adam") -> str:
    style = f"<style>#T_{abs(hash(accuracy))}_row0 {{color: red}}</style>"
    head = '<thead><tr><th>&nbsp;</th><th class="col_heading">accuracy</th></tr></thead>'
    row = f"<tr>\n <th>{name}</th>\n <td>{accuracy}</td></tr>"
    return f'{style}<table id="T_1"><caption>5 seeds</caption>{head}{row}</table>'


def test_tables_are_compared_cell_by_cell() -> None:
    assert html_differences(table("0.951"), table("0.955")) == []
    found = html_differences(table("0.95"), table("0.85"))
    assert found == ["row 'Adam', column 'accuracy': 0.85, stored 0.95, tolerance 0.019"]
    assert html_differences(table("0.95"), table("0.95", "SGD")) == ["row 'Adam', column 1: reads 'SGD', stored 'Adam'"]
    assert "4 rows, stored 3" in html_differences(table("0.95"), table("0.95") + "<p>more</p>")[0]


# ---- the formatter ---------------------------------------------------------------------------------------------------


def test_register_adds_the_description_to_figures_and_to_nothing_else() -> None:
    from IPython.core.formatters import DisplayFormatter

    class Shell:
        display_formatter = DisplayFormatter()

    register(Shell)
    register(Shell)  # twice does no harm
    shown, _ = Shell.display_formatter.format(curves())
    assert shown[FIGURE_MIME] == describe_figure(curves())
    # The inline backend does this when it starts, after the course has been imported.
    for formatter in Shell.display_formatter.formatters.values():
        formatter.pop(Figure, None)
    assert FIGURE_MIME in Shell.display_formatter.format(curves())[0]
    for other in (1, "text", Figure, np.zeros(3), curves().axes[0]):
        assert FIGURE_MIME not in Shell.display_formatter.format(other)[0]


def test_register_outside_ipython_does_nothing() -> None:
    register()
