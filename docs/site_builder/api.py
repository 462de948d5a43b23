"""The reference of ``course_lib``, made from its docstrings: which pages there are, and what stands on them.

Before Sphinx reads anything, a page for each module is written into ``docs/api/``: each technique that exists, and
each file of the laboratory but those that only the laboratory itself has use for. What is new in the package appears by
itself. `sources` says what is exported, and how; `docstrings` turns into Sphinx's text what was written to be read in
code. A page is written only if it changed, and read again only if it or its module did.

A module that cannot be imported ends the build.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from course_lib.lab.chapters import CHAPTERS, MODULES, Chapter, written
from site_builder import docstrings, sources
from site_builder.chapters import bring_up_to_date
from site_builder.notebooks import ROOT
from site_builder.sources import Entry, Index

INNER = frozenset({"checkpoints", "doors", "prediction_widgets", "progress_file", "reset"})
"""Files of the laboratory that only the laboratory has use for."""

WIDTH = 88
NOTE = ".. Made of docstrings by site_builder: what is written here is lost"


@lru_cache(maxsize=1)
def index_of(package: Path = ROOT / "course_lib", techniques: tuple[str, ...] = MODULES) -> Index:
    """What there is to document."""
    return Index(package, techniques, "lab", INNER)


# --- Pages ------------------------------------------------------------------------------------------------------------


def pages(index: Index, chapters: Mapping[str, Chapter], shown: set[int]) -> dict[str, str]:
    """All generated files by their names: the pages, and the lists of modules that ``api.md`` takes in.

    A technique that is a package has a page, and one more for each of its files; everything else has one. ``chapters``
    are those of the techniques; ``shown`` the numbers of those that have a page of their own.
    """
    found: dict[str, str] = {}
    groups: dict[str, list[str]] = {"techniques": [], "laboratory": [], "authors": []}
    for module in index.modules:
        where = _chapter(index, module, chapters, shown)
        groups[_group(index, module)].append(module)
        found[f"{short(index, module)}.rst"] = page(index, module, where)
        for file in pages_below(index, module):
            found[f"{short(index, file)}.rst"] = page_below(index, module, file, where)
    for name, modules in groups.items():
        found[f"{name}.txt"] = contents(index, modules, chapters)
    return found


def short(index: Index, module: str) -> str:
    """A module's name without that of the package: ``pruning``, ``lab.training``."""
    return module.removeprefix(f"{index.package}.")


def _group(index: Index, module: str) -> str:
    if not module.startswith(f"{index.laboratory}."):
        return "techniques"
    laboratory = index.sources.get(index.laboratory)
    name = module.rpartition(".")[2]
    paths = [entry.path.rpartition(".")[0] for home in index.files_of(module) for entry in index.entries_of(home)]
    return "laboratory" if index.laboratory in paths or (laboratory and name in laboratory.exported) else "authors"


def contents(index: Index, modules: list[str], chapters: Mapping[str, Chapter]) -> str:
    """A list of modules with a line for each, in Markdown, and the hidden table of contents that makes them pages."""
    lines = []
    for module in modules:
        chapter = chapters.get(short(index, module))
        where = f" (chapter {chapter.number})" if chapter else ""
        line = re.sub(":math:`([^`]+)`", r"$\1$", re.sub("``([^`]+)``", r"`\1`", _line(index, module)))
        lines.append(f"- [`{short(index, module)}`](/api/{short(index, module)}.rst){where} – {line}")
    names = [f"{short(index, module)} </api/{short(index, module)}>" for module in modules]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *names, "```", ""])


def _line(index: Index, module: str) -> str:
    """What a module is about: the first sentence of its docstring, without the module's name if it begins with that."""
    text = " ".join(index.sources[module].docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[^.])\.(?: |$)", text)[0]
    head, colon, rest = sentence.partition(": ")
    if colon and head.lower() == _section(module).lower():
        sentence = rest[:1].upper() + rest[1:]
    return sentence


def _chapter(index: Index, module: str, chapters: Mapping[str, Chapter], shown: set[int]) -> str:
    """The chapter that a technique belongs to, in words that lead there; empty for the laboratory."""
    chapter = chapters.get(short(index, module))
    if chapter is None:
        return ""
    name = f"chapter {chapter.number}, {chapter.title.lower()}"
    return f":doc:`{name} </chapters/{chapter.nn}_{chapter.name}>`" if chapter.number in shown else name


def pages_below(index: Index, module: str) -> list[str]:
    """The files of a technique that have pages of their own: those with a public name."""
    if _group(index, module) != "techniques":
        return []
    return [file for file in _in_order(index, module) if not file.rpartition(".")[2].startswith("_")]


