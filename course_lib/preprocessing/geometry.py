"""Geometry: where the pixels of an image go. Whole batches at once, each image by its own parameters.

=========================  ====================================================  ======================================
name                       what it does to an image                              as torchvision's (``v2.functional``)
=========================  ====================================================  ======================================
crop                       pads it and cuts a window of its size                 ``pad``, then ``crop``
flip, flip_vertical        mirrors it                                            ``horizontal_flip``, ``vertical_flip``
rotate                     turns it counter-clockwise                            ``rotate``
affine                     turns (clockwise), scales, shears and moves it        ``affine``
elastic                    moves each pixel by its own displacement              ``elastic``
erase                      fills a rectangle                                     ``erase``
smooth                     blurs a field of numbers by a Gaussian                ``gaussian_blur``
*at random*                                                                      *source*
random_crop                a window drawn from the padded image
random_flip, …             mirrored or not
random_rotation            any angle up to a limit
random_affine              any turn, shift, scale and shear up to limits
random_elastic             smooth random displacements                           Simard, Steinkraus & Platt,
                                                                                 ICDAR 2003
cutout                     one square anywhere, cut off by the edge              DeVries & Taylor 2017, arXiv:1708.04552
random_erasing             a rectangle of random area and shape inside           Zhong et al. 2017, arXiv:1708.04896
=========================  ====================================================  ======================================

Images are floats [N, C, H, W], pixels in [0, 1], on any device. Parameters are tensors [N], one an image, or one number
for all. What comes in from outside of an image is ``fill``, 0 by default: black, and a pixel half outside is half of it
(torchvision counts the fill twice there). Pixels between pixels are interpolated bilinearly.

A random transform is ``(x, generator, **settings) -> x``, as ``Recipe(augment=...)`` wants it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.lab.arguments import at_least
from course_lib.preprocessing.drawing import (
    PerImage,
    chance,
    check_at_least_zero,
    check_chance,
    check_generator,
    check_images,
    check_parameter,
    check_range,
    check_whole,
    parameters,
    uniform,
    whole,
)

# --- Windows and mirrors ----------------------------------------------------------------------------------------------


def crop(x: Tensor, top: PerImage, left: PerImage, padding: int = 0) -> Tensor:
    """Pad each image by ``padding`` black pixels on all sides and cut a window of its old size. [N, C, H, W] -> same.

    ``top`` and ``left`` are whole numbers from 0 to ``2 * padding``, where the window begins in the padded image;
    ``padding`` itself is the image as it was.
    """
    check_images(x)
    at_least(0, padding=padding)
    for name, value in (("top", top), ("left", left)):
        check_whole(name, value)
    down = parameters(x, "top", top, 0, 2 * padding, trailing=0).long()
    right = parameters(x, "left", left, 0, 2 * padding, trailing=0).long()
    if padding == 0:
        return x.clone()
    count, _, height, width = x.shape
    # a view of all windows, [N, C, 2p + 1, 2p + 1, H, W]: picking one for each image copies only what is picked
    windows = F.pad(x, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(count, device=x.device), :, down, right]


def flip(x: Tensor, which: Tensor | bool) -> Tensor:
    """Mirror the images for which ``which`` (bool [N]) is true: left becomes right."""
    return _flipped(x, which, -1)


def flip_vertical(x: Tensor, which: Tensor | bool) -> Tensor:
    """Mirror the images for which ``which`` (bool [N]) is true: top becomes bottom."""
    return _flipped(x, which, -2)


def _flipped(x: Tensor, which: Tensor | bool, dim: int) -> Tensor:
    check_images(x)
    chosen = torch.as_tensor(which)
    if chosen.dtype != torch.bool:
        raise ValueError(f"which is {chosen.dtype}: must be bool")
    if chosen.ndim > 1 or (chosen.ndim == 1 and len(chosen) != len(x)):
        raise ValueError(f"which has the shape {list(chosen.shape)}: must be [{len(x)}], one an image, or one bool")
    return torch.where(chosen.to(x.device).expand(len(x)).view(-1, 1, 1, 1), x.flip(dim), x)


# --- Maps of the plane ------------------------------------------------------------------------------------------------


def rotate(x: Tensor, degrees: PerImage, *, fill: float = 0.0) -> Tensor:
    """Turn each image about its middle, counter-clockwise, by its own angle."""
    check_images(x)
    return _warped(x, -_numbers(x, "degrees", degrees), 0.0, 0.0, 1.0, 0.0, 0.0, None, fill)


def affine(
    x: Tensor,
    degrees: PerImage = 0.0,
    translate: tuple[PerImage, PerImage] = (0.0, 0.0),
    scale: PerImage = 1.0,
    shear: tuple[PerImage, PerImage] = (0.0, 0.0),
    *,
    center: tuple[float, float] | None = None,
    fill: float = 0.0,
) -> Tensor:
    r"""Map each image by its own affine map: shear along x, shear along y, scale, turn, and at last move.

    .. math:: p \mapsto t + c + s\,R(a)\,Y(b_y)\,X(b_x)\,(p - c), \quad
        X = \begin{pmatrix}1 & -\tan b_x\\0 & 1\end{pmatrix},
        Y = \begin{pmatrix}1 & 0\\-\tan b_y & 1\end{pmatrix}

    Parameters
    ----------
    degrees : the angle a, *clockwise*, as torchvision has it here (and the other way round in ``rotate``).
    translate : (right, down), in pixels.
    scale : s, above 0; 2 makes everything twice as large.
    shear : (along x, along y), in degrees.
    center : (x, y) of the point c in pixels from the upper left corner; ``None`` is the middle.
    """
    check_images(x)
    (right, down), (along_x, along_y) = translate, shear
    return _warped(
        x,
        _numbers(x, "degrees", degrees),
        _numbers(x, "translate", right),
        _numbers(x, "translate", down),
        _numbers(x, "scale", scale, low=1e-6),
        _numbers(x, "shear", along_x),
        _numbers(x, "shear", along_y),
        center,
        fill,
    )


def _numbers(x: Tensor, name: str, value: PerImage, low: float = -float("inf")) -> Tensor:
    """Checked parameters in float64, where they lie: the matrices are made there before one copy goes to the device."""
    return check_parameter(x, name, value, low).double()


def _warped(
    x: Tensor,
    degrees: Tensor,
    right: Tensor | float,
    down: Tensor | float,
    scale: Tensor | float,
    shear_x: Tensor | float,
    shear_y: Tensor | float,
    center: tuple[float, float] | None,
    fill: float,
) -> Tensor:
    """Sample each image where the *inverse* of its map takes the pixels of the result."""
    count, _, height, width = x.shape
    if x.numel() == 0:
        return x.clone()
    zero = torch.zeros(count, dtype=torch.float64, device=degrees.device)
    a, bx, by = (torch.deg2rad(zero + angle) for angle in (degrees, shear_x, shear_y))
    cos, sin, tan_x, tan_y = a.cos(), a.sin(), bx.tan(), by.tan()
    # R(a) Y(by) X(bx), row by row; its determinant is 1, so that its inverse needs no division
    first, third = cos + sin * tan_y, sin - cos * tan_y
    second, fourth = -first * tan_x - sin, -third * tan_x + cos
    inverse = [part / scale for part in (fourth, -second, -third, first)]
    cx, cy = (0.0, 0.0) if center is None else (center[0] - width / 2, center[1] - height / 2)
    x0, y0 = -(cx + right), -(cy + down)
    moved_x = cx + inverse[0] * x0 + inverse[1] * y0
    moved_y = cy + inverse[2] * x0 + inverse[3] * y0
    # affine_grid measures in half widths and half heights
    rows = (inverse[0], inverse[1] * (height / width), moved_x * (2 / width))
    columns = (inverse[2] * (width / height), inverse[3], moved_y * (2 / height))
    theta = torch.stack([torch.stack(rows, -1), torch.stack(columns, -1)], 1)  # [N, 2, 3]
    grid = F.affine_grid(theta.to(_grid_type(x)).to(x.device), [count, 1, height, width], align_corners=False)
    return _sampled(x, grid, fill)


def elastic(x: Tensor, displacement: Tensor, *, fill: float = 0.0) -> Tensor:
    """Look up each pixel of the result where ``displacement`` [N, H, W, 2] says: this far (right, down) from itself.

    In the units of ``torch.nn.functional.grid_sample``: 2 is the width or the height of the image.
    """
    check_images(x)
    count, _, height, width = x.shape
    if displacement.shape != (count, height, width, 2):
        raise ValueError(
            f"displacement has the shape {list(displacement.shape)}: must be {[count, height, width, 2]}, "
            "(right, down) for each pixel"
        )
    if x.numel() == 0:
        return x.clone()
    same = torch.eye(2, 3, dtype=_grid_type(x), device=x.device)[None]
    grid = F.affine_grid(same, [1, 1, height, width], align_corners=False)
    return _sampled(x, grid + displacement.to(grid.dtype).to(x.device), fill)


def _grid_type(x: Tensor) -> torch.dtype:
    """Half precision cannot tell the places of neighbouring pixels apart."""
    return torch.promote_types(x.dtype, torch.float32)


def _sampled(x: Tensor, grid: Tensor, fill: float) -> Tensor:
    images = x.to(grid.dtype)
    if fill:  # outside there is nothing but zeros: let zero stand for the fill
        images = images - fill
    found = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (found + fill if fill else found).to(x.dtype)


# --- Holes ------------------------------------------------------------------------------------------------------------


def erase(
    x: Tensor, top: PerImage, left: PerImage, height: PerImage, width: PerImage, value: float | Tensor = 0.0
) -> Tensor:
    """Fill a rectangle of each image with ``value``: a number, or a tensor that broadcasts to [N, C, H, W].

    The rectangle may reach beyond the image, and is cut off there; one of no height or width changes nothing.
    """
    check_images(x)
    inside = box_mask(x, top, left, height, width)
    # a blend by 0 or 1 picks as torch.where does, in half the time
    return torch.lerp(x, torch.as_tensor(value, dtype=x.dtype, device=x.device).expand_as(x), inside.to(x.dtype))


def box_mask(x: Tensor, top: PerImage, left: PerImage, height: PerImage, width: PerImage) -> Tensor:
    """Where the rectangle of each image lies, bool [N, 1, H, W]."""
    sides = []
    for size, (start_name, start), (length_name, length) in (
        (x.shape[2], ("top", top), ("height", height)),
        (x.shape[3], ("left", left), ("width", width)),
    ):
        check_whole(start_name, start)
        check_whole(length_name, length)
        first = parameters(x, start_name, start, trailing=1)
        past = first + parameters(x, length_name, length, 0, trailing=1)
        at = torch.arange(size, device=x.device)
        sides.append((at >= first) & (at < past))
    return (sides[0][:, :, None] & sides[1][:, None, :])[:, None]


# --- At random --------------------------------------------------------------------------------------------------------


def random_crop(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift each image by its own whole numbers of pixels, up to ``padding`` each way; black comes in at the edge."""
    check_images(x)
    check_generator(generator)
    at_least(0, padding=padding)
    top, left = whole(generator, 0, 2 * padding, 2, len(x))
    return crop(x, top, left, padding)


