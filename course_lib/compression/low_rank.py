r"""Low rank: one large matrix or kernel becomes a product of small ones, and one layer two to four thin ones.

========================  ====================================================  ========================================
name                      what it does                                          source
========================  ====================================================  ========================================
*matrices*
``low_rank``              the nearest matrix of a rank, as two factors          Eckart & Young 1936, Psychometrika 1
``weighted_low_rank``     nearest in what comes out, on the inputs that occur   Zhang et al. 2015, arXiv:1505.06798
``svd_linear``            a linear layer as two                                 Denil et al. 2013, arXiv:1306.0543
``svd_conv``              a convolution with few filters, then 1x1              Zhang et al. 2015
``spatial_svd_conv``      a column of the kernel, then a row                    Jaderberg et al. 2014, arXiv:1405.3866
*kernels*
``tucker2``               both numbers of channels reduced                      Kim et al. 2015, arXiv:1511.06530
``tucker2_conv``          1x1, then the kernel on few channels, then 1x1        Kim et al. 2015
``cp``                    a sum of products of four vectors                     Lebedev et al. 2014, arXiv:1412.6553
``cp_conv``               1x1, a column and a row on each channel, 1x1          Lebedev et al. 2014
*ranks*
``rank_by_energy``        as many as hold a share of the squared values
``rank_by_noise``         as many as stand out of noise                         Nakajima et al. 2013, JMLR 14
``sensitivity``           what each rank of each layer costs, measured
``rank_by_sensitivity``   the ranks of all layers for a number of parameters
*networks*
``factorise``             each layer of a network replaced
========================  ====================================================  ========================================

A matrix of m x n numbers has rank r with ``r (m + n)``: fewer as long as r is below ``mn / (m + n)``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split, batches
from course_lib.lab.training import evaluate
from course_lib.pruning.masks import prunable_layers

# --- Matrices ---------------------------------------------------------------------------------------------------------


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""Return ``a`` ``[m, r]`` and ``b`` ``[r, n]`` whose product is the nearest matrix of that rank to a weight.

    .. math:: W = U S V^T \approx (U_r S_r^{1/2})\,(S_r^{1/2} V_r^T)

    The squared error is the sum of the squared singular values that were left out. Each factor gets the root of the
    others: both are equally large, which is where training goes on best.

    Raises
    ------
    ValueError : the rank is not 1 to the smaller side of the matrix.
    """
    check_rank(rank, min(weight.shape))
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def weighted_low_rank(
    weight: Tensor, rank: int, gram: Tensor, damping: float = 1e-6
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""Return ``a`` and ``b`` with the least :math:`\lVert WX - abX\rVert` over the inputs X ``[n, examples]``.

    With :math:`G = XX^T = LL^T` the error is :math:`\lVert (W - ab)L\rVert`: so the nearest matrix to :math:`WL` is
    found, and :math:`L` taken out again. Directions in which no input lies cost nothing and are dropped first.
    The factors are equally large, as those of ``low_rank``: taking out :math:`L` leaves b large where inputs are rare.

    Parameters
    ----------
    gram : G, ``[n, n]``: see ``input_grams``.
    damping : this share of G's mean diagonal is added to it, since inputs may leave directions empty.

    Raises
    ------
    ValueError : as ``low_rank``; ``gram`` is of another size; ``damping`` is not above 0.
    """
    require(
        "gram", tuple(gram.shape), lambda s: s == (weight.shape[1],) * 2, f"{weight.shape[1]} numbers high and wide"
    )
    require("damping", damping, lambda d: is_number(d) and d > 0, "a number above 0")
    mean = gram.diagonal().mean()
    added = damping * torch.where(mean > 0, mean, 1)
    whitener = torch.linalg.cholesky(gram + added * torch.eye(len(gram)).to(gram))
    a, b = low_rank(weight @ whitener, rank)
    b = torch.linalg.solve_triangular(whitener, b, upper=False, left=False)
    return low_rank(a @ b, rank)  # the same product, balanced


def svd_linear(
    layer: nn.Linear, rank: int, gram: Tensor | None = None
) -> nn.Sequential:  # fmt: skip
    """Return two linear layers, ``[n -> rank -> m]``, in place of one; nearest on its inputs if their gram is given.

    Raises
    ------
    ValueError : as ``low_rank``.
    """
    weight = layer.weight.detach()
    a, b = _nearest(weight, rank, gram)
    return nn.Sequential(_linear(b, None), _linear(a, layer.bias))


def _nearest(weight: Tensor, rank: int, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    return low_rank(weight, rank) if gram is None else weighted_low_rank(weight, rank, gram)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with_weights(made, weight, bias)


def svd_conv(layer: nn.Conv2d, rank: int, gram: Tensor | None = None) -> nn.Sequential:
    """Return a convolution with ``rank`` filters of the same kernel size, and a 1x1 convolution that mixes them.

    ``gram`` is that of the patches ``[in * height * width]`` that the kernel is laid on (``input_grams``).

    Raises
    ------
    ValueError : as ``low_rank``; the convolution has groups.
    """
    _check_plain(layer)
    weight = layer.weight.detach().flatten(1)  # [out, in * height * width]
    a, b = _nearest(weight, rank, gram)
    few = _conv(layer, b.view(rank, *layer.weight.shape[1:]), None, along=(True, True))
    return nn.Sequential(few, _conv(layer, a[:, :, None, None], layer.bias))


def spatial_svd_conv(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """Return a convolution of height k and width 1 to ``rank`` channels, and one of height 1 and width k.

    Raises
    ------
    ValueError : the rank is not 1 to the smaller of ``in * height`` and ``out * width``; the convolution has groups.
    """
    _check_plain(layer)
    out, into, height, width = layer.weight.shape
    kernel = layer.weight.detach().permute(1, 2, 0, 3)
    a, b = low_rank(kernel.reshape(into * height, out * width), rank)
    column = a.view(into, height, rank).permute(2, 0, 1)[..., None]  # [rank, in, h, 1]
    row = b.view(rank, out, width).transpose(0, 1)[:, :, None]  # [out, rank, 1, w]
    return nn.Sequential(
        _conv(layer, column, None, along=(True, False)),
        _conv(layer, row, layer.bias, along=(False, True)),
    )


# --- Tucker -----------------------------------------------------------------------------------------------------------


def tucker2(
    weight: Tensor, ranks: tuple[int, int], *, steps: int = 20
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r"""Return a core ``[p, q, h, w]`` and the bases ``[out, p]`` and ``[in, q]`` of a kernel ``[out, in, h, w]``.

    .. math:: W_{oihw} \approx \textstyle\sum_{pq} C_{pqhw}\,U_{op}\,V_{iq}

    U begins as the first left singular vectors of the kernel, unfolded into a row an output (HOSVD). Then each basis
    in turn becomes the best for the other one (higher-order orthogonal iteration): the error never grows. A basis has
    no more vectors than there are numbers beside its dimension: more would bring nothing.

    Raises
    ------
    ValueError : a rank is not 1 to the number of channels.
    """
    check_rank(ranks[0], weight.shape[0])
    check_rank(ranks[1], weight.shape[1])
    out, into = (_basis(weight, dim, rank) for dim, rank in enumerate(ranks))
    for _ in range(steps):
        out = _basis(torch.einsum("oihw,iq->oqhw", weight, into), 0, ranks[0])
        into = _basis(torch.einsum("oihw,op->pihw", weight, out), 1, ranks[1])
    return torch.einsum("oihw,op,iq->pqhw", weight, out, into), out, into


def _basis(weight: Tensor, dim: int, rank: int) -> Tensor:
    """The first left singular vectors of a kernel, unfolded into a row for each channel of a dimension."""
    unfolded = weight.movedim(dim, 0).flatten(1)
    return torch.linalg.svd(unfolded, full_matrices=False).U[:, :rank]


def tucker2_conv(
    layer: nn.Conv2d, ranks: tuple[int, int], *, steps: int = 20
) -> nn.Sequential:  # fmt: skip
    """Return three convolutions: 1x1 to ``ranks[1]`` channels, the kernel's to ``ranks[0]``, 1x1 to the outputs.

    Raises
    ------
    ValueError : as ``tucker2``; the convolution has groups.
    """
    _check_plain(layer)
    core, out, into = tucker2(layer.weight.detach(), ranks, steps=steps)
    return nn.Sequential(
        _conv(layer, into.mT[:, :, None, None], None),
        _conv(layer, core, None, along=(True, True)),
        _conv(layer, out[:, :, None, None], layer.bias),
    )


# --- CP ---------------------------------------------------------------------------------------------------------------


def cp(
    weight: Tensor, rank: int, *, generator: torch.Generator, steps: int = 200
) -> list[Tensor]:  # fmt: skip
    r"""Return for each dimension of a tensor ``[n_1, ..., n_d]`` a factor ``[n_k, R]``: a sum of R products of vectors.

    .. math:: W_{oihw} \approx \textstyle\sum_r A_{or} B_{ir} C_{hr} D_{wr}

    By alternating least squares: with all factors but one held, the error is a quadratic in that one, and it is solved
    for. The error never grows, but may stay above the least there is: it depends on where one starts.

    Parameters
    ----------
    generator : a CPU generator, which draws the first factors.

    Raises
    ------
    ValueError : ``rank`` or ``steps`` is below 1.
    """
    at_least(1, rank=rank, steps=steps)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    factors = [draw(n, rank).to(weight) for n in weight.shape]
    for _ in range(steps):
        for dim in range(weight.ndim):
            others = factors[:dim] + factors[dim + 1 :]
            product = _khatri_rao(others)  # [product of the other sizes, R]
            unfolded = weight.movedim(dim, 0).flatten(1)
            factors[dim] = unfolded @ torch.linalg.pinv(product).mT
        factors = _balanced(factors)
    return factors


def _khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """The products of the columns, each with its namesakes: ``[n_1, R], [n_2, R] -> [n_1 * n_2, R]``."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).flatten(0, 1)
    return product


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same sum, with all vectors of a product equally long."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    tiny = torch.finfo(norms.dtype).tiny
    even = norms.clamp_min(tiny).log().mean(0).exp()
    return [factor / norm.clamp_min(tiny) * even for factor, norm in zip(factors, norms, strict=True)]


def cp_conv(
    layer: nn.Conv2d, rank: int, *, generator: torch.Generator, steps: int = 200
) -> nn.Sequential:  # fmt: skip
    """Return four convolutions: 1x1 to ``rank`` channels, on each of them a column and then a row, 1x1 to the outputs.

    Raises
    ------
    ValueError : as ``cp``; the convolution has groups.
    """
    _check_plain(layer)
    weight = layer.weight.detach()
    out, into, height, width = cp(weight, rank, generator=generator, steps=steps)
    column, row = height.mT[:, None, :, None], width.mT[:, None, None, :]
    return nn.Sequential(
        _conv(layer, into.mT[:, :, None, None], None),
        _conv(layer, column, None, along=(True, False), groups=rank),
        _conv(layer, row, None, along=(False, True), groups=rank),
        _conv(layer, out[:, :, None, None], layer.bias),
    )


# --- Ranks ------------------------------------------------------------------------------------------------------------


def rank_by_energy(singular_values: Tensor, share: float) -> int:
    """Return how many of the singular values (descending) hold this share of the sum of their squares; at least 1.

    Raises
    ------
    ValueError : ``share`` does not lie above 0 and not above 1.
    """
    require("share", share, lambda s: is_number(s) and 0 < s <= 1, "a number above 0 and not above 1")
    energy = singular_values.double().square().cumsum(0)
    # what is left out is compared, since near the end the sums round to the same
    return 1 + int((energy[-1] - energy > (1 - share) * energy[-1] * (1 + 1e-12)).sum())


def ranks_by_energy(model: nn.Module, share: float, layers: Iterable[str] | None = None) -> dict[str, int]:
    """Return the rank of each layer's matrix ``[out, in * ...]`` that holds this share of its energy, by name."""
    return {name: rank_by_energy(_singular_values(layer), share) for name, layer in _layers(model, layers).items()}


def rank_by_noise(singular_values: Tensor, shape: tuple[int, int]) -> int:
    r"""Return how many singular values of an ``m x n`` matrix stand out of Gaussian noise of unknown strength.

    The rank that variational Bayes finds (Nakajima et al. 2013, JMLR 14, EVBMF): with :math:`\alpha = m/n \le 1` a
    singular value counts if :math:`s^2 > n\sigma^2(1+\tau)(1+\alpha/\tau)`, where :math:`\tau\approx 2.5129\sqrt\alpha`
    and the noise :math:`\sigma^2` is what makes the matrix least surprising. May be 0. No data, no setting.

    Raises
    ------
    ValueError : there are not as many singular values as the smaller side.
    """
    m, n = sorted(shape)
    s = singular_values.double().cpu().numpy()
    allowed = f"as many as the smaller side of {shape}, {m}"
    require("singular_values", len(s), lambda k: k == m, allowed)
    s = s.clip(min=np.finfo(s.dtype).eps * s[0])
    alpha = m / n
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)

    def surprise(noise: float) -> float:
        x = s**2 / (n * noise)
        middle = x[x > edge] - (1 + alpha)
        t = (middle + np.sqrt(middle**2 - 4 * alpha)) / 2
        gain = (np.log(t + 1) + alpha * np.log(t / alpha + 1) - t).sum()
        return (x - np.log(x)).sum() + gain

    most = min(math.ceil(m / (1 + alpha)), m) - 1  # more than so many cannot stand out
    least_noise = max(s[most] ** 2 / (n * edge), (s[most:] ** 2).mean() / n)
    bounds = least_noise, (s**2).sum() / (m * n)
    found = minimize_scalar(surprise, bounds=bounds, method="bounded")
    return int((s > math.sqrt(n * found.x * edge)).sum())


