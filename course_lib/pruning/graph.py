"""Pruning whole units: how important each is, and masks on every layer that it touches.

====================  ===============================================================================================
``channel_groups``    the groups of channels of a network, masked or not (see ``lab/tracing``)
``group_scores``      how important each unit of a group is
``prune_channels``    prune whole units, in every layer that they touch
====================  ===============================================================================================

Sources: structured pruning by the norm of filters, Li et al. 2016 (arXiv 1608.08710); groups of coupled channels and
their importance, Fang et al. 2023 (DepGraph, arXiv 2301.12900).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from course_lib.lab import tracing
from course_lib.lab.arguments import at_least
from course_lib.lab.tracing import ChannelGroup, Channels, Inputs, Member, groups_of, open_attention
from course_lib.pruning.masks import PRUNABLE, apply_masks, get_masks, make_permanent


def follow(model: nn.Module, example_input: Inputs, keep: Collection[str] = ()) -> Channels:
    """Follow the channels through a copy of ``model``: in evaluation mode, its masks made permanent."""
    return tracing.follow(make_permanent(copy.deepcopy(model)), example_input, keep)


def channel_groups(model: nn.Module, example_input: Inputs, *, keep: Collection[str] = ()) -> list[ChannelGroup]:
    """Return the groups of channels of a network, in the order of its layers; see ``course_lib.lab.tracing``.

    Raises
    ------
    CannotShrink : channels cannot be followed through an operation; the message names it.
    """
    return groups_of(follow(model, example_input, keep))


# --- Importance -------------------------------------------------------------------------------------------------------


def group_scores(
    model: nn.Module, groups: Iterable[ChannelGroup], scores: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    r"""Return the importance of each unit, ``[units]`` for each group: its mean over members, 1 on average in a group.

    .. math:: I_u = \frac{1}{|M|} \sum_{m \in M} \sum_{w \in m_u} w^2, \qquad \text{divided by the mean of all } I_u

    over the members :math:`M` that are weights of layers and norms (the group magnitude of Fang et al. 2023). With
    ``scores`` (layer name -> a score for each weight, as the criteria give them) these stand in place of :math:`w^2`,
    and only their layers count.
    """
    found = {}
    for group in groups:
        parts = []
        for member in group.members:
            if member.parameter == "weight" and (scores is None or member.layer in scores):
                weight: Tensor = model.get_submodule(member.layer).weight  # type: ignore[assignment]
                parts.append(per_unit(weight.detach().square() if scores is None else scores[member.layer], member))
        if not parts:
            raise ValueError(f"scores has none of the layers of {group.name!r}: must have at least one")
        importance = torch.stack(parts).mean(0)
        found[group.name] = importance / importance.mean().clamp_min(torch.finfo(importance.dtype).tiny)
    return found


def per_unit(values: Tensor, member: Member) -> Tensor:
    """Sum what a member's parameter has in each unit: ``[units]``."""
    along = values.movedim(member.dim, 0).reshape(values.shape[member.dim], -1).sum(1)
    return along[member.indices.to(along.device)].sum(1)


# --- Pruning ----------------------------------------------------------------------------------------------------------


def prune_channels(
    model: nn.Module,
    example_input: Inputs,
    sparsity: float,
    *,
    scores: Mapping[str, Tensor] | None = None,
    scope: Literal["layer", "global"] = "layer",
    groups: Collection[str] | None = None,
    round_to: int = 1,
    keep: Collection[str] = (),
) -> nn.Module:
    """Prune the least important units in place, by masks on every layer that they touch. Returns the model.

    Rows that make a unit, columns that read it, its biases and its entries in norms all become zero. So no gradient
    reaches it any more and it stays dead through training; ``shrink`` then cuts it out. No group loses all its units.
    An ``nn.MultiheadAttention`` is opened (``open_attention``), so that heads are units: its four maps become layers.

    Parameters
    ----------
    sparsity : the fraction of units to prune, those pruned before included.
    scores : see ``group_scores``; the squared weights by default.
    scope : ``"layer"`` prunes the same fraction of each group, ``"global"`` the least important units of all groups.
    groups : names of the groups to prune; all that can be by default.
    round_to : what is left of a group is a multiple of this many channels, as kernels prefer (8, say).
    keep : see ``channel_groups``.

    Raises
    ------
    ValueError : an argument is out of range, or there is nothing to prune.
    CannotShrink : see ``channel_groups``.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r}: must be at least 0 and less than 1")
    if scope not in ("layer", "global"):
        raise ValueError(f"scope={scope!r}: must be 'layer' or 'global'")
    at_least(1, round_to=round_to)
    channels = follow(model, example_input, keep)
    prunable = {group.name: group for group in groups_of(channels) if group.why_not is None}
    if unknown := sorted(set(groups or ()) - set(prunable)):
        raise ValueError(f"groups names {unknown[0]!r}: must be among {', '.join(prunable)}")
    wanted = [group for name, group in prunable.items() if groups is None or name in groups]
    if not wanted:
        raise ValueError("there is no group of channels to prune: channel_groups tells why not")
    importance = group_scores(channels.model, wanted, scores)
    counts = layer_counts(importance, sparsity) if scope == "layer" else global_counts(importance, sparsity)
    dead = {}
    for group in wanted:
        left = _rounded(group, group.units - counts[group.name], round_to)
        dead[group.name] = torch.argsort(importance[group.name], stable=True)[: group.units - left]
    return prune_units(open_attention(model, keep), wanted, dead)


def layer_counts(importance: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Return how many units to prune from each group: the same fraction."""
    return {name: round(sparsity * len(values)) for name, values in importance.items()}


def global_counts(importance: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Return how many units to prune from each group so that the least important of all go."""
    group = torch.cat([torch.full((len(values),), i) for i, values in enumerate(importance.values())])
    weakest = torch.argsort(torch.cat([values.cpu() for values in importance.values()]), stable=True)
    counts = torch.bincount(group[weakest[: round(sparsity * len(group))]], minlength=len(importance))
    return dict(zip(importance, counts.tolist(), strict=True))


def _rounded(group: ChannelGroup, left: int, round_to: int) -> int:
    """Return the number of units nearest to ``left`` that makes a multiple of ``round_to`` channels, and at least 1."""
    step = round_to // math.gcd(round_to, group.members[0].indices.shape[1])  # a head is many channels at once
    return min(group.units, max(step, step * round(left / step)))


@torch.no_grad()
def prune_units(model: nn.Module, groups: Iterable[ChannelGroup], units: Mapping[str, Tensor]) -> nn.Module:
    """Prune units in place, given by their numbers for each group's name. Returns the model."""
    masks: dict[str, Tensor] = {}
    before = get_masks(model)
    for group in groups:
        for member in group.members:
            layer = model.get_submodule(member.layer)
            indices = member.indices[units[group.name].cpu()].flatten()
            if member.parameter == "weight" and isinstance(layer, PRUNABLE):
                if member.layer not in masks:
                    all_there = torch.ones_like(layer.weight, dtype=torch.bool)
                    masks[member.layer] = before.get(member.layer, all_there)
                masks[member.layer].index_fill_(member.dim, indices.to(masks[member.layer].device), False)
            elif isinstance(parameter := getattr(layer, member.parameter), nn.Parameter):
                parameter.index_fill_(member.dim, indices.to(parameter.device), 0)
    return apply_masks(model, masks)
