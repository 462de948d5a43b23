"""Low rank: Eckart and Young's optimum, what is least on the inputs, tensorly's decompositions, replaced layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorly
import torch
import torch.nn.functional as F
from tensorly.cp_tensor import cp_to_tensor
from tensorly.decomposition import parafac, partial_tucker
from torch import Tensor, nn

from course_lib.compression.low_rank import (
    cp,
    cp_conv,
    factorise,
    input_grams,
    input_rows,
    low_rank,
    parameters_of_rank,
    rank_by_energy,
    rank_by_noise,
    rank_by_sensitivity,
    ranks_by_energy,
    sensitivity,
    spatial_svd_conv,
    svd_conv,
    svd_linear,
    tucker2,
    tucker2_conv,
    weighted_low_rank,
)
from course_lib.lab.data import Dataset, batches, load
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import Recipe, evaluate, fit, fresh, logits_of

RECIPE = Recipe(epochs=4, precision="float64")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", train_size=400)


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> Any:
    model = fresh(partial(mlp, (1, 8, 8), 10, width=32), RECIPE, seed=0)
    fit(model, digits, RECIPE, seed=0)
    return model


# --- Matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_the_error_is_the_singular_values_left_out(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    s = np.linalg.svd(weight.numpy(), compute_uv=False)
    for rank in range(1, 8):
        a, b = low_rank(weight, rank)
        assert a.shape == (shape[0], rank)
        assert b.shape == (rank, shape[1])
        assert float((weight - a @ b).square().sum()) == pytest.approx((s[rank:] ** 2).sum(), abs=1e-12)
        torch.testing.assert_close(a.square().sum(0), b.square().sum(1))  # balanced
        for seed in range(5):  # and no other product is nearer, however its second factor is chosen
            other = normal(shape[0], rank, seed=seed)
            best = other @ torch.linalg.lstsq(other, weight).solution
            assert (weight - best).norm() >= (weight - a @ b).norm() - 1e-12


def test_on_the_inputs_no_product_is_nearer() -> None:
    weight, x = normal(6, 9), normal(9, 200, seed=1) * torch.logspace(0, -2, 9, dtype=torch.float64)[:, None]
    x = normal(9, 9, seed=2) @ x
    gram = x @ x.mT
    for rank in (1, 3, 5):
        a, b = weighted_low_rank(weight, rank, gram, damping=1e-12)
        error = (weight @ x - a @ b @ x).norm()
        torch.testing.assert_close(a.square().sum(0), b.square().sum(1))  # balanced, for further training
        # reduced-rank regression in closed form: what comes out, projected on its first left singular vectors
        u = torch.linalg.svd(weight @ x, full_matrices=False).U[:, :rank]
        torch.testing.assert_close(error, (weight @ x - u @ u.mT @ weight @ x).norm())
        torch.testing.assert_close(a @ b, u @ u.mT @ weight, rtol=1e-6, atol=1e-6)
        plain = torch.linalg.multi_dot([*low_rank(weight, rank), x])
        assert error < 0.95 * (weight @ x - plain).norm()
    torch.testing.assert_close(
        torch.mm(*weighted_low_rank(weight, 3, torch.eye(9, dtype=torch.float64))), torch.mm(*low_rank(weight, 3))
    )


def test_inputs_that_are_never_there_do_no_harm() -> None:
    x = normal(5, 40)
    x[3:] = 0
    weight = normal(4, 5, seed=1)
    a, b = weighted_low_rank(weight, 3, x @ x.mT)
    torch.testing.assert_close(a @ b @ x, weight @ x, rtol=1e-4, atol=1e-4)
    a, b = weighted_low_rank(weight, 2, torch.zeros(5, 5, dtype=torch.float64))
    assert bool(torch.isfinite(a @ b).all())


# --- Layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_two_linear_layers_are_the_product(bias: bool) -> None:
    layer = nn.Linear(12, 7, bias=bias, dtype=torch.float64)
    x = normal(3, 5, 12)
    made = svd_linear(layer, 3)
    a, b = low_rank(layer.weight.detach(), 3)
    torch.testing.assert_close(made(x), F.linear(x, a @ b, layer.bias))
    torch.testing.assert_close(svd_linear(layer, 7)(x), layer(x))
    assert sum(p.numel() for p in made.parameters()) == parameters_of_rank((7, 12), 3) + 7 * bias


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": (2, 1)},
    "uneven": {"stride": (1, 2), "dilation": (2, 1), "padding": (0, 2), "bias": False},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflected": {"padding": 2, "padding_mode": "reflect"},
}


def of_svd(weight: Tensor) -> Tensor:
    return torch.mm(*low_rank(weight.flatten(1), 3)).view(weight.shape)


def of_spatial(weight: Tensor) -> Tensor:
    unfolded = weight.permute(1, 2, 0, 3).flatten(0, 1).flatten(1)
    out, into, high, wide = weight.shape
    return torch.mm(*low_rank(unfolded, 3)).view(into, high, out, wide).permute(2, 0, 1, 3)


def of_tucker(weight: Tensor) -> Tensor:
    core, out, into = tucker2(weight, (3, 2))
    return torch.einsum("pqhw,op,iq->oihw", core, out, into)


def of_cp(weight: Tensor) -> Tensor:
    return torch.einsum("or,ir,hr,wr->oihw", *cp(weight, 4, generator=generator(), steps=20))


WAYS: dict[str, tuple[Callable[[nn.Conv2d], nn.Sequential], Callable[[Tensor], Tensor], list[tuple[int, ...]]]] = {
    "svd": (partial(svd_conv, rank=3), of_svd, [(3, 4, 3, 2), (6, 3, 1, 1)]),
    "spatial": (partial(spatial_svd_conv, rank=3), of_spatial, [(3, 4, 3, 1), (6, 3, 1, 2)]),
    "tucker": (partial(tucker2_conv, ranks=(3, 2)), of_tucker, [(2, 4, 1, 1), (3, 2, 3, 2), (6, 3, 1, 1)]),
    "cp": (
        lambda layer: cp_conv(layer, 4, generator=generator(), steps=20),
        of_cp,
        [(4, 4, 1, 1), (4, 1, 3, 1), (4, 1, 1, 2), (6, 4, 1, 1)],
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_replaced_convolutions_compute_what_the_kernel_put_together_computes(way: str, kind: str) -> None:
    replace, rebuild, shapes = WAYS[way]
    layer = nn.Conv2d(4, 6, (3, 2), **CONVOLUTIONS[kind], dtype=torch.float64)
    x = normal(2, 4, 9, 8)
    made = replace(layer)
    assert [tuple(part.weight.shape) for part in made] == shapes
    wanted = nn.Conv2d(4, 6, (3, 2), **CONVOLUTIONS[kind], dtype=torch.float64)
    wanted.load_state_dict({**layer.state_dict(), "weight": rebuild(layer.weight.detach())})
    torch.testing.assert_close(made(x), wanted(x))
    assert (rebuild(layer.weight.detach()) - layer.weight).norm() < 0.95 * layer.weight.norm()


def test_full_ranks_change_nothing() -> None:
    layer, x = nn.Conv2d(3, 5, 3, padding=1, dtype=torch.float64), normal(2, 3, 6, 6)
    for made in (svd_conv(layer, 5), spatial_svd_conv(layer, 9), tucker2_conv(layer, (5, 3))):
        torch.testing.assert_close(made(x), layer(x))
    narrow = nn.Conv2d(2, 9, 1, dtype=torch.float64)
    made = tucker2_conv(narrow, (9, 2))
    torch.testing.assert_close(made(x[:, :2]), narrow(x[:, :2]))
    assert [tuple(part.weight.shape[:2]) for part in made] == [(2, 2), (2, 2), (9, 2)], "no more than there is"


# --- Kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(2, 2), (5, 3), (8, 6)])
def test_tucker_is_as_near_as_tensorlys(ranks: tuple[int, int]) -> None:
    weight = normal(8, 6, 3, 3)
    core, out, into = tucker2(weight, ranks, steps=50)
    error = (weight - torch.einsum("pqhw,op,iq->oihw", core, out, into)).norm()
    theirs, _ = partial_tucker(
        weight.numpy(), rank=list(ranks), modes=[0, 1], n_iter_max=200, tol=1e-12, svd="truncated_svd"
    )
    their_error = np.linalg.norm(weight.numpy() - tensorly.tenalg.multi_mode_dot(theirs[0], theirs[1], modes=[0, 1]))
    assert float(error) == pytest.approx(float(their_error), rel=1e-4, abs=1e-10)
    for basis in (out, into):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[1], dtype=torch.float64))


def test_turns_bring_the_bases_nearer() -> None:
    weight = normal(8, 6, 3, 3)
    errors = []
    for steps in (0, 1, 2, 20):
        core, out, into = tucker2(weight, (3, 2), steps=steps)
        errors.append(float((weight - torch.einsum("pqhw,op,iq->oihw", core, out, into)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] - 1e-3


def test_cp_finds_a_sum_of_products_and_is_as_near_as_tensorlys() -> None:
    parts = [normal(n, 3, seed=seed) for seed, n in enumerate((8, 6, 3, 4))]
    weight = torch.einsum("or,ir,hr,wr->oihw", *parts)
    found = torch.einsum("or,ir,hr,wr->oihw", *cp(weight, 3, generator=generator(1)))
    torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)
    noise = normal(6, 5, 3, 3, seed=9)
    ours = min(
        float((noise - torch.einsum("or,ir,hr,wr->oihw", *cp(noise, 4, generator=generator(seed)))).norm())
        for seed in range(4)
    )
    theirs = min(
        float(np.linalg.norm(noise.numpy() - cp_to_tensor(
            parafac(noise.numpy(), 4, n_iter_max=200, init="random", random_state=seed, tol=1e-12)
        )))
        for seed in range(4)
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=0.02)


def test_cp_turns_never_grow_the_error_and_balance_the_vectors() -> None:
    weight = normal(5, 4, 3, 3)
    errors = []
    for steps in range(1, 12):
        factors = cp(weight, 3, generator=generator(), steps=steps)
        errors.append(float((weight - torch.einsum("or,ir,hr,wr->oihw", *factors)).norm()))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))
    norms = torch.stack([factor.norm(dim=0) for factor in factors])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))
    # at a matrix it is Eckart and Young's optimum
    matrix = normal(6, 7)
    factors = cp(matrix, 2, generator=generator(), steps=400)
    error = (matrix - factors[0] @ factors[1].mT).norm()
    torch.testing.assert_close(error, (matrix - torch.mm(*low_rank(matrix, 2))).norm())


# --- Ranks ------------------------------------------------------------------------------------------------------------


def test_energy_is_a_share_of_the_squares() -> None:
    s = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])  # squares 9, 4, 1, 1, 1: of 16
    shares = {0.01: 1, 9 / 16: 1, 0.6: 2, 13 / 16: 2, 0.85: 3, 14 / 16: 3, 1.0: 5}
    assert {share: rank_by_energy(s, share) for share in shares} == shares
    model = fresh(partial(convnet, (1, 8, 8), 10, width=4), RECIPE, seed=0)
    for name, rank in ranks_by_energy(model, 0.8).items():
        s = torch.linalg.svdvals(model.get_submodule(name).weight.flatten(1)).detach()
        assert s[:rank].square().sum() >= 0.8 * s.square().sum() > s[: rank - 1].square().sum()


def rank_by_grid(s: np.ndarray, shape: tuple[int, int]) -> int:
    """Nakajima et al. 2013: the noise with the least free energy, among many."""
    low, high = sorted(shape)
    alpha = low / high
    tau = 2.5129 * alpha**0.5
    threshold = (1 + tau) * (1 + alpha / tau)
    best = (np.inf, 0.0)
    start = max((s[int(np.ceil(low / (1 + alpha))) - 1 :] ** 2).mean() / high, 0)
    for noise in np.linspace(start, (s**2).sum() / (low * high), 2000):
        energy = 0.0
        for x in s**2 / (high * noise):
            energy += x - np.log(x)
            if x > threshold:
                t = ((x - 1 - alpha) + np.sqrt((x - 1 - alpha) ** 2 - 4 * alpha)) / 2
                energy += np.log(t + 1) + alpha * np.log(t / alpha + 1) - t
        best = min(best, (energy, noise))
    return int((s**2 > high * best[1] * threshold).sum())


@pytest.mark.parametrize("shape", [(12, 60), (20, 24)])
def test_the_noise_is_the_least_surprising(shape: tuple[int, int]) -> None:
    for seed in range(6):
        decay = torch.exp(-torch.arange(shape[0], dtype=torch.float64) / 2)[:, None]
        s = torch.linalg.svdvals(10 * decay * normal(*shape, seed=seed) + normal(*shape, seed=50 + seed))
        assert rank_by_noise(s, shape) == rank_by_grid(s.numpy(), shape)


@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (60, 60)])
def test_noise_hides_no_rank_and_makes_none(shape: tuple[int, int]) -> None:
    for rank, seed in itertools.product((0, 1, 5), range(3)):
        signal = normal(shape[0], rank, seed=seed) @ normal(rank, shape[1], seed=100 + seed)
        for strength in (0.01, 0.3):
            noisy = signal + strength * normal(*shape, seed=200 + seed)
            assert rank_by_noise(torch.linalg.svdvals(noisy), shape) == rank


def test_sensitivity_is_the_loss_with_one_layer_lowered(trained: Any, digits: Dataset) -> None:
    table = sensitivity(trained, digits.val, levels=(0.6, 0.3))
    assert list(table.columns) == ["layer", "rank", "parameters", "loss"]
    first = table[table["layer"] == "hidden.0"]
    assert first["parameters"].tolist() == [64 * 32, 96 * 12, 96 * 6]
    assert first["rank"].tolist() == [32, 12, 6]
    assert first["loss"].iloc[0] == pytest.approx(evaluate(trained, digits.val).loss)
    weight = trained.hidden[0].weight.detach().clone()
    with torch.no_grad():
        trained.hidden[0].weight.copy_(torch.mm(*low_rank(weight, 6)))
        wanted = evaluate(trained, digits.val).loss
        trained.hidden[0].weight.copy_(weight)
    assert first["loss"].iloc[2] == pytest.approx(wanted)


def test_the_cheapest_parameters_go_first() -> None:
    a = [("a", 10, 100, 1.0), ("a", 5, 60, 1.1), ("a", 2, 30, 1.15)]
    b = [("b", 8, 50, 1.0), ("b", 4, 30, 1.01), ("b", 1, 10, 3.0)]
    table = pd.DataFrame(a + b, columns=["layer", "rank", "parameters", "loss"])
    assert rank_by_sensitivity(table, 1.0) == {}
    assert rank_by_sensitivity(table, 0.9) == {"b": 4}  # 0.01 for 20, against 0.1 for 40 and 0.15 for 70
    assert rank_by_sensitivity(table, 0.8) == {"a": 2, "b": 4}  # skips a's middle rank
    assert rank_by_sensitivity(table, 0.3) == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match=r"budget=0.2: must be at least 0.267, by the table's ranks"):
        rank_by_sensitivity(table, 0.2)


def test_measured_ranks_lose_less_than_the_same_share_of_each_layer(trained: Any, digits: Dataset) -> None:
    grams = input_grams(trained, digits.train)
    table = sensitivity(trained, digits.val, grams=grams)
    ranks = rank_by_sensitivity(table, 0.35)
    whole = {"hidden.0": (32, 64), "hidden.2": (32, 32), "head": (10, 32)}
    used = sum(parameters_of_rank(s, ranks[n]) if n in ranks else s[0] * s[1] for n, s in whole.items())
    assert used <= 0.35 * sum(a * b for a, b in whole.values())
    even = {name: max(1, int(0.35 * a * b / (a + b))) for name, (a, b) in whole.items()}
    losses = [evaluate(factorise(trained, each, grams=grams), digits.val).loss for each in (ranks, even)]
    assert losses[0] < losses[1]


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_a_factorised_network_is_a_copy_that_trains(digits: Dataset) -> None:
    model = fresh(partial(convnet, (1, 8, 8), 10, width=8), RECIPE, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranks = {"features.4": 6, "features.8": 12, "head": 10}
    small: Any = factorise(model, ranks)
    assert isinstance(small.head, nn.Linear), "a head of full rank would not become smaller"
    assert [part.out_channels for part in small.features[8]] == [12, 32]
    expected = sum(p.numel() for p in model.parameters()) - 16 * 72 - 32 * 144 + 6 * (16 + 72) + 12 * (32 + 144)
    assert sum(p.numel() for p in small.parameters()) == expected
    fit(small, digits, Recipe(epochs=1, precision="float64"), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    tucker: Any = factorise(model, {"features.8": (6, 5)}, conv=tucker2_conv)
    assert len(tucker.features[8]) == 3


def test_inputs_are_those_that_the_layers_see(digits: Dataset) -> None:
    model = fresh(partial(convnet, (1, 8, 8), 10, width=3), RECIPE, seed=0)
    grams = input_grams(model, digits.val)
    x = torch.cat([x for x, _ in batches(digits.val, 512, dtype=torch.float64)])
    model.eval()
    with torch.no_grad():
        seen = model.features[:4](x)
        patches = F.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(grams["features.4"], patches.mT @ patches)
        features = model.embedding(x)
    torch.testing.assert_close(grams["head"], features.mT @ features)
    layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 1), padding_mode="circular").double()
    rows = input_rows(layer, x := normal(2, 4, 9, 8))
    torch.testing.assert_close(rows @ layer.weight.flatten(1).mT + layer.bias, layer(x).flatten(2).mT.flatten(0, 1))
    assert input_rows(nn.Linear(3, 2), normal(2, 5, 3)).shape == (10, 3)


def test_the_inputs_tell_better_what_to_keep(trained: Any, digits: Dataset) -> None:
    ranks = {"hidden.0": 6, "hidden.2": 6}
    grams = input_grams(trained, digits.train)
    wanted = logits_of(trained, digits.test)
    errors = [(logits_of(factorise(trained, ranks, grams=g), digits.test) - wanted).norm() for g in (grams, None)]
    assert errors[0] < 0.9 * errors[1]


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named(trained: Any, digits: Dataset) -> None:
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    cases: list[tuple[str, Any]] = [
        ("rank=0: must be a whole number of at least 1", lambda: low_rank(normal(3, 4), 0)),
        ("rank=4: must be at most 3", lambda: low_rank(normal(3, 4), 4)),
        ("gram=(3, 3): must be 4 numbers high and wide", lambda: weighted_low_rank(normal(3, 4), 1, normal(3, 3))),
        ("damping=0: must be a number above 0", lambda: weighted_low_rank(normal(3, 4), 1, normal(4, 4), 0)),
        ("share=1.5: must be a number above 0", lambda: rank_by_energy(normal(3), 1.5)),
        ("singular_values=3: must be as many", lambda: rank_by_noise(normal(3), (4, 5))),
        ("levels=(1.0,): must be numbers between 0 and 1", lambda: sensitivity(trained, digits.val, levels=(1.0,))),
        ("budget=0: must be", lambda: rank_by_sensitivity(pd.DataFrame(), 0)),
        ("layers names 'neck'", lambda: factorise(trained, {"neck": 3})),
        ("grams: 'head' is not among them", lambda: factorise(trained, {"head": 3}, grams={"hidden.0": normal(2, 2)})),
        ("groups=2: must be a convolution without groups", lambda: svd_conv(grouped, 2)),
        ("groups=2", lambda: spatial_svd_conv(grouped, 2)),
        ("groups=2", lambda: tucker2_conv(grouped, (2, 2))),
        ("groups=2", lambda: cp_conv(grouped, 2, generator=generator())),
        ("rank=9: must be at most 8", lambda: tucker2(normal(8, 6, 3, 3), (9, 2))),
        ("steps=0", lambda: cp(normal(3, 3), 1, generator=generator(), steps=0)),
        ("'0' is a Conv1d", lambda: ranks_by_energy(nn.Sequential(nn.Conv1d(2, 2, 3)), 0.5)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match="(?s).*") as caught:
            call()
        assert words in str(caught.value), str(caught.value)
