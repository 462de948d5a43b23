"""What the package's sources say, read without importing them: who exports what, and how signatures are written.

| name | what it is |
| --- | --- |
| `Index` | the files of a package, what each defines and imports, and which of it has an entry in the reference |
| `Entry` | one thing that is documented: where it is written, and how it is imported |
| `Index.link` | what a name in a docstring stands for |
| `signature` | a function's or a class's signature in the words of its source |

A signature is taken from the source because there it is short: ``objective: Objective``, where the interpreter knows
only what the alias stands for. Aliases that are documented keep their names, others are spelt out.
"""

from __future__ import annotations

import ast
import builtins
import copy
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign

HIDDEN = ("checks", "proving", "studies")
"""Parts of the package that are for who writes a chapter, and are read in their source."""


@dataclass(frozen=True)
class Entry:
    """Something documented: written in ``home``, imported as ``path``; ``kind`` as in Sphinx's directives."""

    name: str
    home: str
    path: str
    kind: str
    node: Definition = field(compare=False, repr=False)

    @property
    def role(self) -> str:
        """A role that leads to it and shows its name."""
        return f":py:obj:`{self.name} <{self.path}>`"


@dataclass
class Source:
    """One file of a package."""

    name: str
    path: Path
    tree: ast.Module = field(repr=False)

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def docstring(self) -> str:
        return ast.get_docstring(self.tree) or ""

    @cached_property
    def definitions(self) -> dict[str, Definition]:
        """What it defines at its top, by name and in order."""
        found: dict[str, Definition] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign | ast.AnnAssign) and (name := _target(node)):
                found.setdefault(name, node)
        return found

    @cached_property
    def imports(self) -> dict[str, str]:
        """What its names stand for that it imports, in full."""
        found: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                for alias in node.names:  # without "as", the first part alone becomes a name
                    root = alias.name.partition(".")[0]
                    found |= {alias.asname: alias.name} if alias.asname else {root: root}
        return found

    @cached_property
    def exported(self) -> list[str]:
        """Its ``__all__``; without one, in a file that is no package, what has a public name and says what it is."""
        node = self.definitions.get("__all__")
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            return [str(name) for name in ast.literal_eval(node.value)]
        if self.is_package:
            return []
        return [name for name in self.definitions if not name.startswith("_") and self.documentation_of(name)]

    def documentation_of(self, name: str) -> str:
        """The docstring of a definition, that of an alias or a constant being the text below it."""
        node = self.definitions[name]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            return ast.get_docstring(node) or ""
        after = self.tree.body.index(node) + 1
        below = self.tree.body[after] if after < len(self.tree.body) else None
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else None
        return text if isinstance(text, str) else ""


