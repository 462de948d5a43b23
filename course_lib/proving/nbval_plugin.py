"""A pytest plugin that makes nbval compare what a notebook shows: figures by their data, tables and text by number.

nbval runs each notebook and, by itself, ignores pictures and compares text character by character. With this plugin
(loaded by the ``addopts`` of ``pyproject.toml``)

- a figure is compared by the content stored beside it (``figures.py``), and its PNG must be there and not be blank;
- in text and tables, words must agree exactly and numbers within one tolerance (``agreement.py``);
- the cell tag ``tol:0.05`` sets another tolerance for a cell; the tag ``timing`` says that its numbers are measured
  times or memory, which only have to be finite; the tag ``processor`` that its outputs hold on processors
  like the one they were stored on, with instructions for bfloat16: elsewhere it only has to run.

It also sees to how notebooks run: in this environment's kernel, never touching a learner's progress, in the quick
profile, with the cores shared out among the workers, the slowest first, and from any working directory. And it looks
at what is left when a notebook's kernel has ended: a process or a temporary file is an error.
"""

import base64
import binascii
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError
from PIL import Image, UnidentifiedImageError

from course_lib.lab.processors import multiplies_bfloat16
from course_lib.proving import WITHOUT_WEIGHTS
from course_lib.proving.agreement import TOLERANCE, html_differences, html_pictures, shorten, text_differences
from course_lib.proving.figures import FIGURE_MIME, differences
from course_lib.proving.leftovers import Traces

WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
PNG = "image/png"
MESSAGES = 8  # of one cell; more would only hide the first

# Threads are shared out by these; one that the user has set is left alone.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Output = Mapping[str, Any]


# ---- comparing the outputs of a cell ---------------------------------------------------------------------------------


def cell_tolerance(tags: Iterable[str]) -> float | None:
    """The tolerance that a cell's tags ask for; None for ``timing``. Raises ValueError for a tag that is half right."""
    tolerance: float | None = TOLERANCE
    for tag in tags:
        if tag == "timing":
            return None
        if tag.startswith("tol"):
            match = re.fullmatch(r"tol:(\d*\.?\d+)", tag)
            if match is None or not 0 < float(match.group(1)) < 1:
                raise ValueError(f"the cell tag '{tag}' is not understood: write tol: and a share, like tol:0.05")
            tolerance = float(match.group(1))
    return tolerance


