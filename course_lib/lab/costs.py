"""What a network costs: numbers to store, multiplications to do, bytes to hold, time to wait.

====================  ===============================================================================================
``flops``             floating-point operations of one forward pass: the products in layers and attention
``cost``              parameters, those that are not zero, flops, bytes of the file (and compressed), peak memory
``file_bytes``        bytes of the saved state dict, and compressed
``savings``           the costs of two networks side by side, with their ratio and that of their times
====================  ===============================================================================================
"""

from __future__ import annotations

import copy
import io
import math
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from course_lib.lab.timing import compare_speed, peak_memory

Inputs = Tensor | tuple[Tensor, ...]
"""What a model is called with: one tensor, or a tuple of positional arguments."""

# --- Floating-point operations ----------------------------------------------------------------------------------------
# A multiplication and an addition count as two. Each rule has the shapes of what goes in and comes out.


def _dense(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * x.shape[-1]


def _convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * math.prod(weight.shape[1:])  # [out, in / groups, *kernel]


def _transposed(out: Tensor, x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * math.prod(weight.shape[1:])  # [in, out / groups, *kernel]


def _product(out: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * out.numel() * a.shape[-1]


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]  # each query with each key
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _multi_head(out: Any, query: Tensor, key: Tensor, value: Tensor, width: int, *_: Any, **__: Any) -> int:
    # torch hands over [tokens, N, width], whatever batch_first is; what it calls inside is not seen
    examples = query.shape[1] if query.ndim == 3 else 1
    queries, keys = query.shape[0], key.shape[0]
    maps = 2 * examples * width * (2 * queries * width + keys * (key.shape[-1] + value.shape[-1]))
    return maps + 4 * examples * queries * keys * width


RULES: dict[Any, Callable[..., int]] = {
    F.linear: _dense,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
    **dict.fromkeys((torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm), _product),
    **dict.fromkeys((Tensor.__matmul__,), _product),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
}


class _Counter(TorchFunctionMode):
    """Sees every function of torch that a network calls."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in RULES:
            self.count += RULES[func](result, *args, **(kwargs or {}))
        return result


@torch.no_grad()
def flops(model: nn.Module, example_input: Inputs) -> int:
    """Return the floating-point operations of ``model(example_input)`` that products of matrices take.

    Those are nearly all there are; activations, norms and biases are left out, as in
    ``torch.utils.flop_counter.FlopCounterMode``. Weights that are zero count like others: they are multiplied, too.
    Recurrent layers and ``torch.einsum`` are not counted. A copy is called: statistics of batch norms stay as they are.
    """
    with _Counter() as counter:
        copy.deepcopy(model)(*_inputs(example_input))
    return counter.count


# --- Costs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What a network costs: counts, floating-point operations of one forward pass, bytes.

    ``file_bytes`` is the size of its saved state dict, ``compressed_bytes`` that after zlib, ``peak_bytes`` what torch
    holds at most during a forward pass above what the network and its input take.
    """

    parameters: int
    nonzero: int
    flops: int
    file_bytes: int
    compressed_bytes: int
    peak_bytes: int


def file_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the size of the saved state dict, and after zlib: repeated bytes, such as zeros, take next to none."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue()), len(zlib.compress(file.getvalue()))


@torch.no_grad()
def cost(model: nn.Module, example_input: Inputs) -> Cost:
    """Return what a network costs in evaluation mode. Weights that are computed (by masks, say) count as the result."""
    model, inputs = _ready(model), _inputs(example_input)
    parameters = list(model.parameters())
    plain, compressed = file_bytes(model)
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        nonzero=sum(int(p.count_nonzero()) for p in parameters),
        flops=flops(model, inputs),
        file_bytes=plain,
        compressed_bytes=compressed,
        peak_bytes=peak_memory(lambda: model(*inputs), device=inputs[0].device).bytes,
    )


@torch.no_grad()
def savings(before: nn.Module, after: nn.Module, example_input: Inputs, *, rounds: int = 15) -> pd.DataFrame:
    """Return a table of costs: one row each, columns ``before``, ``after`` and ``ratio`` (how many times less).

    The last row, ``seconds``, is the time of a forward pass; its ratio is the median of ``rounds`` comparisons in turns
    (see ``compare_speed``). With ``rounds=0`` it is left out, and nothing in the table is a measurement but the peak.
    """
    inputs = _inputs(example_input)
    columns = {"before": asdict(cost(before, inputs)), "after": asdict(cost(after, inputs))}
    table = pd.DataFrame(columns, dtype=float)
    table["ratio"] = table["before"] / table["after"]
    if rounds:
        a, b = _ready(before), _ready(after)
        speed = compare_speed(lambda: a(*inputs), lambda: b(*inputs), rounds=rounds, device=inputs[0].device)
        table.loc["seconds"] = [speed.a.median, speed.b.median, speed.ratio]
    return table


def _ready(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, in which what parametrizations compute are ordinary parameters."""
    model = copy.deepcopy(model).eval()
    for layer in model.modules():
        if not parametrize.is_parametrized(layer):
            continue
        # Copies of a parametrized layer share one class, and torch takes the weight out of that class.
        layer.__class__ = type(type(layer).__name__, type(layer).__bases__, dict(vars(type(layer))))
        names, others = list(layer.parametrizations), dict(layer._parameters)  # type: ignore[arg-type]
        for name in names:
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
        found = {name: layer._parameters[name] for name in names}
        layer._parameters.clear()
        layer._parameters.update(found | others)
    return model


def _inputs(example_input: Inputs) -> tuple[Tensor, ...]:
    return example_input if isinstance(example_input, tuple) else (example_input,)
