"""Images out of a teacher: the statistics by hand, and images that the teacher takes for what was asked."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import distillation as kd
from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from tests.distillation.small import SMALL_CONVNET, generator, normal

ASKED = torch.arange(40) % 10
TEACHER = partial(convnet, (1, 16, 16), 10, width=6)
RECIPE = Recipe(epochs=5, batch_size=25)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("glyphs", classes="digits", size=16, difficulty=0.2, train_size=400, val_size=50, test_size=50)


@pytest.fixture(scope="module")
def wise(data: Dataset) -> nn.Module:
    network = fresh(TEACHER, RECIPE, seed=0)
    fit(network, data, RECIPE, seed=0)
    return kd.frozen(network)


@pytest.fixture(scope="module")
def found(data: Dataset, wise: nn.Module) -> Tensor:
    before = copy.deepcopy(wise.state_dict())
    x = kd.invert(wise, ASKED, (1, 16, 16), generator=generator(), steps=60, bounds=kd.black_and_white(data.train))
    assert all(torch.equal(before[name], value) for name, value in wise.state_dict().items())
    return x


def test_the_distance_is_that_of_means_and_variances(wise: nn.Module) -> None:
    x = normal(7, 1, 16, 16).float()
    names = [name for name, part in wise.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert [part for part in wise.modules() if isinstance(part, nn.BatchNorm2d)] == kd.batch_norms(wise)
    before = [f"features.{int(name.split('.')[1]) - 1}" for name in names]
    with kd.features(wise, before) as inputs:
        wise(x)
    expected = 0.0
    for name, layer in zip(before, kd.batch_norms(wise), strict=True):
        off_mean, off_variance = 0.0, 0.0
        for c in range(inputs[name].shape[1]):
            values = inputs[name][:, c].double().flatten()
            mean = values.sum() / len(values)
            off_mean += float((mean - layer.running_mean[c]) ** 2)  # type: ignore[index]
            variance = (values - mean).square().sum() / len(values)
            off_variance += float((variance - layer.running_var[c]) ** 2)  # type: ignore[index]
        expected += off_mean**0.5 + off_variance**0.5
    assert kd.statistics_distance(wise, x).item() == pytest.approx(expected, rel=1e-4)
    assert not any(part._forward_pre_hooks for part in SMALL_CONVNET().modules())


def test_total_variation_is_the_mean_step_between_neighbours() -> None:
    x = normal(2, 3, 4, 5)
    down = [
        abs(x[n, c, i + 1, j] - x[n, c, i, j]) for n in range(2) for c in range(3) for i in range(3) for j in range(5)
    ]
    right = [
        abs(x[n, c, i, j + 1] - x[n, c, i, j]) for n in range(2) for c in range(3) for i in range(4) for j in range(4)
    ]
    expected = sum(down) / len(down) + sum(right) / len(right)
    torch.testing.assert_close(kd.total_variation(x), torch.as_tensor(expected))


def test_what_comes_out_is_nearer_than_noise_and_is_taken_for_what_was_asked(
    data: Dataset, wise: nn.Module, found: Tensor
) -> None:
    noise = torch.randn(found.shape, generator=generator())
    real, _ = next(batches(data.train, 40))
    far = [kd.statistics_distance(wise, x).item() for x in (found, noise, real)]
    assert far[0] < 0.4 * far[1]
    assert far[0] < 1.5 * far[2]
    assert (wise(found).argmax(1) == ASKED).float().mean() > 0.9
    assert (wise(noise).argmax(1) == ASKED).float().mean() < 0.3
    low, high = kd.black_and_white(data.train)
    assert low[0] <= found.min()
    assert found.max() <= high[0]
    assert kd.total_variation(found) < 0.7 * kd.total_variation(noise)


def test_without_the_statistics_the_images_are_far(wise: nn.Module, found: Tensor) -> None:
    other = kd.invert(wise, ASKED, (1, 16, 16), generator=generator(), steps=60, statistics=0.0)
    assert kd.statistics_distance(wise, found) < 0.4 * kd.statistics_distance(wise, other)
    assert (wise(other).argmax(1) == ASKED).float().mean() > 0.9


def test_each_weight_does_what_it_says(wise: nn.Module) -> None:
    draw = partial(kd.invert, wise, ASKED, (1, 16, 16), steps=25)
    plain = draw(generator=generator(), variation=0.0, size=0.0)
    smooth = draw(generator=generator(), variation=5.0, size=0.0)
    small = draw(generator=generator(), variation=0.0, size=20.0)
    assert kd.total_variation(smooth) < 0.7 * kd.total_variation(plain)
    assert small.square().mean() < 0.5 * plain.square().mean()


def test_the_same_seed_gives_the_same_images(wise: nn.Module) -> None:
    draw = partial(kd.invert, wise, ASKED[:4], (1, 16, 16), steps=3)
    assert torch.equal(draw(generator=generator(3)), draw(generator=generator(3)))
    assert not torch.equal(draw(generator=generator(3)), draw(generator=generator(4)))
    assert not torch.equal(draw(generator=generator(3)), draw(generator=generator(3), jitter=0))


def test_a_teacher_in_training_mode_comes_back_as_it_was() -> None:
    network = TEACHER().train()
    before = copy.deepcopy(network.state_dict())
    kd.invert(network, ASKED[:4], (1, 16, 16), generator=generator(), steps=2)
    assert network.training
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_student_learns_from_them_alone(data: Dataset, wise: nn.Module, found: Tensor) -> None:
    drawn = kd.inverted(data, found, ASKED)
    assert (len(drawn.train), len(drawn.val)) == (40, 50)
    x, y = next(batches(drawn.train, 40))
    assert torch.equal(y, ASKED)
    assert (x - found).abs().max() <= 0.5 / 255 / data.train.std[0] + 1e-5
    assert evaluate(wise, drawn.train).accuracy > 0.9
    recipe = Recipe(epochs=4, batch_size=20, objective=partial(kd.soft_targets, teacher=wise))
    losses = fit(fresh(SMALL_CONVNET, recipe, seed=0), drawn, recipe, seed=0)["train_loss"]
    assert losses[-1] < losses[0]


def test_bad_input_is_named(data: Dataset, wise: nn.Module) -> None:
    invert: Any = partial(kd.invert, input_shape=(1, 16, 16), generator=generator())
    cases: list[tuple[str, Any]] = [
        ("teacher=MLP has no batch norm with running statistics", lambda: invert(mlp((1, 16, 16), 10), ASKED)),
        ("teacher=MLP has no batch norm", lambda: kd.statistics_distance(mlp((1, 16, 16), 10), torch.zeros(1))),
        ("labels hold 10: must be the teacher's classes, 0 to 9", lambda: invert(wise, torch.tensor([3, 10]))),
        ("labels hold -1: must be the teacher's classes", lambda: invert(wise, torch.tensor([3, -1]))),
        ("labels are torch.float32 [2]: must be int64 [N]", lambda: invert(wise, torch.zeros(2))),
        ("steps=0: must be a whole number of at least 1", lambda: invert(wise, ASKED, steps=0)),
        ("jitter=-1: must be a whole number of at least 0", lambda: invert(wise, ASKED, jitter=-1)),
        ("lr=0: must be a number above 0", lambda: invert(wise, ASKED, lr=0)),
        ("statistics=-1: must be a number of at least 0", lambda: invert(wise, ASKED, statistics=-1)),
        (
            "x is [3, 1, 16, 16]: must be [2, *[1, 16, 16]]",
            lambda: kd.inverted(data, torch.zeros(3, 1, 16, 16), ASKED[:2]),
        ),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_inversion_on_the_gpu(wise: nn.Module) -> None:
    there = copy.deepcopy(wise).cuda()
    x = kd.invert(there, ASKED.cuda(), (1, 16, 16), generator=generator(), steps=40)
    noise = torch.randn(40, 1, 16, 16, generator=generator()).cuda()
    assert kd.statistics_distance(there, x) < 0.5 * kd.statistics_distance(there, noise)
