"""A CUDA device that is not there: what the code does with devices is checked on a machine without a GPU.

    with emulated_cuda():                    # tensors "on the GPU" lie in main memory, and say that they are on cuda:0
        model.cuda()(x.cuda())

Tensors there are wrappers around tensors of the CPU, which does the work, so results are the CPU's; what a GPU would
refuse is refused: operands on two devices, ``numpy()`` of a tensor over there, a mask or an index that stayed behind.
Nothing is learnt about speed, memory, kernels' rounding or streams: for these a GPU is needed, and their tests wait for
one (``pytest -m gpu``).

It rests on torch's hook for devices that are written in Python (``_setup_privateuseone_for_python_backend``), on a
dispatch mode (what computes) and a function mode (what is said: ``cuda:0``).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
SAID = torch.device("cuda", 0)
TRANSFERS = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
TAKES_NUMBERS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.where.self}


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Change each leaf of nested lists, tuples and dicts (torch's own does so for all kinds of trees, slowly)."""
    kind = type(tree)
    if kind is list or isinstance(tree, tuple):
        found = [_mapped(change, branch) for branch in tree]
        return found if kind is list else kind(*found) if hasattr(tree, "_fields") else kind(found)
    if kind in (dict, OrderedDict):
        return kind((key, _mapped(change, branch)) for key, branch in tree.items())
    return change(tree)


class Elsewhere(Tensor):
    """A tensor that says it lies on the device; ``held`` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        """Return the wrapper: same shape, strides and type, other device, no numbers of its own."""
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=_device(),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """As a tensor of a GPU is printed."""
        return f"{repr(self.held)[:-1]}, device='{SAID}')"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is stored are the numbers."""
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with what is held."""
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation on the CPU; what belongs on the device comes back wrapped."""
    tensors: list[Tensor] = []
    _mapped(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, (args, kwargs))
    there = [each for each in tensors if isinstance(each, Elsewhere)]
    asked = kwargs.get("device")
    stays = not there if asked is None else torch.device(asked).type != _device().type
    if there:
        _check_devices(func, args, tensors)
    if not stays and any(isinstance(leaf, torch.Generator) for leaf in kwargs.values()):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    given = {name: torch.device("cpu") if name == "device" and asked is not None else kwargs[name] for name in kwargs}
    result = func(*_mapped(_held, args), **_mapped(_held, given))
    if func is aten.copy_.default:
        return args[0]
    if stays:
        return result
    wrapper = {id(each.held): each for each in there}  # what is changed in place stays the same tensor

    def wrap(leaf: Any) -> Any:
        if type(leaf) is not Tensor:
            return leaf
        return wrapper[id(leaf)] if id(leaf) in wrapper else Elsewhere(leaf)

    wrapped = _mapped(wrap, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Elsewhere) else leaf


def _check_devices(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Refuse what CUDA refuses; a number of the CPU may take part where the operation works number by number."""
    if func in TRANSFERS:
        return
    if func in INDEXING and isinstance(args[0], Elsewhere):
        tensors = [each for each in args[2:] if isinstance(each, Tensor)]  # indices of the CPU are copied by torch
    numbers = torch.Tag.pointwise in func.tags or func in TAKES_NUMBERS or func in INDEXING
    if any(not isinstance(each, Elsewhere) and not (numbers and each.dim() == 0) for each in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {SAID} and cpu! ({func})"
        )


class _Computes(TorchDispatchMode):
    """Tensors that are made on the device, or copied to it, have no wrapper among their arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Says(TorchFunctionMode):
    """Wherever ``cuda`` is asked for, the device is meant; and it calls itself ``cuda:0``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PROPERTIES and isinstance(args[0], Elsewhere):
            return _PROPERTIES[func]
        if func is Tensor.cuda:
            return args[0].to(_device())
        if func is torch.device:
            return func(*args, **kwargs or {})
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):  # torch makes them below all modes
            return _made(func, args, dict(kwargs or {}))
        if func is Tensor.backward:  # what it calls is within the mode, too
            with self:
                return _backward(*args, **kwargs or {})
        if func == Tensor.data.__set__ and isinstance(args[0], Elsewhere) and isinstance(args[1], Elsewhere):  # type: ignore[attr-defined]
            args[0].held = args[1].held
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # lists become tensors below all modes
            args = (args[0], _index(args[1]), *args[2:])
        args, kwargs = _mapped(_meant, args), _mapped(_meant, kwargs or {})
        if func in _IN_LOWER_PRECISION and torch.is_autocast_enabled("cuda"):
            args, kwargs = _mapped(_lowered, args), _mapped(_lowered, kwargs)
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def _backward(
    loss: Tensor, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> None:
    torch.autograd.backward(loss, gradient, retain_graph, create_graph, inputs=inputs)


def _index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_index(part) if isinstance(part, list) else part for part in index)
    return torch.tensor(index, dtype=None if index else torch.int64) if isinstance(index, list) else index


_IN_LOWER_PRECISION = {
    *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, F.multi_head_attention_forward),
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__),
}  # what `torch.autocast` computes in its type, among what is used here


def _lowered(leaf: Any) -> Any:
    there = isinstance(leaf, Elsewhere) and leaf.dtype == torch.float32
    return leaf.to(torch.get_autocast_dtype("cuda")) if there else leaf


def _made(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Make a tensor of numbers on the CPU, and then bring it where it is asked for."""
    where = kwargs.pop("device", args[0].device if func is Tensor.new_tensor else None)
    if func is Tensor.new_tensor:
        func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype} | kwargs
    wanted = kwargs.pop("requires_grad", False)
    made = (
        args[0] if isinstance(args[0], Tensor) and func is torch.as_tensor else func(*_mapped(_brought, args), **kwargs)
    )
    made = made.to(device=made.device if where is None else _meant(where), dtype=kwargs.get("dtype", made.dtype))
    return made.requires_grad_() if wanted else made


