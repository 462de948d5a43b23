r"""Where to cut a network: stages that take about as long as one another, at places where little is alive.

======================  ===================================================  =========================================
name                    what it does                                         source
======================  ===================================================  =========================================
``balanced_cuts``       the cuts of a chain whose slowest stage is fastest   PipeDream: Narayanan et al. 2019, SOSP,
                                                                             doi:10.1145/3341301.3359646
``bottleneck``          the time of the slowest stage or link of some cuts   the same
``chain``               a network of the laboratory as a list of layers      –
``flop_costs``          what each layer costs, counted                       –
``measure_costs``       … and measured, forward and backward                 PipeDream's profiler
``sent_bytes``          what each layer hands on to the next                 the same
``profile``             every operation of a network, and what is alive      torch.fx: Reed et al. 2021,
                        after it                                             arXiv:2112.08429
``live_bytes``          the same as a table                                  –
``measure_operations``  seconds of every operation                           –
``cut_graph``           stages of any network that can be traced, cut        torch.distributed.pipelining
                        through skip connections as well
``cut_at``              … where the named layers begin                       the same
``balance_table``       what the stages compute, hold, receive and send      –
``merge_states``        the network's state from those of its stages         –
======================  ===================================================  =========================================

A pipeline is as fast as its slowest part: in the time in which the slowest stage computes one micro-batch, or the
slowest link carries what goes across a cut, everybody else has to wait. So a good cut makes the *largest* stage small.
The backward pass costs nearly twice the forward pass in every layer, so that the forward pass alone finds it.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.costs import flops
from course_lib.lab.models import MLP, ConvNet, ResNet, ViT
from course_lib.lab.timing import measure
from course_lib.lab.tracing.operations import Inputs, operation, owner, place, tensors_in, trace

# --- A chain of layers ------------------------------------------------------------------------------------------------


def balanced_cuts(
    costs: Sequence[float],
    parts: int,
    *,
    sends: Sequence[float] | None = None,
    prefer: Sequence[float] | None = None,
) -> list[int]:
    r"""Cut a chain of n layers into ``parts`` stages so that the slowest stage or link is as fast as can be.

    .. math:: T_k(i) = \min_{j > i}\; \max\Big(\sum_{l=i}^{j-1} c_l,\; s_{j-1},\; T_{k-1}(j)\Big)

    is the least time of the slowest part if layers i to n - 1 make k stages, of which the first ends before layer j:
    every k and i is solved once, from the solutions of k - 1. Computing and sending overlap (a link carries one
    micro-batch while the stage computes the next), so the greater counts, not their sum. Source: PipeDream, Narayanan
    et al. 2019, doi:10.1145/3341301.3359646, for workers that are alike.

    Parameters
    ----------
    costs : what each of the n layers costs, in any unit of time.
    sends : n - 1 times, in the same unit: of sending what layer i hands on to layer i + 1, if they are cut apart.
        ``inf`` forbids that cut. By default nothing.
    prefer : n - 1 numbers; of cuts that are equally good, those at which they add up to least are taken, and then the
        first. By default ``sends``.

    Returns
    -------
    The first layer of each stage but the first: ``parts - 1`` rising numbers from 1 to n - 1.

    Raises
    ------
    ValueError : a cost is negative or no number, there are more parts than layers, a length is wrong, or ``sends``
        forbids so many cuts that there are not enough left.
    """
    layers, links, wishes = _checked_chain(costs, parts, sends, prefer)
    stage = _stage_costs(layers, links)  # [i, j]: of layers i … j - 1 and the link behind
    times = stage[:-1, -1]  # [i]: the slowest of k stages that hold layers i … n - 1
    for _ in range(parts - 1):
        slowest = np.maximum(stage[:-1, 1:-1], times[None, 1:])  # [i, j]: cut before j
        times = slowest.min(axis=1, initial=math.inf)
    if math.isinf(times[0]):
        raise ValueError(f"sends={list(links)}: leaves too few cuts for parts={parts}")
    least = times[0] * (1 + 1e-12)  # sums of the same numbers may differ in the last bit
    return _preferred(np.where(stage <= least, 0.0, math.inf), wishes, parts)


def _stage_costs(costs: np.ndarray, sends: np.ndarray) -> np.ndarray:
    """The time ``[i, j]`` of layers i to j - 1, or of the link behind them; infinite where there is no layer."""
    before = np.concatenate([[0.0], np.cumsum(costs)])
    link = np.concatenate([[0.0], sends, [0.0]])
    stage = np.maximum(before[None, :] - before[:, None], link[None, :])
    layers = np.arange(len(before))
    return np.where(layers[:, None] < layers[None, :], stage, math.inf)


def _preferred(fine: np.ndarray, wishes: np.ndarray, parts: int) -> list[int]:
    """Of the cuts whose stages are all fine (0, not infinite), those of the least sum of wishes, then the first."""
    sums = fine[:-1, -1]  # [i]: the least sum over k stages that hold layers i … n - 1
    choice = []
    for _ in range(parts - 1):
        each = fine[:-1, 1:-1] + (wishes + sums[1:])[None, :]
        choice.append(each.argmin(axis=1) + 1)  # the first j of the least
        sums = each.min(axis=1)
    cuts = [0]
    for best in reversed(choice):
        cuts.append(int(best[cuts[-1]]))
    return cuts[1:]


def bottleneck(costs: Sequence[float], cuts: Sequence[int], sends: Sequence[float] | None = None) -> float:
    """Return the time of the slowest stage or link if a chain is cut before the layers ``cuts``."""
    layers, links, _ = _checked_chain(costs, len(cuts) + 1, sends, None)
    ends = [0, *cuts, len(layers)]
    require("cuts", list(cuts), lambda _: all(a < b for a, b in itertools.pairwise(ends)), f"rising, 1 to {ends[-1]}")
    stages = [layers[a:b].sum() for a, b in itertools.pairwise(ends)]
    return float(max(*stages, *(links[cut - 1] for cut in cuts), 0))


def _checked_chain(
    costs: Sequence[float], parts: int, sends: Sequence[float] | None, prefer: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(costs)
    at_least(1, parts=parts)
    require("parts", parts, lambda x: x <= n, f"at most the number of layers, {n}")
    require("costs", costs, lambda x: all(is_number(c) and c >= 0 for c in x), "numbers of at least 0")
    links = [0.0] * (n - 1) if sends is None else sends
    require("sends", links, lambda x: len(x) == n - 1, f"{n - 1} numbers, one between each layer and the next")
    require("sends", links, lambda x: all(c >= 0 for c in x), "at least 0, or infinite")
    wishes = [c if math.isfinite(c) else 0.0 for c in links] if prefer is None else prefer
    require("prefer", wishes, lambda x: len(x) == n - 1, f"{n - 1} numbers, one between each layer and the next")
    require("prefer", wishes, lambda x: all(map(is_number, x)), "finite numbers")
    return np.array(costs, dtype=float), np.array(links, dtype=float), np.array(wishes, dtype=float)


# --- Layers and their costs -------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """The entrance of a vision transformer: an image's patches as tokens, each with its position added."""

    def __init__(self, model: ViT) -> None:
        super().__init__()
        self.embed, self.position = model.embed, model.position

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to tokens ``[N, tokens, width]``."""
        return self.embed(x).flatten(2).transpose(1, 2) + self.position


class TokenMean(nn.Module):
    """The mean over the tokens, ``[N, tokens, width]`` to ``[N, width]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens to features."""
        return x.mean(dim=1)


def chain(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a network of the laboratory as ``(name, layer)`` in order; applied one after the other they are it.

    The layers are the network's own, so what trains them trains it. Residual and encoder blocks stay whole: a chain is
    cut between layers only. An ``nn.Sequential`` is a chain already; a layer that it has twice comes twice.

    Raises
    ------
    ValueError : the network is none of these; ``cut_graph`` cuts any that can be traced.
    """
    match model:
        case MLP():
            return [("flatten", nn.Flatten()), *_parts("hidden", model.hidden), ("head", model.head)]
        case ConvNet():
            pool = nn.Sequential(model.pool, nn.Flatten())
            return [*_parts("features", model.features), ("pool", pool), ("head", model.head)]
        case ResNet():
            blocks = [pair for name, stage in _parts("stages", model.stages) for pair in _parts(name, stage)]
            pool = nn.Sequential(model.pool, nn.Flatten())
            return [("stem", model.stem), *blocks, ("pool", pool), ("head", model.head)]
        case ViT():
            norm = nn.Sequential(model.norm, TokenMean())
            return [("embed", Tokens(model)), *_parts("blocks", model.blocks), ("norm", norm), ("head", model.head)]
        case nn.Sequential():
            return list(zip(model._modules, model, strict=True))  # named_children leaves out what comes again
    raise ValueError(f"model is a {type(model).__name__}: must be an nn.Sequential, mlp, convnet, resnet or vit")


