r"""A network cut by depth: easy examples leave it early, and the layers behind the exit never see them.

===========================  ==============================================  ===========================================
name                         what it does                                    source
===========================  ==============================================  ===========================================
``WithExits``                a small classifier behind each of some layers   Teerapittayanon, McDanel & Kung 2016
                                                                             (BranchyNet), arXiv:1709.01686
``joint``                    trains all exits at once                        the same; Huang et al. 2017 (MSDNet),
                                                                             arXiv:1703.09844
``heads_only``               trains them on a finished network               Kaya, Hong & Dumitras 2018,
                                                                             arXiv:1810.07052
``max_probability``,         how sure an exit is                             Xin et al. 2020 (DeeBERT),
``negative_entropy``                                                         arXiv:2004.12993
``first_sure``,              where each example leaves, from the logits of
``answer_early``             all exits; and really leaving there
``exit_flops``,              what an example costs by its exit; accuracy
``exit_curve``               and cost over thresholds
``threshold_for``            the cheapest threshold that is good enough
``overthinking``             who is right early and wrong at last            Kaya et al. 2018
``device_and_server_time``   the first exits on a device, the rest on a      Li, Zhou & Chen 2018 (Edgent),
                             server that sees the hard examples alone        arXiv:1806.07840
===========================  ==============================================  ===========================================

Chapter 9 has exits too: there the last layer teaches the earlier ones, and the network stays whole. Chapter 14 asks one
network after another, each from the pixels on. Here the network is cut: an exit goes on from the features of the one
before, and what lies behind it may be on another machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.costs import flops
from course_lib.lab.data import Split
from course_lib.lab.models import Network, freeze
from course_lib.lab.training import Objective, cross_entropy, logits_of
from course_lib.partitioning.cutting import chain
from course_lib.regularization.passes import Seen, unseen

Confidence = Callable[[Tensor], Tensor]
"""Logits ``[N, K]`` -> how sure they are ``[N]``, the larger the surer."""

# --- The network ------------------------------------------------------------------------------------------------------


class Exit(nn.Module):
    """Means over the squares of a raster, then one linear layer: a small classifier of features.

    Of images ``[N, C, H, W]`` a raster of ``grid`` x ``grid``; tokens ``[N, T, C]`` and rows ``[N, C]`` as ``pooled``.
    """

    def __init__(self, features: Tensor, classes: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.linear = nn.Linear(pooled(features, grid).shape[1], classes)

    def forward(self, h: Tensor) -> Tensor:
        """Features to logits ``[N, K]``."""
        return self.linear(pooled(h, self.grid))


def pooled(h: Tensor, grid: int = 1) -> Tensor:
    """Means over squares or tokens: ``[N, C, H, W]`` to ``[N, C * grid**2]``; ``[N, T, C]`` and ``[N, C]`` to the last.

    The raster is no finer than the image. One mean over all of it forgets where an edge was, and early layers know
    little but edges; a raster of 4 x 4 keeps that (Kaya, Hong & Dumitras 2018).
    """
    if h.ndim == 4:
        raster = (min(grid, h.shape[2]), min(grid, h.shape[3]))
        return F.adaptive_avg_pool2d(h, raster).flatten(1)
    return h.mean(1) if h.ndim == 3 else h


class WithExits(nn.Module):
    """A network with a way out behind each of some layers of its ``chain``; the last way out is its own head.

    The ``parts`` between the exits hold the network's own layers, not copies; ``heads`` are new, and drawn from torch's
    global generator. ``forward`` gives the logits of the last exit.

    Parameters
    ----------
    places : names of layers in ``chain(network)``, in order.
    grid : each exit sees the means over so many squares each way; 1 is the mean over the whole image.
    example : a batch as the network sees it, where it is none of the laboratory's.

    Raises
    ------
    ValueError : there are no places, or one is no layer before the last; they are not in order; ``grid`` is below 1.
    """

    def __init__(
        self, network: nn.Module, places: Sequence[str], *, grid: int = 4, example: Tensor | None = None
    ) -> None:
        super().__init__()
        at_least(1, grid=grid)
        layers = dict(chain(network))
        numbers = {name: number for number, name in enumerate(layers, start=1)}
        _check_places(places, [*layers])
        bounds = [0, *(numbers[name] for name in places), len(layers)]
        each = [*layers.values()]
        self.places = tuple(places)
        self.parts = nn.ModuleList(nn.Sequential(*each[a:b]) for a, b in itertools.pairwise(bounds))
        self.heads = nn.ModuleList()
        was_training = network.training
        h, found = _example(network, example), []
        with torch.no_grad():
            for part in self.parts.eval():
                h = part(h)
                found.append(h)
        for features in found[:-1]:
            self.heads.append(Exit(features, h.shape[1], grid).to(features))
        self.train(was_training)

    def all_exits(self, x: Tensor) -> list[Tensor]:
        """``[N, …]`` to the logits ``[N, K]`` of each exit in turn, at last those of the network itself."""
        h, logits = x, []
        for part, head in itertools.zip_longest(self.parts, self.heads):
            h = part(h)
            logits.append(h if head is None else head(h))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """``[N, …]`` to the logits ``[N, K]`` of the last exit."""
        for part in self.parts:
            x = part(x)
        return x


def _example(network: nn.Module, example: Tensor | None) -> Tensor:
    if example is not None:
        return example
    if not isinstance(network, Network):
        raise ValueError("example=None: must be a batch as the network sees it, where it is none of the laboratory's")
    like = next(network.parameters())
    return torch.zeros(1, *network.input_shape, dtype=like.dtype, device=like.device)


def _check_places(places: Sequence[str], layers: list[str]) -> None:
    known = all(name in layers[:-1] for name in places)
    in_order = known and [*places] == sorted(set(places), key=layers.index)
    require("places", tuple(places), lambda _: bool(places) and in_order, f"some of {', '.join(layers[:-1])}, in order")


# --- Training ---------------------------------------------------------------------------------------------------------


def joint(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    weights: Sequence[float],
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the weighted sum :math:`\sum_e w_e L_e` of the objective over all exits of a ``WithExits`` network.

    ``weights`` are one number an exit, the last for the network's own head. Source: Teerapittayanon et al. 2016.

    Raises
    ------
    ValueError : the model is no ``WithExits``, or the weights are not one number of at least 0 for each exit.
    """
    network = unseen(model)
    if not isinstance(network, WithExits):
        raise ValueError(f"model={type(network).__name__}: must be a network WithExits")
    _check_weights(weights, len(network.parts))
    total = x.new_zeros(())
    for weight, logits in zip(weights, network.all_exits(x), strict=True):
        total = total + weight * objective(Seen(network, x, logits), x, y)
    return total


