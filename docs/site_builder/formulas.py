"""Formulas are set when the site is built: KaTeX runs here, and a page holds HTML for the eye and MathML for the ear.

So a page needs neither a script nor another host to show a formula, and a formula that KaTeX does not understand stops
the build. KaTeX (MIT, version in the first lines of its style sheet) lies beside this file; its style sheet and fonts
are in ``_static/katex``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import quickjs
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _render() -> Any:
    context = quickjs.Context()
    context.eval("var self = this;")  # the name under which a script without a module system finds its globals
    context.eval((Path(__file__).parent / "katex.min.js").read_text(encoding="utf-8"))
    options = "{displayMode: display, throwOnError: true, strict: 'ignore'}"
    return context.eval(f"(function (formula, display) {{ return katex.renderToString(formula, {options}); }})")


@lru_cache(maxsize=4096)
def typeset(formula: str, display: bool) -> str:
    """A formula in TeX as HTML with MathML.

    Raises
    ------
    ValueError : KaTeX does not understand it; the message says why.
    """
    try:
        return str(_render()(formula, display))
    except quickjs.JSException as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"formula={formula!r}: {reason}") from None


def _visit(self: Any, node: nodes.Element, display: bool) -> None:
    try:
        shown = typeset(node.astext(), display)
    except ValueError as error:
        log.warning(str(error), location=node)
        raise nodes.SkipNode from None
    self.body.append(
        f'<div class="math scrolls" tabindex="0" role="region" aria-label="Formula">{shown}</div>' if display else shown
    )
    raise nodes.SkipNode


def _visit_inline(self: Any, node: nodes.Element) -> None:
    _visit(self, node, display=False)


def _visit_block(self: Any, node: nodes.Element) -> None:
    _visit(self, node, display=True)


def setup(app: Sphinx) -> None:
    """Register KaTeX as the renderer of formulas."""
    app.add_html_math_renderer("katex", (_visit_inline, None), (_visit_block, None))
