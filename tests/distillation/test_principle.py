"""Gradients against autograd, variances against all labels there are and against draws, dark knowledge by loops."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib import distillation as kd
from course_lib.lab.data import Dataset
from course_lib.lab.training import logits_of
from tests.distillation.small import LABELS, SMALL_CONVNET, K, N, generator, normal, tiny

Z, V = 3 * normal(N, K), 3 * normal(N, K, seed=1)
LOSSES, P = -normal(4, 3).log_softmax(1), normal(4, 3, seed=1).softmax(1)


# --- The gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_gradient_is_autograds(temperature: float) -> None:
    z = Z.clone().requires_grad_()
    kd.soft_loss(z, V, temperature).backward()
    assert z.grad is not None
    torch.testing.assert_close(kd.soft_gradient(Z, V, temperature), z.grad, rtol=1e-11, atol=1e-15)


def test_hot_gradient_is_autograds_of_centred_logits() -> None:
    z = Z.clone().requires_grad_()
    (kd.logit_loss(kd.centred(z), kd.centred(V)) / K).backward()
    assert z.grad is not None
    torch.testing.assert_close(kd.hot_gradient(Z, V), z.grad)
    torch.testing.assert_close(kd.soft_gradient(Z, V, 1e6), kd.hot_gradient(Z, V), rtol=1e-4, atol=1e-8)


def test_the_distance_to_the_limit_falls_as_the_temperature_rises() -> None:
    far = [kd.distance_to_limit(Z, V, temperature) for temperature in (50.0, 100.0, 200.0)]
    assert far[0] / far[1] == pytest.approx(2, rel=0.05)
    assert far[1] / far[2] == pytest.approx(2, rel=0.05)
    apart = kd.soft_gradient(Z, V, 50.0) - kd.hot_gradient(Z, V)
    assert far[0] == pytest.approx(apart.norm().item() / kd.hot_gradient(Z, V).norm().item(), rel=1e-10)
    assert kd.distance_to_limit(Z.float(), V.float(), 50.0) == pytest.approx(far[0], rel=1e-4)


# --- What is in them --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tiny(15)


def test_dark_knowledge_is_the_mean_soft_label(data: Dataset) -> None:
    torch.manual_seed(2)
    wise = SMALL_CONVNET()
    with torch.no_grad():
        wise.head.weight.mul_(10)
    found = kd.dark_knowledge(wise, data.train, 2.0)
    p = (logits_of(wise, data.train).double() / 2).softmax(1)
    for c in range(10):
        of_class = p[data.train.labels == c]
        assert found.sure[c].item() == pytest.approx(of_class[:, c].mean().item(), rel=1e-10)
        for k in {*range(10)} - {c}:
            assert found.others[c, k].item() == pytest.approx(of_class[:, k].mean().item(), rel=1e-10)
    assert found.others.diagonal().abs().max() == 0
    torch.testing.assert_close(found.sure + found.others.sum(1), torch.ones(10, dtype=torch.float64))
    none = kd.dark_knowledge(wise, data.train.subset(data.train.labels != 3))
    assert none.sure.isnan().tolist() == [c == 3 for c in range(10)]


def test_gradient_weights_are_the_labels_part_of_the_gradient() -> None:
    """Where the student does not know the label at all."""
    z = torch.where(F.one_hot(LABELS, K).bool(), -40.0, Z)
    rows = torch.arange(N)
    soft, hard = kd.soft_gradient(z, V)[rows, LABELS], (z.softmax(1) - F.one_hot(LABELS, K))[rows, LABELS] / N
    ratio = soft / hard
    torch.testing.assert_close(kd.gradient_weights(V, LABELS), ratio / ratio.mean(), rtol=1e-9, atol=0)


# --- Noise ------------------------------------------------------------------------------------------------------------


def every_labelling() -> tuple[list[float], list[float]]:
    """Risk and probability of each of the 3^4 sets of labels."""
    risks, chances = [], []
    for labels in itertools.product(range(3), repeat=4):
        risks.append(sum(LOSSES[i, k].item() for i, k in enumerate(labels)) / 4)
        chances.append(math.prod(P[i, k].item() for i, k in enumerate(labels)))
    return risks, chances


def test_the_variance_is_that_over_all_labels() -> None:
    risks, chances = every_labelling()
    mean = sum(r * c for r, c in zip(risks, chances, strict=True))
    variance = sum(c * (r - mean) ** 2 for r, c in zip(risks, chances, strict=True))
    assert sum(chances) == pytest.approx(1)
    assert kd.risk(LOSSES, P) == pytest.approx(mean, rel=1e-12)
    assert kd.risk_variance(LOSSES, P) == pytest.approx(variance, rel=1e-10)
    labels = torch.tensor([0, 2, 1, 1])
    assert kd.risk_variance(LOSSES, F.one_hot(labels, 3).double()) == 0
    assert kd.risk(LOSSES, F.one_hot(labels, 3).double()) == pytest.approx(LOSSES[range(4), labels].mean().item())


def test_drawn_labels_have_this_mean_and_this_variance() -> None:
    risks = kd.sampled_risks(LOSSES, P, 20_000, generator())
    variance = kd.risk_variance(LOSSES, P)
    assert risks.mean().item() == pytest.approx(kd.risk(LOSSES, P), abs=4 * math.sqrt(variance / 20_000))
    assert risks.var().item() == pytest.approx(variance, rel=0.05)
    assert torch.equal(risks, kd.sampled_risks(LOSSES, P, 20_000, generator()))


def test_a_teacher_that_is_off_is_biased_within_its_bound() -> None:
    knowing = kd.teacher_risk(LOSSES, P, P)
    assert (knowing.teacher, knowing.bias, knowing.bound) == (0, 0, 0)
    assert knowing.one_hot == kd.risk_variance(LOSSES, P)
    off = normal(4, 3, seed=5).softmax(1)
    found = kd.teacher_risk(LOSSES, P, off)
    assert found.bias == pytest.approx(((off - P) * LOSSES).sum().item() / 4, rel=1e-10)
    assert found.teacher == pytest.approx(found.bias**2)
    assert 0 < abs(found.bias) <= found.bound
    many = kd.teacher_risk(LOSSES.repeat(100, 1), P.repeat(100, 1), off.repeat(100, 1))
    assert many.one_hot == pytest.approx(found.one_hot / 100)
    assert many.bias == pytest.approx(found.bias)


ROW = torch.tensor([[0.5, 0.6]])
BAD: list[tuple[Any, tuple[Any, ...], str]] = [
    (kd.soft_gradient, (Z, V, 0.0), "temperature=0.0: must be a number above 0"),
    (kd.soft_gradient, (Z, V[:, :4]), f"teacher_logits are [{N}, 4]: must be [{N}, {K}]"),
    (kd.hot_gradient, (Z, LABELS), "teacher_logits is torch.int64"),
    (kd.distance_to_limit, (Z, Z + 1, 2.0), "student_logits equal teacher_logits but for a constant"),
    (kd.dark_knowledge, (None, None, -1.0), "temperature=-1.0: must be a number above 0"),
    (kd.gradient_weights, (V, LABELS[:3]), f"labels are torch.int64 [3]: must be int64 [{N}]"),
    (kd.risk, (LOSSES, P[:2]), "targets are [2, 3]: must be [4, 3]"),
    (kd.risk, (ROW, ROW), "targets have rows that miss a sum of 1 by 0.1"),
    (kd.risk_variance, (LOSSES, P - 1), "must be probabilities"),
    (kd.sampled_risks, (LOSSES, P, 0, generator()), "draws=0: must be a whole number of at least 1"),
    (kd.teacher_risk, (LOSSES, P, 2 * P), "must be probabilities"),
]


@pytest.mark.parametrize(("function", "arguments", "words"), BAD)
def test_bad_input_is_named(function: Any, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        function(*arguments)


@pytest.mark.gpu
def test_the_principle_on_the_gpu() -> None:
    def both(t: Tensor) -> tuple[Tensor, Tensor]:
        return t, t.cuda()

    (z, z_there), (v, v_there) = both(Z), both(V)
    torch.testing.assert_close(kd.soft_gradient(z_there, v_there, 2.0).cpu(), kd.soft_gradient(z, v, 2.0))
    assert kd.risk_variance(LOSSES.cuda(), P.cuda()) == pytest.approx(kd.risk_variance(LOSSES, P), rel=1e-10)
