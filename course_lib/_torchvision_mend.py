"""Let torchvision be imported beside a CPU-only torch.

The torchvision wheel on the public index is compiled against the CUDA build of torch. Beside the CPU-only build its C++
extension cannot be loaded, and then ``import torchvision`` itself fails (``operator torchvision::nms does not exist``):
torchvision describes the shapes of ``nms`` and ``qnms`` without looking whether anyone has defined them. Defining the
two beforehand is all that is missing; transforms, models, datasets and utils use nothing else of the extension.

Nothing is touched where torchvision works by itself.
"""

import importlib.machinery
import importlib.util
import os
import sys

import torch
from torch import Tensor

_OPERATORS = ("nms", "qnms")
_keep_alive: list[torch.library.Library] = []  # torch takes the operators back when their Library is collected


def apply_if_needed() -> bool:
    """Define the missing operators where torchvision could not be imported without them; say whether that was so."""
    if "torchvision" in sys.modules or all(_is_defined(name) for name in _OPERATORS):
        return False
    spec = importlib.util.find_spec("torchvision")  # finds the package without importing it
    if spec is None or not spec.submodule_search_locations:
        return False
    if _extension_loads(spec.submodule_search_locations[0]):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        if not _is_defined(name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.impl(name, non_maximum_suppression, "CPU")
    _keep_alive.append(library)
    return True


def non_maximum_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes ``[N, 4]`` (x1, y1, x2, y2) to keep, best score first, greedily."""
    width_height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    area = width_height.prod(dim=1)
    remaining, kept = scores.argsort(descending=True, stable=True), []
    while len(remaining):
        best, remaining = remaining[0], remaining[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[remaining, :2])
        high = torch.minimum(boxes[best, 2:], boxes[remaining, 2:])
        overlap = (high - low).clamp(min=0).prod(dim=1)
        # overlap / union > threshold, without the division: boxes of no area then overlap nothing
        remaining = remaining[overlap <= iou_threshold * (area[best] + area[remaining] - overlap)]
    return torch.stack(kept) if kept else scores.new_empty(0, dtype=torch.long)


def _is_defined(operator: str) -> bool:
    return hasattr(torch.ops.torchvision, operator)


def _extension_loads(folder: str) -> bool:
    """Whether torchvision's own C++ part loads, tried as torchvision tries it (loading twice is harmless)."""
    if os.name == "nt":
        os.add_dll_directory(folder)  # type: ignore[attr-defined,unused-ignore]
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(folder, loader).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except (ImportError, OSError):
        return False
    return True
