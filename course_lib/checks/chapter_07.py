"""Checks of chapter 7, parallel training: rings, gradients, a figure, a bug, a plan, a project.

The right answers are written out here once more, with each usual mistake beside them, so that a check depends neither
on the chapter's module nor on what the learner imports. A single chunk number may be right by luck: the schedule of the
ring is judged as a whole, for all ranks and steps.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from course_lib.lab.judging import (
    Design,
    Method,
    Mistake,
    OpenProject,
    Reading,
    Rule,
    Wrong,
    call,
    expect_close,
    parts_of,
)
from course_lib.parallel import scaling

# Exercise 1: the schedule of the ring


def _ring_step(rank: int, step: int, world_size: int) -> tuple[int, int]:
    return (rank - step) % world_size, (rank - step - 1) % world_size


def _schedule(rule: Rule, world_size: int) -> Tensor:
    """What each rank sends and receives in each step, ``[ranks * steps, 2]``."""
    moves = [(rank, step) for rank in range(world_size) for step in range(world_size - 1)]
    return torch.tensor([_chunks(rule(rank, step, world_size)) for rank, step in moves])


def _chunks(found: Any) -> tuple[int, int]:
    two = "In each step, every rank sends one chunk and receives another."
    sent, received = parts_of(found, ("the chunk sent", "the chunk received"), two)
    try:
        return operator.index(sent), operator.index(received)
    except TypeError:
        indices = "These numbers are used as indices. Does a single / stand somewhere, or quotation marks?"
        raise Wrong("a chunk number should be a whole number", indices) from None


def _first_wrong_chunk(found: Tensor, right: Tensor, world_size: int) -> None:
    place = int((found != right).any(1).nonzero()[0])
    where = "rank {}, step {}".format(*divmod(place, world_size - 1))
    sent, received = found[place].tolist()
    if not (0 <= sent < world_size and 0 <= received < world_size):
        there = f"there are only chunks 0 to {world_size - 1}"
        raise Wrong(f"your function gives {(sent, received)} for {where}: {there}", _WRAP)
    which = "sent" if sent != right[place, 0] else "received"
    raise Wrong(
        f"the chunk {which} is not the right one for {where}",
        ["Draw three workers and their three chunks, and follow one chunk around the ring.",
         "What a rank receives in one step, it adds to its own and passes on in the next.",
         "A rank receives what its left-hand neighbour sends. So the first number decides the second."],
    )  # fmt: skip


_WRAP = [
    "The workers stand in a ring: to the left of rank 0 stands the last one. What does that mean for chunk -1?",
    "Python's % gives a number from 0 to world_size - 1 for negative numbers too.",
]
_BACKWARDS = [
    "After step 0, which chunk does a rank hold a sum of two for? That one it passes on in step 1.",
    "Chunks move to the right, towards higher ranks. So as the steps go on, which way does a rank's chunk number move?",
]

exercise_1 = Method(
    "Who sends what in a ring reduce-scatter",
    right=_ring_step,
    ask=_schedule,
    explain=_first_wrong_chunk,
    cases={f"{workers} workers": (workers,) for workers in (5, 2, 3, 8)},  # of five, the mistakes all differ
    mistakes=[
        Mistake(lambda rank, step, n: ((rank + step) % n, (rank + step + 1) % n),
                "your chunks walk around the ring the other way", _BACKWARDS),
        Mistake(lambda rank, step, n: ((rank + step) % n, (rank + step - 1) % n),
                "from step 1 on, a rank sends a chunk that it has not yet received", _BACKWARDS),
        Mistake(lambda rank, step, n: ((rank - step) % n, (rank - step) % n),
                "your rank receives the chunk that it sends",
                ["What comes in is what the left-hand neighbour sends in the same step.",
                 "Ask your own formula what rank - 1 sends."]),
        Mistake(lambda rank, step, n: ((rank - step) % n, (rank - step + 1) % n),
                "the chunk sent is right, and the chunk received is the one that the right-hand neighbour sends",
                "A rank sends to rank + 1. From whom does it receive, then?"),
        Mistake(lambda rank, step, n: (rank - step, rank - step - 1),
                "some of your chunk numbers are negative: the ring does not close", _WRAP),
        Mistake(lambda rank, step, n: ((rank - step) % n, rank - step - 1),
                "the chunk received is sometimes negative: the ring does not close there", _WRAP),
        Mistake(lambda rank, step, n: ((rank - step) % n, (rank - step) % n - 1),
                "the chunk received is sometimes -1: the ring does not close there",
                ["Which comes first, the remainder or the subtraction?", *_WRAP]),
        Mistake(lambda rank, step, n: (rank - step, (rank - step - 1) % n),
                "the chunk sent is sometimes negative: the ring does not close there", _WRAP),
        Mistake(lambda rank, step, n: _ring_step(rank, step + 1, n), "your schedule is one step ahead",
                "Steps count from 0, and in step 0 a rank sends the chunk with its own number."),
        Mistake(lambda rank, step, n: _ring_step(rank, step - 1, n),
                "your schedule is one step behind: it is that of the all-gather, which comes afterwards",
                "In step 0 of the reduce-scatter a rank sends the chunk with its own number. Does yours?"),
        Mistake(lambda *case: _ring_step(*case)[::-1], "the two chunks are swapped",
                "The order asked for is: the chunk sent, then the chunk received."),
        Mistake(lambda rank, step, n: _ring_step(rank, 0, n), "your rank sends the same chunk in every step",
                ["That is right for step 0. What should it pass on afterwards?",
                 "A sum grows as it travels: each rank adds its own share and passes the chunk on."]),
        Mistake(lambda rank, step, n: ((rank + 1) % n, (rank - 1) % n),
                "these are the neighbours' ranks; the numbers of the chunks that travel are wanted",
                "To whom a rank sends never changes. What it sends changes with each step."),
        Mistake(lambda rank, step, n: _ring_step(rank, step, n - 1), "your chunk numbers wrap around one too early",
                "How many chunks are there with world_size workers? It is the number of steps that is one smaller."),
    ],
)  # fmt: skip


# Exercise 2: the time of an all-reduce


def _seconds(size: float, n: int, bandwidth: float, latency: float) -> float:
    return 2 * (n - 1) * (latency + size / n / bandwidth)


def _alone(found: Any, right: float, size: float, n: int, bandwidth: float, latency: float) -> None:
    if n == 1:
        raise Wrong(
            "one worker needs no time: it has nobody to talk to",
            ["How many messages does your formula count for one worker?", "No messages, no latency."],
        )


exercise_2 = Method(
    "How long a ring all-reduce takes",
    right=_seconds,
    what="the time",
    hint=["Two questions: how many messages follow one another, and how long does one of them take?",
          "A ring all-reduce is a reduce-scatter and then an all-gather. How many steps has each?"],
    explain=_alone,
    cases={
        "4 workers on a slow link": (1_200, 4, 1e3, 2.0),
        "2 workers": (1_000_000, 2, 1e7, 0.05),
        "32 workers and a slow start of each message": (1_000, 32, 1e6, 0.5),
        "one worker": (5_000_000, 1, 1e7, 0.01),
    },
    mistakes=[
        Mistake(lambda *case: _seconds(*case) / 2, "this is the time of half an all-reduce",
                ["After the reduce-scatter, each worker holds the sum of one chunk only. What is still to be done?",
                 "The all-gather takes as many messages as the reduce-scatter."]),
        Mistake(lambda size, n, bandwidth, latency: 2 * (n - 1) * (latency + size / bandwidth),
                "each of your messages carries the whole gradient",
                "Why is the gradient cut up at all? How large is one of its chunks?"),
        Mistake(lambda size, n, bandwidth, latency: 2 * (n - 1) * size / n / bandwidth + latency,
                "the latency counts once only",
                "Each message has to wait for the one before it, and each has its own start."),
        Mistake(lambda size, n, bandwidth, latency: 2 * ((n - 1) * size / n / bandwidth + latency),
                "the latency counts twice only, once for each half",
                "Each half is many messages, one after the other. How often is the latency paid in it?"),
        Mistake(lambda size, n, bandwidth, latency: _seconds(size, n, bandwidth, 0), "the latency is left out",
                "How long does a message without content take?"),
        Mistake(lambda size, n, bandwidth, latency: _seconds(0, n, bandwidth, latency), "only the latency counts",
                "How long are the bytes of one message on their way?"),
        Mistake(lambda size, n, bandwidth, latency: 2 * n * (latency + size / n / bandwidth),
                "you count one message too many in each half",
                "A chunk starts on one worker. How many others does it have to visit?"),
        Mistake(lambda size, n, bandwidth, latency: 2 * (n - 1) * (latency + size / (n - 1) / bandwidth),
                "your chunks are too large: they are cut for one worker fewer",
                "How many chunks are there: as many as workers, or as many as steps?"),
        Mistake(lambda size, n, bandwidth, latency: 2 * (n - 1) * latency + 2 * n / (n - 1) * size / bandwidth,
                "the fraction of the gradient that a worker sends is upside down",
                "In each half a worker sends a little less than the whole gradient, never more."),
        Mistake(lambda size, n, *link: n * _seconds(size, n, *link), "you add up the messages of all workers",
                "In each step all workers send at the same time. How many messages follow one another?"),
        Mistake(lambda size, n, bandwidth, latency: 2 * (n - 1) * (latency + size / n) / bandwidth,
                "the latency is divided by the bandwidth", "What is its unit? It is in seconds already."),
        Mistake(lambda size, n, bandwidth, latency: _seconds(size, n, 1 / bandwidth, latency),
                "a larger bandwidth makes your messages slower",
                "Bytes, and bytes per second: which operation leaves seconds?"),
        Mistake(lambda size, *rest: _seconds(8 * size, *rest), "you turn bytes into bits",
                "Both the size and the bandwidth are in bytes here."),
    ],
)  # fmt: skip


# Exercise 3: the gradient of the global batch


def _gradients(seed: int, shape: tuple[int, ...], sizes: list[int], empty: float = torch.nan) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(shape, generator=generator) for _ in sizes]
    # A rank that divides a sum over nothing by zero has NaN; another may have left an old gradient there
    return [torch.full(shape, empty) if n == 0 else g for g, n in zip(gradients, sizes, strict=True)], sizes


def _global_gradient(gradients: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    weighted = [g.double() * n for g, n in zip(gradients, sizes, strict=True) if n > 0]
    return (torch.stack(weighted).sum(0) / sum(sizes)).to(gradients[0].dtype)


def _weighted(weight: Callable[[int, Sequence[int]], float]) -> Rule:
    """The sum of all gradients, each times ``weight(n, sizes)``."""
    return lambda gradients, sizes: sum(g * weight(n, sizes) for g, n in zip(gradients, sizes, strict=True))


exercise_3 = Method(
    "The gradient of the global batch",
    right=_global_gradient,
    what="the gradient",
    hint=["Imagine all examples on one machine: how much does each of them count there?",
          "From each rank's mean, go back to the sum over its examples first."],
    atol=1e-6,
    cases={
        "three ranks": _gradients(31, (6,), [3, 5, 2]),
        "two ranks with a matrix": _gradients(32, (3, 4), [1, 6]),
        "a single rank": _gradients(33, (4,), [7]),
        "four ranks with as many examples each": _gradients(34, (2, 2, 3), [4, 4, 4, 4]),
        "three ranks, the second without examples and with NaN for a gradient": _gradients(35, (5,), [4, 0, 3]),
        "four ranks, the first without examples and with NaN for a gradient": _gradients(36, (2, 3), [0, 2, 1, 6]),
        "three ranks, the last without examples and with an old gradient": _gradients(37, (3,), [2, 3, 0], empty=9.0),
    },
    mistakes=[
        Mistake(_weighted(lambda n, sizes: 1 / len(sizes)),
                "this is the plain average of the ranks: an example on a small rank counts for more than one on a "
                "large rank",
                ["It is right only if all ranks have as many examples. How much should one with twice as many count?",
                 "Each gradient belongs to a mean over its rank's examples. Turn the means into sums first."]),
        Mistake(_weighted(lambda n, sizes: 1), "this is the sum of the ranks' gradients",
                ["If all ranks had the same gradient, what should the global one be?",
                 "What is wanted is the gradient of the mean over all examples."]),
        Mistake(_weighted(lambda n, sizes: n),
                "this is the gradient of the summed loss; what is wanted is that of the mean over all examples",
                "The weights are in the right proportion. What should they add up to?"),
        Mistake(_weighted(lambda n, sizes: n / len(sizes)), "the weighted sum is divided by the number of ranks",
                "The mean is over the examples. How many of them are there in all?"),
        Mistake(_weighted(lambda n, sizes: 1 / sum(sizes)),
                "you treat each rank's gradient as a sum over its examples",
                "They are gradients of a mean: the division by the rank's own size is already in them."),
        Mistake(_weighted(lambda n, sizes: 1 / n), "each gradient is divided by its rank's size once more",
                "They are gradients of a mean: that division is already in them. Should a large rank count for less?"),
        Mistake(_weighted(lambda n, sizes: n / max(sizes)), "your weights are relative to the largest rank",
                "They are in the right proportion. What should they add up to?"),
        Mistake(_weighted(lambda n, sizes: n / sum(sizes)),
                "a rank without examples spoils the gradient of all: the result holds NaN",
                ["What is 0 * NaN?",
                 "A weight of zero does not help against NaN. Such a rank must not enter the sum at all."]),
        Mistake(lambda gradients, sizes: _weighted(lambda n, sizes: n / sum(sizes))(gradients, sizes).nan_to_num(),
                "the other ranks' gradients are lost together with the NaN",
                "Where one term is NaN, the whole sum is. Deal with NaN before the sum, not after it."),
        Mistake(lambda gradients, sizes: _global_gradient([g.nan_to_num() for g in gradients],
                                                          [max(n, 1) for n in sizes]),
                "a rank without examples counts as if it had one",
                "How many examples are there in the global batch?"),
    ],
    unchanged=["Which of your lines writes into a tensor or a list that the caller still needs?",
               "g *= n and g.mul_(n) change the caller's tensor, and so does += on the first of them. g * n makes a "
               "new one."],
)  # fmt: skip


# Exercise 4: top-k with error feedback


def _mid_training(seed: int, shape: tuple[int, ...], k: int) -> tuple[Tensor, Tensor, int]:
    gradient, residual = torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gradient, residual, k


def _largest(values: Tensor, k: int) -> Tensor:
    """1 at the k largest entries of the whole tensor, 0 elsewhere."""
    mask = torch.zeros_like(values).flatten()
    mask[values.flatten().topk(k).indices] = 1
    return mask.view_as(values)


def _compress(
    g: Tensor,
    r: Tensor,
    k: int,
    *,
    chosen: Rule = lambda g, r: (g + r).abs(),
    travels: Rule = lambda g, r: g + r,
    kept: Rule = lambda g, r, sent: g + r - sent,
) -> tuple[Tensor, Tensor]:
    """What is sent, and the new residual; the other arguments make the usual mistakes."""
    sent = travels(g, r) * _largest(chosen(g, r), k)
    return sent, kept(g, r, sent)


def _top_of_each_row(g: Tensor, r: Tensor, k: int) -> tuple[Tensor, Tensor]:
    total = g + r
    sent = total * torch.zeros_like(total).scatter(-1, total.abs().topk(k, dim=-1).indices, 1)
    return sent, total - sent


def _packed(g: Tensor, r: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sent, kept = _compress(g, r, k)
    return sent[sent != 0], kept


def _sent_and_kept(found: Any, right: tuple[Tensor, Tensor], g: Tensor, r: Tensor, k: int) -> None:
    leaves = "The next step needs the residual that this one leaves behind."
    sent, kept = parts_of(found, ("what is sent", "the new residual"), leaves)
    if isinstance(sent, Tensor) and sent.shape == g.shape and (count := int(sent.count_nonzero())) != k:
        raise Wrong(
            f"{count} {'entry is' if count == 1 else 'entries are'} sent, and k is {k}",
            "k counts the entries of the whole tensor that are not zero.",
        )
    order = "First the residual joins the gradient, then the entries are chosen by magnitude."
    expect_close(sent, right[0], what="what is sent", hint=order)
    expect_close(kept, right[1], what="the new residual", hint=_BALANCE)


_BALANCE = [
    "Nothing may be lost: what is sent and what is kept must add up to what there was. What was there?",
    "Where an entry is sent in full, what is left of it?",
]

exercise_4 = Method(
    "Top-k compression with error feedback",
    right=_compress,
    explain=_sent_and_kept,
    cases={
        "a matrix in mid-training": _mid_training(41, (3, 4), 3),
        "a vector in mid-training": _mid_training(42, (9,), 4),
        "a tensor with three dimensions": _mid_training(43, (2, 3, 2), 1),
        "k as large as the tensor": _mid_training(44, (2, 3), 6),
        "the very first step, when the residual is zero": (
            _mid_training(45, (6,), 2)[0], torch.zeros(6, dtype=torch.float64), 2
        ),
    },
    mistakes=[
        Mistake(lambda g, r, k: _compress(g, 0 * r, k), "the old residual is lost",
                ["What was not sent in the last step should get its chance now. Where does it enter?",
                 "It joins the gradient before anything else is done."]),
        Mistake(partial(_compress, chosen=lambda g, r: g.abs()), "the entries are chosen by the gradient alone",
                ["An entry that is small in every step should be sent some day. By what does it grow until then?",
                 "The choice comes after the residual has been added, not before."]),
        Mistake(partial(_compress, chosen=lambda g, r: g.abs(), travels=lambda g, r: g),
                "the residual is added only after the entries are chosen and sent",
                "What is sent should hold what earlier steps left behind. In which order do the two lines come?"),
        Mistake(partial(_compress, travels=lambda g, r: g),
                "the right entries are chosen, but only their gradient is sent",
                "When an entry's turn has come, how much of it should travel?"),
        Mistake(partial(_compress, chosen=lambda g, r: r.abs()), "the entries are chosen by the residual alone",
                "The gradient of this step counts too. What is large once both are put together?"),
        Mistake(partial(_compress, chosen=lambda g, r: g + r),
                "the entries with the largest values are sent, so a large negative one never is",
                "How much a weight would move does not depend on the sign."),
        Mistake(partial(_compress, chosen=lambda g, r: -(g + r).abs()), "the smallest entries are sent",
                "Which entries change the weights most?"),
        Mistake(_top_of_each_row, "the k largest entries of each row are sent",
                "k is for the whole tensor. How could it be looked at as one long vector?"),
        Mistake(partial(_compress, kept=lambda g, r, sent: g + r),
                "what was sent stays in the residual too, and will be sent again", _BALANCE),
        Mistake(partial(_compress, kept=lambda g, r, sent: g - sent), "the new residual forgets the old one", _BALANCE),
        Mistake(partial(_compress, kept=lambda g, r, sent: r - sent), "the new residual forgets the gradient",
                _BALANCE),
        Mistake(partial(_compress, kept=lambda g, r, sent: 2 * r + g - sent),
                "the old residual enters the new one twice", "You have already added it once, before the choice."),
        Mistake(partial(_compress, kept=lambda g, r, sent: sent - g - r),
                "the sign of your residual is the wrong one",
                "Added to the next gradient, it should make up for what was held back."),
        Mistake(partial(_compress, kept=lambda g, r, sent: r), "the old residual is returned as the new one",
                "What is sent is right. What does this step leave behind?"),
        Mistake(partial(_compress, travels=lambda g, r: (g + r).abs()), "magnitudes are sent: the signs are lost",
                "The magnitude is for the choice only. What travels?"),
        Mistake(_packed,
                "only the k numbers are returned; what is wanted is a tensor of the gradient's shape with zeros "
                "elsewhere",
                "The receiver must know where they belong. Put them back in their places."),
        Mistake(lambda g, r, k: _compress(g, r, k - 1), "one entry too few is sent",
                "Does the entry that is just as large as your threshold count?"),
        Mistake(lambda g, r, k: _compress(g, r, k + 1), "one entry too many is sent",
                "Which entry of the sorted magnitudes is your threshold? Counting starts at 0."),
        Mistake(lambda *case: _compress(*case)[::-1], "your function returns the residual first",
                "The order asked for is: what is sent, then the new residual."),
        Mistake(lambda *case: _compress(*case)[0], "your function returns only what is sent",
                "The next step needs the new residual too."),
    ],
    unchanged=["Which of your lines writes into a tensor that the caller still needs?",
               "gradient += … and residual.add_(…) change the caller's tensors; a plain + makes a new one."],
)  # fmt: skip


# Exercise 5: what a faster link would be good for

exercise_5 = Reading(
    "Whose job gains most from a faster link? A figure to read",
    right=("Cleo", "c"),
    choices={
        "Ada": "Ada's link is busy for longest, but almost all of it is hidden behind the computing",
        "Ben": "Ben waits for his link for longest, but for its latencies, which a larger bandwidth leaves as they are",
        "Cleo": "",
        "Dan": "Dan's step is the longest, and most of it is spent waiting for data, not for the link",
    },
    reasons={
        "a": "what happens while the network computes costs nothing, however long it is",
        "b": "of what sticks out, only the bytes travel faster; a message's start does not",
        "c": "",
        "d": "a long step may wait for something else than the link",
    },
    hint="Halve the bytes' part of each link by eye, and look where each step then ends.",
    reason_hint="Which part of a step would be shorter tomorrow, and by how much?",
)

# Exercise 6: the batch's variance from those of its parts


def _moments(
    means: Tensor,
    variances: Tensor,
    counts: Tensor,
    weigh: Callable[[Tensor], Tensor] = lambda counts: counts / counts.sum(),
    about: Callable[[Tensor, Tensor], Tensor] = lambda means, mean: (means - mean) ** 2,
) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[channels]`` of all examples, from each rank's ``[ranks, channels]``."""
    share = weigh(counts.to(means.dtype))[:, None]
    mean = (share * means).sum(0)
    return mean, (share * (variances + about(means, mean))).sum(0)


