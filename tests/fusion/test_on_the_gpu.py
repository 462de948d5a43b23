"""What no other test of the chapter takes to a GPU: the numbers of the CPU, from answers and networks over there.

Data sets stay here, and networks that ``fit`` trains come back; generators are on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import fusion
from course_lib.distillation import WithExits
from course_lib.lab.data import Dataset
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, fit, fresh, logits_of
from course_lib.regularization import with_dropout
from tests.fusion.small import NETWORKS, answers, batch, data, generator, network, normal
from tests.merging.small import Case, Move, on_the_gpu_as_here

Z, LABELS = answers()
RUNS = normal(3, 2, 5, 4)
CHANCES, NAMED, RIGHT = Z.softmax(2), Z.argmax(2), Z.argmax(2) == LABELS
SHORT = Recipe(epochs=1, batch_size=20, precision="float64")
SMALL, MLP = data(), NETWORKS["mlp"]
FEW = SMALL.val.subset(torch.arange(8))
ROWS = normal(5, 4)


HALVES: Dataset = SMALL.with_inputs(lambda x: (x[:, :, :4], x[:, :, 4:]))


def weighed(to: Move, kind: Any, *given: Any) -> Any:
    """With weights that lie there, lie here, or are a list."""
    weights = torch.arange(1.0, 6)
    return [kind(*given, weights=each) for each in (to(weights), weights, weights.tolist(), None)]


def branch() -> nn.Module:
    return mlp((1, 4, 8), 4, width=5)


def parts(to: Move, make: Callable[[], nn.Module]) -> Tensor:
    return logits_of(to(fresh(make, SHORT, seed=0)).eval(), HALVES.val)


def fused(to: Move, combine: Callable[[], nn.Module]) -> Tensor:
    return parts(to, lambda: fusion.IntermediateFusion([branch(), branch()], combine(), 4))


def missing(to: Move) -> Any:
    def late() -> fusion.LateFusion:
        return fusion.LateFusion([branch(), branch()])

    return parts(to, lambda: fusion.Missing(late(), [1])), parts(to, lambda: late().only([0]))


def left_out(to: Move) -> Any:
    return fusion.modality_dropout((to(ROWS), to(2 * ROWS)), generator())


def cascade(to: Move) -> Any:
    made = fusion.Cascade([to(network(seed=0)), to(network(seed=1))], [0.4])
    found = made.answer(to(batch()))
    return found, fusion.expected_flops(found.asked, [1, 2])


def exits(to: Move) -> Any:
    torch.manual_seed(0)
    model = to(WithExits(network(), ["hidden.0"], batch(2)).eval())
    return fusion.exit_logits(model, SMALL.val), fusion.exit_flops(model, to(batch(1)))


def shared(to: Move) -> Any:
    made = fusion.BatchEnsemble(to(network()).train(), 2, generator=generator())
    fit(made, SMALL, SHORT, seed=0)
    return logits_of(made, SMALL.val), logits_of(made.plain(1), SMALL.val)


def side_by_side(to: Move) -> Tensor:
    made = fresh(lambda: fusion.MIMO(partial(mlp, width=5), (1, 8, 8), 4, members=2), SHORT, seed=0)
    recipe = replace(SHORT, objective=partial(fusion.mimo_loss, repetition=0.5, generator=generator()), epochs=1)
    fit(to(made), SMALL, recipe, seed=0)
    return logits_of(made, SMALL.val)


def bagged(to: Move) -> Any:
    made = fusion.bagging(MLP, SMALL, SHORT, members=3, seed=0, generator=generator())
    return logits_of(to(made.members), SMALL.val), fusion.out_of_bag_error(made, SMALL)


def subspaces(to: Move) -> Tensor:
    masks = [
        mask((1, 8, 8), 0.5, generator()) for mask in (fusion.pixel_mask, lambda s, p, g: fusion.patch_mask(s, 4, p, g))
    ]
    return logits_of(to(fusion.random_subspaces(MLP, SMALL, SHORT, masks, seed=0)), SMALL.val)


def boosted(to: Move) -> Tensor:
    """The examples' weights lie with their labels, here or there, and the network is trained there."""
    found = [
        fusion.boosted_networks(MLP, data, replace(SHORT, epochs=3), rounds=1, seed=0) for data in (SMALL, to(SMALL))
    ]
    return torch.stack([logits_of(to(each), SMALL.val) for each in found])


def stacked(to: Move) -> Tensor:
    made = fusion.stacking([MLP], SMALL, SHORT, folds=2, seed=0, generator=generator())
    return logits_of(to(made), SMALL.val)


