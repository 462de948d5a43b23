"""Checks of chapter 9: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import copy
import math
from dataclasses import replace
from decimal import Decimal, localcontext
from functools import partial

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import distillation as kd
from course_lib.checks import chapter_09
from course_lib.lab import load
from course_lib.lab.exercises import check
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.models import mlp
from course_lib.studies import chapter_09_digits as study
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "09_distillation.ipynb"
WRITTEN = (checking.NOTEBOOKS / NOTEBOOK).exists()
ASKED = checking.asked(NOTEBOOK) if WRITTEN else []

soft, distil_loss, soft_gradient, distil_step, two_parts = (
    getattr(chapter_09, f"exercise_{number}").right for number in (1, 2, 3, 5, 6)
)


# Other right answers


def by_exponentials(logits, T):
    u = (logits - logits.max(1, keepdim=True).values) / T
    return u.exp() / u.exp().sum(1, keepdim=True)


def powers_brought_back(logits, T):
    """Right for logits whose probabilities do not vanish: by logarithms they never do."""
    u = logits.log_softmax(1) / T
    return (u - u.logsumexp(1, keepdim=True)).exp()


def by_kl_div(z, v, y, T, mix):
    apart = F.kl_div((z / T).log_softmax(1), (v / T).softmax(1), reduction="batchmean")
    return (1 - mix) * F.cross_entropy(z, y) + mix * T**2 * apart


def by_log_target(z, v, y, T, mix):
    logs = [(logits / T).log_softmax(1) for logits in (z, v)]
    apart = F.kl_div(*logs, reduction="none", log_target=True).sum(1)
    return ((1 - mix) * F.cross_entropy(z, y, reduction="none") + mix * T**2 * apart).mean().item()


def by_the_course(z, v, y, T, mix):
    """Its objective, of a network whose logits are its input."""
    return kd.soft_targets(nn.Identity(), z, y, teacher=lambda x: v, temperature=T, mix=mix)


def without_the_entropy(z, v, y, T, mix):
    """Two cross-entropies, the second less what it is at best."""
    p = (v / T).softmax(1)
    entropy = F.cross_entropy(v / T, p)
    return (1 - mix) * F.cross_entropy(z, y) + mix * T**2 * (F.cross_entropy(z / T, p) - entropy)


def by_autograd(z, v, T):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(kd.soft_loss(z, v, T), z)[0]


def by_differences(z, v, T, eps=1e-4):
    """Right to six digits."""
    z, v = z.double(), v.double()
    found = torch.zeros_like(z)
    for place in np.ndindex(*z.shape):
        move = torch.zeros_like(z)
        move[place] = eps
        found[place] = (kd.soft_loss(z + move, v, T) - kd.soft_loss(z - move, v, T)) / (2 * eps)
    return found


def with_a_copy(student, teacher, x, y, optimizer, T, mix):
    """What becomes of a copy does not matter."""
    loss = by_kl_div(student(x), copy.deepcopy(teacher).eval()(x), y, T, mix)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def part_by_part(student, teacher, x, y, optimizer, T, mix):
    modes = {part: part.training for part in teacher.modules()}
    teacher.eval()
    v = teacher(x).detach()
    for part, mode in modes.items():
        part.training = mode
    loss = by_the_course(student(x), v, y, T, mix)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def as_in_the_paper(z, v, y, T):
    """The authors' own: sums of the other probabilities, and logits of the label far below all."""
    label = F.one_hot(y, z.shape[1]).bool()
    q, p = (z / T).softmax(1), (v / T).softmax(1)
    pairs = [torch.stack([each[label], (each * ~label).sum(1)], 1) for each in (q, p)]
    first = F.kl_div(pairs[0].log(), pairs[1], reduction="none").sum(1)
    logs = [(each / T - 1000.0 * label).log_softmax(1) for each in (z, v)]
    return first, (logs[1].exp() * (logs[1] - logs[0])).sum(1)


def with_fifty_digits(z, v, y, T):
    """From the definition, in numbers of 200 digits: there 1 - p may be subtracted."""
    with localcontext() as context:
        context.prec = 200
        rows = [_decimal_parts(*row) for row in zip(z.tolist(), v.tolist(), y.tolist(), [T] * len(y), strict=True)]
    return tuple(torch.tensor(part, dtype=z.dtype) for part in zip(*rows, strict=True))


def _decimal_parts(z, v, y, T):
    q, p = ([(Decimal(logit) / Decimal(T)).exp() for logit in logits] for logits in (z, v))
    q, p = ([each / sum(weights) for each in weights] for weights in (q, p))
    first = p[y] * (p[y] / q[y]).ln() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).ln()
    others = [(a / (1 - p[y]), b / (1 - q[y])) for k, (a, b) in enumerate(zip(p, q, strict=True)) if k != y]
    return float(first), float(sum(a * (a / b).ln() for a, b in others))


