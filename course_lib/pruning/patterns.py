"""Patterns: which weights may go together. Each turns scores into masks and prunes what has the lowest scores.

========================  =======================================================  =====================================
``global_unstructured``   single weights, compared across the whole network        Han et al. 2015, arXiv:1506.02626,
                                                                                   compares within layers; across them:
                                                                                   Lee et al. 2018, arXiv:1810.02340
``layer_unstructured``    single weights, compared within their layer              Han et al. 2015, arXiv:1506.02626
``per_row``               single weights, compared within their output             Sun et al. 2023, arXiv:2306.11695
``n_of_m``                n of every m neighbours along the inputs stay (2:4)      Mishra et al. 2021, arXiv:2104.08378
``blocks``                rectangles of the weight matrix                          Narang et al. 2017, arXiv:1711.02782
``filters``               whole outputs: filters of a convolution, neurons         Li et al. 2016, arXiv:1608.08710
``channels``              whole inputs                                             He et al. 2017, arXiv:1707.06168
``layers``                whole layers, or whole blocks of them                    Men et al. 2024, arXiv:2403.03853
========================  =======================================================  =====================================

``round(sparsity * n)`` of the ``n`` candidates go, as in ``torch.nn.utils.prune``. ``layer_density`` shows what is
left of each layer; ``collapsed`` and ``bottleneck`` name the layers through which nothing or least gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import pandas as pd
import torch
from torch import Tensor

from course_lib.pruning.masks import Masks

Scores = dict[str, Tensor]
"""Layer name -> the importance of each weight, in the weight's shape; the lowest are pruned first."""

Combine = Callable[[Tensor], Tensor]
"""The scores of units ``[units, weights of each]`` -> one score a unit ``[units]``."""


def total(scores: Tensor) -> Tensor:
    """Add up the scores of each unit: the L1 norm, where the scores are magnitudes. ``[U, W] -> [U]``."""
    return _of_what_is_left(scores, lambda left: left.sum(1))


def euclidean(scores: Tensor) -> Tensor:
    """Take the root of the sum of squares: the L2 norm, where the scores are magnitudes. ``[U, W] -> [U]``."""
    return _of_what_is_left(scores, lambda left: left.square().sum(1).sqrt())


def _of_what_is_left(scores: Tensor, combine: Combine) -> Tensor:
    """Weights pruned earlier score minus infinity: they add nothing, and a unit of such weights alone is the last."""
    gone = scores.isneginf()
    return combine(scores.masked_fill(gone, 0)).masked_fill(gone.all(1), -torch.inf)


# --- Single weights ---------------------------------------------------------------------------------------------------


def without_smallest(scores: Tensor, count: int) -> Tensor:
    """Return a mask in the shape of ``scores`` that is False at the ``count`` smallest of them."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    # topk picks among equals in the same way as it does for torch.nn.utils.prune
    mask.view(-1)[torch.topk(scores.flatten(), count, largest=False).indices] = False
    return mask


def global_unstructured(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Prune the lowest scores of the whole network: some layers lose more than others, and may lose everything."""
    _check(scores, sparsity)
    everything = torch.cat([score.flatten() for score in scores.values()])
    mask = without_smallest(everything, round(sparsity * len(everything)))
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def layer_unstructured(scores: Mapping[str, Tensor], sparsity: float | Mapping[str, float]) -> Masks:
    """Prune the lowest scores of each layer: the same fraction of all, or what ``sparsity`` says for each by name."""
    each = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(scores, sparsity)
    if set(each) != set(scores):
        raise ValueError(f"sparsity names the layers {sorted(each)}: must name those of scores, {sorted(scores)}")
    _check(scores, *each.values())
    return {name: without_smallest(score, round(each[name] * score.numel())) for name, score in scores.items()}


