r"""The same task, other images: labels in a source domain, none in the target.

=============================  ==================================================  ===================================
name                           what it does                                        source
=============================  ==================================================  ===================================
``adabn``                      batch norm with the target's statistics             Li et al. 2016, arXiv:1603.04779
``coral_align``                source features with the target's covariance        Sun, Feng & Saenko 2015,
                                                                                   arXiv:1511.05547
``coral``                      like covariances, as an objective                   Sun & Saenko 2016, arXiv:1607.01719
``mmd_biased``,                distance of two samples in a space of kernels       Gretton et al. 2012, JMLR 13
``mmd_unbiased``
``dan``                        little of it, as an objective                       Long et al. 2015, arXiv:1502.02791
``dann``                       features by which no domain can be told             Ganin et al. 2015, arXiv:1505.07818
``tent``                       sure answers on the test images themselves          Wang et al. 2020, arXiv:2006.10726
``proxy_a_distance``           how well domains can be told apart                  Ben-David et al. 2006, NIPS 19
``adaptation_bound``           what limits the target error                        Ben-David et al. 2010, Machine
                                                                                   Learning 79
=============================  ==================================================  ===================================

An objective gets the target's images as ``target=Pool(data.train)``: as many as the batch has, drawn anew each time;
their labels are not looked at. Source and target go through the network one after the other, so in training batch norm
takes each domain's own statistics, and its running ones end as a mixture: ``adabn`` afterwards makes them the target's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Dataset, Split, batches
from course_lib.lab.models import thaw
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Objective, Recipe, cross_entropy
from course_lib.merging.averaging import refresh_batch_norm
from course_lib.merging.states import batch_norms, check_not_negative, check_positive, doubled, home
from course_lib.regularization.passes import unseen
from course_lib.schedules.by_layer import NORMS
from course_lib.transfer.parts import Pool, Wrapped, drawn_from, embedding, head_of, loss_and_embedding
from course_lib.transfer.tuning import features, probe

# --- Statistics -------------------------------------------------------------------------------------------------------


def adabn(model: nn.Module, split: Split, *, batch_size: int = 256) -> nn.Module:
    """Return a copy whose batch norm has the statistics of these images; no weight changes and no label is needed.

    Each layer's are the mean over batches; with ``batch_size=len(split)`` they are exact.

    Raises
    ------
    ValueError : the network has no batch norm, ``batch_size`` is below 1, or the split is empty.
    """
    require("model", type(model).__name__, lambda _: bool(batch_norms(model)), "a network with batch norm")
    return refresh_batch_norm(copy.deepcopy(model), split, batch_size=batch_size)


def covariance(x: Tensor) -> Tensor:
    """Return the covariance ``[D, D]`` of rows ``[N, D]``, with N - 1 below."""
    centred = x - x.mean(0)
    return centred.mT @ centred / (len(x) - 1)


def coral_loss(source: Tensor, target: Tensor) -> Tensor:
    r"""Return :math:`\tfrac1{4D^2}\|C_S-C_T\|_F^2` of features ``[N, D]`` and ``[M, D]``.

    Raises
    ------
    ValueError : they are no matrices of equal width and at least two rows.
    """
    _check_samples(source, target)
    return (covariance(source) - covariance(target)).square().sum() / (4 * source.shape[1] ** 2)


def coral_align(source: Tensor, target: Tensor, *, ridge: float = 1.0) -> Tensor:
    r"""Return source features with the target's covariance: :math:`X_S\,C_S^{-1/2}\,C_T^{1/2}`, ``[N, D]``.

    To both covariances ``ridge`` times the identity is added (1 in the paper), so that they can be inverted. The paper
    takes features that are standardised in each domain; means are left as they are. Computed in float64.

    Raises
    ------
    ValueError : as ``coral_loss``, or ``ridge`` is not above 0.
    """
    _check_samples(source, target)
    check_positive(ridge=ridge)
    x, other = doubled(source), doubled(target)
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    whiten = _power(covariance(x) + ridge * one, -0.5)
    return (x @ whiten @ _power(covariance(other) + ridge * one, 0.5)).to(source.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.pow(exponent) @ vectors.mT


def coral(
    model: nn.Module, x: Tensor, y: Tensor, *, target: Pool, strength: float = 1.0, objective: Objective = cross_entropy
) -> Tensor:
    """Return the objective and ``strength`` times the ``coral_loss`` between the batch's features and the target's.

    Features are what goes into the head.

    Raises
    ------
    ValueError : ``strength`` is negative, or the batch has one example.
    """
    check_not_negative(strength=strength)
    loss, source = loss_and_embedding(objective, model, x, y)
    return loss + strength * coral_loss(source, embedding(model, target.draw(len(y), x)[0]))


# --- Kernels ----------------------------------------------------------------------------------------------------------


def median_bandwidths(source: Tensor, target: Tensor, factors: Sequence[float] = (0.25, 0.5, 1, 2, 4)) -> list[float]:
    """Return the median distance between two different rows of both samples together, times each factor.

    Raises
    ------
    ValueError : as ``coral_loss``, or all rows are equal.
    """
    _check_samples(source, target)
    both = torch.cat([source, target]).detach()
    apart = torch.pdist(doubled(both))
    middle = apart[apart > 0].median().item() if (apart > 0).any() else 0.0
    require("source", middle, lambda m: m > 0, "features that are not all equal")
    return [middle * factor for factor in factors]


def gaussian_kernels(a: Tensor, b: Tensor, bandwidths: Sequence[float]) -> Tensor:
    r"""Return the mean over the bandwidths :math:`\sigma` of :math:`e^{-\|a_i-b_j\|^2/2\sigma^2}`: ``[N, M]``.

    Raises
    ------
    ValueError : there is no bandwidth, or one is not above 0.
    """
    require("bandwidths", list(bandwidths), bool, "at least one number above 0")
    for place, sigma in enumerate(bandwidths):
        check_positive(**{f"bandwidths[{place}]": sigma})
    # without a matrix product: |a|² - 2ab + |b|² loses the digits of small distances
    squares = (a[:, None] - b[None]).square().sum(2)
    return torch.stack([(-squares / (2 * sigma**2)).exp() for sigma in bandwidths]).mean(0)


def mmd_biased(source: Tensor, target: Tensor, bandwidths: Sequence[float]) -> Tensor:
    r"""Return :math:`\overline{k(s,s')}+\overline{k(t,t')}-2\,\overline{k(s,t)}`, means over all pairs: MMD squared.

    It is the squared distance of the samples' means in the kernels' space, so never negative, and above 0 on average
    for two samples of one distribution.

    Raises
    ------
    ValueError : as ``coral_loss`` and ``gaussian_kernels``.
    """
    _check_samples(source, target)
    ss, tt, st = _kernels(source, target, bandwidths)
    return ss.mean() + tt.mean() - 2 * st.mean()


def mmd_unbiased(source: Tensor, target: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Return the same without the pairs of an example with itself: 0 on average for one distribution, so also below 0.

    Raises
    ------
    ValueError : as ``mmd_biased``.
    """
    _check_samples(source, target)
    ss, tt, st = _kernels(source, target, bandwidths)
    n, m = len(ss), len(tt)
    return (ss.sum() - n) / (n * (n - 1)) + (tt.sum() - m) / (m * (m - 1)) - 2 * st.mean()  # k(s, s) = 1


