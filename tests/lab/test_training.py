"""The loop: does what a loop written by hand does, survives being killed, and fails with words that help."""

import math
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from course_lib.lab.data import Dataset, Split, batches, random_shift
from course_lib.lab.runtime import seed_everything
from course_lib.lab.training import Diverged, Recipe, cross_entropy, evaluate, fit, logits_of, networks_of

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
     ("precision", "float8"), ("ema", 1.0), ("validate_every", 0.3), ("validate_every", 2.5), ("validate_every", 0),
     ("validate_every", -1), ("validate_every", math.inf), ("keep", "accuracy")],
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


# --- what chapters ask of the loop ---------------------------------------------------------------------------------


def worse_and_worse(model, x, y):
    return -cross_entropy(model, x, y)


@pytest.mark.parametrize(("column", "pick"), [("val_loss", min), ("val_accuracy", max), ("size", max)])
def test_keep_leaves_the_weights_of_the_best_row(column, pick):
    """Each column has its own best epoch, and the weights that remain are that epoch's, found by training up to it."""

    sizes = iter([2.0, 5.0, 3.0, 1.0])
    recipe = replace(
        RECIPE, epochs=4, keep=column, watch={"size": lambda model, data: next(sizes)},
        optimizer=partial(torch.optim.SGD, lr=0.8, momentum=0.9),
    )  # fmt: skip
    kept, reference = network(), network()
    history = fit(kept, blobs(), recipe, seed=0)
    best = history[column].index(pick(history[column])) + 1
    if column == "size":
        assert best == 2
    fit(reference, blobs(), replace(recipe, epochs=best, keep=None, watch=None), seed=0)
    assert torch.equal(weights(kept), weights(reference))


def test_keep_takes_the_average_where_that_is_what_is_evaluated():
    model = network()
    history = fit(model, blobs(), replace(RECIPE, objective=worse_and_worse, ema=0.5, keep="val_loss"), seed=0)
    assert history["val_loss"].index(min(history["val_loss"])) == 0
    assert evaluate(model, blobs().val).loss == history["val_loss"][0]


def test_a_schedule_that_listens_is_told_of_each_validation():
    class Listening(torch.optim.lr_scheduler.LambdaLR):
        told: ClassVar[list] = []

        def listen(self, history):
            self.told.append((history["epoch"][-1], self.last_epoch))

    fit(network(), blobs(), replace(RECIPE, schedule=lambda o, n: Listening(o, lambda t: 1.0)), seed=0)
    assert Listening.told == [(1, 5), (2, 10), (3, 15)]  # 67 examples in batches of 16: 5 steps an epoch


def test_reduce_on_plateau_lowers_the_rate_when_validation_does_not_improve():
    def on_plateau(optimizer, steps):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)

    recipe = replace(RECIPE, epochs=7, objective=worse_and_worse, schedule=on_plateau)
    history = fit(network(), blobs(), recipe, seed=0)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    plateau, expected = on_plateau(reference, 0), []
    for loss in history["val_loss"]:
        expected.append(reference.param_groups[0]["lr"])
        plateau.step(loss)
    assert history["lr"] == expected
    assert expected[-1] < 0.05 / 50


def test_a_batch_size_that_grows():
    sizes = []

    def objective(model, x, y):
        sizes.append(len(x))
        return cross_entropy(model, x, y)

    recipe = replace(RECIPE, batch_size=lambda epoch: 16 * epoch, objective=objective, schedule=count_steps)
    history = fit(network(), blobs(), recipe, seed=0)
    assert sizes == [16, 16, 16, 16, 3, 32, 32, 3, 48, 19]
    assert history["examples"] == [67, 134, 201]
    assert count_steps.total == 10


def count_steps(optimizer, steps):
    count_steps.total = steps
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)


@pytest.mark.parametrize(
    ("every", "epochs", "expected"),
    [(1, 3, [1, 2, 3]), (2, 5, [2, 4, 5]), (9, 4, [4]), (1 / 2, 2, [0.4, 1, 1.4, 2]),
     (1 / 5, 1, [0.2, 0.4, 0.6, 0.8, 1])],
)  # fmt: skip
def test_validation_as_often_as_asked_changes_nothing_else(every, epochs, expected):
    often, usual = network(dropout=0.2), network(dropout=0.2)
    recipe = replace(RECIPE, epochs=epochs, validate_every=every)
    history = fit(often, blobs(), recipe, seed=0)
    reference = fit(usual, blobs(), replace(recipe, validate_every=1), seed=0)
    assert history["epoch"] == pytest.approx(expected)
    assert torch.equal(weights(often), weights(usual))
    assert history.losses == reference.losses
    assert history["examples"][-1] == reference["examples"][-1] == 67 * epochs
    assert (history["val_loss"][-1], history["lr"][-1]) == (reference["val_loss"][-1], reference["lr"][-1])


