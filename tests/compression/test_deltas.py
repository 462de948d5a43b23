"""Deltas of fine-tuned networks: each way against its formula, files, and scales that are fitted again."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from course_lib.compression.deltas import (
    Exact,
    LowRank,
    Signs,
    Sparse,
    bits_per_weight,
    compress_delta,
    delta,
    delta_bytes,
    exact,
    largest,
    lowered,
    read_delta,
    refit_scales,
    restore,
    signed,
    stored_bits,
)
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, fit, fresh, logits_of

RECIPE = Recipe(epochs=2, precision="float64")
WAYS: dict[str, Any] = {
    "exact": exact,
    "lowered": partial(lowered, rank=2),
    "largest": partial(largest, keep=0.1),
    "signed": signed,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=300)


@pytest.fixture(scope="module")
def pair(digits: Dataset) -> tuple[nn.Module, nn.Module]:
    base = fresh(partial(convnet, (1, 8, 8), 10, width=8), RECIPE, seed=0)
    fit(base, digits, RECIPE, seed=0)
    tuned = copy.deepcopy(base)
    fit(tuned, digits, RECIPE, seed=1)
    return base.eval(), tuned.eval()


# --- Four ways --------------------------------------------------------------------------------------------------------


def test_low_rank_is_the_nearest() -> None:
    difference = normal(8, 3, 3, 3)
    part = lowered(difference, 2)
    assert isinstance(part, LowRank)
    u, s, vt = np.linalg.svd(difference.flatten(1).numpy(), full_matrices=False)
    np.testing.assert_allclose(part.dense().flatten(1), u[:, :2] * s[:2] @ vt[:2], atol=1e-12)
    assert stored_bits(part) == 64 * 2 * (8 + 27)
    assert isinstance(lowered(normal(4, 4), 2), Exact), "two factors as large as the whole"


@pytest.mark.parametrize("keep", [0.01, 0.2, 1.0])
def test_the_largest_are_kept_where_they_are(keep: float) -> None:
    difference = normal(20, 40)
    part = largest(difference, keep)
    found, count = part.dense(), round(keep * 800)
    least = difference.abs().flatten().sort().values[-count]
    assert torch.equal(found, torch.where(difference.abs() >= least, difference, 0))
    fillers = len(part.values) - count
    assert fillers == int((part.values == 0).sum())
    assert stored_bits(part) == (64 + 8) * len(part.values)
    nothing = largest(torch.zeros(3, 4), 0.5)
    assert torch.equal(nothing.dense(), torch.zeros(3, 4))


def test_far_apart_entries_need_fillers() -> None:
    difference = torch.zeros(2, 1000)
    difference[0, 3], difference[1, 900] = 2.0, -1.0
    part = largest(difference, 0.001)
    assert torch.equal(part.dense(), difference)
    assert part.steps.tolist() == [3, *[255] * 7, 1900 - 3 - 7 * 256 - 1]


def test_the_mean_size_is_the_best_scale_for_the_signs() -> None:
    difference = normal(15, 7)
    part = signed(difference)
    assert float(part.scale) == pytest.approx(float(difference.abs().mean()))
    torch.testing.assert_close(part.dense(), difference.sign() * difference.abs().mean())

    def error(scale: float) -> float:
        return float((difference - scale * difference.sign()).square().sum())

    best = float(part.scale)
    assert error(best) < min(error(1.01 * best), error(0.99 * best))
    assert stored_bits(part) == 8 * 14 + 64  # 105 signs in 14 bytes, and a scale


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_the_exact_delta_gives_the_tuned_network(pair: tuple[nn.Module, nn.Module]) -> None:
    base, tuned = pair
    before = copy.deepcopy(base.state_dict())
    found = restore(base, compress_delta(base, tuned, exact))
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-14, atol=1e-14)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert delta(base, tuned).keys() == before.keys()


@pytest.mark.parametrize("way", WAYS)
def test_a_file_restores_what_the_parts_restore(way: str, pair: tuple[nn.Module, nn.Module]) -> None:
    base, tuned = pair
    parts = compress_delta(base, tuned, WAYS[way])
    data = delta_bytes(parts)
    mine, theirs = restore(base, parts).state_dict(), restore(base, read_delta(data)).state_dict()
    assert all(torch.equal(value, theirs[name]) and value.dtype is theirs[name].dtype for name, value in mine.items())
    for name, value in tuned.state_dict().items():  # biases, norms and their statistics are exact in any case
        if value.ndim < 2:
            torch.testing.assert_close(mine[name], value)
    assert len(data) == pytest.approx(sum(map(stored_bits, parts.values())) / 8, abs=900)  # and a header
    with pytest.raises(ValueError, match="damaged"):
        read_delta(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="no file of the format 'craft-dl'"):
        read_delta(b"PK" + data)


def test_bits_are_counted_over_all_numbers(pair: tuple[nn.Module, nn.Module]) -> None:
    base, tuned = pair
    parts = compress_delta(base, tuned, signed)
    matrices = [p.numel() for p in base.parameters() if p.ndim > 1]
    others = sum(v.numel() for v in base.state_dict().values() if v.ndim < 2)
    bits = sum(8 * -(-n // 8) + 64 for n in matrices) + 64 * others
    assert bits_per_weight(parts) == pytest.approx(bits / (sum(matrices) + others))
    assert bits_per_weight(compress_delta(base, tuned, exact)) == 64
    assert {type(part) for name, part in parts.items() if "head.weight" in name} == {Signs}
    assert isinstance(compress_delta(base, tuned, WAYS["largest"])["head.weight"], Sparse)


def test_coarse_deltas_are_nearer_to_the_tuned_network_than_the_base_is(
    pair: tuple[nn.Module, nn.Module], digits: Dataset
) -> None:
    base, tuned = pair
    wanted = logits_of(tuned, digits.test)
    away = (logits_of(base, digits.test) - wanted).norm()
    for way in ("lowered", "largest", "signed"):
        found = logits_of(restore(base, compress_delta(base, tuned, WAYS[way])), digits.test)
        assert (found - wanted).norm() < 0.9 * away, way


def test_fitted_scales_bring_the_logits_nearer_and_leave_signs_alone(
    pair: tuple[nn.Module, nn.Module], digits: Dataset
) -> None:
    base, tuned = pair
    parts = compress_delta(base, tuned, signed)
    before = copy.deepcopy(base.state_dict())
    better = refit_scales(base, tuned, parts, digits.train, steps=40)
    wanted = logits_of(tuned, digits.test)
    first, last = (logits_of(restore(base, each), digits.test) for each in (parts, better))
    assert (last - wanted).square().mean() < 0.9 * (first - wanted).square().mean()
    moved = 0
    for name, part in parts.items():
        other = better[name]
        if isinstance(part, Signs):
            assert isinstance(other, Signs)
            assert torch.equal(part.positive, other.positive)
            moved += not torch.equal(part.scale, other.scale)
            assert float(other.scale) > 0
        else:
            assert other is part
    assert moved == 4
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert bits_per_weight(better) == bits_per_weight(parts)


def test_a_scale_finds_back_to_the_true_one(digits: Dataset) -> None:
    """A tuned network that is base plus 0.02 times signs: the fitted scale must be 0.02, wherever it began."""
    base = fresh(partial(mlp, (1, 8, 8), 10, width=8, depth=1), RECIPE, seed=0)
    parts = {"head.weight": Signs(normal(10, 8) > 0, torch.tensor(0.02, dtype=torch.float64))}
    tuned = restore(base, parts)
    wrong: Any = {"head.weight": Signs(parts["head.weight"].positive, torch.tensor(0.05, dtype=torch.float64))}
    found: Any = refit_scales(base, tuned, wrong, digits.train, steps=300, lr=0.03)
    assert float(found["head.weight"].scale) == pytest.approx(0.02, rel=0.02)


def test_a_matrix_that_was_not_tuned_stays_as_it_is(pair: tuple[nn.Module, nn.Module], digits: Dataset) -> None:
    base, tuned = pair
    tuned = copy.deepcopy(tuned)
    tuned.load_state_dict({**tuned.state_dict(), "features.0.weight": base.state_dict()["features.0.weight"]})
    found = refit_scales(base, tuned, compress_delta(base, tuned, signed), digits.train, steps=3)
    assert torch.equal(restore(base, found).state_dict()["features.0.weight"], base.state_dict()["features.0.weight"])


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(pair: tuple[nn.Module, nn.Module], digits: Dataset) -> None:
    base, tuned = pair
    other = fresh(partial(convnet, (1, 8, 8), 10, width=4), RECIPE, seed=0)
    cases: list[tuple[str, Any]] = [
        ("tuned differs from base in 'features.0.weight'", lambda: delta(base, other)),
        ("keep=0: must be a number above 0 and not above 1", lambda: largest(normal(3, 3), 0)),
        ("rank=0", lambda: lowered(normal(9, 9), 0)),
        (
            "parts: 'head.weight' [10, 32] does not fit base",
            lambda: restore(other, {"head.weight": exact(normal(10, 32))}),
        ),
        ("parts: 'neck' [2] does not fit base", lambda: restore(base, {"neck": exact(normal(2))})),
        ("steps=0: must be", lambda: refit_scales(base, tuned, {}, digits.train, steps=0)),
        ("must be a delta of which some part is signed", lambda: refit_scales(base, tuned, {}, digits.train)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match="(?s).*") as caught:
            call()
        assert words in str(caught.value), str(caught.value)


def test_tied_weights_get_their_difference_once() -> None:
    def tied(shift: float) -> nn.ModuleDict:
        parts = nn.ModuleDict({"into": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        parts["out"].weight = parts["into"].weight
        with torch.no_grad():
            parts["into"].weight.copy_(normal(5, 3) + shift)
        return parts

    base, tuned = tied(0.0), tied(0.5)
    restored = restore(base, compress_delta(base, tuned, exact))
    torch.testing.assert_close(restored["out"].weight, tuned["out"].weight)
    assert restored["out"].weight is restored["into"].weight
