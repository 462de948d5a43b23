"""Formulas in TeX: set for the eye and for the ear, and how much room they take."""

import html
import re
from dataclasses import dataclass
from functools import lru_cache

from site_builder.formulas import typeset

EM = 1.06  # size of a formula's letters in em of the words around it, as deck.css sets it
LETTER = 0.6  # em that a letter of a formula takes, about


@dataclass(frozen=True)
class Formula:
    """A formula as it was set.

    Attributes
    ----------
    shown : for the eye, as HTML.
    spoken : for the notes, in MathML only.
    row : its letters one after the other, with a space for each gap.
    height : in em of its letters.
    """

    shown: str
    spoken: str
    row: str
    height: float


@lru_cache(maxsize=4096)
def formula(tex: str, display: bool) -> Formula:
    """Set a formula, in a line or (``display``) by itself."""
    shown = typeset(tex, display)
    end = "</math>"
    spoken = re.sub(r"<annotation.*?</annotation>", "", shown[shown.index("<math") : shown.index(end) + len(end)])
    seen = shown.split('aria-hidden="true">', 1)[1]
    row = html.unescape(re.sub(r"<[^>]+>", "", seen)).replace("\u200b", "")
    row += " " * round(sum(float(gap) for gap in re.findall(r"margin-right:([\d.]+)em", seen)) * 2)
    struts = [float(height) for height in re.findall(r'strut" style="height:([\d.]+)em', seen)]
    return Formula(shown, spoken, row, max(struts, default=1.0))


def formula_width(tex: str) -> float:
    """About how wide a formula by itself is, in em of the words."""

    def wider(match: re.Match[str]) -> str:  # of two parts that stand one above the other
        return f"{{{max(match[1], match[2], key=lambda part: len(re.sub(r'[a-zA-Z]{3,}|[{}_^]', '', part)))}}}"

    inner = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
    flat = re.sub(rf"\\[dt]?frac{inner}{inner}", wider, re.sub(rf"\\underbrace{inner}_{inner}", wider, tex))
    return len(formula(flat, True).row) * LETTER * EM


def formula_lines(tex: str, most: float) -> list[str]:
    """A formula by itself, cut between its parts (``\\quad``) until no line is wider than ``most`` em."""
    if formula_width(tex) <= most or r"\begin" in tex:
        return [tex]
    heads = {space: tex[: space.start()] for space in re.finditer(r"\\q?quad", tex)}
    outside = [space for space, head in heads.items() if head.count("{") == head.count("}")]
    if not outside:
        return [tex]
    middle = min(outside, key=lambda space: abs(formula_width(heads[space]) - formula_width(tex) / 2))
    return [*formula_lines(heads[middle], most), *formula_lines(tex[middle.end() :], most)]
