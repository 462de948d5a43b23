"""From a network full of zeros to a smaller one: ``shrink`` cuts out what pruning has switched off.

===================  ================================================================================================
``shrink``           a smaller ordinary network that computes the same as the pruned one
``CannotShrink``     why not, and where
===================  ================================================================================================

A unit (see ``graph``) is *dead* if no layer hears of it: wherever a layer reads it, it is zero whatever the input, or
the weight that it meets is zero. Taking it out then changes no output. ``shrink`` finds all dead units, cuts them from
every parameter, corrects the numbers of channels that layers and ``forward`` know, and runs the result to be sure.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from course_lib.lab.tracing import (
    BATCH_NORMS,
    CONVOLUTIONS,
    INSTANCE_NORMS,
    TRANSPOSED,
    CannotShrink,
    Channels,
    Inputs,
    Results,
    compact,
    operation,
    owner,
    place,
    tensors_in,
    trace,
)
from course_lib.pruning.graph import follow
from course_lib.pruning.known import Known

__all__ = ["CannotShrink", "shrink"]


@torch.no_grad()
def shrink(model: nn.Module, example_input: Inputs, *, keep: Collection[str] = ()) -> nn.Module:
    """Return a smaller copy of a pruned network, without its dead units and without masks.

    In evaluation mode its output is that of ``model``, but for rounding. In training mode too if the units were pruned
    with ``prune_channels`` or ``silence`` (a batch norm that is silent only for its running mean may speak up in
    training); dropout draws other numbers, as there are fewer. Weights of pruned filters alone do not make dead units:
    their biases and batch norms still speak (``silence`` ends that).

    The copy has the class of ``model`` and its mode, device, types and ``requires_grad``. If ``forward`` itself has
    numbers of channels written in it, other than in attributes (``x.view(-1, 16 * 5 * 5)``), the copy is a
    ``torch.fx.GraphModule`` of the same operations in evaluation mode, since no other class could have other numbers.
    Where all units of a layer are dead it keeps one of them, with its zeros: a layer without channels is no layer.

    Parameters
    ----------
    example_input : what the model can be called with, a tensor or a tuple of tensors; one example is enough.
    keep : names of modules that are left as they are, with everything that enters and leaves them; they need not be
        traceable.

    Raises
    ------
    CannotShrink : channels cannot be followed through an operation; the message names it.
    """
    channels = follow(model, example_input, keep)
    small, traced = channels.model, channels.labelling.traced
    probe = probe_inputs(channels)
    before = tensors_in(traced(*probe))
    alive = _without_gaps(channels, living_units(channels))
    arguments = {node: _resized(channels, alive, node) for node in traced.graph.nodes}
    _cut(channels, alive)
    modes = {name: module.training for name, module in model.named_modules()}
    if any(arguments[node] != (node.args, node.kwargs) for node in arguments):
        small = _with_arguments(small, channels, arguments)
    try:
        check_same(before, small, probe)
    except Exception as error:
        raise CannotShrink(f"{_misfit(channels, alive, small)}: with fewer channels, {error}") from error
    for name, module in small.named_modules():
        module.training = modes.get(name, model.training)
    return small


# --- Dead or alive ----------------------------------------------------------------------------------------------------


def living_units(channels: Channels) -> Tensor:
    """Return which units are alive, ``[units]`` of bool; what is dead has only zeros afterwards.

    A unit that only dead units read is dead, too: hence the loop.
    """
    labelling, unit = channels.labelling, channels.unit
    everything = torch.ones(int(unit.max()) + 1, dtype=torch.bool)
    while True:
        alive = torch.zeros_like(everything)
        alive[list(channels.fixed)] = True
        known = Known(labelling)
        known.look(channels.inputs)
        for node, matters in known.read.items():
            alive[unit[labelling.reads[node][matters.cpu()]]] = True
        if torch.equal(alive, everything):
            return alive
        for (key, dim), labels in labelling.axes.items():
            if isinstance(tensor := labelling.tensors[key], nn.Parameter):
                tensor.index_fill_(dim, (~alive[unit[labels]]).nonzero().flatten().to(tensor.device), 0)
        everything = alive


def _without_gaps(channels: Channels, alive: Tensor) -> Tensor:
    """Bring one unit back to life in each tensor that would have none."""
    labelling, alive = channels.labelling, alive.clone()
    for labels in [*labelling.axes.values(), *(x for result in labelling.of.values() for x in tensors_in(result))]:
        units = channels.unit[compact(labels)]
        if not alive[units].any():
            alive[units.flatten()[0]] = True
    return alive


def _any_along(there: Tensor, dim: int) -> Tensor:
    return there.movedim(dim, 0).reshape(there.shape[dim], -1).any(1)


def _left(channels: Channels, alive: Tensor, labels: Tensor, dim: int) -> Tensor:
    """Tell which indices of one dimension are left of a tensor with these labels."""
    return _any_along(alive[channels.unit[compact(labels)]], dim).expand(labels.shape[dim])


# --- Sizes that forward knows -----------------------------------------------------------------------------------------


def _resized(channels: Channels, alive: Tensor, node: fx.Node) -> tuple[Any, Any]:
    """Return the arguments of an operation, in which numbers of channels are now those that are left."""
    args, kwargs, name = node.args, node.kwargs, operation(node)
    result = channels.labelling.of[node]
    if node.op not in ("call_function", "call_method") or not args or not isinstance(args[0], fx.Node):
        return args, kwargs

    def sizes(labels: Tensor) -> list[tuple[int, int]]:
        return [(size, int(_left(channels, alive, labels, dim).sum())) for dim, size in enumerate(labels.shape)]

    if name in ("view", "reshape", "expand"):
        return (args[0], *_replaced(args[1:], sizes(result))), _replaced(kwargs, sizes(result))
    if name == "unflatten":
        dim: Any = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        first = dim % channels.labelling.of[args[0]].dim()
        return (*args[:2], *_replaced(args[2:], sizes(result)[first:])), _replaced(kwargs, sizes(result)[first:])
    if name in ("split", "split_with_sizes") and len(args) > 1:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
        return (args[0], _replaced(args[1], [sizes(piece)[dim] for piece in result]), *args[2:]), kwargs
    if name == "getitem" and isinstance(x := channels.labelling.of[args[0]], Tensor):
        return (args[0], _reindexed(args[1], [_left(channels, alive, x, dim) for dim in range(x.dim())])), kwargs
    return args, kwargs


def _replaced(tree: Any, sizes: list[tuple[int, int]]) -> Any:
    """Replace number k in a tree by a new one if it is the old one of ``sizes[k]``; ``-1`` stays, for one."""
    pairs = iter(sizes)

    def replace(leaf: Any) -> Any:
        old, new = next(pairs, (None, None))
        return new if type(leaf) is int and leaf == old else leaf

    return fx.node.map_aggregate(tree, replace)


def _reindexed(index: Any, left: list[Tensor]) -> Any:
    """Move the positions in an index to where they are when only ``left`` of each dimension is left."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dim = 0
    for i, part in enumerate(parts):
        if part is None:
            continue
        if part is Ellipsis:
            dim = len(left) - sum(later is not None for later in parts[i + 1 :])
            continue
        if not left[dim].all():
            here = left[dim]
            move = lambda at: int(here[:at].sum()) if type(at) is int else at  # noqa: B023, E731
            parts[i] = slice(move(part.start), move(part.stop), part.step) if isinstance(part, slice) else move(part)
        dim += 1
    return tuple(parts) if isinstance(index, tuple) else parts[0]


