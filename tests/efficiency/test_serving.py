"""Requests in batches: against queueing theory, Little's law, schedules by hand, and real threads without a clock."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from course_lib.efficiency.serving import (
    Affine,
    Batcher,
    Closed,
    Served,
    dynamic_batch,
    fit_service,
    fixed_batch,
    measure_service,
    one_at_a_time,
    poisson_arrivals,
    simulate,
    simulate_continuous,
    waiting_time,
)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process() -> None:
    times = np.array(poisson_arrivals(50.0, 50_000, drawn()))
    gaps = np.diff(times, prepend=0)
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    counts = np.bincount(times.astype(int))[:-1]  # requests in each second
    assert counts.var() == pytest.approx(counts.mean(), rel=0.2)
    assert poisson_arrivals(50.0, 3, drawn()) == times[:3].tolist()


def test_a_line_through_measured_times() -> None:
    sizes = [1, 2, 4, 8]
    found = fit_service(sizes, [3 + 0.5 * n for n in sizes])
    assert (found.fixed, found.each) == (pytest.approx(3), pytest.approx(0.5))
    assert found(10) == pytest.approx(8)
    assert Affine(3, 0.5).capacity(10) == pytest.approx(1.25)
    bent = fit_service([1, 2, 3], [1.0, 2.0, 2.0])
    rows, ones = np.array([[1, 1], [1 / 2, 1], [1 / 2, 3 / 2]]), np.ones(3)  # both over the time
    assert (bent.fixed, bent.each) == pytest.approx(tuple(np.linalg.lstsq(rows, ones)[0]))
    assert bent.fixed > 0.1
    steep = fit_service([1, 2, 4], [1.0, 2.5, 8.0])
    assert steep.fixed == 0
    assert 1 < steep.each < 2


def test_service_is_measured_by_the_clock() -> None:
    now, seen = [0.0], []

    def fn(x: Tensor) -> None:
        seen.append(tuple(x.shape))
        now[0] += 2 + 0.25 * len(x)

    times = measure_service(fn, torch.zeros(3, 4), [1, 8], repeats=3, clock=lambda: now[0])
    assert times == [pytest.approx(2.25), pytest.approx(4.0)]
    assert set(seen) == {(1, 3, 4), (8, 3, 4)}


# --- Policies by hand -------------------------------------------------------------------------------------------------

ARRIVALS = [0.0, 1.0, 1.5, 6.0, 6.5]


def test_one_at_a_time_by_hand() -> None:
    found = simulate(ARRIVALS, lambda n: 2.0, one_at_a_time)
    assert found.ends == (2, 4, 6, 8, 10)
    assert found.latencies.tolist() == [2, 3, 4.5, 2, 3.5]
    assert found.waits.tolist() == [0, 1, 2.5, 0, 1.5]
    assert (found.horizon, found.throughput, found.utilisation, found.mean_batch) == (10, 0.5, 1, 1)
    assert found.percentile(50) == 3
    assert found.percentile(100) == 4.5


def test_fixed_batches_by_hand() -> None:
    found = simulate(ARRIVALS, Affine(1, 0.5), fixed_batch(2))
    assert found.batches == ((1, 3, 2), (6, 8, 2), (8, 9.5, 1))
    assert found.ends == (3, 3, 8, 8, 9.5)
    assert found.utilisation == pytest.approx(5.5 / 9.5)


def test_dynamic_batches_by_hand() -> None:
    found = simulate(ARRIVALS, Affine(1, 0.5), dynamic_batch(2, 0.75))
    # the first waits in vain; the next two fill a batch; the last two as well, before the time is over
    assert found.batches == ((0.75, 2.25, 1), (2.25, 4.25, 2), (6.5, 8.5, 2))
    at_once = simulate(ARRIVALS, Affine(1, 0.5), dynamic_batch(2, 0))
    assert at_once.batches == ((0, 1.5, 1), (1.5, 3.5, 2), (6, 7.5, 1), (7.5, 9, 1))
    late = simulate([0.0, 0.5, 2.0], lambda n: 1.0, dynamic_batch(8, 0.5))
    assert late.batches == ((0.5, 1.5, 2), (2.5, 3.5, 1)), "who comes just then is taken along"


def test_many_steps_by_hand() -> None:
    arrivals, lengths = [0.0, 0.0, 0.5, 3.0], [1, 3, 2, 1]
    whole = simulate(arrivals, lambda n: 1.0, dynamic_batch(2, 0), lengths)
    assert whole.batches == ((0, 3, 2), (3, 5, 2))
    assert whole.ends == (3, 3, 5, 5)
    joined = simulate_continuous(arrivals, lengths, lambda n: 1.0, 2)
    assert joined.ends == (1, 3, 3, 4)
    assert joined.starts == (0, 0, 1, 3)
    assert joined.batches == ((0, 1, 2), (1, 2, 2), (2, 3, 2), (3, 4, 1))


def test_one_step_each_is_dynamic_batching_without_waiting() -> None:
    arrivals, cost = poisson_arrivals(4.0, 500, drawn()), Affine(0.3, 0.05)
    plain = simulate(arrivals, cost, dynamic_batch(4, 0.0))
    assert simulate(arrivals, cost, dynamic_batch(4, 0.0), [1] * 500) == plain
    joined = simulate_continuous(arrivals, [1] * 500, cost, 4)
    np.testing.assert_allclose(joined.ends, plain.ends, rtol=1e-12)
    assert plain.mean_batch > 1.5


def test_a_batch_of_one_at_most_is_one_at_a_time() -> None:
    arrivals = poisson_arrivals(3.0, 200, drawn())
    expected = simulate(arrivals, lambda n: 0.3, one_at_a_time)
    for policy in (fixed_batch(1), dynamic_batch(1, 0.0), dynamic_batch(1, 9.0)):
        assert simulate(arrivals, lambda n: 0.3, policy) == expected


# --- Theory -----------------------------------------------------------------------------------------------------------


def test_the_formulas_of_theory() -> None:
    rate, mean = 3.0, 0.2
    load = rate * mean
    assert waiting_time(rate, mean) == pytest.approx(load * mean / (2 * (1 - load)))  # M/D/1
    assert waiting_time(rate, mean, mean**2) == pytest.approx(load / (1 / mean - rate))  # M/M/1
    assert waiting_time(0.0, mean) == 0


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_simulated_waits_are_theorys(load: float) -> None:
    n = 60_000
    arrivals = poisson_arrivals(load, n, drawn(1))
    equal = simulate(arrivals, lambda size: 1.0, one_at_a_time)
    assert equal.waits.mean() == pytest.approx(waiting_time(load, 1.0), rel=0.05)
    draws = iter((-torch.log1p(-torch.rand(n, generator=drawn(2), dtype=torch.float64))).tolist())
    random = simulate(arrivals, lambda size: next(draws), one_at_a_time)
    assert random.waits.mean() == pytest.approx(waiting_time(load, 1.0, 1.0), rel=0.06)
    assert equal.utilisation == pytest.approx(load, rel=0.02)


def test_waits_are_lindleys() -> None:
    arrivals, service = poisson_arrivals(2.0, 300, drawn(3)), 0.4
    wait, waits = 0.0, [0.0]
    for before, now in itertools.pairwise(arrivals):
        wait = max(0.0, wait + service - (now - before))
        waits.append(wait)
    np.testing.assert_allclose(simulate(arrivals, lambda n: service, one_at_a_time).waits, waits, atol=1e-9)


def every_way() -> Iterator[Served]:
    arrivals, cost = poisson_arrivals(4.0, 400, drawn(4)), Affine(0.2, 0.04)
    for policy in (one_at_a_time, fixed_batch(5), dynamic_batch(6, 0.3), dynamic_batch(6, 0)):
        yield simulate(arrivals, cost, policy)
    lengths = torch.randint(1, 9, (400,), generator=drawn(5)).tolist()
    yield simulate(arrivals, Affine(0.02, 0.002), dynamic_batch(8, 0), lengths)
    yield simulate_continuous(arrivals, lengths, Affine(0.02, 0.002), 8)


def test_littles_law_holds_on_every_path() -> None:
    for found in every_way():
        assert found.mean_in_system == pytest.approx(found.throughput * found.latencies.mean(), rel=1e-12)
        times, counts = found.in_system()
        assert counts[-1] == 0
        assert counts.min() >= 0
        assert (np.diff(times) >= 0).all()
        assert (found.waits >= 0).all()
        starts = [start for start, _, _ in found.batches]
        ends = [end for _, end, _ in found.batches]
        assert all(end <= start + 1e-12 for end, start in zip(ends, starts[1:], strict=False)), "one server"


def test_joining_and_leaving_beats_staying_together() -> None:
    *_, whole, joined = every_way()
    assert joined.latencies.mean() < whole.latencies.mean()


# --- For real ---------------------------------------------------------------------------------------------------------


class Gate:
    """A network whose first call waits until the test has handed in the rest."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.sizes: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.entered.set()
        assert self.go.wait(30)
        return 10 * x

    def fill(self, batcher: Batcher, n: int) -> list[Future[Tensor]]:
        """One request, and n more while it is being answered."""
        first = batcher.submit(torch.zeros(2))
        assert self.entered.wait(30)
        return [first, *(batcher.submit(torch.full((2,), float(i))) for i in range(1, n + 1))]


