r"""Post-training quantisation: a trained network with small integers in it, without training it on.

======================  ============================================  =============================================
name                    what it does or gives                         source
======================  ============================================  =============================================
``weights_only``        weights stored in few bits, used as reals     Han et al. 2015, arXiv:1510.00149
``dynamic``             integer products, ranges from each batch      Krishnamoorthi 2018, arXiv:1806.08342
``static``              integer products, ranges fixed beforehand     Jacob et al. 2017, arXiv:1712.05877
``requantise``          32-bit sums to small integers, without reals  Jacob et al. 2017, section 2.2
*what helps*
``fold_batch_norm``     batch norm into the layer before it           Jacob et al. 2017, section 3.2
``equalise``            channels of one size across two layers        Nagel et al. 2019, arXiv:1906.04721
``correct_bias``        the mean error taken off each output          Nagel et al. 2019, section 4.2
``adaptive_rounding``   up or down, as the layer's output wants it    Nagel et al. 2020 (AdaRound), arXiv:2004.10568
*what it costs*
``sensitivity``         the loss when one layer alone is quantised    Wu et al. 2020, arXiv:2004.09602
``stored_bytes``        bytes of the network, with some weights so
======================  ============================================  =============================================

Each gives a copy. ``samples`` are what a range or a mean is taken from: a ``Split``, or batches of inputs; labels play
no part. Layers are ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d``, by their qualified names.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

from course_lib.compression.calibration import moving_average
from course_lib.compression.formats import Format, Rounded
from course_lib.compression.quantisation import (
    Granularity,
    Grid,
    LowHigh,
    Quantised,
    min_max,
    quantise,
    quantise_weight,
    scale_and_zero,
)
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split, batches
from course_lib.lab.training import evaluate

Layers = Iterable[str] | None
Samples = Split | Iterable[Tensor]
Weights = Mapping[str, Quantised | Rounded]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
ACTIVATIONS = Grid(8, symmetric=False, signed=False)
"""0 to 255 with a zero point: the usual grid for what layers see."""


def quantisable_layers(model: nn.Module, layers: Layers = None) -> dict[str, nn.Module]:
    """Return the layers that can be quantised, by name: all, or those named.

    Raises
    ------
    ValueError : a name is that of no such layer, or there is none; or the weight is computed (masked, packed).
    """
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: must be several names, such as [{layers!r}]")
    wanted = list(found if layers is None else layers)
    require("layers", wanted, bool, "the names of one layer or more (nn.Linear, nn.Conv1d, nn.Conv2d)")
    for name in wanted:
        require("layers", name, lambda n: n in found, f"among {', '.join(found)}")
        if parametrize.is_parametrized(found[name], "weight"):
            raise ValueError(f"layers names {name!r}, whose weight is computed: must be an ordinary weight")
    return {name: layer for name, layer in found.items() if name in wanted}


# --- Weights alone ----------------------------------------------------------------------------------------------------


def weights_only(
    model: nn.Module,
    to: Grid | Format | Callable[[Tensor], Quantised],
    granularity: Granularity = "channel",
    *,
    low_high: LowHigh = min_max,
    layers: Layers = None,
) -> nn.Module:
    """Return a copy whose weights are stored in few bits; inputs and products stay reals.

    Parameters
    ----------
    to : a grid, or what gives a weight in another format (``formats``). Weights on a grid are stored packed; of other
        formats the reals are, so that they compute right but take the space that they took.
    granularity, low_high : of a grid, as in ``quantise_weight``.
    """
    to = partial(quantise_weight, grid=to, granularity=granularity, low_high=low_high) if isinstance(to, Grid) else to
    found = quantisable_layers(model, layers)
    return with_weights(model, {name: to(_weight(layer)) for name, layer in found.items()})


def with_weights(model: nn.Module, weights: Weights) -> nn.Module:
    """Return a copy of the network with these weights, by the names of their layers: integers packed, reals as reals.

    Raises
    ------
    ValueError : a name or a shape does not fit.
    """
    made = copy.deepcopy(model)
    for name, layer in quantisable_layers(made, weights).items():
        weight, shape = weights[name], tuple(_weight(layer).shape)
        require(f"weights[{name!r}]", tuple(weight.dequantise().shape), shape.__eq__, f"of the shape {shape}")
        if isinstance(weight, Quantised):
            _store(layer, weight)
        else:
            _weight(layer).copy_(weight.weight)
    return made


class Packed(nn.Module):
    """The parametrization packed bytes -> weight: unpacked each time it is read, in the type of the network.

    The state dict of a layer ``fc`` holds ``fc.parametrizations.weight.original0``, uint8, in place of ``fc.weight``.
    """

    def __init__(self, weight: Quantised) -> None:
        super().__init__()
        self.first: Tensor | None = weight.stored()
        self.shape = replace(weight, **{n: getattr(weight, n).to("meta") for n in ("integers", "scales", "zeros")})
        self.like: Tensor
        # no numbers; it changes its type when the network does
        self.register_buffer("like", torch.empty(0, dtype=weight.dtype), persistent=False)

    def quantised(self, stored: Tensor) -> Quantised:
        """Return the integers, scales and zero points."""
        return replace(self.shape.restored(stored), dtype=self.like.dtype)

    def forward(self, stored: Tensor) -> Tensor:
        """Return the reals."""
        return self.quantised(stored).dequantise()

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """Return the bytes, when the layer is made; a tuple, since torch lets no single tensor change its type."""
        if self.first is None:
            raise ValueError("weight is packed: must be replaced by with_weights(model, {layer: quantised weight})")
        first, self.first = self.first, None
        return (first,)


def _store(layer: nn.Module, weight: Quantised) -> None:
    real = _weight(layer)
    del layer.weight  # a parameter wants gradients, and bytes have none: a buffer in its place
    layer.register_buffer("weight", real)
    parametrize.register_parametrization(layer, "weight", Packed(weight), unsafe=True)


def stored_bytes(model: nn.Module, weights: Weights | None = None) -> float:
    """Return the bytes of a network's parameters and buffers, those ``weights`` in their formats."""
    weights = weights or {}
    rest = {k: v for k, v in model.state_dict().items() if k.removesuffix(".weight") not in weights}
    count = sum(v.numel() * v.element_size() for v in rest.values())
    return count + sum(w.bits_per_weight * w.dequantise().numel() / 8 for w in weights.values())