def _brought(leaf: Any) -> Any:
    return leaf.detach().cpu() if isinstance(leaf, Elsewhere) else leaf


_PROPERTIES = {Tensor.device.__get__: SAID, Tensor.is_cuda.__get__: True, Tensor.get_device: 0}  # type: ignore[attr-defined]


def _meant(leaf: Any) -> Any:
    if isinstance(leaf, torch.device) and leaf.type == "cuda":
        return _device()
    return _device() if isinstance(leaf, str) and leaf in ("cuda", "cuda:0") else leaf


def _applied(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As ``nn.Module._apply``; a parameter that moves stays the same object, but where a graph still holds it."""
    keeps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _apply(module, fn, recurse)
    except RuntimeError as error:
        if "Couldn't swap" not in str(error):
            raise
        torch.__future__.set_swap_module_params_on_conversion(False)
        return _apply(module, fn, recurse)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(keeps)


def _loaded(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
    """As ``torch.load``; what is to come to the device comes there after it was read."""
    place = _meant(map_location)
    if place is map_location:
        return _load(file, map_location=map_location, **kwargs)
    read = _load(file, map_location="cpu", **kwargs)
    return _mapped(lambda leaf: leaf.to(place) if isinstance(leaf, Tensor) else leaf, read)


_apply, _load = nn.Module._apply, torch.load


class _Backend(_DummyBackendModule):
    """What torch asks a device's module for; it stays registered, so ``torch.utils.checkpoint`` asks it later, too."""

    def get_rng_state(self, *_: Any) -> Tensor:
        """The processor draws."""
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None:
        """Nothing: whoever sets this sets the processor's as well."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """The types of ``torch.autocast``."""
        return [torch.bfloat16, torch.float16]


@cache
def _device() -> torch.device:
    _setup_privateuseone_for_python_backend("elsewhere", _Backend())
    return torch.device("elsewhere", 0)


@contextlib.contextmanager
def emulated_cuda() -> Iterator[None]:
    """Have a device ``cuda:0`` within; tensors there are for use within, too."""
    _device()
    nothing: dict[str, Any] = {
        name: lambda *_, **__: None
        for name in ("synchronize", "empty_cache", "manual_seed_all", "set_device", "reset_peak_memory_stats")
    }
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "current_stream": mock.MagicMock(),
        "Stream": mock.MagicMock(),
        "stream": lambda *_: contextlib.nullcontext(),
        "get_device_properties": lambda *_: SimpleNamespace(name="emulated", total_memory=2**34),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_name": lambda *_: "emulated",
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    one_thread = torch.autograd.set_multithreading_enabled(False)  # another thread would not know of the modes
    moves = mock.patch.object(nn.Module, "_apply", _applied)
    reads = mock.patch.object(torch, "load", _loaded)
    with mock.patch.multiple(torch.cuda, **nothing, **answers), moves, reads, one_thread, _Computes(), _Says():
        yield
