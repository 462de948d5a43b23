r"""Several members within one network, which share most of its weights.

=====================  =====================================================  ==========================================
name                   what it does                                           source
=====================  =====================================================  ==========================================
``BatchEnsemble``      members that differ by a rank-1 factor a layer         Wen et al. 2020, arXiv:2002.06715
``RankOne``            such a layer
``MIMO``               M images in, M answers out                             Havasi et al. 2020, arXiv:2010.06610
``mimo_loss``          its objective
=====================  =====================================================  ==========================================

Both are called like a network and give log-probabilities ``[N, K]`` in evaluation; ``each(x)`` gives the logits
``[M, N, K]`` of the members.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.fusion.voting import Fuse, mean_probability
from course_lib.lab.arguments import at_least, is_number, require

# --- BatchEnsemble ----------------------------------------------------------------------------------------------------


class _Asked:
    """Which member each example of the batch is for; all layers of a network look at the same one."""

    def __init__(self) -> None:
        self.member: Tensor | None = None


class RankOne(nn.Module):
    r"""A linear or convolutional layer with members: member m has the weights :math:`W\circ s_mr_m^\top`.

    .. math:: y=s_m\circ\big(W\,(r_m\circ x)\big)+b_m

    r is ``[M, in]``, s ``[M, out]``, both signs at first; W is shared, and the bias is each member's own.

    Raises
    ------
    ValueError : the layer is neither ``nn.Linear`` nor ``nn.Conv2d``, or a convolution in groups.
    """

    def __init__(self, layer: nn.Module, members: int, asked: _Asked, generator: torch.Generator) -> None:
        super().__init__()
        kinds = nn.Linear | nn.Conv2d
        require("layer", layer, lambda a: isinstance(a, kinds) and getattr(a, "groups", 1) == 1, "linear or a Conv2d")
        weight: Any = layer.weight
        self.layer = copy.deepcopy(layer)
        self.layer.register_parameter("bias", None)  # it is in here, one for each member
        self.r = nn.Parameter(_signs(members, weight.shape[1], weight, generator))
        self.s = nn.Parameter(_signs(members, weight.shape[0], weight, generator))
        bias: Any = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().repeat(members, 1))
        self.asked = asked

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, ``[B, …]``, each example by its member."""
        member = self.asked.member
        if member is None or len(member) != len(x):
            raise ValueError(f"x={list(x.shape)}: must come through BatchEnsemble, which says whose each example is")
        y = self.layer(x * self._at(self.r[member], x)) * self._at(self.s[member], x)
        return y if self.bias is None else y + self._at(self.bias[member], x)

    def _at(self, rows: Tensor, x: Tensor) -> Tensor:
        """``[B, C]`` where the channels are: second in images, last in everything else."""
        if isinstance(self.layer, nn.Conv2d):
            return rows[:, :, None, None]
        return rows.view(len(rows), *[1] * (x.ndim - 2), -1)

    def plain(self, member: int) -> nn.Module:
        """Return the layer that one member has."""
        found = copy.deepcopy(self.layer)
        weight: Any = found.weight
        factor = torch.outer(self.s[member], self.r[member])
        with torch.no_grad():
            weight.mul_(factor.view(*factor.shape, *[1] * (weight.ndim - 2)))
        if self.bias is not None:
            found.bias = nn.Parameter(self.bias[member].detach().clone())
        return found


def _signs(members: int, size: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(2, (members, size), generator=generator) - 1).to(like)


