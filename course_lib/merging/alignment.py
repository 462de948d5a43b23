r"""The same network with its units in another order: which orders there are, and which of them suits another network.

=========================  ============================================  ==============================================
name                       what it gives                                 source
=========================  ============================================  ==============================================
``permutation_groups``     the units that can change places              ``lab.tracing``
``permute``                the network with its units in another order   –
``match_weights``          the order whose weights are nearest to        Ainsworth, Hayase & Srinivasa 2022 (Git
                           another network's                             Re-Basin), arXiv:2209.04836, algorithm 1
``match_activations``      the order in which units do what those of     Li et al. 2015, arXiv:1511.07543; Tatro et
                           another network do                            al. 2020, arXiv:2009.02439
``weight_similarity``      what the first maximises
``unit_correlations``      what the second looks at
=========================  ============================================  ==============================================

Units whose order is one (all channels of a residual stream, say) are a group: rows that make them, columns that read
them, biases and norms move together. An order is ``{group: indices}``: unit i of the new network is unit
``indices[i]`` of the old. The function stays as it was, but for rounding: sums are in another order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Split, batches
from course_lib.lab.tracing import (
    BATCH_NORMS,
    CONVOLUTIONS,
    ChannelGroup,
    Inputs,
    Member,
    channel_groups,
    open_attention,
)
from course_lib.merging.states import State, check_alike, doubled, home, parameters_of, state_of, with_state

Orders = dict[str, Tensor]
"""For each group of units the order that they take, int64 ``[units]``."""


def example_of(model: nn.Module, example_input: Inputs | None = None) -> Inputs:
    """Return the example, or for a network of the laboratory one of zeros.

    Raises
    ------
    ValueError : no example is given, and the network does not tell what it takes.
    """
    if example_input is not None:
        return example_input
    shape = getattr(model, "input_shape", None)
    if shape is None:
        raise ValueError(f"example_input=None: must be given for {type(model).__name__}, which has no input_shape")
    return home(model).new_zeros((2, *shape))


def permutation_groups(model: nn.Module, example_input: Inputs | None = None) -> list[ChannelGroup]:
    """Return the groups of units that can change places, of a network of the laboratory or with an example input.

    Layers inside an ``nn.MultiheadAttention`` are named as ``lab.tracing.open_attention`` names them, and networks
    that are permuted come back with it opened; ``permute(a, {})`` opens the network that they are to be merged with.

    Raises
    ------
    CannotShrink : the network cannot be followed; the message names the operation.
    ValueError : there is no group whose units can change places.
    """
    found = [group for group in channel_groups(model, example_of(model, example_input)) if group.why_not is None]
    require("model", type(model).__name__, lambda _: bool(found), "a network with units that can change places")
    return found


# --- Another order ----------------------------------------------------------------------------------------------------


def permute(model: nn.Module, orders: Mapping[str, Tensor], example_input: Inputs | None = None) -> nn.Module:
    """Return the network with the units of the named groups in another order; it computes the same.

    Raises
    ------
    ValueError : a name is that of no group, or an order has not each unit's number once.
    """
    groups = {group.name: group for group in permutation_groups(model, example_input)}
    for name, order in orders.items():
        require("orders", name, lambda n: n in groups, f"orders of {', '.join(groups)}")
        _check_order(groups[name], order)
    made = opened(model)
    moved = dict(state_of(made))
    for name, order in orders.items():
        reorder(moved, groups[name], order)
    return with_state(made, moved)


def opened(model: nn.Module) -> nn.Module:
    """Return a copy of the network whose attention can be followed."""
    return open_attention(copy.deepcopy(model))


def _check_order(group: ChannelGroup, order: Tensor) -> None:
    numbers = torch.arange(group.units)
    if not isinstance(order, Tensor) or not torch.equal(order.cpu().sort().values, numbers):
        raise ValueError(f"orders[{group.name!r}]={order!r:.60}: must have each of 0 to {group.units - 1} once")


def reorder(state: State, group: ChannelGroup, order: Tensor) -> None:
    """Let the units of one group take another order in a state, in which the tensors of its members are replaced."""
    for member in group.members:
        if member.name in state:
            value = state[member.name]
            goes, comes = (i.flatten().to(value.device) for i in (member.indices, member.indices[order.cpu()]))
            state[member.name] = value.index_copy(member.dim, goes, value.index_select(member.dim, comes))


def by_unit(values: Tensor, member: Member) -> Tensor:
    """What a member's parameter has for each unit: ``[units, rest]``."""
    along = values.movedim(member.dim, 0).reshape(values.shape[member.dim], -1)
    return along[member.indices.to(values.device)].flatten(1)


