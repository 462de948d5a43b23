"""What the ranks do in test_split_learning.py. Starting processes is slow, so one function tries many things."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from course_lib.partitioning import split_learning
from course_lib.partitioning.split_learning import (
    CLIENT,
    SplitRun,
    train_split,
)

Variant = tuple[str, str, str]
"""Network, the layer behind which it is cut, and who has the labels."""


def train_variants(variants: list[Variant], settings: dict[str, Any]) -> dict[Variant, SplitRun]:
    """Train each variant across its cut, in the same two processes. Nobody sees what the other alone should have."""
    runs = {}
    for network, after, labels in variants:
        client = int(os.environ["RANK"]) == CLIENT
        with_labels = client == (labels == "client")
        blind: dict[str, Any] = {
            name: blinded(name, images=client, labels=with_labels) for name in ("endless_batches", "batches")
        }
        with mock.patch.multiple(split_learning, **blind):
            runs[network, after, labels] = train_split(network, after, labels=labels, **settings)
    return runs


def blinded(name: str, *, images: bool, labels: bool) -> Callable[..., Iterator[tuple[Tensor, Tensor]]]:
    """Batches in which what this rank must not see is spoilt."""
    whole = getattr(split_learning, name)

    def spoilt(*args: Any, **kwargs: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in whole(*args, **kwargs):
            yield x if images else torch.full_like(x, torch.nan), y if labels else torch.full_like(y, -1)

    return spoilt


def refusals(cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What is said of settings that do not fit."""
    said = []
    for network, settings in cases:
        try:
            train_split(network, **settings)
            said.append("nothing was raised")
        except ValueError as error:
            said.append(str(error))
    return said
