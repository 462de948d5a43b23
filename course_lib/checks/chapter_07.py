"""Checks of chapter 7, parallel training: the ring's schedule and its time, a global gradient, a compressed gradient.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports. A single chunk number may be right by luck: the schedule of the
ring is judged as a whole, for all ranks and steps.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from course_lib.lab.exercises import Wrong, call, close, expect_close, expect_unchanged

Rule = Callable[..., Any]
Mistake = tuple[Rule, str, Sequence[str]]  # the mistaken rule, what is wrong with it, hints


def exercise_1(answer: Any) -> None:
    """Who sends what in a ring reduce-scatter."""
    for world_size in (5, 2, 3, 8):  # five first: there the usual mistakes all differ
        _judge_schedule(answer, world_size)


def exercise_2(answer: Any) -> None:
    """How long a ring all-reduce takes."""
    cases = {
        "4 workers on a slow link": (1_200, 4, 1e3, 2.0),
        "2 workers": (1_000_000, 2, 1e7, 0.05),
        "32 workers and a slow start of each message": (1_000, 32, 1e6, 0.5),
        "one worker": (5_000_000, 1, 1e7, 0.01),
    }
    for on, case in cases.items():
        found, right = call(answer, *case, on=on), _seconds(*case)
        if close(found, right):
            continue
        if case[1] == 1:
            raise Wrong(
                "one worker needs no time: it has nobody to talk to",
                ["How many messages does your formula count for one worker?", "No messages, no latency."],
            )
        _recognise(found, case, _SECONDS_MISTAKES, on)
        expect_close(
            found, right, what="the time", on=on,
            hint=["Two questions: how many messages follow one another, and how long does one of them take?",
                  "A ring all-reduce is a reduce-scatter and then an all-gather. How many steps has each?"],
        )  # fmt: skip


def exercise_3(answer: Any) -> None:
    """The gradient of the global batch."""
    for on, (gradients, sizes) in _gradient_cases().items():
        found, right = call(answer, gradients, sizes, on=on), _global_gradient(gradients, sizes)
        if close(found, right, atol=1e-6):
            continue
        if 0 in sizes:
            _judge_with_empty_rank(found, gradients, sizes, on)
        _recognise(found, (gradients, sizes), _GRADIENT_MISTAKES, on)
        expect_close(
            found, right, what="the gradient", on=on, atol=1e-6,
            hint=["Imagine all examples on one machine: how much does each of them count there?",
                  "From each rank's mean, go back to the sum over its examples first."],
        )  # fmt: skip
    for on, case in _gradient_cases().items():
        _expect_lists_unchanged(answer, *case, on)


def exercise_4(answer: Any) -> None:
    """Top-k compression with error feedback."""
    cases = _compress_cases()
    for on, case in cases.items():
        found, right = call(answer, *case, on=on), _compress(*case)
        if close(found, right):
            continue
        _recognise(found, case, _COMPRESS_MISTAKES, on)
        _expect_sent_and_kept(found, right, case[2], on)
    for on, case in cases.items():
        expect_unchanged(
            answer, *case, on=on,
            hint=["Which of your lines writes into a tensor that the caller still needs?",
                  "gradient += … and residual.add_(…) change the caller's tensors; a plain + makes a new one."],
        )  # fmt: skip


def _recognise(found: Any, case: tuple[Any, ...], mistakes: Sequence[Mistake], on: str) -> None:
    """Raise `Wrong` with the mistake's own hints if ``found`` is what that mistake gives on ``case``."""
    for mistaken, message, hints in mistakes:
        if close(found, mistaken(*case)):
            raise Wrong(f"{message} (on {on})", hints)


# Exercise 1: the schedule of the ring


def _ring_step(rank: int, step: int, world_size: int) -> tuple[int, int]:
    return (rank - step) % world_size, (rank - step - 1) % world_size


def _schedule(rule: Rule, world_size: int) -> list[tuple[int, int]]:
    return [rule(rank, step, world_size) for rank in range(world_size) for step in range(world_size - 1)]


