"""Small networks and data that all tests of merging share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

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
