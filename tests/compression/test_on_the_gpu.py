"""What no other test of the chapter takes to a GPU: the numbers of the CPU, from tensors and networks over there.

Data sets and batches stay here, where a function takes a network beside them; generators are on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import compression as cp
from course_lib.lab.models import vit
from course_lib.lab.training import Recipe, fresh, logits_of
from tests.merging.small import Case, Move, batch, data, generator, network, normal, on_the_gpu_as_here

FOUR, EIGHT, UNSIGNED = cp.Grid(4), cp.Grid(8), cp.Grid(4, symmetric=False, signed=False)
W, X, KERNEL = normal(8, 16, seed=1), normal(20, 16, seed=2), normal(6, 4, 3, 3, seed=3)
GRAM = X.mT @ X
SMALL = data()
SHORT = Recipe(epochs=1, batch_size=20, precision="float64")


def linear() -> nn.Linear:
    layer = nn.Linear(16, 8)
    layer.weight.data, layer.bias.data = W.clone(), normal(8)
    return layer


def convolution() -> nn.Conv2d:
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    layer.weight.data = KERNEL.clone()
    return layer


def answer(model: nn.Module) -> Tensor:
    """What a network over there says of images that stay here."""
    return logits_of(model, SMALL.val)


def placed(to: Move, change: Callable[[nn.Module], nn.Module], name: str = "mlp") -> Tensor:
    return answer(change(to(network(name))))


# --- Ranges, formats, integers ----------------------------------------------------------------------------------------

RANGES: dict[str, Callable[..., Any]] = {
    "percentile": partial(cp.percentile, p=90.0),
    "least_squares": partial(cp.least_squares, candidates=5),
    "entropy": partial(cp.entropy, bins=21),
    "gaussian": cp.gaussian,
    "laplacian": cp.laplacian,
}
FORMATS: dict[str, Callable[[Tensor], cp.Rounded]] = {
    "microscaling": partial(cp.microscaling, block=8),
    "nvfp4": cp.nvfp4,
    "nf4": partial(cp.nf4, block=8, scale_block=4),
    "binary": cp.binary,
    "ternary": cp.ternary,
    "best_ternary": cp.best_ternary,
    "absmean": cp.absmean,
}


def packed(to: Move) -> Any:
    """Bytes that were packed there make the weight anew there."""
    made = cp.quantise_weight(to(W), cp.Grid(3, symmetric=False), 5)
    again = made.unpacked(made.packed())
    return made.packed(), again.dequantise(), made.bits_per_weight, cp.signal_to_noise(to(W), again.dequantise())


def four_bits(to: Move) -> Any:
    model = to(nn.Sequential(linear(), nn.ReLU()))
    small = cp.pack_linears(model, {"0": cp.quantise_weight(to(W), FOUR, 5)})
    return small(to(X)), small[0].weight, cp.saved_size(small)


# --- Shared weights, low ranks, vectors -------------------------------------------------------------------------------


def shared(to: Move) -> Any:
    model = to(network())
    cp.share_model(model, 4, init="random", generator=generator())
    codebooks, said = [found.codebook for found in cp.shared_layers(model).values()], answer(model)
    return [each.cpu() for each in codebooks], said, answer(cp.unshare(model)), cp.is_shared(model.head)


def hashed(to: Move) -> Any:
    """The seed is stored, and the places that belong to it are where the network is."""
    model = cp.hash_model(to(network()), 4, seed=3)
    other = cp.hash_model(to(network(seed=1)), 4, seed=5)
    other.load_state_dict(model.state_dict())
    assert answer(other).equal(answer(model))
    model.head.weight = model.head.weight.detach() * 2  # the nearest vector
    return answer(model)


def ranks(to: Move) -> Any:
    model = to(network())
    grams = cp.input_grams(model, SMALL.val)
    names = cp.ranks_by_energy(model, 0.8)
    table = cp.rank_sensitivity(model, SMALL.val, levels=(0.5,), grams=grams)
    parts = (cp.factorise(model, names), cp.factorise(model, names, grams=grams))
    return [names, table, *map(answer, parts)]


def noise_and_energy(to: Move) -> Any:
    values = torch.linalg.svdvals(to(W))
    return cp.rank_by_noise(values, (8, 16)), cp.rank_by_energy(values, 0.5)


def convolutions(to: Move) -> Any:
    layer, x = to(convolution()), to(normal(2, 4, 5, 5))
    made = (
        cp.svd_conv(layer, 2),
        cp.spatial_svd_conv(layer, 2),
        cp.tucker2_conv(layer, (2, 3), steps=2),
        cp.cp_conv(layer, 2, generator=generator(), steps=2),
    )
    return [each(x) for each in made]


def vectors(to: Move) -> Any:
    by = partial(cp.vector_quantise, size=2, clusters=4, generator=generator())
    made = cp.product_quantise(to(W), 4, 3, generator=generator())
    model, parts = cp.quantised_vectors(to(network()), by)
    return [each.cpu() for each in (made.dequantise(), made.product(to(X)))], answer(model), list(parts)


# --- Deltas -----------------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[Tensor], Any]] = {
    "signed": cp.signed,
    "lowered": partial(cp.lowered, rank=1),
    "largest": partial(cp.largest, keep=0.2),
    "exact": cp.exact,
}


def deltas(to: Move, of: Move, by: Callable[[Tensor], Any]) -> Any:
    """A delta lies with the base, wherever the tuned network does, and is stored and read anew."""
    base, tuned = to(network()), of(network(seed=1))
    parts = cp.compress_delta(base, tuned, by)
    again = cp.read_delta(cp.delta_bytes(parts))
    assert all(value.device == base.head.weight.device for value in cp.delta(base, tuned).values())
    return cp.bits_per_weight(parts), [answer(cp.restore(base, found)) for found in (parts, again)]


def refitted(to: Move) -> Any:
    base, tuned = to(network()), to(network(seed=1))
    parts = cp.compress_delta(base, tuned, cp.signed)
    found = cp.refit_scales(base, tuned, cp.read_delta(cp.delta_bytes(parts)), SMALL.train, steps=2)
    return answer(cp.restore(base, found))


# --- Integer networks, outliers ---------------------------------------------------------------------------------------


def corrected(to: Move) -> Tensor:
    model = to(network())
    return answer(cp.correct_bias(cp.weights_only(model, FOUR), model, SMALL.val))


def trained_small(to: Move) -> Any:
    settings = cp.DeepCompression(sparsity=0.5, clusters=4, after_sharing=SHORT, dtype=torch.float64)
    small = cp.prune_and_share(to(network()), SMALL, settings)
    made = cp.encode_model(to(small.cpu()))  # the emulated GPU cannot copy a parameter that begins inside of a tensor
    again = made.network(lambda: to(network(seed=1)))
    return made.size, answer(again), answer(made.network(partial(network, seed=1)))


def tiny(to: Move) -> nn.Module:
    return to(fresh(partial(vit, (1, 8, 8), 4, width=8, depth=1, heads=2, patch=4), SHORT, seed=0))


def rounded(to: Move) -> Tensor:
    model = tiny(to)
    stored = cp.awq_model(model, [batch()], FOUR, 4, layers=["blocks.0.mlp.0"], points=2)
    return answer(cp.with_reals(model, stored))


CASES: dict[str, Case] = {
    **{name: lambda to, f=f: [f(to(X[:3]), FOUR), f(to(X[:3]).abs(), UNSIGNED)] for name, f in RANGES.items()},  # type: ignore[misc]
    "moving_average": lambda to: cp.moving_average([cp.min_max(to(x)) for x in (X, 2 * X)]),
    "divergence": lambda to: cp.divergence(to(torch.arange(40.0) % 7), 5, 30, 8),
    **{name: lambda to, f=f: f(to(W)) for name, f in FORMATS.items()},  # type: ignore[misc]
    "round_to_float": lambda to: cp.round_to_float(to(100 * W), cp.E4M3),
    "rounding_error": lambda to: cp.rounding_error(to(W)),
    "packed": packed,
    "requantise": lambda to: cp.requantise(to(torch.arange(-300, 300, 7)), 0.1, 3, EIGHT),
    "low_rank": lambda to: [a @ b for a, b in (cp.low_rank(to(W), 3), cp.weighted_low_rank(to(W), 3, to(GRAM)))],
    "svd_linear": lambda to: [cp.svd_linear(to(linear()), 3, gram)(to(X)) for gram in (None, to(GRAM))],
    "tucker2": lambda to: cp.tucker2(to(KERNEL), (2, 3), steps=2)[0].abs(),
    "ranks of a matrix": noise_and_energy,
    "convolutions": convolutions,
    "k_means": lambda to: cp.k_means(to(X), 3, generator=generator()),
    "optimal_centroids": lambda to: cp.optimal_centroids(to(X.double()), 4),
    "lloyd": lambda to: cp.lloyd(to(X).flatten(), to(torch.linspace(-2, 2, 4))),
    "share": lambda to: [cp.share(to(W), 4, init).dequantise() for init in ("linear", "density")],
    "llm_int8": lambda to: cp.llm_int8(to(3 * X), to(W)),
    "random_signs": lambda to: cp.rotated_matmul(to(X), to(W), generator=generator()),
    "awq": lambda to: cp.awq(to(W), to(X.abs().mean(0)), to(GRAM), FOUR, 4, points=3).dequantise(),
    "adaptive_rounding": lambda to: cp.adaptive_rounding(to(W), to(GRAM), FOUR, steps=3).integers,
    "PackedLinear": four_bits,
}  # fmt: skip
NETWORKS: dict[str, Case] = {
    "share_model": shared,
    "hash_model": hashed,
    "factorise": ranks,
    "quantised_vectors": vectors,
    **{f"delta {name}": partial(deltas, of=lambda model: model, by=by) for name, by in WAYS.items()},
    **{f"delta there {name}": lambda to, by=by: deltas(to, to, by) for name, by in WAYS.items()},  # type: ignore[misc]
    "refit_scales": refitted,
    "dynamic": lambda to: placed(to, cp.dynamic),
    "equalise": lambda to: placed(to, partial(cp.equalise, rounds=2)),
    "correct_bias": corrected,
    "sensitivity": lambda to: cp.sensitivity(to(network()), SMALL.val, FOUR),
    "round_to_nearest": lambda to: answer(cp.with_reals(m := to(network()), cp.round_to_nearest(m, FOUR))),
    "stored_bytes": lambda to: cp.stored_bytes(cp.weights_only(to(network()), FOUR)),
    "compress": trained_small,
    "inject_outliers": lambda to: answer(cp.inject_outliers(tiny(to), batch(), channels=[1])),
    "smooth_quant": lambda to: answer(cp.smooth_quant(tiny(to), [batch(), batch(seed=1)])),
    "awq_model": rounded,
    "peak_to_rms": lambda to: cp.peak_to_rms(to(X)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_on_the_gpu_as_here(name: str, dtype: torch.dtype) -> None:
    on_the_gpu_as_here(CASES[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_on_the_gpu_as_here(name: str) -> None:
    on_the_gpu_as_here(NETWORKS[name], lies="cpu")


@pytest.mark.gpu
def test_engines_answer_where_they_are_asked(tmp_path: Path) -> None:
    model = network().float()
    engine = cp.torch_engine(copy.deepcopy(model).cuda())
    x = batch().float()
    for asked in (x, x.cuda()):
        found = engine.answer(asked)
        assert found.device == asked.device
        torch.testing.assert_close(found.cpu(), model(x))
