"""What all optimizers share: groups, state, closures, checks at the door, and one rule for one tensor or many.

A rule such as ``adam(theta, g, m, v, …)`` is written as if for one tensor. On a CPU it gets one tensor at a time, so
that the tensor stays in the cache from the rule's first line to its last. On an accelerator it gets all tensors at
once, as ``Tensors``: a few large kernels instead of thousands of small ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from course_lib.lab.arguments import is_number, is_whole, require

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Closure = Callable[[], Any]


class Tensors(list[Tensor]):
    """A list of tensors that computes like one tensor.

    ``x.mul_(2)`` is ``torch._foreach_mul_(x, 2)``: every tensor method of which torch has such a batched form works.

    >>> Tensors([torch.ones(2), torch.ones(3)]).mul_(2).sqrt()
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        foreach = getattr(torch, f"_foreach_{name}", None)
        if foreach is None:
            raise AttributeError(f"torch has no batched form of {name!r} (torch._foreach_{name})")

        def apply(*args: Any, **kwargs: Any) -> Tensors:
            result = foreach(self, *args, **kwargs)
            return self if name.endswith("_") else Tensors(result)

        return apply


class Method(Optimizer):
    """An optimizer whose subclass says what state a parameter has (`prepare`) and how it moves (`update`).

    Parameters without a gradient are left alone. Settings are read from the group at every step, so that a schedule
    may change them.

    Raises
    ------
    ValueError
        When a setting is out of its range, for the optimizer or for one group; it names argument, value and range.
    """

    sees_whole_tensors = False
    """Whether the rule needs a tensor's shape or norm, so that many cannot be batched."""

    def state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the tensors kept for each parameter; all start at zero."""
        return ()

    def prepare(self, state: dict[str, Any], theta: Tensor, group: dict[str, Any]) -> None:
        """Create what is missing from the state of one parameter."""
        for name in self.state_names(group):
            if name not in state:
                state[name] = torch.zeros_like(theta)

    def update(self, theta: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move ``theta`` in place; ``state["step"]`` counts from 1."""
        raise NotImplementedError

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError when a group's settings are out of range."""
        for name, value in group.items():
            if name in ALLOWED:
                require(name, value, *ALLOWED[name])
        for theta in group["params"]:
            if theta.is_complex():
                raise ValueError(f"params holds a {theta.dtype} tensor; only real parameters can be optimized")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; a ``closure`` is called once, with gradients on, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [theta for theta in group["params"] if theta.grad is not None]
            for theta in params:
                refuse_sparse(self, theta)
                state = self.state[theta]
                self.prepare(state, theta, group)
                state["step"] = state.get("step", 0) + 1
            for theta, g, state in self._batches(params):
                self.update(theta, g.neg() if group.get("maximize") else g, state, group)
        return loss

    def _batches(self, params: list[Tensor]) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
        batches = defaultdict(list)
        for theta in params:
            if self.sees_whole_tensors or not all_at_once(theta.device):
                yield theta, theta.grad, self.state[theta]
            else:
                batches[theta.device, theta.dtype, self.state[theta]["step"]].append(theta)
        for (_, _, step), thetas in batches.items():
            names = self.state[thetas[0]].keys() - {"step"}
            state = {name: Tensors(self.state[theta][name] for theta in thetas) for name in names}
            yield (
                Tensors(thetas),
                Tensors(theta.grad for theta in thetas if theta.grad is not None),
                {"step": step, **state},
            )


def all_at_once(device: torch.device) -> bool:
    """Whether a rule should get all tensors of a device at once."""
    return device.type != "cpu"


def refuse_sparse(optimizer: Optimizer, theta: Tensor) -> None:
    """Raise RuntimeError when the gradient of a parameter is not dense."""
    if theta.grad is not None and theta.grad.layout is not torch.strided:
        raise RuntimeError(
            f"{type(optimizer).__name__} needs dense gradients, but a parameter of shape {tuple(theta.shape)} has a "
            f"{theta.grad.layout} one; build its embedding with sparse=False"
        )


def is_count(value: Any) -> bool:
    """Whether a value is an integer of at least 1."""
    return is_whole(value) and value >= 1


NON_NEGATIVE = (lambda x: is_number(x) and x >= 0, "a finite number >= 0")
POSITIVE = (lambda x: is_number(x) and x > 0, "a finite number > 0")
FRACTION = (lambda x: is_number(x) and 0 <= x <= 1, "a number from 0 to 1")
COUNT = (is_count, "an integer >= 1")
FLAG = (lambda x: isinstance(x, bool), "True or False")
BETAS = (
    lambda x: isinstance(x, tuple | list) and len(x) == 2 and all(is_number(beta) and 0 <= beta < 1 for beta in x),
    "two numbers, each >= 0 and < 1",
)
COEFFICIENTS = (
    lambda x: isinstance(x, tuple | list) and len(x) == 3 and all(is_number(c) for c in x),
    "three finite numbers",
)
ADJUSTMENT = (
    lambda x: x is None or x in ("original", "match_rms_adamw"),
    'None, "original" or "match_rms_adamw"',
)

# One meaning a word, whichever optimizer takes it.
ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": NON_NEGATIVE,
    "weight_decay": NON_NEGATIVE,
    "lr_decay": NON_NEGATIVE,
    "initial_accumulator_value": NON_NEGATIVE,
    "eps": NON_NEGATIVE,
    "matrix_eps": POSITIVE,
    "momentum": FRACTION,
    "dampening": FRACTION,
    "alpha": FRACTION,
    "betas": BETAS,
    "ns_coefficients": COEFFICIENTS,
    "ns_steps": (lambda x: is_count(x) and x < 100, "an integer from 1 to 99"),
    "adjust_lr_fn": ADJUSTMENT,
    "precondition_frequency": COUNT,
    "max_precondition_dim": COUNT,
    "nesterov": FLAG,
    "centered": FLAG,
    "amsgrad": FLAG,
    "maximize": FLAG,
}


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps, those of a wrapped optimizer included.

    The state appears with the first step: before it, the answer is 0.
    """

    def size(value: Any) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if isinstance(value, dict):
            return sum(size(part) for part in value.values())
        if isinstance(value, list | tuple):
            return sum(size(part) for part in value)
        return 0

    return size(optimizer.state_dict())
