"""The emulated device refuses what CUDA refuses, allows what it allows, and finds what the processor finds."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.lab.models import convnet
from course_lib.proving.emulated_cuda import emulated_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device that need not be emulated")


def trained(model: nn.Module, x: Tensor, y: Tensor, optimizer: type[torch.optim.Optimizer]) -> list[float]:
    steps, losses = optimizer(model.parameters(), lr=0.01), []  # type: ignore[call-arg]
    for _ in range(5):
        steps.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_there_is_training_here(optimizer: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    here, x, y = convnet((1, 8, 8), 5).double(), torch.randn(12, 1, 8, 8).double(), torch.randint(5, (12,))
    with emulated_cuda():
        there = copy.deepcopy(here).cuda()
        found = trained(there, x.cuda(), y.to("cuda"), optimizer)
        weights = [p.cpu() for p in there.parameters()]
    assert found == trained(here, x, y, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights, here.parameters(), strict=True))
    assert found[-1] < found[0]


HERE, THERE = torch.ones(3, 3), "cuda"
REFUSED: dict[str, Callable[[], Any]] = {
    "a sum of two devices": lambda: HERE.cuda() + HERE,
    "a product of two devices": lambda: HERE @ HERE.cuda(),
    "a number that is stacked": lambda: torch.stack([HERE.cuda()[0, 0], torch.tensor(1.0)]),
    "a number there among tensors here": lambda: HERE * torch.tensor(2.0, device=THERE),
    "an index there": lambda: HERE[torch.tensor([0], device=THERE)],
    "values put in": lambda: HERE.cuda().index_put_((torch.tensor([0]),), HERE[:1]),
    "numpy": lambda: HERE.cuda().numpy(),
    "a gather": lambda: HERE.cuda().gather(1, torch.zeros(3, 1, dtype=torch.int64)),
    "labels": lambda: F.cross_entropy(HERE.cuda(), torch.tensor([0, 1, 2])),
    "a network there": lambda: nn.Linear(3, 1).cuda()(HERE),
    "a processor's generator": lambda: torch.randn(3, device=THERE, generator=torch.Generator()),
    "its generator in place": lambda: HERE.cuda().bernoulli_(0.5, generator=torch.Generator()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    with (
        emulated_cuda(),
        pytest.raises((RuntimeError, TypeError), match=r"same device|not supported|generator|numpy|must be on"),
    ):
        REFUSED[what]()


ALLOWED: dict[str, Callable[[], Any]] = {
    "a number of the processor": lambda: HERE.cuda() * torch.tensor(2.0) + 1,
    "an index of the processor": lambda: HERE.cuda()[torch.tensor([0, 2])],
    "a list": lambda: HERE.cuda()[[0, 2]],
    "an empty list": lambda: HERE.cuda()[[]],
    "a copy": lambda: HERE.clone().copy_(HERE.cuda()),
    "a mask that fills": lambda: HERE.cuda().masked_fill(HERE.cuda() > 0, 3.0),
    "a choice": lambda: torch.where(HERE.cuda() > 0, 1.0, 0.0),
    "a list of numbers": lambda: torch.tensor([1.0, 2.0], device=THERE, requires_grad=True).sum(),
    "an empty one beside": lambda: torch.empty_like(HERE, device=THERE).fill_(1.0),
    "a matrix of another's kind": lambda: HERE.cuda().new_tensor([1, 2]),
    "eigenvalues": lambda: torch.linalg.eigh(HERE.cuda()).eigenvalues,
}


@pytest.mark.parametrize("what", ALLOWED)
def test_allowed(what: str) -> None:
    with emulated_cuda():
        found = ALLOWED[what]()
        assert found.device == (torch.device("cpu") if what == "a copy" else torch.device("cuda", 0))
        assert found.is_cuda == (what != "a copy")


def test_what_is_changed_in_place_or_through_a_view_stays_one_tensor() -> None:
    with emulated_cuda():
        x = torch.zeros(2, 3, device=THERE)
        same, row = x.add_(1), x[0]
        row.mul_(5)
        x[1, [0, 2]] = 7.0
        assert same is x
        assert x.tolist() == [[5, 5, 5], [7, 1, 7]]


def test_a_network_that_moves_keeps_its_parameters() -> None:
    model = nn.Linear(3, 2)
    before = list(model.parameters())
    with emulated_cuda():
        model.cuda()(HERE.cuda()).sum().backward()
        assert all(a is b and a.is_cuda for a, b in zip(before, model.parameters(), strict=True))
        model.cpu()
    assert all(a is b and a.device.type == "cpu" for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in before)


def test_a_network_moves_while_a_graph_holds_it() -> None:
    model = nn.Linear(3, 2)
    with emulated_cuda():
        held = model.cuda()(HERE.cuda()).sum()
        assert model.cpu().weight.device.type == "cpu"
        assert held.requires_grad


def test_weights_are_stored_and_read(tmp_path: Path) -> None:
    with emulated_cuda():
        model = nn.Linear(3, 2).cuda()
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        for place in ("cpu", "cuda"):
            read = torch.load(tmp_path / "weights.pt", map_location=place, weights_only=True)
            assert {tensor.device.type for tensor in read.values()} == {place}
            model.load_state_dict(read)
            assert model.weight.is_cuda


def test_gradients_of_functions_and_many_at_once() -> None:
    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return (weight * x).square().sum()

    w, x = torch.randn(3), torch.randn(4, 3)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    with emulated_cuda():
        there = each(w.cuda(), x.cuda())
        assert there.is_cuda
        torch.testing.assert_close(there.cpu(), each(w, x))


def test_autocast_computes_in_its_type() -> None:
    with emulated_cuda(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert nn.Linear(3, 2).cuda()(HERE.cuda()).dtype == torch.bfloat16


def test_outside_nothing_is_left_of_it() -> None:
    with emulated_cuda():
        assert torch.cuda.is_available()
        assert torch.zeros(1, device=THERE).device == torch.device("cuda", 0)
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device=THERE)
