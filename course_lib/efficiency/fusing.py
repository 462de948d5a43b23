r"""Fusing: chains of cheap operations wait for memory, not for arithmetic, so they are done in one pass.

===========================  ======================================================  ================================
name                         what it does or gives                                   source
===========================  ======================================================  ================================
``bias_gelu_residual``       a transformer's chain as separate operations            Hendrycks & Gimpel 2016 (GELU),
                                                                                     arXiv:1606.08415
``layer_norm_by_parts``      layer norm as separate operations                       Ba et al. 2016, arXiv:1607.06450
*memory passes*
``traffic``                  bytes that a list of operations moves, by the formula   Williams et al. 2009 (Roofline),
                                                                                     CACM 52(4)
``moved``                    the bytes that each operation of a call does move
*by hand*
``bias_gelu_residual_into``  the chain without a new array: ``out=`` and in place
``blocked``                  the chain over blocks that stay in the cache            Lam et al. 1991, ASPLOS
``in_place_error``           what autograd says when an overwritten value is needed  torch, "Autograd mechanics"
*by a compiler*
``compiler_available``       whether there is what ``torch.compile`` needs
``compiled``                 ``torch.compile``, with a fallback where there is not   Ansel et al. 2024 (PyTorch 2),
                                                                                     ASPLOS
``compilations``             graphs compiled so far, call after call                 the same
``graph_breaks``             where Python gets in the way                            the same
===========================  ======================================================  ================================

An operation on n numbers reads its inputs from memory and writes its result back. Three in a row that add or multiply
do n additions or multiplications each, and move 2 to 3 arrays each; done at once, n numbers are read once and written
once. Only where the arrays are larger than the cache does it matter.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils._triton import has_triton

from course_lib.lab.arguments import at_least

# --- Chains -----------------------------------------------------------------------------------------------------------

GELU_ROOT = math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715
"""The other number of GELU's formula with tanh (Hendrycks & Gimpel 2016)."""


def bias_gelu_residual(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    r"""``[..., width]`` to the same: the residual plus GELU of x plus the bias, each
    step an operation.

    .. math:: r + \tfrac12 y \left(1 + \tanh\left(
        \sqrt{2/\pi}\,(y + 0.044715\, y^3)\right)\right), \quad y = x + b
    """
    y = x + bias
    square = y * y
    inner = square * GELU_CUBE
    inner = inner + 1
    inner = inner * y
    inner = inner * GELU_ROOT
    gate = torch.tanh(inner)
    gate = gate + 1
    gate = gate * y
    gate = gate * 0.5
    return gate + residual


def layer_norm_by_parts(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """``[..., width]`` to the same: each row less its mean, over its deviation, scaled
    and shifted; step by step.
    """
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + eps) * weight + bias


class Pass(NamedTuple):
    """One operation on arrays of n numbers: how many of them it reads, and how many it writes."""

    name: str
    reads: int
    writes: int = 1


BIAS_GELU_RESIDUAL = (
    Pass("y = x + b", 1),
    Pass("y y", 1),
    Pass("* 0.044715", 1),
    Pass("+ 1", 1),
    Pass("* y", 2),
    Pass("* root", 1),
    Pass("tanh", 1),
    Pass("+ 1", 1),
    Pass("* y", 2),
    Pass("/ 2", 1),
    Pass("+ r", 2),
)
"""The passes of ``bias_gelu_residual``; the bias is small and stays in the cache."""
FUSED = (Pass("all of it", 2),)
"""The same in one: x and the residual are read, the result is written."""


def traffic(passes: Iterable[Pass], n: int, itemsize: int = 4) -> int:
    """Return the bytes that operations on arrays of n numbers read and write, if
    nothing stays in a cache.

    Raises
    ------
    ValueError : a size is below 1.
    """
    at_least(1, n=n, itemsize=itemsize)
    return sum(each.reads + each.writes for each in passes) * n * itemsize


class Moved(NamedTuple):
    """One operation that torch ran: its name, the bytes of the arrays that it read and of those that it wrote."""

    name: str
    read: int
    written: int

    @property
    def total(self) -> int:
        """Bytes both ways."""
        return self.read + self.written


def moved(fn: Callable[..., Any], *args: Any) -> list[Moved]:
    """Return what each operation of ``fn(*args)`` moves, in the order in which they
    ran; views move nothing.

    An operation in place reads its array and writes it; one with ``out=`` only writes
    it.
    """
    with _Traffic() as seen:
        fn(*args)
    return seen.found


class _Traffic(TorchDispatchMode):
    """Sees each operation below autograd, with the arrays that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Moved] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not _allocates(func):
            given = [value for name, value in _named(func, args, kwargs) if name not in _outputs(func)]
            name = func._schema.name.removeprefix("aten::")
            self.found.append(Moved(name, _distinct_bytes(given), _distinct_bytes(result)))
        return result


def _named(func: Any, args: Any, kwargs: Any) -> Iterable[tuple[str, Any]]:
    named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
    return [*named, *(kwargs or {}).items()]


def _outputs(func: Any) -> set[str]:
    """The arguments that are only written to."""
    return {argument.name for argument in func._schema.arguments if argument.is_out}


def _allocates(func: Any) -> bool:
    return "empty" in func._schema.name


def _distinct_bytes(value: Any) -> int:
    """Bytes of the memory that the tensors in it stretch over; an expanded one is as large as what it repeats."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    places = {(t.data_ptr(), t.shape): t for t in tensors}
    return sum(_stretch(t) * t.element_size() for t in places.values())


def _stretch(t: Tensor) -> int:
    return math.prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride)


