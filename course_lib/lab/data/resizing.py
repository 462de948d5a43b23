"""Resizing whole tensors of images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_CHUNK = 4096  # images: bounds the memory that floats take


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, size, size]: bilinear, smoothed first when shrinking (no aliasing)."""
    if images.shape[2:] == (size, size):
        return images
    parts = [
        interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for part in images.split(_CHUNK)
    ]
    return torch.cat(parts)
