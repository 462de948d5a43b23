"""Schedules against torch's own tables, and their bubbles and memory against the formulas."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as theirs

from course_lib.partitioning import schedules
from course_lib.partitioning.schedules import (
    SCHEDULES,
    Costs,
    Schedule,
    Task,
    bubble_formula,
    gpipe,
    in_flight,
    in_flight_formula,
    interleaved,
    naive,
    one_f_one_b,
    timeline,
    zero_bubble,
    zero_bubble_h2,
)

SIZES = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 4, 8, 16, 24)]


def fits(name: str, ranks: int, batches: int) -> bool:
    """Whether a schedule is for such numbers, and its formula too."""
    return (name != "interleaved" or batches % ranks == 0) and (name != "zero_bubble" or batches >= ranks)


@pytest.mark.parametrize("name", SCHEDULES)
def test_bubble_and_memory_are_the_formulas(name: str) -> None:
    tried = [(p, m) for p, m in SIZES if fits(name, p, m)]
    assert len(tried) > 8
    for ranks, batches in tried:
        schedule = SCHEDULES[name](ranks, batches)
        assert timeline(schedule).bubble == pytest.approx(bubble_formula(name, ranks, batches), abs=1e-12)
        assert in_flight(schedule) == tuple(in_flight_formula(name, ranks, batches, r) for r in range(ranks))


@pytest.mark.parametrize("chunks", [1, 3])
def test_more_stages_a_rank(chunks: int) -> None:
    schedule = interleaved(4, 8, chunks)
    assert timeline(schedule).bubble == pytest.approx(bubble_formula("interleaved", 4, 8, chunks=chunks))
    assert in_flight(schedule) == tuple(in_flight_formula("interleaved", 4, 8, r, chunks=chunks) for r in range(4))
    assert schedule.home == tuple(s % 4 for s in range(4 * chunks))


def test_by_hand() -> None:
    assert [" ".join(map(str, rank)) for rank in one_f_one_b(2, 3).ranks] == [
        "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2",
        "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2",
    ]
    assert [" ".join(map(str, rank)) for rank in zero_bubble(2, 3).ranks] == [
        "F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2",
        "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2",
    ]
    times = timeline(gpipe(2, 1), Costs(forward=[1.0, 2.0], inputs=3.0, weights=4.0, send=0.5))
    assert [(s.rank, str(s.task), s.start, s.end) for s in times.spans] == [
        (0, "F0.0", 0, 1),
        (1, "F1.0", 1.5, 3.5),
        (1, "B1.0", 3.5, 10.5),
        (0, "B0.0", 11, 18),
    ]
    assert times.makespan == times.period == 18
    assert times.busy == (8, 9)
    assert times.bubble == pytest.approx(1 - 17 / 36)


@pytest.mark.parametrize(("ranks", "batches"), [(2, 3), (4, 7), (4, 12), (8, 15)])
def test_h2_leaves_no_gap_for_twice_the_memory(ranks: int, batches: int) -> None:
    schedule = zero_bubble_h2(ranks, batches)
    assert timeline(schedule).period == 3 * batches
    assert set(in_flight(schedule)) == {2 * ranks - 1}
    assert timeline(zero_bubble(ranks, batches)).period > 3 * batches


def test_zero_bubble_takes_what_the_paper_says_for_other_costs() -> None:
    """Section 2: each rank waits (p - 1)(F + I - W), 1F1B (p - 1)(F + I + W)."""
    costs = Costs(forward=1.0, inputs=1.25, weights=0.5)
    work = 12 * 2.75
    assert timeline(zero_bubble(4, 12), costs).makespan == pytest.approx(work + 3 * (1 + 1.25 - 0.5))
    assert timeline(one_f_one_b(4, 12), costs).makespan == pytest.approx(work + 3 * 2.75)


def test_messages_that_take_time_make_the_bubble_larger() -> None:
    still = timeline(one_f_one_b(4, 8)).bubble
    assert timeline(one_f_one_b(4, 8), Costs(send=0.5)).bubble > still
    assert timeline(one_f_one_b(4, 8), Costs(forward=[1, 1, 2, 1])).bubble > still


# --- torch's tables ---------------------------------------------------------------------------------------------------


def stage_of(index: int, stages: int, ranks: int) -> Any:
    """What torch's schedules ask of a stage; none is computed here."""
    return SimpleNamespace(
        stage_index=index,
        num_stages=stages,
        group_size=ranks,
        group_rank=0,
        group=None,
        is_first=index == 0,
        is_last=index == stages - 1,
        submod=torch.nn.Identity(),
        has_backward=True,
        device=torch.device("cpu"),
        stage_index_to_group_rank=None,
    )


