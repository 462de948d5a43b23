r"""Averages in which each weight counts as much as its network is sure of it.

=====================  =====================================================  ======================================
name                   what it gives                                          source
=====================  =====================================================  ======================================
``fisher``             the diagonal of the Fisher information, by labels      Matena & Raffel 2021, arXiv:2111.09832
                       that are drawn from the network's own answers
``exact_fisher``       the same, by all labels: K passes for K classes
``empirical_fisher``   the squared gradients at the true labels: no Fisher    Kunstner, Balles & Hennig 2019,
                       information, but often taken for it                    arXiv:1905.12558
``fisher_merge``       the mean weighted by it                                Matena & Raffel 2021
``inner_products``     of the inputs of each linear layer                     Jin et al. 2022, arXiv:2212.09849
``regmean``            linear layers that answer most nearly as each of the   Jin et al. 2022
                       networks' own does on its own inputs
=====================  =====================================================  ======================================

Why weighted: where one network's loss is flat, moving its weight costs nothing, so the other may choose it. To the
second order the loss of network m rises around its weights by
:math:`\tfrac12(\theta-\theta_m)^\top F_m(\theta-\theta_m)`, and the sum over m is least at the Fisher-weighted mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Split, batches
from course_lib.merging.states import (
    State,
    at_least_float32,
    check_alike,
    check_share,
    combined,
    doubled,
    home,
    in_evaluation,
    parameters_of,
    shares,
    state_of,
    with_state,
)

# --- Fisher information -----------------------------------------------------------------------------------------------


def fisher(
    model: nn.Module, split: Split, *, generator: torch.Generator, samples: int = 1, batch_size: int = 64
) -> State:
    r"""Estimate the diagonal of the Fisher information, by the parameter's name.

    .. math:: F_i=\mathbb E_x\,\mathbb E_{y\sim p(y|x)}\left(\partial_{\theta_i}\log p(y|x)\right)^2

    For each example ``samples`` labels are drawn from the network's own probabilities, by a CPU ``generator``. In
    evaluation mode. It costs one backward pass an example and label.

    Raises
    ------
    ValueError : ``samples`` or ``batch_size`` is below 1, or the split is empty.
    """
    at_least(1, samples=samples)

    def drawn(x: Tensor, y: Tensor, squares: Callable[[Tensor, Tensor], State]) -> State:
        chances = model(x).softmax(1).cpu()
        labels = torch.multinomial(chances.float(), samples, replacement=True, generator=generator).to(y.device)
        even = torch.full_like(chances[:, 0], 1 / samples).to(y.device)
        return combined([squares(labels[:, k], even) for k in range(samples)], [1.0] * samples)

    return _mean_squares(model, split, batch_size, drawn)


def exact_fisher(model: nn.Module, split: Split, *, batch_size: int = 64) -> State:
    """Return what ``fisher`` estimates: the expectation over the labels, summed over all K of them."""

    def expected(x: Tensor, y: Tensor, squares: Callable[[Tensor, Tensor], State]) -> State:
        chances = model(x).softmax(1)
        classes = chances.shape[1]
        return combined([squares(torch.full_like(y, k), chances[:, k]) for k in range(classes)], [1.0] * classes)

    return _mean_squares(model, split, batch_size, expected)


def empirical_fisher(model: nn.Module, split: Split, *, batch_size: int = 64) -> State:
    """Return the mean over the examples of the squared gradient of each one's own loss, at its true label."""

    def at_the_labels(x: Tensor, y: Tensor, squares: Callable[[Tensor, Tensor], State]) -> State:
        return squares(y, torch.ones_like(y, dtype=home(model).dtype))

    return _mean_squares(model, split, batch_size, at_the_labels)


def _mean_squares(model: nn.Module, split: Split, batch_size: int, of_batch: Callable[..., State]) -> State:
    """The mean over the examples of what ``of_batch`` sums over a batch, in evaluation mode."""
    at_least(1, batch_size=batch_size)
    require("split", split, lambda s: len(s) > 0, "a split with examples")
    where, total = home(model), State()
    with in_evaluation(model), torch.no_grad():
        for x, y in batches(split.to(where.device), batch_size, dtype=where.dtype):
            found = of_batch(x, y, partial(_sum_of_squares, model, x))
            total = found if not total else combined([total, found], [1.0, 1.0])
    return {name: value / len(split) for name, value in total.items()}


def _sum_of_squares(model: nn.Module, x: Tensor, labels: Tensor, counts: Tensor) -> State:
    """Each example's squared gradient of ``log p(label)``, times how much the example counts ``[N]``, summed."""

    def log_likelihood(weights: State, one: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (one[None],))
        return logits.log_softmax(1)[0].gather(0, label[None])[0]

    # one gradient an example: the square of a sum is not the sum of the squares
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention cannot be batched
        each = torch.func.vmap(torch.func.grad(log_likelihood), in_dims=(None, 0, 0))(parameters_of(model), x, labels)
    return {name: torch.tensordot(counts.to(g.dtype), g.square(), dims=1) for name, g in each.items()}