# --- Integer products -------------------------------------------------------------------------------------------------


class IntegerLayer(nn.Module):
    r"""A linear layer or a convolution that multiplies integers: :math:`y = s_x s_w \sum (q_x - z_x)(q_w - z_w) + b`.

    The sum is exact, as in the 32-bit accumulator of the hardware: it is computed on integers in float64, which holds
    them up to 2**53. (GPUs have no other product of integers in torch.) A subclass says which grid the input is on.
    """

    def __init__(self, layer: nn.Module, weight: Quantised, activations: Grid) -> None:
        super().__init__()
        rows = weight.integers.shape[0]
        require("granularity", weight.group, lambda g: g >= weight.integers[0].numel(), "'tensor' or 'channel' here")
        self.activations, self.weights = activations, weight.grid
        self.map = _linear_map(layer)
        self.integers: Tensor
        self.scales: Tensor
        self.zeros: Tensor
        self.register_buffer("integers", weight.integers.to(_smallest(weight.grid)))
        self.register_buffer("scales", weight.scales[:, 0].to(weight.dtype).expand(rows).clone())
        self.register_buffer("zeros", weight.zeros[:, 0].expand(rows).clone())
        bias = torch.zeros_like(self.scales) if layer.bias is None else layer.bias.detach().clone()  # type: ignore[operator]
        self.bias = nn.Parameter(bias, requires_grad=False)

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point of the input."""
        raise NotImplementedError

    def accumulate(self, q: Tensor, zero: Tensor) -> Tensor:
        """Return the sums of products of input integers with the weight's, whole numbers in float64."""
        zeros = self.zeros.view(-1, *[1] * (self.integers.ndim - 1))
        sums = self.map((q - zero).double(), (self.integers - zeros).double())
        return sums.round()  # a convolution by Fourier transform or Winograd's way is not quite exact

    def forward(self, x: Tensor) -> Tensor:
        """Return the reals that the sums stand for, in the type of ``x``."""
        scale, zero = self.range(x)
        sums = self.accumulate(quantise(x, scale, zero, self.activations), zero)
        return (sums * self.by_channel(scale * self.scales) + self.by_channel(self.bias)).to(x.dtype)

    def by_channel(self, values: Tensor) -> Tensor:
        """Give ``[outputs]`` the shape that broadcasts with what the layer gives."""
        return values.view(-1, *[1] * (self.integers.ndim - 2))


