"""One look for all figures of the course, and the kinds of figure that recur in it.

``curves`` (means over seeds with bands), ``intervals`` (runs, means and intervals of several arms), ``image_grid``,
``landscape`` and ``path`` (optimizers on a surface), ``slot_map`` (the training loop with this chapter's slot lit),
``chapter_map`` (the chapters and what each builds on).
Colours are those of Okabe and Ito (2008, "Color Universal Design"), told apart by colour-blind readers; lines also
differ in dash, so that they survive a grey print.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from course_lib.lab import chapters
from course_lib.lab.arguments import require
from course_lib.lab.chapters import CHAPTERS, of_slot
from course_lib.lab.runtime import in_notebook

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1, 1, 1)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    "-",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#222222", "#9a9a9a"


def style() -> None:
    """Set matplotlib's defaults to the look of the course; in a notebook, figures are stored at twice their size."""
    if in_notebook():
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")  # twice the dots, and the width to show them at: sharp on screens and in print
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 80,
            "savefig.dpi": 80,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": cycler(color=PALETTE, linestyle=DASHES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.labelsize": 10,
            "axes.edgecolor": FAINT,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.8,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "font.family": "DejaVu Sans",
            "image.cmap": "gray",
        }
    )


def look(index: int) -> dict[str, Any]:
    """Colour and dash of the ``index``-th series, the same in every figure."""
    return {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[index % len(DASHES)]}


