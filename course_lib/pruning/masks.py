"""Masks: which weights of a network are there. Everything that prunes in this package ends in ``apply_masks``.

===================  ================================================================================================
``apply_masks``      switch weights off, from now on and through any training
``get_masks``        the masks in force
``make_permanent``   an ordinary network again, with zeros where weights were pruned
``load_masked``      the weights and masks of a saved network into a fresh one
``sparsity``         the fraction of weights that are zero
``prunable_layers``  the layers whose weights can be pruned: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``
===================  ================================================================================================

A mask is a parametrization (``torch.nn.utils.parametrize``): ``layer.weight`` is computed as ``mask * stored weight``
each time it is read. So a pruned weight is zero in every forward pass, gets a gradient of zero, and whatever momentum
or weight decay do to the stored number never shows. ``copy.deepcopy``, ``.to(...)``, ``torch.fx`` and optimizers work
as before; the mask is a buffer, so the state dict of a layer ``fc`` holds

- ``fc.parametrizations.weight.original``: the stored weight, zero where pruned, in place of ``fc.weight``;
- ``fc.parametrizations.weight.0.mask``: the mask, a tensor of bool.

As with every parametrization of torch, ``torch.save`` takes the state dict and not the module itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Masks = dict[str, Tensor]
"""Layer name -> tensor of bool in the shape of the layer's weight; False is pruned."""

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)

_STORED, _MASK = ".parametrizations.weight.original", ".parametrizations.weight.0.mask"


class Masked(nn.Module):
    """The parametrization ``weight -> mask * weight``.

    With ``keep_gradient`` it adds up in ``gradient`` what the loss would gain from *every* weight, pruned or not: the
    gradient with respect to the product. The backward pass has it at hand in any case (RigL grows weights by it).
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask)
        self.keep_gradient = False
        self.gradient: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with exact zeros where it is pruned, even if the stored number is infinite or NaN."""
        masked = torch.where(self.mask, weight, 0)
        if self.keep_gradient and masked.requires_grad:
            masked.register_hook(self._keep)
        return masked

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