def _check_weights(weights: Sequence[float], exits: int) -> None:
    fits = len(weights) == exits and all(is_number(w) and w >= 0 for w in weights)
    require("weights", tuple(weights), lambda _: fits, f"{exits} numbers of at least 0, one an exit")


def heads_only(model: WithExits) -> WithExits:
    """Freeze all but the new heads, so that ``fit`` with ``joint`` leaves the network as it was. Returns the model.

    The last exit is then as good as before: what joint training costs it, this does not. Source: Kaya et al. 2018.
    """
    freeze(model.parts)
    return model


# --- Leaving early ----------------------------------------------------------------------------------------------------


def max_probability(logits: Tensor) -> Tensor:
    """Return the probability of the class that is named, ``[N, K]`` to ``[N]``: from 1/K to 1."""
    return logits.softmax(1).amax(1)


def negative_entropy(logits: Tensor) -> Tensor:
    r"""Return :math:`\sum_kp_k\log p_k` in nats, ``[N, K]`` to ``[N]``: from :math:`-\log K` to 0."""
    log_p = logits.log_softmax(1)
    return (log_p.exp() * log_p).nan_to_num().sum(1)


def first_sure(
    logits: Sequence[Tensor],
    threshold: float,
    *,
    confidence: Confidence = max_probability,
) -> Tensor:
    """Return the first exit, counted from 0, that is as sure as the threshold; the last always answers.

    ``logits`` are one ``[N, K]`` an exit; the result is int64 ``[N]``. The sequential rule, on answers that are there.
    """
    sure = torch.stack([confidence(each) >= threshold for each in logits])
    sure[-1] = True
    return sure.int().argmax(0)  # of equals the first