def test_each_caller_gets_its_own_row() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=4) as batcher:
        futures = gate.fill(batcher, 9)
        gate.go.set()
        rows = [future.result(30) for future in futures]
    assert [row.tolist() for row in rows] == [[10.0 * i] * 2 for i in range(10)]
    assert gate.sizes == [1, 4, 4, 1]


def test_many_threads_ask_at_once() -> None:
    before = threading.active_count()
    with Batcher(lambda x: x.square(), max_batch=8, max_wait=1e-4) as batcher, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: batcher.submit(torch.tensor([float(i)])).result(30).item(), range(200)))
    assert answers == [float(i) ** 2 for i in range(200)]
    assert threading.active_count() == before


def test_a_full_batch_waits_no_longer() -> None:
    """Else this would take ten minutes."""
    sizes: list[int] = []
    with Batcher(lambda x: sizes.append(len(x)) or x, max_batch=3, max_wait=600) as batcher:
        futures = [batcher.submit(torch.zeros(1)) for _ in range(6)]
        for future in futures:
            future.result(30)
        rest = batcher.submit(torch.ones(1))
    assert rest.result(0).item() == 1, "closing answers those who wait"
    assert sizes == [3, 3, 1]


def test_the_first_of_a_batch_waits_so_long() -> None:
    """By a clock that the test holds: the time is over once it has been read twice."""
    ticks = iter([0.0, 100.0, 200.0, 300.0, 400.0, 500.0])
    sizes: list[int] = []
    with Batcher(lambda x: sizes.append(len(x)) or x, max_batch=9, max_wait=50, clock=lambda: next(ticks)) as batcher:
        assert batcher.submit(torch.zeros(1)).result(30) == 0
        assert batcher.submit(torch.ones(1)).result(30) == 1
    assert sizes == [1, 1]


