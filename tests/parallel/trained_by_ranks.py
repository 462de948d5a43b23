"""What the ranks do in test_training.py. Starting processes is slow, so each function tries many things."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from course_lib import optimizers
from course_lib.parallel.batch_norm import synchronize_batchnorm
from course_lib.parallel.data_parallel import (
    BucketedAverage,
    average_gradients,
    average_in_buckets,
    broadcast_model,
    make_buckets,
    shard,
)
from course_lib.parallel.data_parallel_runs import (
    Method,
    Run,
    _train,
    in_buckets,
    overlapped,
)
from course_lib.parallel.launching import World, process_group
from course_lib.parallel.sharding import ShardedOptimizer, reduce_to_owners

SMALL = 8_000  # bytes of a bucket, so that there are many


# --- Training runs ----------------------------------------------------------------------------------------------------


def small_buckets(model: nn.Module) -> Any:
    return in_buckets(model, SMALL)


def small_overlapped(model: nn.Module) -> Any:
    return overlapped(model, SMALL)


def train_all(methods: dict[str, tuple[Method, ...]], settings: Any) -> dict[tuple[str, str], Run]:
    """Train each network by its methods; the resnet once more without synchronisation."""
    with process_group() as world:
        runs: dict[tuple[str, str], Run] = {}
        for network, some in methods.items():
            for method in some:
                runs[network, method.__name__] = train_one(network, method, world, synchronize_batchnorm, settings)
        if "resnet" in methods:
            runs["resnet", "unsynchronized"] = train_one("resnet", overlapped, world, None, settings)
        return runs


def train_one(network: str, method: Method, world: World, convert: Any, settings: dict[str, Any]) -> Run:
    return _train(network, method, world.rank, world.size, world.device, convert=convert, **settings)


# --- Gradients, one step at a time ------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Parameters of several kinds: float32 and float64, channels last, scalar, used on some ranks, on none, frozen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))

        self.first = normal(3, 4)
        self.filters = nn.Parameter(normal(4, 3, 2, 2).data.to(memory_format=torch.channels_last))
        self.single = normal(5, dtype=torch.float32)
        self.gain = normal()
        self.only_rank_1 = normal(2, 3)
        self.unused = normal(7)
        self.frozen = normal(2).requires_grad_(False)
        self.register_buffer("count", torch.tensor(2**60 + 1 + seed))  # no float64 is so exact

    def gradients(self, rank: int, step: int = 0) -> dict[str, Tensor]:
        """What this rank's gradient will be."""
        generator = torch.Generator().manual_seed(100 * step + rank)
        names = ["first", "filters", "single", "gain", *(["only_rank_1"] if rank == 1 else [])]
        parts = {name: self.get_parameter(name) for name in names}
        return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parts.items()}

    def loss(self, rank: int, step: int = 0) -> Tensor:
        return sum(
            ((self.get_parameter(n) * g).sum() for n, g in self.gradients(rank, step).items()), torch.tensor(0.0)
        )

    def mean_gradients(self, shares: list[float], steps: int = 1) -> dict[str, Tensor]:
        """The weighted sum over ranks, by the formula in float64."""
        total: dict[str, Tensor] = {}
        for (rank, share), step in itertools.product(enumerate(shares), range(steps)):
            for name, g in self.gradients(rank, step).items():
                total[name] = total.get(name, torch.zeros(g.shape, dtype=torch.float64)) + share * g.double()
        return total


def error(model: Odd, expected: dict[str, Tensor], zeros: tuple[str, ...] = ()) -> float:
    """The largest difference of any gradient; infinite where one is there that should not be, or the reverse."""
    worst = 0.0
    for name, p in model.named_parameters():
        if name in zeros:
            worst = max(worst, float(p.grad.abs().max()) if p.grad is not None else float("inf"))
        elif (p.grad is not None) != (name in expected):
            return float("inf")
        elif p.grad is not None:
            worst = max(worst, float((p.grad.double() - expected[name]).abs().max()))
    return worst


