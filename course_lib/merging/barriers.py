r"""What lies between networks: the loss along a way from one to another, and over the plane through three.

======================  ======================================================  ======================================
name                    what it gives                                           source
======================  ======================================================  ======================================
``loss_along``          loss and accuracy along a way                           Goodfellow, Vinyals & Saxe 2014,
                                                                                arXiv:1412.6544
``barrier``             how far the loss rises above the straight line          Entezari et al. 2021, arXiv:2110.06296
                        between those of both ends
``instability``         how far the error rises above the mean of both ends'    Frankle et al. 2019, arXiv:1912.05671
``plane``               the loss over the plane through three networks          Garipov et al. 2018, arXiv:1802.10026
``swapped_units``       two perfect networks of two units each, whose mean      –
                        knows nothing
======================  ======================================================  ======================================

Where the loss is convex in the weights, as in softmax regression, there is no barrier:
:math:`L\big((1-t)\theta_a+t\theta_b\big)\le(1-t)L(\theta_a)+tL(\theta_b)`. With a hidden layer it is not convex, and
``swapped_units`` shows it: two networks with the same function, their two units in another order, and between them
networks that answer the same to every input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import is_number, is_whole, require
from course_lib.lab.data import Split
from course_lib.lab.models import mlp
from course_lib.lab.training import Objective, cross_entropy, evaluate
from course_lib.merging.averaging import interpolate
from course_lib.merging.states import batch_norms, check_alike, combined, doubled, flat, parameters_of, with_state

Way = Callable[[nn.Module, nn.Module, float], nn.Module]
"""``(a, b, t) -> network`` with ``a`` at 0 and ``b`` at 1: ``interpolate``, ``slerp``."""
Prepare = Callable[[nn.Module], nn.Module]
"""What happens to a network before it is measured: ``partial(refresh_batch_norm, split=data.train)``."""


@dataclass(frozen=True)
class Path:
    """Loss and accuracy of the networks at each ``t`` of a way."""

    t: tuple[float, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]


def loss_along(
    a: nn.Module,
    b: nn.Module,
    split: Split,
    points: int | Sequence[float] = 11,
    *,
    way: Way = interpolate,
    prepare: Prepare | None = None,
    objective: Objective = cross_entropy,
) -> Path:
    """Measure the networks along a way from ``a`` to ``b``, at evenly spaced points or at those given, both ends too.

    With batch norm the statistics between two networks fit neither: ``prepare`` refreshes them.

    Raises
    ------
    ValueError : the networks are of different shapes; ``points`` is no number of at least 2, and no rising numbers from
        0 to 1.
    """
    check_alike([a, b], ["a", "b"])
    where = _points(points)
    found = [_measured(way(a, b, t), split, prepare, objective) for t in where]
    return Path(where, tuple(loss for loss, _ in found), tuple(accuracy for _, accuracy in found))


def _points(points: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(points, int):
        require("points", points, lambda n: n >= 2, "a whole number of at least 2, or numbers from 0 to 1")
        return tuple(i / (points - 1) for i in range(points))
    found = tuple(points)
    rising = len(found) >= 2 and all(a < b for a, b in pairwise(found))
    require("points", found, lambda p: rising and p[0] == 0 and p[-1] == 1, "rising numbers that begin at 0, end at 1")
    return found


def _measured(model: nn.Module, split: Split, prepare: Prepare | None, objective: Objective) -> tuple[float, float]:
    found = evaluate(model if prepare is None else prepare(model), split, objective=objective)
    return found.loss, found.accuracy


def barrier(path: Path) -> float:
    r"""Return :math:`\max_t\,L_t-\big((1-t)L_0+tL_1\big)`, at least 0: no rise above the line is no barrier.

    Source: Entezari et al. 2021, arXiv:2110.06296.
    """
    first, last = path.losses[0], path.losses[-1]
    return max(loss - ((1 - t) * first + t * last) for t, loss in zip(path.t, path.losses, strict=True))


def instability(path: Path) -> float:
    r"""Return :math:`\max_tE_t-\tfrac12(E_0+E_1)` of the error, which is one minus the accuracy.

    Frankle et al. 2019 (arXiv:1912.05671) call networks stable to the noise of SGD where it is about 0.
    """
    errors = [1 - accuracy for accuracy in path.accuracies]
    return max(errors) - (errors[0] + errors[-1]) / 2


# --- A plane ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Plane:
    """The losses over a plane of weight space, distances in units of weights.

    Attributes
    ----------
    x, y : the coordinates of the grid, ``[X]`` and ``[Y]``.
    losses, accuracies : ``[Y, X]``.
    corners : where a, b and c lie, ``[3, 2]``; a is the origin, b lies on the x-axis.
    """

    x: Tensor
    y: Tensor
    losses: Tensor
    accuracies: Tensor
    corners: Tensor


def plane(
    a: nn.Module,
    b: nn.Module,
    c: nn.Module,
    split: Split,
    points: int = 15,
    *,
    margin: float = 0.25,
    prepare: Prepare | None = None,
    objective: Objective = cross_entropy,
) -> Plane:
    """Measure the networks of a grid of ``points`` by ``points`` on the plane through three.

    The grid reaches beyond the three by ``margin`` times their extent. Buffers are those of ``a``: with batch norm
    ``prepare`` has to refresh them.

    Raises
    ------
    ValueError : the networks are of different shapes or lie on a line, ``points`` is below 2, ``margin`` negative, or
        there is batch norm and no ``prepare``.
    """
    check_alike([a, b, c], ["a", "b", "c"])
    require("points", points, lambda n: is_whole(n) and n >= 2, "a whole number of at least 2")
    require("margin", margin, lambda m: is_number(m) and m >= 0, "a number of at least 0")
    if batch_norms(a) and prepare is None:
        raise ValueError("prepare=None: must be given for networks with batch norm, to refresh its statistics")
    origin, *others = (parameters_of(model) for model in (a, b, c))
    to_b, to_c = (doubled(flat(combined([origin, other], [-1.0, 1.0]))) for other in others)  # where a lies
    length = to_b.norm()
    along = to_b @ to_c / length.clamp_min(torch.finfo(torch.float32).tiny)
    height = (to_c - along / length * to_b).norm() if length > 0 else length
    largest = max(float(doubled(flat(state)).norm()) for state in (origin, *others))
    rounding = 10 * torch.finfo(flat(origin).dtype).eps * largest  # what rounded weights leave beside a line
    if not height > max(1e-9 * float(to_c.norm()), rounding):
        raise ValueError("a, b and c lie on a line: must be three networks that span a plane")
    corners = torch.tensor([[0.0, 0.0], [float(length), 0.0], [float(along), float(height)]], dtype=torch.float64)
    low, high = corners.amin(0), corners.amax(0)
    reach = margin * (high - low)
    x, y = (torch.linspace(float(s), float(e), points, dtype=torch.float64) for s, e in zip(low - reach, high + reach))  # noqa: B905
    losses, accuracies = torch.empty(points, points), torch.empty(points, points)
    for row, up in enumerate(y.tolist()):
        for column, right in enumerate(x.tolist()):
            third = up / float(height)
            second = (right - third * float(along)) / float(length)
            weights = combined([origin, *others], [1 - second - third, second, third])
            losses[row, column], accuracies[row, column] = _measured(with_state(a, weights), split, prepare, objective)
    return Plane(x, y, losses, accuracies, corners)


# --- Two units --------------------------------------------------------------------------------------------------------


def swapped_units(sharpness: float = 10.0) -> tuple[nn.Module, nn.Module]:
    r"""Return two networks of two hidden units that tell :math:`|x|>1` (class 1) from the rest, ``[N, 1] -> [N, 2]``.

    Both give the logits :math:`\big(0,\;s\,(\text{relu}(x)+\text{relu}(-x)-1)\big)` with s the ``sharpness``; the units
    of the second are those of the first in the other order. At their mean all weights of the hidden layer are 0, and
    the logits of every input are :math:`(0,-s)`. In float64.

    Raises
    ------
    ValueError : ``sharpness`` is no number above 0.
    """
    require("sharpness", sharpness, lambda s: is_number(s) and s > 0, "a number above 0")
    weights = torch.tensor([[0.0, 0.0], [sharpness, sharpness]])
    with torch.random.fork_rng(devices=[]):  # what is drawn here is not kept
        plain = mlp((1,), 2, width=2, depth=1).double()
    given = {"hidden.0.bias": torch.zeros(2), "head.weight": weights, "head.bias": torch.tensor([0.0, -sharpness])}
    first, second = (
        with_state(plain, given | {"hidden.0.weight": torch.tensor(signs)[:, None]})
        for signs in ([1.0, -1.0], [-1.0, 1.0])
    )
    return first, second
