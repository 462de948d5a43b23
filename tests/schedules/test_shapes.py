"""Every shape against its namesake in torch, step by step and past the end; the others against the formula."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from course_lib.lab import training
from course_lib.lab.data import Dataset, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.schedules import shapes
from course_lib.schedules.shapes import cosine_between, linear_between, schedule

LR = (0.3, 0.02)
MOMENTUM = partial(SGD, momentum=0.9)


def optimizer(kind: Callable[..., Optimizer] = MOMENTUM) -> Optimizer:
    """Two groups with rates of their own."""
    return kind([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in LR], lr=1.0)


def rates(scheduler: Any, steps: int) -> list[tuple[float, ...]]:
    """The rates before each step."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(steps):
            found.append(tuple(group["lr"] for group in scheduler.optimizer.param_groups))
            scheduler.optimizer.step()
            scheduler.step()
    return found


def assert_same(ours: list[tuple[float, ...]], theirs: list[tuple[float, ...]], moved: bool = True) -> None:
    assert len(ours) == len(theirs)
    if moved:
        assert len(set(theirs)) > 1, "the reference stood still: the comparison says nothing"
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a == pytest.approx(b, rel=0, abs=1e-12), f"step {step}"


Case = tuple[shapes.Shape, dict[str, Any], int, Callable[[Optimizer], Any]]
T = torch_schedulers
TORCH_CASES: list[Case] = [
    (shapes.constant, {}, 9, lambda o: T.ConstantLR(o)),
    (shapes.constant, {"factor": 0.7, "steps": 1}, 4, lambda o: T.ConstantLR(o, 0.7, 1)),
    (shapes.constant, {"factor": 0.25, "steps": 0.5}, 11, lambda o: T.ConstantLR(o, 0.25, 6)),
    (shapes.step_decay, {"step_size": 3}, 11, lambda o: T.StepLR(o, 3)),
    (shapes.step_decay, {"step_size": 1, "gamma": 0.9}, 7, lambda o: T.StepLR(o, 1, 0.9)),
    (shapes.step_decay, {"step_size": 0.25, "gamma": 0.5}, 16, lambda o: T.StepLR(o, 4, 0.5)),
    (shapes.multi_step, {"milestones": (2, 5, 5)}, 9, lambda o: T.MultiStepLR(o, [2, 5, 5])),
    (shapes.multi_step, {"milestones": (7, 3), "gamma": 0.5}, 13, lambda o: T.MultiStepLR(o, [7, 3], 0.5)),
    (shapes.multi_step, {"milestones": (0.5, 0.75)}, 20, lambda o: T.MultiStepLR(o, [10, 15])),
    (shapes.exponential, {"gamma": 0.97}, 40, lambda o: T.ExponentialLR(o, 0.97)),
    (shapes.exponential, {"gamma": 1.05}, 10, lambda o: T.ExponentialLR(o, 1.05)),
    (shapes.polynomial, {}, 7, lambda o: T.PolynomialLR(o, 7)),
    (shapes.polynomial, {"power": 2.5}, 13, lambda o: T.PolynomialLR(o, 13, 2.5)),
    (shapes.polynomial, {"power": 0.5}, 1, lambda o: T.PolynomialLR(o, 1, 0.5)),
    (shapes.linear, {}, 7, lambda o: T.LinearLR(o, total_iters=7)),
    (shapes.linear, {"start_factor": 1.0, "end_factor": 0.0}, 12, lambda o: T.LinearLR(o, 1.0, 0.0, 12)),
    (shapes.linear, {"start_factor": 0.1, "end_factor": 0.6}, 1, lambda o: T.LinearLR(o, 0.1, 0.6, 1)),
    (shapes.cosine, {}, 10, lambda o: T.CosineAnnealingLR(o, 10)),
    (shapes.cosine, {}, 7, lambda o: T.CosineAnnealingLR(o, 7)),
    (shapes.cosine, {}, 1, lambda o: T.CosineAnnealingLR(o, 1)),
    (shapes.cosine_restarts, {"first": 4}, 20, lambda o: T.CosineAnnealingWarmRestarts(o, 4)),
    (shapes.cosine_restarts, {"first": 3, "longer": 2}, 40, lambda o: T.CosineAnnealingWarmRestarts(o, 3, 2)),
    (shapes.cosine_restarts, {"first": 1, "longer": 3}, 30, lambda o: T.CosineAnnealingWarmRestarts(o, 1, 3)),
    (shapes.cosine_restarts, {"first": 0.1}, 50, lambda o: T.CosineAnnealingWarmRestarts(o, 5)),
]


@pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}-{case[2]}")
def test_equal_to_the_namesake_in_torch_and_past_the_end(case: Case) -> None:
    shape, settings, total, reference = case
    steps = 2 * total + 5
    ours = rates(schedule(shape, **settings)(optimizer(), total), steps)
    assert_same(ours, rates(reference(optimizer()), steps))


@pytest.mark.parametrize(("total", "floor"), [(10, 0.2), (7, 0.05), (1, 0.5)])
def test_the_floor_is_torchs_eta_min_over_the_rate(total: int, floor: float) -> None:
    """Torch's ``eta_min`` is one number for all groups, the floor a part of each: one group at a time."""
    for lr in LR:
        o = [SGD([nn.Parameter(torch.ones(1))], lr=lr) for _ in range(4)]
        steps = 2 * total + 3
        ours = rates(schedule(shapes.cosine, floor=floor)(o[0], total), steps)
        assert_same(ours, rates(T.CosineAnnealingLR(o[1], total, eta_min=floor * lr), steps))
        ours = rates(schedule(shapes.cosine_restarts, first=3, longer=2, floor=floor)(o[2], total), 30)
        assert_same(ours, rates(T.CosineAnnealingWarmRestarts(o[3], 3, 2, eta_min=floor * lr), 30))


@pytest.mark.parametrize(("up", "down"), [(4, None), (3, 5), (1, 1), (7, 2)])
@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_cycles_are_those_of_torch_and_leave_the_momentum_alone(mode: str, up: int, down: int | None) -> None:
    low = 0.05
    gamma = {"gamma": 0.96} if mode == "exp_range" else {}
    a, b = optimizer(), optimizer()
    made = schedule(getattr(shapes, mode), step_size_up=up, step_size_down=down, low=low, **gamma)(a, 50)
    settings = {"step_size_up": up, "step_size_down": down, "mode": mode, **gamma}
    reference = T.CyclicLR(b, [low * lr for lr in LR], list(LR), cycle_momentum=False, **settings)
    assert_same(rates(made, 60), rates(reference, 60))
    assert [group["momentum"] for group in a.param_groups] == [0.9, 0.9]


ONE_CYCLE = [
    {},
    {"pct_start": 0.45, "div_factor": 10.0, "final_div_factor": 100.0},
    {"pct_start": 0.1, "final_div_factor": 1.0},
    {"pct_start": 1 / 3, "div_factor": 2.0},
]


@pytest.mark.parametrize("settings", ONE_CYCLE)
@pytest.mark.parametrize("total", [1, 2, 5, 13, 40])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("kind", [partial(SGD, momentum=0.5), Adam])
def test_one_cycle_is_that_of_torch_with_its_momentum(
    settings: dict[str, Any], total: int, anneal: str, three_phase: bool, kind: Callable[..., Optimizer]
) -> None:
    between = cosine_between if anneal == "cos" else linear_between
    shape = shapes.one_cycle_three_phase if three_phase else shapes.one_cycle
    a, b = optimizer(kind), optimizer(kind)
    kept = {} if three_phase else {"pct_start": settings.get("pct_start", 0.3)}
    momentum = None if three_phase else partial(shapes.one_cycle_momentum, between=between, **kept)
    made = schedule(shape, momentum=momentum, between=between, **settings)(a, total)
    reference = T.OneCycleLR(
        b, list(LR), total, three_phase=three_phase, anneal_strategy=anneal, cycle_momentum=not three_phase, **settings
    )

    def momenta(o: Optimizer) -> list[Any]:
        return [group.get("betas", (group.get("momentum"),))[0] for group in o.param_groups]

    for step in range(total + 1):  # torch itself takes one step more than it has
        for mine, theirs in zip(a.param_groups, b.param_groups, strict=True):
            assert mine["lr"] == pytest.approx(theirs["lr"], rel=0, abs=1e-12), step
        assert momenta(a) == pytest.approx(momenta(b), rel=0, abs=1e-12), step
        if step < total:
            for scheduler in (made, reference):
                scheduler.optimizer.step()
                scheduler.step()
    with pytest.raises(ValueError, match="total"):
        reference.step()
    made.step()  # ours stays where it is


