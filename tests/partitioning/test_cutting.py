"""Where a network is cut: the cuts are the best there are, and the stages are the network, to the bit."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.fx.passes.shape_prop import ShapeProp

from course_lib.lab import timing
from course_lib.lab.costs import flops
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.partitioning import cutting
from course_lib.partitioning.cutting import Stage, balanced_cuts, bottleneck, cut_at, cut_graph, profile, split

SHAPE = (1, 8, 8)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(SHAPE, 10, width=12, depth=3),
    "convnet": lambda: convnet(SHAPE, 10, width=4),
    "resnet": lambda: resnet(SHAPE, 10, width=4, blocks=(1, 2)),
    "vit": lambda: vit(SHAPE, 10, width=8, depth=2, heads=2),
}


def network(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]().to(dtype)


def images(n: int = 3, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- A chain of layers ------------------------------------------------------------------------------------------------


def time_of(costs: Sequence[float], cuts: Sequence[int], sends: Sequence[float]) -> float:
    """The slowest stage or link, written apart from the code under test."""
    stages = [sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)])]
    return max(stages + [sends[cut - 1] for cut in cuts])


def brute_force(costs: Sequence[float], parts: int, sends: Sequence[float], prefer: Sequence[float]) -> list[int]:
    every = itertools.combinations(range(1, len(costs)), parts - 1)
    return list(min(every, key=lambda cuts: (time_of(costs, cuts, sends), sum(prefer[c - 1] for c in cuts), cuts)))


def test_the_cuts_are_those_that_trying_all_of_them_finds() -> None:
    generator = np.random.default_rng(0)
    for _ in range(400):
        n = int(generator.integers(1, 10))
        parts = int(generator.integers(1, n + 1))
        costs = [int(c) for c in generator.integers(0, 6, n)]
        sends = [int(c) for c in generator.integers(0, 12, n - 1)]
        prefer = [int(c) for c in generator.integers(-2, 4, n - 1)]
        nothing = [0] * (n - 1)
        assert balanced_cuts(costs, parts) == brute_force(costs, parts, nothing, nothing)
        assert balanced_cuts(costs, parts, sends=sends) == brute_force(costs, parts, sends, sends)
        assert balanced_cuts(costs, parts, sends=sends, prefer=prefer) == brute_force(costs, parts, sends, prefer)


def test_costs_that_are_no_whole_numbers() -> None:
    generator = np.random.default_rng(1)
    for _ in range(100):
        costs, sends = generator.random(8).tolist(), generator.random(7).tolist()
        cuts = balanced_cuts(costs, 3, sends=sends)
        best = time_of(costs, brute_force(costs, 3, sends, sends), sends)
        assert bottleneck(costs, cuts, sends) == pytest.approx(best) == pytest.approx(time_of(costs, cuts, sends))


def test_rounding_decides_no_tie() -> None:
    # 0.3 + 0.3 + 0.3 and 0.6 + 0.3 differ in the last bit
    assert balanced_cuts([0.0, 0.6, 0.3, 0.3, 0.3], 2, prefer=[3, 0, 0, 0]) == [2]
    assert balanced_cuts([0.1, 0.3, 0.2, 0.0, 0.4], 2, prefer=[3, 2, 1, 3]) == [3]


def test_a_cut_that_is_forbidden_is_not_made() -> None:
    assert balanced_cuts([1, 1, 1, 1], 2, sends=[0, math.inf, 0]) == [1]
    with pytest.raises(ValueError, match="too few cuts for parts=3"):
        balanced_cuts([1, 1, 1, 1], 3, sends=[0, math.inf, math.inf])


def test_the_bottleneck_is_the_slowest_stage_or_link() -> None:
    assert bottleneck([1, 2, 3, 4], [2, 3]) == 4
    assert bottleneck([1, 2, 3, 4], [1]) == 9
    assert bottleneck([1, 2, 3, 4], [2, 3], sends=[9, 1, 5]) == 5
    assert bottleneck([1, 2], []) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": [1, 2], "parts": 3}, "parts=3: must be at most the number of layers, 2"),
        ({"costs": [1, 2], "parts": 0}, "parts=0"),
        ({"costs": [1, -2], "parts": 1}, "costs=.*at least 0"),
        ({"costs": [1, math.nan], "parts": 1}, "costs="),
        ({"costs": [1, 2], "parts": 2, "sends": [1, 2]}, "sends=.*1 numbers"),
        ({"costs": [1, 2], "parts": 2, "sends": [-1]}, "sends=.*at least 0"),
        ({"costs": [1, 2], "parts": 2, "prefer": [1, 2]}, "prefer=.*1 numbers"),
        ({"costs": [1, 2], "parts": 2, "prefer": [math.inf]}, "prefer=.*finite"),
    ],
)
def test_wrong_chains_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_cuts(**arguments)


@pytest.mark.parametrize("cuts", [[0], [2], [1, 1]])
def test_wrong_cuts_are_refused(cuts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cuts=|parts="):
        bottleneck([1, 2], cuts)


# --- Layers and their costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("train", [False, True])
def test_a_chain_is_the_network(name: str, train: bool) -> None:
    model = network(name).train(train)
    layers = [layer for _, layer in cutting.chain(copy.deepcopy(model).train(train))]
    assert len(layers) > 3
    assert torch.equal(nn.Sequential(*layers)(images()), model(images()))
    names = [name for name, _ in cutting.chain(model)]
    assert len(set(names)) == len(names)
    ids = {id(p) for _, layer in cutting.chain(model) for p in layer.parameters()}
    assert ids == {id(p) for p in model.parameters()}


def test_a_chain_keeps_blocks_whole() -> None:
    names = [name for name, _ in cutting.chain(network("resnet"))]
    assert names == ["stem", "stages.0.0", "stages.1.0", "stages.1.1", "pool", "head"]
    assert [name for name, _ in cutting.chain(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))] == ["0", "1"]
    twice = nn.ReLU()
    assert [layer for _, layer in cutting.chain(nn.Sequential(twice, nn.Linear(2, 2), twice))][::2] == [twice, twice]
    with pytest.raises(ValueError, match="model is a Bilinear"):
        cutting.chain(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_layers_cost_what_the_network_costs(name: str) -> None:
    model = network(name).train()
    before = copy.deepcopy(model.state_dict())
    layers = [layer for _, layer in cutting.chain(model)]
    costs = cutting.flop_costs(layers, images())
    assert sum(costs) == flops(copy.deepcopy(model), images()) > 0
    assert same_state(model.state_dict(), before)


def test_bytes_that_layers_hand_on() -> None:
    layers = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert cutting.sent_bytes(list(layers), torch.zeros(7, 3)) == [7 * 5 * 4, 7 * 5 * 4]
    assert cutting.sent_bytes(list(layers.double()), torch.zeros(7, 3).double()) == [7 * 5 * 8, 7 * 5 * 8]


def test_measured_costs_are_of_forward_and_backward_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = network("convnet").train(), []
    before = copy.deepcopy(model.state_dict())

    def measured(fn: Callable[[], Any], **settings: Any) -> timing.Timing:
        backward: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(torch.autograd, "backward", lambda *arguments: backward.append(arguments))
            fn()
        calls.append((len(backward), settings["repeats"], settings["warmup"]))
        fn()
        return timing.Timing(len(calls), 0.0, 0.0, 1)

    monkeypatch.setattr(cutting, "measure", measured)
    layers = [layer for _, layer in cutting.chain(model)]
    assert cutting.measure_costs(layers, images(), repeats=2, warmup=1) == list(range(1, len(layers) + 1))
    assert calls == [(1, 2, 1)] * len(layers)
    assert same_state(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- What is alive ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_bytes_alive_agree_with_shape_propagation(name: str) -> None:
    model = network(name, torch.float32).eval()
    found = profile(model, images(dtype=torch.float32))
    ShapeProp(found.traced).propagate(images(dtype=torch.float32))
    nodes = list(found.traced.graph.nodes)
    for cut in range(1, len(found.operations)):
        behind = nodes.index(found.operations[cut])
        sizes = []
        for node in nodes[:behind]:
            if node.op != "get_attr" and any(nodes.index(user) >= behind for user in node.users):
                meta = node.meta.get("tensor_meta")
                sizes.append(math.prod(meta.shape) * meta.dtype.itemsize if hasattr(meta, "shape") else 0)
        tensors = sum(size > 0 for size in sizes)
        if cut not in found.obstacles:
            assert (len(found.live[cut]), found.bytes[cut]) == (tensors, sum(sizes))


def test_a_residual_network_is_narrow_between_its_blocks() -> None:
    table = cutting.live_bytes(network("resnet", torch.float32), images(dtype=torch.float32))
    one = 3 * 4 * 8 * 8 * 4  # [N, C, H, W] of four bytes
    first = table[table["layer"].str.startswith("stages.0.0")]
    assert first["bytes"].tolist() == [2 * one] * 5 + [2 * one, one, one]  # convolution to shortcut, sum, relu
    assert first["tensors"].tolist() == [2] * 6 + [1, 1]
    assert table.index.tolist() == list(range(1, len(table) + 1))
    found = profile(network("resnet", torch.float32), images(dtype=torch.float32))
    assert [*table["flops"], flops(nn.Linear(8, 10), torch.zeros(3, 8))] == found.flops
    assert (table["obstacle"] == "").all()


@pytest.mark.parametrize("name", NETWORKS)
def test_operations_count_what_the_network_counts(name: str) -> None:
    model = network(name).train()
    before = copy.deepcopy(model.state_dict())
    assert sum(profile(model, images()).flops) == flops(copy.deepcopy(model), images())
    assert same_state(model.state_dict(), before)  # batch norm has seen nothing


# --- Stages -----------------------------------------------------------------------------------------------------------


def piecewise(stages: Sequence[nn.Module], x: Tensor) -> Tensor:
    """A step as a pipeline makes it: no stage's graph reaches into another's, gradients are handed back."""
    value: tuple[Tensor, ...] = (x,)
    steps = []
    for stage in stages:
        given = tuple(v.detach().requires_grad_(v.is_floating_point()) for v in value)
        out = stage(given)
        value = out if isinstance(out, tuple) else (out,)
        steps.append((given, value))
    result = value[0]
    gradients: tuple[Any, ...] = (2 * result.detach(),)
    for given, out in reversed(steps):
        pairs = [(o, g) for o, g in zip(out, gradients, strict=True) if o.requires_grad and g is not None]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        gradients = tuple(v.grad for v in given)
    return result


def check_stages(model: nn.Module, stages: Sequence[nn.Module], whole: nn.Module, x: Tensor) -> None:
    """Stages of ``model``, composed and piece by piece, are ``whole``, a copy of it: outputs, gradients, states."""
    torch.manual_seed(2)
    expected = whole(x)
    expected.square().sum().backward()
    gradients = [p.grad for p in whole.parameters()]
    states = copy.deepcopy(whole.state_dict())
    start = copy.deepcopy(model.state_dict())
    for whole_graph in (True, False):
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(2)
        if whole_graph:
            found = nn.Sequential(*stages)(x)
            found.square().sum().backward()
        else:
            found = piecewise(stages, x)
        assert torch.equal(found, expected)
        assert same_state(cutting.merge_states(stages), states)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert gradient is not None
            assert p.grad is not None
            # piece by piece, the gradients of a value that is used twice are added up in another order
            off = 0 if whole_graph else 1e-12 if x.dtype == torch.float64 else 1e-4
            assert (p.grad - gradient).abs().max() <= off * gradient.abs().max().clamp_min(off)


def small_transformer() -> nn.Module:
    """torchvision's vision transformer in small: torch's own attention, a class token, sizes in its code."""
    return torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, dropout=0.1)


TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.resnet18(weights=None),
    "densenet": lambda: torchvision.models.DenseNet(8, (3, 3, 2), 16),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(weights=None),
    "googlenet": lambda: torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False),
    "vit": small_transformer,
}


@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("resnet18", True),
        ("densenet", True),
        ("mobilenet_v3_small", True),
        ("googlenet", False),
        ("vit", True),
        ("vit", False),
    ],
)
def test_networks_that_people_use_in_stages(name: str, train: bool) -> None:
    torch.manual_seed(0)
    model = TORCHVISION[name]().train(train)
    x = images(2, torch.float32, (3, 32, 32))
    whole = copy.deepcopy(model)
    stages = cut_graph(model, x, 3)
    assert same_state(model.state_dict(), whole.state_dict())
    assert sum(stage_flops(stages, x)) == sum(profile(model, x).flops)
    check_stages(model, stages, whole, x)


def stage_flops(stages: Sequence[nn.Module], x: Tensor) -> list[int]:
    return [round(count * 1e6) for count in cutting.balance_table(stages, x)["mflops"]]


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_network_can_be_cut_anywhere(name: str) -> None:
    x = images()
    torch.manual_seed(0)
    model = resnet(SHAPE, 10, width=2, blocks=(1, 1)) if name == "resnet" else vit(SHAPE, 10, width=4, depth=1, heads=2)
    model = model.double()
    found, start = profile(model, x), copy.deepcopy(model)
    assert all("not a tensor" in why for why in found.obstacles.values())
    for cut in range(1, len(found.operations)):
        if cut in found.obstacles:
            with pytest.raises(ValueError, match=f"cuts={cut}: must be elsewhere"):
                split(found, [cut])
        else:
            stages = split(found, [cut])
            assert [stage.received for stage in stages] == [["x"], [node.name for node in found.live[cut]]]
            assert stages[0].sent == stages[1].received
            model.load_state_dict(start.state_dict())
            check_stages(model, stages, copy.deepcopy(start), x)


class InPlace(nn.Module):
    """What may not be cut apart: a value that is overwritten, a size, a tuple, a parameter used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = y.view(-1, 2, 3)
        z.add_(1)  # a view of y: so y has changed too
        y = self.b(y * self.scale)
        first, second = y.chunk(2, dim=1)
        both = torch.cat([second, first.sigmoid()], dim=1).view(x.shape[0], 6)
        return self.c(both.tanh()) * self.scale.exp().reciprocal()


