"""What a stored notebook holds for the site: figures, claims, references, and how it was last run.

| function | what it finds |
| --- | --- |
| `chapters` | the chapters whose notebook is there, in the map's order |
| `stored` | a chapter's notebook, as it lies in ``notebooks/`` |
| `last_run` | when, for how long, with which versions and on what it was executed |
| `figures` | its pictures with their widths, heights and alternative texts, in order |
| `claims` | its tested claims: sentence, condition, figures |
| `references` | its list of references |

Nothing is executed here, and nothing is known of a chapter beside what `course_lib.lab.chapters` and the file say.
"""

from __future__ import annotations

import html
import json
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from course_lib.lab.chapters import CHAPTERS, Chapter, written
from course_lib.proving.figures import FIGURE_MIME

ROOT = Path(__file__).resolve().parents[2]
_CLAIM = re.compile(
    r'<div><span style="[^"]*">(?P<mark>[✓✗][^<]*)</span> (?P<sentence>.*?) <span style="opacity:0.75">'
    r"\((?P<figures>.*?); <code>(?P<condition>.*?)</code>\)</span></div>",
    re.DOTALL,
)


@dataclass(frozen=True)
class Picture:
    """A stored picture; ``width`` and ``height`` in points of the screen, ``controls`` the number of an explorer's."""

    png: bytes
    width: int
    height: int
    alt: str
    controls: int = 0

    @property
    def moves(self) -> bool:
        """Whether it is an explorer's."""
        return self.controls > 0


@dataclass(frozen=True)
class Claim:
    """A tested claim as its chapter shows it; ``number`` counts from 1 in the chapter, and is its anchor there."""

    number: int
    sentence: str
    condition: str
    figures: str
    holds: bool

    @property
    def anchor(self) -> str:
        return f"claim-{self.number}"


@dataclass(frozen=True)
class Reference:
    """A reference as a chapter lists it: Markdown, and the address that it links to ("" where it has none)."""

    text: str
    url: str

    @property
    def key(self) -> str:
        """The same for the same work in all chapters: its address without version, else its first words."""
        if self.url:
            return re.sub(r"v\d+$", "", self.url.rstrip("/")).lower()
        return re.sub(r"\W+", " ", self.text).strip().lower()[:60]


def chapters(root: Path = ROOT) -> list[Chapter]:
    """The chapters that are there."""
    there = written(root)
    return [chapter for chapter in CHAPTERS if chapter.number in there]


def path_of(chapter: Chapter, root: Path = ROOT) -> Path:
    """Where a chapter's notebook lies."""
    return root / "notebooks" / chapter.file


def stored(chapter: Chapter, root: Path = ROOT) -> NotebookNode:
    """A chapter's notebook. Not to be changed: it is read once."""
    path = path_of(chapter, root)
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def last_run(notebook: NotebookNode) -> Mapping[str, Any]:
    """``date``, ``seconds``, ``versions`` and ``machine`` of the run that its outputs come from; empty if unknown."""
    found: Mapping[str, Any] = notebook.metadata.get("craft", {}).get("run", {})
    return found


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """All outputs, in order."""
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def figures(notebook: NotebookNode) -> list[Picture]:
    """All pictures, in order."""
    return [picture(output) for output in outputs(notebook) if "image/png" in output.get("data", {})]


def picture(output: NotebookNode) -> Picture:
    """The picture of an output that has one."""
    data = output["data"]
    png = b64decode(data["image/png"])
    # bytes 16 to 24 of a PNG are its width and height in pixels, stored at twice the screen's resolution
    pixels = [int.from_bytes(png[at : at + 4], "big") for at in (16, 20)]
    width = int(output["metadata"].get("image/png", {}).get("width", pixels[0] // 2))
    height = round(width * pixels[1] / pixels[0])
    return Picture(png, width, height, alternative_text(data.get(FIGURE_MIME, {})), _controls(data))


def _controls(data: Mapping[str, Any]) -> int:
    """As an explorer says them: ``Explorer: rate = 0.1 (numbers from 0 to 1); method = "SGD" (one of …)``."""
    said = str(data.get("text/plain", ""))
    return said.count("); ") + 1 if said.startswith("Explorer:") else 0


def alternative_text(content: Mapping[str, Any]) -> str:
    """What a figure says, for who does not see it: the author's words, else its titles, axes and lines.

    Source of the parts: `course_lib.proving.figures.describe_figure`.
    """
    if content.get("alt"):
        return str(content["alt"])
    panels = [panel for panel in map(_panel, content.get("axes", [])) if panel]
    head = _words(content.get("title", ""))
    count = f"{len(panels)} panels. " if len(panels) > 1 else ""
    return f"{head + '. ' if head else ''}{count}{' '.join(panels)}".strip() or "A drawing without axes."


def _panel(axes: Mapping[str, Any]) -> str:
    title, labels = _words(axes.get("title", "")), axes.get("label", {})
    x, y = _words(labels.get("x", "")), _words(labels.get("y", ""))
    across = f"{y} against {x}" if x and y else x or y
    names = [entry["text"] for legend in axes.get("legends", []) for entry in legend["entries"]]
    names = names or [text["text"] for text in axes.get("texts", []) if isinstance(text, Mapping) and text.get("text")]
    named = ", ".join(dict.fromkeys(_words(name) for name in names if re.search(r"[^\W\d]", name)))  # no cells' numbers
    parts = [title, across, named]
    return ": ".join(part for part in parts if part) + "." if any(parts) else ""


def _words(text: str) -> str:
    """A title's words on one line, without the signs of mathtext."""
    plain = re.sub(r"\$([^$]*)\$", lambda match: re.sub(r"\\(?:mathrm|mathbf|text)|[{}\\]", "", match[1]), str(text))
    return " ".join(plain.split())


def is_claim(output: NotebookNode) -> bool:
    """Whether an output is one claim (not the table of all)."""
    return _CLAIM.fullmatch(html_of(output)) is not None


def html_of(output: NotebookNode) -> str:
    """The HTML of an output; empty where it has none."""
    return str(output.get("data", {}).get("text/html", ""))


def claims(notebook: NotebookNode) -> list[Claim]:
    """The claims in the order in which the chapter makes them."""
    found = filter(None, (_CLAIM.fullmatch(html_of(output)) for output in outputs(notebook)))
    return [
        Claim(number, match["sentence"], match["condition"], match["figures"], match["mark"] == "✓")
        for number, match in enumerate(found, start=1)
    ]


def references(notebook: NotebookNode) -> list[Reference]:
    """The entries of the section "References"."""
    for cell in reversed(notebook.cells):
        if cell.cell_type == "markdown" and (head := re.search(r"^## References\s*$", cell.source, re.MULTILINE)):
            entries = re.findall(r"^- (.+(?:\n {2,}.+)*)", cell.source[head.end() :], re.MULTILINE)
            return [Reference(" ".join(entry.split()), _address(entry)) for entry in entries]
    return []


def _address(markdown: str) -> str:
    found = re.search(r"\]\((https?://(?:[^()\s]|\([^()\s]*\))+)\)", markdown)
    return found[1] if found else ""


def plain(fragment: str) -> str:
    """The words of a piece of HTML."""
    return html.unescape(re.sub(r"<[^>]+>", "", fragment))


def as_json(value: Any) -> str:
    """JSON that may stand inside an HTML attribute in double quotes."""
    return html.escape(json.dumps(value, ensure_ascii=False), quote=True)
