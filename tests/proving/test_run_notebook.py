"""A notebook is executed in place or not at all, and two runs of the same code store the same file."""

import io
import re
from base64 import b64decode, b64encode
from datetime import UTC, datetime
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbformat import v4
from PIL import Image

from course_lib.lab.runtime import usable_cores
from course_lib.proving import run_notebook


def write(path: Path, *sources: str) -> Path:
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])
    notebook.cells.insert(0, v4.new_markdown_cell("# A chapter"))
    nbformat.write(notebook, path)
    return path


def outputs(path: Path) -> list[str]:
    """The plain text of each code cell's outputs."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return ["".join(o.get("text") or o.data["text/plain"] for o in cell.outputs) for cell in cells]


def test_a_run_stores_outputs_and_the_same_file_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COURSE_PROFILE", "COURSE_DEVICE", "COURSE_VALIDATING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    path = write(
        tmp_path / "02_x.ipynb",
        "import os, pathlib, sys\npathlib.Path('here').touch()",
        "print('one'); print('care' + 'ful', file=sys.stderr); print('two')",
        "import ipywidgets\nipywidgets.IntSlider(3)",
        "'MPLBACKEND' in os.environ and os.environ['MPLBACKEND'] != 'Agg'",
        "[os.environ[name] for name in ('COURSE_PROGRESS', 'COURSE_VALIDATING', 'COURSE_PROFILE', 'COURSE_DEVICE')]",
    )
    execution = run_notebook.run(path)
    assert outputs(path) == ["", "one\ntwo\n", "IntSlider(value=3)", "True", "['off', '1', 'quick', 'cpu']"]
    assert (tmp_path / "here").exists(), "it ran in the notebook's own folder"
    assert list(execution.cell_seconds) == [1, 2, 3, 4, 5]
    assert execution.stderr == {2: "careful\n"}
    assert "02_x.ipynb: 5 code cells in" in str(execution)
    assert "[2]: careful" in str(execution)

    stored = path.read_bytes()
    text = stored.decode()
    assert "careful" not in text
    run = nbformat.reads(text, as_version=4).metadata["craft"]["run"]
    assert run["date"] == datetime.now(UTC).date().isoformat()
    assert run["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert run["machine"]["cores"] == usable_cores()
    assert text.count(f'"{run["versions"]["python"]}"') == 1, "the interpreter's version stands there, and only there"
    assert "IntSliderModel" in text, "a reader without a kernel sees the slider"
    assert '"model_id": "0000000000000000000000000000000' in text
    run_notebook.run(path)
    again, seconds = path.read_text(), re.compile(r'"seconds": \d+')
    assert seconds.sub("", again) == seconds.sub("", text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["02_x.ipynb", "here"]


def test_a_failing_cell_leaves_the_notebook_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "03_bad.ipynb", "print('fine')", "limit = 0\n1 / limit", "print('never')")
    before = path.read_bytes()
    with pytest.raises(run_notebook.NotebookFailed) as caught:
        run_notebook.run(path)
    for words in ("03_bad.ipynb", "code cell [2] failed", "1 / limit", "ZeroDivisionError: division by zero"):
        assert words in str(caught.value)
    assert "\x1b" not in str(caught.value), "no colour codes in the message"
    assert path.read_bytes() == before

    assert run_notebook.main([str(path)]) == 1
    assert "code cell [2] failed" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["03_bad.ipynb"]


def test_a_kernel_that_dies_leaves_the_notebook_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "04_dies.ipynb", "print('fine')", "import os\nos._exit(9)")
    before = path.read_bytes()
    with pytest.raises(run_notebook.NotebookFailed, match=r"code cell \[2\] failed"):
        run_notebook.run(path)
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_notebook_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "02_x.ipynb", "1")
    before = path.read_bytes()

    def disk_full(self: Path, text: str, **options: object) -> int:
        self.touch()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", disk_full)
    with pytest.raises(OSError, match="no space left"):
        run_notebook.run(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["02_x.ipynb"]


def test_the_result_comes_in_one_step(tmp_path: Path) -> None:
    """The old file is replaced, never written into: whoever has it open goes on reading the old one, whole."""
    path = write(tmp_path / "02_x.ipynb", "1 + 1")
    old = tmp_path / "old"
    old.hardlink_to(path)
    before = path.read_bytes()
    run_notebook.run(path)
    assert outputs(path) == ["2"]
    assert old.read_bytes() == before


def test_targets(tmp_path: Path) -> None:
    for name in ("00_start_here", "02_optimizers", "scratch"):
        (tmp_path / f"{name}.ipynb").touch()
    start, optimizers, scratch = (tmp_path / f"{n}.ipynb" for n in ("00_start_here", "02_optimizers", "scratch"))
    assert run_notebook.targets([], tmp_path) == [start, optimizers]
    assert run_notebook.targets(["02"], tmp_path) == [optimizers]
    assert run_notebook.targets(["2", "00"], tmp_path) == [optimizers, start]
    assert run_notebook.targets([str(scratch)], tmp_path) == [scratch]
    for unknown in ("04", "optimizers", "nothing.ipynb"):
        with pytest.raises(ValueError, match=f"no notebook '{unknown}' .* 00_start_here, 02_optimizers"):
            run_notebook.targets([unknown], tmp_path)


def test_an_unknown_chapter_ends_with_the_list(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_notebook.main(["77"]) == 2
    assert "there is no notebook '77'" in capfd.readouterr().err


def test_pictures_shrink_without_a_visible_change() -> None:
    figure, ax = plt.subplots()
    for k in range(7):
        ax.plot(np.sin(np.arange(200) / (k + 3)), label=str(k))
    ax.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    plt.close(figure)
    stored = b64encode(stream.getvalue()).decode()
    smaller = run_notebook.smaller_png(stored)
    assert len(smaller) < 0.7 * len(stored)
    before, after = (
        np.asarray(Image.open(io.BytesIO(b64decode(png))).convert("RGB"), float) for png in (stored, smaller)
    )
    assert np.abs(before - after).mean() < 1  # of 255
