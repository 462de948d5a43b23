r"""Many networks of one architecture trained at once: their weights stacked, one pass for all of them.

=====================  ================================================================================================
name                   what it does
=====================  ================================================================================================
``train_together``     trains M networks in place, each as ``fit`` would alone, in one run of stacked tensors
``Stack``              M networks as one: weights ``[M, …]`` by name, and one pass for all
=====================  ================================================================================================

Small networks leave a processor idle: each of their many small operations costs more to start than to compute.
``torch.func`` turns M of each into one: ``stack_module_state`` puts the weights of M networks into tensors
``[M, …]``, ``functional_call`` runs one network with weights from outside, and ``vmap`` does so for all M. The sum of
their losses has for its gradient each network's own. Optimizers that treat each number by itself (SGD, Adam and most of
chapter 2's elementwise ones) then step all networks at once, without knowing of it; those that look at a whole tensor
or network (LARS, Muon, L-BFGS, SAM, a clipped norm) would mix the networks.

``Seen``, by which an objective is handed logits that are there already, is chapter 5's.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from course_lib.lab.arguments import require
from course_lib.lab.data import Dataset, batches, normalise
from course_lib.lab.runtime import seed_everything
from course_lib.lab.training import Objective, Recipe, cross_entropy, trains_on
from course_lib.regularization.passes import Seen


class Stack:
    """M networks as one: ``parameters`` and ``buffers`` are tensors ``[M, …]`` by name, copies of the networks' own.

    Raises
    ------
    ValueError : there are no networks, or they are not of one class, with weights of one shape and type.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.models = [*models]
        require("models", self.models, bool, "at least one network")
        shapes = [{name: (v.shape, v.dtype) for name, v in model.state_dict().items()} for model in self.models]
        for model, found in zip(self.models, shapes, strict=True):
            if type(model) is not type(self.models[0]) or found != shapes[0]:
                raise ValueError(f"models={type(model).__name__}: must all be of one architecture, width and type")
        self.parameters, self.buffers = stack_module_state(self.models)
        # no weights of its own: on the device "meta" an objective that looks at them fails instead of using stale ones
        self.skeleton = copy.deepcopy(self.models[0]).to("meta")

    def forward(self, x: Any, *, own: bool = False) -> Tensor:
        """Return the logits ``[M, B, K]`` of all networks on the same inputs ``[B, …]``.

        With ``own`` each network has inputs of its own, ``[M, B, …]``. The mode is the first network's.
        """

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Any) -> Tensor:
            return functional_call(self.skeleton, parameters | buffers, (x,))

        self.skeleton.train(self.models[0].training)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention of a CPU has no rule for vmap
            return vmap(one, (0, 0, 0 if own else None), randomness="different")(self.parameters, self.buffers, x)

    def losses(self, x: Any, y: Tensor, objective: Objective = cross_entropy) -> Tensor:
        """Return the loss of each network ``[M]`` on a batch of its own: x ``[M, B, …]``, y ``[M, B, …]``."""
        logits = self.forward(x, own=True)
        if objective is cross_entropy and y.ndim == 2:  # the usual one needs no loop
            each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
            return each.view_as(y).mean(1)
        found = []
        for place, own_y in enumerate(y):
            own_x = tuple(part[place] for part in x) if isinstance(x, tuple) else x[place]
            found.append(objective(Seen(self.skeleton, own_x, logits[place]), own_x, own_y))
        return torch.stack(found)

    @torch.no_grad()
    def unstack(self) -> None:
        """Write the numbers back into the networks."""
        for place, model in enumerate(self.models):
            own = dict(model.named_parameters()) | dict(model.named_buffers())
            for name, stacked in (self.parameters | self.buffers).items():
                own[name].copy_(stacked[place])