def _target(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


class Index:
    """The files of a package, and what of them is documented.

    ``laboratory`` is the part whose files are shown one by one: there, names that the laboratory itself exports come
    first, and of a file that it takes names from, no others than these and the classes that they speak of.
    """

    def __init__(self, package: Path, techniques: tuple[str, ...], laboratory: str, inner: frozenset[str]) -> None:
        self.package, self.techniques, self.laboratory = package.name, techniques, f"{package.name}.{laboratory}"
        self.inner = inner
        self.sources = dict(_sources(package))
        self._of_module: dict[str, dict[str, Entry]] = {}
        for module in self.modules:
            for found in self._documented(module):
                self._of_module.setdefault(found.home, {})[found.name] = found

    @cached_property
    def modules(self) -> list[str]:
        """What there is: the techniques that exist, then the laboratory's files."""
        there = [name for name in (f"{self.package}.{t}" for t in self.techniques) if name in self.sources]
        prefix = f"{self.laboratory}."
        files = [name for name in self.sources if name.startswith(prefix) and "." not in name.removeprefix(prefix)]
        return there + [name for name in files if not self.is_inner(name)]

    def is_inner(self, module: str) -> bool:
        """Whether a file of the laboratory is of no use but to the laboratory."""
        name = module.rpartition(".")[2]
        return name in self.inner or name.startswith("_")

    def files_of(self, module: str) -> list[str]:
        """A module itself, and the files below it."""
        return [name for name in self.sources if name == module or name.startswith(f"{module}.")]

    def entries_of(self, file: str) -> list[Entry]:
        """What is documented of a file, in its order."""
        order = list(self.sources[file].definitions)
        return sorted(self._of_module.get(file, {}).values(), key=lambda entry: order.index(entry.name))

    def entry(self, home: str, name: str) -> Entry | None:
        """The entry of what is written as ``name`` in the file ``home``."""
        return self._of_module.get(home, {}).get(name)

    def home(self, path: str) -> tuple[str, str]:
        """The file of what is imported as ``path``, or is a member of that, and its name there; empty if unknown."""
        for entries in self._of_module.values():
            for found in entries.values():
                if path == found.path or path.startswith(f"{found.path}."):
                    return found.home, found.name + path.removeprefix(found.path)
        return "", ""

    def origin(self, module: str, name: str) -> tuple[str, str] | None:
        """The file and the name in it of what a module knows as ``name``; None if the package does not define it."""
        for _ in range(10):  # from one package's names to the next
            source = self.sources.get(module)
            if source is None:
                return None
            if name in source.definitions:
                return module, name
            full = source.imports.get(name, "")
            if not full.startswith(f"{self.package}."):
                return None
            module, _, name = full.rpartition(".")
        return None

    def _documented(self, module: str) -> Iterator[Entry]:
        """What of a module has an entry: what it exports, or the laboratory does, and classes and errors that this
        speaks of."""
        wanted = self._exports(module)
        queue = list(wanted)
        for home, name in queue:
            for mentioned in self._mentioned(home, name):
                if mentioned not in wanted and mentioned[0] in self.files_of(module):
                    wanted[mentioned] = f"{mentioned[0]}.{mentioned[1]}"
                    queue.append(mentioned)
        for (home, name), path in wanted.items():
            node = self.sources[home].definitions[name]
            yield Entry(name, home, path, kind_of(node, name), node)

    def _exports(self, module: str) -> dict[tuple[str, str], str]:
        """Home and name of what is exported, and the path by which it is imported: the shortest there is."""
        found: dict[tuple[str, str], str] = {}
        files = self.files_of(module)

        def take(exporter: str) -> None:
            for name in self.sources[exporter].exported:
                if (origin := self.origin(exporter, name)) and origin[0] in files:
                    found.setdefault(origin, f"{exporter}.{name}")

        if module.startswith(f"{self.laboratory}.") and self.laboratory in self.sources:
            take(self.laboratory)
        if not found or self.sources[module].is_package:
            take(module)
        return found

    def _mentioned(self, home: str, name: str) -> Iterator[tuple[str, str]]:
        """Classes and documented aliases in the annotations, bases and ``Raises`` of a definition."""
        node = self.sources[home].definitions[name]
        words: set[str] = set()
        for part in _public_parts(node):
            for annotation in _annotations(part):
                words |= set(re.findall(r"\w+", ast.unparse(annotation)))
            if isinstance(part, ast.FunctionDef | ast.ClassDef):
                text = ast.get_docstring(part) or ""
                raises = re.search(r"^Raises\n-+\n(.*)", text, re.DOTALL | re.MULTILINE)
                words |= set(re.findall(r"^(\w+)", raises[1], re.MULTILINE)) if raises else set()
        for word in sorted(words):
            if (origin := self.origin(home, word)) and not origin[1].startswith("_"):
                target = self.sources[origin[0]].definitions[origin[1]]
                if isinstance(target, ast.ClassDef) or (
                    kind_of(target, origin[1]) == "type" and self.sources[origin[0]].documentation_of(origin[1])
                ):
                    yield origin

    # --- Names in docstrings ---

    def link(self, name: str, module: str, within: str = "") -> str | None:
        """The role for what ``name`` stands for in a docstring of ``module``, of the object ``within`` it.

        Looked for, in this order: a member of the class, in the file, among what the file imports, in its package,
        in the laboratory, a file and a name in it.
        """
        call = "()" if name.endswith("()") else ""
        name = name.removesuffix("()")
        if within and (member := self._member(name, module, within)):
            return f":py:obj:`{name}{call} <{member}>`"
        package = ".".join(module.split(".")[:2])
        if "." not in name:
            for place in (module, *self._packages(module), self.laboratory):
                if (origin := self.origin(place, name)) and (found := self.entry(*origin)):
                    return f":py:obj:`{name}{call} <{found.path}>`" if found.name != within else None
            if name[:1].isupper() and len(same := [of[name] for of in self._of_module.values() if name in of]) == 1:
                return same[0].role  # a class, an error above all, of which there is no other
            # ``data`` is an argument more often than a file of the laboratory
            return None if package == self.laboratory else self._module_role(name, (package,))
        head, _, last = name.removeprefix(f"{self.package}.").rpartition(".")
        for place in (f"{package}.{head}", f"{self.package}.{head}", f"{self.laboratory}.{head}"):
            if (origin := self.origin(place, last)) and (found := self.entry(*origin)):
                return f":py:obj:`{name}{call} <{found.path}>`"
        for place in (module, *self._packages(module)):  # a class and its member
            origin = self.origin(place, head.partition(".")[0]) if head else None
            if origin and (found := self.entry(*origin)) and (member := self._member(last, origin[0], found.name)):
                return f":py:obj:`{name}{call} <{member}>`"
        return self._module_role(name, (package, self.laboratory, self.package))

    def _packages(self, module: str) -> list[str]:
        """The packages around a module, without the whole."""
        parts = module.split(".")
        return [".".join(parts[:k]) for k in range(len(parts) - 1, 1, -1)]

    def _module_role(self, name: str, places: tuple[str, ...]) -> str | None:
        full = name if name in self.sources else ""
        for place in places:
            full = full or (f"{place}.{name}" if f"{place}.{name}" in self.sources else "")
        return f":py:mod:`{name} <{full}>`" if full and self.has_place(full) and not self.is_shadowed(full) else None

    def has_place(self, file: str) -> bool:
        """Whether a file has a page or a section."""
        return file in self.modules or bool(self.entries_of(file))

    def is_shadowed(self, file: str) -> bool:
        """Whether its package exports something of the file's own name, as `schedules.range_test`."""
        package, _, name = file.rpartition(".")
        return (
            package in self.sources
            and name in self.sources[package].exported
            and name in self.sources[file].definitions
        )

    def _member(self, name: str, module: str, within: str) -> str | None:
        """The path of a documented member of the class around, or that is, the object ``within``."""
        found = self.entry(module, within.partition(".")[0])
        if found is None or not isinstance(found.node, ast.ClassDef) or name.startswith("_"):
            return None
        for node in found.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == name and ast.get_docstring(node):
                return f"{found.path}.{name}" if within != f"{found.name}.{name}" else None
        return None


def _sources(package: Path) -> Iterator[tuple[str, Source]]:
    """All files of a package but the hidden ones, by their dotted names, in the order of these."""
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        if parts[1] in HIDDEN:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, Source(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path)))