def prunable_layers(model: nn.Module, layers: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Return the layers that can be pruned by qualified name; ``layers`` names those that are wanted (default: all).

    Raises
    ------
    ValueError : a name is not that of a prunable layer, or the model has none.
    """
    found: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE)
    }
    if not found:
        raise ValueError(f"model={type(model).__name__} has no layer to prune: needs nn.Linear, nn.Conv1d or nn.Conv2d")
    if layers is None:
        return found
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r}: must be several names, such as [{layers!r}]")
    wanted = list(layers)
    _known("layers", wanted, found)
    if not wanted:
        raise ValueError("layers=[]: must name at least one layer, or be None for all")
    return {name: module for name, module in found.items() if name in wanted}


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Prune ``model`` in place: the weights where a mask is False or 0 are zero from now on. Returns the model.

    A layer that is masked already gets the new mask in place of the old one: a weight that comes back starts at zero,
    since its old number is gone. Layers that ``masks`` does not name stay as they are. The parameters remain the same
    objects, so an optimizer that is at work goes on.

    Parameters
    ----------
    masks : layer name -> tensor of bool, or of 0 and 1, in the shape of the layer's weight.

    Raises
    ------
    ValueError : a name, a shape or a value does not fit; or a weight is shared with another layer or parametrized.
    """
    layers = prunable_layers(model)
    _known("masks", masks, layers)
    ready = {name: _checked(name, layers[name], mask) for name, mask in masks.items()}
    _refuse_tied(model, {name: layers[name] for name in masks})
    for name, mask in ready.items():
        if is_masked(layers[name]):
            stored = _parametrization(layers[name])
            _store_zeros(stored)
            stored[0].mask.copy_(mask)
        else:
            parametrize.register_parametrization(layers[name], "weight", Masked(mask))
            stored = _parametrization(layers[name])
            stored.register_state_dict_pre_hook(_store_zeros)
        _store_zeros(stored)
    return model


def get_masks(model: nn.Module) -> Masks:
    """Return a copy of the masks in force, by layer name; layers without a mask are left out."""
    return {name: masked_parts(layer)[1].mask.clone() for name, layer in model.named_modules() if is_masked(layer)}


def make_permanent(model: nn.Module) -> nn.Module:
    """Drop all masks in place and leave zeros where they were. Returns the model.

    The layers are ordinary ones again and the parameters the same objects; from here on training may change the zeros.
    """
    for layer in model.modules():
        if is_masked(layer):
            _store_zeros(_parametrization(layer))
            # Copies of a parametrized layer share one class, and torch takes the weight out of that class: give this
            # layer a class of its own, or its copies would be left without weights.
            shared = type(layer)
            layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            # The weight was put back behind the bias: restore the usual order for those who pair up parameters.
            bias = layer.bias
            del layer.bias
            layer.register_parameter("bias", bias)  # type: ignore[arg-type]  # torch takes None too
    return model


def load_masked(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Load the state dict of a masked model into ``model``, in place, masks and all. Returns the model.

    ``model`` may be freshly made. Layers that had no mask when the state was saved have none afterwards.
    """
    make_permanent(model)
    masks = {key.removesuffix(_MASK): mask for key, mask in state_dict.items() if key.endswith(_MASK)}
    apply_masks(model, masks)
    model.load_state_dict(state_dict)
    return model


def sparsity(model: nn.Module, layers: Iterable[str] | None = None) -> float:
    """Return the fraction of weights that are exactly zero in the prunable layers, or in those of them named."""
    weights = [weight_of(layer) for layer in prunable_layers(model, layers).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


# --- Inside -----------------------------------------------------------------------------------------------------------


def weight_of(layer: nn.Module) -> Tensor:
    """Return the weight that the layer works with: masked, where it has a mask."""
    return layer.weight  # type: ignore[return-value]


def is_masked(layer: nn.Module) -> bool:
    """Tell whether the weight of this layer has a mask."""
    return parametrize.is_parametrized(layer, "weight") and isinstance(_parametrization(layer)[0], Masked)


def masked_parts(layer: nn.Module) -> tuple[nn.Parameter, Masked]:
    """Return the stored weight of a masked layer (what the optimizer changes) and its parametrization."""
    return _parametrization(layer).original, _parametrization(layer)[0]


def _parametrization(layer: nn.Module) -> Any:
    return layer.parametrizations.weight  # type: ignore[union-attr]


@torch.no_grad()
def _store_zeros(weight: Any, *_: Any) -> None:
    """Set the stored numbers of pruned weights to zero: the momentum of an optimizer may have moved them."""
    weight.original.copy_(weight())


def _known(argument: str, names: Iterable[str], layers: Mapping[str, nn.Module]) -> None:
    for name in names:
        if name not in layers:
            raise ValueError(f"{argument} names {name!r}: must be a prunable layer, one of {', '.join(layers)}")


def _checked(name: str, layer: nn.Module, mask: Tensor) -> Tensor:
    """Return the mask as a new tensor of bool beside the layer's weight."""
    weight = weight_of(layer)
    if mask.shape != weight.shape:
        raise ValueError(f"masks[{name!r}] has the shape {tuple(mask.shape)}: must be {tuple(weight.shape)}")
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"masks[{name!r}] holds other values than 0 and 1: must be bool, or 0 and 1")
    if parametrize.is_parametrized(layer, "weight") and not is_masked(layer):
        raise ValueError(f"masks names {name!r}, whose weight has another parametrization: must be an ordinary weight")
    return mask.detach().to(weight.device, torch.bool, copy=True)


def _refuse_tied(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        for layer_name, layer in layers.items():
            if first != name and not is_masked(layer) and parameter is layer.weight:
                raise ValueError(
                    f"masks names {layer_name!r}, whose weight is both {first} and {name}: must not be tied"
                )
