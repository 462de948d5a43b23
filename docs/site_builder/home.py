"""What the home page shows of the course itself: the loop, the chapters, and how much there is.

| directive | what it shows |
| --- | --- |
| ``{loop}`` | the training loop as a picture of boxes, each leading to its chapters |
| ``{chapters}`` | all chapters: what is written leads there, what is to come says so |
| ``{in-figures}`` | chapters, figures, tested claims and runs of recorded studies, counted |
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from course_lib.lab.chapters import CHAPTERS, Chapter, of_slot
from course_lib.lab.plotting import SLOTS
from site_builder import notebooks
from site_builder.notebooks import ROOT

ALL = {"": "the whole loop", "model": "the model itself"}


def loop(there: set[int]) -> str:
    """The loop as HTML: boxes in the order of a step, so that it reads well without its style sheet too."""
    boxes = "".join(_slot(name, decides, there) for name, (_, decides) in SLOTS.items())
    # what the lines between the boxes say, for the eye
    turn = '<li class="turn" aria-hidden="true"><span>↑ next batch</span><span>← after the epoch</span></li>'
    return f'<nav class="loop" aria-label="The training loop, slot by slot"><ol>{boxes}{turn}</ol></nav>'


def _slot(name: str, decides: str, there: set[int]) -> str:
    links = "".join(f"<li>{_linked(CHAPTERS[number], there)}</li>" for number in of_slot(name))
    return f'<li class="slot {name}"><b>{name}</b><span>{" ".join(decides.split())}</span><ul>{links}</ul></li>'


def _linked(chapter: Chapter, there: set[int]) -> str:
    words = f"{chapter.number} {html.escape(' '.join(chapter.short.split()))}"
    if chapter.number not in there:
        return f'<span class="to-come">{words}<span class="hidden"> (to come)</span></span>'
    return f'<a href="{_page(chapter)}">{words}</a>'


def _page(chapter: Chapter) -> str:
    return f"chapters/{Path(chapter.file).stem}.html"


def table(there: set[int]) -> str:
    """The chapters, one line each."""
    lines = []
    for chapter in CHAPTERS:
        title, promise = html.escape(chapter.title), html.escape(chapter.promise)
        ready = chapter.number in there
        name = f'<a href="{_page(chapter)}">{title}</a>' if ready else title
        state = "" if ready else ' <span class="to-come">to come</span>'
        slot = f'<span class="in-slot">{ALL.get(chapter.slot, chapter.slot)}</span>'
        lines.append(f"<li value='{chapter.number}'><b>{name}</b>{state} {slot}<br>{promise}</li>")
    return f'<ol class="chapters" start="0">{"".join(lines)}</ol>'


def counted() -> dict[str, int]:
    """How much of the course there is."""
    stored = [notebooks.stored(chapter) for chapter in notebooks.chapters()]
    rows = [json.loads(line) for path in (ROOT / "data" / "studies").glob("*.jsonl") for line in _lines(path)]
    return {
        "chapters": len(stored),
        "figures": sum(len(notebooks.figures(notebook)) for notebook in stored),
        "tested claims": sum(len(notebooks.claims(notebook)) for notebook in stored),
        "recorded runs": sum("seed" in row for row in rows),
    }


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def in_figures() -> str:
    """The counts as HTML."""
    return (
        '<dl class="in-figures">'
        + "".join(f"<div><dt>{name}</dt><dd>{number:,}</dd></div>" for name, number in counted().items())
        + "</dl>"
    )


def _directive(made: Callable[[], str]) -> type[SphinxDirective]:
    class FromTheCourse(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # what is written changes without this page being touched
            return [nodes.raw("", made(), format="html")]

    return FromTheCourse


def _there() -> set[int]:
    return {chapter.number for chapter in notebooks.chapters()}


def setup(app: Sphinx) -> None:
    """Register the directives."""
    app.add_directive("loop", _directive(lambda: loop(_there())))
    app.add_directive("chapters", _directive(lambda: table(_there())))
    app.add_directive("in-figures", _directive(in_figures))
