"""Recomputation against none and against ``torch.utils.checkpoint``, bit for bit; cuts against brute force."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from course_lib.efficiency import checkpointing
from course_lib.efficiency.checkpointing import (
    Activations,
    activations,
    best_cuts,
    best_segments,
    checkpointed,
    even_cuts,
    held,
    in_segments,
    peak,
    recomputed,
    selective,
    time_ratio,
)
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.partitioning.saved import Saved

Run = Callable[[nn.Module, Tensor], Tensor]


def dropping(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 3))
    return nn.Sequential(*layers).to(dtype)


def results(run: Run, model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The output, the gradients of the input and of each parameter, the random state afterwards; of a copy."""
    model, x = copy.deepcopy(model), x.detach().clone().requires_grad_(x.requires_grad)
    torch.manual_seed(3)
    y = run(model, x)
    between = torch.rand(5)  # other work draws numbers, too
    (y**2).sum().backward()
    return [y, x.grad, *(p.grad for p in model.parameters()), between, torch.rand(5)]


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def assert_same(found: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (b is not None and torch.equal(a, b))


# --- Running a part again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_changes_by_a_bit(dtype: torch.dtype, wants_x: bool) -> None:
    model = dropping(dtype)
    x = torch.randn(5, 6, dtype=dtype, requires_grad=wants_x)
    wanted = results(plainly, model, x)
    assert_same(results(recomputed, model, x), wanted)
    assert_same(results(partial(checkpoint, use_reentrant=False), model, x), wanted)
    assert_same(results(lambda m, x: checkpointed(m, 3)(x), model, x), wanted)


@pytest.mark.parametrize("network", [mlp, convnet, resnet, vit])
def test_networks_of_the_laboratory(network: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = network((1, 8, 8), 3, width=8).double(), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    assert_same(results(lambda m, x: checkpointed(m, 3)(x), model, x), results(plainly, model, x))


def test_a_frozen_part_and_one_that_is_not_used() -> None:
    model = dropping()
    model[0].requires_grad_(False)
    x = torch.randn(5, 6)
    assert_same(results(recomputed, model, x), results(plainly, model, x))

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    idle = Idle()
    recomputed(idle, x).sum().backward()
    assert idle.idle.weight.grad is None
    assert idle.used.weight.grad is not None


def test_whole_numbers_have_no_gradient() -> None:
    torch.manual_seed(0)
    model, words = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.tensor([[1, 8], [0, 3]])
    assert_same(results(recomputed, model, words), results(plainly, model, words))


def test_shared_weights_get_both_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model, x = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh()), torch.randn(3, 4)
    assert_same(results(recomputed, model, x), results(plainly, model, x))
    assert_same(results(lambda m, x: checkpointed(m, [2])(x), model, x), results(plainly, model, x))


def test_mixed_precision_is_as_it_was() -> None:
    model, x = dropping(), torch.randn(5, 6)
    kinds = []
    model[3].register_forward_hook(lambda *args: kinds.append(args[-1].dtype))

    def mixed(run: Run, model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, x)

    assert_same(results(partial(mixed, recomputed), model, x), results(partial(mixed, plainly), model, x))
    assert set(kinds) == {torch.bfloat16}


def test_how_often_layers_run() -> None:
    model, runs = dropping(), [0] * 7
    for number, layer in enumerate(model):
        layer.register_forward_pre_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    checkpointed(model, [2, 5])(torch.randn(2, 6)).sum().backward()
    assert runs == [2, 2, 2, 2, 2, 1, 1], "the last segment is still there"
    with torch.no_grad():
        checkpointed(model, [2, 5])(torch.randn(2, 6))
    assert runs == [3, 3, 3, 3, 3, 2, 2]


def test_running_statistics_move_once_and_under_torch_twice() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.1), nn.ReLU())
    x = torch.randn(8, 3)
    plain, ours, theirs, doubled = (copy.deepcopy(model) for _ in range(4))
    plain(x).sum().backward()
    recomputed(ours, x).sum().backward()
    checkpoint(theirs, x, use_reentrant=False).sum().backward()
    doubled[1].momentum = 1 - (1 - 0.1) ** 2
    doubled(x)
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert ours[1].track_running_stats
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(theirs[1], name), getattr(doubled[1], name))
        assert not torch.equal(getattr(theirs[1], name), getattr(plain[1], name))
    assert (plain[1].num_batches_tracked, theirs[1].num_batches_tracked) == (1, 2)


