"""Searches on real runs: the rule's decisions, promoted runs to the bit, and what is left after a kill."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from course_lib import early_stopping as es
from course_lib.lab import files
from course_lib.lab.experiments import one_thread
from course_lib.lab.training import Diverged, History, Recipe, fit, fresh
from tests.early_stopping.searched import CONFIGS, RULE, build, searched
from tests.early_stopping.small import digits, untimed

ROOT = Path(__file__).resolve().parents[2]
search_file = sys.modules["course_lib.early_stopping.search"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> es.Found:
    """The search, undisturbed."""
    return searched(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[nn.Module, History]]:
    """Each configuration trained to the end in one go; as far as it comes."""
    found = {}
    for name, lr in CONFIGS.items():
        trial = build(lr)
        recipe = replace(trial.recipe, epochs=4)
        model = fresh(trial.model, recipe, seed=0)
        with one_thread():
            try:
                found[name] = model, fit(model, digits(), recipe, seed=0)
            except Diverged as error:
                found[name] = model, error.history
    return found


def same_tables(a: es.Found, b: es.Found) -> None:
    pd.testing.assert_frame_equal(a.table(), b.table(), check_exact=True)
    assert {name: untimed(h) for name, h in a.histories.items()} == {
        name: untimed(h) for name, h in b.histories.items()
    }


def test_it_decides_as_the_rule_does_on_the_whole_curves(
    reference: es.Found, whole: dict[str, tuple[nn.Module, History]]
) -> None:
    curves = {name: [*history["val_accuracy"], *[math.nan] * (4 - len(history))] if len(history) else [math.nan] * 4
              for name, (_, history) in whole.items()}  # fmt: skip
    replayed = es.replay_runs(curves, RULE)
    assert [done.job for done in reference.jobs] == [done.job for done in replayed.jobs]
    for done, other in zip(reference.jobs, replayed.jobs, strict=True):
        assert done.value == other.value or (math.isnan(done.value) and math.isnan(other.value))
        assert done.spent == other.spent
    assert reference.epochs == 4 + 2 * 1 + 1 * 2
    assert reference.best.job.config == "good"
    assert reference.best.value == max(row["val_accuracy"] for row in reference.histories["good"].rows[-1:])
    assert reference.configs == CONFIGS


def test_a_promoted_run_is_an_uninterrupted_one(tmp_path: Path, whole: dict[str, tuple[nn.Module, History]]) -> None:
    found = searched(tmp_path)
    model, history = whole["good"]
    assert untimed(found.histories["good"]) == untimed(history)
    assert len(history) == 4
    states = [torch.load(file, weights_only=True) for file in tmp_path.glob("*.pt")]
    [last] = [state for state in states if state["history"]["epochs"] == 4]
    for name, tensor in model.state_dict().items():
        assert torch.equal(last["model"][name], tensor)
    assert last["history"]["losses"] == history.losses


def test_a_run_that_diverges_is_worst_and_is_not_trained_again(
    reference: es.Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = reference.table()
    wild = table[table["config"] == "wild"]
    assert wild["diverged"].tolist() == [True]
    assert wild["value"].isna().all()
    assert wild["spent"].tolist() == [1]
    calls: list[int] = []
    real = search_file.fit
    monkeypatch.setattr(search_file, "fit", lambda *a, **settings: calls.append(0) or real(*a, **settings))
    one = es.search(build, [1e160, 1e170], es.SuccessiveHalving(1, 4, 2), data=digits(), folder=tmp_path, workers=0)
    assert one.table()["spent"].tolist() == [1, 1, 0, 0]  # promoted for want of another, and no epoch spent on it
    assert one.table()["diverged"].all()
    assert len(calls) == 2


@pytest.mark.parametrize("rule", [es.Hyperband(4, 2), es.Asha(1, 4, 2, 3)])
def test_the_other_rules(tmp_path: Path, rule: es.HalvingRule) -> None:
    count = rule.needed if isinstance(rule, es.Hyperband) else 6
    configs = [0.002 * 2**k for k in range(count)]
    found = es.search(build, configs, rule, data=digits(), folder=tmp_path, column="val_loss", workers=1)
    assert found.mode == "min"
    curves = {}
    for name, config in found.configs.items():
        trial = build(config)
        recipe = replace(trial.recipe, epochs=4)
        with one_thread():
            curves[name] = fit(fresh(trial.model, recipe, seed=0), digits(), recipe, seed=0)["val_loss"]
    replayed = es.replay_runs(curves, rule, mode="min")
    assert found.jobs == replayed.jobs
    assert len({done.job.epochs for done in found.jobs}) == 3


def test_processes_give_the_same_table(reference: es.Found, tmp_path: Path) -> None:
    same_tables(searched(tmp_path, workers=2), reference)


# --- Killed -----------------------------------------------------------------------------------------------------------


def test_a_search_that_is_killed_goes_on(reference: es.Found, tmp_path: Path) -> None:
    """Killed in the middle of the last run, after its first epoch of two."""
    command = [sys.executable, "-m", "tests.early_stopping.searched", str(tmp_path), "6"]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    rows = json.loads((tmp_path / "finished.json").read_bytes())["rows"]
    assert sorted(rows["good"]) == ["1", "2"]
    same_tables(searched(tmp_path), reference)


class Killed(BaseException):
    """What nothing catches."""


def test_a_search_that_is_killed_before_or_after_any_write_goes_on(
    reference: es.Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again, each time one write further: every write of a checkpoint or of a finished job is hit once."""
    real = os.replace
    deaths = 0

    def dying(write: int, after: bool) -> Callable[..., None]:
        left = [write]

        def replace_(source: Any, target: Any) -> None:
            left[0] -= 1
            if not left[0] and not after:
                raise Killed
            real(source, target)
            if not left[0]:
                raise Killed

        return replace_

    for after in (False, True):
        folder = tmp_path / str(after)
        for _ in range(40):
            monkeypatch.setattr(files.os, "replace", dying(2 if not after else 1, after))
            try:
                found = searched(folder)
                break
            except Killed:
                deaths += 1
        monkeypatch.setattr(files.os, "replace", real)
        same_tables(found, reference)
        same_tables(searched(folder), reference)  # and once more, of which nothing is trained
    assert deaths > 15


