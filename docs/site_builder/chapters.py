"""The page of a chapter, made of its stored notebook before Sphinx reads it.

`write` puts into ``docs/chapters/`` one notebook for each chapter and into ``docs/solutions/`` its solutions, and into
``_build/made`` their pictures and frames. What the page says is what the notebook says; what is made here is

- a head: neighbours on the map, when and on what it was run, the notebook to download, how to open it with a kernel;
- every picture as a file of its own, at its size, loaded when it comes near, with an alternative text;
- every prediction as a real question: what follows it, up to the next heading or question, is folded until the reader
  has decided (code stays in sight, but for claims and for figures, whose titles tell);
- an explorer whose frames were drawn beforehand (`course_lib.proving.frames`);
- a hint under each exercise, folded, and the solutions on a page that the search does not know.

A file is written only if it changed, so that Sphinx reads again what must be read again, and no more.
"""

from __future__ import annotations

import copy
import hashlib
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course_lib.lab.chapters import CHAPTERS, Chapter
from course_lib.proving import frames
from course_lib.proving.run_notebook import CLAIMED
from site_builder import fonts, notebooks
from site_builder.notebooks import ROOT, Picture, as_json, html_of, picture, stored

_PREDICTION = re.compile(r"Predict (?P<key>\d\d\.[a-z]): (?P<question>.*) \((?P<offered>.*)\)", re.DOTALL)
_ANSWER = re.compile(r"(?P<key>\d\d\.[a-z]), .* Measured: (?P<measured>.*)\.", re.DOTALL)
_ASIDE = re.compile(r"(?:import|from) \w+|predict\(|claims\.claim\(")  # code whose output says it better, or nothing
_ASKED = re.compile(r"""^predict\(\s*["'](\d\d\.[a-z])["']""", re.MULTILINE)
_HEADING = re.compile(r"^#{1,4} ", re.MULTILINE)
_HINTS_AT_THE_END = re.compile(r"Hints and solutions are folded at the end\.")
_EXERCISE = re.compile(r"^\*\*Exercise (\d+)", re.MULTILINE)
_FOLDED = re.compile(
    r"\s*<details><summary>(?:<b>)?(?P<name>Hints|Solutions)\b.*?</summary>(?P<body>.*)</details>\s*", re.DOTALL
)


@dataclass
class Page:
    """What becomes of one notebook."""

    chapter: Chapter
    cells: list[NotebookNode] = field(default_factory=list)
    solutions: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # by their paths in the site
    claims: int = 0
    explorers: int = 0

    @property
    def name(self) -> str:
        return Path(self.chapter.file).stem


def write(docs: Path, root: Path = ROOT) -> None:
    """Bring all generated pages and files up to date; what belongs to no chapter any more is removed."""
    wanted: dict[Path, bytes] = {}
    made = docs / "_build" / "made"
    for chapter in notebooks.chapters(root):
        page = page_of(chapter, root)
        wanted[docs / "chapters" / chapter.file] = _as_file(page.cells)
        wanted[docs / "solutions" / f"{chapter.nn}.md"] = _solutions_page(page).encode()
        wanted |= {made / path: content for path, content in page.files.items()}
        wanted[made / "notebooks" / chapter.file] = notebooks.path_of(chapter, root).read_bytes()
    wanted |= {made / "fonts" / f"{name}.woff": fonts.cut(name) for name in fonts.NAMES}
    bring_up_to_date([docs / "chapters", docs / "solutions", made], wanted)


def bring_up_to_date(folders: list[Path], wanted: dict[Path, bytes]) -> None:
    """Make the folders hold the wanted files and no others, touching none that is right already."""
    for folder in folders:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_file() and path not in wanted:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
    for path, content in wanted.items():
        if not path.is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def page_of(chapter: Chapter, root: Path = ROOT) -> Page:
    """The page of a chapter."""
    page, notebook = Page(chapter), stored(chapter, root)
    asking = ""  # the prediction whose answers are being shown
    for stored_cell in notebook.cells:
        cell = copy.deepcopy(stored_cell)
        cell.metadata = NotebookNode(tags=[])
        if cell.cell_type == "markdown":
            asking = _add_words(page, cell, asking)
            continue
        if _ASIDE.match(cell.source):
            cell.metadata.tags.append("hide-input")
        if found := _ASKED.search(cell.source):
            asking = found[1]
        elif asking:
            cell.metadata.tags.append(_tag(asking))
            if CLAIMED.search(cell.source) or any("image/png" in output.get("data", {}) for output in cell.outputs):
                cell.metadata.tags.append("answers-in-source")  # a claim, or a title that tells
        cell.outputs = [_shown(page, output) for output in cell.outputs]
        page.cells.append(cell)
    first = next(k for k, cell in enumerate(page.cells) if cell.cell_type == "markdown")
    page.cells.insert(first + 1, nbformat.v4.new_markdown_cell(_head(page, notebook)))
    frames_file = root / "docs" / "frames" / f"{chapter.nn}.json.gz"
    if page.explorers and frames_file.is_file():
        page.files[f"frames/{chapter.nn}.js"] = frames.as_script(frames_file, chapter.nn).encode()
    return page