def read(actions: Any) -> list[Task]:
    """Torch writes stage, kind and micro-batch as 0F1; it has actions that are no passes as well."""
    found = [re.fullmatch(r"(\d+)([FBIW])(\d+)", str(action)) for action in actions]
    return [Task(one[2], int(one[1]), int(one[3])) for one in found if one]  # type: ignore[arg-type]


def of_torch(name: str, table: dict[int, Any], stages: int, batches: int) -> Schedule:
    return Schedule(name, stages, batches, tuple(tuple(read(actions)) for _, actions in sorted(table.items())))


@pytest.mark.parametrize(("ranks", "batches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 12, 3)])
def test_interleaved_is_torchs(ranks: int, batches: int, chunks: int) -> None:
    stages = [stage_of(k * ranks, chunks * ranks, ranks) for k in range(chunks)]
    engine = theirs.ScheduleInterleaved1F1B(stages, batches)
    expected = of_torch("interleaved", engine.pipeline_order, ranks * chunks, batches)
    assert interleaved(ranks, batches, chunks) == expected


@pytest.mark.parametrize(("ranks", "batches"), [(2, 4), (4, 8), (4, 4)])
def test_gpipe_and_1f1b_are_torchs(ranks: int, batches: int) -> None:
    for make, cls in ((gpipe, theirs.ScheduleGPipe), (one_f_one_b, theirs.Schedule1F1B)):
        table = cls(stage_of(0, ranks, ranks), batches)._get_pipeline_order()
        assert table is not None
        # the last rank's forward passes of 1F1B are counted from 1 in torch 2.13's table (not in what it executes)
        for rank in range(ranks - 1):
            assert read(table[rank]) == list(make(ranks, batches).ranks[rank])


def test_torchs_other_tables_run_here() -> None:
    """Two stages a rank in a V: rank 0 has the first and the last. With F = I = W nobody waits but at the ends."""
    ranks, batches = 4, 8
    stages = [stage_of(s, 2 * ranks, ranks) for s in (0, 2 * ranks - 1)]
    found = of_torch("v", theirs.ScheduleZBVZeroBubble(stages, batches).pipeline_order, 2 * ranks, batches)
    assert found.home == (0, 1, 2, 3, 3, 2, 1, 0)
    assert timeline(found).period == 2 * 3 * batches
    assert max(in_flight(found)) == 2 * ranks


# --- At the door ------------------------------------------------------------------------------------------------------


def test_a_table_must_be_whole_and_able_to_run() -> None:
    f, b = Task("F", 0, 0), Task("B", 0, 0)
    with pytest.raises(ValueError, match=r"ranks='B0.0': must be every task once"):
        Schedule("mine", 1, 1, ((f,),))
    with pytest.raises(ValueError, match=r"ranks='F0.0': must be every task once"):
        Schedule("mine", 1, 1, ((f, b, f),))
    with pytest.raises(ValueError, match=r"ranks=\[0, 1\]: must be one rank for stage 0"):
        Schedule("mine", 1, 1, ((f,), (b,)))
    with pytest.raises(ValueError, match=r"\['B0.0'\].*wait for one another"):
        Schedule("mine", 1, 1, ((b, f),))


@pytest.mark.parametrize("make", [naive, gpipe, one_f_one_b, interleaved, zero_bubble, zero_bubble_h2])
def test_numbers_below_one(make: Any) -> None:
    with pytest.raises(ValueError, match=r"ranks=0"):
        make(0, 4)
    with pytest.raises(ValueError, match=r"batches=0"):
        make(2, 0)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"batches=6: must be a multiple of ranks=4"):
        interleaved(4, 6)
    with pytest.raises(ValueError, match=r"name='zb'"):
        bubble_formula("zb", 2, 2)
    with pytest.raises(ValueError, match=r"name='zb'"):
        in_flight_formula("zb", 2, 2, 0)
    with pytest.raises(ValueError, match=r"rank=2: must be from 0 to 1"):
        in_flight_formula("gpipe", 2, 2, 2)
    with pytest.raises(ValueError, match=r"costs=-1"):
        timeline(schedules.gpipe(2, 2), Costs(forward=-1))