def _with_variance(rule: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rule:
    return lambda means, variances, counts: (_moments(means, variances, counts)[0], rule(means, variances, counts))


def _parts(seed: int, counts: Sequence[int], channels: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, channels, generator=generator, dtype=torch.float64) + rank for rank, n in enumerate(counts)]
    means, variances = (torch.stack([f(part) for part in parts]) for f in (lambda x: x.mean(0), _spread))
    return means, variances, torch.tensor(counts)


def _spread(x: Tensor) -> Tensor:
    return x.var(0, correction=0)


exercise_6 = Method(
    "Find the bug: the variance of a batch that is spread over ranks",
    right=_moments,
    what=("the mean", "the variance"),
    hint="Try it on two ranks with one example each, 0 and 10. How far apart are the examples of that batch?",
    cases={
        "three ranks with 5, 2 and 9 examples": _parts(71, (5, 2, 9), 4),
        "two ranks with as many examples each": _parts(72, (6, 6), 3),
        "a single rank": _parts(73, (8,), 2),
        "four ranks, three of them with one example": _parts(74, (1, 7, 1, 1), 3),
    },
    mistakes=[
        Mistake(partial(_moments, about=lambda means, mean: torch.zeros_like(means)),
                "the spread between the ranks' means is missing from the variance",
                ["Each rank's variance is measured from that rank's own mean. From which mean should it be?",
                 "Of all examples, the variance is the mean square less the square of the mean."]),
        Mistake(partial(_moments, weigh=lambda counts: torch.full_like(counts, 1 / len(counts))),
                "all ranks count alike, however many examples they have",
                "An example on a small rank should count for as much as any other."),
        Mistake(partial(_moments, about=lambda means, mean: means**2),
                "this is the mean square of the examples, not their variance",
                "What is still to be taken away from it?"),
        Mistake(partial(_moments, about=lambda means, mean: mean**2 - means**2),
                "the spread between the ranks is taken away, where it should be added",
                "Can a batch be less spread out than its parts are on average?"),
        Mistake(_with_variance(lambda means, variances, counts: _moments(means, 0 * variances, counts)[1]),
                "only the spread between the ranks is left of the variance",
                "What became of the spread within each rank?"),
        Mistake(_with_variance(lambda means, variances, counts: _moments(means, variances, counts)[1].sqrt()),
                "this is the standard deviation; what is wanted is the variance", "The last line does one thing "
                                                                                  "too many."),
        Mistake(_with_variance(lambda means, variances, counts: _moments(means, variances, counts)[1]
                               * counts.sum() / (counts.sum() - 1)),
                "the sum of squares is divided by one example fewer",
                "BatchNorm normalises by the variance of the batch itself, divided by the number of its examples."),
        Mistake(_with_variance(lambda means, variances, counts: _moments(means, variances, counts)[1] * counts.sum()),
                "the squares are summed, not averaged", "The shares of the ranks add up to one. Do your weights?"),
    ],
)  # fmt: skip

