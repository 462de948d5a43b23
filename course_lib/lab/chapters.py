"""The chapters: all that is known of each, once. Maps, the README's table, tests and docs read it from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from course_lib.lab.runtime import checkout


@dataclass(frozen=True)
class Chapter:
    """One chapter.

    Attributes
    ----------
    number : from 0, as in the name of its file.
    name : of its notebook, ``NN_name.ipynb``.
    title : as in tables and headings; ``short`` on the map, in at most two lines.
    promise : what it is about, in a few words.
    slot : the slot of the training loop that it changes; "" where it is about the whole loop.
    module : of ``course_lib``; "" where it teaches no technique of its own.
    needs : chapters to be read before it; what follows from those is not repeated.
    place : column and row on the map.
    """

    number: int
    name: str
    title: str
    promise: str
    slot: str
    module: str
    needs: tuple[int, ...]
    place: tuple[float, float]
    short: str = ""

    @property
    def file(self) -> str:
        """The notebook's name in ``notebooks/``."""
        return f"{self.number:02d}_{self.name}.ipynb"

    @property
    def nn(self) -> str:
        """The number in two digits."""
        return f"{self.number:02d}"


CHAPTERS: tuple[Chapter, ...] = (
    Chapter(0, "start_here", "Start here", "the loop, the laboratory, how to measure honestly", "", "", (), (0, 2.5),
            "start here"),
    Chapter(1, "data_preprocessing", "Data preprocessing", "cleaning, scaling, augmentation", "data", "preprocessing",
            (0,), (1, 4.5), "data\npreprocessing"),
    Chapter(2, "optimizers", "Optimizers", "from momentum to Muon", "optimizer", "optimizers", (0,), (1, 2),
            "optimizers"),
    Chapter(3, "learning_rate", "Learning rate", "warm-up, decay, and rates that find themselves", "schedule",
            "schedules", (2,), (2, 2), "learning rate"),
    Chapter(4, "batch_size", "Batch size", "gradient noise, and how much of it to pay for", "batch", "batching", (3,),
            (3, 3), "batch size"),
    Chapter(5, "regularization", "Regularization", "penalties, noise and softer targets", "objective", "regularization",
            (1, 2), (2, 4.5), "regularization"),
    Chapter(6, "early_stopping", "Early stopping", "when it is over", "stopping", "early_stopping", (5,), (3, 5),
            "early stopping"),
    Chapter(7, "parallel_training", "Parallel training", "from the ring to ten thousand workers", "execution",
            "parallel", (4,), (4, 3), "parallel\ntraining"),
    Chapter(8, "pruning", "Pruning", "which weights, in what shape, when, and what it really saves", "model", "pruning",
            (3,), (3, 2), "pruning"),
    Chapter(9, "distillation", "Distillation", "a small network learns from a large one", "objective", "distillation",
            (5,), (3, 4), "distillation"),
    Chapter(10, "model_partitioning", "Model partitioning", "one network on several workers", "execution",
            "partitioning", (7,), (5, 3), "model\npartitioning"),
    Chapter(11, "compression", "Compression", "fewer bits, smaller matrices, shorter files", "model", "compression",
            (8,), (4, 2), "compression"),
    Chapter(12, "model_merging", "Model merging", "one network's weights out of several", "model", "merging", (3,),
            (3, 1), "model\nmerging"),
    Chapter(13, "transfer", "Transfer", "what one task teaches for another", "model", "transfer", (3,), (3, 0),
            "transfer"),
    Chapter(14, "fusion", "Fusion", "several networks or inputs decide together", "model", "fusion", (12,), (4, 1),
            "fusion"),
    Chapter(15, "model_optimization", "Model optimization", "the same network, executed faster", "execution",
            "efficiency", (11,), (5, 2), "model\noptimization"),
    Chapter(16, "capstone", "Capstone", "one recipe, time to accuracy", "", "capstone", tuple(range(16)),
            (6, 3), "capstone"),
    Chapter(17, "trends_and_faq", "Trends, open questions, FAQ", "which technique when", "", "outlook", (16,), (6, 2),
            "trends, open\nquestions, FAQ"),
)  # fmt: skip

MODULES = tuple(chapter.module for chapter in CHAPTERS if chapter.module)


def of_slot(slot: str) -> tuple[int, ...]:
    """The chapters that change a slot of the loop."""
    return tuple(chapter.number for chapter in CHAPTERS if chapter.slot == slot)


def written(root: Path | None = None) -> set[int]:
    """The chapters whose notebook is there, in a checkout (by default this one)."""
    root = root or checkout()
    return {chapter.number for chapter in CHAPTERS if root and (root / "notebooks" / chapter.file).is_file()}
