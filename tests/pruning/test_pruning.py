"""Masks, criteria, patterns and schedules of pruning, each against torch or the formula evaluated apart in float64."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.pruning.scheduler.cubic_scheduler import CubicSL
from torch.nn.utils import prune as torch_prune

from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.training import Recipe, cross_entropy, evaluate, fit, fresh
from course_lib.optimizers import SAM, Lion, Lookahead
from course_lib.pruning import criteria, masks, patterns, schedules
from course_lib.pruning.criteria import magnitude, obd, obs, obs_prune, obs_prune_model, random_scores, snip, wanda
from course_lib.pruning.masks import (
    apply_masks,
    get_masks,
    load_masked,
    make_permanent,
    masked_parts,
    prunable_layers,
    sparsity,
    weight_of,
)
from course_lib.pruning.patterns import global_unstructured, layer_unstructured
from course_lib.pruning.schedules import cubic_sparsity, drop_and_grow, gradual, lottery_ticket, one_shot, rigl

RECIPE = Recipe(epochs=1, precision="float64")
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=256)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(make: Any = None, seed: int = 0) -> Any:
    return fresh(make or partial(mlp, SHAPE, 10, width=16), RECIPE, seed=seed)


def random_masks(model: nn.Module, density: float = 0.4, seed: int = 0) -> masks.Masks:
    g = generator(seed)
    return {n: torch.rand(weight_of(m).shape, generator=g) < density for n, m in prunable_layers(model).items()}


def batch(count: int = 32, seed: int = 0, classes: int = 10) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(count, *SHAPE, generator=g, dtype=torch.float64), torch.randint(classes, (count,), generator=g)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for step in range(count):
        x, y = batch(seed=step)

        def closure(x: Tensor = x, y: Tensor = y) -> Any:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


# --- Masks ------------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "Adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "Lion": partial(Lion, lr=0.01, weight_decay=0.1),
    "SAM": lambda parameters: SAM(torch.optim.SGD(parameters, lr=0.1, momentum=0.9)),
    "Lookahead": lambda parameters: Lookahead(torch.optim.Adam(parameters, lr=0.01), k=2),
}
MODELS: dict[str, Any] = {
    "mlp": partial(mlp, SHAPE, 10, width=16),
    "convnet": partial(convnet, SHAPE, 10, width=4),
    "resnet": partial(resnet, SHAPE, 10, width=4, blocks=(1, 1)),
    "vit": partial(vit, SHAPE, 10, width=16, depth=1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_with_any_optimizer_even_one_already_at_work(name: str) -> None:
    model = small()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer)
    parameters = {id(p) for p in model.parameters()}
    wanted = random_masks(model)
    apply_masks(model, wanted)
    assert {id(p) for p in model.parameters()} == parameters
    before = {n: weight_of(m).detach().clone() for n, m in prunable_layers(model).items()}
    steps(model, optimizer)
    for n, layer in prunable_layers(model).items():
        assert bool((weight_of(layer)[~wanted[n]] == 0).all())
        assert bool((weight_of(layer)[wanted[n]] != before[n][wanted[n]]).any()), "training must go on"
        assert bool((model.state_dict()[f"{n}.parametrizations.weight.original"][~wanted[n]] == 0).all())


def test_masked_training_is_projected_training() -> None:
    """The same steps written out: gradient and weight times mask, for SGD with momentum and weight decay."""
    masked, plain = small(), small()
    wanted = random_masks(masked)
    apply_masks(masked, wanted)
    steps(masked, torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), 5)
    layers = prunable_layers(plain)
    buffers = {p: torch.zeros_like(p) for p in plain.parameters()}
    for step in range(5):
        for n, layer in layers.items():
            weight_of(layer).data.mul_(wanted[n])
        x, y = batch(seed=step)
        grads = torch.autograd.grad(F.cross_entropy(plain(x), y), list(plain.parameters()))
        for p, g in zip(list(plain.parameters()), grads, strict=True):
            for n, layer in layers.items():
                if p is layer.weight:
                    g = g * wanted[n]
            buffers[p] = 0.9 * buffers[p] + g + 0.01 * p.detach()
            p.data.sub_(0.1 * buffers[p])
    for n, layer in prunable_layers(masked).items():
        torch.testing.assert_close(weight_of(layer), weight_of(layers[n]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_masks_survive_copy_type_state_dict_and_tracing(name: str) -> None:
    model = small(MODELS[name]).eval()
    usual_keys = list(model.state_dict())
    wanted = random_masks(model)
    assert apply_masks(model, {n: m.float() for n, m in wanted.items()}) is model
    x, _ = batch(4)
    y = model(x)
    assert not torch.equal(y, small(MODELS[name]).eval()(x))

    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    assert model.float().state_dict()[f"{next(iter(wanted))}.parametrizations.weight.0.mask"].dtype == torch.bool
    torch.testing.assert_close(model(x.float()), y.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.fx.symbolic_trace(twin)(x), y)

    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    loaded = load_masked(small(MODELS[name], seed=1), state).eval()
    assert torch.equal(loaded(x), y)
    again = copy.deepcopy(twin)
    again.load_state_dict(state)
    for other in (twin, loaded, again):
        assert all(torch.equal(get_masks(other)[n], wanted[n]) for n in wanted)

    permanent = make_permanent(copy.deepcopy(twin))
    assert torch.equal(permanent(x), y)
    assert list(permanent.state_dict()) == usual_keys
    assert not get_masks(permanent)
    assert all(type(m) in masks.PRUNABLE for m in prunable_layers(permanent).values())
    torch.save(permanent, io.BytesIO())
    # and the model from which the copy was made has lost nothing
    assert torch.equal(twin(x), y)
    assert all(torch.equal(get_masks(twin)[n], wanted[n]) for n in wanted)


def test_a_state_dict_without_masks_takes_them_away() -> None:
    model = apply_masks(small(), random_masks(small()))
    other = small(seed=1)
    load_masked(model, other.state_dict())
    assert not get_masks(model)
    x, _ = batch(4)
    assert torch.equal(model(x), other(x))


def test_a_new_mask_replaces_the_old_one_and_regrown_weights_start_at_zero() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps(model, optimizer)
    first, second = random_masks(model, seed=1), random_masks(model, seed=2)
    apply_masks(model, first)
    steps(model, optimizer)  # the momentum moves what is stored of pruned weights
    before = {n: weight_of(m).detach().clone() for n, m in prunable_layers(model).items()}
    permanent = prunable_layers(make_permanent(copy.deepcopy(model)))
    assert all(torch.equal(weight_of(permanent[n]), weight) for n, weight in before.items())
    apply_masks(model, second)
    for n, layer in prunable_layers(model).items():
        assert torch.equal(get_masks(model)[n], second[n])
        assert torch.equal(weight_of(layer), before[n] * second[n])
        assert bool((weight_of(layer)[second[n] & ~first[n]] == 0).all())
    steps(model, optimizer, 1)
    for n, layer in prunable_layers(model).items():
        assert bool((weight_of(layer)[second[n] & ~first[n]] != 0).any()), "a weight that is back can learn"


def test_layers_without_a_mask_stay_as_they_are_and_masks_are_copies() -> None:
    model = small()
    mask = torch.zeros(16, 16, dtype=torch.bool)
    apply_masks(model, {"hidden.2": mask})
    mask[:] = True
    get_masks(model)["hidden.2"][:] = True
    assert list(get_masks(model)) == ["hidden.2"]
    assert sparsity(model, ["hidden.2"]) == 1
    assert sparsity(model, ["hidden.0", "head"]) == 0
    assert sparsity(model) == 256 / (64 * 16 + 256 + 160)


def test_infinite_stored_weights_are_zero_where_pruned() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0, 0], layer.weight[1, 1] = math.inf, math.nan
    mask = torch.ones(3, 4)
    mask[0, 0] = mask[1, 1] = 0
    apply_masks(layer, {"": mask})
    assert bool(layer(torch.ones(2, 4)).isfinite().all())
    assert bool(make_permanent(layer)(torch.ones(2, 4)).isfinite().all())


def test_the_kept_gradient_is_that_of_every_weight() -> None:
    model = small()
    apply_masks(model, random_masks(model))
    dense = make_permanent(copy.deepcopy(model))
    for layer in prunable_layers(model).values():
        masked_parts(layer)[1].keep_gradient = True
    for seed in (0, 1):  # two backward passes add up, as in .grad
        x, y = batch(seed=seed)
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(dense(x), y).backward()
    for n, layer in prunable_layers(model).items():
        weight, part = masked_parts(layer)
        expected = weight_of(prunable_layers(dense)[n]).grad
        assert expected is not None
        torch.testing.assert_close(part.gradient, expected, rtol=0, atol=1e-15)
        torch.testing.assert_close(weight.grad, expected * part.mask, rtol=0, atol=1e-15)
        assert bool((expected[~part.mask] != 0).any())


def test_bad_masks_are_refused_and_nothing_changes() -> None:
    model = small()
    good = {"head": torch.zeros(10, 16)}
    for bad, words in [
        ({"tail": torch.ones(10, 16)}, "masks names 'tail'"),
        ({"hidden.1": torch.ones(10, 16)}, "masks names 'hidden.1'"),
        ({"hidden.0": torch.ones(64, 16)}, r"masks\['hidden.0'\] has the shape \(64, 16\): must be \(16, 64\)"),
        ({"hidden.0": torch.full((16, 64), 0.5)}, "other values than 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            apply_masks(model, good | bad)
    assert not get_masks(model)
    assert sparsity(model) == 0
    with pytest.raises(ValueError, match="no layer to prune"):
        apply_masks(nn.ReLU(), {})
    with pytest.raises(ValueError, match="layers names 'x'"):
        prunable_layers(model, ["x"])
    with pytest.raises(ValueError, match="at least one"):
        prunable_layers(model, [])
    with pytest.raises(ValueError, match="several names"):
        prunable_layers(model, "head")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for name in "01":
        with pytest.raises(ValueError, match="must not be tied"):
            apply_masks(tied, {name: torch.ones(4, 4)})
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="another parametrization"):
        apply_masks(normed, {"": torch.ones(4, 4)})


@pytest.mark.gpu
def test_masks_and_criteria_on_cuda() -> None:
    x, y = batch()
    for make in MODELS.values():
        here = small(make).eval()
        there = copy.deepcopy(here).cuda()
        for criterion in (magnitude, snip, criteria.taylor, criteria.movement, obd, obs, wanda):
            a, b = criterion(here, (x, y)), criterion(there, (x, y))
            for n in a:
                torch.testing.assert_close(a[n], b[n].cpu(), rtol=1e-6, atol=1e-9)
        chosen = global_unstructured(magnitude(there), 0.5)
        apply_masks(there, chosen)
        apply_masks(here, chosen)  # masks follow the layer's device
        torch.testing.assert_close(here(x), there(x.cuda()).cpu())
        steps_x, steps_y = x.cuda(), y.cuda()
        optimizer = torch.optim.SGD(there.parameters(), lr=0.1, momentum=0.9)
        F.cross_entropy(there(steps_x), steps_y).backward()
        optimizer.step()
        assert sparsity(there) == sparsity(here)


# --- Patterns against torch.nn.utils.prune ----------------------------------------------------------------------------

SPARSITIES = (0.0, 0.1, 0.5, 0.77, 0.99)


def bool_mask(layer: Any) -> Tensor:
    return layer.weight_mask.bool()


def torch_masks(model: Any, method: Callable[[nn.Module], object]) -> masks.Masks:
    model = copy.deepcopy(model)
    found = prunable_layers(model)
    for layer in found.values():
        method(layer)
    return {name: bool_mask(layer) for name, layer in found.items()}


def assert_same(ours: masks.Masks, theirs: masks.Masks) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == torch.bool
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("amount", SPARSITIES)
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_unstructured_masks_equal_torch(name: str, amount: float) -> None:
    model = small(MODELS[name])
    with torch.no_grad():  # ties must be broken in the same way too
        for layer in prunable_layers(model).values():
            weight_of(layer).copy_((weight_of(layer) * 10).round())
    scores = magnitude(model)
    assert_same(
        layer_unstructured(scores, amount),
        torch_masks(model, lambda m: torch_prune.l1_unstructured(m, "weight", amount)),
    )
    both = copy.deepcopy(model)
    found = prunable_layers(both)
    torch_prune.global_unstructured(
        [(m, "weight") for m in found.values()], pruning_method=torch_prune.L1Unstructured, amount=amount
    )
    assert_same(global_unstructured(scores, amount), {n: bool_mask(m) for n, m in found.items()})
    torch.manual_seed(5)
    theirs = torch_masks(model, lambda m: torch_prune.random_unstructured(m, "weight", amount))
    assert_same(layer_unstructured(random_scores(model, generator=generator(5)), amount), theirs)


@pytest.mark.parametrize("amount", SPARSITIES)
@pytest.mark.parametrize("norm", [1, 2])
def test_structured_masks_equal_torch(norm: int, amount: float) -> None:
    combine = {1: patterns.total, 2: patterns.euclidean}[norm]
    for name in ("mlp", "convnet"):
        model = small(MODELS[name])
        for dim, pattern in enumerate((patterns.filters, patterns.channels)):
            theirs = torch_masks(
                model, partial(torch_prune.ln_structured, name="weight", amount=amount, n=norm, dim=dim)
            )
            assert_same(pattern(magnitude(model), amount, combine), theirs)


@pytest.mark.parametrize("amount", SPARSITIES)
def test_counts_are_exact(amount: float) -> None:
    scores = random_scores(small(MODELS["convnet"]), generator=generator())
    total = sum(score.numel() for score in scores.values())
    pruned = {n: int((~m).sum()) for n, m in global_unstructured(scores, amount).items()}
    assert sum(pruned.values()) == round(amount * total)
    for mask in layer_unstructured(scores, amount).values():
        assert int((~mask).sum()) == round(amount * mask.numel())
    for mask in patterns.per_row(scores, amount).values():
        assert bool(((~mask).flatten(1).sum(1) == round(amount * mask[0].numel())).all())
    mask = patterns.blocks({"head": scores["head"]}, amount, block=(5, 4))["head"]
    assert int((~mask).sum()) == 20 * round(amount * mask.numel() / 20)


def test_a_sparsity_for_each_layer() -> None:
    scores = magnitude(small())
    each = {"hidden.0": 0.9, "hidden.2": 0.25, "head": 0.0}
    found = layer_unstructured(scores, each)
    assert {n: float((~m).double().mean()) for n, m in found.items()} == {
        "hidden.0": round(0.9 * 1024) / 1024,
        "hidden.2": 0.25,
        "head": 0.0,
    }
    with pytest.raises(ValueError, match="must name those of scores"):
        layer_unstructured(scores, {"head": 0.5})


def test_per_row_prunes_the_lowest_of_each_row() -> None:
    score = torch.tensor([[1.0, 2, 3, 4], [40, 30, 20, 10]])
    assert patterns.per_row({"a": score}, 0.5)["a"].tolist() == [[False, False, True, True], [True, True, False, False]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_n_of_m_keeps_the_best_subset_of_each_group(n: int, m: int) -> None:
    for shape in [(6, 16), (3, 8, 2, 3), (4, 8, 5)]:
        score = torch.rand(shape, generator=generator(), dtype=torch.float64)
        mask = patterns.n_of_m({"a": score}, n, m)["a"]
        assert mask.shape == score.shape
        for output in range(shape[0]):
            for first in range(0, shape[1], m):
                for place in itertools.product(*(range(k) for k in shape[2:])):
                    index: Any = (output, slice(first, first + m), *place)
                    best = max(itertools.combinations(range(m), n), key=lambda c: float(score[index][list(c)].sum()))
                    assert mask[index].nonzero().flatten().tolist() == list(best)


def test_blocks_against_loops() -> None:
    score = torch.rand(8, 6, 2, 1, generator=generator(), dtype=torch.float64)
    mask = patterns.blocks({"a": score}, 0.4, block=(4, 3))["a"].flatten(1)
    tiles = {
        (r, c): float(score.flatten(1)[r : r + 4, c : c + 3].sum()) for r in range(0, 8, 4) for c in range(0, 12, 3)
    }
    gone = sorted(tiles, key=lambda tile: tiles[tile])[: round(0.4 * 8)]
    for r, c in tiles:
        assert bool((mask[r : r + 4, c : c + 3] != ((r, c) in gone)).all())


def test_whole_layers_and_blocks_of_layers() -> None:
    ones = torch.ones(2, 3)
    scores = {"a.0": 5 * ones, "a.1": 3 * ones, "ab": 1 * ones, "b.0": 2 * ones, "b.1": 4 * torch.ones(20, 3)}
    gone = [n for n, m in patterns.layers(scores, 0.4).items() if not m.any()]
    assert gone == ["ab", "b.0"]
    assert all(bool(m.all()) for n, m in patterns.layers(scores, 0.4).items() if n not in gone)
    found = patterns.layers(scores, 0.5, blocks=["a", "b"])  # the means: 4.0, and 3.8 of the weights
    assert [n for n, m in found.items() if not m.any()] == ["b.0", "b.1"]
    with pytest.raises(ValueError, match="blocks names 'c'"):
        patterns.layers(scores, 0.5, blocks=["a", "c"])


def test_units_pruned_earlier_go_first() -> None:
    scores = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-torch.inf, -torch.inf], [-torch.inf, 0.5]])
    for combine in (patterns.total, patterns.euclidean):
        keep = patterns.filters({"a": scores}, 0.25, combine)["a"][:, 0]
        assert keep.tolist() == [True, True, False, True]
    assert patterns.total(scores).tolist() == [-3, -7, -torch.inf, 0.5]
    assert patterns.euclidean(scores)[3] == 0.5


def test_what_is_left_of_each_layer() -> None:
    left = {
        "a": torch.tensor([[1, 1, 0], [0, 0, 0]]).bool(),
        "b": torch.zeros(3, 2, 1, 1, dtype=torch.bool),
        "c": torch.ones(2, 2, dtype=torch.bool),
    }
    frame: Any = patterns.layer_density(left)
    assert frame.loc["a"].tolist() == [6, 2, 1 / 3, 1 / 2, 2 / 3]
    assert frame.loc["b"].tolist() == [6, 0, 0, 0, 0]
    assert patterns.collapsed(left) == ["b"]
    assert patterns.collapsed(left, at_most=0.4) == ["a", "b"]
    assert patterns.bottleneck(left) == "b"


@pytest.mark.parametrize("amount", [1.0, 1.2, -0.1, math.nan, "0.5", None])
def test_a_bad_sparsity_is_refused_by_name_and_value(amount: Any) -> None:
    scores = magnitude(small())
    for pattern in (
        global_unstructured,
        layer_unstructured,
        patterns.per_row,
        patterns.blocks,
        patterns.filters,
        patterns.channels,
        patterns.layers,
    ):
        with pytest.raises(ValueError, match=f"sparsity={amount!r}: must be at least 0 and less than 1"):
            pattern(scores, amount)
    with pytest.raises(ValueError, match="sparsity="):
        obs_prune(torch.ones(2, 2), torch.ones(3, 2), amount)
    for call in (one_shot, partial(gradual, recipe=RECIPE, begin=0, end=3)):
        with pytest.raises(ValueError, match="sparsity="):
            call(small(), data=None, sparsity=amount)


def test_bad_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="no layer"):
        global_unstructured({}, 0.5)
    with pytest.raises(ValueError, match=r"scores\['a'\] holds NaN"):
        global_unstructured({"a": torch.tensor([[math.nan]])}, 0.5)
    with pytest.raises(ValueError, match=r"m=4 does not divide the 6 inputs of the layer 'a'.*\(2, 6, 3\)"):
        patterns.n_of_m({"b": torch.ones(2, 8), "a": torch.ones(2, 6, 3)})
    for n, m in [(0, 4), (4, 4), (5, 4)]:
        with pytest.raises(ValueError, match=f"n={n}, m={m}"):
            patterns.n_of_m({"a": torch.ones(2, 8)}, n, m)
    with pytest.raises(ValueError, match=r"block=\(4, 4\) does not tile the 8x18 matrix of the layer 'a'"):
        patterns.blocks({"a": torch.ones(8, 6, 3)}, 0.5)
    with pytest.raises(ValueError, match=r"block=\(0, 4\)"):
        patterns.blocks({"a": torch.ones(8, 4)}, 0.5, block=(0, 4))


# --- Criteria ---------------------------------------------------------------------------------------------------------


class ReLUConv(nn.Module):
    """Without batch norm, so that it is piecewise linear in the weights of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=3, dtype=torch.float64)
        self.head = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).flatten(1))


