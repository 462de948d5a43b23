"""Soft targets and what came of them, against torch's divergence, loops over formulas, and their own limits."""

from __future__ import annotations

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
from course_lib import preprocessing
from course_lib import regularization as reg
from course_lib.lab.training import Objective, Recipe, cross_entropy, fit, fresh
from tests.distillation.small import (
    LABELS,
    SMALL_CONVNET,
    K,
    Logits,
    N,
    Says,
    gradients,
    images,
    network,
    normal,
    teacher,
    tiny,
)

V = 3 * normal(N, K, seed=1)
SOFT = normal(N, K, seed=3).softmax(1)
NONE = torch.full((N,), kd.UNLABELLED)
SOME = torch.where(torch.arange(N) % 2 == 0, LABELS, kd.UNLABELLED)


@pytest.fixture
def model() -> Logits:
    return Logits(3 * normal(N, K))


def agree(found: Tensor, expected: Tensor, model: nn.Module, rel: float = 1e-12) -> None:
    """The same loss and the same gradient."""
    assert found.item() == pytest.approx(expected.item(), rel=rel, abs=1e-14)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected), rtol=rel, atol=1e-14)


def by_loops(z: Tensor, v: Tensor, temperature: float) -> float:
    """The soft loss by its definition, number by number."""
    total = 0.0
    for mine, theirs in zip((z / temperature).tolist(), (v / temperature).tolist(), strict=True):
        q = [math.exp(a) / sum(map(math.exp, mine)) for a in mine]
        p = [math.exp(a) / sum(map(math.exp, theirs)) for a in theirs]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(z)


# --- Soft targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_loss_is_torchs_divergence(model: Logits, temperature: float) -> None:
    found = kd.soft_loss(model.logits, V, temperature)
    log_q, log_p = (model.logits / temperature).log_softmax(1), (V / temperature).log_softmax(1)
    expected = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    agree(found, expected, model)
    assert found.item() == pytest.approx(by_loops(model.logits.detach(), V, temperature), rel=1e-10)
    assert kd.soft_loss(V, V, temperature).item() == 0