def test_what_belongs_together_stays_together() -> None:
    x = images(4, torch.float64, (6,))
    torch.manual_seed(0)
    model = InPlace().double()
    found = profile(model, x)
    reasons = {found.operations[cut].name: why for cut, why in found.obstacles.items()}
    table = cutting.live_bytes(model, x)
    assert {cut: why for cut, why in table["obstacle"].items() if why} == found.obstacles
    assert "add in the model itself overwrites" in reasons["view"]
    assert "add in the model itself overwrites" in reasons["add_"]
    assert "makes a tuple, not a tensor" in reasons["getitem"]
    assert "scale is used on both sides, by mul in the model itself and exp" in reasons["tanh"]
    allowed = [cut for cut in range(1, len(found.operations)) if cut not in found.obstacles]
    assert [found.operations[cut].name for cut in allowed] == ["mul", "reciprocal", "mul_1"]
    for cut in allowed:
        whole = copy.deepcopy(model)
        check_stages(model, split(profile(model, x), [cut]), whole, x)
    with pytest.raises(ValueError, match="parts=5: must be at most 4, as this network can be cut at 3 places"):
        cut_graph(model, x, 5)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x))))


def test_tied_weights_cannot_be_in_two_stages() -> None:
    with pytest.raises(ValueError, match="a.weight is used on both sides, by a and b"):
        cut_graph(Tied(), torch.zeros(2, 4), 3)
    stages = cut_graph(Tied(), torch.zeros(2, 4), 2)  # the activation that both use holds nothing
    assert cutting.stage_names(stages) == [["a.weight", "a.bias", "b.weight", "b.bias"], []]