class BatchEnsemble(nn.Module):
    """M members in one network: all linear layers and convolutions are ``RankOne``, all else is shared.

    In training the batch is cut into M stretches, one for each member, so a step costs what a plain one does. In
    evaluation each example goes through all members, as one batch M times as long. Batch norm is shared, and its
    statistics in training are those of all members together.

    Parameters
    ----------
    model : a network, of which the copy in here is made
    members : how many
    generator : draws the signs with which members start

    Raises
    ------
    ValueError : ``members`` is below 1, or the network has no such layer.
    """

    def __init__(
        self, model: nn.Module, members: int, *, generator: torch.Generator, fuse: Fuse = mean_probability
    ) -> None:
        super().__init__()
        at_least(1, members=members)
        self.members, self.fuse, self._asked = members, fuse, _Asked()
        kinds = nn.Linear | nn.Conv2d
        self.model = copy.deepcopy(model)
        names = [name for name, part in self.model.named_modules() if isinstance(part, kinds)]
        require(
            "model", type(model).__name__, lambda _: bool(names) and "" not in names, "a network with linear layers"
        )
        for name in names:
            layer = self.model.get_submodule(name)
            self.model.set_submodule(name, RankOne(layer, members, self._asked, generator))
        self.train(model.training)

    def each(self, x: Tensor) -> Tensor:
        """``[N, …]`` to the members' logits ``[M, N, K]``."""
        member = torch.arange(self.members, device=x.device).repeat_interleave(len(x))
        return self._through(x.repeat(self.members, *[1] * (x.ndim - 1)), member).unflatten(0, (self.members, len(x)))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …]`` to ``[N, K]``: in training each example by one member, in evaluation by all, fused."""
        if not self.training:
            return self.fuse(self.each(x))
        return self._through(x, torch.arange(len(x), device=x.device) * self.members // len(x))

    def _through(self, x: Tensor, member: Tensor) -> Tensor:
        self._asked.member = member
        try:
            return self.model(x)
        finally:
            self._asked.member = None

    def plain(self, member: int) -> nn.Module:
        """Return one member as an ordinary network.

        Raises
        ------
        ValueError : there is no such member.
        """
        require("member", member, lambda m: m in range(self.members), f"a number from 0 to {self.members - 1}")
        found = copy.deepcopy(self.model)
        for name, part in list(found.named_modules()):
            if isinstance(part, RankOne):
                found.set_submodule(name, part.plain(member))
        return found.train(self.training)


# --- Many inputs, many outputs ----------------------------------------------------------------------------------------


class MIMO(nn.Module):
    """One network that sees M examples at once and answers for each: members that share all but first and last layer.

    In training (``mimo_loss``) the M examples have nothing to do with each other, so the network learns to tell them
    apart; in evaluation all M are the same one, and the answers are fused.

    Parameters
    ----------
    make : ``(input_shape, classes) -> network``, such as ``mlp``: called with M times the channels and M K classes
    input_shape : of one example, (channels, height, width) or (columns,)
    classes : of one example

    Raises
    ------
    ValueError : ``members`` or ``classes`` is below 1.
    """

    def __init__(
        self,
        make: Callable[[tuple[int, ...], int], nn.Module],
        input_shape: tuple[int, ...],
        classes: int,
        *,
        members: int,
        fuse: Fuse = mean_probability,
    ) -> None:
        super().__init__()
        at_least(1, members=members, classes=classes)
        self.members, self.fuse = members, fuse
        self.model = make((members * input_shape[0], *input_shape[1:]), members * classes)

    def answers(self, xs: Tensor) -> Tensor:
        """M examples side by side, ``[M, B, C, …]``, to the logits of each ``[M, B, K]``."""
        side_by_side = xs.transpose(0, 1).flatten(1, 2)  # [B, M C, ...]
        return self.model(side_by_side).unflatten(1, (self.members, -1)).transpose(0, 1)

    def each(self, x: Tensor) -> Tensor:
        """``[N, C, …]`` to the members' logits ``[M, N, K]`` of the same examples."""
        return self.answers(x.expand(self.members, *x.shape))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, …]`` to ``[N, K]``, what the members say together."""
        return self.fuse(self.each(x))


def mimo_loss(
    model: nn.Module, x: Tensor, y: Tensor, *, repetition: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return the sum over the members of the mean cross-entropy, each seeing the batch in an order of its own.

    ``repetition`` is the share of the batch that all members see at the same place (the paper's input repetition):
    with small networks that cannot hold M independent ones, more of it helps. Without a generator torch's global one
    draws, which ``fit`` seeds.

    Raises
    ------
    ValueError : the model is no ``MIMO``, or ``repetition`` no number from 0 to 1.
    """
    require("repetition", repetition, lambda r: is_number(r) and 0 <= r <= 1, "a number from 0 to 1")
    if not isinstance(model, MIMO):
        raise ValueError(f"model={type(model).__name__}: must be a network MIMO")
    own = round(len(x) * (1 - repetition))
    common = torch.randperm(len(x), generator=generator)
    orders = torch.stack(
        [
            torch.cat([common[:own][torch.randperm(own, generator=generator)], common[own:]])
            for _ in range(model.members)
        ]
    )
    orders = orders.to(x.device)
    logits = model.answers(x[orders])
    return F.cross_entropy(logits.flatten(0, 1), y[orders].flatten()) * model.members