def test_errors_reach_those_who_asked_and_nobody_else() -> None:
    gate = Gate()

    def fn(x: Tensor) -> Tensor:
        gate(x)
        if (x == 1).any():
            raise ZeroDivisionError("a bad request")
        return x

    with Batcher(fn, max_batch=2) as batcher:
        futures = gate.fill(batcher, 4)
        gate.go.set()
        assert futures[0].result(30).sum() == 0
        for future in futures[1:3]:
            with pytest.raises(ZeroDivisionError, match="a bad request"):
                future.result(30)
        assert [future.result(30)[0].item() for future in futures[3:]] == [3, 4]


def test_a_function_must_answer_each_row() -> None:
    with Batcher(lambda x: x[:0]) as batcher, pytest.raises(ValueError, match="rows of fn=0: must be a row for each"):
        batcher.submit(torch.zeros(1)).result(30)


def test_who_has_cancelled_is_left_out() -> None:
    gate = Gate()
    with Batcher(gate, max_batch=8) as batcher:
        futures = gate.fill(batcher, 3)
        assert futures[2].cancel()
        gate.go.set()
        assert futures[3].result(30)[0] == 30
    assert gate.sizes == [1, 2]


def test_closing_leaves_nothing_behind() -> None:
    batcher = Batcher(lambda x: x)
    thread = batcher._thread
    futures = [batcher.submit(torch.zeros(1)) for _ in range(50)]
    batcher.close()
    batcher.close()
    assert all(future.done() for future in futures)
    assert not thread.is_alive()
    with pytest.raises(Closed, match="the batcher is closed"):
        batcher.submit(torch.zeros(1))


