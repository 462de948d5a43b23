"""Huffman codes against all prefix codes, ANS against the entropy, positions, and files that tell when damaged."""

from __future__ import annotations

import itertools
import lzma
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from course_lib.compression.coding import (
    AnsCode,
    HuffmanCode,
    Symbols,
    absolute_index,
    canonical_words,
    dtype_name,
    entropy,
    huffman_lengths,
    pack_file,
    quantised_frequencies,
    relative_index,
    tensor_bytes,
    tensor_from,
    unpack_file,
)


def drawn(shares: Any, count: int, seed: int = 0) -> Symbols:
    shares = np.asarray(shares, dtype=float)
    return np.random.default_rng(seed).choice(len(shares), count, p=shares / shares.sum())


def some_counts(seed: int, symbols: int) -> Any:
    random = np.random.default_rng(seed)
    return np.maximum(1, (random.exponential(1, symbols) ** 3 * 50)).astype(int)


# --- Entropy ----------------------------------------------------------------------------------------------------------


def test_entropy_in_bits() -> None:
    assert entropy([1, 1, 1, 1]) == 2
    assert entropy([2, 1, 1, 0]) == 1.5
    assert entropy([7]) == 0
    assert entropy(torch.tensor([1, 3])) == pytest.approx(-0.25 * np.log2(0.25) - 0.75 * np.log2(0.75))


# --- Huffman ----------------------------------------------------------------------------------------------------------