def test_the_mean_loss_of_a_row_is_that_of_all_steps_since_the_row_before():
    history = fit(network(), blobs(), replace(RECIPE, epochs=4, validate_every=2), seed=0)
    sizes = [16, 16, 16, 16, 3] * 2
    for row, losses in zip(history.rows, (history.losses[:10], history.losses[10:]), strict=True):
        assert row["train_loss"] == pytest.approx(sum(a * b for a, b in zip(losses, sizes, strict=True)) / 134)


def test_a_stop_between_two_epochs_ends_the_run_there():
    recipe = replace(RECIPE, epochs=4, validate_every=1 / 5, stop=lambda history: len(history) == 7)
    history = fit(network(), blobs(), recipe, seed=0)
    assert history["epoch"][-1] == pytest.approx(1.4)
    assert (history.epochs, history.stopped, len(history.losses)) == (1, True, 7)


def test_watch_measures_beside_the_loss_with_its_penalty():
    def penalised(model, x, y):
        return cross_entropy(model, x, y) + sum(p.square().sum() for p in model.parameters())

    watch = {"plain_loss": lambda model, data: evaluate(model, data.train).loss}
    model, data = network(), blobs()
    history = fit(model, data, replace(RECIPE, objective=penalised, watch=watch), seed=0)
    assert history["plain_loss"][-1] == evaluate(model, data.train).loss
    assert history["train_loss"][-1] > history["plain_loss"][-1] + 1
    assert "plain_loss" in history.frame().columns


def test_losses_and_rates_of_all_steps_and_groups_are_kept():
    def two_groups(parameters):
        first, *rest = (p for _, p in parameters)
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest}], lr=0.01)

    history = fit(network(), blobs(), replace(RECIPE, optimizer=two_groups, schedule=halving), seed=0)
    assert history.rates[:2] == [(0.1, 0.01), (0.05, 0.005)]
    assert len(history.losses) == len(history.rates) == 15


def halving(optimizer, steps):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_a_run_that_diverged_keeps_its_history():
    def breaks(model, x, y):
        breaks.calls += 1
        return cross_entropy(model, x, y) * (math.inf if breaks.calls == 8 else 1)

    breaks.calls = 0
    with pytest.raises(Diverged) as caught:
        fit(network(), blobs(), replace(RECIPE, objective=breaks), seed=0)
    again = pickle.loads(pickle.dumps(caught.value))
    for error in (caught.value, again):
        assert error.history["epoch"] == [1]
        assert len(error.history.losses) == 10
        assert [math.isfinite(loss) for loss in error.history.losses[:8]] == [True] * 7 + [False]


class Pair(nn.Module):
    """Two networks trained together; the answer is the mean of theirs."""

    def __init__(self):
        super().__init__()
        self.both = nn.ModuleList([network(seed=1), network(seed=2)])

    def forward(self, x):
        return torch.stack([net(x) for net in self.both]).mean(0)


def mutual(model, x, y):
    """Deep mutual learning: each learns from the labels and from the other."""
    one, other = (net(x) for net in model.both)
    to = nn.functional.kl_div
    apart = to(one.log_softmax(1), other.detach().softmax(1), reduction="batchmean")
    apart = apart + to(other.log_softmax(1), one.detach().softmax(1), reduction="batchmean")
    return F.cross_entropy(one, y) + F.cross_entropy(other, y) + apart


def test_a_pair_trained_together_is_one_network():
    pair = Pair()
    history = fit(pair, blobs(), replace(RECIPE, objective=mutual, epochs=6), seed=0)
    assert history["val_accuracy"][-1] > 0.8
    assert evaluate(pair, blobs().val).accuracy == history["val_accuracy"][-1]


