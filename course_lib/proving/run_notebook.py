"""Execute chapters in place: ``python -m course_lib.proving.run_notebook 02`` (or paths, or nothing for all of them).

A notebook is replaced only when each of its cells has run, in one step: a cell that fails leaves the file as it was,
and is named together with its error. What would differ between two runs of the same code for no good reason (times of
cells, random widget ids, warnings and progress bars) is not stored; when, for how long, with which versions and on what
it was run stands in the notebook's metadata, once, as ``craft.run``.
"""

import argparse
import io
import os
import platform
import re
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image
from tqdm import tqdm

from course_lib.lab.runtime import checkout, usable_cores
from course_lib.proving import WITHOUT_WEIGHTS

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
ANSWERED = re.compile(r"(?<![\w.])answered\(")  # the result of a prediction
CLAIMED = re.compile(r"(?<!\w)claims\.claim\(")
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
CELL_FAILED = (CellExecutionError, CellControlSignal, DeadKernelError)


class NotebookFailed(RuntimeError):
    """A cell raised, or the kernel died: the message names the notebook, the cell and the error."""


@dataclass(frozen=True)
class Execution:
    """How one run went: seconds, also by code cell, and what was dropped from whose standard error.

    Code cells are counted from 1, as JupyterLab numbers them: ``In [1]``.
    """

    path: Path
    seconds: float
    cell_seconds: dict[int, float]
    stderr: dict[int, str]

    def __str__(self) -> str:
        words = f"{self.path.name}: {len(self.cell_seconds)} code cells in {self.seconds:.1f} s"
        if self.cell_seconds:
            slowest = max(self.cell_seconds, key=lambda number: self.cell_seconds[number])
            words += f", the slowest, [{slowest}], {self.cell_seconds[slowest]:.1f} s"
        for number, text in self.stderr.items():
            words += f"\n  not stored, from the standard error of [{number}]: {_last_line(text)}"
        return words


def run(path: Path) -> Execution:
    """Execute a notebook with this environment's kernel, in its own folder, and replace the file by the result.

    Raises
    ------
    NotebookFailed
        When a cell fails; the file is then untouched.
    """
    started, notebook, stderr = time.perf_counter(), nbformat.read(path, as_version=4), {}
    cell_seconds = _execute(notebook, path)
    for cell in notebook.cells:
        if text := _tidy_cell(cell):
            stderr[cell.execution_count] = text
    _fold_answers(notebook)
    _tidy_notebook(notebook)
    notebook.metadata["craft"] = {"run": _provenance(time.perf_counter() - started)}
    _replace(path, nbformat.writes(notebook) + "\n")
    return Execution(path, time.perf_counter() - started, cell_seconds, stderr)


def targets(wanted: Iterable[str], folder: Path) -> list[Path]:
    """The notebooks meant by paths or chapter numbers (``02``, ``2``); all of ``folder`` when nothing is named."""
    there = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    found = []
    for name in wanted:
        matching = [path for path in there if path.name.startswith(f"{name.zfill(2)}_")] if name.isdecimal() else []
        if not matching and Path(name).is_file():
            matching = [Path(name)]
        if not matching:
            listed = ", ".join(path.stem for path in there) or "none yet"
            raise ValueError(f"there is no notebook {name!r} in {folder.name}/; there are: {listed}")
        found += matching
    return found or there


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; the number of notebooks that failed."""
    parser = argparse.ArgumentParser(description="Execute notebooks in place.")
    parser.add_argument("notebook", nargs="*", help="a chapter number (02) or a path; all chapters by default")
    root = checkout()
    folder = (root or Path.cwd()) / "notebooks"
    try:
        paths = targets(parser.parse_args(arguments).notebook, folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for path in paths:
        try:
            print(run(path))
        except NotebookFailed as error:
            print(error, file=sys.stderr)
            failed += 1
    return failed


def _execute(notebook: NotebookNode, path: Path) -> dict[int, float]:
    """Run all cells, outputs into ``notebook``; seconds by number of the code cell."""
    code_cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
    started: list[float] = []
    seconds: dict[int, float] = {}
    with tqdm(total=code_cells, desc=path.name, unit="cell", leave=False, disable=None) as bar:

        def on_start(cell: NotebookNode, cell_index: int) -> None:
            started.append(time.perf_counter())

        def on_end(cell: NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
            seconds[len(started)] = time.perf_counter() - started[-1]
            bar.update()

        client = new_client(notebook, path, on_cell_execute=on_start, on_cell_executed=on_end)
        try:
            client.execute(env=kernel_environment())
        except CELL_FAILED as error:
            raise failed(path, len(started), error) from error
    return seconds


def new_client(notebook: NotebookNode, path: Path, **hooks: Any) -> NotebookClient:
    """What executes a notebook: this environment's kernel, in the folder of ``path``; its hooks are those given."""
    # jupyter would take a python3 kernel of the user's home before this environment's
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    return NotebookClient(
        notebook,
        kernel_name=KERNEL["name"],
        timeout=None,
        record_timing=False,
        store_widget_state=True,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.resolve().parent)}},
        **hooks,
    )


