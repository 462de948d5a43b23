"""Timelines of pipelines, drawn: one row a rank, one block a task, the number of its micro-batch in it."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from course_lib.lab import plotting
from course_lib.partitioning.schedules import Kind, Span, Timeline

# light, middle, dark: told apart in a grey print, too
COLOURS: dict[Kind, str] = {"F": "#BFE3F7", "B": plotting.PALETTE[4], "I": plotting.PALETTE[4], "W": "#00664B"}
WORDS: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "backward: inputs",
    "W": "backward: weights",
}
HALF = 0.43  # of a block's height
WRITABLE = 1 / 45  # share of the width that a block needs for its number


def draw_timeline(times: Timeline, ax: Axes | None = None, *, title: str = "", unit: str = "") -> Axes:
    """Draw what each rank does when; what is left white is the bubble.

    Blocks that are wide enough bear the number of their micro-batch. ``unit`` is that of the time axis.
    """
    ax = ax if ax is not None else plt.subplots(figsize=(8, 0.6 + 0.35 * times.ranks))[1]
    whole = times.makespan
    for kind in COLOURS:
        spans = [span for span in times.spans if span.task.kind == kind]
        if not spans:
            continue
        corners = [_corners(span) for span in spans]
        blocks = PolyCollection(corners, label=WORDS[kind], facecolor=COLOURS[kind], edgecolor="white", linewidth=0.6)
        ax.add_collection(blocks)  # one object for all: a bar each would take most of an explorer's time
        for span in spans:
            if span.end - span.start >= whole * WRITABLE and len(times.spans) <= 200:
                middle = (span.start + span.end) / 2
                ink = "white" if kind == "W" else plotting.INK
                ax.text(middle, span.rank, f"{span.task.batch + 1}", ha="center", va="center", fontsize=8, color=ink)
    ax.set_yticks(range(times.ranks), [f"rank {rank}" for rank in range(times.ranks)])
    ax.set(xlim=(0, whole), ylim=(times.ranks - 0.5, -0.5), title=title, xlabel=f"time ({unit})" if unit else "")
    ax.grid(visible=False)
    return ax


def _corners(span: Span) -> list[tuple[float, float]]:
    low, high = span.rank - HALF, span.rank + HALF
    return [(span.start, low), (span.end, low), (span.end, high), (span.start, high)]
