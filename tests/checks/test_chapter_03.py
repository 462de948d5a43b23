"""Checks of chapter 3: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from course_lib import optimizers, schedules
from course_lib.checks import chapter_03
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "03_learning_rate.ipynb"
BASE = chapter_03.BASE

factor, sharpness, noise_floor, rates, averaged_step = (
    getattr(chapter_03, f"exercise_{number}").right for number in (1, 2, 3, 5, 6)
)


def sgd(lr, momentum=0.9, **settings):
    return partial(torch.optim.SGD, lr=lr, momentum=momentum, **settings)


LINE, COSINE = schedules.schedule(schedules.polynomial), schedules.schedule(schedules.cosine)
ONE_CYCLE = schedules.schedule(schedules.one_cycle)


# Other right answers


def torch_factor(step, total, warmup, floor):
    """Torch's own schedulers, one after the other."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    way_down = CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=floor)
    if warmup > 1:
        rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
        scheduler = SequentialLR(optimizer, [rise, way_down], milestones=[warmup])
    else:
        scheduler, step = way_down, max(0, step - warmup)
    for _ in range(step):
        optimizer.step()
        scheduler.step()
    return optimizer.param_groups[0]["lr"]


def course_factor(step, total, warmup, floor):
    start = {"start_factor": 1 / warmup} if warmup else {}
    if step < warmup:
        return schedules.linear_between(start["start_factor"], 1.0, step / max(1, warmup - 1))
    return np.float64(schedules.cosine(step - warmup, total - warmup, floor=floor))


def by_course(product, start, steps):
    return schedules.power_iteration(product, start, steps)[0]


def by_numpy(product, start, steps):
    matrix = np.stack([product(row).numpy() for row in torch.eye(len(start), dtype=start.dtype)])
    # Normalised now and then, which is enough: the last v has length 1
    v = start.numpy() / np.linalg.norm(start.numpy())
    for step in range(steps):
        v = matrix @ v
        if step % 10 == 0:
            v = v / np.abs(v).max()
    v = v / np.linalg.norm(v)
    return v @ matrix @ v


def simulated_floor(h, variance, lr):
    """The recursion of E w^2, from nothing until it settles."""
    if (lr * h).max() >= 2:
        return float("inf")
    square = torch.zeros_like(h)
    for _ in range(5000):
        square = (1 - lr * h) ** 2 * square + lr**2 * variance
    return (h * square).sum() / 2


def floor_in_a_loop(h, variance, lr):
    loss = 0.0
    for curvature, noise in zip(h.tolist(), variance.tolist(), strict=True):
        if lr * curvature >= 2:
            return math.inf
        loss += 0.5 * curvature * lr * noise / (curvature * (2 - lr * curvature))
    return loss


