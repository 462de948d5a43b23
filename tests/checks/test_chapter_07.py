"""Checks of chapter 7: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import itertools

import pytest
import torch

from course_lib import parallel
from course_lib.checks import chapter_07
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "07_parallel_training.ipynb"

ring_step, ring_seconds = chapter_07.exercise_1.right, chapter_07.exercise_2.right
global_gradient, compress = chapter_07.exercise_3.right, chapter_07.exercise_4.right


def ring_step_by_walking(rank, step, world_size):
    """Chunk c starts on rank c and moves one rank to the right in each step."""

    def sent_by(rank):
        return next(c for c in range(world_size) if (c + step) % world_size == rank)

    return torch.tensor(sent_by(rank)), sent_by((rank or world_size) - 1)


def ring_seconds_one_by_one(size, workers, bandwidth, latency):
    return sum(latency + size / bandwidth / workers for _half in range(2) for _message in range(1, workers))


def global_gradient_stacked(gradients, sizes):
    stacked = torch.stack(gradients)
    weights = torch.tensor(sizes, dtype=stacked.dtype)
    present = weights > 0
    return torch.tensordot(weights[present] / weights.sum(), stacked[present], dims=1)


def global_gradient_mended(gradients, sizes):
    summed = torch.zeros_like(gradients[0])
    for g, n in zip(gradients, sizes, strict=True):
        summed += torch.nan_to_num(g) * n
    return summed / sum(sizes)


def compress_sorted(gradient, residual, k):
    total = residual + gradient
    threshold = total.abs().flatten().sort(descending=True).values[k - 1]
    sent = torch.where(total.abs() >= threshold, total, 0.0)
    return [sent, torch.where(total.abs() >= threshold, 0.0, total)]


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("07.1", ring_step_by_walking),
        ("07.2", ring_seconds_one_by_one),
        ("07.2", lambda *case: torch.tensor(ring_seconds(*case))),
        ("07.3", global_gradient_stacked),
        ("07.3", global_gradient_mended),
        ("07.4", compress_sorted),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_the_schedule_that_is_right_here_sums_all_chunks(world_size):
    values = torch.randn(world_size, world_size, generator=torch.Generator().manual_seed(0))  # [rank, chunk]
    held = values.clone()
    for step in range(world_size - 1):
        on_the_way = held.clone()
        for rank in range(world_size):
            sent, received = ring_step(rank, step, world_size)
            assert received == ring_step((rank - 1) % world_size, step, world_size)[0]
            held[(rank + 1) % world_size, sent] += on_the_way[rank, sent]
    for rank in range(world_size):
        chunk = (rank + 1) % world_size  # the one received last
        torch.testing.assert_close(held[rank, chunk], values[:, chunk].sum())


def test_the_gradient_that_is_right_here_is_that_of_the_global_batch():
    sizes = [3, 0, 5, 1]
    x = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(0))
    w = torch.ones(4, requires_grad=True)

    def gradient(x):
        return torch.autograd.grad((x @ w).square().mean(), w)[0]

    gradients = [gradient(part) for part in x.split(sizes)]
    gradients[1] = torch.full_like(w, torch.nan)
    torch.testing.assert_close(global_gradient(gradients, sizes), gradient(x))


def scaled_in_place(gradients, sizes):
    for g, n in zip(gradients, sizes, strict=True):
        g.mul_(n)
    return sum(g for g, n in zip(gradients, sizes, strict=True) if n) / sum(sizes)


def nan_mended_in_place(gradients, sizes):
    for g in gradients:
        g.nan_to_num_()
    return global_gradient(gradients, sizes)


def sizes_popped(gradients, sizes):
    right = global_gradient(gradients, sizes)
    sizes.pop()
    return right


def adding_to_the_residual(gradient, residual, k):
    return compress(residual.add_(gradient), torch.zeros_like(gradient), k)


def five_sent(gradient, residual, k):
    return compress(gradient, residual, 5)


MISTAKES = [
    ("07.1", lambda r, s, n: ((r - s) % n, 2 * n), "only chunks 0 to 4", "the last one"),
    ("07.1", lambda r, s, n: (0, ring_step(r, s, n)[1]), "the chunk sent is not the right one", "Draw three"),
    ("07.1", lambda r, s, n: (ring_step(r, s, n)[0], 0), "the chunk received is not the right one", "Draw three"),
    ("07.1", lambda r, s, n: ring_step(r, s, 5), r"rank 0, step 0: there are only chunks 0 to 1 .on 2", "the last one"),
    ("07.1", lambda r, s, n: (r - s) % n, "should return 2 values .* and returns one value", "sends one chunk"),
    ("07.1", lambda r, s, n: ((r - s) / n, 1), "whole number", "single /"),
    ("07.2", lambda *case: ring_seconds(*case) or case[3], "one worker needs no time", "for one worker"),
    ("07.2", lambda *case: 3 * ring_seconds(*case), "the time is not right", "Two questions"),
    ("07.3", scaled_in_place, "changes its argument gradients in place", "writes into"),
    ("07.3", nan_mended_in_place, r"gradients in place .on three ranks, the second", "writes into"),
    ("07.3", sizes_popped, "changes its argument sizes in place", "a list"),
    ("07.3", lambda gradients, sizes: gradients, "should be a tensor, and is a list of 3", "one machine"),
    ("07.3", lambda gradients, sizes: gradients[0], "the gradient is not right", "one machine"),
    ("07.4", lambda *case: (*compress(*case), 0), "should return 2 values .* and returns 3 values", "leaves behind"),
    ("07.4", five_sent, "5 entries are sent, and k is 3", "whole tensor"),
    ("07.4", lambda g, r, k: (2 * compress(g, r, k)[0], r), "what is sent is not right", "First the residual"),
    ("07.4", lambda g, r, k: (compress(g, r, k)[0], 0 * r), "the new residual is not right", "Nothing may be lost"),
    ("07.4", adding_to_the_residual, "changes its argument residual in place", "writes into"),
]


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


def test_the_moments_that_are_right_here_are_those_of_the_whole_batch():
    parts = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (4, 1, 7)]
    means, variances = torch.stack([x.mean(0) for x in parts]), torch.stack([x.var(0, correction=0) for x in parts])
    mean, variance = chapter_07.exercise_6.right(means, variances, torch.tensor([4, 1, 7]))
    whole = torch.cat(parts)
    torch.testing.assert_close(mean, whole.mean(0))
    torch.testing.assert_close(variance, whole.var(0, correction=0))


def test_the_bug_of_exercise_6_is_named():
    def in_the_notebook(means, variances, counts):
        share = (counts / counts.sum())[:, None]
        return (share * means).sum(0), (share * variances).sum(0)

    checking.assert_hinted("07.6", in_the_notebook, "spread between the ranks' means is missing", "own mean")


# Plans


def by_search(compute_time, size, bandwidth, latency):
    network = compute_time, size, bandwidth, latency
    for workers in (2**k for k in range(12, -1, -1)):
        for algorithm, buckets in itertools.product(chapter_07.ALGORITHMS, range(1, 65)):
            if chapter_07._efficiency(network, workers, algorithm, buckets) >= chapter_07.LEAST_EFFICIENCY:
                return workers, algorithm, buckets
    return 1, parallel.ring_time, 1


def test_the_most_workers_of_the_hidden_networks_are_those_that_a_search_finds():
    found = {seed: by_search(*chapter_07._network(seed))[0] for seed in chapter_07._MOST_WORKERS}
    assert found == chapter_07._MOST_WORKERS


@pytest.mark.parametrize("workers", [1, 4, 16, 32, 64, 128, 4096])
@pytest.mark.parametrize("algorithm", chapter_07.ALGORITHMS)
def test_no_fixed_plan_suits_all_networks(workers, algorithm):
    checking.assert_hinted("07.7", lambda *network: (workers, algorithm, 4), "over 8 hidden seeds", "fixed plan")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ((64, "ring", 4), "one of the all-reduces"),
        ((48, parallel.ring_time, 4), "48 for the number of workers: it must be a power of two"),
        ((64, parallel.ring_time, 0), "0 for the number of buckets: it must be from 1 to 64"),
        ((64, parallel.ring_time), "should return 3 values"),
        (64, "and returns one value"),
    ],
)
def test_what_is_no_plan_is_told_what_is_wrong(plan, message):
    found = check("07.7", lambda *network: plan)
    assert found.state == "not yet right"
    assert message in found.message


def test_a_plan_that_is_still_a_stub_is_not_attempted():
    checking.assert_not_attempted("07.7", checking.stub)


@pytest.mark.parametrize("exercise", checking.asked(NOTEBOOK))
def test_the_printed_solutions_pass(exercise):
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, torch=torch, parallel=parallel)
