r"""How much of the teacher is in the student: a good student need not be a faithful one.

=========================  =================================================  =========================================
name                       what it gives                                      source
=========================  =================================================  =========================================
``agreement``              the share of equal answers                         Stanton et al. 2021, arXiv:2106.05945
``divergence_from``        the mean divergence from the teacher               Stanton et al. 2021
``agreement_where_wrong``  equal answers among those that the teacher has
                           wrong
``answers``                who was right: both, one of them, neither
=========================  =================================================  =========================================

Student and teacher are anything that is called like a network; both are asked in evaluation mode.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from course_lib.lab.data import Split
from course_lib.lab.training import logits_of
from course_lib.regularization.consistency import kl_divergence
from course_lib.regularization.drawing import check_positive


class Answers(NamedTuple):
    """Shares of a split; they add up to 1, but for ``same_mistake``, which is a part of ``neither``."""

    both: float
    student_alone: float
    teacher_alone: float
    neither: float
    same_mistake: float


def _answers(student: nn.Module, teacher: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    if not len(split):
        raise ValueError("split has no examples: must have at least one")
    mine, theirs = logits_of(student, split), logits_of(teacher, split)
    if mine.shape != theirs.shape:
        raise ValueError(
            f"teacher={type(teacher).__name__} gives logits {list(theirs.shape)}: must be {list(mine.shape)}, "
            "the student's classes"
        )
    return mine, theirs


def agreement(student: nn.Module, teacher: nn.Module, split: Split) -> float:
    """Return the share of examples to which both give the same answer, right or wrong.

    Raises
    ------
    ValueError : the split is empty, or the two have different numbers of classes.
    """
    mine, theirs = _answers(student, teacher, split)
    return (mine.argmax(1) == theirs.argmax(1)).double().mean().item()


def agreement_where_wrong(student: nn.Module, teacher: nn.Module, split: Split) -> float:
    """Return the share of equal answers among the examples that the teacher has wrong; NaN where it has none wrong.

    Where both are right they agree for the label's sake; here only the teacher can have told.

    Raises
    ------
    ValueError : as ``agreement``.
    """
    mine, theirs = (logits.argmax(1) for logits in _answers(student, teacher, split))
    wrong = theirs != split.labels.to(theirs.device)
    return (mine == theirs)[wrong].double().mean().item() if wrong.any() else math.nan


def divergence_from(student: nn.Module, teacher: nn.Module, split: Split, *, temperature: float = 1.0) -> float:
    r"""Return the mean of :math:`\text{KL}(p^T\,\|\,q^T)` over a split, p the teacher's and q the student's; in nats.

    Without the factor :math:`T^2` of ``soft_loss``: it is a distance here, and no loss.

    Raises
    ------
    ValueError : ``temperature`` is no number above 0; and as ``agreement``.
    """
    check_positive(temperature=temperature)
    mine, theirs = (logits.double() / temperature for logits in _answers(student, teacher, split))
    return kl_divergence(theirs, mine).mean().item()


def answers(student: nn.Module, teacher: nn.Module, split: Split) -> Answers:
    """Return which share of a split both had right, each of them alone, or neither; and the mistakes they share.

    Raises
    ------
    ValueError : as ``agreement``.
    """
    mine, theirs = (logits.argmax(1) for logits in _answers(student, teacher, split))
    labels = split.labels.to(mine.device)
    right, taught = mine == labels, theirs == labels
    parts = (right & taught, right & ~taught, ~right & taught, ~right & ~taught, ~right & (mine == theirs))
    return Answers(*(torch.stack(parts).double().mean(1).tolist()))
