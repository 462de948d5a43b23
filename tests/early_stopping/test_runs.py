"""Rules for whole runs against Optuna's pruners on the same curves, epoch by epoch."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
import pytest

from course_lib import early_stopping as es
from tests.early_stopping.small import random_curves

MODES = ("max", "min")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        yield


def curves_of(mode: str, seed: int, count: int = 14, length: int = 9, ties: bool = False) -> list[list[float]]:
    curves = random_curves(count, length, seed, ties=ties)
    return curves if mode == "max" else [[1 - v for v in curve] for curve in curves]


def by_optuna(
    curves: Sequence[Sequence[float]], pruner: Any, mode: str, first: int = 0
) -> tuple[list[int], list[bool]]:
    """How many epochs each run lasts with a pruner, and whether it was completed; epochs are counted from ``first``."""
    study = optuna.create_study(direction="maximize" if mode == "max" else "minimize", pruner=pruner, study_name="s")
    epochs, completed = [], []
    for curve in curves:
        trial = study.ask()
        for step, value in enumerate(curve):
            trial.report(value, step + first)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, curve[-1] if math.isfinite(curve[-1]) else 0.0)
        epochs.append(step + 1)
        completed.append(study.trials[-1].state == optuna.trial.TrialState.COMPLETE)
    return epochs, completed


def same(curves: Sequence[Sequence[float]], rule: es.Rule, pruner: Any, mode: str, first: int = 0) -> int:
    """How many runs both ended at the same epoch; anything else is a failure."""
    found = es.prune(curves, rule)
    epochs, completed = by_optuna(curves, pruner, mode, first)
    assert (list(found.epochs), list(found.completed)) == (epochs, completed)
    return len(curves) - sum(completed)


# --- Against Optuna ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_median_of_here_is_optunas_median_pruner(mode: str) -> None:
    ended = 0
    for seed, (startup, warmup, every) in enumerate(itertools.product((0, 1, 5), (0, 3), (1, 2))):
        pruner = optuna.pruners.MedianPruner(startup, warmup, every)
        rule = partial(es.percentile_rule, mode=mode, startup=startup, warmup=warmup, every=every)
        ended += same(curves_of(mode, seed, ties=seed % 2 == 1), rule, pruner, mode)
    assert ended > 40


@pytest.mark.parametrize("mode", MODES)
def test_percentiles_are_optunas(mode: str) -> None:
    ended = 0
    for seed, (percentile, min_runs) in enumerate(itertools.product((0.0, 25.0, 75.0, 100.0), (1, 4))):
        pruner = optuna.pruners.PercentilePruner(percentile, 2, n_min_trials=min_runs)
        rule = partial(es.percentile_rule, percentile=percentile, mode=mode, startup=2, min_runs=min_runs)
        ended += same(curves_of(mode, 50 + seed, ties=seed % 2 == 1), rule, pruner, mode)
    assert ended > 25


@pytest.mark.parametrize("mode", MODES)
def test_values_that_are_none_and_curves_of_other_lengths(mode: str) -> None:
    curves = curves_of(mode, 3)
    curves[1][2], curves[6][0], curves[9] = math.nan, math.nan, [math.nan] * 9
    curves[2], curves[3] = curves[2][:4], curves[3][:6]
    pruner = optuna.pruners.MedianPruner(2)
    assert same(curves, partial(es.percentile_rule, mode=mode, startup=2), pruner, mode) > 3
    halving = optuna.pruners.SuccessiveHalvingPruner(2, 2)
    rule = partial(es.stopping_rule, min_resource=2, reduction_factor=2, mode=mode)
    assert same(curves, rule, halving, mode, first=1) > 3


@pytest.mark.parametrize("mode", MODES)
def test_the_stopping_rule_is_optunas_successive_halving(mode: str) -> None:
    ended = 0
    for seed, (least, factor, early) in enumerate(itertools.product((1, 2), (2, 3, 4), (0, 1))):
        pruner = optuna.pruners.SuccessiveHalvingPruner(least, factor, early)
        rule = partial(es.stopping_rule, min_resource=least * factor**early, reduction_factor=factor, mode=mode)
        ended += same(curves_of(mode, 20 + seed, 20, 10, seed % 2 == 1), rule, pruner, mode, first=1)
    assert ended > 100


@pytest.mark.parametrize("mode", MODES)
def test_hyperband_in_optuna_is_the_stopping_rule_by_brackets(mode: str) -> None:
    """Optuna puts a run into a bracket by its number; there it is judged against its own bracket only."""
    curves = curves_of(mode, 5, 40, 9)
    pruner = optuna.pruners.HyperbandPruner(1, 9, 3)
    epochs, completed = by_optuna(curves, pruner, mode, first=1)
    study = optuna.create_study(direction="maximize", pruner=pruner, study_name="s")
    trials = [study.ask() for _ in curves]
    brackets = [pruner._get_bracket_id(study, trial) for trial in trials]  # type: ignore[arg-type]
    assert set(brackets) == {0, 1, 2}
    assert pruner._trial_allocation_budgets == [  # how often each is chosen: as in the paper's Algorithm 1
        bracket.rungs[0].configs for bracket in es.hyperband_brackets(9, 3, size=es.formula_size)
    ]
    for number in range(3):
        own = [k for k, bracket in enumerate(brackets) if bracket == number]
        rule = partial(es.stopping_rule, min_resource=3**number, reduction_factor=3, mode=mode)
        found = es.prune([curves[k] for k in own], rule)
        assert list(found.epochs) == [epochs[k] for k in own]
        assert list(found.completed) == [completed[k] for k in own]


@pytest.mark.parametrize("mode", MODES)
def test_patience_and_thresholds_are_optunas(mode: str) -> None:
    ended = 0
    for seed, (patience, delta) in enumerate(itertools.product((0, 2, 4), (0.0, 0.02))):
        curves = curves_of(mode, 30 + seed, ties=seed % 2 == 1)
        pruner: Any = optuna.pruners.PatientPruner(None, patience, delta)
        ended += same(curves, partial(es.patient_rule, patience=patience, min_delta=delta, mode=mode), pruner, mode)
        curves[3][5] = math.nan
        pruner = optuna.pruners.ThresholdPruner(0.15, 0.85, n_warmup_steps=2)
        ended += same(curves, partial(es.threshold_rule, lower=0.15, upper=0.85, warmup=2), pruner, mode)
    assert ended > 40


@pytest.mark.parametrize("mode", MODES)
def test_runs_without_a_single_number(mode: str) -> None:
    """They end at once, also where there is nothing to compare them with; as others they count as having come."""
    nothing, curves = [math.nan] * 5, curves_of(mode, 8, 9, 5)
    pruner: Any = optuna.pruners.PercentilePruner(50.0, 0, n_min_trials=9)
    rule: es.Rule = partial(es.percentile_rule, mode=mode, startup=0, min_runs=9)
    assert same([*curves[:3], nothing, *curves[3:]], rule, pruner, mode) == 1
    holes = [[math.nan, *curve[1:]] for curve in curves[:3]]
    pruner = optuna.pruners.PercentilePruner(50.0, 0, n_min_trials=4)
    rule = partial(es.percentile_rule, mode=mode, startup=0, min_runs=4)
    early = [[0.0 if mode == "max" else 1.0] * 5] * 3
    assert same([*holes, curves[3], *early, *curves[4:]], rule, pruner, mode) >= 3
    assert es.stopping_rule([math.nan], [])
    assert same([nothing, *curves], partial(es.stopping_rule, mode=mode), optuna.pruners.SuccessiveHalvingPruner(1, 3),
                mode, first=1) > 2  # fmt: skip


# --- The rule of Vizier -----------------------------------------------------------------------------------------------


def vizier(curve: Sequence[float], completed: Sequence[Sequence[float]], mode: str) -> bool:
    """In the words of the paper."""
    s = len(curve)
    running_averages = [sum(other[:s]) / len(other[:s]) for other in completed]
    if mode == "max":
        return max(curve) < float(np.median(running_averages))
    return min(curve) > float(np.median(running_averages))


@pytest.mark.parametrize("mode", MODES)
def test_the_median_rule_is_that_of_the_paper(mode: str) -> None:
    ended = 0
    for seed in range(12):
        curves = curves_of(mode, seed, 14, 9, seed % 2 == 1)
        completed, rest = curves[:6], curves[6:]
        completed[0] = completed[0][:3]
        for curve in rest:
            for s in range(1, 10):
                found = es.median_rule(curve[:s], completed, mode=mode)  # type: ignore[arg-type]
                assert found == vizier(curve[:s], completed, mode)
                ended += found
                assert not es.median_rule(curve[:s], completed, mode=mode, startup=7)  # type: ignore[arg-type]
                assert es.median_rule(curve[:s], completed, mode=mode, warmup=4) == (found and s > 4)  # type: ignore[arg-type]
    assert ended > 30


def test_vizier_stops_less_than_optuna() -> None:
    """On rising curves the average so far is below the value here."""
    curves = [sorted(curve) for curve in curves_of("max", 1, 40, 12)]
    vizier_, optuna_ = (es.prune(curves, rule) for rule in (es.median_rule, es.percentile_rule))
    assert sum(vizier_.epochs) > 1.1 * sum(optuna_.epochs)
    assert vizier_.share == sum(vizier_.epochs) / 480


def test_by_hand() -> None:
    others = [[0.1, 0.3, 0.8]] * 5
    assert es.percentile_rule([0.1, 0.2], others)
    assert not es.percentile_rule([0.1, 0.3], others)
    assert es.median_rule([0.1, 0.19], others)
    assert not es.median_rule([0.1, 0.2], others)  # of 0.1 and 0.3
    assert not es.stopping_rule([0.1], [])  # the first to come
    assert es.stopping_rule([0.1], [[0.2], [0.3]])
    assert not es.stopping_rule([0.1, 0.1], [[0.2, 0.2]])  # no rung
    assert not es.threshold_rule([0.5], lower=0.5)  # the bounds are within
    assert not es.threshold_rule([0.5], upper=0.5)
    assert es.threshold_rule([0.4], lower=0.5)
    assert not es.patient_rule([0.5, 0.5, 0.5, 0.5], patience=1)  # a run that stays goes on
    assert es.patient_rule([0.5, 0.4, 0.4], patience=1)


def test_what_is_saved() -> None:
    curves = [[0.1, 0.9], [0.2, 0.8], [0.3, 0.4]]
    found = es.prune(curves, lambda curve, completed, stopped: len(curve) == 1 and len(completed) == 1)
    assert (found.epochs, found.completed) == ((2, 1, 1), (True, False, False))
    assert (found.share, found.best(curves)) == (4 / 6, 0)
    assert found.best(curves, "min") == 0  # 0.1
    seen: list[tuple[int, int]] = []
    es.prune(curves, lambda curve, completed, stopped: seen.append((len(completed), len(stopped))) or len(seen) > 2)  # type: ignore[func-returns-value]
    assert seen == [(0, 0), (0, 0), (1, 0), (1, 1)]


CURVE = [0.1, 0.2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: es.median_rule(CURVE, [], mode="best"), "mode='best': must be 'min' or 'max'"),  # type: ignore[arg-type]
        (lambda: es.median_rule([], []), "curve=0: must be of at least one epoch"),
        (lambda: es.median_rule(CURVE, [], startup=-1), "startup=-1: must be a whole number of at least 0"),
        (lambda: es.percentile_rule(CURVE, [], percentile=101.0), "percentile=101.0: must be a number from 0 to 100"),
        (lambda: es.percentile_rule(CURVE, [], every=0), "every=0: must be a whole number of at least 1"),
        (lambda: es.stopping_rule(CURVE, [], reduction_factor=1), "reduction_factor=1: must be a whole number of at"),
        (lambda: es.patient_rule(CURVE, patience=-1), "patience=-1: must be"),
        (lambda: es.patient_rule(CURVE, patience=1, min_delta=-1.0), "min_delta=-1.0: must be"),
        (lambda: es.threshold_rule(CURVE), "lower=-inf, upper=inf: must be a lower bound"),
        (lambda: es.threshold_rule(CURVE, lower=1.0, upper=0.0), "lower=1.0, upper=0.0: must be"),
        (lambda: es.prune([], es.median_rule), "curves=[]: must be at least one"),
        (lambda: es.prune([[]], es.median_rule), "curves=[0]: must be at least one, each of at least one epoch"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
