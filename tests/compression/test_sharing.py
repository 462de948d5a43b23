"""Weight sharing: k-means on a line against scikit-learn and the optimum, and codebooks that train."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from course_lib.compression.sharing import (
    INITS,
    Init,
    Shared,
    lloyd,
    optimal_centroids,
    share,
    share_model,
    shared_layers,
    unshare,
)
from course_lib.lab.data import load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.pruning.criteria import magnitude
from course_lib.pruning.masks import apply_masks, sparsity, weight_of
from course_lib.pruning.patterns import global_unstructured

EXACT = Recipe(epochs=1, precision="float64")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def error(values: Tensor, centroids: Tensor) -> float:
    return float((values.flatten()[:, None] - centroids).square().min(1).values.sum())


def small(seed: int = 0) -> Any:
    return fresh(partial(mlp, (1, 8, 8), 10, width=12), EXACT, seed=seed)


# --- k-means on a line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("clusters", [2, 7, 16])
def test_lloyd_is_k_means_from_the_same_start(init: Init, clusters: int) -> None:
    values = normal(400, seed=clusters)
    start = INITS[init](values, clusters, generator(1))
    theirs = KMeans(clusters, init=start.numpy()[:, None], n_init=1, max_iter=500, tol=0).fit(values.numpy()[:, None])
    torch.testing.assert_close(lloyd(values, start), torch.from_numpy(theirs.cluster_centers_[:, 0]).sort().values)


def test_one_turn_by_hand() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0], dtype=torch.float64)
    start = torch.tensor([0.0, 4.0, 100.0], dtype=torch.float64)
    # 2 is as near to 0 as to 4 and joins the lower one; nothing is near 100, which takes 11, the furthest from its own
    assert lloyd(values, start, steps=1).tolist() == [1.0, 10.0, 11.0]
    assert lloyd(values, torch.tensor([0.0, 4.0], dtype=torch.float64), steps=1).tolist() == [1.0, 10.5]


def test_starts_are_where_they_say() -> None:
    values = torch.tensor([8.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert INITS["linear"](values, 3, None).tolist() == [0, 4, 8]
    assert INITS["density"](values, 2, None).tolist() == [2, 6]
    assert INITS["density"](values, 8, None).tolist() == values.sort().values.tolist()
    drawn = INITS["random"](values, 4, generator())
    assert len(set(drawn.tolist())) == 4
    assert set(drawn.tolist()) <= set(values.tolist())
    assert drawn.tolist() != INITS["random"](values, 4, generator(1)).tolist()


def best_cut(values: Tensor, clusters: int) -> float:
    """The least error of all ways to cut the sorted values."""
    x = values.sort().values
    cuts = itertools.combinations(range(1, len(x)), clusters - 1)
    parts = ([x[a:b] for a, b in itertools.pairwise([0, *cut, len(x)])] for cut in cuts)
    return min(sum(float((part - part.mean()).square().sum()) for part in each) for each in parts)


@pytest.mark.parametrize("clusters", [1, 2, 4, 10])
def test_the_optimum_is_that_of_all_cuts(clusters: int) -> None:
    values = normal(10, seed=clusters) ** 3 + 100
    found = optimal_centroids(values, clusters)
    assert len(found) == clusters
    assert error(values, found) == pytest.approx(best_cut(values, clusters), rel=1e-9, abs=1e-9)


def test_lloyd_is_never_better_than_the_optimum_and_close_to_it() -> None:
    for seed in range(4):
        values = normal(300, seed=seed)
        least = error(values, optimal_centroids(values, 8))
        ratios = [error(values, share(values, 8, init, generator(seed)).codebook) / least for init in INITS]
        assert min(ratios) >= 1 - 1e-12
        assert max(ratios) < 1.6
        assert min(ratios) < 1.2


# --- Sharing ----------------------------------------------------------------------------------------------------------


def test_each_weight_has_the_nearest_value_and_zeros_stay() -> None:
    weights = normal(9, 11).masked_fill(normal(9, 11, seed=1) > 0.5, 0)
    shared = share(weights, 5)
    found = shared.dequantise()
    assert torch.equal(found == 0, weights == 0)
    distances = (weights[..., None] - shared.codebook).abs()
    torch.testing.assert_close((weights - found).abs()[weights != 0], distances.min(-1).values[weights != 0])
    for k, value in enumerate(shared.codebook, start=1):
        torch.testing.assert_close(weights[shared.codes == k].mean(), value)
    assert bool((shared.codebook.diff() > 0).all())
    torch.testing.assert_close(shared.codebook, lloyd(weights[weights != 0], INITS["linear"](weights[weights != 0], 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_of_the_weights_type_and_all_in_use(dtype: torch.dtype) -> None:
    weights = (normal(40, 40) * 1e-3).to(dtype)
    shared = share(weights, 64, "density")
    assert shared.codebook.dtype is dtype
    assert shared.dequantise().dtype is dtype
    assert len(shared.codebook.unique()) == len(shared.codebook) <= 64
    assert set(shared.codes[weights != 0].unique().tolist()) == set(range(1, len(shared.codebook) + 1))
    assert (shared.dequantise().double() - weights.double()).abs().max() < 3e-3


def test_fewer_weights_than_clusters_keep_their_values() -> None:
    weights = torch.tensor([[0.5, 0.0, -2.0, 0.5]])
    for init in INITS:
        shared = share(weights, 16, init, generator())
        assert torch.equal(shared.dequantise(), weights)
        assert shared.codebook.tolist() == [-2.0, 0.5]
    nothing = share(torch.zeros(2, 3), 4)
    assert torch.equal(nothing.dequantise(), torch.zeros(2, 3))
    assert len(nothing.codebook) == 0


def test_bits_count_codes_and_codebook() -> None:
    assert share(normal(100, 10).float(), 16).bits_per_weight == pytest.approx(4 + 16 * 32 / 1000)
    pruned = normal(100, 10).float().masked_fill(normal(100, 10, seed=1) > 0, 0)
    assert share(pruned, 16).bits_per_weight == pytest.approx(5 + 16 * 32 / 1000)  # 0 is a 17th value
    assert share(pruned, 15).bits_per_weight == pytest.approx(4 + 15 * 32 / 1000)


# --- Training ---------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_value_is_the_sum_of_its_members() -> None:
    model = small()
    plain = copy.deepcopy(model)
    share_model(model, 4)
    for name, shared in shared_layers(model).items():
        with torch.no_grad():
            plain.get_submodule(name).weight.copy_(shared.dequantise())
    x, y = normal(32, 1, 8, 8), torch.arange(32) % 10
    for each in (model, plain):
        F.cross_entropy(each(x), y).backward()
    for name, shared in shared_layers(model).items():
        gradient = plain.get_submodule(name).weight.grad
        got = model.get_submodule(name).parametrizations.weight.original.grad
        sums = [gradient[shared.codes == k].sum() for k in range(1, 5)]
        torch.testing.assert_close(got, torch.stack(sums))


def test_training_moves_the_codebook_alone_and_pruned_weights_stay_pruned() -> None:
    data = load("digits", train_size=128)
    model = small()
    apply_masks(model, global_unstructured(magnitude(model), 0.6))
    before = {name: weight_of(model.get_submodule(name)).detach().clone() for name in ("hidden.0", "hidden.2", "head")}
    assert share_model(model, {"hidden.0": 6, "head": 3}) is model
    first = shared_layers(model)
    assert {name: len(shared.codebook) for name, shared in first.items()} == {"hidden.0": 6, "head": 3}
    fit(model, data, Recipe(epochs=2, precision="float64"), seed=0)
    last = shared_layers(model)
    assert sparsity(model, ["hidden.0", "head"]) == pytest.approx(
        sum(int((before[name] == 0).sum()) for name in first) / sum(before[name].numel() for name in first)
    )
    for name, shared in last.items():
        assert torch.equal(shared.codes, first[name].codes)
        assert not torch.equal(shared.codebook, first[name].codebook)
        weight = weight_of(model.get_submodule(name))
        assert torch.equal(weight == 0, before[name] == 0)
        assert torch.equal(weight, shared.dequantise())
    names = [name for name, _ in small().named_parameters()]
    twin = copy.deepcopy(model)
    unshare(model)
    assert shared_layers(model) == {}
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model.head.weight, last["head"].dequantise())
    assert torch.equal(twin.head.weight, last["head"].dequantise()), "a copy must keep its weights"
    state = twin.state_dict()
    assert state["head.parametrizations.weight.original"].shape == (3,)


def test_an_assigned_weight_becomes_the_mean_of_its_members() -> None:
    model = share_model(small(), 3, layers=["head"])
    codes = shared_layers(model)["head"].codes
    wanted = normal(10, 12, seed=5)
    model.head.weight = wanted
    for k in (1, 2, 3):
        torch.testing.assert_close(model.head.weight[codes == k].mean(), wanted[codes == k].mean())
        assert len(model.head.weight[codes == k].unique()) == 1


def test_convolutions_share_too() -> None:
    model = fresh(partial(convnet, (1, 8, 8), 10, width=4), EXACT, seed=0)
    share_model(model, 8, init="random", generator=generator())
    for name, shared in shared_layers(model).items():
        assert len(model.get_submodule(name).weight.unique()) == len(shared.codebook) <= 8
    assert isinstance(shared_layers(model)["features.0"], Shared)


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    cases: list[tuple[str, Any]] = [
        ("clusters=0: must be a whole number of at least 1", lambda: share(normal(3, 3), 0)),
        ("init='best': must be one of linear, density, random", lambda: share(normal(3, 3), 2, "best")),  # type: ignore[arg-type]
        ("weights holds NaN or infinity", lambda: share(torch.tensor([1.0, math.nan]), 2)),
        ("clusters=4: must be at most the number of values, 3", lambda: optimal_centroids(normal(3), 4)),
        ("layers names 'neck': must be a prunable layer", lambda: share_model(small(), 4, layers=["neck"])),
        ("must be a number for each of hidden.0", lambda: share_model(small(), {"head": 4}, layers=["hidden.0"])),
        ("'head' has a parametrized weight already", lambda: share_model(share_model(small(), 4), 4, layers=["head"])),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match="(?s).*") as caught:
            call()
        assert words in str(caught.value)
    assert isinstance(small(), nn.Module)