def test_a_better_balance_is_not_possible() -> None:
    x, model = images(), network("resnet")
    found = profile(model, x)
    ends = range(1, len(found.operations))
    bytes_ = [found.bytes[cut] for cut in ends]
    for bandwidth in (math.inf, 1e-1, 1e-3):
        sends = [b / bandwidth for b in bytes_]
        expected = brute_force(found.flops, 3, sends, bytes_)
        names = [stage.received for stage in split(found, expected)]
        assert [stage.received for stage in cut_graph(model, x, 3, bandwidth=bandwidth)] == names
    other = [1.0] * len(found.operations)
    names = [stage.received for stage in split(found, brute_force(other, 3, [0] * len(bytes_), bytes_))]
    assert [stage.received for stage in cut_graph(model, x, 3, other)] == names


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_stages_agree_with_torch_distributed_pipelining() -> None:
    model, x = network("resnet", torch.float32).eval(), images(dtype=torch.float32)
    layers = ["stages.1.0", "stages.1.1"]
    reference = pipeline(copy.deepcopy(model), (x,), split_spec=dict.fromkeys(layers, SplitPoint.BEGINNING))
    stages = cut_at(model, x, layers)
    assert reference.num_stages == len(stages) == 3
    value = x
    for number, stage in enumerate(stages):
        theirs = reference.get_stage_module(number)
        assert {name for name, _ in stage.named_parameters()} == {name for name, _ in theirs.named_parameters()}
        assert torch.equal(stage(value), theirs(value))
        value = stage(value)


