"""Communicating less: what workers can leave unsaid, and what it costs in accuracy.

====================  =====================================================  ==========================================
name                  what a worker sends                                    source
====================  =====================================================  ==========================================
every_step            the whole gradient, at every step                      synchronous SGD: the yardstick
accumulate            the sum of its gradients, every k steps                gradient accumulation: a batch k times as
                                                                             large, in k parts
local_sgd             its weights, every H steps                             Stich 2018, arXiv:1805.09767
compressed            a compressed gradient; what is lost stays lost         –
with_error_feedback   the same; what is lost is added to the next gradient   Seide et al., Interspeech 2014; Stich,
                                                                             Cordonnier & Jaggi, arXiv:1809.07599
top_k                 the k largest entries and where they stand             Aji & Heafield 2017, arXiv:1704.05021
top_fraction          the same, k as a share of all entries                  Lin et al. 2017, arXiv:1712.01887
sign_compress         one bit an entry and one scale                         Karimireddy et al. 2019, arXiv:1901.09847
====================  =====================================================  ==========================================

A policy (the upper five) is a function of a ``Team``; its settings are bound by ``functools.partial``:
``partial(local_sgd, steps=8)``, ``partial(with_error_feedback, compress=partial(top_fraction, fraction=0.01))``.

``simulate_workers`` runs any number of workers in one process, with the same result every time; ``train_worker`` runs
the very same policy as one of several real processes. Both count the bytes that each worker would put on the wire.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from course_lib.lab.arguments import at_least
from course_lib.lab.data import Dataset, batches
from course_lib.lab.training import evaluate
from course_lib.parallel.collectives import ring_bytes

VALUE_BYTES = 4
"""Bytes of one number on the wire. Runs here may compute in float64 to be reproducible; a real one sends float32."""

# --- Messages: a gradient made small ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sparse:
    """Some entries of a vector: ``values`` [k] at ``indices`` int32 [k], out of ``size`` entries."""

    values: Tensor
    indices: Tensor
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: a value and an index for each entry."""
        return len(self.values) * (VALUE_BYTES + self.indices.element_size())

    def dense(self) -> Tensor:
        """The vector [size], zero where nothing was sent."""
        return self.values.new_zeros(self.size).index_put((self.indices.long(),), self.values)


@dataclass(frozen=True, eq=False)
class Signs:
    """The signs of a vector of ``size`` entries, eight to a byte (``bits`` uint8), and one ``scale`` [1] for all."""

    bits: Tensor
    scale: Tensor
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: a bit for each entry, and the scale."""
        return len(self.bits) + VALUE_BYTES

    def dense(self) -> Tensor:
        """The vector [size]: plus or minus the scale."""
        positive = (self.bits[:, None] & _places(self.bits)).ne(0).flatten()[: self.size]
        return torch.where(positive, self.scale, -self.scale)


Message = Sparse | Signs
Compress = Callable[[Tensor], Message]
"""``gradient [n] -> message``; the message's ``dense()`` is what the receivers see."""


def top_k(gradient: Tensor, k: int) -> Sparse:
    """Keep the ``k`` entries of largest magnitude of a vector [n]. Source: Aji & Heafield 2017, arXiv:1704.05021.

    Magnitudes are compared in float32, and of equal ones the first are kept: pixels that are always black have equal
    gradients, and their last bits, which differ from machine to machine, shall not choose.
    """
    if not 1 <= k <= len(gradient):
        raise ValueError(f"k={k!r}: must be a whole number from 1 to the {len(gradient)} entries of the gradient")
    magnitude = gradient.abs().float().nan_to_num(math.inf)  # a run that diverged still sends k entries
    least = magnitude.kthvalue(len(gradient) - k + 1).values
    indices = torch.cat([(magnitude > least).nonzero(), (magnitude == least).nonzero()])[:k, 0]
    return Sparse(gradient[indices], indices.int(), len(gradient))