def _as_file(cells: list[NotebookNode]) -> bytes:
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    shown = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    return (nbformat.writes(shown) + "\n").encode()


# Words: exercises, hints, solutions


def _tag(key: str) -> str:
    return f"asked-{key.replace('.', '-')}"


def _add_words(page: Page, cell: NotebookNode, asking: str) -> str:
    """Add a cell of words; the prediction whose answers are still being shown after it: none after a heading."""
    folded = _FOLDED.fullmatch(cell.source)
    if folded and folded["name"] == "Hints" and _place_hints(page, folded["body"]):
        return ""
    if folded and folded["name"] == "Solutions":
        page.solutions = folded["body"].strip()
        words = f"The [solutions](../solutions/{page.chapter.nn}.md) have a page of their own, for when you have tried."
        page.cells.append(nbformat.v4.new_markdown_cell(words))
        return ""
    words = _HINTS_AT_THE_END.sub(
        "A hint is folded below each exercise; the solutions have a page of their own.", cell.source
    )
    heading = _HEADING.search(words)
    told = (words[: heading.start()] if heading else words).strip() if asking else ""
    if told:
        inside = f"::::::{{container}} told {_tag(asking)}\n{told}\n::::::"
        page.cells.append(nbformat.v4.new_markdown_cell(inside))
        words = words[heading.start() :] if heading else ""
    if words:
        cell.source = words
        page.cells.append(cell)
    return "" if heading else asking


def _place_hints(page: Page, body: str) -> bool:
    """Each hint of a numbered list under its exercise; False where they do not fit one another."""
    found = {
        int(number): words.strip() for number, words in re.findall(r"^(\d+)\. (.*(?:\n(?!\d+\. ).*)*)", body, re.M)
    }
    places = list(_exercises(page.cells))
    if not found or not set(found) <= {number for number, _ in places}:
        return False
    for k in range(len(places) - 1, -1, -1):
        number, _ = places[k]
        end = places[k + 1][1] if k + 1 < len(places) else len(page.cells)
        if number in found:
            words = (
                f"<details class='hint'><summary>Hint for exercise {number}</summary>\n\n{found[number]}\n\n</details>"
            )
            page.cells.insert(end, nbformat.v4.new_markdown_cell(words))
    return True


def _exercises(cells: list[NotebookNode]) -> Iterator[tuple[int, int]]:
    """The number of each exercise, and the index of the cell that holds its text."""
    for index, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            for match in _EXERCISE.finditer(cell.source):
                yield int(match[1]), index


def _solutions_page(page: Page) -> str:
    chapter = page.chapter
    words = page.solutions or "This chapter has no solutions that are written down."
    # nosearch: who looks for a word is not shown a solution
    return f"""---
orphan: true
nosearch: true
---

# {chapter.number} · {chapter.title}: solutions

Of the <a href="../chapters/{page.name}.html#exercises">exercises of chapter {chapter.number}</a>. In the notebook
itself `check` tells you whether yours is right, also where it is written in another way.

<details class="solutions"><summary>Show the solutions</summary>

{words}

</details>
"""


# Outputs


def _shown(page: Page, output: NotebookNode) -> NotebookNode:
    if output.output_type not in ("execute_result", "display_data"):
        return output
    text = str(output.data.get("text/plain", ""))
    if "image/png" in output.data:
        return _as_html(_figure(page, picture(output)))
    if found := _PREDICTION.fullmatch(text):
        return _as_html(_question(html_of(output), found))
    if found := _ANSWER.fullmatch(text):
        measured = html.escape(found["measured"], quote=True)
        return _as_html(
            f'<div class="answer" data-key="{found["key"]}" data-measured="{measured}">{html_of(output)}</div>'
        )
    if notebooks.is_claim(output):
        page.claims += 1
        return _as_html(f'<div class="claim" id="claim-{page.claims}">{html_of(output)}</div>')
    if "<table" in html_of(output):
        return _as_html(f'<div class="scrolls" tabindex="0" role="region" aria-label="Table">{_table(output)}</div>')
    if html_of(output):
        return _as_html(html_of(output).replace(' role="status"', ""))  # nothing changes here, so nothing is announced
    return output


