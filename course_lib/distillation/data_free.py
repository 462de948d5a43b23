r"""Images out of a teacher: what batch norm remembers of the training images is enough to draw others like them.

=======================  ===================================================  =========================================
name                     what it does                                         source
=======================  ===================================================  =========================================
``invert``               images that the teacher takes for given classes      Yin et al. 2019, arXiv:1912.08795
``statistics_distance``  how far a batch is from what batch norm remembers    Yin et al. 2019
``total_variation``      how rough an image is                                Mahendran & Vedaldi 2014,
                                                                              arXiv:1412.0035
``inverted``             such images as a training split, for a student
                         that never sees a real one
=======================  ===================================================  =========================================

Images are normalised floats ``[N, C, H, W]``, as the networks see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from course_lib.lab.arguments import at_least
from course_lib.lab.data import Dataset, Split
from course_lib.regularization.drawing import check_not_negative, check_positive

# --- What batch norm remembers ----------------------------------------------------------------------------------------


def batch_norms(teacher: nn.Module) -> list[_BatchNorm]:
    """Return the network's layers of batch norm that keep running statistics.

    Raises
    ------
    ValueError : there are none.
    """
    found = [part for part in teacher.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    if not found:
        raise ValueError(
            f"teacher={type(teacher).__name__} has no batch norm with running statistics: must have some, they are "
            "what is known of its training images"
        )
    return found


@contextmanager
def _inputs_of(layers: list[_BatchNorm]) -> Iterator[list[Tensor]]:
    """Within it, what goes into these layers in the last pass, in the order of their calls."""
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(_apart(layer, inputs[0]))

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _apart(layer: Any, x: Tensor) -> Tensor:
    r"""Return :math:`\|\mu(x)-\mu\|_2+\|\sigma^2(x)-\sigma^2\|_2` of one layer."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    mean, variance = x.mean(dims), x.var(dims, unbiased=False)
    of_mean, of_variance = mean - layer.running_mean, variance - layer.running_var
    return of_mean.norm() + of_variance.norm()


def statistics_distance(teacher: nn.Module, x: Tensor) -> Tensor:
    r"""Return :math:`\sum_l\|\mu_l(x)-\mu_l\|_2+\|\sigma^2_l(x)-\sigma^2_l\|_2` over the layers of batch norm.

    :math:`\mu_l(x)` and :math:`\sigma^2_l(x)` are of what goes into layer l, by channel over batch and places; the
    others are its running statistics. The teacher must be in evaluation mode.

    Raises
    ------
    ValueError : the teacher has no batch norm with running statistics.
    """
    with _inputs_of(batch_norms(teacher)) as apart:
        teacher(x)
    return torch.stack(apart).sum()


def total_variation(x: Tensor) -> Tensor:
    r"""Return the mean absolute difference of neighbours, down and to the right, of ``[N, C, H, W]``.

    The paper's own code sums squares over four directions under a root; a mean does not depend on the size.
    """
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()


# --- Images -----------------------------------------------------------------------------------------------------------


def invert(
    teacher: nn.Module,
    labels: Tensor,
    input_shape: tuple[int, int, int],
    *,
    generator: torch.Generator,
    steps: int = 200,
    lr: float = 0.1,
    statistics: float = 1.0,
    variation: float = 0.1,
    size: float = 0.01,
    jitter: int = 1,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    r"""Return one image a label ``[N, C, H, W]``, drawn from noise by gradients through the teacher.

    Adam's ``steps`` minimise the cross-entropy of the labels, ``statistics`` times the ``statistics_distance``,
    ``variation`` times the ``total_variation`` and ``size`` times the mean square of the image. The batch is what the
    statistics are taken of: 32 images or more, of all classes. The teacher stays as it is.

    Parameters
    ----------
    labels : int64 ``[N]``.
    generator : a CPU generator, for the noise and the jitter.
    jitter : at each step the whole batch is rolled by up to so many pixels each way: what is seen only at one place is
        a trick on the teacher, and no sign.
    bounds : the least and the largest value of a channel, each ``[C]``: what ``black_and_white(split)`` gives.

    Raises
    ------
    ValueError : the teacher has no batch norm with running statistics, ``labels`` are not its classes, ``steps`` is
        below 1, ``jitter`` below 0, ``lr`` no number above 0, or a weight none of at least 0.
    """
    at_least(1, steps=steps)
    at_least(0, jitter=jitter)
    check_positive(lr=lr)
    check_not_negative(statistics=statistics, variation=variation, size=size)
    layers = batch_norms(teacher)
    if labels.dtype != torch.int64 or labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: must be int64 [N], N > 0")
    like = next(p for p in teacher.parameters() if p.is_floating_point())
    labels = labels.to(like.device)
    x = torch.randn((len(labels), *input_shape), generator=generator, dtype=like.dtype).to(like.device)
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    with _at_rest(teacher), torch.enable_grad():
        for _ in range(steps):
            down, right = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
            with _inputs_of(layers) as apart:
                logits = teacher(x.roll((down, right), (2, 3)))
            _check_classes(labels, logits)
            loss = F.cross_entropy(logits, labels) + statistics * torch.stack(apart).sum()
            loss = loss + variation * total_variation(x) + size * x.square().mean()
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            if bounds is not None:
                with torch.no_grad():
                    low, high = (bound.to(x).view(-1, 1, 1) for bound in bounds)
                    x.copy_(x.clamp(low, high))
    return x.detach()


def _check_classes(labels: Tensor, logits: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels hold {low if low < 0 else high}: must be the teacher's classes, 0 to {logits.shape[1] - 1}"
        )


@contextmanager
def _at_rest(teacher: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the mode that was."""
    was_training = teacher.training
    teacher.eval()
    try:
        yield
    finally:
        teacher.train(was_training)


def black_and_white(split: Split) -> tuple[Tensor, Tensor]:
    """Return what 0 and 255 become in each channel when normalised, each ``[C]``: the ``bounds`` of ``invert``."""
    mean, std = torch.tensor(split.mean), torch.tensor(split.std)
    return -mean / std, (1 - mean) / std


def inverted(data: Dataset, x: Tensor, labels: Tensor) -> Dataset:
    """Return the data set with these images, and no others, to train on: normalised ``x`` as pixels again, rounded.

    Validation and test split stay, and so does the normalisation: two numbers a channel are known of the real images.

    Raises
    ------
    ValueError : ``x`` are not images like the data set's, one a label.
    """
    shape = data.input_shape
    if data.train.inputs.dtype != torch.uint8 or x.shape != (len(labels), *shape):  # type: ignore[union-attr]
        raise ValueError(f"x is {list(x.shape)}: must be [{len(labels)}, *{list(shape)}], images as the data set's")
    mean, std = (torch.tensor(each, device=x.device).view(-1, 1, 1) for each in (data.train.mean, data.train.std))
    pixels = (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)
    where = data.train.device
    return replace(data, train=replace(data.train, inputs=pixels.to(where), labels=labels.to(where)))
