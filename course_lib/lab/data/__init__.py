"""Data sets in memory, in fixed splits, and batches from them.

===================  ================================================================================================
``load``             one call for every data set: ``load("digits")``, ``load("mnist", train_size=100)``, …
``Split, Dataset``   images as one ``uint8`` tensor (or numbers, or several parts) and labels; train, val and test
``batches``          one pass over a split in normalised batches, shuffled and augmented as whole tensors
``random_shift``     an augmentation; ``normalise`` is what ``batches`` does to the inputs, by their ``statistics``
===================  ================================================================================================
"""

from course_lib.lab.data.dataset import Augment, Dataset, Inputs, Split, batches, normalise, random_shift, statistics
from course_lib.lab.data.errors import DataDamaged, DataUnavailable
from course_lib.lab.data.loading import NAMES, load

__all__ = [
    "NAMES",
    "Augment",
    "DataDamaged",
    "DataUnavailable",
    "Dataset",
    "Inputs",
    "Split",
    "batches",
    "load",
    "normalise",
    "random_shift",
    "statistics",
]