def test_nothing_is_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: es.Found) -> None:
    trained: list[int] = []
    real = search_file.fit

    def counted(*arguments: Any, **settings: Any) -> History:
        history: History = real(*arguments, **settings)
        trained.append(history.epochs)
        return history

    monkeypatch.setattr(search_file, "fit", counted)
    searched(tmp_path)
    assert sorted(trained) == [1, 1, 1, 2, 2, 4]  # and one that diverged
    trained.clear()
    same_tables(searched(tmp_path), reference)
    assert not trained
    other = es.search(build, CONFIGS, es.SuccessiveHalving(1, 2, 2), data=digits(), folder=tmp_path, workers=0)
    assert not trained  # another rule finds what it needs
    assert other.epochs == 6


def test_a_run_that_another_process_still_trains_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a search that was killed may live on: a lock beside the checkpoint is held while it trains."""
    held: list[str] = []

    class Lock:
        def __init__(self, path: str) -> None:
            self.path = path

        def __enter__(self) -> None:
            held.append(self.path)

        def __exit__(self, *_: object) -> None:
            held.remove(self.path)

    seen: list[bool] = []
    real = search_file.fit

    def fitted(*arguments: Any, **settings: Any) -> History:
        seen.append(held == [f"{settings['checkpoint']}.lock"])
        return real(*arguments, **settings)  # type: ignore[no-any-return]

    monkeypatch.setattr(search_file.filelock, "FileLock", Lock)
    monkeypatch.setattr(search_file, "fit", fitted)
    searched(tmp_path)
    assert len(seen) == 7
    assert all(seen)


# --- What does not fit ------------------------------------------------------------------------------------------------


def test_a_run_may_end_itself(tmp_path: Path) -> None:
    def patient(lr: float) -> es.Trial:
        trial = build(lr)
        return replace(trial, recipe=replace(trial.recipe, stop=es.BudgetSpent(epochs=2)))

    found = es.search(patient, [0.1, 0.02], es.SuccessiveHalving(1, 4, 2), data=digits(), folder=tmp_path, workers=0)
    assert found.table()["spent"].tolist() == [1, 1, 1, 0]
    assert len(found.histories[found.best.job.config]) == 2


def test_schedules_that_know_the_end_are_refused(tmp_path: Path) -> None:
    def scheduled(schedule: Any) -> Callable[[float], es.Trial]:
        def make(lr: float) -> es.Trial:
            trial = build(lr)
            return replace(trial, recipe=replace(trial.recipe, schedule=schedule))

        return make

    search = partial(es.search, configs=[0.1], rule=es.SuccessiveHalving(1, 2, 2), data=digits(), workers=0)
    with pytest.raises(ValueError, match="'0': its schedule has other rates in 1 epochs than in the first of 2"):
        search(scheduled(lambda optimizer, steps: CosineAnnealingLR(optimizer, steps)), folder=tmp_path)
    assert not list(tmp_path.iterdir())
    steps = search(scheduled(lambda optimizer, steps: StepLR(optimizer, 3, 0.5)), folder=tmp_path / "a")
    assert steps.histories["0"]["lr"] == [0.1 / 2**4, 0.1 / 2**9]
    search(scheduled(lambda optimizer, steps: ReduceLROnPlateau(optimizer)), folder=tmp_path / "b")


def test_another_search_needs_another_folder(tmp_path: Path) -> None:
    rule = es.SuccessiveHalving(1, 1, 2)
    search = partial(es.search, data=digits(), folder=tmp_path, workers=0)
    search(build, {"a": 0.1}, rule)
    for other in (
        lambda: search(build, {"a": 0.2}, rule),
        lambda: search(build, {"a": 0.1}, rule, seed=1),
        lambda: search(build, {"a": 0.1}, rule, data=replace(digits(), val=digits().test)),
    ):
        with pytest.raises(ValueError, match="holds another search: its 'a' had another"):
            other()
    more = search(build, {"b": 0.2, "a": 0.1}, rule)  # further ones may come to it
    assert more.table()["config"].tolist() == ["b", "a"]
    (tmp_path / "finished.json").write_text("{")
    with pytest.raises(ValueError, match=r"finished\.json cannot be read"):
        search(build, {"a": 0.1}, rule)


def broken(config: float) -> es.Trial:
    return es.Trial(lambda: nn.Linear(3, 10), Recipe())


def test_an_error_names_its_configuration(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot take an example") as caught:
        es.search(broken, {"odd": 1.0}, RULE, data=digits(), folder=tmp_path, workers=0)
    assert caught.value.__notes__ == ["This happened in the configuration 'odd', on the way to epoch 1."]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"configs": []}, "configs=0: must be at least one"),
        ({"configs": [0.1] * 3, "rule": es.Hyperband(4, 2)}, "configs=3: must be 9 of them"),
        ({"workers": -1}, "workers=-1: must be a whole number of at least 0"),
        ({"column": ""}, "column='': must be the name of a column"),
        ({"build": lambda lr: Recipe()}, "build('slow')="),
        (
            {"build": lambda lr: es.Trial(nn.Flatten, Recipe(validate_every=3))},
            "validate_every=3 leaves out one of the epochs (1, 2, 4)",
        ),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"build": build, "configs": CONFIGS, "rule": RULE} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        es.search(**arguments, data=digits(), folder=tmp_path, **({} if "workers" in change else {"workers": 0}))


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="val_f1"):
        searched(tmp_path, column="val_f1")
