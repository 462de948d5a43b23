"""The course in JupyterLab as a learner meets it: `make lab` in a terminal, a chapter run in a real browser."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pytest

from course_lib.lab.chapters import CHAPTERS
from course_lib.proving.leftovers import Traces
from tests.browser.chromium import Watched, watched

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ROOT = Path(__file__).resolve().parents[2]
FIRST, OPTIMIZERS = (ROOT / "notebooks" / CHAPTERS[number].file for number in (0, 2))

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the Makefile is for Linux and macOS"),
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed: apt-get install make"),
]

STARTING, ANSWERING = 90, 30  # seconds that a busy machine may take, for JupyterLab and for a click
RUNNING = 600  # and for all cells of a chapter, of which a quiet one needs 45

# Runs a command in a terminal of its own, which passes on what is typed: Ctrl-C arrives there as it does at a desk.
# When the tests are killed and nobody can type any more, it presses Ctrl-C itself.
TERMINAL = """
import os, pty, sys, time

def typed(keyboard):
    keys = os.read(keyboard, 1024)
    if not keys:
        time.sleep(1)
    return keys or b"\\x03"

pty.spawn(sys.argv[1:], stdin_read=typed)
"""
CTRL_C = "\x03"


# The server


@dataclass
class Lab:
    """JupyterLab, started by `make lab` in a terminal."""

    process: subprocess.Popen[str]
    log: Path
    traces: Traces
    port: int
    address: str = ""

    @property
    def said(self) -> str:
        """What the terminal shows, without colours."""
        return re.sub(r"\x1b\[[\d;]*m|\x1b\(B|\r", "", self.log.read_text(encoding="utf-8", errors="replace"))

    @property
    def base(self) -> str:
        return f"http://localhost:{self.port}/"

    def type(self, keys: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys)
        self.process.stdin.flush()

    def wait_until(self, condition: Callable[[], object], what: str, seconds: float = STARTING) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                pytest.fail(f"{what}: not within {seconds} s. The terminal shows:\n{self.said}", pytrace=False)
            time.sleep(0.05)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """Ctrl-C; when Jupyter asks whether that is meant, yes."""
        self.type(CTRL_C)
        self.wait_until(lambda: self.ended() or "(y/[n])?" in self.said, "an answer to Ctrl-C")
        if not self.ended():
            self.type("y\n")
        self.wait_until(self.ended, "the end of `make lab` after Ctrl-C")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(folder: Path, traces: Traces) -> dict[str, str]:
    """A learner's, not a test's; all that Jupyter and the course keep of a person lies in ``folder``."""
    config = folder / "jupyter" / "config" / "jupyter_server_config.json"
    config.parent.mkdir(parents=True)
    # JupyterLab copies a notebook that is opened, by default to a folder beside it
    config.write_text(json.dumps({"FileCheckpoints": {"checkpoint_dir": str(folder / "checkpoints")}}))
    others = re.compile(r"JUPYTER|IPYTHON|COURSE_|PYTEST|PYTHON|MAKE|MFLAGS|CI$")
    return {
        **{name: value for name, value in os.environ.items() if not others.match(name)},
        **traces.environment,
        "COURSE_HOME": str(folder / "course"),
        "COURSE_LEARNER": "ada",
        "IPYTHONDIR": str(folder / "ipython"),
        **{f"JUPYTER_{kind.upper()}_DIR": str(folder / "jupyter" / kind) for kind in ("config", "data", "runtime")},
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "jupyter" / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "jupyter" / "settings"),
    }


@contextmanager
def make_lab(folder: Path, **variables: object) -> Iterator[Lab]:
    """`make lab`, with some of the Makefile's ``variables`` overridden; what it keeps lies in ``folder``.

    Whatever a test leaves running has ended when the block ends.
    """
    traces, port, log = Traces(), free_port(), folder / "terminal"
    if Path(sys.prefix) != ROOT / ".venv":
        variables["BIN"] = Path(sys.executable).parent
    # -o: a test installs nothing, however old the environment's stamp
    command = ["make", "-o", ".venv/.installed", "lab", "BROWSER=no", f"PORT={port}"]
    command += [f"{name}={value}" for name, value in variables.items()]
    with (
        log.open("w") as terminal,
        subprocess.Popen(
            [sys.executable, "-c", TERMINAL, *command], cwd=ROOT, env=environment(folder, traces),
            stdin=subprocess.PIPE, stdout=terminal, stderr=subprocess.STDOUT, text=True,
        ) as process,
    ):  # fmt: skip
        lab = Lab(process, log, traces, port)
        try:
            lab.wait_until(lambda: lab.ended() or "token=" in lab.said, "the address")
            found = re.search(rf"http://localhost:{port}/lab\S*\?token=\w+", lab.said)
            assert found, f"`make lab` gives no address:\n{lab.said}"
            lab.address = found[0]
            yield lab
        finally:
            traces.clear()


# The page


def open_lab(page: Page, lab: Lab, notebook: Path) -> nbformat.NotebookNode:
    """Follow the printed address, and wait until all of ``notebook`` and its kernel are there."""
    from playwright.sync_api import expect

    # Jupyter asks a newcomer whether to show news; the question is answered where it lies over something
    page.add_locator_handler(page.get_by_role("button", name="No", exact=True), lambda button: button.click())
    page.goto(lab.address)
    read = nbformat.read(notebook, as_version=4)
    expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(read.cells), timeout=STARTING * 1000)
    idle(page, STARTING)
    return read


def idle(page: Page, seconds: float) -> None:
    """Wait until no cell runs or waits, and the kernel has nothing to do."""
    from playwright.sync_api import expect

    expect(page.locator(".jp-InputPrompt", has_text="*")).to_have_count(0, timeout=seconds * 1000)
    expect(page.locator(".jp-Notebook-ExecutionIndicator").first).to_have_attribute(
        "data-status", "idle", timeout=seconds * 1000
    )


def choose(page: Page, menu: str, entry: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=entry, exact=True).click()


@dataclass
class Chapter:
    """A chapter that is open in JupyterLab."""

    page: Page
    lab: Lab
    seen: Watched
    read: nbformat.NotebookNode
    kept: Path

    @property
    def code(self) -> list[int]:
        """The positions of the code cells."""
        return [number for number, cell in enumerate(self.read.cells) if cell.cell_type == "code"]

    def number(self, part: str) -> int:
        """The position of the one code cell that has ``part`` in its source."""
        (found,) = (number for number in self.code if part in self.read.cells[number].source)
        return found

    def cell(self, part: str | int) -> Locator:
        number = part if isinstance(part, int) else self.number(part)
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number)

    def select(self, part: str | int) -> Locator:
        cell = self.cell(part)
        cell.locator(".jp-InputPrompt").click()
        return cell

    def run(self, part: str, source: str) -> None:
        """Put ``source`` in the cell's place and run it."""
        cell = self.cell(part)
        cell.locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)
        self.page.keyboard.press("Shift+Enter")