def _judge_schedule(answer: Any, world_size: int) -> None:
    def ask(rank: int, step: int, world_size: int) -> tuple[int, int]:
        on = f"rank {rank}, step {step} of {world_size} workers"
        return _chunks(call(answer, rank, step, world_size, on=on), on)

    found, right = _schedule(ask, world_size), _schedule(_ring_step, world_size)
    if found == right:
        return
    for mistaken, message, hints in _RING_MISTAKES:
        if found == _schedule(mistaken, world_size):
            raise Wrong(f"{message} (with {world_size} workers)", hints)
    wrong = next(index for index, pair in enumerate(found) if pair != right[index])
    rank, step = divmod(wrong, world_size - 1)
    on = f"rank {rank}, step {step} of {world_size} workers"
    if any(not 0 <= chunk < world_size for chunk in found[wrong]):
        raise Wrong(f"your function gives {found[wrong]}: there are only chunks 0 to {world_size - 1} (on {on})", _WRAP)
    which = "sent" if found[wrong][0] != right[wrong][0] else "received"
    raise Wrong(
        f"the chunk {which} is not the right one (on {on})",
        [
            "Draw three workers and their three chunks, and follow one chunk around the ring.",
            "What a rank receives in one step, it adds to its own and passes on in the next.",
            "A rank receives what its left-hand neighbour sends. So the first number decides the second.",
        ],
    )


def _chunks(found: Any, on: str) -> tuple[int, int]:
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        got = f"{len(found)} values" if isinstance(found, (tuple, list)) else "one value"
        raise Wrong(
            f"your function should return 2 values (the chunk sent, the chunk received), and returns {got} (on {on})",
            "In each step, every rank sends one chunk and receives another.",
        )
    try:
        return operator.index(found[0]), operator.index(found[1])
    except TypeError:
        raise Wrong(
            f"a chunk number should be a whole number (on {on})",
            "These numbers are used as indices. Does a single / stand somewhere, or quotation marks?",
        ) from None


_WRAP = [
    "The workers stand in a ring: to the left of rank 0 stands the last one. What does that mean for chunk -1?",
    "Python's % gives a number from 0 to world_size - 1 for negative numbers too.",
]
_BACKWARDS = [
    "After step 0, which chunk does a rank hold a sum of two for? That one it passes on in step 1.",
    "Chunks move to the right, towards higher ranks. So as the steps go on, which way does a rank's chunk number move?",
]
_RING_MISTAKES: list[Mistake] = [
    (
        lambda rank, step, n: ((rank + step) % n, (rank + step + 1) % n),
        "your chunks walk around the ring the other way",
        _BACKWARDS,
    ),
    (
        lambda rank, step, n: ((rank + step) % n, (rank + step - 1) % n),
        "from step 1 on, a rank sends a chunk that it has not yet received",
        _BACKWARDS,
    ),
    (
        lambda rank, step, n: ((rank - step) % n, (rank - step) % n),
        "your rank receives the chunk that it sends",
        [
            "What comes in is what the left-hand neighbour sends in the same step.",
            "Ask your own formula what rank - 1 sends.",
        ],
    ),
    (
        lambda rank, step, n: ((rank - step) % n, (rank - step + 1) % n),
        "the chunk sent is right, and the chunk received is the one that the right-hand neighbour sends",
        ["A rank sends to rank + 1. From whom does it receive, then?"],
    ),
    (
        lambda rank, step, n: (rank - step, rank - step - 1),
        "some of your chunk numbers are negative: the ring does not close",
        _WRAP,
    ),
    (
        lambda rank, step, n: ((rank - step) % n, rank - step - 1),
        "the chunk received is sometimes negative: the ring does not close there",
        _WRAP,
    ),
    (
        lambda rank, step, n: ((rank - step) % n, (rank - step) % n - 1),
        "the chunk received is sometimes -1: the ring does not close there",
        ["Which comes first, the remainder or the subtraction?", *_WRAP],
    ),
    (
        lambda rank, step, n: (rank - step, (rank - step - 1) % n),
        "the chunk sent is sometimes negative: the ring does not close there",
        _WRAP,
    ),
    (
        lambda rank, step, n: ((rank - step - 1) % n, (rank - step - 2) % n),
        "your schedule is one step ahead",
        ["Steps count from 0, and in step 0 a rank sends the chunk with its own number."],
    ),
    (
        lambda rank, step, n: ((rank - step + 1) % n, (rank - step) % n),
        "your schedule is one step behind: it is that of the all-gather, which comes afterwards",
        ["In step 0 of the reduce-scatter a rank sends the chunk with its own number. Does yours?"],
    ),
    (
        lambda rank, step, n: ((rank - step - 1) % n, (rank - step) % n),
        "the two chunks are swapped",
        ["The order asked for is: the chunk sent, then the chunk received."],
    ),
    (
        lambda rank, step, n: (rank, (rank - 1) % n),
        "your rank sends the same chunk in every step",
        [
            "That is right for step 0. What should it pass on afterwards?",
            "A sum grows as it travels: each rank adds its own share and passes the chunk on.",
        ],
    ),
    (
        lambda rank, step, n: ((rank + 1) % n, (rank - 1) % n),
        "these are the neighbours' ranks; wanted are the numbers of the chunks that travel",
        ["To whom a rank sends never changes. What it sends changes with each step."],
    ),
    (
        lambda rank, step, n: ((rank - step) % (n - 1), (rank - step - 1) % (n - 1)),
        "your chunk numbers wrap around one too early",
        ["How many chunks are there with world_size workers? It is the number of steps that is one smaller."],
    ),
]


