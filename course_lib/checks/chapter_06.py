"""Checks of chapter 6, early stopping: four methods to write, a figure to read, a bug to find, a stop to design.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports.
"""

import copy
import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from course_lib import optimizers
from course_lib.checks.designs import normal
from course_lib.lab.data import Dataset, load
from course_lib.lab.experiments import one_thread
from course_lib.lab.judging import Method, Mistake, NotAttempted, OpenProject, Reading, Rule, Wrong, call, close
from course_lib.lab.models import mlp
from course_lib.lab.training import COLUMNS, History, Recipe, evaluate, fit, fresh
from course_lib.preprocessing import flip_symmetric

# Exercise 1: patience

Improves = Callable[[float, float, float, float], bool]
Stopped = tuple[int, int]


def _patient(
    losses: Sequence[float], patience: int, min_delta: float, *,
    improves: Improves = lambda loss, best, before, min_delta: loss < best - min_delta,
    best_now: Callable[[float, float, bool], float] = lambda loss, best, improved: loss if improved else best,
    waited_now: Callable[[int, bool, bool], int] = lambda waited, improved, worse: 0 if improved else waited + 1,
    enough: Callable[[int, int], bool] = operator.ge,
    last: Callable[[int, int, bool], int] = lambda epoch, epochs, out_of_patience: epoch,
    kept: Callable[[Sequence[float], int, int, int], int] = lambda losses, stopped, improved, patience: improved,
) -> Stopped:  # fmt: skip
    """Walk until ``enough(waited, patience)``; ``before`` is the loss of the epoch before, infinite at the first."""
    best, before, waited, improved_at, out_of_patience = math.inf, math.inf, 0, 0, False
    for epoch, loss in enumerate(losses):
        improved, worse = improves(loss, best, before, min_delta), loss > best
        best, before = best_now(loss, best, improved), loss
        improved_at = epoch if improved else improved_at
        waited = waited_now(waited, improved, worse)
        out_of_patience = enough(waited, patience)
        if out_of_patience:
            break
    stopped = last(epoch, len(losses), out_of_patience)
    return stopped, kept(losses, stopped, improved_at, patience)


def _of_lowest(losses: Sequence[float], stopped: int, improved: int, patience: int) -> int:
    return int(np.argmin(losses[: stopped + 1]))


def _of_all(losses: Sequence[float], stopped: int, improved: int, patience: int) -> int:
    return int(np.argmin(losses))


def _exchanged(losses: Sequence[float], patience: int, min_delta: float) -> Stopped:
    stopped, kept = _patient(losses, patience, min_delta)
    return kept, stopped


def _eighths(*losses: int) -> list[float]:
    """Numbers that are exact, so that an improvement of exactly min_delta can be told from a larger one."""
    return [loss / 8 for loss in losses]


_THE_BEST = [
    "Take the losses 5, 3, 4, 3.5, 3.4, 3.3 and a patience of 2. Which of them is better than 3?",
    "Keep the best loss in a variable of its own, and write into it only when an epoch improves.",
]
_IN_A_ROW = [
    "An epoch without improvement counts one more. What becomes of the count when an epoch improves?",
    "It is a count of epochs in a row: back to 0 with each improvement.",
]
_HOW_MANY = "Take the losses 2, 1, 1, 1, 1 and a patience of 2. Epochs 2 and 3 do not improve: epoch 3 is the last."
_BY_MORE = "With a best of 2 and a min_delta of 0.5, which losses improve: 1.4, 1.5, 1.6?"
_WHICH_IS_KEPT = [
    "Print the epochs at which your best loss changes. Which of them is the one whose weights are there to be kept?",
    "In the loop, write down the epoch where you write down the best loss.",
]
_FROM_ZERO = "Epochs count from 0: the last of five is epoch 4."

