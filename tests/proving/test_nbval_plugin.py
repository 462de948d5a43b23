"""The checker itself: what each kind of change to a notebook's outputs does to a real validation run."""

import base64
import io
import json
from collections.abc import Callable
from copy import deepcopy
from functools import partialmethod
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from course_lib.proving import nbval_plugin
from course_lib.proving.figures import FIGURE_MIME, describe_figure
from course_lib.proving.leftovers import Traces
from course_lib.proving.nbval_plugin import (
    WIDGET_MIME,
    cell_tolerance,
    kernel_environment,
    output_differences,
    png_problem,
)

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]

# ---- outputs, compared without a kernel ------------------------------------------------------------------------------


def png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


BLANK = png(Image.new("RGB", (60, 40), "white"))
DRAWN = png(Image.fromarray(np.eye(40, dtype=np.uint8) * 255))


def figure(values: list[float], picture: str | None = DRAWN, **data: object) -> dict:
    fig = Figure()
    fig.subplots().plot(values, label="Adam")
    bundle = {FIGURE_MIME: describe_figure(fig), "text/plain": "<Figure size 640x480 with 1 Axes>"} | data
    return shown(bundle | ({"image/png": picture} if picture else {}))


def shown(data: dict) -> dict:
    return {"output_type": "display_data", "data": data, "metadata": {}}


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


WIDGET = {WIDGET_MIME: {"model_id": "a" * 32}, "text/plain": "IntSlider(value=1)"}


@pytest.mark.parametrize(
    ("stored", "fresh"),
    [
        ([], []),
        ([figure([1, 2])], [figure([1, 2.001])]),
        ([printed("a"), printed("b")], [printed("ab")]),
        ([printed("loss 0.5"), printed("noise", "stderr")], [printed("loss 0.501")]),
        ([shown(WIDGET)], [shown(WIDGET | {WIDGET_MIME: {"model_id": "b" * 32}})]),
        ([figure([1, 2], **WIDGET)], [figure([1, 2], **WIDGET)]),
        ([shown({"text/html": ["<b>ok ", "0.5</b>"]})], [shown({"text/html": "<b>ok 0.5</b>"})]),
    ],
)
def test_outputs_that_agree(stored: list[dict], fresh: list[dict]) -> None:
    assert output_differences(stored, fresh) == []


@pytest.mark.parametrize(
    ("stored", "fresh", "message"),
    [
        ([figure([1, 2])], [figure([1, 3])], "figure 1, line 'Adam': x = 1 is 3, stored 2, tolerance 0.02"),
        ([figure([1, 2])], [], "no figures, stored 1"),
        ([], [figure([1, 2])], "1 figure, stored none"),
        ([figure([1, 2])], [figure([1, 2])] * 2, "2 figures, stored 1"),
        ([figure([1, 2]), printed("x")], [printed("x")], "no figures, stored 1"),
        ([figure([1, 2], BLANK)], [figure([1, 2])], "figure 1, the PNG of the stored figure is blank"),
        ([figure([1, 2])], [figure([1, 2], BLANK)], "figure 1, the PNG of the new figure is blank"),
        ([figure([1, 2], "bm8=")], [figure([1, 2])], "the PNG of the stored figure cannot be read"),
        ([figure([1, 2])], [figure([1, 2], None)], "the new figure has data but no PNG"),
        ([shown({"image/png": DRAWN})], [shown({"image/png": DRAWN})], "without data"),
        ([shown({"image/svg+xml": "<svg/>"})], [shown({"image/svg+xml": "<svg/>"})], "without data"),
        ([shown({"text/html": "<img src='data:x'>"})], [shown({"text/html": "<img src='data:x'>"})], "without data"),
        ([figure([1, 2], **{FIGURE_MIME: {}})], [figure([1, 2])], "cannot be read"),
        ([printed("loss 0.5")], [printed("loss 0.6")], "printed text, 'loss 0.6': 0.6, stored 0.5"),
        ([printed("loss 0.5")], [printed("cost 0.5")], "printed text, reads 'cost 0.5', stored 'loss 0.5'"),
        ([printed("x")], [], "printed text"),
        ([shown({"text/plain": "1"})], [shown({"text/plain": "2"})], "text, 2, stored 1"),
        ([shown({"text/plain": "1"})], [shown({"text/html": "1"})], "shown as text/html, stored as text/plain"),
        ([shown(WIDGET)], [], "no widgets, stored 1"),
        ([figure([1, 2], **WIDGET)], [figure([1, 3], **WIDGET)], "widget 1, line 'Adam': x = 1 is 3"),
        (
            [shown({"text/html": "<table><tr><td>1</td></tr></table>"}), figure([1, 2])],
            [figure([1, 2]), shown({"text/html": "<table><tr><td>1</td></tr></table>"})],
            "stored in the order table, figure",
        ),
        (
            [{"output_type": "error", "ename": "ValueError", "evalue": "lr is -1", "traceback": []}],
            [{"output_type": "error", "ename": "TypeError", "evalue": "lr is -1", "traceback": []}],
            "error: reads 'TypeError",
        ),
    ],
)
def test_outputs_that_differ(stored: list[dict], fresh: list[dict], message: str) -> None:
    found = output_differences(stored, fresh)
    assert any(message in line for line in found), found


