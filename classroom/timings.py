"""How long each section of a chapter takes: words, minutes to read, seconds to run, in the pages of the guide.

    python -m classroom.timings                     # write the table of each page of classroom/guide
    python -m classroom.timings --measure 02 03     # run these chapters first (all: all of them), a minute or two each,
                                                    # on a machine that does nothing else

Words and cells are counted in the notebook as it stands. Seconds cannot be: a run's are kept in
``classroom/guide/run_times.csv``, chapter by chapter, with the processor and the day. The notebook itself is never
written to: a copy runs.
"""

import argparse
import csv
import datetime
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_lib.lab.chapters import CHAPTERS, Chapter
from course_lib.lab.files import replaced
from course_lib.lab.runtime import describe_machine, usable_cores
from course_lib.proving.run_notebook import NotebookFailed, run

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
GUIDE = ROOT / "classroom" / "guide"
RUN_TIMES = GUIDE / "run_times.csv"
COLUMNS = ("chapter", "section", "seconds", "processor", "date")

WORDS_A_MINUTE = 200
MOST_LOAD = 0.7  # programs that wait for a core when a measurement begins, on average over the minute before
OPENING = "opening"  # what stands above the first section
BEGIN, END = "<!-- timings: made by python -m classroom.timings -->", "<!-- end of timings -->"
AFTER = "\n## The questions to ask"  # what follows the plan
FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{2,3} (.+)$", re.MULTILINE)
NO_PROSE = (
    re.compile(r"<details>.*?</details>", re.DOTALL),  # hints and solutions, folded away
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"<[^>\n]+>|^#+ ", re.MULTILINE),
    re.compile(r"(?<=\])\([^)\n]*\)"),  # where a link leads
)
FORMULA = re.compile(r"\$[^$]+\$")


@dataclass
class Section:
    """A section of a chapter: its heading as a reader says it ("3.1 Momentum is a filter"), and what is in it."""

    heading: str
    words: int = 0
    code: list[int] = field(default_factory=list)
    """Its code cells that do something, numbered from 1 through the chapter."""

    @property
    def name(self) -> str:
        """Its number ("3.1"), where it has one, else the heading."""
        number = self.heading.partition(" ")[0]
        return number if re.fullmatch(r"[\d.]+", number) else self.heading


@dataclass(frozen=True)
class RunTimes:
    """One chapter's measured seconds, by the section's name, and where and when they were measured."""

    seconds: Mapping[str, float]
    processor: str
    date: str


def sections(chapter: NotebookNode) -> list[Section]:
    """The sections of a chapter and their subsections, in its order; a section's words are not its subsections'."""
    found, code = [Section(OPENING)], 0
    for cell in chapter.cells:
        if cell.cell_type == "code" and cell.source.strip():
            code += 1
            found[-1].code.append(code)
        if cell.cell_type == "markdown":
            above, *parts = HEADING.split(FENCE.sub("", cell.source))
            found[-1].words += words(above)
            for heading, text in zip(parts[::2], parts[1::2], strict=True):
                found.append(Section(_said(heading), words(heading) + words(text)))
    return found


def words(prose: str) -> int:
    """The words that a reader reads: without code, folded parts and displayed formulas; one in a line is a word."""
    for pattern in NO_PROSE:
        prose = pattern.sub(" ", prose)
    return sum(bool(re.search(r"\w", word)) for word in FORMULA.sub("formula", prose).split())


def measured(notebook: Path) -> RunTimes:
    """The seconds that each section's cells take here, one after the other.

    Raises
    ------
    NotebookFailed : a cell fails; the message names it.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / notebook.name
        shutil.copyfile(notebook, copy)
        cells = run(copy).cell_seconds
    parts = sections(nbformat.read(notebook, as_version=4))
    seconds = {part.name: round(sum(cells[number] for number in part.code), 1) for part in parts if part.code}
    processor = str(describe_machine().loc["processor", "this machine"])
    return RunTimes(seconds, f"{processor}, {usable_cores()} cores", datetime.date.today().isoformat())


def read_run_times(path: Path = RUN_TIMES) -> dict[str, RunTimes]:
    """What was measured, by the chapter's number ("02"); nothing where there is no such file."""
    if not path.exists():
        return {}
    found: dict[str, RunTimes] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            known = found.get(row["chapter"], RunTimes({}, row["processor"], row["date"]))
            known = RunTimes({**known.seconds, row["section"]: float(row["seconds"])}, row["processor"], row["date"])
            found[row["chapter"]] = known
    return found