def rates_of(t_max, epochs, steps, peak, inner=True, outer=False, before=True):
    """The loop of the exercise, mended or broken."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = CosineAnnealingLR(optimizer, t_max)
    seen = []
    for _ in range(epochs):
        for _ in range(steps):
            if before:
                seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if inner:
                scheduler.step()
            if not before:
                seen.append(optimizer.param_groups[0]["lr"])
        if outer:
            scheduler.step()
    return seen


def looped(t_max, **how):
    """The same with ``t_max(epochs, steps)``."""
    return lambda epochs, steps, peak: rates_of(t_max(epochs, steps), epochs, steps, peak, **how)


def whole(epochs, steps):
    return epochs * steps


def as_array(epochs, steps, peak):
    t = np.arange(epochs * steps)
    return peak / 2 * (1 + np.cos(np.pi * t / len(t)))


def by_lerp(x, z, gradient, t, lr, beta):
    z = z - lr * gradient(torch.lerp(z, x, beta))
    return [torch.lerp(x, z, 1 / t), z]


def course_step(x, z, gradient, t, lr, beta):
    direction = gradient(schedules.gradient_point(x, z, beta))
    x, z = x.clone(), z.clone()
    schedules.averaged_step(x, z, direction, lr=lr, c=1 / t)
    return x, z


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("03.1", torch_factor),
        ("03.1", course_factor),
        ("03.1", lambda *case: torch.tensor(factor(*case))),
        ("03.2", by_course),
        ("03.2", by_numpy),
        ("03.3", simulated_floor),
        ("03.3", floor_in_a_loop),
        ("03.5", looped(whole)),
        ("03.5", as_array),
        ("03.5", lambda *case: tuple(rates(*case))),
        ("03.6", by_lerp),
        ("03.6", course_step),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        (sgd(0.05), LINE),
        (sgd(0.05), COSINE),
        (sgd(0.04), ONE_CYCLE),
        (partial(optimizers.SGD, lr=0.3), LINE),  # without momentum
        (sgd(0.1), lambda optimizer, total: OneCycleLR(optimizer, 0.04, total_steps=total + 1)),
    ],
)
def test_a_good_peak_with_any_usual_way_down_is_enough(optimizer, schedule):
    found = check("03.7", replace(BASE, optimizer=optimizer, schedule=schedule))
    assert found.state == "passed", found


# Usual mistakes


def without_the_rest(step, total, warmup, floor):
    return (step + 1) / warmup if step < warmup else factor(step, total, 0, floor)


def normalised_in_place(product, start, steps):
    start /= start.norm()
    return sharpness(product, start, steps)


def in_place(x, z, gradient, t, lr, beta):
    z -= lr * gradient((1 - beta) * z + beta * x)
    x.lerp_(z, 1 / t)
    return x, z


def design(lr, momentum=0.9, schedule=None):
    return replace(BASE, optimizer=sgd(lr, momentum), schedule=schedule)


def growing(optimizer, total):
    return LambdaLR(optimizer, lambda step: step / total)


MISTAKES = [
    ("03.1", lambda *case: 2 * factor(*case), r"the factor at step 0 is not right: .* .on 12 steps, 4", "by hand"),
    ("03.1", lambda *case: [factor(*case)] * 2, r"at step 0 should have shape \[\], and has \[2\]", "by hand"),
    ("03.1", lambda step, total, warmup, floor: factor(step, total, max(1, warmup), floor) * (1 + (not warmup)),
     "the factor at step 0 is not right: .* without a warm-up", "by hand"),
    ("03.1", without_the_rest, "runs over all steps", "Which part of the way down"),
    ("03.1", lambda step, total, warmup, floor: (step + 1) / warmup, "the factor at step 4 is not right", "by hand"),
    ("03.2", normalised_in_place, "changes its argument start in place", "makes a new one"),
    ("03.2", lambda *case: 2 * sharpness(*case), "the sharpness is not right", "diagonal matrix"),
    ("03.2", lambda product, start, steps: product(start)[0], "the sharpness is not right", "diagonal"),
    ("03.2", lambda product, start, steps: product(start), "should have shape", "diagonal"),
    ("03.3", lambda h, variance, lr: noise_floor(h, variance, lr) / 5, "the expected loss is not right", "settled"),
    ("03.3", lambda h, variance, lr: min(99.0, noise_floor(h, variance, lr)),
     "past its stability limit, and your function returns 99 .on two directions, both", "without end"),
    ("03.3", lambda h, variance, lr: math.inf if lr * h[0] > 0.1 else 1.0,
     "returns infinity, and each direction is below", "does w shrink"),
    ("03.3", lambda h, variance, lr: noise_floor(h, variance, lr) if (lr * h != 2).all() else 0.0,
     "returns 0 .on two directions, the first on its limit", "without end"),
    ("03.3", lambda h, variance, lr: noise_floor(h[-1:], variance[-1:], lr), "not right", "settled"),
    ("03.3", lambda h, variance, lr: lr * variance / (2 * (2 - lr * h)), r"should have shape \[\], and has", "settled"),
    ("03.5", looped(whole, inner=False, outer=True), "by as little as a step should", "counts calls"),
    ("03.5", looped(lambda epochs, steps: epochs, inner=False, outer=True), "in stairs", "every step"),
    ("03.5", looped(lambda epochs, steps: epochs), "down and up again in waves", "counts calls"),
    ("03.5", looped(lambda epochs, steps: steps), "in one epoch, and up again in the next", "counts calls"),
    ("03.5", looped(whole, before=False), "noted after scheduler.step", "With which rate"),
    ("03.5", looped(lambda epochs, steps: epochs * steps - 1), "the last step has a rate of 0", "after the last step"),
    ("03.5", looped(whole, outer=True), "and once more at the end of each epoch", "Move the call"),
    ("03.5", looped(whole, inner=False), "does not fall at all", "Who calls"),
    ("03.5", lambda *case: rates(*case)[:-1],
     r"the list of rates should have shape \[12\], and has \[11\]", "Print"),
    ("03.5", lambda epochs, steps, peak: rates(epochs, steps, 1.0), "the list of rates is not right", "Print"),
    ("03.6", in_place, "changes its argument x in place|changes its argument z in place", "make new ones"),
    ("03.6", lambda x, z, *rest: (x, 2 * averaged_step(x, z, *rest)[1]), "the new z is not right", "who steps"),
    ("03.6", lambda x, z, *rest: (2 * x, averaged_step(x, z, *rest)[1]), "the new x is not right", "z is right"),
    ("03.6", lambda *case: (*averaged_step(*case), 0), r"2 values .x, z., and returns 3 values", "needs both"),
    ("03.7", 3, "expected a Recipe", "replace"),
    ("03.7", replace(BASE, epochs=8, batch_size=50), "changed epochs, batch_size", "Start from"),
    ("03.7", replace(BASE, ema=0.9), "and the schedule you changed ema", "Start from"),
    ("03.7", replace(BASE, optimizer=partial(AdamW, lr=0.003)), "should be SGD", "For instance"),
    ("03.7", replace(BASE, optimizer=torch.optim.SGD), "given by functools.partial", "For instance"),
    ("03.7", replace(BASE, optimizer=lambda named: torch.optim.SGD(named, lr=0.1)), "should be SGD", "partial"),
    ("03.7", replace(BASE, optimizer=partial(torch.optim.SGD, momentum=0.9)), "your SGD has no lr", "lr="),
    ("03.7", replace(BASE, optimizer=sgd(0.05, nesterov=True, dampening=0)), "sets dampening, nesterov", "free"),
    ("03.7", replace(BASE, schedule=0.1), "the schedule should be a function", "gamma=0.99"),
    ("03.7", replace(BASE, schedule=lambda optimizer, total: 1 / 0), "raised ZeroDivisionError", ""),
    ("03.7", replace(BASE, optimizer=sgd(-1.0)), "raised ValueError", ""),
    ("03.7", BASE, r"a mean accuracy of 0\.7[345]", "its speed, or its noise"),
    ("03.7", design(0.05, 0.8), r"a mean accuracy of 0\.7[456]", "its noise"),  # the best constant rate of 31
    ("03.7", design(0.005, 0.9, LINE), "a mean accuracy of 0.[56]", "its noise"),
    ("03.7", design(0.2, 0.9, COSINE), "a mean accuracy of 0.[1-6]", "its noise"),
    ("03.7", design(0.05, 0.9, growing), "a mean accuracy of 0.[67]", "its noise"),
    ("03.7", design(1e12, 0.9, LINE), "the run diverged", "at the start, or at the peak"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


def test_what_is_to_be_mended_hardly_falls():
    seen = rates_of(40, 4, 10, 0.1, inner=False, outer=True)
    assert len(seen) == 40
    assert min(seen) > 0.98 * max(seen)


def test_true_and_no_reason():
    """That Ben's loss ends highest is so, and is told apart from what shows that the drop came too early."""
    found = check("03.4", ("Ben", "a"))
    assert found.state == "not yet right"
    assert "that is true, and does not tell why" in found.message


@pytest.mark.parametrize("exercise", checking.asked(NOTEBOOK))
def test_the_printed_solutions_pass(exercise):
    names = {"math": math, "torch": torch, "partial": partial, "replace": replace, "base": BASE}
    names |= {"sched": schedules, "CosineAnnealingLR": CosineAnnealingLR}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names)
