"""The operations of a network (``torch.fx``), and what each kind of them does to channels.

===============  ====================================================================================================
``trace``        a network's operations, or ``CannotShrink`` with the layer that stands in the way
``Results``      runs them once and keeps the shapes of what they compute
``ELEMENTWISE``  … and the other tables: which operations leave channels apart, which move them, which mix them
===============  ====================================================================================================
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn

Inputs = Tensor | tuple[Tensor, ...]
"""What a model is called with: one tensor, or a tuple of positional arguments."""


class CannotShrink(ValueError):
    """This network has an operation that channels cannot be followed through; the message says where and why."""


# --- Tracing ----------------------------------------------------------------------------------------------------------


class Tracer(fx.Tracer):
    """``torch.fx``'s tracer, which names the layer it fails in and takes the modules in ``keep`` as they are."""

    def __init__(self, keep: Collection[str] = ()) -> None:
        super().__init__()
        self.keep = keep

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.keep or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except CannotShrink:
            raise  # from a layer inside this one: it knows better where
        except Exception as error:
            raise CannotShrink(_untraceable(self.path_of_module(m), m, error)) from error


def trace(model: nn.Module, inputs: tuple[Tensor, ...], keep: Collection[str] = ()) -> fx.GraphModule:
    """Return the operations of ``model.forward`` in its present mode (training or evaluation).

    Raises
    ------
    CannotShrink : ``forward`` does what depends on the values that it sees.
    """
    names = dict(model.named_modules())
    for name in keep:
        if name not in names:
            raise ValueError(
                f"keep names {name!r}: must be a module of the model, one of {', '.join(filter(None, names))}"
            )
    arguments = list(inspect.signature(model.forward).parameters.values())[len(inputs) :]
    # An argument that is not given keeps its default: `if mask is None` is then decided here and now.
    defaults = {a.name: a.default for a in arguments if a.default is not a.empty and a.kind != a.VAR_KEYWORD}
    tracer = Tracer(keep)
    try:
        graph = tracer.trace(model, concrete_args=defaults or None)
    except CannotShrink:
        raise
    except Exception as error:
        raise CannotShrink(_untraceable("", model, error)) from error
    traced = fx.GraphModule(model, graph, type(model).__name__)
    # Tracer and graph lie in cycles and know the model: its weights would stay until garbage is next collected.
    vars(tracer).clear()
    graph.owning_module = None
    return traced


def _untraceable(name: str, module: nn.Module, error: Exception) -> str:
    return (
        f"{name or 'the model'} ({type(module).__name__}) cannot be traced: {error}. "
        + (f"keep=[{name!r}] leaves it, and what touches it, as it is" if name else "")
    ).strip()


def place(node: fx.Node) -> str:
    """Say where in the model's own code an operation stands, for messages."""
    return node.target if node.op == "call_module" else f"{operation(node)} in {owner(node) or 'the model itself'}"  # type: ignore[return-value]


def owner(node: fx.Node) -> str:
    """Return the name of the module whose ``forward`` has this operation (``""``: the model's own)."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def operation(node: fx.Node) -> str:
    """Return what an operation is called, whether written as function or method, in place or not."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("_") else name.rstrip("_")


class Results(fx.Interpreter):
    """Runs a traced network once and keeps what it computed, with zeros that take no room in place of tensors."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.results: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.results[n] = fx.node.map_aggregate(result, lambda x: fixed_labels(x.shape) if isinstance(x, Tensor) else x)
        return result


def fixed_labels(shape: tuple[int, ...]) -> Tensor:
    """Labels of a tensor that nothing can be cut from; they take no room."""
    return torch.zeros((), dtype=torch.long).expand(shape)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    found: list[Tensor] = []
    fx.node.map_aggregate(tree, lambda x: found.append(x) if isinstance(x, Tensor) else None)
    return found


def get_by_name(root: nn.Module, name: str) -> Any:
    value: Any = root
    for part in name.split("."):
        value = getattr(value, part)
    return value


# --- What operations do to channels -----------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Each number of the result depends on the numbers in the same place (of those given, broadcast) and on nothing else.
ELEMENTWISE = _names(
    """abs add celu clamp clamp_max clamp_min clip clone contiguous cos detach div double dropout elu erf exp float
    floordiv gelu half hardshrink hardsigmoid hardswish hardtanh iadd imul isub itruediv leaky_relu log logsigmoid
    maximum minimum mish mul multiply neg pow reciprocal relu relu6 round rsqrt selu sigmoid silu sin softplus
    softshrink softsign sqrt square sub tanh tanhshrink threshold to truediv true_divide type_as dropout1d dropout2d
    dropout3d feature_dropout alpha_dropout stochastic_depth bfloat16 subtract divide"""
)
# They put numbers elsewhere without looking at them, so they can be run on the labels.
MOVES = _names(
    """cat concat concatenate chunk expand flatten flip getattr getitem movedim narrow permute pixel_shuffle
    pixel_unshuffle ravel repeat repeat_interleave reshape roll select split split_with_sizes squeeze stack swapaxes
    swapdims t tile transpose unbind unflatten unsqueeze view"""
)
# Each number of the result depends on its whole channel, and on no other.
POOLS = frozenset(
    f"{name}{d}d" for d in (1, 2, 3) for name in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool")
)
MIXES = _names("mean sum amax amin var std logsumexp")  # along the dimensions `dim`, which then vanish
NORMALISES = _names("softmax log_softmax softmin")  # along `dim`, which stays

ELEMENTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
    nn.LogSigmoid, nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d,
)  # fmt: skip
MOVE_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
