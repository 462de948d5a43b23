"""Tested claims: a sentence a notebook states, the condition that must hold for it, and the figures it was measured by.

    claims = Claims()
    claims.claim("Momentum needs a third of the steps", "ratio > 3", ratio=plain_steps / momentum_steps)
    claims.table()

A claim that does not hold stops the notebook: an executed chapter states nothing that its own numbers do not bear out.
The sentences are about the quick profile's data on a processor. In the full profile, where other data may say
otherwise, and on a GPU, where other things take the time, a claim that does not hold is marked ✗, on its line and in
the table, and the notebook goes on.
"""

import ast
import html
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from course_lib.lab.runtime import device, quick

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "min": min, "max": max, "round": round, "all": all, "any": any, "len": len,
}  # fmt: skip
_ATTRIBUTES = ("mean", "low", "high", "n")
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


class ClaimFailed(AssertionError):
    """A claim does not hold; the message gives the sentence, the condition and the measured figures."""


class _Undefined(ArithmeticError):
    """The condition met a NaN or a division by zero: whatever it compares, it does not hold."""


@dataclass(frozen=True, repr=False)
class Claim:
    """One claim as it was tested; ``holds`` can be False in the full profile only."""

    sentence: str
    condition: str
    figures: Mapping[str, Any]
    holds: bool = True

    @property
    def mark(self) -> str:
        """✓, or ✗ and what that means."""
        if self.holds:
            return "✓"
        return "✗ does not hold on this device:" if quick() else "✗ does not hold in this profile:"

    @property
    def measured(self) -> str:
        """The figures as ``name = value``, joined by commas."""
        return _measured(self.figures, digits=3)

    def __repr__(self) -> str:
        return f"{self.mark} {self.sentence} ({self.measured}; {self.condition})"

    def _repr_html_(self) -> str:
        return (
            f'<div><span style="color:{"#1a7f37" if self.holds else "#a40e26"};font-weight:bold">{self.mark}</span> '
            f"{html.escape(self.sentence)} "
            f'<span style="opacity:0.75">({html.escape(self.measured)}; '
            f"<code>{html.escape(self.condition)}</code>)</span></div>"
        )


class Claims:
    """The claims of one notebook, in the order in which they were first made."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}

    def claim(self, sentence: str, condition: str, **figures: Any) -> Claim:
        """Test ``condition`` on ``figures`` and keep the claim; claiming the same sentence again replaces it.

        ``condition`` is a Python expression over the names of the figures: comparisons, arithmetic, ``and``, ``or``,
        ``not`` and abs, min, max, round, all, any, len. A figure is a number, a truth value, a word, a list of those,
        or an interval with ``mean``, ``low`` and ``high`` (write ``gain.low > 0``). A NaN never holds.

        Raises
        ------
        ClaimFailed
            The condition does not hold, in the quick profile on a processor. In the full one, and on a GPU, where other
            things take the time, the claim is marked instead.
        ValueError
            The condition cannot be read, names an unknown figure, or depends on none.
        """
        figures = {name: _plain(value) for name, value in figures.items()}
        tree = _parse(condition, figures)
        # A claim that held on an earlier run of its cell and fails now must not stay in the table.
        place = list(self._claims).index(sentence) if sentence in self._claims else len(self._claims)
        self._claims.pop(sentence, None)
        holds = _holds(tree, condition, figures)
        if not holds and quick() and device().type == "cpu":
            measured = _measured(figures, digits=6)
            raise ClaimFailed(f"does not hold: {sentence!r} asks for {condition}, measured {measured}")
        made = Claim(sentence, condition, figures, holds)
        kept = list(self._claims.items())
        self._claims = dict([*kept[:place], (sentence, made), *kept[place:]])
        return made

    def table(self) -> "ReadableTable":
        """All claims so far: columns claim, condition, measured."""
        rows = [
            (claim.sentence if claim.holds else f"{claim.mark} {claim.sentence}", claim.condition, claim.measured)
            for claim in self._claims.values()
        ]
        return ReadableTable(rows, columns=["claim", "condition", "measured"])

    def __len__(self) -> int:
        return len(self._claims)

    def __repr__(self) -> str:
        failed = sum(not claim.holds for claim in self._claims.values())
        which = f"{failed} of which do not hold in this profile" if failed else "all of which hold"
        return f"{len(self)} claim{'' if len(self) == 1 else 's'}, {which}"


class ReadableTable(pd.DataFrame):
    """A DataFrame of words: shown without its index, left-aligned, with long sentences wrapped rather than cut."""

    def __repr__(self) -> str:
        return self.to_string(index=False, justify="left") if len(self) else "(none)"

    def _repr_html_(self) -> str:
        cell = "text-align:left;vertical-align:top;white-space:normal;max-width:32em;padding:0.3em 0.8em"
        head = "".join(f'<th scope="col" style="{cell}">{html.escape(str(name))}</th>' for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f'<td style="{cell}">{html.escape(str(value))}</td>' for value in row) + "</tr>"
            for row in self.itertuples(index=False, name=None)
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _plain(value: Any) -> Any:
    """Figures come as tensors, NumPy scalars or arrays too; conditions are about plain Python values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _parse(condition: str, figures: Mapping[str, Any]) -> ast.expr:
    """Read a condition and check every part of it before anything is evaluated."""
    try:
        tree = ast.parse(condition.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"condition: {condition!r} is not an expression ({error.msg})") from None
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}
    for node in ast.walk(tree):
        _check_part(node, condition)
    if unknown := sorted(names - set(figures)):
        given = ", ".join(figures) or "none"
        raise ValueError(f"condition: {condition!r} names {', '.join(unknown)}; the figures given are: {given}")
    if not names:
        raise ValueError(f"condition: {condition!r} depends on no figure, so it would test nothing")
    return tree


