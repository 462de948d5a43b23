"""Colour: what the pixels of an image say, not where they are. Each image by its own parameters, whole batches at once.

===========================  ==========================================================  =============================
name                         what it does to an image                                    ``v2.functional``
===========================  ==========================================================  =============================
brightness                   multiplies its pixels                                       ``adjust_brightness``
contrast                     blends it with its mean grey                                ``adjust_contrast``
saturation                   blends it with itself in grey                               ``adjust_saturation``
sharpness                    blends it with a blurred one                                ``adjust_sharpness``
invert                       dark becomes bright                                         ``invert``
posterize                    leaves so many bits of each pixel                           ``posterize``
solarize                     inverts what is bright                                      ``solarize``
autocontrast                 stretches each channel to [0, 1]                            ``autocontrast``
equalize                     makes all of 256 levels about equally frequent              ``equalize``
add_noise                    adds given noise                                            ``gaussian_noise``
random_brightness_contrast   random factors, evenly around 1                             ``v2.ColorJitter``
random_noise                 a normal number for each pixel                              ``v2.GaussianNoise``
===========================  ==========================================================  =============================

Images are floats [N, C, H, W] with pixels in [0, 1], and stay so; parameters are tensors [N] or one number for all. A
blend with the factor f is ``f * image + (1 - f) * other``, cut off at 0 and 1: 1 is the image, 0 the other, and above 1
leads away from it. Grey images (C = 1) have no saturation to change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.preprocessing.drawing import (
    PerImage,
    check_at_least_zero,
    check_generator,
    check_images,
    check_whole,
    parameters,
    uniform,
)

# --- Blends -----------------------------------------------------------------------------------------------------------


def brightness(x: Tensor, factor: PerImage) -> Tensor:
    """Multiply the pixels of each image by ``factor``, 0 or more; what passes 1 is white."""
    check_images(x)
    return (x * parameters(x, "factor", factor, 0)).clamp_(0, 1)


def contrast(x: Tensor, factor: PerImage) -> Tensor:
    """Blend each image with the mean of its grey values, by ``factor``, 0 or more."""
    check_images(x)
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, parameters(x, "factor", factor, 0)).clamp_(0, 1)


def saturation(x: Tensor, factor: PerImage) -> Tensor:
    """Blend each image with its grey values, by ``factor``, 0 or more. A grey image stays as it is."""
    check_images(x)
    strength = parameters(x, "factor", factor, 0)
    if x.shape[1] == 1:
        return x.clone()
    return torch.lerp(grey(x), x, strength).clamp_(0, 1)


def sharpness(x: Tensor, factor: PerImage) -> Tensor:
    """Blend each image with a blurred one, by ``factor``, 0 or more: 0 blurs, 2 sharpens. The edge stays as it is.

    The blurred pixel is the mean of 3×3 of which the middle counts five times. An image of less than 3 pixels across
    or down has edges only.
    """
    check_images(x)
    strength = parameters(x, "factor", factor, 0)
    result = x.clone()
    if min(x.shape[-2:]) > 2:
        inner = result[..., 1:-1, 1:-1]
        # first down, then across: on a CPU four times as fast as a convolution
        down = (x[..., :-2, :] + x[..., 1:-1, :]).add_(x[..., 2:, :])
        blurred = (down[..., :-2] + down[..., 1:-1]).add_(down[..., 2:]).add_(inner, alpha=4).div_(13)
        inner.copy_(torch.lerp(blurred, inner, strength))
    return result.clamp_(0, 1)


def grey(x: Tensor) -> Tensor:
    """The brightness of each pixel, [N, 3, H, W] -> [N, 1, H, W], by the weights that torchvision takes.

    Raises
    ------
    ValueError : another number of channels than 1 or 3.
    """
    check_images(x)
    if x.shape[1] == 1:
        return x
    if x.shape[1] != 3:
        raise ValueError(f"x has {x.shape[1]} channels: must have 1 (grey) or 3 (red, green, blue)")
    red, green, blue = x.split(1, 1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


# --- Each pixel by itself ---------------------------------------------------------------------------------------------


def invert(x: Tensor) -> Tensor:
    """Make dark bright: 1 - x."""
    check_images(x)
    return 1 - x


def posterize(x: Tensor, bits: PerImage) -> Tensor:
    """Leave ``bits`` (0 to 8) of each pixel: 2^bits levels, each the lowest value of what it stands for.

    As torchvision rounds floats: white comes out as (2^bits - 1) / 2^bits.
    """
    check_images(x)
    check_whole("bits", bits)
    levels = (1 << parameters(x, "bits", bits, 0, 8).long()).to(x.dtype)
    return (x * levels).floor_().clamp_(min=0).minimum(levels - 1).div_(levels)


def solarize(x: Tensor, threshold: PerImage) -> Tensor:
    """Invert the pixels of ``threshold`` (at most 1) and above."""
    check_images(x)
    bright = (x >= parameters(x, "threshold", threshold, high=1)).to(x.dtype)
    return torch.lerp(x, 1 - x, bright)  # a blend by 0 or 1 picks as torch.where does, in half the time


# --- The distribution of the pixels -----------------------------------------------------------------------------------


def autocontrast(x: Tensor) -> Tensor:
    """Stretch each channel of each image so that its darkest pixel is 0 and its brightest 1."""
    check_images(x)
    if x.numel() == 0:
        return x.clone()
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    flat = low == high  # a channel of one value stays as it is
    return ((x - low.masked_fill(flat, 0)) / (high - low).masked_fill_(flat, 1)).clamp_(0, 1)


def equalize(x: Tensor) -> Tensor:
    """Map the levels of each channel so that all are about equally frequent: by their cumulative histogram.

    In 256 levels, with the whole numbers of PIL's ``ImageOps.equalize``, as torchvision has them. So it does nothing to
    an image that has fewer than 255 pixels besides its brightest: not to 8×8, hardly ever to 16×16.
    """
    check_images(x)
    if x.numel() == 0:
        return x.clone()
    channels = len(x) * x.shape[1]
    # 255.999 and not 255: white alone would otherwise have the highest level, and all others be rounded down
    levels = (
        (x.flatten(2).to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1) * 255.999).long().view(channels, -1)
    )  # [N * C, H * W]
    counts = torch.zeros(channels, 256, dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, levels, torch.ones_like(counts[:1, :1]).expand_as(levels))
    below = counts.cumsum(1, dtype=torch.int32)
    brightest = counts.gather(1, levels.amax(1, keepdim=True))
    # the brightest level has its place at 255 anyway: the others are spread over the steps below
    step = (levels.shape[1] - brightest).div_(255, rounding_mode="floor")
    table = torch.zeros_like(below)
    table[:, 1:] = (below[:, :-1] + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    # too few pixels for 255 steps: the channel stays as it is, but in whole levels
    table = torch.where(step == 0, torch.arange(256, device=x.device, dtype=torch.int32), table)
    at = levels.add_(torch.arange(channels, device=x.device)[:, None] * 256)  # in the tables of all, end to end
    return (table.to(x.dtype) / 255).view(-1).index_select(0, at.view(-1)).view(x.shape)


# --- Noise, and at random ---------------------------------------------------------------------------------------------


def add_noise(x: Tensor, sigma: PerImage, noise: Tensor) -> Tensor:
    """Add ``sigma`` (0 or more) times ``noise``, a tensor in the shape of ``x``."""
    check_images(x)
    if noise.shape != x.shape:
        raise ValueError(f"noise has the shape {list(noise.shape)}: must be that of x, {list(x.shape)}")
    return torch.addcmul(x, noise.to(x), parameters(x, "sigma", sigma, 0)).clamp_(0, 1)


def random_noise(x: Tensor, generator: torch.Generator, sigma: float = 0.1) -> Tensor:
    """Add a normal number with the standard deviation ``sigma`` to each pixel."""
    check_images(x)
    check_generator(generator)
    check_at_least_zero(sigma=sigma)
    return add_noise(x, sigma, torch.randn(x.shape, generator=generator, dtype=torch.float32))


def random_brightness_contrast(
    x: Tensor, generator: torch.Generator, brightness: float = 0.2, contrast: float = 0.2
) -> Tensor:
    """Change the brightness, then the contrast of each image, by factors drawn evenly up to that far from 1.

    From ``max(0, 1 - brightness)`` to ``1 + brightness``, as in torchvision's ``ColorJitter``.
    """
    check_images(x)
    check_generator(generator)
    check_at_least_zero(brightness=brightness, contrast=contrast)
    bright, strong = (uniform(generator, max(0.0, 1 - far), 1 + far, len(x)) for far in (brightness, contrast))
    return _contrast(_brightness(x, bright), strong)


_brightness, _contrast = brightness, contrast  # the settings above have the functions' names
