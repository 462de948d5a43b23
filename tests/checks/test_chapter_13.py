"""Checks of chapter 13: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import copy
import math
import re
from dataclasses import replace
from functools import partial

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import transfer
from course_lib.checks import chapter_13
from course_lib.lab import Recipe, convnet, evaluate, fit, fresh, load
from course_lib.lab.exercises import check
from course_lib.lab.models import freeze
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "13_transfer.ipynb"
WRITTEN = (checking.NOTEBOOKS / NOTEBOOK).exists()
ASKED = checking.asked(NOTEBOOK) if WRITTEN else []

lora_weight, cka, coral, head_step, mmd2 = (
    getattr(chapter_13, f"exercise_{number}").right for number in (1, 2, 3, 5, 6)
)


# Other right answers


def by_numpy(W, A, B, alpha):
    return W.numpy() + alpha / A.shape[0] * (B.numpy() @ A.numpy())


def by_the_columns_of_the_identity(W, A, B, alpha):
    """What the two paths say of each unit vector."""
    one = torch.eye(W.shape[1], dtype=W.dtype)
    return (F.linear(one, W) + F.linear(F.linear(one, A), B) * (alpha / len(A))).T


def by_the_course(W, A, B, alpha):
    """The course's update of a layer with these weights, before a head, merged."""
    layers = nn.Sequential(nn.Linear(W.shape[1], len(W), bias=False), nn.Linear(len(W), 2)).to(W.dtype)
    layers[0].weight.data.copy_(W)
    model = transfer.lora(layers, len(A), alpha, ["0"], generator=torch.Generator().manual_seed(0))
    for name, given in (("down", A), ("up", B)):
        (found,) = [value for key, value in model.named_parameters() if name in key]
        found.data.copy_(given)
    return transfer.merged(model)[0].weight


def by_gram_matrices(x, y):
    """HSIC of both over the root of those of each with itself (Kornblith et al. 2019, arXiv:1905.00414)."""
    middle = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    K, L = (middle @ z @ z.T @ middle for z in (x, y))
    return (K * L).sum() / ((K * K).sum() * (L * L).sum()).sqrt()


def by_torchs_covariances(source, target):
    gap = torch.cov(source.T) - torch.cov(target.T)
    return (gap**2).sum() / (2 * source.shape[1]) ** 2


def by_numpys_mean(source, target):
    gap = np.atleast_2d(np.cov(source.numpy(), rowvar=False)) - np.atleast_2d(np.cov(target.numpy(), rowvar=False))
    return float((gap**2).mean()) / 4


