"""Normalisation against torch's functions and modules; the equilibrium of length and rotation against measured runs."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from course_lib import regularization as reg
from course_lib.lab.data import load
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, cross_entropy, evaluate, fit, fresh
from tests.regularization.small import NETWORKS, generator, images, network, normal

SHAPES = [(6, 4), (6, 4, 5), (6, 4, 5, 3)]


# --- Pure functions ---------------------------------------------------------------------------------------------------


def same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor) -> None:
    """The same value and the same gradient by each tensor."""
    results = []
    for function in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad((out * normal(*out.shape, seed=9)).sum(), leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_batch_norm_is_torchs_over_steps(shape: tuple[int, ...], training: bool, momentum: float) -> None:
    ours = (normal(4, seed=5), normal(4, seed=6).abs())
    theirs = tuple(t.clone() for t in ours)
    for step in range(3):
        x = 2 * normal(*shape, seed=step) + 1

        def call(function: Any, running: Any, *args: Tensor) -> Tensor:
            return function(args[0], *running, args[1], args[2], training, momentum, 1e-3)

        same(partial(call, reg.batch_norm, ours), partial(call, F.batch_norm, theirs), x, normal(4), normal(4, seed=1))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_batch_norm_without_running_statistics_or_scale() -> None:
    x = normal(6, 4, 5)
    torch.testing.assert_close(
        reg.batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [1, 2])
def test_layer_norm_and_rms_norm_are_torchs(shape: tuple[int, ...], last: int) -> None:
    if last >= len(shape):
        last = 1
    sizes = list(shape[-last:])
    x, w, b = 2 * normal(*shape) + 1, normal(*sizes, seed=1), normal(*sizes, seed=2)
    same(lambda *t: reg.layer_norm(t[0], sizes, t[1], t[2]), lambda *t: F.layer_norm(t[0], sizes, t[1], t[2]), x, w, b)
    same(lambda *t: reg.rms_norm(t[0], sizes, t[1]), lambda *t: F.rms_norm(t[0], sizes, t[1]), x, w)
    torch.testing.assert_close(reg.rms_norm(x.float(), sizes), F.rms_norm(x.float(), sizes))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_is_torchs(shape: tuple[int, ...], groups: int) -> None:
    if len(shape) == 2 and groups == 4:
        pytest.skip("torch refuses groups of one value")
    x = 2 * normal(*shape) + 1
    same(
        lambda *t: reg.group_norm(t[0], groups, t[1], t[2]),
        lambda *t: F.group_norm(t[0], groups, t[1], t[2]),
        x,
        normal(4, seed=1),
        normal(4, seed=2),
    )


@pytest.mark.parametrize("make", [partial(nn.Linear, 7, 5), partial(nn.Conv2d, 3, 4, 3)], ids=["linear", "conv"])
def test_weight_norm_is_torchs_over_steps(make: Callable[[], nn.Module]) -> None:
    ours = make().double()
    theirs = parametrizations.weight_norm(copy.deepcopy(ours))
    nn.utils.parametrize.register_parametrization(ours, "weight", reg.WeightNorm())
    x = normal(4, 7) if isinstance(ours, nn.Linear) else normal(4, 3, 6, 6)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.3, momentum=0.5) for layer in (ours, theirs)]
    for _ in range(4):
        outputs = []
        for layer, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            output = layer(x)
            (output - 1).square().mean().backward()
            optimizer.step()
            outputs.append(output.detach())
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    unit = reg.weight_norm(normal(3, 4), torch.ones(1, 4).double(), 1)
    torch.testing.assert_close(unit.norm(dim=0), torch.ones(4).double())


# --- In networks ------------------------------------------------------------------------------------------------------

IMAGE_KINDS = ["batch", "layer", "group", "weight", "none"]
PLACES = {"mlp": 2, "convnet": 3, "resnet": 9, "vit": 5}
CASES = [
    *(("mlp", kind) for kind in [*IMAGE_KINDS, "rms"]),
    *(("convnet", kind) for kind in IMAGE_KINDS),
    *(("resnet", kind) for kind in IMAGE_KINDS),
    *(("vit", kind) for kind in ["layer", "rms", "weight", "none"]),
]
TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "batch": (nn.BatchNorm1d, nn.BatchNorm2d),
    "layer": (nn.LayerNorm, nn.GroupNorm),
    "group": (nn.GroupNorm,),
    "rms": (nn.RMSNorm,),
    "weight": (reg.Shift,),
    "none": (reg.Shift,),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, reg.Shift)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_norms_are_swapped(name: str, kind: Any) -> None:
    model, (x, y) = network(name), images()
    before = copy.deepcopy(model.state_dict())
    other = reg.with_norm(model, kind, groups=2)
    found = [part for part in other.modules() if isinstance(part, NORMS)]
    bare = name == "mlp" and kind in ("weight", "none")  # its layers have biases, and no norm was there
    assert len(found) == (0 if bare else PLACES[name])
    assert all(isinstance(part, TYPES[kind]) for part in found)
    if kind == "layer" and name == "convnet":
        assert all(part.num_groups == 1 for part in found)  # type: ignore[union-attr]
    cross_entropy(other, x, y).backward()
    assert all(p.grad is not None and p.dtype == torch.float64 for p in other.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not other.eval().training
    assert all(not part.training for part in other.modules())


@pytest.mark.parametrize("kind", ["batch", "layer", "group", "weight", "none"])
def test_noise_stays_where_a_norm_is_swapped(kind: Any) -> None:
    """The whole last branch is switched off by stochastic depth, which stands behind a norm."""
    model, (x, _) = network("resnet"), images()
    deep = reg.with_norm(reg.with_dropout(reg.with_stochastic_depth(model, 1.0), 0.0), kind, groups=2).train()
    last = deep.stages[-1][-1]  # type: ignore[index,union-attr]
    assert last.norm2.noise.p == 1.0
    assert not last.norm2(torch.ones(1, 16, 2, 2, dtype=x.dtype)).any()
    assert str(reg.without_noise(deep)) == str(reg.with_norm(model, kind, groups=2))


def test_the_same_kind_again_is_the_same_network() -> None:
    model, (x, _) = network("convnet"), images()
    again = reg.with_norm(model, "batch")
    torch.testing.assert_close(again(x), model(x))
    assert str(again) == str(model)


def test_a_norm_stands_between_layer_and_activation_of_the_mlp() -> None:
    model, (x, _) = network("mlp"), images()
    other = reg.with_norm(model, "layer")
    h = x.flatten(1)
    for layer in (model.hidden[0], model.hidden[2]):  # type: ignore[index]
        h = F.relu(F.layer_norm(layer(h), [8]))
    torch.testing.assert_close(other(x), model.head(h))  # type: ignore[operator]


def test_without_norm_and_with_weight_norm_the_function_stays_at_first() -> None:
    model, (x, _) = network("mlp"), images()
    torch.testing.assert_close(reg.with_norm(model, "weight")(x), model(x))
    bare = reg.with_norm(network("convnet"), "none")
    torch.testing.assert_close(reg.with_norm(network("convnet"), "weight")(x), bare(x))
    weighted = reg.with_norm(model, "weight")
    lengths = weighted.hidden[0].parametrizations.weight.original0  # type: ignore[index,union-attr]
    torch.testing.assert_close(lengths.flatten(), model.hidden[0].weight.norm(dim=1))  # type: ignore[index,union-attr]


def test_weight_norm_twice_is_weight_norm_once() -> None:
    model, (x, _) = reg.with_norm(network("convnet"), "weight"), images()
    again = reg.with_norm(model, "weight")
    assert str(again) == str(model)
    torch.testing.assert_close(again(x), model(x))


def test_swapped_networks_train() -> None:
    data = load("digits", train_size=300)
    for kind in ("batch", "group", "rms", "weight"):
        recipe = Recipe(epochs=8, precision="float64")
        model = reg.with_norm(fresh(partial(mlp, (1, 8, 8), 10, width=32), recipe, seed=0), kind)  # type: ignore[arg-type]
        fit(model, data, recipe, seed=0)
        assert evaluate(model, data.test).accuracy > 0.8, kind


# --- Scale invariance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch", "layer", "group"])
def test_a_weight_before_a_norm_has_an_orthogonal_gradient_that_shrinks_with_it(kind: Any) -> None:
    model, (x, y) = reg.with_norm(network("convnet"), kind), images()
    for part in model.modules():
        if hasattr(part, "eps"):
            part.eps = 1e-15  # what keeps real layers a little from invariance  # type: ignore[assignment]
    weight = model.features[0].weight  # type: ignore[index,union-attr]
    (g,) = torch.autograd.grad(cross_entropy(model, x, y), weight)
    assert reg.radial_share(weight, g) < 1e-6
    loss = cross_entropy(model, x, y).item()
    with torch.no_grad():
        weight.mul_(10)
    (smaller,) = torch.autograd.grad(cross_entropy(model, x, y), weight)
    assert cross_entropy(model, x, y).item() == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(smaller, g / 10, rtol=1e-6, atol=1e-10)
    head = model.head.weight
    (g,) = torch.autograd.grad(cross_entropy(model, x, y), head)
    assert reg.radial_share(head, g) > 1e-3


def test_the_effective_rate_moves_the_direction_alike() -> None:
    """A weight three times as long with nine times the rate takes the same turn."""
    w, g = normal(6), normal(6, seed=1)
    g = g - g @ w / (w @ w) * w
    turn = reg.angle(w, w - 0.1 * g)
    assert reg.angle(3 * w, 3 * w - 0.9 * g / 3) == pytest.approx(turn, rel=1e-12)
    assert reg.effective_rate(0.9, 3 * w) == pytest.approx(reg.effective_rate(0.1, w), rel=1e-12)


def test_angles() -> None:
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()
    assert reg.angle(a, 5 * b) == pytest.approx(math.pi / 4)
    assert reg.angle(a, -a) == pytest.approx(math.pi)
    assert reg.angle(a, torch.tensor([1.0, 1e-12]).double()) == pytest.approx(1e-12, rel=1e-6)


def test_norms_over_steps_are_those_of_gradients_of_constant_size() -> None:
    lr, decay, size, w = 0.1, 0.05, 3.0, normal(4)
    found = reg.norm_over_steps(lr, decay, size**2, w.norm().item(), 300)
    for step in range(300):
        assert found[step] == pytest.approx(w.norm().item(), rel=1e-10)
        g = normal(4, seed=step + 1)
        g = g - g @ w / (w @ w) * w
        w = (1 - lr * decay) * w - lr * size * g / g.norm() / w.norm()
    rest = reg.equilibrium_norm(lr, decay, size**2)
    assert reg.norm_over_steps(lr, decay, size**2, rest, 1)[1] == pytest.approx(rest, rel=1e-12)
    assert rest == pytest.approx((lr * size**2 / (2 * decay)) ** 0.25, rel=0.01)
    # the fourth power comes to rest as exp(-4 lr decay t)
    far, later = (norm**4 - rest**4 for norm in (found[100], found[150]))
    assert later / far == pytest.approx(math.exp(-4 * lr * decay * 50), rel=0.02)


Run = tuple[list[float], list[float], list[float]]


def noisy_run(make: Callable[..., torch.optim.Optimizer], steps: int, gain: float = 1.0, size: int = 400) -> Run:
    """A scale-invariant weight whose gradients are noise: its norms, angles and squared gradients at length 1."""
    w = nn.Parameter(normal(size))
    optimizer = make([w])
    tracker, squares, source = reg.Rotations(), [], generator(1)
    for _ in range(steps):
        g = gain * torch.randn(size, generator=source, dtype=torch.float64)
        with torch.no_grad():
            g = (g - g @ w / (w @ w) * w) / w.norm()
            squares.append((g @ g * (w @ w)).item())
        w.grad = g
        optimizer.step()
        tracker.see(optimizer)
    return tracker.norms, tracker.angles, squares


@pytest.mark.parametrize("setting", [(0.2, 0.05, 0.0), (0.05, 0.1, 0.0), (0.2, 0.05, 0.5), (0.05, 0.1, 0.9)])
def test_the_equilibrium_of_noise(setting: tuple[float, float, float]) -> None:
    lr, decay, momentum = setting
    norms, angles, squares = noisy_run(
        lambda p: torch.optim.SGD(p, lr=lr, momentum=momentum, weight_decay=decay), 1500, gain=0.3
    )
    half = slice(750, None)
    length = (sum(n**4 for n in norms[half]) / len(norms[half])) ** 0.25
    mean_sq = sum(squares[half]) / len(squares[half])
    assert length == pytest.approx(reg.equilibrium_norm(lr, decay, mean_sq, momentum), rel=0.01)
    turn = sum(angles[half]) / len(angles[half])
    assert turn == pytest.approx(reg.equilibrium_rotation(lr, decay, momentum), rel=0.01)
    if not momentum:
        assert turn == pytest.approx(math.acos(1 - lr * decay), rel=0.01)


@pytest.mark.parametrize("beta1", [0.5, 0.9])
def test_the_equilibrium_of_adamw(beta1: float) -> None:
    _, angles, _ = noisy_run(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1.0, betas=(beta1, 0.99)), 1500)
    turn = sum(angles[800:]) / len(angles[800:])
    assert turn == pytest.approx(reg.adam_equilibrium_rotation(0.01, 1.0, beta1), rel=0.03)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_layer_behind_batch_norm_turns_as_predicted_on_real_data(momentum: float) -> None:
    """Digits, in batches of 8: most of a gradient is noise, which is what the prediction is about."""
    data = load("digits", train_size=400)
    lr, decay = 0.4, 0.025

    def new() -> nn.Module:
        return reg.with_norm(mlp((1, 8, 8), 10, width=24, depth=1), "batch")

    rotations = reg.Rotations()
    sgd = partial(torch.optim.SGD, lr=lr * (1 - momentum), momentum=momentum, weight_decay=decay / (1 - momentum))
    recipe = reg.turned(
        Recipe(epochs=12, batch_size=8, optimizer=sgd, objective=partial(reg.label_smoothing, smoothing=0.5)), rotations
    )
    model = fresh(new, recipe, seed=0)
    fit(model, data, recipe, seed=0)
    angles = rotations.angles[300:]
    predicted = reg.equilibrium_rotation(lr * (1 - momentum), decay / (1 - momentum), momentum)
    assert sum(angles) / len(angles) == pytest.approx(predicted, rel=0.06)
    assert len(rotations.norms) == 12 * 50


def test_the_tracker_starts_anew_at_each_run_and_copies_empty() -> None:
    data, rotations = load("digits", train_size=64), reg.Rotations(2)
    recipe = reg.turned(Recipe(epochs=1), rotations)
    for _ in range(2):
        fit(fresh(partial(mlp, (1, 8, 8), 10, width=8), recipe, seed=0), data, recipe, seed=0)
        assert len(rotations.norms) == 1
        assert rotations.angles == []
    assert pickle.loads(pickle.dumps(rotations)).norms == []
    assert copy.deepcopy(rotations).position == 2


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("kind='instance': must be one of", lambda: reg.with_norm(network(), "instance")),  # type: ignore[arg-type]
    ("groups=3: must be a divisor of the 4 channels", lambda: reg.with_norm(network("convnet"), "group", groups=3)),
    ("kind='rms': must be another kind where images", lambda: reg.with_norm(network("convnet"), "rms")),
    ("kind='batch': must be layer, rms", lambda: reg.with_norm(network("vit"), "batch")),
    ("network=Linear: must have layers followed", lambda: reg.with_norm(nn.Linear(2, 2), "batch")),
    ("x has the shape [1, 4]: must hold more", lambda: reg.batch_norm(normal(1, 4), None, None, training=True)),
    ("running_mean=None: must be there", lambda: reg.batch_norm(normal(3, 4), None, None)),
    ("normalized_shape=[3]: must be the last sizes", lambda: reg.layer_norm(normal(2, 4), [3])),
    ("num_groups=3: must be a divisor of the 4", lambda: reg.group_norm(normal(2, 4), 3)),
    ("lr=0: must be a number above 0", lambda: reg.equilibrium_rotation(0, 1)),
    ("momentum=1: must be", lambda: reg.equilibrium_norm(0.1, 0.1, 1.0, 1)),
    ("gradient_sq=0: must be", lambda: reg.equilibrium_norm(0.1, 0.1, 0)),
    ("beta1=1: must be", lambda: reg.adam_equilibrium_rotation(0.1, 0.1, 1)),
    ("steps=0: must be", lambda: reg.norm_over_steps(0.1, 0.1, 1.0, 1.0, 0)),
    ("weight=0.0: must be of a length above 0", lambda: reg.effective_rate(0.1, torch.zeros(3))),
    ("position=-1: must be", lambda: reg.Rotations(-1)),
    (
        "position=9: must be below 1",
        lambda: reg.Rotations(9).see(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)),
    ),
]


@pytest.mark.parametrize(("message", "bad"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings_are_named(message: str, bad: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bad()


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_swapped_networks_on_the_gpu(name: str, kind: Any) -> None:
    x, y = images()
    other = reg.with_norm(network(name), kind, groups=2).eval()
    here = cross_entropy(other, x, y).item()
    assert cross_entropy(reg.with_norm(other.cuda(), kind).eval(), x.cuda(), y.cuda()).isfinite()
    assert cross_entropy(other, x.cuda(), y.cuda()).item() == pytest.approx(here, rel=1e-9)


def test_there_are_cases_for_each_network() -> None:
    assert {name for name, _ in CASES} == set(NETWORKS)
