"""Product quantisation against scikit-learn and the dequantised product, and hashed weights against their formula."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor

from course_lib.compression.hashing import HashedWeight, hash_model, hashed_places
from course_lib.compression.product import (
    ProductQuantised,
    k_means,
    product_quantise,
    quantised_vectors,
    vector_quantise,
)
from course_lib.compression.sharing import share
from course_lib.lab.data import load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh

RECIPE = Recipe(epochs=3, precision="float64")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# --- k-means ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [2, 8])
def test_k_means_is_scikit_learns_from_the_same_points(clusters: int) -> None:
    points = normal(150, 3, seed=clusters)
    found, nearest = k_means(points, clusters, generator=generator(1), steps=500)
    start = points[torch.randperm(150, generator=generator(1))[:clusters]].numpy()
    theirs = KMeans(clusters, init=start, n_init=1, max_iter=500, tol=0).fit(points.numpy())
    torch.testing.assert_close(found, torch.from_numpy(theirs.cluster_centers_))
    assert np.array_equal(nearest.numpy(), theirs.labels_)


def test_batches_are_clustered_each_for_itself() -> None:
    points = normal(4, 60, 2)
    found, nearest = k_means(points, 5, generator=generator(1))
    for each in range(4):
        alone, own = k_means(points[each], 5, generator=generator(1))
        torch.testing.assert_close(found[each], alone)
        assert torch.equal(nearest[each], own)


def test_an_empty_cluster_takes_the_furthest_point() -> None:
    points = torch.tensor([[100.0], [100.0], [100.0], [101.0], [109.0]])
    starts = {seed: torch.randperm(5, generator=generator(seed))[:3].tolist() for seed in range(60)}
    for seed in starts:
        found, _ = k_means(points, 3, generator=generator(seed))
        assert found.flatten().sort().values.tolist() == [100, 101, 109]
    # three starts at one place, where the first gets all points: the second takes the furthest, the third the next one
    together = next(seed for seed, start in starts.items() if set(start) == {0, 1, 2})
    assert k_means(points, 3, generator=generator(together), steps=1)[0].flatten().tolist() == [102, 109, 101]


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_each_place_has_its_codebook() -> None:
    weight = normal(40, 12)
    made = product_quantise(weight, 3, 8, generator=generator())
    assert made.codebooks.shape == (4, 8, 3)
    assert made.codes.shape == (40, 4)
    found = made.dequantise()
    for place in range(4):
        own = weight[:, 3 * place : 3 * place + 3]
        nearest = torch.cdist(own, made.codebooks[place]).argmin(1)
        assert torch.equal(made.codes[:, place], nearest)
        assert torch.equal(found[:, 3 * place : 3 * place + 3], made.codebooks[place][nearest])
    assert made.bits_per_weight == 3 / 3 + 4 * 8 * 3 * 64 / 480


def test_one_codebook_for_all_places() -> None:
    weight = normal(10, 6, 3, 3)
    made = vector_quantise(weight, 9, 16, generator=generator())
    assert made.codebooks.shape == (1, 16, 9)
    assert made.codes.shape == (10, 6)
    found = made.dequantise()
    assert found.shape == weight.shape
    for row, channel in [(0, 0), (9, 5), (4, 2)]:
        distances = (made.codebooks[0] - weight[row, channel].flatten()).norm(dim=1)
        assert torch.equal(found[row, channel].flatten(), made.codebooks[0][distances.argmin()])
    assert made.bits_per_weight == pytest.approx(4 / 9 + 16 * 9 * 64 / 540)


@pytest.mark.parametrize("quantise", [product_quantise, vector_quantise])
def test_products_by_table_are_those_of_the_weight(quantise: Any) -> None:
    made = quantise(normal(20, 12), 4, 6, generator=generator())
    for x in (normal(12), normal(7, 12), normal(2, 5, 12)):
        torch.testing.assert_close(made.product(x), F.linear(x, made.dequantise()))


def test_of_stretches_of_one_it_is_weight_sharing() -> None:
    weight = normal(30, 10)
    made = vector_quantise(weight, 1, 8, generator=generator(), steps=300)
    shared = share(weight, 8, "random", generator())
    torch.testing.assert_close(made.codebooks.flatten().sort().values, shared.codebook)
    torch.testing.assert_close(made.dequantise(), shared.dequantise())


def test_as_many_vectors_as_stretches_lose_nothing() -> None:
    weight = normal(8, 6).float()
    made = product_quantise(weight, 2, 8, generator=generator())
    assert torch.equal(made.dequantise(), weight)
    assert made.dequantise().dtype is torch.float32


def test_networks_get_their_weights_back() -> None:
    model = fresh(partial(convnet, (1, 8, 8), 10, width=8), RECIPE, seed=0)
    before = copy.deepcopy(model)
    quantise = partial(vector_quantise, size=9, clusters=32, generator=generator())
    small, made = quantised_vectors(model, quantise, ["features.4", "features.8"])
    assert list(made) == ["features.4", "features.8"]
    for name, each in made.items():
        assert isinstance(each, ProductQuantised)
        assert torch.equal(small.get_submodule(name).weight, each.dequantise())
        assert torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
    assert torch.equal(small.get_submodule("head").weight, model.get_submodule("head").weight)


# --- Hashing ----------------------------------------------------------------------------------------------------------


def by_hand(place: int, buckets: int, seed: int) -> tuple[int, int]:
    """The bucket and sign of one weight, in Python's whole numbers."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    value = mixed((place + mixed(seed)) % 2**64)
    return (value >> 1) % buckets, 1 - 2 * (value % 2)


