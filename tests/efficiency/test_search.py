"""Spaces counted out, fronts by brute force, areas by Monte Carlo, searches on problems whose answer is known."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from course_lib.efficiency import search as s
from course_lib.efficiency.search import Architecture, Candidate, Point, SearchSpace, Stage

SMALL = SearchSpace(widths=((4, 8), (8, 16, 32)), kinds=("full", "depthwise_separable"), kernels=(3, 5), depths=(1, 2))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(count: int, seed: int, levels: int = 6) -> list[Point]:
    """On a coarse grid, so that many are equal in one or both."""
    drawn = torch.randint(levels, (count, 2), generator=generator(seed)).tolist()
    return [(float(a), float(b)) for a, b in drawn]


# --- The space --------------------------------------------------------------------------------------------------------


def test_a_space_counted_out() -> None:
    every = [*SMALL]
    assert len(SMALL) == len(every) == len(set(every)) == (2 * 2 * 2 * 2) * (2 * 2 * 3 * 2)
    assert every[0] == (Stage("full", 3, 4, 1), Stage("full", 3, 8, 1))
    assert all(each in SMALL for each in every)
    assert (Stage("full", 7, 4, 1), Stage("full", 3, 8, 1)) not in SMALL
    assert every[0][:1] not in SMALL
    assert "full" not in SMALL
    assert SMALL.largest == (Stage("full", 5, 8, 2), Stage("full", 5, 32, 2))
    assert SMALL.smallest == (Stage("depthwise_separable", 3, 4, 1), Stage("depthwise_separable", 3, 8, 1))
    assert len(SearchSpace()) == 16**3


def test_samples_are_uniform_and_repeat() -> None:
    space = SearchSpace(widths=((4, 8, 16),), kernels=(3,), depths=(1,))
    draws, again = (generator(1), generator(1))
    found = Counter(space.sample(draws) for _ in range(3000))
    assert len(found) == 6
    assert all(abs(count - 500) < 5 * math.sqrt(500) for count in found.values())
    assert [space.sample(again) for _ in range(3)] == [space.sample(g) for g in [generator(1)] for _ in range(3)]
    torch.manual_seed(3)
    first = space.sample()
    torch.manual_seed(3)
    assert space.sample() == first


def test_a_mutation_makes_one_choice_otherwise() -> None:
    draws, parent = generator(), SMALL.largest
    changed: Counter[int] = Counter()
    for _ in range(400):
        child = SMALL.mutated(parent, draws)
        assert child in SMALL
        places = [n for n, (a, b) in enumerate(zip(s.flat(child), s.flat(parent), strict=True)) if a != b]
        assert len(places) == 1
        changed[places[0]] += 1
    assert len(changed) == 8
    fixed = SearchSpace(widths=((4, 8),), kinds=("full",), kernels=(3,), depths=(1,))
    assert {fixed.mutated(fixed.largest, draws) for _ in range(5)} == {fixed.smallest}


def test_a_child_has_each_choice_of_a_parent() -> None:
    draws, mother, father = generator(), SMALL.largest, SMALL.smallest
    children = [SMALL.crossed(mother, father, draws) for _ in range(400)]
    for number, pair in enumerate(zip(s.flat(mother), s.flat(father), strict=True)):
        counts = Counter(s.flat(child)[number] for child in children)
        assert counts.keys() == set(pair)
        assert abs(counts[pair[0]] - 200) < 60


# --- Two aims ---------------------------------------------------------------------------------------------------------


def beats(a: Point, b: Point) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


def front_by_force(given: Sequence[Point]) -> set[int]:
    return {n for n, p in enumerate(given) if not any(beats(q, p) for q in given)}


@pytest.mark.parametrize("seed", range(20))
def test_the_front_by_brute_force(seed: int) -> None:
    given = points(1 + seed, seed)
    found = s.pareto_front(given)
    assert set(found) == front_by_force(given)
    assert len(found) == len(set(found))
    costs = [given[n][0] for n in found]
    assert costs == sorted(costs)
    assert s.pareto_front([]) == []


@pytest.mark.parametrize("seed", range(10))
def test_the_ranks_by_brute_force(seed: int) -> None:
    given = points(15, seed)
    found, left, rank = s.ranks(given), set(range(15)), 0
    while left:
        front = {n for n in left if not any(beats(given[m], given[n]) for m in left)}
        assert {n for n in left if found[n] == rank} == front
        left, rank = left - front, rank + 1
    assert s.ranks([]) == []


def test_infinite_errors_are_the_worst_and_nan_is_refused() -> None:
    inf = math.inf
    given = [(1.0, inf), (2.0, 0.5), (3.0, inf), (inf, inf), (1.0, inf)]
    assert set(s.pareto_front(given)) == front_by_force(given) == {0, 4, 1}
    assert s.ranks(given) == [0, 0, 1, 2, 0]
    assert s.ranks([(1.0, inf)]) == [0]
    assert not any(math.isnan(found) for found in s.crowding(given))
    with pytest.raises(ValueError, match=r"points=\(1.0, nan\): must be no NaN"):
        s.ranks([(1.0, math.nan), (1.0, 2.0)])


@pytest.mark.parametrize("seed", range(10))
def test_the_hypervolume_by_counting_squares(seed: int) -> None:
    """On a grid of whole numbers the area is a number of squares."""
    given, reference = points(8, seed, levels=9), (7.0, 6.0)
    squares = sum(
        any(cost <= i and error <= j for cost, error in given) for i, j in itertools.product(range(7), range(6))
    )
    assert s.hypervolume(given, reference) == squares
    assert s.hypervolume([], reference) == 0
    assert s.hypervolume([(8.0, 0.0), (0.0, 6.0)], reference) == 0
    assert s.hypervolume([(0.0, 8.0), (3.0, 2.0)], reference) == (7 - 3) * (6 - 2)


def test_the_hypervolume_by_monte_carlo() -> None:
    drawn = torch.rand(6, 2, generator=generator(), dtype=torch.float64)
    thrown = 1.2 * torch.rand(200_000, 2, generator=generator(1), dtype=torch.float64)
    share = (thrown[:, None] >= drawn).all(2).any(1).double().mean()
    area = s.hypervolume([(a, b) for a, b in drawn.tolist()], (1.2, 1.2))
    assert area == pytest.approx(float(share) * 1.2**2, rel=0.01)


def test_crowding_by_hand() -> None:
    """The paper's section III B: the sides of the box around a point, each as a part of the range."""
    given = [(0.0, 8.0), (6.0, 2.0), (1.0, 4.0), (10.0, 0.0)]
    found = s.crowding(given)
    assert found[0] == found[3] == math.inf
    assert found[2] == pytest.approx(6 / 10 + 6 / 8)
    assert found[1] == pytest.approx(9 / 10 + 4 / 8)
    assert s.crowding([(1.0, 1.0), (1.0, 1.0), (1.0, 1.0)])[1] == 0


