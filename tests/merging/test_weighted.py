"""Weighted means: Fisher information in closed form and by autograd, least squares by numpy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from course_lib import merging
from course_lib.lab.data import Split, batches
from tests.merging.small import NAMES, batch, close, generator, network, normal, same_weights, split

# --- Fisher information -----------------------------------------------------------------------------------------------


def softmax_regression(inputs: int = 5, classes: int = 4, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, classes).double()
    with torch.no_grad():
        layer.weight.copy_(normal(classes, inputs, seed=seed))
        layer.bias.copy_(normal(classes, seed=seed + 50))
    return layer


def test_of_softmax_regression_it_is_known() -> None:
    r"""F of W_kj is the mean of p_k (1 - p_k) x_j², that of b_k the mean of p_k (1 - p_k)."""
    layer, held = softmax_regression(), split(30, 5)
    x = held.inputs.double()  # type: ignore[union-attr]
    p = layer(x).softmax(1).detach()
    found = merging.exact_fisher(layer, held, batch_size=7)
    close(found["weight"], torch.einsum("nk,nj->kj", p * (1 - p), x.square()) / 30, 1e-12)
    close(found["bias"], (p * (1 - p)).mean(0), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_squares_are_of_each_examples_own_gradient(name: str) -> None:
    model, held = network(name).train(), split(6)
    modes, states = [part.training for part in model.modules()], copy.deepcopy(model.state_dict())
    exact, empirical = merging.exact_fisher(model, held, batch_size=4), merging.empirical_fisher(model, held)
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(value, states[key]) for key, value in model.state_dict().items())
    model.eval()
    x, y = next(batches(held, 6, dtype=torch.float64))
    names, weights = zip(*model.named_parameters(), strict=True)
    mean = {"exact": [0 * p for p in weights], "empirical": [0 * p for p in weights]}
    for one, label in zip(x, y, strict=True):
        logs = model(one[None]).log_softmax(1)[0]
        for k in range(4):
            gradients = torch.autograd.grad(logs[k], weights, retain_graph=True)
            for place, g in enumerate(gradients):
                mean["exact"][place] = mean["exact"][place] + logs[k].exp().detach() * g.square() / 6
                if k == label:
                    mean["empirical"][place] = mean["empirical"][place] + g.square() / 6
    for place, key in enumerate(names):
        close(exact[key], mean["exact"][place].detach(), 1e-10)
        close(empirical[key], mean["empirical"][place].detach(), 1e-10)


def test_drawn_labels_come_near_the_expectation_and_are_repeatable() -> None:
    layer, held = softmax_regression(), split(50, 5)
    exact = merging.exact_fisher(layer, held)["weight"]
    many = merging.fisher(layer, held, generator=generator(1), samples=400)["weight"]
    torch.testing.assert_close(many, exact, rtol=0.12, atol=2e-3)
    assert not torch.allclose(merging.empirical_fisher(layer, held)["weight"], exact, rtol=0.3)
    first, second = (merging.fisher(layer, held, generator=generator(2))["weight"] for _ in range(2))
    assert torch.equal(first, second)


def test_a_fisher_merge_solves_what_all_data_would_give() -> None:
    """Linear regression with inputs along the axes: F is the mean of x_j², and the sum over the data is exact."""
    sizes, true = (30, 60, 10), normal(4, seed=9)
    layers, fishers, xs, ys = [], [], [], []
    for place, size in enumerate(sizes):
        # each row looks at one weight, so the information is diagonal
        axes = torch.randint(4, (size,), generator=generator(place))
        axes[:4] = torch.arange(4)
        x = torch.eye(4, dtype=torch.float64)[axes] * (1 + place + normal(size, 1, seed=place).abs())
        y = x @ true + normal(size, seed=20 + place)
        layer = nn.Linear(4, 1, bias=False).double()
        with torch.no_grad():
            layer.weight.copy_(torch.linalg.lstsq(x, y[:, None]).solution.mT)
        layers.append(layer)
        fishers.append({"weight": x.square().mean(0)[None]})
        xs.append(x)
        ys.append(y)
    together = np.linalg.lstsq(torch.cat(xs).numpy(), torch.cat(ys).numpy(), rcond=None)[0]
    found = merging.fisher_merge(layers, fishers, [size / 100 for size in sizes])
    close(found.weight[0].detach(), torch.from_numpy(together), 1e-12)  # type: ignore[union-attr, index]
    plain = merging.average(layers, [size / 100 for size in sizes])
    assert (plain.weight[0] - torch.from_numpy(together)).abs().max() > 1e-2  # type: ignore[union-attr, index, operator]


def test_equal_information_gives_the_average_and_none_too() -> None:
    models = [network("convnet", seed) for seed in range(3)]
    ones = [{name: torch.ones_like(p) for name, p in model.named_parameters()} for model in models]
    none = [{name: torch.zeros_like(p) for name, p in model.named_parameters()} for model in models]
    for fishers in (ones, none):
        same_weights(
            merging.fisher_merge(models, fishers, [0.2, 0.3, 0.5]), merging.average(models, [0.2, 0.3, 0.5]), 1e-13
        )
    alone = [ones[0], none[1], none[2]]
    for name, value in merging.fisher_merge(models, alone).named_parameters():
        close(value, dict(models[0].named_parameters())[name], 1e-13)


# --- Regression mean --------------------------------------------------------------------------------------------------


def test_inner_products_are_of_what_the_layers_see() -> None:
    model, held = network("vit"), split(11)
    found = merging.inner_products(model, held, batch_size=4)
    assert set(found) == {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    seen: dict[str, Tensor] = {}
    for name in found:
        model.get_submodule(name).register_forward_hook(
            lambda part, inputs, output, name=name: seen.__setitem__(name, inputs[0].detach())
        )
    model(next(batches(held, 11, dtype=torch.float64))[0])
    for name, product in found.items():
        rows = seen[name].reshape(-1, seen[name].shape[-1])
        close(product, rows.T @ rows, 1e-10)


@pytest.mark.parametrize("rows", [20, 3])
def test_a_regression_mean_is_least_squares(rows: int) -> None:
    """Also with fewer rows than columns: then among all that do equally well the one nearest to the mean."""
    xs = [normal(rows, 8, seed=seed) for seed in range(2)]
    ws = [normal(3, 8, seed=10 + seed) for seed in range(2)]
    found = merging.regression_mean(ws, [x.mT @ x for x in xs])
    mean = (ws[0] + ws[1]) / 2
    rest = torch.cat([x @ (w - mean).mT for x, w in zip(xs, ws, strict=True)])
    solved = np.linalg.lstsq(torch.cat(xs).numpy(), rest.numpy(), rcond=None)[0]
    close(found, mean + torch.from_numpy(solved).mT, 1e-8)


def test_inner_products_of_float32_can_be_inverted() -> None:
    """Inputs with a mean far from 0: their products are nearly of rank one, and float32 would lose the rest."""
    layers, inputs = [nn.Linear(6, 3) for _ in range(2)], [100 + normal(400, 6, seed=s).float() for s in range(2)]
    held = [Split(rows, torch.zeros(400, dtype=torch.long), (0.0,) * 6, (1.0,) * 6) for rows in inputs]
    products = [merging.inner_products(layer, part) for layer, part in zip(layers, held, strict=True)]
    merged = merging.regmean(layers, products, alpha=1.0).weight.detach().double()
    xs, ws = [rows.double() for rows in inputs], [layer.weight.detach().double() for layer in layers]
    wanted = torch.cat([x @ w.mT for x, w in zip(xs, ws, strict=True)])
    solved = torch.from_numpy(np.linalg.lstsq(torch.cat(xs).numpy(), wanted.numpy(), rcond=None)[0]).mT
    close(merged, solved, 1e-4)
    single = merging.regression_mean(ws, [(rows.mT @ rows).double() for rows in inputs])  # summed in float32
    assert (single - solved).abs().max() > 1e-3, "float32 would do: the comparison says little"


def test_alpha_shrinks_what_lies_beside_the_diagonal() -> None:
    x, ws = [normal(20, 4, seed=s) for s in range(2)], [normal(3, 4, seed=5 + s) for s in range(2)]
    grams = [rows.mT @ rows for rows in x]
    diagonal = [gram.diagonal() for gram in grams]
    by_itself = (ws[0] * diagonal[0] + ws[1] * diagonal[1]) / (diagonal[0] + diagonal[1])
    close(merging.regression_mean(ws, grams, alpha=0.0), by_itself, 1e-10)
    beside = [0.9 * g + 0.1 * torch.diag(torch.diag(g)) for g in grams]
    by_formula = torch.linalg.inv(beside[0] + beside[1]) @ (beside[0] @ ws[0].mT + beside[1] @ ws[1].mT)
    close(merging.regression_mean(ws, grams, alpha=0.9), by_formula.mT, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_regmean_changes_linear_layers_alone(name: str) -> None:
    models = [network(name, seed) for seed in range(2)]
    products = [merging.inner_products(model, split(40, seed=seed)) for seed, model in enumerate(models)]
    found, plain = merging.regmean(models, products, alpha=0.9), merging.average(models)
    for key, part in found.named_modules():
        if isinstance(part, nn.Linear):
            ws = [model.get_submodule(key).weight.detach() for model in models]  # type: ignore[union-attr]
            close(part.weight.detach(), merging.regression_mean(ws, [p[key] for p in products], 0.9), 1e-12)  # type: ignore[arg-type]
            plain.get_submodule(key).weight = part.weight
    same_weights(found, plain)


def test_regmean_answers_more_like_each_network_than_the_mean_does() -> None:
    layers = [softmax_regression(8, seed=seed) for seed in range(2)]
    held = [split(30, 8, seed=seed) for seed in range(2)]
    # each network's inputs lie in other directions
    squeezed = [Split(part.inputs * torch.tensor([3.0, 0.1] * 4).roll(k), part.labels, part.mean, part.std)
                for k, part in enumerate(held)]  # fmt: skip
    products = [merging.inner_products(layer, part) for layer, part in zip(layers, squeezed, strict=True)]

    def apart(model: Callable[..., Tensor]) -> float:
        gaps = [
            (model(part.inputs.double()) - layer(part.inputs.double())).square().sum().item()  # type: ignore[union-attr]
            for layer, part in zip(layers, squeezed, strict=True)
        ]
        return sum(gaps)

    assert apart(merging.regmean(layers, products, alpha=1.0)) < 0.7 * apart(merging.average(layers))


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    a, held = network(), split(5)
    fisher = merging.exact_fisher(a, held)
    products = merging.inner_products(a, held)
    cases: list[tuple[str, Any]] = [
        ("samples=0: must be", lambda: merging.fisher(a, held, generator=generator(), samples=0)),
        ("batch_size=0: must be", lambda: merging.exact_fisher(a, held, batch_size=0)),
        ("must be a split with examples", lambda: merging.empirical_fisher(a, held.subset(torch.arange(0)))),
        ("fishers has 1 entries: must be one for each of the 2", lambda: merging.fisher_merge([a, a], [fisher])),
        ("fishers[1] does not fit 'hidden.0.weight'", lambda: merging.fisher_merge([a, a], [fisher, {}])),
        ("weights=[1, 1]: must be numbers whose sum is 1", lambda: merging.fisher_merge([a, a], [fisher] * 2, [1, 1])),
        ("models=[]: must be", lambda: merging.fisher_merge([], [])),
        ("products has 0 entries", lambda: merging.regmean([a, a], [])),
        ("products[0] does not fit layer 'hidden.0'", lambda: merging.regmean([a, a], [{}, products])),
        ("alpha=2: must be a number from 0 to 1", lambda: merging.regmean([a, a], [products] * 2, alpha=2)),
        ("model='ReLU': must be a network with a linear layer", lambda: merging.inner_products(nn.ReLU(), held)),
    ]  # fmt: skip
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_weighted_means_on_the_gpu(name: str) -> None:
    here = [network(name, seed) for seed in range(2)]
    there = [copy.deepcopy(model).cuda() for model in here]
    held = split(3)  # each example has a gradient of its own
    for side in (here, there):
        drawn = [merging.fisher(model, held, generator=generator(3)) for model in side]
        assert all(value.device == batch().to(next(side[0].parameters()).device).device for value in drawn[0].values())
    same_weights(
        merging.fisher_merge(there, [merging.exact_fisher(model, held) for model in there]).cpu(),
        merging.fisher_merge(here, [merging.exact_fisher(model, held) for model in here]),
        1e-8,
    )
    same_weights(
        merging.regmean(there, [merging.inner_products(model, held) for model in there]).cpu(),
        merging.regmean(here, [merging.inner_products(model, held) for model in here]),
        1e-8,
    )
