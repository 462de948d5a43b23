"""Units and groups: which rows and columns of which layers belong together.

====================  ===============================================================================================
``channel_groups``    the groups of channels of a network, their members, and why some have to stay as they are
``follow``            the same as units and labels, for those who cut or reorder them
====================  ===============================================================================================

A *unit* is the smallest part that can be cut out of a network, or change places with another: a filter with its bias,
its entry in the batch norm and the columns of the next layer that read it; where layers are added, that in all of them;
a head of attention with its queries, keys and values. A *group* is all units with the same members, such as the
channels of one residual stream.

Source: groups of coupled channels, Fang et al. 2023 (DepGraph, arXiv 2301.12900).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from course_lib.lab.tracing.attention import open_attention
from course_lib.lab.tracing.labels import Labelling, compact
from course_lib.lab.tracing.operations import CannotShrink, Inputs, tensors_in, trace


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter or buffer of a layer.

    ``indices`` ``[units, n]`` tells which ``n`` indices of dimension ``dim`` belong to each unit of the group;
    ``makes`` whether they are the rows of a weight, which make the units (and not its columns, which read them).
    """

    layer: str
    parameter: str
    dim: int
    makes: bool
    indices: Tensor = field(repr=False)

    @property
    def name(self) -> str:
        """The qualified name, such as ``features.0.weight``."""
        return f"{self.layer}.{self.parameter}" if self.layer else self.parameter


@dataclass(frozen=True)
class ChannelGroup:
    """Units that have the same members, named after the first layer that makes them.

    ``why_not`` says why none of them can be pruned, and is None where they can.
    """

    name: str
    units: int
    members: tuple[Member, ...] = field(repr=False)
    why_not: str | None = None


# --- From labels to units ---------------------------------------------------------------------------------------------


@dataclass
class Channels:
    """The units of a network: ``unit`` ``[labels]`` is the unit of each label, ``fixed`` those that stay, and why."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    labelling: Labelling
    unit: Tensor
    fixed: dict[int, str]


@torch.no_grad()
def follow(model: nn.Module, example_input: Inputs, keep: Collection[str] = ()) -> Channels:
    """Follow the channels through ``model`` itself, which is in evaluation mode then, its attention opened.

    Hand it a copy. Layers whose weight is computed by a parametrization cannot be followed: make them ordinary before.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"example_input is a {type(example_input).__name__}: must be a tensor or a tuple of tensors")
    work = open_attention(model, keep).eval()
    labelling = Labelling(work, inputs, keep)
    _refuse_training_only(work, inputs, labelling)
    unit = _components(labelling)
    while _tie_to_boxes(labelling, unit):
        unit = _components(labelling)
    fixed = {int(unit[0]): "it has a fixed size"}
    for labels, why in labelling.stays:
        fixed |= {u: why for u in unit[labels].tolist() if u not in fixed}
    _lay_out_free_parameters(labelling, unit, fixed)
    made = {u for key in labelling.rows for u in unit[labelling.axes[key]].tolist()}
    fixed |= {u: "no layer makes it" for u in range(int(unit.max()) + 1) if u not in made and u not in fixed}
    return Channels(work, inputs, labelling, unit, fixed)


def _components(labelling: Labelling) -> Tensor:
    """Return the unit of each label: labels are in one unit if a chain of ties connects them."""
    first, second = torch.cat([torch.empty(2, 0, dtype=torch.long), *labelling.ties], dim=1).numpy()
    ties = coo_matrix((first >= 0, (first, second)), shape=(labelling.count, labelling.count))
    return torch.from_numpy(connected_components(ties, directed=False)[1]).long()


def _tie_to_boxes(labelling: Labelling, unit: Tensor) -> bool:
    """Where channels lie along several dimensions, let them go by slices of the longest. Tells whether this tied any.

    What is left of a tensor has to be a tensor. ``[2, 8]`` with a unit in each place can lose columns, or a row.
    """
    ties = len(labelling.ties)
    for node, result in labelling.of.items():
        for labels in tensors_in(result):
            units = unit[compact(labels)]
            spread = [dim for dim in range(units.dim()) if (units != units.narrow(dim, 0, 1)).any()]
            if len(spread) > 1:
                spread.remove(max(spread, key=lambda dim: units.shape[dim]))
                labelling.node = node
                labelling.mixed(labels, spread)
    return len(labelling.ties) > ties