# --- By hand ----------------------------------------------------------------------------------------------------------


def bias_gelu_residual_into(
    x: Tensor,
    residual: Tensor,
    *,
    bias: Tensor,
    out: Tensor,
    scratch: Tensor,
) -> Tensor:
    """Write ``bias_gelu_residual`` into ``out``, with one array to work in and without
    making a new one.

    The same operations: it saves allocating eleven arrays, and the memory of most of
    them. Autograd does not follow ``out=``: for inference.
    """
    torch.add(x, bias, out=out)
    torch.mul(out, out, out=scratch)
    scratch.mul_(GELU_CUBE).add_(1).mul_(out).mul_(GELU_ROOT).tanh_()
    scratch.add_(1).mul_(out).mul_(0.5)
    return torch.add(scratch, residual, out=out)


@torch.no_grad()
def blocked(
    write: Callable[..., Any],
    *inputs: Tensor,
    block: int,
    out: Tensor | None = None,
) -> Tensor:
    """Return what a chain of operations makes of its inputs, ``block`` rows after the
    other.

    All operations on a block follow one another while it lies in the cache: memory is
    read and written once. What a fused kernel does with registers.

    Parameters
    ----------
    write : ``(*rows, out=, scratch=)``, as ``partial(bias_gelu_residual_into, bias=b)``.
    inputs : ``[rows, ...]``; the result is like the first.
    block : rows at a time; ``rows_that_fit`` for a cache.
    """
    at_least(1, block=block)
    out = torch.empty_like(inputs[0]) if out is None else out
    scratch = torch.empty_like(out[:block])
    for start in range(0, len(out), block):
        part = out[start : start + block]
        rows = (x[start : start + block] for x in inputs)
        write(*rows, out=part, scratch=scratch[: len(part)])
    return out


