r"""What a client's activations and their gradients give away, and defences.

=========================  =================================================  =========================================
name                       what it does                                       source
=========================  =================================================  =========================================
``invert``,                decoders that turn activations back into images    He, Zhang & Lee 2019, ACSAC
``trained_inverse``
``leak``                   the share of the pixels' variance that they find   –
``labels_from_gradients``  the labels, from the signs of gradients            Zhao, Mopuri & Bilen 2020,
                                                                              arXiv:2001.02610
``norm_attack``            the rare label, from the size of gradients         Li et al. 2021, arXiv:2102.08504
``noisy``                  activations of limited size with noise on them     –
``distance_correlation``   how much two things depend on each other           Székely, Rizzo & Bakirov 2007,
                                                                              Annals of Statistics 35(6)
``nopeek``                 an objective that keeps it small between images    Vepakomma et al. 2020,
                           and activations                                    arXiv:2008.09161
=========================  =================================================  =========================================

What ``leak`` finds is a lower bound: with more public images, or a better decoder, one finds more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset, Split, batches
from course_lib.lab.models import freeze
from course_lib.lab.training import Objective, Recipe, cross_entropy, fit, fresh
from course_lib.partitioning.split_learning import (
    SplitNetwork,
    _evaluating,
)

# --- What the activations give away -----------------------------------------------------------------------------------


class Inverter(nn.Module):
    """A client whose answers are turned back into images: ``decoder(client(x))``, as rows ``[N, C * H * W]``."""

    def __init__(self, client: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.client, self.decoder = client, decoder

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to what is found of them, ``[N, C * H * W]``."""
        return self.decoder(self.client(x).flatten(1))


def as_seen(public: Dataset, private: Dataset) -> Dataset:
    """Return the public images, normalised as the client normalises its own."""
    mean, std = private.train.mean, private.train.std
    splits = {name: replace(getattr(public, name), mean=mean, std=std) for name in ("train", "val", "test")}
    return replace(public, **splits)


STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)


