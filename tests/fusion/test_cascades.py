"""Cascades: against loops over single examples, brute force over thresholds, and flops counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from course_lib import fusion
from course_lib.distillation import WithExits
from course_lib.lab.costs import flops
from course_lib.lab.training import logits_of
from tests.fusion.small import answers, batch, close, data, network, normal

LOGITS, LABELS = answers(3, 60)
CONFIDENCES = [fusion.max_probability, fusion.margin, fusion.negative_entropy]


def test_confidences_are_the_formulas() -> None:
    q = LOGITS[0].softmax(1)
    ranked = q.sort(1, descending=True).values
    close(fusion.max_probability(LOGITS[0]), ranked[:, 0], 1e-12)
    close(fusion.margin(LOGITS[0]), ranked[:, 0] - ranked[:, 1], 1e-12)
    close(fusion.negative_entropy(LOGITS[0]), -torch.distributions.Categorical(q).entropy(), 1e-12)
    named = LOGITS.argmax(2)
    counts = torch.stack([torch.bincount(column, minlength=4).max() for column in named.T])
    close(fusion.agreement(LOGITS), counts.double() / 3, 1e-12)


def one_by_one(logits: Tensor, thresholds: list[float], confidence: object, combine: object) -> tuple[Tensor, Tensor]:
    """Each example by itself, as the text says it."""
    rows, asked = [], []
    for n in range(logits.shape[1]):
        for count in range(1, len(logits) + 1):
            said = combine(logits[:count, n : n + 1]).log_softmax(1)  # type: ignore[operator]
            if count == len(logits) or float(confidence(said)) >= thresholds[count - 1]:  # type: ignore[operator]
                break
        rows.append(said[0])
        asked.append(count)
    return torch.stack(rows), torch.tensor(asked)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("combine", [fusion.mean_probability, fusion.last])
def test_a_cascade_stops_where_it_is_sure(confidence: object, combine: object) -> None:
    thresholds = [float(confidence(LOGITS[k]).median()) for k in range(2)]  # type: ignore[operator]
    found = fusion.cascaded(LOGITS, thresholds, confidence=confidence, combine=combine)  # type: ignore[arg-type]
    log_q, asked = one_by_one(LOGITS, thresholds, confidence, combine)
    close(found.log_q, log_q, 1e-12)
    assert torch.equal(found.asked, asked)
    assert set(asked.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("combine", [fusion.mean_probability, fusion.last])
def test_its_module_asks_each_network_about_open_examples_alone(combine: object) -> None:
    models, small = [network(seed=k) for k in range(3)], data()
    logits = fusion.members_logits(models, small.test)
    thresholds = [float(fusion.margin(each).median()) for each in logits[:2]]
    cascade = fusion.Cascade(models, thresholds, confidence=fusion.margin, combine=combine)  # type: ignore[arg-type]
    expected = fusion.cascaded(logits, thresholds, confidence=fusion.margin, combine=combine)  # type: ignore[arg-type]
    seen: list[int] = []
    for model in models:
        model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    close(logits_of(cascade, small.test), expected.log_q, 1e-12)
    assert seen == [int((expected.asked >= k).sum()) for k in (1, 2, 3)]
    with torch.no_grad():
        sure = fusion.Cascade(models, [-1.0, -1.0]).answer(batch())
        never = fusion.Cascade(models, [2.0, 2.0]).answer(batch())
    assert sure.asked.tolist() == [1] * 6
    assert never.asked.tolist() == [3] * 6


def test_inputs_in_parts() -> None:
    class Sum(nn.Module):
        def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
            return x[0] + x[1]

    x = (normal(8, 4), normal(8, 4, seed=1))
    found = fusion.Cascade([Sum(), Sum()], [0.6], combine=fusion.last).answer(x)
    close(found.log_q, (x[0] + x[1]).log_softmax(1), 1e-12)
    assert set(found.asked.tolist()) == {1, 2}


@pytest.mark.parametrize("rounded", [False, True])
def test_the_lowest_threshold_that_is_good_enough(rounded: bool) -> None:
    first, second = (LOGITS[0].round(), LOGITS[2]) if rounded else (LOGITS[0], LOGITS[2])
    sure = fusion.max_probability(first)

    def accuracy_at(threshold: float) -> float:
        named = torch.where(sure >= threshold, first.argmax(1), second.argmax(1))
        return float((named == LABELS).double().mean())

    candidates = [*sorted(set(sure.tolist())), math.inf]
    reachable = sorted({accuracy_at(t) for t in candidates})
    for target in (reachable[0], reachable[len(reachable) // 2], reachable[-1]):
        expected = next(t for t in candidates if accuracy_at(t) >= target - 1e-9)
        assert fusion.threshold_for_accuracy(first, second, LABELS, target) == pytest.approx(expected)
    with pytest.raises(ValueError, match=f"at most {reachable[-1]:g}"):
        fusion.threshold_for_accuracy(first, second, LABELS, 1.0)


@pytest.mark.parametrize("confidence", [fusion.max_probability, fusion.margin, fusion.negative_entropy])
def test_a_cascade_of_that_threshold_is_as_accurate_as_asked(confidence: fusion.Confidence) -> None:
    """Also in float32, where one more softmax moves a confidence by a bit, and one example by a network."""
    first, second, labels = normal(500, 4).float(), 3 * normal(500, 4, seed=1).float(), torch.arange(500) % 4
    second[range(500), labels] += 5
    both = fusion.mean_probability(torch.stack([first, second]))
    for target in (0.3, 0.4, 0.5):
        threshold = fusion.threshold_for_accuracy(first, both, labels, target, confidence=confidence)
        answers = fusion.cascaded(torch.stack([first, second]), [threshold], confidence=confidence)
        assert (answers.log_q.argmax(1) == labels).double().mean() >= target
        said = fusion.mean_probability(first[None]).log_softmax(1)
        assert threshold in confidence(said).tolist(), "not to the last bit what the cascade hears"


def test_a_grid_of_thresholds_for_several() -> None:
    costs = [1.0, 5.0, 20.0]
    found = fusion.thresholds_for_accuracy(LOGITS, LABELS, costs, 0.6, levels=6)
    log_q, asked = fusion.cascaded(LOGITS, found.thresholds)
    assert found.accuracy == float((log_q.argmax(1) == LABELS).double().mean()) >= 0.6
    assert found.flops == fusion.expected_flops(asked, costs) < sum(costs)
    for t in torch.linspace(0.25, 1, 5).tolist():  # none of these is cheaper and as good on the grid's own levels
        free = fusion.thresholds_for_accuracy(LOGITS, LABELS, costs, 0.0, levels=6)
        assert free.flops <= fusion.expected_flops(fusion.cascaded(LOGITS, [t, t]).asked, costs) + 1e-9
    best = fusion.thresholds_for_accuracy(LOGITS, LABELS, costs, 1.0, levels=6)
    assert best.accuracy >= found.accuracy


def test_the_cost_of_an_example() -> None:
    assert fusion.expected_flops(torch.tensor([1, 1, 2, 3]), [1, 10, 100]) == pytest.approx((1 + 1 + 11 + 111) / 4)


@pytest.mark.parametrize(("name", "at"), [("mlp", ("hidden.1",)), ("convnet", ("features.3", "features.7"))])
def test_exits_are_a_cascade(name: str, at: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    plain = network(name)
    model = WithExits(plain, at, batch(2)).eval()
    small = data()
    logits = fusion.exit_logits(model, small.test)
    close(logits[-1], logits_of(plain, small.test), 1e-12)
    assert logits.shape == (len(at) + 1, 20, 4)
    costs = fusion.exit_flops(model, batch(1))
    heads = sum(2 * sum(p.weight.numel() for p in pair) for pair in zip(model.adapters, model.heads, strict=True))
    assert sum(costs) == flops(plain, batch(1)) + heads
    if name == "mlp":
        assert costs[0] == 2 * (64 * 6 + 6 * 6 + 6 * 4)
    assert not plain.get_submodule(at[0])._forward_hooks


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.cascaded(LOGITS, [0.5]), "thresholds="),
        (lambda: fusion.cascaded(LOGITS, [0.5, math.nan]), "thresholds="),
        (lambda: fusion.cascaded(LOGITS[0], [0.5]), "logits="),
        (lambda: fusion.Cascade([], []), "networks="),
        (lambda: fusion.Cascade([network()], [0.5]), "thresholds="),
        (lambda: fusion.threshold_for_accuracy(LOGITS[0], LOGITS[1], LABELS, 1.5), "accuracy="),
        (lambda: fusion.threshold_for_accuracy(LOGITS[0], LOGITS[1, :3], LABELS, 0.5), "logits="),
        (lambda: fusion.thresholds_for_accuracy(LOGITS, LABELS, [1, 2, 3], 0.5, levels=0), "levels="),
        (lambda: fusion.expected_flops(torch.tensor([3]), [1.0, 2.0]), "asked="),
        (lambda: fusion.agreement(LOGITS[0]), "logits="),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
