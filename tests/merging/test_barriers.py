"""Between networks: losses by hand, barriers by their definition, convexity, and two units that exchange places."""

from __future__ import annotations

import copy
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import merging
from course_lib.lab.data import Split
from course_lib.lab.training import evaluate
from tests.merging.small import close, network, normal, split

# --- Along a way ------------------------------------------------------------------------------------------------------


def test_losses_along_a_way_are_those_of_its_networks() -> None:
    a, b, held = network("mlp", 0), network("mlp", 1), split(30)
    path = merging.loss_along(a, b, held, 5)
    assert path.t == (0, 0.25, 0.5, 0.75, 1)
    for t, loss, accuracy in zip(path.t, path.losses, path.accuracies, strict=True):
        found = evaluate(merging.interpolate(a, b, t), held)
        assert (loss, accuracy) == pytest.approx((found.loss, found.accuracy))
    arc = merging.loss_along(a, b, held, [0, 0.4, 1], way=merging.slerp)
    assert arc.losses[1] == pytest.approx(evaluate(merging.slerp(a, b, 0.4), held).loss)


def test_networks_are_prepared_before_they_are_measured() -> None:
    a, b, held = network("convnet", 0), network("convnet", 1), split(30)
    path = merging.loss_along(a, b, held, 3, prepare=partial(merging.refresh_batch_norm, split=held))
    middle = merging.refresh_batch_norm(merging.interpolate(a, b, 0.5), held)
    assert path.losses[1] == pytest.approx(evaluate(middle, held).loss)
    same = merging.loss_along(a, b, held, 3)
    assert same.losses[1] != pytest.approx(path.losses[1])


def test_barriers_by_their_definitions() -> None:
    path = merging.Path((0.0, 0.25, 1.0), (1.0, 2.0, 3.0), (0.8, 0.5, 0.9))
    assert merging.barrier(path) == pytest.approx(2.0 - 1.5)
    assert merging.instability(path) == pytest.approx(0.5 - 0.15)
    assert merging.barrier(merging.Path((0.0, 0.5, 1.0), (1.0, 0.5, 1.0), (1.0, 1.0, 1.0))) == 0


def softmax_regression(seed: int) -> nn.Module:
    layer = nn.Linear(5, 4).double()
    with torch.no_grad():
        layer.weight.copy_(3 * normal(4, 5, seed=seed))
        layer.bias.copy_(normal(4, seed=50 + seed))
    return layer


@pytest.mark.parametrize("seed", range(5))
def test_where_the_loss_is_convex_there_is_no_barrier(seed: int) -> None:
    a, b, held = softmax_regression(seed), softmax_regression(seed + 10), split(40, 5)
    path = merging.loss_along(a, b, held, 9)
    assert merging.barrier(path) == 0
    middle = evaluate(merging.average([a, b]), held).loss
    assert middle < (path.losses[0] + path.losses[-1]) / 2


def test_two_units_in_another_order_have_a_barrier_that_is_known() -> None:
    s = 10.0
    x = torch.tensor([-3.0, -2.0, -1.5, -0.5, 0.0, 0.5, 1.5, 2.0])[:, None]
    held = Split(x, (x[:, 0].abs() > 1).long(), (0.0,), (1.0,))
    a, b = merging.swapped_units(s)
    wide = x.double()
    logits = torch.cat([0 * wide, s * (wide.abs() - 1)], 1)
    close(a(wide), logits, 1e-12)
    close(b(wide), logits, 1e-12)
    middle = merging.interpolate(a, b, 0.5)
    assert torch.equal(middle(wide), torch.tensor([[0.0, -s]], dtype=torch.float64).expand(8, 2))
    path = merging.loss_along(a, b, held, 3)
    assert path.accuracies == (1.0, 0.375, 1.0)
    at_the_middle = math.log1p(math.exp(-s)) + 5 / 8 * s
    assert merging.barrier(path) == pytest.approx(at_the_middle - F.cross_entropy(logits, held.labels).item())
    orders = merging.match_weights(a, b, generator=torch.Generator())
    assert merging.barrier(merging.loss_along(a, merging.permute(b, orders), held)) == pytest.approx(0, abs=1e-12)


# --- A plane ----------------------------------------------------------------------------------------------------------


