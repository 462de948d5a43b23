r"""Lossless coding: frequent symbols get few bits. What quantised and pruned weights are stored as.

====================  =======================================================  =====================================
name                  what it does                                             source
====================  =======================================================  =====================================
``entropy``           bits a symbol below which no code can go                 Shannon 1948, Bell System Tech. J. 27
``huffman_lengths``   bits of each symbol in the best code of whole bits       Huffman 1952, Proceedings of the IRE 40
``canonical_words``   the code words, from their lengths alone                 Schwartz & Kallick 1964, CACM 7
``HuffmanCode``       symbols to bytes and back                                Huffman 1952
``AnsCode``           the same with fractions of bits: a number that carries   Duda 2013, arXiv:1311.2540
                      all symbols (range variant, rANS)
``relative_index``    positions as steps of few bits, with fillers             Han et al. 2015, arXiv:1510.00149
``pack_file``         a file of sections with a checksum; and ``unpack_file``
====================  =======================================================  =====================================

Symbols are whole numbers from 0, in NumPy arrays. A code is made from the counts of the symbols and is needed to
decode, so it is stored too: a canonical Huffman code by one length a symbol.
"""

from __future__ import annotations

import heapq
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from course_lib.lab.arguments import at_least, require

Symbols = NDArray[np.integer[Any]]
"""Whole numbers from 0, one after the other ``[n]``."""


def entropy(counts: ArrayLike) -> float:
    r"""Return :math:`H=-\sum_s p_s\log_2 p_s` in bits a symbol, with :math:`p_s` the share of the counts.

    Raises
    ------
    ValueError : a count is negative, or all are 0.
    """
    found = checked_counts(counts)
    shares = found[found > 0] / found.sum()
    return float((shares * np.log2(1 / shares)).sum())


# --- Huffman ----------------------------------------------------------------------------------------------------------


def huffman_lengths(counts: ArrayLike) -> Symbols:
    """Return the bits of each symbol's word ``[S]``, 0 for a symbol that never occurs, 1 for the only one that does.

    The two rarest symbols become one, whose count is their sum, until one is left: each time a symbol is in such a
    union, its word grows by a bit.
    """
    found = checked_counts(counts)
    lengths = np.zeros(len(found), dtype=np.int64)
    heap = [(int(count), s, [s]) for s, count in enumerate(found) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)  # equal counts: the union with the least symbol first
    while len(heap) > 1:
        count, least, members = heapq.heappop(heap)
        other_count, other_least, others = heapq.heappop(heap)
        union = members + others
        lengths[union] += 1
        heapq.heappush(heap, (count + other_count, min(least, other_least), union))
    return lengths


def canonical_words(lengths: Sequence[int]) -> dict[int, int]:
    """Return the word of each symbol that has one, as a number; shorter words first, symbols of one length in order.

    Each word is the one before plus 1, with zeros added where the length grows: so lengths are all that is stored.
    """
    words, word, before = {}, 0, 0
    present = [symbol for symbol, length in enumerate(lengths) if length]
    for symbol in sorted(present, key=lambda symbol: lengths[symbol]):
        word <<= lengths[symbol] - before
        words[symbol] = word
        word, before = word + 1, lengths[symbol]
    return words


