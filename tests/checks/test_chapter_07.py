"""Checks of chapter 7: right answers pass, each usual mistake gets its own hint, stubs are not attempted."""

import pytest
import torch

from course_lib.checks import chapter_07
from course_lib.lab.exercises import check
from tests.checks import checking

EXERCISES = {"07.1": "ring_step", "07.2": "ring_seconds", "07.3": "global_gradient", "07.4": "compress"}


pytestmark = pytest.mark.usefixtures("unknown_learner")


# Solutions, as the notebook prints them


def ring_step(rank, step, world_size):
    return (rank - step) % world_size, (rank - step - 1) % world_size


def ring_seconds(size, workers, bandwidth, latency):
    messages = 2 * (workers - 1)
    return messages * (latency + size / workers / bandwidth)


def global_gradient(gradients, sizes):
    total = sum(sizes)
    return sum(g * (n / total) for g, n in zip(gradients, sizes, strict=True) if n > 0)


def compress(gradient, residual, k):
    total = gradient + residual
    largest = total.abs().flatten().topk(k).indices
    sent = torch.zeros_like(total).flatten()
    sent[largest] = total.flatten()[largest]
    sent = sent.view_as(total)
    return sent, total - sent


# The same in other ways


def ring_step_by_walking(rank, step, world_size):
    """Chunk c starts on rank c and moves one rank to the right in each step."""

    def sent_by(rank):
        return next(c for c in range(world_size) if (c + step) % world_size == rank)

    return torch.tensor(sent_by(rank)), sent_by((rank or world_size) - 1)


def ring_seconds_one_by_one(size, workers, bandwidth, latency):
    time = 0.0
    for _half in ("reduce-scatter", "all-gather"):
        for _message in range(1, workers):
            time += latency
            time += size / bandwidth / workers
    return time


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
        ("07.1", ring_step),
        ("07.1", ring_step_by_walking),
        ("07.2", ring_seconds),
        ("07.2", ring_seconds_one_by_one),
        ("07.2", lambda *case: torch.tensor(ring_seconds(*case))),
        ("07.3", global_gradient),
        ("07.3", global_gradient_stacked),
        ("07.3", global_gradient_mended),
        ("07.4", compress),
        ("07.4", compress_sorted),
    ],
)
def test_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_the_schedule_that_is_right_here_sums_all_chunks(world_size):
    values = torch.randn(world_size, world_size, generator=torch.Generator().manual_seed(0))  # [rank, chunk]
    held = values.clone()
    for step in range(world_size - 1):
        on_the_way = held.clone()
        for rank in range(world_size):
            sent, received = chapter_07._ring_step(rank, step, world_size)
            assert received == chapter_07._ring_step((rank - 1) % world_size, step, world_size)[0]
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
    torch.testing.assert_close(chapter_07._global_gradient(gradients, sizes), gradient(x))


# Usual mistakes


def average(weight):
    """A weighted sum of the gradients with ``weight(n, sizes)``."""
    return lambda gradients, sizes: sum(weight(n, sizes) * g for g, n in zip(gradients, sizes, strict=True))


def mended_afterwards(gradients, sizes):
    return average(lambda n, sizes: n / sum(sizes))(gradients, sizes).nan_to_num()


def at_least_one(gradients, sizes):
    sizes = [max(n, 1) for n in sizes]
    return global_gradient([g.nan_to_num() for g in gradients], sizes)


def scaled_in_place(gradients, sizes):
    for g, n in zip(gradients, sizes, strict=True):
        g.mul_(n)
    return sum(g for g, n in zip(gradients, sizes, strict=True) if n) / sum(sizes)


def nan_mended_in_place(gradients, sizes):
    for g in gradients:
        g.nan_to_num_()
    return average(lambda n, sizes: n / sum(sizes))(gradients, sizes)


def sizes_popped(gradients, sizes):
    right = global_gradient(gradients, sizes)
    sizes.pop()
    return right


def keep(values, criterion, k):
    """``values`` where ``criterion`` is among its k largest, else zero."""
    threshold = criterion.flatten().sort(descending=True).values[k - 1]
    return values.where(criterion >= threshold, torch.zeros_like(values))


