"""Recorded studies: run once, to a file that survives every kill, and believed only while the code is the same."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from course_lib.lab import studies
from course_lib.lab.experiments import mean_interval
from course_lib.lab.studies import (
    Book,
    Job,
    StudyOutdated,
    Tuned,
    chosen,
    declared,
    read,
    repeat_first_epoch,
    run_study,
)
from course_lib.lab.training import Diverged, evaluate, fit, fresh
from tests.lab.small_study import RUNS, STUDY, a_batch_an_epoch, recipe, several
from tests.lab.test_training import blobs, network

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    file = tmp_path_factory.mktemp("studies") / "whole.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_DEVICE", "cpu")
        assert run_study(STUDY, file, workers=1) == RUNS
    return file


def found_in(file: Path) -> list[dict]:
    """The rows without what differs from run to run, in an order that does not depend on which came first."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "in")} for row in Book(file, read_only=True).rows]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def test_a_study_is_a_comparison_of_its_test_accuracies(undisturbed):
    found = read(STUDY, undisturbed, "recipes")
    accuracies = []
    for seed in (0, 1):
        model = fresh(network, recipe(0.1), seed=seed)
        fit(model, blobs(), recipe(0.1), seed=seed)
        accuracies.append(evaluate(model, blobs().test).accuracy)
    assert found.values["plain"].tolist() == accuracies
    assert found.interval("plain") == mean_interval(accuracies)
    assert np.isnan(found.values["hopeless"]).all()
    assert found.frame().loc["hopeless", "diverged"] == 2
    assert "Blobs, 2 epochs: 2 seeds; 12 runs, tuning included" in found.table().to_html()
    assert torch.__version__ in found.caption


def test_tuning_chooses_by_the_validation_split_with_seeds_of_its_own(undisturbed):
    found, rows = read(STUDY, undisturbed, "recipes"), Book(undisturbed, read_only=True).rows
    tuning = [row for row in rows if row["tuning"]]
    assert {row["seed"] for row in tuning} == {10, 11}
    means = {c: np.mean([r["value"] for r in tuning if r["candidate"] == c]) for c in ("lr 0.001", "lr 0.3")}
    assert found.chosen == {"tuned": max(means, key=means.get)} == {"tuned": "lr 0.3"}
    model = fresh(network, recipe(0.3), seed=10)
    history = fit(model, blobs(), recipe(0.3), seed=10)
    (row,) = (row for row in tuning if row["candidate"] == "lr 0.3" and row["seed"] == 10)
    assert row["value"] == history["val_accuracy"][-1]
    lost = [row | {"value": None} if row["candidate"] == "lr 0.3" and row["seed"] == 10 else row for row in rows]
    assert chosen(STUDY, "recipes", "tuned", lost) == "lr 0.001"  # one run diverged: the candidate is out


def judged(data, seed, *, setting):
    """Best on the validation split at 2, best on the test split at 3; at 4 the first run diverges."""
    if setting == 4 and seed == 10:
        raise Diverged(math.inf, 1, 1, 0.1)
    return {"val_accuracy": {2: 0.9, 3: 0.8, 4: 1.0}[setting] + 0.001 * seed, "test": setting / 10}


def unjudged(data, seed):
    return {"test": 1.0}


def test_candidates_that_are_functions_say_what_they_are_judged_by(tmp_path):
    arms = {"tuned": Tuned({f"at {k}": partial(judged, setting=k) for k in (3, 2, 4)}, (10, 11))}
    study = replace(STUDY, parts={"functions": replace(STUDY.parts["functions"], arms=arms)})
    assert run_study(study, tmp_path / "study.jsonl", workers=1) == 6 + 2
    found = read(study, tmp_path / "study.jsonl", "functions", of="test")
    assert found.chosen == {"tuned": "at 2"}
    assert found.values["tuned"].tolist() == [0.2, 0.2]


def test_a_candidate_that_does_not_say_it_is_named(tmp_path):
    arms = {"tuned": Tuned({"silent": unjudged}, (10,))}
    study = replace(STUDY, parts={"functions": replace(STUDY.parts["functions"], arms=arms)})
    with pytest.raises(ValueError, match=r"candidates=\['test'\]: must be functions that return val_accuracy"):
        run_study(study, tmp_path / "study.jsonl", workers=1)


def test_a_run_may_measure_several_numbers(undisturbed):
    assert read(STUDY, undisturbed, "functions", of="seed").values["several"].tolist() == [0, 1]
    assert read(STUDY, undisturbed, "functions", of="size").metric == "size"
    with pytest.raises(ValueError, match="of=None: each run measured 'size', 'seed'; choose one"):
        read(STUDY, undisturbed, "functions")
    with pytest.raises(ValueError, match="part='other': the study has 'recipes', 'functions'"):
        read(STUDY, undisturbed, "other")


