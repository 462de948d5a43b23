"""Scaling against the figures of the paper, the law, and what is counted from networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from course_lib.efficiency import scaling_networks as s
from course_lib.efficiency.cheap_layers import family
from course_lib.efficiency.scaling_networks import Coefficients, Factors, Size
from course_lib.lab.costs import flops

BASE = Size(2, 16, 16)


def test_the_papers_proportions() -> None:
    """1.2 * 1.1**2 * 1.15**2 is 1.92, "about 2"; B4's published factors are near phi = 4."""
    given = Coefficients()
    assert given.growth == pytest.approx(1.2 * 1.1 * 1.1 * 1.15 * 1.15, rel=1e-12)
    depth, width, resolution = given.at(3)
    assert (depth, width, resolution) == pytest.approx((1.728, 1.331, 1.520875), rel=1e-12)
    assert given.at(0) == Factors(1, 1, 1)


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0, 7.3])
def test_each_way_spends_the_budget(times: float) -> None:
    for direction in ("depth", "width", "resolution"):
        found = s.single(direction, times)
        assert found.cost == pytest.approx(times, rel=1e-12)
        others = [value for name, value in found._asdict().items() if name != direction]
        assert others == [1.0, 1.0]
    assert s.compound(times).cost == pytest.approx(times, rel=1e-12)
    other = Coefficients(1.0, 1.3, 1.1)
    assert s.compound(times, other).cost == pytest.approx(times, rel=1e-12)
    assert s.compound(times, other).depth == 1.0
    assert s.compound(other.growth**2, other).width == pytest.approx(1.3**2, rel=1e-12)


def test_the_law_is_what_is_counted_from_a_deep_wide_network() -> None:
    """Stem and head are a small part of it; whole numbers are exact here."""
    base = Size(8, 32, 16)
    for factors in (Factors(2, 1, 1), Factors(1, 2, 1), Factors(1, 1, 2), Factors(2, 2, 2)):
        found = s.family_multiplications(base.times(factors)[0]) / s.family_multiplications(base)
        assert found == pytest.approx(factors.cost, rel=0.06)
    # and resolution exactly, but for the head
    head = 4 * 32 * 10
    small, large = (s.family_multiplications(size) - head for size in (base, Size(8, 32, 32)))
    assert large == 4 * small


@pytest.mark.parametrize("block", ["full", "inverted_residual"])
def test_budgets_are_met_as_counted(block: str) -> None:
    table = s.scaled_sizes(BASE, 4.0, partial(s.family_multiplications, block=block, channels=3))
    base = flops(family((3, 16, 16), 10, block=block, width=16, depth=2).eval(), torch.zeros(1, 3, 16, 16))
    for _, row in table.iterrows():
        depth, width, resolution = (int(row[name]) for name in ("depth", "width", "resolution"))
        model = family((3, resolution, resolution), 10, block=block, width=width, depth=depth).eval()
        counted = flops(model, torch.zeros(1, 3, resolution, resolution))
        assert counted == 2 * row["multiplications"]
        assert counted / base == pytest.approx(4.0, rel=0.05)
        assert row["budget"] == pytest.approx(counted / base / 4, rel=1e-12)
    assert [*table.index] == ["depth", "width", "resolution", "compound"]
    rows = table.to_dict("index")
    assert (rows["width"]["depth"], rows["width"]["resolution"]) == (2, 16)
    assert all(rows["compound"][name] > before for name, before in zip(table.columns, BASE.whole, strict=False))


@pytest.mark.parametrize("times", [0.3, 1.0, 3.0])
def test_the_nearest_is_the_nearest_of_all(times: float) -> None:
    """By brute force over widths."""
    wanted = times * s.family_multiplications(BASE)
    ratios = {w: s.family_multiplications(Size(2, w, 16)) / wanted for w in range(1, 60)}
    best = min(ratios, key=lambda w: max(ratios[w], 1 / ratios[w]))
    assert s.nearest(BASE, partial(s.single, "width"), times) == Size(2, best, 16)


def test_candidates_are_all_that_fit() -> None:
    found = s.candidates(step=0.1, tolerance=0.1)
    grid = [1 + k / 10 for k in range(13)]
    wanted = {
        (round(a, 6), round(b, 6), round(c, 6))
        for a in grid
        for b in grid
        for c in grid
        if 1.8 - 1e-9 <= a * b * b * c * c <= 2.2 + 1e-9
    }
    assert {(each.alpha, each.beta, each.gamma) for each in found} == wanted
    assert len(found) == len(wanted)
    papers = Coefficients()
    assert papers in s.candidates(step=0.05)
    assert Coefficients(2.0, 1.0, 1.0) in s.candidates()


def test_sizes_are_whole() -> None:
    found = BASE.times(Factors(1.3, 1.22, 0.01))
    assert found == [Size(2, 19, 1), Size(2, 20, 1), Size(3, 19, 1), Size(3, 20, 1)]
    assert BASE.times(Factors(2, 1, 1)) == [Size(4, 16, 16)]
    assert BASE.whole == (2, 16, 16)


def test_bad_input_is_named() -> None:
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("alpha=0.9: must be", lambda: Coefficients(alpha=0.9)),
        ("gamma=inf: must be", lambda: Coefficients(gamma=float("inf"))),
        ("alpha, beta, gamma=1: must be not 1", lambda: Coefficients(1, 1, 1)),
        ("direction='height': must be one of depth", lambda: s.single("height", 2.0)),  # type: ignore[arg-type]
        ("times=0: must be", lambda: s.single("depth", 0)),
        ("times=-1: must be", lambda: s.compound(-1)),
        ("times=0: must be", lambda: s.nearest(BASE, s.compound, 0)),
        ("growth=1: must be", lambda: s.candidates(growth=1)),
        ("step=0: must be", lambda: s.candidates(step=0)),
        ("depth=0: must be", lambda: Size(0, 1, 1)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
