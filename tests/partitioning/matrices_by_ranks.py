"""What the ranks do in test_tensor_parallel.py and test_experts.py. Each launch tries many things."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from course_lib.lab.models import Attention, mlp, vit
from course_lib.parallel.data_parallel import shard
from course_lib.parallel.data_parallel_runs import Run
from course_lib.parallel.launching import World, process_group
from course_lib.partitioning import experts as ex
from course_lib.partitioning.collectives import (
    communication,
    copy_to_ranks,
    gather_along,
    join_along,
    scatter_sum_along,
    split_along,
    sum_over_ranks,
)
from course_lib.partitioning.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    parallel_attention,
    parallel_mlp,
    tensor_parallel,
    whole_gradients,
    whole_state,
)
from course_lib.partitioning.tensor_parallel_runs import (
    MODES,
    Cost,
    compare_with_torch,
    measure_tensor_parallel,
    train_tensor_parallel,
)

DOUBLE = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The network in float64, every number of it random: ones and zeros would hide what is left out."""
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=DOUBLE) / p.shape[-1] ** 0.5)
    return model


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where the shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


def all_apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any; infinite where the names differ."""
    return max(apart(a[name], b[name]) for name in b) if list(a) == list(b) else float("inf")


def message(call: Callable[[], Any]) -> str:
    """What a ValueError says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


# --- The maps between ranks -------------------------------------------------------------------------------------------


def try_maps(world: World) -> dict[str, float]:
    """Each map and its backward against the formula, which knows all ranks' tensors; even, uneven and empty parts."""
    found = {}
    for size, dim in ((6, 0), (7, 1), (7, -1), (2, 1)):
        shape = [3, 3, 3]
        shape[dim] = size
        wholes = [normal(*shape, seed=rank) for rank in range(world.size)]
        others = [normal(*shape, seed=100 + rank) for rank in range(world.size)]
        parts = [whole.tensor_split(world.size, dim)[rank] for rank, whole in enumerate(wholes)]
        joined, total = torch.cat(parts, dim), torch.stack(wholes).sum(0)
        other_parts = [other.tensor_split(world.size, dim)[rank] for rank, other in enumerate(others)]
        other_joined, other_total = torch.cat(other_parts, dim), torch.stack(others).sum(0)

        def own(x: Tensor, dim: int = dim) -> Tensor:
            return x.tensor_split(world.size, dim)[world.rank]

        whole, part, other, other_part = (each[world.rank] for each in (wholes, parts, others, other_parts))
        cases: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor, Tensor]] = {
            "copy": (copy_to_ranks, whole, whole, other, other_total),
            "sum": (sum_over_ranks, whole, total, other, other),
            "split": (partial(split_along, dim=dim), whole, own(whole), other_part, other_joined),
            "join": (partial(join_along, dim=dim, size=size), part, joined, other, own(other)),
            "gather": (partial(gather_along, dim=dim, size=size), part, joined, other, own(other_total)),
            "scatter": (partial(scatter_sum_along, dim=dim), whole, own(total), other_part, other_joined),
        }
        for name, (function, x, y, grad, back) in cases.items():
            x = x.clone().requires_grad_()
            out = function(x)
            out.backward(grad)
            assert x.grad is not None
            found[f"{name} of {size} along {dim}"] = max(apart(out.detach(), y), apart(x.grad, back))
    return found


def try_counts() -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """Calls and bytes of one map, forward and backward, on float64 [2, 6, 4]: 384 bytes."""
    found = {}
    maps = (copy_to_ranks, sum_over_ranks, lambda x: split_along(x, 1), lambda x: scatter_sum_along(x, 1))
    for name, function in zip(("copy", "sum", "split", "scatter"), maps, strict=True):
        x = normal(2, 6, 4, seed=0).requires_grad_()
        with communication() as outer, communication() as count:
            function(x).sum().backward()
        assert outer == count
        assert outer.total == sum(count.sent.values())
        found[name] = (dict(count.calls), dict(count.sent))
    with communication() as after:
        pass
    found["nothing"] = (dict(after.calls), dict(after.sent))
    return found


# --- Layers and networks ----------------------------------------------------------------------------------------------