def test_a_hashed_weight_is_the_formula() -> None:
    vector = normal(7)
    weight = HashedWeight((5, 4), 7, seed=3)(vector)
    for i in range(5):
        for j in range(4):
            bucket, sign = by_hand(4 * i + j, 7, 3)
            assert weight[i, j] == sign * vector[bucket]
    # the generator's published first number of seed 0: SplitMix64 of 0
    assert by_hand(0, 2**62, 0) != by_hand(1, 2**62, 0)


def test_places_are_even_and_signs_independent_of_them() -> None:
    bucket, sign = hashed_places((200, 300), 50, seed=0)
    counts = bucket.flatten().bincount(minlength=50).double()
    assert float(((counts - 1200) ** 2 / 1200).sum()) < 90  # chi squared with 49 degrees of freedom: 0.999 at 86
    assert abs(float(sign.double().mean())) < 0.02
    signed = torch.zeros(50, dtype=torch.float64).index_add(0, bucket.flatten(), sign.flatten().double())
    assert float((signed**2 / counts).sum()) < 90
    assert not torch.equal(bucket, hashed_places((200, 300), 50, seed=1)[0])
    assert torch.equal(bucket, hashed_places((200, 300), 50, seed=0)[0])


def test_gradients_are_signed_sums() -> None:
    hashed = HashedWeight((6, 5), 4, seed=1)
    vector, upstream = normal(4).requires_grad_(), normal(6, 5, seed=1)
    (hashed(vector) * upstream).sum().backward()
    assert vector.grad is not None
    for k in range(4):
        torch.testing.assert_close(vector.grad[k], (upstream * hashed.sign)[hashed.bucket == k].sum())
    torch.testing.assert_close(hashed.right_inverse(hashed(vector.detach())), vector.detach())


def test_hashed_networks_train_and_store_vectors_alone() -> None:
    data = load("digits", train_size=400)
    model: Any = hash_model(fresh(partial(mlp, (1, 8, 8), 10, width=32), RECIPE, seed=0), 8, seed=5)
    dense = fresh(partial(mlp, (1, 8, 8), 10, width=32), RECIPE, seed=0)
    assert 0.8 < (model.hidden[0].weight.std() / dense.hidden[0].weight.std()).item() < 1.25, "at the layer's scale"
    before = evaluate(model, data.val).accuracy
    fit(model, data, RECIPE, seed=0)
    assert evaluate(model, data.val).accuracy > before + 0.4
    state = model.state_dict()
    assert sum(value.numel() for value in state.values()) == 256 + 128 + 40 + 74 + 3  # vectors, biases, seeds
    again: Any = hash_model(fresh(partial(mlp, (1, 8, 8), 10, width=32), RECIPE, seed=1), 8, seed=77)
    again.load_state_dict(state)
    assert torch.equal(again.hidden[0].weight, model.hidden[0].weight)
    assert not torch.equal(model.hidden[0].weight.abs().unique(), model.hidden[2].weight.abs().unique())


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    def small() -> Any:
        return mlp((1, 4, 4), 3, width=4)

    quantise = partial(product_quantise, generator=generator())
    cases: list[tuple[str, Any]] = [
        (
            "clusters=5: must be at most the number of points, 4",
            lambda: k_means(normal(4, 2), 5, generator=generator()),
        ),
        ("steps=0", lambda: k_means(normal(4, 2), 2, generator=generator(), steps=0)),
        ("size=5: must be a divisor of 12, the numbers of a row", lambda: quantise(normal(8, 12), 5, 2)),
        ("size=0: must be", lambda: quantise(normal(8, 12), 0, 2)),
        ("weight=(8,): must be of the shape", lambda: quantise(normal(8), 2, 2)),
        ("buckets=0: must be", lambda: hashed_places((2, 2), 0, 0)),
        ("seed=-1: must be", lambda: hashed_places((2, 2), 1, -1)),
        ("compression of 'hidden.0'=0.5: must be a number of at least 1", lambda: hash_model(small(), 0.5)),
        ("must be a number for each of head", lambda: hash_model(small(), {"hidden.0": 2}, layers=["head"])),
        ("'hidden.0' has a parametrized weight already", lambda: hash_model(hash_model(small(), 2), 2)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match="(?s).*") as caught:
            call()
        assert words in str(caught.value), str(caught.value)
