r"""A small network first, and the next only where it is not sure.

===========================  ==============================================  ===========================================
name                         what it does                                    source
===========================  ==============================================  ===========================================
``Cascade``                  asks one network after the other                Wang et al. 2020, arXiv:2012.01988
``cascaded``                 the same on logits that are there already
``max_probability``, …       how sure one answer is
``agreement``                how many members name the same class
``threshold_for_accuracy``   two networks: the cheapest that is good enough
``thresholds_for_accuracy``  several: by trying a grid of them
``expected_flops``           what an example costs on average
``exit_logits``, …           the exits of one network as a cascade           Teerapittayanon et al. 2016,
                                                                             arXiv:1709.01686
===========================  ==============================================  ===========================================

The exits are chapter 9's ``WithExits``, trained there by ``self_distillation``: a cascade whose networks share their
first layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from course_lib.distillation.passing_on import WithExits
from course_lib.fusion.answers import check_labels, check_logits
from course_lib.fusion.voting import Fuse, mean_probability
from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.costs import flops
from course_lib.lab.data import Split
from course_lib.lab.training import logits_of

Confidence = Callable[[Tensor], Tensor]
"""Logits or log-probabilities ``[N, K]`` -> how sure they are ``[N]``, the larger the surer."""

# --- How sure ---------------------------------------------------------------------------------------------------------


def max_probability(logits: Tensor) -> Tensor:
    """Return the probability of the class that is named, ``[N, K]`` to ``[N]``."""
    return logits.softmax(1).amax(1)


def margin(logits: Tensor) -> Tensor:
    """Return the probability of the first class less that of the second, ``[N, K]`` to ``[N]``."""
    best = logits.softmax(1).topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def negative_entropy(logits: Tensor) -> Tensor:
    r"""Return :math:`\sum_kq_k\log q_k` in nats, ``[N, K]`` to ``[N]``: from :math:`-\log K` to 0."""
    log_q = logits.log_softmax(1)
    return (log_q.exp() * log_q).nan_to_num().sum(1)


def agreement(logits: Tensor) -> Tensor:
    """Return the share of members that name the class which most of them name, ``[M, N, K]`` to ``[N]``."""
    check_logits(logits)
    named = logits.argmax(2)
    return (named == named.mode(0).values).to(logits.dtype).mean(0)


# --- One after the other ----------------------------------------------------------------------------------------------


def last(logits: Tensor) -> Tensor:
    """Return what the member asked last says, ``[M, N, K]`` to ``[N, K]``: the usual cascade."""
    return logits[-1].log_softmax(1)


class Answered(NamedTuple):
    """``log_q`` ``[N, K]``, and how many networks were ``asked``, int64 ``[N]``."""

    log_q: Tensor
    asked: Tensor


def cascaded(
    logits: Tensor,
    thresholds: Sequence[float],
    *,
    confidence: Confidence = max_probability,
    combine: Fuse = mean_probability,
) -> Answered:
    """Return what a cascade would say whose members have these logits ``[M, N, K]``.

    An example stops at the first member at which ``combine`` of all asked so far is as sure as the threshold of that
    member; at the last it always does. ``combine=last`` hears the last one alone.

    Raises
    ------
    ValueError : logits are not ``[M, N, K]``, or the thresholds are not M - 1 numbers.
    """
    check_logits(logits)
    _check_thresholds(thresholds, len(logits))
    asked = torch.full(logits.shape[1:2], len(logits), device=logits.device)
    found = combine(logits).log_softmax(1)
    for count in range(len(logits) - 1, 0, -1):  # from the last to the first, so that an earlier stop overwrites
        early = combine(logits[:count]).log_softmax(1)
        sure = confidence(early) >= thresholds[count - 1]
        found = torch.where(sure[:, None], early, found)
        asked = torch.where(sure, count, asked)
    return Answered(found, asked)


class Cascade(nn.Module):
    """Networks that are asked in turn, each about those examples alone of which the ones before are not sure.

    Called like a network, it gives log-probabilities ``[N, K]``; ``answer(x)`` says also how many were asked.

    Raises
    ------
    ValueError : there are no networks, or the thresholds are not one number for each but the last.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        thresholds: Sequence[float],
        *,
        confidence: Confidence = max_probability,
        combine: Fuse = mean_probability,
    ) -> None:
        super().__init__()
        require("networks", [*networks], bool, "at least one network")
        _check_thresholds(thresholds, len(networks))
        self.networks, self.thresholds = nn.ModuleList(networks), (*map(float, thresholds), -torch.inf)
        self.confidence, self.combine = confidence, combine
        self.train(self.networks[0].training)

    def answer(self, x: Any) -> Answered:
        """``[N, …]`` to log-probabilities and numbers of networks asked; each network computes what it has to alone."""
        heard: list[Tensor] = []  # of the examples still open, one tensor a network
        places, found, asked = None, None, None
        for count, (network, threshold) in enumerate(zip(self.networks, self.thresholds, strict=True), start=1):
            heard.append(network(x))
            said = self.combine(torch.stack(heard)).log_softmax(1)
            sure = self.confidence(said) >= threshold
            if places is None or found is None or asked is None:
                places = torch.arange(len(said), device=said.device)
                found, asked = said.clone(), torch.ones_like(places)
            found[places] = said
            asked[places] = count
            if sure.all():
                break
            places, heard = places[~sure], [each[~sure] for each in heard]
            x = tuple(part[~sure] for part in x) if isinstance(x, tuple) else x[~sure]
        assert found is not None
        assert asked is not None
        return Answered(found, asked)

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to log-probabilities ``[N, K]``."""
        return self.answer(x).log_q


# --- Thresholds -------------------------------------------------------------------------------------------------------


def threshold_for_accuracy(
    first: Tensor, second: Tensor, labels: Tensor, accuracy: float, *, confidence: Confidence = max_probability
) -> float:
    """Return the lowest threshold of a cascade of two that is as accurate as asked on these (validation) examples.

    So the fewest examples go on. ``first`` are the logits ``[N, K]`` of the small network, ``second`` those of what
    answers where it is not sure (``mean_probability`` of both, say). All thresholds that make a difference are tried;
    the accuracy need not rise with them. One chosen on few examples will do a little worse on others.

    Raises
    ------
    ValueError : the shapes do not fit, ``accuracy`` is not from 0 to 1, or no threshold reaches it.
    """
    check_logits(torch.stack([first, second]) if first.shape == second.shape else first)
    check_labels(labels, len(first), first.shape[1])
    require("accuracy", accuracy, lambda a: is_number(a) and 0 <= a <= 1, "a number from 0 to 1")
    said = mean_probability(first[None]).log_softmax(1)  # as `cascaded` hears it, to the last bit
    sure, order = confidence(said).detach().double().sort(stable=True)  # the least sure go on first
    gain = (second.argmax(1) == labels).long() - (first.argmax(1) == labels).long()
    at_first = int((first.argmax(1) == labels).sum())
    right = at_first + torch.cat([gain.new_zeros(1), gain[order].cumsum(0)])  # when so many of the least sure go on
    passed = [n for n in range(len(sure) + 1) if n in (0, len(sure)) or sure[n] > sure[n - 1]]  # equals go together
    reached = [n for n in passed if int(right[n]) >= accuracy * len(labels) - 1e-9]
    if not reached:
        best = max(int(right[n]) for n in passed) / len(labels)
        raise ValueError(f"accuracy={accuracy!r}: must be at most {best:g}, the best of any threshold here")
    return float(sure[reached[0]]) if reached[0] < len(sure) else torch.inf


class Chosen(NamedTuple):
    """The ``thresholds``, with the ``accuracy`` and mean ``flops`` an example that they have where they were chosen."""

    thresholds: tuple[float, ...]
    accuracy: float
    flops: float


def thresholds_for_accuracy(
    logits: Tensor,
    labels: Tensor,
    costs: Sequence[float],
    accuracy: float,
    *,
    levels: int = 20,
    confidence: Confidence = max_probability,
    combine: Fuse = mean_probability,
) -> Chosen:
    """Return the thresholds of the cheapest cascade on a grid that is as accurate as asked; the best one, if none is.

    The grid has ``levels`` of each member's confidences, equally many examples apart, and infinity: (levels + 1) to
    the power of M - 1 cascades are tried.

    Raises
    ------
    ValueError : logits, labels and costs (one a member) do not fit, or ``levels`` is below 1.
    """
    check_logits(logits)
    check_labels(labels, logits.shape[1], logits.shape[2])
    at_least(1, levels=levels)
    grids = []
    for count in range(1, len(logits)):
        sure = confidence(combine(logits[:count]).log_softmax(1)).detach().double().sort().values
        rows = torch.linspace(0, len(sure) - 1, levels).round().long().unique()
        grids.append([*sure[rows.to(sure.device)].tolist(), torch.inf])
    found = []
    for thresholds in itertools.product(*grids):
        log_q, asked = cascaded(logits, thresholds, confidence=confidence, combine=combine)
        right = (log_q.argmax(1) == labels).double().mean().item()
        found.append(Chosen(thresholds, right, expected_flops(asked, costs)))
    enough = [each for each in found if each.accuracy >= accuracy - 1e-12]
    return min(enough, key=lambda c: c.flops) if enough else max(found, key=lambda c: (c.accuracy, -c.flops))


# --- Costs ------------------------------------------------------------------------------------------------------------


def expected_flops(asked: Tensor, costs: Sequence[float]) -> float:
    """Return the mean cost of an example: those of all networks asked, int64 ``[N]``; ``costs`` is one number each.

    ``[lab.costs.flops(network, x[:1]) for network in networks]`` are such costs.

    Raises
    ------
    ValueError : more are asked than have a cost.
    """
    total = torch.tensor([*map(float, costs)], dtype=torch.float64).cumsum(0)
    if not len(asked) or not 1 <= int(asked.min()) <= int(asked.max()) <= len(total):
        raise ValueError(f"asked={asked.tolist()[:5]}…: must be numbers from 1 to {len(total)}, that of the costs")
    return total[asked.cpu() - 1].mean().item()


def _check_thresholds(thresholds: Sequence[float], count: int) -> None:
    fits = len(thresholds) == count - 1 and all(isinstance(t, int | float) and t == t for t in thresholds)
    require("thresholds", tuple(thresholds), lambda _: fits, f"{count - 1} numbers, one for each network but the last")


# --- Exits of one network ---------------------------------------------------------------------------------------------


class _Exits(nn.Module):
    """All exits side by side, ``[N, E K]``, so that ``logits_of`` can collect them."""

    def __init__(self, model: WithExits) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, x: Any) -> Tensor:
        return torch.cat(self.model.exits(x)[0], dim=1)


def exit_logits(model: WithExits, split: Split) -> Tensor:
    """Return the logits ``[E, N, K]`` of each exit and at last of the network itself, for ``cascaded``."""
    return torch.stack(logits_of(_Exits(model), split).chunk(len(model.at) + 1, dim=1))


class _Reached(Exception):
    """The exit has been reached: the layers behind it need not run."""


class _Until(nn.Module):
    """The network up to a layer, by leaving it there."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, *x: Any) -> None:
        def leave(*_: Any) -> None:
            raise _Reached

        handle = self.network.get_submodule(self.name).register_forward_hook(leave)
        try:
            self.network(*x)
        except _Reached:
            pass
        finally:
            handle.remove()


def exit_flops(model: WithExits, example_input: Any) -> list[float]:
    """Return what each exit, and at last the network's own head, adds to the flops of those before it.

    The products in layers up to it, its adapter and its classifier, for ``expected_flops``; ``example_input`` is one
    example as the network sees it, ``[1, …]``.
    """
    upto = [flops(_Until(model.model, name), example_input) for name in model.at]
    heads = [
        2 * sum(p.numel() for part in pair for p in part.parameters() if p.ndim == 2)
        for pair in zip(model.adapters, model.heads, strict=True)
    ]
    reached = [*upto, flops(model.model, example_input)]
    before = [0, *upto]
    return [float(b - a + h) for a, b, h in zip(before, reached, [*heads, 0], strict=True)]
