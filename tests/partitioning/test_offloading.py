"""Offloading: not a bit of any result changes, and the bytes that are near are those of the formula."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from course_lib.batching.memory import saved_bytes
from course_lib.lab.data import load
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.training import Recipe, cross_entropy, fit
from course_lib.partitioning import offloading
from course_lib.partitioning.cutting import (
    chain,
)
from course_lib.partitioning.offloading import (
    OffloadedOptimizer,
    OffloadedSequential,
    Store,
    disk_store,
    host_store,
    measure_offload,
    offload_activations,
    overlap_time,
    overlap_timeline,
    peak_bytes,
)

SHAPE = (1, 8, 8)
NETWORKS: dict[str, Callable[..., Any]] = {
    "mlp": partial(mlp, width=32),
    "convnet": partial(convnet, width=4),
    "resnet": partial(resnet, width=4),
    "vit": partial(vit, width=16, heads=2),
}
STORES: dict[str, Callable[[], AbstractContextManager[Store]]] = {"disk": disk_store, "host": host_store}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    with STORES[request.param]() as found:
        yield found
    assert found.far == found.near == 0


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- The store --------------------------------------------------------------------------------------------------------

KINDS = [
    numbers(3, 4),
    numbers(7, dtype=torch.bfloat16),
    torch.tensor(5),
    torch.tensor([True, False]),
    torch.empty(0, 3),
    numbers(4, 6).T,
    numbers(2, 3, 4, 5).to(memory_format=torch.channels_last),
    numbers(3, dtype=torch.float32).requires_grad_(),
]


def test_a_store_gives_back_what_it_was_given(store: Store) -> None:
    for number, tensor in enumerate(KINDS):
        store.put(number, tensor)
    assert store.far == sum(tensor.nbytes for tensor in KINDS)
    assert store.near == store.peak == 0
    for number, tensor in enumerate(KINDS):
        near = store.fetch(number)
        assert torch.equal(near, tensor)
        assert near.dtype == tensor.dtype
        assert not near.requires_grad
        assert store.near == tensor.nbytes
        near.zero_()
        assert torch.equal(store.view(number), tensor), "the near copy is the far tensor"
        store.release(number)
        assert store.near == 0
    assert store.peak == max(tensor.nbytes for tensor in KINDS)


def test_a_store_counts_what_is_near_and_far(store: Store) -> None:
    a, b = numbers(10), numbers(20)
    store.put("a", a)
    store.put("b", b)
    first, second = store.fetch("a"), store.fetch("a")
    assert torch.equal(first, second)
    store.fetch("b")
    assert (store.far, store.near, store.peak) == (240, 80 + 80 + 160, 320)
    store.release("a")
    assert (store.near, store.peak) == (160, 320)
    place = store.view("a").data_ptr()
    store.put("a", -a)
    assert torch.equal(store.view("a"), -a)
    assert store.view("a").data_ptr() == place, "an update took new memory"
    store.put("a", b)  # of another size
    assert store.far == 320
    store.drop("b")
    store.drop("b")
    assert (store.far, store.near) == (160, 0)
    assert "a" in store
    assert "b" not in store
    store.clear()
    assert store.far == 0


def test_nothing_stays_on_the_disk(tmp_path: Path) -> None:
    kept = []

    def interrupted() -> None:
        with disk_store(tmp_path) as store:
            (folder,) = tmp_path.iterdir()
            assert folder.is_dir()
            store.put("a", numbers(1000))
            kept.append(store.view("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [*tmp_path.iterdir()] == []
    assert torch.equal(kept[0], numbers(1000))  # whoever holds it has it still


def test_the_tensors_of_a_disk_store_are_in_files() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux tells what is mapped")
    with disk_store() as store:
        store.put("a", numbers(100_000))
        place = store.view("a").data_ptr()
        lines = [line for line in maps.read_text().splitlines() if ".bin" in line]
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        assert any(a <= place < b for a, b in ranges)


# --- Weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefetch"), [*((name, 1) for name in NETWORKS), ("resnet", 0), ("resnet", 2), ("mlp", 50)]
)
def test_an_offloaded_chain_answers_bit_for_bit(name: str, prefetch: int, store: Store) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name](SHAPE, 10)
    x = numbers(3, *SHAPE, dtype=torch.float32)
    network(x)  # batch norm has seen something
    state = copy.deepcopy(network.state_dict())
    layers = [layer for _, layer in chain(network)]
    offloaded = OffloadedSequential(layers, store, prefetch)
    assert all(module.training for module in network.modules()), "the layers that were given have changed"
    assert [*offloaded.parameters()] == [*offloaded.buffers()] == []
    expected = network.eval()(x)
    for p in network.parameters():
        p.data.zero_()  # it has a copy of its own
    for _ in range(2):
        found = offloaded.train()(x)  # it computes as in evaluation whatever it is told
        assert torch.equal(found, expected)
        assert not found.requires_grad
    sizes = offloaded.sizes
    own = [sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) for layer in layers]
    assert sizes == ([0] if own[0] == 0 else []) + [size for size in own if size]
    assert store.far == sum(sizes) == sum(t.nbytes for t in state.values())
    assert store.peak == peak_bytes(sizes, prefetch)
    assert store.near == 0
    del offloaded
    assert store.far == 0


def test_peak_bytes_are_those_of_neighbours() -> None:
    sizes = [5, 1, 4, 4, 7, 0]
    assert [peak_bytes(sizes, prefetch) for prefetch in (0, 1, 2, 5, 9)] == [7, 11, 15, 21, 21]
    with pytest.raises(ValueError, match=r"sizes=\[\]: must be"):
        peak_bytes([])
    with pytest.raises(ValueError, match="prefetch=-1: must be"):
        peak_bytes(sizes, -1)


def test_a_layer_that_fails_says_so(store: Store) -> None:
    with pytest.raises(ValueError, match=r"layers=\[\]: must be at least one layer"):
        OffloadedSequential([], store)
    with pytest.raises(ValueError, match="prefetch=-1: must be"):
        OffloadedSequential([nn.ReLU()], store, -1)
    offloaded = OffloadedSequential([nn.Linear(3, 4), nn.Linear(3, 4)], store)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        offloaded(torch.ones(1, 3))
    tied = nn.Linear(3, 3)
    x = torch.ones(1, 3)
    assert torch.equal(OffloadedSequential([nn.Sequential(tied, tied), nn.Tanh()], store)(x), tied(tied(x)).tanh())


def test_a_loader_that_fails_is_heard(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    offloaded = OffloadedSequential([nn.Linear(3, 3), nn.Linear(3, 3)], store)

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(offloading, "_fill", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        offloaded(torch.ones(1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 1])
def test_weights_come_to_a_gpu(prefetch: int) -> None:
    layers = [nn.Linear(512, 512) for _ in range(20)]
    with host_store() as store:
        offloaded = OffloadedSequential(layers, store, prefetch, torch.device("cuda"))
        x = torch.randn(64, 512, device="cuda")
        expected = nn.Sequential(*layers).cuda()(x)
        for _ in range(20):
            assert torch.equal(offloaded(x), expected)
        assert store.peak == peak_bytes(offloaded.sizes, prefetch)


# --- Activations ------------------------------------------------------------------------------------------------------


def gradients(model: nn.Module, forward: Callable[[], Tensor], around: AbstractContextManager[Any]) -> list[Tensor]:
    model.zero_grad()
    with around:
        loss = forward()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_offloaded_activations_are_the_same_bits(name: str, store: Store) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name](SHAPE, 10)
    x, y = numbers(6, *SHAPE, dtype=torch.float32), torch.arange(6)
    apart = [*model.parameters(), *model.buffers()]
    expected = gradients(model, lambda: cross_entropy(model, x, y), ExitStack())
    of_torch = gradients(model, lambda: cross_entropy(model, x, y), save_on_cpu())
    far: list[int] = []

    def forward() -> Tensor:
        loss = cross_entropy(model, x, y)
        far.append(store.far)
        return loss

    found = gradients(model, forward, offload_activations(store, apart=apart, smallest=0))
    for a, b, c in zip(found, expected, of_torch, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert len(found) == len([*model.parameters()])
    assert far == [saved_bytes(model, x, y)], "parameters were moved, or something twice, or something not"
    assert store.far == 0


def test_only_large_memory_goes(store: Store) -> None:
    big, small = numbers(100).requires_grad_(), numbers(10).requires_grad_()
    with offload_activations(store, smallest=800):
        loss = (big * 1).exp().sum() + (small * 1).exp().sum()
        assert store.far == 800
    with offload_activations(store, smallest=801):
        other = (big * 1).exp().sum()
        assert store.far == 800
    loss.backward()
    other.backward()
    assert big.grad is not None
    torch.testing.assert_close(big.grad, 2 * big.detach().exp())
    with pytest.raises(ValueError, match="smallest=-1: must be"), offload_activations(store, smallest=-1):
        pass


def test_memory_that_is_written_over_is_another_tensor(store: Store) -> None:
    start = numbers(50).requires_grad_()

    def forward() -> Tensor:
        a = start * 1
        first = a.square()  # saves a
        a.exp_()  # writes over it, and saves the result: the same memory, other numbers
        return first.sum() + a.sum()

    with offload_activations(store, smallest=0):
        loss = forward()
        assert store.far == 2 * start.nbytes
    loss.backward()  # without offloading torch refuses, for what it saved is gone
    assert start.grad is not None
    torch.testing.assert_close(start.grad, 2 * start.detach() + start.detach().exp())


def test_views_of_one_memory_are_stored_once(store: Store) -> None:
    start = numbers(8, 6).requires_grad_()
    weights = numbers(6, 8)

    def forward() -> Tensor:
        a = start * 1
        return (a.T[1:].square().sum() + (a[::2, 1:3] * a.T[1:3, 1::2].T).sum() + (a.T * weights).sum()).exp()

    (expected,) = torch.autograd.grad(forward(), start)
    with offload_activations(store, apart=[weights], smallest=100):
        loss = forward()
        assert store.far == start.nbytes
    (found,) = torch.autograd.grad(loss, start)
    assert torch.equal(found, expected)


def test_memory_that_was_freed_is_not_taken_for_the_new(store: Store) -> None:
    start = numbers(64).requires_grad_()
    with offload_activations(store, smallest=0):
        x = start
        for _ in range(30):  # each result goes at once, and the next one gets its place
            x = (x * 1.01).sin()
        assert store.far == 30 * start.nbytes
    x.sum().backward()
    assert start.grad is not None
    plain = start.detach().requires_grad_()
    x = plain
    for _ in range(30):
        x = (x * 1.01).sin()
    x.sum().backward()
    assert torch.equal(start.grad, plain.grad)  # type: ignore[arg-type]


# --- The optimizer's state --------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),  # makes its state before the first step
    "Rprop": (torch.optim.Rprop, {"lr": 0.1}),
}
SIZES = ((40, 10), (3, 4, 2, 2), (7,), (), (5, 5))


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(numbers(*shape, seed=seed)) for seed, shape in enumerate(SIZES)]


def take_steps(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, p in enumerate(params):
            unused = number == 2 and step % 2  # sometimes no gradient
            p.grad = None if unused else numbers(*p.shape, seed=100 * step + number)
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


def grouped(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_offloaded_optimizer_gives_the_same_bits(name: str, store: Store) -> None:
    kind, settings = OPTIMIZERS[name]
    ours, theirs = parameters(), parameters()
    offloaded = OffloadedOptimizer(grouped(ours), kind, store, **settings)
    plain = kind(grouped(theirs), **settings)
    assert len(offloaded.inner.state) == 0, "the state that it was made with is near"
    assert store.far == sum(v.nbytes for state in plain.state.values() for v in state.values())
    take_steps(offloaded, ours, range(6))
    take_steps(plain, theirs, range(6))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], parameters()[0])
    bytes_of = [sum(v.nbytes for v in plain.state[p].values() if isinstance(v, Tensor)) for p in theirs]
    assert store.far == sum(bytes_of)
    assert store.peak == max(bytes_of), "more is near than the state of the largest parameter"
    assert store.near == 0
    assert len(offloaded.state) == len(offloaded.inner.state) == 0

    state, reference = offloaded.state_dict(), plain.state_dict()
    assert state["param_groups"] == reference["param_groups"]
    assert state["state"].keys() == reference["state"].keys()
    for number, expected in reference["state"].items():
        assert state["state"][number].keys() == expected.keys()
        for key, value in expected.items():
            found = state["state"][number][key]
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value

    # a checkpoint goes from either to either
    third, fourth = ([nn.Parameter(p.detach().clone()) for p in ours] for _ in range(2))
    resumed = OffloadedOptimizer(grouped(third), kind, store, **settings)
    resumed.load_state_dict(copy.deepcopy(reference))
    back = kind(grouped(fourth), **settings)
    back.load_state_dict(copy.deepcopy(state))
    for optimizer, params in ((plain, theirs), (offloaded, ours), (resumed, third), (back, fourth)):
        take_steps(optimizer, params, range(6, 9))
    for params in (ours, third, fourth):
        assert all(torch.equal(a, b) for a, b in zip(params, theirs, strict=True))
    # and one from before the first step begins anew
    anew, other = ([nn.Parameter(p.detach().clone()) for p in ours] for _ in range(2))
    resumed.load_state_dict(OffloadedOptimizer(grouped(anew), kind, store, **settings).state_dict())
    with torch.no_grad():
        for p, now in zip(third, other, strict=True):
            p.copy_(now)
    fresh = kind(grouped(other), **settings)
    for optimizer, params in ((resumed, third), (fresh, other)):
        take_steps(optimizer, params, range(9, 11))
    assert all(torch.equal(a, b) for a, b in zip(third, other, strict=True))
    del resumed, offloaded
    assert store.far == 0


def test_fit_takes_an_offloaded_optimizer(store: Store) -> None:
    data = load("digits")
    weights = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        model = mlp(SHAPE, 10, width=16, depth=1)
        make: Any = lambda params: torch.optim.AdamW(params, lr=0.01)  # noqa: E731
        if offloaded:
            make = lambda params: OffloadedOptimizer(params, torch.optim.AdamW, store, lr=0.01)  # noqa: E731
        fit(model, data, Recipe(epochs=1, optimizer=make), seed=0)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_parameters_may_come_later_and_a_step_may_fail(store: Store) -> None:
    params = parameters()
    optimizer = OffloadedOptimizer(params[:1], torch.optim.AdamW, store, lr=0.1)
    optimizer.add_param_group({"params": params[1:2], "lr": 0.2})
    plain_params = parameters()[:2]
    plain = torch.optim.AdamW(plain_params[:1], lr=0.1)
    plain.add_param_group({"params": plain_params[1:], "lr": 0.2})
    for each, own in ((optimizer, params[:2]), (plain, plain_params)):
        take_steps(each, own, range(3))
    assert all(torch.equal(a, b) for a, b in zip(params[:2], plain_params, strict=True))
    params[0].grad = numbers(40, 10).to_sparse()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[n][k], after[n][k]) for n in before for k in before[n] if k != "step")
    assert store.near == 0
    params[0].grad = None
    assert optimizer.step(lambda: 3.0) == 3.0


# --- How long it takes ------------------------------------------------------------------------------------------------


def longest_path(load: list[float], compute: list[float], prefetch: int) -> float:
    """The same by the longest path: each end is the latest of all that a task has to wait for, found by recursion."""
    count = len(load)
    tasks = [*itertools.product("LC", range(count))]
    seconds = {("L", i): load[i] for i in range(count)} | {("C", i): compute[i] for i in range(count)}

    def end(task: tuple[str, int]) -> float:
        kind, i = task
        before = [(kind, i - 1), ("L", i) if kind == "C" else ("C", i - prefetch - 1)]
        return seconds[task] + max([0.0, *(end(other) for other in before if other in seconds)])

    return max(end(task) for task in tasks)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 7])
def test_the_simulation_is_the_longest_path(prefetch: int) -> None:
    for seed in range(5):
        load, compute = (numbers(7, seed=10 * seed + k).abs().tolist() for k in range(2))
        assert overlap_time(load, compute, prefetch) == pytest.approx(longest_path(load, compute, prefetch))


def test_the_simulation_is_the_formula_where_there_is_one() -> None:
    load, compute = numbers(6).abs().tolist(), numbers(6, seed=1).abs().tolist()
    assert overlap_time(load, compute, 0) == pytest.approx(sum(load) + sum(compute))
    flow_shop = max(sum(load[: k + 1]) + sum(compute[k:]) for k in range(6))  # Johnson 1954: a buffer without a limit
    assert overlap_time(load, compute, 6) == pytest.approx(flow_shop)
    for slow, fast in ((3.0, 2.0), (2.0, 3.0)):
        for prefetch in (1, 2):
            assert overlap_time([slow] * 5, [fast] * 5, prefetch) == pytest.approx(slow + 4 * 3.0 + fast)
    uneven = [overlap_time([1, 1, 9, 1, 1], [5, 1, 1, 5, 5], prefetch) for prefetch in (0, 1, 2, 3)]
    assert uneven == sorted(uneven, reverse=True)
    assert uneven[1] > uneven[2], "a second layer ahead gains where they are uneven"


def test_the_timeline_keeps_to_its_rules() -> None:
    table = overlap_timeline([2.0, 1.0, 4.0], [1.0, 3.0, 1.0], prefetch=1)
    assert table["load_start"].tolist() == [0, 2, 3]
    assert table["load_end"].tolist() == [2, 3, 7]
    assert table["compute_start"].tolist() == [2, 3, 7]
    assert table["compute_end"].tolist() == [3, 6, 8]
    for wrong, words in (
        (([], []), r"compute=\[\]: must be"),
        (([1.0], [1.0, 2.0]), "as many seconds as load, 1"),
        (([-1.0], [1.0]), r"load=\[-1.0\]: must be numbers of at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            overlap_timeline(*wrong)


def test_measuring_gives_ratios_and_leaves_nothing() -> None:
    with disk_store() as store:
        found = measure_offload(store, width=16, depth=3, batch_size=4, rounds=2)
        assert found.measured > 0
        assert 1 <= found.predicted <= 2
        assert found.load > 0
        assert found.compute > 0
        assert store.far == store.near == 0
        with pytest.raises(ValueError, match="rounds=0: must be"):
            measure_offload(store, rounds=0)
