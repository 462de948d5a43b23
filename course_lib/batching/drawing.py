r"""Drawing: how a choice of examples gets into ``fit``, which itself takes each example once an epoch.

====================  ==============================================================  ==================================
name                  what it does                                                    source
====================  ==============================================================  ==================================
``drawn_from``        an augmentation that draws its own batch from a split
``weighted_labels``   rows of labels that carry a weight an example
``sampled``           a recipe whose batches are drawn by a ``Chooser``:
``Uniform``           with replacement, all alike
``Importance``        by scores of the network, asked again every k steps             Katharopoulos & Fleuret 2018,
                                                                                      arXiv:1803.00942
``Curriculum``        the easiest examples first, then more                           Hacohen & Weinshall 2019,
                                                                                      arXiv:1904.03626
``hard_examples``     an objective of the hardest part of each batch: biased          Shrivastava et al. 2016 (OHEM),
                                                                                      arXiv:1604.03540
====================  ==============================================================  ==================================

An augmentation gets a batch and a generator and may return another batch. The one here ignores what it is handed but
for its size. Weights travel in the labels: for a row :math:`w_i\,e_{y_i}` cross-entropy is :math:`w_i` times that of
the label, and the mean over the batch is the weighted mean. So the loop knows nothing of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from course_lib.batching.sampling import easiest, evaluating, exponential_pacing, importance, probabilities
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Augment, Split, normalise
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Inputs, Objective, Recipe, cross_entropy
from course_lib.preprocessing import compose, soft_labels

Choice = tuple[Tensor, Tensor | None]
"""Indices int64 ``[B]`` and weights ``[B]``; ``None`` where all count alike, so that labels stay as they are."""

Choose = Callable[[int, torch.Generator], Choice]
"""``(size of the batch, generator) -> choice``."""


def weighted_labels(y: Tensor, weights: Tensor, classes: int) -> Tensor:
    r"""Return the rows :math:`w_i\,e_{y_i}`, ``[B, classes]`` in the type of ``weights``, for labels ``[B]``.

    ``F.cross_entropy`` with them is :math:`\frac1B\sum_i w_i \ell_i`. It does not divide by the sum of the weights,
    as its ``weight=`` does: that would be biased again.

    Raises
    ------
    ValueError : ``weights`` is not ``[B]``, or a label is not below ``classes``.
    """
    if weights.shape != y.shape:
        raise ValueError(f"weights has the shape {list(weights.shape)}: must be {list(y.shape)}, one for each label")
    if y.device.type == "mps":
        weights = weights.float()  # Apple's GPUs have no float64
    return soft_labels(y, classes, weights.dtype) * weights.to(y.device)[:, None]


def drawn_from(split: Split, choose: Choose, *, classes: int) -> Augment:
    """Return an augmentation ``(x, y, generator) -> (x, y)`` that draws its batch from ``split`` by ``choose``.

    For ``Recipe(augment=drawn_from(data.train, choose, classes=10))``; ``preprocessing.compose`` puts others behind it.
    A choice with weights makes ``weighted_labels``. The split may lie on the CPU: only what is drawn moves.

    Raises
    ------
    ValueError : at the first batch, an index that is not in the split, and as ``weighted_labels``.
    """
    at_least(1, classes=classes)
    return partial(_drawn, split=split, choose=choose, classes=classes)


def _drawn(
    x: Inputs, y: Tensor, generator: torch.Generator, *, split: Split, choose: Choose, classes: int
) -> tuple[Any, Tensor]:
    indices, weights = choose(len(y), generator)
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(split):
        least, most = int(indices.min()), int(indices.max())
        raise ValueError(f"choose gave indices from {least} to {most}: must be from 0 to {len(split) - 1}")
    chosen = split.subset(indices).to(y.device)
    labels = chosen.labels if weights is None else weighted_labels(chosen.labels, weights, classes)
    return normalise(chosen.inputs, chosen), labels


# --- Choosers: choices with a memory ----------------------------------------------------------------------------------


class Chooser(Protocol):
    """What ``sampled`` asks for batches, and tells of the run."""

    def begin(self) -> None:
        """A run begins: forget the one before."""

    def choose(self, size: int, generator: torch.Generator) -> Choice:
        """Return the examples of the next batch."""

    def see(self, model: nn.Module) -> None:
        """See the network, before each of its forward passes in training."""

    def after_step(self, step: int) -> None:
        """Hear that ``step`` steps are done."""


class _Forgetful:
    """What a run left behind is no part of a chooser: a copy starts anew, and the fingerprint stays one."""

    def begin(self) -> None:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return self.settings()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.begin()

    def see(self, model: nn.Module) -> None:
        pass

    def after_step(self, step: int) -> None:
        pass


class Uniform(_Forgetful):
    """Draw with replacement from ``n`` examples: what importance sampling is to be compared with.

    Raises
    ------
    ValueError : ``n`` is below 1.
    """

    def __init__(self, n: int) -> None:
        at_least(1, n=n)
        self.n = n

    def settings(self) -> dict[str, Any]:
        return {"n": self.n}

    def begin(self) -> None:
        pass

    def choose(self, size: int, generator: torch.Generator) -> Choice:
        return torch.randint(self.n, (size,), generator=generator), None


class Importance(_Forgetful):
    """Draw examples in proportion to scores of the network as it is, with the weights that undo the bias.

    The first batch is drawn uniformly, since no network was seen; then scores are taken at once and again after every
    ``every`` steps. A refresh costs what ``scores`` costs, on all of ``split``.

    Parameters
    ----------
    split : what is drawn from: the training split.
    scores : ``(model, split) -> [N]``, for instance ``sampling.last_layer_scores``.
    every : steps between two refreshes.
    smoothing : the uniform part of the probabilities; weights are at most 1 / ``smoothing``. Scores grow old between
        two refreshes, so it should not be zero.

    Raises
    ------
    ValueError : ``every`` is below 1, or ``smoothing`` not from 0 to 1.
    """

    def __init__(
        self, split: Split, scores: Callable[[nn.Module, Split], Tensor], *, every: int = 100, smoothing: float = 0.2
    ) -> None:
        at_least(1, every=every)
        require("smoothing", smoothing, lambda s: is_number(s) and 0 <= s <= 1, "a number from 0 to 1")
        self.split, self.scores, self.every, self.smoothing = split, scores, every, smoothing
        self.begin()

    def settings(self) -> dict[str, Any]:
        return {"split": self.split, "scores": self.scores, "every": self.every, "smoothing": self.smoothing}

    def begin(self) -> None:
        self.p: Tensor = torch.full((len(self.split),), 1 / len(self.split), dtype=torch.float64)
        self.refreshes = 0
        self._due = True

    def choose(self, size: int, generator: torch.Generator) -> Choice:
        return importance(self.p, size, generator)

    def see(self, model: nn.Module) -> None:
        if self._due:
            self.p = probabilities(self.scores(model, self.split), self.smoothing)
            self.refreshes += 1
            self._due = False

    def after_step(self, step: int) -> None:
        self._due = self._due or step % self.every == 0


class Curriculum(_Forgetful):
    """Draw with replacement from the easiest part of the examples, which grows by a pacing function.

    Parameters
    ----------
    difficulty : ``[N]``, larger for harder examples: losses of a network trained before, say.
    pace : ``step -> part``, with steps from 0 and parts in (0, 1].

    Raises
    ------
    ValueError : ``difficulty`` is not ``[N]``; at a batch, a part out of its range.
    """

    def __init__(self, difficulty: Tensor, pace: Callable[[int], float] = exponential_pacing) -> None:
        easiest(difficulty, 1.0)
        self.difficulty, self.pace = difficulty, pace
        self.begin()

    def settings(self) -> dict[str, Any]:
        return {"difficulty": self.difficulty, "pace": self.pace}

    def begin(self) -> None:
        self.step = 0

    def choose(self, size: int, generator: torch.Generator) -> Choice:
        there = easiest(self.difficulty, self.pace(self.step))
        return there[torch.randint(len(there), (size,), generator=generator)], None

    def after_step(self, step: int) -> None:
        self.step = step


def sampled(recipe: Recipe, split: Split, chooser: Chooser, *, classes: int) -> Recipe:
    """Return a recipe whose batches are drawn from ``split`` by ``chooser``; its own augmentation comes behind.

    An epoch keeps its number of steps and the sizes of its batches; each run begins anew. A run that goes on from a
    checkpoint draws its first batch as at a beginning: nothing of the chooser is stored.
    """
    drawn = drawn_from(split, chooser.choose, classes=classes)
    watched = replace(
        recipe,
        augment=drawn if recipe.augment is None else compose(drawn, recipe.augment),
        objective=partial(_shown, objective=recipe.objective, chooser=chooser),
        optimizer=partial(_begun, make=recipe.optimizer, chooser=chooser),
    )
    return after_each_step(watched, partial(_stepped, chooser=chooser))


def _shown(model: nn.Module, x: Inputs, y: Tensor, *, objective: Objective, chooser: Chooser) -> Tensor:
    if torch.is_grad_enabled():
        chooser.see(model)
    return objective(model, x, y)


def _begun(parameters: Iterator[tuple[str, nn.Parameter]], *, make: Any, chooser: Chooser) -> Optimizer:
    chooser.begin()
    return make(parameters)


def _stepped(optimizer: Optimizer, step: int, *, chooser: Chooser) -> None:
    chooser.after_step(step)


# --- The hardest part of a batch --------------------------------------------------------------------------------------


def hard_examples(objective: Objective = cross_entropy, *, keep: float = 0.5) -> Objective:
    """Return the objective of those of a batch whose cross-entropy is the highest, the part ``keep`` of them.

    A forward pass more, in evaluation mode and without gradients, tells which they are, so that the backward pass costs
    less. The gradient is biased, on purpose: wrong labels are the hardest of all.
    Source: Shrivastava, Gupta & Girshick 2016, arXiv:1604.03540.

    Raises
    ------
    ValueError : ``keep`` is not in (0, 1].
    """
    require("keep", keep, lambda part: is_number(part) and 0 < part <= 1, "a number above 0 and at most 1")
    return partial(_hardest, objective=objective, keep=keep)


def _hardest(model: nn.Module, x: Inputs, y: Tensor, *, objective: Objective, keep: float) -> Tensor:
    with evaluating(model), torch.no_grad():
        losses = F.cross_entropy(model(x), y, reduction="none")
    # in the order of the batch, so that keep=1 is the plain objective to the bit
    kept = losses.topk(max(1, round(keep * len(y)))).indices.sort().values
    chosen = tuple(part[kept] for part in x) if isinstance(x, tuple) else x[kept]
    return objective(model, chosen, y[kept])
