r"""Quantisation-aware training: the network trains with the rounding that it will be used with.

======================  ============================================  =============================================
name                    what it does                                  source
======================  ============================================  =============================================
``straight_through``    rounds forwards, lets gradients through       Bengio, Léonard & Courville 2013,
                                                                      arXiv:1308.3432
``learnt_step``         the same, and the scale learns (LSQ)          Esser et al. 2019, arXiv:1902.08153
``clipped``             the clip of a ReLU learns (PACT)              Choi et al. 2018, arXiv:1805.06085
*quantisers*            *modules around them, that know their scale*
``MinMaxWeights``       of each output's weights as they are          Krishnamoorthi 2018, arXiv:1806.08342
``MovingRange``         of inputs: the moving average of ranges       Jacob et al. 2017, arXiv:1712.05877
``LearntWeights``,      LSQ
``LearntInputs``
``ClippedInputs``       PACT
*networks*
``quantise_aware``      puts quantisers into a network
``convert``             integer products in their place, same output
======================  ============================================  =============================================

Between the two ``fit(model, data, recipe)`` trains the network like any other. Rounding has the derivative 0 almost
everywhere; the straight-through estimator takes that of the identity for it, and 0 where the number was clipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from course_lib.compression.post_training import ACTIVATIONS, Layers, StaticLayer, put, quantisable_layers
from course_lib.compression.quantisation import Grid, Quantised, fake_quantise, min_max, quantise, scale_and_zero
from course_lib.lab.arguments import is_number, require

# --- Rounding with a gradient -----------------------------------------------------------------------------------------


def straight_through(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Return ``fake_quantise(x, ...)``, whose derivative is taken to be 1 on the grid
    and 0 beyond its ends.

    No gradient goes into the scale.
    """
    unclamped = torch.round(x.detach() / scale) + zero
    inside = (unclamped >= grid.low) & (unclamped <= grid.high)
    return fake_quantise(x.detach(), scale, zero, grid) + inside * (x - x.detach())


def learnt_step(
    x: Tensor,
    step: Tensor,
    zero: Tensor,
    grid: Grid,
    gradient_scale: float,
) -> Tensor:
    r"""Return ``x`` rounded to the grid of a scale that learns.

    With :math:`v = x/s` and the ends n and p of the grid, counted from the zero point,
    the derivative by s is

    .. math:: \partial\hat x/\partial s =
        n \;(v \le n), \quad \mathrm{round}(v) - v \;(n < v < p), \quad p \;(v \ge p)

    times ``gradient_scale``; that by x is 1 inside and 0 where it is clipped.

    Parameters
    ----------
    gradient_scale : :math:`1/\sqrt{N p}` for N numbers that share the step, so that the
        step moves about as much, compared to its size, as the weights do to theirs.
    """
    step = _scaled_gradient(step, gradient_scale)
    v = torch.minimum(torch.maximum(x / step, grid.low - zero), grid.high - zero)
    rounded = v + (torch.round(v) - v).detach()
    return rounded * step


def _scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, with its gradient times a factor."""
    return x.detach() + factor * (x - x.detach())


def clipped(x: Tensor, clip: Tensor, grid: Grid) -> Tensor:
    r"""Return ``x`` clipped to 0 to a clip that learns, and rounded to the unsigned
    grid between them.

    The derivative by the clip is 1 where x is at least the clip and 0 elsewhere; that
    by x is 1 between the two.
    """
    inside = torch.where(x >= clip, clip, x.clamp(min=0))
    scale = clip.detach() / (grid.levels - 1)
    return inside + (torch.round(inside.detach() / scale) * scale - inside.detach())


# --- Quantisers -------------------------------------------------------------------------------------------------------


class Quantiser(nn.Module):
    """A module ``reals -> reals on a grid`` that knows the scale and the zero point of what it takes."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and the zero point with which ``x`` is rounded."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid, with the straight-through estimator's gradient."""
        return straight_through(x, *self.scale_and_zero(x), self.grid)


class MinMaxWeights(Quantiser):
    """A scale for each output, from the range of its weights as they are now."""

    def __init__(self, grid: Grid, weight: Tensor) -> None:
        super().__init__(grid)

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return them in a shape that broadcasts with the weight ``x``."""
        low, high = min_max(x.detach().flatten(1))
        return tuple(_by_output(value, x) for value in scale_and_zero(low, high, self.grid))  # type: ignore[return-value]


class MovingRange(Quantiser):
    """The moving average of the batches' ranges while it trains, and its last value in evaluation."""

    def __init__(self, grid: Grid, momentum: float = 0.1) -> None:
        require("momentum", momentum, lambda m: is_number(m) and 0 < m <= 1, "a number above 0 and at most 1")
        super().__init__(grid)
        self.momentum = momentum
        self.low: Tensor
        self.high: Tensor
        self.seen: Tensor
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("seen", torch.tensor(False))

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return them after this batch."""
        if self.training or not self.seen:
            low, high = min_max(x.detach().flatten())
            part = self.momentum if self.seen else 1.0
            self.low.lerp_(low, part)
            self.high.lerp_(high, part)
            self.seen.fill_(True)
        return scale_and_zero(self.low, self.high, self.grid)


class LearntWeights(Quantiser):
    r"""A step for each output that learns, from :math:`2\,\overline{|w|}/\sqrt p` on."""

    def __init__(self, grid: Grid, weight: Tensor) -> None:
        require("grid", grid, lambda g: g.symmetric, "a symmetric grid")
        super().__init__(grid)
        rows = weight.detach().flatten(1)
        step = 2 * rows.abs().mean(1) / grid.high**0.5
        self.step = nn.Parameter(torch.where(step > 0, step, 1))

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return them in a shape that broadcasts with the weight ``x``."""
        return _by_output(_positive(self.step), x), torch.zeros((), dtype=torch.int32, device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weight on the grid, with gradients into weight and steps."""
        return learnt_step(x, *self.scale_and_zero(x), self.grid, (x[0].numel() * self.grid.high) ** -0.5)


class LearntInputs(Quantiser):
    r"""A step for a layer's inputs that learns, from the first batch's range on; where 0 lies stays as it was then."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.step = nn.Parameter(torch.ones(()))
        self.zero: Tensor
        self.seen: Tensor
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))
        self.register_buffer("seen", torch.tensor(False))

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Take the first step from a batch."""
        scale, zero = scale_and_zero(*min_max(x.flatten()), self.grid)
        self.step.copy_(scale)
        self.zero.copy_(zero)
        self.seen.fill_(True)

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the step as it is now."""
        if not self.seen:
            self.start(x)
        return _positive(self.step), self.zero

    def forward(self, x: Tensor) -> Tensor:
        """Return the inputs on the grid, with gradients into inputs and step."""
        return learnt_step(x, *self.scale_and_zero(x), self.grid, (x[0].numel() * self.grid.high) ** -0.5)