def top_fraction(gradient: Tensor, fraction: float) -> Sparse:
    """Keep the share ``fraction`` of a vector's entries, those of largest magnitude, and at least one."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r}: must lie above 0 and not above 1")
    return top_k(gradient, max(1, round(fraction * len(gradient))))


def sign_compress(gradient: Tensor) -> Signs:
    r"""Keep the signs of a vector [n] and its mean magnitude: :math:`\tfrac{\|g\|_1}{n}\,\mathrm{sign}(g)`.

    A bit has no room for a zero: it counts as positive. Source: Karimireddy et al. 2019, arXiv:1901.09847.
    """
    positive = F.pad(gradient >= 0, (0, -len(gradient) % 8)).view(-1, 8)
    bits = (positive * _places(positive)).sum(1, dtype=torch.uint8)
    return Signs(bits, gradient.abs().mean()[None], len(gradient))


def _places(like: Tensor) -> Tensor:
    """1, 2, 4, …, 128: the places of eight bits in a byte."""
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=like.device)


def compress_with_memory(gradient: Tensor, residual: Tensor, compress: Compress) -> tuple[Message, Tensor]:
    r"""Compress the gradient plus what earlier messages left out; return the message and what it leaves out.

    .. math:: p = g + e, \qquad m = \mathcal{C}(p), \qquad e \leftarrow p - m

    Nothing is ever lost: all messages so far and the residual :math:`e` add up to all gradients so far.
    Source: error feedback, Karimireddy et al. 2019, arXiv:1901.09847, and Stich et al. 2018, arXiv:1809.07599.
    """
    wanted = gradient + residual
    message = compress(wanted)
    return message, wanted - message.dense()


class ErrorFeedback:
    """A compressor that remembers: ``ErrorFeedback(compress)(gradient)`` compresses with memory, call after call."""

    def __init__(self, compress: Compress) -> None:
        self.compress = compress
        self.residual: Tensor | None = None

    def __call__(self, gradient: Tensor) -> Message:
        residual = torch.zeros_like(gradient) if self.residual is None else self.residual
        message, self.residual = compress_with_memory(gradient, residual, self.compress)
        return message


# --- A team of workers ------------------------------------------------------------------------------------------------


class Network(Protocol):
    """What joins the workers."""

    workers: int

    @property
    def here(self) -> slice:
        """Which of the workers live in this process."""

    def mean(self, rows: Tensor) -> Tensor:
        """The mean over all workers of one vector each: the rows that live here [rows, n] -> [n]."""

    def exchange(self, messages: Sequence[Message]) -> list[Message]:
        """The messages of all workers, given those of the workers that live here."""


@dataclass
class Simulated:
    """All workers in this process: nothing is sent, the result is exact and always the same."""

    workers: int

    @property
    def here(self) -> slice:
        return slice(0, self.workers)

    def mean(self, rows: Tensor) -> Tensor:
        return rows.mean(0)

    def exchange(self, messages: Sequence[Message]) -> list[Message]:
        return list(messages)


@dataclass
class Connected:
    """One worker a process, joined by the process group of ``torch.distributed``."""

    workers: int = field(default_factory=dist.get_world_size)

    @property
    def here(self) -> slice:
        return slice(dist.get_rank(), dist.get_rank() + 1)

    def mean(self, rows: Tensor) -> Tensor:
        total = rows.sum(0)
        dist.all_reduce(total)
        return total / self.workers

    def exchange(self, messages: Sequence[Message]) -> list[Message]:
        (mine,) = messages
        first, second = (self._gather(part) for part in list(vars(mine).values())[:2])
        return [type(mine)(a, b, mine.size) for a, b in zip(first, second, strict=True)]

    def _gather(self, part: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.workers)]
        dist.all_gather(parts, part)
        return parts


@dataclass
class Team:
    """The workers that live in this process, one row each, between two steps.

    ``weights``, ``velocity`` (of momentum), ``gradients`` (of the current step) and ``memory`` (what a policy keeps
    back) are [rows, n]: all numbers of the network in one vector. ``step`` counts from 1 to ``last``.
    """

    weights: Tensor
    network: Network
    lr: float
    momentum: float
    last: int
    gradients: Tensor = field(init=False)
    velocity: Tensor = field(init=False)
    memory: Tensor = field(init=False)
    step: int = 0
    rounds: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0

    def __post_init__(self) -> None:
        self.gradients, self.velocity, self.memory = (torch.zeros_like(self.weights) for _ in range(3))

    def due(self, steps: int) -> bool:
        """Whether ``steps`` steps have passed since the last time, or the run ends here."""
        return self.step % steps == 0 or self.step == self.last

    def descend(self, gradients: Tensor) -> None:
        """One step of SGD with momentum for each worker; ``gradients`` [rows, n], or [n] where they agree."""
        self.velocity = self.momentum * self.velocity + gradients
        self.weights = self.weights - self.lr * self.velocity

    def all_reduce(self, rows: Tensor) -> Tensor:
        """The mean [n] of a vector of each worker [rows, n], by a ring: 2 (N - 1) / N of its bytes sent by each."""
        nbytes = rows.shape[1] * VALUE_BYTES
        self._count(nbytes, ring_bytes(nbytes, self.network.workers))
        return self.network.mean(rows)

    def all_gather(self, messages: Sequence[Message]) -> Tensor:
        """The mean [n] of the vectors behind the messages; each worker sends or passes on N - 1 of them.

        No ring can add them up on the way: the entries of two sparse messages stand at different places.
        """
        self._count(messages[0].nbytes, (self.network.workers - 1) * messages[0].nbytes)
        return torch.stack([message.dense() for message in self.network.exchange(messages)]).mean(0)

    def _count(self, payload: int, wire: float) -> None:
        self.rounds += 1
        self.payload_bytes += payload
        self.wire_bytes += round(wire)


# --- Policies: what is said, and when ---------------------------------------------------------------------------------

Policy = Callable[[Team], None]
"""Called at each step, when ``team.gradients`` holds each worker's gradient: it communicates and moves the weights."""


