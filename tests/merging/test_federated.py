"""Clients: their data, one local step as gradient descent, rounds by hand, and what holds them near the server."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import merging
from course_lib.lab.data import Dataset, batches
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from tests.merging.small import NETWORKS, batch, close, data, generator, network, same_weights

PLAIN = partial(torch.optim.SGD, lr=0.1)
WHOLE = Recipe(epochs=1, batch_size=1000, optimizer=PLAIN, precision="float64")
LOCAL = replace(WHOLE, epochs=2, batch_size=5)

# --- Clients ----------------------------------------------------------------------------------------------------------


def shares_of(clients: list[Dataset], classes: int = 4) -> torch.Tensor:
    return torch.stack([torch.bincount(client.train.labels, minlength=classes) for client in clients]).double()


@pytest.mark.parametrize("skewed", [False, True])
def test_clients_have_each_example_once(skewed: bool) -> None:
    whole = data(101)
    clients = (
        merging.split_by_dirichlet(whole, 4, 0.5, generator=generator())
        if skewed
        else merging.split_evenly(whole, 4, generator=generator())
    )
    assert [len(client.train) for client in clients] == [26, 25, 25, 25]
    rows = torch.cat([client.train.images.flatten(1) for client in clients]).tolist()
    assert sorted(rows) == sorted(whole.train.images.flatten(1).tolist())
    labels = {
        tuple(row): int(y) for row, y in zip(whole.train.images.flatten(1).tolist(), whole.train.labels, strict=True)
    }
    for client in clients:
        assert all(labels[tuple(row)] == y for row, y in
                   zip(client.train.images.flatten(1).tolist(), client.train.labels.tolist(), strict=True))  # fmt: skip
        assert client.val is whole.val
        assert client.train.mean == whole.train.mean


def test_even_clients_have_every_class_in_proportion() -> None:
    whole = data(203)
    counts = shares_of(merging.split_evenly(whole, 5, generator=generator(1)))
    exact = torch.bincount(whole.train.labels) / 5
    assert ((counts - exact).abs() <= 1).all()


def test_the_smaller_alpha_the_fewer_classes() -> None:
    whole, leading = data(400), []
    for alpha in (0.05, 1.0, 1e4):
        draws = [shares_of(merging.split_by_dirichlet(whole, 8, alpha, generator=generator(seed))) for seed in range(4)]
        leading.append(torch.cat([counts.amax(1) / counts.sum(1) for counts in draws]).mean().item())
    assert leading[0] > 0.8
    assert leading[0] > leading[1] + 0.1 > leading[2] + 0.2
    even = shares_of(merging.split_by_dirichlet(whole, 8, 1e6, generator=generator()))
    prior = torch.bincount(whole.train.labels) / 400
    assert ((even / 50 - prior).abs() < 0.2).all()


def test_proportions_are_dirichlets() -> None:
    """One client of few examples a draw, so that no class is used up: variance p (1 - p) / (alpha + 1) and sampling."""
    whole, alpha, size = data(600), 2.0, 100
    prior = (torch.bincount(whole.train.labels) / 600).double()
    drawn = []
    for seed in range(60):
        first = merging.split_by_dirichlet(whole, 600 // size, alpha, generator=generator(seed))[0]
        drawn.append(shares_of([first])[0] / size)
    found = torch.stack(drawn)
    torch.testing.assert_close(found.mean(0), prior, rtol=0, atol=0.12)
    expected = prior * (1 - prior) / (alpha + 1)
    torch.testing.assert_close(found.var(0), expected, rtol=0.45, atol=0)


def test_the_same_generator_gives_the_same_clients() -> None:
    for draw in (partial(merging.split_evenly, data(), 3), partial(merging.split_by_dirichlet, data(), 3, 0.3)):
        first, again, other = (draw(generator=generator(seed)) for seed in (1, 1, 2))  # type: ignore[operator]
        assert all(torch.equal(a.train.images, b.train.images) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a.train.images, b.train.images) for a, b in zip(first, other, strict=True))


# --- Rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_one_local_step_on_all_examples_is_gradient_descent(name: str) -> None:
    whole = data(41)
    clients = merging.split_by_dirichlet(whole, 3, 0.5, generator=generator())
    found = merging.federated_averaging(NETWORKS[name], clients, WHOLE, 3, seed=5)
    plain = fresh(NETWORKS[name], WHOLE, seed=5)
    x, y = next(batches(whole.train, 1000, dtype=torch.float64))
    for _ in range(3):
        loss = F.cross_entropy(plain(x), y)
        gradients = torch.autograd.grad(loss, [*plain.parameters()])
        with torch.no_grad():
            for p, g in zip(plain.parameters(), gradients, strict=True):
                p.sub_(0.1 * g)
    same_weights(found.network, plain, 1e-11)
    assert found.rows[-1]["val_loss"] == pytest.approx(evaluate(plain, whole.val).loss)


def test_a_round_is_local_training_and_a_weighted_mean() -> None:
    clients = merging.split_evenly(data(43), 3, generator=generator(2))
    found = merging.federated_averaging(NETWORKS["convnet"], clients, LOCAL, 1, seed=4)
    drawn = torch.Generator().manual_seed(4)
    order = torch.randperm(3, generator=drawn).tolist()
    seeds = torch.randperm(4000, generator=drawn)[:3].tolist()
    trained = []
    for client, seed in zip(order, seeds, strict=True):
        trained.append(fresh(NETWORKS["convnet"], LOCAL, seed=4))
        fit(trained[-1], clients[client], LOCAL, seed=seed)
    sizes = [len(clients[client].train) for client in order]
    same_weights(found.network, merging.average(trained, [size / 43 for size in sizes]), 1e-13)
    bytes_of_one = sum(
        tensor.numel() * 8 for tensor in found.network.state_dict().values() if tensor.is_floating_point()
    )
    row = found.rows[0]
    assert (row["round"], row["clients"], row["examples"], row["bytes"]) == (1, 3, 86, 6 * bytes_of_one)
    assert row["val_accuracy"] == evaluate(found.network, clients[0].val).accuracy


def test_a_part_of_the_clients_takes_part_and_rounds_help() -> None:
    clients = merging.split_evenly(data(60), 4, generator=generator())
    recipe = replace(LOCAL, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    found = merging.federated_averaging(NETWORKS["mlp"], clients, recipe, 5, seed=0, fraction=0.5)
    assert found.frame()["clients"].tolist() == [2] * 5
    assert found.frame()["examples"].tolist() == [60, 120, 180, 240, 300]
    assert found.rows[-1]["val_loss"] < found.rows[0]["val_loss"]
    again = merging.federated_averaging(NETWORKS["mlp"], clients, recipe, 5, seed=0, fraction=0.5)
    same_weights(found.network, again.network)


# --- FedProx ----------------------------------------------------------------------------------------------------------


def test_the_proximal_term_is_half_the_squared_distance() -> None:
    model, server, x, y = network("mlp", 0), network("mlp", 1), batch(), torch.arange(6) % 4
    anchor = merging.parameters_of(server)
    found = merging.proximal(model, x, y, anchor=anchor, strength=0.7)
    rows = [nn.utils.parameters_to_vector(each.parameters()).detach() for each in (model, server)]
    assert found.item() == pytest.approx(
        F.cross_entropy(model(x), y).item() + 0.35 * (rows[0] - rows[1]).square().sum().item()
    )
    gradients = torch.autograd.grad(found, [*model.parameters()])
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])
    for g, without, w, held in zip(gradients, plain, model.parameters(), server.parameters(), strict=True):
        close(g, without + 0.7 * (w - held).detach(), 1e-12)


def test_a_strong_proximal_term_holds_the_clients_near_the_server() -> None:
    clients = merging.split_by_dirichlet(data(60), 3, 0.1, generator=generator())
    recipe = replace(LOCAL, epochs=6)

    def moved(strength: float) -> float:
        found = merging.federated_averaging(NETWORKS["mlp"], clients, recipe, 1, seed=0, strength=strength).network
        start = fresh(NETWORKS["mlp"], recipe, seed=0)
        return sum(
            float((a - b).detach().square().sum())
            for a, b in zip(found.parameters(), start.parameters(), strict=True)
        )  # fmt: skip

    assert moved(5.0) < 0.5 * moved(0.0)


def test_the_anchor_is_the_servers_of_this_round() -> None:
    """Two rounds of one whole step each: the term is 0 and has no gradient where a round begins."""
    clients = merging.split_evenly(data(40), 2, generator=generator())
    found = [
        merging.federated_averaging(NETWORKS["mlp"], clients, WHOLE, 2, seed=0, strength=strength).network
        for strength in (0.0, 3.0)
    ]
    same_weights(*found, 1e-13)


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    whole, model = data(20), network("mlp")
    average = partial(merging.federated_averaging, NETWORKS["mlp"])
    cases: list[tuple[str, Any]] = [
        ("clients=21: must be a whole number from 1", lambda: merging.split_evenly(whole, 21, generator=generator())),
        ("clients=0: must be", lambda: merging.split_by_dirichlet(whole, 0, 1.0, generator=generator())),
        ("alpha=0: must be a number above 0", lambda: merging.split_by_dirichlet(whole, 2, 0, generator=generator())),
        ("clients=[]: must be at least one data set", lambda: average([], WHOLE, 1, seed=0)),
        ("rounds=0: must be a whole number of at least 1", lambda: average([whole], WHOLE, 0, seed=0)),
        ("fraction=0: must be a number above 0 and at most 1", lambda: average([whole], WHOLE, 1, seed=0, fraction=0)),
        ("strength=-1: must be", lambda: average([whole], WHOLE, 1, seed=0, strength=-1)),
        ("anchor lacks 'head.bias'",
         lambda: merging.proximal(model, batch(), torch.zeros(6).long(), anchor={}, strength=1.0)),
    ]  # fmt: skip
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
def test_a_round_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = merging.split_evenly(data(40), 2, generator=generator())
    there = merging.federated_averaging(NETWORKS["mlp"], clients, WHOLE, 2, seed=0).network
    assert not next(there.parameters()).is_cuda, "trained there, a network comes back to where it lay"
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    here = merging.federated_averaging(NETWORKS["mlp"], clients, WHOLE, 2, seed=0).network
    same_weights(there, here, 1e-9)
