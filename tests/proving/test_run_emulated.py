"""A chapter on the emulated GPU: each cell that fails is named, the others are run, and the file stays as it was."""

from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from course_lib.proving import run_emulated

CELLS = (
    "import torch\nfrom course_lib import lab",
    "x = torch.ones(2, device=lab.device())\nassert x.is_cuda",
    "x + torch.ones(2)",
    "assert (x + 1).tolist() == [2, 2]",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device that need not be emulated")
def test_cells_that_fail_there_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a_chapter.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in CELLS]), path)
    before = path.read_bytes()
    assert run_emulated.main([str(path)]) == 1
    said = capsys.readouterr().out
    assert "a_chapter.ipynb: 1 cells failed" in said
    assert "[3] x + torch.ones(2)\n      RuntimeError: Expected all tensors to be on the same device" in said
    assert path.read_bytes() == before
