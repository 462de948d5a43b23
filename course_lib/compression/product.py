r"""Product quantisation: stretches of neighbouring weights as numbers of vectors in a codebook.

=======================  =====================================================  =======================================
name                     what it does                                           source
=======================  =====================================================  =======================================
``k_means``              vectors to a codebook, by turns                        Lloyd 1982, IEEE Trans. Inf. Theory 28
``product_quantise``     rows cut into stretches, a codebook for each place     Jégou et al. 2011, TPAMI 33;
                                                                                Gong et al. 2014, arXiv:1412.6115
``vector_quantise``      the same with one codebook for all places              Stock et al. 2019, arXiv:1907.05686
``ProductQuantised``     codebooks and codes; bits; products by table
``quantised_vectors``    every layer of a network
=======================  =====================================================  =======================================

K vectors of d numbers cost :math:`\log_2(K)/d` bits a weight, which may be below 1, and K d numbers a codebook.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.pruning.masks import prunable_layers, weight_of

# --- k-means ----------------------------------------------------------------------------------------------------------


def k_means(
    points: Tensor, clusters: int, *, generator: torch.Generator, steps: int = 50
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return centroids ``[..., K, d]`` of points ``[..., n, d]``, and the number of the nearest to each, ``[..., n]``.

    They start at K points drawn by a CPU ``generator``. Each point joins the nearest centroid, and each centroid moves
    to the mean of its points; one without points moves to the point that is furthest from its own.

    Raises
    ------
    ValueError : ``clusters`` or ``steps`` is below 1, or there are fewer points than clusters.
    """
    at_least(1, clusters=clusters, steps=steps)
    count = points.shape[-2]
    allowed = f"at most the number of points, {count}"
    require("clusters", clusters, lambda k: k <= count, allowed)
    first = torch.randperm(count, generator=generator)[:clusters]
    centroids = points.index_select(-2, first.to(points.device))
    nearest = torch.cdist(points, centroids).argmin(-1)
    for _ in range(steps):
        centroids = _means(points, nearest, centroids)
        before, nearest = nearest, torch.cdist(points, centroids).argmin(-1)
        if torch.equal(nearest, before):
            break
    return centroids, nearest


def _means(points: Tensor, nearest: Tensor, centroids: Tensor) -> Tensor:
    """The means of the points of each cluster; empty clusters get the points that are furthest from where they are."""
    clusters = centroids.shape[-2]
    member = nn.functional.one_hot(nearest, clusters).to(points)  # [..., n, K]
    counts = member.sum(-2)[..., None]  # [..., K, 1]
    means = member.mT @ points / counts.clamp_min(1)
    own = centroids.take_along_dim(nearest[..., None], -2)
    distances = (points - own).square().sum(-1)
    order = distances.argsort(dim=-1, descending=True, stable=True)
    furthest = order[..., :clusters, None]
    # the first empty cluster gets the furthest point, the second the next one
    place = ((counts == 0).cumsum(-2) - 1).clamp_min(0)
    instead = points.take_along_dim(furthest.take_along_dim(place, -2), -2)
    return torch.where(counts > 0, means, instead)


# --- Weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProductQuantised:
    """A weight as numbers of vectors.

    Attributes
    ----------
    codebooks : ``[places, K, d]``: a codebook for each stretch of a row, or ``[1, K, d]``: one for all.
    codes : int64, ``[rows, places]``: which vector stands there.
    shape : of the weight, ``[rows, ...]`` with ``places * d`` numbers a row.
    """

    codebooks: Tensor
    codes: Tensor
    shape: tuple[int, ...]

    def dequantise(self) -> Tensor:
        """Return the weight."""
        return self._each()[self._place(), self.codes].reshape(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits that each weight takes: codes of fixed length, and the codebooks in their own type."""
        numbers = self.codes.numel() * math.ceil(math.log2(max(2, self.codebooks.shape[1])))
        books = self.codebooks.numel() * self.codebooks.element_size() * 8
        return (numbers + books) / math.prod(self.shape)

    def product(self, x: Tensor) -> Tensor:
        r"""Return :math:`xW^T` ``[..., rows]`` for ``x`` ``[..., places * d]``, without ever making W.

        The products of each stretch of x with all K vectors go into a table; each output then is a sum of ``places``
        entries of it, in place of ``places * d`` multiplications.
        """
        places = self.codes.shape[1]
        stretches = x.unflatten(-1, (places, -1))
        table = torch.einsum("...pd,pkd->...pk", stretches, self._each())
        return table[..., self._place(), self.codes].sum(-1)

    def _each(self) -> Tensor:
        return self.codebooks.expand(self.codes.shape[1], -1, -1)

    def _place(self) -> Tensor:
        return torch.arange(self.codes.shape[1], device=self.codes.device)


Quantise = Callable[..., ProductQuantised]
"""``product_quantise`` or ``vector_quantise``."""


def product_quantise(
    weight: Tensor,
    size: int,
    clusters: int,
    *,
    generator: torch.Generator,
    steps: int = 50,
) -> ProductQuantised:
    """Return a weight ``[rows, ...]`` whose rows are cut into stretches of ``size`` numbers, a codebook for each place.

    The codebooks hold ``clusters / rows`` times as many numbers as the weight: this is for many rows.

    Raises
    ------
    ValueError : ``size`` does not divide a row, or there are fewer rows than ``clusters``.
    """
    stretches = _stretches(weight, size)
    by_place = stretches.transpose(0, 1)  # [places, rows, size]
    books, codes = k_means(by_place, clusters, generator=generator, steps=steps)
    return ProductQuantised(books, codes.mT.contiguous(), tuple(weight.shape))


def vector_quantise(
    weight: Tensor,
    size: int,
    clusters: int,
    *,
    generator: torch.Generator,
    steps: int = 50,
) -> ProductQuantised:
    """Return the same with one codebook for the stretches at all places: ``size=9`` makes a vector of a 3x3 kernel.

    Raises
    ------
    ValueError : ``size`` does not divide a row, or there are fewer stretches than ``clusters``.
    """
    stretches = _stretches(weight, size)
    together = stretches.flatten(0, 1)  # [rows * places, size]
    book, codes = k_means(together, clusters, generator=generator, steps=steps)
    codes = codes.view(stretches.shape[:2])
    return ProductQuantised(book[None], codes, tuple(weight.shape))


def _stretches(weight: Tensor, size: int) -> Tensor:
    """``[rows, ...] -> [rows, places, size]``."""
    at_least(1, size=size)
    require("weight", tuple(weight.shape), lambda s: len(s) > 1, "of the shape [rows, ...]")
    rows = weight.detach().flatten(1)
    require("size", size, lambda d: rows.shape[1] % d == 0, f"a divisor of {rows.shape[1]}, the numbers of a row")
    return rows.unflatten(1, (-1, size))


@torch.no_grad()
def quantised_vectors(
    model: nn.Module,
    quantise: Callable[[Tensor], ProductQuantised],
    layers: Iterable[str] | None = None,
) -> tuple[nn.Module, dict[str, ProductQuantised]]:
    """Return a copy of the network with quantised weights put back, and what they were made into, by layer.

    ``quantise`` is, say, ``partial(vector_quantise, size=4, clusters=64, generator=...)``.
    """
    made = copy.deepcopy(model)
    found = {name: quantise(weight_of(layer)) for name, layer in prunable_layers(made, layers).items()}
    for name, layer in prunable_layers(made, layers).items():
        weight_of(layer).copy_(found[name].dequantise())
    return made, found
