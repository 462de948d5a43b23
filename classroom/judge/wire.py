"""Plain data over a pipe, never pickle: frames of JSON; tensors and arrays as dtype, shape and bytes.

What travels: None, booleans, numbers, strings, ``...``, tensors, arrays, tuples, lists, sets and dicts of these. A
function travels as a number, and a call of it comes back over the pipe. A recipe, and what stands in its slots,
travels as the names of classes and functions of `NAMESPACES` with plain values: it is rebuilt from them, never
unpickled.
"""

import base64
import dataclasses
import functools
import importlib
import json
import struct
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch

LARGEST = 32 * 2**20  # bytes of one message
HEAD = struct.Struct("<I")  # before each: its length
DESIGNED = ("named", "partial", "made")  # what only a design holds

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip

# What a design may name: the course's techniques, and the parts of torch that only compute
NAMESPACES = (
    "course_lib.lab.training", "course_lib.lab.models", "course_lib.lab.data.dataset", "course_lib.optimizers",
    "course_lib.schedules", "course_lib.regularization", "course_lib.early_stopping", "course_lib.batching",
    "course_lib.preprocessing", "course_lib.pruning", "course_lib.distillation", "course_lib.merging",
    "course_lib.capstone.networks", "course_lib.capstone.recipes", "course_lib.capstone.rules",
    "course_lib.capstone.rungs", "torch.optim", "torch.nn.modules",
)  # fmt: skip
# What is partly filled in by a public function of these modules, such as ``schedule(cosine)``
FILLED_IN = {
    "course_lib.schedules.shapes:_scheduled", "course_lib.schedules.plateau:_on_plateau",
    "course_lib.schedules.by_layer:_layer_rates", "course_lib.preprocessing.pipeline:_labelled",
    "course_lib.preprocessing.pipeline:_unlabelled", "course_lib.batching.growing:_grown",
    "course_lib.batching.drawing:_hardest",
}  # fmt: skip


class Unfit(Exception):
    """A value that cannot travel."""


def send(stream: IO[bytes], message: dict[str, Any]) -> None:
    """Write one message.

    Raises
    ------
    Unfit : it is longer than `LARGEST`.
    """
    raw = json.dumps(message).encode()
    if len(raw) > LARGEST:
        raise Unfit(f"{len(raw):,} bytes, and {LARGEST:,} may travel")
    stream.write(HEAD.pack(len(raw)) + raw)
    stream.flush()


# Encoding


def encode(value: Any, functions: list[Callable[..., Any]] | None = None) -> Any:
    """``value`` as JSON; a function in it is added to ``functions`` and travels as its place there.

    Raises
    ------
    Unfit : it holds what cannot travel.
    """
    if value is None or isinstance(value, (bool, np.bool_)):
        return value if value is None else bool(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, np.integer)):
        return {"i": str(int(value))}
    if isinstance(value, (float, np.floating)):
        return {"f": float(value).hex()}
    if value is ...:
        return {"dots": 1}
    if isinstance(value, torch.Tensor):
        return _encoded_tensor(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "bifu":
        raw = np.ascontiguousarray(value).tobytes()
        return {"a": base64.b64encode(raw).decode(), "d": value.dtype.str, "s": list(value.shape)}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [encode(part, functions) for part in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [encode(part, functions) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, functions), encode(part, functions)] for key, part in value.items()]}
    if (described := _described(value)) is not None:
        return described
    if callable(value) and functions is not None and not isinstance(value, torch.nn.Module):
        functions.append(value)
        return {"call": len(functions) - 1}
    raise Unfit(type(value).__name__)


def _encoded_tensor(value: torch.Tensor) -> dict[str, Any]:
    # A copy, for `contiguous` leaves one number with the strides of where it was taken from
    data = value.detach().cpu().resolve_conj().clone(memory_format=torch.contiguous_format)
    raw = data.flatten().view(torch.uint8).numpy().tobytes() if data.numel() else b""
    dtype = str(data.dtype).removeprefix("torch.")
    return {"t": base64.b64encode(raw).decode(), "d": dtype, "s": list(data.shape), "g": bool(value.requires_grad)}