def write_run_times(times: Mapping[str, RunTimes], path: Path = RUN_TIMES) -> None:
    """Write all that is known, in one step."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for number, chapter in sorted(times.items()):
        for section, seconds in chapter.seconds.items():
            table.writerow([number, section, seconds, chapter.processor, chapter.date])
    with replaced(path) as file:
        file.write(text.getvalue().encode())


def block(parts: Iterable[Section], times: RunTimes | None) -> str:
    """The table for a page of the guide, between its markers.

    Its rows begin without a bar: those of the plan above it, which are added up, begin with one.
    """
    parts = list(parts)
    rows = [(part.heading, part.words, len(part.code), _seconds(part, times)) for part in parts]
    whole = sum(seconds for *_, seconds in rows if seconds is not None) if times else None
    total = ("**all**", sum(part.words for part in parts), sum(len(part.code) for part in parts), whole)
    lines = [
        "section | words | minutes to read | code cells | seconds to run",
        "--- | ---: | ---: | ---: | ---:",
        *(f"{heading} | {count:,} | {_minutes(count)} | {cells or '–'} | {_rounded(seconds)}"
          for heading, count, cells, seconds in [*rows, total]),
    ]  # fmt: skip
    about = (
        f"How long each part is. Reading is counted at {WORDS_A_MINUTE} words a minute, without code, hints and "
        f"solutions; {_where(times)}"
    )
    return "\n".join([BEGIN, "", about, "", *lines, "", END])


def with_block(page: str, made: str) -> str:
    """The page with its table replaced, or put below the plan where it has none yet.

    Raises
    ------
    ValueError : the page has one marker without the other, or no place for a table.
    """
    if BEGIN in page or END in page:
        if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
            raise ValueError(f"page: there must be one {BEGIN!r}, and one {END!r} below it")
        return page[: page.index(BEGIN)] + made + page[page.index(END) + len(END) :]
    if page.count(AFTER) != 1:
        raise ValueError(f"page: there must be one heading {AFTER.strip()!r}")
    return page.replace(AFTER, f"\n{made}\n{AFTER}")


def page_of(chapter: Chapter) -> Path:
    """The page of the guide on a chapter."""
    return GUIDE / f"{chapter.nn}_{chapter.name}.md"


def written_out(chapter: Chapter, times: Mapping[str, RunTimes]) -> str:
    """The page of the guide on a chapter, with its table as it must be now."""
    made = block(sections(nbformat.read(NOTEBOOKS / chapter.file, as_version=4)), times.get(chapter.nn))
    return with_block(page_of(chapter).read_text(encoding="utf-8"), made)


def _said(heading: str) -> str:
    """A heading in a row of a table: "1. The idea" would begin a list there."""
    return re.sub(r"^(\d+)\. ", r"\1 ", heading.strip()).replace("|", r"\|")


def _seconds(part: Section, times: RunTimes | None) -> float | None:
    return times.seconds.get(part.name) if times and part.code else None


def _minutes(count: int) -> str:
    return str(round(count / WORDS_A_MINUTE) or "<1")


def _rounded(seconds: float | None) -> str:
    return "–" if seconds is None else "<1" if seconds < 0.5 else f"{seconds:.0f}"


def _where(times: RunTimes | None) -> str:
    if times is None:
        return "no run has been timed yet."
    return f"the run was timed on {times.date} on {times.processor}, and varies with the machine."


def _busy() -> str:
    """Whether other programs are at work here; nothing if they are not, or the system does not say."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return f"other programs are at work (a load of {load:.1f} on {usable_cores()} cores)" if load > MOST_LOAD else ""


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; 1 if a chapter could not be run, 2 if none can be, or one does not exist."""
    parser = argparse.ArgumentParser(description="Write how long each section takes into the guide.")
    parser.add_argument("--measure", nargs="+", default=[], metavar="NN", help="run these chapters first (all: all)")
    wanted = parser.parse_args(arguments).measure
    there = {chapter.nn: chapter for chapter in CHAPTERS}
    if unknown := sorted(set(wanted) - {*there, "all"}):
        print(f"--measure {' '.join(unknown)}: there are 00 to {CHAPTERS[-1].nn}, and all", file=sys.stderr)
        return 2
    if wanted and (busy := _busy()):
        print(f"--measure: {busy}; the seconds would be theirs too. Wait until this machine is idle.", file=sys.stderr)
        return 2
    failed = 0
    for number in there if "all" in wanted else wanted:
        try:
            found = measured(NOTEBOOKS / there[number].file)
        except NotebookFailed as error:
            print(error, file=sys.stderr)
            failed = 1
            continue
        write_run_times({**read_run_times(), number: found})
        print(f"{number}: {sum(found.seconds.values()):.0f} s in {len(found.seconds)} sections", flush=True)
    times = read_run_times()
    for chapter in CHAPTERS:
        made = written_out(chapter, times)
        if made != page_of(chapter).read_text(encoding="utf-8"):
            with replaced(page_of(chapter)) as file:
                file.write(made.encode())
            print(f"written: {page_of(chapter).relative_to(ROOT)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