def test_an_error_in_the_block_closes_too() -> None:
    with pytest.raises(KeyError), Batcher(lambda x: x) as batcher:
        raise KeyError
    assert not batcher._thread.is_alive()


@torch.enable_grad()
def test_answers_have_no_gradient() -> None:
    weight = torch.ones(1, requires_grad=True)
    with Batcher(lambda x: x * weight) as batcher:
        assert not batcher.submit(torch.ones(1)).result(30).requires_grad


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = torch.nn.Linear(3, 2).cuda()
    with Batcher(model) as batcher:
        assert batcher.submit(torch.ones(3, device="cuda")).result(60).is_cuda
    assert len(measure_service(model, torch.ones(3, device="cuda"), [1, 2], repeats=2)) == 2


def test_errors_at_the_door() -> None:
    def raises(match: str, fn: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=match):
            fn(*args, **kwargs)

    raises("rate=0: must be a number above 0", poisson_arrivals, 0, 5)
    raises(r"sizes=\[2, 2\]: must be two batch sizes or more", fit_service, [2, 2], [1, 1])
    raises(r"seconds=\[1\]: must be 2 positive numbers, one for each size", fit_service, [1, 2], [1])
    raises(r"seconds=\[1, 0\]: must be 2 positive numbers", fit_service, [1, 2], [1, 0])
    raises("size=0", fixed_batch, 0)
    raises("max_batch=0", dynamic_batch, 0, 1)
    raises("max_wait=-1: must be a number of seconds, 0 or more", dynamic_batch, 1, -1)
    raises(r"arrivals=\[\]: must be one time or more", simulate, [], Affine(1, 1), one_at_a_time)
    raises(r"arrivals=\[2.0, 1.0, '...'\]: must be times in order", simulate, [2, 1], Affine(1, 1), one_at_a_time)
    raises("lengths=1: must be as many as there are arrivals, 2", simulate_continuous, [1, 2], [1], Affine(1, 1), 2)
    raises(r"min\(lengths\)=0: must be", simulate_continuous, [1, 2], [1, 0], Affine(1, 1), 2)
    raises("rate \\* mean=1.0: must be below 1, or requests pile up", waiting_time, 2.0, 0.5)
    raises("variance=-1", waiting_time, 2.0, 0.1, -1)
    raises("batch=0: must be", simulate, [1.0], Affine(1, 1), lambda arrivals, first, free: (free, 0))
    raises("share=101", simulate([0.0], Affine(1, 1), one_at_a_time).percentile, 101)
    raises("max_batch=0", Batcher, lambda x: x, max_batch=0)
    raises("max_wait=inf", Batcher, lambda x: x, max_wait=math.inf)
    with Batcher(lambda x: x) as batcher:
        batcher.submit(torch.zeros(2))
        raises("x=.*must be as the first example", batcher.submit, torch.zeros(3))