def by_the_courses_parts(z, v, y, T):
    return [part(z, v, y, T) / T**2 for part in (kd.target_class_losses, kd.other_classes_losses)]


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("09.1", by_exponentials),
        ("09.1", powers_brought_back),
        ("09.1", lambda logits, T: F.softmax(logits.div(T), dim=-1)),
        ("09.2", by_kl_div),
        ("09.2", by_log_target),
        ("09.2", by_the_course),
        ("09.2", without_the_entropy),
        ("09.3", by_autograd),
        ("09.3", by_differences),
        ("09.3", kd.soft_gradient),
        ("09.5", with_a_copy),
        ("09.5", part_by_part),
        ("09.6", as_in_the_paper),
        ("09.6", with_fifty_digits),
        ("09.6", by_the_courses_parts),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


def test_the_two_parts_make_up_the_whole():
    z, v, y = (chapter_09._taught(1, 20, 6, 2.0, 0.5))[:3]
    first, second = two_parts(z, v, y, 2.0)
    rest = 1 - (v / 2).softmax(1).gather(1, y[:, None])[:, 0]
    whole = F.kl_div((z / 2).log_softmax(1), (v / 2).softmax(1), reduction="none").sum(1)
    assert torch.allclose(first + rest * second, whole, rtol=1e-12)


# Usual mistakes


def divided_in_place(logits, T):
    logits /= T
    return logits.softmax(1)


def in_training(student, teacher, x, y, optimizer, T, mix):
    """The code as it is given."""
    z, v = student(x), teacher(x)
    loss = by_kl_div(z, v, y, T, mix)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def no_gradients(student, teacher, *others):
    def answered(x):
        return teacher(x).detach()

    return in_training(student, answered, *others)


def evaluated_for_good(student, teacher, *others):
    return no_gradients(student, teacher.eval(), *others)


def spoilt_after(meddle):
    """Right, and then something is done to the two."""

    def answer(student, teacher, *others):
        loss = distil_step(student, teacher, *others)
        with torch.no_grad():
            meddle(student, teacher)
        return loss

    return answer