# Exercise 2: the time of an all-reduce


def _seconds(size: float, workers: int, bandwidth: float, latency: float) -> float:
    return 2 * (workers - 1) * (latency + size / workers / bandwidth)


_SECONDS_MISTAKES: list[Mistake] = [
    (
        lambda size, n, bandwidth, latency: (n - 1) * (latency + size / n / bandwidth),
        "this is the time of half an all-reduce",
        [
            "After the reduce-scatter, each worker holds the sum of one chunk only. What is still to be done?",
            "The all-gather takes as many messages as the reduce-scatter.",
        ],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * (latency + size / bandwidth),
        "each of your messages carries the whole gradient",
        ["Why is the gradient cut up at all? How large is one of its chunks?"],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * size / n / bandwidth + latency,
        "the latency counts once only",
        ["Each message has to wait for the one before it, and each has its own start."],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * ((n - 1) * size / n / bandwidth + latency),
        "the latency counts twice only, once for each half",
        ["Each half is many messages, one after the other. How often is the latency paid in it?"],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * size / n / bandwidth,
        "the latency is left out",
        ["How long does a message without content take?"],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * latency,
        "only the latency counts",
        ["How long are the bytes of one message on their way?"],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * n * (latency + size / n / bandwidth),
        "you count one message too many in each half",
        ["A chunk starts on one worker. How many others does it have to visit?"],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * (latency + size / max(n - 1, 1) / bandwidth),
        "your chunks are too large: they are cut for one worker fewer",
        ["How many chunks are there: as many as workers, or as many as steps?"],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * latency + 2 * n / max(n - 1, 1) * size / bandwidth,
        "the fraction of the gradient that a worker sends is upside down",
        ["In each half a worker sends a little less than the whole gradient, never more."],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * n * (n - 1) * (latency + size / n / bandwidth),
        "you add up the messages of all workers",
        ["In each step all workers send at the same time. How many messages follow one another?"],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * (latency + size / n) / bandwidth,
        "the latency is divided by the bandwidth",
        ["What is its unit? It is in seconds already."],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * (latency + size / n * bandwidth),
        "a larger bandwidth makes your messages slower",
        ["Bytes, and bytes per second: which operation leaves seconds?"],
    ),
    (
        lambda size, n, bandwidth, latency: 2 * (n - 1) * (latency + 8 * size / n / bandwidth),
        "you turn bytes into bits",
        ["Both the size and the bandwidth are in bytes here."],
    ),
]


# Exercise 3: the gradient of the global batch


