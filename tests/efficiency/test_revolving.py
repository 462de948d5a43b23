"""Schedules against their closed form and a search of all; gradients against those without, bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from course_lib.efficiency.checkpointing import checkpointed
from course_lib.efficiency.revolving import Way, extra_steps, least_steps, revolve, revolved
from course_lib.lab.models import resnet, vit
from course_lib.lab.timing import peak_memory
from tests.efficiency.test_checkpointing import assert_same, dropping, plainly, results

SIZES = [(n, s) for n in (1, 2, 3, 5, 8, 13, 21, 30) for s in (1, 2, 3, 5, 9)]


@cache
def fewest(left: int, kept: frozenset[int], room: int) -> int:
    """Steps to advance until layers 0 … left - 1 are reversed, over all ways there are (each restores, advances with
    snapshots anywhere on its way, reverses the last layer; snapshots behind it are of no use).
    """
    if left == 0:
        return 0
    kept = frozenset(place for place in kept if place < left)
    free = room - len(kept)
    found = math.inf
    for start in kept:
        for chosen in subsets(range(start + 1, left), free):
            advanced = left - 1 - start
            found = min(found, advanced + fewest(left - 1, kept | chosen, room))
        for given_up in kept - {0, start}:  # a snapshot may be thrown away, too
            found = min(found, fewest(left, kept - {given_up}, room))
    return int(found)


def subsets(places: range, most: int) -> list[frozenset[int]]:
    found = [frozenset[int]()]
    for place in places:
        found += [one | {place} for one in found if len(one) < most]
    return found


def test_closed_form() -> None:
    for n, s in SIZES:
        assert extra_steps(n, s) == least_steps(n, s)
    assert [extra_steps(n, 1) for n in (1, 2, 3, 10)] == [0, 1, 3, 45], "from the input each time"
    assert [extra_steps(n, n) for n in (1, 2, 10)] == [0, 1, 9], "each layer but the last once"
    assert extra_steps(10, 3) == 15


def test_nothing_takes_fewer() -> None:
    for n, s in [(2, 1), (4, 2), (5, 2), (6, 2), (6, 3), (7, 3)]:
        assert fewest(n, frozenset({0}), s) == extra_steps(n, s)


def followed(steps: int, snapshots: int) -> tuple[list[int], int, int, int]:
    """Let a pencil follow a schedule: layers reversed, steps advanced, snapshots at most, runs of a layer at most."""
    state, kept, most, order, runs = 0, set[int](), 0, [], [0] * steps
    for do, layer, to in revolve(steps, snapshots):
        match do:
            case "keep":
                assert state == layer
                kept.add(layer)
                most = max(most, len(kept))
            case "restore" | "take":
                assert layer in kept
                state = layer
                kept -= {layer} if do == "take" else set()
            case "advance":
                assert state == layer < to
                for number in range(layer, to):
                    runs[number] += 1
                state = to
            case "reverse":
                assert state == layer
                order.append(layer)
    assert not kept
    return order, sum(runs), most, max(runs)


def test_schedules_do_what_they_promise() -> None:
    for n, s in SIZES:
        order, advanced, most, repeats = followed(n, s)
        assert order == list(range(n))[::-1]
        assert advanced == extra_steps(n, s)
        assert most <= s
        assert n <= math.comb(s + repeats, s), "with r runs no more layers than this"


def test_gradients_are_the_same() -> None:
    model = dropping()
    for wants_x in (True, False):
        x = torch.randn(5, 6, requires_grad=wants_x)
        for snapshots in (1, 2, 3, 9):
            found = results(lambda m, x, s=snapshots: revolved(m, s)(x), model, x)
            assert_same(found, results(plainly, model, x))


def test_shared_weights_are_summed() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(3, 4)
    assert_same(results(lambda m, x: revolved(m, 1)(x), model, x), results(plainly, model, x))


@pytest.mark.parametrize("network", [partial(resnet, blocks=(2, 1)), partial(vit, depth=3)])
def test_networks_of_the_laboratory(network: Callable[..., nn.Module]) -> None:
    """Batch norm's statistics move once, however often a block runs."""
    torch.manual_seed(0)
    model, x = network((1, 8, 8), 3, width=8).double(), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    assert_same(results(lambda m, x: revolved(m, 2)(x), model, x), results(plainly, model, x))
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    plain(x).sum().backward()
    revolved(ours, 2)(x).sum().backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_layers_run_as_often_as_the_schedule_says() -> None:
    layers: list[nn.Module] = [nn.Tanh() for _ in range(10)]
    way = Way(layers, torch.ones(2), revolve(10, 3))
    most = 0
    while way.to_next_reverse():
        most = max(most, len(way.kept))
    assert sum(way.runs) == 10 + extra_steps(10, 3)
    assert most <= 3
    assert not way.kept


def test_less_memory_than_segments() -> None:
    model, x = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(20))), torch.randn(4096, 16)

    def bytes_of(run: nn.Module) -> float:
        peak = peak_memory(lambda: run(x).sum().backward(), device="cpu").bytes
        return peak / (4096 * 16 * 4)

    few, segments, plain = bytes_of(revolved(model, 3)), bytes_of(checkpointed(model, 4)), bytes_of(model)
    assert few + 2 < segments < plain - 8
    assert few < 3 + 5


def test_without_gradients_and_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = dropping().eval(), torch.randn(2, 6)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr("course_lib.efficiency.revolving.revolve", None)  # nothing is kept, so no schedule is made
        assert torch.equal(revolved(model, 2)(x), model(x))
    for call, message in [
        (lambda: revolved(model, 0), "snapshots=0"),
        (lambda: revolve(0, 1), "steps=0"),
        (lambda: extra_steps(2, 0), "snapshots=0"),
        (lambda: least_steps(0, 2), "steps=0"),
    ]:
        with pytest.raises(ValueError, match=f"{message}: must be a whole number of at least 1"):
            call()


@pytest.mark.gpu
def test_on_cuda() -> None:
    model, x = dropping().cuda(), torch.randn(5, 6, device="cuda", requires_grad=True)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return revolved(model, 2)(x)

    assert_same(results(run, model, x), results(plainly, model, x))


def test_a_first_layer_that_wants_no_gradient_is_passed_by() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = torch.randn(3, 2, 4).double()
    for frozen in (False, True):
        model[1].requires_grad_(not frozen)
        assert_same(results(lambda m, x: revolved(m, 2)(x), model, x), results(plainly, model, x))


def test_a_second_backward_pass_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    y = revolved(model, 2)(torch.randn(3, 4))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        y.sum().backward()
