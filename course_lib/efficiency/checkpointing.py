r"""Activation checkpointing: what backward needs is computed a second time instead of being kept.

=======================  =====================================================  =======================================
name                     what it does or gives                                  source
=======================  =====================================================  =======================================
``recomputed``           a part of a network keeps its input alone, and runs    Chen et al. 2016, arXiv:1604.06174;
                         again when backward comes to it                        ``torch.utils.checkpoint``
``checkpointed``         a network of layers in segments, each recomputed       Chen et al. 2016
``held``                 activations held by k segments of n layers             Chen et al. 2016, section 3
``best_segments``        the k that holds least: the square root of n           Chen et al. 2016
``time_ratio``           how much longer a step takes: one more forward pass    Chen et al. 2016
``activations``          which bytes each segment would hold                    –
``best_cuts``            the cuts with the lowest peak, for uneven layers       –
``selective``            products are kept, what is cheap is recomputed         Korthikanti et al. 2022,
                                                                                arXiv:2205.05198
=======================  =====================================================  =======================================

Outputs and gradients do not change by a bit, dropout included: the second run starts from the random state of the
first. Batch norm's running statistics would move twice for one batch (with momentum m as if it were
:math:`1 - (1-m)^2`, which is what happens under ``torch.utils.checkpoint``); here the second run leaves them alone.
``revolving`` goes further down in memory, where a layer is recomputed more than once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.partitioning.cutting import chain

# --- Running a part again ---------------------------------------------------------------------------------------------


class _Recomputed(torch.autograd.Function):
    """Forward without a graph; backward builds it anew and goes through it at once."""

    @staticmethod
    def forward(ctx: Any, layers: nn.Module, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.layers, ctx.circumstances = layers, Circumstances.of(x)
        ctx.save_for_backward(x, *weights)  # the weights are there anyway
        return layers(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        _, wants_x, *_ = ctx.needs_input_grad
        x = x.detach().requires_grad_(wants_x)
        with ctx.circumstances.again(), statistics_left_alone(ctx.layers):
            y = ctx.layers(x)
        return None, *gradients(y, (x, *weights), grad)


def gradients(y: Tensor, wrt: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """The gradient with respect to each, None for what wants none."""
    wanted = [tensor for tensor in wrt if tensor.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True) if wanted else ())
    return [next(found) if tensor.requires_grad else None for tensor in wrt]


def recomputed(layers: nn.Module, x: Tensor) -> Tensor:
    """Return ``layers(x)``; until backward only ``x`` is kept, then the layers run once
    more.

    Gradients are those without it, bit for bit. There are no gradients of gradients.

    Parameters
    ----------
    x : the one input, of any shape. What else the layers depend on has to be their
        parameters, or want no gradient.
    """
    return _Recomputed.apply(layers, x, *layers.parameters())


@dataclass(frozen=True)
class Circumstances:
    """What a run depends on besides its input: the random state, and automatic mixed precision.

    Attributes
    ----------
    device : of the input.
    random : the states of the processor's generator and, on a GPU, of its own.
    autocast : on or off, the type, whether casts of weights are cached; on the device and on the processor.
    """

    device: torch.device
    random: tuple[Tensor, Tensor | None] = field(repr=False)
    autocast: tuple[tuple[str, bool, torch.dtype, bool], ...]

    @classmethod
    def of(cls, x: Tensor) -> Circumstances:
        """Those of now, for a run on ``x``."""
        on_gpu = torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else None
        cached = torch.is_autocast_cache_enabled()
        autocast = tuple(
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cached)
            for kind in dict.fromkeys(("cpu", x.device.type))
        )
        return cls(x.device, (torch.get_rng_state(), on_gpu), autocast)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Bring them back, with gradients on; afterwards the generators go on where they were."""
        on_gpu = self.random[1]
        with torch.random.fork_rng([self.device] if on_gpu is not None else []), torch.enable_grad():
            torch.set_rng_state(self.random[0])
            if on_gpu is not None:
                torch.cuda.set_rng_state(on_gpu, self.device)
            with _autocasts(self.autocast):
                yield


@contextmanager
def _autocasts(states: Sequence[tuple[str, bool, torch.dtype, bool]]) -> Iterator[None]:
    if not states:
        yield
        return
    kind, enabled, dtype, cached = states[0]
    with torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=cached), _autocasts(states[1:]):
        yield