def gated_loss(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """The loss as a function of factors on the weights."""
    state = {n: p.detach() for n, p in model.named_parameters()} | dict(model.named_buffers())

    def loss(gates: dict[str, Tensor]) -> Tensor:
        changed = state | {f"{n}.weight": state[f"{n}.weight"] * gate for n, gate in gates.items()}
        return F.cross_entropy(torch.func.functional_call(model, changed, (x,)), y)

    return loss


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_snip_is_the_gradient_of_a_gate(name: str) -> None:
    model = small(MODELS[name]).eval()
    x, y = batch(300)  # more than a batch of the criterion's own
    ones = {n: torch.ones_like(weight_of(m)) for n, m in prunable_layers(model).items()}
    expected = torch.func.grad(gated_loss(model, x, y))(ones)
    found = snip(model, (x, y))
    for n in expected:
        torch.testing.assert_close(found[n], expected[n].abs(), rtol=1e-10, atol=1e-15)
    # batches of any size are weighed by it
    again = snip(model, [(x[:10], y[:10]), (x[10:], y[10:])])
    for n in expected:
        torch.testing.assert_close(again[n], expected[n].abs(), rtol=1e-10, atol=1e-15)


def test_taylor_is_the_mean_square_over_batches() -> None:
    model = small()
    x, y = batch(60)
    ones = {n: torch.ones_like(weight_of(m)) for n, m in prunable_layers(model).items()}
    parts = [torch.func.grad(gated_loss(model, x[i : i + 20], y[i : i + 20]))(ones) for i in (0, 20, 40)]
    found = criteria.taylor(model, (x, y), batch_size=20)
    for n in ones:
        torch.testing.assert_close(found[n], sum(p[n] ** 2 for p in parts) / 3, rtol=1e-10, atol=1e-18)
    # and to first order it is the change of the loss when the weight goes: a tiny weight goes almost linearly
    weight = weight_of(prunable_layers(model)["head"]).detach()
    weight[3, 2] = 1e-4
    score = criteria.taylor(model, [(x, y)], layers=["head"])["head"][3, 2]
    before = F.cross_entropy(model(x), y).detach()
    weight[3, 2] = 0
    change = F.cross_entropy(model(x), y).detach() - before
    assert float(score.sqrt()) == pytest.approx(abs(float(change)), rel=1e-3)


def test_movement_against_softmax_regression_in_numpy() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, dtype=torch.float64))
    x, y = batch(48)
    found = criteria.movement(model, (x, y), lr=0.3, epochs=2, batch_size=16)["1"]
    w, b = (p.detach().numpy().copy() for p in model[1].parameters())
    score = np.zeros_like(w)
    rows, labels = x.flatten(1).numpy(), np.eye(10)[y.numpy()]
    for _ in range(2):
        for i in range(0, 48, 16):
            z = np.exp(rows[i : i + 16] @ w.T + b)
            error = (z / z.sum(1, keepdims=True) - labels[i : i + 16]) / 16
            g = error.T @ rows[i : i + 16]
            score -= g * w
            w, b = w - 0.3 * g, b - 0.3 * error.sum(0)
    np.testing.assert_allclose(found.numpy(), score, rtol=1e-9, atol=1e-14)


