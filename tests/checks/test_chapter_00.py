"""Checks of chapter 0: right answers pass, each usual mistake gets its own words, stubs are not attempted."""

import re
from dataclasses import fields, replace
from functools import partial

import nbformat
import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from course_lib.checks import chapter_00
from course_lib.lab import Recipe, batches, mean_interval, random_shift
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")


PLAIN = Recipe(epochs=20, batch_size=64, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean()


def t_interval(values, quantile=0.975, ddof=1, freedom=1, root=0.5):
    n = len(values)
    reach = stats.t.ppf(quantile, n - freedom) * values.std(ddof=ddof) / n**root
    return values.mean() - reach, values.mean() + reach


def by_scipy(values):
    return tuple(stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values)))


def by_the_laboratory(values):
    found = mean_interval(values)
    return found.low, found.high


def paired_by_scipy(a, b):
    found = stats.ttest_rel(a, b).confidence_interval(0.95)
    return found.low, found.high


def train_step(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def train_step_as_number(model, optimizer, x, y):
    return train_step(model, optimizer, x, y).item()


def train_step_with_closure(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = F.nll_loss(F.log_softmax(model(x), 1), y)
        loss.backward()
        return loss

    return optimizer.step(closure).detach()


def accuracy_on(model, split, batch_size=256):
    return sum((model(x).argmax(1) == y).sum().item() for x, y in batches(split, batch_size)) / len(split)


def mean_of_shares(model, split, batch_size=256):
    shares = [(model(x).argmax(1) == y).double().mean().item() for x, y in batches(split, batch_size)]
    return sum(shares) / len(shares)


def last_batch_dropped(model, split, batch_size=256):
    shares = [(model(x).argmax(1) == y).double().mean().item()
              for x, y in batches(split, batch_size, drop_last=True)]  # fmt: skip
    return sum(shares) / max(len(shares), 1)


def last_batch_as_full(model, split, batch_size=256):
    shares = [(model(x).argmax(1) == y).double().mean().item() for x, y in batches(split, batch_size)]
    return sum(share * batch_size for share in shares) / len(split)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("00.1", accuracy),
        ("00.1", lambda logits, labels: accuracy(logits, labels).item()),
        ("00.1", lambda logits, labels: np.mean(logits.argmax(1).numpy() == labels.numpy())),
        ("00.2", t_interval),
        ("00.2", by_scipy),
        ("00.2", by_the_laboratory),
        ("00.2", lambda values: list(t_interval(values))),
        ("00.3", lambda a, b: t_interval(a - b)),
        ("00.3", paired_by_scipy),
        ("00.4", ["cleo", "c)"]),
        ("00.5", accuracy_on),
        ("00.5", lambda model, split, batch_size: accuracy_on(model, split, 7)),
        ("00.6", train_step),
        ("00.6", train_step_as_number),
        ("00.6", train_step_with_closure),
    ],
)
def test_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


WRITTEN = {"00.1": "accuracy", "00.2": "interval", "00.3": "paired_interval", "00.5": "accuracy_on",
           "00.6": "train_step"}  # fmt: skip
NOTEBOOK = "00_start_here.ipynb"


@pytest.fixture(scope="module")
def solutions():
    shifted = replace(PLAIN, augment=partial(random_shift, pixels=1))
    names = {"np": np, "stats": stats, "F": F, "batches": batches, "replace": replace, "shifted": shifted}
    return checking.printed_solutions(NOTEBOOK, **names)


@pytest.mark.parametrize(("exercise", "name"), [*WRITTEN.items(), ("00.7", "mine")])
def test_the_printed_solutions_pass(exercise, name, solutions):
    found = check(exercise, solutions[name])
    assert found.state == "passed", found


def test_the_printed_reading_passes(solutions):
    assert check("00.4", (solutions["name"], solutions["reason"])).state == "passed"


def test_every_entry_of_a_recipe_is_explained():
    read = nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4)
    (table,) = [cell.source for cell in read.cells if cell.source.startswith("| entry | what it means |")]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == [slot.name for slot in fields(Recipe)]


