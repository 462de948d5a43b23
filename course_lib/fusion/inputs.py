r"""Several inputs of one example: two views, an image and a table. Where they meet, and what if one is missing.

=======================  ===================================================  ==========================================
name                     what it does                                         source
=======================  ===================================================  ==========================================
``EarlyFusion``          inputs side by side, one network
``IntermediateFusion``   a network for each, features put together by:
``Concatenated``         the features side by side
``Gated``                gates that say which input to hear                   Arevalo et al. 2017, arXiv:1702.01992
``Attended``             attention of one query over the inputs               Vaswani et al. 2017, arXiv:1706.03762
``Bilinear``             products of features, low-rank                       Kim et al. 2016, arXiv:1610.04325
``LateFusion``           a network for each, answers put together
``modality_dropout``     inputs left out at random in training                Neverova et al. 2014, arXiv:1501.00102
``Missing``              a network that some inputs do not reach
=======================  ===================================================  ==========================================

The inputs of a batch are a tuple of tensors ``[B, …]``, as ``Dataset.with_inputs`` makes them:
``data.with_inputs(lambda x: (x[..., :8], x[..., 8:]))``. All networks here take it and give logits ``[B, K]``. An input
that is missing is 0 everywhere, which after normalisation is its mean. Weights are drawn from torch's global generator,
as those of the laboratory's networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.fusion.voting import Fuse, mean_probability
from course_lib.lab.arguments import at_least, is_number, require

Parts = tuple[Tensor, ...]

# --- Where they meet --------------------------------------------------------------------------------------------------


class EarlyFusion(nn.Module):
    """All inputs side by side as one row ``[B, D]``, for one network: ``make((D,), classes)``, such as ``mlp``.

    Parameters
    ----------
    make : ``(input_shape, classes) -> network``
    input_shapes : those of the parts, as ``Dataset.input_shape`` has them
    """

    def __init__(
        self, make: Callable[[tuple[int, ...], int], nn.Module], input_shapes: Sequence[Sequence[int]], classes: int
    ) -> None:
        super().__init__()
        require("input_shapes", [*input_shapes], bool, "at least one shape")
        self.inputs = len(input_shapes)
        self.model = make((sum(math.prod(shape) for shape in input_shapes),), classes)

    def forward(self, x: Parts) -> Tensor:
        """A tuple of ``[B, …]`` to logits ``[B, K]``."""
        _check_parts(x, self.inputs)
        return self.model(torch.cat([part.flatten(1) for part in x], dim=1))


class IntermediateFusion(nn.Module):
    """A network for each input, whose features meet before the head: ``head(combine([features of each]))``.

    Parameters
    ----------
    branches : networks of the laboratory, one an input; their heads are not used, and are left out
    combine : a module that takes a list of features ``[B, D_i]`` to ``[B, D]``, and knows its ``size`` D
    """

    def __init__(self, branches: Iterable[nn.Module], combine: nn.Module, classes: int) -> None:
        super().__init__()
        self.branches, self.combine = nn.ModuleList(branches), combine
        require("branches", [*self.branches], bool, "at least one network")
        at_least(1, classes=classes)
        for branch in self.branches:
            branch.head = nn.Identity()  # its weights would never get a gradient
        size: int = combine.size  # type: ignore[assignment]
        self.head = nn.Linear(size, classes)

    def embedding(self, x: Parts) -> Tensor:
        """A tuple of ``[B, …]`` to the features ``[B, D]`` of all together."""
        _check_parts(x, len(self.branches))
        return self.combine([branch(part) for branch, part in zip(self.branches, x, strict=True)])

    def forward(self, x: Parts) -> Tensor:
        """A tuple of ``[B, …]`` to logits ``[B, K]``."""
        return self.head(self.embedding(x))


class LateFusion(nn.Module):
    """A network for each input, whose answers are fused: ``[M, B, K]`` to ``[B, K]``.

    Trained as it is, the networks learn together; trained one by one, each has to get along alone. ``only([0])`` is
    the fusion of some of them, for inputs that are missing.
    """

    def __init__(self, networks: Iterable[nn.Module], fuse: Fuse = mean_probability) -> None:
        super().__init__()
        self.networks, self.fuse = nn.ModuleList(networks), fuse
        require("networks", [*self.networks], bool, "at least one network")
        self.present = tuple(range(len(self.networks)))

    def each(self, x: Parts) -> Tensor:
        """A tuple of ``[B, …]`` to the logits ``[M, B, K]`` of the networks that are heard."""
        _check_parts(x, len(self.networks))
        return torch.stack([self.networks[place](x[place]) for place in self.present])

    def forward(self, x: Parts) -> Tensor:
        """A tuple of ``[B, …]`` to what they say together ``[B, K]``."""
        return self.fuse(self.each(x))

    def only(self, present: Sequence[int]) -> LateFusion:
        """Return the fusion of these inputs' networks alone; it shares them with this one, and takes all inputs.

        Raises
        ------
        ValueError : none is left, or there is no such input.
        """
        count = len(self.networks)
        require(
            "present", [*present], lambda p: len(p) > 0 and set(p) <= set(range(count)), f"some of 0 to {count - 1}"
        )
        found = LateFusion(self.networks, self.fuse)
        found.present = tuple(present)
        return found.train(self.training)


# --- How features meet ------------------------------------------------------------------------------------------------


class Concatenated(nn.Module):
    """Features side by side."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        _check_sizes(sizes)
        self.size = sum(sizes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """A list of ``[B, D_i]`` to ``[B, sum of D_i]``."""
        return torch.cat([*features], dim=1)


class Gated(nn.Module):
    r"""The gated multimodal unit: each feature of the whole comes from the inputs in shares that depend on all.

    .. math:: h_i=\tanh(W_ix_i),\qquad z_i=\sigma(V_i[x_1,\dots,x_n]),\qquad h=\sum_iz_i\circ h_i

    For two inputs the paper has one gate: :math:`h=z\circ h_1+(1-z)\circ h_2`, and so it is here.
    """

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        _check_sizes(sizes)
        at_least(1, width=width)
        self.size = width
        self.inner = nn.ModuleList(nn.Linear(size, width, bias=False) for size in sizes)
        gates = 1 if len(sizes) == 2 else len(sizes)
        self.gates = nn.ModuleList(nn.Linear(sum(sizes), width, bias=False) for _ in range(gates))

    def shares(self, features: Sequence[Tensor]) -> Tensor:
        """A list of ``[B, D_i]`` to the gates ``[inputs, B, width]``."""
        all_of_them = torch.cat([*features], dim=1)
        z = torch.stack([gate(all_of_them).sigmoid() for gate in self.gates])
        return torch.cat([z, 1 - z]) if len(features) == 2 else z

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """A list of ``[B, D_i]`` to ``[B, width]``."""
        h = torch.stack([inner(each).tanh() for inner, each in zip(self.inner, features, strict=True)])
        return (self.shares(features) * h).sum(0)


class Attended(nn.Module):
    r"""Attention of one learned query over the inputs: :math:`\sum_i\mathrm{softmax}_i(q^\top k_i/\sqrt d)\,v_i`.

    Keys and values are linear in the features, each input's with weights of its own.
    """

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        _check_sizes(sizes)
        at_least(1, width=width)
        self.size = width
        self.keys = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.values = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.query = nn.Parameter(torch.randn(width))

    def shares(self, features: Sequence[Tensor]) -> Tensor:
        """A list of ``[B, D_i]`` to the attention ``[inputs, B]``, which sums to 1 over the inputs."""
        keys = torch.stack([key(each) for key, each in zip(self.keys, features, strict=True)])
        return (keys @ self.query / math.sqrt(self.size)).softmax(0)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """A list of ``[B, D_i]`` to ``[B, width]``."""
        values = torch.stack([value(each) for value, each in zip(self.values, features, strict=True)])
        return (self.shares(features)[:, :, None] * values).sum(0)


class Bilinear(nn.Module):
    r"""Low-rank bilinear pooling: :math:`P^\top\big(\tanh(U^\top x)\circ\tanh(V^\top y)\big)+b`, of two inputs or more.

    Without the tanh each output is :math:`x^\top W_jy` with a matrix of at most that rank. ``rank`` products cost what
    the sizes and not their product costs.
    """

    def __init__(self, sizes: Sequence[int], width: int, rank: int) -> None:
        super().__init__()
        _check_sizes(sizes)
        at_least(1, width=width, rank=rank)
        self.size = width
        self.factors = nn.ModuleList(nn.Linear(size, rank, bias=False) for size in sizes)
        self.out = nn.Linear(rank, width)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """A list of ``[B, D_i]`` to ``[B, width]``."""
        parts = [factor(each).tanh() for factor, each in zip(self.factors, features, strict=True)]
        return self.out(torch.stack(parts).prod(0))


# --- Inputs that are missing ------------------------------------------------------------------------------------------


def modality_dropout(x: Parts, generator: torch.Generator, *, p: float = 0.5) -> Parts:
    """Leave out each input of each example with chance ``p``, but never all of one: an augmentation.

    ``Recipe(augment=partial(modality_dropout, p=0.3))``. Where all would go, one stays, each as likely. What stays is
    not made larger: in evaluation all inputs are there, or one is really missing.

    Raises
    ------
    ValueError : ``x`` is no tuple, or ``p`` no number from 0 to below 1.
    """
    require("p", p, lambda chance: is_number(chance) and 0 <= chance < 1, "a number from 0 to below 1")
    _check_parts(x, None)
    count = len(x[0])
    kept = torch.rand(len(x), count, generator=generator) >= p
    survivor = torch.randint(len(x), (count,), generator=generator)
    kept |= ~kept.any(0) & F.one_hot(survivor, len(x)).bool().T
    return tuple(
        part * mask.view(-1, *[1] * (part.ndim - 1)).to(part) for part, mask in zip(x, kept, strict=True)
    )  # fmt: skip


class Missing(nn.Module):
    """A network that the inputs at ``places`` do not reach: it sees zeros there.

    Raises
    ------
    ValueError : ``places`` is empty.
    """

    def __init__(self, model: nn.Module, places: Sequence[int]) -> None:
        super().__init__()
        require("places", [*places], bool, "the numbers of the inputs that are missing")
        self.model, self.places = model, frozenset(places)
        self.train(model.training)

    def forward(self, x: Parts) -> Tensor:
        """A tuple of ``[B, …]`` to logits ``[B, K]``."""
        _check_parts(x, None)
        require("places", sorted(self.places), lambda p: p[-1] < len(x) and p[0] >= 0, f"from 0 to {len(x) - 1}")
        return self.model(tuple(torch.zeros_like(part) if k in self.places else part for k, part in enumerate(x)))


def _check_parts(x: object, count: int | None) -> None:
    if not isinstance(x, tuple) or not x or (count is not None and len(x) != count):
        found = f"{len(x)} parts" if isinstance(x, tuple) else type(x).__name__
        raise ValueError(f"x={found}: must be a tuple of {count or 'some'} tensors, one an input")


def _check_sizes(sizes: Sequence[int]) -> None:
    require("sizes", list(sizes), lambda s: len(s) >= 2, "the numbers of features of at least two inputs")
    for size in sizes:
        at_least(1, sizes=size)
