r"""Weight sharing: the weights of a layer take few values, and each weight is stored as the number of its value.

======================  ==========================================================  ===================================
name                    what it does                                                source
======================  ==========================================================  ===================================
``linear_centroids``    first values at equal distances                             Han et al. 2015, arXiv:1510.00149
``density_centroids``   first values with equal shares of the weights               Han et al. 2015
``random_centroids``    first values drawn from the weights (Forgy)                 Han et al. 2015
``lloyd``               k-means on a line, by turns                                 Lloyd 1982, IEEE Trans. Inf. Th. 28
``optimal_centroids``   the best values there are, by dynamic programming           Wang & Song 2011, The R Journal 3
``share``               weights to a codebook and codes                             Han et al. 2015
``SharedWeight``        the parametrization by which training moves the codebook    Han et al. 2015
``share_model``         every layer of a network                                    Han et al. 2015
======================  ==========================================================  ===================================

K values cost :math:`\log_2 K` bits a weight and K numbers a layer. A weight that is exactly 0 stays so: pruned networks
stay pruned. The gradient of a shared value is the sum of its members' gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from course_lib.lab.arguments import at_least, require
from course_lib.pruning.masks import is_masked, make_permanent, prunable_layers, weight_of

Init = Literal["linear", "density", "random"]

# --- First values -----------------------------------------------------------------------------------------------------


def linear_centroids(values: Tensor, clusters: int, _: Any = None) -> Tensor:
    """Return ``[K]`` numbers at equal distances from the least of the ``values`` to the greatest.

    The few large weights get values of their own, and those matter most: Han et al. found this the best start.
    """
    steps = torch.linspace(0, 1, clusters, dtype=values.dtype)
    return torch.lerp(values.min(), values.max(), steps)


def density_centroids(values: Tensor, clusters: int, _: Any = None) -> Tensor:
    """Return ``[K]`` numbers that are the middles of K equal shares of the sorted ``values``."""
    ordered = values.sort().values
    middles = (torch.arange(clusters) + 0.5) / clusters * len(ordered)
    return ordered[middles.long()]


def random_centroids(values: Tensor, clusters: int, generator: Any = None) -> Tensor:
    """Return ``[K]`` of the ``values``, drawn without replacement and sorted (fewer where there are fewer)."""
    drawn = torch.randperm(len(values), generator=generator)[:clusters]
    return values[drawn].sort().values


INITS: Mapping[Init, Callable[[Tensor, int, torch.Generator | None], Tensor]] = {
    "linear": linear_centroids,
    "density": density_centroids,
    "random": random_centroids,
}

# --- k-means on a line ------------------------------------------------------------------------------------------------


def lloyd(values: Tensor, centroids: Tensor, *, steps: int = 300) -> Tensor:
    """Improve ``centroids`` ``[K]`` (ascending) for ``values`` ``[n]`` by turns, until no value changes its cluster.

    Each value joins the nearest centroid, then each centroid moves to the mean of its members. On a line clusters are
    stretches of the sorted values, and sums over stretches are differences of running sums: a turn costs
    ``K log n`` instead of ``K n``. A centroid without members takes the value that is furthest from its own.
    """
    ordered = values.sort().values
    running = F.pad(ordered.cumsum(0), (1, 0))  # [n + 1], the sum of the first i
    before = None
    for _ in range(steps):
        middles = (centroids[1:] + centroids[:-1]) / 2
        inner = torch.searchsorted(ordered, middles, right=True)
        edges = F.pad(F.pad(inner, (1, 0)), (0, 1), value=len(ordered))  # [K + 1]
        if before is not None and torch.equal(edges, before):
            break
        before, counts, sums = edges, edges.diff(), running[edges].diff()
        if not bool(counts.all()):
            counts, sums = _refilled(ordered, centroids, counts, sums)
        centroids = torch.where(counts > 0, sums / counts, centroids).sort().values
    return centroids


def _refilled(
    ordered: Tensor, centroids: Tensor, counts: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The clusters' counts and sums after each empty one took a value from another, as scikit-learn has it."""
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    empty = (counts == 0).nonzero()[:, 0]
    distances = (ordered - centroids[owner]).abs()
    furthest = distances.topk(min(len(empty), len(ordered))).indices
    taken, empty, values = owner[furthest], empty[: len(furthest)], ordered[furthest]
    counts = counts.index_add(0, taken, torch.full_like(taken, -1))
    sums = sums.index_add(0, taken, -values)
    return counts.index_fill(0, empty, 1), sums.index_copy(0, empty, values)


