"""Members within one network: against ordinary networks with the weights written out, and losses by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import fusion
from course_lib.fusion.shared import RankOne
from course_lib.lab.models import mlp
from course_lib.lab.training import evaluate, fit, fresh, logits_of
from tests.fusion.small import EXACT, NAMES, batch, close, data, generator, network, normal


def shaken(model: fusion.BatchEnsemble) -> fusion.BatchEnsemble:
    """The factors are no longer signs, the biases no longer alike."""
    drawn = generator(9)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, RankOne):
                for tensor in (part.r, part.s, part.bias):
                    if tensor is not None:
                        tensor.add_(0.3 * torch.randn(tensor.shape, generator=drawn, dtype=tensor.dtype))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_members_of_a_batch_ensemble_are_ordinary_networks(name: str) -> None:
    model, x = shaken(fusion.BatchEnsemble(network(name), 3, generator=generator())), batch(6)
    plain = [model.plain(member) for member in range(3)]
    with torch.no_grad():
        each = model.each(x)
        close(each, torch.stack([member(x) for member in plain]), 1e-12)
        close(model(x), fusion.mean_probability(each), 1e-12)
        model.train()
        for part in model.modules():  # so that batch norm is a function of one example
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        found = model(x)  # two examples each
        close(found, torch.cat([plain[m](x[2 * m : 2 * m + 2]) for m in range(3)]), 1e-12)
    names = {type(part) for part in plain[0].modules()}
    assert RankOne not in names


def test_the_layers_of_a_member_are_outer_products() -> None:
    source = network("convnet")
    model = shaken(fusion.BatchEnsemble(source, 2, generator=generator()))
    before, after = source.features[0].weight, model.plain(1).features[0].weight  # type: ignore[union-attr, index]
    layer = model.model.features[0]  # type: ignore[union-attr, index]
    close(after.detach(), (before * torch.einsum("o,i->oi", layer.s[1], layer.r[1])[:, :, None, None]).detach(), 1e-12)


def test_members_start_with_signs_and_the_network_stays() -> None:
    source = network()
    model = fusion.BatchEnsemble(source, 4, generator=generator())
    layer = model.model.head
    assert isinstance(layer, RankOne)
    assert layer.r.abs().eq(1).all()
    assert len({tuple(row) for row in layer.r.tolist()}) > 1
    assert isinstance(source.head, nn.Linear)
    again = fusion.BatchEnsemble(source, 4, generator=generator())
    assert torch.equal(again.model.head.r, layer.r)  # type: ignore[union-attr]


def test_a_batch_ensemble_trains_every_factor_in_fit() -> None:
    model = fusion.BatchEnsemble(network(), 3, generator=generator())
    start = {name: p.clone() for name, p in model.named_parameters()}
    fit(model, data(), replace(EXACT, epochs=1), seed=0)
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert logits_of(model, data().test).exp().sum(1).allclose(torch.ones(20, dtype=torch.float64))
    assert model.each(batch()).std(0).mean() > 0


def test_an_uneven_batch_leaves_nobody_out() -> None:
    model = fusion.BatchEnsemble(network(), 3, generator=generator()).train()
    x = batch(5)
    plain = [model.plain(m) for m in range(3)]
    expected = torch.cat([plain[0](x[:2]), plain[1](x[2:4]), plain[2](x[4:])])
    close(model(x), expected, 1e-12)


def make_mimo(members: int = 3) -> fusion.MIMO:
    return fresh(lambda: fusion.MIMO(partial(mlp, width=6), (1, 8, 8), 4, members=members), EXACT, seed=0)


def test_mimo_puts_examples_side_by_side() -> None:
    model, xs = make_mimo(), normal(3, 5, 1, 8, 8)
    found = model.answers(xs)
    plain = model.model(torch.cat([*xs], dim=1))  # [5, 3, 8, 8] -> [5, 3 * 4]
    close(found, torch.stack([plain[:, 4 * m : 4 * m + 4] for m in range(3)]), 1e-12)
    close(model.each(xs[0]), model.answers(torch.stack([xs[0]] * 3)), 0)
    close(model(xs[0]), fusion.mean_probability(model.each(xs[0])), 0)


@pytest.mark.parametrize("repetition", [0.0, 0.5, 1.0])
def test_its_loss_pairs_each_example_with_its_own_label(repetition: float) -> None:
    """The first pixel of an example is its number: so the orders can be read off what the network is shown."""
    shown: list[Tensor] = []

    class Listens(fusion.MIMO):
        def answers(self, xs: Tensor) -> Tensor:
            shown.append(xs)
            return super().answers(xs)

    model = fresh(lambda: Listens(partial(mlp, width=6), (1, 8, 8), 4, members=2), EXACT, seed=0)
    x, y = batch(8), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    x[:, 0, 0, 0] = torch.arange(8)
    loss = fusion.mimo_loss(model, x, y, repetition=repetition, generator=generator())
    orders = shown[0][:, :, 0, 0, 0].long()
    assert all(sorted(order.tolist()) == list(range(8)) for order in orders)
    same = orders[0] == orders[1]
    assert int(same[round(8 * (1 - repetition)) :].sum()) == round(8 * repetition)
    if repetition == 0:
        assert not same.all()
    logits = fusion.MIMO.answers(model, x[orders])
    close(loss, sum(F.cross_entropy(z, y[order]) for z, order in zip(logits, orders, strict=True)), 1e-12)


def test_mimo_trains_in_fit() -> None:
    model = make_mimo(2)
    fit(model, data(), replace(EXACT, objective=fusion.mimo_loss), seed=0)
    assert 0 <= evaluate(model, data().test).accuracy <= 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.BatchEnsemble(network(), 0, generator=generator()), "members="),
        (lambda: fusion.BatchEnsemble(nn.ReLU(), 2, generator=generator()), "model="),
        (lambda: fusion.BatchEnsemble(network(), 2, generator=generator()).plain(2), "member="),
        (lambda: fusion.BatchEnsemble(nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), 2, generator=generator()), "layer="),
        (lambda: fusion.BatchEnsemble(network(), 2, generator=generator()).model(batch()), "must come through"),
        (lambda: fusion.MIMO(mlp, (1, 8, 8), 4, members=0), "members="),
        (lambda: fusion.mimo_loss(network(), batch(), torch.zeros(6, dtype=torch.int64)), "model=MLP"),
        (lambda: fusion.mimo_loss(make_mimo(), batch(), torch.zeros(6), repetition=2.0), "repetition="),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