@pytest.fixture(scope="module")
def chapter(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chapter]:
    """A copy of chapter 2, run from top to bottom by a learner who guessed at its first question."""
    from playwright.sync_api import expect

    folder = tmp_path_factory.mktemp("learner")
    served = folder / "served"
    (served / "notebooks").mkdir(parents=True)
    copy = shutil.copy(OPTIMIZERS, served / "notebooks")
    with make_lab(folder, CURDIR=served, FIRST=f"/lab/tree/notebooks/{OPTIMIZERS.name}") as lab:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        seen = watched(page, lab.base)
        opened = Chapter(page, lab, seen, open_lab(page, lab, copy), folder / "course" / "progress-ada.json")
        question = opened.number('predict("02.a"')
        opened.select(question)
        choose(page, "Run", "Run All Above Selected Cell")
        opened.select(question)
        page.keyboard.press("Shift+Enter")
        idle(page, RUNNING)
        guess(opened.cell(question))
        opened.select(question + 1)
        choose(page, "Run", "Run Selected Cell and All Below")
        # all wait in a row at once, the last one longest: without this, the wait could end before the row is there
        expect(opened.cell(opened.code[-1]).locator(".jp-InputPrompt")).to_have_text("[*]:", timeout=ANSWERING * 1000)
        idle(page, RUNNING)
        yield opened
        page.close()


def guess(cell: Locator) -> None:
    """Fill in the form under a question, and hand it in."""
    from playwright.sync_api import expect

    cell.get_by_role("radio", name="Adam", exact=True).check(timeout=ANSWERING * 1000)
    cell.get_by_role("button", name="fairly sure", exact=True).click()
    cell.get_by_role("button", name="This is my guess").click()
    expect(cell.get_by_role("status").last).to_have_text("Your guess: Adam (fairly sure).", timeout=ANSWERING * 1000)


# The tests


def test_make_lab_shows_the_first_chapter_and_ends_with_ctrl_c(browser: Browser, tmp_path: Path) -> None:
    with make_lab(tmp_path) as lab:
        assert f"http://localhost:{lab.port}/lab/tree/notebooks/{FIRST.name}" in lab.said.splitlines()[0]
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        seen = watched(page, lab.base)
        open_lab(page, lab, FIRST)
        assert page.locator(".jp-Notebook h1").first.inner_text().startswith("0 · Start here")
        assert not seen.complaints, "\n".join(seen.complaints)
        page.close()
        lab.stop()
        assert not lab.traces.left(), "left behind after Ctrl-C"
        assert "Traceback" not in lab.said, lab.said


def test_a_chapter_runs_from_top_to_bottom(chapter: Chapter) -> None:
    unwanted = ", ".join(f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in ("error", "stderr"))
    assert not chapter.page.locator(unwanted).all_text_contents()
    prompts = [chapter.cell(number).locator(".jp-InputPrompt").text_content() for number in chapter.code]
    # a cell whose source is folded away has no prompt
    folded = [chapter.read.cells[number].metadata.get("jupyter", {}).get("source_hidden") for number in chapter.code]
    assert prompts == ["" if hidden else f"[{count}]:" for count, hidden in enumerate(folded, start=1)]
    assert not chapter.seen.complaints, "\n".join(chapter.seen.complaints)


