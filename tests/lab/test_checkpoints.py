"""A run that is killed goes on as if nothing had happened; a checkpoint is taken up by the run that wrote it alone."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from course_lib.lab.data import random_shift
from course_lib.lab.fingerprints import Unfingerprintable
from course_lib.lab.training import History, Recipe, cross_entropy, fit
from tests.lab.test_training import RECIPE, blobs, network, weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    import torch
    from tests.lab.test_checkpoints import FULL
    from tests.lab.test_training import blobs, network
    from course_lib.lab import training

    moment, path = sys.argv[1], sys.argv[2]
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    epoch_to_die = 3

    if moment == "during a write":
        real_save, writes = torch.save, []
        def save(state, file):
            writes.append(1)
            if len(writes) == epoch_to_die:
                file.write(b"half of a checkpoint"); file.flush(); die()
            real_save(state, file)
        torch.save = save
    elif moment == "before it is put in place":
        real_replace, moves = os.replace, []
        def put(source, target):
            moves.append(1)
            die() if len(moves) == epoch_to_die else real_replace(source, target)
        os.replace = put
    elif moment == "in the middle of an epoch":
        real, steps = torch.optim.Adam.step, []
        def step(self, closure):
            steps.append(1)
            return die() if len(steps) == 13 else real(self, closure)
        torch.optim.Adam.step = step
    training.fit(network(dropout=0.3), blobs(), FULL, seed=5, checkpoint=path)
"""