def _kernels(source: Tensor, target: Tensor, bandwidths: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    pairs = ((source, source), (target, target), (source, target))
    ss, tt, st = (gaussian_kernels(a, b, bandwidths) for a, b in pairs)
    return ss, tt, st


def dan(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    target: Pool,
    strength: float = 1.0,
    bandwidths: Sequence[float] | None = None,
    objective: Objective = cross_entropy,
) -> Tensor:
    """Return the objective and ``strength`` times ``mmd_biased`` between the batch's features and the target's.

    Without ``bandwidths`` the batch's own ``median_bandwidths`` are taken, as constants. The paper learns the kernels'
    shares and sums over several layers; here all count alike, of what goes into the head.

    Raises
    ------
    ValueError : ``strength`` is negative, a bandwidth not above 0, or the batch has one example.
    """
    check_not_negative(strength=strength)
    loss, source = loss_and_embedding(objective, model, x, y)
    other = embedding(model, target.draw(len(y), x)[0])
    widths = median_bandwidths(source, other) if bandwidths is None else bandwidths
    return loss + strength * mmd_biased(source, other, widths)


def _check_samples(source: Tensor, target: Tensor) -> None:
    for name, x in (("source", source), ("target", target)):
        require(name, list(x.shape), lambda shape: len(shape) == 2 and shape[0] >= 2, "features [N, D], N > 1")
    width = source.shape[1]
    require("target", list(target.shape), lambda shape: shape[1] == width, f"of {width} columns, as source")


# --- An adversary -----------------------------------------------------------------------------------------------------


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.strength * gradients[0], None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """Return x itself; its gradient comes back times ``-strength``."""
    return _Reversal.apply(x, strength)


def reversal_strength(progress: float, gamma: float = 10.0) -> float:
    r"""Return :math:`\lambda_p=\tfrac2{1+e^{-\gamma p}}-1` for the share p of the run that is over: from 0 to nearly 1.

    At first the domain classifier knows nothing, and what it sends back is noise.
    """
    return 2 / (1 + math.exp(-gamma * progress)) - 1


class WithDomains(Wrapped):
    """A network and a classifier of domains on its features: D to ``width`` (ReLU) to one logit, the target's.

    ``progress``, the share of the run that is over, belongs to its state; it is 1, full strength, unless
    ``with_progress`` moves it.

    Raises
    ------
    ValueError : ``width`` is below 1.
    """

    progress: Tensor

    def __init__(self, network: nn.Module, width: int = 64, *, generator: torch.Generator) -> None:
        super().__init__(network)
        at_least(1, width=width)
        like, size = home(network), head_of(network).in_features
        with drawn_from(generator, like):
            self.domains = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, 1)).to(like.device)
        self.register_buffer("progress", torch.ones(()))
        self.train(network.training)

    def _apply(self, *arguments: Any, **named: Any) -> WithDomains:
        super()._apply(*arguments, **named)
        self.progress = self.progress.cpu()  # a number that is read at each step: on a GPU it would be waited for
        return self