def test_statistics_come_back_after_an_error_and_in_evaluation() -> None:
    norm = nn.BatchNorm1d(2)
    with pytest.raises(RuntimeError), checkpointing.statistics_left_alone(norm):  # noqa: PT012
        assert not norm.track_running_stats
        raise RuntimeError
    assert norm.track_running_stats
    never = nn.BatchNorm1d(2, track_running_stats=False)
    with checkpointing.statistics_left_alone(never):
        pass
    assert not never.track_running_stats
    model, x = nn.Sequential(nn.Linear(2, 2), norm).eval(), torch.randn(4, 2)
    assert_same(results(recomputed, model, x), results(plainly, model, x))


def test_what_was_written_over_is_an_error() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(2, 3)
    y = recomputed(layer, x)
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.gpu
def test_on_cuda() -> None:
    model, x = dropping().cuda(), torch.randn(5, 6, device="cuda", requires_grad=True)
    assert_same(results(recomputed, model, x), results(plainly, model, x))
    assert_same(results(lambda m, x: checkpointed(m, 3)(x), model, x), results(plainly, model, x))


# --- Segments ---------------------------------------------------------------------------------------------------------


def chain_of(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh()) for _ in range(layers)))


@pytest.mark.parametrize(("layers", "segments"), [(16, 1), (16, 2), (16, 4), (16, 8), (16, 16), (10, 3)])
def test_held_is_what_is_counted(layers: int, segments: int) -> None:
    """A layer keeps its output, which is the next one's input; the batch is 32 rows of 16 float32."""
    model, x = chain_of(layers), torch.randn(32, 16)
    saved = Saved(model.parameters())
    with saved:
        checkpointed(model, segments)(x).sum().backward()
    longest = math.ceil(layers / segments)
    # of the last segment the input is a checkpoint, too, but for a single one, which the caller's batch is
    assert saved.peak / (32 * 16 * 4) == segments + longest
    assert held(layers, segments) <= segments + longest < held(layers, segments) + 1


def test_segments_are_those_of_torch() -> None:
    model, x = dropping(), torch.randn(5, 6)
    theirs = results(lambda m, x: checkpoint_sequential(m, 3, x, use_reentrant=False), model, x)
    assert_same(results(lambda m, x: checkpointed(m, 3)(x), model, x), theirs)


