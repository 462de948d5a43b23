"""Policies: each image gets operations drawn from a list, each as strong as a table says.

==================  ==============================================================  ==================================
name                what an image gets                                              source
==================  ==============================================================  ==================================
random_augment      some operations, one after the other, all of one magnitude      Cubuk et al. 2019, arXiv:1909.13719
trivial_augment     one operation of a random magnitude                             Müller & Hutter 2021,
                                                                                    arXiv:2103.10158
augmix              a mean of several chains of operations and of the image itself  Hendrycks et al. 2019,
                                                                                    arXiv:1912.02781
==================  ==============================================================  ==================================

``OPERATIONS`` names the operations; ``RANDOM_AUGMENT``, ``TRIVIAL_AUGMENT`` and ``AUGMIX`` say how strong they can be.
Operations, names and magnitudes are those of torchvision's ``RandAugment``, ``TrivialAugmentWide`` and ``AugMix``,
which reads pixels between pixels from the nearest in the first two, where here they are interpolated. Each image draws
for itself; the images that drew the same operation go through it together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from course_lib.lab.arguments import at_least, is_number, is_whole, require
from course_lib.preprocessing import colour, geometry
from course_lib.preprocessing.drawing import chance, check_generator, check_images, dirichlet, whole

# --- Operations -------------------------------------------------------------------------------------------------------


Motion = Callable[[Tensor, int, int], dict[str, Tensor]]
"""``(magnitude, height, width)`` -> what ``geometry.affine`` does to each image; what is not named is zero."""


def _shear_x(slope: Tensor, height: int, width: int) -> dict[str, Tensor]:
    # about the upper left corner, which is a shear about the middle and a shift
    return {"along_x": torch.rad2deg(slope.atan()), "right": slope * (-height / 2)}


def _shear_y(slope: Tensor, height: int, width: int) -> dict[str, Tensor]:
    return {"along_y": torch.rad2deg(slope.atan()), "down": slope * (-width / 2)}


def _translate_x(pixels: Tensor, height: int, width: int) -> dict[str, Tensor]:
    return {"right": pixels.trunc()}


def _translate_y(pixels: Tensor, height: int, width: int) -> dict[str, Tensor]:
    return {"down": pixels.trunc()}


def _rotate(degrees: Tensor, height: int, width: int) -> dict[str, Tensor]:
    return {"degrees": -degrees}  # affine turns clockwise, a positive magnitude the other way round


MOTIONS: dict[str, Motion] = {
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}


def _identity(x: Tensor, magnitude: Tensor) -> Tensor:
    return x


def _brightness(x: Tensor, magnitude: Tensor) -> Tensor:
    return colour.brightness(x, 1 + magnitude)


def _color(x: Tensor, magnitude: Tensor) -> Tensor:
    return colour.saturation(x, 1 + magnitude)


def _contrast(x: Tensor, magnitude: Tensor) -> Tensor:
    return colour.contrast(x, 1 + magnitude)


def _sharpness(x: Tensor, magnitude: Tensor) -> Tensor:
    return colour.sharpness(x, 1 + magnitude)


def _autocontrast(x: Tensor, magnitude: Tensor) -> Tensor:
    return colour.autocontrast(x)


def _equalize(x: Tensor, magnitude: Tensor) -> Tensor:
    return colour.equalize(x)


Recolouring = Callable[[Tensor, Tensor], Tensor]
"""``(x, magnitude) -> x``: images [n, C, H, W] and a magnitude [n] for each."""

RECOLOURINGS: dict[str, Recolouring] = {
    "Identity": _identity,
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": colour.posterize,
    "Solarize": colour.solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}

OPERATIONS = (*MOTIONS, *RECOLOURINGS)


def apply_operations(x: Tensor, names: Sequence[str], which: Tensor, magnitude: Tensor) -> Tensor:
    """Send each image through one operation: the one named ``names[which]``, with its own magnitude.

    The images of one operation go through it together, and all that are moved, in whatever way, are moved together.
    ``which`` (int64 [N]) and ``magnitude`` (float64 [N]) lie on the CPU: so it is known without asking a GPU how many
    images each operation gets.

    Raises
    ------
    ValueError : a name that is not among ``OPERATIONS``; not one operation and one magnitude an image.
    """
    check_images(x)
    if unknown := sorted(set(names) - set(OPERATIONS)):
        raise ValueError(f"names holds {unknown}: must be of {', '.join(OPERATIONS)}")
    for name, value in (("which", which), ("magnitude", magnitude)):
        if value.shape != (len(x),):
            raise ValueError(f"{name} has the shape {list(value.shape)}: must be [{len(x)}], one an image")
    moving = len(names)  # one more kind of work than there are names
    kind = torch.tensor([moving if name in MOTIONS else k for k, name in enumerate(names)])[which]
    order = kind.argsort(stable=True)
    counts = kind.bincount(minlength=moving + 1).tolist()
    result = x.clone()
    for k, (rows, there) in enumerate(zip(order.split(counts), order.to(x.device).split(counts), strict=True)):
        if len(rows) and (k == moving or names[k] != "Identity"):
            images, strengths = x.index_select(0, there), magnitude[rows]
            done = (
                _moved(names, images, which[rows], strengths)
                if k == moving
                else RECOLOURINGS[names[k]](images, strengths)
            )
            result.index_copy_(0, there, done)
    return result


def _moved(names: Sequence[str], x: Tensor, which: Tensor, magnitude: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    motion = {part: torch.zeros_like(magnitude) for part in ("degrees", "right", "down", "along_x", "along_y")}
    for k, name in enumerate(names):
        if name in MOTIONS:
            for part, values in MOTIONS[name](magnitude, height, width).items():
                motion[part] += torch.where(which == k, values, 0)
    translate, shear = (motion["right"], motion["down"]), (motion["along_x"], motion["along_y"])
    return geometry.affine(x, motion["degrees"], translate, shear=shear)


# --- How strong -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Magnitudes:
    """A scale of magnitudes: evenly from ``first`` to ``last``.

    Attributes
    ----------
    first, last : the magnitudes of the lowest and the highest bin.
    signed : whether half of the images get the magnitude with a minus.
    of : ``"width"`` or ``"height"`` where they are fractions of that; bits and levels of whole numbers are ``"whole"``.
    """

    first: float
    last: float
    signed: bool = True
    of: str | None = None

    def table(self, bins: int, height: int, width: int) -> Tensor:
        """The magnitude of each bin, float64 [bins], on the CPU, for images of that size."""
        if self.of == "whole":
            return torch.linspace(self.first, self.last, bins, dtype=torch.float64).round()
        last = self.last * {"width": width, "height": height, None: 1}[self.of]
        # float32, in which torchvision has them: a shift is cut down to whole pixels, and a threshold compared
        return torch.linspace(self.first, last, bins, dtype=torch.float32).double()


NONE = Magnitudes(0, 0, signed=False)
Table = Mapping[str, Magnitudes]


def _table(
    shear: float, across: Magnitudes, down: Magnitudes, degrees: float, blend: float, bits: tuple[int, int]
) -> dict[str, Magnitudes]:
    return {
        "Identity": NONE,
        "ShearX": Magnitudes(0, shear),
        "ShearY": Magnitudes(0, shear),
        "TranslateX": across,
        "TranslateY": down,
        "Rotate": Magnitudes(0, degrees),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), Magnitudes(0, blend)),
        "Posterize": Magnitudes(*bits, signed=False, of="whole"),
        "Solarize": Magnitudes(1, 0, signed=False),
        "AutoContrast": NONE,
        "Equalize": NONE,
    }


RANDOM_AUGMENT: Table = _table(
    0.3, Magnitudes(0, 150 / 331, of="width"), Magnitudes(0, 150 / 331, of="height"), 30, 0.9, (8, 4)
)
TRIVIAL_AUGMENT: Table = _table(0.99, Magnitudes(0, 32), Magnitudes(0, 32), 135, 0.99, (8, 2))
AUGMIX: Table = {
    name: magnitudes
    for name, magnitudes in _table(
        0.3, Magnitudes(0, 1 / 3, of="width"), Magnitudes(0, 1 / 3, of="height"), 30, 0.9, (4, 0)
    ).items()
    if name != "Identity"
}


def magnitudes_of(table: Table, which: Tensor, level: Tensor, sign: Tensor, bins: int, x: Tensor) -> Tensor:
    """The magnitude of each image: of the operation ``which``, at the bin ``level``, negative where ``sign`` is true.

    All [N] and on the CPU; the operations count in the order of ``table``. Returns float64 [N].
    """
    rows = _tables(tuple(table.values()), bins, *x.shape[-2:])
    signed = torch.tensor([magnitudes.signed for magnitudes in table.values()])
    found = rows[which, level]
    return torch.where(signed[which] & sign, -found, found)


@lru_cache
def _tables(magnitudes: tuple[Magnitudes, ...], bins: int, height: int, width: int) -> Tensor:
    """The tables of all operations, [operations, bins]; the same at each batch."""
    return torch.stack([each.table(bins, height, width) for each in magnitudes])


# --- Policies ---------------------------------------------------------------------------------------------------------


def random_augment(
    x: Tensor, generator: torch.Generator, operations: int = 2, magnitude: int = 9, bins: int = 31
) -> Tensor:
    """Apply so many random ``operations`` to each image, one after the other, all at the bin ``magnitude``.

    Source: RandAugment, Cubuk et al. 2019, arXiv:1909.13719. ``magnitude`` counts from 0 to ``bins - 1``; what it means
    for each operation stands in ``RANDOM_AUGMENT``.
    """
    _check(x, generator)
    at_least(0, operations=operations)
    at_least(2, bins=bins)
    require("magnitude", magnitude, lambda m: is_whole(m) and 0 <= m < bins, f"a whole number from 0 to {bins - 1}")
    level = torch.full((len(x),), magnitude)
    for _ in range(operations):
        x = _one_each(x, generator, RANDOM_AUGMENT, level, bins)
    return x


def trivial_augment(x: Tensor, generator: torch.Generator, bins: int = 31) -> Tensor:
    """Apply one random operation to each image, at a random bin of its scale, ``TRIVIAL_AUGMENT``.

    Source: TrivialAugment (in its wide space), Müller & Hutter 2021, arXiv:2103.10158.
    """
    _check(x, generator)
    at_least(2, bins=bins)
    return _one_each(x, generator, TRIVIAL_AUGMENT, whole(generator, 0, bins - 1, len(x)), bins)


def augmix(
    x: Tensor,
    generator: torch.Generator,
    severity: int = 3,
    width: int = 3,
    depth: int | None = None,
    alpha: float = 1.0,
) -> Tensor:
    r"""Mix each image with a mean of ``width`` versions of it, each of them the end of a chain of operations.

    .. math:: m\,x + (1 - m)\sum_i w_i\,\text{chain}_i(x), \quad m\sim\text{Beta}(\alpha,\alpha),
        \ w\sim\text{Dirichlet}(\alpha,\dots,\alpha)

    A chain has ``depth`` operations, or, where that is ``None``, 1, 2 or 3 by chance; each is drawn from ``AUGMIX``, at
    one of the lowest ``severity`` of ten bins. The paper also makes the network agree on several such versions, by its
    loss: that is an objective, not a transform. Source: Hendrycks et al. 2019, arXiv:1912.02781.
    """
    _check(x, generator)
    at_least(1, severity=severity, width=width)
    require("severity", severity, lambda s: s <= 10, "a whole number from 1 to 10")
    require("alpha", alpha, lambda a: is_number(a) and a > 0, "a number above 0")
    if depth is not None:
        at_least(1, depth=depth)
    count = len(x)
    own, others = dirichlet(generator, alpha, count, 2).unbind(1)
    weights = dirichlet(generator, alpha, count, width) * others[:, None]
    depths = whole(generator, 1, 3, count * width) if depth is None else torch.full((count * width,), depth)
    chains = x.repeat_interleave(width, 0)
    for step in range(int(depths.max()) if count else 0):
        going = (depths > step).nonzero()[:, 0]
        level = whole(generator, 0, severity - 1, len(going))
        there = going.to(x.device)
        chains = chains.index_copy(0, there, _one_each(chains[there], generator, AUGMIX, level, 10))
    mean = (chains.unflatten(0, (count, width)) * weights.to(x)[:, :, None, None, None]).sum(1)
    return torch.addcmul(mean, own.to(x)[:, None, None, None], x)


def _one_each(x: Tensor, generator: torch.Generator, table: Table, level: Tensor, bins: int) -> Tensor:
    which = whole(generator, 0, len(table) - 1, len(x))
    sign = chance(generator, 0.5, len(x))
    return apply_operations(x, list(table), which, magnitudes_of(table, which, level, sign, bins, x))


def _check(x: Tensor, generator: torch.Generator) -> None:
    check_images(x)
    check_generator(generator)
    if x.shape[1] not in (1, 3):
        raise ValueError(f"x has {x.shape[1]} channels: must have 1 (grey) or 3 (red, green, blue)")