@dataclass(frozen=True)
class HuffmanCode:
    """A canonical Huffman code.

    Attributes
    ----------
    lengths : the bits of each symbol's word; 0 for a symbol without one.

    Raises
    ------
    ValueError : no code has these lengths, or it leaves words unused.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        present = [length for length in self.lengths if length]
        complete = sum(2.0**-length for length in present) == 1 or present == [1]
        allowed = "bits of a complete code, 0 to 62 a symbol"
        require("lengths", self.lengths, lambda ls: complete and all(0 <= x <= 62 for x in ls), allowed)

    @classmethod
    def from_counts(cls, counts: ArrayLike) -> HuffmanCode:
        """Make the best code for symbols that occur so often."""
        return cls(tuple(huffman_lengths(counts).tolist()))

    def bits(self, counts: ArrayLike) -> int:
        """Return the bits of symbols that occur so often, in this code."""
        return int((checked_counts(counts) * np.array(self.lengths)).sum())

    def encode(self, symbols: Symbols) -> bytes:
        """Return the words of the symbols one after the other, the last byte filled up with zeros.

        Raises
        ------
        ValueError : a symbol has no word.
        """
        lengths, words = checked_symbols(symbols, self._of_symbol)
        starts = lengths.cumsum() - lengths
        bits = np.zeros(lengths.sum(), dtype=np.uint8)
        for place in range(max(self.lengths)):  # the place-th bit of all words at once
            long = lengths > place
            bits[starts[long] + place] = words[long] >> (lengths[long] - 1 - place) & 1
        return np.packbits(bits).tobytes()

    def decode(self, data: bytes, count: int) -> Symbols:
        """Return the ``count`` symbols that were encoded.

        What word would begin at each bit is looked up for all bits at once; then one walks from word to word.

        Raises
        ------
        ValueError : the data end before.
        """
        at_least(0, count=count)
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
        symbols, lengths = self._word_at(bits)
        following: Any = np.arange(len(bits)) + lengths
        following = memoryview(following)  # faster than an array, entry by entry
        places, place = np.zeros(count, dtype=np.int64), 0
        try:
            for i in range(count):
                places[i] = place
                place = following[place]
        except IndexError:
            place = len(bits) + 1
        if place > len(bits):
            raise ValueError(
                f"data of {len(data)} bytes ends before symbol {count}: "
                "must hold as many as were encoded"
            )  # fmt: skip
        return symbols[places]

    def _word_at(self, bits: NDArray[np.uint8]) -> tuple[Symbols, Symbols]:
        """Return for each bit the symbol whose word begins there, and the word's length.

        Canonical words, filled up to one length with zeros, ascend: the word that begins a window is the last that is
        not above it.
        """
        longest = max(self.lengths)
        windows = np.zeros(len(bits), dtype=np.int64)
        padded = np.concatenate([bits, np.zeros(longest, dtype=np.uint8)])
        for place in range(longest):
            windows = windows << 1 | padded[place : place + len(bits)]
        words = canonical_words(self.lengths)
        order, lengths = np.array([*words]), np.array([self.lengths[symbol] for symbol in words])
        filled = np.array([*words.values()]) << (longest - lengths)
        which = np.searchsorted(filled, windows, side="right") - 1
        return order[which], lengths[which]

    @cached_property
    def _of_symbol(self) -> NDArray[np.int64]:
        """Length and word of each symbol, ``[2, S]``."""
        words = canonical_words(self.lengths)
        return np.array([self.lengths, [words.get(symbol, 0) for symbol in range(len(self.lengths))]])


# --- Asymmetric numeral systems ---------------------------------------------------------------------------------------

_LEAST = 1 << 16  # the state stays in [2^16, 2^32): 16 bits go out whenever it would grow beyond


def quantised_frequencies(counts: ArrayLike, precision: int = 12) -> Symbols:
    """Return frequencies ``[S]`` that sum to ``2 ** precision``, close to the counts' shares, none of a present one 0.

    Raises
    ------
    ValueError : more symbols occur than there are units to share out, or ``precision`` is not 1 to 16.
    """
    at_least(1, precision=precision)
    found, total = checked_counts(counts), 1 << precision
    require("precision", precision, lambda p: p <= 16 and total >= (found > 0).sum(), "16 or less, 2 ** it >= symbols")
    exact = found * (total / found.sum())
    frequencies = np.where(found > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
    while (lacking := total - frequencies.sum()) > 0:  # to those who are furthest below their share
        frequencies[np.argsort(frequencies - exact, kind="stable")[: min(lacking, (found > 0).sum())]] += 1
    while frequencies.sum() > total:  # from the one who is furthest above it, and has more than one
        frequencies[np.argmax(np.where(frequencies > 1, frequencies - exact, -np.inf))] -= 1
    return frequencies


@dataclass(frozen=True)
class AnsCode:
    r"""Asymmetric numeral systems, the range variant: all symbols become the digits of one number.

    A symbol of frequency :math:`f` out of :math:`2^n` multiplies the number by about :math:`2^n/f`, so that it adds
    :math:`\log_2(2^n/f)` bits: fractions of bits, where Huffman's code spends whole ones.

    .. math:: x \leftarrow 2^n\lfloor x/f_s\rfloor + (x \bmod f_s) + c_s

    where :math:`c_s` is the sum of the frequencies before :math:`s`. Decoding undoes it: the last symbol in is the
    first out, so encoding begins at the end.

    Attributes
    ----------
    frequencies : one a symbol, their sum a power of 2 up to ``2 ** 16``.

    Raises
    ------
    ValueError : the frequencies do not sum to that.
    """

    frequencies: tuple[int, ...]

    def __post_init__(self) -> None:
        total, least = sum(self.frequencies), min(self.frequencies, default=-1)
        allowed = "whole numbers of at least 0 whose sum is a power of 2, from 2 to 2 ** 16"
        fits = least >= 0 and 2 <= total <= 1 << 16 and total & (total - 1) == 0
        require("frequencies", self.frequencies, lambda _: fits, allowed)

    @classmethod
    def from_counts(cls, counts: ArrayLike, precision: int = 12) -> AnsCode:
        """Make the code for symbols that occur so often, with frequencies of ``precision`` bits."""
        return cls(tuple(quantised_frequencies(counts, precision).tolist()))

    @property
    def precision(self) -> int:
        """The bits of a frequency."""
        return sum(self.frequencies).bit_length() - 1

    def encode(self, symbols: Symbols) -> bytes:
        """Return the number's last digits, 4 bytes, and before them 2 bytes each time that it grew beyond them.

        Raises
        ------
        ValueError : a symbol has no frequency.
        """
        starts = np.cumsum([0, *self.frequencies[:-1]])
        table = np.array([self.frequencies, starts])
        frequency, start = checked_symbols(symbols, table)
        state, words, precision = _LEAST, [], self.precision
        for f, c in zip(frequency[::-1].tolist(), start[::-1].tolist(), strict=True):
            if state >= f << (32 - precision):
                words.append(state & 0xFFFF)
                state >>= 16
            state = (state // f << precision) + state % f + c
        return struct.pack(f"<I{len(words)}H", state, *reversed(words))

    def decode(self, data: bytes, count: int) -> Symbols:
        """Return the ``count`` symbols that were encoded.

        Raises
        ------
        ValueError : these are not the data of so many symbols.
        """
        at_least(0, count=count)
        whole = len(data) >= 4 and len(data) % 2 == 0
        state, *rest = struct.unpack(f"<I{len(data) // 2 - 2}H", data) if whole else (0,)
        words, precision, mask = iter(rest), self.precision, sum(self.frequencies) - 1
        which = np.repeat(np.arange(len(self.frequencies)), self.frequencies).tolist()
        starts = np.cumsum([0, *self.frequencies[:-1]]).tolist()
        symbols = []
        for _ in range(count):
            slot = state & mask
            symbol = which[slot]
            symbols.append(symbol)
            state = self.frequencies[symbol] * (state >> precision)
            state += slot - starts[symbol]
            if state < _LEAST:
                state = state << 16 | next(words, 0)
        if state != _LEAST or next(words, None) is not None:
            raise ValueError(
                f"data of {len(data)} bytes are not those of {count} symbols: must be what encode returned"
            )
        return np.array(symbols, dtype=np.int64)


# --- Positions --------------------------------------------------------------------------------------------------------


def relative_index(positions: Symbols, bits: int) -> tuple[Symbols, NDArray[np.bool_]]:
    """Return the steps between ascending positions as numbers of ``bits`` bits, and which of them are fillers.

    A step of s is stored as s - 1. One longer than ``2 ** bits`` is broken up: each filler goes ``2 ** bits`` ahead to
    a place where there is nothing, and is stored like a weight of value 0 (Han et al. 2015, figure 2).

    Raises
    ------
    ValueError : ``bits`` is not 1 to 16, or the positions do not ascend from 0 or later.
    """
    require("bits", bits, lambda b: b in range(1, 17), "a whole number from 1 to 16")
    steps = np.diff(np.asarray(positions, dtype=np.int64), prepend=-1)
    allowed = "ascending whole numbers of at least 0"
    require("positions", positions, lambda _: bool((steps > 0).all()), allowed)
    longest = 1 << bits
    fillers = (steps - 1) // longest
    ends = (fillers + 1).cumsum() - 1  # where the steps themselves stand
    found = np.full(int((fillers + 1).sum()), longest - 1)
    found[ends] = steps - 1 - fillers * longest
    filler = np.ones(len(found), dtype=bool)
    filler[ends] = False
    return found, filler


def absolute_index(steps: Symbols, filler: NDArray[np.bool_]) -> Symbols:
    """Return the positions: what ``relative_index`` was given."""
    return ((np.asarray(steps, dtype=np.int64) + 1).cumsum() - 1)[~filler]


# --- Files ------------------------------------------------------------------------------------------------------------

_HEAD = struct.Struct("<8sHII")  # format, version, CRC-32 of all that follows it, bytes of the header


def pack_file(kind: str, version: int, header: Any, sections: Sequence[bytes]) -> bytes:
    """Return the bytes of a file, little-endian: what it is, a checksum, a header and sections.

    =========  ==================================================================================================
    8 bytes    the name of the format, ASCII, filled up with zeros
    2 bytes    its version
    4 bytes    CRC-32 of all that follows
    4 bytes    the bytes of the header
    header     JSON, deflated: ``[sizes of the sections, header]``
    sections   one after the other
    =========  ==================================================================================================
    """
    text = json.dumps([[len(section) for section in sections], header], separators=(",", ":"))
    deflated = zlib.compress(text.encode(), 9)
    checksum = zlib.crc32(b"".join([struct.pack("<I", len(deflated)), deflated, *sections]))
    return b"".join([_HEAD.pack(kind.encode(), version, checksum, len(deflated)), deflated, *sections])


def unpack_file(kind: str, version: int, data: bytes) -> tuple[Any, list[bytes]]:
    """Return header and sections of the bytes that ``pack_file`` made.

    Raises
    ------
    ValueError : the bytes are of something else, of a later version, or damaged; the message says which.
    """
    if len(data) < _HEAD.size or data[:8] != kind.encode().ljust(8, b"\0"):
        raise ValueError(f"data is no file of the format {kind!r}: it begins with {data[:8]!r}")
    _, found, checksum, size = _HEAD.unpack(data[: _HEAD.size])
    if found != version:
        raise ValueError(f"data is of version {found} of the format {kind!r}: must be of version {version}")
    if zlib.crc32(data[_HEAD.size - 4 :]) != checksum:
        raise ValueError(f"data of the format {kind!r} is damaged: its checksum is not the stored one")
    sizes, header = json.loads(zlib.decompress(data[_HEAD.size : _HEAD.size + size]))
    ends = (np.cumsum([0, *sizes]) + _HEAD.size + size).tolist()
    return header, [data[a:b] for a, b in pairwise(ends)]


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the numbers of a tensor as they lie in memory, row after row."""
    return tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def tensor_from(data: bytes, dtype: str, shape: Sequence[int]) -> Tensor:
    """Return the tensor of which these are the bytes; ``dtype`` is a name such as ``"float32"``."""
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
    return flat.view(getattr(torch, dtype)).view(tuple(shape))


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's type, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


# --- Checks at the door -----------------------------------------------------------------------------------------------


def checked_counts(counts: ArrayLike) -> NDArray[np.int64]:
    """Return counts ``[S]`` as an array, if none is negative and not all are 0."""
    found = np.asarray(counts)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer) or (found < 0).any() or not found.any():
        raise ValueError(f"counts={counts!r}: must be whole numbers of at least 0, not all of them 0")
    return found.astype(np.int64)


def checked_symbols(symbols: Symbols, table: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the columns of a table ``[2, S]`` for the symbols, ``[2, n]``, if each has one that begins with no 0."""
    found = np.asarray(symbols)
    if found.size and (not np.issubdtype(found.dtype, np.integer) or found.min() < 0 or found.max() >= table.shape[1]):
        raise ValueError(f"symbols must be whole numbers from 0 to {table.shape[1] - 1}, those that were counted")
    columns = table[:, found.astype(np.int64)]
    if (columns[0] == 0).any():
        raise ValueError(f"symbols holds {found[columns[0] == 0][0]}, which never occurred in the counts")
    return columns
