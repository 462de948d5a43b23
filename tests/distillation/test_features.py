"""Layers by name, regressors that the student carries, and losses on features against loops over their formulas."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import distillation as kd
from course_lib import regularization as reg
from course_lib.lab.training import Recipe, fit, fresh
from tests.distillation.small import (
    NETWORKS,
    SMALL_CONVNET,
    counted,
    gradients,
    images,
    network,
    normal,
    teacher,
    tiny,
)

ROWS, OTHER = normal(6, 5), normal(6, 7, seed=1)
MAPS, OTHER_MAPS = normal(4, 3, 4, 4), normal(4, 5, 4, 4, seed=1)


def rotation(size: int, seed: int = 4) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


# --- Layers by name ---------------------------------------------------------------------------------------------------

LAYERS = {"mlp": "hidden.1", "convnet": "features.6", "resnet": "stages.1", "vit": "blocks.0"}


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_what_the_layers_give(name: str) -> None:
    x, _ = images()
    model = network(name).eval()
    with kd.features(model, [LAYERS[name], "embedding", ""]) as found:
        logits = model(x)
    assert torch.equal(found[""], logits)
    assert torch.equal(found["embedding"], model.embedding(x))  # type: ignore[operator]
    assert found[LAYERS[name]].requires_grad
    held = dict(found)
    model(2 * x)
    assert all(held[key] is found[key] for key in held), "outside, nothing is kept"
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    if name == "mlp":
        assert torch.equal(found["hidden.1"], model.hidden[1](model.hidden[0](x.flatten(1))))  # type: ignore[index, operator]


def test_layers_that_are_not_there_are_named() -> None:
    model = network()
    with (
        pytest.raises(ValueError, match=r"layer='layer4': must be one of MLP's layers, .*'hidden\.0'.* or 'embedding'"),
        kd.features(model, ["hidden.0", "layer4"]),
    ):
        pass
    assert not model.hidden[0]._forward_hooks  # type: ignore[index]
    words = "layer='embedding': must be one of Sequential's layers, '0'$"
    with pytest.raises(ValueError, match=words), kd.features(nn.Sequential(nn.Linear(2, 2)), ["embedding"]):
        pass
    recurrent = nn.Sequential(nn.LSTM(2, 2))
    with kd.features(recurrent, ["0"]), pytest.raises(ValueError, match="layer='0' gives tuple: must be a layer that"):
        recurrent(torch.zeros(1, 2))


# --- One pass for all -------------------------------------------------------------------------------------------------

AT = {"features.6": "stages.2"}
ROW_LAYERS = {"embedding": "embedding"}


def test_student_and_teacher_run_once_however_many_look() -> None:
    x, y = images()
    student, wise = network("convnet"), teacher("resnet")
    passes = counted(student), counted(wise)
    chain = partial(
        kd.soft_targets,
        teacher=wise,
        objective=partial(
            reg.confidence_penalty,
            objective=partial(
                kd.attention_transfer,
                teacher=wise,
                at={"features.4": "stages.1"},
                objective=partial(kd.similarity_preserving, teacher=wise, at=ROW_LAYERS),
            ),
        ),
    )
    found = chain(student, x, y)
    assert [len(each) for each in passes] == [1, 1]
    plain, frozen = network("convnet"), teacher("resnet")
    with kd.features(plain, ["features.4", "embedding"]) as mine:
        z = plain(x)
    with kd.features(frozen, ["stages.1", "embedding"]) as theirs:
        v = frozen(x)
    expected = F.cross_entropy(z, y) - 0.1 * reg.entropy(z).mean()
    expected = expected + 500 * kd.attention_loss(mine["features.4"], theirs["stages.1"])
    expected = expected + 3000 * kd.similarity_loss(mine["embedding"], theirs["embedding"])
    expected = 0.1 * expected + 0.9 * kd.soft_loss(z, v, 4.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(gradients(student, found), gradients(plain, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_behind_another_objective_the_student_runs_again_and_its_statistics_rest() -> None:
    x, y = images()
    student = network("convnet")
    once = copy.deepcopy(student)
    once(x)
    passes = counted(student)
    hints = partial(kd.attention_transfer, teacher=teacher(), at={"features.4": "features.4"})
    reg.confidence_penalty(student, x, y, objective=hints)
    assert len(passes) == 2
    for name, value in once.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value)


# --- Regressors -------------------------------------------------------------------------------------------------------


def test_a_student_carries_regressors_and_gives_them_back() -> None:
    x, y = images()
    student, wise = network("convnet"), teacher("resnet")
    at = {"features.6": "stages.1", "embedding": "embedding"}
    carrying = kd.with_connectors(student, kd.connectors(student, wise, at, x))
    assert torch.equal(carrying.eval()(x), student(x))
    assert kd.without_connectors(carrying) is student
    assert kd.without_connectors(student) is student
    extra = sum(p.numel() for p in carrying.parameters()) - sum(p.numel() for p in student.parameters())
    with kd.features(student, at) as mine, kd.features(wise, at.values()) as theirs:
        student(x), wise(x)
    sizes = [(mine[a].shape[1], theirs[b].shape[1]) for a, b in at.items()]
    assert extra == sum(a * b + b for a, b in sizes)
    found = kd.hints(carrying, x, y, teacher=wise, at=at, strength=0.5)
    expected = F.cross_entropy(student(x), y)
    for name, of in at.items():
        expected = expected + 0.5 * F.mse_loss(carrying.of_student[name.replace(".", "/")](mine[name]), theirs[of])
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    found.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in carrying.of_student.parameters())


SHAPES = [
    ((2, 3), (2, 5)),
    ((2, 7, 3), (2, 7, 5)),
    ((2, 3, 4, 4), (2, 5, 4, 4)),
    ((2, 3, 8, 8), (2, 5, 4, 4)),
    ((2, 3, 4, 4), (2, 5, 8, 8)),
    ((2, 3, 7, 6), (2, 5, 5, 6)),
]


@pytest.mark.parametrize(("student", "other"), SHAPES)
def test_a_connector_gives_the_teachers_shape(student: tuple[int, ...], other: tuple[int, ...]) -> None:
    made = kd.connector(normal(*student), normal(*other))
    assert made(normal(*student)).shape == other


@pytest.mark.parametrize(
    ("student", "other", "words"),
    [
        ((2, 3), (2, 3, 4, 4), "must both be rows"),
        ((2, 5, 3), (2, 7, 3), "as many tokens"),
        ((2, 3, 3, 3), (2, 3, 8, 8), "student's maps are 3×3, teacher's 8×8: must be as large"),
    ],
)
def test_what_cannot_be_connected_is_named(student: tuple[int, ...], other: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        kd.connector(normal(*student), normal(*other))


def test_pooled_are_means_over_places() -> None:
    torch.testing.assert_close(kd.pooled(MAPS), MAPS.mean((2, 3)))
    torch.testing.assert_close(kd.pooled(normal(2, 3, 4)), normal(2, 3, 4).mean(1))
    assert kd.pooled(ROWS) is ROWS


# --- Hints and attention ----------------------------------------------------------------------------------------------


def test_hint_loss_is_the_mean_square() -> None:
    total = sum((a - b) ** 2 for a, b in zip(MAPS.flatten().tolist(), (2 * MAPS).flatten().tolist(), strict=True))
    assert kd.hint_loss(MAPS, 2 * MAPS).item() == pytest.approx(total / MAPS.numel(), rel=1e-12)
    with pytest.raises(ValueError, match=r"student's features are \[4, 3, 4, 4\], teacher's \[4, 5, 4, 4\]"):
        kd.hint_loss(MAPS, OTHER_MAPS)


def attention_by_loops(features: Tensor) -> list[list[float]]:
    maps = []
    for f in features:
        q = [sum(f[c, i, j].item() ** 2 for c in range(len(f))) for i in range(f.shape[1]) for j in range(f.shape[2])]
        size = math.sqrt(sum(value**2 for value in q))
        maps.append([value / size for value in q])
    return maps


def test_attention_loss_is_its_formula() -> None:
    a, b = attention_by_loops(MAPS), attention_by_loops(OTHER_MAPS)
    torch.testing.assert_close(kd.attention_map(MAPS), torch.tensor(a, dtype=torch.float64))
    squares = [(u - v) ** 2 for mine, theirs in zip(a, b, strict=True) for u, v in zip(mine, theirs, strict=True)]
    assert kd.attention_loss(MAPS, OTHER_MAPS).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)


def test_attention_sees_no_scale_and_no_channel() -> None:
    expected = kd.attention_loss(MAPS, OTHER_MAPS)
    scale = torch.tensor([0.5, 1.0, 2.0, 9.0], dtype=torch.float64).view(4, 1, 1, 1)
    turned = torch.einsum("nchw,cd->ndhw", MAPS, rotation(3))
    for same in (scale * MAPS, turned, MAPS[:, [2, 0, 1]], -MAPS):
        torch.testing.assert_close(kd.attention_loss(same, OTHER_MAPS), expected)
    large = normal(4, 2, 8, 8, seed=2)
    small = kd.attention_loss(MAPS, F.avg_pool2d(large, 2))
    torch.testing.assert_close(kd.attention_loss(MAPS, large), small)
    torch.testing.assert_close(kd.attention_loss(large, MAPS), small)
    tokens = MAPS.flatten(2).mT
    torch.testing.assert_close(kd.attention_map(tokens), kd.attention_map(MAPS))
    with pytest.raises(ValueError, match=r"features are \[6, 5\]: must be maps"):
        kd.attention_map(ROWS)
    with pytest.raises(ValueError, match="student has 16 places, teacher 15: must be as many tokens"):
        kd.attention_loss(tokens, tokens[:, 1:])


# --- Relations --------------------------------------------------------------------------------------------------------


def test_similarity_loss_is_its_formula() -> None:
    def rows(q: Tensor) -> Tensor:
        g = torch.stack([torch.stack([a @ b for b in q]) for a in q])
        return torch.stack([row / row.square().sum().sqrt() for row in g])

    expected = (rows(ROWS) - rows(OTHER)).square().sum() / 36
    assert kd.similarity_loss(ROWS, OTHER).item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(kd.similarities(MAPS), rows(MAPS.flatten(1)))
    torch.testing.assert_close(kd.similarity_loss(3 * ROWS @ rotation(5), OTHER), expected)


def test_relational_losses_are_their_formulas() -> None:
    def pairs(f: Tensor) -> Tensor:
        d = torch.tensor([[math.dist(a, b) for b in f.tolist()] for a in f.tolist()], dtype=torch.float64)
        return d / (d.sum() / 30)

    def threes(f: Tensor) -> Tensor:
        found = torch.zeros(6, 6, 6, dtype=torch.float64)
        for j, i, k in itertools.product(range(6), repeat=3):
            if j not in (i, k):
                found[j, i, k] = F.cosine_similarity(f[i] - f[j], f[k] - f[j], dim=0)
        return found

    def huber(a: Tensor, b: Tensor) -> float:
        apart = (a - b).abs().flatten().tolist()
        return sum(0.5 * d**2 if d < 1 else d - 0.5 for d in apart) / len(apart)

    torch.testing.assert_close(kd.distances(ROWS), pairs(ROWS))
    torch.testing.assert_close(kd.angles(ROWS), threes(ROWS))
    assert kd.distance_loss(ROWS, OTHER).item() == pytest.approx(huber(pairs(ROWS), pairs(OTHER)), rel=1e-12)
    assert kd.angle_loss(ROWS, OTHER).item() == pytest.approx(huber(threes(ROWS), threes(OTHER)), rel=1e-12)


@pytest.mark.parametrize("loss", [kd.distance_loss, kd.angle_loss])
def test_relations_stay_when_features_are_turned_moved_and_scaled(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    moved = 4 * ROWS @ rotation(5) + normal(5, seed=8)
    torch.testing.assert_close(loss(moved, OTHER), loss(ROWS, OTHER))
    assert loss(moved, ROWS).item() == pytest.approx(0, abs=1e-20)
    assert loss(ROWS.square(), ROWS).item() > 1e-3


@pytest.mark.parametrize("loss", [kd.distance_loss, kd.angle_loss, kd.similarity_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_image_twice_has_a_small_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    twice = ROWS[[0, 1, 2, 1, 1]].to(dtype).requires_grad_()
    loss(twice, OTHER[:5].to(dtype)).backward()
    assert twice.grad is not None
    assert twice.grad.abs().max() < 10


# --- Contrast ---------------------------------------------------------------------------------------------------------

S, T = F.normalize(normal(6, 4), dim=1), F.normalize(normal(6, 4, seed=1), dim=1)
CLASSES = torch.tensor([0, 0, 1, 2, 1, -100])


def contrast_by_loops(s: Tensor, t: Tensor, labels: list[int], tau: float) -> float:
    """With the paper's N/M, and e^u divided by M times its mean, as its code does, M being anything."""
    size = 1000
    e = [[math.exp(a @ b / tau) for b in t] for a in s]
    z = size * sum(map(sum, e)) / 36
    total = 0.0
    for i, j in itertools.product(range(6), repeat=2):
        differ = labels[i] != labels[j] or labels[i] == -100
        for other in [j] if i != j and differ else [i] if i == j else []:
            count = sum(k != i and (labels[k] != labels[i] or labels[i] == -100) for k in range(6))
            for h in (e[i][other] / z, e[other][i] / z):
                h = h / (h + count / size)
                total -= math.log(h if i == j else 1 - h) / 6
    return total


