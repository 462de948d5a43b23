"""Adaptive rates against pytorch-optimizer over 100 steps, the formula on flat vectors, and derivatives by autograd."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab import training
from course_lib.lab.data import Dataset, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.schedules.adaptive import SGDHD, AdamHD, Prodigy, ScheduleFreeAdamW, ScheduleFreeSGD, hypergradient

STEPS = 100
RECIPE = Recipe(epochs=2, batch_size=50, precision="float64")


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Prodigy of pytorch-optimizer adds up its estimate in the default type."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=200)


class Net(nn.Module):
    """Two layers, a scalar gain that takes part in some steps only, and a weight never used."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / math.sqrt(shape[-1]))

        self.first, self.bias, self.second = normal(12, 6), normal(12), normal(3, 12)
        self.gain, self.unused = nn.Parameter(torch.tensor(1.5)), normal(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(x @ self.first.mT + self.bias) @ self.second.mT

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.first, self.gain, self.unused]}, {"params": [self.second, self.bias]}]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def closure_for(net: Net, optimizer: torch.optim.Optimizer, step: int, sometimes: bool = True) -> Callable[[], Tensor]:
    x, y = batch(step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        if sometimes and step % 3 == 1:
            net.gain.grad = None
        return loss

    return closure


def train(
    net: Net, optimizer: torch.optim.Optimizer, steps: int = STEPS, first: int = 0, sometimes: bool = True
) -> list[float]:
    """Train; halfway the rate falls to a third, as a schedule would do it."""
    losses = []
    for step in range(first, first + steps):
        if step == STEPS // 2:
            for group in optimizer.param_groups:
                group["lr"] /= 3
        loss: Any = optimizer.step(closure_for(net, optimizer, step, sometimes))  # type: ignore[arg-type]
        losses.append(loss.item())
    return losses


def assert_agree(ours: Net, theirs: Net, tolerance: float = 1e-10) -> None:
    start = Net()
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        if name == "unused":
            assert torch.equal(a, c)
        else:
            a, b, c = a.detach(), b.detach(), c.detach()
            assert float((b - c).norm() / c.norm()) > 1e-2, f"{name} did not move: the comparison says nothing"
            assert float((a - b).norm() / b.norm()) <= tolerance, name


# --- Schedule-free ----------------------------------------------------------------------------------------------------

SCHEDULE_FREE: list[tuple[Any, Any, dict[str, Any]]] = [
    (ScheduleFreeSGD, pytorch_optimizer.ScheduleFreeSGD, {"lr": 0.5}),
    (ScheduleFreeSGD, pytorch_optimizer.ScheduleFreeSGD, {"lr": 1.0, "momentum": 0.7, "weight_decay": 0.02}),
    (ScheduleFreeSGD, pytorch_optimizer.ScheduleFreeSGD, {"lr": 0.3, "momentum": 0.95, "warmup_steps": 17}),
    (ScheduleFreeAdamW, pytorch_optimizer.ScheduleFreeAdamW, {"lr": 0.02}),
    (
        ScheduleFreeAdamW,
        pytorch_optimizer.ScheduleFreeAdamW,
        {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1, "warmup_steps": 30, "eps": 1e-4},
    ),
]


@pytest.mark.parametrize(("make", "reference", "settings"), SCHEDULE_FREE)
def test_schedule_free_is_that_of_pytorch_optimizer(make: Any, reference: Any, settings: dict[str, Any]) -> None:
    ours, theirs = Net(), Net()
    optimizer = reference(theirs.groups(), foreach=False, **settings)
    # it counts steps by group to correct its squares, we by parameter as torch.optim: the same where all take part
    sometimes = make is ScheduleFreeSGD
    mine = train(ours, make(ours.groups(), **settings), sometimes=sometimes)
    others = train(theirs, optimizer, sometimes=sometimes)
    assert mine == pytest.approx(others, rel=1e-10)  # the losses at y
    optimizer.eval()
    assert_agree(ours, theirs)


def test_schedule_free_sgd_is_the_formula_with_the_plain_mean() -> None:
    """x is the mean of z_1, ..., z_t at a constant rate, and the gradient is taken at y: on a parabola, by hand."""
    curvature = torch.tensor([1.0, 0.1, 4.0])
    theta = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    x = z = theta.detach().clone()
    optimizer = ScheduleFreeSGD([theta], lr=0.3, momentum=0.8)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (curvature * theta.square()).sum()
        loss.backward()
        return loss

    passed = []
    for t in range(1, 31):
        y = 0.2 * z + 0.8 * x
        loss: Any = optimizer.step(closure)  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(float(0.5 * (curvature * y**2).sum()), rel=1e-12)
        z = z - 0.3 * curvature * y
        passed.append(z)
        x = (1 - 1 / t) * x + z / t
        torch.testing.assert_close(theta.detach(), x, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(theta.detach(), torch.stack(passed).mean(0), rtol=1e-12, atol=1e-14)


def test_an_interrupted_step_leaves_x_and_no_trace() -> None:
    net = Net()
    optimizer = ScheduleFreeAdamW(net.parameters(), lr=0.1)
    train(net, optimizer, 5)
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())

    def interrupted() -> Tensor:
        assert not torch.equal(net.first, weights["first"]), "the gradient is taken at y"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted)  # type: ignore[arg-type]
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    again = Net()
    again.load_state_dict(weights)
    other = ScheduleFreeAdamW(again.parameters(), lr=0.1)
    other.load_state_dict(state)
    train(net, optimizer, 5, first=5)
    train(again, other, 5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("make", [partial(ScheduleFreeSGD, lr=0.5), partial(ScheduleFreeAdamW, lr=0.01, eps=1e-3)])
def test_fit_validates_and_keeps_x(make: Any, digits: Dataset, tmp_path: Path, monkeypatch: Any) -> None:
    """Against pytorch-optimizer's, whose modes are switched by hand around each validation."""
    recipe = replace(RECIPE, optimizer=make)
    model = fresh(partial(mlp, (1, 8, 8), 10, width=8), recipe, seed=0)
    twin = copy.deepcopy(model)
    history = fit(model, digits, recipe, seed=0)

    name = make.func.__name__
    holder: dict[str, Any] = {}

    def reference(parameters: Any) -> torch.optim.Optimizer:
        holder["optimizer"] = getattr(pytorch_optimizer, name)(
            [p for _, p in parameters], foreach=False, **make.keywords
        )
        return holder["optimizer"]

    def switched(*args: Any, **kwargs: Any) -> Any:
        holder["optimizer"].eval()
        found = evaluate(*args, **kwargs)
        holder["optimizer"].train()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", switched)
        expected = fit(twin, digits, replace(recipe, optimizer=reference), seed=0)
    holder["optimizer"].eval()
    # it adds 1e-15 to Adam's squares, which shows where a gradient is below eps, hence the large one
    assert history["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-9)
    assert history.losses == pytest.approx(expected.losses, rel=1e-9)
    assert evaluate(model, digits.val).loss == history["val_loss"][-1]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_run_that_was_killed_goes_on(digits: Dataset, tmp_path: Path) -> None:
    makers = [ScheduleFreeSGD, ScheduleFreeAdamW, partial(SGDHD, lr=0.05), AdamHD, Prodigy]
    for number, make in enumerate(makers):
        runs = []
        for checkpoint in (None, tmp_path / f"{number}.pt"):
            recipe = replace(RECIPE, optimizer=make)
            network = partial(convnet, (1, 8, 8), 10, width=2)
            if checkpoint:
                fit(fresh(network, recipe, seed=0), digits, replace(recipe, epochs=1), seed=0, checkpoint=checkpoint)
            model = fresh(network, recipe, seed=0)
            fit(model, digits, recipe, seed=0, checkpoint=checkpoint)
            runs.append(model.state_dict())
        assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items()), make


# --- Hypergradient descent --------------------------------------------------------------------------------------------


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def test_sgd_hd_is_the_formula() -> None:
    net, lr, hyper_lr = Net(), 0.1, 0.003
    used = [net.first, net.bias, net.second, net.gain]
    optimizer = SGDHD(used, lr=lr, hyper_lr=hyper_lr)
    expected, before, rates = flat(used), torch.zeros(sum(p.numel() for p in used)), []
    for step in range(STEPS):
        optimizer.step(closure_for(net, optimizer, step, sometimes=False))  # type: ignore[arg-type]
        g = flat(p.grad for p in used)
        lr = lr + hyper_lr * float(g @ before)
        expected, before = expected - lr * g, g
        rates.append(lr)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-10)
        torch.testing.assert_close(flat(used), expected, rtol=1e-10, atol=1e-12)
    assert max(rates) / min(rates) > 1.05, "the rate stood still: the comparison says nothing"


