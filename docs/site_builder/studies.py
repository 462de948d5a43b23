"""The page of the recorded studies: for each its question, how it was made, what it found, and where that came from.

The tables are those of ``recorded("NN", part)``, which reads a row only if it was found by the code as it stands: a
part of which that is not true is shown as outdated, without numbers, and the build warns.
"""

from __future__ import annotations

import html
import importlib
import inspect
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from docutils import nodes
from myst_parser.slugs import github_slugify, unique_slug
from nbformat import NotebookNode
from sphinx import addnodes
from sphinx.util import logging

from course_lib.lab import studies as recordings
from course_lib.lab.chapters import Chapter
from course_lib.lab.experiments import Comparison, Interval
from course_lib.lab.studies import Book, Part, Recorded, Study, StudyOutdated, Tuned, declared, read, study_file
from site_builder.collecting import Collecting, link, markdown, named, notebook_of, scrolls

LONG, WIDE = 12, 6
"""Rows and columns of a table that is not folded; where a run measured more numbers than that, each is a row."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What is recorded of a part: its rows, the sessions that made them, and the comparison of each number."""

    part: Part
    rows: Sequence[Mapping[str, Any]]
    sessions: Sequence[Mapping[str, Any]]
    comparisons: Mapping[str, Recorded]
    confirmed: int = 0
    """Of how many arms the code has changed since, and a repeated run has shown that it finds the same."""

    @property
    def hours(self) -> float:
        """Of one core."""
        return float(sum(row["seconds"] for row in self.rows)) / 3600

    @property
    def tuning(self) -> int:
        """How many of the rows chose a setting, and report nothing."""
        return sum(row["tuning"] for row in self.rows)

    @property
    def fingerprints(self) -> int:
        """How many different pieces of code made the rows."""
        return len({row["fingerprint"] for row in self.rows})


def found_of(study: Study, name: str, file: Path) -> Found:
    """What is recorded of a part.

    Raises
    ------
    StudyOutdated : some of it was found by other code, or is missing.
    """
    book, part = Book(file, read_only=True), study.parts[name]
    rows = [row for row in book.rows if row["part"] == name]
    several = [row["value"] for row in rows if isinstance(row["value"], dict)]
    # not its curves, of which a table has no cell; in the order in which they are met
    numbers = list(dict.fromkeys(name for value in several for name in value if not isinstance(value[name], list)))
    with warnings.catch_warnings():
        # A target that was never reached is an infinite number of steps
        warnings.simplefilter("ignore", RuntimeWarning)
        comparisons = {of or "test accuracy": read(study, file, name, of) for of in numbers or [None]}
    used = {row["in"] for row in rows}
    since = {entry["as"] for entry in book.confirmations} & {row["fingerprint"] for row in rows}
    return Found(part, rows, [s for s in book.sessions if s["session"] in used], comparisons, len(since))


# What was found


def comparison_table(found: Found) -> str:
    """A comparison of one number as the notebook shows it: mean, interval, paired difference, what tuning chose."""
    (comparison,) = found.comparisons.values()
    arms = list(comparison.values)
    digits, chosen = digits_of(comparison), comparison.chosen or {}
    heads = ["arm", f"{comparison.metric} (95% interval)", f"minus {arms[0]} (paired)", *(["chosen"] if chosen else [])]
    rows = []
    for arm in arms:
        cells = [shown(comparison.interval(arm), digits)]
        gap = comparison.difference(arm, arms[0])
        cells.append("" if arm == arms[0] else clear(shown(gap, digits, sign="+"), gap))
        rows.append((arm, [*cells, *([html.escape(chosen.get(arm, ""))] if chosen else [])]))
    return table(comparison.caption, heads, rows)


def numbers_table(found: Found) -> str:
    """A comparison of several numbers a run: a column each, or a row each where they are many."""
    comparisons = found.comparisons
    arms = list(next(iter(comparisons.values())).values)
    cells = {
        (arm, of): number_cell(one, arm, arms[0]) if arm in one.values else ""
        for of, one in comparisons.items()
        for arm in arms
    }
    caption = next(iter(comparisons.values())).caption + f" The difference is that to {arms[0]}, paired by seed."
    if any(words.startswith("in ") for words in cells.values()):
        caption += " Where not every run has a number, only how many have it is shown."
    if len(comparisons) <= WIDE:
        return table(caption, ["arm", *comparisons], [(arm, [cells[arm, of] for of in comparisons]) for arm in arms])
    return table(caption, ["measured", *arms], [(of, [cells[arm, of] for arm in arms]) for of in comparisons])