def failed(path: Path, number: int, error: Exception) -> NotebookFailed:
    """One of ``CELL_FAILED`` in the reader's words; code cells are counted from 1."""
    reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # without the colours of a terminal
    return NotebookFailed(f"{path.name}: code cell [{number}] failed; the file is unchanged.\n{reason}")


def kernel_environment() -> dict[str, str]:
    """What validation will run it under: no progress bars, no exercise progress written down, and by default the CPU.

    So the stored outputs are the ones that every reader's machine can be compared with.
    """
    fixed = {"COURSE_PROGRESS": "off", "COURSE_VALIDATING": "1", **WITHOUT_WEIGHTS}
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # figures show inline
    return {"COURSE_PROFILE": "quick", "COURSE_DEVICE": "cpu", **inherited, **fixed}


def _provenance(seconds: float) -> dict[str, Any]:
    """Where the outputs come from, for readers who have no kernel."""
    versions = {name: metadata.version(name).partition("+")[0] for name in ("torch", "numpy", "matplotlib")}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {"cores": usable_cores(), "system": f"{platform.system()} {platform.machine()}"},
    }


def _tidy_cell(cell: NotebookNode) -> str:
    """Drop what is not worth storing; give back what stood on the standard error."""
    cell.metadata.pop("execution", None)
    if cell.cell_type != "code":
        return ""
    is_stderr = [output.output_type == "stream" and output.name == "stderr" for output in cell.outputs]
    dropped = "".join(o.text for o, drop in zip(cell.outputs, is_stderr, strict=True) if drop)
    cell.outputs = [o for o, drop in zip(cell.outputs, is_stderr, strict=True) if not drop]
    for output in cell.outputs:
        if png := output.get("data", {}).get("image/png"):
            output.data["image/png"] = smaller_png(png)
    return dropped


def _fold_answers(notebook: NotebookNode) -> None:
    """Fold away what would answer a prediction before it is made.

    That is the stored output of the cell that answers it and of those that follow up to the next words, and claims in
    their source; JupyterLab unfolds an output when its cell is run.
    """
    answering = False
    for cell in notebook.cells:
        if cell.cell_type != "code":
            answering = False
            continue
        answering = answering or ANSWERED.search(cell.source) is not None
        if answering:
            folded = {"outputs_hidden": True} | ({"source_hidden": True} if CLAIMED.search(cell.source) else {})
            cell.metadata["jupyter"] = {**cell.metadata.get("jupyter", {}), **folded}


def smaller_png(encoded: str) -> str:
    """A PNG (base64) with a palette of 256 colours: a figure looks the same and takes a third of the bytes."""
    picture, stream = Image.open(io.BytesIO(b64decode(encoded))).convert("RGB"), io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(stream, format="png", optimize=True)
    smaller = b64encode(stream.getvalue()).decode()
    return smaller if len(smaller) < len(encoded) else encoded


def _tidy_notebook(notebook: NotebookNode) -> None:
    notebook.metadata["kernelspec"], notebook.metadata["language_info"] = dict(KERNEL), dict(LANGUAGE)
    models = notebook.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    if not models:
        notebook.metadata.pop("widgets", None)
        return
    # widget ids are random: number them by the order in which the notebook made them
    numbered = {old: f"{number:032x}" for number, old in enumerate(models, start=1)}
    text = re.sub(
        r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])",
        lambda match: numbered.get(match[0], match[0]),
        nbformat.writes(notebook),
    )
    notebook.update(nbformat.reads(text, as_version=4))


def _replace(path: Path, text: str) -> None:
    """Write into a new file beside it, then rename: readers see the old notebook or the new one, never a half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        beside.chmod(path.stat().st_mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _last_line(text: str) -> str:
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return f"{lines[-1]} (the last of {len(lines)} lines)" if len(lines) > 1 else "".join(lines)


if __name__ == "__main__":
    sys.exit(main())
