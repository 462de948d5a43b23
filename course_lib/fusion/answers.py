"""What several members say of the same examples, and the checks at the door that all of fusion shares.

==================  =================================================================================================
name                what it gives
==================  =================================================================================================
``members_logits``  the logits of several networks on one split, ``[M, N, K]``
``exact``           logits ``[M, N, K]`` in float64, checked
``shares``          the weights of M members: equal ones, or those given, checked and summing to 1
``check_labels``    refuses labels that do not fit the answers
==================  =================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import require
from course_lib.lab.data import Split
from course_lib.lab.training import logits_of

Weights = Sequence[float] | Tensor | None
"""One number of at least 0 a member, of any sum above 0; ``None`` for equal ones."""


def members_logits(models: Sequence[nn.Module], split: Split) -> Tensor:
    """Return the logits ``[M, N, K]`` of each network on a split, in evaluation mode and without gradients.

    Raises
    ------
    ValueError : there are no networks.
    """
    require("models", [*models], bool, "at least one network")
    return torch.stack([logits_of(model, split) for model in models])


def check_logits(logits: Tensor) -> None:
    """Raise ValueError unless these are floats ``[M, N, K]`` of at least one member, example and class."""
    if logits.ndim != 3 or not logits.is_floating_point() or not logits.numel():
        raise ValueError(f"logits={logits.dtype} {list(logits.shape)}: must be floats [M, N, K], none of them 0")


def exact(logits: Tensor) -> Tensor:
    """Return logits ``[M, N, K]`` in float64, without gradients.

    Raises
    ------
    ValueError : they have another shape or type.
    """
    check_logits(logits)
    return logits.detach().double()


def shares(weights: Weights, like: Tensor) -> Tensor:
    """Return the weights ``[M]`` of the M members of ``like`` ``[M, …]``, in its type and place, summing to 1.

    Raises
    ------
    ValueError : there are not M of them, one is below 0 or not finite, or all are 0.
    """
    count, dtype = len(like), like.dtype if like.is_floating_point() else torch.float64
    if weights is None:
        return torch.full((count,), 1 / count, dtype=dtype, device=like.device)
    found = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
    if found.shape != (count,) or not found.isfinite().all() or (found < 0).any() or not found.any():
        raise ValueError(f"weights={found.tolist()}: must be {count} numbers of at least 0, not all of them 0")
    return (found / found.sum()).to(like.device, dtype)


def check_labels(labels: Tensor, examples: int, classes: int) -> None:
    """Raise ValueError unless labels are int64 ``[N]``, from 0 to below the number of classes."""
    if labels.dtype != torch.int64 or labels.shape != (examples,):
        raise ValueError(f"labels={labels.dtype} {list(labels.shape)}: must be int64 [{examples}], as the answers are")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        found = f"from {int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"labels={found}: must be classes from 0 to {classes - 1}")


def check_named(named: Tensor, classes: int) -> None:
    """Raise ValueError unless named classes are int64 ``[M, N]``, from 0 to below the number of classes."""
    require("classes", classes, lambda k: isinstance(k, int) and k >= 1, "a whole number of at least 1")
    if named.dtype != torch.int64 or named.ndim != 2 or not named.numel():
        raise ValueError(f"named={named.dtype} {list(named.shape)}: must be int64 [M, N], none of them 0")
    if not 0 <= int(named.min()) <= int(named.max()) < classes:
        found = f"from {int(named.min())} to {int(named.max())}"
        raise ValueError(f"named={found}: must be classes from 0 to {classes - 1}")
