r"""Few bits while training: what 16-bit floats hold, what they lose, and what brings it back.

=======================  ================================================  =======================================
name                     what it does or gives                             source
=======================  ================================================  =======================================
``float_facts``          the step at 1, the least and largest numbers      IEEE 754; ``torch.finfo``
``ulp``                  the step from a number to the next one            Higham 1993, SIAM J. Sci. Comput. 14(4)
*gradients that vanish*
``underflow_share``      gradients that become 0, with or without scaling  Micikevicius et al. 2017,
                                                                           arXiv:1710.03740
``DynamicLossScaler``    the largest scale that does not overflow          the same; ``torch.amp.GradScaler``
*updates that vanish*
``stalled_share``        weights that an update leaves as they are         Zamirai et al. 2020, arXiv:2010.06192
``store_nearest``        the update added and rounded: what goes wrong
``store_stochastic``     rounded up or down by chance, right in the mean   Gupta et al. 2015, arXiv:1502.02551
``store_compensated``    what rounding took is added next time (Kahan)     Zamirai et al. 2020
``store_master``         a float32 copy takes the updates                  Micikevicius et al. 2017
``hold_in``              one of these four rules, for any optimizer
``mixed_step``           a training step with master weights, bit by bit   Micikevicius et al. 2017
=======================  ================================================  =======================================

A float of m mantissa bits rounds with a relative error of at most :math:`u = 2^{-m-1}`, half of what ``torch.finfo``
calls ``eps``. bfloat16 is float32 cut after 7 bits: its range, a coarse grid. float16 has a finer grid and a range in
which gradients get lost. What becomes of sums of many terms stands in ``summing.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.efficiency.summing import kahan_add
from course_lib.lab.arguments import at_least, is_number, require

Tensors = Tensor | Iterable[Tensor]
"""One tensor, or several whose numbers count together, as ``[p.grad for p in model.parameters()]``."""

# --- What a format holds ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FloatFacts:
    """What a floating-point type holds.

    Attributes
    ----------
    name : as torch calls it, without ``torch.``
    bits : of one number, in memory.
    mantissa_bits : behind the point of 1.xxx.
    eps : from 1 to the next number.
    smallest_normal : the least number above 0 that has all its mantissa bits.
    smallest_subnormal : the least number above 0; what is less than half of it becomes 0.
    largest : the largest number.
    """

    name: str
    bits: int
    mantissa_bits: int
    eps: float
    smallest_normal: float
    smallest_subnormal: float
    largest: float

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of rounding to the nearest, u."""
        return self.eps / 2

    @property
    def powers_of_two(self) -> float:
        """How many times the least number above 0 can be doubled before it is too large."""
        return math.log2(self.largest) - math.log2(self.smallest_subnormal)


def float_facts(dtype: torch.dtype) -> FloatFacts:
    """Return what a floating-point type of torch holds.

    Raises
    ------
    ValueError : the type is none of floating-point numbers.
    """
    _checked_float(dtype)
    info = torch.finfo(dtype)
    name, digits = str(dtype).removeprefix("torch."), round(-math.log2(info.eps))
    least, normal = info.eps * info.smallest_normal, info.smallest_normal
    return FloatFacts(name, info.bits, digits, info.eps, normal, least, info.max)


