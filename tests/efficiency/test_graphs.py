"""Launches by hand and by formula; graphs themselves only where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from course_lib.efficiency import graphs
from course_lib.efficiency.graphs import captured, check_like, overhead_bound


def test_short_kernels_wait_for_their_launch() -> None:
    found = overhead_bound([1.0] * 10, launch=5.0)
    assert found.eager == 10 * 5 + 1
    assert found.graph == 5 + 10
    assert found.kernels == 10
    assert found.speedup == pytest.approx(51 / 15)
    assert found.waiting == pytest.approx(1 - 10 / 51)


def test_long_kernels_wait_for_one_launch_alone() -> None:
    found = overhead_bound([7.0] * 10, launch=5.0)
    assert found.eager == found.graph == 75
    assert found.speedup == 1


def test_kernels_of_different_lengths_by_hand() -> None:
    """Launched at 2, 4, 6, 8: 1 s to 3; 5 s to 9; 1 s to 10; 1 s to 11."""
    assert overhead_bound([1, 5, 1, 1], launch=2).eager == 11
    assert overhead_bound([5, 1, 1, 1], launch=2).eager == 10, "at 7, 8, 9, 10: the long one hides the launches"
    assert overhead_bound([1, 1, 1, 5], launch=2).eager == 13


def test_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        kernels = torch.rand(12, generator=generator, dtype=torch.float64).tolist()
        found = overhead_bound(kernels, launch=0.5)
        assert max(12 * 0.5 + kernels[-1], 0.5 + sum(kernels)) - 1e-9 <= found.eager <= 12 * 0.5 + sum(kernels)
        assert found.graph <= found.eager + 1e-9
        assert overhead_bound(kernels, 0).eager == pytest.approx(sum(kernels))


def test_at_the_door() -> None:
    for kernels in ([], [1.0, -1.0], [0.0], [float("nan")]):
        with pytest.raises(ValueError, match=r"kernels=.*at least one number of seconds"):
            overhead_bound(kernels, 1.0)
    with pytest.raises(ValueError, match=r"launch=-1: must be a number of seconds, 0 or more"):
        overhead_bound([1.0], -1)
    with pytest.raises(ValueError, match="warmup=0"):
        captured(torch.relu, [torch.ones(2)], warmup=0)


def test_other_shapes_are_refused() -> None:
    wanted = [torch.ones(2, 3), torch.ones(4)]
    check_like(wanted, [torch.zeros(2, 3), torch.zeros(4)])
    for wrong in ([torch.ones(2, 3)], [torch.ones(1, 3), torch.ones(4)], [torch.ones(2, 3), torch.ones(4).double()]):
        with pytest.raises(ValueError, match=r"inputs=.*must be as they were recorded"):
            check_like(wanted, wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no CUDA")
def test_without_cuda() -> None:
    with pytest.raises(RuntimeError, match="captured needs a GPU with CUDA, and there is none here"):
        captured(torch.relu, [torch.ones(2)])


def test_inputs_are_copied_into_the_same_memory() -> None:
    """A graph in name only, to see what a call does around its replay."""

    class Doubles:
        def replay(self) -> None:
            out.copy_(place * 2)

    place, out = torch.zeros(3, requires_grad=True), torch.zeros(3)
    made = graphs.Captured((place,), out, Doubles())  # type: ignore[arg-type]
    assert made(torch.tensor([1.0, 2.0, 3.0])) is out
    assert out.tolist() == [2, 4, 6]
    with pytest.raises(ValueError, match="inputs"):
        made(torch.ones(1))


@pytest.mark.gpu(emulated=False)
def test_a_graph_does_what_the_function_does() -> None:
    layer = torch.nn.Linear(8, 8).cuda()

    def fn(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"sum": layer(x).relu() + y}

    examples = [torch.randn(4, 8, device="cuda") for _ in range(2)]
    graph = captured(fn, examples)
    for _ in range(3):
        given = [torch.randn(4, 8, device="cuda") for _ in range(2)]
        torch.testing.assert_close(graph(*given)["sum"], fn(*given)["sum"])
    assert examples[0].data_ptr() != graph.inputs[0].data_ptr()
    with pytest.raises(ValueError, match="inputs"):
        graph(torch.ones(1, 8, device="cuda"), torch.ones(4, 8, device="cuda"))
    with pytest.raises(ValueError, match="one CUDA device"):
        captured(fn, [torch.ones(4, 8), torch.ones(4, 8)])


@pytest.mark.gpu(emulated=False)
def test_a_training_step_as_a_graph() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 1).cuda()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2, capturable=True)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    x = torch.randn(16, 8, device="cuda")
    graph = captured(step, [x])
    losses = [float(graph(x)) for _ in range(20)]
    assert losses == sorted(losses, reverse=True)