MISTAKES = [
    ("09.1", divided_in_place, "changes its argument logits in place", "new ones"),
    ("09.1", lambda logits, T: soft(logits, T) / 2, "the probabilities is not right", "88%"),
    ("09.1", lambda logits, T: soft(logits, T)[:, 1:], r"should have shape \[4, 3\]", "88%"),
    ("09.1", lambda logits, T: logits.softmax(1).pow(1 / T), "not brought back to a sum of 1", "nearly it"),
    ("09.1", lambda logits, T: (logits / T).exp() / (logits / T).exp().sum(1)[:, None], "become NaN", "largest|row"),
    ("09.2", lambda *case: 2 * distil_loss(*case), "the loss is not right", "z = v and mix = 1"),
    ("09.2", lambda z, v, y, T, mix: F.cross_entropy(z, y, reduction="none"), "should have shape", "z = v"),
    ("09.2", lambda z, v, y, T, mix: (1 - mix) * F.cross_entropy(z, y) + mix * T**2 * F.kl_div(
        (z / T).log_softmax(1), (v / T).softmax(1)), "divided by N . K", "F.kl_div has a reduction"),
    ("09.2", lambda z, v, y, T, mix: (1 - mix) * F.cross_entropy(z, y) + mix * T**2 * F.kl_div(
        (z / T).log_softmax(1), (v / T).log_softmax(1), reduction="batchmean"), "the loss is NaN", "p itself"),
    ("09.2", lambda z, v, y, T, mix: (1 - mix) * F.cross_entropy(z, y) + mix * T**2 * F.kl_div(
        (v / T).log_softmax(1), (z / T).softmax(1), reduction="batchmean"), "the other way round", "log 2"),
    ("09.2", lambda z, v, y, T, mix: (1 - mix) * F.cross_entropy(z, y) + mix * T**2 * F.cross_entropy(
        z / T, (v / T).softmax(1)), "the soft cross-entropy", "divergence from itself"),
    ("09.2", lambda z, v, y, T, mix: (1 - mix) * F.cross_entropy(z, y) + mix * T**2 * F.kl_div(
        (z / T).softmax(1).log(), (v / T).softmax(1), reduction="batchmean"), "no logarithm", "in one step"),
    ("09.3", lambda *case: 2 * soft_gradient(*case), "the gradient is not right", "1e-4"),
    ("09.3", lambda *case: soft_gradient(*case).sum(0), "should have shape", "1e-4"),
    ("09.3", lambda z, v, T: kd.hot_gradient(z, v), "the limit at a high temperature", "T = 1"),
    ("09.3", lambda z, v, T: by_autograd(z, v, T) / T**2, "the gradient of the KL alone", "T²"),
    ("09.5", in_training, "still answers with dropout", "running_mean"),
    ("09.5", no_gradients, "no gradient reaches the teacher any more", "running_mean"),
    ("09.5", evaluated_for_good, "left in evaluation mode", "teacher.training"),
    ("09.5", lambda student, teacher, *others: in_training(student, teacher.eval(), *others),
     "gradients pile up in it, and it is left in evaluation", "weight.grad"),
    ("09.5", spoilt_after(lambda student, teacher: teacher[0].weight.mul_(2)), "weights have moved", "writes into"),
    ("09.5", spoilt_after(lambda student, teacher: teacher[1].running_mean.add_(1)), "statistics of the teacher",
     "running_mean"),
    ("09.5", spoilt_after(lambda student, teacher: teacher[1].eval()), "the teacher comes back in another mode",
     "teacher.training"),
    ("09.5", spoilt_after(lambda student, teacher: setattr(teacher[0].weight, "grad", teacher[0].weight.clone())),
     "gradients are not what they were", "weight.grad"),
    ("09.5", spoilt_after(lambda student, teacher: teacher[0].requires_grad_(False)), "require a gradient and did not",
     "requires_grad_ stays"),
    ("09.5", spoilt_after(lambda student, teacher: student.eval()), "the student comes back in another mode",
     "being trained"),
    ("09.5", spoilt_after(lambda student, teacher: student[0].weight.mul_(2)), "the student's weights is not right",
     "before and after"),
    ("09.5", lambda *case: 2 * distil_step(*case), "the loss is not right", "before and after"),
    ("09.6", lambda *case: two_parts(*case)[0], "should return 2 values", "first plus"),
    ("09.6", lambda *case: [2 * part for part in two_parts(*case)], "the label's part is not right", "first plus"),
    ("09.6", lambda z, v, y, T: (two_parts(z, v, y, T)[0], 3 * two_parts(z, v, y, T)[1]),
     "the other classes' part is not right", "first plus"),
    ("09.6", lambda *case: tuple(T * T * part for part, T in zip(two_parts(*case), [case[3]] * 2, strict=True)),
     "multiplied by T²", "plain divergences"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


def test_the_right_name_for_another_reason():
    """To lie far below the teacher is the fate of others too."""
    found = check("09.4", ("dan", "a"))
    assert found.state == "not yet right"
    assert "Ada's and Cleo's students" in found.message


# The teacher to choose


def chosen(width=16, temperature=4, mix=0.9, **others):
    return {"width": width, "temperature": temperature, "mix": mix, **others}


def test_hidden_runs_are_those_of_the_chapter():
    assert fingerprint(chapter_09.TEACHING) == fingerprint(study.TEACHING)
    assert fingerprint(chapter_09.LEARNING) == fingerprint(study.LEARNING)
    assert (chapter_09.STUDENT, chapter_09.WIDTHS) == (study.STUDENT, (8, 16, 32, 64, 128, 256))


def test_a_narrow_teacher_is_enough():
    found = check("09.7", chosen())
    assert found.state == "passed", found


@pytest.fixture
def alone(monkeypatch):
    """One hidden seed and one student: most of what the check sees, in a quarter of the time."""
    monkeypatch.setattr(chapter_09, "STUDENTS", 1)
    monkeypatch.setattr(chapter_09, "HIDDEN", chapter_09.HIDDEN[:1])
    monkeypatch.setattr(chapter_09, "_outcome", chapter_09._outcome.__wrapped__)


def test_a_teacher_that_is_too_wide_is_not(alone):
    told = r"a mean accuracy of 0\.6.* teachers reach 0\.[89].* agree with them on 0\."
    checking.assert_hinted("09.7", chosen(128), told, "eight units")


def test_a_hidden_run_is_what_the_chapter_would_make_of_it(alone):
    """A student and its teacher, trained and measured once more by the study's functions."""
    (seed,) = chapter_09.HIDDEN
    data, teacher = chapter_09._digits(seed), chapter_09._teacher(16, seed)
    few = replace(data, train=data.train.subset(torch.arange(500)))
    objective = partial(kd.soft_targets, teacher=teacher, temperature=4.0, mix=0.9)
    student = study.learn(few, seed, objective, recipe=study.LEARNING)
    measured = study.outcome(student, few, teacher)
    found = chapter_09._outcome(16, 4.0, 0.9, seed)
    assert found == pytest.approx((measured["test"], measured["teacher"], measured["agreement"]), abs=2e-3)


@pytest.fixture
def invented(monkeypatch):
    """Hidden runs that cost nothing: good with a teacher of 16 or 32 that is warm and heard."""

    def outcome(width, T, mix, seed):
        good = width in (16, 32) and T >= 2 and mix >= 0.3
        return (0.74 if good else 0.65), 0.8, 0.7

    monkeypatch.setattr(chapter_09, "_outcome", outcome)


@pytest.mark.parametrize(
    "answer",
    [
        chosen(),
        chosen(32, 2.5, 1),
        chosen(np.int64(16), np.float64(20.0), torch.tensor(0.5)),
    ],
)
def test_a_choice_within_the_rules_is_admitted(invented, answer):
    found = check("09.7", answer)
    assert found.state == "passed", found


@pytest.mark.parametrize("answer", [..., None, chosen(...), chosen(mix=...)])
def test_a_choice_that_is_not_there_yet(answer):
    checking.assert_not_attempted("09.7", answer)


@pytest.mark.parametrize("answer", checking.USELESS)
def test_what_is_no_choice_is_told_what_is_wanted(answer):
    checking.assert_told_what_is_wrong("09.7", answer)


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        ((16, 4, 0.9), "a dict of width, temperature, mix", "For instance"),
        ({"width": 16, "temperature": 4}, "a dict of width, temperature, mix", "For instance"),
        (chosen(seed=3), "a dict of width, temperature, mix", "For instance"),
        (chosen("16 units"), "width should be a number", "For instance"),
        (chosen(mix=[0.5, 0.9]), "mix should be a number", "For instance"),
        (chosen(20), "no teacher of width 20", "8, 16, 32, 64, 128, 256"),
        (chosen(16.5), "no teacher of width 16.5", "8, 16, 32, 64, 128, 256"),
        (chosen(temperature=0.5), "the temperature is 0.5", "from 1 to 20"),
        (chosen(temperature=math.nan), "the temperature is nan", "from 1 to 20"),
        (chosen(mix=1.5), "the mix is 1.5", "from 0 to 1"),
        (chosen(mix=-0.1), "the mix is -0.1", "from 0 to 1"),
        (chosen(mix=0), r"0\.650 over 2 hidden seeds.* teachers reach 0\.800, .* on 0\.700 of", "little else"),
        (chosen(8), r"a mean accuracy of 0\.650", "twice or four times"),
        (chosen(256), r"a mean accuracy of 0\.650", "Can eight units imitate"),
        (chosen(temperature=1), r"a mean accuracy of 0\.650", "says little more than the label"),
    ],
)
def test_a_choice_is_told_what_it_lacks(invented, answer, message, hint):
    checking.assert_hinted("09.7", answer, message, hint)


