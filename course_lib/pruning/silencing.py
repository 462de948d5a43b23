"""After masks on whole filters or layers: take away the constants that they still say, and the blocks that say nothing.

====================  ===============================================================================================
``silence``           no bias and no batch norm speaks for a filter that is gone
``drop_blocks``       residual blocks whose branch is silent become ``nn.Identity``
====================  ===============================================================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

from course_lib.lab.tracing import (
    BATCH_NORMS,
    CONVOLUTIONS,
    IS_OUTPUT,
    ChannelGroup,
    Channels,
    Inputs,
    groups_of,
    open_attention,
    operation,
    tensors_in,
)
from course_lib.pruning.graph import follow, prune_units
from course_lib.pruning.known import Known
from course_lib.pruning.shrinking import check_same, living_units, probe_inputs


@torch.no_grad()
def silence(model: nn.Module, example_input: Inputs, *, keep: Collection[str] = ()) -> nn.Module:
    """Set to zero, in place, each bias and batch norm entry behind a filter without weights. Returns the model.

    A filter whose weights are all pruned (by ``filters``, ``layers``) gives zeros, but its bias and the batch norm
    behind it turn them into a constant, the same for every image. This changes the network: it takes the constant away,
    as ``prune_channels`` does from the start. Units that are dead then are masked in every layer that they touch, so
    that they stay dead through training. The model's outputs keep their biases.
    """
    channels = follow(model, example_input, keep)
    open_attention(model, keep)
    silencer = _Silencer(channels)
    silencer.look(channels.inputs)
    for layer, parameter, silent in silencer.found:
        getattr(model.get_submodule(layer), parameter)[silent] = 0
    alive = living_units(channels)
    groups = [group for group in groups_of(channels) if group.why_not is None]
    dead = {group.name: _dead(channels, group, alive).nonzero().flatten()[: group.units - 1] for group in groups}
    return prune_units(model, groups, dead)


class _Silencer(Known):
    """Silences one layer after the other, so that the next sees what is left."""

    def __init__(self, channels: Channels) -> None:
        super().__init__(channels.labelling)
        self.channels = channels
        self.found: list[tuple[str, str, Tensor]] = []  # layer, parameter, which of its entries

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if target not in self.labelling.keep:
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
                self._silence(
                    target, module, ("bias",), (module.weight == 0).flatten(1).all(1) & ~self._is_output(module)
                )
            if isinstance(module, BATCH_NORMS):
                self._silence(target, module, ("weight", "bias"), (args[0] == 0).movedim(1, 0).flatten(1).all(1))
        return super().call_module(target, args, kwargs)

    def _is_output(self, layer: Any) -> Tensor:
        units = self.channels.unit[self.labelling.axes[id(layer.weight), 0]].tolist()
        output = [self.channels.fixed.get(unit) == IS_OUTPUT for unit in units]
        return torch.tensor(output, device=layer.weight.device)

    def _silence(self, target: str, module: nn.Module, parameters: tuple[str, ...], silent: Tensor) -> None:
        for parameter in parameters:
            if getattr(module, parameter) is not None:
                getattr(module, parameter)[silent] = 0
                self.found.append((target, parameter, silent))


def _dead(channels: Channels, group: ChannelGroup, alive: Tensor) -> Tensor:
    member = next(member for member in group.members if member.makes)
    weight = channels.model.get_submodule(member.layer)._parameters[member.parameter]
    labels = channels.labelling.axes[id(weight), member.dim][member.indices[:, 0]]
    return ~alive[channels.unit[labels]]


@torch.no_grad()
def drop_blocks(model: nn.Module, example_input: Inputs, *, keep: Collection[str] = ()) -> nn.Module:
    """Return a copy in which each residual block that changes nothing is an ``nn.Identity``, and masks are permanent.

    That is a block whose branch is zero for every input: ``x + 0``, or ``relu(x + 0)`` of what comes from a ReLU. The
    output stays the same. The blocks to drop are those whose layers are pruned altogether and then silenced.

    Raises
    ------
    CannotShrink : channels cannot be followed through an operation; the message names it.
    """
    channels = follow(model, example_input, keep)
    probe = probe_inputs(channels)
    before = tensors_in(channels.model(*probe))
    known = Known(channels.labelling)
    known.look(channels.inputs)
    same = _aliases(channels.labelling.traced, known.silent)
    small = channels.model
    for name in _idle_modules(channels.labelling.traced, same):
        small.set_submodule(name, nn.Identity())
    check_same(before, small, probe)
    for name, module in small.named_modules():
        module.training = model.get_submodule(name).training
    return small


def _aliases(traced: fx.GraphModule, silent: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return, for each operation, the first one that has the same result."""
    modules = dict(traced.named_modules())
    same: dict[fx.Node, fx.Node] = {}
    rectified: set[fx.Node] = set()
    for node in traced.graph.nodes:
        same[node] = node
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        inputs = [x for x in node.args if isinstance(x, fx.Node)]
        if isinstance(module, nn.Identity):
            same[node] = same[inputs[0]]
        elif isinstance(module, nn.ReLU) or (module is None and operation(node) == "relu"):
            same[node] = same[inputs[0]] if same[inputs[0]] in rectified else node
            rectified.add(same[node])
        elif operation(node) in ("add", "iadd") and len(node.args) == len(inputs) == 2 and not node.kwargs:
            speaking = [x for x in inputs if x not in silent]
            if len(speaking) == 1:
                same[node] = same[speaking[0]]
    return same


def _idle_modules(traced: fx.GraphModule, same: dict[fx.Node, fx.Node]) -> list[str]:
    """Return the names of the outermost modules that give back the one tensor that they get."""
    inside: dict[str, set[fx.Node]] = defaultdict(set)
    for node in traced.graph.nodes:
        for name, _ in (node.meta.get("nn_module_stack") or {}).values():
            inside[name].add(node)
    idle: list[str] = []
    for name in sorted(inside, key=len):
        entering = {x for node in inside[name] for x in node.all_input_nodes if x not in inside[name]}
        leaving = {node for node in inside[name] if any(user not in inside[name] for user in node.users)}
        entering = {x for x in entering if x.op != "get_attr"}
        if len(inside[name]) == 1 or len(entering) != 1 or len(leaving) != 1 or name.startswith(tuple(idle)):
            continue
        if same[leaving.pop()] is same[entering.pop()]:
            idle.append(f"{name}.")
    return [name.removesuffix(".") for name in idle]