def _described(value: Any) -> dict[str, Any] | None:
    """A recipe, or what stands in a slot of one, by names and values; None for what has no such description."""
    if isinstance(value, functools.partial):
        of = _described(value.func)
        if of is None or "named" not in of:
            raise Unfit(f"partial of {value.func!r:.60}")
        return {"partial": of["named"], "a": encode(value.args), "k": encode(value.keywords)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and _allowed(type(value).__module__):
        slots = {slot.name: getattr(value, slot.name) for slot in dataclasses.fields(value) if slot.init}
        return {"made": f"{type(value).__module__}:{type(value).__name__}", "k": encode(slots)}
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if callable(value) and isinstance(module, str) and _allowed(module) and name.isidentifier():
        return {"named": f"{module}:{name}"}
    return None


# Decoding: what arrives may have been made up


def decode(said: Any, stub: Callable[[int], Any] | None = None, *, designs: bool = False) -> Any:
    """The value that `encode` wrote; a function in it is ``stub(its place)``.

    Parameters
    ----------
    designs : whether classes and functions may be named. Only where nothing but such a design runs: see `trial`.

    Raises
    ------
    Unfit, KeyError, TypeError, ValueError, RuntimeError, RecursionError : no value was encoded so.
    """
    if said is None or isinstance(said, (bool, str)):
        return said
    if not isinstance(said, dict) or not said:
        raise _unreadable(said)
    kind, body = next(iter(said.items()))
    again = functools.partial(decode, stub=stub, designs=designs)
    if kind == "i":
        return int(body[:400])
    if kind == "f":
        return float.fromhex(body)
    if kind == "dots":
        return ...
    if kind == "t":
        return _decoded_tensor(said)
    if kind == "a":
        return np.frombuffer(base64.b64decode(body), dtype=_plain(said["d"])).reshape(said["s"]).copy()
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(map(again, body))
    if kind == "set":
        return set(map(again, body))
    if kind == "dict":
        return {again(key): again(part) for key, part in body}
    if kind == "call" and stub is not None:
        return stub(body)
    if kind in DESIGNED and designs:
        return _rebuilt(kind, body, said)
    raise _unreadable(said)


def _decoded_tensor(said: dict[str, Any]) -> torch.Tensor:
    dtype, raw = DTYPES[said["d"]], bytearray(base64.b64decode(said["t"]))
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    made = flat.reshape(said["s"]).clone()
    return made.requires_grad_(said["g"]) if made.is_floating_point() else made


def _rebuilt(kind: str, path: str, said: dict[str, Any]) -> Any:
    if kind == "named":
        return named(path)
    if kind == "partial":
        return functools.partial(named(path), *decode(said["a"], designs=True), **decode(said["k"], designs=True))
    cls = named(path)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise _unreadable(said)
    return cls(**decode(said["k"], designs=True))


def named(path: str) -> Callable[..., Any]:
    """The function or class at ``module:name``.

    Only modules of `NAMESPACES` are imported, and the thing must be defined there: what a module merely imported
    (``os``, ``torch.load``) cannot be reached through it.

    Raises
    ------
    Unfit : it may not be named.
    """
    module, _, name = str(path).partition(":")
    if not _allowed(module) or not name.isidentifier() or (name.startswith("_") and path not in FILLED_IN):
        raise Unfit(f"{path:.60}")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found) or getattr(found, "__module__", "") != module:
        raise Unfit(f"{path:.60}")
    return found


def _allowed(module: str) -> bool:
    return any(module == space or module.startswith(f"{space}.") for space in NAMESPACES)


def _plain(name: str) -> np.dtype[Any]:
    if np.dtype(name).kind not in "bifu":
        raise _unreadable(name)
    return np.dtype(name)


def _unreadable(said: object) -> Unfit:
    return Unfit(f"{said!r:.40}")
