r"""Scaling rules: what becomes of the rate, and of every decay, when the batch is :math:`\kappa` times as large.

==================  =====================================================  ============================================
name                what it does                                           source
==================  =====================================================  ============================================
``linear``          the rate times kappa: an epoch of SGD goes as far,     Goyal et al. 2017, arXiv:1706.02677
                    with as much noise
``square_root``     times its root: a step of SGD has as much noise, an    Krizhevsky 2014, arXiv:1404.5997;
                    epoch of Adam too                                      Malladi et al. 2022, arXiv:2205.10287
``saturating``      linear far below the noise scale, constant far above   McCandlish et al. 2018, arXiv:1812.06162
``adam_beta``       a decay of Adam: 1 - kappa (1 - beta)                  Malladi et al. 2022, arXiv:2205.10287
``adam_eps``        Adam's eps over the root of kappa                      Malladi et al. 2022, arXiv:2205.10287
``ema_decay``       the decay of an average of weights: its power kappa    Busbridge et al. 2023, arXiv:2307.13813
``rescaled``        a recipe for another batch size, by a rule
``rescaled_adam``   the same for Adam: rate, betas and eps together        Malladi et al. 2022, arXiv:2205.10287
==================  =====================================================  ============================================

A rule is ``(lr, old, new) -> lr`` with the batch sizes ``old`` and ``new``, in examples.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.training import Recipe
from course_lib.schedules import Shape, Steps, flat, schedule, warm_up

Rule = Callable[[float, int, int], float]
"""``(lr, old batch size, new batch size) -> lr``; other settings by ``functools.partial``."""

# --- The rate ---------------------------------------------------------------------------------------------------------


def linear(lr: float, old: int, new: int) -> float:
    r"""Return :math:`\kappa\,\eta`: one step of the large batch goes as far as :math:`\kappa` steps of the small one.

    The noise of those steps adds up to the same variance, too. It needs gradients that hardly change over them; at the
    start of training they do, so warm up. Source: Goyal et al. 2017, arXiv:1706.02677.
    """
    return _checked_rate(lr) * _kappa(old, new)


def square_root(lr: float, old: int, new: int) -> float:
    r"""Return :math:`\sqrt\kappa\,\eta`.

    For SGD it keeps the variance of one step (Krizhevsky 2014, arXiv:1404.5997); an epoch, which has fewer of them,
    becomes quieter and goes less far. Adam divides the noise by its own size, so that its step keeps its length
    whatever the batch: for Adam in noise it is this rule that keeps the walk of an epoch, together with ``adam_beta``
    and ``adam_eps`` (Malladi et al. 2022, arXiv:2205.10287).
    """
    return _checked_rate(lr) * math.sqrt(_kappa(old, new))


def saturating(lr: float, old: int, new: int, *, noise_scale: float) -> float:
    r"""Return :math:`\eta\,(1 + B_\mathrm{noise}/B)/(1 + B_\mathrm{noise}/B')`: the best rate's own dependence on B.

    Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.2.
    """
    require("noise_scale", noise_scale, lambda b: is_number(b) and b >= 0, "a finite number of at least 0")
    _kappa(old, new)
    return _checked_rate(lr) * (1 + noise_scale / old) / (1 + noise_scale / new)


# --- Decays -----------------------------------------------------------------------------------------------------------


def adam_beta(beta: float, old: int, new: int) -> float:
    r"""Return :math:`1 - \kappa(1 - \beta)`: the average forgets as much in an epoch as before.

    Source: Malladi et al. 2022, arXiv:2205.10287.

    Raises
    ------
    ValueError : the result falls below 0: the average is shorter than one step of the new batch.
    """
    require("beta", beta, lambda b: is_number(b) and 0 <= b < 1, "a number of at least 0 and less than 1")
    scaled = 1 - _kappa(old, new) * (1 - beta)
    if scaled < 0:
        raise ValueError(
            f"beta={beta!r} at {new / old:g} times the batch would be {scaled:.3g}: must stay at 0 or above; "
            f"the batch can be at most {old / (1 - beta):.0f}"
        )
    return scaled


def adam_eps(eps: float, old: int, new: int) -> float:
    r"""Return :math:`\epsilon/\sqrt\kappa`: the root of the second moment, mostly noise, shrinks as much.

    Source: Malladi et al. 2022, arXiv:2205.10287.
    """
    require("eps", eps, lambda e: is_number(e) and e >= 0, "a finite number of at least 0")
    return eps / math.sqrt(_kappa(old, new))


def ema_decay(decay: float, old: int, new: int) -> float:
    r"""Return :math:`\rho^\kappa`: one step forgets what :math:`\kappa` steps did. For ``Recipe.ema``.

    Source: Busbridge et al. 2023, arXiv:2307.13813.
    """
    require("decay", decay, lambda d: is_number(d) and 0 < d < 1, "a number strictly between 0 and 1")
    return decay ** _kappa(old, new)


# --- Recipes ----------------------------------------------------------------------------------------------------------


def rescaled(
    recipe: Recipe, batch_size: int, *, rule: Rule = linear, warmup: Steps | None = None, then: Shape = flat
) -> Recipe:
    """Return the recipe for another batch size: the rate by ``rule``, the decay of ``ema`` by ``ema_decay``.

    With ``warmup`` (steps, or a fraction of all) the rate goes up on a line from the old one to the new, and on as
    ``then`` says: the gradual warm-up of Goyal et al. 2017, arXiv:1706.02677.

    Parameters
    ----------
    recipe : its ``optimizer`` must be a ``functools.partial``, whose ``lr`` (or the method's default) is scaled, and
        its ``batch_size`` a number.

    Raises
    ------
    ValueError : the recipe is not of that kind; with ``warmup`` also when it has a schedule (say it with ``then``),
        or when the rate does not grow.
    """
    old = _fixed_size(recipe, batch_size)
    lr = _setting(recipe, "lr")
    scaled = rule(lr, old, batch_size)
    changed = _with(recipe, batch_size, lr=scaled)
    if warmup is None:
        return changed
    require("recipe.schedule", recipe.schedule, lambda s: s is None, "None beside warmup: give its shape as then=")
    require(
        "batch_size", batch_size, lambda _: scaled >= lr > 0, f"one at which the rate grows, beside warmup={warmup}"
    )
    return replace(changed, schedule=schedule(warm_up, warmup=warmup, start_factor=lr / scaled, then=then))


def rescaled_adam(recipe: Recipe, batch_size: int) -> Recipe:
    """Return the recipe for another batch size with Adam's ``lr``, ``betas`` and ``eps`` (and ``ema``) scaled.

    Source: Malladi et al. 2022, arXiv:2205.10287.

    Raises
    ------
    ValueError : as ``rescaled`` and ``adam_beta``.
    """
    old = _fixed_size(recipe, batch_size)
    lr, betas, eps = (_setting(recipe, name) for name in ("lr", "betas", "eps"))
    return _with(
        recipe,
        batch_size,
        lr=square_root(lr, old, batch_size),
        betas=tuple(adam_beta(beta, old, batch_size) for beta in betas),
        eps=adam_eps(eps, old, batch_size),
    )


def _with(recipe: Recipe, batch_size: int, **settings: Any) -> Recipe:
    old: Any = recipe.batch_size
    ema = recipe.ema and ema_decay(recipe.ema, old, batch_size)
    return replace(recipe, batch_size=batch_size, optimizer=partial(recipe.optimizer, **settings), ema=ema)


def _fixed_size(recipe: Recipe, batch_size: int) -> int:
    at_least(1, batch_size=batch_size)
    at_least(1, **{"recipe.batch_size": recipe.batch_size})
    return recipe.batch_size  # type: ignore[return-value]


def _setting(recipe: Recipe, name: str) -> Any:
    """A setting of the recipe's optimizer: what the partial gives, or the method's own default."""
    made = recipe.optimizer
    if isinstance(made, partial):
        if name in made.keywords:
            return made.keywords[name]
        found = inspect.signature(made.func).parameters.get(name)
        if found is not None and found.default is not inspect.Parameter.empty:
            return found.default
    raise ValueError(
        f"recipe.optimizer={made!r}: must be functools.partial(method, {name}=...), whose {name} can be scaled"
    )


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _kappa(old: int, new: int) -> float:
    at_least(1, old=old, new=new)
    return new / old


def _checked_rate(lr: float) -> float:
    require("lr", lr, lambda rate: is_number(rate) and rate >= 0, "a finite number of at least 0")
    return lr
