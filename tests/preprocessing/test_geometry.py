"""Where pixels go: each kernel against torchvision image by image, each random transform by what it draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib import preprocessing as pre
from course_lib.preprocessing import geometry
from tests.preprocessing.images import generator, images, one_by_one, v2

BILINEAR = v2.InterpolationMode.BILINEAR
F2 = v2.functional
N = 8
CLOSE = {torch.float32: 5e-6, torch.float64: 1e-11}


def spread(low: float, high: float, seed: int = 1) -> Tensor:
    return torch.rand(N, generator=generator(seed), dtype=torch.float64) * (high - low) + low


def assert_same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE[dtype])


# --- Kernels against torchvision --------------------------------------------------------------------------------------

SHAPES = [(N, 3, 12, 12), (N, 1, 9, 14), (N, 3, 13, 8)]
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["square", "wide", "high"])


@all_shapes
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop(shape: tuple[int, ...], padding: int) -> None:
    x = images(shape)
    top, left = torch.randint(0, 2 * padding + 1, (2, N), generator=generator())
    theirs = one_by_one(
        x, lambda i, k: F2.crop(F2.pad(i, [padding] * 4), int(top[k]), int(left[k]), shape[2], shape[3])
    )
    assert torch.equal(pre.crop(x, top, left, padding), theirs)
    assert torch.equal(pre.crop(x, padding, padding, padding), x)


@all_shapes
def test_flips(shape: tuple[int, ...]) -> None:
    x, which = images(shape), torch.arange(N) % 3 == 0
    assert torch.equal(pre.flip(x, which), one_by_one(x, lambda i, k: F2.horizontal_flip(i) if which[k] else i))
    assert torch.equal(pre.flip_vertical(x, which), one_by_one(x, lambda i, k: F2.vertical_flip(i) if which[k] else i))
    assert torch.equal(pre.flip(x, True), x.flip(-1))


@both_types
@all_shapes
def test_rotate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = images(shape, dtype)
    degrees = torch.cat([spread(-200, 200)[:5], torch.tensor([0.0, 90.0, 180.0], dtype=torch.float64)])
    theirs = one_by_one(x, lambda i, k: F2.rotate(i, float(degrees[k]), interpolation=BILINEAR))
    assert_same(pre.rotate(x, degrees), theirs, dtype)


@both_types
@all_shapes
@pytest.mark.parametrize("center", [None, (0, 0), (3.0, 5.5)])
def test_affine(shape: tuple[int, ...], dtype: torch.dtype, center: Any) -> None:
    x = images(shape, dtype)
    a, tx, ty, s = spread(-180, 180), spread(-4, 4, 2), spread(-4, 4, 3), spread(0.5, 2, 4)
    bx, by = spread(-40, 40, 5), spread(-40, 40, 6)

    def theirs(image: Tensor, k: int) -> Tensor:
        a_, tx_, ty_, s_, bx_, by_ = (float(values[k]) for values in (a, tx, ty, s, bx, by))
        return F2.affine(image, a_, [tx_, ty_], s_, [bx_, by_], interpolation=BILINEAR, center=center)

    assert_same(pre.affine(x, a, (tx, ty), s, (bx, by), center=center), one_by_one(x, theirs), dtype)


@all_shapes
def test_fill_is_what_lies_around_the_image(shape: tuple[int, ...]) -> None:
    """A much larger image with that margin, treated alike, is the same in the middle."""
    x, far = images(shape, torch.float64), 20
    wide = F.pad(x, [far] * 4, value=0.3)
    a, displacement = spread(-180, 180), torch.randn(N, *shape[2:], 2, generator=generator()).double() * 0.2
    middle = (..., slice(far, -far), slice(far, -far))
    assert_same(pre.rotate(x, a, fill=0.3), pre.rotate(wide, a)[middle], torch.float64)
    assert_same(
        pre.affine(x, a, (3.3, 1.2), 0.7, fill=0.3), pre.affine(wide, a, (3.3, 1.2), 0.7)[middle], torch.float64
    )
    scale = torch.tensor([shape[3] / wide.shape[3], shape[2] / wide.shape[2]], dtype=torch.float64)
    wider = F.pad(displacement * scale, [0, 0] + [far] * 4)
    assert_same(pre.elastic(x, displacement, fill=0.3), pre.elastic(wide, wider)[middle], torch.float64)


@both_types
@all_shapes
def test_elastic(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = images(shape, dtype)
    displacement = torch.randn(N, *shape[2:], 2, generator=generator(), dtype=torch.float64) * 0.2
    assert_same(pre.elastic(x, displacement), one_by_one(x, lambda i, k: F2.elastic(i, displacement[k : k + 1])), dtype)


@pytest.mark.parametrize("value", [0.0, 0.7, "noise"])
def test_erase(value: Any) -> None:
    x = images((N, 3, 12, 15))
    top, left, height, width = (torch.randint(0, 7, (N,), generator=generator(k)) for k in range(4))
    content = images(x.shape, seed=9) if value == "noise" else value

    def theirs(image: Tensor, k: int) -> Tensor:
        i, j, h, w = (int(part[k]) for part in (top, left, height, width))
        v = content[k, :, i : i + h, j : j + w] if isinstance(content, Tensor) else torch.tensor(content)
        return F2.erase(image, i, j, h, w, v)

    assert torch.equal(pre.erase(x, top, left, height, width, content), one_by_one(x, theirs))


def test_a_hole_is_cut_off_at_the_edge() -> None:
    x = torch.ones(3, 1, 6, 6)
    hole = pre.erase(x, torch.tensor([-2, 4, 0]), torch.tensor([-1, 3, 9]), 4, 4)
    assert [int((1 - image).sum()) for image in hole] == [2 * 3, 2 * 3, 0]
    assert bool((hole[0, 0, :2, :3] == 0).all())
    assert bool((hole[1, 0, 4:, 3:] == 0).all())


@pytest.mark.parametrize(("sigma", "size"), [(0.5, (9, 12)), (2.0, (20, 24)), (1.3, (12, 12))])
def test_smooth_is_torchvisions_gaussian_blur(sigma: float, size: tuple[int, int]) -> None:
    field = torch.rand(2, 3, *size, generator=generator(), dtype=torch.float64)
    side = int(8 * sigma + 1) | 1  # as ElasticTransform has it
    theirs = F2.gaussian_blur(field, [side, side], [sigma, sigma])
    torch.testing.assert_close(pre.smooth(field, sigma), theirs, rtol=0, atol=1e-12)


def test_smooth_where_the_gaussian_is_wider_than_the_image() -> None:
    field = torch.rand(2, 5, 4, generator=generator(), dtype=torch.float64)
    weights = np.exp(-(np.arange(-20.0, 21.0) ** 2) / (2 * 5.0**2))
    theirs = field.numpy()
    for axis in (-1, -2):
        theirs = scipy.ndimage.convolve1d(theirs, weights / weights.sum(), axis=axis, mode="mirror")
    torch.testing.assert_close(pre.smooth(field, 5.0), torch.from_numpy(theirs), rtol=0, atol=1e-12)
    assert bool(torch.isfinite(pre.smooth(torch.ones(1, 1, 1), 2.0)).all())


# --- What the random ones draw ----------------------------------------------------------------------------------------

MANY = 2000


def centre_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the one bright spot of each image went, in pixels (down, right)."""
    mass = x[:, 0] / x[:, 0].sum((1, 2), keepdim=True)
    at = torch.arange(x.shape[-1], dtype=x.dtype)
    return (mass.sum(2) * at).sum(1), (mass.sum(1) * at).sum(1)