def _with_arguments(model: nn.Module, channels: Channels, arguments: dict[fx.Node, tuple[Any, Any]]) -> nn.Module:
    """Return the network with these arguments for its operations: by attributes, or else as a ``GraphModule``.

    The size of a reshape is often an attribute of the module around it (``self.heads``). Which one it is shows when
    ``forward``, traced again with another value there, asks for the sizes that it should.
    """
    changed: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for node, new in arguments.items():
        if new != (node.args, node.kwargs):
            leaves = zip(_leaves((node.args, node.kwargs)), _leaves(new), strict=True)
            changed[owner(node)] |= {(a, b) for a, b in leaves if a != b}
    for name, pairs in changed.items():
        wanted = [fx.node.map_arg(new, str) for node, new in arguments.items() if owner(node) == name]
        for attributes in _candidates(model.get_submodule(name), pairs):
            vars(model.get_submodule(name)).update(attributes)
            if _arguments(model, channels, name) == wanted:
                break
        else:
            for node, new in arguments.items():
                node.args, node.kwargs = new
            return fx.GraphModule(model, channels.labelling.traced.graph, type(model).__name__)
    return model


def _candidates(module: nn.Module, changes: set[tuple[int, int]]) -> Iterator[dict[str, int]]:
    """Yield values for the module's integer attributes: fewest changes first, the present values last."""
    numbers = {name: value for name, value in vars(module).items() if type(value) is int and value in dict(changes)}
    options = [[value, *(new for old, new in changes if old == value)] for value in numbers.values()]
    settings = list(itertools.islice(itertools.product(*options), 256))
    settings.sort(key=lambda setting: sum(map(int.__ne__, setting, numbers.values())))
    return (dict(zip(numbers, setting, strict=True)) for setting in [*settings[1:], tuple(numbers.values())])


