r"""What a new task costs the old one, and two ways to keep it.

=========================  ===============================================  ==========================================
name                       what it does                                     source
=========================  ===============================================  ==========================================
``ewc``                    holds each weight as firmly as the old task      Kirkpatrick et al. 2016, arXiv:1612.00796
                           needs it
``memory``, ``rehearsal``  keeps some old examples, and mixes them in       Robins 1995, Connection Science 7;
                                                                            Chaudhry et al. 2019, arXiv:1902.10486
``accuracies``             a row of the accuracy matrix                     Lopez-Paz & Ranzato 2017,
                                                                            arXiv:1706.08840
``average_accuracy``,      what the matrix says                             Lopez-Paz & Ranzato 2017
``backward_transfer``,
``forward_transfer``
``forgetting``             how much of each task is lost                    –
=========================  ===============================================  ==========================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from course_lib.lab.arguments import is_number, require
from course_lib.lab.data import Split
from course_lib.lab.training import Inputs, Objective, cross_entropy, evaluate
from course_lib.merging.states import State, check_not_negative
from course_lib.merging.weighted import fisher
from course_lib.transfer.parts import Pool
from course_lib.transfer.tuning import starting_point

# --- Elastic weight consolidation -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Consolidated:
    """A task that is to be kept: the ``weights`` that solve it, and the diagonal ``fisher`` information there."""

    weights: State
    fisher: State


def consolidate(model: nn.Module, split: Split, *, generator: torch.Generator, samples: int = 1) -> Consolidated:
    """Return what ``ewc`` needs of a task: the weights now, and ``merging.fisher`` on its examples.

    Raises
    ------
    ValueError : ``samples`` is below 1, or the split is empty.
    """
    return Consolidated(starting_point(model), fisher(model, split, generator=generator, samples=samples))


def ewc(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    tasks: Sequence[Consolidated],
    strength: float = 100.0,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the objective and :math:`\tfrac\lambda2\sum_i F_i(\theta_i-\theta^*_i)^2`, summed over the old tasks.

    F is the mean over examples, as the objective is, so :math:`\lambda` (``strength``) says how many times the old
    data count. Weights that an old task does not have, or has in another shape (a new head), are free.

    Raises
    ------
    ValueError : ``strength`` is negative, or there are no tasks.
    """
    check_not_negative(strength=strength)
    require("tasks", list(tasks), bool, "at least one consolidated task")
    loss = objective(model, x, y)
    for name, value in model.named_parameters():
        for task in tasks:
            if value.requires_grad and _knows(task.weights, name, value) and name in task.fisher:
                moved = value - task.weights[name].to(value)
                loss = loss + strength / 2 * (task.fisher[name].to(value) * moved.square()).sum()
    return loss


def _knows(weights: Mapping[str, Tensor], name: str, value: Tensor) -> bool:
    return name in weights and weights[name].shape == value.shape


# --- Rehearsal --------------------------------------------------------------------------------------------------------


def memory(split: Split, count: int, *, generator: torch.Generator) -> Pool:
    """Return ``count`` examples to be kept, classes as evenly as their numbers allow, at random within a class.

    Raises
    ------
    ValueError : ``count`` is not from 1 to the number of examples.
    """
    allowed = f"a whole number from 1 to {len(split)}"
    require("count", count, lambda n: isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= len(split), allowed)
    labels = split.labels.cpu()
    order = torch.randperm(len(labels), generator=generator)
    # the first of each class, then the second of each, …: a stable sort by the rank within the class
    rank = torch.empty(len(labels), dtype=torch.int64)
    for label in labels.unique():
        members = labels[order] == label
        rank[members] = torch.arange(int(members.sum()))
    return Pool(split.subset(order[torch.argsort(rank, stable=True)][:count]))


def rehearsal(
    model: nn.Module, x: Tensor, y: Tensor, *, old: Pool, share: float = 1.0, objective: Objective = cross_entropy
) -> Tensor:
    """Return the objective of the batch together with old examples, ``share`` times as many, drawn anew each time.

    They go through the network as one batch, and each example counts alike. In evaluation mode the batch stands alone,
    so that a validation loss is of the new task.

    Raises
    ------
    ValueError : ``share`` is not above 0, or the labels are not int64.
    """
    require("share", share, lambda s: is_number(s) and s > 0, "a number above 0")
    if y.dtype != torch.int64:
        raise ValueError(f"y is {y.dtype} {list(y.shape)}: must be int64 [N], as the old examples' labels are")
    if not model.training:
        return objective(model, x, y)
    more, labels = old.draw(max(1, round(share * len(y))), x)
    return objective(model, torch.cat([x, more]), torch.cat([y, labels]))


# --- Measures ---------------------------------------------------------------------------------------------------------


def accuracies(model: nn.Module, splits: Sequence[Split]) -> Tensor:
    """Return the network's accuracy on each task, float64 ``[T]``: the row of the matrix after a task was learned."""
    require("splits", list(splits), bool, "at least one task")
    return torch.tensor([evaluate(model, split).accuracy for split in splits], dtype=torch.float64)


def average_accuracy(matrix: Tensor) -> float:
    r"""Return :math:`\tfrac1T\sum_iR_{T,i}` of accuracies ``[T, T]``: row i after task i, column j of task j.

    Raises
    ------
    ValueError : the matrix is not square.
    """
    return _square(matrix)[-1].mean().item()


def backward_transfer(matrix: Tensor) -> float:
    r"""Return :math:`\tfrac1{T-1}\sum_{i<T}R_{T,i}-R_{i,i}`: below 0 where later tasks made earlier ones worse.

    Raises
    ------
    ValueError : the matrix is not square, or of one task.
    """
    found = _square(matrix, 2)
    return (found[-1] - found.diagonal())[:-1].mean().item()


def forward_transfer(matrix: Tensor, untrained: Tensor) -> float:
    r"""Return :math:`\tfrac1{T-1}\sum_{i>1}R_{i-1,i}-\bar b_i`: what is known of a task before it is learned.

    ``untrained`` ``[T]`` are the accuracies :math:`\bar b` of the network before any task.

    Raises
    ------
    ValueError : the matrix is not square, or of one task, or ``untrained`` has another length.
    """
    found = _square(matrix, 2)
    require("untrained", list(untrained.shape), lambda s: s == [len(found)], f"[{len(found)}], one for each task")
    return (found.diagonal(1) - untrained[1:]).mean().item()


def forgetting(before: Tensor, after: Tensor) -> Tensor:
    """Return how much accuracy each task has lost, ``[T]``: before a new task was learned minus after it.

    Raises
    ------
    ValueError : they are not of one length.
    """
    require("after", list(after.shape), lambda s: s == list(before.shape), f"{list(before.shape)}, as before")
    return before - after


def _square(matrix: Tensor, least: int = 1) -> Tensor:
    allowed = f"square, [T, T] with T of at least {least}"
    require("matrix", list(matrix.shape), lambda s: len(s) == 2 and s[0] == s[1] >= least, allowed)
    return matrix