class Early(NamedTuple):
    """The ``logits`` ``[N, K]`` of the exit that answered, and which it was: int64 ``[N]``, from 0."""

    logits: Tensor
    exits: Tensor


@torch.no_grad()
def answer_early(
    model: WithExits,
    x: Tensor,
    threshold: float,
    *,
    confidence: Confidence = max_probability,
) -> Early:
    """Answer each example at the first exit that is sure; only the others go through the next part.

    In evaluation mode, for in a batch that is normalised by its own statistics the others would matter.
    """
    was_training = model.training
    model.eval()
    left, logits, exits = torch.arange(len(x), device=x.device), None, None
    for number, part in enumerate(model.parts):
        x = part(x)
        last = number == len(model.heads)
        said = x if last else model.heads[number](x)
        if logits is None or exits is None:
            logits, exits = torch.empty_like(said), torch.empty_like(left)
        sure = confidence(said) >= (-torch.inf if last else threshold)
        logits[left[sure]], exits[left[sure]] = said[sure], number
        left, x = left[~sure], x[~sure]
        if not len(left):
            break
    model.train(was_training)
    assert logits is not None
    assert exits is not None
    return Early(logits, exits)


# --- What it saves ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def exit_flops(model: WithExits, example: Tensor) -> list[int]:
    """Return what an example costs that leaves at each exit: the parts it went through, and the heads it tried.

    ``example`` is one example as the network sees it, ``[1, …]``.
    """
    h, spent, costs = example, 0, []
    was_training = model.training
    model.eval()
    for part, head in itertools.zip_longest(model.parts, model.heads):
        spent += flops(part, h)
        h = part(h)
        spent += 0 if head is None else flops(head, h)
        costs.append(spent)
    model.train(was_training)
    return costs


class _Exits(nn.Module):
    """All exits side by side, ``[N, E K]``, so that ``logits_of`` can collect them."""

    def __init__(self, model: WithExits) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.model.all_exits(x), dim=1)


def exit_logits(model: WithExits, split: Split) -> Tensor:
    """Return the logits ``[E, N, K]`` of each exit on a split, in evaluation mode."""
    return torch.stack(logits_of(_Exits(model), split).chunk(len(model.parts), dim=1))


def exit_curve(
    model: WithExits,
    split: Split,
    thresholds: Sequence[float],
    *,
    confidence: Confidence = max_probability,
) -> pd.DataFrame:
    """Return a table with a row a threshold: ``accuracy``, mean ``flops`` an example, the share of each exit.

    The shares are columns ``exit 0``, ``exit 1``, … A threshold above every confidence is the whole network, heads
    tried in vain included.
    """
    logits = exit_logits(model, split)
    labels = split.labels.to(logits.device)
    one = logits.new_zeros(1, *split.images.shape[1:])
    costs = torch.tensor(exit_flops(model, one), dtype=torch.float64)
    rows = []
    for threshold in thresholds:
        exits = first_sure([*logits], threshold, confidence=confidence)
        answers = logits[exits, torch.arange(len(exits), device=exits.device)].argmax(1)
        shares = torch.bincount(exits.cpu(), minlength=len(costs)).double() / len(exits)
        accuracy = (answers == labels).double().mean().item()
        row = {"accuracy": accuracy, "flops": (shares @ costs).item()}
        rows.append(row | {f"exit {k}": share for k, share in enumerate(shares.tolist())})
    return pd.DataFrame(rows, index=pd.Index(thresholds, name="threshold"))


