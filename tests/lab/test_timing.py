"""Timing: arithmetic on a clock that the test turns itself; memory to the byte."""

import statistics

import pytest
import torch

from course_lib.lab import timing
from course_lib.lab.timing import compare_speed, measure, peak_memory


class Watch:
    """A clock that only work moves on."""

    def __init__(self):
        self.now = 100.0
        self.calls = []

    def __call__(self):
        return self.now

    def job(self, name, seconds):
        durations = iter(seconds)

        def run():
            self.calls.append(name)
            self.now += next(durations)

        return run


@pytest.fixture
def watch():
    return Watch()


def test_measure_gives_median_and_quartiles_and_leaves_the_warm_up_out(watch):
    seconds = [50.0, 60.0, 1.0, 2.0, 3.0, 4.0, 100.0]
    found = measure(watch.job("a", seconds), warmup=2, repeats=5, device="cpu", clock=watch)
    assert (found.low, found.median, found.high, found.repeats) == pytest.approx((2.0, 3.0, 4.0, 5))
    assert len(watch.calls) == 7


def test_one_repeat_has_no_spread(watch):
    found = measure(watch.job("a", [2.0]), warmup=0, repeats=1, device="cpu", clock=watch)
    assert (found.low, found.median, found.high) == pytest.approx((2.0, 2.0, 2.0))


def test_compare_speed_takes_turns_and_alternates_who_goes_first(watch):
    a, b = watch.job("A", [3.0] * 9), watch.job("B", [2.0] * 9)
    found = compare_speed(a, b, rounds=4, warmup=2, device="cpu", clock=watch)
    assert "".join(watch.calls) == "ABAB" + "ABBAABBA"
    assert (found.low, found.ratio, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert (found.a.median, found.b.median, found.rounds) == pytest.approx((3.0, 2.0, 4))
    assert repr(found) == "A takes 1.50x the time of B (1.50 to 1.50, 4 rounds)"


def test_compare_speed_cancels_a_machine_that_slows_down(watch):
    """Both jobs cost the same, and each call takes 10% longer than the one before."""

    def slower():
        watch.now += 1.1 ** len(watch.calls)
        watch.calls.append("x")

    found = compare_speed(slower, slower, rounds=16, warmup=0, device="cpu", clock=watch)
    assert found.ratio == pytest.approx(1.0, abs=0.01)
    assert (found.low, found.high) == pytest.approx((1 / 1.1, 1.1))


def test_the_ratio_is_the_median_of_the_rounds_own_ratios(watch):
    times_a, times_b = [1.0, 9.0, 4.0], [1.0, 3.0, 2.0]
    found = compare_speed(
        watch.job("A", times_a), watch.job("B", times_b), rounds=3, warmup=0, device="cpu", clock=watch
    )
    ratios = [a / b for a, b in zip(times_a, times_b, strict=True)]
    assert found.ratio == statistics.median(ratios) == 2.0
    assert (found.low, found.high) == pytest.approx((1.5, 2.5))


@pytest.mark.parametrize(("seconds", "shown"), [(2.5, "2.5 s"), (2.5e-3, "2.5 ms"), (2.5e-6, "2.5 µs"), (0.0, "0 ns")])
def test_a_timing_is_shown_in_a_fitting_unit(watch, seconds, shown):
    found = timing.Timing(seconds, seconds, seconds, 3)
    assert repr(found).startswith(shown)
    assert repr(found).endswith("3 repeats)")


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"repeats": 0}])
def test_measure_refuses(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))}={next(iter(wrong.values()))}: must be a whole number"):
        measure(lambda: None, device="cpu", **wrong)


def test_compare_speed_refuses_no_rounds():
    with pytest.raises(ValueError, match="rounds=0: must be a whole number of at least 1"):
        compare_speed(lambda: None, lambda: None, rounds=0, device="cpu")


def test_garbage_collection_is_off_while_timing_and_on_again_after(watch):
    import gc

    seen = []
    measure(lambda: seen.append(gc.isenabled()), warmup=1, repeats=2, device="cpu", clock=watch)
    assert seen == [True, False, False]
    assert gc.isenabled()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_device_is_synchronised_before_each_reading_of_the_clock(monkeypatch, watch, device):
    """A queue that only synchronising empties: unsynchronised, its work would not be counted."""
    queue = []

    def synchronise(*_):
        watch.now += sum(queue)
        queue.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronise)
    monkeypatch.setattr(torch.mps, "synchronize", synchronise)
    found = measure(lambda: queue.append(5.0), warmup=1, repeats=3, device=device, clock=watch)
    assert (found.low, found.median, found.high) == pytest.approx((5.0, 5.0, 5.0))


def floats(count):
    return torch.empty(count, dtype=torch.float32)


def freed_in_turn():
    for _ in range(5):
        floats(1000)


def kept_together():
    return [floats(1000) for _ in range(5)]


def freed_in_the_middle():
    first = floats(1000)
    second = floats(500)
    del first
    return second, floats(800)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda: None, 0),
        (lambda: floats(1000), 4000),
        (lambda: torch.empty(1000, dtype=torch.float64), 8000),
        (freed_in_turn, 4000),
        (kept_together, 20000),
        (freed_in_the_middle, 6000),
        (lambda: floats(1000)[:10].view(2, 5), 4000),
    ],
)
def test_peak_memory_on_the_cpu_is_exact(fn, expected):
    assert peak_memory(fn, device="cpu").bytes == expected


def test_peak_memory_counts_what_an_operator_holds_only_inside():
    """A matrix product chained twice keeps its inner result until the outer one is done."""
    x = torch.ones(100, 100)
    assert peak_memory(lambda: x @ x @ x, device="cpu").bytes == 2 * 4 * 100 * 100


def test_peak_memory_does_not_count_what_was_there_before_and_returns_the_result():
    before = torch.ones(10_000)
    found = peak_memory(lambda: before.sum(), device="cpu")
    assert found.bytes == 4
    assert found.result == 10_000


def test_releasing_older_tensors_makes_no_room_and_no_noise(capfd):
    """Torch guesses the size of what was allocated before from what an earlier profile saw at that address."""
    for _ in range(5):
        peak_memory(lambda: floats(1000), device="cpu")
    held = [floats(1000)]

    def swap():
        held.clear()
        return floats(600)

    assert peak_memory(swap, device="cpu").bytes == 2400
    assert capfd.readouterr().err == ""


def test_only_what_was_allocated_meanwhile_is_taken_off_when_released():
    changes = [(1, 100), (2, -4000), (3, 50), (1, -100), (4, 20), (1, 30), (5, -7)]
    assert timing._highest(changes) == 150


def test_peak_memory_lets_an_error_through_and_works_again_after():
    def broken():
        floats(10)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        peak_memory(broken, device="cpu")
    assert peak_memory(lambda: floats(1000), device="cpu").bytes == 4000


def test_the_profiler_prints_nothing(capfd):
    peak_memory(lambda: floats(10), device="cpu")
    found = capfd.readouterr()
    assert (found.out, found.err) == ("", "")


def test_what_the_function_itself_prints_is_kept(capfd):
    import os

    peak_memory(lambda: os.write(2, b"kept"), device="cpu")
    assert capfd.readouterr().err == "kept"


def test_peak_memory_refuses_a_device_without_a_record():
    with pytest.raises(ValueError, match="device: mps keeps no record of its peak memory; allowed are cpu and cuda"):
        peak_memory(lambda: None, device="mps")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda():
    def run():
        for _ in range(5):
            torch.empty(1 << 20, dtype=torch.float32, device="cuda")

    assert peak_memory(run, device="cuda").bytes == 4 << 20
