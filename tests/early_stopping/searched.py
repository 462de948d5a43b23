"""A search for a process of its own, which a test kills: ``python -m tests.early_stopping.searched FOLDER [SAVES]``."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from course_lib import early_stopping as es
from course_lib.lab.checkpoints import Checkpoint
from course_lib.lab.models import mlp
from course_lib.lab.training import History, Recipe
from tests.early_stopping.small import digits

RULE = es.SuccessiveHalving(1, 4, 2)
CONFIGS = {"slow": 1e-4, "good": 0.05, "fair": 0.01, "wild": 1e160}


def build(lr: float) -> es.Trial:
    recipe = Recipe(batch_size=10, precision="float64", optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9))
    return es.Trial(partial(mlp, (1, 8, 8), 10, width=8), recipe)


def searched(folder: Path, **settings: Any) -> es.Found:
    return es.search(build, CONFIGS, RULE, data=digits(), folder=folder, **({"workers": 0} | settings))


def main() -> None:
    left, real = int(sys.argv[2]), Checkpoint.save

    def save(self: Checkpoint, history: History) -> None:
        nonlocal left
        real(self, history)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoint.save = save  # type: ignore[method-assign]
    searched(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
