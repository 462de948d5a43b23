r"""Split learning: the images stay at a client, which computes the first layers; a server computes the rest.

=========================  =================================================  =========================================
name                       what it does                                       source
=========================  =================================================  =========================================
``cut``                    a network cut behind one of its layers             –
``client_forward``,        one step of training across the cut                Gupta & Raskar 2018, arXiv:1810.06060
``server_step``,
``client_backward``
``train_split``            trains in two processes; in the U-shaped variant   Vepakomma et al. 2018, arXiv:1812.00564
                           the labels stay at the client as well
``bytes_per_step``,        what it sends, beside sending the images, and      Singh et al. 2019, arXiv:1909.09145
``bytes_per_epoch``        beside federated averaging
=========================  =================================================  =========================================

What the activations give away all the same is measured in ``leaking.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Dataset, Split, batches, load
from course_lib.lab.training import Objective, cross_entropy
from course_lib.parallel.collectives import receive, send, traffic
from course_lib.parallel.data_parallel_runs import Run, endless_batches, replica
from course_lib.parallel.launching import World, process_group
from course_lib.partitioning.cutting import chain

# --- The cut ----------------------------------------------------------------------------------------------------------


class SplitNetwork(nn.Module):
    """A network in two parts: ``server(client(x))``."""

    def __init__(self, client: nn.Module, server: nn.Module) -> None:
        super().__init__()
        self.client, self.server = client, server

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, K]``."""
        return self.server(self.client(x))


def cut(network: nn.Module, after: str) -> SplitNetwork:
    """Return the network cut behind a layer of its ``chain``. The parts hold the network's own layers, not copies.

    Behind the last layer, ``"head"``, the server has nothing left but the loss.

    Raises
    ------
    ValueError : ``after`` is no layer of the chain.
    """
    layers = dict(chain(network))
    require("after", after, lambda name: name in layers, f"one of {', '.join(layers)}")
    place = list(layers).index(after) + 1
    client, server = [*layers.values()][:place], [*layers.values()][place:]
    parts = SplitNetwork(nn.Sequential(*client), nn.Sequential(*server))
    return parts.train(network.training)


