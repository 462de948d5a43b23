r"""The optimizer's step: the same numbers, by few large operations in place of many small ones.

======================  =======================================================  ============================
name                    how the step goes over the parameters                    source
======================  =======================================================  ============================
``adam_loop``           one after the other, seven operations each               Kingma & Ba 2014,
                                                                                 arXiv:1412.6980
``adam_foreach``        seven operations on lists of all of them                 ``torch.optim``, ``foreach``
``flatten_parameters``  all of them as parts of one tensor, their gradients too
``adam_flat``           seven operations on that tensor                          Zhao et al. 2023 (FSDP),
                                                                                 arXiv:2304.11277
``operations``          which operations a call runs, and how often
======================  =======================================================  ============================

A step reads and writes each parameter, its gradient and its two averages once an operation: with many small tensors
the time goes into starting operations, with few large ones into memory. ``torch.optim.Adam(fused=True)`` does all
seven in one pass; on a GPU ``foreach`` is one kernel a chunk of the list, on the CPU it is a loop inside torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from course_lib.lab.arguments import is_number, require


@dataclass(frozen=True)
class Adam:
    """The settings of Adam, as ``torch.optim.Adam`` has them.

    Raises
    ------
    ValueError : one is out of its range.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        require("lr", self.lr, lambda x: is_number(x) and x >= 0, "a number of 0 or more")
        require("betas", self.betas, lambda b: len(b) == 2 and all(0 <= x < 1 for x in b), "two numbers from 0 to 1")
        require("eps", self.eps, lambda x: is_number(x) and x >= 0, "a number of 0 or more")

    def corrected(self, step: int) -> tuple[float, float]:
        r"""Return the rate :math:`\alpha/(1-\beta_1^t)` and the root
        :math:`\sqrt{1-\beta_2^t}` of step t, from 1.
        """
        first, second = (1 - beta**step for beta in self.betas)
        return self.lr / first, math.sqrt(second)


@dataclass
class Averages:
    """The running means of gradients and of their squares, one tensor for each parameter, and the steps so far."""

    means: list[Tensor]
    squares: list[Tensor]
    steps: int = field(default=0)

    @classmethod
    def of(cls, params: Iterable[Tensor]) -> Averages:
        """All 0, as large as the parameters."""
        zeros = [torch.zeros_like(p, requires_grad=False) for p in params]
        return cls(zeros, [z.clone() for z in zeros])


# --- Three ways -------------------------------------------------------------------------------------------------------


def adam_update(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    adam: Adam,
) -> None:
    r"""Change one parameter and its averages, in place, in seven operations.

    .. math:: m \leftarrow \beta_1 m + (1-\beta_1) g \qquad
        v \leftarrow \beta_2 v + (1-\beta_2) g^2 \qquad
        p \leftarrow p - \frac{\alpha}{1-\beta_1^t}
        \frac{m}{\sqrt{v} / \sqrt{1-\beta_2^t} + \epsilon}
    """
    (beta1, beta2), (rate, root) = adam.betas, adam.corrected(step)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2)
    v.addcmul_(grad, grad, value=1 - beta2)
    denominator = v.sqrt()
    denominator.div_(root)
    denominator.add_(adam.eps)
    p.addcdiv_(m, denominator, value=-rate)


@torch.no_grad()
def adam_loop(params: Sequence[Tensor], state: Averages, adam: Adam) -> None:
    """Make a step, parameter after parameter: seven operations each."""
    state.steps += 1
    for p, m, v in zip(params, state.means, state.squares, strict=True):
        adam_update(p, _gradient(p), m, v, state.steps, adam)


@torch.no_grad()
def adam_foreach(params: Sequence[Tensor], state: Averages, adam: Adam) -> None:
    """Make a step with seven operations on lists of tensors, however many they are."""
    state.steps += 1
    (beta1, beta2), (rate, root) = adam.betas, adam.corrected(state.steps)
    p, m, v = list(params), state.means, state.squares
    grads = [_gradient(each) for each in p]
    torch._foreach_lerp_(m, grads, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_div_(denominators, root)
    torch._foreach_add_(denominators, adam.eps)
    torch._foreach_addcdiv_(p, m, denominators, value=-rate)


def adam_flat(flat: Flat, state: Averages, adam: Adam) -> None:
    """Make a step of all parameters as one tensor: seven operations on long arrays.

    Parameters
    ----------
    state : ``Averages.of([flat.values])``.
    """
    adam_loop([flat.values], state, adam)


# --- One tensor for all -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flat:
    """All parameters of a network in one tensor ``[P]``, whose ``.grad`` holds all gradients in the same order.

    An optimizer of ``[flat.values]`` trains the network. Clear gradients by ``flat.zero_grad()``: by
    ``model.zero_grad()``, which lets go of them, autograd would make new ones elsewhere.
    """

    values: nn.Parameter
    model: nn.Module = field(repr=False)

    def zero_grad(self) -> None:
        """Set all gradients to 0 with one operation, and see to it that they are where they belong."""
        assert self.values.grad is not None
        self.values.grad.zero_()
        _tie(self.values.grad, self.model, "grad")


def flatten_parameters(model: nn.Module) -> Flat:
    """Move all parameters of a network into one tensor, in place: each becomes a view
    of its part, and so does its gradient.

    The network computes as before, and may be trained, saved and loaded as before.
    Moving it to another device or type takes the views apart: flatten it there.

    Raises
    ------
    ValueError : there are no parameters, or they differ in type or device.
    """
    params = list(model.parameters())
    kinds = {(p.dtype, p.device) for p in params}
    require("model", kinds, lambda found: len(found) == 1, "a network of one type, on one device")
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat.grad = torch.cat([grad.flatten() for grad in grads])
    _tie(flat.detach(), model, "data")
    _tie(flat.grad, model, "grad")
    return Flat(flat, model)


def _tie(flat: Tensor, model: nn.Module, what: str) -> None:
    """Make each parameter's values or gradient a view of its part of a tensor."""
    params = list(model.parameters())
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        setattr(p, what, part.view(p.shape))


# --- What runs --------------------------------------------------------------------------------------------------------


def operations(fn: Callable[[], Any]) -> Counter[str]:
    """Return the operations that ``fn()`` runs, by name, and how often; those that
    compute nothing (views, new memory) are left out.

    Each is a call into torch, and on a GPU a kernel to be started, one of ``foreach`` a
    few.
    """
    with _Operations() as seen:
        fn()
    return seen.found


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        counts_for_nothing = func.is_view or name.startswith(("empty", "profiler::")) or name in ("detach", "alias")
        if not counts_for_nothing:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _gradient(p: Tensor) -> Tensor:
    require("params", p.grad, lambda grad: grad is not None, "parameters that all have a gradient")
    assert p.grad is not None
    return p.grad
