"""The rows of the recorded studies, as they lie in their files."""

import json
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def rows(chapter):
    """All runs of a chapter's study."""
    lines = (ROOT / f"data/studies/chapter_{chapter}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "seed" in row]


def values(chapter, part, arm, of=None, *, seeds=range(5), candidate=None, tuning=False):
    """The numbers of one arm, in the order of the seeds."""
    found = {
        row["seed"]: row["value"] if of is None else row["value"][of]
        for row in rows(chapter)
        if (row["part"], row["arm"], row["tuning"]) == (part, arm, tuning) and row["candidate"] in (candidate, None)
    }
    return [found[seed] for seed in seeds]


@cache
def headings(chapter):
    """The headings of a chapter's notebook, without their signs."""
    (path,) = (ROOT / "notebooks").glob(f"{chapter:02d}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown").splitlines()
    return [line.lstrip("#").strip() for line in lines if line.startswith("#")]
