r"""Architecture search: a space of networks, ways to look through it on a budget, and what "better" means for two aims.

======================  ====================================================  ========================================
name                    what it does or gives                                 source
======================  ====================================================  ========================================
``SearchSpace``         networks as choices: counted, drawn, mutated,
                        crossed
*two aims at once*
``pareto_front``        what nothing else beats in both                       Pareto; Deb et al. 2002
``hypervolume``         the area that a front covers                          Zitzler & Thiele 1998, PPSN V
``ranks``, ``crowding`` front after front, and how lonely each point is       Deb et al. 2002 (NSGA-II), IEEE Trans.
                                                                              Evol. Comput. 6(2)
``soft_target``         two aims in one number                                Tan et al. 2018 (MnasNet),
                                                                              arXiv:1807.11626
*searches*
``random_search``       draws anew each time                                  Li & Talwalkar 2019, arXiv:1902.07638
``ageing_evolution``    mutates the best of a few, the oldest dies            Real et al. 2018, arXiv:1802.01548
``nsga2``               crosses and mutates, keeps the spread-out front       Deb et al. 2002
*what is believed*
``rank_correlation``    whether a cheap score orders networks rightly         Kendall 1938, Biometrika 30
======================  ====================================================  ========================================

All searches take the same arguments and spend the same budget: so many architectures evaluated, each a new one. A point
is ``(cost, error)``; less is better in both. ``supernet`` has the networks, and scores for them that cost little.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd
import torch

from course_lib.lab.arguments import at_least, is_number, is_whole, require

# --- The space --------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """Some blocks of one kind: their kernel, their channels, how many there are."""

    kind: str
    kernel: int
    width: int
    depth: int


Architecture = tuple[Stage, ...]


@dataclass(frozen=True)
class SearchSpace:
    """What each stage of a network may be. Iterating gives every architecture, ``len`` says how many there are.

    Parameters
    ----------
    widths : of each stage the channels that it may have; so many stages there are.
    kinds : blocks, by their names in ``cheap_layers.BLOCKS``.
    kernels : their kernels, odd.
    depths : how many blocks a stage may have.

    Raises
    ------
    ValueError : there is nothing to choose from somewhere, a number is below 1, or a kernel is even.
    """

    widths: tuple[tuple[int, ...], ...] = ((8, 16), (16, 32), (32, 64))
    kinds: tuple[str, ...] = ("full", "depthwise_separable")
    kernels: tuple[int, ...] = (3, 5)
    depths: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        require("widths", self.widths, lambda w: w and all(w), "channels to choose from for each of some stages")
        for name, least in (("kernels", 1), ("depths", 1)):
            allowed = f"some whole numbers of at least {least}"
            require(name, getattr(self, name), lambda v: v and all(is_whole(n) and n >= 1 for n in v), allowed)
        require("kernels", self.kernels, lambda v: all(n % 2 for n in v), "odd")
        require("kinds", self.kinds, bool, "the names of some blocks")
        for options in self.widths:
            at_least(1, **{f"width of {options}": min(options)})

    @property
    def choices(self) -> list[tuple[Any, ...]]:
        """What may be chosen, in the order of an architecture's numbers: kind, kernel, width, depth of each stage."""
        return [options for widths in self.widths for options in (self.kinds, self.kernels, widths, self.depths)]

    def __len__(self) -> int:
        return math.prod(map(len, self.choices))

    def __iter__(self) -> Iterator[Architecture]:
        return map(architecture, itertools.product(*self.choices))

    def __contains__(self, item: object) -> bool:
        genes = flat(item) if isinstance(item, tuple) else ()
        choices = self.choices
        return len(genes) == len(choices) and all(g in options for g, options in zip(genes, choices, strict=True))

    @property
    def largest(self) -> Architecture:
        """The widest, deepest, with the largest kernels and the first kind."""
        return tuple(Stage(self.kinds[0], max(self.kernels), max(w), max(self.depths)) for w in self.widths)

    @property
    def smallest(self) -> Architecture:
        """The narrowest, shallowest, with the smallest kernels and the last kind."""
        return tuple(Stage(self.kinds[-1], min(self.kernels), min(w), min(self.depths)) for w in self.widths)

    def sample(self, generator: torch.Generator | None = None) -> Architecture:
        """Draw each choice uniformly; without a generator from torch's global one."""
        return architecture([_one_of(options, generator) for options in self.choices])

    def mutated(self, parent: Architecture, generator: torch.Generator | None = None) -> Architecture:
        """Return the parent with one choice made otherwise.

        Raises
        ------
        ValueError : the space has a single architecture, or ``parent`` is not in it.
        """
        require("parent", parent, self.__contains__, "an architecture of the space")
        require("space", len(self), lambda n: n > 1, "of more than one architecture")
        genes, choices = list(flat(parent)), self.choices
        free = [place for place, options in enumerate(choices) if len(options) > 1]
        place = _one_of(free, generator)
        genes[place] = _one_of([each for each in choices[place] if each != genes[place]], generator)
        return architecture(genes)

    def crossed(
        self, mother: Architecture, father: Architecture, generator: torch.Generator | None = None
    ) -> Architecture:
        """Return an architecture with each choice of one of the two parents, at random.

        Raises
        ------
        ValueError : a parent is not in the space.
        """
        for name, parent in {"mother": mother, "father": father}.items():
            require(name, parent, self.__contains__, "an architecture of the space")
        pairs = zip(flat(mother), flat(father), strict=True)
        return architecture([_one_of(pair, generator) for pair in pairs])


