r"""How sure an ensemble should be, whether it is, and what to do with answers that are not sure enough.

=========================  ================================================  ===========================================
name                       what it gives                                     source
=========================  ================================================  ===========================================
``tempered_members``       a temperature for each member, before the mean    Rahaman & Thiery 2020, arXiv:2007.08792
``fit_vector``             a factor and an offset for each class             Guo et al. 2017, arXiv:1706.04599
``VectorScaled``           a network whose logits they are applied to
``brier_parts``            the Brier score: reliability, resolution,         Murphy 1973, J. Applied Meteorology 12;
                           uncertainty                                       Stephenson et al. 2008, Weather and
                                                                             Forecasting 23
``risk_coverage``          the error among the answers kept, the surest      El-Yaniv & Wiener 2010, JMLR 11;
                           first; its area                                   Geifman & El-Yaniv 2017, arXiv:1705.08500
``error_auroc``            how well confidence tells right from wrong        Hendrycks & Gimpel 2016, arXiv:1610.02136
=========================  ================================================  ===========================================

The basic measures and the one temperature are chapter 5's (``course_lib.regularization``: ``reliability``,
``calibration_error``, ``brier_score``, ``fit_temperature``, ``Tempered``), and are used here, not written again.
They take logits or log-probabilities ``[N, K]``, so also what members say together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.fusion.answers import check_labels, exact
from course_lib.lab.arguments import at_least
from course_lib.lab.data import Split
from course_lib.lab.training import logits_of
from course_lib.regularization.calibration import fit_temperature

# --- Mending it -------------------------------------------------------------------------------------------------------


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Return the mean negative logarithm of what is given to the label, in float64; log-probabilities will do as well.

    Raises
    ------
    ValueError : logits and labels do not fit.
    """
    return F.cross_entropy(_checked(logits, labels), labels).item()


