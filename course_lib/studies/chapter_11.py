"""Chapter 11's study: how few bits a residual network bears that was trained on photographs.

CIFAR-10 at 16×16 pixels, 10,000 labels, a ResNet of 16, 32 and 64 channels in three blocks, SGD with momentum, a cosine
to zero, flipped and shifted images, 12 epochs; 5,000 test images. Each seed has a network of its own, and everything is
done to that one: so all differences are paired. What trains on does so for three epochs more, at a tenth of the rate.

"bits": weights alone, by granularity, GPTQ and format; weights and activations together, calibrated or trained for it
(the first and the last layer keep 8 bits). "chain": prune, share, code, with the bytes of the real file; the order of
pruning and rounding; low rank before and after training, at equal epochs.
"""

import copy
from functools import partial

import torch
from torch import nn

from course_lib import compression as cp
from course_lib import pruning
from course_lib.lab.data import Dataset, batches
from course_lib.lab.models import resnet
from course_lib.lab.studies import Part, Study
from course_lib.lab.training import Recipe, evaluate, fit, fresh
from course_lib.studies.chapter_12 import PIXELS, WIDTH, flipped_and_shifted, many, sgd

SEEDS = (0, 1, 2, 3, 4)
EPOCHS, TUNE, RATE = 12, 3, 0.005
BITS, SAMPLES, GROUP = (8, 6, 4, 3, 2), 512, 9
FORMATS = {
    "float8": lambda w: cp.Rounded(cp.round_to_float(w, cp.E4M3), 8.0),
    "NF4": cp.nf4,
    "MXFP4": cp.microscaling,
    "ternary": cp.best_ternary,
    "binary": cp.binary,
}
CHAINS = ((0.0, 32), (0.5, 16), (0.8, 16), (0.9, 16))
ENERGIES, FROM_THE_START = (0.95, 0.9, 0.8), 0.9
SPARSITY, ROUNDED = 0.8, 4


def network() -> nn.Module:
    """A residual network of three blocks."""
    return resnet((3, PIXELS, PIXELS), 10, width=WIDTH)


def tuning() -> Recipe:
    """Three epochs more, at a tenth of the rate."""
    return sgd(TUNE, RATE, flipped_and_shifted)


def trained(data: Dataset, seed: int, make: object = network) -> nn.Module:
    """The network of a seed."""
    model: nn.Module = fresh(make, sgd(EPOCHS), seed=seed)  # type: ignore[arg-type]
    fit(model, data, sgd(EPOCHS), seed=seed, progress=False)
    return model


def right(model: nn.Module, data: Dataset) -> float:
    """The accuracy on the test split."""
    return evaluate(model, data.test).accuracy


def inner(model: nn.Module) -> tuple[list[str], list[str]]:
    """The layers between the first and the last, and these two."""
    names = list(cp.quantisable_layers(model))
    return names[1:-1], [names[0], names[-1]]


def bits_of(data: Dataset, seed: int) -> dict[str, float]:
    """Everything that is done to one network without changing its shape."""
    model = trained(data, seed)
    some = data.train.subset(torch.arange(SAMPLES))
    inputs = [x for x, _ in batches(some, 128)]
    found = {"float": right(model, data)}
    for bits in BITS:
        grid = cp.Grid(bits)
        granular = {"tensor": "tensor", "channel": "channel", f"group of {GROUP}": GROUP}
        for name, granularity in granular.items():
            found[f"{name}, {bits}"] = right(cp.weights_only(model, grid, granularity), data)  # type: ignore[arg-type]
        clipped = cp.weights_only(model, grid, "channel", low_high=cp.least_squares)
        found[f"channel clipped, {bits}"] = right(clipped, data)
        rounded = cp.gptq_model(model, inputs, grid, "channel")
        found[f"GPTQ, {bits}"] = right(cp.with_weights(model, rounded), data)
    for name, to in FORMATS.items():
        found[name] = right(cp.weights_only(model, to), data)
    found |= with_activations(model, data, seed)
    alone = cp.sensitivity(model, data.val, cp.Grid(3), "channel")["increase"]
    found |= {f"alone at 3: {name}": float(more) for name, more in alone.items()}
    return found