exercise_1 = Method(
    "Patience by hand",
    right=_patient,
    what=("the epoch after which it stops", "the epoch kept"),
    hint=["Go through 4, 3, 2, 2, 1 with a patience of 2, pencil in hand: best, count, epoch of the best.",
          *_THE_BEST, *_IN_A_ROW],
    unchanged="Which of your lines sorts the losses, or takes one out? Walk through them with enumerate(losses).",
    cases={
        # Patience ends exactly with the last epoch: whoever waits one epoch longer is still right
        "9 losses, out of patience at the last": (_eighths(40, 30, 33, 24, 28, 16, 23, 20, 21), 3, 0.0),
        "8 losses, never out of patience": (_eighths(40, 30, 36, 24, 28, 27, 16, 20), 3, 0.0),
        "14 losses, the lowest after the stop": (
            _eighths(40, 32, 36, 35, 24, 27, 26, 20, 23, 22, 21, 22, 8, 4), 3, 0.0
        ),
        "17 losses that fall slowly, with a min_delta": (
            _eighths(40, 38, 35, 30, 28, 27, 24, 23, 21, 22, 23, 24, 29, 24, 30, 31, 32), 3, 4 / 8
        ),
        "6 losses, one of them better by exactly min_delta": (_eighths(32, 28, 30, 31, 33, 34), 3, 4 / 8),
        "9 losses, of which several are equal": (_eighths(24, 16, 16, 16, 8, 8, 8, 8, 8), 4, 0.0),
        "7 losses, a patience of 1": (_eighths(24, 16, 8, 8, 4, 2, 1), 1, 0.0),
        "a single loss": (_eighths(16), 2, 0.0),
    },
    mistakes=[
        Mistake(partial(_patient, improves=lambda loss, best, before, min_delta: loss < before - min_delta),
                "each loss is compared with that of the epoch before, not with the best so far", _THE_BEST),
        Mistake(partial(_patient, waited_now=lambda waited, improved, worse: waited + (not improved)),
                "the epochs without improvement are counted from the beginning, and not in a row", _IN_A_ROW),
        Mistake(partial(_patient, enough=operator.gt), "it stops one epoch too late", _HOW_MANY),
        Mistake(partial(_patient, enough=lambda waited, patience: waited >= max(1, patience - 1)),
                "it stops one epoch too early", _HOW_MANY),
        Mistake(partial(_patient, enough=lambda waited, patience: waited > 0),
                "it stops at the first epoch that does not improve", ["Where does patience come in?", _HOW_MANY]),
        Mistake(partial(_patient, enough=lambda waited, patience: False), "it never stops before the last epoch",
                "What ends your loop when the patience is over?"),
        Mistake(partial(_patient, improves=lambda loss, best, before, min_delta: loss < best),
                "min_delta is not used: the smallest improvement counts", _BY_MORE),
        Mistake(partial(_patient, improves=lambda loss, best, before, min_delta: loss < best + min_delta),
                "min_delta has the wrong sign: an epoch that is a little worse counts as an improvement", _BY_MORE),
        Mistake(partial(_patient, improves=lambda loss, best, before, min_delta: loss <= best - min_delta),
                "an epoch that is better by exactly min_delta, or that is equal to the best, counts as an improvement",
                ["More than min_delta is wanted: compare < with <=.", _BY_MORE]),
        Mistake(partial(_patient, improves=lambda loss, best, before, min_delta: loss < best * (1 - min_delta)),
                "min_delta is taken as a share of the best loss", ["It is a difference of two losses.", _BY_MORE]),
        Mistake(partial(_patient, best_now=lambda loss, best, improved: min(loss, best)),
                "the best loss moves with every lower one, so that many small steps never count as one large",
                ["The losses are 1.0, 0.9, 0.8, 0.7, and min_delta is 0.25. Does the last of them improve on the best?",
                 "The best is the loss of the last epoch that improved."]),
        Mistake(partial(_patient, waited_now=lambda waited, improved, worse: 0 if improved else waited + worse),
                "only epochs worse than the best are counted, not those as good as it, or better by too little",
                ["An epoch improves or it does not: there is no third.", *_IN_A_ROW]),
        Mistake(partial(_patient, waited_now=lambda waited, improved, worse: waited + 1 if worse else 0),
                "the count goes back to 0 also with an epoch that is as good as the best, or better by too little",
                ["An epoch improves or it does not: there is no third.", *_IN_A_ROW]),
        Mistake(lambda losses, *settings: _patient([-loss for loss in losses], *settings),
                "high values count as good", "These are losses."),
        Mistake(partial(_patient, kept=_of_all),
                "the epoch kept is the lowest of all losses, also of those after the stop",
                ["A run that was stopped has no later epochs: they would never have been there.", *_WHICH_IS_KEPT]),
        Mistake(partial(_patient, kept=_of_lowest),
                "the epoch kept is the lowest up to the stop, also where it was lower by less than min_delta",
                _WHICH_IS_KEPT),
        Mistake(partial(_patient, kept=lambda losses, stopped, improved, patience: stopped - patience),
                "the epoch kept is patience epochs before the last one, also where the run was not out of patience",
                ["Which epoch is the best when the losses fall to the end?", *_WHICH_IS_KEPT]),
        Mistake(partial(_patient, kept=lambda losses, stopped, improved, patience: stopped),
                "the last epoch is kept, not the best", _WHICH_IS_KEPT),
        Mistake(partial(_patient, kept=lambda losses, stopped, improved, patience: improved + 1),
                "the epoch kept is the one after the best", [_FROM_ZERO, *_WHICH_IS_KEPT]),
        Mistake(partial(_patient, last=lambda epoch, epochs, out_of_patience: epoch + 1),
                "stopped is one too large: it is the index of the last epoch that was trained", _FROM_ZERO),
        Mistake(partial(_patient, last=lambda epoch, epochs, out_of_patience: epoch + 1,
                        kept=lambda losses, stopped, improved, patience: improved + 1),
                "both epochs are counted from 1", _FROM_ZERO),
        Mistake(partial(_patient, last=lambda epoch, epochs, out_of_patience: epoch if out_of_patience else epochs),
                "a run that is never out of patience ends after its last epoch, whose index is len(losses) - 1",
                _FROM_ZERO),
        Mistake(_exchanged, "the two epochs are exchanged", "The order asked for is stopped, kept."),
        Mistake(lambda *case: _patient(*case)[0], "the epoch kept is missing",
                "The order asked for is stopped, kept."),
    ],
)  # fmt: skip


# Exercise 2: Prechelt's generalization loss


def _lowest_so_far(errors: Tensor) -> Tensor:
    return errors.cummin(0).values


def _generalization_loss(
    errors: Tensor, *,
    reference: Callable[[Tensor], Tensor] = _lowest_so_far,
    above: Callable[[Tensor, Tensor], Tensor] = lambda errors, lowest: 100 * (errors / lowest - 1),
) -> Tensor:  # fmt: skip
    """``above(errors, reference(errors))``, for every t: [T] -> [T]."""
    return above(errors, reference(errors))


def _before(errors: Tensor) -> Tensor:
    """The lowest of the errors before each; the first has none before it."""
    return torch.cat([errors[:1], errors.cummin(0).values[:-1]])


def _one_before(errors: Tensor) -> Tensor:
    return torch.cat([errors[:1], errors[:-1]])


_UP_TO_NOW = [
    "At t = 3 the run has not seen the errors of t = 4 and later. Which errors may the lowest be taken of?",
    "There is a cumulative minimum: errors.cummin(0).values, [T].",
]
_PERCENT = "With a lowest of 2 and an error of 2.2, 10 percent are wanted."