def png_problem(data: str | bytes) -> str | None:
    """What is wrong with a base64-encoded PNG: it cannot be read, or is blank; None when it shows something."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            seen = picture.convert("RGBA")
            paper = Image.new("RGBA", seen.size, "white")
            pixels = np.asarray(Image.alpha_composite(paper, seen).convert("L"), dtype=float)
    except (OSError, UnidentifiedImageError, binascii.Error, ValueError):
        return "cannot be read"
    # One thin line across a figure already gives a standard deviation of about 10 grey levels.
    return "is blank" if pixels.std() < 1 else None


def _kind(data: Mapping[str, Any]) -> str:
    if WIDGET_MIME in data:
        return "widget"
    if FIGURE_MIME in data or any(mime.startswith("image/") for mime in data):
        return "figure"
    return "table" if "<table" in _text(data.get("text/html", "")) else "text"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    # nbformat keeps long texts as lists of lines
    return "".join(value) if isinstance(value, list) else json.dumps(value, sort_keys=True)


def _figure_differences(stored: Mapping[str, Any], fresh: Mapping[str, Any], tolerance: float | None) -> list[str]:
    found = []
    for which, data in (("the stored figure", stored), ("the new figure", fresh)):
        if FIGURE_MIME not in data:
            found.append(f"{which} is without data: show a matplotlib figure, with course_lib.lab imported")
        if PNG not in data:
            found.append(f"{which} has data but no PNG")
        elif problem := png_problem(data[PNG]):
            found.append(f"the PNG of {which} {problem}")
    if FIGURE_MIME in stored and FIGURE_MIME in fresh:
        try:
            found += differences(stored[FIGURE_MIME], fresh[FIGURE_MIME], tolerance)
        except (KeyError, TypeError, ValueError) as error:
            found.append(f"the stored data cannot be read ({error!r}): run the notebook again")
    return found


def _display_differences(stored: Mapping[str, Any], fresh: Mapping[str, Any], tolerance: float | None) -> list[str]:
    """What differs between two displayed objects of one kind."""
    found: list[str] = []
    if any(mime == FIGURE_MIME or mime.startswith("image/") for mime in (*stored, *fresh)):
        found += _figure_differences(stored, fresh, tolerance)
    # What a widget says about itself in text is its state, and the figure beside it says what a figure's text says.
    left_out = {FIGURE_MIME, WIDGET_MIME} | ({"text/plain"} if WIDGET_MIME in stored or found else set())
    if {mime for mime in stored if mime not in left_out} != {mime for mime in fresh if mime not in left_out}:
        return found or [f"shown as {', '.join(sorted(fresh))}, stored as {', '.join(sorted(stored))}"]
    for mime in sorted(stored):  # text/html before text/plain: a table's cells have names
        if mime in left_out or mime.startswith("image/") or (mime == "text/plain" and found):
            continue
        if mime == "text/html":
            old, new = _text(stored[mime]), _text(fresh[mime])
            if html_pictures(new) and FIGURE_MIME not in fresh:
                found.append("a picture inside HTML is a picture without data: show it as a matplotlib figure")
            found += html_differences(old, new, tolerance)
        else:
            found += text_differences(_text(stored[mime]), _text(fresh[mime]), tolerance)
    return found


def _stream(outputs: Iterable[Output]) -> str:
    return "".join(_text(o["text"]) for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout")


def _displays(outputs: Iterable[Output]) -> list[Mapping[str, Any]]:
    return [o["data"] for o in outputs if o["output_type"] in ("display_data", "execute_result")]


def _errors(outputs: Iterable[Output]) -> str:
    return "\n".join(f"{o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error")


def _by_kind(displays: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for data in displays:
        kinds.setdefault(_kind(data), []).append(data)
    return kinds


def _count(n: int, kind: str) -> str:
    return f"{n or 'no'} {kind}{'' if n == 1 else 's'}"


def output_differences(
    stored: Iterable[Output], fresh: Iterable[Output], tolerance: float | None = TOLERANCE
) -> list[str]:
    """What differs between the stored and the fresh outputs of a cell; empty where they agree.

    Displayed objects are compared in their order, what is printed as one text; stderr does not count.
    """
    stored, fresh = list(stored), list(fresh)
    found = [f"error: {problem}" for problem in text_differences(_errors(stored), _errors(fresh), tolerance)]
    found += [f"printed text, {problem}" for problem in text_differences(_stream(stored), _stream(fresh), tolerance)]
    old, new = _by_kind(_displays(stored)), _by_kind(_displays(fresh))
    for kind in dict.fromkeys([*old, *new]):
        before, now = old.get(kind, []), new.get(kind, [])
        if len(before) != len(now):
            found.append(f"{_count(len(now), kind)}, stored {len(before) or 'none'}")
            continue
        for number, (a, b) in enumerate(zip(before, now, strict=True), start=1):
            name = kind if kind == "text" and len(before) == 1 else f"{kind} {number}"
            found += [f"{name}, {problem}" for problem in _display_differences(a, b, tolerance)]
    orders = [[_kind(data) for data in _displays(outputs)] for outputs in (stored, fresh)]
    if orders[0] != orders[1] and not found:
        found.append(f"shown are {', '.join(orders[1])}, stored in the order {', '.join(orders[0])}")
    return found


class LeftBehind(AssertionError):
    """A notebook's processes or temporary files are still there after its kernel has ended."""


# ---- nbval's collector and item --------------------------------------------------------------------------------------


PROCESSOR = "processor"  # the tag


