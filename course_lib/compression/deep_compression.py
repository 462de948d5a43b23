r"""Deep Compression: prune, train on, share, train on, code (Han et al. 2015, arXiv:1510.00149).

===================  ================================================================================================
``compress``         the whole chain: from a trained network to the bytes of a file
``prune_and_share``  all of it but the coding: a network whose weights are few, and of few values
``CompressedFile``   the bytes; what each layer takes (``table``); the network again (``network``)
``read``             a file into a network, bit for bit what was written
===================  ================================================================================================

What a file holds is said by ``pack_file`` of ``coding.py``: the format is ``craft-dc``, version 1, and its header a
list with one entry a tensor of the state dict, in its order:

=============  ======================================================================================================
``name``       as in the state dict of the ordinary network
``dtype``      type of the numbers, such as ``float32``
``shape``      of the tensor
``kind``       ``raw`` (biases, norms, buffers): one section, the numbers as they are;
               ``dense``: two sections, codebook and codes; ``sparse``: three, codebook, codes and steps
``entries``    how many codes there are: all weights, or those that are not 0 and the fillers between them
``lengths``    the Huffman code of the codes: 0 for a weight of 0 or a filler, k for the codebook's k-th value
``steps``      the Huffman code of the steps from position to position, minus 1 (``sparse`` alone)
``step_bits``  a step is at most ``2 ** step_bits`` (``sparse`` alone)
=============  ======================================================================================================
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from course_lib.compression.coding import (
    HuffmanCode,
    Symbols,
    absolute_index,
    dtype_name,
    entropy,
    pack_file,
    relative_index,
    tensor_bytes,
    tensor_from,
    unpack_file,
)
from course_lib.compression.sharing import Init, Shared, looked_up, share_model, shared_layers, unshare
from course_lib.lab.arguments import require
from course_lib.lab.data import Dataset
from course_lib.lab.files import replaced
from course_lib.lab.training import Recipe, fit
from course_lib.pruning.criteria import Criterion, magnitude
from course_lib.pruning.patterns import global_unstructured
from course_lib.pruning.schedules import Pattern, one_shot

FORMAT, VERSION = "craft-dc", 1

# --- The chain --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeepCompression:
    """How ``compress`` goes about it.

    Attributes
    ----------
    sparsity : the share of weights to prune; 0 prunes none.
    clusters : values a layer, or those of each layer by name.
    after_pruning, after_sharing : how the network trains on after each of the two; not at all without a recipe.
    init : where the values start (``share``).
    step_bits : a step from weight to weight is at most ``2 ** step_bits``; longer ones need fillers.
    dtype : the type of the numbers in the file: codebooks, biases, norms.
    criterion, pattern : what is pruned (``course_lib.pruning``).
    """

    sparsity: float = 0.9
    clusters: int | Mapping[str, int] = 16
    after_pruning: Recipe | None = None
    after_sharing: Recipe | None = None
    init: Init = "linear"
    step_bits: int = 4
    dtype: torch.dtype = torch.float32
    criterion: Criterion = magnitude
    pattern: Pattern = field(default=global_unstructured)


def compress(
    model: nn.Module, data: Dataset, settings: DeepCompression, *, seed: int = 0
) -> CompressedFile:  # fmt: skip
    """Return the file of a network that was pruned, trained on, shared, trained on and coded; ``model`` stays.

    Raises
    ------
    ValueError : as ``share_model``, ``one_shot`` and ``relative_index``.
    """
    small = prune_and_share(model, data, settings, seed=seed)
    return encode_model(small, settings.step_bits)


def prune_and_share(
    model: nn.Module, data: Dataset, settings: DeepCompression, *, seed: int = 0
) -> nn.Module:  # fmt: skip
    """Return a copy of the network whose weights are few and share their values, trained as the settings say.

    ``random`` values and the batches are drawn by ``seed``.
    """
    small = copy.deepcopy(model)
    if settings.sparsity:
        how = {"criterion": settings.criterion, "pattern": settings.pattern}
        one_shot(small, data.train, sparsity=settings.sparsity, **how)  # type: ignore[arg-type]
    if settings.after_pruning:
        fit(small, data, settings.after_pruning, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    share_model(small, settings.clusters, init=settings.init, generator=generator)
    if settings.after_sharing:
        fit(small, data, settings.after_sharing, seed=seed)
    return small.to(settings.dtype)


def encode_model(model: nn.Module, step_bits: int = 4) -> CompressedFile:
    """Return the file of a network: shared layers coded, all other tensors as they are.

    Each layer is stored as the codes of all its weights, or as those that are not 0 with the steps between them,
    whichever is smaller.

    Raises
    ------
    ValueError : ``step_bits`` is not 1 to 16.
    """
    require("step_bits", step_bits, lambda b: b in range(1, 17), "a whole number from 1 to 16")
    shared = {f"{name}.weight" if name else "weight": value for name, value in shared_layers(model).items()}
    header, sections = [], []
    for name, tensor in unshare(copy.deepcopy(model)).state_dict().items():
        entry, parts = _coded(shared[name], step_bits) if name in shared else ({"kind": "raw"}, [tensor_bytes(tensor)])
        header.append({"name": name, "dtype": dtype_name(tensor), "shape": [*tensor.shape], **entry})
        sections += parts
    return CompressedFile(pack_file(FORMAT, VERSION, header, sections))


def _coded(shared: Shared, step_bits: int) -> tuple[dict[str, Any], list[bytes]]:
    codes = shared.codes.flatten().cpu().numpy()
    ways = [_dense(codes)] + ([_sparse(codes, step_bits)] if (codes != 0).any() else [])
    entry, sections = min(ways, key=lambda way: sum(map(len, way[1])))
    return entry, [tensor_bytes(shared.codebook), *sections]


def _dense(codes: Symbols) -> tuple[dict[str, Any], list[bytes]]:
    """Header and sections of a layer all of whose codes are stored."""
    code = HuffmanCode.from_counts(np.bincount(codes))
    return {"kind": "dense", "entries": len(codes), "lengths": code.lengths}, [code.encode(codes)]


def _sparse(codes: Symbols, step_bits: int) -> tuple[dict[str, Any], list[bytes]]:
    """Header and sections of a layer of which the codes that are not 0 are stored, and where they stand."""
    steps, filler = relative_index(codes.nonzero()[0], step_bits)
    entries = np.zeros(len(steps), dtype=np.int64)
    entries[~filler] = codes[codes != 0]
    of_codes, of_steps = (HuffmanCode.from_counts(np.bincount(part)) for part in (entries, steps))
    header = {"kind": "sparse", "entries": len(steps), "lengths": of_codes.lengths, "steps": of_steps.lengths}
    return header | {"step_bits": step_bits}, [of_codes.encode(entries), of_steps.encode(steps)]


# --- The file ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressedFile:
    """A compressed network as the bytes of a file.

    Attributes
    ----------
    data : the file, from its first byte to its last.
    """

    data: bytes

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.data)

    def write(self, path: str | Path) -> None:
        """Write the file, in one step: it is whole at every moment."""
        with replaced(path) as file:
            file.write(self.data)

    def network(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Return the network: ``build`` makes one of the same architecture, and gets the file's numbers and types.

        Raises
        ------
        ValueError : the file is of something else, damaged, or of another architecture.
        """
        state = {part.name: part.tensor() for part in self._parts()}
        model = build()
        wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
        found = {name: list(value.shape) for name, value in state.items()}
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"build() makes {name!r} of shape {wanted.get(name)}, the file holds {found.get(name)}: must be "
                    "the architecture that was compressed"
                )
        where = next((value.device for value in model.state_dict().values()), torch.device("cpu"))
        model.load_state_dict(state, assign=True)  # assigned, since copying would round to the types of build()
        return model.to(where)

    def table(self) -> pd.DataFrame:
        """Return the bytes of each tensor, a row a tensor, with rows for the ``header`` and the ``total``.

        ``weights`` and those ``kept``, not 0; bytes ``dense`` (4 a weight), ``fixed`` (pruned and shared: codebook,
        and codes and steps of fixed length), ``huffman`` (what is in the file), ``entropy`` (the codebook, and the
        least that any code of single codes and steps could reach); and of ``huffman`` the parts ``codebook``,
        ``codes`` and ``steps``.
        """
        parts = self._parts()
        frame = pd.DataFrame([part.row() for part in parts], index=[part.name for part in parts])
        rest = self.size - int(frame["huffman"].sum())
        frame.loc["header"] = dict.fromkeys(frame.columns, 0) | dict.fromkeys(("fixed", "huffman", "entropy"), rest)
        frame.loc["total"] = frame.sum()
        return frame

    def _parts(self) -> list[_Part]:
        header, sections = unpack_file(FORMAT, VERSION, self.data)
        found, rest = [], iter(sections)
        for entry in header:
            own = [next(rest) for _ in range({"raw": 1, "dense": 2, "sparse": 3}[entry["kind"]])]
            found.append(_Part(entry, own))
        return found