def try_averaging() -> dict[str, Any]:
    """Average gradients of an odd model in every way; return the errors."""
    with process_group() as world:
        shares = [0.7, 0.3] if world.size == 2 else [1 / world.size] * world.size
        share, rank = shares[world.rank], world.rank
        found: dict[str, Any] = {}
        mean = [1 / world.size] * world.size

        model = Odd(seed=rank)
        broadcast_model(model)
        reference = Odd(seed=0)
        found["broadcast"] = max(
            float((a - b).abs().max())
            for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
        )

        model.loss(rank).backward()
        average_gradients(model, share)
        found["one by one"] = error(model, model.mean_gradients(shares), zeros=("unused",))
        model.zero_grad()
        model.loss(rank).backward()
        average_gradients(model)
        found["one by one, mean"] = error(model, model.mean_gradients(mean), zeros=("unused",))

        for bytes_ in (1, 100, 25 * 2**20):
            buckets = make_buckets(model, bytes_)
            found[f"buckets of {bytes_}"] = 0.0
            for _ in range(2):  # the second time they are not new
                model.zero_grad()
                model.loss(rank).backward()
                average_in_buckets(buckets, share)
                found[f"buckets of {bytes_}"] += error(model, model.mean_gradients(shares))

            model.zero_grad()
            average = BucketedAverage(model, bytes_, share)
            found[f"overlapped of {bytes_}"] = 0.0
            for keep in (True, False, False):
                model.loss(rank).backward()
                average.wait()
                found[f"overlapped of {bytes_}"] += error(model, model.mean_gradients(shares))
                model.zero_grad(set_to_none=keep)
                for name in () if keep else ("only_rank_1", "unused"):
                    model.get_parameter(name).grad = None

            model.zero_grad()
            with average.no_sync():
                model.loss(rank, step=0).backward()
                model.loss(rank, step=1).backward()
            local = gradient_of(model, "first")
            own = sum((model.gradients(rank, step)["first"] for step in (0, 1)), torch.zeros(3, 4))
            found[f"no_sync of {bytes_} stays local"] = float((local - own).abs().max())
            model.loss(rank, step=2).backward()
            average.wait()
            found[f"no_sync of {bytes_}"] = error(model, model.mean_gradients(shares, steps=3))

            average.remove()
            model.zero_grad()
            model.loss(rank).backward()
            found[f"removed {bytes_}"] = float((gradient_of(model, "first") - model.gradients(rank)["first"]).norm())
            model.zero_grad()

        found["kinds"] = [[tuple(p.shape) for p in bucket.parameters] for bucket in make_buckets(model, 100)]
        found["twice"] = backward_twice()
        found["launched in backward"] = launched_during_backward()
        found["accumulation"] = accumulate_as_ddp(rank)
        return found


def backward_twice() -> str:
    layer = nn.Linear(3, 2)
    average = BucketedAverage(layer)
    layer(torch.ones(1, 3)).sum().backward()
    try:
        layer(torch.ones(1, 3)).sum().backward()
    except RuntimeError as raised:
        return str(raised)
    finally:
        average.wait()
    return "nothing was raised"


def launched_during_backward() -> list[int]:
    """How many buckets have left when each of three layers, last to first, gets its gradient: plainly, under no_sync,
    and after it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    average = BucketedAverage(model, bucket_bytes=8 * 9 * 4)  # a layer's weight and bias
    seen: list[int] = []
    for layer in model:
        assert isinstance(layer, nn.Linear)
        layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append(average.launched))
    model(torch.ones(2, 8)).sum().backward()
    average.wait()
    with average.no_sync():
        model(torch.ones(2, 8)).sum().backward()
    model(torch.ones(2, 8)).sum().backward()
    average.wait()
    return [len(average.buckets), *seen]


def accumulate_as_ddp(rank: int) -> float:
    """Two micro-batches, the first under no_sync, by our class and by torch's; return the largest difference."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    theirs = copy.deepcopy(ours)
    average, replica = BucketedAverage(ours, bucket_bytes=100), DistributedDataParallel(theirs)
    x = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    with average.no_sync(), replica.no_sync():
        ours(x[0]).square().sum().backward()
        replica(x[0]).square().sum().backward()
    ours(x[1]).square().sum().backward()
    replica(x[1]).square().sum().backward()
    average.wait()
    return max(float((gradient_of(ours, n) - gradient_of(theirs, n)).abs().max()) for n, _ in ours.named_parameters())


def gradient_of(model: nn.Module, name: str) -> Tensor:
    grad = model.get_parameter(name).grad
    assert grad is not None
    return grad


# --- Batch norm -------------------------------------------------------------------------------------------------------

# shape of the whole batch, settings, type of number, offset of the data
NORM_CASES: tuple[tuple[tuple[int, ...], dict[str, Any], torch.dtype, float], ...] = (
    ((7, 3, 4, 5), {}, torch.float64, 0.0),
    ((7, 3, 4, 5), {"momentum": None}, torch.float64, 2.0),
    ((7, 3, 4, 5), {"momentum": 0.3, "eps": 0.1, "affine": False}, torch.float64, 0.0),
    ((5, 3, 4, 5), {"track_running_stats": False}, torch.float64, 0.0),
    ((1, 3, 4, 5), {}, torch.float64, 0.0),  # all ranks but the first have an empty share
    ((9, 6), {}, torch.float64, 0.0),
    ((5, 6, 3), {}, torch.float64, 0.0),
    ((7, 3, 4, 5), {}, torch.float32, 1000.0),
    ((7, 3, 4, 5), {}, torch.bfloat16, 0.0),
    ((7, 3, 4, 5), {}, torch.bfloat16, 100.0),  # a sum in bfloat16 would be off by more than a standard deviation
)