def page(index: Index, module: str, chapter: str) -> str:
    """The page of a module: what it is, a section for each of its files without a page, and what is on other pages."""
    below = pages_below(index, module)
    parts = [_heading(short(index, module), "=")]
    parts += [f"The methods of {chapter}."] * bool(chapter)
    parts += [_imports(index, module), _described(index, module)]
    parts += [_documented(index, entry) for entry in index.entries_of(module)]
    for file in _in_order(index, module):
        if file not in below:
            parts += [_heading(_section(file), "-"), _described(index, file)]
            parts += [_documented(index, entry) for entry in index.entries_of(file)]
    if below:
        parts.append(_heading("Its files", "-"))
        parts.append("\n".join(f"- :doc:`{short(index, file)}` – {_plain_line(index, file)}" for file in below))
        names = [f"   {_section(file)} <{short(index, file)}>" for file in below]
        parts.append("\n".join([".. toctree::", "   :hidden:", "", *names]))
    if others := _from_elsewhere(index, module):
        listed = ", ".join(entry.role for entry in others)
        parts += [_heading("From elsewhere", "-"), f"Also exported here: {listed}."]
    return "\n\n".join([NOTE, *parts]) + "\n"


def page_below(index: Index, module: str, file: str, chapter: str) -> str:
    """The page of one file of a technique."""
    whole = f":doc:`{short(index, module)}`"
    parts = [NOTE, _heading(short(index, file), "="), f"Part of {whole}, the methods of {chapter or 'a chapter'}."]
    parts += [_imports(index, module), _described(index, file)]
    parts += [_documented(index, entry) for entry in index.entries_of(file)]
    return "\n\n".join(parts) + "\n"


def _plain_line(index: Index, file: str) -> str:
    return docstrings.with_links(_line(index, file), linker(index, file))


def _described(index: Index, file: str) -> str:
    """The docstring of a file."""
    return f".. automodule:: {file}" + "\n   :no-index:" * index.is_shadowed(file)


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"


def _section(file: str) -> str:
    return file.rpartition(".")[2].strip("_").replace("_", " ").capitalize()


def _in_order(index: Index, module: str) -> list[str]:
    """The files of a module that have something to say, in the order in which its table names them."""
    text = index.sources[module].docstring
    files = [file for file in index.files_of(module) if file != module and index.entries_of(file)]

    def first(file: str) -> int:
        names = [re.escape(file.rpartition(".")[2]), *(re.escape(entry.name) for entry in index.entries_of(file))]
        head = re.search(rf"^\*[^*\n]*\b{names[0]}\b[^*\n]*\*", text, re.MULTILINE)
        found = head or re.search(rf"^``(?:{'|'.join(names)})\b|^(?:{'|'.join(names)})\b", text, re.MULTILINE)
        return found.start() if found else len(text)

    return sorted(files, key=first)


def _imports(index: Index, module: str) -> str:
    """How it is imported, as code."""
    if not module.startswith(f"{index.laboratory}."):
        lines = [f"from {index.package} import {short(index, module)}"]
    else:
        names: dict[str, list[str]] = {}
        for file in index.files_of(module):
            for entry in index.entries_of(file):
                names.setdefault(entry.path.rpartition(".")[0], []).append(entry.name)
        if index.laboratory not in names and module in names:
            lines = [f"from {index.laboratory} import {module.rpartition('.')[2]}"]
        else:
            lines = [line for home in sorted(names) for line in _import_line(home, sorted(names[home], key=_as_sorted))]
    return "\n".join([".. code-block:: python", "", *(f"   {line}" for line in lines)])


