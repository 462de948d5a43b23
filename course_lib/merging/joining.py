r"""Several small networks side by side in one wide one.

===========  ==========================================================================================================
``join``     one network of the same architecture, whose logits are the mean of theirs
===========  ==========================================================================================================

The hidden weights are block-diagonal: each network's units see its own alone. The input layers stand one above the
other, the last layers side by side, divided by their number. Trained on, the zeros beside the blocks come alive, and
the networks begin to talk to one another.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import require
from course_lib.lab.tracing import IS_OUTPUT, CannotShrink, ChannelGroup, Inputs, channel_groups
from course_lib.merging.alignment import example_of
from course_lib.merging.sizes import answers, check_answers, put, recount
from course_lib.merging.states import home, parameters_of, state_of


@torch.no_grad()
def join(models: Sequence[nn.Module], *, example_input: Inputs | None = None) -> nn.Module:
    r"""Return one network with the units of all, whose logits are :math:`\tfrac1M\sum_mz_m(x)`, in both modes.

    The networks are of one architecture; their widths may differ. Parameters that touch no units (the last layer's
    bias) are averaged. Networks that mix all units, as layer norm does, cannot be joined.

    Raises
    ------
    ValueError : there are no networks, or they are of different architectures.
    CannotShrink : a network cannot be followed, mixes its units, or the joint one computes something else.
    """
    found = list(models)
    require("models", found, bool, "at least one network")
    example = example_of(found[0], example_input)
    groups = [channel_groups(model, example_of(model, example_input)) for model in found]
    where = home(found[0]).device
    states = [{name: value.to(where) for name, value in state_of(model).items()} for model in found]
    ways = [_axes(each) for each in groups]
    for place, (state, way) in enumerate(zip(states, ways, strict=True)):
        if state.keys() != states[0].keys() or way != ways[0]:
            raise ValueError(f"models[{place}] differs from models[0]: must be networks of one architecture")
    for group in groups[0]:
        if group.why_not not in (None, IS_OUTPUT):
            raise CannotShrink(f"models cannot be joined: the units of {group.name} do not go apart, {group.why_not}")
    wanted = torch.stack([answers(model, example).to(where) for model in found]).mean(0)
    last = {member.layer for group in groups[0] if group.why_not for member in group.members}
    made = copy.deepcopy(found[0])
    reading = {name for name in parameters_of(made) if name.rpartition(".")[0] in last}
    for name in states[0]:
        values = [state[name] for state in states]
        dims = ways[0].get(name, set())
        if name in reading and dims:
            values = [value / len(found) for value in values]
        put(made, name, _blocks(values, dims) if dims else torch.stack(values).mean(0))
    recount(made)
    check_answers(wanted, made, example, "models cannot be joined")
    return made


def _axes(groups: Sequence[ChannelGroup]) -> dict[str, set[int]]:
    """For each tensor the dimensions along which units lie that go apart."""
    found: dict[str, set[int]] = {}
    for group in groups:
        for member in group.members:
            if group.why_not is None:
                found.setdefault(member.name, set()).add(member.dim)
    return found


def _blocks(values: Sequence[Tensor], dims: set[int]) -> Tensor:
    """Tensors one behind the other along some dimensions at once, zeros beside them."""
    shape = [sum(v.shape[d] for v in values) if d in dims else values[0].shape[d] for d in range(values[0].dim())]
    whole = values[0].new_zeros(shape)
    starts = [0] * len(shape)
    for value in values:
        place = tuple(
            slice(s, s + n) if d in dims else slice(None)
            for d, (s, n) in enumerate(zip(starts, value.shape, strict=True))
        )
        whole[place] = value.to(whole)
        starts = [s + n for s, n in zip(starts, value.shape, strict=True)]
    return whole
