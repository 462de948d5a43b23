"""Mixing: images made of two images, and their labels with them.

==============  =======================================================  ==================================
name            what it does                                             source
==============  =======================================================  ==================================
mixup           a weighted mean of two images and of their labels        Zhang et al. 2017, arXiv:1710.09412
cutmix          a rectangle of another image, labels by area             Yun et al. 2019, arXiv:1905.04899
mix, paste      what they do with given weights, rectangles, partners
soft_labels     labels as probabilities
==============  =======================================================  ==================================

The random ones are ``(x, y, generator, **settings) -> (x, y)``, with ``y`` int64 [N] or probabilities [N, K] in and
probabilities out, as ``Recipe(augment=partial(mixup, classes=10))`` takes them: ``cross_entropy`` accepts both kinds.
Each image draws a weight of its own; torchvision's ``MixUp`` and ``CutMix`` draw one a batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.preprocessing.drawing import PerImage, check_generator, check_images, dirichlet, parameters, whole
from course_lib.preprocessing.geometry import box_mask


def soft_labels(y: Tensor, classes: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels as probabilities: int64 [N] -> [N, classes], one of which is 1. Probabilities [N, K] stay what they are.

    Raises
    ------
    ValueError : positions without ``classes``, a position that is not below it, or probabilities of another number.
    """
    if y.is_floating_point() and y.ndim == 2:
        if classes is not None and y.shape[1] != classes:
            raise ValueError(f"classes={classes!r}: must be {y.shape[1]}, the number of columns of y, or None")
        return y.to(dtype)
    if y.dtype != torch.int64 or y.ndim != 1:
        raise ValueError(f"y is {y.dtype} {list(y.shape)}: must be int64 [N] or probabilities [N, K]")
    if classes is None:
        raise ValueError("classes=None: must be the number of classes where y holds their positions")
    at_least(1, classes=classes)
    # on a GPU the comparison would make it wait at each batch; scatter there stops at a position out of range itself
    if y.device.type == "cpu" and len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"y holds {int(y.max())}, classes={classes}: must be positions from 0 to {classes - 1}")
    return F.one_hot(y, classes).to(dtype) if y.device.type == "cpu" else _one_hot(y, classes, dtype)


def _one_hot(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(len(y), classes, dtype=dtype, device=y.device).scatter_(1, y[:, None], 1)


def mix(x: Tensor, y: Tensor, lam: PerImage, partner: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\lambda x_i + (1-\lambda)x_j` and the same of the labels, j the ``partner`` (int64 [N]) of i.

    ``y`` are probabilities [N, K]; :math:`\lambda` (``lam``) lies in [0, 1].
    """
    check_images(x)
    partner = _partners(x, partner)
    share = parameters(x, "lam", lam, 0, 1)
    part = parameters(y, "lam", lam, 0, 1, trailing=1)
    return torch.lerp(x[partner], x, share), torch.lerp(y[partner], y, part)


def paste(
    x: Tensor, y: Tensor, top: PerImage, left: PerImage, height: PerImage, width: PerImage, partner: Tensor
) -> tuple[Tensor, Tensor]:
    """Put a rectangle of its ``partner`` (int64 [N]) into each image; labels [N, K] are weighted by what is seen.

    The rectangle is where it was in the partner, and what of it lies outside does not count.
    """
    check_images(x)
    partner = _partners(x, partner)
    inside = box_mask(x, top, left, height, width)
    part = inside.flatten(1).to(torch.promote_types(y.dtype, torch.float32)).mean(1)[:, None].to(y.dtype)
    # a blend by 0 or 1 picks as torch.where does, in half the time
    return torch.lerp(x, x[partner], inside.to(x.dtype)), torch.lerp(y, y[partner], part)


def mixup(
    x: Tensor, y: Tensor, generator: torch.Generator, *, alpha: float = 1.0, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Mix each image and its label with another of the batch, :math:`\lambda\sim\text{Beta}(\alpha, \alpha)`.

    A small ``alpha`` leaves one of the two nearly alone; at 1 all weights are equally likely.
    """
    y = _soft(x, y, generator, alpha, classes)
    partner = torch.randperm(len(x), generator=generator)
    return mix(x, y, dirichlet(generator, alpha, len(x), 2)[:, 0], partner)


def cutmix(
    x: Tensor, y: Tensor, generator: torch.Generator, *, alpha: float = 1.0, classes: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Put a rectangle of another image of the batch into each, and mix their labels by the area.

    The rectangle has the shape of the image and :math:`1-\lambda` of its area, :math:`\lambda\sim\text{Beta}(\alpha,
    \alpha)`; its middle is drawn from all pixels, and what lies outside is cut off (and not counted).
    """
    y = _soft(x, y, generator, alpha, classes)
    count, _, height, width = x.shape
    partner = torch.randperm(count, generator=generator)
    reach = 0.5 * dirichlet(generator, alpha, count, 2)[:, 1].sqrt()
    half_height, half_width = (reach * height).floor(), (reach * width).floor()
    top = whole(generator, 0, height - 1, count) - half_height
    left = whole(generator, 0, width - 1, count) - half_width
    return paste(x, y, top, left, 2 * half_height, 2 * half_width, partner)


def _soft(x: Tensor, y: Tensor, generator: torch.Generator, alpha: float, classes: int | None) -> Tensor:
    check_images(x)
    check_generator(generator)
    require("alpha", alpha, lambda value: is_number(value) and value > 0, "a number above 0")
    return soft_labels(y, classes, torch.promote_types(x.dtype, torch.float32))


def _partners(x: Tensor, partner: Tensor) -> Tensor:
    if partner.dtype != torch.int64 or partner.shape != (len(x),):
        raise ValueError(f"partner is {partner.dtype} {list(partner.shape)}: must be int64 [{len(x)}]")
    return partner.to(x.device)