def number_cell(comparison: Comparison, arm: str, first: str) -> str:
    """Mean and interval; where not every run has the number, how many have it; of a single run, its number."""
    there = int(np.isfinite(comparison.values[arm]).sum())
    if there < len(comparison.seeds):
        return f"in {there} of {len(comparison.seeds)} runs" if there else "in no run"
    if len(comparison.seeds) == 1:
        return f"{comparison.values[arm][0]:,.{digits_of(comparison)}f} (one run)"
    words = shown(comparison.interval(arm), digits_of(comparison))
    if arm == first or first not in comparison.values or not np.isfinite(comparison.values[first]).all():
        return words
    return clear(words, comparison.difference(arm, first))


def digits_of(comparison: Comparison) -> int:
    """Three decimals of an accuracy, none of a number of steps."""
    finite = np.concatenate([values[np.isfinite(values)] for values in comparison.values.values()])
    return 3 if np.abs(finite).max(initial=0) < 10 else 0


def shown(interval: Interval, digits: int, sign: str = "") -> str:
    """Mean and interval in words."""
    if not np.isfinite(interval.mean):
        return "a run diverged"
    mean, low, high = (f"{value:{sign},.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def clear(words: str, difference: Interval) -> str:
    """Bold where the interval of the difference excludes zero."""
    return f"<strong>{words}</strong>" if difference.excludes_zero else words


def table(caption: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], fold: str = "") -> str:
    """A table whose first column names the rows, folded under the words ``fold`` or if it is long.

    ``rows`` hold HTML, but for the names.
    """
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    made = (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    boxed = scrolls(caption.partition(":")[0], made)
    if len(rows) > LONG or len(heads) > WIDE + 1:
        fold = fold or f"Table of {len(rows)} rows and {len(heads) - 1} columns"
    return f"<details><summary>{html.escape(fold)}</summary>{boxed}</details>" if fold else boxed


# Where it came from


def provenance(study: Study, found: Mapping[str, Found]) -> str:
    """A row for each part: what it is made of, and where and when."""
    heads = [
        *("part", "data", "checksum of the data", "arms", "seeds", "runs", "hours of one core", "date", "machine"),
        *("workers × threads", "versions", "fingerprints"),
    ]
    rows = [(name, provenance_cells(name, part)) for name, part in found.items()]
    hours, runs = sum(part.hours for part in found.values()), sum(len(part.rows) for part in found.values())
    machines = each(s["device"] for part in found.values() for s in part.sessions)
    fold = f"Where it came from: {runs} runs, {hours:.1f} hours of one core, {machines}"
    return table(f"Study {study.chapter}: where each part came from", heads, rows, fold)


def provenance_cells(name: str, found: Found) -> list[str]:
    """What is known of a part's runs."""
    seeds = ", ".join(map(str, found.part.seeds))
    runs = f"{len(found.rows)}" + (f", of which {found.tuning} to choose" if found.tuning else "")
    agree = f"{found.fingerprints}, each that of the code as it stands" if found.comparisons else "of other code"
    if found.confirmed:
        agree += f" (after a change, one run of {found.confirmed} of the arms was repeated and found the same)"
    return [
        html.escape(inspect.getdoc(found.part.data) or ""),
        each(f"<code>{session['data'][name]}</code>" for session in found.sessions),
        str(len(found.part.arms)),
        html.escape(seeds),
        runs,
        f"{found.hours:.2f}",
        each(session["date"] for session in found.sessions),
        each(html.escape(f"{session['device']}, {session['system']}") for session in found.sessions),
        each(f"{session['workers']} × {session['threads']}" for session in found.sessions),
        each(html.escape(f"Python {s['python']}, torch {s['torch']}, NumPy {s['numpy']}") for s in found.sessions),
        f'<a href="page:verification#recorded-studies">{agree}</a>',
    ]


def each(words: Iterable[str]) -> str:
    """What differs between the sessions, once."""
    return "; ".join(dict.fromkeys(words))


def arms_of(part: Part) -> str:
    """The arms of a part in words, with the settings that tuned ones choose among."""
    tuned = [arm for arm in part.arms.values() if isinstance(arm, Tuned)]
    names = ", ".join(f"<i>{html.escape(name)}</i>" for name in part.arms)
    if not tuned:
        return f"Arms: {names}."
    seeds = sorted({seed for arm in tuned for seed in arm.seeds})
    settings = sorted({len(arm.candidates) for arm in tuned})
    many = " or ".join(map(str, settings))
    which = "each" if len(tuned) == len(part.arms) else f"{len(tuned)} of them"
    return (
        f"Arms: {names}; {which} at the best of {many} settings, chosen on the validation split with the seeds "
        f"{', '.join(map(str, seeds))}."
    )


# Where a chapter shows it


@dataclass(frozen=True)
class Place:
    """A section of a chapter: its number, as "5.6", and its anchor, as MyST makes it. Empty above the first one."""

    number: str = ""
    slug: str = ""


def places(notebook: NotebookNode) -> Iterator[tuple[Place, NotebookNode]]:
    """Each code cell with its section (headings of three levels)."""
    slugs: set[str] = set()
    place = Place()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            yield place, cell
            continue
        outside = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
        for title in re.findall(r"^#{1,3} +(.+?)\s*$", outside, re.MULTILINE):
            words = re.sub(r"\$[^$]*\$|[`*]", "", title)  # a formula has no part in an anchor
            number = re.match(r"(\d+(?:\.\d+)?)\.? ", words)
            place = Place(number[1] if number else "", unique_slug(github_slugify(words), slugs))
            slugs.add(place.slug)


def shown_in(notebook: NotebookNode, chapter: str, part: str) -> Place:
    """The section that first reads a part of the chapter's study.

    A cell may name the part in its call, or leave it to a variable or an f-string.
    """
    asks = re.compile(rf"""recorded\(\s*["']{chapter}["'](?:,\s*(f?)(?:["']([^"']*)["']|(\w+)))?""")
    general = Place()
    for place, cell in places(notebook):
        for formatted, literal, variable in asks.findall(cell.source):
            pattern = re.escape(literal)
            pattern = re.sub(r"\\\{.*?\\\}", ".*", pattern) if formatted else pattern
            if literal and re.fullmatch(pattern, part):
                return place
            if not literal and (not variable or re.search(rf"""["']{part}["']""", cell.source)):
                return place
            if variable:
                general = general if general.slug else place
    return general


# The directive


def about(study: Study) -> str:
    """What the study's module says of itself, without its first line, which is the question."""
    words = inspect.getdoc(module_of(study)) or ""
    return markdown(words.partition("\n")[2], block=True)


def module_of(study: Study) -> ModuleType:
    """The module that declares a study."""
    return importlib.import_module(f"{recordings.STUDIES}.chapter_{study.chapter}")


class Studies(Collecting):
    """``{studies}``: all recorded studies, by chapter."""

    def run(self) -> list[nodes.Node]:
        with_study = [(chapter, study_file(chapter.nn)) for chapter in self.chapters()]
        with_study = [(chapter, file) for chapter, file in with_study if file.is_file()]
        self.made_of(file for _, file in with_study)
        return [self.study(chapter, file) for chapter, file in with_study]

    def study(self, chapter: Chapter, file: Path) -> nodes.section:
        """One study."""
        study = declared(chapter.nn)
        self.made_of([Path(inspect.getfile(module_of(study)))])
        notebook, found, parts = notebook_of(chapter), {}, []
        for name, part in study.parts.items():
            found[name] = self.found(study, name, file)
            words = f"<p>{arms_of(part)} {self.where(chapter, notebook, name)}</p>"
            content = self.html(words + found_html(found[name]))
            parts.append(self.section(f"study-{chapter.nn}-{name.replace('_', '-')}", part.title, content))
        head = self.html(
            f"<p><strong>{markdown(study.question)}</strong> ({link(chapter, named(chapter))})</p>{about(study)}"
        )
        return self.section(
            f"study-{chapter.nn}",
            f"Chapter {chapter.number}: {chapter.title}",
            head,
            *parts,
            self.html(provenance(study, found)),
            self.download(file),
        )

    def found(self, study: Study, name: str, file: Path) -> Found:
        """What is recorded of a part; without its comparisons if it was recorded with other code."""
        try:
            return found_of(study, name, file)
        except StudyOutdated as error:
            logger.warning("study %s, part %s: %s", study.chapter, name, error, location=self.get_location())
            rows = [row for row in Book(file, read_only=True).rows if row["part"] == name]
            sessions = [s for s in Book(file, read_only=True).sessions if s["session"] in {row["in"] for row in rows}]
            return Found(study.parts[name], rows, sessions, {})

    def where(self, chapter: Chapter, notebook: NotebookNode, part: str) -> str:
        """The section that shows a part."""
        place = shown_in(notebook, chapter.nn, part)
        if not place.slug:
            return ""
        words = f"chapter {chapter.number}" + (f", section {place.number}" if place.number else "")
        return f"Shown in {link(chapter, words, place.slug)}."

    def download(self, file: Path) -> nodes.paragraph:
        """The rows themselves."""
        target = Path(os.path.relpath(file, self.env.srcdir)).as_posix()
        words = nodes.literal("", file.name)
        entry = addnodes.download_reference("", "", words, refdoc=self.env.docname, reftarget=target, refexplicit=True)
        return nodes.paragraph("", "", nodes.Text("Every run, one line each: "), entry)


def found_html(found: Found) -> str:
    """The table of a part."""
    if not found.comparisons:
        return '<p class="fails">Recorded with other code than the one that stands now: not shown.</p>'
    return comparison_table(found) if len(found.comparisons) == 1 else numbers_table(found)
