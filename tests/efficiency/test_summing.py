"""Sums in few bits: against float64, and within their bounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from course_lib.efficiency.summing import (
    blocked_sum,
    compensated_sum,
    kahan_add,
    pairwise_sum,
    roundings,
    sequential_sum,
    wide_sum,
)

LOW = [torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SUMS: dict[str, tuple[Any, Any]] = {
    "sequential": (sequential_sum, roundings),
    "blocked": (partial(blocked_sum, block=16), partial(roundings, block=16)),
    "pairwise": (pairwise_sum, partial(roundings, pairwise=True)),
}


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("n", [1, 2, 17, 100, 257])
def test_sums_keep_within_their_bounds(dtype: torch.dtype, name: str, n: int) -> None:
    x = normal(50, n, seed=n).abs().to(dtype)
    total, depth = SUMS[name]
    exact = x.double().sum(-1)
    u = torch.finfo(dtype).eps / 2
    bound = (1 + u) ** depth(n) - 1
    assert total(x).dtype is dtype
    error = ((total(x).double() - exact).abs() / exact).max().item()
    assert error <= bound + 1e-15
    assert torch.equal(total(x.double()), total(x.double()))
    torch.testing.assert_close(total(x.double()), exact, rtol=1e-13, atol=0)


def test_a_sequential_sum_of_ones_stands_still() -> None:
    ones = torch.ones(3000)
    assert sequential_sum(ones.bfloat16()) == 256
    assert sequential_sum(ones.half()) == 2048
    assert wide_sum(ones.bfloat16()) == ones.sum().bfloat16()
    assert compensated_sum(ones.bfloat16()) == ones.sum().bfloat16()
    assert pairwise_sum(ones.bfloat16()[:2048]) == 2048
    assert blocked_sum(ones.half(), 64) == 3000
    assert compensated_sum(normal(4, 100)).shape == (4,)


def test_roundings_by_hand() -> None:
    assert [roundings(n) for n in (1, 2, 100)] == [0, 1, 99]
    assert [roundings(n, 10) for n in (1, 5, 10, 100, 101)] == [0, 4, 9, 18, 19]
    assert [roundings(n, pairwise=True) for n in (1, 2, 3, 4, 1024, 1025)] == [0, 1, 2, 2, 10, 11]


def test_kahan_keeps_what_was_lost() -> None:
    total, lost = kahan_add(torch.tensor(1.0).bfloat16(), torch.tensor(0.0).bfloat16(), torch.tensor(0.001).bfloat16())
    assert total == 1
    assert lost == torch.tensor(0.001).bfloat16()


def test_errors_at_the_door() -> None:
    with pytest.raises(ValueError, match="block=0: must be a whole number of at least 1"):
        blocked_sum(torch.ones(2), 0)
    with pytest.raises(ValueError, match="n=0: must be a whole number of at least 1"):
        roundings(0)
