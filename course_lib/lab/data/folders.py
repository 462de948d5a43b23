"""``folder:PATH``: a user's own images, ``PATH/train/<class>/*`` and ``PATH/test/<class>/*``.

Decoding 60,000 small pictures takes half a minute, so what was read is kept as one file in the data folder, under the
fingerprint of the folder: names, sizes and modification times. A changed folder is read again, and so is a damaged
cache.

Pictures are turned upright as their camera noted. They are grey (one channel) if all of them are stored as grey, and
RGB otherwise; transparency is dropped. All must have one size, unless ``size`` is given: then each is resized to
``size`` × ``size`` as it is read, and its proportions may change.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from course_lib.lab.data.errors import DataDamaged
from course_lib.lab.data.files import workshop
from course_lib.lab.data.resizing import resize

_FORMAT = "1"  # part of the fingerprint: a cache written by other code is read anew


@dataclass(frozen=True)
class Pictures:
    """What a folder holds: images uint8 [N, C, H, W], labels int64 [N], for train/ and test/, and the class names."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]


def read_folder(path: Path, size: int | None, cache_folder: Path) -> Pictures:
    """All pictures under ``path``, from the cache if nothing has changed since they were last read.

    Raises
    ------
    ValueError : no such folder, no ``train/`` or ``test/``, no pictures, other classes in ``test/``, unequal sizes
    DataDamaged : a picture that cannot be read
    """
    _check_layout(path)
    fingerprint = _fingerprint(path, size)
    key = hashlib.sha256(f"{path.resolve()} {size}".encode()).hexdigest()[:16]
    cache = cache_folder / f"folder-{key}.npz"
    pictures = _read_cache(cache, fingerprint)
    if pictures is None:
        pictures = _decode(path, size)
        _write_cache(cache, fingerprint, pictures)
    return pictures


def _check_layout(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"name is 'folder:{path}', but there is no folder {path.resolve()}")
    found = ", ".join(sorted(p.name + "/" * p.is_dir() for p in path.iterdir())[:8]) or "nothing"
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise ValueError(
                f"{path} has no folder {part}/ (found: {found}); needed: train/<class>/* and test/<class>/*"
            )
        if not any(p.is_dir() for p in (path / part).iterdir()):
            raise ValueError(f"{path / part} holds no class folders; needed: {part}/<class>/*")
    train, test = ({p.name for p in (path / part).iterdir() if p.is_dir()} for part in ("train", "test"))
    if train != test:
        raise ValueError(
            f"train/ and test/ of {path} must hold the same classes; "
            f"only in train/: {sorted(train - test) or 'none'}, only in test/: {sorted(test - train) or 'none'}"
        )


# --- Decoding ---------------------------------------------------------------------------------------------------------


def _decode(path: Path, size: int | None) -> Pictures:
    from torchvision.datasets import ImageFolder

    arrays: list[Tensor] = []
    files: list[Path] = []
    labels: dict[str, Tensor] = {}
    for part in ("train", "test"):
        try:
            listing = ImageFolder(str(path / part))
        except FileNotFoundError as error:  # torchvision's words: which classes are empty, which endings it knows
            raise ValueError(f"{path / part} has a class without images. {error}") from error
        files += [Path(file) for file, _ in listing.samples]
        labels[part] = torch.tensor(listing.targets)
    for file in files:
        picture = _read_picture(file)
        arrays.append(picture if size is None else resize(picture[None], size)[0])
    _check_sizes(arrays, files)
    channels = max(len(a) for a in arrays)
    images = torch.stack([a.expand(channels, -1, -1) for a in arrays])
    train, test = images.split([len(labels["train"]), len(labels["test"])])
    return Pictures((train, labels["train"]), (test, labels["test"]), tuple(listing.classes))


def _read_picture(file: Path) -> Tensor:
    """uint8 [C, H, W]: C = 1 if the file stores grey, else 3."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16"):
                pixels = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
            else:
                pixels = np.array(picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB"))
    except Exception as error:  # a damaged picture may break its decoder in any way
        raise DataDamaged(f"{file} cannot be read as an image ({error}). Replace it or delete it.") from error
    tensor = torch.from_numpy(pixels)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


def _check_sizes(arrays: list[Tensor], files: list[Path]) -> None:
    sizes = [tuple(a.shape[1:]) for a in arrays]
    usual = max(set(sizes), key=lambda s: (sizes.count(s), s)) if len(set(sizes)) > 1 else sizes[0]
    odd = [i for i, s in enumerate(sizes) if s != usual]
    if odd:
        height, width = sizes[odd[0]]
        misfit = "which does not fit" if len(odd) == 1 else f"and {len(odd) - 1} more do not fit either"
        raise ValueError(
            f"images must all have one size: most are {usual[0]}×{usual[1]} (such as {files[sizes.index(usual)]}), "
            f"but {files[odd[0]]} is {height}×{width}, {misfit}. Pass size= to resize every image as it is read."
        )


# --- Cache ------------------------------------------------------------------------------------------------------------


def _fingerprint(path: Path, size: int | None) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {size}".encode())
    for line in sorted(_stamps(path)):
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stamps(path: Path) -> Iterator[str]:
    for folder, _, files in os.walk(path, followlinks=True):
        for file in files:
            stat = os.stat(os.path.join(folder, file))
            yield f"{os.path.relpath(os.path.join(folder, file), path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n"


def _read_cache(cache: Path, fingerprint: str) -> Pictures | None:
    if not cache.is_file():
        return None
    try:
        with np.load(cache, allow_pickle=False) as stored:  # the zip's checksums show any damage
            if str(stored["fingerprint"]) != fingerprint:
                return None
            train, test = (
                (torch.from_numpy(stored[f"{part}_images"]), torch.from_numpy(stored[f"{part}_labels"]))
                for part in ("train", "test")
            )
            return Pictures(train, test, tuple(map(str, stored["classes"])))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(cache: Path, fingerprint: str, pictures: Pictures) -> None:
    arrays = {
        f"{part}_{what}": t.numpy()
        for part in ("train", "test")
        for what, t in zip(("images", "labels"), getattr(pictures, part), strict=True)
    }
    try:
        with workshop(cache.parent, cache.stem) as partial:
            np.savez(
                partial / "new.npz", fingerprint=np.array(fingerprint), classes=np.array(pictures.classes), **arrays
            )
            os.replace(partial / "new.npz", cache)
    except OSError as error:  # a full disk or a data folder that may not be written: slower next time, not wrong
        warnings.warn(
            f"{cache} could not be written ({error}); the images will be decoded again next time", stacklevel=2
        )