def try_networks() -> dict[str, float]:
    """Output, gradients and state of each network in parts, against the network in one piece."""
    images = normal(5, 1, 8, 8, seed=7)
    goal = normal(5, 10, seed=8)
    shape = (1, 8, 8)
    small = drawn(vit(shape, 10, width=24, depth=2, heads=6))  # 16 tokens, which three ranks share as 6, 5 and 5
    for norm in (part for part in small.modules() if isinstance(part, nn.LayerNorm)):
        norm.eps = 0.1
    cases: dict[str, tuple[nn.Module, Callable[[Any], nn.Module], Tensor, Tensor]] = {
        f"vit, {mode}": (small, partial(tensor_parallel, **how), images, goal) for mode, how in MODES.items()
    }
    for depth in (2, 3):
        plain = drawn(mlp(shape, 10, width=12, depth=depth))
        cases[f"mlp of {depth}"] = (plain, tensor_parallel, images, goal)
    rows, wide = normal(4, 12, seed=1), normal(4, 6, seed=2)
    first, second = nn.Linear(12, 6, bias=False), nn.Linear(6, 6, bias=False)
    two = drawn(nn.Sequential(first, nn.SiLU(), second))
    cases["without biases"] = (two, parallel_mlp, rows, wide)
    tokens = normal(2, 7, 24, seed=3)
    cases["attention"] = (drawn(Attention(24, 6)), parallel_attention, tokens, normal(2, 7, 24, seed=4))
    return {name: _apart_from_whole(*case) for name, case in cases.items()}


def _apart_from_whole(whole: nn.Module, share_out: Callable[[Any], nn.Module], x: Tensor, goal: Tensor) -> float:
    before = copy.deepcopy(whole.state_dict())
    model = share_out(whole)
    whole.zero_grad()
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [whole(inputs[0]), model(inputs[1])]
    for y in outputs:
        (y * goal).sum().backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    return max(
        apart(outputs[0], outputs[1]),
        apart(inputs[0].grad, inputs[1].grad),  # type: ignore[arg-type]
        all_apart(whole_gradients(model), gradients),
        float("inf") if all_apart(whole_state(model), before) > 0 else 0.0,
        float("inf") if all_apart(whole.state_dict(), before) > 0 else 0.0,
    )


def try_group(world: World) -> float:
    """Ranks 0 and 2 share the layers, rank 1 has none."""
    members = [0, 2]
    group = dist.new_group(members)
    if world.rank not in members:
        return 0.0
    whole: Any = drawn(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)))
    shared = [part.flatten() for part in torch.arange(10).chunk(2)][members.index(world.rank)]
    if not torch.equal(ColumnParallelLinear(whole[0], group).kept, shared):
        return float("inf")
    return _apart_from_whole(whole, partial(parallel_mlp, group=group), normal(3, 6, seed=1), normal(3, 6, seed=2))


def try_precisions() -> dict[str, str]:
    """The type of numbers of outputs and gradients, in each mode."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        whole = vit((1, 8, 8), 10, width=24, depth=1, heads=6).to(dtype)
        for mode, how in MODES.items():
            model = tensor_parallel(whole, **how)
            model(normal(2, 1, 8, 8, seed=0).to(dtype)).sum().backward()
            kinds = {p.grad.dtype for p in model.parameters() if p.grad is not None}
            found[f"{mode}, {dtype}"] = ", ".join(map(str, kinds))
    return found


def count_by_torch() -> dict[str, tuple[int, int]]:
    """Collectives in a step, by our count and by torch's."""
    from torch.distributed.tensor.debug import CommDebugMode  # here, for it takes its time

    whole = drawn(vit((1, 8, 8), 10, width=24, depth=2, heads=6))
    found = {}
    for mode, how in MODES.items():
        model = tensor_parallel(whole, **how)
        with CommDebugMode() as theirs, communication() as ours:
            model(normal(2, 1, 8, 8, seed=0)).sum().backward()
        found[mode] = (sum(ours.calls.values()), theirs.get_total_counts())
    return found


def refusals() -> list[str]:
    """What is said of networks that two or three ranks cannot share."""
    five = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    part = normal(3, 2, seed=0)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: tensor_parallel(vit((1, 8, 8), 10, width=25, heads=5)),
        lambda: parallel_mlp(five),
        lambda: ColumnParallelLinear(nn.Linear(3, 5)),
        lambda: RowParallelLinear(nn.Linear(5, 3)),
        lambda: gather_along(part, 1, 40),
        lambda: ex.ExpertParallel(mixture(experts=5)),
    )
    return [message(call) for call in calls]


def matrices() -> dict[str, Any]:
    with process_group() as world:
        return {
            "maps": try_maps(world),
            "counts": try_counts(),
            "networks": try_networks(),
            "group": try_group(world) if world.size == 3 else 0.0,
            "precisions": try_precisions(),
            "refusals": refusals(),
        }