CASES: dict[str, Case] = {
    "negative_log_likelihood": lambda to: fusion.negative_log_likelihood(to(Z[0]), to(LABELS)),
    "tempered_members": lambda to: fusion.tempered_members(to(Z[:2]), to(LABELS)),
    "fit_vector": lambda to: fusion.fit_vector(to(Z[0]), to(LABELS), strength=0.1),
    "brier_parts": lambda to: fusion.brier_parts(to(Z[0]), to(LABELS)),
    "risk_coverage": lambda to: fusion.risk_coverage(to(CHANCES[0].amax(1)), to(RIGHT[0])),
    "error_auroc": lambda to: fusion.error_auroc(to(CHANCES[0].amax(1)), to(RIGHT[0])),
    "confidence": lambda to: [f(to(Z[0])) for f in (fusion.max_probability, fusion.margin, fusion.negative_entropy)],
    "agreement": lambda to: fusion.agreement(to(Z)),
    "cascaded": lambda to: fusion.cascaded(to(Z[:3]), [0.5, 0.6], combine=fusion.last),
    "threshold_for_accuracy": lambda to: fusion.threshold_for_accuracy(to(Z[0]), to(Z[-1]), to(LABELS), 0.5),
    "thresholds_for_accuracy": lambda to: fusion.thresholds_for_accuracy(
        to(Z[:3]), to(LABELS), [1, 2, 3], 0.5, levels=2
    ),
    "Cascade": cascade,
    "squared_ambiguity": lambda to: weighed(to, fusion.squared_ambiguity, to(Z), to(Z[0])),
    "geometric_ambiguity": lambda to: weighed(to, fusion.geometric_ambiguity, to(Z), to(LABELS)),
    "arithmetic_ambiguity": lambda to: weighed(to, fusion.arithmetic_ambiguity, to(Z), to(LABELS)),
    "bias_variance_diversity": lambda to: fusion.bias_variance_diversity(to(RUNS), to(RUNS[0, 0])),
    "pairs": lambda to: [
        f(to(RIGHT)) for f in (fusion.disagreement, fusion.double_fault, fusion.q_statistic, fusion.error_correlation)
    ],
    "pair_mean": lambda to: fusion.pair_mean(fusion.disagreement(to(NAMED))),
    "calibration_gap": lambda to: fusion.calibration_gap(*map(to, (*fusion.TWO_HALVES[:2], fusion.TWO_HALVES[2][0]))),
    "out_of_bag": lambda to: [fusion.out_of_bag(to(Z), rows) for rows in (DRAWN, to(DRAWN))],
    "samme": lambda to: fusion.samme(to(torch.ones(60)), to(RIGHT[-1]), 4),
    "boosted_votes": lambda to: fusion.boosted_votes(to(NAMED), [1, 2, 3, 4, 5], 4),
    "votes": lambda to: weighed(to, fusion.votes, to(NAMED), 4),
    "plurality": lambda to: weighed(to, fusion.plurality, to(NAMED), 4),
    "borda": lambda to: weighed(to, fusion.borda, to(Z)),
    "winner": lambda to: [fusion.winner(to(ROWS.round()), tie) for tie in (None, ROWS, to(ROWS))],
    "tied": lambda to: fusion.tied(to(ROWS.round())),
    "means": lambda to: [
        weighed(to, f, to(Z)) for f in (fusion.mean_probability, fusion.geometric_mean, fusion.mean_logits)
    ],
    "accuracy_weights": lambda to: fusion.accuracy_weights(to(Z), to(LABELS)),
    "fit_weights": lambda to: fusion.fit_weights(to(Z), to(LABELS), steps=5),
    "scores": lambda to: [f(to(Z[0]), to(LABELS)) for f in (fusion.log_likelihood, fusion.accuracy)],
    "greedy_selection": lambda to: fusion.greedy_selection(to(Z), to(LABELS), rounds=3),
    "modality_dropout": left_out,
    "side_by_side": lambda to: fusion.side_by_side(to(Z)),
}  # fmt: skip
DRAWN = fusion.bootstrap_rows(60, 5, generator())
WITH_A_DATA_SET: dict[str, Case] = {
    "members_logits": lambda to: fusion.members_logits([to(network()), network(seed=1)], SMALL.val),
    "vector_scaled": lambda to: logits_of(fusion.vector_scaled(to(network()), FEW), SMALL.test),
    "exits": exits,
    "snapshots": lambda to: logits_of(to(fusion.snapshots(MLP, SMALL, SHORT, cycles=2, seed=0)), SMALL.val),
    "fast_geometric": lambda to: logits_of(
        to(fusion.fast_geometric(to(network()), SMALL, SHORT, cycle=2, seed=0)), SMALL.val
    ),
    "trained": lambda to: logits_of(to(fusion.trained([(MLP, SMALL, SHORT, 0)])), SMALL.val),
    "EarlyFusion": lambda to: parts(to, partial(fusion.EarlyFusion, partial(mlp, width=5), [(1, 4, 8)] * 2, 4)),
    "Concatenated": lambda to: fused(to, partial(fusion.Concatenated, [5, 5])),
    "Gated": lambda to: fused(to, partial(fusion.Gated, [5, 5], 3)),
    "Attended": lambda to: fused(to, partial(fusion.Attended, [5, 5], 3)),
    "Bilinear": lambda to: fused(to, partial(fusion.Bilinear, [5, 5], 3, 2)),
    "Missing": missing,
    "BatchEnsemble": shared,
    "MIMO": side_by_side,
    "bagging": bagged,
    "random_subspaces": subspaces,
    "boosted_networks": boosted,
    "stacking": stacked,
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_on_the_gpu_as_here(name: str, dtype: torch.dtype) -> None:
    on_the_gpu_as_here(CASES[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WITH_A_DATA_SET)
def test_answers_lie_where_the_labels_do(name: str) -> None:
    on_the_gpu_as_here(WITH_A_DATA_SET[name], lies="cpu")


@pytest.mark.gpu
def test_dropout_is_drawn_there() -> None:
    """Without a generator of its own by the GPU's; other numbers than here."""
    model = fusion.MonteCarloDropout(with_dropout(network(), 0.5), samples=3).cuda().eval()
    each = model.each(batch().cuda())
    assert each.is_cuda
    assert not torch.equal(each[0], each[1])
    assert model(batch().cuda()).shape == (6, 4)


@pytest.mark.gpu
def test_boosting_takes_what_is_named_elsewhere() -> None:
    labels = (torch.arange(12) % 3).cuda()

    def learn(weights: Tensor) -> tuple[str, Tensor]:
        named = torch.arange(12) % 3
        named[int(weights.argmax())] = (named[int(weights.argmax())] + 1) % 3
        return "learner", named  # on the CPU

    found = fusion.adaboost(learn, labels, 3, rounds=1)
    assert found.weights.is_cuda
    assert found.alphas == [pytest.approx(math.log(11) + math.log(2))]