# Exercise 7: plan a job for a network that you have not seen

MOST_WORKERS, MOST_BUCKETS, LEAST_EFFICIENCY = 4096, 64, 0.8
ALGORITHMS = (scaling.ring_time, scaling.tree_time, scaling.double_tree_time)
Network = tuple[float, float, float, float]  # compute_time, size, bandwidth, latency


def _network(seed: int) -> Network:
    """A job and a link, drawn so that the bytes of a large ring take from a fifth of the computing to all of it."""
    draws = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    ranges = (0.05, 1.0), (0.2, 1.0), (2e9, 1e11), (5e-6, 2e-3)
    compute_time, share, bandwidth, latency = (
        low * (high / low) ** draw for draw, (low, high) in zip(draws, ranges, strict=True)
    )
    return compute_time, share * compute_time * bandwidth / 2, bandwidth, latency


def _efficiency(network: Network, workers: int, algorithm: Any, buckets: int) -> float:
    table = scaling.simulate_scaling(*network, [workers], algorithm, buckets=buckets)
    return float(table["efficiency"].iloc[0])


# Of each hidden network, the most workers that stay efficient under some all-reduce and number of buckets
_MOST_WORKERS = {701: 64, 702: 4096, 703: 16, 706: 4, 707: 16, 720: 32, 722: 32, 730: 128}