def least_length(counts: Any) -> int:
    """The total of the best lengths that Kraft's inequality lets a prefix code have, by trying all."""
    present = [int(count) for count in counts if count]
    tried = itertools.product(range(1, len(present)), repeat=len(present))
    return min(
        sum(c * n for c, n in zip(present, lengths, strict=True))
        for lengths in tried
        if sum(2.0**-n for n in lengths) <= 1
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_prefix_code_is_shorter(seed: int) -> None:
    counts = some_counts(seed, symbols=2 + seed % 5)
    assert HuffmanCode.from_counts(counts).bits(counts) == least_length(counts)


@pytest.mark.parametrize("seed", range(20))
def test_the_mean_length_is_within_a_bit_of_the_entropy(seed: int) -> None:
    counts = some_counts(seed, symbols=3 + 7 * seed)
    counts[seed % 3] = 0
    mean = HuffmanCode.from_counts(counts).bits(counts) / counts.sum()
    assert entropy(counts) <= mean < entropy(counts) + 1


def test_a_textbook_code() -> None:
    counts = [45, 13, 12, 16, 9, 5]  # a to f of Cormen, Leiserson, Rivest & Stein
    assert huffman_lengths(counts).tolist() == [1, 3, 3, 3, 4, 4]
    assert HuffmanCode.from_counts(counts).bits(counts) == 224
    words = canonical_words([1, 3, 3, 3, 4, 4])
    assert [f"{words[s]:0{n}b}" for s, n in enumerate([1, 3, 3, 3, 4, 4])] == ["0", "100", "101", "110", "1110", "1111"]
    assert HuffmanCode((1, 3, 3, 3, 4, 4)).encode(np.array([0, 1, 5])) == bytes([0b01001111])
    assert huffman_lengths([0, 3, 0]).tolist() == [0, 1, 0]
    assert huffman_lengths([0, 3, 1]).tolist() == [0, 1, 1]


@pytest.mark.parametrize("code", [HuffmanCode, AnsCode])
@pytest.mark.parametrize("symbols", [1, 2, 3, 17, 256])
def test_what_goes_in_comes_out(code: Any, symbols: int) -> None:
    counts = some_counts(symbols, symbols)
    stream = np.concatenate([np.arange(symbols), drawn(counts, 3000, seed=1)])
    made = code.from_counts(np.bincount(stream))
    assert np.array_equal(made.decode(made.encode(stream), len(stream)), stream)
    assert len(made.decode(made.encode(stream[:0]), 0)) == 0
    one = np.array([symbols - 1])
    assert np.array_equal(made.decode(made.encode(one), 1), one)


def test_words_of_very_different_lengths() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    code = HuffmanCode.from_counts(fibonacci)
    assert sorted(code.lengths) == [*range(1, 30), 29]
    stream = drawn(np.ones(30), 500)
    assert np.array_equal(code.decode(code.encode(stream), 500), stream)


def test_bytes_are_what_the_counts_say_and_a_code_is_its_lengths() -> None:
    stream = drawn([0.5, 0.3, 0.1, 0.06, 0.04], 20_000)
    counts = np.bincount(stream)
    code = HuffmanCode.from_counts(counts)
    data = code.encode(stream)
    assert len(data) == -(-code.bits(counts) // 8)
    again = HuffmanCode(tuple(int(n) for n in code.lengths))
    assert np.array_equal(again.decode(data, len(stream)), stream)


def test_many_symbols() -> None:
    stream = drawn(np.exp(-np.arange(32) / 3), 200_000)
    code = HuffmanCode.from_counts(np.bincount(stream))
    assert np.array_equal(code.decode(code.encode(stream), len(stream)), stream)


# --- Asymmetric numeral systems ---------------------------------------------------------------------------------------


def test_frequencies_sum_to_a_power_of_two_and_none_is_lost() -> None:
    assert quantised_frequencies([1, 1, 2], 4).tolist() == [4, 4, 8]
    assert quantised_frequencies([1, 10**6, 0], 4).tolist() == [1, 15, 0]
    for seed in range(10):
        counts = some_counts(seed, 60)
        found = quantised_frequencies(counts, 10)
        assert found.sum() == 1024
        assert found.min() >= 1
        assert np.abs(found - np.maximum(1, counts / counts.sum() * 1024)).max() < 12
    assert quantised_frequencies(np.ones(16, dtype=int), 4).tolist() == [1] * 16


def test_ans_reaches_the_entropy_where_huffman_cannot() -> None:
    stream = drawn([0.95, 0.03, 0.02], 40_000)
    counts = np.bincount(stream)
    least = entropy(counts) * len(stream) / 8
    huffman, ans = (code.from_counts(counts).encode(stream) for code in (HuffmanCode, AnsCode))
    assert least <= len(ans) < 1.01 * least + 4
    assert len(huffman) > 2.5 * least
    raw = stream.astype(np.uint8).tobytes()
    assert len(ans) < min(len(zlib.compress(raw, 9)), len(lzma.compress(raw)))


def test_huffman_beats_the_general_compressors_on_independent_symbols() -> None:
    stream = drawn(np.exp(-np.arange(32) / 3), 40_000)
    raw = stream.astype(np.uint8).tobytes()
    data = HuffmanCode.from_counts(np.bincount(stream)).encode(stream)
    assert len(data) < 0.97 * min(len(zlib.compress(raw, 9)), len(lzma.compress(raw)))


def test_one_ans_step_by_hand() -> None:
    code = AnsCode((3, 1))
    assert code.precision == 2
    # x = 65536, f = 3, c = 0: 4 * 21845 + 1 + 0; then f = 1, c = 3: 4 * 87381 + 0 + 3
    assert code.encode(np.array([1, 0])) == (4 * (4 * 21845 + 1) + 3).to_bytes(4, "little")


# --- Positions --------------------------------------------------------------------------------------------------------


def test_the_papers_figure() -> None:
    """Han et al. 2015, figure 2: weights at 1, 4 and 15, steps of at most 8 = 2 ** 3."""
    steps, filler = relative_index(np.array([1, 4, 15]), 3)
    assert (steps + 1).tolist() == [2, 3, 8, 3]
    assert filler.tolist() == [False, False, True, False]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_positions_come_back(bits: int) -> None:
    for seed, density in enumerate([0.5, 0.05, 0.005]):
        positions = np.flatnonzero(np.random.default_rng(seed).random(3000) < density)
        steps, filler = relative_index(positions, bits)
        assert steps.min() >= 0
        assert steps.max() < 2**bits
        assert np.array_equal(absolute_index(steps, filler), positions)
        gaps = np.diff(positions, prepend=-1)
        assert filler.sum() == sum((gap - 1) // 2**bits for gap in gaps), "no more fillers than are needed"


def test_a_step_of_the_longest_length_needs_no_filler() -> None:
    assert relative_index(np.array([3, 7]), 2)[0].tolist() == [3, 3]
    assert relative_index(np.array([4]), 2)[0].tolist() == [3, 0]
    assert len(relative_index(np.array([], dtype=int), 4)[0]) == 0


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_and_tells_when_it_is_not_what_was_written() -> None:
    header, sections = [{"name": "a", "size": [2, 3]}, 7], [b"one", b"", b"three" * 9]
    data = pack_file("test", 3, header, sections)
    assert unpack_file("test", 3, data) == (header, sections)
    assert data[:8] == b"test\0\0\0\0"
    for place in range(10, len(data)):
        damaged = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        with pytest.raises(ValueError, match="data of the format 'test' is damaged: its checksum"):
            unpack_file("test", 3, damaged)
    for cut in (len(data) - 1, len(data) // 2, 19):
        with pytest.raises(ValueError, match="damaged"):
            unpack_file("test", 3, data[:cut])
    for foreign in (b"", b"test", b"PK\3\4" * 20, data[1:]):
        with pytest.raises(ValueError, match="data is no file of the format 'test': it begins with b"):
            unpack_file("test", 3, foreign)
    with pytest.raises(ValueError, match="data is of version 3 of the format 'test': must be of version 4"):
        unpack_file("test", 4, data)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_come_back_from_bytes(dtype: torch.dtype) -> None:
    for shape in [(), (0, 3), (2, 3, 4)]:
        tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        found = tensor_from(tensor_bytes(tensor), dtype_name(tensor), shape)
        assert found.dtype is dtype
        assert found.shape == shape
        assert torch.equal(found, tensor)
    turned = torch.arange(6.0).view(2, 3).mT
    assert torch.equal(tensor_from(tensor_bytes(turned), "float32", (3, 2)), turned)


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    code, ans = HuffmanCode.from_counts([3, 1, 0, 2]), AnsCode.from_counts([3, 1, 0, 2])
    data = code.encode(np.array([0, 1, 3] * 5))
    cases: list[tuple[str, Any]] = [
        ("counts=[0, 0]: must be whole numbers of at least 0, not all of them 0", lambda: entropy([0, 0])),
        ("counts=[1, -1]", lambda: huffman_lengths([1, -1])),
        ("counts=[0.5, 1.5]", lambda: huffman_lengths([0.5, 1.5])),
        ("lengths=(1, 1, 1): must be bits of a complete code", lambda: HuffmanCode((1, 1, 1))),
        ("lengths=(2, 2): must be", lambda: HuffmanCode((2, 2))),
        ("symbols holds 2, which never occurred", lambda: code.encode(np.array([0, 2]))),
        ("symbols holds 2, which never occurred", lambda: ans.encode(np.array([0, 2]))),
        ("symbols must be whole numbers from 0 to 3", lambda: code.encode(np.array([-1]))),
        ("symbols must be whole numbers from 0 to 3", lambda: ans.encode(np.array([4]))),
        ("ends before symbol 17", lambda: HuffmanCode((1, 1)).decode(b"ab", 17)),
        ("data of 4 bytes ends before symbol 100", lambda: code.decode(data[:4], 100)),
        ("data of 4 bytes are not those of 3 symbols", lambda: ans.decode(ans.encode(np.array([0, 1])), 3)),
        ("data of 3 bytes are not those of 3 symbols", lambda: ans.decode(b"abc", 3)),
        ("data of 6 bytes are not those of 1 symbols", lambda: ans.decode(ans.encode(np.array([0])) + b"ab", 1)),
        ("frequencies=(3, 2): must be whole numbers", lambda: AnsCode((3, 2))),
        ("precision=1: must be 16 or less, 2 ** it >= symbols", lambda: quantised_frequencies([1, 1, 1], 1)),
        ("bits=17: must be a whole number from 1 to 16", lambda: relative_index(np.array([1]), 17)),
        ("positions=", lambda: relative_index(np.array([3, 3]), 4)),
        ("count=-1: must be", lambda: code.decode(data, -1)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match="(?s).*") as caught:
            call()
        assert words in str(caught.value), str(caught.value)