@pytest.mark.parametrize("warmup", [1, 4, 7])
def test_warm_up_in_front_of_any_shape_is_torchs_sequence(warmup: int) -> None:
    total, start = 20, 0.2
    left = total - warmup
    cases: list[tuple[shapes.Shape, dict[str, Any], Callable[[Optimizer], Any]]] = [
        (shapes.cosine, {}, lambda o: T.CosineAnnealingLR(o, left)),
        (shapes.step_decay, {"step_size": 3}, lambda o: T.StepLR(o, 3)),
        (shapes.polynomial, {"power": 2.0}, lambda o: T.PolynomialLR(o, left, 2.0)),
        (shapes.flat, {}, lambda o: T.ConstantLR(o, 1.0, 1)),
    ]
    for shape, settings, second in cases:
        a, b = optimizer(), optimizer()
        made = schedule(shapes.warm_up, warmup=warmup, then=shape, start_factor=start, **settings)(a, total)
        parts = [T.LinearLR(b, start, 1.0, warmup), second(b)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = T.SequentialLR(b, parts, [warmup])
        assert_same(rates(made, total + 4), rates(reference, total + 4))


def test_inverse_square_root_is_the_formula_of_the_paper() -> None:
    warmup, width = 40, 512
    peak = (width * warmup) ** -0.5
    for step in (0, 1, 17, 38, 39, 40, 41, 1000, 99_999):
        s = step + 1
        expected = width**-0.5 * min(s**-0.5, s * warmup**-1.5)
        assert peak * shapes.inverse_square_root(step, 10, warmup=warmup) == pytest.approx(expected, rel=1e-14)
    assert shapes.inverse_square_root(39, 1000, warmup=warmup) == 1.0
    assert shapes.inverse_square_root(39, 400, warmup=0.1) == 1.0


@pytest.mark.parametrize("curve", ["linear", "1-sqrt"])
@pytest.mark.parametrize(("warmup", "stable", "decay"), [(5, 9, 6), (0, 4, 11), (3, 0, 1), (1, 1, 1)])
def test_warm_up_stable_decay_is_that_of_pytorch_optimizer(curve: str, warmup: int, stable: int, decay: int) -> None:
    total = warmup + stable + decay
    down = shapes.linear_decay if curve == "linear" else shapes.one_minus_sqrt
    settings = {"warmup": warmup, "decay": decay, "curve": down, "start_factor": 0.0}
    made = schedule(shapes.warm_up_stable_decay, **settings)(optimizer(), total)
    reference = pytorch_optimizer.get_wsd_schedule(optimizer(), warmup, stable, decay, cooldown_type=curve)
    assert_same(rates(made, total + 5), rates(reference, total + 5))


def test_stable_decay_ends_at_its_floor_and_a_longer_run_begins_in_the_same_way() -> None:
    floor = 0.1
    for step in range(101):
        part = max(0.0, (step - 80) / 20)
        root = shapes.stable_decay(step, 100, decay=0.2, curve=shapes.one_minus_sqrt, floor=floor)
        assert root == pytest.approx(1 - (1 - floor) * math.sqrt(part), abs=1e-14)
    assert shapes.stable_decay(500, 100, floor=floor) == pytest.approx(floor)
    short = shapes.factors(shapes.warm_up_stable_decay, 100, warmup=10, decay=20)
    long = shapes.factors(shapes.warm_up_stable_decay, 200, warmup=10, decay=20)
    assert short[:81] == long[:81]
    assert short[81] < 1 == long[81]


# --- In a recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=200)


def warmed(total: float = 0.25) -> shapes.Schedule:
    momentum = partial(shapes.one_cycle_momentum, base_momentum=0.8)
    return schedule(shapes.warm_up, momentum=momentum, warmup=total, then=shapes.cosine, floor=0.1)


def test_fit_takes_the_rates_of_the_shape_and_a_run_that_was_killed_goes_on(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(epochs=2, batch_size=50, schedule=warmed(), precision="float64")
    model = fresh(partial(mlp, (1, 8, 8), 10, width=8), recipe, seed=0)
    history = fit(model, digits, recipe, seed=0)
    total = 8
    expected = [0.05 * shapes.warm_up(t, total, warmup=0.25, then=shapes.cosine, floor=0.1) for t in range(total)]
    assert [rate for (rate,) in history.rates] == pytest.approx(expected, rel=1e-14)

    calls = []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    again = fresh(partial(mlp, (1, 8, 8), 10, width=8), recipe, seed=0)
    monkeypatch.setattr(training, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(again, digits, recipe, seed=0, checkpoint=tmp_path / "run.pt")
    monkeypatch.undo()
    again = fresh(partial(mlp, (1, 8, 8), 10, width=8), recipe, seed=0)
    resumed = fit(again, digits, recipe, seed=0, checkpoint=tmp_path / "run.pt")
    assert len(calls) == 2
    assert resumed.rates == history.rates
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_schedule_is_picked_up_from_its_state(tmp_path: Path) -> None:
    a, b = optimizer(), optimizer()
    first, second = warmed()(a, 12), warmed()(b, 12)
    rates(first, 5)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    b.load_state_dict(a.state_dict())
    assert rates(first, 6) == rates(second, 6)
    assert a.param_groups[0]["momentum"] == b.param_groups[0]["momentum"] != 0.9


def test_a_schedule_can_be_pickled_and_told_from_others() -> None:
    again = pickle.loads(pickle.dumps(warmed()))
    assert rates(again(optimizer(), 9), 9) == rates(warmed()(optimizer(), 9), 9)
    assert fingerprint(again) == fingerprint(warmed())
    others = [warmed(0.3), schedule(shapes.cosine), schedule(shapes.cosine, floor=0.1), schedule(shapes.flat)]
    assert len({fingerprint(one) for one in [warmed(), *others]}) == 5


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("factor=1.5: must be a number from 0 to 1", lambda: shapes.constant(0, 5, factor=1.5)),
    ("steps=-1: must be a whole number", lambda: shapes.constant(0, 5, steps=-1)),
    ("steps=1.5: must be a whole number", lambda: shapes.constant(0, 5, steps=1.5)),
    ("step=-1: must be a whole number of at least 0", lambda: shapes.cosine(-1, 5)),
    ("total=0: must be a whole number of at least 1", lambda: shapes.cosine(0, 0)),
    ("gamma=0: must be a number above 0", lambda: shapes.exponential(0, 5, gamma=0)),
    ("power=nan: must be a number above 0", lambda: shapes.polynomial(0, 5, power=math.nan)),
    ("floor=-0.1: must be a number from 0 to 1", lambda: shapes.cosine(0, 5, floor=-0.1)),
    ("longer=1.5: must be a whole number", lambda: shapes.cosine_restarts(0, 5, first=2, longer=1.5)),  # type: ignore[arg-type]
    ("low=2: must be a number from 0 to 1", lambda: shapes.triangular(0, 5, step_size_up=2, low=2)),
    ("pct_start=2: must be a number from 0 to 1", lambda: shapes.one_cycle(0, 5, pct_start=2)),
    ("div_factor=0: must be a number above 0", lambda: shapes.one_cycle(0, 5, div_factor=0)),
    ("decay=9: must be at most total=5", lambda: shapes.stable_decay(0, 5, decay=9)),
    ("settings={'flor': 0.1}: must fit cosine", lambda: schedule(shapes.cosine, flor=0.1)),
    ("settings={}: must fit exponential", lambda: schedule(shapes.exponential)),
    (
        "must have 'momentum' or 'betas'",
        lambda: schedule(shapes.flat, momentum=shapes.one_cycle_momentum)(optimizer(torch.optim.Adagrad), 5),
    ),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings_are_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
