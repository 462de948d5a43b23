r"""How rungs combine: what one is worth alone, left out, and on average over every order.

======================  =============================================================================================
name                    what it gives                                                         source
======================  =============================================================================================
``every_set``           all sets of the capstone's rungs, by name
``measured``            what the recorded study found of them, as ``Combinations``
``Combinations``        the seconds of every set of rungs, by seed
``.speedup``            of a set over another, with its interval
``.gain``               of one rung where some others are there already
``.shapley``            its gain on average over all orders; these multiply to the whole      Shapley 1953
``.interaction``        of a pair: what both bring over the product of what each brings
``.predicted``          the product of what each brings alone
``.ladder``             the order that takes the largest gain first
======================  =============================================================================================

All of it is reckoned in logarithms of ratios, within a seed, because speed multiplies (chapter 15's ladder). With n
rungs there are :math:`2^n` sets, so this is for a handful of them.

Source: Shapley 1953, "A value for n-person games", Contributions to the Theory of Games 2,
doi:10.1515/9781400881970-018.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np

from course_lib.capstone.rungs import NAMES
from course_lib.efficiency.ladder import Speedup, log_ratio
from course_lib.lab.arguments import require
from course_lib.lab.studies import recorded

Names = Collection[str]


@dataclass(frozen=True)
class Combinations:
    """The seconds of every set of rungs.

    Attributes
    ----------
    rungs : their names.
    seconds : a set of rungs -> seconds to the target ``[seeds]``, for all sets. Where a run did not reach it, what it
        spent: the least that it would take.
    reached : a set of rungs -> whether each seed's run reached the target, bool ``[seeds]``.
    epochs : a set of rungs -> the length of each seed's run ``[seeds]``.

    Raises
    ------
    ValueError : a set is missing.
    """

    rungs: tuple[str, ...]
    seconds: Mapping[frozenset[str], np.ndarray]
    reached: Mapping[frozenset[str], np.ndarray]
    epochs: Mapping[frozenset[str], np.ndarray]

    def __post_init__(self) -> None:
        wanted = set(subsets(self.rungs))
        for name in ("seconds", "reached", "epochs"):
            missing = sorted(" + ".join(sorted(each)) or "(none)" for each in wanted - set(getattr(self, name)))
            require(name, missing, lambda left: not left, f"there for all {len(wanted)} sets of rungs, and is not")

    def of(self, names: Names) -> np.ndarray:
        """Seconds of a set ``[seeds]``."""
        require("names", sorted(names), lambda given: set(given) <= set(self.rungs), f"among {', '.join(self.rungs)}")
        return self.seconds[frozenset(names)]

    def length(self, names: Names) -> int:
        """Epochs that a set's runs are given: the median of the seeds' own."""
        self.of(names)
        return math.ceil(np.median(self.epochs[frozenset(names)]))

    def speedup(self, names: Names, over: Names = ()) -> Speedup:
        """How many times as fast a set is as another, by default as the first script."""
        return log_ratio(self.of(over), self.of(names))

    def gain(self, rung: str, given: Names = ()) -> Speedup:
        """What a rung brings where ``given`` are there."""
        return self.speedup({*given, rung}, set(given) - {rung})

    def predicted(self, names: Names) -> Speedup:
        """The product of what each of the rungs brings alone."""
        logs = sum((self._log(()) - self._log((name,)) for name in names), np.zeros(len(self.of(()))))
        return log_ratio(np.exp(logs), np.ones(len(logs)))

    def interaction(self, a: str, b: str, given: Names = ()) -> Speedup:
        """What two rungs bring together over the product of what each brings, where ``given`` are there.

        1: they do not care for one another. Above: one makes room for the other. Below: they do the same work, or one
        spoils the other's.
        """
        rest = set(given) - {a, b}
        together = self._log(rest) - self._log({*rest, a, b})
        singles = 2 * self._log(rest) - self._log({*rest, a}) - self._log({*rest, b})
        return log_ratio(np.exp(together - singles), np.ones(len(together)))

    def shapley(self, rung: str) -> Speedup:
        r"""What a rung brings on average (geometric) over all orders in which the rungs can be added.

        .. math:: \phi_r = \sum_{S \not\ni r} \frac{|S|!\,(n - |S| - 1)!}{n!} \ln \frac{t_S}{t_{S \cup r}}
        """
        require("rung", rung, lambda name: name in self.rungs, f"one of {', '.join(self.rungs)}")
        n = len(self.rungs)
        total = np.zeros(len(self.of(())))
        for rest in subsets([name for name in self.rungs if name != rung]):
            weight = math.factorial(len(rest)) * math.factorial(n - len(rest) - 1) / math.factorial(n)
            total += weight * (self._log(rest) - self._log({*rest, rung}))
        return log_ratio(np.exp(total), np.ones(len(total)))

    def ladder(self) -> list[str]:
        """The rungs in the order that takes the largest gain first."""
        order: list[str] = []
        while len(order) < len(self.rungs):
            left = [name for name in self.rungs if name not in order]
            order.append(max(left, key=lambda name: self.gain(name, order).ratio))
        return order

    def _log(self, names: Names) -> np.ndarray:
        return np.log(self.of(names))


def subsets(names: Collection[str]) -> Iterator[frozenset[str]]:
    """All sets of the names, the empty one first."""
    return map(frozenset, chain.from_iterable(combinations(names, k) for k in range(len(names) + 1)))


def every_set(rungs: Collection[str] = NAMES) -> dict[str, frozenset[str]]:
    """All sets of rungs by name: the rungs in their order joined by " + ", or "first script"."""
    return {" + ".join(n for n in rungs if n in names) or "first script": names for names in subsets(rungs)}


def measured() -> Combinations:
    """Return what the recorded study found of every set of the capstone's rungs.

    Raises
    ------
    StudyOutdated : it was found by other code than that which stands now.
    """
    of = {name: recorded("16", "combinations", of=name).values for name in ("seconds", "reached", "epochs")}
    sets = every_set()
    return Combinations(
        NAMES,
        seconds={names: of["seconds"][name] for name, names in sets.items()},
        reached={names: of["reached"][name] > 0 for name, names in sets.items()},
        epochs={names: of["epochs"][name] for name, names in sets.items()},
    )
