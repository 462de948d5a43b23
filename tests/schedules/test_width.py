"""muP: at the base it is the usual network; at other widths the sizes of the table, and a flat coordinate check."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.data import load
from course_lib.lab.models import MLP, mlp
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.schedules.by_layer import with_layer_rates
from course_lib.schedules.width import Readout, coordinate_check, mup_adam, mup_groups, mup_mlp, mup_sgd

SHAPE, BASE = (1, 8, 8), 64
WIDTHS = (64, 128, 256, 512, 1024)
RECIPE = Recipe(epochs=1, batch_size=50, precision="float64")
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def wide(width: int, seed: int = 0, depth: int = 3) -> MLP:
    model = fresh(partial(mup_mlp, SHAPE, 10, width=width, base_width=BASE, depth=depth), RECIPE, seed=seed)
    return model.double()  # type: ignore[return-value]


def usual(width: int, seed: int = 0, depth: int = 3) -> MLP:
    return fresh(partial(mlp, SHAPE, 10, width=width, depth=depth), RECIPE, seed=seed)  # type: ignore[return-value]


def batch(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=g, dtype=torch.float64), torch.randint(10, (count,), generator=g)


def test_at_the_base_width_all_is_as_usual() -> None:
    data = load("digits", train_size=150)
    ours, theirs = wide(BASE), usual(BASE)
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    x, _ = batch()
    assert torch.equal(ours(x), theirs(x))
    for factors in (mup_sgd, mup_adam):
        assert set(factors(ours).values()) == {1.0}
    plain = replace(RECIPE, optimizer=partial(ADAM, lr=0.01))
    fit(theirs, data, plain, seed=0)
    fit(ours, data, replace(plain, optimizer=with_layer_rates(partial(ADAM, lr=0.01), mup_adam(ours))), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_first_sizes_and_rates_are_those_of_the_table() -> None:
    base, model, m = usual(BASE), wide(1024), 16
    named = dict(base.named_parameters())
    variance = {"hidden.2.weight": 1 / m, "hidden.4.weight": 1 / m}  # all others as at the base
    for name, p in model.named_parameters():
        expected = named[name].var().item() * variance.get(name, 1.0)
        assert p.var().item() == pytest.approx(expected, rel=0.4 if p.ndim == 1 else 0.15), name
    assert mup_sgd(model) == {
        "hidden.0.weight": m, "hidden.0.bias": m, "hidden.2.weight": 1, "hidden.2.bias": m,
        "hidden.4.weight": 1, "hidden.4.bias": m, "head.weight": m, "head.bias": 1,
    }  # fmt: skip
    assert mup_adam(model) == {
        "hidden.0.weight": 1, "hidden.0.bias": 1, "hidden.2.weight": 1 / m, "hidden.2.bias": 1,
        "hidden.4.weight": 1 / m, "hidden.4.bias": 1, "head.weight": 1, "head.bias": 1,
    }  # fmt: skip
    features = model.embedding(batch()[0])
    expected_logits = features @ model.head.weight.mT / m + model.head.bias
    torch.testing.assert_close(model.head(features), expected_logits, rtol=1e-12, atol=1e-14)


def in_mup(make: Any, lr: float, factors: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: make(mup_groups(model, lr, factors), lr=lr)


def as_usual(make: Any, lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: make(model.parameters(), lr=lr)


def growth(make_model: Callable[..., MLP], optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> dict[str, float]:
    """By which power of the width each layer's change grows: the slope on logarithmic axes, the mean of 2 networks."""
    x, y = batch()
    changes = []
    for width in WIDTHS:
        found = [coordinate_check(make_model(width, seed), optimizer, x, y) for seed in range(2)]
        changes.append({name: np.mean([one[name] for one in found]) for name in found[0]})
    powers = {}
    for name in changes[0]:
        powers[name] = float(np.polyfit(np.log(WIDTHS), np.log([change[name] for change in changes]), 1)[0])
    return powers


@pytest.mark.parametrize(
    ("make", "lr", "factors", "too_steep"),
    [(SGD, 0.1, mup_sgd, 0.4), (ADAM, 1e-3, mup_adam, 0.6)],
)
def test_a_step_changes_as_much_at_every_width(make: Any, lr: float, factors: Any, too_steep: float) -> None:
    flat = growth(wide, in_mup(make, lr, factors))
    assert all(abs(slope) < 0.12 for slope in flat.values()), flat
    steep = growth(usual, as_usual(make, lr))
    assert steep["head"] > too_steep, steep
    assert max(abs(slope) for slope in steep.values()) > 0.4


@pytest.mark.parametrize(("make", "factors"), [(partial(SGD, momentum=0.9), mup_sgd), (ADAM, mup_adam)])
def test_it_is_the_parametrisation_without_a_multiplier(make: Any, factors: Any) -> None:
    """Table 3 of the paper: the output weights themselves are smaller by m, and their rate is 1/m. The same function.

    Adam's eps would have to follow the gradients, which differ in size: it is next to nothing here.
    """
    m, settings = 4, {"eps": 1e-30} if make is ADAM else {}
    ours = wide(m * BASE)
    plain = usual(m * BASE)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        plain.head.weight.div_(m)
    rates = {**factors(ours), "head.weight": 1 / m}
    optimizers = [
        make(mup_groups(ours, 0.01, factors), **settings),
        make([{"params": [p], "lr": 0.01 * rates[name]} for name, p in plain.named_parameters()], **settings),
    ]
    first = ours(batch()[0]).detach()
    for step in range(10):
        x, y = batch(seed=step)
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    x, _ = batch()
    assert float((ours(x).detach() - first).norm() / first.norm()) > 0.1, (
        "nothing was learnt: the comparison says nothing"
    )
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-8, atol=1e-9)


def test_a_coordinate_check_leaves_the_model_alone_and_is_the_difference_of_outputs() -> None:
    model = usual(16, depth=1)
    x, y = batch()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = coordinate_check(model, as_usual(SGD, 0.3), x, y, steps=2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    old = model(x).detach()
    optimizer = SGD(model.parameters(), lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert set(found) == {"hidden.0", "head"}
    assert found["head"] == pytest.approx(float((model(x).detach() - old).square().mean().sqrt()), rel=1e-12)


def test_a_model_keeps_its_multiplier_when_it_is_copied_and_loaded() -> None:
    model, other = wide(128), wide(128, seed=1)
    other.load_state_dict(model.state_dict())
    x, _ = batch(4)
    assert torch.equal(model(x), other(x))
    assert isinstance(model.head, Readout)
    assert model.head.multiple == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width=0: must be a whole number of at least 1"),
        ({"base_width": 1.5}, "base_width=1.5: must be a whole number of at least 1"),
        ({"depth": 0}, "depth=0: must be a whole number of at least 1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        mup_mlp(SHAPE, 10, **{"width": 8, "base_width": 8, **settings})


def test_rates_are_refused_for_other_networks() -> None:
    for factors in (mup_sgd, mup_adam):
        with pytest.raises(ValueError, match="model='MLP': must be a mup_mlp"):
            factors(usual(8))
    with pytest.raises(ValueError, match="lr=-1: must be"):
        mup_groups(wide(8), -1, mup_sgd)
