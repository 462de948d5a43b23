"""One batch as the student and its teachers saw it, so that each of them runs once, however many objectives look.

==============  =====================================================================================================
name            what it does
==============  =====================================================================================================
``lesson``      the student's answer to a batch: from an objective further out, or computed now
``Lesson``      that answer, with the layers' outputs that the objectives within ask for, and what teachers say
``Teacher``     anything that gives logits ``[N, K]`` for a batch: a network, or what it said, looked up
==============  =====================================================================================================

Objectives are wrapped around one another, and each of them may want the logits, some layers and a teacher. The
outermost of this chapter looks through the chain (the ``at``, ``teacher`` and ``objective`` of each
``functools.partial``), runs the student once with all those layers kept, and hands a ``Lesson`` down; the teacher is
run by whoever asks first. To all others a ``Lesson`` is a ``regularization.Seen``, a network that has answered it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.distillation.taps import features
from course_lib.lab.training import Objective
from course_lib.regularization.passes import Seen, statistics_rest, unseen

Teacher = Callable[[Any], Tensor]
"""``x -> logits [N, K]``: a network, frozen; an ``Ensemble``; or a ``Cached``. Only networks have layers to look at."""


class Lesson(Seen):
    """The student with its answer to ``x`` and its layers' outputs at hand; and what teachers say to the same ``x``."""

    def __init__(
        self, model: nn.Module, x: Any, logits: Tensor, layers: Mapping[str, Tensor], asked: Mapping[int, set[str]]
    ) -> None:
        super().__init__(model, x, logits)
        self.x, self.logits, self.layers = x, logits, dict(layers)
        self._asked = dict(asked)
        self._heard: dict[int, tuple[Teacher, Tensor, dict[str, Tensor]]] = {}

    def knows(self, x: Any, names: Iterable[str]) -> bool:
        """Whether it is about this very batch, and holds these layers."""
        return x is self.x and self.layers.keys() >= set(names)

    def of(self, teacher: Teacher, names: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the teacher's logits and the outputs of its named layers, without gradients, in the student's type.

        Raises
        ------
        ValueError : the teacher is in training mode, or has no such layers.
        """
        heard = self._heard.get(id(teacher))
        if heard is None or not heard[2].keys() >= set(names):
            self._heard[id(teacher)] = teacher, *listen(teacher, self.x, {*names, *self._asked.get(id(teacher), ())})
        _, logits, layers = self._heard[id(teacher)]
        return logits.to(self.logits.dtype), layers

    def taught(self, teacher: Teacher) -> Tensor:
        """Return the teacher's logits ``[N, K]``.

        Raises
        ------
        ValueError : the teacher is in training mode, or has another number of classes.
        """
        logits, _ = self.of(teacher)
        if logits.shape != self.logits.shape:
            raise ValueError(
                f"teacher={name_of(teacher)} gives logits {list(logits.shape)}: must be {list(self.logits.shape)}, "
                "the student's classes"
            )
        return logits


def lesson(
    model: nn.Module, x: Any, objective: Objective, *, at: Iterable[str] = (), teacher: Teacher, of: Iterable[str] = ()
) -> Lesson:
    """Return the student's answer to ``x``, with its layers ``at``, and those that ``objective`` within will ask for.

    Where an objective of this chapter stands further out its answer is taken. Where another one does, which keeps no
    layers, and layers are asked for, the student runs once more, and batch norm's statistics rest.
    """
    at = set(at)
    within: nn.Module = model
    while isinstance(within, Seen):
        if isinstance(within, Lesson) and within.knows(x, at):
            return within
        within = within.model
    names, asked = _asked_within(partial(objective))
    names |= at
    asked.setdefault(id(teacher), set()).update(of)
    if not names:  # an answer that is at hand does
        return Lesson(unseen(model), x, model(x), {}, asked)
    plain = unseen(model)
    known = model(x) if plain is not model else None
    with features(student_of(plain), names) as layers, nullcontext() if known is None else statistics_rest(plain):
        logits = plain(x)
    return Lesson(plain, x, logits if known is None else known, layers, asked)


def student_of(model: nn.Module) -> nn.Module:
    """Return the network whose layers the names are about: the student, where ``model`` carries more than it."""
    found = getattr(model, "student", model)
    return found if isinstance(found, nn.Module) else model


def _asked_within(objective: Any) -> tuple[set[str], dict[int, set[str]]]:
    """The names of layers that a chain of objectives looks at: the student's, and of each teacher, by its id."""
    student: set[str] = set()
    teachers: dict[int, set[str]] = {}
    while isinstance(objective, partial):
        at, teacher = objective.keywords.get("at"), objective.keywords.get("teacher")
        if isinstance(at, Mapping) and teacher is not None:
            student |= at.keys()
            teachers.setdefault(id(teacher), set()).update(at.values())
        objective = objective.keywords.get("objective")
    return student, teachers


@torch.no_grad()
def listen(teacher: Teacher, x: Any, names: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a teacher's logits and the outputs of its named layers, without gradients, computed in its own type.

    Raises
    ------
    ValueError : the teacher is in training mode, has no such layers, or is no network and has none.
    """
    if not isinstance(teacher, nn.Module):
        if names := sorted(names):
            raise ValueError(f"teacher={name_of(teacher)} has no layers {names}: must be a network")
        return teacher(x), {}
    if teacher.training and any(p.requires_grad for p in teacher.parameters()):
        raise ValueError(f"teacher={name_of(teacher)} is in training mode: must be frozen(teacher), or in eval()")
    with features(teacher, names) as layers:
        return teacher(in_own_type(teacher, x)), layers


def in_own_type(model: nn.Module, x: Any) -> Any:
    """A batch in the type of the network's weights."""
    if isinstance(x, tuple):
        return tuple(in_own_type(model, part) for part in x)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return x.to(dtype) if dtype is not None and x.is_floating_point() else x


def name_of(teacher: Teacher) -> str:
    """A teacher in one word, for errors."""
    return getattr(teacher, "__name__", type(teacher).__name__)
