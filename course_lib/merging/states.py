"""What merging computes with: a network's weights and statistics by name, and networks made of such numbers.

==================  =================================================================================================
name                what it does
==================  =================================================================================================
``state_of``        the parameters and floating-point buffers of a network, by name
``with_state``      a copy of a network with other numbers in place of these
``check_alike``     refuses networks whose weights cannot be put in the same places
``combined``        a sum of several networks' numbers, each with its coefficient
``in_evaluation``   evaluation mode for a while, and then each part in the mode that it was in
==================  =================================================================================================
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import is_number, require

State = dict[str, Tensor]
"""Numbers by the name of the parameter or buffer that they belong to."""


def state_of(model: nn.Module) -> State:
    """Return the network's parameters and floating-point buffers by name, as they are: no copies, no gradients.

    Buffers of integers, such as batch norm's count of batches, have no mean and are left out. A parameter that is used
    in two places stands there once.
    """
    buffers = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    return parameters_of(model) | buffers


def parameters_of(model: nn.Module) -> State:
    """Return the parameters alone, by name."""
    return {name: value.detach() for name, value in model.named_parameters()}


@torch.no_grad()
def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of the network that has these numbers; what is not named is as in ``model``.

    The numbers are brought to the type and device of those whose place they take. Mode, frozen parts and buffers of
    integers are the network's.
    """
    made = copy.deepcopy(model)
    there = parameters_of(made) | dict(made.named_buffers())
    for name, value in state.items():
        there[name].copy_(value)
    return made


def check_alike(models: Sequence[nn.Module], names: Sequence[str] | None = None) -> list[nn.Module]:
    """Return the networks as a list, if the numbers of all have the same names, shapes and types.

    ``names`` are what the networks are called in messages, ``models[0]``, ``models[1]``, … by default.

    Raises
    ------
    ValueError : there are none, or one does not fit the first; the message names what.
    """
    found = list(models)
    require("models", found, bool, "at least one network")
    called = names or [f"models[{place}]" for place in range(len(found))]
    for name, model in zip(called, found, strict=True):
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name}={type(model).__name__}: must be a network")
    first = state_of(found[0])
    for name, model in zip(called, found, strict=True):
        other = state_of(model)
        if lacking := sorted(first.keys() ^ other.keys()):
            raise ValueError(f"{name} differs from {called[0]} in {lacking[0]!r}: must be of one architecture")
        for key, value in first.items():
            if value.shape != other[key].shape or value.dtype != other[key].dtype:
                raise ValueError(
                    f"{name} has {key!r} as {_kind(other[key])}, {called[0]} as {_kind(value)}: must be of one "
                    "architecture, width and type"
                )
    return found


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def check_share(**arguments: float) -> None:
    """Raise ValueError for the first argument that is no number from 0 to 1."""
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and 0 <= x <= 1, "a number from 0 to 1")


def check_not_negative(**arguments: float) -> None:
    """Raise ValueError for the first argument that is no number of 0 or more."""
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and x >= 0, "a number of at least 0")


def check_positive(**arguments: float) -> None:
    """Raise ValueError for the first argument that is no number above 0."""
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and x > 0, "a number above 0")


def shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """Return the weights of a mean of ``count`` things, equal ones by default.

    Raises
    ------
    ValueError : there are not so many, one is negative, or they do not sum to 1.
    """
    if weights is None:
        return [1 / count] * count
    found = list(weights)
    require("weights", found, lambda w: len(w) == count, f"as many numbers as there are networks, {count}")
    require("weights", found, lambda w: all(is_number(x) and x >= 0 for x in w), "numbers of at least 0")
    require("weights", found, lambda w: abs(sum(w) - 1) < 1e-6, f"numbers whose sum is 1, not {sum(found):g}")
    return found


def combined(states: Sequence[Mapping[str, Tensor]], coefficients: Sequence[float]) -> State:
    """Return the sum of states, each times its coefficient; half-precision numbers are summed in float32."""
    found = {}
    for name, first in states[0].items():
        total = torch.zeros_like(first, dtype=at_least_float32(first.dtype))
        for state, coefficient in zip(states, coefficients, strict=True):
            total.add_(state[name].to(total), alpha=coefficient)
        found[name] = total.to(first.dtype)
    return found


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which to sum numbers of this type."""
    return torch.promote_types(dtype, torch.float32)


def doubled(values: Tensor) -> Tensor:
    """The same in float64, or float32 on Apple's GPUs, which have no more."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


@contextmanager
def in_evaluation(*models: nn.Module) -> Iterator[None]:
    """Within it the networks are in evaluation mode; afterwards each part is in the mode that it was in."""
    modes = [(part, part.training) for model in models for part in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def home(model: nn.Module) -> Tensor:
    """A tensor on the network's device and of its type."""
    for value in state_of(model).values():
        return value
    return torch.zeros(())


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Return the layers that keep running statistics, by name."""
    norms = nn.modules.batchnorm._BatchNorm
    return {name: part for name, part in model.named_modules() if isinstance(part, norms) and part.track_running_stats}


def flat(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> Tensor:
    """All numbers of a state one after the other, ``[n]``, in the order of its names."""
    return torch.cat([state[name].flatten() for name in (state if names is None else names)])
