"""Mixing against torchvision's classes for the same weights and rectangles; pipelines through the laboratory."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import preprocessing as pre
from course_lib.lab.data import Dataset, batches, load, normalise
from course_lib.lab.experiments import compare
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh, logits_of
from course_lib.preprocessing import mixing
from tests.preprocessing.images import generator, images, v2

N, K = 8, 5
BEFORE = torch.arange(N).roll(1)  # torchvision takes the image before as the partner
LABELS = torch.randint(K, (N,), generator=generator(9))


def mixed_by_torchvision(transform: Any, x: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """``x`` and ``LABELS`` as v2's class mixes them with these parameters."""
    params = {"labels": LABELS, "batch_size": len(x), **settings}
    return transform.transform(x, params), transform.transform(LABELS, params)


# --- Mixing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.8, 1.0])
def test_mix_is_torchvisions_mixup(lam: float) -> None:
    x, y = images((N, 3, 6, 7)), pre.soft_labels(LABELS, K)
    for weight in (lam, torch.full((N,), lam)):
        found = pre.mix(x, y, weight, BEFORE)
        for ours, theirs in zip(found, mixed_by_torchvision(v2.MixUp(num_classes=K), x, lam=lam), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-7)


def test_mix_with_a_weight_an_image() -> None:
    x, y = images((N, 3, 6, 7), torch.float64), pre.soft_labels(LABELS, K, torch.float64)
    lam, partner = torch.rand(N, generator=generator(), dtype=torch.float64), torch.randperm(N, generator=generator())
    mixed, soft = pre.mix(x, y, lam, partner)
    for k in range(N):
        j = int(partner[k])
        torch.testing.assert_close(mixed[k], lam[k] * x[k] + (1 - lam[k]) * x[j], rtol=0, atol=1e-15)
        torch.testing.assert_close(soft[k], lam[k] * y[k] + (1 - lam[k]) * y[j], rtol=0, atol=1e-15)


@pytest.mark.parametrize("box", [(1, 2, 4, 3), (0, 0, 6, 7), (2, 2, 0, 5), (3, 5, 3, 2)])
def test_paste_is_torchvisions_cutmix(box: tuple[int, int, int, int]) -> None:
    x, y = images((N, 3, 6, 7)), pre.soft_labels(LABELS, K)
    top, left, height, width = box
    theirs = mixed_by_torchvision(
        v2.CutMix(num_classes=K), x, box=(left, top, left + width, top + height), lam_adjusted=1 - height * width / 42
    )
    ours = pre.paste(x, y, *(torch.full((N,), side) for side in box), BEFORE)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=2e-7)


