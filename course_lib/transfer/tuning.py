r"""A trained network for another task: its features alone, all of its weights, or something in between.

==================================  ===============================================  =================================
name                                what it does                                     source
==================================  ===============================================  =================================
``with_head``                       a new last layer for other classes               –
``features``                        what a layer says of each example                –
``probe``                           logistic regression on features                  –
``probe_curve``                     how much of the task each layer knows            Alain & Bengio 2016,
                                                                                     arXiv:1610.01644
``with_probe``                      the regression as the network's head             –
``fine_tune``                       all weights, from where they are                 –
``linear_probe_then_fine_tune``     all weights, from a head that fits already       Kumar et al. 2022,
                                                                                     arXiv:2202.10054
``gradual_unfreezing``              the last layer first, then one more at a time    Howard & Ruder 2018,
                                                                                     arXiv:1801.06146
``discriminative_rates``            the deeper a layer lies, the larger its rate     Howard & Ruder 2018
``l2_sp``                           held near the start                              Li et al. 2018, arXiv:1802.01483
``bitfit``                          biases alone                                     Ben Zaken et al. 2021,
                                                                                     arXiv:2106.10199
``trainable``                       how many numbers train                           –
==================================  ===============================================  =================================
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from course_lib.lab.arguments import at_least, require
from course_lib.lab.data import Dataset, Split, batches
from course_lib.lab.models import freeze, thaw
from course_lib.lab.training import History, Inputs, Objective, Recipe, cross_entropy, fit
from course_lib.merging.states import (
    State,
    check_not_negative,
    check_positive,
    doubled,
    home,
    in_evaluation,
    parameters_of,
)
from course_lib.schedules.by_layer import ULMFIT_DECAY, layers_by_depth, layerwise_factors, with_layer_rates
from course_lib.transfer.parts import EMBEDDING, drawn_from, head_name, head_of, layer_names, pooled, tapped

# --- The last layer ---------------------------------------------------------------------------------------------------


def with_head(model: nn.Module, classes: int, *, generator: torch.Generator) -> nn.Module:
    """Return a copy of the network whose last linear layer is a new one, for ``classes`` classes.

    Its weights are drawn as ``nn.Linear`` draws them, by ``generator``. It trains, also where the rest is frozen.
    Works with the laboratory's networks and with torchvision's classifiers.

    Raises
    ------
    ValueError : ``classes`` is below 1, or the network has no linear layer.
    """
    at_least(1, classes=classes)
    old = head_of(model)
    with drawn_from(generator, old.weight):
        new = nn.Linear(old.in_features, classes, old.bias is not None)
    return _with_layer(model, new.to(old.weight.device))


def _with_layer(model: nn.Module, head: nn.Linear) -> nn.Module:
    """A copy of the network with this head."""
    made: Any = copy.deepcopy(model)
    above, _, last = head_name(made).rpartition(".")
    setattr(made.get_submodule(above), last, head.train(model.training))
    if hasattr(made, "classes"):
        made.classes = head.out_features
    return made


# --- Features and what a straight line makes of them ------------------------------------------------------------------


def features(model: nn.Module, split: Split, layer: str = EMBEDDING, *, batch_size: int = 256) -> Tensor:
    """Return what a layer says of each example, ``[N, D]``, in evaluation mode and without gradients.

    ``layer`` is a name of ``model.named_modules()``, its output averaged over places or tokens; by default what goes
    into the head.

    Raises
    ------
    ValueError : there is no such layer, it gives no tensor, or ``batch_size`` is below 1.
    """
    return _features(model, split, [layer], batch_size)[layer]


def features_by_layer(
    model: nn.Module, split: Split, layers: Sequence[str] | None = None, *, batch_size: int = 256
) -> dict[str, Tensor]:
    """Return the ``features`` of several layers, by name, in one pass; by default of all that ``layer_names`` lists."""
    return _features(model, split, layer_names(model) if layers is None else list(layers), batch_size)


def _features(model: nn.Module, split: Split, layers: Sequence[str], batch_size: int) -> dict[str, Tensor]:
    where, parts = home(model), {layer: list[Tensor]() for layer in layers}
    with in_evaluation(model), torch.no_grad(), tapped(model, layers) as found:
        for x, _ in batches(split.to(where.device), batch_size, dtype=where.dtype):
            model(x)
            for layer in layers:
                parts[layer].append(pooled(found[layer]))
    return {layer: torch.cat(part) for layer, part in parts.items()}


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of features.

    Attributes
    ----------
    weight : float64 ``[K, D]``.
    bias : float64 ``[K]``.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """Features ``[N, D]`` to logits ``[N, K]``."""
        return F.linear(doubled(x), self.weight, self.bias)

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Return the share of features ``[N, D]`` whose largest logit is that of the label."""
        return (self.logits(x).argmax(1) == labels.to(x.device)).double().mean().item()


