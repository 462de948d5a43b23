r"""Noise that is added: to the input, to what layers say, to the weights.

====================  =====================================================  ===========================================
name                  what gets noise                                        source
====================  =====================================================  ===========================================
``input_noise``       the batch, by an objective                             Bishop 1995, Neural Computation 7(1)
``GaussianNoise``     what goes through it: a module
``weight_noise``      the weights for one forward pass, by an objective      An 1996, Neural Computation 8(3);
                                                                             Graves 2011, NIPS
====================  =====================================================  ===========================================

All of them rest in evaluation mode. Noise of the input could be an augmentation as well; as an objective it can stand
around another, and its place says what sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from course_lib.lab.training import Inputs, Objective, cross_entropy
from course_lib.regularization.drawing import check_not_negative, normal
from course_lib.regularization.passes import Perturbed, unseen


def gaussian_noise(x: Tensor, std: float, training: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """Return x plus normal noise of standard deviation ``std``, a number of its own for each of x.

    Raises
    ------
    ValueError : ``std`` is no number of at least 0.
    """
    check_not_negative(std=std)
    return x + std * normal(tuple(x.shape), x, generator) if training and std else x


class GaussianNoise(nn.Module):
    """``gaussian_noise`` as a module."""

    def __init__(self, std: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_not_negative(std=std)
        self.std, self.generator = std, generator

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return gaussian_noise(x, self.std, self.training, self.generator)

    def extra_repr(self) -> str:
        return f"std={self.std:g}"


def input_noise(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    std: float,
    generator: torch.Generator | None = None,
    objective: Objective = cross_entropy,
) -> Tensor:
    """The objective of a noisy batch while the model is in training mode; normalised pixels have a deviation of 1.

    Raises
    ------
    ValueError : ``std`` is no number of at least 0.
    """
    return objective(model, gaussian_noise(x, std, model.training, generator), y)


def weight_noise(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    std: float,
    generator: torch.Generator | None = None,
    objective: Objective = cross_entropy,
) -> Tensor:
    """The objective of a network whose parameters have normal noise added, while it is in training mode.

    The gradient is that at the noisy weights, and goes to the true ones, which are never touched: the optimizer moves
    them as ever. Every parameter that trains gets noise of the same ``std``.

    Raises
    ------
    ValueError : ``std`` is no number of at least 0.
    """
    check_not_negative(std=std)
    if not model.training or std == 0:
        return objective(model, x, y)
    # an answer at hand was given by the weights without noise
    model = unseen(model)
    noisy = {
        name: gaussian_noise(p, std, generator=generator) for name, p in model.named_parameters() if p.requires_grad
    }
    return objective(Perturbed(model, noisy), x, y)