def parameters_of_rank(shape: Sequence[int], rank: int) -> int:
    """Return how many numbers a weight ``[out, in, ...]`` has as two factors: ``rank * (out + in * ...)``."""
    return rank * (shape[0] + math.prod(shape[1:]))


def sensitivity(
    model: nn.Module,
    split: Split,
    *,
    levels: Sequence[float] = (0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1),
    grams: Mapping[str, Tensor] | None = None,
    layers: Iterable[str] | None = None,
) -> pd.DataFrame:
    """Measure what the network loses if one layer alone gets a lower rank.

    Parameters
    ----------
    levels : shares of the layer's parameters to leave, which say the ranks to try.
    grams : those of the layers' inputs, by name: the layers are then replaced as ``svd_linear`` does with them.

    Returns
    -------
    One row a layer and rank: ``layer``, ``rank``, ``parameters`` of its weight, ``loss`` on the split. The first row of
    a layer has its full rank and is the layer as it is.

    Raises
    ------
    ValueError : a level does not lie between 0 and 1, or a layer is unknown.
    """
    require("levels", levels, lambda all_: all(is_number(x) and 0 < x < 1 for x in all_), "numbers between 0 and 1")
    before = evaluate(model, split).loss
    rows = []
    for name, layer in _layers(model, layers).items():
        shape: Sequence[int] = layer.weight.shape
        rows.append((name, min(shape[0], math.prod(shape[1:])), math.prod(shape), before))
        ranks = {max(1, int(level * math.prod(shape) / parameters_of_rank(shape, 1))) for level in levels}
        for rank in sorted(ranks, reverse=True):
            if parameters_of_rank(shape, rank) < math.prod(shape):
                loss = evaluate(factorise(model, {name: rank}, grams=grams), split).loss
                rows.append((name, rank, parameters_of_rank(shape, rank), loss))
    return pd.DataFrame(rows, columns=["layer", "rank", "parameters", "loss"])


