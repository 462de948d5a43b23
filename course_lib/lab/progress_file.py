"""What a learner has done, in one small file: ``progress-NAME.json`` in the folder of what is yours (``COURSE_HOME``).

    {"exercises": {"02.1": {"attempts": 3, "passed": "2026-05-04"}},
     "predictions": {"02.a": {"guess": "momentum", "sure": 0.75, "hit": true}},
     "races": {"16.6": {"ratio": 7.3, "score": 0.913}}}

A class may share the folder; ``runtime.learner`` says whose a file is. Validation runs (``COURSE_VALIDATING=1``)
neither read nor write it.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import filelock

from course_lib.lab.arguments import is_number
from course_lib.lab.files import replaced
from course_lib.lab.runtime import data_folder, home_folder, learner

LOCK_SECONDS = 10

Section = Literal["exercises", "predictions", "races"]
Entries = dict[str, dict[str, Any]]
_SECTIONS: tuple[Section, ...] = ("exercises", "predictions", "races")


def kept(section: Section) -> Entries:
    """What is known in a section, by exercise or prediction; nothing in a validation run."""
    if validating():
        return {}
    file = _file()
    if not file.exists():
        return _from_before(file)[section]
    try:
        with _lock(file):
            return _load(file)[section]
    except (OSError, NotImplementedError):
        # A folder that takes no lock is not written to either, so the file can be read as it stands.
        try:
            return _parse(file.read_bytes())[section]
        except (OSError, ValueError):
            return {}


def kept_by_all(section: Section) -> dict[str, Entries]:
    """What is known in a section of everybody who shares the folder, by learner; nothing in a validation run.

    A file that cannot be read is passed over with a warning, and stays as it is: its learner may mend it.
    """
    found: dict[str, Entries] = {}
    if validating():
        return found
    for file in sorted(home_folder().glob("progress-*.json")):
        if re.search(r"\.damaged-\d+$", file.stem):
            continue  # set aside already
        try:
            found[file.stem.removeprefix("progress-")] = _parse(file.read_bytes())[section]  # whole at every moment
        except (OSError, ValueError) as error:
            warnings.warn(f"{file.name} is passed over: {type(error).__name__}: {error}", stacklevel=2)
    return found


def change(section: Section, key: str, edit: Callable[[dict[str, Any]], None]) -> str:
    """Let ``edit`` change the entry (empty when there is none yet) and keep it; the note to show if that failed."""
    if validating():
        return ""
    try:
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file):
            everything = _load(file)
            edit(everything[section].setdefault(key, {}))
            # In one step: a reader, or a power cut, meets the old file or the new one, never half of it
            with replaced(file) as stream:
                stream.write(json.dumps(everything, indent=1, sort_keys=True).encode())
    except (OSError, NotImplementedError) as error:  # a read-only folder, a full disk, a file system without locks
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        return f"your progress could not be kept: {reason}"
    return ""


def validating() -> bool:
    """Whether this is a validation run, which knows no learner."""
    return os.environ.get("COURSE_VALIDATING", "") not in ("", "0")


def _file() -> Path:
    return home_folder() / f"progress-{learner()}.json"


def _lock(file: Path) -> filelock.BaseFileLock:
    return filelock.FileLock(f"{file}.lock", timeout=LOCK_SECONDS)


def _load(file: Path) -> dict[str, Entries]:
    """All sections of ``file``; a damaged file is renamed, so that nothing in it is lost, and forgotten."""
    if not file.exists():
        return _from_before(file)
    try:
        return _parse(file.read_bytes())
    except ValueError:
        aside = next(name for name in _aside_names(file) if not name.exists())
        file.rename(aside)
        warnings.warn(f"{file.name} was damaged: set aside as {aside.name}, progress starts afresh", stacklevel=4)
        return {section: {} for section in _SECTIONS}


def _from_before(file: Path) -> dict[str, Entries]:
    """Progress once lay in the data folder: it is taken over from there, and the old file stays."""
    try:
        return _parse((data_folder() / file.name).read_bytes())
    except (OSError, ValueError):
        return {section: {} for section in _SECTIONS}


def _aside_names(file: Path) -> Iterator[Path]:
    number = 0
    while True:
        number += 1
        yield file.with_name(f"{file.stem}.damaged-{number}.json")


def _parse(content: bytes) -> dict[str, Entries]:
    """Raises ValueError for anything that `change` did not write."""
    stored = json.loads(content)
    if not isinstance(stored, dict) or "exercises" not in stored:
        raise ValueError("no exercises")
    found: dict[str, Entries] = {section: stored.get(section, {}) for section in _SECTIONS}
    for section, entries in found.items():
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise ValueError(f"{section}: not entries")
    for entry in found["exercises"].values():
        attempts, passed = entry.get("attempts"), entry.get("passed")
        if not isinstance(attempts, int) or not (passed is None or isinstance(passed, str)):
            raise ValueError("not an entry")
    for entry in found["races"].values():
        if not all(is_number(entry.get(figure)) for figure in ("ratio", "score")):
            raise ValueError("not an entry of a race")
    return found
