r"""The noise scale of a run, from gradients that training computes anyway: the parts of a batch and the whole.

==============  ===========================================================  =========================================
name            what it does                                                 source
==============  ===========================================================  =========================================
``NoiseScale``  averages both estimates over steps, then divides             McCandlish et al. 2018, arXiv:1812.06162,
                                                                             appendix A.1
``tracked``     a recipe that feeds it from the parts of its batches
==============  ===========================================================  =========================================

``fit`` with ``Recipe(accumulate=4)`` takes four gradients and adds them: four small batches and a big one, which is all
that ``noise_scale_from_two_sizes`` asks for. Two hooks at each weight look at the parts while they are added; they read
and change nothing, so a tracked run takes the very steps of the run without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.batching.noise import Estimates, noise_scale_from_two_sizes
from course_lib.lab.arguments import is_number, require
from course_lib.lab.data import Dataset
from course_lib.lab.stepping import after_each_step
from course_lib.lab.training import Inputs, Objective, Recipe


class NoiseScale:
    r"""Running averages of both estimates, :math:`a \leftarrow \beta a + (1 - \beta)\,e`, divided by :math:`1-\beta^t`.

    One batch says next to nothing of :math:`|G|^2`, and the ratio of two noisy numbers is off to one side. So both are
    averaged over about :math:`1/(1 - \beta)` steps, and only then divided. The division by :math:`1-\beta^t` takes out
    that the averages start at zero. A copy starts empty, so that a recipe with a tracker has one fingerprint whatever
    ran before.

    Parameters
    ----------
    decay : :math:`\beta`, at least 0 and less than 1.

    Raises
    ------
    ValueError : ``decay`` is out of its range.
    """

    def __init__(self, decay: float = 0.99) -> None:
        require("decay", decay, lambda d: is_number(d) and 0 <= d < 1, "a number of at least 0 and less than 1")
        self.decay = decay
        self._hooks: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forget all that was seen."""
        self.steps = 0
        self._gradient_sq = self._trace = 0.0
        self._sizes: list[int] = []
        self._parts: list[Tensor] = []
        self._whole: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"decay": self.decay}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.decay, self._hooks = state["decay"], []
        self.reset()

    def update(self, small_sq: Sequence[float], sizes: Sequence[int], big_sq: float) -> Estimates:
        """Take in one step: the squared gradient norms of the parts, their sizes, and that of the whole batch.

        Parts of several sizes count as of their harmonic mean, for which the estimates stay unbiased. Returns the
        estimates of this step alone.

        Raises
        ------
        ValueError : there are fewer than two parts, or not one norm a part.
        """
        if len(small_sq) != len(sizes) or len(sizes) < 2:
            raise ValueError(f"small_sq={small_sq!r}, sizes={sizes!r}: must be of at least two parts, one of each")
        small = len(sizes) / sum(1 / size for size in sizes)
        found = noise_scale_from_two_sizes(sum(small_sq) / len(small_sq), big_sq, small, sum(sizes))
        self.steps += 1
        self._gradient_sq = self.decay * self._gradient_sq + (1 - self.decay) * found.gradient_sq
        self._trace = self.decay * self._trace + (1 - self.decay) * found.trace
        return found

    @property
    def estimates(self) -> Estimates:
        """Both averages, corrected for their start; NaN before the first step."""
        if not self.steps:
            return Estimates(math.nan, math.nan)
        start = 1 - self.decay**self.steps
        return Estimates(self._gradient_sq / start, self._trace / start)

    @property
    def noise_scale(self) -> float:
        """The ratio of the averages, in examples; NaN before the first step, infinite where no gradient is seen."""
        return self.estimates.noise_scale if self.steps else math.nan

    def look_at(self, parameters: Iterable[nn.Parameter]) -> None:
        """Hear of the gradients of these from now on, and no longer of those of the run before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for parameter in parameters:
            self._hooks.append(parameter.register_hook(self.seen_part))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self.seen_sum))

    # What the hooks of a tracked run call, in this order: begin, then for each part seen_part and seen_sum, then close.

    def begin(self, size: int) -> None:
        self._sizes.append(size)
        self._parts.append(torch.zeros(()))

    def seen_part(self, gradient: Tensor) -> None:
        if self._parts:  # else somebody else trains the network after a tracked run
            self._parts[-1] = self._parts[-1].to(gradient.device) + gradient.detach().square().sum()

    def seen_sum(self, parameter: Tensor) -> None:
        if self._parts and parameter.grad is not None:
            self._whole[id(parameter)] = parameter.grad.detach().square().sum()

    def close(self, most: int) -> None:
        sizes, parts, whole = self._sizes, self._parts, self._whole
        self._sizes, self._parts, self._whole = [], [], {}
        if len(sizes) > most:
            raise ValueError(
                f"optimizer asked for {len(sizes)} parts in one step of accumulate={most}: must ask for its gradient "
                "once a step (SAM asks twice)"
            )
        if len(sizes) < 2 or not whole:  # the last batch of an epoch may be too small to be cut
            return
        *seen, big_sq = torch.stack([*parts, torch.stack(list(whole.values())).sum()]).tolist()
        # fit scales each part's loss by its share of the batch, before the hooks see its gradient
        shares = [size / sum(sizes) for size in sizes]
        self.update([sq / share**2 for sq, share in zip(seen, shares, strict=True)], sizes, big_sq)


def tracked(recipe: Recipe, tracker: NoiseScale) -> Recipe:
    """Return a recipe whose runs feed ``tracker``, with the columns ``noise_scale``, ``gradient_sq`` and ``trace``.

    ``recipe.accumulate`` must be 2 or more: the parts are the small batches. Each run starts with an empty tracker,
    also one that goes on from a checkpoint. Gradients are seen before ``clip_norm`` cuts them.

    Raises
    ------
    ValueError : ``recipe.accumulate`` is 1; or, at the first step, the optimizer asks for its gradient twice (SAM).
    """
    require(
        "recipe.accumulate", recipe.accumulate, lambda parts: parts >= 2, "at least 2: the parts are what is compared"
    )
    columns = ("noise_scale", "gradient_sq", "trace")
    counted = replace(
        recipe,
        objective=partial(_told, objective=recipe.objective, tracker=tracker),
        optimizer=partial(_hooked, make=recipe.optimizer, tracker=tracker),
        watch={**(recipe.watch or {}), **{name: partial(_read, name=name, tracker=tracker) for name in columns}},
    )
    return after_each_step(counted, partial(_closed, most=recipe.accumulate, tracker=tracker))


def _told(model: nn.Module, x: Inputs, y: Tensor, *, objective: Objective, tracker: NoiseScale) -> Tensor:
    if torch.is_grad_enabled():
        tracker.begin(len(y))
    return objective(model, x, y)


def _hooked(parameters: Iterator[tuple[str, nn.Parameter]], *, make: Any, tracker: NoiseScale) -> Optimizer:
    named = list(parameters)
    tracker.reset()
    tracker.look_at(parameter for _, parameter in named if parameter.requires_grad)
    return make(iter(named))


def _closed(optimizer: Optimizer, step: int, *, most: int, tracker: NoiseScale) -> None:
    tracker.close(most)


def _read(model: nn.Module, data: Dataset, *, name: str, tracker: NoiseScale) -> float:
    return tracker.noise_scale if name == "noise_scale" else float(getattr(tracker.estimates, name))
