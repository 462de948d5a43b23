r"""Objectives about how examples lie to one another: the student's space may have any size and any direction.

=========================  =================================================  =========================================
name                       what it asks for                                   source
=========================  =================================================  =========================================
``similarity_preserving``  which examples of the batch look alike             Tung & Mori 2019, arXiv:1907.09682
``relational``             their distances, and the angles between any three  Park et al. 2019, arXiv:1904.05068
``contrastive``            to be told from all others beside the teacher's    Tian et al. 2019, arXiv:1910.10699
                           view of the same example
=========================  =================================================  =========================================

As objectives they take ``at={"student.layer": "teacher.layer"}``, as ``hints`` does. Features ``[N, …]`` are taken as
rows ``[N, D]``; D need not be the same, but for ``contrastive``, where ``with_projections`` brings both into one space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.distillation.layerwise import with_features
from course_lib.distillation.lessons import Teacher
from course_lib.distillation.targets import UNLABELLED, exact
from course_lib.lab.training import Inputs, Objective, cross_entropy
from course_lib.regularization.drawing import check_not_negative, check_positive


def _rows(features: Tensor) -> Tensor:
    return exact(features).flatten(1)


# --- Similarities -----------------------------------------------------------------------------------------------------


def similarities(features: Tensor) -> Tensor:
    r"""Return :math:`G=QQ^\top` with each row divided by its norm, Q being the features as rows: ``[N, N]``."""
    q = _rows(features)
    return F.normalize(q @ q.mT, dim=1)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return :math:`\tfrac1{N^2}\|G_S-G_T\|_F^2`. It stays when features are turned, or all made larger."""
    return (similarities(student) - similarities(teacher)).square().mean()


def similarity_preserving(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    at: Mapping[str, str],
    strength: float = 3000.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the objective and ``strength`` (the paper's :math:`\gamma`) times the ``similarity_loss`` of each pair.

    Raises
    ------
    ValueError : as ``with_features``.
    """
    return with_features(
        similarity_loss, model, x, y, teacher=teacher, at=at, strength=strength, objective=objective
    )  # fmt: skip


# --- Distances and angles ---------------------------------------------------------------------------------------------


def distances(features: Tensor) -> Tensor:
    r"""Return :math:`\|f_i-f_j\|/\mu` of each pair, :math:`\mu` being the mean of those that are not 0: ``[N, N]``."""
    rows = _rows(features)
    # by differences, not by products: near points would lose their digits
    found = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    apart = found > 0
    return found / (found.sum() / apart.sum().clamp_min(1)).clamp_min(torch.finfo(found.dtype).tiny)


def angles(features: Tensor) -> Tensor:
    r"""Return the cosine of the angle at j between i and k, of each three: ``[N, N, N]`` as [j, i, k].

    0 where two of them are the same point.
    """
    rows = _rows(features)
    towards = rows[None] - rows[:, None]  # [j, i, D]: from j to i
    length = towards.norm(dim=2, keepdim=True)
    # dividing by 1 where there is no direction: by a tiny number, its gradient would be huge
    directions = towards / torch.where(length > 0, length, 1)
    return directions @ directions.mT


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean Huber loss (``smooth_l1``) of all pairs' ``distances``."""
    return F.smooth_l1_loss(distances(student), distances(teacher))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean Huber loss (``smooth_l1``) of all threes' ``angles``, N³ numbers: 2 MB for a batch of 80."""
    return F.smooth_l1_loss(angles(student), angles(teacher))


def _relational_loss(student: Tensor, teacher: Tensor, *, distance: float, angle: float) -> Tensor:
    return distance * distance_loss(student, teacher) + angle * angle_loss(student, teacher)


def relational(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    at: Mapping[str, str],
    distance: float = 25.0,
    angle: float = 50.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    """Return the objective, and of each pair ``distance`` times ``distance_loss`` and ``angle`` times ``angle_loss``.

    Both stay when features are turned, moved, or all made larger.

    Raises
    ------
    ValueError : ``distance`` or ``angle`` is no number of at least 0; and as ``with_features``.
    """
    check_not_negative(distance=distance, angle=angle)
    loss = partial(_relational_loss, distance=distance, angle=angle)
    return with_features(loss, model, x, y, teacher=teacher, at=at, strength=1.0, objective=objective)


# --- Contrast ---------------------------------------------------------------------------------------------------------


def contrastive_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Return the loss of telling two views of one example, the student's and the teacher's, from views of two.

    .. math:: -\tfrac1B\sum_i\Big[\log h_{ii}+\sum_{j\in\mathcal N_i}\log(1-h_{ij})\Big],\qquad
       h_{ij}=\frac{e^{u_{ij}}}{e^{u_{ij}}+|\mathcal N_i|\,m},\quad u_{ij}=s_i\cdot t_j/\tau

    and the same with the teacher's view as the anchor, added. s and t are directions ``[B, D]`` of norm 1,
    :math:`\mathcal N_i` the examples of the batch with another label (-100, or mixed labels ``[B, K]``: all others), m
    the mean of all :math:`e^u`, held constant.

    The paper draws thousands of negatives from a memory of all M examples, kept by a moving average, and m from the
    first batch; its formula has :math:`|\mathcal N|/M` for :math:`|\mathcal N|\,m`, with :math:`e^u` divided by M times
    its mean, which is the same. Here the other examples of the batch are the negatives: fresh, but few.

    Raises
    ------
    ValueError : the shapes differ, or ``temperature`` is no number above 0.
    """
    check_positive(temperature=temperature)
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(
            f"student's features are {list(student.shape)}, teacher's {list(teacher.shape)}: must both be [N, D]; "
            "with_projections(student, teacher, at, example) brings them into one space"
        )
    u = exact(student) @ exact(teacher).mT / temperature
    apart = _of_another_class(labels, len(u))
    count = apart.sum(1).clamp_min(1)
    # log of |N| m; h is then the logistic function of u beyond it
    level = count.to(u.dtype).log() + u.detach().flatten().logsumexp(0) - 2 * math.log(len(u))
    return _told_apart(u, apart, level) + _told_apart(u.mT, apart, level)


def _told_apart(u: Tensor, apart: Tensor, level: Tensor) -> Tensor:
    beyond = u - level[:, None]
    together = F.logsigmoid(beyond.diagonal())
    return -(together + (F.logsigmoid(-beyond) * apart).sum(1)).mean()


def _of_another_class(labels: Tensor, count: int) -> Tensor:
    """Which pairs are of two classes, as far as is known: bool ``[N, N]``, never an example with itself."""
    others = ~torch.eye(count, dtype=torch.bool, device=labels.device)
    if labels.is_floating_point():
        return others
    return others & ((labels[:, None] != labels) | (labels == UNLABELLED))


def contrastive(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    at: Mapping[str, str],
    strength: float = 0.8,
    temperature: float = 0.1,
    objective: Objective = cross_entropy,
) -> Tensor:
    """Return the objective and ``strength`` times the ``contrastive_loss`` of each pair of layers.

    The student must carry projections of both: ``with_projections(student, teacher, at, example)``.

    Raises
    ------
    ValueError : as ``with_features`` and ``contrastive_loss``.
    """
    loss = partial(contrastive_loss, labels=y, temperature=temperature)
    return with_features(loss, model, x, y, teacher=teacher, at=at, strength=strength, objective=objective)
