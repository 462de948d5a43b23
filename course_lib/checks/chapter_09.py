"""Checks of chapter 9, distillation: four methods to write, a figure to read, a bug to find, a teacher to choose.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.checks.designs import normal
from course_lib.lab.data import Dataset, load
from course_lib.lab.experiments import one_thread
from course_lib.lab.judging import Case, Hints, Method, Mistake, OpenProject, Reading, Rule, Wrong, close
from course_lib.lab.models import freeze, mlp
from course_lib.lab.training import Inputs, Recipe, evaluate, fit, fresh, logits_of


def _numbers(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Exercise 1: probabilities at a temperature


def _soft(
    logits: Tensor, T: float, *,
    cooled: Callable[[Tensor, float], Tensor] = lambda logits, T: logits / T,
    probabilities: Callable[[Tensor], Tensor] = lambda logits: logits.softmax(1),
    after: Callable[[Tensor, float], Tensor] = lambda p, T: p,
) -> Tensor:  # fmt: skip
    """``after`` of the probabilities of ``cooled`` logits: [N, K] -> [N, K]."""
    return after(probabilities(cooled(logits, T)), T)


def _as_they_are(logits: Tensor, T: float) -> Tensor:
    return logits


def _exponentials(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(1, keepdim=True)


def _below_the_largest_of_all(logits: Tensor) -> Tensor:
    return _exponentials(logits - logits.max())


_WARMER = "Take the logits 0 and 2. At T = 1 the second has 88%. Should it have more or less at T = 4?"
_ROWS = "Print the sum of each row. What should it be?"
_BEFORE = ["The temperature acts on the logits. What comes first then, T or the softmax?", _ROWS]
_LARGE = [
    "What is exp(1000)? A softmax stays the same when a number is taken from all logits of a row: which one helps?",
    "torch's own softmax takes the largest logit of each row away before the exponential.",
]

exercise_1 = Method(
    "Probabilities at a temperature",
    right=_soft,
    what="the probabilities",
    hint=[_WARMER, _ROWS],
    unchanged="logits /= T changes the caller's logits; logits / T makes new ones.",
    cases={
        "4 examples of 3 classes at T = 3": (2 * normal(901, 4, 3), 3.0),
        "3 examples of 5 classes at T = 0.5": (normal(902, 3, 5), 0.5),
        "logits of 1000 at T = 1": (_numbers((1000, 998, 0), (-1000, -1001, -1004), (0, 3, 1)), 1.0),
        "a single example of 10 classes at T = 20": (4 * normal(903, 1, 10), 20.0),
        "2 examples in float32": (normal(904, 2, 4).float(), 2.0),
    },
    mistakes=[
        Mistake(partial(_soft, cooled=lambda logits, T: logits * T),
                "a higher temperature makes your answers surer: at T = 2 the logits 0 and 2 come out as 0 and 4 should",
                _WARMER),
        Mistake(partial(_soft, cooled=_as_they_are), "the temperature does nothing: 100 is like 1", _WARMER),
        Mistake(partial(_soft, probabilities=lambda logits: logits.softmax(0)),
                "the softmax is taken over the examples: two with the same logits have 0.5 for each class",
                ["Which of the two axes, N and K, holds the classes?", _ROWS]),
        Mistake(partial(_soft, cooled=_as_they_are, after=lambda p, T: p / T),
                "the probabilities are divided by T: at T = 2 each row adds up to 0.5", _BEFORE),
        Mistake(partial(_soft, cooled=_as_they_are, after=lambda p, T: p ** (1 / T)),
                "the probabilities are raised to 1/T and not brought back to a sum of 1: at T = 2, 0.5 and 0.5 become "
                "0.71 and 0.71", ["That is nearly it. What do the rows add up to, and what should they?", *_BEFORE]),
        Mistake(partial(_soft, cooled=_as_they_are, after=lambda p, T: (p / T).softmax(1)),
                "the softmax is taken twice: at T = 1 the logits 0 and 1000 become 0.27 and 0.73", _BEFORE),
        Mistake(partial(_soft, probabilities=torch.exp),
                "the rows do not add up to 1: two logits of 0 become 1 and 1", _ROWS),
        # Right as long as nobody is sure
        Mistake(partial(_soft, probabilities=_exponentials),
                "logits of 1000 become NaN: their exponential is infinite", _LARGE),
        Mistake(partial(_soft, probabilities=_below_the_largest_of_all),
                "the largest logit of the whole batch is taken away: an example whose logits are all far below it "
                "becomes 0 / 0", ["Each example has a largest logit of its own.", *_LARGE]),
    ],
)  # fmt: skip


# Exercise 2: the distillation loss

Terms = Callable[[Tensor, Tensor], Tensor]


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q)


def _over_examples(terms: Tensor) -> Tensor:
    return terms.sum(1).mean()


def _distil_loss(
    z: Tensor, v: Tensor, y: Tensor, T: float, mix: float, *,
    hard: Callable[[Tensor, Tensor, float], Tensor] = lambda z, y, T: F.cross_entropy(z, y),
    terms: Terms = _divergence,
    total: Callable[[Tensor], Tensor] = _over_examples,
    factor: Callable[[float], float] = lambda T: T**2,
    shares: Callable[[float], tuple[float, float]] = lambda mix: (1 - mix, mix),
    of_student: Callable[[Tensor, float], Tensor] = lambda z, T: (z / T).log_softmax(1),
    of_teacher: Callable[[Tensor, float], Tensor] = lambda v, T: (v / T).log_softmax(1),
) -> Tensor:  # fmt: skip
    """``shares(mix)`` of ``hard`` and of ``factor(T)`` times the ``total`` of ``terms(log p, log q)``."""
    of_labels, of_soft = shares(mix)
    soft = factor(T) * total(terms(of_teacher(v, T), of_student(z, T)))
    return of_labels * hard(z, y, T) + of_soft * soft


def _taught(seed: int, examples: int, classes: int, T: float, mix: float) -> Case:
    labels = torch.randint(classes, (examples,), generator=torch.Generator().manual_seed(seed))
    return 2 * normal(seed, examples, classes), 3 * normal(seed + 50, examples, classes), labels, T, mix


_SIZE = [
    "At T the gradient of the KL is about T² times smaller. How much does the teacher's word count then at T = 10?",
    "Which factor stands before the KL in the formula?",
]
_WHICH_WAY = "With p = (1, 0) and q = (0.5, 0.5) the KL is log 2. The other way round it is infinite. Which is yours?"
_ONE_NUMBER = "First the classes are added up, then the examples averaged. F.kl_div has a reduction that does that."
_LABELS_AT_ONE = "The labels' part is the usual cross-entropy. At which temperature will the student be used?"
_ENDS = "Take mix = 0: which of the two parts should be left? And mix = 1?"
_LOGS = "F.kl_div takes logarithms of q first, then p itself. What does it do with what you give it?"

exercise_2 = Method(
    "The distillation loss",
    right=_distil_loss,
    what="the loss",
    hint=["Take z = v and mix = 1. What should the loss be, and what is yours?", _ENDS, _ONE_NUMBER],
    unchanged="z /= T and v /= T change the caller's logits; z / T makes new ones.",
    cases={
        "6 examples of 4 classes, T = 3, mix = 0.3": _taught(911, 6, 4, 3.0, 0.3),
        "5 examples of 3 classes, T = 0.5, mix = 0.9": _taught(912, 5, 3, 0.5, 0.9),
        "the labels alone, mix = 0": _taught(913, 4, 5, 2.0, 0.0),
        "the teacher alone, mix = 1": _taught(914, 7, 2, 8.0, 1.0),
        "a single example of 10 classes": _taught(915, 1, 10, 4.0, 0.5),
        "logits of 1000, T = 1": (
            _numbers((1000, 0, -1000), (3, 1, 0)), _numbers((1000, 0, -1000), (2, 2, 0)), torch.tensor([0, 1]), 1.0, 0.5
        ),
    },
    mistakes=[
        Mistake(partial(_distil_loss, factor=lambda T: 1.0),
                "T² is left out: the hotter, the less the teacher's word counts beside the labels", _SIZE),
        Mistake(partial(_distil_loss, factor=lambda T: T), "the soft part is multiplied by T, and T² is wanted", _SIZE),
        Mistake(partial(_distil_loss, terms=lambda log_p, log_q: _divergence(log_q, log_p)),
                "the KL is the other way round: yours is KL(q‖p), in which the student's probabilities are the weights",
                _WHICH_WAY),
        Mistake(partial(_distil_loss, total=torch.mean),
                "the KL is divided by N · K: ten classes make it ten times too small", _ONE_NUMBER),
        Mistake(partial(_distil_loss, total=torch.sum),
                "the KL is added up over the examples: twice the batch, twice the loss", _ONE_NUMBER),
        Mistake(partial(_distil_loss, hard=lambda z, y, T: F.cross_entropy(z / T, y)),
                "the cross-entropy with the labels has the temperature as well", _LABELS_AT_ONE),
        Mistake(partial(_distil_loss, shares=lambda mix: (mix, 1 - mix)),
                "mix and 1 - mix are exchanged: at mix = 1 yours does not hear the teacher", _ENDS),
        Mistake(partial(_distil_loss, shares=lambda mix: (1.0, mix)),
                "the labels keep all of their weight: at mix = 1 they are still heard", _ENDS),
        Mistake(partial(_distil_loss, terms=lambda log_p, log_q: -log_p.exp() * log_q),
                "that is the soft cross-entropy: it has the same gradient, and the teacher's entropy on top",
                "Take z = v. A divergence from itself is 0; what is yours?"),
        Mistake(partial(_distil_loss, of_student=lambda z, T: (z / T).softmax(1)),
                "the student's probabilities stand where their logarithms should", _LOGS),
        Mistake(partial(_distil_loss, terms=lambda log_p, log_q: torch.full_like(log_p, torch.nan)),
                "the loss is NaN: the teacher's logarithms are taken as if they were its probabilities", _LOGS),
        Mistake(partial(_distil_loss, of_student=lambda z, T: z / T),
                "the student's logits stand where logarithms of probabilities should", _LOGS),
        Mistake(partial(_distil_loss, of_teacher=lambda v, T: v.log_softmax(1)),
                "the teacher's probabilities are those at temperature 1", "Both p and q are at T."),
        Mistake(partial(_distil_loss, of_student=lambda z, T: z.log_softmax(1)),
                "the student's probabilities in the KL are those at temperature 1", "Both p and q are at T."),
        Mistake(lambda z, v, *others: _distil_loss(v, z, *others),
                "student and teacher are exchanged: your teacher learns from the labels", "Whose logits are z?"),
        # Right as long as nobody is sure
        Mistake(partial(_distil_loss, of_student=lambda z, T: (z / T).softmax(1).log()),
                "a probability of 0 has no logarithm: where student or teacher is sure the loss becomes NaN",
                "Logits of 1000 and 0 have the log probabilities 0 and -1000. Which function gives them in one step?"),
    ],
)  # fmt: skip


# Exercise 3: the gradient of the soft loss


def _soft_gradient(
    z: Tensor, v: Tensor, T: float, *,
    pull: Callable[[Tensor, Tensor, float], Tensor] = lambda z, v, T: _soft(z, T) - _soft(v, T),
    factor: Callable[[float], float] = lambda T: T,
    over: Callable[[Tensor], int] = len,
) -> Tensor:  # fmt: skip
    """``factor(T)`` times the ``pull`` on each logit, ``over`` a count: [N, K] -> [N, K]."""
    return factor(T) * pull(z, v, T) / over(z)


def _logits_apart(z: Tensor, v: Tensor, T: float) -> Tensor:
    return z - v


def _centred_apart(z: Tensor, v: Tensor, T: float) -> Tensor:
    return (z - v) - (z - v).mean(1, keepdim=True)


_CHAIN = [
    "For logits u the KL has the gradient q - p. Here u = z / T: what does that add, and what does T² make of it?",
    "One T comes from z / T, and two from T². How many are left?",
]
_BY_TRIAL = "Move one logit by 1e-4 and look by how much the loss moves: that over 1e-4 is its gradient."
_DOWN = "Where the student gives a class too much, q > p, its logit should fall. Descent goes against the gradient."
_LIMIT = [
    "At T = 1 and logits of 5 the two are far apart: try. Which of the steps to it holds at high T alone?",
    "What is the gradient before softmax(z / T) is replaced by (1 + z / T) / K?",
]

exercise_3 = Method(
    "The gradient of the soft loss",
    right=_soft_gradient,
    what="the gradient",
    hint=[_BY_TRIAL, *_CHAIN],
    unchanged="z /= T changes the caller's logits; z / T makes new ones.",
    cases={
        "6 examples of 4 classes at T = 3": (2 * normal(921, 6, 4), 3 * normal(971, 6, 4), 3.0),
        "a single example of 3 classes at T = 0.5": (normal(922, 1, 3), normal(972, 1, 3), 0.5),
        "5 examples of 10 classes at T = 1": (2 * normal(923, 5, 10), 4 * normal(973, 5, 10), 1.0),
        "2 examples of 5 classes at T = 200": (3 * normal(924, 2, 5), 3 * normal(974, 2, 5) + 4, 200.0),
        "student and teacher alike": (normal(925, 3, 4), normal(925, 3, 4), 2.0),
        "2 examples in float32": (normal(926, 2, 3).float(), normal(976, 2, 3).float(), 2.0),
    },
    mistakes=[
        Mistake(partial(_soft_gradient, factor=lambda T: 1.0),
                "the factor of the temperature is missing: at a high T hardly a gradient is left", _CHAIN),
        Mistake(partial(_soft_gradient, factor=lambda T: T**2),
                "the gradient is T times too large: what z / T does to it is not in it", _CHAIN),
        Mistake(partial(_soft_gradient, factor=lambda T: 1 / T),
                "that is the gradient of the KL alone: the loss has T² before it", _CHAIN),
        Mistake(partial(_soft_gradient, pull=lambda z, v, T: _soft(v, T) - _soft(z, T)),
                "the sign is wrong: that is the way down, and the gradient points up", _DOWN),
        Mistake(partial(_soft_gradient, over=lambda z: 1),
                "that is the gradient for the sum over the examples: the loss is their mean", "What is N for?"),
        Mistake(partial(_soft_gradient, over=Tensor.numel),
                "it is divided by N · K, and the loss adds the classes up", "Over what is the mean taken?"),
        Mistake(partial(_soft_gradient, factor=lambda T: 1.0, pull=_logits_apart, over=Tensor.numel),
                "(z - v)/(N K) is only the limit at a high temperature, and only where each row of z and of v has the "
                "mean 0", _LIMIT),
        Mistake(partial(_soft_gradient, factor=lambda T: 1.0, pull=_centred_apart, over=Tensor.numel),
                "that is the limit at a high temperature: right at T = 1000, and not at this T", _LIMIT),
        Mistake(partial(_soft_gradient, pull=lambda z, v, T: _soft(z, 1) - _soft(v, 1)),
                "the probabilities are those at temperature 1", "q and p are both at T."),
    ],
)  # fmt: skip


# Four panels: test accuracy over the teacher's width. Ada's student rises until width 64 and stays there, while her
# teacher rises to the end. Ben's teacher is at its best at 64 and learns by heart beyond; his student follows it.
# Cleo's student lies below the line at every width, and rises with its teacher to the end. Dan's is at its best at 32
# and loses more than five points from there on, many times the scatter, while his teacher gains ten; it stays above the
# line. So reason a holds for Ada, Cleo and Dan, b for Cleo, d for Ada, Ben and Dan, and c for Dan alone.
exercise_4 = Reading(
    "Who needs a smaller teacher? A figure to read",
    right=("Dan", "c"),
    choices={
        "Ada": "Ada's student stays where it is from width 64 on: a smaller teacher is cheaper, and no better",
        "Ben": "Ben's large teachers are worse themselves, and the student goes where its teacher goes: it is the "
        "teacher's training that has to be mended",
        "Cleo": "Cleo's student gets better with every larger teacher: with a smaller one it would be still further "
        "below the line",
        "Dan": "",
    },
    reasons={
        "a": "Ada's and Cleo's students are as far below their teachers, and no smaller teacher would help them",
        "b": "at every width this student lies above the line; below it is Cleo's, which rises with its teacher",
        "c": "",
        "d": "it does not help Ada's student either, nor Ben's; what counts is what the teacher does meanwhile",
    },
    hint=["Go from the best student of each panel to the right. What does the student do there, and what its teacher?",
          "A smaller teacher is the answer where a worse one teaches more. In which panel is that so?"],
    reason_hint="Try each reason on the three other panels. Which of them is true of none?",
)  # fmt: skip


# Exercise 5: a teacher that is left in peace


_LEFT = (
    "the loss", "the student's weights", "the student's running statistics", "the student's mode",
    "the teacher's weights", "the teacher's running statistics", "the teacher's mode", "the teacher's gradients",
    "which of the teacher's parameters want a gradient",
)  # fmt: skip
"""What is compared after a step; modes and wishes as 0 and 1, a gradient that is not there as NaN."""


def _joined(tensors: Any) -> Tensor:
    return torch.cat([torch.as_tensor(tensor).detach().double().flatten() for tensor in tensors])


def _parts_of(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    return _joined(model.parameters()), _joined(model.buffers()), _joined(part.training for part in model.modules())


def _pair(seed: int, training: bool, graded: bool) -> tuple[nn.Module, nn.Module]:
    """A student in training, and a teacher with batch norm and dropout; ``graded``: with gradients from before."""
    student = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    teacher = nn.Sequential(
        nn.Linear(4, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3)
    ).double().train(training)  # fmt: skip
    for k, weight in enumerate([*student.parameters(), *teacher.parameters()]):
        weight.data.copy_(normal(seed + k, *weight.shape))
        # the student's are from the step before, and must not count again
        weight.grad = normal(seed + 20 + k, *weight.shape) if graded or k < 6 else None
    return student, teacher


def _after_a_step(rule: Rule, seed: int, training: bool, graded: bool, T: float, mix: float) -> tuple[Any, ...]:
    student, teacher = _pair(seed, training, graded)
    y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the teacher's dropout, where it has not been put to rest
        loss = rule(student, teacher, normal(seed + 60, 8, 4), y, optimizer, T, mix)
    gradients = [torch.full_like(w, torch.nan) if w.grad is None else w.grad for w in teacher.parameters()]
    wants = _joined(w.requires_grad for w in teacher.parameters())
    return loss, *_parts_of(student), *_parts_of(teacher), _joined(gradients), wants


def _step(
    student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, T: float,
    mix: float, *,
    evaluates: bool = True,
    returns: Callable[[nn.Module, bool], Any] = lambda teacher, was: teacher.train(was),
    gradients: bool = False,
    prepare: Callable[[nn.Module, nn.Module], Any] = lambda student, teacher: None,
    loss: Callable[..., Tensor] = _distil_loss,
) -> float:  # fmt: skip
    """The teacher ``evaluates`` or not, comes back by ``returns``, and keeps a graph if ``gradients``."""
    prepare(student, teacher)
    was = teacher.training
    if evaluates:
        teacher.eval()
    with torch.set_grad_enabled(gradients):
        v = teacher(x)
    if evaluates:
        returns(teacher, was)
    found = loss(student(x), v, y, T, mix)
    optimizer.zero_grad()
    found.backward()
    optimizer.step()
    return found.item()


def _stays(teacher: nn.Module, was: bool) -> None:
    """In evaluation, as it is."""


_STATISTICS = [
    "Print teacher[1].running_mean before and after the step. In which mode does a batch norm write into it?",
    "no_grad and detach keep gradients away. Dropout and batch norm do not ask for gradients: they ask for the mode.",
]
_GRADIENTS = [
    "Print teacher[0].weight.grad before and after the step. Who has put something there?",
    "loss.backward() goes back through v into the teacher. How is it told not to?",
]
_MODE = [
    "Print teacher.training before and after the step, once for a teacher in training, once for one in evaluation.",
    "Write the mode down before you change it.",
]
_WANTS = "requires_grad_ stays after your step. Is there another way to compute v without a graph?"
_STUDENT = "The student is being trained: its batch norm takes the batch, and its statistics should move."
_THE_SAME_LOSS = "The loss was right in the code that was given, T² and mix and all. Compare line by line."
_PEACE: dict[str, tuple[str, Hints]] = {
    _LEFT[3]: ("the student comes back in another mode than it was in", _STUDENT),
    _LEFT[4]: ("the teacher's weights have moved", "Which of your lines writes into them?"),
    _LEFT[5]: ("the running statistics of the teacher's batch norm have moved", _STATISTICS),
    _LEFT[6]: ("the teacher comes back in another mode than it was in", _MODE),
    _LEFT[7]: ("the teacher's gradients are not what they were", _GRADIENTS),
    _LEFT[8]: ("some of the teacher's parameters require a gradient and did not, or the other way round", _WANTS),
}


def _in_peace(found: tuple[Any, ...], right: tuple[Any, ...], *case: Any) -> None:
    for name, new, old in reversed(list(zip(_LEFT, found, right, strict=True))):
        if name in _PEACE and not close(new, old):
            raise Wrong(*_PEACE[name])


exercise_5 = Method(
    "Find the bug: a teacher that does not stay what it was",
    right=_step,
    ask=_after_a_step,
    explain=_in_peace,
    what=_LEFT,
    hint=["Compare the teacher before and after the step: weights, buffers, gradients, mode.", *_STATISTICS,
          *_GRADIENTS],
    cases={
        "a teacher in training mode": (931, True, False, 3.0, 0.7),
        "a teacher in training mode, with gradients from before": (932, True, True, 2.0, 0.4),
        "a teacher in evaluation mode": (933, False, False, 4.0, 0.9),
        "a teacher in evaluation mode, with gradients from before": (934, False, True, 1.0, 1.0),
    },
    mistakes=[
        Mistake(partial(_step, evaluates=False, gradients=True),
                "the teacher still answers with dropout, its running statistics move, and gradients pile up in it",
                [*_STATISTICS, *_GRADIENTS]),
        Mistake(partial(_step, evaluates=False),
                "no gradient reaches the teacher any more, but it answers as in training: with dropout and by the "
                "batch's own statistics, and its running ones move", _STATISTICS),
        Mistake(partial(_step, returns=_stays), "the teacher answers right, and is left in evaluation mode", _MODE),
        Mistake(partial(_step, returns=_stays, gradients=True),
                "the teacher answers right, but gradients pile up in it, and it is left in evaluation mode",
                [*_GRADIENTS, *_MODE]),
        Mistake(partial(_step, gradients=True),
                "the teacher answers right and is in its mode again, but gradients pile up in its parameters",
                _GRADIENTS),
        Mistake(partial(_step, prepare=lambda student, teacher: student.eval()),
                "the student is put into evaluation mode as well, so that its statistics no longer move", _STUDENT),
        Mistake(partial(_step, prepare=lambda student, teacher: teacher.requires_grad_(False)),
                "the teacher's parameters want no gradient any more: it could not be trained on", _WANTS),
        Mistake(partial(_step, prepare=lambda student, teacher: teacher.zero_grad()),
                "the gradients that the teacher had from before are gone", _GRADIENTS),
        Mistake(partial(_step, loss=partial(_distil_loss, factor=lambda T: 1.0)),
                "the teacher is left in peace, and T² is lost", _THE_SAME_LOSS),
        Mistake(partial(_step, loss=partial(_distil_loss, shares=lambda mix: (mix, 1 - mix))),
                "the teacher is left in peace, and mix and 1 - mix are exchanged", _THE_SAME_LOSS),
        # Right for a teacher that was in training
        Mistake(partial(_step, returns=lambda teacher, was: teacher.train()),
                "a teacher that was in evaluation mode comes back in training mode", _MODE),
    ],
)  # fmt: skip


# Exercise 6: the two parts of the divergence


def _label_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.one_hot(y, logits.shape[1]).bool()


def _others_of(logits: Tensor, y: Tensor) -> Tensor:
    """All logits but the label's: [N, K] -> [N, K - 1]."""
    return logits[~_label_of(logits, y)].reshape(len(logits), -1)