@pytest.mark.parametrize("lam", [0.05, 0.4, 0.93])
@pytest.mark.parametrize("centre", [(0, 0), (11, 3), (5, 19)])
def test_cutmix_draws_torchvisions_rectangle(lam: float, centre: tuple[int, int], monkeypatch: Any) -> None:
    """The same weight and middle give the same rectangle, cut off at the edge, and the same labels."""
    x = images((N, 1, 12, 20))
    row, column = centre
    theirs = v2.CutMix(num_classes=K)
    theirs._dist = type("Given", (), {"sample": lambda self, shape: torch.tensor([lam])})()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda high, size: torch.tensor([{20: column, 12: row}[high]]))
        params = theirs.make_params([x])
    expected = mixed_by_torchvision(theirs, x, **params)
    monkeypatch.setattr(mixing, "dirichlet", lambda g, alpha, *shape: torch.tensor([lam, 1 - lam]).expand(shape))
    monkeypatch.setattr(mixing, "whole", lambda g, low, high, n: torch.full((n,), {19: column, 11: row}[high]))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: BEFORE)
    found = pre.cutmix(x, LABELS, generator(), classes=K)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=2e-7)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_draws_a_beta_and_a_partner_for_each_image(alpha: float) -> None:
    count = 4000
    x = torch.arange(count, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 1, 1, 2).clone()
    x[..., 1] = 1  # a pixel that is 1 in all stays 1
    y = torch.arange(count) % 2
    mixed, soft = pre.mixup(x, torch.eye(2, dtype=torch.float64)[y], generator(), alpha=alpha)
    assert bool((mixed[..., 1] == 1).all())
    torch.testing.assert_close(soft.sum(1), torch.ones(count, dtype=torch.float64))
    lam = torch.where(y == 0, soft[:, 0], soft[:, 1])
    lam = lam[lam < 1]  # of those whose partner has the other label
    assert 0.4 < len(lam) / count < 0.6
    assert float(lam.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(lam.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)
    again, _ = pre.mixup(x, y, generator(), alpha=alpha, classes=2)
    torch.testing.assert_close(again, mixed, rtol=0, atol=1e-9)
    shuffled = set(torch.randperm(count, generator=generator()).tolist())
    assert len(shuffled) == count


def test_cutmix_labels_are_what_is_seen() -> None:
    count = 2000
    y = torch.arange(count) % 4
    x = y.view(-1, 1, 1, 1).float().expand(-1, 1, 9, 11) / 4
    mixed, soft = pre.cutmix(x, y, generator(), classes=4)
    for label in range(4):
        seen = (mixed == label / 4).float().mean((1, 2, 3))
        torch.testing.assert_close(soft[:, label], seen, rtol=0, atol=1e-6)
    assert float(soft.amax(1).std()) > 0.1
    assert len(mixed.flatten(1).unique(dim=0)) > 500


def test_soft_labels() -> None:
    assert pre.soft_labels(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    soft = torch.tensor([[0.3, 0.7]])
    assert torch.equal(pre.soft_labels(soft), soft)
    twice = pre.cutmix(*pre.mixup(images((N, 1, 4, 4)), LABELS, generator(), classes=K), generator())[1]
    torch.testing.assert_close(twice.sum(1), torch.ones(N))


@pytest.mark.parametrize("transform", [pre.mixup, pre.cutmix])
def test_mixing_in_other_types_and_for_each_seed(transform: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x = images((N, 3, 6, 7))
    first, again = (transform(x, LABELS, generator(1), classes=K) for _ in range(2))
    other = transform(x, LABELS, generator(2), classes=K)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    exact = transform(x.double(), LABELS, generator(1), classes=K)
    half = transform(x.bfloat16(), LABELS, generator(1), classes=K)
    assert (exact[0].dtype, exact[1].dtype) == (torch.float64, torch.float64)
    assert (half[0].dtype, half[1].dtype) == (torch.bfloat16, torch.float32)
    for a, b, c in zip(first, exact, half, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6)
        torch.testing.assert_close(c.double(), b, rtol=0, atol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("transform", [pre.mixup, pre.cutmix])
def test_mixing_on_the_gpu(transform: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x = images((N, 3, 6, 7))
    here = transform(x, LABELS, generator(1), classes=K)
    there = transform(x.cuda(), LABELS.cuda(), generator(1), classes=K)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x, y: pre.mixup(x, y, generator()), "classes=None: must be the number of classes"),
        (lambda x, y: pre.mixup(x, y, generator(), classes=K, alpha=0), "alpha=0: must be a number above 0"),
        (lambda x, y: pre.cutmix(x, y + 1, generator(), classes=int(y.max()) + 1), r"y holds \d, classes="),
        (lambda x, y: pre.cutmix(x, y - 9, generator(), classes=K), "must be positions from 0 to 4"),
        (lambda x, y: pre.cutmix(x, torch.eye(N), generator(), classes=K), "classes=5: must be 8"),
        (lambda x, y: pre.mixup(x, y.float(), generator(), classes=K), r"y is torch.float32 \[8\]: must be int64"),
        (lambda x, y: pre.mix(x, torch.eye(N), 1.2, BEFORE), "lam holds 1.2: must be finite numbers from 0 to 1"),
        (lambda x, y: pre.mix(x, torch.eye(N), 0.5, BEFORE[:3]), r"partner is torch.int64 \[3\]: must be int64 \[8\]"),
        (lambda x, y: pre.paste(x, torch.eye(N), 0, 0, -1, 2, BEFORE), "height holds -1"),
    ],
)
def test_bad_mixing(call: Callable[[Tensor, Tensor], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(images((N, 1, 6, 6)), LABELS)


# --- Pipelines --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=128)


def small(recipe: Recipe, seed: int = 0) -> nn.Module:
    return fresh(partial(mlp, (1, 8, 8), 10, width=16), recipe, seed=seed)


def darken(x: Tensor, generator: torch.Generator, by: float = 0.5) -> Tensor:
    return x * by


def rename(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return x + 0.25, (y + 1) % 10


def test_compose_applies_in_order_and_takes_labels_where_one_does() -> None:
    x, y = torch.zeros(2, 1, 3, 3), torch.tensor([3, 9])
    plain = pre.compose(lambda x, g: x + 1, darken)
    assert not pre.takes_labels(plain)
    assert torch.equal(plain(x, generator()), torch.full_like(x, 0.5))  # type: ignore[call-arg, arg-type]
    both = pre.compose(darken, rename, darken, pre.compose(rename))
    assert pre.takes_labels(both)
    moved, labels = both(x, y, generator())  # type: ignore[call-arg, arg-type, misc]
    assert torch.equal(moved, torch.full_like(x, 0.375))
    assert labels.tolist() == [5, 1]
    assert pre.compose()(x, generator()) is x  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_on_pixels_gives_pixels_and_normalises_again(digits: Dataset, dtype: torch.dtype) -> None:
    split = digits.train
    seen: list[Tensor] = []
    pixels = split.images[:20].to(torch.float64) / 255
    x, _ = next(iter(batches(split, 20)))
    x = x.to(dtype)
    eps = 0.02 if dtype == torch.bfloat16 else 1e-6
    found = pre.on_pixels(split, lambda x, g: seen.append(x) or x)(x, generator())  # type: ignore[call-arg, arg-type, func-returns-value]
    assert found.dtype == dtype
    assert seen[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert 0 <= float(seen[0].min()) <= float(seen[0].max()) <= 1
    torch.testing.assert_close(seen[0].double(), pixels, rtol=0, atol=eps)
    torch.testing.assert_close(found, x, rtol=0, atol=4 * eps)
    dark = pre.on_pixels(split, darken)(x, generator())  # type: ignore[call-arg, arg-type]
    expected = (pixels * 0.5 - split.mean[0]) / split.std[0]
    torch.testing.assert_close(dark.double(), expected, rtol=0, atol=4 * eps)


def test_on_pixels_knows_each_channel() -> None:
    data = load("glyphs", train_size=40, test_size=40, size=16)
    split = replace(data.train, inputs=data.train.images.repeat(1, 3, 1, 1), mean=(0.1, 0.4, 0.5), std=(0.2, 0.3, 0.1))
    x = normalise(split.images[:4], split)
    seen: list[Tensor] = []
    found = pre.on_pixels(split, lambda x, g: seen.append(x) or x)(x, generator())  # type: ignore[call-arg, arg-type, func-returns-value]
    torch.testing.assert_close(seen[0], split.images[:4] / 255, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5)


def test_on_pixels_with_labels(digits: Dataset) -> None:
    augment = pre.on_pixels(digits.train, pre.random_crop, rename, partial(pre.cutmix, classes=10))
    assert pre.takes_labels(augment)
    for x, y in batches(digits.train, 32, generator=generator(), augment=augment, dtype=torch.float64):
        assert (x.dtype, y.dtype, y.shape) == (torch.float64, torch.float64, (32, 10))
        torch.testing.assert_close(y.sum(1), torch.ones(32, dtype=torch.float64), rtol=0, atol=1e-6)


AUGMENTS: dict[str, Callable[[Dataset], Any]] = {
    "pixels": lambda data: pre.on_pixels(data.train, partial(pre.random_crop, padding=1), pre.trivial_augment),
    "mixup": lambda data: partial(pre.mixup, alpha=0.4, classes=10),
    "cutmix": lambda data: partial(pre.cutmix, classes=10),
    "both": lambda data: pre.on_pixels(data.train, pre.random_rotation, partial(pre.mixup, classes=10)),
    "compose": lambda data: pre.compose(partial(pre.mixup, classes=10), partial(pre.cutmix, classes=10)),
}


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", AUGMENTS)
def test_fit_with_the_usual_objective(digits: Dataset, name: str, precision: Any) -> None:
    recipe = Recipe(epochs=1, batch_size=32, augment=AUGMENTS[name](digits), precision=precision)
    model = small(recipe)
    first = F.cross_entropy(logits_of(model, digits.train), digits.train.labels)
    history = fit(model, digits, recipe, seed=0)
    assert history["train_loss"][-1] != pytest.approx(float(first))
    again = small(recipe)
    assert fit(again, digits, recipe, seed=0)["train_loss"] == history["train_loss"]


def test_mixup_trains_as_the_formula_says(digits: Dataset) -> None:
    """One step by hand: the mean of the two cross-entropies, weighted by lambda."""
    seen: list[Any] = []

    def mixup(x: Tensor, y: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        seen.extend((x.double(), y, torch.Generator().set_state(g.get_state())))
        return pre.mixup(x, y, g, classes=10)

    recipe = Recipe(epochs=1, batch_size=128, augment=mixup, precision="float64")
    loss = fit(small(recipe), digits, recipe, seed=0).losses[0]
    x, y, g = seen
    partner = torch.randperm(128, generator=g)
    lam = torch._sample_dirichlet(torch.ones(128, 2, dtype=torch.float64), generator=g)[:, 0]
    share = lam.view(-1, 1, 1, 1)
    with torch.no_grad():
        logits = small(recipe)(share * x + (1 - share) * x[partner])
    by_hand = lam * F.cross_entropy(logits, y, reduction="none")
    by_hand += (1 - lam) * F.cross_entropy(logits, y[partner], reduction="none")
    assert float(by_hand.mean()) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("name", AUGMENTS)
def test_pickled_and_made_again_it_is_the_same(digits: Dataset, name: str) -> None:
    augment = AUGMENTS[name](digits)
    twin = pickle.loads(pickle.dumps(augment))
    assert fingerprint(twin) == fingerprint(augment) == fingerprint(AUGMENTS[name](digits))
    ours, theirs = (list(batches(digits.train, 64, generator=generator(), augment=a)) for a in (augment, twin))
    assert all(
        torch.equal(a, b) for first, other in zip(ours, theirs, strict=True) for a, b in zip(first, other, strict=True)
    )


def test_other_settings_have_another_fingerprint(digits: Dataset) -> None:
    split = digits.train
    kinds = [
        pre.on_pixels(split, pre.random_crop),
        pre.on_pixels(split, partial(pre.random_crop, padding=1)),
        pre.on_pixels(split, pre.random_crop, pre.random_flip),
        pre.on_pixels(split, pre.random_flip, pre.random_crop),
        pre.on_pixels(replace(split, mean=(0.1,)), pre.random_crop),
        pre.compose(pre.random_crop),
    ]
    assert len({fingerprint(kind) for kind in kinds}) == len(kinds)


def test_compare_on_two_workers(digits: Dataset) -> None:
    arms = {name: Recipe(epochs=1, augment=AUGMENTS[name](digits)) for name in ("pixels",)}
    model = partial(mlp, (1, 8, 8), 10, width=8)
    here, there = (compare(arms, model=model, data=digits, seeds=2, workers=workers) for workers in (1, 2))
    for name in arms:
        assert here.values[name].tolist() == there.values[name].tolist()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda data: pre.compose(3), "transforms holds 3: must be functions"),
        (lambda data: pre.compose(lambda x: x), "must be functions"),
        (lambda data: pre.on_pixels(data.train, lambda x, y, g, k: x), "settings given by functools.partial"),
        (lambda data: pre.on_pixels(load("wine").train, darken), "must be a split of images"),
        (
            lambda data: pre.on_pixels(data.train, darken)(torch.zeros(2, 3, 8, 8), generator()),
            r"must be \[N, 1, H, W\]",
        ),
        (lambda data: pre.test_time(nn.Identity(), []), r"views=\(\): must be one function"),
        (lambda data: pre.test_time(nn.Identity(), [3]), r"views=\(3,\): must be one function"),
    ],
)
def test_bad_pipelines(digits: Dataset, call: Callable[[Dataset], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(digits)


# --- Test-time augmentation -------------------------------------------------------------------------------------------


def same(x: Tensor) -> Tensor:
    return x


def test_test_time_averages_probabilities(digits: Dataset) -> None:
    recipe = Recipe(epochs=2, precision="float64")
    model = small(recipe)
    fit(model, digits, recipe, seed=0)
    views = [same, partial(pre.flip, which=True), partial(pre.rotate, degrees=10.0)]
    averaged = pre.test_time(model, views)
    x, _ = next(iter(batches(digits.test, 50, dtype=torch.float64)))
    with torch.no_grad():
        expected = sum(model(view(x)).softmax(1) for view in views) / 3
        torch.testing.assert_close(averaged(x).softmax(1), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(averaged(x).exp(), expected, rtol=0, atol=1e-12)
    model.eval()
    found = evaluate(pre.test_time(model, views), digits.test)
    assert not model.training, "asking leaves the network as it was"
    probabilities = torch.cat([averaged(x).exp() for x, _ in batches(digits.test, 64, dtype=torch.float64)]).detach()
    labels = digits.test.labels
    assert found.accuracy == pytest.approx(float((probabilities.argmax(1) == labels).double().mean()))
    assert found.loss == pytest.approx(float(-probabilities[torch.arange(len(labels)), labels].log().mean()), abs=1e-9)
    alone, plain = evaluate(pre.test_time(model, [same]), digits.test), evaluate(model, digits.test)
    assert (alone.loss, alone.accuracy) == (pytest.approx(plain.loss, abs=1e-12), plain.accuracy)
    twin = pickle.loads(pickle.dumps(averaged))
    assert torch.equal(twin(x), averaged(x))