def threshold_for(curve: pd.DataFrame, accuracy: float) -> float:
    """Return the threshold of the cheapest row of an ``exit_curve`` that is as accurate as asked.

    Choose it on the validation split, and report what it does on the test split. Chapter 14's
    ``thresholds_for_accuracy`` looks for one of its own for each exit.

    Raises
    ------
    ValueError : no row reaches the accuracy.
    """
    best = curve["accuracy"].max()
    require("accuracy", accuracy, lambda a: is_number(a) and a <= best + 1e-12, f"at most {best:g}, the curve's best")
    enough = curve[curve["accuracy"] >= accuracy - 1e-12]
    return float(enough.index[int(enough["flops"].argmin())])


class Overthinking(NamedTuple):
    """Shares of a split, see ``overthinking``."""

    wasteful: float
    destructive: float
    oracle: float


def overthinking(model: WithExits, split: Split) -> Overthinking:
    """Return how much thinking on is waste, and how much does harm.

    ``wasteful`` : the share that some early exit and the last get right: those in between did not matter.
    ``destructive`` : the share that some early exit gets right and the last gets wrong.
    ``oracle`` : the share that some exit gets right: what one could reach who knew when to stop.

    Source: Kaya, Hong & Dumitras 2018, arXiv:1810.07052.
    """
    logits = exit_logits(model, split)
    right = logits.argmax(2) == split.labels.to(logits.device)
    early, last = right[:-1].any(0), right[-1]
    shares = (early & last, early & ~last, early | last)
    return Overthinking(*(share.double().mean().item() for share in shares))


# --- A device and a server --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edge:
    """A device and a server: flops a second of each, bytes a second between them, seconds until a message arrives."""

    device_speed: float
    server_speed: float
    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("device_speed", "server_speed", "bandwidth"):
            require(name, getattr(self, name), lambda v: is_number(v) and v > 0, "a number above 0")
        require("latency", self.latency, lambda v: is_number(v) and v >= 0, "a number of at least 0")


def device_and_server_time(
    curve: pd.DataFrame,
    costs: Sequence[float],
    edge: Edge,
    *,
    place: int = 0,
    message: float,
) -> pd.Series:
    r"""Return the mean seconds an example for each row of an ``exit_curve``: exits up to ``place`` are on the device.

    .. math:: T = \sum_e q_e\frac{F_{\min(e,k)}}{s_d}
        + \sum_{e>k} q_e\Big(\alpha + \frac{m}{\beta} + \frac{F_e - F_k}{s_s}\Big)

    with the share :math:`q_e` and the cost :math:`F_e` of exit e (``exit_flops``), the ``place`` k, a ``message`` of m
    bytes, latency :math:`\alpha`, bandwidth :math:`\beta` and the speeds of device and server. Only what no exit of the
    device is sure of is sent. The answer comes back for nothing: it is a few bytes. After Li, Zhou & Chen 2018 (Edgent)
    and Teerapittayanon, McDanel & Kung 2017, arXiv:1709.01921.

    Raises
    ------
    ValueError : costs are not one an exit, ``place`` is no exit, or ``message`` is negative.
    """
    _check_places_of(curve, costs, place, message)
    sending = edge.latency + message / edge.bandwidth
    seconds = pd.Series(0.0, index=curve.index)
    for number, cost in enumerate(costs):
        spent = min(cost, costs[place]) / edge.device_speed
        if number > place:
            spent += sending + (cost - costs[place]) / edge.server_speed
        seconds += curve[f"exit {number}"] * spent
    return seconds


def _check_places_of(curve: pd.DataFrame, costs: Sequence[float], place: int, message: float) -> None:
    exits = sum(name.startswith("exit ") for name in curve.columns)
    require("costs", [*costs], lambda found: len(found) == exits, f"{exits} numbers, one an exit of the curve")
    require("place", place, lambda k: k in range(exits), f"an exit, 0 to {exits - 1}")
    require("message", message, lambda m: is_number(m) and m >= 0, "a number of at least 0")


def on_device_alone(cost: float, edge: Edge) -> float:
    """Return the seconds of an example of so many flops where nothing is sent."""
    return cost / edge.device_speed


def on_server_alone(cost: float, edge: Edge, *, message: float) -> float:
    """Return the seconds of an example of so many flops where the image, ``message`` bytes, is sent at once."""
    return edge.latency + message / edge.bandwidth + cost / edge.server_speed
