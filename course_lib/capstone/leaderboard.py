"""The leaderboard of a class: who is how many times as fast as the first script, each on a machine of their own.

===============  ====================================================================================
name             what it gives
===============  ====================================================================================
``enter``        keep a ratio in the learner's own file, if it is their best
``leaderboard``  the best of everybody who shares the folder (``COURSE_HOME``), the fastest first
===============  ====================================================================================

Seconds of two machines cannot be compared; ratios to the same script, measured in turns on the same machine, nearly
can. So the board says of each entry on which processor it was measured.
"""

from __future__ import annotations

import datetime
from typing import Any

from course_lib.lab import progress_file, runtime
from course_lib.lab.arguments import is_number, require
from course_lib.lab.claims import ReadableTable

COLUMNS = ("rank", "who", "times as fast as the first script", "accuracy", "date", "processor")


def enter(exercise: str, *, ratio: float, score: float, name: str = "") -> str:
    """Keep a learner's ratio and the score it was reached with, unless they have a better one already.

    Date and processor are kept beside them. A validation run enters nothing.

    Parameters
    ----------
    ratio : how many times as fast as the first script.
    name : as the board shows it; by default the learner's.

    Returns
    -------
    The note to show if that could not be done, else nothing.

    Raises
    ------
    ValueError : the ratio is no number above 0, or the score none.
    """
    require("ratio", ratio, lambda value: is_number(value) and value > 0, "a number above 0")
    require("score", score, is_number, "a number")
    new = {
        "ratio": float(ratio),
        "score": float(score),
        "name": name or runtime.learner(),
        "date": datetime.date.today().isoformat(),
        "machine": str(runtime.describe_machine().loc["processor"].iloc[0]),
    }

    def edit(entry: dict[str, Any]) -> None:
        if not entry or new["ratio"] > entry["ratio"]:
            entry.clear()
            entry.update(new)

    return progress_file.change("races", exercise, edit)


def leaderboard(exercise: str = "16.6") -> ReadableTable:
    """The best of each learner of the folder: rank, who, ratio, accuracy, date and processor, the fastest first.

    Of two equals the earlier comes first. Files that cannot be read are passed over with a warning.
    """
    entries = [
        {"name": who, **races[exercise]}  # the file's, where an entry has none
        for who, races in progress_file.kept_by_all("races").items()
        if exercise in races
    ]
    entries.sort(key=lambda entry: (-entry["ratio"], str(entry.get("date", "")), str(entry["name"])))
    rows: list[tuple[Any, ...]] = [
        (place, entry["name"], f"{entry['ratio']:.1f}", f"{entry['score']:.3f}", entry.get("date", ""),
         entry.get("machine", ""))
        for place, entry in enumerate(entries, start=1)
    ]  # fmt: skip
    return ReadableTable(rows or [("", "nobody has entered yet", "", "", "", "")], columns=list(COLUMNS))