def _as_sorted(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def _import_line(home: str, names: list[str]) -> list[str]:
    line = f"from {home} import {', '.join(names)}"
    if len(line) <= WIDTH - 8:
        return [line]
    return [
        f"from {home} import (",
        *textwrap.wrap(", ".join(names) + ",", WIDTH - 12, initial_indent="    ", subsequent_indent="    "),
        ")",
    ]


def _documented(index: Index, entry: Entry) -> str:
    """The directive that makes an entry."""
    if entry.kind in ("function", "class", "exception"):
        lines = [f".. auto{entry.kind}:: {entry.path}"]
        if isinstance(entry.node, ast.ClassDef):
            lines += ["   :members:", "   :special-members: __call__"]
            lines += ["   :show-inheritance:"] * any(_tells(index, entry, base) for base in entry.node.bases)
        return "\n".join(lines)
    module = entry.path.rpartition(".")[0]
    lines = [f".. py:{entry.kind}:: {entry.name}", f"   :module: {module}"]
    stands_for = sources.alias(index, entry)
    if entry.kind == "type":
        lines.append(f"   :canonical: {stands_for}")
    elif _is_plain(stands_for):
        lines.append(f"   :value: {stands_for}")
    text = index.sources[entry.home].documentation_of(entry.name)
    body = docstrings.converted(_dedented(text), linker(index, entry.home, entry.name), frozenset({entry.name}))
    return "\n".join([*lines, "", *(f"   {line}".rstrip() for line in body if text)]).rstrip()


def _tells(index: Index, entry: Entry, base: ast.expr) -> bool:
    """Whether a base class says something to a reader: it has an entry, or is of another package, and no mere form."""
    name = ast.unparse(base)
    if origin := index.origin(entry.home, name):
        return index.entry(*origin) is not None
    return re.match(r"(typing\.)?(Protocol|Generic|NamedTuple|ABC|Exception)\b", name) is None


def _is_plain(value: str) -> bool:
    """Whether a constant's value can be shown: short, and no names to be looked up."""
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return False
    return len(value) <= WIDTH


def _dedented(text: str) -> list[str]:
    return inspect.cleandoc(text).splitlines()


def _from_elsewhere(index: Index, module: str) -> list[Entry]:
    """What a module exports that has its entry on another page."""
    files = index.files_of(module)
    origins = [index.origin(module, name) for name in index.sources[module].exported]
    found = [index.entry(*origin) for origin in origins if origin and origin[0] not in files]
    return [entry for entry in found if entry]


# --- What Sphinx asks while it reads ----------------------------------------------------------------------------------


def linker(index: Index, module: str, within: str = "") -> docstrings.Link:
    """What names stand for in the docstring of ``within``, a thing in a module."""
    return lambda name: index.link(name, module, within)


def _home(obj: Any) -> tuple[str, str]:
    """The file in which an object is written, and its name there."""
    obj = obj.fget if isinstance(obj, property) else getattr(obj, "__func__", obj)
    obj = getattr(obj, "func", obj) if not hasattr(obj, "__qualname__") else obj  # a cached property
    return str(getattr(obj, "__module__", "") or ""), str(getattr(obj, "__qualname__", ""))


def _convert(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    index = index_of()
    if what == "module":
        module, within = name, ""
    else:  # the value of an attribute does not say where it is written
        module, within = index.home(name) if what in ("attribute", "data") else _home(obj)
    for maker in (docstrings, sources):
        app.env.note_dependency(str(maker.__file__))  # a page is read again, too, when what makes it has changed
    if module in index.sources:
        quiet = sources.parameters(index, module, within) if within else frozenset[str]()
        lines[:] = docstrings.converted(lines, linker(index, module, within), quiet)


def _sign(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str | None, result: str
) -> tuple[str, str] | None:
    index = index_of()
    module, within = _home(obj)
    if what in ("function", "class", "exception", "method") and module in index.sources and arguments is not None:
        return sources.signature(index, module, within)
    return None


def _skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """The fields of a named tuple say nothing that its signature does not."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _show_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list[Any]) -> None:
    """Bases that have an entry, or are somebody else's."""
    index = index_of()
    homes = [(base, *_home(base)) for base in bases]
    bases[:] = [base for base, module, within in homes if module not in index.sources or index.entry(module, within)]


def _as_imported(app: Sphinx, domain: str, objtype: str, content: addnodes.desc_content) -> None:
    """Signatures show how a name is written once it is imported: ``pruning.shrink``, ``fit``, ``plotting.curves``."""
    index = index_of()
    for signature in content.parent.findall(addnodes.desc_signature):
        for prefix in signature.findall(addnodes.desc_addname):
            text = prefix.astext()
            for start in (f"{index.laboratory}.", f"{index.package}."):
                if text.startswith(start):
                    prefix.clear()
                    prefix += nodes.Text(text.removeprefix(start))
                    break
        signature["ids"] += [name for name in _other_names(signature) if name not in signature["ids"]]


def _module_of(module: str, within: str) -> str:
    """The module that a name of ``module`` comes from; a plain value, such as a number, comes from where it stands."""
    found: Any = importlib.import_module(module)
    for name in within.split("."):
        found = getattr(found, name, None)
    home = str(getattr(found, "__module__", None) or module)
    return module if home == "builtins" else home


def _follow(app: Sphinx, module: str, within: str) -> str:
    return _module_of(module, within)


def _other_names(signature: addnodes.desc_signature) -> list[str]:
    """Under which names a listing of source code may link back: that of the file, and of the packages above it."""
    module, within = signature.get("module"), signature.get("fullname")
    if not module or not within:
        return []
    parts = _module_of(module, within).split(".")
    return [".".join([*parts[:length], within]) for length in range(len(parts), 1, -1)]


def _write(app: Sphinx) -> None:
    index_of.cache_clear()
    index = index_of()
    for module in index.modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ExtensionError(f"{module} cannot be imported, so it has no page in the reference: {error}") from error
    write(Path(app.srcdir) / "api", index)


def write(folder: Path, index: Index) -> None:
    """Bring the generated pages up to date; those of modules that are gone are removed."""
    chapters = {chapter.module: chapter for chapter in CHAPTERS if chapter.module}
    found = pages(index, chapters, written(ROOT))
    bring_up_to_date([folder], {folder / name: text.encode() for name, text in found.items()})


def _style(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if pagename == "api" or pagename.startswith("api/"):
        app.add_css_file("api.css")


def setup(app: Sphinx) -> None:
    """Connect the parts."""
    app.setup_extension("sphinx.ext.viewcode")
    app.connect("builder-inited", _write)
    app.connect("autodoc-process-docstring", _convert)
    app.connect("autodoc-process-signature", _sign)
    app.connect("autodoc-skip-member", _skip)
    app.connect("autodoc-process-bases", _show_bases)
    app.connect("object-description-transform", _as_imported)
    app.connect("viewcode-follow-imported", _follow)
    app.connect("html-page-context", _style)