def test_adam_hd_is_the_formula() -> None:
    net, lr, hyper_lr, eps = Net(), 0.01, 1e-4, 1e-3
    used = [net.first, net.bias, net.second, net.gain]
    optimizer = AdamHD(used, lr=lr, hyper_lr=hyper_lr, betas=(0.8, 0.95), eps=eps)
    expected = flat(used)
    m, v, u = (torch.zeros_like(expected) for _ in range(3))
    rates = []
    for t in range(1, STEPS + 1):
        optimizer.step(closure_for(net, optimizer, t, sometimes=False))  # type: ignore[arg-type]
        g = flat(p.grad for p in used)
        lr = lr + hyper_lr * float(g @ u)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        u = m / (1 - 0.8**t) / ((v / (1 - 0.95**t)).sqrt() + eps)
        expected = expected - lr * u
        rates.append(lr)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-10)
        torch.testing.assert_close(flat(used), expected, rtol=1e-9, atol=1e-12)
    assert max(rates) / min(rates) > 1.05


@pytest.mark.parametrize("reference", [torch.optim.SGD, torch.optim.Adam])
def test_without_a_rate_of_its_own_it_is_the_plain_optimizer(reference: Any) -> None:
    ours, theirs = Net(), Net()
    make = SGDHD if reference is torch.optim.SGD else AdamHD
    train(ours, make(ours.groups(), lr=0.05, hyper_lr=0.0))
    train(theirs, reference(theirs.groups(), lr=0.05))
    assert_agree(ours, theirs)