def every_step(team: Team) -> None:
    """Average the gradients at every step: the same steps as one worker with the whole batch would take."""
    team.descend(team.all_reduce(team.gradients))


def accumulate(team: Team, *, steps: int) -> None:
    """Sum gradients for ``steps`` steps, then average over the workers and move once."""
    at_least(1, steps=steps)
    team.memory += team.gradients
    if team.due(steps):
        summed = (team.step - 1) % steps + 1
        team.descend(team.all_reduce(team.memory / summed))
        team.memory.zero_()


def local_sgd(team: Team, *, steps: int) -> None:
    """Let each worker move alone, and average the weights every ``steps`` steps (Stich 2018, arXiv:1805.09767).

    Momentum, which the paper does without, stays each worker's own.
    """
    at_least(1, steps=steps)
    team.descend(team.gradients)
    if team.due(steps):
        team.weights = team.all_reduce(team.weights).expand_as(team.weights)


def compressed(team: Team, *, compress: Compress) -> None:
    """Average compressed gradients; what compression cuts off is gone."""
    team.descend(team.all_gather([compress(gradient) for gradient in team.gradients]))


def with_error_feedback(team: Team, *, compress: Compress) -> None:
    """Average compressed gradients; what compression cuts off waits in memory for the next step."""
    pairs = [compress_with_memory(g, e, compress) for g, e in zip(team.gradients, team.memory, strict=True)]
    team.memory = torch.stack([residual for _, residual in pairs])
    team.descend(team.all_gather([message for message, _ in pairs]))


# --- Training under a policy ------------------------------------------------------------------------------------------


