"""The generated characters: reproducible, balanced, legible, and harder when asked to be."""

import hashlib
import os
import string
import subprocess
import sys

import numpy as np
import pytest
import torch

from course_lib.lab import glyphs
from course_lib.lab.data import batches, load

DOMAINS = pytest.mark.parametrize("domain", glyphs.DOMAINS)


@DOMAINS
def test_shape_type_and_channels(domain):
    images, labels = glyphs.generate(80, size=20, domain=domain)
    assert images.shape == (80, 3 if domain == "colour" else 1, 20, 20)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert len(np.unique(images.reshape(80, -1), axis=0)) == 80


@pytest.mark.parametrize("size", [16, 28, 64])
def test_the_same_character_at_every_size(size):
    """Shrunk to 16 pixels, an image drawn large shows what the one drawn small shows."""
    small, _ = glyphs.generate(40, size=16, difficulty=0)
    large, _ = glyphs.generate(40, size=size, difficulty=0)
    shrunk = torch.nn.functional.interpolate(torch.from_numpy(large).float(), size=(16, 16), mode="area").numpy()
    pairs = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, shrunk, strict=True)]
    strangers = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, np.roll(shrunk, 1, 0), strict=True)]
    assert min(pairs) > 0.9
    assert np.mean(strangers) < 0.6


@pytest.mark.parametrize("count", [1, 35, 36, 500])
def test_classes_are_balanced(count):
    _, labels = glyphs.generate(count, size=16)
    counts = np.bincount(labels, minlength=36)
    assert counts.max() - counts.min() <= 1


@DOMAINS
def test_same_seed_same_images_and_another_seed_others(domain):
    first, _ = glyphs.generate(50, size=16, seed=3, domain=domain)
    again, _ = glyphs.generate(50, size=16, seed=3, domain=domain)
    other, _ = glyphs.generate(50, size=16, seed=4, domain=domain)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_same_images_on_one_thread_without_vector_instructions():
    code = (
        "import hashlib; from course_lib.lab import glyphs;"
        "print(*(hashlib.sha256(glyphs.generate(60, domain=d, difficulty=.7)[0].tobytes()).hexdigest()"
        " for d in glyphs.DOMAINS))"
    )
    plain = {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    # numpy refuses to switch off what the processor does not have, so this names what it has.
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    plain["NPY_DISABLE_CPU_FEATURES"] = " ".join(f for f in __cpu_dispatch__ if __cpu_features__.get(f))
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **plain}, capture_output=True, text=True, check=True
    )
    here = [
        hashlib.sha256(glyphs.generate(60, domain=d, difficulty=0.7)[0].tobytes()).hexdigest() for d in glyphs.DOMAINS
    ]
    assert ran.stdout.split() == here


@DOMAINS
def test_a_larger_count_begins_with_the_smaller_one(domain):
    few, few_labels = glyphs.generate(glyphs.CHUNK - 50, size=16, domain=domain)
    many, many_labels = glyphs.generate(glyphs.CHUNK + 50, size=16, domain=domain)
    assert np.array_equal(many[: len(few)], few)
    assert np.array_equal(many_labels[: len(few)], few_labels)


def test_knobs_keep_the_characters():
    labels = [glyphs.generate(70, size=16, difficulty=d, domain=o)[1] for d, o in [(0, "print"), (1, "chalk")]]
    assert np.array_equal(*labels)


@pytest.mark.parametrize(("classes", "names"), [("digits", string.digits), ("letters", string.ascii_uppercase)])
def test_choice_of_classes(classes, names):
    data = load("glyphs", classes=classes, count=6 * 30, size=16)
    assert data.classes == tuple(names)
    assert set(data.train.labels.tolist()) == set(range(len(names)))


def test_an_outline_is_filled_as_the_library_fills_it():
    """The reference: matplotlib's own point-in-path test on the same outline, and its area by the shoelace formula."""
    from matplotlib.path import Path

    side = glyphs.MASTER
    centres = (np.arange(side) + 0.5) / side
    points = np.stack(np.meshgrid(centres, centres), -1).reshape(-1, 2)
    for font, character in [("DejaVuSans", "8"), ("cmr10", "Q"), ("STIXGeneral", "B"), ("DejaVuSerif", "R")]:
        edges = glyphs._edges(font, character)
        filled = glyphs._filled(edges, side)
        area = abs((edges[:, 0] * edges[:, 3] - edges[:, 2] * edges[:, 1]).sum()) / 2
        assert filled.mean() == pytest.approx(area, rel=0.02)
        breaks = np.flatnonzero(np.any(edges[1:, :2] != edges[:-1, 2:], axis=1)) + 1
        inside = np.zeros(len(points), int)
        for contour in np.split(edges, breaks):  # contours one by one: holes are those inside an even number
            inside += Path(np.vstack([contour[:, :2], contour[-1:, 2:]])).contains_points(points)
        assert (filled == (inside % 2 == 1).reshape(side, side)).mean() > 0.999


def test_distance_maps_are_distances():
    maps = glyphs.distance_maps("I")
    edges = glyphs._edges(glyphs.FONTS[0], "I")
    # The letter I of a sans font is an upright box: the distance inside is known by hand.
    left, right = edges[:, 0].min(), edges[:, 0].max()
    middle = maps[0, 0, glyphs.MASTER // 2]
    assert middle.max() == pytest.approx((right - left) / 2, abs=1 / glyphs.MASTER)
    assert middle[0] == pytest.approx(-left, abs=1.5 / glyphs.MASTER)


def accuracy_of_a_small_network(domain, difficulty):
    data = load("glyphs", domain=domain, difficulty=difficulty, classes="digits", count=1800, size=20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(data.train.images[0].numel(), 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 10),
        )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for x, y in batches(data.train, 50, generator=generator):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        return sum((model(x).argmax(1) == y).sum().item() for x, y in batches(data.test, 100)) / len(data.test)


@DOMAINS
def test_a_small_network_learns_them_and_difficulty_makes_it_harder(domain):
    easy, hard = (accuracy_of_a_small_network(domain, d) for d in (0.1, 0.9))
    assert easy > 0.85
    assert hard < easy - 0.2


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("count", 0),
        ("size", 15),
        ("size", 65),
        ("difficulty", -0.1),
        ("difficulty", 1.1),
        ("difficulty", float("nan")),
        ("domain", "neon"),
        ("classes", "greek"),
    ],
)
def test_bad_knobs_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"{argument}( is |=){value!r}"):
        glyphs.generate(**{"count": 10, argument: value})
