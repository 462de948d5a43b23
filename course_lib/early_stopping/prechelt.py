r"""Prechelt's stopping criteria: by how much the validation error is above its lowest, and what training still gains.

===========================  ==================================================================================
name                         stops
===========================  ==================================================================================
``GeneralizationLoss``       when the error is α percent above its lowest (GL)
``ProgressQuotient``         when that outweighs what training still gains (PQ)
``SuccessiveIncreases``      when the error rose in s strips in a row (UP)
``LittleProgress``           when training hardly gains any more: to end what the others might never
===========================  ==================================================================================

A *strip* is so many epochs in a row; PQ and UP are asked at its end. The paper's epochs are the rows of a history here,
which is one each with ``Recipe(validate_every=1)``.

Source: Prechelt 1998, "Early stopping – but when?", in Neural Networks: Tricks of the Trade, LNCS 1524.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from course_lib.early_stopping.criteria import lower_is_better
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.training import History


def generalization_loss(errors: Sequence[float]) -> float:
    r"""Return :math:`GL(t)=100\,\big(E_\mathrm{va}(t)/E_\mathrm{opt}(t)-1\big)`, in percent, of the last error.

    :math:`E_\mathrm{opt}(t)` is the lowest error up to t. A NaN counts as infinite.

    Raises
    ------
    ValueError : no errors, or one below zero.
    """
    require("errors", len(errors), lambda n: n > 0, "of at least one validation")
    known = [math.inf if math.isnan(e) else e for e in errors]
    lowest, last = min(known), known[-1]
    require("errors", lowest, lambda e: e >= 0, "numbers of at least 0: GL is a share of the lowest")
    if last == lowest:
        return 0.0 if last < math.inf else math.inf
    return 100 * (last / lowest - 1) if lowest else math.inf


def training_progress(errors: Sequence[float], strip: int = 5) -> float:
    r"""Return by how many per mille the mean training error of the last k epochs (``strip``) is above their lowest.

    .. math:: P_k(t)=1000\,\Big(\frac{\sum_{t'=t-k+1}^tE_\mathrm{tr}(t')}{k\,\min_{t'=t-k+1}^tE_\mathrm{tr}(t')}-1\Big)

    It is high while training is fast or restless, and goes to zero as it settles.

    Raises
    ------
    ValueError : fewer than ``strip`` errors.
    """
    at_least(1, strip=strip)
    require("errors", len(errors), lambda n: n >= strip, f"of at least {strip} epochs")
    last = errors[-strip:]
    lowest = min(last)
    total = math.fsum(last)
    return 1000 * (total / (strip * lowest) - 1) if lowest else (math.inf if total else 0.0)


@dataclass(frozen=True)
class GeneralizationLoss:
    r""":math:`GL_\alpha`: stop when ``generalization_loss`` is above ``alpha`` percent.

    Raises
    ------
    ValueError : ``alpha`` is no number of at least 0, or ``column`` holds no errors (its name must end in ``loss``).
    """

    alpha: float
    column: str = "val_loss"

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)
        _check_error(column=self.column)

    def __call__(self, history: History) -> bool:
        return generalization_loss(history[self.column]) > self.alpha


@dataclass(frozen=True)
class ProgressQuotient:
    r""":math:`PQ_\alpha`: stop at the end of a strip when :math:`GL(t)/P_k(t)>\alpha`.

    A rising validation error is forgiven while the training error still falls fast.

    Raises
    ------
    ValueError : ``alpha`` or ``strip`` is out of its range, or a column holds no errors.
    """

    alpha: float
    strip: int = 5
    column: str = "val_loss"
    train: str = "train_loss"

    def __post_init__(self) -> None:
        _check_alpha(self.alpha)
        at_least(1, strip=self.strip)
        _check_error(column=self.column, train=self.train)

    def __call__(self, history: History) -> bool:
        if not _ends_a_strip(history, self.strip):
            return False
        # Multiplied out, since progress may be zero; 0 > α · ∞ and ∞ > α · ∞ are both no reason to stop
        loss, progress = generalization_loss(history[self.column]), training_progress(history[self.train], self.strip)
        return loss > self.alpha * progress


@dataclass(frozen=True)
class SuccessiveIncreases:
    r""":math:`UP_s`: stop when the error at the ends of ``strips`` strips in a row was above that of the strip before.

    However small the increases are, and whatever the error is in between.

    Raises
    ------
    ValueError : ``strips`` or ``strip`` is no whole number of at least 1, or ``column`` holds no errors.
    """

    strips: int
    strip: int = 5
    column: str = "val_loss"

    def __post_init__(self) -> None:
        at_least(1, strips=self.strips, strip=self.strip)
        _check_error(column=self.column)

    def __call__(self, history: History) -> bool:
        if not _ends_a_strip(history, self.strip) or len(history) < (self.strips + 1) * self.strip:
            return False
        ends = history[self.column][:: -self.strip][: self.strips + 1]  # the newest first
        return all(later > earlier for later, earlier in pairwise(ends))


@dataclass(frozen=True)
class LittleProgress:
    r"""Stop at the end of a strip when ``training_progress`` is below ``least`` per mille.

    None of the three above is sure ever to stop a run; Prechelt ends it so, at 0.1, or after a number of epochs.

    Raises
    ------
    ValueError : ``least`` is no number above 0, ``strip`` no whole number of at least 1, or ``train`` holds no errors.
    """

    least: float = 0.1
    strip: int = 5
    train: str = "train_loss"

    def __post_init__(self) -> None:
        require("least", self.least, lambda x: is_number(x) and x > 0, "a number above 0")
        at_least(1, strip=self.strip)
        _check_error(train=self.train)

    def __call__(self, history: History) -> bool:
        return _ends_a_strip(history, self.strip) and training_progress(history[self.train], self.strip) < self.least


def _ends_a_strip(history: History, strip: int) -> bool:
    return len(history) > 0 and len(history) % strip == 0


def _check_alpha(alpha: Any) -> None:
    require("alpha", alpha, lambda a: is_number(a) and a >= 0, "a number of at least 0")


def _check_error(**arguments: Any) -> None:
    for name, value in arguments.items():
        allowed = "a column of errors, whose name ends in 'loss'"
        require(name, value, lambda c: isinstance(c, str) and lower_is_better(c), allowed)
