r"""Profiling: where the time of a training step goes, by operator, by kind of operator, by layer, and in its order.

==================  ======================================================  ===========================================
name                what it gives                                           source
==================  ======================================================  ===========================================
``record``          what happened in a few steps, as ``torch.profiler``     Kineto, the profiler inside torch
                    saw it
``profile_steps``   a table of operators: calls, seconds, share, flops,     ``torch.profiler``, its ``key_averages``
                    bytes
``by_kind``         the same summed by kind: products, element-wise, …
``by_layer``        seconds forward and backward of each named layer        ``record_function``; sequence numbers tie a
                                                                            backward operator to its forward one
``timeline``        one step as bars, nested by who called whom             Chrome's trace viewer, Perfetto
``draw_timeline``   those bars, drawn
==================  ======================================================  ===========================================

An operator's own seconds are those from its start to its end without the operators that it calls. What no operator
accounts for is *overhead*: Python, the autograd engine's bookkeeping, and on a GPU the time in which it waits. To look
costs time as well, about a microsecond an event, so a profile says where the time goes and never how long a step takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from course_lib.efficiency.operator_kinds import COLOURS, OVERHEAD, kind_of
from course_lib.lab import runtime
from course_lib.lab.arguments import at_least, require
from course_lib.lab.costs import Inputs
from course_lib.lab.timing import _without_profiler_chatter

STEP = "step of a recording"
LAYER = "layer: "
BETWEEN = "(between operators)"
OUTSIDE = "(outside the layers)"

# --- Events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something with a beginning and an end: an operator, a node of the backward pass, or a part that was named.

    Attributes
    ----------
    start, end : seconds on the profiler's clock.
    thread : on which it ran; what it calls runs on the same.
    sequence : the number that a forward operator shares with its node of the backward pass; -1 for none.
    allocated : bytes that it allocated itself, less what it released of them itself.
    device_seconds : what its own kernels took on a GPU; None where there is no GPU in the recording.
    """

    name: str
    start: float
    end: float
    thread: int = 0
    sequence: int = -1
    allocated: int = 0
    device_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """From start to end."""
        return self.end - self.start


@dataclass(frozen=True)
class Recording:
    """A few steps as the profiler saw them.

    Attributes
    ----------
    events : all that started within a step, the steps themselves (named ``STEP``) among them.
    flops : floating-point operations of one step, by operator.
    """

    events: tuple[Event, ...] = field(repr=False)
    flops: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def steps(self) -> tuple[Event, ...]:
        """The steps, in their order."""
        return tuple(sorted((e for e in self.events if e.name == STEP), key=lambda e: e.start))

    @property
    def seconds(self) -> float:
        """The mean length of a step, as it was while it was being looked at."""
        return sum(e.seconds for e in self.steps) / len(self.steps)


def parents(events: Sequence[Event]) -> list[int | None]:
    """Return for each event the index of the innermost one around it on its thread,
    None where there is none.
    """
    found: list[int | None] = [None] * len(events)
    open_: dict[int, list[int]] = {}  # of each thread, the outermost first
    by_start = sorted(enumerate(events), key=lambda pair: (pair[1].start, -pair[1].end))
    for index, event in by_start:
        around = open_.setdefault(event.thread, [])
        while around and not _holds(events[around[-1]], event):
            around.pop()
        found[index] = around[-1] if around else None
        around.append(index)
    return found


def _holds(outer: Event, inner: Event) -> bool:
    return inner.start < outer.end and inner.end <= outer.end


def self_seconds(events: Sequence[Event]) -> list[float]:
    """Return the seconds of each event without those of the events that it holds; on a
    GPU those of its own kernels.
    """
    left = [event.seconds for event in events]
    for event, parent in zip(events, parents(events), strict=True):
        if parent is not None:
            left[parent] -= event.seconds
    for index, event in enumerate(events):
        if event.device_seconds is not None:
            left[index] = event.device_seconds
    return left


# --- Recording --------------------------------------------------------------------------------------------------------


