"""What no other test of the chapter takes to a GPU: the numbers of the CPU, from features and networks over there.

Data sets stay here, and networks that ``fit`` trains come back; generators are on the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import transfer
from course_lib.lab.training import Objective, Recipe, fit, logits_of
from tests.merging.small import Case, Move, on_the_gpu_as_here
from tests.transfer.small import batch, data, generator, network, normal, shaken, split

SHORT = Recipe(epochs=1, batch_size=40, precision="float64")
SMALL = data()
OTHER = replace(SMALL, train=split(40, seed=5), val=split(20, seed=6), test=split(20, seed=7))
A, B = normal(20, 5, seed=1), 1.5 * normal(20, 5, seed=2) + 0.3
LABELS = torch.arange(20) % 4
TABLE = normal(3, 3).sigmoid()


def answer(model: nn.Module) -> Tensor:
    """What a network over there says of images that stay here."""
    return logits_of(model, SMALL.val)


def trained(to: Move, model: nn.Module, recipe: Recipe = SHORT) -> Tensor:
    fit(to(model), SMALL, recipe, seed=0)
    return answer(model)


def with_objective(to: Move, model: nn.Module, objective: Objective) -> Tensor:
    return trained(to, model, replace(SHORT, objective=objective))


def adversary(to: Move) -> Any:
    model = to(transfer.WithDomains(network(), 4, generator=generator()))
    objective = partial(transfer.dann, target=transfer.Pool(OTHER.train))
    fit(model, SMALL, transfer.with_progress(replace(SHORT, objective=objective), model, SMALL), seed=0)
    return answer(model), model.progress


def target_follows(to: Move) -> Any:
    model = to(transfer.WithTarget(network(), 4, 6, generator=generator()))
    objective = partial(transfer.byol, view=lambda x, generator: x.flip(-1))
    fit(model, SMALL, transfer.following_target(replace(SHORT, objective=objective), model), seed=0)
    return logits_of(model.target_network, SMALL.val)


def tuned(to: Move) -> Any:
    start = to(network())
    recipe = transfer.discriminative_rates(replace(SHORT, epochs=2), start)
    recipe = transfer.gradual_unfreezing(recipe, start, SMALL)
    return [
        answer(transfer.fine_tune(start, SMALL, recipe, seed=0).network),
        answer(transfer.linear_probe_then_fine_tune(start, SMALL, SHORT, seed=0, C=0.01).network),
        answer(start),
    ]


def kept_near(to: Move) -> Tensor:
    """The starting point lies there or here, and the network is trained there."""
    found = []
    for first in (network(), to(network())):
        objective = partial(transfer.l2_sp, start=transfer.starting_point(first), alpha=1.0)
        found.append(with_objective(to, shaken(network()), objective))
    return torch.stack(found)


def not_forgotten(to: Move) -> Tensor:
    task = transfer.consolidate(to(network()), OTHER.train, generator=generator())
    return with_objective(to, shaken(network()), partial(transfer.ewc, tasks=[task], strength=10.0))


def rehearsed(to: Move) -> Tensor:
    """Old examples lie there or here."""
    pools = [transfer.memory(each, 8, generator=generator()) for each in (OTHER.train, to(OTHER.train))]
    return torch.stack([with_objective(to, network(), partial(transfer.rehearsal, old=old)) for old in pools])


def probed(to: Move) -> Any:
    model = to(network())
    found = transfer.probe(transfer.features(model, SMALL.train), SMALL.train.labels, C=0.01)
    curve = transfer.probe_curve(model, SMALL.train, SMALL.test, layers=["hidden.1"], C=0.01)
    return answer(transfer.with_probe(model, found)), curve, transfer.layer_names(model), transfer.trainable(model)


def adapted_layers(to: Move) -> Any:
    plain = to(network("convnet"))
    model = shaken(transfer.with_residual_adapters(plain))
    return answer(model), answer(transfer.merged(model)), answer(transfer.without_adapters(model))


def prompted(to: Move) -> Tensor:
    return answer(transfer.with_prompts(to(network("vit")), 2, generator=generator()))


def moved_back(to: Move) -> Any:
    made = shaken(transfer.in_subspace(to(network()), 3, seed=0))
    return answer(made), answer(made.plain())


def prepared(to: Move) -> Any:
    known = transfer.Pretrained(network(), (0.4,) * 3, (0.2,) * 3, 6, ("a",), "none")
    return known.prepared(to(SMALL)).val.inputs


CASES: dict[str, Case] = {
    "coral_align": lambda to: transfer.coral_align(to(A), to(B)),
    "mmd_unbiased": lambda to: transfer.mmd_unbiased(to(A), to(B), [0.5, 2]),
    "log_evidence": lambda to: transfer.log_evidence(to(A), to(B)[:, 0], 0.5, 2.0),
    "logme": lambda to: [transfer.logme(to(A), labels, steps=3) for labels in (LABELS, to(LABELS))],
    "entropy": lambda to: transfer.entropy(to(network()), to(batch()), to(LABELS)),
    "proxy_a_distance": lambda to: transfer.proxy_a_distance(to(A), to(B), generator=generator(), C=0.01),
    "forgetting": lambda to: transfer.forgetting(to(TABLE[0]), to(TABLE[1])),
    "measures": lambda to: [
        transfer.average_accuracy(to(TABLE)),
        transfer.backward_transfer(to(TABLE)),
        transfer.forward_transfer(to(TABLE), to(TABLE[0])),
    ],
    "prepared": prepared,
}
WITH_A_DATA_SET: dict[str, Case] = {
    "with_progress": adversary,
    "following_target": target_follows,
    "fine_tune": tuned,
    "l2_sp": kept_near,
    "ewc": not_forgotten,
    "rehearsal": rehearsed,
    "bitfit": lambda to: trained(to, transfer.bitfit(to(network()))),
    "probe": probed,
    "with_residual_adapters": adapted_layers,
    "with_prompts": prompted,
    "in_subspace": moved_back,
    "adaptation_bound": lambda to: transfer.adaptation_bound(
        to(network()), SMALL, to(OTHER), generator=generator(), C=0.01
    ),
    "cka_matrix": lambda to: transfer.cka_matrix(to(network()), network(seed=1), SMALL.val),
    "accuracies": lambda to: transfer.accuracies(to(network()), [SMALL.val, to(OTHER.val)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_on_the_gpu_as_here(name: str, dtype: torch.dtype) -> None:
    on_the_gpu_as_here(CASES[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WITH_A_DATA_SET)
def test_answers_lie_where_the_labels_do(name: str) -> None:
    on_the_gpu_as_here(WITH_A_DATA_SET[name], lies="cpu")