def with_no_grad(backbone, head, x, y, optimizer):
    """Nothing is said to the parameters: no graph reaches them, and old gradients are taken away."""
    backbone.eval()
    head.train()
    with torch.no_grad():
        h = backbone(x)
    optimizer.zero_grad()
    loss = F.cross_entropy(head(h), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def by_the_courses_freeze(backbone, head, x, y, optimizer):
    both = nn.Sequential(freeze(backbone), head).train()
    loss = F.cross_entropy(both(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def pair_by_pair(x, y, sigma):
    """From the paper's words, in plain Python."""

    def mean(pairs):
        values = [math.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / (2 * sigma**2)) for a, b in pairs]
        return math.fsum(values) / len(values)

    xs, ys = x.tolist(), y.tolist()
    within = (mean((a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) for z in (xs, ys))
    return sum(within) - 2 * mean((a, b) for a in xs for b in ys)


def by_cdist(x, y, sigma):
    def k(a, b):
        return (-(torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * sigma**2)).exp()

    within = (k(z, z).fill_diagonal_(0).sum() / (len(z) * (len(z) - 1)) for z in (x, y))
    return sum(within) - 2 * k(x, y).mean()


def products_of_moved_samples(x, y, sigma):
    middle = x.mean(0)
    return by_products(x - middle, y - middle, sigma)


def by_products(x, y, sigma):
    def k(a, b):
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        return (-squares / (2 * sigma**2)).exp()

    n, m = len(x), len(y)
    return (k(x, x).sum() - n) / (n * (n - 1)) + (k(y, y).sum() - m) / (m * (m - 1)) - 2 * k(x, y).mean()


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("13.1", by_numpy),
        ("13.1", by_the_columns_of_the_identity),
        ("13.1", by_the_course),
        ("13.2", by_gram_matrices),
        ("13.2", transfer.linear_cka),
        ("13.3", by_torchs_covariances),
        ("13.3", by_numpys_mean),
        ("13.3", transfer.coral_loss),
        ("13.5", with_no_grad),
        ("13.5", by_the_courses_freeze),
        ("13.6", pair_by_pair),
        ("13.6", by_cdist),
        ("13.6", products_of_moved_samples),
        ("13.6", lambda x, y, sigma: transfer.mmd_unbiased(x, y, [sigma])),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


# Usual mistakes


def added_in_place(W, A, B, alpha):
    W += alpha / len(A) * B @ A
    return W


def centred_in_place(x, y):
    x -= x.mean(0)
    return cka(x, y)


def as_it_is_given(backbone, head, x, y, optimizer):
    backbone.requires_grad_(False)
    backbone.train()
    head.train()
    return stepped(backbone, head, x, y, optimizer)


def stepped(backbone, head, x, y, optimizer):
    """A step in whatever mode both are in."""
    loss = F.cross_entropy(head(backbone(x)), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def without_gradients(backbone, *others):
    """In training mode, under no_grad: what the bug was in the first place."""
    return with_no_grad(Training(backbone), *others)


class Training(nn.Module):
    """A network that no eval() reaches."""

    def __init__(self, network):
        super().__init__()
        self.network = [network]

    def forward(self, x):
        return self.network[0].train()(x)


def without_momentum(backbone, *others):
    backbone[1].momentum = 0.0
    return as_it_is_given(backbone, *others)


def untracked(backbone, *others):
    backbone[1].track_running_stats = False
    return as_it_is_given(backbone, *others)


def mode_alone(backbone, head, *others):
    return stepped(backbone.eval(), head.train(), *others)


def gradients_of_zero(backbone, head, x, y, optimizer):
    """Weight decay moves what has a gradient, were it 0."""
    for weight in backbone.parameters():
        weight.grad.zero_()
    optimizer.zero_grad = partial(optimizer.zero_grad, set_to_none=False)
    return head_step(backbone, head, x, y, optimizer)


def all_evaluated(backbone, head, *others):
    return stepped(backbone.requires_grad_(False).eval(), head.eval(), *others)


def modes_as_they_come(backbone, head, *others):
    return stepped(backbone.requires_grad_(False), head, *others)


def spoilt_after(meddle):
    """Right, and then something is done to the two."""

    def answer(backbone, head, *others):
        loss = head_step(backbone, head, *others)
        with torch.no_grad():
            meddle(backbone, head)
        return loss

    return answer


def of_the_first_size(x, y, sigma):
    """The number of x's pairs for those of y, too."""
    k = transfer.gaussian_kernels
    n, m = len(x), len(y)
    within = (k(x, x, [sigma]).sum() - n + k(y, y, [sigma]).sum() - m) / (n * (n - 1))
    return within - 2 * k(x, y, [sigma]).mean()


MISTAKES = [
    ("13.1", added_in_place, "changes its argument W in place", "caller's weight"),
    ("13.1", lambda W, A, B, alpha: W + alpha * B @ A, "not by alpha / r", "by what number"),
    ("13.1", lambda W, A, B, alpha: W + alpha / len(A) * A.T @ B.T, "the product is transposed", "in brackets"),
    ("13.1", lambda W, A, B, alpha: W - alpha / len(A) * B @ A, "the merged weight is not right", "in brackets"),
    ("13.1", lambda *case: lora_weight(*case)[None], r"should have shape \[4, 4\]", "in brackets"),
    ("13.2", centred_in_place, "changes its argument x in place", "makes new ones"),
    ("13.2", lambda x, y: by_gram_matrices(x, y) ** 0.5, "the root of the CKA", "correlation"),
    ("13.2", lambda x, y: F.normalize(x - x.mean(0), dim=0).T @ y, "should have shape", "How alike is x to itself"),
    ("13.2", lambda x, y: 2 * cka(x, y), "the CKA is not right", "How alike is x to itself"),
    ("13.2", lambda x, y: cka(x, y) if len(x) > 1 and x.shape[1] > 1 else 1.0, r"not right.*one feature each", "x to"),
    ("13.3", lambda source, target: F.mse_loss(torch.cov(source.T), torch.cov(target.T)), "the 4 is lost", "by 1"),
    ("13.3", lambda source, target: by_torchs_covariances(source.T, target.T), "is not right|raised|should", ""),
    ("13.3", lambda *case: 2 * coral(*case), "the loss is not right", "differ by 1"),
    ("13.3", lambda *case: coral(*case)[None], "should have shape", "differ by 1"),
    ("13.5", as_it_is_given, "no gradient reaches the backbone, and still", "running_mean"),
    ("13.5", without_momentum, "statistics come out as they were", "alone, and once more"),
    ("13.5", untracked, "statistics come out as they were", "alone, and once more"),
    ("13.5", mode_alone, "its weights move: gradients reach it", "weight before and after"),
    ("13.5", gradients_of_zero, "the backbone's weights have moved", "weight before and after"),
    ("13.5", all_evaluated, "the head is put into evaluation mode as well", "should move"),
    ("13.5", modes_as_they_come, "no gradient reaches the backbone, and still", "running_mean"),
    ("13.5", without_gradients, "in training mode: it drops features", "running_mean"),
    ("13.5", spoilt_after(lambda backbone, head: backbone[3].train()), "some layer of the backbone", "nobody's next"),
    ("13.5", spoilt_after(lambda backbone, head: backbone[1].running_var.mul_(2)), "running statistics of the backbone",
     "running_mean"),
    ("13.5", spoilt_after(lambda backbone, head: backbone[0].weight.mul_(2)), "weights have moved", "optimizer holds"),
    ("13.5", spoilt_after(lambda backbone, head: head[0].eval()), "the head is not in training mode", "being trained"),
    ("13.5", spoilt_after(lambda backbone, head: head[1].weight.mul_(2)), "the head's weights is not right", "Compare"),
    ("13.5", lambda *case: 2 * head_step(*case), "the loss is not right", "Compare the backbone"),
    ("13.6", of_the_first_size, r"the estimate is not right.*\(on 7 and 4 rows\)", "0.607"),
    ("13.6", by_products, "the digits of the distances are lost", "near each other"),
    ("13.6", lambda x, y, sigma: transfer.mmd_biased(x, y, [sigma]), "the biased estimate", "to itself"),
    ("13.6", lambda x, y, sigma: max(mmd2(x, y, sigma), torch.zeros((), dtype=x.dtype)), "is lifted to 0", "at times"),
    ("13.6", lambda x, y, sigma: mmd2(x, y, 2**0.5 * sigma), "the estimate is not right", "0.607"),
    ("13.6", lambda x, y, sigma: mmd2(x, y, sigma / 2**0.5), "the 2 of 2 σ² is lost", "0.607"),
    ("13.6", lambda x, y, sigma: mmd2(x, y, sigma)[None], "should have shape", "0.607"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:cov..:UserWarning")
@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


def test_features_are_alike_whatever_their_order_place_and_size():
    case = chapter_13.exercise_2.cases["features of another order, moved and tripled"]
    assert cka(*case).item() == pytest.approx(1, rel=1e-12)


def test_a_domain_that_has_only_moved_is_no_other_to_coral():
    assert coral(*chapter_13.exercise_3.cases["the same features, moved"]).item() == pytest.approx(0, abs=1e-12)


def test_one_hidden_estimate_is_negative():
    """Otherwise nobody is told that it may be."""
    signs = {on: mmd2(*case).item() < 0 for on, case in chapter_13.exercise_6.cases.items()}
    assert signs["two samples of one distribution"]
    assert not all(signs.values())


def test_the_estimate_is_zero_on_average_and_the_biased_one_is_not():
    draw = torch.Generator().manual_seed(0)
    samples = torch.randn(500, 2, 8, 2, generator=draw, dtype=torch.float64)
    found = torch.stack([torch.stack([mmd2(x, y, 1.5), transfer.mmd_biased(x, y, [1.5])]) for x, y in samples])
    error = found.std(0) / len(samples) ** 0.5
    assert abs(found[:, 0].mean()) < 3 * error[0]
    assert found[:, 1].mean() > 10 * error[1]


def test_a_backbone_in_training_gives_other_features_after_a_step():
    """The bug of 13.5 is one: no weight moves, and what the backbone says of an image does."""
    drifts = []
    for step in (as_it_is_given, head_step):
        backbone, head = chapter_13._two_parts(1, True, True)
        optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
        x = chapter_13.normal(2, 8, 4)
        before, weights = copy.deepcopy(backbone).eval()(x), backbone[0].weight.clone()
        step(backbone, head, x, torch.arange(8) % 3, optimizer)
        assert torch.equal(backbone[0].weight, weights)
        drifts.append((backbone.eval()(x) - before).abs().max().item())
    assert drifts[0] > 0.1
    assert drifts[1] == 0


def test_the_right_name_for_another_reason():
    """To end below scratch with frozen features is no sign of harm."""
    found = check("13.4", ("cleo", "a"))
    assert found.state == "not yet right"
    assert "holds for Ada and Ben too" in found.message


# The source to choose


def chosen(source="outline letters", trains="head", lr=0.01, epochs=30, **others):
    return {"source": source, "trains": trains, "lr": lr, "epochs": epochs, **others}


@pytest.fixture
def alone(monkeypatch):
    """One hidden seed: most of what the check sees, in half of the time."""
    monkeypatch.setattr(chapter_13, "HIDDEN", chapter_13.HIDDEN[:1])


def test_features_of_like_drawings_are_enough_if_they_stay(alone):
    found = check("13.7", chosen())
    assert found.state == "passed", found


@pytest.mark.parametrize(
    ("answer", "low", "high", "hint"),
    [
        (chosen(trains="all"), 0.37, 0.45, "has to stay"),
        (chosen("nothing", "all"), 0.15, 0.3, "teach no features"),
        (chosen("outline letters", "head", 0.001, 10), 0.05, 0.3, "come to rest"),
    ],
)
def test_another_choice_is_not(alone, answer, low, high, hint):
    found = check("13.7", answer)
    told = r"a mean accuracy of (0\.\d{3}) over 1 hidden seeds; at least 0\.485 is wanted"
    assert (reached := re.fullmatch(told, found.message)), found
    assert low < float(reached[1]) < high, found
    assert hint in found.hint


def test_a_hidden_run_is_what_the_course_would_make_of_it():
    """A probe of the source's features, by another solver than the check's, is as good."""
    seed = chapter_13.HIDDEN[0]
    network = fresh(partial(convnet, (1, 16, 16), 10, width=8), chapter_13.LEARNING, seed=0)
    network.features.load_state_dict(chapter_13._features("outline letters", seed))
    data = chapter_13._drawn(chapter_13.TARGET, 30, 2000, seed)
    assert data.train.labels.bincount().tolist() == [3] * 10
    probe = transfer.probe(transfer.features(network, data.train), data.train.labels)
    reached = probe.accuracy(transfer.features(network, data.test), data.test.labels)
    assert reached == pytest.approx(chapter_13._outcome("outline letters", "head", 0.01, 30, seed), abs=0.05)


@pytest.mark.parametrize(("trains", "moving"), [("all", 6_274), ("last", 5_002), ("head", 330)])
def test_what_is_frozen_stays(trains, moving):
    network = convnet((1, 16, 16), 10, width=8)
    chapter_13.FROZEN[trains](network)
    assert transfer.trainable(network) == moving
    before = {name: value.clone() for name, value in network.features.state_dict().items()}
    network.train()(torch.rand(4, 1, 16, 16))
    still = {name for name, value in network.features.state_dict().items() if torch.equal(value, before[name])}
    norms = {"1.running_mean": "all", "5.running_mean": "all", "9.running_mean": "all last"}
    assert {name for name in norms if name not in still} == {n for n, where in norms.items() if trains in where.split()}


@pytest.fixture
def invented(monkeypatch):
    """Hidden runs that cost nothing: good from outlined letters, where not all moves and there is time."""

    def outcome(source, trains, lr, epochs, seed):
        good = source == "outline letters" and trains != "all" and lr * epochs > 0.01
        return 0.52 if good else 0.44

    monkeypatch.setattr(chapter_13, "_outcome", outcome)


@pytest.mark.parametrize(
    "answer",
    [chosen(), chosen(trains="last", epochs=np.int64(60)), chosen(lr=torch.tensor(0.05), epochs=1.0)],
)
def test_a_choice_within_the_rules_is_admitted(invented, answer):
    found = check("13.7", answer)
    assert found.state == "passed", found


@pytest.mark.parametrize("answer", [..., None, chosen(...), chosen(epochs=...)])
def test_a_choice_that_is_not_there_yet(answer):
    checking.assert_not_attempted("13.7", answer)


@pytest.mark.parametrize("answer", checking.USELESS)
def test_what_is_no_choice_is_told_what_is_wanted(answer):
    checking.assert_told_what_is_wrong("13.7", answer)


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        (("outline letters", "head", 0.01, 30), "a dict of source, trains, lr, epochs", "For instance"),
        ({"source": "outline letters"}, "a dict of source, trains, lr, epochs", "For instance"),
        (chosen(seed=3), "a dict of source, trains, lr, epochs", "For instance"),
        (chosen("outline digits"), "source is 'outline digits'", "'print digits', 'chalk digits', 'outline letters'"),
        (chosen(["print digits"]), "source is \\['print digits'\\]", "There are"),
        (chosen(trains="norms"), "trains is 'norms'", "'all', 'last', 'head'"),
        (chosen(lr="fast"), "lr should be a number", "For instance"),
        (chosen(lr=[0.1, 0.2]), "lr should be a number", "For instance"),
        (chosen(lr=0), "lr is 0", "from 1e-05 to 0.1"),
        (chosen(lr=math.nan), "lr is nan", "from 1e-05 to 0.1"),
        (chosen(epochs=200), "epochs is 200", "from 1 to 60"),
        (chosen(epochs=2.5), "epochs is 2.5", "whole"),
        (chosen("chalk digits"), r"a mean accuracy of 0\.440 over 2 hidden seeds", "teach no features"),
        (chosen(trains="all"), r"a mean accuracy of 0\.440", "has to stay"),
        (chosen(trains="last", lr=1e-5), r"a mean accuracy of 0\.440", "come to rest"),
    ],
)
def test_a_choice_is_told_what_it_lacks(invented, answer, message, hint):
    checking.assert_hinted("13.7", answer, message, hint)


# The notebook's own


@pytest.mark.skipif(not WRITTEN, reason="the notebook is to come")
def test_the_figure_says_what_its_reading_says():
    cells = nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4).cells
    (code,) = [cell.source for cell in cells if cell.cell_type == "code" and '"Cleo": (' in cell.source]
    drawn: dict = {"np": np, "plt": plt}
    exec(code, drawn)
    plt.close("all")
    everyone = {"Ada", "Ben", "Cleo", "Dan"}
    seen = what_is_seen(drawn["curves"])
    assert seen == (everyone - {"Dan"}, everyone - {"Ada"}, {"Cleo"}, everyone - {"Ben"})


def what_is_seen(curves):
    """Of whom each of the four reasons is true: a low probe at last, a high one at first, harm, a gap that closes."""
    low, high, harm, closes = set(), set(), set(), set()
    for name, rows in curves.items():
        scratch, tuned, probe = np.array(rows)
        gains = tuned - scratch
        to_be_seen = [gains, (probe - tuned)[[0]], (probe - np.minimum(scratch, tuned))[[-1]], [gains[0] - gains[-1]]]
        assert all(np.abs(gap).min() > 4 for gap in to_be_seen), "points, to be seen"
        low |= {name} if probe[-1] < min(scratch[-1], tuned[-1]) else set()
        high |= {name} if probe[0] > tuned[0] else set()
        harm |= {name} if (gains < 0).all() else set()
        assert (gains < 0).all() or (gains > 0).all(), "for everyone the same at every number of labels"
        closes |= {name} if abs(gains[-1]) < abs(gains[0]) else set()
    return low, high, harm, closes


@pytest.mark.parametrize("exercise", ASKED)
def test_the_printed_solutions_pass(exercise):
    names = {"copy": copy, "math": math, "np": np, "torch": torch, "nn": nn, "F": F, "partial": partial, "fit": fit}
    names |= {"replace": replace, "Recipe": Recipe, "fresh": fresh, "evaluate": evaluate, "load": load}
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, **names, transfer=transfer, convnet=convnet)