@pytest.mark.parametrize("y", [LABELS, SOFT], ids=["labels", "probabilities"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_soft_targets_mix_with_the_labels(model: Logits, y: Tensor, mix: float) -> None:
    found = kd.soft_targets(model, None, y, teacher=Says(V), temperature=2.0, mix=mix)
    expected = (1 - mix) * F.cross_entropy(model.logits, y) + mix * kd.soft_loss(model.logits, V, 2.0)
    agree(found, expected, model)


def test_at_temperature_1_they_are_labels_mixed_with_probabilities(model: Logits) -> None:
    """But for the teacher's entropy, which no student changes."""
    found = kd.soft_targets(model, None, LABELS, teacher=Says(V), temperature=1.0, mix=0.6)
    target = 0.4 * F.one_hot(LABELS, K).double() + 0.6 * V.softmax(1)
    agree(found, F.cross_entropy(model.logits, target) - 0.6 * reg.entropy(V).mean(), model)


def test_a_uniform_teacher_is_label_smoothing(model: Logits) -> None:
    found = kd.soft_targets(model, None, LABELS, teacher=Says(torch.zeros_like(V)), temperature=1.0, mix=0.1)
    expected = F.cross_entropy(model.logits, LABELS, label_smoothing=0.1) - 0.1 * math.log(K)
    agree(found, expected, model)


def test_without_labels_the_soft_part_alone_is_left(model: Logits) -> None:
    assert cross_entropy(model, None, NONE).isnan()
    found = kd.soft_targets(model, None, NONE, teacher=Says(V), temperature=3.0, mix=1.0)
    agree(found, kd.soft_loss(model.logits, V, 3.0), model)


# --- Logits -----------------------------------------------------------------------------------------------------------


def test_match_logits_is_half_the_squared_distance(model: Logits) -> None:
    found = kd.match_logits(model, None, LABELS, teacher=Says(V), strength=0.3)
    apart = sum((a - b).square().sum() for a, b in zip(model.logits, V, strict=True)) / (2 * N)
    agree(found, F.cross_entropy(model.logits, LABELS) + 0.3 * apart, model)
    alone = kd.match_logits(model, None, NONE, teacher=Says(V), objective=kd.unlabelled)
    agree(alone, F.mse_loss(model.logits, V) * K / 2, model)


def test_hot_soft_targets_are_centred_logits(model: Logits) -> None:
    hot = kd.soft_loss(model.logits, V, 1e4)
    limit = kd.logit_loss(kd.centred(model.logits), kd.centred(V)) / K
    agree(hot, limit, model, rel=5e-3)
    plain = kd.logit_loss(model.logits, V) / K
    assert abs(hot.item() / plain.item() - 1) > 0.1, "without centring it is another loss"
    assert kd.centred(V).sum(1).abs().max() < 1e-13


# --- Two parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_falls_into_two_parts(model: Logits, temperature: float) -> None:
    """KL = TCKD + (1 - p_y) NCKD, example by example."""
    target = kd.target_class_losses(model.logits, V, LABELS, temperature)
    others = kd.other_classes_losses(model.logits, V, LABELS, temperature)
    p = (V / temperature).softmax(1)[torch.arange(N), LABELS]
    whole = temperature**2 * reg.kl_divergence(V / temperature, model.logits / temperature)
    torch.testing.assert_close(target + (1 - p) * others, whole, rtol=1e-12, atol=1e-14)
    agree((target + (1 - p) * others).mean(), kd.soft_loss(model.logits, V, temperature), model)


def test_the_parts_are_their_definitions(model: Logits) -> None:
    q, p = model.logits.softmax(1), V.softmax(1)
    for i, y in enumerate(LABELS.tolist()):
        b_q, b_p = torch.stack([q[i, y], 1 - q[i, y]]), torch.stack([p[i, y], 1 - p[i, y]])
        target = (b_p * (b_p / b_q).log()).sum()
        rest = [k for k in range(K) if k != y]
        o_q, o_p = q[i, rest] / q[i, rest].sum(), p[i, rest] / p[i, rest].sum()
        others = (o_p * (o_p / o_q).log()).sum()
        assert kd.target_class_losses(model.logits, V, LABELS)[i].item() == pytest.approx(target.item(), rel=1e-10)
        assert kd.other_classes_losses(model.logits, V, LABELS)[i].item() == pytest.approx(others.item(), rel=1e-10)


def test_decoupled_weighs_them(model: Logits) -> None:
    found = kd.decoupled(model, None, LABELS, teacher=Says(V), temperature=2.0, alpha=0.7, beta=3.0)
    parts = [f(model.logits, V, LABELS, 2.0).mean() for f in (kd.target_class_losses, kd.other_classes_losses)]
    agree(found, F.cross_entropy(model.logits, LABELS) + 0.7 * parts[0] + 3 * parts[1], model)
    some = kd.decoupled(model, None, SOME, teacher=Says(V), temperature=2.0, alpha=0.7, beta=3.0)
    here = SOME >= 0
    there = kd.decoupled(Logits(model.logits.detach()[here]), None, SOME[here], teacher=Says(V[here]), temperature=2.0,
                         alpha=0.7, beta=3.0)  # fmt: skip
    assert some.item() == pytest.approx(there.item(), rel=1e-12)


def test_a_sure_teacher_loses_no_digits() -> None:
    """1 - p would be 0 here, and its logarithm infinite."""
    sure, student = torch.tensor([[60.0, 0.0, 1.0]]), torch.tensor([[50.0, 1.0, 0.0]], requires_grad=True)
    label = torch.tensor([0])
    others = kd.other_classes_losses(student, sure, label)
    expected = reg.kl_divergence(sure[:, 1:], student[:, 1:])
    assert others.item() == pytest.approx(expected.item(), rel=1e-6)
    loss = kd.target_class_losses(student, sure, label).sum()
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


# --- Standardised -----------------------------------------------------------------------------------------------------


def test_standardized_logits_have_one_size(model: Logits) -> None:
    found = kd.standardized_logits(V)
    torch.testing.assert_close(found.mean(1), torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.std(1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-6)
    for row, logits in zip(found.tolist(), V.tolist(), strict=True):
        middle = sum(logits) / K
        spread = math.sqrt(sum((a - middle) ** 2 for a in logits) / (K - 1))
        assert row == pytest.approx([(a - middle) / (spread + 1e-7) for a in logits], rel=1e-10)


def test_standardized_does_not_see_the_teachers_scale(model: Logits) -> None:
    settings: dict[str, Any] = {"temperature": 2.0, "mix": 0.8}
    found = kd.standardized(model, None, LABELS, teacher=Says(V), **settings)
    z, v = kd.standardized_logits(model.logits), kd.standardized_logits(V)
    agree(found, 0.2 * F.cross_entropy(model.logits, LABELS) + 0.8 * kd.soft_loss(z, v, 2.0), model)
    scale = torch.linspace(0.5, 3, N, dtype=torch.float64)[:, None]
    other = kd.standardized(model, None, LABELS, teacher=Says(scale * V + scale), **settings)
    agree(found, other, model, rel=1e-6)


# --- Examples without a label -----------------------------------------------------------------------------------------


def test_labelled_only_is_the_mean_over_those_with_a_label(model: Logits) -> None:
    agree(kd.labelled_only(model, torch.zeros(N, 2), SOME), F.cross_entropy(model.logits, SOME), model)
    agree(kd.labelled_only(model, torch.zeros(N, 2), SOFT), F.cross_entropy(model.logits, SOFT), model)
    smoothed = kd.labelled_only(model, (torch.zeros(N, 2),), SOME, objective=reg.label_smoothing)
    agree(smoothed, F.cross_entropy(model.logits, SOME, label_smoothing=0.1), model)
    agree(kd.labelled_only(model, torch.zeros(N, 2), NONE), 0 * model.logits.sum(), model)
    teaching = partial(kd.soft_targets, teacher=Says(V), objective=kd.labelled_only)
    assert teaching(model, torch.zeros(N, 2), NONE).isfinite()


# --- All of them ------------------------------------------------------------------------------------------------------

OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "soft": kd.soft_targets,
    "logits": kd.match_logits,
    "decoupled": kd.decoupled,
    "standardized": kd.standardized,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_teacher_wants_no_gradient_and_the_student_runs_once(name: str) -> None:
    x, y = images()
    student, wise = network("convnet"), teacher("resnet")
    passes: list[str] = []
    student.register_forward_hook(lambda *_: passes.append("student"))
    wise.register_forward_hook(lambda *_: passes.append("teacher"))
    within = partial(reg.confidence_penalty, objective=partial(kd.soft_targets, teacher=wise))
    OBJECTIVES[name](student, x, y, teacher=wise, objective=within).backward()
    assert sorted(passes) == ["student", "teacher"]
    assert all(p.grad is None for p in wise.parameters())
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_they_train(name: str, precision: Any) -> None:
    data = tiny(120)
    wise = kd.frozen(fresh(SMALL_CONVNET, Recipe(), seed=5))
    objective = partial(OBJECTIVES[name], teacher=wise, objective=reg.label_smoothing)
    recipe = Recipe(epochs=2, batch_size=15, objective=objective, precision=precision)
    losses = fit(fresh(SMALL_CONVNET, recipe, seed=0), data, recipe, seed=0)["train_loss"]
    assert losses[1] < losses[0]


def test_a_teacher_that_is_only_in_evaluation_gets_no_gradient_either() -> None:
    x, y = images()
    wise = network("convnet").eval()
    before = [b.clone() for b in wise.buffers()]
    kd.soft_targets(network(), x, y, teacher=wise).backward()
    assert all(p.grad is None for p in wise.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, wise.buffers(), strict=True))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_take_other_types(name: str, dtype: torch.dtype) -> None:
    exact = OBJECTIVES[name](Logits(3 * normal(N, K)), None, LABELS, teacher=Says(V)).item()
    found = OBJECTIVES[name](Logits((3 * normal(N, K)).to(dtype)), None, LABELS, teacher=Says(V.to(dtype)))
    assert found.item() == pytest.approx(exact, rel=1e-5 if dtype == torch.float32 else 0.05)


def test_a_divergence_in_bfloat16_is_computed_in_float32() -> None:
    z = normal(N, K).bfloat16()
    near = (z.float() + 0.05 * normal(N, K, seed=5)).bfloat16()
    found, exact = kd.soft_loss(z, near, 4.0), kd.soft_loss(z.double(), near.double(), 4.0)
    assert found.item() == pytest.approx(exact.item(), rel=1e-3)


def test_student_and_teacher_of_different_types(model: Logits) -> None:
    x, y = images()
    wise = teacher("mlp")
    exact = kd.soft_targets(network("convnet"), x, y, teacher=wise)
    found = kd.soft_targets(network("convnet").float(), x.float(), y, teacher=wise)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["soft", "logits", "standardized"])
def test_they_take_mixed_labels(name: str) -> None:
    x, y = preprocessing.mixup(*images(), torch.Generator().manual_seed(0), classes=4)
    OBJECTIVES[name](network("convnet"), x, y, teacher=teacher(), objective=reg.label_smoothing).backward()


def test_r_drop_around_soft_targets() -> None:
    """Both passes are taught, each by its own logits."""
    x, y = images()
    student, wise = reg.with_dropout(network("mlp"), 0.5), teacher("mlp")
    teaching = partial(kd.soft_targets, teacher=wise, mix=1.0)
    torch.manual_seed(3)
    found = reg.r_drop(student, x, y, alpha=0.0, objective=teaching)
    torch.manual_seed(3)
    first, second = student(x), student(x)
    expected = kd.soft_loss(first, wise(x), 4.0) + kd.soft_loss(second, wise(x), 4.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


BAD: list[tuple[Objective, dict[str, Any], str]] = [
    (kd.soft_targets, {"temperature": 0.0}, "temperature=0.0: must be a number above 0"),
    (kd.soft_targets, {"mix": 1.5}, "mix=1.5: must be a number from 0 to 1"),
    (kd.standardized, {"temperature": -1.0}, "temperature=-1.0: must be a number above 0"),
    (kd.standardized, {"mix": float("nan")}, "mix=nan: must be a number from 0 to 1"),
    (kd.match_logits, {"strength": -1}, "strength=-1: must be a number of at least 0"),
    (kd.decoupled, {"alpha": -1.0}, "alpha=-1.0: must be a number of at least 0"),
    (kd.decoupled, {"beta": "8"}, "beta='8': must be a number of at least 0"),
    (kd.decoupled, {"temperature": math.inf}, "temperature=inf: must be a number above 0"),
    (kd.soft_targets, {"teacher": Says(V[:, :4])}, f"teacher=Says gives logits [{N}, 4]: must be [{N}, {K}]"),
]


@pytest.mark.parametrize(("objective", "settings", "words"), BAD)
def test_bad_settings_are_named(model: Logits, objective: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        objective(model, None, LABELS, **{"teacher": Says(V), **settings})


def test_other_misuse_is_named(model: Logits) -> None:
    with pytest.raises(ValueError, match="mixed labels have no class of their own"):
        kd.decoupled(model, None, SOFT, teacher=Says(V))
    x, y = images()
    with pytest.raises(ValueError, match=r"teacher=ConvNet is in training mode: must be frozen\(teacher\)"):
        kd.soft_targets(network(), x, y, teacher=network("convnet"))
    with pytest.raises(ValueError, match="temperature=0: must be a number above 0"):
        kd.soft_loss(V, V, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OBJECTIVES)
def test_targets_on_the_gpu(name: str) -> None:
    for y in (LABELS, SOME):
        here = OBJECTIVES[name](Logits(3 * normal(N, K)), None, y, teacher=Says(V)).item()
        there = OBJECTIVES[name](Logits(3 * normal(N, K)).cuda(), None, y.cuda(), teacher=Says(V.cuda()))
        assert there.item() == pytest.approx(here, rel=1e-10)
