r"""Putting noise into the course's networks, without a change to them.

==========================  ============================================================================================
name                        what it does
==========================  ============================================================================================
``with_noise``              a module of one's own after each activation
``with_dropout``            dropout there
``with_dropout2d``          dropout of channels there, of DropBlock squares with ``with_drop_block``
``with_stochastic_depth``   stochastic depth on each residual branch, more of it the deeper (Huang et al. 2016)
``with_drop_connect``       ``DropConnect`` for each linear layer before the head
``without_noise``           takes all of them out again
==========================  ============================================================================================

Each returns a copy with the same weights under the same names, so a ``state_dict`` fits both. The new module is a child
named ``noise`` of the part behind which it stands, and shows in ``print(network)``; a hook sends the part's output
through it. In a residual block of convolutions the inner activation has no module of its own: noise stands before the
second convolution, as in wide residual networks (Zagoruyko & Komodakis 2016, arXiv:1605.07146), and after the block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from course_lib.lab.models import BasicBlock, EncoderBlock
from course_lib.regularization.drawing import check_chance
from course_lib.regularization.drop import DropBlock2d, DropConnect, Dropout, Dropout2d, StochasticDepth

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softplus)


def with_noise(network: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    """Return a copy of the network with a module of ``make()`` after each activation.

    Raises
    ------
    ValueError : the network has no activation that can be found: a module of ``ACTIVATIONS``, or a ``BasicBlock``.
    """
    changed = copy.deepcopy(network)
    places = [part for part in changed.modules() if isinstance(part, (*ACTIVATIONS, BasicBlock))]
    if not places:
        raise ValueError(f"network={type(network).__name__}: must have an activation as a module, such as nn.ReLU")
    for part in places:
        if isinstance(part, BasicBlock):
            _before(part.conv2, make())
        _after(part, make())
    return changed


def with_dropout(network: nn.Module, p: float = 0.5, generator: torch.Generator | None = None) -> nn.Module:
    """Return a copy of the network with ``Dropout(p)`` after each activation.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to 1, or there is no activation.
    """
    return with_noise(network, partial(Dropout, p, generator))


def with_dropout2d(network: nn.Module, p: float = 0.1, generator: torch.Generator | None = None) -> nn.Module:
    """Return a copy of a convolutional network with ``Dropout2d(p)`` after each activation; errors as above."""
    return with_noise(network, partial(Dropout2d, p, generator))


def with_drop_block(
    network: nn.Module, p: float = 0.1, block_size: int = 3, generator: torch.Generator | None = None
) -> nn.Module:
    """Return a copy of a convolutional network with ``DropBlock2d`` after each activation; errors as above."""
    return with_noise(network, partial(DropBlock2d, p, block_size, generator))


def linear_depth(p: float, branches: int) -> list[float]:
    r"""Return chances :math:`p_l=\tfrac{l}{L}p` for the branches :math:`l=1,\dots,L`: early layers serve all others.

    Source: Huang et al. 2016, arXiv:1603.09382.
    """
    check_chance(p=p)
    return [p * (branch + 1) / branches for branch in range(branches)]


def with_stochastic_depth(network: nn.Module, p: float = 0.2, generator: torch.Generator | None = None) -> nn.Module:
    """Return a copy of a residual network or transformer whose branches are switched off, by example.

    The chance rises linearly with depth to ``p`` (``linear_depth``). A ``BasicBlock`` has one branch, an
    ``EncoderBlock`` two: attention and MLP. Branches are computed even where they are off, so no time is saved.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to 1, or the network has no such block.
    """
    check_chance(p=p)
    changed = copy.deepcopy(network)
    branches: list[nn.Module] = []
    for part in changed.modules():
        if isinstance(part, BasicBlock):
            branches.append(part.norm2)
        elif isinstance(part, EncoderBlock):
            branches += [part.attention, part.mlp]
    if not branches:
        raise ValueError(f"network={type(network).__name__}: must have residual branches, as resnet and vit have")
    for branch, chance in zip(branches, linear_depth(p, len(branches)), strict=True):
        _after(branch, StochasticDepth(chance, "row", generator))
    return changed


def with_drop_connect(network: nn.Module, p: float = 0.5, generator: torch.Generator | None = None) -> nn.Module:
    """Return a copy of the network in which each linear layer but ``head`` is a ``DropConnect``.

    For networks whose linear layers see ``[N, in]``, as the MLP's do: the masks are of one example each.

    Raises
    ------
    ValueError : ``p`` is no number from 0 to 1, or the network has no linear layer before its head.
    """
    check_chance(p=p)
    changed = copy.deepcopy(network)
    found = [(name, part) for name, part in changed.named_modules() if type(part) is nn.Linear and name != "head"]
    if not found:
        raise ValueError(f"network={type(network).__name__}: must have a linear layer before its head")
    for name, part in found:
        new = DropConnect(part.in_features, part.out_features, part.bias is not None, p, generator)
        # the very parameters of the copy: their type, device and requires_grad stay
        new._parameters = part._parameters
        above, _, last = name.rpartition(".")
        setattr(changed.get_submodule(above), last, new.train(part.training))
    return changed


def without_noise(network: nn.Module) -> nn.Module:
    """Return a copy of the network without what this file put in."""
    changed = copy.deepcopy(network)
    for name, part in list(changed.named_modules()):
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if hook in (_out_through, _in_through):
                    del hooks[key]
        for child in ("noise", "noise_before"):
            part._modules.pop(child, None)
        if type(part) is DropConnect:
            plain = nn.Linear(part.in_features, part.out_features, part.bias is not None)
            plain._parameters = part._parameters
            above, _, last = name.rpartition(".")
            setattr(changed.get_submodule(above), last, plain.train(part.training))
    return changed


# A hook and not a wrapper: names and weights of the network stay what they are. The noise is the part's child, so that
# it follows train() and eval(); hooks are functions of this module, so that copies and pickles have them.


def _after(part: Any, noise: nn.Module) -> None:
    """Send what a part says through ``noise``, and through one that is there already first."""
    while isinstance(part, nn.Sequential):  # it would run a new child as one more step of its own
        part = part[-1]
    earlier = part._modules.get("noise")
    part.add_module("noise", (noise if earlier is None else nn.Sequential(earlier, noise)).train(part.training))
    if earlier is None:
        part.register_forward_hook(_out_through)


def _before(part: Any, noise: nn.Module) -> None:
    """Send what a part sees through ``noise``."""
    earlier = part._modules.get("noise_before")
    part.add_module("noise_before", (noise if earlier is None else nn.Sequential(earlier, noise)).train(part.training))
    if earlier is None:
        part.register_forward_pre_hook(_in_through)


def with_noise_of(new: nn.Module, old: nn.Module) -> nn.Module:
    """Return a module that takes the place of another, with the noise that stands before and behind that one."""
    for name, put in (("noise", _after), ("noise_before", _before)):
        if name in old._modules:
            put(new, old.get_submodule(name))
    return new


def _out_through(part: Any, args: Any, output: Tensor) -> Tensor:
    return part.noise(output)


def _in_through(part: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    return (part.noise_before(args[0]),)