exercise_2 = Method(
    "Prechelt's generalization loss",
    right=_generalization_loss,
    what="GL",
    hint=["Take the errors 4, 2, 3, 2.5: GL is 0, 0, 50, 25.", *_UP_TO_NOW],
    unchanged="torch.minimum(…, out=errors) and errors /= … change what you were handed.",
    cases={
        # The first is neither the highest nor the lowest, nor is the last
        "9 errors that rise and fall, twice": (
            torch.tensor([2.5, 2.8, 2.0, 1.6, 1.9, 3.1, 1.2, 1.5, 1.3], dtype=torch.float64),
        ),
        "12 errors": (normal(21, 12).abs() + 0.5,),
        "5 errors that fall to the end": (torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64),),
        "6 errors in float32": (normal(22, 6).abs().float() + 0.2,),
        "a single error": (torch.tensor([0.7], dtype=torch.float64),),
    },
    mistakes=[
        Mistake(partial(_generalization_loss, reference=lambda errors: errors.min()),
                "the lowest is taken of all errors: at each t you look into the future", _UP_TO_NOW),
        Mistake(partial(_generalization_loss, reference=lambda errors: errors.cummax(0).values),
                "the highest error so far stands where the lowest should", _UP_TO_NOW),
        Mistake(partial(_generalization_loss, reference=lambda errors: errors.max()),
                "the highest of all errors stands where the lowest so far should", _UP_TO_NOW),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: errors / lowest - 1),
                "that is a share, and percent are wanted", _PERCENT),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: 100 * errors / lowest),
                "the 1 is not taken away: at its lowest an error has a GL of 100", [_PERCENT,
                "By how much is the error above its lowest?"]),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: errors / lowest),
                "that is the ratio alone: neither percent, nor what is above 1", _PERCENT),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: 100 * errors / lowest - 1),
                "1 is taken away after the multiplication by 100", "Where do the brackets stand?"),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: 100 * (errors - lowest)),
                "that is a difference, and is not divided by the lowest error", _PERCENT),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: errors - lowest),
                "that is a difference: neither divided by the lowest error, nor in percent", _PERCENT),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: 100 * (errors - lowest) / errors),
                "the difference is divided by the error itself, not by the lowest",
                "An error of twice its lowest is 100 percent above it. What does yours say?"),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: 100 * (lowest / errors - 1)),
                "the ratio is upside down", "Where the error rises, GL rises too. Does yours?"),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: 100 * (1 - errors / lowest)),
                "the sign is wrong: GL is never below 0", _PERCENT),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: 100 * (errors / lowest).log()),
                "that is 100 times the logarithm of the ratio, which is nearly the same only where both are small",
                _PERCENT),
        Mistake(partial(_generalization_loss, above=lambda errors, lowest: 100 * (errors.square() / lowest.square() - 1)
                        ), "the errors are squared", "They are used as they are."),
        Mistake(partial(_generalization_loss, reference=_before),
                "the lowest is that of the epochs before: at a new lowest your GL is below 0",
                ["The formula says t' ≤ t, and t itself belongs to it.", *_UP_TO_NOW]),
        Mistake(partial(_generalization_loss, reference=_one_before), "each error is compared with the one before it",
                _UP_TO_NOW),
        Mistake(partial(_generalization_loss, reference=lambda errors: errors[:1]),
                "each error is compared with the first", _UP_TO_NOW),
        Mistake(partial(_generalization_loss, reference=lambda errors: errors.flip(0).cummin(0).values.flip(0)),
                "the lowest is taken of the errors from t on, not up to t", _UP_TO_NOW),
        Mistake(lambda errors: _generalization_loss(errors)[-1], "that is GL at the last t alone",
                "One number for every t is wanted: [T] to [T]."),
        Mistake(lambda errors: _generalization_loss(errors).max(), "that is the largest GL alone",
                "One number for every t is wanted: [T] to [T]."),
        Mistake(_lowest_so_far, "that is the lowest error so far", ["How far is each error above it?", _PERCENT]),
    ],
)  # fmt: skip


# Exercise 3: gradient descent as a filter


def _learnt(
    eigenvalues: Tensor, lr: float, steps: int, *,
    left: Callable[[Tensor, float, int], Tensor] = lambda eigenvalues, lr, steps: (1 - lr * eigenvalues) ** steps,
) -> Tensor:  # fmt: skip
    """What is not ``left`` of 1: [D] -> [D]."""
    return 1 - left(eigenvalues, lr, steps)


def _spectrum(*eigenvalues: float) -> Tensor:
    return torch.tensor(eigenvalues, dtype=torch.float64)


_ONE_STEP = [
    "Along one direction the loss is λ (w - 1)² / 2, in units in which the minimum is 1. Where is w after one step "
    "from 0, and how far is it from 1?",
    "Each step multiplies what is missing, 1 - w, by the same number. What is missing at first, and after t steps?",
]
_ABOVE_ONE = [
    "With lr · λ = 1.5 the first step goes to 1.5, the second back to 0.75: past the minimum and back.",
    "A number below 0 may be raised to a whole power: (-0.5) ** 3 is -0.125. It has no logarithm, and no root.",
]
_EACH_DIRECTION = "Each direction has an eigenvalue of its own, and knows nothing of the others."

