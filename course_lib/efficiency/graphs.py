r"""CUDA graphs: a step's kernels recorded once and launched as one, for steps of many small kernels.

====================  ======================================================  =========================================
name                  what it does or gives                                   source
====================  ======================================================  =========================================
``captured``          a function whose kernels are recorded, and replayed     ``torch.cuda.CUDAGraph``
``overhead_bound``    how long a step takes if the processor launches its     the pipeline of two stages that they are
                      kernels one by one, and if a graph does
====================  ======================================================  =========================================

Python and torch need some microseconds to launch a kernel; a GPU that is through sooner waits for the next. A graph is
launched once. What it costs: the same memory is read and written each time, so shapes are fixed, and nothing that the
processor decides (a branch on a value, a random number of its own) is decided again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from course_lib.lab.arguments import at_least, is_number, require

# --- How much there is to win -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaunchTimes:
    """Seconds of a step.

    Attributes
    ----------
    eager : launched kernel by kernel.
    graph : launched as one.
    kernels : of the kernels alone, without a gap.
    """

    eager: float
    graph: float
    kernels: float

    @property
    def speedup(self) -> float:
        """How many times as fast a graph is."""
        return self.eager / self.graph

    @property
    def waiting(self) -> float:
        """The share of the eager step in which the GPU does nothing."""
        return 1 - self.kernels / self.eager


def overhead_bound(kernels: Sequence[float], launch: float) -> LaunchTimes:
    r"""Return how long a step takes, from the seconds of its kernels and of one launch.

    The processor launches kernel i at :math:`i\,t`; the GPU runs it then, or when the
    one before it has ended:

    .. math:: e_i = \max(e_{i-1},\ i\,t) + k_i, \qquad
        e_n \ge \max(n\,t,\ \textstyle\sum k_i)

    for i = 1 … n. So launching bounds the step of n kernels shorter than t each, and
    costs a single launch where all are longer. A graph takes :math:`t + \sum k_i`.

    Raises
    ------
    ValueError : there is no kernel, or a time is negative.
    """
    _check_times(kernels, launch)
    eager = 0.0
    for number, kernel in enumerate(kernels, 1):
        eager = max(eager, number * launch) + kernel
    return LaunchTimes(eager, launch + sum(kernels), sum(kernels))


def _check_times(kernels: Sequence[float], launch: float) -> None:
    sensible = bool(kernels) and all(is_number(k) and k >= 0 for k in kernels) and sum(kernels) > 0
    require("kernels", list(kernels), lambda _: sensible, "at least one number of seconds, above 0 in all")
    require("launch", launch, lambda t: is_number(t) and t >= 0, "a number of seconds, 0 or more")


# --- Recording and replaying ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Captured:
    """A function as a graph: called like the function, with tensors of the shapes it was recorded with.

    Attributes
    ----------
    inputs, outputs : the memory that the graph reads and writes. The next call overwrites the outputs: ``clone`` what
        has to stay.
    graph : of torch.
    """

    inputs: tuple[Tensor, ...]
    outputs: Any
    graph: torch.cuda.CUDAGraph

    def __call__(self, *inputs: Tensor) -> Any:
        check_like(self.inputs, inputs)
        with torch.no_grad():
            for place, given in zip(self.inputs, inputs, strict=True):
                place.copy_(given)
        self.graph.replay()
        return self.outputs


def captured(fn: Callable[..., Any], example_inputs: Sequence[Tensor], *, warmup: int = 3) -> Captured:
    """Run ``fn`` a few times on a stream of its own, then record its kernels on CUDA.

    Everything it does on the GPU is repeated at each call: a whole training step, if its optimizer is ``capturable``.
    ``torch.cuda.make_graphed_callables`` does the same for a module with its backward pass, ``torch.compile`` with
    ``mode="reduce-overhead"`` for whatever it compiles.

    Parameters
    ----------
    fn : of tensors on the GPU; no branch in it depends on their values, and it asks for none of them.
    example_inputs : of the shapes, types and device of all later ones. They are copied.
    warmup : calls before: kernels are chosen and memory is set aside in the first ones, which a graph must not see.

    Raises
    ------
    ValueError : an input is not on CUDA.
    RuntimeError : there is no CUDA here.
    """
    at_least(1, warmup=warmup)
    if not torch.cuda.is_available():
        raise RuntimeError("captured needs a GPU with CUDA, and there is none here: graphs are CUDA's")
    devices = sorted({str(x.device) for x in example_inputs})
    on_one = len(devices) == 1 and devices[0].startswith("cuda")
    require("the devices of example_inputs", devices, lambda _: on_one, "one CUDA device")
    with torch.cuda.device(example_inputs[0].device):
        inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in example_inputs)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(warmup):
                fn(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = fn(*inputs)
    detached = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
    return Captured(inputs, detached, graph)


def check_like(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    """Raise ValueError unless the tensors are as many as those a graph was recorded with,
    of their shapes and types: another shape would be broadcast into their memory.
    """
    kinds = [(tuple(x.shape), x.dtype) for x in wanted]
    found = [(tuple(x.shape), x.dtype) for x in given]
    require("inputs", found, lambda _: found == kinds, f"as they were recorded, {kinds}")
