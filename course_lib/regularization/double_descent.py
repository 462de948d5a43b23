r"""Double descent: the test error of random features over their number, in closed form.

=======================  ==============================================================  ===============================
name                     what it does                                                    source
=======================  ==============================================================  ===============================
``RandomFeatures``       a hidden layer that is drawn and never trained                  Rahimi & Recht 2007, NIPS
``minimum_norm``         the shortest of all least-squares solutions
``errors_over_width``    training and test error at each number of features              Belkin et al. 2018,
                                                                                         arXiv:1812.11118
``one_hot_targets``      labels for a regression
=======================  ==============================================================  ===============================

With fewer features than examples least squares fits some of the noise; with as many it must fit all of it and has just
one way to do so, however wild; with more it has many ways and takes the mildest. So the test error peaks where width
and examples are equal, and falls again. A penalty of the right strength takes the peak away (Nakkiran et al. 2020,
arXiv:2003.01897).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.lab.arguments import at_least
from course_lib.regularization.drawing import check_not_negative
from course_lib.regularization.ridge import ridge


class RandomFeatures:
    r"""Features :math:`\text{relu}(Vx)/\sqrt{P}`, ``[N, D] -> [N, P]``, with normal V of variance 1/D.

    Called with a width it takes its first ones, so a narrow layer is part of a wide one.

    Raises
    ------
    ValueError : ``inputs`` or ``width`` is below 1.
    """

    def __init__(self, inputs: int, width: int, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> None:
        at_least(1, inputs=inputs, width=width)
        drawn = torch.randn(width, inputs, generator=generator, dtype=torch.float64, device=generator.device)
        self.directions = (drawn / inputs**0.5).to(dtype)

    def __call__(self, x: Tensor, width: int | None = None) -> Tensor:
        """The first ``width`` features of a batch ``[N, …]``; all by default."""
        wanted = self.directions[:width].to(x.device, x.dtype)
        return torch.relu(x.flatten(1) @ wanted.mT) / len(wanted) ** 0.5


def minimum_norm(X: Tensor, y: Tensor) -> Tensor:
    """Return the shortest w among those that minimise the squared error of ``X @ w``; as ``torch.linalg.pinv(X) @ y``.

    Raises
    ------
    ValueError : as ``ridge.ridge``.
    """
    return ridge(X, y, 0.0)


class WidthError(NamedTuple):
    """At one width: mean squared errors (summed over the K outputs), and the norm of the solution."""

    width: int
    train: float
    test: float
    norm: float


def errors_over_width(
    features: RandomFeatures,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    widths: Sequence[int],
    *,
    alpha: float = 0.0,
) -> list[WidthError]:
    r"""Fit ridge with :math:`\alpha` on the first features, at each of ``widths``; 0 is the shortest interpolation.

    ``train`` and ``test`` are inputs ``[N, …]`` and targets ``[N]`` or ``[N, K]``.

    Raises
    ------
    ValueError : a width is below 1 or above that of ``features``, or ``alpha`` no number of at least 0.
    """
    check_not_negative(alpha=alpha)
    for width in widths:
        at_least(1, width=width)
        if width > len(features.directions):
            raise ValueError(f"width={width}: must be at most {len(features.directions)}, the number of features")
    found = []
    for width in widths:
        seen, unseen = features(train[0], width), features(test[0], width)
        w = ridge(seen, train[1], alpha)
        errors = [(phi @ w - y).square().sum().item() / len(y) for phi, y in ((seen, train[1]), (unseen, test[1]))]
        found.append(WidthError(width, errors[0], errors[1], w.norm().item()))
    return found


def one_hot_targets(labels: Tensor, classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return labels int64 ``[N]`` as ``[N, K]`` for a regression: 1 for the label, 0 else, less the mean 1/K."""
    at_least(2, classes=classes)
    return F.one_hot(labels, classes).to(dtype) - 1 / classes