# --- By weights -------------------------------------------------------------------------------------------------------


def weight_similarity(a: nn.Module, b: nn.Module) -> float:
    r"""Return the inner product :math:`\langle\theta_a,\theta_b\rangle` over all parameters.

    The larger it is the nearer the networks: of all orders :math:`\|\theta_a\|` and :math:`\|\theta_b\|` are the same.
    """
    theirs = parameters_of(b)
    own = parameters_of(a).items()
    return sum(float((doubled(value) * doubled(theirs[name].to(value.device))).sum()) for name, value in own)


def match_weights(
    a: nn.Module,
    b: nn.Module,
    *,
    generator: torch.Generator,
    sweeps: int = 100,
    example_input: Inputs | None = None,
) -> Orders:
    """Return the orders in which the units of ``b`` have weights near those of ``a``: ``permute(b, orders)``.

    One group after the other gets its best order while the others stay (a linear assignment), in an order of groups
    that the ``generator`` draws, until no sweep helps any more. The similarity rises at each move. With one group the
    result is the best there is; with several it can be a local optimum, and other seeds give others. In float64 on
    the CPU.

    Raises
    ------
    ValueError : the networks are of different shapes, or ``sweeps`` is below 1.
    CannotShrink : see ``permutation_groups``.
    """
    models = check_alike([opened(a), opened(b)], ["a", "b"])
    at_least(1, sweeps=sweeps)
    groups = permutation_groups(a, example_input)
    fixed, moved = (_parameters_on_cpu(model) for model in models)
    orders = {group.name: torch.arange(group.units) for group in groups}
    for _ in range(sweeps):
        helped = False
        for place in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[place]
            order = best_assignment(_unit_similarity(fixed, moved, group))
            tried = dict(moved)
            reorder(tried, group, order)
            # a group may lie along both sides of one weight, where the assignment is no more than a good guess
            if _gain(fixed, moved, tried) > 0:
                moved, helped = tried, True
                orders[group.name] = orders[group.name][order]
        if not helped:
            break
    return orders


def _parameters_on_cpu(model: nn.Module) -> State:
    return {name: value.cpu().double() for name, value in parameters_of(model).items()}


def _unit_similarity(fixed: State, moved: State, group: ChannelGroup) -> Tensor:
    """The inner product of each unit of the one with each of the other: ``[units, units]``."""
    total = torch.zeros(group.units, group.units, dtype=torch.float64)
    for member in group.members:
        if member.name in fixed:
            total += by_unit(fixed[member.name], member) @ by_unit(moved[member.name], member).mT
    return total


def _gain(fixed: State, before: State, after: State) -> float:
    """How much nearer the weights have come, if by more than rounding."""
    changed = [name for name, value in after.items() if value is not before[name]]
    gain = sum(float((fixed[name] * (after[name] - before[name])).sum()) for name in changed)
    size = sum(float((fixed[name] * after[name]).abs().sum()) for name in changed)
    return gain if gain > 1e-12 * size else 0.0


def best_assignment(similarity: Tensor) -> Tensor:
    """Return for each row the column that it gets where each gets one and the sum is largest: int64 ``[n]``."""
    _, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)


# --- By activations ---------------------------------------------------------------------------------------------------


def match_activations(
    a: nn.Module, b: nn.Module, split: Split, *, batch_size: int = 256, example_input: Inputs | None = None
) -> Orders:
    """Return the orders in which the units of ``b`` correlate with those of ``a``: ``permute(b, orders)``.

    Each group for itself gets the assignment with the largest sum of ``unit_correlations``.

    Raises
    ------
    ValueError : the networks are of different shapes, or ``batch_size`` is below 1.
    CannotShrink : see ``permutation_groups``.
    """
    found = unit_correlations(a, b, split, batch_size=batch_size, example_input=example_input)
    return {name: best_assignment(correlation) for name, correlation in found.items()}


