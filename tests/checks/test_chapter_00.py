"""Checks of chapter 0: right answers pass, each usual mistake gets its own words, stubs are not attempted."""

import numpy as np
import pytest
from scipy import stats
from torch.nn import functional as F

from course_lib.checks import chapter_00
from course_lib.lab import mean_interval
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")


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
        ("00.4", train_step),
        ("00.4", train_step_as_number),
        ("00.4", train_step_with_closure),
    ],
)
def test_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


SOLUTIONS = {"00.1": "accuracy", "00.2": "interval", "00.3": "paired_interval", "00.4": "train_step"}


@pytest.mark.parametrize(("exercise", "name"), SOLUTIONS.items())
def test_the_printed_solutions_pass(exercise, name):
    found = check(exercise, checking.printed_solutions("00_start_here.ipynb", np=np, stats=stats, F=F)[name])
    assert found.state == "passed", found


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


@pytest.mark.parametrize(
    ("exercise", "answer", "message"),
    [
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
        ("00.4", no_zeroing, "step before"),
        ("00.4", zeroed_before_the_step, "not moved"),
        ("00.4", no_step, "not moved"),
        ("00.4", summed, "summed"),
        ("00.4", loss_after_the_step, "loss that is returned"),
        ("00.4", two_steps, "weights after it"),
        ("00.4", changes_the_batch, "changes its argument x"),
        ("00.4", 3, "a function is wanted"),
    ],
)
def test_each_usual_mistake_is_named(exercise, answer, message):
    found = check(exercise, answer)
    assert found.state == "not yet right"
    assert message in found.message, found


@pytest.mark.parametrize("exercise", SOLUTIONS)
@pytest.mark.parametrize("answer", checking.STUBS)
def test_stubs_are_not_attempted(exercise, answer):
    checking.assert_not_attempted(exercise, answer)


def test_the_checks_know_the_right_interval_from_scipy():
    values = np.random.default_rng(0).normal(size=6)
    np.testing.assert_allclose(chapter_00._interval(values), by_scipy(values))
    a, b = np.random.default_rng(1).normal(size=(2, 6))
    found = stats.ttest_ind(a, b).confidence_interval(0.95)
    np.testing.assert_allclose(chapter_00._unpaired(a, b), (found.low, found.high))