def with_progress(recipe: Recipe, model: WithDomains, data: Dataset) -> Recipe:
    """Return the recipe, after each of whose steps the model knows how much of the run is over; it begins at 0."""
    total = sum(recipe.steps(len(data.train)))
    model.progress.zero_()

    def move(optimizer: Optimizer, step: int) -> None:
        model.progress.fill_(step / total)

    return after_each_step(recipe, move)


def dann(
    model: nn.Module, x: Tensor, y: Tensor, *, target: Pool, strength: float = 1.0, objective: Objective = cross_entropy
) -> Tensor:
    r"""Return the objective and the domain classifier's loss, whose gradient is reversed on its way into the features.

    The classifier learns to tell source from target (binary cross-entropy, the mean over both); the network, by
    :math:`-\mu\lambda_p` times that gradient, to make it impossible. :math:`\mu` is ``strength``, :math:`\lambda_p` the
    ``reversal_strength`` at the model's progress.

    Raises
    ------
    ValueError : the model is no network ``WithDomains``, or ``strength`` is negative.
    """
    check_not_negative(strength=strength)
    network = unseen(model)
    if not isinstance(network, WithDomains):
        raise ValueError(f"model={type(network).__name__}: must be a network WithDomains")
    loss, source = loss_and_embedding(objective, model, x, y)
    both = torch.cat([source, embedding(network, target.draw(len(y), x)[0])])
    back = strength * reversal_strength(float(network.progress))
    logits = network.domains(reverse_gradient(both, back))[:, 0]
    domain = torch.cat([torch.zeros_like(logits[: len(y)]), torch.ones_like(logits[len(y) :])])
    return loss + F.binary_cross_entropy_with_logits(logits, domain)


# --- Sure answers -----------------------------------------------------------------------------------------------------


def entropies(logits: Tensor) -> Tensor:
    r"""Return :math:`-\sum_kp_k\log p_k` of each example's probabilities: ``[N, K] -> [N]``."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1)


def entropy(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    """Return the mean entropy of the network's answers; labels are not looked at."""
    return entropies(model(x)).mean()


def norms_only(model: nn.Module) -> nn.Module:
    """Return a copy of which scale and shift of the norms train, and nothing else.

    Raises
    ------
    ValueError : no norm in the network has a scale and a shift.
    """
    made = thaw(copy.deepcopy(model)).requires_grad_(False)
    own = [p for part in made.modules() if isinstance(part, NORMS) for p in part.parameters(recurse=False)]
    require("model", type(model).__name__, lambda _: bool(own), "a network with norms that have scale and shift")
    for parameter in own:
        parameter.requires_grad_(True)
    return made


class Adapted(NamedTuple):
    """The ``network`` after the last batch, and the ``logits`` ``[N, K]`` that were given on the way."""

    network: nn.Module
    logits: Tensor