def _parts(name: str, sequence: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{child}", layer) for child, layer in sequence._modules.items() if layer is not None]


def flop_costs(layers: Sequence[nn.Module], example: Tensor) -> list[int]:
    """Return the floating-point operations of each layer's forward pass (``lab.costs.flops``): the same everywhere."""
    return [flops(copy.deepcopy(layer), x) for layer, x in _inputs_of(layers, example)]


def measure_costs(layers: Sequence[nn.Module], example: Tensor, *, repeats: int = 10, warmup: int = 3) -> list[float]:
    """Return the seconds of forward and backward pass of each layer: the median of ``repeats``, after ``warmup``.

    The layers stay as they are: copies of them compute, and get the gradients.
    """

    def step() -> None:
        out = layer(x)
        torch.autograd.backward(out, torch.ones_like(out))

    seconds = []
    for original, given in _inputs_of(layers, example):
        layer = copy.deepcopy(original)
        x = given.requires_grad_(given.is_floating_point())
        trains = any(p.requires_grad for p in layer.parameters()) or x.requires_grad
        run: Callable[[], Any] = step if trains else partial(layer, x)
        seconds.append(measure(run, warmup=warmup, repeats=repeats, device=x.device).median)
    return seconds


def sent_bytes(layers: Sequence[nn.Module], example: Tensor) -> list[int]:
    """Return the bytes that each layer but the last hands on to the next, for a batch such as ``example``."""
    return [x.numel() * x.element_size() for _, x in itertools.islice(_inputs_of(layers, example), 1, None)]


@torch.no_grad()
def _inputs_of(layers: Sequence[nn.Module], example: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """Each layer with what it gets, a tensor of its own. Copies compute it: batch norm would note what it sees."""
    x = example
    for layer in layers:
        yield layer, x.detach().clone()
        x = copy.deepcopy(layer)(x.clone())


# --- Any network: its operations, and what is alive between them ------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Profile:
    """The operations of a network in the order in which they run, and what is alive between them.

    Attributes
    ----------
    traced : the network as a graph; its layers and parameters are the network's own.
    operations : its n operations.
    flops : floating-point operations of each in the forward pass.
    live : n + 1 lists: the values that a cut before operation i would have to send (0: the network's inputs, n: none).
    bytes : n + 1 sums of their bytes.
    obstacles : cut -> why the network must not be cut there.
    """

    traced: fx.GraphModule
    operations: list[fx.Node]
    flops: list[int]
    live: list[list[fx.Node]]
    bytes: list[int]
    obstacles: dict[int, str]


def profile(model: nn.Module, example: Inputs, *, keep: Collection[str] = ()) -> Profile:
    """Trace a network, in its present mode, and find what is alive between its operations.

    Nothing is computed (the tensors have shapes only) and nothing changes, not even batch norm's statistics. torch.fx
    reads ``y += x`` as ``y = y + x``: a network in which somebody else sees ``y`` change must write ``y.add_(x)``.

    Parameters
    ----------
    example : one input, or a tuple of several; its batch size is that of the counts.
    keep : names of layers that are taken as one operation each, since they cannot be traced.

    Raises
    ------
    ValueError : the network cannot be traced; the message names the layer.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    traced = model if isinstance(model, fx.GraphModule) else trace(model, inputs, keep)
    operations = [node for node in traced.graph.nodes if node.op.startswith("call")]
    seen = _Shapes(traced)
    seen.run(*(x.to("meta") for x in inputs))
    live = _live(traced.graph, operations)
    return Profile(
        traced=traced,
        operations=operations,
        flops=[seen.flops[node.name] for node in operations],
        live=live,
        bytes=[sum(_bytes(seen.results[node.name]) for node in alive) for alive in live],
        obstacles=_obstacles(traced, operations, live, seen),
    )


def _live(graph: fx.Graph, operations: list[fx.Node]) -> list[list[fx.Node]]:
    """For each cut the values that are made before it and used after it, in the order in which they are made."""
    made = {node: index for index, node in enumerate(operations)}
    live: list[list[fx.Node]] = [[] for _ in range(len(operations) + 1)]
    for node in graph.nodes:
        if node.op == "get_attr" or node.op == "output":
            continue  # a parameter is held by the stage that uses it
        used = [made.get(user, len(operations) - 1) for user in node.users]
        last = max(used, default=-1)
        for cut in range(made.get(node, -1) + 1, last + 1):
            live[cut].append(node)
    return live


class _Shapes(fx.Interpreter):
    """Runs a network on tensors without numbers; keeps shapes, operations, and who overwrites what."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(on_meta(traced), garbage_collect_values=False)
        self.results: dict[str, Any] = {}
        self.flops: dict[str, int] = {}
        self.parameters = {n.name for n in traced.graph.nodes if n.op == "get_attr"}
        self.overwrites: list[tuple[str, Tensor]] = []

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        inputs = [x for node in n.all_input_nodes for x in tensors_in(self.env[node])]
        versions = [x._version for x in inputs]  # torch raises it when a tensor is changed in place
        with FlopCounterMode(display=False) as counter:
            self.results[n.name] = super().run_node(n)
        self.flops[n.name] = counter.get_total_flops()
        changed = [x for x, before in zip(inputs, versions, strict=True) if x._version != before]
        self.overwrites += [(n.name, x) for x in changed]
        return self.results[n.name]


def on_meta(model: nn.Module) -> Any:
    """Return a copy whose parameters and buffers have shapes but no numbers, so that it takes no room and no time."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)  # whatever the memo holds counts as copied already


def _bytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors_in(value))


# --- Where a network must not be cut ----------------------------------------------------------------------------------


def _obstacles(
    traced: fx.GraphModule, operations: list[fx.Node], live: list[list[fx.Node]], seen: _Shapes
) -> dict[int, str]:
    """Each cut at which the stages would not compute the same, with the reason."""
    found: dict[int, str] = {}
    for cut, alive in enumerate(live):
        for node in alive:
            if not isinstance(seen.results[node.name], Tensor):
                found.setdefault(cut, f"{place(node)} makes a {type(seen.results[node.name]).__name__}, not a tensor")
    for first, last, why in [*_overwritten(operations, seen), *_shared(traced, operations)]:
        for cut in range(first + 1, last + 1):
            found.setdefault(cut, why)
    return {cut: why for cut, why in sorted(found.items()) if 0 < cut < len(operations)}


Span = tuple[int, int, str]
"""Operations that have to stay together: the first, the last, and why."""


def _overwritten(operations: list[fx.Node], seen: _Shapes) -> Iterator[Span]:
    """What overwrites a value stays with what made it: autograd refuses to change a stage's input in place."""
    at = {node.name: index for index, node in enumerate(operations)}
    made: dict[int, int] = {}  # storage -> the operation that made it; -1: it came in
    for name, result in seen.results.items():
        for x in tensors_in(result) if name not in seen.parameters else ():
            made.setdefault(x.untyped_storage()._cdata, at.get(name, -1))
    for name, x in seen.overwrites:
        first = made.get(x.untyped_storage()._cdata)
        if first is not None:
            yield first, at[name], f"{place(operations[at[name]])} overwrites a value that was made before the cut"


def _shared(traced: fx.GraphModule, operations: list[fx.Node]) -> Iterator[Span]:
    """Operations that use the same parameter or buffer stay together: it can be trained in one place only."""
    names = {id(x): name for name, x in [*traced.named_parameters(), *traced.named_buffers()]}
    uses: dict[int, list[int]] = defaultdict(list)
    for index, node in enumerate(operations):
        for x in _held(traced, node):
            uses[id(x)].append(index)
    for tensor, users in uses.items():
        if users[0] < users[-1]:
            both = " and ".join(place(operations[index]) for index in (users[0], users[-1]))
            yield users[0], users[-1], f"{names.get(tensor, 'a tensor')} is used on both sides, by {both}"


def _held(traced: fx.GraphModule, node: fx.Node) -> list[Tensor]:
    """The parameters and buffers that an operation uses."""
    found = [_attribute(traced, n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    if node.op == "call_module":
        layer = traced.get_submodule(str(node.target))
        found += [*layer.parameters(), *layer.buffers()]
    return [x for x in found if isinstance(x, Tensor)]


def _attribute(model: nn.Module, target: Any) -> Any:
    *path, name = target.split(".")
    return getattr(model.get_submodule(".".join(path)), name)


def live_bytes(model: nn.Module, example: Inputs, *, keep: Collection[str] = ()) -> pd.DataFrame:
    """Return a table of a network's operations, one row each, with what is alive behind it.

    Columns: ``layer`` whose code has the operation and its ``operation``, its ``flops``, and of the cut behind it the
    ``tensors`` and ``bytes`` that would cross it and the ``obstacle`` (``""`` where the network can be cut). The index
    is the cut as in ``balanced_cuts``: row 1 is the first operation. A residual network is narrow between its blocks,
    where one tensor is alive, and wide within them, where the shortcut is alive as well.
    """
    found = profile(model, example, keep=keep)
    rows = [
        (
            str(node.target) if node.op == "call_module" else owner(node),
            type(found.traced.get_submodule(str(node.target))).__name__
            if node.op == "call_module"
            else operation(node),
            found.flops[cut - 1],
            len(found.live[cut]),
            found.bytes[cut],
            found.obstacles.get(cut, ""),
        )
        for cut, node in enumerate(found.operations[:-1], 1)
    ]
    columns = ["layer", "operation", "flops", "tensors", "bytes", "obstacle"]
    return pd.DataFrame(rows, columns=columns, index=pd.RangeIndex(1, len(rows) + 1, name="cut"))


def measure_operations(
    model: nn.Module, example: Inputs, *, repeats: int = 5, keep: Collection[str] = ()
) -> list[float]:
    """Return the seconds of each operation's forward pass, the median of ``repeats``; costs for ``cut_graph``.

    A copy of the network computes, in its present mode, so nothing of it changes.
    """
    at_least(1, repeats=repeats)
    inputs = example if isinstance(example, tuple) else (example,)
    timed = _Timed(copy.deepcopy(trace(model, inputs, keep)))
    with torch.no_grad():
        for _ in range(repeats + 1):
            timed.run(*(x.clone() for x in inputs))
    return [float(np.median(seconds[1:])) for seconds in timed.seconds.values()]  # the first to warm up


class _Timed(fx.Interpreter):
    """Runs a network and notes how long each operation took."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def run_node(self, n: fx.Node) -> Any:
        if not n.op.startswith("call"):
            return super().run_node(n)
        started = _now(self.env)
        result = super().run_node(n)
        self.seconds[n.name].append(_now(result) - started)
        return result


def _now(results: Any) -> float:
    """The time at which every device that holds these results has computed them."""
    for device in {x.device for x in tensors_in(results) if x.device.type != "cpu"}:
        torch.accelerator.synchronize(device)
    return time.perf_counter()


# --- Stages -----------------------------------------------------------------------------------------------------------


class Stage(fx.GraphModule):
    """A part of a network: it takes what the stage before it sends, and sends what the stages after it need.

    Called with a tensor, a tuple of tensors, or several tensors, it returns a tensor or, where several are alive at the
    cut, a tuple of them; so ``nn.Sequential(*stages)`` is the network. What only passes through is handed on as it is.

    Its parameters and buffers are the network's own, under their own names: training a stage trains the network.
    """

    def __call__(self, *values: Any) -> Any:
        """Compute the stage."""
        if len(values) == 1 and isinstance(values[0], tuple):
            values = values[0]
        return super().__call__(*values)

    @property
    def received(self) -> list[str]:
        """Names of the values that it takes."""
        return [node.name for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def sent(self) -> list[str]:
        """Names of the values that it returns."""
        return [node.name for node in self.graph.output_node().all_input_nodes]

    def __reduce__(self) -> Any:
        """Copied and pickled stages are stages, too."""
        return _restored, (fx.GraphModule(self, self.graph),)


def _restored(traced: fx.GraphModule) -> Stage:
    return Stage(traced, traced.graph, "Stage")


def cut_graph(
    model: nn.Module,
    example: Inputs,
    parts: int,
    costs: Sequence[float] | None = None,
    *,
    bandwidth: float = math.inf,
    keep: Collection[str] = (),
) -> list[Stage]:
    """Cut any network that can be traced into ``parts`` stages, so that the slowest is as fast as can be.

    The operations are taken in the order in which they run, and cut by ``balanced_cuts``; of equally good cuts those
    are taken that send the fewest bytes. Composed, the stages compute what the network computes, to the bit.

    Parameters
    ----------
    example : an input, or a tuple of inputs; ``bytes`` and default costs are those of its batch size.
    costs : what each operation costs, one number for each row of ``live_bytes`` and one for the last operation; by
        default its floating-point operations (``measure_operations`` gives seconds).
    bandwidth : bytes that a link carries in one unit of ``costs``; infinite: sending is free.
    keep : names of layers that are not to be traced; they stay whole.

    Raises
    ------
    ValueError : the network cannot be traced, ``costs`` has a wrong length, or there are fewer places than
        ``parts - 1`` to cut: not where a value that is no tensor is alive, where one is overwritten in place behind the
        cut, or between two uses of the same parameter.
    """
    require("bandwidth", bandwidth, lambda x: x > 0, "a number above 0")
    found = profile(model, example, keep=keep)
    _check_parts(parts, found)
    n = len(found.operations)
    costs = found.flops if costs is None else costs
    require("costs", costs, lambda x: len(x) == n, f"one number for each of {n} operations")
    alive = found.bytes[1:n]
    sends = [math.inf if cut in found.obstacles else size / bandwidth for cut, size in enumerate(alive, 1)]
    return split(found, balanced_cuts(costs, parts, sends=sends, prefer=alive))


def cut_at(model: nn.Module, example: Inputs, layers: Sequence[str], *, keep: Collection[str] = ()) -> list[Stage]:
    """Cut a network where the named layers begin: one stage more than ``layers``.

    Raises
    ------
    ValueError : no operation belongs to a layer, the layers are not in the order in which they run, or the network
        must not be cut there.
    """
    found = profile(model, example, keep=keep)
    starts = [[owner(node), str(node.target) if node.op == "call_module" else ""] for node in found.operations]
    cuts = []
    for layer in layers:
        inside = [i for i, names in enumerate(starts) if any(f"{name}.".startswith(f"{layer}.") for name in names)]
        if not inside:
            raise ValueError(f"layers names {layer!r}: must be layers that the network uses")
        cuts.append(inside[0])
    return split(found, cuts)


def split(found: Profile, cuts: Sequence[int]) -> list[Stage]:
    """Return the stages of a network that is cut before the operations ``cuts``.

    Raises
    ------
    ValueError : the cuts do not rise, leave a stage empty, or lie where the network must not be cut.
    """
    ends = [0, *cuts, len(found.operations)]
    rising = all(a < b for a, b in itertools.pairwise(ends))
    require("cuts", list(cuts), lambda _: rising, f"rising numbers between 0 and {ends[-1]}")
    for cut in cuts:
        require("cuts", cut, lambda cut: cut not in found.obstacles, f"elsewhere: {found.obstacles.get(cut)}")
    return [_stage(found, first, last) for first, last in itertools.pairwise(ends)]


def _stage(found: Profile, first: int, last: int) -> Stage:
    """The operations first to last - 1 as a module: received values in, copied operations, sent values out."""
    graph = fx.Graph()
    inputs = [n for n in found.traced.graph.nodes if n.op == "placeholder"]
    if first == 0:
        here = {node: graph.node_copy(node) for node in inputs}
    else:
        here = {node: graph.placeholder(node.name) for node in found.live[first]}

    def copied(node: fx.Node) -> fx.Node:
        if node not in here:  # a parameter that the network's own code uses
            here[node] = graph.node_copy(node)
        return here[node]

    for node in found.operations[first:last]:
        here[node] = graph.node_copy(node, copied)
    if last == len(found.operations):
        result = found.traced.graph.output_node().args[0]
        graph.output(fx.node.map_arg(result, copied))
    else:
        sent = tuple(here[node] for node in found.live[last])
        graph.output(sent[0] if len(sent) == 1 else sent)
    return Stage(found.traced, graph, "Stage")


def _check_parts(parts: int, found: Profile) -> None:
    at_least(1, parts=parts)
    allowed = len(found.operations) - 1 - len(found.obstacles)
    why = next(iter(found.obstacles.values()), "")
    most = f"at most {allowed + 1}, as this network can be cut at {allowed} places only"
    require("parts", parts, lambda x: x <= allowed + 1, most + (f" (not where {why})" if why else ""))


# --- What a stage holds -----------------------------------------------------------------------------------------------


def stage_names(stages: Sequence[nn.Module]) -> list[list[str]]:
    """Return the names of the parameters and buffers of each stage, as the network names them."""
    return [list(stage.state_dict()) for stage in stages]


def merge_states(stages: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the network's state dict from those of its stages; each may come from another process.

    Parameters that no operation uses are in no stage, and so not in it.

    Raises
    ------
    ValueError : two stages hold something of the same name; then they are not parts of one network.
    """
    merged: dict[str, Tensor] = {}
    for number, stage in enumerate(stages):
        state = stage.state_dict()
        twice = sorted(merged.keys() & state.keys())
        if twice:
            raise ValueError(f"stages: number {number} holds {twice[0]!r}, which one before it holds as well")
        merged |= state
    return merged


def balance_table(stages: Sequence[nn.Module], example: Inputs) -> pd.DataFrame:
    """Return a table with a row for each stage: what it holds, computes, receives and sends in a forward pass.

    Columns: ``layers`` with parameters of their own, ``parameters``, ``mflops`` (millions of floating-point
    operations), ``share`` of all of them, bytes ``received`` and ``sent``. Nothing is computed; the stages may be those
    of ``cut_graph`` or any modules that can be called one after the other.
    """
    value: Any = example
    rows = []
    for stage in stages:
        received, count = _bytes(value), 0
        value = fx.node.map_aggregate(value, lambda x: x.to("meta") if isinstance(x, Tensor) else x)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            value = on_meta(stage)(*value) if isinstance(value, tuple) else on_meta(stage)(value)
            count = counter.get_total_flops()
        layers = sum(any(True for _ in layer.parameters(recurse=False)) for layer in stage.modules())
        rows.append((layers, sum(p.numel() for p in stage.parameters()), count / 1e6, received, _bytes(value)))
    table = pd.DataFrame(rows, columns=["layers", "parameters", "mflops", "received", "sent"])
    table.insert(3, "share", table["mflops"] / table["mflops"].sum())
    return table.rename_axis("stage")
