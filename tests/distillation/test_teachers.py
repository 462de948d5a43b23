"""Teachers: what is frozen stays, ensembles are means, and what was looked up is what would have been computed."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

from course_lib import distillation as kd
from course_lib import preprocessing
from course_lib.lab.data import Dataset, load
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import thaw
from course_lib.lab.training import Recipe, evaluate, fit, fresh, logits_of
from tests.distillation.small import SMALL_CONVNET, images, network, teacher, tiny


@pytest.fixture(scope="module")
def data() -> Dataset:
    return tiny()


@pytest.fixture(scope="module")
def wise() -> torch.nn.Module:
    torch.manual_seed(5)
    return kd.frozen(SMALL_CONVNET())


# --- Frozen -----------------------------------------------------------------------------------------------------------


def test_frozen_stays_as_it_is() -> None:
    x, _ = images()
    plain = network("convnet")
    expected = copy.deepcopy(plain).eval()(x)
    found = kd.frozen(plain)
    assert found is plain
    assert not any(p.requires_grad for p in found.parameters())
    before = copy.deepcopy(found.state_dict())
    torch.testing.assert_close(found.train()(x), expected, rtol=0, atol=0)
    assert all(torch.equal(before[name], value) for name, value in found.state_dict().items())
    again = kd.soft_targets(network(), x, torch.zeros(6, dtype=torch.int64), teacher=found.train())
    assert again.isfinite()
    assert all(p.requires_grad for p in thaw(found).parameters())


# --- Ensembles --------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_a_mean() -> None:
    x, _ = images()
    members = [teacher("convnet", seed) for seed in range(3)]
    said = [member(x) for member in members]
    mean = torch.stack([logits.softmax(1) for logits in said]).mean(0)
    torch.testing.assert_close(kd.Ensemble(members)(x).exp(), mean)
    torch.testing.assert_close(kd.Ensemble(members, of="logits")(x), sum(said) / 3)
    geometric = torch.stack([logits.softmax(1) for logits in said]).log().mean(0).softmax(1)
    torch.testing.assert_close(kd.Ensemble(members, of="logits")(x).softmax(1), geometric)
    torch.testing.assert_close(kd.Ensemble(members[:1])(x), said[0].log_softmax(1))


def test_an_ensemble_teaches() -> None:
    x, y = images()
    together = kd.frozen(kd.Ensemble([network("convnet"), network("mlp")]))
    layers = {"hidden.1": "teachers.1.hidden.1"}
    kd.hints(network(), x, y, teacher=together, at=layers, objective=partial(kd.soft_targets, teacher=together))
    with pytest.raises(ValueError, match=r"teachers=\[\]: must be at least one network"):
        kd.Ensemble([])
    with pytest.raises(ValueError, match="of='votes': must be 'probabilities' or 'logits'"):
        kd.Ensemble([network()], of="votes")  # type: ignore[arg-type]


# --- Cached -----------------------------------------------------------------------------------------------------------


def test_looked_up_is_computed(data: Dataset, wise: torch.nn.Module) -> None:
    """The same weights at the end, without augmentation."""
    numbered, cache = kd.cached(wise, data)
    torch.testing.assert_close(cache.logits, logits_of(wise, data.train))
    live = partial(kd.soft_targets, teacher=wise, mix=0.7)
    looked_up = cache.objective(partial(kd.soft_targets, teacher=cache, mix=0.7))
    students = []
    for objective, seen in ((live, data), (looked_up, numbered)):
        recipe = Recipe(epochs=2, batch_size=20, objective=objective, precision="float64")
        students.append(fresh(SMALL_CONVNET, recipe, seed=1))
        history = fit(students[-1], seen, recipe, seed=1)
    for mine, other in zip(*(s.parameters() for s in students), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert history["val_accuracy"][-1] == evaluate(students[-1], data.val).accuracy


def test_looked_up_does_not_see_the_augmentation(data: Dataset, wise: torch.nn.Module) -> None:
    numbered, cache = kd.cached(wise, data)
    rows = torch.tensor([3, 1, 40])
    heard = []

    def listening(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        heard.append((cache(x), y))
        return kd.soft_targets(model, x, y, teacher=cache)

    cache.objective(listening)(SMALL_CONVNET(), torch.zeros(3, 1, 16, 16), rows)
    torch.testing.assert_close(heard[0][0], logits_of(wise, data.train.subset(rows)))
    assert torch.equal(heard[0][1], data.train.labels[rows])
    assert torch.equal(numbered.train.labels, torch.arange(len(data.train)))
    assert torch.equal(numbered.val.labels, data.val.labels)


def test_a_cache_is_a_setting_like_others(data: Dataset, wise: torch.nn.Module) -> None:
    _, cache = kd.cached(wise, data)
    recipes = [
        Recipe(objective=cache.objective(partial(kd.soft_targets, teacher=cache, mix=mix))) for mix in (0.5, 1.0)
    ]
    assert fingerprint(recipes[0]) != fingerprint(recipes[1])
    assert fingerprint(recipes[0]) == fingerprint(pickle.loads(pickle.dumps(recipes[0])))
    live = Recipe(objective=partial(kd.soft_targets, teacher=wise))
    assert fingerprint(live) == fingerprint(replace(live))


def test_misuse_of_a_cache_is_named(data: Dataset, wise: torch.nn.Module) -> None:
    numbered, cache = kd.cached(wise, data)
    student, x = SMALL_CONVNET(), torch.zeros(3, 1, 16, 16)
    rows = torch.tensor([0, 1, 2])
    asking = partial(kd.soft_targets, teacher=cache)
    with pytest.raises(ValueError, match=r"must be asked within cache\.objective"):
        asking(student, x, rows)
    with pytest.raises(ValueError, match=r"must be asked within cache\.objective"):
        cache.objective(partial(kd.labelled_only, objective=asking))(student, x, rows)  # another x
    with pytest.raises(ValueError, match="y holds 60: must be example numbers from 0 to 59"):
        cache.objective(asking)(student, x, torch.tensor([0, 1, 60]))
    with pytest.raises(ValueError, match="must be example numbers"):
        cache.objective(asking)(student, x, torch.full((3,), kd.UNLABELLED))
    recipe = Recipe(objective=cache.objective(asking), augment=partial(preprocessing.mixup, classes=60))
    with pytest.raises(ValueError, match="augmentations that mix labels cannot be used"):
        fit(student, numbered, recipe, seed=0)
    with pytest.raises(ValueError, match=r"teacher=Cached has no layers \['head'\]: must be a network"):
        cache.objective(partial(kd.hints, teacher=cache, at={"head": "head"}))(student, x, rows)


# --- More images ------------------------------------------------------------------------------------------------------


def test_a_transfer_set_holds_images_without_labels(data: Dataset, wise: torch.nn.Module) -> None:
    extra = data.test.images[:30]
    more = kd.transfer_set(data, extra)
    assert (len(more.train), len(more.val)) == (90, 40)
    assert torch.equal(more.train.images[60:], extra)
    assert (more.train.labels[60:] == kd.UNLABELLED).all()
    assert more.train.mean == data.train.mean
    recipe = Recipe(epochs=2, objective=partial(kd.soft_targets, teacher=wise, objective=kd.labelled_only))
    losses = fit(fresh(SMALL_CONVNET, recipe, seed=0), more, recipe, seed=0)["train_loss"]
    assert losses[1] < losses[0]
    wine = load("wine")
    assert len(kd.transfer_set(wine, torch.zeros(7, 13)).train) == len(wine.train) + 7


def test_a_transfer_set_of_other_images_is_named(data: Dataset) -> None:
    for extra in (torch.zeros(3, 1, 16, 16), torch.zeros(3, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"extra is torch\..* must be torch\.uint8 \[M, \[1, 16, 16\]\]"):
            kd.transfer_set(data, extra)


@pytest.mark.gpu
def test_a_cache_on_the_gpu(wise: torch.nn.Module) -> None:
    data = tiny().to("cuda")
    numbered, cache = kd.cached(copy.deepcopy(wise).cuda(), data)
    objective = cache.objective(partial(kd.soft_targets, teacher=cache))
    assert fit(SMALL_CONVNET(), numbered, Recipe(epochs=1, objective=objective), seed=0)["train_loss"]
