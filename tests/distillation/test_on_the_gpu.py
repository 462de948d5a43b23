"""Every public function on a GPU, or on one that is emulated: the numbers of the CPU, from tensors over there.

``fit`` brings the student and the data to the GPU and gives the student back; teachers must lie where it trains.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import distillation as kd
from course_lib.lab.data import Dataset
from course_lib.lab.training import Recipe, fit, fresh
from tests.distillation.small import LABELS, SMALL_CONVNET, K, N, generator, normal, tiny
from tests.regularization.small import Move, every_name_once, on_the_gpu_as_here

Z, V = 2 * normal(N, K), 2 * normal(N, K, seed=1)
POSTERIOR = V.softmax(1)
MAPS, OTHERS = normal(4, 3, 4, 4), normal(4, 3, 4, 4, seed=1)
SHORT = Recipe(epochs=1, batch_size=20, precision="float64")
AT = {"features.6": "features.6"}
X = normal(4, 1, 16, 16)


@cache
def data() -> Dataset:
    return tiny(40)


def new(seed: int = 0) -> nn.Module:
    return fresh(SMALL_CONVNET, SHORT, seed=seed)


def wise(seed: int = 7) -> nn.Module:
    return kd.frozen(new(seed))


def here(x: Any) -> Any:
    return x


def trained(
    objective: Callable[..., Tensor], student: nn.Module | None = None, on: Dataset | None = None
) -> list[Tensor]:
    """The weights after a short run, which takes place on the GPU if there is one, and begins and ends here."""
    student = student or new()
    fit(student, on or data(), replace(SHORT, objective=objective), seed=0)
    return list(student.parameters())


def taught(to: Move, objective: Callable[..., Tensor], **settings: Any) -> list[list[Tensor]]:
    """By a teacher that lies there."""
    return [trained(partial(objective, teacher=to(wise()), **settings))]


def both(to: Move, loss: Callable[..., Any], *inputs: Tensor) -> Any:
    return loss(*map(to, inputs))


def fitted_together(to: Move, make: Callable[[nn.Module, nn.Module, Tensor], nn.Module]) -> list[Any]:
    """What is made lies where the networks do."""
    made = make(to(new()), to(wise()), to(X))
    assert {p.device for p in made.parameters()} == {to(X).device}
    return [tuple(p.shape) for p in made.parameters()]


def with_projections(to: Move) -> list[Tensor]:
    torch.manual_seed(0)
    teacher = to(wise())
    student = kd.with_projections(to(new()), teacher, AT, to(X), size=4)
    return [p.cpu() for p in trained(partial(kd.contrastive, teacher=teacher, at=AT), student)]


def with_connectors(to: Move) -> list[Tensor]:
    torch.manual_seed(0)
    student, teacher, at = to(new()), to(wise()), {"features.4": "features.2"}
    carried = kd.with_connectors(student, kd.connectors(student, teacher, at, to(X)))
    trained(partial(kd.hints, teacher=teacher, at=at), carried)
    return [p.cpu() for p in kd.without_connectors(carried).parameters()]


def cached(to: Move) -> list[list[Tensor]]:
    """The teacher and the data here or there."""
    found = []
    for teacher, split in itertools.product((here, to), repeat=2):
        numbered, cache = kd.cached(teacher(wise()), split(data()))
        found.append(trained(cache.objective(partial(kd.soft_targets, teacher=cache)), on=numbered))
    return found


def ensemble(to: Move) -> list[list[Tensor]]:
    one = kd.frozen(kd.Ensemble([to(new(1)), to(new(2))]))
    many = kd.Ensemble([to(wise(1)), to(wise(2))], of="logits").eval()
    return [trained(partial(kd.soft_targets, teacher=teacher)) for teacher in (one, many)]


def mean_teacher(to: Move) -> list[Tensor]:
    model = to(kd.WithAverage(new()))
    fit(model, data(), kd.following(replace(SHORT, objective=kd.mean_teacher), model), seed=0)
    return list(model.parameters())


def transfer(to: Move) -> list[list[Tensor]]:
    objective = partial(kd.soft_targets, teacher=to(wise()), objective=kd.labelled_only)
    pairs = [(data(), to(data().test.images)), (to(data()), data().test.images)]
    return [trained(objective, on=kd.transfer_set(mine, extra)) for mine, extra in pairs]


def invert(to: Move) -> list[Tensor]:
    """Labels here or there."""
    bounds = kd.black_and_white(to(data()).train)
    drawn = partial(kd.invert, to(new().eval()), input_shape=(1, 16, 16), steps=2, bounds=bounds)
    return [drawn(labels, generator=generator()) for labels in (torch.arange(4), to(torch.arange(4)))]


def inverted(to: Move) -> list[Tensor]:
    """Images and labels here or there: they go where the data set lies."""
    found = [kd.inverted(to(data()), x, to(torch.arange(4))).train for x in (X, to(X))]
    return [*(split.images for split in found), *(split.labels for split in found)]


def fidelity(to: Move, measure: Callable[..., Any]) -> list[Any]:
    """Student, teacher and split here or there."""
    places = itertools.product((here, to), repeat=3)
    return [measure(student(new()), teacher(wise()), split(data().test)) for student, teacher, split in places]


def features(to: Move) -> dict[str, Tensor]:
    model = to(new())
    with kd.features(model, ["features.2", "embedding"]) as found:
        model(to(X))
    return found


def lesson(to: Move) -> tuple[Tensor, Tensor]:
    teacher = to(wise())
    seen = kd.lesson(to(new()), to(X), kd.unlabelled, at=["embedding"], teacher=teacher)
    return seen.taught(teacher), seen.layers["embedding"]


def dark_knowledge(to: Move) -> list[Any]:
    places = itertools.product((here, to), repeat=2)
    return [tuple(kd.dark_knowledge(teacher(wise()), split(data().test))) for teacher, split in places]


def frozen(to: Move) -> list[Tensor]:
    """A copy is frozen, too."""
    teacher = to(wise())
    return [model.train()(to(X)).cpu() for model in (teacher, copy.deepcopy(teacher))]


PARTLY = torch.tensor([1, -100, 2, 3])
THERE: dict[str, Callable[[Move], Any]] = {
    # targets
    "labelled_only": lambda to: kd.labelled_only(to(new()), to(X), to(PARTLY)),
    "unlabelled": lambda to: kd.unlabelled(to(new()), to(X), to(PARTLY)),
    "soft_loss": lambda to: both(to, kd.soft_loss, Z, V),
    "logit_loss": lambda to: both(to, kd.logit_loss, Z, V),
    "centred": lambda to: both(to, kd.centred, Z),
    "standardized_logits": lambda to: both(to, kd.standardized_logits, Z),
    "target_class_losses": lambda to: both(to, kd.target_class_losses, Z, V, LABELS),
    "other_classes_losses": lambda to: both(to, kd.other_classes_losses, Z, V, LABELS),
    # layerwise, relations
    "hint_loss": lambda to: both(to, kd.hint_loss, MAPS, OTHERS),
    "attention_map": lambda to: both(to, kd.attention_map, MAPS),
    "attention_loss": lambda to: both(to, kd.attention_loss, MAPS, OTHERS[..., :2, :2]),
    "similarities": lambda to: both(to, kd.similarities, MAPS),
    "similarity_loss": lambda to: both(to, kd.similarity_loss, MAPS, OTHERS),
    "distances": lambda to: both(to, kd.distances, MAPS),
    "distance_loss": lambda to: both(to, kd.distance_loss, MAPS, OTHERS),
    "angles": lambda to: both(to, kd.angles, MAPS),
    "angle_loss": lambda to: both(to, kd.angle_loss, MAPS, OTHERS),
    "contrastive_loss": lambda to: both(to, kd.contrastive_loss, Z, V, LABELS),
    # taps, connecting, lessons
    "features": features,
    "lesson": lesson,
    "pooled": lambda to: both(to, kd.pooled, MAPS),
    "connector": lambda to: [
        p.shape for p in kd.connector(to(MAPS), to(OTHERS)).parameters() if p.device == to(Z).device
    ],
    "connectors": lambda to: fitted_together(to, lambda s, t, x: kd.connectors(s, t, AT, x)["features.6"]),
    # passing_on
    "WithExits": lambda to: fitted_together(to, lambda s, t, x: kd.WithExits(s, ["features.2"], x)),
    "mean_teacher": mean_teacher,
    # data_free
    "statistics_distance": lambda to: kd.statistics_distance(to(new().eval()), to(X)),
    "total_variation": lambda to: both(to, kd.total_variation, X),
    "invert": invert,
    "inverted": inverted,
    # principle
    "soft_gradient": lambda to: both(to, kd.soft_gradient, Z, V),
    "hot_gradient": lambda to: both(to, kd.hot_gradient, Z, V),
    "distance_to_limit": lambda to: both(to, partial(kd.distance_to_limit, temperature=3.0), Z, V),
    "gradient_weights": lambda to: [kd.gradient_weights(to(V), labels) for labels in (LABELS, to(LABELS))],
    "risk": lambda to: both(to, kd.risk, Z, POSTERIOR),
    "risk_variance": lambda to: both(to, kd.risk_variance, Z, POSTERIOR),
    "sampled_risks": lambda to: kd.sampled_risks(to(Z), to(POSTERIOR), 3, generator()),
    "teacher_risk": lambda to: tuple(both(to, kd.teacher_risk, Z, POSTERIOR, Z.softmax(1))),
    # fidelity
    "agreement": lambda to: fidelity(to, kd.agreement),
    "agreement_where_wrong": lambda to: fidelity(to, kd.agreement_where_wrong),
    "divergence_from": lambda to: fidelity(to, partial(kd.divergence_from, temperature=2.0)),
    "answers": lambda to: [tuple(found) for found in fidelity(to, kd.answers)],
}
AND_BACK: dict[str, Callable[[Move], Any]] = {
    "soft_targets": lambda to: taught(to, kd.soft_targets),
    "match_logits": lambda to: taught(to, kd.match_logits),
    "decoupled": lambda to: taught(to, kd.decoupled),
    "standardized": lambda to: taught(to, kd.standardized),
    "hints": lambda to: taught(to, kd.hints, at=AT),
    "attention_transfer": lambda to: taught(to, kd.attention_transfer, at=AT),
    "similarity_preserving": lambda to: taught(to, kd.similarity_preserving, at=AT, strength=1.0),
    "relational": lambda to: taught(to, kd.relational, at={"embedding": "embedding"}),
    "with_projections": with_projections,
    "with_connectors": with_connectors,
    "frozen": frozen,
    "Ensemble": ensemble,
    "cached": cached,
    "transfer_set": transfer,
    "distilled": lambda to: list(kd.distilled(SMALL_CONVNET, to(wise()), data(), SHORT, seed=0).parameters()),
    "dark_knowledge": dark_knowledge,
}
WITH_OTHERS = "Cached Connected Projection WithAverage black_and_white contrastive following without_connectors"
IN_OTHER_FILES = "Cohort mutual self_distillation"
# the first network is given back by ``fit`` before it teaches the second, and is then elsewhere
NOT_YET = "assistants born_again"
HOLD_NO_TENSORS = "Answers DarkKnowledge Lesson SEEDS_APART Teacher TeacherRisk UNLABELLED batch_norms"


@pytest.mark.gpu
@pytest.mark.parametrize("name", THERE)
def test_on_the_gpu_as_here(name: str) -> None:
    on_the_gpu_as_here(THERE[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", AND_BACK)
def test_on_the_gpu_as_here_and_back_again(name: str) -> None:
    on_the_gpu_as_here(AND_BACK[name], rtol=1e-6, lies="cpu")


def test_every_public_name_has_been_there() -> None:
    every_name_once(kd, THERE, AND_BACK, WITH_OTHERS, IN_OTHER_FILES, NOT_YET, HOLD_NO_TENSORS)
