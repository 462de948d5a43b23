"""MNIST, Fashion-MNIST and CIFAR-10: found in the data folder, or downloaded there by torchvision.

A download happens in a folder of its own, torchvision checks every archive against its md5, and one ``os.replace``
moves the unpacked files into place. The layout is torchvision's (``MNIST/raw/train-images-idx3-ubyte`` …): files lying
there already are used as they are. Archives put there by hand (``MNIST/raw/*.gz``, ``cifar-10-python.tar.gz``) are used
instead of the network: that is how to bring a data set to a classroom on a memory stick.
"""

from __future__ import annotations

import http.client
import pickle
import queue
import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from course_lib.lab.data.errors import DataDamaged, DataUnavailable
from course_lib.lab.data.files import move_into_place, workshop

ANSWER_WITHIN = 8.0  # seconds: what a reachable server needs at most to answer, name look-up included
STALLED_AFTER = 30.0  # seconds without a byte: the download is given up

OFFLINE = "Data sets that work without a network: load('digits'), load('glyphs')."

Part = tuple[Tensor, Tensor]  # uint8 [N, C, H, W], int64 [N]


@dataclass(frozen=True)
class Real:
    """One downloadable data set: how torchvision names it, and what is known of it."""

    torchvision_name: str
    megabytes: int  # of the download
    classes: tuple[str, ...]
    val_share: float  # of the official training set

    @property
    def source(self) -> Any:
        """torchvision's class."""
        import torchvision.datasets

        return getattr(torchvision.datasets, self.torchvision_name)


REAL = {
    "mnist": Real("MNIST", 12, tuple("0123456789"), 1 / 6),
    "fashion_mnist": Real(
        "FashionMNIST",
        31,
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        1 / 6,
    ),
    "cifar10": Real(
        "CIFAR10",
        170,
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        1 / 10,
    ),
}


def read_real(name: str, folder: Path) -> tuple[Part, Part]:
    """Official training and test part of ``name`` from ``folder``, downloaded first if they are not there.

    Raises
    ------
    DataUnavailable : not there, and no download to be had
    DataDamaged : there, but a file of it cannot be right
    """
    if not _complete(name, folder):
        _download(name, folder)
    return _read_cifar10(folder) if name == "cifar10" else _read_idx(name, folder)


# --- Where the files lie ----------------------------------------------------------------------------------------------


def _home(name: str, folder: Path) -> Path:
    """The folder that holds a data set's files, and nothing else."""
    source = REAL[name].source
    return folder / source.base_folder if name == "cifar10" else folder / source.__name__ / "raw"


def _file_names(name: str) -> list[str]:
    source = REAL[name].source
    if name == "cifar10":
        return [file for file, _ in source.train_list + source.test_list] + [source.meta["filename"]]
    return [Path(archive).stem for archive, _ in source.resources]


def _complete(name: str, folder: Path) -> bool:
    return all((_home(name, folder) / file).is_file() for file in _file_names(name))


def _archives(name: str, folder: Path) -> list[Path]:
    source = REAL[name].source
    if name == "cifar10":
        return [folder / source.filename]
    return [_home(name, folder) / archive for archive, _ in source.resources]


# --- Download ---------------------------------------------------------------------------------------------------------


def _download(name: str, folder: Path) -> None:
    try:
        with workshop(folder, name) as partial:
            if _complete(name, folder):  # another process has just brought it, while we waited for the lock
                return
            brought = [archive for archive in _archives(name, folder) if archive.is_file()]
            for archive in brought:
                copy = partial / archive.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(archive, copy)
            if len(brought) < len(_archives(name, folder)):
                _require_a_server(name)
            with _socket_timeout(STALLED_AFTER):
                REAL[name].source(partial, train=True, download=True)
            for archive in _archives(name, partial):
                archive.unlink(missing_ok=True)  # its files are unpacked and checked: only they are kept
            move_into_place(_home(name, partial), _home(name, folder), partial)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        raise DataUnavailable(
            f"The data set {name!r} is not in {_home(name, folder)}, and downloading it "
            f"({REAL[name].megabytes} MB, from {_hosts(name)}) failed: {_first_line(error)}\n"
            f"Connect to the network and load it again, or put its files there (data/README.md says which). {OFFLINE}"
        ) from error


def _urls(name: str) -> list[str]:
    source = REAL[name].source
    return [source.url] if name == "cifar10" else [mirror + source.resources[0][0] for mirror in source.mirrors]


def _hosts(name: str) -> str:
    return " or ".join(urlsplit(url).netloc or url for url in _urls(name))


def _require_a_server(name: str) -> None:
    """Returns when one server answers; raises ``ConnectionError`` if none does within ``ANSWER_WITHIN`` seconds.

    torchvision itself waits without limit, for one server after the other. The threads are daemons because a name
    look-up cannot be interrupted: nobody should wait for it.
    """
    urls = _urls(name)
    answers: queue.Queue[Exception | None] = queue.Queue()

    def ask(url: str) -> None:
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_WITHIN):
                answers.put(None)
        except Exception as error:  # whatever it is, it is the reason to be told
            answers.put(error)

    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    reason: Exception | None = None
    try:
        for _ in urls:
            reason = answers.get(timeout=ANSWER_WITHIN)
            if reason is None:
                return
    except queue.Empty:
        reason = TimeoutError(f"no answer within {ANSWER_WITHIN:.0f} seconds")
    raise ConnectionError(f"no server answers ({reason})")


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _first_line(error: BaseException) -> str:
    return str(error).strip().replace("\n", "; ") or type(error).__name__


# --- Read -------------------------------------------------------------------------------------------------------------


def _read_idx(name: str, folder: Path) -> tuple[Part, Part]:
    from torchvision.datasets.mnist import read_image_file, read_label_file

    home, parts = _home(name, folder), []
    for prefix in ("train", "t10k"):
        images_file, labels_file = home / f"{prefix}-images-idx3-ubyte", home / f"{prefix}-labels-idx1-ubyte"
        with _damage_named(images_file, home):
            images = read_image_file(str(images_file)).unsqueeze(1)
        with _damage_named(labels_file, home):
            labels = read_label_file(str(labels_file))
            if len(labels) != len(images):
                raise ValueError(f"{len(labels)} labels for {len(images)} images")
            if len(labels) == 0 or labels.max() >= len(REAL[name].classes):
                raise ValueError(f"labels are not all between 0 and {len(REAL[name].classes) - 1}")
        parts.append((images, labels))
    return parts[0], parts[1]


def _read_cifar10(folder: Path) -> tuple[Part, Part]:
    from torchvision.datasets.utils import check_md5

    source, home = REAL["cifar10"].source, _home("cifar10", folder)
    parts = []
    for files in (source.train_list, source.test_list):
        images, labels = [], []
        for file, md5 in files:
            with _damage_named(home / file, home):
                if not check_md5(home / file, md5):  # before pickle gets to see it
                    raise ValueError("its md5 is not that of the original")
                with open(home / file, "rb") as stream:
                    batch = pickle.load(stream, encoding="latin1")
                images.append(np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32))
                labels.extend(batch["labels"])
        parts.append((torch.from_numpy(np.concatenate(images)), torch.tensor(labels)))
    return parts[0], parts[1]


@contextmanager
def _damage_named(file: Path, home: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file may break its parser in any way
        raise DataDamaged(
            f"{file} is damaged ({_first_line(error)}). To mend it, delete it and load again: "
            f"the data set is then downloaded anew into {home}."
        ) from error