def same_threads() -> dict[str, str]:
    """The environment of a child that adds numbers up in the same order as this process."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


def cosine(optimizer, steps):
    return CosineAnnealingLR(optimizer, steps)


# Everything that has a state: a schedule, a moving average, dropout's and augmentation's random numbers.
FULL = Recipe(
    epochs=5, batch_size=16, optimizer=partial(torch.optim.Adam, lr=0.01), schedule=cosine, ema=0.9,
    augment=partial(random_shift, pixels=1),
)  # fmt: skip
TIMES = ["seconds", "examples_per_second"]


@pytest.mark.parametrize("moment", ["in the middle of an epoch", "during a write", "before it is put in place"])
def test_a_killed_run_goes_on_bit_identically(tmp_path, moment):
    path = tmp_path / "run.pt"
    script = textwrap.dedent(KILLED).format(root=str(ROOT))
    command = [sys.executable, "-c", script, moment, str(path)]
    killed = subprocess.run(command, capture_output=True, text=True, env=same_threads())
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, whole = network(dropout=0.3), network(dropout=0.3)
    survived = torch.load(path, weights_only=True)["history"]["rows"]
    assert len(survived) == 2  # it was killed in, or at the end of, the third epoch
    history = fit(resumed, blobs(), FULL, seed=5, checkpoint=path)
    expected = fit(whole, blobs(), FULL, seed=5)
    assert history.rows[:2] == survived  # their times too: these epochs were not trained again
    assert torch.equal(weights(resumed), weights(whole))
    assert history.frame().drop(columns=TIMES).equals(expected.frame().drop(columns=TIMES))
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_run_killed_at_any_moment_goes_on(tmp_path):
    """The same from outside, at moments nobody chose: killed again and again until it gets through."""
    path = tmp_path / "run.pt"
    script = textwrap.dedent(KILLED).format(root=str(ROOT))
    reference = network(dropout=0.3)
    fit(reference, blobs(), FULL, seed=5)
    for _ in range(2):
        running = subprocess.Popen([sys.executable, "-c", script, "no moment", str(path)], env=same_threads())
        seen = set()
        while running.poll() is None and len(seen) < 2:  # kill it as soon as the file has appeared or changed
            if path.exists():
                seen.add(path.stat().st_mtime_ns)
            time.sleep(0.001)
        os.kill(running.pid, signal.SIGKILL) if running.poll() is None else None
        running.wait()
        torch.load(path, weights_only=True)  # whole at every moment
    model = network(dropout=0.3)
    history = fit(model, blobs(), FULL, seed=5, checkpoint=path)
    assert len(history) == 5
    assert torch.equal(weights(model), weights(reference))


def test_a_finished_checkpoint_gives_the_model_back_without_training(tmp_path):
    first, again = network(), network()
    history = fit(first, blobs(), RECIPE, seed=0, checkpoint=tmp_path / "run.pt")
    repeated = fit(again, blobs(), RECIPE, seed=0, checkpoint=tmp_path / "run.pt")
    assert repeated.rows == history.rows  # the times too
    assert torch.equal(weights(first), weights(again))


def test_a_stopped_run_stays_stopped(tmp_path):
    def stop(history: History) -> bool:
        return len(history) == 2

    recipe = replace(RECIPE, epochs=9, stop=stop)
    fit(network(), blobs(), recipe, seed=0, checkpoint=tmp_path / "run.pt")
    assert len(fit(network(), blobs(), recipe, seed=0, checkpoint=tmp_path / "run.pt")) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [({"recipe": replace(RECIPE, batch_size=32)}, "batch_size=16, this run has batch_size=32"),
     ({"recipe": replace(RECIPE, optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9))}, "optimizer=SGD"),
     ({"seed": 1}, "seed=0, this run has seed=1"),
     ({"model": nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}, "first weights differ")],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path, change, words):
    path = tmp_path / "run.pt"
    fit(network(), blobs(), RECIPE, seed=0, checkpoint=path)
    before = path.read_bytes()
    settings = {"model": network(), "recipe": RECIPE, "seed": 0} | change
    with pytest.raises(ValueError, match=words):
        fit(settings["model"], blobs(), settings["recipe"], seed=settings["seed"], checkpoint=path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"my thesis")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        fit(network(), blobs(), RECIPE, seed=0, checkpoint=path)
    assert path.read_bytes() == b"my thesis"


def distilled(teacher: nn.Module, temperature: float):
    def objective(model, x, y):
        with torch.no_grad():
            soft = (teacher(x) / temperature).softmax(1)
        return cross_entropy(model, x, y) + nn.functional.cross_entropy(model(x) / temperature, soft)

    return objective


def test_objectives_of_one_name_are_told_apart_by_what_they_close_over(tmp_path):
    path, teacher = tmp_path / "run.pt", network(seed=7).eval()
    recipe = replace(RECIPE, epochs=1, objective=distilled(teacher, 1.0))
    fit(network(), blobs(), recipe, seed=0, checkpoint=path)
    fit(network(), blobs(), replace(recipe, objective=distilled(teacher, 1.0)), seed=0, checkpoint=path)
    for other in (distilled(teacher, 9.0), distilled(network(seed=8).eval(), 1.0)):
        with pytest.raises(ValueError, match=r"another objective named distilled\.<locals>\.objective"):
            fit(network(), blobs(), replace(recipe, objective=other), seed=0, checkpoint=path)


def test_a_run_on_other_data_is_another_run(tmp_path):
    path, data = tmp_path / "run.pt", blobs()
    fit(network(), data, RECIPE, seed=0, checkpoint=path)
    for other in (blobs(seed=1), replace(data, train=data.train.subset(torch.arange(30)))):
        with pytest.raises(ValueError, match="the data differ"):
            fit(network(), other, RECIPE, seed=0, checkpoint=path)


def test_what_cannot_be_told_again_is_refused_before_training(tmp_path):
    with open(__file__) as file:
        recipe = replace(RECIPE, stop=lambda history: bool(file.closed))
        with pytest.raises(Unfingerprintable, match=r"know stop=.* another time: .*file.* is TextIOWrapper"):
            fit(network(), blobs(), recipe, seed=0, checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "run.pt").exists()


def in_steps(optimizer, steps):
    return StepLR(optimizer, step_size=7, gamma=0.5)


def on_plateau(optimizer, steps):
    return ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)


@pytest.mark.parametrize("schedule", [None, in_steps, on_plateau])
def test_a_finished_run_goes_on_to_more_epochs(tmp_path, schedule):
    short, whole = replace(FULL, epochs=2, schedule=schedule), replace(FULL, epochs=5, schedule=schedule)
    continued, reference = network(dropout=0.3), network(dropout=0.3)
    fit(network(dropout=0.3), blobs(), short, seed=5, checkpoint=tmp_path / "run.pt")
    history = fit(continued, blobs(), whole, seed=5, checkpoint=tmp_path / "run.pt")
    expected = fit(reference, blobs(), whole, seed=5)
    assert torch.equal(weights(continued), weights(reference))
    assert history.frame().drop(columns=TIMES).equals(expected.frame().drop(columns=TIMES))
    assert history.losses == expected.losses
    with pytest.raises(ValueError, match="epochs=5, this run has epochs=2"):
        fit(network(dropout=0.3), blobs(), short, seed=5, checkpoint=tmp_path / "run.pt")


def test_a_schedule_that_depends_on_the_number_of_epochs_does_not_go_on(tmp_path):
    fit(network(dropout=0.3), blobs(), FULL, seed=5, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="epochs=5, this run has epochs=6"):
        fit(network(dropout=0.3), blobs(), replace(FULL, epochs=6), seed=5, checkpoint=tmp_path / "run.pt")


def test_the_best_weights_survive_a_kill(tmp_path):
    """The best epoch comes before the kill, and all later ones are worse."""

    def worse_and_worse(model, x, y):
        return -cross_entropy(model, x, y)

    recipe = replace(RECIPE, epochs=4, objective=worse_and_worse, keep="val_loss", validate_every=2)
    first, resumed, reference = network(), network(), network()
    fit(first, blobs(), replace(recipe, epochs=2), seed=0, checkpoint=tmp_path / "run.pt")
    fit(resumed, blobs(), recipe, seed=0, checkpoint=tmp_path / "run.pt")
    history = fit(reference, blobs(), recipe, seed=0)
    assert history["epoch"] == [2, 4]
    assert history["val_loss"][0] < history["val_loss"][1]
    assert torch.equal(weights(resumed), weights(reference))
    assert torch.equal(weights(resumed), weights(first))
