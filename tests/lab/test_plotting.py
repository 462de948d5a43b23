"""Figures: what is drawn is what was given."""

import io
from base64 import b64decode

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from nbclient import NotebookClient
from PIL import Image
from scipy import stats

from course_lib.lab import plotting


@pytest.fixture(autouse=True)
def in_our_style():
    with plt.rc_context():
        plotting.style()
        yield
    plt.close("all")


def test_curves_draw_mean_and_interval():
    values = np.random.default_rng(0).normal(size=(5, 8))
    ax = plotting.curves({"one": values}, ylabel="loss")
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), values.mean(0))
    low, high = stats.t.interval(0.95, 4, loc=values.mean(0), scale=stats.sem(values, axis=0))
    corners = ax.collections[0].get_paths()[0].vertices
    for edge in (low, high):
        assert all(np.abs(corners[:, 1] - y).min() < 1e-12 for y in edge)
    assert ax.get_xlabel() == "epoch (means and 95% bands, 5 seeds)"
    assert [t.get_text() for t in ax.texts] == ["one"]


def test_line_labels_do_not_overlap_and_keep_their_order():
    ax = plt.subplots()[1]
    for k, height in enumerate([0.5, 0.501, 0.502, 0.1]):
        ax.plot([0, 1], [0, height], label=str(k))
    plotting.label_lines(ax, gap=0.1)
    heights = {t.get_text(): t.get_position()[1] for t in ax.texts}
    assert heights["3"] < heights["0"] < heights["1"] < heights["2"]
    assert min(np.diff(sorted(heights.values()))) >= 0.1 - 1e-9


def test_intervals_draw_mean_and_runs():
    ax = plotting.intervals({"a": np.array([1.0, 2.0, 3.0]), "b": np.array([4.0, 4.0, 7.0])}, xlabel="score")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [float(c.lines[0].get_xdata()[0]) for c in ax.containers] == [2.0, 5.0]
    reach = stats.t.ppf(0.975, 2) / np.sqrt(3)
    segment = ax.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(segment[:, 0], [2 - reach, 2 + reach])


def test_image_grid_shows_each_image_once():
    images = torch.arange(6 * 16, dtype=torch.uint8).reshape(6, 1, 4, 4)
    fig = plotting.image_grid(images, titles=list("abcdef"), columns=4)
    shown = [ax for ax in fig.axes if ax.images]
    assert len(shown) == 6
    np.testing.assert_array_equal(shown[3].images[0].get_array(), images[3, 0])
    with pytest.raises(ValueError, match=r"\[6, 16\]"):
        plotting.image_grid(images.flatten(1))


def test_slot_map_lights_what_is_named():
    fig = plotting.slot_map("optimizer")
    lit = [p for p in fig.axes[0].patches if p.get_linewidth() == 2]
    assert len(lit) == 1
    assert "optimizer" in fig.axes[0].get_title(loc="left")
    with pytest.raises(ValueError, match="lit='optimiser'.*optimizer"):
        plotting.slot_map("optimiser")


def test_an_alternative_text_is_kept_and_must_be_one():
    fig = plotting.slot_map("optimizer")
    assert fig.get_label().startswith("The training loop as a ring of slots")
    assert "“optimizer”" in fig.get_label()
    plotting.describe(fig, "Something else")
    assert fig.get_label() == "Something else"
    with pytest.raises(ValueError, match=r"words=' ': must be a sentence"):
        plotting.describe(fig, " ")


def test_the_loop_of_the_slot_map_closes():
    after = dict(edge for edge in plotting._FLOW if edge[0] != "schedule")
    visited, slot = [], "data"
    while slot not in visited:
        visited.append(slot)
        slot = after[slot]
    assert slot == "data"
    assert set(plotting.SLOTS) - set(visited) == {"schedule", "execution"}
    arrows = [p for p in plotting.slot_map().axes[0].patches if isinstance(p, FancyArrowPatch)]
    assert len(arrows) == len(plotting._FLOW) + 1, "and one back to the next batch"


