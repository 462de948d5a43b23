"""Small data for the tests of the capstone."""

from functools import cache

import torch

from course_lib.lab.data import Dataset, Split, load, statistics


@cache
def glyphs(train: int = 24) -> Dataset:
    """Drawn digits of 16 by 16 pixels."""
    return load("glyphs", classes="digits", size=16, count=train + 40, train_size=train, val_size=20, test_size=20)


@cache
def coloured(count: int = 30, size: int = 8) -> Dataset:
    """Noise in three channels of different means and widths, in three classes."""
    generator = torch.Generator().manual_seed(16)
    scale = torch.tensor([60.0, 120.0, 250.0])[:, None, None]
    images = (torch.rand(3 * count, 3, size, size, generator=generator) * scale).to(torch.uint8)
    labels = torch.randint(0, 3, (3 * count,), generator=generator)
    mean, std = statistics(images[:count])
    parts = [Split(images[a : a + count], labels[a : a + count], mean, std) for a in range(0, 3 * count, count)]
    return Dataset("noise", *parts, classes=("a", "b", "c"))
