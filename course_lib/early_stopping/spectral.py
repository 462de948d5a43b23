"""The directions of a linear model's inputs, and the checks at the door that filters share."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.lab.arguments import at_least, is_number, require


def spectrum(X: Tensor) -> Tensor:
    r"""Return the eigenvalues of :math:`X^\top X/N`, falling, ``[D]``, for inputs ``[N, D]``."""
    check_matrix(X)
    values = singular(X)[1].square() / len(X)
    return torch.cat([values, values.new_zeros(X.shape[1] - len(values))])


def singular(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition, with what is rounding set to zero (the rule of ``torch.linalg.lstsq``)."""
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    least = max(X.shape) * torch.finfo(X.dtype).eps * (s.max().item() if len(s) else 0.0)
    return U, torch.where(s > least, s, 0.0), Vh


def check_steps(lr: float, steps: int) -> None:
    require("lr", lr, lambda r: is_number(r) and r > 0, "a number above 0")
    at_least(0, steps=steps)


def check_not_negative(**arguments: float) -> None:
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and x >= 0, "a number of at least 0")


def check_matrix(X: Tensor) -> None:
    if not isinstance(X, Tensor) or X.ndim != 2 or not X.is_floating_point():
        what = f"{X.dtype} {list(X.shape)}" if isinstance(X, Tensor) else type(X).__name__
        raise ValueError(f"X is {what}: must be a matrix of floats")


def check_vector(size: int, **arguments: Tensor) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.shape != (size,):
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} has the shape {what}: must be [{size}]")
