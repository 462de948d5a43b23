"""Builds the site for tests: by `make docs`'s own command, and once for all workers of a run."""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
MADE = ROOT / "docs" / "_build"


def command() -> list[str]:
    """What `make docs` runs, by this interpreter."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    recipe = next(line for number, line in enumerate(lines) if lines[number - 1].startswith("docs: "))
    stands_for = {"$(BIN)/python": sys.executable, "$(SITE)": "docs/_build/html"}
    words = [stands_for.get(word, word) for word in recipe.split()]
    assert words[1:3] == ["-m", "sphinx"], f"`make docs` runs something else: {recipe}"
    return words


@lru_cache(maxsize=1)
def built() -> Path:
    """The folder of the site, up to date."""
    run, built_for = os.environ.get("PYTEST_XDIST_TESTRUNUID", ""), MADE / "built_for"
    MADE.mkdir(exist_ok=True)
    with FileLock(MADE / "lock"):
        if not (run and built_for.is_file() and built_for.read_text(encoding="utf-8") == run):
            build()
            built_for.write_text(run, encoding="utf-8")
    return MADE / "html"


def build() -> None:
    """Bring the site up to date; a build with a warning is a failure that shows it."""
    done = subprocess.run(command(), cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        pytest.fail(f"the site does not build cleanly:\n{done.stdout}{done.stderr}", pytrace=False)