def try_batch_norm() -> list[dict[str, float]]:
    """Normalise shares by our class and whole batches by torch's; return the differences for each case."""
    with process_group() as world:
        return [norm_differences(world, *case) for case in NORM_CASES]


def norm_of_one_value() -> dict[str, Tensor]:
    """Train a batch norm on a batch of one example in all: there is no variance, and nothing to divide it by."""
    with process_group() as world:
        norm = synchronize_batchnorm(nn.BatchNorm1d(3))
        output = norm(torch.full((1 if world.rank == 0 else 0, 3), 2.0))
        return {"output": output.detach(), **dict(norm.named_buffers())}


def norm_differences(
    world: World, shape: tuple[int, ...], settings: dict[str, Any], dtype: torch.dtype, offset: float
) -> dict[str, float]:
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    generator = torch.Generator().manual_seed(1)
    whole = kind(shape[1], **settings).double()  # the reference sees the same numbers in float64
    ours = synchronize_batchnorm(nn.Sequential(kind(shape[1], **settings)))
    for module in (whole, ours):
        module.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    whole.double()
    found: dict[str, float] = {"replaced": float(type(ours[0]) is not kind)}  # type: ignore[index]
    for _ in range(3):
        x = (torch.randn(shape, generator=generator) + offset).to(dtype)
        mine = shard(x, torch.zeros(len(x)), world.rank, world.size)[0].clone().requires_grad_()
        weights = torch.randn(shape, generator=generator).to(dtype)
        my_weights = shard(weights, torch.zeros(len(x)), world.rank, world.size)[0]
        x = x.double().requires_grad_()
        expected = whole(x)
        (expected.sigmoid() * weights.double()).sum().backward()
        result = ours(mine)
        (result.sigmoid() * my_weights).sum().backward()
        average_gradients(ours, share=1.0)
        rows = torch.arange(len(x)).tensor_split(world.size)[world.rank]
        assert x.grad is not None
        assert mine.grad is not None
        found["type"] = float(result.dtype != dtype)
        pairs: dict[str, tuple[Tensor, Tensor]] = {
            "output": (result, expected[rows]),
            "input gradient": (mine.grad, x.grad[rows]),
        }
        for name, _ in whole.named_parameters():
            pairs[f"gradient of {name}"] = (gradient_of(ours, f"0.{name}"), gradient_of(whole, name))
        for name, buffer in whole.named_buffers():
            pairs[name] = (ours.get_buffer(f"0.{name}"), buffer)
        for name, (a, b) in pairs.items():
            apart = (a.detach().double() - b.detach().double()).abs()
            found[name] = max(found.get(name, 0.0), float(apart.max()) if apart.numel() else 0.0)
        ours.zero_grad()
        whole.zero_grad()
    if whole.track_running_stats:
        x = torch.randn(shape, generator=generator).to(dtype)
        expected = whole.eval()(x.double()).detach()
        apart = (ours.eval()(x).detach().double() - expected).abs().max()
        found["evaluation"] = float(apart / expected.abs().max())
    return found


# --- Sharded optimizers -----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),  # makes its state before the first step
    "our AdamW": (optimizers.AdamW, {"lr": 0.01}),
    "our Lion": (optimizers.Lion, {"lr": 0.001}),
}
SHAPES = ((40, 10), (3, 4, 2, 2), (100,), (7,), (), (20, 20), (5, 5))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    tensors[1] = tensors[1].to(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in tensors]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.003}]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for index, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    if step % 3 == 1:
        params[3].grad = None  # it takes part in some steps only