@contextmanager
def statistics_left_alone(layers: nn.Module) -> Iterator[None]:
    """Let batch norms normalise as ever, in training by their batch, but leave their
    running statistics as they are.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = (layer for layer in layers.modules() if isinstance(layer, kind))
    tracking = [norm for norm in norms if norm.track_running_stats]
    try:
        for norm in tracking:
            norm.track_running_stats = False
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


# --- A network in segments --------------------------------------------------------------------------------------------


class Chained(nn.Module):
    """A network whose layers run one after the other in a way of its own: the same parameters, answers and modes.

    Attributes
    ----------
    model : the network itself; what trains this trains it.
    layers : its layers in order, ``partitioning.cutting.chain``.
    run : ``(layers, x) -> y``.
    """

    def __init__(self, model: nn.Module, run: Callable[[list[nn.Module], Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, run
        self.layers = layers_of(model)  # a plain list: the modules are the model's

    def forward(self, x: Tensor) -> Tensor:
        """What the network gives."""
        return self.run(self.layers, x)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers which, one after the other, are the network; a layer that it has twice comes twice.

    Raises
    ------
    ValueError : the network is no ``nn.Sequential`` and none of the laboratory's.
    """
    return [*model] if isinstance(model, nn.Sequential) else [layer for _, layer in chain(model)]


def checkpointed(model: nn.Module, segments: int | Sequence[int]) -> Chained:
    """Return a network that is recomputed segment by segment in the backward pass, but for the last, which is fresh.

    Parameters
    ----------
    model : an ``nn.Sequential`` or a network of the laboratory; residual and encoder blocks stay whole.
    segments : how many, of the same number of layers as far as possible; or the first layer of each but the first, as
        ``best_cuts`` gives them.

    Raises
    ------
    ValueError : there are fewer layers than segments, the cuts do not rise, or the network is no chain.
    """
    count = len(layers_of(model))
    cuts = even_cuts(count, segments) if isinstance(segments, int) else list(segments)
    rising = all(a < b for a, b in pairwise([0, *cuts, count]))
    require("segments", segments, lambda _: rising, f"a number or rising layers, from 1 to {count - 1}")
    return Chained(model, partial(in_segments, cuts=cuts))


