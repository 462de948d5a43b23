"""Noise against its namesakes in torch and torchvision, draw by draw; and how it gets into the course's networks."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import regularization as reg
from course_lib.lab.data import load
from course_lib.lab.models import BasicBlock, EncoderBlock, freeze, mlp
from course_lib.lab.training import Recipe, cross_entropy, evaluate, fit
from tests.regularization.small import NETWORKS, generator, gradients, images, network, normal

from torchvision import ops  # isort: skip  # course_lib mends its import where torch is a CPU-only build

IMAGES = (16, 5, 9, 11)

NAMESAKES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "dropout": (reg.dropout, F.dropout),
    "dropout2d": (reg.dropout2d, F.dropout2d),
    "drop_block2d": (partial(reg.drop_block2d, block_size=3), partial(ops.drop_block2d, block_size=3)),
    "drop_block2d of 7": (partial(reg.drop_block2d, block_size=7), partial(ops.drop_block2d, block_size=7)),
    "stochastic_depth row": (partial(reg.stochastic_depth, mode="row"), partial(ops.stochastic_depth, mode="row")),
    "stochastic_depth batch": (
        partial(reg.stochastic_depth, mode="batch"),
        partial(ops.stochastic_depth, mode="batch"),
    ),
}


# --- Draw by draw -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", NAMESAKES)
def test_the_same_seed_gives_the_same_as_the_namesake(name: str, p: float, dtype: torch.dtype) -> None:
    ours, theirs = NAMESAKES[name]
    x = normal(*IMAGES).to(dtype)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = theirs(x, p=p, training=True)
        torch.manual_seed(seed)
        found = ours(x, p=p, training=True)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        assert torch.equal(ours(x, p=p, generator=generator(seed)), expected)  # the global draw, by a generator
        assert torch.equal(ours(x, p=p, training=False), x)


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "stochastic_depth row"])
def test_all_can_be_switched_off(name: str) -> None:
    assert bool((NAMESAKES[name][0](normal(*IMAGES), p=1.0) == 0).all())


MODULES: list[tuple[nn.Module, Callable[..., Tensor], tuple[int, ...]]] = [
    (reg.Dropout(0.3), partial(reg.dropout, p=0.3), (40, 7)),
    (reg.Dropout2d(0.3), partial(reg.dropout2d, p=0.3), IMAGES),
    (reg.GaussianDropout(0.3), partial(reg.gaussian_dropout, p=0.3), (40, 7)),
    (reg.DropBlock2d(0.3, 4), partial(reg.drop_block2d, p=0.3, block_size=4), IMAGES),
    (reg.StochasticDepth(0.3, "batch"), partial(reg.stochastic_depth, p=0.3, mode="batch"), IMAGES),
    (reg.StochasticDepth(0.3), partial(reg.stochastic_depth, p=0.3), IMAGES),
    (reg.GaussianNoise(0.3), partial(reg.gaussian_noise, std=0.3), IMAGES),
]


@pytest.mark.parametrize(("module", "function", "shape"), MODULES, ids=[str(module) for module, *_ in MODULES])
def test_a_module_is_its_function_and_rests_in_evaluation(
    module: nn.Module, function: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    x = normal(*shape)
    module = copy.deepcopy(module).train()
    module.generator = generator(4)  # type: ignore[assignment]
    carried = pickle.loads(pickle.dumps(module))
    found = module(x)
    assert torch.equal(found, function(x, generator=generator(4)))
    assert torch.equal(carried(x), found)
    assert not torch.equal(module(x), found)  # the next use draws anew
    assert torch.equal(module.eval()(x), x)
    assert not list(module.state_dict())


# --- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_mean_and_variance_of_dropout_and_its_normal_twin(p: float) -> None:
    x = torch.ones(400_000, dtype=torch.float64)
    for function in (reg.dropout, reg.gaussian_dropout):
        found = function(x, p, generator=generator())
        assert found.mean().item() == pytest.approx(1, abs=5 * (p / (1 - p) / len(x)) ** 0.5)
        assert found.var().item() == pytest.approx(p / (1 - p), rel=0.02)


def test_what_is_switched_off_together() -> None:
    x = torch.ones(64, 8, 6, 6)
    channels = reg.dropout2d(x, 0.4, generator=generator()).flatten(2)
    assert bool(((channels == 0).all(2) | (channels != 0).all(2)).all())
    assert (channels[..., 0] == 0).double().mean().item() == pytest.approx(0.4, abs=0.08)
    rows = reg.stochastic_depth(x, 0.4, generator=generator()).flatten(1)
    assert bool(((rows == 0).all(1) | (rows != 0).all(1)).all())
    assert rows.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert 0.2 < (rows[:, 0] == 0).double().mean().item() < 0.6


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 6, 50])
def test_blocks_of_any_size_are_squares(block_size: int) -> None:
    """Each pixel that is off lies in a square of pixels that are off; and about p of them are."""
    p = 0.15
    found = reg.drop_block2d(torch.ones(200, 2, 12, 10, dtype=torch.float64), p, block_size, generator=generator())
    off = (found == 0).double()
    b = min(block_size, 10)
    whole = (F.avg_pool2d(off, b, stride=1) > 1 - 1e-9).double()  # corners of squares that are all off
    covered = F.max_pool2d(F.pad(whole, [b - 1] * 4), b, stride=1)
    assert torch.equal(covered, off)
    assert 0.6 * p < off.mean().item() < 1.05 * p
    assert found.mean().item() == pytest.approx(1, abs=1e-6)  # scaled by what stayed in this very draw


def test_drop_connect_is_a_linear_layer_with_weights_missing() -> None:
    x, w, b = normal(5, 4), normal(3, 4, seed=1), normal(3, seed=2)
    found = reg.drop_connect(x, w, b, 0.4, generator=generator(7))
    masks = F.dropout(torch.ones(5, 3, 4, dtype=torch.float64), 0.0)
    torch.manual_seed(7)
    masks = F.dropout(masks, 0.4)
    for k in range(5):
        torch.testing.assert_close(found[k], F.linear(x[k], w * masks[k], b), rtol=1e-13, atol=1e-13)
    many = reg.drop_connect(x[:1].expand(60_000, -1), w, b, 0.4, generator=generator())
    torch.testing.assert_close(many.mean(0), F.linear(x[0], w, b), rtol=0, atol=0.03)
    layer = reg.DropConnect(4, 3, p=0.4, generator=generator(7)).double()
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
    torch.testing.assert_close(layer(x), found)
    assert torch.equal(layer.eval()(x), F.linear(x, w, b))


def test_drop_connect_of_one_output_is_dropout_of_its_input() -> None:
    x, w = normal(50, 6), normal(1, 6, seed=1)
    torch.manual_seed(3)
    expected = F.linear(F.dropout(x, 0.3), w)
    torch.testing.assert_close(reg.drop_connect(x, w, None, 0.3, generator=generator(3)), expected)


# --- Noise by objectives ----------------------------------------------------------------------------------------------


def test_input_noise_is_the_objective_of_a_noisy_batch() -> None:
    model, (x, y) = network("mlp"), images()
    noisy = x + 0.3 * torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    found = reg.input_noise(model, x, y, std=0.3, generator=generator(2))
    assert torch.equal(found, cross_entropy(model, noisy, y))
    assert torch.equal(reg.input_noise(model.eval(), x, y, std=0.3), cross_entropy(model, x, y))


def test_weight_noise_is_the_loss_and_gradient_of_a_noisy_network() -> None:
    model, (x, y) = network("convnet"), images()
    before = [p.detach().clone() for p in model.parameters()]
    noisy = copy.deepcopy(model)
    source = generator(2)
    with torch.no_grad():
        for p in noisy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=source, dtype=torch.float64))
    loss = reg.weight_noise(model, x, y, std=0.1, generator=generator(2))
    expected = cross_entropy(noisy, x, y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for ours, theirs in zip(gradients(model, loss), gradients(noisy, expected), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(reg.weight_noise(model.eval(), x, y, std=0.1), cross_entropy(model, x, y))


def test_weights_do_not_drift_under_weight_noise() -> None:
    """A thousand noisy passes leave them as they are, to the bit; and what a run moves is what its gradients moved."""
    model, (x, y) = network("mlp").float(), images()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for _ in range(1000):
            reg.weight_noise(model, x.float(), y, std=10.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg.weight_noise(model, x.float(), y, std=0.1).backward()
    moved = [p.detach() - 0.1 * p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], moved, rtol=0, atol=1e-7)


# --- In networks ------------------------------------------------------------------------------------------------------

ACTIVATIONS = {"mlp": 2, "convnet": 3, "resnet": 1 + 2 * 3, "vit": 2}


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_is_after_each_activation_and_weights_keep_their_names(name: str) -> None:
    model, (x, _) = network(name), images()
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x

    spied = reg.with_noise(model, Spy)
    torch.testing.assert_close(spied.eval()(x), model.eval()(x), rtol=0, atol=0)
    assert len(seen) == ACTIVATIONS[name]
    if name != "vit":  # GELU is a little negative
        assert all(bool((output >= 0).all()) and bool((output == 0).any()) for output in seen)
    assert spied.state_dict().keys() == model.state_dict().keys()
    model.load_state_dict(spied.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_in_a_network_is_dropout_written_by_hand(name: str) -> None:
    """The network's own activations, followed by ``F.dropout`` with the same draws."""
    model, (x, _) = network(name).train(), images()
    dropped = reg.with_dropout(model, 0.3)
    assert torch.equal(copy.deepcopy(dropped).eval()(x), copy.deepcopy(model).eval()(x))
    torch.manual_seed(5)
    found = dropped(x)
    by_hand = copy.deepcopy(model)
    if name == "resnet":
        for part in by_hand.modules():
            if isinstance(part, BasicBlock):
                part.forward = partial(wide_block, part)  # type: ignore[method-assign]
    for above in list(by_hand.modules()):
        for child, part in list(above.named_children()):
            if isinstance(part, (nn.ReLU, nn.GELU)):
                setattr(above, child, nn.Sequential(part, nn.Dropout(0.3)))
    torch.manual_seed(5)
    torch.testing.assert_close(found, by_hand(x), rtol=1e-12, atol=1e-12)
    assert not torch.equal(dropped(x), found)