def tent(model: nn.Module, split: Split, *, lr: float = 1e-3, steps: int = 1, batch_size: int = 64) -> Adapted:
    """Adapt scale and shift of the norms to images without labels, batch by batch in their order, by less entropy.

    Each batch is answered, then Adam moves against the entropy of that answer, ``steps`` times a batch; the answers are
    those of the last of these passes, before its own step moves anything. Batch norm takes each batch's own statistics,
    also in the network that is returned: what it says of an image depends on the batch, and a batch must be large and
    of all classes.

    Raises
    ------
    ValueError : no norm in the network has scale and shift, ``lr`` is not above 0, ``steps`` or ``batch_size`` below 1.
    """
    check_positive(lr=lr)
    at_least(1, steps=steps, batch_size=batch_size)
    network, said = norms_only(model).train(), list[Tensor]()
    for part in network.modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats, part.running_mean, part.running_var = False, None, None
        elif isinstance(part, nn.modules.dropout._DropoutNd):
            part.eval()
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=lr)
    where = home(network)
    for x, _ in batches(split.to(where.device), batch_size, dtype=where.dtype):
        for _ in range(steps):
            logits = network(x)
            optimizer.zero_grad()
            entropies(logits).mean().backward()
            optimizer.step()
        said.append(logits.detach())
    network.requires_grad_(True).train(model.training)
    return Adapted(network, torch.cat(said))


# --- What limits it ---------------------------------------------------------------------------------------------------


def proxy_a_distance(source: Tensor, target: Tensor, *, generator: torch.Generator, C: float = 1.0) -> float:
    r"""Return :math:`2(1-2\epsilon)`, :math:`\epsilon` the held-out error of a ``probe`` that tells two samples apart.

    0 where it does no better than chance (by luck also a little below), 2 where it never errs. The larger sample is cut
    to the size of the smaller; a random half of each trains, the other is held out.

    Raises
    ------
    ValueError : as ``coral_loss``, the smaller sample has fewer than 4 rows, or ``C`` is not above 0.
    """
    _check_samples(source, target)
    size = min(len(source), len(target))
    require("source", size, lambda n: n >= 4, "at least 4 rows in each sample")
    parts = [x[torch.randperm(len(x), generator=generator)[:size].to(x.device)] for x in (source, target)]
    domain = torch.arange(2, device=source.device).repeat_interleave(size // 2)
    seen = torch.cat([x[: size // 2] for x in parts])
    held = torch.cat([x[size // 2 : 2 * (size // 2)] for x in parts])
    return 2 * (1 - 2 * (1 - probe(seen, domain, C=C).accuracy(held, domain)))


@dataclass(frozen=True)
class AdaptationBound:
    r"""The terms of :math:`\epsilon_T\le\epsilon_S+\tfrac12d+\lambda` (Ben-David et al. 2010), measured.

    Attributes
    ----------
    source_error : of the classifier, on held-out source examples.
    distance : between the domains: the proxy of the divergence, ``proxy_a_distance``.
    joint_error : :math:`\lambda`, the sum of both errors of one classifier that is trained on both domains' labels.
    target_error : what is bounded.
    """

    source_error: float
    distance: float
    joint_error: float
    target_error: float

    @property
    def bound(self) -> float:
        """Source error, half the distance and joint error."""
        return self.source_error + self.distance / 2 + self.joint_error


def adaptation_bound(
    model: nn.Module, source: Dataset, target: Dataset, *, generator: torch.Generator, C: float = 1.0
) -> AdaptationBound:
    r"""Return the terms of the bound for a ``probe`` on the network's features, trained on the source's labels.

    Trained on training splits and measured on test splits. The target's labels serve :math:`\lambda` and the target
    error alone. The theorem's divergence is of pairs of classifiers and of the best of them, and its sample terms are
    left out here: the sum can lie below the target error.

    Raises
    ------
    ValueError : as ``proxy_a_distance``.
    """
    seen, other = (features(model, data.train) for data in (source, target))
    held, other_held = (features(model, data.test) for data in (source, target))
    labels, other_labels = source.train.labels.to(seen.device), target.train.labels.to(seen.device)
    first = probe(seen, labels, C=C)
    joint = probe(torch.cat([seen, other]), torch.cat([labels, other_labels]), C=C)
    errors = [
        1 - each.accuracy(x, split.labels)
        for each in (first, joint)
        for x, split in ((held, source.test), (other_held, target.test))
    ]
    distance = proxy_a_distance(seen, other, generator=generator, C=C)
    return AdaptationBound(errors[0], distance, errors[2] + errors[3], errors[1])