def hessian_diagonals(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    state = {n: p.detach() for n, p in model.named_parameters()}

    def diagonal(name: str, weight: Tensor) -> Tensor:
        def loss(flat: Tensor) -> Tensor:
            changed = state | {f"{name}.weight": flat.view(weight.shape)}
            return F.cross_entropy(torch.func.functional_call(model, changed, (x,)), y)

        return torch.func.hessian(loss)(weight.flatten()).diagonal().view(weight.shape)

    return {name: diagonal(name, weight_of(m).detach()) for name, m in prunable_layers(model).items()}


def test_obd_is_exact_where_the_network_is_piecewise_linear() -> None:
    torch.manual_seed(0)
    x, y = batch(20, classes=3)
    for model in (ReLUConv(), fresh(partial(mlp, SHAPE, 3, width=6), RECIPE, seed=0)):
        expected = hessian_diagonals(model, x, y)
        found = obd(model, (x, y), batch_size=8)
        for n, h in expected.items():
            assert float(h.max()) > 1e-4
            torch.testing.assert_close(found[n], 0.5 * h * weight_of(prunable_layers(model)[n]).detach() ** 2)


def test_gauss_newton_for_other_networks_is_the_formula_and_not_the_hessian() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = batch(7, classes=3)
    found = criteria.gauss_newton_diagonal(model, (x, y), batch_size=3, layers=["1"])["1"]
    p = model(x).detach().softmax(1)
    state = {n: q.detach() for n, q in model.named_parameters()}
    J = torch.func.jacrev(lambda w: torch.func.functional_call(model, state | {"1.weight": w}, (x,)))(state["1.weight"])
    J = J.flatten(2)  # [examples, classes, weights]
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("iak,iab,ibk->k", J, middle, J) / 7
    torch.testing.assert_close(found.flatten(), expected)
    assert not torch.allclose(found, hessian_diagonals(model, x, y)["1"], rtol=0.01)


def restricted_error(X: Tensor, w: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The best row with these weights alone, and half its squared error: by least squares, no Hessian in sight."""
    best = torch.zeros_like(w)
    best[kept] = torch.linalg.lstsq(X[:, kept], X @ w, driver="gelsd").solution
    return best, 0.5 * (X @ (w - best)).square().sum()


def test_obs_scores_are_the_errors_after_the_best_correction() -> None:
    layer, g = fresh(partial(nn.Linear, 6, 3, bias=False), RECIPE, seed=0), generator()
    X = torch.randn(40, 6, generator=g, dtype=torch.float64) @ torch.randn(6, 6, generator=g, dtype=torch.float64)
    found = obs(layer, (X, torch.zeros(40)), damping=0.0)[""]
    for row, q in itertools.product(range(3), range(6)):
        kept = torch.arange(6) != q
        _, error = restricted_error(X, weight_of(layer).detach()[row], kept)
        assert float(found[row, q]) == pytest.approx(float(error), rel=1e-8)


def test_obs_prune_is_greedy_least_squares() -> None:
    g = generator(3)
    X = torch.randn(60, 8, generator=g, dtype=torch.float64) @ torch.randn(8, 8, generator=g, dtype=torch.float64)
    weight = torch.randn(5, 8, generator=g, dtype=torch.float64)
    new, mask = obs_prune(weight, X, 0.6, damping=0.0)
    assert bool((mask.sum(1) == 8 - round(0.6 * 8)).all())
    assert bool((new[~mask] == 0).all())
    for row in range(5):
        kept = torch.ones(8, dtype=torch.bool)
        for _ in range(round(0.6 * 8)):  # each time the weight whose loss costs least after refitting all others

            def without(q: int, kept: Tensor = kept, row: int = row) -> float:
                return float(restricted_error(X, weight[row], kept & (torch.arange(8) != q))[1])

            kept[min(kept.nonzero().flatten().tolist(), key=without)] = False
        assert torch.equal(mask[row], kept)
        torch.testing.assert_close(new[row], restricted_error(X, weight[row], kept)[0], rtol=1e-8, atol=1e-10)
    by_size = weight * layer_unstructured({"": weight.abs()}, 0.6)[""]
    assert float((X @ (weight - new).T).norm()) < 0.7 * float((X @ (weight - by_size).T).norm())


def test_obs_prune_model_uses_the_inputs_of_each_layer(digits: Dataset) -> None:
    model = small()
    x = criteria._examples(model, digits.train, 1024)[0][0]
    first = weight_of(model.hidden[0]).detach().clone()
    expected, mask = obs_prune(first, x.flatten(1), 0.5)
    found = obs_prune_model(model, digits.train, sparsity=0.5)
    assert torch.equal(found["hidden.0"], mask)
    torch.testing.assert_close(weight_of(model.hidden[0]).detach(), expected)
    assert sparsity(model) == pytest.approx(0.5)
    # after which the layers behind see other inputs, but were fitted to those they had
    grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1).double()
    data = (torch.randn(9, 4, 5, 5, generator=generator(), dtype=torch.float64), torch.zeros(9))
    halves = [grouped.weight.detach()[i : i + 2].flatten(1) for i in (0, 2)]
    rows = [F.unfold(data[0][:, i : i + 2], 3, padding=1).transpose(1, 2).flatten(0, 1) for i in (0, 2)]
    obs_prune_model(grouped, data, sparsity=0.5)
    for i, (w, X) in enumerate(zip(halves, rows, strict=True)):
        torch.testing.assert_close(grouped.weight.detach()[2 * i : 2 * i + 2].flatten(1), obs_prune(w, X, 0.5)[0])


CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(4, 6, 3, padding="same", groups=2),
    nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", stride=2),
    nn.Conv1d(4, 6, 3, padding=2, dilation=2, stride=2),
    nn.Conv1d(4, 4, 5, padding="same", groups=2, padding_mode="replicate"),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_inputs_of_convolutions(layer: Any) -> None:
    """A convolution is its weight matrix on these rows; so they, and Wanda's norms, belong to the right weights."""
    layer = copy.deepcopy(layer).double()
    x = torch.randn(5, 4, 7, *([9] if layer.weight.ndim == 4 else []), generator=generator(), dtype=torch.float64)
    rows = criteria._input_rows(layer, x)  # [G, examples, I]
    matrices = layer.weight.detach().flatten(1).unflatten(0, (layer.groups, -1))
    out = torch.einsum("gei,goi->ego", rows, matrices).flatten(1) + layer.bias.detach()
    expected = layer(x).detach().flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(out, expected)
    # if a weight were 1 and all others 0, the output's norm is that of its input
    found = wanda(layer, [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(3))])[""]
    for index in [(0, 0, 0), (1, 1 % layer.weight.shape[1], 1), (3, 0, 1)]:
        place = (*index, *([0] * (layer.weight.ndim - 3)))
        alone = copy.deepcopy(layer)
        with torch.no_grad():
            alone.weight.zero_()
            alone.bias.zero_()
            alone.weight[place] = layer.weight[place]
        assert float(found[place]) == pytest.approx(float(alone(x).detach().norm()), rel=1e-10)


def test_wanda_of_linear_layers_on_any_shape_of_input() -> None:
    model = small(MODELS["vit"]).eval()
    x, y = batch(6)
    seen: list[Tensor] = []
    handle = model.blocks[0].mlp[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    norms = seen[0].reshape(-1, seen[0].shape[-1]).norm(dim=0)
    weight = model.blocks[0].mlp[2].weight.detach()
    torch.testing.assert_close(wanda(model, (x, y))["blocks.0.mlp.2"], weight.abs() * norms)


CRITERIA: dict[str, criteria.Criterion] = {
    "magnitude": magnitude,
    "random": lambda model, data: random_scores(model, data, generator=generator()),
    "snip": snip,
    "taylor": criteria.taylor,
    "movement": criteria.movement,
    "obd": obd,
    "obs": obs,
    "wanda": wanda,
}


@pytest.mark.parametrize("name", CRITERIA)
def test_criteria_leave_the_model_alone_and_see_pruned_weights_as_zeros(name: str, digits: Dataset) -> None:
    model = small(MODELS["convnet"])
    apply_masks(model, random_masks(model))
    state = copy.deepcopy(model.state_dict())
    few = digits.train.subset(torch.arange(40))
    found = CRITERIA[name](model, few)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert list(found) == list(prunable_layers(model))
    plain = CRITERIA[name](make_permanent(copy.deepcopy(model)), few)
    for n, score in found.items():
        assert score.shape == weight_of(prunable_layers(model)[n]).shape
        assert not score.requires_grad
        assert torch.equal(score, plain[n])
    part = partial(inspect.unwrap(CRITERIA[name]), layers=["head"]) if name != "random" else None
    if part:
        torch.testing.assert_close(part(model, few)["head"], found["head"])
        with pytest.raises(ValueError, match="layers names 'x'"):
            part(model, few, layers=["x"])
    if name in ("snip", "taylor", "movement", "obd", "obs", "wanda"):
        with pytest.raises(ValueError, match="data=None"):
            CRITERIA[name](model, None)


def test_float32_and_layers_whose_weights_are_frozen(digits: Dataset) -> None:
    model = convnet(SHAPE, 10, width=4)
    model.head.requires_grad_(False)
    few = digits.train.subset(torch.arange(40))
    for name, criterion in CRITERIA.items():
        assert all(score.dtype == torch.float32 for score in criterion(model, few).values()), name
    assert not model.head.weight.requires_grad
    assert float(snip(model, few)["head"].max()) > 0


def test_bad_settings_of_criteria_are_refused(digits: Dataset) -> None:
    model = small()
    x, y = batch(4)
    for settings in ({"lr": 0.0}, {"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}={next(iter(settings.values()))}"):
            criteria.movement(model, (x, y), **settings)
    with pytest.raises(ValueError, match=r"damping=-1: must be at least 0"):
        obs(model, (x, y), damping=-1)
    with pytest.raises(ValueError, match=r"damping=0.0 leaves the inputs' Hessian singular"):
        obs(model, (x, y), damping=0.0)  # four examples, 64 inputs
    with pytest.raises(ValueError, match="inputs has the shape"):
        obs_prune(torch.ones(2, 3), torch.ones(5, 4), 0.5)
    model.extra = nn.Linear(2, 2).double()
    with pytest.raises(ValueError, match="'extra' is never called"):
        wanda(model, (x, y))
    assert float(snip(model, (x, y))["extra"].abs().max()) == 0


# --- Schedules --------------------------------------------------------------------------------------------------------


def test_one_shot_reaches_the_sparsity_and_keeps_what_is_pruned_pruned(digits: Dataset) -> None:
    model = small()
    first = one_shot(model, None, sparsity=0.3, criterion=partial(random_scores, generator=generator()))
    second = one_shot(model, digits.train, sparsity=0.6, criterion=snip)
    total = sum(m.numel() for m in first.values())
    assert sum(int((~m).sum()) for m in second.values()) == round(0.6 * total)
    assert all(not bool((second[n] & ~first[n]).any()) for n in first)
    third = one_shot(model, None, sparsity=0.8, criterion=partial(random_scores, generator=generator(1)))
    assert all(not bool((third[n] & ~second[n]).any()) for n in first)
    assert all(torch.equal(third[n], mask) for n, mask in get_masks(model).items())
    direct = small()
    masks_ = one_shot(direct, None, sparsity=0.6)
    assert_same(masks_, global_unstructured(magnitude(small()), 0.6))
    only = one_shot(small(), None, sparsity=0.5, criterion=partial(magnitude, layers=["head"]))
    assert list(only) == ["head"]


def test_iterative_pruning_takes_equal_fractions_and_trains_in_between(digits: Dataset) -> None:
    model = small()
    frame = schedules.iterative(model, digits, RECIPE, seed=0, sparsity=0.875, rounds=3)
    np.testing.assert_allclose(frame["sparsity"], [0.5, 0.75, 0.875], atol=5e-4)
    by_hand = small()
    before: masks.Masks = {}
    for r, target in enumerate([0.5, 0.75, 0.875], start=1):
        scores = {n: s.masked_fill(~before[n], -1) if before else s for n, s in magnitude(by_hand).items()}
        before = global_unstructured(scores, target)
        apply_masks(by_hand, before)
        assert frame["pruned"][r] == evaluate(by_hand, digits.val).accuracy
        fit(by_hand, digits, RECIPE, seed=0)
        assert frame["trained"][r] == evaluate(by_hand, digits.val).accuracy
    assert_same(get_masks(model), get_masks(by_hand))
    with pytest.raises(ValueError, match="rounds=0"):
        schedules.iterative(model, digits, RECIPE, seed=0, sparsity=0.5, rounds=0)


def test_cubic_sparsity_equals_torch() -> None:
    for initial, final, begin, every, count in [(0.0, 0.9, 0, 1, 10), (0.2, 0.8, 7, 3, 5)]:
        for step in range(40):
            ours = cubic_sparsity(step, begin=begin, end=begin + every * count, initial=initial, final=final)
            clamped = min(step, begin + every * count)  # torch's lets the cube turn negative and clamps the result
            theirs = CubicSL.sparsity_compute_fn(initial, final, clamped, begin, every, count)
            assert ours == pytest.approx(theirs, abs=1e-12)
    with pytest.raises(ValueError, match="begin=5, end=5"):
        cubic_sparsity(1, begin=5, end=5, final=0.5)


def test_gradual_pruning_follows_the_cube_step_by_step(digits: Dataset) -> None:
    model = small()
    seen: list[float] = []
    recipe = gradual(model, replace(RECIPE, epochs=5), sparsity=0.9, begin=3, end=14, every=4)
    fit(model, digits, replace(recipe, optimizer=look_after(recipe, model, seen)), seed=0)
    total = sum(weight_of(m).numel() for m in prunable_layers(model).values())
    expected, current = [], 0.0
    for step in range(1, 21):
        if step in (3, 7, 11, 14):
            current = round(cubic_sparsity(step, begin=3, end=14, final=0.9) * total) / total
        expected.append(current)
    assert seen == expected
    assert seen[-1] == round(0.9 * total) / total


def look_after(recipe: Recipe, model: nn.Module, seen: list[float]) -> Callable[[Any], torch.optim.Optimizer]:
    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = recipe.optimizer(parameters)
        optimizer.register_step_post_hook(lambda *_: seen.append(sparsity(model)))
        return optimizer

    return make


@pytest.mark.parametrize("name", ["SGD", "Lion", "SAM", "Lookahead"])
def test_gradual_pruning_with_any_optimizer_and_a_criterion_that_looks_at_data(name: str, digits: Dataset) -> None:
    few = digits.train.subset(torch.arange(64))
    recipe = replace(RECIPE, epochs=2, optimizer=OPTIMIZERS[name], ema=0.5)
    model = small()
    fit(model, digits, gradual(model, recipe, sparsity=0.8, begin=1, end=5, data=few, criterion=snip), seed=0)
    assert sparsity(model) == pytest.approx(0.8, abs=1e-3)


def test_gradual_pruning_goes_on_from_a_checkpoint(digits: Dataset, tmp_path: Any) -> None:
    long = replace(RECIPE, epochs=4)

    def run(stop: Any, checkpoint: Any) -> nn.Module:
        model = small()
        fit(
            model,
            digits,
            gradual(model, replace(long, stop=stop), sparsity=0.9, begin=1, end=13, every=3),
            seed=0,
            checkpoint=checkpoint,
        )
        return model

    class Killed(Exception):
        pass

    def kill(history: Any) -> bool:
        if len(history) == 3 and not resumed.exists():
            raise Killed
        return False

    resumed = tmp_path / "resumed"  # what a run depends on may not change, so this lies outside
    with pytest.raises(Killed):
        run(kill, tmp_path / "run.pt")
    resumed.touch()
    again, whole = run(kill, tmp_path / "run.pt"), run(kill, None)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


def test_rigl_goes_on_from_a_checkpoint(digits: Dataset, tmp_path: Any) -> None:
    """Killed where the first step of what is left is one that moves weights: their gradients must be seen."""
    steps = RECIPE.steps(len(digits.train))[0]
    every = next(n for n in range(2, 9) if (steps + 1) % n == 0)

    def run(stop: Any, checkpoint: Any) -> nn.Module:
        model = small()
        recipe = replace(RECIPE, epochs=3, stop=stop)
        moving = rigl(model, recipe, sparsity=0.8, every=every, end=3 * steps, generator=generator())
        fit(model, digits, moving, seed=0, checkpoint=checkpoint)
        return model

    class Killed(Exception):
        pass

    def kill(history: Any) -> bool:
        if len(history) == 2 and not resumed.exists():
            raise Killed
        return False

    resumed = tmp_path / "resumed"
    with pytest.raises(Killed):
        run(kill, tmp_path / "run.pt")
    resumed.touch()
    again, whole = run(kill, tmp_path / "run.pt"), run(kill, None)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))


def test_lottery_ticket(digits: Dataset) -> None:
    recipe = replace(RECIPE, epochs=3)
    make = partial(mlp, SHAPE, 10, width=16)
    for rewind in (0, 1):
        ticket = lottery_ticket(make, digits, recipe, seed=3, rounds=2, fraction=0.5, rewind_epochs=rewind)
        start = fresh(make, recipe, seed=3)
        if rewind:
            fit(start, digits, replace(recipe, epochs=1), seed=3)
        np.testing.assert_allclose(ticket.frame["sparsity"], [0, 0.5, 0.75], atol=5e-4)
        rest = replace(recipe, epochs=3 - rewind)
        for r in range(3):
            network = ticket.network(r)
            for n, layer in prunable_layers(network).items():
                assert torch.equal(weight_of(layer), weight_of(prunable_layers(start)[n]) * ticket.masks[r][n])
                if r:
                    assert not bool((ticket.masks[r][n] & ~ticket.masks[r - 1][n]).any())
            fit(network, digits, rest, seed=3)
            assert evaluate(network, digits.val).accuracy == ticket.frame["accuracy"][r]
            if r < 2:  # the next mask is what is largest of this training
                left = {n: s.masked_fill(~ticket.masks[r][n], -1) for n, s in magnitude(network).items()}
                assert_same(ticket.masks[r + 1], global_unstructured(left, 1 - 0.5 ** (r + 1)))
    for settings in ({"fraction": 1.0, "rounds": 1}, {"rounds": 0}, {"rounds": 1, "rewind_epochs": 3}):
        with pytest.raises(ValueError, match="fraction=|rewind_epochs=3"):
            lottery_ticket(make, digits, recipe, seed=0, **settings)


def test_shuffled_masks_keep_the_number_in_each_layer() -> None:
    model = small(MODELS["convnet"])
    before = random_masks(model)
    after = schedules.shuffled(before, generator())
    for n in before:
        assert after[n].shape == before[n].shape
        assert int(after[n].sum()) == int(before[n].sum())
    assert any(not torch.equal(after[n], before[n]) for n in before)
    assert_same(after, schedules.shuffled(before, generator()))


# --- RigL -------------------------------------------------------------------------------------------------------------


def authors_sparsities(shapes: dict[str, tuple[int, ...]], default: float) -> dict[str, float]:
    """The distribution as the authors' code finds it (google-research/rigl, sparse_utils.py), in floats."""
    dense: set[str] = set()
    while True:
        divisor, rhs, raw = 0.0, 0.0, {}
        for name, shape in shapes.items():
            n = np.prod(shape)
            if name in dense:
                rhs -= n * default
            else:
                rhs += n * (1 - default)
                raw[name] = np.sum(shape) / n
                divisor += raw[name] * n
        eps = rhs / divisor
        worst = max(raw.values())
        if worst * eps <= 1:
            return {name: 0.0 if name in dense else 1 - eps * raw[name] for name in shapes}
        dense |= {name for name, value in raw.items() if value == worst}


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.8, 0.9, 0.98])
@pytest.mark.parametrize("name", MODELS)
def test_erdos_renyi_kernel_is_the_authors_distribution(name: str, amount: float) -> None:
    model = small(MODELS[name])
    shapes = {n: tuple(weight_of(m).shape) for n, m in prunable_layers(model).items()}
    found = schedules.erdos_renyi_kernel(model, amount)
    expected = authors_sparsities(shapes, amount) if amount else dict.fromkeys(shapes, 0.0)
    for n in shapes:
        assert found[n] == pytest.approx(expected[n], abs=1e-12)
        assert 0 <= found[n] < 1
    kept = sum((1 - found[n]) * math.prod(shape) for n, shape in shapes.items())
    assert kept == pytest.approx((1 - amount) * sum(math.prod(shape) for shape in shapes.values()))