def record(
    fn: Callable[[], Any],
    steps: int = 3,
    *,
    warmup: int = 2,
    count_flops: bool = True,
    device: torch.device | str | None = None,
) -> Recording:
    """Run ``fn()`` under the profiler and return what happened in it.

    Parameters
    ----------
    fn : one step, such as a forward and a backward pass and the optimizer's. It is called ``warmup`` times before,
        ``steps`` times while it is looked at, and once more to count.
    count_flops : whether to count floating-point operations, by ``torch.utils.flop_counter``: those of products, of
        convolutions and of attention, forward and backward. Not possible inside ``torch.compile``.
    device : where it runs, the laboratory's by default. On CUDA the GPU's kernels are recorded too.
    """
    at_least(1, steps=steps)
    at_least(0, warmup=warmup)
    where = runtime.device() if device is None else torch.device(device)
    on_gpu = where.type == "cuda"
    for _ in range(warmup):
        fn()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with _without_profiler_chatter(), profile(activities=activities, profile_memory=True) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                fn()
                if on_gpu:
                    torch.cuda.synchronize(where)  # a step ends when its kernels have
    found = [_event(e, on_gpu) for e in profiler.events() or [] if e.device_type == DeviceType.CPU]
    return Recording(tuple(_within_steps(found)), counted_flops(fn) if count_flops else {})


def _event(e: Any, on_gpu: bool) -> Event:
    """torch's event in ours; its times are microseconds."""
    kernels = e.self_device_time_total * 1e-6 if on_gpu else None
    start, end = e.time_range.start * 1e-6, e.time_range.end * 1e-6
    return Event(e.name, start, end, e.thread, e.sequence_nr, e.self_cpu_memory_usage, kernels)


def _within_steps(events: Sequence[Event]) -> Iterator[Event]:
    steps = [e for e in events if e.name == STEP]
    for event in events:
        if event.name != "[memory]" and any(step.start <= event.start < step.end for step in steps):
            yield event


def counted_flops(fn: Callable[[], Any]) -> dict[str, int]:
    """Run ``fn()`` once and return the floating-point operations of its products, by operator, as in ``aten::mm``.

    ``FlopCounterMode``, with attention on a CPU added, which it passes over.
    """
    aten = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        fn()
    counts = counter.get_flop_counts().get("Global", {})
    return {str(operator).replace(".", "::", 1): int(flops) for operator, flops in counts.items()}


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query, key, value))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(grad, query, key, value))


# --- By operator and by kind ------------------------------------------------------------------------------------------