@pytest.mark.parametrize("slot", plotting.SLOTS)
def test_any_slot_can_be_lit(slot):
    boxes = [p for p in plotting.slot_map(slot).axes[0].patches if isinstance(p, FancyBboxPatch)]
    assert [box.get_linewidth() for box in boxes].count(2) == 1
    assert len(boxes) == len(plotting.SLOTS)


def test_every_technique_chapter_stands_on_the_map():
    texts = [text.get_text() for text in plotting.slot_map().axes[0].texts]
    said = ", ".join(text.split(" ", 1)[1] for text in texts if text.startswith("chapter"))
    assert sorted(int(n) for n in said.replace("11–14", "11, 12, 13, 14").split(", ")) == list(range(1, 16))
    assert "chapters 8, 11–14" in texts
    assert "chapter 1" in texts


def test_landscape_and_path_keep_their_data():
    ax = plotting.landscape(lambda w: w.square().sum(-1), (-1, 1), (-2, 2))
    way = np.array([[1.0, 1.0], [0.5, 0.2], [0.0, 0.0]])
    plotting.path(way, ax=ax, name="SGD")
    np.testing.assert_array_equal(ax.get_lines()[0].get_xydata(), way)
    assert ax.get_lines()[0].get_label() == "SGD"


def test_the_chapter_map_draws_every_chapter_once():
    ax = plotting.chapter_map(written=(0, 2)).axes[0]
    named = [t.get_text() for t in ax.texts if t.get_text()[:1].isdigit()]
    assert sorted(int(text.split()[0]) for text in named) == list(range(18))
    boxes = [p for p in ax.patches if isinstance(p, FancyBboxPatch)]
    assert [box.get_linestyle() for box in boxes].count("-") == 2
    arrows = [p for p in ax.patches if isinstance(p, FancyArrowPatch)]
    assert len(arrows) == len(plotting.NEEDS)
    assert plotting.chapter_map(written=range(18))
    with pytest.raises(ValueError, match=r"written=\[18\].*0 to 17"):
        plotting.chapter_map(written=(3, 18))


def test_chapters_build_on_earlier_ones_and_no_arrow_is_superfluous():
    assert all(before < after for before, after in plotting.NEEDS)
    assert {after for _, after in plotting.NEEDS} == set(range(1, 18)) - {16}, "16 stands on all of them, as drawn"

    def reachable(start, arrows):
        below = {after for before, after in arrows if before == start}
        return below.union(*(reachable(chapter, arrows) for chapter in below))

    for arrow in plotting.NEEDS:
        others = [other for other in plotting.NEEDS if other != arrow]
        assert arrow[1] not in reachable(arrow[0], others), f"{arrow} follows from the other arrows"


def test_a_chapter_counts_as_written_when_its_notebook_is_there(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    for name in ("03_learning_rate.ipynb", "draft.ipynb"):
        (tmp_path / "notebooks" / name).touch()
    monkeypatch.setattr("course_lib.lab.chapters.checkout", lambda: tmp_path)
    boxes = [p for p in plotting.chapter_map().axes[0].patches if isinstance(p, FancyBboxPatch)]
    assert [number for number, box in enumerate(boxes) if box.get_linestyle() == "-"] == [3]
    monkeypatch.setattr("course_lib.lab.chapters.checkout", lambda: None)
    boxes = [p for p in plotting.chapter_map().axes[0].patches if isinstance(p, FancyBboxPatch)]
    assert all(box.get_linestyle() != "-" for box in boxes)


def test_a_notebook_stores_figures_at_twice_the_size_they_are_shown_at():
    source = "from course_lib.lab import plotting\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (shown,) = [output for output in notebook.cells[0].outputs if "image/png" in output.get("data", {})]
    stored, at = Image.open(io.BytesIO(b64decode(shown.data["image/png"]))).size, shown.metadata["image/png"]
    assert stored == pytest.approx((2 * at["width"], 2 * at["height"]), abs=1)
    assert 400 < at["width"] < 600