def wide_block(part: Any, x: Tensor) -> Tensor:
    f = part.norm2(part.conv2(F.dropout(F.relu(part.norm1(part.conv1(x))), 0.3)))
    return F.dropout(F.relu(f + part.shortcut(x)), 0.3)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_stochastic_depth_is_on_the_branches_and_rises(name: str) -> None:
    model, (x, _) = network(name).train(), images()
    deep = reg.with_stochastic_depth(model, 0.4)
    chances = [part.p for part in deep.modules() if isinstance(part, reg.StochasticDepth)]
    branches = 3 if name == "resnet" else 4
    assert chances == pytest.approx([0.4 * (k + 1) / branches for k in range(branches)])
    assert torch.equal(copy.deepcopy(deep).eval()(x), copy.deepcopy(model).eval()(x))
    torch.manual_seed(1)
    found = deep(x)
    by_hand = copy.deepcopy(model)
    todo = iter(chances)
    for part in by_hand.modules():
        if isinstance(part, BasicBlock):
            part.forward = partial(residual, part, next(todo))  # type: ignore[method-assign]
        if isinstance(part, EncoderBlock):
            part.forward = partial(encoder, part, next(todo), next(todo))  # type: ignore[method-assign]
    torch.manual_seed(1)
    torch.testing.assert_close(found, by_hand(x), rtol=1e-12, atol=1e-12)


