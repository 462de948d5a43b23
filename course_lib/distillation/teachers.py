"""Who teaches: networks that stay as they are, several of them together, and answers that are computed once.

==================  =====================================================  ============================================
name                what it gives                                          source
==================  =====================================================  ============================================
``frozen``          a network that no longer changes
``Ensemble``        several networks that answer together                  Hinton, Vinyals & Dean 2015,
                                                                           arXiv:1503.02531
``cached``          a teacher's answers to the training images as they     Beyer et al. 2021, arXiv:2106.05237
                    are, computed once: what augmentation makes untrue
``transfer_set``    more images to learn from, which need no labels        Bucila, Caruana & Niculescu-Mizil 2006, KDD
==================  =====================================================  ============================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from course_lib.distillation.targets import UNLABELLED
from course_lib.lab.arguments import require
from course_lib.lab.data import Dataset
from course_lib.lab.models import freeze
from course_lib.lab.training import Inputs, Objective, logits_of

Net = nn.Module  # the same that comes in goes out


def frozen(teacher: Net) -> Net:
    """Return the network itself, frozen: no gradients, and evaluation mode that ``train()`` does not end.

    ``lab.thaw(teacher)`` lets it go again. A copy is frozen as well: thaw the copy that is to be pruned and trained on.
    """
    freeze(teacher)
    return teacher


class Ensemble(nn.Module):
    """Several teachers as one: their mean, of probabilities (its logarithm is the answer) or of logits.

    The mean of probabilities is what the ensemble thinks; the mean of logits is, after the softmax, the geometric mean,
    in which one teacher that finds a class impossible has a veto.

    Raises
    ------
    ValueError : there are no teachers, or ``of`` is another word.
    """

    def __init__(self, teachers: Iterable[nn.Module], of: Literal["probabilities", "logits"] = "probabilities") -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        require("teachers", [*self.teachers], bool, "at least one network")
        require("of", of, lambda word: word in ("probabilities", "logits"), "'probabilities' or 'logits'")
        self.of = of
        self.train(self.teachers[0].training)

    def forward(self, x: Any) -> Tensor:
        """``[N, …]`` to logits ``[N, K]``."""
        logits = torch.stack([teacher(x) for teacher in self.teachers])
        if self.of == "logits":
            return logits.mean(0)
        return logits.log_softmax(2).logsumexp(0) - torch.tensor(len(self.teachers)).log().item()


# --- Answers that are computed once -----------------------------------------------------------------------------------


class Cached:
    """What a teacher said of each training image; itself a teacher, within ``objective``. ``cached`` makes it.

    Attributes
    ----------
    logits : ``[N, K]``, in the order of the training split.
    labels : int64 ``[N]``, the training split's true labels.
    """

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.logits, self.labels = logits, labels
        self._batch: tuple[Any, Tensor] | None = None

    def objective(self, within: Objective) -> _Numbered:
        """Return ``within`` for batches whose labels are example numbers: it sees the true labels.

        It belongs outermost. Within, ``teacher=`` this object answers by looking up:
        ``cache.objective(partial(soft_targets, teacher=cache))``.
        """
        return _Numbered(self, within)

    def __call__(self, x: Any) -> Tensor:
        """Return what the teacher said of the examples of this batch, as they were before any augmentation.

        Raises
        ------
        ValueError : asked outside ``objective``, or about another batch than that.
        """
        if self._batch is None or self._batch[0] is not x:
            raise ValueError(
                "teacher=Cached is asked about a batch of which it does not know the examples: must be asked within "
                "cache.objective(...), about the batch itself"
            )
        return self.logits[self._batch[1]]

    @contextmanager
    def _batch_is(self, x: Any, numbers: Tensor) -> Iterator[Tensor]:
        """Within it this object answers for these examples; gives their labels."""
        if numbers.dtype != torch.int64 or numbers.ndim != 1:
            raise ValueError(
                f"y is {numbers.dtype} {list(numbers.shape)}: must be example numbers, int64 [N], as the data set of "
                "cached(...) has them; augmentations that mix labels cannot be used with it"
            )
        # on a GPU the comparison would make it wait at each batch; indexing there stops at such a number itself
        if (
            numbers.device.type == "cpu"
            and len(numbers)
            and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(self.labels)
        ):
            raise ValueError(f"y holds {int(numbers.max())}: must be example numbers from 0 to {len(self.labels) - 1}")
        self.logits, self.labels = self.logits.to(numbers.device), self.labels.to(numbers.device)
        self._batch = x, numbers
        try:
            yield self.labels[numbers]
        finally:
            self._batch = None


class _Numbered:
    """An objective that sees true labels where the batch has example numbers. A class, so that it can be pickled."""

    def __init__(self, cache: Cached, within: Objective) -> None:
        self.cache, self.within = cache, within

    def __call__(self, model: nn.Module, x: Inputs, y: Tensor) -> Tensor:
        with self.cache._batch_is(x, y) as labels:
            return self.within(model, x, labels)


def cached(teacher: nn.Module, data: Dataset) -> tuple[Dataset, Cached]:
    """Return the data set with example numbers for training labels, and the teacher's answers, looked up by these.

    ``numbered, cache = cached(teacher, data)``, then ``fit(student, numbered, recipe)`` with
    ``Recipe(objective=cache.objective(partial(soft_targets, teacher=cache)))``. The teacher costs one pass over the
    training split instead of one an epoch; under augmentation it speaks of images that the student does not see, which
    is what the paper warns of ("fixed teacher"). Validation and test labels stay. With another objective, or with
    ``evaluate`` on its training split, the numbered data set makes no sense.
    """
    logits = logits_of(teacher, data.train)
    numbers = torch.arange(len(data.train), device=data.train.device)
    return replace(data, train=replace(data.train, labels=numbers)), Cached(logits, data.train.labels)


# --- More images ------------------------------------------------------------------------------------------------------


def transfer_set(data: Dataset, extra: Tensor) -> Dataset:
    """Return the data set with further training inputs, which have no label (-100), behind its own.

    ``extra`` are inputs like the training split's: images uint8 ``[M, C, H, W]`` or numbers float32 ``[M, D]``. All are
    normalised by the figures of the data set's own. Train on them with ``soft_targets(..., objective=labelled_only)``.

    Raises
    ------
    ValueError : ``extra`` is of another type or shape than the training inputs.
    """
    inputs = data.train.inputs
    if isinstance(inputs, tuple) or extra.dtype != inputs.dtype or extra.shape[1:] != inputs.shape[1:]:
        wanted = "one tensor" if isinstance(inputs, tuple) else f"{inputs.dtype} [M, {list(inputs.shape[1:])}]"
        raise ValueError(f"extra is {extra.dtype} {list(extra.shape)}: must be {wanted}, as the training inputs")
    none = torch.full((len(extra),), UNLABELLED, device=data.train.device)
    joined = replace(
        data.train,
        inputs=torch.cat([inputs, extra.to(inputs.device)]),
        labels=torch.cat([data.train.labels, none]),
    )
    return replace(data, train=joined)
