"""The recorded studies of the chapters, one module each (``course_lib/lab/studies.py`` runs them), and their data."""

from dataclasses import replace

import torch

from course_lib.lab.data import Dataset, DataUnavailable, load
from course_lib.lab.runtime import data_folder

CIFAR10_IMAGES = "cifar10-images"


def mnist(train_size: int, val_size: int = 1000) -> Dataset:
    """MNIST with so many labels; validation on the first images of its split, test on all 10,000."""
    return _with_val(load("mnist", train_size=train_size), "mnist", val_size)


def cifar10(train_size: int, val_size: int = 1000) -> Dataset:
    """CIFAR-10 with so many labels, from the folder ``cifar10-images`` of JPEG files in the data folder.

    Raises
    ------
    DataUnavailable : the folder is not there; the message says what should lie in it.
    """
    folder = data_folder() / CIFAR10_IMAGES
    if not folder.is_dir():
        raise DataUnavailable(
            f"{folder} is not there. The study needs CIFAR-10 as images, {CIFAR10_IMAGES}/train/<class>/*.jpg and "
            f"{CIFAR10_IMAGES}/test/<class>/*.jpg, in the data folder (COURSE_DATA)"
        )
    return _with_val(load(f"folder:{folder}", train_size=train_size), "cifar10, as JPEG", val_size)


def _with_val(data: Dataset, name: str, size: int) -> Dataset:
    # A name without the folder's path: rows are the same wherever the data lie
    return replace(data, name=name, val=data.val.subset(torch.arange(size)))