def profile_steps(
    fn: Callable[[], Any],
    steps: int = 3,
    *,
    warmup: int = 2,
    count_flops: bool = True,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Profile a few steps and return a table of their operators, the longest first; ``record`` has the arguments."""
    return by_operator(record(fn, steps, warmup=warmup, count_flops=count_flops, device=device))


def by_operator(recording: Recording) -> pd.DataFrame:
    """Return a table with a row for each operator of a recording, and one for what is between them.

    Columns, each of one step: ``kind``, ``calls``, ``seconds`` (its own), ``share`` of the step (they add up to 1),
    ``flops`` (0 where none are known; they stand at the operator that was called first, as ``aten::convolution``, whose
    kernel may have another name), ``bytes`` allocated. What ``aten::empty`` allocates for another operator is that
    operator's. Rows are sorted by seconds.
    """
    events, steps = recording.events, len(recording.steps)  # the property goes through all events
    rows: dict[str, dict[str, Any]] = {}
    for event, own, size in zip(events, self_seconds(events), _allocated(events), strict=True):
        kind = kind_of(event.name)
        if kind != OVERHEAD:
            row = rows.setdefault(event.name, _row(kind, recording.flops.get(event.name, 0)))
            row["calls"] += 1 / steps
            row["seconds"] += own / steps
            row["bytes"] += size / steps
    accounted = sum(row["seconds"] for row in rows.values())
    rows[BETWEEN] = _row(OVERHEAD) | {"seconds": max(recording.seconds - accounted, 0.0)}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("operator")
    table.insert(3, "share", table["seconds"] / table["seconds"].sum())
    return table.sort_values("seconds", ascending=False)


def _row(kind: str, flops: int = 0) -> dict[str, Any]:
    return {"kind": kind, "calls": 0.0, "seconds": 0.0, "flops": flops, "bytes": 0.0}


def _allocated(events: Sequence[Event]) -> list[int]:
    """Bytes that each allocated; those of an operator that only makes room belong to the operator that asked for it."""
    around = parents(events)
    found = [0] * len(events)
    for index, event in enumerate(events):
        owner = index
        while _makes_room(events[owner].name):
            above = around[owner]
            if above is None or kind_of(events[above].name) == OVERHEAD:
                break
            owner = above
        found[owner] += max(event.allocated, 0)
    return found


def _makes_room(name: str) -> bool:
    return name.startswith(("aten::empty", "aten::resize", "aten::new_empty"))


def by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of ``profile_steps`` summed by kind, with ``flops_per_second``, the longest first."""
    sums = table.groupby("kind")[["calls", "seconds", "share", "flops", "bytes"]].sum()
    sums["flops_per_second"] = sums["flops"] / sums["seconds"].clip(lower=1e-12)
    return sums.sort_values("seconds", ascending=False)


# --- By layer ---------------------------------------------------------------------------------------------------------


def _sum(y: Tensor) -> Tensor:
    return y.sum()


def by_layer(
    model: nn.Module,
    x: Inputs,
    *,
    objective: Callable[[Any], Tensor] = _sum,
    steps: int = 3,
    warmup: int = 1,
) -> pd.DataFrame:
    """Return the seconds of each named layer in a forward and a backward pass, in the order in which they are called.

    Columns, each of one step: ``forward``, ``backward``, ``seconds`` (both), ``share`` of the step. A block that holds
    layers has only what it does itself: a sum with a shortcut, attention between its projections. The last row is what
    lies outside: the objective, and adding up gradients. The model is copied, and taken in the mode that it is in.

    Parameters
    ----------
    x : an input, or a tuple of them, where the model is.
    objective : what the model gives -> a number, of which the gradient is taken; the sum by default.

    Raises
    ------
    ValueError : no parameter of the model wants a gradient.
    """
    plain, inputs = copy.deepcopy(model), x if isinstance(x, tuple) else (x,)
    require(
        "model", type(model).__name__, lambda _: any(p.requires_grad for p in model.parameters()), "one that trains"
    )

    def step() -> None:
        plain.zero_grad(set_to_none=True)
        objective(plain(*inputs)).backward()

    with named_layers(plain):
        found = record(step, steps, warmup=warmup, count_flops=False, device=inputs[0].device)
    return layer_table(found)


@contextmanager
def named_layers(model: nn.Module) -> Iterator[None]:
    """Let the profiler see each call of a layer under its name, by hooks that go when
    the block ends.
    """
    open_: list[record_function] = []
    hooks = []
    for name, layer in model.named_modules():

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            part = record_function(f"{LAYER}{name or '(the model)'}")
            part.__enter__()
            open_.append(part)

        def leave(*_: Any) -> None:
            open_.pop().__exit__(None, None, None)

        hooks += [
            layer.register_forward_pre_hook(enter),
            layer.register_forward_hook(leave, always_call=True),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def layer_table(recording: Recording) -> pd.DataFrame:
    """Return the table of ``by_layer`` out of a recording in which the layers were named by ``named_layers``."""
    events, around = recording.events, parents(recording.events)
    steps = len(recording.steps)  # the property goes through all events
    owners = _owners(events, around)
    rows: dict[str, dict[str, float]] = {name: {"forward": 0.0, "backward": 0.0} for name in _names(events)}
    for index, own in enumerate(self_seconds(events)):
        forward = _forward_layer(index, events, around)
        backward = None if forward else _backward_layer(index, events, around, owners)
        if forward or backward:
            rows[forward or backward or ""]["forward" if forward else "backward"] += own / steps
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["forward", "backward"]).rename_axis("layer")
    table["seconds"] = table["forward"] + table["backward"]
    rest = max(recording.seconds - table["seconds"].sum(), 0.0)
    table.loc[OUTSIDE] = [0.0, 0.0, rest]
    table["share"] = table["seconds"] / table["seconds"].sum()
    return table


def _names(events: Iterable[Event]) -> list[str]:
    in_order = sorted((e for e in events if e.name.startswith(LAYER)), key=lambda e: e.start)
    return list(dict.fromkeys(e.name.removeprefix(LAYER) for e in in_order))


def _upwards(index: int | None, around: Sequence[int | None]) -> Iterator[int]:
    while index is not None:
        yield index
        index = around[index]


def _forward_layer(index: int, events: Sequence[Event], around: Sequence[int | None]) -> str | None:
    names = (events[i].name for i in _upwards(index, around))
    return next((name.removeprefix(LAYER) for name in names if name.startswith(LAYER)), None)


def _owners(events: Sequence[Event], around: Sequence[int | None]) -> dict[int, str | None]:
    """Sequence number -> the layer whose forward pass made that node.

    An operator without a node of its own bears the number of the next one: so the last with a number is its owner.
    """
    found: dict[int, str | None] = {}
    for index in sorted(range(len(events)), key=lambda i: events[i].start):
        event = events[index]
        if event.sequence >= 0 and not any(_is_node(events[i].name) for i in _upwards(index, around)):
            found[event.sequence] = _forward_layer(index, events, around)
    return found


def _is_node(name: str) -> bool:
    return name.startswith("autograd::engine::evaluate_function")


def _backward_layer(
    index: int, events: Sequence[Event], around: Sequence[int | None], owners: dict[int, str | None]
) -> str | None:
    nodes = (events[i] for i in _upwards(index, around) if _is_node(events[i].name))
    return next((owners.get(node.sequence) for node in nodes), None)


# --- In its order -----------------------------------------------------------------------------------------------------


def timeline(recording: Recording, step: int = 0, *, shortest: float = 0.0) -> pd.DataFrame:
    """Return one step as bars: ``name``, ``kind``, ``start`` and ``end`` (seconds from the step's start), ``depth``
    (0 for what nobody called but the step, 1 for what that calls, …), ``thread``; in the order of their starts.

    Parameters
    ----------
    step : which, counted from 0.
    shortest : bars of fewer seconds are left out.

    Raises
    ------
    ValueError : there is no such step.
    """
    require("step", step, lambda n: n in range(len(recording.steps)), f"from 0 to {len(recording.steps) - 1}")
    whole = recording.steps[step]
    around = parents(recording.events)
    bars = []
    for index, event in enumerate(recording.events):
        if event.name == STEP or not whole.start <= event.start < whole.end or event.seconds < shortest:
            continue
        depth = sum(recording.events[i].name != STEP for i in _upwards(around[index], around))
        start, end = event.start - whole.start, event.end - whole.start
        bars.append((event.name.removeprefix(LAYER), kind_of(event.name), start, end, depth, event.thread))
    columns = ["name", "kind", "start", "end", "depth", "thread"]
    return pd.DataFrame(bars, columns=columns).sort_values(["start", "depth"], ignore_index=True)


def draw_timeline(bars: pd.DataFrame, ax: Axes | None = None, *, title: str = "", deepest: int = 4) -> Axes:
    """Draw the bars of ``timeline``, callers above what they call; time in milliseconds, a colour for each kind."""
    ax = ax if ax is not None else plt.subplots(figsize=(8, 2.6))[1]
    shown = bars[bars["depth"] <= deepest]
    for kind, colour in COLOURS.items():
        of_kind = shown[shown["kind"] == kind]
        places = zip(1e3 * of_kind["start"], 1e3 * of_kind["end"], of_kind["depth"], strict=True)
        corners = [_corners(*place) for place in places]
        if corners:
            ax.add_collection(PolyCollection(corners, label=kind, facecolor=colour, edgecolor="white", linewidth=0.3))
    ax.set(xlim=(0, 1e3 * bars["end"].max()), ylim=(shown["depth"].max() + 0.5, -0.5))
    ax.set(title=title, xlabel="milliseconds", ylabel="depth of calls")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    ax.grid(visible=False)
    return ax


def _corners(start: float, end: float, depth: int) -> list[tuple[float, float]]:
    return [(start, depth - 0.45), (end, depth - 0.45), (end, depth + 0.45), (start, depth + 0.45)]
