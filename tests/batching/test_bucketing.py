"""Every sequence once, padding counted cell by cell, and torch's ``pad_sequence``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from course_lib.batching.bucketing import by_tokens, length_buckets, pad_batch, padding
from course_lib.batching.speed import throughput
from course_lib.lab.models import convnet, mlp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def lengths() -> Tensor:
    return torch.randint(1, 60, (503,), generator=generator()).square() // 40 + 1


@pytest.mark.parametrize("pool", [None, 16, 64, 503, 5000])
def test_each_sequence_is_in_one_batch_of_like_lengths(pool: int | None, lengths: Tensor) -> None:
    found = length_buckets(lengths, 16, generator(), pool=pool)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(503))
    sizes = sorted(len(batch) for batch in found)
    if pool in (None, 503, 5000):
        assert sizes == [7] + 31 * [16]
    ends = [(int(lengths[batch].min()), int(lengths[batch].max())) for batch in found]
    if pool in (None, 503, 5000):  # one pool: the batches cut the sorted lengths, so they overlap at ends alone
        ordered = sorted(ends)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(ordered))
        assert ends != ordered  # but come in random order
    again = length_buckets(lengths, 16, generator(), pool=pool)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    other = length_buckets(lengths, 16, generator(1), pool=pool)
    assert any(a.tolist() != b.tolist() for a, b in zip(found, other, strict=True))


def test_a_larger_pool_has_less_padding(lengths: Tensor) -> None:
    parts = [padding(lengths, length_buckets(lengths, 16, generator(), pool=pool)) for pool in (16, 64, 503)]
    assert parts[0] > 2 * parts[1] > 4 * parts[2]
    plain = padding(lengths, list(torch.randperm(503, generator=generator()).split(16)))
    assert parts[0] == pytest.approx(plain, abs=1e-12)  # a pool of one batch sorts nothing that matters


def test_a_batch_of_tokens_holds_what_fits_and_no_more(lengths: Tensor) -> None:
    for pool in (None, 100):
        found = by_tokens(lengths, 200, generator(), pool=pool)
        assert torch.equal(torch.cat(found).sort().values, torch.arange(503))
        cells = [len(batch) * int(lengths[batch].max()) for batch in found]
        assert max(cells) <= 200
        assert len({len(batch) for batch in found}) > 5
    # greedy: the next batch's shortest sequence would not have gone into the one before
    ordered = sorted(
        by_tokens(lengths, 200, generator()), key=lambda batch: (int(lengths[batch].min()), int(lengths[batch].max()))
    )
    for before, after in itertools.pairwise(ordered):
        assert (len(before) + 1) * int(lengths[after].min()) > 200
    assert padding(lengths, by_tokens(lengths, 200, generator())) < 0.1
    exact = by_tokens(torch.tensor([5, 5, 5, 5]), 10, generator())
    assert [len(batch) for batch in exact] == [2, 2]


def test_padding_is_the_part_of_empty_cells() -> None:
    lengths = torch.tensor([1, 4, 2, 2])
    batches = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    assert padding(lengths, batches) == pytest.approx(3 / 12)
    counted = [pad_batch([torch.ones(int(lengths[i])) for i in batch])[1] for batch in batches]
    empty, cells = sum(int((~mask).sum()) for mask in counted), sum(mask.numel() for mask in counted)
    assert padding(lengths, batches) == pytest.approx(empty / cells)
    assert padding(lengths, [torch.tensor([2, 3])]) == 0


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_padded_as_torch_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sequences = [
        torch.randint(1, 9, (length, *shape), generator=generator(length)).to(dtype) for length in (3, 1, 5, 2)
    ]
    tokens, mask = pad_batch(sequences, value=-7)
    torch.testing.assert_close(tokens, pad_sequence(sequences, batch_first=True, padding_value=-7), rtol=0, atol=0)
    assert mask.sum(1).tolist() == [3, 1, 5, 2]
    assert tokens.shape == (4, 5, *shape)
    for row, sequence in zip(tokens, sequences, strict=True):
        assert torch.equal(row[: len(sequence)], sequence)
        assert (row[len(sequence) :] == -7).all()
    assert torch.equal(mask, (tokens != -7).flatten(2).all(2) if shape else tokens != -7)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda n: length_buckets(n, 0, generator()), "size=0: must be"),
        (lambda n: length_buckets(n, 8, generator(), pool=7), "pool=7: must be a whole number of at least 8"),
        (lambda n: length_buckets(n.float(), 8, generator()), r"lengths is torch.float32 \[503\]: must be int64"),
        (lambda n: length_buckets(n * 0, 8, generator()), "lengths of at least 1"),
        (
            lambda n: by_tokens(n, int(n.max()) - 1, generator()),
            r"budget=\d+: must be at least \d+, the longest sequence",
        ),
        (lambda n: by_tokens(n, 0, generator()), "budget=0: must be"),
        (lambda n: padding(n, []), r"batches holds \[\] sequences"),
        (lambda n: padding(n, [n[:0]]), r"batches holds \[0\] sequences"),
        (lambda n: pad_batch([]), "sequences are of the kinds"),
        (lambda n: pad_batch([torch.ones(2), torch.ones(2, 2)]), "must be .* of one kind"),
    ],
)
def test_bad_arguments(call: Any, said: str, lengths: Tensor) -> None:
    with pytest.raises(ValueError, match=said):
        call(lengths)


# --- Throughput -------------------------------------------------------------------------------------------------------


def test_throughput_measures_every_size_in_turns_on_its_own_examples() -> None:
    model = convnet((1, 8, 8), 10, width=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    seen: list[int] = []

    def objective(model: Any, x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(y))
        return torch.nn.functional.cross_entropy(model(x), y)

    found = throughput(model, x, y, [2, 8, 32], objective=objective, rounds=3)
    assert list(found) == [2, 8, 32]
    assert all(0 < value < 1e9 for value in found.values())
    assert seen == [2, 8, 32, 2, 8, 32, 32, 8, 2, 2, 8, 32]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_throughput_is_examples_over_the_median_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from course_lib.batching import speed as module
    from course_lib.lab.timing import Timing

    seconds = iter([1.0, 4.0, 8.0, 3.0, 2.0, 100.0])  # sizes 2, 8 | 8, 2 | 2, 8
    monkeypatch.setattr(module, "measure", lambda fn, **_: Timing(next(seconds), 0, 0, 1))
    found = throughput(mlp((1, 8, 8), 10), torch.randn(8, 1, 8, 8), torch.arange(8), [2, 8], rounds=3)
    assert found == {2: 2 / 2.0, 8: 8 / 8.0}


@pytest.mark.parametrize(
    ("sizes", "said"),
    [([], r"sizes=\[\]: must hold"), ([0], "size=0: must be"), ([9], r"sizes=\[9\]: must be at most 8")],
)
def test_sizes_that_cannot_be_measured(sizes: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        throughput(mlp((1, 8, 8), 10), torch.randn(8, 1, 8, 8), torch.arange(8), sizes)