def run_optimizer(params: list[nn.Parameter], optimizer: Any, steps: range, schedule: bool = True) -> list[Tensor]:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5) if schedule else None
    for step in steps:
        give_gradients(params, step)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return [p.detach().clone() for p in params]


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def try_sharding(saved: dict[str, Any] | None = None) -> dict[Any, Any]:
    """Compare sharded optimizers with whole ones; go on from ``saved`` states, and return new ones."""
    with process_group() as world:
        found: dict[Any, Any] = {"states": {}}
        for name, (kind, settings) in OPTIMIZERS.items():
            whole, sharded = parameters(), parameters()
            reference, ours = kind(groups(whole), **settings), ShardedOptimizer(groups(sharded), kind, **settings)
            end = run_optimizer(whole, reference, range(8))
            found[name, "apart"] = gap(run_optimizer(sharded, ours, range(8)), end)
            found[name, "moved"] = gap(end, [p.detach() for p in parameters()])
            found[name, "bytes"] = ours.state_bytes
            found[name, "whole bytes"] = optimizers.state_bytes(reference)
            ours.consolidate_state_dict()
            if world.rank == 0:
                found["states"][name] = (ours.state_dict(), reference.state_dict(), end)
            if saved is not None:  # a state that another number of ranks, and one optimizer alone, has left
                expected = run_optimizer(whole, reference, range(8, 12), schedule=False)
                for who, state in zip(("sharded", "whole"), saved[name][:2], strict=True):
                    params = [nn.Parameter(value.clone()) for value in saved[name][2]]
                    resumed = ShardedOptimizer(groups(params), kind, **settings)
                    resumed.load_state_dict(state)
                    end = run_optimizer(params, resumed, range(8, 12), schedule=False)
                    found[name, f"resumed from {who}"] = gap(end, expected)
                    found[name, f"bytes from {who}"] = resumed.state_bytes
        for name in ("Adam", "SGD"):
            kind, settings = OPTIMIZERS[name]
            theirs, ours_ = parameters(), parameters()
            zero = ZeroRedundancyOptimizer(theirs, optimizer_class=kind, **settings)
            end = run_optimizer(theirs, zero, range(8))
            found[name, "from torch"] = gap(
                run_optimizer(ours_, ShardedOptimizer(ours_, kind, **settings), range(8)), end
            )
        found["refused"] = refused(world)
        found["added"] = add_later()
        found["stage 2"] = try_reducing(world)
        found["closure"] = with_closure()
        return found


def refused(world: World) -> list[str]:
    """Messages of what must not work: a state that was not collected, that is out of date, that does not fit."""
    params, messages = parameters(), []
    optimizer = ShardedOptimizer(params, torch.optim.Adam)
    give_gradients(params, 0)
    optimizer.consolidate_state_dict(to=world.size - 1)
    collected = world.rank == world.size - 1
    if collected:
        optimizer.state_dict()
    optimizer.step()
    tries: list[Callable[[], Any]] = [
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(torch.optim.Adam(params[:2]).state_dict()),
    ]
    for attempt in tries:
        try:
            attempt()
            messages.append("nothing was raised")
        except (RuntimeError, ValueError) as raised:
            messages.append(f"{type(raised).__name__}: {raised}")
    return messages


def add_later() -> float:
    """Add a group after the first steps, as for layers that thaw, with named parameters."""
    params, whole = parameters(), parameters()
    results = []
    for some, make in ((params, lambda p: ShardedOptimizer(p, torch.optim.Adam)), (whole, torch.optim.Adam)):
        optimizer = make([(str(index), p) for index, p in enumerate(some[:4])])
        run_optimizer(some, optimizer, range(3), schedule=False)
        optimizer.add_param_group({"params": [(str(4 + i), p) for i, p in enumerate(some[4:])], "lr": 0.02})
        results.append(run_optimizer(some, optimizer, range(3, 6)))
        if isinstance(optimizer, ShardedOptimizer):
            loads = [sum(p.numel() for p in some if optimizer.owner[p] == r) for r in range(optimizer.world_size)]
            assert max(loads) - min(loads) <= max(p.numel() for p in some), loads
    return gap(*results)


def try_reducing(world: World) -> dict[str, Any]:
    """Stage 2: the owners have the weighted sum of gradients, the others none; a step comes out as at stage 1."""
    weights = [(rank + 1) / sum(range(1, world.size + 1)) for rank in range(world.size)]
    params, plain = parameters(), parameters()
    results = []
    for some in (params, plain):
        optimizer = ShardedOptimizer(some, torch.optim.Adam, lr=0.01)
        for index, p in enumerate(some):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(50 * world.rank + index)).double()
        if some is params:
            reduce_to_owners(optimizer, weights[world.rank])
            kept = {index for index, p in enumerate(some) if p.grad is not None}
            owned = {index for index, p in enumerate(some) if optimizer.owner[p] == world.rank}
        else:
            average_gradients(nn.ParameterList(some), weights[world.rank])
        optimizer.step()
        results.append([p.detach() for p in some])
    return {"apart": gap(*results), "kept": kept, "owned": owned}


def with_closure() -> float:
    p = nn.Parameter(torch.tensor([3.0]))
    optimizer = ShardedOptimizer([p], torch.optim.SGD, lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    return float(loss.detach()) + float(p.detach())  # 9 + (3 - 0.1 * 6)


def examples(count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    yield torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    yield torch.randint(10, (count,), generator=generator)
