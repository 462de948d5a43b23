"""Split learning: the same training as without the cut, and what crosses it, against formulas and other libraries."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.models import convnet, mlp, resnet, vit
from course_lib.lab.training import Recipe, cross_entropy, fit
from course_lib.parallel.data_parallel_runs import relative_difference, train_alone
from course_lib.parallel.launching import launch
from course_lib.partitioning import leaking, split_learning
from course_lib.partitioning.cutting import (
    chain,
)
from course_lib.partitioning.leaking import (
    Inverter,
    as_seen,
    clipped,
    distance_correlation,
    invert,
    labels_from_gradients,
    leak,
    leak_auc,
    noisy,
    nopeek,
    norm_attack,
    ridge_regressions,
    trained_inverse,
)
from course_lib.partitioning.split_learning import (
    SplitNetwork,
    bytes_per_epoch,
    bytes_per_step,
    client_backward,
    client_forward,
    cut,
    server_step,
    shape_behind,
)
from tests.partitioning import places_by_ranks as ranks

PATIENCE = 300.0  # seconds: a launch takes a few, but the machine may be busy
NETWORKS: dict[str, Any] = {
    "mlp": mlp,
    "convnet": partial(convnet, width=4),
    "resnet": partial(resnet, width=4),
    "vit": partial(vit, width=16, heads=2),
}
SHAPE = (1, 8, 8)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name](SHAPE, 10).double()


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


# --- The cut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_cut_anywhere_is_the_network(name: str) -> None:
    network, x = built(name).eval(), numbers(3, *SHAPE)
    expected = network(x)
    layers = dict(chain(network))
    assert list(layers)[-1] == "head"
    held = {id(p) for layer in layers.values() for p in layer.parameters()}
    assert held == {id(p) for p in network.parameters()}, "the layers are not the network's own, or not all of them"
    for after in layers:
        parts = cut(network, after)
        assert torch.equal(parts(x), expected)
        assert not parts.training
        assert shape_behind(parts.client, SHAPE) == tuple(parts.client(x).shape[1:])
    assert [*parts.server.children()] == []


def test_a_chain_of_ones_own_is_cut_too() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    assert [*dict(chain(network))] == ["0", "1"]
    with pytest.raises(ValueError, match="after='2': must be one of 0, 1"):
        cut(network, "2")
    with pytest.raises(ValueError, match="model is a Linear: must be"):
        chain(nn.Linear(2, 2))


def test_a_look_at_the_shape_changes_nothing() -> None:
    network = built("convnet").train()
    before = copy.deepcopy(network.state_dict())
    assert shape_behind(cut(network, "features.3").client, SHAPE) == (4, 4, 4)
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("name", "after"), [("mlp", "hidden.1"), ("convnet", "features.3"), ("vit", "blocks.0")])
def test_a_step_across_the_cut_leaves_the_gradients_of_the_whole(name: str, after: str) -> None:
    whole, x, y = built(name), numbers(7, *SHAPE), torch.arange(7)
    parts = cut(copy.deepcopy(whole), after)
    loss = cross_entropy(whole, x, y)
    loss.backward()
    sent = client_forward(parts.client, x)
    assert not sent.message.requires_grad
    answer = server_step(parts.server, sent.message, y)
    assert all(p.grad is None for p in parts.client.parameters())
    client_backward(sent.activations, answer.gradient)
    torch.testing.assert_close(answer.loss, loss.detach(), rtol=0, atol=1e-13)
    expected = [p.grad for p in whole.parameters()]
    found = [p.grad for layer in dict(chain(whole)).values() for p in layer.parameters()]
    assert len(found) == len(expected)
    mine = dict(zip([id(p) for p in whole.parameters()], expected, strict=True))
    own = [p for layer in dict(chain(whole)).values() for p in layer.parameters()]
    for p, q in zip(own, parts.parameters(), strict=True):
        torch.testing.assert_close(q.grad, mine[id(p)], rtol=0, atol=1e-13)


# --- Two processes ----------------------------------------------------------------------------------------------------

VARIANTS: list[ranks.Variant] = [
    ("mlp", "hidden.1", "server"),
    ("mlp", "hidden.1", "client"),
    ("mlp", "head", "server"),
    ("convnet", "features.3", "server"),
    ("convnet", "features.3", "client"),
    ("mlp", "flatten", "server"),
]
SETTINGS: dict[str, Any] = {"steps": 6, "lr": 0.1, "momentum": 0.8, "seed": 1}  # the fifth batch has 5 examples
SIZES = [61, 61, 61, 61, 5, 61]


@pytest.fixture(scope="module")
def runs() -> list[dict[ranks.Variant, split_learning.SplitRun]]:
    return launch(ranks.train_variants, 2, VARIANTS, SETTINGS, timeout=PATIENCE)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: train_alone(name, **SETTINGS) for name in ("mlp", "convnet")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_client_and_server_train_as_one_process(runs: Any, alone: Any, variant: ranks.Variant) -> None:
    client, server = runs[0][variant], runs[1][variant]
    assert not client.weights.keys() & server.weights.keys(), "a layer is at both"
    assert relative_difference(client.weights | server.weights, alone[variant[0]].weights) < 1e-12
    for run in (client, server):
        assert run.losses == pytest.approx(alone[variant[0]].losses, rel=1e-12)
        assert run.val_accuracy == pytest.approx(alone[variant[0]].val_accuracy, abs=1e-12)
    assert client.losses[-1] < 0.95 * client.losses[0], "it learned nothing: the comparison says little"
    if variant[2] == "client":
        assert {name.split(".")[0] for name in client.weights} >= {"head"}
        assert "head.weight" not in server.weights


@pytest.mark.parametrize(
    ("variant", "at_cuts"),
    [
        (VARIANTS[0], [128]),
        (VARIANTS[1], [128, 128]),
        (VARIANTS[2], [10]),
        (VARIANTS[3], [16 * 4 * 4]),
        (VARIANTS[4], [16 * 4 * 4, 64]),
        (VARIANTS[5], [64]),
    ],
)
def test_bytes_sent_are_those_of_the_formula(runs: Any, variant: ranks.Variant, at_cuts: list[int]) -> None:
    expected = [bytes_per_step(size, at_cuts, width=8) for size in SIZES]
    assert expected[4] == 5 * 8 * sum(at_cuts)
    assert [by_rank[variant].bytes_sent for by_rank in runs] == [expected, expected]


def test_settings_that_do_not_fit_are_refused() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("mlp", {"labels": "nobody"}),
        ("mlp", {"after": "hidden.9"}),
        ("mlp", {"after": "hidden.3", "labels": "client"}),
    ]
    bad_labels, bad_layer, too_late = launch(ranks.refusals, 2, cases, timeout=PATIENCE)[0]
    assert "labels='nobody': must be 'server' or 'client'" in bad_labels
    assert "after='hidden.9': must be one of flatten, hidden.0" in bad_layer
    assert "after='hidden.3': must be a layer with at least two behind it" in too_late
    assert "world_size=1: must be 2" in ranks.refusals([("mlp", {})])[0]


@pytest.mark.gpu
def test_gpus_train_as_a_processor(alone: Any) -> None:
    runs = launch(ranks.train_variants, 2, VARIANTS[:2], SETTINGS, timeout=PATIENCE)
    for variant in VARIANTS[:2]:
        assert relative_difference(runs[0][variant].weights | runs[1][variant].weights, alone["mlp"].weights) < 1e-6


# --- What is sent -----------------------------------------------------------------------------------------------------


def test_bytes_of_an_epoch_are_counted_by_hand(digits: Dataset) -> None:
    parts = cut(mlp(SHAPE, 10, width=20, depth=1), "hidden.1")
    client, everything = 65 * 20, 65 * 20 + 21 * 10
    assert bytes_per_epoch(parts, digits, width=4) == {
        "split": 2 * 1000 * 20 * 4,
        "federated": 2 * everything * 4,
        "images": 1000 * 64,
    }
    several = bytes_per_epoch(parts, digits, clients=3, rounds=5, width=2)
    assert several["split"] == 2 * 1000 * 20 * 2 + 3 * client * 2
    assert several["federated"] == 2 * 5 * 3 * everything * 2
    assert several["images"] == 1000 * 64


def test_bad_counts_are_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size=0: must be"):
        bytes_per_step(0, [1])
    with pytest.raises(ValueError, match=r"numbers=\[\]: must be"):
        bytes_per_step(1, [])
    with pytest.raises(ValueError, match="clients=0: must be"):
        bytes_per_epoch(cut(mlp(SHAPE, 10), "head"), digits, clients=0)


# --- Decoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [5, 40], ids=["tall", "wide"])
def test_ridge_regression_is_scikit_learns(columns: int) -> None:
    z, x = numbers(20, columns, seed=1) * torch.arange(1.0, columns + 1) + 3, numbers(20, 6, seed=2) - 2
    z[:, 1] = 7.0  # says nothing, and must not be divided by
    scale = z.std(0, correction=0)
    scale[1] = 1
    standard = ((z - z.mean(0)) / scale).numpy()
    for strength, found in zip((0.01, 2.0), ridge_regressions(z, x, (0.01, 2.0)), strict=True):
        reference = Ridge(alpha=strength * 20).fit(standard, x.numpy())
        np.testing.assert_allclose(found(z).numpy(), reference.predict(standard), atol=1e-9)


def test_leak_is_the_share_of_the_variance(digits: Dataset) -> None:
    x = next(batches(digits.test, len(digits.test), dtype=torch.float64))[0].flatten(1)
    mean = nn.utils.skip_init(nn.Linear, 64, 64, dtype=torch.float64)
    nn.init.zeros_(mean.weight)
    mean.bias.data = x.mean(0)
    client = nn.Sequential(nn.Flatten(), nn.Linear(64, 64)).double()
    nn.init.eye_(client[1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(client[1].bias)  # type: ignore[arg-type]
    assert leak(Inverter(client, nn.Identity()), digits.test) == pytest.approx(1, abs=1e-12)
    assert leak(Inverter(client, mean), digits.test) == pytest.approx(0, abs=1e-12)
    off = nn.Linear(64, 64).double()
    expected = 1 - (x - off(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert leak(Inverter(client, off), digits.test) == pytest.approx(expected.item(), abs=1e-12)


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> nn.Module:
    torch.manual_seed(0)
    network = mlp(SHAPE, 10, width=32, depth=2).double()
    fit(network, digits, Recipe(epochs=3, precision="float64"), seed=0)
    return network


def test_a_decoder_is_chosen_on_public_images(digits: Dataset, trained: nn.Module) -> None:
    client = cut(trained, "hidden.1").client.train()
    before = copy.deepcopy(client.state_dict())
    best = invert(client, digits, strengths=(1e-4, 1e-2, 1e4))
    each = [leak(invert(client, digits, strengths=[s]), digits.val) for s in (1e-4, 1e-2, 1e4)]
    assert leak(best, digits.val) == max(each)
    assert max(each) > each[2] + 0.1
    assert 0.3 < leak(best, digits.test) < 1
    assert client.training
    assert all(torch.equal(before[name], tensor) for name, tensor in client.state_dict().items())
    deeper = [
        leak(invert(cut(trained, after).client, digits), digits.test) for after in ("flatten", "hidden.1", "head")
    ]
    assert deeper == sorted(deeper, reverse=True)
    assert deeper[0] > 0.999


def test_a_trained_decoder_finds_what_was_lost(digits: Dataset, trained: nn.Module) -> None:
    client = cut(trained, "hidden.1").client
    before = copy.deepcopy(client.state_dict())
    recipe = Recipe(epochs=4, precision="float64", optimizer=partial(torch.optim.Adam, lr=3e-3))
    inverter = trained_inverse(client, digits, recipe, seed=0, width=64)
    assert leak(inverter, digits.test) > 0.3
    assert all(torch.equal(before[name], tensor) for name, tensor in client.state_dict().items())
    assert client.training == trained.training
    assert all(p.requires_grad for p in client.parameters())
    x = numbers(2, *SHAPE)
    assert torch.equal(
        leaking.reconstruction(inverter, x, torch.zeros(2)), (inverter(x) - x.flatten(1)).square().mean()
    )
    with pytest.raises(ValueError, match="width=0: must be"):
        trained_inverse(client, digits, recipe, seed=0, width=0)
    with pytest.raises(ValueError, match="strengths=0: must be"):
        invert(client, digits, strengths=[0])


def test_public_images_are_seen_as_the_private_ones() -> None:
    public = load("glyphs", size=16, count=72, classes="digits")
    private = load("digits")
    seen = as_seen(public, private)
    assert seen.val.mean == seen.train.mean == private.train.mean
    assert seen.test.std == private.train.std
    assert torch.equal(seen.train.images, public.train.images)


# --- Labels from gradients --------------------------------------------------------------------------------------------


def test_the_sign_of_the_gradient_is_the_label() -> None:
    logits, y = 5 * numbers(50, 10), torch.arange(50) % 10
    gradients = server_step(nn.Sequential(), logits, y).gradient
    torch.testing.assert_close(gradients, (logits.softmax(1) - F.one_hot(y, 10)) / 50)
    assert torch.equal(labels_from_gradients(gradients), y)
    assert ((gradients < 0).sum(1) == 1).all()
    with pytest.raises(ValueError, match=r"gradients.ndim=3: must be 2"):
        labels_from_gradients(torch.ones(2, 3, 4))


def test_the_size_of_the_gradient_tells_the_rare_class() -> None:
    x, y = numbers(400, 8), (torch.arange(400) % 20 == 0).long()
    server = nn.Linear(8, 2).double()
    nn.init.zeros_(server.bias)
    server.bias.data[0] = 3.0  # it has learned that class 1 is rare
    gradients = server_step(server, x, y).gradient
    scores = norm_attack(gradients)
    torch.testing.assert_close(scores, gradients.square().sum(1).sqrt())
    assert norm_attack(gradients.view(400, 2, 4)).tolist() == pytest.approx(scores.tolist())
    assert leak_auc(scores, y) > 0.95


def test_auc_is_scikit_learns_ties_included() -> None:
    scores, y = (3 * numbers(60)).round(), (numbers(60, seed=1) > 0.4).long()
    assert leak_auc(scores, y) == pytest.approx(roc_auc_score(y.numpy(), scores.numpy()), abs=1e-12)
    with pytest.raises(ValueError, match=r"labels=\[0\]: must be 0 and 1"):
        leak_auc(scores, torch.zeros(60).long())


# --- Defences ---------------------------------------------------------------------------------------------------------


def test_noise_has_its_size_and_the_signal_a_limit() -> None:
    z = numbers(6, 3, 4, 5) * torch.tensor([0.01, 0.1, 1, 2, 5, 100.0]).view(6, 1, 1, 1)
    small = clipped(z, 1.5)
    size, was = (each.flatten(1).square().mean(1).sqrt() for each in (small, z))
    torch.testing.assert_close(size, was.clamp(max=1.5))
    torch.testing.assert_close(F.cosine_similarity(small.flatten(1), z.flatten(1)), torch.ones(6).double())
    torch.manual_seed(0)
    constant = noisy(nn.Identity(), 0.3).eval()(torch.full((100, 200), 0.5, dtype=torch.float64))
    assert constant.mean().item() == pytest.approx(0.5, abs=0.01)
    assert constant.std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(noisy(nn.Identity(), 0.0, clip=None)(z), z)
    assert torch.equal(noisy(nn.Identity(), 0.0)(z), clipped(z, 1.0))
    assert torch.isfinite(clipped(torch.zeros(2, 3), 1.0)).all()
    for settings, words in (({"sigma": -1}, "sigma=-1"), ({"sigma": 1, "clip": 0}, "clip=0")):
        with pytest.raises(ValueError, match=words):
            noisy(nn.Identity(), **settings)


def by_the_formula(x: np.ndarray, z: np.ndarray) -> float:
    def centred(rows: np.ndarray) -> np.ndarray:
        a, n = cdist(rows, rows), len(rows)
        found = np.empty((n, n))
        for i, j in itertools.product(range(n), range(n)):
            found[i, j] = a[i, j] - a[i].sum() / n - a[:, j].sum() / n + a.sum() / n**2
        return found

    a, b = centred(x), centred(z)
    covariance, of_x, of_z = ((p * q).mean() for p, q in ((a, b), (a, a), (b, b)))
    return float(np.sqrt(covariance / np.sqrt(of_x * of_z)))


def test_distance_correlation_is_that_of_the_formula() -> None:
    x = numbers(12, 1, 3, 2)
    z = torch.cat([x.flatten(1).square(), numbers(12, 4, seed=1)], dim=1)
    expected = by_the_formula(x.flatten(1).numpy(), z.numpy())
    assert 0.2 < expected < 0.98
    assert distance_correlation(x, z).item() == pytest.approx(expected, abs=1e-12)
    turned = 3 * x.flatten(1) @ torch.linalg.qr(numbers(6, 6, seed=2)).Q - 1
    assert distance_correlation(x, turned).item() == pytest.approx(1, abs=1e-12)
    many, others = numbers(600, 1), numbers(600, 1, seed=1)
    assert distance_correlation(many, others).item() < 0.15
    assert distance_correlation(many, many.square()).item() > 0.3  # though they are not correlated


def test_distance_correlation_has_a_gradient() -> None:
    x, z = numbers(6, 3), numbers(6, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: distance_correlation(x, z), (z,))
    for hopeless in (torch.zeros(6, 2), torch.ones(6, 2)):
        hopeless = hopeless.double().requires_grad_()
        value = distance_correlation(x, hopeless)
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert hopeless.grad is not None
        assert torch.isfinite(hopeless.grad).all()
    with pytest.raises(ValueError, match=r"len\(z\)=5: must be that of x, 6"):
        distance_correlation(x, z[:5])


def test_nopeek_adds_the_dependence_to_any_objective() -> None:
    parts = cut(built("mlp"), "hidden.1")
    x, y = numbers(9, *SHAPE), torch.arange(9)
    smoothed = lambda model, x, y: F.cross_entropy(model(x), y, label_smoothing=0.1)  # noqa: E731
    z = parts.client(x)
    for objective in (cross_entropy, smoothed):
        expected = objective(parts, x, y) + 0.7 * distance_correlation(x, z)
        assert nopeek(parts, x, y, strength=0.7, objective=objective).item() == pytest.approx(
            expected.item(), abs=1e-12
        )
    assert torch.isfinite(nopeek(parts, x[:1], y[:1]))
    plain = partial(nopeek, strength=0.0)
    assert plain(parts, x, y).item() == pytest.approx(cross_entropy(parts, x, y).item(), abs=1e-12)
    with pytest.raises(ValueError, match="strength=-1: must be"):
        nopeek(parts, x, y, strength=-1)
    with pytest.raises(ValueError, match="model=Linear: must be a SplitNetwork"):
        nopeek(nn.Linear(2, 2), x, y)


def test_nopeek_hides_images(digits: Dataset) -> None:
    leaks = []
    for strength in (0.0, 1.0):
        torch.manual_seed(0)
        parts: SplitNetwork = cut(mlp(SHAPE, 10, width=32, depth=2).double(), "hidden.1")
        recipe = Recipe(epochs=3, precision="float64", objective=partial(nopeek, strength=strength), validate_every=3)
        fit(parts, digits, recipe, seed=0)
        leaks.append(leak(invert(parts.client, digits), digits.test))
    assert leaks[1] < leaks[0] - 0.1