def spot(size: int = 21, row: int = 10, column: int = 10) -> Tensor:
    x = torch.zeros(MANY, 1, size, size, dtype=torch.float64)
    x[:, :, row, column] = 1
    return x


def test_random_crop_draws_all_shifts_alike() -> None:
    down, right = centre_of(pre.random_crop(spot(), generator(), padding=2))
    found, counts = torch.stack([down - 10, right - 10]).unique(dim=1, return_counts=True)
    assert found.T.tolist() == [[a, b] for a in range(-2, 3) for b in range(-2, 3)]
    assert counts.min() > MANY / 25 * 0.6


@pytest.mark.parametrize(("transform", "dim"), [(pre.random_flip, -1), (pre.random_flip_vertical, -2)])
def test_random_flip(transform: Callable[..., Tensor], dim: int) -> None:
    x = images((MANY, 1, 4, 4))
    assert torch.equal(transform(x, generator(), p=0), x)
    assert torch.equal(transform(x, generator(), p=1), x.flip(dim))
    flipped = (transform(x, generator(), p=0.3) == x.flip(dim)).flatten(1).all(1)
    assert abs(float(flipped.double().mean()) - 0.3) < 0.04


def test_random_rotation_draws_angles_evenly_up_to_the_limit() -> None:
    down, right = centre_of(pre.random_rotation(spot(column=18), generator(), degrees=30))
    angles = torch.rad2deg(torch.atan2(10 - down, right - 10))
    assert -31.5 < float(angles.min()) < -27
    assert 27 < float(angles.max()) < 31.5
    assert abs(float(angles.mean())) < 1.5
    assert abs(float(angles.std()) - 60 / math.sqrt(12)) < 1