@pytest.mark.parametrize("labels", [CLASSES, torch.arange(6), torch.full((6,), -100)])
def test_contrastive_loss_is_its_formula(labels: Tensor) -> None:
    expected = contrast_by_loops(S, T, labels.tolist(), 0.2)
    assert kd.contrastive_loss(S, T, labels, 0.2).item() == pytest.approx(expected, rel=1e-10)


def test_contrastive_loss_takes_mixed_labels_and_batches_of_one_class() -> None:
    soft = normal(6, 3).softmax(1)
    torch.testing.assert_close(kd.contrastive_loss(S, T, soft), kd.contrastive_loss(S, T, torch.arange(6)))
    one = S.clone().requires_grad_()
    kd.contrastive_loss(one, T, torch.zeros(6, dtype=torch.int64)).backward()
    assert one.grad is not None
    assert one.grad.isfinite().all()
    assert kd.contrastive_loss(T, T, torch.arange(6)) < kd.contrastive_loss(T[[1, 2, 3, 4, 5, 0]], T, torch.arange(6))
    with pytest.raises(ValueError, match=r"must both be \[N, D\]; with_projections"):
        kd.contrastive_loss(S, T[:, :3], CLASSES)
    with pytest.raises(ValueError, match="temperature=0: must be a number above 0"):
        kd.contrastive_loss(S, T, CLASSES, 0)


