"""Bytes counted by hand and by the profiler, predictions at sizes that were not measured, and searches that fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.batching import memory
from course_lib.batching.memory import MemoryModel, largest_batch, largest_batch_under, predicted_memory, saved_bytes
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.timing import peak_memory

MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "convnet": convnet, "resnet": resnet, "vit": vit}
ADAM = partial(torch.optim.Adam, lr=1e-3)


def batch(size: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 1, 16, 16, generator=generator).to(device)
    return x, (torch.arange(size) % 10).to(device)


def test_what_a_layer_saves_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(7, 6), torch.arange(7) % 3
    # the input; the hidden units after ReLU (saved twice, kept once); log-probabilities; labels; a total weight
    expected = 4 * (7 * 6 + 7 * 5 + 7 * 3) + 8 * 7 + 4
    assert saved_bytes(model, x, y) == expected
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_prediction_is_what_other_sizes_measure(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]((1, 16, 16), 10)
    x, y = batch(8)
    found = predicted_memory(model, x, y, ADAM)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert found.weights == 4 * parameters + buffers
    assert found.gradients == 4 * parameters
    # two moments, and a step for each tensor
    assert found.state == 8 * parameters + 4 * len(list(model.parameters()))
    for size in (1, 3, 32, 100):
        saved = saved_bytes(model, *batch(size))
        assert found(size) == found.weights + found.gradients + found.state + saved


@pytest.mark.parametrize("name", MODELS)
def test_the_real_peak_lies_a_little_above(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]((1, 16, 16), 10)
    found = predicted_memory(model, *batch(8), ADAM)
    x, y = batch(256)
    optimizer = ADAM(model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    step()
    optimizer.step()  # its state is there before
    optimizer.zero_grad(set_to_none=True)
    real = peak_memory(step, device="cpu").bytes
    # the profiler sees what the step makes: gradients and activations, without the batch itself
    made = found(256) - found.weights - found.state - 4 * x.numel() - 8 * y.numel()
    assert 0.8 * real < made < real


def test_the_largest_under_a_limit_and_not_one_more() -> None:
    found = predicted_memory(mlp((1, 16, 16), 10), *batch(8), ADAM)
    for limit in (found(1), found(1) + 1, found(2) - 1, found(57), found(1000) + 17, 10**9):
        size = largest_batch_under(limit, found)
        assert found(size) <= limit < found(size + 1)
    ragged = MemoryModel(1000, 1000, 0, 0.5, 10 / 3)
    for limit in range(2004, 2050):
        size = largest_batch_under(limit, ragged)
        assert ragged(size) <= limit < ragged(size + 1)
    with pytest.raises(ValueError, match=f"must be at least {found(1)}, what one example needs"):
        largest_batch_under(found(1) - 1, found)
    with pytest.raises(ValueError, match="must grow with the batch"):
        largest_batch_under(100, MemoryModel(1, 1, 1, 1.0, 0.0))


# --- By trying --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection of garbage takes long in a process of many tests."""
    monkeypatch.setattr(memory, "_free", lambda: None)


@pytest.mark.usefixtures("nothing_to_free")
@pytest.mark.parametrize("answer", [1, 2, 3, 7, 8, 9, 100, 1023, 1024, 1025])
def test_doubling_and_bisection_find_the_largest(answer: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= answer

    assert largest_batch(fits) == answer
    assert max(tried) <= 2 * answer
    assert len(tried) == len(set(tried)) <= 2 * answer.bit_length() + 1
    for high in (answer, answer + 1, 10 * answer):
        assert largest_batch(fits, high=high) == min(answer, high)
    assert largest_batch(fits, low=answer) == answer


@pytest.mark.usefixtures("nothing_to_free")
def test_searches_without_an_answer() -> None:
    with pytest.raises(ValueError, match="low=1: not even one example fits"):
        largest_batch(lambda size: False)
    with pytest.raises(ValueError, match="low=4: does not fit"):
        largest_batch(lambda size: size < 4, low=4)
    with pytest.raises(ValueError, match="high=None: .* no end"):
        largest_batch(lambda size: True)
    with pytest.raises(ValueError, match="high=2: must be a whole number of at least 3"):
        largest_batch(lambda size: True, low=3, high=2)
    assert largest_batch(lambda size: True, high=77) == 77


def test_memory_is_freed_between_tries() -> None:
    """A fake allocator of 100 cells, in which a failed try leaves its cells in a circle that only gc can free."""
    held: list[int] = []

    class Cells:
        def __init__(self, count: int) -> None:
            self.itself = self
            if sum(held) + count > 100:
                raise torch.OutOfMemoryError(f"{count} cells")
            held.append(self.count) if hasattr(self, "count") else held.append(count)
            self.count = count

        def __del__(self) -> None:
            if hasattr(self, "count"):
                held.remove(self.count)

    def fits(size: int) -> bool:
        try:
            [Cells(size), Cells(size)]
        except torch.OutOfMemoryError:
            return False
        return True

    assert largest_batch(fits) == 50


def test_a_step_that_runs_out_is_one_that_does_not_fit() -> None:
    model = mlp((1, 16, 16), 10)
    before = [p.clone() for p in model.parameters()]

    def limited(size: int) -> tuple[Tensor, Tensor]:
        if size > 37:
            raise torch.OutOfMemoryError("a device of 37 examples")
        return batch(size)

    assert largest_batch(memory.fits_on_device(model, limited, ADAM)) == 37
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    def wrong(size: int) -> Any:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        largest_batch(memory.fits_on_device(model, wrong, ADAM))


@pytest.mark.gpu(emulated=False)
def test_a_gpu_that_runs_out() -> None:
    """A limit on the process makes the device small; the next size up must really fail."""
    total = torch.cuda.get_device_properties(0).total_memory
    model = convnet((1, 16, 16), 10).cuda()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5 * 2**30 / total))
    try:
        fits = memory.fits_on_device(model, partial(batch, device="cuda"), ADAM)
        size = largest_batch(fits)
        assert size > 100
        assert fits(size // 2)
        assert not fits(2 * size)
        memory._free()
        assert fits(size // 2)  # a failed try left nothing behind
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="the examples of y=3: must be an even number of at least 4"):
        predicted_memory(mlp((1, 16, 16), 10), *batch(3), ADAM)
    with pytest.raises(ValueError, match="batch_size=0: must be"):
        MemoryModel(1, 1, 1, 1.0, 1.0)(0)