def test_random_affine_draws_within_its_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def record(x: Tensor, degrees: Any, translate: Any, scale: Any, shear: Any, *, fill: float) -> Tensor:
        seen.update(degrees=degrees, right=translate[0], down=translate[1], scale=scale, shear=shear[0])
        assert shear[1] == 0
        assert fill == 0.5
        return x

    monkeypatch.setattr(geometry, "affine", record)
    x = torch.zeros(MANY, 1, 10, 40)
    pre.random_affine(x, generator(), 20, (0.1, 0.3), (0.8, 1.4), 7, fill=0.5)
    for name, low, high in (("degrees", -20, 20), ("scale", 0.8, 1.4), ("shear", -7, 7)):
        assert low <= float(seen[name].min()) < low + 0.01 * (high - low)
        assert high >= float(seen[name].max()) > high - 0.01 * (high - low)
        assert abs(float(seen[name].mean()) - (low + high) / 2) < 0.03 * (high - low)
    assert seen["right"].unique().tolist() == list(range(-4, 5))
    assert seen["down"].unique().tolist() == list(range(-3, 4))


def test_random_affine_is_affine() -> None:
    """With one range open at a time: a shift alone, a scale alone."""
    x = spot()
    down, right = centre_of(pre.random_affine(x, generator(), 0, (0.2, 0.0), (1, 1), 0))
    torch.testing.assert_close(down, torch.full_like(down, 10), rtol=0, atol=1e-6)
    assert set(right.round(decimals=6).tolist()) == {float(k) for k in range(6, 15)}
    large = pre.random_affine(torch.ones(MANY, 1, 21, 21), generator(), 0, (0, 0), (0.5, 0.8), 0)
    share = large.mean((1, 2, 3)).sqrt()
    assert 0.48 < float(share.min()) < 0.53
    assert 0.77 < float(share.max()) < 0.82


def test_random_elastic_moves_as_far_as_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(40, 1, 24, 32)
    seen: list[Tensor] = []
    monkeypatch.setattr(geometry, "elastic", lambda x, displacement, fill: seen.append(displacement) or x)
    pre.random_elastic(x, generator(), alpha=30, sigma=1.5)
    torch.manual_seed(0)
    transform = v2.ElasticTransform(alpha=30.0, sigma=1.5)
    theirs = torch.cat([transform.make_params([image])["displacement"] for image in x])
    ratio = seen[0].std((0, 1, 2)) / theirs.std((0, 1, 2))
    assert bool(((ratio - 1).abs() < 0.05).all())
    assert float(seen[0].mean().abs()) < 0.01
    # neighbours move alike, as far as the Gaussian reaches
    ours, other = ((d[:, :, 1:] * d[:, :, :-1]).mean() / d.square().mean() for d in (seen[0], theirs))
    assert abs(float(ours - other)) < 0.02
    monkeypatch.undo()
    picture = images((4, 1, 24, 32))
    assert float((pre.random_elastic(picture, generator(), alpha=0) - picture).abs().max()) < 1e-5


def test_cutout_is_a_square_around_any_pixel() -> None:
    x = torch.ones(MANY, 2, 10, 12, dtype=torch.float64)
    holes = pre.cutout(x, generator(), size=4) == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    rows, columns = holes[:, 0].any(2), holes[:, 0].any(1)
    assert torch.equal(holes[:, 0], rows[:, :, None] & columns[:, None])
    # the middle, row 0 to 9, has two rows above it and one below
    assert rows.sum(1).unique().tolist() == [2, 3, 4]
    expected = sum(len(range(max(0, r - 2), min(10, r + 2))) for r in range(10)) / 10
    assert abs(float(rows.sum(1).double().mean()) - expected) < 0.08
    assert float((pre.cutout(x, generator(), size=4, p=0.25) == 0).flatten(1).any(1).double().mean()) == pytest.approx(
        0.25, abs=0.03
    )
    assert torch.equal(pre.cutout(x, generator(), size=0), x)


