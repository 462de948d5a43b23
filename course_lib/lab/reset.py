"""A chapter as it was: ``python -m course_lib.lab.reset 02``, or ``make reset NB=02``.

The notebook of the last commit takes the place of the edited one, of which a copy stays beside it under a dated name
(``my_2026-05-04_02_optimizers.ipynb``). Nothing that a learner wrote is lost, and ``git pull`` meets no edited file.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import subprocess
import sys
from pathlib import Path

from course_lib.lab.files import replaced
from course_lib.lab.runtime import checkout


class CannotReset(RuntimeError):
    """There is nothing to take the chapter from, or no such chapter; the message says which, and nothing changed."""


def reset(chapter: str, root: Path) -> Path | None:
    """Give a chapter of the checkout ``root`` back; returns the copy of what was there, None if it was not edited.

    Raises
    ------
    CannotReset : no such chapter, no git, or no commit that has it. The notebook is then untouched.
    """
    name = _name(chapter, root)
    stored = _git(root, "show", f"HEAD:notebooks/{name}")
    path = root / "notebooks" / name
    if path.exists() and path.read_bytes() == stored:
        return None
    copy = _unused(path.with_name(f"my_{datetime.date.today().isoformat()}_{name}")) if path.exists() else None
    if copy is not None:
        shutil.copy2(path, copy)
    with replaced(path) as file:
        file.write(stored)
    return copy


def _name(chapter: str, root: Path) -> str:
    """The file name of a chapter in the last commit, by its number."""
    listed = _git(root, "ls-tree", "--name-only", "HEAD", "notebooks/").decode().split("\n")
    names = sorted(line.removeprefix("notebooks/") for line in listed if line.endswith(".ipynb"))
    for name in names:
        if chapter.isdecimal() and name.startswith(f"{chapter.zfill(2)}_"):
            return name
    raise CannotReset(
        f"NB={chapter!r}: there is no such chapter; there are {', '.join(n[:2] for n in names) or 'none'}"
    )


def _git(root: Path, *arguments: str) -> bytes:
    # core.quotepath: else a letter outside ASCII comes back as its code
    command = ["git", "-c", "core.quotepath=off", *arguments]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, check=False)
    except FileNotFoundError:
        raise CannotReset("git is not installed, and the chapter as it was is kept by git") from None
    if done.returncode:
        raise CannotReset(f"git has no chapter to give back here: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _unused(path: Path) -> Path:
    number, wanted = 2, path
    while path.exists():
        path = wanted.with_stem(f"{wanted.stem}_{number}")
        number += 1
    return path


def main(arguments: list[str] | None = None) -> int:
    """Reset the chapter that the command line names."""
    parser = argparse.ArgumentParser(description="Give a chapter back as it was; the edited one is kept beside it.")
    parser.add_argument("chapter", nargs="?", default="", help="a chapter's number, such as 02")
    chapter = parser.parse_args(arguments).chapter
    root = checkout()
    try:
        if root is None:
            raise CannotReset("the course is not installed from a checkout, so there is none to take the chapter from")
        copy = reset(chapter, root)
    except CannotReset as error:
        print(error, file=sys.stderr)
        return 2
    print(f"chapter {chapter} is as it was" + (f"; your copy is notebooks/{copy.name}" if copy else " already"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
