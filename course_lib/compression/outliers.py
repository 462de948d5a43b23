r"""Outliers: a few channels so large that 8 bits for all leave nothing for the others, and what is done about it.

======================  =====================================================  =====================================
name                    what it does or gives                                  source
======================  =====================================================  =====================================
``int8_matmul``         integers times integers; a scale for each row of       Jacob et al. 2017, arXiv:1712.05877
                        inputs, or one for all of them
``llm_int8``            outlier channels in full precision, the rest in int8   Dettmers et al. 2022, arXiv:2208.07339
``rotated_matmul``      inputs and weights turned so that outliers spread      Ashkboos et al. 2024 (QuaRot),
                        over all channels                                      arXiv:2404.00456; Chee et al. 2023
                                                                               (QuIP), arXiv:2307.13304
``smooth_quant``        part of the large scale moved from the activations     Xiao et al. 2022, arXiv:2211.10438
                        into the weights, through the norm before them
``awq``, ``awq_model``  weights alone: those that meet large activations are   Lin et al. 2023, arXiv:2306.00978
                        enlarged before they are rounded
``inject_outliers``     large channels in a network that has none, its         –
                        function unchanged
``with_matmul``         a network whose linear layers multiply in one of
                        these ways
``peak_to_rms``         how far the largest number stands out                  Chee et al. 2023 (incoherence)
======================  =====================================================  =====================================

Language models of billions of weights have channels, the same in all tokens, that are up to twenty times as large
as the others (Dettmers et al. 2022). A network as small as the laboratory's has none by itself. ``inject_outliers``
makes some by what SmoothQuant undoes: a norm's channel is enlarged, and what reads it is divided by as much.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from course_lib.compression.quantisation import (
    Granularity,
    Grid,
    Quantised,
    quantise,
    quantise_weight,
    scale_and_zero,
)
from course_lib.compression.second_order import hessian, layer_inputs, output_error, running_layers
from course_lib.lab.arguments import at_least, is_number, is_whole, require

# --- Products of integers ---------------------------------------------------------------------------------------------

Matmul = Callable[[Tensor, Tensor], Tensor]
"""``(x, w) -> y``: inputs ``[..., I]`` and weights ``[O, I]`` to outputs ``[..., O]``."""


def int8_matmul(x: Tensor, w: Tensor, *, bits: int = 8, scales: Literal["row", "tensor"] = "row") -> Tensor:
    r"""Return :math:`x w^\top` by integers: both rounded, multiplied, and scaled back.

    .. math:: y_{no} = s_n\,t_o \sum_i q_{ni}\,p_{oi}, \qquad
        x_{ni} \approx s_n\,q_{ni}, \quad w_{oi} \approx t_o\,p_{oi}

    Symmetric grids for both. A scale can stand before the sum only if it does not depend
    on the channel i that is summed over: this is why an outlier channel cannot simply
    have a scale of its own.

    Parameters
    ----------
    x : ``[..., I]``.
    w : ``[O, I]``, with a scale for each output.
    scales : of the inputs, from x itself; one for each ``"row"`` (token), or one for the
        whole ``"tensor"``.
    """
    require("scales", scales, lambda s: s in ("row", "tensor"), "'row' or 'tensor'")
    grid = Grid(bits)
    high = x.abs().amax(-1, keepdim=True) if scales == "row" else x.abs().amax()
    scale, zero = scale_and_zero(-high, high, grid)
    weight = quantise_weight(w, grid)
    # float64 holds sums of integers exactly; int8 hardware has int32 for them
    q, p = quantise(x, scale, zero, grid), weight.integers
    sums = q.double() @ p.double().mT
    return (sums * scale * weight.scales[:, 0]).to(x.dtype)


def llm_int8(x: Tensor, w: Tensor, *, threshold: float = 6.0, bits: int = 8) -> Tensor:
    r"""Return :math:`x w^\top`, outlier channels in full precision, others in int8.

    A channel is an outlier if any of its numbers is as large as the ``threshold``. These
    are a few of thousands, so nearly all of the product is still one of integers.

    Raises
    ------
    ValueError : ``threshold`` is not above 0.
    """
    positive = is_number(threshold) and threshold > 0
    require("threshold", threshold, lambda _: positive, "a number above 0")
    large = (x.abs() >= threshold).flatten(0, -2).any(0)  # [I]
    exact = x[..., large] @ w[:, large].mT
    if bool(large.all()):
        return exact
    return exact + int8_matmul(x[..., ~large], w[:, ~large], bits=bits)


def rotated_matmul(
    x: Tensor, w: Tensor, *, matmul: Matmul = int8_matmul, generator: torch.Generator | None = None
) -> Tensor:
    r"""Return :math:`(x R)(w R)^\top = x w^\top` by ``matmul``, with R orthogonal: what is rounded is turned first.

    R is that of ``rotate``. An engine turns the weights beforehand, and the inputs where it can in the layer before.

    Parameters
    ----------
    generator : draws the signs; the same numbers for both. Without one all are positive.
    """
    signs = None if generator is None else random_signs(x.shape[-1], generator).to(x)
    return matmul(rotate(x, signs), rotate(w, None if signs is None else signs.to(w)))


def rotate(x: Tensor, signs: Tensor | None = None) -> Tensor:
    r"""Return x R, :math:`R = \mathrm{diag}(signs)\,H_n / \sqrt n`, for x ``[..., I]``.

    H is Sylvester's matrix of plus and minus ones, n the largest power of two that
    divides I: neighbours are mixed n at a time (all, if I is a power of two). In
    ``I log n`` additions a row, without a matrix.
    """
    size = x.shape[-1] & -x.shape[-1]
    y = x if signs is None else x * signs
    for step in (2**k for k in range(size.bit_length() - 1)):
        even, odd = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack((even + odd, even - odd), -2).flatten(-3)
    return y / math.sqrt(size)


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` signs, +1.0 or -1.0 with equal chance, on the generator's device."""
    at_least(1, count=count)
    return 1.0 - 2.0 * torch.randint(2, (count,), generator=generator, device=generator.device)


