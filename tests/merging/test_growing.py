"""Small into large: the same function in both modes, by the weights that the papers say; and networks side by side."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import merging
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.tracing import CannotShrink
from course_lib.lab.training import Recipe, fit, fresh
from tests.merging.small import EXACT, FOLLOWED, NAMES, batch, close, data, generator, network, normal, same_weights

# --- Wider ------------------------------------------------------------------------------------------------------------

GROUPS = {
    "mlp": ["hidden.0", "hidden.2"],
    "convnet": ["features.0", "features.4", "features.8"],
    "resnet": ["stem.0", "stages.1.0.conv1", "stages.1.0.conv2"],
    "vit": ["blocks.0.mlp.0"],
}


@pytest.mark.parametrize(("name", "group"), [(name, group) for name, groups in GROUPS.items() for group in groups])
def test_a_wider_network_computes_the_same(name: str, group: str) -> None:
    model, x = network(name), batch()
    units = {found.name: found.units for found in merging.permutation_groups(model)}[group]
    found = merging.wider(model, group, 2 * units + 1, generator=generator(1))
    assert {each.name: each.units for each in merging.permutation_groups(found)}[group] == 2 * units + 1
    assert found.parameter_count > model.parameter_count  # type: ignore[operator]
    for training in (False, True):
        close(copy.deepcopy(found).train(training)(x), copy.deepcopy(model).train(training)(x), 1e-10)
    same_weights(model, network(name))


def test_a_wider_network_trains(tmp_path: Any) -> None:
    small = network("resnet")
    found = merging.wider(small, "stem.0", 5, generator=generator(), noise=0.1)
    history = fit(found, data(), Recipe(epochs=1, batch_size=20, precision="float64"), seed=0)
    assert history["val_loss"][0] > 0
    assert found.stem[0].out_channels == found.stem[1].num_features == 5  # type: ignore[index, union-attr]


def test_copies_are_copied_and_what_reads_them_divided() -> None:
    model = fresh(partial(mlp, (3,), 2, width=3, depth=1), EXACT, seed=0)
    found = merging.wider(model, "hidden.0", 7, generator=generator(3))
    rows, columns = found.get_parameter("hidden.0.weight"), found.get_parameter("head.weight")
    of = torch.stack([(row == model.get_parameter("hidden.0.weight")).all(1) for row in rows])
    assert (of.sum(1) == 1).all()
    assert torch.equal(of[:3], torch.eye(3, dtype=torch.bool))
    counts = of.sum(0)
    assert (counts > 1).any()
    for unit, which in enumerate(of.T):
        expected = model.get_parameter("head.weight")[:, unit] / counts[unit]
        assert all(torch.equal(columns[:, k], expected) for k in which.nonzero().flatten())


def test_noise_tells_the_copies_apart_and_leaves_the_old_units() -> None:
    model = network("mlp")
    plain, noisy = (merging.wider(model, "hidden.0", 12, generator=generator(3), noise=n) for n in (0.0, 0.01))
    w, v = plain.get_parameter("hidden.0.weight"), noisy.get_parameter("hidden.0.weight")
    assert torch.equal(w[:6], v[:6])
    assert 0 < (w[6:] - v[6:]).abs().max() < 0.1 * w.abs().max()
    old = (w[6] == w[:6]).all(1).nonzero().item()
    apart = []
    for made in (plain, noisy):
        made(batch()).square().sum().backward()
        of_columns = made.get_parameter("hidden.2.weight").grad
        assert of_columns is not None
        apart.append((of_columns[:, int(old)] - of_columns[:, 6]).abs().max().item())
    assert apart[0] == 0
    assert apart[1] > 1e-6


def test_depthwise_convolutions_and_flattened_channels_are_followed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 3)
    ).double()
    x = batch()
    found = merging.wider(model, "0", 6, generator=generator(), example_input=x)
    close(found(x), model(x), 1e-12)
    assert found[2].groups == found[2].in_channels == 6  # type: ignore[index, union-attr]
    assert found[5].in_features == 96  # type: ignore[index, union-attr]


# --- Deeper -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "after"), [("mlp", "hidden.1"), ("mlp", "hidden.3"), ("convnet", "features.2"), ("resnet", "stages.1.0")]
)
def test_a_deeper_network_computes_the_same(name: str, after: str) -> None:
    model, x = network(name), batch()
    found = merging.deeper(model, after)
    assert len([*found.parameters()]) == len([*model.parameters()]) + 2
    for training in (False, True):
        close(copy.deepcopy(found).train(training)(x), copy.deepcopy(model).train(training)(x), 1e-10)
    same_weights(model, network(name))
    twice = merging.deeper(found, f"{after}.2")
    close(twice(x), model(x), 1e-10)


@pytest.mark.parametrize(("name", "after"), [("mlp", "hidden.1"), ("convnet", "features.6"), ("resnet", "stages.0.0")])
def test_batch_norm_in_a_new_layer_is_undone(name: str, after: str) -> None:
    model, x, other = network(name).train(), batch(12), batch(12, seed=5)
    found = merging.deeper(model, after, batch=x)
    close(copy.deepcopy(found)(x), copy.deepcopy(model)(x), 1e-9)
    # what the new layer's statistics are of is seen in training mode; in evaluation it hands on all that comes
    close(copy.deepcopy(found).eval()(other), copy.deepcopy(model).eval()(other), 1e-9)
    norms = [part for part in found.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 1 + len([part for part in model.modules() if isinstance(part, nn.BatchNorm2d)])
    assert (found(other) - model(other)).abs().max() < 0.5 * model(other).abs().max()


# --- A multiple of the width ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3])
def test_an_expanded_transformer_computes_the_same(factor: int) -> None:
    model, x = network("vit"), batch()
    found = merging.expand(model, factor)  # type: ignore[arg-type]
    shapes = {name: value.shape for name, value in found.state_dict().items()}
    wide = vit((1, 8, 8), 4, width=8 * factor, depth=2, heads=2 * factor)
    assert shapes == {name: value.shape for name, value in wide.state_dict().items()}
    close(found(x), model(x), 1e-10)
    expected = model.embedding(x).repeat(1, factor)  # type: ignore[operator]
    close(found.embedding(x), expected, 1e-10)
    same_weights(model, network("vit"))
    loss = F.cross_entropy(found(x), torch.arange(6) % 4)
    loss.backward()
    assert all(p.grad is not None for p in found.parameters())


# --- Twice the layers -------------------------------------------------------------------------------------------------


def test_a_stacked_network_runs_its_layers_twice() -> None:
    x = batch()
    model = network("vit")
    found = merging.stack(model, "blocks")
    tokens = model.embed(x).flatten(2).transpose(1, 2) + model.position  # type: ignore[operator]
    twice = model.blocks(model.blocks(tokens))  # type: ignore[operator]
    close(found(x), model.head(model.norm(twice).mean(1)), 1e-10)  # type: ignore[operator]
    small = network("mlp")
    deep = merging.stack(small, "hidden", 2)
    once = small.hidden(x.flatten(1))  # type: ignore[operator]
    close(deep(x), small.head(small.hidden[2:](once)), 1e-10)  # type: ignore[operator, index]
    with torch.no_grad():
        deep.get_parameter("hidden.4.weight").add_(1.0)  # a copy: its original stays
    assert torch.equal(deep.get_parameter("hidden.2.weight"), small.get_parameter("hidden.2.weight"))
    same_weights(small, network("mlp"))


# --- Side by side -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_joint_network_is_the_mean_of_logits(name: str) -> None:
    models, x = [network(name, seed) for seed in range(3)], batch()
    found = merging.join(models)
    for training in (False, True):
        said = torch.stack([copy.deepcopy(model).train(training)(x) for model in models]).mean(0)
        close(copy.deepcopy(found).train(training)(x), said, 1e-11)
    assert [group.units for group in merging.permutation_groups(found)] == [
        3 * group.units for group in merging.permutation_groups(models[0])
    ]
    for seed, model in enumerate(models):
        same_weights(model, network(name, seed))


def test_widths_may_differ_and_what_was_joined_trains() -> None:
    models = [fresh(partial(convnet, (1, 8, 8), 4, width=width), EXACT, seed=width) for width in (2, 5)]
    found, x = merging.join([model.eval() for model in models]), batch()
    close(found(x), (models[0](x) + models[1](x)) / 2, 1e-11)
    between = found.get_parameter("features.4.weight")
    assert between.shape == (14, 7, 3, 3)
    assert (between[:4, 2:] == 0).all()
    assert (between[4:, :2] == 0).all()
    fit(found, data(), Recipe(epochs=1, batch_size=20, precision="float64"), seed=0)
    assert (found.get_parameter("features.4.weight")[:4, 2:] != 0).any()


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    a, v, g = network("mlp"), network("vit"), generator()
    cases: list[tuple[str, Any]] = [
        ("group='head': must be one of hidden.0, hidden.2", lambda: merging.wider(a, "head", 9, generator=g)),
        ("width=6: must be a whole number of at least 7", lambda: merging.wider(a, "hidden.0", 6, generator=g)),
        ("noise=-1: must be a number of at least 0", lambda: merging.wider(a, "hidden.0", 9, generator=g, noise=-1)),
        ("must be one whose units are one channel each",
         lambda: merging.wider(v, "blocks.0.attention.qkv", 3, generator=g)),
        ("after='hidden.0': must be the name of a ReLU or a BasicBlock", lambda: merging.deeper(a, "hidden.0")),
        ("model='MLP': must be a vit of the laboratory", lambda: merging.expand(a, 2)),  # type: ignore[arg-type]
        ("factor=1: must be a whole number of at least 2", lambda: merging.expand(v, 1)),  # type: ignore[arg-type]
        ("name='head': must be the name of an nn.Sequential: hidden", lambda: merging.stack(a, "head")),
        ("first=4: must be less than 4", lambda: merging.stack(a, "hidden", 4)),
        ("name='hidden', first=0: these parts cannot follow themselves", lambda: merging.stack(a, "hidden")),
        ("models=[]: must be at least one network", lambda: merging.join([])),
        ("models[1] differs from models[0]: must be networks of one architecture",
         lambda: merging.join([a, network("convnet")])),
    ]  # fmt: skip
    tokens, some = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double(), normal(2, 3, 5)
    close(merging.deeper(tokens, "1", example_input=some)(some), tokens(some), 1e-12)
    cases.append(
        ("batch: must be None behind '1'", lambda: merging.deeper(tokens, "1", batch=some, example_input=some))
    )
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    with pytest.raises(CannotShrink, match="the units of .* do not go apart, .* mixes all of it"):
        merging.join([v, v])


class Squared(nn.Module):
    """Its logits are no linear function of its units."""

    input_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu()) ** 2


def test_a_joint_network_that_would_say_something_else_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(CannotShrink, match="the new network computes something else"):
        merging.join([Squared(), Squared()])
    one = Squared()
    close(merging.join([one, one])(normal(2, 3)), one(normal(2, 3)), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parts_stay_frozen_and_types_stay(name: str) -> None:
    model = network(name).float()
    next(iter(model.parameters())).requires_grad_(False)
    found = merging.wider(model, GROUPS[name][0], 9 if name != "vit" else 40, generator=generator())
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in model.parameters()]
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    close(found(batch().float()), model(batch().float()), 1e-5)


@pytest.mark.gpu
def test_growing_on_the_gpu() -> None:
    x = batch().cuda()
    for make in (partial(resnet, blocks=(1, 1)), convnet, mlp):
        model = make((1, 8, 8), 4, width=4).double().cuda().eval()  # type: ignore[operator]
        group = merging.permutation_groups(model)[0].name
        close(merging.wider(model, group, 9, generator=generator())(x), model(x), 1e-9)
        close(merging.join([model, model])(x), model(x), 1e-9)
    flat = mlp((1, 8, 8), 4, width=4).double().cuda()
    close(merging.deeper(flat, "hidden.1", batch=x).eval()(x), flat.eval()(x), 1e-9)
    tokens = vit((1, 8, 8), 4, width=8, heads=2).double().cuda()
    close(merging.expand(tokens, 2)(x), tokens(x), 1e-9)
