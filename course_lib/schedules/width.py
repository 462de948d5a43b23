r"""Width: a parametrisation in which the best rate of a narrow network is that of a wide one (muP).

Let m be the width over that of a base network. Beside the base, where all is as usual, a network of width ``m`` times
as much has

====================  ===========================  =======================  =======================
in muP                input weights, hidden        hidden weights           output weights
                      biases
====================  ===========================  =======================  =======================
variance at first     as at the base               times 1/m                as at the base
multiplier            1                            1                        1/m
rate with SGD         times m                      times 1                  times m
rate with Adam        times 1                      times 1/m                times 1
====================  ===========================  =======================  =======================

The output's bias has no width: everything as at the base. In the usual parametrisation the variances of hidden and
output weights fall by 1/m, biases' too, there is no multiplier, and all rates are one.

Source: Yang et al. 2022, arXiv:2203.03466, table 8. What one step changes is then of the same size at every width, as
``coordinate_check`` measures, and so the rate carries over.

``mup_mlp(shape, classes, width=1024, base_width=64)`` makes the network, and ``mup_sgd`` and ``mup_adam`` the factors
of its rates, for ``by_layer.with_layer_rates``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.models import MLP, mlp
from course_lib.lab.training import Objective, cross_entropy

Factors = Callable[[MLP], dict[str, float]]


class Readout(nn.Linear):
    """The head of a network in muP: ``W x / m + b``, with m the width over that of the base."""

    def __init__(self, width: int, classes: int, base_width: int) -> None:
        super().__init__(width, classes)
        self.base_width = base_width

    @property
    def multiple(self) -> float:
        """The width over that of the base, m."""
        return self.in_features / self.base_width

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, width]`` to logits ``[N, classes]``."""
        return F.linear(x / self.multiple, self.weight, self.bias)


def mup_mlp(input_shape: Sequence[int], classes: int, *, width: int, base_width: int, depth: int = 2) -> MLP:
    """The laboratory's ``mlp`` in muP: of the width ``base_width`` it is that network, number for number.

    ``depth`` is the number of hidden layers, at least 1. Train it with the rates of ``mup_sgd`` or ``mup_adam``.

    Raises
    ------
    ValueError : an argument is not a whole number of at least 1.
    """
    at_least(1, width=width, base_width=base_width, depth=depth)
    model = mlp(input_shape, classes, width=width, depth=depth)
    head = Readout(width, classes, base_width)
    head.load_state_dict(model.head.state_dict())
    model.head = head
    # torch draws weights and biases within one over the root of the layer's inputs, whose number grows with the width
    # but in the first layer: what muP wants constant is brought back to its size at the base
    root = head.multiple**0.5
    with torch.no_grad():
        head.weight.mul_(root)
        head.bias.mul_(root)
        for layer in _hidden_layers(model)[1:]:
            layer.bias.mul_(root)
    return model


def mup_sgd(model: MLP) -> dict[str, float]:
    """Return the factor of each parameter's rate by name, for SGD with or without momentum, relative to the base."""
    return _factors(model, vectors=_multiple(model), hidden=1.0, output=_multiple(model))


def mup_adam(model: MLP) -> dict[str, float]:
    """Return the same for Adam and whatever divides the gradient by its own size."""
    return _factors(model, vectors=1.0, hidden=1 / _multiple(model), output=1.0)


def mup_groups(model: MLP, lr: float, factors: Factors) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: ``Adam(mup_groups(model, 1e-3, mup_adam))``.

    ``lr`` is the rate of the base network. Weight decay in the manner of AdamW is multiplied by the rate, and so gets
    weaker with it. Names go with the parameters.
    """
    require("lr", lr, lambda x: is_number(x) and x >= 0, "a number of at least 0")
    each = factors(model)
    return [{"params": [(name, p)], "lr": lr * each[name]} for name, p in model.named_parameters()]


def coordinate_check(
    model: nn.Module,
    optimizer: Callable[[nn.Module], Optimizer],
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 3,
    objective: Objective = cross_entropy,
) -> dict[str, float]:
    """Return how far each linear layer's outputs have moved after ``steps`` steps, by name: the root mean square.

    All steps are on one batch ``(x, y)``, of a copy of the model. In muP the answer is the same at every width; where
    it grows, a rate that suits a narrow network is too large for a wide one. Source: Yang et al. 2022,
    arXiv:2203.03466.
    """
    at_least(1, steps=steps)
    trained = copy.deepcopy(model)
    made = optimizer(trained)
    before = _outputs(trained, x)
    for _ in range(steps):
        made.zero_grad()
        objective(trained, x, y).backward()
        made.step()
    after = _outputs(trained, x)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            found[name] = output

        return keep

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(keeper(name)) for name, layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def _hidden_layers(model: MLP) -> list[nn.Linear]:
    return [layer for layer in model.hidden if isinstance(layer, nn.Linear)]


def _multiple(model: MLP) -> float:
    require("model", type(model).__name__, lambda _: isinstance(getattr(model, "head", None), Readout), "a mup_mlp")
    assert isinstance(model.head, Readout)
    return model.head.multiple


def _factors(model: MLP, *, vectors: float, hidden: float, output: float) -> dict[str, float]:
    """``vectors`` is for whatever has one dimension that grows: the input weights and the hidden biases."""
    inputs = _hidden_layers(model)[0]
    found: dict[str, float] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Readout):
            found |= {f"{name}.weight": output, f"{name}.bias": 1.0}
        elif isinstance(layer, nn.Linear):
            found |= {f"{name}.weight": vectors if layer is inputs else hidden, f"{name}.bias": vectors}
    return found
