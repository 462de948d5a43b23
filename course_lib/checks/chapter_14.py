"""Checks of chapter 14, fusion: four methods to write, a figure to read, a bug to find, an ensemble to choose.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on what the chapter's module computes nor on what the learner imports.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.checks.designs import normal
from course_lib.fusion import Stack
from course_lib.lab.data import load, normalise, random_shift
from course_lib.lab.experiments import one_thread
from course_lib.lab.judging import Case, Hints, Method, Mistake, OpenProject, Reading, Rule, Wrong, close
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fresh

# Exercise 1: the mean of probabilities, as a logarithm


def _pooled(
    logits: Tensor, *,
    each: Callable[[Tensor], Tensor] = lambda logits: logits.log_softmax(2),
    pool: Callable[[Tensor], Tensor] = lambda each: each.logsumexp(0) - math.log(len(each)),
    end: Callable[[Tensor], Tensor] = lambda found: found,
) -> Tensor:  # fmt: skip
    """``each`` member's logits are made ready, then ``pool``-ed."""
    return end(pool(each(logits)))


def _mean(each: Tensor) -> Tensor:
    return each.mean(0)


def _normal(found: Tensor) -> Tensor:
    return found.log_softmax(1)


def _log_of_mean(each: Tensor) -> Tensor:
    return each.exp().mean(0).log()


