r"""Rounding that looks at the inputs: what one weight's rounding spoils, the weights still to be rounded make good.

======================  =====================================================  =====================================
name                    what it does or gives                                  source
======================  =====================================================  =====================================
``hessian``             the curvature of a layer's squared output error        Hassibi & Stork, NIPS 1992
``output_error``        that error, of any change of the weights               Hassibi & Stork, NIPS 1992
``round_to_nearest``    each weight by itself: what the others must beat
``obq``                 the cheapest weight next, the rest corrected exactly   Frantar & Alistarh 2022 (OBQ),
                                                                               arXiv:2208.11580
``gptq``                the same in one order for all rows, which makes it     Frantar et al. 2022 (GPTQ),
                        fast enough for large layers                           arXiv:2210.17323
``gptq_model``          layer by layer, each with the inputs that the rounded  Frantar et al. 2022
                        layers before it give
======================  =====================================================  =====================================

A layer with the weights W, ``[outputs, inputs]``, answers :math:`W x`. Rounding W to :math:`\hat W` costs on average

.. math:: \mathbb E\,\|(\hat W - W)\,x\|^2 = \tfrac12\operatorname{tr}\,(\hat W - W)\,H\,(\hat W - W)^\top,
    \qquad H = 2\,\mathbb E\,x x^\top

The nearest integers make each entry of :math:`\hat W - W` small. Where inputs are correlated (H is not diagonal), other
integers give a smaller sum: an error in one weight can be taken back by its neighbours'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.compression.quantisation import (
    Granularity,
    Grid,
    LowHigh,
    Quantised,
    dequantise,
    min_max,
    quantise,
    quantise_weight,
)
from course_lib.lab.arguments import is_number, require

# --- What rounding costs ----------------------------------------------------------------------------------------------


def hessian(inputs: Tensor | Iterable[Tensor]) -> Tensor:
    r"""Return :math:`H = 2\,\mathbb E\,x x^\top`, ``[I, I]``, of inputs ``[..., I]``: one tensor or several batches.

    The mean is over all rows of all batches. Half precision is summed in float32.

    Raises
    ------
    ValueError : there is no row.
    """
    total, count = None, 0
    for batch in [inputs] if isinstance(inputs, Tensor) else inputs:
        rows = batch.detach().reshape(-1, batch.shape[-1])
        rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        more = rows.mT @ rows
        total, count = more if total is None else total + more, count + len(rows)
    require("inputs", count, lambda rows: rows > 0, "at least one row")
    assert total is not None
    return 2 * total / count


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    r"""Return :math:`\mathbb E\,\|(\hat W - W)\,x\|^2`, the sum over the outputs, by the inputs' Hessian ``[I, I]``.

    Raises
    ------
    ValueError : the shapes do not fit.
    """
    _check_fit(weight, hessian)
    require("rounded", tuple(rounded.shape), lambda shape: shape == weight.shape, f"of shape {tuple(weight.shape)}")
    change = (rounded - weight).detach().flatten(1).to(hessian)
    return float(((change @ hessian) * change).sum() / 2)


# --- One layer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    granularity: Granularity = "channel",
    *,
    damping: float = 0.01,
    act_order: bool = False,
    low_high: LowHigh = min_max,
) -> Quantised:
    """Round column after column, and after each correct the columns still to come: ``round_in_order``.

    Parameters
    ----------
    weight : ``[outputs, ...]``, a convolution's in the order of its unfolded inputs.
    hessian : ``[I, I]`` of the layer's inputs, from ``hessian``.
    granularity : as of ``quantise_weight``. A group's scale is chosen when its first column is reached, from its
        weights as they then are.
    damping : this part of the mean of H's diagonal is added to all of it.
    act_order : begin with the inputs of the largest mean square, as long as all others can still make good for them.
    low_high : gives the range that a scale covers.

    Raises
    ------
    ValueError : the Hessian does not fit the weight, or is singular with so little damping.
    """
    _check_fit(weight, hessian)
    w = weight.detach().flatten(1).to(hessian, copy=True)
    made = quantise_weight(w, grid, granularity, low_high)
    importance = hessian.diagonal() if act_order else torch.zeros_like(w[0])
    order = importance.argsort(descending=True, stable=True)
    w, columns, places = w[:, order], order.tolist(), order.argsort()
    met: set[int] = set()

    def round_column(place: int) -> Tensor:
        group = columns[place] // made.group
        if group not in met:
            met.add(group)
            members = w if granularity == "tensor" else w[:, places[group * made.group : (group + 1) * made.group]]
            _choose_scales(made, members, group, low_high)
        scale, zero = made.scales[:, group].to(w), made.zeros[:, group]
        made.integers[:, columns[place]] = q = quantise(w[:, place], scale, zero, grid)
        return dequantise(q, scale, zero)

    round_in_order(w, inverse_factor(hessian[order][:, order], damping), round_column)
    integers = made.integers.view(weight.shape)
    return Quantised(integers, made.scales, made.zeros, made.group, grid, weight.dtype)


def round_in_order(w: Tensor, factor: Tensor, rounded: Callable[[int], Tensor]) -> None:
    r"""Round the columns of w ``[O, I]`` from the first on, and correct those to come.

    .. math::
        e = \frac{w_q - \hat w_q}{U_{qq}}, \qquad
        w_{q+1:} \leftarrow w_{q+1:} - e\,U_{q,\,q+1:}, \qquad H^{-1} = U^\top U

    ``factor`` is U, upper triangular. Its row q is that of the inverse Hessian of the
    columns from q on, over the root of its diagonal: so each correction is the best that
    the weights left can do. All rows of w share it. ``rounded(q)`` gives column q on the
    grid, ``[O]``; w is changed in place. The paper corrects in blocks of 128 columns,
    which changes the speed alone.
    """
    for q in range(w.shape[1]):
        error = (w[:, q] - rounded(q)) / factor[q, q]  # [O]
        w[:, q + 1 :] -= error[:, None] * factor[q, q + 1 :]


@torch.no_grad()
def obq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    granularity: Granularity = "channel",
    *,
    damping: float = 0.01,
    low_high: LowHigh = min_max,
) -> Quantised:
    r"""Round in each row the weight that costs least, correct the others of the row, and so on to the last.

    .. math::
        q = \arg\min_q \frac{(\hat w_q - w_q)^2}{[H^{-1}]_{qq}}, \qquad
        w \leftarrow w - \frac{w_q - \hat w_q}{[H^{-1}]_{qq}} H^{-1}_{:,q}, \qquad
        H^{-1} \leftarrow H^{-1} - \frac{H^{-1}_{:,q} H^{-1}_{q,:}}{[H^{-1}]_{qq}}

    Each row has an order, and so an inverse, of its own: memory and time for ``O I^2`` and ``O I^3`` numbers, meant for
    small layers. The scales are chosen beforehand. Arguments and errors are those of ``gptq``.
    """
    _check_fit(weight, hessian)
    w = weight.detach().flatten(1).to(hessian, copy=True)
    made = quantise_weight(w, grid, granularity, low_high)
    scales, zeros = made.spread(made.scales).to(w), made.spread(made.zeros)
    factor = inverse_factor(hessian, damping)
    inverses = (factor.mT @ factor).expand(len(w), -1, -1).clone()  # [outputs, I, I]
    left, rows = torch.ones_like(w, dtype=torch.bool), torch.arange(len(w), device=w.device)
    for _ in range(w.shape[1]):
        integers = quantise(w, scales, zeros, grid)
        errors = w - dequantise(integers, scales, zeros)
        diagonal = inverses.diagonal(dim1=1, dim2=2)
        q = (errors.square() / diagonal).masked_fill(~left, torch.inf).argmin(1)
        made.integers[rows, q] = integers[rows, q]
        column, pivot = inverses[rows, :, q], diagonal[rows, q][:, None].clone()
        w -= errors[rows, q][:, None] / pivot * column
        inverses -= column[:, :, None] * (column / pivot)[:, None, :]
        left[rows, q] = False
    integers = made.integers.view(weight.shape)
    return Quantised(integers, made.scales, made.zeros, made.group, grid, weight.dtype)


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    r"""Return the upper triangular U with :math:`U^\top U = (H + \lambda I)^{-1}`.

    Lambda is ``damping`` times the mean of H's diagonal. An input that was always zero gets a 1 there: it corrects
    nothing, and its weight goes to the nearest.

    Raises
    ------
    ValueError : ``damping`` is below 0, or so small that the inverse does not exist.
    """
    require("damping", damping, lambda x: is_number(x) and x >= 0, "a number of at least 0")
    diagonal = hessian.diagonal()
    added = torch.where(diagonal > 0, damping * diagonal.mean(), 1)
    lower, failed = torch.linalg.cholesky_ex(hessian + added.diag())
    if not bool(failed):
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if bool(failed):
        raise ValueError(f"damping={damping!r} leaves the inputs' Hessian singular: must be larger")
    return upper


# --- A network --------------------------------------------------------------------------------------------------------


class Stored(Protocol):
    """A weight that is stored in another form."""

    def dequantise(self) -> Tensor:
        """Return the reals that it stands for."""
        ...


@torch.no_grad()
def gptq_model(
    model: nn.Module,
    batches: Iterable[Tensor],
    grid: Grid,
    granularity: Granularity = "channel",
    *,
    layers: Sequence[str] | None = None,
    damping: float = 0.01,
    act_order: bool = False,
) -> dict[str, Quantised]:
    """Round the layers in the order in which they run, each by the inputs that the rounded ones before it give.

    So a layer makes good, as far as it can, for errors of earlier layers that show in the directions of its inputs. It
    takes a pass over the batches for each layer.

    Parameters
    ----------
    batches : inputs of the network, ``[N, ...]``; labels are not needed.
    layers : names of linear layers and convolutions; all by default.

    Returns
    -------
    The weights by the name of their layer; ``with_weights`` puts them into a network.

    Raises
    ------
    ValueError : as ``gptq``; there is no batch; or a name is not that of such a layer which runs.
    """
    given, plain, found = [*batches], copy.deepcopy(model), {}
    require("batches", given, bool, "at least one batch of inputs")
    for name, layer in running_layers(plain, given[0], layers).items():
        curvature = hessian(rows for _, rows in layer_inputs(plain, given, {name: layer}))
        weight: Tensor = layer.weight  # type: ignore[assignment]
        found[name] = gptq(weight, curvature, grid, granularity, damping=damping, act_order=act_order)
        weight.copy_(found[name].dequantise())
    return found


def round_to_nearest(
    model: nn.Module,
    grid: Grid,
    granularity: Granularity = "channel",
    *,
    layers: Sequence[str] | None = None,
    low_high: LowHigh = min_max,
) -> dict[str, Quantised]:
    """Return each layer's weight on the nearest integers, by the layer's name: linear layers and convolutions.

    Raises
    ------
    ValueError : a name is not that of such a layer.
    """
    found = _layers(model, layers)
    return {name: quantise_weight(layer.weight, grid, granularity, low_high) for name, layer in found.items()}  # type: ignore[arg-type]


@torch.no_grad()
def with_weights(model: nn.Module, weights: Mapping[str, Stored]) -> nn.Module:
    """Return a copy of the network in which the named layers have the reals that the stored weights stand for."""
    made = copy.deepcopy(model)
    for name, stored in weights.items():
        weight: Tensor = made.get_submodule(name).weight  # type: ignore[assignment]
        weight.copy_(stored.dequantise())
    return made


# --- What layers see --------------------------------------------------------------------------------------------------


def running_layers(model: nn.Module, x: Tensor, layers: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return the linear layers and convolutions, or those of them that are named, in the order in which they run.

    Raises
    ------
    ValueError : a name is not that of a linear layer or an ungrouped 2-d convolution, or it does not run.
    """
    found = _layers(model, layers)
    order = dict.fromkeys(name for name, _ in layer_inputs(model, [x], found))
    idle = sorted(found.keys() - order.keys())
    require("layers", idle, lambda names: not names, "layers that run in a forward pass")
    return {name: found[name] for name in order}


