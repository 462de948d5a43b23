"""Execute chapters on a GPU that is emulated: ``python -m course_lib.proving.run_emulated 02`` (or paths, or nothing).

Nothing is stored. Every cell is run, also after one that failed, and those that failed are listed: what a reader with a
GPU would see. Claims that are not true there count, too; ratios of times mean nothing on an emulated device.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from course_lib.lab.runtime import checkout
from course_lib.proving.run_notebook import kernel_environment, new_client, targets

FIRST = """
import contextlib
from course_lib.proving.emulated_cuda import emulated_cuda
_device = contextlib.ExitStack()
_device.enter_context(emulated_cuda())
"""


def failures(path: Path) -> list[str]:
    """Run a notebook on the emulated device; return what failed, a line a cell, with the course's line of code."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, new_code_cell(FIRST))
    client = new_client(notebook, path)
    client.allow_errors = True
    with mock.patch.dict(os.environ, COURSE_DEVICE="cuda", COURSE_PROGRESS="off"):
        client.execute(env=kernel_environment())
    return [_line(number, cell) for number, cell in enumerate(_code(notebook)) if _error(cell)]


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _error(cell: NotebookNode) -> NotebookNode | None:
    return next((output for output in cell.outputs if output.output_type == "error"), None)


def _line(number: int, cell: NotebookNode) -> str:
    error = _error(cell)
    assert error is not None
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    at = [line for line in plain.splitlines() if "course_lib" in line and "emulated" not in line]
    begins = cell.source.strip().splitlines()[0][:80]
    where = f"\n      {at[-1].strip()}" if at else ""
    return f"  [{number}] {begins}\n      {error.ename}: {error.evalue[:300]}{where}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; the number of cells that failed."""
    parser = argparse.ArgumentParser(description="Execute notebooks on an emulated GPU; nothing is stored.")
    parser.add_argument("notebook", nargs="*", help="a chapter number (02) or a path; all chapters by default")
    count = 0
    for path in targets(parser.parse_args(arguments).notebook, (checkout() or Path.cwd()) / "notebooks"):
        found = failures(path)
        count += len(found)
        print(f"{path.name}: {len(found)} cells failed", *found, sep="\n", flush=True)
    return min(count, 255)


if __name__ == "__main__":
    sys.exit(main())
