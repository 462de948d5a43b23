"""How git merges a notebook that both the learner and the course have changed.

    python /course/inside/merge_notebook.py BASE MINE THEIRS PATH

Lines that only the course changed are taken; where both changed a line, the learner's stays. When what comes out is no
notebook any more, the learner's stays as it is, and the course's new one is put beside it.
"""

import json
import subprocess
import sys
from pathlib import Path


def merge(base: Path, mine: Path, theirs: Path, path: Path) -> None:
    """Leave in ``mine`` what is to stand at ``path``."""
    done = subprocess.run(
        ["git", "merge-file", "--ours", "--stdout", str(mine), str(base), str(theirs)], capture_output=True, check=False
    )
    if done.returncode == 0 and is_notebook(done.stdout):
        mine.write_bytes(done.stdout)
        return
    number = 0
    while (beside := path.with_name(f"{path.stem}-new{f'-{number}' if number else ''}{path.suffix}")).exists():
        if beside.read_bytes() == theirs.read_bytes():
            return
        number += 1
    beside.write_bytes(theirs.read_bytes())
    print(f"{path.name} stays as you edited it; the new one is {beside.name}")


def is_notebook(content: bytes) -> bool:
    """Whether these bytes are a notebook that can be opened, each cell once.

    What a merge of lines can break, and no more: both sides were notebooks. (With the standard library only, as
    ``nbformat`` takes longer to import than all the rest, on a machine where 30 servers start.)
    """
    try:
        notebook = json.loads(content)
        cells = notebook["cells"]
        names = [cell["id"] for cell in cells if "id" in cell]
        whole = all(
            isinstance(cell["source"], str | list)
            and isinstance(cell["metadata"], dict)
            and (isinstance(cell["outputs"], list) if cell["cell_type"] == "code" else "outputs" not in cell)
            for cell in cells
        )
    except (ValueError, KeyError, TypeError):
        return False
    return whole and notebook.get("nbformat") == 4 and len(names) == len(set(names))


if __name__ == "__main__":
    merge(*map(Path, sys.argv[1:5]))
