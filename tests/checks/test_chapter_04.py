"""Checks of chapter 4: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import optimize
from torch.optim import AdamW

from course_lib import batching, optimizers, schedules
from course_lib.checks import chapter_04
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "04_batch_size.ipynb"
BASE = chapter_04.BASE

accumulated, noise_scale, critical, estimate, ghost_norm = (
    getattr(chapter_04, f"exercise_{number}").right for number in (1, 2, 3, 5, 6)
)


def sgd(lr, momentum=0.9, **settings):
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, **settings)


LINE = schedules.schedule(schedules.polynomial)
WARM_UP = schedules.schedule(schedules.warm_up, warmup=10)
STABLE = schedules.schedule(schedules.warm_up_stable_decay, warmup=0.1, decay=0.2)


# Other right answers


def in_a_loop(gradient, x, y, parts):
    total = 0
    for part_x, part_y in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
        total += len(part_x) * gradient(part_x, part_y)
    return total / len(x)


def one_at_a_time(gradient, x, y, parts):
    return torch.stack([gradient(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]).mean(0)


def running_mean(gradient, x, y, parts):
    """A mean that is kept up to date, in an array."""
    mean, seen = np.zeros(x.shape[1]), 0
    for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        seen += len(part_x)
        mean = mean + (gradient(part_x, part_y).numpy() - mean) * len(part_x) / seen
    return mean


def by_course(small_sq, big_sq, small, big):
    """Both estimates are linear in what was measured: the mean of them is the estimate of the means."""
    means = (float(measured.mean()) for measured in (small_sq, big_sq))
    return batching.noise_scale_from_two_sizes(*means, small, big).noise_scale


def by_equations(small_sq, big_sq, small, big):
    """The two unknowns of |G_B|^2 = |G|^2 + trace / B, solved for."""
    left = np.array([[1.0, 1 / small], [1.0, 1 / big]])
    gradient_sq, trace = np.linalg.solve(left, [small_sq.numpy().mean(), big_sq.numpy().mean()])
    return trace / gradient_sq


def by_polyfit(sizes, steps):
    e_min, s_min = np.polyfit(1 / sizes.numpy(), steps.numpy(), 1, w=1 / steps.numpy())
    return s_min, e_min, e_min / s_min


def by_search(sizes, steps):
    def law(b, s_min, b_crit):
        return s_min * (1 + b_crit / b)

    sizes, steps = sizes.numpy(), steps.numpy()
    (s_min, b_crit), _ = optimize.curve_fit(law, sizes, steps, p0=(steps.min(), 100.0), sigma=steps, xtol=1e-12)
    return [s_min, s_min * b_crit, b_crit]


def drawn_in_a_loop(values, p, drawn):
    total = 0.0
    for i in drawn.tolist():
        total += values[i] / (len(values) * p[i])
    return total / len(drawn)


def by_torch(x, size, eps):
    return torch.cat([F.batch_norm(part, None, None, training=True, eps=eps) for part in x.split(size)])


def by_numpy(x, size, eps):
    result = np.empty(x.shape)
    for start in range(0, len(x), size):
        for channel in range(x.shape[1]):
            group = x[start : start + size, channel].numpy()
            result[start : start + size, channel] = (group - group.mean()) / np.sqrt(group.var() + eps)
    return result


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("04.1", in_a_loop),
        ("04.1", one_at_a_time),
        ("04.1", running_mean),
        ("04.2", by_course),
        ("04.2", by_equations),
        ("04.2", lambda *case: torch.tensor(noise_scale(*case))),
        ("04.3", by_polyfit),
        ("04.3", by_search),
        ("04.3", lambda *case: list(map(torch.tensor, critical(*case)))),
        ("04.5", drawn_in_a_loop),
        ("04.5", lambda values, p, drawn: (values / p)[drawn].mean() / len(values)),
        ("04.6", by_torch),
        ("04.6", by_numpy),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


def expected(rule, values, p, draws):
    """The expectation of ``rule`` over all that can be drawn."""
    total = 0.0
    for drawn in itertools.product(range(len(p)), repeat=draws):
        drawn = torch.tensor(drawn)
        total += p[drawn].prod().item() * rule(values, p, drawn)
    return total


def test_what_is_right_is_right_in_the_mean_and_what_is_called_biased_is_not():
    values = torch.tensor([1.0, -2.0, 9.0], dtype=torch.float64)
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    assert expected(estimate, values, p, 3) == pytest.approx(8 / 3, rel=1e-12)
    assert abs(expected(chapter_04._by_own_weights, values, p, 3) - 8 / 3) > 1


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        (sgd(0.16), None),
        (sgd(0.02 * math.sqrt(30)), None),  # the square root rule
        (partial(optimizers.SGD, lr=0.2, momentum=0.9), LINE),
        (sgd(0.16), STABLE),
    ],
)
def test_a_good_rate_is_enough_with_a_schedule_and_without(optimizer, schedule):
    found = check("04.7", replace(BASE, optimizer=optimizer, schedule=schedule))
    assert found.state == "passed", found


# Usual mistakes


def whole_batch(gradient, x, y, parts):
    return gradient(x, y)


def in_halves(gradient, x, y, parts):
    return in_a_loop(gradient, x, y, min(2, parts))


def whole_targets(gradient, x, y, parts):
    return sum(gradient(part, y) for part in x.tensor_split(parts))


def centred_in_place(x, size, eps):
    for group in x.split(size):
        group -= group.mean((0, 2, 3), keepdim=True)
    return ghost_norm(x, size, eps)


def fitted_by_course(sizes, steps):
    found = batching.fit_critical({int(b): [float(s)] for b, s in zip(sizes, steps, strict=True)})
    return found.s_min, found.e_min, found.b_crit


def design(lr, momentum=0.9, schedule=None):
    return replace(BASE, optimizer=sgd(lr, momentum), schedule=schedule)


MISTAKES = [
    ("04.1", whole_batch, r"handed 10 examples at once .the whole batch., and the largest of 4 parts has 3 .on 10",
     "fit into the memory"),
    ("04.1", in_halves, "handed 5 examples at once, and the largest of 4 parts has 3", "fit into the memory"),
    ("04.1", lambda *case: (whole_batch(*case), accumulated(*case))[1], "handed 10 examples at once", "memory"),
    ("04.1", whole_targets, "raised ValueError: gradient was handed 3 examples and 10 targets", ""),
    ("04.1", lambda *case: 2 * accumulated(*case), "the gradient is not right", "three numbers"),
    ("04.1", lambda gradient, x, y, parts: accumulated(gradient, x, y, parts).sum(), r"should have shape \[3\]",
     "three numbers"),
    ("04.2", lambda *case: 2 * noise_scale(*case), "the noise scale is not right", "without chance"),
    ("04.2", lambda small_sq, big_sq, small, big: noise_scale(big_sq, small_sq, small, big),
     "small and big are exchanged, or the two norms are", "Which of the two squared norms"),
    ("04.2", lambda *case: math.nan, "is not finite", "without chance"),
    ("04.3", fitted_by_course, "fitted to log S", "S_i in the denominator"),
    ("04.3", lambda *case: [2 * value for value in critical(*case)], "s_min is not right", "by the law"),
    ("04.3", lambda *case: (*critical(*case)[:2], 7.0), "b_crit is not right", "by the law"),
    ("04.3", lambda *case: critical(*case)[:1], "3 values .s_min, e_min, b_crit., and returns 1 values", "by the law"),
    ("04.5", lambda *case: 2 * estimate(*case), "the estimate is not right", "two examples"),
    ("04.5", lambda values, p, drawn: values[drawn] / (len(values) * p[drawn]), r"should have shape \[\]", "two"),
    ("04.5", lambda values, p, drawn: (values[drawn] / (len(values) * p[: len(drawn)])).mean(),
     "those of the first examples", "Where is p looked up"),
    ("04.6", centred_in_place, "changes its argument x in place", "torch.cat|view"),
    ("04.6", lambda *case: 2 * ghost_norm(*case), "the batch is not right", "whole batch it is batch norm"),
    ("04.6", lambda x, size, eps: torch.stack(x[:8].split(4)), "should have shape", "batch norm"),
    ("04.7", 3, "expected a Recipe", "replace"),
    ("04.7", replace(BASE, epochs=30, batch_size=200), "you changed epochs, batch_size", "Start from"),
    ("04.7", replace(BASE, accumulate=30), "and the schedule you changed accumulate", "Start from"),
    ("04.7", replace(BASE, optimizer=partial(AdamW, lr=0.003)), "should be SGD", "For instance"),
    ("04.7", replace(BASE, optimizer=partial(batching.LARS, lr=0.1)), "should be SGD", "For instance"),
    ("04.7", replace(BASE, optimizer=partial(torch.optim.SGD, momentum=0.9)), "your SGD has no lr", "lr="),
    ("04.7", replace(BASE, optimizer=sgd(0.05, weight_decay=0.1)), "sets weight_decay", "free"),
    ("04.7", replace(BASE, schedule=0.1), "the schedule should be a function", "gamma=0.99"),
    ("04.7", replace(BASE, schedule=lambda optimizer, total: 1 / 0), "raised ZeroDivisionError", ""),
    ("04.7", BASE, r"a mean accuracy of 0\.(79|80|81)", "still fall"),
    ("04.7", design(0.04), r"a mean accuracy of 0\.8[234]", "still fall"),
    ("04.7", design(0.6), r"a mean accuracy of 0\.[1-5]", "still fall"),  # the linear rule
    ("04.7", design(0.6, schedule=WARM_UP), r"a mean accuracy of 0\.[1-5]", "still fall"),
    ("04.7", design(1e12), "the run diverged", "curvature"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


def test_what_is_to_be_mended_favours_what_is_drawn_often():
    found = check("04.5", lambda values, p, drawn: values[drawn].mean())
    assert "as it stood there" in found.message


def test_the_right_name_for_another_reason():
    """That Ben's batch is among the smallest is so, and is told apart from what shows that he gains."""
    found = check("04.4", ("ben", "d"))
    assert found.state == "not yet right"
    assert "another of the four uses the same batch" in found.message


@pytest.mark.parametrize("exercise", checking.asked(NOTEBOOK))
def test_the_printed_solutions_pass(exercise):
    names = {"math": math, "torch": torch, "partial": partial, "replace": replace, "base": BASE}
    names |= {"sched": schedules, "batching": batching}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names)
