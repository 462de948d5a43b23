"""Which numbers of a network belong together: labels sent through its traced graph, as the data would be.

A *label* is one index of one dimension of one parameter: row 3 of a convolution's weight, entry 3 of the batch norm
behind it, column 3 of the next convolution. Every tensor that flows through the network gets a tensor of labels of the
same shape: each number carries the label of the row that made it. Operations that only move numbers (``view``,
``permute``, ``cat``, …) are applied to the labels themselves. Where two labels meet (a residual sum, a weight's column
and what it multiplies, the numbers that an average mixes) they are *tied*: they can only go together. Label 0 is on
whatever has a fixed size, such as the model's input.

``Labelling`` holds the labels of every tensor and parameter, the ties, and the labels that have to stay.

The idea of tied channels is that of Fang et al. 2023 (DepGraph, arXiv 2301.12900), who search for the ties layer by
layer; labels that flow need no rules for reshaping, splitting and joining.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from course_lib.lab.tracing.operations import (
    BATCH_NORMS,
    CONVOLUTIONS,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    INSTANCE_NORMS,
    MIXES,
    MOVE_MODULES,
    MOVES,
    NORMALISES,
    POOL_MODULES,
    POOLS,
    TRANSPOSED,
    CannotShrink,
    Results,
    fixed_labels,
    get_by_name,
    operation,
    owner,
    place,
    tensors_in,
    trace,
)

IS_OUTPUT = "it is the model's output"


class Labelling:
    """The labels of a traced network.

    Attributes
    ----------
    traced : the operations, sharing their parameters with the model.
    of : operation -> the labels of its result, in its shape (results without tensors as they are).
    axes : ``(id of a parameter or buffer, dimension)`` -> the labels of its indices.
    rows : the axes along which a layer makes channels: the rows of its weight.
    free : id of a parameter or buffer -> a label for each of its numbers; for those used outside any known layer.
    tensors : id -> the parameter or buffer itself, and ``names``: id -> all names under which the model holds it.
    reads : a dense layer's call -> the labels of the channels that it reads.
    ties : pairs of labels that go together, ``[2, n]`` each; ``stays``: labels that cannot go, and why.
    mixers : (label, where) of operations that tie whole channels together, to explain what became of them.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], keep: Collection[str] = ()) -> None:
        self.traced, self.keep = trace(model, inputs, keep), keep
        self.modules = dict(self.traced.named_modules())
        self.of: dict[fx.Node, Any] = {}
        self.axes: dict[tuple[int, int], Tensor] = {}
        self.rows: set[tuple[int, int]] = set()
        self.free: dict[int, Tensor] = {}
        self.reads: dict[fx.Node, Tensor] = {}
        self.ties: list[Tensor] = []
        self.stays: list[tuple[Tensor, str]] = []
        self.mixers: list[tuple[int, str]] = []
        self.count = 1  # label 0 is taken
        self.tensors: dict[int, Tensor] = {}
        self.names: dict[int, list[str]] = {}
        for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
            for name, tensor in named:
                self.tensors[id(tensor)] = tensor
                self.names.setdefault(id(tensor), []).append(name)
        shapes = Results(self.traced)
        with torch.no_grad():
            shapes.run(*inputs)
        self.results = shapes.results
        for node in self.traced.graph.nodes:
            self.node = node
            try:
                self.of[node] = self._labels(node)
            except (IndexError, RuntimeError, TypeError) as error:
                raise self._refusal() from error  # an operation called in a way that its rule does not foresee
        for name in keep:
            for tensor in model.get_submodule(name).state_dict(keep_vars=True).values():
                for dim in range(tensor.dim()):  # tied to a weight elsewhere
                    self.stay(self.axes.get((id(tensor), dim), fixed_labels(())), f"{name} is kept as it is")

    # What one operation does to labels

    def _labels(self, node: fx.Node) -> Any:
        result = self.results[node]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.of[n])
        if node.op == "output":
            for labels in tensors_in(args):
                self.stay(labels, IS_OUTPUT)
            return result
        if node.op == "placeholder" or not tensors_in(result):
            return result  # the model's input; or a size, a dtype, a flag
        if node.op == "get_attr":
            return self._attribute(get_by_name(self.traced, str(node.target)))
        if node.op == "call_module":
            return self._module(self.modules[node.target], args, kwargs, result)
        return self._function(operation(node), args, kwargs, result.shape if isinstance(result, Tensor) else None)

    def _attribute(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.tensors:  # made inside forward: it has the size that it has
            return fixed_labels(tensor.shape)
        if id(tensor) not in self.free:
            self.free[id(tensor)] = self._new(tensor.numel()).view(tensor.shape)
        return self.free[id(tensor)]

    def _module(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        if self.node.target in self.keep:
            for labels in tensors_in((args, kwargs)):
                self.stay(labels, f"{self.node.target} is kept as it is")
            return result
        computed = hasattr(module, "weight") and "weight" not in module._parameters  # by a parametrization, say
        if kwargs or len(args) != 1 or computed or not isinstance(result, Tensor):
            raise self._refusal()
        x: Tensor = args[0]
        shape = result.shape
        if isinstance(module, nn.Linear):
            out = self._dense(module, self.channels(x, -1), rows=0)
            return out.expand(shape)
        if isinstance(module, nn.Embedding):
            return self._rows(module.weight, 1).expand(shape)
        if isinstance(module, CONVOLUTIONS + TRANSPOSED):
            dim = x.dim() - module.weight.dim() + 1  # [N, C, *space] or [C, *space]
            came = self.channels(x, dim)
            return _along(self._convolution(module, came), dim, shape)
        if isinstance(module, BATCH_NORMS + INSTANCE_NORMS):
            came = self.channels(x, 1)
            self._attach(came, (module.weight, module.bias, module.running_mean, module.running_var))
            return _along(came, 1, shape)
        if isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self._attach(self.channels(x, 1), (module.weight,))
            return x
        if isinstance(module, nn.GroupNorm):
            groups = self.channels(x, 1).reshape(module.num_groups, -1)
            whole = self.mixed(groups, [1], note=True).expand_as(groups).reshape(-1)
            self._attach(whole, (module.weight, module.bias))
            return _along(whole, 1, shape)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            # What it normalises over goes whole or not at all, so its weight never changes.
            return self.mixed(x, range(-len(module.normalized_shape), 0), note=True).expand(shape)
        if isinstance(module, nn.Softmax | nn.LogSoftmax | nn.Softmin) and module.dim is not None:
            return self.mixed(x, [module.dim], note=True).expand(shape)
        if isinstance(module, ELEMENTWISE_MODULES):
            return x
        if isinstance(module, POOL_MODULES):
            return self.mixed(x, range(2, x.dim())).expand(shape)
        if isinstance(module, MOVE_MODULES):
            return module(x)
        raise self._refusal()

    def _function(self, name: str, args: Any, kwargs: Any, shape: Any) -> Any:
        if name in ELEMENTWISE:
            given = args[:1] if name in ("to", "type_as") else (*args, *kwargs.values())
            return self.joined([x for x in given if isinstance(x, Tensor)])
        if name in MOVES and not (name == "getitem" and tensors_in(args[1])):
            result = _call(self.node, args, kwargs)
            if name == "chunk" or (name == "split" and isinstance((*args, *kwargs.values())[1], int)):
                self._tie_pieces(result, kwargs.get("dim", args[2] if len(args) > 2 else 0))
            return result
        if name in POOLS or name == "interpolate":
            return self.mixed(args[0], range(2, args[0].dim())).expand(shape)
        if name == "pad":
            x = args[0]
            grown = [d for d in range(x.dim()) if x.shape[d] != shape[d]]
            if all(d >= 2 for d in grown):
                return self.mixed(x, grown).expand(shape)
            # New channels full of zeros: they belong to no layer, so they stay, and whatever is added to them.
            return nn.functional.pad(x, *args[1:2], **{k: v for k, v in kwargs.items() if k == "pad"})
        if name in MIXES | NORMALISES:
            return self._mix(name, args, kwargs, shape)
        if name == "layer_norm":
            return self.mixed(args[0], range(-len(args[1]), 0), note=True).expand(shape)
        if name in ("matmul", "bmm", "scaled_dot_product_attention"):
            products = [x for x in (*args[:3], *map(kwargs.get, ("query", "key", "value"))) if isinstance(x, Tensor)]
            if any(x.dim() < 2 for x in products) or kwargs.get("enable_gqa"):
                raise self._refusal()
            whole = [self.mixed(x, [-2, -1], note=True) for x in products]
            masks = [x for x in (args[3] if len(args) > 3 else None, kwargs.get("attn_mask")) if isinstance(x, Tensor)]
            return self.joined([*whole, *(self.mixed(x, [-2, -1]) for x in masks)]).expand(shape)
        raise self._refusal()

    def _mix(self, name: str, args: Any, kwargs: Any, shape: Any) -> Tensor:
        x: Tensor = args[0]
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None and name in NORMALISES:
            raise self._refusal()
        dims = list(range(x.dim())) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        whole = self.mixed(x, dims, note=True)
        if len(shape) < x.dim():
            whole = whole.squeeze(dims)
        return whole.expand(shape)

    # What the layers with weights do

    def _dense(self, module: Any, came: Tensor, rows: int) -> Tensor:
        """Tie what comes in to the weight's columns; return the labels of its rows."""
        self.tie(came, self.axis(module.weight, 1 - rows))
        self.reads[self.node] = came
        out = self._rows(module.weight, rows)
        self._attach(out, (module.bias,))
        return out

    def _convolution(self, module: Any, came: Tensor) -> Tensor:
        """Labels of the output channels, ``came`` being those of the input channels."""
        if isinstance(module, TRANSPOSED):
            if module.groups != 1:
                raise self._refusal()
            return self._dense(module, came, rows=1)
        if module.groups == 1:
            return self._dense(module, came, rows=0)
        out = self._rows(module.weight, 0)
        self._attach(out, (module.bias,))
        if module.in_channels == module.groups:  # depthwise: each channel goes its own way
            self.tie(came.repeat_interleave(module.out_channels // module.groups), out)
            return out
        # All groups stay equally large if channel i goes from all of them at once.
        self.reads[self.node] = came
        self.tie(came.reshape(module.groups, -1), self.axis(module.weight, 1))
        self.mixed(out.view(module.groups, -1), [0])
        return out

    def _attach(self, labels: Tensor, tensors: tuple[Tensor | None, ...]) -> None:
        for tensor in tensors:
            if tensor is not None:
                self.tie(labels, self.axis(tensor, 0))

    def _tie_pieces(self, pieces: tuple[Tensor, ...], dim: int) -> None:
        """Equal parts of a tensor have to stay equal: number i goes from all of them."""
        for piece in pieces[1:]:
            if piece.shape == pieces[0].shape and _varies(torch.stack([piece, pieces[0]]), [dim % piece.dim() + 1]):
                self.tie(pieces[0], piece)

    # Ties

    def axis(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the labels of the indices of one dimension of a parameter or buffer."""
        key = id(tensor), dim
        if key not in self.axes:
            self.axes[key] = self._new(tensor.shape[dim])
        return self.axes[key]

    def _rows(self, weight: Tensor, dim: int) -> Tensor:
        self.rows.add((id(weight), dim))
        return self.axis(weight, dim)

    def channels(self, labels: Tensor, dim: int) -> Tensor:
        """Return the labels along ``dim``, those of the other dimensions tied to each other."""
        others = [d for d in range(labels.dim()) if d != dim % labels.dim()]
        return self.mixed(labels, others).flatten().expand(labels.shape[dim])

    def mixed(self, labels: Tensor, dims: Iterable[int], *, note: bool = False) -> Tensor:
        """Tie all labels along ``dims``, which then have the size 1. ``note`` remembers where channels were mixed."""
        labels = compact(labels)
        for dim in dims:
            first = labels.narrow(dim, 0, 1)
            if labels.shape[dim] > 1 and note and not torch.equal(labels, first.expand_as(labels)):
                self.mixers.append((int(first.flatten()[0]), place(self.node)))
            self.tie(labels, first)
            labels = first
        return labels

    def joined(self, operands: list[Tensor]) -> Tensor:
        """Tie the labels of operands that are combined number by number, with broadcasting."""
        result = operands[0]
        for other in operands[1:]:
            result = self._pair(result, other)
        return result

    def _pair(self, a: Tensor, b: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(a.shape, b.shape)
        wide_a, wide_b = a.expand(shape), b.expand(shape)
        for whole, small in ((wide_a, b), (wide_b, a)):
            sizes = (1,) * (len(shape) - small.dim()) + tuple(small.shape)
            stretched = [d for d in range(len(shape)) if sizes[d] < shape[d]]
            # One number of `small` meets several channels of `whole` (a scale for all, say), so it outlives each.
            if _varies(whole, stretched) and not _varies(whole, [d for d in range(len(shape)) if d not in stretched]):
                self.stay(small, f"one value of it meets many channels in {place(self.node)}")
                return whole
        self.tie(wide_a, wide_b)
        return torch.where(compact(wide_a) != 0, compact(wide_a), compact(wide_b)).expand(shape)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """The labels in the same places (with broadcasting) go together; beside a 0, a label stays."""
        a, b = torch.broadcast_tensors(a, b)
        loose = [d for d in range(a.dim()) if a.stride(d) == b.stride(d) == 0]
        for d in loose:
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
        pairs = torch.stack([a[a != b], b[a != b]])
        met_fixed = (pairs == 0).any(0)
        if met_fixed.any():
            self.stay(pairs[:, met_fixed], f"it meets a tensor of fixed size in {place(self.node)}")
        if not met_fixed.all():
            self.ties.append(torch.unique(pairs[:, ~met_fixed], dim=1))

    def stay(self, labels: Tensor, why: str) -> None:
        """None of these labels can go."""
        self.stays.append((torch.unique(compact(labels)), why))

    def _new(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count)

    def _refusal(self) -> CannotShrink:
        node = self.node
        what = type(self.modules[node.target]).__name__ if node.op == "call_module" else operation(node)
        kept = node.target if node.op == "call_module" else owner(node)
        hint = f"; keep=[{kept!r}] leaves it, and what touches it, as it is" if kept else ""
        return CannotShrink(f"{place(node)}: channels cannot be followed through {what}{hint}")


# --- Small tools ------------------------------------------------------------------------------------------------------


def compact(labels: Tensor) -> Tensor:
    """Cut dimensions that only repeat (``expand``) to size 1: batches and pixels cost no memory and no time."""
    for dim in range(labels.dim()):
        if labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _varies(labels: Tensor, dims: list[int]) -> bool:
    return any(not torch.equal(labels, labels.narrow(d, 0, 1).expand_as(labels)) for d in dims if labels.stride(d))


def _along(labels: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
    """Give a tensor of this shape one label for each index of ``dim``."""
    return labels.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape)


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Do what an operation does, to labels."""
    if operation(node) == "view":  # what lies in one piece in the data need not do so in labels that take no room
        return args[0].reshape(*args[1:], **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)  # type: ignore[arg-type]
    return node.target(*args, **kwargs)  # type: ignore[operator]