def _gradient_cases() -> dict[str, tuple[list[Tensor], list[int]]]:
    def case(seed: int, shape: tuple[int, ...], sizes: list[int], empty: float = torch.nan) -> Any:
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(shape, generator=generator) for _ in sizes]
        # A rank that divides a sum over nothing by zero has NaN; another may have left an old gradient there
        return [torch.full(shape, empty) if n == 0 else g for g, n in zip(gradients, sizes, strict=True)], sizes

    return {
        "three ranks": case(31, (6,), [3, 5, 2]),
        "two ranks with a matrix": case(32, (3, 4), [1, 6]),
        "a single rank": case(33, (4,), [7]),
        "four ranks with as many examples each": case(34, (2, 2, 3), [4, 4, 4, 4]),
        "three ranks, the second without examples and with NaN for a gradient": case(35, (5,), [4, 0, 3]),
        "four ranks, the first without examples and with NaN for a gradient": case(36, (2, 3), [0, 2, 1, 6]),
        "three ranks, the last without examples and with an old gradient": case(37, (3,), [2, 3, 0], empty=9.0),
    }


def _global_gradient(gradients: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    weighted = [g.double() * n for g, n in zip(gradients, sizes, strict=True) if n > 0]
    return (torch.stack(weighted).sum(0) / sum(sizes)).to(gradients[0].dtype)


def _judge_with_empty_rank(found: Any, gradients: list[Tensor], sizes: list[int], on: str) -> None:
    if isinstance(found, Tensor) and found.is_floating_point() and found.isnan().any():
        raise Wrong(
            f"a rank without examples spoils the gradient of all: the result holds NaN (on {on})",
            [
                "What is 0 * NaN?",
                "A weight of zero does not help against NaN. Such a rank must not enter the sum at all.",
            ],
        )
    if close(found, torch.zeros_like(gradients[0])):
        raise Wrong(
            f"the other ranks' gradients are lost together with the NaN (on {on})",
            ["Where one term is NaN, the whole sum is. Deal with NaN before the sum, not after it."],
        )
    filled = [g.nan_to_num() for g in gradients]
    taking_part = (filled, [1 if n == 0 else n for n in sizes])
    if close(found, _global_gradient(*taking_part), atol=1e-6):
        raise Wrong(
            f"a rank without examples counts as if it had one (on {on})",
            ["How many examples are there in the global batch?"],
        )
    _recognise(found, (filled, sizes), _GRADIENT_MISTAKES, on)


def _expect_lists_unchanged(answer: Any, gradients: list[Tensor], sizes: list[int], on: str) -> None:
    handed, handed_sizes = copy.deepcopy(gradients), list(sizes)
    call(lambda: answer(handed, handed_sizes), on=on)
    hints = [
        "Which of your lines writes into a tensor or a list that the caller still needs?",
        "g *= n and g.mul_(n) change the caller's tensor, and so does += on the first of them. g * n makes a new one.",
    ]
    # Compared by close, for which NaN equals NaN
    if not close(handed, gradients, rtol=0, atol=0):
        raise Wrong(f"your function changes the gradients it is handed in place (on {on})", hints)
    if handed_sizes != sizes:
        raise Wrong(f"your function changes the list of sizes it is handed (on {on})", hints[:1])


def _sum(gradients: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([g * w for g, w in zip(gradients, weights, strict=True)]).sum(0)


_GRADIENT_MISTAKES: list[Mistake] = [
    (
        lambda gradients, sizes: _sum(gradients, [1 / len(sizes)] * len(sizes)),
        "this is the plain average of the ranks: an example on a small rank counts for more than one on a large rank",
        [
            "It is right only if all ranks have as many examples. How much should a rank with twice as many count?",
            "Each gradient belongs to a mean over its rank's examples. Turn the means into sums first.",
        ],
    ),
    (
        lambda gradients, sizes: _sum(gradients, [1] * len(sizes)),
        "this is the sum of the ranks' gradients",
        [
            "If all ranks had the same gradient, what should the global one be?",
            "Wanted is the gradient of the mean over all examples.",
        ],
    ),
    (
        lambda gradients, sizes: _sum(gradients, sizes),
        "this is the gradient of the summed loss; wanted is that of the mean over all examples",
        ["The weights are in the right proportion. What should they add up to?"],
    ),
    (
        lambda gradients, sizes: _sum(gradients, [n / len(sizes) for n in sizes]),
        "the weighted sum is divided by the number of ranks",
        ["The mean is over the examples. How many of them are there in all?"],
    ),
    (
        lambda gradients, sizes: _sum(gradients, [1 / sum(sizes)] * len(sizes)),
        "you treat each rank's gradient as a sum over its examples",
        ["They are gradients of a mean: the division by the rank's own size is already in them."],
    ),
    (
        lambda gradients, sizes: _sum(gradients, [1 / n if n else 0 for n in sizes]),
        "each gradient is divided by its rank's size once more",
        ["They are gradients of a mean: that division is already in them. Should a large rank count for less?"],
    ),
    (
        lambda gradients, sizes: _sum(gradients, [n / max(sizes) for n in sizes]),
        "your weights are relative to the largest rank",
        ["They are in the right proportion. What should they add up to?"],
    ),
]


# Exercise 4: top-k with error feedback


def _compress_cases() -> dict[str, tuple[Tensor, Tensor, int]]:
    def case(seed: int, shape: tuple[int, ...], k: int) -> tuple[Tensor, Tensor, int]:
        generator = torch.Generator().manual_seed(seed)
        gradient, residual = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        return gradient, residual, k

    first = case(45, (6,), 2)
    return {
        "a matrix in mid-training": case(41, (3, 4), 3),
        "a vector in mid-training": case(42, (9,), 4),
        "a tensor with three dimensions": case(43, (2, 3, 2), 1),
        "k as large as the tensor": case(44, (2, 3), 6),
        "the very first step, when the residual is zero": (first[0], torch.zeros(6, dtype=torch.float64), 2),
    }


def _largest(values: Tensor, k: int) -> Tensor:
    """1 at the k largest entries of the whole tensor, 0 elsewhere."""
    mask = torch.zeros_like(values).flatten()
    mask[values.flatten().topk(min(max(k, 0), values.numel())).indices] = 1
    return mask.view_as(values)


def _compress(gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    total = gradient + residual
    sent = total * _largest(total.abs(), k)
    return sent, total - sent


def _choosing(criterion: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Compression that sends the k entries where ``criterion(gradient, residual)`` is largest."""

    def compress(gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
        sent = (gradient + residual) * _largest(criterion(gradient, residual), k)
        return sent, gradient + residual - sent

    return compress


def _keeping(kept: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rule:
    """Compression that sends the right entries, with ``kept(gradient, residual, sent)`` for its new residual."""

    def compress(gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
        sent, _ = _compress(gradient, residual, k)
        return sent, kept(gradient, residual, sent)

    return compress


def _top_of_each_row(gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    total = gradient + residual
    best = total.abs().topk(min(k, total.shape[-1]), dim=-1).indices
    sent = total * torch.zeros_like(total).scatter(-1, best, 1)
    return sent, total - sent


def _sending_the_gradient(gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sent = gradient * _largest((gradient + residual).abs(), k)
    return sent, gradient + residual - sent


def _adding_the_residual_late(gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sent = gradient * _largest(gradient.abs(), k)
    return sent, gradient + residual - sent


def _packed(gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    total = (gradient + residual).flatten()
    return total[total.abs().topk(k).indices], _compress(gradient, residual, k)[1]


def _magnitudes(gradient: Tensor, residual: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sent, _ = _compress(gradient, residual, k)
    return sent.abs(), gradient + residual - sent.abs()


_BALANCE = [
    "Nothing may be lost: what is sent and what is kept must add up to what there was. What was there?",
    "Where an entry is sent in full, what is left of it?",
]
_COMPRESS_MISTAKES: list[Mistake] = [
    (
        lambda gradient, residual, k: _compress(gradient, torch.zeros_like(residual), k),
        "the old residual is lost",
        [
            "What was not sent in the last step should get its chance now. Where does it enter?",
            "It joins the gradient before anything else is done.",
        ],
    ),
    (
        _choosing(lambda gradient, residual: gradient.abs()),
        "the entries are chosen by the gradient alone",
        [
            "An entry that is small in every step should be sent some day. By what does it grow until then?",
            "The choice comes after the residual has been added, not before.",
        ],
    ),
    (
        _adding_the_residual_late,
        "the residual is added only after the entries are chosen and sent",
        ["What is sent should hold what earlier steps left behind. In which order do the two lines come?"],
    ),
    (
        _sending_the_gradient,
        "the right entries are chosen, but only their gradient is sent",
        ["When an entry's turn has come, how much of it should travel?"],
    ),
    (
        _choosing(lambda gradient, residual: residual.abs()),
        "the entries are chosen by the residual alone",
        ["The gradient of this step counts too. What is large once both are put together?"],
    ),
    (
        _choosing(lambda gradient, residual: gradient + residual),
        "the entries with the largest values are sent, so a large negative one never is",
        ["How much a weight would move does not depend on the sign."],
    ),
    (
        _choosing(lambda gradient, residual: -(gradient + residual).abs()),
        "the smallest entries are sent",
        ["Which entries change the weights most?"],
    ),
    (
        _top_of_each_row,
        "the k largest entries of each row are sent",
        ["k is for the whole tensor. How could it be looked at as one long vector?"],
    ),
    (
        _keeping(lambda gradient, residual, sent: gradient + residual),
        "what was sent stays in the residual too, and will be sent again",
        _BALANCE,
    ),
    (
        _keeping(lambda gradient, residual, sent: gradient - sent),
        "the new residual forgets the old one",
        _BALANCE,
    ),
    (
        _keeping(lambda gradient, residual, sent: residual - sent),
        "the new residual forgets the gradient",
        _BALANCE,
    ),
    (
        _keeping(lambda gradient, residual, sent: 2 * residual + gradient - sent),
        "the old residual enters the new one twice",
        ["You have already added it once, before the choice."],
    ),
    (
        _keeping(lambda gradient, residual, sent: sent - gradient - residual),
        "the sign of your residual is the wrong one",
        ["Added to the next gradient, it should make up for what was held back."],
    ),
    (
        _keeping(lambda gradient, residual, sent: residual),
        "the old residual is returned as the new one",
        ["What is sent is right. What does this step leave behind?"],
    ),
    (
        _magnitudes,
        "magnitudes are sent: the signs are lost",
        ["The magnitude is for the choice only. What travels?"],
    ),
    (
        _packed,
        "only the k numbers are returned; wanted is a tensor of the gradient's shape with zeros elsewhere",
        ["The receiver must know where they belong. Put them back in their places."],
    ),
    (
        lambda gradient, residual, k: _compress(gradient, residual, k - 1),
        "one entry too few is sent",
        ["Does the entry that is just as large as your threshold count?"],
    ),
    (
        lambda gradient, residual, k: _compress(gradient, residual, k + 1),
        "one entry too many is sent",
        ["Which entry of the sorted magnitudes is your threshold? Counting starts at 0."],
    ),
    (
        lambda gradient, residual, k: _compress(gradient, residual, k)[::-1],
        "your function returns the residual first",
        ["The order asked for is: what is sent, then the new residual."],
    ),
    (
        lambda gradient, residual, k: _compress(gradient, residual, k)[0],
        "your function returns only what is sent",
        ["The next step needs the new residual too."],
    ),
]


def _expect_sent_and_kept(found: Any, right: tuple[Tensor, Tensor], k: int, on: str) -> None:
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        got = f"{len(found)} values" if isinstance(found, (tuple, list)) else "one value"
        raise Wrong(
            f"your function should return 2 values (what is sent, the new residual), and returns {got} (on {on})",
            "The next step needs the residual that this one leaves behind.",
        )
    sent, kept = found
    if isinstance(sent, Tensor) and sent.shape == right[0].shape and (count := int(sent.count_nonzero())) != k:
        raise Wrong(
            f"{count} {'entry is' if count == 1 else 'entries are'} sent, and k is {k} (on {on})",
            "k counts the entries of the whole tensor that are not zero.",
        )
    where = "First the residual joins the gradient, then the entries are chosen by magnitude."
    expect_close(sent, right[0], what="what is sent", on=on, hint=where)
    expect_close(kept, right[1], what="the new residual", on=on, hint=_BALANCE)