def flat(stages: Sequence[Any]) -> tuple[Any, ...]:
    """Return an architecture's choices one after the other."""
    return tuple(gene for stage in stages if isinstance(stage, tuple) for gene in stage)


def architecture(genes: Sequence[Any]) -> Architecture:
    """Return the architecture of such choices."""
    size = len(Stage._fields)
    return tuple(Stage(*genes[start : start + size]) for start in range(0, len(genes), size))


def _one_of(options: Sequence[Any], generator: torch.Generator | None) -> Any:
    return options[int(torch.randint(len(options), (), generator=generator))]


# --- Two aims ---------------------------------------------------------------------------------------------------------

Point = tuple[float, float]
"""Cost and error; less is better in both."""


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Return the numbers of the points that no other beats, from the cheapest to the
    dearest.

    One beats another if it is no worse in either and better in one. Equal points stay
    together. Infinity is the worst there is.

    Raises
    ------
    ValueError : a number of a point is NaN, which is neither better nor worse.
    """
    for point in points:
        require("points", point, lambda p: p[0] == p[0] and p[1] == p[1], "no NaN")
    front: list[int] = []
    for number in sorted(range(len(points)), key=lambda n: points[n]):
        last = points[front[-1]] if front else None
        if not last or points[number][1] < last[1] or points[number] == last:
            front.append(number)
    return front


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Return the area of what some point beats, up to the reference, which is to be
    worse than all that counts.

    Points beyond the reference add nothing. The more, the better the front, in both
    aims.
    """
    inside = [p for p in points if p[0] < reference[0] and p[1] < reference[1]]
    area, above = 0.0, reference[1]
    for cost, error in (inside[number] for number in pareto_front(inside)):
        area += (reference[0] - cost) * (above - error)
        above = error
    return area


def ranks(points: Sequence[Point]) -> list[int]:
    """Return for each point the front that it is on: 0 the first, 1 what is the front
    without it, and so on.
    """
    left, found, rank = list(range(len(points))), [0] * len(points), 0
    while left:
        front = {left[number] for number in pareto_front([points[n] for n in left])}
        for number in front:
            found[number] = rank
        left = [number for number in left if number not in front]
        rank += 1
    return found


