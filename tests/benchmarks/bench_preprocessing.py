"""Augmentation of whole batches, and image by image: ``python -m tests.benchmarks.bench_preprocessing``.

128 images, one thread: grey ones of 16×16 as the course's glyphs, colour ones of 32×32 as CIFAR-10's. Each of ours
against the namesake of ``torchvision.transforms.v2`` called for each image, as a ``DataLoader``'s workers do, on float
tensors, which is the cheapest case for it; and against kornia's on the same batch, where kornia is there. On 32×32 the
pixels and no longer the calls cost most, so that torchvision's ratio has no target there. A policy calls ten kernels on
a few images each, which leaves less to gain. kornia's ``RandAugment`` sends a whole batch through the same operations,
where ours and torchvision's draw for each image: it is not compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import course_lib  # noqa: F401  mends torchvision's import where torch is a CPU-only build
from course_lib import preprocessing as pre
from course_lib.lab.timing import compare_speed

IMAGES, ROUNDS = 128, 15
SHAPES = {(1, 16, 16): 10.0, (3, 32, 32): 0.0}
"""How many times as long torchvision should take at least, for images of that shape."""
KORNIA_TARGET = 0.95
POLICIES = {"random_augment": 4.0, "trivial_augment": 4.0, "augmix": 6.0}


def rows(channels: int, size: int) -> dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any] | None, Any]]:
    """Name -> ours on a batch, torchvision's on one image, the arguments of kornia's."""
    from torchvision.transforms import v2

    g = torch.Generator().manual_seed(0)
    y = torch.arange(IMAGES) % 10
    draw = lambda f, **settings: partial(f, generator=g, **settings)  # noqa: E731
    bilinear = v2.InterpolationMode.BILINEAR
    return {
        "random_crop": (draw(pre.random_crop), v2.RandomCrop(size, padding=4), ("RandomCrop", (size, size), 4)),
        "random_flip": (draw(pre.random_flip), v2.RandomHorizontalFlip(), ("RandomHorizontalFlip",)),
        "random_rotation": (
            draw(pre.random_rotation),
            v2.RandomRotation(15, interpolation=bilinear),
            ("RandomRotation", 15.0),
        ),
        "random_affine": (
            draw(pre.random_affine),
            v2.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), 10, interpolation=bilinear),
            ("RandomAffine", 15.0, (0.1, 0.1), (0.9, 1.1), 10.0),
        ),
        # torchvision's Gaussian of sigma 5 is too wide for these images' mirrored edges
        "random_elastic": (
            draw(pre.random_elastic, sigma=1.5),
            v2.ElasticTransform(sigma=1.5),
            ("RandomElasticTransform", (13, 13), (1.5, 1.5)),
        ),
        "random_erasing": (draw(pre.random_erasing, p=1.0), v2.RandomErasing(p=1.0), ("RandomErasing",)),
        "brightness_contrast": (
            draw(pre.random_brightness_contrast),
            v2.ColorJitter(0.2, 0.2),
            ("ColorJiggle", 0.2, 0.2, 0.0, 0.0) if channels == 3 else None,
        ),
        "random_noise": (draw(pre.random_noise), v2.GaussianNoise(), ("RandomGaussianNoise", 0.0, 0.1)),
        "sharpness": (partial(pre.sharpness, factor=1.5), v2.RandomAdjustSharpness(1.5, p=1), ("RandomSharpness", 1.5)),
        "saturation": (
            partial(pre.saturation, factor=1.5),
            partial(v2.functional.adjust_saturation, saturation_factor=1.5) if channels == 3 else None,
            ("RandomSaturation", (1.5, 1.5)) if channels == 3 else None,
        ),
        "posterize": (partial(pre.posterize, bits=4), v2.RandomPosterize(4, p=1), ("RandomPosterize", 4)),
        "solarize": (partial(pre.solarize, threshold=0.5), v2.RandomSolarize(0.5, p=1), ("RandomSolarize", 0.1, 0.1)),
        "autocontrast": (pre.autocontrast, v2.RandomAutocontrast(p=1), ("RandomAutoContrast",)),
        "equalize": (pre.equalize, v2.RandomEqualize(p=1), ("RandomEqualize",)),
        "mixup": (lambda x: pre.mixup(x, y, g, classes=10), None, ("RandomMixUpV2", y)),
        "cutmix": (lambda x: pre.cutmix(x, y, g, classes=10), None, ("RandomCutMixV2", y)),
        "random_augment": (draw(pre.random_augment), v2.RandAugment(interpolation=bilinear), None),
        "trivial_augment": (draw(pre.trivial_augment), v2.TrivialAugmentWide(interpolation=bilinear), None),
        "augmix": (draw(pre.augmix), v2.AugMix(), None),
    }


def kornias(arguments: Any, x: Tensor) -> Callable[[], Any] | None:
    """kornia's namesake with these arguments, always applied to ``x``; None where there is none, or no kornia."""
    if arguments is None:
        return None
    name, *settings = arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from kornia import augmentation
        except ImportError:
            return None
        if settings and isinstance(settings[0], Tensor):
            return partial(getattr(augmentation, name)(data_keys=["input", "class"], p=1.0), x, settings[0])
        return partial(getattr(augmentation, name)(*settings, p=0.5 if "Flip" in name else 1.0), x)


def main() -> int:
    """Print a line for each transform with its ratios; return how many targets were missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    missed = sum(compared(*shape, target) for shape, target in SHAPES.items())
    torch.set_num_threads(threads)
    return missed


def compared(channels: int, height: int, width: int, target: float) -> int:
    x = torch.rand(IMAGES, channels, height, width)
    missed = 0
    print(f"{IMAGES} images of {channels}x{height}x{width}, 1 thread, medians of {ROUNDS} rounds")
    print(f"{'':22}{'ours, ms':>8}{'torchvision / ours':>20}{'(target)':>9}{'kornia / ours':>16}{'(target)':>9}")
    for name, (ours, one, arguments) in rows(channels, height).items():
        cells, bad, most = "", False, min(target, POLICIES.get(name, target))
        for other, least in ((one and partial(each, one, x), most), (kornias(arguments, x), KORNIA_TARGET)):
            if other is None:
                cells += f"{'-':>20}{'':>9}"
                continue
            speed = compare_speed(other, partial(ours, x), rounds=ROUNDS, warmup=2, device="cpu")
            bad |= speed.ratio < least
            cells += f"{speed.ratio:>19.1f}x{f'({least:g})' if least else '':>9}"
        missed += bad
        print(f"{name:22}{speed.b.median * 1e3:8.2f}{cells}{'  MISSED' if bad else ''}", flush=True)
    return missed


def each(function: Callable[[Tensor], Any], x: Tensor) -> list[Any]:
    return [function(image) for image in x]


if __name__ == "__main__":
    raise SystemExit(main())
