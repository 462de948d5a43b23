"""Files that are whole at every moment: written beside, forced to disk, then put in place in one step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replaced(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write bytes into; when the block ends it stands at ``path``, complete, in place of what was there.

    Readers see the old contents or the new, never a half, however the process ends. When the block raises, ``path``
    stays as it was. Folders on the way are made. One process writes a file at a time: several need a lock around this.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.partial")  # always the same: what a kill left is written over
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