def probe(x: Tensor, labels: Tensor, *, C: float = 1.0, classes: int | None = None, steps: int = 1000) -> Probe:
    r"""Return the logistic regression of labels ``[N]`` on features ``[N, D]``.

    .. math:: \min_{W,b}\;C\sum_i-\log\text{softmax}(Wx_i+b)_{y_i}+\tfrac12\|W\|^2

    by L-BFGS on all examples, in float64, from zero; the bias is not penalised. For three classes or more this is
    ``LogisticRegression(C=C)`` of scikit-learn; for two, which that solves with one row of weights, it is the one of
    ``2 C``.

    Parameters
    ----------
    C : the inverse strength of the penalty, as in scikit-learn.
    classes : how many there are; by default as many as it takes for the largest label.
    steps : iterations at most; it stops when the gradient has vanished.

    Raises
    ------
    ValueError : the features are no matrix, the labels not int64 ``[N]`` below ``classes``, ``C`` is not above 0, or
        ``steps`` below 1.
    """
    check_positive(C=C)
    at_least(1, steps=steps)
    require("x", list(x.shape), lambda shape: len(shape) == 2 and shape[0] > 0, "features [N, D], N > 0")
    if labels.dtype != torch.int64 or labels.shape != x.shape[:1] or int(labels.min()) < 0:
        raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}: must be int64 [{len(x)}] of at least 0")
    largest = int(labels.max())
    classes = largest + 1 if classes is None else classes
    require("classes", classes, lambda k: k > largest, f"above the largest label, {largest}")
    x, labels = doubled(x.detach()), labels.to(x.device)
    count, penalty = len(x), 1 / (C * len(x))
    # Along the axes of the features' covariance, each about as curved as any other, L-BFGS needs tens of steps and not
    # thousands. The bias takes up the mean, so that the solution is the same.
    middle = x.mean(0)
    spread, axes = torch.linalg.eigh((x - middle).mT @ (x - middle) / count)
    sizes = (spread.clamp_min(0) / classes + penalty).rsqrt()
    z = (x - middle) @ axes * sizes
    turned = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    shift = torch.zeros_like(turned[:, 0], requires_grad=True)
    solver = torch.optim.LBFGS(
        [turned, shift], max_iter=steps, history_size=20, tolerance_grad=1e-10, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        solver.zero_grad()
        # over the number of examples, so that one tolerance serves any number
        loss = F.cross_entropy(F.linear(z, turned, shift), labels) + penalty / 2 * (turned * sizes).square().sum()
        loss.backward()
        return loss.item()

    with torch.enable_grad():
        solver.step(closure)
    weight = (turned.detach() * sizes) @ axes.mT
    return Probe(weight, shift.detach() - weight @ middle)


def probe_curve(
    model: nn.Module, train: Split, test: Split, *, layers: Sequence[str] | None = None, C: float = 1.0
) -> dict[str, float]:
    """Return the test accuracy of a ``probe`` on each layer's features, by the layer's name, from the input on.

    Raises
    ------
    ValueError : there is no such layer, or ``C`` is not above 0.
    """
    seen, held = (features_by_layer(model, split, layers) for split in (train, test))
    return {name: probe(x, train.labels, C=C).accuracy(held[name], test.labels) for name, x in seen.items()}


def with_probe(model: nn.Module, weights: Probe) -> nn.Module:
    """Return a copy of the network whose head is the probe, with the probe's classes.

    Raises
    ------
    ValueError : the probe is of features of another size than the head's.
    """
    old, (classes, size) = head_of(model), weights.weight.shape
    require("weights", [classes, size], lambda _: size == old.in_features, f"a probe of {old.in_features} features")
    new = torch.nn.utils.skip_init(nn.Linear, size, classes, dtype=old.weight.dtype, device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(weights.weight)
        new.bias.copy_(weights.bias)
    return _with_layer(model, new)


# --- All weights ------------------------------------------------------------------------------------------------------


class FineTuned(NamedTuple):
    """The ``network`` that came of it, and the run's ``history``."""

    network: nn.Module
    history: History


def fine_tune(model: nn.Module, data: Dataset, recipe: Recipe, *, seed: int, progress: bool | None = None) -> FineTuned:
    """Train a copy of the network, all of it, with a new head of ``seed`` for the data's classes.

    ``progress`` is that of ``fit``.
    """
    start = _ready(model, recipe)
    network = with_head(start, len(data.classes), generator=torch.Generator().manual_seed(seed))
    return FineTuned(network, fit(network, data, recipe, seed=seed, progress=progress))


def linear_probe_then_fine_tune(
    model: nn.Module, data: Dataset, recipe: Recipe, *, seed: int, C: float = 1.0, progress: bool | None = None
) -> FineTuned:
    """Train a copy of the network, all of it, with a ``probe`` of the training split for its first head (LP-FT).

    A random head sends large, meaningless gradients into features that were good. One that fits already moves them
    only where they help.

    Raises
    ------
    ValueError : ``C`` is not above 0.
    """
    start = _ready(model, recipe)
    network = with_probe(start, probe(features(start, data.train), data.train.labels, C=C))
    return FineTuned(network, fit(network, data, recipe, seed=seed, progress=progress))


def _ready(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy that trains, in the type in which ``fit`` computes."""
    return thaw(copy.deepcopy(model)).to(recipe.dtype)


# --- Some layers before others, and faster ----------------------------------------------------------------------------


def layers_training(epoch: int, layers: int, epochs_each: int = 1) -> int:
    """Return how many of a network's last layers train in an epoch, counted from 1: one more each ``epochs_each``."""
    return min(layers, 1 + (epoch - 1) // epochs_each)


def gradual_unfreezing(recipe: Recipe, model: nn.Module, data: Dataset, *, epochs_each: int = 1) -> Recipe:
    """Return the recipe in which at first the last layer alone trains, and one more after each ``epochs_each`` epochs.

    Layers are those of ``schedules.layers_by_depth``; any network of this architecture can be trained by the recipe.
    What was frozen before stays so. Batch norm's running statistics move in all layers from the beginning.
    The optimizer's counter of steps says which layers train, so that a run that goes on from a checkpoint fits.

    Raises
    ------
    ValueError : ``epochs_each`` is below 1.
    """
    at_least(1, epochs_each=epochs_each)
    order = [name for names in reversed(layers_by_depth(model)) for name in names]
    depth = {name: place for place, names in enumerate(reversed(layers_by_depth(model))) for name in names}
    layers, steps, wrapped = 1 + max(depth.values()), recipe.steps(len(data.train)), recipe.optimizer
    after = [sum(steps[:epoch]) for epoch in range(1, len(steps))]  # the steps at which an epoch begins

    def make(parameters: Iterator[tuple[str, nn.Parameter]]) -> Optimizer:
        given = dict(parameters)
        if lacking := sorted(given.keys() - set(order)):
            raise ValueError(f"model has no parameter {lacking[0]!r}: must be of the architecture that is trained")
        training = {name: parameter for name, parameter in given.items() if parameter.requires_grad}
        optimizer = wrapped(iter(given.items()))
        optimizer.param_groups[0]["steps_unfrozen"] = 0

        def before_step(optimizer: Optimizer, *_: Any) -> None:
            done = optimizer.param_groups[0]["steps_unfrozen"]
            last = layers_training(1 + sum(done >= start for start in after), layers, epochs_each)
            for name, parameter in training.items():
                parameter.requires_grad_(depth[name] < last)
            optimizer.param_groups[0]["steps_unfrozen"] = done + 1

        optimizer.register_step_pre_hook(before_step)
        return optimizer

    return replace(recipe, optimizer=make)


def discriminative_rates(recipe: Recipe, model: nn.Module, *, decay: float = ULMFIT_DECAY) -> Recipe:
    """Return the recipe with the learning rate of each layer ``decay`` times that of the layer behind it.

    The last layer has the recipe's own rate; a schedule keeps the ratios. Layers and factors are those of
    ``schedules.layerwise_factors``; any network of this architecture can be trained by it.

    Raises
    ------
    ValueError : ``decay`` is not above 0.
    """
    return replace(recipe, optimizer=with_layer_rates(recipe.optimizer, layerwise_factors(model, decay)))


# --- Near the start ---------------------------------------------------------------------------------------------------


def starting_point(model: nn.Module) -> State:
    """Return copies of the network's parameters by name: the ``start`` of ``l2_sp``."""
    return {name: value.clone() for name, value in parameters_of(model).items()}


def l2_sp(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    start: Mapping[str, Tensor],
    alpha: float = 0.1,
    beta: float = 0.01,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the objective and :math:`\tfrac\alpha2\|w_S-w_S^0\|^2+\tfrac\beta2\|w_{\bar S}\|^2`.

    :math:`w_S` are the weights that ``start`` has in the same shape, :math:`w_{\bar S}` the others: a new head's. Only
    those that train count.

    Raises
    ------
    ValueError : ``alpha`` or ``beta`` is negative.
    """
    check_not_negative(alpha=alpha, beta=beta)
    loss = objective(model, x, y)
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        first = start.get(name)
        if first is not None and first.shape == value.shape:
            loss = loss + alpha / 2 * (value - first.to(value)).square().sum()
        else:
            loss = loss + beta / 2 * value.square().sum()
    return loss


# --- Few numbers ------------------------------------------------------------------------------------------------------


def bitfit(model: nn.Module) -> nn.Module:
    """Return a copy of which biases and the head train, and nothing else.

    Shifts of norms are biases. The rest is frozen: batch norm computes with the statistics that it has, so that the
    difference to the network is the biases and the head.

    Raises
    ------
    ValueError : the network has no linear layer.
    """
    made = freeze(copy.deepcopy(model))
    thaw(head_of(made))
    for name, parameter in made.named_parameters():
        if name.rpartition(".")[2] == "bias":
            parameter.requires_grad_(True)
    return made


def trainable(model: nn.Module) -> int:
    """Return how many numbers of the network train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
