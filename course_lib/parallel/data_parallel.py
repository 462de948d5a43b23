r"""Data parallelism: every process (rank) holds the whole model and a share of the batch; gradients are added up.

======================  ================================================  ===================================
name                    what it does                                      source
======================  ================================================  ===================================
``shard, local_loss``   a rank's examples, and its part of the loss       Goyal et al. 2017, arXiv:1706.02677
``average_gradients``   one all-reduce for each parameter, at the end     –
``average_in_buckets``  a few large messages in place of many small       Li et al. 2020, arXiv:2006.15704
``BucketedAverage``     the same, sent while backward still computes      Li et al. 2020, arXiv:2006.15704
======================  ================================================  ===================================

All of it rests on one line. Rank :math:`r` has :math:`n_r` of the batch's :math:`B` examples, so the batch's gradient
is

.. math:: g = \sum_r \frac{n_r}{B}\, g_r,

a weighted mean of the ranks' own. It is the mean of means only where all shares are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib.lab.training import Objective, cross_entropy

MIB = 2**20

# --- A share of the batch ---------------------------------------------------------------------------------------------


def shard(x: Tensor, y: Tensor, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    """Return this rank's share of a batch ``x [N, …]``, ``y [N]``.

    Sizes differ by at most one example, the first ranks having more; with fewer examples than ranks some are empty.

    Raises
    ------
    ValueError : ``rank`` is not one of ``world_size``, or ``x`` and ``y`` differ in length.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank!r}; it must lie between 0 and world_size - 1 = {world_size - 1}")
    if len(x) != len(y):
        raise ValueError(f"y has {len(y)} labels; it must have one for each of the {len(x)} examples of x")
    return x.tensor_split(world_size)[rank], y.tensor_split(world_size)[rank]


def local_loss(model: nn.Module, x: Tensor, y: Tensor, total: int, objective: Objective = cross_entropy) -> Tensor:
    r"""Return this rank's part :math:`\tfrac{n_r}{B} L_r` of the batch's mean loss; the ranks' parts add up to it.

    Weighing the loss rather than the gradient keeps the sum right even where ranks meet inside the model, as they do in
    `SynchronizedBatchNorm2d`. An empty share has loss 0, but still goes through the model: the others wait there.

    Parameters
    ----------
    x, y : this rank's share, possibly empty.
    total : examples in the batch of all ranks.
    objective : a mean over examples.
    """
    if len(y) == 0:
        return 0.0 * model(x).sum()  # the mean over no examples would be NaN
    return objective(model, x, y) * (len(y) / total)


def broadcast_model(model: nn.Module, src: int = 0) -> None:
    """Give all ranks the parameters and buffers of rank ``src``: replicas that start apart never meet again."""
    broadcast_tensors([*model.parameters(), *model.buffers()], src)


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor], src: int) -> None:
    """Overwrite the tensors by those of rank ``src``, in one message for each type of number."""
    for alike in _by_kind(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        dist.broadcast(flat, src)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


# --- One message for each parameter -----------------------------------------------------------------------------------


@torch.no_grad()
def average_gradients(model: nn.Module, share: float | None = None) -> None:
    r"""Replace each gradient by the sum over ranks of ``share`` times theirs, one all-reduce for each parameter.

    A rank where a parameter took no part counts as zero.

    Parameters
    ----------
    share : this rank's weight :math:`n_r / B`; by default ``1 / world_size``, the mean. It is 1 after `local_loss`,
        which has weighed the loss already.
    """
    share = _share(share)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.mul_(share)
            whole = p.grad.contiguous()
            dist.all_reduce(whole)
            p.grad.copy_(whole)


def _share(share: float | None) -> float:
    if share is None:
        return 1 / dist.get_world_size()
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share!r}; it must lie between 0 and 1, or be None for 1 / world_size")
    return share


# --- A few messages for all -------------------------------------------------------------------------------------------