def invert(
    client: nn.Module,
    public: Dataset,
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Inverter:
    """Return the linear decoder of a client's activations that is best on public images, in closed form.

    The attacker can ask the client, or has its weights; it knows images of the same kind, but not the private ones.
    The ``strengths`` of ridge regression are tried on the public validation images.

    Raises
    ------
    ValueError : there are no ``strengths``, or one is no number above 0.
    """
    require("strengths", strengths, bool, "at least one number above 0")
    for strength in strengths:
        _check_positive(strengths=strength)
    z, x = _pairs(client, public.train)
    decoders = ridge_regressions(z, x, strengths)
    found = [Inverter(client, decoder) for decoder in decoders]
    return max(found, key=lambda inverter: leak(inverter, public.val))


def ridge_regressions(
    z: Tensor,
    x: Tensor,
    strengths: Sequence[float],
) -> list[nn.Linear]:
    r"""Return the linear maps from ``z [N, D]`` to ``x [N, P]`` of least squares with weight decay, one a strength.

    .. math:: W = \arg\min_W\ \tfrac1N\lVert X - ZW\rVert^2 + \lambda\lVert W\rVert^2
        = (Z^\top Z + \lambda N I)^{-1} Z^\top X = Z^\top (ZZ^\top + \lambda N I)^{-1} X

    for X centred and Z centred and scaled to variance 1 column by column, which the maps then undo. Whichever of the
    two matrices is the smaller is solved. Source: Hoerl & Kennard 1970, Technometrics 12(1).
    """
    centre, middle = z.mean(0), x.mean(0)
    scale = z.std(0, correction=0)
    # what never changes says nothing
    scale = torch.where(scale > 1e-9 * scale.max(), scale, torch.inf)
    standard, target = (z - centre) / scale, x - middle
    wide = z.shape[1] > len(z)
    gram = standard @ standard.T if wide else standard.T @ standard
    against = target if wide else standard.T @ target
    maps = []
    for strength in strengths:
        ridge = strength * len(z) * torch.eye(len(gram), dtype=z.dtype, device=z.device)
        solved = torch.linalg.solve(gram + ridge, against)
        weight = (standard.T @ solved if wide else solved) / scale[:, None]
        maps.append(_linear(weight, middle - centre @ weight))
    return maps


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """The layer ``z @ weight + bias``, which does not train."""
    layer = nn.utils.skip_init(nn.Linear, *weight.shape, dtype=weight.dtype, device=weight.device)
    layer.weight.data, layer.bias.data = weight.T.contiguous(), bias
    return layer.requires_grad_(False)


def trained_inverse(client: nn.Module, public: Dataset, recipe: Recipe, *, seed: int, width: int = 256) -> Inverter:
    """Return a decoder with one hidden layer of ``width`` units, trained by the recipe on public images.

    The recipe's objective gives way to ``reconstruction``. The client itself is left alone: a frozen copy is asked.

    Raises
    ------
    ValueError : ``width`` is below 1.
    """
    at_least(1, width=width)
    z, x = _pairs(client, public.train.subset(torch.arange(1)))
    make = partial(_decoder, z.shape[1], width, x.shape[1])
    inverter = Inverter(freeze(copy.deepcopy(client)), fresh(make, recipe, seed=seed))
    fit(inverter, public, replace(recipe, objective=reconstruction), seed=seed)
    return inverter


def _decoder(numbers: int, width: int, pixels: int) -> nn.Module:
    # the standardisation matters more than the width: few of the units that come over are of like size
    norm = nn.BatchNorm1d(numbers, affine=False)
    return nn.Sequential(norm, nn.Linear(numbers, width), nn.ReLU(), nn.Linear(width, pixels))


def reconstruction(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean squared error of an ``Inverter``'s pixels; an objective that does not look at the labels."""
    return F.mse_loss(model(x), x.flatten(1))


def leak(inverter: Inverter, split: Split) -> float:
    r"""Return the share of the pixels' variance that a decoder finds: :math:`1-\sum(x-\hat x)^2/\sum(x-\bar x)^2`.

    1 is every pixel of every image; 0 is no more than the mean image :math:`\bar x` of this split, which says nothing
    of any one of them, and below 0 is worse.
    """
    with _evaluating(inverter):
        z, x = _pairs(inverter.client, split)
        with torch.no_grad():
            found = inverter.decoder(z)
    return 1 - ((x - found).square().sum() / (x - x.mean(0)).square().sum()).item()


@torch.no_grad()
def _pairs(client: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """A client's activations ``[N, D]`` and its images ``[N, C * H * W]``, both as rows."""
    like = next(client.parameters(), torch.empty(0, dtype=torch.float64))
    pairs = batches(split.to(like.device), 1024, dtype=like.dtype)
    with _evaluating(client):
        rows = [(client(x).flatten(1), x.flatten(1)) for x, _ in pairs]
    z, x = zip(*rows, strict=True)
    return torch.cat(z), torch.cat(x)


# --- What the gradients give away -------------------------------------------------------------------------------------


def labels_from_gradients(gradients: Tensor) -> Tensor:
    r"""Return the labels of a batch from its gradients at the logits, ``[N, K]`` to ``[N]``.

    The gradient of the cross-entropy is :math:`p_k - [k = y]` (over N): of all entries only that of the label is
    negative. It holds wherever the last thing that the other party computes is the softmax. Source: Zhao, Mopuri &
    Bilen 2020 (iDLG), arXiv:2001.02610.

    Raises
    ------
    ValueError : gradients are no matrix.
    """
    require("gradients.ndim", gradients.ndim, lambda ndim: ndim == 2, "2: one row an example, one column a class")
    return gradients.argmin(1)


def norm_attack(gradients: Tensor) -> Tensor:
    """Return the norm of each example's gradient at the cut, ``[N, …]`` to ``[N]``: the larger, the rarer its label.

    A network learns first that one of two classes is rare, and is then sure, and wrong, about all that belong to it:
    their gradients are large. Source: Li et al. 2021, arXiv:2102.08504.
    """
    return gradients.flatten(1).norm(dim=1)


def leak_auc(scores: Tensor, labels: Tensor) -> float:
    """Return the chance that an example of class 1 scores higher than one of class 0; ties count half.

    1/2 gives nothing away. The area under the ROC curve, by which Li et al. 2021 measure an attack on labels.

    Raises
    ------
    ValueError : labels are not 0 and 1, with some of each.
    """
    found = sorted(labels.unique().tolist())
    require("labels", found, lambda seen: seen == [0, 1], "0 and 1, with some of each")
    of_ones, of_zeros = scores[labels == 1], scores[labels == 0]
    apart = of_ones[:, None] - of_zeros[None]
    return ((apart > 0).double() + (apart == 0).double() / 2).mean().item()


# --- Defences ---------------------------------------------------------------------------------------------------------


class Noise(nn.Module):
    """See ``noisy``. It draws from torch's global generator, in evaluation too."""

    def __init__(self, sigma: float, clip: float | None) -> None:
        super().__init__()
        self.sigma, self.clip = sigma, clip

    def forward(self, z: Tensor) -> Tensor:
        """Activations ``[N, …]`` to noisy ones of the same shape."""
        z = z if self.clip is None else clipped(z, self.clip)
        return z + self.sigma * torch.randn_like(z)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, clip={self.clip}"


def clipped(z: Tensor, clip: float) -> Tensor:
    r"""Shrink each example of ``[N, …]`` whose root mean square is above ``clip`` c: :math:`z\min(1, c/\text{rms})`."""
    size = z.flatten(1).square().mean(1).sqrt()
    shrink = (clip / size.clamp_min(torch.finfo(z.dtype).tiny)).clamp_max(1)
    return z * shrink.view(-1, *[1] * (z.ndim - 1))


def noisy(
    client: nn.Module,
    sigma: float,
    *,
    clip: float | None = 1.0,
) -> nn.Sequential:
    r"""Return the client with normal noise of standard deviation ``sigma`` on each number that it sends.

    Without ``clip`` training would undo it: larger activations drown the same noise. With it the root mean square of
    an example's activations is at most c, so :math:`c/\sigma` bounds the signal-to-noise ratio.

    Raises
    ------
    ValueError : ``sigma`` is no number of at least 0, or ``clip`` none above 0.
    """
    _check_not_negative(sigma=sigma)
    if clip is not None:
        _check_positive(clip=clip)
    return nn.Sequential(client, Noise(sigma, clip))


def distance_correlation(x: Tensor, z: Tensor) -> Tensor:
    r"""Return the distance correlation of paired samples ``[N, …]``, from 0 (as if independent) to 1.

    .. math:: \text{dCor}^2 = \frac{\sum_{ij} A_{ij}B_{ij}}{\sqrt{\sum_{ij} A_{ij}^2\ \sum_{ij} B_{ij}^2}}, \qquad
        A_{ij} = a_{ij} - \bar a_{i\cdot} - \bar a_{\cdot j} + \bar a_{\cdot\cdot}

    with the distances :math:`a_{ij} = \lVert x_i - x_j\rVert`, and B likewise of z; 0 where either is constant. Of the
    whole distribution it is 0 only if the two are independent; few samples of many dimensions look dependent always.
    Source: Székely, Rizzo & Bakirov 2007, Annals of Statistics 35(6).

    Raises
    ------
    ValueError : x and z differ in length, or have fewer than two examples.
    """
    allowed = f"that of x, {len(x)}, and at least 2"
    require("len(z)", len(z), lambda count: count == len(x) >= 2, allowed)
    a, b = centred_distances(x), centred_distances(z)
    together, spread = (a * b).sum(), ((a * a).sum() * (b * b).sum()).sqrt()
    # Rounding may bring the sum of products below 0, where a root has no slope.
    tiny = torch.finfo(a.dtype).eps
    return (together / spread.clamp_min(tiny)).clamp_min(tiny).sqrt()


def centred_distances(x: Tensor) -> Tensor:
    """Distances between all pairs of ``[N, …]``, less the means of rows and columns, plus that of all: ``[N, N]``."""
    rows = x.flatten(1)
    far = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return far - far.mean(0, keepdim=True) - far.mean(1, keepdim=True) + far.mean()


def nopeek(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    strength: float = 1.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    """Return the objective and ``strength`` times the distance correlation of a batch's images and activations.

    The objective sees the server as the network and the activations as its input, so nothing is computed twice. A batch
    of one example has no penalty. Source: Vepakomma et al. 2020 (NoPeek), arXiv:2008.09161.

    Raises
    ------
    ValueError : the model is no ``SplitNetwork``, or ``strength`` no number of at least 0.
    """
    _check_not_negative(strength=strength)
    if not isinstance(model, SplitNetwork):
        raise ValueError(f"model={type(model).__name__}: must be a SplitNetwork")
    z = model.client(x)
    loss = objective(model.server, z, y)
    return loss if len(y) < 2 else loss + strength * distance_correlation(x, z)


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        require(name, value, lambda v: is_number(v) and v > 0, "a number above 0")


def _check_not_negative(**arguments: float) -> None:
    for name, value in arguments.items():
        require(name, value, lambda v: is_number(v) and v >= 0, "a number of at least 0")