def _as_html(text: str) -> NotebookNode:
    return nbformat.v4.new_output("display_data", data={"text/html": text})


def _table(output: NotebookNode) -> str:
    """A table of pandas without its own style sheet and frame, which know no dark theme; chapters become pages."""
    text = re.sub(r"<style\b.*?</style>", "", html_of(output), flags=re.DOTALL)
    text = re.sub(r'(<a href="\d\d_\w+)\.ipynb([#"])', r"\1.html\2", text)
    return text.replace(' border="1"', "").replace(' class="dataframe"', "")


def _figure(page: Page, shown: Picture) -> str:
    number = sum(path.startswith("figures/") for path in page.files) + 1
    digest = hashlib.sha256(shown.png).hexdigest()[:8]
    path = f"figures/{page.chapter.nn}/{number:02d}-{digest}.png"
    page.files[path] = shown.png
    alt = html.escape(shown.alt, quote=True)
    image = (
        f'<img src="../{path}" alt="{alt}" width="{shown.width}" height="{shown.height}"'
        f' style="--wide:{shown.width}" loading="lazy" decoding="async">'
    )
    if shown.moves:
        page.explorers += 1
        nn, index = page.chapter.nn, page.explorers - 1
        data = f'data-frames="../frames/{nn}.js" data-key="{nn}" data-index="{index}" data-controls="{shown.controls}"'
        return f'<figure class="picture explorer" id="explorer-{page.explorers}" {data}>{image}</figure>'
    scrolling = f'<div class="scrolls" tabindex="0" role="region" aria-label="Figure {number}">{image}</div>'
    return f'<figure class="picture" id="figure-{number}">{scrolling}</figure>'


def _question(shown: str, found: re.Match[str]) -> str:
    """The question, and the buttons by which a reader decides; without a script all answers are in sight anyway."""
    offered, key = found["offered"], found["key"]
    several = not re.match(r"order these: |a number from |a height from ", offered)
    options = offered.split(" / ") if several else []
    if options:  # buttons say the same
        said = html.escape(offered)
        shown = shown.replace(f"<br>{said}", f'<span class="offered"><br>{said}</span>')
    return f'<div class="prediction" data-key="{key}" data-options="{as_json(options)}">{shown}</div>'


# The head of a page


def _head(page: Page, notebook: NotebookNode) -> str:
    """What stands under the title: neighbours, last run, download, and how to open it. One block of HTML."""
    chapter, there = page.chapter, {one.number for one in notebooks.chapters()}
    rows = {}
    if chapter.slot:
        rows["slot of the loop"] = f'<a href="../index.html#the-loop">{chapter.slot}</a>'
    if needs := [CHAPTERS[number] for number in chapter.needs if number in there]:
        rows["read before"] = ", ".join(map(_link, needs))
    if leads := [one for one in CHAPTERS if chapter.number in one.needs and one.number in there and one.number != 16]:
        rows["leads to"] = ", ".join(map(_link, leads))
    if run := notebooks.last_run(notebook):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        machine = f"{run['machine']['cores']} cores, {run['machine']['system']}"
        rows["last run"] = f"<time>{run['date']}</time>, {run['seconds']} s on {machine}; {versions}"
    rows["notebook"] = f'<a href="../notebooks/{chapter.file}" download>{chapter.file}</a>'
    listed = "".join(f"<div><dt>{name}</dt><dd>{what}</dd></div>" for name, what in rows.items())
    opening = (
        "<details><summary>Open it in your JupyterLab</summary><p>In a clone of the course <code>make lab</code> starts"
        f" JupyterLab; there, open <code>notebooks/{chapter.file}</code>. With a kernel the explorer moves freely, your"
        " answers to the questions are kept, and <code>check</code> tells you whether an exercise is solved.</p>"
        "</details>"
    )
    return f'<div class="page-head"><dl>{listed}</dl>{opening}</div>'


def _link(chapter: Chapter) -> str:
    return f'<a href="{Path(chapter.file).stem}.html">{chapter.number} {chapter.title}</a>'