def train_matrices() -> tuple[dict[str, Run], dict[str, Cost], dict[str, float], dict[str, tuple[int, int]]]:
    runs = {mode: train_tensor_parallel(**how) for mode, how in MODES.items()}
    other: dict[str, Any] = {
        "steps": 2,
        "seed": 3,
        "lr": 0.1,
        "momentum": 0.5,
        "batch_size": 9,
        "width": 16,
        "depth": 1,
        "heads": 2,
    }
    runs["other settings"] = train_tensor_parallel(**other)
    costs = measure_tensor_parallel(batch_size=4, width=48, depth=2, heads=6)
    with process_group():
        counts = count_by_torch()
    return runs, costs, compare_with_torch(), counts


# --- Experts ----------------------------------------------------------------------------------------------------------


def mixture(width: int = 5, experts: int = 6, seed: int = 0, **settings: Any) -> ex.MixtureOfExperts:
    """A layer of small experts that differ, and a router that prefers some."""
    networks = [nn.Sequential(nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width)) for _ in range(experts)]
    made = ex.MixtureOfExperts(nn.Linear(width, experts), networks, **settings)
    drawn(made, seed)
    return made


def try_experts(world: World, examples: int, **settings: Any) -> dict[str, float]:
    """A layer on this rank's share of the examples, against the layer in one process with as many groups."""
    whole = mixture(groups=world.size, **settings)
    x, goal = normal(examples, 3, 5, seed=1), normal(examples, 3, 5, seed=2)
    own_x, own_goal = shard(x, goal, world.rank, world.size)
    inputs = [x.clone().requires_grad_(), own_x.clone().requires_grad_()]
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    model: Any = ex.expert_parallel(whole)
    outputs = [whole(inputs[0]), model(inputs[1])]
    ((outputs[0] * goal).sum() + whole.balance()).backward()
    ((outputs[1] * own_goal).sum() + len(own_x) / examples * model.balance()).backward()
    ex.add_up_gradients(model)
    own = {name: p.grad for name, p in model.named_parameters()}
    expected = {name: p.grad for name, p in whole.named_parameters()}
    state = ex.whole_expert_state(model)
    return {
        "output": apart(outputs[0].tensor_split(world.size)[world.rank], outputs[1]),
        "input": apart(inputs[0].grad.tensor_split(world.size)[world.rank], inputs[1].grad),  # type: ignore
        "gradients": all_apart(own, {name: expected[name] for name in own}),  # type: ignore[misc]
        "experts": sum(name.startswith("experts") for name in own),
        "state": all_apart(dict(sorted(state.items())), dict(sorted(before.items()))),
    }


def try_exchange(world: World) -> dict[str, Any]:
    """Rank r sends ``r + s`` rows to each rank s: numbers that tell sender, receiver and row."""
    sizes = [[sender + receiver for receiver in range(world.size)] for sender in range(world.size)]

    def rows(sender: int, receiver: int) -> Tensor:
        number = 100 * sender + 10 * receiver
        return torch.arange(sizes[sender][receiver], dtype=DOUBLE)[:, None] + number

    outgoing, incoming = sizes[world.rank], [row[world.rank] for row in sizes]
    x = torch.cat([rows(world.rank, receiver) for receiver in range(world.size)]).requires_grad_()
    with communication() as count:
        y = ex.exchange_slots(x, outgoing, incoming)
        expected = torch.cat([rows(sender, world.rank) for sender in range(world.size)])
        (y * y.detach()).sum().backward()  # sends home what came
    assert x.grad is not None
    abroad = sum(outgoing) - outgoing[world.rank] + sum(incoming) - incoming[world.rank]
    return {
        "forward": apart(y.detach(), expected),
        "backward": apart(x.grad, x.detach()),
        "calls": count.calls["all_to_all"] - 2,
        "bytes": count.sent["all_to_all"] - 8 * abroad,
    }


def layers_of_experts() -> dict[str, Any]:
    with process_group() as world:
        settings: tuple[tuple[int, dict[str, Any]], ...] = (
            (7, {}),
            (7, {"top_k": 2, "capacity_factor": 0.7}),
            (2, {"top_k": 3}),  # the third of three ranks has no example
        )
        found = {f"{examples}, {how}": try_experts(world, examples, **how) for examples, how in settings}
        return {"layers": found, "exchange": try_exchange(world)}


def train_experts(settings: list[dict[str, Any]]) -> list[ex.ExpertRun]:
    return [ex.train_expert_parallel(**each) for each in settings]
