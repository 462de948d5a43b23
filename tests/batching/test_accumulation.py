"""Parts that add up to the batch, and ghosts that are the parts of an accumulated run."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.batching import accumulation
from course_lib.batching.accumulation import GhostBatchNorm1d, GhostBatchNorm2d, accumulated_gradient, ghost
from course_lib.lab.data import batches, load
from course_lib.lab.models import convnet, freeze, mlp, resnet
from course_lib.lab.training import Recipe, fit, fresh
from course_lib.regularization import StochasticDepth, with_stochastic_depth

RECIPE = Recipe(epochs=2, precision="float64", batch_size=12)
CLOSE = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return next(batches(load("digits", train_size=24).train, 10, dtype=torch.float64))


def network(make: Any = convnet, **settings: Any) -> nn.Module:
    return fresh(partial(make, (1, 8, 8), 10, **settings), RECIPE, seed=0)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    assert all(g is not None for g in found)
    return [g.clone() for g in found if g is not None]


def whole(model: nn.Module, x: Any, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    return gradients(model)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 10, [1, 2, 7], [9, 1]])
def test_parts_of_any_size_add_up_to_the_batch(parts: Any, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network(mlp, width=8)
    expected = whole(model, x, y)
    seen: list[int] = []

    def watched(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(len(y))
        return F.cross_entropy(model(x), y)

    next(model.parameters()).grad = torch.full_like(next(model.parameters()), 9.0)  # of an earlier step: must not count
    loss = accumulated_gradient(model, x, y, parts, objective=watched)
    assert seen == (parts if isinstance(parts, list) else [len(part) for part in y.chunk(parts)])
    assert loss.item() == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-13)
    for found, right in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(found, right, **CLOSE)


def test_inputs_in_parts_are_cut_alike(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    inner = network(mlp, width=8)

    def difference(model: nn.Module, pair: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(model(pair[0] - 2 * pair[1]), y)

    expected = whole(inner, x - 2 * x.flip(0), y)
    accumulated_gradient(inner, (x, x.flip(0)), y, 3, objective=difference)
    for found, right in zip(gradients(inner), expected, strict=True):
        torch.testing.assert_close(found, right, **CLOSE)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (0, "parts=0: must be a whole number of at least 1"),
        (11, "parts=11: must be at most 10, the examples of the batch"),
        ([4, 4], r"parts=\[4, 4\]: must add up to 10"),
        ([10, 0], r"parts\[1\]=0: must be"),
    ],
)
def test_parts_that_do_not_fit(parts: Any, said: str, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=said):
        accumulated_gradient(network(mlp), *batch, parts)


# --- Ghost batch norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [convnet, resnet])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_ghosts_are_the_parts_of_an_accumulated_batch(make: Any, parts: int, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    plain = network(make, width=2)
    ghosts = ghost(plain, -(-len(y) // parts))  # the last part is smaller, and so is the last ghost
    together = whole(copy.deepcopy(plain), x, y)
    accumulated_gradient(plain, x, y, parts)
    found = whole(ghosts, x, y)
    for a, b in zip(gradients(plain), found, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    # plain batch norm over the whole batch is something else
    assert max(float((a - b).abs().max()) for a, b in zip(together, found, strict=True)) > 1e-4
    for (name, a), b in zip(plain.named_buffers(), ghosts.buffers(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda said, name=name: f"{name}: {said}")
    counts = [b.item() for name, b in ghosts.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(counts) == {parts}


def test_a_whole_run_of_them_ends_with_the_same_weights() -> None:
    data = load("digits", train_size=36)
    plain = network(width=2)
    ghosts = ghost(plain, 4)
    fit(plain, data, replace(RECIPE, accumulate=3), seed=1)
    fit(ghosts, data, RECIPE, seed=1)
    for (name, a), b in zip(plain.state_dict().items(), ghosts.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize(
    ("make", "plain", "shape"),
    [(GhostBatchNorm1d, nn.BatchNorm1d, (12, 5)), (GhostBatchNorm2d, nn.BatchNorm2d, (12, 5, 3, 2))],
)
def test_one_layer_group_by_group(make: Any, plain: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    layer, usual = make(5, 4, momentum=0.3, eps=0.1).double(), plain(5, momentum=0.3, eps=0.1).double()
    torch.testing.assert_close(layer(x), torch.cat([usual(part) for part in x.split(4)]), **CLOSE)
    over = [0, *range(2, x.ndim)]
    group = layer(x)[4:8]
    torch.testing.assert_close(group.mean(over), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    layer, usual = layer.eval(), usual.eval()
    usual.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), usual(x))
    assert "size=4" in repr(layer)


def test_the_conversion_copies_and_keeps_everything() -> None:
    model = network(width=2)
    model.features[1].weight.requires_grad_(False)
    model.features[5].eval()
    changed = ghost(model, 6)
    kinds = [type(part) for part in changed.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [GhostBatchNorm2d] * 3
    assert not any(isinstance(part, GhostBatchNorm2d) for part in model.modules())
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), changed.state_dict().values(), strict=True)
    )
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in changed.parameters()}
    assert not changed.features[1].weight.requires_grad
    assert changed.features[1].training
    assert not changed.features[5].training
    assert next(changed.buffers()).dtype == torch.float64
    resized = ghost(changed, 3)
    assert resized.features[1].size == 3
    assert changed.features[1].size == 6
    assert isinstance(ghost(nn.BatchNorm1d(3), 2), GhostBatchNorm1d)


def test_ghosts_keep_the_noise_and_the_rest_of_what_they_replace(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    deep = with_stochastic_depth(network(resnet, width=2), 1.0).train()
    branches = [part for part in ghost(deep, 4).modules() if isinstance(part, StochasticDepth)]
    assert [part.p for part in branches] == [part.p for part in deep.modules() if isinstance(part, StochasticDepth)]
    assert len(branches) == 3
    frozen = ghost(freeze(network(width=2)), 4).train()
    before = copy.deepcopy(frozen.state_dict())
    frozen(x)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_what_has_no_ghosts_says_so() -> None:
    with pytest.raises(ValueError, match=r"model=MLP: must have a BatchNorm1d or BatchNorm2d"):
        ghost(network(mlp), 4)
    with pytest.raises(ValueError, match=r"size=1: must be a whole number of at least 2"):
        ghost(network(), 1)
    with pytest.raises(ValueError, match=r"more than 1 value per channel"):
        accumulation.GhostBatchNorm1d(3, 4)(torch.randn(5, 3))