exercise_3 = Method(
    "What t steps have learnt of each direction",
    right=_learnt,
    what="the learnt shares",
    hint=["Run the steps themselves in a loop, w ← w - lr λ (w - 1) from w = 0, and compare.", *_ONE_STEP],
    unchanged="eigenvalues *= lr changes the caller's eigenvalues; lr * eigenvalues makes a new tensor.",
    cases={
        "4 directions, 7 steps": (_spectrum(1.2, 0.5, 0.1, 0.02), 0.6, 7),
        "3 directions, the first beyond 1, 4 steps": (_spectrum(2.5, 0.7, 0.05), 0.7, 4),
        "3 directions, the first beyond 1, 5 steps": (_spectrum(2.6, 0.8, 0.04), 0.7, 5),
        "5 directions, a flat one among them": (_spectrum(4.0, 1.0, 0.3, 0.01, 0.0), 0.2, 12),
        "3 directions, no step yet": (_spectrum(2.0, 1.0, 0.2), 0.3, 0),
        "3 directions, one of them right at 1, no step yet": (_spectrum(2.0, 1.0, 0.0), 0.5, 0),
        "2 directions, 200 steps": (_spectrum(1.9, 0.001), 1.0, 200),
        "2 directions in float32": (_spectrum(1.5, 0.25).float(), 0.5, 3),
    },
    mistakes=[
        Mistake(partial(_learnt, left=lambda eigenvalues, lr, steps: (-lr * steps * eigenvalues).exp()),
                "that is gradient flow, the limit of many steps without length: these have one",
                ["Where lr · λ is small it is nearly the same. Where is it not?", *_ONE_STEP]),
        Mistake(lambda eigenvalues, lr, steps: (1 - lr * eigenvalues) ** steps,
                "that is what is left to learn, not what is learnt",
                ["No step yet, and all is learnt?", *_ONE_STEP]),
        Mistake(lambda eigenvalues, lr, steps: (-lr * steps * eigenvalues).exp(),
                "that is what gradient flow leaves to learn", _ONE_STEP),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues**2, lr, steps), "the eigenvalues are squared",
                "They are those of the Hessian already, not singular values of X."),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues.sqrt(), lr, steps),
                "the roots of the eigenvalues are used", "The slope of λ w² / 2 is λ w."),
        Mistake(lambda eigenvalues, lr, steps: _learnt(2 * eigenvalues, lr, steps),
                "each step is twice too long", "The loss has a half before its squares: its slope is λ (w - 1)."),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues / 2, lr, steps),
                "each step is half as long as it should be", "The slope of λ (w - 1)² / 2 is λ (w - 1)."),
        Mistake(partial(_learnt, left=lambda eigenvalues, lr, steps: (1 - lr * eigenvalues).abs() ** steps),
                "the distance from the minimum is taken without its sign: past it, more than all is learnt", _ABOVE_ONE
                ),
        Mistake(partial(_learnt, left=lambda eigenvalues, lr, steps: (1 - lr * eigenvalues).clamp_min(0) ** steps),
                "a step that goes past the minimum is cut off there", _ABOVE_ONE),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues, lr, steps).clamp(0, 1),
                "the shares are cut off at 1, and a step may go past the minimum", _ABOVE_ONE),
        Mistake(partial(_learnt, left=lambda eigenvalues, lr, steps: (steps * (1 - lr * eigenvalues).log()).exp()),
                "a direction with lr · λ above 1 becomes NaN: its 1 - lr · λ is below 0 and has no logarithm",
                _ABOVE_ONE),
        Mistake(lambda eigenvalues, lr, steps: lr * steps * eigenvalues,
                "each step learns as much as the first, without end",
                ["After the first step the slope is smaller. By what factor?", *_ONE_STEP]),
        Mistake(lambda eigenvalues, lr, steps: (lr * steps * eigenvalues).clamp_max(1),
                "each step learns as much as the first, until all is learnt",
                ["After the first step the slope is smaller. By what factor?", *_ONE_STEP]),
        Mistake(lambda eigenvalues, lr, steps: eigenvalues / (eigenvalues + 1 / (lr * max(steps, 1e-30))),
                "that is the filter of the weight decay 1 / (lr · steps), which does nearly the same", _ONE_STEP),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues, lr, steps + 1), "that is one step too many",
                "Before the first step nothing is learnt."),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues, lr, max(steps - 1, 0)), "that is one step too few",
                "What is learnt after a single step?"),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues / eigenvalues.max(), lr, steps),
                "the eigenvalues, or the rate, are divided by the largest eigenvalue",
                ["lr is the rate itself, not a share of the largest that is stable.", _EACH_DIRECTION]),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues, 1.0, steps), "the rate is not used",
                "How long is a step?"),
        Mistake(lambda eigenvalues, lr, steps: _learnt(torch.ones_like(eigenvalues), lr, steps),
                "the eigenvalues are not used", _EACH_DIRECTION),
        Mistake(partial(_learnt, left=lambda eigenvalues, lr, steps: (1 - lr * eigenvalues) ** (2 * steps)),
                "that is the share of the loss that is gone, not of the weight",
                ["The loss goes with the square of the distance.", *_ONE_STEP]),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues, lr, steps) / eigenvalues,
                "the shares are divided by the eigenvalues, and a flat direction becomes NaN",
                "That division belongs to the weights themselves, when they are computed from Xᵀy. Here the share of "
                "the way to the minimum is asked for."),
        Mistake(lambda eigenvalues, lr, steps: -_learnt(eigenvalues, lr, steps), "the sign is wrong", _ONE_STEP),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues, lr, steps).mean(),
                "that is the mean over the directions", "One number for each direction is wanted: [D] to [D]."),
        Mistake(lambda eigenvalues, lr, steps: _learnt(eigenvalues, lr, steps).sum(),
                "that is the sum over the directions: the effective number of parameters",
                "One number for each direction is wanted: [D] to [D]."),
    ],
)  # fmt: skip


# Four panels: validation accuracy, and a dot where patience stopped the run. Ada's falls after epoch 16 and comes back
# (a second descent), but not as high as it was. Ben's is flat, and of the many epochs after his dot one is luckier than
# all before it, by less than they scatter; his patience is the shortest. Cleo's rests on a plateau until her cosine
# falls, and then rises by ten times the scatter. Dan's has its peak at epoch 16, thirty epochs before his dot. Ada's
# accuracy is the lowest at the dot. So reasons a and c hold for Cleo too, and do not tell her from the others.
exercise_4 = Reading(
    "Who stopped too early? A figure to read",
    right=("Cleo", "b"),
    choices={
        "Ada": "Ada's accuracy comes back after her dot, but not as high as at epoch 16, and those weights she has",
        "Ben": "Ben's accuracy stays where it was: one of the epochs after his dot is luckier than those before, by no "
        "more than epochs differ anyway",
        "Cleo": "",
        "Dan": "Dan's best epoch is thirty before his dot: he stopped late, if anything",
    },
    reasons={
        "a": "Ada's rises after the dot too, and she lost nothing: what comes must be compared with the best epoch "
        "before, which is kept, not with the dot",
        "b": "",
        "c": "that holds for Ben too, and there it is luck: of thirty more epochs, all alike, one will be higher",
        "d": "Ben waited for fewer epochs, and missed nothing; how long is too short depends on the curve",
    },
    hint=["Draw a line at each one's best accuracy before the dot. Whose curve rises above it, and stays there?",
          "How much do neighbouring epochs differ by chance? A rise that counts is larger."],
    reason_hint="What can luck not do? Which of these holds for this curve, and for none of the others?",
)  # fmt: skip


# Exercise 5: the best weights, which are the last

Kept = dict[str, Tensor]