def test_what_a_run_did_not_measure_is_not_a_number(tmp_path, undisturbed):
    file = tmp_path / "study.jsonl"
    file.write_text("".join(map(without_first_size, undisturbed.read_text().splitlines(keepends=True))))
    values = read(STUDY, file, "functions", of="size").values["several"]
    assert np.isnan(values[0])
    assert values[1] == read(STUDY, undisturbed, "functions", of="size").values["several"][1]


def test_an_arm_that_never_measured_it_is_left_out(tmp_path, undisturbed):
    """A student without a teacher agrees with nobody."""
    study = replace(
        STUDY, parts={"functions": replace(STUDY.parts["functions"], arms={"several": several, "one": one})}
    )
    file = tmp_path / "study.jsonl"
    run_study(study, file, workers=1)
    assert read(study, file, "functions", of="size").values.keys() == {"several", "one"}
    assert read(study, file, "functions", of="seed").values.keys() == {"several"}


def one(data, seed):
    """Fewer numbers than the other arm."""
    return {"size": float(len(data.train))}


def without_first_size(line):
    row = json.loads(line)
    if row.get("part") == "functions" and row["seed"] == 0:
        del row["value"]["size"]
    return json.dumps(row) + "\n"


def test_what_a_run_measured_along_the_way_is_its_history(undisturbed):
    histories = read(STUDY, undisturbed, "functions", of="size").histories
    assert [history["loss"] for history in histories["several"]] == [[3, 2, 0], [3, 2, 1]]
    assert histories["several"][0].frame().index.tolist() == [0.5, 1, 2]
    assert histories["several"][0].epochs == 2
    assert not read(STUDY, undisturbed, "recipes").histories


def test_a_history_stands_at_the_place_of_its_seed(tmp_path, undisturbed):
    """Also where another seed's run diverged and left none."""
    file = tmp_path / "study.jsonl"
    file.write_text("".join(map(without_first_curve, undisturbed.read_text().splitlines(keepends=True))))
    first, second = read(STUDY, file, "functions", of="size").histories["several"]
    assert len(first) == 0
    assert second["loss"] == [3, 2, 1]


def test_a_shorter_curve_ends_in_nan(tmp_path, undisturbed):
    file = tmp_path / "study.jsonl"
    file.write_text("".join(map(with_shorter_loss, undisturbed.read_text().splitlines(keepends=True))))
    history = read(STUDY, file, "functions", of="size").histories["several"][0]
    assert history["loss"][:2] == [3, 2]
    assert math.isnan(history["loss"][2])
    assert history["epoch"] == [0.5, 1, 2]


def with_shorter_loss(line):
    row = json.loads(line)
    if row.get("part") == "functions" and isinstance(row["value"], dict) and "loss" in row["value"]:
        row["value"]["loss"].pop()
    return json.dumps(row) + "\n"


def without_first_curve(line):
    row = json.loads(line)
    if row.get("part") == "functions" and row["seed"] == 0:
        row["value"] = None
    return json.dumps(row) + "\n"


def test_a_second_call_runs_nothing(undisturbed):
    before = undisturbed.read_bytes()
    assert run_study(STUDY, undisturbed, workers=1) == 0
    assert undisturbed.read_bytes() == before


def test_an_edit_while_the_study_runs_changes_no_fingerprint(tmp_path, undisturbed, monkeypatch):
    """A fingerprint is made of sources on disk: what was chosen late must not get that of a file edited meanwhile."""
    file, spread = tmp_path / "study.jsonl", studies.spread
    monkeypatch.setattr(studies, "_fingerprints", {})

    def edited_once_begun(*args, **settings):
        monkeypatch.setattr(studies, "fingerprint", lambda value: "of the edited file")
        return spread(*args, **settings)

    monkeypatch.setattr(studies, "spread", edited_once_begun)
    run_study(STUDY, file, workers=1)
    assert found_in(file) == found_in(undisturbed)


def test_rows_know_where_they_come_from(undisturbed):
    (session,) = Book(undisturbed, read_only=True).sessions
    assert session["torch"] == torch.__version__
    assert set(session["data"]) == {"recipes", "functions"}
    assert {"date", "python", "numpy", "system", "device", "threads", "workers"} <= set(session)
    text = undisturbed.read_text()
    assert str(ROOT) not in text
    assert all(row["in"] == 1 and row["seconds"] >= 0 for row in Book(undisturbed, read_only=True).rows)