def test_an_ensemble_without_weights_of_its_own_is_evaluated():
    class Ensemble(nn.Module):
        def __init__(self, members):
            super().__init__()
            self.members = [member.eval() for member in members]  # a plain list: no parameter is registered

        def forward(self, x):
            return torch.stack([member(x) for member in self.members]).mean(0)

    members, data = [network(seed=1), network(seed=2)], blobs()
    ensemble = Ensemble(members)
    assert next(ensemble.parameters(), None) is None
    expected = torch.stack([logits_of(member, data.test) for member in members]).mean(0)
    assert torch.equal(logits_of(ensemble, data.test), expected)
    right = (expected.argmax(1) == data.test.labels).float().mean().item()
    assert evaluate(ensemble, data.test).accuracy == pytest.approx(right)


@pytest.mark.gpu
def test_logits_from_a_gpu_lie_beside_the_labels():
    data = blobs()
    assert logits_of(network().cuda(), data.test).device == data.test.labels.device


def test_logits_of_a_split_come_in_its_order_and_whole():
    model, data = network().double(), blobs()
    x, _ = next(batches(data.test, len(data.test), dtype=torch.float64))
    assert logits_of(model, data.test, batch_size=10).dtype == torch.float64
    torch.testing.assert_close(logits_of(model, data.test, batch_size=10), model.eval()(x).detach())


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_learns_on_cuda(monkeypatch, precision):
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    model, seen = network(), set()

    def device_of(model: nn.Module, data: Dataset) -> float:
        seen.update((next(model.parameters()).device.type, data.val.device.type))
        return 0.0

    recipe = replace(RECIPE, epochs=5, precision=precision, watch={"seen": device_of})
    history = fit(model, blobs(), recipe, seed=0)
    assert history["val_accuracy"][-1] > 0.8
    assert seen == {"cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_the_model_comes_back_to_where_it_lay(monkeypatch, home):
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    model = network().to(home)
    fit(model, blobs(), replace(RECIPE, epochs=1, keep="val_loss"), seed=0)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {home}
    broken = replace(RECIPE, epochs=1, objective=lambda model, x, y: cross_entropy(model, x, y) * math.nan)
    with pytest.raises(Diverged):
        fit(model, blobs(), broken, seed=0)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {home}


@pytest.mark.gpu
def test_networks_of_the_objective_come_along(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    seen = []

    def taught(model, x, y, *, teacher, objective=cross_entropy):
        seen.append(next(teacher.parameters()).device.type)
        return objective(model, x, y) + 0 * teacher(x).sum()

    one, other = network(), network()
    chain = partial(taught, teacher=one, objective=partial(taught, teacher=other))
    assert networks_of(chain) == [one, other]
    fit(network(), blobs(), replace(RECIPE, epochs=1, objective=chain), seed=0)
    assert set(seen) == {"cuda"}
    assert {p.device.type for teacher in (one, other) for p in teacher.parameters()} == {"cpu"}


def test_each_part_keeps_its_own_mode():
    model = network(dropout=0.5)
    model.train()
    held = next(part for part in model.modules() if isinstance(part, nn.Dropout))
    held.eval()
    evaluate(model, blobs().val)
    logits_of(model, blobs().val)
    assert model.training
    assert not held.training
    model.eval()
    held.train()
    evaluate(model, blobs().val)
    assert held.training
    assert not model.training


def test_seeds_are_of_32_bits_and_all_of_them_serve():
    found = [weights_after(seed) for seed in (5_000, 5_000, 2**32 - 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    for seed in (-1, 2**32, 1.5):
        with pytest.raises(ValueError, match=f"seed={seed}: must be a whole number from 0 to 2"):
            fit(network(), blobs(), RECIPE, seed=seed)


def weights_after(seed: int) -> torch.Tensor:
    model = network()
    fit(model, blobs(), replace(RECIPE, epochs=1), seed=seed)
    return weights(model)


def test_numpys_integers_are_integers():
    recipe = replace(RECIPE, epochs=np.int64(1), batch_size=np.int64(16))
    assert (type(recipe.epochs), type(recipe.batch_size)) == (int, int)
    growing = replace(recipe, batch_size=lambda epoch: np.int64(16))
    assert len(fit(network(), blobs(), recipe, seed=0)) == len(fit(network(), blobs(), growing, seed=0)) == 1


def test_an_empty_split_is_named():
    data = blobs()
    nobody = data.train.subset(torch.arange(0))
    for call in (evaluate, logits_of):
        with pytest.raises(ValueError, match="split=.*: must be of at least one example"):
            call(network(), nobody)
    for name in ("train", "val"):
        with pytest.raises(ValueError, match=f"data.{name}=.*: must be of at least one example"):
            fit(network(), replace(data, **{name: nobody}), RECIPE, seed=0)
