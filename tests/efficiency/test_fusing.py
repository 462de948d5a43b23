"""Chains of operations: against torch's own, and their memory passes counted."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.efficiency import fusing
from course_lib.efficiency.fusing import (
    BIAS_GELU_RESIDUAL,
    FUSED,
    Moved,
    bias_gelu_residual,
    bias_gelu_residual_into,
    blocked,
    compilations,
    compiled,
    compiler_available,
    graph_breaks,
    in_place_error,
    layer_norm_by_parts,
    moved,
    rows_that_fit,
    traffic,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def chain(rows: int = 7, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return normal(rows, width), normal(width, seed=1), normal(rows, width, seed=2)


# --- Chains -----------------------------------------------------------------------------------------------------------


def test_the_chain_is_torchs_gelu() -> None:
    x, bias, residual = chain()
    expected = residual + F.gelu(x + bias, approximate="tanh")
    close(bias_gelu_residual(x, bias, residual), expected)
    out, scratch = torch.empty_like(x), torch.empty_like(x)
    assert bias_gelu_residual_into(x, residual, bias=bias, out=out, scratch=scratch) is out
    close(out, expected)


@pytest.mark.filterwarnings("error")  # torch warns of an out= that has another size
@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_blocks_of_any_size(block: int) -> None:
    x, bias, residual = chain()
    expected = residual + F.gelu(x + bias, approximate="tanh")
    close(blocked(partial(bias_gelu_residual_into, bias=bias), x, residual, block=block), expected)
    out = torch.empty_like(x)
    assert blocked(partial(bias_gelu_residual_into, bias=bias), x, residual, block=block, out=out) is out
    close(out, expected)


def test_layer_norm_by_parts_is_torchs() -> None:
    x, weight, bias = normal(3, 4, 6), normal(6, seed=1), normal(6, seed=2)
    close(layer_norm_by_parts(x, weight, bias, eps=0.1), F.layer_norm(x, (6,), weight, bias, eps=0.1))


# --- Memory passes ----------------------------------------------------------------------------------------------------


def test_the_formula_is_what_is_moved() -> None:
    rows, width = 50, 8
    x, bias, residual = chain(rows, width)
    found = moved(bias_gelu_residual, x, bias, residual)
    small = width * 8  # the bias, which the formula leaves out
    assert [each.name for each in found] == [
        "add",
        *["mul"] * 2,
        "add",
        *["mul"] * 2,
        "tanh",
        "add",
        "mul",
        "mul",
        "add",
    ]
    assert sum(each.total for each in found) - small == traffic(BIAS_GELU_RESIDUAL, rows * width, 8)
    for each, expected in zip(found, BIAS_GELU_RESIDUAL, strict=True):
        extra = small * (each is found[0])
        assert (each.read - extra, each.written) == (expected.reads * x.nbytes, expected.writes * x.nbytes)
    assert traffic(BIAS_GELU_RESIDUAL, 100) == 4 * 100 * 25
    assert traffic(FUSED, 100, 2) == 2 * 100 * 3


def test_what_operations_move() -> None:
    x = normal(10, 4)
    assert moved(lambda: x.exp()) == [Moved("exp", 320, 320)]
    assert moved(lambda: x.clone().exp_())[1] == Moved("exp_", 320, 320)
    assert moved(lambda: torch.exp(x, out=torch.empty_like(x))) == [Moved("exp", 320, 320)]
    assert moved(lambda: x + x) == [Moved("add", 320, 320)]  # one array, read once
    assert moved(lambda: x + x.t().contiguous().t()[:, :1])[1] == Moved("add", 320 + 80, 320)
    assert moved(lambda: x.view(-1).expand(3, 40)) == []
    assert moved(lambda: torch.exp(x[:1].expand(10, 4))) == [Moved("exp", 32, 320)]  # read from the cache
    assert moved(lambda: x[:5].sum()) == [Moved("sum", 160, 8)]
    assert moved(lambda: torch.cat([x, x[:5]])) == [Moved("cat", 480, 480)]
    assert Moved("a", 3, 4).total == 7


def test_in_place_operations_move_as_much() -> None:
    x, bias, residual = chain(50, 8)
    out, scratch = torch.empty_like(x), torch.empty_like(x)
    found = moved(lambda: bias_gelu_residual_into(x, residual, bias=bias, out=out, scratch=scratch))
    assert sum(each.total for each in found) - 64 == traffic(BIAS_GELU_RESIDUAL, 400, 8)


def test_rows_that_fit() -> None:
    assert rows_that_fit(1 << 20, 256) == 256
    assert rows_that_fit(4 * 4 * 10 * 3 - 1, 10) == 2
    assert rows_that_fit(1, 1000) == 1


def test_what_autograd_forbids() -> None:
    x = normal(3)
    assert in_place_error(lambda leaf: leaf.exp().add(1), x) is None
    assert in_place_error(lambda leaf: (leaf * 2).add_(1), x) is None
    kept = in_place_error(lambda leaf: leaf.exp().add_(1), x)
    assert kept is not None
    assert "modified by an inplace operation" in kept
    at_once = in_place_error(lambda leaf: leaf.add_(1), x)
    assert at_once is not None
    assert "leaf" in at_once


# --- Compilers --------------------------------------------------------------------------------------------------------


def test_graphs_are_counted_per_shape() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x + 1

    calls = [(normal(n),) for n in (4, 4, 5, 6, 7)]
    assert compilations(double, calls, dynamic=False) == [1, 1, 2, 3, 4]
    assert compilations(double, calls) == [1, 1, 2, 2, 2]
    assert compilations(double, calls, dynamic=True) == [1, 1, 1, 1, 1]


def test_graph_breaks_are_named() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        if x.sum() > 0:
            x = x * 2
        return x

    found = graph_breaks(broken, torch.ones(3))
    assert found.graphs == 2
    assert found.reasons == ("`if x.sum() > 0:`: Python branches on the value of a tensor",)
    assert "Tensor.item()" in graph_breaks(lambda x: x + x.sum().item(), torch.ones(3)).reasons[0]
    assert graph_breaks(lambda x: x + 1, torch.ones(3)) == (1, ())


def test_without_a_compiler_the_function_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiler_available()
    made = compiled(bias_gelu_residual)
    assert made.backend == "eager"
    assert "C++ compiler" in made.note
    close(made(*chain()), bias_gelu_residual(*chain()))
    torch.compiler.reset()


def test_what_a_compiler_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    asked: list[str] = []
    monkeypatch.setenv("CXX", "some-compiler -O3")
    monkeypatch.setattr(shutil, "which", lambda command: asked.append(command) or "there")
    monkeypatch.setattr(fusing.sysconfig, "get_path", lambda name: str(tmp_path))
    assert not compiler_available(), "Python.h is missing"
    (tmp_path / "Python.h").touch()
    assert compiler_available()
    assert asked == ["some-compiler"] * 2
    monkeypatch.setattr(torch, "compile", lambda fn, dynamic: fn)
    made = compiled(bias_gelu_residual)
    assert (made.backend, made.note) == ("inductor", "")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    x, bias, residual = (t.float().cuda() for t in chain(64, 32))
    expected = residual + F.gelu(x + bias, approximate="tanh")
    for found in (
        bias_gelu_residual(x, bias, residual),
        blocked(partial(bias_gelu_residual_into, bias=bias), x, residual, block=16),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        compiled(bias_gelu_residual, device="cuda")(x, bias, residual), expected, rtol=1e-4, atol=1e-5
    )


def test_errors_at_the_door() -> None:
    with pytest.raises(ValueError, match="block=0: must be a whole number of at least 1"):
        blocked(bias_gelu_residual_into, normal(2, 2), block=0)
    with pytest.raises(ValueError, match="n=0"):
        traffic(FUSED, 0)
    with pytest.raises(ValueError, match="cache=0"):
        rows_that_fit(0, 1)
