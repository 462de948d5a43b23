r"""Who teaches whom: a student, a chain of them, students that teach one another, a network that teaches itself.

======================  ====================================================  =========================================
name                    what it does                                          source
======================  ====================================================  =========================================
``distilled``           a new student of a teacher                            Hinton, Vinyals & Dean 2015,
                                                                              arXiv:1503.02531
``born_again``          the same network, its own student again and again     Furlanello et al. 2018, arXiv:1805.04770
``assistants``          from large to small in several steps                  Mirzadeh et al. 2019, arXiv:1902.03393
``mutual``              students that teach one another, without a teacher    Zhang et al. 2017, arXiv:1706.00384
``self_distillation``   the last layer teaches the earlier ones               Zhang et al. 2019, arXiv:1905.08094
``mean_teacher``        the average of the last steps teaches the next        Tarvainen & Valpola 2017,
                                                                              arXiv:1703.01780
======================  ====================================================  =========================================
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.distillation.connecting import pooled
from course_lib.distillation.lessons import Teacher, in_own_type
from course_lib.distillation.taps import EMBEDDING, features
from course_lib.distillation.targets import soft_loss, soft_targets
from course_lib.distillation.teachers import frozen
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Inputs, Objective, Recipe, cross_entropy, fit, fresh
from course_lib.regularization.drawing import check_chance, check_not_negative, check_positive
from course_lib.regularization.passes import Seen, statistics_rest, unseen

Factory = Callable[[], nn.Module]
SEEDS_APART = 1_000
"""The networks of a chain take seeds this far apart, so that the chains of seeds 0, 1, 2, … have none in common."""


# --- Chains -----------------------------------------------------------------------------------------------------------


def distilled(
    student: Factory,
    teacher: Teacher,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    temperature: float = 4.0,
    mix: float = 0.9,
) -> nn.Module:
    """Return a new student, trained by the recipe with ``soft_targets`` around its objective.

    Raises
    ------
    ValueError : as ``soft_targets``.
    """
    objective = partial(
        soft_targets, teacher=teacher, temperature=temperature, mix=mix, objective=recipe.objective
    )  # fmt: skip
    network = fresh(student, recipe, seed=seed)
    fit(network, data, replace(recipe, objective=objective), seed=seed)
    return network


def assistants(
    networks: Sequence[Factory],
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    mix: float = 0.9,
) -> list[nn.Module]:
    """Return trained networks, each the student of the one before; the first of ``teacher``, or of the labels alone.

    ``networks`` go from large to small: the last is the student, those between are the assistants. All are trained
    by the same recipe, the first one here with ``seed``. All come back frozen, the student too: to train it on, say
    ``lab.thaw``.

    Raises
    ------
    ValueError : there are no networks; and as ``soft_targets``.
    """
    require("networks", networks, bool, "at least one factory")
    check_positive(temperature=temperature)
    check_chance(mix=mix)
    trained: list[nn.Module] = []
    for place, factory in enumerate(networks):
        before = trained[-1] if trained else teacher
        of_its_own = seed + SEEDS_APART * place
        if before is None:
            network = fresh(factory, recipe, seed=of_its_own)
            fit(network, data, recipe, seed=of_its_own)
        else:
            network = distilled(factory, before, data, recipe, seed=of_its_own, temperature=temperature, mix=mix)
        trained.append(frozen(network))
    return trained


def born_again(
    network: Factory,
    data: Dataset,
    recipe: Recipe,
    *,
    generations: int,
    seed: int,
    temperature: float = 1.0,
    mix: float = 0.5,
) -> list[nn.Module]:
    """Return a network trained on the labels and ``generations`` of its like, each a student of the one before.

    ``mix=1`` is the paper's BAN, which sees no labels, smaller ones its BAN+L. ``Ensemble`` of all is what it calls
    BANE.

    Raises
    ------
    ValueError : ``generations`` is below 1; and as ``soft_targets``.
    """
    at_least(1, generations=generations)
    return assistants([network] * (generations + 1), data, recipe, seed=seed, temperature=temperature, mix=mix)


# --- Students that teach one another ----------------------------------------------------------------------------------


class Cohort(nn.Module):
    """Students that are trained together. Called, it gives the logits of the first: the one that will be used.

    Raises
    ------
    ValueError : there are fewer than two.
    """

    def __init__(self, students: Iterable[nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        require("students", [*self.students], lambda found: len(found) >= 2, "at least two networks")
        self.train(self.students[0].training)

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to the first student's logits ``[N, K]``."""
        return self.students[0](x)