@pytest.mark.parametrize("make", [SGDHD, AdamHD])
def test_the_hypergradient_is_the_derivative_of_the_loss_by_the_rate(make: Any) -> None:
    """Autograd through the step itself: the loss of the next batch as a function of the last step's rate."""
    net = Net()
    optimizer = make(net.groups(), lr=0.05)
    train(net, optimizer, 4)
    names = [n for n, _ in net.named_parameters() if n not in ("unused", "gain")]
    parameters = dict(net.named_parameters())
    updates = {n: optimizer.state[parameters[n]]["update"] for n in names}
    x, y = batch(77)
    lr = torch.tensor(0.05, requires_grad=True)
    rate = float(optimizer.param_groups[0]["lr"])
    before = {n: parameters[n].detach() + rate * updates[n] for n in names}
    moved = {n: before[n] - lr * updates[n] for n in names}
    loss = F.cross_entropy(torch.func.functional_call(net, moved, (x,)), y)
    (slope,) = torch.autograd.grad(loss, lr)
    at_rate = {n: (before[n] - 0.05 * updates[n]).requires_grad_() for n in names}
    g = torch.autograd.grad(F.cross_entropy(torch.func.functional_call(net, at_rate, (x,)), y), list(at_rate.values()))
    assert hypergradient(list(g), [updates[n] for n in names]) == pytest.approx(float(slope), rel=1e-10)


def test_each_group_has_a_rate_of_its_own(digits: Dataset) -> None:
    net = Net()
    optimizer = SGDHD(net.groups(), lr=0.05, hyper_lr=0.01)
    train(net, optimizer, 30)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert len({first, second, 0.05}) == 3
    recipe = replace(RECIPE, optimizer=partial(SGDHD, lr=0.01, hyper_lr=1e-4))
    rates = fit(fresh(partial(mlp, (1, 8, 8), 10, width=8), recipe, seed=0), digits, recipe, seed=0).rates
    assert rates[0] == rates[1] == (0.01,)  # nothing is known before the second gradient
    assert rates[-1] > rates[0]