class DynamicLayer(IntegerLayer):
    """Takes the range of each batch as it comes: no calibration, but a pass over the input before the product."""

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point of this batch."""
        return scale_and_zero(*min_max(x.detach().flatten()), self.activations)


class StaticLayer(IntegerLayer):
    r"""Has its input's range fixed, so that the bias can be an integer too: :math:`\mathrm{round}(b / (s_x s_w))`."""

    def __init__(self, layer: nn.Module, weight: Quantised, activations: Grid, scale: Tensor, zero: Tensor) -> None:
        super().__init__(layer, weight, activations)
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("scale", scale.detach().to(weight.dtype).clone())
        self.register_buffer("zero", zero.detach().clone())

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point found beforehand."""
        return self.scale, self.zero

    def integer_bias(self) -> Tensor:
        """Return the bias in units of the sums, ``[outputs]``, whole numbers in float64."""
        return (self.bias / (self.scale * self.scales)).double().round()

    def forward(self, x: Tensor) -> Tensor:
        """Return the reals that sums and bias stand for, in the type of ``x``."""
        q = quantise(x, self.scale, self.zero, self.activations)
        sums = self.accumulate(q, self.zero) + self.by_channel(self.integer_bias())
        return (sums * self.by_channel(self.scale * self.scales)).to(x.dtype)


def requantise(sums: Tensor, multiplier: float, zero: int, grid: Grid) -> Tensor:
    r"""Return 32-bit sums as integers of the next layer's grid, in integer arithmetic
    alone.

    The multiplier :math:`M = s_x s_w / s_{next}` is a real below 1: it is written as a
    31-bit integer over a power of two, so that a product of integers and a shift
    remain. The shift rounds halves up.

    Parameters
    ----------
    sums : int32 or int64 integers.
    multiplier : above 0 and below 1.

    Raises
    ------
    ValueError : the multiplier is not between 0 and 1.
    """
    allowed = "a number between 0 and 1"
    require("multiplier", multiplier, lambda m: is_number(m) and 0 < m < 1, allowed)
    fraction, exponent = math.frexp(multiplier)  # fraction from 1/2 to 1
    mantissa, shift = round(fraction * 2**31), 31 - exponent
    if shift > 62:  # below the last bit of any 32-bit sum
        return torch.full_like(sums, zero, dtype=torch.int32).clamp(grid.low, grid.high)
    rounded = (sums.long() * mantissa + (1 << (shift - 1))) >> shift
    return (rounded + zero).clamp(grid.low, grid.high).to(torch.int32)


def dynamic(
    model: nn.Module,
    weights: Grid = Grid(8),  # noqa: B008  # frozen
    activations: Grid = ACTIVATIONS,
    *,
    granularity: Granularity = "channel",
    layers: Layers = None,
) -> nn.Module:
    """Return a copy whose layers multiply integers, each batch's inputs on a grid over its own range.

    Without ``layers`` the linear ones, where this pays: their weights are large, and what goes in is not.
    """
    found = quantisable_layers(model, layers)
    if layers is None:
        found = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}
        require("model", type(model).__name__, lambda _: bool(found), "a network with an nn.Linear, or give layers=")
    made = copy.deepcopy(model)
    for name, layer in found.items():
        made = put(made, name, DynamicLayer(layer, quantise_weight(_weight(layer), weights, granularity), activations))
    return made


def static(
    model: nn.Module,
    samples: Samples,
    weights: Grid = Grid(8),  # noqa: B008  # frozen
    activations: Grid = ACTIVATIONS,
    *,
    calibrator: LowHigh = min_max,
    momentum: float | None = None,
    granularity: Granularity = "channel",
    low_high: LowHigh = min_max,
    layers: Layers = None,
    fold: bool = True,
) -> nn.Module:
    """Return a copy whose layers multiply integers, the grids of their inputs fixed by ``samples``.

    Parameters
    ----------
    samples : some hundred examples; what the layers see of them is kept until the ranges are found.
    calibrator : gives the range of a layer's inputs, from all samples at once.
    momentum : with a number, a range a batch, and their moving average.
    low_high : gives the ranges of the weights.
    fold : batch norms are folded into the layers before them.
    """
    made = fold_batch_norm(model) if fold else copy.deepcopy(model)
    seen = layer_inputs(made, samples, layers)
    for name, layer in quantisable_layers(made, layers).items():
        if momentum is None:
            low, high = calibrator(torch.cat([x.flatten() for x in seen[name]]), activations)
        else:
            low, high = moving_average((calibrator(x.flatten(), activations) for x in seen[name]), momentum)
        weight = quantise_weight(_weight(layer), weights, granularity, low_high)
        made = put(made, name, StaticLayer(layer, weight, activations, *scale_and_zero(low, high, activations)))
    return made


@torch.no_grad()
def layer_inputs(model: nn.Module, samples: Samples, layers: Layers = None) -> dict[str, list[Tensor]]:
    """Return what each layer sees, batch after batch, in evaluation mode; the network stays as it is."""
    watched = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(args[0])

    for name, layer in quantisable_layers(watched, layers).items():
        layer.register_forward_pre_hook(partial(note, name))
    for x in _inputs(model, samples):
        watched(x)
    return seen


# --- Batch norm -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> nn.Module:
    r"""Return a copy in which each batch norm after a convolution or linear layer is
    part of it.

    In evaluation a batch norm is :math:`\gamma (y - \mu) / \sigma + \beta`: scale and
    shift of each output, which the weights and the bias can do as well. ``nn.Identity``
    stands in its place. Where one of the two is used in several places, or the norm
    keeps no statistics, both stay.
    """
    made = copy.deepcopy(model).eval()
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    if not any(isinstance(module, norms) for module in made.modules()):
        return made
    nodes = fx.symbolic_trace(made).graph.nodes
    once = _used_once(nodes)
    for node in nodes:
        norm = _module(made, node)
        if isinstance(norm, norms) and norm.running_mean is not None:
            before: Any = node.args[0]
            layer = _module(made, before)
            alone = isinstance(layer, LAYERS) and {node.target, before.target} <= once
            if alone and len(before.users) == 1:
                put(made, before.target, _fused(layer, norm))
                put(made, node.target, nn.Identity())
    return made


def _fused(layer: Any, norm: Any) -> nn.Module:
    if not isinstance(layer, nn.Linear):
        return fuse_conv_bn_eval(layer, norm)
    return nn.utils.fusion.fuse_linear_bn_eval(layer, norm)


# --- Cross-layer equalisation -----------------------------------------------------------------------------------------

# s > 0 passes through: f(s x) = s f(x)
HOMOGENEOUS = (nn.ReLU, nn.Identity, nn.Dropout, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
HOMOGENEOUS_CALLS = (F.relu, torch.relu, torch.flatten, "flatten", "relu")


@torch.no_grad()
def equalise(model: nn.Module, rounds: int = 20) -> nn.Module:
    r"""Return a copy that computes the same, with the channels between two layers
    scaled to one size.

    Channel i of the first layer is divided by :math:`s_i`, and the second multiplies
    its inputs i by it; since :math:`\mathrm{relu}(x/s) = \mathrm{relu}(x)/s` nothing
    changes but the ranges :math:`r` of the weights:

    .. math:: s_i = \sqrt{r_i^{(1)} r_i^{(2)}} \, / \, r_i^{(2)}

    makes them alike, so that one scale serves all channels. Fold batch norms first: a
    pair with one between is left alone. Layers that follow each other in a chain are
    gone through several times.
    """
    at_least(1, rounds=rounds)
    made = copy.deepcopy(model)
    pairs = equalisable_pairs(made)
    for _ in range(rounds):
        for first, second in pairs:
            equalise_pair(made.get_submodule(first), made.get_submodule(second))
    return made


@torch.no_grad()
def equalise_pair(first: Any, second: Any) -> Tensor:
    """Scale the channels between two layers, in place; return by what the first was
    divided, ``[channels]``.
    """
    r1 = first.weight.abs().flatten(1).amax(1)
    r2 = second.weight.abs().transpose(0, 1).flatten(1).amax(1)
    alive = (r1 > 0) & (r2 > 0)
    s = torch.where(alive, (r1 * r2).sqrt() / torch.where(alive, r2, 1), 1)
    first.weight.div_(s.view(-1, *[1] * (first.weight.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(s)
    second.weight.mul_(s.view(1, -1, *[1] * (second.weight.ndim - 2)))
    return s


def equalisable_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the pairs of layers between which nothing stands but what a positive scale passes through.

    Both are used in one place only: elsewhere a scaled layer would be another one.
    """
    pairs = []
    nodes = fx.symbolic_trace(model).graph.nodes
    once = _used_once(nodes)
    for node in nodes:
        first = _module(model, node)
        after: Any = _through(model, node) if isinstance(first, LAYERS) else None
        second = _module(model, after)
        plain = isinstance(second, LAYERS) and getattr(second, "groups", 1) == 1
        plain = plain and {node.target, after.target} <= once
        # not where the places of an image were flattened to inputs of a linear layer
        if plain and _weight(second).shape[1] == _weight(first).shape[0]:
            pairs.append((str(node.target), str(after.target)))
    return pairs


