"""The chapter on a GPU: its tensors there, and its criteria and searches around runs that ``fit`` takes there.

Data sets stay here; generators are on the CPU. Curves, rungs and forecasts are numbers, wherever they come from.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from course_lib import early_stopping as es
from course_lib.lab.training import Recipe, fit, logits_of
from tests.merging.small import Case, Move, batch, data, generator, network, normal, on_the_gpu_as_here

X, TRUTH = normal(12, 4, seed=1), normal(4, seed=2)
Y = X @ TRUTH + 0.1 * normal(12, seed=3)
RIGHT = normal(3, 20) > -0.5
SMALL = data()
SHORT = Recipe(epochs=2, batch_size=20, precision="float64")


def filters(to: Move) -> Any:
    values = es.spectrum(to(X))
    kept = (
        es.gd_filter(values, 0.1, 3),
        es.momentum_filter(values, 0.1, 3, 0.5),
        es.flow_filter(values, 0.3),
        es.ridge_filter(values, 0.1),
        es.oracle_filter(to(X), to(TRUTH), 0.5),
    )
    solved = [es.filtered_solution(to(X), to(Y), each, to(TRUTH)) for each in kept]
    return values, kept, solved, es.equivalent_ridge_by_direction(values, 0.1, 3), es.gd_solution(to(X), to(Y), 0.1, 3)


def errors(to: Move) -> Any:
    kept = es.gd_filter(es.spectrum(to(X)), 0.1, 3)
    return [
        es.bias_variance(to(X), to(TRUTH), 0.5, kept),
        es.weight_error(to(X), to(TRUTH), 0.5, kept),
        es.gd_bias_variance(to(X), to(TRUTH), 0.5, 0.1, 3),
        es.best_steps(to(X), to(TRUTH), 0.5, 0.1, 4),
        es.best_steps_by_direction(to(X), to(TRUTH), 0.5, 0.01),
    ]


def noise(to: Move) -> Any:
    right = to(RIGHT)
    return [
        es.difference_standard_error(right[0], right[1]),
        es.accuracy_covariance(right),
        es.bootstrap_optimism(right, generator=generator(), draws=5),
    ]


def moments(to: Move) -> Any:
    """Of a network over there on a data set here, or on tensors beside it."""
    model, x, y = to(network()), to(batch()), to(torch.arange(6) % 4)
    found = es.gradient_moments(model, (x, y))
    return [
        (found.mean, found.variance, es.signal_to_noise(found.mean, found.variance, 6)),
        *(measure(model, (x, y)) for measure in (es.evidence, es.evidence_by_layer, es.silent_share)),
    ]


def evidence_of_a_split(to: Move) -> Any:
    model = to(network())
    return [measure(model, SMALL.val) for measure in (es.evidence, es.mean_layer_evidence, es.silent_share)]


def stopped(to: Move) -> Any:
    """Columns are measured where the run is, criteria asked of their numbers."""
    recipe = replace(
        SHORT,
        epochs=4,
        stop=es.any_of(es.Evidence(), es.Patience(3), es.GeneralizationLoss(1e9)),
        watch={"evidence": es.EvidenceColumn(examples=8)},
    )
    model = to(network())
    history = fit(model, SMALL, recipe, seed=0)
    return history["evidence"], history.epochs, logits_of(model, SMALL.val)


def searched(to: Move) -> Any:
    """Runs go on from their checkpoints, which are written there."""
    configs = {"slow": 1e-3, "good": 0.1}
    recipe = replace(SHORT, batch_size=40)

    def build(lr: float) -> es.Trial:
        return es.Trial(network, replace(recipe, optimizer=partial(torch.optim.SGD, lr=lr)))

    with TemporaryDirectory() as folder:
        found = es.search(build, configs, es.SuccessiveHalving(1, 2, 2), data=SMALL, folder=folder, workers=0)
    return found.jobs, found.best


CASES: dict[str, Case] = {"filters": filters, "errors": errors, "noise": noise, "gradient_moments": moments}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_on_the_gpu_as_here(name: str, dtype: torch.dtype) -> None:
    on_the_gpu_as_here(CASES[name], dtype)


RUNS: dict[str, Case] = {"evidence": evidence_of_a_split, "stop": stopped, "search": searched}


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_runs_there_are_those_here(name: str) -> None:
    on_the_gpu_as_here(RUNS[name], lies="cpu")
