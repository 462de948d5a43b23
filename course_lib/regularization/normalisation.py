r"""Normalisation as pure functions, and another kind of it put into a network.

=================  ====================================================  ============================================
name               over what mean and variance are taken                 source
=================  ====================================================  ============================================
``batch_norm``     each channel, over the batch                          Ioffe & Szegedy 2015, arXiv:1502.03167
``layer_norm``     each example (or token), over its features            Ba, Kiros & Hinton 2016, arXiv:1607.06450
``group_norm``     each example, over groups of channels                 Wu & He 2018, arXiv:1803.08494
``rms_norm``       as layer norm, without the mean                       Zhang & Sennrich 2019, arXiv:1910.07467
``weight_norm``    nothing: direction and length of a weight apart       Salimans & Kingma 2016, arXiv:1602.07868
``with_norm``      a network with another kind
=================  ====================================================  ============================================

Only batch norm looks at other examples: what one example becomes depends on whom it is drawn with, a noise that rests
in evaluation mode. Why all of them act on the rate stands in ``scale_invariance``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from course_lib.lab.arguments import at_least, require
from course_lib.regularization.placing import ACTIVATIONS, with_noise_of

# --- Pure functions, with the arguments of torch.nn.functional --------------------------------------------------------


def standardised(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    r"""Return :math:`(x-\mu)/\sqrt{\sigma^2+\epsilon}`, with mean and (biased) variance over ``dims``."""
    mean = x.mean(tuple(dims), keepdim=True)
    variance = (x - mean).square().mean(tuple(dims), keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    x = x if weight is None else x * weight.view(*shape)
    return x if bias is None else x + bias.view(*shape)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise each channel of ``[N, C, …]`` by its mean and variance: of the batch in training, else running ones.

    In training the running statistics ``[C]`` move in place by ``momentum`` towards those of the batch, the variance
    towards the unbiased one, :math:`n/(n-1)` times that which normalises. As ``F.batch_norm``.

    Raises
    ------
    ValueError : in training, one value a channel, which has no variance; in evaluation, no running statistics.
    """
    others = [0, *range(2, x.ndim)]
    shape = (1, -1, *[1] * (x.ndim - 2))
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean=None: must be there in evaluation, as must running_var")
        normal = (x - running_mean.view(shape)) / (running_var.view(shape) + eps).sqrt()
        return _scaled(normal, weight, bias, shape)
    count = x.numel() // x.shape[1]
    if count < 2:
        raise ValueError(f"x has the shape {list(x.shape)}: must hold more than 1 value a channel in training")
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(x.mean(others), momentum)
            running_var.lerp_(x.var(others, unbiased=True), momentum)
    return _scaled(standardised(x, others, eps), weight, bias, shape)


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise over the last dimensions, which have the sizes ``normalized_shape``; as ``F.layer_norm``.

    Raises
    ------
    ValueError : the last dimensions have other sizes.
    """
    dims = _last(x, normalized_shape)
    return _scaled(standardised(x, dims, eps), weight, bias, normalized_shape)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Normalise ``[N, C, …]`` in each example over each of ``num_groups`` groups of channels; as ``F.group_norm``.

    Raises
    ------
    ValueError : the channels cannot be divided into as many groups.
    """
    at_least(1, num_groups=num_groups)
    channels = x.shape[1]
    require("num_groups", num_groups, lambda g: channels % g == 0, f"a divisor of the {channels} channels")
    normal = standardised(x.reshape(len(x), num_groups, -1), [2], eps).view_as(x)
    return _scaled(normal, weight, bias, (1, -1, *[1] * (x.ndim - 2)))


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    r"""Return :math:`x/\sqrt{\overline{x^2}+\epsilon}` over the last dimensions; as ``F.rms_norm``.

    Raises
    ------
    ValueError : the last dimensions have other sizes.
    """
    dims = _last(x, normalized_shape)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _scaled(x / (x.square().mean(tuple(dims), keepdim=True) + eps).sqrt(), weight, None, normalized_shape)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    r"""Return :math:`g\,v/\|v\|`, a length and a direction for each slice along ``dim``; g has size 1 elsewhere.

    What the functions of ``torch.nn.utils.parametrizations.weight_norm`` compute.
    """
    others = [d for d in range(v.ndim) if d != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


class WeightNorm(nn.Module):
    """``weight_norm`` as a parametrization: length and direction are the parameters, the weight is made of them."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """The weight ``[out, …]``."""
        return weight_norm(v, g)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Length and direction of a weight."""
        others = list(range(1, weight.ndim))
        return torch.linalg.vector_norm(weight, dim=others, keepdim=True), weight


def _last(x: Tensor, normalized_shape: Sequence[int]) -> list[int]:
    shape = list(normalized_shape)
    if not shape or list(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape={shape}: must be the last sizes of x, which has the shape {list(x.shape)}")
    return list(range(-len(shape), 0))


# --- Another kind in a network ----------------------------------------------------------------------------------------

Kind = Literal["batch", "layer", "group", "rms", "weight", "none"]

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Shift(nn.Module):
    """What is left of a normalisation that is taken out: the bias ``[C]`` that the layer before it had no need of."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return x + (self.bias if self.dim == -1 else self.bias.view(-1, *[1] * (x.ndim - 2)))


def with_norm(network: nn.Module, kind: Kind, *, groups: int = 4) -> nn.Module:
    """Return a copy of the network with another normalisation: torch's modules, with new scales and shifts.

    Where a network has normalisation, that is replaced. Where it has none, as the MLP, it is put between each linear or
    convolutional layer and the activation that follows it in a ``Sequential``. On images "layer" is group norm with one
    group, as usual. "none" and "weight" leave a shift where a normalisation was, and "weight" puts weight norm on every
    linear and convolutional layer but ``head``; a weight that has a parametrization already keeps that alone. Other
    weights stay what they are, and so does noise (``placing``).

    Parameters
    ----------
    groups : for "group"; must divide the channels of each layer.

    Raises
    ------
    ValueError : the network has no place for it, or not for this kind: images cannot have "rms", and where each token
        is normalised, as in the ViT, "batch" and "group" have no meaning.
    """
    require("kind", kind, lambda k: k in get_args(Kind), f"one of {', '.join(get_args(Kind))}")
    at_least(1, groups=groups)
    changed = copy.deepcopy(network)
    norms = [(name, part) for name, part in changed.named_modules() if isinstance(part, NORMS)]
    for name, part in norms:
        above, _, last = name.rpartition(".")
        new = _like(_in_place_of(part, kind, groups), part)
        # stochastic depth stands behind the last normalisation of a branch
        setattr(changed.get_submodule(above), last, with_noise_of(new, part))
    if not norms and kind not in ("none", "weight"):
        places = sum(_put_between(part, kind, groups) for part in changed.modules() if isinstance(part, nn.Sequential))
        if not places:
            raise ValueError(f"network={type(network).__name__}: must have layers followed by their activations")
    if kind == "weight":
        for name, part in list(changed.named_modules()):
            if isinstance(part, LAYERS) and name != "head" and not parametrize.is_parametrized(part, "weight"):
                parametrize.register_parametrization(part, "weight", WeightNorm())
    return changed


def _in_place_of(part: Any, kind: Kind, groups: int) -> nn.Module:
    if isinstance(part, (nn.LayerNorm, nn.RMSNorm)):
        return _of_features(part.normalized_shape[-1], kind)
    channels = part.num_channels if isinstance(part, nn.GroupNorm) else part.num_features
    return _of_channels(channels, isinstance(part, nn.BatchNorm1d), kind, groups)


def _put_between(sequence: nn.Sequential, kind: Kind, groups: int) -> int:
    """Put a normalisation between each layer and the activation that follows it at once; return how many."""
    together: list[nn.Module] = []
    for part in sequence:
        before: Any = together[-1] if together else None
        if isinstance(part, ACTIVATIONS) and isinstance(before, LAYERS):
            # the first size of a layer's weight is the number of its outputs
            norm = _of_channels(len(before.weight), isinstance(before, nn.Linear), kind, groups)
            together.append(_like(norm, before))
        together.append(part)
    put = len(together) - len(sequence)
    if put:
        sequence._modules.clear()
        sequence.extend(together)
    return put


def _of_channels(channels: int, rows: bool, kind: Kind, groups: int) -> nn.Module:
    """For rows ``[N, C]``, else for images ``[N, C, H, W]``."""
    match kind:
        case "batch":
            return (nn.BatchNorm1d if rows else nn.BatchNorm2d)(channels)
        case "layer":
            return nn.LayerNorm(channels) if rows else nn.GroupNorm(1, channels)
        case "group":
            require("groups", groups, lambda g: channels % g == 0, f"a divisor of the {channels} channels")
            return nn.GroupNorm(groups, channels)
        case "rms":
            require("kind", kind, lambda _: rows, "another kind where images are normalised")
            return nn.RMSNorm(channels)
        case _:
            return Shift(channels, 1)


def _of_features(width: int, kind: Kind) -> nn.Module:
    require(
        "kind", kind, lambda k: k not in ("batch", "group"), "layer, rms, weight or none where tokens are normalised"
    )
    match kind:
        case "layer":
            return nn.LayerNorm(width)
        case "rms":
            return nn.RMSNorm(width)
        case _:
            return Shift(width, -1)


def _like(new: nn.Module, old: Any) -> nn.Module:
    """In the type, on the device and in the mode of what stands there."""
    tensors = [*old.parameters(), *old.buffers()]
    floats = [t for t in tensors if t.is_floating_point()]
    return (new.to(floats[0].device, floats[0].dtype) if floats else new).train(old.training)