def residual(part: Any, p: float, x: Tensor) -> Tensor:
    f = part.norm2(part.conv2(F.relu(part.norm1(part.conv1(x)))))
    return F.relu(ops.stochastic_depth(f, p, "row") + part.shortcut(x))


def encoder(part: Any, first: float, second: float, x: Tensor) -> Tensor:
    x = x + ops.stochastic_depth(part.attention(part.norm1(x)), first, "row")
    return x + ops.stochastic_depth(part.mlp(part.norm2(x)), second, "row")


def test_a_branch_that_is_always_off_leaves_the_shortcuts() -> None:
    model, (x, _) = network("vit"), images()
    off = reg.with_stochastic_depth(model, 1.0)
    for part in off.modules():
        if isinstance(part, reg.StochasticDepth):
            part.p = 1.0
    tokens = model.embed(x).flatten(2).transpose(1, 2) + model.position  # type: ignore[operator]
    expected = model.head(model.norm(tokens).mean(1))  # type: ignore[operator]
    torch.testing.assert_close(off.train()(x), expected)


PLACED: dict[str, tuple[Callable[[nn.Module], nn.Module], list[str]]] = {
    "dropout": (partial(reg.with_dropout, p=0.3), ["mlp", "convnet", "resnet", "vit"]),
    "dropout2d": (partial(reg.with_dropout2d, p=0.3), ["convnet", "resnet"]),
    "drop_block": (partial(reg.with_drop_block, p=0.3, block_size=2), ["convnet", "resnet"]),
    "stochastic_depth": (partial(reg.with_stochastic_depth, p=0.3), ["resnet", "vit"]),
    "drop_connect": (partial(reg.with_drop_connect, p=0.3), ["mlp"]),
}
CASES = [(kind, name) for kind, (_, names) in PLACED.items() for name in names]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_is_put_in_can_be_copied_pickled_and_taken_out(kind: str, name: str) -> None:
    model, (x, y) = network(name).train(), images()
    noisy = PLACED[kind][0](model)
    assert noisy.training
    assert noisy.state_dict().keys() == model.state_dict().keys()
    for other in (copy.deepcopy(noisy), pickle.loads(pickle.dumps(noisy))):
        for mode in (True, False):
            torch.manual_seed(2)
            expected = copy.deepcopy(noisy).train(mode)(x)
            torch.manual_seed(2)
            assert torch.equal(copy.deepcopy(other).train(mode)(x), expected)
    cross_entropy(noisy, x, y).backward()
    assert all(p.grad is not None for p in noisy.parameters())
    assert all(p.grad is None for p in model.parameters())  # the copy has weights of its own
    plain = reg.without_noise(PLACED[kind][0](model))
    assert str(plain) == str(model)
    assert torch.equal(plain(x), model(x))
    assert not torch.equal(PLACED[kind][0](model)(x), model(x))