def test_survivors_are_the_first_fronts_and_then_the_lonely() -> None:
    made = [Candidate(SMALL.largest, *p) for p in [(0, 8), (6, 2), (1, 4), (10, 0), (7, 7), (1.5, 3.9)]]
    order = s.survivors(made, 6)
    assert [each.point for each in order[-1:]] == [(7, 7)]
    assert {each.point for each in order[:2]} == {(0, 8), (10, 0)}
    # (6, 2): 8.5/10 + 3.9/8; (1.5, 3.9): 5/10 + 2/8; (1, 4): 1.5/10 + 4.1/8
    assert [each.point for each in order[2:5]] == [(6, 2), (1.5, 3.9), (1, 4)]
    assert s.survivors(made, 2) == order[:2]


def test_the_soft_target_by_the_papers_formula() -> None:
    fitness = s.soft_target(20.0, 0.07)
    found = Candidate(SMALL.largest, 40.0, 0.1)
    assert fitness(found) == pytest.approx(-0.9 * (40 / 20) ** -0.07, rel=1e-12)
    assert fitness(Candidate(SMALL.largest, 40.0, 1 - 0.9 * 2**0.07)) == pytest.approx(-0.9, rel=1e-12)


# --- Searches ---------------------------------------------------------------------------------------------------------