def peak_to_rms(x: Tensor) -> float:
    """Return the largest size of a number over the root of the mean square: 1 if all are alike, more with outliers."""
    return float(x.abs().max() / x.double().square().mean().sqrt())


class MatmulLinear(nn.Module):
    """A linear layer that multiplies in another way; the bias is added in full precision."""

    def __init__(self, layer: nn.Linear, matmul: Matmul) -> None:
        super().__init__()
        self.weight, self.bias, self.matmul = layer.weight, layer.bias, matmul

    def forward(self, x: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        y = self.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


def with_matmul(model: nn.Module, matmul: Matmul, *, layers: Sequence[str] | None = None) -> nn.Module:
    """Return a copy of the network whose linear layers, or those that are named, multiply by ``matmul``.

    Raises
    ------
    ValueError : a name is not that of a linear layer.
    """
    made = copy.deepcopy(model)
    parts = dict(made.named_modules())
    every = [name for name, part in parts.items() if isinstance(part, nn.Linear) and name]
    for name in every if layers is None else layers:
        require("layers", name, lambda name: name in every, f"among {', '.join(every) or 'none: there is no such'}")
        owner, _, attribute = name.rpartition(".")
        setattr(parts[owner], attribute, MatmulLinear(parts[name], matmul))
    return made


# --- Scales that change places ----------------------------------------------------------------------------------------

Pairs = Mapping[str, Sequence[str]]
"""The name of each norm, and those of the linear layers that read what it gives."""


def norm_pairs(model: nn.Module, x: Tensor) -> dict[str, list[str]]:
    """Return the layer norms whose output goes straight into linear layers, and those layers, by names.

    Found in a run on ``x``: it is the same tensor that leaves the one and enters the other. Whether something else
    reads it too, a run does not show; ``smooth_quant`` and ``inject_outliers`` check that the network's answer stays.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, list[str]] = {}

    def note(name: str, part: nn.Module, given: Any, output: Tensor) -> None:
        made[id(output)] = name, output  # kept, so that its id is not given to another

    def look(name: str, part: nn.Module, given: tuple[Tensor, ...]) -> None:
        if id(given[0]) in made:
            found.setdefault(made[id(given[0])][0], []).append(name)

    hooks = []
    for name, part in model.named_modules():
        if isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            hooks.append(part.register_forward_hook(partial(note, name)))
        elif isinstance(part, nn.Linear):
            hooks.append(part.register_forward_pre_hook(partial(look, name)))
    try:
        _answer(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def migrate(norm: nn.LayerNorm, linears: Iterable[nn.Linear], scales: Tensor) -> None:
    r"""Divide what a norm gives by ``scales`` ``[I]`` and multiply what reads it, in place.

    The products stay: :math:`(x/s)(s\,w)^\top = x w^\top`.
    """
    norm.weight.div_(scales.to(norm.weight))
    if norm.bias is not None:
        norm.bias.div_(scales.to(norm.bias))
    for linear in linears:
        linear.weight.mul_(scales.to(linear.weight))


def smooth_scales(activations: Tensor, weights: Tensor, alpha: float = 0.5) -> Tensor:
    r"""Return :math:`s_i = \max|x_i|^\alpha / \max|w_i|^{1-\alpha}`, from the maxima ``[I]``.

    With ``alpha`` of 0.5 the largest input and the largest weight of a channel are
    afterwards equal. A channel without inputs, or without weights, keeps its scale.

    Raises
    ------
    ValueError : ``alpha`` is not in [0, 1].
    """
    within = is_number(alpha) and 0 <= alpha <= 1
    require("alpha", alpha, lambda _: within, "a number from 0 to 1")
    scales = activations**alpha / weights ** (1 - alpha)
    return torch.where((activations > 0) & (weights > 0), scales, 1)


def smooth_quant(
    model: nn.Module, batches: Iterable[Tensor], *, alpha: float = 0.5, pairs: Pairs | None = None
) -> nn.Module:
    """Return a copy of the network with the same function, in which activations and weights share their outliers.

    Nothing is rounded yet. It reaches the layers that read a norm; others, such as the second of an MLP, stay.

    Parameters
    ----------
    batches : inputs of the network, ``[N, ...]``, on which the largest activations are looked for.
    alpha : how much of the outliers the weights take, from 0 to 1.
    pairs : see ``norm_pairs``, by which they are found otherwise.

    Raises
    ------
    ValueError : there is no batch, no such pair, ``alpha`` is not in [0, 1], or the network's answer changes.
    """
    given, made = [_beside(model, x) for x in batches], copy.deepcopy(model)
    require("batches", given, bool, "at least one batch of inputs")
    for norm, names in _checked_pairs(made, given[0], pairs).items():
        linears = {name: made.get_submodule(name) for name in names}
        seen = [rows.abs().amax(0) for _, rows in layer_inputs(made, given, dict([next(iter(linears.items()))]))]
        weights = torch.stack([layer.weight.detach().abs().amax(0) for layer in linears.values()])  # type: ignore[operator]
        scales = smooth_scales(torch.stack(seen).amax(0), weights.amax(0), alpha)
        migrate(made.get_submodule(norm), linears.values(), scales)  # type: ignore[arg-type]
    return _checked_same(model, made, given[0])


def inject_outliers(
    model: nn.Module, x: Tensor, *, channels: Sequence[int], factor: float = 64.0, pairs: Pairs | None = None
) -> nn.Module:
    """Return a copy of the network with the same function, in which some channels of each norm are ``factor`` as large.

    The weights that read them are divided by it. With a power of two not a bit of the answer changes.

    Parameters
    ----------
    x : a batch that the network can be run on.
    channels : which; the same ones behind each norm, as in language models.

    Raises
    ------
    ValueError : a channel does not exist, ``factor`` is not above 0, there is no norm with linear layers behind it, or
        the network's answer changes.
    """
    require("factor", factor, lambda f: is_number(f) and f > 0, "a number above 0")
    made = copy.deepcopy(model)
    for norm, names in _checked_pairs(made, x, pairs).items():
        layer: nn.LayerNorm = made.get_submodule(norm)  # type: ignore[assignment]
        width = layer.weight.numel()
        fits = f"whole numbers from 0 to {width - 1}"
        require("channels", [*channels], lambda c: all(is_whole(i) and 0 <= i < width for i in c), fits)  # noqa: B023
        scales = torch.ones_like(layer.weight)
        scales[[*channels]] = 1 / factor
        migrate(layer, [made.get_submodule(name) for name in names], scales)  # type: ignore[misc]
    return _checked_same(model, made, x)


# --- Weights alone ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaled:
    """A weight ``[O, I]`` whose columns were multiplied by ``scales`` ``[I]`` before they were rounded.

    The scales cost nothing where the norm before the layer can divide by them (``migrate``).
    """

    weight: Quantised
    scales: Tensor

    def dequantise(self) -> Tensor:
        """Return the weight for the inputs as they were."""
        return self.weight.dequantise() / self.scales.to(self.weight.dtype)

    @property
    def bits_per_weight(self) -> float:
        """Bits that each weight takes, as those of ``weight``."""
        return self.weight.bits_per_weight


@torch.no_grad()
def awq(
    weight: Tensor,
    magnitudes: Tensor,
    hessian: Tensor,
    grid: Grid,
    granularity: Granularity = 32,
    *,
    points: int = 20,
) -> Scaled:
    r"""Enlarge the columns that meet large inputs by :math:`s_i = (\mathbb E|x_i|)^\alpha`, and round.

    A column that is s times as large loses 1/s as much by rounding, as long as it does
    not widen its group's range. Alpha is searched for: of ``points`` values from 0
    (rounding to nearest) towards 1 that with the smallest error of the outputs is taken.
    The paper's second search, for ranges to clip to, is left out.

    Parameters
    ----------
    weight : ``[O, I]``.
    magnitudes : the mean size of each input, ``[I]``.
    hessian : of the inputs, ``[I, I]``, from ``second_order``: it measures the error.

    Raises
    ------
    ValueError : the shapes do not fit, or ``points`` is below 1.
    """
    at_least(1, points=points)
    _check_magnitudes(magnitudes, weight)
    sizes = magnitudes.clamp_min(1e-4 * float(magnitudes.mean().clamp_min(1e-30)))
    tried = []
    for k in range(points):
        scales = (sizes ** (k / points)).to(weight)
        scales = scales / (scales.max() * scales.min()).sqrt()  # around 1
        tried.append(Scaled(quantise_weight(weight * scales, grid, granularity), scales))
    return min(tried, key=lambda made: output_error(weight, made.dequantise(), hessian))


def awq_model(
    model: nn.Module,
    batches: Iterable[Tensor],
    grid: Grid,
    granularity: Granularity = 32,
    *,
    layers: Sequence[str] | None = None,
    points: int = 20,
) -> dict[str, Scaled]:
    """Round linear layers by ``awq``, each by the inputs that it has in the network as it was.

    Parameters
    ----------
    batches : inputs of the network, ``[N, ...]``.
    layers : names of linear layers; all by default.

    Returns
    -------
    The weights by the name of their layer, for ``second_order.with_weights``.

    Raises
    ------
    ValueError : as ``awq``; there is no batch; or a name is not that of a linear layer that runs.
    """
    given = [_beside(model, x) for x in batches]
    require("batches", given, bool, "at least one batch of inputs")
    every = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    for name in layers or []:
        require("layers", name, lambda name: name in every, f"among {', '.join(every)}")
    found = {}
    for name, layer in running_layers(model, given[0], every if layers is None else layers).items():
        rows = torch.cat([rows for _, rows in layer_inputs(model, given, {name: layer})])
        weight: Tensor = layer.weight  # type: ignore[assignment]
        found[name] = awq(weight.detach(), rows.abs().mean(0), hessian(rows), grid, granularity, points=points)
    return found


# --- Inside -----------------------------------------------------------------------------------------------------------


def _check_magnitudes(magnitudes: Tensor, weight: Tensor) -> None:
    wanted = tuple(weight.shape[1:])
    require("magnitudes", tuple(magnitudes.shape), lambda shape: shape == wanted, f"of shape {wanted}")


def _beside(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs on the device of the network."""
    return x.to(next(model.parameters()).device)


@torch.no_grad()
def _answer(model: nn.Module, x: Tensor) -> Tensor:
    modes = {part: part.training for part in model.modules()}
    try:
        return model.eval()(_beside(model, x))
    finally:
        for part, training in modes.items():
            part.training = training


def _checked_pairs(model: nn.Module, x: Tensor, pairs: Pairs | None) -> Pairs:
    found = norm_pairs(model, x) if pairs is None else pairs
    require("pairs", dict(found), bool, "at least one layer norm with the linear layers that read it")
    return found


def _checked_same(model: nn.Module, made: nn.Module, x: Tensor) -> nn.Module:
    """The proof that nothing else reads what was rescaled."""
    wanted, got = _answer(model, x), _answer(made, x)
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5 * float(wanted.abs().max())
    if not torch.allclose(wanted, got, rtol=0, atol=tolerance):
        raise ValueError("pairs: something else reads a norm's output, as the network's answer changes: leave it out")
    return made