def optimal_centroids(values: Tensor, clusters: int) -> Tensor:
    r"""Return the ``[K]`` centroids with the least sum of squared distances that K can have, in float64.

    .. math:: D_k(i) = \min_{j < i}\; D_{k-1}(j) + \textstyle\sum_{t=j}^{i-1}(x_t - \bar x_{j..i-1})^2

    is the least sum for the first i of the sorted values in k clusters (Wang & Song 2011): it costs
    :math:`O(K n^2)`, which is why ``lloyd`` exists. Where two cuts are as good, the first is taken.

    Raises
    ------
    ValueError : there are fewer values than clusters.
    """
    at_least(1, clusters=clusters)
    x = np.sort(values.detach().double().cpu().numpy().ravel())
    allowed = f"at most the number of values, {len(x)}"
    require("clusters", clusters, lambda k: k <= len(x), allowed)
    y = x - x.mean()  # near 0 the differences of running sums are most exact
    sums, squares = (np.concatenate([[0.0], part.cumsum()]) for part in (y, y**2))
    best = np.full((clusters + 1, len(x) + 1), np.inf)
    best[0, 0] = 0.0
    cut = np.zeros(best.shape, dtype=np.int64)
    for i in range(1, len(x) + 1):
        # of x[j:i], for each j: the sum of squares less the square of the sum, [i]
        spread = squares[i] - squares[:i] - (sums[i] - sums[:i]) ** 2 / (i - np.arange(i))
        totals = best[:-1, :i] + spread.clip(min=0)  # [K, i]
        cut[1:, i] = totals.argmin(1)
        best[1:, i] = totals.min(1)
    edges = [len(x)]
    for k in range(clusters, 0, -1):
        edges.insert(0, cut[k, edges[0]])
    return torch.tensor([x[a:b].mean() for a, b in pairwise(edges)]).to(values.device)


# --- Sharing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """Weights that take few values.

    Attributes
    ----------
    codebook : the values, ``[K]``, ascending when they were found.
    codes : which value each weight has, in the weights' shape: 0 for a weight that is 0, k for ``codebook[k - 1]``.
    """

    codebook: Tensor
    codes: Tensor

    def dequantise(self) -> Tensor:
        """Return the weights."""
        return looked_up(self.codebook, self.codes)

    @property
    def bits_per_weight(self) -> float:
        """Codes of fixed length and a codebook in its own type, before any coding of positions and codes."""
        kinds = len(self.codebook) + bool((self.codes == 0).any())
        bits = math.ceil(math.log2(max(2, kinds))) * self.codes.numel()
        return (bits + 8 * self.codebook.element_size() * len(self.codebook)) / self.codes.numel()


def looked_up(codebook: Tensor, codes: Tensor) -> Tensor:
    """Return the value of each code: 0 for 0, and ``codebook[k - 1]`` for k."""
    return F.pad(codebook, (1, 0))[codes]


def share(
    weights: Tensor,
    clusters: int,
    init: Init = "linear",
    generator: torch.Generator | None = None,
) -> Shared:
    """Return weights that share at most ``clusters`` values, by k-means; zeros stay zeros and count as no value.

    Found on the CPU in float64, so that every device finds the same. Values that no weight took are dropped.

    Parameters
    ----------
    weights : of any shape, type and device.
    init : where the values start: at equal distances, at equal shares of the weights, or at weights drawn by
        ``generator`` (a CPU generator).

    Raises
    ------
    ValueError : ``clusters`` is below 1, ``init`` is unknown, or a weight is not finite.
    """
    at_least(1, clusters=clusters)
    require("init", init, lambda name: name in INITS, f"one of {', '.join(INITS)}")
    flat = weights.detach().cpu().double().flatten()
    if not bool(flat.isfinite().all()):
        raise ValueError("weights holds NaN or infinity: must be finite numbers")
    there = flat[flat != 0]
    if len(there) == 0:
        nothing = torch.zeros_like(weights, dtype=torch.int64)
        return Shared(weights.new_zeros(0), nothing)
    found = lloyd(there, INITS[init](there, clusters, generator))
    # in the weights' own type, in which two values may become one
    found = found.to(weights.dtype).double().unique()
    nearest = torch.bucketize(there, (found[1:] + found[:-1]) / 2)
    used, nearest = nearest.unique(return_inverse=True)
    codes = torch.zeros(len(flat), dtype=torch.int64)
    codes[flat != 0] = nearest + 1
    return Shared(found[used].to(weights), codes.view(weights.shape).to(weights.device))


class SharedWeight(nn.Module):
    """The parametrization ``codebook -> weight``: what is trained is the codebook ``[K]``.

    Going backwards, the gradient of a value is the sum of the gradients of the weights that share it; which weights
    share it no longer changes.
    """

    def __init__(self, codes: Tensor, values: int) -> None:
        super().__init__()
        self.codes: Tensor
        self.register_buffer("codes", codes)
        self.values = values

    def forward(self, codebook: Tensor) -> Tensor:
        """Return the weight, in the shape of the codes, from values ``[K]``."""
        return looked_up(codebook, self.codes)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the codebook that is nearest to a weight: the mean of each value's members."""
        sums = weight.new_zeros(self.values + 1)
        sums.scatter_reduce_(0, self.codes.flatten(), weight.flatten(), "mean", include_self=False)
        return sums[1:]


