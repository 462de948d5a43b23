"""Explorers that move without a kernel: ``python -m course_lib.proving.frames 02`` (or nothing, for all chapters).

The web site of the course has no kernel, so what an explorer draws is drawn beforehand: the chapter is executed as
``run_notebook`` does, and each explorer's own function is called for a grid of positions of its controls: every option
of a choice, some positions of a slider, its ends and its start always among them. A slider that changes nothing for
some options (the momentum of a method without one) is not varied there. The notebook's file is not touched.

``docs/frames/NN.json.gz`` holds the frames of a chapter: JSON, compressed, the same bytes each time it is made.

=============  =========================================================================================
``version``    1; the script of the site reads no other
``explorers``  one object for each explorer, in the order of the chapter:

``said``       the explorer in words, as its output has them: by it and ``content`` frames are known to be stale
``content``    what its first picture shows (``figures.describe_figure``)
``size``       width and height of a picture in points of the screen
``view``       the SVG's ``viewBox``
``controls``   ``name``, ``label``, ``kind`` (``choice`` or ``slider``), ``shown`` (each position in words) and
               ``start`` (the position at first), in the explorer's order
``pieces``     strings: descriptions for screen readers, and elements of SVG in which ``{id}`` stands for a word
               that no other picture of a page uses
``frames``     each a list of indices into ``pieces``: the description, then what stands inside ``<svg>``
``grid``       the frame of each combination of positions; the last control's position changes fastest
=============  =========================================================================================
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import re
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import nbformat
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbformat import NotebookNode, v4
from tqdm import tqdm

from course_lib.lab.files import replaced
from course_lib.lab.runtime import checkout
from course_lib.lab.widgets import DPI, Choice, Explorer
from course_lib.proving import run_notebook
from course_lib.proving.compact_svg import drawn, pieces
from course_lib.proving.figure_comparison import differences
from course_lib.proving.figures import FIGURE_MIME, describe_figure

VERSION = 1
DRAWN = 900  # pictures of one explorer, at most
LARGEST = 1_500_000  # bytes of a chapter's file
STOPS = 25  # positions of one slider, at most: a finer one moves no smoother
FEWEST = 3  # positions of a slider: both ends, and the start
TURN = 2.0  # seconds of drawing between two movements of the progress bar

Values = tuple[Any, ...]


class FramesFailed(RuntimeError):
    """An explorer cannot be drawn beforehand; the message names the notebook and says why."""


# One explorer, in the kernel of its notebook --------------------------------------------------------------------------


class Drawing:
    """All frames of one explorer, drawn little by little: ``go_on`` until it is ``done``, then ``result``."""

    def __init__(self, explorer: Explorer, most: int = DRAWN) -> None:
        self._explorer, self._most = explorer, most
        self._controls = list(explorer.controls.values())
        self._pieces: dict[str, int] = {}
        self._frames: dict[tuple[int, ...], int] = {}
        self._drawn: dict[Values, int] = {}
        self._view = ""
        self._work = self._steps()
        self.done = False

    def go_on(self, seconds: float = TURN) -> tuple[int, int, bool]:
        """Draw for about so long: how many are drawn, how many there will be (as far as is known), and ``done``."""
        until = time.perf_counter() + seconds
        while not self.done and time.perf_counter() < until:
            self.done = next(self._work, None) is None
        return len(self._drawn), self._planned, self.done

    def result(self) -> dict[str, Any]:
        """The explorer's object of the file, as the module describes it."""
        shown = zip(self._explorer.controls.items(), self._positions, strict=True)
        figure = self._explorer()
        grid = [self._drawn[self._reduced(values)] for values in product(*self._positions)]
        return {
            "said": repr(self._explorer),
            "content": describe_figure(figure),
            "size": [round(inches * DPI) for inches in figure.get_size_inches()],
            "view": self._view,
            "controls": [
                {
                    "name": name,
                    "label": control.label,
                    "kind": "choice" if isinstance(control, Choice) else "slider",
                    "shown": [in_words(value) for value in positions],
                    "start": positions.index(control.value),
                }
                for (name, control), positions in shown
            ],
            **in_order(list(self._pieces), list(self._frames), grid),
        }

    def _steps(self) -> Iterator[bool]:
        for options in product(*(control.options for control in self._controls if isinstance(control, Choice))):
            yield from self._find_what_moves(options)
        for values in product(*self._positions):
            self._frame(self._reduced(values))
            yield True

    @cached_property
    def _moving(self) -> dict[Values, set[int]]:
        """For each combination of options, which sliders (by number) change the picture."""
        return {}

    @cached_property
    def _positions(self) -> list[list[Any]]:
        return positions(self._controls, list(self._moving.values()), self._most)

    @property
    def _planned(self) -> int:
        """Frames to draw; while that is not known, as many as there may be."""
        if "_positions" not in self.__dict__:
            return max(self._most, len(self._drawn))
        return len({self._reduced(values) for values in product(*self._positions)} | self._drawn.keys())

    def _find_what_moves(self, options: Values) -> Iterator[bool]:
        """Turn each slider through both ends and the start, with all others at their low end, start and high end."""
        option = iter(options)
        tried = [
            [next(option)] * FEWEST if isinstance(control, Choice) else control.positions(FEWEST)
            for control in self._controls
        ]
        moving = self._moving.setdefault(options, set())
        for number, control in enumerate(self._controls):
            if isinstance(control, Choice):
                continue
            for others in zip(*tried, strict=True):
                seen = set()
                for value in tried[number]:
                    seen.add(self._frame((*others[:number], value, *others[number + 1 :])))
                    yield True
                if len(seen) > 1:
                    moving.add(number)
                    break

    def _reduced(self, values: Values) -> Values:
        """The same picture's values: sliders that change nothing stand at their start."""
        chosen = tuple(v for v, c in zip(values, self._controls, strict=True) if isinstance(c, Choice))
        moving = self._moving[chosen]
        return tuple(
            value if isinstance(control, Choice) or number in moving else control.value
            for number, (value, control) in enumerate(zip(values, self._controls, strict=True))
        )

    def _frame(self, values: Values) -> int:
        """The number of the frame for ``values``, drawn if it was not yet."""
        if values not in self._drawn:
            named = dict(zip(self._explorer.controls, values, strict=True))
            try:
                figure = self._explorer(**named)
            except Exception as error:
                raise FramesFailed(f"the explorer cannot be drawn at {named}: {error}") from error
            self._view, parts = pieces(drawn(figure))
            frame = tuple(self._pieces.setdefault(part, len(self._pieces)) for part in (description(figure), *parts))
            self._drawn[values] = self._frames.setdefault(frame, len(self._frames))
        return self._drawn[values]