def ulp(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the distance between the numbers of a type around each x ("unit in the
    last place"), in the type of ``x``.

    From a power of two on it stays the same up to the next, where it doubles; around 0
    it is the least number.
    """
    info = torch.finfo(dtype or x.dtype)
    mantissa = torch.frexp(x).mantissa  # from 1/2 to 1
    power = (x / (2 * mantissa)).abs().nan_to_num(0.0)  # the power of two at or below x
    return (power * info.eps).clamp(min=info.smallest_normal * info.eps)


# --- Gradients that vanish --------------------------------------------------------------------------------------------


def binades(values: Tensors) -> Tensor:
    """Return the power of two below each number that is not 0, int32 ``[n]``: their
    histogram shows what fits a type.

    2 for everything from 4 to 8, -1 for everything from 1/2 to 1.
    """
    flat = _flat(values)
    return torch.frexp(flat[flat != 0]).exponent - 1


def underflow_share(grads: Tensors, dtype: torch.dtype, scale: float = 1.0) -> float:
    """Return the share of the gradients other than 0 that become 0 in a type, when the
    loss is multiplied by ``scale`` first.

    Raises
    ------
    ValueError : no gradient differs from 0, or the scale is not positive.
    """
    flat, wide = _scaled(grads, dtype, scale)
    return (wide.to(dtype) == 0).double().sum().item() / len(flat)


def overflow_share(grads: Tensors, dtype: torch.dtype, scale: float = 1.0) -> float:
    """Return the share of the gradients other than 0 that become infinite; arguments
    and errors of ``underflow_share``.

    One is enough to spoil the step.
    """
    flat, wide = _scaled(grads, dtype, scale)
    return wide.to(dtype).isinf().double().sum().item() / len(flat)


def _scaled(grads: Tensors, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    _checked_float(dtype)
    require("scale", scale, lambda s: is_number(s) and s > 0, "a number above 0")
    flat = _flat(grads)
    flat = flat[flat != 0]
    require("grads", len(flat), bool, "numbers of which one or more is not 0")
    return flat, flat.double() * scale


def updated_scale(
    scale: float,
    good_steps: int,
    finite: bool,
    *,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
) -> tuple[float, int]:
    """Return the next loss scale, and how many good steps lie behind it: one rule for
    both directions.

    A step whose gradients are not all finite shrinks the scale at once; ``interval``
    steps in a row without one let it grow. So it hovers just below what overflows.
    The idea: Micikevicius et al. 2017, section 3.2; the rule: ``torch.amp.GradScaler``.
    """
    if not finite:
        return scale * backoff, 0
    if good_steps + 1 < interval:
        return scale, good_steps + 1
    grown = scale * growth
    return (grown if grown <= torch.finfo(torch.float32).max else scale), 0


class DynamicLossScaler:
    """Multiplies the loss so that small gradients survive in float16, and finds out by how much it may.

    >>> scaler.scaled(loss).backward()
    >>> if scaler.step(optimizer):  # False: the gradients had overflowed, and the step was left out
    ...     schedule.step()

    What ``torch.amp.GradScaler`` does, with the same defaults: ``scaled`` is its ``scale``; ``step`` its ``unscale_``,
    ``step`` and ``update`` in one.

    Parameters
    ----------
    init_scale : the first scale.
    growth_factor, backoff_factor, growth_interval : see ``updated_scale``.

    Attributes
    ----------
    scale : by what the next loss is multiplied.
    good_steps : in a row since the scale last changed.
    skipped : steps left out so far.

    Raises
    ------
    ValueError : a factor would not let the scale grow or shrink.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        require("init_scale", init_scale, lambda s: is_number(s) and s > 0, "a number above 0")
        require("growth_factor", growth_factor, lambda f: is_number(f) and f > 1, "a number above 1")
        require("backoff_factor", backoff_factor, lambda f: is_number(f) and 0 < f < 1, "a number between 0 and 1")
        at_least(1, growth_interval=growth_interval)
        self.scale, self.good_steps, self.skipped = init_scale, 0, 0
        self._next = partial(updated_scale, growth=growth_factor, backoff=backoff_factor, interval=growth_interval)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss times the scale: by the chain rule each gradient is scaled, too."""
        return loss * self.scale

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> bool:
        """Divide the gradients by the scale and let the optimizer step, if all of them
        are finite. Then adapt the scale.

        Returns
        -------
        Whether the step was made.
        """
        groups = (group["params"] for group in optimizer.param_groups)
        grads = [p.grad for params in groups for p in params if p.grad is not None]
        for grad in grads:
            grad.mul_(1 / self.scale)
        finite = all_finite(grads)
        if finite:
            optimizer.step()
        else:
            self.skipped += 1
        self.scale, self.good_steps = self._next(self.scale, self.good_steps, finite)
        return finite


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether no number in any of them is infinite or NaN; a GPU is asked once."""
    return not tensors or bool(torch.stack([t.isfinite().all() for t in tensors]).all())


# --- Updates that vanish ----------------------------------------------------------------------------------------------


def stalled_share(weights: Tensors, updates: Tensors, dtype: torch.dtype) -> float:
    r"""Return the share of updates other than 0 that change nothing, when weights and
    updates are held in a type.

    A sum is rounded to the nearest number: an update below half an ulp is lost, in
    bfloat16 whatever is less than about 1/512 to 1/256 of its weight. A learning rate
    of 0.001 is of that size.

    Raises
    ------
    ValueError : the numbers of weights and updates differ, or all updates are 0.
    """
    _checked_float(dtype)
    w, u = _flat(weights), _flat(updates)
    require("updates", len(u), len(w).__eq__, f"as many numbers as there are weights, {len(w)}")
    alive = u != 0
    require("updates", int(alive.sum()), bool, "numbers of which one or more is not 0")
    low = w.to(dtype)
    stalled = (low + u.to(dtype) == low) & alive
    return stalled.double().sum().item() / alive.sum().item()


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    r"""Return numbers of a type: the one below or the one above x, by chance, so that
    the mean is x.

    With the step s of the type at x, x is rounded up with the probability
    :math:`x/s - \lfloor x/s \rfloor`. Numbers of the type stay as they are. Source:
    Gupta et al. 2015, arXiv:1502.02551, section 3.

    Parameters
    ----------
    generator : on the device of ``x``.
    """
    _checked_float(dtype)
    step = ulp(x, dtype)
    low = torch.floor(x / step)
    chance = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    up = chance < x / step - low
    return ((low + up) * step).to(dtype)


def stochastic_bfloat16(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return float32 numbers as bfloat16, rounded by chance: the same in two integer
    operations.

    bfloat16 is the upper half of a float32. A random number of 16 bits added to the
    lower half carries over as often as that half is large; then it is cut off.
    """
    require("x", x.dtype, lambda dtype: dtype is torch.float32, "a tensor of float32")
    where: Any = {"device": x.device, "dtype": torch.int32}
    noise = torch.randint(0, 2**16, x.shape, generator=generator, **where)
    carried = (x.contiguous().view(torch.int32) + noise) & -(2**16)
    return torch.where(x.isfinite(), carried.view(torch.float32), x).bfloat16()


Storing = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""``(weight, update, state) -> weight``: how a weight of few bits takes an update of many; ``state`` is its own."""


def store_nearest(weight: Tensor, update: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the number nearest to the sum: small updates are lost, every time."""
    return weight + update.to(weight.dtype)


def store_stochastic(
    weight: Tensor,
    update: Tensor,
    state: dict[str, Tensor],
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the number below or above: a small update gets through seldom, but large."""
    return stochastic_round(weight.to(update.dtype) + update, weight.dtype, generator)


def store_compensated(weight: Tensor, update: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the sum, and keep what it lost for the next update, in as few bits."""
    lost = state.get("lost", torch.zeros_like(weight))
    new, state["lost"] = kahan_add(weight, lost, update.to(weight.dtype))
    return new


def store_master(weight: Tensor, update: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Return the rounded master copy, which has the updates' type and takes them all."""
    master = state.get("master", weight.to(update.dtype))
    state["master"] = master + update
    return state["master"].to(weight.dtype)


def hold_in(optimizer: Optimizer, dtype: torch.dtype, store: Storing) -> Optimizer:
    """Let the weights be numbers of a type from now on: after each step the change is
    stored by a rule. Returns the optimizer.

    The parameters keep the type that they have, so that only the weights are rounded
    and a run comes out the same on any machine. Weight decay sees rounded weights.

    Parameters
    ----------
    store : ``store_nearest``, ``store_stochastic``, ``store_compensated``,
        ``store_master``.
    """
    _checked_float(dtype)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before: list[Tensor] = []
    # In a group: so it is part of the optimizer's state, and a run that is resumed has it
    optimizer.param_groups[0]["held"] = [{} for _ in params]

    @torch.no_grad()
    def round_first(*_: Any) -> None:
        before[:] = [p.to(dtype) for p in params]
        for p, low in zip(params, before, strict=True):
            p.copy_(low)

    @torch.no_grad()
    def store_change(optimizer: Optimizer, *_: Any) -> None:
        for p, low, state in zip(params, before, optimizer.param_groups[0]["held"], strict=True):
            p.copy_(store(low, p - low, state))

    with torch.no_grad():
        for p in params:
            p.copy_(p.to(dtype))
    optimizer.register_step_pre_hook(round_first)
    optimizer.register_step_post_hook(store_change)
    return optimizer


def low_copy(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, list[nn.Parameter]]:
    """Turn a network into one of few bits, in place; return it with its master weights,
    in the type that it had.

    The optimizer gets the master weights: ``Adam(masters)``.
    """
    _checked_float(dtype)
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    return model.to(dtype), masters


def mixed_step(
    model: nn.Module,
    masters: Sequence[nn.Parameter],
    optimizer: Optimizer,
    loss_of: Callable[[nn.Module], Tensor],
    scaler: DynamicLossScaler | None = None,
) -> tuple[Tensor, bool]:
    """Make a training step: forward and backward in few bits, the update in many.

    Returns
    -------
    The loss, and whether the step was made (a scaler leaves it out on overflow).
    """
    loss = loss_of(model)
    (scaler.scaled(loss) if scaler else loss).backward()
    for low, master in zip(model.parameters(), masters, strict=True):
        master.grad = None if low.grad is None else low.grad.to(master.dtype)
        low.grad = None
    made = scaler.step(optimizer) if scaler else True
    if scaler is None:
        optimizer.step()
    with torch.no_grad():
        for low, master in zip(model.parameters(), masters, strict=True):
            low.copy_(master)
    return loss.detach(), made


# --- Inside -----------------------------------------------------------------------------------------------------------


def _flat(values: Tensors) -> Tensor:
    tensors = [values] if isinstance(values, Tensor) else [*values]
    require("values", len(tensors), bool, "one tensor or more")
    return torch.cat([t.detach().flatten() for t in tensors])


def _checked_float(dtype: torch.dtype) -> None:
    holds = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    require("dtype", dtype, lambda _: holds, "a floating-point type, such as torch.bfloat16")