@pytest.mark.parametrize(("moment", "number"), [("run", 5), ("write", 1), ("write", 4)])
def test_a_kill_loses_at_most_the_run_under_way(tmp_path, undisturbed, moment, number):
    file = tmp_path / "study.jsonl"
    command = [sys.executable, "-m", "tests.lab.small_study", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COURSE_DEVICE": "cpu"}
    killed = subprocess.run([*command, moment, str(number)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    survived = file.read_bytes()
    whole = survived[: survived.rfind(b"\n") + 1]
    if moment == "write":
        assert survived != whole or number == 1
        assert len(whole.splitlines()) == number - 1
    again = subprocess.run([*command, "never", "0"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert file.read_bytes().startswith(whole)  # what was there was kept, not run again
    assert found_in(file) == found_in(undisturbed)


def threads(data, seed):
    """How many a run may use."""
    return float(torch.get_num_threads())


def test_a_study_that_times_runs_alone_with_all_threads(tmp_path):
    part = replace(STUDY.parts["functions"], arms={"threads": threads})
    together = replace(STUDY, parts={"functions": part})
    alone = replace(together, alone=True)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for study, expected in ((together, 1), (alone, 3)):
            file = tmp_path / f"{expected}.jsonl"
            run_study(study, file, **({} if study.alone else {"workers": 1}))
            assert set(read(study, file, "functions").values["threads"]) == {expected}
            book = Book(file, read_only=True)
            assert (book.sessions[0]["threads"], book.sessions[0]["workers"]) == (expected, 1)
            cores = "one core" if expected == 1 else "3 cores"
            assert f"hours of {cores} (" in read(study, file, "functions").caption
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="workers=2: must be 1 or None: this study times its runs"):
        run_study(alone, tmp_path / "other.jsonl", workers=2)


def test_workers_find_the_same(tmp_path, undisturbed):
    file = tmp_path / "study.jsonl"
    assert run_study(STUDY, file, workers=2) == RUNS
    assert found_in(file) == found_in(undisturbed)


def test_other_code_is_refused_and_only_what_changed_is_run_again(tmp_path, undisturbed):
    file = tmp_path / "study.jsonl"
    file.write_bytes(undisturbed.read_bytes())
    part = STUDY.parts["recipes"]
    changed = replace(STUDY, parts=STUDY.parts | {"recipes": replace(part, arms=part.arms | {"plain": recipe(0.2)})})
    with pytest.raises(StudyOutdated, match=r"'plain'.*was recorded with other code: run the study again .*NB=99"):
        read(changed, file, "recipes")
    assert read(changed, file, "functions", of="seed").values["several"].tolist() == [0, 1]
    assert run_study(changed, file, workers=1) == 2
    assert read(changed, file, "recipes").values["plain"].shape == (2,)


def test_a_missing_seed_is_refused(undisturbed):
    part = STUDY.parts["recipes"]
    more = replace(STUDY, parts={"recipes": replace(part, seeds=(0, 1, 2))})
    with pytest.raises(StudyOutdated, match=r"2, False\) of study 99 is not recorded"):
        read(more, undisturbed, "recipes")


def test_a_line_in_the_middle_that_cannot_be_read_is_named(tmp_path, undisturbed):
    lines = undisturbed.read_bytes().splitlines(keepends=True)
    file = tmp_path / "study.jsonl"
    file.write_bytes(b"".join([*lines[:3], b'{"part": "rec\n', *lines[3:]]))
    with pytest.raises(StudyOutdated, match=r"study\.jsonl, line 4, cannot be read"):
        read(STUDY, file, "recipes")


def test_a_recipe_may_be_made_from_the_data(undisturbed):
    made = a_batch_an_epoch(blobs())
    assert made.batch_size == len(blobs().train) != recipe(0.1).batch_size
    model = fresh(network, made, seed=1)
    fit(model, blobs(), made, seed=1)
    assert read(STUDY, undisturbed, "recipes").values["made"][1] == evaluate(model, blobs().test).accuracy
    (row,) = (r for r in Book(undisturbed, read_only=True).rows if r["arm"] == "made" and r["seed"] == 1)
    assert repeat_first_epoch(STUDY, Job("recipes", "made", None, 1, False)) == row["first_epoch"]


def test_the_first_epoch_can_be_repeated(undisturbed):
    rows = Book(undisturbed, read_only=True).rows
    (row,) = (r for r in rows if r["arm"] == "plain" and r["seed"] == 1)
    assert repeat_first_epoch(STUDY, Job("recipes", "plain", None, 1, False)) == row["first_epoch"]
    part = STUDY.parts["recipes"]
    other = replace(STUDY, parts={"recipes": replace(part, arms={"plain": recipe(0.2)}, model=partial(network, 1))})
    assert repeat_first_epoch(other, Job("recipes", "plain", None, 1, False)) != row["first_epoch"]


def test_a_chapter_without_a_study_is_named():
    with pytest.raises(ValueError, match="chapter='77': there is no study of it"):
        declared("77")


def test_the_command_line_names_what_is_wrong(capsys):
    assert studies.main(["77"]) == 2
    assert "chapter='77'" in capsys.readouterr().err
