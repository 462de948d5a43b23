"""The rules of the race: what takes part, what the clock counts, and who has reached the target.

==================  =================================================================================================
name                what it gives
==================  =================================================================================================
``Task``            data, a score, and the target that it must reach
``Entry``           a network, a recipe, how the images come in, how they lie in memory
``run``             one attempt: trained from first weights to last step, timed, then tested
``race``            several entries in turns, a seed a round
``Result``          their seconds and scores: who qualifies, how many times as fast, what a rung is worth
``epochs_needed``   the shortest run that reaches the target on validation data, with seeds of its own
==================  =================================================================================================

The clock counts what training is: batches, forward and backward passes, steps of the optimizer, from the first weights
to the last step. It does not count reading the files, imports, drawing the first weights, testing. An entry qualifies
when its *mean* score over the seeds reaches the target; its time is the *median* of the same runs, and no run is left
out. So the speed runs of CIFAR-10 count (Jordan 2024, arXiv:2404.00498: the mean over runs). MLPerf (Mattson et al.
2019, arXiv:1910.01500) ends each run at the first evaluation that reaches the target, which favours whoever evaluates
often (chapter 6); here the length of a run is fixed before.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import nn

from course_lib.capstone.script import fit_per_image
from course_lib.efficiency.ladder import Rounds, in_turns
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset, Split
from course_lib.lab.experiments import Interval, mean_interval
from course_lib.lab.training import Recipe, evaluate, fit, fresh

WARM_UP = 128
"""Examples of the short run that comes before an entry's first attempt and is not counted."""


def accuracy(model: nn.Module, split: Split) -> float:
    """The share of a split's examples that the model gets right."""
    return evaluate(model, split).accuracy


@dataclass(frozen=True)
class Task:
    """What must be reached.

    Attributes
    ----------
    data : trained on ``train``; settings are chosen on ``val``; ``test`` decides.
    target : the score that counts as reached.
    score : ``(model, split) -> number``.
    lower_is_better : True for a loss.
    """

    data: Dataset
    target: float
    score: Callable[[nn.Module, Split], float] = accuracy
    lower_is_better: bool = False

    def reached(self, score: float, margin: float = 0.0) -> bool:
        """Whether a score reaches the target, by so much."""
        return score <= self.target - margin if self.lower_is_better else score >= self.target + margin


@dataclass(frozen=True)
class Entry:
    """What takes part.

    Attributes
    ----------
    network : ``(input_shape, classes)`` -> a fresh network.
    recipe : how it is trained; its number of epochs is the length of the run.
    per_image : images come one at a time through a ``DataLoader`` and its transforms, as in most first scripts.
    channels_last : the channels of a place lie side by side in memory (chapter 15).
    prepare : ``(network, data) -> network``, once before the first step, on the clock.
    """

    network: Callable[[tuple[int, ...], int], nn.Module]
    recipe: Recipe
    per_image: bool = False
    channels_last: bool = False
    prepare: Callable[[nn.Module, Dataset], nn.Module] | None = None

    def lasting(self, epochs: int) -> Entry:
        """The same entry with runs of so many epochs."""
        return replace(self, recipe=replace(self.recipe, epochs=epochs))


@dataclass(frozen=True)
class Attempt:
    """One run: the ``seconds`` of its training, and the ``score`` afterwards."""

    seconds: float
    score: float


def trained(entry: Entry, data: Dataset, seed: int) -> tuple[nn.Module, float]:
    """Train the entry's network from the first weights of ``seed``; return it, and the seconds that took."""
    recipe = replace(entry.recipe, validate_every=entry.recipe.epochs)
    network = fresh(lambda: entry.network(data.input_shape, len(data.classes)), recipe, seed=seed)
    if entry.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    started = time.perf_counter()
    if entry.prepare is not None:
        network = entry.prepare(network, data)
    prepared = time.perf_counter() - started
    if entry.per_image:
        return network, prepared + fit_per_image(network, data, recipe, seed=seed)
    history = fit(network, data, recipe, seed=seed, progress=False)
    return network, prepared + sum(history["seconds"])


def run(entry: Entry, task: Task, seed: int, *, split: str = "test") -> Attempt:
    """One attempt. Testing is not timed; ``split="val"`` is for whoever chooses settings.

    Raises
    ------
    ValueError : ``split`` is neither ``"val"`` nor ``"test"``.
    """
    require("split", split, lambda name: name in ("val", "test"), "'val' or 'test'")
    network, seconds = trained(entry, task.data, seed)
    return Attempt(seconds, task.score(network, getattr(task.data, split)))


