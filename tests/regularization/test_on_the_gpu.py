"""Every public function on a GPU, or on one that is emulated: the numbers of the CPU, from tensors over there.

Networks are moved, data sets stay here: what takes a data set brings it along. Generators are on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import regularization as reg
from course_lib.lab.data import Dataset, load
from course_lib.lab.models import mlp
from course_lib.lab.training import Recipe, cross_entropy, fit, fresh, logits_of
from tests.regularization.small import (
    EXACT,
    Move,
    every_name_once,
    generator,
    images,
    network,
    normal,
    on_the_gpu_as_here,
    smooth_network,
)

N, K = 8, 4
LABELS = torch.arange(N) % K
Z = 2 * normal(N, K, seed=1)
MANY = normal(3, N, K, seed=2)
X, Y, W = normal(N, 3, seed=3), normal(N, seed=4), normal(3, seed=5)
SHORT = Recipe(epochs=1, batch_size=20, precision="float64")
ADAM = partial(torch.optim.AdamW, lr=0.01)


@cache
def digits() -> Dataset:
    return load("digits", train_size=40)


def small() -> nn.Module:
    return mlp((1, 8, 8), 10, width=6)


def trained(to: Move, recipe: Recipe, change: Callable[[nn.Module], nn.Module] = copy.copy) -> list[Tensor]:
    """The weights after a short run that begins there; the data set stays here."""
    model = to(change(fresh(small, recipe, seed=0)))
    fit(model, digits(), recipe, seed=0)
    return list(model.parameters())


def placed(to: Move, change: Callable[[nn.Module], nn.Module], name: str = "convnet") -> Tensor:
    """What a network says that was changed over there."""
    return change(to(network(name).train()))(to(images()[0]))


def turned_weight(to: Move) -> tuple[list[float], list[float]]:
    rotations = reg.Rotations()
    trained(to, reg.turned(SHORT, rotations))
    return rotations.norms, rotations.angles


def halves(to: Move) -> Tensor:
    return reg.resampled_logits(small, digits(), SHORT, reg.disjoint_parts(to(digits().train), 2, generator()), seed=0)


def widths(to: Move) -> Any:
    features = reg.RandomFeatures(5, 9, generator())  # drawn here, used there
    train, test = ((to(normal(6, 5, seed=s)), to(reg.one_hot_targets(LABELS[:6], K))) for s in (1, 2))
    return [tuple(found) for found in reg.errors_over_width(features, train, test, [3, 9], alpha=0.1)]


def perturbed(to: Move) -> Tensor:
    model = to(network())
    return reg.Perturbed(model, {"head.bias": to(torch.ones(4).double())})(to(images()[0]))


def seen(to: Move) -> tuple[Tensor, bool]:
    model, x = to(network()), to(images()[0])
    known = reg.Seen(model, x, model(x))
    return known(x), reg.unseen(known) is model


def share_of_zeros(to: Move) -> tuple[float, float]:
    model = to(nn.Linear(2, 2))
    with torch.no_grad():
        model.weight[0] = 0
    return reg.zero_share(model), reg.zero_share(model, rows=True)


def wrong_labels(to: Move) -> tuple[Tensor, Tensor]:
    noisy, wrong = reg.with_wrong_labels(to(digits()), 0.3, generator())
    return noisy.train.labels, wrong


def batch_norm(to: Move) -> tuple[Tensor, ...]:
    mean, var = to(torch.zeros(2).double()), to(torch.ones(2).double())
    x = to(normal(4, 2, 3, 3))
    return reg.batch_norm(x, mean, var, training=True), mean, var, reg.batch_norm(x, mean, var)


def pairs(to: Move, f: Callable[..., Tensor]) -> Tensor:
    """Of a convolution's weight and a rate."""
    return f(to(normal(4, 2, 3, 3)), 0.1)