def train_together(models: Sequence[nn.Module], data: Dataset, recipe: Recipe, *, seeds: Sequence[int]) -> Tensor:
    """Train M networks of one architecture in place; return the training loss of each step, ``[steps, M]``.

    Network m becomes what ``fit(models[m], data, recipe, seed=seeds[m])`` makes of it, with the batches of its own
    seed, up to rounding; where a layer draws at random (dropout) with other draws. Nothing is validated on the way.

    The recipe's epochs, batch size, optimizer, schedule, augmentation, objective and precision count. The optimizer
    must treat each number by itself, and the objective may call the network on its batch, once or more; on other inputs
    it cannot, nor may it look into it.

    Raises
    ------
    ValueError : as ``Stack``; there is not a seed for each network; or the recipe fills a slot that is about a whole
        network: ``clip_norm``, ``accumulate``, ``ema``, ``stop``, ``keep``, ``watch``, ``compile``, bfloat16, or a
        schedule that listens to validation.
    """
    require("seeds", seeds, lambda s: len(s) == len(models), f"one number for each of {len(models)} networks")
    for slot in ("clip_norm", "accumulate", "ema", "stop", "keep", "watch", "compile"):
        usual = Recipe.__dataclass_fields__[slot].default
        require(f"recipe.{slot}", getattr(recipe, slot), partial(operator.eq, usual), f"{usual} here")
    require("recipe.precision", recipe.precision, lambda p: p != "bfloat16", "'float32' or 'float64' here")
    where, homes = trains_on(recipe), [next(model.parameters()).device for model in models]
    stack = Stack([model.to(where, recipe.dtype).train() for model in models])
    data = data.to(where)
    optimizer = recipe.optimizer(iter((name, p) for name, p in stack.parameters.items()))
    steps = recipe.steps(len(data.train))
    schedule = recipe.schedule(optimizer, sum(steps)) if recipe.schedule else None
    if isinstance(schedule, ReduceLROnPlateau) or hasattr(schedule, "listen"):
        raise ValueError(f"recipe.schedule={type(schedule).__name__}: must be one that needs no validation here")
    losses = []
    for epoch in range(1, recipe.epochs + 1):
        seed_everything(seeds[0] * 1_000_003 + epoch)
        for x, y in _batches_of_each(data, recipe, epoch, seeds):
            optimizer.zero_grad(set_to_none=True)
            found = stack.losses(x, y, recipe.objective)
            found.sum().backward()
            optimizer.step()
            if schedule:
                schedule.step()
            losses.append(found.detach())
    stack.unstack()
    for model, home in zip(models, homes, strict=True):
        model.to(home)
    return torch.stack(losses).cpu()


def _batches_of_each(data: Dataset, recipe: Recipe, epoch: int, seeds: Sequence[int]) -> Iterator[tuple[Any, Tensor]]:
    """An epoch's batches of all members, stacked, each in the order that ``fit`` has with its seed."""
    split, size = data.train, recipe.size_of_batch(epoch)
    drawn = [torch.Generator().manual_seed(seed * 1_000_003 + epoch) for seed in seeds]
    if recipe.augment is not None:
        passes = [batches(split, size, generator=each, augment=recipe.augment, dtype=recipe.dtype) for each in drawn]
        for parts in zip(*passes, strict=True):
            yield _each(torch.stack, *(x for x, _ in parts)), torch.stack([y for _, y in parts])
        return
    # One pass over the rows of all members, which costs a fifth of one pass for each
    orders = torch.stack([torch.randperm(len(split), generator=each) for each in drawn]).T
    for rows in orders.to(split.device).split(size):  # [B, M]
        chosen = split.subset(rows.T.flatten())
        shape = rows.T.shape

        def placed(part: list[Tensor], shape: torch.Size = shape) -> Tensor:
            return part[0].to(recipe.dtype).unflatten(0, shape)

        yield _each(placed, normalise(chosen.inputs, split)), chosen.labels.view(shape)


def _each(function: Callable[[list[Tensor]], Tensor], *inputs: Any) -> Any:
    """``function`` of the list of several batches' inputs, or of each part of theirs."""
    if isinstance(inputs[0], tuple):
        return tuple(function([*parts]) for parts in zip(*inputs, strict=True))
    return function([*inputs])