def band(values: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and Student-t interval over the first axis: ``[seeds, points]`` -> mean, low, high, each ``[points]``."""
    values = np.asarray(values, dtype=float)
    mean = values.mean(0)
    if len(values) < 2:
        return mean, mean, mean
    reach = students_t(len(values) - 1, confidence) * values.std(0, ddof=1) / np.sqrt(len(values))
    return mean, mean - reach, mean + reach


def students_t(freedom: int, confidence: float = 0.95) -> float:
    """The half width, in standard errors, of a two-sided Student-t interval with so many degrees of freedom."""
    from scipy.special import stdtrit  # at the first interval: scipy.stats would cost every import half a second

    return float(stdtrit(freedom, (1 + confidence) / 2))


def curves(
    lines: Mapping[str, np.ndarray],
    *,
    x: Sequence[float] | None = None,
    ax: Axes | None = None,
    title: str = "",
    xlabel: str = "epoch",
    ylabel: str = "",
    label: bool = True,
) -> Axes:
    """Means over seeds with 95% bands, labelled at the end of each line.

    ``lines`` maps a name to ``[seeds, points]``; ``x`` is shared by all and counts from 1 where it is not given.
    """
    ax = ax if ax is not None else plt.subplots()[1]
    seeds = 0
    for k, (name, values) in enumerate(lines.items()):
        mean, low, high = band(values)
        seeds = max(seeds, len(values))
        points = np.arange(1, len(mean) + 1) if x is None else np.asarray(x)
        ax.plot(points, mean, label=name, **look(k))
        if len(values) > 1:
            ax.fill_between(points, low, high, color=look(k)["color"], alpha=0.15, linewidth=0)
    if x is None:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel=f"{xlabel} (means and 95% bands, {seeds} seeds)" if seeds > 1 else xlabel, ylabel=ylabel, title=title)
    if label:
        label_lines(ax)
    return ax


def label_lines(ax: Axes, *, gap: float = 0.055) -> None:
    """Write each line's label at its right end, in its colour, ``gap`` of the axes' height apart at least."""
    lines = [
        line for line in ax.get_lines() if not str(line.get_label()).startswith("_") and np.size(line.get_xydata())
    ]
    if not lines:
        return
    ax.autoscale_view()
    to_axes = ax.transData + ax.transAxes.inverted()
    points = [np.asarray(line.get_xydata(), dtype=float) for line in lines]
    ends = [to_axes.transform(xy[np.isfinite(xy).all(1)][-1])[1] for xy in points]
    order = np.argsort(ends, kind="stable")
    heights = np.clip(ends, 0, 1)[order]
    for k in range(1, len(heights)):
        heights[k] = max(heights[k], heights[k - 1] + gap)
    heights -= max(0.0, heights[-1] - 1)
    for height, k in zip(heights, order, strict=True):
        text, colour = str(lines[k].get_label()), lines[k].get_color()
        ax.text(1.02, height, text, color=colour, transform=ax.transAxes, va="center", fontsize=9)


def intervals(
    values: Mapping[str, np.ndarray],
    *,
    ax: Axes | None = None,
    title: str = "",
    xlabel: str = "",
) -> Axes:
    """One row an arm: its runs as faint dots, its mean with the 95% interval. ``values``: name -> ``[seeds]``."""
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 1.1 + 0.28 * len(values)))[1]
    for row, (_, runs) in enumerate(values.items()):
        runs = np.asarray(runs, dtype=float)
        mean, low, high = band(runs[:, None])
        ax.plot(runs, np.full(len(runs), row + 0.25), "o", color=FAINT, markersize=3, alpha=0.7)
        ax.errorbar(mean, [row], xerr=[mean - low, high - mean], fmt="o", color=PALETTE[0], capsize=3, markersize=5)
    count = max(len(runs) for runs in values.values())
    ax.set(xlabel=f"{xlabel} (mean and 95% interval, {count} seeds)", title=title)
    ax.set_yticks(range(len(values)), list(values))
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    return ax


def image_grid(
    images: Tensor, *, titles: Sequence[str] | None = None, columns: int = 10, title: str = "", scale: float = 0.75
) -> Figure:
    """Images ``[N, C, H, W]`` (uint8, or floats in [0, 1]) in a grid, each with its title above it."""
    pixels = images.cpu().numpy()
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"images has the shape {list(pixels.shape)}: must be [N, 1, H, W] or [N, 3, H, W]")
    rows = -(-len(pixels) // columns)
    height = scale * (1.3 if titles else 1.0)
    fig, axes = plt.subplots(rows, columns, figsize=(scale * columns, height * rows + 0.4), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for k, picture in enumerate(pixels):
        ax = axes.flat[k]
        top = 255 if picture.dtype == np.uint8 else 1.0
        ax.imshow(picture.transpose(1, 2, 0).squeeze(), cmap="gray", vmin=0, vmax=top)
        if titles:
            ax.set_title(titles[k], fontsize=9, loc="center")
    fig.suptitle(title, x=0.01, ha="left", fontsize=11)
    return fig


def describe(figure: Figure, words: str) -> None:
    """Give a figure the alternative text for readers who do not see it: what it shows, and what follows from it.

    Without it the web site makes one from titles, axes and legends. It is kept as the figure's label in matplotlib.
    """
    require("words", words, lambda text: isinstance(text, str) and bool(text.strip()), "a sentence")
    figure.set_label(words)


def landscape(
    surface: Callable[[Tensor], Tensor],
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    *,
    ax: Axes | None = None,
    levels: int = 12,
    title: str = "",
) -> Axes:
    """Contours of ``surface`` (``[..., 2] -> [...]``), even in the logarithm of the height above the lowest point."""
    ax = ax if ax is not None else plt.subplots(figsize=(4.6, 3.6))[1]
    x, y = np.meshgrid(np.linspace(*xlim, 120), np.linspace(*ylim, 120))
    height = surface(torch.from_numpy(np.stack([x, y], axis=-1))).numpy()
    height = np.log10(height - height.min() + 1e-3 * np.ptp(height))
    ax.contour(x, y, height, levels=levels, cmap="Greys", linewidths=0.7, alpha=0.7)
    ax.set(xlabel="first weight", ylabel="second weight", title=title, xlim=xlim, ylim=ylim)
    ax.grid(visible=False)
    return ax


def path(points: np.ndarray, *, ax: Axes, name: str, index: int = 0) -> None:
    """The way of an optimizer over a landscape, ``[steps, 2]``, with a dot at its end."""
    points = np.asarray(points, dtype=float)
    colour = look(index)["color"]
    ax.plot(
        points[:, 0], points[:, 1], color=colour, linestyle="-", marker=".", markersize=3, linewidth=1.2, label=name
    )
    ax.plot(*points[-1], MARKERS[index % len(MARKERS)], color=colour, markersize=7, markeredgecolor="white", label="_")


# name -> centre (x, y), what it decides
SLOTS: dict[str, tuple[tuple[float, float], str]] = {
    "data": ((1.0, 2.9), "what the\nnetwork sees"),
    "batch": ((3.1, 2.9), "how many examples\nmake a gradient"),
    "model": ((5.2, 2.9), "the network\nitself"),
    "objective": ((7.3, 2.9), "what is\nminimised"),
    "optimizer": ((7.3, 1.4), "how a gradient\nbecomes a step"),
    "schedule": ((9.4, 1.4), "how large the\nstep is, when"),
    "stopping": ((1.0, 1.4), "when it is over"),
    "execution": ((5.2, 0.4), "on what it runs"),
}
_FLOW = (("data", "batch"), ("batch", "model"), ("model", "objective"), ("objective", "optimizer"),
         ("schedule", "optimizer"), ("optimizer", "stopping"), ("stopping", "data"))  # fmt: skip
_SLOT_HALF = (0.86, 0.47)  # of a box's width and height


def slot_map(*lit: str) -> Figure:
    """The training loop with its slots, the chapters that fill each, and the slots named in ``lit`` highlighted.

    Raises
    ------
    ValueError : a name in ``lit`` that is no slot.
    """
    for name in lit:
        if name not in SLOTS:
            raise ValueError(f"lit={name!r}: the slots are {', '.join(SLOTS)}")
    fig, ax = plt.subplots(figsize=(8.6, 3.1))
    for name, (centre, decides) in SLOTS.items():
        numbers = of_slot(name)
        word = "chapters" if len(numbers) > 1 else "chapter"
        draw = _bar_below_all if name == "execution" else _slot_box
        draw(ax, centre, name, decides, f"{word} {_in_runs(numbers)}", lit=name in lit)
    for start, end in _FLOW:
        ax.add_patch(_arrow(SLOTS[start][0], SLOTS[end][0]))
    # The inner loop closes: what goes back from the optimizer turns up to the next batch, until the epoch is over
    (x, top), (_, low) = SLOTS["batch"][0], SLOTS["optimizer"][0]
    ax.add_patch(FancyArrowPatch((x, low), (x, top - _SLOT_HALF[1] - 0.06), **_ARROW))
    for x, y, words, side in ((7.4, 2.14, "gradient", "left"), (3.2, 2.14, "next batch", "left"),
                              (4.9, 1.52, "new weights", "center"), (2.5, 1.24, "after the epoch", "center"),
                              (1.1, 2.14, "another epoch?", "left")):  # fmt: skip
        ax.text(x, y, words, fontsize=8, color="#555555", ha=side, va="center")
    ax.set(xlim=(0.05, 10.35), ylim=(0.08, 3.45))
    ax.set_axis_off()
    where = " and ".join(lit)
    what = f"this chapter changes the slot “{where}”" if lit else "one slot for each kind of technique"
    ax.set_title(f"The training loop: {what}", fontsize=11)
    loop = "data, batch, model, objective, optimizer with its schedule, stopping, and back to the data"
    describe(fig, f"The training loop as a ring of slots: {loop}; execution lies below all. {what.capitalize()}.")
    return fig


def _in_runs(numbers: Sequence[int]) -> str:
    """8, 11, 12, 13, 14 as "8, 11–14"; two in a row stay two."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _slot_box(ax: Axes, centre: tuple[float, float], name: str, decides: str, chapters: str, *, lit: bool) -> None:
    (x, y), (half_width, half_height) = centre, _SLOT_HALF
    _box(ax, centre, half_width, half_height, lit=lit)
    ax.text(x, y + 0.3, name, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    ax.text(x, y - 0.03, decides, ha="center", va="center", fontsize=8, color=INK, linespacing=1.1)
    ax.text(x, y - 0.36, chapters, ha="center", va="center", fontsize=8, color=INK if lit else "#555555")


def _bar_below_all(ax: Axes, centre: tuple[float, float], name: str, decides: str, chapters: str, *, lit: bool) -> None:
    """The whole loop stands on this slot, so it has no arrow."""
    x, y = centre
    _box(ax, centre, 4.2 + _SLOT_HALF[0], 0.22, lit=lit)
    ax.text(x - 0.9, y, name, ha="right", va="center", fontsize=11, weight="bold", color=INK)
    ax.text(x - 0.75, y, decides, ha="left", va="center", fontsize=8, color=INK)
    ax.text(x + 0.75, y, chapters, ha="left", va="center", fontsize=8, color=INK if lit else "#555555")


def _box(ax: Axes, centre: tuple[float, float], half_width: float, half_height: float, *, lit: bool) -> None:
    x, y = centre
    box = FancyBboxPatch((x - half_width, y - half_height), 2 * half_width, 2 * half_height,
                         boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=PALETTE[4] if lit else "#f2f2f2",
                         edgecolor=INK if lit else FAINT, linewidth=2 if lit else 1)  # fmt: skip
    ax.add_patch(box)


_ARROW: dict[str, Any] = {
    "arrowstyle": "-|>", "mutation_scale": 11, "color": "#555555", "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0,
}  # fmt: skip


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> FancyArrowPatch:
    """An arrow from the edge of the box around ``start`` to the edge of the box around ``end``."""
    (x0, y0), (x1, y1) = start, end
    half_width, half_height = _SLOT_HALF[0] + 0.06, _SLOT_HALF[1] + 0.06
    dx, dy = x1 - x0, y1 - y0
    reach = min(half_width / abs(dx) if dx else np.inf, half_height / abs(dy) if dy else np.inf)
    tail, head = (x0 + reach * dx, y0 + reach * dy), (x1 - reach * dx, y1 - reach * dy)
    return FancyArrowPatch(tail, head, **_ARROW)


# (a, b): read a before b. What follows from two arrows is not drawn, nor that 16 stands on all of the others.
NEEDS = tuple((need, chapter.number) for chapter in CHAPTERS for need in chapter.needs if chapter.number != 16)
_SLOT_COLOURS = {
    "data": "#cfe8f7", "batch": "#d9f0e4", "model": "#e8e8e8", "objective": "#f6dcea", "optimizer": "#fbe3b5",
    "schedule": "#fdf3a7", "stopping": "#f7d0bb", "execution": "#c9d4ee", "": "#ffffff",
}  # fmt: skip


def chapter_map(written: Collection[int] | None = None) -> Figure:
    """The chapters and what each builds on, coloured by the slot that it changes.

    A solid frame marks the chapters in ``written`` (by default those with a notebook in this checkout), a dashed one
    those to come.
    """
    there = chapters.written() if written is None else set(written)
    if unknown := sorted(there - {chapter.number for chapter in CHAPTERS}):
        raise ValueError(f"written={unknown}: the chapters are numbered from 0 to {len(CHAPTERS) - 1}")
    fig, ax = plt.subplots(figsize=(10, 5))
    for chapter in CHAPTERS:
        number, title, slot = chapter.number, chapter.short, chapter.slot
        x, y = _on_the_map(chapter.place)
        on = number in there
        ax.add_patch(FancyBboxPatch((x - 0.68, y - 0.34), 1.36, 0.68, boxstyle="round,pad=0.02,rounding_size=0.1",
                                    facecolor=_SLOT_COLOURS[slot], edgecolor=INK if on else FAINT,
                                    linewidth=2.2 if on else 1, linestyle="-" if on else (0, (3, 2))))  # fmt: skip
        two_lines = "\n" in title
        ax.text(x, y + (0.1 if slot else 0), f"{number}  {title}", ha="center", va="center", fontsize=8.5, color=INK,
                weight="bold" if on else "normal", linespacing=1.15)  # fmt: skip
        ax.text(x, y - (0.26 if two_lines else 0.2), slot, ha="center", va="center", fontsize=7, color="#444444",
                style="italic")  # fmt: skip
    for before, after in NEEDS:
        ax.add_patch(_map_arrow(_on_the_map(CHAPTERS[before].place), _on_the_map(CHAPTERS[after].place)))
    _bracket(ax)
    ax.set(xlim=(-0.75, 10.95), ylim=(-0.5, 5.05))
    ax.set_axis_off()
    ax.set_title("What builds on what: an arrow means “read this first”; solid frames are written, dashed ones to come",
                 fontsize=11)  # fmt: skip
    return fig


def _on_the_map(place: tuple[float, float]) -> tuple[float, float]:
    column, row = place
    return 1.7 * column, 0.88 * row


def _map_arrow(start: tuple[float, float], end: tuple[float, float]) -> FancyArrowPatch:
    """From the right edge of one box to the left edge of another, or straight down within a column."""
    (x0, y0), (x1, y1) = start, end
    if x0 == x1:
        tail, head = (x0, y0 - 0.37), (x1, y1 + 0.37)
    else:
        tail, head = (x0 + 0.71, y0), (x1 - 0.71, y1)
    return FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=10, color="#555555", linewidth=1.1,
                           shrinkA=0, shrinkB=0)  # fmt: skip


def _bracket(ax: Axes) -> None:
    """Right of all techniques, open to them: chapter 16 stands on every one."""
    x, (low, high) = 9.36, (-0.35, 4.75)
    ax.plot([x - 0.08, x, x, x - 0.08], [low, low, high, high], color="#555555", linewidth=1.1, label="_")