def positions(controls: Sequence[Any], moving: Sequence[set[int]], most: int) -> list[list[Any]]:
    """The positions of each control, as many as ``most`` frames allow and about as many for each slider.

    ``moving``: for each combination of options, the numbers of the controls that are varied there.
    """
    counts = [FEWEST] * len(controls)
    found = [control.positions(FEWEST) for control in controls]
    growing = {number for number, control in enumerate(controls) if not isinstance(control, Choice)}
    while growing:
        number = min(growing, key=lambda one: (len(found[one]), one))
        more = controls[number].positions(counts[number] + 1)
        sizes = [len(more if other == number else stops) for other, stops in enumerate(found)]
        if counts[number] == STOPS or sum(prod(sizes[one] for one in some) for some in moving) > most:
            growing.remove(number)
        else:
            counts[number] += 1
            found[number] = max(found[number], more, key=len)
    return found


def in_order(pieces: Sequence[str], frames: Sequence[Sequence[int]], grid: Sequence[int]) -> dict[str, list[Any]]:
    """The same pieces, frames and grid, numbered as the grid comes to them: what it does not show is left out."""
    frame_numbers = {old: new for new, old in enumerate(dict.fromkeys(grid))}
    shown = [frames[old] for old in frame_numbers]
    piece_numbers = {old: new for new, old in enumerate(dict.fromkeys(piece for frame in shown for piece in frame))}
    return {
        "pieces": [pieces[old] for old in piece_numbers],
        "frames": [[piece_numbers[piece] for piece in frame] for frame in shown],
        "grid": [frame_numbers[frame] for frame in grid],
    }