def crowding(points: Sequence[Point]) -> list[float]:
    """Return how far apart each point's neighbours on its front are: summed over both
    aims, each as a part of the front's range. The ends get infinity.
    """
    found = [0.0] * len(points)
    for aim in (0, 1):
        order = sorted(range(len(points)), key=lambda n: points[n][aim])
        values = [points[number][aim] for number in order]
        spread = (values[-1] - values[0]) or 1.0
        found[order[0]] = found[order[-1]] = math.inf
        for place in range(1, len(order) - 1):
            gap = (values[place + 1] - values[place - 1]) / spread
            found[order[place]] += 0.0 if math.isnan(gap) else gap  # where both are infinite
    return found


def soft_target(target: float, weight: float = 0.07) -> Fitness:
    r"""Return a fitness, less being better: :math:`-(1-error)\,(cost/target)^{-weight}`.

    With weight 0.07 twice the cost is worth 5% more accuracy, as a part of it.

    Raises
    ------
    ValueError : the target is not above 0, or the weight below 0.
    """
    require("target", target, lambda x: is_number(x) and x > 0, "a number above 0")
    require("weight", weight, lambda x: is_number(x) and x >= 0, "a number of at least 0")
    return lambda found: -(1 - found.error) * (found.cost / target) ** -weight


# --- What a search finds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """An architecture that was evaluated: its cost, in any unit, and its error, a fraction."""

    architecture: Architecture
    cost: float
    error: float

    @property
    def point(self) -> Point:
        """Cost and error."""
        return self.cost, self.error


@dataclass(frozen=True)
class Found:
    """All that a search has evaluated, in its order."""

    candidates: tuple[Candidate, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.candidates)

    @property
    def front(self) -> list[Candidate]:
        """What no other beats, from the cheapest to the dearest."""
        return [self.candidates[number] for number in pareto_front([each.point for each in self.candidates])]

    def hypervolumes(self, reference: Point) -> list[float]:
        """The hypervolume after each evaluation."""
        points = [each.point for each in self.candidates]
        return [hypervolume(points[:count], reference) for count in range(1, len(points) + 1)]

    def best(self, fitness: Fitness) -> list[float]:
        """The least fitness after each evaluation."""
        return list(itertools.accumulate(map(fitness, self.candidates), min))

    def frame(self) -> pd.DataFrame:
        """A row for each evaluation: ``cost``, ``error``, whether it is on the ``front``, and the architecture."""
        on_front = {each.architecture for each in self.front}
        rows = [(each.cost, each.error, each.architecture in on_front, each.architecture) for each in self.candidates]
        return pd.DataFrame(rows, columns=["cost", "error", "front", "architecture"])


Evaluate = Callable[[Architecture], Point]
"""``architecture -> (cost, error)``."""
Fitness = Callable[[Candidate], float]
"""``candidate -> a number``; less is better."""

# --- Searches ---------------------------------------------------------------------------------------------------------


def random_search(
    space: SearchSpace, evaluate: Evaluate, budget: int, generator: torch.Generator
) -> Found:  # fmt: skip
    """Evaluate architectures drawn at random.

    Parameters
    ----------
    budget : how many are evaluated, each another one.

    Raises
    ------
    ValueError : the budget is below 1, or larger than the space.
    """
    _check(space, budget)
    found: dict[Architecture, Candidate] = {}
    while len(found) < budget:
        _add(found, evaluate, lambda: space.sample(generator), space, generator)
    return Found(tuple(found.values()))


