"""Task vectors: arithmetic, TIES coordinate by coordinate, DARE's mean and variance."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from course_lib import merging
from tests.merging.small import NAMES, close, generator, network, normal, same_weights


def vectors(count: int = 3) -> list[dict[str, Tensor]]:
    return [{"a": normal(4, 5, seed=seed), "b": normal(7, seed=100 + seed)} for seed in range(count)]


# --- Arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_added_to_its_base_a_vector_gives_the_tuned_weights(name: str) -> None:
    base, tuned = network(name, 0), network(name, 1)
    vector = merging.task_vector(base, tuned)
    found = merging.add(base, [vector])
    for key, value in found.named_parameters():
        close(value, dict(tuned.named_parameters())[key], 1e-14)
    for mine, theirs in zip(found.buffers(), base.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    for key, value in merging.add(base, [vector], 0.5).named_parameters():
        close(value, dict(merging.interpolate(base, tuned, 0.5).named_parameters())[key], 1e-14)
    same_weights(merging.add(found, [merging.negate(vector)]), base, 1e-14)


def test_several_are_summed_and_a_negated_one_goes_beyond_the_base() -> None:
    base, first, second = (network("mlp", seed) for seed in range(3))
    a, b = merging.task_vector(base, first), merging.task_vector(base, second)
    found = dict(merging.add(base, [a, merging.negate(b)], 0.3).named_parameters())
    for key, value in base.named_parameters():
        x, y = (dict(model.named_parameters())[key] for model in (first, second))
        close(found[key], value + 0.3 * (x - value) - 0.3 * (y - value), 1e-13)


def test_similarities_are_cosines() -> None:
    given = vectors()
    rows = [np.concatenate([each["a"].flatten().numpy(), each["b"].numpy()]) for each in given]
    found = merging.similarities([*given, merging.negate(given[0]), {"a": 0 * given[0]["a"], "b": 0 * given[0]["b"]}])
    for i in range(3):
        for j in range(3):
            expected = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
            assert found[i, j].item() == pytest.approx(expected)
    assert found[0, 3].item() == pytest.approx(-1)
    assert (found[4] == 0).all()


# --- TIES -------------------------------------------------------------------------------------------------------------


def ties_by_hand(given: list[dict[str, Tensor]], keep: float) -> np.ndarray:
    """One weight after the other, as the paper's algorithm 1 has it."""
    rows = np.stack([np.concatenate([each["a"].flatten().numpy(), each["b"].numpy()]) for each in given])
    count = round(keep * rows.shape[1])
    for row in rows:
        largest = sorted(range(len(row)), key=lambda i: -abs(row[i]))[:count]
        for i in set(range(len(row))) - set(largest):
            row[i] = 0.0
    merged = np.zeros(rows.shape[1])
    for i in range(rows.shape[1]):
        positive = sum(value for value in rows[:, i] if value > 0)
        negative = -sum(value for value in rows[:, i] if value < 0)
        if positive != negative:
            agree = [value for value in rows[:, i] if (value > 0) == (positive > negative) and value != 0]
            merged[i] = np.mean(agree)
    return merged


@pytest.mark.parametrize("keep", [0.2, 0.6, 1.0])
def test_ties_is_the_algorithm(keep: float) -> None:
    given = vectors(4)
    before = copy.deepcopy(given)
    found = merging.ties(given, keep)
    close(torch.cat([found["a"].flatten(), found["b"]]), torch.from_numpy(ties_by_hand(given, keep)), 1e-14)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(given, before, strict=True) for name in a)


def test_the_three_steps_on_four_weights() -> None:
    one, two = ({"w": torch.tensor(values)} for values in ([3.0, -1.0, 0.1, 2.0], [1.0, 2.0, 0.2, -2.0]))
    assert merging.trim(one, 0.5)["w"].tolist() == [3, 0, 0, 2]
    assert merging.elect([one, two])["w"].tolist() == [1, 1, 1, 0]
    assert merging.disjoint_mean([one, two], merging.elect([one, two]))["w"].tolist() == pytest.approx([2, 2, 0.15, 0])
    assert merging.ties([one, two], 0.5)["w"].tolist() == [3, 2, 0, 0]
    assert merging.ties([one])["w"].tolist() == [3, 0, 0, 0]  # one of four, at least


# --- DARE -------------------------------------------------------------------------------------------------------------


def test_dare_is_unbiased_with_the_variance_that_it_says() -> None:
    vector = {"w": torch.linspace(-2, 2, 9, dtype=torch.float64)}
    source = generator(0)
    drawn = torch.stack([merging.dare(vector, 0.75, generator=source)["w"] for _ in range(4000)])
    error = (vector["w"].square() * 3 / 4000).sqrt()
    assert ((drawn.mean(0) - vector["w"]).abs() <= 4 * error).all()
    torch.testing.assert_close(drawn.var(0), vector["w"].square() * 3, rtol=0.08, atol=0)
    assert set(drawn[:, 0].tolist()) == {0.0, -8.0}
    assert (drawn[:, 0] == 0).double().mean().item() == pytest.approx(0.75, abs=0.03)


def test_dare_drops_nothing_where_asked_and_is_repeatable() -> None:
    given = vectors(1)[0]
    nothing = merging.dare(given, 0, generator=generator())
    assert all(torch.equal(nothing[name], value) for name, value in given.items())
    first, second = (merging.dare(given, 0.9, generator=generator(4)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in given)
    assert merging.dare({"w": torch.ones(3).bfloat16()}, 0.5, generator=generator())["w"].dtype is torch.bfloat16


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    base = network()
    vector, other = merging.task_vector(base, network("mlp", 1)), vectors(1)[0]
    cases: list[tuple[str, Any]] = [
        ("tuned differs from base in", lambda: merging.task_vector(base, network("vit"))),
        ("vectors=[]: must be at least one task vector", lambda: merging.add(base, [])),
        ("vectors is one task vector: must be a list of them", lambda: merging.add(base, vector)),  # type: ignore[arg-type]
        ("vectors[0] does not fit 'hidden.0.weight' [6, 64] of the network base", lambda: merging.add(base, [other])),
        ("vectors[1] does not fit vectors[0]", lambda: merging.ties([vector, other])),
        ("scale=nan: must be a number", lambda: merging.add(base, [vector], float("nan"))),
        ("keep=0: must be a number above 0 and not above 1", lambda: merging.ties([vector], 0)),
        ("keep=1.1: must be", lambda: merging.trim(vector, 1.1)),
        ("drop=1: must be a number from 0 to below 1", lambda: merging.dare(vector, 1, generator=generator())),
        ("vectors=[]: must be", lambda: merging.similarities([])),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_task_vectors_on_the_gpu() -> None:
    base, tuned = network("convnet", 0), network("convnet", 1)
    found = []
    for side in (lambda model: model, lambda model: copy.deepcopy(model).cuda()):
        here = side(base)
        vector = merging.task_vector(here, side(tuned))
        merged = merging.ties([vector, merging.dare(vector, 0.5, generator=generator())], 0.4)
        found.append(merging.add(here, [merged], 0.7).cpu())
    same_weights(found[1], found[0], 1e-10)
