"""Fingerprints: one short word for all that a run depends on, the same in every process and on every machine.

``fingerprint(value)`` digests what is in a value, not where it lies or what it is called: two objectives made by the
same function with other temperatures differ, and so do two networks with other weights or two data sets of one name.
A checkpoint is taken up, and a recorded study believed, only where the fingerprints agree.

=======================================  ===============================================================================
what                                     goes in by
=======================================  ===============================================================================
numbers, words, containers, dataclasses  their type and contents
tensors, arrays, random generators       type, shape and bytes; the state
functions and classes written by you,    their source without comments and docstrings, defaults, the values they close
or in a chapter's module                 over, and the global names that they use (those again by all of this)
functions and classes of a library and   their names: a library's version is recorded beside a run, and a change of the
of the laboratory                        laboratory shows when a recorded epoch is repeated
networks                                 class, settings, structure, parameters and buffers
any other object                         what ``pickle`` would store of it
=======================================  ===============================================================================
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import struct
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

_LIBRARIES = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})
_BY_NAME = ("course_lib.lab", "course_lib.proving")
_OF_EVERY_NETWORK = frozenset(vars(nn.Module()))  # what torch keeps for itself in each
_GENERATED = "<"  # a file name such as <string>: methods that dataclasses write


class Unfingerprintable(TypeError):
    """A value that has no contents to speak of, such as an open file or a running generator."""


def fingerprint(value: Any) -> str:
    """32 hexadecimal digits that stand for the contents of ``value`` (see the table above).

    Raises
    ------
    Unfingerprintable : names the part of ``value`` that cannot be digested, and the way to it.
    """
    return _Digest().of(value).hex()


class _Digest:
    """One walk through a value; what was met before is not walked again."""

    def __init__(self) -> None:
        self.way: list[str] = []
        self.open: dict[int, int] = {}  # what is being walked through just now: a function may call itself
        self.done: dict[int, tuple[Any, bytes]] = {}  # with the object, so that its id stays its own

    def of(self, value: Any, name: str = "") -> bytes:
        """The digest of ``value``, reached by ``name``."""
        if id(value) in self.done:
            return self.done[id(value)][1]
        if id(value) in self.open:
            return _hash("again", len(self.open) - self.open[id(value)])
        self.way.append(name)
        self.open[id(value)] = len(self.open)
        try:
            found = self._digest(value)
        finally:
            del self.open[id(value)]
            self.way.pop()
        self.done[id(value)] = (value, found)
        return found

    def _digest(self, value: Any) -> bytes:
        match value:
            case None | bool() | int() | float() | complex() | str() | bytes() if type(value).__module__ == "builtins":
                return _hash(type(value).__name__, repr(value))
            case tuple() | list() if type(value) in (tuple, list):
                return _hash("sequence", *(self.of(part, f"[{k}]") for k, part in enumerate(value)))
            case dict() if type(value) is dict:
                pairs = (self.of(key) + self.of(part, f"[{key!r}]") for key, part in value.items())
                return _hash("mapping", *sorted(pairs))
            case set() | frozenset():
                return _hash("set", *sorted(self.of(part) for part in value))
            case enum.Enum():
                return _hash("enum", type(value).__qualname__, value.name)
            case PurePath():
                return _hash("path", value.as_posix())
            case torch.dtype() | torch.device() | torch.Size():
                return _hash("torch", str(value))
            case Tensor():
                return _of_tensor(value)
            case np.ndarray() | np.generic():
                if value.dtype.hasobject:
                    return _hash("objects", self.of(value.tolist()))
                return _hash("array", str(value.dtype), value.shape, np.ascontiguousarray(value).tobytes())
            case torch.Generator():
                return _hash("generator", value.get_state().numpy().tobytes())
            case functools.partial():
                return _hash("partial", self.of(value.func, ""), self.of(value.args), self.of(value.keywords))
            case types.MethodType():
                return _hash("method", self.of(value.__func__), self.of(value.__self__, "self"))
            case types.FunctionType():
                return self._of_function(value)
            case property():
                return _hash("property", *(self.of(f) for f in (value.fget, value.fset, value.fdel)))
            case functools.cached_property():  # it holds a lock, too
                return _hash("cached property", self.of(value.func))
            case struct.Struct():
                return _hash("struct", value.format)
            case staticmethod() | classmethod():
                return _hash(type(value).__name__, self.of(value.__func__))
            case types.ModuleType():
                return _hash("module", value.__name__)
            case type():
                return self._of_class(value)
            case nn.Module():
                return self._of_network(value)
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return _hash("dataclass", self.of(type(value)), *(self.of(v, f".{n}") for n, v in fields.items()))
        if isinstance(value, functools._lru_cache_wrapper):
            return self.of(value.__wrapped__)
        if isinstance(value, types.BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType):
            return _hash("builtin", _name(value))
        return self._of_object(value)

    def _of_function(self, function: types.FunctionType) -> bytes:
        if getattr(function, "hooked", False):  # torch wraps the step of an optimizer's class when the first is made
            function = function.__wrapped__  # type: ignore[attr-defined]
        if _is_library(function.__code__.co_filename, function.__module__):
            parts = [_hash("library", _name(function))]
            if "<locals>" not in function.__qualname__ and not hasattr(function, "__wrapped__"):
                return parts[0]
        elif function.__module__.startswith(_BY_NAME):
            parts = [_hash("laboratory", _name(function))]  # its defaults too are the laboratory's
        else:
            parts = [_hash("function", _source(function)), *self._of_globals(function)]
            parts += [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not filled yet
                continue
            if name != "__class__":  # the class that is being digested: super() needs it
                parts.append(self.of(content, f" -> {name} of {function.__qualname__}"))
        return _hash(*parts)

    def _of_globals(self, function: types.FunctionType) -> Iterator[bytes]:
        """The values of the global names that a function uses, and those it takes out of a chapter's module."""
        names, attributes = _names(function.__code__)
        for name in sorted(names & function.__globals__.keys()):
            value = function.__globals__[name]
            yield _hash(name, self.of(value, f" -> {name} used by {function.__qualname__}"))
            if isinstance(value, types.ModuleType) and not _is_library(getattr(value, "__file__", ""), value.__name__):
                for attribute in sorted(attributes & vars(value).keys()):
                    yield _hash(attribute, self.of(vars(value)[attribute], f" -> {name}.{attribute}"))

    def _of_class(self, cls: type) -> bytes:
        module = sys.modules.get(cls.__module__)
        if _is_library(getattr(module, "__file__", ""), cls.__module__) or cls.__module__.startswith(_BY_NAME):
            return _hash("class", _name(cls))
        parts = [_hash("class", cls.__qualname__), *(self.of(base) for base in cls.__bases__)]
        for name, member in sorted(vars(cls).items()):
            if getattr(member, "hooked", False) and member.__qualname__ != f"{cls.__qualname__}.{name}":
                continue  # the same wrapper, put on a class that only inherits its step
            code = getattr(member, "__code__", None)
            if code is None:
                counts = not name.startswith("__") and name != "_abc_impl"
            else:
                counts = not code.co_filename.startswith(_GENERATED)
            if counts or isinstance(member, staticmethod | classmethod | property):
                parts.append(_hash(name, self.of(member, f".{name}")))
        if dataclasses.is_dataclass(cls):
            parts += [_hash(f.name) for f in dataclasses.fields(cls)]
        return _hash(*parts)

    def _of_network(self, network: nn.Module) -> bytes:
        hooks = {**network._forward_pre_hooks, **network._forward_hooks}
        own = {name: v for name, v in vars(network).items() if name not in _OF_EVERY_NETWORK}
        parts = [self.of(type(network)), *(self.of(hook, " -> a hook") for hook in hooks.values())]
        parts += [_hash(name, self.of(own[name], f".{name}")) for name in sorted(own)]
        for held in (network._parameters, network._buffers, network._modules):
            parts += [_hash(name, self.of(part, f".{name}")) for name, part in held.items()]
        return _hash("network", *parts)

    def _of_object(self, value: Any) -> bytes:
        try:
            if isinstance(value, types.GeneratorType | types.CoroutineType):
                raise TypeError
            stored = value.__reduce_ex__(4)
        except Exception as error:
            way = "".join(part for part in self.way if part) or "the value"
            raise Unfingerprintable(
                f"{way.removeprefix(' -> ')} is {type(value).__qualname__}, of which there is no fingerprint: a run "
                "can depend on numbers, tensors, networks, data sets, functions and objects that pickle can store"
            ) from error
        if isinstance(stored, str):
            return _hash("named", type(value).__module__, stored)
        how, settings, state, items, pairs = (*stored, None, None, None)[:5]
        parts = [self.of(type(value)), self.of(how), self.of(settings), self.of(state, "")]
        parts += [self.of(list(items)) if items is not None else b"", self.of(dict(pairs)) if pairs else b""]
        return _hash("object", *parts)