def ageing_evolution(
    space: SearchSpace, evaluate: Evaluate, budget: int, generator: torch.Generator, *,
    fitness: Fitness, population: int = 16, tournament: int = 4,
) -> Found:  # fmt: skip
    """Mutate the best of a few that are drawn from a population, from which the oldest
    then goes, however good it is.

    So a network that was lucky once does not stay for ever (regularised evolution).

    Parameters
    ----------
    fitness : less is better; ``soft_target`` makes one of both aims.
    population : how many live at once; so many are drawn at random first.
    tournament : how many are drawn to find a parent.

    Raises
    ------
    ValueError : as ``random_search``; a number is below 1, or the tournament larger than
        the population.
    """
    _check(space, budget)
    at_least(1, population=population, tournament=tournament)
    allowed = f"at most population={population}"
    require("tournament", tournament, lambda n: n <= population, allowed)
    found: dict[Architecture, Candidate] = {}
    living: deque[Candidate] = deque(maxlen=population)

    def child() -> Architecture:
        if len(living) < population:
            return space.sample(generator)
        drawn = torch.randperm(population, generator=generator)[:tournament].tolist()
        parent = min((living[number] for number in drawn), key=fitness)
        return space.mutated(parent.architecture, generator)

    while len(found) < budget:
        living.append(_add(found, evaluate, child, space, generator))
    return Found(tuple(found.values()))


def nsga2(
    space: SearchSpace, evaluate: Evaluate, budget: int, generator: torch.Generator, *,
    population: int = 16,
) -> Found:  # fmt: skip
    """Cross and mutate parents that win by rank, then by crowding; keep the best
    ``population`` of parents and children.

    Raises
    ------
    ValueError : as ``random_search``; the population is below 2.
    """
    _check(space, budget)
    at_least(2, population=population)
    found: dict[Architecture, Candidate] = {}
    living: list[Candidate] = []

    def child() -> Architecture:
        if len(living) < population:
            return space.sample(generator)
        pairs = torch.randint(population, (2, 2), generator=generator)
        # survivors stand in order: the lower number wins
        mother, father = (living[int(pair.min())].architecture for pair in pairs)
        return space.mutated(space.crossed(mother, father, generator), generator)

    while len(found) < budget:
        count = min(population, budget - len(found))
        made = [_add(found, evaluate, child, space, generator) for _ in range(count)]
        living = survivors([*living, *made], population)
    return Found(tuple(found.values()))


def survivors(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return the best, in order: those on earlier fronts first, and of a front those
    whose neighbours are far apart.
    """
    fronts = ranks([each.point for each in candidates])
    ordered: list[Candidate] = []
    for rank in range(max(fronts, default=-1) + 1):
        front = [c for c, own in zip(candidates, fronts, strict=True) if own == rank]
        lonely = crowding([each.point for each in front])
        order = sorted(range(len(front)), key=lambda n: -lonely[n])
        ordered += [front[number] for number in order]
    return ordered[:count]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's tau-b: the share of pairs that both order alike, less the share
    that they order differently.

    1 is the same order, -1 the reverse, 0 what chance gives.

    Raises
    ------
    ValueError : they are not equally many, at least 2, or all of one are equal.
    """
    from scipy.stats import kendalltau

    at_least(2, **{"number of scores": len(a)})
    require("b", len(b), lambda n: n == len(a), f"as many scores as in a, {len(a)}")
    for name, scores in {"a": a, "b": b}.items():
        require(name, [*scores], lambda s: len(set(s)) > 1, "scores that differ")
    return float(kendalltau(a, b).statistic)


TRIES = 50
"""How often something new is looked for before chance takes over."""


def _add(
    found: dict[Architecture, Candidate],
    evaluate: Evaluate,
    make: Callable[[], Architecture],
    space: SearchSpace,
    generator: torch.Generator,
) -> Candidate:
    """Evaluate what ``make`` gives if it is new; where it does not come upon anything new, a random one that is."""
    drawn = itertools.chain((make() for _ in range(TRIES)), iter(lambda: space.sample(generator), None))
    new = next(each for each in drawn if each not in found)
    found[new] = Candidate(new, *map(float, evaluate(new)))
    return found[new]


def _check(space: SearchSpace, budget: int) -> None:
    at_least(1, budget=budget)
    require("budget", budget, lambda n: n <= len(space), f"at most the {len(space)} architectures that there are")