def mutual(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    strength: float = 1.0,
    temperature: float = 1.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the sum over a ``Cohort``'s students k of the objective and the mean of :math:`\text{KL}(p_l\,\|\,p_k)`.

    The mean is over the others l, whose answers are constants to student k. The paper moves the students in turn, each
    seeing what the one before has become; here all move at once.

    Raises
    ------
    ValueError : the model is no ``Cohort``, ``strength`` is no number of at least 0, ``temperature`` none above 0.
    """
    check_not_negative(strength=strength)
    check_positive(temperature=temperature)
    cohort = unseen(model)
    if not isinstance(cohort, Cohort):
        raise ValueError(f"model={type(cohort).__name__}: must be a Cohort of students")
    students = list(cohort.students)
    logits = [model(x), *(student(x) for student in students[1:])]
    total = logits[0].new_zeros(())
    for k, student in enumerate(students):
        others = [each.detach() for each in (*logits[:k], *logits[k + 1 :])]
        apart = torch.stack([soft_loss(logits[k], each, temperature) for each in others]).mean()
        total = total + objective(Seen(student, x, logits[k]), x, y) + strength * apart
    return total


# --- A network that teaches itself: early exits -----------------------------------------------------------------------


class WithExits(nn.Module):
    """A network with a way out behind each of some layers: average over places, adapter, classifier.

    The adapter brings a layer's features to the size of those before the head, ``model.embedding``. ``forward`` gives
    the network's own logits; ``exits`` those of every way out, and ``model`` is the plain network again.
    ``example`` is a batch as the network sees it; weights are drawn from torch's global generator.

    Raises
    ------
    ValueError : the network has no such layer, or no ``head``; or ``at`` is empty.
    """

    def __init__(self, model: nn.Module, at: Sequence[str], example: Any) -> None:
        super().__init__()
        require("at", at, bool, "the names of at least one layer")
        self.student, self.at = model, tuple(at)
        with torch.no_grad(), statistics_rest(model), features(model, [*self.at, EMBEDDING]) as found:
            classes = model(in_own_type(model, example)).shape[1]
        size = found[EMBEDDING].shape[1]
        self.adapters = nn.ModuleList(
            nn.Linear(pooled(found[name]).shape[1], size).to(found[name]) for name in self.at
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(size, classes).to(found[name]) for name in self.at)
        self.train(model.training)

    @property
    def model(self) -> nn.Module:
        """The plain network."""
        return self.student

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to the network's logits ``[N, K]``."""
        return self.student(x)

    def exits(self, x: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Logits ``[N, K]`` and features ``[N, D]`` of each exit in turn, and at last of the network itself."""
        with features(self.student, [*self.at, EMBEDDING]) as found:
            last = self.student(x)
        adapted = [adapt(pooled(found[name])) for adapt, name in zip(self.adapters, self.at, strict=True)]
        logits = [head(each.relu()) for head, each in zip(self.heads, adapted, strict=True)]
        return [*logits, last], [*adapted, found[EMBEDDING]]


def self_distillation(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    temperature: float = 3.0,
    mix: float = 0.3,
    hint: float = 0.03,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the objective of a ``WithExits`` network's last layer, and for each exit the sum of three:

    :math:`(1-\lambda)` of its own objective, :math:`\lambda` (``mix``) of the soft loss with the last layer as the
    teacher, and ``hint`` times the mean squared difference of its features and the last ones. The last layer does not
    move towards its pupils: to them it is constant.

    Raises
    ------
    ValueError : the model is no ``WithExits``, ``temperature`` is no number above 0, ``mix`` none from 0 to 1, ``hint``
        none of at least 0.
    """
    check_positive(temperature=temperature)
    check_chance(mix=mix)
    check_not_negative(hint=hint)
    network = unseen(model)
    if not isinstance(network, WithExits):
        raise ValueError(f"model={type(network).__name__}: must be a network WithExits")
    logits, seen = network.exits(x)
    total = objective(Seen(network, x, logits[-1]), x, y)
    for z, mine in zip(logits[:-1], seen[:-1], strict=True):
        soft = soft_loss(z, logits[-1].detach(), temperature)
        total = total + (1 - mix) * objective(Seen(network, x, z), x, y) + mix * soft
        total = total + hint * (mine - seen[-1].detach()).square().mean()
    return total


# --- A network that teaches itself: its own average -------------------------------------------------------------------


class WithAverage(nn.Module):
    """A network and the moving average of its weights, which is its teacher, and which answers in evaluation.

    The average moves when ``follow`` is called: ``following(recipe, model)`` does so after each step. It belongs to
    the network's state: a checkpoint holds it.

    Raises
    ------
    ValueError : ``decay`` is no number from 0 to below 1.
    """

    def __init__(self, student: nn.Module, decay: float = 0.99) -> None:
        super().__init__()
        require("decay", decay, lambda d: is_number(d) and 0 <= d < 1, "a number from 0 to below 1")
        self.student, self.average, self.decay = student, copy.deepcopy(student).requires_grad_(False), decay
        self.train(student.training)

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to logits ``[N, K]``: the student's in training, the average's in evaluation."""
        return self.student(x) if self.training else self.average(x)

    def follow(self) -> None:
        """Move the average towards the student's weights; its buffers become the student's."""
        with torch.no_grad():
            torch._foreach_lerp_([*self.average.parameters()], [*self.student.parameters()], 1 - self.decay)
            for mine, theirs in zip(self.average.buffers(), self.student.buffers(), strict=True):
                mine.copy_(theirs)


def following(recipe: Recipe, model: WithAverage) -> Recipe:
    """Return the recipe, after each of whose steps the model's average follows."""

    def follow(optimizer: Optimizer, step: int) -> None:
        model.follow()

    return after_each_step(recipe, follow)


def mean_teacher(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    strength: float = 1.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the objective and ``strength`` times the mean squared difference of a ``WithAverage``'s probabilities.

    :math:`\tfrac1{NK}\sum_{ik}(q_{ik}-p_{ik})^2`, q the student's and p the average's, which is a constant here and has
    dropout, where the network has it, as in the paper; batch norm's running statistics rest in it. Needs no labels.

    Raises
    ------
    ValueError : the model is no ``WithAverage``, or ``strength`` no number of at least 0.
    """
    check_not_negative(strength=strength)
    network = unseen(model)
    if not isinstance(network, WithAverage):
        raise ValueError(f"model={type(network).__name__}: must be a network WithAverage")
    logits = model(x)
    with torch.no_grad(), statistics_rest(network.average):
        target = network.average(x).softmax(1)
    apart = (logits.softmax(1) - target).square().mean()
    return objective(Seen(model, x, logits), x, y) + strength * apart