def test_timing_forgives_numbers_but_not_nan() -> None:
    stored, fresh = [figure([1, 2]), printed("3 ms")], [figure([10, 7]), printed("900 µs")]
    assert output_differences(stored, fresh) != []
    assert output_differences(stored, fresh, None) == []
    assert "not finite" in output_differences(stored, [figure([np.nan, 2]), printed("3 ms")], None)[0]
    assert "not finite" in output_differences(stored, [figure([1, 2]), printed("nan ms")], None)[0]


@pytest.mark.parametrize(("tags", "native", "agrees"), [(["processor"], False, True), (["processor"], True, False),
                                                        ([], False, False)])  # fmt: skip
def test_the_tag_processor_forgives_where_bfloat16_is_emulated(
    tags: list[str], native: bool, agrees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbval_plugin, "multiplies_bfloat16", lambda: native)
    item = object.__new__(nbval_plugin.CourseCell)
    item.cell = nbformat.v4.new_code_cell("x", metadata={"tags": tags})
    assert item.compare_outputs([printed("it shrinks")], [printed("it grows")]) == agrees


def test_tags_of_a_cell() -> None:
    assert cell_tolerance([]) == cell_tolerance(["hide-input"]) == 0.01
    assert cell_tolerance(["tol:0.05"]) == 0.05
    assert cell_tolerance(["timing"]) is None
    for tag in ("tol=0.05", "tol:", "tol:5", "tolerance", "tol:0"):
        with pytest.raises(ValueError, match=tag):
            cell_tolerance([tag])


def test_png_problems() -> None:
    assert png_problem(DRAWN) is None
    assert png_problem(BLANK) == png_problem(png(Image.new("RGBA", (9, 9), (0, 0, 0, 0)))) == "is blank"
    assert png_problem("nonsense") == png_problem(DRAWN[:40]) == "cannot be read"
    thin = Image.new("L", (640, 480), 255)
    thin.paste(0, (0, 200, 640, 201))
    assert png_problem(png(thin)) is None


def test_the_kernels_environment() -> None:
    alone = kernel_environment({"COURSE_PROFILE": "full"})
    assert (alone["COURSE_VALIDATING"], alone["COURSE_PROGRESS"], alone["COURSE_DEVICE"]) == ("1", "off", "cpu")
    assert alone["COURSE_PROFILE"] is None
    assert not Path(alone["TORCH_HOME"]).exists()  # whoever has pretrained weights is shown what all others are
    assert "OMP_NUM_THREADS" not in alone
    shared = kernel_environment({"PYTEST_XDIST_WORKER_COUNT": "1000", "MKL_NUM_THREADS": "3"})
    assert shared["OMP_NUM_THREADS"] == "1"
    assert "MKL_NUM_THREADS" not in shared


# ---- real validation runs --------------------------------------------------------------------------------------------

HEAD = """
import os, time
import matplotlib.pyplot as plt, numpy as np, pandas as pd
import course_lib.proving.figures
course_lib.proving.figures.register()
x = np.arange(1, 31)
"""
CURVES = """
fig, ax = plt.subplots()
ax.plot(x, 0.97 - 0.6 * np.exp(-x / 4), label="Adam")
ax.plot(x, 0.95 - 0.7 * np.exp(-x / 9), label="SGD")
ax.set(title="test accuracy", xlabel="epoch", ylabel="accuracy")
ax.legend();
"""


def first_figure(cell: NotebookNode) -> dict:
    return next(o.data for o in cell.outputs if FIGURE_MIME in o.get("data", {}))


