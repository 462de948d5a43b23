"""What the tests of augmentation share: images, generators, and torchvision's functions image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import course_lib  # noqa: F401  mends torchvision's import where torch is a CPU-only build

from torchvision.transforms import v2  # isort: skip

__all__ = ["generator", "images", "one_by_one", "v2"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Photographs have all levels of 256; so have these, at random."""
    return torch.randint(0, 256, tuple(shape), generator=generator(seed)).to(dtype) / 255


def one_by_one(x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``function(image, number)`` of each image."""
    return torch.stack([function(image, k) for k, image in enumerate(x)])
