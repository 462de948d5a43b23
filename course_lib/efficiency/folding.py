r"""Folding: linear maps that follow one another become one, and the answer stays the same.

======================  ==========================================================  =============================
name                    what becomes part of what                                   source
======================  ==========================================================  =============================
``norm_folded``         a batch norm into the weights before it                     Jacob et al. 2017,
                                                                                    arXiv:1712.05877, section 3.2
``fold_pair``           the same for two layers, transposed convolutions too        the same
``input_folded``        ``(x - mean) / std`` into the weights behind it
``fold_normalisation``  the same for a whole network, its borders included
``border_error``        what is wrong at the borders if they are forgotten
``products_folded``     one linear map into the next
``merge_linears``       the same for two linear layers
``merge_convs``         the same for a convolution and a 1x1 convolution behind it
======================  ==========================================================  =============================

``course_lib.compression.post_training.fold_batch_norm`` folds the batch norms of a whole network.

All of it is for evaluation: a batch norm that still learns has other statistics for each batch. Functions of tensors
compute in the type that they are given; those of layers and networks return new ones. Nothing here is approximate:
what differs are the last bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from course_lib.compression.post_training import put
from course_lib.lab.arguments import require

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# --- Batch norm -------------------------------------------------------------------------------------------------------


def norm_folded(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""Return the weight and the bias of a layer with the batch norm behind it.

    .. math:: w' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}\, w \qquad
        b' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}\, (b - \mu) + \beta

    Parameters
    ----------
    weight : ``[outputs, ...]``, as of linear layers and convolutions.
    bias, mean, var, gamma, beta : ``[outputs]``; None for 0, and 1 for ``gamma``.
    """
    scale = (var + eps).rsqrt() * (1 if gamma is None else gamma)
    bias = (0 if bias is None else bias) - mean
    shift = scale * bias + (0 if beta is None else beta)
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift


@torch.no_grad()
def fold_pair(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Return the layer with the batch norm behind it, as a new layer of the same kind.

    A transposed convolution keeps its outputs in the second dimension of its weight,
    one group after the other: they are brought to the front, and back.

    Raises
    ------
    ValueError : of another kind; or the norm keeps no statistics, or has another size.
    """
    made: Any = copy.deepcopy(_checked("layer", layer, LAYERS)).eval()
    bn: Any = _checked("norm", norm, NORMS)
    require("norm", bn.running_mean is not None, bool, "one that keeps running statistics")
    groups = made.groups if isinstance(layer, TRANSPOSED) else 1
    weight = _outputs_first(made.weight, groups) if isinstance(layer, TRANSPOSED) else made.weight
    allowed = f"the layer's outputs, {len(weight)}"
    require("norm.num_features", bn.num_features, len(weight).__eq__, allowed)
    statistics = bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps
    weight, bias = norm_folded(weight, made.bias, *statistics)
    made.weight = nn.Parameter(_outputs_second(weight, groups) if isinstance(layer, TRANSPOSED) else weight)
    made.bias = nn.Parameter(bias)
    return made


def _outputs_first(weight: Tensor, groups: int) -> Tensor:
    """``[inputs, outputs / groups, ...]`` to ``[outputs, inputs / groups, ...]``."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _outputs_second(weight: Tensor, groups: int) -> Tensor:
    """The way back: ``[outputs, inputs / groups, ...]`` to ``[inputs, outputs / groups,
    ...]``.
    """
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()


# --- What is done to the input ----------------------------------------------------------------------------------------


def input_folded(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    std: Tensor,
) -> tuple[Tensor, Tensor]:
    r"""Return the weight and the bias of a layer that does ``(x - mean) / std`` first.

    .. math:: w'_{oi} = w_{oi} / s_i \qquad b'_o = b_o - \sum_i w_{oi}\, \mu_i / s_i

    Parameters
    ----------
    weight : ``[outputs, inputs, ...]``, summed over all but its outputs.
    mean, std : of each input, ``[inputs]``.
    """
    shape = (1, -1, *[1] * (weight.ndim - 2))
    weight = weight / std.view(shape)
    shift = (weight * mean.view(shape)).flatten(1).sum(1)
    return weight, (0 if bias is None else bias) - shift


class MeanPad(nn.Module):
    """Surrounds images with each channel's mean, so that the border is 0 once the mean has been taken off.

    Parameters
    ----------
    mean : ``[channels]``.
    padding : places before and after in each dimension, the last one first, as ``torch.nn.functional.pad`` has it.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, padding: Sequence[int]) -> None:
        super().__init__()
        self.padding = tuple(padding)
        self.register_buffer("mean", mean.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, ...]`` to the same with more places."""
        before, after = self.padding[::2][::-1], self.padding[1::2][::-1]
        places = [b + n + a for b, n, a in zip(before, x.shape[2:], after, strict=True)]
        shape = (-1, *[1] * len(places))
        padded = self.mean.to(x.dtype).view(shape).expand(len(x), -1, *places).clone()
        inside = tuple(slice(b, b + n) for b, n in zip(before, x.shape[2:], strict=True))
        padded[:, :, *inside] = x
        return padded


@torch.no_grad()
def fold_normalisation(
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
) -> nn.Module:
    r"""Return a copy that takes images as they come, and answers as ``model`` does to
    ``(x - mean) / std``.

    The first convolution or linear layer does the rest. Where a convolution pads with
    zeros they stand for the mean now, so the copy pads with the mean (``MeanPad``), an
    operation more. For bytes from 0 to 255 give 255 times the mean and the deviation.

    Parameters
    ----------
    mean, std : of each channel of the input, as a ``Split`` has them.

    Raises
    ------
    ValueError : the input goes elsewhere than to one such layer, or has other channels.
    """
    made = copy.deepcopy(model).eval()
    name = first_layer(made)
    layer: Any = made.get_submodule(name)
    means, stds = _per_input(layer, mean, std)
    padding = getattr(layer, "_reversed_padding_repeated_twice", ())
    pads_zeros = any(padding) and layer.padding_mode == "zeros"
    weight, bias = input_folded(layer.weight, layer.bias, means, stds)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    if not pads_zeros or not means.any():
        return made
    layer.padding, layer._reversed_padding_repeated_twice = (0,) * (weight.ndim - 2), ()
    return put(made, name, nn.Sequential(MeanPad(means, padding), layer).eval())


@torch.no_grad()
def border_error(layer: nn.Module, mean: Sequence[float], std: Sequence[float], x: Tensor) -> Tensor:
    """Return by how much the outputs are wrong, ``[N, outputs, ...]``, if a convolution
    goes on padding with zeros.

    0 inside; at the borders as far as the kernel reaches over them.

    Parameters
    ----------
    x : images as they come, ``[N, C, ...]``.
    """
    right: Any = copy.deepcopy(_checked("layer", layer, CONVOLUTIONS)).eval()
    wrong = copy.deepcopy(right)
    means, stds = _per_input(right, mean, std)
    weight, bias = input_folded(wrong.weight, wrong.bias, means, stds)
    wrong.weight, wrong.bias = nn.Parameter(weight), nn.Parameter(bias)
    shape = (-1, *[1] * (x.ndim - 2))
    return wrong(x) - right((x - means.view(shape)) / stds.view(shape))


def first_layer(model: nn.Module) -> str:
    """Return the name of the convolution or linear layer that the input goes to, flattened perhaps, and nowhere else.

    Raises
    ------
    ValueError : something else sees the input.
    """
    if isinstance(model, (nn.Linear, *CONVOLUTIONS)):
        return ""
    graph = fx.symbolic_trace(model).graph
    node = next(node for node in graph.nodes if node.op == "placeholder")
    while len(node.users) == 1:
        node = next(iter(node.users))
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            return str(node.target)
        passes = isinstance(module, nn.Flatten | nn.Identity) or node.target in ("flatten", torch.flatten)
        if not passes:
            break
    raise ValueError(f"model: its input must go to one convolution or linear layer alone, here it goes to {node}")


def _per_input(layer: Any, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each input of a layer; the pixels of a channel lie together when it was flattened."""
    require("groups", getattr(layer, "groups", 1), (1).__eq__, "1 in the first layer")
    require("std", std, lambda values: all(value > 0 for value in values), "numbers above 0")
    require("std", len(std), len(mean).__eq__, f"as many numbers as the mean has, {len(mean)}")
    inputs = layer.weight.shape[1]
    fits = inputs % len(mean) == 0 if isinstance(layer, nn.Linear) else inputs == len(mean)
    require("mean", len(mean), lambda _: fits, f"one number for each channel of the {inputs} inputs")
    where: Any = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    means, stds = (torch.as_tensor(values, **where) for values in (mean, std))
    return means.repeat_interleave(inputs // len(mean)), stds.repeat_interleave(inputs // len(std))


# --- One linear map into the next -------------------------------------------------------------------------------------


def products_folded(
    first: Tensor,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    r"""Return the weight and the bias of two linear maps, one after the other.

    .. math:: w = w_2 w_1 \qquad b = w_2 b_1 + b_2

    Parameters
    ----------
    first : ``[middle, inputs, ...]``; a convolution's has its places behind.
    second : ``[outputs, middle]``.
    """
    weight = torch.einsum("om,m...->o...", second, first)
    shift = None if first_bias is None else second @ first_bias
    if shift is not None and second_bias is not None:
        return weight, shift + second_bias
    return weight, second_bias if shift is None else shift


@torch.no_grad()
def merge_linears(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """Return one layer for two without an activation between them.

    It multiplies inputs times outputs, where the two did middle times inputs plus
    outputs: if the middle is small (a bottleneck, a low-rank pair), the two are the
    cheaper ones. Compare before you merge.

    Raises
    ------
    ValueError : the second takes another number of inputs than the first gives.
    """
    _checked("first", first, (nn.Linear,))
    _checked("second", second, (nn.Linear,))
    width = first.out_features
    require("second.in_features", second.in_features, width.__eq__, f"what the first gives, {width}")
    weight, bias = products_folded(first.weight, first.bias, second.weight, second.bias)
    made = nn.Linear(first.in_features, second.out_features, bias is not None).to(weight)
    return _filled(made, weight, bias)


@torch.no_grad()
def merge_convs(first: nn.Module, second: nn.Module) -> nn.Module:
    """Return one convolution for one and a 1x1 convolution behind it, without an
    activation between them.

    Raises
    ------
    ValueError : the second sees more than one place, or skips some; one has groups; or
        the channels do not fit.
    """
    one: Any = _checked("first", first, CONVOLUTIONS)
    two: Any = _checked("second", second, (type(first),))
    for name, layer in (("first.groups", one), ("second.groups", two)):
        require(name, layer.groups, (1).__eq__, "1")
    pointwise = all(n == 1 for n in (*two.kernel_size, *two.stride)) and two.padding in ((0,) * len(two.stride), "same")
    require("second", two, lambda _: pointwise, "a 1x1 convolution with stride 1 and without padding")
    require("second.in_channels", two.in_channels, one.out_channels.__eq__, f"what the first gives, {one.out_channels}")
    weight, bias = products_folded(one.weight, one.bias, two.weight.flatten(1), two.bias)
    made: Any = copy.deepcopy(one)
    made.out_channels = two.out_channels
    return _filled(made, weight, bias)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


def _checked(name: str, module: nn.Module, kinds: tuple[type, ...]) -> nn.Module:
    allowed = " or ".join(kind.__name__ for kind in kinds)
    require(name, type(module).__name__, lambda _: isinstance(module, kinds), allowed)
    return module