@torch.no_grad()
def layer_inputs(
    model: nn.Module, batches: Iterable[Tensor], layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and inputs ``[rows, I]`` of each layer, batch after batch, in the order in which they run.

    Of tokens ``[N, tokens, I]`` each is a row, of images each place at which a kernel lies. In evaluation mode; each
    part is afterwards in the mode that it was in.
    """
    seen: list[tuple[str, Tensor]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda part, given, name=name: seen.append((name, input_rows(part, given[0]))))
        for name, layer in layers.items()
    ]
    modes = {part: part.training for part in model.modules()}
    try:
        model.eval()
        for x in batches:
            model(x)
            yield from seen
            seen.clear()
    finally:
        for part, training in modes.items():
            part.training = training
        for hook in hooks:
            hook.remove()


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the vectors ``[rows, I]`` that a layer multiplies with its weight ``[outputs, I]``, from its input."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    # in the form that F.pad takes, which stands for every padding and padding mode of a convolution
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, layer.kernel_size, stride=layer.stride, dilation=layer.dilation)  # [N, I, places]
    return patches.mT.flatten(0, 1)


# --- Inside -----------------------------------------------------------------------------------------------------------


def _choose_scales(made: Quantised, members: Tensor, group: int, low_high: LowHigh) -> None:
    """Set the scales of a group, in place, by its weights as they are now."""
    now = quantise_weight(members, made.grid, "tensor" if made.scales.numel() == 1 else "channel", low_high)
    made.scales[:, group], made.zeros[:, group] = now.scales[:, 0], now.zeros[:, 0]


def _layers(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    every = {name: part for name, part in model.named_modules() if _has_a_matrix(part)}
    if layers is None:
        return every
    for name in layers:
        require("layers", name, lambda name: name in every, f"among {', '.join(every) or 'none: there is no such'}")
    return {name: every[name] for name in layers}


def _has_a_matrix(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or (isinstance(part, nn.Conv2d) and part.groups == 1)


def _check_fit(weight: Tensor, hessian: Tensor) -> None:
    columns = weight[0].numel() if weight.dim() > 1 and len(weight) else None
    require("hessian", tuple(hessian.shape), lambda shape: shape == (columns, columns), f"({columns}, {columns})")