class _Run:
    """A network with a batch norm, the step that trains it, and a loss that follows a script.

    ``scripted[t]`` is the loss after t steps, ``scripted[0]`` that before the first.
    """

    def __init__(self, seed: int, training: bool, scripted: Sequence[float]) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.scripted, self.taken = scripted, 0
        self.model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double().train(training)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.copy_(self._numbers(*weight.shape))
        self.before = list(self.model.parameters())

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=torch.float64)

    def step(self, model: nn.Module) -> None:
        """Move each weight by a number that was drawn, and a part of itself, and see a batch."""
        self.taken += 1
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.9).add_(self._numbers(*weight.shape))
            # Not the dropout, which would draw from the global generator
            model[1](model[0](self._numbers(5, 2)))  # type: ignore[index]

    def loss(self, model: nn.Module) -> float:
        """Of the weights after the steps so far."""
        return self.scripted[min(self.taken, len(self.scripted) - 1)]

    def found(self, returned: Any) -> tuple[Any, Tensor, Tensor, Tensor, Tensor]:
        """What was returned; weights, buffers and modes of the model; whether its parameters are the same objects."""
        parameters = list(self.model.parameters())
        buffers = torch.cat([buffer.double().flatten() for buffer in self.model.buffers()])
        modes = torch.tensor([part.training for part in self.model.modules()])
        same = torch.tensor([new is old for new, old in zip(parameters, self.before, strict=True)])
        return returned, torch.cat([weight.detach().flatten() for weight in parameters]), buffers, modes, same


def _left_behind(rule: Rule, seed: int, training: bool, scripted: Sequence[float]) -> Any:
    run = _Run(seed, training, scripted)
    return run.found(rule(run.model, run.step, run.loss, len(scripted) - 1))


def _as_it_was(found: Any, right: Any, *case: Any) -> None:
    if not close(found[3], right[3]):
        raise Wrong("the model is in another mode than it was, training or evaluation, at the end",
                    "Which of your lines calls model.train() or model.eval()? None is needed.")  # fmt: skip
    if not close(found[4], right[4]):
        raise Wrong("the model has other parameters than before: an optimizer that holds the old ones trains nothing",
                    "load_state_dict copies into the parameters that are there, unless assign=True.")  # fmt: skip


def _snapshot(model: nn.Module) -> Kept:
    return copy.deepcopy(model.state_dict())


def _parameters_alone(model: nn.Module) -> Kept:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _buffers_alone(model: nn.Module) -> Kept:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def _keeping(
    model: nn.Module, step: Callable[[nn.Module], None], loss: Callable[[nn.Module], float], steps: int, *,
    snapshot: Callable[[nn.Module], Kept] = _snapshot,
    lower: Callable[[float, float], bool] = operator.lt,
    worst: float = math.inf,
    after_each: Callable[[nn.Module, Kept], Any] = lambda model, best: None,
    from_start: bool = False,
    late: bool = False,
    returned: Callable[[list[float], float], Any] = lambda losses, lowest: lowest,
) -> Any:  # fmt: skip
    """``late``: what is put aside is from before the step whose loss was the lowest."""
    lowest, best, losses = worst, snapshot(model), []
    if from_start:
        lowest = loss(model)
    for _ in range(steps):
        before = snapshot(model) if late else {}
        step(model)
        losses.append(loss(model))
        if lower(losses[-1], lowest):
            lowest, best = losses[-1], before if late else snapshot(model)
        after_each(model, best)
    model.load_state_dict(best, strict=False)
    return returned(losses, lowest)


def _first_rise(model: nn.Module, step: Callable[..., None], loss: Callable[..., float], steps: int) -> float:
    lowest, best = math.inf, _snapshot(model)
    for _ in range(steps):
        step(model)
        now = loss(model)
        if now >= lowest:
            break
        lowest, best = now, _snapshot(model)
    model.load_state_dict(best)
    return lowest


_A_COPY = [
    "Compare best with model.state_dict() at the end of the loop. Why are they equal?",
    "state_dict() holds the tensors in which the model keeps its weights, and the next step writes into them. What is "
    "what is wanted is a copy: copy.deepcopy(…), of all that is in it.",
    "A copy of the dictionary alone holds the same tensors. And a model in another variable is not the one that you "
    "were handed: load_state_dict writes into that.",
]
_BUFFERS = [
    "Batch norm keeps running means and variances. They are no parameters, and state_dict() holds them.",
    "Copy all of model.state_dict(), and load all of it.",
]
_WHICH_IS_LOWEST = "Print the loss after each step, and the step whose weights you keep."

exercise_5 = Method(
    "Find the bug: the best weights are the last ones",
    right=_keeping,
    ask=_left_behind,
    explain=_as_it_was,
    what=("the loss returned", "the weights", "the buffers", "the mode", "the parameters"),
    hint=["Let step add 1 to a single weight, and let the losses be 3, 1, 2. Which weight is left?", *_A_COPY],
    cases={
        "6 steps, the third is the best": (51, True, [9.0, 5.0, 8.0, 2.0, 3.0, 2.5, 4.0]),
        "5 steps in evaluation mode, the fourth is the best": (52, False, [9.0, 6.0, 4.0, 5.0, 1.0, 8.0]),
        "4 steps, two of them equally good": (53, True, [9.0, 6.0, 2.0, 3.0, 2.0]),
        "3 steps, none as good as the beginning": (54, True, [1.0, 6.0, 4.0, 5.0]),
        "4 steps, the last is the best": (55, True, [9.0, 8.0, 7.0, 7.5, 1.0]),
        "a single step": (56, False, [1.0, 2.0]),
    },
    mistakes=[
        Mistake(partial(_keeping, snapshot=nn.Module.state_dict),
                "the loss is the lowest, and the weights are those of the last step", _A_COPY),
        Mistake(partial(_keeping, snapshot=nn.Module.state_dict, returned=lambda losses, lowest: losses[-1]),
                "both the loss and the weights are those of the last step", _A_COPY),
        Mistake(partial(_keeping, snapshot=_parameters_alone),
                "the weights are the best ones, and the buffers are those of the last step", _BUFFERS),
        Mistake(partial(_keeping, snapshot=_buffers_alone),
                "the buffers are the best ones, and the weights are those of the last step", _A_COPY),
        Mistake(partial(_keeping, lower=operator.gt, worst=-math.inf), "the weights with the highest loss are kept",
                "What is good, a high loss or a low one?"),
        Mistake(partial(_keeping, lower=operator.le), "of equally good steps the last is kept, and the first is wanted",
                "Compare < with <=."),
        Mistake(partial(_keeping, from_start=True),
                "the weights from before the first step are among those compared",
                "Only what comes after a step counts here: call step, then loss."),
        Mistake(partial(_keeping, late=True), "the weights kept are those from before the best step",
                "In which order do you copy, step and look at the loss?"),
        Mistake(partial(_keeping, after_each=lambda model, best: model.load_state_dict(best)),
                "the best weights are put back after each step, so that the next one starts from them",
                ["Training should go on as if nobody watched. When may the weights be put back?",
                 "Is your load_state_dict inside of the loop?"]),
        Mistake(_first_rise, "training ends at the first step that is no better",
                "All of the steps are wanted: training goes on, and the best are kept."),
        Mistake(partial(_keeping, returned=lambda losses, lowest: losses[-1]),
                "the weights are the best ones, and the loss returned is the last", _WHICH_IS_LOWEST),
        Mistake(partial(_keeping, returned=lambda losses, lowest: losses),
                "all losses are returned, and the lowest is wanted", _WHICH_IS_LOWEST),
        Mistake(partial(_keeping, returned=lambda losses, lowest: int(np.argmin(losses))),
                "the number of the best step is returned, and its loss is wanted", _WHICH_IS_LOWEST),
    ],
)  # fmt: skip