def per_row(scores: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Prune the lowest scores of each output: every row of a weight matrix keeps the same number of weights."""
    _check(scores, sparsity)

    def mask(score: Tensor) -> Tensor:
        rows = score.flatten(1)  # [outputs, inputs]
        return torch.stack([without_smallest(row, round(sparsity * len(row))) for row in rows]).view(score.shape)

    return {name: mask(score) for name, score in scores.items()}


# --- Patterns that hardware likes -------------------------------------------------------------------------------------


def n_of_m(scores: Mapping[str, Tensor], n: int = 2, m: int = 4) -> Masks:
    """Keep the ``n`` highest of every ``m`` neighbouring weights along the inputs (dimension 1).

    A GPU with sparse tensor cores multiplies a linear layer in the pattern 2:4 at up to twice the rate.

    Raises
    ------
    ValueError : a layer's number of inputs is not a multiple of ``m``, or not ``0 < n < m``.
    """
    if not 0 < n < m:
        raise ValueError(f"n={n}, m={m}: must satisfy 0 < n < m")
    _check(scores)
    for name, score in scores.items():
        if score.shape[1] % m:
            raise ValueError(
                f"m={m} does not divide the {score.shape[1]} inputs of the layer {name!r}, whose weight has the shape "
                f"{tuple(score.shape)}: leave the layer out (layers=), or choose another m"
            )

    def mask(score: Tensor) -> Tensor:
        groups = score.movedim(1, -1).unflatten(-1, (-1, m))  # [outputs, ..., inputs / m, m]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(n, dim=-1).indices, True)
        return kept.flatten(-2).movedim(-1, 1)

    return {name: mask(score) for name, score in scores.items()}


def blocks(
    scores: Mapping[str, Tensor], sparsity: float, block: tuple[int, int] = (4, 4), combine: Combine = total
) -> Masks:
    """Prune whole blocks of each weight matrix ``[outputs, inputs]``: those with the lowest total within their layer.

    A convolution's matrix is ``[outputs, inputs * kernel height * kernel width]``.

    Raises
    ------
    ValueError : the blocks do not tile a layer's matrix.
    """
    _check(scores, sparsity)
    high, wide = block
    if high < 1 or wide < 1:
        raise ValueError(f"block={block}: must be two positive numbers, (outputs, inputs)")
    for name, score in scores.items():
        rows, columns = score.flatten(1).shape
        if rows % high or columns % wide:
            raise ValueError(
                f"block={block} does not tile the {rows}x{columns} matrix of the layer {name!r}, whose weight has the "
                f"shape {tuple(score.shape)}: leave the layer out (layers=), or choose another block"
            )

    def mask(score: Tensor) -> Tensor:
        tiles = score.flatten(1).unflatten(0, (-1, high)).unflatten(2, (-1, wide)).transpose(1, 2)
        units = combine(tiles.flatten(2).flatten(0, 1))  # [blocks down, blocks across, high, wide] -> [blocks]
        kept = without_smallest(units, round(sparsity * len(units))).view(tiles.shape[:2])
        return kept.repeat_interleave(high, 0).repeat_interleave(wide, 1).view(score.shape)

    return {name: mask(score) for name, score in scores.items()}


# --- Whole units ------------------------------------------------------------------------------------------------------


def filters(scores: Mapping[str, Tensor], sparsity: float, combine: Combine = total) -> Masks:
    """Prune whole outputs of each layer: filters of a convolution, neurons of a linear layer (dimension 0)."""
    return _units(scores, sparsity, combine, dim=0)


def channels(scores: Mapping[str, Tensor], sparsity: float, combine: Combine = total) -> Masks:
    """Prune whole inputs of each layer (dimension 1; in a grouped convolution that is one input of every group)."""
    return _units(scores, sparsity, combine, dim=1)


def _units(scores: Mapping[str, Tensor], sparsity: float, combine: Combine, dim: int) -> Masks:
    _check(scores, sparsity)

    def mask(score: Tensor) -> Tensor:
        units = combine(score.transpose(0, dim).flatten(1))
        kept = torch.zeros_like(units, dtype=torch.bool)
        kept[torch.topk(units, len(units) - round(sparsity * len(units))).indices] = True
        shape = [len(units) if d == dim else 1 for d in range(score.ndim)]
        return kept.view(shape).expand(score.shape).clone()

    return {name: mask(score) for name, score in scores.items()}


def layers(scores: Mapping[str, Tensor], sparsity: float, blocks: Iterable[str] | None = None) -> Masks:
    """Prune whole layers: the ``round(sparsity * number)`` layers whose weights have the lowest mean score.

    Parameters
    ----------
    blocks : names of modules, such as ``["stages.0.1", "stages.1.1"]``: then all layers inside one of them stay or go
        together, and layers outside of them stay. In a residual network a block whose last layer is gone passes its
        input on. A shortcut that has weights of its own should not be among the scores.

    Raises
    ------
    ValueError : a block holds no layer of ``scores``.
    """
    _check(scores, sparsity)
    groups = {name: [name] for name in scores}
    if blocks is not None:
        groups = {block: [name for name in scores if f"{name}.".startswith(f"{block}.")] for block in blocks}
    for block, members in groups.items():
        if not members:
            raise ValueError(f"blocks names {block!r}, in which no layer lies: must hold one of {', '.join(scores)}")
    together = [torch.cat([scores[name].flatten() for name in members]) for members in groups.values()]
    means = torch.cat([total(score[None]) / len(score) for score in together])
    kept = without_smallest(means, round(sparsity * len(means))).tolist()
    gone = {name for members, keep in zip(groups.values(), kept, strict=True) if not keep for name in members}
    return {name: torch.full_like(score, name not in gone, dtype=torch.bool) for name, score in scores.items()}


# --- What is left -----------------------------------------------------------------------------------------------------


def layer_density(masks: Mapping[str, Tensor]) -> pd.DataFrame:
    """Return a row a layer: ``weights``, how many are ``kept``, their fraction (``density``), and the fractions of
    ``outputs`` and ``inputs`` that still have a weight.
    """
    _check(masks)
    rows = {}
    for name, mask in masks.items():
        mask = mask.bool()
        rows[name] = {
            "weights": mask.numel(),
            "kept": int(mask.sum()),
            "density": float(mask.double().mean()),
            "outputs": float(mask.flatten(1).any(1).double().mean()),
            "inputs": float(mask.transpose(0, 1).flatten(1).any(1).double().mean()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def collapsed(masks: Mapping[str, Tensor], at_most: float = 0.0) -> list[str]:
    """Return the layers of which at most this fraction is left: by default, those that let nothing through.

    A network with such a layer cannot learn, however many weights it has elsewhere (layer collapse; Tanaka et al.
    2020, arXiv:2006.05467).
    """
    density = layer_density(masks)["density"]
    return [str(name) for name in density.index[density <= at_most]]


def bottleneck(masks: Mapping[str, Tensor]) -> str:
    """Return the layer of which the smallest fraction is left."""
    return str(layer_density(masks)["density"].idxmin())


# --- Checks at the door -----------------------------------------------------------------------------------------------


def checked_sparsity(sparsity: float) -> float:
    """Return a sparsity that lies in [0, 1)."""
    if not (isinstance(sparsity, (int, float)) and 0 <= sparsity < 1 and math.isfinite(sparsity)):
        raise ValueError(f"sparsity={sparsity!r}: must be at least 0 and less than 1")
    return sparsity


def _check(scores: Mapping[str, Tensor], *sparsities: float) -> None:
    for sparsity in sparsities:
        checked_sparsity(sparsity)
    if not scores:
        raise ValueError("scores holds no layer: must hold at least one")
    for name, score in scores.items():
        if score.ndim < 2:
            raise ValueError(f"scores[{name!r}] has the shape {tuple(score.shape)}: must be that of a weight")
        if bool(score.isnan().any()):
            raise ValueError(f"scores[{name!r}] holds NaN: must be comparable numbers")