WITHOUT_FORMULAS = """parts => parts.map(part => {
    const copy = part.cloneNode(true);
    copy.querySelectorAll("code, mjx-container").forEach(other => other.remove());
    return copy.textContent;
})"""


def test_all_of_it_is_drawn(chapter: Chapter) -> None:
    """Formulas, figures and widgets are there as such, not as their source or as a message about them."""
    page = chapter.page
    pictures = page.locator(".jp-OutputArea img")
    assert pictures.count() >= 8
    assert pictures.evaluate_all("images => images.filter(image => !image.naturalWidth).length") == 0
    assert page.locator("mjx-container").count() >= 20
    # what MathJax cannot read, what it does not know, and what was not taken for a formula
    assert not page.locator("mjx-merror, mtext[mathcolor='red']").all_text_contents()
    prose = page.locator(".jp-RenderedMarkdown").evaluate_all(WITHOUT_FORMULAS)
    assert not [text for text in prose if "$" in text]
    messages = page.get_by_text(re.compile("(Loading|Error (displaying|creating)) widget|Model not found"))
    assert not messages.all_text_contents()


def test_a_guess_is_taken_and_shown_beside_the_result(chapter: Chapter) -> None:
    """The cell that answers is stored folded away, so that nobody reads the answer first; running it unfolds it."""
    result = chapter.cell('answered("02.a"').get_by_text("You guessed Adam (fairly sure). Measured:")
    result.scroll_into_view_if_needed()
    assert result.is_visible()
    kept = json.loads(chapter.kept.read_text(encoding="utf-8"))["predictions"]
    assert list(kept) == ["02.a"]
    assert kept["02.a"] | {"guess": "Adam", "sure": 0.75} == kept["02.a"]
    assert isinstance(kept["02.a"]["hit"], bool)


def test_a_question_that_was_passed_over_says_so(chapter: Chapter) -> None:
    late = chapter.cell('predict("02.b"')
    late.get_by_role("radio", name="Lion", exact=True).check()
    late.get_by_role("button", name="This is my guess").click()
    late.get_by_text("The result was there before this guess, so it is not counted.").wait_for()


def test_the_explorer_follows_its_controls(chapter: Chapter) -> None:
    cell = chapter.cell("lab.explorer(draw")
    (picture,) = cell.locator(".jp-OutputArea img").all()  # the live one, and not the stored one beside it
    rate = cell.locator(".widget-slider", has_text="learning rate")
    seen = {pixels(picture)}
    for move in (lambda: rate.get_by_role("slider").press("ArrowRight"), lambda: rate.locator(".noUi-base").click()):
        before = rate.locator(".widget-readout").inner_text()
        move()
        expect_other(chapter.page, picture, seen)
        assert rate.locator(".widget-readout").inner_text() != before
    cell.get_by_role("combobox", name="method").select_option("Adam")
    expect_other(chapter.page, picture, seen)
    assert picture.is_visible()
    assert cell.get_by_role("alert").count() == 0


def pixels(picture: Locator) -> str:
    """A fingerprint of what a picture shows."""
    read = "async image => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]"
    return hashlib.sha256(bytes(picture.evaluate(read))).hexdigest()


def expect_other(page: Page, picture: Locator, seen: set[str]) -> None:
    """Wait for a picture that was not ``seen`` yet, and remember it."""
    until = time.monotonic() + ANSWERING
    while (now := pixels(picture)) in seen:
        assert time.monotonic() < until, "the picture stays as it was"
        page.wait_for_timeout(50)
    seen.add(now)


def test_an_exercise_tells_right_from_wrong(chapter: Chapter) -> None:
    from playwright.sync_api import expect

    ask = 'check("02.1", momentum_step)'
    wrong = "def momentum_step(w, g, v, lr, beta):\n    return w - lr * v, beta * v + g"
    told = chapter.cell(ask).get_by_role("status")
    expect(told).to_contain_text("Exercise 02.1 not attempted yet")
    chapter.run(ask, f"{wrong}\n\n\n{ask}")
    expect(told).to_contain_text("Exercise 02.1 not yet right: your step uses the old v", timeout=ANSWERING * 1000)
    expect(told).to_contain_text("Hint: In which order are v and w updated?")
    chapter.run(ask, f"{solution(chapter.read, 'momentum_step')}\n\n\n{ask}")
    expect(told).to_contain_text("Exercise 02.1 passed", timeout=ANSWERING * 1000)
    assert told.is_visible()
    entry = json.loads(chapter.kept.read_text(encoding="utf-8"))["exercises"]["02.1"]
    assert entry["attempts"] == 2
    assert entry["passed"]


def solution(read: nbformat.NotebookNode, name: str) -> str:
    """The function ``name`` as the chapter prints it under "Solutions"."""
    (folded,) = [cell.source for cell in read.cells if "<b>Solutions</b>" in cell.source]
    (code,) = re.findall(r"```python\n(.*?)```", folded, flags=re.DOTALL)
    tree = ast.parse(code)
    (found,) = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name == name]
    return ast.get_source_segment(code, found) or ""