class ClippedInputs(Quantiser):
    """A clip for a layer's inputs that learns; for inputs that are not negative, behind a ReLU."""

    def __init__(self, grid: Grid, clip: float = 6.0) -> None:
        require("grid", grid, lambda g: not g.signed, "an unsigned grid")
        require("clip", clip, lambda c: is_number(c) and c > 0, "a number above 0")
        super().__init__(grid)
        self.clip = nn.Parameter(torch.tensor(float(clip)))

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale that belongs to the clip."""
        return _positive(self.clip) / (self.grid.levels - 1), torch.zeros((), dtype=torch.int32, device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the inputs on the grid, with gradients into inputs and clip."""
        return clipped(x, _positive(self.clip), self.grid)


# --- Networks ---------------------------------------------------------------------------------------------------------


def quantise_aware(
    model: nn.Module,
    weights: Grid = Grid(8),  # noqa: B008  # frozen
    activations: Grid | None = ACTIVATIONS,
    *,
    weight_quantiser: Callable[[Grid, Tensor], Quantiser] = MinMaxWeights,
    activation_quantiser: Callable[[Grid], Quantiser] = MovingRange,
    layers: Layers = None,
) -> nn.Module:
    """Return a copy of the network whose layers round their weights and their inputs, and that can be trained.

    ``layer.weight`` is a parametrization, computed from the weight in full precision, which is what the optimizer
    changes. What goes in is rounded by ``layer.input_quantiser``. Called again with other ``layers`` it gives these
    grids of their own: the first and the last layer often keep 8 bits.

    Parameters
    ----------
    activations : the grid of the inputs; None leaves them alone.
    weight_quantiser : ``(grid, weight) -> Quantiser``.
    activation_quantiser : ``grid -> Quantiser``.
    """
    made = copy.deepcopy(model)
    for layer in quantisable_layers(made, layers).values():
        weight: Any = layer.weight
        parametrize.register_parametrization(layer, "weight", weight_quantiser(weights, weight))
        if activations is not None:
            layer.input_quantiser = activation_quantiser(activations).to(weight.device, weight.dtype)
            layer.register_forward_pre_hook(_quantise_input)
    return made


def _quantise_input(layer: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # A hook, so that the layer keeps its class and its name; one function, so that copies and pickles have it too
    return (layer.input_quantiser(args[0]), *args[1:])


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Return a copy, in evaluation mode, in which layers with quantisers multiply integers; the outputs are the same.

    But for the bias, which becomes an integer as well: it moves by at most half a unit of the 32-bit sums. A batch norm
    behind a layer stays where it is: it is a factor and a shift of each channel, as the scales and the bias are.

    Raises
    ------
    ValueError : no layer has quantisers for both its weight and its inputs, or one has seen no input yet.
    """
    made = copy.deepcopy(model).eval()
    ready = {name: layer for name, layer in made.named_modules() if hasattr(layer, "input_quantiser")}
    require("model", type(model).__name__, lambda _: bool(ready), "a network from quantise_aware, with activations")
    for name, found in ready.items():
        layer: Any = found
        inputs = layer.input_quantiser
        if not getattr(inputs, "seen", True):
            raise ValueError(f"model: the layer {name!r} has seen no input: must be trained, or called once")
        scale, zero = inputs.scale_and_zero(layer.weight)
        made = put(made, name, StaticLayer(layer, integer_weight(layer), inputs.grid, scale, zero))
    return made


def integer_weight(layer: Any) -> Quantised:
    """Return the integers of a layer that ``quantise_aware`` made, as its quantiser rounds them."""
    stored = layer.parametrizations.weight
    weight, quantiser = stored.original.detach(), stored[0]
    scale, zero = (value.detach() for value in quantiser.scale_and_zero(weight))
    rows = torch.ones(len(weight), 1, dtype=scale.dtype, device=scale.device)
    return Quantised(
        integers=quantise(weight, scale, zero, quantiser.grid),
        scales=scale.reshape(-1, 1) * rows,
        zeros=zero.reshape(-1, 1).expand(len(weight), 1),
        group=weight[0].numel(),
        grid=quantiser.grid,
        dtype=weight.dtype,
    )


# --- Inside -----------------------------------------------------------------------------------------------------------


def _by_output(values: Tensor, weight: Tensor) -> Tensor:
    """``[outputs]`` to a shape that broadcasts with a weight ``[outputs, ...]``."""
    return values.view(-1, *[1] * (weight.ndim - 1))


def _positive(step: Tensor) -> Tensor:
    """A step that training has made negative or 0 would turn the grid round: it stops just above 0."""
    return step.clamp(min=torch.finfo(step.dtype).tiny)
