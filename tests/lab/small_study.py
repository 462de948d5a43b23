"""A study small enough to be run, killed and run again in a test; as a program it runs into the file it is given."""

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from course_lib.lab.data import Dataset
from course_lib.lab.studies import Book, Part, RecipeFor, Study, Tuned, run_study
from course_lib.lab.training import Recipe, cross_entropy
from tests.lab.test_training import blobs, network


def recipe(lr: float) -> Recipe:
    return Recipe(epochs=2, batch_size=16, optimizer=partial(torch.optim.SGD, lr=lr))


def a_batch_an_epoch(data: Dataset) -> Recipe:
    return replace(recipe(0.1), batch_size=len(data.train))


def several(data: Dataset, seed: int) -> Mapping[str, float | list[float]]:
    return {"size": float(len(data.train)), "seed": float(seed), "epoch": [0.5, 1, 2], "loss": [3, 2, seed]}


def explodes(model, x, y):
    return cross_entropy(model, x, y) * float("nan")


STUDY = Study(
    "99",
    "Does it work?",
    {
        "recipes": Part(
            "Blobs, 2 epochs",
            blobs,
            {
                "plain": recipe(0.1),
                "tuned": Tuned({"lr 0.001": recipe(0.001), "lr 0.3": recipe(0.3)}, (10, 11)),
                "hopeless": Recipe(epochs=1, objective=explodes),
                "made": RecipeFor(a_batch_an_epoch),
            },
            (0, 1),
            network,
        ),
        "functions": Part("Blobs", blobs, {"several": several}, (0, 1)),
    },
)
RUNS = 4 + 8 + 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_middle_of_run(number: int) -> None:
    """``Recipe``'s default objective is untouched: the fingerprints stay the same."""
    from course_lib.lab import training

    real, runs = training.batches, []

    def counted(split, *arguments, **settings):
        if "generator" in settings and len(split) == len(blobs().train):
            runs.append(1)
        yield from real(split, *arguments, **settings)
        if len(runs) == number:
            die()

    training.batches = counted


def kill_in_the_middle_of_write(number: int) -> None:
    real, writes = Book._write, []

    def half(self, entry):
        writes.append(1)
        if len(writes) < number:
            return real(self, entry)
        real(self, entry)
        with open(self.file, "r+b") as stream:
            stream.truncate(self.file.stat().st_size - 30)
        return die()

    Book._write = half


if __name__ == "__main__":
    file, moment, number = sys.argv[1:]
    torch.set_num_threads(1)
    {"run": kill_in_the_middle_of_run, "write": kill_in_the_middle_of_write, "never": int}[moment](int(number))
    from tests.lab import small_study

    run_study(small_study.STUDY, Path(file), workers=1, progress=False)