def unit_correlations(
    a: nn.Module, b: nn.Module, split: Split, *, batch_size: int = 256, example_input: Inputs | None = None
) -> dict[str, Tensor]:
    """Return how each unit of ``a`` correlates with each of ``b`` over a split, by group: ``[units, units]``.

    In evaluation mode, over examples and places, before the activation: of what the group's norms give, or where it
    has none, the layers that make it; the mean over these, and over the channels of a unit that has several. A unit
    that never changes correlates with none.
    """
    models = check_alike([opened(a).eval(), opened(b).eval()], ["a", "b"])
    at_least(1, batch_size=batch_size)
    require("split", split, lambda s: len(s) > 0, "a split with examples")
    groups = permutation_groups(a, example_input)
    places = {group.name: speaking(models[0], group) for group in groups}
    layers = sorted({layer for found in places.values() for layer in found})
    sums: dict[str, list[Tensor]] = {}
    where = home(models[0])
    with torch.no_grad():
        for x, _ in batches(split.to(where.device), batch_size, dtype=where.dtype):
            said = [outputs(model, layers, x) for model in models]
            for layer in layers:
                _add_moments(sums, layer, doubled(said[0][layer]), doubled(said[1][layer]))
    found = {}
    for group in groups:
        correlations = [_of_units(_correlation(sums[layer]), places[group.name][layer]) for layer in places[group.name]]
        found[group.name] = torch.stack(correlations).mean(0) if correlations else torch.eye(group.units)
    return found


def speaking(model: nn.Module, group: ChannelGroup) -> dict[str, Tensor]:
    """Return the layers whose outputs are a group's units, with the channels ``[units, n]`` of each unit there."""
    parts = dict(model.named_modules())
    norms = {m.layer: m.indices for m in group.members if isinstance(parts[m.layer], BATCH_NORMS)}
    makers = {
        m.layer: m.indices for m in group.members if m.makes and isinstance(parts[m.layer], (nn.Linear, *CONVOLUTIONS))
    }
    return norms or makers


def outputs(model: nn.Module, layers: list[str], x: Any) -> dict[str, Tensor]:
    """Return what the named layers give on a batch, channels last: ``[rows, channels]``."""
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [model.get_submodule(name).register_forward_hook(partial(_keep, found[name])) for name in layers]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(each) for name, each in found.items()}


def _keep(found: list[Tensor], layer: nn.Module, inputs: Any, output: Tensor) -> None:
    found.append(as_rows(layer, output))


def as_rows(layer: nn.Module, output: Tensor) -> Tensor:
    """A layer's output with one row an example and place: ``[N, C, H, W]`` or ``[N, …, C]`` to ``[rows, C]``."""
    last = output if isinstance(layer, nn.Linear) or output.dim() == 2 else output.movedim(1, -1)
    return last.reshape(-1, last.shape[-1])


def _add_moments(sums: dict[str, list[Tensor]], layer: str, a: Tensor, b: Tensor) -> None:
    count = torch.tensor(float(len(a)), dtype=a.dtype, device=a.device)
    new = [count, a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), a.mT @ b]
    sums[layer] = [old + more for old, more in zip(sums[layer], new, strict=True)] if layer in sums else new


def _correlation(moments: list[Tensor]) -> Tensor:
    """Pearson's correlation of each channel with each, ``[C, C]``; 0 where one never changes."""
    count, a, b, aa, bb, ab = moments
    spread = [(squares / count - (total / count).square()).clamp_min(0) for squares, total in ((aa, a), (bb, b))]
    scale = torch.outer(spread[0], spread[1]).sqrt()
    # what is left of a constant after rounding is no spread
    constant = torch.outer(spread[0] > 1e-12 * aa / count, spread[1] > 1e-12 * bb / count).logical_not()
    covariance = ab / count - torch.outer(a / count, b / count)
    return torch.where(constant, 0, covariance / torch.where(constant, 1, scale))


def _of_units(correlation: Tensor, indices: Tensor) -> Tensor:
    """The mean over the channels of each unit, each with its like: ``[C, C]`` to ``[units, units]``."""
    at = indices.to(correlation.device)
    return torch.stack([correlation[channel][:, channel] for channel in at.mT]).mean(0)
