"""A path through the supernet against the network that it stands for, sums of seconds on a clock made by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.efficiency import supernet as n
from course_lib.efficiency.search import SearchSpace, Stage, rank_correlation
from course_lib.efficiency.supernet import LatencyTable, Layer, Supernet, assembled
from course_lib.lab.costs import flops
from course_lib.lab.data import Dataset, load
from course_lib.lab.training import Recipe, fit

SHAPE = (1, 9, 9)
SPACE = SearchSpace(widths=((4, 8), (8, 12)), kernels=(3, 5), depths=(1, 2))
MIXED = (Stage("depthwise_separable", 5, 4, 2), Stage("full", 3, 12, 1))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    made = Supernet(SPACE, SHAPE, 5).double()
    for norm in made.modules():  # as after training
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data = 0.5 + torch.rand(norm.num_features, dtype=torch.float64)
            norm.bias.data = torch.randn(norm.num_features, dtype=torch.float64)
    return made


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=200)


# --- Networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SPACE.largest, SPACE.smallest, MIXED])
def test_an_architecture_costs_what_is_counted(path: Any) -> None:
    model = assembled(path, SHAPE, 5).eval()
    cost = n.architecture_cost(path, SHAPE, 5)
    x = torch.zeros(2, *SHAPE)
    assert cost.parameters == model.parameter_count
    assert 2 * 2 * cost.multiplications == flops(model, x)
    assert torch.equal(model(x), model.head(model.embedding(x)))
    assert model.embedding(x).shape == (2, path[-1].width)
    assert len(model.body) == 1 + sum(stage.depth for stage in path)


def test_the_layers_of_an_architecture() -> None:
    assert n.layers_of(MIXED, SHAPE, 5) == [
        Layer("full", 1, 8, (9, 9), 1, 3),
        Layer("depthwise_separable", 8, 4, (9, 9), 2, 5),
        Layer("depthwise_separable", 4, 4, (5, 5), 1, 5),
        Layer("full", 4, 12, (5, 5), 2, 3),
        Layer("head", 12, 5, (3, 3)),
    ]
    two = n.layers_of((MIXED[0], Stage("bottleneck", 3, 12, 2)), SHAPE, 5)
    assert [layer.stride for layer in two] == [1, 2, 1, 2, 1, 1]
    assert two[-2] == Layer("bottleneck", 12, 12, (3, 3), 1, 3)


# --- All of them in one -----------------------------------------------------------------------------------------------


def test_a_slice_is_the_first_channels_and_the_middle() -> None:
    w = normal(4, 3, 5, 5)
    found = n.sliced_weight(w, (2, 3, 3, 3))
    assert torch.equal(found, w[:2, :3, 1:4, 1:4])
    assert found.untyped_storage().data_ptr() == w.untyped_storage().data_ptr(), "shared, not copied"
    assert torch.equal(n.sliced_weight(w, (4, 1, 1, 5)), w[:, :1, 2:3])


@pytest.mark.parametrize("path", [SPACE.largest, SPACE.smallest, MIXED])
def test_a_path_is_its_network_with_the_weights_shared(supernet: Supernet, path: Any) -> None:
    """In training mode, in which both norm by the batch: values and gradients."""
    x, y = normal(6, *SHAPE), torch.arange(6) % 5
    alone = n.extracted(supernet, path).train()
    torch.testing.assert_close(supernet(x, path), alone(x), rtol=1e-10, atol=1e-10)
    supernet.zero_grad()
    F.cross_entropy(supernet(x, path), y).backward()
    F.cross_entropy(alone(x), y).backward()
    mine = torch.cat([p.grad[p.grad != 0] for p in supernet.parameters() if p.grad is not None])
    theirs = torch.cat([p.grad[p.grad != 0] for p in alone.parameters() if p.grad is not None])
    torch.testing.assert_close(mine.sort()[0], theirs.sort()[0], rtol=1e-8, atol=1e-10)
    assert next(alone.parameters()).dtype == torch.float64


def test_without_a_path_it_is_the_largest(supernet: Supernet) -> None:
    x = normal(3, *SHAPE)
    assert torch.equal(supernet(x), supernet(x, SPACE.largest))
    assert torch.equal(supernet.eval()(x), supernet.train()(x)), "the batch's own statistics, always"
    assert torch.equal(supernet(x), supernet.head(supernet.embedding(x)))
    assert not [name for name, _ in supernet.named_parameters() if name.endswith("bias") and "running" in name]


def test_a_path_gets_the_statistics_that_it_has(digits: Dataset) -> None:
    torch.manual_seed(1)
    shared = Supernet(SPACE, digits.input_shape, 10).double()
    made = n.extracted(shared, MIXED, digits.train)
    norm = made.body[0][1]  # type: ignore[index]
    x = made.body[0][0](images(digits))  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(norm.running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-6, atol=1e-8)
    fresh = n.extracted(shared, MIXED)
    assert torch.equal(fresh.body[0][1].running_mean, torch.zeros(8, dtype=torch.float64))  # type: ignore[index]


def images(digits: Dataset) -> Tensor:
    from course_lib.lab.data import batches

    ((x, _),) = batches(digits.train, 1000, dtype=torch.float64)
    return x


def test_training_by_single_paths_draws_and_repeats(supernet: Supernet) -> None:
    x, y = normal(6, *SHAPE), torch.arange(6) % 5
    torch.manual_seed(5)
    drawn = [SPACE.sample() for _ in range(3)]
    torch.manual_seed(5)
    losses = [n.single_path(supernet, x, y) for _ in range(3)]
    wanted = [F.cross_entropy(supernet(x, path), y) for path in drawn]
    torch.testing.assert_close(torch.stack(losses), torch.stack(wanted), rtol=0, atol=0)


def test_the_sandwich_has_both_ends(supernet: Supernet) -> None:
    x, y = normal(6, *SHAPE), torch.arange(6) % 5
    torch.manual_seed(5)
    paths = [SPACE.largest, SPACE.smallest, SPACE.sample(), SPACE.sample(), SPACE.sample()]
    torch.manual_seed(5)
    found = n.sandwich(supernet, x, y, between=3)
    wanted = sum(F.cross_entropy(supernet(x, path), y) for path in paths) / 5
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    ends = (F.cross_entropy(supernet(x, SPACE.largest), y) + F.cross_entropy(supernet(x, SPACE.smallest), y)) / 2
    torch.testing.assert_close(n.sandwich(supernet, x, y, between=0), ends, rtol=1e-12, atol=0)


def test_a_trained_supernet_scores_all_its_paths(digits: Dataset) -> None:
    """Better than chance (an error of 0.9) on all; and the error is that of the extracted network."""
    torch.manual_seed(0)
    space = SearchSpace(widths=((4, 8), (8, 12)), kinds=("full",))
    shared = Supernet(space, digits.input_shape, 10)
    recipe = Recipe(epochs=15, batch_size=25, objective=n.single_path, validate_every=15,
                    optimizer=partial(torch.optim.Adam, lr=1e-2))  # fmt: skip
    fit(shared, digits, recipe, seed=0, progress=False)
    paths = [space.largest, space.smallest, (Stage("full", 5, 4, 1), Stage("full", 3, 12, 2))]
    errors = [n.shared_error(shared, path, digits.train, digits.val) for path in paths]
    assert max(errors) < 0.5
    logits = n.extracted(shared, paths[0], digits.train).eval()
    from course_lib.lab.training import logits_of

    wrong = (logits_of(logits, digits.val).argmax(1) != digits.val.labels).double().mean()
    assert errors[0] == pytest.approx(float(wrong), abs=1e-6)


# --- Time -------------------------------------------------------------------------------------------------------------


def test_seconds_are_summed_and_each_shape_is_measured_once() -> None:
    """On a machine that takes a second for a thousand parameters, and one more for each call."""
    asked: list[tuple[int, torch.Size]] = []

    def seconds(module: nn.Module, x: Tensor) -> float:
        assert not module.training
        asked.append((sum(p.numel() for p in module.parameters()), x.shape))
        module(x)  # it fits
        return 1 + asked[-1][0] / 1000

    table = LatencyTable(SHAPE, 5, batch=3, seconds=seconds, dtype=torch.float64)
    parameters = n.architecture_cost(MIXED, SHAPE, 5).parameters
    assert table.predicted(MIXED) == pytest.approx(5 + parameters / 1000)
    assert [shape for _, shape in asked] == [(3, 1, 9, 9), (3, 8, 9, 9), (3, 4, 5, 5), (3, 4, 5, 5), (3, 12, 3, 3)]
    count = len(asked)
    table.predicted(MIXED)
    assert len(asked) == count == len(table.measured)
    twice = (MIXED[0], Stage("full", 3, 12, 2))
    table.predicted(twice)
    assert len(asked) == count + 1
    found = table.compare([MIXED, twice])
    assert found["predicted"].tolist() == pytest.approx([table.predicted(MIXED), table.predicted(twice)])
    assert found["measured"].tolist() == pytest.approx(
        [1 + n.architecture_cost(path, SHAPE, 5).parameters / 1000 for path in (MIXED, twice)]
    )
    assert found["error"].tolist() == pytest.approx((found["predicted"] / found["measured"] - 1).tolist())


def test_the_clock_is_that_of_the_laboratory() -> None:
    calls: list[Tensor] = []
    module = nn.Identity()
    module.register_forward_hook(lambda *given: calls.append(given[-1]))
    assert n.measured_seconds(module, torch.zeros(2), repeats=3) > 0
    assert len(calls) == 2 + 3


def test_the_sum_orders_networks_by_their_cost() -> None:
    """With seconds in proportion to multiplications."""
    costs = {path: n.architecture_cost(path, SHAPE, 5).multiplications for path in SPACE}
    table = LatencyTable(SHAPE, 5, seconds=lambda module, x: float(flops(module, x)))
    paths = [*costs][::17]
    assert rank_correlation([table.predicted(p) for p in paths], [costs[p] for p in paths]) == pytest.approx(1)


def test_bad_input_is_named(supernet: Supernet) -> None:
    other = (Stage("full", 3, 5, 1), Stage("full", 3, 8, 1))
    x = normal(2, *SHAPE)
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("kind='quick': must be one of", lambda: assembled((Stage("quick", 3, 4, 1),), SHAPE, 5)),
        ("classes=0: must be", lambda: assembled(MIXED, SHAPE, 0)),
        ("height=0: must be", lambda: n.architecture_cost(MIXED, (1, 0, 9), 5)),
        ("must be some of full", lambda: Supernet(SearchSpace(kinds=("bottleneck",)), SHAPE, 5)),
        ("must be an architecture of the space", lambda: supernet(x, other)),
        ("must be an architecture of the space", lambda: n.extracted(supernet, other)),
        ("shape=(3, 4, 3, 3): must be at most", lambda: n.sliced_weight(normal(2, 4, 3, 3), (3, 4, 3, 3))),
        ("between=-1: must be", lambda: n.sandwich(supernet, x, torch.zeros(2).long(), between=-1)),
        ("batch=0: must be", lambda: LatencyTable(SHAPE, 5, batch=0)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    torch.manual_seed(0)
    shared = Supernet(SPACE, SHAPE, 5).double().cuda()
    x = normal(4, *SHAPE).cuda()
    alone = n.extracted(shared, MIXED).train()
    torch.testing.assert_close(shared(x, MIXED), alone(x), rtol=1e-9, atol=1e-9)
    assert LatencyTable(SHAPE, 5, batch=4).predicted(MIXED) > 0