def _softmax_by_hand(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(2, keepdim=True)


_TWO_MEMBERS = [
    "Two members give a class 0.9 and 0.3. Their mean is 0.6. What does yours say, as a probability?",
    "Probabilities first, then the mean over the members, and the logarithm last.",
]
_SUM_TO_ONE = [
    "Take exp of your result and add up each row. What should the sum be?",
    "log of a mean is log of a sum, less log M.",
]
_OWN_SCALE = [
    "Add 5 to all logits of one member. What should change, and what does in yours?",
    "Each member is normalised by itself first, over its classes.",
]
_AXES = ["logits is [members, examples, classes]: which of the three sums to 1?", "Classes are the last axis: dim=2."]
_UNDERFLOW = [
    "What is exp(-2000) as a number, and what is its logarithm?",
    "log_softmax gives logarithms without exp. torch.logsumexp adds up what logarithms stand for, and stays in them.",
]
_EXTREME = 1000.0


def _extreme(seed: int, *shape: int) -> Tensor:
    """All members are sure that it is not the first class, and some that it is the second; exact in float32, too."""
    signs = normal(seed, *shape).sign()
    signs[..., 0], signs[::2, :, 1] = -1, 1
    return _EXTREME * signs + (8 * normal(seed + 1, *shape)).round() / 8


def _digits_lost(found: Any, right: Tensor, logits: Tensor) -> None:
    values = found if isinstance(found, Tensor) else torch.zeros(0)
    if logits.abs().max() >= _EXTREME and values.shape == right.shape:
        raise Wrong("where the logits are ±1000 the digits are lost: a probability is rounded to 0, or exp overflows",
                    _UNDERFLOW)  # fmt: skip


exercise_1 = Method(
    "The mean of probabilities, as a logarithm",
    right=_pooled,
    explain=_digits_lost,
    what="the log of the mean probabilities",
    hint=[*_TWO_MEMBERS, *_SUM_TO_ONE, *_AXES],
    unchanged="logits -= … writes into the caller's logits; logits - … makes new ones.",
    cases={
        "4 members, 4 examples, 4 classes": (3 * normal(1401, 4, 4, 4) + normal(1402, 4, 1, 1),),
        "5 members, 6 examples, 3 classes": (2 * normal(1403, 5, 6, 3) + 4,),
        "float32": (normal(1404, 2, 7, 5).float(),),
        "a single member": (normal(1405, 1, 3, 4),),
        "logits of ±1000": (_extreme(1406, 3, 5, 4),),
    },
    mistakes=[
        Mistake(partial(_pooled, each=lambda logits: logits, pool=_mean), "these are mean logits", _TWO_MEMBERS),
        Mistake(partial(_pooled, pool=_mean),
                "log-probabilities are averaged: that is the geometric mean, and it does not sum to 1", _TWO_MEMBERS),
        Mistake(partial(_pooled, pool=_mean, end=_normal),
                "this is the geometric mean, which a member that says 0 can veto; what is wanted is the arithmetic one",
                _TWO_MEMBERS),
        Mistake(partial(_pooled, end=torch.exp), "these are the probabilities, without the logarithm",
                "The log of a probability is never above 0."),
        Mistake(partial(_pooled, pool=lambda each: each.logsumexp(0)),
                "probabilities are added up, and not divided by M", _SUM_TO_ONE),
        Mistake(partial(_pooled, each=lambda logits: logits, pool=lambda each: each.logsumexp(0) - math.log(len(each))),
                "the logits are pooled as if they were log-probabilities already", _OWN_SCALE),
        Mistake(partial(_pooled, each=lambda logits: logits, end=_normal),
                "the result is normalised, the members are not: one with large logits outvotes the others", _OWN_SCALE),
        Mistake(partial(_pooled, each=lambda logits: logits.log_softmax(0)),
                "the softmax goes over the members, not over the classes", _AXES),
        Mistake(partial(_pooled, each=lambda logits: logits.log_softmax(1)),
                "the softmax goes over the examples, not over the classes", _AXES),
        Mistake(partial(_pooled, pool=lambda each: each.logsumexp(1) - math.log(each.shape[1])),
                "the mean goes over the examples, not over the members", _AXES),
        # Right as long as no probability is rounded to 0
        Mistake(partial(_pooled, pool=_log_of_mean),
                "a probability of e^-2000 is rounded to 0, and the log of 0 is not finite", _UNDERFLOW),
        Mistake(partial(_pooled, each=lambda logits: _softmax_by_hand(logits).log(), pool=_log_of_mean),
                "exp overflows: infinity over infinity is NaN", _UNDERFLOW),
    ],
)  # fmt: skip


# Exercise 2: the ambiguity decomposition


def _ambiguity(
    answers: Tensor, targets: Tensor, *,
    aim: Callable[[Tensor], Tensor] = lambda targets: targets,
    spread: Callable[[Tensor], Tensor] = lambda answers: (answers - answers.mean(0)).square().mean(0),
    over: Callable[[Tensor], Tensor] = torch.mean,
    first: Callable[[Tensor, Tensor], Tensor] = lambda mean, targets: (mean - targets).square(),
    size: Callable[[Tensor], Tensor] = torch.square,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The error of the mean, the members' own and their ``spread``, all ``over`` what is left of [N]."""
    members = size(answers - aim(targets)).mean(0)
    return over(first(answers.mean(0), targets)), over(members), over(spread(answers))


def _reordered(answers: Tensor, targets: Tensor, order: Sequence[int] = (1, 0, 2)) -> tuple[Tensor, ...]:
    found = _ambiguity(answers, targets)
    return tuple(found[place] for place in order)


def _negative(answers: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ensemble, members, spread = _ambiguity(answers, targets)
    return ensemble, members, -spread


_AROUND_THE_MEAN = [
    "Two members say 1 and 5. How far are they from their own mean, squared and averaged?",
    "The ambiguity does not know the targets: it is how far the members are from what they say together.",
]
_IDENTITY = "Print first - (second - third). It is 0, for any answers and targets."
_OVER_M = [_IDENTITY, "torch.var divides by M - 1 unless correction=0 is said. By what is the second number divided?"]
_ORDER = "In this order: the error of the mean, the members' mean error, the ambiguity."
_MEAN_FIRST = [
    "Two members say 1 and 3, the target is 2. What is the error of their mean, and what is yours?",
    "For each example: the members' mean, its distance from the target, squared. Then the mean over the examples.",
]
_EXAMPLES = ["Write each example twice. Should the three numbers change?", "All three are means over the N examples."]
_PLACES = ["answers is [M, N]: a row is a member, a column an example.", *_AROUND_THE_MEAN]
_FAR = 1e7
_LOST = [
    "What is left of the digits of a² - b² where both are 10¹⁴, and their difference is 1?",
    "Take the differences from the mean first, and square them then.",
]


def _far_off(found: Any, right: Any, answers: Tensor, targets: Tensor) -> None:
    if answers.mean() > _FAR / 2 and close(found[:2], right[:2]) and len(found) == len(right):
        raise Wrong("the digits of the ambiguity are lost where answers lie far from 0", _LOST)


exercise_2 = Method(
    "What an ensemble gains: the ambiguity",
    right=_ambiguity,
    explain=lambda found, *others: _far_off(found, *others) if isinstance(found, (tuple, list)) else None,
    what=("the ensemble's error", "the members' error", "the ambiguity"),
    hint=[_IDENTITY, *_MEAN_FIRST, *_AROUND_THE_MEAN],
    unchanged="answers -= … writes into the caller's answers; answers - … makes new ones.",
    cases={
        "4 members, 4 examples": (normal(1411, 4, 4) + 1, 2 * normal(1412, 4)),
        "3 members, 7 examples": (normal(1413, 3, 7) * torch.arange(1, 4)[:, None], normal(1414, 7) - 1),
        "float32": (normal(1415, 5, 6).float(), normal(1416, 6).float()),
        "a single member": (normal(1417, 1, 5), normal(1418, 5)),
        "answers far from 0": (normal(1419, 3, 6) + _FAR, normal(1420, 6) + _FAR),
    },
    mistakes=[
        Mistake(partial(_ambiguity, spread=lambda answers: answers.var(0)),
                "the ambiguity is divided by M - 1, and the sum does not come out", _OVER_M),
        Mistake(partial(_ambiguity, spread=lambda answers: answers.std(0, correction=0)),
                "the members' spread is not squared", _AROUND_THE_MEAN),
        Mistake(partial(_ambiguity, spread=lambda answers: (answers - answers.mean()).square().mean(0)),
                "the spread is taken about one mean of all answers, not about each example's own", _AROUND_THE_MEAN),
        Mistake(partial(_ambiguity, spread=lambda answers: answers.var(1, correction=0)),
                "the third number is how far each member's answers differ from example to example", _PLACES),
        Mistake(partial(_ambiguity, spread=lambda answers: (answers - answers.mean(0)).abs().mean(0)),
                "the members' distances from their mean are not squared", _AROUND_THE_MEAN),
        Mistake(_negative, "the ambiguity comes out below 0: a mean of squares cannot", _IDENTITY),
        Mistake(_reordered, "the first two numbers are in each other's place", _ORDER),
        Mistake(partial(_reordered, order=(0, 2, 1)), "the last two numbers are in each other's place", _ORDER),
        Mistake(partial(_ambiguity, over=torch.sum), "the errors are added up over the examples", _EXAMPLES),
        Mistake(partial(_ambiguity, first=lambda mean, targets: (mean.mean() - targets.mean()).square()),
                "the errors of the examples cancel before they are squared",
                ["On one example the mean is 1 too high, on another 1 too low. What is its error?", _MEAN_FIRST[1]]),
        Mistake(partial(_ambiguity, size=torch.abs), "the members' errors are not squared",
                ["Two members say 1 and 5, the target is 2. What is the mean of their own squared errors?",
                 "The second number: each member's distance from the target, squared, then the mean over all."]),
        Mistake(partial(_ambiguity, aim=lambda targets: targets[:, None]),
                "each member is compared with one target, not with one for each example", _PLACES),
        # Right as long as there are two members
        Mistake(partial(_ambiguity, spread=lambda answers: (answers - answers.mean(0)).square().sum(0)
                        / max(len(answers) - 1, 1)),
                "the ambiguity is divided by M - 1, and the sum does not come out", _OVER_M),
    ],
)  # fmt: skip


# Exercise 3: the expected calibration error


def _by_width(confidence: Tensor, bins: int) -> Tensor:
    return (confidence * bins).ceil().long().clamp(1, bins) - 1


def _from_low_to_high(confidence: Tensor, bins: int) -> Tensor:
    low, high = confidence.min(), confidence.max()
    return _by_width((confidence - low) / (high - low), bins)


def _by_number(confidence: Tensor, bins: int) -> Tensor:
    return confidence.argsort().argsort() * bins // len(confidence)


def _middles(mean: Tensor, bins: int) -> Tensor:
    return ((torch.arange(bins) + 0.5) / bins).to(mean)


def _weighted(gaps: Tensor, count: Tensor) -> Tensor:
    return (gaps.abs() * count).nan_to_num().sum() / count.sum()


def _ece(
    probabilities: Tensor, labels: Tensor, bins: int, *,
    sure: Callable[[Tensor, Tensor], Tensor] = lambda probabilities, labels: probabilities.max(1).values,
    place: Callable[[Tensor, int], Tensor] = _by_width,
    says: Callable[[Tensor, int], Tensor] = lambda mean, bins: mean,
    join: Callable[[Tensor, Tensor], Tensor] = _weighted,
) -> Tensor:  # fmt: skip
    """What the gaps of the bins ``join`` to, where each confidence has its ``place``."""
    confidence = sure(probabilities, labels)
    right = (probabilities.argmax(1) == labels).to(confidence)
    where = place(confidence, bins)
    count, sure_of, right_in = (
        confidence.new_zeros(bins).index_add_(0, where, each)
        for each in (torch.ones_like(confidence), confidence, right)
    )
    return join(right_in / count - says(sure_of / count, bins), count)


def _below_one(probabilities: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Of the examples whose confidence is below 1, over the number of all."""
    stay = probabilities.max(1).values < 1
    return _ece(probabilities[stay], labels[stay], bins) * stay.double().mean()


def _forecasts(
    seed: int, examples: int, classes: int, bins: int, *, leave: int = -1, sure: int = 0
) -> tuple[Tensor, Tensor, int]:
    """Probabilities, labels that fit the less sure half of them more often than the surer one, and the number of bins.

    No example lies in the bin ``leave``; ``sure`` examples have the confidence 1.
    """
    draw = torch.Generator().manual_seed(seed)
    scale = 0.3 + 4 * torch.rand(4 * examples, 1, generator=draw, dtype=torch.float64)
    q = (scale * normal(seed + 1, 4 * examples, classes)).softmax(1)
    q = q[_by_width(q.max(1).values, bins) != leave][:examples]
    q[:sure] = F.one_hot(q[:sure].argmax(1), classes).double()
    confidence = q.max(1).values
    right = torch.rand(examples, generator=draw) < torch.where(confidence < confidence.median(), 0.8, 0.4)
    other = (q.argmax(1) + 1 + torch.arange(examples) % (classes - 1)) % classes
    return q, torch.where(right, q.argmax(1), other), bins


def _in_float32(probabilities: Tensor, labels: Tensor, bins: int) -> Case:
    return probabilities.float(), labels, bins


_SHARES = [
    "One bin holds 99 examples, another one. Should both gaps count alike?",
    "Each gap counts by the share of all N examples that its bin holds.",
]
_SIZES = [
    "One bin says 0.9 and is right in 0.7, another says 0.6 and is right in 0.8. Is that calibrated?",
    "Take the size of each bin's gap before you add.",
]
_TOP = [
    "What does a network know when it answers: the probability of its answer, or that of the label?",
    "The confidence is probabilities.max(1).values, the answer its argmax.",
]
_WIDTHS = [
    "With two bins: in which one is a confidence of 0.45, whatever the other examples are?",
    "Bin b goes from b / bins to (b + 1) / bins.",
]
_INSIDE = "All examples of a bin say 0.99. Is that its confidence, or the middle of its edges?"
_EMPTY = ["What is the mean of no examples?", "A bin without examples adds nothing: leave it out."]
_ONE = "In which of your bins is a confidence of exactly 1?"

exercise_3 = Method(
    "The expected calibration error",
    right=_ece,
    what="the calibration error",
    hint=[*_TOP, *_WIDTHS, *_SIZES, *_SHARES],
    unchanged="probabilities[…] = … writes into the caller's probabilities.",
    cases={
        "60 examples, 8 classes, 4 bins": _forecasts(1421, 60, 8, 4),
        "90 examples, 12 classes, 5 bins": _forecasts(1423, 90, 12, 5),
        "float32": _in_float32(*_forecasts(1425, 50, 3, 3)),
        "a bin without examples": _forecasts(1427, 40, 9, 4, leave=2),
        "some examples of confidence 1": _forecasts(1429, 40, 8, 4, sure=3),
        "30 bins": _forecasts(1431, 25, 4, 30),
    },
    mistakes=[
        Mistake(partial(_ece, join=lambda gaps, count: gaps.abs().nanmean()),
                "all bins count alike, however many examples they hold", _SHARES),
        Mistake(partial(_ece, join=lambda gaps, count: gaps.abs().nansum()), "the gaps are added up, unweighted",
                _SHARES),
        Mistake(partial(_ece, join=lambda gaps, count: (gaps * count).nansum() / count.sum()),
                "gaps of both signs cancel", _SIZES),
        Mistake(partial(_ece, join=lambda gaps, count: ((gaps * count).nansum() / count.sum()).abs()),
                "gaps of both signs cancel", _SIZES),
        Mistake(partial(_ece, join=lambda gaps, count: _weighted(gaps.square(), count)),
                "the gaps are squared", _SIZES[1]),
        Mistake(partial(_ece, join=lambda gaps, count: _weighted(gaps.square(), count).sqrt()),
                "this is the root of the mean squared gap", _SIZES[1]),
        Mistake(partial(_ece, join=lambda gaps, count: gaps.abs().nan_to_num().max()),
                "this is the largest gap: the maximum calibration error", _SHARES),
        Mistake(partial(_ece, sure=lambda probabilities, labels: probabilities.gather(1, labels[:, None])[:, 0]),
                "the confidence is taken from the label's probability", _TOP),
        Mistake(partial(_ece, place=_by_number), "the bins hold equally many examples, and are not equally wide",
                _WIDTHS),
        Mistake(partial(_ece, place=_from_low_to_high),
                "the bins share out what lies between the smallest and the largest confidence, not 0 to 1", _WIDTHS),
        Mistake(partial(_ece, says=_middles), "a bin's confidence is taken to be the middle of its edges", _INSIDE),
        # Right as long as no bin is empty
        Mistake(partial(_ece, join=lambda gaps, count: (gaps.abs() * count).sum() / count.sum()),
                "a bin without examples makes it NaN: 0 / 0", _EMPTY),
        # Right as long as no confidence is 1
        Mistake(_below_one, "examples of confidence 1 are in no bin", _ONE),
    ],
)  # fmt: skip


# Accuracy, in percent, of answers of a confidence of 35, 45, … 85%: of the members (on average), and of their mean.
# Ada's members are 15 to 19 points below what they say, Cleo's 13 to 17, Dan's 7 to 9 above, Ben's right on it; the
# mean is 14 to 18 above Ada's members, 7 to 15 above Ben's, 1 above Cleo's and 6 to 14 above Dan's.
exercise_4 = Reading(
    "Four reliability diagrams: a figure to read",
    right=("Ben", "c"),
    choices={
        "Ada": "Ada's members say more than they know: nobody calibrated them. Their mean, which is less sure than "
        "they are, comes out right",
        "Ben": "",
        "Cleo": "Cleo's members say more than they know, and so does their mean: members that are all alike make a "
        "mean that is like each of them",
        "Dan": "Dan's members know more than they say before anything is averaged: too high a temperature, say",
    },
    reasons={
        "a": "that holds for Dan too, whose members know more than they say already",
        "b": "that holds for Ada and Dan too: a mean of different members is more often right than it says, whatever "
        "the members were",
        "c": "",
        "d": "that holds for Ada too, where it is the ensemble that says what it knows",
    },
    hint=["Which curve shows whether each member was calibrated on its own, and where should it lie?",
          "Averaging spreads probability over what the members disagree about, and makes the mean less sure."],
    reason_hint="Try each reason on the three other panels. Which of them is true of none?",
)  # fmt: skip


# Exercise 5: a stack that is shown what its members have learned

_STACK = (
    "what the stack says of new rows", "the number of rows that the top learns", "the number of rows out of place",
    "the number of answers to rows that were learned", "the number of answers of members that learned too little",
)  # fmt: skip
"""What is seen of a stack."""

_NEW = 1000
"""New rows are numbered from here on."""
_LEARNED, _LITTLE = 0.5, 0.25
"""What a member adds to the number of a row that it has learned, and if it has learned less than all folds but one."""


def _spied(rule: Rule, seed: int, examples: int, learners: int, folds: int) -> tuple[Any, ...]:
    """Let a rule stack members that say which row they are asked about, and whether they have learned it.

    A row's first column is its number, and its target is 3 times that. For a new row a member adds half of the share
    of the examples that it has learned. The top's answer is the members' mean, less the first new number.
    """
    draw = torch.Generator().manual_seed(seed)
    x, new = normal(seed, examples, 3).float(), normal(seed + 1, 4, 3).float()
    x[:, 0] = torch.randperm(examples, generator=draw) + 1
    new[:, 0] = torch.arange(_NEW, _NEW + len(new))
    shown: list[tuple[Tensor, Tensor]] = []

    def learn(x: Tensor, y: Tensor) -> Rule:
        known = x[:, 0].clone()
        if not close(y, 3 * known):
            raise ValueError("a member is handed rows and targets that do not belong together")
        share, little = len(known) / examples, len(known) < examples - math.ceil(examples / folds)

        def member(x: Tensor) -> Tensor:
            number = x[:, 0]
            learned = torch.isin(number, known)
            return number + torch.where(number < _NEW, _LEARNED * learned + _LITTLE * little, share / 2)

        return member

    def top(said: Tensor, y: Tensor) -> Rule:
        if said.shape != (len(y), learners):
            raise ValueError(f"the top is shown answers {list(said.shape)}, and wants [{len(y)}, {learners}]")
        shown.append((said.clone(), y.clone()))
        return lambda said: said.mean(1) - _NEW

    answers = rule([learn] * learners, top, x, 3 * x[:, 0], new, folds)
    if not shown:
        raise Wrong("the top learns nothing: it is handed no answers", _FOLLOW_A_ROW)
    said, y = shown[-1]
    number, extra = said.floor(), said - said.floor()
    found = (number != y[:, None] / 3).any(1), extra >= _LEARNED, extra % _LEARNED >= _LITTLE
    return answers, len(y), *(int(each.sum()) for each in found)


def _stacked(
    learners: Sequence[Rule], top: Rule, x: Tensor, y: Tensor, new: Tensor, folds: int, *,
    learns: Callable[[Tensor], Tensor] = lambda held: ~held,
    answers: Callable[[Tensor], Tensor] = lambda held: held,
    puts: Callable[[Tensor, list[Tensor], list[Tensor]], Any] = lambda row, places, parts: None,
    members: Callable[[Rule, Tensor, Tensor, Rule], Rule] = lambda learn, x, y, last: learn(x, y),
    rows: Callable[[Tensor], Tensor] = torch.ones_like,
) -> Tensor:  # fmt: skip
    """For each fold that is ``held`` a member ``learns`` some rows and ``answers`` for some, written over older ones.

    ``puts`` writes them once more, all together; the top learns ``rows`` of the last ``held``; ``members`` are made
    for the new rows.
    """
    fold = torch.arange(len(x)) % folds
    said, lasts = torch.zeros(len(x), len(learners), dtype=x.dtype), []
    for row, learn in zip(said.mT, learners, strict=True):
        places, parts = [], []
        for k in range(folds):
            held = fold == k
            lasts.append(learn(x[learns(held)], y[learns(held)]))
            places.append(answers(held))
            parts.append(lasts[-1](x[places[-1]]))
            row[places[-1]] = parts[-1]
        puts(row, places, parts)
    used = rows(held)
    judge = top(said[used], y[used])
    ready = [members(learn, x, y, last) for learn, last in zip(learners, lasts[folds - 1 :: folds], strict=True)]
    return judge(torch.stack([member(new) for member in ready], dim=1))


def _in_the_order_of_folds(row: Tensor, places: list[Tensor], parts: list[Tensor]) -> None:
    row.copy_(torch.cat(parts))


_FOLLOW_A_ROW = [
    "Follow one row through the folds: who answers for it, and which rows has that member learned?",
    "The top should see what a member says of rows that are new to it, since that is what it will see of new rows.",
]
_PART = [*_FOLLOW_A_ROW, "`part` is what a fold's member learns. Which rows has it not learned?"]
_PLACE = [
    "Print fold. In which order do the parts come that you join, and in which order is y?",
    "answers[held] = … puts each answer where its row is.",
]
_ALL_BUT_ONE = "With five folds each member learns four parts, and answers for the fifth."
_AT_LAST = "New rows are nobody's fold. Which members know most, and did the last loop make them?"
_SEEN: tuple[tuple[str, Hints], ...] = (
    ("the top does not learn each row once", _FOLLOW_A_ROW),
    ("answers stand beside the target of another row", _PLACE),
    ("the top is shown answers to rows that their member has learned", _PART),
    ("answers come from members that learned less than all folds but one", _ALL_BUT_ONE),
)


def _seen_of_a_stack(found: tuple[Any, ...], right: tuple[Any, ...], *case: Any) -> None:
    for (message, hints), number, wanted in zip(_SEEN, found[1:], right[1:], strict=True):
        if number != wanted:
            raise Wrong(message, hints)


exercise_5 = Method(
    "Find the bug: a stack that trusts the wrong member",
    right=_stacked,
    ask=_spied,
    explain=_seen_of_a_stack,
    what=_STACK,
    hint=[*_PART, _AT_LAST],
    cases={
        "12 rows, 2 learners, 3 folds": (1441, 12, 2, 3),
        "17 rows, 3 learners, 5 folds": (1443, 17, 3, 5),
        "9 rows, one learner, 2 folds": (1445, 9, 1, 2),
    },
    mistakes=[
        Mistake(partial(_stacked, learns=torch.ones_like),
                "each answer that the top is shown comes from a member that has learned that very row", _PART),
        Mistake(partial(_stacked, answers=torch.ones_like),
                "each fold's member answers for all rows, and the last one's answers stay: it has learned most of them",
                _PART),
        Mistake(partial(_stacked, learns=lambda held: held),
                "each fold's member answers for the very rows that it has learned, and has learned no others", _PART),
        Mistake(partial(_stacked, learns=lambda held: held, answers=lambda held: ~held),
                "each fold's member learns one part only, and answers for all others", _ALL_BUT_ONE),
        Mistake(partial(_stacked, puts=_in_the_order_of_folds),
                "the answers come fold by fold, and the targets do not: each stands beside another row's target",
                _PLACE),
        Mistake(partial(_stacked, members=lambda learn, x, y, last: last),
                "members that had to leave a fold out answer for new rows", _AT_LAST),
        Mistake(partial(_stacked, rows=lambda held: held), "the top learns the last fold alone", _FOLLOW_A_ROW),
    ],
)  # fmt: skip


# Exercise 6: one round of boosting

_VOICE_WITHOUT_ERROR = 1.0


def _share_of_weight(weights: Tensor, wrong: Tensor) -> Tensor:
    return weights[wrong].sum() / weights.sum()


def _samme_alpha(error: Tensor, classes: int) -> Tensor:
    return ((1 - error) / error).log() + math.log(classes - 1)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum()


def _round(
    weights: Tensor, named: Tensor, labels: Tensor, classes: int, *,
    share: Callable[[Tensor, Tensor], Tensor] = _share_of_weight,
    voice: Callable[[Tensor, int], Tensor] = _samme_alpha,
    chance: Callable[[int], float] = lambda classes: 1 - 1 / classes,
    perfect: Callable[[Tensor], Tensor] = lambda error: torch.full_like(error, _VOICE_WITHOUT_ERROR),
    grow: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda weights, wrong, alpha: weights * (alpha * wrong).exp(),
    end: Callable[[Tensor], Tensor] = _normalised,
    stay: Callable[[Tensor], Tensor] = _normalised,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Alpha and what the weights ``grow`` to in the ``end``, by the ``share`` that is wrong.

    Where none is, alpha is ``perfect``; where that is no better than ``chance``, alpha is 0; and the weights ``stay``.
    """
    wrong = named != labels
    error = share(weights, wrong)
    if error == 0:
        return perfect(error), stay(weights)
    if error >= chance(classes):
        return torch.zeros_like(error), stay(weights)
    alpha = voice(error, classes)
    return alpha, end(grow(weights, wrong, alpha))


def _boosting(seed: int, examples: int, classes: int, misses: int, *, weigh: float = 1.0, heavy: bool = False) -> Case:
    """So many examples are named wrongly, the first ones; weights of the sum ``weigh``, theirs large if ``heavy``."""
    weights = normal(seed, examples).abs() + 0.2
    weights[:misses] *= 6 if heavy else 1
    labels = torch.randint(classes, (examples,), generator=torch.Generator().manual_seed(seed))
    named = labels.clone()
    named[:misses] = (named[:misses] + 1 + torch.arange(misses) % (classes - 1)) % classes
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed + 1))
    return (weigh * weights / weights.sum())[order], named[order], labels[order], classes


def _weightless(weights: Tensor, named: Tensor, labels: Tensor, classes: int) -> Case:
    return weights.where(named == labels, 0), named, labels, classes


def _float32(weights: Tensor, *others: Any) -> Case:
    return weights.float(), *others


_BY_WEIGHT = [
    "One example has the weight 0.9 and is named wrongly, nine others are right. How large is the error?",
    "The error is the weights of the mistakes, added up, over the sum of all weights.",
]
_CLASSES = [
    "Ten classes, an error of 0.6: is the learner better than guessing? And what does your alpha say?",
    "SAMME adds log(K - 1), so that alpha is 0 at the error of guessing, 1 - 1/K.",
]
_GROWTH = [
    "Give the new weights to the same learner: at which error is it now? After a right round it is at 1 - 1/K.",
    "Weights of mistakes are multiplied by e^alpha, the others stay; then all are divided by their sum.",
]
_HARD = "The next learner should look at what this one got wrong. Which weights are larger after yours?"
_SUM = "What do the new weights add up to?"
_NO_ERROR = [
    "Without an error log((1 - ε)/ε) is infinite, and no rounding should decide how large. What does the text set?",
    "Ask for ε == 0 before you take a logarithm.",
]
_GUESSING = [
    "Beyond guessing, alpha falls below 0. What does the text set there?",
    "From ε = 1 - 1/K on: alpha is 0, and the weights stay, normalised.",
]


def _at_the_ends(found: Any, right: Any, weights: Tensor, named: Tensor, labels: Tensor, classes: int) -> None:
    error = _share_of_weight(weights, named != labels)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        return
    if error == 0 and not close(found[0], right[0]):
        raise Wrong("without an error alpha is not what the text sets", _NO_ERROR)
    if error > 1 - 1 / classes and not close(found[0], right[0]):
        raise Wrong("of a learner that is worse than guessing alpha is not what the text sets", _GUESSING)


exercise_6 = Method(
    "One round of boosting, with many classes",
    right=_round,
    explain=_at_the_ends,
    what=("alpha", "the new set of weights"),
    hint=[*_BY_WEIGHT, *_CLASSES, *_GROWTH],
    unchanged="weights[wrong] *= … and weights /= … write into the caller's weights: work with a copy.",
    cases={
        "10 examples, 4 classes, 3 mistakes": _boosting(1461, 10, 4, 3),
        "12 examples, 5 classes, most of them wrong": _boosting(1463, 12, 5, 8),
        "weights that add up to 7": _boosting(1465, 9, 3, 2, weigh=7.0),
        "two classes": _boosting(1467, 8, 2, 2),
        "float32": _float32(*_boosting(1469, 11, 6, 4)),
        "no mistake": _boosting(1471, 6, 3, 0, weigh=2.0),
        "mistakes of the weight 0 alone": _weightless(*_boosting(1473, 8, 3, 2)),
        "a learner that is worse than guessing": _boosting(1475, 8, 3, 5, weigh=3.0, heavy=True),
        "all examples wrong": _boosting(1477, 5, 4, 5),
    },
    mistakes=[
        Mistake(partial(_round, voice=lambda error, classes: ((1 - error) / error).log()),
                "log(K - 1) is missing: this is AdaBoost for two classes", _CLASSES[1]),
        Mistake(partial(_round, voice=lambda error, classes: ((1 - error) / error).log() + math.log(classes)),
                "log K is added, not log(K - 1)", _CLASSES),
        Mistake(partial(_round, voice=lambda error, classes: _samme_alpha(error, classes) / 2),
                "alpha is halved: that goes with weights that grow and shrink by e^(±alpha), for two classes",
                _GROWTH),
        Mistake(partial(_round, voice=lambda error, classes: -((1 - error) / error).log() + math.log(classes - 1)),
                "the fraction is upside down: the more a learner errs, the louder its voice",
                "Compare an error of 0.1 with one of 0.6: whose voice should be louder, and whose is in yours?"),
        Mistake(partial(_round, share=lambda weights, wrong: wrong.to(weights).mean()),
                "mistakes are counted, whatever they weigh", _BY_WEIGHT),
        Mistake(partial(_round, share=lambda weights, wrong: weights[~wrong].sum() / weights.sum()),
                "this is the share that is right", _BY_WEIGHT),
        Mistake(partial(_round, grow=lambda weights, wrong, alpha: weights * (alpha * ~wrong).exp()),
                "the examples that were right grow, not the mistakes", _HARD),
        Mistake(partial(_round, grow=lambda weights, wrong, alpha: weights * (alpha * (2.0 * wrong - 1)).exp()),
                "mistakes grow by e^alpha and the others shrink by as much: both together are e^(2 alpha)", _GROWTH),
        Mistake(partial(_round, grow=lambda weights, wrong, alpha: torch.where(wrong, weights * alpha, weights)),
                "the mistakes are multiplied by alpha, not by e^alpha", _GROWTH),
        Mistake(partial(_round, grow=lambda weights, wrong, alpha: weights), "the weights stay as they were", _HARD),
        Mistake(partial(_round, end=lambda grown: grown), "the new weights are not normalised", _SUM),
        Mistake(partial(_round, chance=lambda classes: 0.5),
                "a learner that errs on more than half is thrown away: of five classes guessing errs on 0.8", _CLASSES),
        # Right as long as the weights add up to 1
        Mistake(partial(_round, share=lambda weights, wrong: weights[wrong].sum()),
                "the weights of the mistakes are not divided by the sum of all", _BY_WEIGHT),
        # Right as long as there is an error
        Mistake(partial(_round, perfect=lambda error: torch.full_like(error, math.inf)),
                "without an error alpha comes out infinite: its vote would drown all others, or be NaN", _NO_ERROR),
        Mistake(partial(_round, perfect=lambda error: torch.zeros_like(error)),
                "a learner without an error is given no voice", _NO_ERROR),
        Mistake(partial(_round, stay=lambda weights: weights), "where the weights stay they are not normalised", _SUM),
        # Right as long as it is better than guessing
        Mistake(partial(_round, chance=lambda classes: math.inf),
                "a learner that is worse than guessing is given a voice below 0", _GUESSING),
    ],
)  # fmt: skip


# Exercise 7: an ensemble within a budget

BUDGET = 120_000
"""Multiply-adds for an answer: one network of 238 units takes as many, or four of 85, or sixteen of 25."""
DIFFERENCES = ("nothing", "seed", "bootstrap")
"""Members start alike and see the same batches; differ in both; and each learns a bootstrap sample of its own, too."""

HIDDEN, MOST = (1401, 1402), 0.33
"""Means over eight other seeds: four members of 85 units reach 0.319, 0.295 and 0.296 at rates of 0.003, 0.005 and
0.008 (a deviation of 0.012 between seeds), three of 108 0.304, six of 61 0.299, eight of 47 0.307 at best, two of 145
0.317. One network of 238 units has 0.355 at the best of four rates, bootstrap samples 0.351 at the best of six
settings, sixteen members of 25 units 0.374, the same member several times 0.419. Over the hidden seeds, in this order:
0.302 (four of 85, at 0.005), 0.317, 0.308, 0.316, 0.331; 0.372, 0.347, 0.373, 0.399."""

TRAINING = Recipe(epochs=1, batch_size=100, precision="float64")


@functools.cache
def _drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to learn, and to be judged by."""
    data = load("glyphs", classes="digits", size=16, difficulty=0.5, count=6100, train_size=1000, val_size=100,
                test_size=5000, seed=seed)  # fmt: skip
    train, test = (normalise(split.inputs, data.train).double() for split in (data.train, data.test))
    return train, data.train.labels, test, data.test.labels


@functools.cache  # so that a second try with the same settings costs nothing
def _outcome(members: int, width: int, differ: str, lr: float, epochs: int, seed: int) -> float:
    """The negative log-likelihood of the members' mean, each trained with shifts by a pixel."""
    x, y, x_test, y_test = _drawn(seed)
    count = 1 if differ == "nothing" else members  # of networks that are all the same one says it all
    draw = torch.Generator().manual_seed(seed)
    sample = torch.arange(len(x)).repeat(count, 1)
    if differ == "bootstrap":
        sample = torch.randint(len(x), sample.shape, generator=draw)
    network = partial(mlp, (1, 16, 16), 10, width=width)
    stack = Stack([fresh(network, TRAINING, seed=seed + 1000 * member) for member in range(count)])
    optimizer = torch.optim.Adam(stack.parameters.values(), lr=lr)
    with one_thread():  # several would wait for each other where the machine has other work: batches are small
        for _ in range(epochs):
            order = torch.rand(sample.shape, generator=draw).argsort(1)
            for rows in sample.gather(1, order).split(TRAINING.batch_size, dim=1):
                shifted = random_shift(x[rows].flatten(0, 1), draw, 1).unflatten(0, rows.shape)
                optimizer.zero_grad()
                stack.losses(shifted, y[rows]).sum().backward()
                optimizer.step()
        with torch.no_grad():
            return F.nll_loss(_pooled(stack.forward(x_test)), y_test).item()


_FOR_INSTANCE = 'For instance: mine = dict(members=2, width=100, differ="seed", lr=0.003, epochs=20)'
_ALIKE = "What an ensemble gains is how far its members are apart. How far are yours?"
_FEWER_IMAGES = "How many different images does a bootstrap sample hold, and does its member need the others?"
_NARROW = "What does one of your members reach alone? The mean gains what they differ by, and no more."
_RESTED = "Look at the training loss over the epochs: has it come to rest at this rate?"
_RANGES = (("members", 1, 16), ("width", 4, 300), ("lr", 1e-5, 0.1), ("epochs", 1, 40))


def cost(members: int, width: int) -> int:
    """The multiply-adds for an answer of so many MLPs with two hidden layers, 256 inputs and 10 outputs."""
    return members * (256 * width + width**2 + 10 * width)


def _settings(answer: Any) -> tuple[int, int, str, float, int]:
    if not isinstance(answer, Mapping) or set(answer) != {"members", "width", "differ", "lr", "epochs"}:
        raise Wrong("expected a dict of members, width, differ, lr, epochs", _FOR_INSTANCE)
    differ = answer["differ"]
    if not isinstance(differ, str) or differ not in DIFFERENCES:
        raise Wrong(f"differ is {differ!r}", f"There are {', '.join(map(repr, DIFFERENCES))}.")
    found = {}
    for name, low, high in _RANGES:
        try:
            found[name] = float(answer[name])
        except (TypeError, ValueError, RuntimeError):
            kind = type(answer[name]).__name__
            raise Wrong(f"{name} should be a number, and is of type {kind}", _FOR_INSTANCE) from None
        if not low <= found[name] <= high:
            raise Wrong(f"{name} is {found[name]:g}", f"It may go from {low:g} to {high:g}.")
        if name != "lr" and not found[name].is_integer():
            raise Wrong(f"{name} is {found[name]:g}", f"It should be a whole number from {low:g} to {high:g}.")
    members, width, epochs = (int(found[name]) for name in ("members", "width", "epochs"))
    if (taken := cost(members, width)) > BUDGET:
        raise Wrong(f"an answer takes {taken:,} multiply-adds; there are {BUDGET:,}",
                    "members * (256 * width + width**2 + 10 * width)")  # fmt: skip
    return members, width, differ, found["lr"], epochs


def exercise_7(answer: Any) -> None:
    """An ensemble within a budget: how many, how wide, and what makes them differ"""
    settings = _settings(answer)
    members, width, differ = settings[:3]
    mean = float(np.mean([_outcome(*settings, seed) for seed in HIDDEN]))
    if not mean <= MOST:
        narrow = [_NARROW, _RESTED] if width < 40 else [_RESTED, _NARROW]
        alike = members == 1 or differ == "nothing"
        hints = [_ALIKE, *narrow] if alike else [_FEWER_IMAGES, *narrow] if differ == "bootstrap" else narrow
        raise Wrong(f"a mean negative log-likelihood of {mean:.3f} over {len(HIDDEN)} hidden seeds; the limit is "
                    f"{MOST}", hints)  # fmt: skip


exercise_8 = OpenProject(
    "An open project: an ensemble of your own",
    rubric=["the members", "the rivals", "the cost", "what is measured", "honesty"],
)
