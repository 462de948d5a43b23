"""What the collecting pages (`collected`, `studies`) are made with: HTML of ours, directives that know their files.

Their lists and tables are HTML of ours, since their structure (captions, scopes, folds, what the filter needs) is none
that docutils has. An address in it is ``page:NAME#anchor`` until the page is written, and is checked then.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docutils import nodes
from markdown_it import MarkdownIt
from nbformat import NotebookNode
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from course_lib.lab.chapters import Chapter
from course_lib.lab.studies import study_file
from site_builder import notebooks
from site_builder.notebooks import plain

SCRIPT, STYLE = "filter.js", "collected.css"
CODE = '<code class="literal">'
_ADDRESS = re.compile(r'href="page:(?P<page>[^"#]*)(?:#(?P<anchor>[^"]*))?"')
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "typographer": True}).enable(["smartquotes", "replacements"])

logger = logging.getLogger(__name__)


class collected(nodes.raw):  # noqa: N801  (docutils finds the visitor by the name of the class)
    """HTML of ours; as raw HTML the search reads it, and other writers leave it out."""


def escaped(fragment: str) -> str:
    """Text or HTML as plain words that may stand in HTML; what stands between backquotes as code."""
    return re.sub(r"`([^`]+)`", rf"{CODE}\1</code>", html.escape(plain(fragment), quote=True))


def markdown(text: str, *, block: bool = False) -> str:
    """Markdown as HTML: a line of it, or paragraphs."""
    made = _MARKDOWN.render(text) if block else _MARKDOWN.renderInline(text)
    return str(made).replace("<code>", CODE)


def page_of(chapter: Chapter) -> str:
    """The name of a chapter's page."""
    return f"chapters/{Path(chapter.file).stem}"


def link(chapter: Chapter, words: str, anchor: str = "") -> str:
    """A link to a chapter's page; ``words`` are HTML."""
    place = f"#{html.escape(anchor)}" if anchor else ""
    return f'<a href="page:{page_of(chapter)}{place}">{words}</a>'


def scrolls(label: str, content: str) -> str:
    """What may be wider than a phone, in a box that scrolls by itself and can be reached by keyboard."""
    return f'<div class="scrolls" tabindex="0" role="region" aria-label="{html.escape(label)}">{content}</div>'


def named(chapter: Chapter) -> str:
    """Number and title, as HTML."""
    return f"{chapter.number} · {html.escape(chapter.title)}"


def notebook_of(chapter: Chapter) -> NotebookNode:
    """A chapter's notebook, where the course lies (which tests change)."""
    return notebooks.stored(chapter, notebooks.ROOT)


class Collecting(SphinxDirective):
    """A directive that is made of files, on whose change its page is read again."""

    def made_of(self, files: Iterable[Path]) -> None:
        """Read this page again when one of the files changes."""
        for file in files:
            self.env.note_dependency(str(file))

    def chapters(self) -> list[Chapter]:
        """The chapters that are there; the page is read again when their notebooks change, come or go."""
        found = notebooks.chapters(notebooks.ROOT)
        self.made_of(notebooks.path_of(chapter, notebooks.ROOT) for chapter in found)
        self.env.metadata[self.env.docname]["collected_from"] = there()
        return found

    def html(self, content: str) -> collected:
        """HTML of ours."""
        node = collected("", content, format="html")
        self.set_source_info(node)
        return node

    def section(self, name: str, title: str, *children: nodes.Node) -> nodes.section:
        """A section with an anchor of ours."""
        node = nodes.section("", nodes.title(title, title), *children, ids=[name], names=[name])
        self.state.document.note_explicit_target(node)
        return node


def there() -> str:
    """The chapters and the studies that are there."""
    found = notebooks.chapters(notebooks.ROOT)
    studies = [study_file(chapter.nn) for chapter in found]
    return " ".join([chapter.nn for chapter in found] + [file.name for file in studies if file.is_file()])


def outdated(app: Sphinx, env: BuildEnvironment, *_: set[str]) -> list[str]:
    """The pages that were made of other chapters or studies than are there now."""
    now = there()
    return [page for page, known in env.metadata.items() if known.get("collected_from", now) != now]


def visit(translator: Any, node: collected) -> None:
    """Write the HTML, with addresses that are right from the page that is written."""
    builder = translator.builder

    def address(match: re.Match[str]) -> str:
        page, anchor = html.unescape(match["page"]), html.unescape(match["anchor"] or "")
        if page not in builder.env.found_docs:
            logger.warning("no page %r to link to", page, location=node)
        elif not reachable(builder.env, page, anchor):
            logger.warning("no section %r on the page %r to link to", anchor, page, location=node)
        target = builder.get_relative_uri(builder.current_docname, page) + (f"#{anchor}" if anchor else "")
        return f'href="{html.escape(target)}"'

    translator.body.append(_ADDRESS.sub(address, node.astext()))
    raise nodes.SkipNode


def reachable(env: BuildEnvironment, page: str, anchor: str) -> bool:
    """Whether a page has an anchor; those of claims, which are made as HTML, are taken on trust."""
    slugs = env.metadata.get(page, {}).get("myst_slugs")
    return not anchor or anchor.startswith("claim-") or slugs is None or anchor in slugs


def add_files(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """The script and the style, on the pages that need them."""
    if doctree is None:
        return
    ours = [node.astext() for node in doctree.findall(collected)]
    if ours or any(doctree.findall(addnodes.glossary)):
        app.add_css_file(STYLE)
    if any("data-filter=" in content for content in ours):
        app.add_js_file(SCRIPT, loading_method="defer")