class CourseCell(IPyNbCell):
    """One code cell; nbval runs it, the comparison is ours."""

    def runtest(self) -> None:
        cell = self.cell
        if "skip-execution" in cell.metadata.get("tags", []):
            pytest.skip("tagged skip-execution")
        # nbval passes a cell that was never run; its outputs would then be proven by nothing.
        if cell.source.strip() and cell.execution_count is None and self.options["check"]:
            self.raise_cell_error("The cell was never run: its outputs are not stored")
        super().runtest()

    def compare_outputs(self, test: Any, ref: Any, skip_compare: Any = None) -> bool:
        tags = self.cell.metadata.get("tags", [])
        if PROCESSOR in tags and not multiplies_bfloat16():
            return True
        try:
            found = output_differences(ref, test, cell_tolerance(tags))
        except ValueError as error:
            found = [str(error)]
        more = [f"… and {len(found) - MESSAGES} more"] if len(found) > MESSAGES else []
        self.comparison_traceback = [*found[:MESSAGES], *more]
        return not found

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> str:
        error = excinfo.value
        source = next((line for line in self.cell.source.splitlines() if line.strip()), "")
        # JupyterLab shows execution counts, and no other number of a cell.
        number = f"[{self.cell.execution_count}]" if self.cell.execution_count else f"{self.cell_num} (not run)"
        lines = [f"{self.path.name}, cell {number} that begins with: {shorten(source, 60)}"]
        if not isinstance(error, NbCellError):
            return "\n".join([*lines, f"  {type(error).__name__}: {error}"])
        if str(error) != "Cell outputs differ":
            return "\n".join([*lines, f"  {error}", str(error.inner_traceback or "").strip()])
        return "\n".join([*lines, *(f"  {line}" for line in str(error.inner_traceback).splitlines())])


class CourseNotebook(IPyNbFile):
    """One notebook; nbval's collector with our cells, our kernel and our environment."""

    def collect(self) -> Iterator[CourseCell]:
        for item in super().collect():
            yield CourseCell.from_parent(
                self, name=item.name, cell_num=item.cell_num, cell=item.cell, options=item.options
            )

    def setup(self) -> None:
        self.traces = Traces()
        with _environment(kernel_environment(os.environ) | dict(self.traces.environment)):
            super().setup()
        # nbval runs cells without history. IPython then does not see the semicolon at a cell's end, and shows a value
        # that is not shown in Jupyter.
        execute = self.kernel.kc.execute
        self.kernel.kc.execute = lambda code, **options: execute(code, **(options | {"store_history": True}))

    def teardown(self) -> None:
        # nbval would kill the kernel, which then could not clear up; a reader's Jupyter asks it to end.
        if self.kernel is not None and self.kernel.is_alive():
            self.kernel.km.shutdown_wait_time = 60.0  # it would be killed after 5 seconds: too few on a busy machine
            self.kernel.km.shutdown_kernel()
        super().teardown()
        left = self.traces.left()
        self.traces.clear()
        if left:
            raise LeftBehind(f"{self.path.name} leaves behind {'; '.join(left[:MESSAGES])}")


def kernel_environment(environ: Mapping[str, str]) -> dict[str, str | None]:
    """The variables that a validation run changes for its kernels; None removes one."""
    changes: dict[str, str | None] = {
        "COURSE_VALIDATING": "1",
        "COURSE_PROGRESS": "off",
        "COURSE_PROFILE": None,  # the stored outputs are those of the quick profile,
        "COURSE_DEVICE": environ.get("COURSE_DEVICE", "cpu"),  # on the CPU unless the user asks otherwise,
        "MPLBACKEND": None,  # shown inline
        **WITHOUT_WEIGHTS,
        "PYTHONPATH": os.pathsep.join(
            filter(None, (str(Path(__file__).parents[2]), environ.get("PYTHONPATH")))
        ),  # course_lib is found without being installed
    }
    workers = int(environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = str(max(1, cores // workers))
        changes |= {name: threads for name in _THREADS if name not in environ}
    return changes


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    _set_environment(changes)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# ---- hooks -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Iterator[None]:
    """Puts our collector in the place of nbval's: all of its own comparison is then out of the way."""
    collectors = yield
    return [  # type: ignore[return-value]
        CourseNotebook.from_parent(parent, path=file_path) if type(one) is IPyNbFile else one
        for one in collectors  # type: ignore[attr-defined]
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # pytest reads testpaths only in the root folder; without arguments, any folder of the checkout shall do the same.
    if config.args_source == pytest.Config.ArgsSource.INVOCATION_DIR:
        config.args = [str(config.rootpath / path) for path in config.getini("testpaths")]
        config.args_source = pytest.Config.ArgsSource.TESTPATHS


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first, the largest first: the last one to finish decides how long the run takes."""
    size = {path: path.stat().st_size for path in {item.path for item in items if isinstance(item, CourseCell)}}
    items.sort(key=lambda item: -size.get(item.path, -math.inf))