def test_a_layer_is_named_whole() -> None:
    model = nn.Sequential(OrderedDict(ab=nn.Linear(2, 2), a=nn.Sequential(nn.ReLU(), nn.Linear(2, 2))))
    assert cutting.stage_names(cut_at(model, torch.zeros(1, 2), ["a"]))[0] == ["ab.weight", "ab.bias"]


# --- What a stage is --------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.tokens = nn.Linear(3, 3), nn.Linear(3, 2), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.a(x)
        x = x + y if mask is None else x * mask
        return {"out": self.b(x + self.tokens), "tokens": self.tokens, "hidden": x}


def test_several_inputs_and_outputs() -> None:
    model, x, y = TwoInputs(), torch.randn(2, 3), torch.randn(2, 3)
    stages = split(profile(model, (x, y)), [2, 3, 4])  # the first operation asserts that there is no mask
    expected = model(x, y)
    value = stages[0](x, y)
    assert isinstance(value, tuple)  # y is needed later
    value = stages[2](stages[1](*value))
    assert isinstance(value, tuple)  # and what is returned
    value = stages[3](value)
    assert value.keys() == expected.keys()
    assert all(torch.equal(value[name], expected[name]) for name in expected)


def test_copied_and_pickled_stages_are_stages() -> None:
    model, x = network("resnet").eval(), images()
    found = profile(model, x)
    two = next(cut for cut in range(1, len(found.operations)) if len(found.live[cut]) == 2)
    first, second = split(found, [two])
    given = first(x)
    for twin in (copy.deepcopy(second), pickle.loads(pickle.dumps(second))):
        assert isinstance(twin, Stage)
        assert same_state(twin.state_dict(), second.state_dict())
        assert torch.equal(twin(given), second(*given))
        assert (twin.received, twin.sent) == (second.received, second.sent)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_traced_is_named_and_can_be_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Branching(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="1 .Branching. cannot be traced"):
        cut_graph(model, torch.ones(2, 3), 2)