def fisher_merge(
    models: Sequence[nn.Module],
    fishers: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
) -> nn.Module:
    r"""Return the network with :math:`\theta_i=\frac{\sum_m\lambda_mF_{m,i}\,\theta_{m,i}}{\sum_m\lambda_mF_{m,i}}`.

    Where no network's loss depends on a weight (all F are 0), and for buffers, it is the plain mean with
    :math:`\lambda`. ``weights`` are the :math:`\lambda_m`: shares of the networks, or of the data that each has seen.

    Raises
    ------
    ValueError : as ``average``; or there is not one Fisher information for each network, of its parameters.
    """
    found = check_alike(models)
    mix = shares(len(found), weights)
    given = list(fishers)
    if len(given) != len(found):
        raise ValueError(f"fishers has {len(given)} entries: must be one for each of the {len(found)} networks")
    merged = combined([state_of(model) for model in found], mix)
    for name, mean in ((name, merged[name]) for name in parameters_of(found[0])):
        above, below = (torch.zeros_like(mean, dtype=at_least_float32(mean.dtype)) for _ in range(2))
        for place, (model, information, share) in enumerate(zip(found, given, mix, strict=True)):
            if name not in information or information[name].shape != mean.shape:
                raise ValueError(f"fishers[{place}] does not fit {name!r}: must have a number for each of its weights")
            sure = share * information[name].to(below)
            below += sure
            above += sure * parameters_of(model)[name].to(above)
        merged[name] = torch.where(below > 0, above / torch.where(below > 0, below, 1), mean.to(above))
    return with_state(found[0], merged)


# --- Regression mean --------------------------------------------------------------------------------------------------


def inner_products(model: nn.Module, split: Split, *, batch_size: int = 256) -> State:
    r"""Return :math:`X^\top X` of each linear layer's inputs over a split, by the layer's name: ``[in, in]``.

    In evaluation mode; of tokens ``[N, tokens, in]`` each is a row. All that a network has to tell of its data.

    Raises
    ------
    ValueError : ``batch_size`` is below 1, or the network has no linear layer.
    """
    at_least(1, batch_size=batch_size)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    require("model", type(model).__name__, lambda _: bool(layers), "a network with a linear layer")
    found: State = {}

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = doubled(inputs[0].detach().flatten(0, -2))  # [N, …, in] -> [rows, in]; to be inverted
        found[name] = rows.mT @ rows + found.get(name, 0.0)

    hooks = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        where = home(model)
        with in_evaluation(model), torch.no_grad():
            for x, _ in batches(split.to(where.device), batch_size, dtype=where.dtype):
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def regression_mean(weights: Sequence[Tensor], products: Sequence[Tensor], alpha: float = 1.0) -> Tensor:
    r"""Return the ``[out, in]`` weight W that minimises :math:`\sum_m\|X_mW^\top-X_mW_m^\top\|^2`.

    .. math:: W^\top=\Big(\sum_m G_m\Big)^{-1}\sum_m G_mW_m^\top,\qquad G_m=X_m^\top X_m

    with the entries of each :math:`G_m` beside the diagonal times ``alpha`` (0: each input by itself). In directions in
    which no inputs lie all W do equally well; there it is the mean of the :math:`W_m`.
    """
    given = [doubled(weight) for weight in weights]
    mean = torch.stack(given).mean(0)
    grams = [alpha * g + (1 - alpha) * g.diagonal().diag() for g in map(doubled, products)]
    # what is left to explain is solved for, so that the unseen directions keep the mean
    pull = torch.stack([g @ (weight - mean).mT for g, weight in zip(grams, given, strict=True)]).sum(0)
    return (mean + (torch.linalg.pinv(torch.stack(grams).sum(0), hermitian=True) @ pull).mT).to(weights[0].dtype)


def regmean(models: Sequence[nn.Module], products: Sequence[Mapping[str, Tensor]], *, alpha: float = 0.9) -> nn.Module:
    """Return the network whose linear layers are the ``regression_mean`` of the networks' own, all else the mean.

    ``products`` are the ``inner_products`` of each network on its own data. Biases are averaged, as in the paper, and
    so are convolutions and norms. ``alpha`` is the paper's factor of what lies beside the diagonals.

    Raises
    ------
    ValueError : the networks are none or of different shapes, there are not products for each and each of their linear
        layers, or ``alpha`` is not in [0, 1].
    """
    found = check_alike(models)
    check_share(alpha=alpha)
    given = list(products)
    if len(given) != len(found):
        raise ValueError(f"products has {len(given)} entries: must be one for each of the {len(found)} networks")
    merged = combined([state_of(model) for model in found], shares(len(found), None))
    for name, layer in found[0].named_modules():
        if isinstance(layer, nn.Linear):
            key = f"{name}.weight" if name else "weight"
            own = [state_of(model)[key] for model in found]
            for place, each in enumerate(given):
                if name not in each or each[name].shape != (layer.in_features,) * 2:
                    raise ValueError(f"products[{place}] does not fit layer {name!r}: must be its inner_products")
            merged[key] = regression_mean(own, [each[name].to(own[0].device) for each in given], alpha)
    return with_state(found[0], merged)