def test_random_erasing_draws_area_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(MANY, 1, 60, 80)
    holes = (pre.random_erasing(x, generator(), p=1, scale=(0.05, 0.2), ratio=(0.5, 2), value=0.5) == 0.5)[:, 0]
    high, wide = holes.any(2).sum(1).double(), holes.any(1).sum(1).double()
    assert torch.equal(holes.sum((1, 2)).double(), high * wide)
    area, log_shape = high * wide / (60 * 80), (high / wide).log()
    assert 0.045 < float(area.min()) < 0.06
    assert 0.19 < float(area.max()) < 0.21
    assert abs(float(area.mean()) - 0.125) < 0.004
    assert abs(float(log_shape.mean())) < 0.04
    assert math.log(2) - 0.03 < float(log_shape.max()) < math.log(2) + 0.06
    top, left = holes.any(2).int().argmax(1), holes.any(1).int().argmax(1)
    free = 60 - high
    assert abs(float((top / free).mean()) - 0.5) < 0.03
    assert abs(float((left / (80 - wide)).mean()) - 0.5) < 0.03
    assert bool((top == 0).any())
    assert bool((top == free).any())


def test_random_erasing_as_often_as_torchvisions() -> None:
    """Also where the rectangle often does not fit: then nothing is erased, in both."""
    x = torch.ones(MANY, 1, 8, 8)
    settings: Any = {"p": 0.8, "scale": (0.5, 1.0), "ratio": (0.1, 10.0)}
    ours = (pre.random_erasing(x, generator(), **settings) == 0).double().flatten(1).mean(1)
    torch.manual_seed(0)
    transform = v2.RandomErasing(**settings)
    theirs = torch.stack([(transform(image) == 0).double().mean() for image in x])
    assert abs(float((ours > 0).double().mean() - (theirs > 0).double().mean())) < 0.04
    assert abs(float(ours.mean() - theirs.mean())) < 0.03
    nothing = pre.random_erasing(x, generator(), p=1, scale=(1, 1), ratio=(1, 1))
    assert torch.equal(nothing, x)


def test_random_erasing_with_noise() -> None:
    x = torch.full((50, 3, 16, 16), 2.0)
    y = pre.random_erasing(x, generator(), p=1, scale=(0.2, 0.2), ratio=(1, 1), value=None)
    inside = y[y != 2]
    assert 0 <= float(inside.min()) < 0.05
    assert 0.95 < float(inside.max()) <= 1
    assert abs(float(inside.mean()) - 0.5) < 0.02


# --- At the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: pre.crop(x, 3, 0, 1), "top holds 3: must be finite numbers from 0 to 2"),
        (lambda x: pre.crop(x, 0.5, 0, 1), "top holds 0.5: must be whole"),
        (lambda x: pre.crop(x, 0, 0, -1), "padding=-1: must be a whole number of at least 0"),
        (lambda x: pre.flip(x, torch.ones(N)), "which is torch.float32: must be bool"),
        (lambda x: pre.flip(x, torch.ones(3, dtype=torch.bool)), r"which has the shape \[3\]: must be \[8\]"),
        (lambda x: pre.rotate(x, torch.zeros(3)), r"degrees has the shape \[3\]: must be \[8\]"),
        (lambda x: pre.rotate(x, float("nan")), "degrees holds nan: must be finite"),
        (lambda x: pre.rotate(x[0], 3.0), "x is torch.float32"),
        (lambda x: pre.rotate((x * 255).byte(), 3.0), "x is torch.uint8"),
        (lambda x: pre.affine(x, scale=0.0), "scale holds 0: must be finite numbers from 1e-06"),
        (lambda x: pre.elastic(x, torch.zeros(N, 2, 6, 6)), r"displacement has the shape \[8, 2, 6, 6\]"),
        (lambda x: pre.erase(x, 0, 0, -1, 2), "height holds -1: must be finite numbers from 0"),
        (lambda x: pre.smooth(x, -1.0), "sigma=-1.0: must be a number of at least 0"),
        (lambda x: pre.random_crop(x, generator(), padding=-2), "padding=-2"),
        (lambda x: pre.random_crop(x, None), "generator=None: must be a torch.Generator on the CPU"),  # type: ignore[arg-type]
        (lambda x: pre.random_flip(x, generator(), p=1.5), "p=1.5: must be a number from 0 to 1"),
        (lambda x: pre.random_rotation(x, generator(), degrees=-3), "degrees=-3: must be"),
        (lambda x: pre.random_affine(x, generator(), scale=(1.2, 0.8)), r"scale=\(1.2, 0.8\): must be two numbers"),
        (lambda x: pre.random_affine(x, generator(), translate=(0.1, 3)), r"translate=\(0.1, 3\): must be two fract"),
        (lambda x: pre.random_elastic(x, generator(), alpha=-1), "alpha=-1: must be a number of at least 0"),
        (lambda x: pre.cutout(x, generator(), size=2.5), "size=2.5: must be a whole number"),  # type: ignore[arg-type]
        (lambda x: pre.random_erasing(x, generator(), scale=(0.1, 1.3)), r"scale=\(0.1, 1.3\): must be fractions"),
        (lambda x: pre.random_erasing(x, generator(), ratio=(0, 1)), r"ratio=\(0, 1\): must be two numbers"),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(images((N, 1, 6, 6)))