def _by_sums(logits: Tensor, y: Tensor) -> Tensor:
    """Log of what is not the label's, ``log(1 - p_y)``: [N, 1]."""
    return _others_of(logits.log_softmax(1), y).logsumexp(1, keepdim=True)


def _by_subtraction(logits: Tensor, y: Tensor) -> Tensor:
    return (1 - logits.softmax(1).gather(1, y[:, None])).log()


def _label_or_not(logits: Tensor, y: Tensor, rest: Callable[[Tensor, Tensor], Tensor] = _by_sums) -> Tensor:
    return torch.cat([logits.log_softmax(1).gather(1, y[:, None]), rest(logits, y)], 1)


def _renormalised(logits: Tensor, y: Tensor) -> Tensor:
    return _others_of(logits, y).log_softmax(1)


def _two_parts(
    z: Tensor, v: Tensor, y: Tensor, T: float, *,
    label: Callable[[Tensor, Tensor], Tensor] = _label_or_not,
    others: Callable[[Tensor, Tensor], Tensor] = _renormalised,
    terms: Terms = _divergence,
    factor: Callable[[float], float] = lambda T: 1.0,
    weight: Callable[[Tensor, Tensor], Tensor | float] = lambda v, y: 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The divergence of ``label`` and, times ``weight``, that of ``others``, both log probabilities: two [N]."""
    z, v = z / T, v / T
    first, second = (factor(T) * terms(logs(v, y), logs(z, y)).sum(1) for logs in (label, others))
    return first, weight(v, y) * second


def _whole(logits: Tensor, y: Tensor) -> Tensor:
    return logits.log_softmax(1)


def _label_at_zero(logits: Tensor, y: Tensor) -> Tensor:
    return logits.masked_fill(_label_of(logits, y), 0.0).log_softmax(1)


def _not_renormalised(logits: Tensor, y: Tensor) -> Tensor:
    return _others_of(logits.log_softmax(1), y)


def _over_what_is_left(logits: Tensor, y: Tensor) -> Tensor:
    return _not_renormalised(logits, y) - _by_subtraction(logits, y)


_subtracting = partial(_label_or_not, rest=_by_subtraction)
_DIGITS = [
    "What is 1 - p_y in float64 where the label's logit is 100 above the others? And its logarithm?",
    "1 - p_y is the sum of the other probabilities. Its logarithm can be had of the logits: torch.logsumexp.",
]
_WITHOUT_LABEL = [
    "Take p = (0.8, 0.1, 0.1) with the label first. Without it the two others are alike: which are p̂ and q̂ then?",
    "K - 1 logits of each row are left. What turns them into probabilities that add up to 1?",
]
_NO_FACTOR = "The two are plain divergences, [N] each. Weights are for whoever adds them up."
_BOTH_PARTS = "The first compares (p_y, 1 - p_y) with (q_y, 1 - q_y): that makes two terms."

exercise_6 = Method(
    "Two parts of a divergence",
    right=_two_parts,
    what=("the label's part", "the other classes' part"),
    hint=["The KL of all classes is the first plus (1 - p_y) times the second. Does that hold for yours?",
          _BOTH_PARTS, *_WITHOUT_LABEL],
    rtol=1e-6,
    atol=1e-12,
    cases={
        "5 examples of 4 classes at T = 2": _taught(941, 5, 4, 2.0, 0.0)[:4],
        "a student who is sure, logits of 100": (
            _numbers((100, 0, -3, 1), (-100, 2, 0, 1)), _numbers((3, 0, 1, 2), (0, 2, -1, 1)), torch.tensor([0, 1]), 1.0
        ),
        "a teacher who is sure, logits of 100": (
            _numbers((1, 0, -3, 1), (3, 2, 0, 1)), _numbers((100, 0, 1, 2), (0, 2, -1, -100)), torch.tensor([0, 3]), 1.0
        ),
        "both sure, of different classes": (
            _numbers((100, -100, 0), (-9, 50, 100)), _numbers((-100, 100, 0), (100, -9, 3)), torch.tensor([0, 2]), 1.0
        ),
        "3 examples of 2 classes": _taught(942, 3, 2, 1.5, 0.0)[:4],
        "a single example of 10 classes at T = 8": _taught(943, 1, 10, 8.0, 0.0)[:4],
    },
    mistakes=[
        Mistake(partial(_two_parts, others=_whole), "the label's class is still in the second part", _WITHOUT_LABEL),
        Mistake(partial(_two_parts, others=_label_at_zero),
                "the label's class stays among the others, with a logit of 0",
                ["A logit of 0 is no probability of 0: of the logits 0, 0, 0 each has a third.", *_WITHOUT_LABEL]),
        Mistake(partial(_two_parts, others=_not_renormalised),
                "the other classes are not renormalised: their probabilities add up to 1 - p_y, not to 1",
                _WITHOUT_LABEL),
        Mistake(lambda *case: _two_parts(*case)[::-1], "the two parts are exchanged", "First the label's, then the "
                "others'."),
        Mistake(partial(_two_parts, factor=lambda T: T**2), "both parts are multiplied by T²", _NO_FACTOR),
        Mistake(partial(_two_parts, weight=lambda v, y: _by_sums(v, y).exp()[:, 0]),
                "the second part is multiplied by 1 - p_y: that is what stands before it in the plain KL",
                ["What the plain KL does to it is the reason to look at it alone.", _NO_FACTOR]),
        Mistake(partial(_two_parts, terms=lambda log_p, log_q: _divergence(log_q, log_p)),
                "both divergences are the other way round", _WHICH_WAY),
        Mistake(lambda z, v, y, T: _two_parts(z, v, y, 1.0), "the temperature does nothing", "p and q are both at T."),
        Mistake(partial(_two_parts, label=lambda logits, y: _label_or_not(logits, y)[:, :1]),
                "the first part has the label's term alone: one with 1 - p_y and 1 - q_y is missing", _BOTH_PARTS),
        Mistake(lambda *case: tuple(part.mean() for part in _two_parts(*case)),
                "these are means over the examples", "One number for each example is wanted, twice: [N] and [N]."),
        # Right as long as nobody is sure
        Mistake(partial(_two_parts, label=_subtracting, others=_over_what_is_left),
                "both parts lose their digits, or become NaN, where somebody is sure: 1 - p is 0 there", _DIGITS),
        Mistake(partial(_two_parts, label=_subtracting),
                "the first part loses its digits, or becomes NaN or infinite, where somebody is sure: 1 - p is 0 there",
                _DIGITS),
        Mistake(partial(_two_parts, others=_over_what_is_left),
                "the second part loses its digits, or becomes NaN, where somebody is sure: it is divided by 1 - p, "
                "which is 0 there", [*_DIGITS, *_WITHOUT_LABEL]),
    ],
)  # fmt: skip


# Exercise 7: a teacher for a small student

WIDTHS = (8, 16, 32, 64, 128, 256)
STUDENT, STUDENTS = 8, 2
"""A student's width, and how many learn from each teacher: one alone may be three points luckier than the next."""

HIDDEN, LEAST = (943, 944), 0.7
"""Over five seeds teachers of 16 and 32 units reach 0.71 to 0.75 at T = 2 to 8, those of 128 and 256 0.68 at T = 4."""


def _adam(epochs: int, batch_size: int, lr: float) -> Recipe:
    optimizer = partial(torch.optim.Adam, lr=lr)
    return Recipe(epochs=epochs, batch_size=batch_size, optimizer=optimizer, precision="float64", validate_every=epochs)


TEACHING, LEARNING = _adam(10, 50, 1e-3), _adam(40, 20, 3e-3)

_FOR_INSTANCE = "For instance: mine = dict(width=256, temperature=4, mix=0.9)"
_ALONE = "With a mix near 0 the student has 500 labels and little else. What does the teacher know beside them?"
_SHARP = "At T = 1 a teacher that is sure says little more than the label. What does a higher temperature show?"
_WIDE = [
    "Your teacher is right far more often than the student will ever be. Can eight units imitate what it does?",
    "Vary the width alone, at the same T and mix, and plot the student's accuracy over the teacher's.",
]
_FITS = "This width can do it. Vary the temperature alone, then the mix alone, and plot the student's accuracy."
_NARROW = "Your teacher knows hardly more than its student could. How good is one of twice or four times the width?"


@functools.cache
def _digits(seed: int) -> Dataset:
    """Drawn digits of this seed, 5,000 with labels for the teacher; the student has the first 500."""
    return load("glyphs", classes="digits", size=16, difficulty=0.5, count=8100, train_size=5000, val_size=100,
                test_size=3000, seed=seed)  # fmt: skip


def _trained(width: int, recipe: Recipe, data: Dataset, seed: int) -> nn.Module:
    model = fresh(lambda: mlp((1, 16, 16), 10, width=width), recipe, seed=seed)
    with one_thread():  # several would wait for each other where the machine has other work: batches are small
        fit(model, data, recipe, seed=seed, progress=False)
    return model


@functools.cache
def _teacher(width: int, seed: int) -> nn.Module:
    return freeze(_trained(width, TEACHING, _digits(seed), seed + 500))


def _objective(model: nn.Module, x: Inputs, y: Tensor, *, teacher: nn.Module, T: float, mix: float) -> Tensor:
    return _distil_loss(model(x), teacher(x), y, T, mix)


@functools.cache  # so that a second try with the same settings costs nothing
def _outcome(width: int, T: float, mix: float, seed: int) -> tuple[float, float, float]:
    """Test accuracy of student and teacher, and the share of equal answers; means over the students."""
    data, teacher = _digits(seed), _teacher(width, seed)
    few = replace(data, train=data.train.subset(torch.arange(500)))
    recipe = replace(LEARNING, objective=partial(_objective, teacher=teacher, T=T, mix=mix))
    students = [_trained(STUDENT, recipe, few, seed + 1000 * k) for k in range(STUDENTS)]
    said = logits_of(teacher, data.test).argmax(1)
    alike = [(logits_of(student, data.test).argmax(1) == said).double().mean().item() for student in students]
    reached = [evaluate(student, data.test).accuracy for student in students]
    return float(np.mean(reached)), evaluate(teacher, data.test).accuracy, float(np.mean(alike))


def _settings(answer: Any) -> tuple[int, float, float]:
    names = ("width", "temperature", "mix")
    if not isinstance(answer, Mapping) or set(answer) != set(names):
        raise Wrong(f"expected a dict of {', '.join(names)}", _FOR_INSTANCE)
    found = {}
    for name in names:
        try:
            found[name] = float(answer[name])
        except (TypeError, ValueError, RuntimeError):
            kind = type(answer[name]).__name__
            raise Wrong(f"{name} should be a number, and is of type {kind}", _FOR_INSTANCE) from None
    if found["width"] not in WIDTHS:
        raise Wrong(f"there is no teacher of width {found['width']:g}", f"There are {', '.join(map(str, WIDTHS))}.")
    for name, low, high in (("temperature", 1, 20), ("mix", 0, 1)):
        if not low <= found[name] <= high:
            raise Wrong(f"the {name} is {found[name]:g}", f"It may go from {low} to {high}.")
    return int(found["width"]), found["temperature"], found["mix"]


def exercise_7(answer: Any) -> None:
    """Choose a teacher for a student of eight units"""
    width, temperature, mix = _settings(answer)
    found = [_outcome(width, temperature, mix, seed) for seed in HIDDEN]
    student, teacher, alike = np.mean(found, axis=0)
    if student < LEAST:
        hints = [_ALONE] if mix < 0.3 else [_SHARP] if temperature < 2 else []
        hints += [_NARROW] if width == STUDENT else _WIDE if width > 4 * STUDENT else [_FITS]
        raise Wrong(
            f"a mean accuracy of {student:.3f} over {len(HIDDEN)} hidden seeds; at least {LEAST} is "
            f"wanted. The teachers reach {teacher:.3f}, and the students agree with them on {alike:.3f} of the images",
            hints,
        )


exercise_8 = OpenProject(
    "An open project: distil a network of your own",
    rubric=["the teacher", "the baseline", "the lesson", "what is measured", "honesty"],
)
