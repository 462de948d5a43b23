"""What all of transfer works with: a network's last layer, its features layer by layer, examples drawn from a split.

==================  =================================================================================================
name                what it does
==================  =================================================================================================
``Wrapped``         a network that carries further layers for training; called, it answers as the network does
``bare``            the network without what a pretraining or an adversary has put around it
``head_of``         the layer that turns features into logits
``layer_names``     the names of a network's layers, from the input to the last before the head
``tapped``          the outputs of layers, by name, while the network runs
``pooled``          a layer's output as one row an example
``drawn_from``      new layers whose first weights come from a generator
``Pool``            examples that an objective draws for itself: unlabelled images of a target, or old ones
==================  =================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Split, normalise
from course_lib.regularization.passes import unseen
from course_lib.schedules.by_layer import NORMS

EMBEDDING = "embedding"
"""The name, for ``tapped`` and ``features``, of what goes into the head."""


# --- The network and its last layer -----------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A network with further layers beside it that train along. Called, it gives the network's logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to the network's logits ``[N, K]``."""
        return self.network(x)


def bare(model: nn.Module) -> nn.Module:
    """Return the network itself, without what pretraining or an adversary has put around it."""
    found = unseen(model)
    while isinstance(found, Wrapped):
        found = unseen(found.network)
    return found


def head_name(model: nn.Module) -> str:
    """Return the name of the last linear layer: ``head`` of the laboratory's networks, ``fc`` or so of torchvision's.

    Of a ``Wrapped`` network it is the network's own, not the last of what is around it.

    Raises
    ------
    ValueError : the network has no linear layer.
    """
    if isinstance(model, Wrapped):
        return f"network.{head_name(model.network)}"
    head = getattr(model, "head", None)
    found = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    for name in found:
        if model.get_submodule(name) is head:  # a prompted network's is a property, and lies in the network within
            return name
    require("model", type(model).__name__, lambda _: bool(found), "a network whose last layer is linear")
    return found[-1]


def head_of(model: nn.Module) -> nn.Linear:
    """Return the last linear layer, which turns features ``[N, D]`` into logits ``[N, K]``; errors as above."""
    head = model.get_submodule(head_name(model))
    assert isinstance(head, nn.Linear)
    return head


# --- Layers and what they give ----------------------------------------------------------------------------------------


def layer_names(model: nn.Module) -> list[str]:
    """Return the names of the network's layers in the order of their definition, without the head.

    ``nn.Sequential`` and ``nn.ModuleList`` are taken apart, blocks of another class are one layer. A layer with
    weights and the norm, activation and pooling that follow it are one, named by the last of them.
    """
    head, layers = head_name(model), list[str]()
    for name, part in _in_order(model):
        if name == head or head.startswith(f"{name}."):
            continue
        begins = next(part.parameters(), None) is not None and not isinstance(part, NORMS)
        if begins or not layers:
            layers.append(name)
        else:
            layers[-1] = name
    return layers


def _in_order(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _in_order(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


@contextmanager
def tapped(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within it the outputs of the named layers are kept as the last pass gave them, with their gradients.

    ``"embedding"`` is what goes into the head, ``[N, D]``.

    Raises
    ------
    ValueError : the network has no layer of a name; or, in the pass, a layer's output is no tensor.
    """
    there, found, handles = dict(model.named_modules()), dict[str, Tensor](), []
    try:
        for name in names:
            if name in there:
                handles.append(there[name].register_forward_hook(partial(_keep_output, found, name)))
            elif name == EMBEDDING:
                handles.append(head_of(model).register_forward_pre_hook(partial(_keep_input, found)))
            else:
                known = ", ".join(map(repr, layer_names(model)))
                raise ValueError(f"layer={name!r}: must be a layer of {type(model).__name__}, such as {known}")
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep_output(found: dict[str, Tensor], name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise ValueError(f"layer={name!r} gives {type(output).__name__}: must be a layer that gives one tensor")
    found[name] = output


def _keep_input(found: dict[str, Tensor], layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    found[EMBEDDING] = inputs[0]


def pooled(x: Tensor) -> Tensor:
    """Return one row an example: the mean over places ``[N, C, H, W]``, over tokens ``[N, tokens, D]``, or x itself.

    Raises
    ------
    ValueError : x has another number of dimensions.
    """
    if x.ndim == 4:
        return x.mean((2, 3))
    if x.ndim == 3:
        return x.mean(1)
    require("x", list(x.shape), lambda shape: len(shape) == 2, "[N, C, H, W], [N, tokens, D] or [N, D]")
    return x


def embedding(model: nn.Module, x: Any) -> Tensor:
    """Return what goes into the head, ``[N, D]``, for a batch; gradients flow through it."""
    network = bare(model)
    own = getattr(network, "embedding", None)
    if callable(own):
        return own(x)
    with tapped(network, [EMBEDDING]) as found:
        network(x)
    return found[EMBEDDING]


def loss_and_embedding(objective: Callable[..., Tensor], model: nn.Module, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the objective and the features ``[N, D]`` of the same pass.

    Where an objective further out has answered the batch already there was no pass; then the network runs once more.
    """
    network = bare(model)
    with tapped(network, [EMBEDDING]) as found:
        loss = objective(model, x, y)
    seen = found.get(EMBEDDING)
    return loss, seen if seen is not None and len(seen) == len(y) else embedding(network, x)


# --- New layers -------------------------------------------------------------------------------------------------------


@contextmanager
def drawn_from(generator: torch.Generator, like: Tensor) -> Iterator[None]:
    """Within it new layers draw their first weights by ``generator``, in the type of ``like``.

    torch's own generator is afterwards as it was before.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    usual = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(like.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


def own_generator() -> torch.Generator:
    """Return a CPU generator seeded by torch's global one, which ``fit`` seeds anew at each epoch."""
    return torch.Generator().manual_seed(int(torch.randint(2**62, ())))


# --- Examples that an objective draws for itself ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pool:
    """Examples from which an objective draws a batch of its own: a target's images without labels, or old examples.

    They are drawn by torch's global generator, which ``fit`` seeds anew at each epoch: the same run draws the same.
    On a GPU let the split lie there: ``Pool(data.to(device()).train)``.

    Raises
    ------
    ValueError : the split is empty.
    """

    split: Split

    def __post_init__(self) -> None:
        require("split", self.split, lambda s: len(s) > 0, "a split with examples")

    def draw(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``count`` normalised examples, none twice while there are others, and their labels.

        They are of the type and on the device of ``like``, and normalised by the figures of their own split.
        """
        at_least(1, count=count)
        orders = [torch.randperm(len(self.split)) for _ in range(math.ceil(count / len(self.split)))]
        chosen = self.split.subset(torch.cat(orders)[:count])
        return normalise(chosen.inputs, self.split).to(like), chosen.labels.to(like.device)
