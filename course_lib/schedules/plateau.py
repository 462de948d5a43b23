"""A rate that falls when nothing improves any more: ``ReduceLROnPlateau`` of torch, written to be read.

``watched`` is the rule: what the last figures were like, and one more -> what they are like now, and whether it is time
to reduce. ``ReduceOnPlateau`` keeps that and multiplies the rates. In a recipe: ``reduce_on_plateau(patience=3)``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.training import History

Mode = Literal["min", "max"]
ThresholdMode = Literal["rel", "abs"]


@dataclass(frozen=True)
class Plateau:
    """What the figures so far were like: the best, how many since were not better, how many more do not count."""

    best: float
    bad: int = 0
    cooldown: int = 0


def to_beat(best: float, mode: Mode, threshold: float, threshold_mode: ThresholdMode) -> float:
    """Return what the next figure must be below (``mode="min"``) or above (``"max"``) to count as better."""
    sign = -1 if mode == "min" else 1
    return best * (1 + sign * threshold) if threshold_mode == "rel" else best + sign * threshold


def watched(
    state: Plateau,
    value: float,
    *,
    mode: Mode = "min",
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: ThresholdMode = "rel",
    cooldown: int = 0,
) -> tuple[Plateau, bool]:
    """Take one more figure into account; the second answer is whether the rate is to be reduced now.

    It is after more than ``patience`` figures in a row that were not better than the best. After a reduction,
    ``cooldown`` figures are not counted as bad, whatever they are. A NaN is never better.
    """
    goal = to_beat(state.best, mode, threshold, threshold_mode)
    better = value < goal if mode == "min" else value > goal
    best, bad = (value, 0) if better else (state.best, state.bad + 1)
    waits = state.cooldown
    if waits > 0:
        waits, bad = waits - 1, 0
    if bad > patience:
        return Plateau(best, 0, cooldown), True
    return Plateau(best, bad, waits), False


class ReduceOnPlateau:
    """Multiplies the rates by ``factor`` when a figure has stopped improving.

    Parameters
    ----------
    optimizer : its rates are changed; at most down to ``min_lr`` (one for all groups, or one for each).
    mode : whether low (``"min"``) or high figures are good.
    patience, threshold, threshold_mode, cooldown : see ``watched``.
    eps : a change smaller than this is not made.
    column : of the history, to be listened to in ``fit``.

    Arguments, meaning and defaults are those of ``torch.optim.lr_scheduler.ReduceLROnPlateau``; ``column`` is ours.

    Raises
    ------
    ValueError : names the argument that is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Mode = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: ThresholdMode = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
        *,
        column: str = "val_loss",
    ) -> None:
        require("mode", mode, lambda x: x in ("min", "max"), "'min' or 'max'")
        require("threshold_mode", threshold_mode, lambda x: x in ("rel", "abs"), "'rel' or 'abs'")
        require("factor", factor, lambda x: is_number(x) and 0 < x < 1, "a number between 0 and 1")
        at_least(0, patience=patience, cooldown=cooldown)
        for name, value in {"threshold": threshold, "eps": eps}.items():
            require(name, value, lambda x: is_number(x) and x >= 0, "a number of at least 0")
        lowest = [min_lr] * len(optimizer.param_groups) if isinstance(min_lr, int | float) else list(min_lr)
        fits = f"a number of at least 0, or one for each of {len(optimizer.param_groups)} parameter groups"
        good = len(lowest) == len(optimizer.param_groups) and all(is_number(x) and x >= 0 for x in lowest)
        require("min_lr", min_lr, lambda _: good, fits)
        self.optimizer, self.factor, self.lowest, self.eps, self.column = optimizer, factor, lowest, eps, column
        self.watch = partial(
            watched,
            mode=mode,
            patience=patience,
            threshold=threshold,
            threshold_mode=threshold_mode,
            cooldown=cooldown,
        )
        self.state = Plateau(math.inf if mode == "min" else -math.inf)

    def observe(self, value: float) -> None:
        """Take one more figure into account, and reduce the rates if it is time."""
        self.state, reduce = self.watch(self.state, float(value))
        if reduce:
            for group, lowest in zip(self.optimizer.param_groups, self.lowest, strict=True):
                lr = max(group["lr"] * self.factor, lowest)
                if group["lr"] - lr > self.eps:
                    group["lr"] = lr

    def listen(self, history: History) -> None:
        """Observe the column's last figure; ``fit`` calls it after each validation."""
        self.observe(history[self.column][-1])

    def step(self) -> None:
        """Do nothing: ``fit`` calls it after each step, and only validations count."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = Plateau(**state)


def reduce_on_plateau(**settings: Any) -> partial[ReduceOnPlateau]:
    """Return what ``Recipe.schedule`` takes: ``ReduceOnPlateau`` with these settings.

    Raises
    ------
    ValueError : ``settings`` holds something that ``ReduceOnPlateau`` does not take.
    """
    try:
        inspect.signature(ReduceOnPlateau).bind(None, **settings)
    except TypeError as error:
        raise ValueError(f"settings={settings!r}: must fit ReduceOnPlateau: {error}") from None
    return partial(_on_plateau, **settings)


def _on_plateau(optimizer: Optimizer, total_steps: int, **settings: Any) -> ReduceOnPlateau:
    return ReduceOnPlateau(optimizer, **settings)