CASES: dict[str, Callable[[Move], Any]] = {
    # calibration
    "reliability": lambda to: tuple(reg.reliability(to(Z), to(LABELS), 5)),
    "calibration_error": lambda to: reg.calibration_error(to(Z), to(LABELS)),
    "brier_score": lambda to: (reg.brier_score(to(Z), to(LABELS)), reg.brier_score(to(Z), LABELS)),
    "fit_temperature": lambda to: reg.fit_temperature(to(Z), to(LABELS)),
    "Tempered": lambda to: reg.Tempered(to(network()), 2.0)(to(images()[0])),
    "tempered": lambda to: reg.tempered(to(fresh(small, SHORT, seed=0)), digits().val).temperature,
    # consistency
    "kl_divergence": lambda to: reg.kl_divergence(to(Z), to(Z.flip(0))),
    "worst_direction": lambda to: reg.worst_direction(
        m := to(network("convnet")), x := to(images()[0]), m(x), generator=generator()
    ),
    # decomposition
    "squared_error_parts": lambda to: tuple(reg.squared_error_parts(to(MANY), to(Z), corrected=True)),
    "cross_entropy_parts": lambda to: [tuple(reg.cross_entropy_parts(to(MANY), y)) for y in (to(LABELS), LABELS)],
    "main_prediction": lambda to: reg.main_prediction(to(MANY).argmax(2), K),
    "zero_one_parts": lambda to: [tuple(reg.zero_one_parts(to(MANY).argmax(2), y, K)) for y in (to(LABELS), LABELS)],
    "bootstrap": lambda to: reg.bootstrap(to(digits().train), generator()).images,
    "disjoint_parts": lambda to: [part.images for part in reg.disjoint_parts(to(digits().train), 2, generator())],
    # double_descent
    "RandomFeatures": lambda to: reg.RandomFeatures(5, 9, generator())(to(normal(6, 5)), 4),
    "errors_over_width": widths,
    "minimum_norm": lambda to: reg.minimum_norm(to(X), to(Y)),
    "one_hot_targets": lambda to: reg.one_hot_targets(to(LABELS), K),
    # ridge
    "ridge": lambda to: (reg.ridge(to(X), to(Y), 0.1), reg.ridge(to(X.mT), to(normal(3, 2)), 0.0)),
    "eigenvalues": lambda to: reg.eigenvalues(to(X.mT)),
    "shrinkage": lambda to: reg.shrinkage(to(X.mT), 0.1),
    "degrees_of_freedom": lambda to: reg.degrees_of_freedom(to(X), 0.1),
    "ridge_bias_variance": lambda to: tuple(reg.ridge_bias_variance(to(X), to(W), 0.1, 0.2)),
    # drop, noise
    "kept": lambda to: reg.kept((3, 4), 0.3, to(X), generator()),
    "dropout": lambda to: reg.dropout(to(X), 0.3, generator=generator()),
    "gaussian_dropout": lambda to: reg.gaussian_dropout(to(X), 0.3, generator=generator()),
    "dropout2d": lambda to: reg.dropout2d(to(images()[0]), 0.3, generator=generator()),
    "drop_block2d": lambda to: reg.drop_block2d(to(images()[0]), 0.3, 3, generator=generator()),
    "stochastic_depth": lambda to: [
        reg.stochastic_depth(to(X), 0.3, "row", generator=generator()),
        reg.stochastic_depth(to(X), 0.3, "batch", generator=generator()),
    ],
    "drop_connect": lambda to: reg.drop_connect(to(X), to(normal(2, 3)), to(normal(2)), 0.3, generator=generator()),
    "GaussianDropout": lambda to: reg.GaussianDropout(0.3, generator())(to(X)),
    "GaussianNoise": lambda to: reg.GaussianNoise(0.3, generator())(to(X)),
    "with_noise": lambda to: placed(to, lambda m: reg.with_noise(m, partial(reg.GaussianNoise, 0.3, generator()))),
    "without_noise": lambda to: placed(to, lambda m: reg.without_noise(reg.with_drop_connect(m)), "mlp"),
    "gaussian_noise": lambda to: reg.gaussian_noise(to(X), 0.3, generator=generator()),
    "input_noise": lambda to: reg.input_noise(
        to(network().train()), *map(to, images()), std=0.3, generator=generator()
    ),
    "weight_noise": lambda to: reg.weight_noise(
        to(network().train()), *map(to, images()), std=0.3, generator=generator()
    ),
    # equivalents
    "linear_loss": lambda to: reg.linear_loss(to(X), to(Y), to(W)),
    "input_noise_loss": lambda to: reg.input_noise_loss(to(X), to(Y), to(W), 0.3),
    "input_noise_solution": lambda to: reg.input_noise_solution(to(X), to(Y), 0.3),
    "dropout_loss": lambda to: reg.dropout_loss(to(X), to(Y), to(W), 0.3),
    "dropout_solution": lambda to: reg.dropout_solution(to(X), to(Y), 0.3),
    "dropout_logistic_penalty": lambda to: reg.dropout_logistic_penalty(to(X), to(W), 0.3),
    "input_noise_curvature": lambda to: reg.input_noise_curvature(
        partial(_losses, to(smooth_network())), to(normal(4, 2)), 0.3
    ),
    "input_noise_tikhonov": lambda to: reg.input_noise_tikhonov(
        m := to(smooth_network()), x := to(normal(4, 2)), 0.3, reg.softmax_curvature(m(x))
    ),
    "softmax_curvature": lambda to: reg.softmax_curvature(to(Z)),
    "squared_error": lambda to: reg.squared_error(to(network()), to(images(N)[0]), to(Z)),
    # input_gradients
    "squared_jacobian": lambda to: reg.squared_jacobian(to(network())(x := to(images()[0]).requires_grad_()), x),
    "projected_squared_jacobian": lambda to: reg.projected_squared_jacobian(
        to(network())(x := to(images()[0]).requires_grad_()), x, 2, generator()
    ),
    # normalisation
    "batch_norm": batch_norm,
    "layer_norm": lambda to: reg.layer_norm(to(X), (3,), to(W), to(W)),
    "group_norm": lambda to: reg.group_norm(to(normal(2, 4, 3)), 2, to(normal(4)), to(normal(4))),
    "rms_norm": lambda to: reg.rms_norm(to(X), (3,), to(W)),
    "weight_norm": lambda to: reg.weight_norm(to(X), to(normal(N, 1))),
    "WeightNorm": lambda to: reg.WeightNorm()(*reg.WeightNorm().right_inverse(to(X))),
    "Shift": lambda to: to(reg.Shift(3, 1))(to(X)),
    # passes
    "Perturbed": perturbed,
    "Seen": seen,
    "weights_of": lambda to: reg.weights_of(to(network()).parameters()),
    # penalties
    "half_squared_norm": lambda to: reg.half_squared_norm(to(network()).parameters()),
    "l1_norm": lambda to: reg.l1_norm(to(network()).parameters()),
    "group_norm_sum": lambda to: reg.group_norm_sum(reg.weights_of(to(network("convnet")).parameters())),
    "gram_residual": lambda to: reg.gram_residual(to(normal(4, 2, 3, 3))),
    "largest_singular_value": lambda to: reg.largest_singular_value(to(X), 3),
    "decay_only_weights": lambda to: trained(
        to, Recipe(1, 20, partial(reg.decay_only_weights, make=ADAM, weight_decay=0.3), precision="float64")
    ),
    # proximal
    "soft_threshold": lambda to: reg.soft_threshold(to(X), 0.3),
    "group_soft_threshold": lambda to: reg.group_soft_threshold(to(X), 0.3),
    "clip_row_norms": lambda to: reg.clip_row_norms(to(X), 0.3),
    "prox_l1": lambda to: pairs(to, partial(reg.prox_l1, strength=0.3)),
    "prox_l2": lambda to: pairs(to, partial(reg.prox_l2, weight_decay=0.3)),
    "prox_elastic_net": lambda to: pairs(to, partial(reg.prox_elastic_net, alpha=0.3)),
    "prox_group_lasso": lambda to: pairs(to, partial(reg.prox_group_lasso, strength=0.3)),
    "max_norm": lambda to: pairs(to, partial(reg.max_norm, limit=0.3)),
    "after_step": lambda to: trained(to, reg.after_step(SHORT, partial(reg.prox_group_lasso, strength=0.3))),
    "zero_share": share_of_zeros,
    # scale_invariance
    "radial_share": lambda to: reg.radial_share(to(X), to(X.flip(0))),
    "effective_rate": lambda to: reg.effective_rate(0.1, to(X)),
    "angle": lambda to: reg.angle(to(X), to(X.flip(0))),
    "turned": turned_weight,
    # spectral
    "power_step": lambda to: reg.power_step(to(X), to(W)),
    "SpectralNorm": lambda to: reg.SpectralNorm(to(X), generator=generator())(to(X)),
    "spectral_norm": lambda to: reg.spectral_norm(to(smooth_network(3)[0]), generator=generator())(to(X)),
    "with_spectral_norm": lambda to: placed(to, partial(reg.with_spectral_norm, generator=generator())),
    # targets
    "smoothed": lambda to: reg.smoothed(to(Z.softmax(1)), 0.3),
    "entropy": lambda to: reg.entropy(to(Z)),
    "with_wrong_labels": wrong_labels,
}
ON_THE_CPU = {"resampled_logits": halves}  # the network has been there; the answers lie where the test labels do
IN_OTHER_FILES = """
    r_drop virtual_adversarial gradient_penalty jacobian_penalty projected_jacobian_penalty
    Dropout Dropout2d DropBlock2d DropConnect StochasticDepth
    with_drop_block with_drop_connect with_dropout with_dropout2d with_stochastic_depth
    l1 l2 elastic_net group_lasso soft_orthogonality spectral_penalty srip with_norm
    label_smoothing confidence_penalty soft_bootstrap hard_bootstrap generalized_cross_entropy symmetric_cross_entropy
"""
HOLD_NO_TENSORS = """
    Kind Parts Prox Reliability RidgeError WidthError Rotations unseen linear_depth norm_over_steps equilibrium_norm
    equilibrium_rotation adam_equilibrium_rotation
"""