# --- All random ones alike --------------------------------------------------------------------------------------------

RANDOM: dict[str, Callable[..., Tensor]] = {
    "crop": pre.random_crop,
    "flip": pre.random_flip,
    "flip_vertical": pre.random_flip_vertical,
    "rotation": pre.random_rotation,
    "affine": pre.random_affine,
    "elastic": partial(pre.random_elastic, sigma=2.0),
    "cutout": pre.cutout,
    "erasing": partial(pre.random_erasing, value=None),
    "brightness_contrast": pre.random_brightness_contrast,
    "noise": pre.random_noise,
    "random_augment": pre.random_augment,
    "trivial_augment": pre.trivial_augment,
    "augmix": pre.augmix,
}
random_ones = pytest.mark.parametrize("name", RANDOM)


@random_ones
@pytest.mark.parametrize("shape", [(64, 3, 16, 16), (64, 1, 9, 12)], ids=["colour", "grey"])
def test_random_ones_draw_for_each_image_and_from_the_generator_alone(name: str, shape: tuple[int, ...]) -> None:
    transform = RANDOM[name]
    x = images((1, *shape[1:])).repeat(shape[0], 1, 1, 1)
    before = x.clone()
    state = torch.get_rng_state()
    first, again, other = transform(x, generator(3)), transform(x, generator(3)), transform(x, generator(4))
    assert torch.equal(torch.get_rng_state(), state), "only the given generator may be drawn from"
    assert torch.equal(x, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == x.shape
    assert bool(((first >= 0) & (first <= 1 + 1e-6)).all())
    distinct = len(first.flatten(1).unique(dim=0))
    assert distinct > (1 if "flip" in name else 12)
    source = generator(3)
    assert not torch.equal(transform(x, source), transform(x, source)), "the generator must move on"


@random_ones
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_random_ones_in_other_types(name: str, dtype: torch.dtype) -> None:
    """The same draws, and what is computed with them as exact as the type can hold."""
    levels = torch.randint(0, 17, (32, 3, 12, 12), generator=generator())
    x = levels.double() / 16  # exact in bfloat16 too; no pixel near a threshold of the policies
    exact, found = RANDOM[name](x, generator(3)), RANDOM[name](x.to(dtype), generator(3))
    single = RANDOM[name](x.float(), generator(3))
    assert found.dtype == dtype
    assert float((exact - single).abs().flatten(1).amax(1).median()) < 1e-5
    loss = (exact - found.double()).abs().flatten(1)
    assert float(loss.amax(1).median()) <= (0 if dtype == torch.float64 else 0.03)


@random_ones
def test_random_ones_on_no_image_at_all(name: str) -> None:
    assert RANDOM[name](torch.zeros(0, 3, 8, 8), generator()).shape == (0, 3, 8, 8)


@pytest.mark.gpu
@random_ones
def test_random_ones_are_the_same_on_the_gpu(name: str) -> None:
    x = images((64, 3, 16, 16))
    here, there = RANDOM[name](x, generator(3)), RANDOM[name](x.cuda(), generator(3))
    assert there.device.type == "cuda"
    apart = (here - there.cpu()).abs().flatten(1).amax(1)
    # a rounding of the last bit may lift a pixel to another level of equalize or over a threshold, in few images
    assert float(apart.quantile(0.9)) < 1e-4


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("crop", {"padding": 0}),
        ("flip", {"p": 0.0}),
        ("flip_vertical", {"p": 0.0}),
        ("rotation", {"degrees": 0}),
        ("affine", {"degrees": 0, "translate": (0, 0), "scale": (1, 1), "shear": 0}),
        ("elastic", {"alpha": 0.0}),
        ("cutout", {"size": 0}),
        ("erasing", {"p": 0.0}),
        ("brightness_contrast", {"brightness": 0.0, "contrast": 0.0}),
        ("noise", {"sigma": 0.0}),
        ("random_augment", {"operations": 0}),
    ],
)
def test_no_strength_no_change(name: str, settings: dict[str, Any]) -> None:
    x = images((16, 3, 9, 12))
    torch.testing.assert_close(RANDOM[name](x, generator(), **settings), x, rtol=0, atol=3e-6)