def random_flip(x: Tensor, generator: torch.Generator, p: float = 0.5) -> Tensor:
    """Mirror each image, left and right, with probability ``p``."""
    check_chance(p)
    check_generator(generator)
    return flip(x, chance(generator, p, len(x)))


def random_flip_vertical(x: Tensor, generator: torch.Generator, p: float = 0.5) -> Tensor:
    """Mirror each image, top and bottom, with probability ``p``."""
    check_chance(p)
    check_generator(generator)
    return flip_vertical(x, chance(generator, p, len(x)))


def random_rotation(x: Tensor, generator: torch.Generator, degrees: float = 15.0, *, fill: float = 0.0) -> Tensor:
    """Turn each image by an angle drawn evenly from ``-degrees`` to ``degrees``."""
    check_at_least_zero(degrees=degrees)
    check_generator(generator)
    return rotate(x, uniform(generator, -degrees, degrees, len(x)), fill=fill)


def random_affine(
    x: Tensor,
    generator: torch.Generator,
    degrees: float = 15.0,
    translate: tuple[float, float] = (0.1, 0.1),
    scale: tuple[float, float] = (0.9, 1.1),
    shear: float = 10.0,
    *,
    fill: float = 0.0,
) -> Tensor:
    """Map each image by an affine map drawn evenly, with the ranges of torchvision's ``RandomAffine``.

    ``degrees`` and ``shear`` (along x, in degrees) are the largest angles each way; ``translate`` the largest shifts
    each way, (across, down) as fractions of width and height, rounded to whole pixels; ``scale`` is (low, high).
    """
    check_images(x)
    check_generator(generator)
    check_at_least_zero(degrees=degrees, shear=shear)
    check_range("scale", scale, least=1e-6)
    if len(translate) != 2 or not all(0 <= part <= 1 for part in translate):
        raise ValueError(f"translate={translate!r}: must be two fractions from 0 to 1, (across, down)")
    count, _, height, width = x.shape
    angle, across, down, along, size = uniform(generator, -1, 1, 5, count)
    middle, reach = (scale[0] + scale[1]) / 2, (scale[1] - scale[0]) / 2
    return affine(
        x,
        angle * degrees,
        ((across * translate[0] * width).round(), (down * translate[1] * height).round()),
        middle + size * reach,
        (along * shear, 0.0),
        fill=fill,
    )


