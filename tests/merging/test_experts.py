"""Mixtures of experts against sums written out; branches trained apart; the router alone learns."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import merging
from course_lib.lab.data import Dataset
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from tests.merging.small import EXACT, batch, close, data, generator, network, normal, same_weights

RECIPE = Recipe(epochs=2, batch_size=10, precision="float64")


def mixture(top_k: int) -> merging.MixtureOfExperts:
    made = merging.MixtureOfExperts(
        [nn.Sequential(nn.Linear(5, 3), nn.Tanh()) for _ in range(4)], nn.Linear(5, 4, bias=False), top_k
    ).double()
    for place, p in enumerate(made.parameters()):
        p.data = normal(*p.shape, seed=place)
    return made


# --- Experts within a layer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5)])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_mixture_is_the_sum_of_the_chosen(top_k: int, shape: tuple[int, ...]) -> None:
    layer, x = mixture(top_k), normal(*shape, seed=9).requires_grad_()
    found = layer(x)
    rows = []
    for row in x.reshape(-1, 5):
        scores = layer.router.weight @ row
        chosen = sorted(range(4), key=lambda e: -scores[e].item())[:top_k]
        total = sum(scores[e].exp() for e in chosen)
        rows.append(sum((scores[e].exp() / total * layer.experts[e](row) for e in chosen), torch.zeros(3)))
    expected = torch.stack(rows).view(*shape[:-1], 3)
    close(found, expected, 1e-12)
    wanted = torch.autograd.grad(expected.square().sum(), [x, layer.router.weight], retain_graph=True)
    for mine, theirs in zip(
        torch.autograd.grad(found.square().sum(), [x, layer.router.weight]), wanted, strict=True
    ):  # fmt: skip
        close(mine, theirs, 1e-11)


def test_only_the_chosen_experts_run() -> None:
    layer, sizes = mixture(1), []
    for expert in layer.experts:
        expert.register_forward_hook(lambda part, inputs, output: sizes.append(len(inputs[0])))
    layer(normal(30, 5))
    assert sum(sizes) == 30
    assert len([size for size in sizes if size]) > 1


@pytest.mark.parametrize(("name", "part"), [("mlp", "hidden"), ("mlp", "hidden.2"), ("vit", "blocks.1.mlp")])
@pytest.mark.parametrize("top_k", [1, 2])
def test_upcycled_a_network_computes_the_same_whatever_the_router_says(name: str, part: str, top_k: int) -> None:
    model, x = network(name), batch()
    found = merging.upcycle(model, part, 3, generator=generator(1), top_k=top_k)
    close(found(x), model(x), 1e-12)
    layer = found.get_submodule(part)
    assert isinstance(layer, merging.MixtureOfExperts)
    with torch.no_grad():
        layer.router.weight.copy_(50 * normal(*layer.router.weight.shape))
    close(found(x), model(x), 1e-12)
    same_weights(model, network(name))


def test_experts_part_when_they_are_trained() -> None:
    found = merging.upcycle(network("mlp"), "hidden", 3, generator=generator(1))
    assert found.get_submodule("hidden").router.weight.std().item() == pytest.approx(0.02, rel=0.3)  # type: ignore[union-attr]
    history = fit(found, data(), replace(RECIPE, objective=merging.balanced), seed=0)
    assert history["train_loss"][-1] < history["train_loss"][0]
    experts = found.get_submodule("hidden").experts
    weights = [expert[0].weight for expert in experts]  # type: ignore[union-attr]
    assert not torch.equal(weights[0], weights[1])
    noisy = merging.upcycle(network("mlp"), "hidden", 2, generator=generator(1), noise=0.1).get_submodule("hidden")
    apart = noisy.experts[0][0].weight - network("mlp").hidden[0].weight  # type: ignore[index, union-attr]
    assert 0 < apart.std() < 0.2 * network("mlp").hidden[0].weight.std()  # type: ignore[index, union-attr, operator]


def test_the_balance_loss_is_one_where_all_are_asked_alike_and_e_where_one_is() -> None:
    even = 30 * torch.eye(4, dtype=torch.float64).repeat(5, 1)
    assert merging.balance_loss(even).item() == pytest.approx(1)
    alone = torch.tensor([[30.0, 0, 0, 0]], dtype=torch.float64).expand(8, 4)
    assert merging.balance_loss(alone).item() == pytest.approx(4)
    logits = normal(10, 4)
    f = torch.bincount(logits.argmax(1), minlength=4) / 10
    expected = 4 * sum(f[e] * logits.softmax(1)[:, e].mean() for e in range(4))
    assert merging.balance_loss(logits).item() == pytest.approx(float(expected))


def test_the_balanced_objective_adds_the_mean_over_the_routers() -> None:
    model, x, y = network("vit"), batch(), torch.arange(6) % 4
    for place, part in enumerate(("blocks.0.mlp", "blocks.1.mlp")):
        model = merging.upcycle(model, part, 3, generator=generator(place))
    seen: list[Tensor] = []
    hooks = [
        part.router.register_forward_hook(lambda part, inputs, output: seen.append(output))
        for part in model.modules()
        if isinstance(part, merging.MixtureOfExperts)
    ]
    plain = F.cross_entropy(model(x), y)
    for hook in hooks:
        hook.remove()
    expected = plain + 0.3 * (merging.balance_loss(seen[0]) + merging.balance_loss(seen[1])) / 2
    assert merging.balanced(model, x, y, strength=0.3).item() == pytest.approx(expected.item(), rel=1e-12)
    assert not any(part._forward_hooks for part in model.modules())


# --- Networks side by side --------------------------------------------------------------------------------------------


def test_routed_probabilities_are_the_mixture() -> None:
    experts = [network("mlp", seed) for seed in range(3)]
    router = nn.Linear(64, 3).double()
    routed, x = merging.Routed(experts, router), batch()
    r = router(x.flatten(1)).softmax(1)
    mixed = sum(r[:, e, None] * expert(x).softmax(1) for e, expert in enumerate(experts))
    close(routed(x).exp(), mixed, 1e-12)
    close(routed.shares(x), r, 1e-12)
    asked = r.mean(0).tolist()
    same_weights(routed.merged(x), merging.average(experts, asked), 1e-12)
    assert [name for name, p in routed.named_parameters() if p.requires_grad] == ["router.weight", "router.bias"]


def halves() -> list[Dataset]:
    """Two tasks: the first two classes and the last two."""
    whole = data(80)
    parts = []
    for pair in ((0, 1), (2, 3)):
        train, val = (part.subset(torch.isin(part.labels, torch.tensor(pair))) for part in (whole.train, whole.val))
        parts.append(replace(whole, train=train, val=val))
    return parts


def test_branch_train_merge_is_branch_train_and_merge() -> None:
    base, parts = fresh(partial(mlp, (1, 8, 8), 4, width=6), EXACT, seed=0), halves()
    before = copy.deepcopy(base)
    routing = replace(RECIPE, epochs=15, optimizer=partial(torch.optim.Adam, lr=0.01))
    routed = merging.branch_train_merge(base, parts, RECIPE, seed=3, routing=routing)
    same_weights(base, before)
    for place, part in enumerate(parts):
        alone = copy.deepcopy(before)
        fit(alone, part, RECIPE, seed=3 + 100 * place)
        same_weights(routed.experts[place], alone)
    together = merging.united(parts)
    assert len(together.train) == 80
    even = merging.Routed([copy.deepcopy(expert) for expert in routed.experts], nn.Linear(64, 2).double())
    nn.init.zeros_(even.router.weight)
    nn.init.zeros_(even.router.bias)
    assert evaluate(routed, together.train).loss < evaluate(even, together.train).loss - 0.05
    by_hand = copy.deepcopy(even)
    fit(by_hand, together, routing, seed=3)
    same_weights(by_hand, routed)


def test_united_data_are_those_of_the_parts() -> None:
    parts = halves()
    found = merging.united(parts)
    assert torch.equal(found.train.labels, torch.cat([part.train.labels for part in parts]))
    assert torch.equal(found.train.images, torch.cat([part.train.images for part in parts]))
    assert len(found.val) == sum(len(part.val) for part in parts)
    clients = merging.split_evenly(data(), 3, generator=generator())
    assert len(merging.united(clients).val) == len(data().val)


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    a, g = network("mlp"), generator()
    other = data(20, 5)
    stretched = replace(data(), train=replace(data().train, std=(2.0,)))
    cases: list[tuple[str, Any]] = [
        ("experts=[]: must be at least one network", lambda: merging.MixtureOfExperts([], nn.Linear(2, 2), 1)),
        ("top_k=0: must be from 1 to 1", lambda: merging.MixtureOfExperts([nn.Linear(2, 2)], nn.Linear(2, 1), 0)),
        ("experts=0: must be", lambda: merging.upcycle(a, "hidden", 0, generator=g)),
        ("top_k=5: must be from 1 to 4", lambda: merging.upcycle(a, "hidden", generator=g, top_k=5)),
        ("noise=-1: must be", lambda: merging.upcycle(a, "hidden", generator=g, noise=-1)),
        ("name='body': must be the name of a part: hidden", lambda: merging.upcycle(a, "body", generator=g)),
        ("name='features': must be a part without batch norm",
         lambda: merging.upcycle(network("convnet"), "features", generator=g)),
        ("model='MLP': must be a network with a MixtureOfExperts",
         lambda: merging.balanced(a, batch(), torch.arange(6) % 4)),
        ("strength=-1: must be", lambda: merging.balanced(a, batch(), torch.arange(6) % 4, strength=-1)),
        ("must be a layer with 1 outputs, one an expert", lambda: merging.Routed([a], nn.Linear(64, 2))),
        ("parts=[]: must be at least one data set", lambda: merging.branch_train_merge(a, [], RECIPE, seed=0)),
        ("parts[1] has inputs of (5,): must be one tensor, as (1, 8, 8)", lambda: merging.united([data(), other])),
        ("parts[1] has other classes, mean or std than parts[0]", lambda: merging.united([data(), stretched])),
    ]  # fmt: skip
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_experts_on_the_gpu() -> None:
    layer, x = mixture(2), normal(9, 5)
    close(copy.deepcopy(layer).cuda()(x.cuda()).cpu(), layer(x), 1e-10)
    model = merging.upcycle(network("mlp"), "hidden", 3, generator=generator())
    there = merging.upcycle(network("mlp").cuda(), "hidden", 3, generator=generator())
    same_weights(there.cpu(), model)
    y = torch.arange(6) % 4
    here = merging.balanced(model, batch(), y).item()
    assert merging.balanced(there.cuda(), batch().cuda(), y.cuda()).item() == pytest.approx(here)
