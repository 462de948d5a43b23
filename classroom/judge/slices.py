"""What a learner's cells need of the chapter: its imports, its recipes and its functions, and nothing that trains.

An exercise may name what the chapter defined above it (``replace(base, …)``). Running the whole chapter for that would
take a minute a submission; so only those statements run that a learner's cells name, and what these need in turn.
"""

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# What an assignment may call: it makes a value in no time. All else (`load`, `fit`, `compare`) is left out.
QUICK = {
    "Recipe", "replace", "partial", "range", "tuple", "list", "dict", "set", "len", "min", "max", "sum", "float", "int",
    "str", "tensor", "linspace", "arange", "logspace", "zeros", "ones", "schedule",
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """Part of a chapter.

    Attributes
    ----------
    statements : in the chapter's order, to be run one by one.
    left_out : names that the learner's cells, or the statements, need and that would take long to make.
    """

    statements: tuple[str, ...]
    left_out: frozenset[str]


def needed(chapter: Sequence[str], answers: Iterable[str]) -> Slice:
    """The slice of a chapter (sources of its code cells, without the exercises) that answers need."""
    wanted = {name for source in answers for name in _names(source)}
    kept: list[ast.stmt] = []
    left_out: set[str] = set()
    for statement in [statement for source in reversed(chapter) for statement in reversed(ast.parse(source).body)]:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            kept += _imports(statement, wanted)
        elif bound := _bound(statement) & wanted:
            if _is_quick(statement):
                kept.append(statement)
                wanted |= _names(ast.unparse(statement))
            else:
                left_out |= bound
    return Slice(*_without(left_out, reversed(kept)))


def _without(left_out: set[str], statements: Iterable[ast.stmt]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The statements that can be run where some names are missing, and all that are missing then."""
    run, missing = [], set(left_out)
    for statement in statements:
        source = ast.unparse(statement)
        if isinstance(statement, ast.Assign) and _names(source) & missing:
            missing |= _bound(statement)
        else:
            run.append(source)
    return tuple(run), frozenset(missing)


def _imports(statement: ast.Import | ast.ImportFrom, wanted: set[str]) -> Iterator[ast.stmt]:
    """One import for each wanted name: one that fails must not take the others with it."""
    for alias in reversed(statement.names):
        name = alias.asname or alias.name.partition(".")[0]
        if name in wanted:
            if isinstance(statement, ast.Import):
                yield ast.Import([alias])
            else:
                yield ast.ImportFrom(statement.module, [alias], statement.level)


def _names(source: str) -> set[str]:
    try:
        return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # a learner's cell may be anything
        return set()


def _bound(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        return {node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return set()


def _is_quick(statement: ast.stmt) -> bool:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return not statement.decorator_list
    return all(_called(node) in QUICK for node in ast.walk(statement) if isinstance(node, ast.Call))


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