def even_cuts(layers: int, segments: int) -> list[int]:
    """Return the first layer of each segment but the first, if all are as long as can
    be; the longer ones come last.

    Raises
    ------
    ValueError : a number is below 1, or there are more segments than layers.
    """
    at_least(1, layers=layers, segments=segments)
    most = f"at most the number of layers, {layers}"
    require("segments", segments, lambda k: k <= layers, most)
    return [number * layers // segments for number in range(1, segments)]


def in_segments(
    layers: Sequence[nn.Module],
    x: Tensor,
    *,
    cuts: Sequence[int],
) -> Tensor:
    """Return what the layers give, one after the other; all but the last segment are
    recomputed in the backward pass.
    """
    *segments, last = pairwise([0, *cuts, len(layers)])
    for first, end in segments:
        x = recomputed(nn.Sequential(*layers[first:end]), x)
    return nn.Sequential(*layers[slice(*last)])(x)


def held(layers: int, segments: int) -> float:
    r"""Return the activations that are held at most: inputs of segments, and inside the
    one that backward is in.

    .. math:: k + \frac{n}{k}, \qquad \text{least } 2\sqrt n \text{ at } k = \sqrt n

    for n layers alike in k segments; in place of n.
    """
    at_least(1, layers=layers, segments=segments)
    return segments + layers / segments


def best_segments(layers: int) -> int:
    """Return the number of segments with which ``held`` is least: the square root of
    the number of layers, to a whole number.
    """
    at_least(1, layers=layers)
    root = math.isqrt(layers)
    return min((root, root + 1), key=lambda segments: held(layers, segments))


def time_ratio(segments: int | None = None, *, backward: float = 2.0) -> float:
    r"""Return the time of a step with recomputation, in steps without.

    .. math:: 1 + \frac{(k - 1) / k}{1 + b} \;\to\; \frac43

    for k segments alike and a backward pass that takes b forward passes (2: a product
    for the inputs, one for the weights). None is the limit of many segments.
    """
    require("backward", backward, lambda b: is_number(b) and b >= 0, "forward passes, 0 or more")
    if segments is not None:
        at_least(1, segments=segments)
    again = 1.0 if segments is None else (segments - 1) / segments
    return 1 + again / (1 + backward)


# --- Uneven layers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes of the activations of n layers.

    Attributes
    ----------
    inputs : ``[n]``: the input of each layer.
    inside : ``[n, n + 1]``: at ``[i, j]`` what layers i to j - 1 keep for backward together, their first input apart;
        for j > i.
    last : ``[n]``: what layers i to n - 1 keep together, their first input included if one of them keeps it (a ReLU
        keeps its output alone).
    """

    inputs: np.ndarray
    inside: np.ndarray
    last: np.ndarray


def activations(layers: Sequence[nn.Module], x: Tensor) -> Activations:
    """Measure the bytes that layers, one after the other, keep for backward, parameters and buffers apart.

    Memory that two layers keep (the output of one is the input of the next) counts once in a segment that holds both.
    Running statistics of batch norms stay as they are.
    """
    chained = nn.Sequential(*layers)
    apart = {tensor.untyped_storage().data_ptr() for tensor in (*chained.parameters(), *chained.buffers())}
    kept: list[dict[int, int]] = [{} for _ in layers]  # of each layer: address -> bytes
    flowing = [x.detach().requires_grad_(x.is_floating_point())]

    def keep(own: dict[int, int], tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in apart:
            own[memory.data_ptr()] = memory.nbytes()
        return tensor  # itself, so that no address is used twice

    with Circumstances.of(x).again(), statistics_left_alone(chained):
        for layer, own in zip(layers, kept, strict=True):
            with saved_tensors_hooks(partial(keep, own), lambda tensor: tensor):
                flowing.append(layer(flowing[-1]))
    inside, last = np.zeros((len(layers), len(layers) + 1)), np.zeros(len(layers))
    for first, given in enumerate(flowing[:-1]):
        together: dict[int, int] = {}
        for end in range(first, len(layers)):
            together |= kept[end]
            inner = together.keys() - {given.untyped_storage().data_ptr()}
            inside[first, end + 1] = sum(together[place] for place in inner)
        last[first] = sum(together.values())
    return Activations(np.array([_size(tensor) for tensor in flowing[:-1]], float), inside, last)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def peak(sizes: Activations, cuts: Sequence[int]) -> float:
    r"""Return the bytes held at most, if the layers are cut before ``cuts``.

    .. math:: \max_j \Big( \sum_{i \le j} b_i + S_j \Big)

    with :math:`b_i` the input of segment i and :math:`S_j` what segment j keeps inside:
    when backward is in segment j, what came after it is gone. The last segment is not
    run again, so its input counts only if it keeps it.
    """
    before, most = 0.0, 0.0
    *segments, (final, _) = pairwise([0, *cuts, len(sizes.inputs)])
    for first, end in segments:
        before += sizes.inputs[first]
        most = max(most, before + sizes.inside[first, end])
    return float(max(most, before + sizes.last[final]))


def best_cuts(sizes: Activations, segments: int | None = None) -> list[int]:
    r"""Return the cuts with the least ``peak``, into at most so many segments (any number by default).

    .. math:: V_1(i) = L_i, \qquad
        V_k(i) = \min\Big( L_i,\ b_i + \min_{j > i} \max\big(S_{ij},\ V_{k-1}(j)\big) \Big)

    is the least peak of layers i to n - 1 in at most k segments, of which the first ends before layer j: the input of
    layer i is there while each of them is gone through. :math:`L_i` is what they keep as the last segment. Of equal
    peaks the one with the fewest segments is taken.

    Raises
    ------
    ValueError : ``segments`` is below 1.
    """
    n = len(sizes.inputs)
    segments = n if segments is None else min(segments, n)
    at_least(1, segments=segments)
    values, choices = [sizes.last], list[np.ndarray]()
    for _ in range(segments - 1):
        value, choice = _one_segment_more(sizes, values[-1])
        values.append(value)
        choices.append(choice)
    fewest = int(np.argmin([value[0] for value in values]))  # the first of the least
    cuts = [0]
    for choice in reversed(choices[:fewest]):
        if cuts[-1] < n:
            cuts.append(int(choice[cuts[-1]]))
    return [cut for cut in cuts[1:] if cut < n]


def _one_segment_more(
    sizes: Activations,
    value: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """From the least peaks ``[n]`` of at most k segments to those of k + 1, and where
    their first segment ends (n: it is the last).
    """
    n = len(value)
    better, choice = sizes.last.copy(), np.full(n, n)
    for i in range(n - 1):
        ends = np.arange(i + 1, n)
        peaks = sizes.inputs[i] + np.maximum(sizes.inside[i, ends], value[ends])
        best = int(peaks.argmin())
        if peaks[best] < better[i]:
            better[i], choice[i] = peaks[best], ends[best]
    return better, choice


# --- Cheap operators only ---------------------------------------------------------------------------------------------

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution"})
"""Operators whose outputs ``selective`` keeps: they take most of the time, the others most of the memory."""


def selective(layers: nn.Module, x: Tensor, *, keep: Collection[str] = PRODUCTS) -> Tensor:
    """Return ``layers(x)``; outputs of the operators ``keep`` stay, all others are
    recomputed from them in the backward pass.

    By torch's own machinery (``create_selective_checkpoint_contexts``), which knows
    nothing of batch norm: do not use it on one that tracks statistics.

    Parameters
    ----------
    keep : names of operators, as in the profiler's tables. Attention is not in
        ``PRODUCTS``: its outputs are cheap in memory, but it is recomputed whole.
    """

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operator.name().partition(".")[0] in keep
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(layers, x, use_reentrant=False, context_fn=contexts)
