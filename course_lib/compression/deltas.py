r"""Deltas: a fine-tuned network as what it differs by from its base, stored in few bits.

====================  ====================================================  ==========================================
name                  what it does                                          source
====================  ====================================================  ==========================================
``delta``             tuned weights minus base weights
``exact``             a difference as it is
``lowered``           the nearest of low rank                               Eckart & Young 1936, Psychometrika 1
``largest``           its largest entries alone
``signed``            its signs and one number, the mean of the sizes       Liu et al. 2024, arXiv:2402.10193 (BitDelta)
``compress_delta``    each matrix by one of these, all else exact
``restore``           base and delta: the tuned network again
``refit_scales``      better numbers beside the signs, by distillation      Liu et al. 2024
``delta_bytes``       the file of a delta; ``read_delta`` reads it
====================  ====================================================  ==========================================

Why the difference: fine-tuning moves weights little, so a coarse delta costs little, and one base serves many tunings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.compression.coding import (
    absolute_index,
    dtype_name,
    pack_file,
    relative_index,
    tensor_bytes,
    tensor_from,
    unpack_file,
)
from course_lib.compression.low_rank import low_rank
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Split, batches

FORMAT, VERSION = "craft-dl", 1

_STEP_BITS = 8  # a byte a step

# --- What a delta is stored as ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """A difference as it is.

    Attributes
    ----------
    values : in the shape of the tensor.
    """

    values: Tensor

    def dense(self) -> Tensor:
        """Return the difference."""
        return self.values

    def stored(self) -> dict[str, Tensor]:
        """Return what goes into a file."""
        return {"values": self.values}


@dataclass(frozen=True)
class LowRank:
    """A difference of low rank.

    Attributes
    ----------
    a, b : the factors ``[m, r]`` and ``[r, n]``.
    shape : of the tensor, ``[m, ...]``.
    """

    a: Tensor
    b: Tensor
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """Return the difference."""
        return (self.a @ self.b).view(self.shape)

    def stored(self) -> dict[str, Tensor]:
        """Return what goes into a file."""
        return {"a": self.a, "b": self.b}


@dataclass(frozen=True)
class Sparse:
    """A difference that is 0 nearly everywhere.

    Attributes
    ----------
    values : ``[k]``, 0 at fillers.
    steps : uint8 ``[k]``, the steps from place to place, minus 1 (``relative_index`` of 8 bits).
    shape : of the tensor.
    """

    values: Tensor
    steps: Tensor
    shape: tuple[int, ...]

    def dense(self) -> Tensor:
        """Return the difference."""
        filler = (self.values == 0).cpu().numpy()
        places = torch.from_numpy(absolute_index(self.steps.cpu().numpy(), filler)).to(self.values.device)
        whole = self.values.new_zeros(self.shape)
        whole.view(-1)[places] = self.values[self.values != 0]
        return whole

    def stored(self) -> dict[str, Tensor]:
        """Return what goes into a file."""
        return {"values": self.values, "steps": self.steps}


@dataclass(frozen=True)
class Signs:
    r"""A difference of one size: :math:`\alpha\,\text{sign}(\Delta)`, with a bit for each sign.

    Attributes
    ----------
    positive : bool, in the shape of the tensor.
    scale : :math:`\alpha`, a tensor ``[]``.
    """

    positive: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        """Return the difference."""
        return torch.where(self.positive, self.scale, -self.scale)

    def stored(self) -> dict[str, Tensor]:
        """Return what goes into a file: 8 signs a byte."""
        return {"positive": torch.from_numpy(np.packbits(self.positive.cpu().numpy())), "scale": self.scale}


Part = Exact | LowRank | Sparse | Signs
Delta = dict[str, Part]
"""By the name of the parameter or buffer, what it differs by from the base."""


def stored_bits(part: Part) -> int:
    """Return the bits that a part takes."""
    return sum(8 * tensor.numel() * tensor.element_size() for tensor in part.stored().values())


# --- Four ways --------------------------------------------------------------------------------------------------------


def exact(difference: Tensor) -> Exact:
    """Return a difference as it is."""
    return Exact(difference)


def lowered(difference: Tensor, rank: int) -> Part:
    """Return the nearest of that rank; as it is where that takes no fewer numbers."""
    matrix = difference.flatten(1)
    if rank * sum(matrix.shape) >= matrix.numel():
        return Exact(difference)
    return LowRank(*low_rank(matrix, rank), tuple(difference.shape))


def largest(difference: Tensor, keep: float) -> Sparse:
    """Return its largest entries, the share ``keep`` of them and at least one; a step takes a byte.

    Raises
    ------
    ValueError : ``keep`` does not lie above 0 and not above 1.
    """
    require("keep", keep, lambda k: is_number(k) and 0 < k <= 1, "a number above 0 and not above 1")
    flat = difference.flatten()
    places = flat.abs().topk(max(1, round(keep * len(flat)))).indices.sort().values
    places = places[flat[places] != 0]
    steps, filler = relative_index(places.cpu().numpy(), _STEP_BITS)
    values = flat.new_zeros(len(steps))
    values[torch.from_numpy(~filler).to(flat.device)] = flat[places]
    stored = torch.from_numpy(steps.astype(np.uint8)).to(flat.device)
    return Sparse(values, stored, tuple(difference.shape))


def signed(difference: Tensor) -> Signs:
    r"""Return the signs, and :math:`\alpha = \text{mean}\,|\Delta|`, the number with the least squared error.

    What is 0 counts as negative: there is no third sign in one bit.
    """
    return Signs(difference > 0, difference.abs().mean())


# --- Networks ---------------------------------------------------------------------------------------------------------


def delta(base: nn.Module, tuned: nn.Module) -> dict[str, Tensor]:
    """Return what the parameters and buffers of a network differ by from those of its base, by name, where that lies.

    Raises
    ------
    ValueError : the networks are of different shapes.
    """
    before, after = base.state_dict(), tuned.state_dict()
    for name in [*before, *after]:
        if name not in before or name not in after or before[name].shape != after[name].shape:
            raise ValueError(f"tuned differs from base in {name!r}: must be of one architecture")
    return {name: after[name].detach().to(before[name].device) - before[name].detach() for name in before}


def compress_delta(
    base: nn.Module, tuned: nn.Module, by: Callable[[Tensor], Part]
) -> Delta:  # fmt: skip
    """Return the difference with each matrix and kernel stored ``by`` a way, biases, norms and buffers exactly.

    ``by`` is ``signed``, or say ``partial(lowered, rank=4)`` or ``partial(largest, keep=0.05)``.
    """
    found = delta(base, tuned)
    return {name: by(value) if value.ndim > 1 else exact(value) for name, value in found.items()}


@torch.no_grad()
def restore(base: nn.Module, parts: Mapping[str, Part]) -> nn.Module:
    """Return a copy of the base with the differences added.

    Raises
    ------
    ValueError : a difference is of no tensor of the base, or does not fit it.
    """
    made = copy.deepcopy(base)
    before, state = base.state_dict(), made.state_dict()
    for name, part in parts.items():
        difference = part.dense()
        if name not in state or state[name].shape != difference.shape:
            raise ValueError(f"parts: {name!r} {list(difference.shape)} does not fit base: must be a delta from it")
        state[name].copy_(before[name] + difference.to(before[name]))  # not added to it: tied weights have two names
    return made


def bits_per_weight(parts: Mapping[str, Part]) -> float:
    """Return the bits that a number of the network takes, on average over all of them."""
    return sum(map(stored_bits, parts.values())) / sum(part.dense().numel() for part in parts.values())


def refit_scales(
    base: nn.Module,
    tuned: nn.Module,
    parts: Mapping[str, Part],
    split: Split,
    *,
    steps: int = 100,
    lr: float = 0.02,
    batch_size: int = 256,
) -> Delta:
    r"""Return the delta with better scales beside the signs: its logits come nearer to those of the tuned network.

    Adam on the mean squared distance of the logits, over one number a matrix (:math:`\log\alpha`, so that a rate fits
    all of them); the signs stay. The networks are in evaluation mode, and labels are not looked at.

    Raises
    ------
    ValueError : no part has signs, or ``steps`` is below 1.
    """
    at_least(1, steps=steps)
    signs = {n: part for n, part in parts.items() if isinstance(part, Signs)}
    require("parts", list(parts), lambda _: bool(signs), "a delta of which some part is signed")
    where, before = next(base.parameters()).device, base.state_dict()
    signs = {n: Signs(part.positive.to(where), part.scale.to(where)) for n, part in signs.items()}
    student, teacher = restore(base, parts).eval(), copy.deepcopy(tuned).to(where).eval()
    start = {name: before[name].detach() for name in signs}
    # a scale of 0, of a matrix that was not tuned, stays so: minus infinity gets no gradient
    logs = {n: part.scale.log().clone().requires_grad_() for n, part in signs.items()}
    optimizer = torch.optim.Adam(logs.values(), lr=lr)

    def scaled() -> dict[str, Signs]:
        return {n: replace(signs[n], scale=value.exp()) for n, value in logs.items()}

    for x in islice(_over_and_over(base, split, batch_size), steps):
        weights = {n: start[n] + part.dense() for n, part in scaled().items()}
        with torch.no_grad():
            wanted = teacher(x)
        loss = F.mse_loss(torch.func.functional_call(student, weights, (x,)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return {**parts, **scaled()}


def _over_and_over(base: nn.Module, split: Split, batch_size: int) -> Iterator[Tensor]:
    """Batches of inputs, on the device and in the type of the network, pass after pass."""
    like = next(base.parameters())
    while True:
        for x, _ in batches(split.to(like.device), batch_size, dtype=like.dtype):
            yield x


# --- Files ------------------------------------------------------------------------------------------------------------

_KINDS: dict[str, type[Part]] = {kind.__name__: kind for kind in (Exact, LowRank, Sparse, Signs)}


def delta_bytes(parts: Mapping[str, Part]) -> bytes:
    """Return the bytes of a file (``pack_file`` of ``coding.py``; the format is ``craft-dl``, version 1).

    Its header has an entry a tensor: ``name``, ``kind``, ``shape``, and name, type and shape of each of its sections.
    """
    header, sections = [], []
    for name, part in parts.items():
        stored = part.stored()
        fields = [[key, dtype_name(value), [*value.shape]] for key, value in stored.items()]
        header.append({"name": name, "kind": type(part).__name__, "shape": [*part.dense().shape], "fields": fields})
        sections += [tensor_bytes(value) for value in stored.values()]
    return pack_file(FORMAT, VERSION, header, sections)


def read_delta(data: bytes) -> Delta:
    """Return the delta of which these are the bytes.

    Raises
    ------
    ValueError : the bytes are of something else, or damaged.
    """
    header, sections = unpack_file(FORMAT, VERSION, data)
    found, rest = {}, iter(sections)
    for entry in header:
        fields: dict[str, Any] = {key: tensor_from(next(rest), *how) for key, *how in entry["fields"]}
        shape = tuple(entry["shape"])
        if entry["kind"] == "Signs":
            bits = np.unpackbits(fields["positive"].numpy(), count=int(np.prod(shape)))
            fields["positive"] = torch.from_numpy(bits.astype(bool)).view(shape)
        elif entry["kind"] != "Exact":
            fields["shape"] = shape
        found[entry["name"]] = _KINDS[entry["kind"]](**fields)
    return found
