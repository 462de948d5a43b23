"""Rates by layer: small near the input, where a trained network is general, and full at the head.

=======================  ==========================================================  ==================================
name                     what it gives                                               source
=======================  ==========================================================  ==================================
``layers_by_depth``      the names of the parameters of each layer, from the input
``layerwise_factors``    each parameter's factor: a power of ``decay`` by depth      Howard & Ruder 2018,
                                                                                     arXiv:1801.06146
``layerwise_rates``      the same as parameter groups, for any optimizer
``with_layer_rates``     an optimizer of a recipe, with each rate times its factor
=======================  ==========================================================  ==================================

Howard & Ruder call it discriminative fine-tuning, and divide by 2.6 from one layer to the one below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from course_lib.lab.arguments import is_number, require

Factory = Callable[[Any], Optimizer]
"""What ``Recipe.optimizer`` takes: named parameters, or groups of them, -> an optimizer."""

ULMFIT_DECAY = 1 / 2.6
"""The factor of Howard & Ruder 2018, arXiv:1801.06146."""

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def layers_by_depth(model: nn.Module) -> list[list[str]]:
    """Return the names of the parameters of each layer, the first layer first, as in ``model.named_parameters()``.

    A layer is a part of the network in the order of its definition: whatever ``nn.Sequential`` and ``nn.ModuleList``
    hold is taken apart, a block of another class (a residual block, an encoder block) is one layer. A normalisation
    belongs to the layer before it. Parameters of the network itself (a transformer's positions) belong to the first.
    """
    layers: list[list[str]] = []
    seen: set[int] = set()
    for name, part in _parts(model):
        own = {n: p for n, p in part.named_parameters(prefix=name) if id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        if not own:
            continue
        if isinstance(part, NORMS) and layers:
            layers[-1] += own
        else:
            layers.append(list(own))
    direct = [name for name, p in model.named_parameters(recurse=False) if id(p) not in seen]
    if direct and layers:
        layers[0] = direct + layers[0]
    elif direct:
        layers = [direct]
    require("model", type(model).__name__, lambda _: bool(layers), "a network with parameters")
    return layers


def _parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def layerwise_factors(model: nn.Module, decay: float = ULMFIT_DECAY) -> dict[str, float]:
    r"""Return each parameter's factor by name: 1 in the last layer, times ``decay`` for each layer below it.

    Layer k of K, counted from 1 at the input, has the factor :math:`d^{K-k}`.
    """
    require("decay", decay, lambda x: is_number(x) and x > 0, "a number above 0")
    layers = layers_by_depth(model)
    return {name: decay ** (len(layers) - k) for k, names in enumerate(layers, start=1) for name in names}


def layerwise_rates(model: nn.Module, lr: float, decay: float = ULMFIT_DECAY) -> list[dict[str, Any]]:
    """Return parameter groups by depth, the input's first: ``Adam(layerwise_rates(model, 1e-3, 0.7))``.

    The last layer has the rate ``lr``, each layer below it ``decay`` times the one above. Names go with the parameters.
    """
    require("lr", lr, lambda x: is_number(x) and x >= 0, "a number of at least 0")
    factors, parameters = layerwise_factors(model, decay), dict(model.named_parameters())
    return [
        {"params": [(name, parameters[name]) for name in names], "lr": lr * factors[names[0]]}
        for names in layers_by_depth(model)
    ]


def with_layer_rates(factory: Factory, factors: Mapping[str, float]) -> Factory:
    """Return an optimizer for a recipe: that of ``factory``, with the rate of each parameter times its factor.

    ``Recipe(optimizer=with_layer_rates(partial(AdamW, lr=1e-3), layerwise_factors(network, 0.7)))``; any network of the
    same architecture can be trained by it. There is one group for each factor, in the order in which they are met, so
    that schedules keep the ratios. ``factory`` must take parameter groups, as the optimizers of torch and chapter 2 do.

    Raises
    ------
    ValueError : a factor is negative; or, when the optimizer is made, a parameter has no factor.
    """
    for name, factor in factors.items():
        require(f"factors[{name!r}]", factor, lambda x: is_number(x) and x >= 0, "a number of at least 0")
    return partial(_layer_rates, factory=factory, factors=dict(factors))


def _layer_rates(
    parameters: Iterable[tuple[str, nn.Parameter]], *, factory: Factory, factors: Mapping[str, float]
) -> Optimizer:
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        if name not in factors:
            raise ValueError(f"factors={sorted(factors)}: must have one for each parameter, and has none for {name!r}")
        groups.setdefault(factors[name], []).append((name, parameter))
    optimizer = factory([{"params": group} for group in groups.values()])
    for group, factor in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = group["lr"] * factor
    return optimizer
