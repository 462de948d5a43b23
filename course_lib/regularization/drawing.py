"""Random numbers of one shape, where and in which type a tensor is; and the checks at the door that many methods share.

Without a ``generator`` torch's global one draws, which ``fit`` seeds anew at each epoch: a run that goes on from a
checkpoint draws what it would have drawn. A generator on the CPU serves a tensor on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.lab.arguments import is_number, require


def bernoulli(shape: tuple[int, ...], chance: float, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return ones with probability ``chance`` and zeros, of the type and on the device of ``like``.

    The draw of ``torch.nn.functional.dropout`` on the CPU: the same seed gives the same mask.
    """
    where = like.device if generator is None else generator.device
    drawn = torch.empty(shape, dtype=like.dtype, device=where).bernoulli_(chance, generator=generator)
    return drawn.to(like.device)


def normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal numbers, of the type and on the device of ``like``."""
    where = like.device if generator is None else generator.device
    return torch.randn(shape, dtype=like.dtype, device=where, generator=generator).to(like.device)


def unit_rows(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return directions ``[N, …]``, each of norm 1 and each as likely."""
    return normalised_rows(normal(shape, like, generator))


def normalised_rows(x: Tensor) -> Tensor:
    """Divide each example of ``[N, …]`` by its norm; one of norm 0 stays."""
    flat = x.flatten(1)
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)).view_as(x)


# --- Checks at the door -----------------------------------------------------------------------------------------------


def check_chance(**arguments: float) -> None:
    """Raise ValueError for the first argument that is no probability."""
    for name, value in arguments.items():
        require(name, value, lambda p: is_number(p) and 0 <= p <= 1, "a number from 0 to 1")


def check_not_negative(**arguments: float) -> None:
    """Raise ValueError for the first argument that is no number of 0 or more."""
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and x >= 0, "a number of at least 0")


def check_positive(**arguments: float) -> None:
    """Raise ValueError for the first argument that is no number above 0."""
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and x > 0, "a number above 0")


def check_matrix(**arguments: Tensor) -> None:
    """Raise ValueError for the first argument that is no matrix of floats."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            what = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} is {what}: must be a matrix of floats")