def read(path: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network of a file that ``CompressedFile.write`` wrote.

    Raises
    ------
    ValueError : as ``CompressedFile.network``; the message names the file.
    """
    try:
        return CompressedFile(Path(path).read_bytes()).network(build)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Part:
    """One tensor of a file: its entry in the header, and its sections."""

    entry: Mapping[str, Any]
    sections: list[bytes]

    @property
    def name(self) -> str:
        return self.entry["name"]

    def tensor(self) -> Tensor:
        dtype, shape = self.entry["dtype"], self.entry["shape"]
        if self.entry["kind"] == "raw":
            return tensor_from(self.sections[0], dtype, shape)
        codes = self._symbols()[0]
        if self.entry["kind"] == "sparse":
            steps = self._symbols()[1]
            spread = np.zeros(math.prod(shape), dtype=np.int64)
            spread[absolute_index(steps, codes == 0)] = codes[codes != 0]
            codes = spread
        codebook = tensor_from(self.sections[0], dtype, [-1])
        return looked_up(codebook, torch.from_numpy(codes).view(shape))

    def _symbols(self) -> list[Symbols]:
        """Codes, and steps where there are."""
        lengths = [self.entry[key] for key in ("lengths", "steps") if key in self.entry]
        streams = zip(lengths, self.sections[1:], strict=True)
        return [HuffmanCode(tuple(each)).decode(data, self.entry["entries"]) for each, data in streams]

    def row(self) -> dict[str, float]:
        size, weights = sum(map(len, self.sections)), math.prod(self.entry["shape"])
        if self.entry["kind"] == "raw":
            same = dict.fromkeys(("fixed", "huffman", "entropy"), size)
            return {"weights": weights, "kept": weights, "dense": size, **same, "codebook": 0, "codes": 0, "steps": 0}
        symbols, entries = self._symbols(), self.entry["entries"]
        codebook, codes, *steps = map(len, self.sections)
        values = len(tensor_from(self.sections[0], self.entry["dtype"], [-1])) + bool((symbols[0] == 0).any())
        bits = math.ceil(math.log2(max(2, values))) + self.entry.get("step_bits", 0)
        return {
            "weights": weights,
            "kept": int((symbols[0] != 0).sum()),
            "dense": 4 * weights,
            "fixed": codebook + math.ceil(entries * bits / 8),
            "huffman": size,
            "entropy": codebook + entries * sum(entropy(np.bincount(each)) for each in symbols) / 8,
            "codebook": codebook,
            "codes": codes,
            "steps": sum(steps),
        }
