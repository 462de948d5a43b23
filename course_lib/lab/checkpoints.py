"""How a training run survives being killed: its whole state in one file, replaced in one step.

A checkpoint is taken up only by the run that wrote it. Its identity is the recipe, slot by slot, the seed, the first
weights and the data, each by its fingerprint: two objectives made by one function with other settings are two.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from course_lib.lab.data import Dataset
from course_lib.lab.files import replaced
from course_lib.lab.fingerprints import Unfingerprintable, describe, fingerprint

if TYPE_CHECKING:
    from course_lib.lab.training import History, Recipe


class Checkpoint:
    """The state of a run in one file, so that a kill at any moment leaves a whole one.

    Parameters
    ----------
    parts : whatever has a state of its own (``state_dict``), by name; None for what this run does not have. A resumed
        run needs all of it and nothing else.

    Raises
    ------
    Unfingerprintable : a slot of the recipe has no fingerprint, so nobody could tell whether it is the same again.
    """

    def __init__(
        self,
        path: str | Path,
        recipe: Recipe,
        seed: int,
        model: nn.Module,
        data: Dataset,
        parts: Mapping[str, Any],
    ) -> None:
        self.path = Path(path)
        self.recipe, self.model, self.data = recipe, model, data
        self.parts = {name: part for name, part in parts.items() if part is not None}
        slots = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
        seen = {"train": data.train, "val": data.val}
        self.identity = {"seed": _identified("seed", seed)}
        self.identity |= {name: _identified(name, value) for name, value in slots.items()}
        self.identity["data"] = {"words": data.name, "fingerprint": fingerprint(seen)}
        self.identity["model"] = {"words": type(model).__name__, "fingerprint": fingerprint(model)}

    def save(self, history: History) -> None:
        """Write the state beside the file, force it to disk, then put it in place."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"identity": self.identity, "history": {f.name: getattr(history, f.name) for f in fields(history)}}
        with replaced(self.path) as file:
            torch.save(state, file)

    def restore(self, history: History) -> None:
        """Take up the state of the file if there is one.

        Raises
        ------
        ValueError : the file cannot be read, or belongs to another recipe, seed, network or data set.
        """
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location=next(self.model.parameters()).device, weights_only=True)
            identity, kept = state["identity"], state["history"]
        except Exception as error:
            raise ValueError(
                f"checkpoint={str(self.path)!r} cannot be read as a checkpoint ({error}); "
                "move it away to start anew, nothing was changed"
            ) from error
        for difference in self._differences(identity):
            raise ValueError(
                f"checkpoint={str(self.path)!r} was written {difference}: use another file, or the same run"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, value in kept.items():
            setattr(history, name, value)

    def _differences(self, theirs: Mapping[str, Any]) -> Iterator[str]:
        for name, mine in self.identity.items():
            other = theirs.get(name, {"words": "nothing", "fingerprint": ""})
            if other["fingerprint"] == mine["fingerprint"]:
                continue
            if name == "epochs" and self._goes_on(int(other["words"])):
                continue
            if name in ("data", "model"):
                what = "the data" if name == "data" else "the network or its first weights"
                yield f"for another run: {what} differ ({name}={other['words']} then, {name}={mine['words']} now)"
            elif other["words"] == mine["words"]:
                yield f"with another {name} named {mine['words']}: its code, or a value that it uses, differs"
            else:
                yield f"with {name}={other['words']}, this run has {name}={mine['words']}"

    def _goes_on(self, epochs: int) -> bool:
        """Whether this run begins with that of fewer epochs: then the schedule's rates there are the same."""
        recipe = self.recipe
        if epochs > recipe.epochs:
            return False
        if recipe.schedule is None:
            return True
        return self._rates(replace(recipe, epochs=epochs), epochs) == self._rates(recipe, epochs)

    def _rates(self, recipe: Recipe, epochs: int) -> list[tuple[float, ...]]:
        """The learning rates of the first epochs by the recipe's schedule, if it is told nothing."""
        assert recipe.schedule is not None
        optimizer = recipe.optimizer(copy.deepcopy(self.model).named_parameters())
        steps = recipe.steps(len(self.data.train))
        schedule = recipe.schedule(optimizer, sum(steps))
        rates = []
        for _ in range(sum(steps[:epochs])):
            rates.append(tuple(float(group["lr"]) for group in optimizer.param_groups))
            if not isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                optimizer._opt_called = True  # type: ignore[attr-defined]  # else torch warns of the missing steps
                schedule.step()
        return rates


def _identified(name: str, value: Any) -> dict[str, str]:
    try:
        return {"words": describe(value), "fingerprint": fingerprint(value)}
    except Unfingerprintable as error:
        raise Unfingerprintable(
            f"checkpoint needs to know {name}={describe(value)} again another time: {error}"
        ) from error