def rows_that_fit(cache: int, width: int, itemsize: int = 4, arrays: int = 4) -> int:
    """Return how many rows of ``width`` numbers of each of so many arrays fit a cache
    of so many bytes; 1 at least.
    """
    at_least(1, cache=cache, width=width, itemsize=itemsize, arrays=arrays)
    return max(1, cache // (width * itemsize * arrays))


def in_place_error(fn: Callable[[Tensor], Tensor], x: Tensor) -> str | None:
    """Return what autograd says to ``fn(x)`` and its backward pass, None if nothing.

    Each operation keeps for its gradient what it needs: ``exp`` its result, ``square``
    its input, an addition nothing. Overwriting what is kept is an error, which is
    raised only in the backward pass; overwriting a leaf is one at once.
    """
    leaf = x.detach().clone().requires_grad_()
    try:
        fn(leaf).sum().backward()
    except RuntimeError as error:
        return str(error)
    return None


# --- By a compiler ----------------------------------------------------------------------------------------------------


def compiler_available(device: torch.device | str = "cpu") -> bool:
    """Return whether there is what ``torch.compile`` makes code with: for the CPU a C++
    compiler and Python's headers, for CUDA Triton as well.
    """
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    command = os.environ.get("CXX", usual).split()
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    found = bool(command) and shutil.which(command[0]) is not None and headers
    return found and (torch.device(device).type == "cpu" or has_triton())


@dataclass(frozen=True)
class Compiled:
    """A function after ``torch.compile``: call it as before.

    Attributes
    ----------
    backend : who made the code: ``"inductor"``, or ``"eager"`` where nothing is gained.
    note : why it is not inductor; empty if it is.
    """

    fn: Callable[..., Any]
    backend: str
    note: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns. The first call compiles, which takes seconds to minutes."""
        return self.fn(*args, **kwargs)


def compiled(
    fn: Callable[..., Any],
    *,
    device: torch.device | str = "cpu",
    dynamic: bool | None = None,
) -> Compiled:
    """Return the function compiled, or traced alone where there is no compiler.

    Without one torch would fail in the first call. Traced, it gives the same answers at
    the same speed, and graphs can still be counted.

    Parameters
    ----------
    device : where its tensors will be.
    dynamic : whether sizes may change without compiling again; None for: after the
        first time that one does.
    """
    if compiler_available(device):
        return Compiled(torch.compile(fn, dynamic=dynamic), "inductor")
    note = f"no compiler for {device}: traced, and run as before. "
    note += "The CPU needs a C++ compiler (g++, clang++) and Python's headers, CUDA Triton as well"
    return Compiled(torch.compile(fn, dynamic=dynamic, backend="eager"), "eager", note)


def compilations(
    fn: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    dynamic: bool | None = None,
) -> list[int]:
    """Return how many graphs had been traced after each call: where it grows, that call
    waited for a compiler.

    No code is made, so it is quick and needs no compiler. Forgets what was compiled
    before (``torch.compiler.reset``).

    Parameters
    ----------
    calls : the arguments of each call.
    """
    torch.compiler.reset()
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    traced, seen = torch.compile(fn, dynamic=dynamic, backend=count), []
    with _quiet("torch._dynamo"):
        for args in calls:
            traced(*args)
            seen.append(len(graphs))
    torch.compiler.reset()
    return seen


class Breaks(NamedTuple):
    """What ``torch.compile`` makes of a function: how many graphs, and why it is not one.

    ``reasons`` has a line of source for each break, and what torch says of it.
    """

    graphs: int
    reasons: tuple[str, ...]


def graph_breaks(fn: Callable[..., Any], *args: Any) -> Breaks:
    """Return into how many graphs ``fn(*args)`` falls, and the reason of each break.

    Between two graphs Python runs, and nothing is fused across. The function is run
    once; what was compiled before is forgotten. (``torch._dynamo.explain``.)
    """
    import torch._dynamo as dynamo  # takes a second

    torch.compiler.reset()
    with _quiet("torch._dynamo"):
        found = dynamo.explain(fn)(*args)
    torch.compiler.reset()
    return Breaks(found.graph_count, tuple(_told(each) for each in found.break_reasons))


def _told(why: Any) -> str:
    reason = str(why.reason).strip().splitlines()[0]
    if reason.startswith("generic_jump"):
        reason = "Python branches on the value of a tensor"
    return f"`{why.user_stack[-1].line}`: {reason}" if why.user_stack else reason


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Let a logger pass over its warnings."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
