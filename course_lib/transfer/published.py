"""Networks that others have trained: torchvision's weights where they lie on this computer already.

==================  ===================================================================================================
name                what it gives
==================  ===================================================================================================
``pretrained``      a network of torchvision with trained weights, and how its images are to be prepared
``available``       the names whose weights lie here
==================  ===================================================================================================

Nothing is downloaded unless ``download=True`` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import require
from course_lib.lab.data import Dataset, Split
from course_lib.lab.data.resizing import resize


class WeightsUnavailable(FileNotFoundError):
    """The weights do not lie on this computer; says where they were looked for, and the command that fetches them."""


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A trained network, in evaluation mode, and what its images must look like.

    Attributes
    ----------
    network : ``[N, 3, H, W]`` to logits ``[N, K]``.
    mean, std : by which each channel was normalised, with pixels in [0, 1].
    size : pixels a side in training and in torchvision's figures.
    classes : the names of the K classes.
    weights : torchvision's name of the weights, such as ``"ResNet18_Weights.IMAGENET1K_V1"``.
    """

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    classes: tuple[str, ...]
    weights: str

    def prepared(self, data: Dataset, size: int | None = None) -> Dataset:
        """Return a data set of images as the network knows them: three channels, its size, its normalisation.

        Grey images get three equal channels. ``size`` takes fewer pixels than the network's own, which costs accuracy
        and saves time. torchvision enlarges a little more and cuts out the middle; here the whole image is kept.

        Raises
        ------
        ValueError : the inputs are not images of one or three channels, or ``size`` is no whole number of at least 1.
        """
        pixels = self.size if size is None else size
        require("size", pixels, lambda n: isinstance(n, int) and n >= 1, "a whole number of at least 1, or None")
        return replace(
            data,
            train=self._split(data.train, pixels),
            val=self._split(data.val, pixels),
            test=self._split(data.test, pixels),
        )

    def _split(self, split: Split, size: int) -> Split:
        inputs = split.inputs
        if not isinstance(inputs, Tensor) or inputs.dtype != torch.uint8 or inputs.shape[1] not in (1, 3):
            raise ValueError("data has inputs that are no images of 1 or 3 channels: must be uint8 [N, 1 or 3, H, W]")
        images = resize(inputs, size).expand(-1, 3, -1, -1).contiguous()
        return replace(split, inputs=images, mean=self.mean, std=self.std)


def pretrained(name: str, weights: str = "DEFAULT", *, download: bool = False) -> Pretrained:
    """Return torchvision's classifier ``name`` with trained weights from the cache of ``torch.hub``.

    The cache is the folder ``hub/checkpoints`` of ``TORCH_HOME``.

    Parameters
    ----------
    name : such as ``"resnet18"`` or ``"vit_b_16"``: ``torchvision.models.list_models(module=torchvision.models)``.
    weights : which of its weights: ``"DEFAULT"``, the best, or a name such as ``"IMAGENET1K_V1"``.
    download : fetch them if they are not there.

    Raises
    ------
    ValueError : torchvision has no such classifier, or no such weights of it.
    WeightsUnavailable : they are not in the cache, and ``download`` is false.
    """
    from torchvision import models

    known = models.list_models(module=models)
    require("name", name, lambda n: n in known, f"one of torchvision's classifiers: {', '.join(known)}")
    found = _weights(name, weights)
    path = _cached(found)
    if not download and not path.is_file():
        call = f"pretrained({name!r}{'' if weights == 'DEFAULT' else f', {weights!r}'}, download=True)"
        raise WeightsUnavailable(
            f"the weights of {name!r} do not lie at {path}. To fetch them once, on a computer with a network: "
            f'python -c "from course_lib.transfer import pretrained; {call}"'
        )
    prepare = found.transforms()
    network = models.get_model(name, weights=found, progress=False).eval()
    return Pretrained(
        network,
        tuple(map(float, prepare.mean)),
        tuple(map(float, prepare.std)),
        int(prepare.crop_size[0]),
        tuple(found.meta["categories"]),
        str(found),
    )


def available() -> list[str]:
    """Return the names of torchvision's classifiers whose default weights lie in the cache."""
    from torchvision import models

    return [name for name in models.list_models(module=models) if _cached(_weights(name, "DEFAULT")).is_file()]


def _weights(name: str, weights: str) -> Any:
    from torchvision.models import get_model_weights

    kinds: Any = get_model_weights(name)
    there = list(kinds.__members__)  # DEFAULT is among them, another name of the best
    require("weights", weights, lambda word: word in there, f"one of {', '.join(map(repr, there))}")
    return kinds[weights]


def _cached(weights: Any) -> Path:
    """Where torch.hub keeps a file that it has downloaded from this address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
