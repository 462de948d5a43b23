"""Putting tensors of another size into a network, so that its layers know their new sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from course_lib.lab.tracing import BATCH_NORMS, CONVOLUTIONS, INSTANCE_NORMS, TRANSPOSED, CannotShrink, Inputs
from course_lib.merging.states import home, in_evaluation


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor, of whatever shape, in the place of the parameter or buffer of that name."""
    path, _, own = name.rpartition(".")
    layer = model.get_submodule(path)
    if own in layer._parameters:
        old = layer._parameters[own]
        layer._parameters[own] = nn.Parameter(value.detach().clone(), old is not None and old.requires_grad)
    else:
        layer._buffers[own] = value.detach().clone()


def recount(model: nn.Module) -> None:
    """Set the numbers of channels that the layers know to those of their parameters."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, CONVOLUTIONS):
            if 1 < layer.groups == layer.in_channels:  # depthwise
                layer.groups = layer.weight.shape[0] * layer.groups // layer.out_channels
            layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        elif isinstance(layer, TRANSPOSED):
            layer.in_channels, layer.out_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        elif isinstance(layer, BATCH_NORMS + INSTANCE_NORMS):
            some = layer.weight if layer.affine else layer.running_mean
            layer.num_features = layer.num_features if some is None else len(some)
        elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
            layer.normalized_shape = tuple(layer.weight.shape)
        elif isinstance(layer, nn.PReLU):
            layer.num_parameters = len(layer.weight)
        elif isinstance(layer, nn.Embedding):
            layer.embedding_dim = layer.weight.shape[1]


@torch.no_grad()
def answers(model: nn.Module, example: Inputs) -> Tensor:
    """What the network says of noise in the shape of the example, the same at every call; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    inputs = example if isinstance(example, tuple) else (example,)
    noise = [torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x for x in inputs]
    where = home(model)
    with in_evaluation(model):
        return model(*(x.to(where) if x.is_floating_point() else x.to(where.device) for x in noise))


def check_answers(wanted: Tensor, model: nn.Module, example: Inputs, what: str) -> None:
    """Refuse a network that does not give these answers: its channels are laid out in a way that nobody foresaw.

    Raises
    ------
    CannotShrink : it fails, or says something else by more than rounding.
    """
    try:
        found = answers(model, example)
    except RuntimeError as error:
        raise CannotShrink(f"{what}: the new network fails: {error}") from error
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5 * max(1.0, float(wanted.abs().max()))
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=tolerance, equal_nan=True):
        raise CannotShrink(f"{what}: the new network computes something else")