def shape_behind(part: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape, without the batch, of what a part of a network makes of one input of ``shape``."""
    like = next(itertools.chain(part.parameters(), part.buffers()), torch.empty(0))
    with _evaluating(part), torch.no_grad():
        return tuple(part(torch.zeros(1, *shape, dtype=like.dtype, device=like.device)).shape[1:])


@contextmanager
def _evaluating(part: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in part.modules()]
    part.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# --- One step across the cut ------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """What is kept and what is sent: ``activations`` with their graph, and the ``message``, the numbers alone."""

    activations: Tensor
    message: Tensor


class Answer(NamedTuple):
    """The ``loss`` of a batch, and its ``gradient`` at the cut, of the activations' shape."""

    loss: Tensor
    gradient: Tensor


def client_forward(client: nn.Module, x: Tensor) -> Sent:
    """Client: compute the activations ``[N, …]`` of a batch. The message knows nothing of how it was computed."""
    activations = client(x)
    return Sent(activations, activations.detach().contiguous())


def arrived(message: Tensor) -> Tensor:
    """Return what arrived as a leaf: backward ends at it, and leaves in ``.grad`` what is to be sent back."""
    return message.detach().requires_grad_()


def server_step(
    server: nn.Module,
    message: Tensor,
    y: Tensor,
    objective: Objective = cross_entropy,
) -> Answer:
    """Server: forward, loss, backward down to the cut. The gradients of its own weights are left in ``.grad``."""
    z = arrived(message)
    loss = objective(server, z, y)
    loss.backward()
    assert z.grad is not None
    return Answer(loss.detach(), z.grad)


def client_backward(activations: Tensor, gradient: Tensor) -> None:
    """Client: backward from the cut, where the server's ``gradient`` stands for all that lies behind it."""
    if activations.requires_grad:  # else the client has no weights
        activations.backward(gradient)


# --- Training in two processes ----------------------------------------------------------------------------------------

CLIENT, SERVER = 0, 1


@dataclass(frozen=True)
class SplitRun(Run):
    """What a run leaves behind at one of the two: the weights of its own layers, and the bytes it sent in each step.

    Losses and accuracy are those of the whole network, whoever has the labels.
    """

    bytes_sent: list[int]


def train_split(
    network: str = "mlp",
    after: str = "hidden.1",
    *,
    labels: str = "server",
    steps: int = 20,
    batch_size: int = 61,
    examples: int = 249,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int = 0,
) -> SplitRun:
    """Train a network across a cut, in float64 on the digits; to be run by ``launch`` in two processes.

    Rank 0 is the client: it has the images and the layers up to ``after``. Rank 1 is the server. The weights come out
    as those of ``data_parallel_runs.train_alone`` with the same settings.

    Parameters
    ----------
    labels : ``"server"``, or ``"client"``: then the last layer and the loss are at the client too, and the server, in
        the middle of a U, sees neither images nor labels.

    Raises
    ------
    ValueError : there are not two processes, ``after`` is no layer or behind the server's last, or ``labels`` neither.
    """
    require("labels", labels, lambda where: where in ("server", "client"), "'server' or 'client'")
    with process_group() as world:
        require("world_size", world.size, lambda size: size == 2, "2, a client and a server")
        data = load("digits").to(world.device)
        whole = replica(network, data.input_shape, len(data.classes), seed=seed).to(world.device)
        party = _party(whole, after, labels, world, data.input_shape)
        own = [*nn.ModuleList(party.own).parameters()]
        optimizer = torch.optim.SGD([{"params": own}], lr=lr, momentum=momentum)  # a group, since it may be empty
        some = data.train.subset(torch.arange(examples))
        losses, sent = torch.zeros(steps, dtype=torch.float64, device=world.device), []
        # Both draw the same order, so that the labels need not be told which images they belong to.
        for step, (x, y) in enumerate(itertools.islice(endless_batches(some, batch_size, seed), steps)):
            optimizer.zero_grad()
            with traffic() as count:
                losses[step] = party.step(x, y)
            optimizer.step()
            sent.append(count.bytes_sent)
        accuracy = party.accuracy(data.val)
        outcome = torch.cat([losses, accuracy[None]])
        dist.broadcast(outcome, src=SERVER if labels == "server" else CLIENT)
        return SplitRun(_weights_of(party.own, whole), outcome[:-1].tolist(), outcome[-1].item(), sent)


class Client:
    """Rank 0 where the labels are at the server: it has the images."""

    def __init__(self, client: nn.Module) -> None:
        self.own = [client]

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step, of which it does not learn the loss; it does not look at the labels."""
        sent = client_forward(self.own[0], x)
        send(sent.message, to=SERVER)
        gradient = torch.empty_like(sent.message)
        receive(gradient, source=SERVER)
        client_backward(sent.activations, gradient)
        return 0.0

    @torch.no_grad()
    def accuracy(self, split: Split) -> Tensor:
        """Send what the server needs to find it."""
        for x, _ in _in_order(split, self.own):
            send(client_forward(self.own[0], x).message, to=SERVER)
        return torch.zeros((), dtype=torch.float64, device=split.device)


class Server:
    """Rank 1 with the labels. It knows how many images a batch has, and nothing else of them."""

    def __init__(self, server: nn.Module, shape: Sequence[int]) -> None:
        self.own, self.shape = [server], shape

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns the loss. It does not look at the images."""
        message = _received(len(y), self.shape, y.device, source=CLIENT)
        answer = server_step(self.own[0], message, y)
        send(answer.gradient.contiguous(), to=CLIENT)
        return answer.loss

    @torch.no_grad()
    def accuracy(self, split: Split) -> Tensor:
        """The share of a split that the two of them get right."""
        right = [
            self.own[0](_received(len(y), self.shape, y.device, source=CLIENT)).argmax(1) == y
            for _, y in _in_order(split, self.own)
        ]
        return torch.cat(right).double().mean()


class ClientWithLabels:
    """Rank 0 in the U: it has the images, the labels, the first layers and the last."""

    def __init__(self, first: nn.Module, last: nn.Module, shape: Sequence[int]) -> None:
        self.own, self.shape = [first, last], shape

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step, with two messages each way; returns the loss."""
        first, last = self.own
        sent = client_forward(first, x)
        send(sent.message, to=SERVER)
        features = _received(len(y), self.shape, y.device, source=SERVER)
        # what the server would do, were the labels there
        answer = server_step(last, features, y)
        send(answer.gradient.contiguous(), to=SERVER)
        gradient = torch.empty_like(sent.message)
        receive(gradient, source=SERVER)
        client_backward(sent.activations, gradient)
        return answer.loss

    @torch.no_grad()
    def accuracy(self, split: Split) -> Tensor:
        """The share of a split that the two of them get right."""
        first, last = self.own
        right = []
        for x, y in _in_order(split, self.own):
            send(client_forward(first, x).message, to=SERVER)
            right.append(last(_received(len(y), self.shape, y.device, source=SERVER)).argmax(1) == y)
        return torch.cat(right).double().mean()


class ServerBetween:
    """Rank 1 in the U: it has the layers in the middle, and neither images nor labels."""

    def __init__(self, middle: nn.Module, shape: Sequence[int]) -> None:
        self.own, self.shape = [middle], shape

    def step(self, x: Tensor, y: Tensor) -> float:
        """One step, of which it does not learn the loss; it looks at neither the images nor the labels."""
        z = arrived(_received(len(y), self.shape, y.device, source=CLIENT))
        sent = client_forward(self.own[0], z)
        send(sent.message, to=CLIENT)
        gradient = torch.empty_like(sent.message)
        receive(gradient, source=CLIENT)
        client_backward(sent.activations, gradient)
        assert z.grad is not None
        send(z.grad.contiguous(), to=CLIENT)
        return 0.0

    @torch.no_grad()
    def accuracy(self, split: Split) -> Tensor:
        """Answer what the client needs to find it."""
        for _, y in _in_order(split, self.own):
            z = _received(len(y), self.shape, y.device, source=CLIENT)
            send(client_forward(self.own[0], z).message, to=CLIENT)
        return torch.zeros((), dtype=torch.float64, device=split.device)


Party = Client | Server | ClientWithLabels | ServerBetween


def _party(whole: nn.Module, after: str, labels: str, world: World, input_shape: Sequence[int]) -> Party:
    """Return this rank's part of the network, and what it does in a step."""
    parts = cut(whole, after)
    shape = shape_behind(parts.client, input_shape)
    if labels == "server":
        return Client(parts.client) if world.rank == CLIENT else Server(parts.server, shape)
    rest = [*parts.server.children()]
    require("after", after, lambda _: len(rest) >= 2, "a layer with at least two behind it, where labels='client'")
    middle, last = nn.Sequential(*rest[:-1]), nn.Sequential(rest[-1])
    if world.rank == CLIENT:
        return ClientWithLabels(parts.client, last, shape_behind(nn.Sequential(parts.client, middle), input_shape))
    return ServerBetween(middle, shape)


def _received(count: int, shape: Sequence[int], device: torch.device, *, source: int) -> Tensor:
    message = torch.empty(count, *shape, dtype=torch.float64, device=device)
    receive(message, source)
    return message


def _in_order(split: Split, parts: Sequence[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a split, while the parts are in evaluation mode."""
    with _evaluating(nn.ModuleList(parts)):
        yield from batches(split, 512, dtype=torch.float64)


def _weights_of(parts: Sequence[nn.Module], whole: nn.Module) -> dict[str, Tensor]:
    """The state of some parts, under the names that it has in the whole network."""
    own = {tensor.data_ptr() for part in parts for tensor in part.state_dict().values()}
    state = whole.state_dict()
    return {name: tensor.cpu().clone() for name, tensor in state.items() if tensor.data_ptr() in own}


# --- What is sent -----------------------------------------------------------------------------------------------------


def bytes_per_step(batch_size: int, numbers: Sequence[int], *, width: int = 4) -> int:
    r"""Return the bytes that each of the two sends in a step: :math:`B\,w\sum_c d_c`.

    At each cut c activations of :math:`d_c` ``numbers`` an example cross one way and as many gradients the other, of
    ``width`` w bytes each: one cut where the labels are at the server, two in the U. Who may be the sender does not
    matter, since at each cut both send as much.

    Raises
    ------
    ValueError : an argument is no whole number of at least 1, or there are no ``numbers``.
    """
    at_least(1, batch_size=batch_size, width=width)
    require("numbers", [*numbers], bool, "the numbers an example has at each cut, at least one")
    for count in numbers:
        at_least(1, numbers=count)
    return batch_size * width * sum(numbers)


def bytes_per_epoch(
    parts: SplitNetwork, data: Dataset, *, clients: int = 1, rounds: int = 1, width: int = 4
) -> dict[str, int]:
    r"""Return the bytes on the wire for one pass over the training split, in three ways to learn from it.

    ``"split"``: activations and gradients of each example, :math:`2Ndw`, and with several ``clients``, which take
    turns, the client's layers from each to the next. ``"federated"``: the whole network to each client and back, in
    each of ``rounds`` an epoch. ``"images"``: the pixels, a byte each, and they would be sent once, not every epoch.
    Source of the comparison: Singh et al. 2019, arXiv:1909.09145.

    Raises
    ------
    ValueError : ``clients``, ``rounds`` or ``width`` is no whole number of at least 1.
    """
    at_least(1, clients=clients, rounds=rounds, width=width)
    examples, pixels = len(data.train), torch.Size(data.input_shape).numel()
    crossing = torch.Size(shape_behind(parts.client, data.input_shape)).numel()
    at_client = sum(p.numel() for p in parts.client.parameters())
    everything = sum(p.numel() for p in parts.parameters())
    handed_on = clients * at_client * width if clients > 1 else 0
    return {
        "split": 2 * bytes_per_step(examples, [crossing], width=width) + handed_on,
        "federated": 2 * rounds * clients * everything * width,
        "images": examples * pixels,
    }
