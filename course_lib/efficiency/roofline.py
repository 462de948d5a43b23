r"""The roofline: whether a layer waits for arithmetic or for memory, and how fast it could be on this machine at most.

=====================  =========================================================  ======================================
name                   what it gives                                              source
=====================  =========================================================  ======================================
``measured_peaks``     what this machine does at most: products a second, bytes   McCalpin 1995 (STREAM), for the bytes
                       a second
``Work``               floating-point operations and bytes that have to move;     Williams, Waterman & Patterson 2009,
                       their quotient, the arithmetic intensity                   Communications of the ACM 52(4)
``attainable``         the roof over an intensity                                 the same
``ridge``              the intensity at which its slope ends                      the same
``linear_work``, …     work in closed form, also ``elementwise_work`` and         –
                       ``convolution_work``
``layer_work``         the work of any layer on an input                          –
``per_layer``          each layer of a network under the roof, also measured      –
``draw``               the roof, and layers under it
=====================  =========================================================  ======================================

With I operations for each byte that moves, a machine of P operations and B bytes a second reaches at most

.. math:: \min(P,\ B\,I)

The bytes are those that have to move if caches were perfect within a layer and held nothing between two: inputs,
weights and outputs, once each. Whatever is measured moves at least as many, so it lies under the roof, unless a layer's
inputs are still in a cache: a point above the slope says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from course_lib.lab import plotting, runtime
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.costs import Inputs, flops
from course_lib.lab.timing import measure

# --- Machine and roof -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a machine does at most.

    Attributes
    ----------
    flops_per_second : operations (a multiplication and an addition are two) of its products.
    bytes_per_second : read from and written to memory.
    name : for figures.
    """

    flops_per_second: float
    bytes_per_second: float
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "bytes_per_second"):
            require(name, getattr(self, name), lambda x: is_number(x) and x > 0, "a number above 0")


@dataclass(frozen=True)
class Work:
    """What a computation has to do.

    Attributes
    ----------
    flops : floating-point operations.
    bytes_moved : that have to be read or written.
    """

    flops: float
    bytes_moved: float

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.flops / self.bytes_moved if self.bytes_moved else math.inf

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes_moved + other.bytes_moved)


def attainable(machine: Machine, intensity: float) -> float:
    """Return the operations a second that a computation of such intensity (operations
    for each byte) reaches at most.
    """
    return min(machine.flops_per_second, machine.bytes_per_second * intensity)


def ridge(machine: Machine) -> float:
    """Return the intensity, operations for each byte, from which on arithmetic is what
    takes the time; below it memory is.
    """
    return machine.flops_per_second / machine.bytes_per_second


def least_seconds(machine: Machine, work: Work) -> float:
    """Return the seconds that the work takes at least: those of its arithmetic or those
    of its bytes, whichever are more.
    """
    arithmetic = work.flops / machine.flops_per_second
    return max(arithmetic, work.bytes_moved / machine.bytes_per_second)


def bound(machine: Machine, work: Work) -> str:
    """Return ``"compute"`` or ``"memory"``: what the work waits for."""
    return "compute" if work.intensity >= ridge(machine) else "memory"


# --- Measuring --------------------------------------------------------------------------------------------------------