def series(cell: NotebookNode) -> list[dict]:
    return first_figure(cell)[FIGURE_MIME]["axes"][0]["series"]


def change_curve(cell: NotebookNode) -> None:
    values = series(cell)[0]["data"]["y"].split()
    values[6] = "0.95"
    series(cell)[0]["data"]["y"] = " ".join(values)


def swap_legend(cell: NotebookNode) -> None:
    entries = first_figure(cell)[FIGURE_MIME]["axes"][0]["legends"][0]["entries"]
    entries[0]["text"], entries[1]["text"] = entries[1]["text"], entries[0]["text"]


def change_title(cell: NotebookNode) -> None:
    first_figure(cell)[FIGURE_MIME]["axes"][0]["title"] = "train accuracy"


def put_text(old: str, new: str) -> Callable[[NotebookNode], None]:
    def change(cell: NotebookNode) -> None:
        text = json.dumps(cell.outputs)
        assert old in text
        cell.outputs = [nbformat.from_dict(output) for output in json.loads(text.replace(old, new))]

    return change


def forget(cell: NotebookNode) -> None:
    cell.outputs, cell.execution_count = [], None


TABLE = "pd.DataFrame({'accuracy': [0.911, 0.852]}, index=['Adam', 'SGD'])"
# Each row is a cell, how its stored output is spoiled, and what the run must then say.
SPOILED = [
    (CURVES, change_curve, "figure 1, axes 'test accuracy', line 'Adam': epoch 7 is 0.8657, stored 0.95, tolerance"),
    (CURVES, swap_legend, "figure 1, axes 'test accuracy', the legend reads 'Adam', stored 'SGD'"),
    (CURVES, lambda cell: series(cell).append(series(cell)[0] | {"label": "Lion"}), "line 'Lion' is missing"),
    (CURVES, lambda cell: series(cell).pop(), "line 'SGD' is new"),
    (CURVES, change_title, "title reads 'test accuracy', stored 'train accuracy'"),
    (CURVES, lambda cell: cell.outputs.append(deepcopy(cell.outputs[-1])), "1 figure, stored 2"),
    (CURVES, lambda cell: cell.outputs.clear(), "1 figure, stored none"),
    (CURVES, lambda cell: first_figure(cell).update({"image/png": BLANK}), "the PNG of the stored figure is blank"),
    (CURVES, lambda cell: first_figure(cell).pop("image/png"), "the stored figure has data but no PNG"),
    (CURVES, lambda cell: first_figure(cell).pop(FIGURE_MIME), "figure 1, the stored figure is without data"),
    ("print('loss 0.911 for Adam')", put_text("0.911", "0.852"), "printed text, 'loss 0.911 for Adam': 0.911, stored"),
    (
        "print('loss 0.911 for Adam')",
        put_text("Adam", "SGD"),
        "reads 'loss 0.911 for Adam', stored 'loss 0.911 for SGD'",
    ),
    (TABLE, put_text("0.852", "0.952"), "table 1, row 'SGD', column 'accuracy': 0.852, stored 0.952"),
    (TABLE + ".style", put_text("SGD", "Lion"), "row 'Lion', column 1: reads 'SGD', stored 'Lion'"),
    ("1 + 1", forget, "The cell was never run"),
]
# Cells whose stored output is spoiled in a way that their tag allows.
FORGIVEN = [
    ("print(f'a step takes {time.perf_counter()} s')", ["timing"], lambda cell: None),
    ("print('a step takes 3 ms')", ["timing"], put_text("3 ms", "870 µs")),
    ("print('loss 0.911')", ["tol:0.1"], put_text("0.911", "0.852")),
    ("print('loss 0.911')", ["nbval-ignore-output"], put_text("0.911", "1.852")),
    ("raise ValueError('lr is -1')", ["raises-exception"], lambda cell: None),
]
# What a validation run sets; an author's own run, which made the stored outputs, is not one.
SETTINGS = """
if os.environ.get("COURSE_VALIDATING"):
    assert os.environ["COURSE_PROGRESS"] == "off" and "COURSE_PROFILE" not in os.environ
assert os.path.exists("here.txt"), os.getcwd()
"""
TRAINING = """
import torch
from torch import nn
torch.manual_seed(0)
images = torch.randn(512, 64)
labels = (images @ torch.randn(64, 10)).argmax(1)
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
losses, accuracies = [], []
for epoch in range(15):
    for i in torch.randperm(512).split(64):
        loss = nn.functional.cross_entropy(network(images[i]), labels[i])
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    with torch.no_grad():
        out = network(images)
        losses.append(nn.functional.cross_entropy(out, labels).item())
        accuracies.append((out.argmax(1) == labels).float().mean().item())
"""
PLOTTED = """
fig, (left, right) = plt.subplots(1, 2)
left.semilogy(losses, label="train"); left.legend(); left.set(xlabel="epoch", ylabel="loss")
right.plot(accuracies); right.set(xlabel="epoch", ylabel="accuracy", title="training accuracy")
plt.show()
pd.DataFrame({"loss": losses, "accuracy": accuracies})
"""