# --- Prodigy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"d0": 1e-3, "d_coef": 0.5, "weight_decay": 0.1},
        {"betas": (0.8, 0.95), "beta3": 0.9, "eps": 1e-4, "lr": 0.7, "d0": 1e-4},
        {"d_coef": 2.0, "betas": (0.95, 0.99), "weight_decay": 0.02},
    ],
)
def test_prodigy_is_that_of_pytorch_optimizer(settings: dict[str, Any]) -> None:
    ours, theirs = Net(), Net()
    mine = Prodigy(ours.groups(), **settings)
    reference = pytorch_optimizer.Prodigy(theirs.groups(), foreach=False, **settings)
    assert train(ours, mine) == pytest.approx(train(theirs, reference), rel=1e-9)
    assert mine.param_groups[0]["d"] == pytest.approx(reference.param_groups[0]["d"], rel=1e-10)
    assert mine.param_groups[1]["d"] == mine.param_groups[0]["d"] > 10 * settings.get("d0", 1e-6)
    assert_agree(ours, theirs)


def test_the_estimate_stays_below_the_distance_on_a_convex_loss() -> None:
    """The theory's promise: with ``d0`` below it, d never passes the distance to the solution (here in each weight)."""
    for distance in (0.1, 10.0):
        theta = nn.Parameter(torch.zeros(1))
        optimizer = Prodigy([theta])
        for _ in range(300):
            optimizer.zero_grad()
            (theta - distance).abs().sum().backward()
            optimizer.step()
        assert 0.05 * distance < optimizer.param_groups[0]["d"] <= distance
        assert abs(theta.item() - distance) < 0.2 * distance


def test_without_a_gradient_nothing_moves() -> None:
    theta = nn.Parameter(torch.ones(2))
    optimizer = Prodigy([theta], weight_decay=0.5)
    theta.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(theta, torch.ones(2))
    assert optimizer.param_groups[0]["d"] == 1e-6


# --- All --------------------------------------------------------------------------------------------------------------

MAKERS: list[Any] = [SGDHD, AdamHD, ScheduleFreeSGD, ScheduleFreeAdamW, Prodigy]


@pytest.mark.parametrize("make", MAKERS)
def test_optimizers_can_be_told_from_others_and_pickled(make: Any) -> None:
    net = Net()
    optimizer = make(net.parameters())
    train(net, optimizer, 3)
    again = pickle.loads(pickle.dumps(optimizer))
    assert repr(again.param_groups) == repr(optimizer.param_groups)
    assert (
        fingerprint(partial(make, lr=0.1)) == fingerprint(partial(make, lr=0.1)) != fingerprint(partial(make, lr=0.2))
    )


BAD: list[tuple[str, Callable[[list[nn.Parameter]], Any]]] = [
    ("lr=-1: must be", lambda p: SGDHD(p, lr=-1)),
    ("hyper_lr=nan: must be", lambda p: SGDHD(p, hyper_lr=math.nan)),
    ("betas=(0.9, 1): must be", lambda p: AdamHD(p, betas=(0.9, 1))),
    ("momentum or betas[0]=0.0: must be above 0", lambda p: ScheduleFreeSGD(p, momentum=0.0)),
    ("momentum or betas[0]=1.0: must be above 0", lambda p: ScheduleFreeSGD(p, momentum=1.0)),
    ("warmup_steps=-1: must be a whole number", lambda p: ScheduleFreeAdamW(p, warmup_steps=-1)),
    ("weight_decay=-1: must be", lambda p: ScheduleFreeAdamW(p, weight_decay=-1)),
    ("closure is None", lambda p: ScheduleFreeSGD(p).step()),
    ("d0=0: must be a finite number > 0", lambda p: Prodigy(p, d0=0)),
    ("d_coef=-1: must be a finite number > 0", lambda p: Prodigy(p, d_coef=-1)),
    ("beta3=1: must be None", lambda p: Prodigy(p, beta3=1)),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings_are_named(message: str, call: Callable[[list[nn.Parameter]], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call([nn.Parameter(torch.ones(1))])


@pytest.mark.gpu
@pytest.mark.parametrize("make", MAKERS)
def test_a_gpu_takes_the_same_steps(make: Any) -> None:
    here, there = Net(), Net().cuda()
    train(here, make(here.groups()), 10)
    optimizer = make(there.groups())
    for step in range(10):
        x, y = (part.cuda() for part in batch(step))

        def closure(x: Tensor = x, y: Tensor = y, step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(there(x), y)
            loss.backward()
            if step % 3 == 1:
                there.gain.grad = None
            return loss

        optimizer.step(closure)
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=1e-11)
