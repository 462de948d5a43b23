r"""HashedNets: a layer whose weights are picked out of a small vector by a hash (Chen et al. 2015, arXiv:1504.04788).

====================  ================================================================================================
``hashed_places``     which entry of the vector each weight is, and with which sign
``HashedWeight``      the parametrization ``vector -> weight``
``hash_model``        every layer of a network, before it is trained
====================  ================================================================================================

.. math:: W_{ij} = \xi(i,j)\,v_{h(i,j)}

where :math:`h` is a hash with K values and :math:`\xi` one with the values 1 and -1. The places are not stored: the
seed is, and they are computed from it again. Unlike in weight sharing nothing is known of the weights when they are
grouped; so the network has to be trained from its first weights on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.pruning.masks import prunable_layers


def hashed_places(
    shape: tuple[int, ...], buckets: int, seed: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return ``[shape]`` whole numbers below ``buckets`` and ``[shape]`` signs, the same wherever they are computed.

    Raises
    ------
    ValueError : ``buckets`` is below 1, or ``seed`` below 0.
    """
    at_least(1, buckets=buckets)
    at_least(0, seed=seed)
    place = np.arange(np.prod(shape, dtype=np.int64), dtype=np.uint64)
    mixed = _mixed(place + _mixed(np.array([seed], dtype=np.uint64)))
    bucket = ((mixed >> np.uint64(1)) % np.uint64(buckets)).astype(np.int64)
    # of another bit, so that it is independent of the bucket
    sign = 1 - 2 * (mixed & np.uint64(1)).astype(np.int8)
    return torch.from_numpy(bucket).view(shape), torch.from_numpy(sign).view(shape)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea & Flood 2014, OOPSLA): neighbouring numbers become unlike ones, modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class HashedWeight(nn.Module):
    """The parametrization ``vector -> weight``: what is trained is the vector ``[K]``.

    Going backwards an entry gets the sum of its weights' gradients, each with its sign. The places are no part of the
    state dict; the seed is, and loading a state restores the places that belong to it.
    """

    def __init__(self, shape: tuple[int, ...], buckets: int, seed: int) -> None:
        super().__init__()
        self.shape, self.buckets = shape, buckets
        self.bucket: Tensor
        self.sign: Tensor
        self._place(seed)

    def _place(self, seed: int) -> None:
        self.seed = seed
        bucket, sign = hashed_places(self.shape, self.buckets, seed)
        self.register_buffer("bucket", bucket, persistent=False)
        self.register_buffer("sign", sign, persistent=False)

    def forward(self, vector: Tensor) -> Tensor:
        """Return the weight, ``[K]`` to its shape."""
        return vector[self.bucket] * self.sign

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the vector that is nearest to a weight: the means of each entry's weights, with their signs."""
        signed = (weight * self.sign).flatten()
        means = weight.new_zeros(self.buckets)
        return means.scatter_reduce(0, self.bucket.flatten(), signed, "mean", include_self=False)

    def get_extra_state(self) -> Tensor:
        """Return what the state dict holds beside parameters: the seed."""
        return torch.tensor(self.seed)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the seed, and compute the places that belong to it."""
        where = self.bucket.device
        self._place(int(state))
        self.to(where)


def hash_model(
    model: nn.Module,
    compression: float | Mapping[str, float],
    *,
    seed: int = 0,
    layers: Iterable[str] | None = None,
) -> nn.Module:
    """Let the weights of each layer be picked out of a vector, in place, from now on. Returns the model.

    The vectors start with numbers of the layer's own first weights, and so at their scale. Each layer hashes with a
    seed of its own, counted from ``seed``.

    Parameters
    ----------
    compression : how many weights share an entry on average; or that of each layer, by name.
    layers : the layers by name; by default all, or those that ``compression`` names.

    Raises
    ------
    ValueError : ``compression`` is below 1, or a layer is unknown or has a parametrized weight already.
    """
    if layers is None and isinstance(compression, Mapping):
        layers = list(compression)
    found: dict[str, Any] = dict(prunable_layers(model, layers))
    each = compression if isinstance(compression, Mapping) else dict.fromkeys(found, compression)
    require("compression", each, lambda c: set(found) <= set(c), f"a number for each of {', '.join(found)}")
    for name, layer in found.items():
        require(f"compression of {name!r}", each[name], lambda c: is_number(c) and c >= 1, "a number of at least 1")
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"layers: {name!r} has a parametrized weight already: must have an ordinary one")
    for place, (name, layer) in enumerate(found.items()):
        buckets = max(1, round(layer.weight.numel() / each[name]))
        first = layer.weight.detach().flatten()[:buckets].clone()
        hashed = HashedWeight(tuple(layer.weight.shape), buckets, seed + place).to(layer.weight.device)
        parametrize.register_parametrization(layer, "weight", hashed)
        with torch.no_grad():  # not the means of many weights, which are smaller
            layer.parametrizations.weight.original.copy_(first)
    return model