def in_words(value: Any) -> str:
    """A position as the page shows it: the very value that was drawn."""
    return f"{value:,.15g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def description(figure: Figure) -> str:
    """What a picture says about itself: its titles, and what each of its axes shows against what."""
    said = [figure.get_suptitle()]
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        title = ", ".join(filter(None, (axes.get_title(place) for place in ("left", "center", "right"))))
        across, up = axes.get_xlabel(), axes.get_ylabel()
        against = f"{up} against {across}" if up and across else up or across
        said.append(f"{title} ({against})" if title and against else title or against)
    return ". ".join(plain for words in said if (plain := _plain(words)))


def _plain(words: str) -> str:
    """Words without the marks of mathematics: ``$10^{-2}$`` is read as 10^-2."""
    words = re.sub(r"\$([^$]*)\$", lambda match: re.sub(r"\\(?:math\w+|,)|[{}\\]", "", match[1]), words)
    return " ".join(words.split())


# One chapter ----------------------------------------------------------------------------------------------------------


def draw(notebook_path: Path) -> list[dict[str, Any]]:
    """The frames of all explorers of a notebook, which is executed for it and stays as it is.

    Raises
    ------
    NotebookFailed : a cell fails.
    FramesFailed : an explorer is not the result of its cell, or cannot be drawn somewhere.
    """
    notebook = nbformat.read(notebook_path, as_version=4)
    cells = list(notebook.cells)
    client = run_notebook.new_client(notebook, notebook_path)
    number, found = 0, []
    with client.setup_kernel(env=run_notebook.kernel_environment()):
        for index, cell in enumerate(tqdm(cells, desc=notebook_path.name, unit="cell", leave=False, disable=None)):
            number += cell.cell_type == "code" and bool(cell.source.strip())
            try:
                client.execute_cell(cell, index)
            except run_notebook.CELL_FAILED as error:
                raise run_notebook.failed(notebook_path, number, error) from error
            for _ in _explorers([cell]):
                found.append(_frames(client, notebook_path, number, cell))
    return found


def _frames(client: NotebookClient, path: Path, number: int, cell: NotebookNode) -> dict[str, Any]:
    """The frames of the explorer that ``cell`` has just shown, drawn by the kernel that holds it.

    Right after its cell and not at the end: what its function uses may have another meaning by then.
    """

    def ask(code: str) -> str:
        index = len(client.nb.cells)
        client.nb.cells.append(v4.new_code_cell(code))
        try:
            client.execute_cell(client.nb.cells[index], index)
        except run_notebook.CELL_FAILED as error:
            raise FramesFailed(f"{path.name}: the explorer of code cell [{number}]: {error}") from error
        return "".join(o.data["text/plain"] for o in client.nb.cells.pop().outputs if o.output_type == "execute_result")

    ask(f"from {__name__ if __name__ != '__main__' else 'course_lib.proving.frames'} import Drawing as _Drawing")
    if ask(f"type(Out.get({cell.execution_count})).__name__") != "'Explorer'":
        raise FramesFailed(f"{path.name}: the explorer of code cell [{number}] must be the result of its cell")
    ask(f"_drawing = _Drawing(Out[{cell.execution_count}])")
    done = False
    with tqdm(desc=f"{path.name} [{number}]", unit="picture", leave=False, disable=None) as bar:
        while not done:
            bar.n, bar.total, done = ast.literal_eval(ask("_drawing.go_on()"))
            bar.refresh()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "frames.json"
        ask(f"import json as _json; _ = open({str(file)!r}, 'w').write(_json.dumps(_drawing.result())); del _drawing")
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _explorers(cells: Iterable[NotebookNode]) -> Iterator[tuple[NotebookNode, Mapping[str, Any]]]:
    """The explorers that cells show: the cell, and the explorer's output by kind."""
    for cell in cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if FIGURE_MIME in data and "".join(data.get("text/plain", "")).startswith("Explorer: "):
                yield cell, data


# The file -------------------------------------------------------------------------------------------------------------


def frames_of(notebook_path: Path) -> Path:
    """Where the frames of a chapter's notebook are kept: ``docs/frames/02.json.gz`` of the same checkout."""
    return notebook_path.resolve().parents[1] / "docs" / "frames" / f"{notebook_path.name[:2]}.json.gz"


