"""The script that everybody has written first: images one at a time, each through its transforms, then the loop.

It is PyTorch's MNIST example (github.com/pytorch/examples/blob/main/mnist/main.py) with the recipe's optimizer,
schedule and precision in their places, so that a race can switch one thing at a time. Nothing in it is slow on purpose:
this is what the documentation of ``DataLoader`` shows.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from course_lib.lab.arguments import require
from course_lib.lab.data import Dataset, Split
from course_lib.lab.runtime import device, seed_everything
from course_lib.lab.training import Recipe

SLOTS = ("augment", "clip_norm", "accumulate", "compile", "ema", "stop", "keep", "watch")
"""What a first script has not: the slots of a recipe that must be left as they are."""


class PerImage(TorchDataset[tuple[Tensor, int]]):
    """A split as ``torchvision.datasets`` gives it: each image a PIL image that goes through ``transform``."""

    def __init__(self, split: Split) -> None:
        images = split.images.cpu().permute(0, 2, 3, 1).numpy()  # [N, C, H, W] -> [N, H, W, C]
        self.images: np.ndarray = images[..., 0] if images.shape[-1] == 1 else images
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(split.mean, split.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def fit_per_image(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    after_epoch: Callable[[float], object] | None = None,
) -> float:
    """Train ``model`` in place through a ``DataLoader``; return the seconds that took, testing not included.

    Parameters
    ----------
    after_epoch : called with the seconds so far; what it does is not timed, and the network trains on afterwards.

    Raises
    ------
    ValueError : the recipe fills a slot that this script does not have.
    """
    usual = Recipe()
    for slot in SLOTS:
        filled = getattr(recipe, slot)
        require(f"recipe.{slot}", filled, partial(operator.eq, getattr(usual, slot)),
                "left as it is: images that come one at a time have no such slot")  # fmt: skip
    require("recipe.precision", recipe.precision, lambda name: name != "float64", "'float32' or 'bfloat16'")
    require("recipe.batch_size", recipe.batch_size, lambda size: not callable(size), "a number")
    where = device()
    seed_everything(seed)
    model = model.to(where).train()
    optimizer = recipe.optimizer(model.named_parameters())
    loader = DataLoader(
        PerImage(data.train),
        batch_size=recipe.batch_size,  # type: ignore[arg-type]  # no function: see above
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )
    schedule = recipe.schedule(optimizer, recipe.epochs * len(loader)) if recipe.schedule else None
    autocast = partial(torch.autocast, where.type, torch.bfloat16) if recipe.precision == "bfloat16" else nullcontext
    seconds = 0.0
    for _ in range(recipe.epochs):
        started = time.perf_counter()
        for x, y in loader:
            x, y = x.to(where), y.to(where)
            optimizer.zero_grad()
            with autocast():
                loss = recipe.objective(model, x, y)
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
        loss.item()  # on a GPU: until the last step is done
        seconds += time.perf_counter() - started
        if after_epoch is not None:
            after_epoch(seconds)
            model.train()
    return seconds