# The notebook's own


@pytest.mark.skipif(not WRITTEN, reason="the notebook is to come")
def test_the_figure_says_what_its_reading_says():
    cells = nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4).cells
    (code,) = [cell.source for cell in cells if cell.cell_type == "code" and '"Cleo": (' in cell.source]
    drawn: dict = {"np": np, "plt": plt}
    exec(code, drawn)
    plt.close("all")
    far, worse, falls, idle = what_is_seen(drawn["lines"])
    assert (far, worse, falls, idle) == ({"Ada", "Cleo", "Dan"}, {"Cleo"}, {"Dan"}, {"Ada", "Ben", "Dan"})


def what_is_seen(lines):
    """Of whom each of the four reasons is true: far below, below the line, falls while the teacher rises, no longer."""
    far, worse, falls, idle = set(), set(), set(), set()
    for name, (teacher, students, alone) in lines.items():
        mean, error = students.mean(0), students.std(0, ddof=1).max() / len(students) ** 0.5
        best = mean.argmax() if mean[-1] < mean.max() - 4 * error else len(mean) - 1
        far |= {name} if (teacher - mean)[-1] > 0.1 else set()
        worse |= {name} if (mean < alone).all() else set()
        falls |= {name} if best < len(mean) - 1 and (np.diff(teacher[best:]) > 0).all() else set()
        idle |= {name} if mean[-1] - mean[len(mean) // 2 - 1] < 2 * error else set()
    return far, worse, falls, idle


@pytest.mark.parametrize("exercise", ASKED)
def test_the_printed_solutions_pass(exercise):
    names = {"copy": copy, "math": math, "np": np, "torch": torch, "nn": nn, "F": F, "partial": partial, "kd": kd}
    names |= {"mlp": mlp, "load": load}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names)
