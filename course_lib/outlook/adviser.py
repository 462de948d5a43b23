"""Which technique when: from what hurts to what was measured to help, and what it cost.

================  ==========================================================================
``advise``        the findings that relieve what hurts, as a table to go on with
``advice_table``  the same to be read
``draw``          the gains of one complaint, as dots with intervals
``adviser``       an explorer: what hurts, and what one would give for it
================  ==========================================================================

The findings are in ``findings.py``; every figure is read from the recorded studies.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from course_lib.lab import plotting
from course_lib.lab.arguments import require
from course_lib.lab.chapters import CHAPTERS
from course_lib.lab.experiments import Interval
from course_lib.lab.widgets import Explorer, choice, explorer
from course_lib.outlook.findings import FINDINGS, HURTS, TAKES, Finding
from course_lib.outlook.links import readable, to_section
from course_lib.outlook.measured import Measured, Points, verdict

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

COLUMNS = ("technique", "relieves", "chapter", "gain", "price", "setting", "effort", "risk", "shows")

GIVES: dict[str, tuple[str, ...]] = {
    "whatever it takes": tuple(TAKES),
    "nothing but settings": ("settings",),
    "some accuracy": ("settings", "accuracy"),
    "more training": ("settings", "training"),
    "more at each answer": ("settings", "inference"),
    "more data": ("settings", "data"),
}
"""What one may be willing to give, and the keys of ``TAKES`` that are then in reach."""

_LOOKS: dict[str, dict[str, Any]] = {
    "gain": {"color": plotting.PALETTE[0], "marker": "o"},
    "loss": {"color": plotting.PALETTE[1], "marker": "v"},
    "cannot be told": {"color": plotting.FAINT, "marker": "o", "markerfacecolor": "white"},
}
_KEY = "● gain   ▼ loss   ○ cannot be told; 95% intervals; each against an alternative of its own, named in the table"
_WRAP, _ROW, _FRAME, _HEAD = 44, 0.31, 0.58, 0.62
"""Characters of a label; inches of a row, of what is below the rows of one axes, and of what is above all."""


def advise(
    hurts: Iterable[str], *, chapters: Iterable[int] | None = None, takes: Iterable[str] | None = None
) -> pd.DataFrame:
    """The findings that relieve at least one of what ``hurts``, those that relieve more of it first.

    Among those that relieve as much, first come those that are made for it: it stands first in their list. Asked for
    everything, it answers in the order of the chapters.

    Parameters
    ----------
    hurts : keys of ``HURTS``.
    chapters : only findings of these; by default of all.
    takes : only findings that take no more than this, keys of ``TAKES``; by default of all kinds.

    Returns
    -------
    One row a finding: technique, what it relieves, chapter (with a link to the section), gain, price, setting, effort,
    risk, and what the gain's interval shows: "gain", "loss" or "cannot be told".

    Raises
    ------
    ValueError : nothing hurts, or a complaint, a chapter or a price that is not known.
    """
    rows = [
        {
            "technique": finding.technique,
            "relieves": ", ".join(finding.relieves),
            "chapter": to_section(finding.chapter, finding.section),
            "gain": _told(finding.gain),
            "price": "" if finding.price is None else _told(finding.price),
            "setting": finding.setting,
            "effort": finding.effort,
            "risk": finding.risk,
            "shows": _shows(finding.gain),
        }
        for finding in relieving(hurts, chapters=chapters, takes=takes)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def relieving(
    hurts: Iterable[str], *, chapters: Iterable[int] | None = None, takes: Iterable[str] | None = None
) -> list[Finding]:
    """The findings of ``advise``, in its order."""
    asked = _among("hurts", hurts, HURTS)
    require("hurts", asked, bool, f"at least one of {', '.join(map(repr, HURTS))}")
    given = tuple(TAKES) if takes is None else _among("takes", takes, TAKES)
    numbers = [chapter.number for chapter in CHAPTERS]
    if chapters is not None:
        chapters = list(chapters)
        for number in chapters:
            require("chapters", number, lambda n: n in numbers, f"whole numbers from {numbers[0]} to {numbers[-1]}")
    found = [
        finding
        for finding in FINDINGS
        if set(asked) & set(finding.relieves)
        and finding.takes in given
        and (chapters is None or finding.chapter in chapters)
    ]
    if len(asked) == len(HURTS):
        return found  # asked for everything: in the order of the chapters
    return sorted(found, key=lambda finding: _rank(finding, asked))


def _rank(finding: Finding, asked: Sequence[str]) -> tuple[int, int]:
    places = [place for place, hurt in enumerate(finding.relieves) if hurt in asked]
    return -len(places), places[0]


def _among(name: str, given: Iterable[str], known: Iterable[str]) -> list[str]:
    """The given keys, each once."""
    allowed = f"a collection of keys among {', '.join(map(repr, known))}"
    require(name, given, lambda value: not isinstance(value, str), allowed)
    keys = list(dict.fromkeys(given))
    for key in keys:
        require(name, key, lambda value: value in known, f"one of {', '.join(map(repr, known))}")
    return keys


def advice_table(hurts: Iterable[str], *, chapters: Iterable[int] | None = None) -> Styler:
    """``advise`` as a table to be read, in a notebook or on the web site.

    Raises
    ------
    ValueError : as in ``advise``.
    """
    asked = _among("hurts", hurts, HURTS)
    frame = advise(asked, chapters=chapters)
    plain = [name for name in COLUMNS if name != "chapter"]
    frame[plain] = frame[plain].map(html.escape)  # what is left is the link
    bold = frame["shows"] != "cannot be told"
    complaints = "" if len(asked) == len(HURTS) else " ".join(HURTS[key] for key in asked) + " "
    table = (
        frame.style.hide(axis="index")
        .set_uuid("advice-" + "-".join(asked))
        .apply(lambda _: ["font-weight: bold" if clear else "" for clear in bold], subset=["gain"])
        .set_caption(
            f"{complaints}Means with 95% intervals over seeds; bold: the interval excludes that nothing changed. A "
            "price in points is read like a gain: what is below zero was lost."
        )
    )
    return readable(table)


# Read once: a study's rows do not change under a notebook


@cache
def _interval(measured: Measured) -> Interval:
    return measured.interval


@cache
def _told(measured: Measured) -> str:
    return str(measured)


@cache
def _shows(measured: Measured) -> str:
    return verdict(measured)


# --- The figure -------------------------------------------------------------------------------------------------------


def draw(hurt: str, ax: Sequence[Axes] | None = None, *, takes: Iterable[str] | None = None) -> Figure:
    """The gains of what relieves ``hurt``: points above, ratios below on a logarithmic axis; the largest first.

    Parameters
    ----------
    hurt : a key of ``HURTS``.
    ax : two axes to draw in, for points and for ratios; by default a new figure, with those that are needed.
    takes : as in ``advise``.

    Raises
    ------
    ValueError : a complaint or a price that is not known, or other than two axes.
    """
    found = relieving([hurt], takes=takes)
    kinds = [[f for f in found if isinstance(f.gain, Points) == points] for points in (True, False)]
    kinds = [sorted(kind, key=lambda f: -_interval(f.gain).mean) for kind in kinds]
    if ax is None:
        return _new_figure(hurt, kinds)
    require("ax", ax, lambda axes: len(axes) == len(kinds), "two axes, for points and for ratios")
    for own, kind in zip(ax, kinds, strict=True):
        _draw_kind(own, kind)
    return ax[0].get_figure()  # type: ignore[return-value]


def _new_figure(hurt: str, kinds: Sequence[Sequence[Finding]]) -> Figure:
    shown = [kind for kind in kinds if kind]
    height = _HEAD + sum(_ROW * len(kind) + _FRAME for kind in shown) + (0 if shown else _ROW)
    fig = plt.figure(figsize=(8.4, height))
    fig.set_layout_engine("none")  # laid out by hand: a constrained layout takes as long as all the drawing
    top = height - _HEAD
    for kind in shown:
        size = _ROW * len(kind)
        _draw_kind(fig.add_axes((0.37, (top - size) / height, 0.37, size / height)), kind)
        top -= size + _FRAME
    if not shown:
        fig.text(0.01, 0.2, "The studies measured nothing that takes so little.", fontsize=10)
    fig.text(0.01, 1 - 0.06 / height, HURTS[hurt], va="top", fontsize=11)
    fig.text(0.01, 1 - 0.33 / height, _KEY, va="top", fontsize=8)
    plotting.describe(fig, _in_words(hurt, [finding for kind in shown for finding in kind]))
    return fig


def _draw_kind(ax: Axes, kind: Sequence[Finding]) -> None:
    """One kind of gain in one axes, in the order that is given."""
    found = [_interval(finding.gain) for finding in kind]
    for name, look in _LOOKS.items():
        rows = [row for row, finding in enumerate(kind) if _shows(finding.gain) == name]
        spread = [[found[k].mean - found[k].low for k in rows], [found[k].high - found[k].mean for k in rows]]
        if rows:
            means = [found[k].mean for k in rows]
            ax.errorbar(means, rows, xerr=spread, capsize=3, markersize=6, linestyle="none", **look)
    if any(finding.price is not None for finding in kind):
        ax.text(1.02, 1.0, "price, where it was measured", transform=ax.transAxes, va="bottom", fontsize=8)
    for row, finding in enumerate(kind):
        if finding.price is not None:
            price = textwrap.fill(_price(finding.price), 30)
            ax.text(1.02, row, price, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
    points = all(isinstance(finding.gain, Points) for finding in kind)
    ax.axvline(0 if points else 1, color=plotting.INK, linewidth=1)
    ax.set_yticks(range(len(kind)), [_label(finding) for finding in kind], fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.set_ylim(len(kind) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(
        "points (of accuracy, if nothing else is said)" if points else "times less, or as fast; logarithmic", fontsize=8
    )
    if not points:
        _ratio_axis(ax, [edge for interval in found for edge in (interval.low, interval.high)])


def _ratio_axis(ax: Axes, ends: Sequence[float]) -> None:
    low, high = min([*ends, 0.8]) / 1.15, max([*ends, 2.0]) * 1.15
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= tick <= high]
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def _price(price: Measured) -> str:
    """In a figure's margin the price of a point of accuracy is the longest, and the most frequent."""
    told = _told(price)
    short = told.removesuffix(" of accuracy")
    return told if short == told else f"accuracy: {short}"


def _label(finding: Finding) -> str:
    """The technique, what is counted where that is not accuracy, and the chapter."""
    counted = re.sub(r"^(points|times) (less|fewer|of) ", "", finding.gain.what)
    counted = {"accuracy": "", "times as fast": ": speed"}.get(counted, f": {counted}")
    named = f"{finding.technique}{counted} (ch.\N{NO-BREAK SPACE}{finding.chapter})"
    return textwrap.fill(named, _WRAP, break_on_hyphens=False)


def _in_words(hurt: str, found: Sequence[Finding]) -> str:
    rows = "; ".join(f"{finding.technique}: {_told(finding.gain)}" for finding in found)
    return f"{HURTS[hurt]} What relieved it, with 95% intervals: {rows or 'nothing for so little'}."


def adviser() -> Explorer:
    """An explorer: what hurts, and what one would give; it answers with what the course measured."""

    def answer(hurts: str, gives: str) -> Figure:
        return draw(hurts, takes=GIVES[gives])

    return explorer(answer, hurts=choice("what hurts", list(HURTS)), gives=choice("you would give", list(GIVES)))