def authors_update(weight: np.ndarray, gradient: np.ndarray, mask: np.ndarray, fraction: float) -> np.ndarray:
    """One update as in the authors' code (sparse_optimizers_base.py, _get_update_op), without its noise."""
    ones = int(mask.sum())
    n_prune = int(ones * fraction)
    by_size = np.argsort(-np.abs(weight * mask).ravel(), kind="stable")
    kept = np.zeros(mask.size, dtype=bool)
    kept[by_size[: ones - n_prune]] = True
    grow = np.where(kept, -1.0, np.abs(gradient).ravel())
    kept[np.argsort(-grow, kind="stable")[:n_prune]] = True
    return kept.reshape(mask.shape)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.3, 1.0])
def test_drop_and_grow_is_the_authors_update(fraction: float) -> None:
    for seed in range(5):
        g = generator(seed)
        weight, gradient = torch.randn(2, 6, 5, 3, generator=g, dtype=torch.float64)
        mask = torch.rand(6, 5, 3, generator=g) < 0.4
        found = drop_and_grow(weight, gradient, mask, fraction)
        assert torch.equal(
            found, torch.from_numpy(authors_update(weight.numpy(), gradient.numpy(), mask.numpy(), fraction))
        )
        assert int(found.sum()) == int(mask.sum())
    full = torch.ones(3, 3, dtype=torch.bool)
    assert torch.equal(drop_and_grow(torch.randn(3, 3), torch.randn(3, 3), full, 0.5), full)


