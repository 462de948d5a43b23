r"""Accumulation: the gradient of a batch that does not fit, part by part, and the layer that notices.

=========================  =======================================================  ==================================
name                       what it does                                             source
=========================  =======================================================  ==================================
``accumulated_gradient``   adds the parts' gradients, each by its share
``GhostBatchNorm1d, 2d``   batch norm by small groups of a large batch              Hoffer et al. 2017,
``ghost``                  a network's batch norms, so converted                    arXiv:1705.08741
=========================  =======================================================  ==================================

A mean over the batch is a sum over parts, so accumulation changes no gradient, with one exception: batch norm
normalises by the examples that it sees at once. An accumulated run with batch norm is a run on whole batches with
*ghost* batch norm of the parts' size: the same gradients, and the same running statistics too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import at_least
from course_lib.lab.training import Inputs, Objective, cross_entropy


def accumulated_gradient(
    model: nn.Module, x: Inputs, y: Tensor, parts: int | Sequence[int], *, objective: Objective = cross_entropy
) -> Tensor:
    r"""Leave the whole batch's gradient in ``.grad``, with one part in memory at a time; return the batch's loss.

    .. math:: G = \sum_p \frac{n_p}{n}\,G_p

    for an objective that is a mean over its examples. The mean of the parts' means would be another number where the
    parts are of different sizes.

    Parameters
    ----------
    x, y : the batch, ``[B, …]`` and ``[B]``.
    parts : how many parts (the last may be smaller, as ``torch.chunk`` cuts), or the size of each.

    Raises
    ------
    ValueError : more parts than examples, or sizes that do not add up to the batch.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=y.device)
    for part_x, part_y in _cut(x, y, _sizes(parts, len(y))):
        loss = objective(model, part_x, part_y) * (len(part_y) / len(y))
        loss.backward()  # adds to .grad, and frees the part's activations
        total = total + loss.detach()
    return total


def _sizes(parts: int | Sequence[int], examples: int) -> list[int]:
    if isinstance(parts, Sequence):
        at_least(1, **{f"parts[{i}]": size for i, size in enumerate(parts)})
        if sum(parts) != examples:
            raise ValueError(f"parts={list(parts)!r}: must add up to {examples}, the examples of the batch")
        return list(parts)
    at_least(1, parts=parts)
    if parts > examples:
        raise ValueError(f"parts={parts}: must be at most {examples}, the examples of the batch")
    return [len(part) for part in torch.empty(examples).chunk(parts)]


def _cut(x: Inputs, y: Tensor, sizes: list[int]) -> list[tuple[Any, Tensor]]:
    if isinstance(x, Tensor):
        return list(zip(x.split(sizes), y.split(sizes), strict=True))
    return list(zip(zip(*(part.split(sizes) for part in x), strict=True), y.split(sizes), strict=True))


# --- Ghost batch norm -------------------------------------------------------------------------------------------------


class _Ghost(nn.modules.batchnorm._BatchNorm):
    """Batch norm that sees ``size`` examples at a time while it trains."""

    def __init__(self, num_features: int, size: int, **settings: Any) -> None:
        at_least(2, size=size)
        super().__init__(num_features, **settings)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[N, C, …]`` to the same shape."""
        if not self.training:
            return super().forward(x)
        # one after the other, so that the running statistics move once a ghost
        return torch.cat([super(_Ghost, self).forward(part) for part in x.split(self.size)])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"


class GhostBatchNorm1d(_Ghost, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` in which each ``size`` examples of a batch are normalised by themselves while training.

    The last ghost holds what is left. Running statistics move once a ghost, in order: after a batch of k ghosts they
    are those of k batches of ``size``. In evaluation it is plain batch norm.
    Source: Hoffer et al. 2017, arXiv:1705.08741.

    Raises
    ------
    ValueError : ``size`` is less than 2; at the call, a last ghost of one value, which has no variance.
    """


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` in which each ``size`` examples are normalised by themselves; see ``GhostBatchNorm1d``."""


_KINDS: dict[type[nn.Module], type[_Ghost]] = {nn.BatchNorm1d: GhostBatchNorm1d, nn.BatchNorm2d: GhostBatchNorm2d}


def ghost(model: nn.Module, size: int) -> nn.Module:
    """Return a copy of the network in which each batch norm sees ``size`` examples at a time while it trains.

    Weights, running statistics and mode stay. A ghost batch norm that is there already gets the new size.

    Raises
    ------
    ValueError : ``size`` is less than 2, or the network has no ``BatchNorm1d`` or ``BatchNorm2d``.
    """
    at_least(2, size=size)
    changed = copy.deepcopy(model)
    found = [(name, part) for name, part in changed.named_modules() if type(part) in (*_KINDS, *_KINDS.values())]
    if not found:
        raise ValueError(f"model={type(model).__name__}: must have a BatchNorm1d or BatchNorm2d")
    for name, part in found:
        new = _ghost_of(part, size)
        if name == "":
            return new
        above, _, last = name.rpartition(".")
        setattr(changed.get_submodule(above), last, new)
    return changed


def _ghost_of(part: Any, size: int) -> _Ghost:
    kind = _KINDS.get(type(part), type(part))
    new = kind.__new__(kind)
    # all that the part of the copy holds: parameters, settings, mode, and the hooks by which it is frozen or has noise
    new.__dict__.update(vars(part), size=size)
    return new