def with_activations(model: nn.Module, data: Dataset, seed: int) -> dict[str, float]:
    """Weights and activations together: calibrated, and trained for it."""
    some, found = data.train.subset(torch.arange(SAMPLES)), {}
    between, ends = inner(model)
    plain = copy.deepcopy(model)
    fit(plain, data, tuning(), seed=seed, progress=False)
    found["float, tuned on"] = right(plain, data)
    for bits in BITS:
        weights, activations = cp.Grid(bits), cp.Grid(bits, symmetric=False, signed=False)
        for name, calibrator in (("range", cp.min_max), ("least squares", cp.least_squares)):
            kept = cp.static(model, some, layers=ends)
            low = cp.static(
                kept, some, weights, activations, calibrator=calibrator, low_high=calibrator, layers=between, fold=False
            )
            found[f"calibrated by {name}, {bits}"] = right(low, data)
        if bits > 4:
            continue
        for name, quantisers in (
            ("straight-through", {}),
            ("learnt steps", {"weight_quantiser": cp.LearntWeights, "activation_quantiser": cp.LearntInputs}),
        ):
            aware = cp.quantise_aware(model, layers=ends, **quantisers)  # type: ignore[arg-type]
            aware = cp.quantise_aware(aware, weights, activations, layers=between, **quantisers)
            fit(aware, data, tuning(), seed=seed, progress=False)
            found[f"{name}, {bits}"] = right(aware, data)
    return found


def chain(data: Dataset, seed: int) -> dict[str, float]:
    """Prune, share and code; the order of steps; low rank before and after."""
    model = trained(data, seed)
    found = {"float": right(model, data), "bytes of float": float(cp.saved_size(model))}
    for sparsity, clusters in CHAINS:
        settings = cp.DeepCompression(sparsity, clusters, after_pruning=tuning(), after_sharing=tuning())
        small = cp.prune_and_share(model, data, settings, seed=seed)
        name = f"{sparsity:.0%} pruned, {clusters} values"
        found[name] = right(small, data)
        found[f"bytes of {name}"] = float(len(cp.encode_model(small).data))
    found |= orders(model, data, seed)
    for energy in ENERGIES:
        ranks = cp.ranks_by_energy(model, energy)
        after = cp.factorise(model, ranks)
        found[f"low rank {energy}, as it is"] = right(after, data)
        fit(after, data, tuning(), seed=seed, progress=False)
        found[f"low rank {energy}, tuned"] = right(after, data)
        if energy == FROM_THE_START:
            before = trained(data, seed, partial(factorised, ranks))
            fit(before, data, tuning(), seed=seed, progress=False)
            found[f"low rank {energy}, before training"] = right(before, data)
        found[f"numbers of low rank {energy}"] = float(sum(p.numel() for p in after.parameters()))
    return found | {"numbers": float(sum(p.numel() for p in model.parameters()))}


def factorised(ranks: dict[str, int]) -> nn.Module:
    """A network that is of low rank from the start."""
    return cp.factorise(network(), ranks)


def orders(model: nn.Module, data: Dataset, seed: int) -> dict[str, float]:
    """Prune then round, round then prune; with and without training on in between."""
    pruned = copy.deepcopy(model)
    pruning.one_shot(pruned, data.train, sparsity=SPARSITY, criterion=pruning.magnitude)
    untuned = pruning.make_permanent(copy.deepcopy(pruned))
    fit(pruned, data, tuning(), seed=seed, progress=False)
    tuned = pruning.make_permanent(copy.deepcopy(pruned))
    grid = cp.Grid(ROUNDED)
    rounded = cp.with_reals(model, cp.round_to_nearest(model, grid))
    pruning.one_shot(rounded, data.train, sparsity=SPARSITY, criterion=pruning.magnitude)
    return {
        "pruned": right(untuned, data),
        "pruned, tuned": right(tuned, data),
        "pruned, rounded": right(cp.weights_only(untuned, grid), data),
        "pruned, tuned, rounded": right(cp.weights_only(tuned, grid), data),
        "rounded, pruned": right(rounded, data),
    }


STUDY = Study(
    "11",
    "How few bits does a residual network bear?",
    {
        "bits": Part("8 to 2 bits, calibrated and trained", many, {"everything": bits_of}, SEEDS),
        "chain": Part("Prune, share, code; low rank", many, {"everything": chain}, SEEDS),
    },
)
