"""What a network computes whatever it sees: run it on "don't know".

The input is NaN, which stands for "depends on the input". Through a ReLU, a sum or a pool NaN stays NaN by itself. Only
where zero times something would be zero does torch have to be told: there, ``times`` takes the place of the product.
What is no NaN in the end is the same for every input; where it is zero, nobody needs to compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from course_lib.lab.tracing import BATCH_NORMS, TRANSPOSED, Labelling, operation, tensors_in

NAN = float("nan")


def times(product: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Return ``product(a, b)`` of a bilinear operation in which zero times NaN is zero.

    A number of the result is NaN where any of its terms is an unknown times something that is not zero.
    """
    known = product(a.nan_to_num(0.0), b.nan_to_num(0.0))
    terms = product(a.isnan().to(known.dtype), (b != 0).to(known.dtype))  # NaN != 0
    terms = terms + product((a != 0).to(known.dtype), b.isnan().to(known.dtype))
    return known.masked_fill(terms > 0, NAN)


class Known(fx.Interpreter):
    """Runs a traced network on NaN.

    ``read`` then has, for each call of a dense layer, which of the channels that it reads matter to it: those that are
    not always zero and that meet a weight that is not zero, ``[channels]``; ``silent`` has the operations whose whole
    result is always zero.
    """

    def __init__(self, labelling: Labelling) -> None:
        super().__init__(labelling.traced)
        self.labelling = labelling
        self.node: fx.Node
        self.read: dict[fx.Node, Tensor] = {}
        self.silent: set[fx.Node] = set()

    def look(self, inputs: tuple[Tensor, ...]) -> None:
        """Run on NaN in the shape of ``inputs``."""
        self.run(*(torch.full_like(x, NAN) if x.is_floating_point() else x for x in inputs))

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        result = super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op != "output" and any(not x.is_floating_point() for x in tensors_in((args, kwargs))):
            # The example's integers are no NaN, but what is computed from them does depend on the input.
            result = fx.node.map_aggregate(result, _forget)
        if isinstance(result, Tensor) and result.is_floating_point() and not (result != 0).any():  # NaN != 0
            self.silent.add(n)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if target in self.labelling.keep:
            return fx.node.map_aggregate(module(*args, **kwargs), _forget)
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            return self._weighted(module, args[0])
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None and module.running_var is not None:
            return _batch_norm(module, args[0])
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(super().call_method, target, args, kwargs)

    def _call(self, usual: Callable[..., Any], target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = operation(self.node)
        if name in ("mul", "imul", "multiply", "matmul", "bmm") and len(args) == 2 and _floats(args):
            return times(torch.matmul if name in ("matmul", "bmm") else torch.mul, *args)
        if name == "scaled_dot_product_attention":  # weights that depend on the input, times the values
            query, key, value = (*args[:3], *(kwargs[k] for k in ("query", "key", "value")[len(args) :]))
            return times(torch.matmul, query.new_full((*query.shape[:-1], key.shape[-2]), NAN), value)
        return usual(target, args, kwargs)

    def _weighted(self, module: Any, x: Tensor) -> Tensor:
        if self.node in self.labelling.reads:
            dim = -1 if isinstance(module, nn.Linear) else x.dim() - module.weight.dim() + 1
            speaks = (x != 0).movedim(dim, 0).flatten(1).any(1)
            self.read[self.node] = speaks & _heard(module)
        bias = {} if module.bias is None else {"bias": torch.zeros_like(module.bias)}
        found = times(lambda x, w: functional_call(module, {"weight": w, **bias}, (x,)), x, module.weight)
        if module.bias is None:
            return found
        return found + (
            module.bias if isinstance(module, nn.Linear) else module.bias.view(-1, *[1] * (module.weight.dim() - 2))
        )


def _forget(x: Any) -> Any:
    return torch.full_like(x, NAN) if isinstance(x, Tensor) and x.is_floating_point() else x


def _heard(module: Any) -> Tensor:
    """Tell which input channels of a dense or grouped layer meet any weight that is not zero."""
    weight = (module.weight != 0).flatten(2) if module.weight.dim() > 2 else (module.weight != 0)[:, :, None]
    if isinstance(module, TRANSPOSED):
        return weight.flatten(1).any(1)
    groups = getattr(module, "groups", 1)
    return weight.any(2).view(groups, -1, weight.shape[1]).any(1).flatten()


def _batch_norm(module: Any, x: Tensor) -> Tensor:
    """Batch norm in evaluation mode; a scale of zero silences what it does not know."""
    along = [-1] + [1] * (x.dim() - 2)
    scale = torch.rsqrt(module.running_var + module.eps) * (1 if module.weight is None else module.weight)
    found = times(torch.mul, x - module.running_mean.view(along), scale.view(along))
    return found if module.bias is None else found + module.bias.view(along)


def _floats(args: tuple[Any, ...]) -> bool:
    return all(isinstance(x, Tensor) and x.is_floating_point() for x in args)
