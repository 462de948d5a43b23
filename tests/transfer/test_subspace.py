"""Random subspaces: projections against matrices written out, and gradients against those of all weights."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

from course_lib import transfer
from course_lib.lab.models import freeze
from course_lib.lab.training import cross_entropy, fit
from tests.transfer.small import EXACT, NAMES, batch, close, data, gradients, moved, network, normal, untouched

PROJECTIONS: list[Any] = [transfer.Dense, transfer.Fastfood]


def matrix_of(projection: nn.Module, dimension: int) -> torch.Tensor:
    return torch.stack([projection(row) for row in torch.eye(dimension, dtype=torch.float64)], 1)


@pytest.mark.parametrize("size", [1, 2, 8, 64, 128])
def test_the_transform_is_hadamards_matrix(size: int) -> None:
    x = normal(3, size)
    close(transfer.walsh_hadamard(x), x @ torch.from_numpy(hadamard(size).astype(float)), 1e-12)
    y = normal(size).requires_grad_()
    assert torch.autograd.gradcheck(transfer.walsh_hadamard, y)


def test_the_transform_of_many_numbers() -> None:
    x = normal(8192)  # 64 * 64 * 2: more than two steps
    close(transfer.walsh_hadamard(x), torch.from_numpy(hadamard(8192)).double() @ x, 1e-10)
    close(transfer.walsh_hadamard(x.view(2, 4096))[1], torch.from_numpy(hadamard(4096)).double() @ x[4096:], 1e-10)


def test_dense_columns_have_norm_one() -> None:
    found = matrix_of(transfer.Dense(50, 7, seed=3), 7)
    close(found.norm(dim=0), torch.ones(7, dtype=torch.float64), 1e-12)
    assert torch.equal(found, matrix_of(transfer.Dense(50, 7, seed=3), 7))
    assert not torch.equal(found, matrix_of(transfer.Dense(50, 7, seed=4), 7))
    assert (found.mT @ found - torch.eye(7)).abs().max() < 0.6, "columns are nearly orthogonal"


def test_fastfood_is_its_product_of_matrices() -> None:
    total, dimension = 50, 7
    found = transfer.Fastfood(total, dimension, seed=3)
    h = hadamard(64).astype(float)
    shuffle = np.eye(64)[found.order.numpy()]
    product = h @ np.diag(found.sizes.numpy()) @ shuffle @ h @ np.diag(found.signs.numpy())
    close(matrix_of(found, dimension), torch.from_numpy(product[:total, :dimension]), 1e-12)
    assert set(found.signs.tolist()) == {-1.0, 1.0}


def test_fastfood_columns_have_norm_one_on_average_and_exactly_for_powers_of_two() -> None:
    close(matrix_of(transfer.Fastfood(64, 9, seed=0), 9).norm(dim=0), torch.ones(9, dtype=torch.float64), 1e-12)
    columns = [matrix_of(transfer.Fastfood(40, 4, seed=seed), 4) for seed in range(25)]
    assert torch.stack(columns).square().sum(1).mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_it_begins_at_the_network_and_sees_projected_gradients(name: str, projection: Any) -> None:
    model = network(name)
    untouched(model, lambda: transfer.in_subspace(model, 5, seed=1, projection=projection))
    found = transfer.in_subspace(model, 5, seed=1, projection=projection)
    x, y = batch(), torch.arange(6) % 4
    close(found(x), model(x), 0)
    assert transfer.trainable(found) == 5
    (slope,) = gradients(cross_entropy(found, x, y), found).values()
    whole = torch.cat([g.flatten() for g in gradients(cross_entropy(model, x, y), model).values()])
    close(slope, matrix_of(found.projection, 5).mT @ whole)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_run_moves_in_the_subspace_alone(projection: Any) -> None:
    model = network("convnet")
    found = transfer.in_subspace(model, 5, seed=1, projection=projection)
    start = copy.deepcopy(found)
    fit(found, data(40), EXACT, seed=0)
    changed = moved(start, found)
    assert {n for n in changed if "running" not in n and "batches" not in n} == {"z"}
    assert any("running_mean" in n for n in changed), "batch norm's statistics are no weights"
    assert not [name for name in found.state_dict() if name.startswith("projection.")], "a seed is enough"
    plain = found.plain()
    close(plain.eval()(batch()), found.eval()(batch()))
    assert transfer.trainable(plain) == transfer.trainable(model)
    apart = torch.cat([(b - a).flatten() for a, b in zip(model.parameters(), plain.parameters(), strict=True)]).detach()
    close(apart, matrix_of(found.projection, 5) @ found.z.detach())


def test_what_does_not_train_stays_outside() -> None:
    model = network("mlp")
    freeze(model.hidden)  # type: ignore[arg-type]
    found = transfer.in_subspace(model, 28, seed=0)  # as many as the head has weights
    assert found.projection(found.z).shape == (6 * 4 + 4,)


def test_the_least_dimension_that_does() -> None:
    found = {10: 0.3, 100: 0.91, 50: 0.90, 1000: 0.99}
    assert transfer.intrinsic_dimension(found, 1.0) == 50
    assert transfer.intrinsic_dimension(found, 1.0, share=0.95) == 1000
    assert transfer.intrinsic_dimension({10: float("nan")}, 0.5) is None


def test_bad_input_is_named() -> None:
    model = network("mlp")
    count = transfer.trainable(model)
    cases: list[tuple[str, Any]] = [
        ("dimension=0: must be", lambda: transfer.in_subspace(model, 0, seed=0)),
        (
            f"dimension={count + 1}: must be at most the number of weights, {count}",
            lambda: transfer.in_subspace(model, count + 1, seed=0, projection=transfer.Fastfood),
        ),
        ("must be a network in which something trains", lambda: transfer.in_subspace(freeze(network()), 2, seed=0)),
        ("x=[3, 6]: must be", lambda: transfer.walsh_hadamard(normal(3, 6))),
        ("share=0: must be", lambda: transfer.intrinsic_dimension({}, 1.0, share=0)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subspaces_on_the_gpu(projection: Any, dtype: torch.dtype) -> None:
    model = network("convnet").to(dtype)
    here = transfer.in_subspace(model, 5, seed=1, projection=projection)
    there = transfer.in_subspace(copy.deepcopy(model).cuda(), 5, seed=1, projection=projection)
    with torch.no_grad():
        here.z.fill_(0.1)
        there.z.fill_(0.1)
    close(there(batch().to("cuda", dtype)).cpu(), here(batch().to(dtype)), 1e-8 if dtype == torch.float64 else 1e-4)