def warm_up(entry: Entry, task: Task) -> None:
    """Train the entry for an instant: what is loaded and chosen at the first call belongs to no attempt."""
    few = task.data.train.subset(torch.arange(min(WARM_UP, len(task.data.train))))
    trained(entry.lasting(1), replace(task.data, train=few, val=few), seed=0)


# --- Racing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a race found.

    Attributes
    ----------
    task : what was to be reached.
    rounds : the seconds of each entry in each round.
    scores : ``[rounds, entries]``, on the test split.
    """

    task: Task
    rounds: Rounds
    scores: np.ndarray

    def score(self, name: str) -> Interval:
        """The mean score of an entry over the seeds, with its 95% interval."""
        return mean_interval(self.scores[:, self.rounds.arms.index(name)])

    def seconds(self, name: str) -> float:
        """The median of the entry's runs."""
        return float(np.median(self.rounds.of(name)))

    def qualifies(self, name: str) -> bool:
        """Whether the entry's mean score reaches the target."""
        return self.task.reached(self.score(name).mean)

    def table(self) -> pd.DataFrame:
        """One row an entry: ``seconds``, ``speedup`` and ``gain`` as in ``Rounds.table``; its mean ``score`` with the
        ends of the interval; whether it ``qualifies``.
        """
        found = self.rounds.table()
        scores = [self.score(name) for name in self.rounds.arms]
        found["score"] = [each.mean for each in scores]
        found["score_low"] = [each.low for each in scores]
        found["score_high"] = [each.high for each in scores]
        found["qualifies"] = [self.qualifies(name) for name in self.rounds.arms]
        return found


def race(
    entries: Mapping[str, Entry], task: Task, seeds: Sequence[int] = (0, 1, 2, 3, 4), *, kind: str = "", order: int = 0
) -> Result:
    """Run every entry once a round, each round with the next seed, in an order drawn anew.

    Parameters
    ----------
    entries : by name; the first is what the others are compared with.
    seeds : at least two, for an interval.
    kind : of ``Rounds``: ``"climb"`` where each entry adds a rung to the one before it, ``"ablate"`` where each lacks
        one of the first's.
    order : seed of the order.
    """
    scores = {name: [] for name in entries}  # type: dict[str, list[float]]

    def measure(name: str) -> float:
        if name not in started:  # in_turns does not count the first call
            started.add(name)
            warm_up(entries[name], task)
            return math.nan
        attempt = run(entries[name], task, seeds[len(scores[name])])
        scores[name].append(attempt.score)
        return attempt.seconds

    started: set[str] = set()
    rounds = in_turns({name: name for name in entries}, measure, rounds=len(seeds), seed=order, kind=kind)
    return Result(task, rounds, np.array([scores[name] for name in entries]).T)


# --- The length of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needed:
    """The length that was found: ``epochs``, and at it the mean ``score`` and the median ``seconds`` of a run."""

    epochs: int
    score: float
    seconds: float


def epochs_needed(
    entry: Entry, task: Task, seeds: Sequence[int], *, margin: float = 0.0, most: int = 64
) -> Needed | None:
    """The smallest number of epochs with which the mean score on the validation split reaches the target.

    Lengths are doubled until one reaches it, and the gap is halved until the next smaller one is known not to.

    Parameters
    ----------
    seeds : of the runs at each length; others than those of the race.
    margin : by how much the target must be passed, so that it holds for other seeds too.
    most : the longest run to try; None is returned when not even that suffices.
    """
    at_least(1, most=most, seeds=len(seeds))
    require("margin", margin, is_number, "a number")
    tried: dict[int, Needed] = {}

    def enough(epochs: int) -> bool:
        if epochs not in tried:
            attempts = [run(entry.lasting(epochs), task, seed, split="val") for seed in seeds]
            mean = float(np.mean([attempt.score for attempt in attempts]))
            tried[epochs] = Needed(epochs, mean, float(np.median([attempt.seconds for attempt in attempts])))
        return task.reached(tried[epochs].score, margin)

    reaching = next((n for n in itertools.takewhile(lambda n: n < 2 * most, (2**k for k in itertools.count()))
                     if enough(min(n, most))), None)  # fmt: skip
    if reaching is None:
        return None
    short, long = reaching // 2, min(reaching, most)
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (short, middle) if enough(middle) else (middle, long)
    return tried[long]