def random_elastic(
    x: Tensor, generator: torch.Generator, alpha: float = 50.0, sigma: float = 5.0, *, fill: float = 0.0
) -> Tensor:
    """Bend each image by smooth random displacements. Source: Simard, Steinkraus & Platt, ICDAR 2003.

    Each pixel draws a displacement from -1 to 1 in both directions; a Gaussian of ``sigma`` pixels smooths them, and
    ``alpha / 2`` of the result are pixels, as in torchvision's ``ElasticTransform``.
    """
    check_images(x)
    check_generator(generator)
    check_at_least_zero(alpha=alpha, sigma=sigma)
    count, _, height, width = x.shape
    # float32: there is one number a pixel
    noise = torch.rand((2, count, height, width), generator=generator, dtype=torch.float32).to(x.device)
    sizes = torch.tensor([width, height], dtype=torch.float32, device=x.device)
    return elastic(x, smooth(noise * 2 - 1, sigma).movedim(0, -1) * (alpha / sizes), fill=fill)


def smooth(field: Tensor, sigma: float) -> Tensor:
    """Blur ``[..., H, W]`` by a Gaussian of ``sigma`` pixels, cut off at 4 sigma; mirrored at the edges.

    As two products with matrices, ``[H, H]`` and ``[W, W]``: for small images that is less work than a convolution,
    and it can look beyond the mirrored image again where the Gaussian is wider than the image.
    """
    check_at_least_zero(sigma=sigma)
    if sigma == 0:
        return field.clone()
    down, across = (_gaussian_matrix(size, sigma).to(field.dtype).to(field.device) for size in field.shape[-2:])
    return down @ field @ across.T