def write(explorers: list[dict[str, Any]], path: Path) -> int:
    """Write a chapter's file in one step; its bytes.

    Raises
    ------
    FramesFailed : it would be larger than the site should serve.
    """
    text = json.dumps({"version": VERSION, "explorers": explorers}, ensure_ascii=False, separators=(",", ":"))
    packed = gzip.compress(text.encode(), compresslevel=9, mtime=0)
    if len(packed) > LARGEST:
        raise FramesFailed(f"{path.name} would take {len(packed):,} bytes; {LARGEST:,} are allowed")
    with replaced(path) as file:
        file.write(packed)
    return len(packed)


def read(path: Path) -> list[dict[str, Any]]:
    """The explorers of a chapter's file.

    Raises
    ------
    ValueError : the file has another version than this module writes.
    """
    content = json.loads(gzip.decompress(path.read_bytes()))
    if content.get("version") != VERSION:
        raise ValueError(f"{path.name} has version {content.get('version')}, not {VERSION}; draw it anew")
    return list(content["explorers"])


def stale(notebook_path: Path, frames_path: Path) -> str:
    """Why the frames no longer show what the notebook's explorers show, as it is stored; "" if they do."""
    from course_lib.proving.nbval_plugin import cell_tolerance  # it needs pytest, which drawing does not

    shown = list(_explorers(nbformat.read(notebook_path, as_version=4).cells))
    again = f"run make frames NB={notebook_path.name[:2]}"
    if not frames_path.exists():
        return f"there are no frames of {notebook_path.name}'s {len(shown)} explorers: {again}" if shown else ""
    try:
        stored = read(frames_path)
    except ValueError as error:
        return str(error)
    if len(stored) != len(shown):
        return f"{frames_path.name} has {len(stored)} explorers, {notebook_path.name} {len(shown)}: {again}"
    for number, (frames, (cell, data)) in enumerate(zip(stored, shown, strict=True), start=1):
        where = f"explorer {number} of {notebook_path.name}"
        said = "".join(data["text/plain"])
        if frames["said"] != said:
            return f"{where} is now '{said}', its frames are of '{frames['said']}': {again}"
        if found := differences(frames["content"], data[FIGURE_MIME], cell_tolerance(cell.metadata.get("tags", []))):
            return f"{where} shows another picture than its frames ({found[0]}): {again}"
    return ""


def as_script(frames_path: Path, key: str) -> str:
    """The file as a script that hands it to ``explorer.js`` under ``key``.

    A script and not the data alone, because pages that are opened from a disk may load scripts, but fetch nothing.
    """
    packed = b64encode(frames_path.read_bytes()).decode()
    return f"(window.explorerFrames ??= {{}})[{json.dumps(key)}] = {json.dumps(packed)};\n"


def families(explorers: Iterable[Mapping[str, Any]]) -> set[str]:
    """The font families that frames are set in, with their style: ``DejaVu Sans``, ``DejaVu Sans oblique``."""
    found = set()
    for piece in {piece for one in explorers for piece in one["pieces"]}:
        for style in re.findall(r'style="([^"]*font-family[^"]*)"', piece):
            parts = dict(part.split(":", 1) for part in style.split(";"))
            others = (parts[name] for name in ("font-style", "font-weight") if name in parts)
            found.add(" ".join([parts["font-family"].replace("'", ""), *others]))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Draw the frames of the chapters that the command line names; the number that failed."""
    parser = argparse.ArgumentParser(description="Draw the explorers' frames for the web site.")
    parser.add_argument("notebook", nargs="*", help="a chapter number (02) or a path; all chapters by default")
    folder = (checkout() or Path.cwd()) / "notebooks"
    try:
        paths = run_notebook.targets(parser.parse_args(arguments).notebook, folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for path in paths:
        started = time.perf_counter()
        try:
            explorers = draw(path)
            if not explorers:
                print(f"{path.name}: no explorer")
                continue
            size = write(explorers, frames_of(path))
        except (run_notebook.NotebookFailed, FramesFailed) as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        counts = "; ".join(f"{len(one['grid']):,} positions, {len(one['frames']):,} pictures" for one in explorers)
        seconds, fonts = time.perf_counter() - started, ", ".join(sorted(families(explorers)))
        print(f"{path.name}: {counts}; {size / 1000:,.0f} kB; {seconds:.0f} s; {fonts}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