def sending(entries, kept=lambda g, r, sent: g + r - sent):
    def answer(gradient, residual, k):
        sent = entries(gradient, residual, k)
        return sent, kept(gradient, residual, sent)

    return answer


def right_entries(g, r, k):
    return keep(g + r, (g + r).abs(), k)


def by_row(g, r, k):
    total = g + r
    threshold = total.abs().topk(min(k, total.shape[-1])).values[..., -1:]
    return total * (total.abs() >= threshold)


def packed(g, r, k):
    total = (g + r).flatten()
    return total[total.abs().topk(k).indices], compress(g, r, k)[1]


def strict_threshold(g, r, k):
    total = g + r
    return total * (total.abs() > total.abs().flatten().topk(k).values[-1])


def threshold_from_zero(g, r, k):
    total = g + r
    return total * (total.abs() >= total.abs().flatten().sort(descending=True).values[k])


def adding_in_place(gradient, residual, k):
    gradient += residual
    return compress(gradient, torch.zeros_like(residual), k)


def adding_to_the_residual(gradient, residual, k):
    return compress(residual.add_(gradient), torch.zeros_like(gradient), k)


MISTAKES = [
    ("07.1", lambda r, s, n: ((r + s) % n, (r + s + 1) % n), "the other way", "sum of two"),
    ("07.1", lambda r, s, n: ((r + s) % n, (r + s - 1) % n), "not yet received", "sum of two"),
    ("07.1", lambda r, s, n: ((r - s) % n, (r - s) % n), "receives the chunk that it sends", "left-hand neighbour"),
    ("07.1", lambda r, s, n: ((r - s) % n, (r + 1 - s) % n), "right-hand neighbour", "From whom"),
    ("07.1", lambda r, s, n: (r - s, r - s - 1), "some of your chunk numbers are negative", "the last one"),
    ("07.1", lambda r, s, n: ((r - s) % n, r - s - 1), "the chunk received is sometimes negative", "the last one"),
    ("07.1", lambda r, s, n: ((r - s) % n, (r - s) % n - 1), "sometimes -1", "comes first"),
    ("07.1", lambda r, s, n: (r - s, (r - s - 1) % n), "the chunk sent is sometimes negative", "the last one"),
    ("07.1", lambda r, s, n: ring_step(r, s + 1, n), "one step ahead", "count from 0"),
    ("07.1", lambda r, s, n: ring_step(r, s - 1, n), "all-gather", "its own number"),
    ("07.1", lambda r, s, n: ring_step(r, s, n)[::-1], "swapped", "order"),
    ("07.1", lambda r, s, n: ring_step(r, 0, n), "same chunk in every step", "step 0"),
    ("07.1", lambda r, s, n: ((r + 1) % n, (r - 1) % n), "neighbours' ranks", "never changes"),
    ("07.1", lambda r, s, n: ring_step(r, s, n - 1), "one too early", "How many chunks"),
    ("07.1", lambda r, s, n: ((r - s) % n, 2 * n), "only chunks 0 to 4", "the last one"),
    ("07.1", lambda r, s, n: (0, ring_step(r, s, n)[1]), "the chunk sent is not the right one", "Draw three"),
    ("07.1", lambda r, s, n: (ring_step(r, s, n)[0], 0), "the chunk received is not the right one", "Draw three"),
    ("07.1", lambda r, s, n: ring_step(r, s, 5), r"only chunks 0 to 1 .on rank 0, step 0 of 2", "the last one"),
    ("07.1", lambda r, s, n: (r - s) % n, "should return 2 values .* and returns one value", "sends one chunk"),
    ("07.1", lambda r, s, n: ((r - s) / n, 1), "whole number", "single /"),
    ("07.2", lambda size, n, b, t: (n - 1) * (t + size / n / b), "half an all-reduce", "sum of one chunk"),
    ("07.2", lambda size, n, b, t: 2 * (n - 1) * (t + size / b), "whole gradient", "cut up"),
    ("07.2", lambda size, n, b, t: t + 2 * (n - 1) * size / n / b, "counts once only", "its own start"),
    ("07.2", lambda size, n, b, t: 2 * t + 2 * (n - 1) * size / n / b, "counts twice only", "How often"),
    ("07.2", lambda size, n, b, t: 2 * (n - 1) * size / n / b, "latency is left out", "without content"),
    ("07.2", lambda size, n, b, t: 2 * (n - 1) * t, "only the latency", "on their way"),
    ("07.2", lambda size, n, b, t: 2 * n * (t + size / n / b), "one message too many", "How many others"),
    ("07.2", lambda size, n, b, t: 2 * (n - 1) * (t + size / (n - 1) / b), "one worker fewer", "How many chunks"),
    ("07.2", lambda size, n, b, t: 2 * ((n - 1) * t + n / (n - 1) * size / b), "upside down", "a little less"),
    ("07.2", lambda *case: case[1] * ring_seconds(*case), "messages of all workers", "at the same time"),
    ("07.2", lambda size, n, b, t: 2 * (n - 1) * (t + size / n) / b, "divided by the bandwidth", "unit"),
    ("07.2", lambda size, n, b, t: 2 * (n - 1) * (t + size / n * b), "larger bandwidth", "leaves seconds"),
    ("07.2", lambda size, n, b, t: ring_seconds(8 * size, n, b, t), "bits", "in bytes"),
    ("07.2", lambda *case: ring_seconds(*case) or case[3], "one worker needs no time", "for one worker"),
    ("07.2", lambda *case: 3 * ring_seconds(*case), "the time is not right", "Two questions"),
    ("07.3", average(lambda n, sizes: 1 / len(sizes)), "plain average", "as many examples"),
    ("07.3", average(lambda n, sizes: 1), "sum of the ranks' gradients", "the same gradient"),
    ("07.3", average(lambda n, sizes: n), "summed loss", "add up to"),
    ("07.3", average(lambda n, sizes: n / len(sizes)), "number of ranks", "in all"),
    ("07.3", average(lambda n, sizes: 1 / sum(sizes)), "as a sum over its examples", "already in them"),
    ("07.3", average(lambda n, sizes: 1 / n), "once more", "already in them"),
    ("07.3", average(lambda n, sizes: n / max(sizes)), "largest rank", "add up to"),
    ("07.3", average(lambda n, sizes: n / sum(sizes)), r"holds NaN .on three ranks, the second", "What is 0"),
    ("07.3", mended_afterwards, "lost together with the NaN", "before the sum"),
    ("07.3", at_least_one, "counts as if it had one", "global batch"),
    ("07.3", scaled_in_place, "changes the gradients it is handed in place", "writes into"),
    ("07.3", nan_mended_in_place, r"in place .on three ranks, the second", "writes into"),
    ("07.3", sizes_popped, "changes the list of sizes", "a list"),
    ("07.3", lambda gradients, sizes: gradients, "should be a tensor, and is a list of 3", "one machine"),
    ("07.3", lambda gradients, sizes: gradients[0], "the gradient is not right", "one machine"),
    ("07.4", lambda g, r, k: compress(g, 0 * r, k), "old residual is lost", "last step"),
    ("07.4", sending(lambda g, r, k: keep(g + r, g.abs(), k)), "by the gradient alone", "some day"),
    ("07.4", sending(lambda g, r, k: keep(g, g.abs(), k)), "only after the entries are chosen", "order"),
    ("07.4", sending(lambda g, r, k: keep(g, (g + r).abs(), k)), "only their gradient is sent", "how much of it"),
    ("07.4", sending(lambda g, r, k: keep(g + r, r.abs(), k)), "by the residual alone", "counts too"),
    ("07.4", sending(lambda g, r, k: keep(g + r, g + r, k)), "a large negative one never is", "sign"),
    ("07.4", sending(lambda g, r, k: keep(g + r, -(g + r).abs(), k)), "smallest entries", "most"),
    ("07.4", sending(by_row), "of each row", "one long vector"),
    ("07.4", sending(right_entries, lambda g, r, sent: g + r), "sent again", "Nothing may be lost"),
    ("07.4", sending(right_entries, lambda g, r, sent: g - sent), "forgets the old one", "Nothing may be lost"),
    ("07.4", sending(right_entries, lambda g, r, sent: r - sent), "forgets the gradient", "Nothing may be lost"),
    ("07.4", sending(right_entries, lambda g, r, sent: r + (g + r - sent)), "twice", "already added"),
    ("07.4", sending(right_entries, lambda g, r, sent: sent - (g + r)), "sign of your residual", "make up for"),
    ("07.4", sending(right_entries, lambda g, r, sent: r), "old residual is returned", "leave behind"),
    ("07.4", sending(lambda *case: right_entries(*case).abs()), "magnitudes are sent", "What travels"),
    ("07.4", packed, "only the k numbers", "Put them back"),
    ("07.4", sending(strict_threshold), "one entry too few", "threshold"),
    ("07.4", sending(threshold_from_zero), "one entry too many", "threshold"),
    ("07.4", lambda *case: compress(*case)[::-1], "residual first", "order"),
    ("07.4", lambda *case: compress(*case)[0], "only what is sent", "new residual too"),
    ("07.4", lambda *case: (*compress(*case), 0), "should return 2 values .* and returns 3 values", "leaves behind"),
    ("07.4", sending(lambda g, r, k: keep(g + r, (g + r).abs(), 5)), "5 entries are sent, and k is 3", "whole tensor"),
    ("07.4", sending(lambda g, r, k: 2 * right_entries(g, r, k)), "what is sent is not right", "First the residual"),
    ("07.4", sending(right_entries, lambda g, r, sent: 0 * r), "the new residual is not right", "Nothing may be lost"),
    ("07.4", adding_in_place, "changes its argument gradient in place", "writes into"),
    ("07.4", adding_to_the_residual, "changes its argument residual in place", "writes into"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_each_usual_mistake_gets_its_own_hint(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


LISTS = {
    "07.1": chapter_07._RING_MISTAKES,
    "07.2": chapter_07._SECONDS_MISTAKES,
    "07.3": chapter_07._GRADIENT_MISTAKES,
    "07.4": chapter_07._COMPRESS_MISTAKES,
}


@pytest.mark.parametrize("exercise", EXERCISES)
def test_every_mistake_that_is_listed_is_made_above(exercise):
    checking.assert_all_made(LISTS[exercise], exercise, MISTAKES)


def test_no_two_mistakes_look_alike_on_the_first_hidden_input():
    first_gradients = next(iter(chapter_07._gradient_cases().values()))
    first_compressed = next(iter(chapter_07._compress_cases().values()))
    results = [
        [chapter_07._schedule(rule, 5) for rule, *_ in [(chapter_07._ring_step,), *LISTS["07.1"]]],
        [rule(1_200, 4, 1e3, 2.0) for rule, *_ in [(chapter_07._seconds,), *LISTS["07.2"]]],
        [rule(*first_gradients) for rule, *_ in [(chapter_07._global_gradient,), *LISTS["07.3"]]],
        [rule(*first_compressed) for rule, *_ in [(chapter_07._compress,), *LISTS["07.4"]]],
    ]
    for of_one_exercise in results:
        checking.assert_no_two_alike(of_one_exercise)


@pytest.mark.parametrize("exercise", EXERCISES)
@pytest.mark.parametrize("answer", checking.STUBS)
def test_stubs_are_not_attempted(exercise, answer):
    checking.assert_not_attempted(exercise, answer)


@pytest.mark.parametrize("exercise", EXERCISES)
@pytest.mark.parametrize("answer", checking.USELESS)
def test_any_other_answer_is_told_what_is_wrong(exercise, answer):
    checking.assert_told_what_is_wrong(exercise, answer)


@pytest.mark.parametrize(("exercise", "name"), EXERCISES.items())
def test_the_printed_solutions_pass(exercise, name):
    found = check(exercise, checking.printed_solutions("07_parallel_training.ipynb", torch=torch)[name])
    assert found.state == "passed", found