def _hash(*parts: Any) -> bytes:
    """16 bytes for a sequence of texts, byte strings and plain values; where one ends and the next begins counts."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        found.update(len(content).to_bytes(8, "little"))
        found.update(content)
    return found.digest()


def _of_tensor(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu()
    if values.layout is not torch.strided or values.is_quantized:
        values = values.dequantize() if values.is_quantized else values.to_dense()
    if values.is_conj() or values.is_neg():
        values = values.resolve_conj().resolve_neg()
    content = values.contiguous().flatten().view(torch.uint8).numpy() if values.numel() else b""
    return _hash("tensor", str(tensor.dtype), tuple(tensor.shape), bytes(content))


_sources: WeakKeyDictionary[types.FunctionType, str] = WeakKeyDictionary()


def _source(function: types.FunctionType) -> str:
    """``_read_source``, once a function: a study's hundred arms use the same ones, and to parse them takes a while."""
    if function not in _sources:
        _sources[function] = _read_source(function)
    return _sources[function]


def _read_source(function: types.FunctionType) -> str:
    """The function's source without comments and docstrings; its bytecode where there is no source to be had.

    Bytecode holds for one version of Python only: enough for a checkpoint, not for a recorded study.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # typed into a prompt, or a lambda in the middle of an expression
        return _bytecode(function.__code__)
    if function.__name__ == "<lambda>":  # several may stand in one line
        return _bytecode(function.__code__)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _bytecode(code: types.CodeType) -> str:
    constants = [_bytecode(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars))


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The global names that a function and those within it use, and the attributes that they take of anything."""
    found = list(dis.get_instructions(code))
    names = {str(i.argval) for i in found if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    attributes = {str(i.argval) for i in found if i.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more_names, more_attributes = _names(inner)
            names, attributes = names | more_names, attributes | more_attributes
    return names, attributes


def _is_library(file: str | None, module: str) -> bool:
    if module.partition(".")[0] in ("course_lib", "__main__"):
        return False
    if not file:
        return module in sys.modules  # built in, or compiled
    return str(Path(file).resolve()).startswith(_LIBRARIES)


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None) or ''}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def describe(value: Any) -> str:
    """A setting in words that are the same in every process (a function's ``repr`` holds its address)."""
    if isinstance(value, functools.partial):
        settings = [describe(a) for a in value.args] + [f"{k}={describe(v)}" for k, v in value.keywords.items()]
        return f"{describe(value.func)}({', '.join(settings)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return repr(value)
