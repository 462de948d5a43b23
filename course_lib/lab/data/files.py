"""Files that are either whole or not there, whoever writes them and whenever that is interrupted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def workshop(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder ``.partial-<name>`` inside ``folder``, for us alone until the block ends; then it is removed.

    What is finished in it is moved out with ``os.replace``, which is one step because it stays on the same disk. A lock
    that the system drops when its process dies guards it, so whatever lies there when we hold the lock was left by a
    process that was killed, and is swept away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{name}"
    with FileLock(folder / f".lock-{name}"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def move_into_place(finished: Path, target: Path, partial: Path) -> None:
    """Puts ``finished`` at ``target``; an incomplete folder standing there goes to ``partial`` first, to be swept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        os.replace(target, partial / "incomplete")
    os.replace(finished, target)