def rank_by_sensitivity(table: pd.DataFrame, budget: float) -> dict[str, int]:
    """Return the ranks of the layers, those left whole not among them, for a share ``budget`` of their parameters.

    Greedy: again and again the layer gives way that loses least for each parameter it saves, as the ``sensitivity`` of
    each alone says, until what is left is within the budget. Losses of several layers are taken to add up.

    Raises
    ------
    ValueError : ``budget`` does not lie above 0 and not above 1, or the table has no ranks that are low enough.
    """
    require("budget", budget, lambda b: is_number(b) and 0 < b <= 1, "a number above 0 and not above 1")
    rows = table.to_dict("records")
    whole = {row["layer"]: row for row in reversed(rows)}  # the first of each layer
    now = dict(whole)

    def left() -> int:
        return sum(row["parameters"] for row in now.values())

    def price(row: Mapping[Any, Any]) -> float:
        held = now[row["layer"]]
        return (row["loss"] - held["loss"]) / (held["parameters"] - row["parameters"])

    allowed = budget * left()
    while left() > allowed:
        held = {name: row["parameters"] for name, row in now.items()}
        smaller = [row for row in rows if row["parameters"] < held[row["layer"]]]
        if not smaller:
            raise ValueError(f"budget={budget}: must be at least {left() / allowed * budget:.3f}, by the table's ranks")
        best = min(smaller, key=price)
        now[best["layer"]] = best
    return {name: row["rank"] for name, row in now.items() if row is not whole[name]}