def no_zeroing(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def zeroed_before_the_step(model, optimizer, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    return loss


def no_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def summed(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y, reduction="sum")
    loss.backward()
    optimizer.step()
    return loss / len(y)


def loss_after_the_step(model, optimizer, x, y):
    train_step(model, optimizer, x, y)
    return F.cross_entropy(model(x), y)


def two_steps(model, optimizer, x, y):
    train_step(model, optimizer, x, y)
    return train_step(model, optimizer, x, y)


def changes_the_batch(model, optimizer, x, y):
    loss = train_step(model, optimizer, x, y)
    x.zero_()
    return loss


def welch(a, b):
    reach = stats.t.ppf(0.975, 2 * len(a) - 2) * np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(a))
    return (a - b).mean() - reach, (a - b).mean() + reach


def normal(values):
    reach = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean() - reach, values.mean() + reach


MISTAKES = [
    ("00.1", lambda logits, labels: (logits.argmax(1) == labels).sum(), "counts"),
    ("00.1", lambda logits, labels: (logits.argmax(1) != labels).float().mean(), "share of wrong"),
    ("00.1", lambda logits, labels: 100 * accuracy(logits, labels), "percentage"),
    ("00.1", lambda logits, labels: logits.argmax(1) == labels, "should have shape"),
    ("00.1", lambda logits, labels: (logits.argmax(0) == labels).float().mean(), "RuntimeError"),
    ("00.1", lambda logits, labels: 0.5, "accuracy is not right"),
    ("00.2", normal, "1.96"),
    ("00.2", lambda v: t_interval(v, quantile=0.95), "90%"),
    ("00.2", lambda v: t_interval(v, freedom=0), "degrees of freedom"),
    ("00.2", lambda v: t_interval(v, ddof=0), "divided by n"),
    ("00.2", lambda v: t_interval(v, root=0), "single run"),
    ("00.2", lambda v: t_interval(v)[::-1], "swapped"),
    ("00.2", lambda v: t_interval(v)[1] - v.mean(), "two numbers"),
    ("00.2", lambda v: (v.min(), v.max()), "lower end is not right"),
    ("00.3", lambda a, b: t_interval(b - a), "a minus b"),
    ("00.3", welch, "unpaired"),
    ("00.3", lambda a, b: normal(a - b), "1.96"),
    ("00.3", lambda a, b: t_interval(a), "end is not right"),
    ("00.6", no_zeroing, "step before"),
    ("00.6", zeroed_before_the_step, "not moved"),
    ("00.6", no_step, "not moved"),
    ("00.6", summed, "summed"),
    ("00.6", loss_after_the_step, "loss that is returned"),
    ("00.6", two_steps, "weights after it"),
    ("00.6", changes_the_batch, "changes its argument x"),
    ("00.6", 3, "a function is wanted"),
    ("00.4", "Cleo", "a name and the letter"),
    ("00.4", ("Zoe", "c"), "no 'Zoe'"),
    ("00.4", ("Cleo", "f"), "no 'Cleo' with the reason 'f'"),
    *(("00.4", (name, "c"), f"{name}'s interval") for name in ("Ada", "Ben", "Dan", "Eve")),
    ("00.4", ("Cleo", "a"), "none of them shows"),
    ("00.4", ("Cleo", "b"), "Eve's is the smallest"),
    ("00.4", ("Cleo", "d"), "anything is possible"),
    ("00.4", ("Cleo", "e"), "not that it is small"),
    ("00.5", mean_of_shares, "do not all count the same"),
    ("00.5", last_batch_dropped, "do not count at all"),
    ("00.5", last_batch_as_full, "as if it were full"),
    ("00.5", lambda model, split, size: accuracy_on(model, split, size) * len(split), "counts the right"),
    ("00.5", lambda model, split, size: 0.3, "accuracy is not right"),
    ("00.5", 3, "a function is wanted"),
    ("00.7", {"epochs": 20}, "wanted is a Recipe"),
    ("00.7", replace(PLAIN, epochs=21), "21 epochs"),
    ("00.7", replace(PLAIN, epochs=1), "mean accuracy of"),
    ("00.7", replace(PLAIN, epochs=1, optimizer=partial(torch.optim.SGD, lr=1e9)), "diverged"),
    ("00.7", replace(PLAIN, augment=lambda x, generator: x[:, :, 1:]), "raised"),
]


@pytest.mark.parametrize(("exercise", "answer", "message"), MISTAKES)
def test_each_usual_mistake_is_named(exercise, answer, message):
    found = check(exercise, answer)
    assert found.state == "not yet right"
    assert message in found.message, found


@pytest.mark.parametrize(
    ("exercise", "listed"),
    [
        ("00.1", chapter_00._ACCURACY_MISTAKES),
        ("00.2", chapter_00._INTERVAL_MISTAKES),
        ("00.3", chapter_00._PAIR_MISTAKES),
        ("00.5", chapter_00._BATCH_MISTAKES),
        ("00.6", chapter_00._STEP_MISTAKES),
    ],
)
def test_every_listed_mistake_is_tried(exercise, listed):
    checking.assert_all_made(listed, exercise, MISTAKES)


@pytest.mark.parametrize("exercise", WRITTEN)
@pytest.mark.parametrize("answer", checking.STUBS)
def test_stubs_are_not_attempted(exercise, answer):
    checking.assert_not_attempted(exercise, answer)


@pytest.mark.parametrize(("exercise", "answer"), [("00.4", (..., ...)), ("00.4", ("Cleo", ...)), ("00.7", ...)])
def test_dots_are_not_attempted(exercise, answer):
    checking.assert_not_attempted(exercise, answer)


def test_what_the_chapter_shows_is_not_yet_enough_for_exercise_7():
    found = check("00.7", replace(PLAIN, augment=partial(random_shift, pixels=1)))
    assert found.state == "not yet right"
    assert "wanted is at least 0.89" in found.message


def test_the_checks_know_the_right_interval_from_scipy():
    values = np.random.default_rng(0).normal(size=6)
    np.testing.assert_allclose(chapter_00._interval(values), by_scipy(values))
    a, b = np.random.default_rng(1).normal(size=(2, 6))
    found = stats.ttest_ind(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(chapter_00._unpaired(a, b), (found.low, found.high))
