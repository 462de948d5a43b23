"""How much of the teacher is in the student, counted by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import distillation as kd
from course_lib.lab.data import Dataset, Split
from tests.distillation.small import normal, tiny


class Known(nn.Module):
    """Gives to the n-th example of a split the n-th row of its logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Any) -> Tensor:
        return self.logits[: len(x)]


def naming(*classes: int) -> Known:
    return Known(torch.nn.functional.one_hot(torch.tensor(classes), 3).double())


#            both right, student alone, teacher alone, same mistake, other mistakes, both right
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
STUDENT, TEACHER = naming(0, 1, 0, 1, 0, 2), naming(0, 2, 2, 1, 2, 2)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tiny(10)


@pytest.fixture
def split(data: Dataset) -> Split:
    return Split(data.train.images[:6], LABELS, data.train.mean, data.train.std)


def test_answers_are_counted(split: Split) -> None:
    assert kd.agreement(STUDENT, TEACHER, split) == pytest.approx(3 / 6)
    assert kd.agreement_where_wrong(STUDENT, TEACHER, split) == pytest.approx(1 / 3)
    found = kd.answers(STUDENT, TEACHER, split)
    assert found == pytest.approx((2 / 6, 1 / 6, 1 / 6, 2 / 6, 1 / 6))
    assert isinstance(found, kd.Answers)
    assert sum(found[:4]) == pytest.approx(1)
    assert kd.agreement(TEACHER, TEACHER, split) == 1
    assert math.isnan(kd.agreement_where_wrong(STUDENT, naming(*LABELS.tolist()), split))


def test_divergence_is_the_teachers_from_the_student(split: Split) -> None:
    z, v = normal(6, 3), 2 * normal(6, 3, seed=1)
    q, p = (z / 2).softmax(1), (v / 2).softmax(1)
    expected = sum((p[i] * (p[i] / q[i]).log()).sum().item() for i in range(6)) / 6
    assert kd.divergence_from(Known(z), Known(v), split, temperature=2.0) == pytest.approx(expected, rel=1e-10)
    other = kd.divergence_from(Known(v), teacher=Known(z), split=split, temperature=2.0)
    assert abs(other / expected - 1) > 0.01
    assert kd.divergence_from(Known(z), Known(z), split) == 0


def test_bad_input_is_named(split: Split) -> None:
    for measure in (kd.agreement, kd.agreement_where_wrong, kd.divergence_from, kd.answers):
        with pytest.raises(ValueError, match=r"teacher=Known gives logits \[6, 2\]: must be \[6, 3\]"):
            measure(STUDENT, Known(normal(6, 2)), split)
        with pytest.raises(ValueError, match="split has no examples: must have at least one"):
            measure(STUDENT, TEACHER, split.subset(torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(ValueError, match="temperature=0: must be a number above 0"):
        kd.divergence_from(STUDENT, TEACHER, split, temperature=0)