def _check_part(node: ast.AST, condition: str) -> None:
    allowed = (
        ast.BoolOp, ast.boolop, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name, ast.expr_context, ast.Constant,
        ast.Tuple, ast.List, ast.Call, ast.Attribute, *_BINARY, *_UNARY, *_COMPARISONS,
    )  # fmt: skip
    if not isinstance(node, allowed):
        raise ValueError(
            f"condition: {condition!r} uses {type(node).__name__}; allowed are comparisons, arithmetic, and, or, not, "
            f"and the functions {', '.join(_FUNCTIONS)}"
        )
    if isinstance(node, ast.Call) and not (
        isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    ):
        raise ValueError(
            f"condition: {condition!r} calls {ast.unparse(node.func)}; allowed are {', '.join(_FUNCTIONS)}"
        )
    if isinstance(node, ast.Attribute) and node.attr not in _ATTRIBUTES:
        raise ValueError(f"condition: {condition!r} reads .{node.attr}; allowed are .{', .'.join(_ATTRIBUTES)}")


def _holds(tree: ast.expr, condition: str, figures: Mapping[str, Any]) -> bool:
    # `not (a > b)` is true of a NaN; a figure that is not a number must never carry a claim.
    if any(_has_nan(value) for value in figures.values()):
        return False
    try:
        value = _evaluate(tree, figures)
    except (_Undefined, ZeroDivisionError):
        return False
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"condition: {condition!r} cannot be evaluated on {_measured(figures, digits=6)}: {error} "
            "(of an interval, compare .low, .mean or .high)"
        ) from None
    if not isinstance(value, bool):
        raise ValueError(f"condition: {condition!r} gives {value!r}; it must say what to compare, as in 'ratio > 3'")
    return value


def _evaluate(node: ast.expr, figures: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return figures[node.id]
        case ast.Attribute():
            return getattr(_evaluate(node.value, figures), node.attr)
        case ast.Tuple() | ast.List():
            return [_evaluate(item, figures) for item in node.elts]
        case ast.Call(func=ast.Name(id=name)):
            return _defined(_FUNCTIONS[name](*(_evaluate(argument, figures) for argument in node.args)))
        case ast.UnaryOp():
            return _UNARY[type(node.op)](_evaluate(node.operand, figures))
        case ast.BinOp():
            left, right = _evaluate(node.left, figures), _evaluate(node.right, figures)
            return _defined(_BINARY[type(node.op)](left, right))
        case ast.BoolOp():
            values = (_evaluate(value, figures) for value in node.values)
            return all(values) if isinstance(node.op, ast.And) else any(values)
        case ast.Compare():
            operands = [_evaluate(operand, figures) for operand in (node.left, *node.comparators)]
            pairs = zip(node.ops, operands[:-1], operands[1:], strict=True)
            return all(bool(_COMPARISONS[type(op)](left, right)) for op, left, right in pairs)
    raise ValueError(f"condition: {ast.unparse(node)!r} is not allowed")  # _parse lets nothing else through


def _defined(value: Any) -> Any:
    if _has_nan(value):
        raise _Undefined
    return value


def _has_nan(value: Any) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(_has_nan(item) for item in value)
    if _is_interval(value):
        return any(_has_nan(part) for part in (value.mean, value.low, value.high))
    return isinstance(value, float) and math.isnan(value)


def _is_interval(value: Any) -> bool:
    return all(hasattr(value, part) for part in ("mean", "low", "high"))


def _measured(figures: Mapping[str, Any], digits: int) -> str:
    return ", ".join(f"{name} = {_shown(value, digits)}" for name, value in figures.items()) or "nothing"


def _shown(value: Any, digits: int) -> str:
    if _is_interval(value):
        low, high = _shown(value.low, digits), _shown(value.high, digits)
        seeds = f", n = {value.n}" if hasattr(value, "n") else ""
        return f"{_shown(value.mean, digits)} ({low} to {high}{seeds})"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_shown(item, digits) for item in value) + "]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    # Plain decimals where a reader expects them: 12345.6 is 12,346, not 1.23e+04.
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e7 else f"{value:.{digits}g}"