def test_two_kinds_of_noise_stand_one_behind_the_other() -> None:
    model, (x, _) = network("mlp"), images()
    both = reg.with_noise(reg.with_dropout(model, 0.3), partial(reg.GaussianNoise, 0.1))
    torch.manual_seed(0)
    found = both(x)
    torch.manual_seed(0)
    h = x.flatten(1)
    for layer in (model.hidden[0], model.hidden[2]):  # type: ignore[index]
        h = F.dropout(F.relu(layer(h)), 0.3)
        h = h + 0.1 * torch.randn(h.shape, dtype=torch.float64)
    torch.testing.assert_close(found, model.head(h))  # type: ignore[operator]
    assert str(reg.without_noise(both)) == str(model)


def test_a_frozen_part_has_no_noise() -> None:
    model, (x, _) = reg.with_dropout(network("mlp"), 0.5), images()
    freeze(model.hidden)  # type: ignore[arg-type]
    model.train()
    assert torch.equal(model(x), model(x))


def test_noisy_networks_train_and_go_on_from_a_checkpoint(tmp_path: Any) -> None:
    data = load("digits", train_size=128)
    recipe = Recipe(epochs=3, precision="float64")

    def wide() -> nn.Module:
        torch.manual_seed(0)
        return reg.with_dropout(mlp((1, 8, 8), 10, width=32), 0.2)

    whole, resumed = wide(), wide()
    fit(whole, data, recipe, seed=0)
    fit(wide(), data, Recipe(epochs=1, precision="float64"), seed=0, checkpoint=tmp_path / "run")
    fit(resumed, data, recipe, seed=0, checkpoint=tmp_path / "run")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert evaluate(whole, data.test) == evaluate(whole, data.test)


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("p=1.5: must be a number from 0 to 1", lambda: reg.dropout(torch.ones(2), 1.5)),
    ("p=-0.1: must be", lambda: reg.Dropout(-0.1)),
    ("p=1: must be below 1", lambda: reg.gaussian_dropout(torch.ones(2), 1)),
    ("x has the shape [2]: must be [N, C, H, W]", lambda: reg.dropout2d(torch.ones(2), 0.1)),
    ("block_size=0: must be a whole number of at least 1", lambda: reg.DropBlock2d(0.1, 0)),
    ("mode='col': must be 'batch' or 'row'", lambda: reg.StochasticDepth(0.1, "col")),  # type: ignore[arg-type]
    ("x has the shape [2, 3, 4]: must be [N, in]", lambda: reg.drop_connect(torch.ones(2, 3, 4), torch.ones(1, 4))),
    ("std=-1: must be a number of at least 0", lambda: reg.GaussianNoise(-1)),
    ("std=-1: must be", lambda: reg.weight_noise(network(), *images(), std=-1)),
    ("std='a': must be", lambda: reg.input_noise(network(), *images(), std="a")),  # type: ignore[arg-type]
    ("network=Linear: must have an activation", lambda: reg.with_dropout(nn.Linear(2, 2), 0.1)),
    ("p=2: must be", lambda: reg.with_dropout(network(), 2)),
    ("network=MLP: must have residual branches", lambda: reg.with_stochastic_depth(network(), 0.1)),
    ("network=ConvNet: must have a linear layer before", lambda: reg.with_drop_connect(network("convnet"), 0.1)),
]


@pytest.mark.parametrize(("message", "bad"), BAD, ids=[message for message, _ in BAD])
def test_bad_settings_are_named(message: str, bad: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        bad()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_noise_on_the_gpu(kind: str, name: str) -> None:
    """A generator on the CPU gives the same mask there; without one the masks are torch's own."""
    model, (x, y) = network(name).train(), images()
    noisy = PLACED[kind][0](model)
    for part in noisy.modules():
        if hasattr(part, "generator"):
            part.generator = generator(3)
    there = copy.deepcopy(noisy).cuda()
    torch.testing.assert_close(there(x.cuda()).cpu(), noisy(x), rtol=1e-9, atol=1e-9)
    cross_entropy(PLACED[kind][0](model).cuda(), x.cuda(), y.cuda()).backward()
