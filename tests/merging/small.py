"""Small networks and data that all tests of merging share."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from course_lib.lab.data import Dataset, Split
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.training import Recipe, fresh

EXACT = Recipe(precision="float64")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": partial(mlp, (1, 8, 8), 4, width=6),
    "convnet": partial(convnet, (1, 8, 8), 4, width=3),
    "resnet": partial(resnet, (1, 8, 8), 4, width=3),
    "vit": partial(vit, (1, 8, 8), 4, width=8, depth=2, heads=2),
}
NAMES = [*NETWORKS]
FOLLOWED = ["mlp", "convnet", "resnet"]
"""Those whose units all go apart: no layer norm."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def network(name: str = "mlp", seed: int = 0) -> nn.Module:
    """In float64; norms, and their statistics, are no longer those of a new network."""
    model = fresh(NETWORKS[name], EXACT, seed=seed).eval()
    drawn = generator(1000 + seed)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
                for tensor in (part.weight, part.bias, *part.buffers()):
                    if tensor.is_floating_point():
                        tensor.add_(torch.rand(tensor.shape, generator=drawn, dtype=tensor.dtype))
    return model


def batch(count: int = 6, seed: int = 0) -> Tensor:
    return normal(count, 1, 8, 8, seed=seed)


def split(count: int = 40, columns: int | Sequence[int] = (1, 8, 8), classes: int = 4, seed: int = 0) -> Split:
    """Images uint8, or rows of float32 numbers, with labels that they have something to do with."""
    labels = torch.randint(classes, (count,), generator=generator(seed + 1))
    if isinstance(columns, int):
        inputs = normal(count, columns, seed=seed).float() + torch.eye(classes, columns)[labels]
        return Split(inputs, labels, (0.0,) * columns, (1.0,) * columns)
    noise = torch.randint(160, (count, *columns), generator=generator(seed)) + 20 * labels.view(-1, 1, 1, 1)
    return Split(noise.to(torch.uint8), labels, (0.4,) * columns[0], (0.25,) * columns[0])


def data(count: int = 40, columns: int | Sequence[int] = (1, 8, 8), classes: int = 4) -> Dataset:
    train, val, test = (split(n, columns, classes, seed) for n, seed in ((count, 0), (20, 1), (20, 2)))
    return Dataset("small", train, val, test, tuple(map(str, range(classes))))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def same_weights(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


# --- On a GPU ---------------------------------------------------------------------------------------------------------

Move = Callable[[Any], Any]
"""Brings a tensor, a network or a data set to where a case is computed; numbers and networks get its type, too."""
Case = Callable[[Move], Any]


def on_the_gpu_as_here(case: Case, dtype: torch.dtype = torch.float64, *, lies: str = "cuda") -> None:
    """What a case gives on the GPU it gives on the CPU, too; and its tensors lie where they should."""
    tolerance = 1e-6 if dtype == torch.float64 else 2e-3
    with mock.patch.dict(os.environ, COURSE_DEVICE="cpu"):
        here = [*_leaves(case(partial(_moved, where="cpu", dtype=dtype)))]
    there = [*_leaves(case(partial(_moved, where="cuda", dtype=dtype)))]
    for found, wanted in zip(there, here, strict=True):
        if isinstance(wanted, Tensor):
            assert (found.device.type, found.dtype) == (lies, wanted.dtype)
            found, wanted = found.detach().cpu(), wanted.detach()
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
        elif isinstance(wanted, float):
            assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance, nan_ok=True)
        else:
            assert found == wanted


def _moved(what: Any, where: str, dtype: torch.dtype) -> Any:
    numbers = isinstance(what, nn.Module) or (isinstance(what, Tensor) and what.is_floating_point())
    return what.to(where, dtype) if numbers else what.to(where)


def _leaves(found: Any) -> Iterator[Any]:
    if isinstance(found, nn.Module):
        yield from _leaves(found.state_dict())
    elif isinstance(found, pd.DataFrame):
        yield from _leaves(found.to_dict("list"))
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield key
            yield from _leaves(value)
    elif dataclasses.is_dataclass(found):
        yield from _leaves([getattr(found, field.name) for field in dataclasses.fields(found)])
    elif isinstance(found, Sequence) and not isinstance(found, str):
        for value in found:
            yield from _leaves(value)
    else:
        yield found


def every_name_once(package: Any, *groups: Iterable[str]) -> None:
    """All that a package offers stands in one of the groups, and nothing else does."""
    assert sorted(name for group in groups for name in group) == sorted(package.__all__)
