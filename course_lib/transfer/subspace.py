r"""How many directions training needs: weights that move in a random subspace alone.

==========================  ==============================================  ===========================================
name                        what it does                                    source
==========================  ==============================================  ===========================================
``in_subspace``             trains d numbers in place of all D              Li et al. 2018, arXiv:1804.08838
``Dense``                   the projection as a matrix, D x d
``Fastfood``                the projection by fast transforms, for large D  Le, Sarlós & Smola 2013, arXiv:1408.3060
``walsh_hadamard``          the transform
``intrinsic_dimension``     the smallest d that does nearly as well         Li et al. 2018; after pretraining
                                                                            Aghajanyan et al. 2020, arXiv:2012.13255
==========================  ==============================================  ===========================================

.. math:: \theta=\theta_0+Pz,\qquad z\in\mathbb R^d,\;P\in\mathbb R^{D\times d}\text{ random and fixed}

Stored are z and a seed, for P and :math:`\theta_0` can be drawn again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.linalg import hadamard
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.merging.states import home

# --- Projections ------------------------------------------------------------------------------------------------------


class Dense(nn.Module):
    """A matrix ``[D, d]`` of normal numbers whose columns have norm 1. It is drawn from ``seed``, and not stored.

    Raises
    ------
    ValueError : ``dimension`` is not from 1 to ``total``.
    """

    matrix: Tensor

    def __init__(self, total: int, dimension: int, seed: int) -> None:
        super().__init__()
        _check_dimension(total, dimension)
        self.seed = seed
        drawn = torch.randn(dimension, total, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.register_buffer("matrix", (drawn / drawn.norm(dim=1, keepdim=True)).mT, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """``[d]`` to ``[D]``."""
        return self.matrix @ z


class Fastfood(nn.Module):
    r"""The first D rows and d columns of :math:`HG\Pi HB/\sqrt{D\sum g^2}`: ``O(n log n)`` time and ``O(n)`` memory.

    n is the least power of 2 of at least D; H the Walsh-Hadamard matrix, B signs, :math:`\Pi` a permutation and G
    normal numbers g on a diagonal, all drawn from ``seed`` and not stored. Each column has the squared norm 1 on
    average over the draws; it would be exact if D were n.

    Raises
    ------
    ValueError : ``dimension`` is not from 1 to ``total``.
    """

    signs: Tensor
    order: Tensor
    sizes: Tensor

    def __init__(self, total: int, dimension: int, seed: int) -> None:
        super().__init__()
        _check_dimension(total, dimension)
        self.total, self.dimension, self.seed = total, dimension, seed
        n, generator = 1 << (total - 1).bit_length(), torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.randint(2, (n,), generator=generator).double() - 1
        order = torch.randperm(n, generator=generator)
        sizes = torch.randn(n, generator=generator, dtype=torch.float64)
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("sizes", sizes / (total * sizes.square().sum()).sqrt(), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """``[d]`` to ``[D]``."""
        wide = torch.cat([z, z.new_zeros(len(self.signs) - len(z))])
        mixed = walsh_hadamard(self.signs * wide)[self.order]
        return walsh_hadamard(self.sizes * mixed)[: self.total]


def _check_dimension(total: int, dimension: int) -> None:
    at_least(1, total=total, dimension=dimension)
    require("dimension", dimension, lambda d: d <= total, f"at most the number of weights, {total}")


class _WalshHadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _transformed(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _WalshHadamard.apply(gradients[0])  # H is symmetric


RADIX = 64
"""Of one step of the transform: with 2 there are fewest operations, but each step goes through memory once."""


def _transformed(x: Tensor) -> Tensor:
    (*rows, n), width = x.shape, 1
    while width < n:
        radix = min(RADIX, n // width)
        h = torch.from_numpy(hadamard(radix)).to(x)
        blocks = x.reshape(*rows, n // (radix * width), radix, width)
        x = blocks.squeeze(-1) @ h if width == 1 else h @ blocks  # h is symmetric
        x, width = x.reshape(*rows, n), radix * width
    return x


def walsh_hadamard(x: Tensor) -> Tensor:
    r"""Return :math:`Hx` of ``[…, n]``, :math:`H_{2n}=\begin{pmatrix}H_n&H_n\\H_n&-H_n\end{pmatrix}`, :math:`H_1=1`.

    It takes a multiple of ``n log n`` operations, in products with matrices of at most 64x64, and its gradient as many.

    Raises
    ------
    ValueError : n is no power of 2.
    """
    n = x.shape[-1]
    require("x", list(x.shape), lambda _: n > 0 and n & (n - 1) == 0, "[…, n] for a power n of 2")
    return _WalshHadamard.apply(x)


# --- A network that moves in a subspace -------------------------------------------------------------------------------


class Subspace(nn.Module):
    """A network whose weights are where they began plus a projection of ``z`` ``[d]``, which alone trains.

    ``plain()`` gives the network at this point as an ordinary one.
    """

    def __init__(self, network: nn.Module, projection: nn.Module, dimension: int) -> None:
        super().__init__()
        self.network, self.projection = network, projection
        self._names = [name for name, p in network.named_parameters() if p.requires_grad]
        network.requires_grad_(False)
        self.z = nn.Parameter(torch.zeros(dimension, dtype=home(network).dtype, device=home(network).device))
        self.train(network.training)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name, as they depend on ``z``."""
        there = dict(self.network.named_parameters())
        moved = self.projection(self.z).split([there[name].numel() for name in self._names])
        return {
            name: there[name] + part.view_as(there[name]) for name, part in zip(self._names, moved, strict=True)
        }  # fmt: skip

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to logits ``[N, K]``."""
        return torch.func.functional_call(self.network, self.weights(), (x,))

    @torch.no_grad()
    def plain(self) -> nn.Module:
        """Return a copy of the network with these weights; all that trained before the subspace trains again."""
        made = copy.deepcopy(self.network)
        there = dict(made.named_parameters())
        for name, value in self.weights().items():
            there[name].copy_(value).requires_grad_(True)
        return made


def in_subspace(
    model: nn.Module,
    dimension: int,
    *,
    seed: int,
    projection: Callable[[int, int, int], nn.Module] = Dense,
) -> Subspace:
    """Return a copy of the network that trains in ``dimension`` random directions of its trainable weights.

    Parameters
    ----------
    seed : of the projection.
    projection : ``(D, d, seed)`` -> a module from ``[d]`` to ``[D]``: ``Dense``, which holds ``D d`` numbers, or
        ``Fastfood``.

    Raises
    ------
    ValueError : nothing in the network trains, or ``dimension`` is not from 1 to the number of its trainable weights.
    """
    network = copy.deepcopy(model)
    total = sum(p.numel() for p in network.parameters() if p.requires_grad)
    require("model", type(model).__name__, lambda _: total > 0, "a network in which something trains")
    like = home(network)
    return Subspace(network, projection(total, dimension, seed).to(like.device, like.dtype), dimension)


def intrinsic_dimension(accuracies: Mapping[int, float], full: float, *, share: float = 0.9) -> int | None:
    """Return the least dimension whose accuracy is ``share`` of that of training all weights, ``full``; None if none.

    With 0.9 it is the papers' ``d_90``.

    Raises
    ------
    ValueError : ``share`` is not above 0 and at most 1.
    """
    require("share", share, lambda s: is_number(s) and 0 < s <= 1, "a number above 0 and at most 1")
    reached = [dimension for dimension, found in accuracies.items() if found >= share * full and not math.isnan(found)]
    return min(reached, default=None)
