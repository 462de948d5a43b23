"""Every public function on a GPU, or on one that is emulated: the numbers of the CPU, from tensors over there.

Networks are moved; data, and the example by which channels are followed, stay here: they are brought along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import pruning
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import convnet, resnet
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.pruning import Masks, magnitude, n_of_m
from course_lib.pruning.masks import prunable_layers
from tests.regularization.small import Move, every_name_once, generator, images, normal, on_the_gpu_as_here

SHORT = Recipe(epochs=2, batch_size=20, precision="float64")
ADAM = replace(SHORT, optimizer=partial(torch.optim.Adam, lr=0.01))
CONVNET, RESNET = partial(convnet, (1, 8, 8), 10, width=4), partial(resnet, (1, 8, 8), 10, width=4)
X = images(2)[0]


@cache
def digits() -> Dataset:
    return load("digits", train_size=40)


def network(make: Callable[[], nn.Module] = CONVNET) -> Any:
    return fresh(make, SHORT, seed=0).eval()


def pruned(to: Move, sparsity: float = 0.5) -> Any:
    model = to(network())
    return pruning.apply_masks(model, pruning.global_unstructured(magnitude(model), sparsity))


def scored(to: Move, criterion: Callable[..., Any]) -> list[Any]:
    """By a split that lies here, and by batches here and there."""
    batches = [images(), tuple(map(to, images()))]
    return [criterion(to(network()), data) for data in (digits().val.subset(torch.arange(6)), batches)]


def chosen(to: Move, pattern: Callable[..., Masks], layers: Iterable[str] | None = None) -> Masks:
    return pattern(magnitude(to(network()), layers=layers))


def trained(to: Move, prepare: Callable[[nn.Module], Recipe]) -> dict[str, Tensor]:
    """Weights and masks after a run of a network that was there before it."""
    model = to(network())
    fit(model, digits(), prepare(model), seed=0)
    return dict(model.state_dict())


def one_shot(to: Move) -> list[Masks]:
    """Twice: what is gone stays gone."""
    model = to(network())
    first = pruning.one_shot(model, digits().val, sparsity=0.3, criterion=pruning.snip)
    return [first, pruning.one_shot(model, digits().val, sparsity=0.6, criterion=pruning.taylor)]


def iterative(to: Move) -> list[list[float]]:
    found = pruning.iterative(
        to(network()), digits(), SHORT, seed=0, sparsity=0.6, rounds=2, criterion=pruning.taylor
    )  # fmt: skip
    return found.to_numpy().tolist()


def ticket(to: Move) -> list[Any]:
    """From first weights there, and from those of an early epoch; masks of a ticket suit a network anywhere."""
    found = []
    for rewind in (0, 1):
        made = pruning.lottery_ticket(
            lambda: to(CONVNET()), digits(), SHORT, seed=0, rounds=1, fraction=0.4, rewind_epochs=rewind
        )
        found.append([made.network()(to(X)), pruning.shuffled(made.masks[-1], generator())])
        pruning.apply_masks(network(), made.masks[-1])
    return found


def saved(to: Move) -> list[float]:
    """Saved there and loaded here, and the other way round."""
    here, there = network(), to(network())
    pruning.load_masked(here, pruned(to).state_dict())
    pruning.load_masked(there, pruned(lambda model: model).state_dict())
    return [pruning.sparsity(here), pruning.sparsity(there)]


def scores_of_groups(to: Move) -> list[dict[str, Tensor]]:
    model = to(network())
    groups = pruning.channel_groups(model, to(X))
    return [pruning.group_scores(model, groups), pruning.group_scores(model, groups, magnitude(model))]


def shrunk(to: Move, make: Callable[[], nn.Module], scope: Any) -> dict[str, Tensor]:
    model = to(network(make))
    return dict(pruning.shrink(pruning.prune_channels(model, to(X), 0.5, scope=scope), to(X)).state_dict())


def silenced(to: Move) -> dict[str, Tensor]:
    model = to(network())
    pruning.apply_masks(model, pruning.filters(magnitude(model), 0.5))
    return dict(pruning.shrink(pruning.silence(model, to(X)), to(X)).state_dict())


def without_a_block(to: Move) -> tuple[Tensor, str]:
    model, block = to(network(RESNET)), "stages.0."
    inside = [name for name in prunable_layers(model) if name.startswith(block)]
    pruning.apply_masks(model, {name: 0 * score for name, score in magnitude(model, layers=inside).items()})
    small: Any = pruning.drop_blocks(pruning.silence(model, to(X)), to(X))
    return small(to(X)), type(small.stages[0]).__name__


def permanent(to: Move) -> dict[str, Tensor]:
    model = pruned(to)
    assert {mask.device for mask in pruning.get_masks(model).values()} == {to(X).device}
    return dict(pruning.make_permanent(model).state_dict())


CASES: dict[str, Callable[[Move], Any]] = {
    # masks
    "apply_masks": lambda to: [p.detach() for p in pruned(to).parameters()],
    "get_masks": lambda to: pruning.get_masks(pruned(to)),
    "make_permanent": permanent,
    "load_masked": saved,
    "sparsity": lambda to: pruning.sparsity(pruned(to, 0.25)),
    "Masked": lambda to: pruning.Masked(to(X > 0))(to(X)),
    # criteria
    "magnitude": lambda to: scored(to, magnitude),
    "random_scores": lambda to: pruning.random_scores(to(network()), generator=generator()),
    "snip": lambda to: scored(to, pruning.snip),
    "taylor": lambda to: scored(to, pruning.taylor),
    "movement": lambda to: scored(to, pruning.movement),
    "obd": lambda to: scored(to, pruning.obd),
    "gauss_newton_diagonal": lambda to: scored(to, pruning.gauss_newton_diagonal),
    "obs": lambda to: scored(to, pruning.obs),
    "obs_prune": lambda to: pruning.obs_prune(to(normal(3, 5)), to(normal(9, 5)), 0.4),
    "obs_prune_model": lambda to: scored(to, partial(pruning.obs_prune_model, sparsity=0.5)),
    "wanda": lambda to: scored(to, pruning.wanda),
    # patterns
    "global_unstructured": lambda to: chosen(to, partial(pruning.global_unstructured, sparsity=0.5)),
    "layer_unstructured": lambda to: chosen(to, partial(pruning.layer_unstructured, sparsity=0.5)),
    "per_row": lambda to: chosen(to, partial(pruning.per_row, sparsity=0.5)),
    "n_of_m": lambda to: chosen(to, n_of_m, ["features.4", "head"]),
    "blocks": lambda to: chosen(to, partial(pruning.blocks, sparsity=0.5, block=(2, 4)), ["features.4", "head"]),
    "filters": lambda to: chosen(to, partial(pruning.filters, sparsity=0.5, combine=pruning.euclidean)),
    "channels": lambda to: chosen(to, partial(pruning.channels, sparsity=0.5)),
    "layers": lambda to: chosen(to, partial(pruning.layers, sparsity=0.3)),
    "layer_density": lambda to: pruning.layer_density(pruning.get_masks(pruned(to))).to_numpy().tolist(),
    "collapsed": lambda to: pruning.collapsed(chosen(to, partial(pruning.layers, sparsity=0.3))),
    "bottleneck": lambda to: pruning.bottleneck(pruning.get_masks(pruned(to))),
    "total": lambda to: pruning.total(to(normal(3, 4))),
    "without_smallest": lambda to: pruning.without_smallest(to(normal(3, 4)), 5),
    # schedules
    "one_shot": one_shot,
    "iterative": iterative,
    "gradual": lambda to: trained(
        to,
        partial(pruning.gradual, recipe=SHORT, sparsity=0.5, begin=1, end=4, data=digits().val, criterion=pruning.snip),
    ),
    "lottery_ticket": ticket,
    "rigl": lambda to: trained(
        to, lambda m: pruning.rigl(m, ADAM, sparsity=0.5, every=1, end=4, generator=generator())
    ),
    "drop_and_grow": lambda to: pruning.drop_and_grow(
        to(normal(4, 3)), to(normal(4, 3, seed=1)), to(normal(4, 3, seed=2) > 0), 0.5
    ),
    # networks
    "group_scores": scores_of_groups,
    "prune_channels": lambda to: shrunk(to, CONVNET, "layer"),
    "shrink": lambda to: shrunk(to, CONVNET, "global"),
    "silence": silenced,
    "drop_blocks": without_a_block,
}
WITH_OTHERS = "channel_groups euclidean shuffled"
IN_OTHER_FILES = "semi_structured"
HOLD_NO_TENSORS = """
    CannotShrink ChannelGroup Criterion Masks Pattern Scores Ticket cubic_sparsity drop_fraction erdos_renyi_kernel
    geometric_sparsity prunable_layers uniform
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu_as_here(name: str) -> None:
    on_the_gpu_as_here(CASES[name], rtol=1e-6)


def test_every_public_name_has_been_there() -> None:
    every_name_once(pruning, CASES, WITH_OTHERS, IN_OTHER_FILES, HOLD_NO_TENSORS)
