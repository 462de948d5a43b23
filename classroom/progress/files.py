"""The learners' progress files, which somebody else wrote: read without following links, whatever is in them.

Two layouts are known: a folder that a class shares (``COURSE_HOME``), whose files name the learners, and a class's
folder with the homes of a hub, where the home names the learner, whatever files lie in it.
"""

import errno
import itertools
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from course_lib.lab import progress_file

HOMES, KEPT_IN = "homes", ".craft-of-training"
LARGEST = 2**18  # bytes; a learner who has done all of the course needs a fifth of it
MOST = 500  # learners
MOST_LISTED = 20_000  # names in a folder
MOST_ATTEMPTS = 999


class NotProgress(Exception):
    """A file that is not read; the words say why."""


@dataclass(frozen=True)
class Record:
    """What one learner's file says.

    Attributes
    ----------
    learner : the name, as it stands in the folder.
    changed : when the file was last changed, in seconds since 1970; None when there is none yet.
    trouble : why the file could not be read; nothing if it could.
    exercises : attempts, and whether passed, by exercise.
    guesses : by prediction, unchecked.
    """

    learner: str
    changed: float | None = None
    trouble: str = ""
    exercises: Mapping[str, tuple[int, bool]] = field(default_factory=dict)
    guesses: Mapping[str, Any] = field(default_factory=dict)


def read(folder: Path) -> list[Record]:
    """What is known of each learner, by name; the first `MOST` of them.

    Raises
    ------
    OSError : the folder itself cannot be read.
    """
    with _opened(folder.resolve()) as shared:
        names = _listed(shared)
        files = {name: learner for name in names if (learner := _learner_of(name))}
        if files or HOMES not in names:
            by_name = sorted(files, key=lambda name: _order(files[name]))
            return [_record(files[name], shared, name) for name in by_name[:MOST]]
    with _opened(folder.resolve() / HOMES) as homes:
        learners = sorted((name for name in _listed(homes) if not name.startswith(".")), key=_order)
        found = (_of_home(homes, learner) for learner in learners)
        return list(itertools.islice((record for record in found if record), MOST))


def _of_home(homes: int, learner: str) -> Record | None:
    """The record of a home: of the file that bears its learner's name, else of the one that was changed last."""
    try:
        kind = os.stat(learner, dir_fd=homes, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(kind):
            return Record(learner, trouble="the home is a link") if stat.S_ISLNK(kind) else None
        with _opened(learner, homes) as home, _opened(KEPT_IN, home) as kept:
            changed = {
                name: os.stat(name, dir_fd=kept, follow_symlinks=False).st_mtime
                for name in _listed(kept)
                if _learner_of(name)
            }
            own = re.sub(r"[^\w.-]", "_", learner)  # as the course writes it
            best = max(changed, key=lambda name: (_learner_of(name) == own, changed[name]), default=None)
            return _record(learner, kept, best) if best else Record(learner)
    except FileNotFoundError:
        return Record(learner)  # nothing done yet
    except OSError as error:
        return Record(learner, trouble=_why(error))


def _record(learner: str, folder: int, name: str) -> Record:
    try:
        content, changed = _content(folder, name)
    except FileNotFoundError:
        return Record(learner)
    except OSError as error:
        return Record(learner, trouble=_why(error))
    except NotProgress as why:
        return Record(learner, trouble=str(why))
    try:
        kept = progress_file._parse(content)
    except (ValueError, RecursionError):
        return Record(learner, changed, "its content is damaged")
    exercises = {
        key: (min(max(int(entry["attempts"]), 0), MOST_ATTEMPTS), bool(entry.get("passed")))
        for key, entry in kept["exercises"].items()
    }
    guesses = {key: entry["guess"] for key, entry in kept["predictions"].items() if "guess" in entry}
    return Record(learner, changed, exercises=exercises, guesses=guesses)


def _content(folder: int, name: str) -> tuple[bytes, float]:
    """The bytes of an ordinary file, and when it was changed; a link, a pipe or a device is not opened, nor waited for.

    Raises
    ------
    NotProgress : it is no ordinary file, or too large.
    """
    opened = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        about = os.fstat(opened)
        if not stat.S_ISREG(about.st_mode):
            raise NotProgress("it is no ordinary file")
        with open(opened, "rb", closefd=False) as file:
            content = file.read(LARGEST + 1)
    finally:
        os.close(opened)
    if len(content) > LARGEST:
        raise NotProgress(f"it has more than {LARGEST // 1024} kB")
    return content, about.st_mtime


@contextmanager
def _opened(folder: str | Path, inside: int | None = None) -> Iterator[int]:
    """A folder to look into, which cannot be exchanged for another meanwhile; the last part of its path is no link."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW * (inside is not None), dir_fd=inside)
    try:
        yield opened
    finally:
        os.close(opened)


def _listed(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in itertools.islice(entries, MOST_LISTED)]


def _learner_of(name: str) -> str:
    """Whose a file is, by its name; nobody's if it is no progress file, or one that was set aside."""
    match = re.fullmatch(r"progress-(.+)\.json", name, re.DOTALL)
    return "" if match is None or re.search(r"\.damaged-\d+$", match[1]) else match[1]


def _order(name: str) -> tuple[str, str]:
    return name.casefold(), name


def _why(error: OSError) -> str:
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "it is a link, or lies behind one"
    return (error.strerror or type(error).__name__).lower()