def _arguments(model: nn.Module, channels: Channels, name: str) -> list[Any]:
    """Return the arguments of the operations in one module's ``forward``, as it is now."""
    try:
        graph = trace(model, channels.inputs, channels.labelling.keep).graph
    except CannotShrink:
        return []
    return [fx.node.map_arg((node.args, node.kwargs), str) for node in graph.nodes if owner(node) == name]


def _leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate(tree, found.append)
    return found


# --- The cut ----------------------------------------------------------------------------------------------------------


def _cut(channels: Channels, alive: Tensor) -> None:
    """Cut the dead units from all parameters and buffers, and from the numbers of channels that layers know."""
    labelling = channels.labelling
    for key, tensor in labelling.tensors.items():
        small = tensor
        for dim in range(tensor.dim()):
            if (key, dim) in labelling.axes:
                left = alive[channels.unit[labelling.axes[key, dim]]]
                if not left.all():
                    small = small.index_select(dim, left.nonzero().flatten().to(tensor.device))
        if small is not tensor:
            for name in labelling.names[key]:
                layer, _, own_name = name.rpartition(".")
                _put(channels.model.get_submodule(layer), own_name, small, tensor)
    for module in channels.model.modules():
        _recount(module)


def _recount(module: nn.Module) -> None:
    """Set the numbers of channels that a layer knows to those of its parameters."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        if 1 < module.groups == module.in_channels:  # depthwise
            module.groups = module.weight.shape[0] * module.groups // module.out_channels
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, TRANSPOSED):
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.GroupNorm) and module.affine:
        module.num_groups = module.num_groups * len(module.weight) // module.num_channels
        module.num_channels = len(module.weight)
    elif isinstance(module, BATCH_NORMS + INSTANCE_NORMS):
        some = module.weight if module.affine else module.running_mean
        module.num_features = module.num_features if some is None else len(some)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


def _put(layer: nn.Module, name: str, small: Tensor, old: Tensor) -> None:
    if name in layer._parameters:
        layer._parameters[name] = nn.Parameter(small, old.requires_grad)
    else:
        layer._buffers[name] = small


def probe_inputs(channels: Channels) -> tuple[Tensor, ...]:
    """Return noise in the shape of the example, to compare two networks on; integers stay those of the example."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator) if x.is_floating_point() else x for x in channels.inputs]
    return tuple(new.to(x) for new, x in zip(noise, channels.inputs, strict=True))


def check_same(before: list[Tensor], small: nn.Module, probe: tuple[Tensor, ...]) -> None:
    """Run the smaller network. The channels were followed by rules; this is the proof that nothing else uses them.

    Raises
    ------
    CannotShrink : it computes something else than before.
    """
    for old, new in zip(before, tensors_in(small(*probe)), strict=True):
        tolerance = torch.finfo(old.dtype).eps ** 0.5 * float(old.abs().max()) if old.is_floating_point() else 0
        if old.shape != new.shape or not torch.allclose(old, new, rtol=0, atol=tolerance, equal_nan=True):
            raise CannotShrink("the network computes something else")


def _misfit(channels: Channels, alive: Tensor, small: nn.Module) -> str:
    """Say which operation of the smaller network has a result of another shape than it should, or fails."""
    labelling = channels.labelling
    traced = trace(small, channels.inputs, labelling.keep)
    run = Results(traced)
    with contextlib.suppress(Exception):
        run.run(*channels.inputs)
    for node, ours in zip(labelling.traced.graph.nodes, traced.graph.nodes, strict=False):
        wanted = [
            [int(_left(channels, alive, x, d).sum()) for d in range(x.dim())] for x in tensors_in(labelling.of[node])
        ]
        if ours not in run.results or wanted != [list(x.shape) for x in tensors_in(run.results[ours])]:
            return place(node)
    return "the model"