def _refuse_training_only(work: nn.Module, inputs: tuple[Tensor, ...], labelling: Labelling) -> None:
    """Refuse layers that only training uses (auxiliary classifiers): what they read would be cut unseen."""
    unseen = {name for name, _ in work.named_parameters()} - {name for name, _ in labelling.traced.named_parameters()}
    if not unseen:
        return
    try:
        training = trace(work.train(), inputs, labelling.keep)
    except CannotShrink:
        return  # cannot be told
    finally:
        work.eval()
    for name, _ in training.named_parameters():
        if name in unseen:
            layer = name.rpartition(".")[0]
            raise CannotShrink(f"{layer} works in training only, where channels are not followed: take it out first")


def _lay_out_free_parameters(labelling: Labelling, unit: Tensor, fixed: dict[int, str]) -> None:
    """Find the dimension along which the units lie in each parameter that is used outside any layer."""
    for key, labels in labelling.free.items():
        units = unit[labels]
        if (units == units.flatten()[:1]).all():
            continue  # all of it belongs to one unit: nothing to cut
        columns = [units.movedim(dim, 0).reshape(units.shape[dim], -1) for dim in range(units.dim())]
        along = [dim for dim, rows in enumerate(columns) if (rows == rows[:, :1]).all()]
        if along and (key, along[0]) not in labelling.axes:
            labelling.axes[key, along[0]] = labels.movedim(along[0], 0).reshape(labels.shape[along[0]], -1)[:, 0]
        else:
            why = f"{labelling.names[key][0]} is not laid out by channels"
            fixed |= {u: why for u in units.unique().tolist() if u not in fixed}


def channel_groups(model: nn.Module, example_input: Inputs, *, keep: Collection[str] = ()) -> list[ChannelGroup]:
    """Return the groups of channels of a network, in the order of its layers.

    Layers inside an ``nn.MultiheadAttention`` are named as in ``open_attention``, which see.

    Parameters
    ----------
    example_input : what the model can be called with, a tensor or a tuple of tensors; one example is enough.
    keep : names of modules that are left as they are, with everything that enters and leaves them; they need not be
        traceable.

    Raises
    ------
    CannotShrink : channels cannot be followed through an operation; the message names it.
    """
    return groups_of(follow(copy.deepcopy(model), example_input, keep))


def groups_of(channels: Channels) -> list[ChannelGroup]:
    """Return the groups of channels that were followed already."""
    labelling = channels.labelling
    order = {key: position for position, key in enumerate(labelling.names)}
    axes = sorted(labelling.axes, key=lambda axis: (order[axis[0]], axis[1]))
    signatures: dict[int, list[tuple[tuple[int, int], int]]] = defaultdict(list)
    for axis in axes:
        units, counts = channels.unit[labelling.axes[axis]].unique(return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            signatures[unit].append((axis, count))
    together: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for unit, signature in signatures.items():
        if any(axis in labelling.rows for axis, _ in signature):
            together[(*signature, channels.fixed.get(unit))].append(unit)
    groups = [_group(channels, [axis for axis, _ in signatures[units[0]]], units) for units in together.values()]
    seen: dict[str, int] = defaultdict(int)
    for position, group in enumerate(groups):
        seen[group.name] += 1
        if seen[group.name] > 1:  # one layer whose channels go different ways
            groups[position] = ChannelGroup(
                f"{group.name}#{seen[group.name]}", group.units, group.members, group.why_not
            )
    return groups


def _group(channels: Channels, axes: Sequence[tuple[int, int]], units: list[int]) -> ChannelGroup:
    labelling = channels.labelling
    first = next(axis for axis in axes if axis in labelling.rows)
    number = torch.full((int(channels.unit.max()) + 1,), -1)  # of each unit in the group, by the first layer's rows
    inside = set(units)
    in_order = dict.fromkeys(u for u in channels.unit[labelling.axes[first]].tolist() if u in inside)
    number[list(in_order)] = torch.arange(len(units))
    members = []
    for key, dim in axes:
        of_index = number[channels.unit[labelling.axes[key, dim]]]
        sorted_ = torch.argsort(of_index, stable=True)[(of_index < 0).sum() :]
        layer, _, parameter = labelling.names[key][0].rpartition(".")
        members.append(Member(layer, parameter, dim, (key, dim) in labelling.rows, sorted_.view(len(units), -1)))
    why_not = channels.fixed.get(units[0])
    if why_not is None and len(units) == 1:
        mixer = next((where for label, where in labelling.mixers if int(channels.unit[label]) == units[0]), None)
        why_not = f"{mixer} mixes all of it" if mixer else "it has one unit only"
    return ChannelGroup(labelling.names[first[0]][0].rpartition(".")[0], len(units), tuple(members), why_not)