def tempered_members(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the temperatures :math:`T_m`, float64 ``[M]``, that calibrate each member by itself.

    Divide by them before the mean: ``mean_probability(logits / T[:, None, None])``. The mean of members so calibrated
    is too unsure, since it spreads over what they disagree about; the paper's advice is one temperature for the mean:
    ``fit_temperature(mean_probability(logits), labels)``.

    Raises
    ------
    ValueError : logits ``[M, N, K]`` and labels do not fit.
    """
    z = exact(logits)
    check_labels(labels, z.shape[1], z.shape[2])
    return torch.tensor([fit_temperature(each, labels) for each in z], dtype=torch.float64, device=z.device)


class Vector(NamedTuple):
    """A ``factor`` and an ``offset`` for each class, float64 ``[K]``."""

    factor: Tensor
    offset: Tensor


def fit_vector(logits: Tensor, labels: Tensor, *, strength: float = 1e-6) -> Vector:
    r"""Return a and b for which the softmax of :math:`a\circ z+b` has the least cross-entropy, which is convex in both.

    To be fitted on validation logits; unlike a temperature it can change the class that is named. ``strength`` times
    the squares of a - 1 and b is added: b is only known up to a constant, and where all predictions are right there is
    no least one.

    Raises
    ------
    ValueError : logits ``[N, K]`` and labels do not fit, or ``strength`` is not above 0.
    """
    z = _checked(logits, labels)
    if not strength > 0:
        raise ValueError(f"strength={strength!r}: must be a number above 0")

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(a * z + b, labels) + strength * ((a - 1).square().sum() + b.square().sum())

    ones = torch.ones_like(z[0])
    return Vector(*_least(loss, [ones, torch.zeros_like(ones)]))


def _least(loss: Callable[..., Tensor], start: Sequence[Tensor], *, steps: int = 200) -> list[Tensor]:
    """Return where ``loss(*numbers)`` is least, from ``start``, in float64: L-BFGS with a line search."""
    numbers = [each.detach().double().clone().requires_grad_() for each in start]
    solver = torch.optim.LBFGS(
        numbers,
        max_iter=steps,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        found = loss(*numbers)
        found.backward()
        return found

    with torch.enable_grad():
        solver.step(closure)
    return [each.detach() for each in numbers]


class VectorScaled(nn.Module):
    """A network whose logits are multiplied by a factor and shifted by an offset, one of each a class."""

    factor: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module, vector: Vector) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("factor", vector.factor)
        self.register_buffer("offset", vector.offset)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …]`` to logits ``[N, K]``."""
        z = self.model(x)
        return z * self.factor.to(z) + self.offset.to(z)


def vector_scaled(model: nn.Module, val: Split) -> VectorScaled:
    """Return the network with the vector that fits ``val``."""
    return VectorScaled(model, fit_vector(logits_of(model, val), val.labels))


# --- Taking the Brier score apart -------------------------------------------------------------------------------------


class BrierParts(NamedTuple):
    """The score is reliability - resolution + uncertainty + within; ``within`` is 0 where bins hold equal forecasts."""

    reliability: float
    resolution: float
    uncertainty: float
    within: float
    score: float


def brier_parts(logits: Tensor, labels: Tensor, *, bins: int = 15) -> BrierParts:
    r"""Take the Brier score apart, exactly: for each class the forecasts :math:`p_i` of it are put into bins b.

    With the means :math:`\bar p_b` and :math:`\bar o_b` of forecasts and outcomes in a bin, :math:`\bar o` over all:

    .. math:: \overline{(p-o)^2}=\underbrace{\textstyle\sum_b\tfrac{n_b}N(\bar p_b-\bar o_b)^2}_{\text{reliability}}
        -\underbrace{\textstyle\sum_b\tfrac{n_b}N(\bar o_b-\bar o)^2}_{\text{resolution}}
        +\underbrace{\bar o(1-\bar o)}_{\text{uncertainty}}
        +\underbrace{\overline{(p-\bar p_b)^2}-2\,\overline{(p-\bar p_b)(o-\bar o_b)}}_{\text{within}}

    summed over the classes. Murphy has a bin for each value that is forecast, and nothing within; the last two terms
    are what wider bins leave out (Stephenson et al. 2008). Bins are of equal width, the upper edge belongs to one.

    Raises
    ------
    ValueError : logits ``[N, K]`` and labels do not fit, or ``bins`` is below 1.
    """
    at_least(1, bins=bins)
    q = _checked(logits, labels).softmax(1)
    outcome = F.one_hot(labels, q.shape[1]).to(q)
    place = (q * bins).ceil().long().clamp(1, bins) - 1  # [N, K]
    zeros = q.new_zeros(bins, q.shape[1])
    count = zeros.scatter_add(0, place, torch.ones_like(q))
    forecast = zeros.scatter_add(0, place, q) / count.clamp_min(1)
    happened = zeros.scatter_add(0, place, outcome) / count.clamp_min(1)
    share, rate = count / len(q), outcome.mean(0)
    off, miss = q - forecast.gather(0, place), outcome - happened.gather(0, place)
    return BrierParts(
        (share * (forecast - happened).square()).sum().item(),
        (share * (happened - rate).square()).sum().item(),
        (rate * (1 - rate)).sum().item(),
        (off.square() - 2 * off * miss).sum(1).mean().item(),
        (q - outcome).square().sum(1).mean().item(),
    )


# --- Answering only where it is sure ----------------------------------------------------------------------------------


class RiskCoverage(NamedTuple):
    """``coverage`` and ``risk`` ``[N]``, from the surest example to all; its ``area``, and the ``best`` one."""

    coverage: Tensor
    risk: Tensor
    area: float
    best: float


def risk_coverage(confidence: Tensor, right: Tensor) -> RiskCoverage:
    """Return the share of errors among the n surest answers, for each n; ``[N]`` and bool ``[N]``.

    Within equal confidences the errors are spread evenly, as they come on average over all orders. The area is the mean
    risk over coverages 1/N to 1, and the best one that of a confidence which is lower for each error.

    Raises
    ------
    ValueError : the two do not fit.
    """
    _check_confidence(confidence, right)
    value, order = confidence.detach().double().sort(descending=True, stable=True)
    wrong = (~right)[order].double()
    _, group, sizes = value.unique_consecutive(return_inverse=True, return_counts=True)
    share = torch.zeros_like(sizes, dtype=torch.float64).scatter_add(0, group, wrong) / sizes
    kept = torch.arange(1, len(wrong) + 1, dtype=torch.float64, device=wrong.device)
    risk = share[group].cumsum(0) / kept
    ideal = torch.sort(wrong).values.cumsum(0) / kept
    return RiskCoverage(kept / len(wrong), risk, risk.mean().item(), ideal.mean().item())


def error_auroc(confidence: Tensor, right: Tensor) -> float:
    """Return the chance that a right answer is surer than a wrong one, ties counting half: 0.5 is no better than luck.

    Raises
    ------
    ValueError : the two do not fit, or all answers are right, or all are wrong.
    """
    _check_confidence(confidence, right)
    if right.all() or not right.any():
        raise ValueError(f"right={bool(right.all())} for all: must hold right and wrong answers")
    _, inverse, counts = confidence.detach().double().unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]  # from 1, the mean one of equals
    n, m = int(right.sum()), int((~right).sum())
    return ((rank[right].sum() - n * (n + 1) / 2) / (n * m)).item()


def _checked(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.numel():
        raise ValueError(f"logits={logits.dtype} {list(logits.shape)}: must be floats [N, K], none of them 0")
    check_labels(labels, *logits.shape)
    return logits.detach().double()


def _check_confidence(confidence: Tensor, right: Tensor) -> None:
    fits = confidence.ndim == 1 and len(confidence) and confidence.shape == right.shape and right.dtype == torch.bool
    if not fits or not confidence.is_floating_point() or confidence.isnan().any():
        found = f"{confidence.dtype} {list(confidence.shape)}, right={right.dtype} {list(right.shape)}"
        raise ValueError(f"confidence={found}: must be floats [N], none of them NaN, and bool [N]")
