"""What all transforms of images share: checks at the door, one parameter an image, draws from a CPU generator.

Draws are made in float64 on the CPU and moved to the images: the same generator gives the same parameters on every
device and in every precision, up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.lab.arguments import is_number, require

PerImage = Tensor | float
"""One parameter an image, a tensor [N]; or one number for all of them."""


def check_images(x: Tensor) -> None:
    """Raise ValueError unless ``x`` is a batch of images, floats [N, C, H, W]."""
    if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
        what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x is {what}: must be a batch of images, floats [N, C, H, W]")


def check_generator(generator: torch.Generator) -> None:
    """Raise ValueError unless ``generator`` is a generator on the CPU."""
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise ValueError(f"generator={generator!r}: must be a torch.Generator on the CPU")


def check_chance(p: float) -> None:
    """Raise ValueError unless ``p`` is a probability."""
    require("p", p, lambda value: is_number(value) and 0 <= value <= 1, "a number from 0 to 1")


def check_at_least_zero(**arguments: float) -> None:
    """Raise ValueError for the first argument that is no number of 0 or more."""
    for name, value in arguments.items():
        require(name, value, lambda x: is_number(x) and x >= 0, "a number of at least 0")


def check_range(name: str, value: tuple[float, float], least: float = -float("inf")) -> None:
    """Raise ValueError unless ``value`` is (low, high) with ``least <= low <= high``."""

    def holds(pair: tuple[float, float]) -> bool:
        return len(pair) == 2 and all(map(is_number, pair)) and least <= pair[0] <= pair[1]

    allowed = "two numbers, (low, high)" + (f", from {least:g} up" if least > -float("inf") else "")
    require(name, value, lambda pair: isinstance(pair, (tuple, list)) and holds(pair), allowed)  # type: ignore[arg-type]


def check_parameter(
    x: Tensor, name: str, value: PerImage, low: float = -float("inf"), high: float = float("inf")
) -> Tensor:
    """Return a parameter as a tensor [N] or [] (float64 where it was a number), where it lies.

    It is looked at there: parameters drawn on the CPU are checked without making a GPU wait.

    Raises
    ------
    ValueError : not one number an image, not finite, below ``low`` or above ``high``.
    """
    given = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != len(x)):
        raise ValueError(f"{name} has the shape {list(given.shape)}: must be [{len(x)}], one an image, or one number")
    if given.numel():
        smallest, largest = (float(end) for end in given.detach().aminmax())
        if not (low <= smallest and largest <= high and abs(smallest) < float("inf") > abs(largest)):
            worst = largest if low <= smallest else smallest
            raise ValueError(f"{name} holds {worst:g}: must be finite numbers from {low:g} to {high:g}")
    return given


def parameters(
    x: Tensor, name: str, value: PerImage, low: float = -float("inf"), high: float = float("inf"), trailing: int = 3
) -> Tensor:
    """A checked parameter on the device of ``x``, in its type: [N], then ``trailing`` dimensions of size 1."""
    # first the type, then the device: not every device has float64
    given = check_parameter(x, name, value, low, high).to(x.dtype).to(x.device)
    return given.expand(len(x)).view(-1, *[1] * trailing)


def check_whole(name: str, value: PerImage) -> None:
    """Raise ValueError unless all numbers of a parameter are whole."""
    given = torch.as_tensor(value)
    if given.is_floating_point() and bool((given != given.round()).any()):
        raise ValueError(f"{name} holds {float(given[given != given.round()][0]):g}: must be whole numbers")


def uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Numbers between ``low`` and ``high``, float64 on the CPU."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low


def chance(generator: torch.Generator, p: float, *shape: int) -> Tensor:
    """True with probability ``p``: never where it is 0, always where it is 1."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) < p


def whole(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers from ``low`` to ``high``, both of them included, int64 on the CPU."""
    return torch.randint(low, high + 1, shape, generator=generator)


def dirichlet(generator: torch.Generator, alpha: float, *shape: int) -> Tensor:
    """Weights that add up to 1 along the last dimension: Dirichlet(alpha, …, alpha), float64 on the CPU.

    Two of them are a Beta(alpha, alpha) and what it leaves of 1. ``torch.distributions`` takes no generator.
    """
    return torch._sample_dirichlet(torch.full(shape, alpha, dtype=torch.float64), generator=generator)
