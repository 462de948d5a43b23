"""The loop: does what a loop written by hand does, survives being killed, and fails with words that help."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib.lab.data import Dataset, Split, batches, random_shift
from course_lib.lab.runtime import seed_everything
from course_lib.lab.training import Diverged, Recipe, cross_entropy, evaluate, fit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")


def blobs(count: int = 203, seed: int = 0) -> Dataset:
    """Three classes of 4x4 images, told apart by where they are bright; no batch size divides the count."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.randint(0, 120, (count, 1, 4, 4), generator=generator)
    images[torch.arange(count), 0, labels] += 100
    split = Split(images.to(torch.uint8), labels, (0.3,), (0.2,))
    third = count // 3
    parts = [split.subset(torch.arange(k * third, (k + 1) * third)) for k in range(3)]
    return Dataset("blobs", *parts, ("a", "b", "c"))


def network(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    seed_everything(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout),
                         nn.Linear(12, 3))  # fmt: skip


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in [*model.parameters(), *model.buffers()]])


SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
RECIPE = Recipe(epochs=3, batch_size=16, optimizer=SGD)


def by_hand(model: nn.Module, data: Dataset, recipe: Recipe, seed: int) -> list[float]:
    """The same training written out with nothing of ours but the batches; returns the validation losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = recipe.schedule(optimizer, recipe.epochs * 5) if recipe.schedule else None
    found = []
    for epoch in range(1, recipe.epochs + 1):
        seed_everything(seed * 1_000_003 + epoch)
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        model.train()
        for x, y in batches(data.train, recipe.batch_size, generator=order, augment=recipe.augment):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if recipe.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            if schedule:
                schedule.step()
        model.eval()
        x, y = next(batches(data.val, len(data.val)))
        with torch.no_grad():
            found.append(F.cross_entropy(model(x), y).item())
    return found


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, clip_norm=0.1),
        replace(RECIPE, augment=partial(random_shift, pixels=1)),
        replace(RECIPE, schedule=lambda o, steps: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps)),
    ],
    ids=["plain", "clip_norm", "augment", "schedule"],
)
def test_does_what_the_loop_by_hand_does(recipe):
    data, ours, theirs = blobs(), network(dropout=0.2), network(dropout=0.2)
    history = fit(ours, data, recipe, seed=3)
    assert history["val_loss"] == pytest.approx(by_hand(theirs, data, recipe, seed=3), rel=1e-6)
    assert torch.equal(weights(ours), weights(theirs))


def test_history_holds_what_happened():
    data, model = blobs(), network()
    history = fit(model, data, RECIPE, seed=0)
    assert history["epoch"] == [1, 2, 3]
    assert history["lr"] == [0.05] * 3
    assert history["train_loss"][-1] < history["train_loss"][0]
    found = evaluate(model, data.val)
    assert (history["val_loss"][-1], history["val_accuracy"][-1]) == (found.loss, found.accuracy)
    assert list(history.frame().columns) == ["train_loss", "val_loss", "val_accuracy", "lr", "seconds",
                                             "examples_per_second", "examples"]  # fmt: skip
    for seconds, speed in zip(history["seconds"], history["examples_per_second"], strict=True):
        assert speed == pytest.approx(len(data.train) / seconds)
    with pytest.raises(KeyError, match="train_loss"):
        history["accuracy"]


def test_train_loss_weights_an_uneven_last_batch_by_its_size():
    data, model = blobs(), network()
    frozen = replace(RECIPE, epochs=1, optimizer=partial(torch.optim.SGD, lr=0.0), batch_size=50)  # 67 = 50 + 17
    model[2] = nn.Identity()  # BatchNorm would make a batch's loss depend on its neighbours
    history = fit(model, data, frozen, seed=0)
    assert history["train_loss"][0] == pytest.approx(evaluate(model, data.train).loss, rel=1e-5)


def test_accumulate_keeps_the_gradient_of_the_whole_batch():
    data = blobs()
    whole, parts = network(), network()
    whole[2], parts[2] = nn.Identity(), nn.Identity()
    fit(whole, data, replace(RECIPE, precision="float64"), seed=0)
    fit(parts, data, replace(RECIPE, precision="float64", accumulate=3), seed=0)  # 16 = 6 + 6 + 4: uneven on purpose
    assert torch.allclose(weights(whole), weights(parts), rtol=1e-12, atol=1e-14)


def test_ema_is_the_average_that_its_formula_gives():
    data, model, reference = blobs(), network(), network()
    history = fit(model, data, replace(RECIPE, epochs=1, ema=0.8), seed=0)
    average = [p.detach().clone() for p in reference.parameters()]
    optimizer = SGD(reference.parameters())
    reference.train()
    seed_everything(1)
    for x, y in batches(data.train, 16, generator=torch.Generator().manual_seed(1)):
        optimizer.zero_grad()
        cross_entropy(reference, x, y).backward()
        optimizer.step()
        average = [0.8 * a + 0.2 * p.detach() for a, p in zip(average, reference.parameters(), strict=True)]
    for got, wanted in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(got, wanted)
    assert history["val_loss"][-1] == evaluate(model, data.val).loss


def test_objective_wraps_and_is_what_validation_reports():
    def penalised(model, x, y):
        return cross_entropy(model, x, y) + 0.1 * sum(p.square().sum() for p in model.parameters())

    model = network()
    fit(model, blobs(), replace(RECIPE, objective=penalised, epochs=30), seed=0)
    plain = network()
    fit(plain, blobs(), replace(RECIPE, epochs=30), seed=0)
    assert sum(p.square().sum() for p in model.parameters()) < 0.5 * sum(p.square().sum() for p in plain.parameters())
    data = blobs()
    gap = evaluate(model, data.val, objective=penalised).loss - evaluate(model, data.val).loss
    assert gap == pytest.approx(0.1 * sum(p.square().sum().item() for p in model.parameters()), rel=1e-4)


def test_bfloat16_keeps_float32_weights_and_learns():
    model = network()
    history = fit(model, blobs(), replace(RECIPE, precision="bfloat16"), seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history["val_accuracy"][-1] > 0.8
    exact = network()
    fit(exact, blobs(), RECIPE, seed=0)
    assert not torch.equal(weights(model), weights(exact))  # it really ran in another precision


def test_stop_is_asked_after_each_epoch():
    history = fit(network(), blobs(), replace(RECIPE, epochs=9, stop=lambda h: len(h) == 2), seed=0)
    assert len(history) == 2
    assert history.stopped


def test_a_closure_optimizer_gets_as_many_gradients_as_it_asks_for():
    calls = []

    class Twice(torch.optim.SGD):
        def step(self, closure):
            calls.append((float(closure()), float(closure())))
            return super().step(closure)

    fit(network(), blobs(), replace(RECIPE, epochs=1, optimizer=partial(Twice, lr=0.1)), seed=0)
    assert len(calls) == 5
    assert all(first == second for first, second in calls)  # the same batch, the same weights


def test_compiled_model_learns_the_same_weights():
    plain, compiled = network(), network()
    fit(plain, blobs(), replace(RECIPE, epochs=1), seed=0)
    with pytest.MonkeyPatch.context() as patch:  # the graph is traced for real; building C++ would only cost time
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        fit(compiled, blobs(), replace(RECIPE, epochs=1, compile=True), seed=0)
    torch.testing.assert_close(weights(plain), weights(compiled), rtol=1e-4, atol=1e-5)


def test_divergence_names_epoch_step_and_rate():
    def breaks(model, x, y):
        breaks.calls += 1
        return cross_entropy(model, x, y) * (math.nan if breaks.calls == 8 else 1)

    breaks.calls = 0
    with pytest.raises(Diverged, match=r"nan in epoch 2, step 3, at learning rate 0\.05.*clip_norm") as caught:
        fit(network(), blobs(), replace(RECIPE, objective=breaks), seed=0)
    assert (caught.value.epoch, caught.value.step, caught.value.lr) == (2, 3, 0.05)


@pytest.mark.parametrize(
    ("slot", "value"),
    [("epochs", 0), ("batch_size", -1), ("batch_size", 2.5), ("accumulate", 0), ("accumulate", 999), ("clip_norm", 0),
     ("precision", "float8"), ("ema", 1.0)],
)  # fmt: skip
def test_a_bad_slot_is_named_with_its_value(slot, value):
    with pytest.raises(ValueError, match=f"{slot}={value!r}"):
        Recipe(**{slot: value})


def test_evaluate_leaves_the_mode_as_it_was():
    model = network()
    for mode in (True, False):
        model.train(mode)
        evaluate(model, blobs().val)
        assert model.training is mode


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learns_on_cuda(monkeypatch, precision):
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    model = network()
    history = fit(model, blobs(), replace(RECIPE, epochs=5, precision=precision), seed=0)
    assert next(model.parameters()).is_cuda
    assert history["val_accuracy"][-1] > 0.8