def test_a_plane_has_the_three_networks_at_its_corners() -> None:
    """A grid of two by two around a right angle of networks, so that three of its points are the networks."""
    a, b, c = (network("mlp", 0) for _ in range(3))
    with torch.no_grad():
        b.get_parameter("head.weight")[0, 0] += 3.0
        c.get_parameter("head.weight")[1, 1] -= 2.0
    held = split(20)
    found = merging.plane(a, b, c, held, 2, margin=0.0)
    close(found.corners, torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 2.0]], dtype=torch.float64), 1e-12)
    assert found.losses[0, 0].item() == pytest.approx(evaluate(a, held).loss, rel=1e-6)
    assert found.losses[0, 1].item() == pytest.approx(evaluate(b, held).loss, rel=1e-6)
    assert found.losses[1, 0].item() == pytest.approx(evaluate(c, held).loss, rel=1e-6)
    with torch.no_grad():
        b.get_parameter("head.weight")[1, 1] -= 2.0
    assert found.losses[1, 1].item() == pytest.approx(evaluate(b, held).loss, rel=1e-6)


def test_distances_on_a_plane_are_those_of_weights() -> None:
    models, held = [network("mlp", seed) for seed in range(3)], split(6)
    found = merging.plane(*models, held, 3, margin=0.5)
    rows = [nn.utils.parameters_to_vector(model.parameters()).detach() for model in models]
    for i in range(3):
        for j in range(3):
            assert (found.corners[i] - found.corners[j]).norm().item() == pytest.approx(
                (rows[i] - rows[j]).norm().item()
            )
    # the middle of the grid, rebuilt from an orthonormal basis
    first = (rows[1] - rows[0]) / (rows[1] - rows[0]).norm()
    second = rows[2] - rows[0] - ((rows[2] - rows[0]) @ first) * first
    point = rows[0] + found.x[1] * first + found.y[1] * second / second.norm()
    middle = copy.deepcopy(models[0])
    nn.utils.vector_to_parameters(point, middle.parameters())
    assert found.losses[1, 1].item() == pytest.approx(evaluate(middle, held).loss, rel=1e-6)
    assert found.accuracies[1, 1].item() == pytest.approx(evaluate(middle, held).accuracy)
    low, high = found.corners.amin(0), found.corners.amax(0)
    assert found.x[0].item() == pytest.approx(float(low[0] - 0.5 * (high[0] - low[0])))
    assert found.y[-1].item() == pytest.approx(float(high[1] + 0.5 * (high[1] - low[1])))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    a, b, c, held = *(network("mlp", seed) for seed in range(3)), split(5)
    norms = [network("convnet", seed) for seed in range(3)]
    line = merging.interpolate(a, b, 0.5)
    rounded = [copy.deepcopy(network).float() for network in (a, b)]
    rounded.append(merging.interpolate(*rounded, 0.3))
    cases: list[tuple[str, Any]] = [
        ("b differs from a", lambda: merging.loss_along(a, norms[0], held)),
        ("points=1: must be a whole number of at least 2", lambda: merging.loss_along(a, b, held, 1)),
        ("points=(0, 0.5): must be rising numbers", lambda: merging.loss_along(a, b, held, [0, 0.5])),
        ("points=(0, 0.5, 0.5, 1): must be rising", lambda: merging.loss_along(a, b, held, [0, 0.5, 0.5, 1])),
        ("a, b and c lie on a line", lambda: merging.plane(a, b, line, held)),
        ("a, b and c lie on a line", lambda: merging.plane(a, a, b, held)),
        ("a, b and c lie on a line", lambda: merging.plane(*rounded, held)),
        ("points=1: must be a whole number of at least 2", lambda: merging.plane(a, b, c, held, 1)),
        ("margin=-1: must be a number of at least 0", lambda: merging.plane(a, b, c, held, margin=-1)),
        ("prepare=None: must be given for networks with batch norm", lambda: merging.plane(*norms, held)),
        ("sharpness=0: must be a number above 0", lambda: merging.swapped_units(0)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_barriers_on_the_gpu() -> None:
    models, held = [network("mlp", seed) for seed in range(3)], split(20)
    there = [copy.deepcopy(model).cuda() for model in models]
    assert merging.loss_along(*there[:2], held, 3).losses == pytest.approx(
        merging.loss_along(*models[:2], held, 3).losses
    )
    close(merging.plane(*there, held, 2).losses, merging.plane(*models, held, 2).losses, 1e-6)