def notebook(path: Path, cells: list[tuple[str, list[str]]]) -> NotebookNode:
    """Writes and runs a notebook."""
    made = [nbformat.v4.new_code_cell(source.strip(), metadata={"tags": tags}) for source, tags in cells]
    nb = nbformat.v4.new_notebook(cells=made)
    path.parent.mkdir(exist_ok=True)
    (path.parent / "here.txt").touch()
    NotebookClient(nb, resources={"metadata": {"path": str(path.parent)}}).execute()
    nbformat.write(nb, path)
    return nb


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NotebookNode]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        for name in ("MPLBACKEND", "OMP_NUM_THREADS", "COURSE_PROFILE"):
            patch.delenv(name, raising=False)
        path = tmp_path_factory.mktemp("notebooks") / "good.ipynb"
        spoiled = [(source, []) for source, _, _ in SPOILED]
        forgiven = [(source, tags) for source, tags, _ in FORGIVEN]
        cells = [(HEAD, []), (SETTINGS, []), (TRAINING, []), (PLOTTED, []), *spoiled, *forgiven]
        return path, notebook(path, cells)


def validate(pytester: pytest.Pytester, path: Path) -> pytest.RunResult:
    """Runs pytest as an author does, in this process so that torch is imported once."""
    config = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(path.parent))
    return pytester.runpytest_inprocess(*config, "-n0", "-p", "no:cacheprovider", "--color=no", str(path))


def test_an_unchanged_notebook_passes_with_other_kernels_and_one_thread(
    good: tuple[Path, NotebookNode], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COURSE_PROFILE", "full")
    validate(pytester, good[0]).assert_outcomes(passed=len(good[1].cells))


def test_every_spoiled_cell_fails_and_no_other(good: tuple[Path, NotebookNode], pytester: pytest.Pytester) -> None:
    path, nb = good[0].with_name("spoiled.ipynb"), deepcopy(good[1])
    for cell, (_, spoil, _) in zip(nb.cells[4:], SPOILED, strict=False):
        spoil(cell)
    for cell, (_, _, spoil) in zip(nb.cells[4 + len(SPOILED) :], FORGIVEN, strict=True):
        spoil(cell)
    # A wrong method: the stored outputs of training are those of another learning rate.
    nb.cells[2].source = nb.cells[2].source.replace("lr=3e-3", "lr=2.5e-3")
    # A cell that fails to run: its traceback is shown, and the cells after it still run.
    broken = nbformat.v4.new_code_cell("print('before')\nraise RuntimeError('broken on purpose')", execution_count=99)
    nb.cells = [*nb.cells[:2], broken, *nb.cells[2:]]
    nbformat.write(nb, path)
    result = validate(pytester, path)
    result.assert_outcomes(failed=2 + len(SPOILED), passed=3 + len(FORGIVEN))
    output = result.stdout.str()
    assert "RuntimeError" in output
    assert "broken on purpose" in output
    assert "axes 'training accuracy', line" in output
    assert "spoiled.ipynb, cell [5] that begins with: fig, ax = plt.subplots()" in output
    for _, _, message in SPOILED:
        assert message in output, message


LEAVES = """
import subprocess, sys, tempfile
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
tempfile.mkstemp(prefix="weights-");
"""


def test_a_process_and_a_file_that_a_notebook_leaves_behind_are_errors(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("course_lib.proving.nbval_plugin.Traces.left", partialmethod(Traces.left, patience=0.5))
    cell = nbformat.v4.new_code_cell(LEAVES.strip(), execution_count=1)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "untidy.ipynb")
    result = validate(pytester, tmp_path / "untidy.ipynb")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.re_match_lines([r".*untidy.ipynb leaves behind the process \d+ .*; the temporary file weights-"])
