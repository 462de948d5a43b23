"""What Sphinx does not do by itself for this site: see each file's first lines.

| file | what it makes |
| --- | --- |
| `notebooks` | nothing: it reads what the stored notebooks hold |
| `chapters` | a chapter's page out of its notebook, its solutions, pictures and frames |
| `home` | the loop and the chapters on the home page |
| `collected`, `collecting` | the pages of claims and of references |
| `studies` | the page of recorded studies |
| `api`, `sources`, `docstrings` | the reference, from the docstrings |
| `formulas` | formulas, set while building |
| `fonts` | the letters of the explorers' pictures |
| `archive` | one zip of the built site, that opens from disk |
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

from site_builder import chapters, formulas

# Before anything is painted: with a script the answers are folded, without one nothing is (course.js)
ASKS = (
    'try{var told=localStorage.getItem("craft-of-training.told")}catch(e){}'
    'if(!told)document.documentElement.classList.add("asks")'
)


def _write_chapters(app: Sphinx, config: Config) -> None:
    chapters.write(Path(app.srcdir))


def _level_of_captions(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """The navigation's captions are headings to a screen reader, and a heading must say of which level."""
    if tree := context.get("furo_navigation_tree"):
        context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the parts."""
    app.connect("config-inited", _write_chapters)
    app.add_js_file(None, body=ASKS, priority=1)
    app.connect("html-page-context", _level_of_captions, priority=900)  # after the theme made the tree
    formulas.setup(app)
    for part in ("home", "collected", "api"):
        importlib.import_module(f"site_builder.{part}").setup(app)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