def _plan(answer: Any, network: Network) -> tuple[int, Any, int]:
    found = call(answer, *network, on="a hidden network")
    workers, algorithm, buckets = parts_of(
        found, ("workers", "an all-reduce", "buckets"), "For instance: return 64, parallel.ring_time, 16"
    )
    if algorithm not in ALGORITHMS:
        names = ", ".join(f"parallel.{rule.__name__}" for rule in ALGORITHMS)
        raise Wrong("the second value should be one of the all-reduces", f"They are {names}, without brackets.")
    for name, value, allowed in (
        ("workers", workers, [2**k for k in range(MOST_WORKERS.bit_length())]),
        ("buckets", buckets, range(1, MOST_BUCKETS + 1)),
    ):
        if value not in allowed:
            kind = f"a power of two up to {MOST_WORKERS}" if name == "workers" else f"from 1 to {MOST_BUCKETS}"
            raise Wrong(f"your function gives {value!r} for the number of {name}: it must be {kind}")
    return int(workers), algorithm, int(buckets)


def _share_of_the_workers(answer: Any, seed: int) -> float:
    """The workers that the plan uses, of those that the network could bear; nothing if it wastes too much of them."""
    network = _network(seed)
    plan = _plan(answer, network)
    efficient = _efficiency(network, *plan) >= LEAST_EFFICIENCY
    return plan[0] / _MOST_WORKERS[seed] if efficient else 0.0


def _admit_plan(answer: Any) -> None:
    _plan(answer, (0.1, 4e8, 1e10, 2e-5))


exercise_7 = Design(
    "Plan a job: as many workers as stay efficient, on networks not seen before",
    admit=_admit_plan,
    score=_share_of_the_workers,
    seeds=tuple(_MOST_WORKERS),
    least=0.9,
    what="a mean share of the workers that could be used",
    hint=["No fixed plan suits both a slow link and a fast one. What can say, before a job is bought, what it will do?",
          "simulate_scaling gives the efficiency of any plan in a millisecond. How many plans are there?",
          "From the most workers down: is there an all-reduce and a number of buckets with an efficiency of 0.8?"],
)  # fmt: skip

exercise_8 = OpenProject(
    "An open project: is a second machine worth it?",
    rubric=("the prediction", "the measurement", "the correctness", "the bottleneck", "the verdict"),
)