def _gaussian_matrix(size: int, sigma: float) -> Tensor:
    """Row i holds the weights of all pixels in the blurred pixel i, float64 [size, size]."""
    reach = int(8 * sigma + 1) // 2
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-(offsets.double() ** 2) / (2 * sigma**2))
    period = max(2 * (size - 1), 1)
    seen = (torch.arange(size)[:, None] + offsets) % period  # the mirrored line repeats itself
    seen = torch.where(seen < size, seen, period - seen)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, seen, (weights / weights.sum()).expand(size, -1))


def cutout(x: Tensor, generator: torch.Generator, size: int = 8, p: float = 1.0) -> Tensor:
    """Black out a square of ``size`` pixels in each image, with probability ``p``.

    Its middle is drawn from all pixels, so that part of it may lie outside. Source: DeVries & Taylor 2017,
    arXiv:1708.04552.
    """
    check_images(x)
    check_generator(generator)
    check_chance(p)
    at_least(0, size=size)
    count, _, height, width = x.shape
    row = whole(generator, 0, height - 1, count)
    column = whole(generator, 0, width - 1, count)
    side = size * chance(generator, p, count)
    return erase(x, row - size // 2, column - size // 2, side, side)


def random_erasing(
    x: Tensor,
    generator: torch.Generator,
    p: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
    value: float | None = 0.0,
) -> Tensor:
    """Fill a rectangle inside of each image, with probability ``p``. Source: Zhong et al. 2017, arXiv:1708.04896.

    Its share of the area is drawn from ``scale`` and its height over its width from ``ratio`` (evenly in its
    logarithm), as in torchvision. An image for which ten such rectangles did not fit stays as it is. ``value`` fills
    it; ``None`` gives each pixel a random number from 0 to 1 instead, as the paper does.
    """
    check_images(x)
    check_generator(generator)
    check_chance(p)
    check_range("scale", scale, least=0)
    check_range("ratio", ratio, least=1e-6)
    if scale[1] > 1:
        raise ValueError(f"scale={scale!r}: must be fractions of the area, at most 1")
    count, _, high, wide = x.shape
    area = uniform(generator, *scale, count, 10) * high * wide
    shape = uniform(generator, math.log(ratio[0]), math.log(ratio[1]), count, 10).exp()
    heights, widths = (area * shape).sqrt().round(), (area / shape).sqrt().round()
    fits = (heights < high) & (widths < wide)
    first = fits.int().argmax(1, keepdim=True)
    wanted = chance(generator, p, count) & fits.any(1)
    height, width = (sizes.gather(1, first)[:, 0] for sizes in (heights, widths))
    top, left = (
        (uniform(generator, 0, 1, count) * (whole_side - side + 1)).floor()
        for whole_side, side in ((high, height), (wide, width))
    )
    content = torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x) if value is None else value
    return erase(x, top, left, height * wanted, width * wanted, content)
