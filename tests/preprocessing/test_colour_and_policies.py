"""What pixels say, and policies: each operation against torchvision image by image, each policy by what it draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from course_lib import preprocessing as pre
from course_lib.preprocessing import colour, policies
from tests.preprocessing.images import generator, images, one_by_one, v2

F2 = v2.functional
N = 8
SHAPES = [(N, 3, 12, 12), (N, 1, 9, 14)]
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
both_shapes = pytest.mark.parametrize("shape", SHAPES, ids=["colour", "grey"])

# --- Colours ----------------------------------------------------------------------------------------------------------

FACTORS = torch.tensor([0.0, 0.3, 0.7, 1.0, 1.2, 1.9, 2.5, 4.0], dtype=torch.float64)
BITS = torch.tensor([0, 1, 2, 3, 4, 6, 7, 8])
THRESHOLDS = torch.tensor([-0.1, 0.0, 0.11, 0.33, 0.5, 0.66, 0.9, 1.0], dtype=torch.float64)
KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    "brightness": (lambda x: pre.brightness(x, FACTORS), lambda i, k: F2.adjust_brightness(i, float(FACTORS[k]))),
    "contrast": (lambda x: pre.contrast(x, FACTORS), lambda i, k: F2.adjust_contrast(i, float(FACTORS[k]))),
    "saturation": (lambda x: pre.saturation(x, FACTORS), lambda i, k: F2.adjust_saturation(i, float(FACTORS[k]))),
    "sharpness": (lambda x: pre.sharpness(x, FACTORS), lambda i, k: F2.adjust_sharpness(i, float(FACTORS[k]))),
    "invert": (pre.invert, lambda i, k: F2.invert(i)),
    "posterize": (lambda x: pre.posterize(x, BITS), lambda i, k: F2.posterize(i, int(BITS[k]))),
    "solarize": (lambda x: pre.solarize(x, THRESHOLDS), lambda i, k: F2.solarize(i, float(THRESHOLDS[k]))),
    "autocontrast": (pre.autocontrast, lambda i, k: F2.autocontrast(i)),
    "equalize": (pre.equalize, lambda i, k: F2.equalize(i)),
}


@both_types
@both_shapes
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("contents", ["all levels", "dark", "not of 256 levels"])
def test_kernels(name: str, shape: tuple[int, ...], dtype: torch.dtype, contents: str) -> None:
    x = images(shape, dtype)
    if contents == "dark":
        x = (x * 0.3 * 255).floor() / 255 + 0.2
    elif contents == "not of 256 levels":
        x = torch.rand(shape, generator=generator(5), dtype=dtype)
    before, (ours, theirs) = x.clone(), KERNELS[name]
    found = ours(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, one_by_one(x, theirs), rtol=0, atol=CLOSE[dtype])
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [(32, 32), (16, 17), (40, 30)])
@pytest.mark.parametrize("skew", [1, 3, 8])
def test_equalize_on_images_of_many_pixels(size: tuple[int, int], skew: int) -> None:
    """Above 255 pixels the steps count; the one channel of a single level stays as it is."""
    x = (torch.rand(N, 3, *size, generator=generator()) ** skew * 255).floor() / 255
    x[0, 1] = 0.4
    x[1, 0, :2] = 1.0
    ours = pre.equalize(x)
    torch.testing.assert_close(ours, one_by_one(x, lambda i, k: F2.equalize(i)), rtol=0, atol=1e-7)
    assert float((ours[2] - x[2]).abs().mean()) > 0.02


def test_small_or_flat_images() -> None:
    flat = torch.full((2, 3, 2, 5), 0.4)
    for function in (
        pre.autocontrast,
        pre.equalize,
        lambda x: pre.sharpness(x, 0.0),
        lambda x: pre.contrast(x[:, :1], 3.0),
    ):
        torch.testing.assert_close(function(flat), flat[:, : function(flat).shape[1]])
    edges = images((2, 1, 2, 5))
    assert torch.equal(pre.sharpness(edges, 0.0), edges)


def test_add_noise() -> None:
    x, sigma = images((N, 3, 6, 6), torch.float64), torch.linspace(0, 0.4, N, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=generator(), dtype=torch.float64)
    by_hand = torch.stack([(i + s * n).clamp(0, 1) for i, s, n in zip(x, sigma, noise, strict=True)])
    torch.testing.assert_close(pre.add_noise(x, sigma, noise), by_hand, rtol=0, atol=1e-15)
    added = pre.random_noise(torch.full((200, 1, 20, 20), 0.5), generator(), sigma=0.1) - 0.5
    assert float(added.std()) == pytest.approx(0.1, rel=0.01)
    assert abs(float(added.mean())) < 1e-3
    assert abs(float((added[:, 0, 0, 0] * added[:, 0, 0, 1]).mean())) < 0.003


def test_random_brightness_contrast_is_color_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = torch.full((4000, 1, 1, 1), 0.5, dtype=torch.float64), []
    factors = pre.random_brightness_contrast(x, generator(), brightness=0.3, contrast=0.0).flatten() / 0.5
    assert float(factors.min()) == pytest.approx(0.7, abs=0.002)
    assert float(factors.max()) == pytest.approx(1.3, abs=0.002)
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.01)
    for name in ("_brightness", "_contrast"):
        monkeypatch.setattr(colour, name, lambda x, factor, name=name: seen.append((name, factor)) or x)
    pre.random_brightness_contrast(x, generator(), brightness=2.0, contrast=0.1)
    assert [name for name, _ in seen] == ["_brightness", "_contrast"]
    (low, high), (least, most) = ((float(f.min()), float(f.max())) for _, f in seen)
    assert 0 <= low < 0.002
    assert 2.998 < high <= 3
    assert 0.9 <= least < 0.9002
    assert 1.0998 < most <= 1.1
    assert abs(float(torch.corrcoef(torch.stack([f for _, f in seen]))[0, 1])) < 0.05


# --- Operations of the policies against torchvision's -----------------------------------------------------------------

TABLES = {
    "random_augment": (policies.RANDOM_AUGMENT, v2.RandAugment._AUGMENTATION_SPACE, 31),
    "trivial_augment": (policies.TRIVIAL_AUGMENT, v2.TrivialAugmentWide._AUGMENTATION_SPACE, 31),
    "augmix": (policies.AUGMIX, v2.AugMix._AUGMENTATION_SPACE, 10),
}
POLICIES = pytest.mark.parametrize("policy", TABLES)


@POLICIES
@pytest.mark.parametrize("size", [(32, 32), (28, 20)])
def test_magnitudes_are_torchvisions(policy: str, size: tuple[int, int]) -> None:
    ours, theirs, bins = TABLES[policy]
    assert set(ours) == set(theirs)
    assert set(ours) <= set(policies.OPERATIONS)
    for name, (function, signed) in theirs.items():
        table = function(bins, *size)
        expected = torch.zeros(bins) if table is None else table
        assert torch.equal(ours[name].table(bins, *size), expected.double()), name
        assert ours[name].signed == signed, name


@pytest.mark.parametrize("shape", [(N, 3, 20, 20), (N, 1, 18, 24)], ids=["colour", "grey"])
@POLICIES
def test_operations_are_torchvisions(policy: str, shape: tuple[int, ...]) -> None:
    """Every operation at every level of every policy, with both signs, all in one mixed batch."""
    ours, theirs, bins = TABLES[policy]
    cases = [
        (k, level, sign)
        for k, each in enumerate(ours.values())
        for level in range(bins)
        for sign in (0, 1)[: 1 + each.signed]
    ]
    order = torch.randperm(len(cases), generator=generator())
    which, level, sign = torch.tensor(cases)[order].T
    x = 0.2 + 0.6 * images((len(cases), *shape[1:]))  # with room for autocontrast
    magnitude = policies.magnitudes_of(ours, which, level, sign.bool(), bins, x)
    found = pre.apply_operations(x, list(ours), which, magnitude)
    names, base = list(ours), v2.RandAugment()

    def reference(image: Tensor, k: int) -> Tensor:
        name = names[which[k]]
        table = theirs[name][0](bins, *image.shape[-2:])
        strength = 0.0 if table is None else float(table[level[k]]) * (-1 if sign[k] else 1)
        return base._apply_image_or_video_transform(image, name, strength, v2.InterpolationMode.BILINEAR, {})

    expected = one_by_one(x, reference)
    apart = (found - expected).abs().flatten(1).amax(1)
    for k, name in enumerate(names):
        assert float(apart[which == k].max()) < 5e-6, name
        if name not in ("Identity", "Color"):
            assert float((expected - x).abs().flatten(1).amax(1)[which == k].max()) > 0.05, name


def test_color_is_the_identity_on_grey_images() -> None:
    grey, bright = images((4, 1, 6, 6)), images((4, 3, 6, 6))
    strength = torch.full((4,), 0.9, dtype=torch.float64)
    which = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(pre.apply_operations(grey, ["Color"], which, strength), grey)
    assert not torch.equal(pre.apply_operations(bright, ["Color"], which, strength), bright)


# --- What the policies draw -------------------------------------------------------------------------------------------

MANY = 4200
Drawn = list[tuple[list[str], Tensor, Tensor]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """What operations and magnitudes were applied, step by step; each adds 1 to the pixels instead."""
    found: Drawn = []

    def record(x: Tensor, names: list[str], which: Tensor, magnitude: Tensor) -> Tensor:
        found.append((names, which, magnitude))
        return x + 1

    monkeypatch.setattr(policies, "apply_operations", record)
    return found


def check_even(which: Tensor, count: int) -> None:
    share = which.bincount(minlength=count).double() / len(which)
    assert len(share) == count
    assert float((share - 1 / count).abs().max()) < 0.02


def test_random_augment_draws_operations_and_signs(drawn: Drawn) -> None:
    x = torch.zeros(MANY, 3, 30, 40)
    assert torch.equal(pre.random_augment(x, generator(), operations=3, magnitude=12), x + 3)
    assert len(drawn) == 3
    assert abs(float(torch.corrcoef(torch.stack([w.double() for _, w, _ in drawn]))[0, 1])) < 0.05
    for names, which, magnitude in drawn:
        check_even(which, 14)
        for k, name in enumerate(names):
            function, signed = v2.RandAugment._AUGMENTATION_SPACE[name]
            table = function(31, 30, 40)
            size = 0.0 if table is None else float(table[12])
            values = magnitude[which == k]
            assert set(values.abs().tolist()) == {size}
            assert float((values < 0).double().mean()) == pytest.approx(0.5 if signed else 0, abs=0.12)


def test_trivial_augment_draws_one_operation_and_its_level(drawn: Drawn) -> None:
    x = torch.zeros(MANY, 1, 30, 40)
    assert torch.equal(pre.trivial_augment(x, generator()), x + 1)
    ((names, which, magnitude),) = drawn
    check_even(which, 14)
    for k, name in enumerate(names):
        function, signed = v2.TrivialAugmentWide._AUGMENTATION_SPACE[name]
        table = function(31, 30, 40)
        values = magnitude[which == k]
        allowed = {0.0} if table is None else {float(v) for v in table}
        assert set(values.abs().tolist()) == allowed
        assert float((values < 0).double().mean()) == pytest.approx(0.48 if signed else 0, abs=0.12)


def test_augmix_mixes_chains(drawn: Drawn) -> None:
    """Where each step of a chain adds 1, the result tells the weights and depths."""
    x = torch.zeros(MANY, 1, 30, 40, dtype=torch.float64)
    share = pre.augmix(x, generator(), severity=3, depth=1, alpha=0.5)[:, 0, 0, 0]  # 1 - m, as all chains are 1
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * 0.5 + 1)), abs=0.006)  # of Beta(1/2, 1/2)
    ((names, which, magnitude),) = drawn
    assert len(which) == 3 * MANY
    check_even(which, 13)
    for k, name in enumerate(names):
        function, _ = v2.AugMix._AUGMENTATION_SPACE[name]
        table = function(10, 30, 40)
        assert set(magnitude[which == k].abs().tolist()) == ({0.0} if table is None else {float(v) for v in table[:3]})
    drawn.clear()
    deep = pre.augmix(x, generator(), width=1, alpha=1e6)[:, 0, 0, 0] * 2  # weights of a half: the depth itself
    found, counts = deep.round().unique(return_counts=True)
    assert found.tolist() == [1, 2, 3]
    assert float((deep - deep.round()).abs().max()) < 0.02
    assert counts.min() > 0.3 * MANY
    assert [len(which) for _, which, _ in drawn] == [MANY, int((deep.round() > 1).sum()), int((deep.round() > 2).sum())]
    drawn.clear()
    three = pre.augmix(x, generator(), width=3, alpha=1.0)[:, 0, 0, 0]
    # the mean of three depths, each of variance 2/3, weighted by Dirichlet(1, 1, 1), of which E[sum w^2] = 1/2
    depth_square = 4 + 2 / 3 * 0.5
    assert float(three.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(three.square().mean()) == pytest.approx(depth_square / 3, abs=0.05)


def test_augmix_leaves_a_convex_mean_of_what_it_should() -> None:
    """With the drawn weights taken from the same stream, the sum is formed again by hand."""
    x, g = images((5, 3, 10, 10), torch.float64), generator(7)
    found = pre.augmix(x, g, width=2, depth=1)
    g = generator(7)
    own = torch._sample_dirichlet(torch.ones(5, 2, dtype=torch.float64), generator=g)
    weights = torch._sample_dirichlet(torch.ones(5, 2, dtype=torch.float64), generator=g)
    level = torch.randint(0, 3, (10,), generator=g)
    which = torch.randint(0, 13, (10,), generator=g)
    sign = torch.rand(10, generator=g, dtype=torch.float64) < 0.5
    twice = x.repeat_interleave(2, 0)
    magnitude = policies.magnitudes_of(policies.AUGMIX, which, level, sign, 10, x)
    done = pre.apply_operations(twice, list(policies.AUGMIX), which, magnitude)
    expected = [own[n, 0] * x[n] + own[n, 1] * sum(weights[n, i] * done[2 * n + i] for i in (0, 1)) for n in range(5)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-12)


# --- At the door ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: pre.brightness(x, -0.1), "factor holds -0.1: must be finite numbers from 0"),
        (lambda x: pre.contrast(x, torch.ones(3)), r"factor has the shape \[3\]: must be \[8\]"),
        (lambda x: pre.contrast(x[:, :2], 1.0), "x has 2 channels: must have 1"),
        (lambda x: pre.posterize(x, 9), "bits holds 9: must be finite numbers from 0 to 8"),
        (lambda x: pre.posterize(x, 2.5), "bits holds 2.5: must be whole numbers"),
        (lambda x: pre.solarize(x, 1.1), "threshold holds 1.1"),
        (lambda x: pre.sharpness(x, float("inf")), "factor holds inf"),
        (lambda x: pre.add_noise(x, -1.0, x), "sigma holds -1"),
        (lambda x: pre.add_noise(x, 1.0, x[0]), r"noise has the shape \[3, 6, 6\]: must be that of x"),
        (lambda x: pre.equalize((x * 255).byte()), "x is torch.uint8"),
        (lambda x: pre.random_noise(x, generator(), sigma=-0.1), "sigma=-0.1: must be a number of at least 0"),
        (lambda x: pre.random_brightness_contrast(x, generator(), contrast=-1), "contrast=-1: must be"),
        (
            lambda x: pre.random_augment(x, generator(), magnitude=31),
            "magnitude=31: must be a whole number from 0 to 30",
        ),
        (lambda x: pre.random_augment(x, generator(), operations=-1), "operations=-1"),
        (lambda x: pre.random_augment(x[:, :2], generator()), "x has 2 channels: must have 1"),
        (lambda x: pre.trivial_augment(x, generator(), bins=1), "bins=1: must be a whole number of at least 2"),
        (lambda x: pre.augmix(x, generator(), severity=11), "severity=11: must be a whole number from 1 to 10"),
        (lambda x: pre.augmix(x, generator(), alpha=0), "alpha=0: must be a number above 0"),
        (lambda x: pre.augmix(x, generator(), depth=0), "depth=0: must be a whole number of at least 1"),
        (lambda x: pre.apply_operations(x, ["Twirl"], torch.zeros(8).long(), torch.zeros(8)), r"holds \['Twirl'\]"),
        (lambda x: pre.apply_operations(x, ["Invert"], torch.zeros(8).long(), torch.zeros(8)), r"holds \['Invert'\]"),
        (
            lambda x: pre.apply_operations(x, ["Rotate"], torch.zeros(7).long(), torch.zeros(8)),
            r"which has the shape \[7\]: must be \[8\]",
        ),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(images((N, 3, 6, 6)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_on_the_gpu(name: str) -> None:
    x = images(SHAPES[0])
    ours, _ = KERNELS[name]
    torch.testing.assert_close(ours(x.cuda()).cpu(), ours(x), rtol=0, atol=1e-6)
