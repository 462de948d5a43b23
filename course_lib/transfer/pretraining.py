r"""Training without labels: tasks that images set for themselves.

=========================  ===============================================  ==========================================
name                       what the network learns                          source
=========================  ===============================================  ==========================================
``rotation``               by how much an image was turned                  Gidaris, Singh & Komodakis 2018,
                                                                            arXiv:1803.07728
``simclr``                 which two of many views are of one image         Chen et al. 2020, arXiv:2002.05709
``byol``                   what its own average says of another view        Grill et al. 2020, arXiv:2006.07733
``masked_patches``         what stands in the patches that it cannot see    He et al. 2021, arXiv:2111.06377
=========================  ===============================================  ==========================================

Each is an objective for a network with further layers around it: ``fit(WithRotations(network, generator=…), data,
Recipe(objective=rotation), seed=0)`` trains the network itself, and ``bare(model)`` is the network afterwards. Labels
are never looked at. The network's own head gets no gradient: ``val_accuracy`` of such a run is that of a random head;
give the recipe ``watch={"task": lambda model, data: evaluate(model, data.val, objective=rotation).loss}``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.models import EncoderBlock, ViT
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Recipe
from course_lib.merging.averaging import ema_update
from course_lib.merging.states import check_positive, home
from course_lib.transfer.parts import Wrapped, drawn_from, embedding, head_of, own_generator

View = Callable[[Tensor, torch.Generator], Tensor]
"""``(x, generator) -> x``, as ``Recipe.augment``: another view of each image of a batch."""


def _carries(model: nn.Module, kind: type[Wrapped]) -> Any:
    if not isinstance(model, kind):
        raise ValueError(f"model={type(model).__name__}: must be a network {kind.__name__}")
    return model


def _perceptron(inputs: int, width: int, outputs: int, norm: bool = False) -> nn.Sequential:
    middle = [nn.BatchNorm1d(width)] if norm else []
    return nn.Sequential(nn.Linear(inputs, width), *middle, nn.ReLU(), nn.Linear(width, outputs))


# --- Rotations --------------------------------------------------------------------------------------------------------


class WithRotations(Wrapped):
    """A network and a linear layer that tells from its features by which of four quarter turns an image was turned."""

    def __init__(self, network: nn.Module, *, generator: torch.Generator) -> None:
        super().__init__(network)
        like = home(network)
        with drawn_from(generator, like):
            self.turn = nn.Linear(head_of(network).in_features, 4).to(like.device)
        self.train(network.training)


def rotations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return images ``[N, C, H, H]`` turned by 0, 1, 2 and 3 quarters, ``[4 N, C, H, H]``, and by how many ``[4 N]``.

    Raises
    ------
    ValueError : the images are not square.
    """
    require("x", list(x.shape), lambda s: len(s) == 4 and s[2] == s[3], "square images [N, C, H, H]")
    turned = torch.cat([x.rot90(quarters, (2, 3)) for quarters in range(4)])
    return turned, torch.arange(4, device=x.device).repeat_interleave(len(x))