def test_it_is_the_model_itself() -> None:
    model = vit((1, 4, 4), 3, width=8, depth=2, heads=2)
    wrapped = checkpointed(model, 2)
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in model.parameters()}
    assert set(wrapped.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    wrapped.eval()
    assert not model.blocks[0].training
    copied, x = copy.deepcopy(wrapped), torch.randn(2, 1, 4, 4)
    wanted = wrapped(x)
    with torch.no_grad():
        copied.model.head.weight.zero_()
        copied.model.position.zero_()
    assert torch.equal(wrapped(x), wanted)
    assert copied(x).std(0).max() == 0, "the copy's layers are the copy's"


def test_formulas() -> None:
    assert held(100, 10) == 20 == 2 * math.sqrt(100)
    for layers in range(1, 200):
        best = best_segments(layers)
        assert held(layers, best) == min(held(layers, k) for k in range(1, layers + 1))
        assert held(layers, best) >= 2 * math.sqrt(layers) - 1e-9
    assert time_ratio() == pytest.approx(4 / 3)
    assert time_ratio(1) == 1
    assert time_ratio(4) == pytest.approx((1 + 2 + 3 / 4) / 3)
    assert time_ratio(backward=1.0) == 1.5
    assert even_cuts(11, 3) == [3, 7], "3, 4 and 4 layers"
    assert even_cuts(5, 5) == [1, 2, 3, 4]
    assert even_cuts(4, 1) == []


# --- Uneven layers ----------------------------------------------------------------------------------------------------


def peak_by_hand(sizes: Activations, cuts: tuple[int, ...]) -> float:
    edges = [0, *cuts, len(sizes.inputs)]
    final = sum(sizes.inputs[start] for start in edges[:-2]) + sizes.last[edges[-2]]
    return max(
        final,
        *(
            sum(sizes.inputs[start] for start in edges[: j + 1]) + sizes.inside[edges[j], edges[j + 1]]
            for j in range(len(edges) - 2)
        ),
        0,
    )


def additive(inputs: list[int], kept: list[int], keeps_input: list[int]) -> Activations:
    """Layers of which each keeps something of its own, and perhaps its input."""
    n = len(inputs)
    inside = np.array([[sum(kept[i:j]) for j in range(n + 1)] for i in range(n)], float)
    return Activations(np.array(inputs, float), inside, inside[:, n] + np.array(inputs) * keeps_input)


def test_best_cuts_are_those_of_brute_force() -> None:
    generator = np.random.default_rng(0)
    for n in (1, 2, 5, 8):
        for _ in range(12):
            sizes = additive(*(generator.integers(low, high, n).tolist() for low, high in ((1, 9), (0, 30), (0, 2))))
            every = [cuts for k in range(n) for cuts in itertools.combinations(range(1, n), k)]
            for most in (None, 1, 2, 3, n + 2):
                allowed = [cuts for cuts in every if most is None or len(cuts) < most]
                found = best_cuts(sizes, most)
                assert tuple(found) in allowed
                assert peak(sizes, found) == peak_by_hand(sizes, tuple(found))
                least = min(peak_by_hand(sizes, cuts) for cuts in allowed)
                assert peak(sizes, found) == least
                assert len(found) == min(len(cuts) for cuts in allowed if peak_by_hand(sizes, cuts) == least)


def test_cuts_by_hand() -> None:
    """The first layer keeps most, so it stands alone; even cuts would put it with the second."""
    sizes = additive([1] * 4, [8, 2, 2, 2], [1] * 4)
    assert best_cuts(sizes) == [1]
    assert [peak(sizes, cuts) for cuts in ([1], [2], [])] == [9, 11, 15]
    assert peak(additive([1] * 4, [8, 2, 2, 2], [0] * 4), []) == 14, "a last segment that does not keep its input"


@pytest.mark.parametrize("network", [convnet, resnet])
def test_measured_activations_are_what_a_step_holds(network: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = network((1, 16, 16), 3, width=4), torch.randn(8, 1, 16, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = checkpointed(model, 1).layers
    state = torch.get_rng_state()
    sizes = activations(layers, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for cuts in ([], [2], best_cuts(sizes)):
        saved = Saved((*model.parameters(), *model.buffers()))
        with saved:
            checkpointed(model, cuts)(x).sum().backward()
        assert saved.peak == peak(sizes, cuts)
    even = [even_cuts(len(layers), k) for k in range(1, len(layers) + 1)]
    least = min(peak(sizes, cuts) for cuts in even)
    assert peak(sizes, best_cuts(sizes)) < least if network is convnet else peak(sizes, best_cuts(sizes)) <= least


# --- Cheap operators only ---------------------------------------------------------------------------------------------


def test_selective_recomputes_what_is_cheap() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Tanh(), nn.Linear(64, 16), nn.GELU())
    x = torch.randn(32, 16)
    wanted = results(plainly, model, x)
    assert_same(results(selective, model, x), wanted)
    assert_same(results(partial(selective, keep=()), model, x), wanted)

    def products(run: Run) -> dict[str, float]:
        from course_lib.efficiency.profiling import counted_flops

        return counted_flops(lambda: run(copy.deepcopy(model), x).sum().backward())

    assert products(selective)["aten::addmm"] == products(plainly)["aten::addmm"], "no product runs twice"
    assert products(partial(selective, keep=()))["aten::addmm"] > products(plainly)["aten::addmm"]


# --- At the door ------------------------------------------------------------------------------------------------------


def test_at_the_door() -> None:
    sizes = additive([1, 1], [1, 1], [0, 0])
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: checkpointed(dropping(), 8), "segments=8: must be at most the number of layers, 7"),
        (lambda: checkpointed(dropping(), 0), "segments=0"),
        (
            lambda: checkpointed(dropping(), [3, 3]),
            r"segments=\[3, 3\]: must be a number or rising layers, from 1 to 6",
        ),
        (lambda: checkpointed(dropping(), [7]), r"segments=\[7\]"),
        (lambda: checkpointed(nn.Linear(2, 2), 1), "model is a Linear"),
        (lambda: held(0, 1), "layers=0"),
        (lambda: best_segments(0), "layers=0"),
        (lambda: time_ratio(0), "segments=0"),
        (lambda: time_ratio(backward=-1), "backward=-1: must be forward passes, 0 or more"),
        (lambda: best_cuts(sizes, 0), "segments=0"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert in_segments([nn.Identity()], torch.ones(2), cuts=[]).tolist() == [1, 1]
