r"""Spectral normalisation: a weight divided by an estimate of its largest singular value.

===========================  ===========================================================  ==============================
name                         what it does                                                 source
===========================  ===========================================================  ==============================
``power_step``               one step towards the first singular vectors                  Miyato et al. 2018,
                                                                                          arXiv:1802.05957
``SpectralNorm``             a parametrization that takes a step at each forward pass     the same
``spectral_norm``            puts it on a layer; as
                             ``torch.nn.utils.parametrizations.spectral_norm``
``with_spectral_norm``       a copy of a network with it on every layer
===========================  ===========================================================  ==============================

The weights move little from step to step, so a vector that is kept needs one multiplication to follow them. ReLU
networks of such layers have a Lipschitz constant of at most 1.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils import parametrize

from course_lib.lab.arguments import at_least
from course_lib.regularization.drawing import normal
from course_lib.regularization.passes import flat_filters

WARM_UP = 15
"""Steps taken when it is put on a layer, as many as torch takes."""


def power_step(matrix: Tensor, v: Tensor, eps: float = 1e-12) -> tuple[Tensor, Tensor]:
    r"""Return u ``[out]``, v ``[in]``: :math:`u=Wv/\|Wv\|`, then :math:`v=W^\top u/\|W^\top u\|`."""
    u = normalize(matrix @ v, dim=0, eps=eps)
    return u, normalize(matrix.mT @ u, dim=0, eps=eps)


class SpectralNorm(nn.Module):
    r"""Divides a weight ``[out, …]`` by :math:`u^\top Wv`, through which gradients flow; u and v are constants.

    In training mode each use takes ``n_power_iterations`` steps first; in evaluation u and v stay.
    """

    u: Tensor
    v: Tensor

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        at_least(1, n_power_iterations=n_power_iterations)
        self.n_power_iterations, self.eps = n_power_iterations, eps
        matrix = flat_filters(weight.detach())
        v = normalize(normal((matrix.shape[1],), matrix, generator), dim=0, eps=eps)
        for _ in range(WARM_UP):
            u, v = power_step(matrix, v, eps)
        self.register_buffer("u", u)
        self.register_buffer("v", v)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight over its estimated norm."""
        # autocast would leave u and v in bfloat16, which evaluation in float32 cannot multiply
        with torch.autocast(weight.device.type, enabled=False):
            matrix = flat_filters(weight)
            if self.training:
                u, v = self.u, self.v
                with torch.no_grad():
                    for _ in range(self.n_power_iterations):
                        u, v = power_step(matrix, v, self.eps)
                # new tensors, not new contents: an earlier pass that is not differentiated yet still needs the old ones
                self.u, self.v = u, v
            return weight / torch.dot(self.u, matrix @ self.v)


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put spectral normalisation on a layer's parameter and return the layer.

    ``parametrize.remove_parametrizations(layer, "weight")`` takes it off again.

    Raises
    ------
    ValueError : the layer has no parameter of that name with two dimensions or more, or ``n_power_iterations`` < 1.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"name={name!r}: must be a parameter of {type(module).__name__} of two dimensions or more")
    # unsafe: no trial run, which would be a step of its own
    norm = SpectralNorm(weight, n_power_iterations, eps, generator).train(module.training)
    parametrize.register_parametrization(module, name, norm, unsafe=True)
    return module


def with_spectral_norm(
    network: nn.Module, *, n_power_iterations: int = 1, generator: torch.Generator | None = None
) -> nn.Module:
    """Return a copy of the network with spectral normalisation on every linear and convolutional layer.

    A convolution counts as the matrix of its filters, as in the paper: that is not the norm of the convolution, but
    bounds it up to a constant.

    Raises
    ------
    ValueError : the network has no such layer, or ``n_power_iterations`` is below 1.
    """
    at_least(1, n_power_iterations=n_power_iterations)
    changed = copy.deepcopy(network)
    layers = [part for part in changed.modules() if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd))]
    if not layers:
        raise ValueError(f"network={type(network).__name__}: must have a linear or convolutional layer")
    for layer in layers:
        spectral_norm(layer, n_power_iterations=n_power_iterations, generator=generator)
    return changed