def test_projections_are_directions_and_train_on_both_sides() -> None:
    x, y = images()
    student, wise = network("convnet"), teacher("resnet")
    carrying = kd.with_projections(student, wise, {"features.6": "embedding"}, x, size=3)
    loss = kd.contrastive(carrying, x, y, teacher=wise, at={"features.6": "embedding"})
    loss.backward()
    assert all(p.grad is not None for p in carrying.parameters())
    assert all(p.grad is None for p in wise.parameters())
    parts = [*carrying.of_student.values(), *carrying.of_teacher.values()]
    assert isinstance(parts[0], kd.Projection)
    with kd.features(student, ["features.6"]) as found:
        student(x)
    assert parts[0](found["features.6"]).shape == (6, 3)
    torch.testing.assert_close(parts[0](found["features.6"]).norm(dim=1), torch.ones(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="size=0: must be a whole number of at least 1"):
        kd.with_projections(student, wise, {"features.6": "embedding"}, x, size=0)


# --- As objectives ----------------------------------------------------------------------------------------------------

OBJECTIVES: dict[str, tuple[Callable[..., Tensor], dict[str, str]]] = {
    "hints": (partial(kd.hints, strength=1.0), {"features.6": "features.6"}),
    "attention": (partial(kd.attention_transfer, strength=50.0), {"features.4": "features.4"}),
    "similarity": (partial(kd.similarity_preserving, strength=30.0), {"embedding": "embedding"}),
    "relational": (kd.relational, {"embedding": "embedding"}),
    "contrastive": (kd.contrastive, {"embedding": "embedding"}),
}


@pytest.fixture(scope="module")
def wise() -> nn.Module:
    torch.manual_seed(5)
    return kd.frozen(NETWORKS["convnet"].func((1, 16, 16), 10, width=4))  # type: ignore[attr-defined]


def carried(name: str, wise: nn.Module, x: Tensor) -> nn.Module:
    student, at = SMALL_CONVNET(), OBJECTIVES[name][1]
    if name == "hints":
        return kd.with_connectors(student, kd.connectors(student, wise, at, x))
    return kd.with_projections(student, wise, at, x, size=8) if name == "contrastive" else student


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_they_train(name: str, precision: Any, wise: nn.Module) -> None:
    data = tiny(120)
    objective, at = OBJECTIVES[name]
    teaching = partial(objective, teacher=wise, at=at, objective=partial(kd.soft_targets, teacher=wise))
    recipe = Recipe(epochs=2, batch_size=15, objective=teaching, precision=precision)
    student = fresh(partial(carried, name, wise, torch.zeros(2, 1, 16, 16)), recipe, seed=0)
    history = fit(student, data, recipe, seed=0)
    assert history["train_loss"][1] < history["train_loss"][0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bad_settings_are_named(name: str, wise: nn.Module) -> None:
    x, y = torch.zeros(3, 1, 16, 16), torch.arange(3)
    objective, at = OBJECTIVES[name]
    student = carried(name, wise, x)
    with pytest.raises(ValueError, match=re.escape("at={}: must be a mapping such as")):
        objective(student, x, y, teacher=wise, at={})
    with pytest.raises(ValueError, match="layer='layer4': must be one of ConvNet's layers"):
        objective(student, x, y, teacher=wise, at={"layer4": "embedding"})
    with pytest.raises(ValueError, match="layer='layer4': must be one of ConvNet's layers"):
        objective(student, x, y, teacher=wise, at={"embedding": "layer4"})
    word = "distance" if name == "relational" else "strength"
    with pytest.raises(ValueError, match=f"{word}=-1: must be a number of at least 0"):
        objective(student, x, y, teacher=wise, at=at, **{word: -1})


@pytest.mark.gpu
@pytest.mark.parametrize("name", OBJECTIVES)
def test_features_on_the_gpu(name: str, wise: nn.Module) -> None:
    objective, at = OBJECTIVES[name]
    x, y = images(6, size=16)
    student, other = carried(name, wise, x.float()).double(), copy.deepcopy(wise).double()
    here = objective(student, x, y, teacher=other, at=at).item()
    there = objective(student.cuda(), x.cuda(), y.cuda(), teacher=other.cuda(), at=at).item()
    assert there == pytest.approx(here, rel=1e-8)