def test_drop_fraction_is_a_cosine() -> None:
    found = [schedules.drop_fraction(step, end=100, initial=0.3) for step in (0, 25, 50, 100, 150)]
    assert found == pytest.approx([0.3, 0.15 * (1 + math.sqrt(0.5)), 0.15, 0, 0])


@pytest.mark.parametrize("every", [1, 4])
def test_rigl_moves_weights_to_the_largest_gradients_at_constant_sparsity(every: int, digits: Dataset) -> None:
    """Replays each update from outside: mask, weight and dense gradient just before, mask and weight just after."""
    model = small()
    recipe = replace(RECIPE, epochs=5, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    last: dict[str, Any] = {}

    def objective(model_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        last["batch"] = (x, y)
        last["weights"] = copy.deepcopy(model.state_dict())
        return cross_entropy(model_, x, y)

    moves: list[int] = []
    sizes: list[dict[str, int]] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before = load_masked(small(), last["weights"])
        old, new = get_masks(before), get_masks(model)
        sizes.append({n: int(m.sum()) for n, m in new.items()})
        dense = make_permanent(copy.deepcopy(before))
        loss = F.cross_entropy(dense(last["batch"][0]), last["batch"][1])
        gradients = torch.autograd.grad(loss, [weight_of(m) for m in prunable_layers(dense).values()])
        changed = False
        for (n, layer), gradient in zip(prunable_layers(model).items(), gradients, strict=True):
            weight = masked_parts(layer)[0]
            grown = new[n] & ~old[n]
            changed |= bool(grown.any())
            assert bool((weight[grown] == 0).all())
            assert bool((optimizer.state[weight]["momentum_buffer"][grown] == 0).all())
            if bool(grown.any()):  # no place left empty had a larger gradient
                left = gradient.abs()[~new[n] & ~old[n]]
                assert float(gradient.abs()[grown].min()) >= float(left.max()) * (1 - 1e-9)
        if changed:
            moves.append(len(sizes))

    recipe = rigl(model, recipe, sparsity=0.8, every=every, end=18, generator=generator(), fraction=0.4)
    first = {n: int(m.sum()) for n, m in get_masks(model).items()}
    assert first == {
        n: weight_of(m).numel() - round(schedules.erdos_renyi_kernel(small(), 0.8)[n] * weight_of(m).numel())
        for n, m in prunable_layers(model).items()
    }
    inner = recipe.optimizer

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = inner(parameters)
        optimizer.register_step_post_hook(look)
        return optimizer

    fit(model, digits, replace(recipe, optimizer=make, objective=objective), seed=0)
    assert len(sizes) == 20
    assert all(size == first for size in sizes)
    due = list(range(every, 18, every))
    assert moves == due[: len(moves)]
    assert len(moves) >= 0.75 * len(due), "only the last moves may be of less than one weight"
    assert all(masked_parts(m)[1].gradient is None for m in prunable_layers(model).values())


def test_rigl_takes_a_sparsity_for_each_layer_and_leaves_others_dense(digits: Dataset) -> None:
    model = small()
    each = {"hidden.0": 0.9, "hidden.2": 0.5}
    fit(model, digits, rigl(model, RECIPE, sparsity=each, every=2, end=4, generator=generator()), seed=0)
    assert {n: sparsity(model, [n]) for n in each} == pytest.approx(each, abs=1e-3)
    assert sparsity(model, ["head"]) == 0
    good: dict[str, Any] = {"sparsity": 0.5, "every": 1, "end": 9, "generator": generator()}
    for name, value in [("every", 0), ("end", 0), ("fraction", 0.0), ("fraction", 1.1)]:
        with pytest.raises(ValueError, match=f"{name}={value}"):
            rigl(small(), RECIPE, **good | {name: value})


def test_uniform_sparsity() -> None:
    assert schedules.uniform(small(), 0.7) == {"hidden.0": 0.7, "hidden.2": 0.7, "head": 0.7}
    with pytest.raises(ValueError, match="sparsity=1.5"):
        schedules.uniform(small(), 1.5)
    with pytest.raises(ValueError, match="sparsity=1.5"):
        schedules.erdos_renyi_kernel(small(), 1.5)