def test_the_table_says_what_stages_do() -> None:
    model, x = network("resnet", torch.float32).train(), images(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    stages = cut_graph(model, x, 3)
    table = cutting.balance_table(stages, x)
    assert same_state(model.state_dict(), before)
    assert table["parameters"].sum() == sum(p.numel() for p in model.parameters())
    assert table["layers"].sum() == sum(isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear) for m in model.modules())
    assert table["share"].sum() == pytest.approx(1)
    value: Any = x
    for number, stage in enumerate(stages):
        given = value if isinstance(value, tuple) else (value,)
        value = stage(value)
        out = value if isinstance(value, tuple) else (value,)
        assert table.loc[number, "received"] == sum(v.nbytes for v in given)
        assert table.loc[number, "sent"] == sum(v.nbytes for v in out)
    layers = [layer for _, layer in cutting.chain(model)]
    of_layers = cutting.balance_table(layers, x)
    assert of_layers["mflops"].tolist() == [count / 1e6 for count in cutting.flop_costs(layers, x)]
    assert of_layers["sent"].tolist()[:-1] == cutting.sent_bytes(layers, x)


def test_operations_are_measured_one_by_one_and_nothing_changes() -> None:
    model, x = network("convnet").train(), images()
    before = copy.deepcopy(model.state_dict())
    seconds = cutting.measure_operations(model, x, repeats=2)
    assert len(seconds) == len(profile(model, x).operations)
    assert all(0 < s < math.inf for s in seconds)
    assert same_state(model.state_dict(), before)
    assert len(cut_graph(model, x, 3, seconds)) == 3


def test_wrong_requests_are_refused() -> None:
    model, x = network("resnet"), images()
    operations = len(profile(model, x).operations)
    for call, message in (
        (lambda: cut_graph(model, x, 0), "parts=0"),
        (lambda: cut_graph(model, x, operations + 1), f"parts={operations + 1}: must be at most {operations}"),
        (lambda: cut_graph(model, x, 2, [1.0]), f"one number for each of {operations} operations"),
        (lambda: cut_graph(model, x, 2, bandwidth=0), "bandwidth=0"),
        (lambda: cut_at(model, x, ["nowhere"]), "layers names 'nowhere'"),
        (lambda: cut_at(model, x, ["stages.1", "stages.0"]), "cuts=.*rising"),
        (lambda: cut_at(model, x, ["stem"]), "cuts=.*rising"),
        (lambda: cutting.merge_states([model, model]), "number 1 holds"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_on_a_gpu(dtype: torch.dtype) -> None:
    model, x = network("resnet", dtype).cuda(), images(dtype=dtype).cuda()
    stages = cut_graph(model, x, 3)
    assert torch.equal(nn.Sequential(*stages)(x), copy.deepcopy(model)(x))
    assert all(s > 0 for s in cutting.measure_costs([layer for _, layer in cutting.chain(model)], x, repeats=2))
    assert all(s > 0 for s in cutting.measure_operations(model, x, repeats=1))
