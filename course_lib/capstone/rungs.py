"""The ladder of the capstone: the first script, and the rungs from it to the fast recipe.

====================  =======  ============================================================================
rung                  chapter  what changes
====================  =======  ============================================================================
whole batches         1        the data set is one tensor, a batch one indexing operation
SGD with momentum     2        Nesterov's momentum in place of Adam, with its own rate and weight decay
one cycle             3        the rate goes up and down once in the whole run, to a higher peak
quick network         8, 15    half the resolution from the first layer on, batch norm, a tenth of the weights
small batches         4        32 images make a gradient in place of 64
channels last, bf16   15       products in bfloat16, channels side by side
====================  =======  ============================================================================

``first_script()`` is the entry everybody begins with, ``applied(names)`` the one with those rungs. How long each must
run is found by ``rules.epochs_needed``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from course_lib.capstone.networks import example_net, quick_net
from course_lib.capstone.rules import Entry
from course_lib.efficiency.ladder import Rung
from course_lib.lab.arguments import require
from course_lib.lab.training import Recipe
from course_lib.schedules import linear_between, one_cycle, schedule

SGD = partial(torch.optim.SGD, lr=0.03, momentum=0.9, nesterov=True, weight_decay=5e-4)
PEAK = 3.0
"""How many times the constant rate a cycle may reach."""


def higher_cycle(step: int, total: int) -> float:
    """Up to ``PEAK`` times the rate in a quarter of the run, then down to nothing, in straight lines."""
    return PEAK * one_cycle(step, total, pct_start=0.25, between=linear_between)


def first_script() -> Entry:
    """Return where everybody begins: images one by one, PyTorch's example network, Adam at its default rate."""
    return Entry(
        network=example_net, recipe=Recipe(epochs=1, batch_size=64, optimizer=torch.optim.Adam), per_image=True
    )


def _recipe(entry: Entry, **slots: object) -> Entry:
    return replace(entry, recipe=replace(entry.recipe, **slots))  # type: ignore[arg-type]


RUNGS: tuple[Rung[Entry], ...] = (
    Rung("whole batches", lambda entry: replace(entry, per_image=False)),
    Rung("SGD with momentum", lambda entry: _recipe(entry, optimizer=SGD)),
    Rung("one cycle", lambda entry: _recipe(entry, schedule=schedule(higher_cycle))),
    Rung("quick network", lambda entry: replace(entry, network=quick_net)),
    Rung("small batches", lambda entry: _recipe(entry, batch_size=32)),
    Rung("channels last, bf16", lambda entry: _recipe(replace(entry, channels_last=True), precision="bfloat16")),
)
NAMES = tuple(rung.name for rung in RUNGS)


def applied(names: Iterable[str] = NAMES, entry: Entry | None = None) -> Entry:
    """Return the script (or another entry) with the rungs of these names.

    Raises
    ------
    ValueError : there is no rung of a name.
    """
    names = set(names)
    require("names", sorted(names), lambda given: set(given) <= set(NAMES), f"among {', '.join(NAMES)}")
    entry = entry or first_script()
    for rung in RUNGS:
        if rung.name in names:
            entry = rung.apply(entry)
    return entry
