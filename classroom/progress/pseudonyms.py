"""Invented names for a page that is projected: "blue otter" for ada.

Names are drawn by chance, so none can be computed from its learner's; which belongs to whom stands in one file, in the
instructor's own home, that nobody else may read. It is kept, so everybody has the same name tomorrow.
"""

import csv
import hashlib
import io
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

import filelock

from course_lib.lab.files import replaced

COLOURS = """amber black blue bronze brown copper coral crimson cream golden green grey indigo ivory jade lilac orange
    pink purple red silver teal white yellow"""
ANIMALS = """badger bear beaver bison camel crane dolphin eagle falcon ferret fox gecko hare hedgehog heron ibex jackal
    koala lemur lynx marten mole moose newt otter owl panda pelican puffin raven seal stork swan tiger toad turtle
    walrus weasel wombat yak"""


def file_of(folder: Path) -> Path:
    """Where the names of a class are kept: apart from ``folder``, which its learners may be able to read."""
    folder = folder.resolve()
    which = hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "_", folder.name) or "class"
    return Path.home() / ".craft-of-training" / "pseudonyms" / f"{name}-{which}.csv"


def names(learners: Iterable[str], file: Path) -> dict[str, str]:
    """The invented name of each learner; who has none yet gets one, which is written to ``file``.

    Raises
    ------
    ValueError : ``file`` is damaged.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with filelock.FileLock(f"{file}.lock"):
        known = _read(file)
        new = [learner for learner in learners if learner not in known]
        for learner in new:
            known[learner] = _draw(set(known.values()))
        if new:
            _write(known, file)
    return known


def _draw(taken: set[str]) -> str:
    """A name that nobody has, and an animal of one's own as long as there is one."""
    met = {name.split()[1] for name in taken}
    animals = [animal for animal in ANIMALS.split() if animal not in met] or ANIMALS.split()
    pairs = [f"{colour} {animal}" for colour in COLOURS.split() for animal in animals]
    free = [pair for pair in pairs if pair not in taken]
    return secrets.choice(free) if free else f"{secrets.choice(pairs)} {len(taken)}"


def _read(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    with file.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    if not all(len(row) == 2 for row in rows) or len({name for _, name in rows}) < len(rows):
        raise ValueError(f"{file}: is damaged; mend it, or move it away for new names")
    return dict(rows)


def _write(known: dict[str, str], file: Path) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("learner", "shown as"), *known.items()])
    with replaced(file) as stream:
        os.fchmod(stream.fileno(), 0o600)
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))
