"""Batch norm in data-parallel training: by the statistics of the whole batch, not of each rank's share.

===========================  ========================================  =============================================
name                         what it does                              source
===========================  ========================================  =============================================
``SynchronizedBatchNorm2d``  normalises by the mean and variance of    Peng et al. 2017 (MegDet), arXiv:1711.07240
(and ``…1d``)                all ranks' examples                       batch norm: Ioffe & Szegedy, arXiv:1502.03167
``synchronize_batchnorm``    puts it in the place of the usual one     –
===========================  ========================================  =============================================

Without it a data-parallel run trains another function than a single process does: each example is normalised together
with those that happen to lie on its own rank. ``torch.nn.SyncBatchNorm`` does the same on GPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, which gradients can go through.

    Every rank's loss depends on every rank's input, so backward adds up what all of them send back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return SumOverRanks.forward(ctx, grad)


def global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[C]`` and biased variance ``[C]`` of ``x [N, C, …]`` over the examples of all ranks, and their count.

    Two sums, the second of squares around the common mean: a sum of plain squares would cancel where the mean is large.
    Shares may be uneven or empty.
    """
    over = [axis for axis in range(x.ndim) if axis != 1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = SumOverRanks.apply(torch.cat([x.sum(over), x.new_tensor([x.numel() // x.shape[1]])]))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    squares = (x - _channelwise(mean, x)).square().sum(over)
    return mean, SumOverRanks.apply(squares) / count, count


def _channelwise(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))  # [C] -> [C, 1, …]


class _Synchronized(_BatchNorm):
    """Batch norm that normalises by `global_statistics` in training; in evaluation, the usual one."""

    def forward(self, x: Tensor) -> Tensor:  # the namesake calls it input
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        self._check_input_dim(x)
        mean, variance, count = global_statistics(x)
        if self.track_running_stats:
            self.remember(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1))
        normal = (x - _channelwise(mean, x)) * _channelwise((variance + self.eps).rsqrt(), x)
        if self.affine:
            normal = normal * _channelwise(self.weight, x) + _channelwise(self.bias, x)
        return normal.to(x.dtype)

    def remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards this batch's; without a momentum they are the mean of all batches."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean += weight * (mean - self.running_mean)
        self.running_var += weight * (variance - self.running_var)


class SynchronizedBatchNorm1d(_Synchronized, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` over the batch of all ranks."""


class SynchronizedBatchNorm2d(_Synchronized, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` over the batch of all ranks."""


def synchronize_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every ``BatchNorm1d`` and ``BatchNorm2d`` by its synchronized twin, which takes over its tensors.

    The model is changed in place and returned; only where it is itself a batch norm does another module come back.
    """
    for name, child in model.named_children():
        setattr(model, name, synchronize_batchnorm(child))
    for plain, synchronized in (
        (nn.BatchNorm1d, SynchronizedBatchNorm1d),
        (nn.BatchNorm2d, SynchronizedBatchNorm2d),
    ):
        if type(model) is plain:
            twin = synchronized(model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats)
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"):
                setattr(twin, name, getattr(model, name))
            return twin
    return model
