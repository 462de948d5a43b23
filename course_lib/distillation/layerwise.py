r"""Objectives that ask the student's layers for what the teacher's layers give, example by example.

=======================  ===================================================  =========================================
name                     what it asks for                                     source
=======================  ===================================================  =========================================
``hints``                the features themselves, behind a regressor          Romero et al. 2014, arXiv:1412.6550
``attention_transfer``   where in the image features are large                Zagoruyko & Komodakis 2016,
                                                                              arXiv:1612.03928
=======================  ===================================================  =========================================

``at={"student.layer": "teacher.layer"}`` says which layers go together (names as in ``features``); the losses of
several pairs add up. Features are rows ``[N, D]``, tokens ``[N, T, D]`` or maps ``[N, C, H, W]``. They wrap any
objective: ``partial(hints, teacher=t, at={"stages.1": "stages.2"}, objective=partial(soft_targets, teacher=t))`` runs
student and teacher once a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.distillation.connecting import Connected, connected
from course_lib.distillation.lessons import Teacher, lesson
from course_lib.distillation.targets import exact
from course_lib.lab.arguments import require
from course_lib.lab.training import Inputs, Objective, cross_entropy
from course_lib.regularization.drawing import check_not_negative
from course_lib.regularization.passes import unseen

FeatureLoss = Callable[[Tensor, Tensor], Tensor]
"""``(student's features, teacher's features) -> loss``."""


def with_features(
    loss: FeatureLoss,
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    at: Mapping[str, str],
    strength: float,
    objective: Objective,
) -> Tensor:
    """Return the objective and ``strength`` times the ``loss`` of each pair of layers.

    The student's features go through its connectors, where it carries any; the teacher's too.

    Raises
    ------
    ValueError : ``strength`` is no number of at least 0, ``at`` names no layers or some that are not there; or the
        teacher is in training mode.
    """
    check_not_negative(strength=strength)
    pairs = dict(require_pairs(at))
    seen = lesson(model, x, objective, at=pairs, teacher=teacher, of=pairs.values())
    _, theirs = seen.of(teacher, pairs.values())
    carrier = unseen(model)
    total = objective(seen, x, y)
    for name, of in pairs.items():
        # the regressors, and the losses, compute in the student's type
        mine, of_teacher = seen.layers[name], theirs[of].to(seen.layers[name].dtype)
        if isinstance(carrier, Connected):
            mine = connected(carrier, name, mine)
            of_teacher = connected(carrier, of, of_teacher, teacher=True)
        total = total + strength * loss(mine, of_teacher)
    return total


def require_pairs(at: Mapping[str, str]) -> Mapping[str, str]:
    """Raise ValueError unless ``at`` is a mapping that names at least one pair of layers."""
    require("at", at, lambda v: isinstance(v, Mapping) and bool(v), 'a mapping such as {"hidden.1": "hidden.3"}')
    return at


# --- Hints ------------------------------------------------------------------------------------------------------------


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return the mean squared difference of features of the same shape.

    The paper has half the sum over an example; public code takes the mean over all numbers, so that ``strength`` does
    not depend on how many there are.

    Raises
    ------
    ValueError : the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student's features are {list(student.shape)}, teacher's {list(teacher.shape)}: must be of one shape; "
            "with_connectors(student, connectors(student, teacher, at, example)) brings them together"
        )
    return F.mse_loss(exact(student), exact(teacher))


def hints(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    at: Mapping[str, str],
    strength: float = 1.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    """Return the objective and ``strength`` times the ``hint_loss`` of each pair of layers.

    Features of other shapes need regressors, which the student carries: ``with_connectors``. The paper trains on the
    hint alone first, up to that layer; here both at once, as most have done since.

    Raises
    ------
    ValueError : as ``with_features``, or features of different shapes.
    """
    return with_features(
        hint_loss, model, x, y, teacher=teacher, at=at, strength=strength, objective=objective
    )  # fmt: skip


# --- Attention --------------------------------------------------------------------------------------------------------


def attention_map(features: Tensor) -> Tensor:
    r"""Return :math:`Q/\|Q\|` of each example, :math:`Q=\sum_c F_c^2` at each place: ``[N, places]``.

    Maps ``[N, C, H, W]`` have H·W places, tokens ``[N, T, D]`` T.

    Raises
    ------
    ValueError : the features have no places.
    """
    if features.ndim not in (3, 4):
        raise ValueError(f"features are {list(features.shape)}: must be maps [N, C, H, W] or tokens [N, T, D]")
    squares = exact(features).square()
    q = squares.mean(1).flatten(1) if features.ndim == 4 else squares.mean(2)
    return F.normalize(q, dim=1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Return the mean over examples and places of the squared difference of the ``attention_map``.

    As the authors' code; their formula has the norm of the difference. Maps of different sizes: the larger is averaged
    down to the smaller first. Channels may differ, and a positive factor changes nothing.

    Raises
    ------
    ValueError : the features have no places, or different numbers of tokens.
    """
    if student.ndim == teacher.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
    mine, theirs = attention_map(student), attention_map(teacher)
    if mine.shape != theirs.shape:
        raise ValueError(f"student has {mine.shape[1]} places, teacher {theirs.shape[1]}: must be as many tokens")
    return (mine - theirs).square().mean()


def attention_transfer(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    teacher: Teacher,
    at: Mapping[str, str],
    strength: float = 500.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the objective and ``strength`` (:math:`\beta/2` of the paper) times the ``attention_loss`` of each pair.

    Raises
    ------
    ValueError : as ``with_features``, or features without places.
    """
    return with_features(
        attention_loss, model, x, y, teacher=teacher, at=at, strength=strength, objective=objective
    )  # fmt: skip