# --- Networks ---------------------------------------------------------------------------------------------------------


def factorise(
    model: nn.Module,
    ranks: Mapping[str, Any],
    *,
    linear: Callable[..., nn.Module] = svd_linear,
    conv: Callable[..., nn.Module] = svd_conv,
    grams: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a copy of the network with the named layers replaced by products; the others stay as they are.

    A layer that would not become smaller stays, too. Factorising a network before it is trained gives it first weights
    that are as large as the dense ones in the directions that are left.

    Parameters
    ----------
    ranks : of each layer, as ``linear`` or ``conv`` takes it: a number, or two for ``tucker2_conv``.
    linear, conv : ``(layer, rank) -> layers``; ``(layer, rank, gram)`` where ``grams`` are given.

    Raises
    ------
    ValueError : a name is not that of a linear layer or a convolution, or the rank does not fit it.
    """
    small = copy.deepcopy(model)
    found = _layers(small, list(ranks)) if ranks else {}
    for name, layer in found.items():
        replace = linear if isinstance(layer, nn.Linear) else conv
        more = () if grams is None else (_named("grams", grams, name),)
        made = replace(layer, ranks[name], *more)
        if _count(made) < _count(layer):
            small.set_submodule(name, made.train(layer.training))
    return small


@torch.no_grad()
def input_grams(model: nn.Module, split: Split, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return :math:`XX^T` of what goes into each layer, by name: of vectors ``[in]``, or patches ``[in * h * w]``.

    In evaluation mode, over all examples of the split.

    Raises
    ------
    ValueError : a layer is unknown, has groups, or is never called.
    """
    model = copy.deepcopy(model).eval()
    wanted, sums = _layers(model, layers), dict[str, Tensor]()

    def watch(name: str, layer: Any, arguments: tuple[Tensor, ...]) -> None:
        x = input_rows(layer, arguments[0])
        sums[name] = sums.get(name, 0) + x.mT @ x

    for name, layer in wanted.items():
        if isinstance(layer, nn.Conv2d):
            _check_plain(layer)
        layer.register_forward_pre_hook(lambda layer, arguments, name=name: watch(name, layer, arguments))
    like = next(model.parameters())
    for x, _ in batches(split.to(like.device), 256, dtype=like.dtype):
        model(x)
    return {name: _named("the layers that are called", sums, name) for name in wanted}


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return all vectors that a layer multiplies with its matrix, ``[examples * places, in * ...]``."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    assert isinstance(layer, nn.Conv2d)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)  # the form that stands for any padding
    patches = F.unfold(padded, layer.kernel_size, stride=layer.stride, dilation=layer.dilation)
    return patches.transpose(1, 2).flatten(0, 1)


# --- Inside -----------------------------------------------------------------------------------------------------------


def _conv(
    like: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    *,
    along: tuple[bool, bool] = (False, False),
    groups: int = 1,
) -> nn.Conv2d:
    """A convolution with these weights; ``along`` the dimensions that are True it moves and pads like another one.

    Padding by zeros commutes with what does not mix places and has no bias; so do the other modes of padding.
    """

    def own(values: tuple[int, ...], otherwise: int) -> Any:
        return tuple(value if moves else otherwise for value, moves in zip(values, along, strict=True))

    made = nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        (weight.shape[2], weight.shape[3]),
        stride=own(like.stride, 1),
        padding=like.padding if isinstance(like.padding, str) else own(like.padding, 0),
        dilation=own(like.dilation, 1),
        groups=groups,
        bias=bias is not None,
        padding_mode=like.padding_mode,
        device="meta",
    )
    return _with_weights(made, weight, bias)


def _with_weights(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """The layer with parameters of its own: no memory is shared with the layer that it replaces."""
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


def _layers(model: nn.Module, layers: Iterable[str] | None) -> dict[str, Any]:
    """The linear layers and two-dimensional convolutions, or those of them named."""
    found = prunable_layers(model, layers)
    for name, layer in found.items():
        if isinstance(layer, nn.Conv1d):
            raise ValueError(f"layers: {name!r} is a Conv1d: must be Linear or Conv2d")
    return found


def _singular_values(layer: Any) -> Tensor:
    return torch.linalg.svdvals(layer.weight.detach().flatten(1))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _named(argument: str, values: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in values:
        raise ValueError(f"{argument}: {name!r} is not among them: must be one of {', '.join(values)}")
    return values[name]


def check_rank(rank: int, most: int) -> None:
    """Raise ValueError for a rank that is not 1 to ``most``."""
    at_least(1, rank=rank)
    require("rank", rank, lambda r: r <= most, f"at most {most}")


def _check_plain(layer: nn.Conv2d) -> None:
    if layer.groups != 1:
        raise ValueError(f"layer has groups={layer.groups}: must be a convolution without groups")
