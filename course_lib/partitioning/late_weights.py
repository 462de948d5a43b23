"""Layers that hand on the gradient of their inputs at once and compute that of their weights when they are asked to.

``late_weights(network)`` puts such layers in the place of a network's linear and convolutional ones, with the same
parameters under the same names. A backward pass then leaves out the products for the weights, half of its arithmetic,
and puts them on a list: what zero-bubble schedules need (Qi et al. 2023, arXiv:2401.10241). ``in_time(network)`` lets
them compute both halves at once again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight


class Product(NamedTuple):
    """What the gradient of a layer's weights is made of: what came into it, and the gradient of what went out."""

    layer: LateLinear | LateConv2d
    inputs: Tensor
    errors: Tensor

    @torch.no_grad()
    def add(self) -> None:
        """Compute it, and add it to the ``.grad`` of the layer's parameters."""
        weight, bias = self.layer.gradients(self.inputs, self.errors)
        for parameter, gradient in ((self.layer.weight, weight), (self.layer.bias, bias)):
            if parameter is not None and parameter.requires_grad:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


Later = list[Product]
"""Products that are still to be computed."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LateLinear, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.later = layer, layer.later
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        ctx.later.append(Product(layer, x, grad))
        return grad @ layer.weight, *[None] * (len(ctx.needs_input_grad) - 1)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LateConv2d, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.later = layer, layer.later
        return F.conv2d(x, layer.weight, layer.bias, **layer.how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (x,), layer, weight = ctx.saved_tensors, ctx.layer, ctx.layer.weight
        ctx.later.append(Product(layer, x, grad))
        back = conv2d_input(x.shape, weight, grad, **layer.how) if ctx.needs_input_grad[0] else None
        return back, *[None] * (len(ctx.needs_input_grad) - 1)


class LateLinear(nn.Linear):
    """A linear layer whose backward pass puts the gradient of its weights on the list ``later``."""

    later: Later | None = None  # at once, as ever

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., K]``."""
        if self.later is None:
            return super().forward(x)
        return _Linear.apply(x, self, *self.parameters())

    def gradients(self, x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Of the weights and the bias, from inputs ``[..., D]`` and the gradient of the outputs ``[..., K]``."""
        rows, errors = x.flatten(0, -2), errors.flatten(0, -2)
        return errors.T @ rows, errors.sum(0)


class LateConv2d(nn.Conv2d):
    """A convolution whose backward pass puts the gradient of its weights on the list ``later``."""

    later: Later | None = None

    @property
    def how(self) -> dict[str, Any]:
        """Stride, padding, dilation and groups."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, K, H', W']``."""
        if self.later is None:
            return super().forward(x)
        return _Convolution.apply(x, self, *self.parameters())

    def gradients(self, x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        """Of the weights and the bias, from inputs ``[N, C, H, W]`` and the gradient of the outputs."""
        return conv2d_weight(x, self.weight.shape, errors, **self.how), errors.sum((0, 2, 3))


LATE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LateLinear, nn.Conv2d: LateConv2d}


def late_weights(network: nn.Module) -> Later:
    """Make a network's linear and convolutional layers late, in place; return the list that its backward passes fill.

    Its parameters, their names and its function stay. All other parameters (norms, positions) get their gradient in the
    backward pass itself, as ever: they cost little. Called again, a new list takes the place of the old one.

    Raises
    ------
    ValueError : a convolution pads by other numbers than zeros, or by a word.
    """
    later: Later = []
    for name, layer in network.named_modules():
        if hasattr(layer, "later"):  # late by itself
            layer.later = later
        if type(layer) not in LATE:
            continue
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            raise ValueError(f"network={name!r} pads by {layer.padding_mode} {layer.padding}: must pad by zeros")
        layer.__class__ = LATE[type(layer)]  # the same layer with another forward: hooks and state stay with it
        layer.later = later
    return later


def in_time(network: nn.Module) -> None:
    """Let a network's late layers compute the gradient of their weights in the backward pass itself again."""
    for layer in network.modules():
        if hasattr(layer, "later"):
            layer.later = None  # type: ignore[assignment]  # torch says Tensor or Module