def _used_once(nodes: Iterable[fx.Node]) -> set[Any]:
    """The modules that a network calls in one place."""
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    return {name for name, count in calls.items() if count == 1}


def _through(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node that uses this one's result in the end, if it is the only one and all between is homogeneous."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        passes = isinstance(_module(model, node), HOMOGENEOUS) or node.target in HOMOGENEOUS_CALLS
        if not passes:
            return node
    return None


# --- Bias correction --------------------------------------------------------------------------------------------------


@torch.no_grad()
def correct_bias(quantised: nn.Module, model: nn.Module, samples: Samples) -> nn.Module:
    r"""Return a copy of the quantised network whose layers' outputs have the means that
    ``model``'s have.

    Rounding shifts the mean of an output by :math:`\mathbb E[\Delta W x]`, which the
    bias takes off again: layer after layer, each seeing what the corrected ones before
    it give. Layers without a bias get one; fold batch norms first.

    Parameters
    ----------
    quantised : made from ``model`` by ``weights_only``, ``dynamic`` or ``static`` (with
        ``fold=False``).
    """
    made = copy.deepcopy(quantised).eval()
    held = list(_inputs(model, samples))
    names = list(layer_inputs(model, held[:1]))  # in the order in which they compute
    wanted = _mean_outputs(model, held, names)
    for name in names:
        layer: Any = made.get_submodule(name)
        error = wanted[name] - _mean_outputs(made, held, [name])[name]
        before = torch.zeros_like(error) if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter(before + error, requires_grad=False)
    return made


@torch.no_grad()
def _mean_outputs(model: nn.Module, held: list[Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The mean of each output channel of some layers, ``[channels]``."""
    watched = copy.deepcopy(model).eval()
    sums: dict[str, Any] = {}

    def note(name: str, dim: int, layer: nn.Module, args: Any, y: Tensor) -> None:
        rows = y.movedim(dim, -1).flatten(0, -2)  # [..., channels]
        total, count = sums.get(name, (0, 0))
        sums[name] = (total + rows.sum(0), count + len(rows))

    for name in names:
        layer = watched.get_submodule(name)
        weight = layer.integers if isinstance(layer, IntegerLayer) else _weight(layer)
        layer.register_forward_hook(partial(note, name, -1 if weight.ndim == 2 else 1))
    for x in held:
        watched(x)
    return {name: total / count for name, (total, count) in sums.items()}


# --- Adaptive rounding ------------------------------------------------------------------------------------------------


def adaptive_rounding(
    w: Tensor,
    hessian: Tensor,
    grid: Grid,
    granularity: Granularity = "channel",
    low_high: LowHigh = min_max,
    *,
    steps: int = 300,
    lr: float = 0.02,
    strength: float = 10.0,
) -> Quantised:
    r"""Return a weight each of whose numbers is rounded up or down, as suits the
    outputs and not the weight.

    A variable v for each number says how far up it goes, :math:`h(v)` between 0 and 1.
    Adam makes the error of the outputs small, the sum over the rows e of
    :math:`\hat w - w` of :math:`e H e^\top`, and a growing penalty
    :math:`1 - |2h - 1|^\beta` drives each h to one of its ends. Nearest rounding is what
    comes out of uncorrelated inputs.

    Parameters
    ----------
    w : ``[outputs, ...]``.
    hessian : ``[I, I]``, the mean of :math:`x x^\top` (or a multiple of it) over the
        inputs x that a row is multiplied with: ``second_order.hessian``.
    strength : of the penalty, in units of the error of nearest rounding.

    Raises
    ------
    ValueError : the shapes do not fit.
    """
    at_least(1, steps=steps)
    columns = w[0].numel()
    square = (columns, columns)
    require("hessian", tuple(hessian.shape), square.__eq__, f"of the shape {square}")
    nearest = quantise_weight(w, grid, granularity, low_high)
    w, hessian = w.detach().double(), hessian.double()
    scale, zero = nearest.spread(nearest.scales).double(), nearest.spread(nearest.zeros)
    down = torch.floor(w / scale)

    def error(up: Tensor) -> Tensor:
        q = (down + up + zero).clamp(grid.low, grid.high)
        off = ((q - zero) * scale - w).flatten(1)
        return (off @ hessian * off).sum()

    unit = error(torch.round(w / scale) - down).clamp(min=torch.finfo(w.dtype).tiny)
    up = _soften(lambda h: error(h) / unit, w / scale - down, steps, lr, strength)
    integers = (down + (up >= 0.5) + zero).clamp(grid.low, grid.high).to(torch.int32)
    return replace(nearest, integers=integers)


@torch.enable_grad()
def _soften(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, lr: float, strength: float) -> Tensor:
    """Minimise over numbers from 0 to 1 that are driven to the ends, the longer the harder; from ``start`` on."""
    # a sigmoid stretched beyond both ends, so that they can be reached (the paper's rectified sigmoid)
    v = (-torch.log(1.2 / (start + 0.1) - 1)).requires_grad_()
    optimizer = torch.optim.Adam([v], lr=lr)
    for step in range(steps):
        h = (1.2 * v.sigmoid() - 0.1).clamp(0, 1)
        beta = 20 - 18 * step / steps
        penalty = (1 - (2 * h - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        (loss(h) + (strength * penalty if step >= steps // 5 else 0)).backward()
        optimizer.step()
    return (1.2 * v.detach().sigmoid() - 0.1).clamp(0, 1)


# --- What it costs ----------------------------------------------------------------------------------------------------


def sensitivity(
    model: nn.Module,
    split: Split,
    to: Grid | Format | Callable[[Tensor], Quantised],
    granularity: Granularity = "channel",
    *,
    layers: Layers = None,
) -> pd.DataFrame:
    """Return what it costs when one layer alone is quantised: a row a layer, in the order of the network.

    The columns are ``weights`` (their number), ``loss``, ``accuracy``, and ``increase`` of the loss over that of the
    network as it is.
    """
    plain = evaluate(model, split)
    rows = {}
    for name, layer in quantisable_layers(model, layers).items():
        found = evaluate(weights_only(model, to, granularity, layers=[name]), split)
        rows[name] = {
            "weights": _weight(layer).numel(),
            "loss": found.loss,
            "accuracy": found.accuracy,
            "increase": found.loss - plain.loss,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


# --- Inside -----------------------------------------------------------------------------------------------------------


def _weight(layer: Any) -> Tensor:
    return layer.weight.detach()


def put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put a module into a network in place of the one of this name; return the network."""
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module.train(model.training))
    return model


def _linear_map(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """``(x, weight) -> y``: what the layer does, without its bias."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if layer.padding_mode != "zeros":
        raise ValueError(f"padding_mode={layer.padding_mode!r}: must be 'zeros' for integer products")
    convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    settings = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    return partial(convolve, **settings)


def _smallest(grid: Grid) -> torch.dtype:
    """The smallest type that holds the grid's integers."""
    types = (torch.uint8, torch.int8, torch.int16)
    return next((t for t in types if torch.iinfo(t).min <= grid.low and grid.high <= torch.iinfo(t).max), torch.int32)


def _module(model: nn.Module, node: Any) -> nn.Module | None:
    """The module that a node of a traced network calls."""
    return model.get_submodule(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _inputs(model: nn.Module, samples: Samples) -> Iterator[Tensor]:
    """The batches of inputs, where and in the type in which the network computes."""
    home = next(value for value in model.state_dict().values() if value.is_floating_point())
    if isinstance(samples, Split):
        samples = (x for x, _ in batches(samples.to(home.device), 256, dtype=home.dtype))
    found = 0
    for x in samples:
        found += 1
        yield x.to(home.device, home.dtype)
    require("samples", found, bool, "one batch or more")
