"""``load``: one call for every data set, always in the same fixed splits."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from course_lib.lab import glyphs, runtime
from course_lib.lab.data.dataset import Dataset, Split, statistics
from course_lib.lab.data.downloads import REAL, read_real
from course_lib.lab.data.folders import read_folder
from course_lib.lab.data.resizing import resize
from course_lib.lab.data.splits import stratified_order

TABLES = {"wine": "load_wine", "breast_cancer": "load_breast_cancer"}  # their functions in sklearn.datasets
NAMES = ("digits", "glyphs", *TABLES, *REAL)
SPLIT_SEED = 0  # of the splits that never change
FOLDER_VAL_SHARE = 1 / 6
GLYPH_DEFAULTS: dict[str, Any] = {"count": 6000, "difficulty": 0.3, "domain": "print", "classes": "all"}

Part = tuple[Tensor, Tensor]  # images uint8 [N, C, H, W] or tables float32 [N, D], labels int64 [N]


def load(
    name: str = "digits",
    *,
    train_size: int | None = None,
    size: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    count: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    difficulty: float | None = None,
    domain: str | None = None,
    classes: str | None = None,
) -> Dataset:
    """A data set in memory, in train, val and test splits that are disjoint, class-balanced and the same for everyone.

    =================  =======================================  =================================================
    name               what                                     train / val / test
    =================  =======================================  =================================================
    ``digits``         real handwritten digits, 1×8×8           1,000 / 397 / 400
    ``glyphs``         drawn letters and digits, 1×28×28        4,000 / 1,000 / 1,000 (``count`` split 4 : 1 : 1)
    ``wine``           table, 13 chemical analyses, 3 growers   106 / 36 / 36
    ``breast_cancer``  table, 30 measures of cells, 2 classes   341 / 114 / 114
    ``mnist``          handwritten digits, 1×28×28              50,000 / 10,000 / 10,000
    ``fashion_mnist``  pieces of clothing, 1×28×28              50,000 / 10,000 / 10,000
    ``cifar10``        photographs in ten classes, 3×32×32      45,000 / 5,000 / 10,000
    ``folder:PATH``    ``PATH/{train,test}/<class>/*``          5/6 of train / 1/6 of train / test
    =================  =======================================  =================================================

    Official test sets stay whole; val is a fixed part of the official training set. The columns of a table stay in
    their own units until ``batches`` standardises them. All sets are for classification; there is none for regression.

    Sets to transfer between: ``load("glyphs", domain=...)`` shows, for one seed, the same characters in the same pose
    as "print", "chalk" or "outline" (one channel each), and the real ``load("digits", size=16)`` has the shape and the
    classes of ``load("glyphs", classes="digits", size=16)``.

    Parameters
    ----------
    train_size : keeps only so many training examples, class-balanced; ``mean`` and ``std`` are then theirs. With the
        same seed smaller sizes are contained in larger ones. Of glyphs as many as it takes are drawn.
    size : images only: resizes them to ``size`` × ``size`` pixels; glyphs are drawn at that size.
    seed : decides which examples ``train_size`` keeps, and which glyphs are drawn. The splits do not depend on it.
    folder : where real data sets lie or are downloaded to; default: ``runtime.data_folder()``.
    count, difficulty, domain, classes : glyphs only, see ``course_lib.lab.glyphs.generate``. Defaults: 6000 images in
        all three splits, 0.3, "print", "all" 36 classes.
    val_size, test_size : glyphs only: draws so many for that split instead of a sixth of ``count``; nothing else
        changes. A test split of thousands tells small differences apart:
        ``load("glyphs", classes="digits", size=16, difficulty=0.5, train_size=1000, val_size=1000, test_size=5000)``.

    Raises
    ------
    ValueError : a bad argument, named, with what is allowed
    DataUnavailable : not in the data folder, and no network
    DataDamaged : a file that cannot be read, named, with how to mend it
    """
    knobs = {"count": count, "difficulty": difficulty, "domain": domain, "classes": classes}
    knobs |= {"val_size": val_size, "test_size": test_size}
    given = {key: value for key, value in knobs.items() if value is not None}
    _check(name, train_size, size, seed, given)
    root = runtime.data_folder() if folder is None else Path(folder).expanduser()
    if name == "glyphs":
        train, val, test, labels = _glyphs(size, seed, train_size or 0, **{**GLYPH_DEFAULTS, **given})
    elif name == "digits":
        train, val, test, labels = _digits()
    elif name in TABLES:
        train, val, test, labels = _table(TABLES[name])
    elif name.startswith("folder:"):
        pictures = read_folder(Path(name.removeprefix("folder:")).expanduser(), size, root / "cache")
        (train, val), test, labels = _hold_out(pictures.train, FOLDER_VAL_SHARE), pictures.test, pictures.classes
    else:
        official, test = read_real(name, root)
        (train, val), labels = _hold_out(official, REAL[name].val_share), REAL[name].classes
    if train_size is not None:
        train = _few(train, train_size, seed, len(labels))
    if size is not None:
        train, val, test = ((resize(images, size), y) for images, y in (train, val, test))
    mean, std = statistics(train[0])
    train_split, val_split, test_split = (Split(inputs, y, mean, std) for inputs, y in (train, val, test))
    return Dataset(name, train_split, val_split, test_split, labels)


def _check(name: str, train_size: int | None, size: int | None, seed: int, glyph_knobs: dict[str, Any]) -> None:
    if name not in NAMES and not name.startswith("folder:"):
        near = difflib.get_close_matches(name.lower().replace("-", "_"), NAMES, n=1, cutoff=0.5)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name is {name!r}; there are {', '.join(map(repr, NAMES))} and 'folder:PATH'.{meant}")
    if name == "folder:":
        raise ValueError("name is 'folder:' without a path; write 'folder:PATH'")
    if glyph_knobs and name != "glyphs":
        raise ValueError(f"{next(iter(glyph_knobs))} is for load('glyphs') only, not for {name!r}")
    if train_size is not None and (not isinstance(train_size, int) or train_size < 1):
        raise ValueError(f"train_size is {train_size}; it must be a whole number, at least one example for each class")
    if size is not None and (not isinstance(size, int) or not 4 <= size <= 512):
        raise ValueError(f"size is {size}; it must be 4 to 512 whole pixels")
    if size is not None and name in TABLES:
        raise ValueError(f"size is {size}; it is for images, and {name!r} is a table")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be a whole number from 0")


def _digits() -> tuple[Part, Part, Part, tuple[str, ...]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    train, val, test = stratified_order(labels, SPLIT_SEED).split([1000, 397, 400])
    parts = [(images[rows], labels[rows]) for rows in (train, val, test)]
    return parts[0], parts[1], parts[2], tuple("0123456789")


def _table(function: str) -> tuple[Part, Part, Part, tuple[str, ...]]:
    """Three fifths of the rows for training, one for val, one for test."""
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, function)()
    rows, labels = torch.from_numpy(bunch.data).float(), torch.from_numpy(bunch.target).long()
    fifth = round(len(labels) / 5)
    order = stratified_order(labels, SPLIT_SEED).split([len(labels) - 2 * fifth, fifth, fifth])
    train, val, test = ((rows[chosen], labels[chosen]) for chosen in order)
    return train, val, test, tuple(map(str, bunch.target_names))


def _glyphs(
    size: int | None,
    seed: int,
    at_least: int,
    *,
    count: int,
    difficulty: float,
    domain: str,
    classes: str,
    val_size: int | None = None,
    test_size: int | None = None,
) -> tuple[Part, Part, Part, tuple[str, ...]]:
    names = tuple(glyphs.CLASSES.get(classes, ()))
    held_out = count // 6
    size = 28 if size is None else size
    glyphs.check_knobs(count=count, size=size, difficulty=difficulty, domain=domain, classes=classes)
    if held_out < len(names):
        raise ValueError(f"count is {count}; it must be at least {6 * len(names)}: one image a class in each split")
    sizes = [
        max(count - 2 * held_out, at_least),
        held_out if val_size is None else val_size,
        held_out if test_size is None else test_size,
    ]
    for argument, n in (("val_size", sizes[1]), ("test_size", sizes[2])):
        if not isinstance(n, int) or n < len(names):
            raise ValueError(
                f"{argument} is {n!r}; it must be a whole number, at least {len(names)}: one image a class"
            )
    parts = []
    for stream, n in enumerate(sizes):  # a stream of its own: never the same image
        images, labels = glyphs.generate(
            n, size=size, seed=(seed, stream), difficulty=difficulty, domain=domain, classes=classes
        )
        parts.append((torch.from_numpy(images), torch.from_numpy(labels)))
    return parts[0], parts[1], parts[2], names


def _hold_out(official: Part, share: float) -> tuple[Part, Part]:
    """Splits the official training set into train and a fixed, class-balanced val."""
    images, labels = official
    rarest = labels.bincount().min().item()
    if rarest < 2:
        raise ValueError("every class needs at least 2 training images: one of them is kept for validation")
    order = stratified_order(labels, SPLIT_SEED)
    cut = max(round(len(labels) * share), len(labels.unique()))
    val, train = order[:cut], order[cut:]
    return (images[train], labels[train]), (images[val], labels[val])


def _few(train: Part, count: int, seed: int, classes: int) -> Part:
    images, labels = train
    if not classes <= count <= len(labels):
        raise ValueError(
            f"train_size is {count}; it must be {classes} (one for each class) to {len(labels)} (the whole train split)"
        )
    rows = stratified_order(labels, seed)[:count]
    return images[rows], labels[rows]
