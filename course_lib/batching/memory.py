r"""Memory: what a training step holds, and the largest batch that fits.

========================  ===========================================================================================
name                      what it gives
========================  ===========================================================================================
``saved_bytes``           bytes that one forward pass keeps for its backward pass
``predicted_memory``      weights, gradients, optimizer state and saved activations at any batch size
``largest_batch_under``   the largest batch whose prediction stays under a limit
``largest_batch``         the largest that passes a test: doubling, then bisection
``fits_on_device``        such a test: a real training step, which may run out of memory
========================  ===========================================================================================

All but the activations are the same for each batch; those grow with it on a straight line, so two small batches tell
all of them. What a kernel needs for a moment is not counted, so the real peak lies above the prediction (a tenth or two
for the networks of the laboratory): leave a margin, or let ``fits_on_device`` have the last word.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, require
from course_lib.lab.training import Inputs, Objective, cross_entropy
from course_lib.optimizers import state_bytes

MakeOptimizer = Callable[[Iterator[tuple[str, nn.Parameter]]], Optimizer]
MakeBatch = Callable[[int], tuple[Inputs, Tensor]]
"""``size -> (x, y)``, on the device that is asked about."""

_ENDLESS = 2**40

# --- What a step holds ------------------------------------------------------------------------------------------------


def saved_bytes(model: nn.Module, x: Inputs, y: Tensor, *, objective: Objective = cross_entropy) -> int:
    """Return the bytes that the forward pass of a batch keeps for the backward pass, weights and buffers apart.

    Tensors that share their memory count once. The batch itself counts where a layer keeps it. The model is copied,
    and taken in the mode that it is in.
    """
    plain = copy.deepcopy(model)
    own = {_address(tensor) for tensor in (*plain.parameters(), *plain.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_address(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(plain, x, y)
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of a training step as a function of the batch size: ``memory(256)``.

    Attributes
    ----------
    weights : parameters and buffers.
    gradients : of the parameters that are trained.
    state : what the optimizer keeps beside them after a step.
    saved_fixed, saved_per_example : activations kept for the backward pass, whatever the batch, and for each example.
    """

    weights: int
    gradients: int
    state: int
    saved_fixed: float
    saved_per_example: float

    @property
    def fixed(self) -> float:
        """Bytes that do not depend on the batch."""
        return self.weights + self.gradients + self.state + self.saved_fixed

    def __call__(self, batch_size: int) -> int:
        at_least(1, batch_size=batch_size)
        return round(self.fixed + self.saved_per_example * batch_size)


def predicted_memory(
    model: nn.Module, x: Inputs, y: Tensor, optimizer: MakeOptimizer, *, objective: Objective = cross_entropy
) -> MemoryModel:
    """Measure a small batch and half of it, and the state of ``optimizer`` after a step; return what they predict.

    Parameters
    ----------
    x, y : a batch of at least 4 examples; an even number, so that its half is one half.
    optimizer : as in ``Recipe``: named parameters -> an optimizer. It steps a copy of the model.

    Raises
    ------
    ValueError : ``y`` holds fewer than 4 examples, or an odd number.
    """
    require("the examples of y", len(y), lambda n: n >= 4 and n % 2 == 0, "an even number of at least 4")
    plain = copy.deepcopy(model)
    stepped = optimizer(plain.named_parameters())
    objective(plain, x, y).backward()
    gradients = sum(_bytes(p.grad) for p in plain.parameters() if p.grad is not None)
    stepped.step()
    half = len(y) // 2
    few, all_ = (saved_bytes(model, _first(x, n), y[:n].clone(), objective=objective) for n in (half, len(y)))
    each = (all_ - few) / half
    weights = sum(map(_bytes, (*plain.parameters(), *plain.buffers())))
    return MemoryModel(weights, gradients, state_bytes(stepped), few - each * half, each)


def _first(x: Inputs, count: int) -> Inputs:
    # cloned: a view would count the memory of all that it is a view of
    return tuple(part[:count].clone() for part in x) if isinstance(x, tuple) else x[:count].clone()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def largest_batch_under(limit_bytes: float, memory: MemoryModel) -> int:
    """Return the largest batch with ``memory(batch) <= limit_bytes``.

    Raises
    ------
    ValueError : one example does not fit; or the batch costs nothing, so that there is no largest.
    """
    if memory(1) > limit_bytes:
        raise ValueError(f"limit_bytes={limit_bytes!r}: must be at least {memory(1)}, what one example needs")
    if memory.saved_per_example <= 0:
        raise ValueError(f"memory={memory!r}: must grow with the batch")
    size = max(1, int((limit_bytes - memory.fixed) / memory.saved_per_example))
    while memory(size + 1) <= limit_bytes:  # division and memory() round
        size += 1
    while memory(size) > limit_bytes:
        size -= 1
    return size


# --- By trying --------------------------------------------------------------------------------------------------------


def largest_batch(fits: Callable[[int], bool], *, low: int = 1, high: int | None = None) -> int:
    """Return the largest size from ``low`` to ``high`` that ``fits``: doubled until one does not, then bisected.

    About :math:`2 log_2` of the answer tries, and none above twice of it. A size below one that fits must fit too.
    Memory that a try left behind is freed after it.

    Raises
    ------
    ValueError : ``low`` does not fit, ``high`` is below ``low``, or there is no end to what fits.
    """
    at_least(1, low=low)
    if high is not None:
        at_least(low, high=high)

    def tried(size: int) -> bool:
        passed = fits(size)
        _free()
        return passed

    if not tried(low):
        raise ValueError(f"low={low}: {'not even one example fits' if low == 1 else 'does not fit'}; must fit")
    most, too_many = low, None
    while too_many is None:
        if most == high:
            return most
        if most >= _ENDLESS:
            raise ValueError(f"high={high!r}: {most:,} examples fit, so there seems to be no end; must be a number")
        size = 2 * most if high is None else min(2 * most, high)
        most, too_many = (size, None) if tried(size) else (most, size)
    while too_many - most > 1:
        size = (most + too_many) // 2
        most, too_many = (size, too_many) if tried(size) else (most, size)
    return most


def fits_on_device(
    model: nn.Module, make_batch: MakeBatch, optimizer: MakeOptimizer, *, objective: Objective = cross_entropy
) -> Callable[[int], bool]:
    """Return ``size -> bool``: whether a step on so many examples passes without ``torch.cuda.OutOfMemoryError``.

    Two training steps are taken, on a copy of the model where it lies: the second meets the optimizer's state. Any
    other error is raised. On a CPU the operating system rather ends the process than refuse: predict there instead.
    """

    def fits(size: int) -> bool:
        try:
            _two_steps(copy.deepcopy(model), make_batch, optimizer, objective, size)
        except torch.OutOfMemoryError:
            return False
        return True

    return fits


def _two_steps(
    model: nn.Module, make_batch: MakeBatch, optimizer: MakeOptimizer, objective: Objective, size: int
) -> None:
    made: Any = optimizer(model.named_parameters())
    x, y = make_batch(size)
    for _ in range(2):
        made.zero_grad(set_to_none=True)
        objective(model, x, y).backward()
        made.step()
    if y.device.type == "cuda":
        torch.cuda.synchronize(y.device)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