class Bucket:
    """The gradients of several parameters side by side in one flat tensor, which travels as one message.

    Behind them stands one number for each parameter, 1 where this rank has a gradient. Summed, it tells which
    parameters no rank used: those keep ``.grad = None``, as on a single machine.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        sizes = [p.numel() for p in self.parameters]
        self.flat = parameters[0].detach().new_zeros(sum(sizes) + len(sizes))
        *parts, self.used = self.flat.split([*sizes, len(sizes)])
        self.parts = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        self.missing = set(range(len(sizes)))
        self.work: dist.Work | None = None

    @torch.no_grad()
    def put(self, index: int, share: float) -> None:
        """Copy one parameter's gradient, times ``share``, into its place."""
        grad = self.parameters[index].grad
        if grad is None:
            self.parts[index].zero_()
        else:
            torch.mul(grad, share, out=self.parts[index])
        self.missing.discard(index)

    def launch(self) -> None:
        """Start the all-reduce, and return without waiting for it."""
        self.used.copy_(torch.tensor([p.grad is not None for p in self.parameters]))
        self.work = dist.all_reduce(self.flat, async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the sum and copy it back into the gradients."""
        assert self.work is not None
        self.work.wait()
        for p, part, used in zip(self.parameters, self.parts, self.used, strict=True):
            if p.grad is not None:
                p.grad.copy_(part)
            elif used > 0:
                p.grad = torch.empty_like(p).copy_(part)
        self.missing, self.work = set(range(len(self.parameters))), None


def make_buckets(model: nn.Module, bucket_bytes: int = 25 * MIB) -> list[Bucket]:
    """Pack the parameters into buckets of at most ``bucket_bytes`` (a larger parameter has one of its own).

    They are taken from last to first, the order in which backward finishes their gradients. A bucket holds one type of
    number.

    Raises
    ------
    ValueError : ``bucket_bytes`` is not positive, or no parameter can be trained.
    """
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes is {bucket_bytes!r}; it must be positive")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model has no parameter that requires a gradient; there is nothing to average")
    packs: list[list[nn.Parameter]] = []
    room = 0
    for p in reversed(parameters):
        size = p.numel() * p.element_size()
        if not packs or size > room or (p.dtype, p.device) != (packs[-1][0].dtype, packs[-1][0].device):
            packs.append([])
            room = bucket_bytes
        packs[-1].append(p)
        room -= size
    return [Bucket(pack) for pack in packs]


def average_in_buckets(buckets: Sequence[Bucket], share: float | None = None) -> None:
    """Do what `average_gradients` does in one all-reduce for each bucket, after backward."""
    share = _share(share)
    for bucket in buckets:
        for index in range(len(bucket.parameters)):
            bucket.put(index, share)
        bucket.launch()
    for bucket in buckets:
        bucket.finish()


class BucketedAverage:
    """Average gradients while backward still computes: a bucket leaves as soon as its last gradient is there.

    >>> average = BucketedAverage(model)
    >>> local_loss(model, x, y, total).backward()  # buckets leave one by one
    >>> average.wait()                             # the gradients are those of the whole batch
    >>> optimizer.step()

    Parameters
    ----------
    share : as in `average_gradients`, for all steps; assign ``average.share`` before a backward that needs another.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int = 25 * MIB, share: float | None = None) -> None:
        self.share = _share(share)
        self.buckets = make_buckets(model, bucket_bytes)
        self.launched = 0
        self.silent = False
        self.hooks = [
            p.register_post_accumulate_grad_hook(partial(self._ready, bucket, index))
            for bucket in self.buckets
            for index, p in enumerate(bucket.parameters)
        ]

    def _ready(self, bucket: Bucket, index: int, _: Tensor) -> None:
        """Take over a gradient that backward has just finished."""
        if self.silent:
            return
        if index not in bucket.missing:
            raise RuntimeError("backward ran twice without wait(): put all but the last backward under no_sync()")
        bucket.put(index, self.share)
        # Always in this order: ranks that send different buckets at the same time would add up different things.
        while self.launched < len(self.buckets) and not self.buckets[self.launched].missing:
            self.buckets[self.launched].launch()
            self.launched += 1

    def wait(self) -> None:
        """Send what has not left yet (parameters without a gradient hold a bucket back), then wait for all."""
        for bucket in self.buckets[self.launched :]:
            for index in list(bucket.missing):
                bucket.put(index, self.share)
            bucket.launch()
        for bucket in self.buckets:
            bucket.finish()
        self.launched = 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate: the gradients of a backward in here stay on this rank until one outside."""
        self.silent = True
        try:
            yield
        finally:
            self.silent = False

    def remove(self) -> None:
        """Take the hooks off the model again."""
        for hook in self.hooks:
            hook.remove()
