r"""A network cut by memory: what is not needed now lies far away, on disk or in the memory of the processor.

==========================  ===============================================  ===========================================
name                        what it does                                     source
==========================  ===============================================  ===========================================
``Store``                   keeps tensors far away, and counts what is near
``disk_store``,             such a store: files mapped into memory; or       –
``host_store``              the processor's memory, beside a GPU
``OffloadedSequential``     inference with the weights of the layers at      Rajbhandari et al. 2021 (ZeRO-Infinity),
                            work alone, the next ones on their way           arXiv:2104.07857
``offload_activations``     what backward needs, kept far until then         Rhu et al. 2016 (vDNN), arXiv:1602.08124
``OffloadedOptimizer``      the optimizer's state, near for one parameter    Ren et al. 2021 (ZeRO-Offload),
                            at a time                                        arXiv:2101.06840
``peak_bytes``              what of a chain is near at most
``overlap_timeline``,       when each layer is loaded and used; how long     –
``overlap_time``            it takes with and without prefetching
``measure_offload``         the same, on this machine
==========================  ===============================================  ===========================================

What is computed does not change by a bit: numbers are moved, not rounded. What changes is where they lie and how long
it takes. Chapter 4's checkpointing saves the same activations by computing them twice.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.timing import compare_speed, measure

# --- The far store ----------------------------------------------------------------------------------------------------

Allocate = Callable[[int], Tensor]
"""Bytes -> far memory of that size, a tensor uint8 ``[bytes]``."""


class Store:
    """Tensors kept far away by key. A copy of one comes near, and goes again; both sides are counted, in bytes.

    Attributes
    ----------
    far : bytes that it keeps now.
    near, peak : bytes of the copies that are near now, and the most that ever were.
    """

    def __init__(self, allocate: Allocate) -> None:
        self.far = self.near = self.peak = 0
        self._allocate = allocate
        self._kept: dict[Hashable, Tensor] = {}
        self._home: dict[Hashable, torch.device] = {}
        self._out: dict[Hashable, int] = {}
        self._lock = threading.RLock()  # backward on a GPU runs in a thread of its own

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def put(self, key: Hashable, tensor: Tensor, home: torch.device | None = None) -> None:
        """Keep a copy of a tensor far away; one of the same key and kind is written over in its place.

        Near copies will be on ``home``, by default where the tensor is now.
        """
        with self._lock:
            old = self._kept.get(key)
            if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
                self.drop(key)
                memory = self._allocate(tensor.nbytes)
                self._kept[key] = memory.view(tensor.dtype).view(tensor.shape)
                self.far += tensor.nbytes
            self._home[key] = home or tensor.device
            self._kept[key].copy_(tensor.detach())

    def room(self, key: Hashable) -> Tensor:
        """Make room near for a copy, where the tensor came from: it counts from now on, though nothing is in it."""
        with self._lock:
            far = self._kept[key]
            self._out[key] = self._out.get(key, 0) + far.nbytes
            self.near += far.nbytes
            self.peak = max(self.peak, self.near)
            return torch.empty(far.shape, dtype=far.dtype, device=self._home[key])

    def fetch(self, key: Hashable) -> Tensor:
        """Return a near copy. It counts until ``release``."""
        return self.room(key).copy_(self._kept[key])

    def release(self, key: Hashable) -> None:
        """Count the near copies of a key no longer; whoever holds one lets it go."""
        with self._lock:
            self.near -= self._out.pop(key, 0)

    def drop(self, key: Hashable) -> None:
        """Forget a tensor, here and there. One that is not kept is no error."""
        with self._lock:
            self.release(key)
            self._home.pop(key, None)
            if (far := self._kept.pop(key, None)) is not None:
                self.far -= far.nbytes

    def view(self, key: Hashable) -> Tensor:
        """Return the far tensor itself, of which no byte is near until it is read."""
        return self._kept[key]

    def clear(self) -> None:
        """Forget all."""
        for key in [*self._kept]:
            self.drop(key)


@contextlib.contextmanager
def disk_store(folder: str | Path | None = None) -> Iterator[Store]:
    """Yield a store whose tensors are files, mapped into memory: the system reads and writes them in pages.

    They lie in a temporary folder of their own inside ``folder`` (the system's by default), which is gone when the
    block ends, however it ends. What shall stay has to be saved or copied before. ``lab.peak_memory`` takes mapped
    files for memory; the store's own counts tell the two apart.
    """
    with tempfile.TemporaryDirectory(dir=folder) as place:
        numbers = itertools.count()

        def mapped(size: int) -> Tensor:
            if not size:
                return torch.empty(0, dtype=torch.uint8)  # no file of no bytes can be mapped
            path = Path(place) / f"{next(numbers)}.bin"
            memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
            # A file without a name lives while it is mapped, and no longer. Where a mapped file cannot lose its name
            # (Windows), the folder's end removes it.
            with contextlib.suppress(OSError):
                path.unlink()
            return memory

        store = Store(mapped)
        try:
            yield store
        finally:
            store.clear()


@contextlib.contextmanager
def host_store() -> Iterator[Store]:
    """Yield a store in the processor's memory, pinned where there is a GPU so that copies run beside computation."""
    pinned = torch.cuda.is_available()
    store = Store(lambda size: torch.empty(size, dtype=torch.uint8, pin_memory=pinned))
    try:
        yield store
    finally:
        store.clear()


# --- Weights ----------------------------------------------------------------------------------------------------------


class OffloadedSequential(nn.Module):
    """A chain of layers whose weights lie in a store; near are those at work and the next ``prefetch`` alone.

    It answers as ``nn.Sequential(*layers)`` does in evaluation mode, bit for bit, and cannot be trained. Layers without
    weights go with the layer before them. The layers that were given stay as they are: let go of them, and their memory
    is free.

    Parameters
    ----------
    prefetch : layers that a thread loads meanwhile; with 0 each is loaded when it is needed.
    device : where the layers compute; by default where they are.

    Raises
    ------
    ValueError : there are no layers, or ``prefetch`` is negative.
    """

    def __init__(
        self, layers: Iterable[nn.Module], store: Store, prefetch: int = 1, device: torch.device | None = None
    ) -> None:
        super().__init__()
        at_least(0, prefetch=prefetch)
        grouped = _by_weights(layers)
        require("layers", grouped, bool, "at least one layer")
        self.store, self.prefetch = store, prefetch
        self._names = [[*_tensors(stage)] for stage in grouped]
        for number, stage in enumerate(grouped):
            for key, tensor in zip(self._keys(number), _tensors(stage).values(), strict=True):
                store.put(key, tensor, device)
        # Layers without memory, which compute with the weights that they are handed. In a list, since to those who ask
        # for parameters there are none here.
        self._stages = [copy.deepcopy(stage).to("meta").eval() for stage in grouped]
        every = [key for number in range(len(grouped)) for key in self._keys(number)]
        weakref.finalize(self, _drop_all, store, every)

    def _keys(self, number: int) -> list[Hashable]:
        return [(id(self), number, name) for name in self._names[number]]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each layer with weights, in order: what ``peak_bytes`` needs."""
        return [sum(self.store.view(key).nbytes for key in self._keys(n)) for n in range(len(self._stages))]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """``[N, …]`` to what the last layer gives; the loader is always ``prefetch`` layers ahead."""
        count = len(self._stages)
        coming: deque[_Loading] = deque()
        with ThreadPoolExecutor(1) as loader:
            for number in range(min(self.prefetch, count)):
                coming.append(self._load(number, loader))
            for number, stage in enumerate(self._stages):
                if number + self.prefetch < count:
                    coming.append(self._load(number + self.prefetch, loader))
                loading = coming.popleft()
                loading.done.result()
                x = functional_call(stage, loading.weights, (x,), tie_weights=False)
                del loading  # the near copies themselves
                for key in self._keys(number):
                    self.store.release(key)
        return x

    def _load(self, number: int, loader: ThreadPoolExecutor) -> _Loading:
        """Make room for a layer's weights now, and let the loader fill it."""
        keys = self._keys(number)
        rooms = [self.store.room(key) for key in keys]
        far = [self.store.view(key) for key in keys]
        done = loader.submit(_fill, rooms, far, _free_from_now(rooms))
        return _Loading(dict(zip(self._names[number], rooms, strict=True)), done)


class _Loading(NamedTuple):
    """Room for a layer's weights by name, and when they are in it."""

    weights: dict[str, Tensor]
    done: Future[None]


def _by_weights(layers: Iterable[nn.Module]) -> list[nn.Sequential]:
    """Group each layer that has tensors with those behind it that have none."""
    groups: list[list[nn.Module]] = []
    for layer in layers:
        if not groups or _tensors(layer):
            groups.append([])
        groups[-1].append(layer)
    return [nn.Sequential(*group) for group in groups]


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's parameters and buffers by name; one that has two names under both."""
    return dict(
        itertools.chain(layer.named_parameters(remove_duplicate=False), layer.named_buffers(remove_duplicate=False))
    )


def _free_from_now(rooms: Sequence[Tensor]) -> torch.cuda.Event | None:
    """The moment from which the rooms' memory is free: before it a GPU may still compute with what was there."""
    on_gpu = [room for room in rooms if room.device.type == "cuda"]
    return torch.cuda.current_stream(on_gpu[0].device).record_event() if on_gpu else None


def _fill(rooms: Sequence[Tensor], kept: Sequence[Tensor], free: torch.cuda.Event | None) -> None:
    """Copy into the rooms; to a GPU in a stream of its own, beside what it computes."""
    stream = torch.cuda.Stream(rooms[0].device) if free is not None else None
    with torch.cuda.stream(stream):
        if stream is not None and free is not None:
            stream.wait_event(free)
        for room, far in zip(rooms, kept, strict=True):
            room.copy_(far, non_blocking=True)
        if stream is not None:
            stream.synchronize()


def _drop_all(store: Store, keys: Iterable[Hashable]) -> None:
    for key in [*keys]:
        store.drop(key)


def peak_bytes(sizes: Sequence[int], prefetch: int = 1) -> int:
    r"""Return the most bytes of a chain that are near at once: :math:`\max_i\sum_{j=i}^{i+p} s_j`.

    The largest layer without prefetching, the largest two neighbours with ``prefetch=1``.

    Raises
    ------
    ValueError : there are no sizes, or ``prefetch`` is negative.
    """
    at_least(0, prefetch=prefetch)
    require("sizes", [*sizes], bool, "the bytes of at least one layer")
    return max(sum(sizes[i : i + prefetch + 1]) for i in range(len(sizes)))


# --- Activations ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def offload_activations(
    store: Store,
    *,
    apart: Iterable[Tensor] = (),
    smallest: int = 1024,
) -> Iterator[None]:
    """Within it, what autograd saves for backward goes to the store, and comes back when backward asks for it.

    Only the forward pass needs to be inside. Memory that several operations save is stored once; it is dropped with
    the graph. ``store.far`` counts what is there; what backward uses at the moment counts nowhere. torch's own
    ``torch.autograd.graph.save_on_cpu`` does the same for a GPU, once for each time that a tensor is saved.

    Parameters
    ----------
    apart : tensors that stay where they are: the parameters and buffers, which are near anyway.
    smallest : memory of fewer bytes stays, too.

    Raises
    ------
    ValueError : ``smallest`` is negative.
    """
    at_least(0, smallest=smallest)
    near = [*apart]  # held, so that no other memory gets the place of one that went
    places = {tensor.untyped_storage()._cdata for tensor in near}
    known: MutableMapping[tuple[int, int], _Kept] = weakref.WeakValueDictionary()

    def pack(tensor: Tensor) -> Tensor | _Packed:
        memory = tensor.untyped_storage()
        if memory._cdata in places or memory.nbytes() < smallest:
            return tensor
        key = memory._cdata, tensor._version  # written over since, it is another tensor
        kept = known.get(key)
        if kept is None:
            known[key] = kept = _Kept(store, memory)
        offset = int(tensor.storage_offset())
        return _Packed(kept, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def unpack(packed: Tensor | _Packed) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed.restore()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Kept:
    """Memory in the store, for as long as somebody holds this.

    A weak reference keeps the memory's identity, though not the memory: as long as this lives, no other memory can be
    taken for it.
    """

    def __init__(self, store: Store, memory: torch.UntypedStorage) -> None:
        self.store = store
        self.identity = StorageWeakRef(memory)
        empty = torch.empty(0, dtype=torch.uint8, device=memory.device)
        self.key = object()
        store.put(self.key, empty.set_(memory))  # all its bytes, whatever they are
        weakref.finalize(self, store.drop, self.key)


class _Packed(NamedTuple):
    """Memory in the store, and how a tensor lies in it."""

    kept: _Kept
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def restore(self) -> Tensor:
        """Return the tensor, near."""
        memory = self.kept.store.fetch(self.kept.key)
        self.kept.store.release(self.kept.key)
        return memory.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


# --- The optimizer's state --------------------------------------------------------------------------------------------


class OffloadedOptimizer(Optimizer):
    """Any optimizer, its state in a store; near is that of the one parameter that is being updated.

    >>> with disk_store() as store:
    ...     optimizer = OffloadedOptimizer(model.parameters(), torch.optim.AdamW, store, lr=1e-3)

    The weights come out bit for bit as without it. Schedules work as usual: settings are read from ``param_groups`` at
    each step. It is not for optimizers that look at several parameters at once, or compute gradients themselves
    (L-BFGS, SAM). ``state_dict`` is that of the plain optimizer, with the far tensors themselves in it: save or copy it
    while the store is there.

    Parameters
    ----------
    params : as for any optimizer; also groups, and pairs of name and parameter.
    optimizer_class : the optimizer, with its ``settings``.
    """

    def __init__(self, params: Any, optimizer_class: type[Optimizer], store: Store, **settings: Any) -> None:
        self.inner, self.store = optimizer_class(params, **settings), store
        self._parts: dict[Tensor, dict[str, Any]] = {}  # of each parameter's state: names; values that are no tensors
        self._keys: set[Hashable] = set()
        super().__init__([dict(group) for group in self.inner.param_groups], self.inner.defaults)
        weakref.finalize(self, _drop_all, store, self._keys)
        self._put_all_away()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Bring near the state of one parameter after the other, update both, and put the state away again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = {n: v for n, v in group.items() if n not in ("params", "param_names")}
            for p in group["params"]:
                if p.grad is not None:
                    self.inner.param_groups = [settings | {"params": [p]}]
                    self._bring(p)
                    try:
                        self.inner.step()
                    finally:
                        self._put_all_away()
        return loss

    def _bring(self, p: Tensor) -> None:
        for name, value in self._parts.get(p, {}).items():
            key = (id(self), id(p), name)
            self.inner.state[p][name] = self.store.fetch(key) if key in self.store else value

    def _put_all_away(self) -> None:
        for p, state in self.inner.state.items():
            self._parts[p] = {name: None if isinstance(value, Tensor) else value for name, value in state.items()}
            for name, value in state.items():
                if isinstance(value, Tensor):
                    key = (id(self), id(p), name)
                    self.store.put(key, value)
                    self.store.release(key)
                    self._keys.add(key)
        self.inner.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parameters, in the form of the optimizer that is not offloaded."""
        self.inner.param_groups = self.param_groups
        for p, parts in self._parts.items():
            keys = {name: (id(self), id(p), name) for name in parts}
            state = {n: self.store.view(keys[n]) if keys[n] in self.store else value for n, value in parts.items()}
            self.inner.state[p].update(state)
        try:
            return self.inner.state_dict()
        finally:
            self.inner.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an optimizer, offloaded or not. Meanwhile all of it is near."""
        self.inner.param_groups = self.param_groups
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups
        _drop_all(self.store, self._keys)  # what the other state lacks is gone, as in torch's own optimizers
        self._keys.clear()
        self._parts.clear()
        self._put_all_away()


# --- How long it takes ------------------------------------------------------------------------------------------------


def overlap_timeline(
    load: Sequence[float],
    compute: Sequence[float],
    prefetch: int = 1,
) -> pd.DataFrame:
    r"""Return when each layer of a chain is loaded and used: seconds from the start, a row a layer.

    One loads, in order, one computes, in order, and at most ``prefetch`` p layers are near beside the one at work:

    .. math:: L_i = \max(L_{i-1},\ C_{i-p-1}) + l_i, \qquad C_i = \max(C_{i-1},\ L_i) + c_i

    are the ends of loading and computing. Columns ``load_start``, ``load_end``, ``compute_start``, ``compute_end``.

    Raises
    ------
    ValueError : there are no times, or as many of one as not of the other; one is negative, or ``prefetch`` is.
    """
    _check_times(load, compute, prefetch)
    rows: list[tuple[float, float, float, float]] = []
    for i, (loading, computing) in enumerate(zip(load, compute, strict=True)):
        room = rows[i - prefetch - 1][3] if i > prefetch else 0.0
        start = max(rows[-1][1] if rows else 0.0, room)
        begin = max(rows[-1][3] if rows else 0.0, start + loading)
        rows.append((start, start + loading, begin, begin + computing))
    columns = ["load_start", "load_end", "compute_start", "compute_end"]
    return pd.DataFrame(rows, columns=columns)


def _check_times(load: Sequence[float], compute: Sequence[float], prefetch: int) -> None:
    at_least(0, prefetch=prefetch)
    require("compute", [*compute], lambda c: len(c) == len(load) >= 1, f"as many seconds as load, {len(load)}, and one")
    for name, seconds in (("load", load), ("compute", compute)):
        require(name, [*seconds], lambda s: all(is_number(t) and t >= 0 for t in s), "numbers of at least 0")


def overlap_time(load: Sequence[float], compute: Sequence[float], prefetch: int = 1) -> float:
    r"""Return the seconds of a whole pass, see ``overlap_timeline``.

    Without prefetching :math:`\sum(l_i+c_i)`. With layers all alike and ``prefetch`` 1 or more it is
    :math:`l + (n-1)\max(l, c) + c`: the slower of the two sets the pace, and a second layer ahead gains nothing.
    """
    return float(overlap_timeline(load, compute, prefetch)["compute_end"].iloc[-1])


@dataclass(frozen=True)
class OffloadTimes:
    """How many times as long a pass takes with ``prefetch`` 0 as with 1, ``measured`` and ``predicted``.

    ``load`` and ``compute`` are the median seconds of one layer, each measured alone.
    """

    measured: float
    predicted: float
    load: float
    compute: float


def measure_offload(
    store: Store, *, width: int = 1024, depth: int = 6, batch_size: int = 256, rounds: int = 9
) -> OffloadTimes:
    """Measure what prefetching gains in a chain of ``depth`` linear layers of ``width`` units, on this machine.

    It gains most where loading takes as long as computing: a larger ``batch_size`` lengthens the one alone. Where the
    loader has no core to itself, the two take the time of each other. Medians of ``rounds``.

    Raises
    ------
    ValueError : an argument is no whole number of at least 1.
    """
    at_least(1, width=width, depth=depth, batch_size=batch_size, rounds=rounds)
    layers = [nn.Linear(width, width) for _ in range(depth)]
    x = torch.randn(batch_size, width)
    waiting, ahead = (OffloadedSequential(layers, store, prefetch) for prefetch in (0, 1))
    key = waiting._keys(0)[0]

    def load() -> None:
        store.fetch(key)
        store.release(key)

    with torch.no_grad():
        times = [measure(work, repeats=rounds, device=x.device).median for work in (load, lambda: layers[0](x))]
        speed = compare_speed(lambda: waiting(x), lambda: ahead(x), rounds=rounds, device=x.device)
    loading, computing = ([seconds] * depth for seconds in times)
    predicted = overlap_time(loading, computing, prefetch=0) / overlap_time(loading, computing, prefetch=1)
    return OffloadTimes(speed.ratio, predicted, *times)
