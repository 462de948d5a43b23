r"""Why the middle of two aligned networks is quiet, and how to make it speak up again.

======================  ====================================================  ========================================
name                    what it does                                          source
======================  ====================================================  ========================================
``repair``              gives each unit the mean and spread that it has in    Jordan et al. 2022 (REPAIR),
                        the networks that were merged                         arXiv:2211.08403
``unit_statistics``     the mean and standard deviation of layers' outputs
======================  ====================================================  ========================================

The mean of two units whose outputs vary alike but not together varies less than either: with correlation r and equal
variances it keeps the share :math:`(1+r)/2` of the variance, and layer by layer the signal dies away.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Split, batches
from course_lib.lab.tracing import BATCH_NORMS, Inputs
from course_lib.merging.alignment import example_of, opened, outputs, permutation_groups, speaking
from course_lib.merging.averaging import refresh_batch_norm
from course_lib.merging.states import batch_norms, check_alike, check_share, doubled, home, in_evaluation


@torch.no_grad()
def repair(
    merged: nn.Module,
    a: nn.Module,
    b: nn.Module,
    split: Split,
    *,
    t: float = 0.5,
    batch_size: int = 256,
    example_input: Inputs | None = None,
) -> nn.Module:
    r"""Return ``merged`` with each unit's output rescaled, its mean and standard deviation being

    .. math:: \mu=(1-t)\,\mu_a+t\,\mu_b,\qquad \sigma=(1-t)\,\sigma_a+t\,\sigma_b

    over a split, before the activation. ``b`` must be aligned already. Layer by layer from the input on, one pass each,
    so that every layer sees what the repaired ones before it say. The factors go into weights and biases; a layer
    without a bias gets one. Where a group of units has batch norm, that rescales, and its statistics are taken anew.
    The last layer, and layers whose units cannot change places, stay.

    Raises
    ------
    ValueError : the networks are of different shapes, or ``t`` is not in [0, 1].
    CannotShrink : see ``permutation_groups``.
    """
    made, first, second = check_alike([opened(merged), opened(a), opened(b)], ["merged", "a", "b"])
    check_share(t=t)
    groups = permutation_groups(merged, example_input)
    refresh = partial(refresh_batch_norm, split=split, batch_size=batch_size)
    if batch_norms(made):
        refresh(made)
    parts = dict(made.named_modules())
    names = {name for group in groups for name in speaking(made, group) if not isinstance(parts[name], BATCH_NORMS)}
    layers = _as_they_run(made, names, example_of(merged, example_input))
    goals = [unit_statistics(model, layers, split, batch_size=batch_size) for model in (first, second)]
    for name in layers:
        mean, spread = unit_statistics(made, [name], split, batch_size=batch_size)[name]
        wanted_mean, wanted_spread = (
            (1 - t) * here + t * there for here, there in zip(goals[0][name], goals[1][name], strict=True)
        )
        rescale(parts[name], mean, torch.where(spread > 0, wanted_spread / spread, 1), wanted_mean)
        if batch_norms(made):  # those behind this layer now see something else
            refresh(made)
    return made


@torch.no_grad()
def rescale(layer: nn.Module, mean: Tensor, factor: Tensor, wanted: Tensor) -> None:
    r"""Let a layer's outputs z, ``[…, C]`` of this mean, become :math:`(z-\mu)\,s+\mu^*`, in place."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    own: Tensor | None = layer.bias  # type: ignore[assignment]
    bias = mean.new_zeros(len(mean)) if own is None else doubled(own)
    new = ((bias - mean) * factor + wanted).to(weight.dtype)
    weight.mul_(factor.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1)))
    if own is None:
        layer.bias = nn.Parameter(new, weight.requires_grad)
    else:
        own.copy_(new)


def unit_statistics(
    model: nn.Module, layers: Sequence[str], split: Split, *, batch_size: int = 256
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation of each channel of the layers' outputs, float64 ``[C]`` each, by layer.

    In evaluation mode, over examples and places.

    Raises
    ------
    ValueError : ``batch_size`` is below 1, or the split is empty.
    """
    at_least(1, batch_size=batch_size)
    require("split", split, lambda s: len(s) > 0, "a split with examples")
    sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in layers}
    where = home(model)
    with in_evaluation(model), torch.no_grad():
        for x, _ in batches(split.to(where.device), batch_size, dtype=where.dtype):
            for name, rows in outputs(model, [*layers], x).items():
                wide = doubled(rows)
                for place, more in enumerate((len(wide), wide.sum(0), wide.square().sum(0))):
                    sums[name][place] = sums[name][place] + more
    found = {}
    for name, (count, total, squares) in sums.items():
        mean, square = total / count, squares / count
        variance = square - mean.square()
        # what rounding leaves of a constant is no spread
        found[name] = mean, torch.where(variance > 1e-12 * square, variance, 0).clamp_min(0).sqrt()
    return found


def _as_they_run(model: nn.Module, names: set[str], example: Inputs) -> list[str]:
    """The named layers in the order in which the network calls them."""
    order: list[str] = []

    def note(name: str, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        if name not in order:
            order.append(name)

    hooks = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in sorted(names)]
    try:
        with in_evaluation(model):
            model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
    return order