def share_model(
    model: nn.Module,
    clusters: int | Mapping[str, int],
    *,
    init: Init = "linear",
    generator: torch.Generator | None = None,
    layers: Iterable[str] | None = None,
) -> nn.Module:
    """Share the weights of each layer in place, from now on and through any training. Returns the model.

    Masks become permanent: a code of 0 holds a pruned weight at 0 from here on.

    Parameters
    ----------
    clusters : values a layer; or those of each layer, by name.
    layers : the layers by name; by default all linear and convolutional ones, or those that ``clusters`` names.

    Raises
    ------
    ValueError : as ``share``; a layer has no such name; or its weight is shared already.
    """
    if layers is None and isinstance(clusters, Mapping):
        layers = list(clusters)
    found = prunable_layers(model, layers)
    each = clusters if isinstance(clusters, Mapping) else dict.fromkeys(found, clusters)
    require("clusters", each, lambda c: set(found) <= set(c), f"a number for each of {', '.join(found)}")
    for name, layer in found.items():
        if parametrize.is_parametrized(layer, "weight") and not is_masked(layer):
            raise ValueError(f"layers: {name!r} has a parametrized weight already: must have an ordinary or masked one")
    made = {name: share(weight_of(layer), each[name], init, generator) for name, layer in found.items()}
    make_permanent(model)
    for name, shared in made.items():
        install(found[name], shared)
    return model


def install(layer: nn.Module, shared: Shared) -> None:
    """Make the codebook the parameter of a layer in place of its weight."""
    parametrize.register_parametrization(layer, "weight", SharedWeight(shared.codes, len(shared.codebook)))
    with torch.no_grad():  # exactly, where the mean of equal numbers may be off by rounding
        _parametrization(layer).original.copy_(shared.codebook)


def shared_layers(model: nn.Module) -> dict[str, Shared]:
    """Return the codebook and codes of each layer that shares its weights, by name, as they are now."""
    found = {}
    for name, layer in model.named_modules():
        if is_shared(layer):
            codebook = _parametrization(layer).original.detach().clone()
            found[name] = Shared(codebook, _parametrization(layer)[0].codes.clone())
    return found


def unshare(model: nn.Module) -> nn.Module:
    """Make the weights ordinary ones again, in place, with the values that they have. Returns the model."""
    for layer in model.modules():
        if is_shared(layer):
            # Copies of a parametrized layer share one class, out of which torch takes the weight: give this layer a
            # class of its own, or its copies would be left without weights.
            shared = type(layer)
            layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            # The weight was put back behind the bias: restore the usual order
            bias = layer.bias
            del layer.bias
            layer.register_parameter("bias", bias)  # type: ignore[arg-type]  # torch takes None too
    return model


def is_shared(layer: nn.Module) -> bool:
    """Tell whether the weights of this layer share values."""
    return parametrize.is_parametrized(layer, "weight") and isinstance(_parametrization(layer)[0], SharedWeight)


def _parametrization(layer: nn.Module) -> Any:
    return layer.parametrizations.weight  # type: ignore[union-attr]
