"""2:4 sparse layers for CUDA's sparse tensor cores.

====================  ===============================================================================================
``semi_structured``   2:4 sparse linear layers in the format that CUDA's sparse tensor cores compute with
====================  ===============================================================================================

Zeros by themselves save nothing but bytes in a compressed file (``course_lib.lab.costs`` counts). Time is saved by
layers that are really smaller (``shrink``) or by a pattern that the hardware knows (2:4; Mishra et al. 2021, arXiv
2104.08378).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from course_lib.pruning.masks import make_permanent


def is_2_of_4(weight: Tensor) -> bool:
    """Tell whether at most 2 of each 4 neighbours along the input dimension are not zero."""
    if weight.shape[-1] % 4:
        return False
    return bool((weight.unflatten(-1, (-1, 4)).count_nonzero(-1) <= 2).all())


@torch.no_grad()
def semi_structured(model: nn.Module) -> nn.Module:
    """Return a copy of the network whose 2:4 sparse linear layers are stored and computed in compressed form.

    Layers without that pattern stay dense. Half the weights are stored, with 2 bits each for their places; CUDA's
    sparse tensor cores skip the others.

    Raises
    ------
    ValueError : the network is not on CUDA (there is no kernel elsewhere), no linear layer has the pattern, or one that
        has it has a shape or a type that the kernels refuse.
    """
    model = make_permanent(copy.deepcopy(model))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and is_2_of_4(m.weight)}
    if not layers:
        raise ValueError("model has no linear layer with at most 2 of 4 weights: prune it with n_of_m(scores, 2, 4)")
    for name, layer in layers.items():
        if layer.weight.device.type != "cuda":
            raise ValueError(
                f"model: {name!r} is on {layer.weight.device}: must be on cuda, the only device with kernels"
            )
        try:
            layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight), layer.weight.requires_grad)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"model: {name!r} cannot be made 2:4 sparse: {error}") from error
    return model
