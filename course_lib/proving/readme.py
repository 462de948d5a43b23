"""The README's table of chapters: ``python -m course_lib.proving.readme`` writes it between its two markers."""

from __future__ import annotations

import sys

from course_lib.lab.chapters import CHAPTERS, written
from course_lib.lab.files import replaced
from course_lib.lab.runtime import checkout

BEGIN, END = "<!-- chapters: made by python -m course_lib.proving.readme -->", "<!-- end of chapters -->"


def table(there: set[int]) -> str:
    """The README's table of chapters, linked where the notebook is there."""
    names = {"": "all", "model": "the model itself"}
    lines = ["| | chapter | slot | |", "| --- | --- | --- | --- |"]
    for chapter in CHAPTERS:
        ready = chapter.number in there
        title = f"[{chapter.title}](notebooks/{chapter.file})" if ready else chapter.title
        slot = names.get(chapter.slot, chapter.slot)
        lines.append(f"| {chapter.number} | {title}: {chapter.promise} | {slot} | {'ready' if ready else 'to come'} |")
    return "\n".join(lines)


def with_table(readme: str, there: set[int]) -> str:
    """A README's text with the table between its markers made anew.

    Raises
    ------
    ValueError : the markers are not there, once each and in order.
    """
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed or BEGIN in after:
        raise ValueError(f"README.md must hold the lines {BEGIN!r} and {END!r}, once each")
    return f"{before}{BEGIN}\n\n{table(there)}\n\n{END}{after}"


def main() -> int:
    """Write the README's table."""
    root = checkout()
    if root is None:
        print("The course is not installed from a checkout: there is no README to write into.", file=sys.stderr)
        return 2
    text = with_table((root / "README.md").read_text(encoding="utf-8"), written(root))
    with replaced(root / "README.md") as file:
        file.write(text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
