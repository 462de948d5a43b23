"""Checks of chapter 6: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import copy
import math
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from torch import nn

from course_lib import early_stopping as stopping
from course_lib import optimizers, regularization
from course_lib.checks import chapter_06
from course_lib.lab import Recipe, evaluate, load
from course_lib.lab.exercises import check
from course_lib.lab.experiments import one_thread
from course_lib.lab.models import mlp
from course_lib.lab.training import fit, fresh
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "06_early_stopping.ipynb"
ASKED = checking.asked(NOTEBOOK) if (checking.NOTEBOOKS / NOTEBOOK).exists() else []
BASE = chapter_06.BASE

patient, generalization_loss, learnt, train_and_keep, halving = (
    getattr(chapter_06, f"exercise_{number}").right for number in (1, 2, 3, 5, 6)
)


# Other right answers


def by_the_course(losses, patience, min_delta):
    history = stopping.as_history({"val_loss": losses})
    improved = 0
    for end in range(1, len(losses) + 1):
        waits = stopping.waited(losses[:end], min_delta)
        improved = improved if waits else end - 1
        if waits >= patience:
            break
    assert stopping.replay(stopping.Patience(patience, min_delta), history).row == end - 1
    return torch.tensor(end - 1), np.int64(improved)


def from_the_last_improvement(losses, patience, min_delta):
    """The count is the distance to the epoch of the best."""
    kept = 0
    for epoch in range(len(losses)):
        if losses[epoch] < losses[kept] - min_delta:
            kept = epoch
        if epoch - kept >= patience:
            return [epoch, kept]
    return [len(losses) - 1, kept]


def one_by_one(errors):
    return torch.tensor([stopping.generalization_loss(errors[: t + 1].tolist()) for t in range(len(errors))])


def as_array(errors):
    lowest = np.minimum.accumulate(errors.numpy())
    return 100 * (errors.numpy() - lowest) / lowest


def by_descent(eigenvalues, lr, steps):
    """The steps themselves, with torch's own gradient of the quadratic."""
    w = torch.zeros_like(eigenvalues, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (eigenvalues * (w - 1) ** 2 / 2).sum().backward()
        optimizer.step()
    return w.detach()


def by_a_polynomial(eigenvalues, lr, steps):
    """λ times the sum of the powers, as an unrolled recursion gives it."""
    total = torch.zeros_like(eigenvalues)
    for power in range(steps):
        total = total + (1 - lr * eigenvalues) ** power
    return lr * eigenvalues * total


def whole_copies(model, step, loss, steps):
    """Copies of the whole network, whose weights go back into the one that was handed in."""
    copies = []
    for _ in range(steps):
        step(model)
        copies.append((loss(model), copy.deepcopy(model)))
    lowest, best = min(copies, key=lambda pair: pair[0])
    model.load_state_dict(best.state_dict())
    return torch.tensor(lowest)


def clones(model, step, loss, steps):
    lowest = None
    for _ in range(steps):
        step(model)
        now = loss(model)
        if lowest is None or now < lowest:
            lowest, best = now, {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(best[name])
    return lowest


def by_sorting(curves, eta):
    left, epochs, spent = torch.arange(len(curves)), 1, len(curves)
    while len(left) > 1 and epochs < curves.shape[1]:
        order = curves[left, epochs - 1].sort(descending=True, stable=True).indices
        left = left[order[: max(1, len(left) // eta)]].sort().values
        if len(left) > 1:
            longer = min(eta * epochs, curves.shape[1])
            spent, epochs = spent + len(left) * (longer - epochs), longer
    return left[curves[left, epochs - 1].argmax()], spent


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("06.1", by_the_course),
        ("06.1", from_the_last_improvement),
        ("06.2", one_by_one),
        ("06.2", as_array),
        ("06.2", lambda errors: (errors / errors.cummin(0)[0]).sub(1).mul(100)),
        ("06.3", by_descent),
        ("06.3", by_a_polynomial),
        ("06.3", stopping.gd_filter),
        ("06.5", whole_copies),
        ("06.5", clones),
        ("06.6", by_sorting),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


def test_halving_spends_what_the_course_says_where_the_last_rung_fits():
    curves = chapter_06._curves(81, 27, 27)
    rule = stopping.SuccessiveHalving(1, 27, 3)
    named = {str(k): curve.tolist() for k, curve in enumerate(curves)}
    found = stopping.replay_runs(named, rule)
    winner, spent = halving(curves, 3)
    # The course's rule trains the one that is left to the end, here it has won
    assert (int(found.jobs[-1].job.config), found.epochs) == (winner, spent + 18)


# The stop to design


@pytest.fixture(scope="module")
def recorded():
    """Each hidden run, once, as long as any rule within the budget could let it go on: the test accuracy is watched."""
    runs = []
    for seed, lr in chapter_06.HIDDEN.items():
        recipe = replace(
            BASE,
            epochs=40 if lr < 0.001 else 22,
            optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9),
            watch={"test_accuracy": lambda model, data: evaluate(model, data.test).accuracy},
        )
        model = fresh(lambda: mlp((1, 16, 16), 10, width=256), recipe, seed=seed)
        with one_thread():
            runs.append(fit(model, chapter_06._digits(seed), recipe, seed=seed, progress=False))
    return runs


def outcome(runs, stop, keep):
    """Mean test accuracy and mean epochs of a rule."""
    stops = [stopping.replay(stop, run, keep=keep or "val_loss") for run in runs]
    rows = [stop.kept if keep else stop.row for stop in stops]
    accuracies = [run["test_accuracy"][row] for run, row in zip(runs, rows, strict=True)]
    return np.mean(accuracies), np.mean([stop.epochs for stop in stops])


def waits(column, patience):
    """Patience as a learner may write it."""
    best = np.argmin if column == "val_loss" else np.argmax
    return lambda history: len(history) - 1 - int(best(history[column])) >= patience


def below_the_peak(history):
    return history["val_accuracy"][-1] < max(history["val_accuracy"]) - 0.04


@pytest.mark.parametrize(
    ("stop", "keep"),
    [
        (waits("val_loss", 2), "val_loss"),
        (waits("val_loss", 3), "val_loss"),
        (stopping.Patience(5), "val_loss"),
        (stopping.Patience(3, smoothing=0.5), "val_loss"),
        (waits("val_accuracy", 2), "val_accuracy"),
        (stopping.Patience(3, column="val_accuracy"), "val_accuracy"),
        (stopping.Patience(5, column="val_accuracy"), "val_loss"),
        (stopping.GeneralizationLoss(2), "val_loss"),
        (stopping.GeneralizationLoss(10), "val_loss"),
        (stopping.SuccessiveIncreases(2, strip=1), "val_loss"),
        (below_the_peak, "val_accuracy"),
        (stopping.TargetReached("train_loss", 1.0), "val_loss"),
    ],
)
def test_several_rules_reach_it_with_something_to_spare(recorded, stop, keep):
    accuracy, epochs = outcome(recorded, stop, keep)
    assert accuracy > chapter_06.LEAST + 0.005
    assert epochs < chapter_06.MOST - 0.4


@pytest.mark.parametrize(
    ("stop", "keep"),
    [
        (stopping.Patience(1, column="val_accuracy"), "val_accuracy"),
        (stopping.BudgetSpent(epochs=6), "val_accuracy"),
        (stopping.BudgetSpent(epochs=20), "val_accuracy"),
        (stopping.TargetReached("val_accuracy", 0.5), "val_accuracy"),
        (stopping.Patience(3), None),
        (stopping.Patience(3, column="val_accuracy"), None),
        (stopping.GeneralizationLoss(2), None),
    ],
)
def test_what_is_hasty_or_leaves_the_last_weights_stays_below(recorded, stop, keep):
    assert outcome(recorded, stop, keep)[0] < chapter_06.LEAST - 0.01


@pytest.mark.parametrize("stop", [stopping.Patience(8), stopping.Patience(10, column="val_accuracy")])
def test_what_waits_too_long_is_above_the_budget(recorded, stop):
    accuracy, epochs = outcome(recorded, stop, "val_accuracy")
    assert accuracy > chapter_06.LEAST
    assert epochs > chapter_06.MOST + 1


def test_the_hidden_runs_end_where_the_recorded_curves_say(recorded):
    stop, keep = waits("val_accuracy", 2), "val_accuracy"
    quick = list(chapter_06.HIDDEN.items())[:3]
    found = [chapter_06._trained(replace(BASE, stop=stop, keep=keep), *run) for run in quick]
    assert np.allclose(np.mean(found, axis=0), outcome(recorded[:3], stop, keep), rtol=0, atol=1e-9)


@pytest.fixture
def invented(monkeypatch):
    """Hidden runs that cost nothing: what they reach and how many epochs they take is asked of the history's curve."""

    def trained(answer, seed, lr):
        histories = chapter_06._recorded()
        stopped = next((h for h in histories if answer.stop and chapter_06._asked(answer.stop, h)), histories[-1])
        kept = max(stopped["val_accuracy"]) if answer.keep else stopped["val_accuracy"][-1]
        return kept, stopped["epoch"][-1]

    monkeypatch.setattr(chapter_06, "_trained", trained)


def designed(stop, keep="val_loss", **others):
    return replace(BASE, stop=stop, keep=keep, **others)


@pytest.mark.parametrize(
    "answer",
    [
        designed(waits("val_loss", 4)),
        designed(stopping.Patience(4)),
        designed(lambda history: np.bool_(len(history) > 12)),
        designed(lambda history: torch.tensor(history["val_loss"]).argmin() < len(history) - 4),
        designed(stopping.Patience(4), optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9)),
        designed(stopping.Patience(4), optimizer=partial(optimizers.SGD, momentum=0.9, lr=0.01)),
    ],
)
def test_a_design_within_the_rules_is_admitted(invented, answer):
    found = check("06.7", answer)
    assert found.state == "passed", found


class Counting:
    """Patience that counts by itself, and is not told when another run begins."""

    def __init__(self, patience):
        self.best, self.waited, self.patience = math.inf, 0, patience

    def __call__(self, history):
        improved = history["val_loss"][-1] < self.best
        self.best = min(self.best, history["val_loss"][-1])
        self.waited = 0 if improved else self.waited + 1
        return self.waited >= self.patience


@pytest.mark.parametrize("answer", checking.USELESS)
def test_what_is_no_recipe_is_told_what_is_wanted(answer):
    checking.assert_told_what_is_wrong("06.7", answer)


@pytest.mark.parametrize("answer", [..., None, designed(lambda history: ...), designed(lambda history: None)])
def test_a_design_that_is_not_there_yet(answer):
    checking.assert_not_attempted("06.7", answer)


# Usual mistakes


def sorted_in_place(losses, patience, min_delta):
    found = patient(losses, patience, min_delta)
    losses.sort()
    return found


def divided_in_place(errors):
    errors /= errors.cummin(0).values.clone()
    return 100 * (errors - 1)


def in_another_variable(model, step, loss, steps):
    """The best network is kept whole, and the caller's stays as it is."""
    lowest = math.inf
    for _ in range(steps):
        step(model)
        if loss(model) < lowest:
            lowest, best = loss(model), copy.deepcopy(model)
    model = best
    return lowest


def of_the_dictionary_alone(model, step, loss, steps):
    lowest = math.inf
    for _ in range(steps):
        step(model)
        if loss(model) < lowest:
            lowest, best = loss(model), dict(model.state_dict())
    model.load_state_dict(best)
    return lowest


def left_in_evaluation(model, step, loss, steps):
    found = train_and_keep(model, step, loss, steps)
    model.eval()
    return found


def evaluated_each_time(model, step, loss, steps):
    def switched(model):
        return loss(model.eval())

    return train_and_keep(model, step, switched, steps)


def with_other_parameters(model, step, loss, steps):
    found = train_and_keep(model, step, loss, steps)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return found


def without_batch_norm(model, step, loss, steps):
    """Restores the linear layer alone."""
    first: nn.Module = model[0]
    lowest = math.inf
    for _ in range(steps):
        step(model)
        if loss(model) < lowest:
            lowest, best = loss(model), copy.deepcopy(first.state_dict())
    first.load_state_dict(best)
    return lowest


def spoilt(curves, eta):
    found = halving(curves, eta)
    curves[:, 0] = 0
    return found


MISTAKES = [
    ("06.1", sorted_in_place, "changes its argument losses in place", "enumerate"),
    ("06.1", lambda *case: patient(*case)[1], "should return 2 values", "pencil"),
    ("06.1", lambda *case: (*patient(*case), 0), "should return 2 values", "pencil"),
    ("06.1", lambda losses, *_: (len(losses) - 3, 0), "the epoch after which it stops is not right", "pencil"),
    ("06.1", lambda *case: (patient(*case)[0], 2), "the epoch kept is not right", "pencil"),
    ("06.2", divided_in_place, "changes its argument errors in place", "change what you were handed"),
    ("06.2", lambda errors: 2 * generalization_loss(errors), "GL is not right", "errors 4, 2, 3, 2.5"),
    ("06.2", lambda errors: generalization_loss(errors)[1:], r"should have shape \[9\]", "errors 4, 2, 3, 2.5"),
    ("06.3", lambda *case: 2 * learnt(*case), "the learnt shares is not right|shares", "in a loop"),
    ("06.3", lambda eigenvalues, lr, steps: learnt(eigenvalues, lr, steps)[:2], "should have shape", "in a loop"),
    ("06.3", lambda eigenvalues, lr, steps: by_descent(eigenvalues, lr, steps + 1), "one step too many", "nothing"),
    ("06.3", lambda eigenvalues, lr, steps: 1 - (1 - lr * eigenvalues.mul_(1.0)) ** max(1, steps),
     "learnt shares is not right", "in a loop"),
    ("06.5", in_another_variable, "the weights are those of the last step", "Compare best"),
    ("06.5", of_the_dictionary_alone, "the weights are those of the last step", "Compare best"),
    ("06.5", left_in_evaluation, "in another mode than it was", "model.eval"),
    ("06.5", evaluated_each_time, "in another mode than it was", "model.eval"),
    ("06.5", with_other_parameters, "other parameters than before", "assign=True"),
    ("06.5", without_batch_norm, "the weights is not right", "single weight"),
    ("06.5", lambda model, step, loss, steps: 2.0, "the weights is not right", "single weight"),
    ("06.5", lambda model, step, loss, steps: model.load_state_dict({}), "raised RuntimeError", ""),
    ("06.6", spoilt, "changes its argument curves in place", "curves.dropped."),
    ("06.6", lambda curves, eta: (halving(curves, eta)[0], 7), "the epochs spent is not right", "first two rungs"),
    ("06.6", lambda curves, eta: (-1, halving(curves, eta)[1]), "the winner is not right", "first two rungs"),
    ("06.7", designed(0.5), "stop should be a function", "For instance"),
    ("06.7", designed(lambda history: history["val_loss"]), "of type list", "For instance"),
    ("06.7", designed(lambda history: history["loss"][-1] > 1), r"raised KeyError.*a history of 1 epochs", ""),
    ("06.7", designed(lambda history: history["val_loss"][-3] > 1), r"raised IndexError.*a history of 1 epochs", ""),
    ("06.7", designed(Counting(3)), "comes a second time", "One stop serves all runs"),
    ("06.7", designed(stopping.Patience(3), epochs=20), "besides stop and keep you changed epochs$", "Start from"),
    ("06.7", designed(stopping.Patience(3), validate_every=1 / 4, batch_size=60), "changed batch_size, validate", "."),
    ("06.7", designed(stopping.Patience(3), optimizer=partial(torch.optim.SGD, lr=0.01)), "changed optimizer", "Start"),
    ("06.7", designed(stopping.Patience(3), optimizer=torch.optim.Adam), "changed optimizer", "Start from"),
    ("06.7", designed(lambda history: "no"), "your stop should say True or False", "For instance"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        (BASE, "2 of 4 hidden runs took 80 epochs, and 2 more to come; allowed are 80 for all", "after the best one"),
        (designed(stopping.Patience(15)), "4 of 4 hidden runs took 100 epochs", "after the best one"),
        (designed(stopping.Patience(4), None), r"a mean accuracy of 0\.6.. over 4 hidden runs of 14, 14, 14, 14 epochs",
         "Whose weights are left"),
        (designed(stopping.BudgetSpent(epochs=3)), r"a mean accuracy of 0\.5", "rises slowly"),
    ],
)  # fmt: skip
def test_a_design_is_told_whether_it_costs_too_much_or_reaches_too_little(monkeypatch, invented, answer, message, hint):
    monkeypatch.setattr(chapter_06, "LEAST", 0.648)
    checking.assert_hinted("06.7", answer, message, hint)


def test_a_stop_is_not_told_the_rate_and_may_say_nothing():
    seen = []

    def stop(history):
        seen.extend([*history["lr"], *history.rates])
        if len(history) >= 3:
            return True

    recorded = chapter_06._recorded()
    assert [chapter_06._asked(stop, history) for history in recorded[:4]] == [False, False, True, True]
    assert seen
    assert np.isnan(seen).all()
    assert recorded[0]["lr"] == [0.01], "the run itself keeps its rate"


def test_the_right_name_for_another_reason():
    """Luck is above all before it as well."""
    found = check("06.4", ("cleo", "c"))
    assert found.state == "not yet right"
    assert "that holds for Ben too" in found.message


@pytest.mark.skipif(not (checking.NOTEBOOKS / NOTEBOOK).exists(), reason="the notebook is to come")
def test_the_figure_says_what_its_reading_says():
    cells = nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4).cells
    (code,) = [cell.source for cell in cells if cell.cell_type == "code" and '"Cleo": (' in cell.source]
    drawn: dict = {"np": np, "plt": plt}
    exec(code, drawn)
    plt.close("all")
    higher, risen, lasting = set(), set(), set()
    for (name, (curve, stop)), scatter in zip(drawn["lines"].items(), drawn["noise"], strict=True):
        seen = curve + scatter
        best, after = seen[:stop].max(), seen[stop:]
        higher |= {name} if after.max() > best else set()
        risen |= {name} if after[-10:].mean() > seen[stop - 1] + 3 * scatter.std() else set()
        averaged = np.convolve(after, np.ones(5) / 5, "valid").max()
        lasting |= {name} if averaged > best + 3 * scatter.std() else set()
    assert (lasting, higher, risen) == ({"Cleo"}, {"Cleo", "Ben"}, {"Cleo", "Ada"})


@pytest.mark.parametrize("exercise", ASKED)
def test_the_printed_solutions_pass(exercise):
    names = {"copy": copy, "math": math, "np": np, "torch": torch, "nn": nn, "partial": partial, "replace": replace}
    names |= {"stopping": stopping, "reg": regularization, "Recipe": Recipe, "mlp": mlp, "load": load, "base": BASE}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names)
