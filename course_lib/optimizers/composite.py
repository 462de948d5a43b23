"""Several optimizers at work on one network, each on its own parameters."""

from __future__ import annotations

import copyreg
from typing import Any

from torch.optim import Optimizer

from course_lib.optimizers._method import Closure
from course_lib.optimizers.wrappers import SAM


class Composite(Optimizer):
    """Optimizers that share out a network: ``Composite(Muon(matrices, lr=0.02), AdamW(the_rest, lr=0.003))``.

    It has the groups of all its parts, so that a schedule reaches each of them. The parts step one after the other
    with the gradients of one pass.
    """

    def __init__(self, *parts: Optimizer) -> None:
        if not parts or not all(isinstance(part, Optimizer) for part in parts):
            raise ValueError(f"parts is {parts!r}; it must be one or more optimizers")
        if any(isinstance(part, SAM) for part in parts):
            raise ValueError(
                "parts holds a SAM, which needs a gradient pass of its own; wrap it around: SAM(Composite(…))"
            )
        seen: set[int] = set()
        for part in parts:
            own = {id(theta) for group in part.param_groups for theta in group["params"]}
            if seen & own:
                raise ValueError(f"parts share {len(seen & own)} parameters; each must belong to one optimizer")
            seen |= own
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, the very same dictionaries."""
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        pass  # Optimizer.__init__ starts with a list of its own; there are only the parts' here

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not any(param_group is known for known in self.param_groups):
            raise ValueError("a Composite has the groups of its parts; add the group to one of the parts")

    def step(self, closure: Closure | None = None) -> Any:
        """Take one step of each part; a ``closure`` is called once, by the first."""
        loss = self.parts[0].step(closure)
        for part in self.parts[1:]:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict.get("parts", [])
        if len(states) != len(self.parts):
            raise ValueError(f"state_dict holds the state of {len(states)} parts; it must be {len(self.parts)}")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def _stored(composite: Composite) -> tuple[type[Composite], tuple[Optimizer, ...]]:
    return Composite, composite.parts


# A copy (``copy.deepcopy``, ``pickle``) is made of copies of the parts, which hold all there is.
copyreg.pickle(Composite, _stored)