def rotation(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of telling the four ``rotations`` of each image.

    Raises
    ------
    ValueError : the model is no network ``WithRotations``, or the images are not square.
    """
    network = _carries(model, WithRotations)
    turned, quarters = rotations(x)
    return F.cross_entropy(network.turn(embedding(network, turned)), quarters)


# --- Two views --------------------------------------------------------------------------------------------------------


class WithProjection(Wrapped):
    """A network and a perceptron from its features, D to D (ReLU) to ``width``: the space of the contrast.

    Raises
    ------
    ValueError : ``width`` is below 1.
    """

    def __init__(self, network: nn.Module, width: int = 32, *, generator: torch.Generator) -> None:
        super().__init__(network)
        at_least(1, width=width)
        like, size = home(network), head_of(network).in_features
        with drawn_from(generator, like):
            self.projection = _perceptron(size, size, width).to(like.device)
        self.train(network.training)


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    r"""Return the mean over all 2N views i, j being the other view of the same image, of

    .. math:: -\log\frac{e^{\cos(z_i,z_j)/\tau}}{\sum_{k\ne i}e^{\cos(z_i,z_k)/\tau}}

    for two views ``[N, D]`` of each image, row by row; :math:`\tau` is ``temperature``.

    Raises
    ------
    ValueError : they are not of one shape ``[N, D]``, N > 1, or ``temperature`` is not above 0.
    """
    check_positive(temperature=temperature)
    require("a", list(a.shape), lambda s: len(s) == 2 and s[0] > 1 and a.shape == b.shape, "[N, D] like b, N > 1")
    z = F.normalize(torch.cat([a, b]), dim=1)
    alike = (z @ z.mT / temperature).fill_diagonal_(-torch.inf)
    other = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(alike, other)


def simclr(model: nn.Module, x: Tensor, y: Tensor, *, view: View, temperature: float = 0.5) -> Tensor:
    """Return the ``nt_xent`` of the projections of two views of each image.

    ``view`` draws them (an augmentation, as ``Recipe.augment`` takes it, which is not needed besides).

    Raises
    ------
    ValueError : the model is no network ``WithProjection``, ``temperature`` is not above 0, or the batch has one image.
    """
    network, generator = _carries(model, WithProjection), own_generator()
    # one pass for both, so that batch norm cannot tell the views apart
    views = torch.cat([view(x, generator), view(x, generator)])
    a, b = network.projection(embedding(network, views)).chunk(2)
    return nt_xent(a, b, temperature)


class WithTarget(Wrapped):
    """A network with projection and prediction, and the moving average of network and projection: its target.

    Both perceptrons have a hidden layer of ``hidden`` units with batch norm, as in the paper. The average moves when
    ``follow`` is called: ``following_target(recipe, model)`` does so after each step.

    Raises
    ------
    ValueError : ``width`` or ``hidden`` is below 1, or ``decay`` is no number from 0 to below 1.
    """

    def __init__(
        self,
        network: nn.Module,
        width: int = 32,
        hidden: int = 128,
        *,
        decay: float = 0.99,
        generator: torch.Generator,
    ) -> None:
        super().__init__(network)
        at_least(1, width=width, hidden=hidden)
        require("decay", decay, lambda d: is_number(d) and 0 <= d < 1, "a number from 0 to below 1")
        like, size, self.decay = home(network), head_of(network).in_features, decay
        with drawn_from(generator, like):
            self.projection = _perceptron(size, hidden, width, norm=True).to(like.device)
            self.prediction = _perceptron(width, hidden, width, norm=True).to(like.device)
        self.target_network = copy.deepcopy(network).requires_grad_(False)
        self.target_projection = copy.deepcopy(self.projection).requires_grad_(False)
        self.train(network.training)

    def online(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to predictions ``[N, width]`` of what the target says of another view."""
        return self.prediction(self.projection(embedding(self.network, x)))

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to the target's projections ``[N, width]``, without gradients."""
        return self.target_projection(embedding(self.target_network, x))

    def follow(self) -> None:
        """Move the target towards network and projection."""
        pairs = ((self.target_network, self.network), (self.target_projection, self.projection))
        for mine, theirs in pairs:
            ema_update([*mine.parameters()], [*theirs.parameters()], self.decay)


def following_target(recipe: Recipe, model: WithTarget) -> Recipe:
    """Return the recipe, after each of whose steps the model's target follows."""

    def follow(optimizer: Optimizer, step: int) -> None:
        model.follow()

    return after_each_step(recipe, follow)


def byol(model: nn.Module, x: Tensor, y: Tensor, *, view: View) -> Tensor:
    r"""Return the mean of :math:`2-2\cos(q_1,t_2)` and the same with the views exchanged, added up.

    q is what the network predicts from one ``view``, t what the target says of the other. There are no other images to
    be told from: that not all become equal is owed to the prediction and to the target's being an average.

    Raises
    ------
    ValueError : the model is no network ``WithTarget``.
    """
    network, generator = _carries(model, WithTarget), own_generator()
    one, two = view(x, generator), view(x, generator)
    pairs = ((network.online(one), network.target(two)), (network.online(two), network.target(one)))
    return sum(((2 - 2 * F.cosine_similarity(q, t)).mean() for q, t in pairs), x.new_zeros(()))


# --- Masks ------------------------------------------------------------------------------------------------------------


def patches(x: Tensor, size: int) -> Tensor:
    """Cut images ``[N, C, H, W]`` into squares, row by row: ``[N, tokens, C · size · size]``.

    Raises
    ------
    ValueError : ``size`` does not divide height and width.
    """
    at_least(1, size=size)
    require("size", size, lambda n: x.shape[2] % n == 0 == x.shape[3] % n, f"a divisor of {list(x.shape[2:])}")
    return F.unfold(x, size, stride=size).mT


class MaskedAutoencoder(Wrapped):
    """A ``vit`` and a small decoder that paints the patches which the ``vit`` was not shown.

    The network sees a random ``1 - share`` of an image's patches, at their positions. The decoder (``depth`` encoder
    blocks of ``width``) sees its tokens where they stood, and one learned token everywhere else.

    Raises
    ------
    ValueError : the network is no ``vit``, ``share`` hides none or all patches, ``depth`` is below 0, ``width`` no
        multiple of ``heads``.
    """

    def __init__(
        self,
        network: nn.Module,
        width: int = 32,
        depth: int = 1,
        heads: int = 4,
        *,
        share: float = 0.75,
        generator: torch.Generator,
    ) -> None:
        super().__init__(network)
        if not isinstance(network, ViT):
            raise ValueError(f"network={type(network).__name__}: must be a vit")
        at_least(1, width=width, heads=heads)
        at_least(0, depth=depth)
        require("width", width, lambda w: w % heads == 0, f"a multiple of heads, {heads}")
        tokens, inner = network.position.shape
        self.kept = tokens - round(share * tokens) if is_number(share) else 0
        require("share", share, lambda _: 0 < self.kept < tokens, f"a number that hides some of {tokens} patches")
        like = home(network)
        with drawn_from(generator, like):
            self.widen = nn.Linear(inner, width)
            self.unknown = nn.Parameter(0.02 * torch.randn(width))
            self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
            self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
            self.norm = nn.LayerNorm(width)
            self.paint = nn.Linear(width, network.input_shape[0] * network.patch**2)
        self.to(like.device).train(network.training)

    def painted(self, x: Tensor, order: Tensor) -> Tensor:
        """Images to patches ``[N, tokens, C p p]``; the first ``kept`` of ``order`` ``[N, tokens]`` are seen."""
        network: Any = self.network
        tokens = network.embed(x).flatten(2).transpose(1, 2) + network.position
        seen = order[:, : self.kept, None]
        known = self.widen(network.norm(network.blocks(tokens.gather(1, seen.expand(-1, -1, tokens.shape[2])))))
        everywhere = self.unknown.expand(len(x), tokens.shape[1], -1)
        known = known.to(everywhere.dtype)  # under autocast it is bfloat16
        placed = everywhere.scatter(1, seen.expand(-1, -1, known.shape[2]), known) + self.position
        return self.paint(self.norm(self.blocks(placed)))


def masked_patches(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of the pixels of the patches that were not shown, and of these alone.

    Which ones is drawn for each image anew, by torch's global generator.

    Raises
    ------
    ValueError : the model is no ``MaskedAutoencoder``.
    """
    network = _carries(model, MaskedAutoencoder)
    true = patches(x, network.network.patch)
    order = torch.rand(true.shape[:2], device="cpu").argsort(1).to(x.device)
    hidden = order[:, network.kept :, None].expand(-1, -1, true.shape[2])
    return F.mse_loss(network.painted(x, order).gather(1, hidden), true.gather(1, hidden))