# Exercise 6: successive halving

Values = Callable[[Tensor, list[int], int], Tensor]
Spent = Callable[[list[tuple[int, int, int]]], int]


def _at_the_rung(curves: Tensor, left: list[int], epochs: int) -> Tensor:
    return curves[left, epochs - 1]


def _newly_trained(rungs: list[tuple[int, int, int]]) -> int:
    return sum(configs * (epochs - before) for configs, before, epochs in rungs)


def _halving(
    curves: Tensor, eta: int, *,
    values: Values = _at_the_rung,
    survivors: Callable[[int, int], int] = lambda n, eta: max(1, n // eta),
    next_rung: Callable[[int, int, int], int] = lambda epochs, eta, last: min(eta * epochs, last),
    spent: Spent = _newly_trained,
    ties: Callable[[int], int] = lambda config: config,
    after: Callable[[Tensor, list[int], int], int] = lambda curves, left, epochs: epochs,
) -> tuple[int, int]:  # fmt: skip
    """Keep ``survivors(n, eta)`` by ``values``, equal ones in the order of ``ties``, until one is left.

    Parameters
    ----------
    spent : of ``(configurations, epochs before, epochs after)``, rung by rung.
    after : how many epochs a single one that is left is trained to.
    """
    left, before, epochs, rungs = list(range(len(curves))), 0, 1, []
    while True:
        rungs.append((len(left), before, epochs))
        before, epochs = epochs, next_rung(epochs, eta, curves.shape[1])
        over = epochs <= before or len(left) == 1
        found = values(curves, left, before).tolist()
        order = sorted(range(len(left)), key=lambda place: (-found[place], ties(left[place])))
        left = sorted(left[place] for place in order[: 1 if over else survivors(len(left), eta)])
        if len(left) == 1:
            rungs.append((1, before, after(curves, left, before)))
            return left[0], spent(rungs)


def _best_so_far(curves: Tensor, left: list[int], epochs: int) -> Tensor:
    return curves[left, :epochs].max(1).values


def _average(curves: Tensor, left: list[int], epochs: int) -> Tensor:
    return curves[left, :epochs].mean(1)


def _one_late(curves: Tensor, left: list[int], epochs: int) -> Tensor:
    return curves[left, min(epochs, curves.shape[1] - 1)]


def _at_the_end(curves: Tensor, left: list[int], epochs: int) -> Tensor:
    return curves[left, -1]


def _place_among_survivors(curves: Tensor, eta: int) -> tuple[int, int]:
    """The last rung's own numbering, as of an index into what indexing has left."""
    last: list[int] = []

    def remembered(curves: Tensor, left: list[int], epochs: int) -> Tensor:
        last[:] = left
        return _at_the_rung(curves, left, epochs)

    winner, spent = _halving(curves, eta, values=remembered)
    return last.index(winner), spent


def _best_of_all_seen(curves: Tensor, eta: int) -> tuple[int, int]:
    """The highest last value of any, also of those that were dropped."""
    seen: dict[int, float] = {}

    def noted(curves: Tensor, left: list[int], epochs: int) -> Tensor:
        found = _at_the_rung(curves, left, epochs)
        seen.update(zip(left, found.tolist(), strict=True))
        return found

    _, spent = _halving(curves, eta, values=noted)
    return max(sorted(seen), key=lambda config: seen[config]), spent


def _whole_rungs_only(epochs: int, eta: int, last: int) -> int:
    return eta * epochs if eta * epochs <= last else epochs


def _curves(seed: int, configs: int, epochs: int) -> Tensor:
    """Accuracies that rise at different speeds and may fall again, in steps of 1/64, so that some are equal."""
    speed, height, fall = normal(seed, 3, configs, 1)
    epoch = torch.arange(1, epochs + 1, dtype=torch.float64)
    risen = (0.75 + 0.08 * height) * (1 - (-epoch * speed.exp() / 4).exp()) - 0.02 * fall.clamp_min(0) * epoch
    return (64 * (risen + 0.05 * normal(seed + 1, configs, epochs))).round().clamp(0, 63) / 64


def _accuracies(*rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64) / 100


_GO_ON = [
    "Nine configurations for 1 epoch are 9. Three of them go on to 3 epochs: how many epochs are trained for that?",
    "A survivor goes on from where it is: to come from epoch e to epoch f it trains f - e epochs.",
]
_AT_THE_RUNG = "All that is compared at the rung of e epochs is column e - 1 of the curves."
_HOW_MANY_STAY = "Of 7 configurations and eta = 3, 7 // 3 = 2 go on; of 2, at least 1."
_AT_THE_LAST = [
    "With 10 epochs and eta = 2 the rungs are 1, 2, 4, 8. If two are left then, both train to epoch 10.",
    "min(eta * epochs, curves.shape[1]) is the next rung, and when the last epoch is reached the best there has won.",
]
_OWN_NUMBERS = "Keep the numbers of the configurations that are left in a list, and index the curves with it."
_ONE_LEFT = "Once one is left it has won: nothing more is trained."
_TIES = "Of two that are equal the lower index goes first: a stable sort, by falling values, keeps that order."

exercise_6 = Method(
    "Successive halving on recorded curves",
    right=_halving,
    what=("the winner", "the epochs spent"),
    hint=["Print who is left at each rung, its epochs, and what was spent so far. Do the first two rungs by hand.",
          _AT_THE_RUNG, _HOW_MANY_STAY, *_GO_ON],
    unchanged=["curves[dropped] = 0 changes the caller's curves.", _OWN_NUMBERS],
    cases={
        # Found among many: here each mistake ends elsewhere
        "25 configurations, 20 epochs, eta = 3": (_curves(182, 25, 20), 3),
        "9 configurations, 9 epochs, eta = 3": (_curves(64, 9, 9), 3),
        "20 configurations, 7 epochs, eta = 3": (_curves(67, 20, 7), 3),
        "13 configurations, 11 epochs, eta = 2": (_curves(61, 13, 11), 2),
        "12 configurations, 5 epochs, eta = 2, many equal": (
            _accuracies(*[(50, 60 + 2 * (k % 3), 60, 70, 60 + k % 2) for k in range(12)]), 2
        ),
        "5 configurations, 40 epochs, eta = 4": (_curves(70, 5, 40), 4),
        "4 configurations, a single epoch": (_accuracies((30,), (50,), (70,), (40,)), 2),
        "a single configuration": (_curves(73, 1, 6), 3),
    },
    mistakes=[
        Mistake(partial(_halving, spent=lambda rungs: sum(configs * epochs for configs, before, epochs in rungs[:-1])),
                "the epochs are counted as if every survivor began from scratch at each rung", _GO_ON),
        Mistake(partial(_halving, spent=lambda rungs: sum(epochs - before for configs, before, epochs in rungs)),
                "the epochs of a single configuration are counted, not those of all that are trained", _GO_ON),
        Mistake(partial(_halving, spent=lambda rungs: sum(configs for configs, before, epochs in rungs[:-1])),
                "each rung is counted as one epoch", _GO_ON),
        Mistake(partial(_halving, spent=lambda rungs: _newly_trained(rungs[1:])),
                "the first epoch of all of them is not counted", _GO_ON),
        Mistake(partial(_halving, spent=lambda rungs: len(rungs) - 1), "the rungs are counted, not the epochs", _GO_ON),
        Mistake(lambda curves, eta: (_halving(curves, eta)[0], curves.numel()),
                "that is what it costs to train all of them to the end", _GO_ON),
        Mistake(partial(_halving, values=_best_so_far),
                "the best value so far decides, not the one at the rung", _AT_THE_RUNG),
        Mistake(partial(_halving, values=_average),
                "the average up to the rung decides, not the value at it", _AT_THE_RUNG),
        Mistake(partial(_halving, values=_one_late), "the value one epoch later decides", _AT_THE_RUNG),
        Mistake(partial(_halving, values=_at_the_end),
                "the value at the last epoch decides, which nobody knows of those that were dropped", _AT_THE_RUNG),
        Mistake(_best_of_all_seen, "the winner is the best value ever seen, also of those that were dropped",
                "Who is dropped is out. The winner is among those that are left."),
        Mistake(lambda curves, eta: _halving(-curves, eta), "the worst go on: these are accuracies, not losses",
                "Is a high value good or bad here?"),
        Mistake(partial(_halving, survivors=lambda n, eta: math.ceil(n / eta) if n > 1 else 1),
                "the number that goes on is rounded up", _HOW_MANY_STAY),
        Mistake(partial(_halving, survivors=lambda n, eta: max(1, round(n / eta))),
                "the number that goes on is rounded to the nearest", _HOW_MANY_STAY),
        Mistake(partial(_halving, survivors=lambda n, eta: max(1, n - n // eta)),
                "n // eta are dropped, and n // eta should go on", _HOW_MANY_STAY),
        Mistake(partial(_halving, survivors=lambda n, eta: max(1, n // 2)), "half go on, whatever eta", _HOW_MANY_STAY),
        Mistake(partial(_halving, survivors=lambda n, eta: max(1, n - 1)), "only one is dropped at each rung",
                _HOW_MANY_STAY),
        Mistake(partial(_halving, next_rung=_whole_rungs_only),
                "it ends with the last rung that fits, and the survivors are not trained to the last epoch",
                _AT_THE_LAST),
        Mistake(partial(_halving, next_rung=lambda epochs, eta, last: min((eta + 1) * epochs, last)),
                "the survivors train for eta times as many epochs more, and should come to eta times as many in all",
                "From 1 epoch, with eta = 3, the next rung is at 3 epochs in all."),
        Mistake(partial(_halving, next_rung=lambda epochs, eta, last: min(epochs + eta, last)),
                "eta is added to the epochs, and they should be multiplied by it",
                "The rungs are 1, eta, eta², … epochs."),
        Mistake(partial(_halving, next_rung=lambda epochs, eta, last: min(2 * epochs, last)),
                "the epochs are doubled, whatever eta", "The rungs are 1, eta, eta², … epochs."),
        Mistake(partial(_halving, after=lambda curves, left, epochs: curves.shape[1]),
                "the last one is trained to the end", _ONE_LEFT),
        Mistake(_place_among_survivors, "the winner's number is its place among the survivors of the last rung",
                _OWN_NUMBERS),
        Mistake(partial(_halving, ties=lambda config: -config), "of equal ones the higher index goes on", _TIES),
        Mistake(lambda curves, eta: tuple(reversed(_halving(curves, eta))), "the two results are exchanged",
                "The order asked for is the winner, the epochs."),
        Mistake(lambda curves, eta: _halving(curves, eta)[0], "the epochs spent are missing",
                "The order asked for is the winner, the epochs."),
    ],
)  # fmt: skip


# Exercise 7: a rule that does not know how fast it goes

WRONG = 0.3
"""The share of the 600 training labels that are another class; those of the validation and test splits are right."""

BASE = Recipe(
    epochs=40,
    batch_size=20,
    optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    precision="float64",
)
"""What the learner starts from: its best epoch is about the fifth, and it ends seven points below that."""

HIDDEN = {642: 0.005, 643: 0.01, 644: 0.02, 641: 0.0007}
"""The rate of each hidden run, by its seed. At the smallest the best epoch is among the last, at the largest the third:
the largest single number of epochs that the budget allows reaches 0.61, and patience 0.64 with fewer."""

LEAST, MOST = 0.625, 20

_FREE = ("stop", "keep")
_FOR_INSTANCE = 'For instance: mine = replace(base, stop=stopping.TargetReached("val_accuracy", 0.5))'
_REMEMBERS = (
    "One stop serves all runs, one after the other. What it has to know of a run stands in the history: a count or a "
    "best value of its own would still be there in the next."
)
_TOO_LONG = [
    "How many epochs go by after the best one, before your rule stops? At base's rate you can count them.",
    "At the smallest rate all 40 epochs are well spent. The others have to stop soon after their best epoch.",
]
_LAST_WEIGHTS = [
    "Your rule stops some epochs after the best one. Whose weights are left then, and which slot of the recipe says so?"
]
_TOO_LOW = [
    "At a small rate the curve rises slowly, and one epoch is now and then no better than the one before. Does your "
    "rule take that for the end?",
    "No number of epochs suits all rates. What do the curves have in common where it is over?",
]


@functools.cache
def _digits(seed: int) -> Dataset:
    """Drawn digits of this seed, 600 to train on, three in ten of them with a wrong label."""
    data = load("glyphs", classes="digits", size=16, difficulty=0.5, count=3100, train_size=600, val_size=1000,
                test_size=1500, seed=seed)  # fmt: skip
    told = flip_symmetric(data.train.labels, WRONG, len(data.classes), torch.Generator().manual_seed(seed))
    return replace(data, train=replace(data.train, labels=told))


def _trained(answer: Recipe, seed: int, lr: float) -> tuple[float, float]:
    """Test accuracy and epochs of a run at this rate."""
    data = _digits(seed)
    stop = answer.stop and partial(_asked, answer.stop)
    recipe = replace(answer, stop=stop, optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9))
    model = fresh(lambda: mlp((1, 16, 16), 10, width=256), recipe, seed=seed)
    with one_thread():  # several would wait for each other where the machine has other work: batches are small
        history = fit(model, data, recipe, seed=seed, progress=False)
        return evaluate(model, data.test).accuracy, history["epoch"][-1]


def _asked(stop: Any, history: History) -> bool:
    """What a stop says of a history; it is not told the rate, and one that says nothing goes on."""
    unnamed = replace(history, rows=[row | {"lr": math.nan} for row in history.rows], rates=[])

    def answered(seen: History) -> Any:
        return False if (said := stop(seen)) is None else said

    said = call(answered, unnamed, on=f"a history of {len(history)} epochs")
    if not isinstance(said, (bool, np.bool_)) and not (isinstance(said, Tensor) and said.numel() == 1):
        raise Wrong(f"your stop should say True or False, and what it says is of type {type(said).__name__}",
                    _FOR_INSTANCE)  # fmt: skip
    return bool(said)


def _recorded() -> list[History]:
    """A run that overfits from its tenth epoch on, as it is seen after each epoch."""
    t = np.arange(1, BASE.epochs + 1)
    columns = dict.fromkeys(COLUMNS, np.ones(len(t))) | {
        "epoch": t,
        "train_loss": 2.3 * np.exp(-t / 10),
        "val_loss": 1.2 + (np.log(t / 10)) ** 2 / 4,
        "val_accuracy": 0.65 - (np.log(t / 10)) ** 2 / 20,
        "lr": np.full(len(t), 0.01),
        "examples": 600 * t,
    }
    rows = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    losses = [row["train_loss"] for row in rows]
    return [
        History(rows[:end], epochs=end - 1, losses=losses[:end], rates=[(0.01,)] * end)
        for end in range(1, len(rows) + 1)
    ]


def _stop_and_keep_only(answer: Any) -> None:
    if not isinstance(answer, Recipe):
        raise Wrong("a Recipe is wanted here", _FOR_INSTANCE)
    others = [slot.name for slot in fields(Recipe) if slot.name not in (*_FREE, "optimizer")]
    changed = [name for name in others if getattr(answer, name) != getattr(BASE, name)]
    if changed or not _is_the_base_optimizer(answer.optimizer):
        raise Wrong(f"besides stop and keep you changed {', '.join(changed or ['optimizer'])}",
                    "Start from replace(base, stop=…, keep=…).")  # fmt: skip
    if answer.stop is None:
        return
    if not callable(answer.stop):
        raise Wrong("stop should be a function of the history", _FOR_INSTANCE)
    first, second = ([_asked(answer.stop, history) for history in _recorded()] for _ in range(2))
    if first != second:
        raise Wrong("your stop says something else when the same run comes a second time: it remembers the first",
                    _REMEMBERS)  # fmt: skip
    if all(answer.stop(history) is None for history in _recorded()):
        raise NotAttempted("your stop returns nothing so far")


def _is_the_base_optimizer(optimizer: Any) -> bool:
    return (
        isinstance(optimizer, partial)
        and optimizer.func in (torch.optim.SGD, optimizers.SGD)
        and not optimizer.args
        and optimizer.keywords == {"lr": 0.01, "momentum": 0.9}
    )


def exercise_7(answer: Any) -> None:
    """Design a stop: 0.625 in twenty epochs, whatever the rate"""
    _stop_and_keep_only(answer)
    reached, spent = [], []
    for seed, lr in HIDDEN.items():
        accuracy, epochs = _trained(answer, seed, lr)
        reached.append(accuracy)
        spent.append(epochs)
        total, to_come = sum(spent), len(HIDDEN) - len(spent)
        if total + to_come > MOST * len(HIDDEN):  # another run takes an epoch at least
            more = f", and {to_come} more to come" if to_come else ""
            raise Wrong(f"{len(spent)} of {len(HIDDEN)} hidden runs took {total:g} epochs{more}; allowed are "
                        f"{MOST * len(HIDDEN)} for all, {MOST} on average", _TOO_LONG)  # fmt: skip
    if not (mean := float(np.mean(reached))) >= LEAST:
        each = ", ".join(f"{epochs:g}" for epochs in spent)
        raise Wrong(f"a mean accuracy of {mean:.3f} over {len(HIDDEN)} hidden runs of {each} epochs; at least "
                    f"{LEAST} is wanted", _TOO_LOW if answer.keep else [*_LAST_WEIGHTS, *_TOO_LOW])  # fmt: skip


exercise_8 = OpenProject(
    "An open project: stop a training of your own",
    rubric=["the criterion", "what it costs", "the split", "what is reported", "honesty"],
)
