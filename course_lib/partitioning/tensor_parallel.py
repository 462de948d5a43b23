r"""Tensor and sequence parallelism: each matrix of a layer is cut into parts, and every rank multiplies with its own.

=========================  ==================================================  ===================================
name                       what it does                                        source
=========================  ==================================================  ===================================
``ColumnParallelLinear``   has some of the outputs of a linear layer           Shoeybi et al. 2019,
                                                                               arXiv:1909.08053
``RowParallelLinear``      has some of its inputs; the ranks' results add up   the same
``parallel_mlp``           the one, an activation, the other: one sum          the same
``parallel_attention``     some of the heads on each rank: one sum             the same
``tensor_parallel``        a network with these layers; ``sequence=True``      Shoeybi et al. 2019,
                           shares the tokens between them as well              Korthikanti et al. 2022,
                                                                               arXiv:2205.05198
``whole_state``            the network's weights in one piece again            –
=========================  ==================================================  ===================================

Every rank sees the whole batch and computes the same loss. Between layers a tensor is *whole* (the same on all ranks,
and so is its gradient), *shared* (each rank has a part) or a *partial sum*. With :math:`A = [A_1, A_2]` cut by columns
and :math:`B = \binom{B_1}{B_2}` by rows,

.. math:: \mathrm{GELU}(XA)\,B = \mathrm{GELU}(XA_1)\,B_1 + \mathrm{GELU}(XA_2)\,B_2,

since the activation works on each entry by itself: two matrices, and a single sum over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.lab.models import MLP, Attention, EncoderBlock, ViT
from course_lib.parallel.collectives import ring_bytes
from course_lib.partitioning.collectives import (
    Group,
    _as_it_is,
    all_gather,
    copy_to_ranks,
    equal_part,
    gather_along,
    join_along,
    reduce_scatter,
    scatter_sum_along,
    split_along,
    sum_over_ranks,
)

# --- Whole tokens or shared tokens between the parallel layers --------------------------------------------------------


@dataclass(frozen=True)
class Borders:
    """How activations come into the layers whose matrices are shared out, and how they leave.

    Attributes
    ----------
    enter : ``(x, weight, bias) -> y``: the linear map of all tokens, with this rank's rows of the weight.
    leave : takes this rank's partial sum for all tokens to what stands between the layers.
    outside : makes a parameter fit for use there: where a rank has some tokens only, gradients must be added up.
    """

    enter: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    leave: Callable[[Tensor], Tensor]
    outside: Callable[[Tensor], Tensor]


def whole_tokens(group: Group = None) -> Borders:
    """All tokens on every rank between the layers: an all-reduce each way."""

    def enter(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(copy_to_ranks(x, group), weight, bias)

    return Borders(enter, partial(sum_over_ranks, group=group), _as_it_is)


def shared_tokens(tokens: int, group: Group = None) -> Borders:
    """Some of ``x [N, tokens, D]`` on each rank: the all-reduce falls into its two halves."""

    def enter(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(gather_along(x, 1, tokens, group), weight, bias)

    leave = partial(scatter_sum_along, dim=1, group=group)
    return Borders(enter, leave, partial(copy_to_ranks, group=group))


def tokens_gathered_twice(tokens: int, group: Group = None) -> Borders:
    """Shared tokens that are not kept for backward, but gathered once more."""
    plain = shared_tokens(tokens, group)

    def enter(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _GatheredTwice.apply(x, weight, bias, tokens, group)

    return Borders(enter, plain.leave, plain.outside)


class _GatheredTwice(torch.autograd.Function):
    """``F.linear`` of gathered tokens. Source: Korthikanti et al. 2022, arXiv:2205.05198."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tokens: int, group: Group) -> Tensor:
        ctx.tokens, ctx.group = tokens, group
        ctx.save_for_backward(x, weight)  # this rank's tokens, not all of them
        return F.linear(all_gather(x, 1, tokens, group), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows, inputs = grad.flatten(0, 1), all_gather(x, 1, ctx.tokens, ctx.group).flatten(0, 1)
        back = reduce_scatter(grad @ weight, 1, ctx.group)
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return back, rows.T @ inputs, bias, None, None


# --- Linear layers ----------------------------------------------------------------------------------------------------


class ColumnParallelLinear(nn.Module):
    r"""Some outputs of a linear layer: of :math:`Y = XA` this rank has the columns :math:`Y_i = XA_i`.

    torch stores :math:`A^T`, so these are rows of ``weight``, and entries of ``bias``.

    Parameters
    ----------
    linear : the layer in one piece, the same on all ranks; it is not changed.
    outputs : which outputs this rank has; by default the i-th of N equal parts.
    borders : how the input comes in; by default `whole_tokens`.

    Raises
    ------
    ValueError : the ranks cannot have equally many outputs.
    """

    kept: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Linear,
        group: Group = None,
        *,
        outputs: Tensor | None = None,
        borders: Borders | None = None,
    ) -> None:
        super().__init__()
        self.group, self.borders = group, borders or whole_tokens(group)
        if outputs is None:
            outputs = torch.arange(linear.out_features)[equal_part("out_features", linear.out_features, group)]
        self.register_buffer("kept", outputs.to(linear.weight.device), persistent=False)
        self.weight = _part_of(linear.weight, 0, self.kept)
        self.bias = None if linear.bias is None else _part_of(linear.bias, 0, self.kept)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, inputs]`` to this rank's ``[…, outputs / N]``."""
        return self.borders.enter(x, self.weight, self.bias)

    def whole(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What ``pick`` takes of each parameter (its value, its gradient), for the layer in one piece."""
        return {name: _in_one_piece(pick(p), 0, self.kept, self.group) for name, p in self.named_parameters()}


class RowParallelLinear(nn.Module):
    r"""A linear layer of shared inputs: :math:`Y = \sum_iX_iA_i + b`, of which this rank computes one product.

    The parts of :math:`A` are its rows, columns of torch's ``weight``. The bias is added once, after the sum.

    Parameters
    ----------
    linear : the layer in one piece, the same on all ranks; it is not changed.
    inputs : which inputs this rank has; by default the i-th of N equal parts.
    borders : how the sum goes out; by default `whole_tokens`.

    Raises
    ------
    ValueError : the ranks cannot have equally many inputs.
    """

    kept: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        linear: nn.Linear,
        group: Group = None,
        *,
        inputs: Tensor | None = None,
        borders: Borders | None = None,
    ) -> None:
        super().__init__()
        self.group, self.borders = group, borders or whole_tokens(group)
        if inputs is None:
            inputs = torch.arange(linear.in_features)[equal_part("in_features", linear.in_features, group)]
        self.register_buffer("kept", inputs.to(linear.weight.device), persistent=False)
        self.weight = _part_of(linear.weight, 1, self.kept)
        self.bias = copy.deepcopy(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's ``[…, inputs / N]`` to ``[…, outputs]``."""
        y = self.borders.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.borders.outside(self.bias)

    def whole(self, pick: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What ``pick`` takes of the weight (its value, its gradient), for the layer in one piece."""
        return {"weight": _in_one_piece(pick(self.weight), 1, self.kept, self.group)}


def _part_of(parameter: Tensor, dim: int, kept: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(dim, kept), parameter.requires_grad)


def _in_one_piece(part: Tensor, dim: int, kept: Tensor, group: Group) -> Tensor:
    """All ranks' parts, each put back to where it was taken from."""
    ranks = dist.get_world_size(group)
    parts, places = ([torch.empty_like(t) for _ in range(ranks)] for t in (part, kept))
    dist.all_gather(parts, part.contiguous(), group=group)
    dist.all_gather(places, kept, group=group)
    return torch.cat(parts, dim).index_select(dim, torch.cat(places).argsort())


# --- The two halves of a transformer block ----------------------------------------------------------------------------

ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity)
"""What may stand between a column-parallel and a row-parallel layer: it needs no other rank's numbers."""


def parallel_mlp(
    layers: nn.Sequential,
    group: Group = None,
    borders: Borders | None = None,
) -> nn.Sequential:
    """Return the layers, pairs of linear ones among them column- and row-parallel.

    Of an odd number the last stays whole. Names stay; the original is not changed.

    Raises
    ------
    ValueError : there is no pair, another thing than an activation stands between its
        two, or the ranks cannot have equally many of the hidden units.
    """
    made: Any = copy.deepcopy(layers)
    for first, second in _linear_pairs(layers):
        made[first] = ColumnParallelLinear(made[first], group, borders=borders)
        made[second] = RowParallelLinear(made[second], group, borders=borders)
    return made


def _linear_pairs(layers: nn.Sequential) -> list[tuple[int, int]]:
    places = [place for place, layer in enumerate([*layers]) if isinstance(layer, nn.Linear)]
    pairs = list(zip(places[::2], places[1::2], strict=False))
    require("layers", layers, lambda _: bool(pairs), "two linear layers or more")
    for layer in (layer for first, second in pairs for layer in [*layers][first + 1 : second]):
        require("layers", layer, lambda each: isinstance(each, ELEMENTWISE), "an activation between two linear layers")
    return pairs


def parallel_attention(
    attention: Attention,
    group: Group = None,
    borders: Borders | None = None,
) -> Attention:
    """Return the attention with this rank's heads only; the ranks' results add up.

    A head is d rows each of the queries, the keys and the values in ``qkv``, and d
    columns of ``project``.

    Raises
    ------
    ValueError : the ranks cannot have equally many heads.
    """
    heads, width = attention.heads, attention.project.in_features
    own = equal_part("heads", heads, group)
    rows = torch.arange(3 * width).view(3, heads, -1)[:, own].flatten()
    columns = torch.arange(width).view(heads, -1)[own].flatten()
    made: Any = copy.deepcopy(attention)
    made.heads = own.stop - own.start
    made.qkv = ColumnParallelLinear(made.qkv, group, outputs=rows, borders=borders)
    made.project = RowParallelLinear(made.project, group, inputs=columns, borders=borders)
    return made


# --- The whole network ------------------------------------------------------------------------------------------------


def tensor_parallel(
    model: nn.Module,
    *,
    sequence: bool = False,
    gather_twice: bool = False,
    group: Group = None,
) -> nn.Module:
    """Return a copy of the laboratory's ``vit`` or ``mlp`` that computes the same, its matrices shared out.

    Of a ``vit`` the attention and the MLP of every block, of an ``mlp`` the hidden layers in pairs. What is left
    (embedding, layer norms, head) is whole on every rank, and after backward so are its gradients.

    Parameters
    ----------
    model : the same on all ranks. It is not changed.
    sequence : shares the tokens between the parallel layers, too (``vit`` only): layer norms and residual additions.
    gather_twice : keeps no gathered tokens for backward, for one more all-gather into each half of a block.

    Raises
    ------
    ValueError : the model is neither, or the ranks cannot have equally many of its heads or hidden units.
    """
    _check_twice(sequence, gather_twice)
    made = copy.deepcopy(model)
    if isinstance(made, ViT):
        return _parallel_vit(made, sequence, gather_twice, group)
    if isinstance(made, MLP) and not sequence:
        made.hidden = parallel_mlp(made.hidden, group)
        return made
    raise ValueError(f"model={type(model).__name__}: must be a ViT{'' if sequence else ' or an MLP'}")


def _parallel_vit(vit: ViT, sequence: bool, gather_twice: bool, group: Group) -> ViT:
    borders = _borders(len(vit.position), sequence, gather_twice, group)
    for block in cast(Sequence[EncoderBlock], vit.blocks):
        block.attention = parallel_attention(block.attention, group, borders)
        block.mlp = parallel_mlp(block.mlp, group, borders)
        if sequence:
            block.norm1 = SharedLayerNorm(block.norm1, borders)
            block.norm2 = SharedLayerNorm(block.norm2, borders)
    if sequence:
        vit.blocks = SharedTokens(vit.blocks, len(vit.position), group)
    return vit


def _check_twice(sequence: bool, gather_twice: bool) -> None:
    require("gather_twice", gather_twice, lambda twice: sequence or not twice, "False without sequence=True")


def _borders(tokens: int, sequence: bool, gather_twice: bool, group: Group) -> Borders:
    if not sequence:
        return whole_tokens(group)
    return tokens_gathered_twice(tokens, group) if gather_twice else shared_tokens(tokens, group)


class SharedTokens(nn.Sequential):
    """Layers among which each rank has some of the tokens; what comes and goes is whole."""

    def __init__(self, layers: nn.Sequential, tokens: int, group: Group = None) -> None:
        super().__init__(*layers)
        self.tokens, self.group = tokens, group

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[N, tokens, D]`` to tokens of the same shape."""
        x = super().forward(split_along(x, 1, self.group))
        return join_along(x, 1, self.tokens, self.group)


class SharedLayerNorm(nn.LayerNorm):
    """A layer norm of this rank's tokens: its gradients are added up over ranks."""

    def __init__(self, norm: nn.LayerNorm, borders: Borders) -> None:
        super().__init__(norm.normalized_shape, norm.eps)
        self.weight, self.bias, self.borders = norm.weight, norm.bias, borders

    def forward(self, x: Tensor) -> Tensor:  # the namesake calls it input
        weight, bias = (self.borders.outside(p) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the network in one piece, on the CPU: names and shapes as before. All ranks call it."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return _whole(model, state, lambda p: p.detach())


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of the network in one piece, on the CPU, by parameter; zeros where there is none."""

    def gradient(p: Tensor) -> Tensor:
        return torch.zeros_like(p) if p.grad is None else p.grad

    return _whole(model, {name: gradient(p) for name, p in model.named_parameters()}, gradient)


@torch.no_grad()
def _whole(model: nn.Module, own: dict[str, Tensor], pick: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            own |= {f"{name}.{key}".lstrip("."): tensor for key, tensor in module.whole(pick).items()}
    return {name: tensor.cpu().clone() for name, tensor in own.items()}


# --- What it costs, by formula ----------------------------------------------------------------------------------------


def layer_bytes(
    batch: int,
    tokens: int,
    width: int,
    ranks: int,
    itemsize: int = 4,
    *,
    sequence: bool = False,
    gather_twice: bool = False,
) -> float:
    r"""Bytes that a rank sends on a ring for one transformer block and step: :math:`4\cdot2\tfrac{N-1}{N}\,bsh\,w`.

    Four all-reduces of the tokens: out of attention and MLP in forward, into them in backward. With shared tokens each
    is a reduce-scatter and an all-gather, at another place but of the same bytes; besides, 6 h numbers are all-reduced,
    the gradients of layer norms and biases. Gathered twice, the two all-gathers more are a fifth all-reduce.

    Parameters
    ----------
    batch, tokens, width : b examples, s tokens each (N divides them if they are shared), h numbers each.
    itemsize : w, bytes of a number.

    Raises
    ------
    ValueError : an argument is below 1, or ``gather_twice`` is asked for without ``sequence``.
    """
    at_least(1, batch=batch, tokens=tokens, width=width, ranks=ranks, itemsize=itemsize)
    _check_twice(sequence, gather_twice)
    vectors = ring_bytes(6 * width * itemsize, ranks) if sequence else 0
    return (4 + gather_twice) * ring_bytes(batch * tokens * width * itemsize, ranks) + vectors


def layer_parameters(width: int, ranks: int) -> float:
    r"""Numbers that a rank has of one block's weights: :math:`(12h^2 + 7h)/N + 6h`.

    The matrices and the biases of what is cut by columns are shared out; four vectors of the layer norms and two
    biases are whole.
    """
    at_least(1, width=width, ranks=ranks)
    return (12 * width**2 + 7 * width) / ranks + 6 * width


def layer_activations(
    batch: int,
    tokens: int,
    width: int,
    heads: int,
    ranks: int,
    *,
    sequence: bool = False,
    gather_twice: bool = False,
) -> float:
    r"""Numbers that a rank keeps of one block for backward: :math:`bsh\,(4 + 12/N)` and some vectors.

    Whole are what each layer norm takes and gives, 4 bsh; shared are queries, keys, values and what attention makes
    of them, 4 bsh / N, and the MLP before and after its activation, 8 bsh / N. Shared tokens make it
    :math:`bsh\,(2 + 14/N)`, since the gathered tokens are kept, and gathered twice :math:`bsh\,16/N`. Besides, two
    statistics a token and layer norm, and one a token and head, with attention that stores no s x s matrix. It is the
    count of Korthikanti et al. 2022 (arXiv:2205.05198) without dropout: sbh (10 + 24 / t) and 34 sbh / t bytes there.

    Raises
    ------
    ValueError : an argument is below 1, or ``gather_twice`` is asked for without ``sequence``.
    """
    at_least(1, batch=batch, tokens=tokens, width=width, heads=heads, ranks=ranks)
    _check_twice(sequence, gather_twice)
    between, gathered = 1 / ranks if sequence else 1, 1 / ranks if gather_twice else 1
    vectors = batch * tokens * (4 * between + heads / ranks)
    return batch * tokens * width * (2 * between + 2 * gathered + 12 / ranks) + vectors
