"""One look for all figures of the course, and the kinds of figure that recur in it.

``curves`` (means over seeds with bands), ``intervals`` (runs, means and intervals of several arms), ``image_grid``,
``landscape`` and ``path`` (optimizers on a surface), ``slot_map`` (the training loop with this chapter's slot lit).
Colours are those of Okabe and Ito (2008, "Color Universal Design"), told apart by colour-blind readers; lines also
differ in dash, so that they survive a grey print.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import MaxNLocator
from scipy import stats
from torch import Tensor


PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), "-")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#222222", "#9a9a9a"


def style() -> None:
    """Set matplotlib's defaults to the look of the course."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 90,
            "savefig.dpi": 90,
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
    reach = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    return mean, mean - reach, mean + reach


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
    ax.set(xlabel=xlabel, ylabel=f"{ylabel} (mean of {seeds} seeds)" if seeds > 1 else ylabel, title=title)
    if label:
        label_lines(ax)
    return ax


def label_lines(ax: Axes, *, gap: float = 0.055) -> None:
    """Write each line's label at its right end, in its colour, ``gap`` of the axes' height apart at least."""
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_") and len(line.get_xdata())]
    if not lines:
        return
    ax.autoscale_view()
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = []
    for line in lines:
        shown = np.isfinite(np.asarray(line.get_ydata(), dtype=float))
        x, y = np.asarray(line.get_xdata())[shown][-1], np.asarray(line.get_ydata())[shown][-1]
        ends.append([float(np.clip(to_axes.transform((x, y))[1], 0, 1)), line])
    ends.sort(key=lambda end: end[0])
    for below, above in zip(ends, ends[1:], strict=False):
        above[0] = max(above[0], below[0] + gap)
    overshoot = max(0.0, ends[-1][0] - 1)
    for height, line in ends:
        ax.text(1.02, height - overshoot, line.get_label(), color=line.get_color(), transform=ax.transAxes, va="center",
                fontsize=9)  # fmt: skip


def intervals(
    values: Mapping[str, np.ndarray],
    *,
    ax: Axes | None = None,
    title: str = "",
    xlabel: str = "",
) -> Axes:
    """One row an arm: its runs as faint dots, its mean with the 95% interval as a bar. ``values``: name -> ``[seeds]``."""
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 1.1 + 0.36 * len(values)))[1]
    for row, (_, runs) in enumerate(values.items()):
        runs = np.asarray(runs, dtype=float)
        mean, low, high = band(runs[:, None])
        ax.plot(runs, np.full(len(runs), row + 0.22), "o", color=FAINT, markersize=3, alpha=0.7)
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


def landscape(
    surface: Callable[[Tensor], Tensor],
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    *,
    ax: Axes | None = None,
    levels: int = 18,
    title: str = "",
) -> Axes:
    """Contours of ``surface`` (``[..., 2] -> [...]``), spaced evenly in the logarithm of the height above the lowest point shown."""
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
    ax.plot(points[:, 0], points[:, 1], "-", color=colour, linewidth=1.2, label=name)
    ax.plot(points[:, 0], points[:, 1], ".", color=colour, markersize=3, label="_")
    ax.plot(*points[-1], MARKERS[index % len(MARKERS)], color=colour, markersize=7, markeredgecolor="white", label="_")


# name -> centre (x, y), what it decides, its chapters
SLOTS: dict[str, tuple[tuple[float, float], str, str]] = {
    "data": ((1.2, 2.9), "what the network sees", "1"),
    "batch": ((3.6, 2.9), "how many examples\nmake a gradient", "4"),
    "model": ((6.0, 2.9), "network in,\nnetwork out", "8, 11–14"),
    "objective": ((8.4, 2.9), "what is minimised", "5, 9"),
    "optimizer": ((8.4, 1.1), "how a gradient\nbecomes a step", "2"),
    "schedule": ((6.0, 1.1), "how large the step is,\nwhen", "3"),
    "stopping": ((3.6, 1.1), "when it is over", "6"),
    "execution": ((1.2, 1.1), "on what it runs", "7, 10, 15"),
}
_FLOW = (("data", "batch"), ("batch", "model"), ("model", "objective"), ("objective", "optimizer"),
         ("schedule", "optimizer"), ("optimizer", "model"), ("stopping", "batch"))  # fmt: skip


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
    for name, ((x, y), decides, chapters) in SLOTS.items():
        on = name in lit
        box = FancyBboxPatch((x - 1.0, y - 0.5), 2.0, 1.0, boxstyle="round,pad=0.02,rounding_size=0.12",
                             facecolor=PALETTE[4] if on else "#f2f2f2", edgecolor=INK if on else FAINT,
                             linewidth=2 if on else 1)  # fmt: skip
        ax.add_patch(box)
        ax.text(x, y + 0.3, name, ha="center", va="center", fontsize=11, weight="bold", color=INK)
        ax.text(x, y - 0.05, decides, ha="center", va="center", fontsize=8, color=INK, linespacing=1.1)
        word = "chapters" if any(mark in chapters for mark in ",–") else "chapter"
        ax.text(x, y - 0.38, f"{word} {chapters}", ha="center", va="center", fontsize=8, color="#555555")
    for start, end in _FLOW:
        ax.add_patch(_arrow(SLOTS[start][0], SLOTS[end][0]))
    for x, y, words in ((6.78, 1.92, "new weights"), (8.52, 2.0, "gradient"), (3.72, 2.0, "another epoch?")):
        ax.text(x, y, words, fontsize=8, color="#555555", ha="right" if x == 6.78 else "left", va="center")
    ax.set(xlim=(0.05, 9.55), ylim=(0.5, 3.5), aspect="equal")
    ax.set_axis_off()
    where = " and ".join(lit)
    ax.set_title(f"The training loop; this chapter changes the slot “{where}”" if lit else "The training loop, one slot "
                 "for each kind of technique", fontsize=11)  # fmt: skip
    return fig


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> FancyArrowPatch:
    """An arrow from the edge of the box around ``start`` to the edge of the box around ``end``."""
    (x0, y0), (x1, y1) = start, end
    half_width, half_height = 1.06, 0.56
    dx, dy = x1 - x0, y1 - y0
    reach = min(half_width / abs(dx) if dx else np.inf, half_height / abs(dy) if dy else np.inf)
    tail, head = (x0 + reach * dx, y0 + reach * dy), (x1 - reach * dx, y1 - reach * dy)
    return FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=11, color="#555555", linewidth=1.3)
