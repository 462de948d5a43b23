"""Regressors that bring a student's features to the teacher's size, carried by the student so that they train with it.

``with_connectors`` puts them on, ``without_connectors`` takes them off again and gives the plain student, and
``connectors`` makes fitting ones. What they are for: hints (Romero et al. 2014, arXiv:1412.6550), and projections of
student and teacher into one space (Tian et al. 2019, arXiv:1910.10699).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.distillation.lessons import Teacher, in_own_type, listen, student_of
from course_lib.distillation.taps import features
from course_lib.lab.arguments import at_least
from course_lib.regularization.drawing import normalised_rows
from course_lib.regularization.passes import statistics_rest


class Connected(nn.Module):
    """A student that carries regressors, by the names of the layers that they take: its answers are the student's."""

    def __init__(
        self, student: nn.Module, of_student: Mapping[str, nn.Module], of_teacher: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.student = student
        # a ModuleDict takes no dots, which names of layers have
        self.of_student = nn.ModuleDict({_key(name): part for name, part in of_student.items()})
        self.of_teacher = nn.ModuleDict({_key(name): part for name, part in of_teacher.items()})
        self.train(student.training)

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to the student's logits ``[N, K]``."""
        return self.student(x)


def _key(name: str) -> str:
    return name.replace(".", "/") or "/"


def with_connectors(
    student: nn.Module, of_student: Mapping[str, nn.Module], of_teacher: Mapping[str, nn.Module] | None = None
) -> Connected:
    """Return the student with a regressor behind each of some layers, for ``fit``; the student itself is within.

    ``of_teacher`` are behind layers of the teacher, which is frozen and cannot carry what trains.

    Raises
    ------
    ValueError : the student has no layer of a name.
    """
    with features(student, of_student):
        return Connected(student, of_student, of_teacher or {})


def without_connectors(student: nn.Module) -> nn.Module:
    """Return the plain student."""
    return student_of(student) if isinstance(student, Connected) else student


def connected(model: Connected, name: str, found: Tensor, *, teacher: bool = False) -> Tensor:
    """Return a layer's features behind its regressor; as they are where the model carries none for it."""
    held = model.of_teacher if teacher else model.of_student
    return held[_key(name)](found) if _key(name) in held else found


def pooled(features: Tensor) -> Tensor:
    """Features as rows ``[N, D]``: maps ``[N, D, H, W]`` averaged over places, tokens ``[N, T, D]`` over tokens."""
    if features.ndim == 3:
        return features.mean(1)
    return features.flatten(2).mean(2) if features.ndim > 2 else features


# --- Fitting ones -----------------------------------------------------------------------------------------------------


def connector(student: Tensor, teacher: Tensor) -> nn.Module:
    """Return a linear regressor from features like ``student``'s to ``teacher``'s, in the student's type.

    Rows ``[N, D]`` and tokens ``[N, T, D]`` get a linear layer; maps ``[N, C, H, W]`` a convolution: 1x1 where the
    sizes agree, else strided, transposed or unpadded, so that it gives the teacher's size.

    Raises
    ------
    ValueError : the features are not alike in dimensions and tokens, or their sizes cannot be brought together.
    """
    alike = student.ndim == teacher.ndim and student.ndim in (2, 3, 4)
    if not alike or (student.ndim == 3 and student.shape[1] != teacher.shape[1]):
        raise ValueError(
            f"student's features are {list(student.shape)}, teacher's {list(teacher.shape)}: must both be rows [N, D], "
            "as many tokens [N, T, D], or maps [N, C, H, W]"
        )
    made = (
        _convolution(student.shape, teacher.shape)
        if student.ndim == 4
        else nn.Linear(student.shape[-1], teacher.shape[-1])
    )
    return made.to(student.device, student.dtype)


def _convolution(student: torch.Size, teacher: torch.Size) -> nn.Module:
    channels = student[1], teacher[1]
    (high, wide), (to_high, to_wide) = student[2:], teacher[2:]
    if (high, wide) == (to_high, to_wide):
        return nn.Conv2d(*channels, kernel_size=1)
    if (high, wide) == (2 * to_high, 2 * to_wide):
        return nn.Conv2d(*channels, kernel_size=3, stride=2, padding=1)
    if (2 * high, 2 * wide) == (to_high, to_wide):
        return nn.ConvTranspose2d(*channels, kernel_size=4, stride=2, padding=1)
    if high >= to_high and wide >= to_wide:
        return nn.Conv2d(*channels, kernel_size=(high - to_high + 1, wide - to_wide + 1))
    raise ValueError(
        f"student's maps are {high}×{wide}, teacher's {to_high}×{to_wide}: must be as large, larger, or half as large"
    )


def connectors(student: nn.Module, teacher: Teacher, at: Mapping[str, str], example: Any) -> dict[str, nn.Module]:
    """Return a regressor for each pair of layers, ``at={"student.layer": "teacher.layer"}``, by the student's names.

    ``example`` is a batch as the networks see it, of one example or more. Weights are drawn from torch's global
    generator.

    Raises
    ------
    ValueError : there is no such layer, or two layers cannot be brought together (see ``connector``).
    """
    mine, theirs = _seen(student, at, example), listen(teacher, example, at.values())[1]
    return {name: connector(mine[name], theirs[of]) for name, of in at.items()}


class Projection(nn.Module):
    """Features of any shape ``[N, …]`` to directions ``[N, size]`` of norm 1, by a linear layer."""

    def __init__(self, features: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, size)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …] -> [N, size]``."""
        return normalised_rows(self.linear(x.flatten(1)))


def with_projections(
    student: nn.Module, teacher: Teacher, at: Mapping[str, str], example: Any, *, size: int = 128
) -> Connected:
    """Return the student with a projection behind both layers of each pair, as ``contrastive`` needs them.

    Raises
    ------
    ValueError : there is no such layer, or ``size`` is below 1.
    """
    at_least(1, size=size)
    mine, theirs = _seen(student, at, example), listen(teacher, example, at.values())[1]
    of_student = {name: Projection(mine[name][0].numel(), size).to(mine[name]) for name in at}
    of_teacher = {of: Projection(theirs[of][0].numel(), size).to(mine[name]) for name, of in at.items()}
    return with_connectors(student, of_student, of_teacher)


@torch.no_grad()
def _seen(student: nn.Module, names: Mapping[str, str], example: Any) -> dict[str, Tensor]:
    with features(student, names) as found, statistics_rest(student):
        student(in_own_type(student, example))
    return found