def measured_peaks(
    dtype: torch.dtype = torch.float32,
    *,
    sizes: Sequence[int] = (256, 512, 1024),
    array_bytes: int = 2**26,
    repeats: int = 5,
    device: torch.device | str | None = None,
) -> Machine:
    """Measure what this machine does at most, with the threads that torch has now.

    Operations: square matrix products of several sizes, the median of each, the best of the sizes. Bytes: the triad
    ``a = b + s * c`` of STREAM over three arrays, the median; it counts three passes over memory. A processor that
    reads a line before it writes it moves four, so the figure is what a program gets, not what the chips do.

    Parameters
    ----------
    dtype : of the products: float64, float32, bfloat16, float16, or int8 (with sums in int32). Bytes are bytes, so the
        triad is always of float32.
    sizes : rows of the square matrices.
    array_bytes : of each array of the triad. Several times the last cache; where that is a server's of hundreds of MB
        shared by many, what is measured lies between the cache and the memory behind it. 2**18 gives the roof of what
        stays in a core's own cache, under which layers of the laboratory's size lie.
    device : where, the laboratory's by default.

    Raises
    ------
    ValueError : a size is below 16, or there are no products of this type there.
    """
    at_least(1, repeats=repeats)
    at_least(1024, array_bytes=array_bytes)
    require("sizes", tuple(sizes), bool, "at least one number of rows")
    for size in sizes:
        at_least(16, sizes=size)
    where = runtime.device() if device is None else torch.device(device)
    products = [_seconds(_product(size, dtype, where), repeats, where) for size in sizes]
    rates = [2 * size**3 / seconds for size, seconds in zip(sizes, products, strict=True)]
    triad = _seconds(_triad(array_bytes // 4, where), repeats, where)
    return Machine(max(rates), 3 * (array_bytes // 4) * 4 / triad, f"{where.type}, {str(dtype).removeprefix('torch.')}")


def _seconds(fn: Callable[[], Any], repeats: int, device: torch.device) -> float:
    with torch.no_grad():
        return measure(fn, warmup=2, repeats=repeats, device=device).median


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """A product of two square matrices, tried once."""
    ones = torch.ones(size, size, device=device).to(dtype)
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    try:
        multiply(ones, ones)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"dtype={dtype}: must be one with matrix products on {device.type} ({error})") from None
    return lambda: multiply(ones, ones)


def _triad(count: int, device: torch.device) -> Callable[[], Tensor]:
    a, b, c = (torch.full((count,), float(value), device=device) for value in range(3))  # written: pages are there
    return lambda: torch.add(b, c, alpha=3.0, out=a)


# --- Work in closed form ----------------------------------------------------------------------------------------------


def elementwise_work(
    count: int,
    dtype: torch.dtype = torch.float32,
    *,
    inputs: int = 1,
    operations: int = 1,
) -> Work:
    r"""The work of an operator on each of ``count`` numbers, with a result as large.

    .. math:: I = \frac{operations}{(inputs + 1)\, w}, \qquad
        \tfrac18 \text{ for a ReLU in float32 } (w = 4)

    with w bytes a number, whatever the count: a larger batch does not help.
    """
    at_least(0, count=count, operations=operations)
    at_least(1, inputs=inputs)
    return Work(operations * count, (inputs + 1) * count * dtype.itemsize)


def linear_work(
    rows: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
) -> Work:
    r"""The work of a linear layer on ``[rows, inputs]``; rows are examples or tokens.

    .. math:: I = \frac{2\,n\,i\,o}{w\,(n\,i + i\,o + n\,o)}

    with n rows, i inputs, o outputs, w bytes a number: about 2/w for one row, towards
    2n/w while weights are what moves. The bias's bytes count, its additions do not (as
    in ``lab.costs.flops``).
    """
    at_least(1, rows=rows, inputs=inputs, outputs=outputs)
    weights = inputs * outputs
    moved = rows * inputs + weights + bias * outputs + rows * outputs
    return Work(2 * rows * weights, moved * dtype.itemsize)


def convolution_work(
    batch: int,
    channels_in: int,
    channels_out: int,
    kernel: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    *,
    groups: int = 1,
) -> Work:
    r"""The work of a square convolution without bias that keeps the ``size``.

    With N images of P pixels, C channels in and out, kernel k, w bytes a number:

    .. math:: I = \frac{2 k^2 C}{w\,(2 + k^2 C / (N P))}, \qquad
        \text{depthwise } \frac{2 k^2}{w\,(2 + k^2 / (N P))} \approx \frac{k^2}{w}

    Full, an activation is used for every channel, depthwise for its own alone: C times
    fewer operations for nearly the same bytes. ``ValueError`` for numbers below 1, and
    for groups that do not divide the channels.
    """
    at_least(1, batch=batch, channels_in=channels_in, channels_out=channels_out)
    at_least(1, kernel=kernel, size=size, groups=groups)
    both = math.gcd(channels_in, channels_out)
    common = f"a divisor of {channels_in} and {channels_out}"
    require("groups", groups, lambda g: both % g == 0, common)
    pixels, weights = batch * size**2, channels_in // groups * channels_out * kernel**2
    moved = pixels * (channels_in + channels_out) + weights
    return Work(2 * pixels * weights, moved * dtype.itemsize)


# --- Work of a layer --------------------------------------------------------------------------------------------------

OPERATIONS: dict[type[nn.Module], int] = {
    nn.Identity: 0,
    nn.Flatten: 0,
    nn.ReLU: 1,
    nn.LeakyReLU: 2,
    nn.Dropout: 2,
    nn.Sigmoid: 4,
    nn.Tanh: 4,
    nn.SiLU: 5,
    nn.GELU: 5,
    nn.Softmax: 5,
    nn.BatchNorm1d: 2,
    nn.BatchNorm2d: 2,
    nn.LayerNorm: 7,
}
"""Operations for each output of layers without products; 1 for any other. An exponential or an error function counts as
one, batch norm as in evaluation (a factor and a term). Rough, and of no matter: they all lie far below the ridge."""


@torch.no_grad()
def layer_work(layer: nn.Module, x: Inputs) -> Work:
    """Return the work of one forward pass of a layer or block.

    Operations are those of its products (``lab.costs.flops``), or, if it has none,
    ``OPERATIONS`` for each output. Bytes are those of its inputs, parameters, buffers
    of real numbers and outputs, once each; a layer that only looks at its input in
    another shape moves nothing.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    versions = [tensor._version for tensor in inputs]
    y = layer(*inputs)
    outputs = y if isinstance(y, tuple) else (y,)
    written = versions != [tensor._version for tensor in inputs]  # in place
    if not written and _places(outputs) <= _places(inputs):
        return Work(0, 0)
    kept = [*layer.parameters(), *(b for b in layer.buffers() if b.is_floating_point())]
    tensors = (*inputs, *kept, *outputs)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    products = flops(layer, inputs)
    return Work(products or _operations(layer, inputs, outputs), moved)


def _places(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _operations(layer: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        return inputs[0].numel()  # each place is looked at once, where windows do not overlap
    each = next((n for kind, n in OPERATIONS.items() if isinstance(layer, kind)), 1)
    return each * sum(tensor.numel() for tensor in outputs)


@torch.no_grad()
def seen_inputs(model: nn.Module, x: Inputs) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    """Yield ``(name, layer, its inputs)`` for each layer, in the order of their calls in a forward pass.

    A layer is a module without children, or one that multiplies something that none of its children does: attention is
    one layer, its projections part of it. Sums with a shortcut and functions between layers are no layer.
    """
    calls: list[tuple[str, nn.Module, tuple[Tensor, ...]]] = []
    whole = {name: layer for name, layer in model.named_modules() if name or not any(model.children())}
    names = {layer: name for name, layer in whole.items()}

    def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((names[layer], layer, args))

    hooks = [layer.register_forward_pre_hook(see) for layer in names]
    try:
        model(*(x if isinstance(x, tuple) else (x,)))
    finally:
        for hook in hooks:
            hook.remove()
    inputs = {layer: args for _, layer, args in calls}
    units = {layer for layer in inputs if _is_one(layer, inputs)}
    inner = {part for unit in units for part in unit.modules() if part is not unit}
    yield from (call for call in calls if call[1] in units - inner)


def _is_one(layer: nn.Module, inputs: Mapping[nn.Module, tuple[Tensor, ...]]) -> bool:
    """Whether a module has no parts that are called, or multiplies more than they do together."""
    parts = sum(flops(part, inputs[part]) for part in _called_parts(layer, inputs))
    return not any(layer.children()) or flops(layer, inputs[layer]) > parts


def _called_parts(layer: nn.Module, called: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The children that are called; of those that are not, such as lists of layers, what they hold."""
    for child in layer.children():
        yield from (child,) if child in called else _called_parts(child, called)


@torch.no_grad()
def per_layer(
    model: nn.Module, x: Inputs, machine: Machine, *, measured: bool = False, repeats: int = 7
) -> pd.DataFrame:
    """Return a table of layers under the roof: a row for each in a forward pass in evaluation.

    Columns: ``flops``, ``bytes``, ``intensity``, ``bound`` ("memory" or "compute"), ``least_seconds``. With
    ``measured``, also ``seconds`` (the median of ``repeats`` calls of the layer alone, whose input may lie in a cache)
    and ``roof_share``: what it reaches of what the roof allows.

    Parameters
    ----------
    model : as it is; put back into its mode afterwards.
    machine : of ``measured_peaks``, of the model's type.
    """
    modes = {module: module.training for module in model.modules()}
    rows: dict[str, dict[str, Any]] = {}
    try:
        for name, layer, inputs in seen_inputs(model.eval(), x):
            work = layer_work(layer, inputs)
            if work.bytes_moved:
                rows[_new_name(name or type(layer).__name__, rows)] = _row(work, machine) | (
                    _measured(layer, inputs, work, machine, repeats) if measured else {}
                )
    finally:
        for module, was in modes.items():
            module.training = was
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def _new_name(name: str, taken: Mapping[str, Any]) -> str:
    """A layer that is called twice has two rows."""
    return name if name not in taken else f"{name} ({sum(key.split(' (')[0] == name for key in taken) + 1})"


def _row(work: Work, machine: Machine) -> dict[str, Any]:
    return {
        "flops": work.flops,
        "bytes": work.bytes_moved,
        "intensity": work.intensity,
        "bound": bound(machine, work),
        "least_seconds": least_seconds(machine, work),
    }


def _measured(
    layer: nn.Module, inputs: tuple[Tensor, ...], work: Work, machine: Machine, repeats: int
) -> dict[str, float]:
    seconds = measure(lambda: layer(*inputs), warmup=2, repeats=repeats, device=inputs[0].device).median
    return {"seconds": seconds, "roof_share": least_seconds(machine, work) / seconds}


# --- Drawn ------------------------------------------------------------------------------------------------------------


def draw(ax: Axes, machine: Machine, points: Mapping[str, tuple[float, float]] | pd.DataFrame | None = None) -> Axes:
    """Draw the roof in logarithmic axes, and points under it with their names.

    Parameters
    ----------
    points : name -> (operations for each byte, operations a second); or the table of ``per_layer`` with ``measured``.
    """
    if isinstance(points, pd.DataFrame):
        reached = points["flops"] / points["seconds"]
        points = {str(name): (points["intensity"][name], reached[name]) for name in points.index}
    shown = {name: point for name, point in (points or {}).items() if min(point) > 0}
    top = ridge(machine)
    low = min([top / 100, *(x / 2 for x, _ in shown.values())])
    high = max([top * 10, *(x * 2 for x, _ in shown.values())])
    x = np.unique([*np.geomspace(low, high, 60), top])
    ax.plot(x, [attainable(machine, each) for each in x], color=plotting.INK, label="roof")
    ax.axvline(top, color=plotting.FAINT, linestyle=":", linewidth=1)
    for name, (intensity, rate) in shown.items():
        ax.plot([intensity], [rate], "o", color=plotting.PALETTE[0 if intensity >= top else 1], markersize=4)
        ax.annotate(name, (intensity, rate), xytext=(3, -9), textcoords="offset points", fontsize=7)
    ax.set(xscale="log", yscale="log", xlabel="operations for each byte", ylabel="operations a second")
    return ax