def kind_of(node: Definition, name: str) -> str:
    """What a definition is to a reader: ``function``, ``class``, ``exception``, ``type`` (an alias) or ``data``."""
    if isinstance(node, ast.FunctionDef):
        return "function"
    if isinstance(node, ast.ClassDef):
        names = [ast.unparse(base) for base in node.bases]
        return "exception" if any(re.search(r"(Error|Exception)$", base) for base in names) else "class"
    return "type" if re.fullmatch(r"[A-Z][a-z]\w*", name) and not isinstance(node.value, ast.Call) else "data"


def _public_parts(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if isinstance(node, ast.ClassDef):
        for part in node.body:
            if not isinstance(part, ast.FunctionDef) or not part.name.startswith("_") or part.name == "__init__":
                yield part


def _annotations(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        for argument in (
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ):
            if argument and argument.annotation:
                yield argument.annotation
        if node.returns:
            yield node.returns
    elif isinstance(node, ast.AnnAssign):
        yield node.annotation
    elif isinstance(node, ast.ClassDef):
        yield from node.bases
    elif isinstance(node, ast.Assign):
        yield node.value


# --- Signatures -------------------------------------------------------------------------------------------------------


def signature(index: Index, module: str, qualified: str) -> tuple[str, str] | None:
    """Arguments and result of what is ``qualified`` in a module, as in its source; None if that does not say."""
    found = _node(index, module, qualified)
    if isinstance(found, ast.FunctionDef):
        bound = "." in qualified and not _decorated(found, "staticmethod")
        return _of_function(index, module, found, bound), _spelt(index, module, found.returns)
    if isinstance(found, ast.ClassDef):
        if _decorated(found, "dataclass") or "NamedTuple" in map(ast.unparse, found.bases):
            return _of_dataclass(index, module, found), ""
        for home, cls in _lineage(index, module, found):
            for node in cls.body:
                if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    return _of_function(index, home, node, bound=True), ""
        return "", ""  # made by something else, or not at all
    return None


def parameters(index: Index, module: str, qualified: str) -> frozenset[str]:
    """The names that are an object's own: arguments of a function, fields of a class, and those of the class around."""
    names: set[str] = set()
    parts = qualified.split(".")
    for end in range(1, len(parts) + 1):
        node = _node(index, module, ".".join(parts[:end]))
        nodes: list[ast.AST] = [node] if node else []
        if isinstance(node, ast.ClassDef):
            nodes = [part for part in node.body if getattr(part, "name", "__init__") == "__init__"]
        for part in nodes:
            if isinstance(part, ast.FunctionDef):
                arguments = part.args
                every = (
                    *arguments.posonlyargs,
                    *arguments.args,
                    *arguments.kwonlyargs,
                    arguments.vararg,
                    arguments.kwarg,
                )
                names |= {argument.arg for argument in every if argument}
            elif isinstance(part, ast.AnnAssign | ast.Assign):
                names.add(_target(part))
    return frozenset(names)


def alias(index: Index, found: Entry) -> str:
    """What an alias stands for, or a constant's value."""
    value = found.node.value if isinstance(found.node, ast.Assign | ast.AnnAssign) else None
    return _spelt(index, found.home, value) if found.kind == "type" else ast.unparse(value) if value else ""


def _node(index: Index, module: str, qualified: str) -> ast.AST | None:
    source = index.sources.get(module)
    if source is None:
        return None
    first, *rest = qualified.split(".")
    node: ast.AST | None = source.definitions.get(first)
    for name in rest:
        body = node.body if isinstance(node, ast.ClassDef) else []
        node = next(
            (part for part in body if isinstance(part, ast.FunctionDef | ast.ClassDef) and part.name == name), None
        )
    return node


def _lineage(index: Index, module: str, cls: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and those that it comes from, as far as the package defines them, the nearest first."""
    yield module, cls
    for base in cls.bases:
        origin = index.origin(module, ast.unparse(base))
        if origin and isinstance(node := index.sources[origin[0]].definitions[origin[1]], ast.ClassDef):
            yield from _lineage(index, origin[0], node)


def _decorated(node: ast.FunctionDef | ast.ClassDef, by: str) -> bool:
    return any(ast.unparse(found).partition("(")[0].rpartition(".")[2] == by for found in node.decorator_list)


def _of_function(index: Index, module: str, node: ast.FunctionDef, bound: bool) -> str:
    arguments = typing.cast(ast.arguments, _Spelling(index, module).visit(copy.deepcopy(node.args)))
    if bound:
        del (arguments.posonlyargs or arguments.args)[0]
    return f"({ast.unparse(arguments)})"


def _of_dataclass(index: Index, module: str, cls: ast.ClassDef) -> str:
    fields: dict[str, str] = {}
    keywords: dict[str, str] = {}
    for home, base in reversed(list(_lineage(index, module, cls))):
        only_keywords = any("kw_only=True" in ast.unparse(found) for found in base.decorator_list)
        for node in base.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _in_init(node):
                annotation = _spelt(index, home, node.annotation)
                text = f"{node.target.id}: {annotation}{_default(node.value)}"
                (keywords if only_keywords else fields)[node.target.id] = text
    return f"({', '.join([*fields.values(), *(['*'] if keywords else []), *keywords.values()])})"


def _in_init(node: ast.AnnAssign) -> bool:
    return "ClassVar" not in ast.unparse(node.annotation) and not (
        node.value and "init=False" in ast.unparse(node.value)
    )


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in given:
            return f" = {ast.unparse(given['default'])}"
        if "default_factory" in given:
            empty = {"list": "[]", "dict": "{}", "tuple": "()", "set": "set()"}
            return f" = {empty.get(ast.unparse(given['default_factory']), '...')}"
        return ""
    return f" = {ast.unparse(value)}"


def _spelt(index: Index, module: str, annotation: ast.expr | None) -> str:
    if annotation is None:
        return ""
    return ast.unparse(_Spelling(index, module).spelt(annotation))


class _Spelling(ast.NodeTransformer):
    """Annotations with full names, marked to be shown short (``~torch.Tensor``); aliases without an entry spelt out."""

    def __init__(self, index: Index, module: str) -> None:
        self.index, self.module = index, module

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if node.annotation:
            node.annotation = self.spelt(node.annotation)
        return node

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        for argument in (*node.posonlyargs, *node.args, *node.kwonlyargs, node.vararg, node.kwarg):
            if argument:
                self.visit_arg(argument)
        return node  # defaults stay as they are

    def spelt(self, annotation: ast.expr) -> ast.expr:
        return typing.cast(ast.expr, self.visit(copy.deepcopy(annotation)))

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if isinstance(node.value, str):  # an annotation in quotes; the words of a Literal are not visited
            return self.spelt(ast.parse(node.value, mode="eval").body)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if ast.unparse(node.value).endswith("Literal"):
            return node
        return typing.cast(ast.expr, self.generic_visit(node))

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._named(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return self._named(node)

    def _named(self, node: ast.Name | ast.Attribute) -> ast.expr:
        written = ast.unparse(node)
        head, _, rest = written.partition(".")
        if not rest and (origin := self.index.origin(self.module, written)):
            target = self.index.sources[origin[0]].definitions[origin[1]]
            if found := self.index.entry(*origin):
                return _short(found.path)
            if isinstance(target, ast.Assign | ast.AnnAssign) and target.value and kind_of(target, origin[1]) == "type":
                return _Spelling(self.index, origin[0]).spelt(target.value)
            return node if isinstance(target, ast.Assign | ast.AnnAssign) else _short(f"{origin[0]}.{origin[1]}")
        source = self.index.sources[self.module]
        full = source.imports.get(head)
        if full is None or full.startswith(("typing.", "collections.abc.")) or hasattr(builtins, written):
            return node  # Sphinx knows these
        return _short(f"{full}.{rest}" if rest else full)


def _short(full: str) -> ast.expr:
    return ast.parse(f"~{full}", mode="eval").body