def _losses(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), (torch.arange(len(x)) % 3).to(x.device), reduction="none")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu_as_here(name: str) -> None:
    on_the_gpu_as_here(CASES[name], rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_computed_on_the_gpu_and_brought_back(name: str) -> None:
    on_the_gpu_as_here(ON_THE_CPU[name], rtol=1e-6, lies="cpu")


def test_every_public_name_has_been_there() -> None:
    every_name_once(reg, CASES, ON_THE_CPU, IN_OTHER_FILES, HOLD_NO_TENSORS)


@pytest.mark.gpu
def test_measures_watch_a_run_on_the_gpu() -> None:
    """In ``watch`` the network and the data lie there, and so do logits and labels."""

    def watched(model: nn.Module, data: Dataset) -> float:
        return reg.calibration_error(logits_of(model, data.val), data.val.labels)

    history = fit(fresh(small, EXACT, seed=0), digits(), Recipe(2, 20, watch={"ece": watched}), seed=0)
    assert 0 < history["ece"][-1] < 1


@pytest.mark.gpu
def test_noise_without_a_generator_is_drawn_there() -> None:
    model = reg.with_dropout(network("convnet").train()).cuda()
    x, y = (part.cuda() for part in images())
    cross_entropy(reg.with_norm(reg.with_stochastic_depth(network("resnet").train()), "group").cuda(), x, y).backward()
    assert not torch.equal(model(x), model(x))