Arrange = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x, y) -> (x, y)``: the examples of a batch in the order in which they are dealt, the first to the first worker."""


def by_class(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sort a batch by its labels, so that each worker sees some of the classes only: data that cannot be shuffled."""
    order = y.argsort(stable=True)
    return x[order], y[order]


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes
    ----------
    curve : validation accuracy after each epoch, of the mean of the workers' weights.
    steps, rounds : gradients that each worker computed, and how often it communicated.
    payload_bytes : bytes of all that one worker had to say, as encoded.
    wire_bytes : bytes that one worker sent to say it to all: ring all-reduce of dense vectors, ring all-gather of
        compressed ones.
    """

    curve: tuple[float, ...]
    steps: int
    rounds: int
    payload_bytes: int
    wire_bytes: int

    @property
    def val_accuracy(self) -> float:
        """Validation accuracy at the end."""
        return self.curve[-1]


def simulate_workers(
    model: nn.Module,
    data: Dataset,
    policy: Policy = every_step,
    *,
    workers: int = 4,
    epochs: int = 6,
    batch_size: int = 100,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int,
    arrange: Arrange | None = None,
) -> Outcome:
    """Train ``model`` in place by several workers under ``policy``, all of them in this process.

    At each step a batch of ``batch_size`` examples is dealt out evenly to the workers (of the last batch of an epoch,
    as much as can be). The order of the examples is that of ``course_lib.lab.training.fit`` with the same seed;
    ``arrange=by_class`` gives each worker classes of its own instead of a fair sample.

    Raises
    ------
    ValueError : a setting out of range, or a model with buffers (BatchNorm), which no policy here shares.
    """
    at_least(1, workers=workers)
    return _train(model, data, policy, Simulated(workers), epochs, batch_size, lr, momentum, seed, arrange)


def train_worker(
    model: nn.Module,
    data: Dataset,
    policy: Policy = every_step,
    *,
    epochs: int = 6,
    batch_size: int = 100,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int,
    arrange: Arrange | None = None,
) -> Outcome:
    """Train ``model`` in place as one worker of the current process group; otherwise as ``simulate_workers``."""
    return _train(model, data, policy, Connected(), epochs, batch_size, lr, momentum, seed, arrange)


def _train(
    model: nn.Module,
    data: Dataset,
    policy: Policy,
    network: Network,
    epochs: int,
    batch_size: int,
    lr: float,
    momentum: float,
    seed: int,
    arrange: Arrange | None,
) -> Outcome:
    _check(model, network.workers, epochs, batch_size, lr, momentum)
    start = parameters_to_vector(model.parameters()).detach()
    data = data.to(start.device)
    a_pass = -(-(len(data.train) - (len(data.train) % batch_size) % network.workers) // batch_size)
    team = Team(start.repeat(len(range(network.workers)[network.here]), 1), network, lr, momentum, epochs * a_pass)
    curve = []
    for epoch in range(1, epochs + 1):
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        for x, y in batches(data.train, batch_size, generator=order, dtype=start.dtype):
            if len(y) < network.workers:
                continue  # a last batch too small to be dealt out
            if arrange:
                x, y = arrange(x, y)
            team.step += 1
            team.gradients = _gradients(model, team.weights, _deal(x, network), _deal(y, network))
            policy(team)
        vector_to_parameters(network.mean(team.weights), model.parameters())  # to look at, so no bytes are counted
        curve.append(evaluate(model, data.val).accuracy)
    return Outcome(tuple(curve), team.step, team.rounds, team.payload_bytes, team.wire_bytes)


def _deal(batch: Tensor, network: Network) -> Tensor:
    """Deal a batch out evenly, and keep the hands of the workers here: [B, …] -> [rows, B / workers, …]."""
    even = len(batch) - len(batch) % network.workers
    return batch[:even].unflatten(0, (network.workers, -1))[network.here]


def _gradients(model: nn.Module, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient [rows, n] of each worker's mean cross-entropy, at its own weights, on its own examples."""
    parameters, gradients = list(model.parameters()), []
    for own, inputs, labels in zip(weights, x, y, strict=True):
        vector_to_parameters(own, parameters)  # windows on them: nothing is copied
        loss = F.cross_entropy(model(inputs), labels)
        gradients.append(parameters_to_vector(torch.autograd.grad(loss, parameters)))
    return torch.stack(gradients)


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _check(model: nn.Module, workers: int, epochs: int, batch_size: int, lr: float, momentum: float) -> None:
    at_least(1, epochs=epochs, batch_size=batch_size)
    if batch_size % workers:
        raise ValueError(f"batch_size={batch_size!r}: must be a multiple of workers={workers}, to be dealt out evenly")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r}: must be a positive number")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r}: must be at least 0 and below 1")
    if any(True for _ in model.buffers()):
        raise ValueError("model has buffers (BatchNorm's statistics?), which no policy here shares: use one without")
    if not all(p.requires_grad for p in model.parameters()):
        raise ValueError("model has frozen parameters: all must have requires_grad=True here")
