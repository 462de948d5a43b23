"""At the door of ``fit``: what does not fit together is named by its slot, with what it gave and what is needed.

Nothing here runs at each step: the network is tried on one example before the first, and a gradient that could not be
computed is explained when torch has already failed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import require
from course_lib.lab.data import Dataset, batches


def check_network(model: nn.Module, data: Dataset) -> None:
    """Try the network on one example.

    Raises
    ------
    ValueError : a split is empty; nothing in the network can be trained, it cannot take such an example, or it has
        fewer outputs than classes.
    """
    for name, split in {"data.train": data.train, "data.val": data.val}.items():
        require(name, split, lambda s: len(s) > 0, "of at least one example")
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        frozen = "all its weights are frozen" if next(model.parameters(), None) is not None else "it has no weights"
        raise ValueError(
            f"model={type(model).__name__}: there is nothing to train, {frozen}; at least one weight is needed"
        )
    x, _ = next(batches(data.train, 1, dtype=weights[0].dtype))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(x)
    except (RuntimeError, ValueError, TypeError) as error:
        shape = "×".join(map(str, x.shape[1:])) if isinstance(x, Tensor) else [tuple(part.shape[1:]) for part in x]
        raise ValueError(
            f"model={type(model).__name__} cannot take an example of {data.name} (inputs of {shape}): {error}"
        ) from error
    finally:
        model.train(was_training)
    classes = len(data.classes)
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] < classes:
        raise ValueError(
            f"model={type(model).__name__} has {logits.shape[1]} outputs; {data.name} has {classes} classes and needs "
            "as many outputs"
        )


def checked_optimizer(made: Any) -> Optimizer:
    """What the recipe's ``optimizer`` made, if it is one.

    Raises
    ------
    ValueError : it is not.
    """
    if not isinstance(made, Optimizer):
        raise ValueError(
            f"optimizer gave {made!r:.80}; it must take model.named_parameters() and give a torch.optim.Optimizer, "
            "for instance partial(torch.optim.Adam, lr=1e-3)"
        )
    return made


def checked_schedule(made: Any) -> Any:
    """What the recipe's ``schedule`` made, if it can be advanced and stored.

    Raises
    ------
    ValueError : it cannot.
    """
    if not all(hasattr(made, name) for name in ("step", "state_dict", "load_state_dict")):
        raise ValueError(
            f"schedule gave {made!r:.80}; it must take (optimizer, total_steps) and give a scheduler of "
            "torch.optim.lr_scheduler, or something with step(), state_dict() and load_state_dict()"
        )
    return made


def why_no_gradient(loss: Any, error: Exception) -> Exception:
    """The error to raise when ``loss.backward()`` failed: in the recipe's words, or torch's own where they say more."""
    needed = "objective must give a scalar tensor that depends on the weights"
    if not isinstance(loss, Tensor):
        return ValueError(f"objective gave {type(loss).__name__} {loss!r:.60}: {needed}; do not call .item() on it")
    if loss.numel() != 1:
        return ValueError(f"objective gave a tensor of shape {list(loss.shape)}: {needed}; take its mean, for instance")
    if not loss.requires_grad:
        return ValueError(
            f"objective gave a tensor without a gradient: {needed}; is it computed under no_grad, or detached?"
        )
    return error
