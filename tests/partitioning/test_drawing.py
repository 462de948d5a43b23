"""What a drawn timeline shows."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from course_lib.partitioning.drawing import COLOURS, WORDS, draw_timeline
from course_lib.partitioning.schedules import Costs, gpipe, timeline, zero_bubble


def test_blocks_are_the_tasks() -> None:
    times = timeline(zero_bubble(2, 3), Costs(forward=2.0))
    ax = draw_timeline(times, title="two ranks", unit="s")
    drawn = {blocks.get_label(): [path.vertices for path in blocks.get_paths()] for blocks in ax.collections}
    assert set(drawn) == {WORDS[kind] for kind in "FIW"}  # type: ignore[index]
    for kind, name in (("F", "forward"), ("I", "backward: inputs"), ("W", "backward: weights")):
        expected = [(s.start, s.end, s.rank) for s in times.spans if s.task.kind == kind]
        found = [(v[:, 0].min(), v[:, 0].max(), v[:4, 1].mean()) for v in map(np.asarray, drawn[name])]
        np.testing.assert_allclose(found, expected, atol=1e-12)
    assert ax.get_title(loc="left") == "two ranks"
    assert ax.get_xlabel() == "time (s)"
    assert [text.get_text() for text in ax.texts].count("3") == 6  # the third micro-batch, three times on each rank
    assert ax.get_ylim()[0] > ax.get_ylim()[1], "rank 0 stands above"
    plt.close("all")


def test_many_blocks_bear_no_numbers() -> None:
    ax = draw_timeline(timeline(gpipe(8, 16)))
    assert not ax.texts
    assert len(COLOURS) == len(WORDS) == 4
    plt.close("all")


@pytest.fixture(autouse=True)
def _style() -> None:
    from course_lib.lab import plotting

    plotting.style()