LARGE = SearchSpace(widths=tuple(tuple(range(1, 9)) for _ in range(4)), depths=(1, 2, 3))


def easy(stages: Architecture) -> Point:
    """Error falls with width and depth, the same for all kinds and kernels, which cost."""
    cost = sum(stage.width * stage.depth * (1 + (stage.kernel == 5)) * (1 + (stage.kind == "full")) for stage in stages)
    return cost / 384, 1 - sum(stage.width * stage.depth for stage in stages) / 96


def weighed(found: Candidate) -> float:
    return found.error + 0.5 * found.cost


SEARCHES: dict[str, Callable[..., s.Found]] = {
    "random": s.random_search,
    "ageing": lambda *given: s.ageing_evolution(*given, fitness=weighed, population=10, tournament=4),
    "nsga2": lambda *given: s.nsga2(*given, population=10),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_spends_its_budget_on_what_is_new(name: str) -> None:
    asked: list[Architecture] = []

    def evaluate(stages: Architecture) -> Point:
        asked.append(stages)
        return easy(stages)

    for budget in (1, 7, 10, 33):
        asked.clear()
        found = SEARCHES[name](LARGE, evaluate, budget, generator(4))
        assert len(found) == len(asked) == len(set(asked)) == budget
        assert [each.architecture for each in found.candidates] == asked
        assert all(each in LARGE for each in asked)
        assert [each.point for each in found.candidates] == [easy(each) for each in asked]
        assert SEARCHES[name](LARGE, easy, budget, generator(4)) == found, "the same generator, the same search"
    tiny = SearchSpace(widths=((4, 8),), kernels=(3,), depths=(1,))
    assert {each.architecture for each in SEARCHES[name](tiny, lambda _: (1, 1), 4, generator()).candidates} == {*tiny}


def test_evolution_finds_more_than_chance() -> None:
    """At equal budgets, over ten seeds, each by its own aim."""
    gains = {"ageing": [0.0] * 10, "nsga2": [0.0] * 10}
    for seed in range(10):
        by = {name: one(LARGE, easy, 120, generator(seed)) for name, one in SEARCHES.items()}
        gains["ageing"][seed] = by["random"].best(weighed)[-1] - by["ageing"].best(weighed)[-1]
        areas = {name: found.hypervolumes((1.0, 1.0))[-1] for name, found in by.items()}
        gains["nsga2"][seed] = areas["nsga2"] - areas["random"]
    assert min(gains["ageing"]) > 0
    assert sum(gain > 0 for gain in gains["nsga2"]) >= 9


def test_evolution_forgets_the_oldest() -> None:
    """Whatever is the first to be good dies after ``population`` others: later children are not its own."""
    population, parents = 5, []
    original = SearchSpace.mutated

    class Watched(SearchSpace):
        def mutated(self, parent: Architecture, generator: torch.Generator | None = None) -> Architecture:
            parents.append(parent)
            return original(self, parent, generator)

    space = Watched(LARGE.widths, depths=LARGE.depths)
    order = iter(range(1000))
    found = s.ageing_evolution(
        space,
        lambda _: (1.0, float(next(order))),
        40,
        generator(),
        fitness=lambda c: c.error,
        population=5,
        tournament=5,
    )
    at = {each.architecture: number for number, each in enumerate(found.candidates)}
    # the first evaluated is always the best here, and with tournaments of all: the oldest alive is the parent
    assert [at[parent] for parent in dict.fromkeys(parents)] == [*range(40 - population)]


def test_parents_are_those_that_win() -> None:
    """The better of two drawn from ten: at place 2.85 in the mean, where the worse would be at 6.15."""
    parents: list[Architecture] = []
    original = SearchSpace.crossed

    class Watched(SearchSpace):
        def crossed(
            self, mother: Architecture, father: Architecture, generator: torch.Generator | None = None
        ) -> Architecture:
            parents.extend((mother, father))
            return original(self, mother, father, generator)

    places = []
    for seed in range(5):
        parents.clear()
        found = s.nsga2(Watched(LARGE.widths, depths=LARGE.depths), easy, 20, generator(seed), population=10)
        order = [each.architecture for each in s.survivors(found.candidates[:10], 10)]
        places += [order.index(parent) for parent in parents]
    assert len(places) >= 100
    assert sum(places) / len(places) == pytest.approx(2.85, abs=0.7)


def test_evolution_begins_at_random() -> None:
    drawn, chance = (SEARCHES[name](LARGE, easy, 10, generator(9)) for name in ("ageing", "random"))
    assert drawn == chance
    assert SEARCHES["nsga2"](LARGE, easy, 10, generator(9)) == chance


def test_what_was_found() -> None:
    given = [(3.0, 0.5), (2.0, 0.6), (4.0, 0.7), (1.0, 0.9)]
    every = [*itertools.islice(SMALL, 4)]
    found = s.Found(tuple(Candidate(a, *p) for a, p in zip(every, given, strict=True)))
    assert [each.point for each in found.front] == [(1.0, 0.9), (2.0, 0.6), (3.0, 0.5)]
    assert found.best(lambda each: each.cost) == [3.0, 2.0, 2.0, 1.0]
    areas = found.hypervolumes((5.0, 1.0))
    assert areas == pytest.approx([1.0, 1.4, 1.4, 1.5])
    table = found.frame()
    assert table["cost"].tolist() == [3.0, 2.0, 4.0, 1.0]
    assert table["error"].tolist() == [0.5, 0.6, 0.7, 0.9]
    assert table["front"].tolist() == [True, True, False, True]
    assert table["architecture"].tolist() == every


def test_kendalls_tau_by_pairs() -> None:
    a, b = [3.0, 1.0, 4.0, 2.0, 5.0], [2.0, 1.0, 5.0, 3.0, 4.0]
    pairs = [*itertools.combinations(range(5), 2)]
    wanted = sum(math.copysign(1, (a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs) / len(pairs)
    assert s.rank_correlation(a, b) == pytest.approx(wanted, rel=1e-12)
    assert s.rank_correlation(a, [-x for x in a]) == pytest.approx(-1)


def test_bad_input_is_named() -> None:
    parent, draws = SMALL.largest, generator()
    other = (Stage("full", 3, 5, 1), Stage("full", 3, 8, 1))
    single = SearchSpace(widths=((4,),), kinds=("full",), kernels=(3,), depths=(1,))
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("widths=(): must be", lambda: SearchSpace(widths=())),
        ("widths=((4,), ()): must be", lambda: SearchSpace(widths=((4,), ()))),
        ("kernels=(4,): must be odd", lambda: SearchSpace(kernels=(4,))),
        ("kernels=(): must be some", lambda: SearchSpace(kernels=())),
        ("depths=(0,): must be", lambda: SearchSpace(depths=(0,))),
        ("kinds=(): must be", lambda: SearchSpace(kinds=())),
        ("width of (0, 4)=0: must be", lambda: SearchSpace(widths=((0, 4),))),
        ("must be an architecture of the space", lambda: SMALL.mutated(other, draws)),
        ("space=1: must be", lambda: single.mutated(single.largest, draws)),
        ("father=", lambda: SMALL.crossed(parent, other, draws)),
        ("target=0: must be", lambda: s.soft_target(0)),
        ("weight=-1: must be", lambda: s.soft_target(1, -1)),
        ("budget=0: must be", lambda: s.random_search(SMALL, easy, 0, draws)),
        ("budget=385: must be at most the 384", lambda: s.nsga2(SMALL, easy, 385, draws)),
        ("population=1: must be", lambda: s.nsga2(SMALL, easy, 3, draws, population=1)),
        (
            "tournament=9: must be at most population=8",
            lambda: s.ageing_evolution(SMALL, easy, 3, draws, fitness=weighed, population=8, tournament=9),
        ),
        ("b=1: must be as many", lambda: s.rank_correlation([1, 2], [1])),
        ("number of scores=1: must be", lambda: s.rank_correlation([1], [1])),
        ("a=[1, 1]: must be scores that differ", lambda: s.rank_correlation([1, 1], [1, 2])),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
