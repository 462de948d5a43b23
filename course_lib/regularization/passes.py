"""How objectives that are wrapped around one another share a forward pass, or ask for one with other weights.

==================  =================================================================================================
name                what it does
==================  =================================================================================================
``Seen``            a network that has answered one batch already, and does not compute that answer again
``unseen``          the network itself, for those that need a second, different answer
``Perturbed``       a network that computes with other weights than its own, which stay as they are
``weights_of``      the parameters that penalties are about
``twice``           makes attention differentiable twice
``statistics_rest`` keeps the running statistics of batch norm out of an extra pass
==================  =================================================================================================

A confidence penalty needs the logits, and the cross-entropy below it needs them too. The outer objective calls the
network once, and hands ``Seen(model, x, logits)`` down: who calls that with the same ``x`` gets the same logits, with
the same dropout mask, for nothing. Any other input goes through the network as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Seen(nn.Module):
    """The network, with its answer to ``x`` at hand. Its parameters are those of the network."""

    def __init__(self, model: nn.Module, x: Any, logits: Tensor) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._answer = (x, logits)

    def forward(self, x: Any) -> Tensor:
        """The logits at hand where ``x`` is the very batch that was seen, else the network's."""
        known, logits = self._answer
        return logits if x is known else self.model(x)


def unseen(model: nn.Module) -> nn.Module:
    """Return the network beneath any number of ``Seen``."""
    while isinstance(model, Seen):
        model = model.model
    return model


class Perturbed(nn.Module):
    """The network with other values in place of some of its parameters, through which gradients reach them.

    The parameters themselves are not touched, so nothing has to be put back and nothing drifts.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._values = dict(values)

    def forward(self, *inputs: Any) -> Tensor:
        """What the network says with those values."""
        return torch.func.functional_call(self.model, self._values, inputs)


def weights_of(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that penalties and decay are about: those of two dimensions or more that train.

    Biases and the scales and shifts of normalisation are left alone, as usual: they are few and fit no noise, and to
    pull a scale to 0 is to silence a channel.
    """
    return [p for p in parameters if p.ndim >= 2 and p.requires_grad]


def twice() -> AbstractContextManager[Any]:
    """Return a context in which attention can be differentiated twice: the fused kernels cannot."""
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def statistics_rest(model: nn.Module) -> Iterator[None]:
    """Within it batch norm normalises as its mode says, and leaves its running statistics alone."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    changed = [part for part in norms if part.training and part.track_running_stats]
    for part in changed:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in changed:
            part.track_running_stats = True


def flat_filters(weight: Tensor) -> Tensor:
    """A weight as a matrix with one row an output unit: ``[out, in, …] -> [out, in * …]``."""
    return weight.flatten(1)
